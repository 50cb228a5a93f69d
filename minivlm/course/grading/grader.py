"""Grade a folder of notebooks: one row per student, and a sentence for every lost point.

Each notebook runs in a separate process (``worker``). If a cell or an exercise crashes or takes too long, the grader
records that, kills the process and everything it started, and continues in a new process without that cell. So a
notebook only loses the points of what does not work, and other notebooks are not affected.
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

from minivlm.course.chapters import CHAPTERS
from minivlm.course.exercises import EXERCISES, Exercise

START_LIMIT = 300.0  # seconds for a process to start, not included in the notebook's time
STEP_SHARE = 0.25  # of the notebook's time limit, for one cell or one exercise
MAX_PROCESSES = 8  # for one notebook
MAX_PARALLEL = 4  # notebooks
ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Mark:
    """The grade of one exercise. ``score`` is the fraction of its points, 0 to 1."""

    score: float = 0.0
    message: str = "not submitted, or not readable."


@dataclass
class Report:
    """The result of one notebook, or of all notebooks of one student."""

    chapters: set[str] = field(default_factory=set)
    marks: dict[str, Mark] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, other: "Report") -> None:
        """Merge another report. The better mark of each exercise wins."""
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
    """Grade every notebook in a folder and write two tables.

    Args:
        submissions: One notebook per student, or one folder per student with notebooks anywhere in it.
        out: CSV file for the marks. The messages go next to it, grades.csv → grades.messages.csv.
        seed: Seed of the random cases. With a private one, students do not know the cases.
        time_limit: Seconds per notebook. One cell or exercise can take a quarter of it.
        chapter: Grade only this one ("05"). Default: all chapters that were submitted.
        say: Called with one line per notebook.

    Raises:
        ValueError: If an argument is wrong, or no notebook contains an exercise of the course.
    """
    check_arguments(out, seed, time_limit, chapter)
    students = find_students(submissions)
    jobs = [(student, path) for student, paths in students.items() for path in paths]
    reports = {student: Report() for student in students}
    pool = ThreadPoolExecutor(min(MAX_PARALLEL, os.cpu_count() or 1))
    # closing: on Ctrl-C, notebooks that are still waiting are not started
    with pool, closing(pool.map(lambda job: grade_notebook(job[1], seed, time_limit), jobs)) as graded:
        for (student, path), report in zip(jobs, graded, strict=True):
            reports[student].add(report)
            say(printable(f"{path.relative_to(submissions)}: {summarize(report)}"))
    chapters = {chapter} if chapter else set().union(*(report.chapters for report in reports.values()))
    exercises = [exercise for exercise in EXERCISES.values() if exercise.chapter in chapters]
    if not exercises:
        raise ValueError("No notebook here contains an exercise of the course. Name the chapter with --chapter.")
    write_table(out, mark_rows(reports, exercises))
    write_table(messages_path(out), message_rows(reports, exercises))


def check_arguments(out: Path, seed: int, time_limit: int | float, chapter: str | None) -> None:
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"Cannot write the marks to {str(out)!r}: name a file in a folder that exists.")
    if seed < 0:
        raise ValueError(f"--seed must be 0 or more, not {seed}.")
    if not time_limit > 0:
        raise ValueError(f"--time-limit must be more than 0 seconds, not {time_limit:g}.")
    if chapter is not None and chapter not in CHAPTERS:
        raise ValueError(f"There is no chapter {chapter!r}, only {', '.join(CHAPTERS)}.")


def find_students(folder: Path) -> dict[str, list[Path]]:
    """Student → notebooks. The name of the file or folder is the name of the student."""
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
        raise ValueError(f"{str(folder)!r} contains no notebooks: expected NAME.ipynb or a folder for each student.")
    return students


def summarize(report: Report) -> str:
    right = sum(mark.score == 1 for mark in report.marks.values())
    return " ".join((f"{right} of {len(report.marks)} exercises right.", *report.problems))


def printable(text: str) -> str:
    """Escape bytes in file names that are not valid text."""
    return text.encode("utf-8", "backslashreplace").decode()


# --- one notebook ---------------------------------------------------------------------------------------------------


def grade_notebook(path: Path, seed: int, time_limit: int | float) -> Report:
    """Run and check one notebook, with a new process after each crash."""
    report = Report(chapters={path.name[:2]} & set(CHAPTERS))
    run = Run(report, time_limit)
    failed: dict[str, str] = {}
    for _ in range(MAX_PROCESSES):
        job = {"path": str(path.resolve()), "seed": seed, "failed": failed, "marked": list(report.marks)}
        step, why = run.attempt(job)
        if not step:
            break
        failed[step] = why
        if step in EXERCISES:
            report.marks[step] = Mark(0.0, why)
    else:
        why = f"The notebook crashed {MAX_PROCESSES} processes."
    if why:
        report.problems.append(why)
    for name in run.exercises:
        report.marks.setdefault(name, Mark(0.0, why))
    return report


class Run:
    """The processes of one notebook and the time they share, which does not include starting them."""

    def __init__(self, report: Report, time_limit: int | float):
        self.report = report
        self.time_limit = time_limit
        self.left = time_limit
        self.exercises: list[str] = []

    def attempt(self, job: dict) -> tuple[str, str]:
        """Run one process to its end.

        Returns:
            The step that failed and the reason. Without a step, another process would not help. Without a reason
            either, all went well.
        """
        token = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            process = start(job | {"token": token}, folder)
            messages: queue.Queue = queue.Queue()
            threading.Thread(target=listen, args=(process.stdout, token.encode(), messages), daemon=True).start()
            try:
                return self.load(messages) or self.follow(messages)
            finally:
                stop(process)

    def load(self, messages: queue.Queue) -> tuple[str, str] | None:
        """Wait for the list of exercises. Returns what ``attempt`` returns if there is none."""
        try:
            message = messages.get(timeout=START_LIMIT)
        except queue.Empty:
            message = {}
        if "exercises" not in message:
            return "", message.get("problem", "This file is not a readable notebook: it crashed the process.")
        self.exercises = message["exercises"]
        self.report.chapters |= set(message["chapters"])
        return None

    def follow(self, messages: queue.Queue) -> tuple[str, str]:
        """Collect marks until the process is done, has crashed, or runs out of time."""
        step, began = "", time.monotonic()
        end = until = began + self.left
        try:
            while "done" not in (message := messages.get(timeout=max(0.0, until - time.monotonic()))):
                if "problem" in message:
                    return "", message["problem"]
                if "ended" in message:
                    return step, "it ended the Python process."
                if "step" in message:
                    step, until = message["step"], min(end, time.monotonic() + STEP_SHARE * self.time_limit)
                else:
                    self.report.marks[message["exercise"]] = Mark(message["score"], message["message"])
            return "", ""
        except queue.Empty:
            if until < end:
                return step, f"it took longer than {STEP_SHARE * self.time_limit:g} seconds."
            return "", f"The notebook took longer than {self.time_limit:g} seconds."
        finally:
            self.left -= time.monotonic() - began


def start(job: dict, folder: str) -> subprocess.Popen:
    """Start a worker in its own folder and process group. With -P it imports nothing from that folder."""
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


def listen(stream: io.BufferedReader, token: bytes, messages: queue.Queue) -> None:
    """Pass on lines that start with the token, and that the process ended. Other lines are a learner's output."""
    for line in iter(lambda: stream.readline(1 << 16), b""):
        if line.startswith(token):
            messages.put(json.loads(line.removeprefix(token)))
    messages.put({"ended": True})


def stop(process: subprocess.Popen) -> None:
    """Kill the worker and, where process groups exist, everything it started."""
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):  # the group is already gone
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


# --- tables ---------------------------------------------------------------------------------------------------------


def messages_path(out: Path) -> Path:
    """grades.csv → grades.messages.csv."""
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
        csv.writer(file).writerows([escape_formula(cell) for cell in row] for row in rows)


def escape_formula(cell: str | int | float) -> str | int | float:
    """Put an apostrophe before text that a spreadsheet would run as a formula."""
    if not isinstance(cell, str):
        return cell
    return printable(f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell)
