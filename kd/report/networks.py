"""A study's sections of drawings: its students, calibration, dark knowledge, the smoothing probe and projections."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from kd.metrics.registry import SPLITS
from kd.report import figures
from kd.report import formatting as fmt
from kd.report.figures import Panel
from kd.report.page import Figure, Section, Table
from kd.report.study import EPS, Study, has

MOST = 16  # plots of one figure
WIDE = 5  # projections side by side
CALIBRATED = ("test.ece", "test.ece_scaled", "val.post_hoc_temperature", "test.nll")
KNOWLEDGE = ("test.nt_kl", "test.nt_cosine", "test.class_similarity_correlation", "test.transfer_efficiency")
KNOWLEDGE += ("test.agreement", "test.predictive_kl", "train.mutual_information", "train.gamma")
KNOWLEDGE += ("test.class_separation", "test.within_total_variance", "train.shen_instability", "train.cmi")


def alike(networks: DataFrame, row: Series, axes: list[str]) -> DataFrame:
    """The networks that have a row's values on some axes."""
    return networks[(networks[axes] == row[axes]).all(axis=1)]


def panel(study: Study, networks: DataFrame, column: str, title: str, x: str, line: list[str]) -> Panel:
    """A metric of some networks along axis x, one line for each combination of the axes `line`.

    Students come with the means of the controls that do not vary within the plot.
    """
    known = networks.dropna(subset=[column])
    labels = [study.names(dict(row[line])) or "all" for _, row in known.iterrows()]
    values = {"x": known[x].astype(int), "line": labels, "value": fmt.scale(column) * known[column]}
    made = Panel(title, DataFrame(values))
    varying = [axis for axis in study.varying if study.controls[axis].notna().any()]
    if "student" in set(known["role"]) and has(study.controls, column) and not {x, *line} & set(varying):
        own = alike(study.controls, networks.iloc[0], varying)
        means = fmt.scale(column) * own.groupby("control", sort=False)[column].mean().dropna()
        made.controls = {f"control: {fmt.control(str(kind))}": mean for kind, mean in means.items()}
    return made


# ---- students


def students(study: Study) -> Section:
    """The study's primary metrics along the grid."""
    x, lines, rest = study.facets
    made = Section("Students", f"Students against {fmt.axis(x)}" if x else "Students")
    # Other teachers are mostly other data, whose accuracies have little to do with each other.
    share = not set(rest) & set(study.teacher_axes)
    for column in [column for column in study.primary if x and has(study.students, column)]:
        groups = study.groups(study.students, rest)[:MOST]
        panels = [panel(study, own, column, title, x, lines) for title, own in groups]
        panels[0].ylabel = fmt.with_unit(column)
        svg = figures.lines(panels, fmt.axis(x), study.ticks(x), share)
        made.figures.append(Figure.named("against", svg, metric=fmt.label(column), x=fmt.axis(x)))
    return made


# ---- several metrics


def metrics(study: Study, columns: Sequence[str], heading: str) -> list[Figure]:
    """Small plots of several metrics: of teachers, along the first of their axes, and of students.

    The students' axes that are neither x nor lines are at the values of the first contrast.
    """
    x, lines, rest = study.facets
    points = [point for contrast in study.card["contrasts"] for point in contrast["a"]["points"][:1]]
    row = study.students.iloc[study.students["point"].isin(points).argmax()]  # the first of all without contrasts
    students = alike(study.students, row, rest)
    where = f" at {study.names(dict(row[rest]))}" if rest else ""
    teachers_x, *teachers_lines = sorted(study.teacher_axes, key=lambda axis: axis != EPS) or [""]
    made = []
    for whose, networks, along, beside in (
        ("teachers", study.teachers, teachers_x, teachers_lines),
        (f"students{where}", students, x, lines),
    ):
        known = [column for column in columns if has(networks, column)]
        if along and known:
            panels = [panel(study, networks, column, fmt.with_unit(column), along, beside) for column in known]
            svg = figures.lines(panels, fmt.axis(along), study.ticks(along))
            made.append(Figure.named("metrics", svg, heading=heading, whose=whose))
    return made


def details(study: Study, name: str) -> dict[str, list[Any]]:
    """One entry of the points' `detail` for all teachers that have it, by the values of their axes in words."""
    entries = {}
    for title, own in study.groups(study.teachers, study.teacher_axes)[:MOST]:
        known = [study.points[point]["detail"].get(name) for point in own["point"]]
        entries[title or "teachers"] = [entry for entry in known if entry is not None]
    return {title: known for title, known in entries.items() if known}


# ---- the other sections


def calibration(study: Study) -> Section:
    """Calibration of teachers and students, and reliability diagrams of the teachers."""
    made = Section("Calibration", "Calibration", [fmt.note("calibration")])
    made.figures += metrics(study, CALIBRATED, "Calibration")
    if bins := {title: first for title, (first, *_) in details(study, "reliability").items()}:
        made.figures.append(Figure.named("reliability", figures.reliability(bins), whose="teachers, the first seed"))
    return made


def knowledge(study: Study) -> Section:
    """Dark knowledge of students and teachers."""
    known = any(data.get("posterior") for data in study.card["data"].values())
    reference = "the true posterior" if known else "the teacher's softmax, as the true posterior is not known"
    notes = [fmt.note("reference", reference=reference)]
    if EPS in study.varying and not known:
        notes.append(fmt.note("yardstick"))
    if not has(study.students, "test.transfer_efficiency"):
        notes.append(fmt.note("no_efficiency"))
    made = Section("Dark knowledge", "Dark knowledge", [" ".join(notes), fmt.note("collapse")])
    made.figures += metrics(study, KNOWLEDGE, "Dark knowledge")
    if entries := details(study, "gamma"):
        temperatures = next(iter(entries.values()))[0]["temperature"]
        curves = [
            DataFrame({"x": range(len(temperatures)), "line": title, "value": entry["gamma"]})
            for title, own in entries.items()
            for entry in own
        ]
        drawn = Panel("", pd.concat(curves), ylabel="γ(T)")
        svg = figures.lines([drawn], "temperature", [f"{temperature:g}" for temperature in temperatures])
        made.figures.append(Figure.named("gamma", svg))
    return made


def probe(study: Study) -> Section:
    """Estimates of the teachers' smoothing beside the known values."""
    made = Section("Probe", "The teachers' smoothing, estimated from their logits")
    splits = [split for split in SPLITS if has(study.teachers, f"{split}.smoothing_estimate")]
    if not splits:
        return made
    rows = []
    for title, own in study.groups(study.teachers, study.teacher_axes):
        truth = Series([study.points[point]["settings"].get(EPS, 0.0) for point in own["point"]], own.index)
        row = {"teacher": title or "teachers", "trained with": ", ".join(f"{eps:g}" for eps in sorted(set(truth)))}
        row |= {f"{split}, estimate": fmt.spread(own[f"{split}.smoothing_estimate"], "") for split in splits}
        for split in splits:
            low, high = own[f"{split}.smoothing_low"], own[f"{split}.smoothing_high"]
            holds = ((low <= truth) & (truth <= high)).sum()
            row[f"{split}, interval holds it"] = f"{holds} of {(low + high).notna().sum()}"
        rows.append(row | {"doubts on train": _doubts(study, own["point"].tolist())})
    made.tables.append(Table("Estimates", DataFrame(rows), fmt.note("probe")))
    return made


def _doubts(study: Study, points: list[str]) -> str:
    """The doubts about the estimates, each with the number of teachers it concerns; their numbers differ by teacher."""
    said = [doubt for point in points for doubt in study.points[point]["detail"].get("smoothing_doubts") or ()]
    counts = Counter(re.sub(r"\d[\d.]*", "…", doubt) for doubt in said)
    return "; ".join(f"{fmt.clean(doubt, 120)} ({n} of {len(points)})" for doubt, n in counts.items()) or "none"


def projections(study: Study) -> Section:
    """Müller's picture of the first seed's teachers, on training and test samples."""
    made = Section("Projections", "Müller's projections")
    entries = {title: each[0] for title, each in itertools.islice(details(study, "projection").items(), WIDE)}
    if not entries:
        return made
    first = study.teachers.iloc[0]
    data = study.card["data"].get(study.points[first["point"]]["provenance"].get("data_hash"), {})
    known = dict(enumerate(data.get("class_names") or ()))
    classes = {c: fmt.clean(known.get(c, c), 28) for c in next(iter(entries.values()))["classes"]}
    panels = {}
    for split, name in (("train", "training"), ("test", "test")):
        for title, entry in entries.items():
            points = np.array(entry[split]["points"], float).reshape(-1, 2)
            panels[f"{title}, {name}"] = points, np.array(entry[split]["labels"])
    svg = figures.scatter(panels, classes, len(entries))
    made.figures.append(Figure.named("projections", svg, seed=first["seed"]))
    return made
