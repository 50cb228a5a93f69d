"""The small figures of a tensor trace: the image, heat maps, masks, the next tokens, and all on one sheet.

    C colors · H, W pixels · R rows (patches or tokens) · N numbers per row, of all heads side by side · T, S tokens

Each function for a single tensor returns a ``Drawing``. In heat maps and masks, a pixel is a *cell*: one number of the
tensor. trace.js reads the numbers back from the colors.
"""

import io
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from jaxtyping import Float, Shaped
from PIL import Image, ImageDraw
from torch import Tensor

from minivlm.course.viz.figure import SHARP, Figure
from minivlm.course.viz.style import BLUE, GRAY, INK, VERMILION, cividis, font, rgb, to_bytes
from minivlm.course.viz.text import count, fit, number, percent, printable, text_width
from minivlm.course.viz.trace_data import Drawing, Step, tree

SIDE, ALL_HEADS = 64, 256  # maximum rows and columns of cells, and columns of all heads together
CELL = 10  # maximum width and height of a cell, in CSS pixels
THUMB = 96  # width and height of a tensor on the overview
BARS = (336, 96)  # width and height of the next tokens' bars
NO_TOKEN = "No token is likely: the logits are NaN"
COLORS = to_bytes(cividis(np.arange(256), 0, 255))
LEVELS = (0, 16, 239, 255)  # the colors of the smallest number, of the middle 96%, and of the largest
ROWS = {"P": "patches", "T": "tokens", "S": "tokens", "H": "rows"}
COLUMNS = {"D": "dimensions", "d": "dimensions", "S": "keys", "P": "keys", "V": "vocabulary entries", "W": "columns"}

Knots = tuple[float, float, float, float]  # the numbers at ``LEVELS``; colors between them are linear


def pixels(image: Float[Tensor, "C H W"], mean: Sequence[float], std: Sequence[float]) -> Drawing:
    """The image that the model receives, without normalization, reduced to at most 224 pixels."""
    _, height, width = image.shape
    colors = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    shown = Image.fromarray(to_bytes(colors.clamp(0, 1).movedim(0, -1).numpy()))
    shown.thumbnail((224, 224))
    reduced = "" if shown.width == width else f", reduced to {shown.width} × {shown.height} cells"
    figure = enlarged(shown, f"The image that the model receives, {width} by {height} pixels.")
    ends = [(value - m) / s for m, s in zip(mean, std, strict=True) for value in (0, 1)]
    cells = {"shape": [1, *image.shape], "letters": "B C H W", "knots": ends, "colors": True}
    return Drawing(figure, f"The numbers as colors{reduced}.", cells)


def knots_of(values: Float[Tensor, "*N"]) -> Knots:
    """The smallest and the largest finite number, and between them the limits of the middle 96%.

    A few dimensions are often far larger than all others. They get few colors, and the others get most.
    """
    finite = values[values.isfinite()]
    share = torch.tensor([0.0, 0.02, 0.98, 1.0])
    return tuple(finite.float().quantile(share).tolist()) if len(finite) else (0.0, 0.0, 0.0, 0.0)


def cells_of(tensor: Shaped[Tensor, "1 *R N"], side: int = SIDE) -> Shaped[Tensor, "r c"]:
    """All numbers of a tensor or evenly spaced ones: ``side`` rows, and as many columns or those of all heads."""
    *heads, R, N = tensor.shape[1:]
    columns = min(side, max(1, ALL_HEADS * side // SIDE // heads[0])) if heads else side
    shown = tensor[0][..., evenly(R, side), :][..., evenly(N, columns)]
    return shown.movedim(0, 1).flatten(1) if heads else shown


def heat_map(step: Step, tensor: Shaped[Tensor, "1 *R N"], side: int = SIDE, knots: Knots | None = None) -> Drawing:
    """One cell per number, heads side by side. NaN and infinity are vermilion; a mask is light where it allows.

    Args:
        step: What the tensor is.
        tensor: It.
        side: The maximum number of rows.
        knots: The numbers at ``LEVELS``, to compare tensors. Default: those of the tensor's own cells.
    """
    is_mask = tensor.dtype == torch.bool
    shown = cells_of(tensor, side)
    values = shown.float()
    knots = knots or knots_of(values)
    finite = values.isfinite().numpy()
    levels = np.where(shown, 232, 24) if is_mask else levels_of(values.nan_to_num(0).numpy(), knots)
    colors = COLORS[levels]
    colors[~finite] = rgb(VERMILION)
    image = Image.fromarray(colors)
    cells = {
        "shape": list(tensor.shape),
        "letters": step.letters,
        "knots": [float(f"{k:.5g}") for k in knots],
        "truth": is_mask,
    }
    figure = enlarged(image, alt_text(step, tensor, knots, bool(finite.all())), CELL * side // SIDE)
    return Drawing(figure, caption(step, tensor, shown, knots), cells)


def levels_of(values: np.ndarray, knots: Knots) -> np.ndarray:
    """The color of each number: linear between different knots, and at equal knots the lowest."""
    highest = dict(zip(knots, LEVELS, strict=True))
    levels = np.interp(values, list(highest), list(highest.values())).round().astype(int)
    for knot, level in zip(reversed(knots), reversed(LEVELS), strict=True):
        levels[values == np.float32(knot)] = level
    return levels


def alt_text(step: Step, tensor: Tensor, knots: Knots, is_finite: bool) -> str:
    """What the heat map shows, in words."""
    if tensor.dtype == torch.bool:
        name, share = step.label.replace("_", " "), tensor.float().mean()
        return f"Attention {name} of {tensor.shape[-1]} tokens: {share:.0%} of the pairs are allowed."
    letters = step.letters.split()
    size = f"{tensor.shape[-2]} {ROWS[letters[-2]]} by {tensor.shape[-1]} {COLUMNS[letters[-1]]}"
    heads = f"{heads_of(step, tensor)} of " if tensor.ndim == 4 else ""
    broken = "" if is_finite else " Orange-red: NaN or infinite."
    most = f"most values between {number(knots[1])} and {number(knots[2])}"
    return f"Heat map of {step.name}, {heads}{size}, {most}.{broken}"


def caption(step: Step, tensor: Tensor, shown: Tensor, knots: Knots) -> str:
    """How to read the heat map."""
    letters = step.letters.split()
    rows = "queries" if letters[-1] in "SP" else ROWS[letters[-2]]
    per_head = shown.shape[1] // (tensor.shape[1] if tensor.ndim == 4 else 1)
    is_whole = (len(shown), per_head) == tuple(tensor.shape[-2:])
    part = "" if is_whole else f" ({len(shown)} × {per_head} of them, evenly spaced)"
    beside = f"; {heads_of(step, tensor)}, side by side" if tensor.ndim == 4 else ""
    colors = f"From {number(knots[0])} (dark) to {number(knots[3])} (light)."
    if tensor.dtype == torch.bool:
        colors = "Light: allowed, dark: blocked."
    elif not shown.isfinite().all():
        colors += " Orange-red: NaN or infinite."
    return f"Rows: {rows}, columns: {COLUMNS[letters[-1]]}{part}{beside}. {colors}"


def heads_of(step: Step, tensor: Tensor) -> str:
    """Such as ``4 heads``."""
    return count(tensor.shape[1], "channel" if step.letters.split()[1] == "C" else "head")


def enlarged(image: Image.Image, alt: str, most: int = CELL) -> Figure:
    """A figure whose longer side is at most about 560 CSS pixels, and each cell at most ``most``."""
    return Figure(image, alt, 1 / max(1, min(most, 560 // max(image.size))))


def next_tokens(likely: list[tuple[str, float]]) -> Drawing:
    """Bars of the most likely tokens after the prompt, with their probabilities. None if the logits are NaN."""
    image = blank(*BARS)
    if not likely:
        write(image, 0, BARS[1] / 2, NO_TOKEN, 13, anchor="lm")
        return Drawing(Figure(image, f"{NO_TOKEN}.", SHARP), "Look for the first tensor with NaN above")
    line = BARS[1] // len(likely)
    for i, (token, p) in enumerate(likely):
        top, end = i * line, max(125, 124 + round(p * 148))
        write(image, 0, top + line / 2, fit(f"“{token}”", 116, 13), 13, anchor="lm")
        ImageDraw.Draw(image).rectangle([SHARP * at for at in (124, top + 3, end, top + line - 4)], fill=BLUE)
        write(image, end + 6, top + line / 2, percent(p), 12, GRAY, anchor="lm")
    figure = Figure(image, f"Bars of the most likely next tokens: {in_words(likely)}.", SHARP)
    return Drawing(figure, "The next token after the prompt")


def in_words(likely: list[tuple[str, float]]) -> str:
    return ", ".join(f"“{token}” {percent(p)}" for token, p in likely)


# --- all on one sheet ----------------------------------------------------------------------------------------------


def overview(title: str, tokens: str, entries: Sequence, ending: str) -> Figure:
    """All stages on one sheet: their tensors, and of each layer only its output.

    Args:
        title: A line above.
        tokens: The sequence that the decoder reads, as text.
        entries: The recorded tensors, in order.
        ending: The end of the alt text.
    """
    stages = [(stage, [b[1][-1] if isinstance(b, tuple) else b for b in found]) for stage, found in tree(entries)]
    bands = [band(stage, shown) for stage, shown in stages]
    width = bands[0].width // SHARP
    sheet = blank(width, sum(image.height // SHARP for image in bands) + 48)
    write(sheet, 16, 14, title, 17)
    write(sheet, width - 16, 18, fit(tokens, width - 64 - text_width(title, 17), 13), 13, GRAY, anchor="ra")
    top = 48 * SHARP
    for image in bands:
        sheet.paste(image, (0, top))
        top += image.height
    sizes = "; ".join(
        f"{stage}: {shown[0].shape_text}{f' to {shown[-1].shape_text}' if len(shown) > 1 else ''}"
        for stage, shown in stages
    )
    return Figure(sheet, f"{title} over {tokens}, in {len(entries)} tensors. {sizes}. {ending}", SHARP)


def band(stage: str, entries: Sequence) -> Image.Image:
    """One stage: its name on the left, its tensors beside it, eight per line, with labels and shapes."""
    left, cell, line, in_line = 132, 112, 144, 8
    lines = -(-len(entries) // in_line)
    width = left + cell * in_line
    image = blank(width, line * lines + 12)
    ImageDraw.Draw(image).line([SHARP * at for at in (16, 0, width - 16, 0)], "#DDDDDD", SHARP)
    write(image, 16, 12, stage, 15)
    chapters = sorted({f"{entry.step.chapter:02d}" for entry in entries})
    write(image, 16, 34, f"chapter {', '.join(chapters)}", 11, GRAY)
    for i, entry in enumerate(entries):
        x, y = left + i % in_line * cell, 14 + i // in_line * line
        small = entry.figure.image
        if entry.figure.scale < SHARP:  # not the next tokens' bars
            resample = Image.Resampling.LANCZOS if entry.step.name == "pixel_values" else Image.Resampling.NEAREST
            small = small.resize((THUMB * SHARP, THUMB * SHARP), resample)
        image.paste(small, (x * SHARP, y * SHARP))
        label = entry.step.label if entry.step.layer is None else f"layer {entry.step.layer}"
        write(image, x, y + THUMB + 4, fit(label, cell - 6, 12), 12)
        write(image, x, y + THUMB + 20, fit(entry.size.replace(" ", ""), cell - 4, 11), 11, GRAY)
    return image


def blank(width: int, height: int) -> Image.Image:
    """A white sheet of that many CSS pixels."""
    return Image.new("RGB", (width * SHARP, height * SHARP), "white")


def write(image: Image.Image, x: Real, y: Real, text: str, size: int, color: str = INK, anchor="la") -> None:
    """Writes one line of text at a point, in CSS pixels."""
    where = (x * SHARP, y * SHARP)
    ImageDraw.Draw(image).text(where, printable(text), color, font(size * SHARP), anchor=anchor)


def evenly(n: int, most: int = SIDE) -> Tensor:
    """The indices 0 to n − 1, or ``most`` of them, evenly spaced, with the first and the last. As in trace.js."""
    m = min(n, most)
    return torch.arange(m) * (n - 1) // max(m - 1, 1)


def compact(figure: Figure) -> bytes:
    """A PNG without loss, with a palette if 256 colors are enough."""
    image = figure.image if figure.image.getcolors(256) is None else figure.image.quantize(256, dither=0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
