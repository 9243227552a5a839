"""Checkpoints that are whole or refused: atomic writes, sha256 manifests, and files that can hold no code.

A stage's folder while it trains, and when it is done:

    checkpoints/update-00000120/   state.safetensors, selected.safetensors, manifest.json; the newest two are kept
    last.safetensors  selected.safetensors  stage.json      stage.json is their manifest, written last

``python -m kd.checkpoint verify PATH`` says what a folder or file is and whether it is whole.
"""

from kd.checkpoint.files import (
    CheckpointError,
    digest,
    laid_out,
    open_in_place,
    read_json,
    regular,
    write_atomically,
    write_json,
    writing,
)
from kd.checkpoint.manifest import SCHEMA, seal, verified
from kd.checkpoint.stage import FOLDER as CHECKPOINTS
from kd.checkpoint.stage import (
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
from kd.checkpoint.tensors import METADATA, load_state, read_weights, save_weights, weights_header

__all__ = [
    "CHECKPOINTS",
    "METADATA",
    "NEWEST",
    "SCHEMA",
    "Checkpoint",
    "CheckpointError",
    "advice",
    "belongs",
    "clean",
    "digest",
    "finish",
    "finished",
    "laid_out",
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
    "writing",
]
