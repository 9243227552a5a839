"""What DistillLoss and LinearDistillLoss share: their settings, the choice of a backend, and every check.

Shapes: ``(...)`` positions, ``K`` classes, always last.
"""

import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from kd.losses import reference
from kd.losses.kernels import autograd as fused
from kd.losses.ranges import LARGEST_WEIGHT, TEMPERATURES, WEIGHTS, is_temperature, is_weight, or_nothing
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
BACKENDS = ("auto", "reference", *fused.BACKENDS)
# The fused backend for a device and the package that it needs.
_FOR_DEVICE = {"cpu": ("cpu", "numba"), "cuda": ("triton", "triton")}
_PAST_INT64 = 2**63
_INSTALLED = {package: find_spec(package) is not None for _, package in _FOR_DEVICE.values()}


class DistillSettings(nn.Module):
    """The settings of a distillation loss; DistillLoss says what each means."""

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
        teacher_smoothing: float = 0.0,
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
        self.teacher_smoothing = teacher_smoothing
        self.backend_used: str | None = None
        _check_class_weight(class_weight)
        self.register_buffer("class_weight", class_weight, persistent=False)
        self._check_settings()

    def _numbers(self, num_classes: int) -> reference.Settings:
        """The settings as backends take them."""
        return reference.Settings(
            temperature=self.temperature,
            student_temperature=self.temperature if self.student_temperature is None else self.student_temperature,
            kd_weight=or_nothing(self.kd_weight),
            ce_weight=or_nothing(self.ce_weight),
            uniform_mass=or_nothing(to_uniform(self.label_smoothing, num_classes, self.smoothing)),
            ignore_index=self.ignore_index,
        )

    def _choose(self, student: Tensor) -> str:
        """The backend for these logits."""
        device = student.device.type
        fitting, package = _FOR_DEVICE.get(device, ("reference", ""))
        missing = bool(package) and not _INSTALLED[package]
        if self.backend == "auto":
            if fitting == "reference" or student.dtype not in fused.DTYPES:
                return "reference"
            if missing and not torch.compiler.is_compiling():
                warnings.warn(f"backend='auto' takes 'reference': pip install {package} for {fitting!r}", stacklevel=5)
            return "reference" if missing else fitting
        if self.backend not in ("reference", fitting) and not _interpreted(self.backend):
            needed = next(name for name, (backend, _) in _FOR_DEVICE.items() if backend == self.backend)
            raise ValueError(f"backend={self.backend!r}: needs logits on {needed}, student_logits is on {device}")
        if self.backend == fitting and missing:
            raise ModuleNotFoundError(f"backend={self.backend!r}: needs {package}; pip install {package}")
        return self.backend

    def _count(self, target: Tensor, all_count: bool) -> Tensor | int | None:
        """What the sum over positions is divided by; None where there is no sum. At least 1, without the ignored."""
        if self.reduction != "mean":
            return None if self.reduction == "none" else 1
        if target.is_floating_point() or all_count:
            positions = target.shape[:-1] if target.is_floating_point() else target.shape
            return max(positions.numel(), 1)
        return (target != self.ignore_index).sum().clamp(min=1)

    def _reduce(self, values: Tensor, count: Tensor | int | None) -> Tensor:
        return values if count is None else values.sum() / count

    def extra_repr(self) -> str:
        """The settings, for print(loss)."""
        shown = ("kd_weight", "ce_weight", "label_smoothing", "smoothing", "student_temperature")
        shown = (*shown, "teacher_smoothing", "reduction")
        return ", ".join([f"{self.temperature}", *(f"{name}={getattr(self, name)!r}" for name in shown)])

    def _check_settings(self) -> None:
        check_number("temperature", self.temperature, TEMPERATURES, is_temperature)
        if self.student_temperature is not None:
            check_number("student_temperature", self.student_temperature, f"None or {TEMPERATURES}", is_temperature)
        check_number("kd_weight", self.kd_weight, WEIGHTS, is_weight)
        check_number("ce_weight", self.ce_weight, WEIGHTS, is_weight)
        check_smoothing(self.label_smoothing, self.smoothing)
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            got = type(self.ignore_index).__name__
            raise TypeError(f"ignore_index={self.ignore_index!r}: must be an int, got {got}")
        if not -_PAST_INT64 <= self.ignore_index < _PAST_INT64:
            raise ValueError(f"ignore_index={self.ignore_index}: must fit into int64, as labels do")
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("backend", self.backend, BACKENDS)
        check_number("teacher_smoothing", self.teacher_smoothing, "a number ≥ 0 and < 1", lambda v: 0 <= v < 1)

    def _check_inputs(
        self, student: Tensor, teacher: Tensor | None, target: Tensor, *, read_values: bool = True
    ) -> bool:
        """Raise for what cannot be right; True where every label is known to be one that counts."""
        if student.ndim == 0 or student.shape[-1] == 0:
            raise ValueError(
                f"student_logits has shape {tuple(student.shape)}: must be (..., K) with K ≥ 1, classes last"
            )
        classes = student.shape[-1]
        all_count = check_target(target, classes, self.ignore_index, read_values) and self.ignore_index < 0
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
            check_logits("teacher_logits", teacher)
            _check_fits("teacher_logits", teacher, student, student.shape)
            if read_values:
                _warn_of_probabilities(teacher)
        return all_count


def _interpreted(backend: str) -> bool:
    """Whether Triton runs its kernels on the CPU, as tests do."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def check_logits(name: str, logits: object) -> None:
    """Raise unless it is a dense floating tensor."""
    if not isinstance(logits, Tensor):
        hint = "; pass its .logits" if isinstance(getattr(logits, "logits", None), Tensor) else ""
        raise TypeError(f"{name}: must be a tensor of logits, got {type(logits).__name__}{hint}")
    if not logits.is_floating_point():
        raise TypeError(f"{name}.dtype={logits.dtype}: must be a real floating dtype")
    if logits.layout is not torch.strided:
        raise TypeError(f"{name}.layout={logits.layout}: must be dense; use {name}.to_dense()")


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
        bad = ~((weight >= 0) & (weight <= LARGEST_WEIGHT))
        if bad.any():
            raise ValueError(f"class_weight has {weight[bad][0].item():g}: must be from 0 to {LARGEST_WEIGHT}")


def _warn_of_probabilities(teacher: Tensor) -> None:
    # One class cannot tell probabilities from logits. The first row alone settles nearly every case, at little cost.
    if teacher.shape[-1] == 1 or teacher.numel() == 0 or teacher.itemsize < 2 or not values_readable(teacher):
        return
    first = teacher[(0,) * (teacher.ndim - 1)]
    if first.min().item() < 0:
        return
    if _are_probabilities(first) and _are_probabilities(teacher):
        warnings.warn("teacher_logits look like probabilities: pass logits, or probabilities.log()", stacklevel=5)


def _are_probabilities(rows: Tensor) -> bool:
    off = (rows.sum(-1, dtype=reference.wide_dtype(rows)) - 1).abs()
    return bool((rows >= 0).all() & (off <= row_sum_tolerance(rows.dtype)).all())
