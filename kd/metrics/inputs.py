"""The checks that all metrics share."""

from __future__ import annotations

import torch
from torch import Tensor


class Undefined(ValueError):
    """The inputs are well-formed and the metric has no value for them, as a rank of one class has none."""


def checked(name: str, logits: Tensor) -> Tensor:
    """Logits (N, K) in float64, or a ValueError that says what is wrong with them."""
    if logits.ndim != 2 or len(logits) == 0 or logits.shape[1] < 2:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}: must be (N, K) with at least one row, two classes")
    if not logits.is_floating_point():
        raise ValueError(f"{name} is {logits.dtype}: must be floating point, one logit per class")
    if not logits.isfinite().all():
        bad = (~logits.isfinite().all(dim=1)).sum().item()
        raise ValueError(f"{name} has {bad} rows with nan or inf: the model diverged, or its precision is too low")
    wide = logits.detach().double()
    tolerance = max(1e-4, 4 * torch.finfo(logits.dtype).eps)
    if (wide >= 0).all() and ((wide.sum(dim=1) - 1).abs() <= tolerance).all():
        raise ValueError(f"{name} are probabilities, rows ≥ 0 that sum to 1: must be logits; their logarithm is one")
    return wide


def checked_pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) of two networks for the same samples, both in float64, or a ValueError."""
    if a.shape != b.shape:
        raise ValueError(f"{name_a} has shape {tuple(a.shape)}, {name_b} has {tuple(b.shape)}: must be the same")
    return checked(name_a, a), checked(name_b, b)


def checked_targets(targets: Tensor, logits: Tensor) -> Tensor:
    """Classes (N,) of the rows of `logits`, or a ValueError."""
    n, k = logits.shape
    _check_labels(targets, n)
    if targets.min() < 0 or targets.max() >= k:
        raise ValueError(
            f"targets go from {targets.min()} to {targets.max()}: must be from 0 to {k - 1}, logits have {k} classes"
        )
    return targets


def checked_features(name: str, features: Tensor) -> Tensor:
    """Features (N, D) in float64, or a ValueError that says what is wrong with them."""
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} has shape {tuple(features.shape)}: must be (N, D) with at least one row and column")
    if not features.is_floating_point():
        raise ValueError(f"{name} is {features.dtype}: must be floating point")
    if not features.isfinite().all():
        bad = (~features.isfinite().all(dim=1)).sum().item()
        raise ValueError(f"{name} has {bad} rows with nan or inf: the model diverged, or its precision is too low")
    return features.detach().double()


def checked_groups(targets: Tensor, features: Tensor) -> Tensor:
    """The class (N,) of each row of `features`, renumbered 0..C-1 over the C ≥ 2 classes present, or a ValueError."""
    _check_labels(targets, len(features))
    present, groups = targets.unique(return_inverse=True)
    if len(present) < 2:
        raise Undefined(f"targets hold one class, {present.item()}: must hold at least two")
    return groups


def checked_class(name: str, value: int, logits: Tensor) -> int:
    """A class of the logits (N, K), or a ValueError."""
    if not 0 <= value < logits.shape[1]:
        raise ValueError(f"{name}={value}: must be from 0 to {logits.shape[1] - 1}, the classes of the logits")
    return value


def checked_temperature(temperature: float) -> float:
    """A temperature, finite and above 0, or a ValueError."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be finite and > 0")
    return temperature


def _check_labels(targets: Tensor, n: int) -> None:
    if targets.shape != (n,) or targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype} of shape {tuple(targets.shape)}: must be int64 of shape ({n},)")


def class_means(values: Tensor, groups: Tensor) -> Tensor:
    """The mean (C, D) of the rows (N, D) of each of the groups 0..C-1, none of which is empty."""
    counts = groups.bincount().unsqueeze(1)
    return values.new_zeros(len(counts), values.shape[1]).index_add_(0, groups, values) / counts
