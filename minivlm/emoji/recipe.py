"""The recipe of the embedded checkpoint: its numbers and its stages, in order.

``masks`` trains the mask VQ-VAE, apart from the model, so that there are codes to write when `segment` is asked for.

``align`` trains the vision tower, the projector and the decoder's token embeddings with the sigmoid loss. Each pair of
that loss is scored on its own, so a pair can be one *patch* and one name: true if the patch shows the object.

``answer`` trains everything on captions, questions and detections. The tower learns slowly: a long linear warm-up to a
fraction of the learning rate, or what ``align`` taught it is lost.

``polish`` continues on new scenes, with more of what is still hard, while the learning rate falls to zero.

``finish`` raises the learning rate once more (a warm restart, arXiv:1608.03983), on scenes with many objects and on the
two tasks that must name them all, captions and detections.

``pose`` trains the tower and the projector. An object's name does not depend on whether it is mirrored or tilted, but
its mask does, so each patch learns to tell the pose of the object that it shows.

``segment`` trains everything again, with masks.

``redraw`` trains the decoder of the VQ-VAE again. Many of the codes that the model writes are not those of the true
mask. From them, right or wrong, the decoder learns to draw the mask that was most likely meant.

Each stage has a folder of its own in the run's (training/files.py). Stages and the slow tower follow arXiv:2407.07726,
section 3.2.
"""

import argparse
import contextlib
import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from minivlm import hub, training
from minivlm.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from minivlm.emoji import batches as data
from minivlm.emoji.scenes import MAX_SIZE, MIN_SIZE, texts
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.training import DistributedContext, FitConfig, ParameterGroup, objectives
from minivlm.training.tokenizer import train_tokenizer
from minivlm.vqvae import MaskVQVAE

SAVE_EVERY = 180.0  # seconds


@dataclass(frozen=True)
class TrainConfig:
    """Every number of a run. The defaults are those of the embedded checkpoint.

    ``…_batch`` is in scenes per step, ``…_tower_lr`` a fraction of the stage's learning rate.
    """

    seed: int = 0
    image_size: int = 112  # pixels
    patch_size: int = 16  # pixels
    width: int = 192  # hidden size of tower and decoder
    mlp_width: int = 512  # intermediate size of both
    tower_layers: int = 4
    decoder_layers: int = 4
    heads: int = 4
    masks_scenes: int = 96_000
    masks_batch: int = 64
    masks_lr: float = 1e-3
    align_scenes: int = 120_000
    align_batch: int = 64
    align_lr: float = 1.5e-3
    answer_scenes: int = 184_000
    answer_horizon: int = 280_000  # scenes until the learning rate would reach zero: the next stage starts before that
    answer_batch: int = 16  # of all stages that train the whole model
    examples: int = 4  # of each scene, in those stages
    answer_lr: float = 1e-3
    tower_lr: float = 0.2
    tower_warmup: float = 0.2  # of the horizon
    polish_scenes: int = 144_000
    polish_lr: float = 6e-4
    polish_tower_lr: float = 0.3
    finish_scenes: int = 384_000
    finish_lr: float = 1e-3
    finish_tower_lr: float = 0.4
    pose_scenes: int = 384_000
    pose_batch: int = 64
    pose_lr: float = 2e-3
    pose_tower_lr: float = 0.5
    segment_scenes: int = 400_000
    segment_lr: float = 8e-4
    segment_tower_lr: float = 0.4
    redraw_scenes: int = 48_000
    redraw_batch: int = 32
    redraw_lr: float = 4e-4
    warmup: float = 0.01  # of each stage
    weight_decay: float = 0.02
    precision: str = "bfloat16"  # of the arithmetic, by autocast; weights are float32

    def __post_init__(self):
        training.check_range(self, "seed", 0)
        training.check_range(self, "image_size", MIN_SIZE, MAX_SIZE)
        training.check_range(self, " ".join(f.name for f in fields(self) if f.type is int and f.name != "seed"), 1)
        training.check_range(self, " ".join(f.name for f in fields(self) if f.type is float), 0)
        FitConfig(1, 0.0, warmup=self.warmup, weight_decay=self.weight_decay, precision=self.precision)  # checks them
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size {self.patch_size}, not {self.image_size}.")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of the number of heads, {self.heads}, not {self.width}.")
        for name in (f.name for f in fields(self) if f.name.endswith(("_scenes", "_horizon"))):
            stage = name.split("_")[0]
            batch = f"{stage}_batch" if hasattr(self, f"{stage}_batch") else "answer_batch"
            if getattr(self, name) < getattr(self, batch):
                raise ValueError(
                    f"{name} must be at least {batch}, {getattr(self, batch)}, for one step, not {getattr(self, name)}."
                )


# How often each kind of example is sampled, relative to the others.
ANSWER_MIXTURE = {
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
# Most questions are easy by then; several objects at once are still hard.
POLISH_MIXTURE = ANSWER_MIXTURE | {"how many": 1.5, "relation": 1.5, "detect": 3.0}
# A little of everything, so that nothing is forgotten.
FINISH_MIXTURE = {
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
SEGMENT_MIXTURE = FINISH_MIXTURE | {"caption": 10.0, "detect": 2.5, "segment": 6.0}


def make_processor(config: TrainConfig) -> Processor:
    """A processor with a tokenizer trained on the texts of the scenes."""
    tokenizer = train_tokenizer(texts(range(2000)), vocab_size=2560)
    return Processor(tokenizer, config.image_size, (config.image_size // config.patch_size) ** 2)


def make_model(config: TrainConfig, processor: Processor) -> PaliGemma:
    """A small PaliGemma with random weights."""
    vision = SiglipVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.tower_layers,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    text = GemmaConfig(
        vocab_size=math.ceil(processor.tokenizer.get_vocab_size() / 64) * 64,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.decoder_layers,
        num_attention_heads=config.heads,
        num_key_value_heads=1,
        head_dim=config.width // config.heads,
        max_position_embeddings=512,
    )
    ids = {f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    return PaliGemma(PaliGemmaConfig(vision, text, processor.image_token_id, **ids)).init_weights(config.seed)


@dataclass
class Stage:
    """One training run of the recipe.

    Attributes:
        prepare: Called before training.
        finish: Called after it, also when a finished stage was only loaded.
    """

    name: str
    objective: objectives.Objective
    batches: data.SceneBatches
    config: FitConfig
    loss_unit: str = "nats"
    prepare: Callable[[], None] = lambda: None
    finish: Callable[[], None] = lambda: None

    def run(self, out: Path, context: DistributedContext) -> None:
        """Train the stage in its folder, from wherever its state is."""
        self.prepare()
        self.objective.prepare()
        options = {"context": context, "name": self.name, "loss_unit": self.loss_unit}
        training.fit(self.objective, self.batches, out=out / self.name, **options, **vars(self.config))
        self.objective.finish()
        self.finish()


def stages(
    config: TrainConfig,
    model: PaliGemma,
    processor: Processor,
    out: Path,
    context: DistributedContext,
    save_every: float = SAVE_EVERY,
) -> list[Stage]:
    """The stages in order. The first and the last train a VQ-VAE, all others the same model."""
    c, p = config, processor
    # Created in this order, or the same seed gives other weights.
    masks, alignment = objectives.MaskVQVAEObjective(), objectives.AlignmentObjective(model)
    pose, suffix = objectives.PoseObjective(model), objectives.SuffixObjective(model)
    mask_decoder, vae, writer = objectives.MaskDecoderObjective(), MaskVQVAE(), copy.deepcopy(model).eval()
    shared = {"seed": c.seed, "rank": context.rank, "world_size": context.world_size}
    polish_seed = c.answer_scenes
    finish_seed = polish_seed + c.polish_scenes
    segment_seed = finish_seed + 2 * c.finish_scenes  # crowded stages use half of the seeds
    redraw_seed = segment_seed + 2 * c.segment_scenes

    def suffixes(mixture: dict[str, float], **options) -> data.SuffixBatches:
        return data.SuffixBatches(p, c.answer_batch, mixture=mixture, examples=c.examples, **options, **shared)

    def stage(name, objective, batches, scenes, lr, tower=None, horizon=None, **options) -> Stage:
        steps, horizon = (count // batches.batch_size for count in (scenes, horizon or scenes))
        numbers = {"warmup": c.warmup, "weight_decay": c.weight_decay, "precision": c.precision}
        groups = (tower,) if tower else ()
        fit_config = FitConfig(steps, lr, horizon, groups=groups, save_every=save_every, **numbers)
        return Stage(name, objective, batches, fit_config, **options)

    def tower(lr_scale: float, warmup: float = 0.0) -> ParameterGroup:
        return ParameterGroup("vision_tower", lr_scale, warmup)

    def save_masks() -> None:
        """Save the VQ-VAE, in float16. From here on it is used as it was saved."""
        if context.is_main:
            masks.vae.save_pretrained(out)
        context.barrier()
        for other in (vae, mask_decoder.vae):
            other.load_state_dict(MaskVQVAE.from_pretrained(out).state_dict())

    def save_mask_decoder() -> None:
        if context.is_main:
            (out / "checkpoint").mkdir(exist_ok=True)
            mask_decoder.vae.save_pretrained(out / "checkpoint")

    mask_batches = data.MaskBatches(p, c.masks_batch, **shared)
    alignment_batches = data.AlignmentBatches(p, c.align_batch, **shared)
    answers = suffixes(ANSWER_MIXTURE)
    polish = suffixes(POLISH_MIXTURE, first_seed=polish_seed)
    finish = suffixes(FINISH_MIXTURE, first_seed=finish_seed, crowded=True)
    poses = data.PoseBatches(p, c.pose_batch, first_seed=finish_seed, crowded=True, **shared)
    segment = suffixes(SEGMENT_MIXTURE, first_seed=segment_seed, crowded=True, vae=vae)
    redraw = data.MaskDecoderBatches(
        p, c.redraw_batch, model=writer, vae=vae, first_seed=redraw_seed, crowded=True, **shared
    )
    of_masks = {"loss_unit": "squared error", "finish": save_masks}
    of_redraw = {
        "loss_unit": "1 − soft IoU",
        "prepare": lambda: writer.load_state_dict(model.state_dict()),
        "finish": save_mask_decoder,
    }
    slow_tower = tower(c.tower_lr, c.tower_warmup)
    return [
        stage("masks", masks, mask_batches, c.masks_scenes, c.masks_lr, **of_masks),
        stage("align", alignment, alignment_batches, c.align_scenes, c.align_lr),
        stage("answer", suffix, answers, c.answer_scenes, c.answer_lr, slow_tower, c.answer_horizon),
        stage("polish", suffix, polish, c.polish_scenes, c.polish_lr, tower(c.polish_tower_lr)),
        stage("finish", suffix, finish, c.finish_scenes, c.finish_lr, tower(c.finish_tower_lr)),
        stage("pose", pose, poses, c.pose_scenes, c.pose_lr, tower(c.pose_tower_lr)),
        stage("segment", suffix, segment, c.segment_scenes, c.segment_lr, tower(c.segment_tower_lr)),
        stage("redraw", mask_decoder, redraw, c.redraw_scenes, c.redraw_lr, **of_redraw),
    ]


def check_recipe(config: TrainConfig, path: Path) -> None:
    """Check that the recipe recorded in a folder, if there is one, is this one.

    Raises:
        ValueError: If it is another, or cannot be read.
    """
    if not path.exists():
        return
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Delete it, or choose another folder.") from error
    if recorded != asdict(config):
        raise ValueError(f"{path} records another recipe. Choose an empty folder, or repeat its options.")


def train(config: TrainConfig, out: Path, context: DistributedContext, save_every: float = SAVE_EVERY) -> PaliGemma:
    """Run the recipe, or resume it, and write the checkpoint to ``out/checkpoint``.

    Raises:
        ValueError: If ``out`` has a run of another recipe, is damaged or is in use.
    """
    check_recipe(config, out / "recipe.json")
    torch.manual_seed(config.seed)
    processor = make_processor(config)
    model = make_model(config, processor)
    plan = stages(config, model, processor, out, context, save_every)
    with training.lock_folder(out) if context.is_main else contextlib.nullcontext():
        if context.is_main:
            with hub.write_atomically(out / "recipe.json") as part:
                part.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        for stage in plan:
            stage.run(out, context)
        if context.is_main:
            records = [training.read_metrics(out / stage.name / "metrics.jsonl") for stage in plan]
            curves = {f"stage {i}: {stage.name}": (records[i], stage.loss_unit) for i, stage in enumerate(plan)}
            training.draw_curve(out / "curve.png", curves)
            model.to("cpu").eval().save_pretrained(out / "checkpoint", dtype=torch.bfloat16)
            processor.save_pretrained(out / "checkpoint")
    return model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m minivlm train``."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/emoji"), help="folder; an unfinished run there is resumed"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 …; default: a GPU if there is one")
    parser.add_argument("--workers", type=int, default=1, help="processes that generate scenes; default 1")
    parser.add_argument("--save-every", type=float, default=SAVE_EVERY, help="seconds between saved states")
    for entry in fields(TrainConfig):
        name = "--" + entry.name.replace("_", "-")
        parser.add_argument(name, type=type(entry.default), default=entry.default, help=f"default {entry.default}")


def run(args: argparse.Namespace) -> None:
    """``python -m minivlm train``."""
    config = TrainConfig(**{entry.name: getattr(args, entry.name) for entry in fields(TrainConfig)})
    context = training.find_distributed_context(args.device, args.workers)
    train(config, args.out, context, args.save_every)
    if context.is_main:
        print(f"Trained. Measure it with: python -m minivlm evaluate --checkpoint {args.out / 'checkpoint'}")
    context.close()
