"""The fused backends under autograd: one call computes the loss of every row and its gradient, and keeps the latter.

A backend is a module with two functions over rows, N of them with K classes each:

- ``rows(inputs, upstream, numbers, with_gradient=...)`` returns loss, ce and kd (N,), and the gradient (N, K) of the
  loss with respect to the student's logits, each row multiplied by its ``upstream`` (N,).
- ``adjust(gradient, held, upstream, inputs, numbers)`` changes such a gradient in place from the upstream gradient it
  holds to another. ``inputs()`` gives the inputs, for a backend that has to compute rows again.

The upstream gradient is not known yet when the loss is computed. It is guessed: 1, divided by the count under reduction
"mean". ``loss.backward()`` makes the guess right, and then the backward pass has nothing left to do.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from kd.losses.reference import Inputs, Numbers, Terms, reduced, wide_dtype
from kd.smoothing import is_plain, is_transformed

MODULES = {
    "reference": "kd.losses.reference",
    "cpu": "kd.losses.kernels.cpu",
    "triton": "kd.losses.kernels.triton",
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def terms(backend: str, inputs: Inputs, numbers: Numbers, count: Tensor | int | None) -> Terms:
    """``kd.losses.reference.terms`` on a fused backend.

    With a ``count`` the loss is a scalar, the sum over positions divided by it. That makes one graph node instead of
    three, and for few logits the nodes are much of the time.
    """
    shape = inputs.student.shape[:-1]
    if inputs.student.ndim != 2:  # for the same reason
        inputs = Inputs._make([*as_rows(len(shape), *inputs[:3]), inputs.class_weight])
    if torch.compiler.is_compiling():
        # As a tensor, because a compiler makes a constant of a plain number, and compiles again for each one it meets.
        settings = torch.tensor(numbers[:-1], dtype=torch.float64, device="cpu")
        guess = _guess(inputs.student, None)
        loss, ce, kd, _ = fused_rows(*inputs, guess, settings, backend, numbers.ignore_index, False)
        loss = reduced(loss, count)
    elif torch.is_grad_enabled() and inputs.student.requires_grad:
        loss, ce, kd = _Eager.apply(*inputs, count, backend, numbers)
    else:
        loss, ce, kd, _ = module_of(backend).rows(inputs, _guess(inputs.student, None), numbers, with_gradient=False)
        loss = reduced(loss, count)
    if len(shape) != 1:
        loss, ce, kd = loss if loss.ndim == 0 else loss.view(shape), ce.view(shape), kd.view(shape)
    return loss, ce if numbers.ce_weight > 0 else None, None if inputs.teacher is None else kd


def as_rows(positions: int, *tensors: Tensor | None) -> list[Any]:
    """These tensors with their first dimensions, as many as the positions have, as one dimension of N rows."""
    return [None if x is None else x.reshape(-1, *x.shape[positions:]) for x in tensors]


def _guess(student: Tensor, count: Tensor | int | None) -> Tensor:
    """The upstream gradient of each row (N,) if the root's is 1, to the bit as the backward pass will compute it."""
    if isinstance(count, Tensor):
        return (torch.ones((), dtype=wide_dtype(student), device=student.device) / count).expand(len(student))
    # A quotient of float64 rounded to float32 is the quotient of float32.
    return student.new_full((), 1.0 if count is None else 1 / count, dtype=wide_dtype(student)).expand(len(student))


def serves(*tensors: Tensor | None) -> bool:
    """Whether a backend may take the addresses of these tensors: of plain ones alone, while nothing looks on.

    PyTorch's own operations have rules for all else, so the reference serves it: subclasses and fake tensors,
    torch.func, forward-mode derivatives, and what records operations (torch.export, make_fx, torch.jit.trace).
    """
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    if is_transformed() or torch.autograd.forward_ad._current_level >= 0:
        return False
    return all(tensor is None or is_plain(tensor) for tensor in tensors)


@cache
def module_of(backend: str) -> Any:
    """The module that has ``rows``; it is imported, and compiled, on first use."""
    return import_module(MODULES[backend])


def keep(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Keep tensors for the backward pass; autograd itself refuses those that were made in inference mode."""
    ctx.apart = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    if ctx.apart:
        tensors = [None if i in ctx.apart else tensor for i, tensor in enumerate(tensors)]
    ctx.save_for_backward(*tensors)


def kept(ctx: Any) -> list[Any]:
    """The tensors of `keep`. Autograd refuses them once one was changed in place: ask only where they are needed."""
    return [ctx.apart.get(i, tensor) for i, tensor in enumerate(ctx.saved_tensors)]


def is_batched(upstream: Tensor) -> bool:
    """Whether autograd gives many upstream gradients at once (is_grads_batched), which no kernel can take."""
    return torch._C._functorch.is_legacy_batchedtensor(upstream)


class _Eager(torch.autograd.Function):
    """Computes the gradient with the loss, keeps the only copy of it, and returns that copy."""

    @staticmethod
    def forward(ctx, student, teacher, target, class_weight, count, backend, numbers):
        inputs, ctx.held = Inputs(student, teacher, target, class_weight), _guess(student, count)
        loss, ce, kd, ctx.gradient = module_of(backend).rows(inputs, ctx.held, numbers, with_gradient=True)
        keep(ctx, inputs)
        ctx.count, ctx.backend, ctx.numbers = count, backend, numbers
        ctx.mark_non_differentiable(ce, kd)
        return reduced(loss, count), ce, kd

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        def inputs() -> Inputs:
            return Inputs(*kept(ctx))

        upstream, module = grad_outputs[0], module_of(ctx.backend)
        if is_batched(upstream):
            return _batched(upstream if ctx.count is None else upstream / ctx.count, inputs(), ctx), *[None] * 6
        upstream = upstream.detach()
        if ctx.count is not None:
            upstream = (upstream / ctx.count).expand_as(ctx.held)
        gradient, ctx.gradient = ctx.gradient, None  # its receiver may change it in place
        if gradient is None:  # a retained graph, once more: the same two steps give the same bits
            gradient = module.rows(inputs(), ctx.held, ctx.numbers, with_gradient=True)[-1]
        module.adjust(gradient, ctx.held, upstream, inputs, ctx.numbers)
        if torch.is_grad_enabled():
            gradient = once(gradient, inputs().student)
        return gradient, *[None] * 6


def _batched(upstream: Tensor, inputs: Inputs, ctx: Any) -> Tensor:
    """The gradient (N, K) for a batch of upstream gradients, () or (N,), that vmap hides: rows times upstream."""
    student = inputs.student
    wide = inputs._replace(student=student.detach().to(wide_dtype(student)))
    rows = module_of(ctx.backend).rows(wide, _guess(student, None), ctx.numbers, with_gradient=True)[-1]
    return (rows * upstream.unsqueeze(-1)).to(student.dtype)


class _Once(torch.autograd.Function):
    """The identity in `gradient`, which becomes part of the graph of `leaf`, as create_graph asks for.

    Its own derivative is an error, because a silent zero would be wrong.
    """

    @staticmethod
    def forward(ctx, gradient, leaf):
        return gradient.clone()

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the fused loss has no second derivative: use DistillLoss(backend='reference')")


once: Any = _Once.apply


@torch.library.custom_op("kd::fused_rows", mutates_args=())
def fused_rows(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    upstream: Tensor,
    settings: Tensor,
    backend: str,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A backend's ``rows`` as one operator that a compiler does not look into; ``settings`` are the Numbers but one."""
    inputs = Inputs(student, teacher, target, class_weight)
    numbers = Numbers(*cast(list[float], settings.tolist()), ignore_index=ignore_index)
    *values, gradient = module_of(backend).rows(inputs, upstream, numbers, with_gradient=with_gradient)
    return *(value.clone() for value in values), gradient  # an operator's results may not share memory


@fused_rows.register_fake
def _(student, teacher, target, class_weight, upstream, settings, backend, ignore_index, with_gradient):
    n, classes = student.shape
    values = (student.new_empty(n, dtype=wide_dtype(student)) for _ in range(3))
    return *values, student.new_empty(n if with_gradient else 0, classes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], inputs[5])  # all but the upstream gradient
    ctx.others = inputs[6:-1]


@torch.no_grad()
def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # A compiler may run this pass much later: nothing is kept between the two, and the rows are computed again.
    *tensors, settings = ctx.saved_tensors
    gradient = fused_rows(*tensors, upstream, settings, *ctx.others, True)[-1]
    return gradient, *[None] * 8


fused_rows.register_autograd(_backward, setup_context=_setup_context)
