"""A fault at every system call of a save, a full disk at 20 places of the file: an earlier or the new one loads."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from unittest import mock

import timm.models  # noqa: F401 (else each child would)
import torch
from safetensors.torch import save as safetensors_bytes

import kd.checkpoint.safetensors_io
import kd.checkpoint.store
from kd.checkpoint import store
from kd.errors import CheckpointError
from tests.torture import harness
from tests.torture.harness import Part

NAMES = ("mkdir", "open", "ftruncate", "write", "fsync", "close", "rename", "replace", "unlink", "rmdir")
WATCHED = [*((os, name) for name in NAMES), (Path, "write_bytes")]
WRITES = ("write", "write_bytes")
MODES = ("die after", "raise before", "raise torn", "die torn", "raise after", "die before")  # torn: half of a write
PIECES = 3
SAVES = ("third", "first", "damaged", "finish")
DIED = 77
NEW_MOUNTS, NEW_USER, PRIVATE = 0x20000, 0x10000000, 0x44000  # of linux/sched.h and sys/mount.h; private, recursive
PAGE = resource.getpagesize()
MORE = 40 * PAGE // 4  # numbers in a state, for the disk to be full within


def state(update: int) -> dict:
    """A training state and what it should be when it is read again."""
    generator = torch.Generator().manual_seed(update)
    return {"model": {"w": torch.randn(500, generator=generator)}, "update": update, "list": [1, 2.5, None, "x"]}


def weights(update: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((300,), float(update))}


ABOUT = {"model": "mlp_nano", "num_classes": "10", "label_smoothing": "0.1", "smoothing": "uniform"}


def save(folder: Path, update: int) -> None:
    store.save(folder, update, state(update), weights(update), ABOUT)


def finish(folder: Path) -> None:
    each = {"last": weights(9), "selected": weights(8)}
    store.finish(folder, each, ABOUT, {"updates": 9, "seconds": 1.0, "selected": {"epoch": 1}})


def loaded(folder: Path) -> int | None:
    """The update that a run would go on from, after looking at every value of it; None where it would start anew."""
    found = store.load(folder, lambda text: None)
    if found is None:
        return None
    update, now = found.state["update"], state(found.state["update"])
    assert torch.equal(found.state["model"]["w"], now["model"]["w"]), f"other weights at update {update}"
    assert found.state["list"] == now["list"], f"other values at update {update}"
    assert found.selected is not None, f"no selected weights at update {update}"
    assert torch.equal(found.selected["w"], weights(update)["w"]), f"other selected weights at update {update}"
    return update


def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """The same file by the same calls as of safetensors, which makes them from Rust, where no fault can be put in: the
    file gets its whole length first, so that one whose writing was cut short is as long as a whole one.
    """
    raw = safetensors_bytes(tensors, metadata)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.ftruncate(descriptor, len(raw))
        for i in range(PIECES):
            os.write(descriptor, raw[len(raw) * i // PIECES : len(raw) * (i + 1) // PIECES])
    finally:
        os.close(descriptor)


@contextmanager
def watched(hook: Callable[[str, Callable[[], object], tuple], object]) -> Iterator[None]:
    """Have every system call of a save go through `hook(name, call, arguments)`."""
    with ExitStack() as stack:
        for module in (kd.checkpoint.store, kd.checkpoint.safetensors_io):
            stack.enter_context(mock.patch.object(module, "save_file", save_file))
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
        if when == "after" or (name == "write_bytes" and when == "torn"):
            with suppress(OSError):  # of a file that was not there
                call()
        if when == "torn" and name == "write":
            descriptor, raw = arguments
            os.pwrite(descriptor, raw[: len(raw) // 2], os.lseek(descriptor, 0, os.SEEK_CUR))
        elif when == "torn":
            os.truncate(arguments[0], arguments[0].stat().st_size // 2)
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
        with suppress(BaseException):
            act()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def scenario(name: str, folder: Path) -> Callable[[], None]:
    """A stage's folder before a save, and the save."""
    shutil.rmtree(folder, ignore_errors=True)
    if name == "first":
        return lambda: save(folder, 1)
    save(folder, 1)
    save(folder, 2)
    if name == "damaged":
        loaded(folder)  # the first time it imports
        raw = (path := next(folder.glob("checkpoints/*2/state.safetensors"))).read_bytes()
        path.write_bytes(bytes(len(raw) // 2) + raw[len(raw) // 2 :])
        return lambda: go_on(folder)
    return (lambda: save(folder, 3)) if name == "third" else (lambda: finish(folder))


def go_on(folder: Path) -> None:
    """What a run does that finds its newest checkpoint damaged, up to its next one."""
    found = store.load(folder, lambda text: None)
    assert found is not None
    store.clean(folder)
    save(folder, 3)


def faults(i: int, rng: random.Random, folder: Path) -> dict[str, int]:
    """One kind of fault at every call of one save."""
    mode, name = MODES[i // len(SAVES)], SAVES[i % len(SAVES)]
    stage, tried = folder / f"{i}", 0
    for at, call in enumerate(sequence(scenario(name, stage))):
        if mode.endswith("torn") and call not in WRITES:
            continue
        act = scenario(name, stage)
        if mode.startswith("die"):
            code = in_child(partial(fault, act, at, mode))
            assert code == DIED, f"{name}, call {at}, {mode}: exit code {code}"
        else:
            fault(act, at, mode)
        _check(name, stage, f"{name}, call {at} ({call}), {mode}")
        tried += 1
    shutil.rmtree(stage)
    return {"faults": tried}


def _check(name: str, stage: Path, what: str) -> None:
    """An earlier or the new one is there, and the next save works and leaves nothing half written."""
    if name == "finish" and (stage / "stage.json").exists():
        for each in ("last", "selected"):
            store.finished(stage / f"{each}.safetensors")
        return
    found = loaded(stage)
    wanted = {"first": (None, 1), "third": (2, 3), "damaged": (1, 3), "finish": (2,)}[name]
    assert found in wanted, f"{what}: update {found} was loaded"
    save(stage, 4)
    assert loaded(stage) == 4, f"{what}: the next save was lost"
    rest = [path.name for path in stage.rglob(".*")]
    assert not rest, f"{what}: {rest} were left"
    kept = len(list((stage / "checkpoints").iterdir()))
    assert kept <= store.NEWEST + (name == "damaged"), f"{what}: {kept} are kept"


def small_disk(folder: Path, size: int) -> bool:
    """Mount a file system of so many bytes that only this process sees; False where the kernel does not let us."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS) and libc.unshare(NEW_USER | NEW_MOUNTS):
        return False
    return not (
        libc.mount(b"none", b"/", None, PRIVATE, None)
        or libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())
    )


def large(folder: Path, update: int) -> None:
    """A checkpoint of many pages, of which a file system counts whole ones."""
    store.save(folder, update, state(update) | {"more": torch.zeros(MORE)}, weights(update), ABOUT)


def fill(stage: Path, i: int) -> dict[str, object]:
    """In a process of its own: two checkpoints, and room for i/20 of the third one's state."""
    two = 2 * (4 * MORE + 3 * PAGE)  # with the rest of the state, the selected weights and the manifest
    if not small_disk(stage, two + 4 * PAGE + 36 * PAGE * i // 20):
        return {}
    large(stage, 1)
    large(stage, 2)
    said = ""
    try:
        large(stage, 3)
    except CheckpointError as error:
        said = str(error)
    left, before = [path.name for path in stage.rglob(".*")], loaded(stage)
    save(stage, 4)  # for which there is room again
    return {"said": said, "left": left, "loaded": before, "then": loaded(stage)}


def enospc(i: int, rng: random.Random, folder: Path) -> dict[str, int]:
    """No room on the disk after i/20 of a training state, where the kernel lets us mount such a disk."""
    stage = folder / f"{i}"
    stage.mkdir(exist_ok=True)
    seen = harness.in_child(partial(fill, stage, i))
    shutil.rmtree(stage)
    if not seen:
        return {"not allowed to mount": 1}
    said = str(seen.pop("said"))
    assert str(stage / "checkpoints" / "update-00000003") in said, f"{i}/20: {said}"
    assert "No space left on device" in said, f"{i}/20: {said}"
    assert seen == {"left": [], "loaded": 2, "then": 4}, f"{i}/20: {seen}"
    return {"offsets": 1, "previous loads": 1}


FAULTS = "a fault at every write, fsync and rename of a save: an earlier or the new checkpoint is whole"
FULL = "no room at 20 places: the checkpoint before loads, and one line says so"
PARTS = (Part("faults", FAULTS, len(MODES) * len(SAVES), 1, faults), Part("enospc", FULL, 20, 4, enospc))
