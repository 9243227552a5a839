"""Signals that ask a run to stop: Ctrl-C, and SIGTERM or SIGUSR1 from a cluster that wants its machine back.

Inside `held`, the training loop, a signal is a request: the loop answers it between two updates, saves, and raises
Interrupted. Elsewhere there is nothing to save and the process ends at once, as it does on a second signal.
Nothing here imports torch: the handlers must be there before the imports that take seconds.

Python runs a handler only between two of its own instructions. A process that waits in C++, as torchrun's do until all
have met, is killed by its launcher instead, which loses nothing.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

GO_ON = "run the same command to go on"
KEPT = "what was saved is kept"
PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)
CTRL_C = 130  # exit code after Ctrl-C, as shells have it; after the others, which a run answers as it should, 0
SAME = 1.0  # seconds in which a second signal is the first: a launcher passes on what its whole group was sent


class Interrupted(BaseException):
    """Training stopped as asked, with its state saved.

    No Exception, like KeyboardInterrupt: what catches the failures of a job must not take it for one.
    """


_asked = 0  # the first signal; 0: none
_asked_at = 0.0
_listener: int | None = None  # the process whose signals these are
_held = False


def leave() -> None:
    """End this process now, and say what remains."""
    # No exception: imports are half of a run's first seconds, and somewhere in them is an `except:` that would eat it.
    with suppress(OSError):  # nobody may be left to read it
        os.write(2, f"stopped by {signal.Signals(_asked).name}; {KEPT}\n".encode())
    with suppress(Exception):  # it may be in the middle of a print
        sys.stdout.flush()
    os._exit(exit_code())


_leave: Callable[[], None] = leave


def listen(*signals: signal.Signals, leaving: Callable[[], None] = leave) -> None:
    """Turn signals (SIGINT, SIGTERM and SIGUSR1 by default) into requests; `leaving` ends the process at once."""
    global _asked, _listener, _leave
    _asked, _listener, _leave = 0, os.getpid(), leaving
    for each in signals or (signal.SIGINT, *PREEMPTION):
        signal.signal(each, _request)
    # When Python ends it gives signals back to the system, which would kill a run whose result is written.
    atexit.register(_ignore)


def _ignore() -> None:
    for each in PREEMPTION:
        signal.signal(each, signal.SIG_IGN)


def _request(signum: int, frame: Any) -> None:
    global _asked, _asked_at
    if os.getpid() != _listener:  # a data worker, forked with this handler: its parent ends it
        return
    now = time.monotonic()
    again = _asked and now - _asked_at > SAME
    if not _asked:
        _asked, _asked_at = signum, now
    if again or not (_held or _together()):
        _stop_now()


def _stop_now() -> None:
    if _asked == signal.SIGINT:
        raise KeyboardInterrupt  # which takes the progress bar off the terminal
    _leave()


def _together() -> bool:
    """Whether torchrun's processes have met: from then on none may leave alone, or the others would wait for it."""
    distributed: Any = sys.modules.get("torch.distributed")
    met = getattr(distributed, "is_initialized", None)  # None in the middle of its import
    return bool(met and met() and distributed.get_world_size() > 1)


@contextmanager
def held() -> Iterator[None]:
    """A block that asks `stop_requested` by itself, and raises Interrupted where its state is safe."""
    global _held
    _held = True
    try:
        yield
    finally:
        _held = False
    if _asked and not _together():  # since it last asked
        _stop_now()


def stop_requested(accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop: all of them agree, or the others would wait for it forever."""
    global _asked
    if accelerator.num_processes == 1 or _listener is None:
        return bool(_asked)
    import torch

    votes: Any = accelerator.gather(torch.tensor([_asked], device=accelerator.device))
    agreed = int(votes.max())
    _asked = _asked or agreed  # a signal that comes during the vote is kept for the next one
    return bool(agreed)


def check(accelerator: Accelerator) -> None:
    """Raise Interrupted on every process where one was asked to stop, outside the training loop."""
    if stop_requested(accelerator):
        raise Interrupted("stopped")


def exit_code() -> int:
    """The exit code of a run that was stopped."""
    return 0 if _asked in PREEMPTION else CTRL_C
