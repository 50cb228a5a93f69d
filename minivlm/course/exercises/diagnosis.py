"""Why an answer is wrong, if it is no mistake that the exercise declares.

A relation compares one wrong answer with the right one and yields sentences that would explain it: "it is too large by
a factor of 2". A sentence is the diagnosis if it explains every wrong case, or else most. The first relations compare
the two values alone. Then the reference is called differently: without an argument, with two arguments exchanged. Last
come sentences that only say where the answer is right.
"""

import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

from minivlm.course.exercises.calling import Case, Outcome, call, leaves
from minivlm.course.exercises.comparing import compare, differs, to_numpy

CLOSE = 1e-4  # an answer that is explained this closely, relative to the largest value
MOST = 2 / 3  # of the wrong cases must agree on an explanation


@dataclass(frozen=True)
class Pair:
    """A wrong value, the right one, and the inputs, all as arrays."""

    got: np.ndarray
    want: np.ndarray
    inputs: dict[str, np.ndarray]

    @property
    def has_same_shape(self) -> bool:
        return self.got.shape == self.want.shape

    @property
    def is_float(self) -> bool:
        return self.got.dtype.kind == "f" and self.want.dtype.kind == "f"

    @property
    def different(self) -> np.ndarray:
        return differs(self.got, self.want, CLOSE / 10)


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype.kind == b.dtype.kind and not differs(a, b, CLOSE).any()


def diagnose(
    reference: Callable, cases: Sequence[Case], got: Sequence[Outcome], want: Sequence[Outcome], rerun: Callable
) -> str | None:
    """One sentence that explains the wrong outcomes, which completes "not yet: ", or None.

    Args:
        cases, got, want: The wrong cases only.
        rerun: Calls the learner's function with a ``Case``.
    """
    trials = [trial for trial in zip(cases, got, want, strict=True) if is_comparable(*trial[1:])]
    pairs = [pair for _, a, b in trials if (pair := pair_of(a.value, b.value, b.inputs))]
    return (
        agreed([list(from_values(pair)) for pair in pairs])
        or from_reference(reference, trials)
        or from_other_inputs(reference, trials, rerun)
        or agreed([list(from_places(pair)) for pair in pairs])
        or agreed([list(from_text(a.value, b.value)) for _, a, b in trials])
    )


def is_comparable(got: Outcome, want: Outcome) -> bool:
    """Whether both are values of one kind, so that more can be said than what kind is expected."""
    if got.error is not None or want.error is not None:
        return False
    kinds = (torch.Tensor, np.ndarray, Real, list | tuple, str)
    return any(isinstance(got.value, kind) and isinstance(want.value, kind) for kind in kinds)


def agreed(sentences: list[list[str]]) -> str | None:
    """The first sentence that explains all cases, or else the one that explains most of several."""
    if not sentences:
        return None
    counts = Counter(sentence for found in sentences for sentence in dict.fromkeys(found))
    in_order = dict.fromkeys(itertools.chain(*sentences))
    everywhere = [sentence for sentence in in_order if counts[sentence] == len(sentences)]
    if everywhere:
        return everywhere[0]
    best = max(in_order, key=lambda sentence: counts[sentence], default=None)
    return best if best and counts[best] >= max(2, MOST * len(sentences)) else None


# --- values as arrays -----------------------------------------------------------------------------------------------


def as_array(value: Any) -> np.ndarray | None:
    """Tensors, arrays, numbers and lists of numbers as an array. None for anything else."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return to_numpy(value)
    try:
        array = np.asarray(value)
    except Exception:  # a ragged list, or an object that pretends to be an array
        return None
    return to_numpy(array) if array.dtype.kind in "bif" and array.size else None


def pair_of(got: Any, want: Any, inputs: dict) -> Pair | None:
    """The first values that differ, as arrays."""
    arrays = {name: a for name, leaf in leaves(inputs).items() if (a := as_array(leaf)) is not None}
    arrays |= {name: a for name, value in inputs.items() if name not in arrays and (a := as_array(value)) is not None}
    if not any(isinstance(leaf, torch.Tensor | np.ndarray) for leaf in leaves(want).values()):
        a, b = as_array(got), as_array(want)
        if a is not None and b is not None:
            return Pair(a, b, arrays)
    gots, wants = leaves(got), leaves(want)
    for name in wants:
        if name in gots and compare(gots[name], wants[name]):
            a, b = as_array(gots[name]), as_array(wants[name])
            return Pair(a, b, arrays) if a is not None and b is not None else None
    return None


# --- the two values -------------------------------------------------------------------------------------------------


def from_values(pair: Pair) -> Iterator[str]:
    """Sentences that explain a wrong value by the right one."""
    g, w = pair.got, pair.want
    if not pair.has_same_shape:
        yield from other_shape(g, w)
        return
    if g.dtype.kind != w.dtype.kind or not pair.different.any():
        if not differs(g.astype(np.float64), w.astype(np.float64), CLOSE).any():
            yield "its values are right, but not their dtype"
        return
    if g.size > 1 and not g.any():
        yield "it returns only zeros" if g.dtype.kind != "b" else "it returns False everywhere"
    if g.size > 1 and g.dtype.kind == "b" and g.all():
        yield "it returns True everywhere"
    for name, value in pair.inputs.items():
        if equal(g, value) and g.size > 1:
            yield f"it returns `{name}` unchanged"
    if g.dtype.kind == "b":
        if not (g == w).any():
            yield "it is inverted: True and False are exchanged"
    else:
        yield from scaled(pair)
    yield from moved(g, w)
    if pair.is_float:
        yield from applied(g, w)
    if np.isinf(w).any() if w.dtype.kind == "f" else False:
        at = g[np.isinf(w)]
        if not differs(g[np.isfinite(w)], w[np.isfinite(w)], CLOSE).any() and np.isfinite(at).all():
            yield f"it returns finite numbers (such as {at[0]:.3g}) where {w[np.isinf(w)][0]} is expected"


def other_shape(g: np.ndarray, w: np.ndarray) -> Iterator[str]:
    """Explanations of a wrong shape."""
    if equal(g.squeeze(), w.squeeze()):
        more = g.ndim > w.ndim
        yield f"its values are right, but it has {'an axis of length 1 too many' if more else 'an axis too few'}"
    for order in itertools.permutations(range(w.ndim)) if 1 < w.ndim <= 4 else ():
        if order != tuple(range(w.ndim)) and equal(g, w.transpose(order)):
            yield transposed(order)
    if g.size == w.size and equal(g.ravel(), w.ravel()):
        yield "its values are right and in the right order, but their shape is not"
    for axis in range(w.ndim):
        what = f"axis {axis}"
        for keep in (False, True):
            if w.shape[axis] > 1 and equal(g, w.mean(axis, keepdims=keep).astype(g.dtype)):
                yield f"it is the mean of the right answer over {what}: keep that axis"
            if w.shape[axis] > 1 and equal(g, w.sum(axis, keepdims=keep).astype(g.dtype)):
                yield f"it is the sum of the right answer over {what}: keep that axis"
        if w.shape[axis] > 1:
            first, last = w.take([0], axis), w.take([-1], axis)
            if equal(g, first) or equal(g, first.squeeze(axis)):
                yield f"it returns only the first along {what} of the right answer"
            if equal(g, last) or equal(g, last.squeeze(axis)):
                yield f"it returns only the last along {what} of the right answer"
        others = g.ndim == w.ndim and g.shape[:axis] + g.shape[axis + 1 :] == w.shape[:axis] + w.shape[axis + 1 :]
        for long, short, word in ((g, w, "too many"), (w, g, "too few")) if others else ():
            extra = long.shape[axis] - short.shape[axis]
            if extra < 1 or not short.size:
                continue
            count = {1: "one", 2: "two"}.get(extra, "some")
            if equal(long.take(range(extra, long.shape[axis]), axis), short):
                yield f"along {what}, it has {count} {word} at the start"
            if equal(long.take(range(short.shape[axis]), axis), short):
                yield f"along {what}, it has {count} {word} at the end"
    for axis in range(g.ndim):
        for name, reduce in (("mean", np.mean), ("sum", np.sum)):
            if g.shape[axis] > 1 and g.dtype.kind == "f" and equal(reduce(g, axis), w):
                yield f"it is right before the {name}: take the {name} over axis {axis}"
    if g.dtype.kind == "f" and g.ndim and not w.ndim:
        for name, reduce in (("mean", np.mean), ("sum", np.sum)):
            if equal(np.asarray(reduce(g)), w):
                yield f"it is right before the {name}: take the {name} of all values"


def transposed(order: tuple[int, ...]) -> str:
    moved_axes = [axis for axis, source in enumerate(order) if axis != source]
    if len(moved_axes) == 2:
        return f"it is transposed: axes {moved_axes[0]} and {moved_axes[1]} are exchanged"
    return f"it has its axes in the wrong order: {', '.join(map(str, order))} of the right answer"


SIMPLE = {
    2.0: "2",
    3.0: "3",
    4.0: "4",
    math.sqrt(2): "√2",
    math.pi: "π",
    2 * math.pi: "2π",
    1 / math.log(2): "1/ln 2 (a logarithm to base 2?)",
    math.log(10): "ln 10 (a logarithm to base 10?)",
    math.e: "e",
    255.0: "255",
    1024 / 1023: "1024/1023",
}


def scaled(pair: Pair) -> Iterator[str]:
    """A wrong sign, a constant factor, a constant offset."""
    g, w = pair.got.astype(np.float64), pair.want.astype(np.float64)
    if equal(g, -w):
        yield "its sign is wrong"
        return
    finite = np.isfinite(w) & np.isfinite(g)
    if not finite.any():
        return
    largest = np.abs(w[finite]).max()
    top = int(np.abs(np.where(finite, w, 0)).argmax())
    if largest > 0 and (factor := g.flat[top] / w.flat[top]) and not differs(g, w * factor, CLOSE).any():
        yield from named_factor(factor, pair)
    offsets = (g - w)[finite]
    if largest > 0 and finite.all() and np.ptp(offsets) <= CLOSE * max(np.abs(offsets).max(), largest):
        offset = offsets.flat[0]
        size, word = abs(offset), "large" if offset > 0 else "small"
        if not differs(np.array(size), np.array(1.0), CLOSE):
            yield f"every value is off by one: too {word} by 1" if g.size > 1 else f"it is off by one: too {word} by 1"
        for name, number in quantities(pair):
            if number not in (0.0, 1.0) and not differs(np.array(size), np.array(abs(number)), CLOSE):
                yield f"it is too {word} by {name}"
        yield f"it is too {word} by {size:.4g}{' everywhere' if g.size > 1 else ''}"


def quantities(pair: Pair) -> Iterator[tuple[str, float]]:
    """Numbers that a case has: scalars among its inputs, and the lengths of axes."""
    for name, value in pair.inputs.items():
        if value.shape == () and value.dtype.kind != "b":
            yield f"`{name}`", float(value)
    for name, value in pair.inputs.items():
        for axis, length in enumerate(value.shape):
            where = ("the number of rows", "the number of columns")[axis] if value.ndim == 2 else ""
            where = where or f"the length of axis {axis}"
            yield f"{where} of `{name}`", float(length)
        if value.ndim > 1:
            yield f"the number of values of `{name}`", float(value.size)


def named_factor(factor: float, pair: Pair) -> Iterator[str]:
    """The names of a factor, simple ones first."""

    def is_close(number: float) -> bool:
        return number > 0 and abs(abs(factor) - number) <= CLOSE * number

    sign = " and has the wrong sign" if factor < 0 else ""
    large = "large" if abs(factor) > 1 else "small"
    for number, name in SIMPLE.items():
        if is_close(number) or is_close(1 / number):
            yield f"it is too {large} by a factor of {name}{sign}"
    for name, number in quantities(pair):
        if number <= 0 or number == 1:
            continue
        if is_close(number) or is_close(1 / number):
            sums = "sum instead of mean?" if abs(factor) > 1 else "mean instead of sum?"
            hint = "" if name.startswith("`") else f": {sums}"
            yield f"it is {'multiplied' if is_close(number) else 'divided'} by {name}{sign}{hint}"
        if is_close(number**0.5) or is_close(number**-0.5):
            yield f"it is {'multiplied' if is_close(number**0.5) else 'divided'} by the square root of {name}{sign}"
        if is_close(number**2) or is_close(number**-2):
            yield f"it is {'multiplied' if is_close(number**2) else 'divided'} by the square of {name}{sign}"
        if number < 50 and (is_close(math.exp(number)) or is_close(math.exp(-number))):
            yield f"it is {'multiplied' if is_close(math.exp(number)) else 'divided'} by exp({name}){sign}"
    yield f"it is wrong by a constant factor of {factor:.4g}"


def moved(g: np.ndarray, w: np.ndarray) -> Iterator[str]:
    """The right values in the wrong places."""
    if w.size < 2:
        return
    for order in itertools.permutations(range(w.ndim)) if 1 < w.ndim <= 4 else ():
        if order != tuple(range(w.ndim)) and equal(g, w.transpose(order)):
            yield transposed(order)
    for axis in range(w.ndim):
        length = w.shape[axis]
        if length < 2:
            continue
        if equal(g, np.flip(w, axis)):
            yield f"it is flipped along axis {axis}: the order is reversed"
        if length > 2:
            first, last = range(length - 1), range(1, length)
            if equal(g.take(last, axis), w.take(first, axis)):
                yield f"it is shifted along axis {axis}: every value is one place too late"
            if equal(g.take(first, axis), w.take(last, axis)):
                yield f"it is shifted along axis {axis}: every value is one place too early"
        for index, word in ((0, "first"), (-1, "last")):
            if equal(g, np.broadcast_to(w.take([index], axis), w.shape)):
                one = place(axis, w.ndim)
                yield f"every {one} has the answer of the {word} {one}"
    for axis in range(w.ndim):
        if w.shape[axis] > 1 and w.dtype.kind != "b" and equal(np.sort(g, axis), np.sort(w, axis)):
            yield f"its values are right, but in the wrong order along axis {axis}"
    if w.dtype.kind != "b" and equal(np.sort(g, None), np.sort(w, None)):
        yield "its values are right, but in the wrong places"


def place(axis: int, ndim: int) -> str:
    """What one index along an axis is."""
    if axis == 0:
        return "row" if ndim > 1 else "value"
    return "column" if ndim == 2 else f"position along axis {axis}"


def applied(g: np.ndarray, w: np.ndarray) -> Iterator[str]:
    """A function applied to the right answer, or forgotten."""
    with np.errstate(all="ignore"):
        for name, function in FUNCTIONS.items():
            if not equal(g, w) and equal(g, function(w)):
                yield f"it returns the {name} of the right answer"
            if equal(function(g), w):
                yield f"the {name} of what it returns would be right"
        for axis in range(w.ndim):
            if w.shape[axis] < 2:
                continue
            for name, function in AXIS_FUNCTIONS.items():
                if equal(g, function(w, axis)):
                    yield f"it returns the {name} of the right answer over axis {axis}"
                if equal(function(g, axis), w):
                    yield f"the {name} of what it returns, over axis {axis}, would be right"
            ratio = g / w
            if np.isfinite(ratio).all() and w.size > w.shape[axis]:
                if not differs(ratio, np.broadcast_to(ratio.mean(axis, keepdims=True), ratio.shape), CLOSE).any():
                    yield (
                        f"along axis {axis}, it is right up to a factor, a different one for each: "
                        "is it normalized correctly?"
                    )
            shift = g - w
            if np.isfinite(shift).all() and w.size > w.shape[axis]:
                if np.ptp(shift, axis=axis).max() <= CLOSE * max(np.abs(w).max(), 1e-30):
                    yield f"along axis {axis}, it is right up to a constant, a different one for each"
        if w.size > 2 and len(np.unique(g)) > 1 and equal(g, np.clip(w, g.min(), g.max())):
            yield f"it is clipped to the range from {g.min():.4g} to {g.max():.4g}"


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


FUNCTIONS = {
    "logarithm": np.log,
    "exponential": np.exp,
    "square root": np.sqrt,
    "square": np.square,
    "absolute value": np.abs,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "reciprocal": lambda x: 1 / x,
    "complement to 1": lambda x: 1 - x,
    "value rounded to an integer": np.round,
    "value rounded down": np.floor,
    "value rounded up": np.ceil,
}
AXIS_FUNCTIONS = {
    "softmax": _softmax,
    "log-softmax": lambda x, axis: x - x.max(axis, keepdims=True) - np.log(_sum_exp(x, axis)),
    "cumulative sum": np.cumsum,
}


def _sum_exp(x: np.ndarray, axis: int) -> np.ndarray:
    return np.exp(x - x.max(axis, keepdims=True)).sum(axis, keepdims=True)


# --- the reference, called differently ------------------------------------------------------------------------------


def from_reference(reference: Callable, trials: list[tuple[Case, Outcome, Outcome]]) -> str | None:
    """What the reference would have to be called with to return these answers."""
    if not trials:
        return None
    every = [bound(reference, case) for case, _, _ in trials]
    found, hopeful = [], set()
    for number, (arguments, (_, got, _)) in enumerate(zip(every, trials, strict=True)):
        other = variants(reference, arguments, every)
        tried = other if number < 2 else ((what, inputs) for what, inputs in other if what in hopeful)
        found.append([what for what, inputs in tried if explains(reference, inputs, got.value)])
        hopeful.update(found[-1])
        if number == 1 and not hopeful:  # what explains neither of the first two does not explain most
            return None
    what = agreed(found)
    return what and f"it answers as if {what}"


def bound(reference: Callable, case: Case) -> dict:
    """All arguments by name, defaults too."""
    arguments = inspect.signature(reference).bind(*case.arguments, **case.keywords)
    arguments.apply_defaults()
    return dict(arguments.arguments)


def explains(reference: Callable, inputs: dict, got: Any) -> bool:
    answer = call_by_name(reference, inputs)
    return answer.error is None and compare(got, answer.value, tolerance=CLOSE) is None


def call_by_name(function: Callable, inputs: dict) -> Outcome:
    positional = tuple(inputs.values())
    return call(function, Case(positional), names=tuple(inputs), seconds=2)


def variants(reference: Callable, inputs: dict, every: list[dict]) -> Iterator[tuple[str, dict]]:
    """Descriptions of other arguments, and the arguments."""
    parameters = inspect.signature(reference).parameters
    for name, value in inputs.items():
        for what, other in other_values(name, value):
            yield what, inputs | {name: other}
        if parameters[name].default is None and value is not None:
            yield f"`{name}` were None", inputs | {name: None}
        if isinstance(value, str | bool | int) or value is None:
            for other in dict.fromkeys(e[name] for e in every if isinstance(e[name], str | bool | int)):
                if other != value:
                    yield f"`{name}` were always {other!r}", inputs | {name: other}
    for a, b in itertools.combinations(inputs, 2):
        if type(inputs[a]) is type(inputs[b]) or (callable(inputs[a]) and callable(inputs[b])):
            yield f"`{a}` and `{b}` were exchanged", inputs | {a: inputs[b], b: inputs[a]}
    for name, value in inputs.items():
        if not hasattr(value, "_replace") or not hasattr(value, "_fields"):
            continue
        for part, old in value._asdict().items():
            for what, other in other_values(f"{name}.{part}", old):
                yield what, inputs | {name: value._replace(**{part: other})}
        for a, b in itertools.combinations(value._fields, 2):
            if getattr(getattr(value, a), "shape", 0) == getattr(getattr(value, b), "shape", 1):
                exchanged = value._replace(**{a: getattr(value, b), b: getattr(value, a)})
                yield f"`{name}.{a}` and `{name}.{b}` were exchanged", inputs | {name: exchanged}


def other_values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Neutral, inverted, transposed or shifted values of one argument, each with a description."""
    if isinstance(value, torch.Tensor):
        yield from other_tensors(name, value)
    elif isinstance(value, np.ndarray):
        for what, tensor in other_tensors(name, torch.from_numpy(value)):
            yield what, tensor.numpy()
    elif isinstance(value, bool):
        yield f"`{name}` were {not value}", not value
    elif isinstance(value, int | float):
        for what, other in other_numbers(name, value):
            yield what, other
    elif isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        if len(value) > 1:
            yield f"`{name}` were in reverse order", value[::-1]
            yield f"every item of `{name}` were the first", type(value)([value[0]] * len(value))
            yield f"`{name}` ended before its last item", value[:-1]
            yield f"`{name}` began at its second item", value[1:]
    elif isinstance(value, str) and value:
        yield f"`{name}` were empty", ""
    elif callable(value):
        yield f"`{name}` were skipped", lambda x: x
        yield f"`{name}` returned zeros", lambda x: torch.zeros_like(x)


def other_tensors(name: str, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if x.dtype == torch.bool:
        yield f"`{name}` were True everywhere: is it used?", torch.ones_like(x)
        yield f"`{name}` were False everywhere: is it used?", torch.zeros_like(x)
        yield f"`{name}` were inverted", ~x
    elif not x.is_floating_point() and x.numel() and bool(((x == 0) | (x == 1)).all()):
        yield f"`{name}` were 1 everywhere: is it used?", torch.ones_like(x)
        yield f"`{name}` were 0 everywhere: is it used?", torch.zeros_like(x)
        yield f"0 and 1 were exchanged in `{name}`", 1 - x
    else:
        yield f"`{name}` were {'all ' if x.ndim else ''}0: is it used?", torch.zeros_like(x)
        yield f"`{name}` were {'all ' if x.ndim else ''}1: is it used?", torch.ones_like(x)
    if x.is_floating_point():
        yield f"`{name}` had the opposite sign", -x
        yield f"`{name}` were replaced by exp(`{name}`)", x.exp()
        yield f"`{name}` were replaced by its logarithm", x.log()
        yield f"`{name}` were replaced by 1/`{name}`", 1 / x
        yield f"`{name}` were twice as large", 2 * x
        yield f"`{name}` were half as large", x / 2
        yield f"`{name}` were squared", x.square()
        yield f"`{name}` were replaced by its square root", x.sqrt()
        yield f"`{name}` were 1 + `{name}`", 1 + x
        yield f"`{name}` were `{name}` - 1", x - 1
    elif x.dtype != torch.bool:
        yield f"`{name}` were one larger", x + 1
        yield f"`{name}` were one smaller", x - 1
    if x.is_floating_point() and x.ndim and x.shape[-1] > 1:
        lengths = x.norm(dim=-1, keepdim=True)
        yield f"`{name}` were normalized to length 1 first", x / lengths.clamp(min=1e-12)
        yield f"the softmax of `{name}` were taken first", x.softmax(-1)
    for axis in range(x.ndim):
        if x.shape[axis] < 2:
            continue
        first = x.narrow(axis, 0, 1).expand_as(x).clone()
        along = "every row" if axis == 0 else f"every position along axis {axis}"
        yield f"{along} of `{name}` were the first", first
        yield f"`{name}` were flipped along axis {axis}", x.flip(axis)
        yield f"`{name}` were shifted by one along axis {axis}", x.roll(1, axis)
        yield f"`{name}` were shifted by one along axis {axis}, the other way", x.roll(-1, axis)
    for a, b in itertools.combinations(range(x.ndim), 2) if x.ndim <= 4 else ():
        yield f"`{name}` were transposed (axes {a} and {b})", x.transpose(a, b).contiguous()


def other_numbers(name: str, x: float) -> Iterator[tuple[str, float]]:
    for number in (0, 1, -1):
        if x != number:
            yield f"`{name}` were {number}: is it used?", type(x)(number)
    yield f"`{name}` were one larger", x + 1
    yield f"`{name}` were one smaller", x - 1
    yield f"`{name}` had the opposite sign", -x
    yield f"`{name}` were twice as large", x * 2
    yield f"`{name}` were half as large", x // 2 if isinstance(x, int) else x / 2
    yield f"`{name}` were squared", x * x
    if x > 0:
        yield f"`{name}` were replaced by 1/`{name}`", 1 / x
        yield f"`{name}` were replaced by its square root", x**0.5
    if abs(x) < 80:
        yield f"`{name}` were replaced by exp(`{name}`)", math.exp(x)


def from_other_inputs(reference: Callable, trials: list[tuple[Case, Outcome, Outcome]], rerun: Callable) -> str | None:
    """Names an argument that the answer should depend on, and does not."""
    found = []
    for case, got, want in trials[:3]:
        inputs, sentences = bound(reference, case), []
        for name, value in inputs.items():
            others = [other for _, other in other_values(name, value)][:3]
            answers = [call_by_name(reference, inputs | {name: other}) for other in others]
            telling = [
                other
                for other, answer in zip(others, answers, strict=True)
                if answer.error is None and compare(answer.value, want.value)
            ]
            if not telling or not takes(case, reference, name):
                continue
            again = [rerun(with_input(case, reference, name, other)) for other in telling]
            if all(outcome.error is None and compare(outcome.value, got.value) is None for outcome in again):
                sentences.append(f"its answer does not change when `{name}` changes: is it used?")
        found.append(sentences)
    return agreed(found)


def takes(case: Case, reference: Callable, name: str) -> bool:
    """Whether a case passes this argument, rather than leaving it to the default."""
    return name in inspect.signature(reference).bind(*case.arguments, **case.keywords).arguments


def with_input(case: Case, reference: Callable, name: str, value: Any) -> Case:
    if name in case.keywords:
        return Case(case.arguments, keywords=case.keywords | {name: value})
    position = list(inspect.signature(reference).parameters).index(name)
    return Case((*case.arguments[:position], value, *case.arguments[position + 1 :]), keywords=case.keywords)


# --- where it is right ----------------------------------------------------------------------------------------------


def from_places(pair: Pair) -> Iterator[str]:
    """Sentences that say where an answer is right, and what the wrong values have in common."""
    if not pair.has_same_shape or pair.got.dtype.kind != pair.want.dtype.kind:
        return
    g, w, wrong = pair.got, pair.want, pair.different
    if not wrong.any():
        return
    if not wrong.all() and wrong.ndim:
        yield from by_mask(pair, wrong)
        yield from by_index(wrong)
    if g.dtype.kind == "f":
        if np.isnan(g[wrong]).all():
            yield "its wrong values are all NaN: is something 0/0, or ∞ − ∞?"
        largest = np.abs(w[np.isfinite(w)]).max(initial=1e-30)
        with np.errstate(invalid="ignore"):
            if np.nanmax(np.abs(np.where(np.isfinite(w), g - w, 0)), initial=0) <= 0.01 * largest:
                yield (
                    "it is within 1% of the right answer: is something computed in lower precision, "
                    "or a small constant different?"
                )
    if g.dtype.kind == "b":
        if g[wrong].all():
            yield "it is True in too many places: every wrong value is True instead of False"
        if not g[wrong].any():
            yield "it is False in too many places: every wrong value is False instead of True"
    elif g.dtype.kind == "f" and np.isfinite(w).all() and g.size > 2:
        if (np.abs(g) >= np.abs(w) * (1 - CLOSE)).all() and (np.sign(g) == np.sign(w)).all():
            yield "its values have the right signs, but are too large"
        elif (np.abs(g) <= np.abs(w) * (1 + CLOSE)).all() and (np.sign(g) * np.sign(w) >= 0).all():
            yield "its values have the right signs, but are too small"


def by_mask(pair: Pair, wrong: np.ndarray) -> Iterator[str]:
    """Right only where an input of zeros and ones is one, or zero."""
    for name, mask in pair.inputs.items():
        if mask.dtype.kind not in "bi" or not mask.ndim or not np.isin(mask, (0, 1)).all():
            continue
        one, zero = ("True", "False") if mask.dtype.kind == "b" else ("1", "0")
        for spread in spreads(mask.astype(bool), wrong.shape):
            if spread.any() and not spread.all():
                if not wrong[spread].any():
                    yield f"it is right where `{name}` is {one}, but wrong where it is {zero}"
                if not wrong[~spread].any():
                    yield f"it is right where `{name}` is {zero}, but wrong where it is {one}"


def spreads(mask: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The mask over an output: over its first axes, its last axes, or its first and last (the keys of [B, T, S])."""
    extra = len(shape) - mask.ndim
    if extra < 0:
        return
    forms = [(*mask.shape, *[1] * extra), (*[1] * extra, *mask.shape)]
    if mask.ndim == 2 and extra:
        forms.append((mask.shape[0], *[1] * extra, mask.shape[1]))
    for form in dict.fromkeys(forms):
        if all(a in (1, b) for a, b in zip(form, shape, strict=True)):
            yield np.broadcast_to(mask.reshape(form), shape)


def by_index(wrong: np.ndarray) -> Iterator[str]:
    """Right, or wrong, only at the start, the end or the diagonal."""
    for axis in range(wrong.ndim):
        length = wrong.shape[axis]
        if length < 2:
            continue
        at = wrong.any(tuple(i for i in range(wrong.ndim) if i != axis))
        one = place(axis, wrong.ndim)
        for index, word in ((0, "first"), (-1, "last")):
            others = np.delete(at, index)
            if at[index] and not others.any():
                yield f"everything is right except the {word} {one}"
            if not at[index] and others.all() and length > 2:
                yield f"only the {word} {one} is right"
            if not at[index] and others.any() and axis == 0:
                yield f"the {word} {one} is right, but not the others"
    if wrong.ndim > 1 and min(wrong.shape[-2:]) > 1:
        rows, columns = (wrong.nonzero()[axis] for axis in (-2, -1))
        if wrong.shape[-2] == wrong.shape[-1]:
            if (rows == columns).all():
                yield "everything is right except the diagonal"
            if (columns > rows).all():
                yield "everything is right except above the diagonal"
            if (columns < rows).all():
                yield "everything is right except below the diagonal"


def from_text(got: Any, want: Any) -> Iterator[str]:
    """How a wrong text, or a wrong list, differs from the right one."""
    if isinstance(got, list | tuple) and isinstance(want, list | tuple) and got and want:
        got, want = list(got), list(want)
        whole, end, start = "list", "at the end", "at the start"
    elif isinstance(got, str) and isinstance(want, str):
        whole, end, start = "text", "at the end", "at the start"
    else:
        return
    try:
        missing, extra = len(want) - len(got), len(got) - len(want)
        if missing > 0 and want[: len(got)] == got:
            what = f" {want[len(got) :]!r}" if whole == "text" and missing < 20 else ""
            yield f"something is missing {end} of the {whole}:{what}" if what else f"the {whole} ends too early"
        elif missing > 0 and want[missing:] == got:
            what = f": {want[:missing]!r}" if whole == "text" and missing < 20 else ""
            yield f"something is missing {start} of the {whole}{what}"
        elif extra > 0 and got[: len(want)] == want:
            what = f": {got[len(want) :]!r}" if whole == "text" and extra < 20 else ""
            yield f"there is something too much {end} of the {whole}{what}"
        elif extra > 0 and got[extra:] == want:
            what = f": {got[:extra]!r}" if whole == "text" and extra < 20 else ""
            yield f"there is something too much {start} of the {whole}{what}"
        elif got[::-1] == want:
            yield f"the {whole} is in reverse order"
        elif sorted(map(repr, got)) == sorted(map(repr, want)):
            yield f"the {whole} has the right parts in the wrong order"
    except Exception:  # parts that cannot be compared
        return
