"""What a mistake does, on one example, for a class to discuss: the right answer beside that of the mistake."""

from functools import cache
from html import escape
from typing import Any

import numpy as np
import torch

from minivlm.course.exercises import EXERCISES, Case
from minivlm.course.exercises.exercise import call, compare_outcomes

MAX_ROWS = 8  # of a table of numbers
MAX_TOKENS = 64  # of a mask
RIGHT, WRONG = "right", "with this mistake"


@cache
def show(exercise: str, mistake: str) -> str:
    """HTML about the first case in which the answer of a known mistake is wrong. "" if only its gradients are."""
    declared = EXERCISES[exercise]
    function = next(m.function for m in declared.mistakes if m.name == mistake)
    for case in map(Case.of, declared.cases(np.random.default_rng(0))):
        want, got = (call(f, case, names=declared.parameters) for f in (declared.reference, function))
        if problem := compare_outcomes(got, want, function, declared.outputs):
            sentence = ", ".join(filter(None, (str(case), problem)))
            return f"<p>{escape(sentence[0].upper() + sentence[1:])}</p>{draw(want.value, got.value)}"
    return ""


def draw(right: Any, wrong: Any) -> str:
    """Two masks or two small tables of numbers side by side, as HTML. "" for anything else."""
    tables = [to_array(value) for value in (right, wrong)]
    if any(table is None for table in tables) or tables[0].shape != tables[1].shape or not tables[0].size:
        return ""
    first = np.argwhere(~np.isclose(*(table.astype(float) for table in tables), equal_nan=True))[:1]
    tables = [np.atleast_2d(table[tuple(first[0][:-2])]) for table in tables] if len(first) else []
    if tables and tables[0].dtype == tables[1].dtype == bool and max(tables[0].shape) <= MAX_TOKENS:
        from minivlm.course import viz

        return viz.compare_masks(dict(zip((RIGHT, WRONG), tables, strict=True))).html()
    if tables and max(tables[0].shape) <= MAX_ROWS:
        return "".join(number_table(name, table, tables[0]) for name, table in zip((RIGHT, WRONG), tables, strict=True))
    return ""


def to_array(value: Any) -> np.ndarray | None:
    """A tensor or an array of numbers or booleans as an array with at least one axis, anything else as None."""
    if isinstance(value, torch.Tensor):
        value = (value.detach().float() if value.is_floating_point() else value.detach()).numpy()
    is_usable = isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.ndim
    return value if is_usable else None


def number_table(name: str, table: np.ndarray, right: np.ndarray) -> str:
    """A table with a caption, in which every number that differs from the right one is marked."""
    rows = ""
    for line, wrong in zip(table.tolist(), ~np.isclose(table, right, equal_nan=True), strict=True):
        cells = (f"<mark>{x:.4g}</mark>" if differs else f"{x:.4g}" for x, differs in zip(line, wrong, strict=True))
        rows += "<tr>" + "".join(f"<td class=number>{cell}</td>" for cell in cells) + "</tr>"
    return f'<div class="wide" tabindex="0"><table class="example"><caption>{name}</caption>{rows}</table></div>'
