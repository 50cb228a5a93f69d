"""Sliders above a figure: with a live kernel the figure follows them, everywhere else its first state stands alone.

    viz.sliders(draw, temperature=(0.1, 100, "log"))     # draw(temperature=10) → Figure

ipywidgets around a figure function. The static figure, with its alt text, is what an untrusted notebook, a printed
page, a website or a code host shows.
"""

import html
import inspect
import math
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from PIL import Image

from minivlm.course.viz.figure import Figure

WIDGET = "application/vnd.jupyter.widget-view+json"
STEPS = 100  # of a slider over fractions or powers, if its range does not say how many
TYPES = (bool, str, Image.Image)


def sliders(draw: Callable[..., Figure], **controls: Any) -> "Sliders":
    """A control for each parameter of ``draw`` above the figure that it returns.

    Args:
        draw: Called with one value per control. The defaults of its parameters are where the controls start.
        controls: The parameter's name, with ``_`` for a space in its label, and what it can be: ``(low, high)`` or
            ``(low, high, step)`` for a slider, over integers if all are integers; ``(low, high, "log")`` for one over
            powers; a list, or a dict of names and values, for a menu; ``bool`` for a checkbox; ``str`` for a line of
            text; ``PIL.Image.Image`` for an upload, None before there is one.

    Raises:
        ValueError: If a control has no parameter with a default inside its range, or ``draw`` returns no Figure.
    """
    parameters = inspect.signature(draw).parameters
    if not controls:
        raise ValueError("sliders needs at least one control, such as temperature=(0.1, 100).")
    for name, choices in controls.items():
        if name not in parameters or parameters[name].default is inspect.Parameter.empty:
            raise ValueError(
                f"The figure function needs a parameter {name!r} with a default: its control starts there."
            )
        check_control(name, choices, parameters[name].default)
    return Sliders(draw, controls, {name: parameters[name].default for name in controls})


class Sliders:
    """The controls and their figure in a form for every kind of notebook.

    A saved notebook should not contain the widget's part (``application/vnd.jupyter.widget-view+json``, and
    ``widgets`` in the metadata). It is useless without its kernel, and its id changes with every run.

    Attributes:
        figure: The figure where the controls start.
    """

    def __init__(self, draw: Callable[..., Figure], controls: Mapping[str, Any], start: Mapping[str, Any]):
        self.draw, self.controls, self.start = draw, controls, start
        self.figure = check_figure(draw(**start))

    @cached_property
    def widget(self):
        """The live form: an ``ipywidgets.VBox`` of the controls, the figure, and a line for errors."""
        import ipywidgets

        inputs = {name: new_input(name, choices, self.start[name]) for name, choices in self.controls.items()}
        shown, problem = ipywidgets.HTML(self.figure.html()), ipywidgets.HTML()

        def redraw(_change=None):
            try:
                values = {name: value_of(given, self.controls[name]) for name, given in inputs.items()}
                problem.value, shown.value = "", check_figure(self.draw(**values)).html()
            except Exception as error:  # of the learner's own function too: the last good figure stays
                problem.value = f'<p role="alert"><b>{html.escape(sentence(error))}</b></p>'

        for given in inputs.values():
            given.observe(redraw, "value")
        wrapped = ipywidgets.Layout(display="flex", flex_flow="row wrap", overflow="visible")
        return ipywidgets.VBox([ipywidgets.Box(list(inputs.values()), layout=wrapped), shown, problem])

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data, metadata = self.figure._repr_mimebundle_()
        view = self.widget._repr_mimebundle_()
        return data | {WIDGET: view[WIDGET]}, metadata


def check_figure(figure: Any) -> Figure:
    """What the figure function returned, if it is a figure with alt text."""
    if not isinstance(figure, Figure):
        name = type(figure).__name__
        raise ValueError(f"The figure function must return a figure of viz, not a {name}: try viz.from_figure.")
    return figure


def sentence(error: Exception) -> str:
    """The first line of an error, which for a ``ValueError`` is a sentence already."""
    first = (str(error).strip() or "No details.").split("\n")[0]
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"


# --- controls ------------------------------------------------------------------------------------------------------


def check_control(name: str, choices: Any, start: Any) -> None:
    """Checks that a control is one of those that ``sliders`` describes, and that it can start at this value."""
    if isinstance(choices, tuple):
        numbers = choices[:-1] if choices[-1:] == ("log",) else choices
        is_range = len(choices) in (2, 3) and len(numbers) >= 2 and all(isinstance(n, Real) for n in numbers)
        if not is_range or not choices[0] < choices[1] or (numbers != choices and choices[0] <= 0):
            raise ValueError(f'{name} must be (low, high), with a step or "log" if you like, not {choices!r}.')
        if not choices[0] <= start <= choices[1]:
            raise ValueError(f"{name} starts at {start}, outside {choices[0]} to {choices[1]}.")
    elif isinstance(choices, list | dict):
        known = list(choices.values()) if isinstance(choices, dict) else choices
        if start not in known:
            raise ValueError(f"{name} starts at {start!r}, which is not among its choices, {known}.")
    elif choices not in TYPES:
        raise ValueError(f"{name} must be a range, a list, bool, str or PIL.Image.Image, not {choices!r}.")


def new_input(name: str, choices: Any, start: Any):
    """The widget for one control. It reports a value when it is released, not at every pixel on the way."""
    import ipywidgets

    how = {"description": name.replace("_", " ")}
    if choices is Image.Image:
        return ipywidgets.FileUpload(accept="image/*", layout={"width": "auto"}, **how)
    how["style"] = {"description_width": "initial"}
    if isinstance(choices, tuple):
        return new_slider(choices, start, how)
    if isinstance(choices, list | dict):
        return ipywidgets.Dropdown(options=choices, value=start, **how)
    if choices is bool:
        return ipywidgets.Checkbox(value=start, indent=False, **how)
    return ipywidgets.Text(value=start, continuous_update=False, layout={"width": "360px"}, **how)


def new_slider(choices: tuple, start: Real, how: dict):
    """A slider over integers, fractions or powers of ten."""
    import ipywidgets

    low, high, *rest = choices
    how = how | {"value": start, "continuous_update": False, "layout": {"width": "360px"}}
    if rest == ["log"]:
        low, high = math.log10(low), math.log10(high)
        return ipywidgets.FloatLogSlider(min=low, max=high, step=(high - low) / STEPS, readout_format=".3g", **how)
    if all(isinstance(n, Integral) for n in (*choices, start)):
        return ipywidgets.IntSlider(min=low, max=high, step=rest[0] if rest else 1, **how)
    step = rest[0] if rest else (high - low) / STEPS
    return ipywidgets.FloatSlider(min=low, max=high, step=step, readout_format=".3g", **how)


def value_of(given, choices: Any) -> Any:
    """The value of a control, for an upload the image in the file."""
    if choices is not Image.Image:
        return given.value
    return read_upload(given.value[0]["name"], bytes(given.value[0]["content"])) if given.value else None


def read_upload(name: str, content: bytes) -> Image.Image:
    """An uploaded file as an RGB image.

    Raises:
        ValueError: If it is no image. The message has the file's own name.
    """
    from minivlm.processor import open_image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(name).name or "upload")
        path.write_bytes(content)
        try:
            return open_image(path)
        except ValueError as error:
            raise ValueError(str(error).replace(repr(str(path)), repr(path.name))) from error
