"""What the model receives: a sequence of tokens, drawn as boxes that say of which kind each is."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Real

from minivlm.course.viz.figure import Figure, from_figure
from minivlm.course.viz.style import (
    BODY,
    GRAY,
    INK,
    KINDS,
    SMALL,
    WIDTH,
    box,
    count,
    fit,
    listed,
    sheet,
    styled,
    text_width,
    tint,
    visible,
    write,
    write_title,
)

MARGIN = 50.0  # pixels to the left of the boxes
COLLAPSE = 6  # a run of that many equal image or padding tokens is drawn as one box


@dataclass(frozen=True)
class Token:
    """One token: its text, its kind (a key of ``KINDS``), and where known its id and its label for the loss."""

    text: str
    kind: str
    id: int | None = None
    label: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"The kind of a token is {self.kind!r}; it must be one of {listed(list(KINDS), len(KINDS))}."
            )


@dataclass(frozen=True)
class Run:
    """Equal neighbors that are drawn as one: tokens start … stop − 1 of the sequence."""

    token: Token
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def text(self) -> str:
        """`<image> × 49`, or the token's own text with whitespace shown."""
        return visible(self.token.text) + (f" × {self.length}" if self.length > 1 else "")


def read_tokens(batch: Mapping, processor, row: int = 0) -> list[Token]:
    """One row of what the processor returned, as tokens with their kinds.

    Args:
        batch: input_ids [B, T], and where present attention_mask, token_type_ids and labels [B, T].
        processor: the processor that made it.

    Raises:
        ValueError: there is no such row.
    """
    if "input_ids" not in batch or not 0 <= row < len(batch["input_ids"]):
        raise ValueError(f"The batch holds no row {row} of input_ids: give what the processor returns.")
    ids = [int(i) for i in batch["input_ids"][row]]
    seen, types, labels = (
        [int(v) for v in batch[name][row]] if name in batch else [None] * len(ids)
        for name in ("attention_mask", "token_type_ids", "labels")
    )
    texts = [(processor.tokenizer.id_to_token(i) or f"?{i}").replace("▁", " ") for i in ids]
    kinds = [kind_of(*token, processor) for token in zip(ids, texts, seen, types, strict=True)]
    return [Token(*token) for token in zip(texts, kinds, ids, labels, strict=True)]


def kind_of(index: int, text: str, seen: int | None, type_id: int | None, processor) -> str:
    """Padding by the attention mask, the special tokens by their ids, the rest by the token type."""
    if seen == 0 or (seen is None and index == processor.pad_token_id):
        return "padding"
    special = {
        processor.image_token_id: "image",
        processor.bos_token_id: "bos",
        processor.eos_token_id: "eos",
    }
    if index in special:
        return special[index]
    if pointing := re.fullmatch(r"<(loc|seg)\d+>", text):
        return pointing[1]
    if type_id == 1:
        return "suffix"
    return "newline" if text == "\n" else "prefix"


def runs(tokens: Sequence[Token]) -> list[Run]:
    """The sequence with long runs of image and padding tokens collapsed."""
    found = []
    start = 0
    for token, group in groupby(tokens):
        stop = start + len(list(group))
        whole = token.kind in ("image", "padding") and stop - start >= COLLAPSE
        found += [Run(token, start, stop)] if whole else [Run(token, i, i + 1) for i in range(start, stop)]
        start = stop
    return found


@styled
def token_strip(tokens, processor=None, title: str | None = None) -> Figure:
    """Sequences as strips of boxes: the text of each token, above it the kind, below it the id and the label.

    Whitespace shows as ␣ and ↵, and long runs of image and padding tokens as one box that says how many. Under a
    label of −100, which the loss skips, stands a dash.

    Args:
        tokens: what the processor returned, with the processor; or Tokens of one sequence, or lists of them.
        title: a line above.

    Raises:
        ValueError: no token at all, or a batch without its processor.
    """
    sequences = as_sequences(tokens, processor)
    strips = [layout(runs(sequence)) for sequence in sequences]
    labeled = any(token.label is not None for sequence in sequences for token in sequence)
    named = any(token.id is not None for sequence in sequences for token in sequence)
    line = 64 + 18 * named + 18 * labeled
    top = 40 if title else 0
    figure, axes = sheet(top + sum(len(strip) * line + 12 for strip in strips) + 4)
    y = write_title(axes, title)
    for i, strip in enumerate(strips):
        for j, boxes in enumerate(strip):
            if len(strips) > 1 and j == 0:
                write(axes, 8, y + 44, f"row {i}", SMALL, GRAY, ha="left", fontweight="bold")
            if named:
                write(axes, 8, y + 69, "id", SMALL, GRAY, ha="left")
            if labeled:
                write(axes, 8, y + 86, "label", SMALL, GRAY, ha="left")
            draw_line(axes, boxes, y, labeled)
            y += line
        y += 12
    return from_figure(figure, " ".join(describe_rows(sequences)))


def as_sequences(tokens, processor) -> list[list[Token]]:
    if isinstance(tokens, Mapping):
        if processor is None:
            raise ValueError("The ids of a batch have no names without a tokenizer: give the processor too.")
        return [read_tokens(tokens, processor, row) for row in range(len(tokens["input_ids"]))]
    sequences = [tokens] if len(tokens) and isinstance(tokens[0], Token) else list(tokens)
    if not sequences or not all(len(s) and all(isinstance(t, Token) for t in s) for s in sequences):
        raise ValueError("A token strip needs a batch of the processor, or lists of Tokens that are not empty.")
    return [list(sequence) for sequence in sequences]


def layout(found: list[Run]) -> list[list[tuple[Real, Real, Run]]]:
    """Lines of (x0, x1, run). A group of one kind is at least as wide as the name of the kind, which stands above."""
    lines, x = [[]], MARGIN
    for kind, group in groupby(found, lambda run: run.token.kind):
        group = list(group)
        widths = [max(30, text_width(run.text, BODY) + 14, text_width(id_text(run), SMALL) + 8) for run in group]
        widths[-1] += max(0, text_width(kind, SMALL) + 8 - sum(widths))
        for run, width in zip(group, widths, strict=True):
            width = min(width, WIDTH - MARGIN - 8)
            if x + width > WIDTH - 8:
                lines.append([])
                x = MARGIN
            lines[-1].append((x, x + width, run))
            x += width
        x += 5
    return lines


def id_text(run: Run) -> str:
    return "" if run.token.id is None else str(run.token.id)


def draw_line(axes, boxes: list[tuple[Real, Real, Run]], y: Real, labeled: bool) -> None:
    """Bars with the kinds, then the boxes, then ids and labels."""
    for kind, group in groupby(boxes, lambda entry: entry[2].token.kind):
        group = list(group)
        x0, x1 = group[0][0], group[-1][1]
        box(axes, x0 + 1, y + 22, x1 - 1, y + 27, KINDS[kind][0], "none", linewidth=0)
        if text_width(kind, SMALL) <= x1 - x0 + 4:  # a line may end right after a group began
            write(axes, (x0 + x1) / 2, y + 12, kind, SMALL, INK)
    for x0, x1, run in boxes:
        color, hatch = KINDS[run.token.kind]
        if run.length > 1:
            box(axes, x0 + 5, y + 27, x1 + 1, y + 55, tint(color, 0.5), color)
        box(axes, x0 + 1, y + 30, x1 - 1, y + 58, tint(color, 0.25), color, linewidth=1.4)
        if hatch:
            box(axes, x0 + 1, y + 30, x1 - 1, y + 58, "none", tint(color, 0.6), hatch=hatch, linewidth=0)
            half = text_width(run.text, BODY) / 2 + 3
            box(axes, (x0 + x1) / 2 - half, y + 35, (x0 + x1) / 2 + half, y + 53, tint(color, 0.25), "none")
        write(axes, (x0 + x1) / 2, y + 44, fit(run.text, x1 - x0 - 8, BODY), BODY)
        write(axes, (x0 + x1) / 2, y + 69, id_text(run), SMALL, GRAY)
        if labeled and run.token.label is not None:
            learned = run.token.label >= 0
            text = str(run.token.label) if learned else "–"
            write(axes, (x0 + x1) / 2, y + 86, text, SMALL, fontweight="bold" if learned else "normal")


def describe_rows(sequences: list[list[Token]]) -> Iterator[str]:
    """Alt text: each sequence in words, kind by kind."""
    for i, sequence in enumerate(sequences):
        parts = []
        for kind, group in groupby(sequence, lambda token: token.kind):
            group = list(group)
            same = len({token.text for token in group}) == 1
            if kind in ("image", "padding") or (len(group) > 1 and same):
                parts.append(f"{len(group)} × {group[0].text}")
            else:
                parts.append(f"{kind} “{''.join(visible(t.text).replace('␣', ' ') for t in group)}”")
        head = f"Row {i}" if len(sequences) > 1 else "A sequence"
        learned = sum(token.label is not None and token.label >= 0 for token in sequence)
        loss = f" The loss is on {count(learned, 'token')}." if any(t.label is not None for t in sequence) else ""
        yield f"{head} of {count(len(sequence), 'token')}: {', '.join(parts)}.{loss}"
