"""Boxes and masks with readable labels on an image, and a sheet of such figures with text below each.

Boxes are (x0, y0, x1, y1) in pixels of the given image, masks have its height and width [H, W]. Small images are
enlarged.
"""

from collections.abc import Sequence
from numbers import Real

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from minivlm.course.viz.figure import SHARP, Figure
from minivlm.course.viz.style import PALETTE, font, text_color
from minivlm.course.viz.text import break_lines, count, fit, printable
from minivlm.locations import Detection

# Angles in degrees of the lines over the masks of each name, which tell them apart without color.
HATCHINGS = ((), (45,), (135,), (0,), (90,), (45, 135))
FILL, LINES = 0.45, 0.5  # opacity of a mask's color, and of its lines
SIDE = 448  # CSS pixels: a smaller image is enlarged by an integer until its longer side has about this many
Area = tuple[Real, Real, Real, Real]  # x0, y0, x1, y1 in pixels of the enlarged image


def draw_boxes(
    image: Image.Image, detections: Sequence[Detection], masks: Sequence[Bool[np.ndarray, "H W"] | None] = ()
) -> Figure:
    """The image with a box, a label and, if given, a mask for every detection. Each name has its own color.

    Args:
        masks: One per detection, None for a detection without one (``MaskVQVAE.masks_from_detections``), or no masks
            at all.

    Raises:
        ValueError: If the number of masks differs from the number of detections, or a mask is not boolean or not of
            the image's size.
    """
    masks = list(masks) or [None] * len(detections)
    check_masks(image.size, detections, masks)
    scale = max(1, round(SIDE * SHARP / max(image.size)))
    canvas = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    names = list(dict.fromkeys(d.label for d in detections))
    boxes = [tuple(v * scale for v in d.box) for d in detections]
    colors = [PALETTE[names.index(d.label) % len(PALETTE)] for d in detections]
    width = max(canvas.size) // 110
    for mask, color, detection in zip(masks, colors, detections, strict=True):
        if mask is not None:
            draw_mask(canvas, mask, color, HATCHINGS[names.index(detection.label) % len(HATCHINGS)], width)
    draw, taken = ImageDraw.Draw(canvas), []
    for box, color in zip(boxes, colors, strict=True):  # a dark rim keeps every color visible on any background
        around = (box[0] - SHARP, box[1] - SHARP, box[2] + SHARP, box[3] + SHARP)
        draw.rectangle(around, outline="black", width=width + 2 * SHARP)
        draw.rectangle(box, outline=color, width=width)
    for box, color, detection in zip(boxes, colors, detections, strict=True):
        taken.append(draw_label(draw, box, detection.label, color, taken))
    return Figure(canvas, describe(image.size, detections, masks), min(SHARP, max(canvas.size) / SIDE))


def check_masks(size: tuple[int, int], detections: Sequence[Detection], masks: Sequence[np.ndarray | None]) -> None:
    """Checks one mask or None per detection, for an image of this width and height."""
    if len(masks) != len(detections):
        raise ValueError(
            f"Expected one mask (or None) per detection, but got {count(len(masks), 'mask')} and "
            f"{count(len(detections), 'detection')}."
        )
    for detection, mask in zip(detections, masks, strict=True):
        if mask is not None and (mask.shape != size[::-1] or mask.dtype != bool):
            raise ValueError(
                f"The mask of {detection.label!r} must be boolean and have the image's height and width {size[::-1]}, "
                f"but it is {mask.dtype} and {mask.shape}. locations.paste_mask makes such a mask."
            )


def draw_mask(
    canvas: Image.Image, mask: Bool[np.ndarray, "H W"], color: str, hatching: tuple[int, ...], width: int
) -> None:
    """Draws a mask: a translucent fill, lines at the angles of ``hatching``, and an outline with a dark rim."""
    inside = enlarge(mask, canvas.size)
    canvas.paste(color, mask=inside.point(lambda v: round(v * FILL)))
    canvas.paste(text_color(color), mask=ImageChops.multiply(inside, hatch_lines(canvas.size, hatching)))
    grown = inside.filter(ImageFilter.MaxFilter(1 + 2 * SHARP))
    canvas.paste("black", mask=ImageChops.multiply(grown, near_edge(inside, width + SHARP)))
    canvas.paste(color, mask=ImageChops.multiply(inside, near_edge(inside, width)))


def near_edge(inside: Image.Image, width: int) -> Image.Image:
    """255 less than ``width`` pixels from the outside, 0 further in."""
    across = 2 * width + 1  # pixels that the blur averages along a line; a single one outside shows
    return inside.filter(ImageFilter.BoxBlur(width)).point(lambda v: min(255, (255 - v) * across))


def enlarge(mask: Bool[np.ndarray, "H W"], size: tuple[int, int]) -> Image.Image:
    """The mask resized: 255 inside, 0 outside, with a smooth edge about one pixel wide."""
    scale = size[0] / mask.shape[1]
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    if scale > 1:  # rounds off the corners of the pixels, but keeps a mask of one pixel above one half
        resized = resized.filter(ImageFilter.GaussianBlur(0.45 * scale))
    return resized.point(lambda v: min(255, max(0, round((v - 127.5) * scale + 127.5))))


def hatch_lines(size: tuple[int, int], angles: tuple[int, ...]) -> Image.Image:
    """Parallel lines at each of these angles, as opacity from 0 to 255 · LINES."""
    y, x = np.ogrid[: size[1], : size[0]]
    gap, thickness = max(size) / 32, max(size) / 180
    strength = np.zeros((size[1], size[0]), np.float32)
    for angle in np.deg2rad(angles):
        across = (np.sin(angle) * x + np.cos(angle) * y) % gap
        strength = np.maximum(strength, np.clip(thickness / 2 + 0.5 - np.abs(across - gap / 2), 0, 1))
    return Image.fromarray(np.round(255 * LINES * strength).astype(np.uint8))


def draw_label(draw: ImageDraw.ImageDraw, box: Area, text: str, color: str, taken: Sequence[Area]) -> Area:
    """Writes a label at the corner of its box where it covers the least of earlier labels. Returns its area."""
    size = max(draw.im.size) // 28
    text = printable(fit(text, 20 * size, size)).strip() or "?"
    _, _, right, bottom = draw.textbbox((0, 0), text, font(size))
    width, height = right + 6 * SHARP, bottom + 4 * SHARP
    x0, y0, x1, y1 = box
    corners = [(x0, y0 - height), (x0, y0), (x1 - width, y0), (x0, y1), (x0, y1 - height), (x1 - width, y1 - height)]
    areas = [move_inside((x, y, x + width, y + height), draw.im.size) for x, y in corners]
    best = min(areas, key=lambda area: sum(overlap(area, other) for other in taken))
    draw.rectangle(best, fill=color, outline="black", width=SHARP)
    draw.text((best[0] + 3 * SHARP, best[1] + SHARP), text, text_color(color), font(size))
    return best


def move_inside(area: Area, size: tuple[int, int]) -> Area:
    """Moves the area into an image of this width and height. If it is larger than the image, it starts at 0."""
    dx = max(-area[0], min(0, size[0] - 1 - area[2]))
    dy = max(-area[1], min(0, size[1] - 1 - area[3]))
    return area[0] + dx, area[1] + dy, area[2] + dx, area[3] + dy


def overlap(a: Area, b: Area) -> Real:
    """Number of pixels that two areas share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def describe(size: tuple[int, int], detections: Sequence[Detection], masks: Sequence[np.ndarray | None]) -> str:
    """Alt text: how many boxes and masks there are, and what and where each is."""
    masked = sum(mask is not None for mask in masks)
    head = f"An image of {size[0]}×{size[1]} pixels with {count(len(detections), 'box', 'boxes')}"
    head += f" and {count(masked, 'mask')}" if masked else ""
    return f"{head}: {'; '.join(map(in_words, detections, masks))}." if detections else f"{head}."


def in_words(detection: Detection, mask: np.ndarray | None = None) -> str:
    """``cat, x 12 to 60, y 30 to 90``, and with a mask ``, mask of 812 pixels``."""
    x0, y0, x1, y1 = (round(v) for v in detection.box)
    box = f"{detection.label or '(no name)'}, x {x0} to {x1}, y {y0} to {y1}"
    return box if mask is None else f"{box}, mask of {area(mask)}"


def area(mask: np.ndarray) -> str:
    """``812 pixels``."""
    return count(np.count_nonzero(mask), "pixel")


# --- a sheet of figures --------------------------------------------------------------------------------------------


def draw_sheet(panels: Sequence[tuple[Figure, str]], columns: int = 2) -> Figure:
    """Figures side by side, ``columns`` per row, each with its lines of text below it.

    Raises:
        ValueError: If there is no figure.
    """
    if not panels:
        raise ValueError("A sheet needs at least one figure.")
    gap = 16 * SHARP
    width = max(figure.image.width for figure, _ in panels)
    tiles = [draw_tile(figure.image, text, width) for figure, text in panels]
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + gap for row in rows]
    sheet = Image.new("RGB", (min(columns, len(tiles)) * (width + gap) + gap, sum(heights) + gap), "white")
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            sheet.paste(tile, (gap + j * (width + gap), gap + sum(heights[:i])))
    return Figure(sheet, " ".join(f"{figure.alt} Below it: {text}" for figure, text in panels), SHARP)


def draw_tile(image: Image.Image, text: str, width: int) -> Image.Image:
    """One image above its text, on white."""
    size, gap = 16 * SHARP, 6 * SHARP
    lines = "\n".join(map(printable, break_lines(text, width, size, indent="    ")))
    _, _, _, bottom = ImageDraw.Draw(image).multiline_textbbox((0, 0), lines, font(size))
    tile = Image.new("RGB", (width, image.height + gap + round(bottom)), "white")
    tile.paste(image)
    ImageDraw.Draw(tile).multiline_text((0, image.height + gap), lines, "black", font(size))
    return tile
