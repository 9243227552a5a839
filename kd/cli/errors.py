"""Errors of the commands: one line on stderr for what a user can mend, and the exit codes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from kd.cli import environment
from kd.errors import ConfigError
from kd.runtime.signals import CTRL_C
from kd.text import plain

USAGE = 2  # exit code of a command line that cannot work
PRINTS = {"-h", "--help", "--cfg", "-c", "--cfg=job", "-c=job", "list_layers=true", "dry_run=true"}  # and no more
SAVED = "the same command goes on from what was saved"
NO_MEMORY = "out of memory; lower train.batch_size, or raise train.accumulation, which leaves the result as it is"


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and an exit code; let our own mistakes keep their traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, instead of printing several lines and exiting
    environment.ready_streams()
    try:
        environment.check(trains=program == "kd.train")
    except ConfigError as error:
        fail(str(error), everyone=True)  # who is the first of all is what is wrong
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, or Python would complain at its end
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "kd":
            raise
        fail(f"{program} needs {error.name}: pip install 'kd-torch[train]'")
    except KeyboardInterrupt:
        fail(f"stopped; {SAVED}", CTRL_C)
    except MemoryError:
        fail(NO_MEMORY, 1, everyone=True)
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if isinstance(error, BrokenPipeError) and not error.filename:  # who read has enough, as after | head
            environment.drop(1)
            if program in ("kd.train", "kd.study") and not PRINTS.intersection(sys.argv[1:]):
                fail(f"standard output: nobody reads it any more; {SAVED}", 1)
            raise SystemExit(1) from error
        if isinstance(error, OSError) and error.filename:
            fail(f"{error.filename}: {error.strerror}", everyone=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            environment.drop(1)
            fail(f"standard output: {error.strerror}; {SAVED}", 1)
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # torch's own
            fail(NO_MEMORY, 1, everyone=True)
        if str(error).startswith("DataLoader worker"):  # raised by a signal, wherever this process then is
            said = " ".join(str(error).split()).removesuffix(".")
            fail(f"{said}; {SAVED}; without memory, lower data.workers", 1, True)
        if package == "kd" and isinstance(error, ValueError):  # ConfigError, CheckpointError, ImageError
            fail(str(error), everyone=not isinstance(error, ConfigError))
        raise


def fail(message: str, code: int = USAGE, everyone: bool = False) -> NoReturn:
    """Print one line and exit; from every process where the error may be one process's own, else once."""
    if everyone or "LOCAL_RANK" not in os.environ or int(os.environ.get("RANK", "0")) == 0:  # a pod has RANK alone
        environment.complain(f"error: {plain(message)}")
    raise SystemExit(code)
