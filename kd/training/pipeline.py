"""A run: teacher found or trained, student distilled, control trained, all scored. Finished stages are skipped."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import list_optimizers
from torch import Tensor, nn

from kd.checkpoint import CHECKPOINTS, advice, belongs, finish, finished, read_weights, retire
from kd.cli.console import terminal
from kd.config.schema import LossConfig, Recipe
from kd.data import Data, load_data
from kd.errors import CheckpointError, ConfigError
from kd.losses.distill import DistillLoss
from kd.losses.methods import registry as methods
from kd.metrics import top_k_accuracy
from kd.models.ensemble import Ensemble, load_exactly
from kd.models.factory import Student, Teacher, build, weights_metadata
from kd.models.layers import needed
from kd.models.weights import check_file
from kd.probe import tell_smoothing
from kd.runtime.lock import alone_on_teacher
from kd.runtime.signals import held
from kd.training.logger import Journal
from kd.training.loop import Trainer
from kd.training.objective import Objective
from kd.training.run import check_own, check_places, owner, run_name, teacher_folder, teacher_is_trained
from kd.training.stage import Stage, mixed_seed, not_finite, optimizer, predict
from kd.training.stage import build as build_objective

USUAL_OPTIMIZERS = ["adamw", "sgd", "lamb"]


@dataclass
class Run:
    """What every stage of a run shares."""

    recipe: Recipe
    data: Data
    accelerator: Accelerator
    folder: Path
    teacher_folder: Path
    journal: Journal


def prepare(recipe: Recipe) -> Run:
    """Check what can be checked before any work, and load the data. Nothing is written."""
    check_environment(recipe)
    check_places(recipe)
    folder = Path(recipe.output) / recipe.name / run_name(recipe)
    precision = {"fp32": "no"}.get(recipe.train.precision, recipe.train.precision)
    tracker = None if recipe.tracker == "none" else recipe.tracker
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else Accelerate would run each torchrun process on its own
        mixed_precision=precision,
        log_with=tracker,
        project_dir=folder if tracker else None,
    )
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    with accelerator.main_process_first():  # a download happens once
        data = load_data(recipe.data, recipe.seed)
    data = replace(data, **{name: getattr(data, name).to(accelerator.device) for name in ("train", "val", "test")})
    check_batch(recipe, data, accelerator.num_processes)
    check_validation(recipe, data)
    journal = Journal(folder / "metrics.jsonl", accelerator, terminal())
    run = Run(recipe, data, accelerator, folder, teacher_folder(recipe, data.hash), journal)
    for role in ("teacher", "student"):  # a student that cannot be built must not wait for its teacher
        network(run, role)
    return run


def check_environment(recipe: Recipe) -> None:
    """Raise ConfigError for settings that this machine, timm or the schedule cannot have."""
    if recipe.train.precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("train.precision=fp16: needs a GPU; bf16 and fp32 work on a CPU")
    if recipe.tracker != "none" and importlib.util.find_spec(recipe.tracker) is None:
        raise ConfigError(f"tracker={recipe.tracker}: not installed; pip install {recipe.tracker}")
    if recipe.optimizer.name not in (known := [str(name) for name in list_optimizers()]):
        near = difflib.get_close_matches(recipe.optimizer.name, known, n=3, cutoff=0.5) or USUAL_OPTIMIZERS
        raise ConfigError(f"optimizer.name={recipe.optimizer.name}: timm has no such optimizer; try {', '.join(near)}")
    _check_optimizer(recipe)
    trained = [recipe.student] + ([recipe.teacher] if teacher_is_trained(recipe) else [])
    for section in trained:
        if recipe.scheduler.warmup_epochs >= section.epochs:
            raise ConfigError(
                f"scheduler.warmup_epochs={recipe.scheduler.warmup_epochs}: must be < {section.section}epochs="
                f"{section.epochs}"
            )
    methods.build(recipe.teacher.methods, "teacher")
    if recipe.teacher.members > 1 and not teacher_is_trained(recipe):
        raise ConfigError(
            f"teacher.members={recipe.teacher.members}: needs teachers that are trained here, each from its own seed; "
            f"with weights of teacher.checkpoint or timm type teacher.members=1, or teacher.finetune=true"
        )
    if checkpoint := recipe.teacher.checkpoint:
        check_file(Path(checkpoint), f"teacher.checkpoint={checkpoint}")
        try:
            weights_metadata(checkpoint)
        except CheckpointError as error:
            raise ConfigError(f"teacher.checkpoint={error}") from error


def _check_optimizer(recipe: Recipe) -> None:
    """Raise ConfigError unless the optimizer can be made here and take a step: some need a package, others the graph
    of the gradient, which the loop does not keep.
    """
    o = recipe.optimizer
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    parameters = [nn.Parameter(torch.ones(size, device=device)) for size in ((2, 2), (2,))]
    try:
        made = optimizer(parameters, recipe)
        torch.stack([p.square().sum() for p in parameters]).sum().backward()
        made.step()
    except Exception as error:  # whatever a package that is not there, or half there, leads timm to
        said = textwrap.shorten(str(error), 160) or f"{type(error).__name__}, a package that it needs is not installed"
        if o.momentum == 0 and "momentum" in said:
            raise ConfigError(f"optimizer.momentum=0: must be > 0 for optimizer.name={o.name} ({said})") from error
        others = ", ".join(name for name in USUAL_OPTIMIZERS if name != o.name)
        raise ConfigError(f"optimizer.name={o.name}: cannot train here ({said}); try {others}") from error


def check_batch(recipe: Recipe, data: Data, processes: int) -> None:
    """Raise ConfigError for a batch that the training images cannot fill, or that cannot be shared out."""
    batch, pieces = recipe.train.batch_size, recipe.train.accumulation * processes
    if batch > (size := len(data.transfer.train)):
        raise ConfigError(f"train.batch_size={batch}: must be ≤ {size}, the training images of {data.name}")
    if batch < pieces:
        raise ConfigError(
            f"train.batch_size={batch}: must be ≥ {pieces}, one image for each of {processes} processes "
            f"x train.accumulation={recipe.train.accumulation}"
        )


def check_validation(recipe: Recipe, data: Data) -> None:
    """Raise ConfigError for so few validation images that not even a perfect teacher could be told from chance."""
    chance, bound = _chance(targets := data.val.targets)
    if bound < 1:
        return
    few = f"{len(targets)} validation images, on which no teacher could be told from chance ({chance:.2%})"
    if data.val_is_given:
        where = f"name={data.name}" if recipe.data.root is None else f"root={recipe.data.root}"
        raise ConfigError(f"data.{where}: comes with {few}: add images to its validation split")
    raise ConfigError(f"data.val_fraction={recipe.data.val_fraction}: gives {few}: raise it, or add images")


def _chance(targets: Tensor) -> tuple[float, float]:
    """The accuracy of always guessing one class, and what a teacher must exceed to be better: one-sided, 1 %."""
    chance = float(targets.bincount().max()) / len(targets)
    return chance, chance + 2.33 * math.sqrt(chance * (1 - chance) / len(targets))


def network(run: Run, role: str, weights: Path | None = None, seed: int | None = None) -> nn.Module:
    """The teacher's or student's network, with trained `weights` or as its section of the recipe starts it."""
    section = run.recipe.teacher if role == "teacher" else run.recipe.student
    if role == "teacher" and run.recipe.teacher.members > 1:
        members = [network(_member(run, i), role) for i in range(run.recipe.teacher.members)]
        ensemble = Ensemble(members, run.recipe.teacher.averaging_temperature)
        if weights:
            load_exactly(ensemble, weights)
        return ensemble
    shape = {"num_classes": run.data.num_classes, "input_shape": run.data.input_shape}
    if weights:
        return build(section.model, role=role, checkpoint=weights, model_kwargs=section.model_kwargs, **shape)
    # The student and its control start from the same weights.
    torch.manual_seed(run.recipe.seed if seed is None else seed)
    start: dict[str, Any] = {"pretrained": section.pretrained, "finetune": True}
    if role == "teacher":
        start |= {"checkpoint": run.recipe.teacher.checkpoint, "finetune": run.recipe.teacher.finetune}
    return build(section.model, role=role, model_kwargs=section.model_kwargs, **start, **shape)


def scored(run: Run, name: str, weights: Path | None, teacher: Teacher | None = None) -> nn.Module:
    """A network of the run as it is evaluated; the teacher is needed where the student has a method's classifier."""
    if name != "student" or not methods.classifies(run.recipe.loss.methods):
        return network(run, "teacher" if name == "teacher" else "student", weights)
    assert weights is not None
    planned = stage(run, name, teacher)
    build_objective(planned, run.recipe, run.data, run.accelerator)
    deployed = planned.deployed().model
    load_exactly(deployed, weights)
    return deployed


def labels_only(recipe: Recipe, name: str) -> Objective:
    """What the teacher or the control minimises: cross entropy with smoothed labels, and the teacher's methods."""
    if name == "teacher":
        loss = replace(recipe.teacher.own_loss(), backend=recipe.loss.backend)
        return Objective(_plain_loss(loss), methods.build(loss.methods, "teacher"))
    return Objective(_plain_loss(replace(recipe.loss, kd_weight=0.0, ce_weight=1.0, methods={})))


def _plain_loss(loss: LossConfig) -> DistillLoss:
    settings: dict[str, Any] = {k: v for k, v in asdict(loss).items() if k != "methods"}
    return DistillLoss(**settings, reduction="sum")


def distillation(run: Run) -> Objective:
    """The student's objective, as the recipe's `loss` section has it."""
    weighted = methods.build(run.recipe.loss.methods)
    for each in weighted.values():
        if "peer" in each.method.needs:
            each.method.peer = network(run, "student", seed=mixed_seed(run.recipe.seed, 1))
    return Objective(_plain_loss(run.recipe.loss), weighted)


def rehearse(run: Run) -> None:
    """Show the student's methods a first batch, so that what cannot work says so before a teacher is trained."""
    if not run.recipe.loss.methods:
        return
    try:
        planned = stage(run, "student", Teacher(network(run, "teacher")))
        build_objective(planned, run.recipe, run.data.transfer, run.accelerator, rehearse=True)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"loss.methods: {error}") from error


def stage(run: Run, name: str, teacher: Teacher | None = None) -> Stage:
    """A stage ready to train: the teacher's own, the distilled student's, or the control's."""
    recipe = run.recipe
    role = "teacher" if name == "teacher" else "student"
    net, taps = network(run, role), None
    if name == "student":
        assert teacher is not None
        objective = distillation(run)
        layers = recipe.student.layers, recipe.teacher.layers
        taps = needed(objective.needs, net, teacher.model, *layers)
    else:
        objective = labels_only(recipe, name)
    if taps:
        assert teacher is not None
        teacher = Teacher(teacher.model, features=taps[1].names)
    model = Student(net, features=taps[0].names if taps else ())
    epochs = recipe.teacher.epochs if role == "teacher" else recipe.student.epochs
    folder = run.teacher_folder if name == "teacher" else run.folder / name
    return Stage(name, model, objective, epochs, folder, metadata(recipe, name, run.data), teacher, taps)


def metadata(recipe: Recipe, name: str, data: Data) -> dict[str, Any]:
    """What travels with the weights. A teacher's methods may act like smoothing: its mass is then not known."""
    own, trained = (recipe.teacher, recipe.teacher) if name == "teacher" else (recipe.student, recipe.loss)
    known: dict[str, Any] = {"label_smoothing": str(trained.label_smoothing), "smoothing": trained.smoothing}
    if name == "teacher" and recipe.teacher.methods:
        known = {"methods": recipe.teacher.methods}
    return known | {
        "model": own.model,
        "num_classes": str(data.num_classes),
        "class_names": data.class_names,
        "input_shape": list(data.input_shape),
        "mean": list(data.mean),
        "std": list(data.std),
    }


def data_of(run: Run, name: str) -> Data:
    """What the stage of this name trains and selects on."""
    return run.data if name == "teacher" else run.data.transfer


def train(run: Run, stage: Stage) -> None:
    """Train a stage, or go on with it."""
    check_own(stage.name, stage.folder, stage.folder / CHECKPOINTS)
    # A trained teacher serves many runs, so its curve stands beside it; the others' stand in the run.
    path = (stage.folder if stage.name == "teacher" else run.folder) / "metrics.jsonl"
    journal = Journal(path, run.accelerator, run.journal.console)
    stage.of = owner(run, stage.name)
    trainer = Trainer(stage, run.recipe, data_of(run, stage.name), run.accelerator, journal)
    with held():
        trainer.fit()


def find_teacher(run: Run) -> Teacher:
    """The frozen teacher: as it is where weights are named, else trained here unless that was done before."""
    weights = None
    if teacher_is_trained(run.recipe):
        folder = run.teacher_folder
        weights = folder / "last.safetensors"
        with alone_on_teacher(run) as done:
            if done:
                _check_done(run, "teacher", folder)
                run.journal.say(f"teacher  found in {folder}")
            elif run.recipe.teacher.members > 1:
                _train_members(run)
            else:
                train(run, stage(run, "teacher"))
    return Teacher(network(run, "teacher", weights)).to(run.accelerator.device)


def _member(run: Run, i: int) -> Run:
    """The run whose teacher is the i-th member: the first is that of a run without others."""
    seed = run.recipe.seed if i == 0 else mixed_seed(run.recipe.seed, i) % 2**31
    recipe = replace(run.recipe, seed=seed, teacher=replace(run.recipe.teacher, members=1))
    return replace(run, recipe=recipe, teacher_folder=teacher_folder(recipe, run.data.hash))


def _train_members(run: Run) -> None:
    """Find or train every member, and write them as one network where a teacher's weights are looked for."""
    folders = []
    for i in range(run.recipe.teacher.members):
        recipe = replace(_member(run, i).recipe, tracker="none")
        member = prepare(recipe)  # anew: its data follow its seed
        find_teacher(member)
        folders.append(member.teacher_folder)
    if run.accelerator.is_main_process:
        done, weights = [], {}
        for which in ("last", "selected"):
            paths = [folder / f"{which}.safetensors" for folder in folders]
            done = [finished(path, advice("teacher", path.parent)) for path in paths]
            parts = [read_weights(path) for path in paths]
            weights[which] = {
                f"members.{i}.{key}": value for i, part in enumerate(parts) for key, value in part.items()
            }
        about: dict[str, Any] = {key: sum(each[key] for each in done) for key in ("updates", "seconds", "skipped")}
        about["selected"] = {"epoch": [each["selected"]["epoch"] for each in done]}
        finish(run.teacher_folder, weights, metadata(run.recipe, "teacher", run.data), about, owner(run, "teacher"))
    run.accelerator.wait_for_everyone()


def check_teacher(run: Run, teacher: Teacher) -> None:
    """Print the teacher's validation accuracy. Raises ConfigError when it is no better than always guessing one class,
    or cannot be told.
    """
    targets = run.data.val.targets
    logits = predict(teacher, run.data.val, run.recipe.train.batch_size, run.accelerator)
    if wrong := not_finite(logits):
        key = "model" if run.recipe.teacher.checkpoint is None else "checkpoint"
        raise ConfigError(
            f"teacher.{key}={getattr(run.recipe.teacher, key)}: {wrong} (must all be): take other weights, or "
            f"train.precision=fp32 where it is not"
        )
    top1 = top_k_accuracy(logits, targets, 1).item()
    chance, bound = _chance(targets)
    run.journal.say(f"teacher  validation top-1 {top1:.2%}   (chance {chance:.2%}, {len(targets)} images)")
    if top1 <= bound:
        raise ConfigError(
            f"teacher.model={run.recipe.teacher.model}: validation top-1 {top1:.2%} is no better than chance "
            f"(must be > {bound:.2%} on {len(targets)} images): train it longer (teacher.epochs), or check that its "
            f"classes are in this data set's order"
        )


def recorded_smoothing(recipe: Recipe) -> tuple[float, str] | None:
    """Mass and convention that the teacher is or was trained with; None where its weights do not say."""
    if teacher_is_trained(recipe):
        own = recipe.teacher  # another loss of the labels may act like a smoothing of unknown mass
        return None if own.methods else (own.label_smoothing, own.smoothing)
    record = weights_metadata(recipe.teacher.checkpoint) if recipe.teacher.checkpoint else {}
    return (float(record["label_smoothing"]), record["smoothing"]) if "label_smoothing" in record else None


def execute(run: Run) -> None:
    """All stages up to their weights on disk."""
    left = [name for name in ("student", "control")[: 1 + run.recipe.control] if not _is_done(run, name)]
    teacher = find_teacher(run)
    check_teacher(run, teacher)
    tell_smoothing(run, teacher, recorded_smoothing(run.recipe))
    for name in left:
        train(run, stage(run, name, teacher if name == "student" else None))


def _is_done(run: Run, name: str) -> bool:
    """Whether a stage of the run is finished. Raises CheckpointError for another's, or one that is not whole."""
    folder = run.folder / name
    belongs(folder, advice(name, folder), owner(run, name))
    if done := (folder / "stage.json").exists():
        _check_done(run, name, folder)
    return done


def _check_done(run: Run, name: str, folder: Path) -> None:
    """Raise CheckpointError unless a stage's weights are whole and its own; remove what a kill left beside them."""
    for which in ("last", "selected"):  # both are scored, once everything is trained
        finished(folder / f"{which}.safetensors", advice(name, folder), owner(run, name))
    if run.accelerator.is_main_process:
        retire([folder / CHECKPOINTS])
