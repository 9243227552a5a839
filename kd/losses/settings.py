"""What DistillLoss and LinearDistillLoss share: settings and their ranges, the choice of a backend, the loss itself."""

import math
import os
import warnings
from dataclasses import KW_ONLY
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar

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
# The device type and the package that each fused backend needs.
_FUSED = {"cpu": ("cpu", "numba"), "triton": ("cuda", "triton")}
_FITTING = {device: backend for backend, (device, _) in _FUSED.items()}
_INSTALLED = {package: find_spec(package) is not None for _, package in _FUSED.values()}


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

    _call: ClassVar[str] = "student_logits, teacher_logits, target"  # what to type between the parentheses of a call

    def __new__(cls, *args: Any, **kwargs: Any):
        """Refuse tensors: ``DistillLoss(s, t, y)`` would else fail with a message about the number of arguments."""
        if any(isinstance(value, Tensor) and value.ndim > 0 for value in args):
            name = cls.__name__
            raise TypeError(
                f"{name}: settings go to the constructor and tensors to the call: type {name}(...)({cls._call})"
            )
        return super().__new__(cls)

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

    def _target(self, target: Tensor | None, student: Tensor) -> Tensor:
        """The target; labels by which every position counts where there is none and the loss needs none."""
        if target is not None:
            return target
        if or_nothing(self.ce_weight) > 0:
            needed = f"must be given with ce_weight={self.ce_weight} (0 needs no target)"
            raise ValueError(f"target=None: {needed}; type loss({self._call})")
        counts = int(self.ignore_index == 0 and student.shape[-1] > 1)  # with one class KD is 0 for any label
        return student.new_full(student.shape[:-1], counts, dtype=torch.int64)

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
        here, chosen = student.device.type, self.backend
        fitting = _FITTING.get(here, "reference")
        if chosen == "auto":
            chosen = fitting if student.dtype in fused.DTYPES else "reference"
        if chosen == "reference":
            return chosen
        device, package = _FUSED[chosen]
        # Tests run Triton's kernels on the CPU, by its interpreter.
        interpreted = chosen == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if chosen != fitting and not interpreted:
            raise ValueError(f"backend={chosen!r}: needs logits on {device}, student_logits is on {here}")
        if _INSTALLED[package]:
            return chosen
        if self.backend != "auto":
            raise ModuleNotFoundError(f"backend={chosen!r}: needs {package}; pip install {package}")
        if not torch.compiler.is_compiling():
            warnings.warn(f"backend='auto' takes 'reference': pip install {package} for {chosen!r}", stacklevel=7)
        return "reference"

    def _begin(
        self, student: Tensor, teacher: Tensor | None, target: Tensor, *others: Tensor | None
    ) -> tuple[str, Tensor | int | None]:
        """Backend of a call and divisor of its sums: None under "none", 1 under "sum", and at least 1 under "mean".

        Raises for tensors that do not fit. `others` are what the logits are computed from.
        """
        if or_nothing(self.kd_weight) > 0 and teacher is None:
            raise ValueError(f"teacher_logits=None: must be given with kd_weight={self.kd_weight} (0 needs no teacher)")
        backend = self._choose(student, teacher, target, *others)
        read_values = backend != "triton"  # the host would wait for the GPU
        weight, ignored = self.class_weight, self.ignore_index
        all_count = check_inputs(student, teacher, target, weight, ignored, read_values=read_values)
        if not torch.compiler.is_compiling() and self.backend_used != backend:  # nn.Module assigns slowly
            self.backend_used = backend
        if self.reduction != "mean":
            return backend, None if self.reduction == "none" else 1
        if target.is_floating_point() or all_count:
            return backend, max(math.prod(student.shape[:-1]), 1)  # numel() would be a constant in an exported program
        return backend, (target != ignored).sum().clamp(min=1)

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
