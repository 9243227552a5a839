"""The distillation loss of N rows on a GPU (CUDA or ROCm) and its gradient, in one launch of a Triton kernel.

It uses no atomics, so two runs give the same bits. It does not wait for the GPU and its memory does not depend on
values, so a CUDA graph may capture a call after an earlier one with the same dtypes has compiled the kernel.
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kd.losses.kernels.triton_kernels import LANE, resident, sweeps
from kd.losses.reference import Inputs, Numbers, wide_dtype


def rows(
    inputs: Inputs, upstream: Tensor, numbers: Numbers, *, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss, ce, kd, gradient)``: values (N,) in the wide dtype, ce and kd unweighted and 0 where their weight is 0.

    ``gradient`` (N, K), in the student's dtype, is ``upstream[i]`` times that of ``loss[i]``, or (0, K). Logits are
    (N, K), the target (N,) labels or (N, K) probabilities, class_weight (K,), ``upstream`` (N,) in the wide dtype. A
    label outside 0..K-1 other than ``ignore_index`` is not followed: its loss, ce and gradient are nan.
    """
    student = inputs.student
    n, k = student.shape
    values = [student.new_empty(n, dtype=wide_dtype(student)) for _ in range(3)]
    gradient = student.new_empty((n if with_gradient else 0, k))
    _launch(inputs, upstream, None, values, gradient if with_gradient else None, numbers)
    return values[0], values[1], values[2], gradient


def adjust(gradient: Tensor, held: Tensor, upstream: Tensor, inputs: Callable[[], Inputs], numbers: Numbers) -> None:
    """Change a gradient of ``rows`` in place from the upstream gradient ``held`` (N,) to ``upstream`` (N,).

    Each row compares the two on the GPU. Where they are equal it is left alone, else computed again from the logits.
    """
    _launch(inputs(), upstream, held, [None, None, None], gradient, numbers)


class Shape(NamedTuple):
    """How a launch divides its work: a program of ``warps`` warps takes ``rows`` rows, ``block`` classes at a time.

    ``registers`` limits the registers of a thread on CUDA; None leaves them to the compiler.
    """

    resident: bool
    rows: int
    block: int
    warps: int
    registers: int | None


def shape_for(classes: int, wide: torch.dtype, vector: int, lanes: int) -> Shape:
    """The launch for rows of this many classes, loaded ``vector`` at a time; ``lanes`` is the threads of a warp.

    The limits come from the compiled code (tests/losses/test_triton_offline.py): no register spills in any of these. At
    16 classes for each of 512 threads a row takes 98 to 126 of 128 registers; 32 for each spill on some architectures.
    """
    double = wide == torch.float64
    each = 4 if double else 8
    block = max(triton.next_power_of_2(classes), 16)
    if block > 16 * lanes * each * (1 if double else 2):
        return Shape(False, 1, LANE.value * 256, 256 // lanes, 192 if double else None)
    tile = max(block, each * lanes)
    warps = min(tile // (each * lanes), 16)
    # Without a limit ptxas spills a register to get down to 56 in some launches that load one class at a time; and
    # above, to get down to 64 in a sweep of doubles, of which a multiprocessor holds only one program anyway.
    held = vector == 1 and not double and block == tile == warps * lanes * each
    return Shape(True, tile // block, block, warps, 64 if held else None)


def _launch(
    inputs: Inputs,
    upstream: Tensor,
    held: Tensor | None,
    values: list[Tensor] | list[None],
    gradient: Tensor | None,
    numbers: Numbers,
) -> None:
    student, teacher, target, class_weight = inputs
    n, k = student.shape
    if n == 0:
        return
    *scalars, ignore_index = numbers
    double, soft = student.dtype == torch.float64, target.is_floating_point()
    student = _rows_of_ones(student)
    teacher = None if teacher is None else _rows_of_ones(teacher)
    target = _rows_of_ones(target) if soft else target
    class_weight = None if class_weight is None else class_weight.contiguous()
    strides = [0 if x is None else x.stride(0) for x in (student, teacher, target)]
    vector = _vector(k, [x for x in (student, teacher, target if soft else None, class_weight) if x is not None])
    shape = shape_for(k, wide_dtype(student), vector, _lanes(student.device))
    kernel: Any = resident if shape.resident else sweeps
    limit = {"maxnreg": shape.registers} if shape.registers and not torch.version.hip else {}
    # Triton launches on the current device, which need not be the one the tensors are on.
    with torch.cuda.device_of(student):
        kernel[(triton.cdiv(n, shape.rows),)](
            *(student, teacher, target, class_weight, upstream, held, *values, gradient),
            *(strides[0] // vector, strides[1] // vector, strides[2] // (vector if soft else 1)),
            *(upstream.stride(0), 0 if held is None else held.stride(0)),
            *(0, n, k // vector),
            *(_bits(x) if double else float(x) for x in scalars),
            ignore_index,
            CE=numbers.ce_weight > 0,
            SOFT=soft,
            WIDE=tl.float64 if double else tl.float32,
            ROWS=shape.rows,
            BLOCK=shape.block,
            VECTOR=vector,
            num_warps=shape.warps,
            **limit,
        )


def _lanes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def _rows_of_ones(x: Tensor) -> Tensor:
    """Copied where the classes of a row are not contiguous; the rows may have any stride, 0 among them."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _vector(classes: int, tensors: list[Tensor]) -> int:
    """How many elements a thread may load at once: all rows start at a multiple of it and have a multiple of it.

    The kernels get their sizes in this unit, so that the compiler knows. If K is odd, every second contiguous row
    starts at an odd element: then each thread loads one element at a time, beside those of its neighbours.
    """
    if any(x.data_ptr() % 16 for x in tensors):
        return 1
    counts = [classes, *(x.stride(0) for x in tensors if x.ndim == 2)]
    return next(v for v in (8, 4, 2, 1) if v <= 16 // tensors[0].itemsize and all(n % v == 0 for n in counts))


def _bits(value: float) -> int:
    # 0 becomes -0, whose bits do not fit into an int32: Triton would compile the kernel again for an int32.
    return struct.unpack("q", struct.pack("d", value or -0.0))[0]
