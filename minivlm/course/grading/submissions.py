"""Find the notebooks that students submitted, and read them.

Nothing in a submission can stop the others: what is not a readable notebook gets a sentence. Only regular files are
opened, so no pipe or device can block.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minivlm.course.exercises import EXERCISES
from minivlm.course.grading.worker import CHECKED, fingerprint

MAX_NOTEBOOK = 64 << 20  # bytes
IGNORED = {"__MACOSX", "__pycache__"}  # and names that start with a dot
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"}


@dataclass
class Submissions:
    """What is in a folder of submissions.

    Attributes:
        students: Student → notebooks, in order.
        remarks: Student → sentences about files that are not graded. Student "" for files that belong to none.
    """

    students: dict[str, list[Path]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)

    def remark(self, student: str, sentence: str) -> None:
        self.remarks.setdefault(student, []).append(sentence)

    def keep(self, students: Iterable[str]) -> None:
        """Forget all other students."""
        self.students = {student: self.students[student] for student in students}
        self.remarks = {name: said for name, said in self.remarks.items() if name in ("", *self.students)}


def find_submissions(folder: Path, ignored: Iterable[Path] = ()) -> Submissions:
    """The notebooks of each student. The name of the file or folder is the name of the student.

    Args:
        folder: One notebook per student, or one folder per student with notebooks anywhere in it.
        ignored: Files of the teacher's that can be in the folder.

    Raises:
        ValueError: If there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r} with notebooks to grade.")
    found, ignored = Submissions(), {os.path.abspath(path) for path in ignored}
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if is_ignored(name) or os.path.abspath(path) in ignored:
            continue
        is_folder = os.path.isdir(path)
        student = path.stem if is_notebook(path) else name if is_folder else ""
        files = sorted(files_in(path, student, found)) if is_folder else [path]
        notebooks = [file for file in files if is_gradable(file, folder, student, found)]
        if student:
            found.students.setdefault(student, []).extend(notebooks)
    for student in found.students:
        found.students[student] = without_copies(student, folder, found)
    if not found.students:
        more = "".join(f" {sentence}" for sentences in found.remarks.values() for sentence in sentences)
        raise ValueError(
            f"{str(folder)!r} contains no notebooks: expected NAME.ipynb or a folder for each student.{more}"
        )
    return found


def is_ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED


def is_notebook(path: Path) -> bool:
    return path.suffix.lower() == ".ipynb"


def files_in(folder: Path, student: str, found: Submissions) -> Iterator[Path]:
    """All files in a student's folder, in order. Links to other folders are not followed."""

    def skip(error: OSError) -> None:
        found.remark(student, f"The folder {error.filename} was not graded: it cannot be read ({error.strerror}).")

    try:
        for parent, folders, files in os.walk(folder, onerror=skip):
            folders[:] = sorted(name for name in folders if not is_ignored(name))
            for name in folders:
                if is_notebook(Path(name)):
                    found.remark(student, f"{name} is a folder, not a notebook.")
            yield from (Path(parent, name) for name in sorted(files) if not is_ignored(name))
    except RecursionError:
        found.remark(student, "Some folders were not graded: they are nested too deeply.")


def is_gradable(path: Path, folder: Path, student: str, found: Submissions) -> bool:
    """Whether this is a notebook. Otherwise, a remark says why it is not graded."""
    if not os.path.isfile(path):
        why = "it is not a regular file, or a link to nothing."
    elif is_notebook(path):
        return True
    elif path.suffix.lower() in ARCHIVES:
        why = "unpack it first."
    elif ".ipynb" in path.name.lower():
        why = "rename it so that its name ends in .ipynb."
    else:
        why = "only notebooks are, and their names end in .ipynb."
    found.remark(student, f"{path.relative_to(folder)} was not graded: {why}")
    return False


def without_copies(student: str, folder: Path, found: Submissions) -> list[Path]:
    """The notebooks of a student without those that equal an earlier one."""
    first: dict[str, Path] = {}
    for path in found.students[student]:
        try:
            key = hashlib.sha256(read_file(path)).hexdigest()
        except (OSError, ValueError):  # grading it will say why
            key = str(path)
        if key in first:
            same = first[key].relative_to(folder)
            found.remark(student, f"{path.relative_to(folder)} was not graded: it is identical to {same}.")
        first.setdefault(key, path)
    return list(first.values())


# --- one notebook ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A code cell.

    Attributes:
        number: Counts code cells, from 1.
        is_unchanged: Whether it is as it was released.
        is_hidden_test: Whether nbgrader marks it as one that awards points. Such cells do not run.
    """

    number: int
    source: str
    is_unchanged: bool = False
    is_hidden_test: bool = False


def read_file(path: Path) -> bytes:
    if not os.path.isfile(path):
        raise ValueError("it is not a regular file")
    with open(path, "rb") as file:
        data = file.read(MAX_NOTEBOOK + 1)
    if len(data) > MAX_NOTEBOOK:
        raise ValueError(f"it is larger than {MAX_NOTEBOOK >> 20} MB")
    return data


def read_cells(path: Path) -> list[Cell]:
    """The code cells of a notebook, in UTF-8, UTF-16 or UTF-32.

    Raises:
        ValueError: If this is not a notebook. The message is one sentence.
    """
    unreadable = "This file is not a readable notebook"
    try:
        book = json.loads(read_file(path))
    except OSError as error:
        raise ValueError(f"{unreadable} ({error.strerror}).") from None
    except RecursionError:
        raise ValueError(f"{unreadable} (its lists are nested too deeply).") from None
    except ValueError as error:
        raise ValueError(f"{unreadable} ({str(error)[:200]}).") from None
    if isinstance(book, dict) and "worksheets" in book:
        raise ValueError("This notebook has an old format. Open it in Jupyter and save it again.")
    if not isinstance(book, dict) or not isinstance(book.get("cells"), list):
        raise ValueError(f"{unreadable} (it has no list of cells).")
    cells = (cell for cell in book["cells"] if isinstance(cell, dict) and cell.get("cell_type") == "code")
    return [read_cell(number, cell) for number, cell in enumerate(cells, start=1)]


def read_cell(number: int, cell: dict) -> Cell:
    source, metadata = cell.get("source", ""), cell.get("metadata")
    if isinstance(source, list):
        source = "".join(part for part in source if isinstance(part, str))
    if not isinstance(source, str):
        source = ""
    marks = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    is_hidden_test = isinstance(marks, dict) and bool(marks.get("grade"))
    return Cell(number, source, str(cell.get("id", "")).startswith(fingerprint(source)), is_hidden_test)


def exercises_in(cells: list[Cell]) -> tuple[list[str], set[str]]:
    """Names of the exercises that a notebook defines or checks, and the chapters of those that it checks."""
    text = "\n".join(cell.source for cell in cells)
    checked = {name for name in CHECKED.findall(text) if name in EXERCISES}
    names = [name for name in EXERCISES if name in checked or defines(text, name)]
    return names, {EXERCISES[name].chapter for name in checked}


def defines(source: str, name: str) -> bool:
    """Whether a cell assigns to this name, or defines a function or class of this name."""
    return re.search(rf"^(?:(?:async +def|def|class) {name}\b|{name} *=)", source, re.MULTILINE) is not None
