"""DistillLoss: label-smoothed cross entropy plus distillation, from two sets of logits.

Shapes: ``(...)`` positions, ``K`` classes, always last.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kd.losses import reference
from kd.losses.kernels import autograd as fused
from kd.losses.settings import DistillSettings, check_logits
from kd.smoothing import unsmooth


class DistillTerms(NamedTuple):
    """The loss and, unweighted and detached for logging, its two terms; None is a term whose weight is 0."""

    loss: Tensor
    ce: Tensor | None
    kd: Tensor | None


class DistillLoss(DistillSettings):
    """``ce_weight * CE + kd_weight * Ts² * KL(softmax(t / T) || softmax(s / Ts))`` in nats.

    ``loss(student_logits, teacher_logits, target)``: logits ``(..., K)`` of any floating dtype; target int64 ``(...)``
    or probabilities ``(..., K)`` such as mixup's. Everything runs in float32, or float64 for a float64 student, and
    that is the dtype returned. No gradient goes to teacher or target.

    CE is ``-sum_k w_k q_k log softmax(s)_k`` with q the smoothed target (Szegedy et al. 2016 §7) and w
    ``class_weight``: what F.cross_entropy gives under "sum" and "none". Its minimum is the entropy of q, so it reaches
    0 only without smoothing.

    The second term is Hinton et al. 2015 §2, with ``Ts = student_temperature`` or T. The factor Ts² undoes the 1/Ts
    that the student's softmax puts into the gradient twice, by the chain rule and by flattening the difference: the
    gradient is ``Ts * (softmax(s / Ts) - softmax(t / T))``. So it is T² KL by default; with ``student_temperature=1.0``
    the factor is 1 and it is exactly the form of Müller et al. 2019 and of transformed teacher matching (TTM, Zheng &
    Yang 2024). It is 0, and stationary, where both softened distributions are equal.

    Args:
        temperature: T, from 0.001 to 1000. In float32 the KL term is off by some 1e-7 T², its gradient by 1e-7 T.
        kd_weight, ce_weight: from 0 to 1e6. A term of weight 0 is not computed; with both 0 the loss is 0. With
            ``kd_weight=0`` the teacher's logits are not looked at and may be None. Below 1e-30 weights and smoothing
            count as 0.
        label_smoothing: mass in [0, 1) for the cross entropy.
        smoothing: its convention, "uniform" (eps/K on every class) or "others" (eps/(K-1) on the others).
        student_temperature: Ts, in the same range; None means T.
        class_weight: K floating weights from 0 to 1e6 for the cross entropy only. A buffer that moves with the module
            and stays out of its state_dict.
        ignore_index: positions of this label give 0 to both terms and exactly 0 gradient. Not for probability targets.
        reduction: "mean" divides the sum of both terms by the number of positions that are not ignored, also with
            class_weight (F.cross_entropy divides by the sum of the labels' weights there), and is 0, with zero
            gradients, where there are none; "sum"; "none" gives shape ``(...)``.
        backend: "cpu" (compiled loops, needs numba) and "triton" (CUDA and ROCm) read the logits once and make loss and
            gradient together; "reference" is plain PyTorch, for any device, with second and forward-mode derivatives.
            "auto" takes the fused one of the logits' device where there is one, and warns when only its package is
            missing. ``backend_used`` says what the last call took.
        teacher_smoothing: uniform mass in [0, 1) of smoothing that the teacher was trained with (`to_uniform` makes one
            of a mass on the others), which is taken out of softmax(t) before T: `kd.smoothing.unsmooth`, in plain
            PyTorch before any backend, one more pass over the teacher's logits. 0 leaves them as they are.

    A class at -inf in student and teacher (masked) gives 0 to the KD term, as does any whose teacher's probability is 0
    in float32. Smoothing puts mass on it, so with label_smoothing > 0 the cross entropy is inf, as in F.cross_entropy.
    nan or +inf in, or a row of nothing but -inf, gives nan out, for that row.

    Finite logits up to 1e20 in absolute value give a finite loss at all settings; larger ones, to the ends of float32,
    one that is right or, where float32 cannot hold it or a part of it, inf. The gradient is right for all; one that is
    too large for the student's dtype (65,504 in float16) is inf.

    Raises ValueError or TypeError, naming the argument, for settings outside these ranges, shapes, devices and dtypes
    that do not fit (nothing is broadcast), labels outside 0..K-1, target rows that are no probabilities, and a teacher,
    target or class_weight with requires_grad. Warns where teacher_logits look like probabilities. Checks that read
    values are left out under torch.compile and torch.func, and on "triton", because they would make the host wait; the
    fused backends then give nan for a label outside 0..K-1. A second derivative of a fused backend is an error. Under
    torch.compile a fused backend is compiled anew for each temperature that it meets, the reference is not.
    """

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor) -> Tensor:
        """The loss: a scalar, or shape ``(...)`` under reduction "none"."""
        return self._values(student_logits, teacher_logits, target)[0]

    def terms(self, student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor) -> DistillTerms:
        """The loss with its unweighted terms, from one pass and under the same reduction."""
        loss, ce, kd, count = self._values(student_logits, teacher_logits, target)
        return DistillTerms(
            loss,
            None if ce is None else self._reduce(ce.detach(), count),
            None if kd is None else self._reduce(kd.detach(), count),
        )

    def _values(
        self, student: Tensor, teacher: Tensor | None, target: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | int | None]:
        """The loss, reduced; the unweighted terms of every position; and what their sums are divided by."""
        self._check_settings()  # again, because a schedule may have changed one
        if self.kd_weight == 0:
            teacher = None
        check_logits("student_logits", student)
        backend = self._choose(student)
        all_count = self._check_inputs(student, teacher, target, read_values=backend != "triton")
        if not torch.compiler.is_compiling():
            self.backend_used = backend
        if teacher is not None and self.teacher_smoothing:
            teacher = unsmooth(teacher, self.teacher_smoothing)
        settings = self._numbers(student.shape[-1])
        count = self._count(target, all_count)
        inputs = student, teacher, target, self.class_weight
        if backend == "reference":
            loss, ce, kd = reference.terms(*inputs, settings)
            return self._reduce(loss, count), ce, kd, count
        return *fused.terms(backend, *inputs, settings, count), count


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    temperature: float = 4.0,
    *,
    kd_weight: float = 0.9,
    ce_weight: float = 0.1,
    label_smoothing: float = 0.0,
    smoothing: str = "uniform",
    student_temperature: float | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    teacher_smoothing: float = 0.0,
) -> Tensor:
    """DistillLoss as a function: the same formula, arguments, checks and result."""
    loss = DistillLoss(
        temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        label_smoothing=label_smoothing,
        smoothing=smoothing,
        student_temperature=student_temperature,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
        teacher_smoothing=teacher_smoothing,
    )
    return loss(student_logits, teacher_logits, target)
