"""Runs a notebook's functions in several processes that talk through gloo, and measures peak memory.

Chapter 02 needs both, and neither is what the chapter is about. A new process cannot import from a notebook, so a
function travels as source code. The processes find each other through a file, need no network and no GPU, and are
stopped when one of them fails or time is up.
"""

import gc
import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import accumulate
from numbers import Real
from pathlib import Path
from pickle import PickleError

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minivlm import losses

NAMESPACE = {"torch": torch, "dist": dist, "F": F, "losses": losses}  # what a function can use without importing it


def run(
    function: Callable, shards: Sequence[tuple], helpers: Sequence[Callable] = (), timeout: Real = 300
) -> list[object]:
    """Calls ``function(*shards[rank])`` in one new process per shard, all of them connected by gloo.

    The functions run outside the notebook. They can use ``torch``, ``dist`` (torch.distributed), ``F``, ``losses``,
    what they import themselves, and the helpers.

    Args:
        function: Defined with ``def`` in a notebook cell or a file.
        shards: The arguments of each process: tensors, numbers, strings, and tuples, lists or dicts of them.
        helpers: Other functions that ``function`` calls.
        timeout: In seconds, for all processes together.

    Returns:
        What each process returned, by rank. It is limited to the same kinds of values as the arguments.

    Raises:
        ValueError: If there are no shards, an argument is of another kind, or the source of a function is not found.
        RuntimeError: If a process fails, or returns another kind of value. The message ends with what it wrote.
        TimeoutError: If the processes do not finish in time.
    """
    if not shards:
        raise ValueError("There is nothing to run: pass one tuple of arguments per process.")
    source = "\n\n".join(definition(f) for f in (*helpers, function))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for rank, arguments in enumerate(shards):
            save((source, function.__name__, arguments, len(shards), timeout), folder / f"job{rank}.pt")
        processes = [start(folder, rank) for rank in range(len(shards))]
        try:
            wait(processes, folder, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(len(shards))]


def definition(function: Callable) -> str:
    """Source code that defines the function in another process: an import if it is the package's own."""
    name = getattr(function, "__name__", repr(function))
    if str(getattr(function, "__module__", "")).split(".")[0] == "minivlm":
        return f"from {function.__module__} import {name}"
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        source = ""
    if not source.startswith(("def ", "@")):
        raise ValueError(f"The source of {name} cannot be found. Define it with def, in a cell or a file.")
    return source


def start(folder: Path, rank: int) -> subprocess.Popen:
    """A new Python that runs one job, finds the same modules as this one, and writes its output to a file."""
    path = os.pathsep.join(filter(None, sys.path))
    code = f"from minivlm.course import processes; processes.work({str(folder)!r}, {rank})"
    with open(folder / f"log{rank}.txt", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait(processes: list[subprocess.Popen], folder: Path, timeout: Real) -> None:
    """Returns when all processes have succeeded. Raises as soon as one fails: the others would wait for it."""
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            time.sleep(0.2)  # a process whose neighbor is gone fails too: let the first one finish its traceback
            break
        if time.monotonic() > end:
            running = [rank for rank, process in enumerate(processes) if process.poll() is None]
            raise TimeoutError(
                f"After {timeout:g} seconds, processes {running} of {len(processes)} were still running."
            )
        time.sleep(0.02)
    failed = [rank for rank, process in enumerate(processes) if process.poll()]
    if failed:
        written = {rank: (folder / f"log{rank}.txt").read_text("utf-8", "replace").strip() for rank in failed}
        rank = min(failed, key=lambda rank: ("gloo" in written[rank] or "Connection" in written[rank], rank))
        raise RuntimeError(f"Process {rank} of {len(processes)} failed:\n{written[rank] or 'It wrote nothing.'}")


def work(folder: str, rank: int) -> None:
    """What each new process does: joins the others, calls the function and saves what it returns."""
    torch.set_num_threads(1)  # the processes share the machine
    source, name, arguments, world_size, timeout = torch.load(Path(folder, f"job{rank}.pt"), weights_only=True)
    meeting_point = Path(folder, "meeting").as_uri()
    dist.init_process_group("gloo", meeting_point, timedelta(seconds=timeout), world_size, rank)
    namespace = dict(NAMESPACE)
    exec(compile(source, "<notebook>", "exec"), namespace)
    save(namespace[name](*arguments), Path(folder, f"result{rank}.pt"))
    dist.barrier()  # no process leaves while another still needs it
    gc.collect()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort a regular exit


def save(value: object, path: Path) -> None:
    """Writes a value to a file from which another process can read it safely: without running code in it.

    Raises:
        ValueError: If it is not made of tensors, numbers, strings, tuples, lists and dicts.
    """
    try:
        torch.save(value, path)
        torch.load(path, weights_only=True)
    except (PickleError, AttributeError):
        raise ValueError("Only tensors, numbers, strings, and tuples, lists or dicts of them can be passed.") from None


def peak_bytes(loss: Callable[..., Tensor], *inputs: Tensor) -> int:
    """The peak of the memory that torch allocates on the CPU for forward and backward, in addition to the inputs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss(*inputs).backward()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(accumulate(size for _, size in changes), default=0)
