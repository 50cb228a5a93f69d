"""From logits to text: read the prompt once, then generate one token at a time.

    B rows · T tokens of the prompt · N new tokens · V vocabulary size

The whole prompt goes through the decoder in one call, the *prefill*. It fills the KV cache and returns the logits of
the first new token. Each later call, a *decode step*, feeds one token and returns the logits of the next, until every
row has produced ``<eos>`` or ``max_new_tokens`` tokens. The image is encoded once, before the prefill.

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

from minivlm.cache import Cache, GrowingCache, StaticCache
from minivlm.compiled import CompiledStep, padded_length
from minivlm.config import LARGEST_SIZE, check_number
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor, check_batch


def greedy(logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
    """The most likely token in each row (argmax)."""
    return logits.argmax(-1)


def apply_temperature(logits: Float[Tensor, "B V"], temperature: float) -> Float[Tensor, "B V"]:
    """Divide logits by the temperature. Below 1 sharpens the distribution, above 1 flattens it."""
    return logits / temperature


def top_k_filter(logits: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """Keep the ``k`` largest logits in each row, and ties with the smallest of them. Set the others to -inf."""
    smallest_kept = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def top_p_filter(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Keep the smallest set of most likely tokens whose probabilities sum to ``p`` or more. Set the others to -inf."""
    if p >= 1:
        return logits
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities  # total of the more likely ones: 0 for the first, always kept
    p = max(p, torch.finfo(before.dtype).tiny)  # the first stays even if p would round to 0
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -math.inf)


def sample(logits: Float[Tensor, "B V"], generator: torch.Generator | None = None) -> Int[Tensor, " B"]:
    """Sample one token per row with the probabilities softmax(logits)."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@dataclass
class GenerationConfig:
    """How to generate. Raises ValueError for values that are invalid or would have no effect.

    Attributes:
        max_new_tokens: A row ends after this many tokens, or earlier with ``<eos>``.
        do_sample: Sample each token. Otherwise take the most likely one.
        temperature, top_k, top_p: Change the distribution to sample from, in this order. Only with ``do_sample``.
        seed: The same seed samples the same tokens. Default: torch's global generator.
        cache: "static" (allocated once), "growing", or None: every step recomputes everything, as a slow reference.
        compile: Compile the decode step with torch. Steps get faster, after 20 seconds or more of compilation for each
            model and batch size. Requires the static cache and, on a CPU, a C++ compiler.
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
        if {type(self.do_sample), type(self.compile)} != {bool}:
            raise ValueError(f"do_sample and compile must be booleans, not {self.do_sample!r} and {self.compile!r}.")
        if self.temperature == 0:
            raise ValueError("temperature must be above 0: for the most likely token every time, leave do_sample out.")
        check_number("max_new_tokens", self.max_new_tokens, 1, LARGEST_SIZE)
        check_number("temperature", self.temperature, 1e-7, 10**6, is_float=True)
        check_number("top_k", 1 if self.top_k is None else self.top_k, 1, LARGEST_SIZE)
        check_number("top_p", 1 if self.top_p is None else self.top_p, 0, 1, is_float=True)
        check_number("seed", 0 if self.seed is None else self.seed, -(2**63), 2**64 - 1)
        if not self.do_sample and (self.temperature != 1 or self.top_k is not None or self.top_p is not None):
            raise ValueError("temperature, top_k and top_p need do_sample=True: without it they have no effect.")
        if self.cache not in ("static", "growing", None):
            raise ValueError(f"cache must be 'static', 'growing' or None, not {self.cache!r}.")
        if self.compile and self.cache != "static":
            raise ValueError(f"compile needs cache='static', not {self.cache!r}: its shape must not change.")


def sample_next_token(
    logits: Float[Tensor, "B V"], config: GenerationConfig, generator: torch.Generator | None = None
) -> Int[Tensor, " B"]:
    """Choose the next token of each row as ``config`` says."""
    if not config.do_sample:
        return greedy(logits)
    logits = apply_temperature(logits, float(config.temperature))
    if config.top_k is not None:
        logits = top_k_filter(logits, config.top_k)
    if config.top_p is not None:
        logits = top_p_filter(logits, float(config.top_p))
    return sample(logits, generator)


@dataclass
class GenerationOutput:
    """The result of ``generate_ids``. N is the length of the longest answer.

    Attributes:
        sequences: The new tokens, including ``<eos>``, then ``<pad>``.
        log_probs: Natural log-probability of each token, before temperature and filters. 0 after ``<eos>``.
        finished: True if a row ended with ``<eos>``, False if ``max_new_tokens`` cut it off.
    """

    sequences: Int[Tensor, "B N"]
    log_probs: Float[Tensor, "B N"]
    finished: Bool[Tensor, " B"]


@torch.inference_mode()
def generate_tokens(
    model: PaliGemma, batch: dict[str, Tensor], config: GenerationConfig
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ``GenerationOutput`` column by column: tokens [B], log-probabilities [B], which rows have finished [B]."""
    device = model.language_model.model.embed_tokens.weight.device
    names = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
    if missing := [name for name in names if name not in batch]:
        raise ValueError(f"the batch has no {', '.join(missing)}. Prepare it with the processor.")
    ids, attention, types, pixels = (batch[name].to(device) for name in names)
    attention = (attention != 0).long()
    if not bool(attention[:, -1].all()):
        raise ValueError("the prompts are padded on the right, where the answers go. Use padding_side='left'.")
    prompt, new, limit = ids.shape[1], config.max_new_tokens, model.config.text_config.max_position_embeddings
    if prompt + new > limit:
        raise ValueError(
            f"{prompt} tokens and max_new_tokens={new} exceed the model's {limit} positions. Lower either."
        )
    generator = None if config.seed is None else torch.Generator(device).manual_seed(config.seed)
    features = model.encode_image(pixels)
    slots = prompt + new - 1  # the last token is not fed
    cache = make_cache(model, len(ids), padded_length(slots) if config.compile else slots, config.cache)
    compiled = CompiledStep(model, cache, attention) if config.compile else None
    if bool(attention.all()):
        attention = None  # no padding, so nothing to mask
    one, eos = torch.ones_like(ids[:, :1]), torch.tensor(model.config.eos_token_ids, device=device)
    pad = eos[0] if model.config.pad_token_id < 0 else model.config.pad_token_id
    finished = torch.zeros_like(ids[:, 0], dtype=torch.bool)
    for step in range(config.max_new_tokens):
        if step and compiled is not None:
            logits = compiled(token)
        else:
            inputs = {"input_ids": token[:, None]} if step else {}
            if step == 0 or cache is None:
                inputs = {"input_ids": ids, "token_type_ids": types, "image_features": features}
            logits = model(**inputs, attention_mask=attention, cache=cache, last_only=True)[:, -1]
        logits = logits.float()
        log_probs = logits.log_softmax(-1)
        token = sample_next_token(logits, config, generator).masked_fill(finished, pad)
        log_prob = log_probs.gather(-1, token[:, None])[:, 0].masked_fill(finished, 0.0)
        finished = finished | torch.isin(token, eos)
        yield token, log_prob, finished
        if bool(finished.all()):
            return
        attention = None if attention is None else torch.cat((attention, one), dim=1)
        if cache is None:
            ids, types = torch.cat((ids, token[:, None]), dim=1), torch.cat((types, one), dim=1)


def make_cache(model: PaliGemma, batch_size: int, max_length: int, kind: str | None) -> Cache | None:
    """An empty cache with the model's device and dtype. ``kind`` is "static", "growing" or None for no cache."""
    weight = model.language_model.model.embed_tokens.weight
    if kind == "static":
        return StaticCache(model.config.text_config, batch_size, max_length, weight.dtype, weight.device)
    return GrowingCache() if kind == "growing" else None


def generate_ids(model: PaliGemma, batch: dict[str, Tensor], **options) -> GenerationOutput:
    """Generate token ids for a batch.

    Args:
        batch: Output of a ``Processor`` without suffixes, padded on the left. With fewer images than rows, consecutive
            rows share one.
        options: Fields of ``GenerationConfig``.

    Raises:
        ValueError: If the options are invalid, the batch is padded on the right or too long, or logits are not finite.
    """
    columns = list(generate_tokens(model, batch, GenerationConfig(**options)))
    tokens, log_probs, finished = zip(*columns, strict=True)
    return GenerationOutput(torch.stack(tokens, dim=1), torch.stack(log_probs, dim=1), finished[-1].clone())


def prepare_inputs(processor: Processor, images, prompts) -> dict[str, Tensor]:
    """The batch for ``generate``: pairs, one image for all prompts, or one prompt for all images.

    A single image that is not in a list is prepared once for all prompts, and ``pixel_values`` contains it once.
    """
    if isinstance(images, list | tuple):
        prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
        return processor(text=prompts, images=images, padding_side="left")
    rows = len(prompts) if isinstance(prompts, list | tuple) else 1
    prefixes, _, _ = check_batch(prompts, [images] * rows, None, processor.image_token)
    return processor.tokenize(prefixes, None, "left") | {"pixel_values": processor.preprocess_images([images])}


class TextStream:
    """Turns tokens into pieces of text as they arrive. The joined pieces equal the decoded sequence.

    A character that is not in the vocabulary is spelled as byte tokens. These can only be decoded together, so they are
    held back until a token of another kind or the end follows.
    """

    def __init__(self, processor: Processor):
        self.processor, self.ids, self.returned = processor, [], ""

    def push(self, token: int) -> str:
        """The text that ``token`` completes, or "" while it is part of an unfinished character."""
        self.ids.append(token)
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", self.processor.tokenizer.id_to_token(token) or "")
        is_silent = not self.processor.decode([token])  # special tokens do not end a run of bytes
        return "" if is_byte or is_silent else self.end()

    def end(self) -> str:
        """All text that was not returned yet."""
        text = self.processor.decode(self.ids)
        piece, self.returned = text[len(self.returned) :], text
        return piece


def stream_generate(model: PaliGemma, processor: Processor, image, prompt, **options) -> Iterator[str]:
    """Yield the answer while it is generated: ``for piece in stream_generate(…): print(piece, end="", flush=True)``.

    Arguments and errors as for ``generate``, with one image and one prompt.
    """
    config = GenerationConfig(**options)
    if not isinstance(prompt, str) or isinstance(image, list | tuple):
        raise ValueError("only one answer can be streamed at a time. Pass one image and one prompt, not lists.")
    text = TextStream(processor)
    for token, _, _ in generate_tokens(model, prepare_inputs(processor, image, prompt), config):
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
    """Answer prompts about images.

    Args:
        image: An image (PIL image, path or uint8 array [H, W, 3]) or a list of them.
        prompt: A prompt such as "caption en", or a list of them. Two lists are paired up. One image with a list of
            prompts is encoded once. One prompt with a list of images is used for each image.
        stream: Called with each piece of text as soon as it is generated. Only for one image and one prompt.
        options: Fields of ``GenerationConfig``, such as max_new_tokens=32 or do_sample=True.

    Returns:
        The answer, or a list of answers if either argument is a list.

    Raises:
        ValueError: If the options are invalid, images and prompts do not match, or the weights produce NaN.
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
