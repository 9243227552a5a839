"""Selective classification: the area under the risk-coverage curve, and two scores that rank predictions."""

import torch
from torch import Tensor

from kd.metrics.inputs import centred, checked
from kd.metrics.registry import metric

__all__ = ["aurc", "aurc_max_probability", "aurc_normalised_logits", "max_probability", "normalised_max_logit"]


def aurc(scores: Tensor, correct: Tensor) -> Tensor:
    """Area under the risk-coverage curve, as the mean of the N selective risks, from 0 to 1; smaller is better.

    mean over i = 1..N of (errors among the i highest scores) / i; Geifman & El-Yaniv 2017, "Selective Classification
    for Deep Neural Networks", and their 2018 "Bias-Reduced Uncertainty Estimation" for the area. The released code of
    Xia et al. 2025 adds the point (coverage 0, risk 0) and takes trapezoids, which is this minus error rate / 2N.
    Equal scores have no order: each counts the error rate of its group.

    Parameters
    ----------
    scores : (N,) finite floating point; higher means more trusted
    correct : (N,) bool
    """
    fits = scores.shape == correct.shape == (len(scores),) and len(scores) > 0 and correct.dtype == torch.bool
    if not fits or not scores.isfinite().all():
        got = f"scores of shape {tuple(scores.shape)}, correct of shape {tuple(correct.shape)} and {correct.dtype}"
        raise ValueError(f"{got}: must be (N,) finite numbers and (N,) bool, N ≥ 1")
    _, group, counts = (-scores.detach().double()).unique(return_inverse=True, return_counts=True)
    wrong = torch.zeros(len(counts), dtype=torch.float64, device=scores.device)
    wrong = wrong.index_add_(0, group, (~correct).double()) / counts
    errors = wrong.repeat_interleave(counts).cumsum(0)
    return (errors / torch.arange(1, len(errors) + 1, device=errors.device)).mean()


@checked
def max_probability(logits: Tensor) -> Tensor:
    """The confidence (N,) as a score, max_k softmax(logits[i])[k], from 1/K to 1.

    Hendrycks & Gimpel 2017, "A Baseline for Detecting Misclassified Examples". Label smoothing makes it a worse
    score (Xia et al. 2025).
    """
    return logits.softmax(dim=1).amax(dim=1)


@checked
def normalised_max_logit(logits: Tensor, p: float = 4.0) -> Tensor:
    """The largest centred logit (N,) over the p-norm, a score that label smoothing does not make worse.

    max_k v[k] / ‖v‖_p, v = logits[i] - mean over k of logits[i]; Xia et al. 2025, "Towards Understanding Why Label
    Smoothing Degrades Selective Classification and How to Fix It"; Cattelan & Silva 2024 for the score. They choose
    p ≥ 1 on validation data. At most 1, invariant to the scale of the logits, 0 where v is 0.
    """
    v = centred(logits, logits > -torch.inf)
    # Scaled first, as 1e200 to the power 4 would be inf.
    size = v.abs().amax(dim=1, keepdim=True)
    v = v / size.where(size > 0, 1)
    norm = torch.linalg.vector_norm(v, ord=p, dim=1)
    return v.amax(dim=1) / norm.where(norm > 0, 1)


@metric("aurc_max_probability", "AURC (max probability)", "down")
def aurc_max_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """`aurc` of `max_probability`, the usual score."""
    return aurc(max_probability(logits), logits.argmax(dim=1) == targets)


@metric("aurc_normalised_logits", "AURC (normalised logits)", "down")
def aurc_normalised_logits(logits: Tensor, targets: Tensor, p: float = 4.0) -> Tensor:
    """`aurc` of `normalised_max_logit`, for a fair comparison of networks with and without label smoothing."""
    return aurc(normalised_max_logit(logits, p), logits.argmax(dim=1) == targets)
