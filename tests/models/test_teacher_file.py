"""teacher.checkpoint=: a file that cannot be used is refused, by its setting, before anything is written."""

import builtins
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kd.cli import errors
from kd.models.factory import build
from kd.training import pipeline as stages
from kd.training import run as claim

RUN = ("recipe=smoke", "control=false", "run=one", "output=runs")


@pytest.fixture(scope="module")
def weights():
    return build("mlp_wide", num_classes=10, input_shape=(1, 8, 8)).state_dict()


def refused(kd_train, path: str) -> str:
    done = kd_train(*RUN, f"teacher.checkpoint={path}")
    assert (done.code, done.err.count("\n")) == (errors.USAGE, 1), done.err
    assert done.err.startswith(f"error: teacher.checkpoint={path}: ")
    assert not Path("runs").exists()
    return done.err


@pytest.mark.parametrize(
    "record",
    ["[1]", json.dumps({"label_smoothing": "-5", "smoothing": "uniform"}), json.dumps({"label_smoothing": "0.1"})],
)
def test_metadata_that_kd_never_writes_is_found_before_the_teacher_is_tried(record, weights, kd_train, monkeypatch):
    save_file(weights, "w.safetensors", {"kd": record})
    monkeypatch.setattr(stages, "predict", lambda *_: pytest.fail("worked before it looked"))
    assert "metadata" in refused(kd_train, "w.safetensors")


def test_a_file_that_may_not_be_read_names_its_setting(weights, kd_train, monkeypatch):
    save_file(weights, "w.safetensors")
    opened = builtins.open

    def closed(path, *arguments, **options):
        if str(path).endswith("w.safetensors"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr("io.open", closed)  # Path.open's
    assert "cannot be read (Permission denied)" in refused(kd_train, "w.safetensors")


def test_a_large_file_that_is_none_is_not_read_to_its_end(kd_train, monkeypatch):
    with open("w.safetensors", "wb") as file:
        os.truncate(file.fileno(), 2**40)
    monkeypatch.setattr(claim, "digest", lambda path: pytest.fail("read all of it"))
    assert "not a readable .safetensors file" in refused(kd_train, "w.safetensors")


def test_sparse_tensors_are_refused(weights, kd_train):
    name = next(key for key, value in weights.items() if value.ndim == 2)
    torch.save(weights | {name: weights[name].to_sparse()}, "w.pth")
    assert f"{name} is a torch.sparse_coo tensor, must be a dense one" in refused(kd_train, "w.pth")
