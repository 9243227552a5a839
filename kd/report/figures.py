"""The drawings of a page: each function returns one `svg` element as text."""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from kd.report import formatting as fmt
from kd.report.statistics import Effect

STYLE = Path(__file__).parent / "page.mplstyle"
WIDTH = 11.2  # inches of a page
COLUMNS = 4
INK, MUTED, PAGE, GOOD, BAD, NULL = "#1c2128", "#59636e", "#ffffff", "#0067a5", "#b8480a", "#6b7280"
TONES = {1: GOOD, -1: BAD, 0: NULL}
MARKERS = "osD^vPX*"
DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
NO_DATES = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # metadata that differs, or says nothing


def draw(width: float, height: float, fill: Callable[[Figure], None]) -> str:
    """One `svg` element of so many inches, in the page's style.

    matplotlib escapes every text that it writes. What stands before the element, an XML declaration and a document
    type, has no place inside a page.
    """
    file = io.StringIO()
    with matplotlib.rc_context(fname=STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's fonts have it
        figure = Figure(figsize=(width, height), layout="constrained")
        fill(figure)
        figure.savefig(file, format="svg", bbox_inches="tight", pad_inches=0.05, metadata=NO_DATES)
    text = file.getvalue()
    text = re.sub(r' id="(figure|axes|patch|text|line2d|matplotlib\.axis|legend|\w*Collection)_\d+"', "", text)
    # Hundredths of a point: a third of the page's size would be digits that nobody sees.
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text[text.index("<svg") :])


def grid(
    number: int, fill: Callable[[Sequence[Axes], int], Mapping[str, Any]], columns: int = COLUMNS, share: bool = False
) -> str:
    """Several plots in rows. `fill` draws them, told how many characters of a title fit, and returns the legend."""
    columns = min(number, columns)
    rows = math.ceil(number / columns)
    width = min(4.8, WIDTH / columns)

    def whole(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, sharey=share, squeeze=False).ravel().tolist()
        for spare in axes[number:]:
            spare.set_visible(False)
        legend = fill(axes[:number], int(11 * width))
        if len(legend) > 1:
            beside = "outside right upper" if columns < 3 else "outside upper left"
            figure.legend(legend.values(), legend.keys(), loc=beside, ncols=1 if columns < 3 else 4)

    return draw(width * columns + (2 if columns < 3 else 0), max(2.3, 0.6 * width) * rows + 0.4, whole)


@dataclass
class Panel:
    """One plot: `values` has the columns x, line and value, a row for each network, and controls are means."""

    title: str
    values: DataFrame
    controls: Mapping[str, float] = field(default_factory=dict)
    ylabel: str = ""


def lines(
    panels: Sequence[Panel],
    xlabel: str,
    ticks: Sequence[str] | None = None,
    ordered: bool = True,
    columns: int = COLUMNS,
    share: bool = False,
) -> str:
    """Means over seeds with one standard deviation to each side, along x.

    x is a number, or the place of one of `ticks`. Lines that cover each other stand a little beside each other. Values
    that have an order run through one colour map, others have colours of their own.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.values["line"]))
    kinds = list(dict.fromkeys(kind for panel in panels for kind in panel.controls))
    colours = dict(zip(names, _colours(len(names), ordered), strict=True))

    def fill(axes: Sequence[Axes], fits: int) -> Mapping[str, Any]:
        legend: dict[str, Any] = {}
        for ax, panel in zip(axes, panels, strict=True):
            for i, name in enumerate(names):
                own = panel.values[panel.values["line"] == name].groupby("x")["value"].agg(["mean", "std"])
                style = {"color": colours[name], "marker": MARKERS[i % len(MARKERS)], "mec": PAGE, "mew": 0.7}
                if ticks is None:
                    (line,) = ax.plot(own.index, own["mean"], ".-" if len(own) < 50 else "-", color=colours[name])
                else:
                    beside = 0.12 * (i - (len(names) - 1) / 2) / max(1, len(names) - 1)
                    line = ax.errorbar(own.index + beside, own["mean"], own["std"].fillna(0), elinewidth=1, **style)
                if len(own):
                    legend.setdefault(name, line)
            for kind, height in panel.controls.items():
                dashes = DASHES[kinds.index(kind) % len(DASHES)]
                legend.setdefault(kind, ax.axhline(height, color=INK, ls=dashes, lw=1.2))
            ax.set(xlabel=xlabel, ylabel=panel.ylabel, title=textwrap.fill(panel.title, fits))
            if ticks is not None:
                long = max(map(len, ticks)) * len(ticks) > 40
                ax.set_xticks(range(len(ticks)), ticks, rotation=45 if long else 0, ha="right" if long else "center")
                ax.margins(x=0.08)
        return legend

    return grid(len(panels), fill, columns, share)


def _colours(number: int, ordered: bool) -> list[str]:
    if ordered and number > 1:
        ramp = matplotlib.colormaps["plasma"]
        return [matplotlib.colors.to_hex(ramp(0.85 * i / (number - 1))) for i in range(number)]
    with matplotlib.rc_context(fname=STYLE):
        cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    return [cycle[i % len(cycle)] for i in range(number)]


def forest(effects: Sequence[Effect]) -> str:
    """Differences one above another: dots are seeds, diamonds means. All shares have one axis in common."""
    units = [effect.column if fmt.scale(effect.column) == 1 else "" for effect in effects]
    groups = [[e for e, own in zip(effects, units, strict=True) if own == unit] for unit in dict.fromkeys(units)]
    heights = [0.55 * len(group) + 0.35 for group in groups]

    def fill(figure: Figure) -> None:
        axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights).ravel()
        for ax, group in zip(axes, groups, strict=True):
            for place, effect in enumerate(group):
                _effect(ax, place, effect)
            columns = {effect.column for effect in group}
            name = f"difference of {fmt.metric(group[0].column).label}" if len(columns) == 1 else "difference"
            ax.axvline(0, color=INK, lw=1)
            ax.set(
                ylim=(len(group) - 0.4, -0.6), xlabel=f"{name}{', points' if fmt.scale(group[0].column) > 1 else ''}"
            )
            ax.set_yticks(range(len(group)), [textwrap.fill(effect.name, 40) for effect in group], color=INK)
            ax.grid(True, axis="x")
            ax.grid(False, axis="y")
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)

    return draw(9.2, sum(heights) + 0.55 * len(groups), fill)


def _effect(ax: Axes, place: int, effect: Effect) -> None:
    scale, colour, pair = fmt.scale(effect.column), TONES[effect.verdict.tone], effect.pair
    if pair.interval:
        ends = np.multiply(scale, pair.interval)
        ax.plot(ends, [place] * 2, color=colour, lw=6, alpha=0.35, solid_capstyle="butt")
    dots = scale * pair.differences
    ax.plot(dots, [place + 0.24] * len(dots), ls="", marker="o", ms=3.6, color=MUTED, mew=0)
    ax.plot(scale * pair.mean, place, marker="D", ms=6.5, color=colour, mec=PAGE, mew=0.8)


def reliability(panels: Mapping[str, Mapping[str, Sequence] | DataFrame]) -> str:
    """Reliability diagrams by title; below the diagonal a network is overconfident.

    A panel has the columns count, confidence and accuracy of `kd.metrics.reliability_bins`, of one network or several.
    """

    def fill(axes: Sequence[Axes], fits: int) -> Mapping[str, Any]:
        for ax, (title, bins) in zip(axes, panels.items(), strict=True):
            count, confidence, accuracy = (np.array(bins[key], float) for key in ("count", "confidence", "accuracy"))
            share, full = count / max(1, count.sum()), count > 0
            ax.bar((np.arange(len(share)) + 0.5) / len(share), share, width=0.9 / len(share), color=NULL, alpha=0.35)
            ax.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=DASHES[0])
            ax.plot(confidence[full], accuracy[full], marker="o", ms=4, mec=PAGE, mew=0.6)
            ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", title=textwrap.fill(title, fits), aspect="equal")
        axes[0].set_ylabel("accuracy; share of samples")
        return {}

    return grid(len(panels), fill, columns=5 if len(panels) > 3 else 3, share=True)


def scatter(panels: Mapping[str, tuple[np.ndarray, np.ndarray]], names: Mapping[int, str], columns: int) -> str:
    """Points (N, 2) of a plane with their classes (N,), by title; `names` are the classes'."""

    def fill(axes: Sequence[Axes], fits: int) -> Mapping[str, Any]:
        legend: dict[str, Any] = {}
        for ax, (title, (points, classes)) in zip(axes, panels.items(), strict=True):
            for i, (which, name) in enumerate(names.items()):
                own = points[classes == which]
                style = {"marker": MARKERS[i], "ls": "", "ms": 2.8, "mew": 0, "alpha": 0.6}
                (legend[f"class {name}"],) = ax.plot(own[:, 0], own[:, 1], **style)
            ax.set(title=textwrap.fill(title, fits), xticks=[], yticks=[])
            ax.set_aspect("equal", adjustable="datalim")
            ax.spines[:].set_visible(True)
        return legend

    return grid(len(panels), fill, columns)
