"""Methods that compare one example's student logits with its teacher's.

N examples, K classes; s and t are the student's and the teacher's logits (N, K), y the label, and
p_T(z) = softmax(z / T). Values are (N,), in nats unless the docstring says otherwise. The factor T² undoes the 1/T that
a softmax puts into the gradient twice (Hinton et al. 2015 §2), so that a weight means the same at every temperature.

Everything stays in log space: no probability is formed only to take its logarithm, so margins of 1e4 stay finite.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses import reference
from kd.losses.fields import Mass, Share, Temperature
from kd.losses.methods.base import Method, Seen
from kd.losses.reference import kl, log_softened
from kd.smoothing import mix_uniform, unsmooth

# ---- one temperature for both networks


class KD(Method, name="kd"):
    """Knowledge distillation: ``T² KL(p_T(t) || p_T(s))``, p_T(z) = softmax(z / T), s student and t teacher logits.

    Zero and stationary where both softened distributions are equal. The gradient is ``T (p_T(s) - p_T(t))``.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", §2.

    Presets:
        funmatch: function matching, T = 1 without labels; the recipe adds mixup, the same view for both networks and a
            very long schedule. Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent".
        born_again: T = 1 beside the labels, from a teacher of the student's own architecture, whose student teaches the
            next generation. Furlanello et al. 2018, "Born Again Neural Networks".

    Args:
        temperature: T.

    Example:
        >>> KD()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    temperature: Temperature = 4.0

    presets = {
        "cifar100": {"weight": 0.9, "ce_weight": 0.1},
        "imagenet": {"weight": 0.5, "ce_weight": 0.5, "temperature": 1.0},
        "funmatch": {"weight": 1.0, "ce_weight": 0.0, "temperature": 1.0},
        "born_again": {"weight": 1.0, "ce_weight": 1.0, "temperature": 1.0},
    }

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        return reference.distillation(*seen.logits, self.temperature, self.temperature)


class ReverseKL(Method, name="reverse_kl"):
    """Reverse KL: ``T² KL(p_T(s) || p_T(t))``. The student avoids classes that the teacher finds unlikely.

    Zero and stationary where both softened distributions are equal.

    Source: Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models", at T = 1. The factor T² is ours,
    so that the weight means what it means for `KD`.

    Args:
        temperature: T.

    Example:
        >>> ReverseKL()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    temperature: Temperature = 1.0

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.logits
        return reference.distillation(teacher, student, self.temperature, self.temperature)


class GeneralizedJSD(Method, name="gjsd"):
    """Generalised Jensen-Shannon divergence: ``T² [a KL(p_T(t) || m) + (1-a) KL(p_T(s) || m)]``.

    ``m = a p_T(t) + (1-a) p_T(s)``, a = ``teacher_share``. At most ``T² log 2``. Zero and stationary where both
    softened distributions are equal. Divided by a it tends to ``T² KL(p_T(t) || p_T(s))`` as a -> 0; divided by 1-a it
    tends to ``T² KL(p_T(s) || p_T(t))`` as a -> 1.

    Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), at T = 1. The factor T² is ours.
    TRL's GKDTrainer has none, so its value is 1/T² of this one; at a = 0 and 1 it returns the two limits.

    Args:
        teacher_share: a, above 0 and below 1: at both ends the value is 0 for every student.
        temperature: T.

    Example:
        >>> GeneralizedJSD()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    teacher_share: Share = 0.5
    temperature: Temperature = 1.0

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        log_s, log_t = (log_softened(logits, self.temperature) for logits in seen.logits)
        mixture = self.teacher_share * log_t.exp() + (1 - self.teacher_share) * log_s.exp()
        # Where both probabilities are too small for the dtype, the class adds nothing.
        log_m = mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()
        divergence = self.teacher_share * kl(log_t, log_m) + (1 - self.teacher_share) * kl(log_s, log_m)
        return self.temperature**2 * divergence


class LogitMSE(Method, name="logit_mse"):
    """Logit regression: ``sum_k (s_k - t_k)²``, in squared logits.

    Zero and stationary where the logits are equal; equal distributions are not enough, because a constant added to a
    row changes the value.

    Source: Kim et al. 2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge
    Distillation". Ba & Caruana 2014 have half of it. F.mse_loss takes the mean over classes, 1/K of it.

    Example:
        >>> LogitMSE()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.logits
        return (student - teacher).square().sum(-1)


class HardDistillation(Method, name="hard"):
    """Hard-label distillation: ``-log softmax(s)_c``, c the teacher's most likely class (the first of equal ones).

    Values (N,) in nats. Never zero, and not stationary at s = t: the student is pushed towards certainty.

    Source: Touvron et al. 2021, "Training data-efficient image transformers" (DeiT), §4 Eq. 3, where this term and the
    labels' cross entropy weigh one half each.

    Example:
        >>> HardDistillation()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    presets = {"imagenet": {"weight": 0.5, "ce_weight": 0.5}}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.logits
        largest, first = teacher.max(-1)
        # max() finds an index in a row with NaN too; the value must not hide it.
        return F.cross_entropy(student, first, reduction="none").masked_fill(largest.isnan(), math.nan)


# ---- a teacher that is smoothed, or has another temperature or weight


class SmoothedTeacher(Method, name="smoothed_teacher"):
    """Plain KD from a smoothed teacher: ``T² KL(p_T(t') || p_T(s))``, ``t' = log[(1 - mass) softmax(t) + mass / K]``.

    Values (N,) in nats. Zero and stationary where p_T(s) = p_T(t'), so at s = t only if ``taken_out`` equals ``mass``.
    Training a teacher with label smoothing changes more than its confidence; t' is the same teacher with only the
    uniform mass mixed in. At T = 1 the gradient is 1 - mass times that of KD from t, plus mass times that of the
    student's cross entropy with the uniform distribution: nothing about t is lost. At T > 1 the small probabilities
    count more, and those well below mass / K have become nearly equal.

    Source: ours, to separate smoothing from what comes with it (after Müller et al. 2019, §4).

    Args:
        mass: uniform smoothing mass to mix in.
        taken_out: mass that `kd.smoothing.unsmooth` removes from t' afterwards; with ``taken_out == mass`` the value is
            that of KD, up to rounding.
        temperature: T.

    Example:
        >>> SmoothedTeacher()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    mass: Mass = 0.1
    taken_out: Mass = 0.0
    temperature: Temperature = 4.0

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.logits
        log_p = F.log_softmax(teacher.double(), -1)  # in float32 a p below 1e-8 would be lost beside mass / K
        if self.mass > 0:
            uniform = torch.full_like(log_p, math.log(self.mass / log_p.shape[-1]))
            log_p = torch.logaddexp(log_p + math.log1p(-self.mass), uniform)
        smoothed = unsmooth(log_p, self.taken_out).to(teacher.dtype)
        return reference.distillation(student, smoothed, self.temperature, self.temperature)


class TTM(Method, name="ttm"):
    """Transformed teacher matching: ``KL(p_T(t) || softmax(s))``. Only the teacher is softened.

    There is no factor T², because the student's temperature is 1. Zero and stationary where the student's distribution
    is the teacher's softened one, so not at s = t unless T = 1, where it equals `KD` at T = 1.

    Source: Zheng & Yang 2024, "Knowledge Distillation Based on Transformed Teacher Matching"; their exponent γ is 1/T.
    They tune T and the weight for each pair of networks; the preset is the released code's example (vgg13 -> vgg8).

    Args:
        temperature: T, of the teacher.

    Example:
        >>> TTM()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    temperature: Temperature = 10.0

    presets = {"cifar100": {"weight": 45.0, "ce_weight": 1.0}}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        return reference.distillation(*seen.logits, self.temperature, 1.0)


class WTTM(Method, name="wttm"):
    """Weighted transformed teacher matching: ``U KL(p_T(t) || softmax(s))``, ``U = sum_k softmax(t)_k^(1/T)``.

    It is `TTM` with more weight where the teacher is uncertain: U is between 1 (teacher one-hot) and K^(1 - 1/T)
    (teacher uniform) and is not normalised over the batch. Zero and stationary where TTM is. At T = 1 it equals `KD` at
    T = 1.

    Source: Zheng & Yang 2024, as TTM. The preset is the released code's example, which combines it with CRD.

    Args:
        temperature: T, of the teacher.

    Example:
        >>> WTTM()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    temperature: Temperature = 5.0

    presets = {"cifar100": {"weight": 4.0, "ce_weight": 1.0}}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.logits
        power_sum = (F.log_softmax(teacher, -1) / self.temperature).logsumexp(-1).exp()
        return power_sum * reference.distillation(student, teacher, self.temperature, 1.0)


class WSL(Method, name="wsl"):
    """Weighted soft labels: ``w T² H(p_T(t), p_T(s))``, ``w = 1 - exp(-CE(s, y) / CE(t, y))``.

    H is the cross entropy. w carries no gradient; it is near 0 where the student already beats its teacher and near 1
    where the teacher is far better. Stationary, but not zero, at s = t: the value there is (1 - 1/e) T² times the
    entropy of p_T(t).

    Source: Zhou et al. 2021, "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective".

    Args:
        temperature: T.
        released: compute the authors' code, which divides by CE(t, y) + 1e-7: that halves the ratio where CE(t, y) is
            1e-7 and hardly changes it at 0.1. By default w is 1 where CE(t, y) is 0, and 1 - 1/e where both are 0.

    Example:
        >>> WSL()(torch.randn(8, 10), torch.randn(8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
    """

    temperature: Temperature = 4.0
    released: bool = False

    needs = frozenset({"teacher", "target"})
    renamed = {"epsilon": "released=true for the authors' 1e-7"}
    presets = {
        "cifar100": {"weight": 2.25, "ce_weight": 1.0},
        "imagenet": {"weight": 2.5, "ce_weight": 1.0, "temperature": 2.0},
    }

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.logits
        hard = mix_uniform(seen.target, student.shape[-1], 0.0, student.dtype)
        ce_s, ce_t = (reference.cross_entropy(logits.detach(), hard) for logits in seen.logits)
        ratio = (ce_s / (ce_t + 1e-7 * self.released)).abs().nan_to_num(nan=1.0)
        soft = reference.cross_entropy(student / self.temperature, (teacher / self.temperature).softmax(-1))
        return -torch.expm1(-ratio) * self.temperature**2 * soft


class ATS(Method, name="ats"):
    """Asymmetric temperature scaling: ``Ts² H(q, softmax(s / Ts))``, ``q = softmax(t_k / τ_k)``.

    τ is ``target_temperature`` at the label and ``other_temperature`` at all other classes; H is the cross entropy.
    With τ larger at the label, the other classes of a large teacher keep their differences. Stationary where
    softmax(s / Ts) = q, which is not s = t. Both temperatures divide the raw logits, so a constant c added to a row of
    t multiplies the label's odds by exp(c/τ_label - c/τ_other). The target must be class labels.

    Source: Li et al. 2022, "Asymmetric Temperature Scaling Makes Larger Networks Teach Well Again". They search τ in
    1..6 at the label and 1..5 elsewhere, with Ts = 1 and one half of each loss; 4 and 2 are our choice from that grid.

    Args:
        target_temperature: τ at the label.
        other_temperature: τ at the other classes.
        student_temperature: Ts.

    Example:
        >>> ATS()(torch.randn(8, 10), torch.randn(8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
    """

    target_temperature: Temperature = 4.0
    other_temperature: Temperature = 2.0
    student_temperature: Temperature = 1.0

    needs = frozenset({"teacher", "labels"})
    presets = {"cifar100": {"weight": 0.5, "ce_weight": 0.5}}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.logits
        label = seen.target.unsqueeze(-1)
        of_label = teacher.gather(-1, label) / self.target_temperature
        softened = (teacher / self.other_temperature).scatter(-1, label, of_label)
        soft = reference.cross_entropy(student / self.student_temperature, softened.softmax(-1))
        return self.student_temperature**2 * soft
