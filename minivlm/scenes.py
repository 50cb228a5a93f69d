"""Emoji scenes: an endless, seeded data set of pictures with captions, questions, boxes and masks.

`make_scene(seed)` pastes one to four emoji on a plain, shaded or photographic background and knows what it did, so
every caption, answer and box is exact. The same seed gives the same scene everywhere (the same bytes with the same
versions of numpy and Pillow). Four splits:

- `train`, `validation`: two training artists, disjoint streams; some pairs of objects (about 5%) never meet;
- `pairs`: every picture holds at least one of those never-seen-together pairs;
- `artist`: every object is drawn by an artist that training never shows.

Letters: H, W = height and width of the picture in pixels (both `size`); h, w = of one pasted object.
Boxes are (x0, y0, x1, y1) in pixels, half open, origin at the top left. Prompts are PaliGemma's task prefixes.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from minivlm.locations import Detection, format_boxes

DATA = Path(__file__).resolve().parent.parent / "data"


def _read_index() -> dict:
    path = DATA / "emoji" / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: clone minivlm's repository and run pip install -e . in it.")
    return json.loads(path.read_text(encoding="utf-8"))


_INDEX = _read_index()
_ENTRY = {entry["name"]: entry for entry in _INDEX["objects"]}

SPLITS = ("train", "validation", "pairs", "artist")
OBJECTS: tuple[str, ...] = tuple(_ENTRY)
TRAIN_ARTISTS = tuple(a["name"] for a in _INDEX["artists"] if a["role"] == "train")
UNSEEN_ARTISTS = tuple(a["name"] for a in _INDEX["artists"] if a["role"] == "unseen")
MAX_OBJECTS = 4
MIN_SIZE, MAX_SIZE = 48, 896

# Layout. Lengths are fractions of the picture's side (24 to 52 pixels at 112).
SMALLEST, LARGEST = 24 / 112, 52 / 112
MIN_VISIBLE = 0.75  # of an object's own pixels
TRIES = 20  # positions tried before an object is left out
OBJECT_COUNTS = np.cumsum([0.20, 0.30, 0.25, 0.25])  # of 1, 2, 3, 4 objects
REPEAT = 0.45  # of the scenes with two or more objects, how many repeat a name
TILT = 15  # degrees

# Margins of the language, as fractions of the side: what is closer than this is not asked or said.
ORDER_GAP = 0.04  # between the centres of neighbours in "from left to right"
CELL_MARGIN = 0.03  # from a centre to a border of its 3 x 3 cell
CELL_CLEAR = 0.08  # from a cell to any other object's centre, for "what is at the top left?"
DIRECTION = 0.10  # a centre this much further left *is* left
OPPOSITE = 0.05  # a centre this much further right is clearly *not* left
DOMINANCE = 1.5  # |dx| over |dy| (or the inverse) for "to the left of" ("above")

NUMBERS = ("zero", "one", "two", "three", "four")
CELLS = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def plural(name: str) -> str:
    """`plural("leaf") == "leaves"`. ValueError for a name that is not in OBJECTS."""
    return _entry(name)["plural"]


def with_article(name: str) -> str:
    """`with_article("apple") == "an apple"`. ValueError for a name that is not in OBJECTS."""
    return f"{_entry(name)['article']} {name}"


def count_phrase(name: str, count: int) -> str:
    """`a cat`, `two cats`, … up to four. ValueError for other counts or an unknown name."""
    if not 1 <= count <= MAX_OBJECTS:
        raise ValueError(f"count is {count}; a scene holds 1 to {MAX_OBJECTS} objects.")
    return with_article(name) if count == 1 else f"{NUMBERS[count]} {plural(name)}"


def _entry(name: str) -> dict:
    if name not in _ENTRY:
        raise ValueError(f"{name!r} is not an object of the data set; see minivlm.scenes.OBJECTS.")
    return _ENTRY[name]


def _held_out(a: str, b: str) -> bool:
    """Whether a hash of the two names falls into one twentieth of its range."""
    return a != b and zlib.crc32("+".join(sorted((a, b))).encode()) % 20 == 0


HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    pair for pair in combinations(sorted(OBJECTS), 2) if _held_out(*pair)
)
_HELD_OUT_LIST = sorted(HELD_OUT_PAIRS)
_PARTNERS = {n: frozenset(b if a == n else a for a, b in HELD_OUT_PAIRS if n in (a, b)) for n in OBJECTS}


@dataclass(frozen=True)
class SceneObject:
    """One object as it can be seen: `box` is tight around `mask`, and `mask` leaves out what later objects cover.

    `angle` and `mirrored` are its pose: how `draw_sprite` drew it.
    """

    name: str
    artist: str
    box: tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, half open
    mask: Bool[np.ndarray, "H W"] = field(repr=False, compare=False)
    angle: int = 0  # degrees, counter-clockwise
    mirrored: bool = False

    @property
    def center(self) -> tuple[float, float]:
        """Centre of the box (x, y), in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Example:
    """A prompt and its answers: `answers[0]` is the training target, all of them are right.

    Of `segment` it is the boxes alone: what codes a mask has, only a VQ-VAE knows (`segment_target`).
    """

    kind: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """A picture, the objects in it in the order they were pasted, and what can be said about it."""

    seed: int
    split: str
    size: int
    image: UInt8[np.ndarray, "H W 3"] = field(repr=False, compare=False)
    objects: tuple[SceneObject, ...]

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """Everything asked about this scene, the same at every call."""
        return _examples(self)

    @property
    def captions(self) -> dict[str, tuple[str, ...]]:
        """Kind of caption ("caption", "cap", "describe", where the scene allows it) → its accepted texts."""
        return {e.kind: e.answers for e in self.examples if e.kind in ("caption", "cap", "describe")}

    @property
    def questions(self) -> tuple[Example, ...]:
        """The examples whose prompt starts with "answer en "."""
        return tuple(e for e in self.examples if e.prompt.startswith("answer en "))


# --------------------------------------------------------------------------------------------------------------- pixels


@cache
def _sprites(artist: str) -> dict[str, Image.Image]:
    """Name → 64 x 64 picture with premultiplied alpha (colours never leak from transparent pixels when resampled)."""
    cell, columns = _INDEX["cell"], _INDEX["columns"]
    with Image.open(DATA / "emoji" / f"{artist}.png") as file:
        sheet = file.convert("RGBA").convert("RGBa")
    corners = [(k % columns * cell, k // columns * cell) for k in range(len(OBJECTS))]
    return {n: sheet.crop((x, y, x + cell, y + cell)) for n, (x, y) in zip(OBJECTS, corners, strict=True)}


@cache
def _textures() -> tuple[Image.Image, ...]:
    paths = sorted((DATA / "images" / "textures").glob("*.png"))
    if not paths:
        raise FileNotFoundError(f"{DATA / 'images' / 'textures'} holds no PNG files: clone the repository again.")
    return tuple(Image.open(path).convert("RGB") for path in paths)


def draw_sprite(name: str, artist: str, side: int, angle: int = 0, mirror: bool = False) -> UInt8[np.ndarray, "h w 4"]:
    """One object, cut to its own outline, with premultiplied alpha.

    `side` is the longer of h and w in pixels; `angle` turns counter-clockwise, in whole degrees.
    ValueError for an unknown name or artist, or a side below 1.
    """
    _entry(name)
    if artist not in TRAIN_ARTISTS + UNSEEN_ARTISTS:
        raise ValueError(f"artist is {artist!r}; choose one of {', '.join(TRAIN_ARTISTS + UNSEEN_ARTISTS)}.")
    if side < 1:
        raise ValueError(f"side is {side}; give at least 1 pixel.")
    sprite = _sprites(artist)[name]
    if mirror:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        sprite = sprite.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    outline = sprite.getchannel("a").getbbox()
    width, height = outline[2] - outline[0], outline[3] - outline[1]
    scale = side / max(width, height)
    target = (max(1, round(width * scale)), max(1, round(height * scale)))
    # HAMMING has no negative weights, so colour stays below alpha and the paste below cannot overflow.
    return np.asarray(sprite.resize(target, Image.Resampling.HAMMING, box=outline))


def _background(rng: np.random.Generator, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """Plain, shaded or photographic, a third each. Whole-number arithmetic, so that all machines agree."""
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
        colours = (first + (second - first) * np.arange(256)[:, None] // 255).astype(np.uint8)
        return colours[ramp]
    return _texture_background(rng, size, first)


def _texture_background(rng: np.random.Generator, size: int, tint: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    """A random crop of a photo texture, its contrast lowered and its mean moved towards `tint`."""
    texture = _textures()[rng.integers(len(_textures()))]
    side = int(rng.integers(texture.width // 2, texture.width + 1))
    x, y = (int(v) for v in rng.integers(0, texture.width - side + 1, 2))
    contrast = int(rng.integers(30, 71))  # per cent
    crop = texture.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    levels = (np.arange(256)[None, :] - 110) * contrast // 100 + (110 + tint[:, None]) // 2
    return np.asarray(crop.point(np.clip(levels, 0, 255).reshape(-1).tolist())).copy()


def _paste(image: UInt8[np.ndarray, "H W 3"], sprite: UInt8[np.ndarray, "h w 4"], x: int, y: int) -> None:
    """Lay a premultiplied sprite over `image` in place, its top left corner at (x, y)."""
    part = image[y : y + sprite.shape[0], x : x + sprite.shape[1]]
    through = (255 - sprite[..., 3:]).astype(np.uint16)
    part[...] = sprite[..., :3] + ((part * through + 127) // 255).astype(np.uint8)


def _place(
    rng: np.random.Generator, mask: Bool[np.ndarray, "h w"], visible: list[np.ndarray], totals: list[int], size: int
) -> tuple[int, int] | None:
    """A corner (x, y) for one more object, or None. The first half of the tries covers nothing, the second some.

    `visible`: H x W masks of the earlier objects; `totals`: their areas when nothing covered them, in pixels.
    """
    h, w = mask.shape
    corners = rng.integers(0, (size - w + 1, size - h + 1), (TRIES, 2)).tolist()
    for attempt, (x, y) in enumerate(corners):
        share = 1.0 if attempt < TRIES // 2 else MIN_VISIBLE
        seen = [v[y : y + h, x : x + w] & mask for v in visible]  # what this place would cover
        if not any(s.any() for s in seen):
            return x, y
        left = [np.count_nonzero(v) - np.count_nonzero(s) for v, s in zip(visible, seen, strict=True)]
        if all(n >= share * total for n, total in zip(left, totals, strict=True)):
            return x, y
    return None


def _choose_names(rng: np.random.Generator, split: str) -> list[str]:
    """One to four names: in `pairs` they start with a held-out pair, elsewhere they contain none."""
    count = 1 + int(np.searchsorted(OBJECT_COUNTS, rng.random(), side="right"))
    names: list[str] = []
    if split == "pairs":
        count = max(count, 2)
        names = list(_HELD_OUT_LIST[rng.integers(len(_HELD_OUT_LIST))])
    repeats = int(rng.integers(2, count + 1)) if count > 1 and rng.random() < REPEAT else 1
    if names:
        names += [names[rng.integers(2)]] * min(repeats - 1, count - 2)
    while len(names) < count:
        name = OBJECTS[rng.integers(len(OBJECTS))]
        if name not in names and (split == "pairs" or _PARTNERS[name].isdisjoint(names)):
            names += [name] * (repeats if not names else 1)
    return names


def _compose(rng: np.random.Generator, split: str, size: int) -> tuple[np.ndarray, list[SceneObject]]:
    """Paste the chosen objects one after the other; what finds no place is left out."""
    names = _choose_names(rng, split)
    artists = UNSEEN_ARTISTS if split == "artist" else TRAIN_ARTISTS
    image = _background(rng, size)
    kept: list[tuple[str, str]] = []
    poses: list[tuple[int, bool]] = []
    visible: list[np.ndarray] = []
    totals: list[int] = []
    for name in names:
        artist = artists[rng.integers(len(artists))]
        side = round(size * (SMALLEST + (LARGEST - SMALLEST) * rng.random()))
        angle, mirror = int(rng.integers(-TILT, TILT + 1)), bool(rng.random() < 0.5 and _ENTRY[name]["mirror"])
        sprite = draw_sprite(name, artist, side, angle, mirror)
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
    parts = zip(kept, visible, poses, strict=True)
    return image, [SceneObject(*who, mask_box(v), v, *pose) for who, v, pose in parts]


def mask_box(mask: Bool[np.ndarray, "H W"]) -> tuple[int, int, int, int]:
    """Tight half-open box (x0, y0, x1, y1) around the true pixels, in pixels. ValueError if there are none."""
    rows, columns = mask.any(1), mask.any(0)
    if not rows.any():
        raise ValueError("The mask has no true pixel, so it has no box; pass a mask of something visible.")
    y0, x0 = int(rows.argmax()), int(columns.argmax())
    return x0, y0, len(columns) - int(columns[::-1].argmax()), len(rows) - int(rows[::-1].argmax())


def make_scene(seed: int, split: str = "train", size: int = 112) -> Scene:
    """The scene of this seed: a `size` x `size` RGB picture with its objects, the same on every machine.

    Another size is another layout of the same names, not the same picture enlarged.
    seed: a whole number, 0 or more; split: one of SPLITS; size: pixels, MIN_SIZE to MAX_SIZE.
    ValueError where one of them is something else.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}.")
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed is {seed!r}; give a whole number, 0 or more.")
    if not isinstance(size, int | np.integer) or isinstance(size, bool) or not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size is {size!r}; give a whole number of pixels from {MIN_SIZE} to {MAX_SIZE}.")
    seed, size = int(seed), int(size)
    rng = np.random.default_rng((SPLITS.index(split), seed))
    while True:  # a second round only where a held-out pair found no place
        image, objects = _compose(rng, split, size)
        names = {o.name for o in objects}
        if split != "pairs" or any(_PARTNERS[n] & names for n in names):
            return Scene(seed, split, size, image, tuple(objects))


def planned_count(seed: int, split: str = "train") -> int:
    """How many objects the scene of this seed sets out to show, without drawing it; now and then one finds no place."""
    return len(_choose_names(np.random.default_rng((SPLITS.index(split), int(seed))), split))


# ------------------------------------------------------------------------------------------------------------- language


def join_phrases(phrases: list[str]) -> str:
    """`["a", "b", "c"]` → "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def count_caption(names: Iterable[str]) -> str:
    """Names in reading order → "a cat and two dogs": each class once, where it first appears."""
    return join_phrases([count_phrase(name, count) for name, count in Counter(names).items()])


_PHRASES = {count_phrase(name, n): (name, n) for name in OBJECTS for n in range(1, MAX_OBJECTS + 1)}


def parse_caption(text: str) -> Counter | None:
    """Read "a cat and two dogs" as Counter(dog=2, cat=1); None where the text is not such a caption."""
    counts: Counter = Counter()
    for piece in re.split(", | and ", text.strip()):
        if piece not in _PHRASES:
            return None
        name, count = _PHRASES[piece]
        counts[name] += count
    return counts


def same_caption(predicted: str, expected: str) -> bool:
    """Whether two `caption en` texts say the same, in whatever order. False where one cannot be understood."""
    counts = parse_caption(predicted)
    return counts is not None and counts == parse_caption(expected)


def cell_of(center: tuple[float, float], size: int) -> str | None:
    """Name of the 3 x 3 cell that holds a point (x, y); None within CELL_MARGIN of a border between cells."""
    x, y = center[0] / size, center[1] / size
    if any(abs(v - border) < CELL_MARGIN for v in (x, y) for border in (1 / 3, 2 / 3)):
        return None
    return CELLS[int(y * 3)][int(x * 3)]


def at_cell(cell: str) -> str:
    """The place of a cell: "top left" → "at the top left", "center" → "in the center"."""
    return f"{'in' if cell == 'center' else 'at'} the {cell}"


def asked_for(objects: Iterable[SceneObject], classes: Iterable[str]) -> list[SceneObject]:
    """The objects of these classes: classes in the order asked, from left to right within a class."""
    by_x = sorted(objects, key=lambda o: (o.box[0], o.box[1]))
    return [o for name in classes for o in by_x if o.name == name]


def detect_target(objects: Iterable[SceneObject], classes: Iterable[str], size: int) -> str:
    """What `detect a ; b` should say."""
    return format_boxes([Detection(o.name, o.box) for o in asked_for(objects, classes)], size, size)


def segment_target(objects: Iterable[SceneObject], classes: Iterable[str], size: int, codes_of: Callable) -> str:
    """What `segment a ; b` should say: the same boxes, each with the codes of its mask.

    `codes_of(masks, boxes)`, such as `vqvae.MaskVQVAE.codes_of`, gives each mask's 16.
    """
    found = asked_for(objects, classes)
    codes = codes_of([o.mask for o in found], [o.box for o in found])
    return format_boxes([Detection(o.name, o.box, c) for o, c in zip(found, codes, strict=True)], size, size)


def relation_answer(objects: tuple[SceneObject, ...], name: str, direction: str, size: int) -> str | None:
    """Answer to "what is {direction} the {name}?", or None where it would be ambiguous.

    With offsets of centres along the direction, in fractions of the side: `name` must occur once, exactly one other
    object lies 0.10 or more that way (DIRECTION), and all others lie 0.05 or more the opposite way (OPPOSITE).
    """
    reference = [o for o in objects if o.name == name]
    if len(reference) != 1:
        return None
    sx, sy = DIRECTIONS[direction]
    x, y = reference[0].center
    others = [o for o in objects if o is not reference[0]]
    offsets = [(sx * (o.center[0] - x) + sy * (o.center[1] - y)) / size for o in others]
    there = [o.name for o, offset in zip(others, offsets, strict=True) if offset >= DIRECTION]
    clear = all(offset >= DIRECTION or offset <= -OPPOSITE for offset in offsets)
    return there[0] if len(there) == 1 and clear else None


def _reading_order(objects: Iterable[SceneObject]) -> list[SceneObject]:
    return sorted(objects, key=lambda o: o.center)


def _ordered_clearly(ordered: list[SceneObject], size: int) -> bool:
    return all(b.center[0] - a.center[0] >= ORDER_GAP * size for a, b in pairwise(ordered))


def _describe(ordered: list[SceneObject], size: int) -> tuple[str, ...]:
    """The relation phrase and its inverse ("a cat above a dog", "a dog below a cat"); empty where ambiguous."""
    first = with_article(ordered[0].name)
    if len(ordered) == 1:
        cell = cell_of(ordered[0].center, size)
        return (f"{first} {at_cell(cell)}",) if cell else ()
    if not _ordered_clearly(ordered[:3], size):
        return ()
    second = with_article(ordered[1].name)
    dx, dy = (b - a for a, b in zip(ordered[0].center, ordered[1].center, strict=True))
    if dx >= max(DIRECTION * size, DOMINANCE * abs(dy)):
        words = ("to the left of", "to the right of")
    elif abs(dy) >= max(DIRECTION * size, DOMINANCE * dx):
        words = ("above", "below") if dy > 0 else ("below", "above")
    else:
        return ()
    rest = f", with {count_caption(o.name for o in ordered[2:])}" if len(ordered) > 2 else ""
    return (f"{first} {words[0]} {second}{rest}", f"{second} {words[1]} {first}{rest}")


def _captions(objects: tuple[SceneObject, ...], size: int) -> Iterator[Example]:
    ordered = _reading_order(objects)
    yield Example("caption", "caption en", (count_caption(o.name for o in ordered),))
    if _ordered_clearly(ordered, size):
        listed = join_phrases([with_article(o.name) for o in ordered])
        yield Example("cap", "cap en", (f"from left to right: {listed}",))
    if described := _describe(ordered, size):
        yield Example("describe", "describe en", described)


def _absent(rng: np.random.Generator, present: Iterable[str]) -> str:
    """A name that the scene lacks and that may appear beside all of its objects."""
    while True:
        name = OBJECTS[rng.integers(len(OBJECTS))]
        if name not in present and _PARTNERS[name].isdisjoint(present):
            return name


def _some(rng: np.random.Generator, examples: list[Example], most: int) -> list[Example]:
    """At most `most` of the examples, at random."""
    if len(examples) <= most:
        return examples
    return [examples[i] for i in rng.permutation(len(examples))[:most]]


def _lonely_in_cell(objects: tuple[SceneObject, ...], index: int, size: int) -> str | None:
    """The cell of object `index`, if all other centres are CELL_CLEAR or more away from that cell."""
    cell = cell_of(objects[index].center, size)
    if cell is None:
        return None
    column, row = (int(v / size * 3) for v in objects[index].center)
    for other in objects[:index] + objects[index + 1 :]:
        x, y = (v / size for v in other.center)
        away = max(column / 3 - x, x - (column + 1) / 3, row / 3 - y, y - (row + 1) / 3)
        if away < CELL_CLEAR:
            return None
    return cell


def _where_and_what(
    objects: tuple[SceneObject, ...], counts: Counter, rng: np.random.Generator, size: int
) -> list[Example]:
    what, where = [], []
    for index, o in enumerate(objects):
        if cell := _lonely_in_cell(objects, index, size):
            what.append(Example("what", f"answer en what is {at_cell(cell)}?", (o.name,)))
        if counts[o.name] == 1 and (cell := cell_of(o.center, size)):
            where.append(Example("where", f"answer en where is the {o.name}?", (cell,)))
    chosen = _some(rng, what, 2 if len(objects) > 1 else 1)
    if len(objects) == 1:
        chosen = [*chosen, Example("what", "answer en what is this?", (objects[0].name,))]
    return chosen + _some(rng, where, 2)


def _counting(objects: tuple[SceneObject, ...], counts: Counter, rng: np.random.Generator) -> list[Example]:
    asked = _absent(rng, counts) if rng.random() < 0.2 else objects[rng.integers(len(objects))].name
    examples = [Example("how many", f"answer en how many {plural(asked)} are there?", (str(counts[asked]),))]
    if rng.random() < 0.5:
        examples.append(Example("how many", "answer en how many objects are there?", (str(len(objects)),)))
    names = list(counts)
    present, absent = names[rng.integers(len(names))], _absent(rng, counts)
    for name, answer in ((present, "yes"), (absent, "no")):
        examples.append(Example("is there", f"answer en is there {with_article(name)}?", (answer,)))
    return examples


def _relations(objects: tuple[SceneObject, ...], counts: Counter, rng: np.random.Generator, size: int) -> list[Example]:
    found = []
    for name in counts:
        for direction in DIRECTIONS:
            if answer := relation_answer(objects, name, direction, size):
                found.append(Example("relation", f"answer en what is {direction} the {name}?", (answer,)))
    return _some(rng, found, 2)


def _pointing(
    task: str, objects: tuple[SceneObject, ...], counts: Counter, rng: np.random.Generator, size: int
) -> Iterator[Example]:
    """One class, then two or more where the scene has them. 8% of the queries name a class that is not there."""
    names = list(counts)
    single = _absent(rng, counts) if rng.random() < 0.08 else names[rng.integers(len(names))]
    queries = [[single]]
    if len(names) > 1:
        several = [names[i] for i in rng.permutation(len(names))[: rng.integers(2, len(names) + 1)]]
        if rng.random() < 0.08:
            several[rng.integers(len(several))] = _absent(rng, counts)
        queries.append(several)
    for classes in queries:
        yield Example(task, f"{task} {' ; '.join(classes)}", (detect_target(objects, classes, size),))


def _examples(scene: Scene) -> tuple[Example, ...]:
    """Captions, then questions, then boxes, then masks, drawn from the scene's own second stream of random numbers."""
    rng = np.random.default_rng((SPLITS.index(scene.split), scene.seed, 1))
    objects, size = scene.objects, scene.size
    counts = Counter(o.name for o in objects)
    return (
        *_captions(objects, size),
        *_where_and_what(objects, counts, rng, size),
        *_counting(objects, counts, rng),
        *_relations(objects, counts, rng, size),
        *_pointing("detect", objects, counts, rng, size),
        *_pointing("segment", objects, counts, rng, size),
    )


def texts(seeds: Iterable[int], split: str = "train") -> Iterator[str]:
    """Every prompt and every training target of these seeds: the corpus that a tokenizer learns from.

    But for `segment`, which would only repeat what `detect` says.
    """
    for seed in seeds:
        for example in (e for e in make_scene(seed, split).examples if e.kind != "segment"):
            yield example.prompt
            if example.answers[0]:
                yield example.answers[0]
