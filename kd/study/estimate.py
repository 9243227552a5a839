"""Cost of a study for dry_run=true: a few updates of one job of each kind, times the number of updates."""

from __future__ import annotations

import time

import torch

from kd.config.schema import LossConfig
from kd.study.jobs import Job
from kd.study.population import Cohort, Member, Population, Training
from kd.study.train_population import data_of, network

UPDATES = 3
MEASURING = 0.1  # seconds a point
_measured: dict[tuple, float] = {}  # seconds of one update, by kind of job


def seconds_of(job: Job) -> float:
    """Seconds that one core needs for a job. A run of kd.train takes its loop's own overhead in addition."""
    recipe = job.points[0].recipe
    role = "teacher" if job.phase == "teachers" else "student"
    section = recipe.teacher if role == "teacher" else recipe.student
    data = data_of(recipe)
    losses = [str(point.recipe.loss.methods) for point in job.points]
    kind = (role, section.model, str(section.model_kwargs), recipe.train.batch_size, data.hash, str(losses))
    if kind not in _measured:
        _measured[kind] = _seconds_per_update(job, role)
    updates = section.epochs * (len(data.train) // recipe.train.batch_size)
    return _measured[kind] * updates + MEASURING * len(job.points)


def _seconds_per_update(job: Job, role: str) -> float:
    recipe = job.points[0].recipe
    data = data_of(recipe)
    teachers = Population.start(network(recipe, "teacher", data), 1) if role == "student" else None
    losses = [point.recipe.loss if teachers else point.recipe.teacher.own_loss() for point in job.points]
    if job.engine != "population":  # whose methods a population may not be able to train
        losses = [LossConfig()]
    members = [Member(loss, 0 if teachers else None) for loss in losses]
    source = (lambda images, index: teachers.logits(images)) if teachers else None
    training = Training(Cohort(recipe, data, 1, network(recipe, role, data), members, source))
    batch = next(training.cohort.batches(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    training.step(batch)
    started = time.process_time()  # of this process alone: the cores may be busy now
    for _ in range(UPDATES):
        training.step(batch)
    torch.set_num_threads(threads)
    return (time.process_time() - started) / UPDATES
