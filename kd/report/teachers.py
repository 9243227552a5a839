"""Sections about teachers: calibration, what their logits hold, and Müller's projections."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from kd.report import figures, words
from kd.report.blocks import Block, Cell, Figure, Section, Table, Text
from kd.report.figures import Bins, Line, Panel, Projection
from kd.report.reading import BY_SEED, EPS, Key, Study
from kd.report.students import CALIBRATED, MOST, dark_knowledge, heading_of, metric_figure, reasons

CALIBRATION = ("test.ece", "test.ece_scaled", "val.post_hoc_temperature", "test.nll")
DARK = ("train.mutual_information", "train.gamma", "test.nt_kl", "test.nt_cosine", "test.class_similarity_correlation")
DARK += ("test.class_separation", "test.within_total_variance", "train.shen_instability", "train.cmi")
WIDE = 5  # projections side by side


def calibration(study: Study) -> Section:
    """Calibration of teachers and students, and reliability diagrams of the teachers."""
    blocks = _panels(study, CALIBRATION, "calibration-teachers", "Calibration of teachers")
    blocks += _reliability(study)
    blocks += metric_figure(study, CALIBRATED, "calibration-students", "Calibration of students")
    note = (
        "ECE has 15 bins of equal width. T* is the temperature that minimises NLL on validation; “after T*” is on "
        "test. T* below 1: the network is underconfident, as smoothed ones are."
    )
    return Section("calibration", "Calibration", "Calibration", [Text(note), *blocks])


def knowledge(study: Study) -> Section:
    """Dark knowledge of students and teachers."""
    blocks: list[Block] = [*dark_knowledge(study), *_panels(study, DARK, "dark-teachers", "Dark knowledge of teachers")]
    if any(column.endswith(".mutual_information") for column in study.columns):
        about = "Müller's MI is of the difference of two logits, in nats; log 2 = 0.69 means that the training samples "
        blocks.append(Text(f"{about}of two classes have collapsed to two points."))
    return Section("knowledge", "Dark knowledge", "Dark knowledge", [*blocks, *_gamma(study)])


def _title(study: Study, key: Key, axes: list[str]) -> str:
    return ", ".join(words.setting(axis, value) for axis, value in zip(axes, key, strict=True)) or "teachers"


def _panels(study: Study, columns: tuple[str, ...], name: str, heading: str) -> list[Block]:
    """Small multiples of metrics of teachers along the first of their axes, lines for the others' combinations."""
    axes, groups = study.teachers
    if not axes:
        return [Text(f"{heading}: not drawn, no axis of this study changes its teachers or none has finished.")]
    x = EPS if EPS in axes else axes[0]
    at = axes.index(x)
    panels = []
    for column in columns:
        if not study.has(column, groups):
            continue
        rows: dict[str, Line] = {}
        for key, points in groups.items():
            other = [(axis, value) for axis, value in zip(axes, key, strict=True) if axis != x]
            label = ", ".join(words.setting(*each) for each in other) or "teachers"
            line = rows.setdefault(label, Line(label, {}))
            line.values[study.axes[x].index(key[at])] = list(study.values(points, column).values())  # type: ignore[index]
        ticks = [words.choice(x, value) for value in study.axes[x]]
        percent = words.metric(column).percent
        panels.append(Panel(heading_of(study, column), ticks, list(rows.values())[:MOST], percent=percent))
    if not panels:
        return [Text(f"{heading}: not drawn, no teacher has these metrics.")]
    svg = figures.lines(panels, heading, words.axis(x), ordered=len(panels[0].lines) == 1)
    caption = "Teachers: mean over seeds, ± one standard deviation." + reasons(study, columns)
    return [Figure(name, heading, svg, caption)]


def _details(study: Study, name: str) -> Iterator[tuple[str, list[dict[str, Any]], BY_SEED]]:
    """The title of each group of teachers with the entry of `detail` of each of its points that has one."""
    axes, groups = study.teachers
    for key, points in groups.items():
        found = [(study.points[i] or {})["detail"].get(name) for _, i in sorted(points.items())]
        if found := [each for each in found if isinstance(each, dict)]:
            yield _title(study, key, axes), found, points


def _reliability(study: Study) -> list[Block]:
    panels = []
    for title, found, _ in _details(study, "reliability"):
        count = np.array([each["count"] for each in found], dtype=float)
        means = [np.array([each[k] for each in found], dtype=float) for k in ("confidence", "accuracy")]
        total = count.sum(0)
        pooled = [np.nansum(count * m, axis=0) / np.where(total > 0, total, 1) for m in means]
        panels.append(Bins(title, total, *pooled))
    if not panels:
        return [Text("No reliability diagrams: no teacher has finished.")]
    svg = figures.reliability(panels[:MOST], "Reliability diagrams of teachers")
    caption = (
        "Test samples of all seeds together in 15 bins. Below the diagonal: overconfident. Grey: the share of samples."
    )
    return [Figure("reliability", "Reliability of teachers", svg, caption)]


def _gamma(study: Study) -> list[Block]:
    series = []
    for title, found, _ in _details(study, "gamma"):
        curves = np.array([each["gamma"] for each in found], dtype=float)
        sd = curves.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(curves.shape[1])
        series.append((title, found[0]["temperature"], curves.mean(0).tolist(), sd.tolist()))
    if not series:
        return [Text("No γ(T): no teacher has finished.")]
    svg = figures.curves(series[:MOST], "γ against temperature", "temperature", "γ(T)", ordered=True)
    caption = (
        "Müller's γ(T), the probability of the wrong classes in units of the uniform distribution, of teachers on "
        "their training set; mean over seeds, ± one standard deviation."
    )
    return [Figure("gamma", "γ(T) of teachers", svg, caption + reasons(study, ["gamma"]))]


def probe(study: Study) -> Section:
    """What the probe makes of teachers whose smoothing is known."""
    heading, (axes, groups) = "The teachers' smoothing, estimated from their logits", study.teachers
    splits = [split for split in ("train", "val", "test") if study.has(f"{split}.smoothing_estimate", groups)]
    if not splits:
        return Section("probe", "Probe", heading, [Text("No teacher has an estimate of its smoothing.")])
    header = ["teacher", "trained with", *(f"{split}, estimate" for split in splits)]
    header += [*(f"{split}, interval holds it" for split in splits), "doubts on train"]
    rows: list[list[str | Cell]] = []
    for key, points in groups.items():
        found = [study.points[i] or {} for i in points.values()]
        truth = {words.number(point.get("settings", {}).get(EPS)) or 0.0 for point in found}
        row: list[str | Cell] = [_title(study, key, axes), ", ".join(f"{eps:g}" for eps in sorted(truth))]
        row += [words.spread([*study.values(points, f"{split}.smoothing_estimate").values()], "") for split in splits]
        row += [_held(study, points, split, max(truth)) for split in splits]
        rows.append([*row, _doubts(found)])
    note = (
        "Mean ± standard deviation over seeds. The estimate is for training-like data; the rest shows where it fails."
    )
    return Section("probe", "Probe", heading, [*_estimates(study, splits), Table("Estimates", header, rows, note)])


def _doubts(points: list[dict[str, Any]]) -> str:
    """What speaks against the estimates, one of each kind with the number of teachers; they differ in their numbers."""
    said: dict[str, list[str]] = {}
    for point in points:
        for doubt in point.get("detail", {}).get("smoothing_doubts") or ():
            said.setdefault(re.sub(r"\d[\d.]*", "", str(doubt)), []).append(words.clean(doubt, 120))
    return "; ".join(f"{texts[0]} ({len(texts)} of {len(points)})" for texts in said.values()) or "none"


def _held(study: Study, points: BY_SEED, split: str, truth: float) -> str:
    low, high = (study.values(points, f"{split}.smoothing_{end}") for end in ("low", "high"))
    both = low.keys() & high.keys()
    return f"{sum(low[seed] <= truth <= high[seed] for seed in both)} of {len(both)}"


def _estimates(study: Study, splits: list[str]) -> list[Block]:
    """Estimate against truth, a panel for each combination of the other axes of teachers."""
    axes, groups = study.teachers
    if EPS not in axes:
        return []
    at, eps = axes.index(EPS), study.axes[EPS]
    panels: dict[str, Panel] = {}
    for key, points in groups.items():
        other = [(axis, value) for axis, value in zip(axes, key, strict=True) if axis != EPS]
        name = ", ".join(words.setting(*each) for each in other)
        lines = [Line(split, {}) for split in splits] + [Line("truth", {i: [e] for i, e in enumerate(eps)})]
        made = panels.setdefault(name, Panel(name, [f"{e:g}" for e in eps], lines, ylabel="estimate"))
        for line, split in zip(made.lines, splits, strict=False):
            values = list(study.values(points, f"{split}.smoothing_estimate").values())
            line.values[eps.index(key[at])] = values  # type: ignore[index]
    svg = figures.lines(
        list(panels.values())[:MOST], "Estimate against truth", words.axis(EPS), False, True, large=True
    )
    caption = "The estimate on each split, mean over seeds ± one standard deviation, and the ε that was trained with."
    return [Figure("probe", "Estimate against truth", svg, caption)]


def projections(study: Study) -> Section:
    """Müller's picture of the first seed's teachers, on training and test samples."""
    heading = "Müller's projections"
    found = [(title, each[0], points) for title, each, points in _details(study, "projection")][:WIDE]
    if not found:
        return Section(
            "projections", "Projections", heading, [Text("Not drawn: no teacher with a linear head has finished.")]
        )
    teacher = study.points[next(iter(dict(sorted(found[0][2].items())).values()))] or {}
    classes = found[0][1]["classes"]
    names = _class_names(study, teacher, classes)
    panels = []
    for split in ("train", "test"):
        for title, each, _ in found:
            own = each[split]
            label = f"{title}, {'training' if split == 'train' else split}"
            points = np.array(own["points"], dtype=float).reshape(-1, 2)
            panels.append(Projection(label, points, np.array(own["labels"])))
    svg = figures.projections(panels, names, "Müller's projections of teachers", len(found))
    caption = (
        f"Penultimate features of at most 100 samples of each of three classes on the plane through the three classes' "
        f"weights (Müller et al. 2019); teachers of seed {teacher.get('seed', 0)}, each picture in its own scale."
    )
    return Section(
        "projections",
        "Projections",
        heading,
        [Figure("projections", "Training and test samples of three classes", svg, caption)],
    )


def _class_names(study: Study, teacher: dict[str, Any], classes: list[int]) -> dict[int, str]:
    data = study.card["data"].get(teacher.get("provenance", {}).get("data_hash")) or {}
    names = data.get("class_names") or []
    return {c: words.clean(names[c] if 0 <= c < len(names) else c, 28) for c in classes}
