"""A learner's own copy of the notebooks, and JupyterLab open on chapter 00.

    work/00_start_here.ipynb                the learner's: nothing here is ever overwritten
    work/05_prefix_lm_mask.updated.ipynb    a chapter that changed after the learner had begun it
    work/.copied.json                       which version of each chapter the copy began with

The copy has the folders of ``notebooks/``, so that links between chapters work, but no solutions.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from minivlm import hub

NOTEBOOKS = hub.DATA.parent / "notebooks"  # in a clone; a wheel has none
COPIED = ".copied.json"
FIRST = "00_start_here.ipynb"


def copy_notebooks(work: Path, notebooks: Path = NOTEBOOKS) -> list[str]:
    """Copies what is not there yet, and puts chapters that were updated beside the learner's.

    A copy that its learner has never saved is replaced. To start a chapter again, delete or rename it.

    Returns:
        One sentence per updated chapter: where the learner's and the new version are.

    Raises:
        ValueError: If there are no notebooks to copy, or ``work`` is among them.
    """
    if not (notebooks / FIRST).is_file():
        raise ValueError("The notebooks are not part of an installed package: run this command in a clone.")
    if work.resolve().is_relative_to(notebooks.resolve()):
        raise ValueError(f"The learner's copy cannot be inside {notebooks}: choose another folder.")
    work.mkdir(parents=True, exist_ok=True)
    record = work / COPIED
    began = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    told = []
    for original in [*sorted(notebooks.glob("*.ipynb")), *sorted(notebooks.glob("labs/*.ipynb"))]:
        name, now = original.relative_to(notebooks).as_posix(), digests(original)
        mine = work / name
        before = began.setdefault(name, now)
        if not mine.exists() or (before != now and digests(mine)["file"] == before["file"]):
            copy(original, mine)
        elif before["cells"] != now["cells"]:
            beside = free_name(mine)
            copy(original, beside)
            told.append(f"{name} has been updated since you began it: yours is unchanged, the new one is {beside}.")
        began[name] = now
    with hub.write_atomically(record) as part:
        part.write_text(json.dumps(began, indent=1), encoding="utf-8")
    return told


def digests(path: Path) -> dict[str, str]:
    """Of the whole file, and of its cells without outputs: only a change of these is an update."""
    content = path.read_bytes()
    try:
        cells = [["".join(cell["source"]), cell["cell_type"]] for cell in json.loads(content)["cells"]]
    except (ValueError, KeyError, TypeError):  # the learner's own may be broken
        cells = None
    return {"file": digest(content), "cells": digest(json.dumps(cells).encode())}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def copy(original: Path, target: Path) -> None:
    """Copies the whole file or nothing."""
    target.parent.mkdir(exist_ok=True)
    with hub.write_atomically(target) as part:
        shutil.copyfile(original, part)


def free_name(mine: Path) -> Path:
    """``05_….updated.ipynb``, or ``05_….updated-2.ipynb`` if that is taken."""
    beside, n = mine.with_name(f"{mine.stem}.updated.ipynb"), 1
    while beside.exists():
        n += 1
        beside = mine.with_name(f"{mine.stem}.updated-{n}.ipynb")
    return beside


def open_lab(work: Path, options: Sequence[str] = ()) -> None:
    """Runs JupyterLab in the folder until it is stopped, open on chapter 00, also as root in a container."""
    from jupyterlab.labapp import LabApp

    as_root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    here = [f"--ServerApp.root_dir={work.resolve()}", f"--LabApp.default_url=/lab/tree/{FIRST}"]
    LabApp.launch_instance(argv=[*here, *as_root, *options])
