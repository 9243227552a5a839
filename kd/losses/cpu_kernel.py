"""The compiled part of the CPU backend: one row's loss and gradient, every exponential computed once.

A row goes in blocks of 1024 classes through the first-level cache. The first pass takes each block's maximum m, stores
``e^{(s-m)/Ts}`` and ``e^{(t-m)/T}``, and sums; the second turns what is stored into the gradient. ``e^s`` is a power of
``e^{s/Ts}`` where Ts is 1, 2, 4 or 8, and a third exponential elsewhere. Sums over a block run in the wide type, sums of
blocks in float64. A row belongs to one thread, so the number of threads does not change a bit of the result.

All compiled code is in this one file, because numba's cache on disk looks at one file's date only.

Shapes: ``N`` rows, ``K`` classes. ``wide`` is np.float64 for a float64 student, else np.float32.
"""

import ctypes
import math

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic, overload

BLOCK = 1024  # 4 KiB of float32: two stored blocks and what is read fit the first-level cache of 32 KiB
LOG2_E = math.log2(math.e)

# Nothing may be assumed about nan or inf, and no sum reordered: that would fold away the rounding in exp2.
EXACT = {"error_model": "numpy", "fastmath": {"contract"}}
# The same, but a loop's sum may be split over the lanes of a vector: always the same way, so bits repeat.
SUMS = {"error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}

HALF, BFLOAT, FLOAT, DOUBLE = range(4)  # what a row is stored as


@intrinsic
def pointer(_typing, address):
    """An integer as a pointer."""

    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), build


@intrinsic
def take(_typing, counter):
    """Add 1 to the int64 at this pointer, for all threads at once; returns what it was."""

    def build(context, builder, signature, arguments):
        word = ir.IntType(64)
        return builder.atomic_rmw("add", builder.bitcast(arguments[0], word.as_pointer()), word(1), "monotonic")

    return types.int64(counter), build


@intrinsic
def multiply_add(_typing, a, b, c):
    """``a * b + c``, in one rounding where the machine can: LLVM leaves a product that is used twice unfused."""

    def build(context, builder, signature, arguments):
        kind = arguments[0].type
        declared = ir.FunctionType(kind, [kind] * 3)
        return builder.call(builder.module.declare_intrinsic("llvm.fmuladd", [kind], declared), arguments)

    return a(a, a, a), build


@intrinsic
def long_vectors(_typing):
    """Vectors of 512 bits in the loops of the calling function, on machines that have them.

    LLVM prefers 256 for the sake of older ones. Measured on one Sapphire Rapids core, 1024 float32 classes in cache: the two
    exponentials and their sums 0.58 -> 0.44 ns a class, the gradient 0.11 -> 0.07.
    """

    def build(context, builder, signature, arguments):
        # llvmlite lists the attributes it knows and has no other way to write one.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), build


@njit(**EXACT)
def view(address, count, kind):
    """The memory at this address as an array."""
    return carray(pointer(address), (count,), kind)


def bits(value):
    """A float as the signed integer of the same bits."""
    raise NotImplementedError


@overload(bits)
def _bits(value):
    if value == types.float32:
        return lambda value: np.float32(value).view(np.int32)
    return lambda value: np.float64(value).view(np.int64)


def from_bits(integer):
    """The inverse of bits."""
    raise NotImplementedError


@overload(from_bits)
def _from_bits(integer):
    if integer == types.int32:
        return lambda integer: np.int32(integer).view(np.float32)
    return lambda integer: np.int64(integer).view(np.float64)


def exp2(value, scale, lowest):
    """``2 ** (value * scale)`` for ``value * scale <= 0``, and exactly 0 below ``value = lowest``.

    ``lowest`` is -127 / scale (float64: -1023 / scale). With n the nearest integer and f the rest, 2^f is a polynomial
    (relative error 9e-8, float64: 1e-19) and 2^n is made from bits: adding a number whose last digit is worth 1 rounds
    to n, and leaves n plus the exponent's bias in the lowest bits.
    """
    raise NotImplementedError


ROUND32 = np.float32(1.5 * 2**23 + 127)
ROUND64 = 1.5 * 2**52 + 1023
POWERS32 = tuple(
    np.float32(c)
    for c in (
        0.0013264727197220586,
        0.00967151263964708,
        0.05550733743251851,
        0.2402224208537507,
        0.6931469775991642,
        1,
    )
)
POWERS64 = (
    2.57293241773623042e-11,
    4.45581790833606449e-10,
    7.05489730415549928e-9,
    1.01780570877339411e-7,
    1.32154868087055628e-6,
    0.0000152527338415567726,
    0.000154035303933707334,
    0.00133335581464064707,
    0.00961812910762847949,
    0.055504108664821627,
    0.240226506959100712,
    0.693147180559945309,
    1.0,
)


@overload(exp2, jit_options=EXACT)
def _exp2(value, scale, lowest):
    single = value == types.float32
    integer, shift = (np.int32, 23) if single else (np.int64, 52)
    bias, powers = (ROUND32, POWERS32) if single else (ROUND64, POWERS64)

    def build(value, scale, lowest):
        value = lowest if value < lowest else value  # in this order nan stays nan
        rounded = multiply_add(value, scale, bias)
        rest = multiply_add(value, scale, bias - rounded)
        power = powers[0]
        for i in range(1, len(powers)):
            power = power * rest + powers[i]
        return power * from_bits(integer(bits(rounded) << shift))  # numba shifts in int64

    return build


@njit(**EXACT)
def widen_bfloat(stored):
    """Bits of a bfloat16 as float32: its upper half."""
    return np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)


@njit(**EXACT)
def widen_half(stored):
    """Bits of a float16 as float32, without the machine's own conversion, which not every one has."""
    magnitude = np.uint32(np.uint32(stored & np.uint16(0x7FFF)) << np.uint32(13))
    exponent = np.uint32(magnitude & np.uint32(0x0F800000))
    value = np.uint32(magnitude + np.uint32(0x38000000))  # the two biases are 112 apart
    if exponent == np.uint32(0x0F800000):  # inf and nan
        value = np.uint32(value + np.uint32(0x38000000))
    if exponent == np.uint32(0):  # subnormal: read as 2^-14 and more, which is taken off again
        value = np.float32(np.uint32(value + np.uint32(0x00800000)).view(np.float32) - np.float32(2.0**-14)).view(
            np.uint32
        )
    return np.uint32(value | np.uint32(np.uint32(stored & np.uint16(0x8000)) << np.uint32(16))).view(np.float32)


@njit(**EXACT)
def narrow_bfloat(value):
    """Bits of the nearest bfloat16, ties to even."""
    word = np.float32(value).view(np.uint32)
    nearest = np.uint32(word + np.uint32(0x7FFF) + np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(1)))
    return np.uint16(0x7FC0) if value != value else np.uint16(nearest >> np.uint32(16))


@njit(**EXACT)
def narrow_half(value):
    """Bits of the nearest float16, ties to even; inf from 65520 on."""
    word = np.float32(value).view(np.uint32)
    magnitude = np.uint32(word & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    nearest = np.uint32(np.uint32(magnitude + np.uint32(0xFFF) + odd - np.uint32(0x38000000)) >> np.uint32(13))
    if magnitude < np.uint32(0x38800000):  # subnormal, in steps of 2^-24: the last digit of a float32 at 1/2
        half = np.float32(magnitude.view(np.float32) + np.float32(0.5))
        nearest = np.uint32(half.view(np.uint32) - np.uint32(0x3F000000))
    if magnitude >= np.uint32(0x477FF000):
        nearest = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else np.uint32(0x7C00)
    return np.uint16(nearest | np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(0x8000)))


class Job(ctypes.Structure):
    """One call, as the compiled code reads it. Addresses of 0 mean absent; strides are in bytes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("taken", "tasks", "rows", "classes", "wide_bytes", "power", "dense")),
        *((name, ctypes.c_int64) for name in ("student", "student_row", "student_item", "student_kind")),
        *((name, ctypes.c_int64) for name in ("teacher", "teacher_row", "teacher_item", "teacher_kind")),
        *((name, ctypes.c_int64) for name in ("shares", "shares_row", "shares_item", "shares_kind")),
        *((name, ctypes.c_int64) for name in ("labels", "labels_row", "ignore_index", "class_weight")),
        *((name, ctypes.c_int64) for name in ("upstream", "upstream_row", "held", "held_row")),
        *((name, ctypes.c_int64) for name in ("values", "gradient", "gradient_row", "scratch", "scratch_task")),
        *((name, ctypes.c_double) for name in ("temperature", "student_temperature", "kd_weight", "ce_weight")),
        ("uniform_mass", ctypes.c_double),
    )


# What is kept of each block, in float64.
S_TOP, T_TOP, SUM_1, SUM_S, SUM_T, GAP, OFFSET, MASS, SHARED, STATISTICS = range(10)


# ---- loops over one block


@njit(**EXACT)
def _load(address, kind, out):
    """Copy stored classes to ``out`` as wide; returns their maximum, at least the lowest finite number.

    Maxima of floats do not vectorise while nan is possible, maxima of integers do: as an integer a float ≥ 0 grows with
    its value and a float < 0 falls. What comes out for a row with nan does not matter: its exponentials are nan.
    """
    long_vectors()
    wide = out.dtype.type
    high, low = bits(wide(-0.0)), bits(wide(-np.inf))
    if kind == HALF:
        stored = view(address, out.size, np.uint16)
        for i in range(out.size):
            out[i] = widen_half(stored[i])
    elif kind == BFLOAT:
        stored = view(address, out.size, np.uint16)
        for i in range(out.size):
            out[i] = widen_bfloat(stored[i])
    elif kind == FLOAT:
        single = view(address, out.size, np.float32)
        for i in range(out.size):
            out[i] = single[i]
    else:
        double = view(address, out.size, np.float64)
        for i in range(out.size):
            out[i] = double[i]
    for i in range(out.size):
        word = bits(out[i])
        high, low = max(high, word), min(low, word)
    return max(from_bits(low if high < 0 else high), wide(np.finfo(wide).min))


@njit(**SUMS)
def _exponentials(s, top, scale, lowest):
    """Replace s by ``2^((s - top) scale)``; returns their sum and that of ``s - top``."""
    long_vectors()
    total = offset = s.dtype.type(0)
    for i in range(s.size):
        below = s[i] - top
        s[i] = exp2(below, scale, lowest)
        total += s[i]
        offset += below
    return total, offset


@njit(**SUMS)
def _exponential_pairs(s, t, s_top, t_top, s_scale, t_scale, s_lowest, t_lowest, ratio):
    """The same for student and teacher, with ``sum e_t ((t - t_top) ratio - (s - s_top))``, 0 for classes at e_t = 0."""
    long_vectors()
    nothing = s.dtype.type(0)
    s_total = t_total = gap = offset = nothing
    for i in range(s.size):
        s_below, t_below = s[i] - s_top, t[i] - t_top
        s[i] = exp2(s_below, s_scale, s_lowest)
        weight = exp2(t_below, t_scale, t_lowest)
        t[i] = weight
        s_total += s[i]
        t_total += weight
        offset += s_below
        product = weight * (t_below * ratio - s_below)
        gap += nothing if t_below < t_lowest else product
    return s_total, t_total, gap, offset


@njit(**SUMS)
def _power_sum(e, power):
    """``sum e^(2^power)``."""
    long_vectors()
    total = e.dtype.type(0)
    if power == 1:
        for i in range(e.size):
            total += e[i] * e[i]
    elif power == 2:
        for i in range(e.size):
            square = e[i] * e[i]
            total += square * square
    else:
        for i in range(e.size):
            square = e[i] * e[i]
            fourth = square * square
            total += fourth * fourth
    return total


@njit(**SUMS)
def _share_sums(share, s, top):
    """``sum share`` and ``sum share (s - top)``, the latter over classes that have a share."""
    long_vectors()
    nothing = s.dtype.type(0)
    mass = total = nothing
    for i in range(s.size):
        mass += share[i]
        product = share[i] * (s[i] - top)
        total += nothing if share[i] == nothing else product
    return mass, total


@njit(**EXACT)
def _combine(e, power, whole, factor, constant):
    """Replace e by ``whole e^(2^power) + factor e - constant``; power < 1 is 0."""
    long_vectors()
    if power == 1:
        for i in range(e.size):
            e[i] = (whole * e[i] + factor) * e[i] - constant
    elif power == 2:
        for i in range(e.size):
            square = e[i] * e[i]
            e[i] = whole * (square * square) + (factor * e[i] - constant)
    elif power == 3:
        for i in range(e.size):
            square = e[i] * e[i]
            fourth = square * square
            e[i] = whole * (fourth * fourth) + (factor * e[i] - constant)
    else:
        for i in range(e.size):
            e[i] = (whole + factor) * e[i] - constant


@njit(**EXACT)
def _subtract(out, factor, other):
    """``out -= factor * other``."""
    long_vectors()
    for i in range(out.size):
        out[i] -= factor * other[i]


@njit(**EXACT)
def _narrow(address, kind, source):
    """Write wide classes to where 16-bit ones are stored, rounded once."""
    long_vectors()
    stored = view(address, source.size, np.uint16)
    if kind == HALF:
        for i in range(source.size):
            stored[i] = narrow_half(source[i])
    else:
        for i in range(source.size):
            stored[i] = narrow_bfloat(source[i])


# ---- one block, one row, one task


@njit(**EXACT)
def _shares(job, row, first, share):
    """Write ``w_k ((1 - eps) q_k + eps / K)`` of the classes from ``first`` on; a label's own part is left out."""
    long_vectors()
    wide = share.dtype.type
    even = wide(job.uniform_mass / job.classes)
    if job.shares:
        _load(job.shares + row * job.shares_row + first * job.shares_item, job.shares_kind, share)
        kept = wide(1 - job.uniform_mass)
        for i in range(share.size):
            share[i] = kept * share[i] + even
    else:
        share[:] = even
    if job.class_weight:
        weight = view(job.class_weight + first * job.wide_bytes, share.size, wide)
        for i in range(share.size):
            share[i] *= weight[i]


@njit(**EXACT)
def _first_pass(job, row, first, s, t, third, share, found):
    """Exponentials of one block into s, t and third; its statistics into ``found``."""
    wide = s.dtype.type
    lowest = wide(-127 if job.wide_bytes == 4 else -1023)
    top = _load(job.student + row * job.student_row + first * job.student_item, job.student_kind, s)
    found[S_TOP] = top
    if job.dense:
        _shares(job, row, first, share)
        found[MASS], found[SHARED] = _share_sums(share, s, top)
    if job.power < 0:
        third[:] = s
        scale = wide(LOG2_E)
        found[SUM_1] = _exponentials(third, top, scale, lowest / scale)[0]
    scale = wide(LOG2_E / job.student_temperature)
    if job.teacher:
        t_top = _load(job.teacher + row * job.teacher_row + first * job.teacher_item, job.teacher_kind, t)
        found[T_TOP] = t_top
        t_scale, ratio = wide(LOG2_E / job.temperature), wide(job.student_temperature / job.temperature)
        found[SUM_S], found[SUM_T], found[GAP], found[OFFSET] = _exponential_pairs(
            s, t, top, t_top, scale, t_scale, lowest / scale, lowest / t_scale, ratio
        )
    else:
        found[SUM_S], found[OFFSET] = _exponentials(s, top, scale, lowest / scale)
    if job.power >= 0:
        found[SUM_1] = _power_sum(s, job.power) if job.power > 0 else found[SUM_S]


@njit(**EXACT)
def _label_share(job, label, wide):
    """What the label's class has beyond the others: ``w_y (1 - eps)``."""
    weight = view(job.class_weight + label * job.wide_bytes, 1, wide)[0] if job.class_weight else wide(1)
    return weight * (1 - job.uniform_mass)


@njit(**EXACT)
def _cross_entropy(job, row, label, found, s_top, total, logit):
    """``(sum share, ce)`` from the blocks' statistics; ``total`` is ``sum e^(s - s_top)``, ``logit`` room for one."""
    mass = shared = 0.0
    if job.dense:
        for block in found:
            mass += block[MASS]
            shared += block[SHARED] + block[MASS] * (block[S_TOP] - s_top)
    elif job.uniform_mass > 0:  # never 0 * inf where a class is masked and nothing is smoothed
        for b in range(len(found)):
            size = min(job.classes - b * BLOCK, BLOCK)
            shared += found[b, OFFSET] + size * (found[b, S_TOP] - s_top)
        mass, shared = job.uniform_mass, shared * (job.uniform_mass / job.classes)
    if label >= 0:
        _load(job.student + row * job.student_row + label * job.student_item, job.student_kind, logit)
        share = _label_share(job, label, logit.dtype.type)
        mass += share
        if logit[0] == -np.inf and share != 0:
            shared = -np.inf  # also where eps > 1 makes the label's own part negative
        elif share != 0:
            shared += share * (logit[0] - s_top)
    return mass, mass * math.log(total) - shared


@njit(**EXACT)
def _fill(job, row, value):
    """A row of zeros or nan in the gradient, if there is one."""
    if not job.gradient:
        return
    address = job.gradient + row * job.gradient_row
    if job.student_kind == DOUBLE:
        view(address, job.classes, np.float64)[:] = value
    elif job.student_kind == FLOAT:
        view(address, job.classes, np.float32)[:] = np.float32(value)
    else:  # 0x7FFF is nan in both
        view(address, job.classes, np.uint16)[:] = np.uint16(0 if value == 0 else 0x7FFF)


@njit(**EXACT)
def _places(job, row, last, scratch):
    """Where the blocks of s, t and third of a row are stored: three addresses, then the bytes a class moves them by.

    A wide student's exponentials go where its gradient will be. The others go to the scratch, which holds one block,
    or, for rows of several blocks, to the gradient rows after this one, which are not written yet: full rows of
    scratch would be more than the 1 % of memory that is allowed. Where too few rows are left, the second pass computes
    every block again; the last flag says that it must.
    """
    width = job.wide_bytes
    size = min(job.classes, BLOCK) * width
    s, t, third = scratch, scratch + size, scratch + 2 * size
    own = job.gradient and job.student_kind >= FLOAT
    several = job.classes > BLOCK
    spare = job.gradient + (row + 1) * job.gradient_row
    spare += -spare % width
    full = job.classes * width
    needed = (0 if own else full) + (full if job.teacher else 0) + (full if job.power < 0 else 0)
    fits = not job.held and spare + needed <= job.gradient + last * job.gradient_row
    s_step = rest_step = 0
    if several and job.gradient and fits:
        rest_step = width
        if not own:
            s, spare = spare, spare + full
        t = spare
        third = spare + (full if job.teacher else 0)
        s_step = width
    if own:
        s, s_step = job.gradient + row * job.gradient_row, width
    return s, t, third, s_step, rest_step, several and not fits


@njit(**EXACT)
def _row(job, row, last, scratch, wide):
    """Loss, terms and gradient of one row."""
    values = view(job.values, 3 * job.rows, wide)
    upstream = float(view(job.upstream + row * job.upstream_row, 1, wide)[0])
    if job.held and upstream == view(job.held + row * job.held_row, 1, wide)[0]:
        return
    label = -1
    if job.labels:
        label = view(job.labels + row * job.labels_row, 1, np.int64)[0]
        ignored = label == job.ignore_index
        if ignored or label < 0 or label >= job.classes:
            value = 0.0 if ignored else np.nan
            for i in range(3):
                values[i * job.rows + row] = wide(value)
            _fill(job, row, value)
            return

    blocks = (job.classes + BLOCK - 1) // BLOCK
    found = view(scratch, (blocks + 1) * STATISTICS, np.float64).reshape((blocks + 1, STATISTICS))
    room = scratch + blocks * STATISTICS * 8
    scratch += (blocks + 1) * STATISTICS * 8
    share_at = scratch + 3 * min(job.classes, BLOCK) * job.wide_bytes
    s_at, t_at, third_at, s_step, rest_step, again = _places(job, row, last, scratch)
    for b in range(blocks):
        first = b * BLOCK
        size = min(job.classes - first, BLOCK)
        s = view(s_at + first * s_step, size, wide)
        t = view(t_at + first * rest_step, size, wide)
        third = view(third_at + first * rest_step, size, wide)
        _first_pass(job, row, first, s, t, third, view(share_at, size, wide), found[b])

    temperature, student_temperature = job.temperature, job.student_temperature
    s_top = t_top = -np.inf
    for b in range(blocks):
        s_top, t_top = max(s_top, found[b, S_TOP]), max(t_top, found[b, T_TOP])
    sum_1 = sum_s = sum_t = gap = 0.0
    for b in range(blocks):
        # From here on these three are what brings a block's exponentials to the row's maximum.
        s_below = (found[b, S_TOP] - s_top) / student_temperature
        whole, soft = math.exp(found[b, S_TOP] - s_top), math.exp(s_below)
        sum_1 += found[b, SUM_1] * whole
        sum_s += found[b, SUM_S] * soft
        found[b, SUM_1], found[b, SUM_S] = whole, soft
        if job.teacher:
            t_below = (found[b, T_TOP] - t_top) / temperature
            teacher = math.exp(t_below)
            part = found[b, SUM_T]
            gap += teacher * (found[b, GAP] / student_temperature + part * (t_below - s_below))
            sum_t += part * teacher
            found[b, SUM_T] = teacher

    mass = ce = kd = 0.0
    if job.ce_weight > 0:
        mass, ce = _cross_entropy(job, row, label, found[:blocks], s_top, sum_1, view(room, 1, wide))
    if job.teacher:
        kd = student_temperature**2 * (gap / sum_t - math.log(sum_t) + math.log(sum_s))
    values[row] = wide(job.ce_weight * ce + job.kd_weight * kd)
    values[job.rows + row], values[2 * job.rows + row] = wide(ce), wide(kd)
    if not job.gradient:
        return

    ce_scale, kd_scale = upstream * job.ce_weight, upstream * job.kd_weight * student_temperature
    for b in range(blocks):
        first = b * BLOCK
        size = min(job.classes - first, BLOCK)
        s = view(s_at + first * s_step, size, wide)
        t = view(t_at + first * rest_step, size, wide)
        third = view(third_at + first * rest_step, size, wide)
        share = view(share_at, size, wide)
        if again:
            _first_pass(job, row, first, s, t, third, share, found[blocks])
        whole = ce_scale * mass / sum_1 * found[b, SUM_1] if job.ce_weight > 0 else 0.0
        soft = kd_scale / sum_s * found[b, SUM_S] if job.teacher else 0.0
        even = 0.0 if job.dense else ce_scale * job.uniform_mass / job.classes
        if job.power < 0:
            _combine(s, 0, wide(0), wide(soft), wide(even))
            _subtract(s, wide(-whole), third)
        else:
            _combine(s, job.power, wide(whole), wide(soft), wide(even))
        if job.teacher:
            _subtract(s, wide(kd_scale / sum_t * found[b, SUM_T]), t)
        if job.dense:
            _shares(job, row, first, share)
            _subtract(s, wide(ce_scale), share)
        if first <= label < first + size:
            s[label - first] -= wide(ce_scale * _label_share(job, label, wide))
        if job.student_kind < FLOAT:
            _narrow(job.gradient + row * job.gradient_row + first * 2, job.student_kind, s)


@njit(**EXACT)
def _work(counter, job, wide):
    """Take tasks, each a range of rows, until none is left: right for any number of threads that come."""
    task = take(counter)
    while task < job.tasks:
        last = job.rows * (task + 1) // job.tasks
        for row in range(job.rows * task // job.tasks, last):
            _row(job, row, last, job.scratch + task * job.scratch_task, wide)
        task = take(counter)


def _work_single(job):
    _work(job, carray(job, (1,))[0], np.float32)


def _work_double(job):
    _work(job, carray(job, (1,))[0], np.float64)


def compile_work(single):
    """The C function ``void work(Job *)`` for float32 or float64 rows; compiled once and kept on disk where possible."""
    function = _work_single if single else _work_double
    signature = types.void(types.CPointer(from_dtype(np.dtype(Job))))
    try:
        return cfunc(signature, cache=True, **EXACT)(function)
    except RuntimeError:  # neither the folder of this file nor the user's cache can be written
        return cfunc(signature, **EXACT)(function)
