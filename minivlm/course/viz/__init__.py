"""Figures for the notebooks. Each has alt text and a form that needs no live kernel."""

from importlib import import_module

from minivlm.course.viz.attention import attention_mask, attention_over_mask, compare_masks
from minivlm.course.viz.boxes import draw_boxes, draw_sheet
from minivlm.course.viz.charts import cache_growth, lines, sampling_distribution
from minivlm.course.viz.decoder import decode_step, rotated_pairs
from minivlm.course.viz.diagrams import blocks, families, you_are_here
from minivlm.course.viz.figure import Figure, from_figure
from minivlm.course.viz.matrices import similarity_matrix, softmax_and_sigmoid
from minivlm.course.viz.patches import (
    attention_on_image,
    codebook,
    image_row,
    nearest_words,
    patch_grid,
    position_similarity,
)
from minivlm.course.viz.tokens import Token, read_tokens, token_strip
from minivlm.course.viz.widgets import sliders

__all__ = [
    "Figure",
    "Token",
    "Trace",
    "attention_mask",
    "attention_on_image",
    "attention_over_mask",
    "blocks",
    "cache_growth",
    "codebook",
    "compare_masks",
    "decode_step",
    "decoder_attention",
    "draw_boxes",
    "draw_sheet",
    "explore",
    "families",
    "from_figure",
    "image_row",
    "lines",
    "nearest_words",
    "patch_grid",
    "playground",
    "position_similarity",
    "read_tokens",
    "rotated_pairs",
    "sampling_distribution",
    "similarity_matrix",
    "sliders",
    "softmax_and_sigmoid",
    "token_strip",
    "tower_attention",
    "trace",
    "you_are_here",
]

_NEED_TORCH = {
    "Trace": "tracing",
    "decoder_attention": "weights",
    "explore": "explorer",
    "playground": "play",
    "tower_attention": "weights",
    "trace": "tracing",
}


def __getattr__(name: str):
    """Imports what needs torch only when it is used, so that drawing alone does not wait for torch."""
    if name in _NEED_TORCH:
        return getattr(import_module(f"minivlm.course.viz.{_NEED_TORCH[name]}"), name)
    raise AttributeError(f"module 'minivlm.course.viz' has no attribute {name!r}")
