"""The CPU kernel against the reference in float64, value and gradient, and the rows that released kernels get wrong."""

import itertools
import math
import os
import subprocess
import sys
import threading

import pytest
import torch

from kd.losses import reference
from kd.losses.kernels import cpu
from kd.losses.reference import Inputs, Numbers
from kd.smoothing import to_uniform

INF = math.inf
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALVES)
SETTINGS = {
    "temperature": 4.0,
    "student_temperature": 4.0,
    "kd_weight": 0.9,
    "ce_weight": 0.4,
    "uniform_mass": 0.1,
    "ignore_index": -100,
}


def draw(*shape, seed=0, scale=3.0, dtype=torch.float64):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def batch(n=6, k=5, dtype=torch.float64, soft=False, weighted=False, ignored=False, seed=0):
    """Logits, target, class weights (one of them 0) and an upstream gradient for each row."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    s, t = draw(n, k, seed=seed, dtype=dtype), draw(n, k, seed=seed + 1, dtype=dtype)
    target = torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))
    if soft:
        target = draw(n, k, seed=seed + 2).softmax(-1).to(wide)
    elif ignored and n > 1:
        target[1] = -100
    weight = None
    if weighted:
        weight = draw(k, seed=seed + 3).abs().to(wide)
        weight[k // 2] = 0
    return s, t, target, weight, draw(n, seed=seed + 4).to(wide)


def run(s, t, target, weight, upstream, with_gradient=True, **changed):
    return cpu.rows(Inputs(s, t, target, weight), upstream, Numbers(**SETTINGS | changed), with_gradient=with_gradient)


def expected(s, t, target, weight, upstream, dtype=torch.float64, **changed):
    """The reference's loss, ce, kd and gradient, computed with inputs of this dtype, then widened."""
    leaf = s.to(dtype).requires_grad_()
    t, weight = (None if x is None else x.to(dtype) for x in (t, weight))
    target = target.to(dtype) if target.is_floating_point() else target
    loss, *terms = reference.terms(Inputs(leaf, t, target, weight), Numbers(**SETTINGS | changed))
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    none = torch.zeros(len(s), dtype=torch.float64)
    return *(none if x is None else x.detach().double() for x in (loss, *terms)), gradient.double()


def scales(upstream, weight, **changed):
    """What the rounding of loss, ce, kd and gradient is small against, where the value itself is 0 or cancels."""
    given = SETTINGS | changed
    weights = 1.0 if weight is None else max(1.0, weight.max().item())
    ce, kd = 2 * weights, given["student_temperature"] ** 2
    loss = given["ce_weight"] * ce + given["kd_weight"] * kd
    slope = given["ce_weight"] * ce + given["kd_weight"] * given["student_temperature"]
    return loss, ce, kd, slope * upstream.double().abs().unsqueeze(-1)


def check(inputs, **changed):
    """Ours against float64: the tolerances of each dtype."""
    s, _, _, weight, upstream = inputs
    ours, exact = run(*inputs, **changed), expected(*inputs, **changed)
    wide = upstream.dtype
    assert [x.dtype for x in ours] == [wide, wide, wide, s.dtype]
    assert ours[3].shape == s.shape
    relative, eps = (1e-12, 1e-15) if s.dtype == torch.float64 else (1e-5, 2e-7)
    for name, a, b, scale in zip(
        ("loss", "ce", "kd", "gradient"), ours, exact, scales(upstream, weight, **changed), strict=True
    ):
        error = (a.double() - b).abs()
        if name != "gradient":
            allowed = relative * b.abs() + eps * scale
        elif s.dtype in HALVES:
            # As the reference with float32 inside, row by row.
            theirs = (expected(*inputs, dtype=s.dtype, **changed)[3] - b).abs().amax(-1, keepdim=True)
            allowed = 1.5 * theirs + eps * scale
        else:
            allowed = relative * b.abs().amax(-1, keepdim=True) + eps * scale
        assert (error <= allowed).all(), (name, (error / allowed).max().item(), tuple(s.shape), s.dtype, changed)


# ---- the matrix

SMALL_SHAPES = itertools.cycle([(3, 1), (2, 2), (3, 5), (3, 16), (2, 17)])
WHOLE = list(
    itertools.product(
        [("uniform", 0.0), ("uniform", 0.1), ("uniform", 0.5), ("others", 0.1), ("others", 0.5)],
        [False, True],  # probabilities
        [False, True],  # class weights
        [0.5, 1.0, 2.0, 4.0, 20.0],
        [None, 1.0, 2.5],
        [(0.9, 0.4), (0.0, 1.0), (1.3, 0.0)],
    )
)


def settings(classes, smoothing, temperature, student_temperature, weights):
    convention, eps = smoothing
    return {
        "temperature": temperature,
        "student_temperature": student_temperature or temperature,
        "kd_weight": weights[0],
        "ce_weight": weights[1],
        "uniform_mass": to_uniform(eps, classes, convention),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination_of_settings(dtype):
    for i, ((smoothing, soft, weighted, *rest), shape) in enumerate(zip(WHOLE, SMALL_SHAPES, strict=False)):
        check(batch(*shape, dtype, soft, weighted, ignored=i % 2 == 0, seed=i), **settings(shape[1], smoothing, *rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_one_and_of_several_blocks(dtype):
    """Every temperature path and both targets; few rows with many classes are computed again in the second pass."""
    for i, (shape, temperature, soft) in enumerate(
        itertools.product(
            [(0, 1000), (1, 4097), (70, 17), (3, 1000), (9, 2049)], [1.0, 2.0, 3.0, 4.0, 8.0], [False, True]
        )
    ):
        inputs = batch(*shape, dtype, soft, weighted=i % 3 == 0, ignored=True, seed=i)
        for weights in ((0.9, 0.4), (0.0, 1.0), (1.0, 0.0)):
            check(inputs, **settings(shape[1], ("uniform", 0.1), temperature, None, weights))


@pytest.mark.parametrize("teacher", DTYPES, ids=str)
def test_the_teachers_and_the_targets_dtype_are_free(teacher):
    for dtype in DTYPES:
        s, t, target, weight, upstream = batch(3, 1030, dtype, soft=True, weighted=True)
        check((s, t.to(teacher), target.to(teacher), weight, upstream))
        check((s, t.to(teacher), target.argmax(-1), weight.to(teacher), upstream))


def test_the_exponential_and_16_bits_at_their_edges():
    """Differences of 0 to 140 at T = 1 against float64; gradients from 1e-9 to beyond float16's largest number."""
    s = torch.linspace(0, -140, 2000, dtype=torch.float32).unsqueeze(0)
    up = torch.ones(1)
    changed = {"temperature": 1.0, "student_temperature": 1.0, "kd_weight": 0.0, "ce_weight": 1.0, "uniform_mass": 0.0}
    ours, exact = run(s, None, torch.tensor([0]), None, up, **changed), s.double().softmax(-1)
    inner = (s[0] > -87) & (torch.arange(2000) > 0)
    torch.testing.assert_close(ours[3][0, inner].double(), exact[0, inner], rtol=3e-6, atol=0)
    assert ours[3][0, s[0] < -89].abs().max() < 1e-38
    for dtype in HALVES:
        for scale in (1e-9, 3e-7, 1e-5, 1.0, 1e5, 1e9):
            s16, t, y, _, up = batch(4, 40, dtype)
            wide, narrow = (run(x, t, y, None, scale * up)[3] for x in (s16.float(), s16))
            assert torch.equal(narrow, wide.to(dtype))


# ---- memory layout


def test_without_gradient_the_values_are_the_same():
    for shape, soft in itertools.product([(5, 7), (3, 3000)], [False, True]):
        inputs = batch(*shape, torch.float32, soft, weighted=True)
        for changed in ({}, {"student_temperature": 2.5}, {"kd_weight": 0.0}):
            full, short = run(*inputs, **changed), run(*inputs, with_gradient=False, **changed)
            assert short[3].shape == (0, shape[1])
            assert all(torch.equal(a, b) for a, b in zip(full[:3], short[:3], strict=True))


# ---- special rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_are_0_and_labels_that_are_no_class_nan_whatever_the_row_holds(dtype):
    for classes in (5, 3000):
        s, t, y, w, up = batch(6, classes, dtype, weighted=True)
        y[1], y[3], y[4] = -100, classes, -(10**12)
        clean = run(s, t, y, w, up)
        for garbage in (math.nan, INF, -INF):
            s[1], t[1] = garbage, garbage
            for out, before in zip(run(s, t, y, w, up), clean, strict=True):
                assert torch.equal(out[1], torch.zeros_like(out[1]))
                assert out[3:5].isnan().all()
                assert torch.equal(out[[0, 2, 5]], before[[0, 2, 5]])
                assert out[[0, 2, 5]].isfinite().all()


def test_masked_classes_as_in_the_reference():
    """-inf in both counts nothing, also over whole blocks, first or last; in the student alone the KD term is inf."""
    for dtype, classes in itertools.product((torch.float64, torch.float32), (5, 3000)):
        for where in (slice(0, classes // 2), slice(classes // 2, classes), slice(1, 2)):
            s, t, _, w, up = batch(3, classes, dtype, weighted=True)
            s[:, where], t[:, where] = -INF, -INF
            y = s.argmax(-1)
            for changed in ({}, {"student_temperature": 1.0}, {"temperature": 3.0, "student_temperature": 3.0}):
                check((s, t, y, None, up), uniform_mass=0.0, **changed)
                soft = torch.nn.functional.one_hot(y, classes).to(dtype)
                check((s, t, soft, None, up), uniform_mass=0.0, **changed)
                assert (run(s, t, y, None, up, **changed)[1] == INF).all()  # smoothing wants the masked classes
                w[where] = 0
                check((s, t, y, w, up), **changed)
            assert (run(s, draw(3, classes, dtype=dtype), y, None, up)[2] == INF).all()
            check((draw(3, classes, dtype=dtype), t, y, None, up))
    everything = torch.full((1, 5), -INF)
    assert run(everything, everything, torch.tensor([0]), None, torch.ones(1))[0].isnan().all()
    s, t, y, _, up = batch(2, 2)
    s[0, y[0]] = -INF  # in this convention the label's own part is negative: still inf
    assert run(s, t, y, None, up, uniform_mass=1.5, kd_weight=0.0)[1].tolist()[0] == INF


# ---- adjust


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adjust_brings_the_gradient_to_another_upstream(dtype):
    for classes, soft, scale in itertools.product((5, 2100), (False, True), (1.0, 65536.0, 0.0)):
        s, t, target, w, up = batch(7, classes, dtype, soft, weighted=True, ignored=True)
        held = torch.full_like(up, 1 / 6)
        wanted = torch.where(torch.arange(7) % 3 == 0, held, scale * up)
        held[1] = 0  # says nothing of the row
        gradient = run(s, t, target, w, held)[3]
        before = gradient.clone()
        cpu.adjust(gradient, held, wanted, Inputs(s, t, target, w), Numbers(**SETTINGS))
        exact = run(s, t, target, w, wanted)[3]
        same = held == wanted
        assert torch.equal(gradient[same], before[same])
        if dtype in HALVES:
            assert torch.equal(gradient, exact)  # rounded once
        else:
            eps = 4 * torch.finfo(dtype).eps
            assert ((gradient - exact).abs() <= eps * exact.abs().amax(-1, keepdim=True)).all()


def test_adjust_leaves_equal_rows_alone():
    s, t, y, w, up = batch(dtype=torch.bfloat16)
    marker = torch.full_like(s, 7.0)
    cpu.adjust(marker, up, up, Inputs(s, t, y, w), Numbers(**SETTINGS))
    assert (marker == 7).all()


# ---- threads and processes


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_called_from_four_threads_at_once(threads):
    threads(2)
    inputs = [batch(40, 1500, torch.float32, seed=i) for i in range(4)]
    alone = [run(*given) for given in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(run(*inputs[i]), alone[i], strict=True)):
                wrong.append(i)

    started = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert not wrong


IN_A_CHILD = """
import os, signal, torch
from kd.losses.kernels import cpu
from kd.losses.reference import Inputs, Numbers
torch.set_num_threads(2)
s, t, y, up = torch.randn(64, 2000), torch.randn(64, 2000), torch.randint(2000, (64,)), torch.ones(64)
def run():
    return cpu.rows(Inputs(s, t, y, None), up, Numbers(4.0, 4.0, 1.0, 1.0, 0.1, -100), with_gradient=True)
before = run()
child = os.fork()
if child == 0:
    signal.alarm(60)  # nobody waits for a child that hangs
    # Compared by numpy: an operator of torch's would itself wait for the parent's threads.
    same = all((a.numpy() == b.numpy()).all() for a, b in zip(before, run()))
    os._exit(0 if same else 3)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert code == 0, code
assert all(torch.equal(a, b) for a, b in zip(before, run()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_in_a_forked_child():
    """Threads of the parent are gone there: a DataLoader's worker that waits for them waits for ever."""
    done = subprocess.run([sys.executable, "-c", IN_A_CHILD], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


COMPILED_OR_LOADED = """
import hashlib, sys, warnings
import torch
from numba.core import caching
from kd.losses.kernels import cpu
from kd.losses.reference import Inputs, Numbers
warnings.simplefilter("error")
if sys.argv[1] == "compiled":
    caching.FunctionCache._impl_class._locator_classes = []
bits = hashlib.sha256()
for k, student_temperature, upstream in ((100, 20.0, 1.0), (1025, 2.5, 0.3), (3000, 4.0, 1.0)):
    s, t = (3 * torch.randn(6, k, generator=torch.Generator().manual_seed(i)) for i in range(2))
    y, weight, up = torch.arange(6), torch.linspace(0.5, 2, k), torch.full((6,), upstream)
    for eps in (0.0, 0.1):
        numbers = Numbers(4.0, student_temperature, 0.9, 1.0, eps, -100)
        for value in cpu.rows(Inputs(s, t, y, weight), up, numbers, with_gradient=True):
            bits.update(value.numpy().tobytes())
print(cpu._compiled(torch.float32)[1].cache_hits, bits.hexdigest())
"""


def test_a_process_that_compiles_and_one_that_loads_what_was_compiled_give_the_same_bits():
    """Silently, also where nothing can be written: numba refuses to cache there, and every process compiles."""
    run(*batch(dtype=torch.float32))  # there is something to load
    found = {}
    for how in ("compiled", "loaded"):
        words = [sys.executable, "-c", COMPILED_OR_LOADED, how]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert done.stderr == ""
        found[how] = done.stdout.split()
    assert [found["compiled"][0], found["loaded"][0]] == ["0", "1"]
    assert found["compiled"][1] == found["loaded"][1]
