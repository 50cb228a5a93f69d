"""Boxes and masks ↔ text: how a language model points at things.

PaliGemma writes a box as four tokens of its vocabulary, then what is in it, and joins several with " ; ":

    <loc0102><loc0051><loc0870><loc0512> cat ; <loc0000><loc0600><loc0400><loc1023> dog
     y min    x min    y max    x max

Each number is a bin of 0…1023 along that side of the picture, round(v / side × 1023), so a box does not depend on how
the picture was squashed for the model. Sixteen `<seg…>` tokens may stand between box and label: the codes of a mask of
64×64, as seen in its box. This module cuts masks out of a picture and pastes them back; vqvae.py knows what codes mean.

Source: big_vision, configs/proj/paligemma (README and evaluators/proj/paligemma/transfers/segmentation.py).
Units: boxes are (x0, y0, x1, y1) in pixels of the original picture, x to the right, y down, 0 at its edge.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import numpy as np
from jaxtyping import Bool, Float32
from PIL import Image

BINS = 1024  # <loc0000> … <loc1023>
CODES = 128  # <seg000> … <seg127>
CODES_PER_MASK = 16
MASK_SIDE = 64  # of a mask as its codes hold it
SEPARATOR = " ; "

Box = tuple[Real, Real, Real, Real]  # x0, y0, x1, y1 in pixels
Places = tuple[int, int, int, int]  # y min, x min, y max, x max, each a bin


@dataclass(frozen=True)
class Detection:
    """A thing found: its name, or "" where the text gives none, its box in pixels, and its mask's 16 codes, or none."""

    label: str
    box: Box
    codes: tuple[int, ...] = ()


@dataclass(frozen=True)
class ParsedDetections:
    """What could be read from a text, and a sentence for everything that could not."""

    detections: list[Detection]
    problems: list[str]


# --- numbers -------------------------------------------------------------------------------------------------------


def to_bin(value: Real, side: Real) -> int:
    """Pixels along a side of that many pixels → bin 0…1023."""
    return round(value / side * (BINS - 1))


def from_bin(index: int, side: Real) -> float:
    """Bin 0…1023 → pixels; at most half a bin, side / 2046, from where it came."""
    return index / (BINS - 1) * side


def box_to_locations(box: Box, width: Real, height: Real) -> Places:
    """Pixels (x0, y0, x1, y1) → bins, in the order in which PaliGemma writes them: y before x."""
    x0, y0, x1, y1 = box
    return to_bin(y0, height), to_bin(x0, width), to_bin(y1, height), to_bin(x1, width)


def locations_to_box(places: Places, width: Real, height: Real) -> Box:
    """Bins (y min, x min, y max, x max) → pixels, x before y."""
    y0, x0, y1, x1 = places
    return from_bin(x0, width), from_bin(y0, height), from_bin(x1, width), from_bin(y1, height)


# --- masks ---------------------------------------------------------------------------------------------------------


def pixel_box(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """A box → whole pixels (x0, y0, x1, y1) inside the picture, at least one wide and one high."""
    x0, y0, x1, y1 = (round(v) for v in box)
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return x0, y0, min(max(x1, x0 + 1), width), min(max(y1, y0 + 1), height)


def crop_mask(mask: Bool[np.ndarray, "H W"], box: Box) -> Float32[np.ndarray, "64 64"]:
    """The part of a picture's mask inside a box, squashed to 64×64: the share of each cell that is inside, in [0, 1].

    Bilinear with antialiasing, as big_vision prepares the masks that its VQ-VAE reads.
    """
    x0, y0, x1, y1 = pixel_box(box, mask.shape[1], mask.shape[0])
    part = Image.fromarray(mask[y0:y1, x0:x1].astype(np.float32))
    return np.asarray(part.resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BILINEAR))


def paste_mask(
    values: Float32[np.ndarray, "64 64"], box: Box, width: int, height: int
) -> Bool[np.ndarray, "height width"]:
    """A decoded mask, values about [-1, 1], stretched into its box: true where it is above 0 there, false elsewhere.

    First stretched, then compared, so that the outline is smooth.
    """
    x0, y0, x1, y1 = pixel_box(box, width, height)
    part = Image.fromarray(values).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = np.asarray(part) > 0
    return mask


# --- boxes → text --------------------------------------------------------------------------------------------------


def format_detections(detections: Iterable[Detection], width: Real, height: Real) -> str:
    """Detections in a picture of width × height pixels → the text that PaliGemma is trained to answer.

    Raises ValueError for a box that is upside down or leaves the picture, and for a label that could not be read back.
    """
    check_size(width, height)
    return SEPARATOR.join(format_detection(detection, width, height) for detection in detections)


def format_detection(detection: Detection, width: Real, height: Real) -> str:
    """One detection → `<locYMIN><locXMIN><locYMAX><locXMAX> label`, with its codes, if any, before the label."""
    x0, y0, x1, y1 = detection.box
    label, codes = detection.label, detection.codes
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):  # NaN fails too
        raise ValueError(
            f"The box {detection.box} of {label!r} must satisfy 0 ≤ x0 ≤ x1 ≤ {width} and 0 ≤ y0 ≤ y1 ≤ {height}; "
            "order its corners and clip it to the picture."
        )
    if label != label.strip() or any(mark in label for mark in ";<>"):
        raise ValueError(f"The label {label!r} must be a text without ';', '<', '>' or spaces around it.")
    if len(codes) not in (0, CODES_PER_MASK) or not all(0 <= code < CODES for code in codes):
        raise ValueError(f"The mask of {label!r} must have 16 codes of 0…127, or none; it has {list(codes)}.")
    places = box_to_locations(detection.box, width, height)
    return "".join(f"<loc{i:04d}>" for i in places) + "".join(f"<seg{i:03d}>" for i in codes) + f" {label}".rstrip()


# --- text → boxes --------------------------------------------------------------------------------------------------


def parse_detections(text: str, width: Real, height: Real) -> ParsedDetections:
    """A model's answer about a picture of width × height pixels → what it found, and what is wrong with the answer.

    Never raises on a text, however malformed: what cannot be read of an item is left out, and `problems` says which and
    why. An item needs its box, but no name: where PaliGemma is asked for one thing by a description, it writes none
    (big_vision, pp/proj/paligemma/segmentation.py). An empty text is an answer without boxes. Raises ValueError only
    for a width or height that is not positive.
    """
    check_size(width, height)
    detections, problems = [], []
    for number, item in enumerate(text.split(";") if text.strip() else [], start=1):
        detection, complaints = parse_item(item.strip(), width, height)
        if detection in detections:
            detection, complaints = None, ["repeats an earlier one"]
        if detection is not None:
            detections.append(detection)
        problems += [f"Item {number} {complaint}: {shorten(item.strip())}." for complaint in complaints]
    return ParsedDetections(detections, problems)


def parse_item(item: str, width: Real, height: Real) -> tuple[Detection | None, list[str]]:
    """The text between two ";" → a detection, or None, and what is wrong with it."""
    locs, segs, label = re.fullmatch(r"((?:<loc[^<>]*>\s*)*)((?:<seg[^<>]*>\s*)*)(.*)", item, re.DOTALL).groups()
    places, label = read_tokens(locs, "loc", 4, BINS), label.strip()
    if places is None:
        return None, [f"has a place that is not one of <loc0000> to <loc{BINS - 1}>"]
    if len(places) != 4:
        return None, [f"has {len(places)} of the 4 places of a box"]
    y0, x0, y1, x1 = places
    if y0 > y1 or x0 > x1:
        return None, ["has a box that is upside down or mirrored"]
    codes, complaints = read_tokens(segs, "seg", 3, CODES), []
    if "<" in label or ">" in label:
        label = re.split("[<>]", label)[0].strip()
        complaints = ["has a token, or a piece of one, where only the label may stand, so it is cut off there"]
    if codes is None or len(codes) not in (0, CODES_PER_MASK):
        codes = []
        complaints.append("has a mask that is not 16 tokens of <seg000> to <seg127>, so only its box is kept")
    return Detection(label, locations_to_box(tuple(places), width, height), tuple(codes)), complaints


def read_tokens(text: str, kind: str, digits: int, count: int) -> list[int] | None:
    """The numbers of `<loc0001><loc0002>…`, or None where one does not have that many digits or is not below count."""
    inside = re.findall(r"<(?:loc|seg)([^<>]*)>", text)
    well_formed = all(re.fullmatch(f"[0-9]{{{digits}}}", number) and int(number) < count for number in inside)
    return [int(number) for number in inside] if well_formed else None


def shorten(text: str, length: int = 60) -> str:
    """A text in quotes, cut so that a sentence about it stays readable."""
    return repr(text if len(text) <= length else text[: length - 1] + "…")


def check_size(width: Real, height: Real) -> None:
    if not all(math.isfinite(side) and side > 0 for side in (width, height)):
        raise ValueError(f"The picture is {width}×{height} pixels; both sides must be positive.")
