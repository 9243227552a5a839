"""The rows of the distillation loss on a GPU (CUDA or ROCm), with their gradient, from one launch.

Two kernels of one algorithm. ``_resident`` keeps whole rows in registers: three transfers per class element (read s,
read t, write the gradient). ``_sweeps`` takes rows of any length in two sweeps: five transfers. No atomics: the same
bits on every run. Nothing waits for the GPU, so a CUDA graph may capture a launch that has been compiled before.

Shapes: N rows, K classes. With z = s - max s, the student's and the teacher's logits in units of log 2,
``a = z / (Ts log 2)`` and ``b = (t - max t) / (T log 2)``, and every sum over the K classes of one row:

    share = w ((1 - e) q + e / K),  W = Σ share,  D1 = Σ e^z,  DS = Σ 2^a,  DT = Σ 2^b,  G = Σ 2^b (b - a)
    ce = W log D1 - Σ share z
    kd = Ts² log 2 (G / DT + log2(DS / DT))
    gradient = upstream (ce_weight (W e^z / D1 - share) + kd_weight Ts (2^a / DS - 2^b / DT))

DS / DT keeps the digits that log DS - log DT would cancel; all three are near log K where the KL is near 0.

A launch passes Python floats as float32. So that float64 rows are float64 throughout, theirs travel as bits of an int64.
"""

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kd.losses.reference import wide_dtype

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16, and for a pointer that is not
# aligned to 16 bytes. Only for the pointers that are read in vectors is that worth it.
_ANY_VALUE = [
    *("student_stride", "teacher_stride", "target_stride", "upstream_stride", "rows", "vectors"),
    *("temperature", "student_temperature", "kd_weight", "ce_weight", "uniform_mass", "ignore_index"),
]
_ANY_ADDRESS = ["upstream", "held", "loss", "ce", "kd"]


def rows(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    upstream: Tensor,
    *,
    temperature: float,
    student_temperature: float,
    kd_weight: float,
    ce_weight: float,
    uniform_mass: float,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss, ce, kd, gradient)``: values (N,) in the wide dtype, ce and kd unweighted and 0 where their weight is.

    ``gradient`` (N, K), in the student's dtype, is ``upstream[i]`` times that of ``loss[i]``; (0, K) without. Logits are
    (N, K), ``target`` (N,) labels or (N, K) probabilities, ``class_weight`` (K,), ``upstream`` (N,) in the wide dtype.
    A label outside 0..K-1 other than ``ignore_index`` is not followed: its row is nan where ce_weight > 0.
    """
    n, k = student.shape
    values = [student.new_empty(n, dtype=wide_dtype(student)) for _ in range(3)]
    gradient = student.new_empty((n if with_gradient else 0, k))
    _launch(
        student,
        teacher,
        target,
        class_weight,
        upstream,
        None,
        values,
        gradient if with_gradient else None,
        (temperature, student_temperature, kd_weight, ce_weight, uniform_mass),
        ignore_index,
    )
    return values[0], values[1], values[2], gradient


def adjust(
    gradient: Tensor,
    held: Tensor,
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    temperature: float,
    student_temperature: float,
    kd_weight: float,
    ce_weight: float,
    uniform_mass: float,
    ignore_index: int,
) -> None:
    """Bring ``gradient``, the result of ``rows`` for the upstream ``held`` (N,), to ``upstream`` in place.

    Each row compares the two on the GPU: where they are equal it is left alone, else computed again from the logits.
    """
    _launch(
        student,
        teacher,
        target,
        class_weight,
        upstream,
        held,
        [None, None, None],
        gradient,
        (temperature, student_temperature, kd_weight, ce_weight, uniform_mass),
        ignore_index,
    )


class Shape(NamedTuple):
    """How a launch divides its work: ``block`` classes at a time of ``rows`` rows by one program of ``warps`` warps."""

    resident: bool
    rows: int
    block: int
    warps: int


def shape_for(classes: int, wide: torch.dtype, full: bool, lanes: int) -> Shape:
    """The launch for rows of this many classes; ``full``: also probabilities or weights are read for each class.

    ``lanes`` is the threads of a warp: 32, on CDNA 64. What fits was read off the compiled code, see
    tests/test_triton_offline.py: no registers spill in any of these.
    """
    each = 4 if wide == torch.float64 else 8
    threads = 16 * 32
    block = max(triton.next_power_of_2(classes), 16)
    if block > 2 * each * threads:
        return Shape(False, 1, each * threads, threads // lanes)
    if block > each * threads:
        each *= 2
    tile = max(block, 4 * 32 * each)
    return Shape(True, tile // block, block, max(tile // each // lanes, 1))


def _launch(student, teacher, target, class_weight, upstream, held, values, gradient, scalars, ignore_index) -> None:
    n, k = student.shape
    if n == 0:
        return
    wide = wide_dtype(student)
    soft = target.is_floating_point()
    student, teacher = _inner_contiguous(student), None if teacher is None else _inner_contiguous(teacher)
    target = _inner_contiguous(target) if soft else target
    class_weight = None if class_weight is None else class_weight.contiguous()
    strides = [0 if x is None else x.stride(0) for x in (student, teacher, target)]
    vector = _vector(k, *(strides if soft else strides[:2]))
    shape = shape_for(k, wide, soft or class_weight is not None, 64 if torch.version.hip else 32)
    kernel = _resident if shape.resident else _sweeps
    # Triton launches on the current device, which need not be the one the tensors are on.
    with torch.cuda.device_of(student):
        kernel[(triton.cdiv(n, shape.rows),)](
            student,
            teacher,
            target,
            class_weight,
            upstream,
            held,
            *values,
            gradient,
            strides[0] // vector,
            strides[1] // vector,
            strides[2] // vector if soft else strides[2],
            upstream.stride(0),
            n,
            k // vector,
            *(_bits(x) if wide == torch.float64 else float(x) for x in scalars),
            ignore_index,
            CE=scalars[3] > 0,
            SOFT=soft,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32,
            ROWS=shape.rows,
            BLOCK=shape.block,
            VECTOR=vector,
            num_warps=shape.warps,
        )


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _vector(*counts: int) -> int:
    """Elements, at most 8, of which every row is a whole number and at whose multiples every row starts."""
    return next(v for v in (8, 4, 2, 1) if all(count % v == 0 for count in counts))


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


@triton.jit
def _scalar(value, WIDE: tl.constexpr):
    # float32 for float32 rows also where a caller (torch.compile) passes float64: one double would make all double.
    if WIDE == tl.float64:
        return tl.cast(tl.cast(value, tl.int64), tl.float64, bitcast=True)
    else:
        return tl.cast(value, tl.float32)


@triton.jit
def _share(target, class_weight, label, col, inside, classes, mass, SOFT: tl.constexpr, WIDE: tl.constexpr):
    """``w ((1 - e) q + e / K)`` of the classes ``col``, 0 where not ``inside``; ``target``: the row(s)' first class."""
    spread = mass / tl.cast(classes, WIDE)
    if SOFT:
        share = (1 - mass) * tl.load(target + col, inside, other=0).to(WIDE) + spread
    else:
        share = tl.where(col == label, (1 - mass) + spread, spread)
    if class_weight is not None:
        share *= tl.load(class_weight + col, inside, other=0).to(WIDE)
    return tl.where(inside, share, 0.0)


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ADDRESS)
def _resident(
    student,
    teacher,
    target,
    class_weight,
    upstream,
    held,
    loss,
    ce,
    kd,
    gradient,
    student_stride,
    teacher_stride,
    target_stride,
    upstream_stride,
    rows,
    vectors,
    temperature,
    student_temperature,
    kd_weight,
    ce_weight,
    uniform_mass,
    ignore_index,
    CE: tl.constexpr,
    SOFT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    classes = vectors * VECTOR
    written = row < rows
    up = tl.load(upstream + row * upstream_stride, written, other=0)
    if held is not None:
        written &= up != tl.load(held + row, written, other=0)
        if tl.max(tl.max(written.to(tl.int32), 0), 0) == 0:
            return
    kept = written
    label = None
    if SOFT:
        target += row * target_stride * VECTOR
    else:
        label = tl.load(target + row * target_stride, written, other=0)
        kept &= label != ignore_index
    inside = kept & (col < classes)
    # A nan need not be the maximum (tl.max drops it): every sum below carries it into the row's results.
    s = tl.load(student + row * student_stride * VECTOR + col, inside, other=-float("inf")).to(WIDE)
    z = s - tl.max(s, 1, keep_dims=True)
    slope = tl.zeros([ROWS, BLOCK], WIDE)
    ce_row = tl.zeros([ROWS, 1], WIDE)
    kd_row = tl.zeros([ROWS, 1], WIDE)
    if CE:
        mass = _scalar(uniform_mass, WIDE)
        share = _share(target, class_weight, label, col, inside, classes, mass, SOFT, WIDE)
        weight = tl.full([ROWS, 1], 1.0, WIDE)
        if SOFT or class_weight is not None:
            weight = tl.sum(share, 1, keep_dims=True)
        if not SOFT:
            # A label that is no class is followed nowhere: it makes its row nan.
            weight = tl.where((label >= 0) & (label < classes), weight, float("nan"))
        e = tl.exp2(z * LOG2E)
        total = tl.sum(e, 1, keep_dims=True)
        # A class without a share counts 0 even at -inf.
        ce_row = weight * tl.log2(total) * LN2 - tl.sum(tl.where(share == 0, 0.0, share * z), 1, keep_dims=True)
        to_ce = up * _scalar(ce_weight, WIDE)
        slope = to_ce * weight / total * e - to_ce * share
    if teacher is not None:
        ts = _scalar(student_temperature, WIDE)
        t = tl.load(teacher + row * teacher_stride * VECTOR + col, inside, other=-float("inf")).to(WIDE)
        a = z * (LOG2E / ts)
        b = (t - tl.max(t, 1, keep_dims=True)) * (LOG2E / _scalar(temperature, WIDE))
        ea = tl.exp2(a)
        eb = tl.exp2(b)
        sum_a = tl.sum(ea, 1, keep_dims=True)
        sum_b = tl.sum(eb, 1, keep_dims=True)
        # Where the teacher gives nothing the gap may be inf - inf.
        gap = tl.sum(tl.where(eb == 0, 0.0, eb * (b - a)), 1, keep_dims=True)
        kd_row = ts * ts * LN2 * (gap / sum_b + tl.log2(sum_a / sum_b))
        to_kd = up * _scalar(kd_weight, WIDE) * ts
        slope += to_kd / sum_a * ea - to_kd / sum_b * eb
    if loss is not None:
        _store_values(loss, ce, kd, row, ce_row, kd_row, ce_weight, kd_weight, kept, written, WIDE)
    if gradient is not None:
        slope = tl.where(kept, slope, 0.0)
        tl.store(gradient + row * classes + col, slope.to(gradient.dtype.element_ty), written & (col < classes))


@triton.jit
def _store_values(loss, ce, kd, row, ce_row, kd_row, ce_weight, kd_weight, kept, written, WIDE: tl.constexpr):
    ce_row = tl.where(kept, ce_row, 0.0)
    kd_row = tl.where(kept, kd_row, 0.0)
    total = _scalar(ce_weight, WIDE) * ce_row + _scalar(kd_weight, WIDE) * kd_row
    tl.store(loss + row, total, written)
    tl.store(ce + row, ce_row, written)
    tl.store(kd + row, kd_row, written)


@triton.jit
def _onto(peak, block):
    """The running maximum with a block: itself, its step down to the new one (≤ 0), and the zero point of exponents.

    While all is -inf the zero point is 0, so that e^(-inf - 0) is 0, and there is nothing to step down.
    """
    high = tl.maximum(peak, tl.max(block, 0))
    zero = tl.where(high == -float("inf"), 0.0, high)
    return high, tl.where(peak == -float("inf"), 0.0, peak - zero), zero


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ADDRESS)
def _sweeps(
    student,
    teacher,
    target,
    class_weight,
    upstream,
    held,
    loss,
    ce,
    kd,
    gradient,
    student_stride,
    teacher_stride,
    target_stride,
    upstream_stride,
    rows,
    vectors,
    temperature,
    student_temperature,
    kd_weight,
    ce_weight,
    uniform_mass,
    ignore_index,
    CE: tl.constexpr,
    SOFT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    classes = vectors * VECTOR
    up = tl.load(upstream + row * upstream_stride)
    if held is not None:
        if up == tl.load(held + row):
            return
    if gradient is not None:
        gradient += row * classes
    label = 0
    valid = True
    if SOFT:
        target += row * target_stride * VECTOR
    else:
        label = tl.load(target + row * target_stride)
        valid = (label >= 0) & (label < classes)
        if label == ignore_index:
            if loss is not None:
                tl.store(loss + row, 0.0)
                tl.store(ce + row, 0.0)
                tl.store(kd + row, 0.0)
            if gradient is not None:
                for start in range(0, classes, BLOCK):
                    col = start + tl.arange(0, BLOCK)
                    tl.store(gradient + col, tl.zeros([BLOCK], gradient.dtype.element_ty), col < classes)
            return
    student += row * student_stride * VECTOR
    mass = _scalar(uniform_mass, WIDE)
    scale_s = LOG2E / _scalar(student_temperature, WIDE)
    scale_t = LOG2E / _scalar(temperature, WIDE)
    if teacher is not None:
        teacher += row * teacher_stride * VECTOR

    # First sweep. The sums are relative to the running maxima, so each step of a maximum rescales them.
    nothing = tl.full((), 0.0, WIDE)
    peak_s = tl.full((), -float("inf"), WIDE)
    peak_t, zero_s, zero_t = peak_s, nothing, nothing
    sum_1, sum_a, sum_b, gap, weight, dot = nothing, nothing, nothing, nothing, nothing, nothing
    for start in range(0, classes, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < classes
        s = tl.load(student + col, inside, other=-float("inf")).to(WIDE)
        peak_s, step_s, zero_s = _onto(peak_s, s)
        z = s - zero_s
        if CE:
            share = _share(target, class_weight, label, col, inside, classes, mass, SOFT, WIDE)
            sum_1 = sum_1 * tl.exp2(step_s * LOG2E) + tl.sum(tl.exp2(z * LOG2E), 0)
            dot += weight * step_s + tl.sum(tl.where(share == 0, 0.0, share * z), 0)
            weight += tl.sum(share, 0)
        if teacher is not None:
            t = tl.load(teacher + col, inside, other=-float("inf")).to(WIDE)
            peak_t, step_t, zero_t = _onto(peak_t, t)
            a = z * scale_s
            b = (t - zero_t) * scale_t
            eb = tl.exp2(b)
            fade = tl.exp2(step_t * scale_t)
            # A fade of 0 may meet a step that overflowed to -inf.
            gap = tl.where(fade == 0, 0.0, fade * (gap + sum_b * (step_t * scale_t - step_s * scale_s)))
            gap += tl.sum(tl.where(eb == 0, 0.0, eb * (b - a)), 0)
            sum_a = sum_a * tl.exp2(step_s * scale_s) + tl.sum(tl.exp2(a), 0)
            sum_b = sum_b * fade + tl.sum(eb, 0)
    if not SOFT:
        # A label that is no class is followed nowhere: it makes its row nan.
        weight = tl.where(valid, weight if class_weight is not None else 1.0, float("nan"))
    ts = _scalar(student_temperature, WIDE)
    if loss is not None:
        ce_row, kd_row = nothing, nothing
        if CE:
            ce_row = weight * tl.log2(sum_1) * LN2 - dot
        if teacher is not None:
            kd_row = ts * ts * LN2 * (gap / sum_b + tl.log2(sum_a / sum_b))
        _store_values(loss, ce, kd, row, ce_row, kd_row, ce_weight, kd_weight, True, True, WIDE)

    if gradient is not None:
        # Second sweep, with every factor of the row folded into one for each exponential.
        to_ce, to_kd = up * _scalar(ce_weight, WIDE), up * _scalar(kd_weight, WIDE) * ts
        scale_1, scale_a, scale_b = to_ce * weight / sum_1, to_kd / sum_a, to_kd / sum_b
        for start in range(0, classes, BLOCK):
            col = start + tl.arange(0, BLOCK)
            inside = col < classes
            z = tl.load(student + col, inside, other=-float("inf")).to(WIDE) - zero_s
            slope = tl.zeros([BLOCK], WIDE)
            if CE:
                share = _share(target, class_weight, label, col, inside, classes, mass, SOFT, WIDE)
                slope = scale_1 * tl.exp2(z * LOG2E) - to_ce * share
            if teacher is not None:
                b = (tl.load(teacher + col, inside, other=-float("inf")).to(WIDE) - zero_t) * scale_t
                slope += scale_a * tl.exp2(z * scale_s) - scale_b * tl.exp2(b)
            tl.store(gradient + col, slope.to(gradient.dtype.element_ty), inside)
