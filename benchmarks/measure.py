"""How things are measured: in turns in one process, or each in a fresh one; medians with their spread.

Machines are noisy and slow down and speed up by themselves. So contestants take turns, each round gives one ratio, and
what counts is the median of these ratios.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FRESH_TIMEOUT = 1800  # seconds


@dataclass(frozen=True)
class Spread:
    """The median of several measurements, with the least and the greatest."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g}…{self.most:.3g})"


@dataclass
class Row:
    """One line of the table.

    Attributes:
        figure: what is measured.
        unit: of ``measured``.
        measured: name of a contestant → what it took, or a sentence on why it was not measured.
        ratios: what is compared → the ratio; above 1, ours is the better, unless the aim says otherwise.
        aim: what ``ratios`` should reach.
        note: what else a reader needs.
    """

    figure: str
    unit: str
    measured: dict[str, Spread | str]
    ratios: dict[str, Spread] = field(default_factory=dict)
    aim: str = ""
    note: str = ""


def in_turns(contestants: dict[str, Callable[[], object]], rounds: int, warmups: int = 1) -> dict[str, list[float]]:
    """Seconds of each contestant in each round. Every round begins with another one, so that none is always first."""
    names, seconds = list(contestants), {name: [] for name in contestants}
    for round_ in range(-warmups, rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            contestants[name]()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(theirs: list[float], ours: list[float]) -> Spread:
    """Round by round: how many times as much theirs took."""
    return Spread.of([a / b for a, b in zip(theirs, ours, strict=True)])


@dataclass(frozen=True)
class Fresh:
    """What a fresh process took: seconds from its start to its end, peak bytes, and what it printed as JSON."""

    seconds: float
    peak: int
    printed: object


def fresh(code: str, *arguments: str) -> Fresh:
    """Runs Python code in a process of its own. ``arguments`` are its ``sys.argv[1:]``; its last line must be JSON.

    Raises:
        RuntimeError: it failed; with the last line of what it complained about.
    """
    code += "\nfrom benchmarks.measure import own_peak\nprint(own_peak())"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=FRESH_TIMEOUT
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}, as if killed for its memory"]
        raise RuntimeError(lines[-1])
    *_, printed, peak = done.stdout.strip().splitlines()
    return Fresh(seconds, int(peak), json.loads(printed))


def own_peak() -> int:
    """The most memory that this process has had resident so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent had before this process replaced it
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_bandwidth(device: str = "cpu", size: int = 2**30, rounds: int = 5) -> float:
    """Bytes a second that the machine reads from memory: the best of summing up ``size`` bytes, at torch's threads.

    On a GPU, of copying them, which reads and writes.
    """
    numbers = torch.ones(size // 4, device=device)
    target = torch.empty_like(numbers) if device != "cpu" else None
    best = float("inf")
    for _ in range(rounds + 1):
        start = time.perf_counter()
        if target is None:
            numbers.sum()
        else:
            target.copy_(numbers)
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return (size if target is None else 2 * size) / best


def machine() -> dict[str, object]:
    """What the figures depend on beside the code."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x), model)
    import transformers

    return {
        "processor": model,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
