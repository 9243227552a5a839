"""Every method trains by its name through the one loop; one test for each promise of kd/methods.py and kd/objective.py."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd import loop, methods, signals
from kd.checkpoint import load_state
from kd.losses.distill import DistillLoss
from kd.losses.method import METHODS, Method, Seen, View
from kd.objective import Objective
from kd.recipe import PACKAGE, ConfigError

EVERY = sorted(methods.names())
# Three stages with maps of 8x8, 4x4 and 2x2, of equal channels in both, which fsp wants; 5 updates an epoch.
SMALL = ("recipe=smoke", "teacher.model=cnn_small", "student.model=cnn_small", "control=false", "run=one")


def curve(folder, stage="student"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage and "loss" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder for many runs, which share a teacher."""
    return tmp_path_factory.mktemp("runs")


# ---- every method


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("kd", "simkd")])
def test_every_method_trains_by_its_name(name, kd_train, runs):
    done = kd_train(*SMALL, f"loss={name}", f"output={runs}", f"name={name}")
    assert done.code == 0, done.err
    values = [line[name] for line in curve(runs / name / "one")]
    assert len(values) == 5
    assert all(value is not None and math.isfinite(value) for value in values)
    assert len(set(values)) == 5
    moved = load_file(runs / name / "one/student/last.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in moved.values())


def test_names_are_read_from_the_source_and_all_of_them_are_found():
    assert set(EVERY) == {name for name, method in methods.library().items() if method.__module__.startswith("kd.")}


def test_the_loop_knows_no_method_by_name():
    for path in (PACKAGE / "loop.py", PACKAGE / "objective.py", PACKAGE / "stages.py", PACKAGE / "results.py"):
        text = re.sub(r'"""|"kd"|kd\.|"hard"', "", path.read_text())
        quoted = set(re.findall(r"[\"'](\w+)[\"']", text))
        assert not quoted & set(EVERY), path
        assert not re.search("|".join(method.__name__ + r"\b" for method in map(METHODS.get, EVERY)), text), path
