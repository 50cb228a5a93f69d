"""Boxes and masks ↔ text: how a language model points at objects.

PaliGemma writes a box as four location tokens, followed by the label, and joins several objects with " ; ":

    <loc0102><loc0051><loc0870><loc0512> cat ; <loc0000><loc0600><loc0400><loc1023> dog
     y min    x min    y max    x max

Each number is a bin from 0 to 1023 along that side of the image, round(v / side × 1023), so a box does not depend on
how the image was resized for the model. Between box and label there can be sixteen ``<seg…>`` tokens: the codes of a
64×64 mask of the inside of the box. This module crops and pastes masks; vqvae.py converts between masks and codes.

Source: big_vision, configs/proj/paligemma (README and evaluators/proj/paligemma/transfers/segmentation.py).
Units: boxes are (x0, y0, x1, y1) in pixels of the original image. x points right, y points down, 0 is the image's edge.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import numpy as np
from jaxtyping import Bool, Float32
from PIL import Image

from minivlm import hub

BINS = 1024  # <loc0000> … <loc1023>
CODES = 128  # <seg000> … <seg127>
CODES_PER_MASK = 16
MASK_SIDE = 64  # pixels per side of a mask before encoding and after decoding
SEPARATOR = " ; "

Box = tuple[Real, Real, Real, Real]  # x0, y0, x1, y1 in pixels
LocationBins = tuple[int, int, int, int]  # y min, x min, y max, x max


@dataclass(frozen=True)
class Detection:
    """One detected object: its label ("" if the text has none), its box in pixels, and its mask's 16 codes, if any."""

    label: str
    box: Box
    codes: tuple[int, ...] = ()


@dataclass(frozen=True)
class ParsedDetections:
    """Everything that could be read from a text, and one sentence for each problem."""

    detections: list[Detection]
    problems: list[str]


# --- coordinates ---------------------------------------------------------------------------------------------------


def to_bin(value: Real, side: Real) -> int:
    """A coordinate in pixels → its bin, for an image side of ``side`` pixels."""
    return round(value / side * (BINS - 1))


def from_bin(index: int, side: Real) -> float:
    """A bin → its coordinate in pixels, at most half a bin (side / 2046) from the original."""
    return index / (BINS - 1) * side


def box_to_locations(box: Box, width: Real, height: Real) -> LocationBins:
    """A box in pixels (x0, y0, x1, y1) → bins in PaliGemma's order (y min, x min, y max, x max)."""
    x0, y0, x1, y1 = box
    return to_bin(y0, height), to_bin(x0, width), to_bin(y1, height), to_bin(x1, width)


def locations_to_box(bins: LocationBins, width: Real, height: Real) -> Box:
    """Bins (y min, x min, y max, x max) → a box in pixels (x0, y0, x1, y1)."""
    y0, x0, y1, x1 = bins
    return from_bin(x0, width), from_bin(y0, height), from_bin(x1, width), from_bin(y1, height)


# --- masks ---------------------------------------------------------------------------------------------------------


def pixel_box(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """A box rounded to integer pixels and clipped to the image, at least one pixel wide and high."""
    x0, y0, x1, y1 = (round(v) for v in box)
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return x0, y0, min(max(x1, x0 + 1), width), min(max(y1, y0 + 1), height)


def crop_mask(mask: Bool[np.ndarray, "H W"], box: Box) -> Float32[np.ndarray, "64 64"]:
    """The part of an image's mask inside a box, resized to 64×64; each value is the fraction of the cell it covers.

    Bilinear with antialiasing, as big_vision prepares the masks that its VQ-VAE encodes.
    """
    x0, y0, x1, y1 = pixel_box(box, mask.shape[1], mask.shape[0])
    part = Image.fromarray(mask[y0:y1, x0:x1].astype(np.float32))
    return np.asarray(part.resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BILINEAR))


def paste_mask(
    values: Float32[np.ndarray, "64 64"], box: Box, width: int, height: int
) -> Bool[np.ndarray, "height width"]:
    """A decoded mask, with values in about [-1, 1], resized to its box: True inside where it is above 0.

    Resized first and thresholded second, so that the outline is smooth.
    """
    x0, y0, x1, y1 = pixel_box(box, width, height)
    part = Image.fromarray(values).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = np.asarray(part) > 0
    return mask


# --- text ----------------------------------------------------------------------------------------------------------


def format_detections(detections: Iterable[Detection], width: Real, height: Real) -> str:
    """Writes detections in an image of width × height pixels as the text that PaliGemma is trained to answer.

    Raises:
        ValueError: If a box is inverted or outside the image, or a label or its codes could not be parsed again.
    """
    check_size(width, height)
    return SEPARATOR.join(format_detection(detection, width, height) for detection in detections)


def format_detection(detection: Detection, width: Real, height: Real) -> str:
    """One detection → ``<locYMIN><locXMIN><locYMAX><locXMAX> label``, with any codes before the label."""
    x0, y0, x1, y1 = detection.box
    label, codes = detection.label, detection.codes
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):  # NaN fails too
        raise ValueError(
            f"The box {detection.box} of {label!r} must satisfy 0 ≤ x0 ≤ x1 ≤ {width} and 0 ≤ y0 ≤ y1 ≤ {height}: "
            "order its corners and clip it to the image."
        )
    if label != label.strip() or any(character in label for character in ";<>"):
        raise ValueError(f"The label {label!r} must not contain ';', '<' or '>', or start or end with a space.")
    if len(codes) not in (0, CODES_PER_MASK) or not all(0 <= code < CODES for code in codes):
        expected = f"no codes or {CODES_PER_MASK} codes from 0 to {CODES - 1}"
        raise ValueError(f"The mask of {label!r} must have {expected}, but has {list(codes)}.")
    bins = box_to_locations(detection.box, width, height)
    return "".join(f"<loc{i:04d}>" for i in bins) + "".join(f"<seg{i:03d}>" for i in codes) + f" {label}".rstrip()


def parse_detections(text: str, width: Real, height: Real) -> ParsedDetections:
    """Parses a model's answer about an image of width × height pixels.

    No text raises, however malformed. Parts of an item that cannot be read are left out, and ``problems`` says which
    and why. An item needs a box but no label: asked for one object by a description, PaliGemma writes none
    (big_vision, pp/proj/paligemma/segmentation.py). An empty text is an answer without boxes. An item can have several
    boxes. Each gets the label that follows it: "<box> <box> cat <box> dog" means two cats and a dog.

    Raises:
        ValueError: If width or height is not positive.
    """
    check_size(width, height)
    detections, problems = {}, []  # a dict, because finding repeated boxes in a long list takes too long
    items = text.strip().removesuffix(";")
    for number, item in enumerate(items.split(";") if items.strip() else [], start=1):
        found, item_problems = parse_item(item.strip(), width, height)
        new = dict.fromkeys(detection for detection in found if detection not in detections)
        if len(new) < len(found):
            item_problems = ["repeats an earlier box", *(item_problems if new else [])]
        detections |= new
        problems += [
            f"Item {number} {problem}: '{hub.printable(item.strip(), 60)}'." for problem in dict.fromkeys(item_problems)
        ]
    return ParsedDetections(list(detections), problems)


def parse_item(item: str, width: Real, height: Real) -> tuple[list[Detection], list[str]]:
    """The text between two ";" → its detections and its problems."""
    before, *runs = re.split(r"((?:<loc[^<>]*>\s*)+)", item)  # then in turn: location tokens, and the text after them
    if not runs:
        return [], ["has a box with 0 instead of 4 location tokens"]
    problems = ["has text before its box, which is ignored"] if before.strip() else []
    detections, label = [], ""
    for locs, rest in list(zip(runs[::2], runs[1::2], strict=True))[::-1]:  # from the end, where the label is
        segs, own_label = re.fullmatch(r"((?:<seg[^<>]*>\s*)*)(.*)", rest, re.DOTALL).groups()
        label, *cut_off = re.split("[<>]", own_label.strip() or label)
        label = label.strip()
        bins, codes = parse_token_numbers(locs, 4, BINS), parse_token_numbers(segs, 3, CODES)
        if bins is None or len(bins) % 4:
            unknown = f"has a location token that is not one of <loc0000> to <loc{BINS - 1}>"
            problems.append(unknown if bins is None else f"has a box with {len(bins)} instead of 4 location tokens")
            continue
        if cut_off:
            problems.append("has a token, or part of one, in its label, which is cut off there")
        if codes is None or len(codes) not in (0, CODES_PER_MASK):
            codes, expected = [], f"{CODES_PER_MASK} tokens from <seg000> to <seg{CODES - 1}>"
            problems.append(f"has a mask that is not {expected}, so only its box is used")
        for start in range(len(bins) - 4, -1, -4):
            y0, x0, y1, x1 = box = tuple(bins[start : start + 4])
            if y0 > y1 or x0 > x1:
                problems.append("has a box that is upside down or mirrored")
            else:
                detections.append(Detection(label, locations_to_box(box, width, height), tuple(codes)))
            codes = []  # they belong to the box right before them
    return detections[::-1], problems


def parse_token_numbers(text: str, digits: int, count: int) -> list[int] | None:
    """The numbers in ``<loc0001><loc0002>…``; None if one has the wrong number of digits or is not below ``count``."""
    numbers = re.findall(r"<(?:loc|seg)([^<>]*)>", text)
    is_valid = all(re.fullmatch(f"[0-9]{{{digits}}}", number) and int(number) < count for number in numbers)
    return [int(number) for number in numbers] if is_valid else None


def check_size(width: Real, height: Real) -> None:
    if not all(math.isfinite(side) and side > 0 for side in (width, height)):
        raise ValueError(f"Width and height of the image must be positive, but got {width}×{height} pixels.")
