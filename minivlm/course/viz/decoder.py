"""What the decoder does for one token: rotated pairs of a query and a key, and a decode step with its cache.

d head dimension · S tokens
"""

from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np

from minivlm.course.viz.drawing import arrow, rectangle, sheet, styled, write
from minivlm.course.viz.figure import Figure, from_figure
from minivlm.course.viz.inputs import Numbers, check_array
from minivlm.course.viz.style import BLUE, BODY, GRAY, INK, KINDS, LIGHT, SMALL, VERMILION, WIDTH, tint
from minivlm.course.viz.text import count, fit, fixed, listed, text_width, visible
from minivlm.course.viz.tokens import Run, Token, runs

MOST_PAIRS, MOST_BOXES = 5, 24
LABELS = 118  # pixels left of the boxes of a decode step, for the names of its rows


# --- rotary positions ----------------------------------------------------------------------------------------------


@styled
def rotated_pairs(
    q: Numbers, k: Numbers, query_position: Integral, key_position: Integral, theta: Real = 10_000.0
) -> Figure:
    """A query and a key under RoPE, one dial per pair of numbers, each hand turned by its token's position.

    Pale hands show the pair before it was turned. Below each dial is what the pair adds to the score.

    Args:
        q: [d], the query before RoPE, with d even and at most 10.
        k: [d], the key before RoPE.
        query_position: Number of tokens before the query.
        key_position: Number of tokens before the key.
        theta: Base of the speeds: pair i turns by θ^(−2i/d) radians per token.

    Raises:
        ValueError: If q and k differ in length, or the length is odd or too large.
    """
    q, k = check_array("q", q, 1), check_array("k", k, 1)
    pairs = len(q) // 2
    if len(q) != len(k) or len(q) % 2 or pairs > MOST_PAIRS:
        raise ValueError(f"q and k must have the same even length up to {2 * MOST_PAIRS}, not {len(q)} and {len(k)}.")
    speeds = theta ** (-2 * np.arange(pairs) / len(q))
    hands = [x[:pairs] + 1j * x[pairs:] for x in (q, k)]  # number i and number i + d/2 form pair i
    turned = [h * np.exp(1j * p * speeds) for h, p in zip(hands, (query_position, key_position), strict=True)]
    shares = (turned[0] * turned[1].conj()).real
    radius = min(82, (WIDTH - 24) / pairs / 2 - 14)
    title = f"query at {query_position}, key at {key_position}: q·k = {fixed(shares.sum())}"
    figure, axes, top = sheet(2 * radius + 92, title)
    longest = max(np.abs(np.concatenate(hands)).max(), 1e-9)
    for i, share in enumerate(shares):
        x, y = 12 + (i + 0.5) * (WIDTH - 24) / pairs, top + radius + 6
        draw_dial(axes, x, y, radius, [(h[i] / longest, t[i] / longest) for h, t in zip(hands, turned, strict=True)])
        write(axes, x, y + radius + 16, f"pair {i}: {fixed(share)}", BODY)
        write(axes, x, y + radius + 34, f"{speeds[i]:.2g} radians per token", SMALL, GRAY)
    for x, color, line, name in ((WIDTH / 2 - 110, BLUE, "-", "query"), (WIDTH / 2 + 20, VERMILION, "--", "key")):
        axes.plot([x, x + 34], [top + 2 * radius + 76] * 2, color=color, linestyle=line, linewidth=2.4)
        write(axes, x + 42, top + 2 * radius + 76, name, SMALL, ha="left")
    parts = listed([f"pair {i} {fixed(share)}" for i, share in enumerate(shares)])
    distance = query_position - key_position
    return from_figure(
        figure,
        f"{title}. {count(pairs, 'dial')}, each with a hand for the query and one for the key, turned by their "
        f"positions, which are {distance} apart. The score is the sum of what each pair adds: {parts}.",
    )


def draw_dial(axes, x: Real, y: Real, radius: Real, hands: Sequence[tuple[complex, complex]]) -> None:
    """A circle with the hands of query and key, each before (pale) and after it is turned."""
    from matplotlib.patches import Circle

    axes.add_patch(Circle((x, y), radius, facecolor="white", edgecolor=LIGHT))
    for (before, after), color, line in zip(hands, (BLUE, VERMILION), ("-", "--"), strict=True):
        for hand, shade, width in ((before, tint(color, 0.35), 1.4), (after, color, 2.4)):
            tip = x + radius * hand.real, y - radius * hand.imag  # y points down
            arrow(axes, (x, y), tip, color=shade, linestyle=line, linewidth=width, mutation_scale=13)


# --- a decode step -------------------------------------------------------------------------------------------------


@styled
def decode_step(tokens: Sequence[Token], prompt: Integral, step: Integral) -> Figure:
    """What goes into the model in one step of generation, what the cache holds, and the token that comes out.

    Args:
        tokens: The S tokens of the prompt and of the whole answer.
        prompt: How many of them are the prompt.
        step: 0 for the prefill, which takes the whole prompt; from 1 on, a decode step, which takes one token.

    Raises:
        ValueError: If there is no such step, or there are too many tokens to draw.
    """
    last = len(tokens) - prompt - 1  # the step that predicts the last token, which never goes in
    if not 0 <= step <= last:
        raise ValueError(f"step must be from 0 (the prefill) to {last}, not {step}.")
    found = runs(tokens)
    if len(found) > MOST_BOXES:
        raise ValueError(f"{len(found)} boxes are too many to read. Show at most {MOST_BOXES} tokens.")
    start, stop = (0, prompt) if step == 0 else (prompt + step - 1, prompt + step)  # what this step computes
    predicted = visible(tokens[stop].text)
    figure, axes, top = sheet(236, f"step {step}: {'prefill' if step == 0 else 'decode'}")
    edges = slots(found)
    for y, name in ((top + 22, "goes in"), (top + 92, "cache after it"), (top + 162, "comes out")):
        write(axes, 12, y, name, BODY, ha="left", fontweight="bold")
    for j, run in enumerate(found):
        x, width = edges[j], edges[j + 1] - edges[j]
        is_new, is_stored = start <= run.start < stop, run.start < stop
        if is_new:
            draw_slot(axes, x, top + 4, width, run, new=True)
            arrow(axes, (x + width / 2, top + 44), (x + width / 2, top + 70))
        draw_slot(axes, x, top + 74, width, run if is_stored else None, new=is_new)
        if run.start <= stop - 1 < run.stop:
            arrow(axes, (x + width / 2, top + 114), (x + width / 2, top + 144))
            edge = min(x + width / 2, WIDTH - 70)
            write(axes, edge, top + 162, predicted, BODY, fontweight="bold")
    text = (
        f"Keys and values: computed for {count(stop - start, 'token')}, read from the cache for {start}. "
        f"Without a cache: computed for {stop}."
    )
    write(axes, 12, top + 208, text, BODY, ha="left")
    taken = listed([run.text for run in found if run.start < stop])
    return from_figure(
        figure, f"Step {step} of generation. The cache then holds {taken}. {text} The next token is “{predicted}”."
    )


def slots(found: Sequence[Run]) -> np.ndarray:
    """The edges of the boxes: as wide as their texts need, then all stretched or squeezed to fill the line."""
    widths = [max(30, text_width(slot_text(run), BODY) + 14) for run in found]
    room = WIDTH - LABELS - 12
    return LABELS + np.concatenate([[0], np.cumsum(widths)]) * min(1.4, room / sum(widths))


def slot_text(run: Run) -> str:
    return f"{run.token.kind} ×{run.length}" if run.length > 1 else run.text


def draw_slot(axes, x: Real, y: Real, width: Real, run: Run | None, new: bool) -> None:
    """One token: with a thick frame if this step computes it, pale if it was in the cache, empty if it comes later."""
    area = x + 2, y, x + width - 2, y + 36
    if run is None:
        rectangle(axes, *area, "white", LIGHT, radius=4, linestyle=(0, (3, 3)))
        return
    color, hatch = KINDS[run.token.kind]
    look = {"edge": VERMILION, "linewidth": 2.4} if new else {"edge": color}
    rectangle(axes, *area, tint(color, 0.6 if new else 0.25), radius=4, hatch=hatch, **look)
    size = BODY if text_width(slot_text(run), BODY) <= width - 8 else SMALL
    write(axes, x + width / 2, y + 18, fit(slot_text(run), width - 8, size), size, INK)
