"""The loop on a network small enough to redo by hand: what it averages, and in which order."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from kd.errors import ConfigError, TrainingError
from kd.losses.distill import DistillLoss
from kd.models.wrappers import Teacher
from kd.training import preflight
from kd.training.predict import predict
from kd.training.schedule import epoch_order, mixed_seed, share
from tests.training.tiny_loop import Tiny, lines, recipe, trainer, weights


def test_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    order = epoch_order(100, 1, 2)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, epoch_order(100, 1, 2))
    assert not torch.equal(order, epoch_order(100, 1, 3))
    assert not torch.equal(order, epoch_order(100, 2, 1))
    assert mixed_seed(1, 2) != mixed_seed(2, 1)


@pytest.mark.parametrize(("size", "accumulation", "processes"), [(12, 1, 1), (13, 2, 3), (7, 3, 2)])
def test_shares_of_all_processes_are_the_batch_once(size, accumulation, processes):
    batch = torch.randperm(size)
    pieces = [share(batch, accumulation, processes, rank) for rank in range(processes)]
    assert all(len(p) == accumulation for p in pieces)
    together = torch.cat([piece for step in zip(*pieces, strict=True) for piece in step])
    assert torch.equal(together, batch)


def test_one_update_is_the_optimizers_step_on_the_mean_loss_of_the_batch(tmp_path):
    t = trainer(tmp_path, recipe())
    torch.manual_seed(0)
    by_hand = Tiny()
    biases = [p for p in by_hand.parameters() if p.ndim == 1]
    matrices = [p for p in by_hand.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": biases, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.05}], lr=5e-3
    )
    batch = next(t._batches(0, 0))
    F.cross_entropy(by_hand(batch.images), batch.targets).backward()
    optimizer.step()
    t._update([batch])
    expected = torch.cat([p.detach().flatten() for p in by_hand.parameters()])
    torch.testing.assert_close(weights(t), expected, rtol=0, atol=1e-7)


def test_sgd_without_momentum_is_plain(tmp_path):
    """timm's sgd is Nesterov's, which cannot be without a momentum."""
    r = recipe()
    r.optimizer.name, r.optimizer.momentum, r.optimizer.lr, r.optimizer.weight_decay = "sgd", 0.0, 0.5, 0.0
    preflight.check_environment(r)
    t = trainer(tmp_path, r)
    torch.manual_seed(0)
    by_hand = Tiny()
    batch = next(t._batches(0, 0))
    F.cross_entropy(by_hand(batch.images), batch.targets).backward()
    t._update([batch])
    expected = torch.cat([(p - 0.5 * p.grad).flatten() for p in by_hand.parameters()])
    torch.testing.assert_close(weights(t), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["adamx", "adahessian"])
def test_an_optimizer_that_cannot_train_is_refused_in_one_line(name):
    r = recipe()
    r.optimizer.name = name
    with pytest.raises(ConfigError, match=rf"^optimizer.name={name}: .*; (try|did you mean) "):
        preflight.check_environment(r)


@pytest.mark.parametrize("accumulation", [4, 3])
def test_accumulation_does_not_change_the_update(tmp_path, accumulation):
    whole, pieces = trainer(tmp_path / "a", recipe()), trainer(tmp_path / "b", recipe(accumulation=accumulation))
    for t in (whole, pieces):
        t.stage.epochs = 1
        t.fit()
    # Adam's first steps divide a gradient by its own size, which amplifies the rounding of the two orders of summation.
    torch.testing.assert_close(weights(whole), weights(pieces), rtol=0, atol=2e-5)
    assert not torch.allclose(weights(whole), weights(trainer(tmp_path / "c", recipe())), atol=1e-3)


def test_logged_terms_are_unweighted_means_and_the_ratio_is_of_the_weighted_gradients(tmp_path):
    torch.manual_seed(5)
    teacher = Teacher(Tiny())
    loss = DistillLoss(temperature=4.0, kd_weight=0.7, ce_weight=0.2, label_smoothing=0.1, reduction="sum")
    t = trainer(tmp_path, recipe(batch_size=512), teacher=teacher, loss=loss, epochs=1)
    batch = next(t._batches(0, 0))
    student = t.stage.model.model.eval()
    s, q = student(batch.images).detach(), teacher(batch.images).logits
    t.fit()
    first = lines(tmp_path)[0]
    ce = F.cross_entropy(s, batch.targets, label_smoothing=0.1)
    kd = 16 * F.kl_div(F.log_softmax(s / 4, -1), F.softmax(q / 4, -1), reduction="batchmean")
    entropy = -(q.softmax(-1) * q.log_softmax(-1)).sum(-1).mean()
    assert first["ce"] == pytest.approx(float(ce), rel=1e-5)
    assert first["kd"] == pytest.approx(float(kd), rel=1e-4)
    assert first["loss"] == pytest.approx(float(0.2 * ce + 0.7 * kd), rel=1e-5)
    assert first["teacher_entropy"] == pytest.approx(float(entropy), rel=1e-5)
    assert first["agreement"] == pytest.approx(float((s.argmax(-1) == q.argmax(-1)).float().mean()))
    assert first["lr"] == pytest.approx(5e-3)
    assert first["images_per_second"] > 0


@pytest.mark.parametrize("warmup", [False, True])
def test_averaged_weights_follow_their_formula_and_are_the_ones_saved(tmp_path, warmup):
    """timm's warm-up: the k-th update has the decay 1 - k^(-2/3), up to train.ema_decay; the first one has 0."""
    t = trainer(tmp_path, recipe(ema_decay=0.6, ema_warmup=warmup, batch_size=258), epochs=1)
    average, k = copied(t), 0

    def follow(*_):
        nonlocal k, average
        k += 1
        decay = min(0.6, 1 - k ** (-2 / 3)) if warmup else 0.6
        average = {name: decay * average[name] + (1 - decay) * value for name, value in copied(t).items()}

    t.optimizer.register_step_post_hook(follow)
    t.fit()
    assert k == 5
    saved = load_file(tmp_path / "student" / "last.safetensors")
    assert saved.keys() == average.keys()
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value)


def copied(t):
    return {name: value.clone() for name, value in t.stage.model.model.state_dict().items()}


def test_clipping_bounds_the_gradient(tmp_path):
    t = trainer(tmp_path, recipe(clip_grad=0.01))
    seen = {}
    t.optimizer.register_step_pre_hook(
        lambda o, a, k: seen.update(norm=torch.nn.utils.get_total_norm([p.grad for p in t.stage.model.parameters()]))
    )
    logged = t._update([next(t._batches(0, 0))])
    assert float(logged["grad_norm"]) > 0.1
    assert float(seen["norm"]) == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_follows_the_schedule_after_every_update(tmp_path):
    t = trainer(tmp_path, recipe())
    t.fit()
    rates = [line["lr"] for line in lines(tmp_path) if "lr" in line]
    expected = [5e-3 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-9)


def test_training_learns_and_the_selected_weights_are_the_best_validated(tmp_path):
    r = recipe()
    r.optimizer.lr = 0.02
    t = trainer(tmp_path, r, epochs=4)
    t.fit()
    validated = [line for line in lines(tmp_path) if "val_top1" in line]
    assert validated[-1]["val_top1"] > 0.8
    best = max(validated, key=lambda line: (line["val_top1"], -line["val_nll"]))
    assert json.loads((tmp_path / "student/stage.json").read_text())["selected"]["epoch"] == best["epoch"] + 1


def test_what_diverges_in_the_last_update_of_an_epoch_stops_at_its_validation(tmp_path):
    t = trainer(tmp_path, recipe(batch_size=1293))
    t._save()
    last = t.stage.model.model.inner[-1].bias
    t.optimizer.register_step_post_hook(lambda *_: last.data.fill_(math.inf))
    with pytest.raises(TrainingError) as error:
        t.fit()
    assert str(error.value) == (
        "student: logits of 144 of 144 validation images are not finite after update 1 of 2; the last saved state is "
        "kept. Try a smaller optimizer.lr, or train.clip_grad=1"
    )
    assert [p.name for p in (tmp_path / "student/checkpoints").iterdir()] == ["update-00000000"]


def test_every_process_brings_as_many_rows_and_none_is_counted_twice():
    """Three processes over ten rows, without processes: each gathers what the others would have sent."""
    rows = []

    class Numbers(list):
        def batches(self, plan, epoch):
            return (SimpleNamespace(images=piece) for piece in plan)

    class Fake:
        num_processes = 3
        process_index = 0

        autocast = nullcontext

        def gather(self, x):
            rows.append(x)
            return torch.cat(rows) if len(rows) == 3 else torch.zeros(3 * len(x), x.shape[-1])

    class Echo(nn.Module):
        def forward(self, x):
            return SimpleNamespace(logits=x.float()[:, None])

    fake = Fake()
    for fake.process_index in range(3):
        out = predict(Echo(), Numbers(range(10)), 6, fake)
    assert out.flatten().tolist() == list(range(10))


def test_bf16_and_channels_last_change_the_result_little(tmp_path):
    plain = trainer(tmp_path / "a", recipe())
    plain.fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    other = trainer(tmp_path / "b", recipe(channels_last=True), precision="bf16")
    other.fit()
    difference = (weights(plain) - weights(other)).abs().max()
    assert 0 < float(difference) < 0.05
