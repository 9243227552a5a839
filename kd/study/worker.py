"""The process that a launcher starts: runs one job of a study and writes its points."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from kd.runtime import signals
from kd.runtime.provenance import provenance
from kd.study.folder import Folder
from kd.study.jobs import Job


def work(config: Any) -> None:
    """What Hydra's launchers call, in whatever process: do the job that the config names."""
    folder = Folder(Path(config.study))
    name = str(config.job)
    _end_with_command()
    try:
        with signals.listening(), folder.lock(name, wait=True):  # an orphan of a killed command may still be at it
            job = Job.read(folder, name)
            if not all(folder.is_finished(point) for point in job.points):
                _do(folder, job)
    except signals.Interrupted:  # its state is saved
        if _is_of_joblib():  # who would keep it idle, while the command waits for its end
            os._exit(0)
        raise


def _is_of_joblib() -> bool:
    return multiprocessing.current_process().name.startswith("Loky")  # others are their launcher's affair


@cache
def _end_with_command() -> None:
    """Have a worker of joblib's stop, as by SIGTERM, once the command that started it is no more, however it ended.

    One that never had a job ends after joblib's own 300 s.
    """
    command = os.getppid()

    def watch() -> None:
        while os.getppid() == command:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if _is_of_joblib():
        threading.Thread(target=watch, daemon=True).start()


def _do(folder: Folder, job: Job) -> None:
    """Train the points; whatever goes wrong is written down for each, and nothing else stops."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    seen = provenance(1) | {"engine": job.engine, "job": job.name}
    try:
        if job.engine == "population":
            from kd.study.train_population import train
        else:
            from kd.study.train_single import train
        for point, outcome in train(folder, job):
            folder.write_point(point, {**outcome, "provenance": seen | {"seconds": outcome.pop("seconds", None)}})
    except Exception as error:  # of user code, of a full disk, of us: the study goes on without these points
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for point in job.points:
            folder.write_point(point, {"error": text, "provenance": seen | {"seconds": None}})
