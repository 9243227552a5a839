"""A fault at every system call of a save, and a full disk: an earlier checkpoint or the new one loads."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest
import timm.models  # noqa: F401 (else each child would)
import torch
from safetensors.torch import save as safetensors_bytes

import kd.checkpoint.safetensors_io
import kd.checkpoint.store
from kd.checkpoint import store
from kd.errors import CheckpointError
from tests.torture.saves import ABOUT, FORK, finish, in_child, loaded, save, state, weights

NAMES = ("mkdir", "open", "ftruncate", "write", "fsync", "close", "rename", "replace", "unlink", "rmdir")
WATCHED = [*((os, name) for name in NAMES), (Path, "write_bytes")]
WRITES = ("write", "write_bytes")
MODES = ("raise after", "die torn", "die after", "die before", "raise before", "raise torn")  # torn: half of a write
SAVES = ("third", "first", "damaged", "finish")
SAMPLE = [("raise after", "third"), ("die torn", "third")]
PIECES = 3
DIED = 77
NEW_MOUNTS, NEW_USER, PRIVATE = 0x20000, 0x10000000, 0x44000  # of linux/sched.h and sys/mount.h; private, recursive
PAGE = resource.getpagesize()
MORE = 40 * PAGE // 4  # numbers in a state, for the disk to be full within


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


def fault(act: Callable[[], None], at: int, mode: str) -> None:
    """Do it with a fault at one call."""
    left = [at]
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

    with watched(hook), suppress(CheckpointError):  # of every other error the test fails
        act()


def scenario(name: str, folder: Path) -> Callable[[], None]:
    """A stage's folder before a save, and the save."""
    if name == "first":
        return lambda: save(folder, 1)
    save(folder, 1)
    save(folder, 2)
    if name == "damaged":
        raw = (path := next(folder.glob("checkpoints/*2/state.safetensors"))).read_bytes()
        path.write_bytes(bytes(len(raw) // 2) + raw[len(raw) // 2 :])
        return lambda: resume(folder)
    return (lambda: save(folder, 3)) if name == "third" else (lambda: finish(folder))


def resume(folder: Path) -> None:
    """What a run does that finds its newest checkpoint damaged, up to its next one."""
    assert loaded(folder) == 1
    store.clean(folder)
    save(folder, 3)


CASES = [
    pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.torture) for case in itertools.product(MODES, SAVES)
]


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_after_a_fault_at_any_call_of_a_save_a_whole_checkpoint_loads(mode, name, tmp_path):
    tried = 0
    for at, call in enumerate(sequence(scenario(name, tmp_path / "calls"))):
        if mode.endswith("torn") and call not in WRITES:
            continue
        stage = tmp_path / f"{at}"
        act = scenario(name, stage)
        if mode.startswith("die"):
            child = FORK.Process(target=fault, args=(act, at, mode))
            child.start()
            child.join()
            assert child.exitcode == DIED
        else:
            fault(act, at, mode)
        _check(name, stage, f"call {at} ({call})")
        tried += 1
    assert tried > 5


def _check(name: str, stage: Path, what: str) -> None:
    """An earlier or the new one is there, and the next save works and leaves nothing half written."""
    if name == "finish" and (stage / "stage.json").exists():
        for each in ("last", "selected"):
            store.finished(stage / f"{each}.safetensors")
        return
    update = loaded(stage)
    wanted = {"first": (None, 1), "third": (2, 3), "damaged": (1, 3), "finish": (2,)}[name]
    assert update in wanted, f"{what}: update {update} was loaded"
    save(stage, 4)
    assert loaded(stage) == 4, f"{what}: the next save was lost"
    assert not list(stage.rglob(".*")), f"{what}: temporary files were left"
    kept = len(list((stage / "checkpoints").iterdir()))
    assert kept <= store.NEWEST + (name == "damaged"), f"{what}: {kept} are kept"


@pytest.mark.parametrize("name", ["third", "finish"])
def test_what_is_renamed_is_on_the_disk_before_and_its_name_after(name, tmp_path):
    """No test can cut the power; without these two flushes a crash of the machine could leave an empty checkpoint."""
    calls = sequence(scenario(name, tmp_path))
    renames = [i for i, call in enumerate(calls) if call in ("rename", "replace")]
    assert len(renames) > 1
    for i in renames[:-1]:  # the last one moves an old checkpoint out of the way
        unflushed = re.split("fsync|rename|replace", " ".join(calls[:i]))[-1]
        assert "write" not in unflushed
        assert calls[i + 1 : i + 4] == ["open", "fsync", "close"]


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


def fill(stage: Path, tenths: int) -> tuple[str, int | None] | None:
    """Two checkpoints, and room for so many tenths of the third one's state; what is said, and what then loads."""
    two = 2 * (4 * MORE + 3 * PAGE)  # with the rest of the state, the selected weights and the manifest
    if not small_disk(stage, two + 4 * PAGE + 36 * PAGE * tenths // 10):
        return None
    large(stage, 1)
    large(stage, 2)
    with pytest.raises(CheckpointError) as error:
        large(stage, 3)
    assert not list(stage.rglob(".*"))
    update = loaded(stage)
    save(stage, 4)  # for which there is room again
    assert loaded(stage) == 4
    return str(error.value), update


@pytest.mark.parametrize("tenths", [0, 3, 6, 9])
def test_on_a_full_disk_the_checkpoint_before_loads(tenths, tmp_path):
    seen = in_child(fill, tmp_path, tenths)
    if seen is None:
        pytest.skip("the kernel does not let us mount a small disk")
    said, update = seen
    assert said.startswith(f"cannot write {tmp_path / 'checkpoints' / 'update-00000003'}: ")
    assert "No space left on device" in said
    assert "\n" not in said
    assert update == 2
