"""Evaluation: the counting is right on answers made by hand, and the whole runs on a model of random weights."""

import json
import math

import numpy as np
import pytest

from minivlm import evaluation, scenes, training
from minivlm.evaluation import Figure, average_precision, figures, prompts_of, share_right
from minivlm.locations import Detection

SCENES = [scenes.make_scene(seed, "validation") for seed in range(30)]
ASKED = [(scene, example) for scene in SCENES for example in prompts_of(scene)]


def items(text: str, score: float = 0.9) -> list[tuple[str, float]]:
    return [(item, score) for item in text.split(" ; ")] if "<loc" in text else []


def test_the_truth_scores_100_and_silence_0():
    perfect = figures(ASKED, [(e.answers[0], items(e.answers[0])) for _, e in ASKED])
    assert all(figure.value == 1 for figure in perfect.values()), perfect
    silent = figures(ASKED, [("", []) for _ in ASKED])
    assert all(figure.value == 0 for figure in silent.values()), silent


def test_captions_count_in_any_order_and_order_captions_do_not():
    scene = next(s for s in SCENES if len({thing.name for thing in s.objects}) >= 2 and "cap" in s.captions)
    names = [thing.name for thing in sorted(scene.objects, key=lambda thing: -thing.center[0])]
    caption = next(e for e in scene.examples if e.kind == "caption")
    assert evaluation.is_right(caption, scenes.count_caption(names))
    assert not evaluation.is_right(caption, scenes.count_caption(names[:-1]))
    order = next(e for e in scene.examples if e.kind == "cap")
    backwards = scenes.join_phrases([scenes.with_article(name) for name in names])
    assert not evaluation.is_right(order, f"from left to right: {backwards}")


def test_every_object_is_asked_for_once():
    for scene in SCENES:
        *_, detect = prompts_of(scene)
        assert detect.answers[0].count("<loc") == 4 * len(scene.objects)


def test_average_precision_of_a_case_by_hand():
    """Cats: a sure hit, a miss, a less sure hit: precision 1 up to recall 0.5, then 2/3. Dogs: nothing found."""
    truth = [[Detection("cat", (0, 0, 10, 10)), Detection("cat", (20, 20, 30, 30)), Detection("dog", (50, 50, 60, 60))]]
    hit, miss, second = (0, 0, 10, 10), (40, 0, 50, 10), (20, 20, 30, 30)
    found = [[(Detection("cat", hit), 0.9), (Detection("cat", miss), 0.8), (Detection("cat", second), 0.7)]]
    recalls = np.linspace(0, 1, 101)  # COCO reads precision at 101 recalls
    cat = np.mean(np.where(recalls <= 0.5, 1, 2 / 3))
    at_half, over_all = average_precision(truth, found)
    assert at_half == pytest.approx(cat / 2) and over_all == pytest.approx(cat / 2)


def test_average_precision_falls_with_the_overlap():
    """A box shifted by a quarter of its side overlaps by 0.6: right at IoU 0.5, 0.55 and 0.6 of the ten thresholds."""
    truth, found = Detection("cat", (0, 0, 40, 40)), Detection("cat", (10, 0, 50, 40))
    at_half, over_all = average_precision([[truth]], [[(found, 1.0)]])
    assert at_half == pytest.approx(1) and over_all == pytest.approx(0.3)
    assert average_precision([[Detection("cat", (0, 0, 9, 9))]], [[]]) == (0, 0)
    assert all(map(math.isnan, average_precision([[]], [[]])))


def test_intervals():
    assert share_right([True] * 50 + [False] * 50).margin == pytest.approx(0.0962, abs=0.001)  # Wilson, n = 100
    assert share_right([True] * 100).margin == pytest.approx(0.037, abs=0.001)  # not zero at 100%
    truth = [[Detection("cat", (0, 0, 10, 10))] for _ in range(40)]
    some = [[(truth[0][0], 0.9)] if i % 4 else [] for i in range(40)]
    figure = evaluation.detection_figures(truth, some)["detection AP at IoU 0.5"]
    assert 0.05 < figure.margin < 0.25 and figure.count == 40


def test_scores_belong_to_their_boxes():
    processor = training.new_processor(training.Recipe())
    text = "<loc0001><loc0002><loc0003><loc0004> cat ; <loc0005><loc0006><loc0007><loc0008> dog"
    ids = processor.encode([text])[0]
    probabilities = [0.1 * (i < 4) + 0.5 * (6 <= i) for i in range(len(ids))]
    (cat, low), (dog, high) = evaluation.scored_items(processor, ids, probabilities)
    assert cat.startswith("<loc0001>") and "cat" in cat and dog.endswith("dog")
    assert low == pytest.approx(0.1) and high == pytest.approx(0.5)
    assert evaluation.scored_items(processor, [], []) == []


def test_a_report_of_random_weights(tmp_path, capsys):
    recipe = training.Recipe(width=32, mlp_width=32, tower_layers=1, decoder_layers=1, heads=2)
    processor = training.new_processor(recipe)
    model = training.new_model(recipe, processor)
    columns = evaluation.run(model, processor, 3, ("validation", "artist"), tmp_path / "figures.json")
    assert list(columns) == ["validation", "artist", "validation, blank picture"]
    assert "| caption |" in capsys.readouterr().out
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["scenes"] == 3
    assert Figure(**written["splits"]["artist"]["caption"]) == columns["artist"]["caption"]
    with pytest.raises(ValueError, match="at least 1"):
        evaluation.evaluate(model, processor, "validation", 0)
