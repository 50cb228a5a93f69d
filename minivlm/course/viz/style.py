"""How all figures look: colors, the font, and sizes in pixels of the finished image.

Sources: Okabe & Ito, "Color Universal Design" (the palette); WCAG 2, relative luminance (the color of text).
"""

from functools import cache
from numbers import Real
from pathlib import Path

import numpy as np
from PIL import ImageFont

# These can be told apart with every common kind of color blindness.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = PALETTE
INK, GRAY, LIGHT, PALE = "#222222", "#767676", "#C8C8C8", "#F2F2F2"
WIDTH, DPI = 800, 100
TITLE, BODY, SMALL = 16, 13, 11  # font sizes

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": BODY * 72 / DPI,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a caption is a dollar sign
    "axes.edgecolor": LIGHT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": TITLE * 72 / DPI,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#E8E8E8",
    "xtick.color": LIGHT,
    "ytick.color": LIGHT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "hatch.linewidth": 1.0,
}

# The kinds of tokens: a color, and a hatch if two kinds share a color.
KINDS = {
    "image": (SKY, None),
    "bos": (PURPLE, None),
    "prefix": (ORANGE, None),
    "newline": (YELLOW, None),
    "suffix": (GREEN, None),
    "eos": (VERMILION, None),
    "loc": (BLUE, None),
    "seg": (BLUE, "..."),
    "padding": (LIGHT, "////"),
    "text": (GRAY, None),
}


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has nearly every letter that a label may contain."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def rgb(color: str) -> tuple[int, ...]:
    """``"#rrggbb"`` as three integers from 0 to 255."""
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def tint(color: str, amount: Real) -> str:
    """Mixes the color with white: 1 leaves it as it is, 0 is white."""
    return "#" + "".join(f"{round(255 + amount * (c - 255)):02X}" for c in rgb(color))


def luminance(color: str | np.ndarray) -> float:
    """Relative luminance of ``"#rrggbb"`` or three fractions, from 0 to 1."""
    channels = [c / 255 for c in rgb(color)] if isinstance(color, str) else color
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def text_color(background: str | np.ndarray) -> str:
    """Black or white, whichever has more contrast. At luminance 0.179 both have the same."""
    return "#000000" if luminance(background) > 0.179 else "#FFFFFF"


def cividis(values: np.ndarray, low: Real, high: Real) -> np.ndarray:
    """Maps numbers to colors: three fractions each, in a new last axis."""
    import matplotlib

    return matplotlib.colormaps["cividis"]((values - low) / (high - low if high > low else 1))[..., :3]


def to_bytes(fractions: np.ndarray) -> np.ndarray:
    """Fractions from 0 to 1 as uint8 from 0 to 255."""
    return (255 * fractions).round().astype(np.uint8)
