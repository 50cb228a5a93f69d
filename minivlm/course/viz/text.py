"""Text in figures and alt texts: what fits, what the font has, and numbers as text."""

from collections.abc import Iterable
from functools import cache
from numbers import Integral, Real

from minivlm.course.viz.style import BODY, font


@cache
def code_points() -> frozenset[int]:
    """The code points that the font has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(font(BODY).path).get_charmap())


def printable(text: str) -> str:
    """The text on one line, with � for every character that the font lacks."""
    text = text.replace("\n", " ")
    return "".join(c if ord(c) in code_points() and c.isprintable() else "�" for c in text)


def visible(text: str) -> str:
    """Replaces whitespace by symbols, so that every token can be seen."""
    return printable(text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")) or "∅"


def readable(text: str) -> str:
    """Like ``visible``, for alt texts: spaces stay spaces."""
    return visible(text).replace("␣", " ")


def text_width(text: str, size: Real, bold: bool = False) -> Real:
    """Width of a line in pixels. Bold letters are about an eighth wider."""
    return font(round(size)).getlength(printable(text)) * size / round(size) * (1.14 if bold else 1)


def fit(text: str, width: Real, size: Real) -> str:
    """The text, cut off with "…" if it is wider than ``width`` pixels."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def break_lines(text: str, width: Real, size: Real, indent: str = "") -> list[str]:
    """Breaks the text at spaces into lines of at most ``width`` pixels, and words that are longer where they must.

    Args:
        indent: What the second and later lines of a paragraph start with.
    """
    lines, shortest = [], len(indent) + 1
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and text_width(longer, size) > width:
                lines.append(line)
                longer = indent + word
            while text_width(longer, size) > width and len(longer) > shortest:
                n = shortest
                while text_width(longer[: n + 1], size) <= width:
                    n += 1
                lines.append(longer[:n])
                longer = indent + longer[n:]
            line = longer
        lines.append(line)
    return lines


def titled(title: str | None, text: str) -> str:
    """An alt text that begins with the figure's title, if it has one."""
    return f"{title}. {text}" if title else text


def number(value: Real) -> str:
    """At most three significant digits, with a true minus sign."""
    return f"{value:.3g}".replace("-", "−")


def fixed(value: Real, digits: int = 2) -> str:
    """The number with that many digits after the point. −0.00 becomes 0.00."""
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "−")


def percent(p: Real) -> str:
    """``42%``, ``3.1%``, ``< 0.1%``."""
    if 0 < p < 0.001:
        return "< 0.1%"
    return f"{p:.0%}" if p >= 0.0995 else f"{p:.1%}"


def count(n: Integral, one: str, many: str | None = None) -> str:
    """``1 row``, ``2 rows``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def listed(items: Iterable[str], most: int = 8) -> str:
    """``a, b and c``, and how many more there are beyond ``most``."""
    items = list(items)
    if len(items) > most:
        items = [*items[:most], f"{len(items) - most} more"]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
