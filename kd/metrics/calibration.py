"""Accuracy, and what the confidences are worth. Logits (N, K), targets (N,) int64; computed in float64 at T = 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.metrics.inputs import checked, checked_targets
from kd.metrics.registry import SPLITS, metric

__all__ = [
    "brier",
    "classification",
    "classwise_ece",
    "ece",
    "equal_mass_ece",
    "mce",
    "nll",
    "reliability_bins",
    "top5_accuracy",
    "top_k_accuracy",
]

BINS = 15  # of equal width, [lo, hi)


def classification(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """The scores of a run's table: top1, top5, nll, ece and brier as floats."""
    scores = {"top1": top_k_accuracy, "top5": top5_accuracy, "nll": nll, "ece": ece, "brier": brier}
    return {name: score(logits, targets).item() for name, score in scores.items()}


@metric("top1", label="accuracy", better="up", percent=True, splits=SPLITS)
def top_k_accuracy(logits: Tensor, targets: Tensor, k: int = 1) -> Tensor:
    """Share of samples whose class is among the k largest logits.

    mean over i of 1{rank of logits[i, targets[i]] < k}; of equal logits the one with the lower index ranks first,
    as in argmax, so that a network with constant logits does not score 1.

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64
    k : from 1 to K

    Returns
    -------
    Tensor
        () float64, between 0 and 1.
    """
    logits = checked("logits", logits)
    targets = checked_targets(targets, logits)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k={k}: must be from 1 to {logits.shape[1]}, the number of classes")
    own = logits.gather(1, targets[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    return (rank < k).double().mean()


@metric("top5", label="top-5 accuracy", better="up", percent=True)
def top5_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """`top_k_accuracy` of the best min(5, K), so that it is 1 where there are at most five classes."""
    return top_k_accuracy(logits, targets, min(5, logits.shape[-1]))


@metric("nll", label="NLL", better="down", splits=SPLITS)
def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood, the cross entropy with hard labels.

    mean over i of -log softmax(logits[i])[targets[i]]

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64

    Returns
    -------
    Tensor
        () float64 in nats, at least 0; log K for constant logits.
    """
    logits = checked("logits", logits)
    return F.cross_entropy(logits, checked_targets(targets, logits))


@metric("brier", label="Brier score", better="down")
def brier(logits: Tensor, targets: Tensor) -> Tensor:
    """Brier score: squared distance between the probabilities and the one-hot label.

    mean over i of Σ_k (softmax(logits[i])[k] - 1{k = targets[i]})²; Brier 1950, "Verification of forecasts expressed
    in terms of probability", whose range is 0 to 2 (others halve it or divide it by K).

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64

    Returns
    -------
    Tensor
        () float64, between 0 (certain and right) and 2 (certain and wrong).
    """
    logits = checked("logits", logits)
    labels = F.one_hot(checked_targets(targets, logits), logits.shape[1])
    return (logits.softmax(dim=1) - labels).square().sum(dim=1).mean()


@metric("ece", label="ECE", better="down", percent=True)
def ece(logits: Tensor, targets: Tensor) -> Tensor:
    """Expected calibration error of the top class, over 15 bins of equal width.

    Σ_b (n_b / N) |accuracy_b - confidence_b|, bins [lo, hi); Guo et al. 2017, "On Calibration of Modern Neural
    Networks", section 2, whose bins are (lo, hi].

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64

    Returns
    -------
    Tensor
        () float64, between 0 and 1. torchmetrics sums in float32: good to about 1e-5.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error  # its import takes a second

    logits = checked("logits", logits)
    targets = checked_targets(targets, logits)
    # torchmetrics puts a confidence of exactly 1 into a 16th bin of its own (its issue 3510)
    probabilities = logits.softmax(dim=1).clamp(max=1 - 1e-6)
    return multiclass_calibration_error(probabilities, targets, num_classes=logits.shape[1], n_bins=15).double()


@metric(
    "mce", label="MCE", better="down", percent=True, splits=(), misleading="the worst bin is mostly the emptiest one"
)
def mce(logits: Tensor, targets: Tensor) -> Tensor:
    """Maximum calibration error: the worst bin of `ece`. Misleads: the worst bin is mostly the emptiest one.

    max over b of |accuracy_b - confidence_b|, 15 bins [lo, hi) of equal width, empty ones count 0; Naeini et al. 2015,
    "Obtaining Well Calibrated Probabilities Using Bayesian Binning", section 2.

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64

    Returns
    -------
    Tensor
        () float64, between 0 and 1, at least `ece`.
    """
    gap, confidence = _gap(logits, targets)
    bins = _equal_width(confidence)
    counts = bins.bincount(minlength=BINS).clamp(min=1)
    return (_sums(gap, bins).abs() / counts).max()


def reliability_bins(logits: Tensor, targets: Tensor, bins: int = BINS) -> dict[str, list]:
    """A reliability diagram: how often the top class is right, by how probable it is said to be.

    Returns
    -------
    dict
        count, confidence and accuracy of each bin, as lists; both means are None in an empty bin. ``Σ_b count_b / N
        |accuracy_b - confidence_b|`` is `ece`, up to the float32 of the latter.
    """
    gap, confidence = _gap(logits, targets)
    places = _equal_width(confidence, bins)
    counts = places.bincount(minlength=bins).tolist()

    def means(values: Tensor) -> list[float | None]:
        sums = _sums(values, places, bins).tolist()
        return [total / n if n else None for total, n in zip(sums, counts, strict=True)]

    return {"count": counts, "confidence": means(confidence), "accuracy": means((gap + confidence).round())}


@metric("equal_mass_ece", label="equal-mass ECE", better="down", percent=True)
def equal_mass_ece(logits: Tensor, targets: Tensor) -> Tensor:
    """Expected calibration error of the top class, over 15 bins of equally many samples.

    Σ_b (n_b / N) |accuracy_b - confidence_b|, the sample of confidence rank r = 0..N-1 in bin floor(15 r / N); Nguyen &
    O'Connor 2015, "Posterior calibration and exploratory analysis", section 3. The released code of Mukhoti et al. 2020
    (AdaECE) has bins ceil(15 r / N) - 1: at some edges one sample is a bin lower, and the least confident one is in
    none. Equal confidences keep the samples' order.

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64

    Returns
    -------
    Tensor
        () float64, between 0 and 1.
    """
    gap, confidence = _gap(logits, targets)
    n = len(gap)
    bins = torch.arange(n, device=gap.device) * BINS // n
    return _sums(gap[confidence.argsort(stable=True)], bins).abs().sum() / n


@metric("classwise_ece", label="classwise ECE", better="down", percent=True)
def classwise_ece(logits: Tensor, targets: Tensor) -> Tensor:
    """Calibration error of every class's probability, not only the top one's; the mean over the K classes.

    (1/K) Σ_k Σ_b (n_bk / N) |share of class k_b - mean p_b[k]|, 15 bins [lo, hi) of equal width for each class; Kull et
    al. 2019, "Beyond temperature scaling", section 2. With many classes nearly all of it is probabilities near 0, so
    that it is small for everything: compare it at equal K only. The released code of Mukhoti et al. 2020 averages over
    max(targets) + 1 classes, has bins (lo, hi] and drops probabilities of exactly 0.

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64

    Returns
    -------
    Tensor
        () float64, between 0 and 2/K.
    """
    logits = checked("logits", logits)
    p = logits.softmax(dim=1)
    gap = F.one_hot(checked_targets(targets, logits), logits.shape[1]) - p
    sums = torch.zeros(BINS, logits.shape[1], dtype=torch.float64, device=logits.device)
    return sums.scatter_add_(0, _equal_width(p), gap).abs().sum() / gap.numel()


def _gap(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) how much more right than confident each sample is, and its confidence."""
    logits = checked("logits", logits)
    confidence = logits.softmax(dim=1).amax(dim=1)
    right = logits.argmax(dim=1) == checked_targets(targets, logits)
    return right.double() - confidence, confidence


def _equal_width(p: Tensor, bins: int = BINS) -> Tensor:
    return (p * bins).long().clamp(max=bins - 1)


def _sums(values: Tensor, places: Tensor, bins: int = BINS) -> Tensor:
    return values.new_zeros(bins).index_add_(0, places, values)
