"""Files of strangers through every reader: nothing in them runs, and what is not whole is one line."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import save as safetensors_bytes

from kd.checkpoint import store
from kd.checkpoint.files import read_json
from kd.checkpoint.manifest import read_manifest
from kd.checkpoint.safetensors_io import load_state, read_weights, weights_header
from kd.cli.errors import one_line_errors
from kd.config import compose
from kd.config.schema import Recipe, content_hash, identity
from kd.errors import CheckpointError, ConfigError
from kd.models.factory import build
from kd.models.weights import load_weights, weights_metadata
from kd.study.folder import Folder
from kd.training import replay, results
from kd.training.logger import Logger
from kd.training.stored import read_result
from kd.verify import rows
from tests.torture.faults import ABOUT, finish, save, weights
from tests.torture.gadget_files import gadgets
from tests.torture.harness import Part

GADGETS, BATCHES, SIZE = 40, 100, 100
MEMORY = 2**30  # bytes beyond what the process has when it starts
SECONDS = 10  # of a processor, for one file; what takes none for HANGS seconds hangs
HANGS = 120


def network(path: Path) -> object:
    return build("mlp_nano", num_classes=10, input_shape=(1, 8, 8), checkpoint=path)


def exactly(path: Path) -> object:
    return load_weights(build("mlp_nano", num_classes=10, input_shape=(1, 8, 8)), path)


def in_place_of(places: str, read: Callable[[Path], object], path: Path) -> None:
    """The file in the place of each of these, which have checksums: it is never taken for one."""
    for place in path.parent.glob(places):
        whole = place.read_bytes()
        place.write_bytes(path.read_bytes())
        try:
            read(path.parent)
            assert whole == path.read_bytes(), f"{path.name} was taken for {place.name}"
        except CheckpointError:
            pass
        finally:
            place.write_bytes(whole)


def resumed(folder: Path) -> None:
    store.load(folder / "stage", print, "")


def finished(folder: Path) -> None:
    for name in ("last", "selected"):
        store.finished(folder / f"done/{name}.safetensors")
    store.read_sealed(folder / "done/sealed.safetensors", "")


def as_command(read: Callable[[Path], object], path: Path) -> object:
    """As a command reads it, with the line that it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            with one_line_errors("kd.train"):
                return read(path)
        except SystemExit:
            raise ConfigError(said.getvalue().strip()) from None


def replayed(path: Path) -> None:
    """As the result, and as the recipe, of a run that is trained again."""
    for name in ("result.json", "recipe.yaml"):
        place = path.parent / "past" / name
        whole = place.read_bytes()
        place.write_bytes(path.read_bytes())
        try:
            replay.report(results.read_run(place.parent, [])[1], json.loads((path.parent / "new.json").read_text()))
        except (ConfigError, CheckpointError):
            if name == "recipe.yaml":
                raise
        finally:
            place.write_bytes(whole)


def printed(path: Path) -> None:
    results.print_result(read_result(path), Console(file=io.StringIO()))


def rewound(path: Path) -> None:
    lines = shutil.copy(path, path.with_suffix(".jsonl"))
    Logger(lines, SimpleNamespace(is_main_process=True), Console(quiet=True)).rewind("student", 1, 1)  # type: ignore


def card(path: Path) -> object:
    return Folder(Path(shutil.copy(path, path.with_name("study.json"))).parent).read_card()


READERS: dict[str, Callable[[Path], object]] = {
    "state": load_state,
    "weights": read_weights,
    "header": weights_header,
    "metadata": weights_metadata,
    "network": network,
    "exactly": exactly,
    "resume": partial(in_place_of, "stage/checkpoints/*/*", resumed),
    "finished": partial(in_place_of, "done/*", finished),
    "json": read_json,
    "manifest": read_manifest,
    "recipe": compose.read_recipe,
    "verify": lambda path: rows(path),
    "replay": partial(as_command, replayed),
    "result": printed,
    "journal": rewound,
    "card": card,
}


def past() -> dict[str, bytes]:
    """The recipe and the result of a finished run."""
    recipe, scores = Recipe(name="x"), dict.fromkeys(("top1", "nll", "ece", "brier", "agreement"), 0.5)
    network: dict[str, Any] = {w: {"val": scores, "test": scores} for w in ("last", "selected")}
    network |= {"model": "mlp_nano", "sha256": "0" * 64, "weights": "x", "seconds": 1.0}
    provenance = {"versions": {}, "hardware": {}, "recipe_hash": content_hash(identity(recipe))}
    difference = {"top1": 0.1, "standard_error": 0.01, "n": 10}
    result = dict.fromkeys(("teacher", "student", "control"), network) | {"provenance": provenance}
    result["difference"] = {w: {"val": difference, "test": difference} for w in ("last", "selected")}
    return {"recipe.yaml": OmegaConf.to_yaml(OmegaConf.structured(recipe)).encode(), "result.json": _json(result)}


def _json(values: object) -> bytes:
    return json.dumps(values, indent=2).encode()


def valid(folder: Path) -> dict[str, bytes]:
    """Files that kd and torch write, to be changed."""
    torch.manual_seed(0)
    own = build("mlp_nano", num_classes=10, input_shape=(1, 8, 8)).state_dict()
    zipped, old = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": own}, zipped)
    torch.save(own, old, _use_new_zipfile_serialization=False)
    save(folder / "training", 1)
    finish(folder / "done")
    found = next((folder / "training" / "checkpoints").iterdir())
    return {
        "own.safetensors": safetensors_bytes(own, {"kd": json.dumps({"model": "mlp_nano", "num_classes": "10"})}),
        "state.safetensors": (found / "state.safetensors").read_bytes(),
        "manifest.json": (found / "manifest.json").read_bytes(),
        "stage.json": (folder / "done" / "stage.json").read_bytes(),
        "zipped.pth": zipped.getvalue(),
        "old.pth": old.getvalue(),
        "short.yaml": b"name: x\nseed: 0\ndata: {name: digits, image_size: 8}\nteacher: {model: mlp_wide}\n",
        "metrics.json": b'{"stage": "student", "update": 1, "epoch": 0, "loss": 0.5}\n' * 4,
        **past(),
    }


def mutant(raw: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut, doubled, or put in, most of them where the structure is: at both ends."""
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        reach = min(len(changed), 600)
        at = rng.randrange(reach) if rng.random() < 0.6 else len(changed) - 1 - rng.randrange(reach)
        match rng.randrange(6):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice(b'\x00\xff{}[]",:.0123456789eE-cRb\x80\x81')
            case 2:
                del changed[at : at + rng.choice([1, 2, 8, 100])]
            case 3:
                changed[at:at] = rng.choice([b"9" * 30, b"[" * 300, b'{"a":', b"\xff" * 8, rng.randbytes(4)])
            case 4:
                changed[at:at] = changed[at : at + rng.choice([4, 40, 400])]
            case _:
                other = rng.randrange(len(changed))
                changed[at : at + 8] = changed[other : other + 8]
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
    found = sorted((folder / "gadget").iterdir())
    assert len(found) == GADGETS
    if i < GADGETS:
        jobs = [(found[i].name, found[i].read_bytes(), list(READERS))]
    else:
        small = [path for path in found if path.stat().st_size < 2**16]
        bases = [*(folder / "valid").iterdir(), *(folder / "valid").iterdir(), *small]
        jobs = []
        for _ in range(SIZE):
            base = rng.choice(bases)
            jobs.append((base.name, mutant(base.read_bytes(), rng), readers_of(base)))
    counts = in_child(folder / f"child{i}", jobs)
    assert not (folder / "canary").exists(), f"code ran: {[name for name, _, _ in jobs][:3]}"
    assert counts.pop("done") == len(jobs)
    return {"gadgets" if i < GADGETS else "mutants": len(jobs), "executions": 0, "tracebacks": 0, "hangs": 0, **counts}


def readers_of(path: Path) -> list[str]:
    by_suffix = {
        ".safetensors": ["state", "weights", "header", "metadata", "network", "exactly", "verify"],
        ".pth": ["weights", "network", "exactly", "verify"],
        ".json": ["json", "manifest", "result", "replay", "journal", "card"],
        ".yaml": ["recipe", "replay"],
    }
    return by_suffix[path.suffix]


def in_child(folder: Path, jobs: list[tuple[str, bytes, list[str]]]) -> Counter:
    """Read each in a process of its own with little memory and time; returns how many were refused and taken."""
    folder.mkdir(exist_ok=True)
    shutil.rmtree(folder / "stage", ignore_errors=True)
    save(folder / "stage", 1)
    finish(folder / "done")
    store.save_sealed(folder / "done/sealed.safetensors", weights(1), ABOUT)
    (folder / "past").mkdir(exist_ok=True)
    for name, raw in past().items():
        (folder / "past" / name).write_bytes(raw)
    shutil.copy(folder / "past/result.json", folder / "new.json")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        said = _read_all(folder, jobs)
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    last = (folder / "last").read_text() if (folder / "last").exists() else "?"
    assert status == 0, f"the reader ended with {status} at {last}"
    counts = json.loads(said)
    assert "wrong" not in counts, counts["wrong"]
    return Counter(counts)


def _read_all(folder: Path, jobs: list[tuple[str, bytes, list[str]]]) -> dict:
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
            (folder / "last").write_text(f"{reader} of {name}")
            signal.alarm(HANGS)
            started = time.process_time()
            try:
                READERS[reader](path)
                counts["taken"] += 1
            except (CheckpointError, ConfigError) as error:
                counts["refused"] += 1
                if "\n" in str(error) or len(str(error)) > 1000:
                    return {"wrong": f"{reader} of {name}: not one line: {str(error)[:300]!r}"}
            except BaseException as error:
                (folder / "kept").write_bytes(raw)
                return {"wrong": f"{reader} of {name}: {type(error).__name__}: {str(error)[:300]}"}
            finally:
                signal.alarm(0)
            if (took := time.process_time() - started) > SECONDS:
                return {"wrong": f"{reader} of {name}: took {took:.0f} s"}
        counts["done"] += 1
    return dict(counts)


PARTS = (
    Part(
        "gadgets",
        "40 gadget files and 10,000 mutants through every reader: nothing runs, hangs, or ends in a traceback",
        GADGETS + BATCHES,
        4,
        trial,
        prepare,
    ),
)
