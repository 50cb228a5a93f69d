"""The recipe of the embedded checkpoint: its numbers and its four stages.

``masks`` trains the mask VQ-VAE, apart from the model, so that there are codes to write when `segment` is asked for.

``align`` trains the vision tower, the projector and the decoder's token embeddings with the sigmoid loss. Each pair of
that loss is scored on its own, so a pair can be one *patch* and one name: true if the patch shows the object. From each
patch, a linear layer also reads the object's box and pose, so that these are there when boxes and masks are asked for.

``answer`` trains everything on captions, questions, boxes and masks. All that is asked about an image is packed into
one row, behind one copy of the image tokens. The tower learns slowly at first (a long linear warm-up), or what
``align`` taught it is lost.

``finish`` goes on as PaliGemma runs: one prompt per row, to which the image tokens attend.

Each stage has one objective (training/objectives.py), and a folder of its own in the run's (training/files.py).
Everything is trained by Muon and AdamW with the same schedule: a short linear warm-up, then half a cosine to zero.
Scenes are augmented, so that the model knows the objects of artists it never saw. Stages and the slow tower follow
arXiv:2407.07726, section 3.2.
"""

import argparse
import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from minivlm import hub, training
from minivlm.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from minivlm.emoji import batches as data
from minivlm.emoji.augmentation import AUGMENTATIONS
from minivlm.emoji.scenes import MAX_SIZE, MIN_SIZE, World, texts
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.training import DistributedContext, FitConfig, ParameterGroup, objectives
from minivlm.training.tokenizer import train_tokenizer
from minivlm.vqvae import MaskVQVAE

SAVE_EVERY = 180.0  # seconds


@dataclass(frozen=True)
class TrainConfig:
    """Every number of a run. The defaults are those of the embedded checkpoint.

    ``…_batch`` is in scenes per step, ``tower_lr`` a fraction of the learning rate.
    """

    seed: int = 0
    objects: int = 100  # of the data set, that occur
    most_objects: int = 4  # in one scene
    augment: str = "all"  # or "none", or some of augmentation.AUGMENTATIONS with commas between them
    image_size: int = 112  # pixels
    patch_size: int = 16  # pixels
    width: int = 192  # hidden size of tower and decoder
    mlp_width: int = 512  # intermediate size of both
    tower_layers: int = 4
    decoder_layers: int = 4
    heads: int = 4
    masks_scenes: int = 57_600
    masks_batch: int = 64
    masks_lr: float = 1e-3
    misread: float = 0.15  # of the codes, in training the VQ-VAE
    align_scenes: int = 256_000
    align_batch: int = 64
    align_lr: float = 4e-3
    answer_scenes: int = 360_000
    answer_batch: int = 48
    answer_examples: int = 6  # of each scene
    answer_lr: float = 3.5e-3
    finish_scenes: int = 96_000
    finish_batch: int = 48
    finish_examples: int = 4
    finish_lr: float = 1.5e-3
    tower_lr: float = 0.5  # in both
    tower_warmup: float = 0.2  # of `answer`
    warmup: float = 0.01  # of each stage
    weight_decay: float = 0.02
    optimizer: str = "muon"
    precision: str = "bfloat16"  # of the arithmetic, by autocast; weights are float32

    def __post_init__(self):
        training.check_range(self, "seed", 0)
        training.check_range(self, "image_size", MIN_SIZE, MAX_SIZE)
        training.check_range(self, " ".join(f.name for f in fields(self) if f.type is int and f.name != "seed"), 1)
        training.check_range(self, " ".join(f.name for f in fields(self) if f.type is float), 0)
        training.check_range(self, "misread", 0, 1)
        World(self.objects, self.most_objects)  # checks them
        numbers = {"weight_decay": self.weight_decay, "optimizer": self.optimizer, "precision": self.precision}
        FitConfig(1, 0.0, warmup=self.warmup, **numbers)
        if unknown := [name for name in self.augmentations if name not in AUGMENTATIONS]:
            raise ValueError(f'augment must be "all", "none" or some of {",".join(AUGMENTATIONS)}, not {unknown[0]!r}.')
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size {self.patch_size}, not {self.image_size}.")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of the number of heads, {self.heads}, not {self.width}.")
        for name in (f.name for f in fields(self) if f.name.endswith("_scenes")):
            batch = name.replace("_scenes", "_batch")
            if getattr(self, name) < getattr(self, batch):
                raise ValueError(
                    f"{name} must be at least {batch}, {getattr(self, batch)}, for one step, not {getattr(self, name)}."
                )

    @property
    def world(self) -> World:
        return World(self.objects, self.most_objects)

    @property
    def augmentations(self) -> tuple[str, ...]:
        return {"all": AUGMENTATIONS, "none": ()}.get(self.augment, tuple(self.augment.split(",")))


# A fifth of the objects, one or two in a scene.
SMALL = TrainConfig(
    objects=20,
    most_objects=2,
    masks_scenes=3_840,
    align_scenes=38_400,
    answer_scenes=11_200,
    answer_batch=16,
    finish_scenes=2_400,
    finish_batch=16,
)
RECIPES = {"full": TrainConfig(), "small": SMALL}

# How often each kind of example is sampled, relative to the others. What must name all objects is hardest.
MIXTURE = {
    "caption": 5.0,
    "cap": 1.0,
    "describe": 1.0,
    "what": 0.75,
    "how many": 1.5,
    "is there": 0.5,
    "where": 0.75,
    "relation": 1.5,
    "detect": 3.0,
    "segment": 3.0,
}


def make_processor(config: TrainConfig) -> Processor:
    """A processor with a tokenizer trained on the texts of the scenes."""
    tokenizer = train_tokenizer(texts(range(2000), world=config.world), vocab_size=2560)
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
        finish: Called after it, also when a finished stage was only loaded.
    """

    name: str
    objective: objectives.Objective
    batches: data.SceneBatches
    config: FitConfig
    loss_unit: str = "nats"
    finish: Callable[[], None] = lambda: None

    def run(self, out: Path, context: DistributedContext) -> None:
        """Train the stage in its folder, from wherever its state is."""
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
    """The stages in order. The first trains a VQ-VAE, all others the same model."""
    c, p = config, processor
    masks, vae = objectives.MaskVQVAEObjective(), MaskVQVAE()
    shared = {"world": c.world, "augment": c.augmentations, "seed": c.seed}
    shared |= {"rank": context.rank, "world_size": context.world_size}

    def stage(name: str, objective, batches: data.SceneBatches, groups: tuple = (), **options) -> Stage:
        numbers = {name: getattr(c, name) for name in ("warmup", "weight_decay", "optimizer", "precision")}
        steps, lr = getattr(c, f"{name}_scenes") // batches.batch_size, getattr(c, f"{name}_lr")
        fit_config = FitConfig(steps, lr, groups=groups, save_every=save_every, **numbers)
        return Stage(name, objective, batches, fit_config, **options)

    def save_masks() -> None:
        """Save the VQ-VAE, in float16. From here on it is used as it was saved."""
        if context.is_main:
            (out / "checkpoint").mkdir(exist_ok=True)
            masks.vae.save_pretrained(out / "checkpoint")
        context.barrier()
        vae.load_state_dict(MaskVQVAE.from_pretrained(out / "checkpoint").state_dict())

    suffixes = {"vae": vae, "mixture": MIXTURE, "crowded": True} | shared
    mask_batches = data.MaskBatches(p, c.masks_batch, misread=c.misread, **shared)
    align_batches = data.AlignmentBatches(p, c.align_batch, crowded=True, **shared)
    answer_batches = data.SuffixBatches(p, c.answer_batch, examples=c.answer_examples, **suffixes)
    new = 2 * c.answer_scenes  # crowded batches use half of the seeds
    finish_batches = data.SuffixBatches(p, c.finish_batch, examples=c.finish_examples, first_seed=new, **suffixes)
    tower = ParameterGroup("vision_tower", c.tower_lr)
    slow_tower = replace(tower, warmup=c.tower_warmup)
    return [
        stage("masks", masks, mask_batches, loss_unit="squared error", finish=save_masks),
        stage("align", objectives.AlignmentObjective(model), align_batches),
        stage("answer", objectives.PackedSuffixObjective(model), answer_batches, (slow_tower,)),
        stage("finish", objectives.SuffixObjective(model), finish_batches, (tower,)),
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
    parser.add_argument("--recipe", choices=RECIPES, default="full", help="small: 20 objects, at most two per scene")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/emoji"), help="folder; an unfinished run there is resumed"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 …; default: a GPU if there is one")
    parser.add_argument("--workers", type=int, default=1, help="processes that generate scenes; default 1")
    parser.add_argument("--compile", action="store_true", help="compile the layers: faster, needs a C++ compiler")
    parser.add_argument("--save-every", type=float, default=SAVE_EVERY, help="seconds between saved states")
    for entry in fields(TrainConfig):
        name = "--" + entry.name.replace("_", "-")
        parser.add_argument(name, type=type(entry.default), help=f"default {entry.default}, or the recipe's")


def run(args: argparse.Namespace) -> None:
    """``python -m minivlm train``."""
    given = {entry.name: getattr(args, entry.name) for entry in fields(TrainConfig)}
    config = replace(RECIPES[args.recipe], **{name: value for name, value in given.items() if value is not None})
    context = training.find_distributed_context(args.device, args.workers, args.compile)
    train(config, args.out, context, args.save_every)
    if context.is_main:
        print(f"Trained. Measure it with: python -m minivlm evaluate --checkpoint {args.out / 'checkpoint'}")
    context.close()
