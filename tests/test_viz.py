"""Boxes and labels: where they are drawn, that they can be read, and the words for those who cannot see them."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from minivlm.locations import Detection
from minivlm.viz import Picture, draw_boxes, draw_sheet
from minivlm.viz.boxes import PALETTE, luminance, overlap, place_inside, text_colour, wrap

GREY = Image.new("RGB", (112, 112), (128, 128, 128))


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_boxes_lie_where_they_should_on_an_enlarged_picture():
    picture = draw_boxes(GREY, [Detection("cat", (28, 56, 84, 84))])
    assert picture.image.size == (448, 448)
    pixels = np.asarray(picture.image)
    coloured = (pixels == rgb(PALETTE[0])).all(-1)
    rows, columns = coloured.any(1).nonzero()[0], coloured.any(0).nonzero()[0]
    assert (columns.min(), columns.max()) == (112, 336)
    assert rows.max() == 336 and coloured[336, 112:337].all() and coloured[240:337, 112].all()
    assert (pixels[250:320, 130:320] == 128).all()  # nothing is drawn inside


def test_large_pictures_are_not_enlarged_and_the_original_is_left_alone():
    large = Image.new("RGB", (1000, 700))
    assert draw_boxes(large, [Detection("cat", (0, 0, 1000, 700))]).image.size == (1000, 700)
    assert not np.asarray(large).any()


def test_a_name_has_one_colour_and_another_name_another():
    boxes = [("cat", (10, 30, 30, 50)), ("dog", (40, 30, 60, 50)), ("cat", (70, 30, 90, 50))]
    pixels = np.asarray(draw_boxes(GREY, [Detection(*box) for box in boxes]).image)
    left_edges = [tuple(pixels[180, x0 * 4 + 1]) for x0 in (10, 40, 70)]
    assert left_edges == [rgb(PALETTE[0]), rgb(PALETTE[1]), rgb(PALETTE[0])]


@pytest.mark.parametrize("colour", PALETTE)
def test_labels_have_the_contrast_that_wcag_asks_for(colour):
    darker, lighter = sorted((luminance(colour), luminance(text_colour(colour))))
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_labels_stay_inside_and_avoid_each_other(monkeypatch):
    from minivlm.viz import boxes as module

    places, draw_label = [], module.draw_label

    def record(*args):
        places.append(draw_label(*args))
        return places[-1]

    monkeypatch.setattr(module, "draw_label", record)
    same = (20, 20, 100, 100)
    draw_boxes(GREY, [Detection(name, same) for name in ("cat", "dog", "owl")] + [Detection("fox", (0, 0, 5, 5))])
    assert all(0 <= x0 < x1 < 448 and 0 <= y0 < y1 < 448 for x0, y0, x1, y1 in places)
    assert all(overlap(a, b) == 0 for i, a in enumerate(places) for b in places[:i])


def test_odd_detections_are_drawn_too():
    for odd in (
        Detection("a point", (1, 1, 1, 1)),
        Detection("猫", (0, 0, 3, 2)),
        Detection("long " * 50, (0, 0, 2, 2)),
    ):
        assert draw_boxes(Image.new("L", (3, 2)), [odd]).image.mode == "RGB"
    assert draw_boxes(GREY, []).alt == "A picture of 112×112 pixels with 0 boxes."


def test_alt_text_says_what_is_where():
    alt = draw_boxes(GREY, [Detection("cat", (1.2, 2, 50.7, 60)), Detection("dog", (0, 0, 9, 9))]).alt
    assert alt == "A picture of 112×112 pixels with 2 boxes: cat, x 1 to 51, y 2 to 60; dog, x 0 to 9, y 0 to 9."


def test_place_inside_moves_without_shrinking():
    assert place_inside((-5, -2, 15, 8), (100, 50)) == (0, 0, 20, 10)
    assert place_inside((90, 45, 110, 55), (100, 50)) == (79, 39, 99, 49)
    assert place_inside((0, 0, 200, 10), (100, 50)) == (0, 0, 200, 10)


def test_a_picture_shows_itself_in_a_notebook_and_keeps_its_alt_text(tmp_path):
    picture = Picture(GREY, "grey, and “nothing” else")
    data, metadata = picture._repr_mimebundle_()
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as shown:
        assert shown.size == (112, 112) and shown.info["Description"] == picture.alt
    assert data["text/plain"] == picture.alt == metadata["image/png"]["alt"]
    picture.save(tmp_path / "new" / "grey.png")
    assert (tmp_path / "new" / "grey.png").read_bytes() == picture.png()
    with pytest.raises(ValueError, match="end in .png"):
        picture.save(tmp_path / "grey.jpg")


def test_a_sheet_holds_every_picture_and_its_text():
    picture = draw_boxes(GREY, [])
    sheet = draw_sheet([(picture, "caption en: nothing")] * 3, columns=2)
    assert sheet.image.width == 2 * 448 + 3 * 16
    assert sheet.image.height > 2 * 448
    assert sheet.alt.count("caption en: nothing") == 3
    with pytest.raises(ValueError, match="at least one picture"):
        draw_sheet([])


def test_wrap_breaks_lines_and_keeps_them_apart():
    lines = wrap("one two three four five six seven\neight", 16, 100).splitlines()
    assert len(lines) > 2 and lines[-1] == "eight"
    assert max(map(len, lines)) <= 10
