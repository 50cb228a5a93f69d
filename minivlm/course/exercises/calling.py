"""Calling a function that can do anything: on copies, within a time limit, and with an eye on what it calls.

Every call gets fresh copies of its arguments. It ends when its time is over, even inside a loop that catches
everything, and the call records what it returned or raised, which arguments it changed and whether the exercise's own
reference ran.
"""

import copy
import ctypes
import inspect
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

SECONDS = 5.0  # that a call can take, or TIMES as long as the reference
TIMES = 20


@dataclass(frozen=True)
class Case:
    """Arguments of one call.

    Attributes:
        name: What is special about them, in a few words: "a batch of one", "bfloat16", "no mask".
        keywords: Arguments passed by keyword. An argument that is left out tests its default.
    """

    arguments: tuple
    name: str = ""
    keywords: dict = field(default_factory=dict)

    @classmethod
    def of(cls, case: "Case | tuple") -> "Case":
        """A plain tuple is a case without a name."""
        return case if isinstance(case, cls) else cls(tuple(case))

    def __str__(self) -> str:
        return f"in the case “{self.name}”" if self.name else ""


@dataclass(frozen=True)
class Outcome:
    """What one call did.

    Attributes:
        value: What it returned.
        error: What it raised. ``OutOfTime`` if it did not finish.
        inputs: Its arguments as they are after the call, by the names of the parameters.
        changed: Those parts of ``inputs`` that the call changed, by name: "buffer", "batch['labels']".
        ran_reference: Whether the watched function ran during the call.
    """

    value: Any = None
    error: BaseException | None = None
    inputs: dict = field(default_factory=dict)
    changed: dict = field(default_factory=dict)
    ran_reference: bool = False
    seconds: float = 0.0


def call(
    function: Callable,
    case: Case | tuple,
    *,
    names: tuple[str, ...] = (),
    seconds: float = SECONDS,
    reference: Callable | None = None,
    gradients: bool = False,
) -> Outcome:
    """Call with a copy of the arguments, so that the function cannot change what the next call gets.

    Args:
        names: Names of the parameters, for ``Outcome.inputs``.
        seconds: When to stop it.
        reference: The function to watch for.
        gradients: Whether floating-point tensors among the arguments require a gradient.
    """
    case = Case.of(case)
    arguments, keywords = copy.deepcopy((case.arguments, case.keywords))
    before, inputs = name_inputs(case.arguments, case.keywords, names), name_inputs(arguments, keywords, names)
    if gradients:
        for tensor in leaves(inputs).values():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.requires_grad_()
    value, error, ran, start = None, None, [], time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # much faster than torch.manual_seed, which seeds GPUs too
            with watched(reference, ran):
                value = run_within(seconds, lambda: function(*arguments, **keywords))
    except (Exception, SystemExit, GeneratorExit, OutOfTime) as caught:  # a learner's function can do anything
        error = caught
    changed = {} if gradients else changes(before, inputs)
    return Outcome(value, error, inputs, changed, bool(ran), time.perf_counter() - start)


# --- a limit on the time --------------------------------------------------------------------------------------------


class OutOfTime(BaseException):
    """Raised inside a call whose time is over.

    A loop can catch even this. So the first one arranges that the next line of every running frame raises once more:
    the line after the ``except``, which no longer is inside its ``try``.
    """

    def __init__(self):
        frame, end = sys._getframe(), inspect.unwrap(run_within).__code__
        while frame is not None and frame.f_code is not end:
            if frame.f_globals.get("__name__", "").partition(".")[0] not in ("minivlm", "jaxtyping"):
                frame.f_trace = raise_again
            frame = frame.f_back
        if frame is not None:
            sys.settrace(raise_again)


def raise_again(frame, event, arg):
    """Trace function: ignores new frames, raises at the next line of those that were running."""
    if event == "line":
        raise OutOfTime
    return None


def run_within(seconds: float, function: Callable) -> Any:
    """Call a function without arguments.

    In the main thread, on POSIX, a timer's signal ends it, even while it sleeps. Elsewhere, a second thread sends it
    the exception at its next Python instruction.

    Raises:
        OutOfTime: If the function runs longer than ``seconds``. The exception repeats until the function has ended.
    """
    is_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    alarm = (SignalAlarm if is_main else ThreadAlarm)(seconds)
    tracer = sys.gettrace()
    try:
        alarm.start()
        return function()
    finally:
        stopped = False
        while not stopped:  # the alarm can still go off here
            try:
                sys.settrace(tracer)
                alarm.stop()
                sys.settrace(tracer)
                stopped = True
            except OutOfTime:
                pass


class SignalAlarm:
    def __init__(self, seconds: float):
        self.seconds, self.is_on = seconds, False

    def start(self) -> None:
        self.handler = signal.signal(signal.SIGALRM, self.ring)
        self.is_on, self.began = True, time.monotonic()
        self.timer = signal.setitimer(signal.ITIMER_REAL, self.seconds, 0.05)

    def ring(self, number, frame) -> None:
        if self.is_on:
            raise OutOfTime

    def stop(self) -> None:
        self.is_on = False
        left, interval = self.timer
        if left:  # somebody else's timer
            left = max(left - (time.monotonic() - self.began), 0.001)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.handler if self.handler is not None else signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, left, interval)


class ThreadAlarm:
    def __init__(self, seconds: float):
        self.seconds, self.thread_id, self.over = seconds, threading.get_ident(), threading.Event()

    def start(self) -> None:
        self.watchdog = threading.Thread(target=self.watch, daemon=True)
        self.watchdog.start()

    def watch(self) -> None:
        send, wait = ctypes.pythonapi.PyThreadState_SetAsyncExc, self.seconds
        while not self.over.wait(wait):
            send(ctypes.c_ulong(self.thread_id), ctypes.py_object(OutOfTime))
            wait = 0.05

    def stop(self) -> None:
        # An exception on its way arrives here, at the latest. To clear it instead would hang Python 3.11 in a trace.
        self.over.set()
        self.watchdog.join()


# --- whose code runs ------------------------------------------------------------------------------------------------


@contextmanager
def watched(function: Callable | None, ran: list) -> Iterator[None]:
    """Append to ``ran`` when a function's code runs, by whatever name or wrapper it was called."""
    code = getattr(inspect.unwrap(function), "__code__", None) if function else None
    if code is None:
        yield
        return

    def profile(frame, event, arg):
        if frame.f_code is code and event == "call":
            ran.append(True)

    before, before_in_threads = sys.getprofile(), threading.getprofile()
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)
        threading.setprofile(before_in_threads)


# --- arguments and their parts --------------------------------------------------------------------------------------


def name_inputs(arguments: tuple, keywords: dict, names: tuple[str, ...]) -> dict:
    """Arguments by the names of the parameters."""
    names = (*names, *(f"argument {i}" for i in range(len(names) + 1, len(arguments) + 1)))
    return dict(zip(names, arguments, strict=False)) | keywords


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """What is inside lists, tuples and dictionaries, by its name: "x", "weights.q", "rows[0]"."""
    if isinstance(value, dict):
        parts = {(f"{name}[{key!r}]" if name else str(key)): part for key, part in value.items()}
    elif hasattr(value, "_fields") and isinstance(value, tuple):
        parts = {f"{name}.{key}": part for key, part in value._asdict().items()}
    elif isinstance(value, list | tuple):
        parts = {f"{name}[{i}]": part for i, part in enumerate(value)}
    else:
        return {name: value}
    return {inner: leaf for outer, part in parts.items() for inner, leaf in leaves(part, outer).items()}


def changes(before: dict, after: dict) -> dict[str, Any]:
    """The inputs that a call changed, by name. Objects other than arrays, containers and plain values are ignored."""
    changed = {}
    for name, old in before.items():
        olds, news = leaves(old, name), leaves(after[name], name)
        if olds.keys() != news.keys():
            changed[name] = after[name]
        else:
            changed |= {part: news[part] for part in olds if not is_unchanged(olds[part], news[part])}
    return changed


def is_unchanged(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return old.shape == new.shape and old.dtype == new.dtype and bool(((old == new) | (old != old)).all())
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        return old.shape == new.shape and bool(((old == new) | (old != old)).all())
    return old == new or old != old if isinstance(old, int | float | str | None) else True


def shares_memory(a: Any, b: Any) -> bool:
    """Whether two tensors or two arrays are views of the same memory."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.may_share_memory(a, b)
