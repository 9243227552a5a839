"""Estimate of the label smoothing that a classifier was trained with, from its logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.metrics.inputs import checked
from kd.metrics.registry import SPLITS, metric

__all__ = ["SmoothingEstimate", "estimate_smoothing"]

# From networks of 10 and 12 classes trained here with known smoothing (LOG.md, 2026-11-25).
FEW = 100  # samples
LEAST_ACCURACY = 0.6
MOST_UNEVEN = 0.35
LEAST_MASS = 0.02


@dataclass(frozen=True)
class SmoothingEstimate:
    """The result of `estimate_smoothing`. Masses are under the convention "uniform"."""

    label_smoothing: float  # at the median gap
    low: float  # at the upper and the lower quartile of the gaps:
    high: float  # low .. high is an interquartile range, which does not shrink with N
    unevenness: float  # median deviation of a sample's non-target logits, over the median gap; 0 for two classes
    accuracy: float
    count: int  # samples classified correctly; all but the accuracy is computed from them

    @property
    def doubts(self) -> tuple[str, ...]:
        """Reasons not to trust the estimate."""
        reasons = {
            f"only {self.count} samples are classified correctly": self.count < FEW,
            f"only {self.accuracy:.0%} of the samples are classified correctly: not fitted, or not like the "
            "training data": self.accuracy < LEAST_ACCURACY,
            f"the other classes' logits differ by {self.unevenness:.2f} of the gap, which smoothing makes equal": (
                self.unevenness > MOST_UNEVEN
            ),
            f"a mass below {LEAST_MASS} is found without smoothing too": self.label_smoothing < LEAST_MASS,
        }
        return tuple(reason for reason, holds in reasons.items() if holds)

    def __str__(self) -> str:
        return f"{self.label_smoothing:.3f} (middle half of {self.count} samples {self.low:.3f} to {self.high:.3f})"


@checked
def estimate_smoothing(logits: Tensor, targets: Tensor) -> SmoothingEstimate:
    """The smoothing mass whose optimum has the observed logit gaps. Misleading before convergence.

    The smoothed cross entropy is least where the target's logit exceeds every other by g = log(1 + (1 - eps) K / eps)
    (Müller et al. 2019 show such clusters), so eps = K / (e^g - 1 + K). A sample's g is its target's logit less the
    mean of the others. The median g of the correctly classified samples gives the estimate, the quartiles of g give low
    and high: an interquartile range, not a confidence interval. The estimator is ours.

    Whatever else limits the gap looks like smoothing: too few epochs, strong weight decay, mixup, a temperature, an
    ensemble. Call it on training samples without augmentation; held-out samples give larger masses. `doubts` lists what
    the logits can show: few samples, many errors, unequal logits of the other classes, and a mass that networks trained
    without smoothing have too. The mass is nan, with a doubt, if no sample is classified correctly. A class that every
    sample masks by -inf does not count; one that some samples mask makes their gaps infinite.
    """
    right = logits.argmax(dim=1) == targets
    accuracy = right.double().mean().item()
    if not right.any():
        return SmoothingEstimate(math.nan, math.nan, math.nan, math.nan, 0.0, 0)
    kept = (logits > -torch.inf).any(dim=0)
    z, classes = logits[right], int(kept.sum())
    is_target = torch.arange(len(kept), device=z.device) == targets[right].unsqueeze(1)
    others = z[~is_target & kept].view(len(z), classes - 1)
    gaps = (z[is_target] - others.mean(dim=1)).clamp(max=700.0)  # beyond it e^gap is no float64
    low, gap, high = gaps.quantile(gaps.new_tensor([0.25, 0.5, 0.75])).tolist()
    spread = others.std(dim=1, correction=0).nan_to_num(nan=math.inf).median().item()
    mass, unevenness = _mass(gap, classes), spread / max(gap, 1e-9)  # the gap is 0 where all logits are equal
    return SmoothingEstimate(mass, _mass(high, classes), _mass(low, classes), unevenness, accuracy, len(z))


# On held-out samples the estimate is too high: the report shows by how much.
OF_TEACHERS = {"splits": SPLITS, "networks": ("teacher",)}
UNFINISHED = "a network trained too briefly, or with mixup, looks smoothed"


def _part(name: str) -> Callable[[Tensor, Tensor], float]:
    return lambda logits, targets: getattr(estimate_smoothing(logits, targets), name)


metric("smoothing_estimate", "estimated ε", misleading=UNFINISHED, **OF_TEACHERS)(_part("label_smoothing"))
metric("smoothing_low", "estimated ε, low", **OF_TEACHERS)(_part("low"))
metric("smoothing_high", "estimated ε, high", **OF_TEACHERS)(_part("high"))


def _mass(gap: float, classes: int) -> float:
    return classes / (math.exp(gap) - 1 + classes)
