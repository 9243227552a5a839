"""A job of the engine for everything else: each point through the one loop of `kd.train`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from accelerate.state import AcceleratorState

from kd.checkpoint import advice, finished, read_sealed, read_weights, save_sealed, weights_header
from kd.config.schema import Recipe
from kd.models.factory import Teacher
from kd.study.folder import Folder
from kd.study.grid import Point
from kd.study.jobs import Job
from kd.study.measure import Outcome, Outputs, measure, parts_of, truth_of
from kd.training import pipeline as stages
from kd.training.predict import predict
from kd.training.run import Run, claim, run_directory
from kd.training.stage import Stage


def train(folder: Folder, job: Job) -> Iterator[tuple[Point, Outcome]]:
    """Train each of the job's points; a point that was killed goes on where its stage was saved."""
    for point in job.points:
        try:
            yield point, _train(folder, point)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)  # the next one may want another precision


def _train(folder: Folder, point: Point) -> Outcome:
    started = time.perf_counter()
    recipe = as_run(folder, point)
    if point.teacher and (found := folder.found(point.teacher)) and found["error"]:
        return {"error": f"its teacher {point.teacher} failed: {found['error']}"}
    directory = run_directory(recipe)
    run = stages.prepare(recipe, directory, directory / "teacher")
    run.logger.console.quiet = True  # many of these run at once; metrics.jsonl has it all
    claim(run)
    teacher = None
    if point.role == "teacher":
        stage = stages.teacher_stage(run)
    else:
        if point.teacher:
            weights = folder.weights(point.teacher)
            if weights.exists():
                read_sealed(weights, f"remove points/{point.teacher}.json there and the same command trains it again")
            teacher = Teacher(stages.teacher_network(run, weights if weights.exists() else None))
            teacher.to(run.accelerator.device)
        stage = stages.student_stage(run, teacher) if teacher else stages.control_stage(run)
    if not (stage.directory / "stage.json").exists():
        stages.train(run, stage)
    finished(_weights(stage), advice("teacher", stage.directory), run.owner(stage.name))
    trained = stages.teacher_network if point.role == "teacher" else stages.student_network
    own = Teacher(trained(run, _weights(stage)))
    if point.role == "teacher":
        save_sealed(folder.weights(point.id), read_weights(_weights(stage)), weights_header(_weights(stage)))
    role = "teacher" if point.role == "teacher" else "student"
    outputs, taught = _outputs(run, own, role), _outputs(run, teacher, role) if teacher else None
    return measure(point.role, outputs, truth_of(run.data, role), taught) | {"seconds": time.perf_counter() - started}


def as_run(folder: Folder, point: Point) -> Recipe:
    """The recipe of the kd.train run that trains this point."""
    return replace(point.recipe, name="runs", run=point.id, output=str(folder.path), control=False, tracker="none")


def _weights(stage: Stage) -> Path:
    return stage.directory / "last.safetensors"


def _outputs(run: Run, model: Teacher, role: str) -> Outputs:
    model.to(run.accelerator.device)
    size, parts = run.recipe.train.batch_size, parts_of(run.data, role)
    return Outputs({name: predict(model, part, size, run.accelerator) for name, part in parts.items()})
