"""Hostile files through every reader: nothing in them runs, and what cannot be used is one line."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes

from kd.checkpoint.manifest import read_manifest
from kd.checkpoint.safetensors_io import load_state, read_weights, weights_header
from kd.cli.errors import one_line_errors
from kd.config.compose import read_recipe
from kd.errors import CheckpointError, ConfigError
from kd.models.factory import build
from kd.models.weights import load_weights
from kd.training.results import read_result
from kd.verify import rows
from tests.torture.faults import save
from tests.torture.gadget_files import gadgets
from tests.torture.harness import Part, in_child

GADGETS, BATCHES, SIZE = 20, 100, 100
MEMORY = 2**30  # bytes beyond what the process has when it starts
SECONDS = 10  # of a processor, for one file; what takes none for HANGS seconds hangs
HANGS = 120


def network() -> torch.nn.Module:
    return build("mlp_nano", num_classes=10, input_shape=(1, 8, 8))


def as_command(read: Callable[[Path], object], path: Path) -> object:
    """As a command reads it, with the line that it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            with one_line_errors("kd.train"):
                return read(path)
        except SystemExit:
            raise ConfigError(said.getvalue().strip()) from None


READERS: dict[str, Callable[[Path], object]] = {
    "state": load_state,
    "weights": read_weights,
    "header": weights_header,
    "network": lambda path: load_weights(network(), path),
    "manifest": read_manifest,
    "result": read_result,
    "recipe": partial(as_command, read_recipe),
    "verify": rows,
}
BY_SUFFIX = {
    ".safetensors": ["state", "weights", "header", "network", "verify"],
    ".pth": ["weights", "network", "verify"],
    ".json": ["manifest", "result"],
    ".yaml": ["recipe"],
}


def valid(folder: Path) -> dict[str, bytes]:
    """Files that kd and torch write, to be changed."""
    torch.manual_seed(0)
    own, zipped, old = network().state_dict(), io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": own}, zipped)
    torch.save(own, old, _use_new_zipfile_serialization=False)
    save(folder / "training", 1)
    checkpoint = next((folder / "training" / "checkpoints").iterdir())
    return {
        "own.safetensors": safetensors_bytes(own, {"kd": json.dumps({"model": "mlp_nano", "num_classes": "10"})}),
        "state.safetensors": (checkpoint / "state.safetensors").read_bytes(),
        "manifest.json": (checkpoint / "manifest.json").read_bytes(),
        "zipped.pth": zipped.getvalue(),
        "old.pth": old.getvalue(),
        "short.yaml": b"name: x\nseed: 0\ndata: {name: digits, image_size: 8}\nteacher: {model: mlp_wide}\n",
    }


def mutant(raw: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut, doubled, or put in, most of them where the structure is: at both ends."""
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        reach = min(len(changed), 600)
        at = rng.randrange(reach) if rng.random() < 0.6 else len(changed) - 1 - rng.randrange(reach)
        match rng.randrange(5):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice(b'\x00\xff{}[]",:.0123456789eE-cRb\x80\x81')
            case 2:
                del changed[at : at + rng.choice([1, 2, 8, 100])]
            case 3:
                changed[at:at] = rng.choice([b"9" * 30, b"[" * 300, b'{"a":', b"\xff" * 8, rng.randbytes(4)])
            case _:
                changed[at:at] = changed[at : at + rng.choice([4, 40, 400])]
        if not changed:
            return b"\x00"
    return bytes(changed)


def prepare(folder: Path) -> None:
    for kind, files in (("valid", valid(folder / "made")), ("gadget", gadgets((folder / "canary").absolute()))):
        for name, raw in files.items():
            path = folder / kind / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)


def trial(i: int, rng: random.Random, folder: Path) -> dict[str, int]:
    """The i-th gadget through every reader, or 100 mutants, each through every reader that takes its kind of file."""
    hostile = sorted((folder / "gadget").iterdir())
    assert len(hostile) == GADGETS
    if i < GADGETS:
        jobs = [(hostile[i].name, hostile[i].read_bytes(), list(READERS))]
    else:
        small = [path for path in hostile if path.stat().st_size < 2**16]
        bases = rng.choices([*(folder / "valid").iterdir(), *(folder / "valid").iterdir(), *small], k=SIZE)
        jobs = [(base.name, mutant(base.read_bytes(), rng), BY_SUFFIX[base.suffix]) for base in bases]
    place = folder / f"child{i}"
    place.mkdir(exist_ok=True)
    counts = in_child(partial(_read_all, place, jobs))
    assert not (folder / "canary").exists(), f"code ran: {[name for name, _, _ in jobs][:3]}"
    assert counts.pop("done") == len(jobs)
    return {"gadgets" if i < GADGETS else "mutants": len(jobs), "executions": 0, "tracebacks": 0, "hangs": 0, **counts}


def _read_all(folder: Path, jobs: list[tuple[str, bytes, list[str]]]) -> dict[str, int]:
    """Read each with little memory and time; how many were refused and taken."""
    faulthandler.disable()
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, pages + MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    torch.set_num_threads(1)
    counts = Counter(done=0)
    for name, raw, readers in jobs:
        path = folder / name
        path.write_bytes(raw)
        for reader in readers:
            what = f"{reader} of {name}"
            (folder / "last").write_text(what)  # for whoever looks after a crash
            signal.alarm(HANGS)
            started = time.process_time()
            try:
                READERS[reader](path)
                counts["taken"] += 1
            except (CheckpointError, ConfigError) as error:
                counts["refused"] += 1
                said = str(error)
                assert "\n" not in said, f"{what}: not one line: {said[:300]!r}"
                assert len(said) <= 1000, f"{what}: a long line: {said[:300]!r}"
            except BaseException as error:
                (folder / "kept").write_bytes(raw)
                raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
            finally:
                signal.alarm(0)
            took = time.process_time() - started
            assert took < SECONDS, f"{what}: took {took:.0f} s"
        counts["done"] += 1
    return dict(counts)


PROMISE = "20 gadget files and 10,000 mutants through every reader: nothing runs, hangs, or ends in a traceback"
PARTS = (Part("gadgets", PROMISE, GADGETS + BATCHES, 4, trial, prepare),)
