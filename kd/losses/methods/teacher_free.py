"""Methods for which no larger teacher is needed: a trained copy of the student, a virtual teacher, a second student.

Values are per example, in nats, and stand beside the cross entropy. N examples, K classes; s the student's logits
(N, K), y the label, p_T = softmax(s / T), p = p_1. Born-again networks are the preset ``kd:born_again``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kd.losses.methods.base import Method, Seen, probabilities
from kd.losses.methods.logits import check_temperatures, kl, teacher_of
from kd.losses.reference import cross_entropy
from kd.smoothing import check_number, mix_uniform, to_uniform


@dataclass(eq=False)
class TfSelf(Method, name="tf_self"):
    """``KL(p^t_T || p_T)``, p_T = softmax(s/T), the teacher a trained copy of the student's own architecture.

    (N,) in nats, beside the cross entropy. 0, and stationary, where the softened distributions are equal. No T²: the
    gradient is (p_T - p^t_T)/T.

    Yuan et al. 2020, "Revisiting Knowledge Distillation via Label Smoothing Regularization", Eq. 7. The released code
    has the factor T²/K instead of 1 (T² as Hinton, and 1/K from nn.KLDivLoss's mean over all elements; 0.36 at T = 6,
    K = 100) and a multiplier of 1, 10 or 50 that the paper has not: ``released_code=True``, and the multiplier in the
    weight. Its plain KD (Re-KD, De-KD) is the same with another teacher.
    """

    temperature: float = 6.0
    released_code: bool = False

    presets: ClassVar = {
        "cifar100": {"weight": 0.95, "ce_weight": 0.05, "kd_weight": 0.0},
        "cifar100_released": {"weight": 47.5, "ce_weight": 0.05, "kd_weight": 0.0, "released_code": True},
    }

    def check(self) -> None:
        """The temperature is in range."""
        check_temperatures(self, "temperature")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.student.logits, teacher_of(seen).logits
        value = kl(F.log_softmax(teacher / self.temperature, -1), F.log_softmax(student / self.temperature, -1))
        return value * (self.temperature**2 / student.shape[-1] if self.released_code else 1.0)


@dataclass(eq=False)
class TfReg(Method, name="tf_reg"):
    """``KL(p^d_T || p_T)``: distillation from a virtual teacher that knows the label, p^d = a on y, (1-a)/(K-1) else.

    p^d_T is p^d softened as if by a temperature in its logits, (p^d)^(1/T) renormalised; p_T = softmax(s/T). (N,) in
    nats, beside the cross entropy. 0, and stationary, where p = p^d. No T²: the gradient is (p_T - p^d_T)/T. At T = 1
    it is label smoothing with eps = 1-a over the others, less the entropy of p^d. Probability targets pass through
    the linear map that takes the one-hot label to p^d.

    Yuan et al. 2020, "Revisiting Knowledge Distillation via Label Smoothing Regularization", Eq. 8-9, a ≥ 0.9, T ≥ 20.
    The released code (``released_code=True``) is another function: it takes the softmax of p^d/T, probabilities as if
    they were logits, which at T = 20 is nearly uniform (the label gets e^0.05 = 1.05 times the others' share, against
    1.58 times here for K = 100); the student is at T = 1; it divides by K; and a multiplier of 100, which the paper
    has not, belongs into the weight.
    """

    correct_probability: float = 0.99
    temperature: float = 20.0
    released_code: bool = False

    needs = frozenset()
    presets: ClassVar = {
        "cifar100": {"weight": 0.1, "ce_weight": 0.9, "kd_weight": 0.0},
        "cifar100_released": {"weight": 10.0, "ce_weight": 0.9, "kd_weight": 0.0, "released_code": True},
    }

    def check(self) -> None:
        """The virtual teacher's probability is in (0, 1), its temperature in range."""
        check_number(
            "tf_reg.correct_probability", self.correct_probability, "a number > 0 and < 1", lambda v: 0 < v < 1
        )
        check_temperatures(self, "temperature")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        logits, k = seen.student.logits, seen.student.logits.shape[-1]
        mass = to_uniform(1 - self.correct_probability, k, "others")
        virtual = mix_uniform(seen.target, k, mass, logits.dtype)
        if self.released_code:
            return kl(F.log_softmax(virtual / self.temperature, -1), F.log_softmax(logits, -1)) / k
        soft = F.log_softmax(virtual.log() / self.temperature, -1)
        return kl(soft, F.log_softmax(logits / self.temperature, -1))


@dataclass(eq=False)
class DeepMutualLearning(Method, name="dml"):
    """``KL(p² || p) + CE(p², y) + KL(p || p²)``: two students that learn from the label and from each other.

    p is the student's, p² that of a peer which sees the same images, starts from other weights and is trained in the
    same step. The first term is the student's (p² detached), the other two are the peer's (p detached); the student's
    own CE stands beside them. (N,) in nats. The student's term is 0, and stationary, where p = p². A weight of this
    method scales the peer's whole gradient as well as the student's mimicry; the paper's is 1.

    Set ``peer``, a network from images to (N, K) logits, before ``build``. It is the method's learned part.

    Zhang et al. 2018, "Deep Mutual Learning", at temperature 1. The paper updates the two in turn and
    computes p anew between them; here both step from the same predictions, a difference of one step's change.
    """

    needs = frozenset({"images", "peer"})
    presets: ClassVar = {"cifar100": {"weight": 1.0, "ce_weight": 1.0, "kd_weight": 0.0}}

    def build(self, seen: Seen, num_samples: int) -> None:
        """The peer is there already: nothing is made, but a missing one is an error."""
        if "peer" not in dict(self.named_children()):
            raise ValueError(f"{self.name}: needs a second network, set as .peer before the first batch")

    def values(self, seen: Seen) -> Tensor:
        """(N,) the student's mimicry, and the peer's whole loss."""
        logits = seen.student.logits
        peer = self.get_submodule("peer")(seen.images).to(logits.dtype)
        if peer.shape != logits.shape:
            raise ValueError(f"{self.name}: peer gives {tuple(peer.shape)} logits, the student {tuple(logits.shape)}")
        mine, its = F.log_softmax(logits, -1), F.log_softmax(peer, -1)
        label = cross_entropy(peer, probabilities(seen.target, logits.shape[-1], logits.dtype))
        return kl(its.detach(), mine) + label + kl(mine.detach(), its)
