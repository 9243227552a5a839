"""Damaged bytes in every file of a checkpoint and of finished weights: all of them are seen, none is loaded."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kd.checkpoint import store
from kd.errors import CheckpointError
from kd.verify import rows
from tests.torture.faults import ABOUT, finish, loaded, save, weights
from tests.torture.harness import Part

KINDS = ("flips", "flips", "flips", "truncations", "zeroed blocks", "tails")
NAMES = ("state.safetensors", "selected.safetensors", "manifest.json")  # of a checkpoint
DONE = ("last.safetensors", "selected.safetensors", "stage.json")  # of a finished stage
SEALED = ("weights.safetensors", "weights.json")  # of a study's teacher


def prepare(folder: Path) -> None:
    for name in ("training", "done", "sealed"):
        shutil.rmtree(folder / name, ignore_errors=True)
    save(folder / "training", 1)
    save(folder / "training", 2)
    finish(folder / "done")
    store.save_sealed(folder / "sealed" / SEALED[0], weights(1), ABOUT)


def damaged(raw: bytes, how: str, rng: random.Random) -> tuple[bytes, str]:
    """Other bytes, and where they differ."""
    if how == "flips":
        at, bit = rng.randrange(len(raw)), rng.randrange(8)
        return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :], f"bit {bit} of byte {at}"
    if how == "truncations":
        at = rng.randrange(len(raw))
        return raw[:at], f"cut at {at}"
    if how == "tails":
        tail = rng.choice([rng.randbytes(rng.randint(1, 64)), bytes(8), b"\n", b" "])
        return raw + tail, f"{len(tail)} bytes more"
    while True:  # a block of zeros is no damage
        at, size = rng.randrange(len(raw)), rng.choice([1, 8, 64, 512])
        block = raw[at : at + size]
        if any(block):
            return raw[:at] + bytes(len(block)) + raw[at + size :], f"{len(block)} bytes zeroed at {at}"


def trial(i: int, rng: random.Random, folder: Path) -> dict[str, int]:
    checkpoints = sorted((folder / "training" / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    files = [checkpoints[1] / name for name in NAMES] + [folder / "done" / name for name in DONE]
    files += [folder / "sealed" / name for name in SEALED]
    path, how = rng.choice(files), KINDS[i % len(KINDS)]
    raw = path.read_bytes()
    bad, where = damaged(raw, how, rng)
    assert bad != raw
    path.write_bytes(bad)
    try:
        if path.parent == checkpoints[1]:
            _falls_back(folder / "training", path, where)
        elif path.name in SEALED:
            _refused(path, where, [path.with_name(SEALED[0])], partial(store.read_sealed, advice=""))
        elif path.name == "stage.json":  # then all of them
            _refused(path, where, list(path.parent.glob("*.safetensors")), store.finished)
        else:
            _refused(path, where, [path], store.finished)
        if path.name not in SEALED:
            told = [row.wrong for row in rows(path.parent) if row.wrong]
            assert len(told) == 1, f"{path.name}, {where}: kd.verify says {told}"
    finally:
        path.write_bytes(raw)
    return {how: 1, "detected": 1, "fallbacks": int(path.parent == checkpoints[1])}


def _falls_back(stage: Path, path: Path, where: str) -> None:
    assert loaded(stage) == 1, f"{path.name}, {where}: was loaded"
    said: list[str] = []
    store.load(stage, said.append)
    (line,) = said
    assert str(path) in line, f"{path.name}, {where}: {line!r} does not name it"
    assert "\n" not in line, f"{path.name}, {where}: {line!r} is not one line"


def _refused(path: Path, where: str, files: list[Path], read: Callable[[Path], object]) -> None:
    """None of these is read, and each time the damaged one is named."""
    for file in files:
        said = ""
        try:
            read(file)
        except CheckpointError as error:
            said = str(error)
        assert str(path) in said, f"{path.name}, {where}: reading {file.name} says {said!r}"


PROMISE = "flipped bits, cuts, zeroed blocks, tails: all detected, the checkpoint before is loaded"
PARTS = (Part("flips", PROMISE, 3200, 64, trial, prepare),)
