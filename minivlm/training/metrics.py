"""How good are answers? Exact matches, and average precision for boxes, each with its 95% interval.

Average precision is computed by pycocotools (the COCO evaluation, https://cocodataset.org/#detection-eval). The score
of a box is the mean probability of its four location tokens.
"""

import contextlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from minivlm import locations
from minivlm.generation import generate_ids
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor

BATCH_SIZE = 128  # prompts
BLOCKS = 20  # of images, for the jackknife


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


def answer_prompts(
    model: PaliGemma,
    processor: Processor,
    images: Sequence[Path | Image.Image | np.ndarray],
    prompts: Sequence[str],
    order: Sequence,
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
) -> list[tuple[str, list[tuple[str, float]]]]:
    """Greedy answers to prompts about images, one image per prompt, each with its ``scored_items``.

    Args:
        images: Paths are opened batch by batch.
        order: Sorts the prompts into batches, best so that answers of a batch end together.
    """
    answers: list = [None] * len(prompts)
    ranks = sorted(range(len(prompts)), key=lambda i: (order[i], i))
    for start in tqdm(range(0, len(ranks), batch_size), unit="batch", desc="answering", leave=False):
        rows = ranks[start : start + batch_size]
        batch = processor(text=[prompts[i] for i in rows], images=[images[i] for i in rows], padding_side="left")
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


def markdown(columns: dict[str, dict[str, Metric]]) -> str:
    """A table in percent: one row per metric, one column per split."""
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = ["| % | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in rows:
        lines.append(f"| {name} | " + " | ".join(str(column.get(name, "")) for column in columns.values()) + " |")
    return "\n".join(lines)
