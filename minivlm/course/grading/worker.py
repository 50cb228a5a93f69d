"""Runs one submitted notebook and checks its exercises: the process that ``grading`` starts, and may have to kill.

It needs no Jupyter kernel. Of the cells that are as they were released only the imports, definitions and constants
run; the learner's own cells run whole. It says each step before it takes it, so that whoever listens knows where a
crash or an endless loop was, and each mark at once, so that nothing later can take it away.

The learner's code runs in this very process. What it replaces in the package is put back before anything is checked,
and marks travel with a secret, which keeps out tricks, not attacks: grade strangers' work in a container.
"""

import ast
import builtins
import copy
import hashlib
import inspect
import json
import linecache
import math
import os
import re
import sys
import types
from collections.abc import Callable

import nbformat
import numpy as np
import torch
from IPython.core.inputtransformer2 import TransformerManager

import minivlm
from minivlm.course.exercises import EXERCISES, exercise

MEMORY = 4 << 30  # bytes that a notebook may take beyond what the imports took, on Linux
KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
CHECKED = re.compile(r"\bexercises\.check\(\s*(\w+)")
RUN_WHOLE = ("time", "timeit", "capture", "prun")  # cell magics whose body counts


def fingerprint(source: str) -> str:
    """The id of a released cell; one that still has the id of its source is unchanged."""
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def main() -> None:
    """Reads a job from stdin: path, token, seed, trouble (step → sentence) and marked, what is not to be done again."""
    job = json.load(sys.stdin)
    tell = open_channel(job["token"])
    limit_memory()
    try:
        work(job, tell)
    except BaseException as error:  # the file may be anything
        tell(problem=f"This is no notebook that can be read ({in_words(error)}).")
    os._exit(0)  # waits for no thread that a learner left behind


def open_channel(token: str) -> Callable:
    """A way to the parent that the learner's prints cannot get into: they go nowhere."""
    channel, me, dumps = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.getpid(), json.dumps
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    def tell(**what) -> None:
        if os.getpid() != me:  # a copy that the learner forked
            os._exit(0)
        channel.write(f"{token}{dumps(what)}\n")
        channel.flush()

    return tell


def work(job: dict, tell: Callable) -> None:
    cells = [cell for cell in nbformat.read(job["path"], as_version=4).cells if cell.cell_type == "code"]
    text = "\n".join(cell.source for cell in cells)
    asked = set(CHECKED.findall(text))
    names = [name for name in EXERCISES if name in asked or defines(text, name)]
    tell(chapters=sorted({EXERCISES[name].chapter for name in names if name in asked}), exercises=names)
    pieces, examine, put_back = dict(EXERCISES), exercise.examine, remember()
    answers, trouble = run_cells(cells, names, job["trouble"], tell)
    for name in names:
        if name in job["marked"]:
            continue
        tell(step=name)
        put_back()
        if name in answers:
            score, message = mark(pieces[name], answers[name], examine, job["seed"])
        else:
            score, message = 0.0, why_missing(name, cells, trouble)
        tell(exercise=name, score=score, message=message[:500])
    tell(done=True)


# --- the learner's code ---------------------------------------------------------------------------------------------


class Shell:
    """Stands for IPython: commands and line magics do nothing, and a timed cell runs."""

    def __init__(self, space: dict):
        self.space = space

    def run_cell_magic(self, name: str, line: str, body: str) -> None:
        if name in RUN_WHOLE:
            exec(TransformerManager().transform_cell(body), self.space)

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None


def run_cells(
    cells: list, names: list[str], trouble: dict[str, str], tell: Callable
) -> tuple[dict[str, object], dict[str, str]]:
    """What the notebook defines under the names of exercises, and for each cell that failed, "cell N" → why."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    space, trouble, answers = vars(module), dict(trouble), {}
    shell = Shell(space)
    space |= {"get_ipython": lambda: shell, "display": lambda *args, **kwargs: None}
    for number, cell in enumerate(cells, start=1):
        step = f"cell {number}"
        if step in trouble or cell.metadata.get("nbgrader", {}).get("grade"):
            continue
        tell(step=step)
        try:
            run_cell(cell, f"<{step}>", space)
        except BaseException as error:  # sys.exit and what a learner may think of
            trouble[step] = in_words(error)
        # a chapter goes on with the package's piece under the same name: that is no answer
        answers |= {name: space[name] for name in names if name in space and not is_the_packages(space[name])}
    return answers, trouble


def run_cell(cell: nbformat.NotebookNode, filename: str, space: dict) -> None:
    source = TransformerManager().transform_cell(cell.source)
    if cell.get("id", "").startswith(fingerprint(cell.source)):
        source = essentials(source)
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # for inspect.getsource
    exec(compile(source, filename, "exec"), space)


def essentials(source: str) -> str:
    """Imports, definitions and constants: what other cells may need of a cell that only shows something."""
    kept = [node for node in ast.parse(source).body if isinstance(node, KEPT) or is_plain(node)]
    return ast.unparse(ast.Module(kept, []))


def is_plain(node: ast.stmt) -> bool:
    """Whether this is ``name = literal`` or ``name = exercises.piece("name")``."""
    if not isinstance(node, ast.Assign) or not all(isinstance(target, ast.Name) for target in node.targets):
        return False
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return ast.unparse(node.value).startswith("exercises.piece(")
    return True


def defines(source: str, name: str) -> bool:
    return re.search(rf"^(?:(?:def|class) {name}\b|{name} *=)", source, re.MULTILINE) is not None


def is_the_packages(value: object) -> bool:
    return str(getattr(value, "__module__", "")).split(".")[0] == "minivlm"


def why_missing(name: str, cells: list, trouble: dict[str, str]) -> str:
    for number, cell in enumerate(cells, start=1):
        if defines(cell.source, name) and f"cell {number}" in trouble:
            return f"the cell that defines it fails: {trouble[f'cell {number}']}"
    return "the notebook defines no function of this name."


def in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {exercise.first_line(error)}"


# --- checking -------------------------------------------------------------------------------------------------------


def mark(piece: exercise.Exercise, answer: object, examine: Callable, seed: int) -> tuple[float, str]:
    """The share of the cases that are right, 0 to 1, and what the check says."""
    try:
        result = examine(piece, answer, seed)
    except BaseException as error:  # KeyboardInterrupt is one that a check lets through
        return 0.0, f"it raises {in_words(error)}"
    return float(result.score), " ".join((result.message, *result.notes))


def remember() -> Callable[[], None]:
    """Returns what puts the functions of the package, torch and Python back where they are now."""
    owners = [builtins, copy, inspect, json, math, np, torch, torch.nn.functional, minivlm]
    owners += [module for name, module in sys.modules.items() if name.startswith("minivlm.")]
    now = [(owner, name, value) for owner in owners for name, value in vars(owner).items() if callable(value)]

    def put_back(vars=vars, setattr=setattr) -> None:
        for owner, name, value in now:
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)

    return put_back


def limit_memory() -> None:
    """Beyond this an allocation fails, in the learner's process alone. macOS and Windows have no such limit."""
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
