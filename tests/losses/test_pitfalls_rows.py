"""The pitfalls of test_pitfalls.py that are about rows: what they hold, how many and how long they are, how exact."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pitfalls import (
    BF16,
    F16,
    F32,
    F64,
    FULL,
    INF,
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

from kd import DistillLoss

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
