"""The mask explorer: attention masks to change, to query and to predict, in a notebook or on a page of its own.

    T queries of the call, one per row · S keys in the cache, one per column

The interactive part is explorer.js, one module without dependencies. Its masks equal those of ``explorer_mask``, cell
by cell. The tests compare the two in a browser.
"""

import html
import json
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from minivlm.course.viz.attention import attention_mask, compare_masks
from minivlm.course.viz.figure import Figure, output_path
from minivlm.course.viz.text import listed
from minivlm.course.viz.tokens import Token
from minivlm.masks import attention_masks

MODES = {
    "causal": "causal",
    "prefix-lm": "prefix-LM",
    "bidirectional": "bidirectional",
    "sliding": "sliding window",
    "unmasked-padding": "unmasked padding",
}
LIMITS = {"image": (0, 256), "prefix": (1, 16), "suffix": (0, 16), "padding": (0, 16)}
SIDES, CALLS = ("left", "right"), ("prefill", "decode")
SMALL_WINDOW = 4  # the 4,096 of PaliGemma 2 would be longer than every sequence here
WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Settings:
    """The state of the sliders and buttons. ``explore`` explains each.

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

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be a number of tokens from {low} to {high}, not {getattr(self, name)}.")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 (the token itself), not {self.window}.")
        choices = {"mode": tuple(MODES), "side": SIDES, "call": CALLS, "compare": (None, *MODES)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {listed(map(repr, known))}, not {getattr(self, name)!r}.")
        if self.call == "decode" and self.suffix == 0:
            raise ValueError("A decode step needs a generated token. Use suffix=1 or more.")


def explorer_tokens(settings: Settings) -> list[Token]:
    """The S tokens. In a decode step, the padding of a right-padded prompt is before the answer, not after it."""
    last = settings.prefix - 1
    prefix = ["<bos>" if i == 0 else "\\n" if i == last else f"pre {i}" for i in range(settings.prefix)]
    prompt = [Token("<image>", "image")] * settings.image + [Token(text, "prefix") for text in prefix]
    answer = [Token(f"suf {i + 1}", "suffix") for i in range(settings.suffix)]
    padding = [Token("<pad>", "padding")] * settings.padding
    if settings.side == "left":
        return padding + prompt + answer
    return prompt + padding + answer if settings.call == "decode" else prompt + answer + padding


def explorer_mask(settings: Settings) -> Bool[Tensor, "T S"]:
    """The mask of one sequence, from ``minivlm.masks.attention_masks``. T is S, or 1 for a decode step.

    A new block starts at every token (causal), nowhere (bidirectional), or at every suffix token (the other modes).
    "sliding" adds a window. "unmasked-padding" treats padding as real tokens.
    """
    kinds = [token.kind for token in explorer_tokens(settings)]
    S = len(kinds)
    queries = 1 if settings.call == "decode" else S
    real = torch.tensor([[settings.mode == "unmasked-padding" or kind != "padding" for kind in kinds]]).long()
    starts = torch.tensor([[kind == "suffix" for kind in kinds]]).long()
    starts = {"causal": torch.ones_like(starts), "bidirectional": torch.zeros_like(starts)}.get(settings.mode, starts)
    window = settings.window if settings.mode == "sliding" else None
    _, mask = attention_masks(real, starts, queries, window)
    return torch.ones(queries, S, dtype=torch.bool) if mask is None else mask[0]


def explore(
    image_tokens: int = 4,
    prefix: int = 4,
    suffix: int = 3,
    padding: int = 0,
    padding_side: str = "right",
    window: int | None = None,
    mode: str = "prefix-lm",
    compare: str | None = None,
    call: str = "prefill",
) -> "MaskExplorer":
    """An explorer that starts with this sequence and lets the learner change everything.

    Args:
        image_tokens: 0 to 256. More than 12 are drawn as one cell.
        prefix: 1 to 16 tokens: the first is ``<bos>``, the last is the newline.
        suffix: 0 to 16 tokens, at least 1 for a decode step.
        padding: 0 to 16 tokens.
        padding_side: "left" or "right".
        window: In mode "sliding", a suffix token attends to keys fewer than this many steps behind. Default: 4.
        mode: "causal", "prefix-lm", "bidirectional", "sliding" (prefix-LM with a window), or "unmasked-padding"
            (prefix-LM with a bug: padding is not masked).
        compare: A second mode, drawn beside the first together with their difference.
        call: "prefill", where every token is a query, or "decode", where only the newest token is.

    Raises:
        ValueError: If a number is outside its limits or a choice is unknown.
    """
    window = SMALL_WINDOW if window is None else window
    return MaskExplorer(Settings(image_tokens, prefix, suffix, padding, padding_side, window, mode, call, compare))


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

    def figure(self) -> Figure:
        """The initial masks, drawn by ``viz.attention_mask`` or ``viz.compare_masks``."""
        first, tokens = self.settings, [Token(t.text.replace(" ", ""), t.kind) for t in explorer_tokens(self.settings)]
        if first.compare in (None, first.mode):
            return attention_mask(explorer_mask(first), tokens, title=MODES[first.mode])
        second = replace(first, mode=first.compare)
        return compare_masks({MODES[s.mode]: explorer_mask(s) for s in (first, second)}, tokens)

    def html(self) -> str:
        """A page that needs no other file, no kernel and no network."""
        return PAGE.replace("{settings}", json.dumps(asdict(self.settings))).replace("{module}", module())

    def save_html(self, path: str | Path) -> None:
        """Writes that page and creates its folder.

        Raises:
            ValueError: If the name does not end in .html.
        """
        output_path(path, ".html").write_text(self.html(), encoding="utf-8")

    @cached_property
    def widget(self):
        """The explorer as an anywidget. Its ``settings`` follow what the learner does."""
        return widget_class()(settings=asdict(self.settings))

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data, metadata = self.figure()._repr_mimebundle_()
        alt, png = html.escape(data["text/plain"]), data["image/png"]
        image = f'<img alt="{alt}" src="data:image/png;base64,{png}" style="max-width: 100%">'
        page = html.escape(self.html())
        frame = f'<iframe data-mask-explorer title="Mask explorer" srcdoc="{page}" {FRAME}></iframe>'
        widget, _ = self.widget._repr_mimebundle_()
        return data | {"text/html": f"<div>{image}{frame}</div>", WIDGET: widget[WIDGET]}, metadata


FRAME = 'style="border: 0; width: 100%; height: 0; display: block"'  # the script inside sets the height

# In a notebook's output the page is in a frame after the static figure, which it replaces.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Mask explorer</title>
<style>body { margin: 0; padding: 2px; background: white; }</style>
</head>
<body>
<div id="explorer"></div>
<script type="module">
{module}
mount(document.getElementById("explorer"), {settings});
const frame = window.frameElement;
if (frame?.hasAttribute("data-mask-explorer")) {
  frame.previousElementSibling.hidden = true;
  new ResizeObserver(() => (frame.style.height = `${document.body.offsetHeight}px`)).observe(document.body);
}
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

    return MaskExplorerWidget
