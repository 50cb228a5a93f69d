"""Run one submitted notebook and check its exercises, in the process that ``grader`` starts and can kill.

No Jupyter kernel is needed. In cells that are unchanged since the release, only imports, definitions and constants run;
cells that the learner wrote or changed run completely. The worker announces each step before it starts, so the grader
knows where a crash or an endless loop happened, and reports each mark immediately, so nothing later can undo it.

The learner's code runs in this process. Whatever it replaced in the package is restored before a check, and messages
carry a secret token. That stops tricks, not attacks: grade strangers' work in a container.
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

MEMORY = 4 << 30  # bytes a notebook can allocate beyond the imports, on Linux
ESSENTIAL = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
CHECKED = re.compile(r"\bexercises\.check\(\s*(\w+)")
RUN_BODY = ("time", "timeit", "capture", "prun")  # cell magics whose body runs


def fingerprint(source: str) -> str:
    """The id of a released cell. A cell whose id still matches its source is unchanged."""
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def main() -> None:
    """Read a job from stdin: path, token, seed, failed steps (step → reason), and exercises that are already marked."""
    job = json.load(sys.stdin)
    tell = open_channel(job["token"])
    limit_memory()
    try:
        work(job, tell)
    except BaseException as error:  # the file can be anything
        tell(problem=f"This file is not a readable notebook ({describe_error(error)}).")
    os._exit(0)  # does not wait for threads that the learner's code started


def open_channel(token: str) -> Callable:
    """A channel to the parent process. What the learner's code prints is discarded."""
    channel, me, dumps = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.getpid(), json.dumps
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)

    def tell(**what) -> None:
        if os.getpid() != me:  # a process that the learner's code forked
            os._exit(0)
        channel.write(f"{token}{dumps(what)}\n")
        channel.flush()

    return tell


def work(job: dict, tell: Callable) -> None:
    cells = [cell for cell in nbformat.read(job["path"], as_version=4).cells if cell.cell_type == "code"]
    text = "\n".join(cell.source for cell in cells)
    checked = set(CHECKED.findall(text))
    names = [name for name in EXERCISES if name in checked or defines(text, name)]
    tell(chapters=sorted({EXERCISES[name].chapter for name in names if name in checked}), exercises=names)
    declared, examine, restore = dict(EXERCISES), exercise.examine, take_snapshot()
    answers, failed = run_cells(cells, names, job["failed"], tell)
    for name in names:
        if name in job["marked"]:
            continue
        tell(step=name)
        restore()
        if name in answers:
            score, message = mark(declared[name], answers[name], examine, job["seed"])
        else:
            score, message = 0.0, why_missing(name, cells, failed)
        tell(exercise=name, score=score, message=message[:500])
    tell(done=True)


# --- the learner's code ---------------------------------------------------------------------------------------------


class Shell:
    """A stand-in for IPython: commands and line magics do nothing, and a timed cell runs."""

    def __init__(self, namespace: dict):
        self.namespace = namespace

    def run_cell_magic(self, name: str, line: str, body: str) -> None:
        if name in RUN_BODY:
            exec(TransformerManager().transform_cell(body), self.namespace)

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None


def run_cells(
    cells: list, names: list[str], failed: dict[str, str], tell: Callable
) -> tuple[dict[str, object], dict[str, str]]:
    """Run the learner's cells.

    Returns:
        What the notebook defines under the names of exercises, and the failed cells, "cell N" → reason.
    """
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    namespace, failed, answers = vars(module), dict(failed), {}
    shell = Shell(namespace)
    namespace |= {"get_ipython": lambda: shell, "display": lambda *args, **kwargs: None}
    for number, cell in enumerate(cells, start=1):
        step = f"cell {number}"
        if step in failed or cell.metadata.get("nbgrader", {}).get("grade"):
            continue
        tell(step=step)
        try:
            run_cell(cell, f"<{step}>", namespace)
        except BaseException as error:  # sys.exit and anything else a learner can think of
            failed[step] = describe_error(error)
        # A chapter rebinds the name to the package's function afterwards, which is not the learner's answer.
        found = {name: namespace[name] for name in names if name in namespace}
        answers |= {name: value for name, value in found.items() if not is_from_package(value)}
    return answers, failed


def run_cell(cell: nbformat.NotebookNode, filename: str, namespace: dict) -> None:
    source = TransformerManager().transform_cell(cell.source)
    if cell.get("id", "").startswith(fingerprint(cell.source)):
        source = essentials(source)
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # for inspect.getsource
    exec(compile(source, filename, "exec"), namespace)


def essentials(source: str) -> str:
    """Imports, definitions and constants: what other cells can need from a cell that only shows something."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ESSENTIAL) or is_constant(node)]
    return ast.unparse(ast.Module(nodes, []))


def is_constant(node: ast.stmt) -> bool:
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


def is_from_package(value: object) -> bool:
    return str(getattr(value, "__module__", "")).split(".")[0] == "minivlm"


def why_missing(name: str, cells: list, failed: dict[str, str]) -> str:
    for number, cell in enumerate(cells, start=1):
        if defines(cell.source, name) and f"cell {number}" in failed:
            return f"the cell that defines it fails: {failed[f'cell {number}']}"
    return "the notebook does not define a function with this name."


def describe_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {exercise.first_line(error)}"


# --- checking -------------------------------------------------------------------------------------------------------


def mark(declared: exercise.Exercise, answer: object, examine: Callable, seed: int) -> tuple[float, str]:
    """The fraction of the cases that are right, 0 to 1, and the check's message."""
    try:
        result = examine(declared, answer, seed)
    except BaseException as error:  # a check lets KeyboardInterrupt through
        return 0.0, f"it raises {describe_error(error)}"
    return float(result.score), " ".join((result.message, *result.notes))


def take_snapshot() -> Callable[[], None]:
    """Return a function that restores the functions of the package, torch and Python as they are now."""
    owners = [builtins, copy, inspect, json, math, np, torch, torch.nn.functional, minivlm]
    owners += [module for name, module in sys.modules.items() if name.startswith("minivlm.")]
    saved = [(owner, name, value) for owner in owners for name, value in vars(owner).items() if callable(value)]

    def restore(vars=vars, setattr=setattr) -> None:
        for owner, name, value in saved:
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)

    return restore


def limit_memory() -> None:
    """Make allocations beyond the limit fail in this process. macOS and Windows have no such limit."""
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
