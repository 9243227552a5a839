"""The fused backends under autograd, transforms and compilers: one gradient, handed out once, never silently wrong."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from kd import DistillLoss
from kd.losses import settings
from kd.losses.kernels import autograd as fused

FULL = {"label_smoothing": 0.1, "smoothing": "others", "student_temperature": 2.0}
WEIGHT = torch.tensor([0.3, 2.0, 0.0, 1.0, 5.0])


def batch(shape=(6, 5), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    y = torch.randint(shape[-1], shape[:-1], generator=generator)
    return s.to(dtype).requires_grad_(), t.to(dtype), y


def reference(loss):
    """The same loss in plain PyTorch."""
    plain = copy.copy(loss)
    plain.backend = "reference"
    return plain


def gradient(value, leaf, **settings):
    return torch.autograd.grad(value, leaf, **settings)[0]


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- which backend runs


def test_auto_takes_the_fused_backend_of_the_device_and_says_so():
    s, t, y = batch()
    loss = DistillLoss()
    assert loss.backend_used is None
    loss(s, t, y)
    assert loss.backend_used == "cpu"
    loss.backend = "reference"
    loss(s, t, y)
    assert loss.backend_used == "reference"


def test_a_missing_package_is_a_warning_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(settings._INSTALLED, "numba", False)
    s, t, y = batch()
    loss = DistillLoss()
    with pytest.warns(UserWarning, match="backend='auto' takes 'reference': pip install numba for 'cpu'"):
        loss(s, t, y)
    assert loss.backend_used == "reference"
    loss.backend = "cpu"
    with pytest.raises(ModuleNotFoundError, match="backend='cpu': needs numba; pip install numba"):
        loss(s, t, y)


# ---- the gradient and what is multiplied into it


@pytest.mark.parametrize("autocast", [False, True])
def test_grad_scaler(autocast):
    """2^16 scales without rounding: unscaled it is the same gradient, also where autocast makes the logits bfloat16."""
    s, t, y = batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    head = nn.Linear(5, 5)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    loss = DistillLoss(**FULL)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = head(s.detach())
        assert logits.dtype == (torch.bfloat16 if autocast else torch.float32)
        plain = gradient(loss(logits, t, y), head.weight)
        scaled = loss(head(s.detach()), t, y)
    scaler.scale(scaled).backward()
    assert head.weight.grad.abs().max() > 2.0**10 * plain.abs().max()
    scaler.unscale_(optimizer)
    assert_close(head.weight.grad, plain)


def test_no_more_memory_than_one_gradient():
    """The largest sum of living N x K tensors that the loss makes itself: its gradient, nothing beside it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Made(TorchDispatchMode):
        shapes: list

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            new = {"empty", "empty_like", "zeros", "clone", "mul", "new_empty", "empty_strided", "_to_copy", "sub"}
            for tensor in out if isinstance(out, tuple) else (out,):
                large = isinstance(tensor, torch.Tensor) and tensor.numel() >= 512 * 100
                if large and function.__name__.split(".")[0] in new:
                    self.shapes.append((function.__name__, tensor.shape))
            return out

    s, t, y = batch((512, 100))
    loss = DistillLoss(label_smoothing=0.1)
    loss(s, t, y).backward()
    s.grad = None
    with Made() as made:
        made.shapes = []
        loss(s, t, y).backward()
    assert len(made.shapes) == 1, made.shapes


# ---- compilers and transforms


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_torch_compile_in_one_graph_for_any_number_of_rows(backend):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    loss = DistillLoss(3.0, reduction="none", class_weight=WEIGHT, backend=backend, **FULL)
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for n in (6, 9, 4):
        s, t, y = batch((n, 5))
        y[1] = -100
        up = torch.randn(n)
        assert_close(gradient(compiled(s, t, y), s, grad_outputs=up), gradient(loss(s, t, y), s, grad_outputs=up))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], counts


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="Inductor needs a C++ compiler")
def test_torch_compile_by_its_default_compiler():
    """A training step's forward and backward pass in one graph, compiled to machine code around the operation."""
    torch.compiler.reset()
    model, (x, t, y) = Distilled(), batch()
    x = x.detach()[:, :4].contiguous()
    y[1] = -100
    plain = torch.autograd.grad(model(x, t, y), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True)
    assert_close(torch.autograd.grad(compiled(x, t, y), list(model.parameters())), plain)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_the_operation_is_registered_as_torch_wants_it(soft, with_gradient):
    s, t, y = batch()
    s = s.detach()
    target = s.softmax(-1) if soft else y
    settings = torch.tensor([3.0, 2.0, 0.9, 0.1, 0.1], dtype=torch.float64), "cpu", -100, with_gradient
    torch.library.opcheck(fused.fused_rows, (s, t, target, WEIGHT, torch.ones(6), *settings))
    torch.library.opcheck(fused.fused_rows, (s, None, target, None, torch.ones(()).expand(6), *settings))


class Distilled(nn.Module):
    """A module that holds the loss, as a training step does."""

    def __init__(self):
        super().__init__()
        self.head, self.loss = nn.Linear(4, 5), DistillLoss(3.0, **FULL)

    def forward(self, x, t, y):
        return self.loss(self.head(x), t, y)
