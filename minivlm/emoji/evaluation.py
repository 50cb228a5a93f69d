"""How good is a checkpoint? Metrics on held-out scenes, next to those of a blank image.

A model that answers "2" to every question is right sometimes. So the same questions are asked a second time about a
gray square, which shows what the model guesses from the question alone. Splits as in scenes.py: ``validation`` (new
scenes), ``pairs`` (objects that never appear together in training), ``development`` (drawn by an artist that training
never shows, by which the recipe was chosen), ``artist`` (by another, which no choice was made by).

Average precision is computed by pycocotools (the COCO evaluation, https://cocodataset.org/#detection-eval). The score
of a box is the mean probability of its four location tokens. Masks are scored where their box is correct, in the image
at its own size, by intersection over union (IoU) with the object's visible pixels.
"""

import contextlib
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minivlm import emoji, locations
from minivlm.emoji import Example, Scene, SceneObject
from minivlm.generation import generate_ids
from minivlm.hub import write_atomically
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.vqvae import MaskVQVAE

BATCH_SIZE = 128  # prompts
GRAY = 128  # of the blank image
BLOCKS = 20  # of scenes, for the jackknife
IOU_THRESHOLD = 0.5  # from here on a box is correct
MAX_ANSWER_TOKENS = 112  # of a correct answer: four objects with masks have 4 · (4 + 16) tokens, and their names
SPLITS = ("validation", "pairs", "development", "artist")
QUESTIONS = ("what", "how many", "is there", "where", "relation")


@dataclass(frozen=True)
class Metric:
    """A value in [0, 1], half the width of its 95% interval, and how many items it was measured on."""

    value: float
    margin: float
    count: int

    def __str__(self) -> str:
        if self.margin >= 0.5:
            return "–"  # too few items: the interval is everything
        return f"{100 * self.value:.1f} ± {100 * self.margin:.1f}"


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
    answers: list = [None] * len(queries)
    order = sorted(range(len(queries)), key=lambda i: (queries[i][1].kind, len(queries[i][1].answers[0]), i))
    for start in tqdm(range(0, len(order), BATCH_SIZE), unit="batch", desc="answering", leave=False):
        rows = order[start : start + BATCH_SIZE]
        prompts, images = [queries[i][1].prompt for i in rows], [queries[i][0].image for i in rows]
        batch = processor(text=prompts, images=images, padding_side="left")
        generated = generate_ids(model, batch, max_new_tokens=max_new_tokens)
        scores = generated.log_probs.exp().tolist()
        for i, ids, probabilities in zip(rows, generated.sequences.tolist(), scores, strict=True):
            answers[i] = processor.decode(ids), scored_items(processor, ids, probabilities)
    return answers


def scored_items(processor: Processor, ids: list[int], probabilities: list[float]) -> list[tuple[str, float]]:
    """An answer, split before each box: (the text of the item, mean probability of its four location tokens)."""
    is_location = [bool(re.fullmatch(r"<loc\d{4}>", processor.tokenizer.id_to_token(i) or "")) for i in ids]
    starts = [i for i in range(len(ids)) if is_location[i] and not (i and is_location[i - 1])]
    return [
        (processor.decode(ids[start:end]), float(np.mean(probabilities[start : start + 4])))
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=False)
    ]


# --- metrics --------------------------------------------------------------------------------------------------------


def is_correct(example: Example, answer: str) -> bool:
    """Whether an answer is one of those accepted. ``caption en`` can name the objects in any order."""
    return answer in example.answers or (example.kind == "caption" and emoji.same_caption(answer, example.answers[0]))


def accuracy(correct: list[bool]) -> Metric:
    """The fraction that is true, with Wilson's 95% interval made symmetric about it (the wider side)."""
    n, z = len(correct), 1.96
    p = sum(correct) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Metric(p, max(middle + half - p, p - middle + half), n)


def average_precision(
    truth: list[list[locations.Detection]], predicted: list[list[tuple[locations.Detection, float]]]
) -> tuple[float, float]:
    """(AP at IoU 0.5, mean AP over IoU 0.5 to 0.95), each the mean over classes. NaN if there are no objects.

    Args:
        truth: The objects of each image.
        predicted: The detections in each image, with their scores.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = sorted({d.label for row in truth for d in row})
    number = {name: i for i, name in enumerate(names, start=1)}
    if not names:
        return math.nan, math.nan

    def entry(image: int, detection: locations.Detection) -> dict:
        x0, y0, x1, y1 = map(float, detection.box)
        box = [x0, y0, x1 - x0, y1 - y0]
        return {"image_id": image, "category_id": number[detection.label], "bbox": box, "area": box[2] * box[3]}

    boxes = [entry(i, d) | {"iscrowd": 0} for i, row in enumerate(truth, start=1) for d in row]
    results = [
        entry(i, d) | {"score": score}
        for i, row in enumerate(predicted, start=1)
        for d, score in row
        if d.label in number
    ]
    if not results:
        return 0.0, 0.0
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i} for i in range(1, len(truth) + 1)],
        "categories": [{"id": i, "name": name} for name, i in number.items()],
        "annotations": [box | {"id": i} for i, box in enumerate(boxes, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its steps
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class], all areas, 100 boxes per image
    precision = np.where(precision < 0, np.nan, precision)
    return float(np.nanmean(precision[0])), float(np.nanmean(precision))


def jackknife(count: int, statistics: Callable[[np.ndarray], Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """The statistics of all scenes, and half the widths of their 95% intervals.

    The intervals come from leaving out one block of scenes at a time. They are NaN if there is only one scene.

    Args:
        count: Of scenes.
        statistics: Computes them from the indices of some scenes.
    """
    whole = np.array(statistics(np.arange(count)))
    blocks = min(BLOCKS, count)
    if blocks < 2:
        return whole, np.full_like(whole, math.nan)
    block = np.arange(count) * blocks // count
    parts = np.array([statistics(np.flatnonzero(block != b)) for b in range(blocks)])
    return whole, 1.96 * np.sqrt((blocks - 1) / blocks * ((parts - parts.mean(0)) ** 2).sum(0))


def detection_metrics(truth: list, predicted: list) -> dict[str, Metric]:
    """Both average precisions; arguments as for ``average_precision``."""
    whole, margin = jackknife(
        len(truth), lambda scenes: average_precision([truth[i] for i in scenes], [predicted[i] for i in scenes])
    )
    count = sum(map(len, truth))
    names = ("detection AP at IoU 0.5", "detection AP, IoU 0.5 to 0.95")
    return {name: Metric(float(v), float(m), count) for name, v, m in zip(names, whole, margin, strict=True)}


def box_iou(a: locations.Box, b: locations.Box) -> float:
    """Area of the intersection over area of the union; 0 for two boxes without area."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    intersection = max(0, width) * max(0, height)
    union = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)) - intersection
    return intersection / union if union else 0.0


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


def markdown(columns: dict[str, dict[str, Metric]]) -> str:
    """A table in percent: one row per metric, one column per split."""
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = ["| % | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in rows:
        lines.append(f"| {name} | " + " | ".join(str(column.get(name, "")) for column in columns.values()) + " |")
    return "\n".join(lines)


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
