"""Grade a class in parts, each as a job of its own, and put together what they found out.

A shard grades every n-th student and writes one JSON file. ``load`` reads the files of all shards and refuses a set
that does not add up to one run over everything.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from minivlm.course.grading.report import Mark, Report
from minivlm.hub import write_atomically

NAME = "*.*-of-*.json"


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``count``, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "2/5".

        Raises:
            ValueError: If it is something else, or there is no such part.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"--shard must be I/N with I from 1 to N, such as 2/5, not {text!r}.")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"

    def choose(self, students: Iterable[str]) -> list[str]:
        """Every ``count``-th student, from the ``number``-th on."""
        return list(students)[self.number - 1 :: self.count]

    def path(self, out: Path) -> Path:
        """Where the results go: grades.csv → grades.2-of-5.json."""
        return out.with_name(f"{out.stem}.{self}.json")


@dataclass(frozen=True)
class Part:
    """The results of one shard, or of a whole class.

    Attributes:
        settings: What must be the same in all shards: their number, the seed and other options.
        students: Of the whole class, in order.
        remarks: Sentences about files that belong to no student.
        reports: Student → report, for the students of this shard.
    """

    shard: Shard
    settings: dict
    students: list[str]
    remarks: list[str]
    reports: dict[str, Report]

    def save(self, path: Path) -> None:
        """Write the file of this shard, or nothing.

        Raises:
            OSError: If it cannot be written.
        """
        with write_atomically(path) as part:
            part.write_text(json.dumps(asdict(self), default=sorted), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Part":
        """Read what ``save`` wrote.

        Raises:
            ValueError: If the file contains anything else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            shard = Shard.parse(f"{content['shard']['number']}/{content['shard']['count']}")
            reports = {student: to_report(report) for student, report in content["reports"].items()}
            part = cls(shard, dict(content["settings"]), list(content["students"]), list(content["remarks"]), reports)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            part = None
        if part is None or list(part.reports) != part.shard.choose(part.students):
            raise ValueError(f"{str(path)!r} is not the complete result of a shard: grade that one again.")
        return part


def to_report(data: dict) -> Report:
    """A report from its JSON form."""
    marks = {name: Mark(**mark | {"notes": tuple(mark["notes"])}) for name, mark in data["marks"].items()}
    values = {field.name: data[field.name] for field in fields(Report)}
    return Report(**values | {"marks": marks, "chapters": set(data["chapters"]), "repeated": set(data["repeated"])})


def load(folder: Path) -> Part:
    """The results of all shards in a folder as one, as if there had been no shards.

    Raises:
        ValueError: If a shard is missing, is there twice, or was graded with other options or other notebooks.
    """
    paths = sorted(folder.glob(NAME))
    if not paths:
        raise ValueError(f"{str(folder)!r} contains no results of shards, such as grades.1-of-4.json.")
    parts = {path.name: Part.read(path) for path in paths}
    (name, first), *others = parts.items()
    for other, part in others:
        for key in first.settings.keys() | part.settings.keys():
            mine, theirs = first.settings.get(key), part.settings.get(key)
            if mine != theirs:
                how = f"{name} with {key} {mine}, {other} with {key} {theirs}"
                raise ValueError(f"These shards do not belong together: {how}. Grade them with the same options.")
        if (part.students, part.remarks) != (first.students, first.remarks):
            raise ValueError(f"{name} and {other} do not belong together: their folders of submissions differ.")
    counts = Counter(part.shard.number for part in parts.values())
    if twice := [number for number, count in counts.items() if count > 1]:
        raise ValueError(f"Shard {twice[0]} of {first.shard.count} is there more than once: remove all but one.")
    if missing := [str(number) for number in range(1, first.shard.count + 1) if number not in counts]:
        which = f"Shard {missing[0]} is" if len(missing) == 1 else f"Shards {', '.join(missing)} are"
        raise ValueError(f"{which} missing: {str(folder)!r} has {len(parts)} of {first.shard.count}.")
    reports = {student: report for part in parts.values() for student, report in part.reports.items()}
    ordered = {student: reports[student] for student in first.students}
    return Part(Shard(1, 1), first.settings, first.students, first.remarks, ordered)
