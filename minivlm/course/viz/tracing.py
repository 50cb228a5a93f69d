"""The tensor trace: one forward pass of PaliGemma with every tensor on the way, to look at and to step through.

    B batch (1 here) · C colors · H, W pixels · P patches · T tokens · V vocabulary
    D hidden size (of the tower; after the projector, of the decoder)

Forward hooks, which torch calls with every module's output, record the tensors. They are removed when the pass ends,
even with an error. A tensor has the name of the module that computes it, as in the hub's weight files. The few others
have their names from transformers.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from difflib import SequenceMatcher
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from minivlm import masks, siglip
from minivlm.course.viz import trace_figures, trace_page
from minivlm.course.viz.figure import Figure, output_path
from minivlm.course.viz.tokens import token_text
from minivlm.course.viz.trace_data import Entry, Statistics, Step
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor

TOWER, DECODER = "vision_tower.vision_model.", "language_model.model."
NEXT_TOKENS = 5  # how many of the most likely next tokens are shown

# Titles of the outputs of a layer's modules, by the last part of their names.
TOWER_LAYER = {
    "layer_norm1": "Residual stream, normalized for attention",
    "self_attn": "Attention output: what each patch gathers from all patches",
    "layer_norm2": "Residual stream, normalized for the MLP",
    "mlp": "MLP output, computed for each patch separately",
}
DECODER_LAYER = {
    "input_layernorm": "Residual stream, normalized for attention",
    "self_attn": "Attention output: what each token gathers from the allowed tokens",
    "post_attention_layernorm": "Residual stream, normalized for the MLP",
    "mlp": "GeGLU MLP output, computed for each token separately",
}
DECODER2_LAYER = {
    "input_layernorm": DECODER_LAYER["input_layernorm"],
    "self_attn": DECODER_LAYER["self_attn"],
    "post_attention_layernorm": "Attention output, normalized before it is added",
    "pre_feedforward_layernorm": "Residual stream, normalized for the MLP",
    "mlp": DECODER_LAYER["mlp"],
    "post_feedforward_layernorm": "MLP output, normalized before it is added",
}


class Trace:
    """The recorded tensors of one forward pass, in the order of computation.

    ``trace["logits"]`` and ``trace[3]`` are entries, ``trace.tensor("logits")`` is the tensor itself. A notebook shows
    a tree to step through, without scripts a tree that unfolds, and without HTML one figure with alt text.

    Attributes:
        prompt: The prompt.
        tokens: The sequence that the decoder reads, as text.
        next_tokens: The most likely tokens after the prompt with their probabilities, in this order.
        entries: The recorded tensors.
    """

    def __init__(self, prompt: str, tokens: str, next_tokens: list[tuple[str, float]], entries: list[Entry]):
        self.prompt, self.tokens, self.next_tokens, self.entries = prompt, tokens, next_tokens, entries
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
        """An entry by name or index.

        Raises:
            ValueError: If no tensor has this name. The message lists the most similar names.
        """
        if not isinstance(key, str):
            return self.entries[key]
        if key not in self._by_name:
            raise ValueError(f"No tensor is called {key!r}. Similar names: {', '.join(similar(key, self.names))}.")
        return self._by_name[key]

    def tensor(self, name: str) -> Tensor:
        """The recorded tensor, on the CPU and in its own dtype."""
        return self[name].tensor

    @cached_property
    def overview(self) -> Figure:
        """The whole pass on one sheet, with one row of small figures per stage."""
        return trace_figures.overview(self.tokens, self.entries, self.next_tokens)

    @cached_property
    def _html(self) -> str:
        """The tree to step through, for a notebook's output."""
        return trace_page.as_html(self.tokens, self.entries, self.overview)

    def save_html(self, path: str | Path) -> None:
        """Writes a page that needs no network and creates its folder.

        Raises:
            ValueError: If the name does not end in .html.
        """
        output_path(path, ".html").write_text(trace_page.as_page(self.prompt, self._html), encoding="utf-8")

    def __repr__(self) -> str:
        return trace_page.as_text(self.tokens, self.entries)

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """All three forms. Notebooks prefer the HTML, and remove its script if they do not trust it."""
        data, metadata = self.overview._repr_mimebundle_()
        return data | {"text/html": self._html, "text/plain": repr(self)}, metadata


def similar(key: str, names: list[str], most: int = 3) -> list[str]:
    """The names whose ends are most similar to ``key``. Of equally similar ones, those computed first."""

    def similarity(name: str) -> float:
        ends = (name.split(".", i)[-1] for i in range(name.count(".") + 1))
        return max(SequenceMatcher(None, key, end).ratio() for end in ends)

    return sorted(names, key=similarity, reverse=True)[:most]


# --- recording -----------------------------------------------------------------------------------------------------


def trace(model: PaliGemma, processor: Processor, image, prompt: str, suffix: str | None = None) -> Trace:
    """Runs the model once on one image and one prompt, and records every tensor between pixels and logits.

    The tensors stay in memory: about 0.6 GB for PaliGemma 3B at 224 pixels in float32, half of that in bfloat16.

    Args:
        model: The model, which is not changed.
        processor: Its processor.
        image: A PIL image, a path, or a uint8 array [H, W, 3] in RGB.
        prompt: Such as "caption en".
        suffix: An answer that the model reads after the prompt, as in training.

    Raises:
        ValueError: If the processor or the model raises it.
    """
    batch = processor([prompt], [image], None if suffix is None else [suffix])
    batch.pop("labels", None)
    recorder = Recorder(model, processor, batch)
    device = model.multi_modal_projector.linear.weight.device
    with torch.no_grad(), recorder.hooks():
        logits = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    recorder.record(LOGITS, logits)
    return Trace(prompt, recorder.token_text(), recorder.next_tokens(logits), recorder.entries)


tower_step = partial(Step, letters="B P D", stage="Vision tower", module="minivlm.siglip", chapter=3)
decoder_step = partial(Step, letters="B T D", stage="Decoder")
embedding_step = partial(Step, letters="B T D", stage="Embeddings")
mask_step = partial(Step, letters="B T T", stage="Embeddings", module="minivlm.masks", chapter=5)
inference = {"module": "minivlm.paligemma", "chapter": 8}

PIXELS = Step("pixel_values", "The image as numbers in [-1, 1]", "B C H W", "Image", None, "minivlm.processor", 4)
PATCHES = tower_step(TOWER + "embeddings.patch_embedding", "Patch embeddings: each patch times the same matrix")
PROJECTED = Step("multi_modal_projector", "Patch vectors, projected for the decoder", "B P D", "Projector", **inference)
LOOKED_UP = embedding_step(DECODER + "embed_tokens", "Rows of the embedding table; <image> reads the row of <pad>")
SCALED = embedding_step(DECODER + "embed", "Token embeddings, multiplied by √D")
MERGED = embedding_step("inputs_embeds", "Merged: patch vectors, then token embeddings", **inference)
MASK = mask_step("mask", "Which token attends to which")
SLIDING = mask_step("sliding_mask", "The same, for layers with a sliding window")
LOGITS = Step("logits", "For every token, a score of each next token", "B T V", "Next token")


def steps(model: PaliGemma) -> Iterator[Step]:
    """The steps whose tensor is a module's output, in the order of the model's modules."""
    yield tower_step(TOWER + "embeddings", "Patch embeddings plus position embeddings")
    for i in range(model.config.vision_config.num_hidden_layers):
        for part, title in TOWER_LAYER.items():
            yield tower_step(f"{TOWER}encoder.layers.{i}.{part}", title, layer=i)
        yield tower_step(f"{TOWER}encoder.layers.{i}", f"Residual stream after layer {i}", layer=i)
    yield tower_step(TOWER + "post_layernorm", "Output of the tower, normalized")
    yield PROJECTED
    yield LOOKED_UP
    for i in range(model.config.text_config.num_hidden_layers):
        parts = DECODER2_LAYER if model.config.text_config.has_post_norms else DECODER_LAYER
        for part, title in parts.items():
            yield decoder_step(f"{DECODER}layers.{i}.{part}", title, layer=i)
        yield decoder_step(f"{DECODER}layers.{i}", f"Residual stream after layer {i}", layer=i)
    yield decoder_step(DECODER + "norm", "Final hidden states, normalized")


class Recorder:
    """Collects entries while the model runs."""

    def __init__(self, model: PaliGemma, processor: Processor, batch: dict[str, Tensor]):
        self.model, self.processor, self.batch = model, processor, batch
        self.entries: list[Entry] = []
        # the last token of the prompt: its logits predict the first token of the answer
        self.last = int((batch["token_type_ids"][0] == 0).nonzero()[-1])
        self.record(PIXELS, batch["pixel_values"])

    def hooks(self) -> ExitStack:
        """Hooks on every module in ``steps``. Leaving the ``with`` block removes them."""
        with ExitStack() as stack:
            for step in steps(self.model):
                hook = partial(self.on_output, step)
                stack.callback(self.model.get_submodule(step.name).register_forward_hook(hook).remove)
            embeddings, decoder = self.model.vision_tower.vision_model.embeddings, self.model.language_model.model
            stack.callback(embeddings.register_forward_pre_hook(self.on_pixels).remove)
            stack.callback(decoder.register_forward_pre_hook(self.on_merged).remove)
            self.model.check_finite = lambda output, *parts: output  # the trace shows where NaN begins
            stack.callback(delattr, self.model, "check_finite")
            return stack.pop_all()

    def on_output(self, step: Step, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        """A module has returned."""
        if step.name == self.entries[-1].name:
            return  # on_merged looks the same tokens up again
        self.record(step, output)

    def on_pixels(self, embeddings: nn.Module, inputs: tuple) -> None:
        """The tower is about to start. Records the patches without position embeddings, which no module returns."""
        convolution = embeddings.patch_embedding
        self.record(PATCHES, siglip.embed_patches(*inputs, convolution.weight, convolution.bias))

    def on_merged(self, decoder: nn.Module, inputs: tuple) -> None:
        """The decoder is about to start. Records its input, the token embeddings in it, and the masks it will build."""
        embeddings, attention_mask, token_type_ids, _ = inputs
        ids = self.batch["input_ids"].to(embeddings.device)
        is_image = ids == self.model.config.image_token_index
        self.record(SCALED, decoder.embed(ids.masked_fill(is_image, 0)))
        self.record(MERGED, embeddings)
        T = embeddings.shape[1]
        full, sliding = masks.attention_masks(attention_mask, token_type_ids, T, decoder.config.sliding_window)
        all_pairs = torch.ones(1, T, T, dtype=torch.bool)
        self.record(MASK, all_pairs if full is None else full)
        if sliding is not full:
            self.record(SLIDING, all_pairs if sliding is None else sliding)

    def record(self, step: Step, tensor: Tensor) -> None:
        """Makes an entry of a copy of the tensor, because the model may overwrite the original later."""
        tensor = tensor.detach().cpu().clone()
        stats = Statistics.of(tensor)
        if step is PIXELS:
            figure, caption = trace_figures.pixels(tensor[0], self.processor.mean, self.processor.std)
        elif step is LOGITS:
            figure, caption = trace_figures.next_tokens(self.next_tokens(tensor))
        elif tensor.dtype == torch.bool:
            figure, caption = trace_figures.mask(step.name, tensor[0])
        else:
            rows = "patches" if "T" not in step.letters else "tokens"
            figure, caption = trace_figures.heat_map(step.name, tensor[0].float(), rows)
        self.entries.append(Entry(step, tensor, stats, figure, caption))

    def next_tokens(self, logits: Tensor) -> list[tuple[str, float]]:
        """The most likely tokens after the prompt with their probabilities, in this order. None if there is NaN."""
        p, ids = logits[0, self.last].float().cpu().softmax(-1).topk(NEXT_TOKENS)
        return [] if p.isnan().any() else list(zip(map(self.text, ids.tolist()), p.tolist(), strict=True))

    def text(self, token: int) -> str:
        return token_text(token, self.processor).replace("\n", "↵")

    def token_text(self) -> str:
        """What the decoder reads: ``49 × <image> <bos>caption en↵``."""
        ids = self.batch["input_ids"][0].tolist()
        P = self.processor.num_image_tokens
        return f"{P} × {self.processor.image_token} {''.join(map(self.text, ids[P:]))}"
