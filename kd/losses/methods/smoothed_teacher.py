"""Distillation from a teacher that is smoothed exactly, by formula: what smoothing does when nothing else changes.

N examples, K classes; s and t are the student's and the teacher's logits (N, K), and p_T(z) = softmax(z / T).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses import reference
from kd.losses.methods.base import Method, Seen
from kd.losses.methods.fields import Mass, Temperature
from kd.smoothing import unsmooth


@dataclass(eq=False)
class SmoothedTeacher(Method, name="smoothed_teacher"):
    """Plain KD from a smoothed teacher: ``T² KL(p_T(t') || p_T(s))``, ``t' = log[(1 - mass) softmax(t) + mass / K]``.

    Values (N,) in nats. Zero and stationary where p_T(s) = p_T(t'), so at s = t only for equal masses. A network that
    is trained with label smoothing learns other things too; t' is the same teacher with only the uniform mass mixed in.
    At T = 1 that is KD from t plus label smoothing of the student, so nothing is lost; at T > 1 the small probabilities
    meet a floor.

    Source: ours, to separate smoothing from what comes with it (after Müller et al. 2019, §4).

    Args:
        mass: uniform smoothing mass to mix in.
        taken_out: mass that `kd.smoothing.unsmooth` takes out afterwards; with ``taken_out == mass`` the value is that
            of KD, up to rounding.
        temperature: T.
    """

    mass: Mass = 0.1
    taken_out: Mass = 0.0
    temperature: Temperature = 4.0

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        student, teacher = seen.logits
        return reference.distillation(student, self.smoothed(teacher), self.temperature, self.temperature)

    def smoothed(self, teacher: Tensor) -> Tensor:
        """The logits that teach, (N, K)."""
        log_p = F.log_softmax(teacher.double(), -1)  # in float32 a p below 1e-8 would be lost beside mass / K
        if self.mass > 0:
            uniform = torch.full_like(log_p, math.log(self.mass / log_p.shape[-1]))
            log_p = torch.logaddexp(log_p + math.log1p(-self.mass), uniform)
        return unsmooth(log_p, self.taken_out).to(teacher.dtype)
