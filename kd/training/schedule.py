"""What follows from the seed and the position alone: optimizer, learning-rate schedule, order and shares of images."""

from dataclasses import asdict
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from kd.config.schema import Recipe, TrainConfig


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several small integers; near inputs give unrelated seeds (the generator hashes them)."""
    generator = torch.Generator()
    seed = 0
    for part in parts:
        generator.manual_seed((seed ^ part) & (2**63 - 1))
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return seed


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order (size,) of the training images in an epoch, the same on every process."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))


def share(batch: Tensor, accumulation: int, processes: int, rank: int) -> list[Tensor]:
    """The part of a global batch (B,) that process `rank` sees: one piece for each accumulation step.

    Sizes differ by at most one where the numbers do not divide B.
    """
    return [piece.tensor_split(processes)[rank] for piece in batch.tensor_split(accumulation)]


def optimizer(parameters: nn.Module | list[Any], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's timm optimizer; of a network, normalisation parameters and biases decay only where it says so."""
    o = recipe.optimizer
    # timm's sgd is Nesterov's, which needs a momentum: without one it is plain SGD, as its momentum=0 means.
    plain = o.name in ("sgd", "nesterov") and o.momentum == 0
    return create_optimizer_v2(
        parameters,
        opt="momentum" if plain else o.name,
        lr=o.lr,
        weight_decay=o.weight_decay,
        momentum=o.momentum,
        filter_bias_and_bn=not o.decay_norm_and_bias,
    )


def ema(network: nn.Module, train: TrainConfig) -> ModelEmaV3:
    """timm's moving average of the weights. With warm-up its k-th update has the decay min(ema_decay, 1 - k^(-2/3)), so
    that the first one replaces the initial weights; without, every update has ema_decay.
    """
    return ModelEmaV3(network, decay=train.ema_decay, use_warmup=train.ema_warmup)


def schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, epochs: int, updates_per_epoch: int) -> Scheduler:
    """The recipe's timm schedule of the learning rate, stepped after every update."""
    settings: dict[str, Any] = asdict(recipe.scheduler)  # named as timm names them, but for two
    name, milestones = settings.pop("name"), settings.pop("milestones")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=name,
        decay_milestones=milestones,
        num_epochs=epochs,
        step_on_epochs=False,  # smooth also where an epoch has few updates
        updates_per_epoch=updates_per_epoch,
        **settings,
    )
    assert scheduler is not None
    return scheduler
