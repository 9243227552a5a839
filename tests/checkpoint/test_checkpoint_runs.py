"""Runs on damaged, foreign and unwritable checkpoints: gone on with bit for bit, or stopped with one line."""

import errno
import io
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from kd import checkpoint
from kd.training import loop
from kd.verify import main
from tests.checkpoint.test_checkpoint import manifest, spoil, updates


def stopped(kd_train, monkeypatch, output: str, *at: int) -> None:
    """A run of 10 updates, saved at each of some, and stopped at the last of them."""
    update, seen = loop.Trainer._update, []

    def counted(self, batches):
        seen.append(self.stage.name)
        return update(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", counted)
        for count in at:
            patch.setattr(loop, "stop_requested", lambda accelerator, count=count: seen.count("student") == count)
            assert kd_train(*RUN, f"output={output}").code == 130


RUN = ("recipe=smoke", "control=false", "run=one", "student.epochs=2", "train.ema_decay=0.5")


def test_a_run_goes_on_bit_identically_from_the_checkpoint_before_a_damaged_one(kd_train, monkeypatch, tmp_path):
    assert kd_train(*RUN, "output=whole").code == 0
    stopped(kd_train, monkeypatch, "cut", 3, 7)
    student = tmp_path / "cut/smoke/one/student"
    assert updates(student) == ["update-00000003", "update-00000007"]
    spoil(manifest(student, 7).with_name("state.safetensors"))
    done = kd_train(*RUN, "output=cut")
    assert done.code == 0
    assert "update-00000007/state.safetensors: has sha256" in done.out
    assert "student  goes on after update 3 of 10" in done.out
    for name in ("last", "selected"):
        one, two = (tmp_path / d / f"smoke/one/student/{name}.safetensors" for d in ("whole", "cut"))
        assert one.read_bytes() == two.read_bytes()
    curves = []
    for d in ("whole", "cut"):
        lines = map(json.loads, (tmp_path / d / "smoke/one/metrics.jsonl").read_text().splitlines())
        curves.append([{k: v for k, v in line.items() if k != "images_per_second"} for line in lines])
    assert curves[0] == curves[1]


def test_a_damaged_checkpoint_goes_once_the_one_before_it_is_taken(kd_train, monkeypatch, tmp_path):
    stopped(kd_train, monkeypatch, "runs", 3, 7)
    student = tmp_path / "runs/smoke/one/student"
    spoil(manifest(student, 7).with_name("state.safetensors"))
    stopped(kd_train, monkeypatch, "runs", 1)
    assert updates(student) == ["update-00000003", "update-00000004"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_a_checkpoint_that_merely_cannot_be_read_now_is_left_where_it_is(name, number, kd_train, monkeypatch, tmp_path):
    stopped(kd_train, monkeypatch, "runs", 3, 7)
    student = tmp_path / "runs/smoke/one/student"
    opened = io.open

    def failing(path, *arguments, **options):
        if str(path).endswith(f"update-00000007/{name}"):
            raise OSError(number, os.strerror(number))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("io.open", failing)  # Path.open's
        stopped(kd_train, patch, "runs", 1)
    assert updates(student) == ["update-00000003", "update-00000004", "update-00000007"]
    assert "goes on after update 7 of 10" in kd_train(*RUN, "output=runs").out


def test_checkpoints_that_a_kill_left_beside_finished_weights_go(kd_train, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr("kd.checkpoint.store.retire", lambda paths: None)  # killed before it
        assert kd_train(*RUN, "output=runs", "train.save_every=0").code == 0
    left = [next((tmp_path / "runs/teachers").iterdir()), tmp_path / "runs/smoke/one/student"]
    assert all(updates(folder) for folder in left)
    (tmp_path / "runs/smoke/one/result.json").unlink()
    assert kd_train(*RUN, "output=runs").code == 0
    assert not any((folder / "checkpoints").exists() for folder in left)


def test_a_run_whose_checkpoints_are_all_damaged_stops_and_says_what_to_do(kd_train, monkeypatch, tmp_path):
    stopped(kd_train, monkeypatch, "runs", 3, 7)
    student = tmp_path / "runs/smoke/one/student"
    for update in (3, 7):
        spoil(manifest(student, update).with_name("state.safetensors"))
    before = {p: p.read_bytes() for p in student.rglob("*") if p.is_file()}
    done = kd_train(*RUN, "output=runs")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.endswith("; resume=false sets the run aside and trains again\n")
    assert before == {p: p.read_bytes() for p in student.rglob("*") if p.is_file()}
    done = kd_train(*RUN, "output=runs", "resume=false")
    assert done.code == 0
    spoil(tmp_path / "runs/smoke/one/student/last.safetensors")
    (tmp_path / "runs/smoke/one/result.json").unlink()
    done = kd_train(*RUN, "output=runs")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "student/last.safetensors: has sha256" in done.err
    shutil.rmtree(student)
    spoil(next((tmp_path / "runs/teachers").glob("*/last.safetensors")))
    done = kd_train(*RUN, "output=runs")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "; move runs/teachers/" in done.err


def test_a_state_that_does_not_fit_names_what_does_not(kd_train, monkeypatch, tmp_path):
    stopped(kd_train, monkeypatch, "runs", 7)
    student = tmp_path / "runs/smoke/one/student"
    found = checkpoint.load(student, pytest.fail, "")
    whole, selected = found.state, found.selected
    of = {key: json.loads(manifest(student, 7).read_text())[key] for key in ("stage", "run")}
    key, value = next(iter(whole["model"].items()))
    states = whole["optimizer"]["state"]
    other = states[0] | {"exp_avg": torch.zeros(7)}  # of a bias
    changes = {
        f"model: '{key}' is missing": {"model": {k: v for k, v in whole["model"].items() if k != key}},
        "model: 'more' is unknown": {"model": whole["model"] | {"more": value}},
        f"model: '{key}' is torch.float32 (3,), must be": {"model": whole["model"] | {key: torch.zeros(3)}},
        f"model: '{key}' is torch.float64": {"model": whole["model"] | {key: value.double()}},
        "ema is a list": {"ema": []},
        "update is -1": {"update": -1},
        "update is 11": {"update": 11},
        "seconds is nan": {"seconds": float("nan")},
        "optimizer: exp_avg of parameter 0 is (7,)": {"optimizer": whole["optimizer"] | {"state": states | {0: other}}},
        "optimizer: is not a state": {"optimizer": {}},
        "'val_nll'": {"selected": {"epoch": 1, "val_top1": 0.5}},
    }  # fmt: skip
    for said, change in changes.items():
        shutil.rmtree(student / "checkpoints")
        checkpoint.save(student, 7, whole | change, selected, of=of)
        done = kd_train(*RUN, "output=runs")
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert f"does not fit this run ({said}" in done.err
    for each, said in ((None, "is a NoneType"), ({"w": value}, "missing"), ({**selected, key: value[:1]}, "must be")):
        shutil.rmtree(student / "checkpoints")
        checkpoint.save(student, 7, whole, each, of=of)
        assert re.search(f"does not fit this run .selected weights.* {said}", kd_train(*RUN, "output=runs").err)


def test_a_full_disk_stops_a_run_with_one_line(kd_train, monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stopped(kd_train, monkeypatch, "runs", 3)
    with monkeypatch.context() as patch:
        patch.setattr("kd.checkpoint.store.save_file", full)
        done = kd_train(*RUN, "output=runs", "train.save_every=0")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "student/checkpoints/update-00000004: No space left on device; " in done.err
    assert "goes on after update 3 of 10" in kd_train(*RUN, "output=runs").out


def test_verify_of_a_run_looks_at_all_that_it_has(kd_train, tmp_path, capsys):
    assert kd_train(*RUN, "output=runs").code == 0
    folder = tmp_path / "runs/smoke/one"
    assert main(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    for name in ("run.json", "result.json", "student/stage.json", "student/last.safetensors"):
        assert f"whole    {folder / name}" in out
    assert load_file(folder / "student/last.safetensors")
    spoil(folder / "student/selected.safetensors")
    assert main(["verify", str(folder)]) == 1
