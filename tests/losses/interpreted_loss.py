"""DistillLoss on the interpreted Triton kernels: reductions, autograd, and what the host does.

Collected by test_triton.py alone.
"""

import contextlib

import loss_extremes
import pytest
import torch
from interpreted_triton import NIGHTLY, kernel  # noqa: F401  (kernel is a fixture)
from loss_matrix import BF16, F16, F32, F64, check, combinations, largest, pairs
from torch.utils._python_dispatch import TorchDispatchMode

from kd import DistillLoss, LinearDistillLoss
from kd.losses.kernels import triton as launcher

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a GPU does without a word
SAMPLE = 1 if NIGHTLY else 61
FULL = {"temperature": 3.0, "student_temperature": 2.0, "label_smoothing": 0.1, "smoothing": "others"}


def batch(n=6, k=21, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(n, k, generator=generator, dtype=F64) for _ in range(2))
    return s.to(dtype).requires_grad_(), t.to(dtype), torch.randint(k, (n,), generator=generator)


def gradient(value, leaf, upstream=None, **settings):
    return torch.autograd.grad(value, leaf, upstream, **settings)[0]


def loss_of(backend="triton", **settings):
    return DistillLoss(backend=backend, **FULL | settings)


# ---- the matrix


def test_the_sample_has_every_pair():
    sample = combinations(SAMPLE)
    assert pairs(sample) == pairs(combinations())
    assert len(sample) == {1: 6480, 61: 107}[SAMPLE]


@pytest.mark.timeout(7200)
def test_matrix(kernel):  # noqa: F811
    """As test_matrix.py has it for the CPU. The interpreter cuts bfloat16 off where a GPU rounds to nearest.

    Values in float32 to 2e-5: at T = 20 the KL cancels, and the reference in float32 is 1.7e-5 off in one of these.
    """
    halves = {BF16: lambda b: torch.finfo(BF16).eps * b.abs() + 1e-5 * largest(b)}
    for i, c in enumerate(combinations(SAMPLE)):
        check("triton", 3, 21, i % 7, c, halves, values=2e-5)


# ---- autograd: the pitfalls of test_pitfalls.py that are not the kernels' alone


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradients(kernel, reduction):  # noqa: F811
    ways = {
        "plain, of logits made from others": (3, lambda v: v.sum()),
        "zero": (1, lambda v: 0 * v.sum()),
        "loss scale": (1, lambda v: 2.0**16 * v.sum()),
        "squared": (1, lambda v: v.square().sum()),
    }
    if reduction == "none":
        strided = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=F64)[::2]
        ways |= {
            "one row": (1, lambda v: v[3]),
            "strided": (1, lambda v: (v * strided).sum()),
            "expanded": (1, lambda v: (v * strided[:1].expand(6)).sum()),
        }
    s, t, y = batch()
    y[2] = -100
    for name, (factor, way) in ways.items():
        ours, exact = (
            gradient(way(loss_of(backend, reduction=reduction)(factor * s, t, y)), s)
            for backend in ("triton", "reference")
        )
        assert (ours - exact).abs().max() <= 1e-12 * exact.abs().max(), name


@pytest.mark.parametrize("p", [0.99, 0.999])
def test_confident_rows(kernel, p):  # noqa: F811
    """To half a last digit of float16, and float32's own error of a difference of numbers near 1."""
    s, t, _ = batch(16, 10)
    y = torch.arange(16) % 10
    odds = torch.tensor(9 * p / (1 - p)).log()
    s = (0.2 * s.detach() + odds * torch.nn.functional.one_hot(y, 10)).to(F16).requires_grad_()
    t = (s.detach().double() + 0.2 * t).to(F16)
    exact_s = s.detach().double().requires_grad_()
    for kd_weight in (0.0, 1.0):
        settings = {"kd_weight": kd_weight, "ce_weight": 1.0, "label_smoothing": 0.0, "reduction": "sum"}
        ours = gradient(loss_of(**settings)(s, t, y), s).double()
        exact = gradient(loss_of("reference", **settings)(exact_s, t.double(), y), exact_s)
        assert ((ours - exact).abs() <= torch.finfo(F16).eps / 2 * exact.abs() + 4e-7).all()


@pytest.mark.parametrize("dtype", [F64, F16])
def test_a_second_derivative_is_refused_and_a_retained_graph_gives_the_same_bits(kernel, dtype):  # noqa: F811
    s, t, y = batch(dtype=dtype)
    for scale in (1.0, 0.3):
        value = scale * loss_of()(s, t, y)
        first = gradient(value, s, retain_graph=True)
        kept = first.clone()
        first.zero_()  # its receiver owns it
        assert torch.equal(gradient(value, s), kept)
    first = gradient(loss_of()(s, t, y), s, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='triton' has no second derivative: use backend='reference'"):
        first.square().sum().backward()


@pytest.mark.parametrize("seed", range(3))
def test_identities(kernel, seed):  # noqa: F811
    """Shift and permutation of classes, gradient rows of sum 0, nothing to learn at s = t, additive over a batch."""
    s, t, y = batch(4, 37, seed=seed)
    loss = loss_of(reduction="none", temperature=0.5 + 3 * seed)

    def call(s, t, y):
        leaf = s.detach().requires_grad_()
        value = loss(leaf, t, y)
        return value.detach(), gradient(value.sum(), leaf)

    def close(a, b, tolerance=1e-11):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    value, slope = call(s, t, y)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(seed))
    for other in (call(s + 20, t - 7, y), call(s[:, order], t[:, order], order.argsort()[y])):
        close(other[0], value)
    close(call(s + 20, t - 7, y)[1], slope)
    close(call(s[:, order], t[:, order], order.argsort()[y])[1], slope[:, order])
    close(slope.sum(-1), torch.zeros(4, dtype=F64), 1e-13)
    parts = [call(s[i], t[i], y[i]) for i in (slice(0, 1), slice(1, 4))]
    assert torch.equal(torch.cat([part[1] for part in parts]), slope)
    loss.student_temperature, loss.ce_weight = None, 0.0
    value, slope = call(s, s.detach(), y)
    close(value, torch.zeros_like(value), 1e-14)
    close(slope, torch.zeros_like(slope), 1e-14)


# ---- the ends of settings and dtypes


@pytest.mark.parametrize("name", loss_extremes.SETTINGS)
def test_settings_at_the_ends_of_their_ranges(kernel, name):  # noqa: F811
    loss_extremes.settings_at_their_ends("triton", F32, name, sizes=(5,), ways=(False,))


LARGEST = [
    (F32, 1e20, 1000.0),
    (F32, loss_extremes.LARGEST, 0.001),
    (F32, loss_extremes.LARGEST, 4.0),
    (F16, 65504, 4.0),
]


@pytest.mark.parametrize(("dtype", "m", "temperature"), LARGEST)
def test_the_largest_logits(kernel, dtype, m, temperature):  # noqa: F811
    loss_extremes.largest_logits("triton", dtype, m, temperature, repeats=(1, 5))


def test_a_step_from_one_end_of_float32_to_the_other_leaves_classes_without_a_share_alone(kernel):  # noqa: F811
    s = torch.full((1, 20), -loss_extremes.LARGEST)
    s[:, 16:] = loss_extremes.LARGEST  # the second block of the sweeps
    q = torch.nn.functional.one_hot(torch.tensor([17]), 20).float()
    loss = DistillLoss(kd_weight=0.0, ce_weight=1.0, backend="triton")
    assert loss(s, None, q).item() == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)


def test_a_label_at_the_lowest_number_counts_once(kernel):  # noqa: F811
    s = torch.tensor([[-loss_extremes.LARGEST, 0.0, 1.0, 2.0]])
    loss = DistillLoss(kd_weight=0.0, ce_weight=1.0, label_smoothing=0.1, backend="triton")
    assert loss(s, None, torch.tensor([0])).item() == pytest.approx((0.9 + 0.1 / 4) * loss_extremes.LARGEST, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.001, 4.0])
def test_infinities(kernel, temperature):  # noqa: F811
    loss_extremes.infinities("triton", F32, temperature, sizes=(20,))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_from_is_0_with_a_gradient_of_0(kernel, reduction):  # noqa: F811
    s, t, y = batch(4, 5, F32)
    ignored, soft = torch.full_like(y, -100), t.softmax(-1)
    for given, settings in (
        ((s[:0], t[:0], y[:0]), {}),
        ((s[:0], t[:0], soft[:0]), {}),
        ((s, t, ignored), {}),
        ((float("nan") * s, t, ignored), {"teacher_smoothing": 0.1}),
        ((s, t, y), {"kd_weight": 0.0, "ce_weight": 0.0}),
        ((s, None, soft), {"kd_weight": 0.0, "ce_weight": 0.0}),
        ((s, t, y), {"kd_weight": 0.0, "ce_weight": 1.0, "class_weight": torch.zeros(5)}),
    ):
        leaf = given[0].detach().clone().requires_grad_()
        value = loss_of(reduction=reduction, **settings)(leaf, *given[1:])
        assert torch.equal(value, torch.zeros(len(leaf)) if reduction == "none" else torch.tensor(0.0))
        assert torch.equal(gradient(value.sum(), leaf), torch.zeros_like(leaf))


@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_a_label_that_is_no_class_makes_the_loss_nan(kernel, label):  # noqa: F811
    """Its check would make the host wait for the GPU. It is not followed: 2**40 elements on there is no memory."""
    s, t, y = batch(4, 5, F32)
    y[1] = label
    for way in (loss_of(reduction="none"), LinearDistillLoss(backend="triton", reduction="none")):
        leaf = s.detach().clone().requires_grad_()
        head = (torch.eye(5), y) if isinstance(way, LinearDistillLoss) else ()
        value = way(leaf, *head, teacher_logits=t) if head else way(leaf, t, y)
        assert value.isnan().tolist() == [False, True, False, False]
        assert gradient(value.sum(), leaf).isnan().all(-1).tolist() == [False, True, False, False]
    assert loss_of(reduction="mean")(s, t, y).isnan()


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
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_waits_for_the_gpu(monkeypatch, k, reduction):
    """No value of a tensor is read on the way through loss and gradient, so a CUDA graph may capture both."""
    launches = Launches()
    for name in ("resident", "sweeps"):
        monkeypatch.setattr(launcher, name, launches)
    s, t, y = batch(3, k, F32)
    y[1] = -100
    for target, weight in ((y, None), (y, torch.ones(k)), (t.softmax(-1), torch.ones(k))):
        loss = loss_of(reduction=reduction, class_weight=weight)
        with NoWaiting():
            terms = loss.terms(s, t, target)
            gradient(0.3 * terms.loss.sum(), s)
            with torch.no_grad():
                loss(s, t, target)
    assert len(launches.grids) == 3 * 3  # loss and gradient, the gradient's adjustment, values alone
    with pytest.raises(AssertionError, match="waits for the GPU"), NoWaiting():
        s.sum().item()


def test_the_launch_is_on_the_device_of_the_logits(monkeypatch):
    """Triton launches on the current device, which need not be theirs."""
    current = []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.data_ptr())
        yield
        current.pop()

    class Launch(Launches):
        def __getitem__(self, grid):
            assert current == [s.data_ptr()]
            return super().__getitem__(grid)

    launches = Launch()
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(launcher, "resident", launches)
    s, t, y = batch()
    gradient(0.3 * loss_of()(s, t, y), s)
    assert len(launches.grids) == 2
