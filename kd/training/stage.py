"""One network to train, and what of its training is a function of the seed: order, schedule, shares, first batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from kd.config.schema import Recipe
from kd.data import Batch, Data, Split, mixer
from kd.data.mixing import Mixer
from kd.losses.methods.base import Seen, View
from kd.models.ensemble import Reclassified
from kd.models.factory import Output, Student, Teacher
from kd.models.layers import Taps
from kd.runtime.signals import check
from kd.training.objective import Objective


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several small integers; near inputs give unrelated seeds (the generator hashes them)."""
    generator = torch.Generator()
    seed = 0
    for part in parts:
        generator.manual_seed((seed ^ part) & (2**63 - 1))
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return seed


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of the training images in an epoch, the same on every process."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))


def optimizer(parameters: nn.Module | list[Any], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer, with its rule for weight decay where it is given a network."""
    o = recipe.optimizer
    plain = o.name in ("sgd", "nesterov") and o.momentum == 0  # Nesterov's cannot be without a momentum
    return create_optimizer_v2(
        parameters,
        opt="momentum" if plain else o.name,
        lr=o.lr,
        weight_decay=o.weight_decay,
        momentum=o.momentum,
        filter_bias_and_bn=not o.decay_norm_and_bias,
    )


def schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, epochs: int, updates_per_epoch: int) -> Scheduler:
    """The recipe's schedule of the learning rate, stepped after every update."""
    s = recipe.scheduler
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=s.name,
        num_epochs=epochs,
        decay_epochs=s.decay_epochs,
        decay_milestones=s.milestones,
        decay_rate=s.decay_rate,
        min_lr=s.min_lr,
        warmup_lr=s.warmup_lr,
        warmup_epochs=s.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    assert scheduler is not None
    return scheduler


def share(batch: Tensor, accumulation: int, processes: int, rank: int) -> list[Tensor]:
    """This process's part of one global batch, one piece for each accumulation step."""
    return [piece.tensor_split(processes)[rank] for piece in batch.tensor_split(accumulation)]


@torch.no_grad()
def predict(model: Student | Teacher, split: Split, batch_size: int, accelerator: Accelerator) -> Tensor:
    """Logits (N, K) of a whole split in its own order, on the CPU, the same on every process.

    Raises Interrupted on every process where one was asked to stop.
    """
    model.eval()
    size, world = len(split), accelerator.num_processes
    padded = torch.arange(math.ceil(size / world) * world) % size  # every process must bring as many rows
    plan = list(padded[accelerator.process_index :: world].split(max(1, batch_size // world)))
    rows = []
    for batch in split.batches(plan, epoch=None):
        check(accelerator)
        with accelerator.autocast():
            rows.append(model(batch.images).logits.float())
    logits = torch.cat(rows)
    gathered = accelerator.gather(logits).view(world, len(logits), -1)
    return gathered.transpose(0, 1).reshape(world * len(logits), -1)[:size].cpu()


def not_finite(logits: Tensor) -> str:
    """For how many of the validation images (N, K) logits are not finite, in words; '' where all are."""
    bad = int((~logits.isfinite().all(dim=1)).sum())
    return f"logits of {bad} of {len(logits)} validation images are not finite" if bad else ""


@dataclass
class Stage:
    """One network to train: the student in the loop's sense, whoever its teacher is."""

    name: str
    model: Student
    objective: Objective
    epochs: int
    folder: Path
    metadata: dict[str, Any]
    teacher: Teacher | None = None
    taps: tuple[Taps, Taps] | None = None  # student's and teacher's, where the objective looks at more than logits
    of: dict[str, str] = field(default_factory=dict)  # which stage of which run its files are

    def place(self, device: torch.device, channels_last: bool) -> list[Student | Teacher]:
        """Move everything to a device; returns the networks."""
        networks = [network for network in (self.model, self.teacher) if network]
        for network in networks:
            network.to(device)
            if channels_last:
                network.to(memory_format=torch.channels_last)
        self.objective.to(device)
        return networks

    def deployed(self) -> Student:
        """What is evaluated and saved: the student, or what a method's own classifier makes of it; once it is built."""
        method = self.objective.classifier
        if method is None:
            return self.model
        assert self.taps is not None
        return Student(Reclassified(self.model.model, self.taps[0], method))

    def see(self, batch: Batch, epoch: float, model: nn.Module, accelerator: Accelerator) -> Seen:
        """What the networks give for a batch, after `epoch` epochs; `model` is the student as it is trained."""
        images = batch.images
        ours, theirs = self.taps or (None, None)
        with accelerator.autocast():
            teacher = _view(theirs, self.teacher.model, self.teacher(images)) if self.teacher else None
            student = _view(ours, self.model.model, model(images))
        index = batch.index.to(images.device, non_blocking=True)
        return Seen(student, teacher, batch.targets, index, epoch, self.epochs, images)


def _view(taps: Taps | None, network: nn.Module, output: Output) -> View:
    return taps.view(network, output) if taps else View(output.logits)


def as_trained(batch: Batch, mix: Mixer, seed: int, channels_last: bool) -> Batch:
    """The batch mixed, and laid out in memory, as the recipe says."""
    images, targets = mix(batch.images, batch.targets, seed)
    if channels_last and images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    return batch._replace(images=images, targets=targets)


FIRST = 256  # images from which an objective is built: enough for statistics, whatever the number of processes


def build(stage: Stage, recipe: Recipe, data: Data, accelerator: Accelerator, rehearse: bool = False) -> None:
    """Let the stage's objective make what it learns, from the first images of the first epoch; the same everywhere.

    `rehearse`: evaluate it too, on as few images as a piece of a batch can have. Raises ValueError for what cannot
    work, such as a network without the layers that a method needs.
    """
    if not stage.objective.methods:
        return
    train, processes = recipe.train, accelerator.num_processes
    order = epoch_order(len(data.train), recipe.seed, 0)[: train.batch_size]
    smallest = share(order, train.accumulation, processes, processes - 1)[-1]
    mix = mixer(recipe.data, data.num_classes)
    stage.place(accelerator.device, train.channels_last)
    stage.model.eval()  # batch normalisation must not move
    torch.manual_seed(mixed_seed(recipe.seed, len(order)))
    with torch.no_grad():
        batches = data.train.batches([order[:FIRST], smallest] if rehearse else [order[:FIRST]], 0)
        ready = (as_trained(batch, mix, recipe.seed, train.channels_last) for batch in batches)
        seen = [stage.see(batch, 0.0, stage.model, accelerator) for batch in ready]
    stage.objective.build(seen[0], len(data.train))
    if rehearse:
        stage.objective.rehearse(seen[1])
