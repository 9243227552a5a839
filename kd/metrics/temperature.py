"""Post-hoc temperature scaling: a convex search over 1/T."""

import math
from typing import cast

import torch
from scipy.optimize import brentq
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
    beats constant logits, as where a label is masked by -inf.
    """
    inverse = inverse_temperature(logits, logits.gather(1, targets[:, None]).squeeze(1))
    return torch.tensor(math.inf if inverse == 0 else 1 / inverse, dtype=torch.float64)


def inverse_temperature(logits: Tensor, expected: Tensor) -> float:
    """The b = 1/T from 0 to inf at which mean over i of log Σ_k exp(b logits[i, k]) - b expected[i] is least.

    That is the cross entropy from any distribution over the classes under which the mean of logits[i] is expected[i].
    It is convex in b, and its slope is mean over i of Σ_k softmax(b logits[i])[k] logits[i, k] - expected[i], which
    rises to the mean of max_k logits[i, k] - expected[i]. The search begins at 1 over that: a class that is masked by a
    large negative logit, or by -inf, does not move it.
    """
    top = logits.amax(dim=1, keepdim=True)
    z, expected = logits - top, expected - top.squeeze(1)
    weighed = z.where(z > -torch.inf, 0)  # by a probability of 0

    def slope(b: float) -> float:
        return ((sharpened(z, b).softmax(dim=1) * weighed).sum(dim=1) - expected).mean().item()

    if not slope(0.0) < 0:
        return 0.0
    if (expected == 0).all():
        return math.inf
    high = -1 / expected.mean().item()
    while slope(high) < 0:
        high *= 2
    return cast(float, brentq(slope, 0.0, high, xtol=1e-300, rtol=1e-15, maxiter=1000))


def sharpened(z: Tensor, b: float) -> Tensor:
    """b·z for z ≤ 0 and b from 0 to inf; 0 and -inf stay as they are, the limits at b = inf and b = 0."""
    return torch.where((z == 0) | z.isinf(), z, b * z)
