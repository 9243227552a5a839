"""The loss of linear heads in chunks of rows: the computation behind LinearDistillLoss.

Shapes: N rows, ``D`` features, ``K`` classes. "Wide" is float32, or float64 for float64 logits.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from kd.losses import reference
from kd.losses.kernels.autograd import module_of
from kd.losses.reference import Numbers, wide_dtype
from kd.smoothing import unsmooth


class HeadInputs(NamedTuple):
    """The tensors of one call, with the rows in one dimension."""

    features: Tensor  # (N, D)
    weight: Tensor  # (K, D)
    bias: Tensor | None  # (K,)
    teacher_logits: Tensor | None  # (N, K); None where they are computed from the next three, or where KD has weight 0
    teacher_features: Tensor | None  # (N, Dt)
    teacher_weight: Tensor | None  # (K, Dt)
    teacher_bias: Tensor | None  # (K,)
    target: Tensor  # (N,) labels or (N, K) probabilities
    class_weight: Tensor | None  # (K,)


@dataclass(frozen=True)
class Plan:
    """Settings, dtypes and chunk sizes of one call."""

    backend: str
    numbers: Numbers
    teacher_smoothing: float  # removed from the teacher's logits, a part at a time
    dtype: torch.dtype  # of the student's logits
    teacher_dtype: torch.dtype  # of the teacher's logits, where they are computed here
    needs: tuple[bool, ...]  # whether features, weight and bias need a gradient
    step: int  # rows in a chunk
    part: int  # rows that the backend takes at a time
    block: int  # classes that _Totals.add takes at a time


class _Totals:
    """Sums over chunks of the gradients of features, weight and bias, in the wide dtype; None where not needed."""

    def __init__(self, inputs: HeadInputs, plan: Plan):
        self.all = [
            tensor.new_zeros(tensor.shape, dtype=wide_dtype(plan.dtype)) if tensor is not None and needed else None
            for tensor, needed in zip(inputs[:3], plan.needs, strict=True)
        ]

    def add(self, gradient: Tensor, part: slice, head: "_Head", block: int) -> None:
        """Add the contribution of the logits' gradient (n, K) of the rows ``part``, ``block`` classes at a time."""
        features, weight, bias = self.all
        if bias is not None:
            bias += gradient.sum(0, dtype=bias.dtype)
        for start in range(0, gradient.shape[1], block):
            classes = slice(start, start + block)
            if weight is not None:
                _add_product(weight[classes], gradient[:, classes].T, head.features[part])
            if features is not None:
                _add_product(features[part], gradient[:, classes], head.weight[classes])

    def multiply(self, factor: Tensor) -> None:
        # Nearly always 1, and a pass over a gradient of weight takes a while. On a GPU to look would be to wait for it.
        if factor.device.type == "cpu" and factor == 1:
            return
        for total in self.all:
            if total is not None:
                total *= factor


def chunked_loss(inputs: HeadInputs, guess: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, ce and kd (N,); the loss carries gradients for features, weight and bias.

    ``guess`` is one number, the expected upstream gradient of every row. With it the forward pass computes the
    gradients too.
    """
    return _ChunkedLoss.apply(*inputs, guess, plan, [])


class _ChunkedLoss(torch.autograd.Function):
    """(loss, ce, kd), each (N,); with a guess of the upstream gradient, the gradients too, in the list ``held``."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, guess, plan, held = arguments
        inputs = HeadInputs(*tensors)
        values = [inputs.features.new_empty(len(inputs.features), dtype=wide_dtype(plan.dtype)) for _ in range(3)]
        held.append(_sweep(inputs, guess, plan, values))
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
        inputs = HeadInputs(*tensors)
        # A returned gradient belongs to the caller, who may write to it: the next backward pass starts afresh.
        totals = held.pop() if held else None
        if totals is None:
            totals = _sweep(inputs, upstream, plan, None)
            assert totals is not None
        elif len(upstream):
            totals.multiply(upstream[0] / guess)  # under "mean" and "sum" the upstream gradient is equal for all rows
        return tuple(
            None if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip(totals.all, inputs[:3], strict=True)
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
    buffer: Tensor  # a chunk's logits; allocating it for each chunk costs 4 % of the time in page faults

    @classmethod
    def cast(cls, dtype: torch.dtype, step: int, features: Any, weight: Any, bias: Any) -> "_Head":
        buffer = features.new_empty(min(step, len(features)), len(weight), dtype=dtype)
        return cls(features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), buffer)

    def logits(self, chunk: slice) -> Tensor:
        """F.linear of these rows, valid until the next call."""
        features = self.features[chunk]
        out = self.buffer[: len(features)]
        if self.bias is None:
            return torch.mm(features, self.weight.T, out=out)
        return torch.addmm(self.bias, features, self.weight.T, out=out)


def _sweep(inputs: HeadInputs, upstream: Tensor | None, plan: Plan, values: list[Tensor] | None) -> _Totals | None:
    """Go through the rows in chunks: fill ``values`` (loss, ce, kd) and return the totals of the gradients.

    ``upstream`` is the upstream gradient, (N,) or one number for all rows; without it no gradients are computed.
    """
    n = len(inputs.features)
    totals = None if upstream is None else _Totals(inputs, plan)
    upstream = (inputs.features.new_ones((), dtype=wide_dtype(plan.dtype)) if upstream is None else upstream).expand(n)
    device = inputs.features.device.type
    with torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext():
        student = _Head.cast(plan.dtype, plan.step, *inputs[:3])
        teacher = None
        if inputs.teacher_features is not None:
            teacher = _Head.cast(plan.teacher_dtype, plan.step, *inputs[4:7])
        for chunk in _slices(n, plan.step):
            taught = inputs.teacher_logits
            if teacher is not None:
                taught = teacher.logits(chunk)
            elif taught is not None:
                taught = taught[chunk]
            logits = reference.Inputs(student.logits(chunk), taught, inputs.target[chunk], inputs.class_weight)
            into = None if values is None else [value[chunk] for value in values]
            gradient = _chunk(logits, upstream[chunk], plan, into, with_gradient=totals is not None)
            if totals is not None:
                totals.add(gradient, chunk, student, plan.block)
    return totals


def _chunk(
    inputs: reference.Inputs, upstream: Tensor, plan: Plan, values: list[Tensor] | None, *, with_gradient: bool
) -> Tensor:
    """Fill the ``values`` of a chunk of rows and return the gradient of its logits, which overwrites them."""
    rows = module_of(plan.backend).rows
    student, teacher, target, class_weight = inputs
    for part in _slices(len(student), plan.part):
        taught = None if teacher is None else unsmooth(teacher[part], plan.teacher_smoothing)
        given = reference.Inputs(student[part], taught, target[part], class_weight)
        *computed, gradient = rows(given, upstream[part], plan.numbers, with_gradient=with_gradient)
        for whole, value in zip(values or (), computed, strict=False):
            whole[part] = value
        if len(gradient) == len(student):
            return gradient
        if with_gradient:
            student[part] = gradient  # these logits are not needed any more
    return student


def _slices(stop: int, step: int) -> Iterator[slice]:
    for first in range(0, stop, step):
        yield slice(first, min(first + step, stop))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, multiplied and summed in the dtype of total."""
    if left.is_cuda and left.dtype != total.dtype:
        # Tensor cores multiply halves and sum in float32. Only on CUDA and ROCm; addmm cannot do it in place.
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def linear_dtype(features: Tensor) -> torch.dtype:
    """The dtype that F.linear computes in: autocast's where it is on, except for float64."""
    device = features.device.type
    if features.dtype != torch.float64 and is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return features.dtype
