"""DistillLoss: label-smoothed cross entropy plus temperature-scaled distillation. Inputs are checked and a backend chosen here.

Shapes: ``(...)`` positions, ``K`` classes, always last.
"""

import math
import warnings
from typing import NamedTuple

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

    ``loss(student_logits, teacher_logits, target)``: logits ``(..., K)`` of any floating dtype; target int64 ``(...)`` or
    probabilities ``(..., K)`` such as mixup's. Everything runs in float32, or float64 for a float64 student, and that is the
    dtype returned. No gradient goes to teacher or target.

    CE is ``-sum_k w_k q_k log softmax(s)_k`` with q the smoothed target (Szegedy et al. 2016 §7, Müller et al. 2019) and
    w ``class_weight``: what F.cross_entropy gives under "sum" and "none". Its minimum is the entropy of q, so 0 only without
    smoothing.

    The second term is Hinton et al. 2015 §2, with ``Ts = student_temperature`` or T. The factor Ts² undoes the 1/Ts that the
    student's softmax puts into the gradient twice, once by the chain rule and once by flattening the difference: the gradient
    is ``Ts * (softmax(s / Ts) - softmax(t / T))``. So it is the usual T² KL by default; with ``student_temperature=1.0`` the
    factor is 1 and it is exactly the form of Müller et al. 2019 and of transformed teacher matching (Zheng & Yang 2024). It
    is 0 where both softened distributions are equal.

    Args:
        temperature: T, finite and > 0.
        kd_weight, ce_weight: finite and ≥ 0. A term of weight 0 is not computed; with both 0 the loss is 0. With
            ``kd_weight=0`` the teacher's logits are not looked at and may be None.
        label_smoothing: mass in [0, 1) for the cross entropy.
        smoothing: its convention, "uniform" (eps/K on every class) or "others" (eps/(K-1) on the others); see kd.smoothing.
        student_temperature: Ts; None means T.
        class_weight: K floating weights ≥ 0 for the cross entropy only. A buffer that moves with the module and stays out
            of its state_dict.
        ignore_index: positions of this label give 0 to both terms and exactly 0 gradient. Not for probability targets.
        reduction: "mean" divides the sum of both terms by the number of positions that are not ignored, with class_weight
            too (F.cross_entropy's mean divides by the sum of the labels' weights there), and is 0 where there are none;
            "sum"; "none" gives shape ``(...)``.
        backend: "auto" or "reference".

    Infinite logits: a class at -inf in student and teacher (masked) gives 0 to the KD term; smoothing puts mass on it, so with
    label_smoothing > 0 the cross entropy is inf, as in F.cross_entropy. nan in gives nan out.

    Raises ValueError or TypeError, naming the argument, for settings outside these ranges, shapes, devices and dtypes that do
    not fit (nothing is broadcast), labels outside 0..K-1, target rows that are no probabilities, and a teacher, target or
    class_weight with requires_grad. Warns where teacher_logits look like probabilities. Checks that read values (on a GPU:
    that synchronise) are left out under torch.compile, torch.func and CUDA graph capture.
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
        """The settings, in the order of the signature."""
        names = (
            "kd_weight",
            "ce_weight",
            "label_smoothing",
            "smoothing",
            "student_temperature",
            "reduction",
            "backend",
        )
        return ", ".join([f"{self.temperature}", *(f"{name}={getattr(self, name)!r}" for name in names)])

    def _check_settings(self) -> None:
        check_number("temperature", self.temperature, "a finite number > 0", lambda v: 0 < v < math.inf)
        if self.student_temperature is not None:
            check_number(
                "student_temperature",
                self.student_temperature,
                "None or a finite number > 0",
                lambda v: 0 < v < math.inf,
            )
        check_number("kd_weight", self.kd_weight, "a finite number ≥ 0", lambda v: 0 <= v < math.inf)
        check_number("ce_weight", self.ce_weight, "a finite number ≥ 0", lambda v: 0 <= v < math.inf)
        check_smoothing(self.label_smoothing, self.smoothing)
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise TypeError(
                f"ignore_index={self.ignore_index!r}: must be an int, got {type(self.ignore_index).__name__}"
            )
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("backend", self.backend, BACKENDS)

    def _check_inputs(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> None:
        _check_logits("student_logits", student)
        if student.ndim == 0 or student.shape[-1] == 0:
            raise ValueError(
                f"student_logits has shape {tuple(student.shape)}: must be (..., K) with K ≥ 1 classes, last"
            )
        positions, classes = student.shape[:-1], student.shape[-1]
        check_target(target, classes, self.ignore_index)
        if target.is_floating_point() and self.ignore_index >= 0:
            raise ValueError(
                f"ignore_index={self.ignore_index}: must be < 0 (off) with probability targets, which have no label"
            )
        wanted = student.shape if target.is_floating_point() else positions
        if target.shape != wanted:
            raise ValueError(
                f"target has shape {tuple(target.shape)}: must be {tuple(wanted)} for student_logits {tuple(student.shape)}"
            )
        _check_constant("target", target, student)
        if self.class_weight is not None:
            if len(self.class_weight) != classes:
                raise ValueError(
                    f"class_weight has {len(self.class_weight)} weights: must have one for each of {classes} classes"
                )
            _check_constant("class_weight", self.class_weight, student)
        if self.kd_weight > 0:
            _check_teacher(student, teacher)


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


def _check_logits(name: str, logits: object) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}={logits!r}: must be a tensor of logits, got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"{name}.dtype={logits.dtype}: must be a real floating dtype")


def _check_constant(name: str, tensor: Tensor, student: Tensor) -> None:
    if tensor.device != student.device:
        raise ValueError(f"{name} is on {tensor.device}: must be on the device of student_logits, {student.device}")
    if tensor.requires_grad:
        raise ValueError(
            f"{name}.requires_grad=True: must be False; compute it under torch.no_grad() or pass {name}.detach()"
        )


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


def _check_teacher(student: Tensor, teacher: Tensor | None) -> None:
    if teacher is None:
        raise ValueError(
            "teacher_logits=None: must be given where kd_weight > 0; use kd_weight=0 to train without a teacher"
        )
    _check_logits("teacher_logits", teacher)
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_logits has shape {tuple(teacher.shape)}: must be that of student_logits, {tuple(student.shape)}"
        )
    _check_constant("teacher_logits", teacher, student)
    # A row of one class, or of none, cannot tell probabilities from logits. The first row is looked at first: it is cheap.
    if teacher.shape[-1] > 1 and teacher.numel() > 0 and values_readable(teacher):
        first = teacher[(0,) * (teacher.ndim - 1)]
        if _looks_like_probabilities(first) and _looks_like_probabilities(teacher):
            warnings.warn(
                "teacher_logits look like probabilities (≥ 0, rows sum to 1): pass the logits, or probabilities.log()",
                stacklevel=4,
            )


def _looks_like_probabilities(rows: Tensor) -> bool:
    total = rows.sum(-1, dtype=reference.wide_dtype(rows))
    return bool(((rows >= 0).all(-1) & ((total - 1).abs() <= row_sum_tolerance(rows.dtype))).all())
