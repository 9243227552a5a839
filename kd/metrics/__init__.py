"""Metrics of predictions: pure functions of logits, usable without the rest of kd."""

from __future__ import annotations

from torch import Tensor

from kd.metrics.calibration import brier, ece, nll, top_k_accuracy
from kd.metrics.fidelity import agreement, predictive_kl

__all__ = ["agreement", "brier", "classification", "ece", "nll", "predictive_kl", "top_k_accuracy"]


def classification(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Everything that a split's logits (N, K) and labels (N,) say about a classifier; accuracies and ece from 0 to 1.

    top5 counts the best min(5, K), so that it is 1 where there are at most five classes.
    """
    return {
        "top1": top_k_accuracy(logits, targets, 1).item(),
        "top5": top_k_accuracy(logits, targets, min(5, logits.shape[-1])).item(),
        "nll": nll(logits, targets).item(),
        "ece": ece(logits, targets).item(),
        "brier": brier(logits, targets).item(),
    }
