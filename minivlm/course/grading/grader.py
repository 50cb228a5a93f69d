"""Grades a folder of notebooks: a row per student, and a sentence for every mark that was lost.

Each notebook runs in a process of its own (``worker``), which is watched: a cell or an exercise that crashes or takes
too long is noted, its process and what it started are killed, and another one goes on without it. So a notebook loses
what does not work, and no other notebook notices.
"""

import csv
import io
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from minivlm.course.exercises import CHAPTERS, EXERCISES, Exercise

START_LIMIT = 300.0  # seconds for a process to load what it needs, which counts for no one
SHARE = 0.25  # of the notebook's time that one cell or one exercise may take
ATTEMPTS = 8  # processes that one notebook may break
AT_ONCE = 4  # notebooks
ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Mark:
    score: float = 0.0  # share of the exercise's points, 0 to 1
    message: str = "not handed in, or not readable."


@dataclass
class Report:
    """What came of one notebook, or of all that a student handed in."""

    chapters: set[str] = field(default_factory=set)
    marks: dict[str, Mark] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, other: "Report") -> None:
        """The better mark of each exercise counts."""
        self.chapters |= other.chapters
        self.problems += other.problems
        for name, mark in other.marks.items():
            if name not in self.marks or mark.score > self.marks[name].score:
                self.marks[name] = mark


def grade(
    submissions: Path,
    out: Path,
    seed: int,
    time_limit: int | float,
    chapter: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Grades every notebook under a folder, into two tables.

    Args:
        submissions: notebooks, one a student, or folders, one a student, with notebooks anywhere in them.
        out: the marks, a CSV file; the messages go beside it, grades.csv → grades.messages.csv.
        seed: of the random cases; a private one hides them.
        time_limit: seconds for one notebook; one cell or exercise may take a quarter of it.
        chapter: "05" to grade this one alone; else the chapters that anybody handed in.
    """
    check_arguments(out, seed, time_limit, chapter)
    students = find_students(submissions)
    jobs = [(student, path) for student, paths in students.items() for path in paths]
    reports = {student: Report() for student in students}
    pool = ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1))
    # closing: what has not begun is left alone when someone presses Ctrl-C
    with pool, closing(pool.map(lambda job: grade_notebook(job[1], seed, time_limit), jobs)) as graded:
        for (student, path), report in zip(jobs, graded, strict=True):
            reports[student].add(report)
            say(printable(f"{path.relative_to(submissions)}: {in_short(report)}"))
    chapters = {chapter} if chapter else set().union(*(report.chapters for report in reports.values()))
    exercises = [exercise for exercise in EXERCISES.values() if exercise.chapter in chapters]
    if not exercises:
        raise ValueError("No notebook here asks for an exercise of the course: name the chapter with --chapter.")
    write_table(out, mark_rows(reports, exercises))
    write_table(messages_path(out), message_rows(reports, exercises))


def check_arguments(out: Path, seed: int, time_limit: int | float, chapter: str | None) -> None:
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"The marks cannot be written to {str(out)!r}: name a file in a folder that exists.")
    if seed < 0:
        raise ValueError(f"--seed must be 0 or more, not {seed}.")
    if not time_limit > 0:
        raise ValueError(f"--time-limit must be more than 0 seconds, not {time_limit:g}.")
    if chapter is not None and chapter not in CHAPTERS:
        raise ValueError(f"There is no chapter {chapter!r}, only {', '.join(CHAPTERS)}.")


def find_students(folder: Path) -> dict[str, list[Path]]:
    """Student → notebooks. A file is a student's who is called like it, and so is a folder."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r} with notebooks to grade.")
    students: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found = (p for p in sorted(path.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts)
            students.setdefault(path.name, []).extend(p for p in found if p.is_file())
        elif path.suffix == ".ipynb":
            students.setdefault(path.stem, []).append(path)
    if not students:
        raise ValueError(
            f"{str(folder)!r} holds no notebooks: it should hold NAME.ipynb, or a folder for each student."
        )
    return students


def in_short(report: Report) -> str:
    right = sum(mark.score == 1 for mark in report.marks.values())
    return " ".join((f"{right} of {len(report.marks)} exercises right.", *report.problems))


def printable(text: str) -> str:
    """File names may hold bytes that are no text: these are written escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


# --- one notebook ---------------------------------------------------------------------------------------------------


def grade_notebook(path: Path, seed: int, time_limit: int | float) -> Report:
    """Runs and checks one notebook, in as many processes as it breaks."""
    report = Report(chapters={path.name[:2]} & set(CHAPTERS))
    run = Run(report, time_limit)
    trouble: dict[str, str] = {}
    for _ in range(ATTEMPTS):
        job = {"path": str(path.resolve()), "seed": seed, "trouble": trouble, "marked": list(report.marks)}
        step, why = run.attempt(job)
        if not step:
            break
        trouble[step] = why
        if step in EXERCISES:
            report.marks[step] = Mark(0.0, why)
    else:
        why = f"The notebook broke {ATTEMPTS} processes."
    if why:
        report.problems.append(why)
    for name in run.exercises:
        report.marks.setdefault(name, Mark(0.0, why))
    return report


class Run:
    """The processes of one notebook, and the time that they have together, in which loading does not count."""

    def __init__(self, report: Report, time_limit: int | float):
        self.report = report
        self.time_limit = time_limit
        self.left = time_limit
        self.exercises: list[str] = []

    def attempt(self, job: dict) -> tuple[str, str]:
        """Runs a process to its end. Returns the step that it broke at and why. Without a step there is no use in
        another process; without a reason either, all went well."""
        token = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            process = start(job | {"token": token}, folder)
            heard: queue.Queue = queue.Queue()
            threading.Thread(target=listen, args=(process.stdout, token.encode(), heard), daemon=True).start()
            try:
                return self.load(heard) or self.follow(heard)
            finally:
                stop(process)

    def load(self, heard: queue.Queue) -> tuple[str, str] | None:
        """Waits for the list of exercises; returns what ``attempt`` does where there is none."""
        try:
            said = heard.get(timeout=START_LIMIT)
        except queue.Empty:
            said = {}
        if "exercises" not in said:
            return "", said.get("problem", "This is no notebook that can be read: it broke the process that tried.")
        self.exercises = said["exercises"]
        self.report.chapters |= set(said["chapters"])
        return None

    def follow(self, heard: queue.Queue) -> tuple[str, str]:
        """Collects marks until the process is done, broken or late."""
        step, began = "", time.monotonic()
        end = until = began + self.left
        try:
            while "done" not in (said := heard.get(timeout=max(0.0, until - time.monotonic()))):
                if "problem" in said:
                    return "", said["problem"]
                if "ended" in said:
                    return step, "it ended the Python process."
                if "step" in said:
                    step, until = said["step"], min(end, time.monotonic() + SHARE * self.time_limit)
                else:
                    self.report.marks[said["exercise"]] = Mark(said["score"], said["message"])
            return "", ""
        except queue.Empty:
            if until < end:
                return step, f"it took longer than {SHARE * self.time_limit:g} seconds."
            return "", f"The notebook took longer than {self.time_limit:g} seconds."
        finally:
            self.left -= time.monotonic() - began


def start(job: dict, folder: str) -> subprocess.Popen:
    """A worker in a folder and a process group of its own. -P: it imports nothing from that folder."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from minivlm.course.grading import worker; worker.main()"],
        cwd=folder,
        env=os.environ | ENVIRONMENT | {"MINIVLM_HOME": folder, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with process.stdin as stream:
        stream.write(json.dumps(job).encode())
    return process


def listen(stream: io.BufferedReader, token: bytes, heard: queue.Queue) -> None:
    """Passes on what carries the token, and that the process has ended; the rest is a learner's."""
    for line in iter(lambda: stream.readline(1 << 16), b""):
        if line.startswith(token):
            heard.put(json.loads(line.removeprefix(token)))
    heard.put({"ended": True})


def stop(process: subprocess.Popen) -> None:
    """Ends the worker and, where there are process groups, what it started."""
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):  # nothing is left of the group
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


# --- tables ---------------------------------------------------------------------------------------------------------


def messages_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}.messages{out.suffix}")


def column(exercise: Exercise) -> str:
    return f"{exercise.key} {exercise.name}"


def mark_rows(reports: dict[str, Report], exercises: list[Exercise]) -> Iterable[list]:
    yield ["student", *map(column, exercises), "total", "max"]
    for student, report in reports.items():
        points = [points_of(report, exercise) for exercise in exercises]
        yield [student, *points, round(sum(points), 2), sum(exercise.points for exercise in exercises)]


def message_rows(reports: dict[str, Report], exercises: list[Exercise]) -> Iterable[list]:
    yield ["student", "exercise", "points", "max", "message"]
    for student, report in reports.items():
        for problem in report.problems:
            yield [student, "", "", "", problem]
        for exercise in exercises:
            mark = report.marks.get(exercise.name, Mark())
            if mark.score < 1:
                yield [student, column(exercise), points_of(report, exercise), exercise.points, mark.message]


def points_of(report: Report, exercise: Exercise) -> float:
    return round(exercise.points * report.marks.get(exercise.name, Mark()).score, 2)


def write_table(path: Path, rows: Iterable[list]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([harmless(cell) for cell in row] for row in rows)


def harmless(cell: str | int | float) -> str | int | float:
    """Spreadsheets run a text that begins like a formula: an apostrophe keeps it a text."""
    if not isinstance(cell, str):
        return cell
    return printable(f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell)
