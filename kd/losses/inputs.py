"""Checks of the tensors that a loss is called with: the same, with the same messages, for every backend.

Shapes: ``(...)`` positions, ``K`` classes, ``D`` features.
"""

import warnings
from collections.abc import Sequence

from torch import Tensor

from kd.losses.kernels.chunked import linear_dtype
from kd.smoothing import are_probabilities, check_floating, check_target, values_readable


def check_inputs(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    *,
    read_values: bool,
) -> bool:
    """Raise ValueError or TypeError for tensors that do not fit each other; nothing is broadcast.

    Returns True where it is known that no position is ignored. ``read_values=False`` leaves out the checks that would
    make the host wait for a GPU.
    """
    if student.ndim == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_logits has shape {tuple(student.shape)}: must be (..., K) with K ≥ 1, classes last")
    # Asked once for all: this runs at every step, and for a small batch it would be seen in the time of one.
    read_values = read_values and values_readable(target, *(() if teacher is None else (teacher,)))
    all_count = check_target(target, student.shape[-1], ignore_index, read_values) and ignore_index < 0
    soft = target.is_floating_point()
    if soft and ignore_index >= 0:
        raise ValueError(f"ignore_index={ignore_index}: must be < 0 (off) with probabilities as target")
    check_fits("target", target, student.shape if soft else student.shape[:-1], student)
    if class_weight is not None:
        check_fits("class_weight", class_weight, student.shape[-1:], student)
    if teacher is not None:
        check_floating("teacher_logits", teacher)
        check_fits("teacher_logits", teacher, student.shape, student)
        if read_values:
            _warn_of_probabilities(teacher)
    return all_count


def head_logits(prefix: str, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A stand-in for the logits of ``(..., D)`` features, a ``(K, D)`` weight and a ``(K,)`` bias, which it checks.

    The logits are never made: it is one element viewed in their shape, so that the checks of logits apply to it.
    ``prefix`` stands before the names in a message: "" or "teacher_". A teacher's tensors get no gradient.
    """
    beside = f"{prefix}features"
    tensors = {beside: features, f"{prefix}weight": weight} | ({} if bias is None else {f"{prefix}bias": bias})
    for name, tensor in tensors.items():
        check_floating(name, tensor)
        if linear_dtype(tensor) != linear_dtype(features):
            raise TypeError(f"{name}.dtype={tensor.dtype}: must be {features.dtype}, the dtype of {beside}")
    if weight.ndim != 2 or weight.shape[1:] != features.shape[-1:]:
        got, wanted = tuple(weight.shape), f"(K, D) for (..., D) {beside} {tuple(features.shape)}"
        raise ValueError(f"{prefix}weight has shape {got}: must be {wanted}")
    for (name, tensor), shape in zip(tensors.items(), (features.shape, weight.shape, weight.shape[:1]), strict=False):
        check_fits(name, tensor, shape, features, beside=beside, constant=prefix != "")
    one = features.detach().new_zeros((), dtype=linear_dtype(features))
    return one.expand(*features.shape[:-1], len(weight))


def check_fits(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    other: Tensor,
    *,
    beside: str = "student_logits",
    constant: bool = True,
) -> None:
    """Raise ValueError unless it has this shape, is on the device of ``other`` and, if constant, needs no gradient."""
    if tensor.shape != shape:
        fits = f"{beside} {tuple(other.shape)}"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {tuple(shape)} for {fits}")
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}: must be on {other.device}, the device of {beside}")
    if constant and tensor.requires_grad:
        raise ValueError(f"{name}.requires_grad=True: must be False; use torch.no_grad() or {name}.detach()")


def _warn_of_probabilities(teacher: Tensor) -> None:
    # With one class, probabilities cannot be told from logits. The first row settles nearly every case, at little cost.
    if teacher.shape[-1] == 1 or teacher.numel() == 0 or teacher.itemsize < 2:
        return
    first = teacher[(0,) * (teacher.ndim - 1)]
    if first.min().item() >= 0 and are_probabilities(first) and are_probabilities(teacher).all():
        warnings.warn("teacher_logits look like probabilities: pass logits, or probabilities.log()", stacklevel=8)
