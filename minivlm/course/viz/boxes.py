"""Boxes and masks with readable labels over a picture, and a sheet of pictures with the text that belongs to them.

Units: boxes are (x0, y0, x1, y1) in pixels of the picture as given, masks of its H × W; it is drawn enlarged where it
is small.
"""

import textwrap
from collections.abc import Sequence
from functools import cache
from numbers import Real
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from minivlm.course.viz.figure import Figure
from minivlm.locations import Detection

# Okabe & Ito's palette: told apart with every common kind of color blindness. Label text is black or white on it.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
# Angles of the lines over the masks of each name, in degrees: what tells them apart where colors cannot.
HATCHINGS = ((), (45,), (135,), (0,), (90,), (45, 135))
FILL, LINES = 0.45, 0.5  # how much of the picture a mask's color hides, and its lines
SIDE = 448  # pixels: a smaller picture is enlarged until its longer side has about as many
Area = tuple[Real, Real, Real, Real]  # x0, y0, x1, y1 in pixels of the picture as drawn


def draw_boxes(
    image: Image.Image, detections: Sequence[Detection], masks: Sequence[Bool[np.ndarray, "H W"] | None] = ()
) -> Figure:
    """The picture with a box and a label for every detection, and its mask; one color a name, repeated in words.

    masks: of each detection, None where it has none (`MaskVQVAE.masks_from_detections`); or no masks at all.

    Raises:
        ValueError: the masks are not as many as the detections, or not of the picture's size.
    """
    masks = list(masks) or [None] * len(detections)
    check_masks(image.size, detections, masks)
    scale = max(1, round(SIDE / max(image.size)))
    canvas = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    names = list(dict.fromkeys(d.label for d in detections))
    boxes = [tuple(v * scale for v in d.box) for d in detections]
    colors = [PALETTE[names.index(d.label) % len(PALETTE)] for d in detections]
    width = max(3, max(canvas.size) // 110)
    for mask, color, detection in zip(masks, colors, detections, strict=True):
        if mask is not None:
            draw_mask(canvas, mask, color, HATCHINGS[names.index(detection.label) % len(HATCHINGS)], width)
    draw, taken = ImageDraw.Draw(canvas), []
    for box, color in zip(boxes, colors, strict=True):  # a dark rim keeps every color visible on any background
        draw.rectangle(grow(box, 1), outline="black", width=width + 2)
        draw.rectangle(box, outline=color, width=width)
    for box, color, detection in zip(boxes, colors, detections, strict=True):
        taken.append(draw_label(draw, box, detection.label, color, taken))
    return Figure(canvas, describe(image.size, detections, masks))


def check_masks(size: tuple[int, int], detections: Sequence[Detection], masks: Sequence[np.ndarray | None]) -> None:
    if len(masks) != len(detections):
        raise ValueError(
            f"Masks: {len(masks)}, detections: {len(detections)}; give each its mask, or None where it has none."
        )
    for detection, mask in zip(detections, masks, strict=True):
        if mask is not None and (mask.shape != size[::-1] or mask.dtype != bool):
            raise ValueError(
                f"The mask of {detection.label!r} must be boolean and of the picture's height and width, {size[::-1]}, "
                f"not {mask.dtype} and {mask.shape}: locations.paste_mask makes it so."
            )


def draw_mask(
    canvas: Image.Image, mask: Bool[np.ndarray, "H W"], color: str, hatching: tuple[int, ...], width: int
) -> None:
    """Lays a color thinly over what the mask covers, lines over that, and an outline between two dark rims."""
    inside = enlarge(mask, canvas.size)
    canvas.paste(color, mask=inside.point(lambda v: round(v * FILL)))
    canvas.paste(text_color(color), mask=ImageChops.multiply(inside, lines(canvas.size, hatching)))
    grown = inside.filter(ImageFilter.MaxFilter(3))
    canvas.paste("black", mask=ImageChops.multiply(grown, near_edge(inside, width + 1)))
    canvas.paste(color, mask=ImageChops.multiply(inside, near_edge(inside, width)))


def near_edge(inside: Image.Image, width: int) -> Image.Image:
    """255 where fewer than `width` pixels lie between here and the outside, 0 further in."""
    across = 2 * width + 1  # pixels that the blur averages along a line; one of them outside shows
    return inside.filter(ImageFilter.BoxBlur(width)).point(lambda v: min(255, (255 - v) * across))


def enlarge(mask: Bool[np.ndarray, "H W"], size: tuple[int, int]) -> Image.Image:
    """A mask stretched to this size: 255 inside, 0 outside, and between them a smooth edge about one pixel wide."""
    scale = size[0] / mask.shape[1]
    stretched = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    if scale > 1:  # rounds off the corners of the pixels, but leaves the smallest thing, one pixel, above one half
        stretched = stretched.filter(ImageFilter.GaussianBlur(0.45 * scale))
    return stretched.point(lambda v: min(255, max(0, round((v - 127.5) * scale + 127.5))))


def lines(size: tuple[int, int], angles: tuple[int, ...]) -> Image.Image:
    """Parallel lines at each of these angles, from 0 to 255 · LINES."""
    y, x = np.ogrid[: size[1], : size[0]]
    gap, thickness = max(size) / 32, max(size) / 180
    strength = np.zeros((size[1], size[0]), np.float32)
    for angle in np.deg2rad(angles):
        across = (np.sin(angle) * x + np.cos(angle) * y) % gap
        strength = np.maximum(strength, np.clip(thickness / 2 + 0.5 - np.abs(across - gap / 2), 0, 1))
    return Image.fromarray(np.round(255 * LINES * strength).astype(np.uint8))


def draw_label(draw: ImageDraw.ImageDraw, box: Area, text: str, color: str, taken: Sequence[Area]) -> Area:
    """Writes the label at the corner of its box where it covers least of the labels before it; returns its place."""
    font_size = max(12, max(draw.im.size) // 28)
    text = textwrap.shorten(text, 40, placeholder="…") or "?"
    _, _, right, bottom = draw.textbbox((0, 0), text, font(font_size))
    width, height = right + 6, bottom + 4
    x0, y0, x1, y1 = box
    corners = [(x0, y0 - height), (x0, y0), (x1 - width, y0), (x0, y1), (x0, y1 - height), (x1 - width, y1 - height)]
    places = [place_inside((x, y, x + width, y + height), draw.im.size) for x, y in corners]
    best = min(places, key=lambda place: sum(overlap(place, other) for other in taken))
    draw.rectangle(best, fill=color, outline="black")
    draw.text((best[0] + 3, best[1] + 1), text, text_color(color), font(font_size))
    return best


def draw_sheet(panels: Sequence[tuple[Figure, str]], columns: int = 2) -> Figure:
    """Pictures side by side, ``columns`` in a row, each with its lines of text below it."""
    if not panels:
        raise ValueError("A sheet needs at least one picture.")
    gap, size = 16, 16
    width = max(picture.image.width for picture, _ in panels)
    tiles = [draw_tile(picture.image, wrap(text, size, width), size, width) for picture, text in panels]
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + gap for row in rows]
    sheet = Image.new("RGB", (min(columns, len(tiles)) * (width + gap) + gap, sum(heights) + gap), "white")
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            sheet.paste(tile, (gap + j * (width + gap), gap + sum(heights[:i])))
    return Figure(sheet, " ".join(f"{picture.alt} Below it: {text}" for picture, text in panels))


def draw_tile(image: Image.Image, text: str, size: int, width: int) -> Image.Image:
    """One picture over its text, on white."""
    _, _, _, bottom = ImageDraw.Draw(image).multiline_textbbox((0, 0), text, font(size))
    tile = Image.new("RGB", (width, image.height + 6 + round(bottom)), "white")
    tile.paste(image)
    ImageDraw.Draw(tile).multiline_text((0, image.height + 6), text, "black", font(size))
    return tile


def describe(size: tuple[int, int], detections: Sequence[Detection], masks: Sequence[np.ndarray | None]) -> str:
    """Alt text: how many boxes and masks, and what and where each is."""
    masked = sum(mask is not None for mask in masks)
    head = f"A picture of {size[0]}×{size[1]} pixels with {len(detections)} box{'es' if len(detections) != 1 else ''}"
    head += f" and {masked} mask{'s' if masked != 1 else ''}" if masked else ""
    return f"{head}: {'; '.join(map(in_words, detections, masks))}." if detections else f"{head}."


def in_words(detection: Detection, mask: np.ndarray | None = None) -> str:
    """`cat, x 12 to 60, y 30 to 90`, and with a mask `, mask of 812 pixels`."""
    x0, y0, x1, y1 = (round(v) for v in detection.box)
    box = f"{detection.label or '(no name)'}, x {x0} to {x1}, y {y0} to {y1}"
    return box if mask is None else f"{box}, mask of {area(mask)}"


def area(mask: np.ndarray) -> str:
    """`812 pixels`."""
    count = np.count_nonzero(mask)
    return f"{count} pixel{'s' if count != 1 else ''}"


# --- small geometry and type ---------------------------------------------------------------------------------------


def grow(box: Area, by: Real) -> Area:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def place_inside(area: Area, size: tuple[int, int]) -> Area:
    """The area moved, not shrunk, until it begins inside the picture and, where it can, ends there."""
    dx = max(-area[0], min(0, size[0] - 1 - area[2]))
    dy = max(-area[1], min(0, size[1] - 1 - area[3]))
    return area[0] + dx, area[1] + dy, area[2] + dx, area[3] + dy


def overlap(a: Area, b: Area) -> Real:
    """Pixels that two areas share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def luminance(color: str) -> float:
    """Relative luminance of "#rrggbb", 0 to 1, as WCAG 2 defines it."""
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def text_color(background: str) -> str:
    """Black or white, whichever stands out more: at 0.179 both have the same contrast."""
    return "#000000" if luminance(background) > 0.179 else "#FFFFFF"


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has nearly every letter that a label may hold."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def wrap(text: str, size: int, width: int) -> str:
    """Every line broken, at spaces, to fit into ``width`` pixels of this font size."""
    letters = max(10, int(width / (0.6 * size)))
    return "\n".join(textwrap.fill(line, letters, subsequent_indent="    ") for line in text.splitlines())
