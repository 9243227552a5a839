"""Label smoothing and its alternatives: losses on the labels, without a teacher.

N examples, K classes; p = softmax(s) of the student's logits s (N, K), y the label, CE = -log p_y, u = 1/K the uniform
distribution, H the entropy. Values are (N,), in nats unless the docstring says otherwise, at temperature 1. A method
either replaces the cross entropy (its presets have ``ce_weight`` 0) or is added to it.
"""

import math
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kd.losses.fields import Allowed, Convention, Mass, NonNegative, Weight
from kd.losses.methods.base import Method, Seen
from kd.losses.methods.shared import against_others
from kd.losses.reference import cross_entropy
from kd.smoothing import mix_uniform, uniform_mass

ALONE = {"weight": 1.0, "ce_weight": 0.0}  # in place of the cross entropy


class LabelSmoothing(Method, name="label_smoothing"):
    """Label smoothing: ``-sum_k q_k log p_k``, q the smoothed label, in place of the cross entropy.

    ``uniform``: q = (1-eps) onehot + eps/K. ``others``: q = 1-eps on y and eps/(K-1) on each other class. Probability
    targets are smoothed by the same linear map. With the uniform eps it equals ``(1-eps) CE + eps (KL(u || p) + log
    K)`` and ``CE + eps (s_y - mean_k s_k)``. Never 0 for eps > 0: the minimum is the entropy of q, at p = q, where s_y
    is log(1 + (1-eps) K/eps) above the other logits. ``DistillLoss(kd_weight=0, ce_weight=1, label_smoothing=eps)``
    gives the same numbers, and its default ``ce_weight`` 0.1 a tenth of them.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", §7 (uniform). The released
    code of Tf-KD uses ``others``, where its paper writes u = 1/K: its eps 0.1 is a uniform eps of 0.1 K/(K-1), 1 % more
    at K = 100.

    Args:
        label_smoothing: eps.
        smoothing: convention, "uniform" or "others".

    Example:
        >>> s, y = torch.randn(8, 10), torch.randint(10, (8,))
        >>> ce, log_p = torch.nn.functional.cross_entropy(s, y), s.log_softmax(-1)
        >>> torch.allclose(LabelSmoothing(0.2)(s, y), 0.8 * ce - 0.2 * log_p.mean())
        True
        >>> same = DistillLoss(kd_weight=0, ce_weight=1, label_smoothing=0.2)(s, s, y)
        >>> torch.allclose(LabelSmoothing(0.2)(s, y), same)
        True
    """

    label_smoothing: Mass = 0.1
    smoothing: Convention = "uniform"

    needs = frozenset({"target"})
    presets = {"cifar100": ALONE, "imagenet": ALONE}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        logits = seen.student.logits
        mass = uniform_mass(self.label_smoothing, logits.shape[-1], self.smoothing)
        return cross_entropy(logits, mix_uniform(seen.target, logits.shape[-1], mass, logits.dtype))


class GeneralizedSmoothing(Method, name="generalized_smoothing"):
    """Generalised label smoothing: ``(1-eps) CE + eps mean_k(-log p_k)``, eps ≤ 1, in place of the cross entropy.

    It is linear in eps: the value at -eps lies as far on the other side of CE as the value at eps. At eps = 0 it is CE.
    For eps < 0 it equals ``CE - |eps| (s_y - mean_k s_k)``, has no lower bound and no stationary point at finite
    logits; the network has to be regularised, or trained with CE first, as the authors do for very noisy labels.

    Source: Wei et al. 2022, "To Smooth or Not? When Label Smoothing Meets Noisy Labels", which tries 0.8 to -8 on
    CIFAR-10 with noisy labels. The released ``loss_gls`` agrees with the paper and has the default 0.1.

    Args:
        label_smoothing: eps, at most 1; it may be negative.

    Example:
        >>> GeneralizedSmoothing()(torch.randn(8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
    """

    label_smoothing: Annotated[float, Allowed("a finite number ≤ 1", lambda value: value <= 1)] = 0.1

    needs = frozenset({"target"})
    presets = {"cifar10": ALONE}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        logits = seen.student.logits
        return cross_entropy(logits, mix_uniform(seen.target, logits.shape[-1], self.label_smoothing, logits.dtype))


class OnlineLabelSmoothing(Method, name="online_label_smoothing"):
    """Online label smoothing: ``-sum_k S[y, k] log p_k``, added to the cross entropy with equal weight.

    S[y] is the mean prediction over the last epoch's correctly classified examples of class y. The minimum is the
    entropy of S[y], at p = S[y]. The target must be class labels.

    In training every correctly classified example adds its p, without gradient, to the sum of its class;
    ``end_epoch`` makes the means of these sums the S of the next epoch. A class without a correct example gets 1/K. The
    sums run over the batches of all processes, so that all have the same S.

    Source: Zhang et al. 2021, "Delving Deep into Label Smoothing".

    Args:
        released: compute the authors' CIFAR and ImageNet scripts, in which S, and so the value, is 0 in the first
            epoch; in the paper S is 1/K there.

    Example:
        >>> OnlineLabelSmoothing()(torch.randn(8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
    """

    released: bool = False

    needs = frozenset({"labels"})
    renamed = {"start": "released=true for zero"}
    presets = dict.fromkeys(("cifar100", "imagenet"), {"weight": 0.5, "ce_weight": 0.5})

    def make(self, seen: Seen) -> None:
        """The table in use, and the sums and counts of the running epoch."""
        k = seen.student.logits.shape[-1]
        first = 0.0 if self.released else 1 / k
        self.register_buffer("table", torch.full((k, k), first, dtype=torch.float64))
        self.register_buffer("gathered", torch.zeros(k, k))
        self.register_buffer("counted", torch.zeros(k))

    def values(self, seen: Seen) -> Tensor:
        """(N,); in training the batch is gathered too."""
        logits = seen.student.logits
        if self.training:
            self._gather(logits.detach(), seen.target, seen.ignored)
        return cross_entropy(logits, self.get_buffer("table").to(logits.dtype)[seen.target])

    def _gather(self, logits: Tensor, target: Tensor, ignored: Tensor | None) -> None:
        gathered, counted = self.get_buffer("gathered"), self.get_buffer("counted")
        correct = logits.argmax(-1) == target
        if ignored is not None:
            correct &= ~ignored
        # A column of ones counts: one sum over the processes serves both.
        rows = torch.cat([logits.softmax(-1), torch.ones_like(logits[:, :1])], -1).to(gathered.dtype)
        new = torch.zeros(len(gathered), len(gathered) + 1, dtype=gathered.dtype, device=gathered.device)
        new.index_add_(0, target, rows * correct.unsqueeze(-1))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(new)
        gathered += new[:, :-1]
        counted += new[:, -1]

    def end_epoch(self) -> None:
        """Make the means of the gathered rows the table in use."""
        self._require_built("table")
        table, gathered, counted = (self.get_buffer(name) for name in ("table", "gathered", "counted"))
        any_correct = (counted > 0).unsqueeze(-1)
        table.copy_((gathered / counted.clamp(min=1).unsqueeze(-1)).where(any_correct, 1 / len(table)))
        gathered.zero_()
        counted.zero_()


class MaxSup(Method, name="maxsup"):
    """Max suppression: ``w (max_k s_k - mean_k s_k)``, added to the cross entropy; in units of logits.

    It lowers the largest logit, where label smoothing lowers the label's: on a correct prediction it is label smoothing
    with eps = w, as ``LS = CE + eps (s_y - mean_k s_k)`` shows. The label plays no part. Non-negative; zero, where it
    has a kink, only for equal logits. w grows linearly, by whole epochs, from start_weight to end_weight.

    Source: Zhou et al. 2025, "MaxSup: Overcoming Representation Collapse in Label Smoothing". The formula in its README
    has a constant w.

    Args:
        start_weight: w in the first epoch.
        end_weight: w at the end.
        released: compute the authors' long-tailed code, whose w reaches end_weight in the last epoch, as it divides by
            epochs - 1. The default is their ImageNet code, which divides by epochs, so that w stays below it.

    Example:
        >>> MaxSup()(torch.randn(8, 10)).shape
        torch.Size([])
    """

    start_weight: Weight = 0.1
    end_weight: Weight = 0.2
    released: bool = False

    needs = frozenset()
    renamed = {"ramp": "released=true for in_last"}
    presets = {
        "imagenet": {"weight": 1.0, "ce_weight": 1.0},
        "long_tailed": {"weight": 1.0, "ce_weight": 1.0, "released": True},
    }

    def values(self, seen: Seen) -> Tensor:
        """(N,); equal largest logits share the gradient."""
        logits = seen.student.logits
        steps = max(1, seen.epochs - 1) if self.released else seen.epochs
        done = min(1.0, math.floor(seen.epoch) / steps)
        weight = self.start_weight + (self.end_weight - self.start_weight) * done
        return weight * (logits.amax(-1) - logits.mean(-1))


class ConfidencePenalty(Method, name="confidence_penalty"):
    """Confidence penalty: ``-H(p) = sum_k p_k log p_k``, added to the cross entropy; its weight is the paper's β.

    It equals ``KL(p || u) - log K``; label smoothing has KL(u || p). The label plays no part.
    The minimum is -log K, stationary at p uniform; it is 0 at p one-hot, where the gradient vanishes too.

    Source: Pereyra et al. 2017, "Regularizing Neural Networks by Penalizing Confident Output Distributions", §3, weight
    0.1 on CIFAR-10. Its annealed and thresholded variants are not here. The authors released no code; netcal's torch
    class adds +weight · H, which has the opposite effect, and divides by K.

    Example:
        >>> ConfidencePenalty()(torch.randn(8, 10)).shape
        torch.Size([])
    """

    needs = frozenset()
    presets = {"cifar10": {"weight": 0.1, "ce_weight": 1.0}}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        logits = seen.student.logits
        return -cross_entropy(logits, logits.softmax(-1))


class Focal(Method, name="focal"):
    """Focal loss: ``-(1 - p_y)^gamma log p_y``, in place of the cross entropy.

    1 - p_y carries gradient and is taken in log space, exact where p_y is near 1. Non-negative; zero and stationary in
    the limit p_y = 1. gamma = 0 is CE. The target must be class labels.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", §3, gamma 2 (without its class weights); the
    preset is gamma 3 of Mukhoti et al. 2020 on CIFAR. The latter's released code sums over the batch by default, so
    that its gradient is N times that of this mean.

    Args:
        gamma: exponent.

    Example:
        >>> Focal()(torch.randn(8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
    """

    gamma: NonNegative = 2.0

    needs = frozenset({"labels"})
    presets = {"cifar100": ALONE | {"gamma": 3.0}}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        margin, _ = against_others(seen.student.logits, seen.target)
        return focal(margin, self.gamma)


class FLSD53(Method, name="flsd53"):
    """Focal loss with a sample-dependent gamma, FLSD-53: ``-(1 - p_y)^g log p_y``, in place of the cross entropy.

    g is ``low_gamma`` where p_y is below ``threshold`` and ``gamma`` elsewhere. g is chosen without gradient, so the
    loss jumps down where p_y falls through 0.2, by 0.8³·0.36·log 5 = 0.30. Non-negative; zero and stationary in the
    limit p_y = 1. The target must be class labels.

    Source: Mukhoti et al. 2020, "Calibrating Deep Neural Networks using Focal Loss". In the released code the gamma
    argument applies only where p_y ≥ 0.5, and on [0.2, 0.5) g is 3; at gamma 3, the published method, both agree. The
    code sums over the batch by default, so that its gradient is N times that of this mean.

    Args:
        gamma: g where p_y ≥ threshold.
        low_gamma: g where p_y < threshold.
        threshold: p_y at which g changes.

    Example:
        >>> FLSD53()(torch.randn(8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
    """

    gamma: NonNegative = 3.0
    low_gamma: NonNegative = 5.0
    threshold: Annotated[float, Allowed("a probability from 0 to 1", lambda value: 0 <= value <= 1)] = 0.2

    needs = frozenset({"labels"})
    presets = {"cifar100": ALONE}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        margin, _ = against_others(seen.student.logits, seen.target)
        low = (margin.detach().sigmoid() < self.threshold).to(margin.dtype)  # where(…, float, float) gives float32
        return focal(margin, self.gamma + (self.low_gamma - self.gamma) * low)


def focal(margin: Tensor, gamma: Tensor | float) -> Tensor:
    """``-(1 - p)^gamma log p`` of p = sigmoid(margin)."""
    return -(gamma * F.logsigmoid(-margin)).exp() * F.logsigmoid(margin)
