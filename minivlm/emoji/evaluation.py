"""How good is a checkpoint? Every figure counted on scenes that training never showed, beside a blank picture's.

A model that answers "2" to every question is right sometimes: so the same questions are put a second time with a gray
square for a picture, and what the model knows from the question alone is subtracted by eye. Splits as in scenes.py:
``validation`` (new scenes), ``pairs`` (objects never seen together), ``artist`` (drawings by an unseen hand).

Average precision is computed by pycocotools (the COCO evaluation, https://cocodataset.org/#detection-eval); a box
counts with the mean probability of its four tokens. Masks are judged in the picture, at its own size, where their box
is right: by the area of the overlap over that of the union (IoU) with the object's visible pixels.
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
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.vqvae import MaskVQVAE

ROWS = 128  # prompts a batch
GRAY = 128  # of the blank picture
BLOCKS = 20  # of scenes, for the interval of what is no share of answers
CORRECT = 0.5  # IoU from which a box is right
MAX_ANSWER_TOKENS = 112  # tokens of a right answer, at most: four objects with masks have 4 · (4 + 16), and their names
QUESTIONS = ("what", "how many", "is there", "where", "relation")


@dataclass(frozen=True)
class Metric:
    """A number in [0, 1] with the half-width of its 95% interval, and how many it was counted on."""

    value: float
    margin: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.margin:.1f}"


# --- asking ---------------------------------------------------------------------------------------------------------


def evaluation_prompts(scene: Scene) -> list[Example]:
    """What a scene is asked: its captions and questions, then all its classes at once, their boxes and their masks."""
    asked = [example for example in scene.examples if example.kind not in ("detect", "segment")]
    return [*asked, query_all_objects(scene, "detect"), query_all_objects(scene, "segment")]


def query_all_objects(scene: Scene, task: str) -> Example:
    """``detect`` or ``segment`` with all classes of a scene at once; the answer that it holds has the boxes alone."""
    classes = list(dict.fromkeys(thing.name for thing in scene.objects))
    target = emoji.detect_target(scene.objects, classes, scene.size)
    return Example(task, f"{task} {locations.SEPARATOR.join(classes)}", (target,))


def answer_all(
    model: PaliGemma, processor: Processor, asked: list[tuple[Scene, Example]], max_new_tokens: int = MAX_ANSWER_TOKENS
) -> list[tuple[str, list[tuple[str, float]]]]:
    """Greedy answers, each with its boxes' items and scores. Prompts of a kind go together: they end together."""
    answers: list = [None] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: (asked[i][1].kind, len(asked[i][1].answers[0]), i))
    for start in tqdm(range(0, len(order), ROWS), unit="batch", desc="answering", leave=False):
        rows = order[start : start + ROWS]
        batch = processor(
            text=[asked[i][1].prompt for i in rows], images=[asked[i][0].image for i in rows], padding_side="left"
        )
        generated = generate_ids(model, batch, max_new_tokens=max_new_tokens)
        scores = generated.log_probs.exp().tolist()
        for i, ids, probabilities in zip(rows, generated.sequences.tolist(), scores, strict=True):
            answers[i] = processor.decode(ids), scored_items(processor, ids, probabilities)
    return answers


def scored_items(processor: Processor, ids: list[int], probabilities: list[float]) -> list[tuple[str, float]]:
    """An answer cut at each box: (its text from there on, mean probability of its four places)."""
    is_place = [bool(re.fullmatch(r"<loc\d{4}>", processor.tokenizer.id_to_token(i) or "")) for i in ids]
    starts = [i for i in range(len(ids)) if is_place[i] and not (i and is_place[i - 1])]
    return [
        (processor.decode(ids[start:end]), float(np.mean(probabilities[start : start + 4])))
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=False)
    ]


# --- counting -------------------------------------------------------------------------------------------------------


def is_correct(example: Example, answer: str) -> bool:
    """Exactly one of the accepted answers; ``caption en`` may name its objects in any order."""
    return answer in example.answers or (example.kind == "caption" and emoji.same_caption(answer, example.answers[0]))


def accuracy(right: list[bool]) -> Metric:
    """The share that is true, with Wilson's 95% interval made symmetric about it (the wider side)."""
    n, z = len(right), 1.96
    p = sum(right) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Metric(p, max(middle + half - p, p - middle + half), n)


def average_precision(
    truth: list[list[locations.Detection]], found: list[list[tuple[locations.Detection, float]]]
) -> tuple[float, float]:
    """(AP at IoU 0.5, mean AP over IoU 0.5 to 0.95), each the mean over classes; item ``i`` of both is picture ``i``.

    NaN where there is nothing to find.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = sorted({d.label for row in truth for d in row})
    number = {name: i for i, name in enumerate(names, start=1)}
    if not names:
        return math.nan, math.nan

    def entry(picture: int, detection: locations.Detection) -> dict:
        x0, y0, x1, y1 = map(float, detection.box)
        box = [x0, y0, x1 - x0, y1 - y0]
        return {"image_id": picture, "category_id": number[detection.label], "bbox": box, "area": box[2] * box[3]}

    boxes = [entry(i, d) | {"iscrowd": 0} for i, row in enumerate(truth, start=1) for d in row]
    guesses = [entry(i, d) | {"score": s} for i, row in enumerate(found, start=1) for d, s in row if d.label in number]
    if not guesses:
        return 0.0, 0.0
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i} for i in range(1, len(truth) + 1)],
        "categories": [{"id": i, "name": name} for name, i in number.items()],
        "annotations": [box | {"id": i} for i, box in enumerate(boxes, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its steps
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(guesses), "bbox")
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class], all areas, 100 boxes a picture
    precision = np.where(precision < 0, np.nan, precision)
    return float(np.nanmean(precision[0])), float(np.nanmean(precision))


def jackknife(count: int, figures_of: Callable[[np.ndarray], Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """What ``figures_of`` gives for the numbers of all scenes, and the half-widths of the 95% intervals.

    The latter from leaving out one block of scenes at a time; NaN where there is but one scene.
    """
    whole = np.array(figures_of(np.arange(count)))
    blocks = min(BLOCKS, count)
    if blocks < 2:
        return whole, np.full_like(whole, math.nan)
    block = np.arange(count) * blocks // count
    parts = np.array([figures_of(np.flatnonzero(block != b)) for b in range(blocks)])
    return whole, 1.96 * np.sqrt((blocks - 1) / blocks * ((parts - parts.mean(0)) ** 2).sum(0))


def detection_figures(truth: list, found: list) -> dict[str, Metric]:
    """Both average precisions."""
    whole, margin = jackknife(
        len(truth), lambda kept: average_precision([truth[i] for i in kept], [found[i] for i in kept])
    )
    count = sum(map(len, truth))
    names = ("detection AP at IoU 0.5", "detection AP, IoU 0.5 to 0.95")
    return {name: Metric(float(v), float(m), count) for name, v, m in zip(names, whole, margin, strict=True)}


def box_iou(a: locations.Box, b: locations.Box) -> float:
    """Area of the overlap over area of the union; 0 for two boxes without area."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    overlap = max(0, width) * max(0, height)
    union = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)) - overlap
    return overlap / union if union else 0.0


def match_detections(things: Sequence[SceneObject], found: Sequence[locations.Detection]) -> list[int | None]:
    """For each thing, the number of the detection that is right about it: its name, and its box by IoU 0.5 or more.

    The best pairs come first; a detection is right about one thing only.
    """
    pairs = [
        (box_iou(o.box, d.box), i, j) for i, o in enumerate(things) for j, d in enumerate(found) if d.label == o.name
    ]
    partners: list[int | None] = [None] * len(things)
    for overlap, i, j in sorted(pairs, reverse=True):
        if overlap >= CORRECT and partners[i] is None and j not in partners:
            partners[i] = j
    return partners


def mask_ious(scene: Scene, answer: str, vae: MaskVQVAE) -> list[float | None]:
    """For each thing of a scene, the IoU of its mask with the one that the answer gives it.

    0 where the answer has its box but no mask that can be read; None where it lacks the box.
    """
    found = locations.parse_detections(answer, scene.size, scene.size).detections
    masks = vae.masks_from_detections(found, scene.size, scene.size)
    overlaps: list[float | None] = []
    for thing, partner in zip(scene.objects, match_detections(scene.objects, found), strict=True):
        mask = None if partner is None else masks[partner]
        if mask is None:
            overlaps.append(None if partner is None else 0.0)
        else:
            overlaps.append(float((mask & thing.mask).sum() / (mask | thing.mask).sum()))
    return overlaps


def segmentation_figures(overlaps: list[list[float | None]]) -> dict[str, Metric]:
    """From the ``mask_ious`` of each scene: the mean of those there are, and for how many things there is one.

    The mean is 0 where nothing was found, and both are NaN where there is nothing to find.
    """
    things = [overlap is not None for row in overlaps for overlap in row]
    names = ("segment: objects found", "mask IoU in correct boxes")
    if not things:
        return dict.fromkeys(names, Metric(math.nan, math.nan, 0))

    def mean(kept: np.ndarray) -> list[float]:
        measured = [overlap for i in kept for overlap in overlaps[i] if overlap is not None]
        return [sum(measured) / len(measured) if measured else 0.0]

    (value,), (margin,) = jackknife(len(overlaps), mean)
    figures = accuracy(things), Metric(float(value), float(margin), sum(things))
    return dict(zip(names, figures, strict=True))


def figures(asked: list[tuple[Scene, Example]], answers: list, vae: MaskVQVAE) -> dict[str, Metric]:
    """All figures of one split, in the order of the table. ``vae`` reads the masks."""
    right, truth, found, overlaps = defaultdict(list), [], [], []
    for (scene, example), (text, items) in zip(asked, answers, strict=True):
        if example.kind == "detect":
            truth.append([locations.Detection(thing.name, thing.box) for thing in scene.objects])
            read = [
                (d, s) for item, s in items for d in locations.parse_detections(item, scene.size, scene.size).detections
            ]
            found.append(read)
        elif example.kind == "segment":
            overlaps.append(mask_ious(scene, text, vae))
        else:
            right[example.kind].append(is_correct(example, text))
    table = {"caption": accuracy(right["caption"])}
    table["questions, all"] = accuracy([r for kind in QUESTIONS for r in right[kind]])
    table |= {f"– {kind}": accuracy(right[kind]) for kind in QUESTIONS if right[kind]}
    table |= detection_figures(truth, found) | segmentation_figures(overlaps)
    more = {"cap": "caption by order (cap en)", "describe": "caption by relation (describe en)"}
    return table | {title: accuracy(right[kind]) for kind, title in more.items() if right[kind]}


def evaluate(
    model: PaliGemma,
    processor: Processor,
    split: str,
    count: int,
    blank: bool = False,
    vae: MaskVQVAE | None = None,
) -> dict[str, Metric]:
    """Figures of ``count`` scenes of a split (seeds 0 …), or of the same questions about a gray square.

    Masks are read by ``vae``, or by the embedded one.

    Raises:
        ValueError: ``count`` is below 1 or ``split`` is none of ``emoji.SPLITS``.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}.")
    drawn = [emoji.make_scene(seed, split, processor.image_size) for seed in range(count)]
    asked = [(scene, example) for scene in drawn for example in evaluation_prompts(scene)]
    shown = asked
    if blank:
        shown = [(replace(scene, image=np.full_like(scene.image, GRAY)), example) for scene, example in asked]
    return figures(asked, answer_all(model, processor, shown), vae or MaskVQVAE.from_pretrained())


# --- a report -------------------------------------------------------------------------------------------------------


def markdown(columns: dict[str, dict[str, Metric]]) -> str:
    """A table: a row a figure, a column a split, in percent."""
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = ["| % | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in rows:
        lines.append(f"| {name} | " + " | ".join(str(column.get(name, "")) for column in columns.values()) + " |")
    return "\n".join(lines)


def run(
    model: PaliGemma,
    processor: Processor,
    count: int = 1000,
    splits: tuple[str, ...] = ("validation", "pairs", "artist"),
    json_path: Path | None = None,
    vae: MaskVQVAE | None = None,
) -> dict[str, dict[str, Metric]]:
    """``python -m minivlm evaluate``: prints the table, with a last column for the blank picture; writes it as JSON.

    ``vae`` is the one that the model learned to write the codes of; the embedded one when not given.
    """
    columns = {split: evaluate(model, processor, split, count, vae=vae) for split in splits}
    columns[f"{splits[0]}, blank picture"] = evaluate(model, processor, splits[0], count, blank=True, vae=vae)
    print(markdown(columns))
    print(f"\n{count} scenes a split; ± is half of a 95% interval.")
    if json_path is not None:
        content = {name: {row: vars(figure) for row, figure in column.items()} for name, column in columns.items()}
        json_path.write_text(json.dumps({"scenes": count, "splits": content}, indent=2) + "\n")
    return columns
