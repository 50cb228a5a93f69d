"""How speed and memory are measured: in turns in one process, or each in a fresh one; medians with their spread.

Machines are noisy, and their speed drifts. So the contestants take turns, each round yields one ratio, and the result
is the median of these ratios.
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
    """The median of several measurements, with minimum and maximum."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.minimum:.3g}…{self.maximum:.3g})"


@dataclass
class Row:
    """One line of the table.

    Attributes:
        figure: What is measured.
        unit: Unit of ``measured``.
        measured: Name of a contestant → its measurement, or a sentence that says why there is none.
        ratios: What is compared → the ratio. Above 1 means that minivlm is better, unless ``target`` says otherwise.
        target: What ``ratios`` should reach.
        note: Anything else a reader needs.
    """

    figure: str
    unit: str
    measured: dict[str, Spread | str]
    ratios: dict[str, Spread] = field(default_factory=dict)
    target: str = ""
    note: str = ""


def in_turns(contestants: dict[str, Callable[[], object]], rounds: int, warmups: int = 1) -> dict[str, list[float]]:
    """Seconds of each contestant in each round. Each round starts with a different one, so none is always first."""
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
    """Per round: their time divided by ours."""
    return Spread.of([a / b for a, b in zip(theirs, ours, strict=True)])


@dataclass(frozen=True)
class Fresh:
    """What a fresh process took: seconds from start to end and peak memory in bytes; and what it printed as JSON."""

    seconds: float
    peak: int
    printed: object


def fresh(code: str, *arguments: str) -> Fresh:
    """Runs Python code in its own process. ``arguments`` are its ``sys.argv[1:]``; its last output line must be JSON.

    Raises:
        RuntimeError: If the process fails; the message is the last line of its stderr.
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
    """Peak resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include what the parent had before exec
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_bandwidth(device: str = "cpu", size: int = 2**30, rounds: int = 5) -> float:
    """Memory bandwidth in bytes per second: the best of several sums over ``size`` bytes, with torch's threads.

    On a GPU, the best of several copies, which read and write.
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
    """What the figures depend on besides the code."""
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
