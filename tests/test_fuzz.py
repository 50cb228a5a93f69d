"""A few hundred cases of every kind of fuzz.py. Thousands take minutes: ``python tests/fuzz.py --cases 5000``."""

import jaxtyping
import pytest
import torch
from fuzz import KINDS, RIGHT, SAME, Bench, Case, outcome, run

CASES = {"configs": 100, "weights": 100, "masks": 40, "images": 200, "prompts": 300, "commands": 60}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Without the type checker, as for users of the package."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield Bench(tmp_path_factory.mktemp("fuzz"))
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # PIL warns about damaged files
def test_every_damage_is_harmless_or_refused(kind, bench):
    findings = [finding for _, finding in (run(bench, kind, 2, number) for number in range(CASES[kind])) if finding]
    assert not findings, "\n".join(findings)


def fail(error: Exception):
    raise error


@pytest.mark.parametrize(
    "answer",
    [
        lambda: "another",
        lambda: fail(TypeError("x")),
        lambda: fail(ValueError("two\nlines")),
        lambda: fail(ValueError("\x1b[31m")),
        lambda: fail(ValueError("")),
        lambda: fail(UnicodeDecodeError("utf-8", b"x", 0, 1, "x")),
        lambda: torch.tensor([float("nan")]),
    ],
)
def test_the_fuzzer_finds(answer):
    """Everything that is not an answer or a sentence."""
    assert outcome(Case("", SAME, answer, "this")) not in RIGHT[SAME]
