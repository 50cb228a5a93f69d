"""Which tensors a trace records: their names, what they are, their axes, and where they come from.

    B batch (1 here) · C colors · H, W pixels · P patches · T tokens · S keys: all tokens so far · V vocabulary
    D hidden size (of the tower; after the projector, of the decoder) · H, K, N heads: queries, keys, tower
    d head dimension

A tensor has the name of the module that computes it, as in the hub's weight files. The few others have their names
from transformers, or the name of their layer and one more word: q, k, v, weights, residual.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from minivlm.course.viz.trace_data import Step
from minivlm.paligemma import PaliGemma

TOWER, DECODER = "vision_tower.vision_model.", "language_model.model."

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
BEFORE_MLP = DECODER_LAYER["post_attention_layernorm"]  # the title of the norm that reads the residual stream there
RESIDUAL = "Residual stream plus attention output"

# Titles and axes of what attention computes inside, for the tower and for the decoder.
PARTS = {
    "q": ("Queries: what each position looks for", "B N P d", "B H T d"),
    "k": ("Keys: what each position offers to queries", "B N P d", "B K S d"),
    "v": ("Values: what each position passes on", "B N P d", "B K S d"),
    "weights": ("Attention weights: each query's shares of all keys", "B N P P", "B H T S"),
}
CACHED = {"k": "All keys in the cache, the new one last", "v": "All values in the cache, the new one last"}

tower_step = partial(Step, letters="B P D", stage="Vision tower", module="minivlm.siglip", chapter=3)
decoder_step = partial(Step, letters="B T D", stage="Decoder")
embedding_step = partial(Step, letters="B T D", stage="Embeddings")
mask_step = partial(Step, letters="B T S", stage="Embeddings", module="minivlm.masks", chapter=5)
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


def attention_step(step: Step, part: str, is_cached: bool) -> Step:
    """The step of a part of the attention module whose output is ``step``."""
    title, in_tower, in_decoder = PARTS[part]
    letters = in_decoder if step.name.startswith(DECODER) else in_tower
    step = replace(step, name=f"{step.name}.{part}", title=title, letters=letters)
    if is_cached and part in CACHED:
        return replace(step, title=CACHED[part], module="minivlm.cache", chapter=7)
    return step


def residual_step(step: Step) -> Step:
    """The step of the residual stream between a layer's attention and its MLP, which the norm ``step`` reads."""
    return replace(step, name=f"{step.name.rpartition('.')[0]}.residual", title=RESIDUAL)


def is_layer_output(step: Step) -> bool:
    """Whether it is the residual stream after a layer of the decoder."""
    return step.stage == "Decoder" and step.label == "output"
