"""How each family is trained, and where its weights are.

    python -m minivlm families train text         # first: all but simvlm and cm3 need it or its tower
    python -m minivlm families train flamingo

A family is built from shared parts: the tokenizer of the embedded checkpoint, its tower as it was when the text-only
Gemma was trained, and that Gemma. Only what it trained itself is stored, one file per family, in bfloat16.
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from minivlm import emoji, hub, training
from minivlm.emoji.augmentation import AUGMENTATIONS
from minivlm.emoji.scenes import texts
from minivlm.families import base, batches, clipcap, cm3, flamingo, simvlm, visualbert, visualgpt
from minivlm.gemma import GemmaForCausalLM
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.siglip import SiglipVisionModel, init_linear
from minivlm.training import DistributedContext
from minivlm.training.objectives import Objective

NAMES = ("text", "visualbert", "simvlm", "cm3", "clipcap", "clipcap-mlp", "visualgpt", "flamingo")
CODES = 512  # in the codebook of CM3's images
LAYERS = 3  # of each decoder, one less than the embedded checkpoint's, so that all weights together stay small
FOLDER = hub.DATA / "checkpoints" / "families"
WORLD = emoji.World(most=2)  # one or two objects per scene


@dataclass
class Parts:
    """What families are built from.

    Attributes:
        model: The embedded checkpoint.
        tower: The tower that families look with.
        text: The Gemma that has read text only.
    """

    model: PaliGemma
    processor: Processor
    tower: SiglipVisionModel
    text: GemmaForCausalLM

    @property
    def words(self) -> int:
        return self.processor.tokenizer.get_vocab_size()

    def new_decoder(self, vocab_size: int | None = None) -> GemmaForCausalLM:
        """A Gemma of the text model's size with random weights."""
        config = replace(self.text.config, vocab_size=vocab_size or self.text.config.vocab_size)
        return GemmaForCausalLM(config).apply(init_linear)


@dataclass
class Run:
    """One training run of a family, as for ``training.fit``."""

    name: str
    objective: Objective
    batches: Any
    steps: int
    lr: float
    options: dict = field(default_factory=dict)


def load_parts(folder: Path = FOLDER, with_text: bool = True) -> Parts:
    """The embedded checkpoint, its tower as it was when the families were trained, and the text-only Gemma.

    Args:
        with_text: Load these two from ``folder``. Otherwise the tower is today's, and the Gemma's weights are random.

    Raises:
        FileNotFoundError: If the text-only Gemma has not been trained.
    """
    model, processor = PaliGemma.from_pretrained(dtype=torch.float32), Processor.from_pretrained()
    text = base.TextModel(GemmaForCausalLM(replace(model.config.text_config, num_hidden_layers=LAYERS)))
    tower = copy.deepcopy(model.vision_tower)
    if with_text:
        load_weights(text, folder, "text")
        load_weights(tower, folder, "tower")
    return Parts(model, processor, tower, text.decoder)


# --- the families ----------------------------------------------------------------------------------------------------


def build(name: str, parts: Parts) -> Objective:
    """A family with the weights that it starts from.

    Raises:
        ValueError: If there is no such family.
    """
    if name not in NAMES:
        raise ValueError(f"There is no family {name!r}: choose one of {', '.join(NAMES)}.")
    tower, text = copy.deepcopy(parts.tower), copy.deepcopy(parts.text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "visualbert":
            config = visualbert.VisualBertConfig(parts.words + 1, tower.config.hidden_size, text.config.hidden_size)
            return visualbert.VisualBertObjective(visualbert.VisualBert(config).apply(init_linear), tower)
        if name == "simvlm":
            return simvlm.SimVLM(parts.new_decoder(), parts.processor.image_size)
        if name == "cm3":
            decoder = parts.new_decoder(vocab_size=parts.words + CODES + 2)
            return cm3.CM3(decoder, cm3.ImageVQVAE(CODES), parts.words)
        if name == "visualgpt":
            return visualgpt.VisualGPT(text, tower)
        if name == "flamingo":
            return flamingo.Flamingo(text, tower)
        if name == "text":
            return base.TextModel(parts.new_decoder())
        return clipcap.ClipCap(text, tower, frozen=name == "clipcap")


def runs(name: str, model: Objective, parts: Parts, steps: float = 1.0) -> list[Run]:
    """The training runs of a family, in order.

    Args:
        steps: Fraction of the recipe's steps.
    """
    p, scenes = parts.processor, {"world": WORLD, "augment": AUGMENTATIONS}
    if name == "text":
        plan = [Run("text", model, batches.TextBatches(p, 64), 3_000, 3e-3)]
    elif name == "visualbert":
        plan = [Run(name, model, batches.BlankBatches(p, 32, vocab_size=parts.words, **scenes), 5_000, 2e-3)]
    elif name == "simvlm":
        corpus = list(texts(range(2_000)))
        loader = batches.PrefixBatches(p, 32, texts=corpus, text_rows=4, **scenes)
        plan = [Run(name, model, loader, 6_000, 2e-3)]
    elif name == "cm3":
        side = p.image_size // 8
        loader = batches.DocumentBatches(p, 16, side=side, begin=model.begin, sentinel=model.sentinel, **scenes)
        images = Run("images", cm3.ImageVQVAEObjective(model.vae), batches.ImageBatches(p, 16, **scenes), 2_000, 1e-3)
        plan = [replace(images, options={"optimizer": "adamw"}), Run(name, model, loader, 5_000, 2e-3)]
    elif name == "flamingo":
        plan = [Run(name, model, batches.InterleavedBatches(p, 12, **scenes), 6_000, 2e-3)]
    else:
        plan = [Run(name, model, batches.CaptionBatches(p, 32, **scenes), 5_000, 1.5e-3)]
    return [replace(run, steps=max(1, round(steps * run.steps))) for run in plan]


# --- weights ---------------------------------------------------------------------------------------------------------


def own_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that a family trains: all but the tower's and those of a language model that stays frozen."""
    if not isinstance(model, Objective):  # a part
        return model.state_dict()
    model.prepare()
    frozen = {id(parameter) for parameter in model.frozen}
    model.finish()
    vae = {id(p) for p in model.vae.parameters()} if hasattr(model, "vae") else set()  # trained in a run of its own
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if id(value) not in frozen or id(value) in vae
    }


def save_weights(model: nn.Module, folder: Path, name: str) -> None:
    """Write ``folder/name.safetensors``, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in own_weights(model).items()}
    with hub.write_atomically(folder / f"{name}.safetensors") as part:
        save_file(weights, part)


def load_weights(model: nn.Module, folder: Path, name: str) -> None:
    """Load them into a family that was just built.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its weights are not this family's.
    """
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Make it with: python -m minivlm families train {name}")
    try:
        wanted, found = own_weights(model), load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({hub.printable(error)}). Train it again.") from error
    wrong = sorted(set(wanted) ^ set(found)) or [k for k, v in wanted.items() if v.shape != found[k].shape]
    if wrong:
        raise ValueError(f"{path} does not fit {name}: {hub.abbreviate(wrong)}. Train it again.")
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(found[key].float())


def load(name: str, parts: Parts, folder: Path = FOLDER) -> Objective:
    """A family as it was trained, in eval mode."""
    model = build(name, parts)
    load_weights(model, folder, name)
    return model.eval()


def train(name: str, out: Path, context: DistributedContext, folder: Path = FOLDER, steps: float = 1.0) -> Objective:
    """Run the recipe of a family, or resume it, in ``out/name``, and write ``out/name.safetensors``.

    Args:
        folder: Where the text-only Gemma is.
        steps: Fraction of the recipe's steps.

    Raises:
        ValueError: Under ``torchrun``: one process trains a family.
    """
    if context.world_size > 1:
        raise ValueError("families train uses one process: run it without torchrun.")
    parts = load_parts(folder, with_text=name not in ("text", "simvlm", "cm3"))
    model = build(name, parts)
    for run in runs(name, model, parts, steps):
        run.objective.prepare()
        options = {"optimizer": "muon", "precision": "bfloat16", "context": context} | run.options
        training.fit(
            run.objective, run.batches, out=out / name / run.name, name=run.name, steps=run.steps, lr=run.lr, **options
        )
        run.objective.finish()
    save_weights(model.cpu(), out, name)
    if name == "text":
        save_weights(parts.tower, out, "tower")
    return model.eval()
