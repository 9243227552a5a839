"""The losses in every mode that PyTorch has: whatever plain cross entropy and KL do there, they do too.

"plain" is the loss written with PyTorch's own functions, in the same mode.
"""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.testing import assert_close

from kd import DistillLoss, LinearDistillLoss
from kd.losses.methods.registry import library

BACKENDS = ["reference", "cpu", "auto", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),  # of forward-mode in PyTorch
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of Triton's interpreter, which computes with NumPy
]


def batch(rows=6):
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, rows, 5, generator=generator)
    return s.requires_grad_(), t, torch.randint(5, (rows,), generator=generator)


def plain(s, t, y, reduction="mean"):
    """DistillLoss() in PyTorch's functions."""
    ce = F.cross_entropy(s, y, reduction="none")
    kd = F.kl_div(F.log_softmax(s / 4, -1), F.log_softmax(t / 4, -1), log_target=True, reduction="none").sum(-1) * 16
    loss = 0.1 * ce + 0.9 * kd
    return loss.mean() if reduction == "mean" else loss


def linear(reduction="mean", backend="auto"):
    """LinearDistillLoss as a loss of features (6, 4) and a fixed head, with the plain loss of its logits."""
    weight = torch.linspace(-1, 1, 20).view(5, 4)
    loss = LinearDistillLoss(reduction=reduction, backend=backend)
    return (
        lambda x, t, y: loss(x, weight, y, teacher_logits=t),
        lambda x, t, y: plain(F.linear(x, weight), t, y, reduction),
    )


def features():
    s, t, y = batch()
    return s.detach()[:, :4].contiguous().requires_grad_(), t, y


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_of_inference_mode(backend):
    s, t, y = batch()
    with torch.inference_mode():
        inferred = t.clone()
    right, got = plain(s, t, y), DistillLoss(backend=backend)(s, inferred, y)
    assert_close(torch.autograd.grad(got, s, retain_graph=True), torch.autograd.grad(right, s))
    assert_close(torch.autograd.grad(got * 2, s)[0], torch.autograd.grad(2 * plain(s, t, y), s)[0])  # once more

    x, t, y = features()
    ours, theirs = linear(backend=backend)
    assert_close(torch.autograd.grad(ours(x, inferred, y), x), torch.autograd.grad(theirs(x, t, y), x))


@pytest.mark.parametrize("name", ["kd", "logit_mse", "dkd", "dist"])
def test_a_method_with_a_teacher_of_inference_mode(name):
    s, t, y = batch()
    with torch.inference_mode():
        inferred = t.clone()
    method = library()[name]()
    gradients = [torch.autograd.grad(method(s, x, y), s)[0] for x in (t, inferred)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode(backend):
    s, t, y = batch()
    loss = DistillLoss(reduction="none", backend=backend)
    x, tangent = s.detach(), torch.arange(30.0).view(6, 5)
    value, pushed = torch.func.jvp(lambda x: loss(x, t, y), (x,), (tangent,))
    right, expected = torch.func.jvp(lambda x: plain(x, t, y, "none"), (x,), (tangent,))
    assert_close((value, pushed), (right, expected))
    whole = torch.autograd.functional.jacobian(lambda x: plain(x, t, y, "none"), x)
    for strategy in ({"strategy": "forward-mode", "vectorize": True}, {"vectorize": True}):
        assert_close(torch.autograd.functional.jacobian(lambda x: loss(x, t, y), x, **strategy), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_upstream_gradients_at_once(backend, reduction, dtype):
    s, t, y = batch()
    s = s.detach().to(dtype).requires_grad_()
    got, right = DistillLoss(reduction=reduction, backend=backend)(s, t, y), plain(s.float(), t, y, reduction)
    upstream = torch.tensor([1.0, 0.0, -2.0, 1e-3]) if reduction == "mean" else torch.eye(6) - 0.5
    got, right = (torch.autograd.grad(x, s, upstream, is_grads_batched=True)[0] for x in (got, right))
    assert_close(got, right)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_upstream_gradients_of_a_linear_head(reduction):
    x, t, y = features()
    ours, theirs = linear(reduction)
    upstream = torch.tensor([1.0, -2.0]) if reduction == "mean" else torch.eye(6)
    got, right = (torch.autograd.grad(f(x, t, y), x, upstream, is_grads_batched=True)[0] for f in (ours, theirs))
    assert_close(got, right)
    assert_close(torch.func.jacfwd(lambda x: ours(x, t, y))(x.detach()), torch.func.jacfwd(theirs)(x.detach(), t, y))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_exported_program_takes_any_number_of_rows(reduction, soft):
    n, loss = Dim("n"), DistillLoss(reduction=reduction, label_smoothing=0.1)

    def inputs(rows):
        s, t, y = batch(rows)
        return s.detach(), t, t.softmax(-1) if soft else y

    program = torch.export.export(loss, inputs(6), dynamic_shapes=({0: n}, {0: n}, {0: n})).module()
    for rows in (6, 2, 11):
        assert_close(program(*inputs(rows)), loss(*inputs(rows)))


@pytest.mark.parametrize("label", [-1, 255])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_that_is_none_gives_nan_where_it_cannot_be_read(backend, label):
    s, t, y = batch()
    wrong = y.clone()
    wrong[2] = label
    loss = DistillLoss(reduction="none", backend=backend)
    compiled = torch.compile(loss, backend="eager")(s, t, wrong)
    mapped = torch.func.vmap(loss)(s[None], t[None], wrong[None])[0]
    for got in (compiled, mapped):
        assert got.isnan().tolist() == [i == 2 for i in range(6)]
        assert_close(got[3:], plain(s, t, y, "none")[3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_does_not_compile_again(backend):
    s, t, y = batch()
    loss = DistillLoss(backend=backend)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in range(20):
        loss.temperature, loss.kd_weight, loss.label_smoothing = 1 + step / 4, 0.5 + step / 50, 0.01 * (step + 1)
        gradient = torch.autograd.grad(compiled(s, t, y), s)
        assert_close(gradient, torch.autograd.grad(DistillLoss.forward(loss, s, t, y), s))
    assert counter.frame_count == 2  # with numbers as constants, and once more when they are seen to change


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_may_be_overwritten_between_the_passes(backend):
    """As with F.cross_entropy, which keeps its softmax and not its input."""
    if backend == "triton":
        pytest.skip("only the GPU knows whether the backward pass needs the logits again")
    s, t, y = batch()
    logits = s * 1
    loss = DistillLoss(backend=backend)(logits, t, y)
    logits.zero_()
    got = torch.autograd.grad(loss, s)
    assert_close(got, torch.autograd.grad(plain(s, t, y), s))


GAPS = [87.0, 87.3, 87.4, 88.0, 95.0, 103.0, 104.0, 708.0, 709.0, 800.0, 1e13, math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [5, 2500])
def test_a_class_that_only_the_student_masks(classes, dtype):
    """inf on every backend where the teacher's probability beside its largest is a normal number, else nothing."""
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 4.0):
        for gap in GAPS:
            s, t = torch.randn(2, 1, classes, generator=generator, dtype=dtype)
            t[0, 3], s[0, 3] = t.max() - gap, -math.inf
            normal = math.exp(-gap / temperature) >= torch.finfo(dtype).tiny
            others = torch.arange(classes) != 3
            kd = DistillLoss(temperature, ce_weight=0, kd_weight=1)(s[:, others], t[:, others], torch.zeros(1).long())
            for backend in BACKENDS:
                x = s.clone().requires_grad_()
                loss = DistillLoss(temperature, ce_weight=0, kd_weight=1, backend=backend)(x, t, torch.zeros(1).long())
                assert_close(loss.detach(), torch.full_like(loss, math.inf) if normal else kd)
                assert torch.autograd.grad(loss, x)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors(backend):
    with FakeTensorMode():
        s, t, y = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5), torch.randint(5, (6,))
        loss = DistillLoss(backend=backend)(s, t, y)
        assert torch.autograd.grad(loss, s)[0].shape == (6, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recorded_graph_computes_anew(backend):
    """make_fx records operations of PyTorch, of other tensors: a kernel's result would be a constant in its graph."""
    from torch.fx.experimental.proxy_tensor import make_fx

    s, t, y = batch()
    graph = make_fx(DistillLoss(backend=backend))(s.detach() * 3, t, y)
    assert_close(graph(s.detach(), t, y), plain(s.detach(), t, y))


def test_scalars_of_numpy_are_settings():
    s, t, y = batch()
    settings = {"temperature": np.float32(2), "ce_weight": np.int64(1), "label_smoothing": np.float64(0.1)}
    loss = DistillLoss(**settings, ignore_index=np.int64(-1), reduction=np.str_("sum"))
    right = DistillLoss(2.0, ce_weight=1, label_smoothing=0.1, ignore_index=-1, reduction="sum")
    assert torch.equal(loss(s, t, y), right(s, t, y))
    assert repr(loss) == repr(right)
    assert library()["dkd"](temperature=np.float32(2)).temperature == 2.0


IN_A_PROCESS_OF_ITS_OWN = {
    "default device": """
torch.set_default_device("meta")
for backend in ("auto", "reference", "cpu"):
    x = s.clone().requires_grad_()
    loss = DistillLoss(backend=backend)(x, t, y)
    loss.backward()
    assert loss.device.type == "cpu" and abs(loss.item() - right) < 1e-6
    x, w = s[:, :4].clone().requires_grad_(), s[:5, :4].clone()
    LinearDistillLoss(backend=backend)(x, w, y, teacher_logits=t).backward()
    assert x.grad.abs().sum().item() > 0
""",
    "DTensor": """
import os
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for placement in (Shard(0), Shard(1), Replicate()):
    x = distribute_tensor(s, mesh, [placement]).requires_grad_()
    for loss, inputs in ((DistillLoss(), (x, t, y)), (LinearDistillLoss(kd_weight=0), (x, t[:5], y))):
        try:
            loss(*inputs)
            raise SystemExit("no error")
        except TypeError as error:
            assert ".to_local()" in str(error)
    loss = DistillLoss()(x.to_local(), t, y)
    loss.backward()
    assert abs(loss.item() - right) < 1e-6 and x.grad.abs().sum().item() > 0
""",
}


@pytest.mark.parametrize("mode", IN_A_PROCESS_OF_ITS_OWN)
def test_in_a_process_of_its_own(mode):
    start = """
import torch
from kd import DistillLoss, LinearDistillLoss
torch.manual_seed(0)  # rounding at 1e-6 depends on the draw
s, t, y = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
right = DistillLoss(backend="reference")(s, t, y).item()
"""
    code = start + IN_A_PROCESS_OF_ITS_OWN[mode]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
