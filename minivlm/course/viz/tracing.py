"""The tensor trace: one forward pass of PaliGemma with every tensor on the way, to look at and to step through.

Forward hooks, which torch calls with every module's output, record the tensors. They are removed when the pass ends,
even with an error. The model's code has nothing for the trace's sake: what attention computes inside is computed again
from the module's inputs, with the model's own functions.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minivlm import gemma, masks, siglip
from minivlm.cache import Cache, GrowingCache
from minivlm.course.viz import trace_figures, trace_page
from minivlm.course.viz import trace_steps as these
from minivlm.course.viz.figure import Figure
from minivlm.course.viz.tokens import token_text
from minivlm.course.viz.trace_data import Entry, Statistics, Step
from minivlm.course.viz.trace_diff import TOLERANCE, Diff
from minivlm.course.viz.traced import Traced
from minivlm.course.viz.weights import decoder_parts, tower_parts
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor

NEXT_TOKENS = 5  # how many of the most likely next tokens are shown
Likely = list[tuple[str, float]]  # tokens with their probabilities, the most likely first


class Trace(Traced):
    """The recorded tensors of one forward pass, in the order of computation.

    ``trace["logits"]`` and ``trace[3]`` are entries, ``trace.tensor("logits")`` is the tensor itself.

    Attributes:
        title: What was traced.
        sequence: The tokens that the decoder has read, including those in the cache.
        patches: How many of them, at the beginning, stand for the image.
        past: How many of them were in the cache: 0, except in a decode step.
        position: Where in the sequence the answer begins to be predicted: the prompt's last token, or the new one.
        entries: The recorded tensors.
    """

    def __init__(
        self,
        title: str,
        sequence: list[str],
        patches: int,
        past: int,
        position: int,
        entries: list[Entry],
        predict: Callable[[Tensor, int], list[Likely]],
    ):
        self.title, self.sequence, self.patches, self.entries = title, sequence, patches, entries
        self.past, self.position = past, position
        self._predict = predict  # hidden states [N, D] → for each, the most likely next tokens

    @property
    def tokens(self) -> str:
        """What the decoder has read: ``49 × <image> <bos>caption en↵``."""
        return f"{self.patches} × {self.sequence[0]} {''.join(self.sequence[self.patches :])}"

    @cached_property
    def next_tokens(self) -> Likely:
        """The most likely tokens after ``position`` with their probabilities. None if there is NaN."""
        return self.next_words()

    def next_words(self, layer: int = -1, position: int | None = None, k: int = NEXT_TOKENS) -> Likely:
        """The most likely next tokens, if the decoder ended after this layer (a *logit lens*).

        The final norm and the output head read the residual stream after the layer.

        Args:
            layer: Index of the decoder layer. Default: the last, whose words are the model's own.
            position: Index of a token of this pass in ``sequence``. Default: ``self.position``.
            k: How many.

        Raises:
            ValueError: If there is no such layer or position.
        """
        streams = [entry.tensor[0] for entry in self.entries if these.is_layer_output(entry.step)]
        position = self.position if position is None else position
        if not -len(streams) <= layer < len(streams):
            raise ValueError(f"layer must be from 0 to {len(streams) - 1}, not {layer}.")
        if not self.past <= position < len(self.sequence):
            raise ValueError(f"position must be from {self.past} to {len(self.sequence) - 1}, not {position}.")
        return self._predict(streams[layer][position - self.past, None], k)[0]

    def diff(self, other: "Trace", tolerance: float = TOLERANCE) -> Diff:
        """Compares another trace with this one, tensor by tensor: a right run with a broken one.

        Args:
            other: The other trace.
            tolerance: Differences up to this share of a tensor's largest value count as rounding.
        """
        return Diff(self, other, tolerance)

    @cached_property
    def _words(self) -> str:
        """A table of the most likely next token at every layer and text position, as HTML."""
        streams = [entry for entry in self.entries if these.is_layer_output(entry.step)]
        start = max(self.past, self.patches)
        rows = [self._predict(entry.tensor[0, start - self.past :], 1) for entry in streams]
        return trace_page.words_table(self.sequence[start:], rows)

    @cached_property
    def overview(self) -> Figure:
        """The whole pass on one sheet, with one row of small figures per stage."""
        answer = trace_figures.in_words(self.next_tokens[:3]) or trace_figures.NO_TOKEN
        return trace_figures.overview(self.title, self.tokens, self.entries, f"Next token: {answer}.")

    @property
    def page_settings(self) -> dict[str, Any]:
        """What trace.js needs to know besides the tree."""
        return {"tokens": self.sequence, "past": self.past, "grid": round(self.patches**0.5), "first": 0}

    def html(self, folder: Path) -> str:
        """The tree to step through. Its links start from the folder."""
        notes = [f'<span class="muted"><code>{escape(self.tokens)}</code></span>']
        if self.past:
            notes.append(
                f"The cache holds keys and values of {self.past} tokens. The decoder reads one more, "
                f"<code>{escape(self.sequence[-1])}</code>: its key and value go to slot {self.past}, the last row of "
                "every <code>k</code> and <code>v</code>, and its query attends to all of them."
            )
        title = f"{self.title}, {len(self)} tensors"
        settings, below = self.page_settings, self._words
        return trace_page.as_html(title, notes, self.entries, self.overview, settings, folder, below=below)

    def __repr__(self) -> str:
        return trace_page.as_text(f"{self.tokens} → {len(self)} tensors", self.entries)


# --- recording -----------------------------------------------------------------------------------------------------


def trace(
    model: PaliGemma, processor: Processor, image, prompt: str, suffix: str | None = None, decode: int = 0
) -> Trace:
    """Runs the model once on one image and one prompt, and records every tensor between pixels and logits.

    The tensors stay in memory: about 0.8 GB for PaliGemma 3B at 224 pixels in float32, half of that in bfloat16.

    Args:
        model: The model, which is not changed.
        processor: Its processor.
        image: A PIL image, a path, or a uint8 array [H, W, 3] in RGB.
        prompt: Such as "caption en".
        suffix: An answer that the model reads after the prompt, as in training.
        decode: Record this decode step instead. In step 1, the decoder reads the first token of its own greedy answer,
            with image and prompt in the cache.

    Raises:
        ValueError: If the processor or the model raises it, or the answer is shorter than ``decode``.
    """
    if decode < 0 or (decode and suffix is not None):
        raise ValueError("decode must be a step of the model's own answer, 1 or more. Leave the suffix out.")
    batch = processor([prompt], [image], None if suffix is None else [suffix])
    batch.pop("labels", None)
    device = model.multi_modal_projector.linear.weight.device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.no_grad():
        ids, inputs, cache = prefill(model, batch, decode)
        recorder = Recorder(model, processor, ids, 0 if cache is None else cache.length)
        if cache is None:
            recorder.record(these.PIXELS, batch["pixel_values"])
        with recorder.hooks():
            logits = model(**inputs, cache=cache)
    recorder.position = len(ids) - 1 if decode else int((batch["token_type_ids"][0] == 0).nonzero()[-1])
    recorder.record(these.LOGITS, logits)
    title = f"Decode step {decode} of PaliGemma" if decode else "One forward pass of PaliGemma"
    where = recorder.past, recorder.position
    return Trace(title, recorder.sequence, processor.num_image_tokens, *where, recorder.entries, recorder.predict)


def prefill(
    model: PaliGemma, batch: dict[str, Tensor], decode: int
) -> tuple[list[int], dict[str, Tensor], Cache | None]:
    """All token ids, the inputs of the pass to record, and its cache, which only a decode step has.

    Raises:
        ValueError: If the answer ends before this step.
    """
    ids, inputs, cache = batch["input_ids"][0].tolist(), batch, GrowingCache() if decode else None
    for step in range(decode):
        token = model(**inputs, cache=cache, last_only=True)[:, -1].argmax(-1)
        if int(token) in model.config.eos_token_ids:
            raise ValueError(f"The answer ends after {step} tokens, so there is no decode step {decode}.")
        ids.append(int(token))
        inputs = {"input_ids": token[:, None]}
    return ids, inputs, cache


class Recorder:
    """Collects entries while the model runs.

    Args:
        ids: The tokens of the sequence, including those in the cache.
        past: How many of them are in the cache.
    """

    def __init__(self, model: PaliGemma, processor: Processor, ids: list[int], past: int):
        self.model, self.processor, self.ids, self.past = model, processor, ids, past
        self.sequence = list(map(self.text, ids))
        self.position = len(ids) - 1
        self.entries: list[Entry] = []

    def hooks(self) -> ExitStack:
        """Hooks on every module in ``steps``. Leaving the ``with`` block removes them."""
        with ExitStack() as stack:
            for step in these.steps(self.model):
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
        if self.entries and step.name == self.entries[-1].name:
            return  # on_merged looks the same tokens up again
        if isinstance(module, gemma.GemmaAttention | siglip.SiglipAttention):
            parts = decoder_parts if isinstance(module, gemma.GemmaAttention) else tower_parts
            for name, tensor in parts(module, inputs).items():
                self.record(these.attention_step(step, name, self.past > 0), tensor)
        elif step.title == these.BEFORE_MLP:
            self.record(these.residual_step(step), inputs[0])
        self.record(step, output)

    def on_pixels(self, embeddings: nn.Module, inputs: tuple) -> None:
        """The tower is about to start. Records the patches without position embeddings, which no module returns."""
        convolution = embeddings.patch_embedding
        self.record(these.PATCHES, siglip.embed_patches(*inputs, convolution.weight, convolution.bias))

    def on_merged(self, decoder: nn.Module, inputs: tuple) -> None:
        """The decoder is about to start. Records its input, the token embeddings in it, and the masks it will build."""
        embeddings, attention_mask, token_type_ids, _ = inputs
        ids = torch.tensor([self.ids[self.past :]], device=embeddings.device)
        is_image = ids == self.model.config.image_token_index
        self.record(these.SCALED, decoder.embed(ids.masked_fill(is_image, 0)))
        if not self.past:
            self.record(these.MERGED, embeddings)
        T, S = embeddings.shape[1], attention_mask.shape[1]
        full, sliding = masks.attention_masks(attention_mask, token_type_ids, T, decoder.config.sliding_window)
        all_pairs = torch.ones(1, T, S, dtype=torch.bool)
        self.record(these.MASK, all_pairs if full is None else full)
        if sliding is not full:
            self.record(these.SLIDING, all_pairs if sliding is None else sliding)

    def record(self, step: Step, tensor: Tensor) -> None:
        """Makes an entry of a copy of the tensor, because the model may overwrite the original later."""
        tensor = tensor.detach().cpu().clone()
        if step is these.PIXELS:
            drawing = trace_figures.pixels(tensor[0], self.processor.mean, self.processor.std)
        elif step is these.LOGITS:
            likely = self.most_likely(tensor[0, self.position - self.past, None], NEXT_TOKENS)
            drawing = trace_figures.next_tokens(likely[0])
        else:
            drawing = trace_figures.heat_map(step, tensor)
        self.entries.append(Entry(step, tensor, Statistics.of(tensor), drawing))

    @torch.no_grad()
    def predict(self, hidden: Float[Tensor, "N D"], k: int) -> list[Likely]:
        """Final norm and output head: for each vector of a residual stream, the most likely next tokens."""
        decoder = self.model.language_model
        hidden = hidden.to(decoder.model.embed_tokens.weight.device)
        return self.most_likely(decoder.logits(decoder.model.norm(hidden)), k)

    def most_likely(self, logits: Float[Tensor, "N V"], k: int) -> list[Likely]:
        """The ``k`` most likely tokens of each row. None where there is NaN."""
        p, ids = logits.float().cpu().softmax(-1).topk(k)
        rows = [list(zip(map(self.text, i), q, strict=True)) for i, q in zip(ids.tolist(), p.tolist(), strict=True)]
        return [[] if row_p.isnan().any() else row for row, row_p in zip(rows, p, strict=True)]

    def text(self, token: int) -> str:
        return token_text(token, self.processor).replace("\n", "↵")
