"""The benchmark runs, compares equals with equals, and measures memory right; how fast anything is, no test says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LOSSES = [
    "eager PyTorch",
    "torch.compile",
    "timm LogitDistillationTask",
    "torchdistill KDLoss",
    "Liger CE + KL",
    "kd DistillLoss",
    "floor: torch.add",
]


def benchmark(*arguments):
    command = [sys.executable, "-m", "benchmarks.loss", "--device", "cpu", "--rounds", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import timing

    return timing


@pytest.mark.torture
def test_every_row_is_there_and_the_values_compared_are_equal(tmp_path):
    out = tmp_path / "loss.json"
    done = benchmark(
        *("--shapes", "6x9", "--dtypes", "float32", "--linear", "20x4x33", "--no-memory", "--out", str(out))
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["losses"]}
    assert list(rows) == LOSSES
    assert all(name in done.stdout for name in rows)
    for name, row in rows.items():
        if row["seconds"] is None:
            assert row["note"].startswith(("not installed: pip install", "GPU only", "failed: "))
            assert name in LOSSES[1:5]
        elif name != "floor: torch.add":
            assert row["loss"] == pytest.approx(rows["eager PyTorch"]["loss"], rel=1e-5)
            assert row["speedup"] > 0
            assert row["floor"] > 0
    assert rows["timm LogitDistillationTask"]["seconds"] > 0
    assert rows["kd DistillLoss"]["note"] in ("cpu", "reference")
    unfused, ours = result["linear"]
    assert ours["loss"] == pytest.approx(unfused["loss"], rel=1e-5)
    assert ours["difference"] < 1e-5
    assert result["setup"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "8x"), "--shapes: '8x': must be NxK, whole numbers ≥ 1"),
        (("--rounds", "0"), "--rounds: '0': must be a whole number ≥ 1"),
    ],
)
def test_a_bad_option_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import loss

    with pytest.raises(SystemExit) as stop:
        loss.run(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_peak_memory_is_what_is_held_at_once(timing):
    """96 MiB at most at the same time, of 160 in all; a gradient left behind counts as the step's."""
    held = torch.zeros(8 * 2**20, requires_grad=True)  # 32 MiB

    def step():
        held.grad = None
        torch.ones(16 * 2**20).add_(1)  # 64 MiB, gone at once
        held.grad = torch.ones(8 * 2**20)
        torch.ones(16 * 2**20).add_(1)

    peak = timing.peak_memory(step, [held], "cpu")
    assert peak is None or peak / 2**20 == pytest.approx(96, abs=4)


@pytest.mark.torture
def test_peak_memory_in_a_process_of_its_own(timing):
    """The floor makes one tensor."""
    case = (1024, 4096, "float32", "cpu")
    peak, failed = timing.peak_memory_apart("floor: torch.add", [case, ("no", "case")], threads=1)
    assert failed is None
    assert peak is None or peak / 2**20 == pytest.approx(16, abs=1)


def test_quartiles(timing):
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert timing.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)


@pytest.mark.torture
def test_every_logit_method_is_measured_against_plain_kd(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import methods

    out = tmp_path / "methods.md"
    ratios = methods.run(["--shape", "8x5", "--rounds", "1", "--device", "cpu", "--out", str(out)])
    assert ratios[methods.PLAIN] == 1
    assert set(ratios) == {methods.PLAIN, *methods.pure()}
    assert {"dkd", "mlkd", "ctkd", "online_label_smoothing"} <= set(ratios)
    assert not {"rkd", "crd", "dml", "at"} & set(ratios)
    assert all(f"| {name} |" in out.read_text() for name in ratios)


def test_plain_kd_of_the_benchmark_is_the_method(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import methods
    from benchmarks.contenders import Case
    from kd.losses.methods.base import METHODS

    case = Case(6, 5, "float32", "cpu")
    assert float(methods.plain(case)()) == pytest.approx(float(methods.step(METHODS["kd"](), case)()), rel=1e-5)


@pytest.mark.torture  # a minute: six runs
def test_the_sweep_gives_mean_and_deviation_of_its_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import sweep

    words = ["--seeds", "2", "--methods", "maxsup", "ttm", "--output", str(tmp_path)]
    tiny = ["teacher.epochs=3", "student.epochs=3", "train.batch_size=900"]
    scores = sweep.run([*words, *tiny])
    runs = [json.loads(path.read_text()) for path in (tmp_path / "logit_methods").glob("*/result.json")]
    assert len(runs) == 6
    assert len(list((tmp_path / "teachers").iterdir())) == 2  # one a seed
    controls = {run["provenance"]["seed"]: run["control"]["last"]["test"]["top1"] for run in runs if "control" in run}
    out = capsys.readouterr().out
    for name in ("kd", "maxsup", "ttm"):
        found = [scores[name][seed]["top1"] for seed in (0, 1)]
        assert all(any(run["student"]["last"]["test"]["top1"] == top1 for run in runs) for top1 in found)
        mean, half = sum(found) / 2, abs(found[0] - found[1]) / 2**0.5  # the deviation of two
        gain = [100 * (found[seed] - controls[seed]) for seed in (0, 1)]
        assert f"| {name} | {100 * mean:.2f} ± {100 * half:.2f} | {sum(gain) / 2:.2f} ± " in out
    assert list(scores) == [sweep.CONTROL, "kd", "maxsup", "ttm"]
    assert scores[sweep.CONTROL][1]["top1"] == controls[1]
    assert "2 seeds, mean ± sd" in out
    with pytest.raises(SystemExit, match="labels alone has 2 of 3 results"):
        sweep.gather(tmp_path / "logit_methods", ["kd", "ttm"], 3)
    shutil.copytree(next((tmp_path / "logit_methods").iterdir()), tmp_path / "logit_methods" / "again")
    with pytest.raises(SystemExit, match=r"two runs of \w+ with seed \d, of different settings"):
        sweep.gather(tmp_path / "logit_methods", ["kd", "ttm", "maxsup"], 2)
