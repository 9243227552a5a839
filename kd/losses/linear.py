"""LinearDistillLoss: DistillLoss on the logits of a linear head, without holding N x K logits.

Shapes: ``(...)`` positions, N of them; ``D`` features; ``K`` classes. "Wide" is float32, or float64 for float64 logits.
"""

import math
from dataclasses import KW_ONLY
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from kd.losses.distill import DistillTerms
from kd.losses.fields import Allowed, is_number
from kd.losses.inputs import head_logits
from kd.losses.kernels.autograd import as_rows, serves
from kd.losses.kernels.chunked import HeadInputs, Plan, at_once, chunked_loss, linear_dtype
from kd.losses.ranges import or_nothing
from kd.losses.reference import Numbers, reduced, wide_dtype
from kd.losses.settings import DistillSettings

# The smallest default of memory_budget: with thinner chunks, most of the time goes into reading the head.
LEAST_BUDGET = 24 * 2**20
# On a CPU the backend takes a chunk in this many parts and the gradient of each replaces its logits, which saves most
# of a third tensor of that size. A GPU needs many rows at a time.
PARTS = 4
# How many tensors of the size of a chunk's logits, in the wide dtype, the reference's autograd holds at once.
REFERENCE_COPIES = 12

BYTES = Allowed(
    "None or a whole number of bytes ≥ 1",
    lambda value: value is None or (is_number(value) and value >= 1 and value % 1 == 0),
)


class LinearDistillLoss(DistillSettings):
    """DistillLoss of ``F.linear(features, weight, bias)``, with logits for one chunk of rows at a time.

    Call it with the teacher's features and head, or with its logits::

        loss(features, weight, target, bias=..., teacher_features=..., teacher_weight=..., teacher_bias=...)
        loss(features, weight, target, bias=..., teacher_logits=...)

    - ``features`` ``(..., D)``, ``weight`` ``(K, D)``, ``bias`` ``(K,)`` or None, all of one floating dtype
    - the teacher's likewise, with a D and a dtype of its own, or ``teacher_logits`` ``(..., K)``
    - ``target``: int64 labels ``(...)`` or probabilities ``(..., K)``; it may be None with ``ce_weight=0``
    - returns a scalar, or ``(...)`` with ``reduction="none"``. Features, weight and bias get gradients.

    Formula, units, settings (but class_dim), dtypes, papers and errors are those of DistillLoss.

    Under "mean" and "sum" the forward pass computes the gradients too, and the backward pass multiplies them by the
    upstream gradient. Between the two it holds gradients of features (N x D), weight (K x D) and bias in the wide
    dtype, which are rounded once, in the backward pass. Under "none", and in the second backward pass of a retained
    graph, the chunks are computed again. A second derivative raises RuntimeError; for one, compute the logits and call
    DistillLoss with ``backend="reference"``.

    Under torch.func all logits are held at once, as in plain PyTorch.

    Under autocast the logits have autocast's dtype, as in F.linear; each gradient has the dtype of its tensor.

    Args:
        memory_budget: bytes of one chunk of rows, which holds the student's logits, the teacher's logits if they are
            computed here, and the gradient of the student's logits (a quarter of it at a time on a CPU). None, the
            default, means one byte for each entry of ``weight``, at least 24 MiB. The head is read once per chunk: give
            a chunk 100 rows or more on a CPU, several hundred on a GPU.
        temperature, ...: all settings of DistillLoss but class_dim.
    """

    _: KW_ONLY
    memory_budget: Annotated[int | None, BYTES] = None

    _call: ClassVar[str] = "features, weight, target, teacher_features=..., teacher_weight=..."

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The loss: a scalar, or shape ``(...)`` under reduction "none". Arguments as in ``terms``."""
        return self.terms(*inputs, **named).loss

    @torch.compiler.disable  # a loop with state between the passes: a compiled graph breaks here and continues after it
    def terms(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        teacher_features: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> DistillTerms:
        """The loss with its unweighted terms, detached, from one pass and under the same reduction."""
        logits = head_logits("", features, weight, bias)
        if or_nothing(self.kd_weight) == 0:
            teacher_logits = teacher_features = teacher_weight = teacher_bias = None
        taught = teacher_logits
        if not (teacher_features is teacher_weight is teacher_bias is None):
            if teacher_features is None or teacher_weight is None or taught is not None:
                raise ValueError("teacher: must be teacher_logits alone, or teacher_features with teacher_weight")
            taught = head_logits("teacher_", teacher_features, teacher_weight, teacher_bias)
        target = self._target(target, logits)
        given = (features, teacher_logits, teacher_features, target)
        backend, count = self._begin(logits, taught, target, *given, weight, bias, teacher_weight, teacher_bias)
        rows, teacher_logits, teacher_rows, target_rows = as_rows(logits.ndim - 1, *given)
        head, teacher_head = (rows, weight, bias), (teacher_rows, teacher_weight, teacher_bias)
        inputs = HeadInputs(*head, teacher_logits, *teacher_head, target_rows, self._weights(target, count))
        numbers = self._numbers(len(weight))
        if serves(*given, *head, *teacher_head):
            plan = self._plan(inputs, numbers, backend)
            learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head)
            guess = self._guess(plan, count, inputs) if learns and count is not None else None
            loss, ce, kd = chunked_loss(inputs, guess, plan)
        else:
            # PyTorch has rules for its operations there, and none for sums kept between two passes.
            loss, ce, kd = at_once(inputs, numbers, self.teacher_smoothing)
        shape = logits.shape[:-1]
        ce, kd = (x if x is None else x.reshape(shape) for x in (ce, kd))
        return DistillTerms.reduced(reduced(loss.reshape(shape), count), ce, kd, count)

    def _plan(self, inputs: HeadInputs, numbers: Numbers, backend: str) -> Plan:
        """Chunks of equal size, so that the last is not thin and slow, whose logits fit memory_budget."""
        n, width = inputs.features.shape
        classes = len(inputs.weight)
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
        step = max(1, math.ceil(n / chunks))
        return Plan(
            backend=backend,
            numbers=numbers,
            teacher_smoothing=self.teacher_smoothing,
            dtype=dtype,
            teacher_dtype=teacher_dtype,
            step=step,
            part=math.ceil(step / parts),
            block=max(1, widening // (wide.itemsize * (width + step))) if widening else classes,
        )

    def _guess(self, plan: Plan, count: Tensor | int, inputs: HeadInputs) -> Tensor:
        """The expected upstream gradient of a row, a scalar: exact where the loss itself is the root.

        For float16 it is the power of two that brings the largest gradient near 2^13 instead: in units of 1/N they
        would underflow, and the loss scale that prevents it is not known yet.
        """
        wide = wide_dtype(plan.dtype)
        one = torch.ones((), dtype=wide, device=inputs.target.device)
        if plan.dtype != torch.float16:
            return one / count
        heaviest = 1 if inputs.class_weight is None else inputs.class_weight.max().to(wide)
        bound = one * (self.ce_weight * heaviest + self.kd_weight * plan.numbers.student_temperature)
        return torch.exp2((13 - bound.clamp(min=2**-10).log2()).floor())
