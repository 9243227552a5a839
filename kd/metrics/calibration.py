"""Accuracy, likelihood and calibration of the predicted probabilities."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.metrics.inputs import checked
from kd.metrics.registry import SPLITS, metric

__all__ = ["brier", "classwise_ece", "ece", "equal_mass_ece", "nll", "reliability_bins", "top_k_accuracy"]

BINS = 15  # of equal width, [lo, hi)


@metric("top1", "accuracy", "up", percent=True, splits=SPLITS)
def top_k_accuracy(logits: Tensor, targets: Tensor, k: int = 1) -> Tensor:
    """Share of samples whose class is among the k ≥ 1 largest logits, from 0 to 1; 1 for k ≥ K.

    mean over i of 1{rank of logits[i, targets[i]] < k}. Among equal logits the one with the lower index ranks first, as
    in argmax, so that a network with constant logits does not score 1.
    """
    own = logits.gather(1, targets[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    return (rank < k).double().mean()


metric("top5", "top-5 accuracy", "up", percent=True)(functools.partial(top_k_accuracy, k=5))


@metric("nll", "NLL", "down", splits=SPLITS)
def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood, the cross entropy with hard labels, in nats; log K for constant logits.

    mean over i of -log softmax(logits[i])[targets[i]]
    """
    return F.cross_entropy(logits, targets)


@metric("brier", "Brier score", "down")
def brier(logits: Tensor, targets: Tensor) -> Tensor:
    """Brier score: squared distance of the probabilities from the one-hot label, from 0 to 2 (certain and wrong).

    mean over i of Σ_k (softmax(logits[i])[k] - 1{k = targets[i]})²; Brier 1950, "Verification of forecasts expressed
    in terms of probability", whose range this is; others halve it or divide it by K.
    """
    return (logits.softmax(dim=1) - F.one_hot(targets, logits.shape[1])).square().sum(dim=1).mean()


@metric("ece", "ECE", "down", percent=True)
def ece(logits: Tensor, targets: Tensor) -> Tensor:
    """Expected calibration error of the top class over 15 bins of equal width, from 0 to 1.

    Σ_b (n_b / N) |accuracy_b - confidence_b|, bins [lo, hi); Guo et al. 2017, "On Calibration of Modern Neural
    Networks", section 2, whose bins are (lo, hi].
    """
    gap, confidence = _gap(logits, targets)
    return _sums(gap, _equal_width(confidence)).abs().sum() / len(gap)


@checked
def reliability_bins(logits: Tensor, targets: Tensor) -> dict[str, list]:
    """Bins of a reliability diagram: the accuracy of the top class, by its predicted probability.

    Returns a dict of lists with one entry per bin: count, mean confidence and accuracy; the last two are None for an
    empty bin. Σ_b (count_b / N) |accuracy_b - confidence_b| is `ece`.
    """
    gap, confidence = _gap(logits, targets)
    places = _equal_width(confidence)
    counts = places.bincount(minlength=BINS).tolist()

    def means(values: Tensor) -> list[float | None]:
        return [total / n if n else None for total, n in zip(_sums(values, places).tolist(), counts, strict=True)]

    return {"count": counts, "confidence": means(confidence), "accuracy": means((gap + confidence).round())}


@metric("equal_mass_ece", "equal-mass ECE", "down", percent=True)
def equal_mass_ece(logits: Tensor, targets: Tensor) -> Tensor:
    """Expected calibration error of the top class over 15 bins of equally many samples, from 0 to 1.

    Σ_b (n_b / N) |accuracy_b - confidence_b|, the sample of confidence rank r = 0..N-1 in bin floor(15 r / N); Nguyen &
    O'Connor 2015, "Posterior calibration and exploratory analysis", section 3. The released code of Mukhoti et al. 2020
    (AdaECE) has bins ceil(15 r / N) - 1: at some edges one sample is a bin lower, and the least confident one is in
    none. Equal confidences keep the samples' order.
    """
    gap, confidence = _gap(logits, targets)
    places = torch.arange(len(gap), device=gap.device) * BINS // len(gap)
    return _sums(gap[confidence.argsort(stable=True)], places).abs().sum() / len(gap)


@metric("classwise_ece", "classwise ECE", "down", percent=True)
def classwise_ece(logits: Tensor, targets: Tensor) -> Tensor:
    """Calibration error of each class's probability, averaged over the K classes; at most 2/K.

    (1/K) Σ_k Σ_b (n_bk / N) |share of class k_b - mean p_b[k]|, 15 bins [lo, hi) of equal width for each class; Kull et
    al. 2019, "Beyond temperature scaling", section 2. With many classes most probabilities are near 0, so that every
    network has a small error: compare it at equal K only. The released code of Mukhoti et al. 2020 averages over
    max(targets) + 1 classes, has bins (lo, hi] and drops probabilities of exactly 0.
    """
    p = logits.softmax(dim=1)
    gap = F.one_hot(targets, logits.shape[1]) - p
    sums = gap.new_zeros(BINS, logits.shape[1])
    return sums.scatter_add_(0, _equal_width(p), gap).abs().sum() / gap.numel()


def _gap(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) correctness (0 or 1) less confidence, and (N,) confidence, the largest probability."""
    confidence = logits.softmax(dim=1).amax(dim=1)
    return (logits.argmax(dim=1) == targets).double() - confidence, confidence


def _equal_width(p: Tensor) -> Tensor:
    return (p * BINS).long().clamp(max=BINS - 1)


def _sums(values: Tensor, places: Tensor) -> Tensor:
    return values.new_zeros(BINS).index_add_(0, places, values)
