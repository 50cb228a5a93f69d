"""Pictures: one function each, all with a form that needs no live kernel, and all with alt text."""

from importlib import import_module

from minivlm.viz.attention import attention_mask, attention_over_mask, compare_masks
from minivlm.viz.boxes import draw_boxes, draw_sheet
from minivlm.viz.charts import cache_growth, lines, sampling_distribution
from minivlm.viz.diagrams import blocks, families, you_are_here
from minivlm.viz.matrices import similarity_matrix, softmax_and_sigmoid
from minivlm.viz.patches import (
    attention_on_picture,
    codebook,
    image_row,
    nearest_words,
    patch_grid,
    position_similarity,
)
from minivlm.viz.picture import Picture, from_figure
from minivlm.viz.tokens import Token, read_tokens, token_strip

__all__ = [
    "Picture",
    "Token",
    "Trace",
    "attention_mask",
    "attention_on_picture",
    "attention_over_mask",
    "blocks",
    "cache_growth",
    "codebook",
    "compare_masks",
    "decoder_attention",
    "draw_boxes",
    "draw_sheet",
    "families",
    "from_figure",
    "image_row",
    "lines",
    "mask_explorer",
    "nearest_words",
    "patch_grid",
    "position_similarity",
    "read_tokens",
    "sampling_distribution",
    "similarity_matrix",
    "softmax_and_sigmoid",
    "token_strip",
    "tower_attention",
    "trace",
    "you_are_here",
]

_NEED_TORCH = {
    "Trace": "tracing",
    "decoder_attention": "weights",
    "mask_explorer": "explorer",
    "tower_attention": "weights",
    "trace": "tracing",
}


def __getattr__(name: str):
    """Looks up what needs the model when it is first used: drawing alone need not wait for torch."""
    if name in _NEED_TORCH:
        return getattr(import_module(f"minivlm.viz.{_NEED_TORCH[name]}"), name)
    raise AttributeError(f"module 'minivlm.viz' has no attribute {name!r}")
