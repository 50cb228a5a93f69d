"""An exercise: what is right, random cases to try, and the mistakes that people make.

A check runs the learner's function on random cases and looks at what it returns in this order: type, shape, dtype, NaN,
value. Where the answers equal those of a known mistake, on every case or on most of those that are wrong, the message
names the mistake. Whatever the learner's function does, a check answers with a sentence.
"""

import copy
import inspect
import math
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from numbers import Real
from typing import Any

import numpy as np
import torch

from minivlm.course.exercises.patch import replaced

TOLERANCE = 1e-5  # of the largest expected number


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that is often given: ``name`` completes "it …", ``hint`` is a sentence that helps."""

    name: str
    function: Callable
    hint: str


@dataclass(frozen=True)
class Exercise:
    """Declared once a piece: its check, its grade and its place in the model all follow from this.

    reference: the package's own function, which the learner's may replace; or one written for the exercise alone.
    cases: random generator → argument tuples, all different. Tensors, numbers, texts, configurations.
    """

    key: str  # chapter and number: "05.1"
    reference: Callable
    cases: Callable[[np.random.Generator], Iterable[tuple]]
    mistakes: tuple[Mistake, ...]
    difficulty: int  # 1 to 3
    minutes: int
    points: int = 2
    name: str = ""  # of the function; the reference's when not given

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or self.reference.__name__)

    @property
    def chapter(self) -> str:
        return self.key.split(".")[0]

    @property
    def in_package(self) -> bool:
        """Whether the reference is a piece of the package, not one written for the exercise."""
        return not self.reference.__module__.startswith("minivlm.course.exercises")

    @property
    def plugs_in(self) -> bool:
        """Whether a model that answers calls this piece: the losses are for training alone."""
        return self.in_package and self.reference.__module__ != "minivlm.losses"


@dataclass(frozen=True)
class Result:
    """What a check found. ``score``: the share of the cases that are right, 0 to 1."""

    message: str
    exercise: Exercise | None = None
    passed: bool = False
    attempted: bool = True
    score: float = 0.0
    mistake: str = ""  # the name of the known mistake that it is
    notes: tuple[str, ...] = ()

    @property
    def mark(self) -> str:
        return "✓" if self.passed else "✗" if self.attempted else "○"

    def __str__(self) -> str:
        head = f"{self.mark} {self.exercise.key} {self.exercise.name}: " if self.exercise else f"{self.mark} "
        return "\n".join((head + self.message, *self.notes))

    __repr__ = __str__

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        color = "#009E73" if self.passed else "#D55E00" if self.attempted else "#777777"
        style = f"border-left: 4px solid {color}; padding: 2px 10px; white-space: pre-wrap"
        return {"text/plain": str(self), "text/html": f'<div style="{style}">{escape(str(self))}</div>'}


# --- running the learner's function ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one call gave: a value, or the exception that it raised; and its tensors after it, if it changed one."""

    value: Any = None
    error: BaseException | None = None
    changed: tuple = ()


class CallsThePackage(Exception):
    """Raised in place of the package's own function while a learner's is checked."""


def call(function: Callable, arguments: tuple) -> Outcome:
    """Calls with copies of the arguments, so that nobody can spoil them for the next."""
    given = copy.deepcopy(arguments)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            value = function(*given)
    except (Exception, SystemExit) as error:  # a learner's function may do anything
        return Outcome(error=error)
    after = arrays(given)
    return Outcome(value, changed=after if find_problem(after, arrays(arguments)) else ())


def arrays(arguments: Any) -> tuple:
    """The tensors and arrays among arguments, also those in lists, tuples and dictionaries."""
    if isinstance(arguments, torch.Tensor | np.ndarray):
        return (arguments,)
    if isinstance(arguments, dict):
        arguments = tuple(arguments.values())
    return tuple(a for part in arguments for a in arrays(part)) if isinstance(arguments, list | tuple) else ()


@contextmanager
def without_reference(exercise: Exercise):
    """While inside, the package's own function refuses to be called: the learner is to write it, not to call it."""

    def refuse(*args, **kwargs):
        raise CallsThePackage

    with replaced({exercise.reference: refuse} if exercise.in_package else {}):
        yield


def examine(exercise: Exercise, function: Any, seed: int) -> Result:
    """What ``check`` says, without keeping anything."""
    cases = list(exercise.cases(np.random.default_rng(seed)))
    wrong = what_is_no_function(exercise, function, cases[0])
    if wrong:
        return Result(wrong, exercise)
    expected = [call(exercise.reference, case) for case in cases]
    with without_reference(exercise):
        outcomes = [call(function, case) for case in cases]
    if isinstance(outcomes[0].error, NotImplementedError):
        return Result("not attempted yet.", exercise, attempted=False)
    problems = [what_is_wrong(got, want, function) for got, want in zip(outcomes, expected, strict=True)]
    right = sum(problem is None for problem in problems)
    if right == len(cases):
        return Result(f"passed, on all {right} random cases.", exercise, passed=True, score=1.0)
    first = next(problem for problem in problems if problem)
    score = right / len(cases)
    mistake = known_mistake(exercise, cases, outcomes, [problem is not None for problem in problems])
    if mistake:
        return Result(f"not yet: it {mistake.name}.", exercise, False, True, score, mistake.name, (mistake.hint, first))
    share = f" ({right} of {len(cases)} random cases are right)" if right else ""
    return Result(f"not yet: {first}{share}", exercise, score=score)


def what_is_no_function(exercise: Exercise, function: Any, case: tuple) -> str | None:
    """A sentence where this cannot be called with the exercise's arguments."""
    if exercise.in_package and function is exercise.reference:
        return "not yet: this is the package's own function. Write it yourself, you will learn more."
    wanted = ", ".join(inspect.signature(exercise.reference).parameters)
    if not callable(function):
        return f"not yet: this is {describe(function)}, and should be a function of ({wanted})."
    try:
        inspect.signature(function).bind(*case)
    except TypeError:
        taken = ", ".join(inspect.signature(function).parameters)
        return f"not yet: it takes ({taken}), and should take ({wanted})."
    except ValueError:  # a builtin without a signature
        return None
    return None


def what_is_wrong(got: Outcome, want: Outcome, function: Callable) -> str | None:
    """A sentence about one case, or None. A reference that raises asks for the same kind of error."""
    if isinstance(got.error, CallsThePackage):
        return "it calls the package's own function: write it yourself, you will learn more."
    if want.error is not None:
        kind = type(want.error).__name__
        if type(got.error) is type(want.error):
            return None
        return f"here it should raise {kind}, as for: {want.error}"
    if got.error is not None:
        return f"it raises {type(got.error).__name__}{where(got.error, function)}: {first_line(got.error)}"
    problem = find_problem(got.value, want.value)
    if problem or not (got.changed or want.changed):
        return problem
    if not want.changed:
        return "the answer is right, but it changes an argument in place: work on a copy."
    if not got.changed:
        return "the answer is right, but it should write into its argument, and leaves that as it was."
    return find_problem(got.changed, want.changed, "it writes into its argument what is wrong there:")


def where(error: BaseException, function: Callable) -> str:
    """ " in line 3 of your function", where the traceback tells."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line - code.co_firstlineno + 1 for frame, line in frames if frame.f_code is code] if code else []
    return f" in line {lines[-1]} of your function" if lines else ""


def first_line(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # an exception of the learner's own, which cannot even be written out
        text = ""
    return (text.strip().splitlines() or ["without a message"])[0][:200]


def known_mistake(exercise: Exercise, cases: list[tuple], outcomes: list[Outcome], wrong: list[bool]) -> Mistake | None:
    """The mistake that gives the learner's answers on every case, or else on most of those that are wrong."""
    alike = {}
    for mistake in exercise.mistakes:
        equal = [same(call(mistake.function, case), got) for case, got in zip(cases, outcomes, strict=True)]
        if all(equal):
            return mistake
        alike[mistake.name] = sum(e and w for e, w in zip(equal, wrong, strict=True))
    nearest = max(exercise.mistakes, key=lambda mistake: alike[mistake.name])
    return nearest if alike[nearest.name] > sum(wrong) / 2 else None


def same(a: Outcome, b: Outcome) -> bool:
    if a.error is not None or b.error is not None:
        return type(a.error) is type(b.error) and first_line(a.error) == first_line(b.error)
    return find_problem(b.value, a.value) is None and find_problem(b.changed, a.changed) is None


# --- comparing ------------------------------------------------------------------------------------------------------


def describe(value: Any) -> str:
    """In a few words what a value is: "None", "a tensor of shape [2, 3]"."""
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, torch.Tensor) else "numpy array"
        return f"a {kind} of shape {list(value.shape)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def find_problem(got: Any, want: Any, what: str = "it") -> str | None:
    """A sentence on the first difference, in the order type, shape, dtype, NaN, value; None where there is none."""
    if isinstance(want, torch.Tensor | np.ndarray):
        return array_problem(got, want, what)
    if isinstance(want, list | tuple):
        return sequence_problem(got, want, what)
    if isinstance(want, bool | str) or want is None or not isinstance(want, Real):
        return other_problem(got, want, what)
    return number_problem(got, want, what)


def array_problem(got: Any, want: torch.Tensor | np.ndarray, what: str) -> str | None:
    if got is None:
        return f"{what} returns None: is there a `return`?"
    if not isinstance(got, torch.Tensor if isinstance(want, torch.Tensor) else np.ndarray):
        return f"{what} returns {describe(got)}, and should return {describe(want)}."
    if tuple(got.shape) != tuple(want.shape):
        return f"{what} returns shape {list(got.shape)}, and should return {list(want.shape)}."
    if got.dtype != want.dtype:
        return f"{what} returns numbers of type {got.dtype}, and should return {want.dtype}."
    a, b = as_numpy(got), as_numpy(want)
    if a.dtype.kind == "f":
        strange = int((np.isnan(a) & ~np.isnan(b)).sum())
        if strange:
            return f"{what} returns NaN in {strange} of {a.size} places."
    different = differs(a, b)
    if not different.any():
        return None
    place = tuple(int(i) for i in np.argwhere(different)[0])
    return (
        f"{what} differs in {int(different.sum())} of {a.size} places, first at {list(place)}: "
        f"yours is {number(a[place])}, expected {number(b[place])}."
    )


def number(value: np.generic) -> str:
    return str(value) if value.dtype.kind == "b" else f"{value:.6g}"


def as_numpy(array: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.double() if array.is_floating_point() else array).numpy()
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two arrays of one shape differ: at all, or for floating-point numbers by more than the tolerance."""
    if a.dtype.kind != "f":
        return np.asarray(a != b)
    finite = np.isfinite(b)
    largest = np.abs(b[finite]).max(initial=1e-30)
    with np.errstate(invalid="ignore"):
        close = np.abs(a - b) <= TOLERANCE * largest
    return np.asarray(~(close | (a == b) | (np.isnan(a) & np.isnan(b))))


def sequence_problem(got: Any, want: list | tuple, what: str) -> str | None:
    if not isinstance(got, list | tuple):
        return f"{what} returns {describe(got)}, and should return a {type(want).__name__} of {len(want)}."
    if len(got) != len(want):
        return f"{what} returns {len(got)} things, and should return {len(want)}."
    for i, (a, b) in enumerate(zip(got, want, strict=True), start=1):
        if problem := find_problem(a, b, f"{what.removesuffix('it').strip()} in item {i}, it".strip()):
            return problem
    return None


def number_problem(got: Any, want: Real, what: str) -> str | None:
    if isinstance(got, torch.Tensor | np.ndarray) and math.prod(got.shape) == 1:
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, Real):
        return f"{what} returns {describe(got)}, and should return a number."
    if math.isnan(got) and not math.isnan(want):
        return f"{what} returns NaN, expected {want:.6g}."
    if isinstance(want, int):
        return None if got == want else f"{what} returns {got}, expected {want}."
    if differs(np.array(float(got)), np.array(float(want))).any():
        return f"{what} returns {got:.6g}, expected {want:.6g}."
    return None


def other_problem(got: Any, want: Any, what: str) -> str | None:
    if got is None and want is not None:
        return f"{what} returns None: is there a `return`?"
    if type(got) is not type(want):
        return f"{what} returns {describe(got)}, and should return {describe(want)}."
    return None if got == want else f"{what} returns {got!r}, expected {want!r}."
