"""A non-finite update stops a run before it reaches the weights; the message names update, term and images."""

import io
import json
import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from kd.errors import TrainingError
from kd.losses.distill import DistillLoss
from kd.losses.methods.base import METHODS, Method, Weighted
from kd.models.wrappers import Teacher
from kd.training.objective import Objective
from tests.torture import forked
from tests.training.tiny_loop import Tiny, lines, recipe, trainer, weights


class Constant(Method, name="constant_for_a_test"):
    """A value without a gradient."""

    value: str = "0"
    needs = frozenset()

    def values(self, seen):
        return torch.where(seen.index == seen.index.max(), float(self.value), 0.0) + 0 * seen.student.logits.sum(-1)


del METHODS["constant_for_a_test"]  # of no other test


def refused(t, batches) -> str:
    """The message of an update that is not made; nothing that the update would change is changed."""
    before, state = weights(t), t.optimizer.state_dict()["state"]
    assert state == {}
    with pytest.raises(TrainingError) as stop:
        t._update(batches)
    assert torch.equal(weights(t), before)
    assert t.optimizer.state_dict()["state"] == {}
    assert t.progress.update == 0
    return str(stop.value)


def pieces(t, count=2):
    batches = t._batches(0, 0)
    return [next(batches) for _ in range(count)]


def test_a_bad_image_is_named_in_the_piece_that_has_it(tmp_path):
    t = trainer(tmp_path, recipe(accumulation=2), teacher=Teacher(Tiny()), loss=DistillLoss(reduction="sum"))
    first, second = pieces(t)
    second.images[[3, 7]] = math.inf
    said = refused(t, [first, second])
    rows = ", ".join(map(str, sorted(second.index[[3, 7]].tolist())))
    assert said.startswith("student: gradient norm nan in update 1 of 20, which was not applied; the last saved state")
    assert f"ce, kd not finite for training images {rows}; look at these images, or try a smaller" in said


def test_a_teacher_that_overflows_is_named(tmp_path):
    class Overflows(Tiny):
        def forward(self, x):
            return super().forward(x) * torch.where(torch.arange(len(x)) == 5, math.nan, 1.0)[:, None]

    t = trainer(tmp_path, recipe(), teacher=Teacher(Overflows()), loss=DistillLoss(reduction="sum"))
    (batch,) = pieces(t, 1)
    said = refused(t, [batch])
    assert f"teacher's logits, kd not finite for training images {batch.index[5]}; look at these" in said


def test_a_term_that_is_not_finite_is_named_though_its_gradient_is(tmp_path):
    t = trainer(tmp_path, recipe())
    t.stage.objective = Objective(t.stage.objective.loss, {"mine": Weighted(Constant("inf"), 1.0, 0.0)})
    (batch,) = pieces(t, 1)
    assert f"mine not finite for training images {batch.index.max()}; look at these" in refused(t, [batch])


def test_a_gradient_that_is_not_finite_is_named_by_its_first_parameter(tmp_path):
    t = trainer(tmp_path, recipe())
    t.stage.model.model.inner[1].bias.register_hook(lambda gradient: gradient * math.inf)
    said = refused(t, pieces(t, 1))
    assert "the gradient of inner.1.bias is not finite, all terms of the loss are; try a smaller optimizer.lr" in said


def test_looking_is_bit_identical_to_not_looking(tmp_path):
    """The term that carries a loss which is not finite into the gradient adds 0 to any other."""
    t = trainer(tmp_path, recipe())
    (batch,) = pieces(t, 1)
    t._forward_backward(batch, 0)
    terms = t._forward(batch, 0)[1]
    expected = torch.autograd.grad(terms.loss * (1 / 128), list(t.stage.model.parameters()))
    for p, gradient in zip(t.stage.model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)


def poisoned(position: int) -> None:
    """One image of the training set is not finite, in the student's second epoch."""
    from kd.training import loop

    def bad(batch, *rest):
        batch = as_trained(batch, *rest)
        return batch._replace(images=batch.images.index_fill(0, (batch.index == position).nonzero()[:, 0], math.nan))

    def epoch(self, number):
        loop.as_trained = bad if (self.stage.name, number) == ("student", 1) else as_trained
        return train(self, number)

    as_trained, train = loop.as_trained, loop.Trainer._epoch
    loop.Trainer._epoch = epoch


@pytest.mark.torture
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_met_a_bad_image_goes_on_to_the_same_bits_without_it(processes, tmp_path):
    words = ("recipe=smoke", "run=one", "output=runs", "student.epochs=2", "train.accumulation=2", "control=false")
    forked.whole(*words, folder=tmp_path / "whole", processes=processes)
    cut = tmp_path / "cut"
    options = {"folder": cut, "processes": processes, "hook": partial(poisoned, 100)}
    codes = forked.finish(forked.start(*words, "train.save_every=0", **options))
    assert codes == [1] * processes
    said = [line for path in sorted(cut.glob("log.txt*")) for line in path.read_text().splitlines() if "error" in line]
    assert len(said) == 1
    assert said[0].startswith("error: student: gradient norm nan in update ")
    assert "kd not finite for training images 100; look at these images" in said[0]
    forked.whole(*words, folder=cut, processes=processes, log="again.txt")
    assert "goes on after update" in (cut / "again.txt").read_text()
    assert forked.differences(tmp_path / "whole/runs", cut / "runs") == []


# ---- fp16's scaler, on a CPU


def scaled(tmp_path, scale: float, monkeypatch, **options):
    made = Accelerator.__init__

    def with_scaler(self, *arguments, **settings):
        made(self, *arguments, **settings)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    return trainer(tmp_path, recipe(**options), epochs=2)


def test_updates_that_the_scaler_leaves_out_are_counted_and_told(tmp_path, monkeypatch):
    """The squares of so large gradients overflow float32, until the scale has been halved a few times."""
    t = scaled(tmp_path, 2.0**68, monkeypatch, ema_decay=0.9)
    t.logger.console = Console(file=io.StringIO(), width=200)
    made = []
    t.optimizer.register_step_post_hook(lambda *rest: made.append(t.progress.update))
    t.fit()
    skipped = 20 - len(made)
    assert 0 < skipped < 10
    counts = [line["skipped"] for line in lines(tmp_path) if "skipped" in line]
    assert counts == [i + 1 if i < skipped else skipped for i in range(20)]
    assert json.loads((tmp_path / "student/stage.json").read_text())["skipped"] == skipped
    assert t.logger.console.file.getvalue().count(f"   {skipped} updates skipped (fp16)") == 2


def test_a_scaler_that_finds_no_scale_stops_the_run_with_the_reason(tmp_path, monkeypatch):
    t = scaled(tmp_path, 2.0**16, monkeypatch)
    before = weights(t)
    (batch,) = pieces(t, 1)
    bad = batch._replace(images=batch.images * math.nan)
    for _ in range(31):
        t._update([bad])
    t._update([batch])  # one that is finite, and the count begins anew
    assert not torch.equal(weights(t), before)
    before = weights(t)
    for _ in range(31):
        t._update([bad])
    with pytest.raises(TrainingError, match=r"32 updates in a row without a finite gradient in fp16 .* ce not finite"):
        t._update([bad])
    assert torch.equal(weights(t), before)
    assert t.progress.skipped == 63
