"""Methods that compare the logits of a whole batch: each example's value depends on the others.

Their value is one number for the batch. N examples, K classes; s and t are the student's and the teacher's logits
(N, K), p_T(z) = softmax(z / T).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.methods.base import Method, Seen
from kd.losses.methods.logits import check_temperatures, check_weights, kl, teacher_of
from kd.losses.ranges import TEMPERATURES, is_temperature
from kd.smoothing import check_choice, check_number

MASKS = ("examples", "share", "none")


@dataclass(eq=False)
class DIST(Method, name="dist"):
    """``T² [inter_weight (1 - mean_i ρ(row i)) + intra_weight (1 - mean_k ρ(column k))]``, ρ between p_T(s) and p_T(t).

    ρ is Pearson's correlation: over the classes of an example (inter) and over the examples for a class (intra), so
    that the student may be as sure as it likes. One value without a unit. Zero and stationary wherever every row and
    column of p_T(s) is an increasing linear function of the teacher's, in particular at s = t; but a row or column
    without variation has no correlation and counts as 0 with no gradient, as every column does in a batch of one.
    Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher"; T is 4 on CIFAR-100, 1 on ImageNet, and the
    released configurations give the whole twice the weight of the cross entropy on both.

    The released code adds 1e-8 to the product of the two norms, which ``epsilon=1e-8`` reproduces. It is not small:
    columns of tiny probabilities then count as uncorrelated (3.4 % of the value for 10 classes and teachers of
    margin 15).
    """

    inter_weight: float = 1.0
    intra_weight: float = 1.0
    temperature: float = 4.0
    epsilon: float = 0.0

    per_example = False
    presets: ClassVar = {
        "cifar100": {"weight": 2.0, "ce_weight": 1.0},
        "imagenet": {"weight": 2.0, "ce_weight": 1.0, "temperature": 1.0},
    }

    def check(self) -> None:
        """Temperature, weights and epsilon are in range."""
        check_temperatures(self, "temperature")
        check_weights(self, "inter_weight", "intra_weight", "epsilon")

    def values(self, seen: Seen) -> Tensor:
        """()."""
        log_s = F.log_softmax(seen.student.logits / self.temperature, -1)
        log_t = F.log_softmax(teacher_of(seen).logits / self.temperature, -1)
        inter = 1 - correlation(log_s, log_t, -1, self.epsilon).mean()
        intra = 1 - correlation(log_s, log_t, 0, self.epsilon).mean()
        return self.temperature**2 * (self.inter_weight * inter + self.intra_weight * intra)


def correlation(log_a: Tensor, log_b: Tensor, dim: int, epsilon: float = 0.0) -> Tensor:
    """Pearson's correlation of exp(log_a) and exp(log_b) along ``dim``; 0 where one of them does not vary.

    With ``epsilon`` the product of the norms has it added, as in DIST's released code.
    """
    # In units of each largest entry, which a correlation does not see: columns of 1e-30 underflow no more.
    peak_a, peak_b = (log_p.detach().amax(dim, keepdim=True) for log_p in (log_a, log_b))
    peak_a, peak_b = (peak.masked_fill(peak == -math.inf, 0) for peak in (peak_a, peak_b))  # a column masked everywhere
    a, norm_a, flat_a = centred((log_a - peak_a).exp(), dim, 1.0)
    b, norm_b, flat_b = centred((log_b - peak_b).exp(), dim, 1.0)
    norms = norm_a * norm_b
    if epsilon > 0:
        norms = norms + epsilon * (-peak_a - peak_b).exp()
    return (a * b).sum(dim) / norms.masked_fill(flat_a | flat_b, math.inf).squeeze(dim)


def centred(values: Tensor, dim: int, largest: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Values less their mean along ``dim``, their length, and whether that is but the rounding of ``largest``."""
    deviation = values - values.mean(dim, keepdim=True)
    length = torch.linalg.vector_norm(deviation, dim=dim, keepdim=True)
    rounding = 8 * torch.finfo(values.dtype).eps * math.sqrt(values.shape[dim]) * largest
    return deviation, length, length.detach() <= rounding


@dataclass(eq=False)
class MLKD(Method, name="mlkd"):
    """``sum_T [instance_weight I + batch_weight B + class_weight C]`` over several temperatures: multi-level alignment.

    With P = p_T(s) and Q = p_T(t), both (N, K), and masks m (N,) and c (K,) of 0 and 1:
    I = ``mean_i m_i T² KL(Q_i || P_i)``, what each example is; B = ``mean_i m_i sum_j (Q Qᵀ - P Pᵀ)_ij²``, how examples
    relate; C = ``mean_k c_k sum_l (Qᵀ Q - Pᵀ P)_kl²``, how classes relate. One value: nats for I, squared probabilities
    for B and C. Zero and stationary where student and teacher give equal distributions.

    m keeps the examples of which the teacher is no more confident than the batch's median (largest probability at
    T = 1) and c the classes of no more total probability than the median class.

    Jin et al. 2023, "Multi-Level Logit Distillation", where the temperatures are its prediction augmentation. The masks
    are in the released code (Jin-Ying/Multi-Level-Logit-Distillation, commit 5ee473f), which multiplies them into
    values already averaged: they then select nothing and act as the factors mean(m) and mean(c), about one half.
    ``confidence_mask="share"`` reproduces that, "none" leaves them out, "examples" selects as the names there say. The
    code also trains on a strong second view, without B and C, and takes that view's terms at T = 2 and 6 from the weak
    view; one view sees nothing of it. Whether the paper itself has the masks was not checked.
    """

    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0)
    instance_weight: float = 1.0
    batch_weight: float = 1.0
    class_weight: float = 1.0
    confidence_mask: str = "examples"

    per_example = False
    presets: ClassVar = {
        "cifar100": {"weight": 0.9, "ce_weight": 0.1},
        "imagenet": {"weight": 0.5, "ce_weight": 0.5, "temperatures": (1.0, 2.0, 3.0, 5.0, 6.0)},
    }

    def check(self) -> None:
        """Some temperatures and weights, all in range; a mask that exists."""
        if len(self.temperatures) == 0:
            raise ValueError(f"mlkd.temperatures={self.temperatures!r}: must be one or more, each {TEMPERATURES}")
        for temperature in self.temperatures:
            check_number("mlkd.temperatures", temperature, TEMPERATURES, is_temperature)
        check_weights(self, "instance_weight", "batch_weight", "class_weight")
        check_choice("mlkd.confidence_mask", self.confidence_mask, MASKS)

    def values(self, seen: Seen) -> Tensor:
        """()."""
        student, teacher = seen.student.logits, teacher_of(seen).logits
        rows, columns = self._masks(teacher)
        total = student.new_zeros(())
        for temperature in self.temperatures:
            log_s, log_t = (F.log_softmax(logits / temperature, -1) for logits in (student, teacher))
            p_s, p_t = log_s.exp(), log_t.exp()
            if self.instance_weight > 0:
                total = total + self.instance_weight * (rows * temperature**2 * kl(log_t, log_s)).mean()
            if self.batch_weight > 0:
                total = total + self.batch_weight * (rows * _gram_gap(p_s, p_t).square().sum(-1)).mean()
            if self.class_weight > 0:
                total = total + self.class_weight * (columns * _gram_gap(p_s.T, p_t.T).square().sum(-1)).mean()
        return total

    def _masks(self, teacher: Tensor) -> tuple[Tensor, Tensor]:
        p = teacher.softmax(-1)
        confidence, mass = p.amax(-1), p.sum(0)
        masks = [(x <= x.median()).to(p.dtype) for x in (confidence, mass)]
        if self.confidence_mask == "none":
            masks = [torch.ones_like(mask) for mask in masks]
        elif self.confidence_mask == "share":
            masks = [mask.mean().expand_as(mask) for mask in masks]
        return masks[0], masks[1]


class _GramGap(torch.autograd.Function):
    """``Q Qᵀ - P Pᵀ``, Q constant, as the symmetric part of ``(Q - P) (Q + P)ᵀ``.

    One matrix product forward and one backward instead of two each, and no digits lost where P is near Q. A product is
    N²K multiplications for the examples and NK² for the classes: nearly all of what MLKD costs.
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


def _gram_gap(p: Tensor, q: Tensor) -> Tensor:
    gap: Any = _GramGap.apply(p, q)
    return gap
