"""What is measured of every network of a study: one function, whatever engine trained it.

``metrics`` of a point, on the last weights and views without augmentation. p* is the true posterior where the data set
knows it, else the teacher's softmax; a teacher without p* has no nt_ metrics.

- train: top1, nll, gamma, shen_instability, cmi, mutual_information (Müller's, of the difference of the logits of the
  first two classes over five augmented views, 600 samples at most; where the recipe does not augment, the views are
  noise of 0.1 standard deviations)
- val: kd.metrics.classification, post_hoc_temperature, and what follows for test
- test: kd.metrics.classification, equal_mass_ece, classwise_ece, nll_scaled and ece_scaled (after the temperature that
  was fitted on validation), aurc_max_probability, aurc_normalised_logits, gamma, shen_instability, cmi; nt_kl,
  nt_cosine and class_similarity_correlation to p*; for a student agreement, agreement5 and predictive_kl to its
  teacher; for penultimate features class_separation and within_total_variance (engine population, as all below that
  needs more than logits)
- each split, teachers only: smoothing_estimate with smoothing_low and smoothing_high, the eps probe
- val and test, where a class is omitted (data.omit_class): omitted_recall, omitted_recall_corrected (after the bias
  that suits validation best) and omitted_auroc

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
BINS = 15


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
    fitted = m.post_hoc_temperature(own.logits["val"], truth.targets["val"]).item()
    found: dict[str, dict[str, Any]] = {"train": _train(own, truth)}
    for split in ("val", "test"):
        reference = truth.log_posterior.get(split, teacher.logits[split] if teacher else None)
        found[split] = _held_out(own, truth, split, fitted, reference) | _fidelity(own, teacher, split)
    found["val"]["post_hoc_temperature"] = fitted
    detail: dict[str, Any] = {"reliability": reliability(own.logits["test"], truth.targets["test"])}
    if role == "teacher":
        for split in SPLITS:
            found[split] |= _probe(own.logits[split], truth.targets[split])
        detail["smoothing_doubts"] = list(m.estimate_smoothing(own.logits["train"], truth.targets["train"]).doubts)
        values = [m.gamma(own.logits["train"], truth.targets["train"], t).item() for t in GAMMA_TEMPERATURES]
        detail["gamma"] = {"temperature": list(GAMMA_TEMPERATURES), "gamma": values}
        detail["projection"] = projection(own, truth)
    return {"metrics": _finite(found), "detail": _finite(detail)}


def _train(own: Outputs, truth: Truth) -> dict[str, Any]:
    logits, targets = own.logits["train"], truth.targets["train"]
    found: dict[str, Any] = {"top1": m.top_k_accuracy(logits, targets, 1).item(), "nll": m.nll(logits, targets).item()}
    found |= _spread(logits, targets)
    constant = own.views is None or bool((own.views == own.views[:, :1]).all())
    found["mutual_information"] = None if constant else m.mutual_information(own.views).item()  # type: ignore[arg-type]
    return found


def _spread(logits: Tensor, targets: Tensor) -> dict[str, Any]:
    named = {"shen_instability": m.shen_instability, "cmi": m.cmi, "gamma": m.gamma}
    return {name: metric(logits, targets).item() for name, metric in named.items()}


def _held_out(own: Outputs, truth: Truth, split: str, fitted: float, reference: Tensor | None) -> dict[str, Any]:
    logits, targets = own.logits[split], truth.targets[split]
    found: dict[str, Any] = dict(m.classification(logits, targets)) | _spread(logits, targets)
    for metric in (m.equal_mass_ece, m.classwise_ece, m.aurc_max_probability, m.aurc_normalised_logits):
        found[metric.__name__] = metric(logits, targets).item()
    usable = 0 < fitted < math.inf
    found["nll_scaled"] = m.nll(logits / fitted, targets).item() if usable else None
    found["ece_scaled"] = m.ece(logits / fitted, targets).item() if usable else None
    compares = reference is not None and logits.shape[1] >= 3
    for metric in (m.nt_kl, m.nt_cosine, m.class_similarity_correlation):
        found[metric.__name__] = metric(logits, reference, targets).item() if compares else None  # type: ignore[arg-type]
    if split in own.features:
        found |= _geometry(own.features[split], targets)
    if truth.omitted is not None:
        found |= _omitted(own, truth, split, truth.omitted)
    return found


def _geometry(features: Tensor, targets: Tensor) -> dict[str, Any]:
    alive = (features != 0).any(dim=1)  # a sample whose every ReLU is off has no direction
    try:
        separation = m.class_separation(features[alive], targets[alive]).item()
        within = m.within_total_variance(features, targets).item()
        return {"class_separation": separation, "within_total_variance": within}
    except ValueError:  # a network that collapsed to a point
        return {"class_separation": None, "within_total_variance": None}


def _omitted(own: Outputs, truth: Truth, split: str, omitted: int) -> dict[str, Any]:
    """The bias is fitted on validation and used on test."""
    logits, targets = own.logits[split], truth.targets[split]
    bias = m.best_bias(own.logits["val"], truth.targets["val"], omitted)
    return {
        "omitted_recall": m.recall_with_bias(logits, targets, omitted).item(),
        "omitted_recall_corrected": m.recall_with_bias(logits, targets, omitted, bias).item(),
        "omitted_auroc": m.omitted_auroc(logits, targets, omitted).item(),
    }


def _fidelity(own: Outputs, teacher: Outputs | None, split: str) -> dict[str, Any]:
    if teacher is None:
        return {}
    student, taught_by = own.logits[split], teacher.logits[split]
    return {
        "agreement": m.agreement(student, taught_by).item(),
        "agreement5": m.agreement(student, taught_by, min(5, student.shape[1])).item(),
        "predictive_kl": m.predictive_kl(taught_by, student).item(),
    }


def _probe(logits: Tensor, targets: Tensor) -> dict[str, Any]:
    """The eps probe; on held-out samples it is known to find more than there is."""
    found = m.estimate_smoothing(logits, targets)
    return {"smoothing_estimate": found.label_smoothing, "smoothing_low": found.low, "smoothing_high": found.high}


# ---- for figures


def reliability(logits: Tensor, targets: Tensor) -> dict[str, list]:
    """How often the top class is right, by how probable it is said to be: 15 bins [lo, hi) of equal width."""
    confidence, top = logits.double().softmax(1).max(1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    count = bins.bincount(minlength=BINS)

    def means(values: Tensor) -> list[float | None]:
        sums = values.new_zeros(BINS).index_add_(0, bins, values)
        return [s / n if n else None for s, n in zip(sums.tolist(), count.tolist(), strict=True)]

    right = (top == targets).double()
    return {"count": count.tolist(), "confidence": means(confidence), "accuracy": means(right)}


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


def _finite(tree: Any) -> Any:
    """JSON has no inf and no nan: they are null."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
