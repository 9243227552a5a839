"""Methods that compare one example's student logits with its teacher's: one class each.

Values are per example, in nats unless it says otherwise, and unweighted. N examples, K classes; s and t are the
student's and the teacher's logits (N, K), y the label, p_T(z) = softmax(z / T). T² undoes the 1/T that a softmax puts
into the gradient twice (Hinton et al. 2015 §2), so that a weight means the same at every temperature.

Everything stays in log space: no probability is formed only to be logged, so margins of 1e4 give finite numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses import reference
from kd.losses.methods.base import Method, Seen, View
from kd.losses.ranges import TEMPERATURES, WEIGHTS, is_temperature, is_weight
from kd.smoothing import check_number

# ---- what the methods share


def check_fields(method: Method, allowed: str, valid: Callable[[float], bool], *fields: str) -> None:
    """Raise unless each of these fields is a number that ``valid`` accepts."""
    for name in fields:
        check_number(f"{method.name}.{name}", getattr(method, name), allowed, valid)


def check_temperatures(method: Method, *fields: str) -> None:
    """Raise unless each of these fields is a temperature as DistillLoss allows it."""
    check_fields(method, TEMPERATURES, is_temperature, *fields)


def check_weights(method: Method, *fields: str) -> None:
    """Raise unless each of these fields is a weight as DistillLoss allows it."""
    check_fields(method, WEIGHTS, is_weight, *fields)


def teacher_of(seen: Seen) -> View:
    """The teacher's view, which the base class has made sure of."""
    assert seen.teacher is not None
    return seen.teacher


def kl(log_t: Tensor, log_s: Tensor) -> Tensor:
    """``KL(t || s)`` over the last axis; a class the teacher gives nothing, 0 in the dtype, counts 0."""
    p = log_t.exp()
    return (p * (log_t - log_s).masked_fill(p == 0, 0)).sum(-1)


def cross(log_t: Tensor, log_s: Tensor) -> Tensor:
    """``-sum t log s`` over the last axis; a class the teacher gives nothing, 0 in the dtype, counts 0."""
    p = log_t.exp()
    return -(p * log_s.masked_fill(p == 0, 0)).sum(-1)


# ---- one temperature for both


@dataclass(eq=False)
class KD(Method, name="kd"):
    """``T² KL(p_T(t) || p_T(s))``: plain distillation.

    Values (N,) in nats. Zero, and stationary, where both softened distributions are equal; the gradient is
    ``T (p_T(s) - p_T(t))``. Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", §2.

    The preset "funmatch" is function matching (Beyer et al. 2022, "Knowledge distillation: A good teacher is patient
    and consistent"): T = 1 and no labels, with mixup, the same view for both networks and a very long schedule,
    which the recipe sets. The preset "born_again" is Furlanello et al. 2018, "Born Again Neural Networks": T = 1 beside
    the labels, from a teacher of the student's own architecture, whose student teaches the next generation.
    """

    temperature: float = 4.0

    presets: ClassVar = {
        "cifar100": {"weight": 0.9, "ce_weight": 0.1},
        "imagenet": {"weight": 0.5, "ce_weight": 0.5, "temperature": 1.0},
        "funmatch": {"weight": 1.0, "ce_weight": 0.0, "temperature": 1.0},
        "born_again": {"weight": 1.0, "ce_weight": 1.0, "temperature": 1.0},
    }

    def check(self) -> None:
        """The temperature is in range."""
        check_temperatures(self, "temperature")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        return reference.distillation(seen.student.logits, teacher_of(seen).logits, self.temperature, self.temperature)


@dataclass(eq=False)
class ReverseKL(Method, name="reverse_kl"):
    """``T² KL(p_T(s) || p_T(t))``: the student avoids what the teacher finds unlikely, rather than covering it all.

    Values (N,) in nats. Zero and stationary where both softened distributions are equal. Gu et al. 2024, "MiniLLM:
    Knowledge Distillation of Large Language Models", at T = 1; the factor T² is ours, so that its weight is that of KD.
    """

    temperature: float = 1.0

    def check(self) -> None:
        """The temperature is in range."""
        check_temperatures(self, "temperature")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        return reference.distillation(teacher_of(seen).logits, seen.student.logits, self.temperature, self.temperature)


@dataclass(eq=False)
class GeneralisedJSD(Method, name="gjsd"):
    """``T² [a KL(p_T(t) || m) + (1-a) KL(p_T(s) || m)]``, ``m = a p_T(t) + (1-a) p_T(s)``, a = ``teacher_share``.

    Values (N,) in nats, at most ``T² log 2``. Zero and stationary where both distributions are equal. Divided by a it
    tends to KL(t || s) as a -> 0, and divided by 1-a to KL(s || t) as a -> 1. Agarwal et al. 2024, "On-Policy
    Distillation of Language Models" (GKD), at T = 1. The factor T² is ours; TRL's GKDTrainer has none, so that its
    number is 1/T² of this, and gives the two limits, not 0, for a = 0 and 1.
    """

    teacher_share: float = 0.5
    temperature: float = 1.0

    def check(self) -> None:
        """The share is inside (0, 1): at its ends the value is 0 for all students."""
        check_temperatures(self, "temperature")
        check_fields(self, "a number > 0 and < 1", lambda value: 0 < value < 1, "teacher_share")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        log_s = F.log_softmax(seen.student.logits / self.temperature, -1)
        log_t = F.log_softmax(teacher_of(seen).logits / self.temperature, -1)
        mixture = self.teacher_share * log_t.exp() + (1 - self.teacher_share) * log_s.exp()
        # Where both probabilities are too small for the precision, so is what the class counts.
        mixture = mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()
        both = self.teacher_share * kl(log_t, mixture) + (1 - self.teacher_share) * kl(log_s, mixture)
        return self.temperature**2 * both


@dataclass(eq=False)
class LogitMSE(Method, name="logit_mse"):
    """``sum_k (s_k - t_k)²``: regression on the logits.

    Values (N,) in squared logits. Zero and stationary where the logits, not only the distributions, are equal: adding
    a constant to a row changes it. Kim et al. 2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss
    in Knowledge Distillation". Ba & Caruana 2014 have half of it; F.mse_loss's mean over classes is 1/K of it.
    """

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        return (seen.student.logits - teacher_of(seen).logits).square().sum(-1)


@dataclass(eq=False)
class HardDistillation(Method, name="hard"):
    """``-log softmax(s)_c`` with c the teacher's most likely class (the first of equal ones).

    Values (N,) in nats. Never zero, and not stationary where student and teacher agree: it asks for certainty. Touvron
    et al. 2021, "Training data-efficient image transformers" (DeiT), §4 Eq. 3, where it and the labels' cross entropy
    have one half each.
    """

    presets: ClassVar = {"imagenet": {"weight": 0.5, "ce_weight": 0.5}}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        surest, first = teacher_of(seen).logits.max(-1)
        return F.cross_entropy(seen.student.logits, first, reduction="none").masked_fill(surest.isnan(), math.nan)


# ---- another temperature, or weight, for the teacher


@dataclass(eq=False)
class TTM(Method, name="ttm"):
    """``KL(p_T(t) || softmax(s))``: transformed teacher matching, only the teacher softened.

    Values (N,) in nats; no T², since the student's temperature is 1. Zero and stationary where the student's
    distribution is the teacher's softened one, so not at s = t unless T = 1, where it is KD at T = 1. Zheng & Yang
    2024, "Knowledge Distillation Based on Transformed Teacher Matching"; their exponent γ is 1/T. The paper tunes
    T and the weight for each pair of networks; the preset is the example of the released code (vgg13 -> vgg8).
    """

    temperature: float = 10.0

    presets: ClassVar = {"cifar100": {"weight": 45.0, "ce_weight": 1.0}}

    def check(self) -> None:
        """The temperature is in range."""
        check_temperatures(self, "temperature")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        return reference.distillation(seen.student.logits, teacher_of(seen).logits, self.temperature, 1.0)


@dataclass(eq=False)
class WTTM(Method, name="wttm"):
    """``U KL(p_T(t) || softmax(s))``, ``U = sum_k softmax(t)_k^(1/T)``: TTM, smooth teachers weighing more.

    Values (N,) in nats. U lies between 1 (a certain teacher) and K^(1 - 1/T) (a uniform one) and is not normalised over
    the batch. Zero and stationary where TTM is; at T = 1 it is KD at T = 1. Zheng & Yang 2024, as TTM; the preset is
    the released code's example (combined with CRD there).
    """

    temperature: float = 5.0

    presets: ClassVar = {"cifar100": {"weight": 4.0, "ce_weight": 1.0}}

    def check(self) -> None:
        """The temperature is in range."""
        check_temperatures(self, "temperature")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        teacher = teacher_of(seen).logits
        power_sum = (F.log_softmax(teacher, -1) / self.temperature).logsumexp(-1).exp()
        return power_sum * reference.distillation(seen.student.logits, teacher, self.temperature, 1.0)


@dataclass(eq=False)
class WSL(Method, name="wsl"):
    """``w T² H(p_T(t), p_T(s))``, ``w = 1 - exp(-CE(s, y) / (CE(t, y) + epsilon))``: weighted soft labels.

    H is the cross entropy and w carries no gradient: near 0 where the student already does better than its teacher,
    near 1 where the teacher is far better. Values (N,) in nats. Stationary, not zero, at s = t: w T² times the entropy
    of p_T(t) is left, 1 - 1/e of it. Zhou et al. 2021, "Rethinking Soft Labels for Knowledge Distillation: A
    Bias-Variance Tradeoff Perspective".

    The released code has epsilon = 1e-7 against the division by zero of a certain teacher, which halves the ratio of a
    teacher with CE = 1e-7 and is nothing at CE = 0.1. Here epsilon is 0, w is 1 in that case, and where both are
    certain, 1 - 1/e.
    """

    temperature: float = 4.0
    epsilon: float = 0.0

    presets: ClassVar = {
        "cifar100": {"weight": 2.25, "ce_weight": 1.0},
        "imagenet": {"weight": 2.5, "ce_weight": 1.0, "temperature": 2.0},
    }

    def check(self) -> None:
        """The temperature is in range."""
        check_temperatures(self, "temperature")
        check_weights(self, "epsilon")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.student.logits, teacher_of(seen).logits
        hard_s, hard_t = (self._nll(logits.detach(), seen.target) for logits in (student, teacher))
        ratio = (hard_s / (hard_t + self.epsilon)).abs().nan_to_num(nan=1.0)
        log_s, log_t = (F.log_softmax(logits / self.temperature, -1) for logits in (student, teacher))
        return -torch.expm1(-ratio) * self.temperature**2 * cross(log_t, log_s)

    def _nll(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return reference.cross_entropy(logits, target.to(logits.dtype))
        return F.cross_entropy(logits, target, reduction="none")


@dataclass(eq=False)
class ATS(Method, name="ats"):
    """``Ts² H(q, softmax(s / Ts))``, ``q = softmax(t_k / τ_k)``: asymmetric temperature scaling of the teacher.

    τ is ``target_temperature`` at the label and ``other_temperature`` at all other classes, H the cross entropy, Ts =
    ``student_temperature``. With the label the hotter (τ1 > τ2), a large teacher's other classes keep their
    differences. Values (N,) in nats. Stationary where softmax(s / Ts) = q, which is not s = t. Li et al. 2022,
    "Asymmetric Temperature Scaling Makes Larger Networks Teach Well Again". They search τ1 in 1..6 and τ2 in 1..5
    with Ts = 1 and one half of each loss; 4 and 2 are ours from inside that grid. Both temperatures divide the raw
    logits, so a constant c added to a row of t moves the label's odds by the factor exp(c/τ1 - c/τ2).
    """

    target_temperature: float = 4.0
    other_temperature: float = 2.0
    student_temperature: float = 1.0

    soft_targets = False
    presets: ClassVar = {"cifar100": {"weight": 0.5, "ce_weight": 0.5}}

    def check(self) -> None:
        """All temperatures are in range."""
        check_temperatures(self, "target_temperature", "other_temperature", "student_temperature")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        teacher = teacher_of(seen).logits
        label = seen.target.unsqueeze(-1)
        of_label = teacher.gather(-1, label) / self.target_temperature
        softened = (teacher / self.other_temperature).scatter(-1, label, of_label)
        log_s = F.log_softmax(seen.student.logits / self.student_temperature, -1)
        return self.student_temperature**2 * cross(F.log_softmax(softened, -1), log_s)
