"""The drawings of a page: each function returns one `svg` element as text."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
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
INK, MUTED, PAGE, GOOD, BAD, NULL = "#1c2128", "#59636e", "#ffffff", "#0067a5", "#b8480a", "#6b7280"
TONES = {1: GOOD, -1: BAD, 0: NULL}
MARKERS = "osD^vPX*"
DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
NO_DATES = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # metadata that differs, or says nothing


# A decorator: the page's style while a figure is made.
in_style = matplotlib.rc_context(fname=STYLE)


def svg(figure: Figure, legend: Mapping[str, Any] | None = None) -> str:
    """One `svg` element, with a legend of several entries beside few columns of plots, or above many.

    matplotlib escapes every text that it writes. What stands before the element, an XML declaration and a document
    type, has no place inside a page.
    """
    if legend and len(legend) > 1:
        plots = figure.axes[0].get_gridspec()
        few = plots is not None and plots.ncols < 3
        place = "outside right upper" if few else "outside upper left"
        figure.legend(legend.values(), legend.keys(), loc=place, ncols=1 if few else 4)
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's fonts have it
        figure.savefig(file, format="svg", bbox_inches="tight", pad_inches=0.05, metadata=NO_DATES)
    text = file.getvalue()
    text = re.sub(r' id="(figure|axes|patch|text|line2d|matplotlib\.axis|legend|\w*Collection)_\d+"', "", text)
    # Hundredths of a point: a third of the page's size would be digits that nobody sees.
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text[text.index("<svg") :])


def grid(titles: Sequence[str], columns: int = 0, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with one plot for each title, in rows: two large ones in each row, or four."""
    columns = min(len(titles), columns or (2 if len(titles) in (2, 4) else 4))
    rows = math.ceil(len(titles) / columns)
    width = min(4.8, WIDTH / columns)
    legend = 2 if columns < 3 else 0  # inches beside the plots, where few columns leave the page room
    size = width * columns + legend, max(2.3, 0.6 * width) * rows + 0.4
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(rows, columns, sharey=share, squeeze=False).ravel().tolist()
    for spare in axes[len(titles) :]:
        spare.set_visible(False)
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(textwrap.fill(title, int(11 * width)))
    return figure, axes[: len(titles)]


@dataclass
class Panel:
    """One plot: `values` has the columns x, line and value, a row for each network, and controls are means."""

    title: str
    values: DataFrame
    controls: Mapping[str, float] = field(default_factory=dict)
    ylabel: str = ""


@in_style
def lines(
    panels: Sequence[Panel],
    xlabel: str,
    ticks: Sequence[str] | None = None,
    share: bool = False,
) -> str:
    """Means over seeds with one standard deviation to each side, along x.

    x is a number, or the place of one of `ticks`. Lines that cover each other stand a little beside each other.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.values["line"]))
    kinds = list(dict.fromkeys(kind for panel in panels for kind in panel.controls))
    # Lines mostly are values that have an order; beyond 0.85 the colours are too light for a white page.
    colours = matplotlib.colormaps["plasma"](np.linspace(0, 0.85, len(names)))
    figure, axes = grid([panel.title for panel in panels], share=share)
    legend: dict[str, Any] = {}
    for ax, panel in zip(axes, panels, strict=True):
        for i, name in enumerate(names):
            own = panel.values[panel.values["line"] == name].groupby("x")["value"].agg(["mean", "std"])
            if own.empty:  # a method or a temperature that this plot does not have
                continue
            if ticks is None:
                (line,) = ax.plot(own.index, own["mean"], ".-" if len(own) < 50 else "-", color=colours[i])
            else:
                style = {"color": colours[i], "marker": MARKERS[i % len(MARKERS)], "mec": PAGE, "mew": 0.7}
                beside = own.index + 0.12 * ((i + 0.5) / len(names) - 0.5)
                line = ax.errorbar(beside, own["mean"], own["std"].fillna(0), elinewidth=1, **style)
            legend.setdefault(name, line)
        for kind, height in panel.controls.items():
            dashes = DASHES[kinds.index(kind) % len(DASHES)]
            legend.setdefault(kind, ax.axhline(height, color=INK, ls=dashes, lw=1.2))
        ax.set(xlabel=xlabel, ylabel=panel.ylabel)
        if ticks is not None:
            long = max(map(len, ticks)) * len(ticks) > 40
            ax.set_xticks(range(len(ticks)), ticks, rotation=45 if long else 0, ha="right" if long else "center")
            ax.margins(x=0.08)
    return svg(figure, legend)


@in_style
def forest(effects: Sequence[Effect]) -> str:
    """Differences one above another: dots are seeds, diamonds means. All shares have one axis in common."""
    groups: dict[str, list[Effect]] = {}
    for effect in effects:
        groups.setdefault("shares" if fmt.metric(effect.column).percent else effect.column, []).append(effect)
    heights = [0.55 * len(group) + 0.35 for group in groups.values()]
    figure = Figure((9.2, sum(heights) + 0.55 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights).ravel()
    for ax, group in zip(axes, groups.values(), strict=True):
        scale, columns = fmt.scale(group[0].column), {effect.column for effect in group}
        for place, (_, _, pair, tone, _) in enumerate(group):
            colour = TONES[tone]
            if pair.interval:
                ends = np.multiply(scale, pair.interval)
                ax.plot(ends, [place] * 2, color=colour, lw=6, alpha=0.35, solid_capstyle="butt")
            dots = scale * pair.differences
            ax.plot(dots, [place + 0.24] * len(dots), ls="", marker="o", ms=3.6, color=MUTED, mew=0)
            ax.plot(scale * pair.mean, place, marker="D", ms=6.5, color=colour, mec=PAGE, mew=0.8)
        name = f"difference of {fmt.metric(group[0].column).label}" if len(columns) == 1 else "difference"
        ax.axvline(0, color=INK, lw=1)
        ax.set(ylim=(len(group) - 0.4, -0.6), xlabel=f"{name}{', points' if scale > 1 else ''}")
        ax.set_yticks(range(len(group)), [textwrap.fill(effect.name, 40) for effect in group], color=INK)
        ax.grid(True, axis="x")
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    return svg(figure)


@in_style
def reliability(panels: Mapping[str, Mapping[str, Sequence] | DataFrame]) -> str:
    """Reliability diagrams by title; below the diagonal a network is overconfident.

    A panel has the columns count, confidence and accuracy of `kd.metrics.reliability_bins`, of one network or several.
    """
    figure, axes = grid(list(panels), columns=5 if len(panels) > 3 else 3, share=True)
    for ax, bins in zip(axes, panels.values(), strict=True):
        count, confidence, accuracy = (np.array(bins[key], float) for key in ("count", "confidence", "accuracy"))
        share, full = count / max(1, count.sum()), count > 0
        ax.bar((np.arange(len(share)) + 0.5) / len(share), share, width=0.9 / len(share), color=NULL, alpha=0.35)
        ax.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=DASHES[0])
        ax.plot(confidence[full], accuracy[full], marker="o", ms=4, mec=PAGE, mew=0.6)
        ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", aspect="equal")
    axes[0].set_ylabel("accuracy; share of samples")
    return svg(figure)


@in_style
def scatter(panels: Mapping[str, tuple[np.ndarray, np.ndarray]], names: Mapping[int, str], columns: int) -> str:
    """Points (N, 2) of a plane with their classes (N,), by title; `names` are the classes'."""
    figure, axes = grid(list(panels), columns)
    legend: dict[str, Any] = {}
    for ax, (points, classes) in zip(axes, panels.values(), strict=True):
        for i, (which, name) in enumerate(names.items()):
            own = points[classes == which]
            style = {"marker": MARKERS[i], "ls": "", "ms": 2.8, "mew": 0, "alpha": 0.6}
            (legend[f"class {name}"],) = ax.plot(own[:, 0], own[:, 1], **style)
        ax.set(xticks=[], yticks=[])
        ax.set_aspect("equal", adjustable="datalim")
        ax.spines[:].set_visible(True)
    return svg(figure, legend)
