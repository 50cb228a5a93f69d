"""Every exercise: the solution passes, the stub is "not attempted", mistakes are named, garbage gets a sentence.

Learners run checks without the shape checker, and so do these tests, except where references meet their own cases.
"""

import functools
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minivlm
from minivlm import emoji, masks
from minivlm.course import exercises
from minivlm.course.chapters import CHAPTERS
from minivlm.course.exercises import EXERCISES, Case, Exercise, exercise, saved
from minivlm.course.exercises.__main__ import table
from minivlm.course.exercises.exercise import call, compare_outcomes, examine
from minivlm.course.exercises.patch import replaced

SOURCES = Path(__file__).resolve().parents[1] / "notebooks" / "source"
EACH = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda e: f"{e.key} {e.name}")
MISTAKES = [(e, m) for e in EXERCISES.values() for m in e.mistakes]


@pytest.fixture(autouse=True)
def learners_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIVLM_HOME", str(tmp_path / "learner"))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    return tmp_path / "learner"


def solutions() -> dict[str, str]:
    """Source of every solved exercise, from the chapters."""
    found = {}
    for path in sorted(SOURCES.rglob("*.py")):
        for cell in path.read_text(encoding="utf-8").split("\n# %%"):
            if "### BEGIN SOLUTION" in cell:
                name = re.search(r"^def (\w+)", cell, re.MULTILINE).group(1)
                found[name] = cell.split("\n", 1)[1]
    return found


SOLUTIONS = solutions()


def save_source(name: str, source: str) -> None:
    path = saved.path_of(EXERCISES[name])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


# --- the declarations -----------------------------------------------------------------------------------------------


def test_a_chapter_has_three_to_five_exercises_and_a_lab_two_to_four():
    per_chapter = {number: len(exercises.in_chapter(number)) for number in CHAPTERS}
    assert all((2 if number[0] == "L" else 3) <= count <= 5 for number, count in per_chapter.items()), per_chapter
    assert sum(per_chapter.values()) >= 30


@EACH
def test_declaration_is_complete(exercise):
    assert len(exercise.mistakes) >= 5
    assert len({m.name for m in exercise.mistakes}) == len(exercise.mistakes)
    assert exercise.difficulty in (1, 2, 3) and exercise.minutes > 0
    assert len(set(exercise.hints)) == 2 and all(hint[-1] in ".?`" and len(hint) < 400 for hint in exercise.hints)
    for mistake in exercise.mistakes:
        assert mistake.hint[-1] in ".?`" and mistake.name[0].islower() and mistake.name[-1] != "."


@EACH
def test_hints_do_not_contain_the_solution(exercise):
    body = inspect.getsource(inspect.unwrap(exercise.reference)).split('"""')[-1].split("\n")
    lines = {line.strip().removeprefix("return ") for line in body}
    assert not any(line in hint for hint in exercise.hints for line in lines if len(line) > 40)


def test_two_hints_come_before_a_solution():
    with pytest.raises(ValueError, match="did you mean 'geglu'"):
        exercises.hint("geglo")
    shown = [exercises.hint(name) for name in ("geglu", minivlm.gemma.geglu, "geglu", "geglu")]
    for text, result in zip(EXERCISES["geglu"].hints, shown, strict=False):
        assert text in str(result) and "def geglu" not in str(result)
    assert "def geglu" in str(shown[2]) and str(shown[3]) == str(shown[2])


def test_chapters_are_declared_with_time_for_their_exercises():
    modules = {path.name for path in Path(minivlm.__file__).parent.glob("*.py")}
    for number, chapter in CHAPTERS.items():
        assert number == chapter.number and chapter.question.endswith("?") and set(chapter.modules) <= modules
        assert chapter.minutes > sum(e.minutes for e in exercises.in_chapter(number))
    assert {e.chapter for e in EXERCISES.values()} == set(CHAPTERS)


@EACH
def test_cases_follow_the_seed(exercise):
    one, again, other = (list(exercise.cases(np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert len(one) >= 3
    assert str(one) == str(again) != str(other)


@EACH
def test_reference_answers_every_case_the_same_way_twice(exercise, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", False)
    for seed in range(3):
        for case in exercise.cases(np.random.default_rng(seed)):
            first, second = call(exercise.reference, case), call(exercise.reference, case)
            assert first.error is None
            assert compare_outcomes(first, second, exercise.reference) is None


@pytest.mark.slow
@pytest.mark.parametrize(("exercise", "mistake"), MISTAKES, ids=lambda x: getattr(x, "name", ""))
def test_known_mistake_is_rejected_and_named(exercise, mistake):
    for seed in (0, 1, 2):
        result = examine(exercise, mistake.function, seed)
        assert not result.passed and result.attempted
        assert result.mistake == mistake.name, result
        assert mistake.hint in str(result)


def test_the_teachers_table_is_up_to_date():
    text = (SOURCES.parents[1] / "docs" / "teaching.md").read_text(encoding="utf-8")
    between = text.split("<!-- exercises -->")[1].split("<!-- /exercises -->")[0]
    assert between.strip() == table().strip(), "python -m minivlm.course.exercises prints it"


# --- solutions and stubs --------------------------------------------------------------------------------------------


def test_every_exercise_has_a_solution():
    assert set(SOLUTIONS) == set(EXERCISES)


@EACH
def test_solution_passes_and_loads(exercise, learners_folder):
    save_source(exercise.name, SOLUTIONS[exercise.name])
    function, problem = exercises.load_own(exercise)
    assert function, problem
    for seed in range(20):  # whatever a class uses: a right answer must never fail
        result = examine(exercise, function, seed)
        assert result.passed and result.score == 1, result
    assert exercises.piece(exercise.name).__code__.co_name == exercise.name


@EACH
def test_stub_is_not_attempted(exercise):
    def stub(*args, **keywords):
        raise NotImplementedError("write your solution here")

    result = examine(exercise, stub, 0)
    assert not result.attempted and not result.passed and result.score == 0
    assert "not attempted yet" in str(result)


# --- garbage --------------------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.builds(lambda shape: torch.full(shape, float("nan")), st.lists(st.integers(0, 4), max_size=4)),
    st.builds(lambda shape: torch.zeros(shape, dtype=torch.long), st.lists(st.integers(0, 4), max_size=4)),
    st.builds(lambda shape: np.ones(shape), st.lists(st.integers(0, 4), max_size=4)),
    st.just(object()),
    st.just(torch.zeros),
)
ERRORS = st.sampled_from([ValueError("no"), KeyError(3), RecursionError(), SystemExit(1), ZeroDivisionError("x\ny")])


@settings(max_examples=100)
@given(st.sampled_from(sorted(EXERCISES)), VALUES)
def test_garbage_answers_get_a_sentence(name, value):
    result = examine(EXERCISES[name], lambda *args, **keywords: value, 0)
    assert not result.passed
    assert re.search(r"\w.*[.`?)]$", str(result).strip(), re.DOTALL)


@settings(max_examples=50)
@given(st.sampled_from(sorted(EXERCISES)), ERRORS)
def test_functions_that_raise_get_a_sentence(name, error):
    def broken(*args, **keywords):
        raise error

    result = examine(EXERCISES[name], broken, 0)
    assert not result.passed
    assert type(error).__name__ in str(result)
    assert "Traceback" not in str(result)


@settings(max_examples=100)
@given(VALUES)
def test_values_instead_of_functions_get_a_sentence(value):
    assert not exercises.check(value).passed
    assert not exercises.check(value, name="block_mask").passed


# --- what a message says --------------------------------------------------------------------------------------------


def message(function, name="block_mask"):
    return str(examine(EXERCISES[name], function, 0))


def test_messages_go_from_type_to_value():
    right = passing
    assert "is there a `return`" in message(lambda mask_ar: None)
    assert "expected a tensor of shape" in message(lambda mask_ar: mask_ar.numpy())
    assert "returns shape" in message(lambda mask_ar: mask_ar)
    assert "dtype torch.float32, expected torch.bool" in message(lambda mask_ar: right(mask_ar).float())
    assert "50 of 50 values differ; the first is at [0, 0, 0]: yours is False, expected True" in message(
        lambda mask_ar: ~right(mask_ar)
    )
    assert "it takes (a, b) but should take (mask_ar)" in message(lambda a, b: a)
    assert "NaN" in message(lambda logits, labels: logits.sum() * float("nan"), "suffix_loss")


def test_two_mistakes_at_once_get_the_name_of_the_larger_one():
    def rms_norm(x, weight, eps):  # w instead of 1 + w in every case, and no float32, which matters in few
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    assert "multiplies by w instead of 1 + w" in message(rms_norm, "rms_norm")


def test_message_names_the_line_that_raises():
    def broken(mask_ar):
        rows = len(mask_ar)
        return rows / 0

    assert "ZeroDivisionError on line 3 of your function" in message(broken)


def test_changing_an_argument_is_noticed():
    def careless(mask_ar):
        block = mask_ar.cumsum_(-1)
        return block[..., None, :] <= block[..., :, None]

    assert "in place" in message(careless)


def test_calling_the_package_is_noticed():
    assert "calls the package's own" in message(lambda mask_ar: masks.block_mask(mask_ar))


def test_unknown_names_get_a_suggestion():
    def block_mas(mask_ar):
        return mask_ar

    assert "did you mean 'block_mask'" in str(exercises.check(block_mas))
    with pytest.raises(ValueError, match="did you mean 'block_mask'"):
        exercises.piece("block_mas")


def test_partial_credit():
    def half(length, window):
        position = torch.arange(length)
        return position[:, None] - position < window if length > 5 else position

    lengths = [case.arguments[0] for case in EXERCISES["sliding_window_mask"].cases(np.random.default_rng(0))]
    right = sum(length > 5 for length in lengths)
    assert 0 < right < len(lengths)
    assert exercises.score(half, 5.0, "sliding_window_mask") == pytest.approx(5 * right / len(lengths), abs=1e-4)


def test_score_prints_the_diagnosis_and_takes_the_seed_of_the_class(monkeypatch, capsys):
    def swapped(mask_ar):
        block = mask_ar.cumsum(-1)
        return block[..., None, :] >= block[..., :, None]

    want = examine(EXERCISES["block_mask"], swapped, seed=77)
    monkeypatch.setenv("MINIVLM_SEED", "77")
    assert exercises.score(swapped, 2, "block_mask") == pytest.approx(2 * want.score, abs=1e-4)
    assert capsys.readouterr().out == f"{want}\n" and "swaps queries and keys" in str(want)
    exercises.score(swapped, 2, "block_mask", seed=5)
    assert capsys.readouterr().out == f"{examine(EXERCISES['block_mask'], swapped, seed=5)}\n"


# --- cases, outputs, defaults ---------------------------------------------------------------------------------------


def exercise_of(reference, *cases, mistakes=(), **fields):
    return Exercise("00.9", reference, lambda rng: cases, mistakes, 1, 1, ("What?", "How?"), **fields)


X = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75], [-0.3, 0.8, 1.1], [0.9, -0.6, 0.2]])


def verdict(reference, function, *cases, **fields):
    return str(examine(exercise_of(reference, *(cases or [(X,), (2 * X[:3] + 1,)]), **fields), function, 0))


def test_messages_name_the_case_and_the_output():
    def both(x, scale=2.0):
        return x.sum(-1), x * scale

    cases = Case((X,), "the default scale"), Case((X,), "a small scale", {"scale": 0.1}), Case((X[:1],), "one row")
    message = verdict(both, lambda x, scale=2.0: (x.sum(-1), x * max(scale, 1)), *cases, outputs=("sums", "scaled"))
    assert "right except in the case “a small scale”" in message and "in `scaled`, 12 of 12 values differ" in message
    assert "length 3: expected" not in message
    assert "expected length 2: sums, scaled" in verdict(
        both, lambda x, scale=2.0: [x] * 3, *cases, outputs=("sums", "scaled")
    )
    assert "the default of `scale` is 3.0, but should be 2.0" in verdict(both, lambda x, scale=3.0: x, *cases)
    assert "`scale` needs a default, 2.0" in verdict(both, lambda x, scale: x, *cases)


def test_types_that_the_model_cannot_use_are_told():
    cases = (3, 4), (5, 2)
    assert "expected a number of Python: `.item()`" in verdict(
        lambda a, b: a / b, lambda a, b: torch.tensor(a / b), *cases
    )
    assert "a float, expected the integer 12" in verdict(lambda a, b: a * b, lambda a, b: float(a * b), *cases)
    assert verdict(lambda a, b: a / b, lambda a, b: np.float64(a / b), *cases).startswith("✓")


# --- arguments, views, gradients ------------------------------------------------------------------------------------


def test_changed_arguments_are_named():
    def first(rows, table):
        return table["ids"][0] + len(rows)

    def careless(rows, table):
        rows.append(0)
        return table["ids"][0] + len(rows) - 1

    def writes(rows, table):
        table["ids"] += 1
        return table["ids"][0] + len(rows) - 1

    case = ([1, 2], {"ids": torch.tensor([3, 4])})
    assert "it changes `rows` in place" in verdict(first, careless, case)
    assert "it changes `table['ids']` in place" in verdict(first, writes, case)


def test_a_view_of_the_buffer_must_not_be_a_copy():
    def copies(buffer, new, start):
        buffer[:, :, start : start + new.shape[2]] = new
        return buffer[:, :, : start + new.shape[2]].clone()

    assert "it is a copy: it should be a view of `buffer`" in message(copies, "write_in_place")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.tensor(x.square().sum().item()),
        lambda x: x.detach().square().sum(),
        lambda x: torch.from_numpy(np.asarray((x.numpy() ** 2).sum())),
        torch.no_grad()(lambda x: x.square().sum()),
    ],
)
def test_a_value_without_gradient_is_told(function):
    assert "no gradient flows back to `x`: do not use .item()" in verdict(lambda x: x.square().sum(), function)


def test_wrong_gradients_are_told():
    def half(x):
        return (x.detach() * x).sum()

    def overwrites(x):
        e = x.exp()
        y = e.square()
        e /= 2
        return y.sum()

    assert "the gradient for `x` is not" in verdict(lambda x: x.square().sum(), half)
    assert "an in-place operation" in verdict(lambda x: x.exp().square().sum(), overwrites)
    with torch.no_grad():
        assert "no gradient" in verdict(lambda x: x.sum(), lambda x: x.detach().sum())


def test_no_gradient_is_required_in_half_precision_or_at_a_kink():
    half = (X.bfloat16(),)
    assert verdict(lambda x: x.sum(), lambda x: x.detach().sum(), half).startswith("✓")
    assert verdict(lambda x: x.abs().sum(), lambda x: x.norm(dim=-1, p=1).sum(), (torch.zeros(3, 2),)).startswith("✓")


# --- diagnoses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "function", "cause"),
    [
        (lambda x: x.mean(0), lambda x: x.sum(0), "multiplied by the number of rows of `x`: sum instead of mean"),
        (lambda x: x.exp(), lambda x: -x.exp(), "sign is wrong"),
        (lambda x: x.exp(), lambda x: 2 * x.exp(), "too large by a factor of 2"),
        (lambda x: x.exp(), lambda x: x.exp() / 2**0.5, "too small by a factor of √2"),
        (lambda x: x.exp(), lambda x: x.exp() + 7, "too large by 7 everywhere"),
        (lambda x: x.exp(), lambda x: x.exp() + 3, "too large by the number of columns of `x`"),
        (lambda x: x.argsort(-1), lambda x: x.argsort(-1) + 1, "off by one: too large by 1"),
        (lambda x: x @ x.T + x[:, :1], lambda x: (x @ x.T + x[:, :1]).T, "transposed: axes 0 and 1"),
        (lambda x: x.exp(), lambda x: x.exp().T, "transposed: axes 0 and 1"),
        (lambda x: x.exp(), lambda x: x.exp().flip(1), "flipped along axis 1"),
        (lambda x: x.exp(), lambda x: x.exp().roll(1, 1), "shifted along axis 1"),
        (lambda x: x.exp(), lambda x: x.exp()[torch.tensor([1, 0, 2, 3])[: len(x)]], "wrong order along axis 0"),
        (lambda x: x.exp(), lambda x: x.exp()[:1].expand_as(x), "every row has the answer of the first row"),
        (lambda x: x > 0, lambda x: x <= 0, "inverted"),
        (lambda x: x.softmax(-1), lambda x: x.softmax(-1).log(), "the logarithm of the right answer"),
        (lambda x: x.softmax(-1), lambda x: x, "returns `x` unchanged"),
        (lambda x: x.softmax(-1), lambda x: x.softmax(-1).bfloat16().float(), "lower precision"),
        (lambda x: x.softmax(-1), lambda x: torch.zeros_like(x), "only zeros"),
        (lambda x: x.softmax(-1), lambda x: x.softmax(-1)[None], "an axis of length 1 too many"),
        (lambda x: x.exp(), lambda x: torch.cat((x[:1], x[1:].exp())), "everything is right except the first row"),
        (lambda x: x.exp(), lambda x: torch.cat((x[:, :-1].exp(), x[:, -1:]), 1), "right except the last column"),
    ],
)
def test_the_relation_to_the_right_answer_is_told(reference, function, cause):
    message = verdict(reference, function)
    assert cause in message and message.startswith("✗")


def masked_scores(q, k, mask, scale):
    return torch.where(mask, (q @ k.T) * scale, 0.0)


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (lambda q, k, mask, scale: q @ k.T * scale, "as if `mask` were True everywhere: is it used?"),
        (lambda q, k, mask, scale: masked_scores(q, k, ~mask, scale), "as if `mask` were inverted"),
        (lambda q, k, mask, scale: masked_scores(k, q, mask, scale), "`q` and `k` were exchanged"),
        (lambda q, k, mask, scale: masked_scores(q, k, mask, scale + 1), "`scale` were one larger"),
        (lambda q, k, mask, scale: masked_scores(q, k.softmax(-1), mask, scale), "softmax of `k` were taken first"),
        (lambda q, k, mask, scale: masked_scores(q, k, mask, scale).sin() * mask * k[0, 0], "is right"),
    ],
)
def test_the_reference_called_differently_is_told(function, cause):
    g = torch.Generator().manual_seed(0)
    cases = [(*torch.randn(2, n, 3, generator=g), torch.rand(n, n, generator=g) < 0.6, float(n) / 7) for n in (3, 4, 5)]
    assert cause in verdict(masked_scores, function, *cases)


def test_an_ignored_argument_is_told():
    g = torch.Generator().manual_seed(0)
    cases = [(torch.randn(3, 4, generator=g), torch.rand(3, 4, generator=g)) for _ in range(3)]
    message = verdict(lambda x, w: (x * w).cumsum(-1), lambda x, w: x.sin() + x.sum(), *cases)
    assert "does not change when `w` changes" in message


def test_errors_get_their_likely_cause():
    def no_import(x):
        return itertools.chain(x)  # noqa: F821

    assert "Define or import `itertools` inside the function" in verdict(lambda x: x.sum(), no_import)
    assert "The shapes of the arguments are x [4, 3]" in verdict(lambda x: x.sum(), lambda x: x @ x)


# --- time -----------------------------------------------------------------------------------------------------------


def never_ends(mask_ar):
    while True:
        pass


def catches_everything(mask_ar):
    while True:
        try:
            mask_ar = mask_ar + 0
        except BaseException:
            pass


def catches_in_two_loops(mask_ar):
    while True:
        try:
            while True:
                mask_ar.cumsum(-1)
        except BaseException:
            pass


def sleeps(mask_ar):
    time.sleep(1e6)


@pytest.mark.parametrize("function", [never_ends, catches_everything, catches_in_two_loops, sleeps])
@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_every_check_ends(function, where, monkeypatch):
    monkeypatch.setattr(exercise, "SECONDS", 0.2)
    before = sys.gettrace(), sys.getprofile(), signal.getsignal(signal.SIGALRM), threading.active_count()
    if where == "main thread":
        found = message(function)
    elif function is sleeps:
        pytest.skip("only a signal can end a call that sleeps")
    else:
        results = []
        thread = threading.Thread(target=lambda: results.append(message(function)))
        thread.start()
        thread.join()
        found = results[0]
    assert re.search("it did not finish within 0.2 seconds.*: is there a loop that never ends?", found)
    assert before == (sys.gettrace(), sys.getprofile(), signal.getsignal(signal.SIGALRM), threading.active_count())
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_slow_function_has_time():
    def slow(mask_ar):
        time.sleep(0.15)
        return passing(mask_ar)

    assert message(slow).startswith("✓")


# --- the package's own function -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip_loss", "suffix_loss", "block_mask"])
@pytest.mark.parametrize(
    "disguise",
    [
        lambda f: f,
        lambda f: lambda *args: f(*args),
        functools.partial,
        lambda f: types.FunctionType(inspect.unwrap(f).__code__, inspect.unwrap(f).__globals__),
        lambda f: lambda *args: f(*args) + 0 if f.__name__ != "block_mask" else f(*args) & True,
    ],
)
def test_the_packages_own_function_is_noticed_in_every_disguise(name, disguise):
    result = examine(EXERCISES[name], disguise(EXERCISES[name].reference), 0)
    assert not result.passed and result.score == 0
    assert "own function" in str(result)


def test_other_functions_of_the_package_are_allowed():
    assert message(lambda ids: masks.block_mask(ids), "prefix_lm_mask").startswith("✓")


def test_a_name_that_is_no_exercise_gets_a_way_out():
    assert 'exercises.check(f, name="' in str(exercises.check(lambda x: x))
    assert "there is no exercise 'helper'" in str(
        exercises.check(exercise_of.__class__(exercise_of.__code__, {}, "helper"))
    )


# --- saved, shown, deleted ------------------------------------------------------------------------------------------


def passing(mask_ar):
    block = mask_ar.cumsum(-1)
    return block[..., None, :] <= block[..., :, None]


def test_progress_is_saved_until_reset(learners_folder):
    passing.__name__ = "block_mask"
    assert exercises.check(passing).passed
    assert (learners_folder / "solutions" / "05.1_block_mask.py").exists()
    assert exercises.progress().done["block_mask"]
    assert "✓ block_mask" in str(exercises.progress())
    exercises.reset("block_mask")
    assert not exercises.progress().done["block_mask"]
    for name in ("block_mask", "prefix_lm_mask"):
        save_source(name, SOLUTIONS[name])
    exercises.reset("05")
    assert not any(exercises.progress().done.values())


def test_folder_that_cannot_be_written_gets_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIVLM_HOME", str(tmp_path / "file"))
    passing.__name__ = "block_mask"
    result = exercises.check(passing)
    assert result.passed and "MINIVLM_HOME" in str(result)


def test_solution_that_needs_its_notebook_gets_a_sentence():
    save_source("block_mask", "def block_mask(mask_ar):\n    return helper(mask_ar)\n")
    function, problem = exercises.load_own(EXERCISES["block_mask"])
    assert function is None and "NameError" in problem and "inside the function" in problem


@pytest.mark.parametrize("source", ["not python", "import os; os.nothing", "x = 1", "def block_mask(: pass", "\0"])
def test_damaged_saved_file_leaves_the_packages_function(source):
    save_source("block_mask", source)
    assert exercises.piece("block_mask") is EXERCISES["block_mask"].reference
    with exercises.plugged_in() as parts:
        assert parts["block_mask"].startswith("the package's. Your saved solution does not")


# --- plugged in -----------------------------------------------------------------------------------------------------

PROMPTS = ["caption en", "answer en how many objects are there?", "detect cat ; dog"]


@pytest.fixture(scope="module")
def embedded():
    return minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()


def answers(model, processor) -> list[str]:
    images = [emoji.make_scene(seed, "validation").image for seed in range(3)]
    return [minivlm.generate(model, processor, image, PROMPTS) for image in images]


def test_without_saved_solutions_it_is_the_packages_model():
    with exercises.plugged_in() as parts:
        assert set(parts.values()) == {"the package's"}
    assert str(parts).startswith("0 of ")


def test_all_solutions_plugged_in_answer_as_the_package_does(embedded):
    expected = answers(*embedded)
    for name, source in SOLUTIONS.items():
        save_source(name, source)
    before = {name: vars(masks)[name] for name in ("block_mask", "prefix_lm_mask")}
    with exercises.plugged_in() as parts:
        assert set(parts.values()) == {"yours"}, parts
        assert set(parts) == {name for name, e in EXERCISES.items() if e.plugs_in}
        assert masks.block_mask is not before["block_mask"]
        assert answers(*embedded) == expected
    assert all(vars(masks)[name] is function for name, function in before.items())


def test_replaced_functions_are_really_called(embedded):
    called = set()

    def counted(exercise):
        def run(*args, **kwargs):
            called.add(exercise.name)
            return exercise.reference(*args, **kwargs)

        return run

    with replaced({e.reference: counted(e) for e in EXERCISES.values() if e.plugs_in}):
        answers(*embedded)
    assert called >= {"block_mask", "prefix_lm_mask", "mask_padding"}


def test_functions_of_the_learner_call_each_other_and_calls_are_counted(embedded):
    for name in ("patchify", "embed_patches", "pad", "assemble", "block_mask", "prefix_lm_mask", "append"):
        save_source(name, SOLUTIONS[name])
    with exercises.plugged_in() as parts:
        answers(*embedded)
        assert parts["patchify"] == "yours"
    for name in ("patchify", "embed_patches", "pad", "assemble", "block_mask", "prefix_lm_mask"):
        assert re.fullmatch(r"yours, \d+ calls?", parts[name]), parts
    assert parts["append"] == "yours, but this answer did not need it"
    assert str(parts).startswith("7 of ") and parts["rms_norm"] == "the package's"


def test_function_that_fails_inside_the_model_says_whose_it_is():
    fails_in_the_model = """def block_mask(mask_ar):
    if mask_ar.shape[-1] > 20:
        raise IndexError("seven")
    block = mask_ar.cumsum(-1)
    return block[..., None, :] <= block[..., :, None]
"""
    save_source("block_mask", fails_in_the_model)
    save_source("prefix_lm_mask", SOLUTIONS["prefix_lm_mask"])
    with exercises.plugged_in(), pytest.raises(RuntimeError, match=r"^Your block_mask \(exercise 05.1\).*seven.*reset"):
        masks.prefix_lm_mask(torch.zeros(1, 30, dtype=torch.long))


def test_what_a_check_says_can_be_printed_on_any_console():
    code = """if True:
        from minivlm.course import exercises
        print(exercises.check(lambda x: x, name="block_mask"), exercises.progress())
        with exercises.plugged_in() as parts:
            print(parts)
    """
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    for arguments in (["-c", code], ["-m", "minivlm.course.exercises"]):
        ran = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
        assert ran.returncode == 0 and len(ran.stdout) > 500, ran.stderr
