"""The exercises of the course: checked, kept, and plugged into the model.

    exercises.check(prefix_lm_mask)          # right? and if not: what is wrong
    exercises.progress()                     # what is done
    with exercises.plugged_in() as parts:    # the model runs with every piece that passed
        minivlm.generate(...)
    exercises.reset()                        # forget what was kept, or one piece: exercises.reset("rms_norm")

Each exercise is declared once, in the module of its chapter (ch00.py …).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import wraps
from html import escape
from importlib import import_module
from numbers import Real
from typing import Any

from minivlm.course.exercises import saved
from minivlm.course.exercises.exercise import Exercise, Mistake, Result, describe, examine
from minivlm.course.exercises.patch import replaced
from minivlm.course.viz.diagrams import CHAPTERS

__all__ = ["EXERCISES", "Exercise", "Mistake", "Result", "check", "piece", "plugged_in", "progress", "reset", "score"]

_DECLARED = [e for number in CHAPTERS for e in import_module(f"minivlm.course.exercises.ch{number}").EXERCISES]
EXERCISES: dict[str, Exercise] = {exercise.name: exercise for exercise in _DECLARED}
assert len(EXERCISES) == len(_DECLARED), "two exercises have one name"


def find(name: str) -> Exercise:
    """The exercise of this name. ValueError, with the nearest name, where there is none."""
    if name not in EXERCISES:
        near = get_close_matches(str(name), EXERCISES, 1)
        raise ValueError(f"There is no exercise {name!r}" + (f": do you mean {near[0]!r}?" if near else "."))
    return EXERCISES[name]


def check(answer: Any, name: str = "", seed: int = 0) -> Result:
    """Checks a learner's function on random cases and says what is wrong; keeps it when it passes.

    Args:
        answer: the function. Its name says which exercise it is, unless ``name`` does.
        seed: of the random cases.
    """
    name = name or getattr(answer, "__name__", "")
    if name not in EXERCISES:
        near = get_close_matches(name, EXERCISES, 1)
        what = f"the name {name!r} is that of no exercise" if name else f"this is {describe(answer)}, not a function"
        return Result(f"{what}{f': do you mean {near[0]!r}?' if near else '.'}")
    exercise = EXERCISES[name]
    result = examine(exercise, answer, seed)
    if not result.passed:
        return result
    return replace(result, notes=(keep(exercise, answer),))


def keep(exercise: Exercise, function: Callable) -> str:
    """Keeps a solution that passed; returns a sentence about that. It must work outside of its notebook, too."""
    if trouble := saved.save(exercise, function):
        return trouble
    _, trouble = own(exercise)
    use = "Kept: chapter 08 will run PaliGemma with it." if exercise.plugs_in else "Kept among your solutions."
    return trouble or use


def own(exercise: Exercise) -> tuple[Callable | None, str]:
    """The learner's kept function, checked again; or None and a sentence that says why not."""
    names = {name: other.reference for name, other in EXERCISES.items() if other is not exercise}
    try:
        function = saved.load(exercise, names)
    except Exception as error:  # the learner's file may hold anything
        return None, f"It does not work outside of this notebook ({type(error).__name__}: {error})."
    result = examine(exercise, function, seed=0)
    if result.passed:
        return function, ""
    return None, (
        f"But it does not work outside of this notebook, so it cannot be used later: {result.message} "
        "Import or define what it needs inside the function."
    )


def score(answer: Any, points: Real, name: str = "", seed: int = 0) -> float:
    """Points × the share of the cases that are right: what a hidden test gives."""
    name = name or getattr(answer, "__name__", "")
    return round(points * examine(find(name), answer, seed).score, 4)


def piece(name: str) -> Callable:
    """The learner's own function, if one is kept and right; else the package's."""
    exercise = find(name)
    function = own(exercise)[0] if saved.is_saved(exercise) else None
    return function or exercise.reference


# --- progress -------------------------------------------------------------------------------------------------------


class Progress:
    """Which exercises are done; shows itself in a notebook."""

    def __init__(self):
        self.done = {name: saved.is_saved(exercise) for name, exercise in EXERCISES.items()}

    def chapter(self, number: str) -> list[Exercise]:
        return [exercise for exercise in EXERCISES.values() if exercise.chapter == number]

    def __str__(self) -> str:
        lines = [f"{sum(self.done.values())} of {len(self.done)} exercises done, kept in {saved.folder().name}/"]
        for number, title in CHAPTERS.items():
            marks = [f"{'✓' if self.done[e.name] else '·'} {e.name}" for e in self.chapter(number)]
            lines.append(f"{number} {title}: " + "  ".join(marks))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        rows = ""
        for number, title in CHAPTERS.items():
            chapter = self.chapter(number)
            items = [f"{'✓' if self.done[e.name] else '○'} {e.key} <code>{e.name}</code>" for e in chapter]
            done = f"{sum(self.done[e.name] for e in chapter)} of {len(chapter)}"
            rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in (number, escape(title), done, "<br>".join(items)))
            rows += "</tr>"
        return {"text/plain": str(self), "text/html": f"<table>{rows}</table>"}


def progress() -> Progress:
    """What is done so far, in every chapter."""
    return Progress()


def reset(name: str | None = None) -> None:
    """Forgets the kept solution of this exercise, or of this chapter ("05"), or, without a name, all of them."""
    chosen = [e for e in EXERCISES.values() if name is None or e.chapter == name] or [find(name)]
    for exercise in chosen:
        saved.forget(exercise)


# --- the learner's pieces in the model ------------------------------------------------------------------------------


class Parts(dict):
    """Name of each piece that the model calls → "yours", or why it is the package's."""

    def __str__(self) -> str:
        count = sum(whose == "yours" for whose in self.values())
        lines = [f"{count} of {len(self)} pieces are yours"]
        return "\n".join(lines + [f"  {EXERCISES[name].key} {name}: {whose}" for name, whose in self.items()])

    __repr__ = __str__

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return {"text/plain": str(self)}


@contextmanager
def plugged_in() -> Iterator[Parts]:
    """Inside, the package runs with every kept piece of the learner's in place of its own."""
    parts, substitutes = Parts(), {}
    for name, exercise in EXERCISES.items():
        if not exercise.plugs_in:
            continue
        function, trouble = own(exercise) if saved.is_saved(exercise) else (None, "")
        parts[name] = "yours" if function else "the package's" + (f", for yours {trouble}" if trouble else "")
        if function:
            substitutes[exercise.reference] = explained(exercise, function)
    with replaced(substitutes):
        yield parts


def explained(exercise: Exercise, function: Callable) -> Callable:
    """The function, whose failure inside the model says whose it is."""

    @wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise RuntimeError(
                f"your {exercise.name} (exercise {exercise.key}) failed inside the model: {type(error).__name__}: "
                f'{error}. exercises.reset("{exercise.name}") takes it out.'
            ) from error

    return run
