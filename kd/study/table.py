"""The points of a study as a table: `load(folder)`, and the CSV that it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.checkpoint import write_atomically
from kd.metrics import transfer_efficiency
from kd.study.folder import Folder, read_card

if TYPE_CHECKING:
    from pandas import DataFrame

ALWAYS = (  # settings that are columns even where they are the same everywhere
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
)
FIRST = ("point", "role", "control", "state", "error", "seed", "teacher_point")
ROLES = ("teacher", "control", "student")


def load(folder: str | Path) -> DataFrame:
    """The points of a study, one row each, in the order of the card's grid; see `kd.study` for the columns.

    A point that has not run yet has the state "missing". Raises ConfigError where the folder holds no study.
    """
    from pandas import DataFrame

    card = read_card(Path(folder))
    files = Folder(Path(folder))
    found = {identifier: files.found(identifier) for identifier in card["points"]}
    shown, labels = _columns(found), _labels(card)
    rows = [
        _row(point, shown, found) | {"point": identifier} | labels.get(identifier, {})
        for identifier, point in found.items()
    ]
    _add_efficiency(rows)
    columns = dict.fromkeys([*FIRST, *(key for row in rows for key in sorted(row))])
    table = DataFrame(rows, columns=list(columns))
    order = table["role"].map({role: i for i, role in enumerate(ROLES)})
    return table.assign(_order=order).sort_values(["_order", "point"]).drop(columns="_order").reset_index(drop=True)


def _row(point: Mapping[str, Any] | None, shown: set[str], found: Mapping[str, Any]) -> dict[str, Any]:
    if point is None:
        return {"state": "missing"}
    row = {key: point[key] for key in ("role", "control", "state", "error", "seed")}
    row |= {"teacher_point": point["teacher"]}
    row |= {key: _cell(value) for key, value in point["settings"].items() if key in shown}
    row |= _metrics(point)
    taught_by = found.get(point["teacher"])
    return row | ({f"teacher.{key}": value for key, value in _metrics(taught_by).items()} if taught_by else {})


def _columns(found: Mapping[str, Any]) -> set[str]:
    """Settings of which there are several values, and those of ALWAYS."""
    values: dict[str, set[str]] = {}
    for point in found.values():
        for key, value in (point or {"settings": {}})["settings"].items():
            values.setdefault(key, set()).add(json.dumps(value, sort_keys=True))
    return {key for key, several in values.items() if len(several) > 1 or key in ALWAYS} - {"seed"}


def _cell(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


def _labels(card: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The values of the study's own axes by point; the first cell's where several are the same point."""
    found: dict[str, dict[str, Any]] = {}
    for cell in (*card["cells"], *card["controls"]):
        own = {axis: value for axis, value in cell["axes"].items() if axis in card["labels"]}
        found.setdefault(cell["point"], own)
    return found


def _metrics(point: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{split}.{name}": value for split, named in point["metrics"].items() for name, value in named.items()}


def _add_efficiency(rows: list[dict[str, Any]]) -> None:
    """Transfer efficiency of each student, from the hard and the Bayes-label control of its seed and data."""
    name = "test.nt_kl"
    controls: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        if row.get("control"):
            controls.setdefault(_cohort(row), {})[row["control"]] = row.get(name)
    for row in rows:
        pair = controls.get(_cohort(row), {})
        student, hard, bayes = row.get(name), pair.get("hard"), pair.get("bayes")
        if row.get("role") == "student" and student is not None and hard is not None and bayes is not None:
            value = transfer_efficiency(student, hard, bayes)
            row["test.transfer_efficiency"] = value if math.isfinite(value) else None


def _cohort(row: Mapping[str, Any]) -> tuple:
    """What a student and its controls have in common."""
    own = {key: value for key, value in row.items() if key.startswith(("data.", "student.", "optimizer.", "train."))}
    return row.get("seed"), json.dumps(own, sort_keys=True)


def write_table(folder: Path) -> DataFrame:
    """Write table.csv, with every digit."""
    table = load(folder)
    write_atomically(Folder(folder).table, lambda path: table.to_csv(path, index=False))
    return table
