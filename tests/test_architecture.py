"""The package is what docs/architecture.md says: imports point down, never in a circle, and the model stays small."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minivlm"
MODEL = "config siglip masks gemma cache paligemma generation compiled losses locations vqvae processor tokenizer"
MODEL = set((MODEL + " checkpoint hub").split())
WINGS = ["training", "emoji", "families", "course"]  # each may import the model and the wings before it
TOP = {"__init__", "__main__", "doctor"}  # the package's face and its command line: they may import everything


def module_name(path: Path) -> str:
    """``minivlm/course/viz/__init__.py`` → "course.viz"; the package's own ``__init__`` → "__init__"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the package that ``module`` imports anywhere: at the top, in a function or for type checking."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively: name the package"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix("minivlm.") for name in found if name.startswith("minivlm.")}
    return frozenset(known(name) for name in inside) - {module, "__init__"}


def known(name: str) -> str:
    """The longest prefix that is a module: "gemma.rms_norm" → "gemma"; names of the package itself → "__init__"."""
    while name not in MODULES:
        if "." not in name:
            return "__init__"
        name = name.rpartition(".")[0]
    return name


def wing(module: str) -> int:
    """Floor of a module: 0 for the model, 1 … for the wings, highest for the package's face."""
    first = module.split(".")[0]
    if first in TOP:
        return len(WINGS) + 1
    return 0 if first in MODEL else WINGS.index(first) + 1


def test_every_module_has_its_place():
    assert {name for name in MODULES if "." not in name} - TOP - set(WINGS) == MODEL


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module):
    wrong = [other for other in imports(module) if wing(other) > wing(module)]
    assert not wrong, f"{module} imports {wrong}, which is above it"


def test_config_imports_nothing_of_the_package():
    assert not imports("config")


def test_nothing_imports_in_a_circle():
    """Depth first: a module that is reached again before it is done closes a circle."""
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, f"circle: {' → '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for other in sorted(imports(module)):
            visit(other)
        done.add(path.pop())

    for module in MODULES:
        visit(module)


def test_the_imports_are_really_read():
    assert {"config", "masks", "cache"} <= imports("gemma")
    assert "course.viz.style" in imports("course.viz.attention")
    assert "emoji.evaluation" in imports("__main__")  # imported in a function


def test_the_model_can_be_read_in_an_evening():
    lines = {name: len(MODULES[name].read_text(encoding="utf-8").splitlines()) for name in MODEL}
    assert sum(lines.values()) < 3000, lines
