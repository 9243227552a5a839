"""Ctrl-C asks for a stop; so do SIGTERM and SIGUSR1, from a cluster that wants its machine back.

Within `held`, which is the loop's, the answer comes between two updates, where nothing is half done, with the state
saved. Elsewhere nothing needs saving, and the process leaves at once. Nothing here imports torch: the handlers must
be there before the imports that take seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

GO_ON = "run the same command to go on"
PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)
CTRL_C = 130  # exit code of a run stopped by ctrl-C, as shells have it; one stopped by the others has done its part: 0
SAME = 1.0  # seconds within which a second signal is the first: a launcher passes on what its group was sent as well


class Interrupted(BaseException):
    """Training stopped as asked, with its state saved.

    No Exception, like KeyboardInterrupt: what catches the failures of a job must not take it for one.
    """


def leave() -> None:
    """Say that the same command goes on, and end this process now, whatever it is doing."""
    # Not an exception: half of a signal's moments are imports, and somewhere in them is an `except:` that takes it.
    os.write(2, f"stopped by {signal.Signals(_asked).name}; {GO_ON}\n".encode())
    with suppress(Exception):  # it may be in the middle of a print
        sys.stdout.flush()
    os._exit(0)


_asked = 0  # the signal; 0: none
_asked_at = 0.0
_owner: int | None = None  # the process that listens
_held = False
_leave: Callable[[], None] = leave


def listen(*signals: signal.Signals, leaving: Callable[[], None] = leave) -> None:
    """Turn signals (SIGINT, SIGTERM and SIGUSR1 where none are given) into requests; `leaving` answers at once."""
    global _asked, _owner, _leave
    _asked, _owner, _leave = 0, os.getpid(), leaving
    for each in signals or (signal.SIGINT, *PREEMPTION):
        signal.signal(each, _request)


@contextmanager
def listening() -> Iterator[None]:
    """A job of a launcher's process, which ends at once, and in silence, where its command is asked to stop.

    Where somebody listens already, the command itself or a cluster's launcher, that is left as it is.
    """
    global _owner
    free = all(signal.getsignal(each) == signal.SIG_DFL for each in PREEMPTION)
    if not free or threading.current_thread() is not threading.main_thread():  # others cannot
        yield
        return
    listen(*PREEMPTION, leaving=lambda: os._exit(0))
    try:
        yield
    finally:
        _owner = None
        for each in PREEMPTION:
            signal.signal(each, signal.SIG_DFL)


def _request(signum: int, frame: Any) -> None:
    global _asked, _asked_at
    if os.getpid() != _owner:  # a data worker, forked with this handler: when it ends is its parent's affair
        return
    now = time.monotonic()
    again = _asked and now - _asked_at > SAME
    if not _asked:
        _asked, _asked_at = signum, now
    if signum == signal.SIGINT and (again or not _held):
        raise KeyboardInterrupt
    if again or not (_held or _several()):
        _leave()


def _several() -> bool:
    """Whether torchrun started several processes, of which none may leave alone: the others would wait for it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def held() -> Iterator[None]:
    """A block that asks `stop_requested` by itself, and raises Interrupted where its state is safe."""
    global _held
    _held = True
    try:
        yield
    finally:
        _held = False
    if _asked and not _several():  # asked after its last look
        if _asked == signal.SIGINT:
            raise KeyboardInterrupt
        _leave()


def stop_requested(accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop: all must agree, or the others would wait for it forever."""
    global _asked
    if accelerator.num_processes == 1 or _owner is None:
        return bool(_asked)
    import torch

    mine = float(1000 if _asked == signal.SIGINT else bool(_asked))
    total = accelerator.reduce(torch.tensor(mine, device=accelerator.device), reduction="sum")
    votes = float(total)  # type: ignore[arg-type]
    if votes and not _asked:
        _asked = signal.SIGINT if votes >= 1000 else signal.SIGTERM
    return votes > 0


def check(accelerator: Accelerator) -> None:
    """Raise Interrupted on every process where one was asked to stop, outside the loop."""
    if stop_requested(accelerator):
        raise Interrupted("stopped")


def exit_code() -> int:
    """Of a run that was stopped."""
    return 0 if _asked in PREEMPTION else CTRL_C
