"""The same study on local processes, through submitit and on Ray: Hydra's launchers, which need their extras."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd.config.schema import PACKAGE
from kd.study import load

LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "study", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm", ["hydra.launcher.timeout_min=5"]),
    "ray": ("hydra_plugins.hydra_ray_launcher", "ray", ["+hydra.launcher.ray.init.num_cpus=2"]),
}


def missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_study_of_eight_points_runs_through(launcher, kd_study, tmp_path):
    """As a command of its own: launchers start processes that import what runs. The table is that of a serial run."""
    module, extra, words = LAUNCHERS[launcher]
    if missing(module):
        pytest.skip(f"hydra/launcher={launcher} needs pip install 'kd-torch[{extra}]'")
    grid = ["loss.student_temperature=1", "study.seeds=1", "study.contrasts=[]"]  # 2 teachers, 4 students, 2 controls
    assert kd_study(*grid, "output=serial").code == 0
    command = [sys.executable, "-m", "kd.study", "recipe=studies/tiny", *grid, f"hydra/launcher={launcher}", *words]
    paths = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert len(load("checkpoints/studies/tiny")) == 8
    tables = [Path(output) / "studies" / "tiny" / "table.csv" for output in ("serial", "checkpoints")]
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_an_unknown_launcher_is_one_line(kd_study):
    done = kd_study(launcher="sge")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "hydra/launcher" in done.err
