"""The playground: ask the model about a scene, or about an image of your own."""

import re
from itertools import islice

from PIL import Image

from minivlm import emoji, generation, locations
from minivlm.course.viz.boxes import draw_boxes, draw_sheet
from minivlm.course.viz.figure import Figure
from minivlm.course.viz.widgets import Sliders, sliders
from minivlm.emoji.language import MAX_OBJECTS
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.vqvae import MaskVQVAE

ANY = "any"  # number of objects
SPLITS = {"new scenes": "validation", "unseen pairs": "pairs", "unseen artist": "artist", "training": "train"}
LONGEST = 128  # tokens of an answer, enough for four masks
LARGEST = 896  # pixels of the longer side of an upload: the model sees fewer


def playground(
    model: PaliGemma, processor: Processor, vqvae: MaskVQVAE | None = None, prompt: str = "caption en"
) -> Sliders:
    """A scene, or an image that you upload, with the model's answer to a prompt and the boxes and masks in it.

    It shows what changed last: another seed, number of objects or split brings the scenes back after an upload.

    Args:
        vqvae: Turns the codes in an answer to ``segment`` into masks. Default: the embedded one.
        prompt: The first prompt.
    """
    vqvae = vqvae or MaskVQVAE.from_pretrained()
    settings, upload, shown = None, None, (None, "")

    def draw(seed=0, objects=ANY, split="validation", prompt=prompt, your_own_image=None) -> Figure:
        nonlocal settings, upload, shown
        if your_own_image is not None and your_own_image != upload:
            shown = smaller(your_own_image), ""
        elif (seed, objects, split) != settings:
            scene = find_scene(seed, split, objects)
            shown = Image.fromarray(scene.image), f"\ntrue caption: {scene.captions['caption'][0]}"
        settings, upload = (seed, objects, split), your_own_image
        answer = generation.generate(model, processor, shown[0], prompt, max_new_tokens=LONGEST)
        return draw_sheet([draw_answer(shown[0], prompt, answer, vqvae, shown[1])])

    controls = {"seed": (0, 99), "objects": [ANY, *range(1, MAX_OBJECTS + 1)], "split": SPLITS}
    return sliders(draw, **controls, prompt=str, your_own_image=Image.Image)


def draw_answer(image: Image.Image, prompt: str, answer: str, vqvae: MaskVQVAE, truth: str) -> tuple[Figure, str]:
    """The image with the boxes and masks of an answer, and the lines below it."""
    lines = f"{prompt} → {shorten_codes(answer) or '(nothing)'}{truth}"
    if "<loc" not in answer:
        return draw_boxes(image, []), lines
    parsed = locations.parse_detections(answer, *image.size)
    masks = vqvae.masks_from_detections(parsed.detections, *image.size)
    return draw_boxes(image, parsed.detections, masks), "\n".join([lines, *parsed.problems])


def shorten_codes(answer: str) -> str:
    """An answer with ``<seg012> … <seg101>`` in place of all sixteen codes of a mask."""
    return re.sub(r"(<seg\d+>)(?:<seg\d+>)+(<seg\d+>)", r"\1…\2", answer)


def find_scene(seed: int, split: str, objects: int | str) -> emoji.Scene:
    """The scene of this seed, or the one with this index among the seeds whose scenes have so many objects.

    Raises:
        ValueError: If no scene of the split has so many.
    """
    if objects == ANY:
        return emoji.make_scene(seed, split)
    if split == "pairs" and objects < 2:
        raise ValueError("A scene with a pair has at least two objects: choose 2 or more, or another split.")
    planned = (s for s in range(100_000) if len(emoji.planned_names(s, split)) == objects)
    return emoji.make_scene(next(islice(planned, seed, None)), split)


def smaller(image: Image.Image) -> Image.Image:
    """A copy with a longer side of at most ``LARGEST`` pixels."""
    image = image.copy()
    image.thumbnail((LARGEST, LARGEST))
    return image
