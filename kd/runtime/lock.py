"""A lock on a directory, so that one process at a time works in it.

The kernel holds it on a file beside the directory, which may be renamed meanwhile, and releases it when the process
ends, however it ends. Forked data workers do not keep it: filelock closes their copy of the file.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from kd.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def locked(
    directory: Path, busy: Callable[[str], None] | None = None, accelerator: Accelerator | None = None
) -> Iterator[None]:
    """Hold the lock of a directory; under torchrun the main process holds it for all.

    While another process holds it, `busy` is called again and again with that process, such as "process 12 on node3",
    and must wait a little or raise. Without `busy`, ConfigError.
    """
    main = accelerator is None or accelerator.is_main_process
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    while holder := from_main(accelerator, _take(lock) if main else ""):
        if busy is None:
            raise ConfigError(f"{directory}: {holder} is at work on it; wait for it, or choose another run= or output=")
        busy(holder)
    try:
        yield
    finally:
        lock.release()


def _take(lock: FileLock) -> str:
    """Take a lock; returns "", or the process that holds it."""
    path = Path(lock.lock_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout:
        return path.read_text() or "another process"
    except OSError as error:  # a file system without locks, or a full disk: neither should stop a run
        print(f"{path}: {error.strerror}; start no second process on this directory", file=sys.stderr)
    return ""


@contextmanager
def unless_done(
    directory: Path,
    done: Callable[[], bool],
    busy: Callable[[str], None] | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[bool]:
    """Hold the lock of a directory unless its work is `done`; gives whether it is.

    What is done is only read, by as many processes as like.
    """
    if from_main(accelerator, done()):
        yield True
        return
    with locked(directory, busy, accelerator):
        yield from_main(accelerator, done())  # another process may have done it since


def from_main(accelerator: Accelerator | None, value: Any) -> Any:
    """The main process's value, on every process: two may look at a changing file at different times."""
    if accelerator is None or accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
