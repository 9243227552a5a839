"""Checks before any work: what this machine, timm, the data or a first batch cannot do stops a run at once."""

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from timm.optim import get_optimizer_info, list_optimizers
from torch import Tensor, nn

from kd.config.schema import Recipe, TeacherConfig
from kd.data import Data
from kd.errors import ConfigError, require
from kd.losses.methods import registry as methods
from kd.text import did_you_mean, plain
from kd.training.run import run_name, teacher_is_trained
from kd.training.schedule import optimizer

LARGEST_SHARE = 0.1  # of the initial weights in an average of weights


def check_environment(recipe: Recipe) -> None:
    """Raise ConfigError for settings that this machine, timm or the schedule cannot have."""
    precision, tracker, warmup = recipe.train.precision, recipe.tracker, recipe.scheduler.warmup_epochs
    has_gpu = torch.accelerator.is_available()
    require(precision != "fp16" or has_gpu, "train.precision=fp16: needs a GPU; bf16 and fp32 work on a CPU")
    installed = tracker == "none" or importlib.util.find_spec(tracker) is not None
    require(installed, f"tracker={tracker}: not installed; pip install {tracker}")
    for section in [recipe.student] + ([recipe.teacher] if teacher_is_trained(recipe) else []):
        limit = f"{section.section}epochs={section.epochs}"
        require(warmup < section.epochs, f"scheduler.warmup_epochs={warmup}: must be < {limit}")
    _check_optimizer(recipe)
    _check_teacher(recipe.teacher, teacher_is_trained(recipe))
    for section in (recipe.teacher, recipe.student):
        # Whether it fits the network is seen when that is built; a wrong path must not wait for the data.
        path, key = section.checkpoint, section.checkpoint_key
        require(not path or Path(path).is_file(), f"{section.section}checkpoint={path}: no such file")
        unused = f"{section.section}checkpoint_key={key}: chooses in a file, and {section.section}checkpoint is null"
        require(path or key is None, unused)


def _check_optimizer(recipe: Recipe) -> None:
    name = recipe.optimizer.name
    try:
        optimizer([nn.Parameter(torch.ones(2, 2))], recipe)
    except Exception as error:  # timm does not know it, a package that it needs is missing, or its arguments are others
        reason = str(error).partition("\n")[0] or "a package that it needs is not installed"
        near = did_you_mean(name, [str(each) for each in list_optimizers() if each != name], 3) or "; try adamw or sgd"
        raise ConfigError(f"optimizer.name={name}: cannot be used here ({reason}){near}") from error
    second_order = get_optimizer_info(name).second_order
    require(not second_order, f"optimizer.name={name}: needs second-order gradients; try adamw, sgd or lamb")


def _check_teacher(teacher: TeacherConfig, trained: bool) -> None:
    methods.build(teacher.methods, "teacher")
    require(
        teacher.members == 1 or trained,
        f"teacher.members={teacher.members}: needs teachers that are trained here, each from its own seed; with "
        f"weights of teacher.checkpoint or timm type teacher.members=1, or teacher.finetune=true",
    )


def check_places(recipe: Recipe) -> None:
    """Raise ConfigError for a name or run that is no plain directory name, and for an empty output."""
    for key, part in (("name", recipe.name), ("run", run_name(recipe))):
        plain = part.isprintable() and Path(part).name == part and not part.startswith(".")
        require(plain, f"{key}={part!r}: must be a plain directory name (printable, no /, not starting with a dot)")
    require(recipe.name != "teachers", "name=teachers: is reserved for trained teachers; choose another name")
    require(recipe.output != "", "output=: must be a directory; output=. is the working directory")


def check_batch(recipe: Recipe, data: Data, processes: int) -> None:
    """Raise ConfigError for a batch that is larger than the training set, or too small to be shared out."""
    batch, size, accumulation = recipe.train.batch_size, len(data.transfer.train), recipe.train.accumulation
    require(batch <= size, f"train.batch_size={batch}: must be ≤ {size}, the training images of {recipe.data.name}")
    require(
        batch >= accumulation * processes,
        f"train.batch_size={batch}: must be ≥ {accumulation * processes}, one image for each of {processes} processes "
        f"x train.accumulation={accumulation}",
    )


def check_class_weights(recipe: Recipe, data: Data) -> None:
    """Raise ConfigError for class weights that are not one for each class."""
    for section in (recipe.teacher, recipe.loss):
        weight, classes = section.class_weight, data.num_classes
        require(
            not isinstance(weight, list) or len(weight) == classes,
            f"{section.section}class_weight={plain(str(weight), 80)}: must be {classes} numbers, one for each class of "
            f"{recipe.data.name}",
        )


def check_validation(recipe: Recipe, data: Data) -> None:
    """Raise ConfigError for so few validation images that even a perfect teacher could not be told from chance."""
    guessing, bound = chance(data.val.targets)
    require(
        bound < 1,
        f"data.val_fraction={recipe.data.val_fraction}: {len(data.val)} validation images are too few to "
        f"tell a teacher from chance ({guessing:.2%}); add images, or raise it where kd holds them out",
    )


def ema_lines(recipe: Recipe, data: Data) -> Iterator[str]:
    """A line for each stage of so few updates that train.ema_decay^updates, the initial weights' share, is large."""
    decay, train = recipe.train.ema_decay, recipe.train
    stages = {"student": (recipe.student.epochs, data.transfer.train)}
    if teacher_is_trained(recipe):
        stages = {"teacher": (recipe.teacher.epochs, data.train), **stages}
    for stage, (epochs, split) in stages.items():
        updates = epochs * (len(split) // train.batch_size)
        if decay**updates <= LARGEST_SHARE:
            continue
        if train.ema_warmup:
            end = min(decay, 1 - updates ** (-2 / 3))
            yield f"{stage:8} train.ema_decay={decay} needs more than {updates} updates; its warm-up ends at {end:.3f}"
        else:
            yield (
                f"warning  {stage}: train.ema_decay={decay} leaves {decay**updates:.1%} of the initial weights in the "
                f"average after {updates} updates; type train.ema_warmup=true, or a decay ≤ "
                f"{math.floor(1000 * LARGEST_SHARE ** (1 / updates)) / 1000}"
            )


def chance(targets: Tensor) -> tuple[float, float]:
    """The accuracy of always guessing the most frequent of the labels (N,), and the least that is better than chance.

    The bound is one-sided at 1 %: p + 2.33 sqrt(p (1 - p) / N).
    """
    # Guessing is binomial: of a hundred teachers that know nothing one passes.
    p = float(targets.bincount().max()) / len(targets)
    return p, p + 2.33 * math.sqrt(p * (1 - p) / len(targets))
