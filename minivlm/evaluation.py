"""How good is a checkpoint? Every figure counted on scenes that training never showed, beside a blank picture's.

A model that answers "2" to every question is right sometimes: so the same questions are put a second time with a grey
square for a picture, and what the model knows from the question alone is subtracted by eye. Splits as in scenes.py:
``validation`` (new scenes), ``pairs`` (objects never seen together), ``artist`` (drawings by an unseen hand).

Average precision is computed by pycocotools (the COCO evaluation, https://cocodataset.org/#detection-eval); a box
counts with the mean probability of its four tokens.
"""

import contextlib
import io
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minivlm import locations, scenes
from minivlm.generation import generate_ids
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.scenes import Example, Scene

ROWS = 128  # prompts a batch
GREY = 128  # of the blank picture
BLOCKS = 20  # of scenes, for the interval of an average precision
QUESTIONS = ("what", "how many", "is there", "where", "relation")


@dataclass(frozen=True)
class Figure:
    """A share in [0, 1] with the half-width of its 95% interval, and how many answers it was counted on."""

    value: float
    margin: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.margin:.1f}"


# --- asking ---------------------------------------------------------------------------------------------------------


def prompts_of(scene: Scene) -> list[Example]:
    """What a scene is asked: its captions and questions, and one detection of all its classes."""
    asked = [example for example in scene.examples if example.kind != "detect"]
    classes = list(dict.fromkeys(thing.name for thing in scene.objects))
    target = scenes.detect_target(scene.objects, classes, scene.size)
    return [*asked, Example("detect", f"detect {' ; '.join(classes)}", (target,))]


def answer_all(
    model: PaliGemma, processor: Processor, asked: list[tuple[Scene, Example]], max_new_tokens: int = 48
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


def is_right(example: Example, answer: str) -> bool:
    """Exactly one of the accepted answers; ``caption en`` may name its objects in any order."""
    return answer in example.answers or (example.kind == "caption" and scenes.same_caption(answer, example.answers[0]))


def share_right(right: list[bool]) -> Figure:
    """The share that is true, with Wilson's 95% interval made symmetric about it (the wider side)."""
    n, z = len(right), 1.96
    p = sum(right) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Figure(p, max(middle + half - p, p - middle + half), n)


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


def detection_figures(truth: list, found: list) -> dict[str, Figure]:
    """Both average precisions; intervals by leaving out one block of scenes at a time (the jackknife)."""
    whole = np.array(average_precision(truth, found))
    blocks = min(BLOCKS, len(truth))
    margin = np.full(2, math.nan)
    if blocks > 1:
        block = np.arange(len(truth)) * blocks // len(truth)
        kept = [np.flatnonzero(block != b) for b in range(blocks)]
        parts = np.array([average_precision([truth[i] for i in k], [found[i] for i in k]) for k in kept])
        margin = 1.96 * np.sqrt((blocks - 1) / blocks * ((parts - parts.mean(0)) ** 2).sum(0))
    count = sum(map(len, truth))
    names = ("detection AP at IoU 0.5", "detection AP, IoU 0.5 to 0.95")
    return {name: Figure(float(v), float(m), count) for name, v, m in zip(names, whole, margin, strict=True)}


def figures(asked: list[tuple[Scene, Example]], answers: list) -> dict[str, Figure]:
    """All figures of one split, in the order of the table."""
    right, truth, found = defaultdict(list), [], []
    for (scene, example), (text, items) in zip(asked, answers, strict=True):
        if example.kind == "detect":
            truth.append([locations.Detection(thing.name, thing.box) for thing in scene.objects])
            read = [(d, s) for item, s in items for d in locations.parse(item, scene.size, scene.size).detections]
            found.append(read)
        else:
            right[example.kind].append(is_right(example, text))
    table = {"caption": share_right(right["caption"])}
    table["questions, all"] = share_right([r for kind in QUESTIONS for r in right[kind]])
    table |= {f"– {kind}": share_right(right[kind]) for kind in QUESTIONS if right[kind]}
    table |= detection_figures(truth, found)
    more = {"cap": "caption by order (cap en)", "describe": "caption by relation (describe en)"}
    return table | {title: share_right(right[kind]) for kind, title in more.items() if right[kind]}


def evaluate(model: PaliGemma, processor: Processor, split: str, count: int, blank: bool = False) -> dict[str, Figure]:
    """Figures of ``count`` scenes of a split (seeds 0 …), or of the same questions about a grey square.

    Raises:
        ValueError: ``count`` is below 1 or ``split`` is none of ``scenes.SPLITS``.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}.")
    drawn = [scenes.make_scene(seed, split, processor.image_size) for seed in range(count)]
    asked = [(scene, example) for scene in drawn for example in prompts_of(scene)]
    shown = asked
    if blank:
        shown = [(replace(scene, image=np.full_like(scene.image, GREY)), example) for scene, example in asked]
    return figures(asked, answer_all(model, processor, shown))


# --- a report -------------------------------------------------------------------------------------------------------


def markdown(columns: dict[str, dict[str, Figure]]) -> str:
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
) -> dict[str, dict[str, Figure]]:
    """``python -m minivlm evaluate``: prints the table, with a last column for the blank picture; writes it as JSON."""
    columns = {split: evaluate(model, processor, split, count) for split in splits}
    columns[f"{splits[0]}, blank picture"] = evaluate(model, processor, splits[0], count, blank=True)
    print(markdown(columns))
    print(f"\n{count} scenes a split; ± is half of a 95% interval.")
    if json_path is not None:
        content = {name: {row: vars(figure) for row, figure in column.items()} for name, column in columns.items()}
        json_path.write_text(json.dumps({"scenes": count, "splits": content}, indent=2) + "\n")
    return columns
