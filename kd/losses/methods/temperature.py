"""Methods that choose the temperature: logit standardization around any method, and a learned one; several teachers.

N examples, K classes; z are logits (N, K), s the student's and t the teacher's, p_T(z) = softmax(z / T).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.methods.base import METHODS, Method, Seen
from kd.losses.methods.batch_logits import centred
from kd.losses.methods.logits import check_fields, check_temperatures, check_weights, kl, teacher_of
from kd.losses.ranges import HIGHEST_TEMPERATURE
from kd.smoothing import check_choice


@dataclass(eq=False)
class LogitStandardization(Method, name="lskd"):
    """Any other method on ``(z - mean z) / std z`` of each row, student's and teacher's alike: its own scale for each.

    ``method`` names the method and ``settings`` are its fields; a ``temperature`` that they do not mention is the
    paper's base temperature 2. Values, units and shape are that method's. Where it is zero at s = t, this is zero
    wherever t = a s + b in each row with a > 0: the student may be as sure as it likes. A row without variation becomes
    zeros without a gradient. Sun et al. 2024, "Logit Standardization in Knowledge Distillation": weight 9 for KD on
    CIFAR-100; for DKD both of its weights times 9.

    The paper divides by K in the variance. The released code divides by K - 1, a temperature larger by
    sqrt(K/(K-1)) (0.5 % at K = 100; KD at T = 2 is 1 % smaller), and adds 1e-7 to the deviation:
    ``correction=1, epsilon=1e-7`` reproduce it. The code is around KD, DKD, MLKD and CTKD.
    """

    method: str = "kd"
    settings: Mapping[str, Any] = field(default_factory=dict)
    correction: int = 0
    epsilon: float = 0.0

    presets: ClassVar = {
        "cifar100": {"weight": 9.0, "ce_weight": 0.1},
        "imagenet": {"weight": 9.0, "ce_weight": 1.0},
    }

    def __post_init__(self):
        super().__post_init__()
        settings = dict(self.settings)
        if "temperature" in self._fields_of_method():
            settings = {"temperature": 2.0, **settings}
        self.inner = METHODS[self.method](**settings)
        # What the inner method needs of the loop is what this one needs.
        for declared in ("needs", "per_example", "soft_targets"):
            self.__dict__[declared] = getattr(self.inner, declared)

    def check(self) -> None:
        """A registered method, fields that it has, and a divisor K or K - 1."""
        check_choice("lskd.method", self.method, tuple(sorted(METHODS)))
        known = self._fields_of_method()
        for name in self.settings:
            check_choice(f"lskd.settings of method={self.method!r}, name", name, known)
        check_fields(self, "0 (divide by K) or 1 (by K - 1)", lambda value: value in (0, 1), "correction")
        check_weights(self, "epsilon")

    def build(self, seen: Seen, num_samples: int) -> None:
        """What the inner method makes, from standardized logits."""
        self.inner.build(self._standardized(seen), num_samples)

    def end_epoch(self) -> None:
        """What the inner method does."""
        self.inner.end_epoch()

    def values(self, seen: Seen) -> Tensor:
        """As the inner method."""
        return self.inner.values(self._standardized(seen))

    def _standardized(self, seen: Seen) -> Seen:
        views = [replace(v, logits=self.standardize(v.logits)) for v in (seen.student, teacher_of(seen))]
        return replace(seen, student=views[0], teacher=views[1])

    def standardize(self, logits: Tensor) -> Tensor:
        """Each row with mean 0 and deviation 1; zeros where it does not vary."""
        deviation, length, flat = centred(logits, -1, logits.detach().abs().amax(-1, keepdim=True))
        std = length.masked_fill(flat, math.inf) / math.sqrt(logits.shape[-1] - self.correction)
        return deviation / (std + self.epsilon)

    def _fields_of_method(self) -> tuple[str, ...]:
        return tuple(inspect.signature(METHODS[self.method]).parameters)


@dataclass(eq=False)
class CTKD(Method, name="ctkd"):
    """``T² KL(p_T(t) || p_T(s))`` at a learned ``T = lowest_temperature + temperature_range sigmoid(θ)``.

    θ is one number, learned with the student but against it: its gradient is reversed and multiplied by a strength that
    grows from 0 with ``½ final_strength (1 - cos(π min(E, curriculum_epochs) / curriculum_epochs))`` in the E-th epoch,
    counted from 1: the task becomes harder. The gradient of θ includes that of T². Values (N,) in nats. Zero and
    stationary where both softened distributions are equal, for any θ. Li et al. 2023, "Curriculum Temperature for
    Knowledge Distillation", the global version (θ = 1 at the start: T = 15.6); the one that predicts a temperature for
    each example is not here. Read in the authors' code (zhengli97/CTKD, commit 7d52522), where the student's optimizer
    trains θ with its weight decay; in kd.train a single number has none unless ``optimizer.decay_norm_and_bias``.
    """

    lowest_temperature: float = 1.0
    temperature_range: float = 20.0
    initial_logit: float = 1.0
    final_strength: float = 1.0
    curriculum_epochs: float = 10.0

    presets: ClassVar = {
        "cifar100": {"weight": 0.9, "ce_weight": 0.1},
        "imagenet": {"weight": 1.0, "ce_weight": 1.0, "curriculum_epochs": 5.0},
    }

    def check(self) -> None:
        """The temperature stays in range and the curriculum lasts some time."""
        check_temperatures(self, "lowest_temperature")
        check_fields(
            self,
            f"a number from 0 to {HIGHEST_TEMPERATURE}",
            lambda v: 0 <= v <= HIGHEST_TEMPERATURE,
            "temperature_range",
        )
        if self.lowest_temperature + self.temperature_range > HIGHEST_TEMPERATURE:
            raise ValueError(
                f"{self.name}.lowest_temperature={self.lowest_temperature!r} with temperature_range="
                f"{self.temperature_range!r}: their sum must be at most {HIGHEST_TEMPERATURE}"
            )
        check_fields(self, "a finite number > 0", lambda value: 0 < value < math.inf, "curriculum_epochs")
        check_weights(self, "final_strength")
        check_fields(self, "a finite number", math.isfinite, "initial_logit")

    def build(self, seen: Seen, num_samples: int) -> None:
        """θ."""
        start = torch.full((), float(self.initial_logit), device=seen.student.logits.device)
        self.temperature_logit = nn.Parameter(start)

    def strength(self, epoch: float) -> float:
        """How strongly the gradient of θ is reversed, from the epochs done."""
        running = min(math.floor(epoch) + 1, self.curriculum_epochs)
        return 0.5 * self.final_strength * (1 - math.cos(math.pi * running / self.curriculum_epochs))

    def temperature(self) -> Tensor:
        """The temperature now, ()."""
        return self.lowest_temperature + self.temperature_range * self.temperature_logit.sigmoid()

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.student.logits, teacher_of(seen).logits
        learned = self.temperature().to(student.dtype)
        fixed = learned.detach()
        temperature = fixed - self.strength(seen.epoch) * (learned - fixed)  # equal in value, reversed in gradient
        log_s, log_t = (F.log_softmax(logits / temperature, -1) for logits in (student, teacher))
        return temperature**2 * kl(log_t, log_s)


# ---- several teachers: logits (M, N, K) of M teachers become those of one, (N, K), for any method


def arithmetic_mean(logits: Tensor, temperature: float) -> Tensor:
    """Logits (N, K) whose softmax at T is the mean of the teachers' softmaxes at T: ``T log mean_m p_T(z_m)``.

    Give the method the same temperature, and its teacher is the average of the softened distributions (Hinton et al.
    2015 §2 and 5; You et al. 2017, "Learning from Multiple Teacher Networks", §3.1).
    """
    log_p = F.log_softmax(logits / temperature, -1)
    return temperature * (log_p.logsumexp(0) - math.log(len(logits)))


def geometric_mean(logits: Tensor) -> Tensor:
    """Logits (N, K) whose softmax, at any T, is the renormalised geometric mean of the teachers': their mean."""
    return logits.mean(0)
