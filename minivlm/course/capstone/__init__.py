"""The capstone: a learner's own PaliGemma, written from an empty file, checked in twelve steps.

    report = capstone.check("my_paligemma.py")     # what python -m minivlm capstone my_paligemma.py runs
    capstone.start("my_paligemma.py")              # the empty file: signatures and what they have to return

``template`` is that file. ``worker`` runs the learner's file in a process of its own, ``process`` talks to it.
``steps`` are the twelve checks, ``reference`` has the right answers, ``examine`` says what is wrong with another one,
with the help of ``mistakes``. ``certificate`` is the page at the end.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from minivlm.course.exercises.exercise import for_console

PASSED, WRONG, MISSING, WAITING = "✓", "✗", "○", "·"
TIME_LIMIT = 60.0  # seconds for one call of a function of the learner's


@dataclass(frozen=True)
class Step:
    """What one of the twelve checks found.

    Attributes:
        mark: ✓ passed, ✗ wrong, ○ not written yet, · not run because an earlier step is wrong.
    """

    number: int
    name: str
    mark: str
    message: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.mark} {self.number:2} {self.name:12} {self.message}", *(f"     {note}" for note in self.notes)]
        return "\n".join(lines).rstrip()


@dataclass
class Report:
    """The twelve steps. Shows itself as text.

    Attributes:
        certificate: The page that was written, if all steps passed.
    """

    steps: list[Step] = field(default_factory=list)
    certificate: Path | None = None

    @property
    def passed(self) -> bool:
        return all(step.mark == PASSED for step in self.steps)

    @property
    def first_wrong(self) -> Step | None:
        return next((step for step in self.steps if step.mark == WRONG), None)

    def __str__(self) -> str:
        return for_console("\n".join(map(str, [*self.steps, self.summary])))

    __repr__ = __str__

    @property
    def summary(self) -> str:
        count = sum(step.mark == PASSED for step in self.steps)
        return f"{count} of {len(self.steps)} steps passed."


def check(
    path: str | Path,
    certificate: str | Path | None = None,
    limit: int | float = TIME_LIMIT,
    debug: bool = False,
    show: Callable[[Step], None] = lambda step: None,
) -> Report:
    """Checks a file in twelve steps and, if all pass, writes the certificate.

    A step whose functions are not written is left out. After the first step that is wrong, no more are run, since they
    would only say the same in more words.

    Args:
        path: The learner's file.
        certificate: Where to write the page. Default: nowhere.
        limit: Seconds that a call of one of its functions can take.
        debug: Whether to show the tracebacks of the file's errors on stderr.
        show: Called with each step as soon as it is done.

    Raises:
        ValueError: If there is no such file, or the page cannot have that name.
    """
    from minivlm.course.capstone.process import Learner
    from minivlm.course.capstone.steps import STEPS, Bench

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}. With --start, the command writes it, with empty functions.")
    if certificate is not None and Path(certificate).suffix != ".html":
        raise ValueError(f"The certificate is a page, so {str(certificate)!r} must end in .html.")
    report = Report()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Learner(path, limit, debug) as learner:
        bench, is_open = Bench(learner, Path(folder)), False
        for number, (name, run) in enumerate(STEPS, start=1):
            step = run_step(number, name, run, bench, learner, report, is_open)
            is_open = True
            report.steps.append(step)
            show(step)
        if report.passed and certificate is not None:
            from minivlm.course.capstone import certificate as page

            report.certificate = page.write(bench, report, Path(certificate))
    return report


def run_step(number: int, name: str, run: Callable, bench, learner, report: Report, is_open: bool) -> Step:
    """One step, or why it was not run."""
    from minivlm.course.capstone.examine import Different
    from minivlm.course.capstone.process import Failed, NotWritten

    if wrong := report.first_wrong:
        return Step(number, name, WAITING, f"not run: step {wrong.number} comes first.")
    try:
        if not is_open:
            learner.open()
        return Step(number, name, PASSED, run(bench))
    except NotWritten as missing:
        return Step(number, name, MISSING, f"`{missing}` is not written yet.")
    except Different as difference:
        message, *notes = map(str, difference.args)
        return Step(number, name, WRONG, message, tuple(notes))
    except Failed as failure:
        return Step(number, name, WRONG, str(failure))


def start(path: str | Path) -> None:
    """Writes the empty file. Raises ValueError if there is a file already."""
    path = Path(path)
    if path.exists():
        raise ValueError(f"There is already a file {str(path)!r}: move it away, or choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(Path(__file__).with_name("template.py").read_bytes())
