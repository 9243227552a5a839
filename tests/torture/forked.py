"""``kd.train`` in processes forked from one that has done the imports: a start takes half a second, not five."""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the server starts: its children do not look again
_context = multiprocessing.get_context("forkserver")
OURS = (
    "kd.train",
    "kd.training.pipeline",
    "kd.training.results",
    "kd.training.dry_run",
    "kd.losses.kernels.cpu_kernel",
)
OTHERS = ("hydra", "sklearn.datasets", "torchvision.transforms.v2")
_context.set_forkserver_preload([*OURS, *OTHERS])
WALL_CLOCK = ("seconds", "images_per_second")
LONGEST = 240  # seconds that a run of a test may take


def nothing() -> None:
    """The hook of a run that is let alone."""


def _run(words: tuple[str, ...], folder: Path, environment: dict[str, str], log: str, hook: Callable[[], None]) -> None:
    os.setsid()  # a group of its own, to be killed as one
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from kd import train
    from kd.cli.errors import one_line_errors
    from kd.runtime import signals

    multiprocessing.set_start_method(None, force=True)  # data workers are then forked, as where a user runs kd
    sys.argv = ["kd.train", *words]
    hook()
    signals.listen()
    with one_line_errors("kd.train"):
        sys.exit(train.main(words))


def start(
    *words: str, folder: Path, hook: Callable[[], None] = nothing, processes: int = 1, log: str = "log.txt"
) -> list[ForkServerProcess]:
    """Begin a run in `folder`; what it prints goes to LOG, and LOG.1 for a second process. `hook` is called first."""
    folder.mkdir(parents=True, exist_ok=True)
    several = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    several |= {"MASTER_PORT": str(_free_port())} if processes > 1 else {}
    started = []
    for rank in range(processes):
        environment = {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        arguments = (words, folder, environment, f"{log}.{rank}" if rank else log, hook)
        started.append(_context.Process(target=_run, args=arguments))
        (folder / arguments[3]).touch()
        started[-1].start()
        atexit.register(kill, started[-1], signal.SIGKILL)  # whatever fails: they would be waited for
    return started


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finish(started: list[ForkServerProcess], seconds: float = LONGEST) -> list[int]:
    """Wait for all processes of a run; their exit codes, -9 where killed."""
    until = time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
    late = [process for process in started if process.exitcode is None]
    for process in late:
        kill(process, signal.SIGKILL)
        process.join()
    assert not late, f"{len(late)} of {len(started)} processes did not end within {seconds:.0f} s"
    return [process.exitcode for process in started]  # type: ignore[misc]


def kill(process: ForkServerProcess, signum: int) -> None:
    """A signal to everything that a process of a run has started, itself included."""
    assert process.pid is not None
    if process.exitcode is not None:  # its number may be another's by now
        return
    for send in (os.killpg, os.kill):  # before it has a group of its own
        with contextlib.suppress(ProcessLookupError):
            send(process.pid, signum)
            return


def whole(*words: str, **options) -> None:
    """A run from beginning to end. Raises AssertionError with what it printed where it fails."""
    codes = finish(start(*words, **options))
    log = options["folder"] / options.get("log", "log.txt")
    assert not any(codes), f"exit codes {codes}: {log.read_text()[-2000:]}"


def outcome(output: Path) -> dict[str, object]:
    """All that a run leaves, without what a clock says: weights as bytes, lines of metrics, the result."""
    found: dict[str, object] = {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*.safetensors")}
    for path in output.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(output))] = [timeless(line) for line in lines]
    for path in [*output.rglob("result.json"), *output.rglob("stage.json")]:
        values = json.loads(path.read_text())
        values.pop("sha256", None)  # a manifest's own: of a clock's values too
        found[str(path.relative_to(output))] = timeless(values)
    return found


def timeless(tree):
    """Plain values without those of a clock, and without the provenance."""
    if not isinstance(tree, dict):
        return tree
    return {k: timeless(v) for k, v in tree.items() if k not in (*WALL_CLOCK, "provenance", "weights")}


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in the outcomes of two runs, by name."""
    a, b = outcome(one), outcome(other)
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
