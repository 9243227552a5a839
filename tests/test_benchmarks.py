"""The benchmark runs, compares equals with equals, and measures memory right; how fast anything is, no test says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loss, methods, sweep

ROOT = Path(__file__).parent.parent


@pytest.mark.torture
def test_every_row_is_there_and_the_values_compared_are_equal(tmp_path):
    out = tmp_path / "loss.json"
    words = ("--device", "cpu", "--rounds", "1", "--shapes", "6x9", "--dtypes", "float32", "--linear", "20x4x33")
    loss.run([*words, "--no-memory", "--out", str(out)])
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["losses"]}
    assert rows.keys() > {"eager PyTorch", "torch.compile", "timm LogitDistillationTask", "kd DistillLoss"}
    for name, row in rows.items():
        if row["seconds"] and name != "floor: torch.add":
            assert row["loss"] == pytest.approx(rows["eager PyTorch"]["loss"], rel=1e-5)
    assert rows["kd DistillLoss"]["seconds"] > 0
    unfused, ours = result["linear"]
    assert ours["loss"] == pytest.approx(unfused["loss"], rel=1e-5)
    assert ours["difference"] < 1e-5


def test_peak_memory_is_what_is_held_at_once():
    """96 MiB at most at the same time, of 160 in all; a gradient left behind counts as the step's."""
    code = """if True:
        import torch
        from benchmarks import timing

        held = torch.zeros(8 * 2**20, requires_grad=True)  # 32 MiB

        def step():
            held.grad = None
            torch.ones(16 * 2**20).add_(1)  # 64 MiB, gone at once
            held.grad = torch.ones(8 * 2**20)
            torch.ones(16 * 2**20).add_(1)

        print(timing.peak_memory(step, [held], "cpu"))
    """
    # In a process of its own, as `peak_memory_apart` measures: pytest's own memory may take the tensors, or give some.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None\n" or int(done.stdout) / 2**20 == pytest.approx(96, abs=4)


@pytest.mark.torture
def test_every_logit_method_is_measured_against_plain_kd(tmp_path):
    out = tmp_path / "methods.md"
    ratios = methods.run(["--shape", "8x5", "--rounds", "1", "--device", "cpu", "--out", str(out)])
    assert set(ratios) == {methods.PLAIN, *methods.pure()} > {"dkd", "mlkd", "ctkd"}
    assert all(f"| {name} |" in out.read_text() for name in ratios)


@pytest.mark.torture  # a minute: four runs
def test_the_sweep_gives_mean_and_deviation_of_its_runs(capsys, tmp_path):
    tiny = ["teacher.epochs=3", "student.epochs=3", "train.batch_size=900"]
    scores = sweep.run(["--seeds", "2", "--methods", "maxsup", "--output", str(tmp_path), *tiny])
    runs = [json.loads(path.read_text()) for path in (tmp_path / "logit_methods").glob("*/result.json")]
    top1 = {run["student"]["last"]["test"]["top1"] for run in runs}
    assert list(scores) == [sweep.CONTROL, "kd", "maxsup"]
    first, second = (scores["maxsup"][seed]["top1"] for seed in (0, 1))
    assert {first, second} <= top1
    mean, deviation = (first + second) / 2, abs(first - second) / 2**0.5
    assert f"| maxsup | {100 * mean:.2f} ± {100 * deviation:.2f} |" in capsys.readouterr().out
