"""Grading a class: what each kind of submission gets, and that none affects another.

One made-up class with everything that students submit is graded once.
"""

import copy
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from minivlm.__main__ import main
from minivlm.course.exercises import EXERCISES, score
from minivlm.course.exercises.exercise import call, compare_outcomes
from minivlm.course.grading import grader, remote
from minivlm.course.grading.encoding import MAX_BYTES, Opaque, copy_into, decode, encode, tensors_in
from minivlm.course.grading.grader import Mark, Report, escape_formula, grade_notebook, points_of
from minivlm.course.grading.remote import Clock, Lost, Malformed, Remote, to_error, to_signature
from minivlm.course.grading.submissions import Cell, find_submissions, read_cells
from minivlm.course.grading.worker import essentials, refusing

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import build_notebooks

CHAPTER = '''# %% [markdown]
# # 05 · The prefix-LM mask
#
# **Which token attends to which?**
#
# | | |
# |---|---|
# | know first | nothing |

# %%
import torch
from minivlm.course import exercises

# %%
while True:  # shows something for a long time
    pass

# %% [markdown]
# ## Exercise 5.1 · The rule

# %%
def block_mask(mask_ar):
    """[B, T] → [B, T, T]."""
    ### BEGIN SOLUTION
    block = mask_ar.cumsum(-1)
    return block[..., None, :] <= block[..., :, None]
    ### END SOLUTION


# %%
exercises.check(block_mask)
### BEGIN HIDDEN TESTS
exercises.score(block_mask, points=2, seed=1)
### END HIDDEN TESTS

# %%
block_mask = exercises.piece("block_mask")

# %% [markdown]
# ## Exercise 5.2 · The mask

# %%
def prefix_lm_mask(token_type_ids):
    """[B, T] → [B, T, T]."""
    ### BEGIN SOLUTION
    return block_mask(token_type_ids)
    ### END SOLUTION


# %%
exercises.check(prefix_lm_mask)
### BEGIN HIDDEN TESTS
exercises.score(prefix_lm_mask, points=2, seed=1)
### END HIDDEN TESTS
'''
TIME_LIMIT = 32  # seconds per notebook, a quarter of it per cell
BLOCK, PREFIX = "05.1 block_mask", "05.2 prefix_lm_mask"
# Only some cases are right, because a batch of one row does not show that only the first row is used.
HALF = """def block_mask(mask_ar):
    block = mask_ar[:1].expand(mask_ar.shape).cumsum(-1)
    return block[..., None, :] <= block[..., :, None]"""
SOLVED_DIFFERENTLY = """from math import inf
%matplotlib inline
!echo hello
def first(mask_ar):
    return mask_ar.cumsum(-1)
def block_mask(mask_ar):
    block = first(mask_ar)
    return block.unsqueeze(-2) <= block.unsqueeze(-1)
display(block_mask); input"""
# Each earned marks in the past: what it adds below the stub of block_mask, which is worth 0 points.
CHEATS = {
    "replaces the check": """
from minivlm.course.exercises import exercise
passed = lambda *args, **kwargs: exercises.Result("passed", passed=True, score=1.0)
exercises.check = exercises.score = exercise.examine = exercise.Result = passed
exercise.compare_outcomes = exercise.compare = lambda *args, **kwargs: None
exercises.EXERCISES.clear()
import builtins
torch.equal = builtins.all = lambda *args: True
""",
    "forges records": """
import os
for file in range(3, 30):
    try:
        os.write(file, b'{"exercise": "block_mask", "score": 100, "message": ""}\\n{"exercise": [], "score": 1}\\nno' * 9)
    except OSError:
        pass
""",
    "raises the tolerance": """
from minivlm.course.exercises import exercise
for module in list(__import__("sys").modules.values()):
    if hasattr(module, "TOLERANCE"):
        module.TOLERANCE = float("inf")
def block_mask(mask_ar):
    return torch.zeros(*mask_ar.shape, mask_ar.shape[-1]).bool()
""",
    "makes all cases the same": """
import numpy as np
class Zeros:
    __getattr__ = lambda self, name: lambda *args, **kwargs: 1
np.random.default_rng = lambda seed=None: Zeros()
torch.Tensor.numpy = lambda self, *args, **kwargs: np.zeros(tuple(self.shape))
def block_mask(mask_ar):
    return torch.zeros(*mask_ar.shape, mask_ar.shape[-1]).bool()
""",
    "swaps the right answer for its own": """
from minivlm import masks
masks.block_mask.__code__ = (lambda mask_ar: mask_ar).__code__
exercises.EXERCISES["block_mask"].reference.__code__ = masks.block_mask.__code__
def block_mask(mask_ar):
    return mask_ar
""",
    "takes the package's code": """
from minivlm import masks
def block_mask(mask_ar):
    pass
block_mask.__code__ = masks.block_mask.__code__
""",
    "copies the package's function": """
import types
from minivlm import masks
copied = types.FunctionType(masks.block_mask.__code__, vars(masks))
def block_mask(mask_ar):
    return copied(mask_ar)
""",
    "calls the package's through its module": """
from minivlm import masks
def block_mask(mask_ar):
    return masks.block_mask(mask_ar)
""",
    "calls the package's by another name": """
from minivlm.masks import block_mask as theirs
def block_mask(mask_ar):
    return theirs(mask_ar)
""",
    "calls the exercise's reference": """
theirs = exercises.EXERCISES["block_mask"]
def block_mask(mask_ar):
    try:
        return theirs.reference(mask_ar)
    except Exception:
        return mask_ar
""",
    "reads its callers": """
def block_mask(mask_ar):
    import sys
    frame = sys._getframe()
    while frame := frame.f_back:
        for value in list(frame.f_locals.values()):
            for one in value if isinstance(value, list | tuple) else [value]:
                one = getattr(one, "value", one)
                if isinstance(one, torch.Tensor) and one.dtype == torch.bool:
                    return one
    return mask_ar
""",
    "returns what is equal to anything": """
class Same(torch.Tensor):
    __eq__ = __ne__ = lambda *args: True
    def __torch_function__(self, *args, **kwargs):
        return True
class Equal:
    __eq__ = lambda *args: True
    __class__ = torch.Tensor
    shape, dtype, requires_grad = (2, 5, 5), torch.bool, False
def block_mask(mask_ar):
    return Equal()
""",
    "answers for the grader": """
import os, threading
def block_mask(mask_ar):
    for file in range(3, 30):
        try:
            os.write(file, b'{"value": {"tensor": "bool", "shape": [2], "data": "no"}}\\n[1, 2]\\n')
        except OSError:
            pass
""",
}
FORK = """
import os, time
pids = [os.fork() for _ in range(3)]
if 0 in pids:
    while True:
        time.sleep(1)
open({path!r}, "w").write(" ".join(map(str, pids)))
"""
# Leaves its session, its group and its parent.
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open({path!r}, "w").write(str(os.getpid()))
        while True:
            time.sleep(1)
    os._exit(0)
while not os.path.exists({path!r}) or not open({path!r}).read():
    time.sleep(0.01)
"""
AWAIT = """
import asyncio
await asyncio.sleep(0)
task = asyncio.ensure_future(asyncio.sleep(0))
async def later():
    return 1
assert await later() == 1
"""
# Added below block_mask in an otherwise perfect notebook.
ADDED = {
    "raises": "\nraise RuntimeError('oh')",
    "exits": "\nimport sys; sys.exit()",
    "asks": "\ninput('your name?')",
    "dies": "\nimport os; os._exit(0)",
    "segfault": "\nimport ctypes; ctypes.string_at(0)",
    "loops": "\nwhile True:\n    try:\n        pass\n    except BaseException:\n        pass",
    "prints": "\nfor _ in range(300): print('x' * 100_000)",
    "thread": "\nimport threading; threading.Thread(target=__import__('time').sleep, args=(9999,)).start()",
    "hungry": "\njunk = torch.empty(1 << 33, dtype=torch.uint8)\ndel block_mask",
}
# Inserted at the start of the function.
INSIDE = {"dies inside": "import os; os._exit(0)", "loops inside": "while True: pass", "leaves": "raise SystemExit"}


@pytest.fixture(scope="module")
def chapter(tmp_path_factory) -> dict:
    source = tmp_path_factory.mktemp("source") / "05_small.py"
    source.write_text(CHAPTER)
    return {kind: build_notebooks.build(source, kind) for kind in ("learner", "solution")}


def changed(notebook, edit, name: str = "block_mask"):
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.id == name:
            cell.source = edit(cell.source)
    return notebook


def without_ids(notebook):
    """As some editors save it, with new ids and no metadata; also without the endless cell."""
    notebook = copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if "while True" not in cell.source]
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"new-{i}", {}
    return notebook


@pytest.fixture(scope="module")
def graded(chapter, tmp_path_factory) -> dict:
    """The rows and messages of all students."""
    folder, out = tmp_path_factory.mktemp("class"), tmp_path_factory.mktemp("out")
    perfect, stub = chapter["solution"], chapter["learner"]
    books = {"perfect": perfect, "stub": stub, "no ids": without_ids(perfect), "=1+1": perfect, "Zoë": perfect}
    books["half"] = changed(perfect, lambda text: HALF)
    books["different"] = changed(perfect, lambda text: SOLVED_DIFFERENTLY)
    books["named mistake"] = changed(perfect, lambda text: text.replace("<=", ">="))
    books["renamed"] = changed(perfect, lambda text: text.replace("block_mask", "blockmask"))
    books["no syntax"] = changed(perfect, lambda text: text.replace("return", "retrun "))
    books["the package's"] = changed(stub, lambda text: "from minivlm.masks import block_mask")
    books |= {name: changed(stub, lambda text, more=more: text + more) for name, more in CHEATS.items()}
    books["awaits"] = changed(perfect, lambda text: AWAIT + text)
    books["daemon"] = changed(perfect, lambda text: text + DAEMON.format(path=str(out / "daemon")))
    books["forks"] = changed(perfect, lambda text: text + FORK.format(path=str(out / "pids")))
    books |= {name: changed(perfect, lambda text, more=more: text + more) for name, more in ADDED.items()}
    for name, first in INSIDE.items():
        books[name] = changed(
            perfect, lambda text, first=first: text.replace("    block =", f"    {first}\n    block =")
        )
    if os.name != "posix":
        del books["forks"], books["daemon"]
    for name, book in books.items():
        nbformat.write(book, folder / f"{name}.ipynb")
    (folder / "no json.ipynb").write_text('{"cells": [')
    (folder / "empty.ipynb").write_text("")
    (folder / "binary.ipynb").write_bytes(bytes(range(256)) * 9)
    (folder / "list.ipynb").write_text("[]")
    (folder / "deep.ipynb").write_text("[" * 200_000)
    (folder / "version 3.ipynb").write_text('{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": []}')
    (folder / "notes.txt").write_text("not graded")
    (folder / "utf-16.IPYNB").write_text(json.dumps(perfect), encoding="utf-16")
    (folder / "a folder.ipynb").mkdir()
    if os.name == "posix":
        (folder / "itself.ipynb").symlink_to(folder / "itself.ipynb")
        os.mkfifo(folder / "pipe.ipynb")
    argv = ["grade", str(folder), "--out", str(out / "grades.csv"), "--seed", "77", "--time-limit", str(TIME_LIMIT)]
    assert main(argv) == 0
    return {"rows": table(out / "grades.csv"), "messages": table(out / "grades.messages.csv"), "out": out}


def table(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def marks(graded, student: str) -> tuple[float, float]:
    (row,) = [row for row in graded["rows"] if row["student"] == student]
    assert float(row["total"]) == float(row[BLOCK]) + float(row[PREFIX]) + 0.0
    return float(row[BLOCK]), float(row[PREFIX])


def said(graded, student: str) -> str:
    return "\n".join(row["message"] for row in graded["messages"] if row["student"] == student)


@pytest.mark.slow
def test_one_row_per_student_and_one_column_per_exercise_of_the_chapter(graded):
    columns = [f"{e.key} {e.name}" for e in EXERCISES.values() if e.chapter == "05"]
    assert list(graded["rows"][0]) == ["student", *columns, "total", "max"]
    most = sum(e.points for e in EXERCISES.values() if e.chapter == "05")
    assert {float(row["max"]) for row in graded["rows"]} == {most}
    names = [row["student"] for row in graded["rows"]]
    assert len(names) == len(set(names)) >= 30 and "notes" not in names


@pytest.mark.slow
@pytest.mark.parametrize(
    "student", ["perfect", "no ids", "'=1+1", "Zoë", "different", "prints", "thread", "awaits", "utf-16"]
)
def test_right_solutions_get_full_marks(graded, student):
    assert marks(graded, student) == (2, 2), said(graded, student)


@pytest.mark.slow
def test_a_stub_is_not_attempted(graded):
    assert marks(graded, "stub") == (0, 0)
    assert said(graded, "stub").count("not attempted yet") == 2


@pytest.mark.slow
def test_partial_credit_and_the_name_of_the_mistake(graded):
    assert 0 < marks(graded, "half")[0] < 2 and marks(graded, "half")[1] == 2
    mistake = EXERCISES["block_mask"].mistakes[0]
    assert marks(graded, "named mistake") == (0, 2)
    assert mistake.name in said(graded, "named mistake") and mistake.hint in said(graded, "named mistake")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("renamed", "does not define a function with this name"),
        ("no syntax", "the cell that defines it fails: SyntaxError"),
        ("dies", "ended the Python process"),
        ("segfault", "ended the Python process"),
        ("loops", "longer than 8 seconds"),
        ("dies inside", "ended the Python process"),
        ("loops inside", "longer than 8 seconds"),
        ("leaves", "raises SystemExit"),
        ("the package's", "does not define a function with this name"),
    ],
)
def test_a_broken_exercise_only_loses_its_own_mark(graded, student, message):
    assert marks(graded, student) == (0, 0 if student == "the package's" else 2), said(graded, student)
    assert message in said(graded, student)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["raises", "exits", "asks"])
def test_what_is_defined_before_an_error_gets_marks(graded, student):
    assert marks(graded, student) == (2, 2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_memory_is_limited(graded):
    assert marks(graded, "hungry") == (2, 2)  # the allocation fails, so `del` does not run


@pytest.mark.slow
@pytest.mark.parametrize("student", CHEATS)
def test_tricks_get_no_marks(graded, student):
    assert marks(graded, student) == (0, 0), said(graded, student)
    assert ("package's own" in said(graded, student)) == ("the package's" in student or "reference" in student)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["no json", "empty", "binary", "list", "deep"])
def test_an_unreadable_notebook_only_loses_its_own_marks(graded, student):
    assert marks(graded, student) == (0, 0)
    assert "This file is not a readable notebook" in said(graded, student)


@pytest.mark.slow
def test_an_old_notebook_without_cells_gets_a_message(graded):
    assert marks(graded, "version 3") == (0, 0) and said(graded, "version 3")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find processes")
def test_no_process_is_left_running(graded):
    assert marks(graded, "forks") == (2, 2)
    assert marks(graded, "daemon") == (2, 2)
    for name in ("pids", "daemon"):
        assert not any(is_running(pid) for pid in (graded["out"] / name).read_text().split())


def is_running(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


@pytest.mark.slow
def test_every_file_that_was_not_graded_gets_a_word(graded):
    nobody = said(graded, "")
    assert "notes.txt was not graded: only notebooks are" in nobody
    assert marks(graded, "a folder") == (0, 0)
    if os.name == "posix":
        assert "itself.ipynb was not graded: it is not a regular file" in nobody
        assert "pipe.ipynb was not graded: it is not a regular file" in nobody


# --- without running anything ---------------------------------------------------------------------------------------


def test_students_are_files_or_folders(tmp_path):
    for name in ("ada.ipynb", "bob/05/05.ipynb", "bob/06.ipynb", "bob/.ipynb_checkpoints/06.ipynb", ".git/x.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "cy").mkdir()
    found = find_students(tmp_path)
    assert {name: [path.name for path in paths] for name, paths in found.items()} == {
        "ada": ["ada.ipynb"],
        "bob": ["05.ipynb", "06.ipynb"],
        "cy": [],
    }


def test_the_better_mark_wins():
    report = Report({"05"}, {"a": Mark(0.5, "half"), "b": Mark(1.0, "")})
    report.add(Report({"06"}, {"a": Mark(0.7, "more"), "b": Mark(0.0, "no"), "c": Mark(0.1, "c")}, ["late"]))
    assert report.chapters == {"05", "06"} and report.problems == ["late"]
    assert {name: mark.score for name, mark in report.marks.items()} == {"a": 0.7, "b": 1.0, "c": 0.1}


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_formulas_are_escaped(text):
    assert escape_formula(text) == "'" + text


def test_other_table_cells_stay_unchanged():
    assert [escape_formula(cell) for cell in ("Ada", 0, 1.5, "")] == ["Ada", 0, 1.5, ""]
    assert escape_formula("\udcff") == "\\udcff"


def test_unchanged_cells_run_only_imports_definitions_and_constants():
    source = "import os\nN = 4\nx = N * 2\ndef f(): pass\nf = exercises.piece('f')\nprint(1)\nclass A: pass\nwhile 1: 1"
    essential = "import os\nN = 4\n\ndef f():\n    pass\nf = exercises.piece('f')\n\nclass A:\n    pass"
    assert essentials(source) == essential


def test_a_notebook_that_always_crashes_is_given_up(chapter, tmp_path, monkeypatch):
    monkeypatch.setattr(grader, "MAX_PROCESSES", 1)
    path = tmp_path / "05.ipynb"
    nbformat.write(changed(chapter["solution"], lambda text: "import os; os._exit(1)"), path)
    report = grade_notebook(path, 0, 60)
    assert {mark.score for mark in report.marks.values()} == {0.0}
    assert "crashed 1 process" in report.problems[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "no folder"),
        (["."], "contains no notebooks"),
        ([".", "--out", "."], "name a file"),
        ([".", "--out", "nowhere/grades.csv"], "in a folder that exists"),
        ([".", "--seed", "-1"], "--seed must be 0 or more"),
        ([".", "--time-limit", "0"], "--time-limit must be more than 0"),
        ([".", "--chapter", "5"], "no chapter '5'"),
    ],
)
def test_wrong_arguments_get_one_sentence(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["grade", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_class_without_exercises_gets_a_message(tmp_path, capsys):
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "ada.ipynb")
    assert main(["grade", str(tmp_path), "--out", str(tmp_path / "grades.csv")]) == 2
    assert "Name the chapter with --chapter" in capsys.readouterr().err
