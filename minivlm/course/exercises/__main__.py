"""``python -m minivlm.course.exercises`` prints the table of docs/teaching.md."""

from minivlm.course.exercises import CHAPTERS, EXERCISES


def table() -> str:
    lines = []
    for number, title in CHAPTERS.items():
        lines += [f"### {number} {title}", "", "| exercise | stars | minutes | points | it names who … |"]
        lines += ["|---|---|---|---|---|"]
        for e in (e for e in EXERCISES.values() if e.chapter == number):
            stars = "★" * e.difficulty + "☆" * (3 - e.difficulty)
            caught = "; ".join(mistake.name for mistake in e.mistakes).replace("|", "\\|")
            lines.append(f"| {e.key} `{e.name}` | {stars} | {e.minutes} | {e.points} | {caught} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
