"""The 100 objects of the emoji scenes: names, artists, sprites, and the pairs that training never shows together.

    H, W height and width of an image, h, w of a sprite, in pixels

Sprites are stored in one sheet per artist in ``data/emoji``; ``data/emoji/index.json`` lists objects and artists.
"""

import json
import zlib
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from minivlm.hub import DATA


def _read_index() -> dict:
    path = DATA / "emoji" / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Clone minivlm's repository and run pip install -e . in it.")
    return json.loads(path.read_text(encoding="utf-8"))


_INDEX = _read_index()
_ENTRY = {entry["name"]: entry for entry in _INDEX["objects"]}
SPLITS = ("train", "validation", "pairs", "artist", "development")
OBJECTS: tuple[str, ...] = tuple(_ENTRY)
TRAIN_ARTISTS = tuple(a["name"] for a in _INDEX["artists"] if a["role"] == "train")
DEVELOPMENT_ARTISTS = tuple(a["name"] for a in _INDEX["artists"] if a["role"] == "development")
UNSEEN_ARTISTS = tuple(a["name"] for a in _INDEX["artists"] if a["role"] == "unseen")
ARTISTS = tuple(a["name"] for a in _INDEX["artists"])
_MISSING = {a["name"]: frozenset(a["missing"]) for a in _INDEX["artists"]}


def plural(name: str) -> str:
    """``plural("leaf") == "leaves"``.

    Raises:
        ValueError: If the name is not in ``OBJECTS``.
    """
    return _entry(name)["plural"]


def with_article(name: str) -> str:
    """``with_article("apple") == "an apple"``.

    Raises:
        ValueError: If the name is not in ``OBJECTS``.
    """
    return f"{_entry(name)['article']} {name}"


def can_be_mirrored(name: str) -> bool:
    """Whether a mirrored image of the object is still right: not so for digits and clock hands."""
    return _entry(name)["mirror"]


def has_drawn(artist: str, name: str) -> bool:
    """Whether an artist has drawn an object. Some sets of emoji are older than some objects."""
    return name not in _MISSING[artist]


@cache
def artists_of(name: str, split: str) -> tuple[str, ...]:
    """The artists of a split who drew an object."""
    artists = {"artist": UNSEEN_ARTISTS, "development": DEVELOPMENT_ARTISTS}.get(split, TRAIN_ARTISTS)
    return tuple(artist for artist in artists if has_drawn(artist, name))


def _entry(name: str) -> dict:
    if name not in _ENTRY:
        raise ValueError(f"{name!r} is not an object of the data set. minivlm.emoji.OBJECTS lists them.")
    return _ENTRY[name]


def _held_out(a: str, b: str) -> bool:
    """Whether a hash of the two names is in one twentieth of its range."""
    return a != b and zlib.crc32("+".join(sorted((a, b))).encode()) % 20 == 0


HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    pair for pair in combinations(sorted(OBJECTS), 2) if _held_out(*pair)
)
PARTNERS = {n: frozenset(b if a == n else a for a, b in HELD_OUT_PAIRS if n in (a, b)) for n in OBJECTS}


@dataclass(frozen=True)
class SceneObject:
    """The visible part of one object.

    Attributes:
        box: Tight around the mask: x0, y0, x1, y1 in pixels, half open.
        mask: Its pixels, without those that later objects cover.
        angle: Of its sprite in degrees, counterclockwise.
        mirrored: Whether its sprite is mirrored.
    """

    name: str
    artist: str
    box: tuple[int, int, int, int]
    mask: Bool[np.ndarray, "H W"] = field(repr=False, compare=False)
    angle: int = 0
    mirrored: bool = False

    @property
    def center(self) -> tuple[float, float]:
        """Center of the box (x, y), in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@cache
def _sprites(artist: str) -> dict[str, Image.Image]:
    """Name → 64 × 64 image with premultiplied alpha, so that resampling mixes in no color of transparent pixels."""
    cell, columns = _INDEX["cell"], _INDEX["columns"]
    with Image.open(DATA / "emoji" / f"{artist}.png") as file:
        sheet = file.convert("RGBA").convert("RGBa")
    corners = [(k % columns * cell, k // columns * cell) for k in range(len(OBJECTS))]
    return {n: sheet.crop((x, y, x + cell, y + cell)) for n, (x, y) in zip(OBJECTS, corners, strict=True)}


def draw_sprite(
    name: str, artist: str, side: int, angle: int = 0, mirror: bool = False, stretch: float = 1.0
) -> UInt8[np.ndarray, "h w 4"]:
    """One object, cropped to its outline, with premultiplied alpha.

    Args:
        side: The longer of h and w, in pixels.
        angle: In degrees, counterclockwise.
        stretch: Factor of the width against the height.

    Raises:
        ValueError: If the name or the artist is unknown, the artist has not drawn it, or ``side`` is below 1.
    """
    _entry(name)
    if artist not in ARTISTS:
        raise ValueError(f"artist must be one of {', '.join(ARTISTS)}, not {artist!r}.")
    if not has_drawn(artist, name):
        raise ValueError(f"The artist {artist!r} has not drawn {with_article(name)}. Choose another artist.")
    if side < 1:
        raise ValueError(f"side must be at least 1 pixel, not {side}.")
    sprite = _sprites(artist)[name]
    if mirror:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        sprite = sprite.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    outline = sprite.getchannel("a").getbbox()
    width, height = (outline[2] - outline[0]) * stretch, outline[3] - outline[1]
    scale = side / max(width, height)
    target = (max(1, round(width * scale)), max(1, round(height * scale)))
    # HAMMING has no negative weights, so color stays below alpha and the paste below cannot overflow.
    return np.asarray(sprite.resize(target, Image.Resampling.HAMMING, box=outline))
