"""Builds the notebooks from their sources, runs them, and makes the release for a class.

    python scripts/build_notebooks.py                     # all chapters, run, into notebooks/ and notebooks/solutions/
    python scripts/build_notebooks.py 05 08               # these chapters
    python scripts/build_notebooks.py --check             # are the notebooks those that the sources give?
    python scripts/build_notebooks.py --class build/class --seed 271828

A source is a percent-format script with nbgrader's markers. An exercise is two cells: a function with its solution
between BEGIN and END SOLUTION, and its check, with the points between BEGIN and END HIDDEN TESTS. Everything else
follows: ids from the text of a cell, so that building twice gives the same bytes, and nbgrader's metadata.
"""

import argparse
import copy
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from minivlm.course.grading.worker import CHECKED, essentials, fingerprint

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
KINDS = {"learner": NOTEBOOKS, "solution": NOTEBOOKS / "solutions"}
STUB = 'raise NotImplementedError("write your solution here")'
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_TIME = 1200  # seconds; a limit for what hangs, not for what is slow
OFFLINE = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "https_proxy": "http://127.0.0.1:9"}
ADDRESS = re.compile(r"\b0x[0-9a-f]{8,}\b")
PLACES = {str(path) for path in (ROOT, Path.home(), Path(sys.prefix), Path(tempfile.gettempdir()))} - {"/"}
WIDGET = "application/vnd.jupyter.widget-view+json"
HIDDEN_SEED = re.compile(r"(BEGIN HIDDEN TESTS.*?\bseed=)\d+", re.DOTALL)
CLASS_CONFIG = f'''"""nbgrader's settings for this course. Made by `make class`."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.setdefault("MINIVLM_HOME", str(HERE / "kept"))  # not the teacher's own solutions
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]  # nbgrader calls alembic

c = get_config()  # noqa: F821
c.CourseDirectory.root = str(HERE)
c.CourseDirectory.course_id = "minivlm"
c.ClearSolutions.code_stub = {{"python": {STUB!r}}}
c.Execute.timeout = 300  # seconds a cell; some train a model
'''


# --- from a source to notebooks -------------------------------------------------------------------------------------


def sources(chapters: list[str]) -> list[Path]:
    """The sources of these chapters ("05"), in order; of all when none is named."""
    found = sorted((NOTEBOOKS / "source").glob("*.py"))
    unknown = set(chapters) - {path.name[:2] for path in found}
    if unknown:
        raise ValueError(f"notebooks/source has no chapter {', '.join(sorted(unknown))}.")
    return [path for path in found if not chapters or path.name[:2] in chapters]


def read(source: Path) -> NotebookNode:
    """The whole chapter, solutions and hidden tests in it, with ids and nbgrader's metadata."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(METADATA)
    seen = Counter()
    exercise = ""  # the one whose check comes next
    for number, cell in enumerate(notebook.cells, start=1):
        cell.metadata = nbformat.from_dict({})
        where = f"{source.name}, cell {number}"
        if cell.cell_type == "code" and "BEGIN SOLUTION" in cell.source:
            require(not exercise, where, f"{exercise} has no check before the next exercise")
            exercise = function_name(cell.source, where)
            mark_cell(cell, exercise, solution=True)
        elif cell.cell_type == "code" and exercise:
            checked = CHECKED.search(cell.source)
            require(checked is not None and checked[1] == exercise, where, f"it should check {exercise}")
            mark_cell(cell, f"check_{exercise}", points=points_of(cell.source, where))
            exercise = ""
        else:
            require("BEGIN HIDDEN" not in cell.source, where, "it hides tests, and follows no exercise")
            name = fingerprint(cell.source)
            seen[name] += 1
            cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"
    require(not exercise, source.name, f"{exercise} has no check")
    nbformat.validate(notebook)
    return notebook


def require(is_so: bool, where: str, what: str) -> None:
    if not is_so:
        raise ValueError(f"{where}: {what}.")


def function_name(source: str, where: str) -> str:
    """The function around the solution."""
    names = re.findall(r"^(?:def|class) (\w+)", source.split("### BEGIN SOLUTION")[0], re.MULTILINE)
    require(bool(names), where, "the solution is not inside of a function")
    return names[-1]


def points_of(source: str, where: str) -> int:
    points = re.findall(r"BEGIN HIDDEN TESTS\n.*\bpoints=(\d+)", source)
    require(len(points) == 1, where, "the hidden test should be one line, exercises.score(…, points=N, seed=N)")
    return int(points[0])


def mark_cell(cell: NotebookNode, name: str, solution: bool = False, points: int | None = None) -> None:
    """nbgrader's metadata: a cell to write a solution into, or one that gives points."""
    marks = {"schema_version": 3, "grade_id": name, "solution": solution, "grade": not solution}
    marks |= {"locked": not solution, "task": False} | ({} if points is None else {"points": points})
    cell.id = name[:64]
    cell.metadata["nbgrader"] = nbformat.from_dict(marks)


def build(source: Path, kind: str) -> NotebookNode:
    """The notebook for a learner, or the one with the solutions; not run."""
    from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions

    notebook = read(source)
    if kind == "learner":
        ClearSolutions(code_stub={"python": STUB}).preprocess(notebook, {})
    for cell in notebook.cells:
        lines = cell.source.split("\n")
        cell.source = "\n".join(line for line in lines if not re.search("### (BEGIN|END) SOLUTION", line))
    ClearHiddenTests().preprocess(notebook, {})
    return notebook


def text_of(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"


def without_outputs(notebook: NotebookNode) -> NotebookNode:
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


# --- running --------------------------------------------------------------------------------------------------------


def run(notebook: NotebookNode, home: Path, title: str) -> NotebookNode:
    """The notebook with its outputs, cleaned; passed solutions are kept in ``home``. ValueError if a cell fails."""
    notebook = copy.deepcopy(notebook)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIME,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    try:
        client.execute(env=os.environ | OFFLINE | {"MINIVLM_HOME": str(home)})
    except CellExecutionError as error:
        raise ValueError(f"{title} does not run:\n{error}") from None
    clean(notebook)
    if found := faults(notebook):
        raise ValueError(f"{title}:\n" + "\n".join(found))
    return notebook


def clean(notebook: NotebookNode) -> None:
    """Takes out what differs from run to run, or cannot be shown without a kernel."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [output for output in map(clean_output, cell.outputs) if output]


def clean_output(output: NotebookNode) -> NotebookNode | None:
    """Without widgets, whose other forms stay, and None for progress bars and warnings."""
    if output.output_type == "stream":
        return None if output.name == "stderr" else output
    data = output.get("data", {})
    if WIDGET in data:
        del data[WIDGET]
        return output if {"text/html", "image/png"} & set(data) else None
    return output


def faults(notebook: NotebookNode) -> list[str]:
    """What a kept notebook may not hold: errors, addresses, places on this computer, pictures without words."""
    found = []
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            text = text_in(output)
            if output.output_type == "error":
                found.append(f"cell {number} shows an error, {output.ename}")
            if ADDRESS.search(text):
                found.append(f"cell {number} shows a memory address, {ADDRESS.search(text)[0]}")
            found += [f"cell {number} shows a place on this computer, {at}" for at in sorted(PLACES) if at in text]
            if "image/png" in output.get("data", {}) and not output.metadata.get("image/png", {}).get("alt"):
                found.append(f"cell {number} shows a picture without alt text")
    return found


def text_in(output: NotebookNode) -> str:
    """What an output says, without the pictures inside."""
    data = output.get("data", {})
    words = [output.get("text", ""), *(str(data[kind]) for kind in data if kind.startswith("text/"))]
    return re.sub(r"base64,[\w+/=]+", "", "\n".join(words))


class Runner:
    """Runs chapters. All solution notebooks share a folder of kept solutions, as one learner's would."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.solved: set[Path] = set()

    def run(self, source: Path, kind: str) -> NotebookNode:
        title = f"{source.name} ({kind})"
        if kind == "learner":
            return run(build(source, kind), Path(tempfile.mkdtemp(dir=self.folder)), title)
        home = self.folder / "solutions"
        earlier = [path for path in sources([]) if path < source and path not in self.solved]
        if earlier:
            run(only_exercises(earlier), home, "the exercises of earlier chapters")
        self.solved |= {*earlier, source}
        return run(build(source, kind), home, title)


def only_exercises(chapters: list[Path]) -> NotebookNode:
    """The solutions and checks of these chapters, in one notebook, with what they need."""
    together = nbformat.v4.new_notebook(metadata=METADATA)
    for source in chapters:
        for cell in build(source, "solution").cells:
            if cell.cell_type == "code" and "nbgrader" not in cell.metadata:
                cell.source = essentials(cell.source)
            if cell.cell_type == "code":
                cell.id = f"{source.name[:2]}-{cell.id}"[:64]
                together.cells.append(cell)
    return together


def write_all(chapters: list[Path]) -> None:
    """Builds, runs and writes. A chapter of which anything fails keeps the notebooks that it had."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        for source in chapters:
            texts = {kind: text_of(runner.run(source, kind)) for kind in KINDS}
            for kind, text in texts.items():
                write(KINDS[kind] / f"{source.stem}.ipynb", text)
                print(f"Wrote {(KINDS[kind] / source.stem).relative_to(ROOT)}.ipynb")


def write(path: Path, text: str) -> None:
    """A whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)


def differences(chapters: list[Path]) -> list[str]:
    """The notebooks that are not, outputs aside, what their sources give; and those that have no source."""
    found = []
    for kind, folder in KINDS.items():
        for source in chapters:
            path = folder / f"{source.stem}.ipynb"
            if not path.exists():
                found.append(f"{path.relative_to(ROOT)} is missing")
            elif text_of(without_outputs(nbformat.read(path, as_version=4))) != text_of(build(source, kind)):
                found.append(f"{path.relative_to(ROOT)} is not what {source.name} gives")
        stems = {source.stem for source in sources([])}
        strays = [path for path in sorted(folder.glob("*.ipynb")) if path.stem not in stems]
        found += [f"{path.relative_to(ROOT)} has no source" for path in strays]
    return found


# --- for a class ----------------------------------------------------------------------------------------------------


def make_class(chapters: list[Path], course: Path, seed: int | None) -> None:
    """An nbgrader course: its settings, source/ for the teacher, release/ for the students, and the gradebook."""
    from nbgrader.apps import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import PyFileConfigLoader

    write(course / "nbgrader_config.py", CLASS_CONFIG)
    config = PyFileConfigLoader("nbgrader_config.py", path=str(course.resolve())).load_config()
    api = NbGraderAPI(CourseDirectory(config=config), config=config)
    for source in chapters:
        notebook = read(source)
        for cell in notebook.cells:
            if seed is not None:
                cell.source = HIDDEN_SEED.sub(rf"\g<1>{seed}", cell.source)
        write(course / "source" / source.stem / f"{source.stem}.ipynb", text_of(notebook))
        made = api.generate_assignment(source.stem, force=True)
        if not made["success"]:
            raise ValueError(f"nbgrader made no release of {source.name}:\n{made.get('log', '')}{made['error']}")
    print(f"Wrote {course}: release/ for the students, source/ with solutions and hidden tests for you.")
    if seed is None:
        print("The hidden tests have the seeds that everyone can read: give one of your own with SEED=….")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help="such as 05; all when not given")
    parser.add_argument("--check", action="store_true", help="compare, write nothing; exit code 1 if anything differs")
    parser.add_argument("--class", type=Path, dest="course", metavar="FOLDER", help="make the release for a class here")
    parser.add_argument("--seed", type=int, help="with --class: a private seed for the hidden tests")
    args = parser.parse_args(argv)
    if args.seed is not None and (args.seed < 0 or not args.course):
        parser.error("--seed goes with --class, and is 0 or more")
    try:
        chapters = sources(args.chapters)
        if args.course:
            make_class(chapters, args.course, args.seed)
        elif args.check:
            if found := differences(chapters):
                raise ValueError("\n".join(found) + "\nmake notebooks builds them.")
        else:
            write_all(chapters)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
