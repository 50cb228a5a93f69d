"""Two traces compared, tensor by tensor: the first tensor that differs is where a bug begins."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm.course.viz import trace_figures, trace_page
from minivlm.course.viz.figure import Figure
from minivlm.course.viz.text import count, number, percent
from minivlm.course.viz.trace_data import Drawing, Entry, Step
from minivlm.course.viz.traced import Traced

TOLERANCE = 1e-5
SIDE = 32  # cells of each of the three figures: a page has many


@dataclass(frozen=True, eq=False)
class Pair:
    """One tensor of two runs.

    Attributes:
        this: The tensor of the first run.
        other: That of the other run, None if it has none of this name.
        tolerance: Differences up to this share of the largest value count as rounding.
    """

    this: Entry
    other: Entry | None
    tolerance: float

    @property
    def step(self) -> Step:
        return self.this.step

    @property
    def can_be_subtracted(self) -> bool:
        return self.other is not None and self.other.shape == self.this.shape

    @cached_property
    def tensor(self) -> Tensor:
        """``|other − this|``, 0 where both are NaN or equally infinite. Of masks: where they differ.

        Raises:
            ValueError: If the shapes differ, or the other run has no such tensor.
        """
        if not self.can_be_subtracted:
            raise ValueError(f"{self.step.name} {self.sentence}, so there is no difference.")
        a, b = self.this.tensor, self.other.tensor
        if a.dtype == torch.bool:
            return a ^ b
        a, b = a.float(), b.float()
        return (b - a).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0)

    @cached_property
    def largest(self) -> float:
        """The largest difference. Of masks: the number of pairs. NaN if only one is NaN, infinite without a tensor."""
        if not self.can_be_subtracted:
            return math.inf
        return float(self.tensor.sum() if self.tensor.dtype == torch.bool else self.tensor.max())

    @cached_property
    def share(self) -> float:
        """``largest`` as a share of the largest value. Of masks: the share of all pairs."""
        if self.largest == 0 or not math.isfinite(self.largest):
            return self.largest
        if self.this.tensor.dtype == torch.bool:
            return self.largest / self.this.tensor.numel()
        scale = max(abs(end) for entry in (self.this, self.other) for end in (entry.stats.min, entry.stats.max))
        return self.largest / scale

    @property
    def differs(self) -> bool:
        return not self.share <= self.tolerance  # NaN differs

    @property
    def sentence(self) -> str:
        """What became of the tensor, without a subject."""
        if self.other is None:
            return "is missing in the other run"
        if not self.can_be_subtracted:
            return f"has the shape {self.this.size} in this run and {self.other.size} in the other"
        if not self.differs:
            return "is equal in both runs"
        if self.this.tensor.dtype == torch.bool:
            return f"differs in {count(int(self.largest), 'pair')} ({percent(self.share)} of all)"
        if not math.isfinite(self.largest):
            return "has NaN or infinity in one run only"
        return f"differs by up to {number(self.largest)}, which is {percent(self.share)} of its largest value"

    @property
    def size(self) -> str:
        """What a tree shows beside the label."""
        if not self.differs:
            return "equal"
        return f"≠ {percent(self.share)}" if math.isfinite(self.share) else "≠"

    @property
    def shape_text(self) -> str:
        return self.this.shape_text

    @property
    def line(self) -> str:
        return f"{self.shape_text:<24} {self.sentence}"

    @property
    def facts(self) -> dict[str, str]:
        return {"shape": self.shape_text, "difference": self.sentence.removeprefix("differs ")}

    @property
    def figure(self) -> Figure:
        """The difference, dark where both are equal. If there is none, this run's tensor."""
        drawing = self.difference if self.can_be_subtracted else self.draw(self.this)
        return drawing.figure

    @cached_property
    def difference(self) -> Drawing:
        """The tensor ``|other − this|``."""
        drawing = trace_figures.heat_map(self.step, self.tensor, SIDE)
        alt = f"The difference of two runs: {self.step.name} {self.sentence}."
        by = f" by {number(self.largest)}" if self.largest and self.tensor.dtype != torch.bool else ""
        return replace(drawing, figure=replace(drawing.figure, alt=alt), caption=f"Dark: equal, light: different{by}.")

    @property
    def drawings(self) -> list[tuple[str, Drawing]]:
        """What a page shows: this run, the other one, and the difference. Of equal tensors, just that."""
        if not self.differs:
            return [("difference", self.difference)]
        shown = [("this run", self.draw(self.this))]
        if self.other is not None:
            shown.append(("other run", self.draw(self.other)))
        return [*shown, ("difference", self.difference)] if self.can_be_subtracted else shown

    def draw(self, entry: Entry) -> Drawing:
        """The tensor of one run, in the colors of both."""
        if entry.drawing.cells is None:
            return entry.drawing
        entries = [e for e in (self.this, self.other) if e is not None]
        together = torch.cat([trace_figures.cells_of(e.tensor, SIDE).float().flatten() for e in entries])
        drawing = trace_figures.heat_map(self.step, entry.tensor, SIDE, trace_figures.knots_of(together))
        return replace(drawing, caption="") if self.can_be_subtracted else drawing  # or that of the difference does


class Diff(Traced):
    """Two traces compared, in the order of computation.

    ``diff["logits"]`` is a pair of entries, ``diff.tensor("logits")`` is ``|other − this|``. A notebook shows both runs
    and the difference, beginning with the first tensor that differs.

    Attributes:
        first: The name of the first tensor that differs, None if the runs are equal.
        message: That in one sentence, and by how much it differs.
        entries: A pair for each tensor of this run.
    """

    def __init__(self, this: Traced, other: Traced, tolerance: float):
        self.this, self.other = this, other
        found = {entry.name: entry for entry in other}
        self.entries = [Pair(entry, found.get(entry.name), tolerance) for entry in this]
        differing = [pair for pair in self.entries if pair.differs]
        self.first = differing[0].step.name if differing else None
        if not differing:
            self.title = f"The two runs are equal in all {len(self)} tensors"
            self.message = f"{self.title}: no difference is above {number(tolerance)} of a tensor's largest value."
            return
        self.title = f"{len(differing)} of {len(self)} tensors differ between two runs"
        self.message = f"The first tensor that differs is {self.first}: it {differing[0].sentence}."
        if differing[0].other is not None and not differing[0].can_be_subtracted:
            self.message += " Such tensors cannot be subtracted: compare prompts with equally many tokens."

    @cached_property
    def overview(self) -> Figure:
        """All differences on one sheet."""
        return trace_figures.overview(self.title, self.this.tokens, self.entries, self.message)

    def html(self, folder: Path) -> str:
        """The tree to step through. Its links start from the folder."""
        runs = {"this run": self.this, "other run": self.other}
        tokens = "<br>".join(f"{name}: <code>{escape(run.tokens)}</code>" for name, run in runs.items())
        notes = [escape(self.message), f'<span class="muted">{tokens}</span>']
        first = self.names.index(self.first) if self.first else 0
        settings: dict[str, Any] = self.this.page_settings | {"first": first}
        return trace_page.as_html(self.title, notes, self.entries, self.overview, settings, folder, variable="diff")

    def __repr__(self) -> str:
        return trace_page.as_text(self.message, self.entries)
