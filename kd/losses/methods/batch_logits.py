"""Methods that compare the logits of a whole batch, so that an example's value depends on the others.

N examples, K classes; s and t are the student's and the teacher's logits (N, K), and p_T(z) = softmax(z / T). Values
are one number for the batch, ().
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from kd.losses.fields import TEMPERATURES, Allowed, Temperature, Weight, is_temperature
from kd.losses.methods.base import Method, Seen
from kd.losses.methods.shared import centred
from kd.losses.reference import kl, log_softened

RELEASED_EPSILON = 1e-8  # of dist


class DIST(Method, name="dist"):
    """Distillation by correlation: ``T² [inter_weight (1 - mean_i ρ(row i)) + intra_weight (1 - mean_k ρ(column k))]``.

    ρ is Pearson's correlation between p_T(s) and p_T(t): over the classes of an example (inter), and over the examples
    for a class (intra), so the student's confidence is free. No unit. Zero and stationary where every row and
    column of p_T(s) is an increasing linear function of the teacher's, in particular at s = t. A row or column that
    does not vary has no correlation and counts as 0 without a gradient.

    Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher". T is 4 on CIFAR-100 and 1 on ImageNet;
    the released configurations give the whole twice the weight of the cross entropy on both.

    Args:
        inter_weight: weight of the rows' term.
        intra_weight: weight of the columns' term.
        temperature: T.
        released: compute the authors' code, which adds 1e-8 to the product of the two norms. Columns of tiny
            probabilities then count as uncorrelated: 3.4 % of the value for 10 classes and teachers whose largest
            logit is 15 above the others.

    Example:
        >>> DIST()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    inter_weight: Weight = 1.0
    intra_weight: Weight = 1.0
    temperature: Temperature = 4.0
    released: bool = False

    needs = frozenset({"teacher", "batch"})
    renamed = {"epsilon": "released=true for the authors' 1e-8"}
    presets = {
        "cifar100": {"weight": 2.0, "ce_weight": 1.0},
        "imagenet": {"weight": 2.0, "ce_weight": 1.0, "temperature": 1.0},
    }

    def values(self, seen: Seen) -> Tensor:
        """()."""
        log_s, log_t = (log_softened(logits, self.temperature) for logits in seen.logits)
        inter, intra = (1 - correlation(log_s, log_t, dim, RELEASED_EPSILON * self.released).mean() for dim in (-1, 0))
        return self.temperature**2 * (self.inter_weight * inter + self.intra_weight * intra)


def correlation(log_a: Tensor, log_b: Tensor, dim: int, epsilon: float = 0.0) -> Tensor:
    """Pearson's correlation of exp(log_a) and exp(log_b) along `dim`; 0 where one of them does not vary.

    `epsilon` is added to the product of the norms, as in DIST's released code.
    """
    # Divided by each largest entry, which a correlation does not see: columns of 1e-30 no longer underflow.
    peak_a, peak_b = (log_p.detach().amax(dim, keepdim=True) for log_p in (log_a, log_b))
    peak_a, peak_b = (peak.masked_fill(peak == -math.inf, 0) for peak in (peak_a, peak_b))  # a class masked everywhere
    a, norm_a, flat_a = centred((log_a - peak_a).exp(), dim, 1.0)
    b, norm_b, flat_b = centred((log_b - peak_b).exp(), dim, 1.0)
    norms = norm_a * norm_b
    if epsilon > 0:
        norms = norms + epsilon * (-peak_a - peak_b).exp()
    return (a * b).sum(dim) / norms.masked_fill(flat_a | flat_b, math.inf).squeeze(dim)


def _are_temperatures(values: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) > 0 and all(is_temperature(v) for v in values)


class MLKD(Method, name="mlkd"):
    """Multi-level distillation: ``sum_T [instance_weight I + batch_weight B + class_weight C]`` over temperatures.

    With P = p_T(s) and Q = p_T(t), both (N, K), and masks m (N,) and c (K,) of 0 and 1:

    - I = ``mean_i m_i T² KL(Q_i || P_i)``, of single examples, in nats;
    - B = ``mean_i m_i sum_j (Q Qᵀ - P Pᵀ)_ij²``, of pairs of examples, without unit;
    - C = ``mean_k c_k sum_l (Qᵀ Q - Pᵀ P)_kl²``, of pairs of classes, without unit.

    m is 1 for examples whose teacher's largest probability, at T = 1, is at most the batch's median; c is 1 for classes
    whose teacher probability, summed over the batch, is at most the median of the classes. Zero and stationary where
    student and teacher give equal distributions.

    Source: Jin et al. 2023, "Multi-Level Logit Distillation", whose prediction augmentation is the temperatures. The
    masks are in the released code (Jin-Ying/Multi-Level-Logit-Distillation, commit 5ee473f); whether the paper has them
    was not checked. That code has a second, strongly augmented view too, without B and C, whose terms at T = 2 and 6
    are computed from the weak view; here there is one view.

    Args:
        temperatures: one or more T.
        instance_weight: weight of I.
        batch_weight: weight of B.
        class_weight: weight of C.
        masks: false sets m and c to 1.
        released: compute the authors' code, which multiplies the masks into values already averaged, so that they act
            as the factors mean(m) and mean(c), about one half.

    Example:
        >>> MLKD()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    temperatures: Annotated[
        Sequence[float], Allowed(f"a list of one or more temperatures, each {TEMPERATURES}", _are_temperatures)
    ] = (2.0, 3.0, 4.0, 5.0, 6.0)
    instance_weight: Weight = 1.0
    batch_weight: Weight = 1.0
    class_weight: Weight = 1.0
    masks: bool = True
    released: bool = False

    needs = frozenset({"teacher", "batch"})
    renamed = {"confidence_mask": "released=true for share, masks=false for none"}
    presets = {
        "cifar100": {"weight": 0.9, "ce_weight": 0.1},
        "imagenet": {"weight": 0.5, "ce_weight": 0.5, "temperatures": (1.0, 2.0, 3.0, 5.0, 6.0)},
    }

    def values(self, seen: Seen) -> Tensor:
        """()."""
        student, teacher = seen.logits
        rows, columns = self._masks(teacher)
        total = student.new_zeros(())
        for temperature in self.temperatures:
            log_s, log_t = (log_softened(logits, temperature) for logits in (student, teacher))
            p_s, p_t = log_s.exp(), log_t.exp()
            # A term of weight 0 is left out, because the Gram matrices are nearly all of the cost.
            if self.instance_weight > 0:
                total = total + self.instance_weight * (rows * temperature**2 * kl(log_t, log_s)).mean()
            if self.batch_weight > 0:
                total = total + self.batch_weight * (rows * _GramGap.apply(p_s, p_t).square().sum(-1)).mean()
            if self.class_weight > 0:
                total = total + self.class_weight * (columns * _GramGap.apply(p_s.T, p_t.T).square().sum(-1)).mean()
        return total

    def _masks(self, teacher: Tensor) -> tuple[Tensor, Tensor]:
        p = teacher.softmax(-1)
        confidence, mass = p.amax(-1), p.sum(0)
        masks = [(x <= x.median()).to(p.dtype) for x in (confidence, mass)]
        if not self.masks:
            masks = [torch.ones_like(mask) for mask in masks]
        elif self.released:
            masks = [mask.mean().expand_as(mask) for mask in masks]
        return masks[0], masks[1]


class _GramGap(torch.autograd.Function):
    """``Q Qᵀ - P Pᵀ``, Q constant, as the symmetric part of ``(Q - P) (Q + P)ᵀ``.

    One matrix product forward and one backward instead of two each, and no digits are lost where P is near Q. A product
    is N²K multiplications for the examples and NK² for the classes: nearly all of what MLKD costs.
    """

    generate_vmap_rule = True  # studies train many students at once

    @staticmethod
    def forward(p: Tensor, q: Tensor) -> Tensor:
        product = (q - p) @ (q + p).T
        return (product + product.T) / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        return -(gradients[0] + gradients[0].T) @ p, None
