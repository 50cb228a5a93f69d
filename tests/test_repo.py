"""The files around the package agree with each other, and README.md describes what is there."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from minivlm.__main__ import COMMANDS, new_parser
from minivlm.course.chapters import CHAPTERS
from minivlm.hub import EMBEDDED

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
WANTED = [Requirement(text) for text in PROJECT["dependencies"] + [text for extra in EXTRAS.values() for text in extra]]
PINNED = {
    pin.name: next(iter(pin.specifier))
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINES = [line.split("  #")[0].strip() for line in "\n".join(BLOCK.findall(README)).splitlines()]
LINES += re.findall(r"`([^`]*)`", BLOCK.sub("", README))
COMMAND_LINES = [line.split("-m minivlm ", 1)[1] for line in LINES if "-m minivlm " in line]
TARGETS = sorted({line.split()[1] for line in LINES if line.startswith("make ")})


def test_constraints_pin_every_dependency_and_no_other():
    assert {wanted.name for wanted in WANTED} == set(PINNED)
    for wanted in WANTED:
        pin = PINNED[wanted.name]
        assert pin.operator == "==", wanted.name
        assert pin.version in wanted.specifier, f"{wanted} excludes the tested {pin.version}"


def test_dependencies_have_lower_bounds_only():
    for wanted in WANTED:
        assert [bound.operator for bound in wanted.specifier] == [">="], wanted


def test_environment_installs_what_pyproject_lists():
    python, pip, parts = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert pip == "pip"
    assert parts == {"pip": ["-c constraints.txt", "-e .[dev]"]}


def test_readme_begins_with_name_picture_and_the_two_commands():
    order = ["# minivlm", "![", "make run", "make test", "## Ask"]
    assert [README.index(part) for part in order] == sorted(README.index(part) for part in order)
    assert README.startswith(order[0])


@pytest.mark.parametrize("target", TARGETS)
def test_readme_names_make_targets_that_exist(target):
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_readme_command_lines_parse(line):
    argv = shlex.split(line)
    if "--help" not in argv:
        new_parser(argv).parse_args(argv)
    assert argv[0] in COMMANDS


def test_readme_shows_every_command():
    assert {line.split()[0] for line in COMMAND_LINES} | {"evaluate"} == set(COMMANDS)  # evaluate: as a make target
    assert {"run", "test", "lab", "train", "evaluate"} <= set(TARGETS)


def test_readme_names_files_that_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) >= 3
    names = re.findall(r"`((?:data|minivlm|tests|scripts|docs)/[^` ]*)`", README)
    modules = [f"minivlm/{name}" for name in re.findall(r"`(\w+\.py)`", README)]
    images = [word for line in COMMAND_LINES for word in shlex.split(line) if word.startswith("data/")]
    for name in links + names + modules + images:
        assert (ROOT / name).exists(), name


def test_readme_lists_every_module_of_the_model_and_every_wing():
    tree = README[README.index("## What is where") : README.index("## License")]
    model, *wings = re.findall(r"^(?:minivlm/|  (\w+)/) +(.*(?:\n {20,}.*)*)", tree, re.MULTILINE)
    listed = set(model[1].split("chapter:")[1].split())
    assert listed == {p.stem for p in (ROOT / "minivlm").glob("*.py")} - {"__init__", "__main__", "doctor"}
    assert {name for name, _ in wings} == {p.parent.name for p in (ROOT / "minivlm").glob("*/__init__.py")}


def test_readme_lists_the_chapters():
    table = README[README.index("<!-- chapters -->") : README.index("<!-- /chapters -->")]
    rows = re.findall(
        r"^\| \[(\d\d|L\d+) (.*?)\]\(notebooks/(?:labs/)?(\d\d|L\d+)_\w+\.ipynb\) \| (.*?) \| (.*?) ?\|$",
        table,
        re.MULTILINE,
    )
    found = {
        number: (title, question, tuple(re.findall(r"`(.+?)`", modules)))
        for number, title, _, question, modules in rows
    }
    assert found == {c.number: (c.title, c.question, tuple(c.modules)) for c in CHAPTERS.values()}
    assert all(number == link for number, _, link, _, _ in rows)


def test_readme_and_model_card_show_the_same_table():
    card = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    (ours,), (theirs,) = (re.findall(r"^\| % \|.*?\n(?=\n)", text, re.MULTILINE | re.DOTALL) for text in (README, card))
    assert ours == theirs


TEXTS = [".md", ".py", ".js", ".yml", ".yaml", ".toml", ".cff"]
NOT_OURS = {"picture": "image", "likeliest": "most likely", "whole number": "integer"} | {
    british: american
    for british, american in [
        ("colour", "color"), ("centre", "center"), ("grey", "gray"), ("licence", "license"), ("neighbour", "neighbor"),
        ("behaviour", "behavior"), ("normalis", "normaliz"), ("initialis", "initializ"), ("recognis", "recogniz"),
        ("organis", "organiz"), ("labelled", "labeled"), ("rasteris", "rasteriz"),
    ]
}  # fmt: skip


def test_the_text_keeps_to_its_words():
    """Words that this project once used in a sense of its own, and British spellings. The list has to name them."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    paths = [ROOT / name for name in tracked if Path(name).suffix in TEXTS and name != "CHANGELOG.md"]
    assert len(paths) > 80
    found = []
    for path in paths:
        if not path.is_file() or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found += [f"{path.relative_to(ROOT)}:{number}: {bad}" for bad in NOT_OURS if bad in line.lower()]
    assert not found, "\n".join(found[:20])


def test_ci_is_executable_and_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().rstrip().endswith("make test")
