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

A launch passes Python floats as float32. So that float64 rows are float64 throughout, theirs travel as the
bits of an int64.
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
    vector = _vector(16 // student.itemsize, k, *(strides if soft else strides[:2]))
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


def _vector(most: int, *counts: int) -> int:
    """Elements, at most ``most``, of which every row is a whole number and at whose multiples every row starts."""
    return next(v for v in (8, 4, 2, 1) if v <= most and all(count % v == 0 for count in counts))


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
def _label(target, mask, classes, ignore_index):
    """``(label or -1, whether it is neither class nor ignored, whether it is ignored)``; -1 is not followed anywhere."""
    label = tl.load(target, mask, other=0)
    ignored = label == ignore_index
    known = (label >= 0) & (label < classes)
    return tl.where(known & ~ignored, label, -1).to(tl.int32), ~(known | ignored), ignored


@triton.jit
def _masses(uniform_mass, classes, WIDE: tl.constexpr):
    """The smoothed mass of a class that is not the label, ``e / K``, and of the label, ``1 - e + e / K``."""
    mass = _scalar(uniform_mass, WIDE)
    spread = mass / tl.cast(classes, WIDE)
    return spread, 1 - mass + spread


@triton.jit
def _share(target, class_weight, col, label, inside, spread, own, SOFT: tl.constexpr, WIDE: tl.constexpr):
    """``w ((1 - e) q + e / K)`` of the classes ``col``, 0 where not ``inside``."""
    if SOFT:
        share = (own - spread) * tl.load(target + col, inside, other=0).to(WIDE) + spread
    else:
        share = tl.where(col == label, own, spread)
    if class_weight is not None:
        share *= tl.load(class_weight + col, inside, other=0).to(WIDE)
    return tl.where(inside, share, 0.0)


@triton.jit
def _dot(own, z_own, spread, z_others):
    """Σ share z of an unweighted label; a class without a share counts 0 even at -inf."""
    return tl.where(own == 0, 0.0, own * z_own) + tl.where(spread == 0, 0.0, spread * z_others)


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
    label = 0
    if SOFT:
        target += row * target_stride * VECTOR
    else:
        label, bad, ignored = _label(target + row * target_stride, written, classes, ignore_index)
        kept &= ~ignored
    inside = kept & (col < classes)
    # Not a byte of an ignored row is read: it becomes a row of zeros, whose gradient times 0 is 0.
    up = tl.where(kept, up, 0.0)
    fill = tl.where(kept, -float("inf"), 0.0)
    student += row * student_stride * VECTOR
    s = tl.load(student + col, inside, other=fill)
    t = s
    if teacher is not None:
        t = tl.load(teacher + row * teacher_stride * VECTOR + col, inside, other=fill)
    # A nan need not be the maximum (tl.max drops it): every sum below carries it into the row's results.
    s = s.to(WIDE)
    top = tl.max(s, 1, keep_dims=True)
    z = s - top
    slope = tl.zeros([ROWS, BLOCK], WIDE)
    ce_row = tl.zeros([ROWS, 1], WIDE)
    kd_row = tl.zeros([ROWS, 1], WIDE)
    if CE:
        to_ce = up * _scalar(ce_weight, WIDE)
        spread, own = _masses(uniform_mass, classes, WIDE)
        if SOFT or class_weight is not None:
            share = _share(target, class_weight, col, label, inside, spread, own, SOFT, WIDE)
            pull = to_ce * share
            weight = tl.sum(share, 1, keep_dims=True)
            # A class without a share counts 0 even at -inf.
            dot = tl.sum(share * tl.where(share == 0, 0.0, z), 1, keep_dims=True)
        else:
            others = inside & (col != label)
            pull = tl.where(others, to_ce * spread, to_ce * own)
            weight = tl.full([ROWS, 1], 1.0, WIDE)
            z_own = tl.load(student + label, label >= 0, other=0).to(WIDE) - top
            dot = _dot(own, z_own, spread, tl.sum(tl.where(others, z, 0.0), 1, keep_dims=True))
        if not SOFT:
            weight = tl.where(bad, float("nan"), weight)
        e = tl.exp2(z * LOG2E)
        total = tl.sum(e, 1, keep_dims=True)
        ce_row = weight * tl.log2(total) * LN2 - dot
        slope = to_ce * weight / total * e - pull
    if teacher is not None:
        ts = _scalar(student_temperature, WIDE)
        to_kd = up * _scalar(kd_weight, WIDE) * ts
        t = t.to(WIDE)
        a = z * (LOG2E / ts)
        b = (t - tl.max(t, 1, keep_dims=True)) * (LOG2E / _scalar(temperature, WIDE))
        ea = tl.exp2(a)
        eb = tl.exp2(b)
        sum_a = tl.sum(ea, 1, keep_dims=True)
        sum_b = tl.sum(eb, 1, keep_dims=True)
        # Where the teacher gives nothing the gap may be inf - inf.
        gap = tl.sum(eb * tl.where(eb == 0, 0.0, b - a), 1, keep_dims=True)
        kd_row = ts * ts * LN2 * (gap / sum_b + tl.log2(sum_a / sum_b))
        slope += to_kd / sum_a * ea
        slope -= to_kd / sum_b * eb
    if loss is not None:
        _store_values(loss, ce, kd, row, ce_row, kd_row, ce_weight, kd_weight, kept, written, WIDE)
    if gradient is not None:
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
def _lane_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _lane_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def _onto(peak, high):
    """A maximum ``peak`` raised to ``high``: the new one, the step from there down to the old (≤ 0), and a zero point.

    While all is -inf the zero point is 0, so that e^(-inf - 0) is 0, and there is nothing to step over.
    """
    high = tl.maximum(peak, high)
    zero = tl.where(high == -float("inf"), 0.0, high)
    return high, tl.where(peak == -float("inf"), 0.0, peak - zero), zero


@triton.jit
def _step_ce(total, dot, weight, step):
    """The sums of the cross entropy when their zero point rises by ``-step``."""
    return total * tl.exp2(step * LOG2E), dot + weight * step


@triton.jit
def _step_kd(sum_a, sum_b, gap, step_a, step_b):
    """The sums of the KL when their zero points rise by ``-step_a`` and ``-step_b``, in units of log 2."""
    fade = tl.exp2(step_b)
    # Where nothing is left the step itself may have overflowed to -inf.
    gap = tl.where(fade == 0, 0.0, fade * (gap + sum_b * (step_b - step_a)))
    return sum_a * tl.exp2(step_a), sum_b * fade, gap


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
    if SOFT:
        target += row * target_stride * VECTOR
    else:
        label, bad, ignored = _label(target + row * target_stride, True, classes, ignore_index)
        if ignored:
            if loss is not None:
                _store_values(loss, ce, kd, row, 0.0, 0.0, ce_weight, kd_weight, True, True, WIDE)
            if gradient is not None:
                for start in range(0, classes, BLOCK):
                    col = start + tl.arange(0, BLOCK)
                    tl.store(gradient + col, tl.zeros([BLOCK], gradient.dtype.element_ty), col < classes)
            return
    student += row * student_stride * VECTOR
    if teacher is not None:
        teacher += row * teacher_stride * VECTOR
    spread, own = _masses(uniform_mass, classes, WIDE)
    ts = _scalar(student_temperature, WIDE)
    scale_s = LOG2E / ts
    scale_t = LOG2E / _scalar(temperature, WIDE)

    tile = tl.arange(0, 8 // VECTOR)[:, None, None] * (BLOCK // 8 * VECTOR)
    tile += tl.arange(0, BLOCK // 8)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    PLAIN: tl.constexpr = not SOFT and class_weight is None
    base = tl.full((), 0.0, WIDE)
    if PLAIN and CE:
        s_own = tl.load(student + label, label >= 0, other=0).to(WIDE)
        base = tl.where(s_own == -float("inf"), 0.0, s_own)

    # First sweep. Each thread has maxima and sums of its own, so that none waits for another before the end.
    nothing = tl.zeros([BLOCK // 8], WIDE)
    peak_s, peak_t = nothing - float("inf"), nothing - float("inf")
    total, sum_a, sum_b, gap, weight, dot = nothing, nothing, nothing, nothing, nothing, nothing
    for start in range(0, classes, BLOCK):
        col = start + tile
        inside = col < classes
        s = tl.load(student + col, inside, other=-float("inf"))
        t = s
        if teacher is not None:
            t = tl.load(teacher + col, inside, other=-float("inf"))
        s = s.to(WIDE)
        peak_s, step_s, zero_s = _onto(peak_s, _lane_max(s))
        z = s - zero_s[None, :, None]
        if CE:
            total, dot = _step_ce(total, dot, weight, step_s)
            total += _lane_sum(tl.exp2(z * LOG2E))
            if PLAIN:
                # Relative to the label's logit, which makes its own part 0; weight stays 0.
                dot += _lane_sum(tl.where(inside, s - base, 0.0))
            else:
                share = _share(target, class_weight, col, label, inside, spread, own, SOFT, WIDE)
                dot += _lane_sum(share * tl.where(share == 0, 0.0, z))
                weight += _lane_sum(share)
        if teacher is not None:
            t = t.to(WIDE)
            peak_t, step_t, zero_t = _onto(peak_t, _lane_max(t))
            a = z * scale_s
            b = (t - zero_t[None, :, None]) * scale_t
            eb = tl.exp2(b)
            sum_a, sum_b, gap = _step_kd(sum_a, sum_b, gap, step_s * scale_s, step_t * scale_t)
            sum_a += _lane_sum(tl.exp2(a))
            sum_b += _lane_sum(eb)
            gap += _lane_sum(eb * tl.where(eb == 0, 0.0, b - a))

    # All threads' sums onto the row's maxima, and into one.
    _, step_s, _ = _onto(peak_s, tl.max(peak_s))
    _, _, zero_s = _onto(tl.max(peak_s), tl.max(peak_s))
    _, step_t, _ = _onto(peak_t, tl.max(peak_t))
    _, _, zero_t = _onto(tl.max(peak_t), tl.max(peak_t))
    ce_row, kd_row = base * 0, base * 0
    if CE:
        total, dot = _step_ce(total, dot, weight, step_s)
        total, dot, weight = tl.sum(total), tl.sum(dot), tl.sum(weight)
        if PLAIN:
            weight += 1
            others = dot + tl.cast(classes - 1, WIDE) * (base - zero_s)
            dot = _dot(own, s_own - zero_s, spread, others)
        if not SOFT:
            weight = tl.where(bad, float("nan"), weight)
        ce_row = weight * tl.log2(total) * LN2 - dot
    if teacher is not None:
        sum_a, sum_b, gap = _step_kd(sum_a, sum_b, gap, step_s * scale_s, step_t * scale_t)
        sum_a, sum_b, gap = tl.sum(sum_a), tl.sum(sum_b), tl.sum(gap)
        kd_row = ts * ts * LN2 * (gap / sum_b + tl.log2(sum_a / sum_b))
    if loss is not None:
        _store_values(loss, ce, kd, row, ce_row, kd_row, ce_weight, kd_weight, True, True, WIDE)
    if gradient is not None:
        # Second sweep, with every factor of the row folded into one for each exponential.
        to_ce, to_kd = up * _scalar(ce_weight, WIDE), up * _scalar(kd_weight, WIDE) * ts
        scale_1, scale_a, scale_b = to_ce * weight / total, to_kd / sum_a, to_kd / sum_b
        for start in range(0, classes, BLOCK):
            col = start + tile
            inside = col < classes
            s = tl.load(student + col, inside, other=0)
            t = s
            if teacher is not None:
                t = tl.load(teacher + col, inside, other=0)
            z = s.to(WIDE) - zero_s
            slope = tl.zeros([8 // VECTOR, BLOCK // 8, VECTOR], WIDE)
            if CE:
                if PLAIN:
                    pull = tl.where(col == label, to_ce * own, to_ce * spread)
                else:
                    pull = to_ce * _share(target, class_weight, col, label, inside, spread, own, SOFT, WIDE)
                slope = scale_1 * tl.exp2(z * LOG2E) - pull
            if teacher is not None:
                slope += scale_a * tl.exp2(z * scale_s)
                slope -= scale_b * tl.exp2((t.to(WIDE) - zero_t) * scale_t)
            tl.store(gradient + col, slope.to(gradient.dtype.element_ty), inside)
