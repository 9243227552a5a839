"""Stopped at any moment and gone on with, a run ends as if nobody had touched it: on one process, on two, on both."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.torture import forked

SMALL = ("recipe=smoke", "run=one", "output=runs", "student.epochs=2", "train.save_every=1000")
ALL_ON = (*SMALL, "data.shift=1", "data.mixup=0.2", "train.ema_decay=0.9", "train.accumulation=2")
ALL_ON += ("train.clip_grad=1", "scheduler.name=step", "scheduler.decay_epochs=1", "loss=ctkd")
STOPS = [("teacher", 2), ("student", 3), ("student", "validation"), ("result", 0)]


def send(stage: str, when: int | str, rank: int, signum: int) -> None:
    """Have the process send itself a signal: in an update of a stage, while it validates, or while it scores."""
    from kd.training import loop, results

    def ask() -> None:
        if int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signum)

    def updating(self, batches):
        if (self.stage.name, self.progress.update + 1) == (stage, when):
            ask()
        return update(self, batches)

    def validating(self, epoch):
        if (self.stage.name, "validation") == (stage, when):
            ask()
        return validate(self, epoch)

    def scoring(*arguments):
        if stage == "result":
            ask()
        return predict(*arguments)

    update, validate, predict = loop.Trainer._update, loop.Trainer._validate, results.predict
    loop.Trainer._update, loop.Trainer._validate, results.predict = updating, validating, scoring


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.torture)])
def test_stopped_anywhere_a_run_goes_on_to_the_same_bits(processes, tmp_path):
    """With augmentation, mixup, averaged weights, accumulation, clipping, a schedule and a method that learns.
    Of two processes only the second is asked: both must agree.
    """
    forked.whole(*ALL_ON, folder=tmp_path / "whole", processes=processes)
    cut = tmp_path / "cut"
    for i, (stage, when) in enumerate(STOPS):
        signum = (signal.SIGTERM, signal.SIGUSR1)[i % 2]
        hook = partial(send, stage, when, processes - 1, signum)
        log = f"log{i}.txt"
        codes = forked.finish(forked.start(*ALL_ON, folder=cut, processes=processes, hook=hook, log=log))
        said = (cut / log).read_text()
        assert codes == [0] * processes, said
        assert said.splitlines()[-1].startswith("stopped" if stage == "result" else f"{stage} stopped after update")
        assert not (cut / "runs/smoke/one/result.json").exists()
    forked.whole(*ALL_ON, folder=cut, processes=processes)
    assert forked.differences(tmp_path / "whole/runs", cut / "runs") == []
    assert len(forked.outcome(cut / "runs")) == 12  # three networks of three files each, two curves, the result


def lag() -> None:
    """Have only the first process see a checkpoint, as a file system of several machines may."""
    from kd.checkpoint import store

    checkpoint = store.Checkpoint(Path("update-00000003"), {}, None)
    store.load = lambda *arguments: checkpoint if os.environ["RANK"] == "0" else None


def test_two_processes_that_find_different_checkpoints_do_not_train(tmp_path):
    """They would average the gradients of different weights, and nobody would see."""
    codes = forked.finish(forked.start(*SMALL, folder=tmp_path, hook=lag, processes=2))
    said = (tmp_path / "log.txt").read_text()
    assert codes == [2, 2], said
    assert "not all processes find the same checkpoint (update-00000003, none); a shared file system may lag" in said


@pytest.mark.torture
def test_a_run_may_go_on_with_another_number_of_processes(tmp_path):
    """Same global batches; weights to rounding, since sums over processes are taken in another order."""
    words = (*SMALL, "data.shift=1", "train.ema_decay=0.9", "train.accumulation=2", "train.batch_size=255")
    forked.whole(*words, folder=tmp_path / "whole")
    cut = tmp_path / "cut"
    for processes, request in ((2, ("student", 3, 0, signal.SIGTERM)), (1, ("student", 7, 0, signal.SIGUSR1))):
        codes = forked.finish(forked.start(*words, folder=cut, processes=processes, hook=partial(send, *request)))
        assert codes == [0] * processes, (cut / "log.txt").read_text()
    forked.whole(*words, folder=cut, processes=2)
    for update in (3, 7):
        assert f"goes on after update {update} of 10" in (cut / "log.txt").read_text()
    for name in ("student", "control"):
        one, other = (load_file(d / f"runs/smoke/one/{name}/last.safetensors") for d in (tmp_path / "whole", cut))
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=0, atol=1e-4)
