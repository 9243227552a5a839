"""Trainer for small networks: the points of a job as one population, each measured."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache

import torch
from torch import Tensor

from kd.checkpoint.store import read_sealed, save_sealed
from kd.config.schema import DataConfig, Recipe
from kd.data import Data, Split, load_data
from kd.models.layers import classifier_name
from kd.study.folder import Folder, train_again
from kd.study.grid import Point
from kd.study.measure import INPUTS, VIEWS, Outcome, Outputs, log_posterior, measure, parts_of
from kd.study.population import Member, Population, Training
from kd.training.pipeline import network
from kd.training.stage import metadata

BATCH = 500  # samples scored at once


def train(folder: Folder, points: Sequence[Point]) -> list[tuple[Point, Outcome]]:
    """Train points, of one job, as one population. Returns each with its metrics, or with its error."""
    torch.set_num_threads(1)  # their number changes rounding, and the other cores have other jobs
    started = time.perf_counter()
    first, recipe = points[0], points[0].recipe
    data, parts = data_of(recipe), parts_of(data_of(recipe), first.role)
    ids = [*dict.fromkeys(point.teacher for point in points if point.teacher)]
    states = [read_sealed(folder.weights(i), train_again(i)) for i in ids]
    teachers = Population(network(recipe.teacher, recipe.seed, data), states) if states else None
    members = [Member(point.loss, ids.index(point.teacher) if point.teacher else None) for point in points]
    bayes = [i for i, point in enumerate(points) if point.control == "bayes"]
    for i in bayes:  # the true posterior in the place of a teacher
        members[i] = Member(replace(points[i].loss, kd_weight=1.0, ce_weight=0.0), len(ids))
    source = _logits_source(data.transfer.train, teachers, bool(bayes))
    own = data if first.role == "teacher" else data.transfer
    start = network(first.section, recipe.seed, data)
    population = Training(recipe, own, first.section.epochs, start, members, source).fit()
    outputs = outputs_of(population, parts, recipe)
    taught: dict[str | None, Outputs] = {}  # by teacher
    if teachers:
        taught.update(zip(ids, outputs_of(teachers, parts, recipe), strict=True))
    seconds = (time.perf_counter() - started) / len(points)
    outcomes = []
    for i, point in enumerate(points):
        try:
            outcome = measure(point.role, outputs[i], data, taught.get(point.teacher))
        except ValueError as error:  # logits that are not finite
            outcome = {"error": f"diverged: {error}"}
        if point.role == "teacher" and "error" not in outcome:
            save_sealed(folder.weights(point.id), population.member(i), metadata("teacher", point.recipe, data))
        outcomes.append((point, outcome | {"seconds": seconds}))
    return outcomes


def data_of(recipe: Recipe) -> Data:
    """The recipe's data with its seed's augmentation; a process does several jobs with the same."""
    return _load(json.dumps(asdict(recipe.data)), recipe.seed)


@lru_cache(maxsize=4)
def _load(config: str, seed: int) -> Data:
    return load_data(DataConfig(**json.loads(config)), seed)


@torch.no_grad()
def _logits_source(split: Split, teachers: Population | None, bayes: bool) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Teachers' logits (E, B, K) as a function of images and their index; the true posterior's come last."""
    if teachers and split.augments:
        assert not bayes, "the posterior of an augmented image is not known"
        return lambda images, index: teachers.logits(images)
    # Images that are the same in every epoch: (E, N, K).
    constant = [_over(split, teachers.logits)] if teachers else []
    if bayes:
        posterior = log_posterior(split)
        assert posterior is not None
        constant.append(posterior[None].float())
    if not constant:
        return None
    logits = torch.cat(constant)
    return lambda images, index: logits[:, index].to(images.dtype)


# ---- outputs of a population


def _over(split: Split, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function (M, B, ...) of images for a whole split without augmentation, (M, N, ...)."""
    plan = list(torch.arange(len(split)).split(BATCH))
    return torch.cat([function(batch.images) for batch in split.batches(plan, epoch=None)], 1)


@torch.no_grad()
def outputs_of(population: Population, parts: Mapping[str, Split], recipe: Recipe) -> list[Outputs]:
    """Logits, features and views of every member."""
    logits = {name: _over(part, population.logits) for name, part in parts.items()}
    features = {name: _over(part, population.features) for name, part in parts.items()}
    views = _views(population, parts["train"], recipe)
    head = classifier_name(population.network)
    weights = population.parameters[f"{head}.weight"].detach()
    biases = population.parameters.get(f"{head}.bias", weights.new_zeros(weights.shape[:2])).detach()
    outputs = []
    for i, own_views in enumerate(views):
        own_logits = {name: each[i] for name, each in logits.items()}
        own_features = {name: each[i] for name, each in features.items()}
        outputs.append(Outputs(own_logits, own_features, (weights[i], biases[i]), own_views))
    return outputs


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
