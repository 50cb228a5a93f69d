"""``python -m benchmarks.classes``: three simulated classes, graded by our grader and by nbgrader, get the same marks.

Each class has its own chapter and seed. Its hand-ins are right, wrong in all or some cases, fail, never end, use the
package's own function, or lack cells. Two kinds are left out, because nbgrader gives them nothing: a hand-in that ends
its Python process, and an exercise whose check was deleted, which Jupyter refuses to do. The exit code is 1 if any mark
differs.
"""

import argparse
import copy
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from minivlm.course.exercises import EXERCISES
from minivlm.course.grading.grader import grade_notebook
from minivlm.course.grading.remote import servers
from minivlm.course.grading.report import points_of

ROOT = Path(__file__).resolve().parents[1]
CLASSES = {"00_start_here": 161803, "05_prefix_lm_mask": 271828, "07_kv_cache": 314159}  # and the seed of each
CELL_TIME = 20  # seconds, for nbgrader and for us
# What becomes of a right solution. {head} is its def line, {first} the first parameter, {arguments} all of them.
KINDS = {
    "right": "{right}",
    "not attempted": "{head}\n    raise NotImplementedError",
    "wrong": "{head}\n    return {first}",
    "wrong in some cases": "{right}\n_{name} = {name}\n{head}\n"
    "    return _{name}{arguments} if len(str({first})) % 3 else None",
    "fails when called": "{head}\n    return {first} + undefined",
    "fails after its definition": "{right}\nraise RuntimeError('oh')",
    "leaves": "{head}\n    raise SystemExit",
    "no syntax": "{right}\nretrun 5",
    "never ends when called": "{head}\n    while True:\n        pass",
    "never ends after its definition": "{right}\nwhile True:\n    pass",
    "is the package's own": "{name} = exercises.EXERCISES['{name}'].reference",
    "calls the package's own": "{head}\n    from minivlm.course.exercises import EXERCISES\n"
    "    return EXERCISES['{name}'].reference{arguments}",
    "has no cell": None,
    "has neither cell nor check": None,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classes", description=__doc__.replace("``", ""))
    parser.add_argument("--students", type=int, default=30, metavar="N", help="hand-ins per class; default 30")
    parser.add_argument("--only", nargs="+", choices=CLASSES, default=list(CLASSES), metavar="CLASS")
    args = parser.parse_args(argv)
    print("| class | hand-ins | marks | different |\n|---|---|---|---|")
    different = []
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            made = make_class(Path(folder), name, args.students)
            ours, theirs = grade(made, CLASSES[name]), nbgrade(Path(folder), name, made)
        marks = {(student, exercise) for student in made for exercise in theirs[student] | ours[student]}
        found = [key for key in sorted(marks) if ours[key[0]].get(key[1]) != theirs[key[0]].get(key[1])]
        print(f"| {name} | {len(made)} | {len(marks)} | {len(found)} |", flush=True)
        for student, exercise in found:
            mine, other = ours[student].get(exercise), theirs[student].get(exercise)
            different.append(f"{name}, {student}, {exercise}: {mine} by our grader, {other} by nbgrader")
    print("\n".join(different), file=sys.stderr)
    return 1 if different else 0


def make_class(folder: Path, name: str, students: int) -> dict[str, Path]:
    """Make the release and hand in copies of it. The name of each student says what is special about the hand-in."""
    build = [sys.executable, str(ROOT / "scripts" / "build_notebooks.py"), name[:2]]
    subprocess.run([*build, "--class", str(folder), "--seed", str(CLASSES[name])], check=True, capture_output=True)
    release = nbformat.read(folder / "release" / name / f"{name}.ipynb", as_version=4)
    source = nbformat.read(folder / "source" / name / f"{name}.ipynb", as_version=4)
    solutions = {cell.id: re.sub(r" *### (BEGIN|END) SOLUTION\n?", "", cell.source) for cell in source.cells}
    names = [cell.metadata.nbgrader.grade_id for cell in release.cells if is_solution(cell)]
    random_ = random.Random(CLASSES[name])
    made = {}
    for number in range(students):
        kind, special = list(KINDS)[number % len(KINDS)], random_.choice(names)
        others = random_.choices(["right", "wrong", "wrong in some cases", "not attempted"], (6, 1, 2, 1), k=len(names))
        kinds = dict(zip(names, others, strict=True)) | {special: kind}
        student = f"{number + 1:02} {special} {kind}"
        made[student] = folder / "submitted" / student / name / f"{name}.ipynb"
        made[student].parent.mkdir(parents=True)
        nbformat.write(hand_in(release, solutions, kinds), made[student])
    return made


def is_solution(cell) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get("solution"))


def hand_in(release, solutions: dict[str, str], kinds: dict[str, str]):
    """The release with every exercise as its kind says."""
    book, cells = copy.deepcopy(release), []
    for cell in book.cells:
        marks = cell.metadata.get("nbgrader", {})
        name = marks.get("grade_id", "").removeprefix("check_")
        if name not in kinds or marks["grade"]:
            if not kinds.get(name, "").endswith("check"):
                cells.append(cell)
        elif KINDS[kinds[name]]:
            cell.source = KINDS[kinds[name]].format(**parts(name, solutions[cell.id]))
            cells.append(cell)
    book.cells = cells
    return book


def parts(name: str, right: str) -> dict[str, str]:
    """What a kind can be made from."""
    head = re.search(rf"^def {name}\(.*\):$", right, re.MULTILINE)[0]
    parameters = list(EXERCISES[name].parameters)
    arguments = f"({', '.join(parameters)})"
    return {"name": name, "right": right, "head": head, "first": parameters[0], "arguments": arguments}


def grade(made: dict[str, Path], seed: int) -> dict[str, dict[str, float]]:
    """Student → exercise → points, by our grader."""
    found = {}
    with servers():
        for student, path in made.items():
            report = grade_notebook(path, seed, time_limit=16 * CELL_TIME)
            found[student] = {name: points_of(report, EXERCISES[name]) for name in report.marks}
    return found


def nbgrade(folder: Path, name: str, made: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Student → exercise → points, by nbgrader."""
    from nbgrader.api import Gradebook
    from nbgrader.apps import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import PyFileConfigLoader

    before, found = dict(os.environ), {}
    try:  # the settings of a course change the environment
        config = PyFileConfigLoader("nbgrader_config.py", path=str(folder)).load_config()
        config.Execute.timeout = CELL_TIME
        api = NbGraderAPI(CourseDirectory(config=config), config=config)
        for student in made:
            result = api.autograde(name, student)
            if not result["success"]:
                raise ValueError(f"nbgrader could not grade {student!r}: {result}")
            with Gradebook(api.coursedir.db_url, api.coursedir.course_id) as gradebook:
                grades = gradebook.find_submission_notebook(name, name, student).grades
                found[student] = {g.name.removeprefix("check_"): round(g.auto_score or 0.0, 2) for g in grades}
    finally:
        os.environ.clear()
        os.environ.update(before)
    return found


if __name__ == "__main__":
    sys.exit(main())
