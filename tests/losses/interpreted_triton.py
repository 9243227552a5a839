"""The Triton kernels on a CPU, by Triton's interpreter: loss_checks.py, and what only these kernels have.

Collected by test_triton.py alone, in a process of its own, because Triton decides at import whether it interprets. A
sample runs by default, the rest is torture.

Each check runs where rows fit into registers and forced through the two sweeps, by blocks of 16 classes. The
interpreter does not show everything: it stores bfloat16 truncated, sees no races, and its maximum drops a nan.
"""

import itertools

import loss_checks
import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from loss_checks import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    FULL,
    LARGEST,
    SETTINGS,
    any_settings,
    batch,
    class_weights,
    draw,
    results,
)
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

from kd import DistillLoss, LinearDistillLoss
from kd.losses.kernels import triton as launcher
from kd.losses.kernels.triton import Shape
from kd.losses.reference import Inputs, Numbers

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
torture = pytest.mark.torture


@pytest.fixture(params=["resident", "sweeps"])
def kernel(request, monkeypatch):
    if request.param == "sweeps":
        monkeypatch.setattr(launcher, "shape_for", lambda *_: SWEEPS)
    return request.param


# ---- the formulas

FEW = settings(phases=[Phase.generate])  # a failing example is not shrunk: every operation of a kernel is Python here
SWEEPS = Shape(False, 1, 16, 1, None)
CHECKS = {
    "upstream_gradients": (loss_checks.upstream_gradients, {}),
    "graphs": (loss_checks.graphs, {"k": 21}),
    "ignored_rows": (loss_checks.ignored_rows, {"sizes": (5, 21)}),
    "masked_classes": (loss_checks.masked_classes, {"sizes": (37,), "temperatures": ({},), "masks": 2}),
    "masked_classes_at_any_temperature": (loss_checks.masked_classes, {"sizes": (37,)}),
    "dead_terms": (loss_checks.dead_terms, {}),
    "broken_rows": (loss_checks.broken_rows, {"sizes": (21,)}),
    "settings_at_their_ends": (loss_checks.settings_at_their_ends, {}),
    "largest_logits": (loss_checks.largest_logits, {"times": 5}),
    "odd_sizes": (loss_checks.any_size, {"sizes": ((3, 1), (3, 17), (130, 5))}),
    "any_size": (loss_checks.any_size, {"sizes": ((5, 2), (3, 16), (2, 300))}),
    "any_layout": (loss_checks.any_layout, {"k": 24}),
    "offsets_beyond_32_bits": (loss_checks.offsets_beyond_32_bits, {}),
    "confident_half_rows": (loss_checks.confident_half_rows, {"n": 16}),
}
SAMPLE = {  # by default
    *(("resident", name, F32) for name in ("graphs", "upstream_gradients", "broken_rows", "any_layout", "odd_sizes")),
    *(("resident", name, F16) for name in ("offsets_beyond_32_bits", "confident_half_rows")),
    *((kernel, name, F32) for kernel in ("resident", "sweeps") for name in ("ignored_rows", "masked_classes")),
    *(("sweeps", name, F32) for name in ("dead_terms", "broken_rows")),
    ("sweeps", "offsets_beyond_32_bits", F16),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=SETTINGS, shape=st.sampled_from([(3, 21), (2, 300)]))  # several rows of one program, and one
@settings(FEW, max_examples=6)
def test_any_settings_on_rows_in_registers(dtype, drawn, shape):
    any_settings("triton", dtype, *shape, drawn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=SETTINGS)
@settings(FEW, max_examples=3)
def test_any_settings_in_sweeps(dtype, drawn):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "shape_for", lambda *_: SWEEPS)
        any_settings("triton", dtype, 3, 21, drawn)


@pytest.mark.parametrize(
    ("kernel", "name", "dtype"),
    [
        pytest.param(*case, marks=() if case in SAMPLE else torture)
        for case in itertools.product(("resident", "sweeps"), CHECKS, DTYPES)
        if case[1] != "confident_half_rows" or case[2] in (BF16, F16)
    ],
    indirect=["kernel"],
    ids=str,
)
def test_the_loss_follows_its_formulas(kernel, name, dtype):
    check, sizes = CHECKS[name]
    check("triton", dtype, **sizes)


# ---- what only these kernels have

NUMBERS = Numbers(4.0, 2.5, 0.7, 0.3, 0.1, -100)


def test_a_step_from_one_end_of_float32_to_the_other_leaves_classes_without_a_share_alone(kernel):
    s = torch.full((1, 20), -LARGEST)
    s[:, 16:] = LARGEST  # the second block of the sweeps
    q = F.one_hot(torch.tensor([17]), 20).float()
    loss = DistillLoss(kd_weight=0.0, ce_weight=1.0, backend="triton")
    assert loss(s, None, q).item() == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)


def test_a_label_at_the_lowest_number_counts_once(kernel):
    s = torch.tensor([[-LARGEST, 0.0, 1.0, 2.0]])
    loss = DistillLoss(kd_weight=0.0, ce_weight=1.0, label_smoothing=0.1, backend="triton")
    assert loss(s, None, torch.tensor([0])).item() == pytest.approx((0.9 + 0.1 / 4) * LARGEST, rel=1e-5)


def test_a_label_that_is_no_class_gives_nan_and_is_not_followed(kernel):
    """Checking it would make the host wait for the GPU; 2^40 elements on there is no memory."""
    s, t, y = batch(4, 5, F32)
    y[1:] = torch.tensor([-1, 5, 2**40])
    found = results("triton", s, t, y, **FULL)
    assert found[0].isnan().tolist() == found[3].isnan().all(-1).tolist() == [False, True, True, True]
    assert DistillLoss(backend="triton")(s, t, y).isnan()
    head = LinearDistillLoss(backend="triton", reduction="none")
    assert head(s, torch.eye(5), y, teacher_logits=t).isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("dtype", [F16, pytest.param(F64, marks=torture)])
def test_adjust_changes_the_rows_whose_upstream_gradient_changed(kernel, dtype):
    s, t, y = batch(6, 21, dtype)
    y[4] = -100
    held = draw(6, seed=4, dtype=F64 if dtype == F64 else F32)
    upstream = held.clone()
    changed, kept = torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5])
    upstream[changed] *= 3
    upstream[3] = 0
    for target, weight in ((y, None), (draw(6, 21, seed=3).softmax(-1), class_weights(21))):
        inputs = Inputs(s, t, target, weight)
        right = launcher.rows(inputs, upstream, NUMBERS, with_gradient=True)[3]
        gradient = launcher.rows(inputs, held, NUMBERS, with_gradient=True)[3]
        mark = torch.arange(6)[:, None].to(dtype).expand(-1, 21)
        gradient[kept] = mark[kept]  # nothing that the kernel would write
        launcher.adjust(gradient, held, upstream, lambda inputs=inputs: inputs, NUMBERS)
        assert torch.equal(gradient[changed], right[changed])
        assert torch.equal(gradient[kept], mark[kept])


def test_float64_scalars_arrive_exact():
    """A launch rounds Python floats to float32. The interpreter does not, so the way around it is checked by itself."""
    for value in (0.1, 0.0, 1.0, 4.0, 1e-300):
        bits = launcher._bits(value)
        assert abs(bits) >= 2**31
        assert torch.tensor(bits).view(F64).item() == value


# ---- what the host does around a launch


class NoWaiting(TorchDispatchMode):
    """Refuses what a host can only answer after waiting for the GPU, or whose result's size depends on values."""

    REFUSED = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "allclose")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in self.REFUSED, f"{function} waits for the GPU"
        masks = args[1] if name in ("index", "index_put") else ()
        assert not any(x is not None and x.dtype == torch.bool for x in masks), f"{function} waits for the GPU"
        return function(*args, **(kwargs or {}))


class Launches:
    """In place of a kernel: what would be launched."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.grids.append(grid)


@pytest.mark.parametrize("k", [21, 40000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_the_gpu(monkeypatch, k, reduction):
    """No value of a tensor is read on the way through loss and gradient, so a CUDA graph may capture both."""
    launches = Launches()
    for name in ("resident", "sweeps"):
        monkeypatch.setattr(launcher, name, launches)
    s, t, y = batch(3, k, F32)
    s.requires_grad_()
    y[1] = -100
    for target, weight in ((y, None), (t.softmax(-1), torch.ones(k))):
        loss = DistillLoss(reduction=reduction, class_weight=weight, backend="triton", **FULL)
        with NoWaiting():
            torch.autograd.grad(0.3 * loss.terms(s, t, target).loss.sum(), s)
            with torch.no_grad():
                loss(s, t, target)
    assert len(launches.grids) == 2 * 3  # loss and gradient, the gradient's adjustment, values alone
    with pytest.raises(AssertionError, match="waits for the GPU"), NoWaiting():
        s.sum().item()
