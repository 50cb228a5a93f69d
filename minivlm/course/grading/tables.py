"""The tables that grading writes, also in the layouts that learning-management systems import."""

import csv
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from minivlm.course.chapters import CHAPTERS
from minivlm.course.exercises import Exercise
from minivlm.course.grading.report import Mark, Report, points_of, printable

# What the systems call the files of a submission when a teacher downloads all of them.
MOODLE = re.compile(r"(.+?)_(\d+)_assignsubmission_file")
CANVAS = re.compile(r"(.+?)_(?:LATE_)?(\d+)_\d+_")


def column(exercise: Exercise) -> str:
    return f"{exercise.key} {exercise.name}"


def total(report: Report, exercises: list[Exercise]) -> float:
    return round(sum(points_of(report, exercise) for exercise in exercises), 2)


def most(exercises: list[Exercise]) -> int:
    return sum(exercise.points for exercise in exercises)


def mark_rows(reports: dict[str, Report], exercises: list[Exercise]) -> Iterable[list]:
    """A column for each exercise."""
    yield ["student", *map(column, exercises), "total", "max"]
    for student, report in reports.items():
        points = [points_of(report, exercise) for exercise in exercises]
        yield [student, *points, total(report, exercises), most(exercises)]


def moodle_rows(reports: dict[str, Report], exercises: list[Exercise]) -> Iterable[list]:
    """The grading worksheet of one assignment, with feedback."""
    yield ["Identifier", "Full name", "Grade", "Maximum Grade", "Last modified (grade)", "Feedback comments"]
    for student, report in reports.items():
        name, number = MOODLE.match(student).groups()
        lost = (f"{column(e)}: {mark.sentence}" for e, mark in lost_marks(report, exercises))
        feedback = " ".join((*report.problems, *lost))
        yield [f"Participant {number}", name, total(report, exercises), most(exercises), "", feedback]


def canvas_rows(reports: dict[str, Report], exercises: list[Exercise]) -> Iterable[list]:
    """The gradebook, with an assignment for each chapter."""
    chapters: dict[str, list[Exercise]] = {}
    for exercise in exercises:
        chapters.setdefault(exercise.chapter, []).append(exercise)
    titles = [f"{number} {CHAPTERS[number].title}" for number in chapters]
    yield ["Student", "ID", "SIS Login ID", "Section", *titles]
    yield ["    Points Possible", "", "", "", *map(most, chapters.values())]
    for student, report in reports.items():
        found = CANVAS.match(student)
        who = [found[1], found[2], ""] if found else [student, "", student]
        yield [*who, "", *(total(report, each) for each in chapters.values())]


LAYOUTS = {"": mark_rows, "moodle": moodle_rows, "canvas": canvas_rows}


def check_names(layout: str, students: Iterable[str]) -> None:
    """Make sure that a layout can tell who a student is.

    Raises:
        ValueError: If it cannot.
    """
    strangers = [student for student in students if layout == "moodle" and not MOODLE.match(student)]
    if strangers:
        expected = "'Ada Lovelace_1234_assignsubmission_file'"
        raise ValueError(
            f"--csv moodle needs the names of files or folders that Moodle downloads, such as {expected}, and not "
            f"{strangers[0]!r}."
        )


def lost_marks(report: Report, exercises: list[Exercise]) -> Iterable[tuple[Exercise, Mark]]:
    """The exercises that are not entirely right."""
    for exercise in exercises:
        mark = report.marks.get(exercise.name, Mark())
        if mark.score < 1:
            yield exercise, mark


def message_rows(reports: dict[str, Report], exercises: list[Exercise], remarks: Iterable[str] = ()) -> Iterable[list]:
    """A sentence for every lost point and every problem."""
    yield ["student", "exercise", "points", "max", "message"]
    for sentence in remarks:
        yield ["", "", "", "", sentence]
    for student, report in reports.items():
        for problem in report.problems:
            yield [student, "", "", "", problem]
        for exercise, mark in lost_marks(report, exercises):
            yield [student, column(exercise), points_of(report, exercise), exercise.points, mark.sentence]


def write_table(path: Path, rows: Iterable[list]) -> None:
    """Write a CSV file next to the old one and then replace it, so that there is a complete one at any time.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        with open(aside(path), "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([escape_formula(cell) for cell in row] for row in rows)
        os.replace(aside(path), aside(path).with_suffix(""))
    except OSError as error:
        with suppress(OSError):
            aside(path).unlink()
        raise OSError(f"Cannot write {str(path)!r} ({error.strerror}).") from None


def aside(path: Path) -> Path:
    """Where a table is written first: grades.csv → grades.csv.part, in the folder that a link points to."""
    return Path(os.path.realpath(path) + ".part")


def escape_formula(cell: str | int | float) -> str | int | float:
    """Put an apostrophe before text that a spreadsheet would run as a formula."""
    if not isinstance(cell, str):
        return cell
    return printable(f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell)
