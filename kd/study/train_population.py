"""Trainer for small networks: the points of a job as one population, each measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kd.checkpoint.store import read_sealed, save_sealed
from kd.config.schema import DataConfig, LossConfig, Recipe
from kd.data import Data, Split, load_data
from kd.models.factory import build
from kd.study.folder import Folder, train_again
from kd.study.grid import Point
from kd.study.jobs import Job
from kd.study.measure import INPUTS, VIEWS, Outcome, Outputs, log_posterior, measure, parts_of
from kd.study.population import Member, Population, Training
from kd.training.pipeline import metadata

BATCH = 500  # samples scored at once


def train(folder: Folder, job: Job) -> Iterator[tuple[Point, Outcome]]:
    """Train the job's points as one population. Yields each point with its metrics, or with its error."""
    with one_thread():  # the number of threads changes rounding, and the other cores have other jobs
        yield from _train(folder, job)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(folder: Folder, job: Job) -> Iterator[tuple[Point, Outcome]]:
    started = time.perf_counter()
    first = job.points[0]
    recipe, role, data = first.recipe, first.network, data_of(first.recipe)
    teachers = Teachers(folder, job.points, recipe, data)
    points = [point for point in job.points if point.teacher not in teachers.failed]
    for point in job.points:
        if point.teacher in teachers.failed:
            yield point, {"error": teachers.failed[point.teacher]}
    if not points:
        return
    own = data if role == "teacher" else data.transfer
    members = [teachers.member(point) for point in points]
    start = network(recipe, role, data)
    training = Training(recipe, own, first.section.epochs, start, members, teachers.logits_source())
    taught = teachers.outputs(role)
    outputs = outputs_of(training.fit(), network(recipe, role, data), parts_of(data, role), recipe)
    seconds = (time.perf_counter() - started) / len(points)
    for i, point in enumerate(points):
        try:
            outcome = measure(point.role, outputs[i], data, taught.get(point.teacher))
        except ValueError as error:  # logits that are not finite
            yield point, {"error": f"diverged: {error}", "seconds": seconds}
            continue
        if role == "teacher":
            weights = training.population.member(i)
            save_sealed(folder.weights(point.id), weights, metadata("teacher", point.recipe, data))
        yield point, outcome | {"seconds": seconds}


def data_of(recipe: Recipe) -> Data:
    """The recipe's data with its seed's augmentation; a process does several jobs with the same."""
    return _load(json.dumps(asdict(recipe.data)), recipe.seed)


@lru_cache(maxsize=4)
def _load(config: str, seed: int) -> Data:
    return load_data(DataConfig(**json.loads(config)), seed)


def network(recipe: Recipe, role: str, data: Data) -> nn.Module:
    """The teacher's or student's network with the weights from which `kd.train` starts with this seed."""
    section = recipe.teacher if role == "teacher" else recipe.student
    torch.manual_seed(recipe.seed)
    shape = {"num_classes": data.num_classes, "input_shape": data.input_shape}
    return build(section.model, role=role, model_kwargs=section.model_kwargs, **shape)


def loss_of(point: Point) -> LossConfig:
    """What a point's network minimises."""
    return point.recipe.teacher.own_loss() if point.role == "teacher" else point.recipe.loss


class Teachers:
    """The trained teachers of a job's students, as one population; `failed` has the errors of those without weights."""

    def __init__(self, folder: Folder, points: Sequence[Point], recipe: Recipe, data: Data):
        self.recipe, self.data = recipe, data
        errors = {point.teacher: folder.teacher_error(point.teacher) for point in points if point.teacher}
        self.failed: dict[str | None, str] = {i: error for i, error in errors.items() if error}
        self.ids = [i for i, error in errors.items() if not error]
        self.population = None
        if self.ids:
            weights = [read_sealed(folder.weights(i), train_again(i)) for i in self.ids]
            self.population = Population.of(network(recipe, "teacher", data), weights)
        self.bayes = any(point.control == "bayes" for point in points)

    def member(self, point: Point) -> Member:
        """A point as a member: its loss, and the index of its teacher in what `logits_source` gives."""
        if point.control == "bayes":  # the true posterior in the place of a teacher
            return Member(replace(point.recipe.loss, kd_weight=1.0, ce_weight=0.0), len(self.ids))
        return Member(loss_of(point), self.ids.index(point.teacher) if point.teacher else None)

    @torch.no_grad()
    def logits_source(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Teachers' logits (E, B, K) as a function of images and their index; the true posterior's come last."""
        split, population = self.data.transfer.train, self.population
        constant = []  # (E, N, K), the same in every epoch
        if population and not split.augments:
            plan = list(torch.arange(len(split)).split(BATCH))
            constant.append(torch.cat([population.logits(batch.images) for batch in split.batches(plan, None)], 1))
        if self.bayes:
            posterior = log_posterior(split)
            assert posterior is not None
            constant.append(posterior[None].float())
        if population and split.augments:
            assert not constant, "the posterior of an augmented image is not known"
            return lambda images, index: population.logits(images)
        if not constant:
            return None
        logits = torch.cat(constant)
        return lambda images, index: logits[:, index].to(images.dtype)

    def outputs(self, role: str) -> dict[str | None, Outputs]:
        """Each teacher's outputs on the splits of its students, by id."""
        if not self.population:
            return {}
        template = network(self.recipe, "teacher", self.data)
        outputs = outputs_of(self.population, template, parts_of(self.data, role), self.recipe)
        return dict(zip(self.ids, outputs, strict=True))


# ---- outputs of a population


class _WithFeatures(nn.Module):
    """A network that returns its logits and the features that its linear head reads."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.forward_head(self.network.forward_features(images), pre_logits=True)
        return self.network.get_classifier()(features), features


@torch.no_grad()
def outputs_of(population: Population, template: Any, parts: Mapping[str, Split], recipe: Recipe) -> list[Outputs]:
    """Logits, features and views of every member; `template` is a network of their architecture."""
    head = next(name for name, module in template.named_modules() if module is template.get_classifier())
    both = Population(_WithFeatures(template), {f"network.{k}": p for k, p in population.parameters.items()})
    logits: dict[str, Tensor] = {}
    features: dict[str, Tensor] = {}
    for name, part in parts.items():
        plan = list(torch.arange(len(part)).split(BATCH))
        pairs = [both.outputs(batch.images) for batch in part.batches(plan, epoch=None)]
        logits[name], features[name] = (torch.cat(each, 1) for each in zip(*pairs, strict=True))
    views = _views(population, parts["train"], recipe)
    weights = population.parameters[f"{head}.weight"].detach()
    biases = population.parameters.get(f"{head}.bias", weights.new_zeros(weights.shape[:2])).detach()
    return [
        Outputs(
            {name: each[i] for name, each in logits.items()},
            {name: each[i] for name, each in features.items()},
            (weights[i], biases[i]),
            views[i],
        )
        for i in range(len(views))
    ]


def _views(population: Population, split: Split, recipe: Recipe) -> Tensor:
    """Differences of the first two classes' logits on augmented views of their samples, (M, N, L)."""
    a, b = split.targets.unique()[:2].tolist()
    index = ((split.targets == a) | (split.targets == b)).nonzero().flatten()[:INPUTS]
    (plain,) = (batch.images for batch in split.batches([index], epoch=None))
    generator = torch.Generator().manual_seed(recipe.seed)
    differences = []
    for epoch in range(VIEWS):
        (images,) = (batch.images for batch in split.batches([index], epoch=epoch))
        if torch.equal(images, plain):  # the recipe does not augment
            images = plain + 0.1 * torch.randn(plain.shape, generator=generator)
        logits = population.logits(images)
        differences.append(logits[..., a] - logits[..., b])
    return torch.stack(differences, dim=-1)
