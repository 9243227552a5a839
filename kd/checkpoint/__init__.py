"""Checkpoints that are whole or refused: atomic writes, sha256 manifests, and files that can hold no code.

A stage's folder while it trains, and when it is done:

    checkpoints/update-00000120/   state.safetensors, selected.safetensors, manifest.json; the newest two are kept
    last.safetensors  selected.safetensors  stage.json      stage.json is their manifest, written last

``python -m kd.verify verify PATH`` says what a folder or file is and whether it is whole.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd.checkpoint.files import (
        digest,
        open_in_place,
        read_json,
        regular,
        write_atomically,
        write_json,
        write_text,
        writing,
    )
    from kd.checkpoint.manifest import SCHEMA, seal, verified
    from kd.checkpoint.safetensors_io import METADATA, load_state, read_weights, save_weights, weights_header
    from kd.checkpoint.store import (
        CHECKPOINTS,
        NEWEST,
        Checkpoint,
        advice,
        belongs,
        clean,
        finish,
        finished,
        load,
        read_sealed,
        retire,
        save,
        save_sealed,
        write_manifest,
    )

# Names load on first use: help, and what is missing of the libraries, is said without them.
_HOME = {
    name: module
    for module, names in {
        "files": "digest open_in_place read_json regular write_atomically write_json write_text writing",
        "manifest": "SCHEMA seal verified",
        "store": "CHECKPOINTS NEWEST Checkpoint advice belongs clean finish finished load read_sealed retire save "
        "save_sealed write_manifest",
        "safetensors_io": "METADATA load_state read_weights save_weights weights_header",
    }.items()
    for name in names.split()
}

__all__ = [
    "CHECKPOINTS",
    "METADATA",
    "NEWEST",
    "SCHEMA",
    "Checkpoint",
    "advice",
    "belongs",
    "clean",
    "digest",
    "finish",
    "finished",
    "load",
    "load_state",
    "open_in_place",
    "read_json",
    "read_sealed",
    "read_weights",
    "regular",
    "retire",
    "save",
    "save_sealed",
    "save_weights",
    "seal",
    "verified",
    "weights_header",
    "write_atomically",
    "write_json",
    "write_manifest",
    "write_text",
    "writing",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"kd.checkpoint.{_HOME[name]}"), name)
    raise AttributeError(f"module 'kd.checkpoint' has no attribute {name!r}")
