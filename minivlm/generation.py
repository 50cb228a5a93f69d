"""From logits to text: read the prompt once, then write one token after another.

    B rows of text · T tokens of the prompt · N new tokens · V vocabulary

The whole prompt goes through the decoder in one call, the *prefill*: it fills the KV cache and gives the logits of the
first new token. Every further call, a *decode* step, feeds one token and gives the logits of the next, until each row
has written ``<eos>`` or has had its ``max_new_tokens``. The picture is encoded once, before the prefill.

Sources: top-p is nucleus sampling (arXiv:1904.09751); the order temperature, top-k, top-p is that of transformers
(``generation/logits_process.py``).
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minivlm import checkpoint
from minivlm.cache import Cache, GrowingCache, StaticCache
from minivlm.compiled import CompiledStep, padded_length
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor

# --- choosing a token ----------------------------------------------------------------------------------------------


def greedy(logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
    """The likeliest token of each row."""
    return logits.argmax(-1)


def apply_temperature(logits: Float[Tensor, "B V"], temperature: float) -> Float[Tensor, "B V"]:
    """Below 1 sharpens the distribution towards the likeliest token, above 1 flattens it."""
    return logits / temperature


def top_k_filter(logits: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """Keeps the ``k`` largest logits of each row, and any equal to the smallest of these; the others become -inf."""
    smallest_kept = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def top_p_filter(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Keeps the fewest tokens, likeliest first, whose probabilities sum to ``p`` or more; the others become -inf."""
    if p >= 1:
        return logits
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities  # the sum of all likelier ones: 0 for the first, which stays
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -math.inf)


def sample(logits: Float[Tensor, "B V"], generator: torch.Generator | None = None) -> Int[Tensor, " B"]:
    """One token per row, drawn with the probabilities softmax(logits)."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@dataclass
class GenerationConfig:
    """How to generate. ``ValueError`` for values that make no sense.

    Attributes:
        max_new_tokens: a row ends after this many tokens, or with ``<eos>``.
        do_sample: draw each token at random; otherwise take the likeliest.
        temperature, top_k, top_p: shape the distribution to draw from, in this order. Only with ``do_sample``.
        seed: the same seed draws the same tokens; without one, torch's global generator is used.
        cache: "static" (allocated once), "growing", or None: every step computes everything anew, the slow truth.
        compile: have torch compile the decode step. That takes 20 seconds or more when a model first answers a batch
            of this size, and on a CPU a C++ compiler; the steps are faster then. Only with the static cache.
    """

    max_new_tokens: int = 32
    do_sample: bool = False
    temperature: int | float = 1.0
    top_k: int | None = None
    top_p: int | float | None = None
    seed: int | None = None
    cache: str | None = "static"
    compile: bool = False

    def __post_init__(self):
        for name in ("max_new_tokens", "top_k"):
            value = getattr(self, name)
            if not (name == "top_k" and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}.")
        if not 1e-6 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be above 0 (at least 1e-6) and finite, not {self.temperature}: "
                "to get the likeliest token every time, leave do_sample out."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if not self.do_sample and (self.temperature != 1 or self.top_k is not None or self.top_p is not None):
            raise ValueError("temperature, top_k and top_p need do_sample=True: without it they would change nothing.")
        if self.cache not in ("static", "growing", None):
            raise ValueError(f"cache must be 'static', 'growing' or None, not {self.cache!r}.")
        if self.compile and self.cache != "static":
            raise ValueError(f"compile needs cache='static', not {self.cache!r}: the cache must keep its shape.")


def sample_next_token(
    logits: Float[Tensor, "B V"], options: GenerationConfig, generator: torch.Generator | None = None
) -> Int[Tensor, " B"]:
    """The next token of each row, as ``options`` say."""
    if not options.do_sample:
        return greedy(logits)
    logits = apply_temperature(logits, float(options.temperature))
    if options.top_k is not None:
        logits = top_k_filter(logits, options.top_k)
    if options.top_p is not None:
        logits = top_p_filter(logits, float(options.top_p))
    return sample(logits, generator)


# --- the loop ------------------------------------------------------------------------------------------------------


@dataclass
class GenerationOutput:
    """What ``generate_ids`` returns; N is the length of the longest answer.

    Attributes:
        sequences: the new tokens, ``<eos>`` included, ``<pad>`` after it.
        log_probs: of each token under the model itself, before temperature and filters; 0 after the end.
        finished: True where a row ended with ``<eos>``, False where ``max_new_tokens`` cut it.
    """

    sequences: Int[Tensor, "B N"]
    log_probs: Float[Tensor, "B N"]
    finished: Bool[Tensor, " B"]


@torch.inference_mode()
def generate_tokens(
    model: PaliGemma, batch: dict[str, Tensor], options: GenerationConfig
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields the columns of ``GenerationOutput``: tokens [B], log-probabilities [B], finished so far [B]."""
    device = model.multi_modal_projector.linear.weight.device
    ids, attention, types, pixels = (
        batch[name].to(device) for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
    )
    generator = None if options.seed is None else torch.Generator(device).manual_seed(options.seed)
    features = model.encode_image(pixels)
    room = ids.shape[1] + options.max_new_tokens - 1  # the last is not fed
    cache = make_cache(model, len(ids), padded_length(room) if options.compile else room, options.cache)
    compiled = CompiledStep(model, cache, attention) if options.compile else None
    if bool(attention.all()):
        attention = None  # no padding, nothing to mask
    one = torch.ones_like(ids[:, :1])
    finished = torch.zeros_like(ids[:, 0], dtype=torch.bool)
    for step in range(options.max_new_tokens):
        if step and compiled is not None:
            logits = compiled(token)
        else:
            if step == 0 or cache is None:
                inputs = {"input_ids": ids, "token_type_ids": types, "image_features": features}
            else:
                inputs = {"input_ids": token[:, None]}
            logits = model(**inputs, attention_mask=attention, cache=cache, last_only=True)[:, -1]
        logits = logits.float()
        log_probs = logits.log_softmax(-1)
        if not bool(log_probs.min().isfinite()):  # NaN counts as below all numbers
            fault = checkpoint.find_nonfinite(dict(model.named_parameters()))
            raise ValueError(fault or "the logits are not finite, though the weights are: load them as torch.float32.")
        token = sample_next_token(logits, options, generator).masked_fill(finished, model.config.pad_token_id)
        log_prob = log_probs.gather(-1, token[:, None])[:, 0].masked_fill(finished, 0.0)
        finished = finished | (token == model.config.eos_token_id)
        yield token, log_prob, finished
        if bool(finished.all()):
            return
        attention = None if attention is None else torch.cat((attention, one), dim=1)
        if cache is None:
            ids, types = torch.cat((ids, token[:, None]), dim=1), torch.cat((types, one), dim=1)


def make_cache(model: PaliGemma, batch_size: int, max_length: int, kind: str | None) -> Cache | None:
    """An empty cache on the model's device, in its type: "static", "growing" or None."""
    weight = model.language_model.model.embed_tokens.weight
    if kind == "static":
        return StaticCache(model.config.text_config, batch_size, max_length, weight.dtype, weight.device)
    return GrowingCache() if kind == "growing" else None


def generate_ids(model: PaliGemma, batch: dict[str, Tensor], **options) -> GenerationOutput:
    """Tokens in, tokens out.

    Args:
        batch: what a ``Processor`` makes of prompts and pictures, without suffixes and padded on the left. With fewer
            pictures than rows, consecutive rows share one.
        options: the fields of ``GenerationConfig``.

    Raises:
        ValueError: options that make no sense, a batch padded on the right, or logits that are not finite.
    """
    options = GenerationConfig(**options)
    if not bool(batch["attention_mask"][:, -1].all()):
        raise ValueError("the prompts are padded on the right, where the answers go: give padding_side='left'.")
    columns = list(generate_tokens(model, batch, options))
    tokens, log_probs, finished = zip(*columns, strict=True)
    return GenerationOutput(torch.stack(tokens, dim=1), torch.stack(log_probs, dim=1), finished[-1].clone())


# --- text ----------------------------------------------------------------------------------------------------------


def prepare_inputs(processor: Processor, images, prompts) -> dict[str, Tensor]:
    """The batch for ``generate``: one picture for every prompt, one prompt for every picture, or as many of each.

    One picture is prepared once, however many prompts ask about it.
    """
    if not isinstance(images, list | tuple):
        rows = len(prompts) if isinstance(prompts, list | tuple) else 1
        batch = processor(text=prompts, images=[processor.load_and_resize(images)] * rows, padding_side="left")
        return batch | {"pixel_values": batch["pixel_values"][:1]}
    prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
    return processor(text=prompts, images=images, padding_side="left")


class TextStream:
    """Tokens in, pieces of text out, which joined are the decoded whole.

    A character that the vocabulary lacks is spelled as byte tokens. A run of these means nothing until it is over, so
    it is held back until another token or the end follows.
    """

    def __init__(self, processor: Processor):
        self.processor, self.ids, self.written = processor, [], ""

    def push(self, token: int) -> str:
        """The text that ``token`` completes; "" while it is part of an unfinished character."""
        self.ids.append(token)
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", self.processor.tokenizer.id_to_token(token) or "")
        writes_nothing = not self.processor.decode([token])  # special tokens do not end a run of bytes
        return "" if is_byte or writes_nothing else self.end()

    def end(self) -> str:
        """All text not written yet."""
        text = self.processor.decode(self.ids)
        piece, self.written = text[len(self.written) :], text
        return piece


def stream_generate(model: PaliGemma, processor: Processor, image, prompt, **options) -> Iterator[str]:
    """Yields the answer as it is written: ``for piece in stream_generate(…): print(piece, end="", flush=True)``.

    Arguments and errors as for ``generate``, with one picture and one prompt.
    """
    options = GenerationConfig(**options)
    if not isinstance(prompt, str) or isinstance(image, list | tuple):
        raise ValueError("only one answer can be streamed at a time: give one picture and one prompt, not lists.")
    text = TextStream(processor)
    for token, _, _ in generate_tokens(model, prepare_inputs(processor, image, prompt), options):
        if piece := text.push(int(token)):
            yield piece
    if piece := text.end():
        yield piece


def generate(
    model: PaliGemma,
    processor: Processor,
    image,
    prompt: str | list[str],
    *,
    stream: Callable[[str], None] | None = None,
    **options,
) -> str | list[str]:
    """Answers prompts about pictures.

    Args:
        image: a picture (PIL image, path or uint8 array [H, W, 3]) or a list of them.
        prompt: such as "caption en", or a list of them. Lists of both go in pairs; one picture with a list of prompts
            is encoded once, and one prompt with a list of pictures is put to each.
        stream: called with each piece of text as soon as it is written; for one picture and one prompt.
        options: the fields of ``GenerationConfig``: max_new_tokens=32, do_sample=False, temperature=1.0, top_k=None,
            top_p=None, seed=None, cache="static", compile=False.

    Returns:
        The answer, or, where either argument is a list, a list of answers.

    Raises:
        ValueError: options that make no sense, pictures and prompts that do not pair, or weights that give NaN.
    """
    if stream is not None:
        pieces = []
        for piece in stream_generate(model, processor, image, prompt, **options):
            pieces.append(piece)
            stream(piece)
        return "".join(pieces)
    generated = generate_ids(model, prepare_inputs(processor, image, prompt), **options)
    answers = [processor.decode(ids) for ids in generated.sequences]
    return answers[0] if isinstance(prompt, str) and not isinstance(image, list | tuple) else answers
