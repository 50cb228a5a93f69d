"""What the grader finds out about a notebook, and about a student."""

from dataclasses import dataclass, field

from minivlm.course.exercises import Exercise

MAX_MESSAGE = 500  # characters


@dataclass(frozen=True)
class Mark:
    """The grade of one exercise.

    Attributes:
        score: The fraction of its points, 0 to 1.
        mistake: Name of the known mistake, if it is one.
        notes: A hint, and the first difference.
    """

    score: float = 0.0
    message: str = "not submitted, or not readable."
    mistake: str = ""
    notes: tuple[str, ...] = ()
    is_attempted: bool = True

    @property
    def sentence(self) -> str:
        """The message with its notes, in one line of limited length."""
        return " ".join((self.message, *self.notes))[:MAX_MESSAGE]


@dataclass
class Report:
    """The result of one notebook, or of all notebooks of one student.

    Attributes:
        repeated: Chapters of which there was more than one notebook.
        late: Sentences about notebooks that were handed in late.
    """

    chapters: set[str] = field(default_factory=set)
    marks: dict[str, Mark] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    repeated: set[str] = field(default_factory=set)
    late: list[str] = field(default_factory=list)

    def add(self, other: "Report") -> None:
        """Merge another report. The better mark of each exercise wins."""
        self.repeated |= other.repeated | (self.chapters & other.chapters)
        self.chapters |= other.chapters
        self.problems += other.problems
        self.late += other.late
        for name, mark in other.marks.items():
            if name not in self.marks or mark.score > self.marks[name].score:
                self.marks[name] = mark


def points_of(report: Report, exercise: Exercise) -> float:
    """Never more than the exercise has, and never less than 0."""
    score = report.marks.get(exercise.name, Mark()).score
    return round(exercise.points * (score if 0 <= score <= 1 else 0.0), 2)


def printable(text: str) -> str:
    """Escape bytes in file names that are not valid text."""
    return text.encode("utf-8", "backslashreplace").decode()
