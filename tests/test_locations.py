"""locations.py: exact to the bin both ways, and no text, however broken, may stop it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm.locations import Detection, format_boxes, from_bin, parse, to_bin

GOOD = "<loc0102><loc0051><loc0870><loc0512>"

sides = st.integers(1, 5000)
unit = st.floats(0, 1)
labels = st.text("abcdefghij éü-'?", min_size=1, max_size=12).map(str.strip).filter(bool)
codes = st.one_of(st.just(()), st.lists(st.integers(0, 127), min_size=16, max_size=16).map(tuple))


@st.composite
def scenes(draw):
    """A picture's width and height, and the label, box and codes of some things in it."""
    width, height = draw(sides), draw(sides)
    found = []
    for _ in range(draw(st.integers(0, 4))):
        (x0, x1), (y0, y1) = sorted([draw(unit), draw(unit)]), sorted([draw(unit), draw(unit)])
        found.append((draw(labels), (x0 * width, y0 * height, x1 * width, y1 * height), draw(codes)))
    return width, height, found


# --- there and back ------------------------------------------------------------------------------------------------


def test_by_hand():
    text = format_boxes([Detection("cat", (20, 10, 40, 50)), Detection("dog", (0, 0, 200, 100))], width=200, height=100)
    assert text == "<loc0102><loc0102><loc0512><loc0205> cat ; <loc0000><loc0000><loc1023><loc1023> dog"
    parsed = parse(text, 200, 100)
    assert parsed.problems == []
    assert [d.label for d in parsed.detections] == ["cat", "dog"]
    assert parsed.detections[1].box == (0.0, 0.0, 200.0, 100.0)
    assert parsed.detections[0].box == pytest.approx((20, 10, 40, 50), abs=0.1)


def test_order_is_y_before_x():
    (found,) = parse("<loc0001><loc0002><loc0003><loc0004> a", 1023, 2046).detections
    assert found.box == (2.0, 2.0, 4.0, 6.0)


@pytest.mark.parametrize("side", [1, 7, 224, 1023, 1024, 4000.5])
def test_every_bin_survives(side):
    assert [to_bin(from_bin(i, side), side) for i in range(1024)] == list(range(1024))


@settings(max_examples=200, deadline=None)
@given(scenes())
def test_round_trip(scene):
    width, height, found = scene
    found = [Detection(*fields) for fields in found]
    text = format_boxes(found, width, height)
    parsed = parse(text, width, height)
    # boxes that share their four bins, label and codes are one to a reader of the text
    items = list(dict.fromkeys(text.split(" ; "))) if found else []
    assert len(parsed.detections) == len(items)
    assert format_boxes(parsed.detections, width, height) == " ; ".join(items)  # exact to the bin
    if len(items) == len(found):
        assert parsed.problems == []
        for before, after in zip(found, parsed.detections, strict=True):
            assert (after.label, after.codes) == (before.label, before.codes)
            for v, w, side in zip(before.box, after.box, (width, height) * 2, strict=True):
                assert abs(v - w) <= side / 1023 / 2 * (1 + 1e-9)  # half a bin


def test_codes_of_a_mask_are_kept_aside():
    codes = tuple(range(100, 116))
    text = GOOD + "".join(f"<seg{code:03d}>" for code in codes) + " cat"
    parsed = parse(text, 1023, 1023)
    assert parsed.problems == [] and parsed.detections == [Detection("cat", (51.0, 102.0, 512.0, 870.0), codes)]
    assert format_boxes(parsed.detections, 1023, 1023) == text


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_nothing_found_is_no_problem(text):
    parsed = parse(text, 10, 10)
    assert (parsed.detections, parsed.problems) == ([], [])


# --- broken answers ------------------------------------------------------------------------------------------------

BROKEN = {
    "no places": ("cat", "0 of the 4 places"),
    "cut after two places": ("<loc0102><loc0051>", "2 of the 4 places"),
    "cut inside a place": ("<loc0102><loc0051><loc0870><loc05", "3 of the 4 places"),
    "five places": (GOOD + "<loc0001> cat", "5 of the 4 places"),
    "no label": (GOOD, "no label"),
    "too large": ("<loc0102><loc0051><loc0870><loc1024> cat", "not one of <loc0000>"),
    "too few digits": ("<loc12><loc0051><loc0870><loc0512> cat", "not one of <loc0000>"),
    "five digits": ("<loc00012><loc0051><loc0870><loc0512> cat", "not one of <loc0000>"),
    "digits of another script": ("<loc٠١٢٣><loc0051><loc0870><loc0512> cat", "not one of <loc0000>"),
    "negative": ("<loc-001><loc0051><loc0870><loc0512> cat", "not one of <loc0000>"),
    "upside down": ("<loc0870><loc0051><loc0102><loc0512> cat", "upside down"),
    "mirrored": ("<loc0102><loc0512><loc0870><loc0051> cat", "mirrored"),
    "a place in the label": (GOOD + " cat " + GOOD + " dog", "only the label"),
    "half a token in the label": (GOOD + " cat <lo", "only the label"),
    "text before the places": ("see " + GOOD + " cat", "0 of the 4 places"),
    "empty between two": (" ", "0 of the 4 places"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_item_is_reported_and_the_others_are_read(name):
    item, message = BROKEN[name]
    parsed = parse(
        f"<loc0000><loc0000><loc0001><loc0001> owl ; {item} ; <loc0000><loc0000><loc0001><loc0002> fox", 64, 48
    )
    assert [d.label for d in parsed.detections] == ["owl", "fox"]
    (problem,) = parsed.problems
    assert problem.startswith("Item 2 has") and message in problem and problem.endswith(".") and len(problem) < 200


def test_repeated_item_counts_once():
    parsed = parse(f"{GOOD} cat ; {GOOD} dog ; {GOOD} cat ; {GOOD} cat", 64, 48)
    assert [d.label for d in parsed.detections] == ["cat", "dog"]
    assert ["repeats" in p for p in parsed.problems] == [True, True]


@pytest.mark.parametrize("segs", ["<seg001>" * 15, "<seg001>" * 17, "<seg128>" * 16, "<seg1>" * 16])
def test_broken_mask_keeps_its_box(segs):
    parsed = parse(f"{GOOD}{segs} cat", 64, 48)
    (found,) = parsed.detections
    assert found.label == "cat" and found.codes == () and "mask" in parsed.problems[0]


def test_a_point_is_a_box():
    assert len(parse("<loc0005><loc0005><loc0005><loc0005> ant", 64, 48).detections) == 1


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


@settings(max_examples=500, deadline=None)
@given(malformed, sides, sides)
def test_no_text_raises(text, width, height):
    parsed = parse(text, width, height)
    for found in parsed.detections:  # what is returned can be trusted …
        x0, y0, x1, y1 = found.box
        assert 0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height
        assert found.label and len(found.codes) in (0, 16)
    again = parse(format_boxes(parsed.detections, width, height), width, height)  # … and written again
    assert again.detections == parsed.detections and again.problems == []
    items = len(text.split(";")) if text.strip() else 0
    assert len(parsed.detections) + len(parsed.problems) >= items  # … and nothing is dropped in silence


def test_long_nonsense_is_read_fast():
    for text in ("<loc" * 50_000, "<loc0001>" * 50_000, GOOD + " " * 200_000, GOOD + "<seg " * 50_000):
        assert parse(text, 64, 48).detections == []


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box",
    [(5, 0, 4, 9), (0, 9, 5, 8), (-1, 0, 5, 5), (0, 0, 11, 5), (0, 0, 5, 10.01), (float("nan"), 0, 5, 5)],
)
def test_bad_boxes(box):
    with pytest.raises(ValueError, match="order its corners"):
        format_boxes([Detection("cat", box)], 10, 10)


@pytest.mark.parametrize("label", ["", " cat", "cat ", "a;b", "<loc0001>", "a>b"])
def test_bad_labels(label):
    with pytest.raises(ValueError, match="label"):
        format_boxes([Detection(label, (0, 0, 1, 1))], 10, 10)


@pytest.mark.parametrize("codes", [(1,), (128,) * 16, (-1,) * 16])
def test_bad_codes(codes):
    with pytest.raises(ValueError, match="16 codes"):
        format_boxes([Detection("cat", (0, 0, 1, 1), codes)], 10, 10)


@pytest.mark.parametrize("size", [(0, 10), (10, -1), (float("inf"), 10), (10, float("nan"))])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match="positive"):
        parse("", *size)
    with pytest.raises(ValueError, match="positive"):
        format_boxes([], *size)
