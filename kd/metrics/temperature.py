"""Post-hoc temperature scaling: a convex search over 1/T."""

import math

import torch
from torch import Tensor

from kd.metrics.calibration import ece, nll
from kd.metrics.registry import metric

__all__ = ["post_hoc_temperature"]

# On logits divided by the temperature that was fitted on validation.
metric("nll_scaled", "NLL after T*", "down", needs=("scaled", "targets"))(nll)
metric("ece_scaled", "ECE after T*", "down", needs=("scaled", "targets"), percent=True)(ece)


@metric("post_hoc_temperature", "T*", splits=("val",))
def post_hoc_temperature(logits: Tensor, targets: Tensor) -> Tensor:
    """T*, the temperature whose negative log-likelihood is least on these logits.

    argmin over T of mean over i of -log softmax(logits[i] / T)[targets[i]]; Guo et al. 2017, "On Calibration of Modern
    Neural Networks", section 4.2. Fit it on validation, use it on test. Below 1 for underconfident networks, as
    after label smoothing. T*(a·logits) = a·T*(logits), to a relative 1e-12. 0 if every sample is right, since the
    likelihood then rises as T falls; inf if the labels' logits are on average no larger than the others', so that no T
    beats constant logits.
    """
    inverse = inverse_temperature(logits, logits.gather(1, targets[:, None]).squeeze(1))
    return torch.tensor(math.inf if inverse == 0 else 1 / inverse, dtype=torch.float64)


def inverse_temperature(logits: Tensor, expected: Tensor) -> float:
    """The b = 1/T from 0 to inf at which mean over i of log Σ_k exp(b logits[i, k]) - b expected[i] is least.

    That is the cross entropy from any distribution over the classes under which the mean of logits[i] is expected[i].
    It is convex in b, and its slope is mean over i of Σ_k softmax(b logits[i])[k] logits[i, k] - expected[i]. Newton's
    method finds the root of the slope; a step that leaves the bracket is replaced by bisection.
    """
    top = logits.amax(dim=1, keepdim=True)
    z, expected = logits - top, expected - top.squeeze(1)

    def slope_and_curvature(b: float) -> tuple[float, float]:
        q = (b * z).softmax(dim=1)
        mean = (q * z).sum(dim=1)
        spread = (q * z.square()).sum(dim=1) - mean.square()
        return (mean - expected).mean().item(), spread.mean().item()

    if slope_and_curvature(0.0)[0] >= 0:
        return 0.0
    if (expected == 0).all():
        return math.inf
    low, high = 0.0, 1 / z.abs().mean().item()
    furthest = 1e12 * high
    while slope_and_curvature(high)[0] < 0:
        low, high = high, 2 * high
        if high > furthest:
            return math.inf
    b = high
    for _ in range(200):
        slope, curvature = slope_and_curvature(b)
        low, high = (b, high) if slope < 0 else (low, b)
        step = b - slope / curvature if curvature > 0 else math.nan
        step = step if low < step < high else (low + high) / 2
        if abs(step - b) <= 1e-14 * b:
            return step
        b = step
    return b
