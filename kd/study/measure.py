"""What is measured of every network of a study: one function, whatever engine trained it.

``metrics`` of a point, on the last weights and views without augmentation: what the registry `kd.metrics.METRICS` says.
The reference p* is the true posterior where the data set knows it, else the teacher's softmax; without p* a teacher has
no nt_ metrics. Views for mutual_information are the difference of the logits of the first two classes over five
augmented views, 600 samples at most; where the recipe does not augment, noise of 0.1 standard deviations. Features and
views need the engine `population`.

``detail``, for figures:

- reliability: {"count", "confidence", "accuracy"} of 15 bins of equal width of the top probability, on test; null in
  an empty bin
- smoothing_doubts: why the estimate on train is not to be trusted, [] where nothing speaks against it (teachers)
- gamma: {"temperature": [...], "gamma": [...]}, Müller's curve on the training set (teachers)
- projection: {"classes": [i, j, k], "templates": [[x, y]] * 3, "train" and "test": {"points": [[x, y]], "labels"}},
  Müller's picture of the first three classes, at most 100 samples of each (teachers with a linear head)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kd import metrics as m
from kd.data import Data, Split

GAMMA_TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
PROJECTED = (0, 1, 2)  # classes
PER_CLASS = 100  # of Müller et al. 2019
VIEWS, INPUTS = 5, 600  # of Müller et al. 2019
SPLITS = ("train", "val", "test")


Outcome = dict[str, Any]  # `metrics` and `detail` of a point, or `error`


@dataclass
class Outputs:
    """What a network gives: logits and, where it has a linear head, the features that this reads, by split."""

    logits: dict[str, Tensor]  # (N, K) each
    features: dict[str, Tensor] = field(default_factory=dict)  # (N, D)
    head: tuple[Tensor, Tensor] | None = None  # weight (K, D), bias (K,)
    views: Tensor | None = None  # (N, L) differences of two logits, for mutual_information


@dataclass
class Truth:
    """What is known of the data: labels and, for some sets, the log of the true posterior, by split."""

    targets: Mapping[str, Tensor]
    log_posterior: Mapping[str, Tensor] = field(default_factory=dict)
    omitted: int | None = None  # a class that the training set does not have


def parts_of(data: Data, role: str) -> dict[str, Split]:
    """What a network is measured on: what it trained on, and all of validation and test, an omitted class too."""
    return {"train": (data if role == "teacher" else data.transfer).train, "val": data.val, "test": data.test}


def truth_of(data: Data, role: str) -> Truth:
    """Labels of the splits, and the true posterior where the data set knows it."""
    parts = parts_of(data, role)
    known = {name: found for name, part in parts.items() if (found := log_of(part)) is not None}
    return Truth({name: part.targets for name, part in parts.items()}, known, data.omit_class)


def log_of(split: Split) -> Tensor | None:
    """The logarithm of a split's true posterior (N, K), None where it is not known."""
    return None if split.posterior is None else split.posterior.log()


def measure(role: str, own: Outputs, truth: Truth, teacher: Outputs | None = None) -> dict[str, Any]:
    """The entries `metrics` and `detail` of a point. Raises ValueError for logits that are not finite."""
    metrics = {name: m.compute(evidence, name, role) for name, evidence in _evidence(own, truth, teacher).items()}
    train, test = ((own.logits[split], truth.targets[split]) for split in ("train", "test"))
    detail: dict[str, Any] = {"reliability": m.reliability_bins(*test)}
    if role == "teacher":
        detail["smoothing_doubts"] = list(m.estimate_smoothing(*train).doubts)
        values = [m.gamma(*train, temperature).item() for temperature in GAMMA_TEMPERATURES]
        detail["gamma"] = {"temperature": list(GAMMA_TEMPERATURES), "gamma": values}
        detail["projection"] = projection(own, truth)
    return {"metrics": metrics, "detail": detail}


def _evidence(own: Outputs, truth: Truth, teacher: Outputs | None) -> dict[str, dict[str, Any]]:
    """What the metrics' registry is told of a network, by split. Temperature and bias are fitted on validation."""
    val = own.logits["val"], truth.targets["val"]
    fitted = m.post_hoc_temperature(*val).item()
    shared: dict[str, Any] = {"temperature": fitted if 0 < fitted < math.inf else None, "views": own.views}
    if truth.omitted is not None:
        shared |= {"omitted": truth.omitted, "bias": m.best_bias(*val, truth.omitted)}
    evidence: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        taught_by = teacher.logits[split] if teacher else None
        evidence[split] = {"logits": own.logits[split], "targets": truth.targets[split], **shared}
        evidence[split]["reference"] = truth.log_posterior.get(split, taught_by)
        if teacher:
            evidence[split]["teacher"] = taught_by
        if split in own.features:
            evidence[split]["features"] = own.features[split]
    return evidence


def projection(own: Outputs, truth: Truth) -> dict[str, Any] | None:
    """Müller's projection of some training and test samples of the first three classes."""
    if own.head is None or own.head[0].shape[0] < len(PROJECTED):
        return None
    found: dict[str, Any] = {"classes": list(PROJECTED)}
    for split in ("train", "test"):
        targets = truth.targets[split]
        chosen = torch.cat([(targets == c).nonzero().flatten()[:PER_CLASS] for c in PROJECTED])
        if not len(chosen):
            return None
        try:
            made = m.muller_projection(own.features[split][chosen], *own.head, PROJECTED)
        except ValueError:  # templates on a line
            return None
        found["templates"] = _rounded(made.templates)
        found[split] = {"points": _rounded(made.points), "labels": targets[chosen].tolist()}
    return found


def _rounded(points: Tensor) -> list[list[float]]:
    return [[round(x, 4) for x in row] for row in points.tolist()]
