"""Diagrams of boxes and arrows: where in PaliGemma a chapter is, and how other vision-language models are built.

Sources: VisualBERT arXiv:1908.03557, SimVLM 2108.10904, CM3 2201.07520, ClipCap 2111.09734, VisualGPT
2102.10407, Flamingo 2204.14198, MAGiC 2205.02655, PaliGemma 2407.07726.
"""

from collections.abc import Sequence
from numbers import Real

from minivlm.course.chapters import CHAPTERS
from minivlm.course.viz.drawing import arrow, rectangle, sheet, styled, write
from minivlm.course.viz.figure import Figure, from_figure
from minivlm.course.viz.style import BODY, GRAY, GREEN, INK, LIGHT, ORANGE, PALE, SKY, SMALL, VERMILION, WIDTH, tint
from minivlm.course.viz.text import break_lines, listed


@styled
def blocks(
    rows: Sequence[Sequence[str]],
    highlight: str | Sequence[str] | None = None,
    title: str | None = None,
    skips: Sequence[tuple[str, str]] = (),
) -> Figure:
    """A pipeline: boxes from left to right, row by row, connected by arrows in this order.

    Args:
        rows: Names of stages, one to six per row. What follows a line break in a name is in smaller letters.
        highlight: The stage or stages to highlight, by their whole names.
        title: A line above.
        skips: Pairs of stages in one row, by their whole names: an arrow from the first to the second passes above the
            stages between them, as a residual connection does.

    Raises:
        ValueError: If a row has no stage or too many, or a highlighted or skipping stage does not exist.
    """
    rows = [list(row) for row in rows]
    highlighted = {highlight} if isinstance(highlight, str) else set(highlight or ())
    if not rows or not all(1 <= len(row) <= 6 for row in rows):
        raise ValueError("A diagram needs rows of one to six stages.")
    if unknown := highlighted - {name for row in rows for name in row}:
        raise ValueError(f"{sorted(unknown)[0]!r} is not one of the stages, so it cannot be highlighted.")
    for pair in skips:
        if not any(set(pair) <= set(row) for row in rows):
            raise ValueError(f"A skip needs two stages of one row, but got {pair[0]!r} and {pair[1]!r}.")
    longest = max(map(len, rows))
    step = (WIDTH - 24 + 28) / longest
    above = 24 if skips else 0
    width, height, gap = min(180, step - 28), 62, 34 + above
    figure, axes, top = sheet(above + len(rows) * (height + gap) - gap + 12, title)
    top += above
    left = (WIDTH - longest * (width + 28) + 28) / 2
    for i, row in enumerate(rows):
        y = top + i * (height + gap)
        for j, name in enumerate(row):
            x = left + j * (width + 28)
            stage(axes, x, y, width, height, name, name in highlighted)
            if j + 1 < len(row):
                arrow(axes, (x + width + 3, y + height / 2), (x + width + 26, y + height / 2))
        if i + 1 < len(rows):
            turn = y + height + 17
            start = left + (len(row) - 1) * (width + 28) + width / 2
            end = left + width / 2
            arrow(axes, (start, y + height + 2), (start, turn), (end, turn), (end, y + height + gap - 2))
        for first, second in (pair for pair in skips if set(pair) <= set(row)):
            x0, x1 = (left + row.index(name) * (width + 28) for name in (first, second))
            x0, x1 = x0 + 0.75 * width, x1 + width / 2
            arrow(axes, (x0, y - 1), (x0, y - 18), (x1, y - 18), (x1, y - 2), color=VERMILION)
    text = ". Then, in the next row: ".join(" → ".join(name.replace("\n", ", ") for name in row) for row in rows)
    for first, second in skips:
        text += (
            f". An arrow also leads from {' to '.join(n.split(chr(10))[0].strip() for n in (first, second))} directly"
        )
    if highlighted:
        text += f". Highlighted: {listed(sorted(name.replace(chr(10), ', ') for name in highlighted))}"
    return from_figure(figure, f"{title + '. ' if title else ''}A diagram: {text}.")


def stage(axes, x: Real, y: Real, width: Real, height: Real, text: str, highlight: bool = False, **how) -> None:
    """A box with a name and smaller lines below it. A highlighted one is filled, with a thick edge and bold text."""
    look = {"fill": PALE, "edge": GRAY}
    if highlight:
        look = {"fill": tint(ORANGE, 0.45), "edge": VERMILION, "linewidth": 2.6}
    rectangle(axes, x, y, x + width, y + height, radius=7, **(look | how))
    head, *small = text.split("\n")
    lines = [(line, BODY) for line in break_lines(head, width - 8, BODY)]
    lines += [(line, SMALL) for part in small for line in break_lines(part, width - 8, SMALL)]
    middle = y + height / 2 - 8 * (len(lines) - 1)
    for k, (line, size) in enumerate(lines):
        weight = "bold" if highlight and size == BODY else "normal"
        color = INK if size == BODY or highlight else GRAY
        write(axes, x + width / 2, middle + 16 * k, line, size, color, fontweight=weight)


# --- the map of the course -----------------------------------------------------------------------------------------

# The parts of the map: chapter, corners (x0, y0, x1, y1), text.
PARTS = {
    "CLIP loss": ("01", (160, 66, 260, 100), "CLIP loss"),
    "sigmoid loss": ("02", (272, 66, 376, 100), "sigmoid loss"),
    "tower": ("03", (190, 152, 344, 208), "vision tower\nimage → patch vectors"),
    "processor": ("04", (82, 152, 168, 292), "processor"),
    "projector": ("08", (374, 152, 454, 208), "projector"),
    "embeddings": ("06", (190, 236, 454, 292), "token embeddings"),
    "sequence": ("05", (484, 152, 580, 292), ""),
    "decoder": ("06", (610, 152, 698, 208), "Gemma decoder"),
    "cache": ("07", (610, 236, 698, 292), "KV cache"),
    "next token": ("08", (724, 152, 792, 208), "next token"),
}
HIGHLIGHTED = {
    "00": (),
    "01": ("CLIP loss",),
    "02": ("sigmoid loss",),
    "03": ("tower",),
    "04": ("processor",),
    "05": ("sequence",),
    "06": ("decoder", "embeddings"),
    "07": ("cache",),
    "08": ("projector", "sequence", "next token"),
}


@styled
def you_are_here(chapter: str) -> Figure:
    """The map of PaliGemma, from image and prompt to the next token. What this chapter builds is highlighted.

    Args:
        chapter: "00" to "08".

    Raises:
        ValueError: If there is no such chapter.
    """
    if chapter not in HIGHLIGHTED:
        raise ValueError(f'chapter must be "00" to "08", not {chapter!r}.')
    parts = HIGHLIGHTED[chapter]
    figure, axes, _ = sheet(296, f"{chapter} · {CHAPTERS[chapter].title}")
    draw_paths(axes)
    for name, (number, (x0, y0, x1, y1), text) in PARTS.items():
        stage(axes, x0, y0, x1 - x0, y1 - y0, text, name in parts)
        rectangle(axes, x0 + 5, y0 - 12, x0 + 29, y0 + 4, VERMILION if name in parts else GRAY, "white", 5)
        write(axes, x0 + 17, y0 - 4, number, SMALL, "white", fontweight="bold")
    draw_inside_sequence(axes, "sequence" in parts)
    for y in (152, 236):
        rectangle(axes, 8, y, 64, y + 56, "white", LIGHT, 7)
    icon(axes, 16, 158)
    write(axes, 36, 199, "image", SMALL)
    text_icon(axes, 16, 244, "“ … ”")
    write(axes, 36, 281, "prompt", SMALL)
    if parts:
        _, (x0, y0, x1, y1), _ = PARTS[parts[0]]
        text, y = ("▲ you are here", y1 + 13) if parts[0] in ("cache", "tower") else ("▼ you are here", y0 - 22)
        write(axes, (x0 + x1) / 2, y, text, SMALL, VERMILION, fontweight="bold")
    return from_figure(figure, describe_map(chapter))


def draw_paths(axes) -> None:
    """The arrows between the parts, and the way back of the new token."""
    for x0, x1, y in ((64, 80, 180), (64, 80, 264), (168, 188, 180), (344, 372, 180), (454, 482, 180)):
        arrow(axes, (x0, y), (x1, y))
    for x0, x1, y in ((168, 188, 264), (454, 482, 264), (580, 608, 180), (698, 722, 180)):
        arrow(axes, (x0, y), (x1, y))
    arrow(axes, (654, 210), (654, 234), both=True)
    arrow(axes, (758, 208), (758, 318), (322, 318), (322, 294))
    write(axes, 470, 309, "and again, until <eos>", SMALL, GRAY)
    for x in (210, 324):
        arrow(axes, (x, 100), (x, 126), (267, 126), (267, 150), linestyle=(0, (3, 2)), linewidth=1.3)
    write(axes, 388, 83, "← train the tower, before PaliGemma", SMALL, GRAY, ha="left")


def draw_inside_sequence(axes, highlight: bool) -> None:
    """The image, prefix and suffix tokens, and the prefix-LM mask."""
    x0, y0 = 498, 170
    weight = "bold" if highlight else "normal"
    for k in range(6):
        color = SKY if k < 3 else ORANGE if k < 5 else GREEN
        rectangle(axes, x0 + 11.5 * k, y0, x0 + 11.5 * k + 9, y0 + 9, color, "white", linewidth=0)
    write(axes, 532, 194, "one sequence", SMALL, fontweight=weight)
    for row in range(6):
        for column in range(6):
            allowed = column <= max(row, 4)
            x, y = x0 + 11 + 8 * column, 210 + 8 * row
            rectangle(axes, x, y, x + 7, y + 7, INK if allowed else "white", GRAY, linewidth=0.4)
    write(axes, 532, 268, "prefix-LM", SMALL, fontweight=weight)
    write(axes, 532, 281, "mask", SMALL, fontweight=weight)


def describe_map(chapter: str) -> str:
    """Alt text: the whole map, and what is highlighted."""
    parts = HIGHLIGHTED[chapter]
    here = f"Highlighted: {listed(parts)}." if parts else "Nothing is highlighted yet: the course builds all of it."
    return (
        f"Map of PaliGemma for chapter {chapter}, {CHAPTERS[chapter].title}. The processor (04) turns image and prompt "
        "into tensors. The vision tower (03), trained beforehand with a contrastive loss (CLIP's, 01, or SigLIP's, "
        "02), turns the image into patch vectors. The projector (08) maps them to the decoder's hidden size. In one "
        "sequence they come before the token embeddings (06) of the prompt, under the prefix-LM mask (05). The Gemma "
        "decoder (06) with its KV cache (07) predicts the next token (08), which is appended to the sequence, again "
        f"and again until <eos>. {here}"
    )


# --- four families -------------------------------------------------------------------------------------------------


@styled
def families() -> Figure:
    """Diagrams of the four families of vision-language models, with the mark on PaliGemma's."""
    figure, axes, _ = sheet(652)
    panels = [
        (joint, "Image tokens, trained jointly", "VisualBERT · SimVLM · CM3 · PaliGemma", JOINT),
        (prefix, "A prefix for a frozen language model", "ClipCap", PREFIX),
        (crossed, "Cross-attention inside the layers", "VisualGPT · Flamingo", CROSSED),
        (untrained, "No training", "MAGiC", UNTRAINED),
    ]
    for k, (draw, name, members, note) in enumerate(panels):
        x, y = 10 + k % 2 * 395, 10 + k // 2 * 312
        edge = {"edge": VERMILION, "linewidth": 2.6} if k == 0 else {}
        rectangle(axes, x, y, x + 385, y + 302, "white", radius=10, **edge)
        write(axes, x + 14, y + 20, f"{k + 1}  {name}", 14, ha="left", fontweight="bold")
        draw(axes, x, y)
        write(axes, x + 14, y + 238, members, BODY, ha="left", fontweight="bold")
        for n, line in enumerate(break_lines(note, 348, SMALL)):
            write(axes, x + 14, y + 258 + 15 * n, line, SMALL, GRAY, ha="left")
    rectangle(axes, 262, 2, 388, 20, VERMILION, "none", 4)
    write(axes, 325, 11, "PaliGemma is here", SMALL, "white", fontweight="bold")
    draw_families_legend(axes, 648)
    return from_figure(figure, FAMILIES)


JOINT = (
    "One transformer reads image and text: patches (SimVLM, PaliGemma), regions from a frozen detector (VisualBERT) "
    "or codes from a frozen image tokenizer (CM3)."
)
PREFIX = "Only a small mapping network is trained. It turns CLIP's image embedding into a few tokens before the text."
CROSSED = (
    "Text tokens attend to the image between the layers. Flamingo freezes the layers and the encoder, VisualGPT "
    "continues to train its layers."
)
UNTRAINED = (
    "At every step the language model proposes tokens, and CLIP scores how well each fits the image. No weights are "
    "trained."
)
FAMILIES = (
    "Four diagrams of vision-language models. "
    "1, image tokens, trained jointly: an image encoder and token embeddings produce one sequence for one "
    "transformer. VisualBERT, SimVLM, CM3 and PaliGemma, which is marked. All of it is trained, except the detector of "
    "VisualBERT and the image tokenizer of CM3. "
    "2, a prefix for a frozen language model: a frozen image encoder and a trained mapping network produce tokens that "
    "come before the text in a frozen language model. ClipCap. "
    "3, cross-attention inside the layers: trained cross-attention between the layers of a language model attends to "
    "the output of an image encoder. VisualGPT and Flamingo. "
    "4, no training: a frozen language model proposes next tokens, a frozen CLIP scores them against the image, and "
    "both scores together choose. MAGiC."
)


def part(axes, x0: Real, y0: Real, x1: Real, y1: Real, text: str, trained: bool) -> None:
    """A box in the diagram of a family: solid orange if it is trained, dashed gray if it is frozen."""
    look = {"fill": tint(ORANGE, 0.35), "edge": ORANGE} if trained else {"fill": PALE, "edge": GRAY, "linestyle": "--"}
    stage(axes, x0, y0, x1 - x0, y1 - y0, text, **look, linewidth=1.6)


def icon(axes, x: Real, y: Real) -> None:
    """An image: a frame, the sun, two hills."""
    rectangle(axes, x, y, x + 40, y + 32, tint(SKY, 0.35), GRAY)
    axes.fill([x + 4, x + 16, x + 28], [y + 30, y + 12, y + 30], color=GREEN, linewidth=0)
    axes.fill([x + 20, x + 29, x + 38], [y + 30, y + 18, y + 30], color=tint(GREEN, 0.6), linewidth=0)
    axes.plot([x + 31], [y + 8], marker="o", markersize=6, color=ORANGE)


def text_icon(axes, x: Real, y: Real, text: str = "text") -> None:
    """A box with text."""
    rectangle(axes, x, y, x + 40, y + 24, "white", GRAY)
    write(axes, x + 20, y + 12, text, SMALL - 1)


def tokens_column(axes, x: Real, y: Real, images: int, texts: int) -> None:
    """Image tokens (with a dot) above text tokens (with a letter)."""
    for k in range(images + texts):
        top = y + 17 * k
        rectangle(axes, x, top, x + 14, top + 14, SKY if k < images else tint(ORANGE, 0.6), "white", linewidth=0)
        write(axes, x + 7, top + 7, "•" if k < images else "a", SMALL - 1)


def joint(axes, x: Real, y: Real) -> None:
    icon(axes, x + 14, y + 76)
    text_icon(axes, x + 14, y + 164)
    part(axes, x + 76, y + 66, x + 172, y + 118, "image encoder", True)
    part(axes, x + 76, y + 152, x + 172, y + 202, "token embeddings", True)
    tokens_column(axes, x + 200, y + 75, 4, 3)
    part(axes, x + 244, y + 62, x + 370, y + 206, "one transformer\nreads the whole sequence", True)
    for height in (92, 176):
        arrow(axes, (x + 56, y + height), (x + 74, y + height))
        arrow(axes, (x + 174, y + height), (x + 196, y + height))
    arrow(axes, (x + 218, y + 134), (x + 242, y + 134))


def prefix(axes, x: Real, y: Real) -> None:
    icon(axes, x + 12, y + 76)
    text_icon(axes, x + 12, y + 164)
    part(axes, x + 66, y + 66, x + 142, y + 118, "image encoder", False)
    part(axes, x + 160, y + 66, x + 236, y + 118, "mapping network", True)
    part(axes, x + 66, y + 152, x + 236, y + 202, "token embeddings", False)
    tokens_column(axes, x + 256, y + 83, 3, 3)
    part(axes, x + 292, y + 62, x + 374, y + 206, "language model", False)
    for x0, x1, height in (
        (52, 64, 92),
        (142, 158, 92),
        (236, 253, 92),
        (52, 64, 176),
        (236, 253, 176),
        (272, 290, 134),
    ):
        arrow(axes, (x + x0, y + height), (x + x1, y + height))


def crossed(axes, x: Real, y: Real) -> None:
    icon(axes, x + 14, y + 96)
    part(axes, x + 76, y + 84, x + 172, y + 140, "image encoder", False)
    arrow(axes, (x + 56, y + 112), (x + 74, y + 112))
    for k, name in enumerate(("layer", "cross-attention", "layer", "cross-attention")):
        top = y + 46 + 37 * k
        part(axes, x + 230, top, x + 370, top + 29, name, name != "layer")
        if name != "layer":
            arrow(axes, (x + 172, y + 112), (x + 200, y + 112), (x + 200, top + 14.5), (x + 228, top + 14.5))
        if k:
            arrow(axes, (x + 300, top - 1), (x + 300, top - 8), mutation_scale=7)
    text_icon(axes, x + 280, y + 204)
    arrow(axes, (x + 300, y + 203), (x + 300, y + 188), mutation_scale=9)


def untrained(axes, x: Real, y: Real) -> None:
    icon(axes, x + 14, y + 76)
    text_icon(axes, x + 14, y + 164, "a …")
    part(axes, x + 76, y + 66, x + 172, y + 118, "CLIP", False)
    part(axes, x + 76, y + 152, x + 172, y + 202, "language model", False)
    for height in (92, 176):
        arrow(axes, (x + 56, y + height), (x + 74, y + height))
        arrow(axes, (x + 174, y + height), (x + 206, y + height))
    rectangle(axes, x + 208, y + 62, x + 370, y + 206, "white", GRAY)
    write(axes, x + 220, y + 78, "fits the image", SMALL, GRAY, ha="left")
    write(axes, x + 220, y + 190, "likely as the next token", SMALL, GRAY, ha="left")
    for k, (word, fits, likely) in enumerate((("dog", 1, 4), ("cat", 4, 3), ("boat", 1, 1))):
        middle = y + 106 + 28 * k
        chosen = word == "cat"
        if chosen:
            rectangle(axes, x + 214, middle - 13, x + 364, middle + 13, "none", VERMILION, 5, linewidth=2)
        write(axes, x + 224, middle, word, BODY, ha="left", fontweight="bold" if chosen else "normal")
        for n, height in ((fits, -5), (likely, 5)):
            color = SKY if height < 0 else tint(ORANGE, 0.6)
            y0, x1 = middle + height - 4, x + 268 + 20 * n
            rectangle(axes, x + 268, y0, x1, y0 + 8, color, "none", linewidth=0)


def draw_families_legend(axes, y: Real) -> None:
    """The meaning of colors and edges."""
    tokens_column(axes, 12, y - 7, 1, 0)
    write(axes, 34, y, "image token", SMALL, ha="left")
    tokens_column(axes, 130, y - 7, 0, 1)
    write(axes, 152, y, "text token", SMALL, ha="left")
    rectangle(axes, 244, y - 8, 272, y + 8, tint(ORANGE, 0.35), ORANGE, 3, linewidth=1.6)
    write(axes, 280, y, "trained on images with text", SMALL, ha="left")
    rectangle(axes, 478, y - 8, 506, y + 8, PALE, GRAY, 3, linewidth=1.6, linestyle="--")
    write(axes, 514, y, "frozen", SMALL, ha="left")
