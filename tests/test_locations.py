"""locations.py: exact to the bin in both directions, and robust to any malformed text."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm.emoji.scenes import mask_box
from minivlm.locations import (
    Detection,
    ParsedDetections,
    crop_mask,
    format_detections,
    from_bin,
    parse_detections,
    paste_mask,
    pixel_box,
    to_bin,
)
from minivlm.vqvae import MaskVQVAE

GOOD = "<loc0102><loc0051><loc0870><loc0512>"

sides = st.integers(1, 5000)
unit = st.floats(0, 1)
labels = st.text("abcdefghij éü-'?", min_size=1, max_size=12).map(str.strip).filter(bool)
codes = st.one_of(st.just(()), st.lists(st.integers(0, 127), min_size=16, max_size=16).map(tuple))


@st.composite
def scenes(draw):
    """Width and height of an image, with label, box and codes of up to four objects."""
    width, height = draw(sides), draw(sides)
    found = []
    for _ in range(draw(st.integers(0, 4))):
        (x0, x1), (y0, y1) = sorted([draw(unit), draw(unit)]), sorted([draw(unit), draw(unit)])
        found.append((draw(labels), (x0 * width, y0 * height, x1 * width, y1 * height), draw(codes)))
    return width, height, found


# --- round trips ---------------------------------------------------------------------------------------------------


def test_by_hand():
    text = format_detections(
        [Detection("cat", (20, 10, 40, 50)), Detection("dog", (0, 0, 200, 100))], width=200, height=100
    )
    assert text == "<loc0102><loc0102><loc0512><loc0205> cat ; <loc0000><loc0000><loc1023><loc1023> dog"
    parsed = parse_detections(text, 200, 100)
    assert parsed.problems == []
    assert [d.label for d in parsed.detections] == ["cat", "dog"]
    assert parsed.detections[1].box == (0.0, 0.0, 200.0, 100.0)
    assert parsed.detections[0].box == pytest.approx((20, 10, 40, 50), abs=0.1)


def test_order_is_y_before_x():
    (found,) = parse_detections("<loc0001><loc0002><loc0003><loc0004> a", 1023, 2046).detections
    assert found.box == (2.0, 2.0, 4.0, 6.0)


@pytest.mark.parametrize("side", [1, 7, 224, 1023, 1024, 4000.5])
def test_every_bin_round_trips(side):
    assert [to_bin(from_bin(i, side), side) for i in range(1024)] == list(range(1024))


@settings(max_examples=200, deadline=None)
@given(scenes())
def test_round_trip(scene):
    width, height, found = scene
    found = [Detection(*fields) for fields in found]
    text = format_detections(found, width, height)
    parsed = parse_detections(text, width, height)
    # boxes with the same four bins, label and codes cannot be told apart in the text
    items = list(dict.fromkeys(text.split(" ; "))) if found else []
    assert len(parsed.detections) == len(items)
    assert format_detections(parsed.detections, width, height) == " ; ".join(items)  # exact to the bin
    if len(items) == len(found):
        assert parsed.problems == []
        for before, after in zip(found, parsed.detections, strict=True):
            assert (after.label, after.codes) == (before.label, before.codes)
            for v, w, side in zip(before.box, after.box, (width, height) * 2, strict=True):
                assert abs(v - w) <= side / 1023 / 2 * (1 + 1e-9)  # half a bin


def test_codes_of_a_mask_are_parsed():
    codes = tuple(range(100, 116))
    text = GOOD + "".join(f"<seg{code:03d}>" for code in codes) + " cat"
    parsed = parse_detections(text, 1023, 1023)
    assert parsed.problems == [] and parsed.detections == [Detection("cat", (51.0, 102.0, 512.0, 870.0), codes)]
    assert format_detections(parsed.detections, 1023, 1023) == text


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_answer_is_no_problem(text):
    parsed = parse_detections(text, 10, 10)
    assert (parsed.detections, parsed.problems) == ([], [])


# --- masks ---------------------------------------------------------------------------------------------------------


def triangle(size: int, new: int) -> np.ndarray:
    """[new, size]: weights that make each new pixel a mean of old ones, decreasing linearly from its center.

    They are 0 at a distance of one pixel, old or new, whichever is larger.
    """
    reach = max(size / new, 1.0)
    centers = (np.arange(new) + 0.5) * size / new
    weights = np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - centers[:, None]) / reach)
    return weights / weights.sum(1, keepdims=True)


def blob(width: int, height: int, seed: int) -> np.ndarray:
    """A mask with a smooth outline: coarse random values, upsampled smoothly and thresholded at the median."""
    coarse = np.random.default_rng(seed).random((4, 4)).astype(np.float32)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return smooth > np.median(smooth)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_masks_in_boxes_of_64_pixels_round_trip_exactly():
    mask = np.random.default_rng(0).random((90, 110)) < 0.5
    box = (30, 11, 94, 75)  # 64 × 64 pixels
    crop = crop_mask(mask, box)
    assert crop.dtype == np.float32 and np.array_equal(crop, mask[11:75, 30:94])
    pasted = paste_mask(2 * crop - 1, box, 110, 90)
    inside = np.zeros_like(mask)
    inside[11:75, 30:94] = True
    assert np.array_equal(pasted, mask & inside)


def test_rows_are_y_and_columns_x():
    mask = np.zeros((40, 80), bool)
    mask[:10, 20:60] = True  # the upper half of the box below
    crop = crop_mask(mask, (20, 0, 60, 20))
    assert (crop[:30] == 1).all() and (crop[34:] == 0).all()
    values = np.full((64, 64), -1, np.float32)
    values[:, 32:] = 1
    pasted = paste_mask(values, (20, 0, 60, 20), 80, 40)
    assert mask_box(pasted) == (40, 0, 60, 20) and pasted.sum() == 20 * 20


@pytest.mark.parametrize("box", [(3, 5, 17, 9), (0, 0, 200, 130), (20, 30, 84, 94), (10, 0, 190, 11), (7, 7, 8, 8)])
def test_crop_and_paste_equal_weighted_means(box):
    """The definition of antialiased bilinear resizing: a matrix product over columns, then rows."""
    x0, y0, x1, y1 = box
    rng = np.random.default_rng(1)
    mask = rng.random((130, 200)) < 0.5
    rows, columns = triangle(y1 - y0, 64), triangle(x1 - x0, 64)
    np.testing.assert_allclose(crop_mask(mask, box), rows @ mask[y0:y1, x0:x1] @ columns.T, rtol=1e-5, atol=1e-6)
    values = rng.normal(size=(64, 64)).astype(np.float32)
    stretched = triangle(64, y1 - y0) @ values @ triangle(64, x1 - x0).T
    pasted = paste_mask(values, box, 200, 130)
    clear = np.abs(stretched) > 1e-5
    assert np.array_equal(pasted[y0:y1, x0:x1][clear], (stretched > 0)[clear]) and clear.mean() > 0.99
    pasted[y0:y1, x0:x1] = False
    assert not pasted.any()


def test_a_thin_line_becomes_gray_in_a_small_crop():
    """Antialiasing: two of 128 rows become one, so a line of one pixel spreads over two or three cells."""
    mask = np.zeros((128, 128), bool)
    mask[50] = True
    column = crop_mask(mask, (0, 0, 128, 128))[:, 7]
    assert set(np.flatnonzero(column)) <= {24, 25, 26}
    assert column.sum() == pytest.approx(0.5) and column.max() < 0.5


@settings(max_examples=100)
@given(st.integers(8, 300), st.integers(8, 300), st.integers(0, 2**32 - 1))
def test_smooth_masks_survive_cropping_and_pasting(width, height, seed):
    mask = blob(width, height, seed)
    box = mask_box(mask)
    assert overlap(paste_mask(2 * crop_mask(mask, box) - 1, box, width, height), mask) >= 0.9


@settings(max_examples=100)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1), st.data())
def test_masks_survive_the_text(width, height, seed, data):
    """A box with integer pixels, written as bins and parsed again, covers the same pixels."""
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (x0, y0, data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height)))
    (read,) = parse_detections(format_detections([Detection("cat", box)], width, height), width, height).detections
    assert pixel_box(read.box, width, height) == box
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    assert np.array_equal(crop_mask(mask, read.box), crop_mask(mask, box))


WINDOWS = {
    "whole image": ((0, 0, 30, 20), (0, 0, 30, 20)),
    "at the border": ((25, 12, 30, 20), (25, 12, 30, 20)),
    "one pixel": ((29, 19, 30, 20), (29, 19, 30, 20)),
    "fractional pixels": ((3.4, 3.6, 8.6, 9.4), (3, 4, 9, 9)),
    "no width": ((7, 3, 7, 9), (7, 3, 8, 9)),
    "no area, in the last corner": ((30, 20, 30, 20), (29, 19, 30, 20)),
    "half outside": ((-10, -5, 12, 8), (0, 0, 12, 8)),
    "half outside, low": ((20, 10, 50, 40), (20, 10, 30, 20)),
    "outside": ((40, 50, 60, 70), (29, 19, 30, 20)),
    "outside, before": ((-9, -9, -3, -3), (0, 0, 1, 1)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_pixel_boxes_are_inside_the_image(name):
    box, window = WINDOWS[name]
    assert pixel_box(box, 30, 20) == window
    full = paste_mask(np.ones((64, 64), np.float32), box, 30, 20)
    assert full.shape == (20, 30) and mask_box(full) == window
    x0, y0, x1, y1 = window
    assert full.sum() == (x1 - x0) * (y1 - y0)
    np.testing.assert_allclose(crop_mask(full, box), 1, rtol=1e-6)
    assert not crop_mask(~full, box).any()
    assert not paste_mask(np.zeros((64, 64), np.float32), box, 30, 20).any()  # 0 is outside, above 0 is inside


# --- malformed answers ---------------------------------------------------------------------------------------------

BROKEN = {
    "no location tokens": ("cat", "a box with 0 instead of 4 location tokens"),
    "cut after two location tokens": ("<loc0102><loc0051>", "a box with 2 instead of 4 location tokens"),
    "cut inside a location token": ("<loc0102><loc0051><loc0870><loc05", "a box with 3 instead of 4 location tokens"),
    "five location tokens": (GOOD + "<loc0001> cat", "a box with 5 instead of 4 location tokens"),
    "too large": ("<loc0102><loc0051><loc0870><loc1024> cat", "not one of <loc0000>"),
    "too few digits": ("<loc12><loc0051><loc0870><loc0512> cat", "not one of <loc0000>"),
    "five digits": ("<loc00012><loc0051><loc0870><loc0512> cat", "not one of <loc0000>"),
    "digits of another script": ("<loc٠١٢٣><loc0051><loc0870><loc0512> cat", "not one of <loc0000>"),
    "negative": ("<loc-001><loc0051><loc0870><loc0512> cat", "not one of <loc0000>"),
    "upside down": ("<loc0870><loc0051><loc0102><loc0512> cat", "upside down"),
    "mirrored": ("<loc0102><loc0512><loc0870><loc0051> cat", "mirrored"),
    "empty item": (" ", "a box with 0 instead of 4 location tokens"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_item_is_reported_and_the_others_are_parsed(name):
    item, message = BROKEN[name]
    parsed = parse_detections(
        f"<loc0000><loc0000><loc0001><loc0001> owl ; {item} ; <loc0000><loc0000><loc0001><loc0002> fox", 64, 48
    )
    assert [d.label for d in parsed.detections] == ["owl", "fox"]
    (problem,) = parsed.problems
    assert problem.startswith("Item 2 has") and message in problem and problem.endswith(".") and len(problem) < 200


@pytest.mark.parametrize("rest", ["<lo", ">", "<seg001> ; <loc0001>", "<eos> dog"])
def test_tokens_after_a_label_are_reported_and_dropped(rest):
    parsed = parse_detections(f"{GOOD} cat {rest}", 1023, 1023)
    assert parsed.detections == [Detection("cat", (51.0, 102.0, 512.0, 870.0))]
    assert "in its label" in parsed.problems[0]


def test_a_label_can_be_missing():
    codes = "".join(f"<seg{i:03d}>" for i in range(16))
    parsed = parse_detections(f"{GOOD}{codes} ; {GOOD}", 1023, 1023)
    box = (51.0, 102.0, 512.0, 870.0)
    assert parsed == ParsedDetections([Detection("", box, tuple(range(16))), Detection("", box)], [])
    assert format_detections(parsed.detections, 1023, 1023) == f"{GOOD}{codes} ; {GOOD}"


def test_a_repeated_item_is_included_once():
    parsed = parse_detections(f"{GOOD} cat ; {GOOD} dog ; {GOOD} cat ; {GOOD} cat", 64, 48)
    assert [d.label for d in parsed.detections] == ["cat", "dog"]
    assert ["repeats" in p for p in parsed.problems] == [True, True]
    parsed = parse_detections(f"{GOOD} {GOOD} cat", 64, 48)
    assert len(parsed.detections) == 1 and "repeats" in parsed.problems[0]


A, B = GOOD, "<loc0000><loc0000><loc0001><loc0001>"
CODED = "".join(f"<seg{i:03d}>" for i in range(16))
SEVERAL = {
    "spaces": (f"{A} cat {B} dog", "cat dog", 0),
    "newlines": (f"{A} cat\n{B} dog\n", "cat dog", 0),
    "nothing": (f"{A}cat{B}dog", "cat dog", 0),
    "a separator at the end": (f"{A} cat ; {B} dog ;", "cat dog", 0),
    "a separator and a newline at the end": (f"{A} cat;{B} dog;\n", "cat dog", 0),
    "one label for two boxes": (f"{A} {B} cat", "cat cat", 0),
    "one label for two boxes, joined": (f"{A}{B} red cat", "red-cat red-cat", 0),
    "one label for two boxes, the first with a mask": (f"{A}{CODED} {B} cat", "cat cat", 0),
    "no label for the last box": (f"{A} cat {B}", "cat -", 0),
    "text before the first box": (f"see {A} cat ; {B} dog", "cat dog", 1),
    "the label first": (f"cat {A}", "-", 1),
    "a box and half a box": (f"{A} cat {B[:-9]} dog", "cat", 1),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_boxes_in_one_item(name):
    """Each box has the label that follows it."""
    text, labels, num_problems = SEVERAL[name]
    parsed = parse_detections(text, 1023, 1023)
    assert [d.label.replace(" ", "-") or "-" for d in parsed.detections] == labels.split()
    boxes = [(51.0, 102.0, 512.0, 870.0), (0.0, 0.0, 1.0, 1.0)]
    assert [d.box for d in parsed.detections] == boxes[: len(parsed.detections)]
    assert len(parsed.problems) == num_problems
    assert all(problem.startswith("Item 1 has ") for problem in parsed.problems)


def test_codes_belong_to_the_box_right_before_them():
    first, second = parse_detections(f"{A} {B}{CODED} cat", 1023, 1023).detections
    assert (first.codes, second.codes) == ((), tuple(range(16)))
    first, second = parse_detections(f"{A}{CODED}{B} cat", 1023, 1023).detections
    assert (first.codes, second.codes) == (tuple(range(16)), ())


@pytest.mark.parametrize("segs", ["<seg001>" * 15, "<seg001>" * 17, "<seg128>" * 16, "<seg1>" * 16])
def test_a_malformed_mask_keeps_its_box(segs):
    parsed = parse_detections(f"{GOOD}{segs} cat", 64, 48)
    (found,) = parsed.detections
    assert found.label == "cat" and found.codes == () and "mask" in parsed.problems[0]


def test_a_truncated_answer_keeps_its_complete_items(vae):
    """Items before the cut are unaffected. The one that is cut has a box once its location tokens are complete."""
    found = [
        Detection("red cat", (0.0, 0.0, 40.0, 30.0), tuple(range(16))),
        Detection("dog", (10.0, 5.0, 20.0, 25.0)),
        Detection("owl", (0.0, 20.0, 64.0, 48.0), (127,) * 16),
    ]
    text = format_detections(found, 64, 48)
    whole = parse_detections(text, 64, 48).detections
    for end in range(len(text) + 1):
        parsed = parse_detections(text[:end], 64, 48)
        finished = text[:end].count(";")  # items before the one that was cut
        last = text[:end].split(";")[-1]
        assert parsed.detections[:finished] == whole[:finished]
        assert len(parsed.detections) - finished == (len(re.findall(r"<loc\d{4}>", last)) == 4)
        for cut in parsed.detections[finished:]:
            assert cut.box == whole[finished].box and whole[finished].label.startswith(cut.label)
            written = re.findall(r"<seg\d{3}>", last)
            assert cut.codes == (whole[finished].codes if len(written) == 16 else ())
            half = "<" in re.sub(r"<(loc|seg)\d+>", "", last)  # half a token
            assert bool(parsed.problems) == (half or len(written) not in (0, 16))
    (kept,) = parse_detections(text[: text.index("<seg009>")] + " cat", 64, 48).detections  # nine codes, then the label
    assert kept.box == whole[0].box and vae.masks_from_detections([kept], 64, 48) == [None]


def test_a_point_is_a_box():
    assert len(parse_detections("<loc0005><loc0005><loc0005><loc0005> ant", 64, 48).detections) == 1


pieces = st.sampled_from(
    [
        GOOD,
        " ; ",
        ";",
        " ",
        "cat",
        "\n",
        "<",
        ">",
        "<loc",
        "<loc0",
        "<loc1024>",
        "<loc12>",
        "<seg001>",
        "<seg001>" * 16,
        "<seg",
    ]
    + [f"<loc{i:04d}>" for i in (0, 1, 511, 1022, 1023)]
)
malformed = st.one_of(st.text(), st.lists(pieces, max_size=25).map("".join), st.text("<>locseg0123; ", max_size=80))


def count_items(text: str) -> int:
    """The items of an answer. A ";" at its end starts no item."""
    text = text.strip().removesuffix(";")
    return len(text.split(";")) if text.strip() else 0


@settings(max_examples=500, deadline=None)
@given(malformed, sides, sides)
def test_no_text_raises(text, width, height):
    parsed = parse_detections(text, width, height)
    for found in parsed.detections:  # what is returned is valid …
        x0, y0, x1, y1 = found.box
        assert 0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height
        assert len(found.codes) in (0, 16)
    again = parse_detections(format_detections(parsed.detections, width, height), width, height)  # … and round-trips
    assert again.detections == parsed.detections and again.problems == []
    assert len(parsed.detections) + len(parsed.problems) >= count_items(text)  # … and nothing is dropped silently


@pytest.fixture(scope="module")
def vae() -> MaskVQVAE:
    torch.manual_seed(0)
    return MaskVQVAE().eval()


def tokens(kind: str, digits: int, numbers: list[int]) -> str:
    return "".join(f"<{kind}{number:0{digits}d}>" for number in numbers)


bins = st.integers(0, 1023)
good_bins = st.tuples(bins, bins, bins, bins).map(
    lambda b: [min(b[0], b[2]), min(b[1], b[3]), max(b[::2]), max(b[1::2])]
)
bad_bins = st.one_of(
    st.tuples(bins, bins).map(lambda b: [min(b) + 1, 0, min(b), b[1]]),  # upside down
    st.tuples(bins, bins).map(lambda b: [0, min(b) + 1, b[1], min(b)]),  # mirrored
    st.lists(bins, max_size=3),
    st.lists(bins, min_size=5, max_size=30).filter(lambda b: len(b) % 4),
    st.lists(st.integers(1024, 99_999), min_size=4, max_size=4),
)
good_codes = st.one_of(st.just([]), st.lists(st.integers(0, 127), min_size=16, max_size=16))
bad_codes = st.one_of(
    st.lists(st.integers(0, 127), min_size=1, max_size=15),
    st.lists(st.integers(0, 127), min_size=17, max_size=40),
    st.lists(st.integers(128, 9_999), min_size=16, max_size=16),
)
any_labels = st.text(max_size=20).filter(lambda t: not set(t) & set(";<>")).map(str.strip).filter(bool)
bad_labels = st.sampled_from(
    ["a cat <loc", "a cat <seg001>", "a cat <loc0001> ", "a cat>t", "a cat<eos>", "a cat <loc٠١٢٣> cat"]
)


@st.composite
def items(draw):
    """The text of an item, the part of it that is malformed (or "whole"), and its bins, codes and label."""
    kind = draw(st.sampled_from(["whole", "whole", "mask", "box", "label"]))
    box = draw(bad_bins if kind == "box" else good_bins)
    codes = draw(bad_codes if kind == "mask" else good_codes)
    label = draw(bad_labels if kind == "label" else any_labels)
    text = tokens("loc", 4, box) + tokens("seg", 3, codes) + " " + label
    return text, kind, box, tuple(codes), label


@settings(max_examples=200)
@given(st.lists(items(), min_size=1, max_size=4), st.integers(1, 300), st.integers(1, 300))
def test_every_readable_part_of_a_malformed_answer_is_parsed(vae, written, width, height):
    expected, num_problems = [], 0
    for _, kind, (*box,), numbers, label in written:
        found = ("a cat" if kind == "label" else label, tuple(box), () if kind == "mask" else numbers)
        is_readable = kind != "box" and found not in expected
        expected += [found] if is_readable else []
        num_problems += not (is_readable and kind == "whole")
    parsed = parse_detections(" ; ".join(text for text, *_ in written), width, height)
    boxes = [(x0, y0, x1, y1) for _, (y0, x0, y1, x1), _ in expected]
    assert [(d.label, d.codes) for d in parsed.detections] == [(label, numbers) for label, _, numbers in expected]
    for detection, box in zip(parsed.detections, boxes, strict=True):
        x, y = width / 1023, height / 1023
        assert detection.box == pytest.approx(np.multiply(box, (x, y, x, y)), rel=1e-9)
    assert len(parsed.problems) == num_problems
    masks = vae.masks_from_detections(parsed.detections, width, height)
    assert [mask is None for mask in masks] == [not d.codes for d in parsed.detections]
    for detection, mask in zip(parsed.detections, masks, strict=True):
        if mask is not None:
            x0, y0, x1, y1 = pixel_box(detection.box, width, height)
            assert mask.shape == (height, width) and mask.sum() == mask[y0:y1, x0:x1].sum()


@settings(max_examples=300)
@given(st.one_of(malformed, st.lists(items(), max_size=4).map(lambda i: " ; ".join(t for t, *_ in i))), st.data())
def test_shuffled_repeated_or_cut_text_never_breaks_the_masks(vae, text, data):
    """Parts of an answer in any order, some of them repeated, cut at any byte."""
    parts = data.draw(st.lists(st.sampled_from(text.split("<")), max_size=60)) if text else []
    mixed = "<".join(parts).encode("utf-8", "surrogatepass")
    mixed = mixed[: data.draw(st.integers(0, len(mixed)))].decode("utf-8", "replace")
    parsed = parse_detections(mixed, 60, 40)
    assert len(vae.masks_from_detections(parsed.detections, 60, 40)) == len(parsed.detections)
    assert len(parsed.detections) + len(parsed.problems) >= count_items(mixed)


def test_long_nonsense_is_parsed_fast(vae):
    for segs in ("<seg001>" * 50_000, "<seg999>" * 50_000):
        parsed = parse_detections(GOOD + segs + " cat", 64, 48)
        assert vae.masks_from_detections(parsed.detections, 64, 48) == [None] and len(parsed.problems) == 1
    for text in ("<loc" * 50_000, "<loc0001>" * 50_001):
        assert parse_detections(text, 64, 48).detections == []
    many = "".join(f"<loc0000><loc{i % 1000:04d}><loc{i // 1000:04d}><loc1023>" for i in range(12_000))
    assert len(parse_detections(many, 64, 48).detections) == 12_000
    for text in (GOOD + " " * 200_000, GOOD + "<seg " * 50_000):
        assert len(parse_detections(text, 64, 48).detections) == 1


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box",
    [(5, 0, 4, 9), (0, 9, 5, 8), (-1, 0, 5, 5), (0, 0, 11, 5), (0, 0, 5, 10.01), (float("nan"), 0, 5, 5)],
)
def test_bad_boxes(box):
    with pytest.raises(ValueError, match="order its corners"):
        format_detections([Detection("cat", box)], 10, 10)


@pytest.mark.parametrize("label", [" cat", "cat ", "a;b", "<loc0001>", "a>b"])
def test_bad_labels(label):
    with pytest.raises(ValueError, match="label"):
        format_detections([Detection(label, (0, 0, 1, 1))], 10, 10)


@pytest.mark.parametrize("codes", [(1,), (128,) * 16, (-1,) * 16])
def test_bad_codes(codes):
    with pytest.raises(ValueError, match="16 codes"):
        format_detections([Detection("cat", (0, 0, 1, 1), codes)], 10, 10)


@pytest.mark.parametrize("size", [(0, 10), (10, -1), (float("inf"), 10), (10, float("nan"))])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match="positive"):
        parse_detections("", *size)
    with pytest.raises(ValueError, match="positive"):
        format_detections([], *size)
