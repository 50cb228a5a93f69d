"""The process that runs a notebook, and its functions, which the grader calls as if they were its own.

``Remote`` starts a ``worker``, sends it one request at a time and waits for the reply as long as the notebook has time.
``Remote.find`` returns a stand-in for the learner's function. Called with arguments, the stand-in sends them to the
worker and returns, raises or changes what the worker says the learner's function did. So the grader checks it like any
function, in its own process, where no notebook can interfere: with random cases that it does not tell in advance, and
right answers that never leave it. A reply that makes no sense costs the notebook its marks.
"""

import builtins
import inspect
import json
import os
import queue
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from minivlm.course.grading.encoding import MAX_BYTES, copy_into, decode, encode, tensors_in

START_LIMIT = 300.0  # seconds for a process to start, not included in the notebook's time
ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
MARK = "MINIVLM_WORKER"  # an environment variable by which the processes of a notebook are found
PATIENCE = 10.0  # seconds for a server to notice that its worker has ended
OWN_SHARE = 0.8  # of the time for a cell, after which the process stops the cell itself and keeps what it has defined
POLL = 0.1  # seconds between looks at whether the process is alive
KILL_ROUNDS = 50
MISSING = object()  # what ``Remote.find`` returns if the notebook does not define the function


class Lost(BaseException):
    """The process is of no further use, or the notebook cannot get marks for this step. Says why."""


class Clock:
    """The time that a notebook has left, all its processes together, and the time for the current step."""

    def __init__(self, total: int | float, step: int | float):
        self.total, self.step = total, step
        self.left, self.step_left = total, step

    def start_step(self) -> None:
        self.step_left = self.step

    @property
    def allowed(self) -> int | float:
        return max(0.0, min(self.left, self.step_left))

    @property
    def is_over(self) -> bool:
        """Whether the whole notebook's time is over."""
        return self.left <= 0

    def spend(self, seconds: int | float) -> None:
        self.left -= seconds
        self.step_left -= seconds


class Remote:
    """A worker process in its own folder and session. With -P it imports nothing from that folder.

    Raises:
        Lost: From every method, if the process has ended or was stopped.
    """

    def __init__(self, clock: Clock, stopping: threading.Event):
        self.clock, self.stopping = clock, stopping
        self.lost = False
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = (Forked if sys.platform == "linux" else Started)(self.folder.name)

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *error) -> None:
        self.process.stop()
        self.talker.join(timeout=1)
        if not self.talker.is_alive():  # otherwise, closing would wait for it
            self.process.stdout.close()
            with suppress(OSError):  # a request that was not sent
                self.process.stdin.close()
        self.folder.cleanup()

    def start(self) -> None:
        """Wait until the process is ready."""
        try:
            self.exchange({"find": ""}, Clock(START_LIMIT, START_LIMIT))
        except Lost:
            raise Lost("No process started: what does `python -m minivlm doctor` say?") from None

    def run(self, number: int, source: str, is_unchanged: bool) -> str | None:
        """Run a cell. Returns the error that it raised, in one line."""
        request = {"run": source, "cell": f"cell {number}", "is_unchanged": is_unchanged}
        error = self.ask(request | {"seconds": OWN_SHARE * self.clock.allowed}, "error")
        return None if error is None else one_line(to_error(error))

    def find(self, name: str) -> Any:
        """A stand-in for what the notebook defines under this name, or ``MISSING``."""
        reply = self.exchange({"find": name}, self.clock)
        if "missing" in reply:
            return MISSING
        if "value" in reply:
            return decoded(reply["value"])
        return stand_in(self, name, reply)

    def ask(self, request: dict, key: str) -> Any:
        reply = self.exchange(request, self.clock)
        if key not in reply:
            raise Malformed
        return reply[key]

    def exchange(self, request: dict, clock: Clock) -> dict:
        """Send a request and wait for the reply."""
        if self.lost:
            raise Lost("it ended the Python process.")
        line = json.dumps(request).encode() + b"\n"
        replies: queue.SimpleQueue = queue.SimpleQueue()
        began = time.monotonic()
        self.talker = threading.Thread(target=talk, args=(self.process, line, replies), daemon=True)
        self.talker.start()
        try:
            reply = self.wait(replies, began, clock)
        except BaseException:  # also one that another thread sends because a call takes too long
            self.lost = True
            raise
        finally:
            clock.spend(time.monotonic() - began)
        try:
            message = json.loads(reply)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self.lost = True
            raise Malformed
        return message

    def wait(self, replies: queue.SimpleQueue, began: int | float, clock: Clock) -> bytes:
        while True:
            left = clock.allowed - (time.monotonic() - began)
            with suppress(queue.Empty):
                if reply := replies.get(timeout=max(0.0, min(POLL, left))):
                    return reply
                raise Lost("it ended the Python process.")
            if self.stopping.is_set():
                raise Lost("the grading was stopped.")
            if self.process.poll() is not None:
                raise Lost("it ended the Python process.")
            if left <= 0 and clock.left <= clock.step_left:
                raise Lost(f"The notebook took longer than {clock.total:g} seconds.")
            if left <= 0:
                raise Lost(f"it took longer than {clock.step:g} seconds.")


class Malformed(Lost):
    """The process sent something that is no reply."""

    def __str__(self) -> str:
        return "it sent the grader something that is not an answer."


def talk(process: "Started | Forked", line: bytes, replies: queue.SimpleQueue) -> None:
    """Send a line and pass on the next line, or b"" if there is none. Runs in a thread, because both can block."""
    try:
        process.stdin.write(line)
        process.stdin.flush()
        replies.put(process.stdout.readline(MAX_BYTES + 2))
    except (OSError, ValueError):
        replies.put(b"")


# --- functions ------------------------------------------------------------------------------------------------------


def stand_in(remote: Remote, name: str, reply: dict) -> Callable:
    """A function that does what the learner's function of this name does in the other process."""

    def function(*arguments, **keywords):
        answer = remote.exchange({"call": name, "inputs": encode((arguments, keywords))}, remote.clock)
        if answer.get("refused"):
            raise UsesPackage
        if answer.get("error") is not None:
            error, line = to_error(answer["error"]), answer["error"].get("line")
            frame = sys._getframe()
            if type(line) is int and 0 < line < 1 << 20:  # so that a check can tell the line
                number = frame.f_code.co_firstlineno + line - 1
                error = error.with_traceback(types.TracebackType(None, frame, frame.f_lasti, number))
            raise error
        bases = tensors_in((arguments, keywords))
        try:
            if "inputs" in answer:
                copy_into((arguments, keywords), decode(answer["inputs"]))
            value = decode(answer.get("value"), bases)
        except ValueError:
            raise Malformed from None
        return connect(remote, [x for x in bases if x.requires_grad], value)

    function.__name__ = function.__qualname__ = name
    with suppress(KeyError):
        if reply["function"] is not None:
            function.__signature__ = to_signature(reply["function"])
        return function
    raise Malformed


class UsesPackage(Lost):
    """The learner's function called the one that it should replace."""

    def __str__(self) -> str:
        return "it calls the package's own function. Write it yourself."


def decoded(data: Any) -> Any:
    try:
        return decode(data)
    except ValueError:
        raise Malformed from None


def to_signature(parameters: Any) -> inspect.Signature:
    empty = inspect.Parameter.empty
    try:
        return inspect.Signature(
            inspect.Parameter(name, kind, default=decode(default[0]) if default else empty)
            for name, kind, default in parameters
        )
    except (ValueError, TypeError, KeyError, IndexError):
        raise Malformed from None


def to_error(error: Any) -> Exception:
    """The exception that a worker describes: Python's own class, or a new one of the same name."""
    if not isinstance(error, dict) or not isinstance(error.get("kind"), str) or not isinstance(error.get("text"), str):
        raise Malformed
    kind, text = getattr(builtins, error["kind"], None), error["text"][:1000]
    if isinstance(kind, type) and issubclass(kind, Exception):
        with suppress(Exception):
            made = kind(text)
            if isinstance(made, NameError) and isinstance(error.get("name"), str):
                made.name = error["name"]
            if type(made) is kind and str(made) == text:
                return made
    return type(error["kind"] if error["kind"].isidentifier() else "Exception", (Exception,), {})(text)


def one_line(error: Exception) -> str:
    """The class and the first line of the message, cut to 200 characters."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"


def connect(remote: Remote, inputs: list[torch.Tensor], value: Any) -> Any:
    """Let gradients flow from the tensors in ``value`` that have one, through the other process, to the inputs."""
    outputs = [tensor for tensor in tensors_in(value) if tensor.requires_grad]
    if not inputs or not outputs:
        return value

    def backward(gradients: tuple) -> list:
        answer = remote.exchange({"backward": [encode(gradient) for gradient in gradients]}, remote.clock)
        if "error" in answer:
            raise RuntimeError(str(to_error(answer["error"])))
        found = decoded({"list": answer.get("gradients")})
        if len(found) != len(inputs):
            raise Malformed
        return found

    connected = dict(zip(map(id, outputs), Bridge.apply(backward, len(inputs), *inputs, *outputs), strict=True))
    return substitute(value, connected)


class Bridge(torch.autograd.Function):
    """The identity on outputs, whose gradients another process turns into the gradients of the inputs."""

    @staticmethod
    def forward(ctx, backward: Callable, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.remote_backward = backward
        return tuple(tensor.detach().clone() for tensor in tensors[count:])

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple:
        return None, None, *ctx.remote_backward(gradients), *(None for _ in gradients)


def substitute(value: Any, new: dict[int, torch.Tensor]) -> Any:
    """The value with other tensors in it."""
    if isinstance(value, dict):
        return {key: substitute(part, new) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(substitute(part, new) for part in value)
    return new.get(id(value), value)


# --- processes ------------------------------------------------------------------------------------------------------


def launch(code: str, folder: str, mark: str = "", **options) -> subprocess.Popen:
    """A new Python that imports the package, and nothing from its folder."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"from minivlm.course.grading import worker; {code}"],
        cwd=folder,
        env=os.environ | ENVIRONMENT | {"MINIVLM_HOME": folder, "PYTHONPATH": path, MARK: mark},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **options,
    )


class Started:
    """A worker that starts from nothing, where processes cannot be forked safely."""

    def __init__(self, folder: str):
        self.process = launch("worker.main()", folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.stdin, self.stdout, self.poll = self.process.stdin, self.process.stdout, self.process.poll

    def stop(self) -> None:
        """Kill it, and on POSIX also what it started and is still in its group."""
        with suppress(ProcessLookupError, PermissionError):  # the group is already gone
            os.killpg(self.process.pid, signal.SIGKILL) if os.name == "posix" else self.process.kill()
        self.process.wait()


class Server:
    """A process that has imported what notebooks need, and forks a worker for one notebook at a time."""

    def __init__(self):
        self.mark = secrets.token_hex(8)
        self.channel, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            null = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
            self.process = launch(
                f"worker.serve({number})", tempfile.gettempdir(), self.mark, pass_fds=[number], **null
            )

    def has_news(self, timeout: float = 0) -> bool:
        """Whether the worker or the server itself has ended."""
        return bool(select.select([self.channel], [], [], timeout)[0])

    def is_ready(self) -> bool:
        """Wait until it has noticed that its worker has ended. False if it has ended itself, or hangs."""
        with suppress(ConnectionError):
            return self.has_news(PATIENCE) and bool(self.channel.recv(1))
        return False

    def close(self) -> None:
        self.channel.close()  # it ends
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=PATIENCE)
        self.process.kill()
        self.process.wait()


IDLE: list[Server] = []


@contextmanager
def servers() -> Iterator[None]:
    """End all idle servers afterwards."""
    try:
        yield
    finally:
        while IDLE:
            IDLE.pop().close()


class Forked:
    """A worker that a server forks, so that it has everything imported when it starts."""

    def __init__(self, folder: str):
        self.server = take_server()
        requests, stdin = os.pipe()
        stdout, replies = os.pipe()
        self.stdin, self.stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")
        with suppress(OSError):  # the server has ended, which ``poll`` tells
            socket.send_fds(self.server.channel, [os.fsencode(folder)], [requests, replies])
        os.close(requests)
        os.close(replies)

    def poll(self) -> int | None:
        """None as long as it runs."""
        return 0 if self.server.has_news() else None

    def stop(self) -> None:
        """Kill the worker and everything it started, and keep the server if it is ready for another."""
        kill_family(self.server.process.pid, self.server.mark)
        if self.server.is_ready():
            IDLE.append(self.server)
        else:
            self.server.close()


def take_server() -> Server:
    """One that is idle, or a new one."""
    while IDLE:
        with suppress(IndexError):  # another thread was faster
            server = IDLE.pop()
            if not server.has_news():
                return server
            server.close()
    return Server()


def kill_family(root: int, mark: str) -> None:
    """Kill what ``find_family`` finds, until it finds nothing."""
    for _ in range(KILL_ROUNDS):
        family = find_family(root, mark)
        for kill in (os.killpg, os.kill):
            for pid in family:
                with suppress(ProcessLookupError, PermissionError):  # it is gone, or leads no group
                    kill(pid, signal.SIGKILL)
        if not family:
            break


def find_family(root: int, mark: str) -> list[int]:
    """Living processes, apart from ``root``, that descend from it, share a session, or have its mark as environment."""
    processes = dict(filter(None, map(read_process, Path("/proc").glob("[0-9]*"))))
    marked = f"{MARK}={mark}\0".encode()
    family, size = {root} | {pid for pid in processes if marked in environment_of(pid)}, 0
    while len(family) > size:
        size = len(family)
        family |= {pid for pid, (parent, session) in processes.items() if parent in family or session in family}
    return [pid for pid in family if pid in processes and pid not in (root, os.getpid())]


def read_process(folder: Path) -> tuple[int, tuple[int, int]] | None:
    """The id, parent and session of a process that is not a zombie."""
    try:
        state, parent, _, session = (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[:4]
    except (OSError, ValueError):  # it has ended
        return None
    return None if state in "ZX" else (int(folder.name), (int(parent), int(session)))


def environment_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
    except OSError:  # it has ended, or is somebody else's
        return b""
