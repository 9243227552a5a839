"""What a study would cost: a few updates of one job of each kind, and arithmetic."""

from __future__ import annotations

import time

import torch

from kd.config.schema import LossConfig
from kd.study.jobs import Job
from kd.study.population import Cohort, Member, Population, Training
from kd.study.train_population import data_of, network

UPDATES = 3
_SEEN: dict[tuple, float] = {}  # seconds per update and member


def seconds_of(job: Job) -> float:
    """Seconds that one core needs for a job's updates; measuring comes on top, about 0.1 s a point."""
    recipe = job.points[0].recipe
    role = "teacher" if job.phase == "teachers" else "student"
    section = recipe.teacher if role == "teacher" else recipe.student
    data = data_of(recipe)
    updates = section.epochs * (len(data.train) // recipe.train.batch_size)
    members = len(job.points) if job.engine == "population" else 1
    groups = len({str(point.recipe.loss.methods) for point in job.points}) if role == "student" else 0
    kind = (role, section.model, str(section.model_kwargs), recipe.train.batch_size, members, groups, data.hash)
    if kind not in _SEEN:
        _SEEN[kind] = _measured(job, role, members)
    return _SEEN[kind] * updates + 0.1 * len(job.points)


def _measured(job: Job, role: str, members: int) -> float:
    """Seconds of one update of so many members; the runs of kd.train take the loop's own overhead in addition."""
    recipe = job.points[0].recipe
    data = data_of(recipe)
    teachers = Population.start(network(recipe, "teacher", data), 1) if role == "student" else None
    losses = [point.recipe.loss if teachers else point.recipe.teacher.own_loss() for point in job.points[:members]]
    if job.engine != "population":  # whose methods may be none that a population can have
        losses = [LossConfig()]
    chosen = [Member(loss, 0 if teachers else None) for loss in losses]
    source = (lambda images, index: teachers.logits(images)) if teachers else None
    training = Training(Cohort(recipe, data, 1, network(recipe, role, data), chosen, source))
    batches = training.cohort.batches(0)
    batch = next(batches)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    training.step(batch)
    started = time.process_time()  # of this process alone: the cores may be busy now
    for _ in range(UPDATES):
        training.step(batch)
    torch.set_num_threads(threads)
    return (time.process_time() - started) / UPDATES
