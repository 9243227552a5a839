"""Sections about students: a metric against the axes of the grid, and its differences to the baseline."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from kd.report import figures, words
from kd.report.blocks import Block, Cell, Figure, Fold, Section, Table, Text
from kd.report.contrasts import warning
from kd.report.figures import Heat, Line, Panel
from kd.report.reading import EPS, Study
from kd.report.statistics import paired

MOST = 16  # panels of one figure
DARK = ("nt_kl", "nt_cosine", "class_similarity_correlation", "transfer_efficiency", "agreement", "predictive_kl")
DARK += ("gamma", "class_separation", "within_total_variance", "shen_instability", "cmi")
CALIBRATED = ("ece", "ece_scaled", "nll", "brier")
Chosen = dict[str, Any]


def section(study: Study) -> Section:
    """The metrics that the study is about, along the grid."""
    blocks: list[Block] = []
    for column in study.primary:
        if study.has(column, study.grid):
            blocks += _against(study, column)
            blocks += _interaction(study, column)
    if not blocks:
        blocks.append(Text("No student has finished yet, so there is nothing to draw."))
    x = study.facets.x
    return Section("students", "Students", f"Students against {words.axis(x)}" if x else "Students", blocks)


def combinations(study: Study, axes: Iterable[str]) -> list[Chosen]:
    """Every combination of the values of some axes."""
    axes = list(axes)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*(study.axes[a] for a in axes))]


def title(chosen: Mapping[str, Any]) -> str:
    """The values of some axes in words."""
    return ", ".join(words.setting(axis, value) for axis, value in chosen.items())


def lines_of(study: Study, column: str, chosen: Chosen, x: str, line: str | None) -> list[Line]:
    """The values of a metric over seeds, along an axis, a line for each value of another."""
    found = []
    for value in study.axes[line] if line else [None]:
        at = chosen | ({line: value} if line else {})
        values: dict[int, list[float]] = {}
        for place, tick in enumerate(study.axes[x]):
            for _, points in study.group(at | {x: tick}):
                values.setdefault(place, []).extend(study.values(points, column).values())
        found.append(Line(words.setting(line, value) if line else "students", values))
    return found


def panel(study: Study, column: str, chosen: Chosen, heading: str, x: str, line: str | None) -> Panel:
    """One plot of a metric, with the controls that do not change along it."""
    varies = {axis for control in study.card["controls"] for axis in control["axes"]} - chosen.keys()
    controls = {}
    if not varies & set(study.varying):
        for kind, points in study.controls(chosen).items():
            controls[kind] = list(study.values(points, column).values())
    about = words.metric(column)
    ticks = [words.choice(x, value) for value in study.axes[x]]
    ylabel = f"{about.label}{', %' if about.percent else ''}"
    return Panel(heading, ticks, lines_of(study, column, chosen, x, line), controls, ylabel, about.percent)


def _against(study: Study, column: str) -> list[Block]:
    facets, about = study.facets, words.metric(column)
    if facets.x is None:
        return [Text(f"No drawing of {about.label}: the grid has one cell.")]
    x, line = (facets.rows, facets.x) if facets.rows else (facets.x, facets.line)
    chosen = combinations(study, [axis for axis in facets.rest if axis != facets.rows])
    panels = [panel(study, column, each, title(each), x, line) for each in chosen[:MOST]]
    for each in panels[1:]:
        each.ylabel = ""
    heading = f"{about.label[0].upper()}{about.label[1:]} against {words.axis(facets.x)}{warning(study, column)}"
    caption = "Mean over seeds; bands are one standard deviation to each side."
    if len(study.card["seeds"]) == 1:
        caption = "One seed: no band."
    if not facets.rows and study.ordered(x):
        caption += f" The values of {words.axis(x)} stand evenly, not to scale."
    if any(each.controls for each in panels):
        caption += " Horizontal lines: the controls' means."
    else:
        caption += " No control is drawn: there is none, or it changes along the drawing; see the tables."
    if len(chosen) > MOST:
        caption += f" The first {MOST} of {len(chosen)} panels."
    ordered = line is None or study.ordered(line)
    same = not set(facets.rest) & set(study.teachers[0])  # other teachers are mostly other data
    if not same:
        caption += " Each panel has its own scale."
    if facets.rows:
        caption = caption.replace("bands", "bars").replace("Horizontal", "Vertical")
        svg = figures.dots(panels, heading, ordered)
    else:
        svg = figures.lines(panels, heading, words.axis(x), ordered, same, large=True)
    return [Figure(f"against-{column}", heading, svg, caption)]


def baseline(study: Study) -> Any:
    """The value along x that the others are compared with: 0 where there is one, else the first."""
    assert study.facets.x
    values = study.axes[study.facets.x]
    return 0 if study.ordered(study.facets.x) and 0 in values else values[0]


def _interaction(study: Study, column: str) -> list[Block]:
    facets, about = study.facets, words.metric(column)
    if facets.x is None:
        return []
    rows_axis = facets.line or facets.rows
    if rows_axis is None:
        return [Text(f"No picture of an interaction: {words.axis(facets.x)} is the only axis.")]
    base = baseline(study)
    others = [value for value in study.axes[facets.x] if value != base]
    rest = combinations(study, [axis for axis in facets.rest if axis != rows_axis])
    panels = [_heat(study, column, each, rows_axis, base, others) for each in rest[:MOST]]
    if not any(panel.cells for panel in panels):
        return [Text(f"No differences of {about.label} to {words.setting(facets.x, base)}: points are missing.")]
    heading = f"{about.label[0].upper()}{about.label[1:]}: difference to {words.setting(facets.x, base)}"
    caption = (
        f"Mean of the differences paired by seed{', in points' if about.percent else ''}, ± half of the 95 % t "
        "interval; in bold where it excludes 0. Blue above 0, orange below. Exploratory: not corrected "
        "for the number of cells."
    )
    svg = figures.heat(panels, heading, words.axis(facets.x), words.axis(rows_axis), column)
    table = _heat_table(study, panels, heading, rows_axis, column)
    return [Figure(f"interaction-{column}", heading, svg, caption), Fold(f"{heading}, as a table", [table])]


def _heat(study: Study, column: str, chosen: Chosen, rows_axis: str, base: Any, others: list[Any]) -> Heat:
    x = study.facets.x
    assert x
    cells = {}
    for row, value in enumerate(study.axes[rows_axis]):
        at = chosen | {rows_axis: value}
        zero = {seed: v for _, p in study.group(at | {x: base}) for seed, v in study.values(p, column).items()}
        for col, other in enumerate(others):
            there = {seed: v for _, p in study.group(at | {x: other}) for seed, v in study.values(p, column).items()}
            if both := sorted(zero.keys() & there.keys()):
                cells[row, col] = paired([there[seed] - zero[seed] for seed in both])
    rows = [words.choice(rows_axis, value) for value in study.axes[rows_axis]]
    return Heat(title(chosen), rows, [words.choice(x, other) for other in others], cells)


def _heat_table(study: Study, panels: list[Heat], heading: str, rows_axis: str, column: str) -> Table:
    x = study.facets.x
    assert x
    header = ["", *(f"{words.axis(x)} {value}" for value in panels[0].columns)]
    rows: list[list[str | Cell]] = []
    for each in panels:
        for i, row in enumerate(each.rows):
            name = ", ".join(filter(None, [each.title, f"{words.axis(rows_axis)} {row}"]))
            cells: list[str | Cell] = []
            for j in range(len(each.columns)):
                found = each.cells.get((i, j))
                text = words.difference(found.mean, column) if found else "–"
                cells.append(
                    f"{text} {words.interval(found.t_interval, column)}" if found and found.t_interval else text
                )
            rows.append([name, *cells])
    return Table(heading, header, rows, "Mean difference and 95 % t interval.")


def typical(study: Study) -> Chosen:
    """The values of the facets' rest that the first contrast is about, else the first ones: one panel's worth."""
    points = [c["a"]["points"][0] for c in study.card["contrasts"] if c["a"]["points"]]
    for point in points:
        for cell in study.card["cells"]:
            if cell["point"] == point:
                return {axis: cell["axes"][axis] for axis in study.facets.rest}
    return {axis: study.axes[axis][0] for axis in study.facets.rest}


def metric_figure(study: Study, names: Iterable[str], name: str, heading: str, split: str = "test") -> list[Block]:
    """Small multiples of several metrics of students at one combination of the other axes; none without x or values."""
    chosen, panels, drawn = typical(study), [], []
    x, line = study.facets.x, study.facets.line
    if x is None:
        return [Text(f"{heading}: not drawn, the grid has one cell.")]
    for each in names:
        column = f"{split}.{each}"
        made = panel(study, column, chosen, heading_of(study, column), x, line)
        if any(values for each in made.lines for values in each.values.values()):
            drawn.append(column)
            panels.append(made)
    if not panels:
        return [Text(f"{heading}: not drawn, no student has these metrics.")]
    for each in panels:
        each.ylabel = ""
    caption = f"Students{f' at {title(chosen)}' if chosen else ''}: mean over seeds, ± one standard deviation."
    caption += reasons(study, drawn)
    svg = figures.lines(panels, heading, words.axis(x), line is None or study.ordered(line))
    return [Figure(name, heading, svg, caption)]


def heading_of(study: Study, column: str) -> str:
    """The title of a metric's panel."""
    about = words.metric(column)
    return f"{about.label}{', %' if about.percent else ''}{warning(study, column)}"


def reasons(study: Study, columns: Iterable[str]) -> str:
    """Why the metrics of a figure mislead, of those that are known to."""
    names = dict.fromkeys(column.rpartition(".")[2] for column in columns)
    known = [
        f"{words.metric(name).label}: {words.clean(study.misleading[name], 150)}"
        for name in names
        if name in study.misleading
    ]
    return f" ⚠ Misleading alone: {'; '.join(known)}." if known else ""


def dark_knowledge(study: Study) -> list[Block]:
    """What students know beyond the label."""
    known = any(data.get("posterior") for data in study.card["data"].values() if isinstance(data, dict))
    reference = "the true posterior" if known else "the teacher's softmax, as the true posterior is not known"
    if not any(f"test.{name}" in study.columns for name in DARK[:3]):
        return metric_figure(study, DARK, "dark-students", "Dark knowledge of students")
    about = (
        f"NT-KL, NT-cosine and class-similarity correlation compare a student's non-target classes with {reference}."
    )
    if EPS in study.varying and not known:
        about += " A smoothed teacher is then its own yardstick: what it has lost is not seen in them."
    blocks = metric_figure(study, DARK, "dark-students", "Dark knowledge of students")
    if "test.transfer_efficiency" not in study.columns or not study.has("test.transfer_efficiency", study.grid):
        about += " Transfer efficiency needs a hard-label and a Bayes-label control, and is left out."
    return [Text(about), *blocks]
