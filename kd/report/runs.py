"""Sections of plain record: what the study is, its numbers, what went wrong, and how to run each point again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kd.report import words
from kd.report.blocks import Block, Cell, Code, Facts, Fold, Section, Table, Text
from kd.report.contrasts import warning
from kd.report.figures import CONTROLS
from kd.report.reading import BY_SEED, Key, Study, hashable

STUDENT = ("test.top1", "test.agreement", "test.nll", "test.ece", "test.nt_kl", "test.predictive_kl")
TEACHER = ("train.top1", "test.top1", "test.nll", "test.ece", "test.ece_scaled", "val.post_hoc_temperature")
TEACHER += ("train.mutual_information", "train.gamma")
CONTROL = ("test.top1", "test.nll", "test.ece", "val.post_hoc_temperature", "train.mutual_information")
OWN = ("study", "output", "run", "resume", "dry_run", "list_layers")  # of the process, not of what it trains
Row = list[str | Cell]


def overview(study: Study) -> Section:
    """The study at a glance."""
    card, states = study.card, study.states()
    facts = [("points", _progress(study)), ("seeds", f"{len(card['seeds'])}; everything is paired by seed")]
    for axis in study.axes:
        facts.append((words.axis(axis), " · ".join(words.choice(axis, value) for value in study.axes[axis])))
    kinds = dict.fromkeys(control["control"] for control in card["controls"])
    facts.append(("controls", ", ".join(kind(each) for each in kinds) or "none"))
    for data in card["data"].values():
        names = data.get("class_names") or []
        sizes = ", ".join(f"{words.clean(data.get(split))} {split}" for split in ("train", "val", "test"))
        truth = "known" if data.get("posterior") else "not known"
        facts.append(
            ("data", f"{words.clean(data.get('name'))}: {len(names)} classes, {sizes}; true posterior {truth}")
        )
    seconds = [(study.points[i] or {})["provenance"].get("seconds") for i in states["finished"]]
    total = sum(s for s in map(words.number, seconds) if s is not None)
    facts.append(("training time", f"{total / 60:.1f} minutes, the sum of what the points took"))
    facts.append(("engine", words.clean(card.get("engine", "–"))))
    return Section("overview", "The study", "The study", [Facts(facts)])


def kind(control: str) -> str:
    """What a control is taught with."""
    return CONTROLS.get(control, words.clean(control)).removeprefix("control: ")


def _progress(study: Study) -> str:
    states = study.states()
    text = f"{len(states['finished'])} of {len(study.points)} finished"
    return text + "".join(f", {len(states[name])} {name}" for name in ("failed", "missing") if states[name])


def incomplete(study: Study) -> str:
    """A sentence for the top of the page where points are missing or have failed, else nothing."""
    states = study.states()
    if not states["failed"] and not states["missing"]:
        return ""
    return f"This study is not complete: {_progress(study)}. What stands below may change when it is."


def numbers(study: Study) -> Section:
    """Tables of means and standard deviations: teachers, controls, students."""
    axes, teachers = study.teachers
    blocks: list[Block] = [_means(study, "Teachers", axes, teachers, TEACHER)]
    blocks.append(_controls(study))
    columns = list(dict.fromkeys([*STUDENT, *(c for c in study.primary if not c.startswith("teacher."))]))
    names = [axis for axis in study.axes if axis in study.varying]
    grid = {
        tuple(v for axis, v in zip(study.axes, key, strict=True) if axis in names): p for key, p in study.grid.items()
    }
    blocks.append(Fold(f"Students, {len(grid)} cells", [_means(study, "Students", names, grid, columns)]))
    note = "Mean ± standard deviation over seeds, last weights; accuracies, agreement and ECE in %; table.csv has more."
    return Section("numbers", "Numbers", "Numbers", [Text(note), *blocks, _misleading(study)])


def _means(study: Study, title: str, axes: list[str], groups: Mapping[Key, BY_SEED], columns: Any) -> Table:
    shown = [column for column in columns if study.has(column, groups)]
    header = [*(words.axis(axis) for axis in axes), *([] if axes else [""]), "n"]
    header += [words.metric(column).label + warning(study, column) for column in shown]
    rows: list[Row] = []
    for key, points in groups.items():
        n = sum(1 for i in points.values() if (study.points.get(i) or {}).get("state") == "finished")
        names = [words.choice(axis, value) for axis, value in zip(axes, key, strict=True)] or ["all"]
        cells = [_spread([*study.values(points, column).values()], column, n) for column in shown]
        rows.append([*names, f"{n} of {len(study.card['seeds'])}", *cells])
    return Table(title, header, rows)


def _spread(values: list[float], column: str, n: int) -> str:
    """Mean and deviation; where some of the n points lack the metric, of how many they are."""
    few = f" (n = {len(values)})" if 0 < len(values) < n else ""
    return words.spread(values, column) + few


def _controls(study: Study) -> Block:
    groups: dict[Key, BY_SEED] = {}
    axes = list(dict.fromkeys(axis for control in study.card["controls"] for axis in control["axes"]))
    axes = [axis for axis in axes if axis in study.varying]
    for control in study.card["controls"]:
        key = (kind(control["control"]), *(hashable(control["axes"].get(axis)) for axis in axes))
        groups.setdefault(key, {})[control["seed"]] = control["point"]
    if not groups:
        return Text("This study has no controls: students trained without a teacher.")
    return _means(study, "Controls: students without a teacher", ["control", *axes], groups, CONTROL)


def _misleading(study: Study) -> Block:
    rows: list[Row] = []
    for name, why in study.misleading.items():
        if any(column.rpartition(".")[2] == name for column in study.columns):
            rows.append([words.metric(name).label, words.clean(why, 200)])
    if not rows:
        return Text("None of the metrics printed here is known to mislead.")
    return Table("Metrics that mislead where they stand alone", ["metric", "why"], rows)


def problems(study: Study) -> Section:
    """Points that failed, with their error, and points that are missing."""
    states, rows = study.states(), []
    for i in states["failed"]:
        point = study.points[i] or {}
        error = Cell(words.clean(point.get("error") or "no message", 300), "warning")
        rows.append([i, words.clean(point["role"]), str(point["seed"]), _where(study, i), error])
    blocks: list[Block] = []
    if rows:
        blocks.append(Table("Failed", ["point", "role", "seed", "cell", "error"], rows))
        blocks.append(Text("A failed point is tried again by the same command."))
    else:
        blocks.append(Text("No point has failed."))
    if missing := states["missing"]:
        table = Table("Missing", ["point", "cell"], [[i, _where(study, i)] for i in missing])
        blocks.append(Fold(f"{len(missing)} points have not run yet", [table]))
    else:
        blocks.append(Text("No point is missing."))
    return Section("problems", "Problems", "Failed and missing points", blocks)


def _where(study: Study, identifier: str) -> str:
    """Where a point stands in the study."""
    for cell in study.card["cells"]:
        if cell["point"] == identifier:
            return (
                ", ".join(words.setting(a, v) for a, v in cell["axes"].items() if a in study.varying) or "the only cell"
            )
    for control in study.card["controls"]:
        if control["point"] == identifier:
            return f"control: {kind(control['control'])}"
    return "a teacher, or a side of a contrast"


def provenance(study: Study) -> Section:
    """What ran, on what, with which versions, and the settings of every point."""
    blocks: list[Block] = []
    groups: dict[str, list[str]] = {}
    for i, point in study.points.items():
        if point:
            groups.setdefault(json.dumps(_origin(point["provenance"]), sort_keys=True), []).append(i)
    if not groups:
        groups[json.dumps(_origin(study.card["provenance"]), sort_keys=True)] = []
    for text, members in groups.items():
        blocks.append(
            Text(f"{len(members)} points came from:" if members else "No point yet; the study was planned on:")
        )
        blocks.append(Facts([(key, words.clean(value, 300)) for key, value in json.loads(text).items()]))
    # A study may have several data sets; the card says which.
    made_by = {tuple(v for k, v in json.loads(text).items() if k != "data hash") for text in groups}
    if len(made_by) > 1:
        blocks.insert(0, Text("Points of this study came from different code, versions or machines:", "warning"))
    recipe = {key: value for key, value in study.card["recipe"].items() if key not in OWN}
    blocks.append(Fold("The recipe that every point departs from", [Code(_nested(recipe))]))
    for role in ("teacher", "control", "student"):
        members = [i for i, point in study.points.items() if point and point["role"] == role]
        if members:
            blocks.append(Fold(f"Settings of each {role}: {len(members)} points", _settings(study, members)))
    return Section("provenance", "Provenance", "Recipes and provenance", blocks)


def _origin(found: Mapping[str, Any]) -> dict[str, str]:
    versions = found.get("versions") or {}
    hardware = found.get("hardware") or {}
    gpus = ", ".join(map(str, hardware.get("gpus") or [])) or "no GPU"
    sha = found.get("git_sha") or "not from a checkout"
    return {
        "code": f"{sha}{' with uncommitted changes' if found.get('git_dirty') else ''}",
        "python": str(found.get("python", "–")),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "machine": f"{hardware.get('cpu', '–')}, {hardware.get('threads', '–')} thread(s), {gpus}",
        "system": str(found.get("system", "–")),
        "data hash": str(found.get("data_hash", "–")),
    }


def _settings(study: Study, members: list[str]) -> list[Block]:
    """The settings that all members have, and a row for each with those that differ."""
    texts = {i: {k: _plain(v) for k, v in (study.points[i] or {})["settings"].items()} for i in members}
    names = sorted({name for own in texts.values() for name in own})
    common = {n: {own.get(n, "–") for own in texts.values()} for n in names}
    same = [(words.clean(n, 80), values.copy().pop()) for n, values in common.items() if len(values) == 1]
    differ = [n for n in names if len(common[n]) > 1]
    header = ["point", *(words.clean(n, 80) for n in differ), "teacher", "state", "seconds", "job"]
    rows: list[Row] = []
    for i in members:
        point = study.points[i] or {}
        seconds = words.number(point["provenance"].get("seconds"))
        job = words.clean(point["provenance"].get("job") or "–")
        last = [words.clean(point["teacher"] or "–"), words.clean(point["state"]), words.shown(seconds, digits=1), job]
        rows.append([i, *(texts[i].get(n, "–") for n in differ), *last])
    shared = Code("\n".join(f"{name}: {value}" for name, value in same))
    return [Text("All of them:"), shared, Table("What differs", header, rows)]


def _plain(value: Any) -> str:
    return words.clean(value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str), 120)


def _nested(values: Mapping[str, Any], indent: int = 0) -> str:
    """Nested settings, one on each line."""
    lines = []
    for key, value in values.items():
        name = " " * indent + words.clean(key, 80)
        if isinstance(value, dict) and value:
            lines += [f"{name}:", _nested(value, indent + 2)]
        else:
            lines.append(f"{name}: {_plain(value)}")
    return "\n".join(lines)
