"""The distillation loss on a CPU: packs a call for the compiled rows of cpu_kernel.py and spreads it over threads.

Shapes: ``N`` rows, ``K`` classes. ``wide`` is float64 for a float64 student, else float32.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
from torch import Tensor

from kd.losses.kernels.cpu_kernel import BFLOAT, BLOCK, HALF, WIDE, Block, Job, compile_work
from kd.losses.reference import Inputs, Numbers, wide_dtype

# In a forked child, such as a DataLoader's worker, the threads of OpenMP and of the pool do not exist.
_PROCESS = os.getpid()
SMALL = 32768  # logits in all below which a second thread costs more than it saves
KINDS = {torch.float16: HALF, torch.bfloat16: BFLOAT}  # read as they are stored; all others are cast to wide first
POWERS = {1.0: 0, 2.0: 1, 4.0: 2, 8.0: 3}  # student temperatures for which e^s comes from e^(s/Ts) by squaring


def rows(
    inputs: Inputs, upstream: Tensor, numbers: Numbers, *, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss, ce, kd, gradient)``: wide ``(N,)`` three times, and ``(N, K)`` in the student's dtype.

    The gradient of row i is ``upstream[i] * d loss_i / d student_i``, rounded once; its shape is ``(0, K)`` without
    ``with_gradient``. The formula is that of kd.losses.reference; ce and kd are unweighted, and 0 where their weight is
    0.

    Rows may lie apart in any way. Logits and probabilities are copied first where the classes of a row are not
    contiguous.
    """
    student = inputs.student
    gradient = student.new_empty(student.shape if with_gradient else (0, student.shape[1]))
    loss, ce, kd = _launch(gradient if with_gradient else None, None, upstream, inputs, numbers).unbind()
    return loss, ce, kd, gradient


def adjust(gradient: Tensor, held: Tensor, upstream: Tensor, inputs: Callable[[], Inputs], numbers: Numbers) -> None:
    """Change a gradient of ``rows`` in place from the upstream gradient ``held`` (N,) to ``upstream`` (N,).

    Rows where both are equal are not touched. Wide rows are multiplied by ``upstream / held`` where that is safe. Rows
    of 16 bits are computed again, because they may be rounded only once and may have lost everything to underflow.
    """
    if torch.equal(held, upstream):
        return
    if gradient.dtype == held.dtype:
        # Beyond these bounds held may have pushed the row's values out of float32's range.
        usable = (held.abs() > 2.0**-40) & (held.abs() < 2.0**40) & (upstream.abs() < 2.0**40)
        factor = torch.where(usable & (upstream != held), upstream / held, 1)
        if (factor != 1).any():
            gradient.mul_(factor.unsqueeze(1))
        held = torch.where(usable, upstream, held)
    if not torch.equal(held, upstream):
        _launch(gradient, held, upstream, inputs(), numbers)


def _launch(gradient: Tensor | None, held: Tensor | None, upstream: Tensor, inputs: Inputs, numbers: Numbers) -> Tensor:
    """Compute all rows, or those where ``held`` differs from ``upstream``; returns loss, ce and kd as ``(3, N)``."""
    student, teacher, target, class_weight = inputs
    count, classes = student.shape
    wide = wide_dtype(student)
    values = student.new_empty((3, count), dtype=wide)
    if count == 0:
        return values
    temperature, student_temperature, kd_weight, ce_weight, uniform_mass, ignore_index = numbers
    if teacher is None and ce_weight == 0:
        if gradient is not None:
            gradient.zero_()
        return values.zero_()
    if teacher is None:
        student_temperature = 1.0
    soft = target.is_floating_point()
    if ce_weight == 0:
        class_weight, uniform_mass = None, 0.0
    dense = ce_weight > 0 and (soft or (class_weight is not None and uniform_mass > 0))
    power = POWERS.get(student_temperature, -1) if ce_weight > 0 else 0

    job = Job(rows=count, classes=classes, wide_bytes=wide.itemsize, power=power, dense=dense)
    job.values = values.data_ptr()
    student = _place(job, "student", student, wide)  # the name keeps a possible copy alive
    if teacher is not None:
        teacher = _place(job, "teacher", teacher, wide)
    if soft and dense:
        target = _place(job, "shares", target, wide)
    if not soft:
        job.labels, job.labels_row, job.ignore_index = target.data_ptr(), target.stride(0) * 8, ignore_index
    if class_weight is not None:
        class_weight = class_weight.to(wide).contiguous()
        job.class_weight = class_weight.data_ptr()
    job.upstream, job.upstream_row = upstream.data_ptr(), upstream.stride(0) * wide.itemsize
    if held is not None:
        job.held, job.held_row = held.data_ptr(), held.stride(0) * wide.itemsize
    if gradient is not None:
        job.gradient, job.gradient_row = gradient.data_ptr(), classes * gradient.itemsize
    job.temperature, job.student_temperature = temperature, student_temperature
    job.kd_weight, job.ce_weight, job.uniform_mass = kd_weight, ce_weight, uniform_mass

    threads = min(torch.get_num_threads(), count) if count * classes >= SMALL and os.getpid() == _PROCESS else 1
    statistics = (-(-classes // BLOCK) + 1) * ctypes.sizeof(Block)
    narrow = student.dtype != wide or (teacher is not None and teacher.dtype != wide)
    # s and t; their wide copies; the third exponential and the shares.
    stored = (6 if dense or power < 0 else 4 if narrow else 2) * min(classes, BLOCK) * wide.itemsize
    job.tasks, job.scratch_task = threads, statistics + stored + 63 & ~63
    scratch = values.new_empty(threads * job.scratch_task, dtype=torch.uint8)
    job.scratch = scratch.data_ptr()
    _spread(_compiled(wide)[0], job, threads)
    return values


def _place(job: Job, name: str, matrix: Tensor, wide: torch.dtype) -> Tensor:
    """Enter a matrix into the job; returns it, or the copy whose address was entered."""
    if matrix.dtype not in KINDS and matrix.dtype != wide:
        matrix = matrix.to(wide)
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        matrix = matrix.contiguous()
    setattr(job, name, matrix.data_ptr())
    setattr(job, f"{name}_row", matrix.stride(0) * matrix.itemsize)
    setattr(job, f"{name}_item", matrix.itemsize)
    setattr(job, f"{name}_kind", KINDS.get(matrix.dtype, WIDE))
    return matrix


@functools.cache
def _compiled(wide: torch.dtype) -> tuple[Callable, object]:
    """The compiled rows as a ctypes function, which runs without the GIL, and the owner of its code."""
    owner = compile_work(wide == torch.float32)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(cast(int, owner.address)), owner


@functools.cache
def _openmp() -> Callable | None:
    """``GOMP_parallel`` of the OpenMP that torch's own operators use; None where torch has another OpenMP.

    After a torch operator its threads spin for some ms, waiting for more work, and any other thread would have to share
    the cores with them: after a torch.add, a prototype's 128 x 21841 float32 took 4.7 ms on a pool of its own and 2.6
    ms on these threads (2 cores). Starting the work takes 3 us here and 15 us on a pool.
    """
    try:  # the system looks for it in the libraries that torch's own needs
        parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except AttributeError:
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kd")


def _spread(work: Callable, job: Job, threads: int) -> None:
    """Run ``work(job)`` on this many threads, including this one; each takes tasks until none is left."""
    address = ctypes.addressof(job)
    if threads == 1:
        work(address)
        return
    parallel = _openmp()
    if parallel is not None:
        parallel(work, address, threads, 0)
        return
    others = [_pool().submit(work, address) for _ in range(threads - 1)]
    work(address)
    for other in others:
        other.result()
