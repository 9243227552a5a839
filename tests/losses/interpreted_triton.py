"""Values and gradients of the Triton kernels against the reference in float64. Collected by test_triton.py alone.

Rows without a reduction; interpreted_loss.py has the same kernels below DistillLoss.

Each check runs on both kernels: where rows fit, and forced through the two sweeps by blocks of 16 classes. What the
interpreter cannot show: it computes in bfloat16 by truncating (the kernels compute in no half type, but store them),
it sees no races, and its maximum drops a nan, as a GPU's may.
"""

import copy
import itertools
import math
import os

import pytest
import torch
import triton
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

from kd.losses import reference
from kd.losses.kernels import triton as launcher
from kd.losses.kernels import triton_kernels
from kd.losses.kernels.triton import Shape
from kd.losses.reference import Inputs, Numbers
from kd.smoothing import to_uniform

assert triton.knobs.runtime.interpret, "run by test_triton.py"

# The interpreter patches the language for each module that a launch calls into, and again at each call of a function in
# it, which is most of its time. Once is enough.
_launch, _patched = GridExecutor.__call__, set()


def _interpret_launch(self, *args, **kwargs):
    _patched.clear()
    _patched.add(self.fn.__module__)
    return _launch(self, *args, **kwargs)


def _interpret_call(self, *args, **kwargs):
    if self.fn.__module__ not in _patched:
        _patched.add(self.fn.__module__)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


GridExecutor.__call__, InterpretedFunction.__call__ = _interpret_launch, _interpret_call

# numpy warns of what a GPU does without a word: inf - inf, the maximum of nothing but nan.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NIGHTLY = os.environ.get("KD_NIGHTLY") == "1"
INF, NAN = math.inf, math.nan
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SETTINGS = {
    "temperature": 4.0,
    "student_temperature": 2.5,
    "kd_weight": 0.7,
    "ce_weight": 0.3,
    "uniform_mass": 0.1,
    "ignore_index": -100,
}


@pytest.fixture(params=["resident", "sweeps"])
def kernel(request, monkeypatch):
    if request.param == "sweeps":
        monkeypatch.setattr(launcher, "shape_for", lambda *_: Shape(False, 1, 16, 1, None))
    return request.param


def draw(*shape, seed=0, scale=3.0, dtype=F64):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)).to(dtype)


def batch(n=4, k=21, dtype=F64, seed=0):
    """Student, teacher, labels, probabilities, class weights (one of them 0), upstream."""
    s, t = draw(n, k, seed=seed, dtype=dtype), draw(n, k, seed=seed + 1, dtype=dtype)
    y = torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))
    q, w = draw(n, k, seed=seed + 2).softmax(-1).to(F32), draw(k, seed=seed + 3, scale=1.0).exp().to(F32)
    w[0] = 0
    return s, t, y, q, w, draw(n, seed=seed + 4, dtype=reference.wide_dtype(s))


def ours(s, t, target, w, upstream, with_gradient=True, **settings):
    return launcher.rows(Inputs(s, t, target, w), upstream, Numbers(**SETTINGS | settings), with_gradient=with_gradient)


def exact(s, t, target, w, upstream, dtype=F64, **settings):
    """The same from the reference and its automatic gradient, the logits in ``dtype``."""
    s = s.to(dtype, copy=True).requires_grad_()
    t = None if t is None else t.to(dtype)
    loss, ce, kd = reference.terms(Inputs(s, t, target, w), Numbers(**SETTINGS | settings))
    (gradient,) = torch.autograd.grad(loss, s, upstream.to(loss.dtype))
    zero = torch.zeros_like(loss)
    return [x.detach() for x in (loss, zero if ce is None else ce, zero if kd is None else kd, gradient)]


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


def assert_exact(actual, expected, tolerance=1e-12):
    """Equal up to ``tolerance`` of the largest finite element; inf and nan at the same places."""
    for name, a, b in zip(("loss", "ce", "kd", "gradient"), actual, expected, strict=False):
        finite = b[b.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 0.0
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance * scale, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def check(s, t, target, w, upstream, tolerance=1e-12, **settings):
    assert_exact(ours(s, t, target, w, upstream, **settings), exact(s, t, target, w, upstream, **settings), tolerance)


# ---- the matrix

AXES = {
    "smoothing": [("uniform", 0.0), ("uniform", 0.1), ("uniform", 0.5), ("others", 0.1), ("others", 0.5)],
    "soft": [False, True],
    "weighted": [False, True],
    "ignored": [False, True],
    "temperature": [0.5, 1.0, 2.0, 4.0, 20.0],
    "student_temperature": [None, 1.0, 2.5],
    "dtype": [F64, F32, F16, BF16],
}


def matrix():
    combinations = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
    return [c for c in combinations if not (c["soft"] and c["ignored"])]


@pytest.mark.timeout(1200)  # every operation of a kernel is Python here
def test_matrix(kernel):
    """float64 to 1e-12, float32 to 1e-5, half types to 1.5 times what the reference errs in that dtype."""
    for i, c in enumerate(matrix()):
        s, t, y, q, w, upstream = batch(3, dtype=c["dtype"], seed=i)
        if c["ignored"]:
            y[1] = -100
        t = t.to((c["dtype"], F32)[i % 2])
        inputs = s, t, q if c["soft"] else y, w if c["weighted"] else None, upstream
        settings = {
            "temperature": c["temperature"],
            "student_temperature": c["student_temperature"] or c["temperature"],
            "uniform_mass": to_uniform(c["smoothing"][1], s.shape[-1], c["smoothing"][0]),
        }
        actual, expected = ours(*inputs, **settings), exact(*inputs, **settings)
        try:
            if c["dtype"] in (F64, F32):
                assert_exact(actual, expected, 1e-12 if c["dtype"] == F64 else 1e-5)
                continue
            assert_exact(actual[:3], expected[:3], 1e-5)
            assert actual[3].dtype == c["dtype"]
            if c["dtype"] == F16:
                its_own = exact(*inputs, dtype=F16, **settings)[3]
                assert error(actual[3], expected[3]) <= 1.5 * error(its_own, expected[3]) + 1e-7
            else:
                # The interpreter cuts bfloat16 off where a GPU rounds to nearest, as test_triton_offline.py sees in
                # the code: within one epsilon of the value, not half of one.
                off = (actual[3].double() - expected[3]).abs()
                assert (off <= torch.finfo(BF16).eps * expected[3].abs() + 1e-7).all()
        except AssertionError as failure:
            raise AssertionError(f"{kernel}: {c}") from failure


@pytest.mark.parametrize("k", [1, 2, 16, 17, 37, 300])
def test_any_number_of_classes(kernel, k):
    s, t, y, q, w, upstream = batch(5, k)
    for target, weight in ((y, None), (y, w), (q, None), (q, w)):
        check(s, t, target, weight, upstream)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_each_term_alone_and_neither(kernel, soft):
    s, t, y, q, w, upstream = batch()
    target = q if soft else y
    check(s, t, target, w, upstream, ce_weight=0.0)
    check(s, None, target, w, upstream, kd_weight=0.0)
    nowhere = torch.full_like(s, NAN)
    for actual in ours(s, nowhere, target, w, upstream, kd_weight=0.0):
        assert actual.isfinite().all()
    for actual in ours(nowhere, None, target, w, upstream, kd_weight=0.0, ce_weight=0.0):
        assert torch.equal(actual, torch.zeros_like(actual))


def test_no_rows(kernel):
    s, t, y, _, w, upstream = batch(0)
    loss, ce, kd, gradient = ours(s, t, y, w, upstream)
    assert [x.shape for x in (loss, ce, kd, gradient)] == [(0,), (0,), (0,), (0, 21)]
    launcher.adjust(gradient, upstream, upstream, Inputs(s, t, y, w), Numbers(**SETTINGS))


def test_more_rows_than_one_program_takes():
    s, t, y, _, _, upstream = batch(130, 5)
    y[100:] = -100
    check(s, t, y, None, upstream)


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_values_alone_are_the_same_values(kernel, dtype):
    s, t, y, q, w, upstream = batch(dtype=dtype)
    for target, weight in ((y, None), (q, w)):
        full, alone = ours(s, t, target, weight, upstream), ours(s, t, target, weight, upstream, with_gradient=False)
        assert all(torch.equal(a, b) for a, b in zip(full[:3], alone[:3], strict=True))
        assert alone[3].shape == (0, 21)
        assert {x.dtype for x in full[:3]} == {reference.wide_dtype(s)}
        assert full[3].dtype == alone[3].dtype == dtype


# ---- rows that are ignored, masked, extreme or broken


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("ignore_index", [-100, 2, 10**10])
def test_an_ignored_row_is_zero_whatever_is_in_it(kernel, garbage, ignore_index):
    s, t, y, _, w, upstream = batch()
    y[y == ignore_index] = 3
    y[1] = ignore_index
    s[1], t[1] = garbage, garbage
    for weight in (None, w):
        actual = ours(s, t, y, weight, upstream, ignore_index=ignore_index)
        assert all(torch.equal(x[1], torch.zeros_like(x[1])) for x in actual)
        assert_exact(actual, exact(s, t, y, weight, upstream, ignore_index=ignore_index))
        assert actual[3][0].abs().max() > 0


@pytest.mark.parametrize("label", [-1, 21, 2**40, -(2**62)])
def test_a_label_that_is_no_class_gives_nan_and_is_not_followed(kernel, label):
    s, t, y, _, w, upstream = batch()
    y[1] = label  # 2**40 elements on there is no memory: to read there ends the process
    others = [0, 2, 3]
    for weight in (None, w):
        loss, ce, kd, gradient = ours(s, t, y, weight, upstream)
        assert loss[1].isnan()
        assert ce[1].isnan()
        assert gradient[1].isnan().all()
        assert kd.isfinite().all()
        expected = exact(s[others], t[others], y[others], weight, upstream[others])
        assert_exact([x[others] for x in (loss, ce, kd, gradient)], expected)
    loss, _, _, gradient = ours(s, t, y, None, upstream, ce_weight=0.0)  # the label is not needed, and still wrong
    assert loss.isnan().tolist() == gradient.isnan().all(-1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("where", [0, 18, slice(None)])
def test_nan_in_gives_nan_out(kernel, which, where):
    s, t, y, q, _, upstream = batch()
    (s if which == "student" else t)[2, where] = NAN
    alone = [{"ce_weight": 0.0}, {"kd_weight": 0.0}][: 2 if which == "student" else 1]
    for target, off in itertools.product((y, q), ({}, *alone)):
        loss, _, _, gradient = ours(s, t, target, None, upstream, **off)
        assert loss.isnan().tolist() == [False, False, True, False]
        assert gradient.isnan().all(-1).tolist() == [False, False, True, False]
        assert gradient[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_extreme_logits_stay_finite(kernel, dtype, temperature):
    s = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]], dtype=dtype).repeat_interleave(9, 1)
    tolerance = {F64: 1e-12, F32: 1e-5, F16: 2e-3, BF16: 2e-2}[dtype]
    for y in ([10, 10, 20], [0, 26, 0]):
        settings = {"temperature": temperature, "student_temperature": temperature}
        inputs = s, s.flip(0), torch.tensor(y), None, torch.ones(3, dtype=reference.wide_dtype(s))
        assert all(x.isfinite().all() for x in ours(*inputs, **settings))
        check(*inputs, tolerance=tolerance, **settings)


# The sweeps take blocks of 16 classes, 8 a thread: some blocks and some threads find nothing, at different places.
MASKS = [slice(0, 8), slice(0, 16), slice(8, 24), slice(0, 32), slice(16, 37), slice(1, 37), slice(3, None, 2)]


@pytest.mark.parametrize("masked", MASKS, ids=str)
@pytest.mark.parametrize("offset", [0.0, -1e4])
def test_masked_classes_are_as_in_the_reference(kernel, masked, offset):
    for i, (in_student, in_teacher) in enumerate([(-INF, -INF), (None, -INF), (-INF, None)]):
        s, t, _, q, w, upstream = batch(2, 37, seed=10 * i)
        s += offset
        t += offset / 2
        y = torch.tensor([2, 33])
        if in_student is not None:
            s[:, masked] = in_student
        if in_teacher is not None:
            t[:, masked] = in_teacher
        tolerance = 1e-10  # of logits near 1e4, of which 1e-12 is float64's own
        check(s, t, y, None, upstream, tolerance, uniform_mass=0.0)
        check(s, t, y, None, upstream, tolerance)
        check(s, t, y, w, upstream, tolerance, uniform_mass=0.0)
        check(s, t, torch.where(s == -INF, 0, q), w, upstream, tolerance, uniform_mass=0.0)


def test_a_class_of_weight_zero_may_be_masked_under_smoothing(kernel):
    s, t, y, q, w, upstream = batch()
    s[:, 0], t[:, 0] = -INF, -INF
    for target in (y.clamp(min=1), q):
        assert all(x.isfinite().all() for x in ours(s, t, target, w, upstream))
        check(s, t, target, w, upstream)


def test_a_row_of_nothing_is_nan_as_in_the_reference(kernel):
    s, t, y, q, _, upstream = batch()
    s[1], t[2], s[3], t[3] = -INF, -INF, -INF, -INF
    for target in (y, q):
        check(s, t, target, None, upstream)


@pytest.mark.parametrize("masked", MASKS, ids=str)
@pytest.mark.parametrize("temperatures", [(4.0, 4.0), (1.0, 1.0), (0.5, 0.5), (2.0, 1.0), (1.0, 2.0)])
def test_masks_of_the_lowest_finite_number(kernel, masked, temperatures):
    """Divided by a temperature below 1.44 it is -inf in base 2: 0 * inf, and inf - inf."""
    settings = dict(zip(("temperature", "student_temperature"), temperatures, strict=True)) | {"uniform_mass": 0.0}
    lowest = torch.finfo(F32).min
    s, t, _, _, _, upstream = batch(1, 37, dtype=F32)
    y = torch.tensor([i for i in range(37) if i not in range(37)[masked]][:1])
    s[:, masked] = lowest
    for in_teacher in (lowest, -INF):
        t[:, masked] = in_teacher
        infinite = s.masked_fill(s == lowest, -INF), t.masked_fill(t == lowest, -INF)
        actual = ours(s, t, y, None, upstream, **settings)
        assert_exact(actual, exact(*infinite, y, None, upstream, **settings), 1e-5)


# ---- layouts


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_layout_does_not_matter(kernel, dtype):
    n, k = 3, 24
    s, t, y, q, w, upstream = batch(n, k, dtype)
    q = q.to(dtype)

    def transposed(x):
        return x.T.contiguous().T

    def sliced(x):
        wide = torch.full((2 * n, k + 5), NAN, dtype=x.dtype)
        wide[::2, 3 : k + 3] = x
        return wide[::2, 3 : k + 3]

    def spaced(x):
        wide = torch.full((n, 2 * k), NAN, dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]

    expected = ours(s, t, y, None, upstream), ours(s, t, q, w, upstream)
    # Where a row can be read in vectors its sums are taken in another order.
    tolerance = {F64: 1e-12, F32: 1e-6, BF16: 1e-2}[dtype]
    for change in (transposed, sliced, spaced):
        labels = sliced(y.unsqueeze(1).expand(n, k).double()).long()[:, 0]
        found = ours(change(s), change(t), labels, None, upstream)
        assert_exact(found, [x.double() for x in expected[0]], tolerance)
        found = ours(change(s), t, change(q), w.repeat_interleave(2)[::2], upstream)
        assert_exact(found, [x.double() for x in expected[1]], tolerance)
    one = t[:1].expand(n, k)
    for a, b in zip(ours(s, one, y, None, upstream), ours(s, one.contiguous(), y, None, upstream), strict=True):
        assert torch.equal(a, b)


def test_upstream_of_any_stride(kernel):
    s, t, y, _, _, upstream = batch(6)
    for strided in (upstream[:1].expand(6), upstream.repeat_interleave(3)[::3], torch.zeros(6, dtype=F64)):
        check(s, t, y, None, strided)


def test_offsets_beyond_32_bits(kernel):
    """2^31 elements to the last row, in memory of which only the rows are touched; beyond it there is none to read."""
    far = torch.empty(2**31 + 64, dtype=F16).as_strided((3, 21), (2**30, 1))
    s, t, y, _, _, upstream = batch(3, dtype=F16)
    expected = ours(s, t, y, None, upstream)
    for name in ("student", "teacher"):
        far.copy_(s if name == "student" else t)
        assert far[2].data_ptr() - far[0].data_ptr() == 2**32
        inputs = (far, t) if name == "student" else (s, far)
        for a, b in zip(ours(*inputs, y, None, upstream), expected, strict=True):
            assert torch.equal(a, b)


def test_inputs_are_left_as_they_were_and_two_runs_agree(kernel):
    inputs = batch()
    s, t, y, q, w, upstream = inputs
    before, versions = copy.deepcopy(inputs), [x._version for x in inputs]
    for target in (y, q):
        first, second = ours(s, t, target, w, upstream), ours(s, t, target, w, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [x._version for x in inputs] == versions
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


# ---- adjust


@pytest.mark.parametrize("dtype", [F64, F32, F16])
def test_adjust_computes_changed_rows_anew_and_leaves_the_others(kernel, dtype):
    s, t, y, q, w, held = batch(6, dtype=dtype)
    y[4] = -100
    upstream = held.clone()
    changed = torch.tensor([0, 3, 4])
    upstream[changed] *= 3
    upstream[3] = 0
    for target, weight in ((y, None), (y, w), (q, w)):
        expected = ours(s, t, target, weight, upstream)[3]
        gradient = ours(s, t, target, weight, held)[3]
        mark = torch.arange(6)[:, None].to(dtype)
        kept = torch.tensor([1, 2, 5])
        gradient[kept] = mark[kept].expand(-1, s.shape[1])  # nothing that the kernel would write
        launcher.adjust(gradient, held, upstream, Inputs(s, t, target, weight), Numbers(**SETTINGS))
        assert torch.equal(gradient[changed], expected[changed])
        assert torch.equal(gradient[kept], mark[kept].expand(-1, s.shape[1]))


def test_adjust_to_a_scalar_for_all_rows(kernel):
    s, t, y, _, _, held = batch(6)
    gradient = ours(s, t, y, None, held)[3]
    launcher.adjust(gradient, held, held[:1].expand(6), Inputs(s, t, y, None), Numbers(**SETTINGS))
    assert torch.equal(gradient, ours(s, t, y, None, held[:1].expand(6))[3])
    before = gradient.clone()
    without_kd = Numbers(**SETTINGS | {"kd_weight": 0})
    launcher.adjust(gradient, held[:1].expand(6), held[:1].expand(6), Inputs(s, None, y, None), without_kd)
    assert torch.equal(gradient, before)


def test_float64_scalars_arrive_exact():
    """A launch rounds Python floats to float32; the interpreter does not, so the way around it is checked by itself."""
    for value in (0.1, 0.0, 1.0, 4.0, 1e-300):
        bits = launcher._bits(value)
        assert abs(bits) >= 2**31
        assert torch.tensor(bits).view(F64).item() == value
    assert isinstance(triton_kernels.LANE.value, int)
