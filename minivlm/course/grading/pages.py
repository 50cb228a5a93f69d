"""Web pages about graded notebooks: one for each student, and one for the teacher about the class.

Pages need nothing but themselves: no script, no other file, no network. What a student wrote is escaped.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from html import escape

from minivlm.course.exercises import Exercise
from minivlm.course.grading import discuss
from minivlm.course.grading.report import Mark, Report, points_of, printable

DISCUSSED = 5  # mistakes
STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body { overflow-wrap: anywhere } code { overflow-wrap: normal }
.wide { overflow-x: auto } table { border-collapse: collapse } th { overflow-wrap: normal }
th, td { border-bottom: 1px solid #8888; padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums } mark { font-weight: bold }
caption { text-align: left; font-weight: bold; padding-top: .8rem; white-space: nowrap }
.example td { padding-left: .8rem }
@media (prefers-color-scheme: dark) { html { background: #111; color: #eee } a { color: #9cf } }
@media (max-width: 40rem) {
  .stacked tr:has(th) { display: none } .stacked td { display: block; border: 0; padding: 0 }
  .stacked tr { display: block; border-bottom: 1px solid #8888; padding: .6rem 0 }
}
"""


def student_page(student: str, report: Report, exercises: list[Exercise]) -> str:
    """What was right, what was wrong with the rest, the hint, and the points."""
    total = sum(points_of(report, exercise) for exercise in exercises)
    most = sum(exercise.points for exercise in exercises)
    rows = []
    for exercise in exercises:
        mark = report.marks.get(exercise.name, Mark())
        notes = mark.notes if mark.mistake or mark.score == 1 else (*mark.notes, f"Hint: {exercise.hints[0]}")
        what = "<br>".join(map(prose, (mark.message, *notes)))
        points = f"{points_of(report, exercise):g} of {exercise.points} points"
        rows.append((f"{'✓' if mark.score == 1 else '✗'} {exercise.key}", code(exercise.name), what, points))
    return page(
        student,
        f"<p><strong>{total:g} of {most} points</strong></p>",
        table(("exercise", "function", "what the check found", "result"), rows, "stacked"),
        items("Also", report.problems),
    )


def class_page(reports: dict[str, Report], exercises: list[Exercise], files: dict[str, str], ungraded: list) -> str:
    """The tally of mistakes, what is right, who handed in late or more than once, and what was not graded.

    Args:
        reports: Student → report.
        files: Student → name of the student's page, next to this one.
        ungraded: Sentences about files that belong to no student.
    """
    links = {student: f'<a href="{escape(file)}">{text(student)}</a>' for student, file in files.items()}
    most = sum(exercise.points for exercise in exercises)
    totals = [
        (links[student], f"{sum(points_of(report, e) for e in exercises):g} of {most}")
        for student, report in reports.items()
    ]
    problems = [f"{links[student]}: {text(p)}" for student, report in reports.items() for p in report.problems]
    repeated = [f"{links[s]}: chapter {chapter}" for s, r in reports.items() for chapter in sorted(r.repeated)]
    late = [f"{links[s]}: {text(sentence)}" for s, r in reports.items() for sentence in r.late]
    return page(
        "The class",
        "<h2>Mistakes, most frequent first</h2>",
        table(("exercise", "mistake", "hint", "students"), mistake_rows(reports, exercises, links), "stacked"),
        *examples(reports, exercises),
        "<h2>Exercises</h2>",
        table(("exercise", "function", "right", "wrong", "not attempted"), exercise_rows(reports, exercises)),
        "<h2>Students</h2>",
        table(("student", "points"), totals),
        items("Handed in late", late, is_html=True),
        items("Handed in more than once", repeated, is_html=True),
        items("Files and problems", [*map(text, ungraded), *problems], is_html=True),
    )


def find_mistakes(reports: dict[str, Report], exercises: list[Exercise]) -> dict[tuple[Exercise, str], list[str]]:
    """Exercise and name of a mistake → the students who made it. The most frequent first."""
    found = defaultdict(list)
    for student, report in reports.items():
        for exercise in exercises:
            if mistake := report.marks.get(exercise.name, Mark()).mistake:
                found[exercise, mistake].append(student)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def mistake_rows(reports: dict[str, Report], exercises: list[Exercise], links: dict[str, str]) -> Iterable[tuple]:
    """One row per named mistake that occurred."""
    for (exercise, mistake), students in find_mistakes(reports, exercises).items():
        hint = next((m.hint for m in exercise.mistakes if m.name == mistake), "")
        who = f"{len(students)}: {', '.join(links[student] for student in students)}"
        yield f"{exercise.key} {code(exercise.name)}", f"it {prose(mistake)}", prose(hint), who


def examples(reports: dict[str, Report], exercises: list[Exercise]) -> Iterable[str]:
    """What the most frequent mistakes do, each on one example."""
    chosen = list(find_mistakes(reports, exercises))[:DISCUSSED]
    if chosen:
        yield "<h2>To discuss</h2>"
    for exercise, mistake in chosen:
        yield f"<h3>{exercise.key} {code(exercise.name)}: it {prose(mistake)}</h3>"
        yield discuss.show(exercise.name, mistake)


def exercise_rows(reports: dict[str, Report], exercises: list[Exercise]) -> Iterable[tuple]:
    """How many students have each exercise right, wrong, or not attempted."""
    for exercise in exercises:
        marks = [report.marks.get(exercise.name, Mark(is_attempted=False)) for report in reports.values()]
        right, missing = sum(m.score == 1 for m in marks), sum(not m.is_attempted for m in marks)
        yield exercise.key, code(exercise.name), right, len(marks) - right - missing, missing


# --- HTML -----------------------------------------------------------------------------------------------------------


def page(title: str, *parts: str) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{text(title)}</title>'
    head += f"<style>{STYLE}</style>"
    body = "\n".join((f"<h1>{text(title)}</h1>", *filter(None, parts)))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>{body}</main></body></html>\n'


def text(content: object) -> str:
    return escape(printable(str(content)))


def prose(content: str) -> str:
    """Text in which `this` is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(content))


def code(name: str) -> str:
    return f"<code>{text(name)}</code>"


def table(head: tuple[str, ...], rows: Iterable[tuple], kind: str = "") -> str:
    """A table whose cells already are HTML, or a sentence if it has no rows. On a phone, one that is "stacked" has a
    line for each cell.
    """
    lines = ["".join(f"<td{' class=number' * isinstance(c, int)}>{c}</td>" for c in row) for row in rows]
    if not lines:
        return "<p>None.</p>"
    first = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f"<tr>{row}</tr>" for row in lines)
    return f'<div class="wide" tabindex="0"><table class="{kind}"><tr>{first}</tr>{body}</table></div>'


def items(title: str, sentences: Iterable[str], is_html: bool = False) -> str:
    """A heading and a list, or nothing without sentences."""
    lines = [f"<li>{sentence if is_html else text(sentence)}</li>" for sentence in sentences]
    return f"<h2>{title}</h2><ul>{''.join(lines)}</ul>" if lines else ""


def file_names(students: Iterable[str]) -> dict[str, str]:
    """Student → a file name that every system accepts, different for each."""
    names: dict[str, str] = {}
    for number, student in enumerate(students, start=1):
        plain = re.sub(r"[^\w-]+", "-", printable(student)).strip("-")[:60]
        names[student] = f"{number:03d}-{plain}.html" if plain else f"{number:03d}.html"
    return names
