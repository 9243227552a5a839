"""One process at a time on a folder: a lock that the kernel takes back when its holder ends, however that ends.

The lock is flock's on a file beside the folder, which may be renamed meanwhile; it is removed with the lock. What a
kill leaves of it locks nothing.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kd.checkpoint import open_in_place

if TYPE_CHECKING:
    from accelerate import Accelerator

_held: set[IO[str]] = set()


def _forget() -> None:
    """In a forked data worker: with its copy of the file it would hold the lock for as long as it outlives us."""
    for file in _held:
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), file.fileno())  # not closed: its number would be another file's
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def told(accelerator: Accelerator | None, value: Any) -> Any:
    """What the main process has, on every process: files may appear between the looks of two."""
    if accelerator is None or accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def path_of(folder: Path) -> Path:
    """The file whose lock is the folder's."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def alone(folder: Path, busy: Callable[[str], None], accelerator: Accelerator | None = None) -> Iterator[None]:
    """Hold the lock of a folder, of all processes of a run in the main one.

    `busy` is called with who holds it, such as "process 12 on node3", until nobody does: it raises, or waits a while.
    On a file system without locks one line says so, and nothing is held.
    """
    main = accelerator is None or accelerator.is_main_process
    while True:
        file, holder = _take(path_of(folder)) if main else (None, None)
        if (holder := told(accelerator, holder)) is None:
            break
        busy(holder)
    try:
        yield
    finally:
        if file in _held:
            path_of(folder).unlink(missing_ok=True)  # while it is held: who waits for it looks at the name again
            _held.discard(file)
            file.close()


def _take(path: Path) -> tuple[IO[str] | None, str | None]:
    """The file, locked, or who has it locked; neither where the file system knows no locks."""
    while True:
        file = open_in_place(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            return None, holder
        except OSError as error:
            file.close()
            print(f"{path.parent}: no locks here ({error.strerror}); start no second process on it", file=sys.stderr)
            return None, None
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its holder removed it in between: what we hold has no name any more
    file.truncate(0)
    with suppress(OSError):  # only who waits reads it; a full disk is told of by what must be written
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held.add(file)
    return file, None
