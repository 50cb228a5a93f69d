"""Build the notebooks from their sources, run them, and make the release for a class.

    python scripts/build_notebooks.py                     # build and run all chapters and labs
    python scripts/build_notebooks.py 05 L0               # these
    python scripts/build_notebooks.py --check             # are the notebooks up to date with their sources?
    python scripts/build_notebooks.py --class build/class --seed 271828

A source is a percent-format script with nbgrader's markers. An exercise is three cells: a heading ``## Exercise 5.1 ·
Title``, a function with its solution between BEGIN and END SOLUTION, and its check, with the points between BEGIN and
END HIDDEN TESTS. Stars, minutes, points and hints, and the time in the first cell, come from the declarations in
``minivlm.course``. Cell ids come from the text of the cell, so building twice produces the same bytes.
"""

import argparse
import copy
import hashlib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from minivlm.course.chapters import CHAPTERS, Chapter
from minivlm.course.exercises import EXERCISES, Exercise, in_chapter
from minivlm.course.grading.worker import CHECKED, essentials, fingerprint

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
KINDS = {"learner": NOTEBOOKS, "solution": NOTEBOOKS / "solutions"}
STUB = 'raise NotImplementedError("write your solution here")'
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_TIME = 1200  # seconds, enough for any cell that does not hang
OFFLINE = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "https_proxy": "http://127.0.0.1:9"}
ADDRESS = re.compile(r"\b0x[0-9a-f]{8,}\b")
LOCAL_PATHS = {str(path) for path in (ROOT, Path.home(), Path(sys.prefix), Path(tempfile.gettempdir()))} - {"/"}
WIDGET = "application/vnd.jupyter.widget-view+json"
IMAGES = ("image/png", "image/jpeg", "image/gif", "image/svg+xml")
ALTERNATIVES = {"img": "alt", "iframe": "title"}  # where a screen reader finds what is shown
NO_ALT = re.compile(r"!\[\s*\]\(")  # an image in Markdown without alt text, attached or not
CARD = "| | |\n|---|---|\n"
HEADING = re.compile(r"^## Exercise (L?\d+)\.(\d+) · (.+)$", re.MULTILINE)
HIDDEN_SEED = re.compile(r"(BEGIN HIDDEN TESTS.*?), seed=\d+", re.DOTALL)
LINK = re.compile(r"\]\((?:\.\./|labs/)?(\w+)\.ipynb")  # from one chapter to another
COURSE_SEED = re.compile(r'^os\.environ\["MINIVLM_SEED"\] = "(\d+)"', re.MULTILINE)
PUBLIC_SEED = 1  # of the hidden tests in notebooks/source
CLASS_CONFIG = f'''"""nbgrader's settings for this course, written by `make class`."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.setdefault("MINIVLM_HOME", str(HERE / "saved"))  # not the teacher's own solutions
os.environ["MINIVLM_SEED"] = "SEED"  # of the hidden tests. Feedback shows their cells, so it is not in them.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]  # nbgrader calls alembic

c = get_config()  # noqa: F821
c.CourseDirectory.root = str(HERE)
c.CourseDirectory.course_id = "minivlm"
c.ClearSolutions.code_stub = {{"python": {STUB!r}}}
c.Execute.timeout = 300  # seconds per cell; some train a model
# A cell that was stopped, or a busy machine, is late with its last output. That must not cost the whole notebook.
c.Execute.iopub_timeout = 30
c.Execute.raise_on_iopub_timeout = False
'''


# --- from a source to notebooks -------------------------------------------------------------------------------------


def sources(chapters: list[str]) -> list[Path]:
    """The sources of these chapters ("05"), in order. Default: all."""
    found = [*sorted((NOTEBOOKS / "source").glob("*.py")), *sorted((NOTEBOOKS / "source" / "labs").glob("*.py"))]
    unknown = set(chapters) - {number_of(path) for path in found}
    if unknown:
        raise ValueError(f"notebooks/source has no chapter {', '.join(sorted(unknown))}.")
    return [path for path in found if not chapters or number_of(path) in chapters]


def number_of(source: Path) -> str:
    """``05_prefix_lm_mask.py`` → "05", ``labs/L0_masks.py`` → "L0"."""
    return source.stem.split("_")[0]


def notebook_path(source: Path, kind: str) -> Path:
    """Where the notebook of a source goes. Labs have a folder of their own in each place."""
    folder = KINDS[kind] / "labs" if source.parent.name == "labs" else KINDS[kind]
    return folder / f"{source.stem}.ipynb"


def read(source: Path) -> NotebookNode:
    """The whole chapter with solutions, hidden tests, ids, nbgrader's metadata and the facts from the declarations.

    Raises:
        ValueError: If the source breaks a rule. The message names the cell.
    """
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(METADATA)
    add_facts(notebook, source)
    seen = Counter()
    exercise = ""  # the one whose check comes next
    for number, cell in enumerate(notebook.cells, start=1):
        cell.metadata = nbformat.from_dict({})
        where = f"{source.name}, cell {number}"
        if has_solution(cell):
            require(not exercise, where, f"{exercise} has no check before the next exercise")
            exercise = function_name(cell.source, where)
            mark_cell(cell, exercise, solution=True)
        elif cell.cell_type == "code" and exercise:
            checked = CHECKED.search(cell.source)
            require(checked is not None and checked[1] == exercise, where, f"this cell must check {exercise}")
            mark_cell(cell, f"check_{exercise}", points=points_of(cell.source, where))
            exercise = ""
        else:
            require("BEGIN HIDDEN" not in cell.source, where, "it contains hidden tests but does not follow a solution")
            name = fingerprint(cell.source)
            seen[name] += 1
            cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"
    require(not exercise, source.name, f"{exercise} has no check")
    nbformat.validate(notebook)
    return notebook


def require(is_true: bool, where: str, problem: str) -> None:
    if not is_true:
        raise ValueError(f"{where}: {problem}.")


def has_solution(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and "BEGIN SOLUTION" in cell.source


def add_facts(notebook: NotebookNode, source: Path) -> None:
    """Add what the declarations say: the chapter's time to the first cell, and to each exercise its stars, minutes,
    points and hints.

    Titles, questions and the order of the exercises must agree with the declarations.
    """
    name, chapter = source.name, CHAPTERS.get(number_of(source))
    require(chapter is not None and bool(notebook.cells), name, "expected cells, and the number of a chapter in front")
    heading = ""  # the key of the exercise whose heading came last

    def complete(found: re.Match) -> str:
        nonlocal heading
        heading = f"{found[1].zfill(2)}.{found[2]}"
        exercise = next((exercise for exercise in EXERCISES.values() if exercise.key == heading), None)
        require(exercise is not None, where, f"there is no exercise {heading}")
        is_bare = re.search(r"[★☆]|\(\d+ (minutes|points)", found[3]) is None
        require(is_bare, where, "remove stars, minutes and points from the heading: they are generated")
        return f"{found[0]} {exercise.stars} ({exercise.minutes} minutes, {exercise.points} points)"

    for number, cell in enumerate(notebook.cells, start=1):
        where = f"{name}, cell {number}"
        if number == 1:
            cell.source = complete_card(cell.source, chapter, where)
        if cell.cell_type == "markdown":
            cell.source, found = HEADING.subn(complete, cell.source)
            require("<summary>Hint" not in cell.source, where, "remove the hints: they are generated")
            require(found < 2, where, "each exercise needs a cell of its own")
            if found:
                cell.source += folded_hints(next(e for e in EXERCISES.values() if e.key == heading))
        elif has_solution(cell):
            exercise = EXERCISES.get(function_name(cell.source, where))
            is_expected = exercise is not None and exercise.key == heading
            require(is_expected, where, f"the solution does not belong to the last heading, exercise {heading}")


def folded_hints(exercise: Exercise) -> str:
    """The two hints, each of which opens with a click."""
    idea, line = exercise.hints
    more = f'Still stuck? `exercises.hint("{exercise.name}")` shows a solution after both hints.'
    parts = (("Hint 1", idea), ("Hint 2", f"{line}\n\n{more}"))
    return "".join(f"\n\n<details><summary>{title}</summary>\n\n{text}\n\n</details>" for title, text in parts)


def complete_card(text: str, chapter: Chapter, where: str) -> str:
    """The first cell with the time as the first row of its table."""
    first = f"# {chapter.number} · {chapter.title}"
    require(text.split("\n")[0].lower() == first.lower(), where, f"the first line must be {first!r}")
    require(f"\n**{chapter.question}**\n" in text, where, f"the question, in bold, must be {chapter.question!r}")
    require("| time |" not in text, where, "remove the row with the time: it is generated")
    require(CARD in text, where, f"the table must start with {CARD!r}")
    minutes = sum(exercise.minutes for exercise in in_chapter(chapter.number))
    return text.replace(CARD, f"{CARD}| time | {chapter.minutes} minutes, {minutes} of them exercises |\n", 1)


def function_name(source: str, where: str) -> str:
    """The name of the function that contains the solution."""
    names = re.findall(r"^(?:def|class) (\w+)", source.split("### BEGIN SOLUTION")[0], re.MULTILINE)
    require(bool(names), where, "the solution is not inside a function")
    return names[-1]


def points_of(source: str, where: str) -> int:
    points = re.findall(r"BEGIN HIDDEN TESTS\n.*\bpoints=(\d+)", source)
    require(len(points) == 1, where, "the hidden test must be one line, exercises.score(…, points=N, seed=N)")
    return int(points[0])


def mark_cell(cell: NotebookNode, name: str, solution: bool = False, points: int | None = None) -> None:
    """Add nbgrader's metadata: a cell for a solution, or one that awards points."""
    marks = {"schema_version": 3, "grade_id": name, "solution": solution, "grade": not solution}
    marks |= {"locked": not solution, "task": False} | ({} if points is None else {"points": points})
    cell.id = name[:64]
    cell.metadata["nbgrader"] = nbformat.from_dict(marks)


def build(source: Path, kind: str) -> NotebookNode:
    """The notebook for a learner, or the one with solutions, without outputs."""
    from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions

    notebook = read(source)
    if kind == "learner":
        ClearSolutions(code_stub={"python": STUB}).preprocess(notebook, {})
    for cell in notebook.cells:
        lines = cell.source.split("\n")
        cell.source = "\n".join(line for line in lines if not re.search("### (BEGIN|END) SOLUTION", line))
    ClearHiddenTests().preprocess(notebook, {})
    return notebook


def to_text(notebook: NotebookNode) -> str:
    """The content of the notebook's file."""
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"


def without_outputs(notebook: NotebookNode) -> NotebookNode:
    """A copy with all outputs removed."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


# --- running --------------------------------------------------------------------------------------------------------


def run(notebook: NotebookNode, home: Path, title: str, folder: Path = NOTEBOOKS) -> NotebookNode:
    """A copy of the notebook, executed in ``folder`` and cleaned. Passed solutions are saved in ``home``.

    Raises:
        ValueError: If a cell fails, or an output contains what ``find_faults`` finds.
    """
    notebook = copy.deepcopy(notebook)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIME,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute(env=os.environ | OFFLINE | {"MINIVLM_HOME": str(home)})
    except CellExecutionError as error:
        raise ValueError(f"{title} failed:\n{error}") from None
    clean(notebook)
    if found := find_faults(notebook):
        raise ValueError(f"{title}:\n" + "\n".join(found))
    return notebook


def clean(notebook: NotebookNode) -> None:
    """Remove what differs from run to run or cannot be displayed without a kernel."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [output for output in map(clean_output, cell.outputs) if output]


def clean_output(output: NotebookNode) -> NotebookNode | None:
    """The output without its widget form, or None for progress bars and warnings."""
    if output.output_type == "stream":
        return None if output.name == "stderr" else output
    data = output.get("data", {})
    if WIDGET in data:
        del data[WIDGET]
        return output if {"text/html", "image/png"} & set(data) else None
    return output


def find_faults(notebook: NotebookNode) -> list[str]:
    """What a committed notebook must not contain: errors, memory addresses, local paths, images without alt text."""
    found = []
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "markdown" and (NO_ALT.search(cell.source) or unlabeled(cell.source)):
            found.append(f"cell {number} contains an image without alt text")
        for output in cell.get("outputs", []):
            text = text_in(output)
            if output.output_type == "error":
                found.append(f"cell {number} shows an error, {output.ename}")
            if ADDRESS.search(text):
                found.append(f"cell {number} shows a memory address, {ADDRESS.search(text)[0]}")
            found += [f"cell {number} shows a local path, {path}" for path in sorted(LOCAL_PATHS) if path in text]
            if shows_unlabeled(output.get("data", {})):
                found.append(f"cell {number} shows an image without alt text: viz.from_figure adds one")
    return found


def shows_unlabeled(data: dict) -> bool:
    """Whether an output shows an image without alt text. Only HTML carries one to the reader, in every renderer."""
    html = data.get("text/html", "")
    return bool(unlabeled(html)) or ("<img" not in html and any(kind in data for kind in IMAGES))


def unlabeled(html: str) -> list[str]:
    """The tags of images and frames in HTML or Markdown that no text describes."""
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag in ALTERNATIVES and not (dict(attributes).get(ALTERNATIVES[tag]) or "").strip():
                found.append(tag)

    Parser().feed(html)
    return found


def text_in(output: NotebookNode) -> str:
    """The text of an output, without embedded images."""
    data = output.get("data", {})
    parts = [output.get("text", ""), *(str(data[kind]) for kind in data if kind.startswith("text/"))]
    return re.sub(r"base64,[\w+/=]+", "", "\n".join(parts))


class Runner:
    """Runs chapters. All solution notebooks share one folder of saved solutions, like those of one learner."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.solved: set[Path] = set()

    def run(self, source: Path, kind: str) -> NotebookNode:
        """Run one notebook. Before a solution notebook, run the exercises of earlier chapters that have not run."""
        title, folder = f"{source.name} ({kind})", notebook_path(source, "learner").parent
        folder.mkdir(exist_ok=True)
        if kind == "learner":
            return run(build(source, kind), Path(tempfile.mkdtemp(dir=self.folder)), title, folder)
        home = self.folder / "solutions"
        earlier = [path for path in sources([]) if path < source and path not in self.solved]
        if earlier:
            run(only_exercises(earlier), home, "the exercises of earlier chapters")
        self.solved |= {*earlier, source}
        return run(build(source, kind), home, title, folder)


def only_exercises(chapters: list[Path]) -> NotebookNode:
    """The solutions and checks of these chapters in one notebook, with the definitions that they need."""
    together = nbformat.v4.new_notebook(metadata=METADATA)
    for source in chapters:
        for cell in build(source, "solution").cells:
            if cell.cell_type == "code" and "nbgrader" not in cell.metadata:
                cell.source = essentials(cell.source)
            if cell.cell_type == "code":
                cell.id = f"{number_of(source)}-{cell.id}"[:64]
                together.cells.append(cell)
    return together


def write_all(chapters: list[Path]) -> None:
    """Build, run and write. If anything fails in a chapter, its notebooks stay unchanged."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        for source in chapters:
            texts = {kind: to_text(runner.run(source, kind)) for kind in KINDS}
            for kind, text in texts.items():
                path = notebook_path(source, kind)
                write(path, text)
                print(f"Wrote {path.relative_to(ROOT)}")


def write(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)


def differences(chapters: list[Path]) -> list[str]:
    """The notebooks that, apart from outputs, differ from their sources, and those without a source."""
    found = []
    for kind, folder in KINDS.items():
        for source in chapters:
            path = notebook_path(source, kind)
            if not path.exists():
                found.append(f"{path.relative_to(ROOT)} is missing")
            elif to_text(without_outputs(nbformat.read(path, as_version=4))) != to_text(build(source, kind)):
                found.append(f"{path.relative_to(ROOT)} is out of date with {source.name}")
        known = {notebook_path(source, kind) for source in sources([])}
        strays = {*folder.glob("*.ipynb"), *(folder / "labs").glob("*.ipynb")} - known
        found += [f"{path.relative_to(ROOT)} has no source" for path in sorted(strays)]
    return found


# --- for a class ----------------------------------------------------------------------------------------------------


WRITTEN = "written.json"  # in a course: digest of every notebook in source/ as it was written, to recognize edits


def make_class(chapters: list[Path], course: Path, seed: int | None) -> None:
    """Write an nbgrader course: settings, source/ for the teacher, release/ for the students, and the gradebook.

    A notebook in source/ that the teacher has edited stays as it is. Without a seed, the course keeps the one it has.
    """
    from nbgrader.apps import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import PyFileConfigLoader

    seed = seed_of(course) if seed is None else seed
    write(course / "nbgrader_config.py", CLASS_CONFIG.replace('"SEED"', f'"{seed}"'))
    config = PyFileConfigLoader("nbgrader_config.py", path=str(course.resolve())).load_config()
    api = NbGraderAPI(CourseDirectory(config=config), config=config)
    digests = json.loads((course / WRITTEN).read_text()) if (course / WRITTEN).is_file() else {}
    for source in chapters:
        path = course / "source" / source.stem / f"{source.stem}.ipynb"
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        if old and digest(old) != digests.get(source.stem):
            print(f"Kept {path}, which you have edited. Delete it to get the current chapter.")
        else:
            text = to_text(for_class(read(source)))
            write(path, text)
            digests[source.stem] = digest(text)
            write(course / WRITTEN, json.dumps(digests, indent=2))
        made = api.generate_assignment(source.stem, force=True)
        if not made["success"]:
            raise ValueError(f"nbgrader could not release {source.name}:\n{made.get('log', '')}{made['error']}")
    print(f"Wrote {course}: release/ for the students, source/ with solutions and hidden tests for you.")
    if seed == PUBLIC_SEED:
        print("The hidden tests use the public seed. Choose your own with SEED=….")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def for_class(notebook: NotebookNode) -> NotebookNode:
    """Let hidden tests take their seed from the course's settings, and links go to a folder for each chapter."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(r"](../\1/\1.ipynb", cell.source)
        else:
            cell.source = HIDDEN_SEED.sub(r"\1", cell.source)
    return notebook


def seed_of(course: Path) -> int:
    """The seed in the settings of a course, or the public one if there is none yet."""
    settings = course / "nbgrader_config.py"
    found = COURSE_SEED.search(settings.read_text(encoding="utf-8")) if settings.is_file() else None
    return int(found[1]) if found else PUBLIC_SEED


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help="such as 05; default: all")
    parser.add_argument("--check", action="store_true", help="compare without writing; exit code 1 if anything differs")
    parser.add_argument(
        "--class", type=Path, dest="course", metavar="FOLDER", help="write the release for a class to this folder"
    )
    parser.add_argument("--seed", type=int, help="with --class: a private seed for the hidden tests")
    args = parser.parse_args(argv)
    if args.seed is not None and (args.seed < 0 or not args.course):
        parser.error("--seed needs --class and must be 0 or more")
    try:
        chapters = sources(args.chapters)
        if args.course:
            make_class(chapters, args.course, args.seed)
        elif args.check:
            if found := differences(chapters):
                raise ValueError("\n".join(found) + "\nRun `make notebooks`.")
        else:
            write_all(chapters)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
