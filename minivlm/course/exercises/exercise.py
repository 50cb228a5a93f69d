"""An exercise: a reference, random cases to try, and the mistakes that people make.

A check runs the learner's function and the reference on random cases and compares what they return, in this order:
type, shape, dtype, NaN, values. If the answers equal those of a known mistake, in all cases or in most of those that
are wrong, the message names the mistake. Whatever the learner's function does, a check answers with a sentence.
"""

import copy
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from numbers import Real
from typing import Any

import numpy as np
import torch

from minivlm.course.exercises.patch import replaced

TOLERANCE = 1e-5  # relative to the largest expected value


@dataclass(frozen=True)
class Case:
    """Arguments of one call, and in a few words what is special about them: "a batch of one", "bfloat16", "no mask"."""

    arguments: tuple
    name: str = ""
    keywords: dict = field(default_factory=dict)  # passed by keyword; leaving an argument out tests its default


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that many people give.

    Attributes:
        name: Completes the sentence "not yet: it …".
        function: The reference with this mistake in it.
        hint: A sentence that helps.
    """

    name: str
    function: Callable
    hint: str


@dataclass(frozen=True)
class Exercise:
    """A function to write. Its check, its grade and its place in the model all follow from this declaration.

    Attributes:
        key: Chapter and number, "05.1".
        reference: The package's own function, which the learner's can replace, or one written for this exercise only.
        cases: Takes a random generator and yields argument tuples, all different.
        difficulty: 1 to 3 stars.
        name: Name of the function. Default: that of the reference.
    """

    key: str
    reference: Callable
    cases: Callable[[np.random.Generator], Iterable[tuple]]
    mistakes: tuple[Mistake, ...]
    difficulty: int
    minutes: int
    points: int = 2
    name: str = ""
    outputs: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or self.reference.__name__)

    @property
    def chapter(self) -> str:
        """The number of the chapter, "05"."""
        return self.key.split(".")[0]

    @property
    def stars(self) -> str:
        """The difficulty as text, "★★☆"."""
        return "★" * self.difficulty + "☆" * (3 - self.difficulty)

    @property
    def is_in_package(self) -> bool:
        """Whether the reference is a function of the package, not one written for the exercise."""
        return not self.reference.__module__.startswith("minivlm.course.exercises")

    @property
    def plugs_in(self) -> bool:
        """Whether the model calls this function to answer. The losses are for training only."""
        return self.is_in_package and self.reference.__module__ != "minivlm.losses"


@dataclass(frozen=True)
class Result:
    """What a check found.

    Attributes:
        score: Fraction of the cases that are right, 0 to 1.
        mistake: Name of the known mistake, if it is one.
    """

    message: str
    exercise: Exercise | None = None
    passed: bool = False
    attempted: bool = True
    score: float = 0.0
    mistake: str = ""
    notes: tuple[str, ...] = ()

    @property
    def mark(self) -> str:
        """✓ passed, ✗ wrong, ○ not attempted."""
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
    """What one call did.

    Attributes:
        value: What it returned.
        error: What it raised.
        changed: The tensors among its arguments after the call, if it changed one.
    """

    value: Any = None
    error: BaseException | None = None
    changed: tuple = ()


class CallsReference(Exception):
    """Raised by the package's own function while a learner's version of it is checked."""


def call(function: Callable, case: Case | tuple) -> Outcome:
    """Call with a copy of the arguments, so that the function cannot change what the next call gets."""
    case = case if isinstance(case, Case) else Case(case)
    arguments, keywords = case.arguments, copy.deepcopy(case.keywords)
    copied = copy.deepcopy(arguments)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # much faster than torch.manual_seed, which seeds GPUs too
            value = function(*copied, **keywords)
    except (Exception, SystemExit) as error:  # a learner's function can do anything
        return Outcome(error=error)
    after = find_arrays(copied)
    return Outcome(value, changed=after if compare(after, find_arrays(arguments)) else ())


def find_arrays(arguments: Any) -> tuple:
    """The tensors and arrays among arguments, also inside lists, tuples and dictionaries."""
    if isinstance(arguments, torch.Tensor | np.ndarray):
        return (arguments,)
    if isinstance(arguments, dict):
        arguments = tuple(arguments.values())
    return tuple(a for part in arguments for a in find_arrays(part)) if isinstance(arguments, list | tuple) else ()


@contextmanager
def blocked_reference(exercise: Exercise) -> Iterator[None]:
    """Make the package's own function raise, because learners should write it, not call it."""

    def refuse(*args, **kwargs):
        raise CallsReference

    with replaced({exercise.reference: refuse} if exercise.is_in_package else {}):
        yield


def examine(exercise: Exercise, function: Any, seed: int) -> Result:
    """Check a function without saving anything."""
    cases = list(exercise.cases(np.random.default_rng(seed)))
    if problem := find_signature_problem(exercise, function, cases[0]):
        return Result(f"not yet: {problem}", exercise)
    expected = [call(exercise.reference, case) for case in cases]
    with blocked_reference(exercise):
        outcomes = [call(function, case) for case in cases]
    if isinstance(outcomes[0].error, NotImplementedError):
        return Result("not attempted yet.", exercise, attempted=False)
    problems = [compare_outcomes(got, want, function) for got, want in zip(outcomes, expected, strict=True)]
    right = sum(problem is None for problem in problems)
    if right == len(cases):
        return Result(f"passed all {right} random cases.", exercise, passed=True, score=1.0)
    first = next(problem for problem in problems if problem)
    score = right / len(cases)
    mistake = find_mistake(exercise, cases, outcomes, [problem is not None for problem in problems])
    if mistake:
        return Result(f"not yet: it {mistake.name}.", exercise, False, True, score, mistake.name, (mistake.hint, first))
    share = f" ({right} of {len(cases)} random cases are right)" if right else ""
    return Result(f"not yet: {first}{share}", exercise, score=score)


def find_signature_problem(exercise: Exercise, function: Any, case: tuple) -> str | None:
    """A sentence if this cannot be called with the exercise's arguments."""
    if exercise.is_in_package and function is exercise.reference:
        return "this is the package's own function. Write it yourself."
    wanted = ", ".join(inspect.signature(exercise.reference).parameters)
    if not callable(function):
        return f"expected a function of ({wanted}) but got {describe(function)}."
    try:
        case = case if isinstance(case, Case) else Case(case)
        inspect.signature(function).bind(*case.arguments, **case.keywords)
    except TypeError:
        taken = ", ".join(inspect.signature(function).parameters)
        return f"it takes ({taken}) but should take ({wanted})."
    except ValueError:  # a builtin without a signature
        return None
    return None


def compare_outcomes(got: Outcome, want: Outcome, function: Callable) -> str | None:
    """A sentence on what is wrong in one case, or None. If the reference raises, the same kind of error is expected."""
    if isinstance(got.error, CallsReference):
        return "it calls the package's own function. Write it yourself."
    if want.error is not None:
        if type(got.error) is type(want.error):
            return None
        return f"it should raise {type(want.error).__name__} in this case: {want.error}"
    if got.error is not None:
        return f"it raises {type(got.error).__name__}{locate(got.error, function)}: {first_line(got.error)}"
    problem = compare(got.value, want.value)
    if problem or not (got.changed or want.changed):
        return problem
    if not want.changed:
        return "the result is right, but it changes an argument in place: work on a copy."
    if not got.changed:
        return "the result is right, but it should write into its argument in place, and doesn't."
    problem = compare(got.changed, want.changed)
    return problem and f"the result is right, but what it writes into its arguments is wrong: {problem}"


def locate(error: BaseException, function: Callable) -> str:
    """ " on line 3 of your function", if the traceback tells."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line - code.co_firstlineno + 1 for frame, line in frames if frame.f_code is code] if code else []
    return f" on line {lines[-1]} of your function" if lines else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to 200 characters."""
    try:
        text = str(error)
    except Exception:  # the learner's own exception class can fail even here
        text = ""
    return (text.strip().splitlines() or ["no message"])[0][:200]


def find_mistake(exercise: Exercise, cases: list[tuple], outcomes: list[Outcome], wrong: list[bool]) -> Mistake | None:
    """The mistake that explains the learner's answers in all cases, or else in most of those that are wrong."""
    explained = {}
    for mistake in exercise.mistakes:
        equal = [is_same(call(mistake.function, case), got) for case, got in zip(cases, outcomes, strict=True)]
        if all(equal):
            return mistake
        explained[mistake.name] = sum(e and w for e, w in zip(equal, wrong, strict=True))
    nearest = max(exercise.mistakes, key=lambda mistake: explained[mistake.name])
    return nearest if explained[nearest.name] > sum(wrong) / 2 else None


def is_same(a: Outcome, b: Outcome) -> bool:
    """Whether two calls returned the same, or raised the same error."""
    if a.error is not None or b.error is not None:
        return type(a.error) is type(b.error) and first_line(a.error) == first_line(b.error)
    return compare(b.value, a.value) is None and compare(b.changed, a.changed) is None


# --- comparing ------------------------------------------------------------------------------------------------------


def describe(value: Any) -> str:
    """What a value is, in a few words: "None", "a tensor of shape [2, 3]"."""
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, torch.Tensor) else "numpy array"
        return f"a {kind} of shape {list(value.shape)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def compare(got: Any, want: Any) -> str | None:
    """A sentence on the first difference, in the order type, shape, dtype, NaN, values; None if there is none."""
    if got is None and want is not None:
        return "it returns None: is there a `return`?"
    if isinstance(want, torch.Tensor | np.ndarray):
        return compare_arrays(got, want)
    if isinstance(want, list | tuple):
        return compare_sequences(got, want)
    if isinstance(want, Real) and not isinstance(want, bool):
        return compare_numbers(got, want)
    if type(got) is not type(want):
        return f"it returns {describe(got)}, expected {describe(want)}."
    return None if got == want else f"it returns {got!r}, expected {want!r}."


def compare_arrays(got: Any, want: torch.Tensor | np.ndarray) -> str | None:
    if not isinstance(got, torch.Tensor if isinstance(want, torch.Tensor) else np.ndarray):
        return f"it returns {describe(got)}, expected {describe(want)}."
    if tuple(got.shape) != tuple(want.shape):
        return f"it returns shape {list(got.shape)}, expected {list(want.shape)}."
    if got.dtype != want.dtype:
        return f"it returns dtype {got.dtype}, expected {want.dtype}."
    a, b = to_numpy(got), to_numpy(want)
    if a.dtype.kind == "f":
        unexpected = int((np.isnan(a) & ~np.isnan(b)).sum())
        if unexpected:
            return f"{unexpected} of {a.size} values {'is' if unexpected == 1 else 'are'} NaN."
    different = differs(a, b)
    if not different.any():
        return None
    count, index = int(different.sum()), tuple(int(i) for i in np.argwhere(different)[0])
    yours, expected = format_number(a[index]), format_number(b[index])
    if a.size == 1:
        return f"it returns {yours}, expected {expected}."
    many = f"{count} of {a.size} values {'differs' if count == 1 else 'differ'}"
    return f"{many}; the first is at {list(index)}: yours is {yours}, expected {expected}."


def format_number(value: np.generic) -> str:
    return str(value) if value.dtype.kind == "b" else f"{value:.6g}"


def to_numpy(array: torch.Tensor | np.ndarray) -> np.ndarray:
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


def compare_sequences(got: Any, want: list | tuple) -> str | None:
    if not isinstance(got, list | tuple):
        return f"it returns {describe(got)}, expected a {type(want).__name__} of length {len(want)}."
    if len(got) != len(want):
        return f"it returns a {type(got).__name__} of length {len(got)}, expected length {len(want)}."
    for i, (a, b) in enumerate(zip(got, want, strict=True), start=1):
        if problem := compare(a, b):
            return f"in item {i}, {problem}"
    return None


def compare_numbers(got: Any, want: Real) -> str | None:
    if isinstance(got, torch.Tensor | np.ndarray) and math.prod(got.shape) == 1:
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, Real):
        return f"it returns {describe(got)}, expected a number."
    if math.isnan(got) and not math.isnan(want):
        return f"it returns NaN, expected {want:.6g}."
    if isinstance(want, int):
        return None if got == want else f"it returns {got}, expected {want}."
    if differs(np.array(float(got)), np.array(float(want))).any():
        return f"it returns {got:.6g}, expected {want:.6g}."
    return None
