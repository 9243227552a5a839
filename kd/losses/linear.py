"""LinearDistillLoss: DistillLoss of the logits of a linear head, in chunks of rows, so that no N x K logits are held.

Shapes: ``(...)`` positions, N of them; ``D`` features; ``K`` classes. "Wide" is float32, or float64 for float64 logits.
"""

import math

import torch
from torch import Tensor

from kd.losses.distill import DistillTerms
from kd.losses.kernels.chunked import Inputs, Plan, chunked_loss, linear_dtype
from kd.losses.reference import wide_dtype
from kd.losses.settings import DistillSettings
from kd.smoothing import check_number

# The least that memory_budget is by default: below it chunks get so thin that reading the head dominates.
LEAST_BUDGET = 24 * 2**20
# The backend goes through a chunk in so many parts and the gradient of each takes the place of its logits: most of a
# third tensor less to hold. Not on a GPU, which wants many rows at a time.
PARTS = 4
# How many tensors of a chunk's logits, in the wide dtype, the reference's autograd holds at once.
REFERENCE_COPIES = 12


class LinearDistillLoss(DistillSettings):
    """DistillLoss of ``F.linear(features, weight, bias)``, never holding more than a chunk of rows of logits.

    ``loss(features, weight, target, bias=..., teacher_features=..., teacher_weight=..., teacher_bias=...)`` or
    ``loss(features, weight, target, bias=..., teacher_logits=...)``: features ``(..., D)``, weight ``(K, D)``, bias
    ``(K,)`` of one floating dtype; the teacher's likewise, with its own D and dtype, or its logits ``(..., K)``; target
    int64 ``(...)`` or probabilities ``(..., K)``. Formula, units, zero, papers, settings, reductions and returned dtype
    are those of DistillLoss on these logits. Gradients go to features, weight and bias, never to teacher or target.

    Under "mean" and "sum" the forward pass computes the gradients too, and the backward pass multiplies them by what
    comes from above; so between the two there are, besides the inputs, gradients of features (N x D), weight (K x D)
    and bias in the wide dtype, rounded once when they are handed out. Under "none", and for the second backward pass
    of a retained graph, the backward pass goes through the chunks again. A second derivative is a
    RuntimeError: for those, DistillLoss with ``backend="reference"`` on the logits.

    Under autocast the logits are computed in its dtype, as by F.linear, and the gradients arrive unrounded.

    Args:
        memory_budget: bytes for what one chunk of rows holds: the student's logits, the teacher's where they are
            computed here, and of their gradient a quarter at a time (all of it on a GPU). None is a quarter of a
            float32 gradient of weight, 24 MiB at least. With more rows in a chunk the head is read less often: on a
            CPU a hundred rows lose little, a GPU wants several hundred.
        temperature, ...: as in DistillLoss.

    Raises as DistillLoss does, naming the argument.
    """

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
        memory_budget: int | None = None,
    ):
        super().__init__(
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
        self.memory_budget = memory_budget
        self._check_budget()

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        teacher_features: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        """The loss: a scalar, or shape ``(...)`` under reduction "none"."""
        return self.terms(
            features,
            weight,
            target,
            bias=bias,
            teacher_logits=teacher_logits,
            teacher_features=teacher_features,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
        ).loss

    @torch.compiler.disable  # a loop with state between the passes: a compiled graph breaks here and goes on after it
    def terms(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        teacher_features: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> DistillTerms:
        """The loss with its unweighted terms, detached, from one pass and under the same reduction."""
        self._check_settings()
        self._check_budget()
        if self.kd_weight == 0:
            teacher_logits = teacher_features = teacher_weight = teacher_bias = None
        lead, classes = _check_student(features, weight, bias)
        # Logits that take no memory stand for those that are never made, so that the checks are DistillLoss's own.
        logits = features.detach().new_zeros((), dtype=linear_dtype(features)).expand(*lead, classes)
        backend = self._choose(logits)
        computed = self.kd_weight > 0 and _check_teacher(
            logits, teacher_logits, teacher_features, teacher_weight, teacher_bias
        )
        known = logits if computed else teacher_logits
        all_count = self._check_inputs(logits, known, target, read_values=backend != "triton")
        self.backend_used = backend
        count = self._count(target, all_count)
        loss, ce, kd = self._rows(
            Inputs(
                features.reshape(-1, features.shape[-1]),
                weight,
                bias,
                None if teacher_logits is None else teacher_logits.reshape(-1, classes),
                None if teacher_features is None else teacher_features.reshape(-1, teacher_features.shape[-1]),
                teacher_weight,
                teacher_bias,
                target.reshape(-1, classes) if target.is_floating_point() else target.reshape(-1),
                self.class_weight,
            ),
            backend,
            count,
        )
        return DistillTerms(
            self._reduce(loss.reshape(lead), count),
            self._reduce(ce.reshape(lead), count) if self.ce_weight > 0 else None,
            self._reduce(kd.reshape(lead), count) if self.kd_weight > 0 else None,
        )

    def _rows(self, inputs: "Inputs", backend: str, count: Tensor | int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, ce and kd (N,)."""
        plan = self._plan(inputs, backend)
        guess = None
        if any(plan.needs) and count is not None:
            guess = self._guess(inputs, plan.dtype, count)
        return chunked_loss(inputs, guess, plan)

    def _plan(self, inputs: "Inputs", backend: str) -> "Plan":
        n, width = inputs.features.shape
        classes = inputs.weight.shape[0]
        dtype = linear_dtype(inputs.features)
        wide = teacher_dtype = wide_dtype(dtype)
        parts = 1 if inputs.features.is_cuda else PARTS
        made = REFERENCE_COPIES * wide.itemsize if backend == "reference" else dtype.itemsize
        per_class = dtype.itemsize + made / parts
        if inputs.teacher_features is not None:
            teacher_dtype = linear_dtype(inputs.teacher_features)
            per_class += teacher_dtype.itemsize
        budget = self.memory_budget or max(LEAST_BUDGET, inputs.weight.numel())
        widening = 0 if dtype == wide else budget // 4
        rows = max(1, int((budget - widening) / (per_class * classes)))
        chunks = max(1, math.ceil(n / rows))
        step = max(1, math.ceil(n / chunks))  # of equal size: the last is no slower for being thin
        wants = torch.is_grad_enabled()
        return Plan(
            backend=backend,
            settings=self._numbers(classes),
            teacher_smoothing=self.teacher_smoothing,
            dtype=dtype,
            teacher_dtype=teacher_dtype,
            needs=tuple(wants and tensor is not None and tensor.requires_grad for tensor in inputs[:3]),
            step=step,
            part=math.ceil(step / parts),
            block=max(1, widening // (wide.itemsize * (width + step))) if widening else classes,
        )

    def _guess(self, inputs: "Inputs", dtype: torch.dtype, count: Tensor | int) -> Tensor:
        """What will come from above for each row of the loss, as a scalar: exact where the loss itself is the root.

        For float16 it is the power of two that puts the largest gradient near 2^13 instead: in units of 1/N they would
        underflow, and the loss scale that prevents it is not known yet.
        """
        wide = wide_dtype(dtype)
        one = torch.ones((), dtype=wide, device=inputs.target.device)
        if dtype != torch.float16:
            return one / count
        heaviest = 1 if self.class_weight is None else self.class_weight.max().to(wide)
        kd_bound = self.kd_weight * (self.temperature if self.student_temperature is None else self.student_temperature)
        bound = one * (self.ce_weight * heaviest + kd_bound)
        return torch.exp2((13 - bound.clamp(min=2**-10).log2()).floor())

    def _check_budget(self) -> None:
        if self.memory_budget is None:
            return
        check_number("memory_budget", self.memory_budget, "None or a whole number of bytes ≥ 1", _whole)


def _whole(value: float) -> bool:
    return value >= 1 and value % 1 == 0


def _check_student(features: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[torch.Size, int]:
    """Raise unless these make logits; their leading shape and number of classes."""
    _check_head(("features", "weight", "bias"), features, weight, bias)
    return features.shape[:-1], weight.shape[0]


def _check_teacher(
    logits: Tensor,
    teacher_logits: Tensor | None,
    features: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> bool:
    """Raise unless the teacher is given in one way; whether that is features and a head, which then fit ``logits``."""
    if features is None:
        for name, given in (("teacher_weight", weight), ("teacher_bias", bias)):
            if given is not None:
                raise ValueError(f"teacher_features=None: must be given with {name}")
        return False
    if teacher_logits is not None:
        raise ValueError("teacher_logits and teacher_features are both given: give one of them")
    if weight is None:
        raise ValueError("teacher_weight=None: must be given with teacher_features")
    names = ("teacher_features", "teacher_weight", "teacher_bias")
    _check_head(names, features, weight, bias)
    _check_shape(names[0], features, logits.shape[:-1] + features.shape[-1:], "the student's features")
    _check_shape(names[1], weight, logits.shape[-1:] + weight.shape[1:], "the student's classes")
    if features.device != logits.device:
        raise ValueError(f"{names[0]} is on {features.device}: must be on {logits.device}, the device of features")
    for name, tensor in zip(names, (features, weight, bias), strict=True):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}.requires_grad=True: must be False; use torch.no_grad() or {name}.detach()")
    return True


def _check_head(names: tuple[str, str, str], features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor, shape in zip(names, (features, weight, bias), ("(..., D)", "(K, D)", "(K,)"), strict=True):
        if tensor is None and name == names[2]:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}={tensor!r}: must be a tensor of shape {shape}, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}.dtype={tensor.dtype}: must be a real floating dtype")
        if tensor.device != features.device:
            raise ValueError(f"{name} is on {tensor.device}: must be on {features.device}, the device of {names[0]}")
        if linear_dtype(tensor) != linear_dtype(features):
            raise TypeError(f"{name}.dtype={tensor.dtype}: must be {features.dtype}, the dtype of {names[0]}")
    if features.ndim == 0:
        raise ValueError(f"{names[0]} has shape (): must be (..., D)")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != features.shape[-1]:
        raise ValueError(
            f"{names[1]} has shape {tuple(weight.shape)}: must be (K, {features.shape[-1]}) with K ≥ 1 for "
            f"{names[0]} {tuple(features.shape)}"
        )
    if bias is not None:
        _check_shape(names[2], bias, weight.shape[:1], names[1])


def _check_shape(name: str, tensor: Tensor, shape: torch.Size, source: str) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {tuple(shape)}, as {source} say")
