"""Whether a training state belongs to what is to be trained; the first entry that does not is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def check_alike(what: str, found: Any, own: Mapping[str, Any]) -> None:
    """Raise ValueError unless both have the same keys, and tensors of the same shape and type in them."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} is a {type(found).__name__}")
    if different := found.keys() ^ own.keys():
        first = min(map(str, different))
        raise ValueError(f"{what}: {first!r} is {'missing' if first in own else 'unknown'}, {len(different)} in all")
    for key, value in own.items():
        if _form(found[key]) != _form(value):
            raise ValueError(f"{what}: {key!r} is {_form(found[key])}, must be {_form(value)}")


def _form(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_optimizer(found: Any, optimizer: Optimizer) -> None:
    """Raise ValueError unless the state is of the optimizer's parameters, as far as its rule can be told from outside.

    Torch itself checks how many parameters there are, but not the tensors that go with each. Those have the shape of
    the parameter, 1 or nothing in the place of a dimension that a factored optimizer sums over.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    if not isinstance(found, dict) or found.keys() != {"state", "param_groups"}:
        raise ValueError("optimizer: is not a state of one")
    if len(found["param_groups"]) != len(groups):
        raise ValueError(f"optimizer: has {len(found['param_groups'])} groups, must be {len(groups)}")
    for theirs, own in zip(found["param_groups"], groups, strict=True):
        if theirs.keys() != own.keys() or theirs["params"] != own["params"]:
            raise ValueError("optimizer: its groups are of other parameters")
    for index, state in found["state"].items():
        if not isinstance(index, int) or not 0 <= index < len(parameters):
            raise ValueError(f"optimizer: has a state of parameter {str(index)[:20]} of {len(parameters)}")
        shape = parameters[index].shape
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and not _goes_with(value, shape):
                raise ValueError(f"optimizer: {name} of parameter {index} is {tuple(value.shape)}, of {tuple(shape)}")


def _goes_with(value: Tensor, shape: tuple[int, ...]) -> bool:
    return value.ndim != len(shape) or all(n in (1, m) for n, m in zip(value.shape, shape, strict=True))


def whole_number(what: str, value: Any, most: int) -> int:
    """A count of a state. Raises ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{what} is {str(value)[:40]}, must be a whole number ≥ 0 and ≤ {most}")
    return value


def number(what: str, value: Any) -> float:
    """A finite number of a state. Raises ValueError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300 or math.isnan(value):
        raise ValueError(f"{what} is {str(value)[:40]}, must be a finite number")
    return value
