"""A job of the population engine: find what the cohort needs, train it, measure every member."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kd.checkpoint import save_weights
from kd.data import Data, load_data
from kd.models import build
from kd.recipe import ConfigError, Recipe, content_hash
from kd.study.folder import Folder
from kd.study.grid import Point
from kd.study.jobs import Job
from kd.study.measure import INPUTS, SPLITS, VIEWS, Outputs, Truth, measure
from kd.study.population import Cohort, Member, Population, Training

Outcome = dict[str, Any]
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
    cohort = Cohort(recipe, data, section.epochs, network(recipe, role, data), members, sources.source())
    training = Training(cohort)
    outputs = look(training.fit(), network(recipe, role, data), data, recipe)
    truth, taught = truth_of(data), sources.outputs()
    seconds = (time.perf_counter() - started) / len(points)
    for i, point in enumerate(points):
        if i in training.diverged:
            yield point, {"error": f"diverged: {training.diverged[i]}", "seconds": seconds}
            continue
        outcome = measure(point.role, outputs[i], truth, taught.get(point.teacher or ""))
        if role == "teacher":
            save_weights(folder.weights(point.id), training.population.member(i), metadata(point, data))
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


def metadata(point: Point, data: Data) -> dict[str, Any]:
    """What a teacher's weights say of themselves, as those of `kd.train` do."""
    section = point.recipe.teacher
    return {
        "model": section.model,
        "num_classes": str(data.num_classes),
        "label_smoothing": str(section.label_smoothing),
        "smoothing": section.smoothing,
        "class_names": data.class_names,
        "input_shape": list(data.input_shape),
        "mean": list(data.mean),
        "std": list(data.std),
    }


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
            states = [load_file(folder.weights(identifier)) for identifier in self.ids]
            self.population = Population.of(network(recipe, "teacher", data), states)
        self.bayes = any(point.control == "bayes" for point in points)

    def member(self, point: Point) -> Member:
        """A point as a member: its loss, and where its teacher is among those of `source`."""
        if point.role == "teacher":
            own = point.recipe.teacher
            hard = replace(point.recipe.loss, kd_weight=0.0, ce_weight=1.0, methods={})
            return Member(replace(hard, label_smoothing=own.label_smoothing, smoothing=own.smoothing))
        if point.control == "bayes":
            return Member(replace(point.recipe.loss, kd_weight=1.0, ce_weight=0.0), len(self.ids))
        return Member(point.recipe.loss, self.ids.index(point.teacher) if point.teacher else None)

    def source(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Logits (E, B, K) for images and their index; the true posterior's, where it is wanted, come last."""
        log_posterior = self.data.log_posterior("train") if self.bayes else None  # type: ignore[attr-defined]
        if self.population is None and log_posterior is None:
            return None

        def logits(images: Tensor, index: Tensor) -> Tensor:
            found = [] if self.population is None else [self.population.logits(images)]
            if log_posterior is not None:
                found.append(log_posterior[index][None].to(images.dtype))
            return torch.cat(found)

        return logits

    def outputs(self) -> dict[str, Outputs]:
        """What each teacher gives on the splits, by id."""
        if self.population is None:
            return {}
        template = network(self.recipe, "teacher", self.data)
        return dict(zip(self.ids, look(self.population, template, self.data, self.recipe), strict=True))


def truth_of(data: Data) -> Truth:
    """Labels of the splits, and the true posterior where the data set knows it."""
    targets = {split: getattr(data, split).targets for split in SPLITS}
    known = getattr(data, "log_posterior", None)
    return Truth(targets, {split: known(split) for split in SPLITS} if known and known("test") is not None else {})


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
def look(population: Population, template: nn.Module, data: Data, recipe: Recipe) -> list[Outputs]:
    """Logits, features and views of every member. `template` is a network of its architecture."""
    both = Population(_WithFeatures(template), {f"network.{k}": p for k, p in population.parameters.items()})
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for split in SPLITS:
        part = getattr(data, split)
        plan = list(torch.arange(len(part)).split(BATCH))
        pairs = [both.logits(batch.images) for batch in part.batches(plan, epoch=None)]
        made[split] = torch.cat([p[0] for p in pairs], 1), torch.cat([p[1] for p in pairs], 1)
    views = _views(population, data, recipe)
    head = [name for name, module in template.named_modules() if module is template.get_classifier()][0]  # type: ignore[operator]
    heads = population.parameters[f"{head}.weight"], population.parameters.get(f"{head}.bias")
    found = []
    for i in range(len(views)):
        weight = heads[0][i]
        bias = weight.new_zeros(len(weight)) if heads[1] is None else heads[1][i]
        logits, features = ({split: pair[j][i] for split, pair in made.items()} for j in (0, 1))
        found.append(Outputs(logits, features, (weight.detach(), bias.detach()), views[i]))
    return found


def _views(population: Population, data: Data, recipe: Recipe) -> Tensor:
    """Difference of two classes' logits on augmented views of some of their samples: (M, N, L)."""
    targets = data.train.targets
    a, b = targets.unique()[:2].tolist()
    index = ((targets == a) | (targets == b)).nonzero().flatten()[:INPUTS]
    (plain,) = (batch.images for batch in data.train.batches([index], epoch=None))
    generator = torch.Generator().manual_seed(recipe.seed)
    found = []
    for epoch in range(VIEWS):
        (images,) = (batch.images for batch in data.train.batches([index], epoch=epoch))
        if torch.equal(images, plain):  # the recipe does not augment
            images = plain + 0.1 * torch.randn(plain.shape, generator=generator)
        logits = population.logits(images)
        found.append(logits[..., a] - logits[..., b])
    return torch.stack(found, dim=-1)
