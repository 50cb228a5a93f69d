"""The notebooks are up to date with their sources, they run, and a class can get them.

One test executes a whole notebook and checks everything about the result, so no notebook is executed twice, however the
tests are distributed.
"""

import copy
import os
import re
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest

from minivlm.course import exercises
from minivlm.course.grading.grader import grade_notebook
from minivlm.course.grading.report import points_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import build_notebooks
from build_notebooks import KINDS, ROOT, Runner, build, find_faults, main, read, sources, to_text, without_outputs

SOURCES = {source.stem: source for source in sources([])}
EVERY = [(stem, kind) for kind in KINDS for stem in SOURCES]
each = pytest.mark.parametrize(("stem", "kind"), EVERY, ids=[f"{stem}-{kind}" for stem, kind in EVERY])
CARD = """# %% [markdown]
# # 05 · The prefix-LM mask
#
# **Which token attends to which?**
#
# | | |
# |---|---|
# | know first | nothing |

"""
CHAPTER = (
    CARD
    + """# %%
import torch
from minivlm.course import exercises

# %% [markdown]
# ## Exercise 5.1 · The rule

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
)


SHORT = CARD + "# %%\nprint('ones')\n"


@cache
def built(stem: str, kind: str) -> nbformat.NotebookNode:
    return build(SOURCES[stem], kind)


def committed(stem: str, kind: str) -> nbformat.NotebookNode:
    return nbformat.read(build_notebooks.notebook_path(SOURCES[stem], kind), as_version=nbformat.NO_CONVERT)


def exercise_cells(notebook) -> dict:
    """The cells that contain or check an exercise, by name."""
    return {cell.id: cell for cell in notebook.cells if "nbgrader" in cell.metadata}


@pytest.fixture(scope="session")
def runner(tmp_path_factory) -> Runner:
    return Runner(tmp_path_factory.mktemp("saved"))


# --- every chapter --------------------------------------------------------------------------------------------------


@each
def test_built_twice_is_the_same_and_valid(stem, kind):
    first = built(stem, kind)
    assert to_text(first) == to_text(build(SOURCES[stem], kind))
    nbformat.validate(first)
    assert len({cell.id for cell in first.cells}) == len(first.cells)


@each
def test_the_notebook_is_up_to_date_with_its_source(stem, kind):
    notebook = committed(stem, kind)
    nbformat.validate(notebook)
    assert to_text(without_outputs(notebook)) == to_text(built(stem, kind)), "run `make notebooks`"
    assert not find_faults(notebook)


def test_every_notebook_has_a_source():
    assert not [line for line in build_notebooks.differences([]) if "has no source" in line]


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("stem", "kind"),
    [
        pytest.param(stem, kind, id=f"{stem}-{kind}", marks=[pytest.mark.long] if kind == "learner" else [])
        for stem in SOURCES
        for kind in KINDS
    ],
)
def test_runs_from_top_to_bottom(runner, stem, kind):
    """``Runner`` raises on an error, a memory address, a local path, and an image without alt text."""
    notebook, stored = runner.run(SOURCES[stem], kind), committed(stem, kind)
    for number, (now, then) in enumerate(zip(notebook.cells, stored.cells, strict=True), start=1):
        assert kinds_of(now) == kinds_of(then), f"cell {number} shows other kinds of output than the committed notebook"
    for name, cell in exercise_cells(notebook).items():
        if name.startswith("check_"):
            (output,) = cell.outputs
            message = output.data["text/plain"]
            assert ("not attempted yet" if kind == "learner" else "passed all") in message, message
    if kind == "solution":
        number = stem.split("_")[0]
        saved = (runner.folder / "solutions" / "solutions").glob(f"{number}.*.py")
        expected = [f"{exercise.key}_{exercise.name}.py" for exercise in exercises.in_chapter(number)]
        assert sorted(path.name for path in saved) == sorted(expected)


def kinds_of(cell) -> list:
    return [sorted(output.get("data", {output.output_type: ""})) for output in cell.get("outputs", [])]


@pytest.mark.parametrize("stem", SOURCES)
def test_a_chapter_contains_its_declared_exercises(stem):
    cells = exercise_cells(read(SOURCES[stem]))
    declared = {e.name: e.points for e in exercises.in_chapter(stem.split("_")[0])}
    points = {name.removeprefix("check_"): c.metadata.nbgrader.points for name, c in cells.items() if "check_" in name}
    assert points == declared


@each
def test_nothing_for_teachers_is_left(stem, kind):
    text = to_text(built(stem, kind))
    assert not re.search("(BEGIN|END) (SOLUTION|HIDDEN)|exercises.score", text)
    cells = exercise_cells(built(stem, kind))
    stubs = ["NotImplementedError" in cell.source for cell in cells.values() if cell.metadata.nbgrader.solution]
    assert all(stubs) if kind == "learner" else not any(stubs)


# --- the build ------------------------------------------------------------------------------------------------------


@pytest.fixture
def course(tmp_path, monkeypatch) -> Path:
    """A made-up course with one chapter. Returns its source."""
    monkeypatch.setattr(build_notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(build_notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    kinds = {"learner": tmp_path / "notebooks", "solution": tmp_path / "notebooks" / "solutions"}
    monkeypatch.setattr(build_notebooks, "KINDS", kinds)
    source = tmp_path / "notebooks" / "source" / "05_small.py"
    source.parent.mkdir(parents=True)
    source.write_text(CHAPTER, encoding="utf-8")
    return source


def test_build_and_check(course, capsys):
    assert main(["--check"]) == 1 and "05_small.ipynb is missing" in capsys.readouterr().err
    course.write_text(SHORT, encoding="utf-8")
    assert main(["05"]) == 0
    assert main(["--check"]) == 0
    course.write_text(SHORT.replace("ones", "zeros"), encoding="utf-8")
    capsys.readouterr()
    assert main(["--check"]) == 1 and "is out of date with 05_small.py" in capsys.readouterr().err
    course.write_text(SHORT, encoding="utf-8")
    path = course.parents[1] / "05_small.ipynb"
    path.rename(path.with_name("06_other.ipynb"))
    assert main(["--check"]) == 1 and "06_other.ipynb has no source" in capsys.readouterr().err


def test_a_source_that_fails_leaves_no_file(course, capsys):
    course.write_text(SHORT + "\n# %%\n1 / 0\n", encoding="utf-8")
    assert main([]) == 1
    error = capsys.readouterr().err
    assert "05_small.py (learner) failed" in error and "ZeroDivisionError" in error
    assert [path.name for path in course.parents[1].rglob("*.*")] == ["05_small.py"]


def test_headings_and_card_state_what_is_declared(course):
    text = "\n".join(cell.source for cell in read(course).cells)
    assert "\n## Exercise 5.1 · The rule ★☆☆ (8 minutes, 2 points)" in text
    assert "\n|---|---|\n| time | 80 minutes, 43 of them exercises |\n| know first | nothing |" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("exercises.check(block_mask)", "exercises.check(other)", "cell 5: this cell must check block_mask"),
        ("def block_mask(mask_ar):\n", "if True:\n", "not inside a function"),
        ("points=2, ", "", "must be one line"),
        (CHAPTER[CHAPTER.index("\n# %%\nexercises") :], "", "block_mask has no check"),
        ("### BEGIN SOLUTION", "# nothing", "it contains hidden tests but does not follow a solution"),
        ("05 · The", "06 · The", "cell 1: the first line must be '# 05 · the prefix-LM mask'"),
        ("prefix-LM mask", "mask", "cell 1: the first line must be"),
        ("**Which token", "**What token", "in bold, must be 'Which token attends to which?'"),
        ("| know", "| time | 9 minutes |\n# | know", "remove the row with the time"),
        ("# |---|---|\n", "", "the table must start with"),
        ("The rule", "The rule ★☆☆", "cell 3: remove stars, minutes and points"),
        ("The rule", "The rule (8 minutes)", "cell 3: remove stars, minutes and points"),
        ("The rule", "The rule\n#\n# <details><summary>Hint</summary>", "cell 3: remove the hints: they are generated"),
        ("5.1", "5.9", "there is no exercise 05.9"),
        ("5.1", "5.2", "does not belong to the last heading, exercise 05.2"),
        ("def block_mask", "def other", "does not belong to the last heading, exercise 05.1"),
    ],
)
def test_a_source_that_breaks_a_rule_gets_a_message(course, capsys, old, new, message):
    course.write_text(CHAPTER.replace(old, new), encoding="utf-8")
    assert main([]) == 1
    assert message in capsys.readouterr().err


def test_a_chapter_that_does_not_exist(course, capsys):
    assert main(["07"]) == 1
    assert "no chapter 07" in capsys.readouterr().err


def notebook_showing(*outputs) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=list(outputs))])


def test_faults_in_outputs_are_found():
    def stream(text):
        return nbformat.v4.new_output("stream", name="stdout", text=text)

    def image(html, kind="image/png"):
        return nbformat.v4.new_output("display_data", data={kind: "AAAA"} | ({"text/html": html} if html else {}))

    error = nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])
    labeled = image('<div><img alt="a cat" src="data:"><iframe title="cats"></iframe></div>')
    assert find_faults(notebook_showing(stream("fine 0x12"), labeled)) == []
    for output, message in [
        (stream("<object at 0x7f00aa00bb00>"), "memory address"),
        (stream(f"read {ROOT}/data"), "local path"),
        (image(None), "without alt text"),  # matplotlib's own figures
        (image(None, "image/jpeg"), "without alt text"),  # PIL's images
        (image("<p>a cat</p>"), "without alt text"),
        (image('<img src="data:">'), "without alt text"),
        (image('<img alt="a cat"><iframe srcdoc="">'), "without alt text"),
        (error, "an error, ValueError"),
    ]:
        (found,) = set(
            line.rsplit(",", 1)[0] if "path" in line else line for line in find_faults(notebook_showing(output))
        )
        assert message in found


@pytest.mark.parametrize("text", ["![](attachment:a.png)", "![ ](a.png)", '<img src="a.png">'])
def test_images_in_markdown_need_alt_text(text):
    labeled = text.replace("src", 'alt="a cat" src').replace("[ ]", "[]").replace("[]", "[a cat]")
    cells = [nbformat.v4.new_markdown_cell(f"See\n\n{image}") for image in (text, labeled)]
    assert find_faults(nbformat.v4.new_notebook(cells=cells)) == ["cell 1 contains an image without alt text"]


def test_what_differs_from_run_to_run_is_removed():
    bar = nbformat.v4.new_output("display_data", data={build_notebooks.WIDGET: {}, "text/plain": "0%"})
    explorer = nbformat.v4.new_output(
        "display_data", data={build_notebooks.WIDGET: {}, "text/html": "<p>", "image/png": "AAAA"}
    )
    warning = nbformat.v4.new_output("stream", name="stderr", text="10%")
    printed = nbformat.v4.new_output("stream", name="stdout", text="done")
    notebook = notebook_showing(bar, explorer, warning, printed)
    notebook.cells[0].metadata["execution"] = {"iopub.execute_input": "today"}
    notebook.metadata = {"widgets": {}, "language_info": {"version": "3.11.1"}}
    build_notebooks.clean(notebook)
    assert [sorted(o.get("data", {"text": 0})) for o in notebook.cells[0].outputs] == [
        ["image/png", "text/html"],
        ["text"],
    ]
    assert not notebook.cells[0].metadata and notebook.metadata == build_notebooks.METADATA


# --- for a class ----------------------------------------------------------------------------------------------------


SEED = 271828
HANGS = "\nwhile True:\n    pass\n"
SLEEPS = "__import__('time').sleep(1e6)\n"


def solved(release, solutions: dict, edit=lambda text: text):
    """A student's copy of the release with these cells filled in."""
    notebook = copy.deepcopy(release)
    for cell in notebook.cells:
        if cell.id in solutions and cell.metadata.nbgrader.solution:
            cell.source = edit(solutions[cell.id].source)
    return notebook


@pytest.fixture(scope="module")
def classroom(tmp_path_factory):
    """The release of chapter 05 with a private seed, and five students, graded by nbgrader."""
    from nbgrader.api import Gradebook
    from nbgrader.apps import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import PyFileConfigLoader

    folder, name = tmp_path_factory.mktemp("class"), "05_prefix_lm_mask"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIVLM_HOME", str(folder / "saved"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("MINIVLM_SEED", "")
        patch.setenv("PATH", os.environ["PATH"])  # the course's settings change it
        assert main(["05", "--class", str(folder), "--seed", str(SEED)]) == 0
        release = nbformat.read(folder / "release" / name / f"{name}.ipynb", as_version=4)
        right = exercise_cells(build(SOURCES[name], "solution"))
        students = {
            "ada": solved(release, right),
            "bob": release,
            "cy": solved(release, right, lambda text: text.replace(" <= ", " >= ")),  # swaps queries and keys
            "dot": solved(release, right, lambda text: text + HANGS * ("def block_mask" in text)),
            "eve": solved(
                release, right, lambda text: text.replace("    block = mask_ar", f"    {SLEEPS}    block = mask_ar")
            ),
        }
        config = PyFileConfigLoader("nbgrader_config.py", path=str(folder)).load_config()
        config.Execute.timeout = 30
        api = NbGraderAPI(CourseDirectory(config=config), config=config)
        grades, feedback = {}, {}
        for student, notebook in students.items():
            path = folder / "submitted" / student / name / f"{name}.ipynb"
            path.parent.mkdir(parents=True)
            nbformat.write(notebook, path)
            result = api.autograde(name, student)
            assert result["success"], result
            with Gradebook(api.coursedir.db_url, api.coursedir.course_id) as gradebook:
                found = gradebook.find_submission_notebook(name, name, student).grades
                grades[student] = {grade.name.removeprefix("check_"): grade.auto_score for grade in found}
            assert api.generate_feedback(name, student)["success"]
            feedback[student] = (folder / "feedback" / student / name / f"{name}.html").read_text(encoding="utf-8")
    return {"feedback": feedback, "grades": grades, "release": release, "folder": folder, "name": name}


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("student", ["ada", "bob", "cy", "dot", "eve"])
@pytest.mark.long
def test_our_grader_gives_the_same_marks_as_nbgrader(classroom, student):
    name = classroom["name"]
    report = grade_notebook(classroom["folder"] / "submitted" / student / name / f"{name}.ipynb", SEED, time_limit=60)
    points = {name: points_of(report, exercises.EXERCISES[name]) for name in report.marks}
    assert points == {name: round(score, 2) for name, score in classroom["grades"][student].items()}


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.long
def test_the_release_contains_no_solution_and_no_hidden_test(classroom):
    text = to_text(classroom["release"])
    assert not re.search("SOLUTION|HIDDEN|exercises.score", text)
    stubs = [c for c in exercise_cells(classroom["release"]).values() if c.metadata.nbgrader.solution]
    assert stubs and all(build_notebooks.STUB in cell.source for cell in stubs)


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.long
def test_the_teachers_source_contains_both_and_the_settings_the_private_seed(classroom):
    name = classroom["name"]
    text = (classroom["folder"] / "source" / name / f"{name}.ipynb").read_text(encoding="utf-8")
    count = len(exercises.in_chapter("05"))
    assert text.count("BEGIN SOLUTION") == text.count("BEGIN HIDDEN TESTS") == text.count("exercises.score") == count
    assert "score(block_mask, points=2)" in text and build_notebooks.seed_of(classroom["folder"]) == SEED


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.long
def test_feedback_shows_the_diagnosis_but_not_the_seed(classroom):
    for student, page in classroom["feedback"].items():
        assert str(SEED) not in page, student
    assert "05.1 block_mask: passed all" in classroom["feedback"]["ada"]
    assert "05.1 block_mask: not attempted yet." in classroom["feedback"]["bob"]
    assert "05.1 block_mask: not yet: it swaps queries and keys." in classroom["feedback"]["cy"]


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("student", ["dot", "eve"])
@pytest.mark.long
def test_what_hangs_only_costs_its_own_marks_in_nbgrader(classroom, student):
    """Dot's cell never ends after it has defined the function. Eve's function sleeps."""
    most = {e.name: float(e.points) for e in exercises.in_chapter("05")}
    lost = {"block_mask": 0.0} if student == "eve" else {}
    assert classroom["grades"][student] == most | lost


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.long
def test_nbgrader_gives_the_same_marks_as_the_checks(classroom):
    most = {e.name: float(e.points) for e in exercises.in_chapter("05")}
    assert classroom["grades"]["ada"] == most
    assert classroom["grades"]["bob"] == dict.fromkeys(most, 0.0)

    def swapped(mask_ar):
        block = mask_ar.cumsum(-1)
        return block[..., None, :] >= block[..., :, None]

    wrong = exercises.score(swapped, points=most["block_mask"], name="block_mask", seed=SEED)
    assert classroom["grades"]["cy"] == most | {"block_mask": wrong} and wrong < most["block_mask"]


def test_a_class_made_again_keeps_the_seed_and_the_teachers_edits(tmp_path, capsys, monkeypatch):
    from nbgrader.apps import NbGraderAPI

    monkeypatch.setattr(NbGraderAPI, "generate_assignment", lambda self, name, force: {"success": True})
    name, other = "05_prefix_lm_mask", "07_kv_cache"
    path = tmp_path / "source" / name / f"{name}.ipynb"
    main(["05", "07", "--class", str(tmp_path)])
    assert "public seed" in capsys.readouterr().out and build_notebooks.seed_of(tmp_path) == 1
    main(["05", "07", "--class", str(tmp_path), "--seed", "77"])
    first = path.read_text()
    main(["05", "07", "--class", str(tmp_path)])
    assert path.read_text() == first and "public seed" not in capsys.readouterr().out
    assert build_notebooks.seed_of(tmp_path) == 77
    path.write_text(first.replace("Predict first", "Guess first"))
    main(["05", "07", "--class", str(tmp_path), "--seed", "88"])
    assert "Guess first" in path.read_text() and "Kept" in capsys.readouterr().out
    assert build_notebooks.seed_of(tmp_path) == 88 and (tmp_path / "source" / other / f"{other}.ipynb").exists()


@pytest.mark.parametrize("stem", SOURCES)
def test_links_between_chapters_work_in_the_release_for_a_class(stem):
    text = "\n".join(cell.source for cell in build_notebooks.for_class(read(SOURCES[stem])).cells)
    targets = re.findall(r"\]\(([^)#]+\.ipynb)", text)
    assert len(targets) >= 1
    assert all(target in {f"../{name}/{name}.ipynb" for name in SOURCES} for target in targets)


def test_a_seed_needs_a_class():
    with pytest.raises(SystemExit):
        main(["--seed", "1"])
