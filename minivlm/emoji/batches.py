"""Batches of emoji scenes, one class per objective: item ``i`` is the batch of step ``i``.

    I scenes of a process per step · E examples per scene · B = I · E rows · P patches · M names of L tokens
    O objects of these scenes

Scenes are generated from seeds (scenes.py), so step ``i`` has the same ones on any machine and after any interruption.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from minivlm import emoji, locations
from minivlm.locations import CODES_PER_MASK, crop_mask
from minivlm.processor import Processor
from minivlm.vqvae import MaskVQVAE

COVERS = 0.25  # a patch shows an object that covers at least this fraction of it


def patch_coverage(scene: emoji.Scene, patch_size: int) -> Float[np.ndarray, "O P"]:
    """The fraction of each patch that each object of the scene covers."""
    n = scene.size // patch_size
    return np.stack([o.mask.reshape(n, patch_size, n, patch_size).mean(axis=(1, 3)).ravel() for o in scene.objects])


def names_in_patches(scene: emoji.Scene, patch_size: int) -> Bool[np.ndarray, "P M"]:
    """Which patch shows which of the names of the scene's world."""
    coverage, names = patch_coverage(scene, patch_size), scene.world.names
    shows = np.zeros((coverage.shape[1], len(names)), dtype=bool)
    for o, covered in zip(scene.objects, coverage, strict=True):
        shows[:, names.index(o.name)] |= covered >= COVERS
    return shows


def patch_owners(scene: emoji.Scene, patch_size: int) -> Int[np.ndarray, " P"]:
    """The index of the object that covers most of each patch, -1 where the patch shows none."""
    coverage = patch_coverage(scene, patch_size)
    return np.where(coverage.max(0) >= COVERS, coverage.argmax(0), -1)


def sample_examples(
    scene: emoji.Scene, count: int, rng: np.random.Generator, mixture: dict[str, float]
) -> list[emoji.Example]:
    """Sample examples of a scene by the weights of their kinds, without repeats if there are enough."""
    offered = [example for example in scene.examples if example.kind in mixture]
    weights = np.array([mixture[example.kind] for example in offered])
    repeat = len(weights) < count
    chosen = rng.choice(len(weights), size=count, replace=repeat, p=weights / weights.sum())
    return [offered[i] for i in chosen]


class SceneBatches(Dataset):
    """The scenes of each step.

    Args:
        batch_size: Scenes per step, of all processes together.
        first_seed: Of the scenes of step 0.
        crowded: Use half of the seeds, sampled in proportion to how many objects their scenes show.
        world: What the scenes can show.
        augment: How they are changed.
        seed: Of everything sampled here.
        rank: Of this process.
        world_size: How many processes share each step.

    Raises:
        ValueError: If the processes cannot share the scenes equally.
    """

    def __init__(
        self,
        processor: Processor,
        batch_size: int,
        *,
        first_seed: int = 0,
        crowded: bool = False,
        world: emoji.World = emoji.WORLD,
        augment: tuple[str, ...] = (),
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size % world_size:
            raise ValueError(
                f"{world_size} processes cannot share {batch_size} scenes per step equally. Change one of the numbers."
            )
        self.processor, self.batch_size, self.first_seed = processor, batch_size, first_seed
        self.crowded, self.world, self.augment = crowded, world, augment
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.patch_size = processor.image_size // math.isqrt(processor.num_image_tokens)

    def scene_seeds(self, step: int) -> list[int]:
        """The seeds of a step, of all processes together."""
        count = self.batch_size * (2 if self.crowded else 1)
        first = self.first_seed + step * count
        offered = range(first, first + count)
        if not self.crowded:
            return list(offered)
        weights = np.array([len(emoji.planned_names(seed, world=self.world)) for seed in offered])
        rng = np.random.default_rng((self.seed, 3, step))
        return rng.choice(offered, self.batch_size, replace=False, p=weights / weights.sum()).tolist()

    def scenes(self, step: int) -> list[emoji.Scene]:
        """This process's share of the scenes of a step."""
        share = self.batch_size // self.world_size
        seeds = self.scene_seeds(step)[self.rank * share : (self.rank + 1) * share]
        return [emoji.make_scene(seed, "train", self.processor.image_size, self.world, self.augment) for seed in seeds]

    def pixel_values(self, scenes: list[emoji.Scene]) -> Float[Tensor, "I 3 H W"]:
        return self.processor.preprocess_images([scene.image for scene in scenes])


class MaskBatches(SceneBatches):
    """For ``MaskVQVAEObjective``: the masks of all objects, cropped to their boxes, and which codes are misread.

    Args:
        misread: The fraction of the codes.
    """

    def __init__(self, processor: Processor, batch_size: int, *, misread: float, **options):
        super().__init__(processor, batch_size, **options)
        self.misread = misread

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        objects = [o for scene in self.scenes(step) for o in scene.objects]
        rng = np.random.default_rng((self.seed, 4, step, self.rank))
        return {
            "masks": torch.from_numpy(np.stack([crop_mask(o.mask, o.box) for o in objects])),
            "misread": torch.from_numpy(rng.random((len(objects), CODES_PER_MASK)) < self.misread),
        }


class AlignmentBatches(SceneBatches):
    """For ``AlignmentObjective``: images, names as "cat", " cat" and " cats", which patch shows which of them, which
    object each patch shows, and the boxes and poses of all objects.
    """

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        scenes, owners, poses = self.scenes(step), [], []
        shows = np.stack([names_in_patches(scene, self.patch_size) for scene in scenes])
        for scene in scenes:
            of_scene = patch_owners(scene, self.patch_size)
            owners.append(np.where(of_scene >= 0, of_scene + len(poses), -1))
            for o in scene.objects:
                poses.append([v / scene.size for v in o.box] + [o.angle / emoji.TILT, float(o.mirrored)])
        return {
            "pixel_values": self.pixel_values(scenes),
            "name_ids": self.name_ids(),
            "shows": torch.from_numpy(shows).repeat(1, 1, 3),
            "owners": torch.from_numpy(np.stack(owners)),
            "poses": torch.tensor(poses),
        }

    def name_ids(self) -> Int[Tensor, "M L"]:
        names = self.world.names
        forms = [*names, *(f" {n}" for n in names), *(f" {emoji.plural(n)}" for n in names)]
        rows = [torch.tensor(ids) for ids in self.processor.encode(forms)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.processor.pad_token_id)


class SuffixBatches(SceneBatches):
    """For ``SuffixObjective``: E prompts with answers per scene, and one image for the E of them.

    Args:
        mixture: How often each kind of example is sampled, relative to the others.
        examples: E.
        vae: Encodes the masks, if the mixture has ``segment``.
    """

    def __init__(
        self,
        processor: Processor,
        batch_size: int,
        *,
        mixture: dict[str, float],
        examples: int,
        vae: MaskVQVAE | None = None,
        **options,
    ):
        super().__init__(processor, batch_size, **options)
        self.mixture, self.examples, self.vae = mixture, examples, vae

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        scenes, prompts, answers = self.scenes(step), [], []
        for scene in scenes:
            rng = np.random.default_rng((self.seed, 2, scene.seed))
            for example in sample_examples(scene, self.examples, rng, self.mixture):
                prompts.append(example.prompt)
                answers.append(self.answer(scene, example))
        return self.processor.tokenize(prompts, answers, "right") | {"pixel_values": self.pixel_values(scenes)}

    def answer(self, scene: emoji.Scene, example: emoji.Example) -> str:
        if example.kind != "segment":
            return example.answers[0]
        classes = example.prompt.removeprefix("segment ").split(locations.SEPARATOR)
        return emoji.segment_target(scene.objects, classes, scene.size, self.vae.codes_from_masks)


def save_examples(scenes: Sequence[emoji.Scene], folder: Path, kinds: Sequence[str]) -> None:
    """Write scenes as a data set to fine-tune on: images and ``annotations.jsonl`` (training/examples.py).

    Args:
        kinds: Of the examples. Those whose answer is empty are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for scene in scenes:
        name = f"{scene.split}-{scene.seed}.png"
        Image.fromarray(scene.image).save(folder / name)
        for example in scene.examples:
            if example.kind in kinds and example.answers[0]:
                lines.append(json.dumps({"image": name, "prefix": example.prompt, "suffix": example.answers[0]}))
    (folder / "annotations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
