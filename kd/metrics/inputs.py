"""The checks that all metrics share."""

from __future__ import annotations

import torch
from torch import Tensor


def checked(name: str, logits: Tensor) -> Tensor:
    """Logits (N, K) in float64, or a ValueError that says what is wrong with them."""
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}: must be (N, K) with at least one row and one class")
    if not logits.is_floating_point():
        raise ValueError(f"{name} is {logits.dtype}: must be floating point, one logit per class")
    if not logits.isfinite().all():
        bad = (~logits.isfinite().all(dim=1)).sum().item()
        raise ValueError(f"{name} has {bad} rows with nan or inf: the model diverged, or its precision is too low")
    return logits.detach().double()


def checked_targets(targets: Tensor, logits: Tensor) -> Tensor:
    """Classes (N,) of the rows of `logits`, or a ValueError."""
    n, k = logits.shape
    if targets.shape != (n,) or targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype} of shape {tuple(targets.shape)}: must be int64 of shape ({n},)")
    if targets.min() < 0 or targets.max() >= k:
        raise ValueError(
            f"targets go from {targets.min()} to {targets.max()}: must be from 0 to {k - 1}, logits have {k} classes"
        )
    return targets
