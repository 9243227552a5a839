"""Metrics and figures of a point, the same whichever trainer made it.

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

Outcome = dict[str, Any]  # `metrics` and `detail` of a point, or `error`; and `seconds`


@dataclass
class Outputs:
    """Outputs of a network by split: logits and, with a linear head, the features that the head reads."""

    logits: dict[str, Tensor]  # (N, K)
    features: dict[str, Tensor] = field(default_factory=dict)  # (N, D)
    head: tuple[Tensor, Tensor] | None = None  # weight (K, D), bias (K,)
    views: Tensor | None = None  # (N, L) differences of two logits, for mutual_information


def parts_of(data: Data, role: str) -> dict[str, Split]:
    """The splits on which a network is measured: its training images, and all of validation and test."""
    return {"train": (data if role == "teacher" else data.transfer).train, "val": data.val, "test": data.test}


def log_posterior(split: Split) -> Tensor | None:
    """The logarithm of a split's true posterior (N, K); None where it is not known."""
    return None if split.posterior is None else split.posterior.log()


def measure(role: str, own: Outputs, data: Data, teacher: Outputs | None = None) -> Outcome:
    """The entries `metrics` and `detail` of a point. Raises ValueError for logits with nan or inf."""
    parts = parts_of(data, role)
    evidence = _evidence(own, parts, data.config.omit_class, teacher)
    metrics = {split: m.compute(known, split, role) for split, known in evidence.items()}
    detail: dict[str, Any] = {"reliability": m.reliability_bins(own.logits["test"], parts["test"].targets)}
    if role == "teacher":
        train = own.logits["train"], parts["train"].targets
        detail["smoothing_doubts"] = list(m.estimate_smoothing(*train).doubts)
        values = [m.gamma(*train, temperature).item() for temperature in GAMMA_TEMPERATURES]
        detail["gamma"] = {"temperature": list(GAMMA_TEMPERATURES), "gamma": values}
        detail["projection"] = _projection(own, parts)
    return {"metrics": metrics, "detail": detail}


def _evidence(
    own: Outputs, parts: Mapping[str, Split], omitted: int | None, teacher: Outputs | None
) -> dict[str, dict[str, Any]]:
    """The evidence for the metrics' registry, by split. Temperature and bias are fitted on validation."""
    val = own.logits["val"], parts["val"].targets
    fitted = m.post_hoc_temperature(*val).item()
    shared: dict[str, Any] = {"views": own.views}
    if omitted is not None:
        shared |= {"omitted": omitted, "bias": m.best_bias(*val, omitted)}
    evidence: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        logits, posterior = own.logits[name], log_posterior(part)
        scaled = logits / fitted if 0 < fitted < math.inf else None
        evidence[name] = {"logits": logits, "targets": part.targets, "scaled": scaled, "reference": posterior, **shared}
        if teacher:
            taught = teacher.logits[name]
            evidence[name] |= {"teacher": taught, "reference": taught if posterior is None else posterior}
        if name in own.features:
            evidence[name]["features"] = own.features[name]
    return evidence


def _projection(own: Outputs, parts: Mapping[str, Split]) -> dict[str, Any] | None:
    """Müller's projection of some training and test samples of the first three classes; None where there is none."""
    if own.head is None or own.head[0].shape[0] < len(PROJECTED):
        return None
    projection: dict[str, Any] = {"classes": list(PROJECTED)}
    for split in ("train", "test"):
        targets = parts[split].targets
        chosen = torch.cat([(targets == c).nonzero().flatten()[:PER_CLASS] for c in PROJECTED])
        if not len(chosen):
            return None
        try:
            points, templates = m.muller_projection(own.features[split][chosen], *own.head, PROJECTED)
        except ValueError:  # templates on a line
            return None
        projection["templates"] = _rounded(templates)
        projection[split] = {"points": _rounded(points), "labels": targets[chosen].tolist()}
    return projection


def _rounded(points: Tensor) -> list[list[float]]:
    return [[round(x, 4) for x in row] for row in points.tolist()]
