"""The mask explorer: attention masks to change, to query and to predict, in a notebook or on a page of its own.

    T queries of the call, one per row · S keys in the cache, one per column · I items: tokens, or long runs of them
    L layers · H heads

The interactive part is explorer.js, one module without dependencies. Its masks equal those of ``explorer_mask``, cell
by cell. The tests compare the two in a browser.
"""

import base64
import html
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minivlm.course.viz.attention import attention_mask, attention_over_mask, compare_masks
from minivlm.course.viz.figure import Figure, output_path
from minivlm.course.viz.own_mask import call_mask, name_of, reference_mode, transformers_mask
from minivlm.course.viz.style import TITLE, WIDTH
from minivlm.course.viz.text import fit, listed, visible
from minivlm.course.viz.tokens import Token, read_tokens, stretches
from minivlm.course.viz.weights import decoder_attention
from minivlm.masks import attention_masks
from minivlm.paligemma import PaliGemma

MODES = {
    "causal": "causal",
    "prefix-lm": "prefix-LM",
    "bidirectional": "bidirectional",
    "sliding": "sliding window",
    "unmasked-padding": "unmasked padding",
}
OWN = "own"  # the mode that shows the function passed as ``mask``
LIMITS = {"image": (0, 1024), "prefix": (1, 16), "suffix": (0, 16), "padding": (0, 16)}
SEQUENCE = ("image", "prefix", "suffix", "padding", "side", "window", "call")  # what a mask function's result needs
SIDES, CALLS = ("left", "right"), ("prefill", "decode")
SMALL_WINDOW = 4  # the 4,096 of PaliGemma 2 would be longer than every sequence here
COLLAPSE = 12  # longer runs of image and padding tokens are one item
WIDGET = "application/vnd.jupyter.widget-view+json"
Texts = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Settings:
    """The state of the sliders and menus. ``explore`` explains each.

    Attributes:
        texts: The tokens of prefix and suffix, which then have these lengths.

    Raises:
        ValueError: If a number is outside its limits or a choice is unknown.
    """

    image: int = 4
    prefix: int = 4
    suffix: int = 3
    padding: int = 0
    side: str = "right"
    window: int = SMALL_WINDOW
    mode: str = "prefix-lm"
    call: str = "prefill"
    compare: str | None = None
    layer: int | None = None
    head: int | None = None
    texts: Texts | None = None

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            if self.texts and name in ("prefix", "suffix"):
                continue
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be a number of tokens from {low} to {high}, not {getattr(self, name)}.")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 (the token itself), not {self.window}.")
        modes = (*MODES, OWN)
        choices = {"mode": modes, "side": SIDES, "call": CALLS, "compare": (None, *modes)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {listed(map(repr, known))}, not {getattr(self, name)!r}.")
        if self.call == "decode" and self.suffix == 0:
            raise ValueError("A decode step needs a generated token. Use a suffix.")


def explorer_tokens(settings: Settings) -> list[Token]:
    """The S tokens. In a decode step, the padding of a right-padded prompt is before the answer, not after it."""
    last = settings.prefix - 1
    prefix = ["<bos>" if i == 0 else "\\n" if i == last else f"pre {i}" for i in range(settings.prefix)]
    suffix = [f"suf {i + 1}" for i in range(settings.suffix)]
    prefix, suffix = settings.texts or (prefix, suffix)
    prompt = [Token("<image>", "image")] * settings.image + [Token(text, "prefix") for text in prefix]
    answer = [Token(text, "suffix") for text in suffix]
    padding = [Token("<pad>", "padding")] * settings.padding
    if settings.side == "left":
        return padding + prompt + answer
    return prompt + padding + answer if settings.call == "decode" else prompt + answer + padding


def explorer_mask(settings: Settings, function: Callable | None = None) -> Bool[Tensor, "T S"]:
    """The mask of one sequence, from ``minivlm.masks.attention_masks``. T is S, or 1 for a decode step.

    A new block starts at every token (causal), nowhere (bidirectional), or at every suffix token (the other modes).
    "sliding" adds a window. "unmasked-padding" treats padding as real tokens. "own" calls the function.

    Raises:
        ValueError: In mode "own", if the function does not return a mask.
    """
    tokens = explorer_tokens(settings)
    kinds = [token.kind for token in tokens]
    S = len(kinds)
    queries = 1 if settings.call == "decode" else S
    if settings.mode == OWN:
        return call_mask(function, tokens, settings.window)[-queries:]
    real = torch.tensor([[settings.mode == "unmasked-padding" or kind != "padding" for kind in kinds]]).long()
    starts = torch.tensor([[kind == "suffix" for kind in kinds]]).long()
    starts = {"causal": torch.ones_like(starts), "bidirectional": torch.zeros_like(starts)}.get(settings.mode, starts)
    window = settings.window if settings.mode == "sliding" else None
    _, mask = attention_masks(real, starts, queries, window)
    return torch.ones(queries, S, dtype=torch.bool) if mask is None else mask[0]


# --- what is explored ---------------------------------------------------------------------------------------------


def explore(
    processor=None,
    image=None,
    prefix: int | str | None = None,
    suffix: int | str | None = None,
    *,
    image_tokens: int | None = None,
    padding: int = 0,
    padding_side: str = "right",
    window: int | None = None,
    mode: str | None = None,
    compare: str | None = None,
    call: str = "prefill",
    mask: Callable | None = None,
    model=None,
    layer: int | None = 0,
    head: int | None = None,
) -> "MaskExplorer":
    """An explorer that starts with this sequence and lets the learner change everything.

        viz.explore()                                                          # a sequence of numbered tokens
        viz.explore(processor, image, "caption en", suffix="a cat")            # real tokens
        viz.explore(processor, image, "caption en", suffix="a cat", model=model)    # attention over the mask
        viz.explore(mask=prefix_lm_mask)                                       # your function against PaliGemma's mask

    Args:
        processor: Splits prefix and suffix into the tokens to show.
        image: What the processor takes: a PIL image, a path or an array.
        prefix: With a processor the prompt as text, otherwise 1 to 16 tokens, of which the first is ``<bos>`` and the
            last is the newline. Default: 4 tokens.
        suffix: With a processor the answer as text, by default none. Otherwise 0 to 16 tokens, by default 3. A decode
            step needs one.
        image_tokens: 0 to 1024, by default the processor's number, or 4. More than 12 are drawn as one cell.
        padding: 0 to 16 tokens.
        padding_side: "left" or "right".
        window: In mode "sliding", a suffix token attends to keys fewer than this many steps behind. Default: 4.
        mode: "causal", "prefix-lm", "bidirectional", "sliding" (prefix-LM with a window), "unmasked-padding"
            (prefix-LM with a bug: padding is not masked), or "own", the default with ``mask``.
        compare: A second mode, drawn beside the first together with their difference.
        call: "prefill", where every token is a query, or "decode", where only the newest token is.
        mask: A function that returns a mask [1, T, T] or [T, T]. Its parameters are filled by name: token_type_ids,
            mask_ar, attention_mask, is_image [1, T], mask [1, T, T], length, window. A single parameter of any other
            name gets token_type_ids. Cells that differ from PaliGemma's mask are crossed.
        model: A PaliGemma of this package, whose attention is laid over the mask of its layer; this needs a processor
            and an image. Or a model of transformers, whose mask is drawn like that of a function.
        layer: The layer of the model, from 0. None shows a PaliGemma's mask without the attention.
        head: A head of that layer, from 0. None is their mean.

    Raises:
        ValueError: If a number is outside its limits, a choice is unknown, or an argument needs one that is missing.
    """
    written = [] if processor is None else ["processor", "image", json.dumps(prefix, ensure_ascii=False)]
    written += [f"suffix={json.dumps(suffix, ensure_ascii=False)}"] if isinstance(suffix, str) else []
    written += [] if mask is None else [f"mask={name_of(mask)}"]
    written += [] if model is None else ["model=model"]
    if isinstance(model, torch.nn.Module) and not isinstance(model, PaliGemma):
        mask, model = transformers_mask(model, layer or 0), None
        written += [f"layer={layer}"] if layer else []
    if mask is not None and not callable(mask):
        raise ValueError(f"mask must be a function that returns a mask, not a {type(mask).__name__}.")
    mode = mode or ("prefix-lm" if mask is None else OWN)
    if OWN in (mode, compare) and mask is None:
        raise ValueError('The mode "own" needs a function. Pass it as mask=.')
    start = Settings(
        padding=padding, side=padding_side, window=SMALL_WINDOW if window is None else window, mode=mode, call=call,
        compare=compare, **read_prompt(processor, prefix, suffix, image_tokens, call),
    )  # fmt: skip
    attention = None
    if model is not None:
        if start.texts is None or image is None or start.padding or start.image != processor.num_image_tokens:
            raise ValueError(
                "A model's attention needs a processor, an image and a prompt as text, without padding and with the "
                "processor's own number of image tokens."
            )
        batch = processor(text=[prefix], images=[image], suffix=None if suffix is None else [suffix])
        attention = read_attention(model, batch, explorer_tokens(start))
        start = attention.choose(start, layer, head)
    image_tokens = Settings.image if processor is None else processor.num_image_tokens
    return MaskExplorer(start, mask, attention, tuple(written), image_tokens)


def read_prompt(processor, prefix, suffix, image_tokens: int | None, call: str) -> dict[str, Any]:
    """The numbers of tokens and, from a processor, their texts, as ``Settings`` takes them.

    Raises:
        ValueError: If there is a text without a processor, or a processor without a text.
    """
    if processor is None:
        if isinstance(prefix, str) or isinstance(suffix, str):
            raise ValueError("Only a processor can split a text into tokens. Pass it first, then the image.")
        numbers = {"image": image_tokens, "prefix": prefix, "suffix": suffix}
        return {name: value for name, value in numbers.items() if value is not None}
    if not isinstance(prefix, str) or not isinstance(suffix, str | None):
        raise ValueError("With a processor, prefix and suffix are texts: 'caption en', suffix='a cat and two dogs'.")
    batch = processor.tokenize([prefix], None if suffix is None else [suffix], "right")
    types = batch["token_type_ids"][0].tolist()
    rest = [visible(token.text) for token in read_tokens(batch, processor)]
    P = processor.num_image_tokens
    texts = tuple(rest[P : len(rest) - sum(types)]), tuple(rest[len(rest) - sum(types) :])
    image = P if image_tokens is None else image_tokens
    return {"image": image, "prefix": len(texts[0]), "suffix": len(texts[1]), "texts": texts}


@dataclass(frozen=True)
class Attention:
    """The attention weights of a model, and for each layer the window of its mask, None if it cuts nothing off."""

    weights: Float[Tensor, "L H T T"]
    windows: list[int | None]
    spans: list[tuple[int, int]]  # the items: first token, and the token after the last

    def choose(self, settings: Settings, layer: int | None, head: int | None) -> Settings:
        """The settings with this layer and head, and the mask of the layer.

        Raises:
            ValueError: If there is no such layer or head.
        """
        for name, value, most in zip(("layer", "head"), (layer, head), self.weights.shape[:2], strict=True):
            if value is not None and not 0 <= value < most:
                raise ValueError(f"{name} must be from 0 to {most - 1}, or None, not {value}.")
        if layer is None:
            return replace(settings, head=head)
        window = self.windows[layer]
        mode = {"mode": "prefix-lm"} if window is None else {"mode": "sliding", "window": window}
        return replace(settings, layer=layer, head=head, call="prefill", compare=None, **mode)

    def table(self, layer: int, head: int | None) -> Float[Tensor, "T T"]:
        return self.weights[layer].mean(0) if head is None else self.weights[layer, head]

    def plain(self) -> dict[str, Any]:
        """Sums over the keys of an item and means over its queries, [L, H, I, I], as bytes: 255 is a weight of 1."""
        table = torch.stack([self.weights[..., a:b].sum(-1) for a, b in self.spans], -1)
        table = torch.stack([table[:, :, a:b].mean(2) for a, b in self.spans], 2)
        values = (255 * table.clamp(0, 1)).round().to(torch.uint8)
        L, H = self.weights.shape[:2]
        return {"shape": [L, H], "windows": self.windows, "values": base64.b64encode(values.numpy().tobytes()).decode()}


def read_attention(model: PaliGemma, batch: dict[str, Tensor], tokens: list[Token]) -> Attention:
    """The attention of every layer and head for one row, and how its tokens are drawn."""
    spans = []
    for kind, start, stop in stretches(tokens, lambda token: token.kind):
        long = kind in ("image", "padding") and stop - start > COLLAPSE
        spans += [(start, stop)] if long else [(i, i + 1) for i in range(start, stop)]
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    weights = torch.stack([layer[0].float().cpu() for layer in decoder_attention(model, **inputs)])
    config, S = model.config.text_config, len(tokens)
    windows = [config.window(i) for i in range(len(weights))]
    return Attention(weights, [w if w is not None and w < S else None for w in windows], spans)


# --- how it is shown ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskExplorer:
    """The explorer in a form for every kind of notebook, which shows the richest one that it can:

    - With a live kernel: a widget (through anywidget).
    - With scripts but without a kernel, as in an exported page: the same explorer in a frame (text/html).
    - Without scripts, as in an untrusted notebook or on a code host: the static figure before the frame, which the
      frame's script would hide, or the PNG itself. Both have alt text.

    A saved notebook should not contain the widget's part (``application/vnd.jupyter.widget-view+json``, and
    ``widgets`` in the metadata). It is useless without its kernel, and its id changes with every run.
    """

    settings: Settings
    mask: Callable | None = None
    attention: Attention | None = None
    written: tuple[str, ...] = ()  # the arguments that the sliders do not change, as Python
    image: int = Settings.image  # the number of image tokens without an argument

    def figure(self) -> Figure:
        """The initial masks, drawn by ``viz.attention_mask``, ``viz.compare_masks`` or ``viz.attention_over_mask``."""
        first, tokens = self.settings, [Token(t.text.replace(" ", ""), t.kind) for t in explorer_tokens(self.settings)]
        if first.layer is not None:
            head = "mean of the heads" if first.head is None else f"head {first.head}"
            table = self.attention.table(first.layer, first.head)
            return attention_over_mask(table, explorer_mask(first), tokens, f"Layer {first.layer}, {head}")
        own = None if self.mask is None else self.call_own(first)
        shown = {first.mode, first.compare} - {None}
        if OWN in shown and own["rows"] is None:
            shown = shown - {OWN} or {own["reference"]}
        elif shown == {OWN}:
            shown = {own["reference"], OWN}
        names = MODES | ({} if own is None else {OWN: own["name"]})
        ordered = sorted(shown, key=[own and own["reference"], first.mode, first.compare].index)
        drawn = {names[mode]: explorer_mask(replace(first, mode=mode), self.mask) for mode in ordered}
        if len(drawn) == 1:
            if own is None or own["error"] is None:
                return attention_mask(*drawn.values(), tokens, title=next(iter(drawn)))
            said = f"PaliGemma's mask, because {own['error']}"
            figure = attention_mask(*drawn.values(), tokens, title=fit(said, 0.8 * WIDTH, TITLE))
            return replace(figure, alt=f"{said} {figure.alt}")
        return compare_masks(drawn, tokens)

    def call_own(self, settings: Settings) -> dict[str, Any]:
        """What the mask function returns for these settings, as plain data, or why it does not return a mask."""
        rows = error = None
        try:
            mask = explorer_mask(replace(settings, mode=OWN), self.mask)
            rows = ["".join(map(str, row)) for row in mask.int().tolist()]
        except ValueError as problem:
            error = f"{str(problem).rstrip('.')}."
        about = {"name": name_of(self.mask), "reference": reference_mode(self.mask)}
        return about | {"of": {name: getattr(settings, name) for name in SEQUENCE}, "rows": rows, "error": error}

    def data(self) -> dict[str, Any]:
        """What the page needs beside the settings."""
        own = None if self.mask is None else self.call_own(self.settings)
        attention = None if self.attention is None else self.attention.plain()
        return {"own": own, "attention": attention, "written": list(self.written), "image": self.image}

    def html(self) -> str:
        """A page that needs no other file, no kernel and no network."""
        given = json.dumps([asdict(self.settings), self.data()]).replace("<", "\\u003c")
        return PAGE.replace("{module}", module()).replace("{given}", given)

    def save_html(self, path: str | Path) -> None:
        """Writes that page and creates its folder. The page keeps its state in its address.

        Raises:
            ValueError: If the name does not end in .html.
        """
        output_path(path, ".html").write_text(self.html(), encoding="utf-8")

    @cached_property
    def widget(self):
        """The explorer as an anywidget. Its ``settings`` follow what the learner does, and ``own`` follows these."""
        widget = widget_class()(settings=asdict(self.settings), data=self.data())
        if self.mask is not None:

            def call_again(change):
                widget.own = self.call_own(Settings(**change.new))

            widget.observe(call_again, "settings")
        return widget

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        figure = self.figure()
        data, metadata = figure._repr_mimebundle_()
        page = html.escape(self.html())
        frame = f'<iframe data-mask-explorer title="Mask explorer" srcdoc="{page}" {FRAME}></iframe>'
        widget, _ = self.widget._repr_mimebundle_()
        return data | {"text/html": f"<div>{figure.html()}{frame}</div>", WIDGET: widget[WIDGET]}, metadata


FRAME = 'style="border: 0; width: 100%; height: 0; display: block"'  # the script inside sets the height

# In a notebook's output the page is in a frame after the static figure, which it replaces.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Mask explorer</title>
<style>body { margin: 0; padding: 2px; }</style>
</head>
<body>
<div id="explorer"></div>
<script type="module">
{module}
showPage(document.getElementById("explorer"), ...{given});
</script>
</body>
</html>
"""


@cache
def module() -> str:
    """The text of explorer.js."""
    return Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


@cache
def widget_class() -> type:
    """The widget's class, made when the first explorer is shown, because ipywidgets takes a while to import."""
    import anywidget
    import traitlets

    class MaskExplorerWidget(anywidget.AnyWidget):
        _esm = module()
        settings = traitlets.Dict().tag(sync=True)
        data = traitlets.Dict().tag(sync=True)
        own = traitlets.Dict().tag(sync=True)

    return MaskExplorerWidget
