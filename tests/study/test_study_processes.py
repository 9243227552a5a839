"""A study as a process of its own: launchers, a stop by SIGTERM, and a kill by SIGKILL."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kd.config.schema import PACKAGE
from kd.study import load
from kd.training import loop

LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "study", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm", ["hydra.launcher.timeout_min=5"]),
    "ray": ("hydra_plugins.hydra_ray_launcher", "ray", ["+hydra.launcher.ray.init.num_cpus=2"]),
}
SMALL = ["study.seeds=1", "loss.student_temperature=1", "study.contrasts=[]"]
WILD = Path("wild/studies/tiny")


def start(*words: str) -> subprocess.Popen:
    paths = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "kd.study", "recipe=studies/tiny", "output=wild", *words]
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen, pattern: str, count: int = 1) -> None:
    while process.poll() is None and len(list(WILD.glob(pattern))) < count:
        time.sleep(0.02)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "popen_loky" in " ".join(child.cmdline())]


def same_tables() -> bool:
    return (WILD / "table.csv").read_bytes() == Path("calm/studies/tiny/table.csv").read_bytes()


@pytest.mark.torture
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_makes_the_table_of_a_serial_study(launcher, kd_study):
    module, extra, words = LAUNCHERS[launcher]
    if importlib.util.find_spec(module.partition(".")[0]) is None or importlib.util.find_spec(module) is None:
        pytest.skip(f"hydra/launcher={launcher} needs pip install 'kd-torch[{extra}]'")
    assert kd_study(*SMALL, "output=calm").code == 0
    process = start(*SMALL, f"hydra/launcher={launcher}", *words)
    said = process.communicate(timeout=250)[1]
    assert process.returncode == 0, said
    assert len(load(WILD)) == 8  # 2 teachers, 4 students, 2 controls
    assert same_tables()


def test_an_unknown_launcher_is_one_line(kd_study):
    done = kd_study(launcher="sge")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "hydra/launcher" in done.err


@pytest.mark.parametrize(
    ("engine", "launcher"),
    [
        ("runs", ["hydra/launcher=basic"]),
        pytest.param("runs", ["hydra.launcher.n_jobs=2"], marks=pytest.mark.torture),
        pytest.param("population", ["hydra.launcher.n_jobs=2"], marks=pytest.mark.torture),
    ],
)
def test_a_stopped_study_takes_its_workers_along_and_resumes_to_the_same_table(engine, launcher, kd_study, monkeypatch):
    """SIGTERM to the command alone. A run of kd.train saves before it leaves, although no save was due."""
    words = [*SMALL, "loss.temperature=4", "teacher.label_smoothing=0", f"study.engine={engine}", "study.controls=[]"]
    # Students of 40 epochs may end while the signal is on its way to joblib's workers.
    words += ["teacher.epochs=1", f"student.epochs={40 if 'basic' in launcher[0] else 120}", "train.save_every=1000"]
    assert kd_study("output=calm", *words).code == 0
    process = start(*words, *launcher)
    wait_for(process, "points/*.json" if engine == "population" else "runs/*/metrics.jsonl")
    workers = workers_of(process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert said.splitlines()[-1].endswith("; run the same command to go on"), said
    points = [json.loads(path.read_text()) for path in (WILD / "points").glob("*.json")]
    assert {point["state"] for point in points} == {"finished"}
    assert len(points) < len(list(Path("calm/studies/tiny/points").glob("*.json")))
    saved = {path.parents[1].resolve(): int(path.name.split("-")[1]) for path in WILD.glob("runs/*/*/checkpoints/*-*")}
    assert (engine == "runs") == bool(saved)
    begun: dict[Path, int] = {}  # the update that each stage made first
    update = loop.Trainer._update

    def noted(self, batches):
        begun.setdefault(self.directory.resolve(), self.progress.update)
        return update(self, batches)

    monkeypatch.setattr(loop.Trainer, "_update", noted)
    assert kd_study("output=wild", *words).code == 0
    assert {directory: first for directory, first in begun.items() if first} == saved  # all others from the beginning
    assert same_tables()
    assert bool(workers) == ("basic" not in launcher[0])
    assert not [each for each in workers if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.torture
def test_a_killed_study_resumes_to_the_same_table(kd_study):
    """SIGKILL to the whole process group."""
    assert kd_study("output=calm").code == 0
    process = start()
    wait_for(process, "points/*.json", 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    written = {path: path.read_bytes() for path in (WILD / "points").glob("*.json")}
    assert written
    assert kd_study("output=wild").code == 0
    assert {path: path.read_bytes() for path in written} == written  # none was made twice
    assert same_tables()


@pytest.mark.torture
def test_workers_do_not_outlive_a_killed_command(kd_study):
    # One job for each of two workers: one without work ends after joblib's 300 s.
    words = ["study.seeds=2", "study.contrasts=[]", "study.engine=population", "teacher.epochs=1000000"]
    process = start(*words, "hydra.launcher.n_jobs=2")
    workers: list[psutil.Process] = []
    try:
        wait_for(process, "jobs/.teachers-*.lock", 2)
        workers = workers_of(process)
        assert workers
        process.kill()
        process.wait()
        assert not psutil.wait_procs(workers, timeout=30)[1]
    finally:
        for each in [process, *psutil.wait_procs(workers, timeout=0)[1]]:
            each.kill()
        process.communicate()


def test_workers_know_the_networks_that_the_command_line_imports(kd_study):
    """joblib's are processes of their own. A network of one's own trains alone, not in a population."""
    Path("mine.py").write_text(
        "from torch import nn\n\n\ndef ten():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    process = start(*SMALL, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "student.model=mine.py:ten")
    said = process.communicate(timeout=250)[1]
    assert process.returncode == 0, said
    assert len(load(WILD)) == 8
