"""What a tensor trace consists of: tensors, and what each of them is."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minivlm.course.viz.figure import Figure
from minivlm.course.viz.text import number, percent


@dataclass(frozen=True)
class Step:
    """One step of the forward pass, known before it is computed.

    Attributes:
        name: Dotted path, such as ``language_model.model.layers.0.self_attn``.
        title: What the tensor is, in a few words.
        letters: Its axes, such as "B P D".
        stage: The part of the model, such as "Vision tower".
        layer: Index of the layer within the stage, None outside layers.
        module: The module of the package that computes it.
        chapter: The chapter that explains it.
    """

    name: str
    title: str
    letters: str
    stage: str
    layer: int | None = None
    module: str = "minivlm.gemma"
    chapter: int = 6

    @property
    def label(self) -> str:
        """The last part of the name, or "output" for the output of a layer. A tree shows the other parts."""
        last = self.name.rsplit(".", 1)[-1]
        return "output" if last.isdigit() else last


@dataclass(frozen=True)
class Statistics:
    """Statistics of the finite numbers of a tensor, NaN if there are none.

    Attributes:
        mean: Of a mask: the share of allowed pairs.
        std: Population standard deviation.
        broken: The share of numbers that are NaN or infinite, from 0 to 1.
    """

    min: float
    max: float
    mean: float
    std: float
    broken: float

    @classmethod
    def of(cls, tensor: Tensor) -> "Statistics":
        """Computes them in float32."""
        values = tensor.float()
        finite = values[values.isfinite()]
        broken = 1 - len(finite) / values.numel()
        if not len(finite):
            return cls(*[float("nan")] * 4, broken)
        std, mean = torch.std_mean(finite, correction=0)
        return cls(finite.min().item(), finite.max().item(), mean.item(), std.item(), broken)


@dataclass(frozen=True)
class Drawing:
    """A figure of a tensor.

    Attributes:
        caption: How to read it.
        cells: What a page needs to read the numbers back from the figure, whose pixels are cells. None if they are not.
    """

    figure: Figure
    caption: str
    cells: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Entry:
    """One recorded tensor, on the CPU and in its own dtype."""

    step: Step
    tensor: Tensor
    stats: Statistics
    drawing: Drawing

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def title(self) -> str:
        return self.step.title

    @property
    def figure(self) -> Figure:
        return self.drawing.figure

    @property
    def caption(self) -> str:
        return self.drawing.caption

    @property
    def drawings(self) -> list[tuple[str, Drawing]]:
        """What a page shows, each with a heading."""
        return [("", self.drawing)]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def size(self) -> str:
        """``1 × 49 × 192``, which a tree shows beside the label."""
        return " × ".join(map(str, self.shape))

    @property
    def dtype(self) -> str:
        """Such as "float32"."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def shape_text(self) -> str:
        """``B P D = 1 × 49 × 192``."""
        return f"{self.step.letters} = {self.size}"

    @property
    def range(self) -> str:
        return f"{number(self.stats.min)} … {number(self.stats.max)}"

    @property
    def line(self) -> str:
        """What a tree of plain text shows beside the label: shape, dtype, range."""
        broken = f", {percent(self.stats.broken)} NaN or infinite" if self.stats.broken else ""
        return f"{self.shape_text:<24} {self.dtype:<8} {self.range}{broken}"

    @property
    def facts(self) -> dict[str, str]:
        """The rows of a page's table."""
        s = self.stats
        return {
            "shape": self.shape_text,
            "dtype": self.dtype,
            "range": self.range,
            "mean ± std": f"{number(s.mean)} ± {number(s.std)}",
            "NaN or infinite": percent(s.broken) if s.broken else "none",
        }

    def __repr__(self) -> str:
        s = self.stats
        return (
            f"{self.name}: {self.title}; {self.shape_text}, {self.dtype}, {self.range}, mean {number(s.mean)}, "
            f"std {number(s.std)}, {percent(s.broken)} NaN or infinite; {self.step.module}, "
            f"chapter {self.step.chapter:02d}"
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """The enlarged figure, and the line of text."""
        image = self.figure.image.resize(self.figure.size, Image.Resampling.NEAREST)
        data, metadata = Figure(image, self.figure.alt)._repr_mimebundle_()
        return data | {"text/plain": repr(self)}, metadata


def tree(entries: Sequence) -> list[tuple[str, list]]:
    """[(stage, [entry, …, (layer, [entry, …]), …]), …], with layers such as "layer 3"."""
    stages = []
    for stage, in_stage in groupby(entries, lambda entry: entry.step.stage):
        branches = []
        for layer, in_layer in groupby(in_stage, lambda entry: entry.step.layer):
            found = list(in_layer)
            branches += found if layer is None else [(f"layer {layer}", found)]
        stages.append((stage, branches))
    return stages
