"""Implementations of one loss, 0.1 CE with smoothing 0.1 + 0.9 T² KL at T = 4, mean over rows, each as one step.

A step runs forward and backward once from a fresh ``.grad`` and returns the loss. n rows, k classes, d features.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd import DistillLoss
from kd.losses.linear import LinearDistillLoss

TEMPERATURE, KD_WEIGHT, CE_WEIGHT, SMOOTHING = 4.0, 0.9, 0.1, 0.1
SETTINGS = {"temperature": TEMPERATURE, "kd_weight": KD_WEIGHT, "ce_weight": CE_WEIGHT, "label_smoothing": SMOOTHING}


class Missing(RuntimeError):
    """Why an implementation is not measured."""


class Step(NamedTuple):
    """One forward and backward pass; ``leaves`` carry its gradients, ``note`` is shown beside the name."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()
    note: str = ""


class Case(NamedTuple):
    """Inputs by their sizes; ``d`` is for linear heads only."""

    n: int
    k: int
    dtype: str
    device: str
    d: int = 0

    def draw(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = scale * torch.randn(shape, generator=generator)
        return values.to(self.device, getattr(torch, self.dtype))

    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """A student's (a leaf), a teacher's, and labels."""
        student, teacher = (self.draw(self.n, self.k, seed=seed, scale=3.0) for seed in (0, 1))
        return student.requires_grad_(), teacher, self.labels()

    def labels(self) -> Tensor:
        return torch.randint(self.k, (self.n,), generator=torch.Generator().manual_seed(2)).to(self.device)


def training_step(loss: Callable[[], Tensor], *leaves: Tensor, note: str = "") -> Step:
    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = loss()
        value.backward()
        return value.detach()

    return Step(run, leaves, note)


def eager_loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    log_s, p_t = F.log_softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    kl = F.kl_div(log_s, p_t, reduction="batchmean")
    ce = F.cross_entropy(student, target, label_smoothing=SMOOTHING)
    return CE_WEIGHT * ce + KD_WEIGHT * TEMPERATURE**2 * kl


def eager(case: Case) -> Step:
    student, teacher, target = case.logits()
    return training_step(lambda: eager_loss(student, teacher, target), student)


def compiled(case: Case) -> Step:
    torch.compiler.reset()  # each shape gets its own code, as a training run would
    student, teacher, target = case.logits()
    function = torch.compile(eager_loss, dynamic=False)
    return training_step(lambda: function(student, teacher, target), student)


def timm_task(case: Case) -> Step:
    _need("timm", "pip install 'kd-torch[train]'")
    from timm.task import LogitDistillationTask

    student, teacher, target = case.logits()
    given = _Given(student)
    task = LogitDistillationTask(
        given,
        _Given(teacher),
        criterion=nn.CrossEntropyLoss(label_smoothing=SMOOTHING),
        task_loss_weight=CE_WEIGHT,
        distill_loss_weight=KD_WEIGHT,
        temperature=TEMPERATURE,
        verbose=False,
    )
    images = torch.zeros(1, 1, 2, 2, device=case.device)
    return training_step(lambda: task(images, target)["loss"], given.logits)


def torchdistill_loss(case: Case) -> Step:
    _need("torchdistill", "pip install torchdistill")
    from torchdistill.losses.mid_level import KDLoss

    student, teacher, target = case.logits()
    loss = KDLoss("m", "output", "m", "output", TEMPERATURE, CE_WEIGHT, beta=KD_WEIGHT, label_smoothing=SMOOTHING)
    return training_step(lambda: loss({"m": {"output": student}}, {"m": {"output": teacher}}, target), student)


def liger(case: Case) -> Step:
    if case.device == "cpu":
        raise Missing("GPU only")
    _need("liger_kernel", "pip install liger-kernel")
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    student, teacher, target = case.logits()
    cross_entropy, kl_div = LigerCrossEntropyLoss(label_smoothing=SMOOTHING), LigerKLDIVLoss(reduction="batchmean")

    def loss() -> Tensor:
        log_s, p_t = F.log_softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
        kl = kl_div(log_s, p_t)
        # On a copy, because its cross entropy writes the gradient over the logits.
        return CE_WEIGHT * cross_entropy(student.clone(), target) + KD_WEIGHT * TEMPERATURE**2 * kl

    return training_step(loss, student)


def ours(case: Case) -> Step:
    student, teacher, target = case.logits()
    loss = DistillLoss(**SETTINGS)
    loss(student, teacher, target)
    return training_step(lambda: loss(student, teacher, target), student, note=str(loss.backend_used))


def floor(case: Case) -> Step:
    """Two reads and a write: what no loss with a dense gradient can go below."""
    student, teacher, _ = case.logits()
    student = student.detach()
    return Step(lambda: torch.add(student, teacher))


def unfused_linear(case: Case) -> Step:
    features, weight, teacher_features, teacher_weight = _heads(case)
    target, loss = case.labels(), DistillLoss(**SETTINGS)

    def value() -> Tensor:
        # Nested, so that no name keeps logits alive longer than the loss does.
        return loss(F.linear(features, weight), F.linear(teacher_features, teacher_weight), target)

    return training_step(value, features, weight)


def linear(case: Case) -> Step:
    features, weight, teacher_features, teacher_weight = _heads(case)
    target, loss = case.labels(), LinearDistillLoss(**SETTINGS)

    def value() -> Tensor:
        return loss(features, weight, target, teacher_features=teacher_features, teacher_weight=teacher_weight)

    value()
    return training_step(value, features, weight, note=str(loss.backend_used))


def _heads(case: Case) -> tuple[Tensor, ...]:
    """Features and head of a student (leaves) and a teacher."""
    features, teacher_features = (case.draw(case.n, case.d, seed=seed) for seed in (0, 1))
    weight, teacher_weight = (case.draw(case.k, case.d, seed=seed, scale=3 * case.d**-0.5) for seed in (2, 3))
    return features.requires_grad_(), weight.requires_grad_(), teacher_features, teacher_weight


class _Given(nn.Module):
    """A network whose output is a parameter: what is differentiated are the logits themselves."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits.detach())
        self.num_classes, self.in_chans = logits.shape[-1], 1
        self.pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def _need(package: str, command: str) -> None:
    if find_spec(package) is None:
        raise Missing(f"not installed: {command}")


LOSSES: dict[str, Callable[[Case], Step]] = {
    "eager PyTorch": eager,
    "torch.compile": compiled,
    "timm LogitDistillationTask": timm_task,
    "torchdistill KDLoss": torchdistill_loss,
    "Liger CE + KL": liger,
    "kd DistillLoss": ours,
    "floor: torch.add": floor,
}
LINEAR: dict[str, Callable[[Case], Step]] = {
    "F.linear, DistillLoss": unfused_linear,
    "kd LinearDistillLoss": linear,
}
EVERY = {**LOSSES, **LINEAR}
