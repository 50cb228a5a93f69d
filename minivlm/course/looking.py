"""Does a model look at its image? What lab L7 measures.

    N questions or scenes · M names · T tokens · P patches · K layers, plus 1 · D hidden size · V vocabulary size

Sources: POPE (arXiv:2305.10355), contrastive decoding (VCD, arXiv:2311.16922), the logit lens
(https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru), attention knockout (arXiv:2304.14767).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minivlm import emoji, training
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.training import objectives

CHUNK = 128  # rows per forward pass
BLANK = 128  # gray value of an image without content: about 0 after the processor

# --- yes or no ------------------------------------------------------------------------------------------------------


def is_there(name: str) -> str:
    """The question whose answer is "yes" or "no"."""
    article = emoji.with_article(name) if name in emoji.OBJECTS else f"a {name}"
    return f"answer en is there {article}?"


@torch.inference_mode()
def next_logits(
    model: PaliGemma, processor: Processor, images: Sequence, prompts: Sequence[str]
) -> Float[Tensor, "N V"]:
    """The logits of the first token of each answer."""
    rows = []
    for start in range(0, len(prompts), CHUNK):
        part = slice(start, start + CHUNK)
        batch = processor(text=list(prompts[part]), images=list(images[part]), padding_side="left")
        rows.append(model(**batch, last_only=True)[:, -1].float())
    return torch.cat(rows)


def yes_margin(logits: Float[Tensor, "N V"], processor: Processor) -> Float[Tensor, " N"]:
    """How far the logit of "yes" is above that of "no". The model says yes where it is above 0."""
    (yes,), (no,) = processor.encode(["yes", "no"])
    return logits[:, yes] - logits[:, no]


def yes_no_metrics(said: Bool[Tensor, " N"], truth: Bool[Tensor, " N"]) -> dict[str, float]:
    """POPE's five numbers, "yes" being the positive answer. A fraction whose denominator is 0 is 0."""
    hits = float((said & truth).sum())
    precision = hits / max(float(said.sum()), 1.0)
    recall = hits / max(float(truth.sum()), 1.0)
    return {
        "accuracy": float((said == truth).float().mean()),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes": float(said.float().mean()),
    }


def random_negatives(present: Bool[Tensor, "N M"], count: int, generator: torch.Generator) -> Int[Tensor, "N count"]:
    """``count`` names for each scene that it does not show, at random."""
    noise = torch.rand(present.shape, generator=generator)
    return noise.masked_fill(present, -1.0).topk(count).indices


def popular_negatives(present: Bool[Tensor, "N M"], count: int) -> Int[Tensor, "N count"]:
    """The ``count`` names that most scenes show and this one does not. Of equal names, the first."""
    scores = present.sum(0).expand(present.shape)
    return scores.masked_fill(present, -1).argsort(dim=1, descending=True, stable=True)[:, :count]


def adversarial_negatives(present: Bool[Tensor, "N M"], count: int) -> Int[Tensor, "N count"]:
    """The ``count`` absent names that most often occur with what the scene shows. Of equal names, the first.

    A pair's co-occurrence is the number of scenes that show both. A name's score is the sum over the names present.
    """
    shown = present.long()
    together = shown.T @ shown  # [M, M]
    scores = (shown @ together).masked_fill(present, -1)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def contrastive_logits(
    logits: Float[Tensor, "N V"], blind: Float[Tensor, "N V"], alpha: float, beta: float
) -> Float[Tensor, "N V"]:
    """VCD: (1 + α) · logits − α · blind, −inf where the original probability is below β times the row's largest.

    ``blind`` are the logits for the same prompts with an image that says nothing (arXiv:2311.16922, equations 3 and 4).
    """
    probabilities = logits.softmax(-1)
    implausible = probabilities < beta * probabilities.amax(-1, keepdim=True)
    return ((1 + alpha) * logits - alpha * blind).masked_fill(implausible, -torch.inf)


# --- which part of the image ----------------------------------------------------------------------------------------


def occlude_patches(pixels: Float[Tensor, "C H W"], patch_size: int, fill: float = 0.0) -> Float[Tensor, "P C H W"]:
    """P copies of an image. In copy p, patch p in reading order is set to ``fill``."""
    _, height, width = pixels.shape
    corners = [(y, x) for y in range(0, height, patch_size) for x in range(0, width, patch_size)]
    copies = pixels.repeat(len(corners), 1, 1, 1)
    for copy, (y, x) in zip(copies, corners, strict=True):
        copy[:, y : y + patch_size, x : x + patch_size] = fill
    return copies


def occlude(pixels: Float[Tensor, "C H W"], patches: Iterable[int], patch_size: int) -> Float[Tensor, "C H W"]:
    """A copy of an image in which all of these patches are gray."""
    pixels, columns = pixels.clone(), pixels.shape[-1] // patch_size
    for patch in patches:
        y, x = patch // columns * patch_size, patch % columns * patch_size
        pixels[:, y : y + patch_size, x : x + patch_size] = 0.0
    return pixels


@torch.inference_mode()
def logits_of_pixels(
    model: PaliGemma, processor: Processor, pixels: Float[Tensor, "N C H W"], prompt: str
) -> Float[Tensor, "N V"]:
    """As ``next_logits``, for images that were preprocessed already, and one prompt for all of them."""
    batch = processor.tokenize([prompt] * len(pixels), None, "left")
    return model(**batch, pixel_values=pixels, last_only=True)[:, -1].float()


# --- inside the decoder ---------------------------------------------------------------------------------------------


def block_image(mask: Bool[Tensor, "B T T"], P: int) -> Bool[Tensor, "B T T"]:
    """A copy of a mask in which no text token attends to the first P tokens, which are the image. Patches still do."""
    mask = mask.clone()
    mask[:, P:, :P] = False
    return mask


@contextmanager
def blocked(model: PaliGemma, layers: Iterable[int], P: int) -> Iterator[None]:
    """Inside the ``with`` block, text does not attend to the P image tokens in these layers. Without padding or cache.

    Raises:
        ValueError: If there is a cache, whose keys come from an earlier pass. Pass ``cache=None`` to ``generate``.
    """

    def without_image(attention, inputs):
        x, cos, sin, mask, cache = inputs
        if cache is not None:
            raise ValueError("attention can only be blocked without a cache. Pass cache=None.")
        T = x.shape[1]
        mask = torch.ones(1, T, T, dtype=torch.bool, device=x.device) if mask is None else mask
        return x, cos, sin, block_image(mask, P), None

    with ExitStack() as hooks:
        for layer in layers:
            attention = model.language_model.model.layers[layer].self_attn
            hooks.callback(attention.register_forward_pre_hook(without_image).remove)
        yield


@torch.inference_mode()
def logit_lens(model: PaliGemma, **inputs: Tensor) -> Float[Tensor, "K B T V"]:
    """What each token would predict if the decoder ended after 0, 1, … K − 1 layers: its last norm, then its head."""
    decoder, states = model.language_model.model, []
    with ExitStack() as hooks:
        for layer in decoder.layers:
            record = lambda module, arguments: states.append(arguments[0])  # noqa: E731
            hooks.callback(layer.register_forward_pre_hook(record).remove)
        last = model.hidden_states(**inputs)
    return torch.stack([model.language_model.logits(x) for x in (*map(decoder.norm, states), last)])


# --- a model whose world is too regular -----------------------------------------------------------------------------


WORDS = "dax", "wug"  # the model has never seen them


def new_word_scenes(
    pair: tuple[str, str], world: emoji.World, kinds: Sequence[str], count: int, split: str = "train"
) -> list[tuple[emoji.Scene, tuple[bool, bool]]]:
    """``count`` scenes of each kind ("both", "neither", "first", "second"), each with which of the two it shows."""
    wanted = {(True, True): "both", (False, False): "neither", (True, False): "first", (False, True): "second"}
    left, found, seed = dict.fromkeys(kinds, count), [], 0
    while any(left.values()):
        planned = emoji.planned_names(seed, split, world)
        if left.get(wanted[tuple(name in planned for name in pair)], 0):
            scene = emoji.make_scene(seed, split, world=world)
            shown = tuple(any(o.name == name for o in scene.objects) for name in pair)
            if left.get(wanted[shown], 0):
                left[wanted[shown]] -= 1
                found.append((scene, shown))
        seed += 1
    return found


class NewWords(torch.utils.data.Dataset):
    """Batches for ``training.fit``: "is there a dax?" and "is there a wug?" about a few scenes, with answers."""

    def __init__(self, processor: Processor, scenes: list, batch_size: int = 8, seed: int = 0):
        self.processor, self.scenes, self.batch_size, self.seed = processor, scenes, batch_size, seed

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, step))
        chosen = [self.scenes[i] for i in rng.choice(len(self.scenes), self.batch_size, replace=False)]
        prompts = [is_there(word) for _ in chosen for word in WORDS]
        answers = ["yes" if shown else "no" for _, both in chosen for shown in both]
        pixels = self.processor.preprocess_images([scene.image for scene, _ in chosen])
        return self.processor.tokenize(prompts, answers, "right") | {"pixel_values": pixels}


def teach_words(model: PaliGemma, processor: Processor, scenes: list, out, steps: int = 60, lr: float = 5e-4) -> None:
    """Teach the decoder the two words from these scenes. The vision tower stays as it is."""
    objective = objectives.SuffixObjective(model)
    model.vision_tower.requires_grad_(False)
    try:
        training.fit(objective, NewWords(processor, scenes), steps=steps, lr=lr, warmup=0.1, out=out)
    finally:
        model.vision_tower.requires_grad_(True)
