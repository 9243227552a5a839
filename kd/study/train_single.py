"""Trainer for every other network: each point of a job through the loop of `kd.train`."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from accelerate.state import AcceleratorState

from kd.checkpoint.safetensors_io import read_weights, weights_header
from kd.checkpoint.store import read_sealed, save_sealed
from kd.data import Data
from kd.models.wrappers import Teacher
from kd.study.folder import Folder, train_again
from kd.study.grid import Point
from kd.study.measure import Outcome, Outputs, measure, parts_of
from kd.training import pipeline
from kd.training.predict import predict
from kd.training.run import Run, check_finished, claim, run_directory

THREADS = torch.get_num_threads()


def train(folder: Folder, points: Sequence[Point]) -> Iterator[tuple[Point, Outcome]]:
    """Train each of the points; a stopped one resumes. Yields each with its metrics."""
    torch.set_num_threads(THREADS)  # a population before it, in this process, has had one
    for point in points:
        try:
            yield point, _train(folder, point)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)  # the next one may want another precision


def _train(folder: Folder, point: Point) -> Outcome:
    started = time.perf_counter()
    recipe = replace(point.recipe, name="runs", run=point.id, output=str(folder.path), control=False, tracker="none")
    directory = run_directory(recipe)
    run = pipeline.prepare(recipe, directory, directory / "teacher")
    run.logger.console.quiet = True  # many of these run at once; metrics.jsonl has it all
    claim(run)
    teacher = None
    if point.teacher:
        weights = folder.weights(point.teacher)
        read_sealed(weights, train_again(point.teacher))
        teacher = Teacher(pipeline.teacher_network(run, weights)).to(run.accelerator.device)
    if point.role == "teacher":
        stage = pipeline.teacher_stage(run)
    else:
        stage = pipeline.student_stage(run, teacher) if teacher else pipeline.control_stage(run)
    if not run.is_finished(stage.name):
        pipeline.train(run, stage)
    weights = run.stage_directory(stage.name) / "last.safetensors"
    check_finished(run, stage.name)
    own = Teacher(pipeline.evaluated_network(run, stage.name, weights, teacher)).to(run.accelerator.device)
    taught = _outputs(run, teacher, run.teacher_data, point.role) if teacher else None
    data = run.teacher_data if point.role == "teacher" else run.data
    outcome = measure(point.role, _outputs(run, own, data, point.role), run.data, taught)
    if point.role == "teacher":  # measured before, so that nothing learns from one that diverged
        save_sealed(folder.weights(point.id), read_weights(weights), weights_header(weights))
    return outcome | {"seconds": time.perf_counter() - started}


def _outputs(run: Run, model: Teacher, data: Data, role: str) -> Outputs:
    size, parts = run.recipe.train.batch_size, parts_of(data, role)
    return Outputs({name: predict(model, part, size, run.accelerator) for name, part in parts.items()})
