"""Accuracy, and what the confidences are worth. Logits (N, K), targets (N,) int64; computed in float64 at T = 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.metrics.inputs import checked, checked_targets


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
