"""Linear heads and the loss of their logits in chunks of rows: what LinearDistillLoss runs.

Shapes: N rows, ``D`` features, ``K`` classes. "Wide" is float32, or float64 for float64 logits.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from kd.losses.kernels.autograd import MODULES
from kd.losses.reference import Settings, wide_dtype
from kd.smoothing import unsmooth


class Inputs(NamedTuple):
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
class Plan:
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

    def __init__(self, inputs: Inputs, plan: Plan):
        self.features, self.weight, self.bias = (
            tensor.new_zeros(tensor.shape, dtype=wide_dtype(plan.dtype)) if tensor is not None and needed else None
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


def chunked_loss(inputs: Inputs, guess: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, ce and kd (N,); the loss carries gradients for features, weight and bias.

    With a ``guess`` of the gradient that every value of the loss will get, one number, they are computed here already.
    """
    return _ChunkedLoss.apply(*inputs, guess, plan, _Held())


class _ChunkedLoss(torch.autograd.Function):
    """(loss, ce, kd), each (N,); with a guess of what comes from above, the gradients too, left in ``held``."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, guess, plan, held = arguments
        inputs = Inputs(*tensors)
        values = [inputs.features.new_empty(len(inputs.features), dtype=wide_dtype(plan.dtype)) for _ in range(3)]
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
        inputs = Inputs(*tensors)
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


def _sweep(inputs: Inputs, upstream: Tensor | None, plan: Plan, values: list[Tensor] | None) -> _Totals | None:
    """Go through the rows in chunks: fill ``values`` (loss, ce, kd) and return the gradients' totals.

    ``upstream`` is what comes from above, (N,) or one number for all rows; without it there are no gradients.
    """
    n = len(inputs.features)
    totals = None if upstream is None else _Totals(inputs, plan)
    upstream = (inputs.features.new_ones((), dtype=wide_dtype(plan.dtype)) if upstream is None else upstream).expand(n)
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
    plan: Plan,
    values: list[Tensor] | None,
    with_gradient: bool,
) -> Tensor:
    """Fill in the ``values`` of a chunk of rows and give the gradient of its logits, which takes their place."""
    rows = import_module("kd.losses.reference" if plan.backend == "reference" else MODULES[plan.backend]).rows
    for part in _slices(0, len(student), plan.part):
        *some, gradient = rows(
            student[part],
            None if teacher is None else unsmooth(teacher[part], plan.teacher_smoothing),
            target[part],
            class_weight,
            upstream[part],
            plan.settings,
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


def linear_dtype(features: Tensor) -> torch.dtype:
    """What F.linear computes in: under autocast its dtype, but float64 stays."""
    device = features.device.type
    if features.dtype != torch.float64 and is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return features.dtype


def _without_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()
