"""Damaged bytes in every file of a checkpoint and of finished weights: all of them are seen, none is loaded."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from kd import checkpoint
from kd.checkpoint import CheckpointError
from tests.torture.faults import finish, loaded, save
from tests.torture.harness import Part

KINDS = {"flips": 2000, "truncations": 500, "zeroed blocks": 500, "tails": 200}
TOTAL = sum(KINDS.values())
SMALL = 64
NAMES = ("state.safetensors", "selected.safetensors", "manifest.json")  # of a checkpoint
DONE = ("last.safetensors", "selected.safetensors", "stage.json")  # of a finished stage


def prepare(folder: Path) -> None:
    for name in ("training", "done"):
        shutil.rmtree(folder / name, ignore_errors=True)
    save(folder / "training", 1)
    save(folder / "training", 2)
    finish(folder / "done")


def kind(i: int) -> str:
    """What the i-th trial does; trial numbers are shuffled, so that a few of them hold some of every kind."""
    at = i * 1009 % TOTAL  # prime to TOTAL: every kind as often as KINDS says
    for name, count in KINDS.items():
        if at < count:
            return name
        at -= count
    raise AssertionError(i)


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
    path, how = rng.choice(files), kind(i)
    raw = path.read_bytes()
    bad, where = damaged(raw, how, rng)
    assert bad != raw
    path.write_bytes(bad)
    try:
        if path.parent == checkpoints[1]:
            _falls_back(folder / "training", path, where)
        else:
            _refused(path, where)
    finally:
        path.write_bytes(raw)
    return {how: 1, "detected": 1, "fallbacks": int(path.parent == checkpoints[1])}


def _falls_back(stage: Path, path: Path, where: str) -> None:
    assert loaded(stage) == 1, f"{path.name}, {where}: was loaded"
    said: list[str] = []
    checkpoint.load(stage, said.append, "")
    assert len(said) == 1, f"{path.name}, {where}: {len(said)} warnings"
    assert "\n" not in said[0], f"{path.name}, {where}: {said[0]!r} is not one line"
    assert str(path) in said[0], f"{path.name}, {where}: {said[0]!r} does not name it"


def _refused(path: Path, where: str) -> None:
    """The weights themselves, or with a damaged stage.json all of them."""
    for weights in [path] if path.suffix == ".safetensors" else path.parent.glob("*.safetensors"):
        said = ""
        try:
            checkpoint.finished(weights)
        except CheckpointError as error:
            said = str(error)
        assert said, f"{path.name}, {where}: {weights.name} was taken for whole"
        assert str(path) in said, f"{path.name}, {where}: {said} does not name it"


PARTS = (
    Part(
        "flips",
        "2,000 flips, 500 cuts, 500 zeroed blocks, 200 tails: all detected, the checkpoint before is loaded",
        TOTAL,
        SMALL,
        trial,
        prepare,
    ),
)
