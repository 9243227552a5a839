"""Table of a study: its points as a DataFrame, and as the CSV that `kd.study` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.checkpoint.files import write_atomically
from kd.metrics import METRICS
from kd.study.folder import Folder
from kd.study.grid import difference, sides_of
from kd.study.schema import COLUMNS

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Points = Mapping[str, dict[str, Any] | None]  # by id; None for a point that has not run
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


def load(folder: str | Path) -> DataFrame:
    """The points of a study, one row each, sorted by role and id; see `kd.study` for the columns.

    A point that has not run yet has the state "missing". Raises ConfigError where the directory holds no study, or one
    of another version of kd.
    """
    from pandas import DataFrame

    files = Folder(folder)
    card = files.read_card()
    points: Points = {identifier: files.read_point(identifier) for identifier in card["points"]}
    settings, labels = _columns(points.values()), _labels(card, points)
    rows = [_row(i, point, points, settings) | labels.get(i, {}) for i, point in points.items()]
    _add_efficiency(rows, points)
    columns = dict.fromkeys([*COLUMNS, *(key for row in rows for key in sorted(row))])
    rows.sort(key=lambda row: (ROLES.index(row["role"]) if "role" in row else len(ROLES), row["point"]))
    return DataFrame(rows, columns=list(columns))


def _row(identifier: str, point: dict[str, Any] | None, points: Points, settings: set[str]) -> dict[str, Any]:
    if point is None:
        return {"point": identifier, "state": "missing"}
    row = {"point": identifier} | {key: point[key] for key in ("role", "control", "state", "error", "seed")}
    row |= {"teacher_point": point["teacher"]}
    row |= {key: _cell(value) for key, value in point["settings"].items() if key in settings}
    teacher = points.get(point["teacher"] or "")
    return row | _metrics(point) | ({f"teacher.{k}": v for k, v in _metrics(teacher).items()} if teacher else {})


def _columns(points: Iterable[dict[str, Any] | None]) -> set[str]:
    """The settings that have several values, and those of ALWAYS."""
    values: dict[str, set[str]] = {}
    for point in filter(None, points):
        for key, value in point["settings"].items():
            values.setdefault(key, set()).add(json.dumps(value, sort_keys=True))
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
        if teacher := (points[identifier] or {}).get("teacher"):
            shared = of_teachers.get(teacher, labels)
            of_teachers[teacher] = {axis: value for axis, value in shared.items() if labels.get(axis) == value}
    return own | of_teachers


def _metrics(point: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{split}.{name}": value for split, named in point["metrics"].items() for name, value in named.items()}


def _add_efficiency(rows: list[dict[str, Any]], points: Points) -> None:
    """Add each student's transfer efficiency, which needs the hard and the Bayes control of its seed and data."""
    finished = [(row, _without_teacher(points[row["point"]])) for row in rows if row["state"] == "finished"]
    nt_kl = {(shared, row["control"]): row.get("test.nt_kl") for row, shared in finished if row["role"] == "control"}
    for row, shared in finished:
        evidence = {
            "student": row.get("test.nt_kl"),
            "hard": nt_kl.get((shared, "hard")),
            "bayes": nt_kl.get((shared, "bayes")),
        }
        # Of nearly equal predictions a KL may be rounded to below 0.
        if row["role"] == "student" and all(value is not None and value >= 0 for value in evidence.values()):
            row["test.transfer_efficiency"] = METRICS["transfer_efficiency"].value(evidence)


def _without_teacher(point: Any) -> str:
    """The settings that a student and its controls have in common."""
    shared = {k: v for k, v in point["settings"].items() if not k.startswith(("loss.", "teacher."))}
    return json.dumps(shared, sort_keys=True)


def differences(contrast: Mapping[str, Any], table: DataFrame) -> Series:
    """The differences of a contrast of study.json by seed, for the seeds that have a value on every side.

    a - b, or (a - b) - (minus.a - minus.b); table is that of `load`, with the points as its index.
    """
    from pandas import Series, concat

    metric = contrast["metric"]
    if metric not in table:
        return Series(dtype=float)
    # A side's points are paired by their own seeds: one may be missing anywhere.
    sides = [table.loc[side["points"]].set_index("seed")[metric].astype(float).dropna() for side in sides_of(contrast)]
    paired = concat(sides, axis=1, join="inner")
    return Series({seed: difference(values) for seed, *values in paired.itertuples()}, dtype=float)


def write_table(folder: Path) -> DataFrame:
    """Write table.csv, with every digit, and return the table."""
    table = load(folder)
    write_atomically(Folder(folder).table, lambda path: table.to_csv(path, index=False))
    return table
