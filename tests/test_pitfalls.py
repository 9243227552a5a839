"""Fourteen ways in which released fused losses were wrong, a test for each, by number.

Those below are of the CPU backend, and of the reference where it could go wrong alike; each was seen red on a kernel
broken for it. What concerns the kernels of a GPU is tested in interpreted_triton.py, interpreted_loss.py and
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
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numba.core import event
from torch._dynamo.testing import CompileCounterWithBackend

from kd import DistillLoss, distill_loss
from kd.losses import cpu

INF, NAN = math.inf, math.nan
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)
FULL = {"temperature": 3.0, "student_temperature": 2.0, "label_smoothing": 0.1, "smoothing": "others"}
both = pytest.mark.parametrize("backend", ["cpu", "reference"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def batch(n=6, k=5, dtype=F64, seed=0, scale=3.0):
    """Student, teacher and labels; class weights, one of them 0, are ``weights(k)``."""
    generator = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(n, k, generator=generator, dtype=F64) for _ in range(2))
    return s.to(dtype).requires_grad_(), t.to(dtype), torch.randint(k, (n,), generator=generator)


def weights(k):
    w = torch.linspace(0.2, 2.0, k)
    w[k // 2] = 0
    return w


def gradient(value, leaf, upstream=None, **settings):
    return torch.autograd.grad(value, leaf, upstream, **settings)[0]


def results(s, t, target, way=torch.sum, **settings):
    """``terms`` of the loss and the gradient of ``way(loss)``."""
    leaf = s.detach().requires_grad_()
    terms = DistillLoss(**settings).terms(leaf, t, target)
    return *(x if x is None else x.detach() for x in terms), gradient(way(terms.loss), leaf)


def truth(s, t, target, way=torch.sum, **settings):
    """The same from the reference in float64."""
    target = target.double() if target.is_floating_point() else target
    t = None if t is None else t.double()
    return results(s.double(), t, target, way, **settings | {"backend": "reference"})


def assert_rounded_once(actual, exact, floor=0.0):
    """Within half a last digit of the exact gradient, and what the arithmetic inside may be off a row's largest.

    ``floor`` is for rows where p - q cancels for every class: in units of float32's (float64's) last digit.
    """
    dtype, largest = actual.dtype, exact.abs().amax(-1, keepdim=True)
    digit = torch.finfo(dtype).eps / 2 * exact.abs() if dtype in (BF16, F16) else 0
    subnormal = 2.0**-25 if dtype == F16 else 0
    inside = 1e-12 if dtype == F64 else 1e-5
    off = (actual.double() - exact).abs()
    floor *= torch.finfo(F64 if dtype == F64 else F32).eps
    assert (off <= digit + subnormal + inside * largest + floor).all(), off.max()


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


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


# ---- 3


@both
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("p", [0.99, 0.999])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_03_confident_half_rows(backend, dtype, p, temperature):
    """p - 1 cancels: in the half type all of the label's gradient can be lost. To half a last digit of each element."""
    s, t, _ = batch(64, 10, scale=0.5)
    y = torch.arange(64) % 10
    confident = (s.detach() + F.one_hot(y, 10) * math.log(9 * p / (1 - p))).to(dtype)
    t = (confident.double() + t).to(dtype)
    settings = {"temperature": temperature, "ce_weight": 1.0, "kd_weight": 1.0, "reduction": "none"}
    for kd_weight in (0.0, 1.0):
        settings["kd_weight"] = kd_weight
        found, exact = (f(confident, t, y, **settings, **x) for f, x in ((results, {"backend": backend}), (truth, {})))
        assert found[-1].dtype == dtype
        off = (found[-1].double() - exact[-1]).abs()
        # float32's own error of a difference of numbers near 1 comes on top.
        assert (off <= torch.finfo(dtype).eps / 2 * exact[-1].abs() + 4e-7).all()
        assert (found[0].double() - exact[0]).abs().max() <= 1e-6 * temperature**2
    label = truth(confident, t, y, ce_weight=1.0, kd_weight=0.0)[-1].gather(1, y[:, None]).abs()
    assert label.max() < 0.02  # the case that it is about


# ---- 4


@pytest.fixture
def filled_with_nan():
    """Memory that nobody has written to is nan."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    assert torch.ones(1).new_empty(8, 2).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@both
@every_dtype
@pytest.mark.usefixtures("filled_with_nan")
def test_04_ignored_rows(backend, dtype):
    """All outputs are written, nothing is read at the label, whatever the row holds; of nothing the loss is 0."""
    for k, garbage, ignore_index in ((5, NAN, -100), (5, INF, 3), (1500, -INF, -(2**44))):
        s, t, y = batch(6, k, dtype)
        y[y == ignore_index] = 0
        y[0] = y[4] = ignore_index  # followed, the last would end the process
        s.data[4] = t[4] = garbage
        kept = [1, 2, 3, 5]
        settings = {"class_weight": weights(k), "backend": backend, "reduction": "none", **FULL}
        found = results(s, t, y, ignore_index=ignore_index, **settings)
        assert_equal([x[kept] for x in found], results(s.detach()[kept], t[kept], y[kept], **settings))
        for x in found:
            assert torch.equal(x[[0, 4]], torch.zeros_like(x[[0, 4]]))
        with torch.no_grad():
            assert torch.equal(DistillLoss(ignore_index=ignore_index, **settings)(s, t, y), found[0])
    for n, reduction in ((0, "mean"), (0, "sum"), (0, "none"), (4, "mean"), (4, "sum"), (4, "none")):
        s, t, y = batch(n, 5, dtype)
        loss = DistillLoss(reduction=reduction, backend=backend, **FULL)
        for upstream in (1, 0.3):
            value = loss(s, t, torch.full_like(y, -100)).sum()
            assert value == 0
            assert torch.equal(gradient(upstream * value, s), torch.zeros_like(s))


# ---- 5


def masked_classes(backend, dtype):
    """-inf in student and teacher, also a whole first or last block of the kernel: as if they were not there."""
    for k in (9, 3000):
        for masked in (slice(0, k // 2), slice(k // 2, k), slice(1, 2)):
            s, t, _ = batch(3, k, dtype)
            s.data[:, masked], t[:, masked] = -INF, -INF
            y = s.detach().argmax(-1)
            kept = torch.ones(k, dtype=torch.bool)
            kept[masked] = False
            place = kept.cumsum(0) - 1
            for settings in ({}, {"student_temperature": 1.0}, {"temperature": 0.5}, {"temperature": 3.0}):
                found = results(s, t, y, reduction="none", backend=backend, **settings)
                exact = truth(s.detach()[:, kept], t[:, kept], place[y], reduction="none", **settings)
                for a, b in zip(found[:3], exact[:3], strict=True):
                    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
                assert_rounded_once(found[3][:, kept], exact[3])
                assert (found[3][:, masked] == 0).all()
            smoothed = results(s, t, y, reduction="none", label_smoothing=0.1, backend=backend)
            assert (smoothed[1] == INF).all()  # smoothing wants the masked classes
            assert smoothed[2].isfinite().all()


def dead_terms(backend, dtype):
    """What has no weight is not looked at: 0 * inf would be nan."""
    s, t, y = batch(4, 5, dtype)
    without = results(s, None, y, kd_weight=0.0, backend=backend)
    for other in (NAN, INF):
        assert_equal(
            (x for x in results(s, torch.full_like(t, other), y, kd_weight=0.0, backend=backend) if x is not None),
            (x for x in without if x is not None),
        )
    s.data[torch.arange(4), y] = t[torch.arange(4), y] = -INF  # their cross entropy is inf
    loss, _, kd, slope = results(s, t, y, ce_weight=0.0, label_smoothing=0.1, backend=backend)
    assert loss.isfinite()
    assert kd.isfinite()
    assert slope.isfinite().all()
    s.data[:] = NAN
    nothing = results(s, t, y, ce_weight=0.0, kd_weight=0.0, backend=backend)
    assert nothing[0] == 0
    assert torch.equal(nothing[3], torch.zeros_like(nothing[3]))


def nan_stays_in_its_row(backend, dtype):
    for k, soft, which in ((5, False, 0), (3000, False, 1), (3000, True, 0), (5, True, 1)):
        inputs = batch(4, k, dtype)
        inputs[which].data[2, k - 2] = NAN
        target = batch(4, k, dtype)[1].double().softmax(-1) if soft else inputs[2]
        found = results(*inputs[:2], target, backend=backend, reduction="none", label_smoothing=0.1)
        assert found[0].isnan().tolist() == [False, False, True, False]
        assert found[3].isnan().all(-1).tolist() == [False, False, True, False]
        assert found[3][[0, 1, 3]].isfinite().all()


def extreme_logits(backend, dtype):
    ends = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]], dtype=dtype)
    for temperature, label in ((0.5, 0), (1.0, 1), (4.0, 2)):
        y = torch.full((3,), label)
        settings = {"temperature": temperature, "label_smoothing": 0.1, "reduction": "none"}
        inputs = ends, ends.flip(0), y
        found, exact = results(*inputs, backend=backend, **settings), truth(*inputs, **settings)
        for a, b in zip(found[:3], exact[:3], strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
        assert_rounded_once(found[3], exact[3])


@both
@every_dtype
@pytest.mark.parametrize("case", [masked_classes, dead_terms, nan_stays_in_its_row, extreme_logits])
def test_05_infinities(case, dtype, backend):
    case(backend, dtype)


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


# ---- 7


def odd_sizes(backend, dtype):
    for n, k in ((3, 1), (1, 2), (3, 17), (2, 1025), (1, 4097)):
        s, t, y = batch(n, k, dtype)
        found, exact = results(s, t, y, backend=backend, **FULL), truth(s, t, y, **FULL)
        assert found[0].item() == pytest.approx(exact[0].item(), rel=1e-5, abs=1e-6)
        assert_rounded_once(found[3], exact[3], floor=1 if k == 1 else 0)


def more_rows_than_65535(backend, dtype):
    s, t, y = batch(70, 5, dtype)
    once = results(s, t, y, reduction="none", backend=backend, **FULL)
    many = results(*(x.detach().repeat(1000, *[1] * (x.ndim - 1)) for x in (s, t, y)), reduction="none",
                   backend=backend, **FULL)  # fmt: skip
    for a, b in zip(many, once, strict=True):
        assert (a.view(1000, *b.shape) == b).all()


def any_layout(backend, dtype):
    s, t, y = batch(4, 1100, dtype)
    s, w = s.detach(), weights(1100)
    shifted = torch.cat([s.new_zeros(4, 1), s], 1)[:, 1:]  # rows apart by one more, and not aligned
    for student, teacher in (
        (s.t().contiguous().t(), t.t().contiguous().t()),
        (shifted, t[:1].expand(4, -1)),
        (s.repeat(1, 2)[:, :1100], t.repeat(2, 1)[::2]),
    ):
        soft = t[:1].double().softmax(-1).expand(4, -1)
        for target in (y, y.repeat_interleave(3)[::3], t.double().softmax(-1), soft):
            settings = {"class_weight": w, "backend": backend, "reduction": "none", **FULL}
            strided = results(student, teacher, target, **settings)
            plain = results(*(x.contiguous() for x in (student, teacher, target)), **settings)
            for a, b in zip(strided, plain, strict=True):
                if backend == "cpu":
                    assert torch.equal(a, b)
                torch.testing.assert_close(a, b)


def offsets_beyond_32_bits(backend, dtype):
    """2^31 elements to the last row, in memory of which only the rows are touched."""
    s, t, y = batch(3, 21, dtype)
    expected = results(s, t, y, reduction="none", backend=backend)
    for which in (0, 1):
        inputs = [s.detach(), t]
        far = torch.empty(2**31 + 64, dtype=dtype).as_strided((3, 21), (2**30, 1))
        far.copy_(inputs[which])
        inputs[which] = far
        assert far[2].data_ptr() - far[0].data_ptr() >= 2**32
        assert_equal(results(*inputs, y, reduction="none", backend=backend), expected)


@both
@every_dtype
@pytest.mark.parametrize("case", [odd_sizes, more_rows_than_65535, any_layout, offsets_beyond_32_bits])
def test_07_sizes_and_layouts(case, dtype, backend):
    case(backend, dtype)


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


# ---- 9


@both
@every_dtype
def test_09_float32_sums(backend, dtype):
    """Sums over 128,256 classes and over rows that float16 would overflow, and whose last digits bfloat16 drops."""
    wide = F64 if dtype == F64 else F32
    s, t, y = batch(4096, 5, dtype, scale=20.0)
    y[7] = -100
    for reduction in ("mean", "sum", "none"):
        for weight in (None, weights(5)):
            settings = {"reduction": reduction, "class_weight": weight, "label_smoothing": 0.1}
            found, exact = results(s, t, y, backend=backend, **settings), truth(s, t, y, **settings)
            assert {x.dtype for x in found[:3]} == {wide}
            for a, b in zip(found[:3], exact[:3], strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6 * b.abs().max().item())
            assert_rounded_once(found[3], exact[3], floor=16 / (4095 if reduction == "mean" else 1))
            assert reduction != "sum" or found[0] > torch.finfo(F16).max
    s, t, y = batch(2, 128256, dtype)
    found, exact = results(s, t, y, backend=backend), truth(s, t, y)
    assert found[0].item() == pytest.approx(exact[0].item(), rel=1e-6)
    if backend == "cpu" and dtype == F32:
        off = (found[3].double() - exact[3]).abs().amax(-1) / exact[3].abs().amax(-1)
        assert off.max() <= 1e-6
    assert_rounded_once(found[3], exact[3])


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


# ---- 13


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("k", [10, 1000])
def test_13_tolerance(dtype, k):
    """1.5 times the error of the reference in that dtype, row by row, largest and mean; not some percent of the value.

    A cross entropy in the half type itself stays within the 5 % of the largest element that are often allowed, and
    fails here.
    """
    s, _, y = batch(256, k, dtype)
    s.data[torch.arange(256), y] += 4  # mostly right
    settings = {"ce_weight": 1.0, "kd_weight": 0.0, "reduction": "none"}
    exact = truth(s, None, y, **settings)[-1]
    theirs = (results(s, None, y, backend="reference", **settings)[-1].double() - exact).abs()

    def passes(slope):
        off = (slope.double() - exact).abs()
        row = (off.amax(-1) <= 1.5 * theirs.amax(-1) + 1e-7).all()
        return bool(row & (off.mean(-1) <= 1.5 * theirs.mean(-1) + 1e-8).all())

    assert passes(results(s, None, y, backend="cpu", **settings)[-1])
    in_half = (s.detach() - s.detach().amax(-1, keepdim=True)).exp()
    in_half = in_half / in_half.sum(-1, keepdim=True) - F.one_hot(y, k)
    assert (in_half.double() - exact).abs().max() <= 0.05 * exact.abs().max()
    assert not passes(in_half)


# ---- 14


@both
@every_dtype
@pytest.mark.filterwarnings("ignore:teacher_logits look like probabilities")  # now and then those of two classes do
def test_14_identities(backend, dtype):
    """Oracles that share no code with an implementation; test_distill_identities.py has them all, in float64."""
    tolerance = {F64: 1e-11, F32: 3e-5}.get(dtype, 3 * torch.finfo(dtype).eps)

    @given(st.integers(0, 2**31), st.sampled_from([2, 5, 100, 1025]), st.sampled_from([None, 1.0]), st.floats(0.5, 20))
    def check(seed, k, student_temperature, temperature):
        s, t, y = batch(4, k, dtype, seed)
        s, t = (8 * s.detach()).round() / 8, (8 * t).round() / 8  # so that adding 2 is exact
        settings = {
            "temperature": temperature,
            "student_temperature": student_temperature,
            "label_smoothing": 0.1,
            "backend": backend,
        }

        # Of the terms in a gradient that may nearly cancel; and, times T, in the KL, which is small at high T.
        rounding = 8 * torch.finfo(F64 if dtype == F64 else F32).eps * max(temperature, 1)

        def call(s, t, y, **more):
            return results(s, t, y, **{"reduction": "none", **settings, **more})

        found = call(s, t, y)
        order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
        shifted, permuted = call(s + 2, t - 2, y), call(s[:, order], t[:, order], order.argsort()[y])
        for other, mine in ((shifted, found[3]), (permuted, found[3][:, order])):
            scale = found[0].abs().max().item()
            torch.testing.assert_close(other[0], found[0], rtol=0, atol=tolerance * scale + rounding * temperature)
            off = (other[3].double() - mine.double()).abs()
            assert (off <= tolerance * mine.double().abs().amax(-1, keepdim=True) + rounding).all()
        largest = found[3].double().abs().amax(-1)
        assert (found[3].double().sum(-1).abs() <= tolerance * k**0.5 * largest + rounding).all()
        same = call(s, s, y, ce_weight=0.0, student_temperature=None)
        assert torch.equal(same[0], torch.zeros_like(same[0]))
        assert same[3].abs().max() <= 1e-6 * temperature
        parts = [call(s[i], t[i], y[i], reduction="sum") for i in (slice(0, 1), slice(1, 4))]
        whole = call(s, t, y, reduction="sum")
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-6, atol=rounding)
        assert torch.equal(torch.cat([parts[0][3], parts[1][3]]), whole[3])

    check()
