"""The CPU kernel and the reference against the formulas in float64 (loss_checks.py), and what only the CPU kernel has.

Threads, processes and numba's cache are in test_cpu_processes.py, autograd and compilers in test_fused.py.
"""

import loss_checks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_checks import BF16, DTYPES, F16, F32, F64, FULL, SETTINGS, batch, class_weights, compare, draw, results

from kd.losses import reference
from kd.losses.kernels import cpu
from kd.losses.reference import Inputs, Numbers

both = pytest.mark.parametrize("backend", ["cpu", "reference"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CHECKS = (
    *("upstream_gradients", "graphs", "ignored_rows", "masked_classes", "dead_terms", "broken_rows"),
    *("settings_at_their_ends", "largest_logits", "any_size", "any_layout", "offsets_beyond_32_bits"),
)


@both
@every_dtype
@pytest.mark.parametrize("check", CHECKS)
def test_the_loss_follows_its_formulas(check, dtype, backend):
    getattr(loss_checks, check)(backend, dtype)


@both
@every_dtype
@given(drawn=SETTINGS, shape=st.sampled_from([(4, 2), (4, 7), (3, 1030), (9, 2049)]))
def test_any_settings(backend, dtype, drawn, shape):
    loss_checks.any_settings(backend, dtype, *shape, drawn)


@both
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_confident_rows_in_half_types(backend, dtype):
    loss_checks.confident_half_rows(backend, dtype)


@pytest.mark.usefixtures("nan_in_new_memory")
@every_dtype
def test_every_element_of_an_output_is_written(dtype):
    loss_checks.ignored_rows("cpu", dtype)


@pytest.fixture
def nan_in_new_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@every_dtype
def test_sums_over_many_classes_and_many_rows(dtype):
    """128,256 classes; sums over rows that float16 would overflow, and whose last digits bfloat16 drops."""
    compare("cpu", *batch(2, 128256, dtype))
    s, t, y = batch(4096, 5, dtype, scale=20.0)
    y[7] = -100
    for reduction in ("mean", "sum"):
        compare("cpu", s, t, y, reduction=reduction, class_weight=class_weights(5), label_smoothing=0.1)
    assert dtype != F16 or results("cpu", s, t, y, reduction="sum")[0] > torch.finfo(F16).max
    once = results("cpu", s[:70], t[:70], y[:70], **FULL)
    many = results("cpu", *(x[:70].repeat(1000, *[1] * (x.ndim - 1)) for x in (s, t, y)), **FULL)
    for a, b in zip(many, once, strict=True):
        assert (a.view(1000, *b.shape) == b).all()


def test_the_exponential_at_its_edges():
    """Logits of 0 to -140 at T = 1, and gradients from 1e-9 to beyond float16's largest number, rounded once."""
    s = torch.linspace(0, -140, 2000).unsqueeze(0)
    found = results("cpu", s, None, torch.tensor([0]), kd_weight=0.0, ce_weight=1.0)[3][0]
    right = s[0].double().softmax(-1)
    inner = (s[0] > -87) & (torch.arange(2000) > 0)
    torch.testing.assert_close(found[inner].double(), right[inner], rtol=3e-6, atol=0)
    assert found[s[0] < -89].abs().max() < 1e-38
    for dtype in (BF16, F16):
        for scale in (1e-9, 3e-7, 1e-5, 1.0, 1e5, 1e9):
            s16, t, y = batch(4, 40, dtype)
            wide, narrow = (results("cpu", x, t, y, lambda v, c=scale: c * v.sum())[3] for x in (s16.float(), s16))
            assert torch.equal(narrow, wide.to(dtype))


# ---- the interface of a backend: rows and adjust

NUMBERS = Numbers(4.0, 2.5, 0.9, 0.4, 0.1, -100)


def rows_of(module, inputs, upstream):
    wide = F64 if inputs.student.dtype == F64 else F32
    return module.rows(inputs, upstream.to(wide), NUMBERS, with_gradient=True)


@pytest.mark.parametrize("module", [cpu, reference], ids=["cpu", "reference"])
@every_dtype
def test_a_label_that_is_no_class_gives_nan_and_is_not_followed(module, dtype):
    """Under torch.compile, and on a GPU, nobody checks labels; 10^12 elements on there is no memory."""
    for classes in (5, 3000) if module is cpu else (5,):
        s, t, y = batch(6, classes, dtype)
        clean = rows_of(module, Inputs(s, t, y.clone(), None), torch.ones(6))
        y[3], y[4] = classes, -(10**12)
        for out, before in zip(rows_of(module, Inputs(s, t, y, None), torch.ones(6)), clean, strict=True):
            torch.testing.assert_close(out[[0, 1, 2, 5]], before[[0, 1, 2, 5]], rtol=0, atol=0)
        loss, *_, gradient = rows_of(module, Inputs(s, t, y, None), torch.ones(6))
        assert loss.isnan().tolist() == gradient.isnan().all(-1).tolist() == [False, False, False, True, True, False]


@every_dtype
def test_values_without_a_gradient_are_the_same(dtype):
    for shape, soft in (((5, 7), False), ((3, 3000), True)):
        s, t, y = batch(*shape, dtype)
        inputs = Inputs(s, t, draw(*shape, seed=3).softmax(-1) if soft else y, class_weights(shape[1]))
        for module in (cpu, reference):
            full = rows_of(module, inputs, torch.ones(shape[0]))
            short = module.rows(inputs, torch.ones(shape[0], dtype=full[0].dtype), NUMBERS, with_gradient=False)
            assert short[3].shape == (0, shape[1])
            assert all(torch.equal(a, b) for a, b in zip(full[:3], short[:3], strict=True))


@every_dtype
def test_adjust_changes_the_rows_whose_upstream_gradient_changed(dtype):
    for classes, soft, scale in ((5, False, 1.0), (5, True, 65536.0), (2100, False, 0.0), (2100, True, 1.0)):
        s, t, y = batch(7, classes, dtype)
        inputs = Inputs(s, t, draw(7, classes, seed=3).softmax(-1) if soft else y, class_weights(classes))
        up = draw(7, seed=4, dtype=F64 if dtype == F64 else F32)
        held = torch.full_like(up, 1 / 6)
        wanted = torch.where(torch.arange(7) % 3 == 0, held, scale * up)
        held[1] = 0  # its row holds no information
        gradient = rows_of(cpu, inputs, held)[3]
        before, same = gradient.clone(), held == wanted
        cpu.adjust(gradient, held, wanted, lambda inputs=inputs: inputs, NUMBERS)
        right = rows_of(cpu, inputs, wanted)[3]
        assert torch.equal(gradient[same], before[same])
        if dtype in (BF16, F16):
            assert torch.equal(gradient, right)  # rounded once
        else:
            allowed = 4 * torch.finfo(dtype).eps * right.abs().amax(-1, keepdim=True)
            assert ((gradient - right).abs() <= allowed).all()
