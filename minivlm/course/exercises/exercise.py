"""An exercise: a reference, random cases to try, and the mistakes that people make.

A check runs the learner's function and the reference on random cases and compares what they return, in this order:
type, shape, dtype, NaN, values, changed arguments, then gradients. If the answers equal those of a known mistake, in
all cases or in most of those that are wrong, the message names the mistake. Otherwise ``diagnosis`` looks for the
cause. Whatever the learner's function does, a check answers with a sentence, and in finite time.
"""

import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import torch

from minivlm.course.exercises.calling import (
    SECONDS,
    TIMES,
    Case,
    Outcome,
    OutOfTime,
    call,
    leaves,
    shares_memory,
)
from minivlm.course.exercises.comparing import compare, describe
from minivlm.course.exercises.diagnosis import diagnose

__all__ = ["Case", "Exercise", "Mistake", "Result", "call", "compare", "compare_outcomes", "describe", "examine"]

MATCHING = 1e-4  # how closely an answer must equal a known mistake, relative to its largest value
GRADIENTS = 1e-4  # how closely gradients must agree, relative to the largest


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
        cases: Takes a random generator and yields ``Case`` objects or plain argument tuples, all different.
        difficulty: 1 to 3 stars.
        hints: The idea, then the operation or the shape of the line, in Markdown.
        name: Name of the function. Default: that of the reference.
        outputs: Names of the items if the function returns a tuple: ("input_ids", "attention_mask", …).
    """

    key: str
    reference: Callable
    cases: Callable[[np.random.Generator], Iterable[Case | tuple]]
    mistakes: tuple[Mistake, ...]
    difficulty: int
    minutes: int
    hints: tuple[str, str]
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
    def parameters(self) -> tuple[str, ...]:
        """Names of the function's parameters."""
        return tuple(inspect.signature(self.reference).parameters)

    @property
    def is_in_package(self) -> bool:
        """Whether the reference is a function of the package, not one written for the exercise."""
        return not self.reference.__module__.startswith("minivlm.course.exercises")

    @property
    def plugs_in(self) -> bool:
        """Whether the model calls this function to answer. The losses are for training, ``course`` measures it."""
        module = self.reference.__module__
        return self.is_in_package and module != "minivlm.losses" and not module.startswith("minivlm.course")


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
        return for_console("\n".join((head + self.message, *self.notes)))

    __repr__ = __str__

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        color = "#009E73" if self.passed else "#D55E00" if self.attempted else "#777777"
        style = f"border-left: 4px solid {color}; padding: 2px 10px; white-space: pre-wrap"
        return {"text/plain": str(self), "text/html": f'<div style="{style}">{escape(str(self))}</div>'}


def for_console(text: str) -> str:
    """The text, with escapes for characters that the console does not have, such as ✓ on an ASCII one."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


# --- checking -------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One case: what the learner's function did, what the reference did, and what is wrong, if anything.

    Attributes:
        problem: A sentence.
        is_gradient: Whether only the gradient is wrong.
        is_own: Whether the answer is right, but comes from the reference.
    """

    case: Case
    want: Outcome
    got: Outcome = field(default_factory=Outcome)
    problem: str | None = None
    is_gradient: bool = False
    is_own: bool = False

    @property
    def sentence(self) -> str:
        """The problem, with the name of the case."""
        return ", ".join(filter(None, (str(self.case), self.problem)))


@torch.inference_mode(False)
@torch.enable_grad()
def examine(exercise: Exercise, function: Any, seed: int) -> Result:
    """Check a function without saving anything."""
    cases = [Case.of(case) for case in exercise.cases(np.random.default_rng(seed))]
    if problem := find_signature_problem(exercise, function, cases):
        return Result(f"not yet: {problem}", exercise)
    names = exercise.parameters
    trials = [Trial(case, call(exercise.reference, case, names=names)) for case in cases]
    for number, trial in enumerate(trials, start=1):
        limit = max(SECONDS, TIMES * trial.want.seconds)
        trial.got = call(function, trial.case, names=names, seconds=limit, reference=exercise.reference)
        if number == 1 and isinstance(trial.got.error, NotImplementedError):
            return Result("not attempted yet.", exercise, attempted=False)
        if isinstance(trial.got.error, OutOfTime):
            score = sum(t.problem is None for t in trials[: number - 1]) / len(trials)
            where = f" {trial.case}" if trial.case.name else ""
            late = f"it did not finish within {limit:.2g} seconds{where}: is there a loop that never ends?"
            return Result(f"not yet: {late}", exercise, score=score)
        trial.problem = compare_outcomes(trial.got, trial.want, function, exercise.outputs)
    if not any(trial.problem for trial in trials):
        for trial in trials:
            if trial.got.ran_reference:
                trial.problem, trial.is_own = "it calls the package's own function. Write it yourself.", True
            elif problem := find_gradient_problem(exercise, function, trial):
                trial.problem, trial.is_gradient = problem, True
    return report(exercise, function, trials)


def report(exercise: Exercise, function: Callable, trials: list[Trial]) -> Result:
    """The result: passed, a known mistake, a diagnosis, or the first difference."""
    wrong = [trial for trial in trials if trial.problem]
    right = len(trials) - len(wrong)
    if not wrong:
        return Result(f"passed all {right} random cases.", exercise, passed=True, score=1.0)
    # an answer that comes from the reference is right, but does not count
    score = sum(not trial.problem and not trial.got.ran_reference for trial in trials) / len(trials)
    first = wrong[0].sentence
    if mistake := find_mistake(exercise, trials):
        return Result(f"not yet: it {mistake.name}.", exercise, False, True, score, mistake.name, (mistake.hint, first))
    share = f" ({right} of {len(trials)} random cases are right)" if right else ""
    cause = None
    if not wrong[0].is_gradient and not wrong[0].is_own:
        cause = diagnose(
            exercise.reference,
            *zip(*((trial.case, trial.got, trial.want) for trial in wrong), strict=True),
            rerun=lambda case: call(function, case, names=exercise.parameters),
        )
    named = [f"“{trial.case.name}”" for trial in wrong]
    if right and all(trial.case.name for trial in wrong) and len(wrong) <= max(2, len(trials) // 2):
        where = f"it is right except in the case{'s' * (len(named) > 1)} {' and '.join(named)}"
        cause = f"{where}. There, {cause}" if cause else where
    if cause is None:
        return Result(f"not yet: {first}{share}", exercise, score=score)
    is_value = "values differ" in first or "value differs" in first
    note = f"{'The shape and dtype are right. ' if is_value else ''}{first[0].upper()}{first[1:]}{share}"
    return Result(f"not yet: {cause}{'' if cause[-1] in '.?' else '.'}", exercise, score=score, notes=(note,))


def find_signature_problem(exercise: Exercise, function: Any, cases: list[Case]) -> str | None:
    """A sentence if this cannot be called with the exercise's arguments."""
    if function is exercise.reference:
        return "this is the package's own function. Write it yourself."
    expected = inspect.signature(exercise.reference).parameters
    wanted = ", ".join(expected)
    if not callable(function):
        return f"expected a function of ({wanted}) but got {describe(function)}."
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    empty = inspect.Parameter.empty
    for case in cases:
        try:
            bound = signature.bind(*case.arguments, **case.keywords)
        except TypeError:
            for name, parameter in expected.items():
                own = signature.parameters.get(name)
                if parameter.default is not empty and own is not None and own.default is empty:
                    return f"`{name}` needs a default, {parameter.default!r}: `def …({name}={parameter.default!r})`."
            return f"it takes ({', '.join(signature.parameters)}) but should take ({wanted})."
        passed = inspect.signature(exercise.reference).bind(*case.arguments, **case.keywords).arguments
        for name, own in signature.parameters.items():
            default = expected[name].default if name in expected else empty
            if name in bound.arguments or name in passed or own.default is empty or default is empty:
                continue
            if type(own.default) is not type(default) or repr(own.default) != repr(default):
                return f"the default of `{name}` is {own.default!r}, but should be {default!r}."
    return None


def compare_outcomes(got: Outcome, want: Outcome, function: Callable, outputs: tuple[str, ...] = ()) -> str | None:
    """A sentence on what is wrong in one case, or None. If the reference raises, the same kind of error is expected."""
    if want.error is not None:
        if type(got.error) is type(want.error):
            return None
        instead = f", but raises {type(got.error).__name__}: {first_line(got.error)}" if got.error else ""
        return f"it should raise {type(want.error).__name__} in this case ({first_line(want.error)}){instead}."
    if got.error is not None:
        text = f"it raises {type(got.error).__name__}{locate(got.error, function)}: {first_line(got.error)}"
        return text + explain_error(got.error, want.inputs)
    if problem := compare(got.value, want.value, outputs):
        return problem
    for name in got.changed:
        if name not in want.changed and name.split("[")[0].split(".")[0] not in want.changed:
            return f"the result is right, but it changes `{name}` in place: work on a copy."
    for name, value in want.changed.items():
        if name not in got.changed:
            return f"the result is right, but it should write into `{name}` in place, and doesn't."
        if problem := compare(got.changed[name], value):
            return f"the result is right, but what it writes into `{name}` is wrong: {problem}"
    return find_sharing_problem(got, want)


def find_sharing_problem(got: Outcome, want: Outcome) -> str | None:
    """A sentence if a result should be a view of an argument that the function writes into, and is not."""
    results = leaves(got.value)
    for result, value in leaves(want.value).items():
        for name, changed in want.changed.items():
            if shares_memory(value, changed) and not shares_memory(results[result], got.changed[name]):
                return f"the result is right, but it is a copy: it should be a view of `{name}`."
    return None


def locate(error: BaseException, function: Callable) -> str:
    """The line, as in "… on line 3 of your function", or nothing if the traceback does not tell."""
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


SHAPE_ERROR = re.compile(
    r"size of tensor|shapes? cannot|must match|broadcast|invalid for input|dimension|expanded size|size mismatch|shape",
    re.IGNORECASE,
)


def explain_error(error: BaseException, inputs: dict) -> str:
    """The likely cause of an error: a name that is not defined, or shapes that do not fit."""
    end = "" if first_line(error)[-1:] in ".?!" else "."
    if isinstance(error, NameError) and getattr(error, "name", None):
        return f"{end} Define or import `{error.name}` inside the function, or in a cell before it."
    if isinstance(error, RuntimeError | ValueError | IndexError) and SHAPE_ERROR.search(first_line(error)):
        arrays = {name: leaf for name, leaf in leaves(inputs).items() if hasattr(leaf, "shape")}
        if arrays:
            shapes = ", ".join(f"{name} {list(leaf.shape)}" for name, leaf in list(arrays.items())[:6])
            return f"{end} The shapes of the arguments are {shapes}."
    return end


# --- known mistakes -------------------------------------------------------------------------------------------------


def find_mistake(exercise: Exercise, trials: list[Trial]) -> Mistake | None:
    """The mistake that explains the learner's answers in all cases, or else in most of those that are wrong."""
    wrong = [trial for trial in trials if trial.problem]
    if wrong[0].is_own:
        return None
    if wrong[0].is_gradient:
        return find_gradient_mistake(exercise, trials)
    calls = {
        mistake.name: [call(mistake.function, trial.case, names=exercise.parameters) for trial in trials]
        for mistake in exercise.mistakes
    }
    for text_of in (first_line, strip):  # errors with equal messages first
        for mistake in exercise.mistakes:
            both = zip(calls[mistake.name], trials, strict=True)
            if all(is_same(theirs, trial.got, text_of) for theirs, trial in both):
                return mistake
    explained = {mistake.name: explains(mistake, calls[mistake.name], trials) for mistake in exercise.mistakes}
    nearest = max(exercise.mistakes, key=lambda mistake: explained[mistake.name], default=None)
    return nearest if nearest and explained[nearest.name] > len(wrong) / 2 else None


def explains(mistake: Mistake, calls: list[Outcome], trials: list[Trial]) -> int:
    """How many wrong cases a mistake explains. An error of the same type counts only beside an equal value."""
    same = [
        (theirs.error is None, is_same(theirs, trial.got, strip))
        for theirs, trial in zip(calls, trials, strict=True)
        if trial.problem and compare_outcomes(theirs, trial.want, mistake.function)
    ]
    errors = [
        theirs.error is not None and type(theirs.error) is type(trial.got.error)
        for theirs, trial in zip(calls, trials, strict=True)
        if trial.problem
    ]
    has_value = any(is_value and equal for is_value, equal in same)
    return max(sum(equal for _, equal in same), has_value and sum(e for e in errors) + sum(v and e for v, e in same))


def find_gradient_mistake(exercise: Exercise, trials: list[Trial]) -> Mistake | None:
    """The mistake with right values whose gradients are wrong in the same way."""
    wrong = [trial for trial in trials if trial.problem]
    for mistake in exercise.mistakes:
        calls = ((call(mistake.function, trial.case, names=exercise.parameters), trial) for trial in trials)
        if any(compare_outcomes(theirs, trial.want, mistake.function) for theirs, trial in calls):
            continue
        if all(find_gradient_problem(exercise, mistake.function, trial) == trial.problem for trial in wrong):
            return mistake
    return None


def is_same(a: Outcome, b: Outcome, text_of: Callable) -> bool:
    """Whether two calls returned the same, or raised the same error, judged by the text of its message."""
    if a.error is not None or b.error is not None:
        return type(a.error) is type(b.error) and text_of(a.error) == text_of(b.error)
    if a.changed.keys() != b.changed.keys() or compare(b.value, a.value, tolerance=MATCHING):
        return False
    return not any(compare(b.changed[name], a.changed[name], tolerance=MATCHING) for name in a.changed)


def strip(error: BaseException) -> str:
    """An error's message without its numbers."""
    return re.sub(r"\d+", "#", first_line(error))


# --- gradients ------------------------------------------------------------------------------------------------------


def find_gradient_problem(exercise: Exercise, function: Callable, trial: Trial) -> str | None:
    """A sentence if the value is right, but its gradients are not those of the reference's value.

    Skipped in half precision, where inputs are not finite, and at kinks, where the reference's own gradient jumps.
    """
    inputs = leaves(trial.want.inputs)
    floats = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    is_usable = floats and all(x.dtype.itemsize >= 4 and bool(x.isfinite().all()) for x in floats)
    if trial.want.error is not None or not is_usable:
        return None
    want, _ = gradients_of(exercise.reference, exercise, trial.case)
    if not want or not all(bool(g.isfinite().all()) for g in want.values()):
        return None
    nudged, _ = gradients_of(exercise.reference, exercise, nudge(trial.case))
    if nudged.keys() != want.keys() or not all(largest(nudged[n] - want[n]) <= 0.01 * largest(want[n]) for n in want):
        return None
    limit = max(SECONDS, TIMES * trial.want.seconds)
    got, error = gradients_of(function, exercise, trial.case, limit)
    if isinstance(error, OutOfTime):
        return f"its value is right, but with gradients it did not finish within {limit:.2g} seconds."
    advice = "do not use .item(), .detach(), torch.no_grad or numpy in it."
    # gradients far below output/input, such as those of a saturated softmax, are little more than rounding
    size = max((largest(y) for y in leaves(trial.want.value).values()), default=0.0)
    scale = {name: size / max(largest(inputs[name]), 1e-30) for name in want}
    flows = [name for name in want if largest(want[name]) > 1e-3 * scale[name]]
    if error is not None and re.search(r"in-?place", first_line(error)):
        return (
            "its value is right, but it has no gradient: an in-place operation (such as += or a method whose name ends "
            "in _) overwrites a value that the gradient needs. Create a new tensor instead."
        )
    if error is not None and "numpy" not in first_line(error):
        return f"its value is right, but its gradient fails ({type(error).__name__}: {first_line(error)})."
    missing = [f"`{name}`" for name in flows if name not in got or largest(got[name]) == 0]
    if missing:
        return f"its value is right, but no gradient flows back to {' and '.join(missing)}: {advice}"
    for name in flows:
        if largest(got[name] - want[name]) <= GRADIENTS * max(largest(want[name]), scale[name]):
            continue
        if not bool(got[name].isfinite().all()):
            return f"its value is right, but the gradient for `{name}` is not finite: is something 0/0 on the way?"
        return (
            f"its value is right, but the gradient for `{name}` is not: part of it does not flow, so {advice} "
            f"{compare(got[name], want[name])}"
        )
    return None


def gradients_of(
    function: Callable, exercise: Exercise, case: Case, seconds: float = SECONDS
) -> tuple[dict[str, torch.Tensor], BaseException | None]:
    """Gradients for all floating-point tensors among the arguments, by name, and the error if there is one.

    They are those of the output times fixed random numbers, summed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about conversions that lose the gradient
        outcome = call(function, case, names=exercise.parameters, seconds=seconds, gradients=True)
    if outcome.error is not None:
        return {}, outcome.error
    inputs = {name: x for name, x in leaves(outcome.inputs).items() if isinstance(x, torch.Tensor) and x.requires_grad}
    outputs = [y for y in leaves(outcome.value).values() if isinstance(y, torch.Tensor) and y.requires_grad]
    if not outputs:
        return {}, None
    generator = torch.Generator().manual_seed(0)
    weights = [(torch.rand(y.shape, generator=generator) + 0.5).to(y.dtype) for y in outputs]
    try:
        found = torch.autograd.grad(outputs, list(inputs.values()), weights, allow_unused=True)
    except RuntimeError as error:
        return {}, error
    return {name: gradient for name, gradient in zip(inputs, found, strict=True) if gradient is not None}, None


def nudge(case: Case) -> Case:
    """The case with floating-point tensors moved by a little."""
    generator = torch.Generator().manual_seed(1)

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator).to(value.dtype)
            return value + 1e-5 * largest(value) * noise
        if isinstance(value, dict):
            return {key: moved(part) for key, part in value.items()}
        if hasattr(value, "_fields"):
            return type(value)(*map(moved, value))
        return type(value)(map(moved, value)) if isinstance(value, list | tuple) else value

    return Case(moved(tuple(case.arguments)), case.name, moved(case.keywords))


def largest(x: Any) -> float:
    """The largest finite absolute value, 0 if there is none. NaN, which is within no limit, if there is one."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.numel():
        return 0.0
    x = x.detach().abs()
    return float(x.masked_fill(x.isinf(), 0).max())
