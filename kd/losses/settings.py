"""What DistillLoss and LinearDistillLoss share: settings and their ranges, the choice of a backend, the loss itself."""

import math
import os
import warnings
from dataclasses import KW_ONLY, dataclass
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from torch import Tensor

from kd.losses import reference
from kd.losses.fields import (
    Allowed,
    Checked,
    Convention,
    Mass,
    OptionalTemperature,
    Temperature,
    Weight,
    one_of,
)
from kd.losses.inputs import check_inputs
from kd.losses.kernels import autograd as fused
from kd.losses.ranges import LARGEST_WEIGHT, or_nothing
from kd.smoothing import check_floating, uniform_mass, values_readable

LABEL = Allowed("an int that fits into int64, as labels do", lambda value: -(2**63) <= value < 2**63)
# The fused backend of a device type, and the package it needs.
_FUSED = {"cpu": ("cpu", "numba"), "cuda": ("triton", "triton")}
_INSTALLED = {package: find_spec(package) is not None for _, package in _FUSED.values()}


@dataclass(eq=False, repr=False)
class DistillSettings(Checked):
    """The settings of a distillation loss. DistillLoss says what each means."""

    temperature: Temperature = 4.0
    _: KW_ONLY
    kd_weight: Weight = 0.9
    ce_weight: Weight = 0.1
    label_smoothing: Mass = 0.0
    smoothing: Convention = "uniform"
    student_temperature: OptionalTemperature = None
    class_weight: Tensor | None = None
    ignore_index: Annotated[int, LABEL] = -100
    reduction: Annotated[str, one_of("mean", "sum", "none")] = "mean"
    backend: Annotated[str, one_of("auto", *fused.MODULES)] = "auto"
    teacher_smoothing: Mass = 0.0

    def __post_init__(self):
        class_weight = self.__dict__.pop("class_weight")
        super().__init__()  # after the dataclass has set the settings, which are plain attributes
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.backend_used: str | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute. Raises ValueError or TypeError where it is a setting and the value is not allowed."""
        if name == "class_weight" and value is not None:
            _check_class_weight(value)
        super().__setattr__(name, value)

    def _numbers(self, num_classes: int) -> reference.Numbers:
        """The settings as a backend takes them."""
        return reference.Numbers(
            temperature=self.temperature,
            student_temperature=self.temperature if self.student_temperature is None else self.student_temperature,
            kd_weight=or_nothing(self.kd_weight),
            ce_weight=or_nothing(self.ce_weight),
            uniform_mass=or_nothing(uniform_mass(self.label_smoothing, num_classes, self.smoothing)),
            ignore_index=self.ignore_index,
        )

    def _choose(self, student: Tensor, *others: Tensor | None) -> str:
        """The backend for these tensors; the reference, whatever was asked for, where a kernel cannot serve."""
        if not fused.serves(student, *others):
            return "reference"
        device = student.device.type
        fitting, package = _FUSED.get(device, ("reference", ""))
        missing = bool(package) and not _INSTALLED[package]
        if self.backend == "auto":
            if fitting == "reference" or student.dtype not in fused.DTYPES:
                return "reference"
            if missing and not torch.compiler.is_compiling():
                warnings.warn(f"backend='auto' takes 'reference': pip install {package} for {fitting!r}", stacklevel=6)
            return "reference" if missing else fitting
        # Tests run Triton's kernels on the CPU, by its interpreter.
        interpreted = self.backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if self.backend not in ("reference", fitting) and not interpreted:
            needed = next(name for name, (backend, _) in _FUSED.items() if backend == self.backend)
            raise ValueError(f"backend={self.backend!r}: needs logits on {needed}, student_logits is on {device}")
        if self.backend == fitting and missing:
            raise ModuleNotFoundError(f"backend={self.backend!r}: needs {package}; pip install {package}")
        return self.backend

    def _check_inputs(self, student: Tensor, teacher: Tensor | None, target: Tensor, backend: str) -> bool:
        """Raise for tensors that do not fit; True where it is known that no position is ignored."""
        if or_nothing(self.kd_weight) > 0 and teacher is None:
            raise ValueError(f"teacher_logits=None: must be given with kd_weight={self.kd_weight} (0 needs no teacher)")
        read_values = backend != "triton"  # the host would wait for the GPU
        return check_inputs(student, teacher, target, self.class_weight, self.ignore_index, read_values=read_values)

    def _count(self, target: Tensor, all_count: bool) -> Tensor | int | None:
        """The divisor of the sum over positions: None under "none", 1 under "sum", and at least 1 under "mean"."""
        if self.reduction != "mean":
            return None if self.reduction == "none" else 1
        if target.is_floating_point() or all_count:
            positions = target.shape[:-1] if target.is_floating_point() else target.shape
            return max(math.prod(positions), 1)  # numel() would be a constant in an exported program
        return (target != self.ignore_index).sum().clamp(min=1)

    def _weights(self, target: Tensor, count: Tensor | int | None) -> Tensor | None:
        """The class weights; under "mean" times N / (sum of the labels' weights), which makes CE the weighted mean."""
        weight = self.class_weight
        if weight is None or count is None or self.reduction != "mean" or target.is_floating_point():
            return weight
        weight = weight.double()
        total = (weight[target.clamp(0, len(weight) - 1)] * (target != self.ignore_index)).sum()
        return weight * torch.where(total > 0, count / total, 0)


del DistillSettings.class_weight  # the default as a class attribute would hide the buffer


def _check_class_weight(weight: Any) -> None:
    check_floating("class_weight", weight)  # its shape is checked beside the logits
    if values_readable(weight):
        bad = ~((weight >= 0) & (weight <= LARGEST_WEIGHT))
        if bad.any():
            raise ValueError(f"class_weight has {weight[bad][0].item():g}: must be from 0 to {LARGEST_WEIGHT}")
