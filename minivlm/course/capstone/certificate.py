"""The page at the end: what was checked, the learner's own answers about scenes, and how fast they came.

The page needs nothing but itself: no script, no other file, no network. It is readable in light and in dark.
"""

import hashlib
from datetime import date
from pathlib import Path

from minivlm import __version__, emoji, locations
from minivlm.course.capstone.steps import Answered, Bench, Speed
from minivlm.course.grading.pages import page, table, text
from minivlm.course.viz import draw_boxes, draw_sheet
from minivlm.hub import write_atomically


def write(bench: Bench, report, path: Path) -> Path:
    """Writes the page about a report in which all steps passed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as part:
        part.write_text(as_page(bench, report), encoding="utf-8")
    return path


def as_page(bench: Bench, report) -> str:
    file = bench.learner.path
    source = file.read_bytes()
    lines = sum(bool(line.strip()) for line in source.splitlines())
    about = f"{file.name}, {lines} lines that are not empty, passed all {len(report.steps)} steps of the capstone on "
    about += f"{date.today():%B %d, %Y}, with minivlm {__version__}. SHA-256 of the file: "
    return page(
        "PaliGemma from an empty file",
        f"<p>{text(about)}<code>{hashlib.sha256(source).hexdigest()}</code></p>",
        "<h2>Its answers</h2>",
        "<p>About held-out scenes, the first of each split. All tokens are those of transformers.</p>",
        draw_answers(bench.answered).html(),
        table(("scene", "prompt", "its answer"), map(answer_row, rows_of(bench.answered)), "stacked"),
        "<h2>Its speed</h2>",
        "<p>Tokens per second for these answers, image and prompt included, on one thread of a CPU: the median of "
        f"{len(bench.speeds[0].rates)} rounds in which the three took turns, with the slowest and the fastest.</p>",
        table(("", "tokens per second", "slowest to fastest", "relative to transformers"), speed_rows(bench.speeds)),
        "<h2>The steps</h2>",
        table(("step", "", "what was found"), ((s.number, whole(s.name), text(s.message)) for s in report.steps)),
    )


def draw_answers(answered: list[Answered]):
    """An image: the scenes with the boxes that the learner's model found, and its captions."""
    panels = []
    for scene in answered:
        caption, boxes = scene.answers
        height, width = scene.image.shape[:2]
        found = locations.parse_detections(boxes, width, height).detections if "<loc" in boxes else []
        right = emoji.same_caption(caption, scene.accepted[0]) or caption in scene.accepted
        line = f"{scene.prompts[0]}: {caption or '(nothing)'}" + ("" if right else f"  (truth: {scene.accepted[0]})")
        panels.append((draw_boxes(as_image(scene.image), found), line))
    return draw_sheet(panels)


def as_image(pixels):
    from PIL import Image

    return Image.fromarray(pixels)


def rows_of(answered: list[Answered]):
    for scene in answered:
        for prompt, answer in zip(scene.prompts, scene.answers, strict=True):
            yield f"{scene.split} {scene.seed}", prompt, answer


def answer_row(row: tuple[str, str, str]) -> tuple[str, ...]:
    scene, *others = row
    return whole(scene), *(text(cell or "(nothing)") for cell in others)


def whole(words: str) -> str:
    """Text that a narrow cell does not break inside a word."""
    return f'<span style="overflow-wrap: normal">{text(words)}</span>'


def speed_rows(speeds: list[Speed]):
    *_, transformers = speeds
    for speed in speeds:
        span = f"{min(speed.rates):,.0f} to {max(speed.rates):,.0f}"
        yield whole(speed.name), f"{speed.rate:,.0f}", span, f"{speed.rate / transformers.rate:.2f} ×"
