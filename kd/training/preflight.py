"""Checks before any work: what this machine, timm, the data or a first batch cannot do stops a run at once."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
from pathlib import Path

import torch
from timm.optim import get_optimizer_info, list_optimizers
from torch import Tensor, nn

from kd.config.schema import Recipe
from kd.data import Data
from kd.errors import CheckpointError, ConfigError
from kd.losses.methods import registry as methods
from kd.models.weights import weights_metadata
from kd.training.run import run_name, teacher_is_trained
from kd.training.schedule import optimizer


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def check_environment(recipe: Recipe) -> None:
    """Raise ConfigError for settings that this machine, timm or the schedule cannot have."""
    precision, tracker, warmup = recipe.train.precision, recipe.tracker, recipe.scheduler.warmup_epochs
    has_gpu = torch.accelerator.is_available()
    _require(precision != "fp16" or has_gpu, "train.precision=fp16: needs a GPU; bf16 and fp32 work on a CPU")
    installed = tracker == "none" or importlib.util.find_spec(tracker) is not None
    _require(installed, f"tracker={tracker}: not installed; pip install {tracker}")
    for section in [recipe.student] + ([recipe.teacher] if teacher_is_trained(recipe) else []):
        limit = f"{section.section}epochs={section.epochs}"
        _require(warmup < section.epochs, f"scheduler.warmup_epochs={warmup}: must be < {limit}")
    _check_optimizer(recipe)
    _check_teacher(recipe)


def _check_optimizer(recipe: Recipe) -> None:
    name = recipe.optimizer.name
    known = [str(each) for each in list_optimizers() if each != name]
    near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ["adamw", "sgd", "lamb"])
    try:
        optimizer([nn.Parameter(torch.ones(2, 2))], recipe)
    except Exception as error:  # timm does not know it, a package that it needs is missing, or its arguments are others
        reason = str(error).partition("\n")[0] or "a package that it needs is not installed"
        raise ConfigError(f"optimizer.name={name}: cannot be used here ({reason}); try {near}") from error
    second_order = get_optimizer_info(name).second_order
    _require(not second_order, f"optimizer.name={name}: needs second-order gradients; try adamw, sgd or lamb")


def _check_teacher(recipe: Recipe) -> None:
    teacher = recipe.teacher
    methods.build(teacher.methods, "teacher")
    _require(
        teacher.members == 1 or teacher_is_trained(recipe),
        f"teacher.members={teacher.members}: needs teachers that are trained here, each from its own seed; with "
        f"weights of teacher.checkpoint or timm type teacher.members=1, or teacher.finetune=true",
    )
    if teacher.checkpoint:
        try:
            weights_metadata(teacher.checkpoint)
        except CheckpointError as error:
            raise ConfigError(f"teacher.checkpoint={error}") from error


def check_places(recipe: Recipe, directory: Path) -> None:
    """Raise ConfigError for a name or run that is no plain directory name, and for an output that cannot be used."""
    for key, part in (("name", recipe.name), ("run", run_name(recipe))):
        plain = part.isprintable() and Path(part).name == part and not part.startswith(".")
        _require(
            plain and len(os.fsencode(part)) <= 200,
            f"{key}={part!r}: must be a plain directory name (≤ 200 bytes, printable, no /, not starting with a dot)",
        )
    _require(recipe.name != "teachers", "name=teachers: is the directory of trained teachers; choose another name")
    _require(recipe.output != "", "output=: must be a directory; output=. is the working directory")
    finished = recipe.resume and (directory / "result.json").exists()
    path = Path(recipe.output)
    nearest = next((each for each in (path, *path.parents) if each.exists()), path)
    wrong = f"output={recipe.output}: must be a directory that exists or can be made"
    _require(nearest.is_dir(), f"{wrong} ({nearest} is not one)")
    only_read = finished or recipe.list_layers
    _require(only_read or os.access(nearest, os.W_OK), f"{wrong} ({nearest}: Permission denied)")


def check_batch(recipe: Recipe, data: Data, processes: int) -> None:
    """Raise ConfigError for a batch that is larger than the training set, or too small to be shared out."""
    batch, size, accumulation = recipe.train.batch_size, len(data.transfer.train), recipe.train.accumulation
    _require(batch <= size, f"train.batch_size={batch}: must be ≤ {size}, the training images of {data.name}")
    _require(
        batch >= accumulation * processes,
        f"train.batch_size={batch}: must be ≥ {accumulation * processes}, one image for each of {processes} processes "
        f"x train.accumulation={accumulation}",
    )


def check_validation(recipe: Recipe, data: Data) -> None:
    """Raise ConfigError for so few validation images that even a perfect teacher could not be told from chance."""
    guessing, bound = chance(data.val.targets)
    _require(
        bound < 1,
        f"data.val_fraction={recipe.data.val_fraction}: {data.name} has {len(data.val)} validation images, too few to "
        f"tell a teacher from chance ({guessing:.2%}); add images, or raise it where kd holds them out",
    )


def chance(targets: Tensor) -> tuple[float, float]:
    """The accuracy of always guessing the most frequent of the labels (N,), and the least that is better than chance.

    The bound is one-sided at 1 %: p + 2.33 sqrt(p (1 - p) / N).
    """
    p = float(targets.bincount().max()) / len(targets)
    return p, p + 2.33 * math.sqrt(p * (1 - p) / len(targets))
