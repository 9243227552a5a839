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

USUAL_OPTIMIZERS = ["adamw", "sgd", "lamb"]


def check_environment(recipe: Recipe) -> None:
    """Raise ConfigError for settings that this machine, timm or the schedule cannot have."""
    if recipe.train.precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("train.precision=fp16: needs a GPU; bf16 and fp32 work on a CPU")
    if recipe.tracker != "none" and importlib.util.find_spec(recipe.tracker) is None:
        raise ConfigError(f"tracker={recipe.tracker}: not installed; pip install {recipe.tracker}")
    _check_optimizer(recipe)
    for section in [recipe.student] + ([recipe.teacher] if teacher_is_trained(recipe) else []):
        if recipe.scheduler.warmup_epochs >= section.epochs:
            raise ConfigError(
                f"scheduler.warmup_epochs={recipe.scheduler.warmup_epochs}: must be < {section.section}epochs="
                f"{section.epochs}"
            )
    _check_teacher(recipe)


def _check_optimizer(recipe: Recipe) -> None:
    name = recipe.optimizer.name
    known = [str(each) for each in list_optimizers()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or USUAL_OPTIMIZERS
        raise ConfigError(f"optimizer.name={name}: timm has no such optimizer; try {', '.join(near)}")
    others = ", ".join(each for each in USUAL_OPTIMIZERS if each != name)
    if get_optimizer_info(name).second_order:
        raise ConfigError(f"optimizer.name={name}: needs second-order gradients; try {others}")
    try:
        optimizer([nn.Parameter(torch.ones(2, 2))], recipe)
    except Exception as error:  # a package that it needs is missing, or its arguments do not suit it
        reason = str(error).partition("\n")[0] or "a package that it needs is not installed"
        raise ConfigError(f"optimizer.name={name}: cannot be used here ({reason}); try {others}") from error


def _check_teacher(recipe: Recipe) -> None:
    methods.build(recipe.teacher.methods, "teacher")
    if recipe.teacher.members > 1 and not teacher_is_trained(recipe):
        raise ConfigError(
            f"teacher.members={recipe.teacher.members}: needs teachers that are trained here, each from its own seed; "
            f"with weights of teacher.checkpoint or timm type teacher.members=1, or teacher.finetune=true"
        )
    if checkpoint := recipe.teacher.checkpoint:
        try:
            weights_metadata(checkpoint)
        except CheckpointError as error:
            raise ConfigError(f"teacher.checkpoint={error}") from error


def check_places(recipe: Recipe, directory: Path) -> None:
    """Raise ConfigError for a name or run that is no plain directory name, and for an output that is no directory."""
    for key, part in (("name", recipe.name), ("run", run_name(recipe))):
        plain = part.isprintable() and Path(part).name == part and not part.startswith(".")
        if not (part and plain and len(os.fsencode(part)) <= 200):
            raise ConfigError(
                f"{key}={part!r}: must be a plain directory name (≤ 200 bytes, printable, no /, not starting with a "
                f"dot)"
            )
    if recipe.name == "teachers":
        raise ConfigError("name=teachers: is the directory of trained teachers; choose another name")
    finished = recipe.resume and (directory / "result.json").exists()
    check_output(recipe.output, write=not (finished or recipe.list_layers))


def check_output(output: str, write: bool) -> None:
    """Raise ConfigError for an output that is no directory and cannot become one; to `write`, without permission."""
    wrong = f"output={output}: must be a directory that exists or can be made"
    path = Path(output)
    nearest = next((each for each in (path, *path.parents) if each.exists() or each.is_symlink()), path)
    if not output or not nearest.is_dir():
        raise ConfigError(f"{wrong} ({nearest} is not one)")
    if write and not os.access(nearest, os.W_OK):
        raise ConfigError(f"{wrong} ({nearest}: Permission denied)")


def check_batch(recipe: Recipe, data: Data, processes: int) -> None:
    """Raise ConfigError for a batch that is larger than the training set, or too small to be shared out."""
    batch, pieces = recipe.train.batch_size, recipe.train.accumulation * processes
    if batch > (size := len(data.transfer.train)):
        raise ConfigError(f"train.batch_size={batch}: must be ≤ {size}, the training images of {data.name}")
    if batch < pieces:
        raise ConfigError(
            f"train.batch_size={batch}: must be ≥ {pieces}, one image for each of {processes} processes "
            f"x train.accumulation={recipe.train.accumulation}"
        )


def check_validation(recipe: Recipe, data: Data) -> None:
    """Raise ConfigError for so few validation images that even a perfect teacher could not be told from chance."""
    accuracy, bound = chance(data.val.targets)
    if bound < 1:
        return
    few = f"{len(data.val)} validation images, on which no teacher could be told from chance ({accuracy:.2%})"
    if data.val_is_given:
        where = f"name={data.name}" if recipe.data.root is None else f"root={recipe.data.root}"
        raise ConfigError(f"data.{where}: comes with {few}: add images to its validation split")
    raise ConfigError(f"data.val_fraction={recipe.data.val_fraction}: gives {few}: raise it, or add images")


def chance(targets: Tensor) -> tuple[float, float]:
    """The accuracy of always guessing the most frequent of the labels (N,), and the least that is better than chance.

    The bound is one-sided at 1 %: p + 2.33 sqrt(p (1 - p) / N).
    """
    p = float(targets.bincount().max()) / len(targets)
    return p, p + 2.33 * math.sqrt(p * (1 - p) / len(targets))
