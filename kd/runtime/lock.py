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
    directory: Path,
    busy: Callable[[str], None] | None = None,
    done: Callable[[], bool] = lambda: False,
    accelerator: Accelerator | None = None,
) -> Iterator[bool]:
    """Hold the lock of a directory unless its work is done; gives whether it is. What is done is only read, by all.

    Args:
        directory: the lock's file is beside it, as .NAME.lock, and stays there.
        busy: called again and again with the process that holds the lock, such as "process 12 on node3", while one
            does; it must wait a little or raise. Without it, ConfigError.
        done: whether the work is done; asked before the lock is taken, and again with it.
        accelerator: torchrun's processes, of which the main one holds the lock for all.
    """
    if from_main(accelerator, done()):
        yield True
        return
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    main = accelerator is None or accelerator.is_main_process
    while holder := from_main(accelerator, _take(lock) if main else ""):
        if busy is None:
            raise ConfigError(f"{directory}: {holder} is at work on it; wait for it, or choose another run= or output=")
        busy(holder)
    try:
        yield from_main(accelerator, done())
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


def from_main(accelerator: Accelerator | None, value: Any) -> Any:
    """The main process's value, on every process: two may look at a changing file at different times."""
    if accelerator is None or accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
