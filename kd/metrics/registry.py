"""The registry of metrics: the name, label and inputs of each, and the splits and networks it is measured on.

A new metric is one decorated function in any file of this folder::

    @metric("nll", "NLL", "down")
    def nll(logits: Tensor, targets: Tensor) -> Tensor: ...

Runs and studies then measure it, contrasts may name it, and the report prints it.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kd.metrics.inputs import Function, Undefined, checked

__all__ = ["METRICS", "Metric", "compute", "metric"]

HELD_OUT = ("val", "test")
SPLITS = ("train", *HELD_OUT)
NETWORKS = ("teacher", "student", "control")


@dataclass(frozen=True)
class Metric:
    """One entry of the registry.

    Attributes
    ----------
    name : the metric's name in result.json, in a study's table, and in a contrast
    label : the name in tables and reports
    better : "up" where a higher value is better, "down" where a lower one is, None where neither is
    function : takes what `needs` names, in that order, and returns a number
    needs : keys of the evidence that `compute` is given; by default the function's parameters without a default.
        Beside those of the legend in `kd.metrics`: scaled, the logits divided by the temperature fitted on validation;
        omitted, the class left out of training; bias, its `best_bias` on validation
    percent : whether it is a share, printed in per cent
    splits, networks : where it is measured
    misleading : why the value alone invites a wrong conclusion; printed beside it
    """

    name: str
    label: str
    better: str | None
    function: Callable[..., Any]
    needs: tuple[str, ...]
    percent: bool = False
    splits: tuple[str, ...] = HELD_OUT
    networks: tuple[str, ...] = NETWORKS
    misleading: str = ""

    def value(self, evidence: Mapping[str, Any]) -> float | None:
        """The metric of this evidence; None if an input is None, or if the metric is undefined or not finite."""
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
    name: str, label: str, better: str | None = None, needs: tuple[str, ...] = (), **about: Any
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
    """Every metric of one network on one split for which the evidence suffices.

    Parameters
    ----------
    evidence : values by the names of `Metric.needs`. A metric is left out if a key it needs is missing, and None if the
        value of that key is None.
    split : "train", "val" or "test"
    network : "teacher", "student" or "control"
    """
    return {
        each.name: each.value(evidence)
        for each in METRICS.values()
        if split in each.splits and network in each.networks and evidence.keys() >= set(each.needs)
    }
