"""Trainer for small networks: the points of a job as one population, each measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from kd.checkpoint.store import read_sealed, save_sealed
from kd.config.schema import DataConfig, Recipe
from kd.data import Data, Split, load_data
from kd.models.factory import build
from kd.models.layers import classifier_name
from kd.study.folder import Folder, train_again
from kd.study.grid import Point
from kd.study.measure import INPUTS, VIEWS, Outcome, Outputs, log_posterior, measure, parts_of
from kd.study.population import Member, Population, Training
from kd.training.stage import metadata

BATCH = 500  # samples scored at once


def train(folder: Folder, points: Sequence[Point]) -> Iterator[tuple[Point, Outcome]]:
    """Train points, of one job, as one population. Yields each with its metrics, or with its error."""
    with one_thread():  # the number of threads changes rounding, and the other cores have other jobs
        yield from _train(folder, points)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(folder: Folder, points: Sequence[Point]) -> Iterator[tuple[Point, Outcome]]:
    started = time.perf_counter()
    first = points[0]
    recipe, data = first.recipe, data_of(first.recipe)
    own = data if first.role == "teacher" else data.transfer
    teachers = Teachers(folder, points, data)
    members = [teachers.member(point) for point in points]
    start = network(recipe, first.network, data)
    population = Training(recipe, own, first.section.epochs, start, members, teachers.logits_source()).fit()
    parts = parts_of(data, first.role)
    outputs, taught = outputs_of(population, parts, recipe), teachers.outputs(parts)
    seconds = (time.perf_counter() - started) / len(points)
    for i, point in enumerate(points):
        try:
            outcome = measure(point.role, outputs[i], data, taught.get(point.teacher))
        except ValueError as error:  # logits that are not finite
            yield point, {"error": f"diverged: {error}", "seconds": seconds}
            continue
        if point.role == "teacher":
            save_sealed(folder.weights(point.id), population.member(i), metadata("teacher", point.recipe, data))
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
    return build(section.model, section=section.section, model_kwargs=section.model_kwargs, **shape)


class Teachers:
    """The trained teachers of a job's students, as one population, and the true posterior where a control asks for it.

    `population` is None where no point has a teacher.
    """

    def __init__(self, folder: Folder, points: Sequence[Point], data: Data):
        self.recipe, self.data = points[0].recipe, data
        self.ids = [*dict.fromkeys(point.teacher for point in points if point.teacher)]
        states = [read_sealed(folder.weights(i), train_again(i)) for i in self.ids]
        self.population = Population(network(self.recipe, "teacher", data), states) if states else None
        self.bayes = any(point.control == "bayes" for point in points)

    def member(self, point: Point) -> Member:
        """A point as a member: its loss, and the index of its teacher in what `logits_source` gives."""
        if point.control == "bayes":  # the true posterior in the place of a teacher
            return Member(replace(point.loss, kd_weight=1.0, ce_weight=0.0), len(self.ids))
        return Member(point.loss, self.ids.index(point.teacher) if point.teacher else None)

    @torch.no_grad()
    def logits_source(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Teachers' logits (E, B, K) as a function of images and their index; the true posterior's come last."""
        split, population = self.data.transfer.train, self.population
        if population and split.augments:
            assert not self.bayes, "the posterior of an augmented image is not known"
            return lambda images, index: population.logits(images)
        # Images that are the same in every epoch: (E, N, K).
        constant = [_over(split, population.logits)] if population else []
        if self.bayes:
            posterior = log_posterior(split)
            assert posterior is not None
            constant.append(posterior[None].float())
        if not constant:
            return None
        logits = torch.cat(constant)
        return lambda images, index: logits[:, index].to(images.dtype)

    def outputs(self, parts: Mapping[str, Split]) -> dict[str | None, Outputs]:
        """Each teacher's outputs on the splits of its students, by id."""
        return dict(zip(self.ids, outputs_of(self.population, parts, self.recipe), strict=True))


# ---- outputs of a population


def _over(split: Split, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function (M, B, ...) of images for a whole split without augmentation, (M, N, ...)."""
    plan = list(torch.arange(len(split)).split(BATCH))
    return torch.cat([function(batch.images) for batch in split.batches(plan, epoch=None)], 1)


@torch.no_grad()
def outputs_of(population: Population | None, parts: Mapping[str, Split], recipe: Recipe) -> list[Outputs]:
    """Logits, features and views of every member."""
    if not population:
        return []
    logits = {name: _over(part, population.logits) for name, part in parts.items()}
    features = {name: _over(part, population.features) for name, part in parts.items()}
    views = _views(population, parts["train"], recipe)
    head = classifier_name(population.network)
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
