"""The small pictures of a tensor trace: what the model sees, heat maps, masks, likeliest words, and all on one sheet.

Each function returns a ``Picture`` and, where there is one to say, the key to read it by.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw
from torch import Tensor

from minivlm.course.viz.boxes import PALETTE, font
from minivlm.course.viz.figure import Figure

if TYPE_CHECKING:
    from minivlm.course.viz.tracing import Entry, Trace

SIDE = 96  # rows and columns of a heat map, at most
WORDS_SIZE = (336, SIDE)
NO_WORD = "no word is likely: the scores are NaN"
INK, GRAY, BLUE, VERMILION = "#222222", "#666666", PALETTE[4], PALETTE[5]
CIVIDIS = (matplotlib.colormaps["cividis"](np.linspace(0, 1, 64))[:, :3] * 255).round().astype(np.uint8)


def pixels(picture: Float[Tensor, "C H W"], mean: Sequence[float], std: Sequence[float]) -> tuple[Figure, str]:
    """What the model sees, with the normalization undone; above 224 pixels, made smaller."""
    _, height, width = picture.shape
    colors = picture * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    image = Image.fromarray((colors.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())
    image.thumbnail((224, 224))
    return Figure(image, f"The picture that the model is given, {width} by {height} pixels."), "The numbers as colors"


def heat_map(name: str, table: Float[Tensor, "R N"], rows: str) -> tuple[Figure, str]:
    """One pixel a number: every row and dimension where they fit, else evenly spaced ones. NaN and infinity: vermilion.

    A few dimensions are often far larger than all others, so the colors span the middle 96% of what is shown.
    """
    shown = table[evenly(table.shape[0])][:, evenly(table.shape[1])]
    finite = shown.isfinite()
    low, high = shown[finite].quantile(torch.tensor([0.02, 0.98])).tolist() if finite.any() else (0.0, 0.0)
    place = ((shown - low) / ((high - low) or 1)).nan_to_num(0).clamp(0, 1)
    colors = CIVIDIS[(place * (len(CIVIDIS) - 1)).round().long().numpy()]
    colors[~finite.numpy()] = rgb(VERMILION)
    size = f"{table.shape[0]} {rows} by {table.shape[1]} dimensions"
    broken = "" if finite.all() else " Orange-red: NaN or infinite."
    alt = f"Heat map of {name}, {size}, most values between {number(low)} and {number(high)}.{broken}"
    part = "" if shown.shape == table.shape else f" ({shown.shape[0]} × {shown.shape[1]} of them, evenly spaced)"
    key = (
        f"Rows: {rows}, columns: dimensions{part}. Dark: {number(low)} or less, light: {number(high)} or more.{broken}"
    )
    return Figure(Image.fromarray(colors), alt), key


def mask(name: str, table: Bool[Tensor, "T T"]) -> tuple[Figure, str]:
    """Light where the query (row) may look at the key (column)."""
    shown = table[evenly(len(table))][:, evenly(len(table))]
    colors = CIVIDIS[np.where(shown.numpy(), -6, 6)]  # not quite the ends, which are for numbers
    share = table.float().mean().item()
    alt = f"Attention {name.replace('_', ' ')} of {len(table)} tokens: {share:.0%} of the pairs may look."
    return Figure(Image.fromarray(colors), alt), "Rows: queries, columns: keys. Light: may look, dark: may not."


def words(likeliest: list[tuple[str, float]]) -> tuple[Figure, str]:
    """Bars: the likeliest words after the prompt, likeliest first; none where the scores are NaN."""
    image = Image.new("RGB", WORDS_SIZE, "white")
    draw = ImageDraw.Draw(image)
    if not likeliest:
        draw.text((0, SIDE / 2), NO_WORD, INK, font(13), anchor="lm")
        return Figure(image, NO_WORD), "What broke the numbers stands further up"
    line = SIDE // len(likeliest)
    for i, (word, chance) in enumerate(likeliest):
        top, text = i * line, fitting(quoted(word), 13, 116)
        draw.text((0, top + line / 2), text, INK, font(13), anchor="lm")
        end = 124 + round(chance * 148)
        draw.rectangle((124, top + 3, max(end, 125), top + line - 4), fill=BLUE)
        draw.text((max(end, 125) + 6, top + line / 2), f"{chance:.1%}", GRAY, font(12), anchor="lm")
    said = ", ".join(f"{quoted(word)} {chance:.1%}" for word, chance in likeliest)
    return Figure(image, f"Bars of the likeliest next words: {said}."), "The likeliest words after the prompt"


def overview(trace: "Trace") -> Figure:
    """A band per stage with its tensors in it, of the layers only their results, eight in a line."""
    bands = {}
    for stage, layer, entries in trace.groups():
        bands.setdefault(stage, []).extend(entries if layer is None else entries[-1:])
    drawn = [band(stage, entries) for stage, entries in bands.items()]
    sheet = Image.new("RGB", (drawn[0].width, sum(image.height for image in drawn) + 48), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((16, 14), "One forward pass of PaliGemma", INK, font(17))
    draw.text((sheet.width - 16, 18), shortened(trace.tokens, 60), GRAY, font(13), anchor="ra")
    top = 48
    for image in drawn:
        sheet.paste(image, (0, top))
        top += image.height
    return Figure(sheet, overview_alt(trace, bands))


def band(stage: str, entries: "list[Entry]") -> Image.Image:
    """One stage: its name at the left, its tensors beside it, each with label and shape."""
    left, cell, line, in_line = 132, 112, 144, 8
    lines = -(-len(entries) // in_line)
    image = Image.new("RGB", (left + cell * in_line, line * lines + 12), "white")
    draw = ImageDraw.Draw(image)
    draw.line((16, 0, image.width - 16, 0), "#DDDDDD")
    draw.text((16, 12), stage, INK, font(15))
    chapters = sorted({f"{entry.step.chapter:02d}" for entry in entries})
    draw.text((16, 34), f"chapter {', '.join(chapters)}", GRAY, font(11))
    for i, entry in enumerate(entries):
        x, y = left + i % in_line * cell, 14 + i // in_line * line
        small = entry.picture.image
        if small.size != WORDS_SIZE:
            way = Image.Resampling.LANCZOS if stage == "Figure" else Image.Resampling.NEAREST
            small = small.resize((SIDE, SIDE), way)
        image.paste(small, (x, y))
        label = entry.label if entry.step.layer is None else f"layer {entry.step.layer}"
        draw.text((x, y + SIDE + 4), fitting(label, 12, cell - 6), INK, font(12))
        draw.text((x, y + SIDE + 20), fitting("×".join(map(str, entry.shape)), 11, cell - 4), GRAY, font(11))
    return image


def overview_alt(trace: "Trace", bands: dict) -> str:
    stages = "; ".join(
        f"{stage}: {entries[0].shape_text}{f' to {entries[-1].shape_text}' if len(entries) > 1 else ''}"
        for stage, entries in bands.items()
    )
    said = ", ".join(f"{quoted(word)} {chance:.1%}" for word, chance in trace.next_words[:3]) or NO_WORD
    return f"One forward pass of PaliGemma over {trace.tokens}, in {len(trace)} tensors. {stages}. Next word: {said}."


# --- small parts ---------------------------------------------------------------------------------------------------


def evenly(n: int) -> Tensor:
    """All of 0…n-1, or ``SIDE`` of them, evenly spaced, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, SIDE)).round().long()


def rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def number(value: float) -> str:
    """Three digits, with a minus sign."""
    return f"{value:.3g}".replace("-", "−")


def quoted(word: str) -> str:
    return f"“{word}”"


def shortened(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def fitting(text: str, size: int, width: int) -> str:
    """The text, its end cut off where it is wider than ``width`` pixels."""
    cut = text
    while font(size).getlength(cut) > width:
        text = text[:-1]
        cut = text + "…"
    return cut


def factor(image: Image.Image, side: int = 384) -> int:
    """How many times a small picture is enlarged to be about ``side`` pixels wide or high: at most 12 times."""
    return max(1, min(12, side // max(image.size)))


def enlarged(image: Image.Image) -> Image.Image:
    """Every pixel becomes a square."""
    times = factor(image)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def compact(picture: Figure) -> bytes:
    """A PNG with a palette, which nothing but a photo needs more than: a fraction of the bytes."""
    image = picture.image.quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
