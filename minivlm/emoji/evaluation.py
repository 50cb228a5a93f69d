"""How good is a checkpoint? Metrics on held-out scenes, next to those of a blank image.

A model that answers "2" to every question is right sometimes. So the same questions are asked a second time about a
gray square, which shows what the model guesses from the question alone. Splits as in scenes.py: ``validation`` (new
scenes), ``pairs`` (objects that never appear together in training), ``development`` (drawn by an artist that training
never shows, by which the recipe was chosen), ``artist`` (by another, which no choice was made by).

Answers and boxes are scored as anywhere here (training/metrics.py). Masks are scored where their box is correct, in the
image at its own size, by intersection over union (IoU) with the object's visible pixels.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from minivlm import emoji, locations
from minivlm.emoji import Example, Scene, SceneObject
from minivlm.hub import write_atomically
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.training.metrics import (
    Metric,
    accuracy,
    answer_prompts,
    box_iou,
    detection_metrics,
    jackknife,
    markdown,
)
from minivlm.vqvae import MaskVQVAE

GRAY = 128  # of the blank image
IOU_THRESHOLD = 0.5  # from here on a box is correct
MAX_ANSWER_TOKENS = 112  # of a correct answer: four objects with masks have 4 · (4 + 16) tokens, and their names
SPLITS = ("validation", "pairs", "development", "artist")
QUESTIONS = ("what", "how many", "is there", "where", "relation")


# --- answers --------------------------------------------------------------------------------------------------------


def evaluation_prompts(scene: Scene) -> list[Example]:
    """The captions and questions of a scene, then the boxes of all objects at once, then their masks."""
    others = [example for example in scene.examples if example.kind not in ("detect", "segment")]
    return [*others, query_all_objects(scene, "detect"), query_all_objects(scene, "segment")]


def query_all_objects(scene: Scene, task: str) -> Example:
    """``detect`` or ``segment`` with all classes of a scene at once. The answer of both has boxes only."""
    classes = list(dict.fromkeys(o.name for o in scene.objects))
    target = emoji.detect_target(scene.objects, classes, scene.size)
    return Example(task, f"{task} {locations.SEPARATOR.join(classes)}", (target,))


def answer_all(
    model: PaliGemma,
    processor: Processor,
    queries: list[tuple[Scene, Example]],
    max_new_tokens: int = MAX_ANSWER_TOKENS,
) -> list[tuple[str, list[tuple[str, float]]]]:
    """Greedy answers, each with its ``scored_items``. A batch has prompts of one kind, whose answers end together."""
    images, prompts = [scene.image for scene, _ in queries], [example.prompt for _, example in queries]
    order = [(example.kind, len(example.answers[0])) for _, example in queries]
    return answer_prompts(model, processor, images, prompts, order, max_new_tokens)


# --- metrics --------------------------------------------------------------------------------------------------------


def is_correct(example: Example, answer: str) -> bool:
    """Whether an answer is one of those accepted. ``caption en`` can name the objects in any order."""
    return answer in example.answers or (example.kind == "caption" and emoji.same_caption(answer, example.answers[0]))


def match_detections(objects: Sequence[SceneObject], detections: Sequence[locations.Detection]) -> list[int | None]:
    """For each object, the index of the detection with its name and a box of IoU 0.5 or more, or None.

    Greedy: the pair with the highest IoU first. A detection matches one object at most.
    """
    pairs = [
        (box_iou(o.box, d.box), i, j)
        for i, o in enumerate(objects)
        for j, d in enumerate(detections)
        if d.label == o.name
    ]
    matches: list[int | None] = [None] * len(objects)
    for iou, i, j in sorted(pairs, reverse=True):
        if iou >= IOU_THRESHOLD and matches[i] is None and j not in matches:
            matches[i] = j
    return matches


def mask_ious(scene: Scene, answer: str, vae: MaskVQVAE) -> list[float | None]:
    """For each object of a scene, the IoU of its mask with the predicted one.

    0 if the answer has its box but no mask that can be read; None if the box is missing.
    """
    detections = locations.parse_detections(answer, scene.size, scene.size).detections
    masks = vae.masks_from_detections(detections, scene.size, scene.size)
    ious: list[float | None] = []
    for o, match in zip(scene.objects, match_detections(scene.objects, detections), strict=True):
        mask = None if match is None else masks[match]
        if mask is None:
            ious.append(None if match is None else 0.0)
        else:
            ious.append(float((mask & o.mask).sum() / (mask | o.mask).sum()))
    return ious


def segmentation_metrics(ious: list[list[float | None]]) -> dict[str, Metric]:
    """From the ``mask_ious`` of each scene: the fraction of objects with one, and their mean.

    The mean is 0 if no object was found. Both are NaN if there are no objects.
    """
    found = [iou is not None for row in ious for iou in row]
    names = ("segment: objects found", "mask IoU in correct boxes")
    if not found:
        return dict.fromkeys(names, Metric(math.nan, math.nan, 0))

    def mean(scenes: np.ndarray) -> list[float]:
        measured = [iou for i in scenes for iou in ious[i] if iou is not None]
        return [sum(measured) / len(measured) if measured else 0.0]

    (value,), (margin,) = jackknife(len(ious), mean)
    return dict(zip(names, (accuracy(found), Metric(float(value), float(margin), sum(found))), strict=True))


def compute_metrics(queries: list[tuple[Scene, Example]], answers: list, vae: MaskVQVAE) -> dict[str, Metric]:
    """All metrics of one split, in the order of the table.

    Args:
        answers: As from ``answer_all``.
        vae: Decodes the masks.
    """
    correct, truth, predicted, ious = defaultdict(list), [], [], []
    for (scene, example), (text, items) in zip(queries, answers, strict=True):
        if example.kind == "detect":
            truth.append([locations.Detection(o.name, o.box) for o in scene.objects])
            parsed = [(locations.parse_detections(item, scene.size, scene.size), score) for item, score in items]
            predicted.append([(d, score) for detections, score in parsed for d in detections.detections])
        elif example.kind == "segment":
            ious.append(mask_ious(scene, text, vae))
        else:
            correct[example.kind].append(is_correct(example, text))
    table = {"caption": accuracy(correct["caption"])}
    table["questions, all"] = accuracy([c for kind in QUESTIONS for c in correct[kind]])
    table |= {f"– {kind}": accuracy(correct[kind]) for kind in QUESTIONS if correct[kind]}
    table |= detection_metrics(truth, predicted) | segmentation_metrics(ious)
    more = {"cap": "caption by order (cap en)", "describe": "caption by relation (describe en)"}
    return table | {title: accuracy(correct[kind]) for kind, title in more.items() if correct[kind]}


def evaluate(
    model: PaliGemma,
    processor: Processor,
    split: str,
    count: int,
    blank: bool = False,
    vae: MaskVQVAE | None = None,
    world: emoji.World = emoji.WORLD,
) -> dict[str, Metric]:
    """The metrics of a split.

    Args:
        count: Of scenes, those of seeds 0, 1, …
        blank: Ask about a gray square instead of each image.
        vae: Decodes the masks; the embedded one if omitted.
        world: What the scenes can show.

    Raises:
        ValueError: If ``count`` is below 1 or ``split`` is not in ``emoji.SPLITS``.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}.")
    scenes = [emoji.make_scene(seed, split, processor.image_size, world) for seed in range(count)]
    queries = [(scene, example) for scene in scenes for example in evaluation_prompts(scene)]
    shown = queries
    if blank:
        shown = [(replace(scene, image=np.full_like(scene.image, GRAY)), example) for scene, example in queries]
    return compute_metrics(queries, answer_all(model, processor, shown), vae or MaskVQVAE.from_pretrained())


# --- a report -------------------------------------------------------------------------------------------------------


def run(
    model: PaliGemma,
    processor: Processor,
    count: int = 1000,
    splits: tuple[str, ...] = SPLITS,
    json_path: Path | None = None,
    vae: MaskVQVAE | None = None,
    world: emoji.World = emoji.WORLD,
) -> dict[str, dict[str, Metric]]:
    """``python -m minivlm evaluate``: print the table, with a last column for the blank image, and write it as JSON.

    Args:
        count: Of scenes per split.
        vae: The one whose codes the model writes; the embedded one if omitted.
    """
    options = {"vae": vae, "world": world}
    columns = {split: evaluate(model, processor, split, count, **options) for split in splits}
    columns[f"{splits[0]}, blank image"] = evaluate(model, processor, splits[0], count, blank=True, **options)
    if json_path is not None:  # before printing, which can fail
        content = {name: {row: vars(metric) for row, metric in column.items()} for name, column in columns.items()}
        with write_atomically(json_path) as part:
            part.write_text(json.dumps({"scenes": count, "splits": content}, indent=2) + "\n", encoding="utf-8")
    print(markdown(columns))
    print(f"\n{count} scenes per split; ± is half of a 95% interval.")
    return columns
