"""Grade a folder of notebooks: one row per student, and a sentence for every lost point.

Each notebook runs in a separate process, and this one decides what its answers are worth: it generates the random
cases, asks the notebook's process for its answer to each (``remote``), and compares them with the right ones. If a cell
or an exercise crashes or takes too long, the grader records that, kills the process and everything it started, and
continues in a new process without that cell. So a notebook only loses the points of what does not work, and other
notebooks are not affected.
"""

import csv
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from minivlm.course.chapters import CHAPTERS
from minivlm.course.exercises import EXERCISES, Exercise
from minivlm.course.exercises.exercise import examine
from minivlm.course.grading import pages
from minivlm.course.grading.remote import MISSING, Clock, Lost, Remote, UsesPackage, one_line
from minivlm.course.grading.report import Mark, Report, points_of, printable
from minivlm.course.grading.submissions import Cell, Submissions, defines, exercises_in, find_submissions, read_cells

STEP_SHARE = 0.25  # of the notebook's time limit, for one cell or one exercise
MAX_PROCESSES = 8  # for one notebook
MAX_PARALLEL = 4  # notebooks
EXAMINING = threading.Lock()  # a check seeds torch and sets a time limit, so one at a time


def warn(text: str) -> None:
    """Print to stderr."""
    print(text, file=sys.stderr)


def grade(
    submissions: Path,
    out: Path,
    seed: int,
    time_limit: int | float,
    chapter: str | None = None,
    due: datetime | None = None,
    say: Callable[[str], None] = print,
    warn: Callable[[str], None] = warn,
) -> None:
    """Grade every notebook in a folder and write two tables, and a page for every student and one for the teacher.

    They are written again whenever all notebooks of a student are graded. So if you stop the grading, they
    contain everybody who was graded until then.

    Args:
        submissions: One notebook per student, or one folder per student with notebooks anywhere in it.
        out: CSV file for the marks. The messages go next to it, grades.csv → grades.messages.csv, and
            so does the folder grades.pages, with index.html for the teacher.
        seed: Seed of the random cases. With a private one, students do not know the cases.
        time_limit: Seconds per notebook. One cell or exercise can take a quarter of it.
        chapter: Grade only this one ("05"). Default: all chapters that were submitted.
        due: Notebooks that changed after this moment are listed as late. They keep their points.
        say: Called with one line per notebook.
        warn: Called with one line per file that is not graded.

    Raises:
        ValueError: If an argument is wrong, or no notebook contains an exercise of the course.
        OSError: If the tables cannot be written. Existing ones stay as they are.
    """
    check_arguments(seed, time_limit, chapter)
    check_target(out)
    check_target(messages_path(out))
    found = find_submissions(submissions, ignored=(out, messages_path(out), pages_path(out)))
    for sentence in (sentence for sentences in found.remarks.values() for sentence in sentences):
        warn(printable(sentence))
    table = Table(out, chapter, found, due)
    stopping = threading.Event()
    with ThreadPoolExecutor(min(MAX_PARALLEL, os.cpu_count() or 1)) as pool:
        jobs = {
            pool.submit(grade_notebook, path, seed, time_limit, stopping): (student, path)
            for student, paths in found.students.items()
            for path in paths
        }
        try:
            for job in as_completed(jobs):
                student, path = jobs[job]
                say(printable(f"{path.relative_to(submissions)}: {summarize(job.result())}"))
                if table.add(student, path, job.result()):
                    with suppress(OSError):  # the last one counts, and raises
                        table.write()
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            warn(f"Stopped. {len(table.reports)} of {len(found.students)} students were graded.")
            raise
    if not table.exercises:
        raise ValueError("No notebook here contains an exercise of the course. Name the chapter with --chapter.")
    table.write()


def check_arguments(seed: int, time_limit: int | float, chapter: str | None) -> None:
    if seed < 0:
        raise ValueError(f"--seed must be 0 or more, not {seed}.")
    if not time_limit > 0:
        raise ValueError(f"--time-limit must be more than 0 seconds, not {time_limit:g}.")
    if chapter is not None and chapter not in CHAPTERS:
        raise ValueError(f"There is no chapter {chapter!r}, only {', '.join(CHAPTERS)}.")


def check_target(path: Path) -> None:
    """Try to write where the marks will be, before the first notebook rather than after the last."""
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise ValueError(f"Cannot write the marks to {str(path)!r}: name a file in a folder that exists.")
    try:
        aside(path).write_bytes(b"")
        aside(path).unlink()
    except OSError as error:
        raise ValueError(f"Cannot write the marks to {str(path)!r} ({error.strerror}).") from None


def summarize(report: Report) -> str:
    right = sum(mark.score == 1 for mark in report.marks.values())
    return " ".join((f"{right} of {len(report.marks)} exercises right.", *report.problems))


# --- one notebook ---------------------------------------------------------------------------------------------------


def grade_notebook(path: Path, seed: int, time_limit: int | float, stopping: threading.Event | None = None) -> Report:
    """Run and check one notebook, with a new process after each crash. Whatever is wrong with it is in the report."""
    report = Report(chapters={path.name[:2]} & set(CHAPTERS))
    try:
        cells = read_cells(path)
        names, chapters = exercises_in(cells)
        report.chapters |= chapters
        Run(cells, names, seed, time_limit, report, stopping or threading.Event()).finish()
    except Exception as error:
        report.problems.append(str(error) if type(error) is ValueError else f"It was not graded ({one_line(error)}).")
    return report


class Run:
    """The processes of one notebook, and the time they share, which does not include starting them."""

    def __init__(
        self,
        cells: list[Cell],
        names: list[str],
        seed: int,
        time_limit: int | float,
        report: Report,
        stopping: threading.Event,
    ):
        self.cells, self.names, self.seed, self.report, self.stopping = cells, names, seed, report, stopping
        self.clock = Clock(time_limit, STEP_SHARE * time_limit)
        self.failed: dict[str, str] = {}  # steps that ended a process, and why

    def finish(self) -> None:
        """Run processes until all exercises have a mark."""
        for _ in range(MAX_PROCESSES):
            step, why = self.attempt()
            if not step:
                break
            self.failed[step] = why
            if step in EXERCISES:
                self.report.marks.setdefault(step, Mark(0.0, why))
        else:
            why = f"The notebook crashed {MAX_PROCESSES} processes."
        if why:
            self.report.problems.append(why)
        for name in self.names:
            self.report.marks.setdefault(name, Mark(0.0, why))

    def attempt(self) -> tuple[str, str]:
        """Run one process to its end.

        Returns:
            The step that ended it and the reason. Without a step, another process would not help. Without a reason
            either, all went well.
        """
        step = ""
        with Remote(self.clock, self.stopping) as remote:
            try:
                remote.start()
                errors = dict(self.failed)
                for cell in self.cells:
                    step = f"cell {cell.number}"
                    if step not in self.failed and not cell.is_hidden_test:
                        self.clock.start_step()
                        if error := remote.run(cell.number, cell.source, cell.is_unchanged):
                            errors[step] = error
                for step in self.names:
                    if step not in self.report.marks:
                        self.clock.start_step()
                        self.report.marks[step] = self.mark(remote, EXERCISES[step], errors)
                        if remote.lost:  # the check gave up on a call, so the process still runs it
                            return step, self.report.marks[step].message
            except Lost as lost:
                return "" if self.clock.is_over or self.stopping.is_set() else step, str(lost)
        return "", ""

    def mark(self, remote: Remote, exercise: Exercise, errors: dict[str, str]) -> Mark:
        """The fraction of the cases that are right, and the check's message."""
        try:
            function = remote.find(exercise.name)
            if function is MISSING:
                return Mark(0.0, self.why_missing(exercise.name, errors))
            with EXAMINING:
                result = examine(exercise, function, self.seed)
        except UsesPackage as refused:
            return Mark(0.0, str(refused))
        except Exception as error:  # an answer that was not foreseen
            return Mark(0.0, f"its answers cannot be compared with the right ones ({one_line(error)}).")
        return Mark(float(result.score), result.message, result.mistake, result.notes, result.attempted)

    def why_missing(self, name: str, errors: dict[str, str]) -> str:
        for cell in self.cells:
            if f"cell {cell.number}" in errors and defines(cell.source, name):
                return f"the cell that defines it fails: {errors[f'cell {cell.number}']}"
        return "the notebook does not define a function with this name."


# --- tables ---------------------------------------------------------------------------------------------------------


class Table:
    """The marks and messages of the students who are graded so far."""

    def __init__(self, out: Path, chapter: str | None, found: Submissions, due: datetime | None):
        self.out, self.chapter, self.found, self.due = out, chapter, found, due
        self.notebooks: dict[str, dict[Path, Report]] = {student: {} for student in found.students}

    def add(self, student: str, path: Path, report: Report) -> bool:
        """Add the report of one notebook. Returns whether the student has no others left."""
        report.late += late_sentences(path, self.due)
        self.notebooks[student][path] = report
        return student in self.reports

    @property
    def reports(self) -> dict[str, Report]:
        """Student → report, for students whose notebooks are all graded."""
        reports = {}
        for student, paths in self.found.students.items():
            if len(self.notebooks[student]) == len(paths):
                reports[student] = Report(problems=list(self.found.remarks.get(student, ())))
                for path in paths:
                    reports[student].add(self.notebooks[student][path])
        return reports

    @property
    def exercises(self) -> list[Exercise]:
        """Those of the chapter, or of all chapters that were submitted."""
        chapters = set().union(*(report.chapters for report in self.reports.values()))
        return [
            exercise
            for exercise in EXERCISES.values()
            if exercise.chapter in ({self.chapter} if self.chapter else chapters)
        ]

    def write(self) -> None:
        """Write tables and pages, if there is an exercise."""
        if self.exercises:
            write_table(self.out, mark_rows(self.reports, self.exercises))
            remarks = self.found.remarks.get("", ())
            write_table(messages_path(self.out), message_rows(self.reports, self.exercises, remarks))
            write_pages(pages_path(self.out), self.reports, self.exercises, remarks)


def late_sentences(path: Path, due: datetime | None) -> list[str]:
    """A sentence if the notebook changed after it was due."""
    with suppress(OSError):
        changed = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
        if due is not None and changed > due.astimezone():
            return [f"{path.name} changed on {changed:%Y-%m-%d at %H:%M}, after it was due."]
    return []


def messages_path(out: Path) -> Path:
    """grades.csv → grades.messages.csv."""
    return out.with_name(f"{out.stem}.messages{out.suffix}")


def pages_path(out: Path) -> Path:
    """grades.csv → grades.pages."""
    return out.with_name(f"{out.stem}.pages")


def column(exercise: Exercise) -> str:
    return f"{exercise.key} {exercise.name}"


def mark_rows(reports: dict[str, Report], exercises: list[Exercise]) -> Iterable[list]:
    yield ["student", *map(column, exercises), "total", "max"]
    for student, report in reports.items():
        points = [points_of(report, exercise) for exercise in exercises]
        yield [student, *points, round(sum(points), 2), sum(exercise.points for exercise in exercises)]


def message_rows(reports: dict[str, Report], exercises: list[Exercise], remarks: Iterable[str] = ()) -> Iterable[list]:
    yield ["student", "exercise", "points", "max", "message"]
    for sentence in remarks:
        yield ["", "", "", "", sentence]
    for student, report in reports.items():
        for problem in report.problems:
            yield [student, "", "", "", problem]
        for exercise in exercises:
            mark = report.marks.get(exercise.name, Mark())
            if mark.score < 1:
                yield [student, column(exercise), points_of(report, exercise), exercise.points, mark.sentence]


def write_table(path: Path, rows: Iterable[list]) -> None:
    """Write a CSV file next to the old one and then replace it, so that there is a complete one at any time."""
    try:
        with open(aside(path), "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([escape_formula(cell) for cell in row] for row in rows)
        os.replace(aside(path), aside(path).with_suffix(""))
    except OSError as error:
        with suppress(OSError):
            aside(path).unlink()
        raise OSError(f"Cannot write {str(path)!r} ({error.strerror}).") from None


def write_pages(folder: Path, reports: dict[str, Report], exercises: list[Exercise], remarks: Iterable[str]) -> None:
    """Write a page for each student, and index.html about the class."""
    files = pages.file_names(reports)
    texts = {file: pages.student_page(student, reports[student], exercises) for student, file in files.items()}
    texts["index.html"] = pages.class_page(reports, exercises, files, list(remarks))
    try:
        folder.mkdir(exist_ok=True)
        for old in set(folder.glob("*.html")) - {folder / file for file in texts}:
            old.unlink()
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"Cannot write {str(folder)!r} ({error.strerror}).") from None


def aside(path: Path) -> Path:
    """Where a table is written first: grades.csv → grades.csv.part, in the folder that a link points to."""
    return Path(os.path.realpath(path) + ".part")


def escape_formula(cell: str | int | float) -> str | int | float:
    """Put an apostrophe before text that a spreadsheet would run as a formula."""
    if not isinstance(cell, str):
        return cell
    return printable(f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell)
