"""A member of a population is the network that an ordinary loop, and kd.train, would have trained."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kd import DistillLoss
from kd.config.schema import (
    DataConfig,
    LossConfig,
    OptimizerConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from kd.data import load_data
from kd.models.factory import build
from kd.study.grid import Point
from kd.study.population import Member, Population, Training, why_not
from kd.training import pipeline
from kd.training.run import claim
from kd.training.schedule import epoch_order

EPOCHS = 2
RECIPE = Recipe(
    name="tiny",
    seed=3,
    data=DataConfig(image_size=8, shift=1),
    teacher=TeacherConfig(model="mlp_tiny", epochs=EPOCHS, label_smoothing=0.4),
    student=StudentConfig(model="mlp_nano", epochs=EPOCHS),
    optimizer=OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1),
    train=TrainConfig(batch_size=200),
    control=False,
)
HARD = LossConfig(kd_weight=0.0, ce_weight=1.0)


LOSSES = [
    LossConfig(temperature=4.0, kd_weight=1.0, ce_weight=0.0),
    LossConfig(temperature=4.0, student_temperature=1.0, kd_weight=0.5, ce_weight=0.5, label_smoothing=0.2),
    LossConfig(temperature=2.0, kd_weight=0.7, ce_weight=0.3, label_smoothing=0.1, smoothing="others"),
    LossConfig(temperature=1.0, kd_weight=1.0, ce_weight=0.0, teacher_smoothing=0.3),
    replace(HARD, label_smoothing=0.1),
]
TAUGHT = [0, 1, 0, 1, None]


def network(model: str) -> nn.Module:
    torch.manual_seed(RECIPE.seed)
    return build(model, num_classes=10, input_shape=(1, 8, 8))


def ordinary_loop(data, net: nn.Module, criterion, recipe=RECIPE) -> nn.Module:
    """PyTorch as one writes it by hand, in float64: groups for weight decay, a cosine from lr to 0 by its formula."""
    net, o, size = net.double(), recipe.optimizer, recipe.train.batch_size
    per_epoch = len(data.train) // size
    kinds = {"decay": [p for p in net.parameters() if p.ndim > 1], "not": [p for p in net.parameters() if p.ndim <= 1]}
    groups = [{"params": kinds["not"], "weight_decay": 0.0}, {"params": kinds["decay"], "weight_decay": o.weight_decay}]
    if o.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, nesterov=o.momentum > 0)
    else:
        optimizer = torch.optim.AdamW(groups, lr=o.lr)
    for epoch in range(EPOCHS):
        order = epoch_order(len(data.train), RECIPE.seed, epoch)
        for i in range(per_epoch):
            update = epoch * per_epoch + i
            for group in optimizer.param_groups:
                group["lr"] = o.lr * 0.5 * (1 + math.cos(math.pi * update / (EPOCHS * per_epoch)))
            (batch,) = data.train.batches([order[i * size : (i + 1) * size]], epoch)
            optimizer.zero_grad()
            criterion(net(batch.images.double()), batch).backward()
            optimizer.step()
    return net


def criterion_of(loss: LossConfig, teacher: nn.Module | None):
    """The mean loss of a batch by the public loss, plain backend."""
    names = ("temperature", "student_temperature", "kd_weight", "ce_weight", "label_smoothing", "smoothing")
    settings = {name: getattr(loss, name) for name in (*names, "teacher_smoothing")}
    distill = DistillLoss(**settings, backend="reference")

    def criterion(logits, batch):
        with torch.no_grad():
            taught = teacher(batch.images.double()) if teacher else None
        return distill(logits, taught, batch.targets)

    return criterion


def trained(data, members, teachers, recipe=RECIPE) -> Training:
    stacked = Population(network("mlp_tiny"), [dict(t.named_parameters()) for t in teachers])
    source = (lambda images, index: stacked.logits(images)) if teachers else None
    training = Training(recipe, data, EPOCHS, network("mlp_nano"), members, source, torch.float64)
    training.fit()
    return training


def assert_same(net: nn.Module, member: dict[str, torch.Tensor], tolerance=1e-10):
    for name, p in net.named_parameters():
        torch.testing.assert_close(member[name], p.detach(), atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def student_of(recipe: Recipe) -> Point:
    return Point("", "student", None, recipe, None, "")


def with_optimizer(**changes) -> Recipe:
    return replace(RECIPE, optimizer=replace(RECIPE.optimizer, **changes))


@pytest.fixture(scope="module")
def data():
    return load_data(RECIPE.data, RECIPE.seed)


@pytest.fixture(scope="module")
def teachers() -> list[nn.Module]:
    """Two networks that are sure of different things; training changes nothing of what is tested here."""
    made = []
    for scale in (3.0, 6.0):
        net = network("mlp_tiny").double()
        with torch.no_grad():
            net.fc.weight.mul_(scale)
        made.append(net)
    return made


def test_every_member_equals_the_ordinary_loop_in_float64(data, teachers):
    """Temperatures, weights, smoothing of either side, unsmoothing, and no teacher at all, in one population."""
    members = [Member(loss, taught) for loss, taught in zip(LOSSES, TAUGHT, strict=True)]
    population = trained(data, members, teachers).population
    for i, member in enumerate(members):
        teacher = None if member.teacher is None else teachers[member.teacher]
        expected = ordinary_loop(data, network("mlp_nano"), criterion_of(member.loss, teacher))
        assert_same(expected, population.member(i))


def test_a_method_of_the_batch_equals_the_ordinary_loop(data, teachers):
    losses = [LOSSES[0], replace(HARD, methods={"dist": {"weight": 2.0, "temperature": 3.0}})]
    population = trained(data, [Member(loss, 1) for loss in losses], teachers).population
    hard = criterion_of(HARD, None)

    def correlated(logits, batch):  # DIST by its formula, with numpy's correlation replaced by torch's
        with torch.no_grad():
            p_t = (teachers[1](batch.images.double()) / 3).softmax(-1)
        p_s = (logits / 3).softmax(-1)
        rho = [torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*x, strict=True)]).mean()
               for x in ((p_s, p_t), (p_s.T, p_t.T))]  # fmt: skip
        return hard(logits, batch) + 2.0 * 9 * ((1 - rho[0]) + (1 - rho[1]))

    for i, criterion in ((0, criterion_of(LOSSES[0], teachers[1])), (1, correlated)):
        assert_same(ordinary_loop(data, network("mlp_nano"), criterion), population.member(i), 1e-9)


def test_sgd_with_momentum_is_each_members_own(data, teachers):
    recipe, criterion = with_optimizer(name="sgd", lr=0.05, momentum=0.8), criterion_of(LOSSES[1], teachers[1])
    population = trained(data, [Member(LOSSES[0], 0), Member(LOSSES[1], 1)], teachers, recipe).population
    assert_same(ordinary_loop(data, network("mlp_nano"), criterion, recipe), population.member(1))


def test_unsmoothing_recovers_the_clean_teachers_student(data):
    """End to end in float64: by `loss.teacher_smoothing` and by the method, against students that lost something."""
    eps = 0.4
    teacher = network("mlp_tiny").double()
    with torch.no_grad():
        teacher.fc.weight.mul_(3)  # p of 1e-12 beside eps/K would keep four digits only

    def source(images, index):
        clean = teacher(images).log_softmax(-1)
        return torch.stack([clean, torch.logaddexp(clean + math.log1p(-eps), torch.tensor(math.log(eps / 10)))])

    method = {"smoothed_teacher": {"mass": eps, "taken_out": eps, "temperature": 4.0}}
    members = [
        Member(LOSSES[0], 0),
        Member(replace(LOSSES[0], teacher_smoothing=eps), 1),
        Member(replace(HARD, ce_weight=0.0, methods=method), 0),
        Member(LOSSES[0], 1),
    ]
    # AdamW divides a gradient by its size: where one is but rounding, it would take a step of that.
    recipe = with_optimizer(name="sgd", lr=0.05)
    population = Training(recipe, data, EPOCHS, network("mlp_nano"), members, source, torch.float64).fit()
    clean, unsmoothed, by_method, smoothed = (population.member(i) for i in range(4))
    for name, p in clean.items():
        torch.testing.assert_close(unsmoothed[name], p, atol=1e-8, rtol=0)
        torch.testing.assert_close(by_method[name], p, atol=1e-8, rtol=0)
    assert max((smoothed[name] - p).abs().max() for name, p in clean.items()) > 1e-3


def test_a_member_is_the_network_that_kd_train_trains(data, tmp_path):
    """Teacher and student with the recipe's own augmentation, in float32; the loop there has the fused loss."""
    recipe = replace(RECIPE, output=str(tmp_path), loss=LOSSES[1])
    hard = [replace(HARD, label_smoothing=eps) for eps in (0.0, 0.4)]
    grown = Training(recipe, data, EPOCHS, network("mlp_tiny"), [Member(loss) for loss in hard]).fit()
    stacked = Population(network("mlp_tiny"), [grown.member(i) for i in range(2)])
    members = [Member(LOSSES[0], 0), Member(LOSSES[1], 1)]
    source = lambda images, index: stacked.logits(images)  # noqa: E731
    population = Training(recipe, data, EPOCHS, network("mlp_nano"), members, source).fit()

    run = pipeline.prepare(recipe)
    claim(run)
    pipeline.execute(run)
    for folder, member in ((run.teacher_directory, grown.member(1)), (run.directory / "student", population.member(1))):
        weights = load_file(folder / "last.safetensors")
        assert weights.keys() == member.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(member[name], weight, atol=2e-6, rtol=0)
    other = population.member(0)
    assert max((other[name] - weights[name]).abs().max() for name in weights) > 1e-3  # the members differ


def test_a_member_that_diverges_takes_no_other_along(data, teachers):
    broken = network("mlp_tiny").double()
    with torch.no_grad():
        broken.fc.bias.fill_(math.nan)
    members = [Member(LOSSES[0], 0), Member(LOSSES[0], 2), Member(LOSSES[1], 1)]
    with_it = trained(data, members, [*teachers, broken])
    without = trained(data, [members[0], Member(HARD), members[2]], teachers)
    assert not any(p.isfinite().all() for p in with_it.population.member(1).values())
    for i in (0, 2):
        for name, p in with_it.population.member(i).items():
            assert torch.equal(p, without.population.member(i)[name])


@pytest.mark.parametrize(("model", "batched"), [("mlp_tiny", True), ("cnn_tiny", False)])
def test_the_stacked_network_is_its_members_forward_and_backward(model, batched):
    """Convolutions go one after the other, everything else at once: nobody can tell from the numbers."""
    images = torch.randn(7, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nets = [network(model).double() for _ in range(3)]
    for i, net in enumerate(nets):
        with torch.no_grad():
            net.fc.weight.mul_(i + 1)
    stacked = Population(network(model), [dict(net.named_parameters()) for net in nets])
    assert stacked.batched is batched
    logits = stacked.logits(images)
    upstream = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits.backward(upstream)
    for i, net in enumerate(nets):
        expected = net(images)
        expected.backward(upstream[i])
        torch.testing.assert_close(logits[i], expected, atol=1e-12, rtol=0)
        for name, p in net.named_parameters():
            torch.testing.assert_close(stacked.parameters[name].grad[i], p.grad, atol=1e-11, rtol=0)
            assert torch.equal(stacked.member(i)[name], p)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": DataConfig(mixup=0.2)}, "data.mixup=0.2"),
        ({"loss": replace(HARD, class_weight="balanced")}, "class_weight=balanced"),
        ({"loss": replace(HARD, methods={"crd": {}})}, "needs embedding, index"),
        ({"loss": replace(HARD, methods={"ctkd": {}})}, "learns or keeps"),
        ({"loss": replace(HARD, methods={"dist": {}, "dkd": {}})}, None),
        ({}, None),
    ],
)
def test_what_a_population_cannot_do_is_said(change, reason):
    found = why_not(student_of(replace(RECIPE, **change)), network("mlp_nano"), 10)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.BatchNorm1d(4), "batch normalisation"),
        (nn.Dropout(0.1), "dropout"),
        (nn.Linear(1500, 1500), "2.3 M parameters"),
    ],
)
def test_batch_normalisation_dropout_and_size_are_reasons_too(layer, reason):
    assert reason in why_not(student_of(RECIPE), nn.Sequential(layer), 10)
