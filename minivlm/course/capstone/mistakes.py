"""What minivlm answers with a known mistake in one of its parts.

Most are the mistakes of the chapters' exercises, put into the model one at a time. The others are about what the
chapters leave to the package. If the learner's answer equals that of a mistake, the mistake is named.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F

from minivlm import gemma, masks, paligemma, siglip
from minivlm.course.capstone.reference import Reference
from minivlm.course.exercises import EXERCISES
from minivlm.course.exercises.ch06 import LayerWeights
from minivlm.course.exercises.patch import replaced
from minivlm.paligemma import PaliGemma

# Exercise → what its function is in a sentence about a whole model.
TOWER = {
    "patchify": "cutting the image into patches",
    "embed_patches": "the patch embedding",
    "layer_norm": "LayerNorm",
    "pre_norm_block": "a layer of the tower",
    "bidirectional_attention": "the tower's attention",
}
DECODER = {
    "rms_norm": "RMSNorm",
    "apply_rotary": "RoPE",
    "grouped_query_attention": "attention",
    "geglu": "GeGLU",
    "prefix_lm_mask": "the mask",
}
MASK = {"block_mask": "the mask", "prefix_lm_mask": "the mask", "mask_padding": "the mask"}
WHOLE = {"merge_image_features": "the merge of image and text"}
CACHE = {"append": "the cache", "token_positions": "the positions"}
PADDING = {"mask_padding": "the mask", "token_positions": "the positions"}


@dataclass(frozen=True)
class Known:
    """A mistake in a model.

    Attributes:
        sentence: "RMSNorm multiplies by w instead of 1 + w".
        hint: A sentence that helps.
        inside: The context in which the model has this mistake.
    """

    sentence: str
    hint: str
    inside: Callable[[], AbstractContextManager]


def from_exercises(parts: dict[str, str]) -> Iterator[Known]:
    """The declared mistakes of these exercises."""
    for name, what in parts.items():
        exercise = EXERCISES[name]
        for mistake in exercise.mistakes:
            inside = partial(replaced, {exercise.reference: mistake.function})
            yield Known(f"{what} {mistake.name}", mistake.hint, inside)


def of_tower(model: PaliGemma) -> Iterator[Known]:
    vision = model.vision_tower.vision_model
    yield Known(
        "the tower's MLP uses the exact GELU",
        "SigLIP's GELU is the tanh approximation: 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))).",
        lambda: patch.object(siglip.SiglipMLP, "forward", lambda self, x: self.fc2(F.gelu(self.fc1(x)))),
    )
    yield Known(
        "the tower forgets the position embeddings",
        "Add `embeddings.position_embedding.weight` [P, E] to the patch embeddings.",
        lambda: zero(vision.embeddings.position_embedding.weight),
    )
    yield Known(
        "the tower forgets its last LayerNorm",
        "After the last layer comes `post_layernorm`, the only norm with “post” in its name.",
        lambda: patch.object(vision.post_layernorm, "forward", lambda x: x),
    )
    yield Known(
        "the tower forgets its last layer",
        "All `num_hidden_layers` layers run: other models with SigLIP towers take the output of the last but one.",
        lambda: patch.object(vision.encoder.layers[-1], "forward", lambda x: x),
    )
    norms = [module for module in vision.modules() if isinstance(module, siglip.LayerNorm)]
    yield Known(
        "LayerNorm always uses a small eps",
        "Read `layer_norm_eps` from `vision_config`.",
        lambda: setting(norms, "eps", 1e-6),
    )
    yield from from_exercises(TOWER)


def of_projector(model: PaliGemma) -> Iterator[Known]:
    linear = model.multi_modal_projector.linear
    scale = model.config.projection_dim**0.5
    yield Known("the projector forgets the bias", "It is one linear layer with a bias.", lambda: zero(linear.bias))
    for what, factor in (("divides", 1 / scale), ("multiplies", scale)):
        forward = lambda x, f=factor: F.linear(x, linear.weight, linear.bias) * f  # noqa: E731
        yield Known(
            f"the projector {what} by √D",
            "Image vectors are not scaled here: only text embeddings are multiplied by √D (older code divides the "
            "image by √D and then multiplies everything).",
            partial(patch.object, linear, "forward", forward),
        )


def of_decoder(model: PaliGemma) -> Iterator[Known]:
    config, decoder = model.config.text_config, model.language_model.model
    attentions = [layer.self_attn for layer in decoder.layers]
    if config.has_post_norms:
        yield from of_gemma2(model)
    for what, scale in (
        ("attention scales by the root of the hidden size", config.hidden_size**-0.5),
        ("attention scales by the root of hidden_size / heads", (config.hidden_size / len_heads(model)) ** -0.5),
        ("attention scales by head_dim ** -0.5", config.head_dim**-0.5),
    ):
        where = "`query_pre_attn_scalar` ** -0.5" if config.has_post_norms else "`head_dim` ** -0.5"
        yield Known(what, f"Queries are scaled by {where}.", partial(setting, attentions, "scale", scale))
    for theta in (10000.0, 100000.0, 1000000.0):
        yield Known(
            f"RoPE always uses a theta of {theta:g}",
            "Read `rope_theta` from `text_config`.",
            partial(table, lambda right, positions, d, _, theta=theta: right(positions, d, theta)),
        )
    yield Known(
        "RoPE's angles fall half as fast as they should",
        "Pair i rotates by position · theta ** (-2i / head_dim): the exponent has a 2.",
        partial(table, lambda right, positions, d, theta: right(positions, d, theta**0.5)),
    )
    yield Known(
        "the decoder forgets its last norm",
        "After the last layer comes one more RMSNorm, `norm`.",
        lambda: patch.object(decoder.norm, "forward", lambda x: x),
    )
    norms = [module for module in decoder.modules() if isinstance(module, gemma.GemmaRMSNorm)]
    yield Known(
        "RMSNorm always uses a small eps",
        "Read `rms_norm_eps` from `text_config`.",
        lambda: setting(norms, "eps", 1e-6),
    )
    yield from from_exercises(DECODER)
    if not config.has_post_norms:
        for mistake in EXERCISES["decoder_layer"].mistakes:
            inside = partial(layer, mistake.function, config.rms_norm_eps)
            yield Known(f"a layer of the decoder {mistake.name}", mistake.hint, inside)


def of_gemma2(model: PaliGemma) -> Iterator[Known]:
    """What is different in PaliGemma 2, left out or misunderstood."""
    config, decoder = model.config.text_config, model.language_model.model
    yield Known(
        "attention forgets the soft cap",
        "In Gemma 2, scores are cap · tanh(scores / cap), with `attn_logit_softcapping`, before the mask.",
        partial(setting, [config], "attn_logit_softcapping", None),
    )
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    yield Known(
        "the decoder forgets the norms after attention and MLP",
        f"Gemma 2 has four norms per layer: {' and '.join(norms)} normalize what is added to x.",
        partial(identities, [getattr(layer, name) for layer in decoder.layers for name in norms]),
    )
    for name in norms:
        yield Known(
            f"the decoder forgets `{name}`",
            f"Gemma 2 has four norms per layer: {' and '.join(norms)} normalize what is added to x.",
            partial(identities, [getattr(layer, name) for layer in decoder.layers]),
        )
    yield Known(
        "a layer is built as in Gemma 1, with two norms",
        "In Gemma 2, `post_attention_layernorm` normalizes attention's output, and the MLP has norms of its own.",
        partial(setting, decoder.layers, "has_post_norms", False),
    )
    window = config.sliding_window
    advice = f"`sliding_window` = {window} allows a token itself and the {window - 1} before it."
    yield Known("the decoder has no sliding window", advice, partial(setting, [config], "sliding_window", None))
    for other, what in ((window + 1, "one token too wide"), (window - 1, "one token too narrow")):
        yield Known(f"the sliding window is {what}", advice, partial(setting, [config], "sliding_window", other))
    for sentence, has_window in (
        ("the sliding window is in odd layers instead of even ones", lambda i: i % 2 == 1),
        ("the sliding window is in all layers", lambda i: True),
    ):
        own = lambda self, i, f=has_window: self.sliding_window if f(i) else None  # noqa: E731
        advice = "Layers 0, 2, 4 … have the window, the others attend to everything."
        yield Known(sentence, advice, partial(patch.object, type(config), "window", own))
    yield Known(
        "the sliding window also limits the prefix",
        "Image and prompt attend to each other at any distance: the window applies where an answer token is involved.",
        partial(patch.object, masks, "attention_masks", strict_window),
    )


def of_whole(model: PaliGemma) -> Iterator[Known]:
    """From token ids and pixels to logits."""
    config, decoder = model.config.text_config, model.language_model.model
    root = config.hidden_size**0.5
    yield Known(
        "the text embeddings are not multiplied by √D",
        "Gemma multiplies token embeddings by √hidden_size. Image vectors stay as they are.",
        partial(patch.object, decoder, "embed", lambda ids: decoder.embed_tokens(ids)),
    )
    right = paligemma.merge_image_features
    for what, merge in (
        ("the image vectors are multiplied by √D too", lambda x, m, f: right(x, m, f * root)),
        ("the image vectors are divided by √D, but not multiplied again", lambda x, m, f: right(x, m, f / root)),
        ("the image tokens keep their own embeddings", lambda x, m, f: decoder.embed(ids_of(model, m))),
    ):
        advice = "Image vectors replace the embeddings of the image tokens, unscaled."
        yield Known(what, advice, partial(replaced, {right: merge}))
    if config.final_logit_softcapping:
        yield Known(
            "the logits are not capped",
            "Gemma 2's logits are cap · tanh(logits / cap), with `final_logit_softcapping`.",
            partial(setting, [config], "final_logit_softcapping", None),
        )
    yield from from_exercises(WHOLE)
    yield from of_decoder(model)


def of_cache(reference: Reference) -> Iterator[Known]:
    """Decode steps. The positions of a prompt are right in all of these."""
    model = reference.model
    right = gemma.token_positions
    for what, shift in (
        ("every new token has a position one too low", -1),
        ("every new token has a position one too high", 1),
        ("every new token has a position two too low", -2),
    ):
        positions = lambda mask, n, s=shift: right(mask, n) + (s if n == 1 else 0)  # noqa: E731
        advice = "Positions go on where the prompt ended: count the tokens in the cache."
        yield Known(what, advice, partial(replaced, {right: positions}))
    for start in (0, 1):
        yield Known(
            f"every new token has position {start}",
            "Positions go on where the prompt ended: count the tokens in the cache.",
            partial(replaced, {right: lambda m, n, s=start: right(m, n) * 0 + s if n == 1 else right(m, n)}),
        )
    embed = model.language_model.model.embed
    table = model.language_model.model.embed_tokens
    yield Known(
        "the embedding of a new token is not multiplied by √D",
        "New tokens are text: their embeddings are scaled as those of the prompt.",
        partial(patch.object, model.language_model.model, "embed", lambda i: embed(i) if i.shape[1] > 1 else table(i)),
    )
    if model.config.text_config.sliding_window:
        newest = masks.newest_token_masks
        for what, other in (
            ("steps ignore the sliding window", lambda m, slot, w: newest(m, slot, None)),
            ("in steps, the sliding window is one token too wide", lambda m, slot, w: newest(m, slot, w and w + 1)),
            ("in steps, the sliding window is one token too narrow", lambda m, slot, w: newest(m, slot, w and w - 1)),
        ):
            advice = "In even layers, a new token attends to itself and the window − 1 tokens before it."
            yield Known(what, advice, partial(replaced, {newest: other}))
    yield from from_exercises(CACHE)
    for known in from_exercises({"write_in_place": "the cache"}):
        yield replace(known, inside=partial(in_static_cache, reference, known.inside))


# --- contexts -------------------------------------------------------------------------------------------------------


@contextmanager
def setting(objects, attribute: str, value) -> Iterator[None]:
    """Another value of an attribute of these objects."""
    old = [getattr(one, attribute) for one in objects]
    try:
        for one in objects:
            setattr(one, attribute, value)
        yield
    finally:
        for one, before in zip(objects, old, strict=True):
            setattr(one, attribute, before)


@contextmanager
def in_static_cache(reference: Reference, inside: Callable) -> Iterator[None]:
    with setting([reference], "cache", "static"), inside():
        yield


@contextmanager
def zero(weight: torch.Tensor) -> Iterator[None]:
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@contextmanager
def identities(modules: list[torch.nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "forward", lambda x: x))
        yield


def table(other: Callable) -> AbstractContextManager:
    """The table of RoPE's angles from ``other(right function, positions, head_dim, theta)``."""
    return replaced({gemma.rotary_table: partial(other, gemma.rotary_table)})


@contextmanager
def layer(function: Callable, eps: int | float) -> Iterator[None]:
    """Gemma 1's layer by a function of the exercise ``decoder_layer``, whose eps is that of the real weights."""
    right = gemma.rms_norm

    def forward(self, x, cos, sin, mask, cache):
        attention, mlp = self.self_attn, self.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        weights = LayerWeights(
            self.input_layernorm.weight,
            *(linear.weight for linear in projections),
            self.post_attention_layernorm.weight,
            *(linear.weight for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
        )
        return function(x, weights, cos, sin, mask, attention.config.head_dim)

    with patch.object(gemma.GemmaDecoderLayer, "forward", forward):
        with replaced({right: lambda x, weight, _: right(x, weight, eps)}):
            yield


def strict_window(attention_mask, token_type_ids, queries, window):
    """Masks in which the window limits prompt tokens as well."""
    length = attention_mask.shape[1]
    visible = masks.prefix_lm_mask(token_type_ids)[:, length - queries :]
    near = masks.sliding_window_mask(length, window)[length - queries :]
    return masks.mask_padding(visible, attention_mask), masks.mask_padding(visible & near, attention_mask)


def len_heads(model: PaliGemma) -> int:
    return model.config.text_config.num_attention_heads


def ids_of(model: PaliGemma, is_image: torch.Tensor) -> torch.Tensor:
    return torch.full(is_image.shape, model.config.image_token_index)
