"""What is wrong with an answer of the learner's: where it differs first, by how much, and why."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import signature

import numpy as np

from minivlm.course.capstone.mistakes import Known
from minivlm.course.capstone.process import Failed, Learner, NotWritten
from minivlm.course.capstone.reference import short
from minivlm.course.exercises.calling import Case, Outcome
from minivlm.course.exercises.comparing import compare
from minivlm.course.exercises.diagnosis import diagnose

EXPLAINED = 0.02  # what may remain of the difference if a known mistake explains it
ROUNDING = 5e-6  # relative to the largest value


class Different(Exception):
    """Something is wrong. The first argument is the sentence that says what, the others are notes."""


@dataclass(frozen=True)
class Question:
    """One function of the learner's, on a few inputs.

    Attributes:
        where: Completes a sentence: "on a small PaliGemma 2 with random weights".
        ask: The learner's function on arrays. Raises ``Failed`` or ``NotWritten``.
        answer: The right one.
        cases: The arguments.
        known: The mistakes to look for.
        inside: The right intermediate values by name, in order, from the same arguments; None if there are none.
    """

    where: str
    ask: Callable[..., np.ndarray]
    answer: Callable[..., np.ndarray]
    cases: list[Case]
    known: Callable[[], Iterable[Known]] = tuple
    inside: Callable[..., dict[str, np.ndarray]] | None = None


@dataclass(frozen=True)
class Trial:
    """A wrong answer."""

    case: Case
    got: np.ndarray
    want: np.ndarray
    problem: str
    seen: dict[str, np.ndarray]


def examine(question: Question, learner: Learner) -> None:
    """Raises ``Different`` if an answer is wrong. ``Failed`` and ``NotWritten`` pass through."""
    wrong = []
    for case in map(Case.of, question.cases):
        want = question.answer(*case.arguments)
        got = question.ask(*case.arguments)
        if problem := compare(got, want):
            wrong.append(Trial(case, got, want, problem, learner.seen))
    if wrong:
        raise Different(*explain(question, wrong))


def explain(question: Question, wrong: list[Trial]) -> list[str]:
    """The cause, and notes: a hint, the first intermediate value that is wrong, and by how much the result is."""
    first, notes = wrong[0], []
    inside, cause = find_inside(question, first), None
    if known := find_known(question, wrong):
        cause = f"{known.sentence}."
        notes.append(known.hint)
    elif cause := relation(question, wrong):
        cause += "" if cause[-1] in ".?" else "."
    if inside:
        notes.append(inside)
        cause = cause or inside
    case = f", in the case “{first.case.name}”" if first.case.name else ""
    size = f" The largest difference is {error:.2g} of the largest value." if (error := relative_error(first)) else ""
    much = f"{question.where[0].upper()}{question.where[1:]}{case}, {first.problem}{size}"
    first_line = cause or much
    return [first_line[0].upper() + first_line[1:], *(note for note in (*notes, much) if note != cause)]


def relative_error(trial: Trial) -> float | None:
    got, want = trial.got, trial.want
    if got.shape != want.shape or got.dtype.kind != "f" or not np.isfinite(got).all():
        return None
    return distance(got, want)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference divided by the largest value of ``b``; infinite if shapes differ or there is NaN."""
    if a.shape != b.shape or a.dtype.kind != b.dtype.kind:
        return float("inf")
    apart = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0)
    return float(apart / max(np.abs(b.astype(np.float64)).max(initial=0.0), 1e-30)) if np.isfinite(apart) else np.inf


def find_known(question: Question, wrong: list[Trial]) -> Known | None:
    """The first known mistake that gives the learner's answers."""
    apart = [distance(trial.got, trial.want) for trial in wrong]
    for known in question.known():
        if all(explains(known, question.answer, trial, size) for trial, size in zip(wrong, apart, strict=True)):
            return known
    return None


def explains(known: Known, answer: Callable, trial: Trial, apart: float) -> bool:
    try:
        with np.errstate(all="ignore"), known.inside():
            other = answer(*trial.case.arguments)
    except Exception:  # many mistakes end in an error
        return False
    left = distance(trial.got, other)
    return left <= max(EXPLAINED * min(apart, 1.0), ROUNDING) and left < 0.3 * apart


def find_inside(question: Question, trial: Trial) -> str | None:
    """A sentence about the first intermediate value that is wrong, in the order of computation."""
    if question.inside is None or not trial.seen:
        return None
    seen = {short(name): value for name, value in trial.seen.items()}
    right = ""
    for name, want in question.inside(*trial.case.arguments).items():
        if name in seen:
            if problem := compare(seen[name], want):
                far = distance(seen[name], want)
                size = f" (by {far:.2g} of the largest value)" if np.isfinite(far) else ""
                before = f" Before it, {right} is right." if right else ""
                return f"The first intermediate value that differs is {name}{size}: {problem}{before}"
            right = name
    return None


def relation(question: Question, wrong: list[Trial]) -> str | None:
    """The relation of the answers to the right ones, by the diagnosis of the exercises."""

    def rerun(case: Case) -> Outcome:
        try:
            return Outcome(question.ask(*case.arguments))
        except (Failed, NotWritten) as error:
            return Outcome(error=error)

    if any(np.isnan(trial.got).any() for trial in wrong):  # NaN is related to anything
        return None
    names, inputs = list(signature(question.answer).parameters), [trial.case.arguments for trial in wrong]
    inputs = [dict(zip(names, values, strict=False)) for values in inputs]
    got = [Outcome(trial.got, inputs=by_name) for trial, by_name in zip(wrong, inputs, strict=True)]
    want = [Outcome(trial.want, inputs=by_name) for trial, by_name in zip(wrong, inputs, strict=True)]
    with np.errstate(all="ignore"):
        return diagnose(question.answer, [trial.case for trial in wrong], got, want, rerun)
