"""Drawing with matplotlib in pixels, with x to the right and y down."""

from collections.abc import Callable
from functools import wraps
from numbers import Real

import numpy as np
from PIL import Image

from minivlm.course.viz.style import BODY, DPI, GRAY, INK, LIGHT, SMALL, STYLE, TITLE, WIDTH
from minivlm.course.viz.text import printable, text_width


def styled(draw: Callable) -> Callable:
    """Decorates a drawing function so that it uses only this style, whatever the notebook's matplotlib settings."""

    @wraps(draw)
    def drawn(*args, **kwargs):
        import matplotlib.style

        with matplotlib.style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return drawn


def sheet(height: Real, title: str | None = None, margin: Real = 12, width: Real = WIDTH):
    """An empty figure for content of this height, with a title above the content if given.

    Returns:
        The figure, its only axes, and the y below the title or, without a title, below a top margin. Data coordinates
        of the axes are pixels from the top left.

    Raises:
        ValueError: If the title does not fit on one line.
    """
    from matplotlib.figure import Figure

    top = 40 if title else margin
    height, width = round(height + top), round(width)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    if title:
        if text_width(title, TITLE, bold=True) > width - 24:
            raise ValueError(f"The title {title!r} is too long for one line. Shorten it.")
        write(axes, 12, 22, title, TITLE, ha="left", fontweight="bold")
    return figure, axes, top


def write(axes, x: Real, y: Real, text: str, size: Real = BODY, color: str = INK, ha="center", va="center", **how):
    """Writes one line of text at a point. ``how`` goes to matplotlib."""
    return axes.text(x, y, printable(text), fontsize=size * 72 / DPI, color=color, ha=ha, va=va, **how)


def rectangle(axes, x0: Real, y0: Real, x1: Real, y1: Real, fill: str = "white", edge: str = LIGHT, radius=0, **how):
    """Draws a rectangle between two corners, rounded by ``radius`` pixels."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    how = {"facecolor": fill, "edgecolor": edge, "linewidth": 1} | how
    if radius:
        style = f"round,pad=0,rounding_size={radius}"
        return axes.add_patch(FancyBboxPatch((x0, y0), x1 - x0, y1 - y0, boxstyle=style, mutation_aspect=1, **how))
    return axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **how))


def arrow(axes, *points: tuple[Real, Real], color: str = GRAY, both: bool = False, **how):
    """Draws a line through the points with an arrowhead at its end, or at both ends."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    how = {"linewidth": 1.6, "mutation_scale": 11, "color": color} | how
    style = "<|-|>" if both else "-|>"
    return axes.add_patch(FancyArrowPatch(path=Path(points), arrowstyle=style, shrinkA=0, shrinkB=0, **how))


def paste(axes, image: Image.Image, x0: Real, y0: Real, x1: Real, y1: Real):
    """Draws an image between two corners. The pixels of small images stay visible."""
    small = image.width * 3 <= x1 - x0
    how = {"interpolation": "nearest" if small else "lanczos"}
    return axes.imshow(image, extent=(x0, x1, y1, y0), aspect="auto", **how)


def heat_map(axes, values: np.ndarray, x0: Real, y0: Real, x1: Real, y1: Real, low: Real, high: Real, **how):
    """Draws a table as a heat map between two corners, in cividis from ``low`` to ``high``."""
    how = {"aspect": "auto", "cmap": "cividis", "interpolation": "nearest"} | how
    return axes.imshow(values, extent=(x0, x1, y1, y0), vmin=low, vmax=high if high > low else low + 1, **how)


def scale_bar(axes, y: Real, low: str, high: str, note: str = "") -> None:
    """Draws the color scale, centered: cividis from ``low`` to ``high``, and what it means."""
    width, after = 120, f"{high}   {note}" if note else high
    x = (axes.get_xlim()[1] - width - text_width(after, SMALL) + text_width(low, SMALL)) / 2
    write(axes, x - 6, y, low, SMALL, ha="right")
    heat_map(axes, np.linspace(0, 1, 256)[None], x, y - 6, x + width, y + 6, 0, 1, interpolation=None)
    write(axes, x + width + 6, y, after, SMALL, ha="left")
