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
from kd.study.schema import FIRST

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
ROLES = ("teacher", "control", "student")


def load(folder: str | Path) -> DataFrame:
    """The points of a study, one row each, in the order of the card's grid; see `kd.study` for the columns.

    A point that has not run yet has the state "missing". Raises ConfigError where the folder holds no study.
    """
    from pandas import DataFrame

    card = read_card(Path(folder))
    files = Folder(Path(folder))
    found = {identifier: files.found(identifier) for identifier in card["points"]}
    shown, labels = _columns(found), _labels(card, found)
    rows = [
        _row(point, shown, found) | {"point": identifier} | labels.get(identifier, {})
        for identifier, point in found.items()
    ]
    _add_efficiency(rows, found)
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


def _labels(card: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The values of the study's own axes by point: the first cell's where several are the same student.

    A teacher has those that all of its students share.
    """
    own = {
        cell["point"]: {axis: value for axis, value in cell["axes"].items() if axis in card["labels"]}
        for cell in reversed((*card["cells"], *card["controls"]))
    }
    of_teachers: dict[str, dict[str, Any]] = {}
    for identifier, labels in own.items():
        teacher = (found[identifier] or {}).get("teacher")
        if teacher:
            shared = of_teachers.setdefault(teacher, labels)
            of_teachers[teacher] = {axis: value for axis, value in shared.items() if labels.get(axis) == value}
    return own | of_teachers


def _metrics(point: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{split}.{name}": value for split, named in point["metrics"].items() for name, value in named.items()}


def _add_efficiency(rows: list[dict[str, Any]], found: Mapping[str, Any]) -> None:
    """Transfer efficiency of each student, from the hard and the Bayes-label control of its seed and data."""
    finished = [row for row in rows if row["state"] == "finished"]
    controls: dict[str, dict[str, float | None]] = {}
    for row in finished:
        if row["role"] == "control":
            controls.setdefault(_cohort(found[row["point"]]), {})[row["control"]] = row.get("test.nt_kl")
    for row in finished:
        pair = controls.get(_cohort(found[row["point"]]), {})
        values = row.get("test.nt_kl"), pair.get("hard"), pair.get("bayes")
        if row["role"] == "student" and all(value is not None and value >= 0 for value in values):
            value = transfer_efficiency(*values)  # type: ignore[arg-type]
            row["test.transfer_efficiency"] = value if math.isfinite(value) else None


def _cohort(point: Mapping[str, Any]) -> str:
    """What a student and its controls have in common."""
    different = ("loss.", "teacher.")
    return json.dumps({k: v for k, v in point["settings"].items() if not k.startswith(different)}, sort_keys=True)


def write_table(folder: Path) -> DataFrame:
    """Write table.csv, with every digit; what a spreadsheet would take for a formula has a ' before it."""
    table = load(folder)
    plain = table.rename(columns=inert)
    for name in plain.columns[[column.kind == "O" for column in plain.dtypes]]:
        plain[name] = plain[name].map(inert)
    # backslashreplace: half a surrogate pair, as in a file name that is no UTF-8
    write_atomically(Folder(folder).table, lambda path: plain.to_csv(path, index=False, errors="backslashreplace"))
    return table


def inert(cell: Any) -> Any:
    """A cell that no spreadsheet computes: text that starts like a formula gets a ' in front, numbers stay numbers.

    The characters are OWASP's (CSV Injection), = + - @ and a tab. Text is on one line: a carriage return would go out
    without quotes and end the row.
    """
    if not isinstance(cell, str):
        return cell
    text = " ".join(cell.splitlines()) if len(cell.splitlines()) > 1 else cell
    if not text.lstrip(" ").startswith(("=", "+", "-", "@", "\t")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
