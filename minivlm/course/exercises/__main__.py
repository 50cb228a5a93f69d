"""``python -m minivlm.course.exercises`` prints the table of docs/teaching.md."""

import re

from minivlm.course.chapters import CHAPTERS
from minivlm.course.exercises import in_chapter
from minivlm.course.exercises.exercise import for_console


def table() -> str:
    """Every exercise and its mistakes, in Markdown, chapter by chapter."""
    lines = []
    for number, chapter in CHAPTERS.items():
        lines += [f"### {number} {chapter.title}", ""]
        lines += ["| exercise | stars | minutes | points | the check recognizes a solution that … |"]
        lines += ["|---|---|---|---|---|"]
        for e in in_chapter(number):
            mistakes = "; ".join(mistake.name for mistake in e.mistakes).replace("|", "\\|")
            mistakes = re.sub(r"(?<!`)<\w+>(?!`)", r"`\g<0>`", mistakes)  # HTML would swallow <bos>
            lines.append(f"| {e.key} `{e.name}` | {e.stars} | {e.minutes} | {e.points} | {mistakes} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(for_console(table()))
