"""The registry of metrics: how each is called and printed, what it needs, and on what it is measured.

A new metric is one decorated function in any file of this folder::

    @metric("nll", "NLL", "down")
    def nll(logits: Tensor, targets: Tensor) -> Tensor: ...

Runs and studies then measure it, contrasts may name it, and the report prints it.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kd.metrics.inputs import Function, Undefined, checked

__all__ = ["METRICS", "Metric", "compute", "metric"]

HELD_OUT = ("val", "test")
SPLITS = ("train", *HELD_OUT)
NETWORKS = ("teacher", "student", "control")
Better = Literal["up", "down"] | None
Needs = tuple[str, ...]


@dataclass(frozen=True)
class Metric:
    """One entry of the registry.

    Attributes
    ----------
    name : the metric's name in result.json, in a study's table, and in a contrast
    label : the name for people, as a table's header has it
    better : "up" where a higher value is better, "down" where a lower one is, None where neither can be said
    function : takes what `needs` names, in that order, and returns a number
    needs : keys of the evidence that `compute` is given; the function's parameters without a default unless said
        otherwise. Beside those of the legend in `kd.metrics`: scaled, the logits over the temperature that suits
        validation best; omitted, a class; bias, what suits that class best on validation
    percent : whether it is a share, which people read in per cent
    splits, networks : where it is measured
    misleading : why the value alone invites a wrong conclusion; printed beside it
    """

    name: str
    label: str
    better: Better
    function: Callable[..., Any]
    needs: Needs
    percent: bool = False
    splits: tuple[str, ...] = HELD_OUT
    networks: tuple[str, ...] = NETWORKS
    misleading: str = ""

    def value(self, evidence: Mapping[str, Any]) -> float | None:
        """The metric of this evidence; None where a part of it is None, where it is undefined, or is not finite."""
        inputs = [evidence[need] for need in self.needs]
        if any(part is None for part in inputs):
            return None
        try:
            value = float(self.function(*inputs))
        except Undefined:
            return None
        return value if math.isfinite(value) else None


METRICS: dict[str, Metric] = {}


def metric(
    name: str, label: str, better: Better = None, needs: Needs = (), **about: Any
) -> Callable[[Function], Function]:
    """Register the decorated function as a `Metric` with these attributes, and have its arguments checked."""

    def register(function: Function) -> Function:
        assert name not in METRICS, f"two metrics are called {name}"
        parameters = inspect.signature(function).parameters.values()
        own = tuple(each.name for each in parameters if each.default is each.empty)
        METRICS[name] = Metric(name, label, better, checked(function), needs or own, **about)
        return METRICS[name].function  # type: ignore[return-value]

    return register


def compute(evidence: Mapping[str, Any], split: str, network: str) -> dict[str, float | None]:
    """Every metric of one network on one split that the evidence allows.

    Parameters
    ----------
    evidence : what is known, by the names of `Metric.needs`. A metric that needs a key which is not there is left out;
        one that needs a key whose value is None is None.
    split : "train", "val" or "test"
    network : "teacher", "student" or "control"
    """
    return {
        each.name: each.value(evidence)
        for each in METRICS.values()
        if split in each.splits and network in each.networks and evidence.keys() >= set(each.needs)
    }
