"""How all pictures look: one set of sizes and colors, and a sheet of paper measured in pixels to draw on.

Units: lengths and font sizes are pixels of the finished picture, x to the right, y down.
"""

from collections.abc import Callable, Sequence
from functools import cache, wraps
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image

from minivlm.course.viz.boxes import PALETTE, font, text_color

Numbers = Any  # a tensor, an array or nested lists; the shape stands in each docstring, and check() insists on it
Pixels = Any  # a PIL image or an array, see to_image()

ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = PALETTE
INK, GRAY, LIGHT, PALE = "#222222", "#767676", "#C8C8C8", "#F2F2F2"
WIDTH, DPI = 800, 100
TITLE, BODY, SMALL = 16, 13, 11  # font sizes

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": BODY * 72 / DPI,
    "text.color": INK,
    "text.parse_math": False,  # a $ in somebody's caption is a dollar
    "axes.edgecolor": LIGHT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": TITLE * 72 / DPI,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#E8E8E8",
    "xtick.color": LIGHT,
    "ytick.color": LIGHT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "hatch.linewidth": 1.0,
}

# The kinds of tokens: a color, and a hatch where two kinds share one.
KINDS = {
    "image": (SKY, None),
    "bos": (PURPLE, None),
    "prefix": (ORANGE, None),
    "newline": (YELLOW, None),
    "suffix": (GREEN, None),
    "eos": (VERMILION, None),
    "loc": (BLUE, None),
    "seg": (BLUE, "..."),
    "padding": (LIGHT, "////"),
    "text": (GRAY, None),
}


def styled(draw: Callable) -> Callable:
    """Runs a drawing function in this style alone, whatever matplotlib settings a notebook has made."""

    @wraps(draw)
    def drawn(*args, **kwargs):
        import matplotlib.style

        with matplotlib.style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return drawn


# --- paper and pen -------------------------------------------------------------------------------------------------


def sheet(height: Real, width: Real = WIDTH):
    """An empty figure and its one axes, measured in pixels from the top left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(round(width) / DPI, round(height) / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, round(width)), ylim=(round(height), 0))
    axes.axis("off")
    return figure, axes


def write(axes, x: Real, y: Real, text: str, size: Real = BODY, color: str = INK, ha="center", va="center", **how):
    """One line of text at a point; ``how`` goes to matplotlib."""
    return axes.text(x, y, printable(text), fontsize=size * 72 / DPI, color=color, ha=ha, va=va, **how)


def write_title(axes, title: str | None) -> Real:
    """The title in the top left corner; returns the height it takes, 0 without one."""
    if title is None:
        return 0
    width = axes.get_xlim()[1] - 24
    if text_width(title, TITLE, bold=True) > width:
        raise ValueError(f"The title {title!r} is too long for one line: shorten it.")
    write(axes, 12, 22, title, TITLE, ha="left", fontweight="bold")
    return 40


def box(axes, x0: Real, y0: Real, x1: Real, y1: Real, fill: str = "white", edge: str = LIGHT, round_by=0, **how):
    """A rectangle between two corners."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    how = {"facecolor": fill, "edgecolor": edge, "linewidth": 1} | how
    if round_by:
        style = f"round,pad=0,rounding_size={round_by}"
        return axes.add_patch(FancyBboxPatch((x0, y0), x1 - x0, y1 - y0, boxstyle=style, mutation_aspect=1, **how))
    return axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **how))


def arrow(axes, *points: tuple[Real, Real], color: str = GRAY, both: bool = False, **how):
    """A line through the points with a head at the last, or at both ends."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    how = {"linewidth": 1.6, "mutation_scale": 11, "color": color} | how
    style = "<|-|>" if both else "-|>"
    return axes.add_patch(FancyArrowPatch(path=Path(points), arrowstyle=style, shrinkA=0, shrinkB=0, **how))


def paste(axes, image: Image.Image, x0: Real, y0: Real, x1: Real, y1: Real, **how):
    """A picture between two corners; small ones keep their pixels visible."""
    small = image.width * 3 <= x1 - x0
    how = {"interpolation": "nearest" if small else "lanczos"} | how
    return axes.imshow(image, extent=(x0, x1, y1, y0), aspect="auto", **how)


def scale_bar(axes, y: Real, low: str, high: str, note: str = "") -> None:
    """The colors of cividis from ``low`` to ``high`` and what they mean, in the middle of the sheet."""
    width, after = 120, f"{high}   {note}" if note else high
    x = (axes.get_xlim()[1] - width - text_width(after, SMALL) + text_width(low, SMALL)) / 2
    write(axes, x - 6, y, low, SMALL, ha="right")
    ramp = np.linspace(0, 1, 256)[None]
    axes.imshow(ramp, extent=(x, x + width, y + 6, y - 6), aspect="auto", cmap="cividis", vmin=0, vmax=1)
    write(axes, x + width + 6, y, after, SMALL, ha="left")


def cividis(values: np.ndarray, low: Real, high: Real) -> np.ndarray:
    """Numbers → colors, three fractions each, in a last axis of their own."""
    import matplotlib

    return matplotlib.colormaps["cividis"]((values - low) / (high - low if high > low else 1))[..., :3]


def tint(color: str, amount: Real) -> str:
    """The color thinned with white: 1 leaves it, 0 is white."""
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + amount * (c - 255)):02X}" for c in channels)


# --- words ---------------------------------------------------------------------------------------------------------


@cache
def letters() -> frozenset[int]:
    """The code points that the font has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(font(BODY).path).get_charmap())


def printable(text: str) -> str:
    """The text in one line, with � for every character that the font lacks."""
    text = text.replace("\n", " ")
    return "".join(c if ord(c) in letters() and c.isprintable() else "�" for c in text)


def visible(text: str) -> str:
    """Whitespace drawn as signs, so that every token can be seen."""
    return printable(text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")) or "∅"


def text_width(text: str, size: Real, bold: bool = False) -> Real:
    """Pixels that a line takes; bold letters are about an eighth wider."""
    return font(round(size)).getlength(printable(text)) * size / round(size) * (1.14 if bold else 1)


def fit(text: str, width: Real, size: Real) -> str:
    """The text, cut with "…" where it is wider than ``width`` pixels."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def break_lines(text: str, width: Real, size: Real) -> list[str]:
    """The text in lines of at most ``width`` pixels, broken at spaces; a longer word is cut."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and text_width(longer, size) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return [fit(line, width, size) for line in lines]


def number(value: Real) -> str:
    """Three significant digits at most, with a true minus sign."""
    return f"{value:.3g}".replace("-", "−")


def fixed(value: Real, digits: int = 2) -> str:
    """A number with that many digits after the point; −0.00 is 0.00."""
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "−")


def count(n: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def listed(words: Sequence[str], most: int = 8) -> str:
    """`a, b and c`, and how many more there are beyond ``most``."""
    words = list(words)
    if len(words) > most:
        words = [*words[:most], f"{len(words) - most} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# --- what comes in -------------------------------------------------------------------------------------------------


def check(name: str, values: Numbers, dimensions: int, finite: bool = True) -> np.ndarray:
    """Numbers of any kind → a float64 array with that many dimensions, none of them empty."""
    if hasattr(values, "detach"):  # a tensor, of any type and on any device
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers in an array of {dimensions} dimensions.") from None
    if array.ndim != dimensions or array.size == 0:
        raise ValueError(f"{name} must have {dimensions} dimensions, none empty, not the shape {list(array.shape)}.")
    if np.isnan(array).any() or (finite and not np.isfinite(array).all()):
        raise ValueError(f"{name} must hold {'finite numbers' if finite else 'no NaN'}.")
    return array


def check_names(name: str, values: Sequence[str], length: int) -> list[str]:
    """Exactly that many strings."""
    if isinstance(values, str) or len(values) != length or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name} must be a list of {count(length, 'string')}.")
    return list(values)


def to_image(picture: Pixels) -> Image.Image:
    """A PIL image, bytes [H, W, 3], fractions [H, W, 3] in 0…1, or any numbers [H, W], in cividis → an RGB image."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if hasattr(picture, "detach"):
        picture = picture.detach().cpu()
        picture = (picture.double() if picture.is_floating_point() else picture).numpy()
    array = np.asarray(picture)
    if array.ndim == 2 and array.size:
        array = check("A map", array, 2)
        return Image.fromarray((255 * cividis(array, array.min(), array.max())).round().astype(np.uint8))
    if array.ndim != 3 or array.shape[-1] != 3 or array.size == 0:
        raise ValueError(
            f"A picture must be a PIL image or an array [H, W, 3] or [H, W], not a {type(picture).__name__} of shape "
            f"{list(array.shape)}; move the channels to the end."
        )
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    array = check("A picture", array, 3)
    if array.min() < 0 or array.max() > 1:
        raise ValueError(
            f"The values of a picture reach from {number(array.min())} to {number(array.max())}; floats must lie in "
            "0…1: undo the normalization first."
        )
    return Image.fromarray((array * 255).round().astype(np.uint8))


def on(color: np.ndarray) -> str:
    """The text color that reads best on a color of three fractions."""
    return text_color("#" + "".join(f"{round(255 * c):02X}" for c in color))
