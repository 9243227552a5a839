"""Checks of the tensors that a loss is called with: the same, with the same messages, for every backend.

Shapes: ``(...)`` positions, ``K`` classes, ``D`` features.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from kd.losses.kernels.chunked import linear_dtype
from kd.losses.reference import wide_dtype
from kd.smoothing import check_target, row_sum_tolerance, values_readable


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
    all_count = check_target(target, student.shape[-1], ignore_index, read_values) and ignore_index < 0
    soft = target.is_floating_point()
    if soft and ignore_index >= 0:
        raise ValueError(f"ignore_index={ignore_index}: must be < 0 (off) with probabilities as target")
    check_fits("target", target, student.shape if soft else student.shape[:-1], student)
    if class_weight is not None:
        check_fits("class_weight", class_weight, student.shape[-1:], student)
    if teacher is not None:
        check_logits("teacher_logits", teacher)
        check_fits("teacher_logits", teacher, student.shape, student)
        if read_values:
            _warn_of_probabilities(teacher)
    return all_count


def check_logits(name: str, logits: object) -> None:
    """Raise TypeError unless it is a dense floating tensor."""
    if not isinstance(logits, Tensor):
        hint = "; pass its .logits" if isinstance(getattr(logits, "logits", None), Tensor) else ""
        raise TypeError(f"{name}: must be a tensor, got {type(logits).__name__}{hint}")
    if not logits.is_floating_point():
        raise TypeError(f"{name}.dtype={logits.dtype}: must be a real floating dtype")
    if logits.layout is not torch.strided:
        raise TypeError(f"{name}.layout={logits.layout}: must be dense; use {name}.to_dense()")


def check_head(prefix: str, features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless ``(..., D)`` features, a ``(K, D)`` weight and a ``(K,)`` bias make logits.

    ``prefix`` stands before their names in a message: "" or "teacher_". A teacher's tensors get no gradient.
    """
    names = (f"{prefix}features", f"{prefix}weight", f"{prefix}bias")
    for name, tensor in zip(names, (features, weight, bias), strict=True):
        if tensor is not None or name == names[1]:
            check_logits(name, tensor)
    if features.ndim == 0:
        raise ValueError(f"{names[0]} has shape (): must be (..., D)")
    if weight.ndim != 2 or len(weight) == 0 or weight.shape[1] != features.shape[-1]:
        got, width = tuple(weight.shape), features.shape[-1]
        raise ValueError(f"{names[1]} has shape {got}: must be (K, {width}) with K ≥ 1, as {names[0]} has {width}")
    for name, tensor, shape in zip(names[1:], (weight, bias), (weight.shape, weight.shape[:1]), strict=True):
        if tensor is None:
            continue
        check_fits(name, tensor, shape, features, beside=names[0], constant=prefix != "")
        if linear_dtype(tensor) != linear_dtype(features):
            raise TypeError(f"{name}.dtype={tensor.dtype}: must be {features.dtype}, the dtype of {names[0]}")


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
    if teacher.shape[-1] == 1 or teacher.numel() == 0 or teacher.itemsize < 2 or not values_readable(teacher):
        return
    first = teacher[(0,) * (teacher.ndim - 1)]
    if first.min().item() >= 0 and _are_probabilities(first) and _are_probabilities(teacher):
        warnings.warn("teacher_logits look like probabilities: pass logits, or probabilities.log()", stacklevel=8)


def _are_probabilities(rows: Tensor) -> bool:
    off = (rows.sum(-1, dtype=wide_dtype(rows)) - 1).abs()
    return bool((rows >= 0).all() & (off <= row_sum_tolerance(rows.dtype)).all())
