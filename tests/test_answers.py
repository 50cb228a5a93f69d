"""Held-out answers, written without looking at the declared mistakes: right ones pass, wrong ones are told the cause.

One file per exercise, ``answers/NN_k_name.py``, with functions ``right_1``, ``right_2``, …, ``wrong_1``, ``wrong_2``, …
The docstring of a wrong answer is a regular expression for its cause, which the message must contain (any case).
"""

import importlib.util
import re
from functools import cache
from pathlib import Path

import jaxtyping
import pytest

from minivlm.course.exercises import EXERCISES
from minivlm.course.exercises.exercise import Result, examine

FILES = sorted((Path(__file__).parent / "answers").glob("*.py"))


def functions(path: Path) -> dict:
    spec = importlib.util.spec_from_file_location(f"answers_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: f for name, f in vars(module).items() if re.fullmatch(r"(right|wrong)_\d+", name)}


ANSWERS = [(path.stem, name, function) for path in FILES for name, function in functions(path).items()]
RIGHT, WRONG = ([a for a in ANSWERS if a[1].startswith(kind)] for kind in ("right", "wrong"))
ids = lambda answers: [f"{file}-{name}" for file, name, _ in answers]  # noqa: E731


@pytest.fixture(autouse=True)
def no_shape_checker(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@cache
def result_of(file: str, function) -> Result:
    chapter, number, name = file.split("_", 2)
    assert EXERCISES[name].key == f"{chapter}.{number}", f"{file}.py: exercise {EXERCISES[name].key} is {name}"
    return examine(EXERCISES[name], function, seed=3)


@pytest.mark.parametrize(("file", "name", "function"), RIGHT, ids=ids(RIGHT))
def test_right_answer_passes(file, name, function):
    assert result_of(file, function).passed, result_of(file, function)


@pytest.mark.parametrize(("file", "name", "function"), WRONG, ids=ids(WRONG))
def test_wrong_answer_is_rejected(file, name, function):
    assert function.__doc__, "the docstring is the expression that the message must match"
    assert not result_of(file, function).passed


def test_nearly_all_messages_point_at_the_cause():
    missed = []
    for file, name, function in WRONG:
        message = str(result_of(file, function))
        if not re.search(function.__doc__.strip(), message, re.IGNORECASE | re.DOTALL):
            missed.append(f"{file} {name} should match {function.__doc__.strip()!r}:\n{message}")
    listing = "\n\n".join(missed)
    print(listing)
    share = 1 - len(missed) / len(WRONG)
    assert share >= 0.9, f"{share:.0%} of {len(WRONG)} messages point at the cause. The others:\n\n{listing}"
