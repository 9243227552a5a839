"""Methods that look at the label's class apart from all others.

Values are per example, in nats and unweighted; the target must be class labels. N examples, K classes, at least 2; s
and t are the student's and the teacher's logits (N, K), y the label, p_T(z) = softmax(z / T). The label's probability
is carried as its logit against all other classes, so that neither it nor its complement is ever rounded to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kd.losses.methods.base import Method, Seen
from kd.losses.methods.logits import check_temperatures, check_weights, cross, kl, teacher_of


def against_others(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A class against all others: its margin (N,), the others' logits (N, K) and their log-sum-exp (N, 1).

    The class's probability is sigmoid(margin), so that log p and log(1 - p) keep their digits however near to 1 it is.
    The others' logits have -inf at the class itself.
    """
    num_classes = logits.shape[-1]
    if num_classes < 2:
        raise ValueError("one class against the others needs at least 2 classes, got 1")
    index = index.unsqueeze(-1)
    others = logits.scatter(-1, index, -math.inf)
    total = others.logsumexp(-1, keepdim=True)
    return (logits.gather(-1, index) - total).squeeze(-1), others, total


def binary_kl(margin_t: Tensor, margin_s: Tensor) -> Tensor:
    """KL between two coins whose probabilities are the sigmoids of these."""
    heads = margin_t.sigmoid() * (F.logsigmoid(margin_t) - F.logsigmoid(margin_s))
    return heads + (-margin_t).sigmoid() * (F.logsigmoid(-margin_t) - F.logsigmoid(-margin_s))


@dataclass(eq=False)
class DKD(Method, name="dkd"):
    """``T² [tckd_weight TCKD + nckd_weight NCKD]``: decoupled distillation.

    TCKD is the KL between the binary distributions (label, all others) and NCKD that between the softmaxes over the
    other classes alone, all at temperature T. KL = TCKD + (1 - p_T(t)_y) NCKD: the plain loss hides NCKD behind a
    certain teacher. Values (N,) in nats. Zero and stationary where both softened distributions are equal. Zhao et al.
    2022, "Decoupled Knowledge Distillation", §3.3 Eq. 7.

    The paper's NCKD weight depends on the pair of networks (1..8 on CIFAR-100, 8 here). The weight of the whole method
    rises linearly over the first epochs (``warmup_epochs`` of the presets), which is the caller's part. mdistiller's
    code gives the same values, but NaN in float32 from margins of about 110, since it logs probabilities.
    """

    tckd_weight: float = 1.0
    nckd_weight: float = 8.0
    temperature: float = 4.0

    soft_targets = False
    presets: ClassVar = {
        "cifar100": {"weight": 1.0, "ce_weight": 1.0, "warmup_epochs": 20},
        "imagenet": {
            "weight": 1.0,
            "ce_weight": 1.0,
            "warmup_epochs": 1,
            "nckd_weight": 0.5,
            "temperature": 1.0,
        },
    }

    def check(self) -> None:
        """The temperature and the weights are in range."""
        check_temperatures(self, "temperature")
        check_weights(self, "tckd_weight", "nckd_weight")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        margin_s, others_s, total_s = against_others(seen.student.logits / self.temperature, seen.target)
        margin_t, others_t, total_t = against_others(teacher_of(seen).logits / self.temperature, seen.target)
        label = self.tckd_weight * binary_kl(margin_t, margin_s)
        return self.temperature**2 * (label + self.nckd_weight * kl(others_t - total_t, others_s - total_s))


@dataclass(eq=False)
class NKD(Method, name="nkd"):
    """``-softmax(t)_y log softmax(s)_y + other_weight T² H(n_T(t), n_T(s))``: normalised distillation.

    n_T is the softmax at T over the classes other than the label, H the cross entropy; the label's term has temperature
    1 at any T. Values (N,) in nats. Neither zero nor stationary at s = t: the label's term always asks for more. Yang
    et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
    and Customized Soft Labels"; their γ is ``other_weight`` and their λ is T. The second term is a cross entropy in
    paper and code; a KL would differ by the entropy of n_T(t) in value and not at all in gradient. The released code
    reduces probability targets to their largest class; here they are an error. Defaults and presets are those of its
    configurations.
    """

    other_weight: float = 3.5
    temperature: float = 3.0

    soft_targets = False
    presets: ClassVar = {
        "cifar100": {"weight": 1.0, "ce_weight": 1.0},
        "imagenet": {"weight": 1.0, "ce_weight": 1.0, "other_weight": 1.5, "temperature": 1.0},
    }

    def check(self) -> None:
        """The temperature and the weight are in range."""
        check_temperatures(self, "temperature")
        check_weights(self, "other_weight")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.student.logits, teacher_of(seen).logits
        nll_s, nll_t = (F.cross_entropy(logits, seen.target, reduction="none") for logits in (student, teacher))
        _, others_s, total_s = against_others(student / self.temperature, seen.target)
        _, others_t, total_t = against_others(teacher / self.temperature, seen.target)
        of_others = cross(others_t - total_t, others_s - total_s)
        return (-nll_t).exp() * nll_s + self.other_weight * self.temperature**2 * of_others


@dataclass(eq=False)
class RLD(Method, name="rld"):
    """``confidence_weight SC + correlation_weight MC``: refined logits, which a teacher's mistakes do not enter.

    SC, sample confidence: ``Tc² KL`` between the coins (largest probability, rest) of the teacher and (label's
    probability, rest) of the student, at Tc = ``confidence_temperature``: the student is to be as sure of the label as
    the teacher is of whatever it thinks. MC, masked correlation: ``T² KL`` of the softmaxes at T over the classes whose
    teacher logit is below the label's; where none is, 0. Values (N,) in nats. Zero and stationary at s = t where the
    teacher's first choice is the label; elsewhere SC is neither.

    Sun et al. 2024, "Knowledge Distillation with Refined Logits" (arXiv 2408.07703). Formula, defaults and presets are
    those of the authors' code (zju-SWJ/RLD, commit d54578f, mdistiller/distillers/RLD.py), which this equals; the
    equations of the paper were not compared. The weight of the whole rises over ``warmup_epochs``.
    """

    confidence_weight: float = 1.0
    correlation_weight: float = 8.0
    confidence_temperature: float = 1.0
    temperature: float = 4.0

    soft_targets = False
    presets: ClassVar = {
        "cifar100": {"weight": 1.0, "ce_weight": 1.0, "warmup_epochs": 20},
        "imagenet": {
            "weight": 1.0,
            "ce_weight": 1.0,
            "warmup_epochs": 1,
            "correlation_weight": 0.5,
            "temperature": 1.0,
        },
    }

    def check(self) -> None:
        """The temperatures and the weights are in range."""
        check_temperatures(self, "confidence_temperature", "temperature")
        check_weights(self, "confidence_weight", "correlation_weight")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.student.logits, teacher_of(seen).logits
        sure_s, _, _ = against_others(student / self.confidence_temperature, seen.target)
        sure_t, _, _ = against_others(teacher / self.confidence_temperature, teacher.max(-1).indices)
        confidence = self.confidence_temperature**2 * binary_kl(sure_t, sure_s)

        of_label = teacher.gather(-1, seen.target.unsqueeze(-1))
        # A softmax gives exactly 0 at -1e30, and where nothing is left two uniform ones, whose KL is 0. A mask of -inf
        # would take several times as long on a CPU.
        penalty = (teacher >= of_label).to(teacher.dtype) * -1e30
        below_s, below_t = ((logits + penalty) / self.temperature for logits in (student, teacher))
        gap = (below_t.log_softmax(-1) - below_s.log_softmax(-1)).masked_fill(below_t == -math.inf, 0)
        correlation = self.temperature**2 * (below_t.softmax(-1) * gap).sum(-1)
        return self.confidence_weight * confidence + self.correlation_weight * correlation
