"""Where a learner's passed solutions are kept: one file of source code each, in the learner's own folder.

The folder is ``~/.minivlm/solutions``, or ``solutions`` under the environment variable MINIVLM_HOME. A file holds the
function as it was written, so it can be read and carried to another machine.
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


def folder() -> Path:
    return Path(os.environ.get("MINIVLM_HOME") or Path.home() / ".minivlm") / "solutions"


def path_of(exercise: Exercise) -> Path:
    return folder() / f"{exercise.key}_{exercise.name}.py"


def is_saved(exercise: Exercise) -> bool:
    return path_of(exercise).exists()


def save(exercise: Exercise, function: Callable) -> str:
    """Writes the function's source; returns a sentence where that cannot be done, and nothing where it was."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return "It could not be kept, since its source cannot be found: define it with `def` in a cell of its own."
    path = path_of(exercise)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(source, encoding="utf-8")
        os.replace(path.with_suffix(".part"), path)
    except OSError as error:
        return f"It could not be kept in {path.parent} ({error.strerror}): set MINIVLM_HOME to a folder of yours."
    return ""


def load(exercise: Exercise, names: dict[str, object]) -> Callable:
    """The kept function, defined anew among the usual imports and ``names``. Raises what running the source raises."""
    source = path_of(exercise).read_text(encoding="utf-8")
    # annotations stay text: the names in them need not exist
    code = compile(source, str(path_of(exercise)), "exec", __future__.annotations.compiler_flag, dont_inherit=True)
    space = {"torch": torch, "np": np, "numpy": np, "math": math, "F": F, "nn": torch.nn, "losses": losses}
    space |= names | {"Tensor": torch.Tensor, "__name__": "minivlm_kept"}
    exec(code, space)
    return space[exercise.name]


def forget(exercise: Exercise) -> None:
    path_of(exercise).unlink(missing_ok=True)
