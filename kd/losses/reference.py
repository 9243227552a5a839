"""The distillation loss in plain PyTorch: the definition that every fused backend is tested against.

Shapes: ``(...)`` positions, ``K`` classes, always last. "Wide" is float64 for a float64 student, else float32.

A backend returns the loss of every position, unreduced, because the mean belongs to the caller. Its inputs have been
checked already.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.smoothing import mix_uniform


class Inputs(NamedTuple):
    """The tensors of one loss."""

    student: Tensor  # logits (..., K)
    teacher: Tensor | None  # logits (..., K); None where the KD term has weight 0
    target: Tensor  # int64 labels (...) or probabilities (..., K)
    class_weight: Tensor | None  # (K,)


class Numbers(NamedTuple):
    """The numbers of one loss. DistillLoss says what they mean."""

    temperature: float
    student_temperature: float
    kd_weight: float
    ce_weight: float
    uniform_mass: float  # the label smoothing in the "uniform" convention
    ignore_index: int


Terms = tuple[Tensor, Tensor | None, Tensor | None]  # loss, ce and kd; a term of weight 0 is None


def terms(inputs: Inputs, numbers: Numbers, class_dim: int = -1) -> Terms:
    """``(ce_weight * ce + kd_weight * kd, ce, kd)`` of every position, each of shape ``(...)``.

    At an ignored position every value and every gradient is exactly 0, whatever the logits there. A label outside
    0..K-1 that is not ignored gives a loss and gradients of nan: where values cannot be read it has not been refused.
    ``class_dim`` is where the classes were before they were moved to the end.
    """
    student, teacher, target, class_weight = inputs
    wide, classes = wide_dtype(student), student.shape[-1]
    student = student.to(wide)
    share = mix_uniform(target, classes, numbers.uniform_mass, wide)
    if class_weight is not None:
        share = share * class_weight.to(wide)
    if not target.is_floating_point():
        # Masked before the softmax: a nan masked after it would come back as 0 * nan in the backward pass.
        ignored = (target == numbers.ignore_index).unsqueeze(-1)
        student = student.masked_fill(ignored, 0)
        share = share.masked_fill(ignored, 0)
        teacher = None if teacher is None else teacher.masked_fill(ignored, 0)
    # An empty sum is a zero with a graph; 0 * student would be nan at infinite logits.
    loss = student[..., :0].sum(-1)
    ce = kd = None
    if numbers.ce_weight > 0:
        ce = cross_entropy(student, share, class_dim)
        loss = loss + numbers.ce_weight * ce
    if teacher is not None:
        temperatures = numbers.temperature, numbers.student_temperature
        kd = distillation(student, teacher.to(wide), *temperatures, class_dim)
        loss = loss + numbers.kd_weight * kd
    if not target.is_floating_point():
        known = (target >= 0) & (target < classes) | (target == numbers.ignore_index)
        loss = loss * torch.where(known, 1, math.nan).to(wide)
    return loss, ce, kd


def rows(
    inputs: Inputs, upstream: Tensor, numbers: Numbers, *, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``terms`` with the interface of the fused backends, for N rows: ``(loss, ce, kd, gradient)``, detached.

    A term of weight 0 is 0. ``gradient`` is ``upstream[i] * d loss_i / d student_i`` (N, K) in the student's dtype, or
    (0, K) without ``with_gradient``.
    """
    student = inputs.student
    wide = wide_dtype(student)
    leaf = student.detach().to(wide)
    leaf = leaf.view_as(leaf).requires_grad_(with_gradient)  # a new tensor: the caller's must not require a gradient
    with torch.enable_grad():
        loss, *parts = terms(inputs._replace(student=leaf), numbers)
    gradient = leaf[:0]
    if with_gradient:
        (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(wide))
    ce, kd = (torch.zeros_like(loss) if part is None else part.detach() for part in parts)
    return loss.detach(), ce, kd, gradient.detach().to(student.dtype)


def reduced(values: Tensor, count: Tensor | int | None) -> Tensor:
    """The sum over positions divided by ``count``; None leaves the values."""
    return values if count is None else values.sum() / count


def wide_dtype(student: Tensor | torch.dtype) -> torch.dtype:
    """The dtype that the loss is computed in: float64 for a float64 student, float32 for all others."""
    dtype = student.dtype if isinstance(student, Tensor) else student
    return torch.float64 if dtype == torch.float64 else torch.float32


def cross_entropy(student: Tensor, share: Tensor, class_dim: int = -1) -> Tensor:
    """``-sum_k share_k log softmax(student)_k``; a class of share 0 adds 0 even where its logit is -inf."""
    nll = -log_softmax(student, class_dim)
    return (share * nll.masked_fill(share == 0, 0)).sum(-1)


def distillation(
    student: Tensor, teacher: Tensor, temperature: float, student_temperature: float, class_dim: int = -1
) -> Tensor:
    """``Ts² KL(softmax(teacher / T) || softmax(student / Ts))``; a class that is `nothing` to the teacher adds 0."""
    log_t = log_softened(teacher, temperature, class_dim)
    return student_temperature**2 * kl(log_t, log_softened(student, student_temperature, class_dim))


def kl(log_t: Tensor, log_s: Tensor) -> Tensor:
    """``KL(t || s)`` over the last axis, from log probabilities; a class that is `nothing` to the teacher adds 0."""
    return (log_t.exp() * (log_t - log_s).masked_fill(nothing(log_t), 0)).sum(-1)


def nothing(log_t: Tensor) -> Tensor:
    """Classes whose probability, divided by the largest of the row, is below the dtype's smallest normal number.

    The same rule in the kernels, so that a class which the student masks by -inf and the teacher by any large number
    is inf on all of them or 0 on all. Elsewhere such an addend is below all rounding.
    """
    return log_t < log_t.detach().amax(-1, keepdim=True) + math.log(torch.finfo(log_t.dtype).tiny)


def log_softmax(logits: Tensor, class_dim: int = -1) -> Tensor:
    """``log softmax(logits)`` over the last axis, taken where the classes lie: else PyTorch would copy them all."""
    if class_dim in (-1, logits.ndim - 1):
        return F.log_softmax(logits, -1)
    return F.log_softmax(logits.movedim(-1, class_dim), class_dim).movedim(class_dim, -1)


def log_softened(logits: Tensor, temperature: float, class_dim: int = -1) -> Tensor:
    """``log softmax(logits / T)``."""
    if temperature < 1:  # the largest finite logits divided by T overflow to inf; their differences may be -inf
        logits = logits - logits.detach().amax(-1, keepdim=True)
    return log_softmax(logits / temperature, class_dim)
