"""DistillLoss: label-smoothed cross entropy plus distillation. Inputs are checked and a backend chosen here.

Shapes: ``(...)`` positions, ``K`` classes, always last.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd.losses import reference
from kd.smoothing import (
    check_choice,
    check_number,
    check_smoothing,
    check_target,
    row_sum_tolerance,
    to_uniform,
    values_readable,
)

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "reference")


class DistillTerms(NamedTuple):
    """The loss and, unweighted and detached for logging, its two terms; None is a term whose weight is 0."""

    loss: Tensor
    ce: Tensor | None
    kd: Tensor | None


class DistillLoss(nn.Module):
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
        temperature: T, finite and > 0.
        kd_weight, ce_weight: finite and ≥ 0. A term of weight 0 is not computed; with both 0 the loss is 0. With
            ``kd_weight=0`` the teacher's logits are not looked at and may be None.
        label_smoothing: mass in [0, 1) for the cross entropy.
        smoothing: its convention, "uniform" (eps/K on every class) or "others" (eps/(K-1) on the others).
        student_temperature: Ts; None means T.
        class_weight: K floating weights ≥ 0 for the cross entropy only. A buffer that moves with the module and stays
            out of its state_dict.
        ignore_index: positions of this label give 0 to both terms and exactly 0 gradient. Not for probability targets.
        reduction: "mean" divides the sum of both terms by the number of positions that are not ignored, also with
            class_weight (F.cross_entropy divides by the sum of the labels' weights there), and is 0, with zero
            gradients, where there are none; "sum"; "none" gives shape ``(...)``.
        backend: "auto" or "reference".

    A class at -inf in student and teacher (masked) gives 0 to the KD term. Smoothing puts mass on it, so with
    label_smoothing > 0 the cross entropy is inf, as in F.cross_entropy. nan in gives nan out.

    Raises ValueError or TypeError, naming the argument, for settings outside these ranges, shapes, devices and dtypes
    that do not fit (nothing is broadcast), labels outside 0..K-1, target rows that are no probabilities, and a teacher,
    target or class_weight with requires_grad. Warns where teacher_logits look like probabilities. Checks that read
    values (on a GPU: that synchronise) are left out under torch.compile, torch.func and CUDA graph capture.
    """

    class_weight: Tensor | None

    def __init__(
        self,
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
    ):
        super().__init__()
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight
        self.label_smoothing = label_smoothing
        self.smoothing = smoothing
        self.student_temperature = student_temperature
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend
        _check_class_weight(class_weight)
        self.register_buffer("class_weight", class_weight, persistent=False)
        self._check_settings()

    @property
    def backend_used(self) -> str:
        """The implementation that runs: "reference"."""
        return "reference"

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor) -> Tensor:
        """The loss: a scalar, or shape ``(...)`` under reduction "none"."""
        return self.terms(student_logits, teacher_logits, target).loss

    def terms(self, student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor) -> DistillTerms:
        """The loss with its unweighted terms, from one pass and under the same reduction."""
        self._check_settings()  # again, because a schedule may have changed one
        if self.kd_weight == 0:
            teacher_logits = None
        self._check_inputs(student_logits, teacher_logits, target)
        loss, ce, kd = reference.terms(
            student_logits,
            teacher_logits,
            target,
            self.class_weight,
            temperature=self.temperature,
            student_temperature=self.temperature if self.student_temperature is None else self.student_temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            uniform_mass=to_uniform(self.label_smoothing, student_logits.shape[-1], self.smoothing),
            ignore_index=self.ignore_index,
        )
        return DistillTerms(
            self._reduce(loss, target),
            None if ce is None else self._reduce(ce.detach(), target),
            None if kd is None else self._reduce(kd.detach(), target),
        )

    def _reduce(self, values: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return values
        if self.reduction == "sum":
            return values.sum()
        if target.is_floating_point():
            return values.sum() / max(values.numel(), 1)
        return values.sum() / (target != self.ignore_index).sum().clamp(min=1)

    def extra_repr(self) -> str:
        """The settings, for print(loss)."""
        shown = ("kd_weight", "ce_weight", "label_smoothing", "smoothing", "student_temperature", "reduction")
        return ", ".join([f"{self.temperature}", *(f"{name}={getattr(self, name)!r}" for name in shown)])

    def _check_settings(self) -> None:
        check_number("temperature", self.temperature, "a finite number > 0", _positive)
        if self.student_temperature is not None:
            check_number("student_temperature", self.student_temperature, "None or a finite number > 0", _positive)
        check_number("kd_weight", self.kd_weight, "a finite number ≥ 0", _not_negative)
        check_number("ce_weight", self.ce_weight, "a finite number ≥ 0", _not_negative)
        check_smoothing(self.label_smoothing, self.smoothing)
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            got = type(self.ignore_index).__name__
            raise TypeError(f"ignore_index={self.ignore_index!r}: must be an int, got {got}")
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("backend", self.backend, BACKENDS)

    def _check_inputs(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> None:
        _check_logits("student_logits", student)
        if student.ndim == 0 or student.shape[-1] == 0:
            raise ValueError(
                f"student_logits has shape {tuple(student.shape)}: must be (..., K) with K ≥ 1, classes last"
            )
        classes = student.shape[-1]
        check_target(target, classes, self.ignore_index)
        soft = target.is_floating_point()
        if soft and self.ignore_index >= 0:
            raise ValueError(f"ignore_index={self.ignore_index}: must be < 0 (off) with probabilities as target")
        _check_fits("target", target, student, student.shape if soft else student.shape[:-1])
        if self.class_weight is not None:
            _check_fits("class_weight", self.class_weight, student, student.shape[-1:])
        if self.kd_weight > 0:
            if teacher is None:
                raise ValueError(
                    f"teacher_logits=None: must be given with kd_weight={self.kd_weight} (0 needs no teacher)"
                )
            _check_logits("teacher_logits", teacher)
            _check_fits("teacher_logits", teacher, student, student.shape)
            _warn_of_probabilities(teacher)


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
    )
    return loss(student_logits, teacher_logits, target)


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def _check_logits(name: str, logits: object) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}={logits!r}: must be a tensor of logits, got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"{name}.dtype={logits.dtype}: must be a real floating dtype")


def _check_fits(name: str, tensor: Tensor, student: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        logits = tuple(student.shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {tuple(shape)} for student_logits {logits}")
    if tensor.device != student.device:
        raise ValueError(f"{name} is on {tensor.device}: must be on {student.device}, the device of student_logits")
    if tensor.requires_grad:
        raise ValueError(f"{name}.requires_grad=True: must be False; use torch.no_grad() or {name}.detach()")


def _check_class_weight(weight: Tensor | None) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 1:
        got = f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"class_weight is {got}: must be None or a floating tensor of shape (K,)")
    if values_readable(weight):
        bad = ~((weight >= 0) & (weight < math.inf))
        if bad.any():
            raise ValueError(f"class_weight has {weight[bad][0].item():g}: must be finite and ≥ 0")


def _warn_of_probabilities(teacher: Tensor) -> None:
    # One class cannot tell probabilities from logits. The first row alone settles nearly every case, at little cost.
    if teacher.shape[-1] == 1 or teacher.numel() == 0 or not values_readable(teacher):
        return
    first = teacher[(0,) * (teacher.ndim - 1)]
    if _are_probabilities(first) and _are_probabilities(teacher):
        warnings.warn("teacher_logits look like probabilities: pass logits, or probabilities.log()", stacklevel=5)


def _are_probabilities(rows: Tensor) -> bool:
    off = (rows.sum(-1, dtype=reference.wide_dtype(rows)) - 1).abs()
    return bool((rows >= 0).all() & (off <= row_sum_tolerance(rows.dtype)).all())
