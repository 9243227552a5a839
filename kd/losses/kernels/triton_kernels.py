# The functions below take and return Triton's values, not Python's.
# pyrefly: ignore-errors
"""The Triton kernels of the distillation loss: one row's values and gradient in one launch.

Two kernels of one algorithm. ``resident`` holds whole rows in registers, with three transfers per class element (read
s, read t, write the gradient). ``sweeps`` takes rows of any length in two sweeps, with five. They use no atomics, so
two runs give the same bits. Nothing waits for the GPU and no memory depends on values, so a CUDA graph may capture a
launch after an earlier one has compiled it.

Shapes: N rows, K classes. For one row, with z = s - max s, the logits in units of log 2 ``a = z / (Ts log 2)`` and
``b = (t - max t) / (T log 2)``, sums over its classes, smoothed mass e, target q and class weights w:

    share = w ((1 - e) q + e / K),  W = Σ share,  D = Σ e^z,  A = Σ 2^a,  B = Σ 2^b,  gap = Σ 2^b (b - a)
    ce = W log D - Σ share z
    kd = Ts² log 2 (gap / B + log2(A / B))
    gradient = upstream (ce_weight (W e^z / D - share) + kd_weight Ts (2^a / A - 2^b / B))

A / B keeps the digits that log A - log B would cancel: both are near log K where the KL is near 0.

Both kernels take the same arguments:

- pointers to rows whose classes are contiguous; None for an absent ``teacher`` or ``class_weight``, and for values or a
  ``gradient`` that are not wanted
- strides from row to row; those of student, teacher and probabilities are in units of VECTOR elements, as is
  ``vectors``, K / VECTOR, so that the compiler knows how much it may load at once
- ``weight_start``, which is 0: with it the compiler knows no more about the class weights than about the rows, and
  distributes both over the threads in the same way
- scalars, see ``_scalar``
- ``held``: a row whose ``upstream`` equals it is left unchanged
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

LANE: tl.constexpr = tl.constexpr(8)  # classes that one thread takes at a time in a sweep

# Triton compiles a kernel again for an integer argument that is 1 or a multiple of 16, and for a pointer that is not
# aligned to 16 bytes. That pays only for the pointers that are read in vectors.
_ANY_VALUE = [
    *("student_stride", "teacher_stride", "target_stride", "upstream_stride", "held_stride"),
    *("weight_start", "rows", "vectors"),
    *("temperature", "student_temperature", "kd_weight", "ce_weight", "uniform_mass", "ignore_index"),
]
_ANY_ADDRESS = ["upstream", "held", "loss", "ce", "kd"]


@triton.jit
def _scalar(value, WIDE: tl.constexpr):
    """A runtime scalar in the wide dtype.

    A launch passes a Python float as float32. For float64 rows it is passed exactly, as the bits of an int64. Where
    torch.compile passes float64 to float32 rows, one double must not turn the whole computation into doubles.
    """
    if tl.float64 == WIDE:
        value = tl.cast(tl.cast(value, tl.int64), tl.float64, bitcast=True)
    return tl.cast(value, WIDE)


@triton.jit
def _label(target, mask, classes, ignore_index):
    """``(label or -1, whether it is neither a class nor ignored, whether it is ignored)``; -1 is never an address."""
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
    """Σ share z of an unweighted label; a class of share 0 adds 0 even at -inf."""
    return tl.where(own == 0, 0.0, own * z_own) + tl.where(spread == 0, 0.0, spread * z_others)


@triton.jit
def _is_nothing(b, WIDE: tl.constexpr):
    """Whether the teacher's probability beside the largest, 2^b, is below the smallest normal number."""
    return b < (-1022.0 if tl.float64 == WIDE else -126.0)


@triton.jit
def _gaps(eb, a, b, WIDE: tl.constexpr):
    """The addends of the gap; 0 where the teacher gives nothing, as `kd.losses.reference.nothing` says."""
    return eb * tl.where(_is_nothing(b, WIDE), 0.0, b - a)


@triton.jit
def _store_values(loss, ce, kd, row, ce_row, kd_row, ce_weight, kd_weight, kept, written, WIDE: tl.constexpr):
    ce_row = tl.where(kept, ce_row, 0.0)
    kd_row = tl.where(kept, kd_row, 0.0)
    total = _scalar(ce_weight, WIDE) * ce_row + _scalar(kd_weight, WIDE) * kd_row
    tl.store(loss + row, total, written)
    tl.store(ce + row, ce_row, written)
    tl.store(kd + row, kd_row, written)


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ADDRESS)
def resident(
    student, teacher, target, class_weight, upstream, held, loss, ce, kd, gradient,
    student_stride, teacher_stride, target_stride, upstream_stride, held_stride, weight_start, rows, vectors,
    temperature, student_temperature, kd_weight, ce_weight, uniform_mass, ignore_index,
    CE: tl.constexpr, SOFT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    classes = vectors * VECTOR
    if class_weight is not None:
        class_weight += weight_start * VECTOR
    written = row < rows
    up = tl.load(upstream + row * upstream_stride, written, other=0)
    if held is not None:
        written &= up != tl.load(held + row * held_stride, written, other=0)
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
    # An ignored row is not read. It becomes a row of zeros with a finite gradient, and 0 times that is 0.
    up = tl.where(kept, up, 0.0)
    if not SOFT:
        up = tl.where(bad, float("nan"), up)
    fill = tl.where(kept, -float("inf"), 0.0)
    student += row * student_stride * VECTOR
    s = tl.load(student + col, inside, other=fill)
    t = s
    if teacher is not None:
        t = tl.load(teacher + row * teacher_stride * VECTOR + col, inside, other=fill)
    # tl.max drops a nan, but every sum below carries it into the results of the row.
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
            # A class of share 0 adds 0 even at -inf.
            dot = tl.sum(share * tl.where(share == 0, 0.0, z), 1, keep_dims=True)
        else:
            others = inside & (col != label)
            pull = tl.where(others, to_ce * spread, to_ce * own)
            weight = tl.full([ROWS, 1], 1.0, WIDE)
            z_own = tl.load(student + label, kept & (label >= 0), other=0).to(WIDE) - top
            dot = _dot(own, z_own, spread, tl.sum(tl.where(others, z, 0.0), 1, keep_dims=True))
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
        eb = tl.exp2(b)
        gap = tl.sum(_gaps(eb, a, b, WIDE), 1, keep_dims=True)  # before ea, for which a's registers are then free
        sum_b = tl.sum(eb, 1, keep_dims=True)
        ea = tl.exp2(a)
        sum_a = tl.sum(ea, 1, keep_dims=True)
        kd_row = ts * ts * LN2 * (gap / sum_b + tl.log2(sum_a / sum_b))
        slope += to_kd / sum_a * ea
        slope -= to_kd / sum_b * eb
    if loss is not None:
        if not SOFT:
            ce_row = tl.where(bad, float("nan"), ce_row)
        _store_values(loss, ce, kd, row, ce_row, kd_row, ce_weight, kd_weight, kept, written, WIDE)
    if gradient is not None:
        tl.store(gradient + row * classes + col, slope.to(gradient.dtype.element_ty), written & (col < classes))


@triton.jit
def _lane_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _lane_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def _zero(peak):
    """The number to subtract in an exponent: the maximum so far, or 0 while it is -inf, so that e^(-inf - 0) is 0."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def _step(peak, high):
    """The shift (≤ 0) of sums relative to ``peak`` when it rises to ``high``; 0 for an empty sum."""
    return tl.where(peak == -float("inf"), 0.0, peak - _zero(high))


@triton.jit
def _step_ce(total, dot, weight, step):
    """The sums of the cross entropy when their zero point rises by ``-step``."""
    # Weight is 0 where no class has a share yet, and for plain labels; a step between the ends of float32 is -inf.
    return total * tl.exp2(step * LOG2E), dot + tl.where(weight == 0, 0.0, weight * step)


@triton.jit
def _step_kd(sum_a, sum_b, gap, step_a, step_b):
    """The sums of the KL when their zero points rise by ``-step_a`` and ``-step_b``, in units of log 2."""
    fade = tl.exp2(step_b)
    left = sum_b * fade
    # Where nothing is left a step may have overflowed to -inf: some mask logits with the lowest finite number.
    gap = tl.where(left == 0, 0.0, fade * (gap + sum_b * (step_b - step_a)))
    return sum_a * tl.exp2(step_a), left, gap


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ADDRESS)
def sweeps(
    student, teacher, target, class_weight, upstream, held, loss, ce, kd, gradient,
    student_stride, teacher_stride, target_stride, upstream_stride, held_stride, weight_start, rows, vectors,
    temperature, student_temperature, kd_weight, ce_weight, uniform_mass, ignore_index,
    CE: tl.constexpr, SOFT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One row, LANE classes for each thread at a time."""
    row = tl.program_id(0).to(tl.int64)
    classes = vectors * VECTOR
    if class_weight is not None:
        class_weight += weight_start * VECTOR
    up = tl.load(upstream + row * upstream_stride)
    if held is not None:  # noqa: SIM102  (`and` would load held in any case)
        if up == tl.load(held + row * held_stride):
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
        up = tl.where(bad, float("nan"), up)
    student += row * student_stride * VECTOR
    if teacher is not None:
        teacher += row * teacher_stride * VECTOR
    spread, own = _masses(uniform_mass, classes, WIDE)
    ts = _scalar(student_temperature, WIDE)
    scale_s = LOG2E / ts
    scale_t = LOG2E / _scalar(temperature, WIDE)

    tile = tl.arange(0, LANE // VECTOR)[:, None, None] * (BLOCK // LANE * VECTOR)
    tile += tl.arange(0, BLOCK // LANE)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    PLAIN: tl.constexpr = not SOFT and class_weight is None
    base = tl.full((), 0.0, WIDE)
    if PLAIN and CE:
        s_own = tl.load(student + label, label >= 0, other=0).to(WIDE)
        base = tl.where(s_own < -1e30, 0.0, s_own)  # not where it is masked

    # First sweep. Each thread keeps its own maxima and sums, so that none waits for another before the end.
    nothing = tl.zeros([BLOCK // LANE], WIDE)
    peak_s, peak_t, peak_masked = nothing - float("inf"), nothing - float("inf"), nothing - float("inf")
    total, sum_a, sum_b, gap, weight, dot = nothing, nothing, nothing, nothing, nothing, nothing
    for start in range(0, classes, BLOCK):
        col = start + tile
        inside = col < classes
        s = tl.load(student + col, inside, other=-float("inf"))
        t = s
        if teacher is not None:
            t = tl.load(teacher + col, inside, other=-float("inf"))
        s = s.to(WIDE)
        high_s = tl.maximum(peak_s, _lane_max(s))
        step_s = _step(peak_s, high_s)
        peak_s = high_s
        z = s - _zero(peak_s)[None, :, None]
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
            high_t = tl.maximum(peak_t, _lane_max(t))
            step_t = _step(peak_t, high_t)
            peak_t = high_t
            a = z * scale_s
            b = (t - _zero(peak_t)[None, :, None]) * scale_t
            eb = tl.exp2(b)
            sum_a, sum_b, gap = _step_kd(sum_a, sum_b, gap, step_s * scale_s, step_t * scale_t)
            sum_a += _lane_sum(tl.exp2(a))
            sum_b += _lane_sum(eb)
            # A class that only the student masks makes the gap inf, unless it is nothing beside the row's maximum.
            masked = s == -float("inf")
            peak_masked = tl.maximum(peak_masked, _lane_max(tl.where(masked, t, -float("inf"))))
            gap += _lane_sum(tl.where(masked, 0.0, _gaps(eb, a, b, WIDE)))

    # Shift the sums of all threads to the maxima of the row and add them.
    high_s, high_t = tl.max(peak_s), tl.max(peak_t)
    step_s, step_t = _step(peak_s, high_s), _step(peak_t, high_t)
    zero_s, zero_t = _zero(high_s), _zero(high_t)
    ce_row, kd_row = base * 0, base * 0
    if CE:
        total, dot = _step_ce(total, dot, weight, step_s)
        total, dot, weight = tl.sum(total), tl.sum(dot), tl.sum(weight)
        if PLAIN:
            weight += 1
            # The label's own part is not 0 where the base was not its logit; -inf needs no correction.
            dot -= tl.where((s_own < -1e30) & (s_own > -float("inf")), s_own, 0.0)
            others = dot + tl.cast(classes - 1, WIDE) * (base - zero_s)
            # Near the ends of the dtype both may overflow. A nan of the input is in total as well.
            others = tl.where(others == others, others, -float("inf"))
            dot = _dot(own, s_own - zero_s, spread, others)
        ce_row = weight * tl.log2(total) * LN2 - dot
    if teacher is not None:
        sum_a, sum_b, gap = _step_kd(sum_a, sum_b, gap, step_s * scale_s, step_t * scale_t)
        sum_a, sum_b, gap = tl.sum(sum_a), tl.sum(sum_b), tl.sum(gap)
        gap = tl.where(_is_nothing((tl.max(peak_masked) - zero_t) * scale_t, WIDE), gap, float("inf"))
        kd_row = ts * ts * LN2 * (gap / sum_b + tl.log2(sum_a / sum_b))
    if loss is not None:
        if not SOFT:
            ce_row = tl.where(bad, float("nan"), ce_row)
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
            slope = tl.zeros([LANE // VECTOR, BLOCK // LANE, VECTOR], WIDE)
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
