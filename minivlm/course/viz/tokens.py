"""What the model receives: a sequence of tokens, drawn as boxes in the colors of their kinds."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from numbers import Integral, Real

from minivlm.course.viz.drawing import rectangle, sheet, styled, write
from minivlm.course.viz.figure import Figure, from_figure
from minivlm.course.viz.style import BODY, GRAY, INK, KINDS, SMALL, WIDTH, tint
from minivlm.course.viz.text import count, fit, listed, readable, text_width, visible

MARGIN, GAP = 50.0, 5.0  # pixels to the left of the boxes, and between boxes of different kinds
COLLAPSE = 6  # a run of at least this many equal image or padding tokens is drawn as one box


@dataclass(frozen=True)
class Token:
    """One token of a sequence.

    Attributes:
        text: The token as text.
        kind: A key of ``KINDS``.
        id: Its token id, if known.
        label: Its label for the loss, if known. The loss skips −100.

    Raises:
        ValueError: If the kind is unknown.
    """

    text: str
    kind: str
    id: int | None = None
    label: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"The kind of a token must be one of {listed(KINDS, len(KINDS))}, not {self.kind!r}.")


@dataclass(frozen=True)
class Run:
    """Equal neighbors that are drawn as one box: tokens ``start`` to ``stop`` − 1 of the sequence."""

    token: Token
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def text(self) -> str:
        """``<image> × 49``, or the token's own text with visible whitespace."""
        return visible(self.token.text) + (f" × {self.length}" if self.length > 1 else "")


def read_tokens(batch: Mapping, processor, row: int = 0) -> list[Token]:
    """One row of the processor's output as Tokens with their kinds.

    Args:
        batch: input_ids [B, T] and, if present, attention_mask, token_type_ids and labels [B, T].
        processor: The processor that made it.

    Raises:
        ValueError: If the batch has no such row.
    """
    if "input_ids" not in batch or not 0 <= row < len(batch["input_ids"]):
        raise ValueError(f"The batch has no row {row} of input_ids. Pass what the processor returned.")
    ids = [int(i) for i in batch["input_ids"][row]]
    attended, types, labels = (
        [int(v) for v in batch[name][row]] if name in batch else [None] * len(ids)
        for name in ("attention_mask", "token_type_ids", "labels")
    )
    texts = [token_text(i, processor) for i in ids]
    kinds = [kind_of(*token, processor) for token in zip(ids, texts, attended, types, strict=True)]
    return [Token(*token) for token in zip(texts, kinds, ids, labels, strict=True)]


def token_text(index: Integral, processor) -> str:
    """A token id as text, or ``#300`` if the embedding table is longer than the vocabulary."""
    text = processor.tokenizer.id_to_token(int(index))
    return f"#{index}" if text is None else text.replace("▁", " ")


def kind_of(index: int, text: str, attended: int | None, type_id: int | None, processor) -> str:
    """Padding by the attention mask, special tokens by their ids, the others by their token type."""
    if attended == 0 or (attended is None and index == processor.pad_token_id):
        return "padding"
    special = {
        processor.image_token_id: "image",
        processor.bos_token_id: "bos",
        processor.eos_token_id: "eos",
    }
    if index in special:
        return special[index]
    if location := re.fullmatch(r"<(loc|seg)\d+>", text):
        return location[1]
    if type_id == 1:
        return "suffix"
    return "newline" if text == "\n" else "prefix"


def stretches(items: Iterable, key: Callable | None = None) -> Iterator[tuple]:
    """Neighbors with the same key, as (key, start, stop)."""
    start = 0
    for value, group in groupby(items, key):
        stop = start + len(list(group))
        yield value, start, stop
        start = stop


def runs(tokens: Sequence[Token]) -> list[Run]:
    """The sequence with long runs of image and padding tokens collapsed."""
    found = []
    for token, start, stop in stretches(tokens):
        collapse = token.kind in ("image", "padding") and stop - start >= COLLAPSE
        found += [Run(token, start, stop)] if collapse else [Run(token, i, i + 1) for i in range(start, stop)]
    return found


@styled
def token_strip(tokens, processor=None, title: str | None = None) -> Figure:
    """Sequences as strips of boxes with the text of each token, above it the kind, below it the id and the label.

    Whitespace shows as ␣ and ↵. A long run of image or padding tokens is one box that says how many there are. A dash
    in place of a label means that the loss skips this token (its label is −100). A column of the batch is at the same x
    in every row, so a long run is as wide as the tokens of the other rows in its columns.

    Args:
        tokens: What the processor returned (then pass the processor too), Tokens of one sequence, or lists of them.
        title: A line above.

    Raises:
        ValueError: If there are no tokens, or the processor of a batch is missing.
    """
    sequences = as_sequences(tokens, processor)
    lines = [[strip for strip in enumerate(line) if strip[1]] for line in layout([runs(s) for s in sequences])]
    has_labels = any(token.label is not None for sequence in sequences for token in sequence)
    has_ids = any(token.id is not None for sequence in sequences for token in sequence)
    height = 64 + 18 * has_ids + 18 * has_labels
    figure, axes, y = sheet(sum(len(line) * height + 12 for line in lines) + 4, title, margin=0)
    for line in lines:
        for row, boxes in line:
            if len(sequences) > 1:
                write(axes, 8, y + 44, f"row {row}", SMALL, GRAY, ha="left", fontweight="bold")
            if has_ids:
                write(axes, 8, y + 69, "id", SMALL, GRAY, ha="left")
            if has_labels:
                write(axes, 8, y + 86, "label", SMALL, GRAY, ha="left")
            draw_line(axes, boxes, y, has_labels)
            y += height
        y += 12
    return from_figure(figure, " ".join(describe_rows(sequences)))


def as_sequences(tokens, processor) -> list[list[Token]]:
    """Converts any input of ``token_strip`` to lists of Tokens."""
    if isinstance(tokens, Mapping):
        if processor is None:
            raise ValueError("Token ids need a tokenizer to be shown as text. Pass the processor too.")
        return [read_tokens(tokens, processor, row) for row in range(len(tokens["input_ids"]))]
    sequences = [tokens] if len(tokens) and isinstance(tokens[0], Token) else list(tokens)
    if not sequences or not all(len(s) and all(isinstance(t, Token) for t in s) for s in sequences):
        raise ValueError("A token strip needs a batch from the processor, or lists of Tokens that are not empty.")
    return [list(sequence) for sequence in sequences]


Box = tuple[Real, Real, Run]  # x0, x1 and what is in it


def layout(rows: list[list[Run]]) -> list[list[list[Box]]]:
    """Lines, each with the boxes of every row. Equal positions in the sequence are at equal x."""
    edges = sorted({edge for row in rows for run in row for edge in (run.start, run.stop)})
    whole = set.intersection(*({run.stop for run in row if run.stop < edges[-1]} | {edges[-1]} for row in rows))
    lines, start = [], 0
    while start < edges[-1]:
        x = place([clip(row, start, edges[-1]) for row in rows], [edge for edge in edges if edge >= start])
        fitting = [edge for edge in x if edge > start and x[edge] <= WIDTH - 8]
        stop = max(whole.intersection(fitting) or fitting or [edges[edges.index(start) + 1]])
        clipped = [clip(row, start, stop) for row in rows]
        lines.append([list(boxes(row, x)) for row in clipped])
        start = stop
    return lines


def clip(row: list[Run], start: int, stop: int) -> list[Run]:
    """The part of a row between two edges. A run that crosses one of them is cut there."""
    cut = [Run(run.token, max(run.start, start), min(run.stop, stop)) for run in row]
    return [run for run in cut if run.start < run.stop]


def place(rows: list[list[Run]], edges: list[int]) -> dict[int, Real]:
    """The x of every edge: as far left as the texts in the boxes and the names of the kinds above them allow."""
    widths = {}
    for row in rows:
        for kind, i, j in stretches(row, lambda run: run.token.kind):
            gap = GAP if j < len(row) else 0
            texts = [((row[i].start, row[j - 1].stop), text_width(kind, SMALL) + 8 + gap)]
            for run in row[i:j]:
                width = max(30, text_width(run.text, BODY) + 14, text_width(id_text(run), SMALL) + 8)
                texts.append(
                    ((run.start, run.stop), min(width, WIDTH - MARGIN - 8) + (gap if run is row[j - 1] else 0))
                )
            for span, width in texts:
                widths[span] = max(width, widths.get(span, 0))
    x = {edges[0]: MARGIN}
    for before, edge in pairwise(edges):
        x[edge] = max([x[before], *(x[start] + width for (start, stop), width in widths.items() if stop == edge)])
    return x


def boxes(row: list[Run], x: Mapping[int, Real]) -> Iterator[Box]:
    """A row's boxes, with a gap after the last one of a kind."""
    for _, i, j in stretches(row, lambda run: run.token.kind):
        for k in range(i, j):
            gap = GAP if k == j - 1 and j < len(row) else 0
            yield x[row[k].start], x[row[k].stop] - gap, row[k]


def id_text(run: Run) -> str:
    return "" if run.token.id is None else str(run.token.id)


def draw_line(axes, boxes: list[Box], y: Real, has_labels: bool) -> None:
    """Bars in the colors of the kinds, then the boxes, then ids and labels."""
    for kind, start, stop in stretches(boxes, lambda box: box[2].token.kind):
        x0, x1 = boxes[start][0], boxes[stop - 1][1]
        rectangle(axes, x0 + 1, y + 22, x1 - 1, y + 27, KINDS[kind][0], "none", linewidth=0)
        if text_width(kind, SMALL) <= x1 - x0 + 4:  # not if the line breaks inside the group
            write(axes, (x0 + x1) / 2, y + 12, kind, SMALL, INK)
    for x0, x1, run in boxes:
        color, hatch = KINDS[run.token.kind]
        middle = (x0 + x1) / 2
        if run.length > 1:
            rectangle(axes, x0 + 5, y + 27, x1 + 1, y + 55, tint(color, 0.5), color)
        rectangle(axes, x0 + 1, y + 30, x1 - 1, y + 58, tint(color, 0.25), color, linewidth=1.4)
        if hatch:
            rectangle(axes, x0 + 1, y + 30, x1 - 1, y + 58, "none", tint(color, 0.6), hatch=hatch, linewidth=0)
            half = text_width(run.text, BODY) / 2 + 3
            rectangle(axes, middle - half, y + 35, middle + half, y + 53, tint(color, 0.25), "none")
        write(axes, middle, y + 44, fit(run.text, x1 - x0 - 8, BODY), BODY)
        write(axes, middle, y + 69, id_text(run), SMALL, GRAY)
        if has_labels and run.token.label is not None:
            in_loss = run.token.label >= 0
            text = str(run.token.label) if in_loss else "–"
            write(axes, middle, y + 86, text, SMALL, fontweight="bold" if in_loss else "normal")


def describe_rows(sequences: list[list[Token]]) -> Iterator[str]:
    """Alt text: each sequence, kind by kind."""
    for i, sequence in enumerate(sequences):
        parts = []
        for kind, start, stop in stretches(sequence, lambda token: token.kind):
            texts = [token.text for token in sequence[start:stop]]
            if kind in ("image", "padding") or (len(texts) > 1 and len(set(texts)) == 1):
                parts.append(f"{len(texts)} × {texts[0]}")
            else:
                parts.append(f"{kind} “{''.join(map(readable, texts))}”")
        head = f"Row {i}" if len(sequences) > 1 else "A sequence"
        labels = [token.label for token in sequence if token.label is not None]
        loss = f" The loss is on {count(sum(label >= 0 for label in labels), 'token')}." if labels else ""
        yield f"{head} of {count(len(sequence), 'token')}: {', '.join(parts)}.{loss}"
