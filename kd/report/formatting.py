"""Labels, sentences and numbers as a page prints them; text from a study's files without control characters."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd.metrics import METRICS, Metric
from kd.text import shown

LONGEST = 48  # characters of a name; a class name can be anything
MINUS = "−"
NOTHING = "–"
TEXTS = tomllib.loads((Path(__file__).parent / "texts.toml").read_text(encoding="utf-8"))


def clean(text: Any, longest: int = LONGEST) -> str:
    """Text on one line: what cannot be printed is escaped, and what is too long is cut."""
    line = shown(" ".join(str(text).split()))
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def note(name: str, **values: Any) -> str:
    """A sentence of texts.toml."""
    return TEXTS["notes"][name].format(**values)


# ---- metrics


def metric(column: str) -> Metric:
    """The metric of a column of a study's table, with a label that says where: `test.top1` is "test accuracy"."""
    *where, name = column.split(".")
    known = METRICS.get(name) or Metric(name, clean(name), None, float, ())  # of another kd
    place = " ".join("teacher's" if part == "teacher" else clean(part) for part in where)
    return replace(known, label=f"{place} {known.label}".strip())


def label(column: str) -> str:
    """A metric's label, with a warning if the value misleads alone."""
    about = metric(column)
    return f"{about.label} ⚠ misleading alone" if about.misleading else about.label


def with_unit(column: str) -> str:
    """A metric's label with its unit, for an axis or the title of a plot."""
    return f"{label(column)}{', %' if metric(column).percent else ''}"


def scale(column: str) -> int:
    """The factor by which a metric's values are multiplied before they are printed or drawn."""
    return 100 if metric(column).percent else 1


# ---- axes and settings


def axis(name: str) -> str:
    """The short name of an axis of a study."""
    return TEXTS["axes"].get(name, clean(name).replace("_", " "))


def choice(name: str, value: Any) -> str:
    """A value of an axis."""
    if value is None or value != value:
        return "same" if name == "loss.student_temperature" else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else clean(value)


def setting(name: str, value: Any) -> str:
    """An axis with its value: `T 4`, `student T same`, `students`."""
    return f"{choice(name, value)}s" if name == "role" else f"{axis(name)} {choice(name, value)}"


def settings(values: Mapping[str, Any]) -> str:
    """Axes with their values: `teacher ε 0.4, T 4`."""
    return ", ".join(setting(name, value) for name, value in values.items())


def control(kind: str) -> str:
    """The name of a control: what it learns from."""
    return TEXTS["controls"].get(kind, clean(kind))


# ---- numbers


def number(value: float | None, column: str = "", digits: int | None = None, sign: bool = False) -> str:
    """A metric's value, in per cent if it is a share; "–" for none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    value = value * scale(column)
    if digits is None:
        digits = 1 if scale(column) == 100 else 2 if abs(value) >= 1 else 3
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("-+")


def difference(value: float | None, column: str) -> str:
    """A difference of two values of a metric with its sign; of shares, in percentage points."""
    digits = 2 if metric(column).percent else 3
    if value and abs(scale(column) * value) < 0.5 * 10**-digits:
        return f"{scale(column) * value:+.1g}".replace("-", MINUS)  # not 0, which only 0 is
    return number(value, column, digits, sign=True)


def interval(ends: tuple[float, float] | None, column: str) -> str:
    """An interval of differences."""
    return NOTHING if ends is None else f"[{difference(ends[0], column)}, {difference(ends[1], column)}]"


def probability(p: float) -> str:
    """A p value; "–" for none."""
    return NOTHING if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def spread(values: Any, column: str) -> str:
    """Mean ± standard deviation of a pandas Series over seeds; of one seed, the value."""
    known = values.dropna()
    if len(known) < 2:
        return number(known.mean(), column)
    return f"{number(known.mean(), column)} ± {number(known.std(), column)}"
