"""The mask explorer: attention masks to move, to ask and to predict, in a notebook and in a page of its own.

    T queries of the call, one a row · S keys in the cache, one a column

What the learner moves is explorer.js, one module that needs nothing else. Its masks are those of ``explorer_mask``,
cell by cell; the tests compare the two in a browser.
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
from minivlm.course.viz.figure import Figure
from minivlm.course.viz.style import listed
from minivlm.course.viz.tokens import Token
from minivlm.masks import attention_masks

MODES = {
    "causal": "causal",
    "prefix-lm": "prefix-LM",
    "bidirectional": "bidirectional",
    "sliding": "sliding window",
    "open-padding": "open padding",
}
LIMITS = {"image": (0, 256), "prefix": (1, 16), "suffix": (0, 16), "padding": (0, 16)}
SIDES, CALLS = ("left", "right"), ("prefill", "decode")
SMALL_WINDOW = 4  # PaliGemma 2's window is 4096: none of the masks here would show it
WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Settings:
    """What the sliders and buttons say; ``mask_explorer`` tells what each means."""

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
                raise ValueError(f"{name} is {getattr(self, name)}; give a number of tokens from {low} to {high}.")
        if self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1, the token itself.")
        choices = {"mode": tuple(MODES), "side": SIDES, "call": CALLS, "compare": (None, *MODES)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {listed([repr(word) for word in known])}."
                )
        if self.call == "decode" and self.suffix == 0:
            raise ValueError("A decode step needs a token that was generated: give suffix=1 or more.")


def explorer_tokens(settings: Settings) -> list[Token]:
    """The S tokens. While decoding, the padding of a right-padded prompt lies before the answer, not after it."""
    last = settings.prefix - 1
    prefix = ["<bos>" if i == 0 else "\\n" if i == last else f"pre {i}" for i in range(settings.prefix)]
    prompt = [Token("<image>", "image")] * settings.image + [Token(text, "prefix") for text in prefix]
    answer = [Token(f"suf {i + 1}", "suffix") for i in range(settings.suffix)]
    padding = [Token("<pad>", "padding")] * settings.padding
    if settings.side == "left":
        return padding + prompt + answer
    return prompt + padding + answer if settings.call == "decode" else prompt + answer + padding


def explorer_mask(settings: Settings) -> Bool[Tensor, "T S"]:
    """Who may look at whom: ``minivlm.masks.attention_masks`` of one sequence.

    The modes differ in where a block starts (causal: at every token; bidirectional: nowhere; else at every suffix
    token), in whether there is a window, and, in "open-padding", in that padding is taken for tokens. T is S, or
    1 for a decode step.
    """
    kinds = [token.kind for token in explorer_tokens(settings)]
    S = len(kinds)
    queries = 1 if settings.call == "decode" else S
    real = torch.tensor([[settings.mode == "open-padding" or kind != "padding" for kind in kinds]]).long()
    starts = torch.tensor([[kind == "suffix" for kind in kinds]]).long()
    starts = {"causal": torch.ones_like(starts), "bidirectional": torch.zeros_like(starts)}.get(settings.mode, starts)
    window = settings.window if settings.mode == "sliding" else None
    _, mask = attention_masks(real, starts, queries, window)
    return torch.ones(queries, S, dtype=torch.bool) if mask is None else mask[0]


def mask_explorer(
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
    """An explorer that opens on this sequence; the learner moves everything from there.

    Args:
        image_tokens: 0 to 256; more than 12 are drawn as one cell.
        prefix: 1 to 16 tokens, the first ``<bos>`` and the last the newline.
        suffix: 0 to 16 tokens, at least 1 for a decode step.
        padding: 0 to 16 tokens, on the ``padding_side``, "left" or "right".
        window: how far the mode "sliding" sees, in steps: keys fewer than this many behind. None: 4.
        mode: "causal", "prefix-lm", "bidirectional", "sliding" (prefix-LM with a window), or "open-padding" (prefix-LM
            with the bug that padding is seen).
        compare: a second mode, drawn beside the first, with the difference of the two.
        call: "prefill", where every token is a query, or "decode", where the newest is, and the others are cached.

    Raises:
        ValueError: a number outside these limits or a word that is none of these.
    """
    window = SMALL_WINDOW if window is None else window
    return MaskExplorer(Settings(image_tokens, prefix, suffix, padding, padding_side, window, mode, call, compare))


@dataclass(frozen=True)
class MaskExplorer:
    """Shows itself in every kind of notebook, each of which takes the richest form that it can show:

    - with a live kernel, a widget (through anywidget);
    - where scripts run but no kernel does, as in an exported page, the same explorer in a frame (text/html);
    - where no scripts run, as in an untrusted notebook or on a code host, the picture that stands before the frame,
      which the frame's script hides; or the PNG itself. Both have alt text.

    A notebook that is kept should not hold the widget's part (``application/vnd.jupyter.widget-view+json``, and
    ``widgets`` in the metadata): it means nothing after its kernel has ended, and its id is another one every time.
    """

    settings: Settings

    def picture(self) -> Figure:
        """The masks as they open, as a picture of the same kind as ``viz.attention_mask``."""
        first, tokens = self.settings, [Token(t.text.replace(" ", ""), t.kind) for t in explorer_tokens(self.settings)]
        if first.compare in (None, first.mode):
            return attention_mask(explorer_mask(first), tokens, title=MODES[first.mode])
        second = replace(first, mode=first.compare)
        return compare_masks({MODES[s.mode]: explorer_mask(s) for s in (first, second)}, tokens)

    def html(self) -> str:
        """A page that needs no other file, no kernel and no network."""
        return PAGE.replace("{settings}", json.dumps(asdict(self.settings))).replace("{module}", module())

    def save_html(self, path: str | Path) -> None:
        """Writes that page, and the folder it goes into. ValueError for a name that ends otherwise than in .html."""
        path = Path(path)
        if path.suffix.lower() != ".html":
            raise ValueError(f"The explorer is written as a page, so {str(path)!r} must end in .html.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")

    @cached_property
    def widget(self):
        """The explorer as an anywidget; its ``settings`` follow what the learner does."""
        return widget_class()(settings=asdict(self.settings))

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data, metadata = self.picture()._repr_mimebundle_()
        alt, png = html.escape(data["text/plain"]), data["image/png"]
        image = f'<img alt="{alt}" src="data:image/png;base64,{png}" style="max-width: 100%">'
        page = html.escape(self.html())
        frame = f'<iframe data-mask-explorer title="Mask explorer" srcdoc="{page}" {FRAME}></iframe>'
        widget, _ = self.widget._repr_mimebundle_()
        return data | {"text/html": f"<div>{image}{frame}</div>", WIDGET: widget[WIDGET]}, metadata


FRAME = 'style="border: 0; width: 100%; height: 0; display: block"'  # its own script gives it its height

# In a notebook's output the page is in a frame after the static picture, which it replaces.
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
    """Made when the first explorer is shown: ipywidgets takes a while to import, and drawing boxes needs none of it."""
    import anywidget
    import traitlets

    class MaskExplorerWidget(anywidget.AnyWidget):
        _esm = module()
        settings = traitlets.Dict().tag(sync=True)

    return MaskExplorerWidget
