"""PaliGemma from an empty file. Check it with ``python -m minivlm capstone FILE``.

Fill in the functions below, in any framework, and in any order: a function that is missing or raises
NotImplementedError is reported as not written. Classes, helpers and more functions are yours. What comes in is numpy;
what goes out can be anything that numpy can convert: numpy arrays, tensors of torch, arrays of jax.

    B rows · I images · P patches, one token each · T tokens · S tokens so far · D, E widths of decoder and tower
    V vocabulary

Arguments with the same name always have the same meaning:

    model            what your load returned
    pixel_values     float32 [I, 3, H, W] in [-1, 1]; one image per row of text
    input_ids        int64 [B, T]; the P image tokens of a row are image_token_index
    attention_mask   int64 [B, T]; 1 on tokens, 0 on padding, which can be on the left or on the right
    token_type_ids   int64 [B, T]; 0 on image and prompt, 1 on the answer

If this file has a dictionary named ``seen``, you can put intermediate values into it under the names of the hub's
modules: ``seen["layers.2.self_attn.q"] = q``. If a result is wrong, the check names the first of them that is wrong.
In the tower: ``embeddings``, ``layers.N`` (output of a layer), ``layers.N.layer_norm1``, ``.self_attn``,
``.layer_norm2``, ``.mlp``. In the decoder: ``layers.N``, ``layers.N.input_layernorm``, ``.self_attn``, ``.mlp``,
``.post_attention_layernorm`` and so on. In both, inside attention: ``layers.N.self_attn.q``, ``.k`` (in the decoder
after RoPE) and ``.v``, each [B, heads, T, d], and ``.weights`` [B, heads, T, T].
"""

seen = {}


def read_config(path):
    """A checkpoint's folder → a dict with the numbers of its config.json, those that the file leaves out included.

    It has the same nesting and names as the file: image_token_index, eos_token_id, and in
    vision_config: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, image_size, patch_size,
    layer_norm_eps; in text_config: model_type, vocab_size, hidden_size, intermediate_size, num_hidden_layers,
    num_attention_heads, num_key_value_heads, head_dim, rms_norm_eps, rope_theta; and if model_type is "gemma2":
    query_pre_attn_scalar, attn_logit_softcapping, final_logit_softcapping, sliding_window.
    """
    raise NotImplementedError


def load(path):
    """A checkpoint's folder → your model, any object, with float32 weights. It is passed to the functions below.

    Raises:
        ValueError: If a weight is missing, is one too many, or has the wrong shape.
    """
    raise NotImplementedError


def encode_image(model, pixel_values):
    """The vision tower: pixels [I, 3, H, W] → patch vectors [I, P, E], after the last LayerNorm."""
    raise NotImplementedError


def project(model, features):
    """The projector: patch vectors [I, P, E] → [I, P, D], as the decoder reads them."""
    raise NotImplementedError


def prefix_lm_mask(attention_mask, token_type_ids):
    """Booleans [B, T, T], True where query (axis 1) attends to key (axis 2), without the sliding window.

    Rows of queries that are padding are not looked at.
    """
    raise NotImplementedError


def decode(model, embeddings, attention_mask, token_type_ids):
    """The decoder without its ends: embeddings [B, T, D], scaled already → hidden states [B, T, D] after the last norm.

    Rows of padding are not looked at.
    """
    raise NotImplementedError


def logits(model, input_ids, pixel_values, attention_mask, token_type_ids):
    """The whole model: scores [B, T, V] of the token after each token."""
    raise NotImplementedError


def prefill(model, input_ids, pixel_values, attention_mask, token_type_ids, room):
    """Reads the prompts → (scores [B, V] of the first new token, a cache: any object).

    ``room`` is the number of tokens that ``step`` will add at most.
    """
    raise NotImplementedError


def step(model, cache, tokens):
    """Reads one new token per row, int64 [B] → (scores [B, V] of the token after it, the cache)."""
    raise NotImplementedError


def generate(model, input_ids, pixel_values, attention_mask, token_type_ids, max_new_tokens):
    """The most likely new tokens of each row, a list of integers each, which ends with an end token or at the maximum.

    After its end token, a row can go on with padding (0). ``eos_token_id`` in config.json can be a list.
    """
    raise NotImplementedError
