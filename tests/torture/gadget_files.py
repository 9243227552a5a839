"""40 files made to run code, to eat memory or to crash who reads them; each runs `touch CANARY` if it can."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch


class Gadget:
    """What unpickles to a call."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _zipped(raw: bytes, **more: bytes) -> bytes:
    """A zip as torch.save writes it, with another pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in {"data.pkl": raw, "byteorder": b"little", "version": b"3\n", **more}.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def _bomb(size: int, copies: int = 1) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for i in range(copies):
            archive.writestr("archive/data.pkl" if i == 0 else f"archive/data/{i}", bytes(size))
    return out.getvalue()


def _overlapping() -> bytes:
    """Many entries of one place: 1,000 names for the same bytes."""
    body = zlib.compress(bytes(2**20))[2:-4]
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, zlib.crc32(bytes(2**20)), len(body), 2**20, 1, 0) + b"a"
    central = b"".join(
        struct.pack(
            "<4s6H3I5H2I",
            b"PK\1\2", 20, 20, 0, 8, 0, 0, zlib.crc32(bytes(2**20)), len(body), 2**20, 4, 0, 0, 0, 0, 0, 0,
        ) + f"{i:04}".encode()
        for i in range(1000)
    )  # fmt: skip
    head = local + body
    return head + central + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1000, 1000, len(central), len(head), 0)


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
    """Pickles of every protocol, bare and in torch's zip, and of several functions."""
    touch = f"touch {canary}"
    system = Gadget(os.system, touch)
    files = {f"bare{p}.pth": pickle.dumps({"model": system}, p) for p in range(6)}
    files |= {f"zipped{p}.pth": _zipped(pickle.dumps({"model": system}, p)) for p in range(2, 6)}
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
    """YAML and JSON."""
    touch = f"touch {canary}"
    deep = 100_000
    yaml = {
        "apply": f"name: !!python/object/apply:os.system ['{touch}']\n",
        "new": f"name: !!python/object/new:os.popen ['{touch}']\n",
        "target": f"data: {{_target_: logging.FileHandler, filename: '{canary}'}}\n",
        "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 12)),
        "deep": "a: " + "[" * 5000,
    }
    json_files = {
        "deep": "[" * deep + "]" * deep,
        "number": f'{{"schema": 1, "files": {{}}, "sha256": {"9" * 100_000}}}',
        "infinite": '{"seconds": 1e999, "update": NaN}',
        "twice": '{"schema": 1, "schema": 2, "sha256": "", "sha256": 3}',
        "surrogate": '{"\\ud800": "\\udfff", "files": {"../../etc/passwd": {"sha256": "", "bytes": -1}}}',
    }
    files = {f"{name}.yaml": text for name, text in yaml.items()}
    return {name: text.encode() for name, text in (files | {f"{n}.json": t for n, t in json_files.items()}).items()}


def tensors() -> dict[str, bytes]:
    """Zips and safetensors that lie."""
    deep = '{"__items__": [["a", ' * 20_000 + "1" + "]]}" * 20_000
    return {
        "bomb.pth": _bomb(2**28),
        "bombs.pth": _bomb(2**22, 64),
        "overlapping.pth": _overlapping(),
        "claiming.pth": _claiming(10**12),
        "endless.safetensors": struct.pack("<Q", 2**63) + b"{" * 100,
        "longer.safetensors": struct.pack("<Q", 10**6) + b"{}",
        "overlap.safetensors": _tensors({"a": _entry(0, 16), "b": _entry(8, 16)}),
        "outside.safetensors": _tensors({"a": _entry(0, 10**15)}),
        "huge.safetensors": _tensors({"a": _entry(0, 16, [2**62, 2**62])}),
        "negative.safetensors": _tensors(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [-4, 0]}}'),
        "unknown.safetensors": _tensors({"a": _entry(0, 16, [4], "os.system")}),
        "twice.safetensors": _tensors(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},' * 2 + b'"b":1}'),
        "nested.safetensors": _tensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "tree.safetensors": _tensors({"__metadata__": {"kd": deep}, "a": _entry(0, 16)}),
    }


def gadgets(canary: Path) -> dict[str, bytes]:
    """All of them by name; the suffix says who would read it."""
    return pickles(canary) | texts(canary) | tensors()
