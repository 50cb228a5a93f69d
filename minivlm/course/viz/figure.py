"""A picture with its description, which notebooks show and files keep."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


@dataclass(frozen=True)
class Figure:
    """An RGB image and its alt text: what someone who cannot see it should be told."""

    image: Image.Image
    alt: str

    def png(self) -> bytes:
        """The bytes of a PNG file, with the alt text as its description."""
        description = PngInfo()
        description.add_itxt("Description", self.alt)
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", pnginfo=description)
        return buffer.getvalue()

    def save(self, path: str | Path) -> None:
        """Writes a PNG file, and the folder it goes into. ValueError for a name that ends otherwise."""
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise ValueError(f"Pictures are written as PNG, so {str(path)!r} must end in .png.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.png())

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """What a notebook keeps: the PNG itself, and words for those who cannot see it."""
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}


def from_figure(figure, alt: str) -> Figure:
    """A ``matplotlib.figure.Figure``, made without pyplot, as a picture. ValueError without words for it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if not alt.strip():
        raise ValueError("The alt text is empty: say what the figure shows to someone who cannot see it.")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Figure(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), alt)
