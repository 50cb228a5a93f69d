"""An image together with its alt text, for notebooks and files."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minivlm.hub import write_atomically


@dataclass(frozen=True)
class Figure:
    """An RGB image and its alt text, which tells someone who cannot see the image what it shows."""

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
        """Writes a PNG file and creates its folder.

        Raises:
            ValueError: If the name does not end in .png.
        """
        with write_atomically(output_path(path, ".png")) as part:
            part.write_bytes(self.png())

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """What a notebook saves: the PNG, with the alt text as its plain text and in its metadata."""
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}


def from_figure(figure, alt: str) -> Figure:
    """Renders a ``matplotlib.figure.Figure`` that was made without pyplot.

    Raises:
        ValueError: If the alt text is empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if not alt.strip():
        raise ValueError("The alt text is empty. Say what the figure shows, for someone who cannot see it.")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Figure(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), alt)


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
