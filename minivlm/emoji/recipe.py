"""Training a small PaliGemma from nothing: first pictures and words meet, then the whole model learns to answer.

    S scenes a step · E examples of a scene · B = S · E rows · P patches · M names of L words · T tokens · D width
    O objects of a step · C codes

Stage 0, ``masks``, has nothing to do with the model: it trains the VQ-VAE (vqvae.py) that turns the mask of an object
into 16 words and back, so that there is something to teach when `segment` is asked.

Stage 1, ``align``: the tower, the projector and the decoder's word embeddings, with the sigmoid loss (losses.py).
Each pair of that loss stands alone, so a pair may be *one patch* and one name: true where the patch shows the thing.
The text encoder is a bag of words, the mean of the decoder's own embeddings: what a patch learns to say is at once
the word the decoder will write.

Stage 2, ``answer``: everything, on captions, questions and detections, with the prefix-LM mask and the loss on the
suffix alone. The tower comes along slowly: a long linear warm-up to a fraction of the learning rate, or what stage 1
taught is lost.

Stage 3, ``polish``: the same on new scenes, with more of what is still hard, while the learning rate falls to nothing.

Stage 4, ``finish``: the learning rate rises and falls once more (a warm restart, arXiv:1608.03983), on scenes with many
objects and on the two tasks that must name them all, captions and detections.

Stage 5, ``pose``: the tower and the projector again. To name a thing, nobody needs to know whether it is mirrored or
tilted; its mask depends on that most of all. So each patch learns to tell the pose of the thing that it shows.

Stage 6, ``segment``: everything once more, with masks.

Stage 7, ``redraw``: the decoder of the VQ-VAE again. Many of the codes that the model writes are not those of the true
mask; from them, right or wrong, the decoder learns to draw the mask that was most likely meant.

Scenes are drawn by seed (scenes.py), step ``i`` having the same ones on any machine, so a run that is killed goes on
from its last state as if nothing had happened. Sources: sigmoid loss arXiv:2303.15343; stages and slow tower
arXiv:2407.07726, section 3.2; the VQ-VAE's losses and moving averages arXiv:1711.00937, equation 3 and appendix A.1;
soft IoU Rahman and Wang 2016, doi:10.1007/978-3-319-50835-1_22.
"""

import argparse
import contextlib
import copy
import gc
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  imported after init_process_group, it would keep the group's threads alive
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from minivlm import emoji, locations, losses
from minivlm.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from minivlm.emoji.evaluation import MAX_ANSWER_TOKENS, match_detections, query_all_objects
from minivlm.emoji.scenes import texts
from minivlm.generation import generate
from minivlm.locations import CODES, crop_mask
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.tokenizer import train_tokenizer
from minivlm.vqvae import CODE_DIM, MaskVQVAE, code_grid

LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run. The defaults are the recipe of the embedded checkpoint."""

    seed: int = 0
    image_size: int = 112  # pixels
    patch_size: int = 16  # pixels
    width: int = 192  # of tower and decoder
    mlp_width: int = 512
    tower_layers: int = 4
    decoder_layers: int = 4
    heads: int = 4
    masks_scenes: int = 96_000
    masks_batch: int = 64  # scenes a step
    masks_lr: float = 1e-3
    align_scenes: int = 120_000
    align_batch: int = 64  # scenes a step
    align_lr: float = 1.5e-3
    answer_scenes: int = 184_000
    answer_horizon: int = 280_000  # scenes after which the learning rate would be nothing: stage 3 goes on before that
    answer_batch: int = 16  # scenes a step
    examples: int = 4  # of each scene, in stages 2 to 4 and 6
    answer_lr: float = 1e-3
    tower_lr: float = 0.2  # of the learning rate of the rest
    tower_warmup: float = 0.2  # of stage 2
    polish_scenes: int = 144_000
    polish_lr: float = 6e-4
    polish_tower_lr: float = 0.3  # of it
    finish_scenes: int = 384_000
    finish_lr: float = 1e-3
    finish_tower_lr: float = 0.4  # of it
    pose_scenes: int = 384_000
    pose_batch: int = 64  # scenes a step
    pose_lr: float = 2e-3
    pose_tower_lr: float = 0.5  # of it
    segment_scenes: int = 400_000
    segment_lr: float = 8e-4
    segment_tower_lr: float = 0.4  # of it
    redraw_scenes: int = 48_000
    redraw_batch: int = 32  # scenes a step
    redraw_lr: float = 4e-4
    warmup: float = 0.01  # of each stage
    weight_decay: float = 0.02
    precision: str = "bfloat16"  # of the arithmetic, by autocast; weights are float32. Or "float32"

    def __post_init__(self):
        if self.precision not in ("bfloat16", "float32"):
            raise ValueError(f"precision must be 'bfloat16' or 'float32', not {self.precision!r}.")
        for name in ("masks", "align", "answer", "pose", "redraw"):
            name, batch = f"{name}_scenes", getattr(self, f"{name}_batch")
            if batch < 1 or getattr(self, name) < batch:
                raise ValueError(f"{name} is {getattr(self, name)}: it must fill at least one step of {batch} scenes.")


# How often each kind of example is drawn in stage 2, relative to the others.
MIXTURE = {
    "caption": 4.0,
    "cap": 1.0,
    "describe": 1.0,
    "what": 0.75,
    "how many": 1.0,
    "is there": 0.5,
    "where": 0.75,
    "relation": 3.0,
    "detect": 1.5,
}
# And in stage 3: questions are known by then, several things at once are still hard.
POLISH = MIXTURE | {"how many": 1.5, "relation": 1.5, "detect": 3.0}
# And in stage 4: a little of everything, so that nothing is forgotten.
FINISH = {
    "caption": 5.0,
    "cap": 0.5,
    "describe": 0.5,
    "what": 0.5,
    "how many": 1.5,
    "is there": 0.25,
    "where": 0.5,
    "relation": 1.0,
    "detect": 5.0,
}
# And in stage 6.
SEGMENT = FINISH | {"caption": 10.0, "detect": 2.5, "segment": 6.0}


# --- what is trained ------------------------------------------------------------------------------------------------


def new_processor(recipe: TrainConfig) -> Processor:
    """A processor whose tokenizer has just learned the words of the scenes."""
    tokenizer = train_tokenizer(texts(range(2000)), vocab_size=2560)
    return Processor(tokenizer, recipe.image_size, (recipe.image_size // recipe.patch_size) ** 2)


def new_model(recipe: TrainConfig, processor: Processor) -> PaliGemma:
    """PaliGemma's architecture, small, with random weights."""
    vision = SiglipVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.tower_layers,
        num_attention_heads=recipe.heads,
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
    )
    text = GemmaConfig(
        vocab_size=math.ceil(processor.tokenizer.get_vocab_size() / 64) * 64,
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.decoder_layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=1,
        head_dim=recipe.width // recipe.heads,
        max_position_embeddings=512,
    )
    ids = {f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    return PaliGemma(PaliGemmaConfig(vision, text, processor.image_token_id, **ids)).init_weights(recipe.seed)


class MaskVQVAEObjective(nn.Module):
    """Stage 0: the VQ-VAE's losses. A code's vector is the moving average of what the encoder gave that code."""

    decay = 0.99  # of the averages, a step
    commitment = 0.25  # weight of the encoder's distance to the codebook

    def __init__(self):
        super().__init__()
        self.vae = MaskVQVAE()
        self.register_buffer("sizes", torch.zeros(CODES))  # vectors that a code was given, on average
        self.register_buffer("sums", torch.zeros(CODES, CODE_DIM))  # of those vectors

    def forward(self, masks: Float[Tensor, "O 64 64"]) -> Float[Tensor, ""]:
        found = self.vae.encoder(2 * masks[:, None] - 1).float()  # [O, D, 4, 4]
        codes = self.vae._vq_vae.nearest(found.detach())
        nearest = code_grid(codes, self.vae._vq_vae._embedding)
        # forth, the decoder gets codebook vectors; back, the encoder gets their gradient as if they were its own
        drawn = self.vae.decoder(found + (nearest - found).detach())[:, 0].float()
        self.follow(found.detach().flatten(2).mT.flatten(0, 1), codes.flatten())
        return F.mse_loss(drawn, 2 * masks - 1) + self.commitment * F.mse_loss(found, nearest)

    @torch.no_grad()
    def follow(self, vectors: Float[Tensor, "N D"], codes: Int[Tensor, " N"]) -> None:
        """Moves the codebook. A code that hardly any vector takes goes beside one that many take, to share its work."""
        taken = F.one_hot(codes, CODES).to(vectors)
        new = torch.cat([taken.sum(0)[:, None], taken.T @ vectors], dim=1)
        if dist.is_initialized():
            dist.all_reduce(new)
        self.sizes.lerp_(new[:, 0], 1 - self.decay)
        self.sums.lerp_(new[:, 1:], 1 - self.decay)
        idle = (self.sizes < 1).nonzero()[:, 0]
        busy = self.sizes.topk(len(idle)).indices
        idle, busy = (some[self.sizes[busy] > 4] for some in (idle, busy))
        for average in (self.sizes, self.sums):
            average[busy] /= 2
            average[idle] = average[busy]
        self.sums[idle] *= 1.01  # not at the same place, or the second of the two would never be the nearest
        self.vae._vq_vae._embedding.copy_(self.sums / self.sizes.clamp_min(1e-5)[:, None])


class AlignmentObjective(nn.Module):
    """Stage 1: scores every patch against every name with the sigmoid loss."""

    def __init__(self, model: PaliGemma):
        super().__init__()
        self.model = model
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def names(self, name_ids: Int[Tensor, "M L"]) -> Float[Tensor, "M D"]:
        """Bags of words: the mean embedding of each row's tokens, 0 being padding."""
        embeddings = self.model.language_model.model.embed(name_ids)
        words = (name_ids != 0)[..., None]
        return (embeddings * words).sum(1) / words.sum(1)

    def forward(
        self, pixel_values: Float[Tensor, "S 3 H W"], name_ids: Int[Tensor, "M L"], shows: Bool[Tensor, "S P M"]
    ) -> Float[Tensor, ""]:
        patches, names = self.model.encode_image(pixel_values).flatten(0, 1), self.names(name_ids)
        with torch.autocast(patches.device.type, enabled=False):  # the scores in float32
            return losses.sigmoid_loss(patches, names, self.log_temperature, self.bias, shows.flatten(0, 1))


class PoseObjective(nn.Module):
    """Stage 5: a reader, dropped afterwards, asks every patch how the thing that it shows is tilted and mirrored.

    The decoder understands what the patches have said so far, so that must hardly change.
    """

    holding = 0.005  # weight of the squared change

    def __init__(self, model: PaliGemma):
        super().__init__()
        self.model = model
        self.before = copy.deepcopy(nn.Sequential(model.vision_tower, model.multi_modal_projector))
        self.before.requires_grad_(False)
        width = model.config.text_config.hidden_size
        self.reader = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, 2))

    def begin(self) -> None:
        """What the patches say now is what they must hold on to."""
        now = nn.Sequential(self.model.vision_tower, self.model.multi_modal_projector)
        self.before.load_state_dict(now.state_dict())

    def forward(
        self, pixel_values: Float[Tensor, "S 3 H W"], owners: Int[Tensor, "S P"], poses: Float[Tensor, "O 2"]
    ) -> Float[Tensor, ""]:
        """`owners`: which of the things each patch shows, -1 where none; `poses`: (angle / TILT, mirrored) of each.

        The squared error of the angle and the cross-entropy of the mirroring, a mean over all patches.
        """
        features = self.model.encode_image(pixel_values)
        asked = owners >= 0
        (angle, mirrored), wanted = self.reader(features[asked]).float().unbind(1), poses[owners[asked]]
        misread = F.mse_loss(angle, wanted[:, 0]) + F.binary_cross_entropy_with_logits(mirrored, wanted[:, 1])
        changed = F.mse_loss(features.float(), self.before(pixel_values).float())
        return misread * asked.float().mean() + self.holding * changed


class SuffixObjective(nn.Module):
    """Stages 2 to 4 and 6: the suffix's cross-entropy. Short rows and long ones go apart, to spare padding."""

    def __init__(self, model: PaliGemma):
        super().__init__()
        self.model = model

    def forward(
        self, pixel_values: Float[Tensor, "S 3 H W"], labels: Int[Tensor, "B T"], **text: Int[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        features = self.model.encode_image(pixel_values).repeat_interleave(len(labels) // len(pixel_values), dim=0)
        lengths = text["attention_mask"].sum(1)  # padding is on the right
        loss, words = 0.0, (labels[:, 1:] != -100).sum()
        for rows in lengths.argsort(stable=True).chunk(2):
            end = int(lengths[rows].max())
            inputs = {name: ids[rows, :end] for name, ids in text.items()}
            part = labels[rows, :end]
            share = (part[:, 1:] != -100).sum() / words
            loss = loss + share * self.model.loss(part, image_features=features[rows], **inputs)
        return loss


class MaskDecoderObjective(nn.Module):
    """Stage 7: the VQ-VAE's decoder alone. Encoder and codebook stay as they are, and with them what a code says.

    ``model`` learns nothing here; it writes the codes (RedrawSteps), and its weights are kept with the run's state.
    """

    steepness = 5.0  # of the sigmoid that turns drawn values, about -1 to 1, into how likely a pixel is inside
    squared = 0.2  # weight of the squared error, which keeps the values near -1 and 1
    true_codes = 0.3  # weight of the codes of true masks, against 1 of written ones

    def __init__(self, model: PaliGemma):
        super().__init__()
        self.model = model
        self.vae = MaskVQVAE()

    def forward(
        self, codes: Int[Tensor, "O 16"], masks: Float[Tensor, "O 64 64"], written: Bool[Tensor, " O"]
    ) -> Float[Tensor, ""]:
        """1 - soft IoU (intersection over union, with likelihoods for pixels), and a little squared error: weighted, a
        mean over all masks."""
        drawn = self.vae.decode(codes).float()
        likely = torch.sigmoid(self.steepness * drawn)
        both = (likely * masks).sum((1, 2))
        either = (likely + masks).sum((1, 2)) - both
        wrong = 1 - both / either + self.squared * (drawn - (2 * masks - 1)).square().mean((1, 2))
        return (wrong * torch.where(written, 1.0, self.true_codes)).mean()


# --- what it is trained on ------------------------------------------------------------------------------------------


COVERS = 0.25  # of a patch, for it to show a thing


def shares_of_patches(scene: emoji.Scene, patch_size: int) -> Float[np.ndarray, "O P"]:
    """How much of each patch each thing of the scene covers."""
    side = scene.size // patch_size
    return np.stack(
        [t.mask.reshape(side, patch_size, side, patch_size).mean(axis=(1, 3)).ravel() for t in scene.objects]
    )


def patches_show(scene: emoji.Scene, patch_size: int) -> Bool[np.ndarray, "P M"]:
    """Which patch shows which of ``emoji.OBJECTS``."""
    shares = shares_of_patches(scene, patch_size)
    shows = np.zeros((shares.shape[1], len(emoji.OBJECTS)), dtype=bool)
    for thing, share in zip(scene.objects, shares, strict=True):
        shows[:, emoji.OBJECTS.index(thing.name)] |= share >= COVERS
    return shows


def owners_of_patches(scene: emoji.Scene, patch_size: int) -> Int[np.ndarray, " P"]:
    """Which thing of the scene each patch shows most of; -1 where it shows none."""
    shares = shares_of_patches(scene, patch_size)
    return np.where(shares.max(0) >= COVERS, shares.argmax(0), -1)


def choose_examples(
    scene: emoji.Scene, count: int, rng: np.random.Generator, mixture: dict[str, float]
) -> list[emoji.Example]:
    """``count`` examples of a scene, drawn by the weights of their kinds: different ones as long as they last."""
    offered = [example for example in scene.examples if example.kind in mixture]
    weights = np.array([mixture[example.kind] for example in offered])
    repeat = len(weights) < count
    chosen = rng.choice(len(weights), size=count, replace=repeat, p=weights / weights.sum())
    return [offered[i] for i in chosen]


class Steps(Dataset):
    """Item ``i`` is the batch of step ``i``: the share of process ``rank`` out of ``world``."""

    first_seed = 0
    mixture = MIXTURE

    def __init__(self, recipe: TrainConfig, processor: Processor, scenes_a_step: int, rank: int = 0, world: int = 1):
        if scenes_a_step % world:
            raise ValueError(f"{scenes_a_step} scenes a step do not divide among {world} processes: change either.")
        self.recipe, self.processor = recipe, processor
        self.batch, self.rank, self.world = scenes_a_step, rank, world

    def seeds(self, step: int) -> list[int]:
        """The scenes of a step, of all processes together."""
        first = self.first_seed + step * self.batch
        return list(range(first, first + self.batch))

    def scenes(self, step: int) -> list[emoji.Scene]:
        share = self.batch // self.world
        mine = self.seeds(step)[self.rank * share : (self.rank + 1) * share]
        return [emoji.make_scene(seed, "train", self.recipe.image_size) for seed in mine]


class MaskSteps(Steps):
    """The masks of all objects of the scenes, as seen in their boxes."""

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        things = [thing for scene in self.scenes(step) for thing in scene.objects]
        return {"masks": torch.from_numpy(np.stack([crop_mask(thing.mask, thing.box) for thing in things]))}


class AlignSteps(Steps):
    """Pictures, names, and which patch shows which. A name stands three times: "cat", " cat" and " cats"."""

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        drawn = self.scenes(step)
        shows = np.stack([patches_show(scene, self.recipe.patch_size) for scene in drawn])
        return {
            "pixel_values": self.processor.preprocess_images([scene.image for scene in drawn]),
            "name_ids": self.name_ids(),
            "shows": torch.from_numpy(shows).repeat(1, 1, 3),
        }

    def name_ids(self) -> Int[Tensor, "M L"]:
        names = emoji.OBJECTS
        forms = [*names, *(f" {n}" for n in names), *(f" {emoji.plural(n)}" for n in names)]
        rows = [torch.tensor(ids) for ids in self.processor.encode(forms)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.processor.pad_token_id)


class AnswerSteps(Steps):
    """E rows of text a scene, one picture for the E of them."""

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        drawn, prompts, answers = self.scenes(step), [], []
        for scene in drawn:
            rng = np.random.default_rng((self.recipe.seed, 2, scene.seed))
            for example in choose_examples(scene, self.recipe.examples, rng, self.mixture):
                prompts.append(example.prompt)
                answers.append(self.answer(scene, example))
        batch = self.processor.tokenize(prompts, answers, "right")
        return batch | {"pixel_values": self.processor.preprocess_images([scene.image for scene in drawn])}

    def answer(self, scene: emoji.Scene, example: emoji.Example) -> str:
        return example.answers[0]


class PolishSteps(AnswerSteps):
    """The same on the scenes after those of stage 2, with another mixture."""

    mixture = POLISH

    @property
    def first_seed(self) -> int:
        return self.recipe.answer_scenes


class FinishSteps(AnswerSteps):
    """The same on the scenes after those of stage 3: half of them, drawn in proportion to how much they show."""

    mixture = FINISH

    @property
    def first_seed(self) -> int:
        return self.recipe.answer_scenes + self.recipe.polish_scenes

    def seeds(self, step: int) -> list[int]:
        first = self.first_seed + 2 * step * self.batch
        offered = range(first, first + 2 * self.batch)
        weights = np.array([emoji.planned_count(seed) for seed in offered])
        rng = np.random.default_rng((self.recipe.seed, 3, step))
        return rng.choice(offered, self.batch, replace=False, p=weights / weights.sum()).tolist()


class PoseSteps(FinishSteps):
    """Stage 4's scenes once more: the pictures, which thing each patch shows, and the poses of all things."""

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        drawn, owners, poses = self.scenes(step), [], []
        for scene in drawn:
            found = owners_of_patches(scene, self.recipe.patch_size)
            owners.append(np.where(found >= 0, found + len(poses), -1))
            poses += [(thing.angle / emoji.TILT, float(thing.mirrored)) for thing in scene.objects]
        return {
            "pixel_values": self.processor.preprocess_images([scene.image for scene in drawn]),
            "owners": torch.from_numpy(np.stack(owners)),
            "poses": torch.tensor(poses),
        }


class SegmentSteps(FinishSteps):
    """The same on the scenes after those of stage 4, with masks, for which it needs the VQ-VAE of stage 0."""

    mixture = SEGMENT
    vae: MaskVQVAE  # put here when stage 0 has trained it

    @property
    def first_seed(self) -> int:
        return super().first_seed + 2 * self.recipe.finish_scenes

    def answer(self, scene: emoji.Scene, example: emoji.Example) -> str:
        if example.kind != "segment":
            return example.answers[0]
        classes = example.prompt.removeprefix("segment ").split(locations.SEPARATOR)
        return emoji.segment_target(scene.objects, classes, scene.size, self.vae.codes_from_masks)


class RedrawSteps(FinishSteps):
    """Masks and codes of the scenes after those of stage 6: those that the model writes when asked for all things, for
    each thing that it finds, with the true mask as seen in the written box; and those of the true masks in true boxes.
    """

    model: PaliGemma  # put here, and the VQ-VAE too, when they are trained
    vae: MaskVQVAE

    @property
    def first_seed(self) -> int:
        return super().first_seed + 2 * (self.recipe.finish_scenes + self.recipe.segment_scenes)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        drawn = self.scenes(step)
        prompts = [query_all_objects(scene, "segment").prompt for scene in drawn]
        images = [scene.image for scene in drawn]
        answers = generate(self.model, self.processor, images, prompts, max_new_tokens=MAX_ANSWER_TOKENS)
        codes, masks, written = [], [], []
        for scene, answer in zip(drawn, answers, strict=True):
            things = scene.objects
            found = locations.parse_detections(answer, scene.size, scene.size).detections
            partners = [None if j is None else found[j] for j in match_detections(things, found)]
            pairs = [(thing, d) for thing, d in zip(things, partners, strict=True) if d and d.codes]
            codes += [d.codes for _, d in pairs]
            codes += self.vae.codes_from_masks([thing.mask for thing in things], [thing.box for thing in things])
            masks += [crop_mask(thing.mask, d.box) for thing, d in pairs]
            masks += [crop_mask(thing.mask, thing.box) for thing in things]
            written += [True] * len(pairs) + [False] * len(things)
        return {
            "codes": torch.tensor(codes),
            "masks": torch.from_numpy(np.stack(masks)),
            "written": torch.tensor(written),
        }


# --- a stage --------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """A linear rise over the first ``warmup`` of the steps, then half a cosine down to nothing."""
    rise = max(1, round(warmup * steps))
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def new_optimizer(module: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with the tower in groups of its own; only matrices decay, embeddings and scalars do not."""
    groups = {}
    for name, weight in module.named_parameters():
        decays = weight.ndim > 1 and "embed" not in name
        groups.setdefault(("vision_tower" in name, decays), []).append(weight)
    return torch.optim.AdamW(
        [
            {"params": weights, "tower": tower, "weight_decay": weight_decay * decays}
            for (tower, decays), weights in groups.items()
        ],
        lr=0.0,
        betas=(0.9, 0.98),
    )


@dataclass
class Stage:
    name: str
    module: nn.Module
    batches: Steps
    steps: int
    horizon: int  # steps after which the learning rate is nothing
    lr: float
    tower_lr: float
    tower_warmup: float
    warmup: float

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        for group in optimizer.param_groups:
            lr = self.lr * learning_rate(step, self.horizon, self.warmup)
            if group["tower"]:
                lr *= self.tower_lr * min(1.0, (step + 1) / max(1, round(self.tower_warmup * self.horizon)))
            group["lr"] = lr


def stages(recipe: TrainConfig, model: PaliGemma, processor: Processor, rank: int = 0, world: int = 1) -> list[Stage]:
    """The stages of a recipe, in order; the first and the last train a VQ-VAE, all between them the same model."""

    def stage(name, module, kind, scenes, horizon, batch, lr, tower_lr, tower_warmup=0.0):
        batches = kind(recipe, processor, batch, rank, world)
        steps = scenes // batch, horizon // batch
        return Stage(name, module, batches, *steps, lr, tower_lr, tower_warmup, recipe.warmup)

    r, answering = recipe, SuffixObjective(model)
    return [
        stage("masks", MaskVQVAEObjective(), MaskSteps, r.masks_scenes, r.masks_scenes, r.masks_batch, r.masks_lr, 1.0),
        stage(
            "align",
            AlignmentObjective(model),
            AlignSteps,
            r.align_scenes,
            r.align_scenes,
            r.align_batch,
            r.align_lr,
            1.0,
        ),
        stage(
            *("answer", answering, AnswerSteps, r.answer_scenes, r.answer_horizon, r.answer_batch, r.answer_lr),
            *(r.tower_lr, r.tower_warmup),
        ),
        stage(
            *("polish", answering, PolishSteps, r.polish_scenes, r.polish_scenes, r.answer_batch, r.polish_lr),
            r.polish_tower_lr,
        ),
        stage(
            *("finish", answering, FinishSteps, r.finish_scenes, r.finish_scenes, r.answer_batch, r.finish_lr),
            r.finish_tower_lr,
        ),
        stage(
            *("pose", PoseObjective(model), PoseSteps, r.pose_scenes, r.pose_scenes, r.pose_batch, r.pose_lr),
            r.pose_tower_lr,
        ),
        stage(
            *("segment", answering, SegmentSteps, r.segment_scenes, r.segment_scenes, r.answer_batch, r.segment_lr),
            r.segment_tower_lr,
        ),
        stage(
            "redraw",
            MaskDecoderObjective(model),
            RedrawSteps,
            r.redraw_scenes,
            r.redraw_scenes,
            r.redraw_batch,
            r.redraw_lr,
            1.0,
        ),
    ]


def share_of_loss(batch: dict[str, Tensor], world: int) -> float:
    """What a process's mean loss counts in the mean over all: suffixes, and numbers of objects, differ among them."""
    if world == 1 or "shows" in batch or "owners" in batch:
        return 1.0
    counted = batch["masks"].new_ones(len(batch["masks"])) if "masks" in batch else batch["labels"][:, 1:] != -100
    count = counted.sum().float()
    total = count.clone()
    dist.all_reduce(total)
    return float(count * world / total)


@contextlib.contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, torch's fused attention in bfloat16 takes twice as long forth and back as the products written out."""
    if device.type != "cpu":
        yield
        return
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name, for the CPU too
    with sdpa_kernel(SDPBackend.MATH):
        yield


def train_step(
    module: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, world: int, precision: str
) -> float:
    """One update; returns the loss over the batches of all processes."""
    device = next(module.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    share = share_of_loss(batch, world)
    with plain_attention(device), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = module(**batch) * share
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    loss = loss.detach().clone()
    if world > 1:
        dist.all_reduce(loss)
    return float(loss) / world


# --- the state of a run ---------------------------------------------------------------------------------------------


def save_state(path: Path, stage: int, step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Everything needed to go on, in one file, replaced in one move: a kill leaves the old one or the new one."""
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    for name, weight in module.named_parameters():
        tensors |= {f"adam.{name}.{key}": value for key, value in optimizer.state[weight].items()}
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(whole, path.with_suffix(".part"), metadata={"stage": str(stage), "step": str(step)})
    os.replace(path.with_suffix(".part"), path)


def state_position(path: Path) -> tuple[int, int]:
    """(stage, step) that a saved run has come to; (0, 0) where there is none."""
    if not path.exists():
        return 0, 0
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata()
            return int(found["stage"]), int(found["step"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no state of a training run ({error}): delete it to start anew.") from error


def load_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Puts a saved state into a module and, where given, its optimizer."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    module.load_state_dict({n.removeprefix("module."): v for n, v in tensors.items() if n.startswith("module.")})
    if optimizer is None:
        return
    for name, weight in module.named_parameters():
        prefix = f"adam.{name}."
        optimizer.state[weight] = {
            n.removeprefix(prefix): v.to(weight.device if v.ndim else "cpu")
            for n, v in tensors.items()
            if n.startswith(prefix) and "." not in n.removeprefix(prefix)
        }


# --- a run ----------------------------------------------------------------------------------------------------------


class Log:
    """metrics.jsonl, one line a record; on going on, lines after the saved step are dropped and written again."""

    def __init__(self, path: Path, stage: int, step: int):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _position(line) <= (stage, step)]
        path.write_text("".join(line + "\n" for line in kept))
        self.seconds = json.loads(kept[-1])["seconds"] if kept else 0.0
        self.started = time.monotonic()

    def write(self, **record) -> None:
        seconds = round(self.seconds + time.monotonic() - self.started, 1)
        with self.path.open("a") as file:
            file.write(json.dumps(record | {"seconds": seconds}) + "\n")


def _position(line: str) -> tuple[int, int]:
    record = json.loads(line)
    return record["stage"], record["step"]


def draw_curve(out: Path) -> None:
    """metrics.jsonl → curve.png: the loss of each stage over the scenes seen."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(14, 6), layout="constrained")
    titles = ("0: masks", "1: align", "2: answer", "3: polish", "4: finish", "5: pose", "6: segment", "7: redraw")
    for stage, title in enumerate(titles):
        axes = figure.add_subplot(2, 4, stage + 1)
        points = [(r["scenes"] / 1000, r["loss"]) for r in records if r["stage"] == stage]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), color="#0072B2")
        unit = {0: "squared error", 7: "1 − soft IoU"}.get(stage, "nats")
        axes.set(title=f"stage {title}", xlabel="thousand scenes", ylabel=f"loss ({unit})", yscale="log")
    figure.savefig(out / "curve.png", dpi=120)


def run_stage(
    stage: Stage, number: int, out: Path, recipe: TrainConfig, place: "DistributedContext", save_every: float
) -> None:
    """Trains one stage from wherever its saved state is, writing state, metrics and curve as it goes."""
    state = out / "state.safetensors"
    at_stage, start = state_position(state)
    start = start if at_stage == number else 0
    module = stage.module.to(place.device).train()
    optimizer = new_optimizer(module, recipe.weight_decay)
    if at_stage == number and start:
        load_state(state, module, optimizer)
    if stage.name == "redraw":  # whoever prepares its steps asks the model, on a CPU
        stage.batches.model = copy.deepcopy(module.model).cpu().eval()
    if place.world > 1:  # stages that leave something aside have weights without a gradient
        aside = stage.name in ("align", "pose", "redraw")
        wrapped = DistributedDataParallel(module, find_unused_parameters=aside)
    else:
        wrapped = module
    log = Log(out / "metrics.jsonl", number, start) if place.first else None
    loader = DataLoader(
        stage.batches, batch_size=None, sampler=range(start, stage.steps), num_workers=place.workers, prefetch_factor=4
    )
    size = stage.batches.batch
    bar = tqdm(total=stage.steps * size, initial=start * size, unit="img", desc=stage.name, disable=not place.first)
    recent, saved = [], time.monotonic()
    for step, batch in enumerate(loader, start):
        stage.set_learning_rate(optimizer, step)
        recent.append(train_step(wrapped, batch, optimizer, place.world, recipe.precision))
        bar.update(size)
        done = step + 1
        if done % LOG_EVERY == 0 or done == stage.steps:
            loss = sum(recent) / len(recent)
            recent = []
            bar.set_postfix(loss=f"{loss:.4f}")
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {done} of {stage.name}: lower the learning rate.")
            if log:
                log.write(stage=number, step=done, scenes=done * size, loss=loss)
                due = time.monotonic() - saved > save_every or done == stage.steps
                if due:
                    save_state(state, number, done, module, optimizer)
                    draw_curve(out)
                    saved = time.monotonic()
    bar.close()


@dataclass(frozen=True)
class DistributedContext:
    """Where a run happens: its device, its processes, and the helpers of each that draw scenes."""

    device: torch.device
    rank: int = 0
    world: int = 1
    workers: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0


def find_distributed_context(device: str | None, workers: int) -> DistributedContext:
    """The device asked for, or a GPU where there is one; one process, or as many as ``torchrun`` started."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return DistributedContext(torch.device(device), rank, world, workers)


def train(recipe: TrainConfig, out: Path, place: DistributedContext, save_every: float = 180.0) -> PaliGemma:
    """Runs a recipe, or goes on with it, and writes the checkpoint to ``out/checkpoint``.

    Raises:
        ValueError: ``out`` holds a run of another recipe, or a damaged one.
    """
    out.mkdir(parents=True, exist_ok=True)
    check_recipe(recipe, out, place)
    torch.manual_seed(recipe.seed)
    processor = new_processor(recipe)
    model = new_model(recipe, processor)
    plan = stages(recipe, model, processor, place.rank, place.world)
    reached, _ = state_position(out / "state.safetensors")
    for number, stage in enumerate(plan):
        if number < reached:  # what earlier stages gave the model is in the saved state, which run_stage loads
            continue
        if stage.name == "pose":
            stage.module.begin()
        if stage.name in ("segment", "redraw"):
            stage.batches.vae = MaskVQVAE.from_pretrained(out)
        if stage.name == "redraw":
            stage.module.vae.load_state_dict(stage.batches.vae.state_dict())
        run_stage(stage, number, out, recipe, place, save_every)
        if stage.name == "masks" and place.first:
            stage.module.vae.save_pretrained(out)
    if place.first:
        model = model.to("cpu").eval()
        model.save_pretrained(out / "checkpoint", dtype=torch.bfloat16)
        processor.save_pretrained(out / "checkpoint")
        plan[-1].module.vae.save_pretrained(out / "checkpoint")
    return model


def check_recipe(recipe: TrainConfig, out: Path, place: DistributedContext) -> None:
    """A folder holds one recipe: writes it there, or compares."""
    path = out / "recipe.json"
    if path.exists() and json.loads(path.read_text()) != asdict(recipe):
        raise ValueError(f"{path} records another recipe: choose an empty folder, or repeat its options.")
    if place.first:  # in one move: another process may be reading
        path.with_suffix(".part").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        os.replace(path.with_suffix(".part"), path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m minivlm train``: where to, on what, and every number of the recipe."""
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="folder; an unfinished run there goes on")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 …; a GPU where there is one when not given")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between saved states")
    for entry in fields(TrainConfig):
        name = "--" + entry.name.replace("_", "-")
        parser.add_argument(name, type=type(entry.default), default=entry.default, help=f"default {entry.default}")


def run(args: argparse.Namespace) -> None:
    """``python -m minivlm train``."""
    recipe = TrainConfig(**{entry.name: getattr(args, entry.name) for entry in fields(TrainConfig)})
    place = find_distributed_context(args.device, args.workers)
    train(recipe, args.out, place, args.save_every)
    if place.first:
        print(f"Trained. Look at it with: python -m minivlm evaluate --checkpoint {args.out / 'checkpoint'}")
    if place.world > 1:
        gc.collect()  # frees DistributedDataParallel, a cycle: after the group, it would wait for its threads for ever
        dist.destroy_process_group()
