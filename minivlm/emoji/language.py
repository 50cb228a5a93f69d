"""What can be said about a scene: captions, questions with answers, and targets for boxes and masks.

Every text is exact, since the objects of a scene are known. What is ambiguous by the margins below is left out. Prompts
have PaliGemma's task prefixes.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minivlm.emoji.objects import OBJECTS, PARTNERS, SceneObject, plural, with_article
from minivlm.locations import Detection, format_detections

MAX_OBJECTS = 4  # in one scene

# Margins, as fractions of the image's side. What is closer than this is not asked or said.
ORDER_GAP = 0.04  # between the centers of neighbors in "from left to right"
CELL_MARGIN = 0.03  # from a center to a border of its 3 × 3 cell
CELL_CLEAR = 0.08  # from a cell to any other object's center, for "what is at the top left?"
DIRECTION = 0.10  # a center this much further left *is* left
OPPOSITE = 0.05  # a center this much further right is clearly *not* left
DOMINANCE = 1.5  # |dx| over |dy| (or the inverse) for "to the left of" ("above")

NUMBERS = ("zero", "one", "two", "three", "four")
CELLS = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class Example:
    """A prompt and its correct answers, of which the first is the training target.

    Answers of ``segment`` have boxes only. The codes of a mask depend on a VQ-VAE (``segment_target``).
    """

    kind: str
    prompt: str
    answers: tuple[str, ...]


def count_phrase(name: str, count: int) -> str:
    """ "a cat", "two cats", … up to four.

    Raises:
        ValueError: If the count is another or the name is unknown.
    """
    if not 1 <= count <= MAX_OBJECTS:
        raise ValueError(f"count must be from 1 to {MAX_OBJECTS}, the most objects in a scene, not {count}.")
    return with_article(name) if count == 1 else f"{NUMBERS[count]} {plural(name)}"


def join_phrases(phrases: list[str]) -> str:
    """["a", "b", "c"] → "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def count_caption(names: Iterable[str]) -> str:
    """Names in reading order → "a cat and two dogs": each class once, where it first appears."""
    return join_phrases([count_phrase(name, count) for name, count in Counter(names).items()])


_PHRASES = {count_phrase(name, n): (name, n) for name in OBJECTS for n in range(1, MAX_OBJECTS + 1)}


def parse_caption(text: str) -> Counter | None:
    """Parse "a cat and two dogs" into Counter(dog=2, cat=1). None if the text is not such a caption."""
    counts: Counter = Counter()
    for phrase in re.split(", | and ", text.strip()):
        if phrase not in _PHRASES:
            return None
        name, count = _PHRASES[phrase]
        counts[name] += count
    return counts


def same_caption(predicted: str, expected: str) -> bool:
    """Whether two ``caption en`` texts say the same, in any order. False if one cannot be parsed."""
    counts = parse_caption(predicted)
    return counts is not None and counts == parse_caption(expected)


def cell_of(center: tuple[float, float], size: int) -> str | None:
    """Name of the 3 × 3 cell that contains a point (x, y). None within ``CELL_MARGIN`` of a border between cells."""
    x, y = center[0] / size, center[1] / size
    if any(abs(v - border) < CELL_MARGIN for v in (x, y) for border in (1 / 3, 2 / 3)):
        return None
    return CELLS[int(y * 3)][int(x * 3)]


def at_cell(cell: str) -> str:
    """ "top left" → "at the top left", "center" → "in the center"."""
    return f"{'in' if cell == 'center' else 'at'} the {cell}"


def select_objects(objects: Iterable[SceneObject], classes: Iterable[str]) -> list[SceneObject]:
    """The objects of these classes, in the order of the classes and from left to right within a class."""
    by_x = sorted(objects, key=lambda o: (o.box[0], o.box[1]))
    return [o for name in classes for o in by_x if o.name == name]


def detect_target(objects: Iterable[SceneObject], classes: Iterable[str], size: int) -> str:
    """The correct answer to ``detect a ; b``."""
    return format_detections([Detection(o.name, o.box) for o in select_objects(objects, classes)], size, size)


def segment_target(
    objects: Iterable[SceneObject], classes: Iterable[str], size: int, codes_from_masks: Callable
) -> str:
    """The correct answer to ``segment a ; b``: the same boxes, each with the 16 codes of its mask.

    Args:
        codes_from_masks: Such as ``vqvae.MaskVQVAE.codes_from_masks``: (masks, boxes) → the codes of each.
    """
    selected = select_objects(objects, classes)
    codes = codes_from_masks([o.mask for o in selected], [o.box for o in selected])
    return format_detections([Detection(o.name, o.box, c) for o, c in zip(selected, codes, strict=True)], size, size)


def relation_answer(objects: tuple[SceneObject, ...], name: str, direction: str, size: int) -> str | None:
    """Answer to "what is {direction} the {name}?", or None if it would be ambiguous.

    ``name`` must occur once. Exactly one other object must be at least ``DIRECTION`` away that way, and all others at
    least ``OPPOSITE`` the opposite way, from center to center.
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
    """The relation phrase and its inverse ("a cat above a dog", "a dog below a cat"); empty if ambiguous."""
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


def _absent(rng: np.random.Generator, names: Sequence[str], present: Iterable[str]) -> str:
    """One of the names that is not in the scene and forms no held-out pair with its objects."""
    while True:
        name = names[rng.integers(len(names))]
        if name not in present and PARTNERS[name].isdisjoint(present):
            return name


def _sample(rng: np.random.Generator, examples: list[Example], limit: int) -> list[Example]:
    """All examples, or ``limit`` of them at random if there are more."""
    if len(examples) <= limit:
        return examples
    return [examples[i] for i in rng.permutation(len(examples))[:limit]]


def _cell_of_its_own(objects: tuple[SceneObject, ...], index: int, size: int) -> str | None:
    """The cell of an object if all other centers are ``CELL_CLEAR`` or more away from it."""
    cell = cell_of(objects[index].center, size)
    if cell is None:
        return None
    column, row = (int(v / size * 3) for v in objects[index].center)
    for other in objects[:index] + objects[index + 1 :]:
        x, y = (v / size for v in other.center)
        distance = max(column / 3 - x, x - (column + 1) / 3, row / 3 - y, y - (row + 1) / 3)
        if distance < CELL_CLEAR:
            return None
    return cell


def _where_and_what(
    objects: tuple[SceneObject, ...], counts: Counter, rng: np.random.Generator, size: int
) -> list[Example]:
    what, where = [], []
    for index, o in enumerate(objects):
        if cell := _cell_of_its_own(objects, index, size):
            what.append(Example("what", f"answer en what is {at_cell(cell)}?", (o.name,)))
        if counts[o.name] == 1 and (cell := cell_of(o.center, size)):
            where.append(Example("where", f"answer en where is the {o.name}?", (cell,)))
    chosen = _sample(rng, what, 2 if len(objects) > 1 else 1)
    if len(objects) == 1:
        chosen = [*chosen, Example("what", "answer en what is this?", (objects[0].name,))]
    return chosen + _sample(rng, where, 2)


def _counting(
    objects: tuple[SceneObject, ...], counts: Counter, rng: np.random.Generator, known: Sequence[str]
) -> list[Example]:
    asked = _absent(rng, known, counts) if rng.random() < 0.2 else objects[rng.integers(len(objects))].name
    examples = [Example("how many", f"answer en how many {plural(asked)} are there?", (str(counts[asked]),))]
    if rng.random() < 0.5:
        examples.append(Example("how many", "answer en how many objects are there?", (str(len(objects)),)))
    names = list(counts)
    present, absent = names[rng.integers(len(names))], _absent(rng, known, counts)
    for name, answer in ((present, "yes"), (absent, "no")):
        examples.append(Example("is there", f"answer en is there {with_article(name)}?", (answer,)))
    return examples


def _relations(objects: tuple[SceneObject, ...], counts: Counter, rng: np.random.Generator, size: int) -> list[Example]:
    found = []
    for name in counts:
        for direction in DIRECTIONS:
            if answer := relation_answer(objects, name, direction, size):
                found.append(Example("relation", f"answer en what is {direction} the {name}?", (answer,)))
    return _sample(rng, found, 2)


def _detections(
    task: str,
    objects: tuple[SceneObject, ...],
    counts: Counter,
    rng: np.random.Generator,
    size: int,
    known: Sequence[str],
) -> Iterator[Example]:
    """One class, then two or more if the scene has them. 8% of the queries name a class that is not there."""
    names = list(counts)
    single = _absent(rng, known, counts) if rng.random() < 0.08 else names[rng.integers(len(names))]
    queries = [[single]]
    if len(names) > 1:
        several = [names[i] for i in rng.permutation(len(names))[: rng.integers(2, len(names) + 1)]]
        if rng.random() < 0.08:
            several[rng.integers(len(several))] = _absent(rng, known, counts)
        queries.append(several)
    for classes in queries:
        yield Example(task, f"{task} {' ; '.join(classes)}", (detect_target(objects, classes, size),))


def examples(
    objects: tuple[SceneObject, ...], size: int, rng: np.random.Generator, known: Sequence[str] = OBJECTS
) -> tuple[Example, ...]:
    """All prompts about a scene of these objects: captions, then questions, then boxes, then masks.

    Args:
        known: The names to ask about when the answer is that there are none.
    """
    counts = Counter(o.name for o in objects)
    return (
        *_captions(objects, size),
        *_where_and_what(objects, counts, rng, size),
        *_counting(objects, counts, rng, known),
        *_relations(objects, counts, rng, size),
        *_detections("detect", objects, counts, rng, size, known),
        *_detections("segment", objects, counts, rng, size, known),
    )
