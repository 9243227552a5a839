"""Table of a study: its points as a DataFrame, and as the CSV that `kd.study` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.checkpoint.files import write_atomically
from kd.config.types import flat
from kd.metrics import METRICS
from kd.study.folder import Folder
from kd.study.schema import COLUMNS

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Points = Mapping[str | None, dict[str, Any]]  # those that have run, by id
ALWAYS = {  # settings that are columns even where they are the same everywhere
    "data.name",
    "teacher.model",
    "teacher.label_smoothing",
    "student.model",
    "loss.temperature",
    "loss.student_temperature",
    "loss.kd_weight",
    "loss.ce_weight",
    "loss.label_smoothing",
    "loss.methods",
}
ROLES = ["teacher", "control", "student"]
ROUNDING = 1e-12  # of the largest value; four doubles differ by 1e-15 of it, one of a million samples by 1e-6
SIGNS = (1, -1, -1, 1)  # of the sides of a contrast: a - b, or (a - b) - (minus.a - minus.b)


def load(folder: str | Path) -> DataFrame:
    """The points of a study, one row each, sorted by role and id; see `kd.study` for the columns.

    A point that has not run yet, or whose teacher has failed, has the state "missing". Raises ConfigError where the
    directory holds no study, or one of another version of kd.
    """
    from pandas import DataFrame

    files = Folder(folder)
    card = files.read_card()
    points: Points = {i: point for i in card["points"] if (point := files.read_point(i))}
    settings, labels, nt_kl = _columns(points), _labels(card, points), _nt_kl_of_controls(points)
    rows: list[dict[str, Any]] = []
    for point in points.values():
        row = {key: point[key] for key in ("role", "control", "state", "error", "seed")}
        row |= {"point": point["id"], "teacher_point": point["teacher"]} | labels.get(point["id"], {})
        row |= {key: _cell(value) for key, value in point["settings"].items() if key in settings}
        row |= flat(point["metrics"])
        if teacher := points.get(point["teacher"]):
            row |= flat({"teacher": teacher["metrics"]})
        evidence = {control: nt_kl.get((_without_teacher(point), control)) for control in ("hard", "bayes")}
        evidence["student"] = row.get("test.nt_kl")
        # Of nearly equal predictions a KL may be rounded to below 0.
        if row["role"] == "student" and all(value is not None and value >= 0 for value in evidence.values()):
            row["test.transfer_efficiency"] = METRICS["transfer_efficiency"].value(evidence)
        rows.append(row)
    columns = dict.fromkeys([*COLUMNS, *(key for row in rows for key in sorted(row))])
    rows.sort(key=lambda row: ROLES.index(row["role"]))
    rows += [{"point": i, "state": "missing"} for i in card["points"] if i not in points]
    return DataFrame(rows, columns=list(columns))


def _columns(points: Points) -> set[str]:
    """The settings that have several values, and those of ALWAYS."""
    values: dict[str, set[str]] = {}
    for role in ROLES:  # each has settings of its own
        own = [point["settings"] for point in points.values() if point["role"] == role]
        for key in {key for settings in own for key in settings}:  # one that is left out is null, as loss.class_weight
            values.setdefault(key, set()).update(json.dumps(each.get(key), sort_keys=True) for each in own)
    return {key for key, several in values.items() if len(several) > 1 or key in ALWAYS} - {"seed"}


def _cell(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


def _labels(card: Mapping[str, Any], points: Points) -> dict[str, dict[str, Any]]:
    """The values of the study's own axes by point, of the first cell where several cells are the same student.

    A teacher has the values that all of its students share.
    """
    own = {
        cell["point"]: {axis: value for axis, value in cell["axes"].items() if axis in card["labels"]}
        for cell in reversed((*card["cells"], *card["controls"]))
    }
    of_teachers: dict[str, dict[str, Any]] = {}
    for identifier, labels in own.items():
        if teacher := points.get(identifier, {}).get("teacher"):
            shared = of_teachers.get(teacher, labels)
            of_teachers[teacher] = {axis: value for axis, value in shared.items() if labels.get(axis) == value}
    return own | of_teachers


def _nt_kl_of_controls(points: Points) -> dict[tuple[str, str], float | None]:
    """Each control's NT-KL on test, by the settings that it shares with students, its seed among them, and its kind."""
    controls = [point for point in points.values() if point["role"] == "control"]
    return {(_without_teacher(point), point["control"]): flat(point["metrics"]).get("test.nt_kl") for point in controls}


def _without_teacher(point: Any) -> str:
    """The settings that a student and its controls have in common."""
    shared = {k: v for k, v in point["settings"].items() if not k.startswith(("loss.", "teacher."))}
    return json.dumps(shared, sort_keys=True)


def sides_of(contrast: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The two or four sides of a contrast of study.json."""
    pairs = [pair for pair in (contrast, contrast["minus"]) if pair]
    return [pair[side] for pair in pairs for side in "ab"]


def differences(contrast: Mapping[str, Any], table: DataFrame) -> Series:
    """The differences of a contrast of study.json by seed, for the seeds that have a value on every side.

    table is that of `load`, with the points as its index. A difference is exactly 0 where it is rounding: of 300
    images, 230 - 202 and 272 - 244 right answers are equal; as accuracies they differ by 1e-16, which a t test over a
    few seeds of one sign takes for an effect.
    """
    from pandas import Series, concat

    metric = contrast["metric"]
    if metric not in table:
        return Series(dtype=float)
    # A side's points are paired by their own seeds: one may be missing anywhere.
    sides = [table.loc[side["points"]].set_index("seed")[metric].astype(float).dropna() for side in sides_of(contrast)]
    paired = concat(sides, axis=1, join="inner")
    total = paired.dot(SIGNS[: len(sides)])
    return total.mask(total.abs() <= ROUNDING * paired.abs().max(axis=1), 0.0)


def write_table(folder: Path) -> DataFrame:
    """Write table.csv, with every digit, and return the table."""
    table = load(folder)
    write_atomically(Folder(folder).table, lambda path: table.to_csv(path, index=False))
    return table
