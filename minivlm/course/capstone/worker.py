"""The process that runs a learner's own file. It is started as a script, and imports nothing of the package.

Requests and replies are lines of JSON on a pipe. Arrays travel in .npz files without pickles, in a folder that both
processes know. Objects such as the model and the cache stay here: the other side has a number for each.
"""

import contextlib
import importlib.util
import inspect
import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np

FORBIDDEN = ("minivlm", "transformers")  # a file that imports one of these is not written from nothing
OBJECT, ARRAY, TOKENS, PLAIN = "object", "array", "tokens", "plain"


class Problem(Exception):
    """A sentence about what a function returned."""


class Learner:
    """The learner's module, and what its functions have returned."""

    def __init__(self, path: Path, folder: Path, show: bool):
        self.path, self.folder, self.show, self.kept = path, folder, show, []

    def open(self) -> dict:
        """Import the file. Returns the parameters of its functions."""
        for name in FORBIDDEN:
            sys.modules[name] = None
        spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        self.module = importlib.util.module_from_spec(spec)
        sys.modules[self.path.stem] = self.module
        sys.path.insert(0, str(self.path.parent))  # for helpers beside it
        spec.loader.exec_module(self.module)
        functions = {}
        for name, value in vars(self.module).items():
            if callable(value) and not isinstance(value, type):
                with contextlib.suppress(TypeError, ValueError):
                    functions[name] = list(inspect.signature(value).parameters)
        return {"functions": functions}

    def call(self, name: str, arguments: list, returns: list[str]) -> dict:
        """Call one of its functions. What it returns is kept, or written for the other side to read."""
        with np.load(self.folder / "request.npz", allow_pickle=False) as arrays:
            values = [self.kept[v] if kind == OBJECT else arrays[v] if kind == ARRAY else v for kind, v in arguments]
        seen = getattr(self.module, "seen", None)
        if isinstance(seen, dict):
            seen.clear()
        start = time.perf_counter()
        result = getattr(self.module, name)(*values)
        result = as_arrays(name, result, returns)  # a framework may compute only now
        seconds = time.perf_counter() - start
        reply, arrays = [], {}
        for number, (kind, value) in enumerate(zip(returns, result, strict=True)):
            if kind == OBJECT:
                self.kept.append(value)
                value = len(self.kept) - 1
            elif kind == ARRAY:
                arrays[f"result{number}"] = value
                value = f"result{number}"
            reply.append(value)
        inner = {}
        for number, (key, value) in enumerate(seen.items() if isinstance(seen, dict) else ()):
            with contextlib.suppress(Problem):
                arrays[f"seen{number}"], inner[str(key)] = to_array(value, str(key)), f"seen{number}"
        np.savez(self.folder / "reply.npz", **arrays)
        return {"value": reply, "seen": inner, "seconds": seconds}

    def answer(self, request: dict) -> dict:
        try:
            return self.call(**request) if request else self.open()
        except NotImplementedError:
            return {"missing": True}
        except Problem as problem:
            return {"problem": str(problem)}
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the learner's code can raise anything, SystemExit too
            if self.show:
                traceback.print_exc()
            return {"problem": describe(error, self.path)}


def as_arrays(name: str, result: object, returns: list[str]) -> list:
    """What a function returned, item by item, as what the other side expects."""
    if result is None:
        raise Problem(f"`{name}` returns None: is there a `return`?")
    if len(returns) > 1 and not (isinstance(result, tuple | list) and len(result) == len(returns)):
        raise Problem(f"`{name}` should return {len(returns)} things, but returns {say(result)}.")
    items = list(result) if len(returns) > 1 else [result]
    convert = {OBJECT: lambda x, _: x, ARRAY: to_array, TOKENS: to_tokens, PLAIN: to_plain}
    return [convert[kind](item, name) for kind, item in zip(returns, items, strict=True)]


def to_array(value: object, name: str) -> np.ndarray:
    """A numpy array of booleans, int64 or float32, from any framework."""
    try:
        if hasattr(value, "detach"):  # torch
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":  # such as the bfloat16 of jax, which numpy does not know
            array = array.astype(np.float32)
    except Exception:
        raise Problem(f"`{name}` returns {say(value)}, which is not an array.") from None
    return array.astype({"b": bool, "f": np.float32}.get(array.dtype.kind, np.int64))


def to_tokens(value: object, name: str) -> list[list[int]]:
    """A list of integers per row, from lists or an array of them."""
    try:
        rows = value.tolist() if hasattr(value, "tolist") else list(value)
        rows = [row.tolist() if hasattr(row, "tolist") else list(row) for row in rows]
        numbers = [[int(token) for token in row] for row in rows]
        if all(float(a) == b for old, new in zip(rows, numbers, strict=True) for a, b in zip(old, new, strict=True)):
            return numbers
    except Exception:  # anything that is not made of integers
        pass
    raise Problem(f"`{name}` should return a list of token ids for each row, but returns {say(value)}.")


def to_plain(value: object, name: str) -> object:
    try:
        return json.loads(json.dumps(value, default=lambda x: x.item() if hasattr(x, "item") else vars(x)))
    except Exception:
        raise Problem(f"`{name}` should return a dict of numbers, but returns {say(value)}.") from None


def say(value: object) -> str:
    shape = getattr(value, "shape", None)
    size = f" of length {len(value)}" if isinstance(value, list | tuple | dict) else ""
    return f"a {type(value).__name__}{f' of shape {list(shape)}' if shape is not None else size}"


def describe(error: BaseException, path: Path) -> str:
    """The error in one sentence, with the last line of the learner's file that it passed through."""
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] in FORBIDDEN:
        return f"{path.name} imports {error.name}, but has to stand on its own: write that part yourself."
    try:
        text = (str(error).strip().splitlines() or ["no message"])[0][:300]
    except Exception:  # the learner's own exception class can fail even here
        text = "no message"
    where = ""
    if isinstance(error, SyntaxError):
        where = f" on line {error.lineno}"
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            where = f" on line {frame.lineno}" + (f", `{frame.line}`" if frame.line else "")
    return f"{path.name} raises {type(error).__name__}{where}: {text}"


def main() -> None:
    path, folder, show = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "show"
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the learner prints goes to stderr
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    learner, me = Learner(path, folder, show), os.getpid()
    for line in requests:
        reply = json.dumps(learner.answer(json.loads(line)))
        if os.getpid() != me:  # a process that the learner's code forked
            os._exit(0)
        replies.write(reply + "\n")
        replies.flush()
    os._exit(0)  # does not wait for threads that the learner's code started


if __name__ == "__main__":
    main()
