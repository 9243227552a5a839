"""Runs on damaged, foreign and unwritable checkpoints: they go on bit for bit, or stop with one line."""

import errno
import json
import os
import shutil

import pytest
import torch

from kd.checkpoint import store
from kd.training import loop
from kd.training import pipeline as stages
from kd.verify import main
from tests.checkpoint.test_store import damage, manifest, updates

RUN = ("recipe=smoke", "control=false", "run=one", "student.epochs=2", "train.ema_decay=0.5")


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


def one_line(done, *parts: str) -> None:
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    for part in parts:
        assert part in done.err


def test_a_run_goes_on_bit_identically_from_the_checkpoint_before_a_damaged_one(kd_train, monkeypatch, tmp_path):
    assert kd_train(*RUN, "output=whole").code == 0
    stopped(kd_train, monkeypatch, "cut", 3, 7)
    student = tmp_path / "cut/smoke/one/student"
    assert updates(student) == ["update-00000003", "update-00000007"]
    damage(manifest(student, 7).with_name("state.safetensors"))
    done = kd_train(*RUN, "output=cut")
    assert done.code == 0
    assert "update-00000007/state.safetensors: is damaged" in done.out
    assert "student  goes on after update 3 of 10" in done.out
    for name in ("last", "selected"):
        one, two = (tmp_path / d / f"smoke/one/student/{name}.safetensors" for d in ("whole", "cut"))
        assert one.read_bytes() == two.read_bytes()
    curves = []
    for d in ("whole", "cut"):
        lines = map(json.loads, (tmp_path / d / "smoke/one/metrics.jsonl").read_text().splitlines())
        curves.append([{k: v for k, v in line.items() if k != "images_per_second"} for line in lines])
    assert curves[0] == curves[1]


def test_checkpoints_that_a_kill_left_beside_finished_weights_go(kd_train, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        for module in ("checkpoint.store", "training.run"):  # killed before it
            patch.setattr(f"kd.{module}.remove", lambda path: None)
        assert kd_train(*RUN, "output=runs", "train.save_every=0").code == 0
    left = [next((tmp_path / "runs/teachers").glob("mlp*")), tmp_path / "runs/smoke/one/student"]
    assert all(updates(folder) for folder in left)
    (tmp_path / "runs/smoke/one/result.json").unlink()
    assert kd_train(*RUN, "output=runs").code == 0
    assert not any((folder / "checkpoints").exists() for folder in left)


def test_a_run_whose_checkpoints_are_all_damaged_stops_and_says_what_to_do(kd_train, monkeypatch, tmp_path):
    stopped(kd_train, monkeypatch, "runs", 3, 7)
    student = tmp_path / "runs/smoke/one/student"
    for update in (3, 7):
        damage(manifest(student, update).with_name("state.safetensors"))
    before = {p: p.read_bytes() for p in student.rglob("*") if p.is_file()}
    done = kd_train(*RUN, "output=runs")
    one_line(done, "no checkpoint in ", "; resume=false sets the run aside and trains again\n")
    assert before == {p: p.read_bytes() for p in student.rglob("*") if p.is_file()}
    assert kd_train(*RUN, "output=runs", "resume=false").code == 0
    damage(tmp_path / "runs/smoke/one/student/last.safetensors")
    (tmp_path / "runs/smoke/one/result.json").unlink()
    one_line(kd_train(*RUN, "output=runs"), "student/last.safetensors: is damaged, has sha256")
    shutil.rmtree(student)
    damage(next((tmp_path / "runs/teachers").glob("*/last.safetensors")))
    one_line(kd_train(*RUN, "output=runs"), "; move runs/teachers/")


def test_a_state_that_does_not_fit_is_one_line(kd_train, monkeypatch, tmp_path):
    """As of a network whose parameters another version of timm names otherwise."""
    stopped(kd_train, monkeypatch, "runs", 7)
    student = tmp_path / "runs/smoke/one/student"
    checkpoint = store.load(student, pytest.fail)
    owner = {key: json.loads(manifest(student, 7).read_text())[key] for key in ("stage", "run")}
    key, value = next(iter(checkpoint.state["model"].items()))
    changes = {
        "Missing key": {"model": {k: v for k, v in checkpoint.state["model"].items() if k != key}},
        "size mismatch": {"model": checkpoint.state["model"] | {key: torch.cat([value, value])}},
        "'param_groups'": {"optimizer": {}},
    }
    for said, change in changes.items():
        shutil.rmtree(student / "checkpoints")
        store.save(student, 7, checkpoint.state | change, checkpoint.selected, owner=owner)
        one_line(kd_train(*RUN, "output=runs"), "does not fit this run", said)


def test_a_full_disk_stops_a_run_with_one_line(kd_train, monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stopped(kd_train, monkeypatch, "runs", 3)
    with monkeypatch.context() as patch:
        patch.setattr("kd.checkpoint.store.save_file", full)
        done = kd_train(*RUN, "output=runs", "train.save_every=0")
    one_line(done, "student/checkpoints/update-00000004: No space left on device")
    assert "goes on after update 3 of 10" in kd_train(*RUN, "output=runs").out


# ---- files of another run


def test_weights_of_another_stage_or_run_are_refused(kd_train, monkeypatch, tmp_path):
    for seed in (0, 5):
        assert kd_train("recipe=smoke", "output=runs", f"run=s{seed}", f"seed={seed}").code == 0
    (tmp_path / "runs").rename(tmp_path / "moved")  # a whole output directory may move
    run, other = tmp_path / "moved/smoke/s0", tmp_path / "moved/smoke/s5"
    words = ("recipe=smoke", "output=moved", "run=s0")
    (run / "result.json").unlink()
    assert kd_train(*words).code == 0
    assert main([f"run={run}"]) == main([f"run={tmp_path / 'moved/teachers'}"]) == 0
    (run / "result.json").unlink()
    student = run / "student"
    student.rename(run / "own")

    def refused(*parts: str) -> None:
        with monkeypatch.context() as patch:
            for name in ("find_teacher", "train"):
                patch.setattr(stages, name, lambda *_: pytest.fail("worked before it looked"))
            one_line(kd_train(*words), *parts)

    shutil.copytree(run / "control", student)
    refused("student/stage.json: is of stage control, run ", ", must be of stage student, run ")
    shutil.rmtree(student)
    shutil.copytree(other / "student", student)
    refused("student/stage.json: is of stage student, run ", "; restore")
    shutil.rmtree(student)
    (run / "own").rename(student)
    first, second = sorted((tmp_path / "moved/teachers").glob("mlp*"), key=lambda f: (f / "stage.json").stat().st_mtime)
    shutil.rmtree(first)
    shutil.copytree(second, first)
    one_line(kd_train(*words), f"is of stage teacher, run {second.name}, must be of stage teacher, run {first.name}")
