"""How much memory a training step takes, computed from shapes before anything is loaded.

    B rows · P patches · T tokens of a row, image included · D hidden size · F of the MLP · H query heads · K key/value
    heads · d head dimension · V vocabulary size

Four things fill it: the weights, their gradients, AdamW's two moments, and what autograd keeps of the forward pass
until the backward pass needs it, the *activations*. The first three depend on the model alone, the last on the batch.

Activations are counted per layer, tensor by tensor, as in gemma.py and siglip.py; tests/test_finetune.py compares them
with what autograd really keeps. Gemma 1 only: the soft caps of Gemma 2 keep all attention weights.
"""

from collections.abc import Callable
from numbers import Real

import torch
from torch import nn

from minivlm.checkpoint import SkipInit
from minivlm.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from minivlm.paligemma import PaliGemma


def state_bytes(trained: int, frozen: int, frozen_bytes: int = 2, processes: int = 1) -> Real:
    """Weights, gradients and moments, on each of the processes among which they are sharded.

    A weight that learns takes 16 bytes: itself, its gradient and AdamW's two moments in float32. A frozen one has
    neither gradient nor moments.

    Args:
        trained: Number of weights that learn.
        frozen: Number of weights that do not.
        frozen_bytes: Of each of those: 2 in bfloat16, 4 in float32.
    """
    return (16 * trained + frozen_bytes * frozen) / processes


def decoder_layer_bytes(config: GemmaConfig, T: int, half: bool, full: bool = True) -> int:
    """What a decoder layer keeps of each token.

    Args:
        T: Tokens of a row, to all of which a mask of rows with padding has a number.
        half: Whether the arithmetic is in bfloat16, by autocast. Norms stay in float32.
        full: Whether the weights of norms learn too: then what they multiply is kept.
    """
    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * d, config.num_key_value_heads * d
    norms = 2 * 4 * (D + D * full + 1)  # of two: input, normalized input and scale
    heads = 3 * queries + 2 * keys + config.num_attention_heads * T  # q, output twice; k, v; mask
    log_sums = 4 * config.num_attention_heads
    if half:  # autocast copies the input of each projection, and cosine and sine
        return norms + log_sums + 2 * (5 * D + heads + 2 * d + 4 * F)
    return norms + log_sums + 4 * (2 * D + heads + 4 * F)


def tower_layer_bytes(config: SiglipVisionConfig, half: bool) -> int:
    """What a tower layer keeps of each patch."""
    D, F = config.hidden_size, config.intermediate_size
    scalars = 4 * 4 + 4 * config.num_attention_heads
    if half:
        return 4 * 2 * D + scalars + 2 * (4 * D + 5 * D + 2 * F)
    return scalars + 4 * (9 * D + 2 * F)


def activation_bytes(
    config: PaliGemmaConfig, rows: int, text_tokens: int, targets: int, half: bool = True, full: bool = True
) -> int:
    """What autograd keeps of a forward pass in which everything learns or, without ``full``, adapters of the decoder.

    Args:
        rows: Images, each with one text.
        text_tokens: Of each row, prompt and answer.
        targets: Tokens with a loss, of all rows together.
    """
    text, vision = config.text_config, config.vision_config
    if text.has_post_norms:
        raise ValueError("Activations are counted for Gemma 1 only: measure a step of Gemma 2.")
    T, V = vision.num_image_tokens + text_tokens, text.vocab_size
    total = text.num_hidden_layers * T * decoder_layer_bytes(text, T, half, full)
    if full:
        total += vision.num_hidden_layers * vision.num_image_tokens * tower_layer_bytes(vision, half)
    # Logits in float32, and again as probabilities; with autocast also in bfloat16.
    return rows * total + targets * V * (10 if half else 8)


def peak_bytes(state: Real, activations: Real, trained: int, processes: int = 1) -> Real:
    """The most at one time: at the end of the forward pass or, with activations gone, in the optimizer's step.

    There, torch's AdamW makes one more number per weight. The first is a bound: gradients come as activations go.
    """
    return state + max(activations, 4 * trained / processes)


def count_weights(config: PaliGemmaConfig, prepare: Callable[[PaliGemma], nn.Module]) -> tuple[int, int]:
    """(weights that learn, weights that do not) of a model of these shapes, without any memory for it.

    Args:
        prepare: Freezes parts of the model, or adds adapters.
    """
    with torch.device("meta"), SkipInit():
        model = prepare(PaliGemma(config))
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(n for n, learns in sizes if learns), sum(n for n, learns in sizes if not learns)
