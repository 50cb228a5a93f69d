"""The exercises of the course: checked, saved, and plugged into the model.

    exercises.check(prefix_lm_mask)          # Is it right? If not, what is wrong?
    exercises.hint("prefix_lm_mask")         # First a hint, then another, then a solution.
    exercises.progress()                     # What is done?
    with exercises.plugged_in() as parts:    # The model runs with every function of yours that passed.
        minivlm.generate(...)
    exercises.reset()                        # Delete all saved solutions, or one: exercises.reset("rms_norm")

Each exercise is declared once, in the module of its chapter (ch00.py …).
"""

import inspect
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import wraps
from html import escape
from numbers import Real
from typing import Any

from minivlm.course.chapters import CHAPTERS
from minivlm.course.exercises import ch00, ch01, ch02, ch03, ch04, ch05, ch06, ch07, ch08, lab0, lab7, lab10, saved
from minivlm.course.exercises.exercise import Case, Exercise, Mistake, Result, describe, examine, for_console
from minivlm.course.exercises.patch import replaced

__all__ = [
    "EXERCISES",
    "Case",
    "Exercise",
    "Mistake",
    "Result",
    "check",
    "hint",
    "in_chapter",
    "piece",
    "plugged_in",
    "progress",
    "reset",
    "score",
]

_MODULES = (ch00, ch01, ch02, ch03, ch04, ch05, ch06, ch07, ch08, lab0, lab7, lab10)
_DECLARED = [exercise for module in _MODULES for exercise in module.EXERCISES]
EXERCISES: dict[str, Exercise] = {exercise.name: exercise for exercise in _DECLARED}
assert len(EXERCISES) == len(_DECLARED), "two exercises have the same name"
_HINTS_SHOWN: Counter[str] = Counter()


def in_chapter(number: str) -> list[Exercise]:
    """The exercises of a chapter ("05"), in order."""
    return [exercise for exercise in EXERCISES.values() if exercise.chapter == number]


def find(name: str) -> Exercise:
    """The exercise of this name.

    Raises:
        ValueError: If there is none. The message suggests the closest name.
    """
    if name not in EXERCISES:
        raise ValueError(f"There is no exercise {name!r}{suggestion(name)}")
    return EXERCISES[name]


def suggestion(name: str) -> str:
    close = get_close_matches(str(name), EXERCISES, 1)
    return f": did you mean {close[0]!r}?" if close else "."


def unknown(name: str, is_function: bool) -> str:
    """A sentence about a name that no exercise has."""
    close = get_close_matches(str(name), EXERCISES, 1)
    what = f"there is no exercise {name!r}{suggestion(name)}"
    if not is_function:
        return what
    if not name or name == "<lambda>":
        what = "this function has no name, so it is not clear which exercise it belongs to."
    example = close[0] if close else next(iter(EXERCISES))
    how = f'`exercises.check(f, name="{example}")`'
    return f"{what} Define it with `def` and the name of the exercise, or say which one it is: {how}."


def check(answer: Any, name: str = "", seed: int = 0) -> Result:
    """Check a learner's function on random cases and say what is wrong, or save it if it passes.

    Args:
        answer: The function. Its name says which exercise it is, unless ``name`` does.
        seed: Seed of the random cases.
    """
    name = name or getattr(answer, "__name__", "")
    if not name and not callable(answer):
        return Result(f"expected a function but got {describe(answer)}.")
    if name not in EXERCISES:
        return Result(unknown(name, is_function=callable(answer)))
    exercise = EXERCISES[name]
    result = examine(exercise, answer, seed)
    return replace(result, notes=(save(exercise, answer),)) if result.passed else result


def hint(name: str | Callable) -> Result:
    """The first hint, at the next call the second, and after that a solution. Starts again with each kernel.

    Raises:
        ValueError: If there is no such exercise.
    """
    exercise = find(getattr(name, "__name__", name))
    shown = _HINTS_SHOWN[exercise.name]
    _HINTS_SHOWN[exercise.name] += 1
    if shown < 2:
        what = ("another hint", "a solution")[shown]
        note = f"Call this again for {what}."
        return Result(f"hint {shown + 1} of 2. {exercise.hints[shown]}", exercise, attempted=False, notes=(note,))
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(exercise.reference)))
    return Result("a solution.", exercise, attempted=False, notes=(source,))


def save(exercise: Exercise, function: Callable) -> str:
    """Save a solution that passed, check that it also works outside its notebook, and return a sentence about that."""
    if problem := saved.save(exercise, function):
        return problem
    _, problem = load_own(exercise)
    use = "Saved: PaliGemma will run with it." if exercise.plugs_in else "Saved with your solutions."
    return problem or use


def load_own(exercise: Exercise) -> tuple[Callable | None, str]:
    """The learner's saved function, checked again, or None and a sentence that says why not."""
    others = {name: other.reference for name, other in EXERCISES.items() if other is not exercise}
    try:
        function = saved.load(exercise, others)
    except Exception as error:  # the learner's file can contain anything
        return None, f"Your saved solution does not load ({type(error).__name__}: {error})."
    result = examine(exercise, function, seed=0)
    if result.passed:
        return function, ""
    return None, (
        f"Your saved solution does not work outside its notebook, so the model cannot use it: {result.message} "
        "Import or define everything it needs inside the function."
    )


def score(answer: Any, points: Real, name: str = "", seed: int | None = None) -> float:
    """What a hidden test returns: points × the fraction of the cases that are right, never more than ``points``.

    It prints the diagnosis, which nbgrader shows in its feedback together with the cell. So the seed of a class is not
    in the cell: it comes from the environment variable MINIVLM_SEED, which the course's settings define.

    Args:
        points: Of the exercise.
        seed: Seed of the random cases. Default: that of the class, or 1.
    """
    name = name or getattr(answer, "__name__", "")
    seed = int(os.environ.get("MINIVLM_SEED") or 1) if seed is None else seed
    result = examine(find(name), answer, seed)
    print(result)
    return round(points * min(max(result.score, 0.0), 1.0), 4)


def piece(name: str) -> Callable:
    """The learner's own function if a saved one passes, otherwise the reference."""
    exercise = find(name)
    function = load_own(exercise)[0] if saved.is_saved(exercise) else None
    return function or exercise.reference


# --- progress -------------------------------------------------------------------------------------------------------


class Progress:
    """Which exercises are done. Displays itself as a table in a notebook."""

    def __init__(self):
        self.done = {name: saved.is_saved(exercise) for name, exercise in EXERCISES.items()}

    def __str__(self) -> str:
        lines = [f"{sum(self.done.values())} of {len(self.done)} exercises done, saved in {saved.folder().name}/"]
        for number, chapter in CHAPTERS.items():
            marks = [f"{'✓' if self.done[e.name] else '·'} {e.name}" for e in in_chapter(number)]
            lines.append(f"{number} {chapter.title}: " + "  ".join(marks))
        return for_console("\n".join(lines))

    __repr__ = __str__

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        rows = ""
        for number, chapter in CHAPTERS.items():
            declared = in_chapter(number)
            items = [f"{'✓' if self.done[e.name] else '○'} {e.key} <code>{e.name}</code>" for e in declared]
            done = f"{sum(self.done[e.name] for e in declared)} of {len(declared)}"
            cells = (number, escape(chapter.title), done, "<br>".join(items))
            rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        return {"text/plain": str(self), "text/html": f"<table>{rows}</table>"}


def progress() -> Progress:
    """What is done so far, in every chapter."""
    return Progress()


def reset(name: str | None = None) -> None:
    """Delete the saved solution of an exercise or those of a chapter ("05"). Default: all of them."""
    chosen = [e for e in EXERCISES.values() if name is None or e.chapter == name] or [find(name)]
    for exercise in chosen:
        saved.delete(exercise)


# --- the learner's functions in the model ---------------------------------------------------------------------------


class Parts(dict):
    """Name of each function that the model calls → "yours" and, after the block, how often it ran, or why not.

    Attributes:
        calls: How often each function of the learner's has run so far.
    """

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def finish(self) -> None:
        """Say how often each function ran."""
        for name, whose in self.items():
            if whose == "yours":
                count = self.calls[name]
                ran = f"{count} call{'s' * (count != 1)}" if count else "but this answer did not need it"
                self[name] = f"yours, {ran}"

    def __str__(self) -> str:
        count = sum(whose.startswith("yours") for whose in self.values())
        lines = [f"{count} of {len(self)} functions are yours"]
        return for_console("\n".join(lines + [f"  {EXERCISES[n].key} {n}: {whose}" for n, whose in self.items()]))

    __repr__ = __str__

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return {"text/plain": str(self)}


@contextmanager
def plugged_in() -> Iterator[Parts]:
    """Inside the ``with`` block, the package runs with every saved function of the learner's in place of its own.

    They also call each other: the learner's ``prefix_lm_mask`` calls the learner's ``block_mask``.
    """
    parts, own = Parts(), {}
    for name, exercise in EXERCISES.items():
        if not exercise.plugs_in:
            continue
        function, problem = load_own(exercise) if saved.is_saved(exercise) else (None, "")
        parts[name] = "yours" if function else "the package's" + (f". {problem}" if problem else "")
        if function:
            own[name] = function
    counted = {name: count_calls(EXERCISES[name], function, parts.calls) for name, function in own.items()}
    for name, function in own.items():
        others = {other: run for other, run in counted.items() if other != name}
        getattr(inspect.unwrap(function), "__globals__", {}).update(others)
    try:
        with replaced({EXERCISES[name].reference: run for name, run in counted.items()}):
            yield parts
    finally:
        parts.finish()


class PieceError(RuntimeError):
    """A function of the learner's failed inside the model."""


def count_calls(exercise: Exercise, function: Callable, calls: Counter) -> Callable:
    """Wrap the function: count its calls, and if it fails inside the model, say which exercise it belongs to."""

    @wraps(function)
    def run(*args, **kwargs):
        calls[exercise.name] += 1
        try:
            return function(*args, **kwargs)
        except PieceError:  # another function of the learner's, which this one called
            raise
        except Exception as error:
            raise PieceError(
                f"Your {exercise.name} (exercise {exercise.key}) failed inside the model: {type(error).__name__}: "
                f'{error}. exercises.reset("{exercise.name}") removes it.'
            ) from error

    return run
