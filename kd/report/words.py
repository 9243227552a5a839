"""Names and numbers as a page prints them, and foreign text made harmless to look at."""

from __future__ import annotations

import math
import unicodedata
from typing import Any, NamedTuple

LONGEST = 48  # of a name; a class name can be anything
MINUS = "−"


class Metric(NamedTuple):
    """How a metric is printed: `better` is 1, -1 or 0 as higher is better, lower is, or neither; `percent` is x 100."""

    label: str
    better: int = 0
    percent: bool = False


METRICS = {
    "top1": Metric("accuracy", 1, True),
    "top5": Metric("top-5 accuracy", 1, True),
    "nll": Metric("NLL", -1),
    "nll_scaled": Metric("NLL after T*", -1),
    "ece": Metric("ECE", -1, True),
    "ece_scaled": Metric("ECE after T*", -1, True),
    "equal_mass_ece": Metric("equal-mass ECE", -1, True),
    "classwise_ece": Metric("classwise ECE", -1, True),
    "mce": Metric("MCE", -1, True),
    "brier": Metric("Brier score", -1),
    "post_hoc_temperature": Metric("T*"),
    "aurc_max_probability": Metric("AURC (max probability)", -1),
    "aurc_normalised_logits": Metric("AURC (normalised logits)", -1),
    "gamma": Metric("γ"),
    "shen_instability": Metric("Shen's 1 − S"),
    "cmi": Metric("CMI"),
    "mutual_information": Metric("Müller's MI"),
    "nt_kl": Metric("NT-KL", -1),
    "nt_cosine": Metric("NT-cosine", 1),
    "class_similarity_correlation": Metric("class-similarity correlation", 1),
    "transfer_efficiency": Metric("transfer efficiency", 1),
    "agreement": Metric("agreement", 1, True),
    "agreement5": Metric("top-5 agreement", 1, True),
    "predictive_kl": Metric("predictive KL", -1),
    "class_separation": Metric("class separation R²"),
    "within_total_variance": Metric("within/total variance"),
    "omitted_recall": Metric("recall of the omitted class", 1, True),
    "omitted_recall_corrected": Metric("bias-corrected recall of the omitted class", 1, True),
    "omitted_auroc": Metric("AUROC of the omitted class", 1),
}
AXES = {
    "teacher.label_smoothing": "teacher ε",
    "teacher.smoothing": "convention",
    "loss.temperature": "T",
    "loss.student_temperature": "student T",
    "loss.kd_weight": "KD weight",
    "loss.ce_weight": "CE weight",
    "loss.label_smoothing": "student ε",
    "data.label_noise": "label noise",
    "data.train_size": "training samples",
    "data.omit_class": "omitted class",
    "data.name": "data",
    "loss": "method",
}


def clean(text: Any, longest: int = LONGEST) -> str:
    """Foreign text on one line: control, bidirectional and unpaired characters go, and what is too long is cut."""
    if isinstance(text, str):
        text = text[: 20 * longest]  # before the slow part
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in str(text))
    kept = " ".join("".join(c for c in kept if not unicodedata.category(c).startswith("C")).split())
    return kept if len(kept) <= longest else f"{kept[: longest - 1]}…"


def metric(column: str) -> Metric:
    """How a column of the table is printed: `test.top1` is "test accuracy"."""
    *where, name = column.split(".")
    known = METRICS.get(name, Metric(clean(name)))
    place = " ".join("teacher's" if part == "teacher" else clean(part) for part in where)
    return known._replace(label=f"{place} {known.label}".strip())


def unit(column: str) -> str:
    """What a column is counted in, for axes and captions."""
    return "%" if metric(column).percent else ""


def axis(name: str) -> str:
    """The short name of an axis."""
    return AXES.get(name, clean(name).replace("_", " "))


def setting(name: str, value: Any) -> str:
    """One axis with its value: `T 4`, `student T same`."""
    return f"{choice(name, value)}s" if name == "role" else f"{axis(name)} {choice(name, value)}"


def choice(name: str, value: Any) -> str:
    """The value of an axis."""
    if value is None:
        return "same" if name == "loss.student_temperature" else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else clean(value)


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def shown(value: float | None, column: str = "", digits: int | None = None, sign: bool = False) -> str:
    """A metric's value, in percent where it is a share; "–" where there is none."""
    if value is None:
        return "–"
    percent = bool(column) and metric(column).percent
    value = 100 * value if percent else value
    if digits is None:
        digits = 1 if percent else 2 if abs(value) >= 1 else 3
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("-+")


def difference(value: float | None, column: str) -> str:
    """A difference of two values of a metric with its sign, in points where the metric is in percent."""
    digits, scaled = (2, 100) if metric(column).percent else (3, 1)
    if value and abs(scaled * value) < 0.5 * 10**-digits:
        return f"{scaled * value:+.1g}".replace("-", MINUS)  # not 0, which only 0 is
    return shown(value, column, digits, sign=True)


def interval(ends: tuple[float, float] | None, column: str) -> str:
    """An interval of differences."""
    return "–" if ends is None else f"[{difference(ends[0], column)}, {difference(ends[1], column)}]"


def probability(p: float | None) -> str:
    """A p value."""
    return "–" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def spread(values: list[float], column: str) -> str:
    """Mean ± standard deviation over seeds; of one seed, the value."""
    if not values:
        return "–"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return shown(mean, column)
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{shown(mean, column)} ± {shown(sd, column)}"
