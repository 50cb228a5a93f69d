"""Sentences about the first difference between two values: type, shape, dtype, NaN, values, in this order."""

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

TOLERANCE = 1e-5  # relative to the largest expected value


def describe(value: Any) -> str:
    """What a value is, in a few words: "None", "a tensor of shape [2, 3]"."""
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, torch.Tensor) else "numpy array"
        return f"a {kind} of shape {list(value.shape)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def compare(got: Any, want: Any, outputs: tuple[str, ...] = (), tolerance: float = TOLERANCE) -> str | None:
    """A sentence on the first difference, or None if there is none.

    Args:
        outputs: Names of the items of a tuple.
    """
    if got is None and want is not None:
        return "it returns None: is there a `return`?"
    if isinstance(want, torch.Tensor | np.ndarray):
        return compare_arrays(got, want, tolerance)
    if isinstance(want, dict):
        return compare_dicts(got, want, tolerance)
    if isinstance(want, list | tuple):
        return compare_sequences(got, want, outputs, tolerance)
    if isinstance(want, Real) and not isinstance(want, bool):
        return compare_numbers(got, want, tolerance)
    if type(got) is not type(want):
        return f"it returns {describe(got)}, expected {describe(want)}."
    return None if got == want else f"it returns {got!r}, expected {want!r}."


def compare_arrays(got: Any, want: torch.Tensor | np.ndarray, tolerance: float) -> str | None:
    if not isinstance(got, torch.Tensor if isinstance(want, torch.Tensor) else np.ndarray):
        return f"it returns {describe(got)}, expected {describe(want)}."
    if tuple(got.shape) != tuple(want.shape):
        return f"it returns shape {list(got.shape)}, expected {list(want.shape)}."
    if got.dtype != want.dtype:
        return f"it returns dtype {got.dtype}, expected {want.dtype}."
    a, b = to_numpy(got), to_numpy(want)
    different = differs(a, b, tolerance)
    if not different.any():
        return None
    unexpected = int((np.isnan(a) & ~np.isnan(b)).sum()) if a.dtype.kind == "f" else 0
    if unexpected and a.size > 1:
        return f"{unexpected} of {a.size} values {'is' if unexpected == 1 else 'are'} NaN."
    count, index = int(different.sum()), tuple(int(i) for i in np.argwhere(different)[0])
    yours, expected = format_number(a[index]), format_number(b[index])
    if a.size == 1:
        return f"it returns {yours}, expected {expected}."
    many = f"{count} of {a.size} values {'differs' if count == 1 else 'differ'}"
    return f"{many}; the first is at {list(index)}: yours is {yours}, expected {expected}."


def format_number(value: np.generic) -> str:
    """Six digits, and NaN in capitals."""
    text = str(value) if value.dtype.kind not in "fiu" else f"{value:.6g}"
    return text.replace("nan", "NaN")


def to_numpy(array: torch.Tensor | np.ndarray) -> np.ndarray:
    """A numpy array, in float64 if it is floating-point."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.double() if array.is_floating_point() else array).numpy()
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def differs(a: np.ndarray, b: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """Where two arrays of one shape differ: at all, or for floating-point numbers by more than the tolerance."""
    if a.dtype.kind != "f" and b.dtype.kind != "f":
        return np.asarray(a != b)
    finite = np.isfinite(b)
    largest = np.abs(b[finite]).max(initial=1e-30)
    with np.errstate(invalid="ignore"):
        close = np.abs(a - b) <= tolerance * largest
    return np.asarray(~(close | (a == b) | (np.isnan(a) & np.isnan(b))))


def compare_sequences(got: Any, want: list | tuple, outputs: tuple[str, ...], tolerance: float) -> str | None:
    if not isinstance(got, list | tuple):
        return f"it returns {describe(got)}, expected a {type(want).__name__} of length {len(want)}."
    if len(got) != len(want):
        items = f": {', '.join(outputs)}" if len(outputs) == len(want) else ""
        return f"it returns a {type(got).__name__} of length {len(got)}, expected length {len(want)}{items}."
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if problem := compare(a, b, (), tolerance):
            name = f"`{outputs[i]}`" if i < len(outputs) else f"item {i + 1}"
            return f"in {name}, {problem}"
    return None


def compare_dicts(got: Any, want: dict, tolerance: float) -> str | None:
    if not isinstance(got, dict):
        return f"it returns {describe(got)}, expected a dict with the keys {', '.join(map(str, want))}."
    if got.keys() != want.keys():
        return f"it returns the keys {', '.join(map(str, got)) or '(none)'}, expected {', '.join(map(str, want))}."
    problems = ((key, compare(got[key], want[key], (), tolerance)) for key in want)
    return next((f"in `{key}`, {problem}" for key, problem in problems if problem), None)


def compare_numbers(got: Any, want: Real, tolerance: float) -> str | None:
    kind = "an integer" if isinstance(want, int) else "a number"
    if isinstance(got, torch.Tensor | np.ndarray) and got.shape == () and got.dtype not in (torch.bool, np.bool_):
        return f"it returns {describe(got)}, expected {kind} of Python: `.item()` makes one of it."
    if isinstance(got, bool | np.bool_) or not isinstance(got, Real):
        return f"it returns {describe(got)}, expected {kind}."
    if got != got and want == want:
        return f"it returns NaN, expected {want:.6g}."
    if isinstance(want, int):
        if isinstance(got, Integral):
            return None if got == want else f"it returns {got}, expected {want}."
        return f"it returns {got!r}, a {type(got).__name__}, expected the integer {want}."
    if differs(np.array(float(got)), np.array(float(want)), tolerance).any():
        return f"it returns {got:.6g}, expected {want:.6g}."
    return None
