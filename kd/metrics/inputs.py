"""The checks that all metrics share: arguments are checked and converted by their names."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

LOGITS = ("logits", "reference", "teacher")
FEATURES = ("features", "weight", "views")
Function = TypeVar("Function", bound=Callable[..., Any])


class Undefined(ValueError):
    """The inputs are well-formed and the metric has no value for them, as a rank of one class has none."""


def checked(function: Function) -> Function:
    """Check a metric's tensors and convert them to float64, by the names of the legend in `kd.metrics`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def with_checks(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        for name in given.keys() & {*LOGITS}:
            given[name] = _logits(name, given[name])
        for name in given.keys() & {*FEATURES}:
            given[name] = _matrix(name, given[name], "(N, D) with at least one row and column", 1)
        shapes = {name: tuple(given[name].shape) for name in LOGITS if name in given}
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"{' and '.join(shapes)} have shapes {' and '.join(map(str, shapes.values()))}: must agree"
            )
        if "targets" in given:
            rows = next(given[name] for name in (*LOGITS, *FEATURES) if name in given)
            _check_targets(given["targets"], len(rows), rows.shape[1] if shapes else None)
        return function(*call.args, **call.kwargs)

    return with_checks  # type: ignore[return-value]


def _matrix(name: str, values: Tensor, shape: str, columns: int) -> Tensor:
    if values.ndim != 2 or len(values) == 0 or values.shape[1] < columns:
        raise ValueError(f"{name} has shape {tuple(values.shape)}: must be {shape}")
    if not values.is_floating_point():
        raise ValueError(f"{name} is {values.dtype}: must be floating point")
    if bad := (~values.isfinite().all(dim=1)).sum().item():
        raise ValueError(f"{name} has {bad} rows with nan or inf: the model diverged, or its precision is too low")
    return values.detach().double()


def _logits(name: str, logits: Tensor) -> Tensor:
    wide = _matrix(name, logits, "(N, K) with at least one row, two classes", 2)
    tolerance = max(1e-4, 4 * torch.finfo(logits.dtype).eps)
    if (wide >= 0).all() and ((wide.sum(dim=1) - 1).abs() <= tolerance).all():
        raise ValueError(f"{name} are probabilities, rows ≥ 0 that sum to 1: must be logits; their logarithm is one")
    return wide


def _check_targets(targets: Tensor, n: int, classes: int | None) -> None:
    if targets.shape != (n,) or targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype} of shape {tuple(targets.shape)}: must be int64 of shape ({n},)")
    if classes is not None and (targets.min() < 0 or targets.max() >= classes):
        low, high = targets.min().item(), targets.max().item()
        raise ValueError(f"targets go from {low} to {high}: must be from 0 to {classes - 1}, the classes of the logits")


def present_classes(targets: Tensor) -> Tensor:
    """The class (N,) of each sample, renumbered 0..C-1 over the C ≥ 2 classes present. Raises Undefined for one."""
    present, groups = targets.unique(return_inverse=True)
    if len(present) < 2:
        raise Undefined(f"targets hold one class, {present.item()}: must hold at least two")
    return groups


def class_means(values: Tensor, groups: Tensor) -> Tensor:
    """The mean (C, D) of the rows (N, D) of each of the groups 0..C-1, none of which is empty."""
    counts = groups.bincount().unsqueeze(1)
    return values.new_zeros(len(counts), values.shape[1]).index_add_(0, groups, values) / counts
