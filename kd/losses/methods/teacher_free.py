"""Methods that need no larger teacher: a trained copy of the student, a virtual teacher, or a second student.

N examples, K classes; s the student's logits (N, K), y the label, p_T = softmax(s / T), and p = softmax(s). Values are
(N,), in nats, and are added to the cross entropy. Born-again networks are the preset ``kd:born_again``.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.fields import Share, Temperature
from kd.losses.methods.base import Method, Seen
from kd.losses.reference import cross_entropy, kl, log_softened
from kd.smoothing import mix_uniform, uniform_mass


class TfSelf(Method, name="tf_self"):
    """Tf-KD self-training: ``KL(p^t_T || p_T)``, the teacher a trained copy of the student's own architecture.

    p^t_T = softmax(t / T) of the teacher's logits t. There is no factor T²: the gradient is (p_T - p^t_T)/T. Zero and
    stationary where both softened distributions are equal.

    Source: Yuan et al. 2020, "Revisiting Knowledge Distillation via Label Smoothing Regularization", Eq. 7. Its plain
    KD (Re-KD, De-KD) is the same with another teacher.

    Args:
        temperature: T.
        released: compute the authors' code, which multiplies by T²/K: T² as Hinton, and 1/K from nn.KLDivLoss's mean
            over all elements; 0.36 at T = 6 and K = 100. Its multiplier of 1, 10 or 50, which the paper does not have,
            belongs in the weight, as in the preset ``cifar100_released``.

    Example:
        >>> TfSelf()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    temperature: Temperature = 6.0
    released: bool = False

    renamed = {"released_code": "released"}
    presets = {
        "cifar100": {"weight": 0.95, "ce_weight": 0.05},
        "cifar100_released": {"weight": 47.5, "ce_weight": 0.05, "released": True},
    }

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        log_s, log_t = (log_softened(logits, self.temperature) for logits in seen.logits)
        return kl(log_t, log_s) * (self.temperature**2 / log_s.shape[-1] if self.released else 1.0)


class TfReg(Method, name="tf_reg"):
    """Tf-KD regularisation: ``KL(p^d_T || p_T)``, from a virtual teacher that knows the label.

    p^d is a on y and (1-a)/(K-1) on each other class, a = ``correct_probability``; p^d_T is (p^d)^(1/T) renormalised,
    as if a temperature had divided its logits. Probability targets pass through the linear map that takes the one-hot
    label to p^d. There is no factor T²: the gradient is (p_T - p^d_T)/T. Zero and stationary where p = p^d. At T = 1 it
    is label smoothing with eps = 1-a on the others, minus the entropy of p^d.

    Source: Yuan et al. 2020, "Revisiting Knowledge Distillation via Label Smoothing Regularization", Eq. 8-9, a ≥ 0.9,
    T ≥ 20.

    Args:
        correct_probability: a.
        temperature: T.
        released: compute the authors' code, another function. It takes the softmax of p^d/T, as if probabilities were
            logits, which is nearly uniform at T = 20: the label gets e^0.05 = 1.05 times the others' share, against
            1.58 times here for K = 100. The student is at T = 1, and the value is divided by K. A multiplier of 100,
            which the paper does not have, belongs in the weight, as in the preset ``cifar100_released``.

    Example:
        >>> TfReg()(torch.randn(8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
    """

    correct_probability: Share = 0.99
    temperature: Temperature = 20.0
    released: bool = False

    needs = frozenset({"target"})
    renamed = {"released_code": "released"}
    presets = {
        "cifar100": {"weight": 0.1, "ce_weight": 0.9},
        "cifar100_released": {"weight": 10.0, "ce_weight": 0.9, "released": True},
    }

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        logits, k = seen.student.logits, seen.student.logits.shape[-1]
        mass = uniform_mass(1 - self.correct_probability, k, "others")
        virtual = mix_uniform(seen.target, k, mass, logits.dtype)
        if self.released:
            return kl(log_softened(virtual, self.temperature), F.log_softmax(logits, -1)) / k
        return kl(log_softened(virtual.log(), self.temperature), log_softened(logits, self.temperature))


class DML(Method, name="dml"):
    """Deep mutual learning: ``KL(p' || p) + CE(p', y) + KL(p || p')``. Two students learn from labels and each other.

    p' is the prediction of a peer that sees the same images, starts from other weights and is trained in the same step;
    CE(p', y) = -log p'_y. The first term trains the student (p' detached), the other two train the peer (p detached);
    the student's own CE is added outside. The student's term is zero and stationary where p = p'. The weight of this
    method scales the whole gradient of the peer too; the paper's is 1.

    The first call, or ``build``, takes the peer, a network from images to (N, K) logits; it is this method's learned
    part.

    Source: Zhang et al. 2018, "Deep Mutual Learning", at temperature 1. The paper updates the two in turn and computes
    p anew between them; here both step from the same predictions, which differ by one step's change.

    Example:
        >>> s, y, x = torch.randn(8, 10), torch.randint(10, (8,)), torch.randn(8, 3)
        >>> DML()(s, y, images=x, peer=torch.nn.Linear(3, 10)).shape
        torch.Size([])
    """

    needs = frozenset({"target", "images", "peer"})
    presets = {"cifar100": {"weight": 1.0, "ce_weight": 1.0}}

    def make(self, seen: Seen) -> None:
        """The peer."""
        self.require(seen.peer is not None, "needs a second network: pass peer=network")
        self.peer = seen.peer

    def values(self, seen: Seen) -> Tensor:
        """(N,): the student's imitation and the peer's whole loss."""
        logits = seen.student.logits
        peer = self.get_submodule("peer")(seen.images).to(logits.dtype)
        log_p, log_peer = F.log_softmax(logits, -1), F.log_softmax(peer, -1)
        hard = cross_entropy(peer, mix_uniform(seen.target, logits.shape[-1], 0.0, logits.dtype))
        return kl(log_peer.detach(), log_p) + hard + kl(log_p.detach(), log_peer)
