"""Functions of the package replaced for a while, wherever a module holds them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def replaced(substitutes: dict[Callable, Callable]) -> Iterator[None]:
    """Puts each substitute where the package's modules hold the original, and everything back at the end."""
    by_id = {id(original): substitute for original, substitute in substitutes.items()}
    places = [
        (module, name, by_id[id(value)])
        for path, module in list(sys.modules.items())
        if path.split(".")[0] == "minivlm" and not path.startswith("minivlm.course.exercises")
        for name, value in list(vars(module).items())
        if id(value) in by_id
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in places]
    try:
        for module, name, substitute in places:
            setattr(module, name, substitute)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
