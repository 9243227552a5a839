"""The distillation loss in plain torch: the definition that every faster backend is held to.

A backend is one function with the signature of ``terms`` below. Its inputs have been checked; it returns the value of
each position, unreduced, because means belong to the caller. Only the first value has to carry a gradient.

Shapes: ``(...)`` positions, ``K`` classes, always last.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.smoothing import mix_uniform


class Settings(NamedTuple):
    """The numbers of one loss, as DistillLoss has them; ``uniform_mass`` is its smoothing by the uniform convention."""

    temperature: float
    student_temperature: float
    kd_weight: float
    ce_weight: float
    uniform_mass: float
    ignore_index: int


def terms(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(ce_weight * ce + kd_weight * kd, ce, kd)``, each of shape ``(...)``; a term of weight 0 is None.

    At an ignored position every value and every gradient is exactly 0, whatever the logits there.
    """
    wide = wide_dtype(student)
    student = student.to(wide)
    share = mix_uniform(target, student.shape[-1], settings.uniform_mass, wide)
    if class_weight is not None:
        share = share * class_weight.to(wide)
    if not target.is_floating_point():
        # Masked before the softmax, not after it: a nan there would come back as 0 * nan in the backward pass.
        ignored = (target == settings.ignore_index).unsqueeze(-1)
        student = student.masked_fill(ignored, 0)
        share = share.masked_fill(ignored, 0)
        teacher = None if teacher is None else teacher.masked_fill(ignored, 0)
    # An empty sum is a zero that belongs to the graph; 0 * student would be nan at infinite logits.
    loss = student[..., :0].sum(-1)
    ce = kd = None
    if settings.ce_weight > 0:
        ce = cross_entropy(student, share)
        loss = loss + settings.ce_weight * ce
    if settings.kd_weight > 0 and teacher is not None:
        kd = distillation(student, teacher.to(wide), settings.temperature, settings.student_temperature)
        loss = loss + settings.kd_weight * kd
    return loss, ce, kd


def rows(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    upstream: Tensor,
    settings: Settings,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``terms`` of rows (N, K) as the fused backends give it: ``(loss, ce, kd, gradient)``, detached.

    A term that is not computed is 0. ``gradient`` is ``upstream[i] * d loss_i / d student_i`` (N, K) in the student's
    dtype, or (0, K) without ``with_gradient``. A label outside 0..K-1 that is not ignored gives nan.
    """
    wide, classes = wide_dtype(student), student.shape[-1]
    leaf = student.detach().to(wide)
    leaf = leaf.view_as(leaf).requires_grad_(with_gradient)  # its own tensor: the caller's must not start to need one
    with torch.enable_grad():
        loss, *parts = terms(leaf, teacher, target, class_weight, settings)
        if not target.is_floating_point():
            inside = (target >= 0) & (target < classes) | (target == settings.ignore_index)
            loss = loss * torch.where(inside, 1, math.nan).to(wide)
    gradient = leaf[:0]
    if with_gradient:
        (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(wide))
    ce, kd = (torch.zeros_like(loss) if part is None else part.detach() for part in parts)
    return loss.detach(), ce, kd, gradient.detach().to(student.dtype)


def wide_dtype(student: Tensor | torch.dtype) -> torch.dtype:
    """What everything is computed in: float64 for a float64 student, float32 for all others."""
    dtype = student.dtype if isinstance(student, Tensor) else student
    return torch.float64 if dtype == torch.float64 else torch.float32


def cross_entropy(student: Tensor, share: Tensor) -> Tensor:
    """``-sum_k share_k log softmax(student)_k``; a class without a share counts 0 even where its logit is -inf."""
    nll = -F.log_softmax(student, -1)
    return (share * nll.masked_fill(share == 0, 0)).sum(-1)


def distillation(student: Tensor, teacher: Tensor, temperature: float, student_temperature: float) -> Tensor:
    """``Ts² KL(softmax(teacher / T) || softmax(student / Ts))``; a class the teacher gives nothing counts 0."""
    log_s, log_t = log_softened(student, student_temperature), log_softened(teacher, temperature)
    p = log_t.exp()
    # Nothing is 0 in the dtype: then the student may be masked there, and 0 * inf is nan.
    return student_temperature**2 * (p * (log_t - log_s).masked_fill(p == 0, 0)).sum(-1)


def log_softened(logits: Tensor, temperature: float) -> Tensor:
    """``log softmax(logits / T)``."""
    if temperature < 1:  # the largest finite logits over T are inf, and inf - inf is nan; their differences may be -inf
        logits = logits - logits.detach().amax(-1, keepdim=True)
    return F.log_softmax(logits / temperature, -1)
