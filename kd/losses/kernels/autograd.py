"""The fused backends under autograd: one call computes the loss of every row and its gradient, and keeps the latter.

A backend is a module with two functions over rows, N of them with K classes each:

- ``rows(inputs, upstream, numbers, with_gradient=...)`` returns loss, ce and kd (N,), and the gradient (N, K) of the
  loss with respect to the student's logits, each row multiplied by its ``upstream`` (N,).
- ``adjust(gradient, held, upstream, inputs, numbers)`` changes such a gradient in place from the upstream gradient it
  holds to another.

The upstream gradient is not known yet when the loss is computed. It is guessed: 1, divided by the count under reduction
"mean". ``loss.backward()`` makes the guess right, and then the backward pass has nothing left to do.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kd.losses.reference import Inputs, Numbers, wide_dtype

MODULES = {
    "reference": "kd.losses.reference",
    "cpu": "kd.losses.kernels.cpu",
    "triton": "kd.losses.kernels.triton",
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def terms(
    backend: str, inputs: Inputs, numbers: Numbers, count: Tensor | int | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``kd.losses.reference.terms`` on a fused backend.

    With a ``count`` the loss is a scalar, the sum over positions divided by it. That makes one graph node instead of
    three, and for few logits the nodes are much of the time.
    """
    shape = inputs.student.shape[:-1]
    if inputs.student.ndim != 2:  # for the same reason
        inputs = as_rows(inputs)
    if torch.compiler.is_compiling():
        loss, ce, kd, _ = fused_rows(*inputs, _guess(inputs.student, None), backend, *numbers, False)
        loss = _reduce(loss, count)
    elif torch.is_grad_enabled() and inputs.student.requires_grad:
        loss, ce, kd = _Eager.apply(*inputs, count, backend, numbers)
    else:
        loss, ce, kd, _ = module_of(backend).rows(inputs, _guess(inputs.student, None), numbers, with_gradient=False)
        loss = _reduce(loss, count)
    if len(shape) != 1:
        loss, ce, kd = loss if loss.ndim == 0 else loss.view(shape), ce.view(shape), kd.view(shape)
    return loss, ce if numbers.ce_weight > 0 else None, None if inputs.teacher is None else kd


def as_rows(inputs: Inputs) -> Inputs:
    """The positions in one dimension of N rows."""
    student, teacher, target, class_weight = inputs
    classes = student.shape[-1]
    return Inputs(
        student.reshape(-1, classes),
        None if teacher is None else teacher.reshape(-1, classes),
        target.reshape(-1, classes) if target.is_floating_point() else target.reshape(-1),
        class_weight,
    )


def _reduce(loss: Tensor, count: Tensor | int | None) -> Tensor:
    return loss if count is None else loss.sum() / count


def _guess(student: Tensor, count: Tensor | int | None) -> Tensor:
    """The upstream gradient of each row (N,) if the root's is 1, by the operations that will compute it."""
    one = torch.ones((), dtype=wide_dtype(student), device=student.device)
    return (one if count is None else one / count).expand(len(student))


@cache
def module_of(backend: str) -> Any:
    """The module that has ``rows``; it is imported, and compiled, on first use."""
    return import_module(MODULES[backend])


class _Eager(torch.autograd.Function):
    """Computes the gradient with the loss, keeps the only copy of it, and returns that copy."""

    @staticmethod
    def forward(ctx, student, teacher, target, class_weight, count, backend, numbers):
        inputs, held = Inputs(student, teacher, target, class_weight), _guess(student, count)
        loss, ce, kd, ctx.gradient = module_of(backend).rows(inputs, held, numbers, with_gradient=True)
        ctx.save_for_backward(*inputs, held)
        ctx.count, ctx.backend, ctx.numbers = count, backend, numbers
        ctx.mark_non_differentiable(ce, kd)
        return _reduce(loss, count), ce, kd

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        upstream = grad_outputs[0].detach()
        *tensors, held = ctx.saved_tensors
        inputs = Inputs(*tensors)
        if ctx.count is not None:
            upstream = (upstream / ctx.count).expand_as(held)
        module = module_of(ctx.backend)
        gradient, ctx.gradient = ctx.gradient, None  # its receiver may change it in place
        if gradient is None:  # a retained graph, once more: the same two steps give the same bits
            gradient = module.rows(inputs, held, ctx.numbers, with_gradient=True)[-1]
        module.adjust(gradient, held, upstream, inputs, ctx.numbers)
        return once(gradient, inputs.student), *[None] * 6


class _Once(torch.autograd.Function):
    """The identity in `gradient`. Its own derivative is an error, because a silent zero would be wrong."""

    @staticmethod
    def forward(ctx, gradient, leaf):
        return gradient.clone()

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the fused loss has no second derivative: use DistillLoss(backend='reference')")


def once(gradient: Tensor, leaf: Tensor) -> Tensor:
    """The gradient; under create_graph it belongs to a graph, so that a second derivative is refused."""
    return _Once.apply(gradient, leaf) if torch.is_grad_enabled() else gradient


@torch.library.custom_op("kd::fused_rows", mutates_args=())
def fused_rows(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    upstream: Tensor,
    backend: str,
    temperature: float,
    student_temperature: float,
    kd_weight: float,
    ce_weight: float,
    uniform_mass: float,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A backend's ``rows`` as one operator that a compiler does not look into."""
    inputs = Inputs(student, teacher, target, class_weight)
    numbers = Numbers(temperature, student_temperature, kd_weight, ce_weight, uniform_mass, ignore_index)
    *values, gradient = module_of(backend).rows(inputs, upstream, numbers, with_gradient=with_gradient)
    return *(value.clone() for value in values), gradient  # an operator's results may not share memory


@fused_rows.register_fake
def _(student, teacher, target, class_weight, upstream, backend, *numbers):
    n, classes = student.shape
    values = (student.new_empty(n, dtype=wide_dtype(student)) for _ in range(3))
    return *values, student.new_empty(n if numbers[-1] else 0, classes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[5:-1]  # all but the upstream gradient and `with_gradient`


@torch.no_grad()
def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # A compiler may run this pass much later: nothing is kept between the two, and the rows are computed again.
    gradient = fused_rows(*ctx.saved_tensors, upstream, *ctx.settings, True)[-1]
    return gradient, *[None] * 12


fused_rows.register_autograd(_backward, setup_context=_setup_context)
