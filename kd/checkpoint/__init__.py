"""Checkpoints that are whole or refused: atomic writes, sha256 manifests, files that hold no code.

The directory of a stage while it trains, and once it is finished:

    checkpoints/update-00000120/   state.safetensors, selected.safetensors, manifest.json; the newest two are kept
    last.safetensors  selected.safetensors  stage.json      stage.json is their manifest, written last

``python -m kd.verify run=DIR`` says what a run directory holds and whether it is whole.
"""
