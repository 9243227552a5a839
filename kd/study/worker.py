"""The process that a launcher starts: trains the points of one job and writes them."""

import multiprocessing
import os
import signal
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from kd.runtime import signals
from kd.runtime.own_code import import_file, imported_files
from kd.runtime.provenance import provenance
from kd.study import train_population, train_single
from kd.study.folder import Folder
from kd.study.jobs import Job
from kd.text import first_line

TRAINERS = {"population": train_population, "runs": train_single}  # by engine


def work(config: Any) -> None:
    """Do the job that the config names; Hydra's launchers call it in whatever process they have."""
    for path in {*config.imports} - {*map(str, imported_files())}:  # what the command line had its process import
        import_file(path)
    folder, name = Folder(Path(config.study)), str(config.job)
    if _is_of_joblib():
        _end_with_command()
        signals.listen(*signals.PREEMPTION, leaving=lambda: os._exit(0))  # in silence: the command speaks for all
    try:
        with folder.lock(name):  # a worker of a killed command may still be at it
            job = Job.read(folder, name)
            if not all(folder.is_finished(point) for point in job.points):
                do(folder, job)
    except signals.Interrupted:  # the state is saved
        if _is_of_joblib():  # which would keep this process idle, while the command waits for its end
            os._exit(0)
        raise


def _is_of_joblib() -> bool:
    return multiprocessing.current_process().name.startswith("Loky")


@cache
def _end_with_command() -> None:
    """Stop this worker, as by SIGTERM, once the command that started it has ended, even by SIGKILL.

    Otherwise joblib's workers finish their job first, and idle ones wait for 300 s.
    """
    command = os.getppid()

    def watch() -> None:
        while os.getppid() == command:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def do(folder: Folder, job: Job) -> None:
    """Train a job's points. An error is written into each unfinished point and stops no other job."""
    about = provenance(1) | {"engine": job.engine, "job": job.name}
    try:
        # The others wait, as missing points, for the command that trains their teacher.
        ready = [point for point in job.points if not point.teacher or folder.weights(point.teacher).exists()]
        for point, outcome in TRAINERS[job.engine].train(folder, ready) if ready else ():
            folder.write_point(point, outcome, about)
    except Exception as error:  # of a user's method, of a full disk, of ours: the other jobs go on
        for point in job.points:
            folder.write_point(point, {"error": first_line(error)}, about)
