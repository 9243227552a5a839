"""Ctrl-C and SIGTERM ask for a stop; the loop answers between two updates, where nothing is half done."""

from __future__ import annotations

import signal
from typing import Any

import torch
from accelerate import Accelerator


class Interrupted(RuntimeError):
    """Training stopped as asked, with its state saved."""


_requested = False


def _request(signum: int, frame: Any) -> None:
    global _requested
    if _requested and signum == signal.SIGINT:  # asked twice: stop now, from the last saved state
        raise KeyboardInterrupt
    _requested = True


def listen() -> None:
    """Turn SIGINT and SIGTERM into a request that `stop_requested` reports."""
    global _requested
    _requested = False
    signal.signal(signal.SIGINT, _request)
    signal.signal(signal.SIGTERM, _request)


def stop_requested(accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop: all must agree, or the others would wait for it forever."""
    if accelerator.num_processes == 1:
        return _requested
    flag = torch.tensor(float(_requested), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)
