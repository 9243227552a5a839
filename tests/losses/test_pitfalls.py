"""Fourteen ways in which released fused losses were wrong, a test for each, here or in test_pitfalls_rows.py.

They are of the CPU backend, and of the reference where it could go wrong alike; each was seen red on a kernel broken
for it. What concerns the kernels of a GPU is tested in interpreted_triton.py, interpreted_loss.py and
test_triton_offline.py, for the same pitfalls by tests of these names:

1. upstream_of_any_stride, adjust_computes_changed_rows_anew_and_leaves_the_others, upstream_gradients
2. inputs_are_left_as_they_were_and_two_runs_agree
3. confident_rows, machine_code (nothing but float32 inside, rounded to nearest)
4. an_ignored_row_is_zero_whatever_is_in_it, a_label_that_is_no_class_gives_nan_and_is_not_followed, no_rows
5. masked_classes_are_as_in_the_reference, masks_of_the_lowest_finite_number, nan_in_gives_nan_out,
   extreme_logits_stay_finite, each_term_alone_and_neither
6. matrix
7. offsets_beyond_32_bits, any_number_of_classes, more_rows_than_one_program_takes, layout_does_not_matter, machine_code
   (a grid of one dimension, addresses that allow no vectors)
8. each_term_alone_and_neither, matrix (a teacher of another dtype)
9. matrix, values_alone_are_the_same_values
10. scalars_in_double_do_not_spread, nothing_that_changes_in_training_compiles_anew
11. nothing_waits_for_the_gpu, the_launch_is_on_the_device_of_the_logits, machine_code (at most 16 warps)
12. a_second_derivative_is_refused_and_a_retained_graph_gives_the_same_bits
13. matrix
14. identities
"""

import math
import re
from pathlib import Path

import pytest
import torch
from numba.core import event
from pitfalls import (
    DTYPES,
    F32,
    F64,
    FULL,
    NAN,
    assert_equal,
    assert_rounded_once,
    batch,
    both,
    every_dtype,
    gradient,
    results,
    truth,
    weights,
)
from torch._dynamo.testing import CompileCounterWithBackend

from kd import DistillLoss, distill_loss
from kd.losses.kernels import cpu


def test_the_tests_named_above_exist():
    folder = Path(__file__).parent
    files = ("interpreted_triton.py", "interpreted_loss.py", "test_triton_offline.py")
    exist = set(re.findall(r"^def test_(\w+)", "".join((folder / name).read_text() for name in files), re.M))
    lists = re.findall(r"^\d+\. (.*(?:\n   .*)*)", __doc__, re.M)
    assert len(lists) == 14
    named = [set(re.findall(r"\w+", re.sub(r"\([^)]*\)", "", names))) for names in lists]
    assert all(named)
    assert set().union(*named) <= exist


# ---- 1


@both
@every_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_01_upstream_gradient(backend, dtype, reduction):
    """Whatever comes from above, of any stride, and whatever the logits were made from."""
    s, t, y = batch(7, 5, dtype)
    y[2] = -100
    settings = {"reduction": reduction, "class_weight": weights(5), "kd_weight": 0.05, "ce_weight": 0.01, **FULL}
    wide = F64 if dtype == F64 else F32
    strided = torch.randn(14, generator=torch.Generator().manual_seed(1)).to(wide)[::2]
    ways = {
        "plain": lambda v: v.sum(),
        "scaled": lambda v: 0.37 * v.sum(),
        "zero": lambda v: 0 * v.sum(),
        "loss scale": lambda v: 2.0**16 * v.sum(),
        "squared": lambda v: v.square().sum(),
    }
    if reduction == "none":
        ways |= {
            "one row": lambda v: v[3],
            "random, strided": lambda v: (v * strided.to(v.dtype)).sum(),
            "expanded": lambda v: (v * strided[:1].expand(7).to(v.dtype)).sum(),
        }
    for way in ways.values():
        actual = results(s, t, y, way, backend=backend, **settings)[-1]
        assert actual.dtype == dtype
        assert_rounded_once(actual, truth(s, t, y, way, **settings)[-1])
    loss = DistillLoss(backend=backend, **settings)
    if reduction == "none":
        for upstream in (strided, strided[:1].expand(7), torch.zeros(7, dtype=wide)):
            exact = truth(s, t, y, lambda v, u=upstream: (v * u.double()).sum(), **settings)[-1]
            assert_rounded_once(gradient(loss(s, t, y), s, upstream), exact)
    before = gradient(loss(3 * s, t, y).sum(), s)
    exact = 3 * truth(3 * s, t, y, **settings)[-1]
    assert (before.double() - exact).abs().max() <= max(torch.finfo(dtype).eps, 1e-12) * exact.abs().max() * 2 + 1e-7


# ---- 2


@both
@every_dtype
def test_02_inputs_unchanged(backend, dtype):
    """Bits and version counters, whether the gradient made with the loss was the one that is wanted or not."""
    for k in (5, 1500):
        s, t, y = batch(6, k, dtype)
        weight, soft = weights(k), t.double().softmax(-1).to(dtype)
        inputs = s, t, y, weight, soft
        before = [(x.detach().clone(), x._version) for x in inputs]
        for target, upstream in ((y, 1.0), (y, 0.3), (soft, 1.0)):
            value = DistillLoss(class_weight=weight, backend=backend, **FULL)(s, t, target)
            for retain in (True, False):
                gradient(upstream * value, s, retain_graph=retain).zero_()  # its receiver may write to it
        for x, (value, version) in zip(inputs, before, strict=True):
            assert torch.equal(x.detach(), value)
            assert x._version == version


# ---- 6


@both
@every_dtype
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 20.0])
def test_06_temperature_squared(backend, dtype, temperature):
    """Softened p_s = (1/4, 3/4), p_t = (1/2, 1/2): T² KL = T² log(4/3) / 2, its gradient T (-1/4, 1/4)."""
    for given_temperature, ts in (({"temperature": temperature}, temperature), ({}, temperature)):
        settings = given_temperature or {"temperature": 7.0, "student_temperature": temperature}
        s = (ts * torch.tensor([[0.0, math.log(3)]], dtype=F64)).to(dtype)
        y = torch.tensor([1])
        found = results(s, torch.zeros_like(s), y, kd_weight=1.0, ce_weight=0.0, backend=backend, **settings)
        tolerance = {F64: 1e-14, F32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)  # s is rounded
        assert found[0].item() == pytest.approx(ts**2 * math.log(4 / 3) / 2, rel=2 * tolerance)
        assert found[3].tolist()[0] == pytest.approx([-ts / 4, ts / 4], rel=2 * tolerance)


# ---- 8


@both
@every_dtype
def test_08_teacher(backend, dtype):
    """Of any dtype; never with a gradient, another number of classes, or read where it has no weight."""
    for k in (5, 1030):
        s, t, y = batch(3, k, dtype)
        for other in DTYPES:
            found, exact = results(s, t.to(other), y, backend=backend, **FULL), truth(s, t.to(other), y, **FULL)
            assert found[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
            assert_rounded_once(found[3], exact[3])
    loss = DistillLoss(backend=backend)
    with pytest.raises(ValueError, match=r"teacher_logits\.requires_grad=True: must be False"):
        loss(s, t.clone().requires_grad_(), y)
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(3, 6\): must be \(3, 1030\)"):
        loss(s, t[:, :6], y)
    loss.kd_weight = 0.0
    without = loss(s, None, y)
    assert torch.equal(loss(s, torch.empty(3, 1030, device="meta"), y), without)  # it has no values
    assert torch.equal(loss(s, torch.full_like(t, NAN), y), without)


# ---- 10


def test_10_no_recompilation():
    """eps, temperatures, weights and sizes are runtime values of the kernel; the number of rows of torch.compile, too.

    Not so the settings there: each value of one that changes makes a graph of its own.
    """
    changes = [(6, 3.0, 0.1, 0.5), (4, 2.0, 0.3, 1.0), (9, 5.0, 0.2, 0.7), (5, 1.5, 0.4, 0.1)]
    for dtype in DTYPES:
        results(*batch(6, 5, dtype))  # the first call compiles
    with event.install_recorder("numba:compile") as compiled:
        for dtype in DTYPES:
            for n, temperature, eps, weight in changes:
                settings = {"temperature": temperature, "label_smoothing": eps, "ce_weight": weight}
                for k in (5, 1300):
                    results(*batch(n, k, dtype), **settings)
                    results(*batch(n, k, dtype), **settings, student_temperature=1.0, class_weight=weights(k))
    assert len(compiled.buffer) == 0
    assert cpu._compiled.cache_info().currsize <= 2

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    settings = {"temperature": 3.0, "label_smoothing": 0.1}
    loss = torch.compile(DistillLoss(**settings), fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for n, *_ in changes:
        s, t, y = batch(n, 5, F32)
        value = loss(s, t, y)
        assert value.dtype == F32
        torch.testing.assert_close(gradient(value, s), gradient(distill_loss(s, t, y, **settings), s))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], counts


# ---- 11


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_11_bits_repeat(threads, monkeypatch):
    """On every run, for any number of threads, and on the pool that stands in where torch has another OpenMP.

    Enough rows that threads are interrupted in the middle of one, also where there are fewer cores.
    """
    for dtype in DTYPES:
        for rows, runs, changed in ((31, (1, 2, 2, 5), {"student_temperature": 2.5}), (400, (1, 2, 8, 8, 8), {})):
            inputs = batch(rows, 3000, dtype)
            settings = {"class_weight": weights(3000), "label_smoothing": 0.1, "reduction": "none", **changed}
            found = []
            for count in runs:
                threads(count)
                found.append(results(*inputs, backend="cpu", **settings))
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "_openmp", lambda: None)
                found.append(results(*inputs, backend="cpu", **settings))
            for other in found[1:]:
                assert_equal(found[0], other)


# ---- 12


@both
@every_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_12_second_backward(backend, dtype, reduction):
    """A second derivative is an error or right, never a silent zero; a retained graph gives the same bits again."""
    s, t, y = batch(6, 5, dtype)
    loss = DistillLoss(reduction=reduction, backend=backend, **FULL)
    for scale in (1.0, 0.3):
        value = scale * loss(s, t, y).sum()
        first = gradient(value, s, retain_graph=True)
        kept = first.clone()
        first.zero_()  # its receiver owns it
        assert torch.equal(gradient(value, s, retain_graph=True), kept)
        assert torch.equal(gradient(value, s), kept)
    first = gradient(loss(s, t, y).sum(), s, create_graph=True)
    assert first.requires_grad
    if backend == "reference":
        if dtype == F64:
            assert torch.autograd.gradgradcheck(lambda z: loss(z, t, y), s)
        return
    message = "backend='cpu' has no second derivative: use backend='reference'"
    with pytest.raises(RuntimeError, match=message):
        first.square().sum().backward()
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda z: torch.func.grad(lambda x: loss(x, t, y).sum())(z).square().sum())(s.detach())
