"""Augmentation: change in an image what another artist would draw differently, and nothing that the texts speak of.

    H, W height and width of an image, h, w of a sprite, in pixels

Colors, lines and proportions differ from one artist to the next; what the object is does not. A model that saw each
object in a few fixed drawings learns these. One that saw them changed in these ways learns more of the object.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

STRETCH = 0.2  # largest change of height against width, as a logarithm
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # weights of red, green, blue (ITU-R BT.601)
BLACK_POINT = 60  # the brightest line that `outline` draws
EDGE = 40  # a step of luminance within three pixels that `outline` draws as a line


def stretch(rng: np.random.Generator) -> float:
    """A factor for the width of an object against its height."""
    return float(np.exp(rng.uniform(-STRETCH, STRETCH)))


def color(rng: np.random.Generator, sprite: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 4"]:
    """Rotate the hue, scale saturation and contrast, and shift the brightness."""
    angle = rng.normal(0, 0.4) if rng.random() < 0.8 else rng.uniform(-np.pi, np.pi)
    saturation, contrast = rng.uniform(0.3, 1.5), rng.uniform(0.7, 1.2)
    shift = rng.uniform(-0.15, 0.2) + (1 - contrast) / 2
    gray = np.ones((3, 3), np.float32) * LUMINANCE[:, None]
    axis = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], np.float32) / 3**0.5  # rotates about (1, 1, 1)
    hue = np.cos(angle) * np.eye(3) + np.sin(angle) * axis + (1 - np.cos(angle)) / 3
    matrix = (contrast * (gray + saturation * ((np.eye(3) - gray) @ hue))).astype(np.float32)
    changed = sprite[..., :3].astype(np.float32) @ matrix + np.float32(shift) * sprite[..., 3:]
    return _colored(changed, sprite)


def outline(rng: np.random.Generator, sprite: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 4"]:
    """Draw a dark line around the object, and half of the time also along the edges inside it."""
    image = Image.fromarray(sprite)
    width = int(rng.choice([3, 5]))
    line = sprite[..., 3] - np.minimum(
        sprite[..., 3], np.asarray(image.getchannel(3).filter(ImageFilter.MinFilter(width)))
    )
    if rng.random() < 0.5:
        luminance = Image.fromarray((sprite[..., :3] @ LUMINANCE).astype(np.uint8))
        high, low = (np.asarray(luminance.filter(f(3))) for f in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
        line = np.where(high - low > EDGE, sprite[..., 3], line)
    share = line[..., None].astype(np.float32) / 255
    return _colored(sprite[..., :3] * (1 - share) + share * rng.integers(0, BLACK_POINT), sprite)


def strokes(rng: np.random.Generator, sprite: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 4"]:
    """Make dark lines thicker, or light ones."""
    thicker = ImageFilter.MinFilter if rng.random() < 0.5 else ImageFilter.MaxFilter
    return _colored(np.asarray(Image.fromarray(sprite[..., :3]).filter(thicker(3))), sprite)


def blur(rng: np.random.Generator, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Blur a whole image slightly."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.BoxBlur(rng.uniform(0.2, 0.8)))).copy()


def noise(rng: np.random.Generator, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Add uniform noise to each value of an image."""
    largest = int(rng.integers(3, 20))
    grain = rng.integers(-largest, largest, image.shape, np.int8, endpoint=True)
    return np.clip(image.astype(np.int16) + grain, 0, 255).astype(np.uint8)


def _colored(colors: np.ndarray, sprite: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 4"]:
    """The sprite in other premultiplied colors. Its alpha stays, and no color is above it."""
    colors = np.clip(colors, 0, sprite[..., 3:]).astype(np.uint8)
    return np.concatenate((colors, sprite[..., 3:]), axis=2)


# Each with how often it is applied: to a sprite before it is pasted, or to the finished image.
SPRITE_CHANGES = {"strokes": (strokes, 0.2), "color": (color, 0.6), "outline": (outline, 0.25)}
IMAGE_CHANGES = {"blur": (blur, 0.2), "noise": (noise, 0.2)}
AUGMENTATIONS = ("stretch", *SPRITE_CHANGES, *IMAGE_CHANGES)


def apply(changes: dict, names: tuple[str, ...], rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Apply those of ``SPRITE_CHANGES`` or ``IMAGE_CHANGES`` that are named, each with its probability."""
    for name, (change, probability) in changes.items():
        if name in names and rng.random() < probability:
            image = change(rng, image)
    return image
