"""Methods that choose the temperature: logit standardization around any method, and a learned temperature.

Also the average of several teachers. N examples, K classes; z are logits (N, K), s the student's and t the teacher's,
and p_T(z) = softmax(z / T).
"""

import math
from collections.abc import Mapping
from dataclasses import field, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.fields import Allowed, NonNegative, Temperature, Weight
from kd.losses.methods.base import Method, Seen
from kd.losses.methods.registry import library
from kd.losses.methods.seen import FEATURES
from kd.losses.methods.shared import centred
from kd.losses.reference import kl, log_softened

MethodName = Annotated[str, Allowed("the name of a method; --help lists them", lambda value: value in library())]
Positive = Annotated[float, Allowed("a finite number > 0", lambda value: value > 0)]
Settings = Annotated[Mapping[str, Any], Allowed("settings such as {temperature: 2}", lambda v: isinstance(v, Mapping))]


class LogitStandardKD(Method, name="lskd"):
    """Logit standardization: another method on ``(z - mean z) / std z`` of each row of student and teacher.

    Shapes and units are those of the method inside. If that method is zero at s = t, this one is zero wherever
    t = a s + b in each row with a > 0: the scale of the student's logits is free. A row of equal logits becomes zeros
    without a gradient.

    Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation": weight 9 for KD on CIFAR-100; for DKD
    both of its weights times 9. The released code wraps KD, DKD, MLKD and CTKD.

    Args:
        method: name of the method inside.
        settings: its fields. ``temperature`` is the paper's base temperature 2 unless it is set here.
        released: compute the authors' code, which divides the variance by K - 1, where the paper divides by K, and adds
            1e-7 to the deviation. That acts as a temperature larger by sqrt(K/(K-1)): 0.5 % at K = 100, and 1 % less KD
            at T = 2. The method inside stays as ``settings`` say.

    Example:
        >>> LogitStandardKD()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    method: MethodName = "kd"
    settings: Settings = field(default_factory=dict)
    released: bool = False

    renamed = dict.fromkeys(("correction", "epsilon"), "released=true for the authors' K - 1 and 1e-7")
    presets = {
        "cifar100": {"weight": 9.0, "ce_weight": 0.1},
        "imagenet": {"weight": 9.0, "ce_weight": 1.0},
    }

    def __post_init__(self):
        super().__post_init__()
        known = library()
        names = known[self.method].defaults()
        for name in self.settings:
            self.require(name in names, f"settings.{name}: {self.method} has only {', '.join(names) or 'no settings'}")
        given: dict[str, Any] = {"temperature": 2.0} if "temperature" in names else {}
        self.inner = known[self.method](**given | dict(self.settings))
        self.needs = self.inner.needs  # type: ignore[read-only]  # of this one, not of the class
        self._built = self.inner._built
        self.require(not self.needs & FEATURES, f"method={self.method!r}: must be a method of logits")

    def make(self, seen: Seen) -> None:
        """What the inner method makes, from standardized logits."""
        self.inner.build(self._standardized(seen))

    def end_epoch(self) -> None:
        """Tell the inner method."""
        self.inner.end_epoch()

    def values(self, seen: Seen) -> Tensor:
        """As the inner method."""
        return self.inner.values(self._standardized(seen))

    def _standardized(self, seen: Seen) -> Seen:
        views = (seen.student, seen.teacher)
        student, teacher = (view and replace(view, logits=self.standardize(view.logits)) for view in views)
        assert student is not None
        return replace(seen, student=student, teacher=teacher)

    def standardize(self, logits: Tensor) -> Tensor:
        """Each row with mean 0 and standard deviation 1; zeros where it does not vary."""
        deviation, length, flat = centred(logits, -1, logits.detach().abs().amax(-1, keepdim=True))
        std = length.masked_fill(flat, math.inf) / math.sqrt(logits.shape[-1] - self.released)
        return deviation / (std + 1e-7 * self.released)


class CTKD(Method, name="ctkd"):
    """Curriculum temperature: ``T² KL(p_T(t) || p_T(s))`` at a learned ``T = lowest_temperature + range · sigmoid(θ)``.

    θ is one number, learned adversarially: its gradient, which includes that of T², is reversed and multiplied by
    ``½ final_strength (1 - cos(π min(E, curriculum_epochs) / curriculum_epochs))`` in epoch E, counted from 1, so that
    the task becomes harder. Values (N,) in nats. Zero and stationary where both softened distributions are equal, for
    any θ.

    Source: Li et al. 2023, "Curriculum Temperature for Knowledge Distillation", the global version; the version that
    predicts a temperature for each example is not here. Formula and defaults are those of the authors' code
    (zhengli97/CTKD, commit 7d52522), where the student's optimizer trains θ with its weight decay; in kd.train a single
    number has none unless ``optimizer.decay_norm_and_bias``.

    Args:
        lowest_temperature: T at θ = -inf.
        temperature_range: range, by which T can rise.
        initial_logit: θ at the start; 1 makes T = 15.6.
        final_strength: factor of the reversed gradient after the curriculum.
        curriculum_epochs: epochs over which the factor rises from 0.

    Example:
        >>> CTKD()(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    lowest_temperature: Temperature = 1.0
    temperature_range: NonNegative = 20.0
    initial_logit: float = 1.0
    final_strength: Weight = 1.0
    curriculum_epochs: Positive = 10.0

    presets = {
        "cifar100": {"weight": 0.9, "ce_weight": 0.1},
        "imagenet": {"weight": 1.0, "ce_weight": 1.0, "curriculum_epochs": 5.0},
    }

    def make(self, seen: Seen) -> None:
        """θ."""
        self.temperature_logit = nn.Parameter(torch.tensor(float(self.initial_logit)))

    def strength(self, epoch: float) -> float:
        """Factor of the reversed gradient after so many epochs."""
        running = min(math.floor(epoch) + 1, self.curriculum_epochs)
        return 0.5 * self.final_strength * (1 - math.cos(math.pi * running / self.curriculum_epochs))

    def temperature(self) -> Tensor:
        """The temperature now, ()."""
        return self.lowest_temperature + self.temperature_range * self.temperature_logit.sigmoid()

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        learned = self.temperature().to(seen.student.logits.dtype)
        fixed = learned.detach()
        temperature = fixed - self.strength(seen.epoch) * (learned - fixed)  # equal in value, reversed in gradient
        log_s, log_t = (F.log_softmax(logits / temperature, -1) for logits in seen.logits)
        return temperature**2 * kl(log_t, log_s)


# ---- several teachers as one, for any method


def arithmetic_mean(logits: Tensor, temperature: float) -> Tensor:
    """Logits (N, K) from those of M teachers (M, N, K): ``T log mean_m p_T(z_m)``, whose softmax at T is their mean.

    Give the method the same temperature; then its teacher is the average of the softened distributions.

    Source: Hinton et al. 2015 §2 and 5; You et al. 2017, "Learning from Multiple Teacher Networks", §3.1.
    """
    return temperature * (log_softened(logits, temperature).logsumexp(0) - math.log(len(logits)))
