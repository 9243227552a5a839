"""The page of a study: overview, contrasts, drawings, numbers, failed points and provenance."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pandas import DataFrame

from kd.config.types import flat
from kd.metrics import METRICS
from kd.report import contrasts, networks
from kd.report import formatting as fmt
from kd.report.page import Page, Section, Table
from kd.report.statistics import Effect
from kd.report.study import Study, has

STUDENT = ("test.top1", "test.agreement", "test.nll", "test.ece", "test.nt_kl", "test.predictive_kl")
TEACHER = ("train.top1", "test.top1", "test.nll", "test.ece", "test.ece_scaled", "val.post_hoc_temperature")
TEACHER += ("train.mutual_information", "train.gamma")
CONTROL = ("test.top1", "test.nll", "test.ece", "val.post_hoc_temperature", "train.mutual_information")
OF_THE_PROCESS = ("study", "output", "run", "resume", "dry_run", "list_layers")  # and not of what it trains


def study_page(study: Study) -> Page:
    """The report of a study."""
    card, effects = study.card, contrasts.effects(study)
    sections = [
        overview(study),
        contrasts.section(study, effects),
        networks.students(study),
        networks.calibration(study),
        networks.knowledge(study),
        networks.probe(study),
        networks.projections(study),
        numbers(study),
        problems(study),
        provenance(study),
    ]
    name, claim, paper = (fmt.clean(card.get(key) or "", 600) for key in ("name", "claim", "paper"))
    whole = (study.table["state"] == "finished").all()
    warning = "" if whole else fmt.note("incomplete", progress=progress(study))
    return Page(name, claim, paper, fmt.clean(card["command"], 2000), warning, sections, summary(study, effects))


def progress(study: Study) -> str:
    """The numbers of points that have finished, failed, or are missing."""
    counts = study.table["state"].value_counts()
    others = [f", {counts[state]} {state}" for state in ("failed", "missing") if state in counts]
    return f"{counts.get('finished', 0)} of {len(study.table)} finished{''.join(others)}"


def summary(study: Study, effects: Sequence[Effect]) -> str:
    """The progress of a study and the verdict of each contrast, for a terminal."""
    lines = [f"{fmt.clean(study.card['name'])}: {progress(study)}"]
    for name, column, pair, _, words in effects:
        lines.append(f"{name}: {fmt.difference(pair.mean, column)}, n = {len(pair.differences)}, {words}")
    return "\n".join(lines)


def overview(study: Study) -> Section:
    """The study at a glance."""
    card = study.card
    rows = [("points", progress(study)), ("seeds", f"{len(study.seeds)}; everything is paired by seed")]
    for axis, values in study.axes.items():
        rows.append((fmt.axis(axis), " · ".join(fmt.choice(axis, value) for value in values)))
    kinds = dict.fromkeys(control["control"] for control in card["controls"])
    rows.append(("controls", ", ".join(map(fmt.control, kinds)) or "none"))
    for data in card["data"].values():
        sizes = ", ".join(f"{fmt.clean(data.get(split))} {split}" for split in ("train", "val", "test"))
        truth = "known" if data.get("posterior") else "not known"
        classes = len(data.get("class_names") or [])
        rows.append(("data", f"{fmt.clean(data.get('name'))}: {classes} classes, {sizes}; true posterior {truth}"))
    seconds = sum(point["provenance"].get("seconds") or 0 for point in study.points.values())
    rows.append(("training time", f"{seconds / 60:.1f} minutes, the sum of what the points took"))
    rows.append(("engine", fmt.clean(card.get("engine", fmt.NOTHING))))
    return Section("The study", "The study", tables=[facts("At a glance", rows)])


def facts(title: str, rows: Iterable[tuple[str, str]], folded: bool = False) -> Table:
    """A table of names and their values."""
    return Table(title, DataFrame(rows, columns=["", " "]), folded=folded)


def numbers(study: Study) -> Section:
    """Tables of means and standard deviations: teachers, controls, students."""
    made = Section("Numbers", "Numbers", [fmt.note("numbers")])
    made.tables.append(_means(study, "Teachers", study.teachers, study.teacher_axes, TEACHER))
    if len(study.controls):
        axes = ["control", *(axis for axis in study.varying if study.controls[axis].notna().any())]
        title = "Controls: students without a teacher"
        made.tables.append(_means(study, title, study.controls, axes, CONTROL))
    columns = list(dict.fromkeys([*STUDENT, *(c for c in study.primary if not c.startswith("teacher."))]))
    table = _means(study, "Students", study.students, study.varying, columns)
    table.title, table.folded = f"Students, {len(table.frame)} cells", True
    made.tables.append(table)
    measured = {str(column).rpartition(".")[2] for column in study.table}
    reasons = [f"{m.label}: {m.misleading}" for m in METRICS.values() if m.misleading and m.name in measured]
    if reasons:
        made.notes.append(f"⚠ Misleading alone: {'; '.join(reasons)}.")
    return made


def _means(study: Study, title: str, frame: DataFrame, axes: list[str], columns: Sequence[str]) -> Table:
    shown = [column for column in columns if has(frame, column)]
    header = [*(fmt.axis(axis) for axis in axes or [""]), "n", *map(fmt.label, shown)]
    rows = []
    for key, own in frame.groupby(axes, dropna=False, sort="control" not in axes) if axes else [((), frame)]:
        finished = int((own["state"] == "finished").sum())
        places = [_choice(study, axis, place) for axis, place in zip(axes, key, strict=True)] or ["all"]
        cells = []
        for column in shown:
            known = own[column].notna().sum()
            cells.append(fmt.spread(own[column], column) + (f" (n = {known})" if 0 < known < finished else ""))
        rows.append([*places, f"{finished} of {len(study.seeds)}", *cells])
    return Table(title, DataFrame(rows, columns=header))


def _choice(study: Study, axis: str, place: Any) -> str:
    if axis == "control":
        return fmt.control(place)
    return fmt.NOTHING if place != place else fmt.choice(axis, study.axes[axis][int(place)])


def problems(study: Study) -> Section:
    """Points that failed, with their error, and points that are missing."""
    made, states = Section("Problems", "Failed and missing points"), study.table["state"]
    where = {row["point"]: f"control: {fmt.control(row['control'])}" for row in study.card["controls"]}
    for cell in study.card["cells"]:
        values = [fmt.setting(axis, value) for axis, value in cell["axes"].items() if axis in study.varying]
        where[cell["point"]] = ", ".join([*values, f"seed {cell['seed']}"])
    rows = []
    for point, state in states[states != "finished"].items():
        error = study.points[point]["error"] if state == "failed" else "has not run yet"
        rows.append([point, where.get(point, "a teacher"), fmt.clean(error, 300)])
    if not rows:
        made.notes.append(fmt.note("no_problems"))
        return made
    table = DataFrame(rows, columns=["point", "cell", "error"])
    # A study that has just begun has a long list, which only a failure makes worth reading.
    made.tables.append(Table(progress(study), table, fmt.note("failed"), folded="failed" not in set(states)))
    return made


def provenance(study: Study) -> Section:
    """Code, versions and machines of the points, and the recipe; table.csv has the settings of each point."""
    made = Section("Provenance", "Recipes and provenance")
    origins = [origin(point["provenance"]) for point in study.points.values()]
    if origins:
        frame = DataFrame(origins).value_counts(sort=False).rename("points").reset_index()
        # A study may have several data sets; what it is about says which.
        if len(frame.drop(columns=["data hash", "points"]).drop_duplicates()) > 1:
            made.notes.append(fmt.note("mixed"))
        turned = frame.astype(str).T.reset_index()  # versions are too long to stand in columns
        turned.columns = ["", *(f"origin {i + 1}" for i in range(len(frame)))]
        made.tables.append(Table("Where the points come from", turned))
    recipe = {key: value for key, value in study.card["recipe"].items() if key not in OF_THE_PROCESS}
    leaves = []
    for name, value in flat(recipe).items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        leaves.append((fmt.clean(name, 80), fmt.clean(text, 120)))
    made.tables.append(facts("The recipe that every point departs from", leaves, folded=True))
    return made


def origin(record: Mapping[str, Any]) -> dict[str, str]:
    """A provenance record of `kd.runtime.provenance` in words."""
    versions, hardware = record.get("versions") or {}, record.get("hardware") or {}
    gpus = ", ".join(map(str, hardware.get("gpus") or [])) or "no GPU"
    changed = " with uncommitted changes" if record.get("git_dirty") else ""
    words = {
        "code": f"{record.get('git_sha') or 'not from a checkout'}{changed}",
        "python": record.get("python", fmt.NOTHING),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "machine": f"{hardware.get('cpu', fmt.NOTHING)}, {hardware.get('threads', fmt.NOTHING)} thread(s), {gpus}",
        "system": record.get("system", fmt.NOTHING),
        "data hash": record.get("data_hash", fmt.NOTHING),
    }
    return {name: fmt.clean(text, 300) for name, text in words.items()}
