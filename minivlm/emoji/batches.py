"""Batches of emoji scenes, one class per objective: item ``i`` is the batch of step ``i``.

    I scenes of a process per step · E examples per scene · B = I · E rows · P patches · M names of L tokens
    O objects of these scenes

Scenes are generated from seeds (scenes.py), so step ``i`` has the same ones on any machine and after any interruption.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from minivlm import emoji, locations
from minivlm.emoji.evaluation import MAX_ANSWER_TOKENS, match_detections, query_all_objects
from minivlm.generation import generate
from minivlm.locations import crop_mask
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.vqvae import MaskVQVAE

COVERS = 0.25  # a patch shows an object that covers at least this fraction of it


def patch_coverage(scene: emoji.Scene, patch_size: int) -> Float[np.ndarray, "O P"]:
    """The fraction of each patch that each object of the scene covers."""
    n = scene.size // patch_size
    return np.stack([o.mask.reshape(n, patch_size, n, patch_size).mean(axis=(1, 3)).ravel() for o in scene.objects])


def names_in_patches(scene: emoji.Scene, patch_size: int) -> Bool[np.ndarray, "P M"]:
    """Which patch shows which of ``emoji.OBJECTS``."""
    coverage = patch_coverage(scene, patch_size)
    shows = np.zeros((coverage.shape[1], len(emoji.OBJECTS)), dtype=bool)
    for o, covered in zip(scene.objects, coverage, strict=True):
        shows[:, emoji.OBJECTS.index(o.name)] |= covered >= COVERS
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
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size % world_size:
            raise ValueError(
                f"{world_size} processes cannot share {batch_size} scenes per step equally. Change one of the numbers."
            )
        self.processor, self.batch_size, self.first_seed = processor, batch_size, first_seed
        self.crowded, self.seed, self.rank, self.world_size = crowded, seed, rank, world_size
        self.patch_size = processor.image_size // math.isqrt(processor.num_image_tokens)

    def scene_seeds(self, step: int) -> list[int]:
        """The seeds of a step, of all processes together."""
        count = self.batch_size * (2 if self.crowded else 1)
        first = self.first_seed + step * count
        offered = range(first, first + count)
        if not self.crowded:
            return list(offered)
        weights = np.array([emoji.planned_count(seed) for seed in offered])
        rng = np.random.default_rng((self.seed, 3, step))
        return rng.choice(offered, self.batch_size, replace=False, p=weights / weights.sum()).tolist()

    def scenes(self, step: int) -> list[emoji.Scene]:
        """This process's share of the scenes of a step."""
        share = self.batch_size // self.world_size
        seeds = self.scene_seeds(step)[self.rank * share : (self.rank + 1) * share]
        return [emoji.make_scene(seed, "train", self.processor.image_size) for seed in seeds]

    def pixel_values(self, scenes: list[emoji.Scene]) -> Float[Tensor, "I 3 H W"]:
        return self.processor.preprocess_images([scene.image for scene in scenes])


class MaskBatches(SceneBatches):
    """For ``MaskVQVAEObjective``: the masks of all objects, cropped to their boxes."""

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        objects = [o for scene in self.scenes(step) for o in scene.objects]
        return {"masks": torch.from_numpy(np.stack([crop_mask(o.mask, o.box) for o in objects]))}


class AlignmentBatches(SceneBatches):
    """For ``AlignmentObjective``: images, names as "cat", " cat" and " cats", and which patch shows which of them."""

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        scenes = self.scenes(step)
        shows = np.stack([names_in_patches(scene, self.patch_size) for scene in scenes])
        return {
            "pixel_values": self.pixel_values(scenes),
            "name_ids": self.name_ids(),
            "shows": torch.from_numpy(shows).repeat(1, 1, 3),
        }

    def name_ids(self) -> Int[Tensor, "M L"]:
        names = emoji.OBJECTS
        forms = [*names, *(f" {n}" for n in names), *(f" {emoji.plural(n)}" for n in names)]
        rows = [torch.tensor(ids) for ids in self.processor.encode(forms)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.processor.pad_token_id)


class PoseBatches(SceneBatches):
    """For ``PoseObjective``: images, which object each patch shows, and the poses of all objects."""

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        scenes, owners, poses = self.scenes(step), [], []
        for scene in scenes:
            of_scene = patch_owners(scene, self.patch_size)
            owners.append(np.where(of_scene >= 0, of_scene + len(poses), -1))
            poses += [(o.angle / emoji.TILT, float(o.mirrored)) for o in scene.objects]
        return {
            "pixel_values": self.pixel_values(scenes),
            "owners": torch.from_numpy(np.stack(owners)),
            "poses": torch.tensor(poses),
        }


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


class MaskDecoderBatches(SceneBatches):
    """For ``MaskDecoderObjective``: codes, each with the mask that it should decode to.

    The codes that ``model`` writes when it is asked about all objects, with the true mask cropped to the written box,
    for each object that it finds; and the codes of the true masks in their own boxes, for all objects.
    """

    def __init__(self, processor: Processor, batch_size: int, *, model: PaliGemma, vae: MaskVQVAE, **options):
        super().__init__(processor, batch_size, **options)
        self.model, self.vae = model, vae

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        scenes = self.scenes(step)
        prompts = [query_all_objects(scene, "segment").prompt for scene in scenes]
        images = [scene.image for scene in scenes]
        answers = generate(self.model, self.processor, images, prompts, max_new_tokens=MAX_ANSWER_TOKENS)
        codes, masks, written = [], [], []
        for scene, answer in zip(scenes, answers, strict=True):
            objects = scene.objects
            detections = locations.parse_detections(answer, scene.size, scene.size).detections
            matches = [None if j is None else detections[j] for j in match_detections(objects, detections)]
            pairs = [(o, d) for o, d in zip(objects, matches, strict=True) if d and d.codes]
            codes += [d.codes for _, d in pairs]
            codes += self.vae.codes_from_masks([o.mask for o in objects], [o.box for o in objects])
            masks += [crop_mask(o.mask, d.box) for o, d in pairs]
            masks += [crop_mask(o.mask, o.box) for o in objects]
            written += [True] * len(pairs) + [False] * len(objects)
        return {
            "codes": torch.tensor(codes),
            "masks": torch.from_numpy(np.stack(masks)),
            "written": torch.tensor(written),
        }
