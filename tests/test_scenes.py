"""Scenes: every statement about one is derived again from its boxes and masks."""

import hashlib
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm import emoji, hub
from minivlm.emoji import augmentation, scenes

DATA = hub.DATA
SEEDS = range(300)
TASKS = ("detect", "segment")


@pytest.fixture(scope="module")
def scenes_of() -> dict[str, list[emoji.Scene]]:
    return {split: [emoji.make_scene(seed, split) for seed in SEEDS] for split in emoji.SPLITS}


def examples_of(scenes_of, kind):
    """(scene, example) for all examples of a kind."""
    return [(s, e) for group in scenes_of.values() for s in group for e in s.examples if e.kind == kind]


def pairs_of(scene):
    return set(combinations(sorted({o.name for o in scene.objects}), 2))


# --- the files ---------------------------------------------------------------------------------------------------


def test_sheets_are_small_and_hold_every_object():
    assert len(emoji.OBJECTS) >= 96 and len(set(emoji.OBJECTS)) == len(emoji.OBJECTS)
    for artist in emoji.ARTISTS:
        path = DATA / "emoji" / f"{artist}.png"
        assert path.stat().st_size <= 500_000
        assert Image.open(path).mode == "RGBA"
        drawn = [name for name in emoji.OBJECTS if any(artist in emoji.artists_of(name, s) for s in emoji.SPLITS)]
        assert len(drawn) >= 64 and (len(drawn) == 100 or artist in emoji.TRAIN_ARTISTS)
        for name in drawn:
            assert (emoji.draw_sprite(name, artist, 40)[..., 3] > 127).sum() > 150, (artist, name)


def test_several_artists_drew_every_object():
    assert len(emoji.TRAIN_ARTISTS) >= 5 and len(emoji.DEVELOPMENT_ARTISTS) == len(emoji.UNSEEN_ARTISTS) == 1
    assert len(set(emoji.ARTISTS)) == len(emoji.ARTISTS)
    assert min(len(emoji.artists_of(name, "train")) for name in emoji.OBJECTS) >= 3
    name = next(n for n in emoji.OBJECTS if len(emoji.artists_of(n, "train")) < len(emoji.TRAIN_ARTISTS))
    (missing, *_) = set(emoji.TRAIN_ARTISTS) - set(emoji.artists_of(name, "train"))
    with pytest.raises(ValueError, match=f"The artist '{missing}' has not drawn an? {name}. Choose another artist"):
        emoji.draw_sprite(name, missing, 40)


def test_every_data_file_has_its_origin():
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    files = [p for folder in ("emoji", "images") for p in (DATA / folder).rglob("*") if p.is_file()]
    assert len(files) > 12
    for path in files:
        assert f"`{path.relative_to(DATA).as_posix()}`" in readme, path
    for path in (DATA / "images").glob("*.jpg"):
        assert path.stat().st_size <= 60_000 and max(Image.open(path).size) <= 448


def test_names_and_plurals_are_plain_words():
    words = list(emoji.OBJECTS) + [emoji.plural(n) for n in emoji.OBJECTS]
    assert len(set(words)) == 2 * len(emoji.OBJECTS)
    assert all(re.fullmatch("[a-z]+", w) for w in words)
    assert [emoji.plural(n) for n in ("leaf", "bus", "fox", "snowman")] == ["leaves", "buses", "foxes", "snowmen"]
    assert emoji.with_article("apple") == "an apple" and emoji.with_article("unicorn") == "a unicorn"


# --- the splits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", emoji.SPLITS)
@pytest.mark.parametrize("size", [64, 112, 224])
def test_same_seed_same_scene(split, size):
    for seed in (0, 1, 10**12):
        first, second = (emoji.make_scene(seed, split, size) for _ in range(2))
        assert first.image.tobytes() == second.image.tobytes()
        assert first.image.shape == (size, size, 3) and first.image.dtype == np.uint8
        assert first.objects == second.objects and first.examples == second.examples


def test_scenes_stay_what_they_were():
    """A change of the random stream would make old metrics incomparable. It must be a decision, not an accident."""
    said = [emoji.make_scene(0, split).captions["caption"][0] for split in emoji.SPLITS]
    assert said == [
        *("two koalas and a pig", "a shoe, a snake and a panda", "an octopus and a balloon"),
        *("an octopus", "a heart, a pizza, a castle and a rabbit"),
    ]
    assert emoji.make_scene(2).objects[0].name == "cactus"


def test_examples_stay_what_they_were_before_there_were_masks():
    """`segment` comes last in a scene's random stream, so everything before it stays the same."""
    digest = hashlib.sha256()
    for split in emoji.SPLITS:
        for seed in range(50):
            for e in emoji.make_scene(seed, split).examples:
                if e.kind != "segment":
                    digest.update(repr((e.kind, e.prompt, e.answers)).encode())
    assert digest.hexdigest() == "bb7b6ffbbf9c82cc493152944865c03c9ebc1b7dbebb17ad9ebbe2f10a9564c9"


def test_streams_are_disjoint(scenes_of):
    images = [s.image.tobytes() for group in scenes_of.values() for s in group]
    assert len(set(images)) == len(images)


def test_splits_keep_their_guarantees(scenes_of):
    share = len(emoji.HELD_OUT_PAIRS) / (len(emoji.OBJECTS) * (len(emoji.OBJECTS) - 1) / 2)
    assert 0.03 < share < 0.07
    for split, group in scenes_of.items():
        for scene in group:
            artists = {o.artist for o in scene.objects}
            unseen = {"artist": emoji.UNSEEN_ARTISTS, "development": emoji.DEVELOPMENT_ARTISTS}
            assert artists <= set(unseen.get(split, emoji.TRAIN_ARTISTS))
            assert bool(pairs_of(scene) & emoji.HELD_OUT_PAIRS) == (split == "pairs")
    assert {o.artist for s in scenes_of["train"] for o in s.objects} == set(emoji.TRAIN_ARTISTS)
    assert not set(emoji.TRAIN_ARTISTS) & set(emoji.UNSEEN_ARTISTS)


def test_scenes_vary(scenes_of):
    counts = Counter(len(s.objects) for s in scenes_of["train"])
    assert all(0.12 < counts[n] / len(SEEDS) < 0.4 for n in (1, 2, 3, 4)) and set(counts) == {1, 2, 3, 4}
    several = [s for s in scenes_of["train"] if len(s.objects) > 1]
    repeated = sum(len({o.name for o in s.objects}) < len(s.objects) for s in several) / len(several)
    assert 0.3 < repeated < 0.55


def test_boxes_are_tight_and_masks_disjoint(scenes_of):
    for scene in (s for group in scenes_of.values() for s in group):
        cover = np.zeros((scene.size, scene.size), int)
        for o in scene.objects:
            ys, xs = np.nonzero(o.mask)
            assert o.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            cover += o.mask
        assert cover.max() <= 1


def test_poses_are_those_of_the_sprites(scenes_of):
    """Nothing covers the last object. Its sprite in the same pose has the same mask, and in no other pose."""

    def fits(o, angle, mirrored):
        x0, y0, x1, y1 = o.box
        for side in range(max(x1 - x0, y1 - y0), max(x1 - x0, y1 - y0) + 9):  # a sprite may have faint edges
            redrawn = emoji.draw_sprite(o.name, o.artist, side, angle, mirrored)[..., 3] > 127
            bx0, by0, bx1, by1 = scenes.mask_box(redrawn)
            if np.array_equal(redrawn[by0:by1, bx0:bx1], o.mask[y0:y1, x0:x1]):
                return True
        return False

    last = [scene.objects[-1] for scene in scenes_of["train"]]
    assert all(fits(o, o.angle, o.mirrored) for o in last)
    assert {o.angle for o in last} == set(range(-15, 16))
    mirrored = [o for o in last if o.mirrored]
    assert 0.4 * len(last) < len(mirrored) < 0.6 * len(last)
    assert sum(fits(o, o.angle, False) for o in mirrored) < 0.2 * len(mirrored)  # some are symmetrical
    assert sum(fits(o, o.angle + 7, o.mirrored) for o in last) < 0.1 * len(last)


@pytest.mark.parametrize("size", [112, 160])
def test_three_quarters_of_every_object_stay_visible(monkeypatch, size):
    pasted = []
    original = scenes._paste
    monkeypatch.setattr(scenes, "_paste", lambda im, sprite, x, y: (pasted.append(sprite), original(im, sprite, x, y)))
    covered = 0
    for seed in SEEDS:
        pasted.clear()
        scene = emoji.make_scene(seed, size=size)
        assert len(pasted) == len(scene.objects)
        for sprite, o in zip(pasted, scene.objects, strict=True):
            total = (sprite[..., 3] > 127).sum()
            assert o.mask.sum() >= 0.75 * total
            covered += o.mask.sum() < total
            assert round(24 / 112 * size) <= max(sprite.shape[:2]) <= round(52 / 112 * size)
    assert covered > 10  # overlap happens


# --- the language ------------------------------------------------------------------------------------------------


def centers(scene):
    return [((o.box[0] + o.box[2]) / 2 / scene.size, (o.box[1] + o.box[3]) / 2 / scene.size) for o in scene.objects]


def word(number):
    return {1: "one", 2: "two", 3: "three", 4: "four"}[number]


def test_captions(scenes_of):
    for scene, e in examples_of(scenes_of, "caption"):
        assert e.prompt == "caption en" and len(e.answers) == 1
        counts = Counter(o.name for o in scene.objects)
        assert emoji.parse_caption(e.answers[0]) == counts
        for name, n in counts.items():
            said = re.search(rf"\b(\w+) ({name}|{emoji.plural(name)})\b", e.answers[0])
            assert said[1] in (("a", "an") if n == 1 else (word(n),))
            assert said[2] == (name if n == 1 else emoji.plural(name))
    for scene, e in examples_of(scenes_of, "cap"):
        ordered = sorted((c[0], o.name) for c, o in zip(centers(scene), scene.objects, strict=True))
        xs, names = zip(*ordered, strict=True)
        assert min(np.diff(xs), default=1) >= 0.04 - 1e-9
        said = re.split(", | and ", e.answers[0].removeprefix("from left to right: "))
        assert [phrase.split(" ", 1)[1] for phrase in said] == list(names)


def test_describe(scenes_of):
    seen = Counter()
    for scene, e in examples_of(scenes_of, "describe"):
        assert scene.captions["describe"] == e.answers
        if len(scene.objects) == 1:
            name, cell = re.fullmatch(r"an? (\w+) (?:at|in) the (.+)", e.answers[0]).groups()
            assert name == scene.objects[0].name and cell == nine(*centers(scene)[0])
            continue
        ordered = sorted(zip(centers(scene), [o.name for o in scene.objects], strict=True))
        (xa, ya), (xb, yb) = ordered[0][0], ordered[1][0]
        for answer, (ax, ay, bx, by), names in (
            (e.answers[0], (xa, ya, xb, yb), (ordered[0][1], ordered[1][1])),
            (e.answers[1], (xb, yb, xa, ya), (ordered[1][1], ordered[0][1])),
        ):
            pair, _, rest = answer.partition(", with ")
            first, how, second = re.fullmatch(r"an? (\w+) (.+?) an? (\w+)", pair).groups()
            assert (first, second) == names
            gap = {"to the left of": bx - ax, "to the right of": ax - bx, "above": by - ay, "below": ay - by}[how]
            across = abs(by - ay) if how.startswith("to") else abs(bx - ax)
            assert gap >= 0.1 - 1e-9 and gap >= 1.5 * across - 1e-9
            left_over = Counter(name for _, name in ordered[2:])
            assert (emoji.parse_caption(rest) if rest else Counter()) == left_over
            seen[how] += 1
    assert len(seen) == 4 and min(seen.values()) > 20


def nine(x, y):
    """The cell of a point, or None within 3% of a border."""
    if min(abs(v - b) for v in (x, y) for b in (1 / 3, 2 / 3)) < 0.03:
        return None
    vertical, horizontal = ("top", "", "bottom")[int(3 * y)], ("left", "", "right")[int(3 * x)]
    return f"{vertical} {horizontal}".strip() or "center"


def test_where_and_what(scenes_of):
    for scene, e in examples_of(scenes_of, "where"):
        name = re.fullmatch(r"answer en where is the (\w+)\?", e.prompt)[1]
        [index] = [i for i, o in enumerate(scene.objects) if o.name == name]
        assert e.answers == (nine(*centers(scene)[index]),)
    cells = set()
    for scene, e in examples_of(scenes_of, "what"):
        if e.prompt == "answer en what is this?":
            assert len(scene.objects) == 1 and e.answers == (scene.objects[0].name,)
            continue
        cell = re.fullmatch(r"answer en what is (?:at|in) the (.+)\?", e.prompt)[1]
        inside = [o.name for o, c in zip(scene.objects, centers(scene), strict=True) if nine(*c) == cell]
        assert inside == [e.answers[0]]
        assert sum(cell_hit(c, cell) for c in centers(scene)) == 1
        cells.add(cell)
    assert len(cells) == 9


def cell_hit(center, cell):
    """Whether a center is in the cell or less than 8% from it."""
    grid = {nine((c + 0.5) / 3, (r + 0.5) / 3): (c, r) for c in range(3) for r in range(3)}
    near = 0.08 - 1e-9
    return all(k / 3 - near < v < (k + 1) / 3 + near for v, k in zip(center, grid[cell], strict=True))


def test_counting(scenes_of):
    singular = {emoji.plural(n): n for n in emoji.OBJECTS}
    answers, yes_no = Counter(), Counter()
    for scene, e in examples_of(scenes_of, "how many"):
        what = re.fullmatch(r"answer en how many (\w+) are there\?", e.prompt)[1]
        n = len(scene.objects) if what == "objects" else sum(o.name == singular[what] for o in scene.objects)
        assert e.answers == (str(n),)
        answers[n] += 1
    assert min(answers[n] for n in range(5)) > 20
    for scene, e in examples_of(scenes_of, "is there"):
        name = re.fullmatch(r"answer en is there an? (\w+)\?", e.prompt)[1]
        assert e.prompt.endswith(f"{emoji.with_article(name)}?")
        assert e.answers == (("yes",) if any(o.name == name for o in scene.objects) else ("no",))
        yes_no[e.answers[0]] += 1
    assert yes_no["yes"] == yes_no["no"]


def test_relations(scenes_of):
    seen = Counter()
    for scene, e in examples_of(scenes_of, "relation"):
        how, name = re.fullmatch(r"answer en what is (left of|right of|above|below) the (\w+)\?", e.prompt).groups()
        places = list(zip(centers(scene), [o.name for o in scene.objects], strict=True))
        [here] = [c for c, n in places if n == name]
        sign, axis = {"left of": (-1, 0), "right of": (1, 0), "above": (-1, 1), "below": (1, 1)}[how]
        others = [(sign * (c[axis] - here[axis]), n) for c, n in places if n != name]
        there = [n for g, n in others if g >= 0.1 - 1e-9]
        assert there == list(e.answers)
        assert all(g <= -0.05 + 1e-9 for g, _ in others if g < 0.1 - 1e-9)
        seen[how] += 1
    assert len(seen) == 4 and min(seen.values()) > 50


def parse_detection(text):
    found = []
    for piece in text.split(" ; ") if text else []:
        *bins, name = re.fullmatch(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})> (\w+)", piece).groups()
        found.append((name, tuple(int(b) for b in bins)))
    return found


@pytest.mark.parametrize("task", TASKS)
def test_targets_are_the_boxes(scenes_of, task):
    """Also of `segment`: training adds the codes of the masks."""
    empty = total = several = 0
    for scene, e in examples_of(scenes_of, task):
        assert len(e.answers) == 1 and e.prompt.startswith(f"{task} ")
        classes = e.prompt.removeprefix(f"{task} ").split(" ; ")
        found = parse_detection(e.answers[0])
        expected = Counter(o.name for o in scene.objects if o.name in classes)
        assert Counter(n for n, _ in found) == expected
        assert [n for n, _ in found] == sorted((n for n, _ in found), key=classes.index)
        for name in expected:
            bins = [b for n, b in found if n == name]
            assert [(b[1], b[0]) for b in bins] == sorted((b[1], b[0]) for b in bins)
            boxes = sorted(o.box for o in scene.objects if o.name == name)
            for (ymin, xmin, ymax, xmax), box in zip(bins, boxes, strict=True):
                back = np.array([xmin, ymin, xmax, ymax]) / 1023 * scene.size
                assert np.abs(back - box).max() <= scene.size / 1023
        empty, total, several = empty + (e.answers[0] == ""), total + 1, several + (len(classes) > 1)
        assert len(classes) == len(set(classes)) and len(set(classes) - {o.name for o in scene.objects}) <= 1
    assert 0.02 < empty / total < 0.12 and 0.3 < several / total < 0.6


@pytest.mark.parametrize("task", TASKS)
def test_8_percent_of_the_queries_name_an_absent_class(scenes_of, task):
    queries = [(s, e.prompt.removeprefix(f"{task} ").split(" ; ")) for s, e in examples_of(scenes_of, task)]
    absent = sum(not set(classes) <= {o.name for o in scene.objects} for scene, classes in queries)
    assert abs(absent / len(queries) - 0.08) < 4 * (0.08 * 0.92 / len(queries)) ** 0.5


def test_tasks_sample_their_own_classes(scenes_of):
    of_scene = [
        [{frozenset(e.prompt.split(" ", 1)[1].split(" ; ")) for e in s.examples if e.kind == task} for task in TASKS]
        for s in scenes_of["train"]
    ]
    assert 0.1 < sum(detect == segment for detect, segment in of_scene) / len(of_scene) < 0.6


def test_segment_targets_are_the_detections_with_codes(scenes_of):
    """Each object's codes are those of its own visible mask in its own box, in the order of the boxes."""
    calls = 0
    for scene, e in examples_of(scenes_of, "segment"):
        classes = e.prompt.removeprefix("segment ").split(" ; ")
        expected = {o.box: (o, (index,) * 16) for index, o in enumerate(scene.objects)}

        def codes_from_masks(masks, boxes, expected=expected):
            assert all(mask is expected[box][0].mask for mask, box in zip(masks, boxes, strict=True))
            return [expected[box][1] for box in boxes]

        text = emoji.segment_target(scene.objects, classes, scene.size, codes_from_masks)
        assert re.sub(r"(<seg\d{3}>)+", "", text) == e.answers[0]
        assert text.count("<seg") == 16 * (text.count("<loc") // 4)
        for index, o in enumerate(scene.objects):
            assert text.count(f"<seg{index:03d}>" * 16 + f" {o.name}") == (o.name in classes)
        calls += 1
    assert calls > 1000
    assert emoji.segment_target((), ["cat"], 112, lambda masks, boxes: []) == ""


def test_what_a_scene_offers(scenes_of):
    for scene in (s for group in scenes_of.values() for s in group):
        kinds = Counter(e.kind for e in scene.examples)
        assert kinds["caption"] == 1 and kinds["is there"] == 2
        assert kinds["detect"] == kinds["segment"] == (1 if len({o.name for o in scene.objects}) == 1 else 2)
        assert [e.kind for e in scene.examples][-kinds["segment"] :] == ["segment"] * kinds["segment"]
        assert max(kinds.values()) <= 2 and len({e.prompt for e in scene.examples}) == len(scene.examples)
        assert all(e.prompt.startswith("answer en ") for e in scene.questions)
        assert len(scene.questions) == sum(kinds[k] for k in ("what", "where", "how many", "is there", "relation"))
        assert set(scene.captions) == {"caption", "cap", "describe"} & set(kinds)


def test_the_tokenizer_is_trained_on_everything_but_masks(scenes_of):
    examples = [e for scene in scenes_of["train"][:20] for e in scene.examples if e.kind != "segment"]
    said = [text for e in examples for text in (e.prompt, e.answers[0]) if text]
    assert list(scenes.texts(range(20))) == said and "caption en" in said


captions = st.lists(st.sampled_from(emoji.OBJECTS), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(captions, st.randoms(use_true_random=False), captions)
def test_same_caption(names, random, others):
    text = emoji.count_caption(names)
    shuffled = random.sample(names, len(names))
    assert emoji.same_caption(emoji.count_caption(shuffled), text)
    assert emoji.same_caption(emoji.count_caption(others), text) == (Counter(others) == Counter(names))
    assert not emoji.same_caption(text + " and", text)
    assert not emoji.same_caption(f"{text} and a snark", text)
    assert not emoji.same_caption(text, "")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_same_caption_never_raises(text):
    assert not emoji.same_caption(text, text) or emoji.parse_caption(text)


# --- smaller worlds and changed drawings -------------------------------------------------------------------------


@pytest.mark.parametrize("split", emoji.SPLITS)
def test_a_small_world_shows_and_asks_for_its_own_objects_only(split):
    world = emoji.World(20, 2)
    scenes_of_world = [emoji.make_scene(seed, split, world=world) for seed in range(150)]
    shown = {o.name for s in scenes_of_world for o in s.objects}
    assert (
        shown == {name for pair in world.held_out for name in pair} if split == "pairs" else shown == set(world.names)
    )
    assert {len(s.objects) for s in scenes_of_world} == ({2} if split == "pairs" else {1, 2})
    said = " ".join(e.prompt + " " + e.answers[0] for s in scenes_of_world for e in s.examples)
    words = set(re.findall("[a-z]+", said))
    assert not words & {w for n in set(emoji.OBJECTS) - set(world.names) for w in (n, emoji.plural(n))} - {"star"}
    for scene in scenes_of_world:
        assert bool(pairs_of(scene) & emoji.HELD_OUT_PAIRS) == (split == "pairs")


def test_worlds_have_limits():
    for size, most in ((9, 2), (101, 2), (20, 0), (20, 5)):
        with pytest.raises(ValueError, match=f"A world has 10 to 100 objects, .* not {size} and {most}"):
            emoji.World(size, most)


@pytest.mark.parametrize("change", emoji.AUGMENTATIONS)
def test_an_augmentation_changes_the_image_and_not_what_is_said_about_it(change):
    """Only ``stretch`` may move a box, and with it what is close enough to be ambiguous."""
    changed = 0
    for seed in range(60):
        plain, other = (emoji.make_scene(seed, augment=augment) for augment in ((), (change,)))
        changed += not np.array_equal(plain.image, other.image)
        assert [o.name for o in plain.objects] == [o.name for o in other.objects] or change == "stretch"
        if change != "stretch":
            assert plain.objects == other.objects and plain.examples == other.examples
            assert all(np.array_equal(a.mask, b.mask) for a, b in zip(plain.objects, other.objects, strict=True))
    assert changed > 6, changed


def test_augmented_scenes_are_the_same_every_time():
    for seed in range(5):
        first, second = (emoji.make_scene(seed, augment=emoji.AUGMENTATIONS) for _ in range(2))
        assert first.image.tobytes() == second.image.tobytes() and first.objects == second.objects


def test_hue_turns_and_saturation_and_brightness_vary():
    """A red disk in many colors, with its alpha as it was and no color above it."""
    disk = np.zeros((21, 21, 4), np.uint8)
    y, x = np.mgrid[-10:11, -10:11]
    disk[x * x + y * y <= 100] = (200, 30, 30, 255)
    disk[10, 0] = (60, 9, 9, 77)  # on the edge, premultiplied
    colors = []
    for seed in range(200):
        changed = augmentation.color(np.random.default_rng(seed), disk)
        assert np.array_equal(changed[..., 3], disk[..., 3]) and (changed[..., :3] <= changed[..., 3:]).all()
        colors.append(changed[10, 10, :3].astype(int))
    colors = np.array(colors)
    assert (colors.argmax(1) != 0).mean() > 0.05  # no longer red
    assert colors.max(1).std() > 10 and (colors.max(1) - colors.min(1)).std() > 20
    assert (colors.argmax(1) == 0).mean() > 0.5


def test_outlines_are_dark_and_inside_the_object():
    disk = np.zeros((31, 31, 4), np.uint8)
    disk[5:26, 5:26] = 255
    for seed in range(20):
        drawn = augmentation.outline(np.random.default_rng(seed), disk)
        assert np.array_equal(drawn[..., 3], disk[..., 3])
        assert drawn[5, 15, :3].max() < 60 and drawn[15, 15, :3].min() == 255 and drawn[0].max() == 0


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"seed": 0, "split": "test"},
            "split must be one of train, validation, pairs, artist, development, not 'test'",
        ),
        ({"seed": -1}, "seed must be an integer, 0 or more, not -1"),
        ({"seed": True}, "seed must be an integer, 0 or more, not True"),
        ({"seed": 0, "size": 8}, "size must be an integer from 48 to 896 pixels, not 8"),
        (
            {"seed": 0, "augment": ("glow",)},
            "augment must be among stretch, strokes, color, outline, blur, noise, not 'glow'",
        ),
        ({"seed": 0, "size": 10_000}, "size must be an integer from 48 to 896 pixels, not 10000"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        emoji.make_scene(**arguments)


def test_bad_names():
    for call in (emoji.plural, emoji.with_article):
        with pytest.raises(ValueError, match="'snark' is not an object"):
            call("snark")
    with pytest.raises(ValueError, match="artist must be one of .*, not 'me'"):
        emoji.draw_sprite("cat", "me", 32)
    with pytest.raises(ValueError, match="count must be .*, not 9"):
        emoji.count_phrase("cat", 9)
    with pytest.raises(ValueError, match="no true pixel"):
        scenes.mask_box(np.zeros((4, 4), bool))


def test_the_demo_scenes_are_those_of_their_seeds():
    paths = sorted((hub.DATA / "images" / "scenes").iterdir())
    assert len(paths) == 4
    for path in paths:
        split, seed = path.stem.split("-")
        assert np.array_equal(np.asarray(Image.open(path)), emoji.make_scene(int(seed), split).image), path


def test_planned_names_are_those_of_the_scene_if_all_fit():
    pairs = [
        (emoji.planned_names(seed, split), emoji.make_scene(seed, split).objects)
        for seed in range(60)
        for split in ("train", "artist")
    ]
    names = [(Counter(planned), Counter(o.name for o in objects)) for planned, objects in pairs]
    assert all(shown and shown <= planned and planned.total() <= 4 for planned, shown in names)
    assert sum(shown == planned for planned, shown in names) > 0.9 * len(names)
