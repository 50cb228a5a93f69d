"""Evaluation: the metrics are right for answers made by hand, and a whole evaluation runs on random weights."""

import inspect
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from minivlm import emoji
from minivlm.emoji import Scene, SceneObject, evaluation, recipe
from minivlm.emoji.evaluation import compute_metrics, evaluation_prompts
from minivlm.hub import EMBEDDED
from minivlm.locations import Detection, format_detections
from minivlm.processor import Processor
from minivlm.training import metrics
from minivlm.training.metrics import Metric, accuracy, average_precision
from minivlm.vqvae import MaskVQVAE

SCENES = [emoji.make_scene(seed, "validation") for seed in range(30)]
QUERIES = [(scene, example) for scene in SCENES for example in evaluation_prompts(scene)]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def model(processor):
    """Random weights."""
    config = recipe.TrainConfig(width=32, mlp_width=32, tower_layers=1, decoder_layers=1, heads=2)
    return recipe.make_model(config, processor)


def items(text: str, score: float = 0.9) -> list[tuple[str, float]]:
    return [(item, score) for item in text.split(" ; ")] if "<loc" in text else []


class Album(MaskVQVAE):
    """Its codes are page numbers, so nothing is lost and masks can be chosen by hand."""

    def __init__(self):
        super().__init__()
        self.pages: list[np.ndarray] = []

    def codes_from_masks(self, masks, boxes):
        self.pages += masks
        numbers = range(len(self.pages) - len(masks), len(self.pages))
        return [(number // 128, number % 128, *[0] * 14) for number in numbers]

    def masks_from_detections(self, detections, width, height):
        return [self.pages[128 * d.codes[0] + d.codes[1]] if d.codes else None for d in detections]


def correct_answer(scene: Scene, example: emoji.Example, vae: MaskVQVAE) -> str:
    if example.kind != "segment":
        return example.answers[0]
    classes = example.prompt.removeprefix("segment ").split(" ; ")
    return emoji.segment_target(scene.objects, classes, scene.size, vae.codes_from_masks)


def test_correct_answers_score_100_and_empty_ones_0():
    album = Album()
    perfect = compute_metrics(QUERIES, [(correct_answer(s, e, album), items(e.answers[0])) for s, e in QUERIES], album)
    assert all(metric.value == 1 for metric in perfect.values()), perfect
    empty = compute_metrics(QUERIES, [("", []) for _ in QUERIES], album)
    assert all(metric.value == 0 for metric in empty.values()), empty


def test_captions_are_correct_in_any_order_and_order_captions_are_not():
    scene = next(s for s in SCENES if len({o.name for o in s.objects}) >= 2 and "cap" in s.captions)
    names = [o.name for o in sorted(scene.objects, key=lambda o: -o.center[0])]
    caption = next(e for e in scene.examples if e.kind == "caption")
    assert evaluation.is_correct(caption, emoji.count_caption(names))
    assert not evaluation.is_correct(caption, emoji.count_caption(names[:-1]))
    order = next(e for e in scene.examples if e.kind == "cap")
    backwards = emoji.join_phrases([emoji.with_article(name) for name in names])
    assert not evaluation.is_correct(order, f"from left to right: {backwards}")


def test_every_object_is_queried_once():
    for scene in SCENES:
        *others, detect, segment = evaluation_prompts(scene)
        assert not {example.kind for example in others} & {"detect", "segment"}
        assert detect.prompt.split(" ", 1)[1] == segment.prompt.removeprefix("segment ")
        for example in (detect, segment):
            assert example.answers[0].count("<loc") == 4 * len(scene.objects)


def test_the_longest_correct_answer_fits(processor):
    limit = inspect.signature(evaluation.answer_all).parameters["max_new_tokens"].default
    crowded = [s for s in (emoji.make_scene(seed, "pairs") for seed in range(200)) if len(s.objects) == 4]
    answers = [correct_answer(scene, evaluation_prompts(scene)[-1], Album()) for scene in crowded]
    lengths = [len(ids) + 1 for ids in processor.encode(answers)]  # and the token that ends it
    assert len(crowded) > 20 and 4 * 20 < max(lengths) <= limit


# --- boxes ----------------------------------------------------------------------------------------------------------


def test_average_precision_of_a_case_by_hand():
    """Cats, by falling score: a hit, a miss, a hit. Precision is 1, 1/2 and 2/3 at recall 1/2, 1/2 and 1.

    Each precision is raised to the highest one at the same or a higher recall, so 1/2 becomes 2/3. COCO reads the curve
    at recall 0, 0.01 … 1: 51 times 1 and 50 times 2/3. No dog is found. The boxes are exact, so all IoU thresholds
    agree.
    """
    truth = [[Detection("cat", (0, 0, 10, 10)), Detection("cat", (20, 20, 30, 30)), Detection("dog", (50, 50, 60, 60))]]
    hit, miss, second = (0, 0, 10, 10), (40, 0, 50, 10), (20, 20, 30, 30)
    predicted = [[(Detection("cat", hit), 0.9), (Detection("cat", miss), 0.8), (Detection("cat", second), 0.7)]]
    cat = (51 * 1 + 50 * 2 / 3) / 101
    assert average_precision(truth, predicted) == pytest.approx(((cat + 0) / 2, (cat + 0) / 2))
    assert cat / 2 == pytest.approx(0.4175, abs=1e-4)


def test_average_precision_over_two_images_by_hand():
    """The box of highest score fits loosely (IoU 80/120 = 2/3), the next exactly, and a third repeats the second.

    By score, over both images: hit, hit, repeat up to IoU 0.65, at four of ten thresholds, so AP is 1. At the other
    six: miss, hit, miss, so precision is 1/2 up to recall 1/2, read at 51 of 101 points: 25.5/101. Then their mean.
    """
    box = (0, 0, 10, 10)
    truth = [[Detection("cat", box)], [Detection("cat", box)]]
    loose = Detection("cat", (0, 2, 10, 12))
    predicted = [[(loose, 0.9)], [(Detection("cat", box), 0.8), (Detection("cat", (0, 0, 10, 9)), 0.7)]]
    assert average_precision(truth, predicted) == pytest.approx((1, (4 * 1 + 6 * 25.5 / 101) / 10))


def test_average_precision_falls_with_the_overlap():
    """A box shifted by a quarter of its side has IoU 0.6: a hit at 0.5, 0.55 and 0.6 of the ten thresholds."""
    truth, predicted = Detection("cat", (0, 0, 40, 40)), Detection("cat", (10, 0, 50, 40))
    at_half, mean = average_precision([[truth]], [[(predicted, 1.0)]])
    assert at_half == pytest.approx(1) and mean == pytest.approx(0.3)
    assert average_precision([[Detection("cat", (0, 0, 9, 9))]], [[]]) == (0, 0)
    assert all(map(math.isnan, average_precision([[]], [[]])))


# --- masks ----------------------------------------------------------------------------------------------------------


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((100, 100), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def scene_of(*named: tuple[str, tuple[int, int, int, int]]) -> Scene:
    objects = tuple(SceneObject(name, "me", box, rectangle(*box)) for name, box in named)
    return Scene(0, "validation", 100, np.zeros((100, 100, 3), np.uint8), objects)


def answer(album: Album, *detected: tuple) -> str:
    """An answer about 100 × 100 pixels from (name, box, mask or None) of each detection."""
    codes = [album.codes_from_masks([mask], [box])[0] if mask is not None else () for _, box, mask in detected]
    detections = [Detection(name, box, code) for (name, box, _), code in zip(detected, codes, strict=True)]
    return format_detections(detections, 100, 100)


def test_overlap_of_boxes():
    assert evaluation.box_iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert evaluation.box_iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert evaluation.box_iou((0, 0, 10, 10), (2, 3, 4, 5)) == pytest.approx(4 / 100)
    assert (
        evaluation.box_iou((0, 0, 10, 10), (10, 0, 20, 10)) == evaluation.box_iou((0, 0, 9, 9), (20, 20, 30, 30)) == 0
    )
    assert evaluation.box_iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0


def test_masks_are_scored_in_correct_boxes_only():
    """One mask covers half of its object, one all of it, one is missing, one has a wrong box, one a wrong name."""
    album = Album()
    left, right, low = (0, 0, 20, 20), (40, 0, 80, 20), (0, 50, 30, 90)
    scene = scene_of(("cat", left), ("cat", right), ("dog", low), ("owl", (60, 60, 80, 80)), ("fox", (80, 80, 99, 99)))
    text = answer(
        album,
        ("cat", right, rectangle(*right)),
        ("cat", left, rectangle(0, 0, 20, 10)),
        ("dog", low, None),
        ("owl", (60, 72, 80, 92), rectangle(60, 60, 80, 80)),  # IoU 8/32
        ("ant", (80, 80, 99, 99), rectangle(80, 80, 99, 99)),
    )
    ious = evaluation.mask_ious(scene, text, album)
    assert ious == [0.5, 1, 0, None, None]
    found, mask_iou = evaluation.segmentation_metrics([ious]).values()
    assert (found.value, found.count) == (0.6, 5) and (mask_iou.value, mask_iou.count) == (0.5, 3)


def test_a_mask_is_compared_with_the_visible_pixels():
    """What covers an object is not part of it, and predicted pixels outside of the box lower the IoU."""
    album = Album()
    box = (10, 10, 30, 30)
    visible = rectangle(*box) & ~rectangle(10, 10, 20, 20)  # 300 pixels
    scene = scene_of(("cat", box))
    scene = replace(scene, objects=(replace(scene.objects[0], mask=visible),))
    predicted = rectangle(10, 10, 30, 40)  # 600, all of those among them
    assert evaluation.mask_ious(scene, answer(album, ("cat", box, predicted)), album) == [0.5]


def test_best_boxes_are_matched_first_and_each_once():
    objects = scene_of(("cat", (0, 0, 20, 20)), ("cat", (4, 0, 24, 20))).objects
    exact, between, far = (Detection("cat", (x, 0, x + 20, 20)) for x in (4, 2, 60))
    assert evaluation.match_detections(objects, [between, exact]) == [0, 1]
    assert evaluation.match_detections(objects, [exact, between]) == [1, 0]
    assert evaluation.match_detections(objects, [exact]) == [None, 0]
    assert evaluation.match_detections(objects, [between, exact, far, exact]).count(None) == 0
    assert (
        evaluation.match_detections(objects, [far]) == [None, None]
        and evaluation.match_detections(objects, []) == [None] * 2
    )
    half = Detection("cat", (0, 0, 20, 10))
    assert evaluation.match_detections(objects[:1], [half]) == [0]  # 0.5 is enough
    assert evaluation.match_detections(objects[:1], [Detection("cat", (0, 0, 20, 9.9))]) == [None]


@pytest.mark.parametrize(
    "broken", ["", "cat", "<loc0000>", "<seg001>" * 16, " ; ; <", "<loc0000>" * 4 + "<seg001>" * 9]
)
def test_answers_without_masks_have_no_iou_and_no_error(broken):
    scene = scene_of(("cat", (0, 0, 20, 20)))
    assert evaluation.mask_ious(scene, broken, Album()) == [None]
    cut = "<loc0000><loc0000><loc0205><loc0205>" + "<seg001>" * 9 + " cat"
    assert evaluation.mask_ious(scene, cut, Album()) == [0]


def test_segmentation_metrics_of_nothing():
    nothing_found = evaluation.segmentation_metrics([[None], [None, None]])
    assert [(m.value, m.count) for m in nothing_found.values()] == [(0, 3), (0, 0)]
    for no_objects in ([], [[], []]):
        assert all(math.isnan(m.value) and m.count == 0 for m in evaluation.segmentation_metrics(no_objects).values())


def test_the_embedded_vae_decodes_masks_well_in_correct_boxes():
    vae = MaskVQVAE.from_pretrained()
    segments = [(scene, e) for scene, e in QUERIES if e.kind == "segment"]
    ious = [evaluation.mask_ious(scene, correct_answer(scene, e, vae), vae) for scene, e in segments]
    found, mask_iou = evaluation.segmentation_metrics(ious).values()
    assert found.value == 1 and mask_iou.value >= 0.88 and 0 < mask_iou.margin < 0.03


# --- intervals and reports ------------------------------------------------------------------------------------------


def test_intervals():
    assert accuracy([True] * 50 + [False] * 50).margin == pytest.approx(0.0962, abs=0.001)  # Wilson, n = 100
    assert accuracy([True] * 100).margin == pytest.approx(0.037, abs=0.001)  # not zero at 100%
    truth = [[Detection("cat", (0, 0, 10, 10))] for _ in range(40)]
    some = [[(truth[0][0], 0.9)] if i % 4 else [] for i in range(40)]
    metric = evaluation.detection_metrics(truth, some)["detection AP at IoU 0.5"]
    assert 0.05 < metric.margin < 0.25 and metric.count == 40


def test_the_jackknife_gives_the_interval_of_a_mean():
    """With one scene per block it is the textbook's 1.96 s / √n."""
    values = np.random.default_rng(0).random(20)
    whole, margin = evaluation.jackknife(20, lambda scenes: [values[scenes].mean(), 1.0])
    assert whole == pytest.approx([values.mean(), 1])
    assert margin == pytest.approx([1.96 * values.std(ddof=1) / 20**0.5, 0])
    assert np.isnan(evaluation.jackknife(1, lambda scenes: [0.5])[1]).all()


def test_scores_belong_to_their_boxes(processor):
    text = "<loc0001><loc0002><loc0003><loc0004> cat ; <loc0005><loc0006><loc0007><loc0008> dog"
    ids = processor.encode([text])[0]
    probabilities = [0.1 * (i < 4) + 0.5 * (6 <= i) for i in range(len(ids))]
    (cat, low), (dog, high) = metrics.scored_items(processor, ids, probabilities)
    assert cat.startswith("<loc0001>") and "cat" in cat and dog.endswith("dog")
    assert low == pytest.approx(0.1) and high == pytest.approx(0.5)
    assert metrics.scored_items(processor, [], []) == []


def test_a_report_of_random_weights(model, processor, tmp_path, capsys):
    columns = evaluation.run(model, processor, 3, ("validation", "artist"), tmp_path / "metrics.json")
    assert list(columns) == ["validation", "artist", "validation, blank image"]
    assert "| caption |" in capsys.readouterr().out
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["scenes"] == 3
    order = ["detection AP, IoU 0.5 to 0.95", "segment: objects found", "mask IoU in correct boxes"]
    assert [row for row in columns["artist"] if row in order] == order
    assert Metric(**written["splits"]["artist"]["caption"]) == columns["artist"]["caption"]
    with pytest.raises(ValueError, match="at least 1"):
        evaluation.evaluate(model, processor, "validation", 0)


def test_the_json_is_written_whole_even_if_the_table_cannot_be_printed(model, processor, tmp_path, monkeypatch):
    def fail(columns):
        raise UnicodeEncodeError("ascii", "±", 0, 1, "not in range")

    monkeypatch.setattr(evaluation, "markdown", fail)
    with pytest.raises(UnicodeEncodeError):
        evaluation.run(model, processor, 1, ("validation",), tmp_path / "metrics.json")
    assert list(json.loads((tmp_path / "metrics.json").read_text())["splits"]) == [
        "validation",
        "validation, blank image",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_the_given_vae_decodes_the_masks(model, processor, monkeypatch):
    """All answers are correct, in the codes of another VAE."""
    album, scene = Album(), emoji.make_scene(5, "validation")
    texts = [(correct_answer(scene, e, album), items(e.answers[0])) for e in evaluation_prompts(scene)]
    monkeypatch.setattr(evaluation, "answer_all", lambda model, processor, queries: texts)
    monkeypatch.setattr(emoji, "make_scene", lambda *_: scene)
    columns = evaluation.run(model, processor, 1, ("validation",), vae=album)
    assert [column["mask IoU in correct boxes"].value for column in columns.values()] == [1, 1]
