"""Damaged bytes in every file of a checkpoint and of finished weights: all of them are seen, none is loaded."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from kd.checkpoint import store
from kd.errors import CheckpointError
from kd.verify import rows
from tests.torture.saves import ABOUT, finish, loaded, save, weights

KINDS = ("flip", "flip", "flip", "cut", "zeros", "tail")
NAMES = ("state.safetensors", "selected.safetensors", "manifest.json")  # of a checkpoint
DONE = ("last.safetensors", "selected.safetensors", "stage.json")  # of a finished stage
SEALED = ("weights.safetensors", "weights.json")  # of a study's teacher


def damaged(raw: bytes, how: str, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    match how:
        case "flip":
            return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
        case "cut":
            return raw[:at]
        case "tail":
            return raw + rng.choice([rng.randbytes(rng.randint(1, 64)), bytes(8), b"\n", b" "])
    size = rng.choice([1, 8, 64, 512])
    return raw[:at] + bytes(len(raw[at : at + size])) + raw[at + size :]


@pytest.mark.parametrize("trials", [64, pytest.param(1600, marks=pytest.mark.torture)])
def test_damaged_bytes_are_seen_and_the_checkpoint_before_is_loaded(trials, rng, tmp_path):
    training, done, sealed = (tmp_path / name for name in ("training", "done", "sealed"))
    save(training, 1)
    save(training, 2)
    finish(done)
    store.save_sealed(sealed / SEALED[0], weights(1), ABOUT)
    newest = sorted((training / "checkpoints").iterdir())[1]
    files = [folder / name for folder, names in ((newest, NAMES), (done, DONE), (sealed, SEALED)) for name in names]
    for i in range(trials):
        path, how = rng.choice(files), KINDS[i % len(KINDS)]
        raw = path.read_bytes()
        bad = damaged(raw, how, rng)
        if bad == raw:  # zeros where zeros were
            continue
        path.write_bytes(bad)
        at = next((at for at, (a, b) in enumerate(zip(raw, bad, strict=False)) if a != b), "its end")
        what = f"{path.name}, {how} at {at}"
        if path.parent == newest:
            _falls_back(training, path, what)
        elif path.parent == sealed:
            _refused(path, what, [sealed / SEALED[0]], partial(store.read_sealed, advice=""))
        else:  # the manifest is that of both
            _refused(path, what, list(done.glob("*.safetensors")) if path.suffix == ".json" else [path], store.finished)
        if path.parent != sealed:
            told = [line for whole, line in rows(path.parent) if not whole]
            assert len(told) == 1, f"{what}: kd.verify says {told}"
        path.write_bytes(raw)


def _falls_back(stage: Path, path: Path, what: str) -> None:
    assert loaded(stage) == 1, f"{what}: was loaded"
    said: list[str] = []
    store.load(stage, said.append)
    (line,) = said
    assert str(path) in line, f"{what}: {line!r} does not name it"
    assert "\n" not in line, f"{what}: {line!r} is not one line"


def _refused(path: Path, what: str, files: list[Path], read: Callable[[Path], object]) -> None:
    """None of these is read, and each time the damaged one is named."""
    for file in files:
        with pytest.raises(CheckpointError) as error:
            read(file)
        assert str(path) in str(error.value), f"{what}: reading {file.name} says {error.value}"
