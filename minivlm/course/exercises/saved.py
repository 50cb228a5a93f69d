"""Passed solutions are saved in the learner's own folder, one source file each.

The folder is ``~/.minivlm/solutions``, or ``$MINIVLM_HOME/solutions`` if that environment variable is set. A file
contains the function as the learner wrote it, so it can be read and copied to another machine.
"""

import __future__

import inspect
import math
import os
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minivlm import losses
from minivlm.course.exercises.exercise import Exercise
from minivlm.hub import write_atomically


def folder() -> Path:
    """The learner's folder of solutions."""
    return Path(os.environ.get("MINIVLM_HOME") or Path.home() / ".minivlm") / "solutions"


def path_of(exercise: Exercise) -> Path:
    """The file that a solution is saved to."""
    return folder() / f"{exercise.key}_{exercise.name}.py"


def is_saved(exercise: Exercise) -> bool:
    """Whether there is a saved solution."""
    return path_of(exercise).exists()


def save(exercise: Exercise, function: Callable) -> str:
    """Write the function's source.

    Returns:
        A sentence that says why it could not be saved, or "".
    """
    name = getattr(function, "__name__", "")
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        source = ""
    if not name.isidentifier() or not source.startswith(("def ", "@")):
        return "It could not be saved because its source was not found: define it with `def` in its own cell."
    if name != exercise.name:
        source += f"\n\n{exercise.name} = {name}\n"
    path = path_of(exercise)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as part:
            part.write_text(source, encoding="utf-8")
    except OSError as error:
        return f"{error} Set MINIVLM_HOME to a folder that you can write to."
    return ""


def load(exercise: Exercise, names: dict[str, object]) -> Callable:
    """Define the saved function again, with the usual imports and ``names`` in scope.

    Raises:
        Exception: Whatever running the source raises.
    """
    source = path_of(exercise).read_text(encoding="utf-8")
    # Annotations stay strings, so the names in them need not exist.
    code = compile(source, str(path_of(exercise)), "exec", __future__.annotations.compiler_flag, dont_inherit=True)
    namespace = {"torch": torch, "np": np, "numpy": np, "math": math, "F": F, "nn": torch.nn, "losses": losses}
    namespace |= names | {"Tensor": torch.Tensor, "__name__": "minivlm_solution"}
    exec(code, namespace)
    return namespace[exercise.name]


def delete(exercise: Exercise) -> None:
    """Delete the saved solution, if there is one."""
    path_of(exercise).unlink(missing_ok=True)
