"""Run one submitted notebook, in the process that the grader starts and can kill.

The process does what it is told and decides nothing: it runs cells and calls functions, and sends back what they
returned. It knows neither the cases before a function is called nor the right answers, so whatever a notebook replaces
or forges in here can only change its own answers. (``remote`` is the other end of the pipe.)

No Jupyter kernel is needed. In cells that are unchanged since the release, only imports, definitions and constants run;
cells that the learner wrote or changed run completely.
"""

import ast
import asyncio
import builtins
import copy
import ctypes
import gc
import hashlib
import importlib
import inspect
import json
import linecache
import math
import os
import re
import socket
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import numpy as np
import torch

import minivlm
from minivlm.course.exercises import EXERCISES, Exercise
from minivlm.course.exercises.calling import OutOfTime, run_within
from minivlm.course.grading.encoding import MAX_BYTES, decode, encode, tensors_in

MEMORY = 4 << 30  # bytes a notebook can allocate beyond the imports, on Linux
ESSENTIAL = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
CHECKED = re.compile(r"\bexercises\.check\(\s*(\w+)")
RUN_BODY = ("time", "timeit", "capture", "prun")  # cell magics whose body runs
PRELOADED = (  # what chapters import
    "matplotlib.figure",
    "minivlm.course.processes",
    "minivlm.course.viz",
    "minivlm.emoji",
    "transformers.masking_utils",
    "transformers.models.siglip.image_processing_pil_siglip",
    "transformers.models.siglip.modeling_siglip",
)
BECOME_SUBREAPER = 36  # of Linux's prctl


def fingerprint(source: str) -> str:
    """The id of a released cell. A cell whose id still matches its source is unchanged."""
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def main() -> None:
    """Answer one request per line on stdin with one line on stdout, until stdin ends.

    {"run": source, "cell": "cell 3", "is_unchanged": …, "seconds": …} runs a cell,
    {"find": name} tells what the notebook defines under the name of an exercise,
    {"call": name, "inputs": …} calls it, and {"backward": gradients} computes the gradients of the last call.
    """
    requests, replies = open_channel()
    limit_memory()
    notebook, me, dumps, loads = Notebook(), os.getpid(), json.dumps, json.loads
    for line in requests:
        try:
            reply = dumps(notebook.answer(loads(line)))
        except BaseException as error:  # what a function returns can refuse to be encoded
            reply = dumps({"error": describe_error(error)})
        if len(reply) > MAX_BYTES:
            reply = dumps({"error": {"kind": "MemoryError", "text": "it returns too much."}})
        if os.getpid() != me:  # a process that the learner's code forked
            os._exit(0)
        replies.write(reply + "\n")
        replies.flush()
    os._exit(0)  # does not wait for threads that the learner's code started


def serve(channel: int) -> None:
    """Import what notebooks import, then fork a worker for each folder that arrives, one at a time, until none does.

    With the folder come two open files, for the worker's requests and replies. When a worker has ended, one byte goes
    back. The server itself knows nothing about any notebook.

    Args:
        channel: Number of an open socket.
    """
    for name in PRELOADED:
        with suppress(ImportError):  # the notebook that needs it will say so
            importlib.import_module(name)
    freeze()
    connection = socket.socket(fileno=channel)
    while True:
        folder, files, _, _ = socket.recv_fds(connection, 4096, 2)
        if not folder:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                os.chdir(folder)
                os.environ["MINIVLM_HOME"] = os.fsdecode(folder)
                for standard, file in enumerate(files):
                    os.dup2(file, standard)
                    os.close(file)
                connection.close()
                main()
            finally:
                os._exit(1)
        for file in files:
            os.close(file)
        os.waitpid(pid, 0)
        connection.send(b".")


def freeze() -> None:
    """Hide everything that exists now from the garbage collector, which a search among all objects then skips."""
    gc.collect()
    FROZEN.extend(found for found in gc.get_objects() if type(found) is types.FunctionType)
    gc.freeze()


def open_channel() -> tuple[TextIO, TextIO]:
    """Requests and replies. The learner's code gets an empty stdin, and what it prints is discarded."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    devnull = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(devnull, standard)
    return requests, replies


def limit_memory() -> None:
    """Make allocations beyond the limit fail in this process. macOS and Windows have no such limit."""
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
        # Processes that the notebook leaves behind become children of this one, so the grader can find them.
        ctypes.CDLL(None).prctl(BECOME_SUBREAPER, 1, 0, 0, 0)


class Notebook:
    """The namespace of a notebook, and what it has defined under the names of exercises."""

    def __init__(self):
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        self.namespace, self.answers = vars(module), {}
        shell = Shell(self.namespace)
        self.namespace |= {"get_ipython": lambda: shell, "display": lambda *args, **kwargs: None}
        self.loop = asyncio.new_event_loop()
        self.declared, self.restore = dict(EXERCISES), take_snapshot()
        self.graph: tuple[list, list] = ([], [])  # inputs and outputs of the last call

    def answer(self, request: dict) -> dict:
        if "run" in request:
            return {"error": self.run(request)}
        if "find" in request:
            return self.find(request["find"])
        if "call" in request:
            return self.call(self.declared[request["call"]], request["inputs"])
        return self.backward(request["backward"])

    def run(self, request: dict) -> dict | None:
        """Run a cell for a limited time. Returns its error. What it has defined until then counts."""
        error, seconds = None, request["seconds"]
        cell = request["run"], f"<{request['cell']}>", self.namespace, self.loop, request["is_unchanged"]
        try:
            run_within(seconds, lambda: run_cell(*cell))
        except OutOfTime:
            error = describe_error(TimeoutError(f"it took longer than {seconds:.3g} seconds."))
        except BaseException as caught:  # sys.exit and anything else a learner can think of
            error = describe_error(caught)
        # A chapter rebinds the name to the package's function afterwards, which is not the learner's answer.
        found = {name: self.namespace[name] for name in self.declared if name in self.namespace}
        self.answers |= {name: value for name, value in found.items() if not is_from_package(value)}
        return error

    def find(self, name: str) -> dict:
        """Whether there is an answer: its parameters if it is a function, otherwise the value."""
        self.restore()
        if name not in self.answers:
            return {"missing": True}
        function = self.answers[name]
        if not callable(function):
            return {"value": encode(function)}
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # a builtin without a signature
            return {"function": None}
        empty, parameters = inspect.Parameter.empty, []
        for p in signature.parameters.values():
            parameters.append([p.name, int(p.kind), [] if p.default is empty else [encode(p.default)]])
        return {"function": parameters}

    def call(self, declared: Exercise, inputs: dict) -> dict:
        """Call an answer, and tell what it returned or raised and what its arguments are now if they changed."""
        function = self.answers[declared.name]
        arguments, keywords = decode(inputs, trusted=True)
        bases, reply = tensors_in((arguments, keywords)), {}
        self.restore()
        torch.default_generator.manual_seed(0)
        with refusing(declared.reference) as refused:
            try:
                value = function(*arguments, **keywords)
            except BaseException as error:
                return {"error": describe_error(error, function), "refused": bool(refused)}
        reply = {"value": encode(value, bases), "refused": bool(refused)}
        self.graph = ([x for x in bases if x.requires_grad], [y for y in tensors_in(value) if y.requires_grad])
        after = encode((arguments, keywords))
        return reply if after == inputs else reply | {"inputs": after}

    def backward(self, gradients: list) -> dict:
        inputs, outputs = self.graph
        try:
            found = torch.autograd.grad(outputs, inputs, [decode(part) for part in gradients], allow_unused=True)
        except BaseException as error:
            return {"error": describe_error(error)}
        return {"gradients": [encode(gradient) for gradient in found]}


# --- cells ----------------------------------------------------------------------------------------------------------


class Shell:
    """A stand-in for IPython: commands and line magics do nothing, and a timed cell runs."""

    def __init__(self, namespace: dict):
        self.namespace = namespace

    def run_cell_magic(self, name: str, line: str, body: str) -> None:
        if name in RUN_BODY:
            exec(to_python(body), self.namespace)

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None


def run_cell(
    source: str, filename: str, namespace: dict, loop: asyncio.AbstractEventLoop, is_unchanged: bool = False
) -> None:
    """Run a cell as Jupyter does, where ``await`` works outside functions too."""
    source = to_python(source)
    if is_unchanged:
        source = essentials(source)
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # for inspect.getsource
    code = compile(source, filename, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    waiting = eval(code, namespace)
    if code.co_flags & inspect.CO_COROUTINE:
        loop.run_until_complete(waiting)


def to_python(source: str) -> str:
    """A cell without IPython's own syntax, such as ``%time`` and ``!ls``."""
    try:
        ast.parse(source)
        return source
    except (SyntaxError, ValueError):
        from IPython.core.inputtransformer2 import TransformerManager  # most notebooks don't need it

        return TransformerManager().transform_cell(source)


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


# --- the learner's functions ----------------------------------------------------------------------------------------


def is_from_package(value: object) -> bool:
    return str(getattr(value, "__module__", "")).split(".")[0] == "minivlm"


class Refused(Exception):
    """Raised by the package's own function while a learner's version of it runs."""


REFUSED: list[bool] = []
FROZEN: list[types.FunctionType] = []  # the functions that ``gc`` does not find


def refuse(*args, **kwargs):
    """What the package's own function does meanwhile."""
    from minivlm.course.grading import worker  # runs with the globals of the module that it replaces a function of

    worker.REFUSED.append(True)
    raise worker.Refused("this is the package's own function.")


@contextmanager
def refusing(reference: Callable) -> Iterator[list]:
    """Make a function refuse, under whatever name a notebook has it, and every other function with the same code.

    Yields:
        A list that is empty as long as none was called.
    """
    REFUSED.clear()
    code = inspect.unwrap(reference).__code__
    found = [f for f in gc.get_referrers(code) if isinstance(f, types.FunctionType)]
    functions = [f for f in found + FROZEN if f.__code__ is code]
    for function in functions:
        function.__code__ = inspect.unwrap(refuse).__code__
    try:
        yield REFUSED
    finally:
        for function in functions:
            function.__code__ = code


def describe_error(error: BaseException, function: Callable | None = None) -> dict:
    """An error's class and message, and on which line of the function it was raised."""
    try:
        text = str(error)[:1000]
    except BaseException:  # the learner's own exception class can fail even here
        text = ""
    code = getattr(inspect.unwrap(function), "__code__", None) if function else None
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line - code.co_firstlineno + 1 for frame, line in frames if frame.f_code is code] if code else []
    name = error.name if isinstance(error, NameError) and isinstance(error.name, str) else None
    return {"kind": type(error).__name__, "text": text, "line": lines[-1] if lines else None, "name": name}


def take_snapshot() -> Callable[[], None]:
    """Return a function that restores the functions of the package, torch and Python as they are now.

    A notebook that replaces some and does not put them back only loses what depends on them until its cells have run.
    """
    owners = [builtins, copy, inspect, json, math, np, torch, torch.nn.functional, minivlm]
    owners += [module for name, module in sys.modules.items() if name.startswith("minivlm.")]
    saved = [(owner, name, value) for owner in owners for name, value in vars(owner).items() if callable(value)]

    def restore(vars=vars, setattr=setattr) -> None:
        for owner, name, value in saved:
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)

    return restore
