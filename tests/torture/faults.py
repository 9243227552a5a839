"""A fault at every system call of a save, a full disk at 20 places of the file: an earlier or the new one loads."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import kd.checkpoint.stage
import kd.checkpoint.tensors
from kd import checkpoint
from kd.checkpoint import CheckpointError
from tests.torture.harness import Part

WATCHED = [(os, name) for name in ("mkdir", "open", "fsync", "close", "rename", "replace", "unlink", "rmdir")]
WATCHED += [(kd.checkpoint.stage, "save_file"), (kd.checkpoint.tensors, "save_file"), (Path, "write_text")]
WRITES = ("save_file", "write_text")
MODES = ("raise before", "raise after", "die before", "die after")
TORN = ("raise torn", "die torn")  # half of a write is done
CALLS = {"first": 28, "third": 28, "finish": 44}  # of one save; each trial counts them anew
DIED = 77


def state(update: int) -> dict:
    """A training state and what it should be when it is read again."""
    generator = torch.Generator().manual_seed(update)
    return {"model": {"w": torch.randn(500, generator=generator)}, "update": update, "list": [1, 2.5, None, "x"]}


def weights(update: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((300,), float(update))}


ABOUT = {"model": "mlp_nano", "num_classes": "10", "label_smoothing": "0.1", "smoothing": "uniform"}


def save(folder: Path, update: int) -> None:
    checkpoint.save(folder, update, state(update), weights(update), ABOUT)


def finish(folder: Path) -> None:
    each = {"last": weights(9), "selected": weights(8)}
    checkpoint.finish(folder, each, ABOUT, {"updates": 9, "seconds": 1.0, "selected": {"epoch": 1}})


def loaded(folder: Path) -> int | None:
    """The update that a run would go on from, after looking at every value of it; None where it would start anew."""
    found = checkpoint.load(folder, lambda text: None, "")
    if found is None:
        return None
    update, now = found.state["update"], state(found.state["update"])
    assert torch.equal(found.state["model"]["w"], now["model"]["w"]), f"other weights at update {update}"
    assert found.state["list"] == now["list"], f"other values at update {update}"
    assert found.selected is not None, f"no selected weights at update {update}"
    assert torch.equal(found.selected["w"], weights(update)["w"]), f"other selected weights at update {update}"
    return update


@contextmanager
def watched(hook: Callable[[str, Callable[[], object], tuple], object]) -> Iterator[None]:
    """Have every system call of a save go through `hook(name, call, arguments)`."""
    with ExitStack() as stack:
        for owner, name in WATCHED:
            stack.enter_context(mock.patch.object(owner, name, _through(hook, name, getattr(owner, name))))
        yield


def _through(hook, name, call):
    def replacement(*arguments, **options):
        return hook(name, lambda: call(*arguments, **options), arguments)

    return replacement


def sequence(act: Callable[[], None]) -> list[str]:
    """The system calls of an act, in order."""
    calls = []

    def hook(name, call, arguments):
        calls.append(name)
        return call()

    with watched(hook):
        act()
    return calls


def fault(act: Callable[[], None], at: int, mode: str) -> str:
    """Do it with a fault at one call; returns what was said."""
    left, said = [at], ""
    verb, when = mode.split()

    def hook(name, call, arguments):
        left[0] -= 1
        if left[0] != -1:
            return call()
        if when in ("after", "torn"):
            with suppress(OSError):  # of a file that was not there
                call()
        if when == "torn":
            path = next(Path(each) for each in arguments if isinstance(each, Path))
            os.truncate(path, path.stat().st_size // 2)
        if verb == "die":
            os._exit(DIED)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with watched(hook):
        try:
            act()
        except CheckpointError as error:
            said = str(error)
            assert "\n" not in said, f"several lines: {said}"
    return said


def in_child(act: Callable[[], None]) -> int:
    """Do it in a forked process; returns its exit code."""
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def scenario(name: str, folder: Path) -> Callable[[], None]:
    """A stage's folder before a save, and the save."""
    shutil.rmtree(folder, ignore_errors=True)
    if name == "first":
        return lambda: save(folder, 1)
    save(folder, 1)
    save(folder, 2)
    return (lambda: save(folder, 3)) if name == "third" else (lambda: finish(folder))


def numbered(i: int) -> tuple[str, int]:
    """The save and the call of a trial; shuffled, so that a few trials hold some of each."""
    plan = [(name, call) for name, calls in CALLS.items() for call in range(calls)]
    return plan[i * 37 % len(plan)]


def faults(i: int, rng: random.Random, folder: Path) -> dict[str, int]:
    name, at = numbered(i)
    stage = folder / f"{i}"
    calls = sequence(scenario(name, stage))
    assert len(calls) == CALLS[name], f"{name}: has {len(calls)} calls now, CALLS says {CALLS[name]}"
    modes = MODES + (TORN if calls[at] in WRITES else ())
    for mode in modes:
        act = scenario(name, stage)
        if mode.startswith("die"):
            code = in_child(partial(fault, act, at, mode))
            assert code == DIED, f"{name}, call {at}, {mode}: exit code {code}"
        else:
            fault(act, at, mode)
        _check(name, stage, f"{name}, call {at} ({calls[at]}), {mode}")
    shutil.rmtree(stage)
    return {"faults": len(modes), "recovered": len(modes)}


def _check(name: str, stage: Path, what: str) -> None:
    """An earlier or the new one is there, and the next save works and leaves nothing half written."""
    if name == "finish" and (stage / "stage.json").exists():
        for each in ("last", "selected"):
            checkpoint.finished(stage / f"{each}.safetensors")
        return
    found = loaded(stage)
    wanted = {"first": (None, 1), "third": (2, 3), "finish": (2,)}[name]
    assert found in wanted, f"{what}: update {found} was loaded"
    save(stage, 4)
    assert loaded(stage) == 4, f"{what}: the next save was lost"
    rest = [path.name for path in stage.rglob(".*")]
    assert not rest, f"{what}: {rest} were left"
    assert len(list((stage / "checkpoints").iterdir())) <= checkpoint.NEWEST, f"{what}: more than two are kept"


def enospc(i: int, rng: random.Random, folder: Path) -> dict[str, int]:
    """The file may grow to i/20 of its size, then there is no room."""
    stage = folder / f"{i}"
    scenario("third", stage)
    state_file = next(stage.glob("checkpoints/*2/state.safetensors"))
    limit = state_file.stat().st_size * i // 20
    reading, writing = os.pipe()

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save(stage, 3)
        except CheckpointError as error:
            os.write(writing, str(error).encode())
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}, not a CheckpointError: {error}".encode())

    assert in_child(act) == 0, f"{limit} bytes: the child died"
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    needed = 500 * 4 + 300 * 4
    path = re.escape(str(stage / "checkpoints" / "update-00000003"))
    expected = rf"cannot write {path}: File too large; {needed:,} bytes needed, [\d,]+ bytes free"
    assert re.fullmatch(expected, said), f"{limit} bytes: {said!r}"
    assert loaded(stage) == 2, f"{limit} bytes: the checkpoint before is not loaded"
    assert not list(stage.rglob(".*")), f"{limit} bytes: something half written is left"
    shutil.rmtree(stage)
    return {"offsets": 1, "previous loads": 1}


PARTS = (
    Part(
        "faults",
        "a fault at every write, fsync and rename of a save: an earlier or the new checkpoint is whole",
        sum(CALLS.values()),
        25,
        faults,
    ),
    Part("enospc", "no room at 20 places: the checkpoint before loads, the message counts bytes", 20, 20, enospc),
)
