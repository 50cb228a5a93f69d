"""Named tensors in a form for every kind of notebook: what a trace and the difference of two traces share."""

from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from torch import Tensor

from minivlm.course.viz import trace_page
from minivlm.course.viz.figure import Figure, output_path


class Traced:
    """What a trace and the difference of two traces share: named entries, and forms for every kind of notebook.

    A notebook shows a tree to step through, without scripts a tree that unfolds, and without HTML one figure with alt
    text. A subclass has the attributes below and implements ``html``.
    """

    title: str
    tokens: str
    entries: list
    overview: Figure
    page_settings: dict[str, Any]

    def html(self, folder: Path) -> str:
        """The tree to step through. Its links start from the folder."""
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        return [entry.step.name for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator:
        return iter(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, key: str | int | slice) -> Any:
        """An entry by name or index.

        Raises:
            ValueError: If no tensor has this name. The message lists the most similar names.
        """
        if not isinstance(key, str):
            return self.entries[key]
        if key not in self.names:
            raise ValueError(f"No tensor is called {key!r}. Similar names: {', '.join(similar(key, self.names))}.")
        return self.entries[self.names.index(key)]

    def tensor(self, name: str) -> Tensor:
        """The recorded tensor, on the CPU and in its own dtype."""
        return self[name].tensor

    def save_html(self, path: str | Path) -> None:
        """Writes a page that needs no network and creates its folder.

        Raises:
            ValueError: If the name does not end in .html.
        """
        path = output_path(path, ".html")
        page = trace_page.as_page(self.title, self.html(path.resolve().parent))
        path.write_text(page, encoding="utf-8")

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """All three forms. Notebooks prefer the HTML, and remove its script if they do not trust it."""
        data, metadata = self.overview._repr_mimebundle_()
        return data | {"text/html": self.html(Path.cwd()), "text/plain": repr(self)}, metadata


def similar(key: str, names: list[str], most: int = 3) -> list[str]:
    """The names whose ends are most similar to ``key``. Of equally similar ones, those computed first."""

    def similarity(name: str) -> float:
        ends = (name.split(".", i)[-1] for i in range(name.count(".") + 1))
        return max(SequenceMatcher(None, key, end).ratio() for end in ends)

    return sorted(names, key=similarity, reverse=True)[:most]
