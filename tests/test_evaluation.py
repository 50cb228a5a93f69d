"""Evaluation: the counting is right on answers made by hand, and the whole runs on a model of random weights."""

import inspect
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from minivlm import emoji
from minivlm.emoji import Scene, SceneObject, evaluation, recipe
from minivlm.emoji.evaluation import Metric, accuracy, average_precision, evaluation_prompts, figures
from minivlm.hub import EMBEDDED
from minivlm.locations import Detection, format_detections
from minivlm.processor import Processor
from minivlm.vqvae import MaskVQVAE

SCENES = [emoji.make_scene(seed, "validation") for seed in range(30)]
ASKED = [(scene, example) for scene in SCENES for example in evaluation_prompts(scene)]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def model(processor):
    """Random weights."""
    config = recipe.TrainConfig(width=32, mlp_width=32, tower_layers=1, decoder_layers=1, heads=2)
    return recipe.new_model(config, processor)


def items(text: str, score: float = 0.9) -> list[tuple[str, float]]:
    return [(item, score) for item in text.split(" ; ")] if "<loc" in text else []


class Album(MaskVQVAE):
    """Reads codes as page numbers: nothing is lost, and masks can be chosen by hand."""

    def __init__(self):
        super().__init__()
        self.pages: list[np.ndarray] = []

    def codes_from_masks(self, masks, boxes):
        self.pages += masks
        numbers = range(len(self.pages) - len(masks), len(self.pages))
        return [(number // 128, number % 128, *[0] * 14) for number in numbers]

    def masks_from_detections(self, detections, width, height):
        return [self.pages[128 * d.codes[0] + d.codes[1]] if d.codes else None for d in detections]


def right_answer(scene: Scene, example: emoji.Example, vae: MaskVQVAE) -> str:
    if example.kind != "segment":
        return example.answers[0]
    classes = example.prompt.removeprefix("segment ").split(" ; ")
    return emoji.segment_target(scene.objects, classes, scene.size, vae.codes_from_masks)


def test_the_truth_scores_100_and_silence_0():
    album = Album()
    perfect = figures(ASKED, [(right_answer(s, e, album), items(e.answers[0])) for s, e in ASKED], album)
    assert all(figure.value == 1 for figure in perfect.values()), perfect
    silent = figures(ASKED, [("", []) for _ in ASKED], album)
    assert all(figure.value == 0 for figure in silent.values()), silent


def test_captions_count_in_any_order_and_order_captions_do_not():
    scene = next(s for s in SCENES if len({thing.name for thing in s.objects}) >= 2 and "cap" in s.captions)
    names = [thing.name for thing in sorted(scene.objects, key=lambda thing: -thing.center[0])]
    caption = next(e for e in scene.examples if e.kind == "caption")
    assert evaluation.is_correct(caption, emoji.count_caption(names))
    assert not evaluation.is_correct(caption, emoji.count_caption(names[:-1]))
    order = next(e for e in scene.examples if e.kind == "cap")
    backwards = emoji.join_phrases([emoji.with_article(name) for name in names])
    assert not evaluation.is_correct(order, f"from left to right: {backwards}")


def test_every_object_is_asked_for_once():
    for scene in SCENES:
        *others, detect, segment = evaluation_prompts(scene)
        assert not {example.kind for example in others} & {"detect", "segment"}
        assert detect.prompt.split(" ", 1)[1] == segment.prompt.removeprefix("segment ")
        for example in (detect, segment):
            assert example.answers[0].count("<loc") == 4 * len(scene.objects)


def test_the_longest_right_answer_may_be_written_to_its_end(processor):
    most = inspect.signature(evaluation.answer_all).parameters["max_new_tokens"].default
    crowded = [s for s in (emoji.make_scene(seed, "pairs") for seed in range(200)) if len(s.objects) == 4]
    answers = [right_answer(scene, evaluation_prompts(scene)[-1], Album()) for scene in crowded]
    lengths = [len(ids) + 1 for ids in processor.encode(answers)]  # and the token that ends it
    assert len(crowded) > 20 and 4 * 20 < max(lengths) <= most


# --- boxes ----------------------------------------------------------------------------------------------------------


def test_average_precision_of_a_case_by_hand():
    """Cats: a sure hit, a miss, a less sure hit: precision 1, 1/2 and 2/3 at recall 1/2, 1/2 and 1.

    What follows at a higher recall may be no better than what went before, so 1/2 becomes 2/3. COCO reads the curve at
    recall 0, 0.01 … 1: 51 times 1 and 50 times 2/3. Dogs: nothing found. The boxes are exact, so IoU decides nothing.
    """
    truth = [[Detection("cat", (0, 0, 10, 10)), Detection("cat", (20, 20, 30, 30)), Detection("dog", (50, 50, 60, 60))]]
    hit, miss, second = (0, 0, 10, 10), (40, 0, 50, 10), (20, 20, 30, 30)
    found = [[(Detection("cat", hit), 0.9), (Detection("cat", miss), 0.8), (Detection("cat", second), 0.7)]]
    cat = (51 * 1 + 50 * 2 / 3) / 101
    assert average_precision(truth, found) == pytest.approx(((cat + 0) / 2, (cat + 0) / 2))
    assert cat / 2 == pytest.approx(0.4175, abs=1e-4)


def test_average_precision_over_two_pictures_by_hand():
    """The sure box fits only loosely (IoU 80/120 = 2/3), the unsure one exactly, and a third repeats what was found.

    Sorted over both pictures: hit, hit, repeat up to IoU 0.65, that is at four of ten thresholds: 1. At the other six:
    miss, hit, miss, so precision 1/2 up to recall 1/2, read at 51 of 101 places: 25.5/101. The mean follows.
    """
    box = (0, 0, 10, 10)
    truth = [[Detection("cat", box)], [Detection("cat", box)]]
    loose = Detection("cat", (0, 2, 10, 12))
    found = [[(loose, 0.9)], [(Detection("cat", box), 0.8), (Detection("cat", (0, 0, 10, 9)), 0.7)]]
    assert average_precision(truth, found) == pytest.approx((1, (4 * 1 + 6 * 25.5 / 101) / 10))


def test_average_precision_falls_with_the_overlap():
    """A box shifted by a quarter of its side overlaps by 0.6: right at IoU 0.5, 0.55 and 0.6 of the ten thresholds."""
    truth, found = Detection("cat", (0, 0, 40, 40)), Detection("cat", (10, 0, 50, 40))
    at_half, over_all = average_precision([[truth]], [[(found, 1.0)]])
    assert at_half == pytest.approx(1) and over_all == pytest.approx(0.3)
    assert average_precision([[Detection("cat", (0, 0, 9, 9))]], [[]]) == (0, 0)
    assert all(map(math.isnan, average_precision([[]], [[]])))


# --- masks ----------------------------------------------------------------------------------------------------------


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((100, 100), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def scene_of(*things: tuple[str, tuple[int, int, int, int]]) -> Scene:
    objects = tuple(SceneObject(name, "me", box, rectangle(*box)) for name, box in things)
    return Scene(0, "validation", 100, np.zeros((100, 100, 3), np.uint8), objects)


def answer(album: Album, *found: tuple) -> str:
    """An answer about 100 × 100 pixels: a name, a box, and a mask or None, each."""
    codes = [album.codes_from_masks([mask], [box])[0] if mask is not None else () for _, box, mask in found]
    detections = [Detection(name, box, code) for (name, box, _), code in zip(found, codes, strict=True)]
    return format_detections(detections, 100, 100)


def test_overlap_of_boxes():
    assert evaluation.box_iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert evaluation.box_iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert evaluation.box_iou((0, 0, 10, 10), (2, 3, 4, 5)) == pytest.approx(4 / 100)
    assert (
        evaluation.box_iou((0, 0, 10, 10), (10, 0, 20, 10)) == evaluation.box_iou((0, 0, 9, 9), (20, 20, 30, 30)) == 0
    )
    assert evaluation.box_iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0


def test_masks_are_judged_in_correct_boxes_alone():
    """One mask covers half of its thing, one is a box, one has no mask, one no box, one a wrong name."""
    album = Album()
    left, right, low = (0, 0, 20, 20), (40, 0, 80, 20), (0, 50, 30, 90)
    scene = scene_of(("cat", left), ("cat", right), ("dog", low), ("owl", (60, 60, 80, 80)), ("fox", (80, 80, 99, 99)))
    text = answer(
        album,
        ("cat", right, rectangle(*right)),
        ("cat", left, rectangle(0, 0, 20, 10)),
        ("dog", low, None),
        ("owl", (60, 72, 80, 92), rectangle(60, 60, 80, 80)),  # IoU 8/32: another place
        ("ant", (80, 80, 99, 99), rectangle(80, 80, 99, 99)),
    )
    overlaps = evaluation.mask_ious(scene, text, album)
    assert overlaps == [0.5, 1, 0, None, None]
    found, mask_iou = evaluation.segmentation_figures([overlaps]).values()
    assert (found.value, found.count) == (0.6, 5) and (mask_iou.value, mask_iou.count) == (0.5, 3)


def test_a_mask_is_judged_by_what_can_be_seen():
    """What covers a thing is no part of it, and what the mask has outside of the box counts against it."""
    album = Album()
    box = (10, 10, 30, 30)
    seen = rectangle(*box) & ~rectangle(10, 10, 20, 20)  # 300 pixels
    scene = scene_of(("cat", box))
    scene = replace(scene, objects=(replace(scene.objects[0], mask=seen),))
    drawn = rectangle(10, 10, 30, 40)  # 600, all of those among them
    assert evaluation.mask_ious(scene, answer(album, ("cat", box, drawn)), album) == [0.5]


def test_best_boxes_find_their_thing_first_and_each_once():
    things = scene_of(("cat", (0, 0, 20, 20)), ("cat", (4, 0, 24, 20))).objects
    exact, between, far = (Detection("cat", (x, 0, x + 20, 20)) for x in (4, 2, 60))
    assert evaluation.match_detections(things, [between, exact]) == [0, 1]
    assert evaluation.match_detections(things, [exact, between]) == [1, 0]
    assert evaluation.match_detections(things, [exact]) == [None, 0]
    assert evaluation.match_detections(things, [between, exact, far, exact]).count(None) == 0
    assert (
        evaluation.match_detections(things, [far]) == [None, None]
        and evaluation.match_detections(things, []) == [None] * 2
    )
    half = Detection("cat", (0, 0, 20, 10))
    assert evaluation.match_detections(things[:1], [half]) == [0]  # 0.5 is enough
    assert evaluation.match_detections(things[:1], [Detection("cat", (0, 0, 20, 9.9))]) == [None]


@pytest.mark.parametrize(
    "broken", ["", "cat", "<loc0000>", "<seg001>" * 16, " ; ; <", "<loc0000>" * 4 + "<seg001>" * 9]
)
def test_answers_without_masks_give_nothing_but_no_error(broken):
    scene = scene_of(("cat", (0, 0, 20, 20)))
    assert evaluation.mask_ious(scene, broken, Album()) == [None]
    cut = "<loc0000><loc0000><loc0205><loc0205>" + "<seg001>" * 9 + " cat"
    assert evaluation.mask_ious(scene, cut, Album()) == [0]


def test_figures_of_nothing():
    nothing_found = evaluation.segmentation_figures([[None], [None, None]])
    assert [(f.value, f.count) for f in nothing_found.values()] == [(0, 3), (0, 0)]
    for nowhere in ([], [[], []]):
        assert all(math.isnan(f.value) and f.count == 0 for f in evaluation.segmentation_figures(nowhere).values())


def test_the_embedded_vae_draws_masks_well_in_right_boxes():
    vae = MaskVQVAE.from_pretrained()
    segments = [(scene, e) for scene, e in ASKED if e.kind == "segment"]
    overlaps = [evaluation.mask_ious(scene, right_answer(scene, e, vae), vae) for scene, e in segments]
    found, mask_iou = evaluation.segmentation_figures(overlaps).values()
    assert found.value == 1 and mask_iou.value >= 0.88 and 0 < mask_iou.margin < 0.03


# --- intervals and reports ------------------------------------------------------------------------------------------


def test_intervals():
    assert accuracy([True] * 50 + [False] * 50).margin == pytest.approx(0.0962, abs=0.001)  # Wilson, n = 100
    assert accuracy([True] * 100).margin == pytest.approx(0.037, abs=0.001)  # not zero at 100%
    truth = [[Detection("cat", (0, 0, 10, 10))] for _ in range(40)]
    some = [[(truth[0][0], 0.9)] if i % 4 else [] for i in range(40)]
    figure = evaluation.detection_figures(truth, some)["detection AP at IoU 0.5"]
    assert 0.05 < figure.margin < 0.25 and figure.count == 40


def test_the_jackknife_gives_the_interval_of_a_mean():
    """Of a mean it is the textbook's: 1.96 s / √n, where each block is one scene."""
    values = np.random.default_rng(0).random(20)
    whole, margin = evaluation.jackknife(20, lambda kept: [values[kept].mean(), 1.0])
    assert whole == pytest.approx([values.mean(), 1])
    assert margin == pytest.approx([1.96 * values.std(ddof=1) / 20**0.5, 0])
    assert np.isnan(evaluation.jackknife(1, lambda kept: [0.5])[1]).all()


def test_scores_belong_to_their_boxes(processor):
    text = "<loc0001><loc0002><loc0003><loc0004> cat ; <loc0005><loc0006><loc0007><loc0008> dog"
    ids = processor.encode([text])[0]
    probabilities = [0.1 * (i < 4) + 0.5 * (6 <= i) for i in range(len(ids))]
    (cat, low), (dog, high) = evaluation.scored_items(processor, ids, probabilities)
    assert cat.startswith("<loc0001>") and "cat" in cat and dog.endswith("dog")
    assert low == pytest.approx(0.1) and high == pytest.approx(0.5)
    assert evaluation.scored_items(processor, [], []) == []


def test_a_report_of_random_weights(model, processor, tmp_path, capsys):
    columns = evaluation.run(model, processor, 3, ("validation", "artist"), tmp_path / "figures.json")
    assert list(columns) == ["validation", "artist", "validation, blank picture"]
    assert "| caption |" in capsys.readouterr().out
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["scenes"] == 3
    order = ["detection AP, IoU 0.5 to 0.95", "segment: objects found", "mask IoU in correct boxes"]
    assert [row for row in columns["artist"] if row in order] == order
    assert Metric(**written["splits"]["artist"]["caption"]) == columns["artist"]["caption"]
    with pytest.raises(ValueError, match="at least 1"):
        evaluation.evaluate(model, processor, "validation", 0)


def test_a_vae_that_is_given_reads_the_masks(model, processor, monkeypatch):
    """A model that has learned the true answers by heart, in another VAE's codes."""
    album, scene = Album(), emoji.make_scene(5, "validation")
    texts = [(right_answer(scene, e, album), items(e.answers[0])) for e in evaluation_prompts(scene)]
    monkeypatch.setattr(evaluation, "answer_all", lambda model, processor, asked: texts)
    monkeypatch.setattr(emoji, "make_scene", lambda *_: scene)
    columns = evaluation.run(model, processor, 1, ("validation",), vae=album)
    assert [column["mask IoU in correct boxes"].value for column in columns.values()] == [1, 1]
