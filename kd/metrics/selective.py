"""Abstaining: how well a score tells right predictions from wrong ones. Scores (N,), logits (N, K), targets (N,)."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.metrics.inputs import checked, checked_targets
from kd.metrics.registry import metric

__all__ = ["aurc", "aurc_max_probability", "aurc_normalised_logits", "max_probability", "normalised_max_logit"]

CENTRES = ("mean", "min", "none")


def aurc(scores: Tensor, correct: Tensor) -> Tensor:
    """Area under the risk-coverage curve, as the mean of the N selective risks; smaller is better.

    mean over i = 1..N of (errors among the i highest scores) / i; Geifman & El-Yaniv 2017, "Selective Classification
    for Deep Neural Networks", and their 2018 "Bias-Reduced Uncertainty Estimation" for the area. The released code of
    Xia et al. 2025 adds the point (coverage 0, risk 0) and takes trapezoids, which is this minus error rate / 2N.
    Equal scores have no order: each of them carries their group's error rate.

    Parameters
    ----------
    scores : (N,) floating point
        Higher means more trusted.
    correct : (N,) bool

    Returns
    -------
    Tensor
        () float64, between 0 and 1. The error rate for a constant score; 0 where nothing is wrong.
    """
    if scores.ndim != 1 or len(scores) == 0 or not scores.is_floating_point() or not scores.isfinite().all():
        raise ValueError(
            f"scores are {scores.dtype} of shape {tuple(scores.shape)}: must be (N,) finite numbers, N ≥ 1"
        )
    if correct.shape != scores.shape or correct.dtype != torch.bool:
        raise ValueError(
            f"correct is {correct.dtype} of shape {tuple(correct.shape)}: must be bool of shape ({len(scores)},)"
        )
    _, group, counts = (-scores.detach().double()).unique(return_inverse=True, return_counts=True)
    wrong = torch.zeros(len(counts), dtype=torch.float64, device=scores.device)
    wrong = wrong.index_add_(0, group, (~correct).double()) / counts
    errors = wrong.repeat_interleave(counts).cumsum(0)
    return (errors / torch.arange(1, len(errors) + 1, device=errors.device)).mean()


def max_probability(logits: Tensor) -> Tensor:
    """The score of a prediction by its confidence, max_k softmax(logits[i])[k].

    Hendrycks & Gimpel 2017, "A Baseline for Detecting Misclassified Examples". Label smoothing makes it worse at this
    (Xia et al. 2025).

    Parameters
    ----------
    logits : (N, K) floating point

    Returns
    -------
    Tensor
        (N,) float64, between 1/K and 1.
    """
    return checked("logits", logits).softmax(dim=1).amax(dim=1)


def normalised_max_logit(logits: Tensor, p: float = 4.0, centre: str = "mean") -> Tensor:
    """The score of a prediction by its largest logit in units of the logits' p-norm; recovers what smoothing spoils.

    max_k v[k] / ‖v‖_p, v = logits[i] - mean over k of logits[i]; Xia et al. 2025, "Towards Understanding Why Label
    Smoothing Degrades Selective Classification and How to Fix It"; Cattelan & Silva 2024 for the score. They choose p
    on validation data.

    Parameters
    ----------
    logits : (N, K) floating point
    p : at least 1
    centre : "mean", or of their code "min" or "none": what is taken off each row first

    Returns
    -------
    Tensor
        (N,) float64, at most 1 and invariant to the logits' scale; 0 where v is 0.
    """
    logits = checked("logits", logits)
    if not p >= 1:
        raise ValueError(f"p={p}: must be a number ≥ 1")
    if centre not in CENTRES:
        raise ValueError(f"centre={centre!r}: must be one of {', '.join(CENTRES)}")
    if centre == "mean":
        logits = logits - logits.mean(dim=1, keepdim=True)
    if centre == "min":
        logits = logits - logits.amin(dim=1, keepdim=True)
    # Scaled first: 1e200 to the power 4 is inf.
    size = logits.abs().amax(dim=1, keepdim=True)
    logits = logits / size.where(size > 0, 1)
    norm = torch.linalg.vector_norm(logits, ord=p, dim=1)
    return logits.amax(dim=1) / norm.where(norm > 0, 1)


@metric("aurc_max_probability", label="AURC (max probability)", better="down")
def aurc_max_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """`aurc` of the confidences; the usual one.

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64

    Returns
    -------
    Tensor
        () float64, between 0 and 1.
    """
    return aurc(max_probability(logits), _right(logits, targets))


@metric("aurc_normalised_logits", label="AURC (normalised logits)", better="down")
def aurc_normalised_logits(logits: Tensor, targets: Tensor, p: float = 4.0) -> Tensor:
    """`aurc` of the normalised logits; the fair one where smoothed and unsmoothed networks are compared.

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64
    p : at least 1

    Returns
    -------
    Tensor
        () float64, between 0 and 1.
    """
    return aurc(normalised_max_logit(logits, p), _right(logits, targets))


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.argmax(dim=1) == checked_targets(targets, logits)
