"""The stages of a run: its teacher is found or trained, then a student distilled and a control trained alone.

A stage that is finished on disk is skipped, one that was stopped goes on.
"""

import itertools
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from kd.checkpoint.manifest import DONE, read_manifest
from kd.checkpoint.safetensors_io import read_weights
from kd.checkpoint.store import finish
from kd.cli.console import terminal
from kd.config.schema import LossConfig, Recipe, StudentConfig, TeacherConfig
from kd.data import Data, load_data
from kd.errors import CheckpointError, ConfigError, require
from kd.losses.distill import DistillLoss
from kd.losses.methods import registry as methods
from kd.metrics import top_k_accuracy
from kd.models.classes import align, own_names, recorded
from kd.models.ensemble import Ensemble
from kd.models.factory import build
from kd.models.layers import needed
from kd.models.preprocess import describe, images_in_doubt
from kd.models.weights import Say, load_weights, unsaid
from kd.models.wrappers import Student, Teacher
from kd.runtime.signals import held
from kd.training.class_order import other_order
from kd.training.logger import Logger
from kd.training.loop import Trainer
from kd.training.objective import Objective
from kd.training.predict import not_finite, predict
from kd.training.preflight import (
    chance,
    check_batch,
    check_class_weights,
    check_environment,
    check_places,
    check_validation,
    ema_lines,
)
from kd.training.run import (
    WEIGHTS,
    Run,
    alone_on_teacher,
    check_finished,
    run_directory,
    shared_teacher_directory,
    teacher_is_trained,
)
from kd.training.schedule import mixed_seed
from kd.training.stage import Stage, metadata
from kd.training.stage import build as build_objective
from kd.training.teacher_smoothing import report_smoothing


def prepare(recipe: Recipe, directory: Path | None = None, teacher: Path | None = None) -> Run:
    """Check what can be checked before any work, and load the data. Nothing is written.

    `directory` and `teacher` are the run's and its teacher's directories where they do not follow from the recipe.
    Raises ConfigError.
    """
    directory = directory or run_directory(recipe)
    check_environment(recipe)
    check_places(recipe)
    tracker = None if recipe.tracker == "none" else recipe.tracker
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else Accelerate would run each torchrun process on its own
        mixed_precision={"fp32": "no"}.get(recipe.train.precision, recipe.train.precision),
        log_with=tracker,
        project_dir=directory if tracker else None,
    )
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    with accelerator.main_process_first():  # a download happens once
        data = load_data(recipe.data, recipe.seed)
    # Machines may hold different copies, or leave out different images: processes would wait for each other for ever.
    same = len(set(gather_object([data.hash]))) == 1
    require(same, f"data.root={recipe.data.root}: not all processes read the same images there; give each one copy")
    data = replace(data, **{name: getattr(data, name).to(accelerator.device) for name in ("train", "val", "test")})
    check_batch(recipe, data, accelerator.num_processes)
    check_class_weights(recipe, data)
    check_validation(recipe, data)
    logger = Logger(directory / "metrics.jsonl", accelerator, terminal())
    try:
        run = Run(recipe, data, accelerator, directory, teacher or directory, logger)
        if teacher is None:
            run = replace(run, teacher_directory=shared_teacher_directory(run))
        teacher_network(run, say=logger.say)
    except CheckpointError as error:  # of the only file that the section names
        raise ConfigError(f"teacher.checkpoint={error}") from error
    try:
        student_network(run, say=logger.say)  # one that cannot be built must not wait for its teacher
    except CheckpointError as error:
        raise ConfigError(f"student.checkpoint={error}") from error
    return run


# ---- networks


def teacher_network(run: Run, weights: Path | None = None, say: Say = unsaid) -> nn.Module:
    """The teacher's network, with trained `weights` or as its section of the recipe starts it."""
    own = run.recipe.teacher
    if own.members > 1:
        ensemble = Ensemble([teacher_network(_member(run, i)) for i in range(own.members)], own.averaging_temperature)
        if weights:
            _load(run, ensemble, weights)
        return ensemble
    start = _start(own, own.finetune, weights)
    if not weights:
        start["weights_classes"] = own_names(own, run.data.class_names)
    return network(own, run.recipe.seed, run.teacher_data, **start, say=say)


def student_network(run: Run, weights: Path | None = None, seed: int | None = None, say: Say = unsaid) -> nn.Module:
    """The student's network, with trained `weights` or as its section of the recipe starts it with the run's seed.

    The student and its control start from the same weights; another `seed` gives other ones.
    """
    own = run.recipe.student
    seed = run.recipe.seed if seed is None else seed
    return network(own, seed, run.data, **_start(own, True, weights), say=say)


def _start(own: TeacherConfig | StudentConfig, finetune: bool, trained: Path | None) -> dict[str, Any]:
    """What a network starts from: weights that were trained here, or those that its section names."""
    if trained:
        return {"checkpoint": trained}
    names = ("pretrained", "checkpoint", "checkpoint_key")
    return {name: getattr(own, name) for name in names} | {"finetune": finetune}


def network(section: TeacherConfig | StudentConfig, seed: int, data: Data, **start: Any) -> nn.Module:
    """The network of a section, with the weights that `start` names or the random ones of this seed."""
    torch.manual_seed(seed)
    shape = {"num_classes": data.num_classes, "input_shape": data.input_shape, "class_names": data.class_names}
    return build(section.model, section=section.section, model_kwargs=section.model_kwargs, **start, **shape)


def evaluated_network(run: Run, name: str, weights: Path | None, teacher: Teacher | None) -> nn.Module:
    """The network of a finished stage as it is evaluated: the student's with the classifier of a method that has its
    own, which needs the teacher. `weights` is None for a teacher that keeps the weights it has.
    """
    if name == "teacher":
        return teacher_network(run, weights)
    # A method of the user's own file, which this command may not have imported, is not in the library.
    classifiers = {key for key, method in methods.library().items() if method.classifies}
    if name == "control" or not classifiers & run.recipe.loss.methods.keys():
        return student_network(run, weights)
    assert weights
    assert teacher
    network = build_objective(student_stage(run, teacher), run.recipe, run.accelerator).model
    _load(run, network, weights)
    return network


def _load(run: Run, made_of_networks: nn.Module, weights: Path) -> None:
    load_weights(made_of_networks, weights)
    names = recorded(made_of_networks, weights)
    align(made_of_networks, names, run.data.class_names, run.data.input_shape, str(weights))


# ---- stages


def teacher_stage(run: Run) -> Stage:
    """The teacher, ready to train on labels, with the methods that its own section names."""
    own = run.recipe.teacher
    loss = replace(own.own_loss(), backend=run.recipe.loss.backend)
    objective = Objective(_distill_loss(loss, run.data), methods.build(loss.methods, "teacher"))
    return Stage("teacher", Student(teacher_network(run)), objective, own.epochs, run.teacher_data)


def student_stage(run: Run, teacher: Teacher) -> Stage:
    """The student, ready to be distilled from the teacher."""
    recipe, network = run.recipe, student_network(run)
    new_peer = partial(student_network, run, seed=mixed_seed(recipe.seed, 1))
    objective = Objective(_distill_loss(recipe.loss, run.data.transfer), methods.build(recipe.loss.methods), new_peer)
    taps = needed(objective.needs, network, teacher.model, recipe.student.layers, recipe.teacher.layers)
    if taps:
        teacher = Teacher(teacher.model, features=taps[1].names)
    model = Student(network, features=taps[0].names if taps else ())
    data = run.data.transfer
    if run.teacher_data is not run.data:
        data = replace(data, train=data.train.rendered(data.preprocess, run.teacher_data.preprocess))
    return Stage("student", model, objective, recipe.student.epochs, data, teacher, taps)


def control_stage(run: Run) -> Stage:
    """The student's network, ready to train on labels alone for as many epochs."""
    recipe = run.recipe
    loss = replace(recipe.loss, kd_weight=0.0, ce_weight=1.0)
    objective = Objective(_distill_loss(loss, run.data.transfer))
    return Stage("control", Student(student_network(run)), objective, recipe.student.epochs, run.data.transfer)


def _distill_loss(loss: LossConfig, data: Data) -> DistillLoss:
    settings: dict[str, Any] = {key: value for key, value in asdict(loss).items() if key != "methods"}
    settings["class_weight"] = class_weights(loss.class_weight, data.train.targets, data.num_classes)
    return DistillLoss(**settings, reduction="sum")


def class_weights(given: list[float] | str | None, labels: Tensor, num_classes: int) -> Tensor | None:
    """The class weights (K,) of a recipe. "balanced" is n / (K n_k) for n labels, n_k of them of class k; 0 for a class
    without any, such as that of data.omit_class.
    """
    if given == "balanced":
        counts = labels.bincount(minlength=num_classes)
        return torch.where(counts > 0, len(labels) / (num_classes * counts), 0)
    return None if given is None else torch.tensor(given)


def train(run: Run, stage: Stage) -> None:
    """Train a stage, from its newest checkpoint where there is one."""
    trainer = Trainer(stage, run)
    with held():
        trainer.fit()


# ---- a whole run


def rehearse(run: Run) -> None:
    """Say what is known of the data and an average of weights, and evaluate the student's methods on a first batch,
    before a teacher is trained for them. Raises ConfigError.
    """
    for line in (*run.data.notes, *ema_lines(run.recipe, run.data)):
        run.logger.say(line)
    if not run.recipe.loss.methods:
        return
    try:
        build_objective(student_stage(run, Teacher(teacher_network(run))), run.recipe, run.accelerator, rehearse=True)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"loss.methods: {error}") from error


def execute(run: Run) -> None:
    """Train every stage that is not finished."""
    stages = {"student", "control"} if run.recipe.control else {"student"}
    done = {name for name in stages if run.is_finished(name)}
    for name in done:  # before a teacher is trained
        check_finished(run, name)
    teacher = find_teacher(run)
    check_teacher(run, teacher)
    report_smoothing(run, teacher)
    if "student" not in done:
        train(run, student_stage(run, teacher))
    if "control" in stages - done:
        train(run, control_stage(run))


def find_teacher(run: Run) -> Teacher:
    """The frozen teacher: with the weights that the recipe names, or trained here unless that is finished."""
    if teacher_is_trained(run.recipe):
        # Runs that differ in the student only would otherwise train the same teacher at the same time.
        with alone_on_teacher(run) as done:
            if done:
                check_finished(run, "teacher")
                run.logger.say(f"teacher  found in {run.teacher_directory}")
            elif run.recipe.teacher.members > 1:
                _train_members(run)
            else:
                train(run, teacher_stage(run))
    return Teacher(teacher_network(run, run.weights("teacher"))).to(run.accelerator.device)


def _member(run: Run, i: int) -> Run:
    """The run whose teacher is the i-th member of an ensemble; the first member is the teacher of a run without one."""
    # The first seed is the run's own, so that a teacher trained before, alone, is found again.
    seed = run.recipe.seed if i == 0 else mixed_seed(run.recipe.seed, i) % 2**31
    recipe = replace(run.recipe, seed=seed, teacher=replace(run.recipe.teacher, members=1))
    member = replace(run, recipe=recipe)
    return replace(member, teacher_directory=shared_teacher_directory(member))


def _train_members(run: Run) -> None:
    """Find or train every member, and write them as one network into the teacher directory."""
    directories = []
    for i in range(run.recipe.teacher.members):
        member = prepare(replace(_member(run, i).recipe, tracker="none"))  # anew: its data follow its seed
        find_teacher(member)
        directories.append(member.teacher_directory)
    if run.accelerator.is_main_process:
        weights: dict[str, dict[str, Tensor]] = {which: {} for which in WEIGHTS}
        for i, which in itertools.product(range(len(directories)), WEIGHTS):
            part = read_weights(directories[i] / f"{which}.safetensors")
            weights[which] |= {f"members.{i}.{key}": value for key, value in part.items()}
        manifests = [read_manifest(directory / DONE) for directory in directories]
        about: dict[str, Any] = {key: sum(each[key] for each in manifests) for key in ("updates", "seconds", "skipped")}
        about["selected"] = {"epoch": [each["selected"]["epoch"] for each in manifests]}
        finish(
            run.teacher_directory,
            weights,
            metadata("teacher", run.recipe, run.teacher_data),
            about,
            run.owner("teacher"),
        )
    run.accelerator.wait_for_everyone()


def say_images(run: Run) -> None:
    """Print what images the teacher takes where they are not the student's, or where they are in doubt."""
    if run.teacher_data is not run.data:
        run.logger.say(f"teacher  takes images of its own: {describe(run.teacher_data.preprocess)}")
        run.logger.say(f"student  {describe(run.data.preprocess)}")
    if doubt := images_in_doubt(run.recipe.teacher, run.teacher_data.preprocess):
        run.logger.say(f"warning  {doubt}")


def check_teacher(run: Run, teacher: Teacher) -> None:
    """Print the teacher's validation accuracy. Raises ConfigError where it is not better than chance, or far better
    with the classes in another order.
    """
    own, targets, names = run.recipe.teacher, run.data.val.targets, run.data.class_names
    key = "model" if own.checkpoint is None else "checkpoint"
    setting = f"teacher.{key}={getattr(own, key)}"
    logits = predict(teacher, run.teacher_data.val, run.recipe.train.batch_size, run.accelerator)
    if wrong := not_finite(logits):
        raise ConfigError(f"{setting}: {wrong}: take other weights, or train.precision=fp32")
    top1 = top_k_accuracy(logits, targets, 1).item()
    guessing, bound = chance(targets)
    say_images(run)
    run.logger.say(f"teacher  validation top-1 {top1:.2%}   (chance {guessing:.2%}, {len(targets)} images)")
    trained = teacher_is_trained(run.recipe)
    known = trained or own.classes or recorded(teacher.model, own.checkpoint)
    other = "" if known else other_order(logits.argmax(-1), targets, names)
    require(not other, f"{setting}: its classes are in another order: validation top-1 is {top1:.2%}, {other}")
    alike = "images prepared as in its training (teacher.preprocess=data: as the student's)"
    needs = f"it needs the data's classes, in this order (data.class_order), and {alike}"
    helps = "train it longer (teacher.epochs)" if trained else needs
    require(
        top1 > bound,
        f"{setting}: validation top-1 {top1:.2%} is no better than chance (must be > {bound:.2%} on {len(targets)} "
        f"images): {helps}",
    )
