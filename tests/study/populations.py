"""A small recipe, its networks, and PyTorch's own training loop to compare a population with."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from kd import DistillLoss
from kd.config.schema import (
    DataConfig,
    LossConfig,
    OptimizerConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from kd.models.factory import build
from kd.study.population import Population, Training
from kd.training.schedule import epoch_order

EPOCHS = 2
RECIPE = Recipe(
    name="tiny",
    seed=3,
    data=DataConfig(image_size=8, shift=1),
    teacher=TeacherConfig(model="mlp_tiny", epochs=EPOCHS, label_smoothing=0.4),
    student=StudentConfig(model="mlp_nano", epochs=EPOCHS),
    optimizer=OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1),
    train=TrainConfig(batch_size=200),
    control=False,
)
HARD = LossConfig(kd_weight=0.0, ce_weight=1.0)


def network(model: str) -> nn.Module:
    torch.manual_seed(RECIPE.seed)
    return build(model, num_classes=10, input_shape=(1, 8, 8))


def ordinary_loop(data, net: nn.Module, criterion, recipe=RECIPE) -> nn.Module:
    """PyTorch as one writes it by hand, in float64: groups for weight decay, a cosine from lr to 0 by its formula."""
    net, o, size = net.double(), recipe.optimizer, recipe.train.batch_size
    per_epoch = len(data.train) // size
    kinds = {"decay": [p for p in net.parameters() if p.ndim > 1], "not": [p for p in net.parameters() if p.ndim <= 1]}
    groups = [{"params": kinds["not"], "weight_decay": 0.0}, {"params": kinds["decay"], "weight_decay": o.weight_decay}]
    if o.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, nesterov=o.momentum > 0)
    else:
        optimizer = torch.optim.AdamW(groups, lr=o.lr)
    for epoch in range(EPOCHS):
        order = epoch_order(len(data.train), RECIPE.seed, epoch)
        for i in range(per_epoch):
            update = epoch * per_epoch + i
            for group in optimizer.param_groups:
                group["lr"] = o.lr * 0.5 * (1 + math.cos(math.pi * update / (EPOCHS * per_epoch)))
            (batch,) = data.train.batches([order[i * size : (i + 1) * size]], epoch)
            optimizer.zero_grad()
            criterion(net(batch.images.double()), batch).backward()
            optimizer.step()
    return net


def criterion_of(loss: LossConfig, teacher: nn.Module | None):
    """The mean loss of a batch by the public loss, plain backend."""
    names = ("temperature", "student_temperature", "kd_weight", "ce_weight", "label_smoothing", "smoothing")
    settings = {name: getattr(loss, name) for name in (*names, "teacher_smoothing")}
    distill = DistillLoss(**settings, backend="reference")

    def criterion(logits, batch):
        with torch.no_grad():
            taught = teacher(batch.images.double()) if teacher else None
        return distill(logits, taught, batch.targets)

    return criterion


def trained(data, members, teachers, recipe=RECIPE) -> Training:
    stacked = Population.of(network("mlp_tiny"), [dict(t.named_parameters()) for t in teachers])
    source = (lambda images, index: stacked.logits(images)) if teachers else None
    training = Training(recipe, data, EPOCHS, network("mlp_nano"), members, source, torch.float64)
    training.fit()
    return training


def assert_same(net: nn.Module, member: dict[str, torch.Tensor], tolerance=1e-10):
    for name, p in net.named_parameters():
        torch.testing.assert_close(member[name], p.detach(), atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def with_optimizer(**changes) -> Recipe:
    return replace(RECIPE, optimizer=replace(RECIPE.optimizer, **changes))
