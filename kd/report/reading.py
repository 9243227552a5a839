"""A study's folder as the report sees it: read once, checked, never written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import ConfigError
from kd.metrics import MISLEADING
from kd.report import words
from kd.study.folder import Folder
from kd.study.grid import difference, sides_of

if TYPE_CHECKING:
    from pandas import DataFrame

LINES = 8  # that can be told apart in one plot
EPS, T = "teacher.label_smoothing", "loss.temperature"
BY_SEED = dict[int, str]  # a point for each seed
Key = tuple[Any, ...]  # a value of each axis


@dataclass(frozen=True)
class Facets:
    """Which axis is drawn how: along x, as lines, and the rest as one panel for each combination.

    `x` is None where no axis has several values. An axis with too many values for lines makes rows instead: `rows`,
    which is one of `rest`.
    """

    x: str | None
    line: str | None
    rest: tuple[str, ...]
    rows: str | None


class Study:
    """One study: its card, its points, and the table with the values of every metric."""

    def __init__(self, folder: Path, card: dict[str, Any], points: dict[str, dict[str, Any] | None], table: DataFrame):
        self.folder, self.card, self.points = folder, card, points
        self.columns = {str(column) for column in table.columns if "." in str(column)}
        self._rows: dict[str, dict[str, Any]] = {}
        for row in table.to_dict("records"):
            self._rows[str(row["point"])] = {str(column): value for column, value in row.items()}
        self.axes = {axis: [hashable(value) for value in values] for axis, values in card["axes"].items()}
        self.varying = [axis for axis, values in self.axes.items() if len(values) > 1]
        self.misleading: Mapping[str, str] = {**MISLEADING, **card.get("misleading", {})}

    @property
    def primary(self) -> list[str]:
        """The metrics that the study is about: test accuracy, then those of its contrasts."""
        return list(dict.fromkeys(["test.top1", *(contrast["metric"] for contrast in self.card["contrasts"])]))

    def value(self, point: str | None, column: str) -> float | None:
        """A metric of a point; None where either is not there."""
        return words.number(self._rows.get(point or "", {}).get(column))

    def values(self, group: Mapping[int, str], column: str) -> dict[int, float]:
        """A metric of one point for each seed, of the seeds that have it."""
        found = {seed: self.value(point, column) for seed, point in group.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def has(self, column: str, group: Mapping[Key, BY_SEED]) -> bool:
        """Whether any point of several groups has a metric."""
        return column in self.columns and any(self.values(points, column) for points in group.values())

    @cached_property
    def grid(self) -> dict[Key, BY_SEED]:
        """The students: a value of each of `axes`, and the point for each seed."""
        found: dict[Key, BY_SEED] = {}
        for cell in self.card["cells"]:
            key = tuple(hashable(cell["axes"].get(axis)) for axis in self.axes)
            found.setdefault(key, {})[cell["seed"]] = cell["point"]
        return found

    @cached_property
    def teachers(self) -> tuple[list[str], dict[Key, BY_SEED]]:
        """The axes that tell teachers apart, and the teachers by their values on them."""
        found = {i: p for i, p in self.points.items() if p and p["role"] == "teacher"}
        places = {
            axis: {i: self._place(point["settings"], axis) for i, point in found.items()} for axis in self.varying
        }
        axes = [axis for axis, values in places.items() if all(place is not None for place in values.values())]
        groups: dict[Key, BY_SEED] = {}
        for i in sorted(found, key=lambda i: [places[axis][i] for axis in axes]):
            key = tuple(self.axes[axis][places[axis][i]] for axis in axes)  # type: ignore[index]
            groups.setdefault(key, {})[found[i]["seed"]] = i
        return axes, groups

    def _place(self, settings: Mapping[str, Any], axis: str) -> int | None:
        """The place along an axis of the teacher with these settings; None where the axis is not about teachers."""
        values = self.axes[axis]
        if axis in settings:
            value = hashable(settings[axis])
            return values.index(value) if value in values else None
        labels = self.card["labels"].get(axis, {})  # its keys are text, as in every JSON object
        about = [{k: v for k, v in labels.get(str(value), {}).items() if k in settings} for value in values]
        fits = [(len(own), -i) for i, own in enumerate(about) if all(settings[k] == v for k, v in own.items())]
        return -max(fits)[1] if fits and any(about) else None  # the label that says most of what is so

    def group(self, chosen: Mapping[str, Any]) -> Iterator[tuple[Key, BY_SEED]]:
        """Groups of students whose axes have the given values."""
        names = list(self.axes)
        for key, points in self.grid.items():
            if all(key[names.index(axis)] == value for axis, value in chosen.items()):
                yield key, points

    def controls(self, chosen: Mapping[str, Any]) -> dict[str, BY_SEED]:
        """The controls that go with students of these values, by kind."""
        found: dict[str, BY_SEED] = {}
        for control in self.card["controls"]:
            if all(hashable(value) == chosen.get(axis, hashable(value)) for axis, value in control["axes"].items()):
                found.setdefault(control["control"], {})[control["seed"]] = control["point"]
        return found

    def ordered(self, axis: str) -> bool:
        """Whether an axis has numbers only."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.axes[axis])

    @cached_property
    def facets(self) -> Facets:
        """How the grid is drawn: the teacher's smoothing along x and the temperature as lines, where they are axes.

        Without a temperature, lines are what a student is taught with; what changes the teachers makes panels.
        """
        left = sorted(self.varying, key=lambda axis: (axis != EPS, not self.ordered(axis)))
        x = left[0] if left else None
        teachers = self.teachers[0]
        left = sorted(left[1:], key=lambda axis: (axis != T, axis in teachers, not self.ordered(axis)))
        line = left[0] if left and len(self.axes[left[0]]) <= LINES else None
        rest = [axis for axis in self.varying if axis not in (x, line)]
        return Facets(x, line, tuple(rest), left[0] if left and line is None else None)

    def differences(self, contrast: Mapping[str, Any]) -> dict[int, float]:
        """a - b by seed, less minus.a - minus.b where there is one, for the seeds that have all of it.

        By the seed that each point says it had, not by its place among the side's points.
        """
        sides = [self._by_seed(side["points"], contrast["metric"]) for side in sides_of(contrast)]
        both = [seed for seed in self.card["seeds"] if all(seed in values for values in sides)]
        return {seed: difference([values[seed] for values in sides]) for seed in both}

    def _by_seed(self, points: Sequence[str], column: str) -> dict[int, float]:
        return self.values({point["seed"]: i for i in points if (point := self.points.get(i))}, column)

    def states(self) -> dict[str, list[str]]:
        """Points by state: finished, failed, missing."""
        found: dict[str, list[str]] = {"finished": [], "failed": [], "missing": []}
        for i, point in self.points.items():
            found["missing" if point is None else "failed" if point["state"] == "failed" else "finished"].append(i)
        return found


def hashable(value: Any) -> Any:
    """A value of an axis that can be looked up."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


def read(folder: Path) -> Study:
    """Read a study's folder. Raises ConfigError, naming the file, where it is not what `kd.study` writes."""
    if not folder.is_dir():
        raise ConfigError(f"{words.clean(folder, 300)}: no such folder; give the folder of a study")
    if not (folder / "study.json").is_file():
        raise ConfigError(f"{words.clean(folder, 300)}: holds no study.json; give the folder of a study")
    from kd.study.table import load

    files, table = Folder(folder), load(folder)  # checks every entry
    card = files.read_card()
    points = {identifier: files.read_point(identifier) for identifier in card["points"]}
    if any(words.number(value) is None for value in card["axes"].get(EPS, ())):
        raise ConfigError(f"{files.card}: axes.{EPS}: must be numbers")
    return Study(folder, card, points, table)
