"""Boxes with readable labels over a picture, and a sheet of pictures with the text that belongs to them.

Units: boxes are (x0, y0, x1, y1) in pixels of the picture as given; it is drawn enlarged where it is small.
"""

import textwrap
from collections.abc import Sequence
from functools import cache
from numbers import Real
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from minivlm.locations import Detection
from minivlm.viz.picture import Picture

# Okabe & Ito's palette: told apart with every common kind of colour blindness. Label text is black or white on it.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
SIDE = 448  # pixels: a smaller picture is enlarged until its longer side has about as many
Area = tuple[Real, Real, Real, Real]  # x0, y0, x1, y1 in pixels of the picture as drawn


def draw_boxes(image: Image.Image, detections: Sequence[Detection]) -> Picture:
    """The picture with a box and a label for every detection; one colour a name, which the label repeats in words."""
    scale = max(1, round(SIDE / max(image.size)))
    canvas = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    names = list(dict.fromkeys(d.label for d in detections))
    boxes = [tuple(v * scale for v in d.box) for d in detections]
    colours = [PALETTE[names.index(d.label) % len(PALETTE)] for d in detections]
    draw, taken = ImageDraw.Draw(canvas), []
    width = max(3, max(canvas.size) // 110)
    for box, colour in zip(boxes, colours, strict=True):  # a dark rim keeps every colour visible on any background
        draw.rectangle(grow(box, 1), outline="black", width=width + 2)
        draw.rectangle(box, outline=colour, width=width)
    for box, colour, detection in zip(boxes, colours, detections, strict=True):
        taken.append(draw_label(draw, box, detection.label, colour, taken))
    return Picture(canvas, describe(image.size, detections))


def draw_label(draw: ImageDraw.ImageDraw, box: Area, text: str, colour: str, taken: Sequence[Area]) -> Area:
    """Writes the label at the corner of its box where it covers least of the labels before it; returns its place."""
    font_size = max(12, max(draw.im.size) // 28)
    text = textwrap.shorten(text, 40, placeholder="…") or "?"
    _, _, right, bottom = draw.textbbox((0, 0), text, font(font_size))
    width, height = right + 6, bottom + 4
    x0, y0, x1, y1 = box
    corners = [(x0, y0 - height), (x0, y0), (x1 - width, y0), (x0, y1), (x0, y1 - height), (x1 - width, y1 - height)]
    places = [place_inside((x, y, x + width, y + height), draw.im.size) for x, y in corners]
    best = min(places, key=lambda place: sum(overlap(place, other) for other in taken))
    draw.rectangle(best, fill=colour, outline="black")
    draw.text((best[0] + 3, best[1] + 1), text, text_colour(colour), font(font_size))
    return best


def draw_sheet(panels: Sequence[tuple[Picture, str]], columns: int = 2) -> Picture:
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
    return Picture(sheet, " ".join(f"{picture.alt} Below it: {text}" for picture, text in panels))


def draw_tile(image: Image.Image, text: str, size: int, width: int) -> Image.Image:
    """One picture over its text, on white."""
    _, _, _, bottom = ImageDraw.Draw(image).multiline_textbbox((0, 0), text, font(size))
    tile = Image.new("RGB", (width, image.height + 6 + round(bottom)), "white")
    tile.paste(image)
    ImageDraw.Draw(tile).multiline_text((0, image.height + 6), text, "black", font(size))
    return tile


def describe(size: tuple[int, int], detections: Sequence[Detection]) -> str:
    """Alt text: how many boxes, and what and where each is."""
    head = f"A picture of {size[0]}×{size[1]} pixels with {len(detections)} box{'es' if len(detections) != 1 else ''}"
    return f"{head}: {'; '.join(map(in_words, detections))}." if detections else f"{head}."


def in_words(detection: Detection) -> str:
    """`cat, x 12 to 60, y 30 to 90`."""
    x0, y0, x1, y1 = (round(v) for v in detection.box)
    return f"{detection.label}, x {x0} to {x1}, y {y0} to {y1}"


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


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb", 0 to 1, as WCAG 2 defines it."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def text_colour(background: str) -> str:
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
