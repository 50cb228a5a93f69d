"""The learner's file, which runs in a process of its own, as seen from here: functions that take and return arrays."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WORKER = Path(__file__).with_name("worker.py")
RETURNS = {  # what each function of the learner's returns; all others return an array
    "read_config": ["plain"],
    "load": ["object"],
    "prefill": ["array", "object"],
    "step": ["array", "object"],
    "generate": ["tokens"],
}
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "VECLIB_MAXIMUM")}


class Failed(Exception):
    """What went wrong in the learner's process, in one sentence."""


class NotWritten(Exception):
    """The function's name: it is missing, or raises NotImplementedError."""


@dataclass(frozen=True)
class Kept:
    """An object that stays in the learner's process, such as the model."""

    number: int


class Learner:
    """Runs the learner's file.

    Args:
        limit: Seconds that a call can take.
        debug: Whether to show the tracebacks of errors in the file, on stderr.

    Attributes:
        seen: The intermediate values of the last call, by the names that the learner gave them.
        seconds: How long the last call took in the learner's process.
    """

    def __init__(self, path: Path, limit: int | float, debug: bool = False):
        self.path, self.limit = path.resolve(), limit
        self.seen: dict[str, np.ndarray] = {}
        self.seconds, self.is_lost = 0.0, False
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [sys.executable, "-P", str(WORKER), str(self.path), self.folder.name, "show" if debug else "hide"]
        self.process = subprocess.Popen(
            command,
            env=os.environ | ONE_THREAD | {"PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self.replies: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()

    def __enter__(self) -> "Learner":
        return self

    def __exit__(self, *error) -> None:
        self.stop()
        self.folder.cleanup()

    def open(self) -> None:
        """Import the file. Raises ``Failed`` if that fails."""
        self.functions = self.exchange({}, "importing it")["functions"]

    def listen(self) -> None:
        """Pass on each reply, and "" at the end. Runs in a thread, because reading blocks."""
        for line in self.process.stdout:
            self.replies.put(line)
        self.replies.put("")

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the learner's function with arrays, numbers, strings and kept objects.

        Raises:
            NotWritten: If there is no such function.
            Failed: If it raises, takes too long, ends the process, or returns something else than expected.
        """
        if name not in self.functions:
            raise NotWritten(name)
        arrays, sent = {}, []
        for number, value in enumerate(arguments):
            if isinstance(value, Kept):
                sent.append(("object", value.number))
            elif hasattr(value, "shape"):
                arrays[f"argument{number}"] = np.asarray(value)
                sent.append(("array", f"argument{number}"))
            else:
                sent.append(("value", value))
        np.savez(Path(self.folder.name, "request.npz"), **arrays)
        kinds = RETURNS.get(name, ["array"])
        reply = self.exchange({"name": name, "arguments": sent, "returns": kinds}, f"`{name}`")
        if "missing" in reply:
            raise NotWritten(name)
        with np.load(Path(self.folder.name, "reply.npz"), allow_pickle=False) as results:
            values = [
                Kept(value) if kind == "object" else results[value] if kind == "array" else value
                for kind, value in zip(kinds, reply["value"], strict=True)
            ]
            self.seen = {key: results[where] for key, where in reply["seen"].items()}
        self.seconds = reply["seconds"]
        return values[0] if len(values) == 1 else tuple(values)

    def exchange(self, request: dict, what: str) -> dict:
        """Send a request, and wait for its reply at most as long as a call can take."""
        if self.is_lost:
            raise Failed("its process has ended.")
        began = time.monotonic()
        with contextlib.suppress(OSError):  # it has ended, which the missing reply tells
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        try:
            line = self.replies.get(timeout=max(0.0, self.limit - (time.monotonic() - began)))
        except queue.Empty:
            self.stop()
            advice = "is there a loop that never ends? --time-limit allows more"
            raise Failed(f"{what} took longer than {self.limit:g} seconds: {advice}.") from None
        except BaseException:  # Ctrl-C: the reply would belong to no request
            self.stop()
            raise
        if not line:
            self.is_lost = True
            raise Failed(f"{what} ended the Python process ({self.how_it_ended()}).")
        reply = json.loads(line)
        if "problem" in reply:
            raise Failed(reply["problem"])
        return reply

    def how_it_ended(self) -> str:
        code = self.process.wait(timeout=10)
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"

    def stop(self) -> None:
        """End the process and, on POSIX, what it started."""
        self.is_lost = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL) if os.name == "posix" else self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
