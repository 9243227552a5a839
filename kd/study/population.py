"""Many small networks of one architecture, trained as one batched network.

The members of a population start from the same weights and see the same augmented batches in the same order, as runs
of `kd.train` with the same seed do; they differ in loss and teacher. So a member is the network that `kd.train` would
have trained, up to floating-point rounding, and comparisons within a seed are paired. The forward pass is
torch.func's. The optimizer is timm's on stacked parameters; its update must be elementwise, so that no member
influences another.

M: members, B: batch, K: classes, E: teachers.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from kd.config.schema import LossConfig, Recipe
from kd.data import Batch, Data
from kd.losses.distill import DistillLoss
from kd.losses.methods import registry as methods
from kd.losses.methods.base import Seen, View
from kd.runtime.own_code import own_file
from kd.smoothing import to_uniform, unsmooth
from kd.study.grid import Point
from kd.training.objective import Objective
from kd.training.schedule import epoch_order, optimizer, schedule

ELEMENTWISE = ("sgd", "nesterov", "momentum", "adam", "adamw", "nadamw")  # timm's optimizers with elementwise updates
# With more parameters than this, a batch of members is no cheaper than one after the other.
LARGEST = 2_000_000


# ---- the stacked network


class Population:
    """M networks of one architecture; every parameter has a leading dimension of members.

    `network` becomes the population's own: its parameters now hold the stacked weights of `states`, so that an
    optimizer made for it before steps every member, with the groups of a single network.
    """

    def __init__(self, network: Any, states: Sequence[Mapping[str, Tensor]]):
        self.network, self.parameters = network, dict(network.named_parameters())
        for name, p in self.parameters.items():
            p.data = torch.stack([state[name].detach() for state in states])
        # Batched convolutions with weights of their own are grouped ones, slower on a CPU than one after the other:
        # 112 against 66 ms for five cnn_tiny on 100 images of 28x28, forward and backward.
        self.batched = not any(isinstance(module, nn.Conv1d | nn.Conv2d) for module in network.modules())

    def logits(self, images: Tensor) -> Tensor:
        """Logits (M, B, K) for images (B, ...)."""
        return self._map(lambda parameters: functional_call(self.network, parameters, (images,)))

    def features(self, images: Tensor) -> Tensor:
        """What each member's linear head reads of the images, (M, B, D)."""
        head = self.network.get_classifier()

        def one(parameters: dict[str, Tensor]) -> Tensor:
            read = []
            with head.register_forward_pre_hook(lambda module, inputs: read.extend(inputs)):
                functional_call(self.network, parameters, (images,))
            return read[0]

        return self._map(one)

    def _map(self, one: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """A function of one member's parameters for every member."""
        if self.batched:
            return vmap(one)(self.parameters)
        members = zip(*self.parameters.values(), strict=True)
        return torch.stack([one(dict(zip(self.parameters, p, strict=True))) for p in members])

    def member(self, index: int) -> dict[str, Tensor]:
        """A copy of one member's weights."""
        return {name: p[index].detach().clone() for name, p in self.parameters.items()}


# ---- what members minimise


@dataclass(frozen=True)
class Member:
    """A member's loss, and the index of its teacher among the population's (None: labels only)."""

    loss: LossConfig
    teacher: int | None = None


class Losses:
    """Gradients of the members' losses with respect to their logits.

    ``losses(student (M, B, K), teachers (E, B, K), target (B,), ...)`` returns the gradient of each member's mean over
    the batch, (M, B, K). Losses without methods are differentiated at once, in closed form:
    ``ce_weight (softmax(s) - q) + kd_weight Ts (softmax(s / Ts) - softmax(t / T))`` with q the smoothed labels, the
    derivative of `kd.losses.reference`. Losses with methods go through torch.func, equal ones together.
    """

    def __init__(self, members: Sequence[Member], num_classes: int, dtype: torch.dtype = torch.float32):
        self.members = members
        self.plain = [i for i, member in enumerate(members) if not member.loss.methods]
        rows = []
        for loss in (members[i].loss for i in self.plain):
            mass = to_uniform(loss.label_smoothing, num_classes, loss.smoothing)
            student_temperature = loss.student_temperature or loss.temperature
            rows.append([loss.temperature, student_temperature, loss.kd_weight, loss.ce_weight, mass])
        columns = rearrange(torch.tensor(rows, dtype=dtype).view(-1, 5), "m setting -> setting m 1 1")
        self.temperature, self.student_temperature, self.kd_weight, self.ce_weight, self.mass = columns
        groups: dict[str, list[int]] = {}
        for i, member in enumerate(members):
            if member.loss.methods:
                groups.setdefault(json.dumps(asdict(member.loss), sort_keys=True), []).append(i)
        self.groups = [(group, _objective(members[group[0]].loss)) for group in groups.values()]

    def __call__(self, student: Tensor, teachers: Tensor | None, target: Tensor, **when) -> Tensor:
        """(M, B, K); `when` has the index, epoch and epochs that methods may read."""
        if not self.groups:  # without the copies that picking members makes, which also change the order in memory
            return self._plain(student, self._taught(teachers, self.plain), target)
        gradient = torch.empty_like(student)
        if self.plain:
            gradient[self.plain] = self._plain(student[self.plain], self._taught(teachers, self.plain), target)
        for group, objective in self.groups:
            gradient[group] = _each(objective, student[group], self._taught(teachers, group), target, when)
        return gradient

    def _plain(self, student: Tensor, taught: Tensor | None, target: Tensor) -> Tensor:
        # Classes in the middle: a softmax over a last dimension of 10 took 15 times as long (0.67 against 0.04 ms).
        student = rearrange(student, "m b k -> m k b").contiguous()
        classes = student.shape[1]
        share = (1 - self.mass) * (torch.arange(classes)[:, None] == target) + self.mass / classes
        total = self.ce_weight * (student.softmax(1) - share)
        if taught is not None:
            for place, i in enumerate(self.plain):
                if mass := self.members[i].loss.teacher_smoothing:
                    taught[place] = unsmooth(taught[place], mass)
            taught = rearrange(taught, "m b k -> m k b").contiguous()
            gap = (student / self.student_temperature).softmax(1) - (taught / self.temperature).softmax(1)
            total += self.kd_weight * self.student_temperature * gap
        return rearrange(total, "m k b -> m b k") / len(target)

    def _taught(self, teachers: Tensor | None, which: Sequence[int]) -> Tensor | None:
        """A copy of the teachers' logits for these members; the first teacher's where a member has none."""
        if teachers is None:
            return None
        return teachers.index_select(0, torch.tensor([self.members[i].teacher or 0 for i in which]))


def _objective(loss: LossConfig) -> Objective:
    settings: dict[str, Any] = {k: v for k, v in asdict(loss).items() if k not in ("methods", "backend")}
    return Objective(DistillLoss(**settings, backend="reference", reduction="sum"), methods.build(loss.methods))


def _each(objective: Objective, student: Tensor, taught: Tensor | None, target: Tensor, when: dict) -> Tensor:
    """The gradient of one objective for each member of a group, (G, B, K)."""

    def one(student: Tensor, teacher: Tensor) -> Tensor:
        return objective(Seen(View(student), View(teacher), target, **when)).loss / len(target)

    return vmap(grad(one))(student, torch.zeros_like(student) if taught is None else taught)


# ---- training


class Training:
    """Training of members that share a recipe's seed, data, batches, schedule and optimizer.

    Parameters
    ----------
    recipe, data, epochs : shared by all members
    network : with the weights that every member starts from
    members : what each minimises
    teachers : (images, index) -> the teachers' logits (E, B, K)
    dtype : of parameters and images
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        epochs: int,
        network: nn.Module,
        members: Sequence[Member],
        teachers: Callable[[Tensor, Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.recipe, self.data, self.epochs, self.teachers, self.dtype = recipe, data, epochs, teachers, dtype
        # The last incomplete batch is dropped, as in kd.training.loop.
        self.updates_per_epoch = len(data.train) // recipe.train.batch_size
        # Before stacking gives biases a second dimension: timm groups what decays by the dimensions of one network.
        self.optimizer = optimizer(network.to(dtype), recipe)
        self.population = Population(network, [dict(network.named_parameters())] * len(members))
        self.scheduler = schedule(self.optimizer, recipe, epochs, self.updates_per_epoch)
        self.losses = Losses(members, data.num_classes, dtype)
        self.update = 0

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches that `kd.training.loop` has in this epoch on one process."""
        size = self.recipe.train.batch_size
        order = epoch_order(len(self.data.train), self.recipe.seed, epoch)
        plan = list(order[: self.updates_per_epoch * size].split(size))
        return iter(self.data.train.batches(plan, epoch))

    def fit(self) -> Population:
        """Train to the last epoch."""
        for epoch in range(self.epochs):
            for batch in self.batches(epoch):
                self.step(batch)
        return self.population

    def step(self, batch: Batch) -> None:
        """One update of every member."""
        self.scheduler.step_update(self.update)
        images = batch.images.to(self.dtype)
        logits = self.population.logits(images)
        with torch.no_grad():
            teachers = self.teachers(images, batch.index) if self.teachers else None
            when = {"index": batch.index, "epoch": self.update / self.updates_per_epoch, "epochs": self.epochs}
            gradient = self.losses(logits.detach(), teachers, batch.targets, **when)
        logits.backward(gradient)  # a member's logits depend on its own weights only: each gets its own gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update += 1


# ---- what a population cannot train


def why_not(point: Point, network: nn.Module, num_classes: int) -> str | None:
    """The reason why a population cannot train the network of a point; None where it can."""
    own, data, train, optimizer = point.section, point.recipe.data, point.recipe.train, point.recipe.optimizer.name
    size = sum(p.numel() for p in network.parameters())
    reasons = {
        f"{own.section}pretrained or checkpoint: starts from weights of its own": (own.pretrained or own.checkpoint),
        f"{own.model} is a network of one's own": own_file(own.model),
        f"class_weight={point.loss.class_weight}": point.loss.class_weight,
        f"data.mixup={data.mixup}": data.mixup,
        f"data.cutmix={data.cutmix}": data.cutmix,
        f"train.clip_grad={train.clip_grad}": train.clip_grad,
        f"train.ema_decay={train.ema_decay}": train.ema_decay,
        f"train.precision={train.precision}": train.precision != "fp32",
        f"optimizer.name={optimizer}: its update may not be elementwise": optimizer not in ELEMENTWISE,
        f"{own.model} has buffers, such as batch normalisation's": any(True for _ in network.buffers()),
        f"{own.model} has dropout": any(isinstance(m, nn.Dropout) and m.p > 0 for m in network.modules()),
        f"{own.model} has {size / 1e6:.1f} M parameters": size > LARGEST,
    }
    first = next((reason for reason, holds in reasons.items() if holds), None)
    return first or (_why_not_methods(point.loss, num_classes) if point.loss.methods else None)


def _why_not_methods(loss: LossConfig, num_classes: int) -> str | None:
    """Whether every method is a pure function of a batch's logits: by what it declares, and by trying it."""
    objective = _objective(loss)
    if beyond := sorted(objective.needs - {"teacher", "target", "labels", "batch"}):
        return f"loss.methods needs {', '.join(beyond)}"
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 8, num_classes, generator=generator)
    target = torch.arange(8) % num_classes
    objective.build(Seen(View(student[0]), View(teacher[0]), target))
    if [*objective.parameters(), *objective.buffers()]:
        return "loss.methods learns or keeps something"
    try:
        _each(objective, student, teacher, target, {"epoch": 1.0, "epochs": 2})
    except RuntimeError as error:  # what torch.func cannot follow, such as a branch on values
        return f"loss.methods: {str(error).splitlines()[0]}"
    return None
