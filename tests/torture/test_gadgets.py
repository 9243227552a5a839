"""Hostile files through every reader: nothing in them runs, and what cannot be used is one line."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
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
from tests.torture.saves import in_child, save

MUTANTS = 500  # of a test
MEMORY = 2**30  # bytes beyond what the process has when it starts
SECONDS = 10  # of a processor, for one file; what takes none for HANGS seconds hangs
HANGS = 120


class Gadget:
    """What unpickles to a call."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _zipped(value: object) -> bytes:
    """A zip as torch.save writes it, with another pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in {"data.pkl": pickle.dumps(value, 2), "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def with_code(canary: Path) -> dict[str, bytes]:
    """Pickles and recipes that make the file CANARY where a reader lets them; the suffix says who would read it."""
    touch = f"touch {canary}"
    system = Gadget(os.system, touch)
    return {
        "text.pth": pickle.dumps({"model": system}, 0),
        "bare.pth": pickle.dumps({"model": system}, 5),
        "zipped.pth": _zipped({"w": system}),
        "eval.pth": _zipped({"w": Gadget(eval, f"__import__('os').system({touch!r})")}),
        "open.pth": _zipped({"w": Gadget(open, str(canary), "w")}),
        "partial.pth": _zipped({"w": Gadget(functools.partial(os.system, touch))}),
        "nested.pth": _zipped({"w": Gadget(pickle.loads, pickle.dumps(system))}),
        "tag.yaml": f"name: !!python/object/apply:os.system ['{touch}']\n".encode(),
        "target.yaml": f"data: {{_target_: logging.FileHandler, filename: '{canary}'}}\n".encode(),
    }


def _tensors(header: object, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(start: int, end: int, shape: list[int]) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def lying() -> dict[str, bytes]:
    """Safetensors that claim what is not there, or nest deeply, to crash their reader."""
    deep = '{"__items__": [["a", ' * 20_000 + "1" + "]]}" * 20_000
    return {
        "endless.safetensors": struct.pack("<Q", 2**63) + b"{" * 100,
        "overlap.safetensors": _tensors({"a": _entry(0, 16, [4]), "b": _entry(8, 16, [2])}),
        "huge.safetensors": _tensors({"a": _entry(0, 16, [2**62, 2**62])}),
        "negative.safetensors": _tensors({"a": _entry(-4, 0, [-1])}),
        "nested.safetensors": _tensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "tree.safetensors": _tensors({"__metadata__": {"kd": deep}, "a": _entry(0, 16, [4])}),
    }


def careless(name: str, raw: bytes) -> None:
    """A reader that does what a file says."""
    if name.endswith(".pth"):
        torch.load(io.BytesIO(raw), weights_only=False)
    else:
        values = yaml.unsafe_load(raw)
        with warnings.catch_warnings(action="ignore"):
            instantiate(values.get("data", {}))


def test_every_gadget_with_code_runs_it_where_a_reader_lets_it(tmp_path):
    """So that a canary which is not there says something."""
    canary = tmp_path / "canary"
    for name, raw in with_code(canary).items():
        with contextlib.suppress(Exception):
            in_child(careless, name, raw)
        assert canary.exists(), name
        canary.unlink()


def network() -> torch.nn.Module:
    return build("mlp_nano", num_classes=10, input_shape=(1, 8, 8))


def recipe_of(path: Path) -> object:
    """As a command reads it, with the line that it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            with one_line_errors("kd.train"):
                return read_recipe(path)
        except SystemExit:
            raise ConfigError(said.getvalue().strip()) from None


READERS: dict[str, Callable[[Path], object]] = {
    "state": load_state,
    "weights": read_weights,
    "header": weights_header,
    "network": lambda path: load_weights(network(), path),
    "manifest": read_manifest,
    "result": read_result,
    "recipe": recipe_of,
    "verify": rows,
}
BY_SUFFIX = {
    ".safetensors": ["state", "weights", "header", "network", "verify"],
    ".pth": ["weights", "network", "verify"],
    ".json": ["manifest", "result"],
    ".yaml": ["recipe"],
}


def read_all(folder: Path, name: str, raw: bytes, readers: list[str]) -> int:
    """Read a file with every reader and little memory and time; how many of them refused it, each in one line."""
    path, refused = folder / name, 0
    path.write_bytes(raw)
    for reader in readers:
        signal.alarm(HANGS)
        started = time.process_time()
        try:
            READERS[reader](path)
        except (CheckpointError, ConfigError) as error:
            refused += 1
            one_line = "\n" not in str(error) and len(str(error)) <= 1000
            assert one_line, f"{reader} of {name}: not one short line: {str(error)[:300]!r}"  # noqa: PT017
        except BaseException as error:
            raise AssertionError(f"{reader} of {name}: {type(error).__name__}: {str(error)[:300]}") from error
        finally:
            signal.alarm(0)
        took = time.process_time() - started
        assert took < SECONDS, f"{reader} of {name}: took {took:.0f} s"
    return refused


def with_little_memory(act: Callable[[], object]) -> object:
    """For a forked process: a file that claims much, or crashes its reader, takes only this process."""
    faulthandler.disable()
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, pages + MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    torch.set_num_threads(1)
    return act()


def test_no_gadget_runs_hangs_or_ends_in_a_traceback(tmp_path):
    canary = tmp_path / "canary"
    for name, raw in (with_code(canary) | lying()).items():
        refused = in_child(with_little_memory, partial(read_all, tmp_path, name, raw, list(READERS)))
        assert not canary.exists(), f"{name}: its code ran"
        assert refused >= len(READERS) - 2, name  # kd.verify prints a table; a header may be whole though its data lies


def valid(folder: Path) -> dict[str, bytes]:
    """Files that kd and torch write, to be changed."""
    torch.manual_seed(0)
    own, zipped, old = network().state_dict(), io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": own}, zipped)
    torch.save(own, old, _use_new_zipfile_serialization=False)
    save(folder, 1)
    checkpoint = next((folder / "checkpoints").iterdir())
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


def _read_mutants(folder: Path, bases: list[tuple[str, bytes]]) -> int:
    return sum(read_all(folder, name, raw, BY_SUFFIX[Path(name).suffix]) for name, raw in bases)


@pytest.mark.torture
@pytest.mark.parametrize("part", range(4))
def test_no_mutant_runs_hangs_or_ends_in_a_traceback(part, rng, tmp_path):
    canary = tmp_path / "canary"
    hostile = {name: raw for name, raw in (with_code(canary) | lying()).items() if len(raw) < 2**16}
    bases = [*list(valid(tmp_path / "made").items()) * 2, *hostile.items()]
    mutants = [(name, mutant(raw, rng)) for name, raw in rng.choices(bases, k=MUTANTS)]
    refused = in_child(with_little_memory, partial(_read_mutants, tmp_path, mutants))
    assert not canary.exists()
    assert refused > MUTANTS
