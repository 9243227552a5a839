"""Methods that treat the label's class apart from all others.

N examples, K classes, at least 2; s and t are the student's and the teacher's logits (N, K), y the label, and
p_T(z) = softmax(z / T). Values are (N,), in nats. The target must be class labels. A class's probability is carried as
its logit against all other classes, so that neither it nor its complement is rounded to 1.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses import reference
from kd.losses.fields import Temperature, Weight
from kd.losses.methods.base import Method, Seen
from kd.losses.methods.shared import against_others


def binary_kl(margin_t: Tensor, margin_s: Tensor) -> Tensor:
    """KL between two Bernoulli distributions whose probabilities are the sigmoids of these."""
    first = margin_t.sigmoid() * (F.logsigmoid(margin_t) - F.logsigmoid(margin_s))
    return first + (-margin_t).sigmoid() * (F.logsigmoid(-margin_t) - F.logsigmoid(-margin_s))


class DKD(Method, name="dkd"):
    """Decoupled distillation: ``T² [tckd_weight TCKD + nckd_weight NCKD]``.

    TCKD is the KL between the binary distributions (label, all others); NCKD is the KL between the softmaxes over the
    other classes alone; all at temperature T. Since KL = TCKD + (1 - p_T(t)_y) NCKD, in plain distillation a
    certain teacher suppresses NCKD. Zero and stationary where both softened distributions are equal.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", §3.3 Eq. 7. The paper chooses the NCKD weight for each
    pair of networks (1 to 8 on CIFAR-100). The presets' ``warmup_epochs`` raise the weight of the whole method linearly
    at the start. The released code gives the same values, but NaN in float32 from margins of about 110, because it
    takes logarithms of probabilities.

    Args:
        tckd_weight: weight of TCKD.
        nckd_weight: weight of NCKD.
        temperature: T.

    Example:
        >>> DKD()(torch.randn(8, 10), torch.randn(8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
    """

    tckd_weight: Weight = 1.0
    nckd_weight: Weight = 8.0
    temperature: Temperature = 4.0

    needs = frozenset({"teacher", "labels"})
    presets = {
        "cifar100": {"weight": 1.0, "ce_weight": 1.0, "warmup_epochs": 20},
        "imagenet": {"weight": 1.0, "ce_weight": 1.0, "warmup_epochs": 1, "nckd_weight": 0.5, "temperature": 1.0},
    }

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = (logits / self.temperature for logits in seen.logits)
        margin_s, others_s = against_others(student, seen.target)
        margin_t, others_t = against_others(teacher, seen.target)
        tckd, nckd = binary_kl(margin_t, margin_s), reference.kl(others_t, others_s)
        return self.temperature**2 * (self.tckd_weight * tckd + self.nckd_weight * nckd)


class NKD(Method, name="nkd"):
    """Normalised distillation: ``-softmax(t)_y log softmax(s)_y + other_weight T² H(n_T(t), n_T(s))``.

    n_T is the softmax at T over the classes other than the label, and H the cross entropy. The label's term is always
    at temperature 1. Neither zero nor stationary at s = t, because the label's term always raises softmax(s)_y.

    Source: Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels"; their γ is ``other_weight`` and their λ is T. Defaults and presets are
    those of the released configurations. Paper and code have the cross entropy in the second term; a KL would differ in
    value by the entropy of n_T(t) and not at all in gradient. The released code reduces probability targets to their
    largest class; here they are an error.

    Args:
        other_weight: weight of the second term.
        temperature: T, of the second term.

    Example:
        >>> NKD()(torch.randn(8, 10), torch.randn(8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
    """

    other_weight: Weight = 3.5
    temperature: Temperature = 3.0

    needs = frozenset({"teacher", "labels"})
    presets = {
        "cifar100": {"weight": 1.0, "ce_weight": 1.0},
        "imagenet": {"weight": 1.0, "ce_weight": 1.0, "other_weight": 1.5, "temperature": 1.0},
    }

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        nll_s, nll_t = (F.cross_entropy(logits, seen.target, reduction="none") for logits in seen.logits)
        others_s, others_t = (against_others(logits / self.temperature, seen.target)[1] for logits in seen.logits)
        of_others = reference.cross_entropy(others_s, others_t.exp())
        return (-nll_t).exp() * nll_s + self.other_weight * self.temperature**2 * of_others


class RLD(Method, name="rld"):
    """Refined logits: ``confidence_weight SC + correlation_weight MC``; both leave out the teacher's errors.

    SC, sample confidence, is ``Tc² KL`` between two binary distributions: (largest probability, rest) of the teacher
    and (label's probability, rest) of the student, at Tc = ``confidence_temperature``. The student is to be as sure of
    the label as the teacher is of its first choice. MC, masked correlation, is ``T² KL`` between the softmaxes at T
    over the classes whose teacher logit is below the label's; 0 where there is none. Zero and stationary at s = t where
    the teacher's first choice is the label; where it is another class, SC is neither.

    Source: Sun et al. 2024, "Knowledge Distillation with Refined Logits" (arXiv 2408.07703). Formula, defaults and
    presets are those of the authors' code (zju-SWJ/RLD, commit d54578f, mdistiller/distillers/RLD.py); the equations of
    the paper were not compared. The presets' ``warmup_epochs`` raise the weight of the whole method at the start.

    Args:
        confidence_weight: weight of SC.
        correlation_weight: weight of MC.
        confidence_temperature: Tc.
        temperature: T, of MC.

    Example:
        >>> RLD()(torch.randn(8, 10), torch.randn(8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
    """

    confidence_weight: Weight = 1.0
    correlation_weight: Weight = 8.0
    confidence_temperature: Temperature = 1.0
    temperature: Temperature = 4.0

    needs = frozenset({"teacher", "labels"})
    presets = {
        "cifar100": {"weight": 1.0, "ce_weight": 1.0, "warmup_epochs": 20},
        "imagenet": {"ce_weight": 1.0, "warmup_epochs": 1, "correlation_weight": 0.5, "temperature": 1.0},
    }

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.logits
        sure_s, _ = against_others(student / self.confidence_temperature, seen.target)
        sure_t, _ = against_others(teacher / self.confidence_temperature, teacher.max(-1).indices)
        confidence = self.confidence_temperature**2 * binary_kl(sure_t, sure_s)

        of_label = teacher.gather(-1, seen.target.unsqueeze(-1))
        # A softmax gives exactly 0 at -1e30; where no class is left, both become uniform and their KL is 0. A mask of
        # -inf would take several times as long on a CPU.
        penalty = (teacher >= of_label).to(teacher.dtype) * -1e30
        log_s, log_t = (((logits + penalty) / self.temperature).log_softmax(-1) for logits in (student, teacher))
        correlation = self.temperature**2 * reference.kl(log_t, log_s)
        return self.confidence_weight * confidence + self.correlation_weight * correlation
