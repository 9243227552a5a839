"""The compiled part of the CPU backend: loss and gradient of a row together, every exponential computed once.

A row is processed in blocks of 1024 classes, which fit the first-level cache. The first pass takes each block's
maximum m, stores ``e^{(s-m)/Ts}`` and ``e^{(t-m)/T}`` and sums them; the second turns the stored values into the
gradient. ``e^s`` is a power of ``e^{s/Ts}`` where Ts is 1, 2, 4 or 8, else a third exponential. Sums within a block are
in the wide type, sums over blocks in float64. One thread computes a row, so that the number of threads does not change
a bit of the result.

All compiled code is in this one file, because numba's cache on disk compares the date of one file only. There are few
functions, and helpers are intrinsics, because each function adds 0.1 s or more to a new user's first call.

Shapes: ``N`` rows, ``K`` classes. ``wide`` is np.float64 for a float64 student, else np.float32.
"""

# pyrefly: ignore-errors
# (numba infers the types; intrinsics and Structures have other types in compiled code than in Python)

import ctypes
import math

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array

BLOCK = 1024  # 4 KiB of float32: two stored blocks and the logits read fit the first-level cache of 32 KiB
LOG2_E = math.log2(math.e)
LOWEST32 = -3.4028234663852886e38  # the lowest finite number
LOWEST64 = -1e300  # still finite when divided by the lowest temperature

# No assumptions about nan or inf, and no reordering: it may remove the rounding in exp2.
EXACT = {"error_model": "numpy", "fastmath": {"contract"}}
# Called from compiled code only.
INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **EXACT}
# The sum of a loop may be split over the lanes of a vector, always in the same way, so that bits repeat.
SUMS = INNER | {"fastmath": {"contract", "reassoc", "nsz"}}

HALF, BFLOAT, WIDE = range(3)  # how a matrix is stored


class Job(ctypes.Structure):
    """One call, as the compiled code reads it. An address of 0 means absent; strides are in bytes."""

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


class Block(ctypes.Structure):
    """The sums kept of one block. Those of exponentials are relative to its maxima ``s_top`` and ``t_top``."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("s_top", "t_top", "sum_1", "sum_s", "sum_t", "gap", "offset")),
        *((name, ctypes.c_double) for name in ("mass", "shared")),
    )


JOB, BLOCKS = np.dtype(Job), np.dtype(Block)
BLOCK_BYTES = ctypes.sizeof(Block)


# ---- below numba's own language


@intrinsic
def view(_typing, address, count, kind):
    """The memory at this address as an array of one dimension."""
    result = types.Array(kind.dtype, 1, "C")

    def build(context, builder, signature, arguments):
        array = context.make_array(result)(context, builder)
        size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(result.dtype)))
        data = builder.inttoptr(arguments[0], context.get_data_type(result.dtype).as_pointer())
        populate_array(array, data=data, shape=[arguments[1]], strides=[size], itemsize=size, meminfo=None)
        return array._getvalue()

    return result(types.int64, types.int64, kind), build


@intrinsic
def recast(_typing, value, kind):
    """The same bits as a number of another kind."""

    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(kind.dtype))

    return kind.dtype(value, kind), build


@intrinsic
def take(_typing, counter):
    """Add 1 atomically to the int64 at this pointer; returns the value before."""

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
def inlined(_typing):
    """Compile the calling function into its callers, with vectors of 512 bits where there are, for any addresses.

    Numba also compiles each function by itself. A process that has just compiled would call those copies, and a process
    that loads the cache the ones in the cached file. The latter are optimised once more and sum in another order, so
    that a resumed run would have other bits. Inlined, there is only one copy; it adds 3 s to a new user's first call.

    The function's arrays must not overlap. Otherwise LLVM would test whether they do, take a slow loop where two of
    them are merely close, and sum in another order there: bits would depend on addresses. By default LLVM prefers 256
    bits for the sake of older machines. Measured on one core (Sapphire Rapids), 1024 float32 classes in cache: the two
    exponentials and their sums 0.58 -> 0.44 ns a class, the gradient 0.11 -> 0.07.
    """

    def build(context, builder, signature, arguments):
        # llvmlite accepts known attributes only; this one goes past its check.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        builder.function.attributes.add("alwaysinline")
        for argument in builder.function.args:
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        return context.get_dummy_value()

    return types.void(), build


def exp2(value, scale, lowest):
    """``2 ** (value * scale)`` for ``value * scale <= 0``, and exactly 0 below ``value = lowest``.

    ``lowest`` is -127 / scale (float64: -1023 / scale). With n the nearest integer and f the rest, 2^f is a polynomial
    (relative error 9e-8, float64: 1e-19) and 2^n is made from bits: adding a number whose last digit is worth 1 rounds
    to n and leaves n plus the exponent's bias in the lowest bits.
    """
    raise NotImplementedError


ROUND32 = np.float32(1.5 * 2**23 + 127)
ROUND64 = 1.5 * 2**52 + 1023
TERMS32 = (0.0013264727197220586, 0.00967151263964708, 0.05550733743251851, 0.2402224208537507, 0.6931469775991642, 1)
POWERS32 = tuple(np.float32(term) for term in TERMS32)
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


@overload(exp2, jit_options=INNER)
def _exp2(value, scale, lowest):
    single = value == types.float32
    kind, integer, shift = (np.float32, np.int32, 23) if single else (np.float64, np.int64, 52)
    bias, powers = (ROUND32, POWERS32) if single else (ROUND64, POWERS64)

    def build(value, scale, lowest):
        value = lowest if value < lowest else value  # in this order nan stays nan
        rounded = multiply_add(value, scale, bias)
        rest = multiply_add(value, scale, bias - rounded)
        power = powers[0]
        for i in range(1, len(powers)):
            power = power * rest + powers[i]
        return power * recast(integer(recast(rounded, integer) << shift), kind)  # numba shifts in int64

    return build


# ---- loops over one block


@njit(**INNER)
def _wide(address, kind, out):
    """The classes stored at this address in the wide type: in place if they have it, else copied to ``out``."""
    if kind == WIDE:
        return view(address, out.size, out.dtype.type)
    inlined()
    if kind == HALF:
        stored = view(address, out.size, np.uint16)
        for i in range(out.size):
            word = np.uint32(stored[i])
            exponent = word & np.uint32(0x7C00)
            magnitude = np.uint32(((word & np.uint32(0x7FFF)) << 13) + 0x38000000)  # the biases are 112 apart
            if exponent == 0x7C00:  # inf and nan
                magnitude = np.uint32(magnitude + 0x38000000)
            if exponent == 0:  # subnormal: read as 2^-14 and more, which is taken off again
                magnitude = recast(
                    recast(np.uint32(magnitude + 0x00800000), np.float32) - np.float32(2.0**-14), np.uint32
                )
            out[i] = recast(np.uint32(magnitude | ((word & np.uint32(0x8000)) << 16)), np.float32)
    else:
        stored = view(address, out.size, np.uint16)
        for i in range(out.size):
            out[i] = recast(np.uint32(np.uint32(stored[i]) << 16), np.float32)
    return out


@njit(**INNER)
def _maximum(values, integer):
    """The maximum, at least the lowest number.

    The maximum of floats does not vectorise where nan is possible, that of integers does: the bits of a float ≥ 0, read
    as an integer, grow with its value, those of a float < 0 fall. The result for a row with nan does not matter,
    because its exponentials are nan.
    """
    inlined()
    wide = values.dtype.type
    high, low = recast(wide(-0.0), integer), recast(wide(-np.inf), integer)
    for i in range(values.size):
        word = recast(values[i], integer)
        high = word if word > high else high
        low = word if word < low else low
    top = recast(low if high < 0 else high, wide)
    lowest = wide(LOWEST32 if values.itemsize == 4 else LOWEST64)
    return top if top > lowest else lowest


@njit(**INNER)
def _store(address, kind, source):
    """Write wide classes to where 16-bit ones are stored: the nearest, ties to even."""
    inlined()
    stored = view(address, source.size, np.uint16)
    if kind == HALF:
        for i in range(source.size):
            word = recast(np.float32(source[i]), np.uint32)
            magnitude = np.uint32(word & np.uint32(0x7FFFFFFF))
            odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
            normal = np.uint32(np.uint32(magnitude + odd - np.uint32(0x37FFF001)) >> np.uint32(13))
            # Subnormals come in steps of 2^-24, the last digit of a float32 at 1/2.
            small = np.uint32(
                recast(recast(magnitude, np.float32) + np.float32(0.5), np.uint32) - np.uint32(0x3F000000)
            )
            nearest = small if magnitude < np.uint32(0x38800000) else normal
            nearest = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else nearest  # inf from 65520 on
            nearest = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else nearest
            stored[i] = np.uint16(nearest | np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(0x8000)))
    else:
        for i in range(source.size):
            value = np.float32(source[i])
            word = recast(value, np.uint32)
            nearest = np.uint32(word + 0x7FFF + ((word >> 16) & 1)) >> 16
            stored[i] = np.uint16(nearest if value == value else 0x7FC0)


@njit(**SUMS)
def _exponentials(s, e, top, scale, lowest):
    """Write ``2^((s - top) scale)`` to e; returns their sum and that of ``s - top``."""
    inlined()
    total = offset = s.dtype.type(0)
    for i in range(s.size):
        below = s[i] - top
        power = exp2(below, scale, lowest)
        e[i] = power
        total += power
        offset += below
    return total, offset


@njit(**SUMS)
def _exponential_pairs(s, t, s_e, t_e, s_top, t_top, s_scale, t_scale, s_lowest, t_lowest, t_least, ratio):
    """The same for both, and ``sum e_t ((t - t_top) ratio - (s - s_top))``, to which a class below t_least adds 0."""
    inlined()
    nothing = s.dtype.type(0)
    s_total = t_total = gap = offset = nothing
    for i in range(s.size):
        s_below, t_below = s[i] - s_top, t[i] - t_top
        power = exp2(s_below, s_scale, s_lowest)
        weight = exp2(t_below, t_scale, t_lowest)
        s_e[i] = power
        t_e[i] = weight
        s_total += power
        t_total += weight
        offset += s_below
        product = weight * (t_below * ratio - s_below)
        gap += nothing if t_below < t_least else product
    return s_total, t_total, gap, offset


@njit(**SUMS)
def _power_sum(e, power):
    """``sum e^(2^power)`` for a power of 1, 2 or 3."""
    inlined()
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
    inlined()
    nothing = s.dtype.type(0)
    mass = total = nothing
    for i in range(s.size):
        mass += share[i]
        product = share[i] * (s[i] - top)
        total += nothing if share[i] == nothing else product
    return mass, total


@njit(**INNER)
def _combine(e, power, whole, soft, even, other, factor):
    """Replace e by ``whole e^(2^power) + soft e - even - factor other``, for a power of 0 to 3; other may be None."""
    inlined()
    nothing = e.dtype.type(0)
    if power == 0:
        for i in range(e.size):
            e[i] = (whole + soft) * e[i] - even - (nothing if other is None else factor * other[i])
    elif power == 1:
        for i in range(e.size):
            e[i] = (whole * e[i] + soft) * e[i] - even - (nothing if other is None else factor * other[i])
    elif power == 2:
        for i in range(e.size):
            square = e[i] * e[i]
            rest = soft * e[i] - even - (nothing if other is None else factor * other[i])
            e[i] = whole * (square * square) + rest
    else:
        for i in range(e.size):
            square = e[i] * e[i]
            fourth = square * square
            rest = soft * e[i] - even - (nothing if other is None else factor * other[i])
            e[i] = whole * (fourth * fourth) + rest


@njit(**INNER)
def _subtract(out, factor, other):
    """``out -= factor * other``."""
    inlined()
    for i in range(out.size):
        out[i] -= factor * other[i]


# ---- one block, one row, all rows


@njit(**INNER)
def _shares(job, row, first, share):
    """Write ``w_k ((1 - eps) q_k + eps / K)`` of the classes from ``first`` on, without a label's own part."""
    inlined()
    wide = share.dtype.type
    even = wide(job.uniform_mass / job.classes)
    if job.shares:
        given = _wide(job.shares + row * job.shares_row + first * job.shares_item, job.shares_kind, share)
        kept = wide(1 - job.uniform_mass)
        for i in range(share.size):
            share[i] = kept * given[i] + even
    else:
        for i in range(share.size):
            share[i] = even
    if job.class_weight:
        weight = view(job.class_weight + first * job.wide_bytes, share.size, wide)
        for i in range(share.size):
            share[i] *= weight[i]


@njit(**INNER)
def _first_pass(job, row, first, s, t, third, share, s_read, t_read, block, integer):
    """Exponentials of one block into s, t and third, its sums into ``block``."""
    inlined()
    wide = s.dtype.type
    lowest = wide(-127 if job.wide_bytes == 4 else -1023)
    scale = wide(LOG2_E / job.student_temperature)
    student = _wide(job.student + row * job.student_row + first * job.student_item, job.student_kind, s_read)
    top = _maximum(student, integer)
    block.s_top = top
    if job.dense:
        _shares(job, row, first, share)
        block.mass, block.shared = _share_sums(share, student, top)
    if job.power < 0:
        block.sum_1 = _exponentials(student, third, top, wide(LOG2_E), lowest / wide(LOG2_E))[0]
    if job.teacher:
        at = job.teacher + row * job.teacher_row + first * job.teacher_item
        teacher = _wide(at, job.teacher_kind, t_read)
        t_top = _maximum(teacher, integer)
        block.t_top = t_top
        t_scale, ratio = wide(LOG2_E / job.temperature), wide(job.student_temperature / job.temperature)
        s_lowest, t_lowest, t_least = lowest / scale, lowest / t_scale, (lowest + wide(1)) / t_scale
        block.sum_s, block.sum_t, block.gap, block.offset = _exponential_pairs(
            student, teacher, s, t, top, t_top, scale, t_scale, s_lowest, t_lowest, t_least, ratio
        )
    else:
        block.sum_s, block.offset = _exponentials(student, s, top, scale, lowest / scale)
    if job.power >= 0:
        block.sum_1 = _power_sum(s, job.power) if job.power > 0 else block.sum_s


@njit(**INNER)
def _gap_again(job, row, one, s_top, t_top):
    """The gap of a row, class by class: what is inf beside its block's maximum may be nothing beside the row's."""
    least = (-126 if job.wide_bytes == 4 else -1022) / LOG2_E
    gap = 0.0
    for k in range(job.classes):
        s = float(_wide(job.student + row * job.student_row + k * job.student_item, job.student_kind, one)[0])
        t = float(_wide(job.teacher + row * job.teacher_row + k * job.teacher_item, job.teacher_kind, one)[0])
        below = (t - t_top) / job.temperature
        if not below < least:  # in this order nan stays nan
            gap += math.exp(below) * (below - (s - s_top) / job.student_temperature)
    return gap


@njit(**INNER)
def _cross_entropy(job, label, logit, label_share, sums, blocks, s_top, total):
    """``(sum share, ce)`` from the sums of the blocks; ``total`` is ``sum e^(s - s_top)``."""
    inlined()
    mass = shared = 0.0
    for b in range(blocks):
        size = min(job.classes - b * BLOCK, BLOCK)
        if job.dense:
            mass += sums[b].mass
            shared += sums[b].shared + sums[b].mass * (sums[b].s_top - s_top)
        elif job.uniform_mass > 0:  # never 0 * inf where a class is masked and nothing is smoothed
            mass = job.uniform_mass
            shared += (sums[b].offset + size * (sums[b].s_top - s_top)) * (mass / job.classes)
    if label >= 0 and label_share != 0:
        mass += label_share
        # Not the product: eps > 1 makes the label's own part negative, and inf - inf nan.
        shared = -np.inf if logit == -np.inf else shared + label_share * (logit - s_top)
    return mass, mass * math.log(total) - shared


@njit(**INNER)
def _places(job, row, last, scratch):
    """Where the blocks of s, t and third of a row are stored: three addresses, and what a class moves each by.

    A wide student's exponentials are stored where its gradient will be. The others go to the scratch, which holds one
    block. For rows of several blocks they go to the gradient rows after this one, which are not written yet, because
    full rows of scratch would exceed the 1 % of memory that is allowed. Where too few rows are left, the second pass
    computes every block again; the last flag says that it must.
    """
    inlined()
    width = job.wide_bytes
    size, full = min(job.classes, BLOCK) * width, job.classes * width
    s, t, third = scratch, scratch + size, scratch + 4 * size
    s_step = rest_step = 0
    own = job.gradient != 0 and job.student_kind == WIDE
    several = job.classes > BLOCK
    spare = job.gradient + (row + 1) * job.gradient_row
    spare += -spare % width
    needed = (0 if own else full) + (full if job.teacher else 0) + (full if job.power < 0 else 0)
    fits = not job.held and spare + needed <= job.gradient + last * job.gradient_row
    if several and job.gradient and fits:
        s, s_step = spare, width
        t = spare + (0 if own else full)
        third = t + (full if job.teacher else 0)
        rest_step = width
    if own:
        s, s_step = job.gradient + row * job.gradient_row, width
    return s, t, third, s_step, rest_step, several and not fits


@njit(**INNER)
def _empty_row(job, row, value, wide):
    """Write 0 for an ignored row, nan for a row whose label is not a class."""
    inlined()
    values = view(job.values, 3 * job.rows, wide)
    for i in range(3):
        values[i * job.rows + row] = value
    address = job.gradient + row * job.gradient_row
    if job.gradient and job.student_kind == WIDE:
        out = view(address, job.classes, wide)
        for i in range(out.size):
            out[i] = value
    elif job.gradient:
        stored = view(address, job.classes, np.uint16)
        for i in range(stored.size):
            stored[i] = np.uint16(0 if value == 0 else 0x7FFF)  # nan in both


@njit(**INNER)
def _row(job, row, last, scratch, wide, integer):
    """Loss, terms and gradient of one row."""
    inlined()
    upstream = float(view(job.upstream + row * job.upstream_row, 1, wide)[0])
    if job.held and upstream == view(job.held + row * job.held_row, 1, wide)[0]:
        return
    blocks = (job.classes + BLOCK - 1) // BLOCK
    sums = view(scratch, blocks + 1, BLOCKS)
    scratch += (blocks + 1) * BLOCK_BYTES
    label, label_share, logit = -1, 0.0, 0.0
    if job.labels:
        label = view(job.labels + row * job.labels_row, 1, np.int64)[0]
        ignored = label == job.ignore_index
        if ignored or label < 0 or label >= job.classes:
            _empty_row(job, row, wide(0 if ignored else np.nan), wide)
            return
        label_share = 1 - job.uniform_mass
        if job.class_weight:
            label_share *= view(job.class_weight + label * job.wide_bytes, 1, wide)[0]
        one = view(scratch, 1, wide)
        at = job.student + row * job.student_row + label * job.student_item
        logit = float(_wide(at, job.student_kind, one)[0])

    s_at, t_at, third_at, s_step, rest_step, again = _places(job, row, last, scratch)
    width = min(job.classes, BLOCK) * job.wide_bytes
    s_read, t_read, share_at = scratch + 2 * width, scratch + 3 * width, scratch + 5 * width
    for b in range(blocks):
        first = b * BLOCK
        size = min(job.classes - first, BLOCK)
        s = view(s_at + first * s_step, size, wide)
        t = view(t_at + first * rest_step, size, wide)
        third = view(third_at + first * rest_step, size, wide)
        share, student, teacher = view(share_at, size, wide), view(s_read, size, wide), view(t_read, size, wide)
        _first_pass(job, row, first, s, t, third, share, student, teacher, sums[b], integer)

    temperature, student_temperature = job.temperature, job.student_temperature
    s_top = t_top = -np.inf
    for b in range(blocks):
        s_top = max(s_top, sums[b].s_top)
        t_top = max(t_top, sums[b].t_top)
    sum_1 = sum_s = sum_t = gap = 0.0
    for b in range(blocks):
        # From here on these three bring a block's exponentials to the row's maximum.
        s_below = (sums[b].s_top - s_top) / student_temperature
        whole, soft = math.exp(sums[b].s_top - s_top), math.exp(s_below)
        sum_1 += sums[b].sum_1 * whole
        sum_s += sums[b].sum_s * soft
        sums[b].sum_1, sums[b].sum_s = whole, soft
        if job.teacher:
            t_below = (sums[b].t_top - t_top) / temperature
            teacher, part = math.exp(t_below), sums[b].sum_t
            gap += teacher * (sums[b].gap / student_temperature + part * (t_below - s_below))
            sum_t += teacher * part
            sums[b].sum_t = teacher
    if blocks > 1 and not abs(gap) < np.inf:
        gap = _gap_again(job, row, view(s_read, 1, wide), s_top, t_top)

    mass = ce = kd = 0.0
    if job.ce_weight > 0:
        mass, ce = _cross_entropy(job, label, logit, label_share, sums, blocks, s_top, sum_1)
    if job.teacher:
        kd = student_temperature**2 * (gap / sum_t - math.log(sum_t) + math.log(sum_s))
    values = view(job.values, 3 * job.rows, wide)
    values[row], values[job.rows + row], values[2 * job.rows + row] = job.ce_weight * ce + job.kd_weight * kd, ce, kd
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
            student, teacher = view(s_read, size, wide), view(t_read, size, wide)
            _first_pass(job, row, first, s, t, third, share, student, teacher, sums[blocks], integer)
        whole = ce_scale * mass / sum_1 * sums[b].sum_1 if job.ce_weight > 0 else 0.0
        soft = kd_scale / sum_s * sums[b].sum_s if job.teacher else 0.0
        even = 0.0 if job.dense else ce_scale * job.uniform_mass / job.classes
        power, factor = wide(0 if job.power < 0 else whole), wide(kd_scale / sum_t * sums[b].sum_t)
        if job.teacher:
            _combine(s, max(job.power, 0), power, wide(soft), wide(even), t, factor)
        else:
            _combine(s, max(job.power, 0), power, wide(soft), wide(even), None, factor)
        if job.power < 0:
            _subtract(s, wide(-whole), third)
        if job.dense:
            _shares(job, row, first, share)
            _subtract(s, wide(ce_scale), share)
        if first <= label < first + size:
            s[label - first] -= wide(ce_scale * label_share)
        if job.student_kind != WIDE:
            _store(job.gradient + row * job.gradient_row + first * 2, job.student_kind, s)


def compile_work(single):
    """The C function ``void work(Job *)`` for float32 or float64 rows: compiled once, and kept on disk if possible.

    It takes tasks, each a range of rows, until none is left, so any number of threads may call it.
    """
    wide, integer = (np.float32, np.int32) if single else (np.float64, np.int64)

    def work(job):
        inlined()
        this = carray(job, (1,))[0]
        task = take(job)
        while task < this.tasks:
            last = this.rows * (task + 1) // this.tasks
            for row in range(this.rows * task // this.tasks, last):
                _row(this, row, last, this.scratch + task * this.scratch_task, wide, integer)
            task = take(job)

    signature = types.void(types.CPointer(from_dtype(JOB)))
    try:
        return cfunc(signature, cache=True, **EXACT)(work)
    except RuntimeError:  # neither the folder of this file nor the user's cache is writable
        return cfunc(signature, **EXACT)(work)
