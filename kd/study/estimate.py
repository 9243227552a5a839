"""Cost of a study for dry_run=true: a few updates of one job of each kind, times the number of updates."""

import time

import torch

from kd.config.schema import LossConfig
from kd.data import Data
from kd.study.jobs import Job
from kd.study.population import Member, Population, Training
from kd.study.train_population import data_of
from kd.training.pipeline import network

UPDATES = 3
MEASURING = 0.1  # seconds a point
_measured: dict[tuple, float] = {}  # seconds of one update, by kind of job


def seconds_of(job: Job) -> float:
    """Seconds that one core needs for a job. A run of kd.train takes its loop's own overhead in addition."""
    point = job.points[0]
    data, batch = data_of(point.recipe), point.recipe.train.batch_size
    methods = tuple(str(each.recipe.loss.methods) for each in job.points)
    kind = (job.phase, point.section.model, str(point.section.model_kwargs), batch, data.hash, methods)
    if kind not in _measured:
        _measured[kind] = _seconds_per_update(job, data)
    return _measured[kind] * point.section.epochs * (len(data.train) // batch) + MEASURING * len(job.points)


def _seconds_per_update(job: Job, data: Data) -> float:
    point = job.points[0]
    teaching = network(point.recipe.teacher, point.recipe.seed, data)
    teacher = Population(teaching, [dict(teaching.named_parameters())])
    # A population may not be able to train the methods of a run of its own.
    members = [Member(each.loss if job.engine == "population" else LossConfig(), 0) for each in job.points]
    own = network(point.section, point.recipe.seed, data)
    source = None if point.role == "teacher" else lambda images, index: teacher.logits(images)
    training = Training(point.recipe, data, 1, own, members, source)
    batch = next(training.batches(0))
    torch.set_num_threads(1)  # as a population is trained
    training.step(batch)
    started = time.process_time()  # of this process alone: the cores may be busy now
    for _ in range(UPDATES):
        training.step(batch)
    return (time.process_time() - started) / UPDATES
