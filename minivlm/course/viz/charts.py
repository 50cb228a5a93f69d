"""Curves, the growth of the KV cache, and the distribution that the next token is sampled from.

V tokens in the vocabulary
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np

from minivlm.course.viz.drawing import rectangle, sheet, styled, write
from minivlm.course.viz.figure import Figure, from_figure
from minivlm.course.viz.inputs import Numbers, check_array, check_strings, softmax
from minivlm.course.viz.style import (
    BLUE,
    BODY,
    DPI,
    GRAY,
    GREEN,
    INK,
    LIGHT,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    VERMILION,
    WIDTH,
    tint,
)
from minivlm.course.viz.text import count, fit, listed, number, percent, readable, text_width, titled, visible
from minivlm.course.viz.tokens import token_text

# Series differ in color, marker and dashes. Yellow is too faint for a line on white.
LOOKS = [
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": VERMILION, "marker": "s", "linestyle": "--"},
    {"color": GREEN, "marker": "^", "linestyle": "-."},
    {"color": PURPLE, "marker": "D", "linestyle": ":"},
    {"color": ORANGE, "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    {"color": SKY, "marker": "P", "linestyle": (0, (8, 3))},
    {"color": INK, "marker": "X", "linestyle": (0, (1, 3))},
]
RESOLUTIONS = {"224 px": 256, "448 px": 1024, "896 px": 4096}  # image tokens of the three PaliGemma checkpoints
UNITS = ("bytes", "KB", "MB", "GB", "TB")


def plot(height: Real, left: Real, right: Real, top: Real, bottom: Real):
    """A figure of the usual width with one axes inside the given margins, all in pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, round(height) / DPI), dpi=DPI)
    area = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
    return figure, figure.add_axes(area)


@styled
def lines(series: Mapping[str, tuple], title: str, x_label: str, y_label: str, log: str = "") -> Figure:
    """Curves, each with its own color, marker and dashes, and its name at its right end.

    Args:
        series: One to seven names, each with its x values and its y values, two lists of equal length.
        title: A line above.
        x_label: What the x axis shows, with its unit.
        y_label: What the y axis shows, with its unit.
        log: The axes with a logarithmic scale: "", "x", "y" or "xy".

    Raises:
        ValueError: If there are no or too many series, x and y differ in length, or a value on a logarithmic axis is
            not positive.
    """
    from matplotlib.ticker import NullFormatter

    if not 1 <= len(series) <= len(LOOKS):
        raise ValueError(f"A chart needs one to {len(LOOKS)} series, not {len(series)}.")
    if log not in ("", "x", "y", "xy"):
        raise ValueError(f'log must be "", "x", "y" or "xy", not {log!r}.')
    curves = {name: check_curve(name, *xy, log) for name, xy in series.items()}
    names = max(text_width(name, SMALL) for name in curves)
    if names > 220:
        raise ValueError("The name of a series is too long to fit beside its curve. Shorten it.")
    figure, axes = plot(440, 92, 24 + (names + 16 if len(curves) > 1 else 0), 46, 54)
    axes.set_title(title, pad=14)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.yaxis.set_label_coords(24 / WIDTH, 0.5, figure.transFigure)  # left of the widest numbers
    for (x, y), look in zip(curves.values(), LOOKS, strict=False):
        marked = sorted({*range(0, len(x), max(1, len(x) // 16)), len(x) - 1})  # more markers would hide the curve
        axes.plot(x, y, linewidth=2, markersize=6, markevery=marked, **look)
    for name in log:
        axes.set(**{f"{name}scale": "log"})
        axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
        axis.set_major_formatter(power_of_ten)
        axis.set_minor_formatter(NullFormatter())
    if "y" not in log and all((y >= 0).all() for _, y in curves.values()):
        axes.set_ylim(bottom=0)
    if len(curves) > 1:
        name_curves(axes, curves)
    return from_figure(figure, describe_lines(curves, title, x_label, y_label))


def check_curve(name: str, x: Numbers, y: Numbers, log: str) -> tuple[np.ndarray, np.ndarray]:
    """The x and y values of a series as arrays of equal length."""
    x, y = check_array(f"the x values of {name!r}", x, 1), check_array(f"the y values of {name!r}", y, 1)
    if len(x) != len(y):
        raise ValueError(f"The series {name!r} has {len(x)} x values and {len(y)} y values. It needs as many of both.")
    for axis, values in (("x", x), ("y", y)):
        if axis in log and values.min() <= 0:
            low = number(values.min())
            raise ValueError(f"The series {name!r} has {axis} = {low}, but a logarithmic axis needs positive values.")
    return x, y


def power_of_ten(value: Real, _position: int) -> str:
    """Label of a tick on a logarithmic axis: ``0.01``, ``100``, ``10⁶``."""
    if 0.001 <= value < 1_000_000:
        return f"{value:,g}"
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def name_curves(axes, curves: Mapping[str, tuple]) -> None:
    """Writes each name to the right of the axes, at the height of the end of its curve, without overlap."""
    axes.autoscale_view()  # matplotlib delays this until it draws, but the ends of the curves are needed now
    area = axes.get_window_extent()
    last = [(x[-1], y[-1]) for x, y in curves.values()]
    ends = [axes.transData.transform(point)[1] for point in last]
    order = sorted(range(len(ends)), key=lambda k: ends[k])
    heights = spread([ends[k] for k in order], 17, area.y0, area.y1)
    for k, height in zip(order, heights, strict=True):
        name, look = list(curves)[k], LOOKS[k]
        axes.annotate(
            name,
            xy=last[k],
            xytext=(1 + 14 / area.width, (height - area.y0) / area.height),
            textcoords="axes fraction",  # pixels would stay where they are when the figure is drawn sharper
            fontsize=SMALL * 72 / DPI,
            va="center",
            arrowprops={"arrowstyle": "-", "color": look["color"], "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5},
        )


def spread(values: Sequence[Real], gap: Real, low: Real, high: Real) -> list[Real]:
    """Moves increasing values apart until neighbors differ by ``gap``: upwards first, then down from ``high``."""
    placed = []
    for value in values:
        placed.append(max(value, low if not placed else placed[-1] + gap))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high if i == len(placed) - 1 else placed[i + 1] - gap)
    return placed


def describe_lines(curves: Mapping[str, tuple], title: str, x_label: str, y_label: str) -> str:
    """Alt text: both ends of each curve, its minimum and its maximum."""
    parts = [
        f"{name}: {number(y[0])} at {number(x[0])}, {number(y[-1])} at {number(x[-1])}"
        + (f", lowest {number(y.min())}, highest {number(y.max())}" if len(y) > 2 else "")
        for name, (x, y) in curves.items()
    ]
    return f"{title}. A chart of {y_label} against {x_label}. {'. '.join(parts)}."


# --- the cache -----------------------------------------------------------------------------------------------------


@styled
def cache_growth(
    bytes_per_token: Mapping[str, Real],
    longest: int = 8192,
    marks: Mapping[str, int] | None = None,
    title: str | None = None,
) -> Figure:
    """How the KV cache grows with the sequence, for several models, and its size at three image resolutions.

    Args:
        bytes_per_token: One to seven models, each with its bytes per token (``cache_bytes(config, 1)``).
        longest: Tokens at the right end of the chart.
        marks: Names for some numbers of tokens. Default: the image tokens of PaliGemma at 224, 448 and 896 px, which
            are 256, 1,024 and 4,096.
        title: A line above.

    Raises:
        ValueError: If there are no or too many models, a size is not positive, or a mark is beyond ``longest``.
    """
    marks = RESOLUTIONS if marks is None else marks
    if not 1 <= len(bytes_per_token) <= len(LOOKS):
        raise ValueError(f"A chart needs one to {len(LOOKS)} models, not {len(bytes_per_token)}.")
    if not all(0 < size < math.inf for size in bytes_per_token.values()):
        raise ValueError("The bytes per token must be positive.")
    if longest < 2 or not all(1 <= tokens <= longest for tokens in marks.values()):
        raise ValueError(f"Every mark must be between 1 token and the longest sequence, {longest}.")
    table = 30 + 20 * len(bytes_per_token)
    height = 400 + table + 16
    figure, axes = plot(height, 84, 28, 66, table + 72)
    axes.set_title(title or "Size of the KV cache", pad=30)
    x = np.geomspace(1, longest, 40)
    for size, look in zip(bytes_per_token.values(), LOOKS, strict=False):
        axes.plot(x, x * size, linewidth=2, **{**look, "marker": None})
        axes.plot(list(marks.values()), [n * size for n in marks.values()], **{**look, "linestyle": ""}, markersize=7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    powers = np.arange(0, int(math.log2(longest)) + 1, 2 if longest > 64 else 1)
    axes.set_xticks(2.0**powers, [f"{2 ** int(p):,}" for p in powers])
    low, high = (math.log10(n) for n in axes.get_ylim())
    steps = 10.0 ** np.arange(math.ceil(low), high)
    axes.set_yticks(steps, [in_bytes(size) for size in steps])
    axes.minorticks_off()
    axes.set(xlabel="tokens in the cache", xlim=(1, longest))
    for name, tokens in marks.items():
        axes.axvline(tokens, color=GRAY, linewidth=1, linestyle=(0, (2, 2)), zorder=0.9)
        axes.annotate(
            name, (tokens, 1), (0, 6), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center"
        )
    write_sizes(figure, height, bytes_per_token, marks)
    return from_figure(figure, describe_growth(bytes_per_token, marks))


def write_sizes(figure, height: Real, bytes_per_token: Mapping[str, Real], marks: Mapping[str, int]) -> None:
    """Writes the table under the chart, which is also its legend."""
    tall = 30 + 20 * len(bytes_per_token)
    paper = figure.add_axes((0, 10 / height, 1, tall / height))
    paper.set(xlim=(0, WIDTH), ylim=(tall, 0))
    paper.axis("off")
    columns = ["per token", *marks]
    right = [WIDTH - 28 - 108 * (len(columns) - 1 - k) for k in range(len(columns))]
    for x, name in zip(right, columns, strict=True):
        write(paper, x, 10, name, SMALL, GRAY, ha="right")
    for row, ((name, size), look) in enumerate(zip(bytes_per_token.items(), LOOKS, strict=False)):
        y = 32 + 20 * row
        paper.plot([28, 64], [y, y], linewidth=2, markevery=[0], markersize=0, **{**look, "marker": None})
        paper.plot([46], [y], markersize=6, **look)
        write(paper, 74, y, fit(name, right[0] - 160, BODY), BODY, ha="left")
        for x, tokens in zip(right, (1, *marks.values()), strict=True):
            write(paper, x, y, in_bytes(size * tokens), SMALL + 1, ha="right")


def in_bytes(size: Real) -> str:
    """``18.4 KB``, ``4.72 MB``, in powers of 1,000."""
    power = min(max(0, int(math.log10(size) // 3)), len(UNITS) - 1)
    return f"{size / 1000**power:.3g} {UNITS[power]}"


def describe_growth(bytes_per_token: Mapping[str, Real], marks: Mapping[str, int]) -> str:
    """Alt text: the numbers of the table."""
    parts = []
    for name, size in bytes_per_token.items():
        sizes = [f"{in_bytes(size)} per token", *(f"{in_bytes(size * n)} at {mark}" for mark, n in marks.items())]
        parts.append(f"{name}: {', '.join(sizes)}")
    return f"Size of the KV cache against the number of tokens, straight lines on logarithmic axes. {'; '.join(parts)}."


# --- the next token ------------------------------------------------------------------------------------------------


@styled
def sampling_distribution(
    logits: Numbers, words, kept: Numbers | None = None, top: int = 12, title: str | None = None
) -> Figure:
    """The most likely next tokens, and which of them top-k or top-p keeps. Hatched bars are cut off.

    After a filter, each line has the probability before and, after the arrow, the renormalized one.

    Args:
        logits: [V], with the temperature applied.
        words: The V tokens as strings, or the processor.
        kept: [V], True where the filter keeps a token, or the filtered logits with −inf elsewhere. Default: no filter.
        top: How many tokens to show. The others share the last line.
        title: A line above.

    Raises:
        ValueError: If ``words`` or ``kept`` do not fit the logits, ``top`` is not positive, or no token is kept.
    """
    scores = check_array("logits", logits, 1, finite=False)
    V = len(scores)
    if not np.isfinite(scores.max()):
        raise ValueError("The largest logit must be finite.")
    if top < 1:
        raise ValueError(f"top must be at least 1, not {top}.")
    before = softmax(scores)
    allowed = check_kept(kept, V)
    after = np.where(allowed, before, 0)
    if after.sum() == 0:
        raise ValueError("No token is kept, so none can be sampled. Keep at least one.")
    after /= after.sum()
    order = np.argsort(-before, kind="stable")[:top]
    names = [visible(word) for word in token_texts(words, order, V)]
    bars = [bar(name, before[i], after[i] if kept is not None else None) for name, i in zip(names, order, strict=True)]
    if V > len(order):
        bars.append(bar_of_others(1 - before[order].sum(), np.delete(allowed, order), kept is not None))
    foot = None
    if kept is not None:
        share = percent(before[allowed].sum())
        foot = f"{count(int(allowed.sum()), 'token')} of {V:,} kept, with {share} of the probability"
    figure = draw_bars(bars, title, foot)
    return from_figure(
        figure, titled(title, describe_distribution(before, after, allowed, order, names, kept is not None))
    )


def bar(name: str, before: Real, after: Real | None) -> tuple[str, Real, str, dict]:
    """A bar's name, its length as a share, the text at its end, and its look."""
    text = percent(before)
    if after is None:
        return name, before, text, {"fill": BLUE}
    if after > 0:
        return name, before, f"{text}  →  {percent(after)}", {"fill": BLUE}
    return name, before, f"{text}  cut off", {"fill": "white", "edge": GRAY, "hatch": "////"}


def bar_of_others(share: Real, kept: np.ndarray, cut: bool) -> tuple[str, Real, str, dict]:
    """The last bar, for all tokens that are not shown."""
    text = f"{percent(max(share, 0))}   {count(len(kept), 'token')}" + (f", {kept.sum():,} of them kept" if cut else "")
    return "all others", max(share, 0), text, {"fill": tint(GRAY, 0.35), "edge": LIGHT}


def draw_bars(bars: list[tuple[str, Real, str, dict]], title: str | None, foot: str | None):
    """Draws the bars on one scale, as long as their texts allow."""
    line, left = 26, 30 + min(190, max(text_width(name, BODY) for name, *_ in bars))
    figure, axes, top = sheet(line * len(bars) + (36 if foot else 12), title)
    scale = min((WIDTH - left - 32 - text_width(text, SMALL + 1)) / max(share, 1e-9) for _, share, text, _ in bars)
    for k, (name, share, text, look) in enumerate(bars):
        y = top + (k + 0.5) * line
        write(axes, left - 10, y, fit(name, left - 20, BODY), BODY, ha="right")
        rectangle(axes, left, y - 9, left + max(1, share * scale), y + 9, linewidth=0.8, **look)
        write(axes, left + share * scale + 8, y, text, SMALL + 1, ha="left")
    if foot:
        write(axes, left, top + line * len(bars) + 16, foot, SMALL + 1, ha="left", fontweight="bold")
    return figure


def check_kept(kept: Numbers | None, V: int) -> np.ndarray:
    """True for each kept token, from booleans or from filtered logits, which are −inf for the others."""
    if kept is None:
        return np.ones(V, dtype=bool)
    values = check_array("kept", kept, 1, finite=False)
    if len(values) != V:
        raise ValueError(f"Expected one value of kept per logit, but got {V} logits and {count(len(values), 'value')}.")
    is_flag = "bool" in str(getattr(kept, "dtype", type(kept[0])))
    return values != 0 if is_flag else values > -math.inf


def token_texts(words, order: np.ndarray, V: int) -> list[str]:
    """The tokens with these ids as text, from a list of all V or from the processor."""
    if hasattr(words, "tokenizer"):
        return [token_text(i, words) for i in order]
    words = check_strings("words", words, V)
    return [words[i] for i in order]


def describe_distribution(before, after, allowed, order, names: list[str], cut: bool) -> str:
    """Alt text: the first five tokens, and how many are kept."""
    parts = [f"{readable(n).strip()} {percent(before[i])}" for i, n in zip(order[:5], names, strict=False)]
    text = f"Bars of the probabilities of the next token, most likely first: {listed(parts)}."
    if cut:
        text += (
            f" {count(int(allowed.sum()), 'token')} of {len(before):,} kept. The most likely one rises to "
            f"{percent(after.max())}."
        )
    return text
