"""One measure for all families: captions of the same scenes, and what each language model has lost.

    B scenes · I images per document

``python -m minivlm families evaluate`` prints the table. Names that a caption mentions are compared with the objects
that are there: *recalled* is the share of objects that are named, *hallucinated* the share of named ones that are not
there (CHAIR-i, arXiv:1809.02156, section 2.1).
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minivlm import emoji, training
from minivlm.cache import cache_bytes
from minivlm.emoji.language import NUMBERS
from minivlm.families import base, magic, recipe
from minivlm.families.batches import InterleavedBatches, TextBatches, caption_of
from minivlm.families.flamingo import Flamingo
from minivlm.families.recipe import Parts
from minivlm.gemma import GemmaForCausalLM
from minivlm.generation import generate_ids
from minivlm.training.objectives import Objective

BATCH = 50
HELD_OUT_STEP = 10**6  # of TextBatches: no run gets that far
Writer = Callable[[Tensor], list[str]]
# Text and VisualBERT cannot write a caption of an image.
WRITERS = ("paligemma", *(name for name in recipe.NAMES if name not in ("text", "visualbert")), "magic")


@dataclass
class Row:
    """A line of the table. Shares are from 0 to 1; None where a family has no such thing.

    Attributes:
        trained: Parameters.
        exact: Share of captions that name exactly what is there, by the number of objects.
        blank, other: The same share, of all, when a gray or another scene's image is shown.
        text_loss: Of the decoder alone, in nats per token, after training.
        in_context: Share of new names bound by two examples.
        milliseconds: Per token of a caption, one image at a time.
        cache: Bytes per caption of 32 tokens, in float32.
    """

    name: str
    trained: int
    exact: dict[int, float]
    recalled: float
    hallucinated: float
    blank: float
    other: float
    text_loss: float | None
    in_context: float | None
    milliseconds: float
    cache: int


def mentioned(caption: str) -> Counter:
    """The names in a text that need not be a correct caption, singular or plural."""
    words = f" {caption.replace(',', ' ')} "
    found: Counter = Counter()
    for name in sorted(emoji.OBJECTS, key=len, reverse=True):
        for form in (emoji.plural(name), name):
            found[name] += words.count(f" {form} ")
            words = words.replace(f" {form} ", "  ")
    return +found


def name_rates(captions: Sequence[str], scenes: Sequence[emoji.Scene]) -> tuple[float, float]:
    """The share of the objects' names that are mentioned, and the share of mentioned names that are not there."""
    present = [{o.name for o in scene.objects} for scene in scenes]
    named = [set(mentioned(caption)) for caption in captions]
    both = sum(len(a & b) for a, b in zip(present, named, strict=True))
    return both / sum(map(len, present)), 1 - both / max(1, sum(map(len, named)))


def exact(captions: Sequence[str], scenes: Sequence[emoji.Scene]) -> np.ndarray:
    """Which captions name exactly what is there."""
    return np.array([emoji.same_caption(c, caption_of(s)) for c, s in zip(captions, scenes, strict=True)])


def in_batches(write: Writer, pixel_values: Tensor) -> list[str]:
    """All captions, a few at a time."""
    return [caption for part in pixel_values.split(BATCH) for caption in write(part)]


@torch.no_grad()
def text_loss(decoder: GemmaForCausalLM, parts: Parts, count: int = 10) -> float:
    """Nats per token of documents that no run has read."""
    model = base.TextModel(decoder)
    loader = TextBatches(parts.processor, 64)
    return float(np.mean([float(model(**loader[HELD_OUT_STEP + i])) for i in range(count)]))


@torch.no_grad()
def in_context_score(model: Flamingo, parts: Parts, count: int, split: str = "validation") -> float:
    """How often the third image of a document is given the name that its kind got in one of the first two."""
    loader, rng = InterleavedBatches(parts.processor, 1, split=split), np.random.default_rng(0)
    right = 0
    for _ in range(count):
        scenes, captions = loader.naming_document(rng)
        batch = loader.assemble([scenes], [captions])
        start = 1 + int((batch["images_before"][0] == len(scenes)).nonzero()[0])  # the newline before the last caption
        model.look(batch["pixel_values"], batch["images_before"][:, :start])
        ids = batch["input_ids"][:, :start]
        x, eos = model.decoder.model.embed(ids), parts.processor.eos_token_id
        written = base.write(model.decoder, x, torch.ones_like(ids), eos, max_new_tokens=10)
        right += parts.processor.decode(written[0]) == captions[-1]
    return right / count


def trained_parameters(model: Objective) -> int:
    return sum(weight.numel() for weight in recipe.own_weights(model).values())


def timing(write: Writer, processor, pixel_values: Tensor) -> float:
    """Milliseconds per token of captions of single images."""
    captions, start = [], time.perf_counter()
    for image in pixel_values:
        captions += write(image[None])
    tokens = sum(len(ids) + 1 for ids in processor.encode(captions))
    return 1000 * (time.perf_counter() - start) / tokens


def measure(
    name: str, write: Writer, parts: Parts, count: int, before_text: int, model: Objective | None = None
) -> Row:
    """The row of a family.

    Args:
        before_text: Vectors in the cache before the text.
        model: What was trained, if anything was.
    """
    size, p = parts.processor.image_size, parts.processor
    scenes = [emoji.make_scene(seed, "validation", size, recipe.WORLD) for seed in range(count)]
    pixel_values = p.preprocess_images([scene.image for scene in scenes])
    captions = in_batches(write, pixel_values)
    right, counts = exact(captions, scenes), np.array([len(scene.objects) for scene in scenes])
    others = exact(in_batches(write, pixel_values.roll(1, dims=0)), scenes)
    blank = exact(in_batches(write, torch.zeros_like(pixel_values)), scenes)
    milliseconds = timing(write, p, pixel_values[:20])
    if isinstance(model, base.Captioner):
        model.look_away()
    return Row(
        name,
        trained_parameters(model) if model is not None else 0,
        {n: float(right[counts == n].mean()) for n in sorted(set(counts.tolist()))},
        *name_rates(captions, scenes),
        float(blank.mean()),
        float(others.mean()),
        text_loss(model.decoder, parts) if isinstance(model, base.Captioner) else None,
        in_context_score(model, parts, count) if isinstance(model, Flamingo) else None,
        milliseconds,
        cache_bytes(parts.text.config, before_text + 32, dtype=torch.float32),
    )


def rows(parts: Parts, count: int, names: Sequence[str], folder=recipe.FOLDER) -> list[Row]:
    """The rows of the table: PaliGemma first, then the families that write captions, then MAGiC."""
    p, patches = parts.processor, parts.processor.num_image_tokens
    found = []
    if "paligemma" in names:
        write = partial(write_with_paligemma, parts)
        found.append(measure("paligemma", write, parts, count, patches + 4))
    for name in (n for n in recipe.NAMES if n in names):
        model = recipe.load(name, parts, folder)
        before = {"simvlm": patches, "cm3": (p.image_size // 8) ** 2 + 5, "clipcap": 10, "clipcap-mlp": 10}.get(name, 0)
        found.append(measure(name, partial(model.caption, p), parts, count, before, model))
    if "magic" in names:
        write = partial(magic.caption, parts.text, parts.model, p)
        found.append(measure("magic", write, parts, count, 0))
    return found


def write_with_paligemma(parts: Parts, pixel_values: Tensor) -> list[str]:
    """Captions by the embedded checkpoint."""
    prompts = parts.processor.tokenize(["caption en"] * len(pixel_values), None, "left")
    generated = generate_ids(parts.model, prompts | {"pixel_values": pixel_values})
    return parts.processor.batch_decode(generated.sequences)


def table(found: Sequence[Row], text_before: float) -> str:
    """The rows in Markdown, shares in percent."""
    counts = sorted({n for row in found for n in row.exact})
    head = ["system", "trained parameters", *(f"exact, {NUMBERS[n]}" for n in counts), "recalled", "hallucinated"]
    head += ["blank image", "other image", "text loss", "in context", "ms per token", "cache"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in found:
        shares = [*(row.exact[n] for n in counts), row.recalled, row.hallucinated, row.blank, row.other]
        loss = "" if row.text_loss is None else f"{text_before:.3f} → {row.text_loss:.3f}"
        context = "" if row.in_context is None else f"{100 * row.in_context:.1f}"
        cells = [row.name, f"{row.trained:,}", *(f"{100 * share:.1f}" for share in shares), loss, context]
        cells += [f"{row.milliseconds:.1f}", f"{row.cache / 1024:.0f} KiB"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m minivlm families``."""
    parser.add_argument("action", choices=["train", "evaluate"], help="train: run a recipe, or resume it")
    known = f"train: some of {', '.join(recipe.NAMES)}; evaluate: of {', '.join(WRITERS)}, by default all"
    parser.add_argument("names", nargs="*", metavar="NAME", help=known)
    parser.add_argument("--out", type=Path, default=Path("runs/families"), help="folder of the runs and their weights")
    parser.add_argument("--steps", type=float, default=1.0, metavar="F", help="train a fraction of the recipe's steps")
    parser.add_argument("--device", help="train: cpu, cuda, cuda:1 …; default: a GPU if there is one")
    parser.add_argument("--workers", type=int, default=1, help="train: processes that generate scenes; default 1")
    parser.add_argument("--compile", action="store_true", help="train: compile the layers; needs a C++ compiler")
    parser.add_argument("--scenes", type=int, default=1000, metavar="N", help="evaluate on so many; default 1000")
    parser.add_argument("--weights", type=Path, help="folder of the weights; default: those that ship")


def run(args: argparse.Namespace) -> None:
    """``python -m minivlm families``."""
    known = WRITERS if args.action == "evaluate" else recipe.NAMES
    if unknown := [name for name in args.names if name not in known]:
        raise ValueError(f"There is no family {unknown[0]!r} to {args.action}: choose among {', '.join(known)}.")
    if args.action == "evaluate":
        folder = args.weights or recipe.FOLDER
        parts = recipe.load_parts(folder)
        found = rows(parts, args.scenes, args.names or WRITERS, folder)
        print(table(found, text_loss(parts.text, parts)))
        return
    if not args.names:
        raise ValueError(f"Name what to train: {', '.join(recipe.NAMES)}.")
    context = training.find_distributed_context(args.device, args.workers, args.compile)
    for name in args.names:
        own = (args.out / "text.safetensors").is_file()
        recipe.train(name, args.out, context, args.weights or (args.out if own else recipe.FOLDER), args.steps)
        print(f"Trained. The weights are in {args.out / f'{name}.safetensors'}")
