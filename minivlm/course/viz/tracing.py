"""The tensor trace: one forward pass of PaliGemma with all that it computes on the way, to look at and step through.

    B batch, 1 here · C colors · H, W pixels · P patches · T tokens · V vocabulary
    D width (the tower's; from the projector on the decoder's)

The model is left as it is: forward hooks, which torch calls with every module's result, do the recording, and they are
removed when the pass is over, however it ends. Names are those of the weights in the hub's files, where a module
computes the tensor; the few others are called what transformers calls them.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from minivlm import masks, siglip
from minivlm.course.viz import trace_figures, trace_page
from minivlm.course.viz.figure import Figure
from minivlm.course.viz.trace_figures import number
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor

TOWER, DECODER = "vision_tower.vision_model.", "language_model.model."
WORDS = 5  # how many of the likeliest next words are shown

# What the modules of a layer compute, by the last part of their name.
TOWER_LAYER = {
    "layer_norm1": "The stream, normalized for attention",
    "self_attn": "What each patch gathers from all the others",
    "layer_norm2": "The stream, normalized for the MLP",
    "mlp": "What the MLP makes of each patch alone",
}
DECODER_LAYER = {
    "input_layernorm": "The stream, normalized for attention",
    "self_attn": "What each token gathers from those it may see",
    "post_attention_layernorm": "The stream, normalized for the MLP",
    "mlp": "What the GeGLU makes of each token alone",
}
DECODER2_LAYER = {
    "input_layernorm": "The stream, normalized for attention",
    "self_attn": "What each token gathers from those it may see",
    "post_attention_layernorm": "Attention's result, normalized before it is added",
    "pre_feedforward_layernorm": "The stream, normalized for the MLP",
    "mlp": "What the GeGLU makes of each token alone",
    "post_feedforward_layernorm": "The MLP's result, normalized before it is added",
}


@dataclass(frozen=True)
class Step:
    """What there is to know of a tensor before it is computed.

    Attributes:
        name: dotted path, such as ``language_model.model.layers.0.self_attn``.
        title: what it is, in a few words.
        letters: what its axes are, as in "B P D".
        stage: the part of the model that it belongs to, such as "Vision tower".
        layer: which layer of that stage, None outside layers.
        module, chapter: where the package and the course treat it.
    """

    name: str
    title: str
    letters: str
    stage: str
    layer: int | None = None
    module: str = "minivlm.gemma"
    chapter: int = 6


@dataclass(frozen=True)
class Statistics:
    """``min``, ``max``, ``mean`` and ``std`` (over all numbers, not n - 1) of what is finite, NaN where nothing is;
    ``broken``: which share is NaN or infinite, 0 to 1. Of a mask, ``mean`` is the share of pairs that may look."""

    min: float
    max: float
    mean: float
    std: float
    broken: float

    @classmethod
    def of(cls, tensor: Tensor) -> "Statistics":
        values = tensor.float()
        finite = values[values.isfinite()]
        broken = 1 - len(finite) / values.numel()
        if not len(finite):
            return cls(*[float("nan")] * 4, broken)
        std, mean = torch.std_mean(finite, correction=0)
        return cls(finite.min().item(), finite.max().item(), mean.item(), std.item(), broken)


@dataclass(frozen=True, eq=False)
class Entry:
    """One recorded tensor: its step, the tensor itself (on the CPU, in its own type), statistics, and a picture."""

    step: Step
    tensor: Tensor
    stats: Statistics
    picture: Figure
    key: str  # how to read the picture

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def title(self) -> str:
        return self.step.title

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        """Such as "float32"."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def shape_text(self) -> str:
        """`B P D = 1 × 49 × 192`."""
        return f"{self.step.letters} = {' × '.join(map(str, self.shape))}"

    @property
    def label(self) -> str:
        """The last part of the name, and "output" for a layer's result: what a tree that shows the rest needs."""
        last = self.name.rsplit(".", 1)[-1]
        return "output" if last.isdigit() else last

    def __repr__(self) -> str:
        s = self.stats
        return (
            f"{self.name}: {self.title}; {self.shape_text}, {self.dtype}, {number(s.min)} to {number(s.max)}, "
            f"mean {number(s.mean)}, std {number(s.std)}, {s.broken:.1%} NaN or infinite; {self.step.module}, "
            f"chapter {self.step.chapter:02d}"
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """The picture, enlarged, and the line of text."""
        data, metadata = Figure(trace_figures.enlarged(self.picture.image), self.picture.alt)._repr_mimebundle_()
        return data | {"text/plain": repr(self)}, metadata


class Trace:
    """The entries of one forward pass, in the order in which they were computed.

    ``trace["logits"]`` and ``trace[3]`` are entries, ``trace.tensor("logits")`` is the tensor itself. A notebook shows
    a tree to step through; where scripts do not run, the same tree without the stepping; and where there is no HTML,
    one picture with alt text.
    """

    def __init__(self, prompt: str, tokens: str, next_words: list[tuple[str, float]], entries: list[Entry]):
        self.prompt, self.tokens, self.next_words, self.entries = prompt, tokens, next_words, entries
        self._by_name = {entry.name: entry for entry in entries}

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, key: str | int | slice) -> Entry | list[Entry]:
        """An entry by name or place. ValueError for a name that was not recorded, with the nearest that were."""
        if not isinstance(key, str):
            return self.entries[key]
        if key not in self._by_name:
            raise ValueError(
                f"No tensor called {key!r} was recorded; near it are {', '.join(nearest(key, self.names))}."
            )
        return self._by_name[key]

    def tensor(self, name: str) -> Tensor:
        """The recorded tensor, on the CPU and in its own type. ValueError as for ``trace[name]``."""
        return self[name].tensor

    def groups(self) -> Iterator[tuple[str, int | None, list[Entry]]]:
        """(stage, layer or None, its entries), one after the other: the branches of the tree."""
        for (stage, layer), entries in groupby(self.entries, lambda entry: (entry.step.stage, entry.step.layer)):
            yield stage, layer, list(entries)

    @cached_property
    def overview(self) -> Figure:
        """The whole pass on one sheet: a band per stage, a small picture per layer."""
        return trace_figures.overview(self)

    def __repr__(self) -> str:
        return trace_page.as_text(self)

    def save_html(self, path: str | Path) -> None:
        """Writes one page that needs no network, and the folder it goes into. ValueError unless it ends in .html."""
        path = Path(path)
        if path.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"The trace is written as a web page, so {str(path)!r} must end in .html.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(trace_page.as_page(self), encoding="utf-8")

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """All three forms. Notebooks choose the HTML, and take its script away where they do not trust it."""
        data, metadata = self.overview._repr_mimebundle_()
        return data | {"text/html": trace_page.as_html(self), "text/plain": repr(self)}, metadata


def nearest(key: str, names: list[str], most: int = 3) -> list[str]:
    """The names most like ``key``, which may be the end of one: of equally near ones, the first computed."""

    def likeness(name: str) -> float:
        ends = (name.split(".", i)[-1] for i in range(name.count(".") + 1))
        return max(SequenceMatcher(None, key, end).ratio() for end in ends)

    return sorted(names, key=likeness, reverse=True)[:most]


# --- recording -----------------------------------------------------------------------------------------------------


def trace(model: PaliGemma, processor: Processor, image, prompt: str, suffix: str | None = None) -> Trace:
    """Runs the model once over one picture and one prompt, and records every tensor between pixels and logits.

    The tensors are kept: of PaliGemma 3B at 224 pixels they take about 0.6 GB in float32, half of it in bfloat16.

    Args:
        image: a PIL image, a path, or a uint8 array [H, W, 3] in RGB.
        prompt: such as "caption en".
        suffix: an answer for the model to read after the prompt, as in training.

    Raises:
        ValueError: whatever the processor or the model cannot take.
    """
    batch = processor([prompt], [image], None if suffix is None else [suffix])
    batch.pop("labels", None)
    recorder = Recorder(model, processor, batch)
    device = model.multi_modal_projector.linear.weight.device
    with torch.no_grad(), recorder.hooks():
        logits = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    recorder.keep(LOGITS, logits)
    return Trace(prompt, recorder.token_text(), recorder.next_words(logits), recorder.entries)


PIXELS = Step("pixel_values", "The picture as numbers in [-1, 1]", "B C H W", "Figure", None, "minivlm.processor", 4)
PATCHES = Step(
    TOWER + "embeddings.patch_embedding",
    "Each patch as a vector: all times the same matrix",
    "B P D",
    "Vision tower",
    module="minivlm.siglip",
    chapter=3,
)
PROJECTED = Step(
    "multi_modal_projector", "Patch vectors in the decoder's width", "B P D", "Projector", None, "minivlm.paligemma", 8
)
LOOKED_UP = Step(
    DECODER + "embed_tokens", "Each token's row of the table; <image> reads <pad>'s", "B T D", "Embeddings"
)
SCALED = Step(DECODER + "embed", "Text embeddings, multiplied by √D", "B T D", "Embeddings")
MERGED = Step(
    "inputs_embeds", "Merged: the picture's vectors, then the text's", "B T D", "Embeddings", None, PROJECTED.module, 8
)
MASK = Step("mask", "Who may look at whom", "B T T", "Embeddings", None, "minivlm.masks", 5)
SLIDING = Step("sliding_mask", "The same, for layers with a window", "B T T", "Embeddings", None, "minivlm.masks", 5)
LOGITS = Step("logits", "For every token, a score of every next word", "B T V", "Words")


def steps(model: PaliGemma) -> Iterator[Step]:
    """The steps that are a module's result, in the order of the model's modules."""
    tower = partial(Step, letters="B P D", stage="Vision tower", module="minivlm.siglip", chapter=3)
    yield tower(TOWER + "embeddings", "Patch vectors that know where they stand")
    for i in range(model.config.vision_config.num_hidden_layers):
        for part, title in TOWER_LAYER.items():
            yield tower(f"{TOWER}encoder.layers.{i}.{part}", title, layer=i)
        yield tower(f"{TOWER}encoder.layers.{i}", f"The stream of patches after layer {i}", layer=i)
    yield tower(TOWER + "post_layernorm", "The tower's result, normalized")
    yield PROJECTED
    yield LOOKED_UP
    decoder = partial(Step, letters="B T D", stage="Decoder")
    for i in range(model.config.text_config.num_hidden_layers):
        parts = DECODER2_LAYER if model.config.text_config.has_post_norms else DECODER_LAYER
        for part, title in parts.items():
            yield decoder(f"{DECODER}layers.{i}.{part}", title, layer=i)
        yield decoder(f"{DECODER}layers.{i}", f"The stream of tokens after layer {i}", layer=i)
    yield decoder(DECODER + "norm", "The last hidden states, normalized")


class Recorder:
    """Collects entries while the model runs."""

    def __init__(self, model: PaliGemma, processor: Processor, batch: dict[str, Tensor]):
        self.model, self.processor, self.batch = model, processor, batch
        self.entries: list[Entry] = []
        # the last token of the prompt: what follows it is the answer's first word
        self.last = int((batch["token_type_ids"][0] == 0).nonzero()[-1])
        self.keep(PIXELS, batch["pixel_values"])

    def hooks(self) -> ExitStack:
        """Hooks on every module of ``steps``; leaving the ``with`` block takes them off again."""
        with ExitStack() as stack:
            for step in steps(self.model):
                hook = partial(self.on_result, step)
                stack.callback(self.model.get_submodule(step.name).register_forward_hook(hook).remove)
            embeddings, decoder = self.model.vision_tower.vision_model.embeddings, self.model.language_model.model
            stack.callback(embeddings.register_forward_pre_hook(self.on_pixels).remove)
            stack.callback(decoder.register_forward_pre_hook(self.on_merged).remove)
            return stack.pop_all()

    def on_result(self, step: Step, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if step.name == self.entries[-1].name:
            return  # on_merged looks the same tokens up again
        self.keep(step, output)

    def on_pixels(self, embeddings: nn.Module, inputs: tuple) -> None:
        """The tower is about to start: the patches before they are told their positions, which no module returns."""
        convolution = embeddings.patch_embedding
        self.keep(PATCHES, siglip.embed_patches(*inputs, convolution.weight, convolution.bias))

    def on_merged(self, decoder: nn.Module, inputs: tuple) -> None:
        """The decoder is about to start: what it is given, the scaled text in it, and the masks it will build."""
        embeddings, attention_mask, token_type_ids, _ = inputs
        ids = self.batch["input_ids"].to(embeddings.device)
        is_image = ids == self.model.config.image_token_index
        self.keep(SCALED, decoder.embed(ids.masked_fill(is_image, self.model.config.pad_token_id)))
        self.keep(MERGED, embeddings)
        T = embeddings.shape[1]
        full, sliding = masks.attention_masks(attention_mask, token_type_ids, T, decoder.config.sliding_window)
        everyone = torch.ones(1, T, T, dtype=torch.bool)
        self.keep(MASK, everyone if full is None else full)
        if sliding is not full:
            self.keep(SLIDING, everyone if sliding is None else sliding)

    def keep(self, step: Step, tensor: Tensor) -> None:
        """A copy of the tensor becomes an entry: what comes later may overwrite the original."""
        tensor = tensor.detach().cpu().clone()
        stats = Statistics.of(tensor)
        if step is PIXELS:
            picture, key = trace_figures.pixels(tensor[0], self.processor.mean, self.processor.std)
        elif step is LOGITS:
            picture, key = trace_figures.words(self.next_words(tensor))
        elif tensor.dtype == torch.bool:
            picture, key = trace_figures.mask(step.name, tensor[0])
        else:
            rows = "patches" if "T" not in step.letters else "tokens"
            picture, key = trace_figures.heat_map(step.name, tensor[0].float(), rows)
        self.entries.append(Entry(step, tensor, stats, picture, key))

    def next_words(self, logits: Tensor) -> list[tuple[str, float]]:
        """The likeliest words after the prompt, with their probabilities (0 to 1), likeliest first; none among NaN."""
        chances, ids = logits[0, self.last].float().cpu().softmax(-1).topk(WORDS)
        if bool(chances.isnan().any()):
            return []
        return [(self.word(i), chance) for i, chance in zip(ids.tolist(), chances.tolist(), strict=True)]

    def word(self, token: int) -> str:
        """A token as text; a number where the embedding table is longer than the vocabulary."""
        text = self.processor.tokenizer.id_to_token(token)
        return f"#{token}" if text is None else text.replace("▁", " ").replace("\n", "↵")

    def token_text(self) -> str:
        """`49 × <image> <bos>caption en↵`: what the decoder reads."""
        ids = self.batch["input_ids"][0].tolist()
        P = self.processor.num_image_tokens
        return f"{P} × {self.processor.image_token} {''.join(map(self.word, ids[P:]))}"
