"""Grading a class: what each kind of submission gets, and that none affects another.

One made-up class with everything that students submit is graded once.
"""

import copy
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from html import escape
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from minivlm.__main__ import main
from minivlm.course.exercises import EXERCISES, score
from minivlm.course.exercises.exercise import call, compare_outcomes, locate
from minivlm.course.grading import discuss, grader, pages, remote, tables
from minivlm.course.grading.encoding import Opaque, copy_into, decode, encode, tensors_in
from minivlm.course.grading.grader import grade_notebook
from minivlm.course.grading.remote import Clock, Lost, Malformed, Remote, to_error, to_signature
from minivlm.course.grading.report import Mark, Report, points_of
from minivlm.course.grading.submissions import Cell, find_submissions, read_cells
from minivlm.course.grading.tables import escape_formula
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
        os.write(file, b'{"exercise": "block_mask", "score": 100, "message": ""}\\n{"exercise": []}\\nno' * 9)
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
    "student", ["perfect", "no ids", "'=1+1", "Zoë", "different", "prints", "thread", "loops", "awaits", "utf-16"]
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
        ("dies inside", "ended the Python process"),
        ("loops inside", "longer than 8 seconds|did not finish within"),
        ("leaves", "raises SystemExit"),
        ("the package's", "does not define a function with this name"),
    ],
)
def test_a_broken_exercise_only_loses_its_own_mark(graded, student, message):
    assert marks(graded, student) == (0, 0 if student == "the package's" else 2), said(graded, student)
    assert re.search(message, said(graded, student))


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
        for student in ("itself", "pipe"):
            assert marks(graded, student) == (0, 0)
            assert f"{student}.ipynb was not graded: it is not a regular file" in said(graded, student)


# --- without running anything ---------------------------------------------------------------------------------------


def test_students_are_files_or_folders(tmp_path):
    for name in ("ada.ipynb", "bob/05/05.ipynb", "bob/06.IPYNB", "bob/.ipynb_checkpoints/06.ipynb", ".git/x.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "cy").mkdir()
    found = find_submissions(tmp_path)
    assert {name: [path.name for path in paths] for name, paths in found.students.items()} == {
        "ada": ["ada.ipynb"],
        "bob": ["05.ipynb", "06.IPYNB"],
        "cy": [],
    }
    assert not found.remarks


@pytest.mark.parametrize(
    ("name", "student", "reason"),
    [
        ("ada/05.zip", "ada", "ada/05.zip was not graded: unpack it first."),
        ("05.zip", "", "05.zip was not graded: unpack it first."),
        ("ada/05.py", "ada", "only notebooks are"),
        ("ada/05.ipynb.txt", "ada", "rename it so that its name ends in .ipynb"),
        ("ada/05 (1).ipynb", "ada", "ada/05.ipynb was not graded: it is identical to ada/05 (1).ipynb."),
        ("ada/x.ipynb/y.py", "ada", "x.ipynb is a folder, not a notebook."),
    ],
)
def test_a_file_that_is_not_graded_gets_a_reason(name, student, reason, tmp_path, capsys):
    for path in ("ada/05.ipynb", name):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("the same")
    (tmp_path / "grades.csv").touch()
    found = find_submissions(tmp_path, ignored=[tmp_path / "grades.csv"])
    assert reason in " ".join(found.remarks[student]).replace(os.sep, "/")
    assert len(found.students["ada"]) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "loop.ipynb").symlink_to(tmp_path / "ada" / "loop.ipynb")
    (tmp_path / "ada" / "inside").symlink_to(tmp_path / "ada")
    os.mkfifo(tmp_path / "ada" / "pipe.ipynb")
    found = find_submissions(tmp_path)
    assert found.students == {"ada": []} and len(found.remarks["ada"]) == 2
    for name in ("loop.ipynb", "pipe.ipynb"):
        with pytest.raises(ValueError, match="not a regular file"):
            read_cells(tmp_path / "ada" / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_notebooks_are_read_in_any_unicode_encoding(encoding, tmp_path):
    cells = [
        {"cell_type": "markdown", "source": "# Zoë"},
        {"cell_type": "code", "source": ["x = 'ë'\n", "y = 1"], "metadata": {"nbgrader": {"grade": True}}},
        {"cell_type": "code", "source": 5, "metadata": [], "id": None},
        "no cell",
    ]
    path = tmp_path / "05.ipynb"
    path.write_text(json.dumps({"cells": cells}, ensure_ascii=False), encoding=encoding)
    assert read_cells(path) == [Cell(1, "x = 'ë'\ny = 1", is_hidden_test=True), Cell(2, "")]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 200_000, '{"cells": 5}', "\x00", '{"cells": ' + "9" * 5000 + "}"]
)
def test_what_is_not_a_notebook_gets_one_sentence(text, tmp_path):
    (tmp_path / "05.ipynb").write_text(text)
    report = grade_notebook(tmp_path / "05.ipynb", 0, 60)
    assert report.marks == {} and report.chapters == {"05"}
    assert report.problems[0].startswith("This file is not a readable notebook (") and len(report.problems) == 1


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


def test_points_are_between_0_and_those_of_the_exercise(monkeypatch):
    exercise = EXERCISES["block_mask"]
    for forged, points in ((100.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (1.0, 2.0), (0.5, 1.0)):
        assert points_of(Report(marks={"block_mask": Mark(forged)}), exercise) == points
    for forged, points in ((100.0, 2.0), (-1.0, 0.0)):
        result = type("Forged", (), {"score": forged})
        monkeypatch.setattr("minivlm.course.exercises.examine", lambda *args, result=result: result)
        assert score(exercise.reference, points=2) == points


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def submitted(tmp_path, monkeypatch) -> Path:
    """A folder with notebooks of three students, each of which "is graded" at once."""
    for name in ("ada", "bob", "cy"):
        nbformat.write(nbformat.v4.new_notebook(), tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(grader, "MAX_PARALLEL", 1)
    monkeypatch.setattr(grader, "grade_notebook", lambda *args: Report({"05"}, {"block_mask": Mark(1.0, "")}))
    return tmp_path


def test_results_are_written_as_they_come(submitted, monkeypatch, capsys):
    out = submitted / "grades.csv"

    def grade_one(path, *args):
        if path.stem == "cy":
            raise KeyboardInterrupt
        time.sleep(0.05)  # so that they do not all end at once
        return Report({"05"}, {"block_mask": Mark(1.0, "")}, ["late"])

    monkeypatch.setattr(grader, "grade_notebook", grade_one)
    assert main(["grade", str(submitted), "--out", str(out)]) == 130
    assert [(row["student"], row[BLOCK]) for row in table(out)] == [("ada", "2.0"), ("bob", "2.0")]
    assert {row["student"] for row in table(submitted / "grades.messages.csv")} == {"ada", "bob"}
    assert "2 of 3 students were graded" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_table(submitted, monkeypatch, capsys):
    out = submitted / "grades.csv"
    out.write_text("the old table")

    class FullDisk:
        def __init__(self, file):
            file.write("half a ta")

        def writerows(self, rows):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.csv, "writer", FullDisk)
    assert main(["grade", str(submitted), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1
    assert out.read_text() == "the old table" and not list(submitted.glob("*.part"))


def test_targets_are_checked_before_anything_is_graded(submitted, monkeypatch, capsys):
    monkeypatch.setattr(grader, "grade_notebook", lambda *args: pytest.fail("graded"))
    (submitted / "grades.messages.csv").mkdir()
    for out in (submitted / "grades.csv", submitted, submitted / "nowhere" / "grades.csv", submitted / ("x" * 300)):
        assert main(["grade", str(submitted), "--out", str(out)]) == 2
        assert capsys.readouterr().err.startswith("minivlm grade: Cannot write the marks to")


def test_what_is_not_graded_is_on_stderr_and_in_the_messages(submitted, capsys):
    (submitted / "dan.zip").touch()
    assert main(["grade", str(submitted), "--out", str(submitted / "grades.csv")]) == 0
    sentence = "dan.zip was not graded: unpack it first."
    assert sentence in capsys.readouterr().err
    assert [row["message"] for row in table(submitted / "grades.messages.csv") if not row["student"]] == [sentence]


@pytest.mark.parametrize(
    ("layout", "students", "rows"),
    [
        (
            "moodle",
            ("Ada Lovelace_7_assignsubmission_file", "=cmd_8_assignsubmission_file_05"),
            [
                ["Participant 7", "Ada Lovelace", "2.0", "12", ""],
                ["Participant 8", "'=cmd", "2.0", "12", ""],
            ],
        ),
        (
            "canvas",
            ("adalovelace_LATE_7_99_05_prefix_lm_mask", "=cmd", "bob"),
            [
                ["    Points Possible", "", "", "", "12"],
                ["'=cmd", "", "'=cmd", "", "2.0"],
                ["adalovelace", "7", "", "", "2.0"],
                ["bob", "", "bob", "", "2.0"],
            ],
        ),
    ],
)
def test_learning_management_systems_get_their_own_columns(layout, students, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(grader, "grade_notebook", lambda *args: Report({"05"}, {"suffix_loss": Mark(2 / 3, "hello")}))
    for student in students:
        (tmp_path / f"{student}.ipynb").write_text(student)
    assert main(["grade", str(tmp_path), "--out", str(tmp_path / "grades.csv"), "--csv", layout]) == 0
    with open(tmp_path / "grades.csv", encoding="utf-8", newline="") as file:
        head, *found = csv.reader(file)
    assert {"moodle": "Last modified (grade)", "canvas": "Section"}[layout] in head
    if layout == "moodle":
        assert all("05.3 suffix_loss: hello" in row.pop() for row in found)
    assert sorted(found) == sorted(rows)


def test_moodle_needs_the_names_that_it_gave(submitted, capsys):
    assert main(["grade", str(submitted), "--out", str(submitted / "grades.csv"), "--csv", "moodle"]) == 2
    assert "such as 'Ada Lovelace_1234_assignsubmission_file', and not 'ada'" in capsys.readouterr().err


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path, monkeypatch) -> Path:
    """A folder of submissions with everything that a report can contain, each graded at once."""
    (tmp_path / "in").mkdir()
    for name in ("ada", "bob", "cy", "=1", "Zoë"):
        nbformat.write(nbformat.v4.new_notebook(), tmp_path / "in" / f"{name}.ipynb")
    (tmp_path / "in" / "dan.zip").touch()

    def grade_one(path, *args):
        mark = Mark(1 / 3, f"not yet: {path.stem}", "swaps queries and keys", ("a hint", "a note"))
        return Report({"05", "06"}, {"block_mask": mark, "geglu": Mark(is_attempted=False)}, ["oh"], {"05"}, ["late"])

    monkeypatch.setattr(grader, "grade_notebook", grade_one)
    return tmp_path


def written(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.suffix in (".csv", ".html"))
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in paths}


def grade_shard(folder: Path, shard: str, *more: str) -> int:
    return main(["grade", str(folder / "in"), "--out", str(folder / "parts" / "grades.csv"), "--shard", shard, *more])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_merged_shards_equal_one_run(sharded, count, capsys):
    for name in ("whole", "parts", "merged"):
        (sharded / name).mkdir()
    assert main(["grade", str(sharded / "in"), "--out", str(sharded / "whole" / "grades.csv")]) == 0
    for number in range(count, 0, -1):
        assert grade_shard(sharded, f"{number}/{count}") == 0
    assert written(sharded / "parts") == {}
    assert main(["grade", str(sharded / "parts"), "--merge", "--out", str(sharded / "merged" / "grades.csv")]) == 0
    assert written(sharded / "merged") == written(sharded / "whole") and len(written(sharded / "whole")) == 8
    assert "dan.zip was not graded" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1/0", "1", "1/2/3", "a/b", "1.5/3"])
def test_a_bad_shard_gets_one_sentence(sharded, shard, capsys):
    assert grade_shard(sharded, shard) == 2
    assert (
        capsys.readouterr().err
        == f"minivlm grade: --shard must be I/N with I from 1 to N, such as 2/5, not {shard!r}.\n"
    )


def test_shards_that_do_not_add_up_get_one_sentence(sharded, capsys):
    parts = sharded / "parts"
    parts.mkdir()

    def merge() -> str:
        capsys.readouterr()
        assert main(["grade", str(parts), "--merge", "--out", str(sharded / "grades.csv")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not (sharded / "grades.csv").exists()
        return error

    assert "contains no results of shards" in merge()
    grade_shard(sharded, "1/3")
    assert "Shards 2, 3 are missing" in merge()
    grade_shard(sharded, "3/3")
    assert "Shard 2 is missing" in merge()
    grade_shard(sharded, "2/3", "--seed", "7")
    assert "grades.1-of-3.json with seed 1234, grades.2-of-3.json with seed 7" in merge()
    (parts / "grades.2-of-3.json").rename(sharded / "kept")
    grade_shard(sharded, "2/4")
    assert "shards 3, grades.2-of-4.json with shards 4" in merge()
    (parts / "grades.2-of-4.json").unlink()
    again = (parts / "grades.1-of-3.json").read_text()
    (parts / "again.1-of-3.json").write_text(again)
    assert "Shard 1 of 3 is there more than once" in merge()
    (parts / "again.1-of-3.json").unlink()
    for broken in ("", "[]", "{}", again[:-9], json.dumps(json.loads(again) | {"reports": {}})):
        (parts / "grades.1-of-3.json").write_text(broken)
        assert "is not the complete result of a shard" in merge()
    (parts / "grades.1-of-3.json").write_text(again)
    (sharded / "in" / "eve.ipynb").write_text("{}")
    grade_shard(sharded, "2/3")
    assert "their folders of submissions differ" in merge()


# --- pages ----------------------------------------------------------------------------------------------------------


def test_pages_tell_each_student_and_the_teacher_what_was_found():
    declared = EXERCISES["block_mask"]
    mistake = declared.mistakes[0]
    wrong = Mark(0.25, f"not yet: it {mistake.name}.", mistake.name, (mistake.hint, "The values <b>differ</b>."))
    reports = {
        "ada": Report({"05"}, {"block_mask": Mark(1.0, "passed all 9 random cases.")}),
        "<i>bob": Report({"05"}, {"block_mask": wrong}, ["cell 3 fails"], {"05"}, ["05.ipynb changed too late."]),
        "cy": Report({"05"}, {"block_mask": wrong}),
    }
    files = pages.file_names(reports)
    hers = pages.student_page("ada", reports["ada"], [declared])
    assert "2 of 2 points" in hers and "passed all 9" in hers and "bob" not in hers
    his = pages.student_page("<i>bob", reports["<i>bob"], [declared])
    assert "<i>" not in his and "<b>" not in his and "0.5 of 2 points" in his and "cell 3 fails" in his
    assert escape(mistake.name) in his and escape(mistake.hint) in his.replace("<code>", "`").replace("</code>", "`")
    whole = pages.class_page(reports, [declared], files, ["dan.zip was not graded"])
    whole = whole.replace("<code>", "`").replace("</code>", "`")
    for sentence in (">2: <a", mistake.name, mistake.hint, "dan.zip was not graded", "changed too late", "chapter 05"):
        assert sentence in whole or escape(sentence) in whole
    assert "<i>" not in whole and "http" not in whole


def test_the_class_discusses_an_example_of_its_most_frequent_mistakes(monkeypatch):
    monkeypatch.setattr(pages, "DISCUSSED", 2)
    names = {n: EXERCISES[n].mistakes[0].name for n in ("block_mask", "rms_norm", "clip_loss")}
    reports = {str(i): Report(marks={n: Mark(0.0, "", names[n])}) for i, n in enumerate(sorted(names) + ["rms_norm"])}
    whole = pages.class_page(reports, [EXERCISES[n] for n in names], pages.file_names(reports), [])
    shown = whole.partition("To discuss")[2].partition("<h2>")[0]
    assert shown.count("<h3>") == 2 and shown.index(names["rms_norm"]) < shown.index(names["block_mask"])
    assert '<img alt="' in shown and "<caption>with this mistake</caption>" in shown and "<mark>" in shown


@pytest.mark.parametrize("name", EXERCISES)
def test_every_mistake_has_an_example(name):
    for mistake in EXERCISES[name].mistakes:
        shown = discuss.show(name, mistake.name)
        assert shown.startswith("<p>") and shown.count("<img") == shown.count("alt=")


def test_pages_have_different_names_that_every_system_accepts():
    names = pages.file_names(["../etc", "a b", "a/b", "=1", "", "…", "Zoë", "x" * 300, "\udcff"])
    assert len(set(names.values())) == len(names)
    assert all(re.fullmatch(r"[\w-]{3,70}\.html", name) for name in names.values())


def test_late_and_repeated_notebooks_are_listed_and_old_pages_removed(submitted):
    (submitted / "bob").mkdir()
    for name in ("05.ipynb", "05-again.ipynb"):
        (submitted / "bob" / name).write_text(name)
    os.utime(submitted / "ada.ipynb", (0, 0))
    out, folder = submitted / "grades.csv", submitted / "grades.pages"
    folder.mkdir()
    (folder / "009-old.html").touch()
    assert main(["grade", str(submitted), "--out", str(out), "--due", "2001-01-01T00:00"]) == 0
    whole = (folder / "index.html").read_text(encoding="utf-8")
    late = whole.partition("Handed in late")[2].partition("<h2>")[0]
    assert "bob" in late and "cy.ipynb changed on" in late and "ada" not in late
    assert ">bob</a>: chapter 05" in whole.partition("Handed in more than once")[2]
    assert sorted(path.name for path in folder.iterdir()) == [
        "001-ada.html",
        "002-bob.html",
        "003-cy.html",
        "index.html",
    ]
    assert main(["grade", str(submitted), "--out", str(out)]) == 0
    assert "Handed in late" not in (folder / "index.html").read_text(encoding="utf-8")


# --- values between processes ---------------------------------------------------------------------------------------


def sent(value, **options):
    return decode(json.loads(json.dumps(encode(value))), **options)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_cases_of_every_exercise_can_be_sent(name):
    exercise = EXERCISES[name]

    def in_another_process(*arguments, **keywords):
        message = json.loads(json.dumps(encode((arguments, keywords))))
        theirs = decode(message, trusted=True)
        assert encode(theirs) == message  # so the worker only reports what a function changed
        value = encode(exercise.reference(*theirs[0], **theirs[1]), tensors_in(theirs))
        copy_into((arguments, keywords), decode(json.loads(json.dumps(encode(theirs)))))
        return decode(json.loads(json.dumps(value)), tensors_in((arguments, keywords)))

    for case in exercise.cases(np.random.default_rng(3)):
        here, there = call(exercise.reference, case), call(in_another_process, case)
        assert compare_outcomes(there, here, in_another_process) is None


def test_values_arrive_as_they_were():
    values = [None, True, 3, -0.5, float("inf"), "ë\ud800", [1, (2, {3: "x"})], torch.bfloat16, {"a": []}, (), 10**30]
    assert sent(values) == values
    for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float16, torch.float64):
        for shape in ((), (0, 3), (2, 3)):
            tensor = (torch.rand(shape) * 3).to(dtype)
            assert sent(tensor).dtype == dtype and torch.equal(sent(tensor), tensor)
    array = np.arange(6, dtype=np.uint8).reshape(2, 3).T
    assert sent(array).dtype == array.dtype and np.array_equal(sent(array), array)
    assert sent(np.float32(2)) == 2.0 and type(sent(np.int64(2))) is int
    turned = sent(torch.rand(3, 4).T)
    assert turned.stride() == (1, 4)
    assert sent(torch.zeros(2).requires_grad_()).requires_grad
    assert sent(torch.zeros(1).expand(1 << 20, 1 << 10)).shape == (1 << 20, 1 << 10)  # too large, but its shape tells


def test_other_objects_arrive_as_their_name():
    point = namedtuple("Point", "x y")
    for value, name in (
        (lambda: 0, "function"),
        ({1}, "set"),
        (b"x", "bytes"),
        (np.bool_(True), "bool"),
        (2j, "complex"),
    ):
        assert isinstance(sent(value), Opaque) and type(sent(value)).__name__ == name
    assert sent(point(1, 2)) == (1, 2)
    assert isinstance(sent(Cell(1, "")), Opaque) and sent(Cell(1, ""), trusted=True) == Cell(1, "")
    endless = []
    endless.append(endless)
    assert isinstance(sent(endless), list)


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"list": 5},
        {"dict": [[1]]},
        {"dict": [[{"list": []}, 1]]},
        {"dtype": "load"},
        {"opaque": None, "list": None},
        {"tensor": "float32", "shape": [2], "data": "AAAA"},
        {"tensor": "float32", "shape": [-1], "data": "AAAAAA=="},
        {"tensor": "float32", "shape": [1] * 99, "data": "AAAAAA=="},
        {"tensor": "int64", "shape": [], "data": "AAAAAAAAAAA=", "grad": True},
        {"tensor": "float32", "shape": [9], "stride": [1], "offset": 0, "data": "AAAAAA=="},
        {"tensor": "float32", "shape": [9], "stride": [1], "offset": 0, "view": 0},
        {"tensor": "float32", "shape": [1], "stride": [1], "offset": -1, "view": 0},
        {"tensor": "float32", "shape": [1], "stride": [1], "offset": 0, "view": 7},
        {"tensor": "int8", "shape": [1], "stride": [1], "offset": 0, "view": 0},
        {"array": "|O", "shape": [1], "data": "AAAAAAAAAAA="},
        {"array": "<f4", "shape": [3], "data": "AAAAAA=="},
        {"array": "f4,f4", "shape": [1], "data": "AAAAAAAAAAA="},
        {"class": ["os", "system"]},
    ],
)
def test_what_is_not_a_value_is_refused(data):
    with pytest.raises(ValueError):
        decode(data, bases=[torch.zeros(2)])


def test_arguments_change_in_place():
    def arguments():
        return [torch.zeros(2, 2), np.zeros(2), [[1], [2]], {"a": torch.zeros(1), "b": 1}, (torch.zeros(1), 1)]

    here, there = arguments(), arguments()
    parts = here[0], here[2][0], here[4][0]
    there[0][0] = 5
    there[1][1] = 7
    there[2][0].append(3)
    there[2].pop()
    there[3]["a"] += 1
    there[3]["c"] = 2
    there[4][0].add_(1)
    copy_into(here, sent(there))
    assert here[0].tolist() == [[5, 5], [0, 0]] and here[1].tolist() == [0, 7] and here[2] == [[1, 3]]
    assert here[3] == {"a": torch.ones(1), "b": 1, "c": 2} and here[4] == (torch.ones(1), 1)
    assert all(old is new for old, new in zip(parts, (here[0], here[2][0], here[4][0]), strict=True))
    with pytest.raises(ValueError):
        copy_into(torch.zeros(2), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("ValueError", "ValueError"), ("KeyboardInterrupt", "KeyboardInterrupt"), ("Own", "Own"), ("1 2", "Exception")],
)
def test_errors_of_a_notebook_cannot_stop_the_grader(kind, name):
    error = to_error({"kind": kind, "text": "oh"})
    assert type(error).__name__ == name and isinstance(error, Exception) and str(error) == "oh"
    assert str(to_error({"kind": "UnicodeDecodeError", "text": "oh"})) == "oh"
    assert to_error({"kind": "NameError", "text": "no x", "name": "x"}).name == "x"


@pytest.mark.parametrize("reply", [None, 5, [], {}, {"kind": [], "text": ""}, {"kind": "ValueError", "text": 5}])
def test_malformed_errors_and_signatures_are_noticed(reply):
    with pytest.raises(Malformed):
        to_error(reply)
    with pytest.raises(Malformed):
        to_signature([reply])


# --- the functions of another process -------------------------------------------------------------------------------

ANSWERS = """
import torch
from minivlm import masks

def write_in_place(buffer, new, start):
    buffer[:, :, start : start + new.shape[2]] = new
    return buffer[:, :, : start + new.shape[2]]

def clip_loss(images, texts, t=0.5):
    return {"loss": (images * texts).sum() * t, "count": 3}

def pad(rows, kind):
    rows[0].append(1)
    if kind == "line":
        x = 1
        raise KeyError("x")
    return {
        "exits": exit,
        "interrupts": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
        "much": lambda: "x" * (1 << 25),
        "self": lambda: (lambda x: x.append(x) or x)([]),
        "reference": lambda: masks.block_mask(torch.ones(1, 2)),
    }[kind]()

rms_norm = 5
"""


@pytest.fixture(scope="module")
def process():
    with Remote(Clock(100, 100), threading.Event()) as remote_process:
        remote_process.start()
        assert remote_process.run(1, ANSWERS, False) is None
        yield remote_process


def test_a_stand_in_behaves_like_the_function(process):
    write, loss, pad = (process.find(name) for name in ("write_in_place", "clip_loss", "pad"))
    assert process.find("rms_norm") == 5 and process.find("geglu") is remote.MISSING
    assert str(remote.inspect.signature(loss)) == "(images, texts, t=0.5)"
    buffer, new = torch.zeros(1, 1, 4, 2), torch.rand(1, 1, 2, 2)
    view = write(buffer, new, 1)
    assert torch.equal(buffer[:, :, 1:3], new) and torch.equal(view, buffer[:, :, :3])
    view[0, 0, 0] = 9
    assert buffer[0, 0, 0].tolist() == [9, 9]  # it is a view here too
    rows = [[0]]
    with pytest.raises(Exception, match="'x'") as caught:
        pad(rows, "line")
    assert type(caught.value).__name__ == "KeyError"
    assert locate(caught.value, pad) == " on line 5 of your function"


def test_gradients_flow_through_the_other_process(process):
    loss = process.find("clip_loss")
    images, texts = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    value = loss(images, texts, t=2.0)
    assert value["count"] == 3 and not value["loss"].is_leaf
    a, b = torch.autograd.grad(value["loss"] * 3, (images, texts))
    assert torch.allclose(a, 6 * texts) and torch.allclose(b, 6 * images)
    assert not loss(images.detach(), texts.detach())["loss"].requires_grad


@pytest.mark.parametrize(
    ("kind", "error"), [("exits", "SystemExit"), ("interrupts", "KeyboardInterrupt"), ("much", "MemoryError")]
)
def test_whatever_a_function_does_is_an_error(process, kind, error):
    with pytest.raises(Exception) as caught:
        process.find("pad")([[0]], kind)
    assert type(caught.value).__name__ == error
    assert isinstance(process.find("pad")([[0]], "self"), list)  # and the process goes on


def test_only_its_own_reference_refuses(process):
    from minivlm.masks import block_mask, prefix_lm_mask

    assert process.find("pad")([[0]], "reference").shape == (1, 2, 2)
    ids = torch.ones(1, 2, dtype=torch.long)
    with refusing(block_mask) as refused:
        with pytest.raises(Exception, match="the package's own"):
            prefix_lm_mask(ids)
        assert refused
    assert prefix_lm_mask(ids).shape == (1, 2, 2)


@pytest.mark.parametrize("name", EXERCISES)
def test_every_reference_can_refuse(name):
    code = remote.inspect.unwrap(EXERCISES[name].reference).__code__
    with refusing(EXERCISES[name].reference):
        assert remote.inspect.unwrap(EXERCISES[name].reference).__code__ is not code
    assert remote.inspect.unwrap(EXERCISES[name].reference).__code__ is code


class Pipe(subprocess.Popen):
    """A process that has already replied."""

    _child_created = False  # so that nothing is cleaned up

    def __init__(self, reply: bytes):
        self.stdin, self.stdout = open(os.devnull, "wb"), self
        self.readline = lambda size: reply

    def poll(self):
        return None


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_workers_share_a_server_and_survive_its_end():
    pids = []
    for kill in (False, True, False):
        with Remote(Clock(100, 100), threading.Event()) as forked:
            forked.start()
            pids.append(forked.process.server.process.pid)
            assert forked.run(1, "rms_norm = globals().get('rms_norm', 0) + 1", False) is None
            assert forked.find("rms_norm") == 1  # nothing is left from the worker before
            if kill:
                os.kill(pids[-1], signal.SIGKILL)
    assert pids[0] == pids[1] != pids[2]
    with remote.servers():
        pass
    assert not any(is_running(str(pid)) for pid in pids)


@pytest.mark.parametrize("reply", [b"", b"no\n", b"[]\n", b"[" * 100_000, b"\xff\n", b"{}\n", b'{"function": 5}\n'])
def test_replies_that_make_no_sense_cost_the_mark(reply):
    forged = Remote.__new__(Remote)
    forged.clock, forged.stopping, forged.lost, forged.process = Clock(9, 9), threading.Event(), False, Pipe(reply)
    with pytest.raises(Lost):
        forged.find("block_mask")


@pytest.mark.parametrize(
    ("total", "step", "message"), [(0.2, 9, "The notebook took longer than 0.2"), (9, 0.2, "it took longer than 0.2")]
)
def test_a_process_that_does_not_reply_is_given_up(total, step, message):
    silent = Remote.__new__(Remote)
    silent.clock, silent.stopping, silent.lost, silent.process = Clock(total, step), threading.Event(), False, Pipe(b"")
    silent.process.readline = lambda size: time.sleep(1)
    with pytest.raises(Lost, match=message):
        silent.find("block_mask")
    assert silent.lost and silent.clock.is_over == (total < step)
    silent.clock, silent.lost = Clock(9, 9), False
    silent.stopping.set()
    with pytest.raises(Lost, match="stopped"):
        silent.find("block_mask")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find processes")
def test_stopping_finds_processes_that_left_the_session(tmp_path):
    script = DAEMON.format(path=str(tmp_path / "pid")) + "time.sleep(999)"
    environment = os.environ | {remote.MARK: "of this test"}
    started = subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True)
    while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text()):
        time.sleep(0.01)
    assert is_running(pid) and int(pid) in remote.find_family(started.pid, "of this test")
    remote.kill_family(started.pid, "of this test")
    assert not is_running(pid) and started.poll() is None
    started.kill()
    started.wait()


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
