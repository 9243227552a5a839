"""DistillLoss: label-smoothed cross entropy plus distillation, from two sets of logits."""

from dataclasses import KW_ONLY
from typing import Any, NamedTuple

from torch import Tensor

from kd.losses import reference
from kd.losses.kernels import autograd as fused
from kd.losses.ranges import or_nothing
from kd.losses.settings import DistillSettings
from kd.smoothing import check_floating, unsmooth


class DistillTerms(NamedTuple):
    """The loss, and its terms CE and KD, unweighted and detached, for logging; in nats.

    Each is a scalar, or ``(...)`` under reduction "none". A term whose weight is 0 is None.
    """

    loss: Tensor
    ce: Tensor | None
    kd: Tensor | None

    @classmethod
    def reduced(cls, loss: Tensor, ce: Tensor | None, kd: Tensor | None, count: Tensor | int | None) -> "DistillTerms":
        """Terms detached, summed over positions and divided by ``count`` as the loss already is; None leaves them."""
        parts = (None if term is None else reference.reduced(term.detach(), count) for term in (ce, kd))
        return cls(loss, *parts)


class DistillLoss(DistillSettings):
    """Label-smoothed cross entropy plus distillation of a teacher's logits (Hinton et al. 2015), in nats::

        loss = ce_weight * CE + kd_weight * KD
        CE   = -sum_k w_k q_k log softmax(s)_k
        KD   = Ts² * KL(softmax(t / T) || softmax(s / Ts))

    with student logits s, teacher logits t, class weights w, temperature T and student temperature Ts (T unless given).
    q is the smoothed target: ``(1 - eps) * target + eps / K`` under ``smoothing="uniform"``.

    Call ``loss(student_logits, teacher_logits, target)``:

    - ``student_logits``, ``teacher_logits``: ``(..., K)``, of any floating dtypes. The teacher's may be None with
      ``kd_weight=0``.
    - ``target``: int64 labels ``(...)``, or probabilities ``(..., K)`` such as mixup's. It may be None with
      ``ce_weight=0``; then every position counts.
    - returns a scalar, or ``(...)`` with ``reduction="none"``. It is computed and returned in float32, or in float64
      for a float64 student. Only the student's logits get a gradient.

    ``loss.terms(...)`` returns the loss with both terms unweighted, for logging. A setting may be changed between calls
    (``loss.temperature = 2``); it is checked when it is assigned.

    CE equals F.cross_entropy with the same class weights, ignore_index, reduction and uniform label smoothing (Szegedy
    et al. 2016 §7); but a "mean" over no position is 0, not nan. Without class weights its minimum is the entropy of q,
    so it reaches 0 only without smoothing.

    KD is 0, with a gradient of 0, where both softened distributions are equal. Its gradient is
    ``Ts * (softmax(s / Ts) - softmax(t / T))``: the factor Ts² keeps its size comparable across temperatures (Hinton et
    al. 2015 §2). With ``student_temperature=1.0`` the factor is 1, as in Müller et al. 2019 and in transformed teacher
    matching (Zheng & Yang 2024).

    Args:
        temperature: T, from 0.001 to 1000; default 4.0. In float32 rounding errors are about 1e-7 T² in KD and
            1e-7 T in its gradient.
        kd_weight: weight of KD, from 0 to 1e6; default 0.9. With 0 the teacher's logits are not used and may be None.
        ce_weight: weight of CE, from 0 to 1e6; default 0.1. A term of weight 0 is not computed. Weights and smoothing
            below 1e-30 count as 0.
        label_smoothing: smoothing mass eps of the target, in [0, 1); default 0.
        smoothing: convention of eps, "uniform" (eps/K on every class; default) or "others" (eps/(K-1) on each class
            but the label).
        student_temperature: Ts, in the range of T; None means T.
        class_weight: floating ``(K,)``, each from 0 to 1e6, for CE only; None means 1. A buffer that moves with the
            module but is not in its state_dict.
        ignore_index: label of positions to leave out; default -100. They add 0 to both terms and get a gradient of
            exactly 0. Not for targets that are probabilities.
        reduction: "mean" (default), "sum" or "none". "mean" divides by the number of positions that are not ignored (0
            where there are none). Only CE with class_weight and int64 labels is divided by the sum of the labels'
            weights instead, as in F.cross_entropy (0 where that is 0).
        backend: "reference" is plain PyTorch, on any device, with second and forward-mode derivatives. "cpu" (needs
            numba) and "triton" (CUDA, ROCm) compute loss and gradient in one pass over the logits; a second derivative
            raises RuntimeError there. "auto" takes the fused backend of the logits' device. Where there is none it
            takes the reference, and warns if only a package is missing. Under torch.func every backend is the
            reference. ``backend_used`` names that of the last call.
        class_dim: the dimension of the K classes in logits and in a target of probabilities; default -1, and 1 for
            segmentation's ``(N, K, H, W)``. Labels, and the loss under "none", have no such dimension.
        teacher_smoothing: label smoothing that the teacher was trained with, as a uniform mass in [0, 1); default 0. It
            is removed from softmax(t) first, by kd.smoothing.unsmooth: one more pass over the teacher's logits.
            kd.smoothing.to_uniform converts a mass of the other convention.

    Non-finite logits: a class that the student masks by -inf makes KD inf, unless the teacher masks it too, by -inf or
    a number such as -1e9. The exact rule: a class adds 0 to KD where its teacher probability, divided by the largest of
    the row, is below the smallest normal number (1.2e-38; 2.2e-308 for a float64 student). Label smoothing puts mass on
    masked classes, which makes CE inf, as in F.cross_entropy. The loss of a position is nan if one of its logits is nan
    or +inf, or all are -inf.

    Finite logits up to 1e20 in absolute value give a finite loss with all settings. Larger ones give the right loss or,
    where float32 cannot hold it or a part of it, inf. The gradient is right for all; one too large for the student's
    dtype (65,504 in float16) is inf.

    Raises ValueError or TypeError that names the argument: for settings outside these ranges; for shapes, devices and
    dtypes that do not fit (nothing is broadcast); for labels outside 0..K-1 and target rows that are not probabilities;
    for a teacher, target or class_weight that requires a gradient. Warns where teacher_logits look like probabilities.
    Values are not checked under torch.compile, torch.func and on "triton", where the host would have to wait for the
    GPU; there a label outside 0..K-1 gives nan.

    Modes of PyTorch: torch.compile makes one graph of it, and compiles once more when a setting first changes, but not
    for each later value. torch.func, forward-mode derivatives, torch.export, make_fx, torch.jit.trace, fake tensors and
    subclasses of Tensor get the reference, whatever ``backend`` says. A DTensor is a TypeError: pass ``to_local()``.
    The teacher's logits may come from torch.inference_mode.

    Do not overwrite logits between the forward and the backward pass on "triton" and "reference". On "cpu" you may,
    because the forward pass computes the gradient, with three exceptions, where the backward pass reads them again: an
    upstream gradient above 1e12 or not finite; a scaled loss of 16-bit logits; a retained graph or create_graph=True.
    """

    _: KW_ONLY
    class_dim: int = -1

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """The loss: a scalar, or shape ``(...)`` under reduction "none"."""
        return self._values(student_logits, teacher_logits, target)[0]

    def terms(
        self, student_logits: Tensor, teacher_logits: Tensor | None = None, target: Tensor | None = None
    ) -> DistillTerms:
        """The loss with its unweighted terms, from one pass and under the same reduction."""
        return DistillTerms.reduced(*self._values(student_logits, teacher_logits, target))

    def _values(
        self, student: Tensor, teacher: Tensor | None, target: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | int | None]:
        """The reduced loss, its unweighted terms of every position, and the divisor of their sums."""
        check_floating("student_logits", student)
        if self.class_dim not in (-1, student.ndim - 1):
            student, teacher, target = self._classes_last(student, teacher, target)
        if or_nothing(self.kd_weight) == 0:
            teacher = None
        target = self._target(target, student)
        backend, count = self._begin(student, teacher, target)
        if teacher is not None and self.teacher_smoothing:
            teacher = unsmooth(teacher, self.teacher_smoothing)
        numbers = self._numbers(student.shape[-1])
        inputs = reference.Inputs(student, teacher, target, self._weights(target, count))
        if backend != "reference":
            return *fused.terms(backend, inputs, numbers, count), count
        value, ce, kd = reference.terms(inputs, numbers, self.class_dim)
        return reference.reduced(value, count), ce, kd, count

    def _classes_last(self, *tensors: Any) -> list[Any]:
        """Views whose last dimension is the classes; labels have no such dimension."""
        dim, shape = self.class_dim, tensors[0].shape
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"class_dim={dim}: must be a dimension of student_logits, whose shape is {tuple(shape)}")
        logits = [isinstance(x, Tensor) and x.is_floating_point() and x.shape == shape for x in tensors]
        return [x.movedim(dim, -1) if moves else x for x, moves in zip(tensors, logits, strict=True)]


def distill_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor, temperature: float = 4.0, **settings: Any
) -> Tensor:
    """DistillLoss as a function: ``DistillLoss(temperature, **settings)(student_logits, teacher_logits, target)``.

    DistillLoss describes the formula, shapes, settings and errors.
    """
    return DistillLoss(temperature, **settings)(student_logits, teacher_logits, target)
