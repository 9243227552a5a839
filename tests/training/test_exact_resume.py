"""Exact resume: every part of the training state is saved, and nothing else is needed."""

from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator

from kd.runtime import signals
from kd.training.loop import Trainer
from kd.training.predict import predict
from kd.training.schedule import epoch_order, mixed_seed
from tests.torture import forked
from tests.training.tiny_loop import lines, recipe, trainer, weights


@pytest.mark.parametrize("stop_at", [1, 10, 15])  # in the middle of an epoch, and at its end
def test_a_stopped_and_resumed_run_ends_bit_identical(tmp_path, monkeypatch, stop_at):
    """With dropout, augmentation, accumulation, averaged weights and a schedule on; 10 updates an epoch."""
    options = {"accumulation": 2, "ema_decay": 0.9}
    whole = trainer(tmp_path / "whole", recipe(**options), dropout=0.2)
    whole.fit()

    def stop(accelerator):
        return first.progress.update >= stop_at

    first = trainer(tmp_path / "resumed", recipe(**options), dropout=0.2)
    monkeypatch.setattr("kd.training.loop.stop_requested", stop)
    with pytest.raises(signals.Interrupted, match=f"student stopped after update {stop_at} of 20"):
        first.fit()
    monkeypatch.undo()
    # What a killed process had written past its last save is written again, not twice.
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "student", "update": 19, "epoch": 1}\n{"stage": "stud')
    second = trainer(tmp_path / "resumed", recipe(**options), dropout=0.2)
    second.fit()
    assert torch.equal(weights(whole), weights(second))
    for name in ("last", "selected"):
        file = f"student/{name}.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()

    def timeless(folder):
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines(folder)]

    assert timeless(tmp_path / "whole") == timeless(tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "student" / "checkpoints").exists()


FRESH = {
    "model": lambda t: t.stage.model.model,
    "objective": lambda t: t.stage.objective,
    "optimizer": lambda t: t.optimizer,
    "ema": lambda t: t.ema.module,
    "scaler": lambda t: t.accelerator.scaler,
}
POSITION = {"update": 0, "epochs": 0, "selected": {}, "skipped": 0}
RANDOM = ("schedule", "dropout", "order")  # what is not saved, because it follows from the position


def without(t: Trainer, field: str, monkeypatch) -> None:
    """Have `fit` resume everything but one field, which stays as a fresh run has it."""
    load, position = t._load, 17
    start = deepcopy(FRESH[field](t).state_dict()) if field in FRESH else None

    def partly():
        load()
        assert t.progress.update == position
        if field in FRESH:
            FRESH[field](t).load_state_dict(start)
        elif field in POSITION:
            assert getattr(t.progress, field) != POSITION[field]
            setattr(t.progress, field, POSITION[field])
        elif field == "schedule":
            step = t.scheduler.step_update
            t.scheduler.step_update = lambda update: step(update - position)
        elif field == "dropout":
            monkeypatch.setattr(
                "kd.training.loop.mixed_seed", lambda seed, update, *rest: mixed_seed(seed, update - position, *rest)
            )
        elif field == "order":
            monkeypatch.setattr(
                "kd.training.loop.epoch_order", lambda size, seed, epoch: epoch_order(size, seed, epoch - 1)
            )

    t._load = partly


@pytest.mark.parametrize("field", [None, *FRESH, *POSITION, *RANDOM])
def test_each_part_of_the_state_is_needed(tmp_path, monkeypatch, field):
    """A run that goes on without one of them ends otherwise; with all of them (None) it does not."""
    made = Accelerator.__init__

    def with_scaler(self, *arguments, **settings):
        made(self, *arguments, **settings)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**68, growth_interval=10)  # skips a few updates

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)

    def fresh(folder):
        methods = {"online_label_smoothing": {"weight": 1.0}}
        return trainer(folder, recipe(ema_decay=0.9), methods=methods, dropout=0.2, epochs=3)

    def falling(*arguments):  # the first epoch is the best: forgotten, another one would be
        return torch.tensor(1.0 / (1 + running[0].progress.epochs))

    monkeypatch.setattr("kd.training.loop.top_k_accuracy", falling)
    running = [fresh(tmp_path / "whole")]
    running[0].fit()
    running[0] = first = fresh(tmp_path / "cut")
    monkeypatch.setattr("kd.training.loop.stop_requested", lambda a: first.progress.update >= 17)
    with pytest.raises(signals.Interrupted):
        first.fit()
    monkeypatch.setattr("kd.training.loop.stop_requested", signals.stop_requested)
    running[0] = second = fresh(tmp_path / "cut")
    without(second, field, monkeypatch)
    second.fit()
    assert (forked.differences(tmp_path / "whole", tmp_path / "cut") == []) == (field is None)


def test_what_was_logged_is_on_the_disk_before_a_stage_is_finished(tmp_path, monkeypatch):
    t, done = trainer(tmp_path, recipe()), []
    for name in ("write", "flush"):
        monkeypatch.setattr(t.logger, name, lambda *values, name=name: done.append(name))
    monkeypatch.setattr("kd.checkpoint.store.finish", lambda *arguments: done.append("finish"))
    t.fit()
    assert done[-3:] == ["write", "flush", "finish"]


def test_asked_to_stop_while_it_validates_a_run_goes_on_with_the_validation(tmp_path, monkeypatch):
    """Killed after that and before the next save, it does not write the epoch's line twice."""
    whole = trainer(tmp_path / "whole", recipe())
    whole.fit()
    first = trainer(tmp_path / "cut", recipe())

    def asked(*arguments):
        if first.progress.update == 20:
            raise signals.Interrupted("stopped")
        return predict(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("kd.training.loop.predict", asked)
        with pytest.raises(signals.Interrupted, match="student stopped after update 20 of 20"):
            first.fit()
    killed = trainer(tmp_path / "cut", recipe(save_every=1000.0))
    monkeypatch.setattr(killed, "_save_or_stop", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        killed.fit()
    assert len(lines(tmp_path / "cut")) == len(lines(tmp_path / "whole"))
    trainer(tmp_path / "cut", recipe()).fit()
    assert forked.differences(tmp_path / "whole", tmp_path / "cut") == []
