"""The notebooks: they are what their sources give, they run, and a class can have them.

Each notebook runs once, and what it shows is kept for every test that looks at it.
"""

import copy
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from minivlm.course import exercises

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import build_notebooks
from build_notebooks import KINDS, ROOT, Runner, build, faults, main, read, sources, text_of, without_outputs

SOURCES = {source.stem: source for source in sources([])}
EVERY = [(stem, kind) for kind in KINDS for stem in SOURCES]
every = pytest.mark.parametrize(("stem", "kind"), EVERY, ids=[f"{stem}-{kind}" for stem, kind in EVERY])
CHAPTER = """# %%
import torch
from minivlm.course import exercises


# %%
def block_mask(mask_ar):
    ### BEGIN SOLUTION
    block = mask_ar.cumsum(-1)
    return block[..., None, :] <= block[..., :, None]
    ### END SOLUTION


# %%
exercises.check(block_mask)
### BEGIN HIDDEN TESTS
exercises.score(block_mask, points=2, seed=1)
### END HIDDEN TESTS

# %%
print(torch.ones(1))
"""


def committed(stem: str, kind: str) -> nbformat.NotebookNode:
    return nbformat.read(KINDS[kind] / f"{stem}.ipynb", as_version=nbformat.NO_CONVERT)


def exercise_cells(notebook) -> dict:
    """By name, the cells that hold or check an exercise."""
    return {cell.id: cell for cell in notebook.cells if "nbgrader" in cell.metadata}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """``runs(stem, kind)``: the notebook, run now, once."""
    runner, done = Runner(tmp_path_factory.mktemp("kept")), {}

    def run(stem: str, kind: str):
        if (stem, kind) not in done:
            done[stem, kind] = runner.run(SOURCES[stem], kind)
        return done[stem, kind]

    run.home = runner.folder / "solutions"
    return run


# --- every chapter --------------------------------------------------------------------------------------------------


@every
def test_built_twice_is_the_same_and_valid(stem, kind):
    first = build(SOURCES[stem], kind)
    assert text_of(first) == text_of(build(SOURCES[stem], kind))
    nbformat.validate(first)
    assert len({cell.id for cell in first.cells}) == len(first.cells)


@every
def test_the_notebook_is_what_its_source_gives(stem, kind):
    notebook = committed(stem, kind)
    nbformat.validate(notebook)
    assert text_of(without_outputs(notebook)) == text_of(build(SOURCES[stem], kind)), "make notebooks builds it"
    assert not faults(notebook)


def test_no_notebook_is_without_a_source():
    assert not [line for line in build_notebooks.differences([]) if "has no source" in line]


@every
def test_runs_from_top_to_bottom(runs, stem, kind):
    """``Runner`` raises on an error, an address, a place on this computer, a picture without words."""
    notebook, kept = runs(stem, kind), committed(stem, kind)
    for number, (now, then) in enumerate(zip(notebook.cells, kept.cells, strict=True), start=1):
        assert kinds_of(now) == kinds_of(then), f"cell {number} does not show what the notebook in the repository shows"


def kinds_of(cell) -> list:
    return [sorted(output.get("data", {output.output_type: ""})) for output in cell.get("outputs", [])]


@every
def test_checks_say_what_they_should(runs, stem, kind):
    for name, cell in exercise_cells(runs(stem, kind)).items():
        if name.startswith("check_"):
            (output,) = cell.outputs
            said = output.data["text/plain"]
            assert ("not attempted yet" if kind == "learner" else "passed, on all") in said, said


@pytest.mark.parametrize("stem", SOURCES)
def test_a_chapters_exercises_are_those_that_are_declared(stem):
    cells = exercise_cells(read(SOURCES[stem]))
    declared = {e.name: e.points for e in exercises.EXERCISES.values() if e.chapter == stem[:2]}
    points = {name.removeprefix("check_"): c.metadata.nbgrader.points for name, c in cells.items() if "check_" in name}
    assert points == declared


@every
def test_nothing_of_the_teachers_is_left(stem, kind):
    text = text_of(build(SOURCES[stem], kind))
    assert not re.search("(BEGIN|END) (SOLUTION|HIDDEN)|exercises.score", text)
    cells = exercise_cells(build(SOURCES[stem], kind))
    stubs = ["NotImplementedError" in cell.source for cell in cells.values() if cell.metadata.nbgrader.solution]
    assert all(stubs) if kind == "learner" else not any(stubs)


def test_solutions_are_all_kept(runs, monkeypatch):
    for stem in SOURCES:
        runs(stem, "solution")
    monkeypatch.setenv("MINIVLM_HOME", str(runs.home))
    chapters = {stem[:2] for stem in SOURCES}
    done = exercises.progress().done
    assert [name for name, e in exercises.EXERCISES.items() if e.chapter in chapters and not done[name]] == []


class Pictures(HTMLParser):
    def __init__(self):
        super().__init__()
        self.alts: list[str] = []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img" and attributes.get("src", "").startswith("data:image/png"):
            self.alts.append(attributes.get("alt") or "")


@every
def test_a_plain_page_shows_the_pictures_in_words_too(stem, kind):
    from nbconvert import HTMLExporter

    notebook = committed(stem, kind)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    for output in outputs:  # a renderer that runs no scripts takes the picture
        if "image/png" in output.get("data", {}):
            output.data.pop("text/html", None)
    page, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    pictures = Pictures()
    pictures.feed(page)
    assert len(pictures.alts) == sum("image/png" in output.get("data", {}) for output in outputs)
    assert all(len(alt) > 10 for alt in pictures.alts), pictures.alts


# --- the build ------------------------------------------------------------------------------------------------------


@pytest.fixture
def course(tmp_path, monkeypatch) -> Path:
    """A made-up course of one chapter; returns its source."""
    monkeypatch.setattr(build_notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(build_notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    kinds = {"learner": tmp_path / "notebooks", "solution": tmp_path / "notebooks" / "solutions"}
    monkeypatch.setattr(build_notebooks, "KINDS", kinds)
    source = tmp_path / "notebooks" / "source" / "05_small.py"
    source.parent.mkdir(parents=True)
    source.write_text(CHAPTER, encoding="utf-8")
    return source


def test_build_check_and_what_differs(course, capsys):
    assert main(["--check"]) == 1 and "05_small.ipynb is missing" in capsys.readouterr().err
    assert main(["05"]) == 0
    assert main(["--check"]) == 0
    course.write_text(CHAPTER.replace("ones", "zeros"), encoding="utf-8")
    capsys.readouterr()
    assert main(["--check"]) == 1 and "is not what 05_small.py gives" in capsys.readouterr().err
    course.write_text(CHAPTER, encoding="utf-8")
    path = course.parents[1] / "05_small.ipynb"
    path.rename(path.with_name("06_other.ipynb"))
    assert main(["--check"]) == 1 and "06_other.ipynb has no source" in capsys.readouterr().err


def test_a_source_that_fails_leaves_no_file(course, capsys):
    course.write_text(CHAPTER + "\n# %%\n1 / 0\n", encoding="utf-8")
    assert main([]) == 1
    error = capsys.readouterr().err
    assert "05_small.py (learner) does not run" in error and "ZeroDivisionError" in error
    assert [path.name for path in course.parents[1].rglob("*.*")] == ["05_small.py"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("exercises.check(block_mask)", "exercises.check(other)", "cell 3: it should check block_mask"),
        ("def block_mask(mask_ar):\n", "if True:\n", "not inside of a function"),
        ("points=2, ", "", "should be one line"),
        (CHAPTER[CHAPTER.index("\n# %%\nexercises") :], "", "block_mask has no check"),
        ("### BEGIN SOLUTION", "# nothing", "it hides tests, and follows no exercise"),
    ],
)
def test_a_source_that_is_written_wrong_is_told(course, capsys, old, new, message):
    course.write_text(CHAPTER.replace(old, new), encoding="utf-8")
    assert main([]) == 1
    assert message in capsys.readouterr().err


def test_a_chapter_that_is_not_there(course, capsys):
    assert main(["07"]) == 1
    assert "no chapter 07" in capsys.readouterr().err


def notebook_showing(*outputs) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=list(outputs))])


def test_what_may_not_be_shown():
    def words(text):
        return nbformat.v4.new_output("stream", name="stdout", text=text)

    def picture(alt):
        metadata = {"image/png": {"alt": alt}} if alt else {}
        return nbformat.v4.new_output("display_data", data={"image/png": "AAAA"}, metadata=metadata)

    error = nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])
    assert faults(notebook_showing(words("fine 0x12"), picture("a cat"))) == []
    for output, message in [
        (words("<object at 0x7f00aa00bb00>"), "memory address"),
        (words(f"read {ROOT}/data"), "place on this computer"),
        (picture(None), "without alt text"),
        (error, "an error, ValueError"),
    ]:
        (found,) = set(line.rsplit(",", 1)[0] if "place" in line else line for line in faults(notebook_showing(output)))
        assert message in found


def test_what_changes_from_run_to_run_is_taken_out():
    bar = nbformat.v4.new_output("display_data", data={build_notebooks.WIDGET: {}, "text/plain": "0%"})
    explorer = nbformat.v4.new_output(
        "display_data", data={build_notebooks.WIDGET: {}, "text/html": "<p>", "image/png": "AAAA"}
    )
    warning = nbformat.v4.new_output("stream", name="stderr", text="10%")
    said = nbformat.v4.new_output("stream", name="stdout", text="done")
    notebook = notebook_showing(bar, explorer, warning, said)
    notebook.cells[0].metadata["execution"] = {"iopub.execute_input": "today"}
    notebook.metadata = {"widgets": {}, "language_info": {"version": "3.11.1"}}
    build_notebooks.clean(notebook)
    assert [sorted(o.get("data", {"text": 0})) for o in notebook.cells[0].outputs] == [
        ["image/png", "text/html"],
        ["text"],
    ]
    assert not notebook.cells[0].metadata and notebook.metadata == build_notebooks.METADATA


# --- for a class ----------------------------------------------------------------------------------------------------


def solved(release, solutions: dict, edit=lambda text: text):
    """A student's copy of the release, with these cells filled in."""
    notebook = copy.deepcopy(release)
    for cell in notebook.cells:
        if cell.id in solutions and cell.metadata.nbgrader.solution:
            cell.source = edit(solutions[cell.id].source)
    return notebook


@pytest.fixture(scope="module")
def classroom(tmp_path_factory):
    """The release of chapter 05 with a private seed, and three students of it, graded by nbgrader."""
    from nbgrader.api import Gradebook
    from nbgrader.apps import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import PyFileConfigLoader

    folder, name = tmp_path_factory.mktemp("class"), "05_prefix_lm_mask"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIVLM_HOME", str(folder / "kept"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PATH", os.environ["PATH"])  # the settings of the course change it
        assert main(["05", "--class", str(folder), "--seed", "77"]) == 0
        release = nbformat.read(folder / "release" / name / f"{name}.ipynb", as_version=4)
        right = exercise_cells(build(SOURCES[name], "solution"))
        students = {
            "ada": solved(release, right),
            "bob": release,
            "cy": solved(release, right, lambda text: text.replace(" <= ", " >= ")),  # queries and keys swapped
        }
        config = PyFileConfigLoader("nbgrader_config.py", path=str(folder)).load_config()
        api = NbGraderAPI(CourseDirectory(config=config), config=config)
        grades = {}
        for student, notebook in students.items():
            path = folder / "submitted" / student / name / f"{name}.ipynb"
            path.parent.mkdir(parents=True)
            nbformat.write(notebook, path)
            result = api.autograde(name, student)
            assert result["success"], result
            with Gradebook(api.coursedir.db_url, api.coursedir.course_id) as gradebook:
                found = gradebook.find_submission_notebook(name, name, student).grades
                grades[student] = {grade.name.removeprefix("check_"): grade.auto_score for grade in found}
    return {"grades": grades, "release": release, "folder": folder, "name": name}


def test_the_release_holds_no_solution_and_no_hidden_test(classroom):
    text = text_of(classroom["release"])
    assert not re.search("SOLUTION|HIDDEN|exercises.score|seed=77", text)
    stubs = [c for c in exercise_cells(classroom["release"]).values() if c.metadata.nbgrader.solution]
    assert stubs and all(build_notebooks.STUB in cell.source for cell in stubs)


def test_the_teachers_source_holds_both_with_the_private_seed(classroom):
    name = classroom["name"]
    text = (classroom["folder"] / "source" / name / f"{name}.ipynb").read_text(encoding="utf-8")
    count = sum(exercise.chapter == "05" for exercise in exercises.EXERCISES.values())
    assert text.count("BEGIN SOLUTION") == text.count("BEGIN HIDDEN TESTS") == text.count("seed=77") == count


def test_nbgrader_gives_the_marks_that_the_checks_give(classroom):
    most = {e.name: float(e.points) for e in exercises.EXERCISES.values() if e.chapter == "05"}
    assert classroom["grades"]["ada"] == most
    assert classroom["grades"]["bob"] == dict.fromkeys(most, 0.0)

    def swapped(mask_ar):
        block = mask_ar.cumsum(-1)
        return block[..., None, :] >= block[..., :, None]

    wrong = exercises.score(swapped, points=most["block_mask"], name="block_mask", seed=77)
    assert classroom["grades"]["cy"] == most | {"block_mask": wrong} and wrong < most["block_mask"]


def test_a_seed_is_for_a_class():
    with pytest.raises(SystemExit):
        main(["--seed", "1"])
