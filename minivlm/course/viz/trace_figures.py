"""The small figures of a tensor trace: the image, heat maps, masks, the next tokens, and all on one sheet.

    C colors · H, W pixels · R rows (patches or tokens) · N dimensions · T tokens

Each function for a single tensor returns a ``Figure`` and a caption that says how to read it.
"""

import io
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw
from torch import Tensor

from minivlm.course.viz.figure import Figure
from minivlm.course.viz.style import BLUE, GRAY, INK, VERMILION, cividis, font, rgb, to_bytes
from minivlm.course.viz.text import fit, number, percent, printable, text_width
from minivlm.course.viz.trace_data import Entry, tree

SIDE = 96  # maximum rows and columns of a heat map
BARS = (336, SIDE)  # width and height of the next tokens' bars
NO_TOKEN = "No token is likely: the logits are NaN"
COLORS = to_bytes(cividis(np.arange(64), 0, 63))


def pixels(image: Float[Tensor, "C H W"], mean: Sequence[float], std: Sequence[float]) -> tuple[Figure, str]:
    """The image that the model receives, without normalization, reduced to at most 224 pixels."""
    _, height, width = image.shape
    colors = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    shown = Image.fromarray(to_bytes(colors.clamp(0, 1).movedim(0, -1).numpy()))
    shown.thumbnail((224, 224))
    return Figure(shown, f"The image that the model receives, {width} by {height} pixels."), "The numbers as colors"


def heat_map(name: str, table: Float[Tensor, "R N"], rows: str) -> tuple[Figure, str]:
    """One pixel per number, from all rows and dimensions or from evenly spaced ones. NaN and infinity are vermilion.

    A few dimensions are often far larger than all others, so the colors cover the middle 96% of the numbers shown.
    """
    shown = table[evenly(table.shape[0])][:, evenly(table.shape[1])]
    finite = shown.isfinite()
    low, high = shown[finite].quantile(torch.tensor([0.02, 0.98])).tolist() if finite.any() else (0.0, 0.0)
    scaled = ((shown - low) / ((high - low) or 1)).nan_to_num(0).clamp(0, 1)
    colors = COLORS[(scaled * (len(COLORS) - 1)).round().long().numpy()]
    colors[~finite.numpy()] = rgb(VERMILION)
    size = f"{table.shape[0]} {rows} by {table.shape[1]} dimensions"
    broken = "" if finite.all() else " Orange-red: NaN or infinite."
    alt = f"Heat map of {name}, {size}, most values between {number(low)} and {number(high)}.{broken}"
    part = "" if shown.shape == table.shape else f" ({shown.shape[0]} × {shown.shape[1]} of them, evenly spaced)"
    colors_mean = f"Dark: {number(low)} or less, light: {number(high)} or more.{broken}"
    return Figure(Image.fromarray(colors), alt), f"Rows: {rows}, columns: dimensions{part}. {colors_mean}"


def mask(name: str, table: Bool[Tensor, "T T"]) -> tuple[Figure, str]:
    """Light where the query (row) can attend to the key (column)."""
    shown = table[evenly(len(table))][:, evenly(len(table))]
    colors = COLORS[np.where(shown.numpy(), -6, 6)]  # not quite the ends, which are for numbers
    share = table.float().mean().item()
    alt = f"Attention {name.replace('_', ' ')} of {len(table)} tokens: {share:.0%} of the pairs are allowed."
    return Figure(Image.fromarray(colors), alt), "Rows: queries, columns: keys. Light: allowed, dark: blocked."


def next_tokens(likely: list[tuple[str, float]]) -> tuple[Figure, str]:
    """Bars of the most likely tokens after the prompt, with their probabilities. None if the logits are NaN."""
    image = Image.new("RGB", BARS, "white")
    draw = ImageDraw.Draw(image)
    if not likely:
        write(draw, 0, SIDE / 2, NO_TOKEN, 13, anchor="lm")
        return Figure(image, f"{NO_TOKEN}."), "Look for the first tensor with NaN above"
    line = SIDE // len(likely)
    for i, (token, p) in enumerate(likely):
        top, end = i * line, max(125, 124 + round(p * 148))
        write(draw, 0, top + line / 2, fit(f"“{token}”", 116, 13), 13, anchor="lm")
        draw.rectangle((124, top + 3, end, top + line - 4), fill=BLUE)
        write(draw, end + 6, top + line / 2, percent(p), 12, GRAY, anchor="lm")
    return Figure(image, f"Bars of the most likely next tokens: {in_words(likely)}."), "The next token after the prompt"


def in_words(likely: list[tuple[str, float]]) -> str:
    return ", ".join(f"“{token}” {percent(p)}" for token, p in likely)


def overview(tokens: str, entries: Sequence[Entry], likely: list[tuple[str, float]]) -> Figure:
    """All stages on one sheet: their tensors, and of each layer only its output.

    Args:
        tokens: The sequence that the decoder reads, as text.
        entries: The recorded tensors, in order.
        likely: The most likely next tokens with their probabilities.
    """
    stages = [(stage, [b if isinstance(b, Entry) else b[1][-1] for b in found]) for stage, found in tree(entries)]
    bands = [band(stage, shown) for stage, shown in stages]
    sheet = Image.new("RGB", (bands[0].width, sum(image.height for image in bands) + 48), "white")
    draw = ImageDraw.Draw(sheet)
    title = "One forward pass of PaliGemma"
    write(draw, 16, 14, title, 17)
    space = sheet.width - 64 - text_width(title, 17)
    write(draw, sheet.width - 16, 18, fit(tokens, space, 13), 13, GRAY, anchor="ra")
    top = 48
    for image in bands:
        sheet.paste(image, (0, top))
        top += image.height
    shapes = "; ".join(
        f"{stage}: {shown[0].shape_text}{f' to {shown[-1].shape_text}' if len(shown) > 1 else ''}"
        for stage, shown in stages
    )
    answer = in_words(likely[:3]) or NO_TOKEN
    return Figure(sheet, f"{title} over {tokens}, in {len(entries)} tensors. {shapes}. Next token: {answer}.")


def band(stage: str, entries: Sequence[Entry]) -> Image.Image:
    """One stage: its name on the left, its tensors beside it, eight per line, with labels and shapes."""
    left, cell, line, in_line = 132, 112, 144, 8
    lines = -(-len(entries) // in_line)
    image = Image.new("RGB", (left + cell * in_line, line * lines + 12), "white")
    draw = ImageDraw.Draw(image)
    draw.line((16, 0, image.width - 16, 0), "#DDDDDD")
    write(draw, 16, 12, stage, 15)
    chapters = sorted({f"{entry.step.chapter:02d}" for entry in entries})
    write(draw, 16, 34, f"chapter {', '.join(chapters)}", 11, GRAY)
    for i, entry in enumerate(entries):
        x, y = left + i % in_line * cell, 14 + i // in_line * line
        small = entry.figure.image
        if small.size != BARS:
            resample = Image.Resampling.LANCZOS if entry.name == "pixel_values" else Image.Resampling.NEAREST
            small = small.resize((SIDE, SIDE), resample)
        image.paste(small, (x, y))
        label = entry.label if entry.step.layer is None else f"layer {entry.step.layer}"
        write(draw, x, y + SIDE + 4, fit(label, cell - 6, 12), 12)
        write(draw, x, y + SIDE + 20, fit("×".join(map(str, entry.shape)), cell - 4, 11), 11, GRAY)
    return image


def write(draw: ImageDraw.ImageDraw, x: Real, y: Real, text: str, size: int, color: str = INK, anchor="la") -> None:
    """Writes one line of text at a point."""
    draw.text((x, y), printable(text), color, font(size), anchor=anchor)


def evenly(n: int) -> Tensor:
    """The indices 0 to n − 1, or ``SIDE`` of them, evenly spaced, with the first and the last."""
    return torch.linspace(0, n - 1, min(n, SIDE)).round().long()


def compact(figure: Figure) -> bytes:
    """A PNG with a palette of 256 colors, which is much smaller. Only photos would need more."""
    image = figure.image.quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
