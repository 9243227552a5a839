"""A trainer of a network small enough to redo by hand, and what it leaves."""

import json

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from kd.config.schema import DataConfig, OptimizerConfig, Recipe, SchedulerConfig, TrainConfig
from kd.data import load_data
from kd.losses.distill import DistillLoss
from kd.losses.methods.registry import build
from kd.models.wrappers import Student
from kd.training.logger import Logger
from kd.training.loop import Trainer
from kd.training.objective import Objective
from kd.training.run import Run
from kd.training.stage import Stage


class Tiny(nn.Module):
    """One hidden layer with dropout, so that the random state matters."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 10))

    def forward(self, x):
        return self.inner(x)


def recipe(**train) -> Recipe:
    return Recipe(
        name="t",
        seed=3,
        data=DataConfig(image_size=8, shift=1),
        optimizer=OptimizerConfig(name="adamw", lr=5e-3),
        scheduler=SchedulerConfig(name="cosine", warmup_epochs=0),
        train=TrainConfig(**{"batch_size": 128, "log_every": 1, **train}),
    )


def trainer(tmp_path, r: Recipe, *, teacher=None, loss=None, methods=None, epochs=2, dropout=0.0, precision="no"):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    data = load_data(r.data, r.seed)
    torch.manual_seed(0)
    loss = loss or DistillLoss(kd_weight=0.0, ce_weight=1.0, reduction="sum")
    objective = Objective(loss, build(methods or {}))
    stage = Stage("student", Student(Tiny(dropout)), objective, epochs, data, teacher)
    logger = Logger(tmp_path / "metrics.jsonl", accelerator, Console(quiet=True))
    return Trainer(stage, Run(r, data, accelerator, tmp_path, tmp_path / "teacher", logger))


def weights(t: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in t.stage.model.parameters()])


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
