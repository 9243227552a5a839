"""The drawings of a report; each takes values and gives an `svg` element, see `kd.report.drawing`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from kd.report import words
from kd.report.drawing import INK, MARKERS, MUTED, NEGATIVE, NULL, PAGE, POSITIVE, category, drawn, finish, step
from kd.report.statistics import Paired

COLUMNS = 4
WIDTH = 11.2  # inches, of a page
DASHES = {"hard": (0, (5, 2)), "smoothed": (0, (1, 1.5)), "bayes": (0, (5, 1.5, 1, 1.5))}
CONTROLS = {"hard": "control: hard labels", "smoothed": "control: smoothed labels", "bayes": "control: Bayes labels"}
TONES = {1: POSITIVE, -1: NEGATIVE, 0: NULL}


@dataclass
class Line:
    """Values over seeds at several places along x."""

    label: str
    values: Mapping[int, Sequence[float]]  # by place; none where nothing is known


@dataclass
class Panel:
    """One plot: lines over the places `ticks`, and controls at heights of their own."""

    title: str
    ticks: Sequence[str]
    lines: Sequence[Line]
    controls: Mapping[str, Sequence[float]] = field(default_factory=dict)
    ylabel: str = ""
    percent: bool = False


def _grid(
    n: int,
    label: str,
    draw: Callable[[list[Axes], int], dict[str, Any]],
    share: bool = False,
    columns: int = COLUMNS,
    legend: Sequence[str] = (),
    widest: float = 4.6,
) -> str:
    """n panels in rows; `draw` fills them, given how many characters fit, and returns what the legend has by name."""
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    width = min(widest, WIDTH / columns)
    beside = max(1, min(6, int(12.5 * width * columns / (8 + max(map(len, legend), default=0)))))
    above = 0.22 * math.ceil(len(legend) / beside) + 0.2
    with drawn(width * columns, max(2.3, 0.58 * width) * rows + above) as figure:
        axes = figure.subplots(rows, columns, sharey=share, squeeze=False).ravel().tolist()
        for spare in axes[n:]:
            spare.set_visible(False)
        handles = draw(axes[:n], int(11 * width))
        if len(handles) > 1:
            figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=beside, markerscale=1.2)
        return finish(figure, label)


def lines(
    panels: Sequence[Panel], label: str, xlabel: str, ordered: bool = True, share: bool = False, large: bool = False
) -> str:
    """Small multiples: the mean over seeds along x, with a band of one standard deviation to each side."""

    def draw(axes: list[Axes], fits: int) -> dict[str, Any]:
        handles: dict[str, Any] = {}
        for ax, panel in zip(axes, panels, strict=True):
            _lines(ax, panel, ordered, handles)
            ax.set_xlabel(xlabel)
            ax.set_title(textwrap.fill(panel.title, fits))
        return handles

    names = {line.label for panel in panels for line in panel.lines}
    names |= {_control(kind) for panel in panels for kind in panel.controls}
    columns = 2 if large and len(panels) in (2, 4) else COLUMNS
    return _grid(len(panels), label, draw, share, columns, sorted(names))


def _control(kind: str) -> str:
    return CONTROLS.get(kind, words.clean(kind))


def _lines(ax: Axes, panel: Panel, ordered: bool, handles: dict[str, Any]) -> None:
    scale = 100 if panel.percent else 1
    opacity = 0.14 if len(panel.lines) <= 4 else 0.06
    for i, line in enumerate(panel.lines):
        colour = step(i, len(panel.lines)) if ordered else category(i)
        places = [place for place in range(len(panel.ticks)) if len(line.values.get(place, ()))]
        values = [scale * np.asarray(line.values[place]) for place in places]
        mean = np.array([v.mean() for v in values])
        sd = np.array([v.std(ddof=1) if len(v) > 1 else 0.0 for v in values])
        ax.fill_between(places, mean - sd, mean + sd, color=colour, alpha=opacity, linewidth=0)
        (drawn_line,) = ax.plot(
            places, mean, color=colour, marker=MARKERS[i % len(MARKERS)], markeredgecolor=PAGE, markeredgewidth=0.7
        )
        handles.setdefault(line.label, drawn_line)
    for kind, values in panel.controls.items():
        if len(values):
            height = scale * float(np.mean(values))
            style = DASHES.get(kind, "-.")
            handles.setdefault(_control(kind), ax.axhline(height, color=INK, ls=style, lw=1.2))
    ax.set_ylabel(textwrap.fill(panel.ylabel, 30))
    ax.set_xticks(range(len(panel.ticks)), [words.clean(tick, 14) for tick in panel.ticks])
    ax.margins(x=0.06)


def dots(panels: Sequence[Panel], label: str, ordered: bool) -> str:
    """Many places as rows: the mean over seeds of each line with a bar of one standard deviation to each side."""
    rows = max(len(panel.ticks) for panel in panels)
    names = [line.label for line in panels[0].lines]
    with drawn(min(WIDTH, 4 + 4.5 * len(panels)), 0.3 * rows + 0.9) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False).ravel().tolist()
        handles: dict[str, Any] = {}
        for ax, panel in zip(axes, panels, strict=True):
            scale = 100 if panel.percent else 1
            for i, line in enumerate(panel.lines):
                colour = step(i, len(names)) if ordered else category(i)
                shift = 0.4 * (i - (len(names) - 1) / 2) / len(names)
                for place, values in line.values.items():
                    if not len(values):
                        continue
                    mean, sd = scale * np.mean(values), scale * np.std(values, ddof=min(1, len(values) - 1))
                    ax.plot([mean - sd, mean + sd], [place + shift] * 2, color=colour, lw=1.4, alpha=0.5)
                    style = {"marker": MARKERS[i % len(MARKERS)], "mec": PAGE, "mew": 0.7, "ls": ""}
                    (handles[line.label],) = ax.plot(mean, place + shift, color=colour, **style)
            for kind, values in panel.controls.items():
                if len(values):
                    height = scale * float(np.mean(values))
                    handles[_control(kind)] = ax.axvline(height, color=INK, ls=DASHES.get(kind, "-."), lw=1.2)
            ax.set(title=panel.title, xlabel=panels[0].ylabel, ylim=(rows - 0.4, -0.6))
            ax.set_yticks(range(len(panel.ticks)), panel.ticks)
            ax.grid(True, axis="x")
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4)
        return finish(figure, label)


@dataclass
class Heat:
    """Differences to a baseline: rows by columns, each the differences by seed."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[int, int], Paired]


def heat(panels: Sequence[Heat], label: str, xlabel: str, ylabel: str, column: str) -> str:
    """Mean paired differences as numbers, blue above 0 and orange below, in bold where the t interval excludes 0."""
    means = [abs(p.mean) for panel in panels for p in panel.cells.values() if p.mean is not None]
    largest = max(means, default=0) or 1
    rows, columns = max(len(p.rows) for p in panels), max(len(p.columns) for p in panels)
    names = 0.08 * min(26, max(len(row) for panel in panels for row in panel.rows))
    width = max(2.4, 0.95 * columns + 0.5 + names)
    across = max(1, min(len(panels), int(WIDTH / width)))
    down = math.ceil(len(panels) / across)
    with drawn(width * across, (0.52 * rows + 0.75) * down) as figure:
        axes = figure.subplots(down, across, squeeze=False).ravel().tolist()
        for spare in axes[len(panels) :]:
            spare.set_visible(False)
        for i, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
            _heat(ax, panel, largest, column)
            ax.set_xlabel(xlabel)
            ax.set_ylabel(ylabel if i % across == 0 else "")
            ax.set_title(textwrap.fill(panel.title, int(11 * (width - names))))
        return finish(figure, label)


def _heat(ax: Axes, panel: Heat, largest: float, column: str) -> None:
    for (row, col), found in panel.cells.items():
        if found.mean is None:
            continue
        colour = POSITIVE if found.mean > 0 else NEGATIVE
        ax.add_patch(
            Rectangle((col - 0.48, row - 0.47), 0.96, 0.94, color=colour, alpha=0.55 * abs(found.mean) / largest, lw=0)
        )
        clear = found.t_interval is not None and not found.t_interval[0] <= 0 <= found.t_interval[1]
        ax.text(
            col,
            row - 0.12 if found.t_interval else row,
            words.difference(found.mean, column),
            ha="center",
            va="center",
            fontweight="bold" if clear else "normal",
        )
        if found.t_interval is not None:
            half = (found.t_interval[1] - found.t_interval[0]) / 2
            text = f"± {words.difference(half, column).lstrip('+')}"
            ax.text(col, row + 0.24, text, ha="center", va="center", fontsize=8.5)
    ax.set_xlim(-0.5, len(panel.columns) - 0.5)
    ax.set_ylim(len(panel.rows) - 0.5, -0.5)
    ax.set_xticks(range(len(panel.columns)), panel.columns)
    ax.set_yticks(range(len(panel.rows)), [textwrap.fill(row, 26) for row in panel.rows])
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def forest(rows: Sequence[tuple[str, str, Paired, int]], label: str) -> str:
    """Contrasts as (name, column, found, tone): seeds as dots, the t interval as a bar, the bootstrap's as a line."""
    percent = [row for row in rows if words.metric(row[1]).percent]
    groups = [percent] if percent else []
    for column in dict.fromkeys(row[1] for row in rows if row not in percent):
        groups.append([row for row in rows if row[1] == column])
    heights = [0.55 * len(group) + 0.35 for group in groups]
    with drawn(9.2, sum(heights) + 0.55 * len(groups)) as figure:
        axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights).ravel()
        for ax, group in zip(axes, groups, strict=True):
            for place, row in enumerate(group):
                _forest_row(ax, place, row)
            ax.axvline(0, color=INK, lw=1)
            ax.set_ylim(len(group) - 0.4, -0.6)
            ax.set_yticks(range(len(group)), [textwrap.fill(row[0], 40) for row in group], color=INK)
            several = len({row[1] for row in group}) > 1
            name = "difference" if several else f"difference of {words.metric(group[0][1]).label}"
            ax.set_xlabel(f"{name}, points" if words.metric(group[0][1]).percent else name)
            ax.grid(True, axis="x")
            ax.grid(False, axis="y")
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        return finish(figure, label)


def _forest_row(ax: Axes, place: int, row: tuple[str, str, Paired, int]) -> None:
    _, column, found, tone = row
    scale = 100 if words.metric(column).percent else 1
    colour = TONES[tone]
    if found.t_interval and found.bootstrap_interval:
        ax.plot(
            [scale * x for x in found.t_interval], [place] * 2, color=colour, lw=6, alpha=0.35, solid_capstyle="butt"
        )
        ax.plot([scale * x for x in found.bootstrap_interval], [place] * 2, color=colour, lw=1.6)
    ax.plot(
        [scale * x for x in found.differences], [place + 0.24] * found.n, ls="", marker="o", ms=3.6, color=MUTED, mew=0
    )
    if found.mean is not None:
        ax.plot(scale * found.mean, place, marker="D", ms=6.5, color=colour, mec=PAGE, mew=0.8)


@dataclass
class Bins:
    """Pooled bins of a reliability diagram."""

    title: str
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability(panels: Sequence[Bins], label: str) -> str:
    """Accuracy of each bin of confidence; on the diagonal a network is calibrated, below it overconfident."""

    def draw(axes: list[Axes], fits: int) -> dict[str, Any]:
        for ax, panel in zip(axes, panels, strict=True):
            full = panel.count > 0
            share = panel.count / max(1, panel.count.sum())
            centres = (np.arange(len(share)) + 0.5) / len(share)
            ax.bar(centres, share, width=0.9 / len(share), color=NULL, alpha=0.35, linewidth=0)
            ax.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 2)))
            ax.plot(
                panel.confidence[full], panel.accuracy[full], color=category(0), marker="o", ms=4, mec=PAGE, mew=0.6
            )
            ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", title=textwrap.fill(panel.title, fits))
            ax.set_aspect("equal")
        axes[0].set_ylabel("accuracy; share of samples")
        return {}

    return _grid(len(panels), label, draw, share=True, columns=5, widest=2.6)


def curves(
    series: Sequence[tuple[str, Sequence[float], Sequence[float], Sequence[float]]],
    label: str,
    xlabel: str,
    ylabel: str,
    ordered: bool,
) -> str:
    """(name, x, mean, sd) as lines over a logarithmic x."""
    with drawn(5.4, 3.1) as figure:
        ax = figure.subplots()
        ax.set_xscale("log", base=2)
        for i, (name, x, mean, sd) in enumerate(series):
            colour = step(i, len(series)) if ordered else category(i)
            low, high = np.subtract(mean, sd), np.add(mean, sd)
            ax.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
            ax.plot(x, mean, color=colour, marker=MARKERS[i % len(MARKERS)], mec=PAGE, mew=0.7, label=name)
        ticks = sorted({place for _, x, _, _ in series for place in x})
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set(xlabel=xlabel, ylabel=ylabel)
        figure.legend(loc="outside right upper")
        return finish(figure, label)


@dataclass
class Projection:
    """Müller's picture of one teacher on one split: points and their classes."""

    title: str
    points: np.ndarray
    classes: np.ndarray


def projections(panels: Sequence[Projection], names: Mapping[int, str], label: str, columns: int) -> str:
    """Penultimate features on the plane through the templates of three classes."""

    def draw(axes: list[Axes], fits: int) -> dict[str, Any]:
        handles: dict[str, Any] = {}
        for ax, panel in zip(axes, panels, strict=True):
            for i, (which, name) in enumerate(names.items()):
                own = panel.points[panel.classes == which]
                style = {"marker": MARKERS[i], "color": category(i), "ls": "", "ms": 2.8, "mew": 0, "alpha": 0.6}
                (handles[f"class {name}"],) = ax.plot(own[:, 0], own[:, 1], **style)
            ax.set_title(textwrap.fill(panel.title, fits))
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_aspect("equal", adjustable="datalim")
            ax.spines[:].set_visible(True)
        return handles

    return _grid(len(panels), label, draw, columns=columns, legend=[f"class {name}" for name in names.values()])
