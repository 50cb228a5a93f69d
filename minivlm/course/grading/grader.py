"""Grade a folder of notebooks: one row per student, and a sentence for every lost point.

Each notebook runs in a separate process, and this one decides what its answers are worth: it generates the random
cases, asks the notebook's process for its answer to each (``remote``), and compares them with the right ones. If a cell
or an exercise crashes or takes too long, the grader records that, kills the process and everything it started, and
continues in a new process without that cell. So a notebook only loses the points of what does not work, and other
notebooks are not affected.
"""

import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from minivlm.course.chapters import CHAPTERS
from minivlm.course.exercises import EXERCISES, Exercise
from minivlm.course.exercises.exercise import examine
from minivlm.course.grading import pages, shards
from minivlm.course.grading.remote import MISSING, Clock, Lost, Remote, UsesPackage, one_line, servers
from minivlm.course.grading.report import Mark, Report, printable
from minivlm.course.grading.shards import Part, Shard
from minivlm.course.grading.submissions import Cell, Submissions, defines, exercises_in, find_submissions, read_cells
from minivlm.course.grading.tables import LAYOUTS, aside, check_names, message_rows, write_table

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
    shard: Shard | None = None,
    layout: str = "",
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
        shard: Grade only the students of this part, and write what ``merge`` needs instead of tables and pages.
        layout: Of the table of marks: "moodle" and "canvas" are what these import. Default: a column per exercise.
        say: Called with one line per notebook.
        warn: Called with one line per file that is not graded.

    Raises:
        ValueError: If an argument is wrong, or no notebook contains an exercise of the course.
        OSError: If the tables cannot be written. Existing ones stay as they are.
    """
    check_arguments(seed, time_limit, chapter)
    check_target(out)
    targets = (shard.path(out),) if shard else (out, messages_path(out))
    check_target(targets[-1])
    found = find_submissions(submissions, ignored=(*targets, pages_path(out), *out.parent.glob(shards.NAME)))
    students = list(found.students)
    check_names(layout, students)
    if shard:
        found.keep(shard.choose(students))
    for sentence in (sentence for sentences in found.remarks.values() for sentence in sentences):
        warn(printable(sentence))
    grades = Grades(found, due)
    stopping = threading.Event()
    with servers(), ThreadPoolExecutor(min(MAX_PARALLEL, os.cpu_count() or 1)) as pool:
        jobs = {
            pool.submit(grade_notebook, path, seed, time_limit, stopping): (student, path)
            for student, paths in found.students.items()
            for path in paths
        }
        try:
            for job in as_completed(jobs):
                student, path = jobs[job]
                say(printable(f"{path.relative_to(submissions)}: {summarize(job.result())}"))
                if grades.add(student, path, job.result()) and not shard:
                    with suppress(OSError, ValueError):  # the last one counts, and raises
                        write_results(out, chapter, grades.reports, grades.remarks, layout)
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            warn(f"Stopped. {len(grades.reports)} of {len(found.students)} students were graded.")
            raise
    if shard:
        settings = {"shards": shard.count, "seed": seed, "time limit": time_limit, "chapter": chapter, "due": str(due)}
        Part(shard, settings, students, grades.remarks, grades.reports).save(shard.path(out))
    else:
        write_results(out, chapter, grades.reports, grades.remarks, layout)


def merge(folder: Path, out: Path, layout: str = "") -> None:
    """Write the tables and pages that one run over everything would write, from the results of all shards.

    Raises:
        ValueError: If the files in the folder are not those of all shards of one run.
        OSError: If the tables cannot be written.
    """
    check_target(out)
    check_target(messages_path(out))
    whole = shards.load(folder)
    check_names(layout, whole.students)
    write_results(out, whole.settings["chapter"], whole.reports, whole.remarks, layout)


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
    report = Report(chapters={re.match(r"(L?\d+)?", path.name)[0]} & set(CHAPTERS))
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


class Grades:
    """What is found out so far."""

    def __init__(self, found: Submissions, due: datetime | None):
        self.found, self.due = found, due
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
    def remarks(self) -> list[str]:
        """Sentences about files that belong to no student."""
        return self.found.remarks.get("", [])


def write_results(out: Path, chapter: str | None, reports: dict[str, Report], remarks: list[str], layout: str) -> None:
    """Write tables and pages about one chapter, or all that were submitted.

    Raises:
        ValueError: If there is no exercise to write about.
        OSError: If they cannot be written.
    """
    chapters = {chapter} if chapter else set().union(*(report.chapters for report in reports.values()))
    exercises = [exercise for exercise in EXERCISES.values() if exercise.chapter in chapters]
    if not exercises:
        raise ValueError("No notebook here contains an exercise of the course. Name the chapter with --chapter.")
    write_table(out, LAYOUTS[layout](reports, exercises))
    write_table(messages_path(out), message_rows(reports, exercises, remarks))
    write_pages(pages_path(out), reports, exercises, remarks)


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


def write_pages(folder: Path, reports: dict[str, Report], exercises: list[Exercise], remarks: list[str]) -> None:
    """Write a page for each student, and index.html about the class."""
    files = pages.file_names(reports)
    texts = {file: pages.student_page(student, reports[student], exercises) for student, file in files.items()}
    texts["index.html"] = pages.class_page(reports, exercises, files, remarks)
    try:
        folder.mkdir(exist_ok=True)
        for old in set(folder.glob("*.html")) - {folder / file for file in texts}:
            old.unlink()
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"Cannot write {str(folder)!r} ({error.strerror}).") from None
