"""Emoji scenes: the data set of the embedded checkpoint, and how that checkpoint is trained and evaluated.

    scene = emoji.make_scene(5, "validation")     # an image, its objects, and what can be said about it
    scene.image, scene.objects, scene.examples

``batches`` makes batches of scenes, ``recipe`` trains the checkpoint and ``evaluation`` measures it. They need torch,
so they are not imported here.
"""

from minivlm.emoji.augmentation import AUGMENTATIONS
from minivlm.emoji.language import (
    Example,
    count_caption,
    count_phrase,
    detect_target,
    join_phrases,
    parse_caption,
    same_caption,
    segment_target,
    select_objects,
)
from minivlm.emoji.objects import (
    ARTISTS,
    DEVELOPMENT_ARTISTS,
    HELD_OUT_PAIRS,
    OBJECTS,
    SPLITS,
    TRAIN_ARTISTS,
    UNSEEN_ARTISTS,
    SceneObject,
    artists_of,
    draw_sprite,
    has_drawn,
    plural,
    with_article,
)
from minivlm.emoji.scenes import TILT, WORLD, Scene, World, make_scene, planned_names

__all__ = [
    "ARTISTS",
    "AUGMENTATIONS",
    "DEVELOPMENT_ARTISTS",
    "HELD_OUT_PAIRS",
    "OBJECTS",
    "SPLITS",
    "TILT",
    "TRAIN_ARTISTS",
    "UNSEEN_ARTISTS",
    "WORLD",
    "Example",
    "Scene",
    "SceneObject",
    "World",
    "artists_of",
    "count_caption",
    "count_phrase",
    "detect_target",
    "draw_sprite",
    "has_drawn",
    "join_phrases",
    "make_scene",
    "parse_caption",
    "planned_names",
    "plural",
    "same_caption",
    "segment_target",
    "select_objects",
    "with_article",
]
