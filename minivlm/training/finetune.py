"""Fine-tune a checkpoint on your own images: ``python -m minivlm finetune DATA --checkpoint C --out O``.

By default, adapters learn (lora.py): small, and what the model knew stays in the file it came from. With ``--full``,
the weights themselves do. Some parts can be frozen in both. What is learned is the suffix, as in all of PaliGemma's
training. Weights that learn are float32; frozen ones keep the dtype of the checkpoint.

    O/adapter/             the adapter in peft's format; or, with --full, O/checkpoint/ in the hub's
    O/evaluation.json      metrics on the held-out examples
    O/finetune.json        settings · state.safetensors, metrics.jsonl, curve.png as of any run (files.py)

The same command resumes an interrupted run. Under ``torchrun``, adapters are trained by DDP, full weights by FSDP2.
"""

import argparse
import contextlib
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from minivlm import hub, locations
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.training import lora
from minivlm.training.examples import DataError, Example, ExampleBatches, read_examples
from minivlm.training.files import record_settings
from minivlm.training.fit import (
    PRECISIONS,
    DistributedContext,
    FitConfig,
    check_range,
    find_distributed_context,
    fit,
)
from minivlm.training.metrics import Metric, accuracy, answer_prompts, detection_metrics, markdown
from minivlm.training.objectives import SuffixObjective

PARTS = {  # name → what the names of its weights start with
    "vision_tower": "vision_tower.",
    "multi_modal_projector": "multi_modal_projector.",
    "language_model": "language_model.",
    "embed_tokens": "language_model.model.embed_tokens.",
}
DTYPES = ("float32", "bfloat16")
BOX_TASKS = ("detect", "segment")
SIDE = 1000  # of the square in which boxes are compared: IoU is the same in any
LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class FineTuneConfig:
    """The numbers of a run.

    Attributes:
        full: Train the weights themselves instead of adapters.
        rank: r of the adapters.
        alpha: α of the adapters: what they learn is scaled by α/r.
        freeze: Parts that learn nothing, keys of ``PARTS``. Default: all but the decoder, or with ``full`` none.
        epochs: How often each example is seen, unless ``steps`` says how many steps there are.
        batch_size: Examples per step, of all processes together.
        lr: Default: 2e-4, or with ``full`` 2e-5.
        precision: Of the arithmetic. Default: bfloat16 on a GPU, else float32.
    """

    full: bool = False
    rank: int = 8
    alpha: float = 16.0
    freeze: tuple[str, ...] | None = None
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    lr: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    seed: int = 0
    precision: str | None = None
    dtype: str | None = None

    def __post_init__(self):
        check_range(self, "rank batch_size", 1)
        check_range(self, "seed", 0)
        for name in ("alpha", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}.")
        if unknown := set(self.freeze or ()) - set(PARTS):
            raise ValueError(f"freeze takes {', '.join(PARTS)}, not {min(unknown)!r}.")
        if not self.trained_parts:
            raise ValueError("Everything is frozen, so nothing can learn. Freeze fewer parts.")
        FitConfig(self.steps or 1, self.learning_rate, warmup=self.warmup, weight_decay=self.weight_decay)

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        usual = () if self.full else ("vision_tower", "multi_modal_projector")
        return usual if self.freeze is None else self.freeze

    @property
    def trained_parts(self) -> tuple[str, ...]:
        return tuple(part for part in lora.LAYERS if part not in self.frozen_parts)

    @property
    def learning_rate(self) -> float:
        return self.lr if self.lr is not None else 2e-5 if self.full else 2e-4

    def count_steps(self, examples: int) -> int:
        return self.steps or max(1, math.ceil(self.epochs * examples / self.batch_size))


class FineTuneObjective(SuffixObjective):
    """The loss of the suffix. Its state is what learns: the rest is in the checkpoint that the run starts from."""

    def state_dict(self, **options) -> dict:
        learns = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(**options).items() if name in learns}

    def load_state_dict(self, state_dict: dict, **_) -> None:
        super().load_state_dict(state_dict, strict=False)


# --- the model ------------------------------------------------------------------------------------------------------


def load_model(folder: Path, config: FineTuneConfig) -> PaliGemma:
    """The checkpoint, ready to learn."""
    name = "float32" if config.full else config.dtype  # what learns is float32
    return prepare(PaliGemma.from_pretrained(folder, dtype=getattr(torch, name) if name else None), config)


def prepare(model: PaliGemma, config: FineTuneConfig) -> PaliGemma:
    """Add adapters to the parts that learn or, with ``full``, freeze those that do not. In place."""
    if not config.full:
        scale = config.alpha / config.rank
        return lora.add(model, lora.find_layers(model, config.trained_parts), config.rank, scale, config.seed)
    frozen = tuple(PARTS[part] for part in config.frozen_parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    return model


def read_trained(model: PaliGemma, state: Path) -> PaliGemma:
    """The model with the weights in the state of a run, which no process had as a whole while it was sharded."""
    with safe_open(state, "pt") as file:
        names = [name for name in file.keys() if name.startswith("module.model.")]
        model.load_state_dict({n.removeprefix("module.model."): file.get_tensor(n) for n in names}, strict=False)
    return model


def save_result(
    model: PaliGemma, processor: Processor, config: FineTuneConfig, base: Path, name: str | None, out: Path
) -> Path:
    """Write the adapter, or with ``full`` the checkpoint, and return its folder.

    Args:
        base: Folder of the checkpoint that was trained.
        name: What the user called it.
    """
    if not config.full:
        lora.save(model, out / "adapter", config.trained_parts, config.alpha, name or str(base))
        return out / "adapter"
    folder = out / "checkpoint"
    model.save_pretrained(folder, dtype=getattr(torch, config.dtype) if config.dtype else None)
    processor.save_pretrained(folder)
    for file in base.glob("*.npz"):  # a mask VQ-VAE, without which masks cannot be decoded
        shutil.copy(file, folder)
    return folder


# --- the data -------------------------------------------------------------------------------------------------------


def digest(examples: Sequence[Example]) -> str:
    """A short text that differs if any prompt, answer, or name of an image does."""
    content = "\n".join(json.dumps([e.image.name, e.prefix, e.suffix]) for e in examples)
    return f"{len(examples)} examples, {hashlib.sha256(content.encode()).hexdigest()[:12]}"


def check_lengths(examples: Sequence[Example], processor: Processor, limit: int) -> None:
    """Check that every example fits into ``limit`` tokens.

    Raises:
        DataError: If one does not.
    """
    prefixes, suffixes = (processor.encode([getattr(e, name) for e in examples]) for name in ("prefix", "suffix"))
    for example, prefix, suffix in zip(examples, prefixes, suffixes, strict=True):
        length = processor.num_image_tokens + len(prefix) + len(suffix) + 3  # <bos>, newline, <eos>
        if length > limit:
            raise DataError(f"{example.source}: it has {length} tokens with its image, but the model takes {limit}.")


# --- evaluation -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(
    model: PaliGemma, processor: Processor, examples: Sequence[Example], batch_size: int = 32
) -> dict[str, Metric]:
    """By task: average precision of the boxes of ``detect`` and ``segment``, exact matches of every other.

    The mask of a ``segment`` answer is not scored.
    """
    longest = max(map(len, processor.encode([e.suffix for e in examples])))
    images, prompts = [e.image for e in examples], [e.prefix for e in examples]
    order = [(e.task, len(e.suffix)) for e in examples]
    answers = answer_prompts(model, processor, images, prompts, order, longest + 8, batch_size)
    table: dict[str, Metric] = {}
    for task in dict.fromkeys(e.task for e in examples):
        rows = [(e.suffix, *answer) for e, answer in zip(examples, answers, strict=True) if e.task == task]
        if task in BOX_TASKS:
            truth = [locations.parse_detections(suffix, SIDE, SIDE).detections for suffix, _, _ in rows]
            found = [
                [(d, score) for text, score in items for d in locations.parse_detections(text, SIDE, SIDE).detections]
                for _, _, items in rows
            ]
            table |= {name.replace("detection", task): m for name, m in detection_metrics(truth, found).items()}
        else:
            table[f"{task}, exact match"] = accuracy([text.strip() == suffix.strip() for suffix, text, _ in rows])
    return table


def report(
    model: PaliGemma,
    processor: Processor,
    splits: dict[str, list[Example]],
    path: Path | None = None,
    batch_size: int = 32,
) -> dict[str, dict[str, Metric]]:
    """Measure a model on the held-out splits, or on the only one, print the table and write it as JSON."""
    held_out = {split: examples for split, examples in splits.items() if split != "train"} or splits
    columns = {split: evaluate(model, processor, examples, batch_size) for split, examples in held_out.items()}
    if path is not None:
        content = {split: {row: vars(metric) for row, metric in column.items()} for split, column in columns.items()}
        with hub.write_atomically(path) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(markdown(columns))
    counts = ", ".join(f"{len(examples)} examples in {split}" for split, examples in held_out.items())
    print(f"\n{counts}; ± is half of a 95% interval.")
    return columns


# --- the run --------------------------------------------------------------------------------------------------------


def finetune(
    config: FineTuneConfig,
    splits: dict[str, list[Example]],
    checkpoint: str | None,
    out: Path,
    context: DistributedContext,
    revision: str | None = None,
    save_every: float = 180.0,
) -> tuple[PaliGemma | None, Processor]:
    """Train, or resume, and write the result.

    Args:
        splits: As from ``read_examples``; "train" is learned.
        checkpoint: Folder or hub id; the embedded one if omitted.

    Returns:
        The model in eval mode, or None in processes other than the main one, and its processor.

    Raises:
        ValueError: If an example does not fit the model, or ``out`` has another run.
    """
    folder = hub.resolve(checkpoint, revision)
    processor = Processor.from_pretrained(folder)
    train, seed = splits["train"], config.seed
    batches = ExampleBatches(processor, train, config.batch_size, seed, context.rank, context.world_size)
    model = load_model(folder, config)
    for examples in splits.values():
        check_lengths(examples, processor, model.config.text_config.max_position_embeddings)
    settings = asdict(config) | {"checkpoint": checkpoint, "revision": revision, "data": digest(train)}
    settings |= {"freeze": list(config.frozen_parts)}
    record_settings(out / "finetune.json", settings, write=context.is_main)
    objective = FineTuneObjective(model)
    fit(
        objective,
        batches,
        out=out,
        context=context,
        name="finetune",
        steps=config.count_steps(len(train)),
        lr=config.learning_rate,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        precision=config.precision or ("bfloat16" if context.device.type == "cuda" else "float32"),
        save_every=save_every,
        log_every=LOG_EVERY,
    )
    if not context.is_main:
        return None, processor
    if context.is_sharded:
        del objective, model
        model = read_trained(load_model(folder, config), out / "state.safetensors").to(context.device)
    save_result(model, processor, config, folder, checkpoint, out)
    return model.eval(), processor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m minivlm finetune``."""
    config = FineTuneConfig()
    parser.add_argument("data", help="a .jsonl or COCO .json file, a YOLO data.yaml, or a folder with train/, valid/ …")
    parser.add_argument("--checkpoint", metavar="C", help="folder or hub id; default: the embedded checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--out", type=Path, required=True, metavar="O", help="folder; an unfinished run is resumed")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images; default: that of their file")
    parser.add_argument("--valid", metavar="FILE", help="examples to evaluate on, if DATA has none")
    parser.add_argument("--full", action="store_true", help="train the weights themselves instead of adapters")
    parser.add_argument("--rank", type=int, default=config.rank, help=f"of the adapters; default {config.rank}")
    parser.add_argument("--alpha", type=float, default=config.alpha, help=f"of the adapters; default {config.alpha:g}")
    frozen = "parts that learn nothing; default: all but the decoder, or none with --full"
    parser.add_argument("--freeze", nargs="*", choices=PARTS, metavar="PART", help=f"{frozen}: {', '.join(PARTS)}")
    parser.add_argument("--epochs", type=float, default=config.epochs, help=f"default {config.epochs:g}")
    parser.add_argument("--steps", type=int, help="instead of epochs")
    parser.add_argument("--batch-size", type=int, default=config.batch_size, help=f"default {config.batch_size}")
    parser.add_argument("--lr", type=float, help="learning rate; default 2e-4, or 2e-5 with --full")
    parser.add_argument("--warmup", type=float, default=config.warmup, help="fraction of the steps; default 0.05")
    parser.add_argument("--weight-decay", type=float, default=config.weight_decay, help="default 0")
    parser.add_argument("--seed", type=int, default=config.seed, help="of the order and the adapters; default 0")
    parser.add_argument("--precision", choices=PRECISIONS, help="default bfloat16 on a GPU, else float32")
    dtype = "of frozen weights, or of the checkpoint that --full writes; default: that of C, or float32"
    parser.add_argument("--dtype", choices=DTYPES, help=dtype)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 …; default: a GPU if there is one")
    parser.add_argument("--workers", type=int, default=1, help="processes that read images; default 1")
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between saved states")


def run(args: argparse.Namespace) -> None:
    """``python -m minivlm finetune``."""
    names = FineTuneConfig.__dataclass_fields__
    given = {name: getattr(args, name) for name in names}
    config = FineTuneConfig(**given | {"freeze": None if args.freeze is None else tuple(args.freeze)})
    splits = read_examples(args.data, args.images)
    if args.valid:
        splits["valid"] = read_examples(args.valid, args.images)["train"]
    if "train" not in splits:
        raise DataError(f"{args.data} has no examples to learn from: it needs a folder train/.")
    context = find_distributed_context(args.device, args.workers, shard=config.full)
    with contextlib.closing(context):
        options = {"revision": args.revision, "save_every": args.save_every}
        model, processor = finetune(config, splits, args.checkpoint, args.out, context, **options)
    if model is None:
        return
    print(f"Wrote {args.out / ('checkpoint' if config.full else 'adapter')}.", file=sys.stderr)
    if len(splits) > 1:
        report(model, processor, splits, args.out / "evaluation.json")
    else:
        print("No held-out examples to evaluate on: pass some with --valid.", file=sys.stderr)
