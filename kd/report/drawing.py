"""SVG that is part of a page: colours are the page's variables, so that one drawing is right on dark and on light."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

import matplotlib
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

# matplotlib draws in these colours, which nothing else has, and `finish` puts the page's variable in their place.
INK, MUTED, GRID, PAGE = "#0b0a01", "#0b0a02", "#0b0a03", "#0b0a04"
POSITIVE, NEGATIVE, NULL = "#0b0a05", "#0b0a06", "#0b0a07"
STEPS = 13
KINDS = 8

# Two values each: on white, on near-black. Okabe and Ito's colours, lightened for dark pages: they stay apart for
# colour-blind readers; what is ordered runs through magma, whose lightness alone tells the order.
_FIXED = {
    "ink": ("#1c2128", "#e6e8eb"),
    "muted": ("#59636e", "#a3acb8"),
    "grid": ("#d8dde3", "#363c45"),
    "page": ("#ffffff", "#14171c"),
    "positive": ("#0067a5", "#5ab4f0"),
    "negative": ("#b8480a", "#ff9b5e"),
    "null": ("#6b7280", "#9aa4b2"),
}
_CATEGORIES = (
    ("#0072b2", "#5ab4f0"),
    ("#d55e00", "#ff9b5e"),
    ("#009e73", "#3fd6a8"),
    ("#b0578f", "#e79cc9"),
    ("#8a6d00", "#e8c547"),
    ("#4b4ba8", "#a9a9ff"),
    ("#7a4b2a", "#d8a47f"),
    ("#555b66", "#b8c0cc"),
)
_RAMPS = (
    ("#332a7c", "#7a2382", "#b8326f", "#e0563f", "#e8920c"),
    ("#9d97ff", "#c987e8", "#f07fae", "#ff9a76", "#ffd166"),
)
MARKERS = "osD^vPX*"
_SVG = "http://www.w3.org/2000/svg"
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it is searched, read aloud, and small
    "svg.hashsalt": "kd",  # the same drawing gives the same bytes
    "text.parse_math": False,  # names are not formulas
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
}


def palette(dark: bool) -> dict[str, str]:
    """The variables of a page and their colours."""
    found = {name: pair[dark] for name, pair in _FIXED.items()}
    found |= {f"c{i}": pair[dark] for i, pair in enumerate(_CATEGORIES)}
    ramp = LinearSegmentedColormap.from_list("ramp", _RAMPS[dark])
    return found | {f"r{i}": to_hex(ramp(i / (STEPS - 1))) for i in range(STEPS)}


def category(i: int) -> str:
    """The colour of the i-th of several kinds."""
    return f"#0b0c{i % KINDS:02x}"


def step(i: int, n: int) -> str:
    """The colour of the i-th of n values that have an order."""
    return f"#0b0b{round(i * (STEPS - 1) / max(1, n - 1)):02x}"


def _variable(match: re.Match[str]) -> str:
    kind, i = match[1], int(match[2], 16)
    names = {"a": ["", *_FIXED], "b": [f"r{k}" for k in range(STEPS)], "c": [f"c{k}" for k in range(KINDS)]}
    return f"var(--{names[kind][i]})"


@contextmanager
def drawn(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches in the page's style."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's fonts have it
        yield Figure(figsize=(width, height), layout="constrained")


def finish(figure: Figure, label: str) -> str:
    """The figure as one `svg` element for a page, to be called inside `drawn`; `label` is what is read aloud.

    Parsed and written again, so that it is well-formed and holds elements of SVG only.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # ids of its own, and the same bytes every time
        figure.savefig(
            file, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None, "Creator": None}
        )
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(file.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        if element.tag == f"{{{_SVG}}}g":
            element.attrib.pop("id", None)  # figure_1, axes_1, ...: the same in every drawing
        for name, value in element.attrib.items():
            value = re.sub(r"#0b0([abc])([0-9a-f]{2})", _variable, value)
            element.set(name, re.sub(r"(\d\.\d\d)\d+", r"\1", value))  # hundredths of a point
    width = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    root.set("style", f"width: {width * 4 / 3:.0f}px")  # no larger than drawn; the page makes it smaller where it must
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def alone(svg: str) -> str:
    """A drawing as a file of its own, which brings the page's colours along."""

    def rules(dark: bool) -> str:
        return ":root{" + "".join(f"--{name}:{colour};" for name, colour in palette(dark).items()) + "}"

    style = f"<style>{rules(False)} @media (prefers-color-scheme: dark){{{rules(True)}}} text{{font-family:sans-serif}}"
    return re.sub(r"(<svg[^>]*>)", lambda match: f"{match[1]}{style}</style>", svg, count=1) + "\n"
