"""The loss of linear heads in chunks of rows: the computation behind LinearDistillLoss.

Shapes: N rows, ``D`` features, ``K`` classes. "Wide" is float32, or float64 for float64 logits.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from kd.losses import reference
from kd.losses.kernels.autograd import is_batched, keep, kept, module_of, once
from kd.losses.reference import Numbers, Terms, wide_dtype
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
    step: int  # rows in a chunk
    part: int  # rows that the backend takes at a time
    block: int  # classes that _add takes at a time


def at_once(inputs: HeadInputs, numbers: Numbers, teacher_smoothing: float) -> Terms:
    """The terms by operations of PyTorch alone, on all logits."""
    student, teacher = F.linear(inputs.features, inputs.weight, inputs.bias), inputs.teacher_logits
    if inputs.teacher_features is not None:
        teacher = F.linear(inputs.teacher_features, cast(Tensor, inputs.teacher_weight), inputs.teacher_bias)
    teacher = None if teacher is None else unsmooth(teacher, teacher_smoothing)
    return reference.terms(reference.Inputs(student, teacher, inputs.target, inputs.class_weight), numbers)


def chunked_loss(inputs: HeadInputs, guess: Tensor | None, plan: Plan) -> Terms:
    """The terms in chunks; the loss carries gradients for features, weight and bias.

    ``guess`` is one number, the expected upstream gradient of every row. With it the forward pass computes the
    gradients too, and the backward pass only multiplies them.
    """
    loss, ce, kd = _ChunkedLoss.apply(guess, plan, *inputs)
    taught = inputs.teacher_logits is not None or inputs.teacher_features is not None
    return loss, ce if plan.numbers.ce_weight > 0 else None, kd if taught else None


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, guess: Tensor | None, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        values, ctx.totals = _sweep(tensors, guess, plan, ctx.needs_input_grad[2:5])
        keep(ctx, tensors)
        ctx.guess, ctx.plan, ctx.dtypes = guess, plan, [None if x is None else x.dtype for x in tensors[:3]]
        loss, ce, kd = values.unbind()
        ctx.mark_non_differentiable(ce, kd)
        return loss, ce, kd

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        upstream = grad_outputs[0]
        if is_batched(upstream):
            return None, None, *_batched(upstream, kept(ctx), ctx), *[None] * 6
        # A returned gradient belongs to the caller, who may write to it: the next backward pass starts afresh.
        totals, ctx.totals = ctx.totals, None
        with torch.no_grad():
            if ctx.guess is None or totals is None:
                _, totals = _sweep(kept(ctx), upstream, ctx.plan, ctx.needs_input_grad[2:5])
            elif len(upstream):
                _multiply(totals, upstream[0] / ctx.guess)  # under "mean" and "sum" it is equal for all rows
        gradients = [
            None if total is None else total.to(dtype) for total, dtype in zip(totals, ctx.dtypes, strict=True)
        ]
        if torch.is_grad_enabled():
            leaves = zip(gradients, kept(ctx), strict=False)
            gradients = [None if gradient is None else once(gradient, leaf) for gradient, leaf in leaves]
        return None, None, *gradients, *[None] * 6


def _batched(upstream: Tensor, tensors: Sequence[Any], ctx: Any) -> list[Tensor | None]:
    """The gradients of the head for a batch of upstream gradients (N,), which vmap hides: by all logits at once."""
    own: list[Any] = [None if x is None else x.detach().requires_grad_() for x in tensors[:3]]
    with torch.enable_grad():
        loss, _, _ = at_once(HeadInputs(*own, *tensors[3:]), ctx.plan.numbers, ctx.plan.teacher_smoothing)
    gradients = torch.autograd.grad(loss, [x for x in own if x is not None], upstream)
    return [*gradients, None][:3]  # without a bias there are two


def _add(totals: Sequence[Tensor | None], gradient: Tensor, rows: slice, head: "_Head", block: int) -> None:
    """Add to the totals what the logits' gradient (n, K) of these rows contributes, ``block`` classes at a time."""
    features, weight, bias = totals
    if bias is not None:
        bias += gradient.sum(0, dtype=bias.dtype)
    for start in range(0, gradient.shape[1], block):
        classes = slice(start, start + block)
        if weight is not None:
            _add_product(weight[classes], gradient[:, classes].T, head.features[rows])
        if features is not None:
            _add_product(features[rows], gradient[:, classes], head.weight[classes])


def _multiply(totals: Sequence[Tensor | None], factor: Tensor) -> None:
    # Nearly always 1, and a pass over a gradient of weight takes a while. On a GPU to look would be to wait for it.
    if factor.device.type == "cpu" and factor == 1:
        return
    for total in totals:
        if total is not None:
            total *= factor


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


def _sweep(
    tensors: Sequence[Any], upstream: Tensor | None, plan: Plan, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Go through the rows in chunks: loss, ce and kd (3, N), and the gradients of features, weight and bias.

    ``upstream`` is the upstream gradient, (N,) or one number for all rows; without it no gradients are computed. Those
    that are not needed are None; the others are summed over chunks in the wide dtype.
    """
    inputs = HeadInputs(*tensors)
    n, wide = len(inputs.features), wide_dtype(plan.dtype)
    values = inputs.features.new_empty(3, n, dtype=wide)
    totals = [
        tensor.new_zeros(tensor.shape, dtype=wide) if needed and upstream is not None else None
        for tensor, needed in zip(tensors, needs, strict=False)
    ]
    given = (values.new_ones(()) if upstream is None else upstream).expand(n)
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
            gradient = _chunk(logits, given[chunk], plan, values[:, chunk], with_gradient=upstream is not None)
            _add(totals, gradient, chunk, student, plan.block)
    return values, totals


def _chunk(inputs: reference.Inputs, upstream: Tensor, plan: Plan, values: Tensor, *, with_gradient: bool) -> Tensor:
    """Fill the ``values`` (3, n) of a chunk of rows and return the gradient of its logits, which overwrites them."""
    rows = module_of(plan.backend).rows
    student, teacher, target, class_weight = inputs
    for part in _slices(len(student), plan.part):
        taught = None if teacher is None else unsmooth(teacher[part], plan.teacher_smoothing)
        given = reference.Inputs(student[part], taught, target[part], class_weight)
        *computed, gradient = rows(given, upstream[part], plan.numbers, with_gradient=with_gradient)
        values[:, part] = torch.stack(computed)
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
