"""Pictures: one function each, all with a form that needs no live kernel, and all with alt text."""

from minivlm.viz.boxes import draw_boxes, draw_sheet
from minivlm.viz.picture import Picture

__all__ = ["Picture", "draw_boxes", "draw_sheet"]
