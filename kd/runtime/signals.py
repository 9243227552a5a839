"""Ctrl-C asks for a stop; so do SIGTERM and SIGUSR1, from a cluster that wants its machine back.

Within `held`, which is the loop's, the answer comes between two updates, where nothing is half done, with the state
saved. Elsewhere nothing needs saving, and the process leaves at once. Nothing here imports torch: the handlers must
be there before the imports that take seconds.

Python runs a handler only when the interpreter has control, and what waits in C++, as for another process's first
word, may never give it back. So a thread hears of every signal too, and answers where the handler does not.
"""

from __future__ import annotations

import math
import os
import select
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
GRACE = 0.5  # seconds that the handler has, before the thread answers in its place


class Interrupted(BaseException):
    """Training stopped as asked, with its state saved.

    No Exception, like KeyboardInterrupt: what catches the failures of a job must not take it for one.
    """


def leave() -> None:
    """Say what goes on, and end this process now, whatever it is doing."""
    # Not an exception: half of a signal's moments are imports, and somewhere in them is an `except:` that takes it.
    with suppress(OSError):  # nobody may be left to read it
        os.write(2, f"stopped by {signal.Signals(_asked).name}; {GO_ON}\n".encode())
    with suppress(Exception):  # it may be in the middle of a print
        sys.stdout.flush()
    os._exit(exit_code())


_asked = 0  # the signal; 0: none
_asked_at = 0.0
_answered = threading.Event()  # by the handler
_ears: tuple[int, int] | None = None  # the pipe into which the interpreter writes the number of every signal
_owner: int | None = None  # the process that listens
_held = False
_leave: Callable[[], None] = leave


def listen(*signals: signal.Signals, leaving: Callable[[], None] = leave) -> None:
    """Turn signals (SIGINT, SIGTERM and SIGUSR1 where none are given) into requests; `leaving` answers at once."""
    global _asked, _owner, _leave
    _asked, _owner, _leave = 0, os.getpid(), leaving
    for each in signals or (signal.SIGINT, *PREEMPTION):
        signal.signal(each, _request)
    if leaving is leave:  # others do what only the main thread can
        _listen_beside()


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
    _answered.set()
    now = time.monotonic()
    again = _asked and now - _asked_at > SAME
    if not _asked:
        _asked, _asked_at = signum, now
    if signum == signal.SIGINT and (again or not _held):
        raise KeyboardInterrupt
    if again or not (_held or _together()):
        _leave()


def _listen_beside() -> None:
    """Have a thread hear of signals from now on, whatever the main one waits in."""
    global _ears
    if _ears is None:
        _ears = os.pipe()
        os.set_blocking(_ears[1], False)
        threading.Thread(target=_answer_beside, args=(_ears[0],), daemon=True).start()
    signal.set_wakeup_fd(_ears[1], warn_on_full_buffer=False)


def _answer_beside(heard: int) -> None:
    """The handler's answer, from a thread, to a signal that the handler has not answered in time."""
    global _asked
    first = math.inf  # when this thread first heard of one: the handler, in a long update, may be yet to hear of it
    while True:
        select.select([heard], [], [])
        in_time = _answered.wait(GRACE)
        _answered.clear()
        now, signums = time.monotonic(), {*os.read(heard, 64)} & {signal.SIGINT, *PREEMPTION}
        # A handler that raises KeyboardInterrupt is unwinding now. What is left to do here is what it would have done.
        if signums and not in_time and (now - first > SAME or not (_held or _together())):
            _asked = _asked or min(signums)
            leave()
        if signums:
            first = min(first, now)


def _deaf() -> None:
    """In a forked data worker: its signals would be taken for its parent's, whose pipe it has."""
    global _ears
    if _ears is not None:
        signal.set_wakeup_fd(-1)
        _ears = None


os.register_at_fork(after_in_child=_deaf)


def _together() -> bool:
    """Whether torchrun's processes have met, from when on none may leave alone: the others would wait for it."""
    distributed: Any = sys.modules.get("torch.distributed")
    met = getattr(distributed, "is_initialized", None)  # none in the middle of its import
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
    if _asked and not _together():  # asked after its last look
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
