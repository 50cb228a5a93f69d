"""Boxes, masks and labels: where they are drawn, that they are readable, and their alt texts."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from minivlm.course.viz import Figure, draw_boxes, draw_sheet
from minivlm.course.viz.boxes import HATCHINGS, check_masks, draw_mask, enlarge, move_inside, overlap
from minivlm.course.viz.style import PALETTE, luminance, rgb, text_color
from minivlm.course.viz.text import break_lines, text_width
from minivlm.locations import Detection

GRAY = Image.new("RGB", (112, 112), (128, 128, 128))


def test_boxes_are_at_their_coordinates_in_an_enlarged_image():
    figure = draw_boxes(GRAY, [Detection("cat", (28, 56, 84, 84))])
    assert figure.image.size == (896, 896) and figure.size == (448, 448)
    pixels = np.asarray(figure.image)
    colored = (pixels == rgb(PALETTE[0])).all(-1)
    rows, columns = colored.any(1).nonzero()[0], colored.any(0).nonzero()[0]
    assert (columns.min(), columns.max()) == (224, 672)
    assert rows.max() == 672 and colored[672, 224:673].all() and colored[480:673, 224].all()
    assert (pixels[500:640, 260:640] == 128).all()  # nothing is drawn inside


def test_large_images_are_not_enlarged_and_the_original_is_unchanged():
    large = Image.new("RGB", (1000, 700))
    figure = draw_boxes(large, [Detection("cat", (0, 0, 1000, 700))])
    assert figure.image.size == (1000, 700) and figure.size == (500, 350)
    assert draw_boxes(Image.new("RGB", (640, 320)), []).size == (448, 224)  # not sharp, but as large as the others
    assert not np.asarray(large).any()


def test_each_name_has_its_own_color():
    boxes = [("cat", (10, 30, 30, 50)), ("dog", (40, 30, 60, 50)), ("cat", (70, 30, 90, 50))]
    pixels = np.asarray(draw_boxes(GRAY, [Detection(*box) for box in boxes]).image)
    left_edges = [tuple(pixels[360, x0 * 8 + 2]) for x0 in (10, 40, 70)]
    assert left_edges == [rgb(PALETTE[0]), rgb(PALETTE[1]), rgb(PALETTE[0])]


@pytest.mark.parametrize("color", PALETTE)
def test_labels_have_the_contrast_that_wcag_requires(color):
    darker, lighter = sorted((luminance(color), luminance(text_color(color))))
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_labels_stay_inside_and_do_not_overlap(monkeypatch):
    from minivlm.course.viz import boxes as module

    areas, draw_label = [], module.draw_label

    def record(*args):
        areas.append(draw_label(*args))
        return areas[-1]

    monkeypatch.setattr(module, "draw_label", record)
    same = (20, 20, 100, 100)
    draw_boxes(GRAY, [Detection(name, same) for name in ("cat", "dog", "owl")] + [Detection("fox", (0, 0, 5, 5))])
    assert all(0 <= x0 < x1 < 896 and 0 <= y0 < y1 < 896 for x0, y0, x1, y1 in areas)
    assert all(overlap(a, b) == 0 for i, a in enumerate(areas) for b in areas[:i])


def test_odd_detections_are_drawn_too():
    for odd in (
        Detection("a point", (1, 1, 1, 1)),
        Detection("猫", (0, 0, 3, 2)),
        Detection("long " * 50, (0, 0, 2, 2)),
    ):
        assert draw_boxes(Image.new("L", (3, 2)), [odd]).image.mode == "RGB"
    assert draw_boxes(GRAY, []).alt == "An image of 112×112 pixels with 0 boxes."


def test_alt_text_lists_names_and_coordinates():
    alt = draw_boxes(GRAY, [Detection("cat", (1.2, 2, 50.7, 60)), Detection("dog", (0, 0, 9, 9))]).alt
    assert alt == "An image of 112×112 pixels with 2 boxes: cat, x 1 to 51, y 2 to 60; dog, x 0 to 9, y 0 to 9."


# --- masks ---------------------------------------------------------------------------------------------------------


def disc(x: float, y: float, radius: float, width: int = 112, height: int = 112) -> np.ndarray:
    rows, columns = np.ogrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def test_a_mask_changes_only_what_it_covers():
    mask, box = disc(60, 50, 20), (10, 10, 100, 100)  # the box is much larger, so that its frame is elsewhere
    bare = np.asarray(draw_boxes(GRAY, [Detection("cat", box)]).image)
    drawn = np.asarray(draw_boxes(GRAY, [Detection("cat", box)], [mask]).image)
    changed = (bare != drawn).any(-1)
    rows, columns = np.ogrid[:896, :896]
    distance = np.hypot(columns + 0.5 - 8 * 60.5, rows + 0.5 - 8 * 50.5)
    assert changed[distance < 8 * 19].all()
    assert not changed[distance > 8 * 20 + 6].any()
    middle = drawn[400, 480].astype(int)  # the image shows through
    assert (np.abs(middle - (128 + 0.45 * (np.array(rgb(PALETTE[0])) - 128))) <= 1).all()


def test_a_mask_is_at_its_coordinates_in_an_image_that_is_not_square():
    mask = disc(200, 20, 15, 300, 60)
    wide = Image.new("RGB", (300, 60))
    changed = np.asarray(draw_boxes(wide, [Detection("cat", (0, 0, 2, 2))], [mask]).image).any(-1)
    assert changed[60, 600] and not changed[120, 300]


def test_an_outline_is_dark_color_dark_even_if_the_fill_has_the_same_color():
    """On an image of the mask's own color, from the middle of the mask to the right."""
    canvas = Image.new("RGB", (448, 448), PALETTE[0])
    draw_mask(canvas, disc(56, 56, 30), PALETTE[0], (), 4)
    row = np.asarray(canvas)[228, 228:].astype(int).sum(-1)
    dark = (row < 0.7 * row[0]).nonzero()[0]
    edge = 4 * 30
    assert edge - 12 < dark.min() < dark.max() < edge + 4
    between = row[dark.min() : dark.max()]
    assert (between == row[0]).sum() >= 2 and row[-1] == row[0]


def test_outlines_of_enlarged_masks_are_smooth_and_small_masks_survive():
    slope = np.asarray(enlarge(np.tri(112, dtype=bool), (448, 448))) > 127
    lengths = slope.sum(1) - np.arange(448)  # constant for a straight edge; stairs would differ by 4
    assert np.ptp(lengths[8:-8]) <= 1
    round_one = disc(56, 56, 30)
    assert np.asarray(enlarge(round_one, (448, 448))).sum() / 255 == pytest.approx(16 * round_one.sum(), rel=0.01)
    one = np.zeros((112, 112), bool)
    one[50, 60] = True
    assert np.asarray(enlarge(one, (448, 448)))[202, 242] > 127
    assert (np.asarray(enlarge(one, (112, 112))) == 255 * one).all()


def test_neighboring_masks_also_differ_without_color():
    """In a color as bright as the image and converted to gray, the hatchings still differ from each other."""
    patterns = []
    for hatching in HATCHINGS:
        canvas = GRAY.resize((448, 448))
        draw_mask(canvas, disc(56, 56, 50), PALETTE[6], hatching, 4)
        patterns.append(np.asarray(canvas.convert("L")).astype(int)[180:260, 180:260])
    assert np.ptp(patterns[0]) == 0
    for i, pattern in enumerate(patterns[1:], start=1):
        assert np.ptp(pattern) > 30
        assert all(np.abs(pattern - other).mean() > 5 for other in patterns[:i])


def test_each_name_has_its_own_hatching_and_boxes_without_masks_have_none():
    detections = [Detection(name, (0, 0, 3, 3)) for name in ("cat", "dog", "owl", "dog")]
    masks = [None, disc(30, 80, 12), None, disc(70, 80, 12)]
    gray = np.asarray(draw_boxes(GRAY, detections, masks).image.convert("L")).astype(int)
    for x in (30, 70):
        assert np.ptp(gray[600:680, 8 * x - 40 : 8 * x + 40]) > 30
    assert (gray[80:520, 400:] == 128).all()


def test_boxes_and_labels_are_drawn_over_masks():
    everywhere = np.ones((112, 112), bool)
    detections = [Detection("cat", (28, 56, 84, 84)), Detection("dog", (40, 60, 110, 110))]
    pixels = np.asarray(draw_boxes(GRAY, detections, [everywhere] * 2).image)
    assert (pixels[450, 224:316] == rgb(PALETTE[0])).all()  # the dog's label begins at 320
    label = np.asarray(draw_boxes(GRAY, detections).image)[410:444, 228:280]
    assert (pixels[410:444, 228:280] == label).all() and (label == 0).any()


def test_alt_text_lists_masks_and_their_sizes():
    detections = [Detection("cat", (1, 2, 50, 60)), Detection("dog", (0, 0, 9, 9)), Detection("owl", (5, 5, 6, 6))]
    mask, dot = np.zeros((112, 112), bool), np.zeros((112, 112), bool)
    mask[10:20, 10:22] = dot[5, 5] = True
    assert draw_boxes(GRAY, detections, [mask, None, dot]).alt == (
        "An image of 112×112 pixels with 3 boxes and 2 masks: cat, x 1 to 50, y 2 to 60, mask of 120 pixels; "
        "dog, x 0 to 9, y 0 to 9; owl, x 5 to 6, y 5 to 6, mask of 1 pixel."
    )
    assert "mask" not in draw_boxes(GRAY, detections, [None] * 3).alt


def test_masks_that_do_not_fit_raise_errors():
    cat = Detection("cat", (1, 2, 50, 60))
    with pytest.raises(ValueError, match=r"one mask \(or None\) per detection, but got 1 mask and 2 detections"):
        draw_boxes(GRAY, [cat, Detection("dog", cat.box)], [disc(5, 5, 3)])
    with pytest.raises(ValueError, match="1 mask and 0 detections"):
        draw_boxes(GRAY, [], [None])
    with pytest.raises(ValueError, match=r"mask of 'cat' must be .* \(112, 112\), but it is bool and \(64, 64\)"):
        draw_boxes(GRAY, [cat], [disc(5, 5, 3, 64, 64)])
    with pytest.raises(ValueError, match=r"must be boolean .* it is float64"):
        check_masks((112, 112), [cat], [np.zeros((112, 112))])
    with pytest.raises(ValueError, match=r"\(2, 3\), but it is bool and \(3, 2\)"):
        check_masks((3, 2), [cat], [np.zeros((3, 2), bool)])


# --- geometry, files, sheets ---------------------------------------------------------------------------------------


def test_move_inside_does_not_shrink():
    assert move_inside((-5, -2, 15, 8), (100, 50)) == (0, 0, 20, 10)
    assert move_inside((90, 45, 110, 55), (100, 50)) == (79, 39, 99, 49)
    assert move_inside((0, 0, 200, 10), (100, 50)) == (0, 0, 200, 10)


def test_a_figure_carries_its_alt_text_in_notebooks_and_files(tmp_path):
    figure = Figure(GRAY, 'gray, and "nothing" else', 2)
    data, metadata = figure._repr_mimebundle_()
    assert '<img alt="gray, and &quot;nothing&quot; else" width="56" height="56"' in data["text/html"]
    assert as_shown(data["text/html"]).size == (112, 112)  # sharp on screens with two pixels per CSS pixel
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as small:
        assert small.size == (56, 56) and small.info["Description"] == figure.alt
    assert data["text/plain"] == figure.alt == metadata["image/png"]["alt"]
    figure.save(tmp_path / "new" / "gray.png")
    assert (tmp_path / "new" / "gray.png").read_bytes() == figure.png()
    with pytest.raises(ValueError, match="end in .png"):
        figure.save(tmp_path / "gray.jpg")


def as_shown(html: str) -> Image.Image:
    """The image in the HTML of a figure."""
    return Image.open(io.BytesIO(base64.b64decode(re.search('base64,([^"]+)', html)[1])))


def test_a_page_shows_charts_exactly_and_compresses_photos():
    colors = np.zeros((64, 64, 3), np.uint8)
    colors[..., 0], colors[..., 1] = np.mgrid[:64, :64]
    chart = Figure(Image.fromarray(colors), "4,096 colors")
    assert (np.asarray(as_shown(chart.html()).convert("RGB")) == colors).all()
    photo = Image.effect_noise((200, 200), 90).convert("RGB")
    photo = Image.merge("RGB", [photo.getchannel(0), photo.rotate(90).getchannel(0), photo.rotate(180).getchannel(0)])
    figure = Figure(photo, "noise")
    assert len(figure.html()) < len(figure.png())
    assert (
        np.abs(np.asarray(as_shown(figure.html()).convert("L"), int) - np.asarray(photo.convert("L"), int)).mean() < 9
    )


def test_a_sheet_contains_every_figure_and_its_text():
    figure = draw_boxes(GRAY, [])
    sheet = draw_sheet([(figure, "caption en: nothing")] * 3, columns=2)
    assert sheet.size[0] == 2 * 448 + 3 * 16
    assert sheet.size[1] > 2 * 448
    assert sheet.alt.count("caption en: nothing") == 3
    with pytest.raises(ValueError, match="at least one figure"):
        draw_sheet([])


def test_break_lines_breaks_at_spaces_and_inside_long_words():
    lines = break_lines("one two three four five six seven\neight", 60, 16, indent="  ")
    assert len(lines) > 3 and lines[-1] == "eight" and lines[1].startswith("  ")
    assert "".join(lines).replace(" ", "") == "onetwothreefourfivesixseveneight"
    lines += break_lines("<loc0001><loc0002><loc0003>", 60, 16)
    assert all(text_width(line, 16) <= 60 for line in lines)
    assert break_lines("abc", 1, 16) == ["a", "b", "c"]  # at least one letter per line
