"""Accuracy, likelihood and calibration of the predicted probabilities."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.metrics.inputs import checked
from kd.metrics.registry import SPLITS, metric

__all__ = ["brier", "classwise_ece", "ece", "equal_mass_ece", "mce", "nll", "reliability_bins", "top_k_accuracy"]

BINS = 15


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

    mean over i of -log softmax(logits[i])[targets[i]]; inf where a label is masked by -inf.
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
def ece(logits: Tensor, targets: Tensor, bins: int = BINS) -> Tensor:
    """Expected calibration error of the top class over bins of equal width, from 0 to 1.

    Σ_b (n_b / N) |accuracy_b - confidence_b|, bins [lo, hi); Guo et al. 2017, "On Calibration of Modern Neural
    Networks", section 2, whose bins are (lo, hi].
    """
    gap, confidence = _gap(logits, targets)
    return _sums(gap, _equal_width(confidence, bins), bins).abs().sum() / len(gap)


@checked
def mce(logits: Tensor, targets: Tensor, bins: int = BINS) -> Tensor:
    """Maximum calibration error: the worst bin of `ece`. Misleading: the worst bin usually has the fewest samples.

    max over b of |accuracy_b - confidence_b|, empty bins count 0; Naeini et al. 2015, "Obtaining Well Calibrated
    Probabilities Using Bayesian Binning", section 2.
    """
    gap, confidence = _gap(logits, targets)
    places = _equal_width(confidence, bins)
    return (_sums(gap, places, bins).abs() / places.bincount(minlength=bins).clamp(min=1)).max()


@checked
def reliability_bins(logits: Tensor, targets: Tensor, bins: int = BINS) -> dict[str, list]:
    """Bins of a reliability diagram: the accuracy of the top class, by its predicted probability.

    Returns a dict of lists with one entry per bin: count, mean confidence and accuracy; the last two are None for an
    empty bin. Σ_b (count_b / N) |accuracy_b - confidence_b| is `ece`.
    """
    gap, confidence = _gap(logits, targets)
    places = _equal_width(confidence, bins)
    counts = places.bincount(minlength=bins).tolist()

    def means(values: Tensor) -> list[float | None]:
        sums = _sums(values, places, bins).tolist()
        return [total / n if n else None for total, n in zip(sums, counts, strict=True)]

    return {"count": counts, "confidence": means(confidence), "accuracy": means((gap + confidence).round())}


@metric("equal_mass_ece", "equal-mass ECE", "down", percent=True)
def equal_mass_ece(logits: Tensor, targets: Tensor, bins: int = BINS, released: bool = False) -> Tensor:
    """Expected calibration error of the top class over bins of equally many samples, from 0 to 1.

    Σ_b (n_b / N) |accuracy_b - confidence_b|, the sample of confidence rank r = 0..N-1 in bin floor(bins r / N); Nguyen
    & O'Connor 2015, "Posterior calibration and exploratory analysis", section 3. Equal confidences keep the samples'
    order.

    Parameters
    ----------
    released : compute AdaECE as the released code of Mukhoti et al. 2020 does, "Calibrating Deep Neural Networks using
        Focal Loss", section 5. Its bins are (e_b, e_b+1], e_b the confidence of rank b N / bins, interpolated: without
        ties bin ceil(bins r / N) - 1, so that at some edges one sample is a bin lower. The least confident sample, and
        all of its confidence, are in no bin; equal confidences share one.
    """
    gap, confidence = _gap(logits, targets)
    ranked, order = confidence.sort(stable=True)
    n = len(gap)
    if not released:
        return _sums(gap[order], torch.arange(n, device=gap.device) * bins // n, bins).abs().sum() / n
    # Interpolated, an edge between two confidences that differ by rounding alone rounds as theirs does.
    place = (torch.arange(bins + 1, dtype=gap.dtype, device=gap.device) * (n / bins)).clamp(max=n - 1)
    below = place.long()
    edges = torch.lerp(ranked[below], ranked[(below + 1).clamp(max=n - 1)], place - below)
    return _sums(gap, torch.bucketize(confidence, edges), bins + 1)[1:].abs().sum() / n  # 0 is up to the first edge


@metric("classwise_ece", "classwise ECE", "down", percent=True)
def classwise_ece(logits: Tensor, targets: Tensor, bins: int = BINS, present: bool = False) -> Tensor:
    """Calibration error of each class's probability, averaged over the K classes; at most 2/K.

    (1/K) Σ_k Σ_b (n_bk / N) |share of class k_b - mean p_b[k]|, bins [lo, hi) of equal width for each class; Kull et
    al. 2019, "Beyond temperature scaling", section 2. With many classes most probabilities are near 0, so that every
    network has a small error: compare it at equal K only. A masked class counts among the K.

    Parameters
    ----------
    present : average over the classes that `targets` hold, whose number divides in place of K; the released code of
        Mukhoti et al. 2020 averages over classes 0 to max(targets), the same where none of these is absent. It has bins
        (lo, hi] and drops probabilities of exactly 0.
    """
    p = logits.softmax(dim=1)
    gap = F.one_hot(targets, logits.shape[1]) - p
    sums = gap.new_zeros(bins, logits.shape[1])
    errors = sums.scatter_add_(0, _equal_width(p, bins), gap).abs()  # (bins, K)
    errors = errors[:, targets.unique()] if present else errors
    return errors.sum() / (len(gap) * errors.shape[1])


def _gap(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) correctness (0 or 1) less confidence, and (N,) confidence, the largest probability."""
    confidence = logits.softmax(dim=1).amax(dim=1)
    return (logits.argmax(dim=1) == targets).double() - confidence, confidence


def _equal_width(p: Tensor, bins: int) -> Tensor:
    return (p * bins).long().clamp(max=bins - 1)


def _sums(values: Tensor, places: Tensor, bins: int) -> Tensor:
    return values.new_zeros(bins).index_add_(0, places, values)
