"""Methods on the side of the labels: smoothing and its alternatives, without any teacher.

``values`` is either what a paper puts in the place of the cross entropy, or the term that it adds to it; the presets'
``ce_weight`` (0, or the paper's) says which. Everything is in nats, at temperature 1.

N examples, K classes; p = softmax(s) of the student's logits s, y the label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kd.losses.methods.base import Method, Seen
from kd.losses.ranges import WEIGHTS, is_weight
from kd.losses.reference import cross_entropy, wide_dtype
from kd.smoothing import check_choice, check_number, check_smoothing, mix_uniform, to_uniform

INSTEAD = {"weight": 1.0, "ce_weight": 0.0, "kd_weight": 0.0}  # in the place of the cross entropy
STARTS = ("uniform", "zero")
RAMPS = ("after_last", "in_last")


@dataclass(eq=False)
class LabelSmoothing(Method, name="label_smoothing"):
    """``-sum_k q_k log p_k``, q the smoothed label: ``uniform`` (1-eps) onehot + eps/K, ``others`` eps/(K-1) each.

    (N,) in nats, in the place of the cross entropy. Never 0 for eps > 0: its least value is the entropy of q,
    stationary at p = q, where s_y is log(1 + (1-eps) K/eps) above the others. Equal to
    ``(1-eps) CE + eps (KL(u || p) + log K)`` and to ``CE + eps (s_y - mean_k s_k)`` with the uniform eps.
    Probability targets are smoothed by the same linear map.

    Szegedy et al. 2016 §7 (uniform). Tf-KD's released code calls ``others`` label smoothing while its paper writes
    u = 1/K: its eps 0.1 is a uniform eps of 0.1 K/(K-1), 1 % more at K = 100; ``smoothing="others"`` reproduces it.
    The same numbers come from DistillLoss(kd_weight=0, label_smoothing=eps).
    """

    label_smoothing: float = 0.1
    smoothing: str = "uniform"

    needs = frozenset()
    presets: ClassVar = {"cifar100": INSTEAD, "imagenet": INSTEAD}

    def check(self) -> None:
        """The mass is in [0, 1), the convention known."""
        check_smoothing(self.label_smoothing, self.smoothing)

    def values(self, seen: Seen) -> Tensor:
        """(N,) cross entropy with the smoothed target."""
        logits = seen.student.logits
        mass = to_uniform(self.label_smoothing, logits.shape[-1], self.smoothing)
        return cross_entropy(logits, mix_uniform(seen.target, logits.shape[-1], mass, logits.dtype))


@dataclass(eq=False)
class GeneralizedSmoothing(Method, name="generalized_smoothing"):
    """``(1-eps) CE + eps mean_k(-log p_k)`` for any eps ≤ 1, negative ones too: uniform label smoothing, continued.

    (N,) in nats, in the place of the cross entropy. It is linear in eps: the value at -eps lies as far on the other
    side of CE as the value at eps. For eps < 0 it equals ``CE - |eps| (s_y - mean_k s_k)``, has no lower bound and no
    stationary point at finite logits: it drives the label's logit away, so the network has to be regularised or
    trained by CE first, as the authors do where labels are very noisy. At eps = 0 it is CE.

    Wei et al. 2022, "To Smooth or Not? When Label Smoothing Meets Noisy Labels", which tries 0.8 to -8 on
    CIFAR-10 with noisy labels and keeps the best; 0.1 is the default of its released ``loss_gls``, which agrees with
    the paper.
    """

    label_smoothing: float = 0.1

    needs = frozenset()
    presets: ClassVar = {"cifar10": INSTEAD}

    def check(self) -> None:
        """Eps is finite and at most 1."""
        check_number("label_smoothing", self.label_smoothing, "a finite number ≤ 1", lambda v: -math.inf < v <= 1)

    def values(self, seen: Seen) -> Tensor:
        """(N,) cross entropy with a target that may be below 0 and above 1."""
        logits = seen.student.logits
        share = mix_uniform(seen.target, logits.shape[-1], self.label_smoothing, logits.dtype)
        return cross_entropy(logits, share)


@dataclass(eq=False)
class OnlineLabelSmoothing(Method, name="online_label_smoothing"):
    """``-sum_k S[y, k] log p_k``: soft labels S[y], the mean prediction of last epoch's correct examples of class y.

    (N,) in nats, beside the cross entropy, half and half. At its least value, the entropy of S[y], where p = S[y].

    While training, every example that the student gets right adds its p, without gradient and before the step, to its
    class's row; ``end_epoch`` makes their means the next epoch's S. A class without a correct example gets 1/K. On
    several processes the rows are summed over them batch by batch, so that all hold the same table. Rows are classes.

    Zhang et al. 2021, "Delving Deep into Label Smoothing". The paper starts from S = 1/K. The released
    CIFAR and ImageNet scripts start from 0, so their soft term is 0 in the first epoch: ``start="zero"``.
    """

    start: str = "uniform"

    needs = frozenset()
    soft_targets = False  # correctness needs a label
    presets: ClassVar = {
        "cifar100": {"weight": 0.5, "ce_weight": 0.5, "kd_weight": 0.0},
        "imagenet": {"weight": 0.5, "ce_weight": 0.5, "kd_weight": 0.0},
    }

    def check(self) -> None:
        """The start is known."""
        check_choice("start", self.start, STARTS)

    def build(self, seen: Seen, num_samples: int) -> None:
        """The table in use, and the sums and counts of the running epoch."""
        logits = seen.student.logits
        k, new = logits.shape[-1], {"dtype": wide_dtype(logits), "device": logits.device}
        self.register_buffer("table", torch.full((k, k), 1 / k if self.start == "uniform" else 0.0, **new))
        self.register_buffer("gathered", torch.zeros(k, k, **new))
        self.register_buffer("counted", torch.zeros(k, **new))

    def values(self, seen: Seen) -> Tensor:
        """(N,) cross entropy with the label's row of the table; while training the batch is gathered."""
        logits = seen.student.logits
        if self.training:
            self._gather(logits.detach(), seen.target, seen.ignored)
        return cross_entropy(logits, self.get_buffer("table").to(logits.dtype)[seen.target])

    def _gather(self, logits: Tensor, target: Tensor, ignored: Tensor | None) -> None:
        gathered, counted = self.get_buffer("gathered"), self.get_buffer("counted")
        right = logits.argmax(-1) == target
        if ignored is not None:
            right &= ~ignored
        # A column of ones counts: one sum over the processes serves both.
        rows = torch.cat([logits.softmax(-1), torch.ones_like(logits[:, :1])], -1).to(gathered.dtype)
        new = torch.zeros(len(gathered), len(gathered) + 1, dtype=gathered.dtype, device=gathered.device)
        new.index_add_(0, target, rows * right.unsqueeze(-1))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(new)
        gathered += new[:, :-1]
        counted += new[:, -1]

    def end_epoch(self) -> None:
        """The gathered means become the table in use."""
        table, gathered, counted = (self.get_buffer(name) for name in ("table", "gathered", "counted"))
        seen_right = (counted > 0).unsqueeze(-1)
        table.copy_((gathered / counted.clamp(min=1).unsqueeze(-1)).where(seen_right, 1 / len(table)))
        gathered.zero_()
        counted.zero_()


@dataclass(eq=False)
class MaxSup(Method, name="maxsup"):
    """``w (max_k s_k - mean_k s_k)``: suppresses the largest logit, where label smoothing suppresses the label's.

    (N,) in the logits' unit, beside the cross entropy. Non-negative; zero, where it has a kink, only for equal logits.
    The label plays no part; on a correct prediction it is label smoothing with eps = w, written as in its identity
    LS = CE + eps (s_y - mean_k s_k). w grows linearly, by whole epochs, from start_weight to end_weight.

    Zhou et al. 2025, "MaxSup: Overcoming Representation Collapse in Label Smoothing". The released ImageNet code
    (and ``ramp="after_last"``) has w = start + (end - start) epoch/epochs, which the last epoch does not reach; its
    long-tailed code (``ramp="in_last"``) divides by epochs - 1 and does. The README's formula has a constant w.
    """

    start_weight: float = 0.1
    end_weight: float = 0.2
    ramp: str = "after_last"

    needs = frozenset()
    presets: ClassVar = {
        "imagenet": {"weight": 1.0, "ce_weight": 1.0, "kd_weight": 0.0},
        "long_tailed": {"weight": 1.0, "ce_weight": 1.0, "kd_weight": 0.0, "ramp": "in_last"},
    }

    def check(self) -> None:
        """Both weights are in range, the ramp known."""
        for name in ("start_weight", "end_weight"):
            check_number(name, getattr(self, name), WEIGHTS, is_weight)
        check_choice("ramp", self.ramp, RAMPS)

    def values(self, seen: Seen) -> Tensor:
        """(N,) the weighted gap of the largest logit; among equal ones the gradient is shared."""
        logits = seen.student.logits
        steps = seen.epochs if self.ramp == "after_last" else max(1, seen.epochs - 1)
        done = min(1.0, math.floor(seen.epoch) / steps)
        weight = self.start_weight + (self.end_weight - self.start_weight) * done
        return weight * (logits.amax(-1) - logits.mean(-1))


@dataclass(eq=False)
class ConfidencePenalty(Method, name="confidence_penalty"):
    """``-H(p) = sum_k p_k log p_k``: the negative entropy of the prediction; its weight is the paper's beta.

    (N,) in nats, beside the cross entropy, from -log K (least, stationary at p uniform) to 0 (p one-hot, where the
    gradient vanishes too). Equal to ``KL(p || u) - log K``: label smoothing has the divergence the other way round.
    The label plays no part.

    Pereyra et al. 2017, "Regularizing Neural Networks by Penalizing Confident Output Distributions", §3, weight 0.1 on
    CIFAR-10. Its annealed and thresholded variants are not here. The authors released no code; netcal's torch class
    adds +weight·H, which has the opposite effect, and divides by K.
    """

    needs = frozenset()
    presets: ClassVar = {"cifar10": {"weight": 0.1, "ce_weight": 1.0, "kd_weight": 0.0}}

    def values(self, seen: Seen) -> Tensor:
        """(N,) negative entropy; a class of probability 0 counts 0."""
        log_p = F.log_softmax(seen.student.logits, -1)
        p = log_p.exp()
        return (p * log_p.masked_fill(p == 0, 0)).sum(-1)


@dataclass(eq=False)
class Focal(Method, name="focal"):
    """``-(1 - p_y)^gamma log p_y``; 1 - p_y carries gradient and is taken in log space, exact where p_y is near 1.

    (N,) in nats, in the place of the cross entropy. At least 0; 0, and stationary, in the limit p_y = 1. gamma = 0 is
    CE. Labels only.

    Lin et al. 2017, "Focal Loss for Dense Object Detection", §3, gamma 2 (without its class weights). Mukhoti et al.
    2020 calibrate CIFAR with gamma 3. Their released code sums over the batch by default, so that its learning rate
    goes with N times this mean.
    """

    gamma: float = 2.0

    needs = frozenset()
    soft_targets = False
    presets: ClassVar = {"cifar100": INSTEAD | {"gamma": 3.0}}

    def check(self) -> None:
        """Gamma is finite and not negative."""
        check_number("gamma", self.gamma, "a finite number ≥ 0", lambda v: 0 <= v < math.inf)

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        own, rest = _log_p_and_rest(seen)
        return -(self.gamma * rest).exp() * own


@dataclass(eq=False)
class FLSD53(Method, name="flsd53"):
    """``-(1 - p_y)^g log p_y`` with g = 5 where p_y < 0.2, else gamma = 3: focal loss with a sample-dependent gamma.

    (N,) in nats, in the place of the cross entropy. At least 0; 0, and stationary, in the limit p_y = 1. g is chosen by
    value, without gradient, so the loss jumps down where p_y falls through 0.2 (by 0.8³·0.36·log 5 = 0.30). Labels
    only.

    Mukhoti et al. 2020, "Calibrating Deep Neural Networks using Focal Loss", FLSD-53. In their released code the
    gamma argument moves only p_y ≥ 0.5 and [0.2, 0.5) stays at 3: equal to this for its gamma 3, the published method.
    It sums over the batch by default, so that its learning rate goes with N times this mean.
    """

    gamma: float = 3.0
    low_gamma: float = 5.0
    threshold: float = 0.2

    needs = frozenset()
    soft_targets = False
    presets: ClassVar = {"cifar100": INSTEAD}

    def check(self) -> None:
        """Both gammas are finite and not negative, the threshold is a probability."""
        for name in ("gamma", "low_gamma"):
            check_number(name, getattr(self, name), "a finite number ≥ 0", lambda v: 0 <= v < math.inf)
        check_number("threshold", self.threshold, "a probability from 0 to 1", lambda v: 0 <= v <= 1)

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        own, rest = _log_p_and_rest(seen)
        low = (own.detach().exp() < self.threshold).to(own.dtype)  # where(…, float, float) would round to float32
        gamma = self.gamma + (self.low_gamma - self.gamma) * low
        return -(gamma * rest).exp() * own


def _log_p_and_rest(seen: Seen) -> tuple[Tensor, Tensor]:
    """(N,) log p_y and log(1 - p_y); the second from the other classes, because 1 - p_y would cancel."""
    log_p, label = F.log_softmax(seen.student.logits, -1), seen.target.unsqueeze(-1)
    return log_p.gather(-1, label).squeeze(-1), log_p.scatter(-1, label, -math.inf).logsumexp(-1)
