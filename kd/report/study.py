"""A study's directory as data frames: its students, controls and teachers with their metrics."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pandas import DataFrame

from kd.report import formatting as fmt
from kd.study import load
from kd.study.folder import Folder

EPS, T = "teacher.label_smoothing", "loss.temperature"
MOST_LINES = 8  # that can be told apart in one plot


class Study:
    """One study.

    Attributes
    ----------
    card, points : study.json, and each finished or failed point's JSON by its id
    table : `kd.study.load`, by point
    axes : the values of each axis; `varying` names those that have several
    students, controls, teachers : a row for each network of a seed. A column called like an axis holds the place of
        the value in `axes`, NA where the axis makes no difference; the other columns are the table's.
    teacher_axes : the axes that tell teachers apart
    """

    def __init__(self, directory: Path):
        files = Folder(directory)
        self.card = files.read_card()
        self.points = {i: point for i in self.card["points"] if (point := files.read_point(i))}
        self.table = load(directory).set_index("point")
        self.axes = {axis: [_hashable(value) for value in values] for axis, values in self.card["axes"].items()}
        self.varying = [axis for axis, values in self.axes.items() if len(values) > 1]
        self.seeds: list[int] = self.card["seeds"]
        self.students = self._placed(self.card["cells"])
        self.controls = self._placed(self.card["controls"])
        teachers = [
            {"axes": {axis: self._of_teacher(i, axis) for axis in self.varying}, "point": i, "seed": point["seed"]}
            for i, point in self.points.items()
            if point["role"] == "teacher"
        ]
        placed = self._placed(teachers)
        self.teacher_axes = [axis for axis in self.varying if teachers and placed[axis].notna().all()]
        self.teachers = placed.sort_values([*self.teacher_axes, "seed"])

    def _placed(self, cells: Sequence[Mapping[str, Any]]) -> DataFrame:
        """A row for each cell: the places of its values, its seed and its control, and its point's row of the table."""
        rows = [
            {axis: self._place(axis, value) for axis, value in cell["axes"].items()}
            | {key: cell[key] for key in ("point", "seed", "control") if key in cell}
            for cell in cells
        ]
        columns = [*self.axes, "point", "seed", "control"]
        own = self.table.drop(columns=columns, errors="ignore")
        return DataFrame(rows, columns=columns).join(own, on="point")

    def _place(self, axis: str, value: Any) -> int | None:
        values, value = self.axes[axis], _hashable(value)
        return values.index(value) if value in values else None

    def _of_teacher(self, point: str, axis: str) -> Any:
        """A teacher's value of an axis; an axis that does not change teachers has none, which is not None."""
        label = self.table.at[point, axis] if axis in self.table else math.nan
        return self.points[point]["settings"].get(axis, label)

    def groups(self, networks: DataFrame, axes: list[str]) -> list[tuple[str, DataFrame]]:
        """The networks of each combination of values of some axes, with these values in words."""
        if not axes:
            return [("", networks)]
        grouped = networks.groupby(axes)  # by place, so that values that read alike stay apart
        return [(self.names(dict(zip(axes, places, strict=True))), own) for places, own in grouped]

    def names(self, places: Mapping[str, int]) -> str:
        """The values at these places in words."""
        return fmt.settings({axis: self.axes[axis][place] for axis, place in places.items()})

    def ticks(self, axis: str) -> list[str]:
        """The values of an axis."""
        return [fmt.clean(fmt.choice(axis, value), 16) for value in self.axes[axis]]

    @property
    def primary(self) -> list[str]:
        """The primary metrics: test accuracy, then those of the contrasts."""
        return list(dict.fromkeys(["test.top1", *(contrast["metric"] for contrast in self.card["contrasts"])]))

    def ordered(self, axis: str) -> bool:
        """Whether all values of an axis are numbers."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.axes[axis])

    @cached_property
    def facets(self) -> tuple[str, list[str], list[str]]:
        """How the axes are drawn: one along x, at most one as lines, and a plot for each combination of the others.

        x is the teacher's smoothing and lines are the temperature, where they are axes; x is "" where no axis has
        several values. Without a temperature, lines are what a student is taught with; what changes the teachers makes
        plots. An axis with too many values for lines goes along x.
        """
        x, *left = sorted(self.varying, key=lambda axis: (axis != EPS, not self.ordered(axis))) or [""]
        lines = sorted(left, key=lambda axis: (axis != T, axis in self.teacher_axes, not self.ordered(axis)))[:1]
        if lines and len(self.axes[lines[0]]) > MOST_LINES:
            x, lines = lines[0], [x]
        return x, lines, [axis for axis in self.varying if axis not in (x, *lines)]


def has(frame: DataFrame, column: str) -> bool:
    """Whether any network of a frame has a metric."""
    return column in frame and bool(frame[column].notna().any())


def _hashable(value: Any) -> Any:
    """A value of an axis that can be looked up."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value
