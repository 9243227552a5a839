"""LinearDistillLoss: DistillLoss of the logits of a linear head, in chunks of rows, so that no N x K logits are held.

Shapes: ``(...)`` positions, N of them; ``D`` features; ``K`` classes. "Wide" is float32, or float64 for float64 logits.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from kd.losses.distill import DistillTerms
from kd.losses.fused import Settings
from kd.losses.settings import DistillSettings
from kd.smoothing import check_number, unsmooth

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
        logits = features.detach().new_zeros((), dtype=_linear_dtype(features)).expand(*lead, classes)
        backend = self._choose(logits)
        computed = self.kd_weight > 0 and _check_teacher(
            logits, teacher_logits, teacher_features, teacher_weight, teacher_bias
        )
        self._check_inputs(logits, logits if computed else teacher_logits, target, read_values=backend != "triton")
        self.backend_used = backend
        count = self._count(target)
        loss, ce, kd = self._rows(
            _Inputs(
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

    def _rows(self, inputs: "_Inputs", backend: str, count: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, ce and kd (N,)."""
        plan = self._plan(inputs, backend)
        guess = None
        if any(plan.needs) and self.reduction != "none":
            guess = self._guess(inputs, plan.dtype, count)
        return _ChunkedLoss.apply(*inputs, guess, plan, _Held())

    def _plan(self, inputs: "_Inputs", backend: str) -> "_Plan":
        n, width = inputs.features.shape
        classes = inputs.weight.shape[0]
        dtype = _linear_dtype(inputs.features)
        wide = teacher_dtype = _wide(dtype)
        parts = 1 if inputs.features.is_cuda else PARTS
        made = REFERENCE_COPIES * wide.itemsize if backend == "reference" else dtype.itemsize
        per_class = dtype.itemsize + made / parts
        if inputs.teacher_features is not None:
            teacher_dtype = _linear_dtype(inputs.teacher_features)
            per_class += teacher_dtype.itemsize
        budget = self.memory_budget or max(LEAST_BUDGET, inputs.weight.numel())
        widening = 0 if dtype == wide else budget // 4
        rows = max(1, int((budget - widening) / (per_class * classes)))
        chunks = max(1, math.ceil(n / rows))
        step = max(1, math.ceil(n / chunks))  # of equal size: the last is no slower for being thin
        wants = torch.is_grad_enabled()
        return _Plan(
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

    def _guess(self, inputs: "_Inputs", dtype: torch.dtype, count: Tensor | int) -> Tensor:
        """What will come from above for each row of the loss, as a scalar: exact where the loss itself is the root.

        For float16 it is the power of two that puts the largest gradient near 2^13 instead: in units of 1/N they would
        underflow, and the loss scale that prevents it is not known yet.
        """
        wide = _wide(dtype)
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


class _Inputs(NamedTuple):
    """The tensors, rows flattened."""

    features: Tensor  # (N, D)
    weight: Tensor  # (K, D)
    bias: Tensor | None  # (K,)
    teacher_logits: Tensor | None  # (N, K), or else the next two
    teacher_features: Tensor | None  # (N, Dt)
    teacher_weight: Tensor | None  # (K, Dt)
    teacher_bias: Tensor | None  # (K,)
    target: Tensor  # (N,) or (N, K)
    class_weight: Tensor | None  # (K,)


@dataclass(frozen=True)
class _Plan:
    """What is no tensor."""

    backend: str
    settings: Settings
    teacher_smoothing: float  # taken out of the teacher's logits, a part at a time
    dtype: torch.dtype  # of the student's logits
    teacher_dtype: torch.dtype  # of the teacher's, where they are computed here
    needs: tuple[bool, ...]  # gradients of features, weight, bias?
    step: int  # rows in a chunk
    part: int  # rows that the backend takes at a time
    block: int  # classes that _Totals.add takes at a time


class _Totals:
    """Sums over chunks of the gradients of features, weight and bias, in the wide dtype; None where not needed."""

    def __init__(self, inputs: _Inputs, plan: _Plan):
        self.features, self.weight, self.bias = (
            tensor.new_zeros(tensor.shape, dtype=_wide(plan.dtype)) if tensor is not None and needed else None
            for tensor, needed in zip(inputs[:3], plan.needs, strict=True)
        )

    def add(self, gradient: Tensor, part: slice, head: "_Head", block: int) -> None:
        """Add what the logits' gradient (n, K) of the rows ``part`` gives, ``block`` classes at a time."""
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        for start in range(0, gradient.shape[1], block):
            classes = slice(start, start + block)
            if self.weight is not None:
                _add_product(self.weight[classes], gradient[:, classes].T, head.features[part])
            if self.features is not None:
                _add_product(self.features[part], gradient[:, classes], head.weight[classes])


class _Held:
    """The totals of the forward pass, until the backward pass hands them out."""

    totals: _Totals | None = None


class _ChunkedLoss(torch.autograd.Function):
    """(loss, ce, kd), each (N,); with a guess of what comes from above, the gradients too, left in ``held``."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, guess, plan, held = arguments
        inputs = _Inputs(*tensors)
        values = [inputs.features.new_empty(len(inputs.features), dtype=_wide(plan.dtype)) for _ in range(3)]
        held.totals = _sweep(inputs, guess, plan, values)
        return tuple(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.plan, ctx.held = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        gradients = _Gradients.apply(*ctx.saved_tensors, grad_outputs[0], ctx.plan, ctx.held)
        return *gradients, *[None] * 9


class _Gradients(torch.autograd.Function):
    """The gradients of features, weight and bias: a function of its own, so that differentiating it can be refused."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        *tensors, guess, upstream, plan, held = arguments
        inputs = _Inputs(*tensors)
        # Handed out, a gradient is the caller's, who may write to it: a retained graph's next backward starts afresh.
        totals, held.totals = held.totals, None
        if totals is None:
            totals = _sweep(inputs, upstream, plan, None)
        elif len(upstream):
            # One number, for under "mean" and "sum" every row gets the same from above.
            _multiply(totals, upstream[0] / guess)
        return tuple(
            None if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip((totals.features, totals.weight, totals.bias), inputs[:3], strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> None:
        raise RuntimeError(
            "LinearDistillLoss has no second derivative: use DistillLoss(backend='reference') on F.linear's logits"
        )


class _Head(NamedTuple):
    """A linear head and its rows of features, all of one dtype."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    buffer: Tensor  # of a chunk's logits: made anew for each, page faults cost 4 % of the time

    @classmethod
    def cast(cls, dtype: torch.dtype, step: int, features: Any, weight: Any, bias: Any) -> "_Head":
        buffer = features.new_empty(min(step, len(features)), len(weight), dtype=dtype)
        return cls(features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), buffer)

    def logits(self, chunk: slice) -> Tensor:
        """F.linear of these rows, until the next call."""
        features = self.features[chunk]
        out = self.buffer[: len(features)]
        if self.bias is None:
            return torch.mm(features, self.weight.T, out=out)
        return torch.addmm(self.bias, features, self.weight.T, out=out)


def _sweep(inputs: _Inputs, upstream: Tensor | None, plan: _Plan, values: list[Tensor] | None) -> _Totals | None:
    """Go through the rows in chunks: fill ``values`` (loss, ce, kd) and return the gradients' totals.

    ``upstream`` is what comes from above, (N,) or one number for all rows; without it there are no gradients.
    """
    n = len(inputs.features)
    totals = None if upstream is None else _Totals(inputs, plan)
    upstream = (inputs.features.new_ones((), dtype=_wide(plan.dtype)) if upstream is None else upstream).expand(n)
    with _without_autocast(inputs.features.device.type):
        student = _Head.cast(plan.dtype, plan.step, inputs.features, inputs.weight, inputs.bias)
        teacher = None
        if inputs.teacher_features is not None:
            teacher = _Head.cast(plan.teacher_dtype, plan.step, *inputs[4:7])
        for chunk in _slices(0, n, plan.step):
            gradient = _chunk(
                chunk,
                student.logits(chunk),
                _part(inputs.teacher_logits, chunk) if teacher is None else teacher.logits(chunk),
                inputs.target[chunk],
                inputs.class_weight,
                upstream[chunk],
                plan,
                values,
                with_gradient=totals is not None,
            )
            if totals is not None:
                totals.add(gradient, chunk, student, plan.block)
    return totals


def _chunk(
    chunk: slice,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    upstream: Tensor,
    plan: _Plan,
    values: list[Tensor] | None,
    with_gradient: bool,
) -> Tensor:
    """Fill in the ``values`` of a chunk of rows and give the gradient of its logits, which takes their place."""
    rows = import_module(f"kd.losses.{plan.backend}").rows
    for part in _slices(0, len(student), plan.part):
        *some, gradient = rows(
            student[part],
            None if teacher is None else unsmooth(teacher[part], plan.teacher_smoothing),
            target[part],
            class_weight,
            upstream[part],
            **plan.settings._asdict(),
            with_gradient=with_gradient,
        )
        if values is not None:
            for whole, value in zip(values, some, strict=True):
                whole[chunk][part] = value
        if len(gradient) == len(student):
            return gradient
        if with_gradient:
            student[part] = gradient  # these logits have done their work
    return student


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, multiplied and summed in the dtype of total."""
    if left.is_cuda and left.dtype != total.dtype:
        # Tensor cores take halves and sum in float32. Only on CUDA and ROCm; addmm cannot do it in place.
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _multiply(totals: _Totals, factor: Tensor) -> None:
    # Nearly always 1, and a pass over a gradient of weight takes a while. On a GPU to look would be to wait for it.
    if factor.device.type == "cpu" and factor == 1:
        return
    for total in (totals.features, totals.weight, totals.bias):
        if total is not None:
            total *= factor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _linear_dtype(features: Tensor) -> torch.dtype:
    """What F.linear computes in: under autocast its dtype, but float64 stays."""
    device = features.device.type
    if features.dtype != torch.float64 and is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return features.dtype


def _without_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()


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
        if _linear_dtype(tensor) != _linear_dtype(features):
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
