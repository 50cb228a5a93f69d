"""What figures are made of: numbers, strings and images of any kind, checked and converted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from minivlm.course.viz.style import cividis, to_bytes
from minivlm.course.viz.text import count, number

Numbers = Any  # a tensor, an array or nested lists; docstrings give the shape, and check_array() enforces it
Pixels = Any  # a PIL image or an array, see to_image()


def check_array(name: str, values: Numbers, dimensions: int, finite: bool = True) -> np.ndarray:
    """Converts numbers of any kind to a float64 array.

    Raises:
        ValueError: If they are no numbers, have another number of dimensions, are empty, or contain NaN or, if
            ``finite``, infinity.
    """
    if hasattr(values, "detach"):  # a tensor, of any dtype and on any device
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an array of numbers with {count(dimensions, 'dimension')}.") from None
    if array.ndim != dimensions or array.size == 0:
        raise ValueError(
            f"{name} must have {count(dimensions, 'dimension')}, none of them empty, but its shape is "
            f"{list(array.shape)}."
        )
    if np.isnan(array).any() or (finite and not np.isfinite(array).all()):
        raise ValueError(f"{name} must contain {'only finite numbers' if finite else 'no NaN'}.")
    return array


def check_strings(name: str, values: Sequence[str], length: int) -> list[str]:
    """A list of exactly ``length`` strings.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(values, str) or len(values) != length or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name} must be a list of {count(length, 'string')}.")
    return list(values)


def to_image(image: Pixels) -> Image.Image:
    """Converts to an RGB image.

    Args:
        image: A PIL image, uint8 [H, W, 3], fractions from 0 to 1 [H, W, 3], or any numbers [H, W], which become a
            heat map.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    given = type(image).__name__
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = (image.double() if image.is_floating_point() else image).numpy()
    array = np.asarray(image)
    if array.ndim == 2 and array.size:
        array = check_array("A heat map", array, 2)
        return Image.fromarray(to_bytes(cividis(array, array.min(), array.max())))
    if array.ndim != 3 or array.shape[-1] != 3 or array.size == 0:
        raise ValueError(
            f"An image must be a PIL image or an array [H, W, 3] or [H, W], not a {given} of shape "
            f"{list(array.shape)}. Channels go last."
        )
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    array = check_array("An image", array, 3)
    if array.min() < 0 or array.max() > 1:
        raise ValueError(
            f"The values of the image range from {number(array.min())} to {number(array.max())}, but floats must be "
            "from 0 to 1. Undo the normalization first."
        )
    return Image.fromarray(to_bytes(array))


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Safe softmax along one axis."""
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)
