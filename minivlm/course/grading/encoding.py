"""Values as JSON, for the pipe between the grader and the process that runs a notebook.

Numbers, text, lists, tuples, dictionaries, tensors, arrays and dtypes arrive as they were. What comes from a notebook
can be anything, so decoding never unpickles, imports or runs what it reads: any other object arrives as an ``Opaque``
object, which only has the name of its class. Objects among the arguments of an exercise (a configuration, a toy model)
are dataclasses or named tuples, which the notebook's process rebuilds because it trusts the grader.
"""

import base64
import importlib
import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

MAX_BYTES = 1 << 24  # of one message
MAX_DEPTH = 20  # of lists in lists
MAX_AXES = 32
TORCH_DTYPES = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128".split()


class Opaque:
    """An object that did not travel. Its class has the name of the original's."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


def opaque(name: str) -> Opaque:
    """An ``Opaque`` object whose class has this name."""
    return type(name if name.isidentifier() else "object", (Opaque,), {})()


def encode(value: Any, bases: Sequence[torch.Tensor] = (), depth: int = 0) -> Any:
    """A value as what ``json`` can write.

    Args:
        bases: Tensors that the other side has too. Views of their memory are sent as views.
    """
    if depth > MAX_DEPTH:
        return {"opaque": "nesting"}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, torch.Tensor):
        return encode_tensor(value, bases)
    if isinstance(value, np.ndarray):
        return encode_array(value)
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Integral) and not isinstance(value, np.bool_):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, np.bool_):
        return float(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [encode(part, bases, depth + 1) for part in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(part, bases, depth + 1) for part in item] for item in value.items()]}
    if (parts := parts_of(value)) is not None:
        encoded = {name: encode(part, bases, depth + 1) for name, part in parts.items()}
        name = [type(value).__module__, type(value).__qualname__]
        return {"class": name, "parts": encoded, "is_tuple": isinstance(value, tuple)}
    return {"opaque": type(value).__name__}


def parts_of(value: Any) -> dict | None:
    """The fields of a named tuple or a dataclass, by name."""
    if isinstance(value, tuple):
        return value._asdict()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    return None


def encode_tensor(value: torch.Tensor, bases: Sequence[torch.Tensor]) -> dict:
    """Dtype, shape and data. Strides travel too if they are not the usual ones."""
    name = str(value.dtype).removeprefix("torch.")
    if name not in TORCH_DTYPES or value.layout != torch.strided or value.device.type == "meta":
        return {"opaque": "Tensor"}
    tensor = value.detach().cpu().resolve_conj().resolve_neg()
    head = {"tensor": name, "shape": list(tensor.shape)}
    if not value.requires_grad:
        for index, base in enumerate(bases):
            if tensor.numel() and base.dtype == tensor.dtype and same_memory(base, tensor):
                offset = tensor.storage_offset() - base.storage_offset()
                return head | {"view": index, "stride": list(tensor.stride()), "offset": offset}
    if value.requires_grad:
        head["grad"] = True
    if not tensor.is_contiguous() and tensor.untyped_storage().nbytes() <= MAX_BYTES // 2:
        head |= {"stride": list(tensor.stride()), "offset": tensor.storage_offset()}
        tensor = tensor.as_strided([tensor.untyped_storage().nbytes() // tensor.itemsize], [1], 0)
    if tensor.numel() * tensor.itemsize > MAX_BYTES // 2:
        return head | {"data": ""}  # no answer is that large: its shape is enough to see that
    return head | {"data": to_text(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())}


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0


def encode_array(value: np.ndarray) -> dict:
    if value.dtype.kind not in "biufc" or value.dtype.itemsize > 16:
        return {"opaque": "ndarray"}
    data = b"" if value.nbytes > MAX_BYTES // 2 else value.tobytes()
    return {"array": value.dtype.str, "shape": list(value.shape), "data": to_text(data)}


def to_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def decode(data: Any, bases: Sequence[torch.Tensor] = (), trusted: bool = False) -> Any:
    """The value that ``encode`` was given.

    Args:
        bases: The tensors that views can refer to.
        trusted: Whether to rebuild objects of dataclasses and named tuples. Otherwise, they become opaque.

    Raises:
        ValueError: If ``encode`` did not write this.
    """
    try:
        return _decode(data, bases, trusted)
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"this is not an encoded value ({type(error).__name__})") from None


def _decode(data: Any, bases: Sequence[torch.Tensor], trusted: bool) -> Any:
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if not isinstance(data, dict):
        raise TypeError(data)
    if "list" in data or "tuple" in data:
        parts = [_decode(part, bases, trusted) for part in data.get("list", data.get("tuple"))]
        return parts if "list" in data else tuple(parts)
    if "dict" in data:
        return {_decode(key, bases, trusted): _decode(part, bases, trusted) for key, part in data["dict"]}
    if "tensor" in data:
        return decode_tensor(data, bases)
    if "array" in data:
        return decode_array(data)
    if "dtype" in data:
        return torch_dtype(data["dtype"])
    if "class" in data:
        module, name = data["class"]
        parts = {key: _decode(part, bases, trusted) for key, part in data["parts"].items()}
        if not trusted:
            return tuple(parts.values()) if data["is_tuple"] else opaque(str(name))
        return getattr(importlib.import_module(module), name)(**parts)
    return opaque(str(data["opaque"]))


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, TORCH_DTYPES[TORCH_DTYPES.index(name)])


def decode_shape(data: dict) -> tuple[int, ...]:
    shape = tuple(data["shape"])
    if len(shape) > MAX_AXES or not all(type(length) is int and 0 <= length < 1 << 40 for length in shape):
        raise ValueError("this is not a shape")
    return shape


def decode_tensor(data: dict, bases: Sequence[torch.Tensor]) -> torch.Tensor:
    dtype, shape = torch_dtype(data["tensor"]), decode_shape(data)
    if "view" in data:
        base = bases[range(len(bases))[data["view"]]]
        if base.dtype != dtype:
            raise ValueError("this is not a view")
        return base.detach().as_strided(shape, data["stride"], base.storage_offset() + data["offset"])
    numbers = bytearray(base64.b64decode(data["data"], validate=True))
    if not numbers:  # none, or too many to send
        return torch.zeros((), dtype=dtype).expand(shape)
    tensor = torch.frombuffer(numbers, dtype=torch.uint8)
    tensor = tensor != 0 if dtype == torch.bool else tensor.view(dtype)
    if "stride" in data:
        tensor = tensor.as_strided(shape, data["stride"], data["offset"])
    elif tensor.numel() != math.prod(shape):
        raise ValueError("the data does not fit the shape")
    else:
        tensor = tensor.reshape(shape)
    return tensor.requires_grad_() if data.get("grad") is True else tensor


def decode_array(data: dict) -> np.ndarray:
    dtype, shape = np.dtype(str(data["array"])), decode_shape(data)
    if dtype.kind not in "biufc":
        raise ValueError("this is not a dtype of numbers")
    numbers = base64.b64decode(data["data"], validate=True)
    if not numbers:
        return np.broadcast_to(np.zeros((), dtype), shape)
    if dtype.kind == "b":
        return (np.frombuffer(numbers, np.uint8) != 0).reshape(shape)
    return np.frombuffer(numbers, dtype).reshape(shape).copy()


def tensors_in(value: Any, depth: int = 0) -> list[torch.Tensor]:
    """All tensors inside lists, tuples, dictionaries and dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if depth > MAX_DEPTH:
        return []
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, list | tuple):
        inside = value
    else:
        inside = (parts_of(value) or {}).values()
    return [tensor for part in inside for tensor in tensors_in(part, depth + 1)]


def copy_into(target: Any, value: Any) -> None:
    """Change arguments in place to what another process says they are now. Other objects stay as they are.

    Raises:
        ValueError: If that is not possible.
    """
    try:
        if isinstance(target, torch.Tensor) and isinstance(value, torch.Tensor):
            if not target.requires_grad and not torch.equal(target, value):
                target.copy_(value) if target.shape == value.shape else target.set_(value.clone())
        elif isinstance(target, np.ndarray) and isinstance(value, np.ndarray):
            if target.shape != value.shape:
                target.resize(value.shape, refcheck=False)
            target[...] = value
        elif isinstance(target, dict) and isinstance(value, dict):
            for key in target.keys() & value.keys():
                copy_into(target[key], value[key])
            merged = {key: merge(target.get(key), part) for key, part in value.items()}
            target.clear()
            target.update(merged)
        elif isinstance(target, list | tuple) and isinstance(value, list | tuple):
            for old, new in zip(target, value, strict=False):
                copy_into(old, new)
            if isinstance(target, list):
                olds = [*target, *[None] * len(value)]
                target[:] = [merge(old, new) for old, new in zip(olds, value, strict=False)]
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"an argument cannot change like that ({type(error).__name__})") from None


def merge(old: Any, new: Any) -> Any:
    """What is now in the place of ``old``: itself if it could be changed in place or did not travel."""
    is_same_object = isinstance(old, torch.Tensor | np.ndarray | list | dict | tuple) and isinstance(new, type(old))
    return old if is_same_object or isinstance(new, Opaque) else new
