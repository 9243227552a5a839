"""Input checks that all metrics share; an argument's name says which apply."""

import functools
import inspect
import numbers
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from kd.errors import require

LOGITS = ("logits", "reference", "teacher")
FEATURES = ("features", "weight", "views")
_require = functools.partial(require, error=ValueError)  # nobody typed a tensor: no ConfigError
Function = TypeVar("Function", bound=Callable[..., Any])


class Undefined(ValueError):
    """The inputs are well-formed, but the metric is undefined for them, as within-class variance is for one class."""


def checked(function: Function) -> Function:
    """Check a metric's tensors and convert them to float64, by the names of the legend in `kd.metrics`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def with_checks(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        for name in given.keys() & {*LOGITS, *FEATURES}:
            given[name] = _matrix(name, given[name])
        shapes = {name: tuple(given[name].shape) for name in LOGITS if name in given}
        _require(len(set(shapes.values())) <= 1, f"{' and '.join(shapes)} have shapes {[*shapes.values()]}: must agree")
        bins = given.get("bins", 1)
        _require(isinstance(bins, numbers.Integral) and int(bins) > 0, f"bins={bins!r}: must be an integer ≥ 1")
        if "targets" in given:
            rows = next(given[name] for name in (*LOGITS, *FEATURES) if name in given)
            _check_targets(given["targets"], len(rows), rows.shape[1] if shapes else None)
        return function(*call.args, **call.kwargs)

    return with_checks  # type: ignore[return-value]


def _matrix(name: str, values: Tensor) -> Tensor:
    """Check a matrix of logits or features, and convert it to float64 without gradient."""
    columns = 2 if name in LOGITS else 1
    fits = values.ndim == 2 and len(values) > 0 and values.shape[1] >= columns
    _require(fits, f"{name} has shape {tuple(values.shape)}: must have 2 dimensions, ≥ 1 row and ≥ {columns} column(s)")
    _require(values.is_floating_point(), f"{name} is {values.dtype}: must be floating point")
    wide = values.detach().double()
    usable, kinds = wide.isfinite().all(dim=1), "nan or inf"
    if name in LOGITS:
        usable, kinds = (wide < torch.inf).all(dim=1) & (wide > -torch.inf).any(dim=1), "nan, inf or nothing but -inf"
    bad = (~usable).sum().item()
    _require(not bad, f"{name} has {bad} rows with {kinds}: the model diverged, or its precision is too low")
    tolerance = max(1e-4, 4 * torch.finfo(values.dtype).eps)
    sums_to_one = (wide >= 0).all() and ((wide.sum(dim=1) - 1).abs() <= tolerance).all()
    # Rows of 0 and 1 alone are rather small integers as logits than a softmax, which reaches neither.
    if name in LOGITS and sums_to_one and (wide.frac() != 0).any():
        message = f"{name} look like probabilities, rows ≥ 0 that sum to 1: pass logits, or probabilities.log()"
        warnings.warn(message, stacklevel=3)  # which Python shows once for each calling line
    return wide


def _check_targets(targets: Tensor, n: int, classes: int | None) -> None:
    fits = targets.shape == (n,) and targets.dtype == torch.int64
    _require(fits, f"targets are {targets.dtype} of shape {tuple(targets.shape)}: must be int64 of shape ({n},)")
    low, high = targets.min().item(), targets.max().item()
    if classes is not None:
        _require(low >= 0 and high < classes, f"targets go from {low} to {high}: must be from 0 to {classes - 1}")


def present_classes(targets: Tensor) -> Tensor:
    """The class (N,) of each sample, renumbered 0..C-1 over the C ≥ 2 classes present. Raises Undefined for one."""
    present, groups = targets.unique(return_inverse=True)
    require(len(present) > 1, f"targets hold one class, {present[0]}: must hold at least two", Undefined)
    return groups


def centred(values: Tensor, kept: Tensor) -> Tensor:
    """Rows (N, K) less the mean of their entries that are kept (N, K) bool, and 0 in place of the others."""
    values = values.where(kept, 0)
    return (values - values.sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True)).where(kept, 0)


def class_means(values: Tensor, groups: Tensor) -> Tensor:
    """The mean (C, D) of the rows (N, D) of each of the groups 0..C-1, none of which is empty."""
    counts = groups.bincount().unsqueeze(1)
    return values.new_zeros(len(counts), values.shape[1]).index_add_(0, groups, values) / counts
