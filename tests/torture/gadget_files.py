"""Files made to run code or to crash their reader; each runs `touch CANARY` if it can."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch


class Gadget:
    """What unpickles to a call."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _zipped(raw: bytes) -> bytes:
    """A zip as torch.save writes it, with another pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in {"data.pkl": raw, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def _tensors(header: object, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


def _claiming(size: int) -> bytes:
    """A torch file whose tensor says that it is larger than what is there."""
    out = io.BytesIO()
    tensor = torch.zeros(2)
    torch.save({"w": torch.as_strided(tensor, (size,), (0,))}, out)
    return out.getvalue()


def pickles(canary: Path) -> dict[str, bytes]:
    """Pickles, bare and in torch's zip, of several functions."""
    touch = f"touch {canary}"
    system = Gadget(os.system, touch)
    files = {f"bare{p}.pth": pickle.dumps({"model": system}, p) for p in (0, 2, 5)}
    code = f"import os; os.system({touch!r})"
    ways = {
        "eval": Gadget(eval, f"__import__('os').system({touch!r})"),
        "exec": Gadget(exec, code),
        "call": Gadget(subprocess.call, touch.split()),
        "partial": Gadget(functools.partial(os.system, touch)),
        "open": Gadget(open, str(canary), "w"),
        "load": Gadget(pickle.loads, pickle.dumps(system)),
    }
    return files | {f"{name}.pth": _zipped(pickle.dumps({"w": way}, 2)) for name, way in ways.items()}


def texts(canary: Path) -> dict[str, bytes]:
    """Recipes with a tag or a target of Hydra's."""
    touch = f"touch {canary}"
    yaml = {
        "apply": f"name: !!python/object/apply:os.system ['{touch}']\n",
        "new": f"name: !!python/object/new:os.popen ['{touch}']\n",
        "target": f"data: {{_target_: logging.FileHandler, filename: '{canary}'}}\n",
    }
    return {f"{name}.yaml": text.encode() for name, text in yaml.items()}


def tensors() -> dict[str, bytes]:
    """Zips and safetensors that lie."""
    deep = '{"__items__": [["a", ' * 20_000 + "1" + "]]}" * 20_000
    return {
        "claiming.pth": _claiming(10**12),
        "endless.safetensors": struct.pack("<Q", 2**63) + b"{" * 100,
        "overlap.safetensors": _tensors({"a": _entry(0, 16), "b": _entry(8, 16)}),
        "huge.safetensors": _tensors({"a": _entry(0, 16, [2**62, 2**62])}),
        "negative.safetensors": _tensors(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [-4, 0]}}'),
        "unknown.safetensors": _tensors({"a": _entry(0, 16, [4], "os.system")}),
        "nested.safetensors": _tensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "tree.safetensors": _tensors({"__metadata__": {"kd": deep}, "a": _entry(0, 16)}),
    }


def gadgets(canary: Path) -> dict[str, bytes]:
    """All of them by name; the suffix says who would read it."""
    return pickles(canary) | texts(canary) | tensors()
