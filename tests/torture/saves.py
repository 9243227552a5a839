"""Small checkpoints and finished weights to be damaged, and a process of its own in which to damage them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kd.checkpoint import store

FORK = multiprocessing.get_context("fork")
ABOUT = {"model": "mlp_nano", "num_classes": "10", "label_smoothing": "0.1", "smoothing": "uniform"}


def in_child(act: Callable[..., Any], *arguments: Any) -> Any:
    """What `act` returns in a forked process. Raises what it raises, and BrokenProcessPool where the process dies."""
    with ProcessPoolExecutor(1, FORK) as pool:
        return pool.submit(act, *arguments).result()


def state(update: int) -> dict:
    """A training state and what it should be when it is read again."""
    generator = torch.Generator().manual_seed(update)
    return {"model": {"w": torch.randn(500, generator=generator)}, "update": update, "list": [1, 2.5, None, "x"]}


def weights(update: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((300,), float(update))}


def save(folder: Path, update: int) -> None:
    store.save(folder, update, state(update), weights(update), ABOUT)


def finish(folder: Path) -> None:
    each = {"last": weights(9), "selected": weights(8)}
    store.finish(folder, each, ABOUT, {"updates": 9, "seconds": 1.0, "selected": {"epoch": 1}})


def loaded(folder: Path) -> int | None:
    """The update that a run would resume from, after looking at every value of it; None where it would start anew."""
    checkpoint = store.load(folder, lambda text: None)
    if checkpoint is None:
        return None
    update = checkpoint.state["update"]
    saved = state(update)
    assert torch.equal(checkpoint.state["model"]["w"], saved["model"]["w"]), f"other weights at update {update}"
    assert checkpoint.state["list"] == saved["list"], f"other values at update {update}"
    assert checkpoint.selected is not None, f"no selected weights at update {update}"
    assert torch.equal(checkpoint.selected["w"], weights(update)["w"]), f"other selected weights at update {update}"
    return update
