"""Distillation from a teacher that was smoothed exactly, by formula: what smoothing does when nothing else changes.

N examples, K classes; s and t are the student's and the teacher's logits (N, K), p_T(z) = softmax(z / T).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses import reference
from kd.losses.methods.base import Method, Seen
from kd.losses.methods.logits import check_fields, check_temperatures, teacher_of
from kd.smoothing import unsmooth


@dataclass(eq=False)
class SmoothedTeacher(Method, name="smoothed_teacher"):
    """``T² KL(p_T(t') || p_T(s))``, ``t' = log[(1 - mass) softmax(t) + mass / K]``: plain KD from an affine teacher.

    A network trained with label smoothing also learns other things; t' is the same teacher with nothing but the uniform
    mass mixed in. At T = 1 that is KD from t plus a smoothing of the student, so that nothing is lost; at T > 1 the
    small probabilities meet a floor. ``taken_out`` is a mass that `kd.smoothing.unsmooth` takes out again first: where
    it equals ``mass`` the value is that of KD, to rounding. Values (N,) in nats. Zero and stationary where
    p_T(s) = p_T(t'), at s = t for equal masses only. Ours, to tell smoothing from what comes with it (after Müller et
    al. 2019, section 4). t' is made in float64: in float32 a p below 1e-8 would be lost beside mass / K.
    """

    mass: float = 0.1
    taken_out: float = 0.0
    temperature: float = 4.0

    def check(self) -> None:
        """The temperature is in range, the masses are in [0, 1)."""
        check_temperatures(self, "temperature")
        check_fields(self, "a number ≥ 0 and < 1", lambda value: 0 <= value < 1, "mass", "taken_out")

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.student.logits, teacher_of(seen).logits
        return reference.distillation(student, self.smoothed(teacher), self.temperature, self.temperature)

    def smoothed(self, teacher: Tensor) -> Tensor:
        """The logits that teach, (N, K)."""
        log_p = F.log_softmax(teacher.double(), -1)
        if self.mass > 0:
            uniform = torch.full_like(log_p, math.log(self.mass / log_p.shape[-1]))
            log_p = torch.logaddexp(log_p + math.log1p(-self.mass), uniform)
        return unsmooth(log_p, self.taken_out).to(teacher.dtype)
