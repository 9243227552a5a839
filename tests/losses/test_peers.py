"""The same value and gradient as other libraries' distillation, where the formula is the same."""

import pytest
import torch
from timm.task import LogitDistillationTask
from torch import nn

from kd import DistillLoss


class Given(nn.Module):
    """A model whose output is a parameter: what the other library differentiates are the logits themselves."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.num_classes, self.in_chans = logits.shape[-1], 1
        self.pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}

    def forward(self, images):
        return self.logits


def batch(shape=(8, 10)):
    generator = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return s, t, torch.randint(shape[-1], shape[:-1], generator=generator)


def assert_equal_to(ours, value, gradient, s, t, y):
    s = s.clone().requires_grad_()
    loss = ours(s, t, y)
    loss.backward()
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(s.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_timm(temperature, label_smoothing):
    s, t, y = batch()
    student = Given(s)
    task = LogitDistillationTask(
        student,
        Given(t),
        criterion=nn.CrossEntropyLoss(label_smoothing=label_smoothing),
        task_loss_weight=0.3,
        distill_loss_weight=0.6,
        temperature=temperature,
        verbose=False,
    )
    theirs = task(torch.zeros(8, 1, 2, 2), y)
    theirs["loss"].backward()
    ours = DistillLoss(temperature, ce_weight=0.3, kd_weight=0.6, label_smoothing=label_smoothing)
    assert_equal_to(ours, theirs["loss"].detach(), student.logits.grad, s, t, y)
    terms = ours.terms(s, t, y)
    torch.testing.assert_close(terms.kd, theirs["kd_loss"].detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.ce, theirs["task_loss"].detach(), rtol=1e-12, atol=0)
