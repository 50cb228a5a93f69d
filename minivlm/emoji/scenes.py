"""Emoji scenes: an endless, seeded data set of images with captions, questions, boxes and masks.

    H, W height and width of an image, both ``size`` · h, w of one pasted object, all in pixels

``make_scene(seed)`` pastes one to four emoji on a plain, shaded or photographic background and records what it did, so
every caption, answer and box is exact. The same seed gives the same scene everywhere (the same bytes with the same
versions of numpy and Pillow). There are five splits:

- ``train``, ``validation``: the training artists, disjoint streams. Some pairs of objects (about 5%) are held out.
- ``pairs``: every image has at least one of the held-out pairs.
- ``artist``: every object is drawn by an artist that training never shows, and that no choice was made by.
- ``development``: another such artist, by which the recipe was chosen.

Boxes are (x0, y0, x1, y1) in pixels, half open, origin at the top left. Prompts have PaliGemma's task prefixes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from minivlm.emoji import augmentation, language
from minivlm.emoji.objects import (
    HELD_OUT_PAIRS,
    OBJECTS,
    PARTNERS,
    SPLITS,
    SceneObject,
    artists_of,
    can_be_mirrored,
    draw_sprite,
)
from minivlm.hub import DATA

MIN_SIZE, MAX_SIZE = 48, 896

# Layout. Lengths are fractions of the image's side (24 to 52 pixels at 112).
SMALLEST, LARGEST = 24 / 112, 52 / 112
MIN_VISIBLE = 0.75  # of an object's pixels
TRIES = 20  # positions tried before an object is left out
OBJECT_COUNTS = np.cumsum([0.20, 0.30, 0.25, 0.25])  # of 1, 2, 3, 4 objects
REPEAT = 0.45  # fraction of the scenes with two or more objects that repeat a name
TILT = 15  # largest angle of an object, in degrees


@dataclass(frozen=True)
class World:
    """What scenes can show. The default is the data set; a smaller world can be learned in minutes.

    Attributes:
        size: How many of ``OBJECTS`` occur, evenly spaced in their list.
        most: Objects in one scene.
    """

    size: int = len(OBJECTS)
    most: int = language.MAX_OBJECTS

    def __post_init__(self):
        if not 10 <= self.size <= len(OBJECTS) or not 1 <= self.most <= language.MAX_OBJECTS:
            raise ValueError(
                f"A world has 10 to {len(OBJECTS)} objects, of which a scene shows 1 to {language.MAX_OBJECTS}, not "
                f"{self.size} and {self.most}."
            )

    @cached_property
    def names(self) -> tuple[str, ...]:
        return OBJECTS[:: len(OBJECTS) // self.size][: self.size]

    @cached_property
    def held_out(self) -> list[tuple[str, str]]:
        """The pairs of its objects that training never shows together."""
        return [pair for pair in sorted(HELD_OUT_PAIRS) if set(pair) <= set(self.names)]


WORLD = World()


@dataclass(frozen=True)
class Scene:
    """An image, its objects in the order in which they were pasted, and what can be said about it."""

    seed: int
    split: str
    size: int
    image: UInt8[np.ndarray, "H W 3"] = field(repr=False, compare=False)
    objects: tuple[SceneObject, ...]
    world: World = field(default=WORLD, repr=False)

    @cached_property
    def examples(self) -> tuple[language.Example, ...]:
        """All prompts about this scene with their answers, the same at every call."""
        rng = np.random.default_rng((SPLITS.index(self.split), self.seed, 1))  # a separate stream
        return language.examples(self.objects, self.size, rng, self.world.names)

    @property
    def captions(self) -> dict[str, tuple[str, ...]]:
        """Kind of caption ("caption", "cap", "describe", if the scene allows it) → its accepted texts."""
        return {e.kind: e.answers for e in self.examples if e.kind in ("caption", "cap", "describe")}

    @property
    def questions(self) -> tuple[language.Example, ...]:
        """The examples whose prompt starts with ``answer en``."""
        return tuple(e for e in self.examples if e.prompt.startswith("answer en "))


@cache
def _textures() -> tuple[Image.Image, ...]:
    paths = sorted((DATA / "images" / "textures").glob("*.png"))
    if not paths:
        raise FileNotFoundError(f"{DATA / 'images' / 'textures'} has no PNG files. Clone the repository again.")
    return tuple(Image.open(path).convert("RGB") for path in paths)


def _background(rng: np.random.Generator, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """Plain, shaded or photographic, a third each. Integer arithmetic, so that all machines agree."""
    kind = rng.integers(3)
    first, second = rng.integers(50, 256, (2, 3))
    if kind == 0:
        return np.full((size, size, 3), first, np.uint8)
    if kind == 1:
        gx, gy = rng.integers(-8, 9, 2)
        steps = np.arange(size)
        ramp = gy * steps[:, None] + gx * steps[None, :]
        ramp -= ramp.min()
        ramp = ramp * 255 // max(1, ramp.max())
        colors = (first + (second - first) * np.arange(256)[:, None] // 255).astype(np.uint8)
        return colors[ramp]
    return _texture_background(rng, size, first)


def _texture_background(rng: np.random.Generator, size: int, tint: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    """A random crop of a photo texture, its contrast lowered and its mean moved toward ``tint``."""
    texture = _textures()[rng.integers(len(_textures()))]
    side = int(rng.integers(texture.width // 2, texture.width + 1))
    x, y = (int(v) for v in rng.integers(0, texture.width - side + 1, 2))
    contrast = int(rng.integers(30, 71))  # percent
    crop = texture.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    levels = (np.arange(256)[None, :] - 110) * contrast // 100 + (110 + tint[:, None]) // 2
    return np.asarray(crop.point(np.clip(levels, 0, 255).reshape(-1).tolist())).copy()


def _paste(image: UInt8[np.ndarray, "H W 3"], sprite: UInt8[np.ndarray, "h w 4"], x: int, y: int) -> None:
    """Paste a premultiplied sprite onto ``image`` in place, its top left corner at (x, y)."""
    part = image[y : y + sprite.shape[0], x : x + sprite.shape[1]]
    through = (255 - sprite[..., 3:]).astype(np.uint16)
    part[...] = sprite[..., :3] + ((part * through + 127) // 255).astype(np.uint8)


def _place(
    rng: np.random.Generator, mask: Bool[np.ndarray, "h w"], visible: list[np.ndarray], totals: list[int], size: int
) -> tuple[int, int] | None:
    """A corner (x, y) for one more object, or None. The second half of the tries can cover parts of earlier objects.

    Args:
        visible: H × W masks of the earlier objects.
        totals: Their areas before anything covered them, in pixels.
    """
    h, w = mask.shape
    corners = rng.integers(0, (size - w + 1, size - h + 1), (TRIES, 2)).tolist()
    for attempt, (x, y) in enumerate(corners):
        share = 1.0 if attempt < TRIES // 2 else MIN_VISIBLE
        covered = [v[y : y + h, x : x + w] & mask for v in visible]
        if not any(c.any() for c in covered):
            return x, y
        left = [np.count_nonzero(v) - np.count_nonzero(c) for v, c in zip(visible, covered, strict=True)]
        if all(n >= share * total for n, total in zip(left, totals, strict=True)):
            return x, y
    return None


def _choose_names(rng: np.random.Generator, split: str, world: World) -> list[str]:
    """One to four names. In ``pairs`` they start with a held-out pair, elsewhere they contain none."""
    count = min(1 + int(np.searchsorted(OBJECT_COUNTS, rng.random(), side="right")), world.most)
    names: list[str] = []
    if split == "pairs":
        count = max(count, 2)
        names = list(world.held_out[rng.integers(len(world.held_out))])
    repeats = int(rng.integers(2, count + 1)) if count > 1 and rng.random() < REPEAT else 1
    if names:
        names += [names[rng.integers(2)]] * min(repeats - 1, count - 2)
    while len(names) < count:
        name = world.names[rng.integers(len(world.names))]
        if name not in names and (split == "pairs" or PARTNERS[name].isdisjoint(names)):
            names += [name] * (repeats if not names else 1)
    return names


def _compose(
    rng: np.random.Generator,
    split: str,
    size: int,
    world: World,
    augment: tuple[str, ...],
    change: np.random.Generator,
) -> tuple[np.ndarray, list[SceneObject]]:
    """Paste the chosen objects one after the other. One that does not fit anywhere is left out."""
    names = _choose_names(rng, split, world)
    image = _background(rng, size)
    kept: list[tuple[str, str]] = []
    poses: list[tuple[int, bool]] = []
    visible: list[np.ndarray] = []
    totals: list[int] = []
    for name in names:
        artists = artists_of(name, split)
        artist = artists[rng.integers(len(artists))]
        side = round(size * (SMALLEST + (LARGEST - SMALLEST) * rng.random()))
        angle, mirror = int(rng.integers(-TILT, TILT + 1)), bool(rng.random() < 0.5 and can_be_mirrored(name))
        stretch = augmentation.stretch(change) if "stretch" in augment else 1.0
        sprite = draw_sprite(name, artist, side, angle, mirror, stretch)
        sprite = augmentation.apply(augmentation.SPRITE_CHANGES, augment, change, sprite)
        mask = sprite[..., 3] > 127
        corner = _place(rng, mask, visible, totals, size)
        if corner is None:
            continue
        x, y = corner
        window = (slice(y, y + mask.shape[0]), slice(x, x + mask.shape[1]))
        _paste(image, sprite, x, y)
        for v in visible:
            v[window] &= ~mask
        own = np.zeros((size, size), bool)
        own[window] = mask
        kept.append((name, artist))
        poses.append((angle, mirror))
        visible.append(own)
        totals.append(int(mask.sum()))
    image = augmentation.apply(augmentation.IMAGE_CHANGES, augment, change, image)
    parts = zip(kept, visible, poses, strict=True)
    return image, [SceneObject(*who, mask_box(v), v, *pose) for who, v, pose in parts]


def mask_box(mask: Bool[np.ndarray, "H W"]) -> tuple[int, int, int, int]:
    """Tight half-open box (x0, y0, x1, y1) around the true pixels, in pixels.

    Raises:
        ValueError: If there are none.
    """
    rows, columns = mask.any(1), mask.any(0)
    if not rows.any():
        raise ValueError("The mask has no true pixel, so it has no box. Pass the mask of a visible object.")
    y0, x0 = int(rows.argmax()), int(columns.argmax())
    return x0, y0, len(columns) - int(columns[::-1].argmax()), len(rows) - int(rows[::-1].argmax())


def make_scene(
    seed: int, split: str = "train", size: int = 112, world: World = WORLD, augment: tuple[str, ...] = ()
) -> Scene:
    """The scene of a seed, the same on every machine.

    Another size gives another layout of the same names, not the same image enlarged.

    Args:
        seed: An integer, 0 or more.
        split: One of ``SPLITS``.
        size: Of each side in pixels, ``MIN_SIZE`` to ``MAX_SIZE``.
        world: What it can show.
        augment: Some of ``augmentation.AUGMENTATIONS``, to change what another artist would draw differently.

    Raises:
        ValueError: If an argument is something else.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}.")
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be an integer, 0 or more, not {seed!r}.")
    if not isinstance(size, int | np.integer) or isinstance(size, bool) or not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size must be an integer from {MIN_SIZE} to {MAX_SIZE} pixels, not {size!r}.")
    if unknown := set(augment) - set(augmentation.AUGMENTATIONS):
        raise ValueError(f"augment must be among {', '.join(augmentation.AUGMENTATIONS)}, not {min(unknown)!r}.")
    seed, size = int(seed), int(size)
    rng, change = (np.random.default_rng((SPLITS.index(split), seed, *stream)) for stream in ((), (2,)))
    while True:  # again only if one of a held-out pair did not fit
        image, objects = _compose(rng, split, size, world, augment, change)
        names = {o.name for o in objects}
        if split != "pairs" or any(PARTNERS[n] & names for n in names):
            return Scene(seed, split, size, image, tuple(objects), world)


def planned_names(seed: int, split: str = "train", world: World = WORLD) -> list[str]:
    """The objects of the scene of this seed, without rendering it. Now and then one of them does not fit."""
    return _choose_names(np.random.default_rng((SPLITS.index(split), int(seed))), split, world)


def texts(seeds: Iterable[int], split: str = "train", world: World = WORLD) -> Iterator[str]:
    """Every prompt and every training target of these seeds: the corpus to train a tokenizer on.

    Without ``segment``, which would only repeat the words of ``detect``.
    """
    for seed in seeds:
        for example in (e for e in make_scene(seed, split, world=world).examples if e.kind != "segment"):
            yield example.prompt
            if example.answers[0]:
                yield example.answers[0]
