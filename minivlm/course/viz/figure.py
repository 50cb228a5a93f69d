"""An image together with its alt text, for notebooks and files."""

import base64
import html
import io
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minivlm.hub import write_atomically

SHARP = 2  # pixels of a figure per CSS pixel of a page, which is what most screens have
# On a dark page, a figure is a white card. The height follows when a narrow page limits the width.
CARD = "max-width: 100%; height: auto; background: white; border-radius: 4px"


@dataclass(frozen=True)
class Figure:
    """An RGB image and its alt text, which tells someone who cannot see the image what it shows.

    Attributes:
        image: The image.
        alt: The alt text.
        scale: Pixels of the image per CSS pixel of a page: 2 is sharp on most screens.
    """

    image: Image.Image
    alt: str
    scale: Real = 1

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on a page, in CSS pixels."""
        return round(self.image.width / self.scale), round(self.image.height / self.scale)

    def png(self) -> bytes:
        """The bytes of a PNG file, with the alt text as its description."""
        return as_png(self.image, self.alt)

    def html(self) -> str:
        """An ``<img>`` with the alt text, at most as wide as the page. Renderers drop the alt text of image/png."""
        data, (width, height) = base64.b64encode(as_webp(self.image)).decode(), self.size
        size = f'width="{width}" height="{height}"'
        return f'<img alt="{html.escape(self.alt)}" {size} style="{CARD}" src="data:image/webp;base64,{data}">'

    def save(self, path: str | Path) -> None:
        """Writes a PNG file and creates its folder.

        Raises:
            ValueError: If the name does not end in .png.
        """
        with write_atomically(output_path(path, ".png")) as part:
            part.write_bytes(self.png())

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """What a notebook saves: HTML with alt text, and for paper a small PNG with 256 colors and no more pixels."""
        small = self.image if self.scale == 1 else self.image.resize(self.size, Image.Resampling.BOX)
        small = small.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        png = base64.b64encode(as_png(small, self.alt)).decode()
        return {"text/html": self.html(), "image/png": png, "text/plain": self.alt}, {"image/png": {"alt": self.alt}}


def as_webp(image: Image.Image) -> bytes:
    """The pixels exactly, or with JPEG-like loss where that takes less than half: in photos, but not in charts."""
    exact, lossy = io.BytesIO(), io.BytesIO()
    image.save(exact, "WEBP", lossless=True, quality=90)
    image.save(lossy, "WEBP", quality=90)
    return (lossy if 2 * lossy.tell() < exact.tell() else exact).getvalue()


def as_png(image: Image.Image, alt: str) -> bytes:
    """A PNG file with the alt text as its description."""
    description = PngInfo()
    description.add_itxt("Description", alt)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=description, optimize=image.mode == "P")
    return buffer.getvalue()


def from_figure(figure, alt: str) -> Figure:
    """Renders a ``matplotlib.figure.Figure``, sharp on screens with two pixels per CSS pixel.

    Raises:
        ValueError: If the alt text is empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if not alt.strip():
        raise ValueError("The alt text is empty. Say what the figure shows, for someone who cannot see it.")
    dpi = figure.dpi
    figure.set_dpi(dpi * SHARP)
    try:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Figure(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), alt, SHARP)
    finally:
        figure.set_dpi(dpi)


def output_path(path: str | Path, ending: str) -> Path:
    """Creates the folder of a file that will be written.

    Raises:
        ValueError: If the name of the file has another ending.
    """
    path = Path(path)
    if path.suffix.lower() != ending:
        raise ValueError(f"The file name {str(path)!r} must end in {ending}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
