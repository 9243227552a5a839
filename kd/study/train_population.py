"""A job of the population engine: find what the cohort needs, train it, measure every member."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from kd.checkpoint import read_sealed, save_sealed
from kd.config.schema import Recipe, content_hash
from kd.data import Data, Split, load_data
from kd.errors import ConfigError
from kd.models.factory import build
from kd.study.folder import Folder
from kd.study.grid import Point
from kd.study.jobs import Job
from kd.study.measure import INPUTS, VIEWS, Outcome, Outputs, log_of, measure, parts_of, truth_of
from kd.study.population import Cohort, Member, Population, Training
from kd.training.pipeline import teacher_metadata

BATCH = 500  # samples scored at once


def train(folder: Folder, job: Job) -> Iterator[tuple[Point, Outcome]]:
    """Train the job's points as one population; gives each with its metrics, or with what went wrong."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number would be another rounding; other cores have other jobs
    try:
        yield from _train(folder, job)
    finally:
        torch.set_num_threads(threads)


def _train(folder: Folder, job: Job) -> Iterator[tuple[Point, Outcome]]:
    started = time.perf_counter()
    recipe, role = job.points[0].recipe, "teacher" if job.phase == "teachers" else "student"
    data = data_of(recipe)
    if data.hash != job.points[0].data_hash:
        raise ConfigError(f"data.name={data.name}: has changed since the study was planned")
    sources = Teachers(folder, job.points, recipe, data)
    points = []
    for point in job.points:
        if error := sources.failed.get(point.teacher or ""):
            yield point, {"error": f"its teacher {point.teacher} failed: {error}"}
        else:
            points.append(point)
    if not points:
        return
    members = [sources.member(point) for point in points]
    section = recipe.teacher if role == "teacher" else recipe.student
    own = data if role == "teacher" else data.transfer
    cohort = Cohort(recipe, own, section.epochs, network(recipe, role, data), members, sources.source())
    training = Training(cohort)
    truth, taught = truth_of(data, role), sources.outputs(role)
    outputs = look(training.fit(), network(recipe, role, data), parts_of(data, role), recipe)
    seconds = (time.perf_counter() - started) / len(points)
    for i, point in enumerate(points):
        if i in training.diverged:
            yield point, {"error": f"diverged: {training.diverged[i]}", "seconds": seconds}
            continue
        try:
            outcome = measure(point.role, outputs[i], truth, taught.get(point.teacher or ""))
        except ValueError as error:  # logits that are not finite on images that it did not train on
            yield point, {"error": f"measured: {error}", "seconds": seconds}
            continue
        if role == "teacher":
            about = teacher_metadata(point.recipe, data)
            save_sealed(folder.weights(point.id), training.population.member(i), about)
        yield point, outcome | {"seconds": seconds}


# ---- what a cohort needs


_KEPT: dict[str, Data] = {}


def data_of(recipe: Recipe) -> Data:
    """The recipe's data with its seed's augmentation; the last few are kept, as a process does several jobs."""
    key = content_hash([asdict(recipe.data), recipe.seed])
    if key not in _KEPT:
        for old in list(_KEPT)[: len(_KEPT) - 3]:
            del _KEPT[old]
        _KEPT[key] = load_data(recipe.data, recipe.seed)
    return _KEPT[key]


def network(recipe: Recipe, role: str, data: Data) -> nn.Module:
    """The network as `kd.train` starts it with this seed."""
    section = recipe.teacher if role == "teacher" else recipe.student
    torch.manual_seed(recipe.seed)
    shape = {"num_classes": data.num_classes, "input_shape": data.input_shape}
    return build(section.model, role=role, model_kwargs=section.model_kwargs, **shape)


class Teachers:
    """The trained teachers of a job's students, as one population."""

    def __init__(self, folder: Folder, points: Sequence[Point], recipe: Recipe, data: Data):
        self.recipe, self.data = recipe, data
        wanted = list(dict.fromkeys(point.teacher for point in points if point.teacher))
        found = {identifier: folder.found(identifier) for identifier in wanted}
        self.failed = {i: f["error"] if f else "was not trained" for i, f in found.items() if not f or f["error"]}
        self.ids = [identifier for identifier in wanted if identifier not in self.failed]
        self.population = None
        if self.ids:
            states = [
                read_sealed(folder.weights(i), f"remove points/{i}.json there and the same command trains it again")
                for i in self.ids
            ]
            self.population = Population.of(network(recipe, "teacher", data), states)
        self.bayes = any(point.control == "bayes" for point in points)

    def member(self, point: Point) -> Member:
        """A point as a member: its loss, and where its teacher is among those of `source`."""
        if point.role == "teacher":
            return Member(point.recipe.teacher.own_loss())
        if point.control == "bayes":
            return Member(replace(point.recipe.loss, kd_weight=1.0, ce_weight=0.0), len(self.ids))
        return Member(point.recipe.loss, self.ids.index(point.teacher) if point.teacher else None)

    @torch.no_grad()
    def source(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Logits (E, B, K) for images and their index; the true posterior's, where it is wanted, come last."""
        split = self.data.transfer.train
        fixed = [log_of(split)[None].float()] if self.bayes else []  # type: ignore[index]
        population = self.population
        if population is not None and not split.augments:  # what they say of an image is always the same
            plan = list(torch.arange(len(split)).split(BATCH))
            fixed.insert(0, torch.cat([population.logits(batch.images) for batch in split.batches(plan, None)], 1))
            population = None
        known = torch.cat(fixed) if fixed else None
        if population is None:
            return None if known is None else lambda images, index: known[:, index].to(images.dtype)
        assert known is None, "an augmented image's posterior is not known"
        return lambda images, index: population.logits(images)

    def outputs(self, role: str) -> dict[str, Outputs]:
        """What each teacher gives on the splits of its students, by id."""
        if self.population is None:
            return {}
        template = network(self.recipe, "teacher", self.data)
        return dict(zip(self.ids, look(self.population, template, parts_of(self.data, role), self.recipe), strict=True))


# ---- what a population gives


class _WithFeatures(nn.Module):
    """Logits and what the linear head reads."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        net: Any = self.network
        features = net.forward_head(net.forward_features(images), pre_logits=True)
        return net.get_classifier()(features), features


@torch.no_grad()
def look(population: Population, template: nn.Module, parts: Mapping[str, Split], recipe: Recipe) -> list[Outputs]:
    """Logits, features and views of every member. `template` is a network of its architecture."""
    head = next(name for name, module in template.named_modules() if module is _head(template))
    both = Population(_WithFeatures(template), {f"network.{k}": p for k, p in population.parameters.items()})
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for name, part in parts.items():
        plan = list(torch.arange(len(part)).split(BATCH))
        pairs = [both.outputs(batch.images) for batch in part.batches(plan, epoch=None)]
        made[name] = torch.cat([p[0] for p in pairs], 1), torch.cat([p[1] for p in pairs], 1)
    views = _views(population, parts["train"], recipe)
    weights = population.parameters[f"{head}.weight"].detach()
    biases = population.parameters.get(f"{head}.bias", weights.new_zeros(weights.shape[:2])).detach()
    found = []
    for i in range(len(views)):
        logits, features = ({name: pair[j][i] for name, pair in made.items()} for j in (0, 1))
        found.append(Outputs(logits, features, (weights[i], biases[i]), views[i]))
    return found


def _head(network: Any) -> nn.Module:
    return network.get_classifier()


def _views(population: Population, split: Split, recipe: Recipe) -> Tensor:
    """Difference of two classes' logits on augmented views of some of their samples: (M, N, L)."""
    a, b = split.targets.unique()[:2].tolist()
    index = ((split.targets == a) | (split.targets == b)).nonzero().flatten()[:INPUTS]
    (plain,) = (batch.images for batch in split.batches([index], epoch=None))
    generator = torch.Generator().manual_seed(recipe.seed)
    found = []
    for epoch in range(VIEWS):
        (images,) = (batch.images for batch in split.batches([index], epoch=epoch))
        if torch.equal(images, plain):  # the recipe does not augment
            images = plain + 0.1 * torch.randn(plain.shape, generator=generator)
        logits = population.logits(images)
        found.append(logits[..., a] - logits[..., b])
    return torch.stack(found, dim=-1)
