"""Errors of the commands: one line on stderr for what a user can mend, and the exit codes."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from kd.errors import ConfigError, TrainingError
from kd.runtime.signals import CTRL_C, GO_ON
from kd.text import plain

FAILED = 1  # exit code of a command that cannot go on
USAGE = 2  # exit code of a command line, or a file that it names, that cannot work
NO_MEMORY = "out of memory; lower train.batch_size, or raise train.accumulation, which leaves the result as it is"
LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "NCCL")  # as torch.distributed has it


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and an exit code. Our own mistakes keep their traceback."""
    try:
        yield
        sys.stdout.flush()  # here: at the interpreter's end Python would print a traceback of its own
    except KeyboardInterrupt:
        fail("stopped; what was saved is kept", CTRL_C)
    except BrokenPipeError as error:  # the reader has enough, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(FAILED) from error
    except Exception as error:
        if message := _message(program, error):
            fail(*message)
        raise


def run_command(program: str, main: Callable[[list[str]], int], help_text: str | None) -> NoReturn:
    """Run a command on the words of this process's command line, or print its help where that is asked for."""
    words = sys.argv[1:]
    with one_line_errors(program):
        if not words or {"-h", "--help"} & set(words):
            print((help_text or "").rstrip())
            sys.exit(0)
        sys.exit(main(words))


def _message(program: str, error: Exception) -> tuple[str, int, bool] | None:
    """The line to print, the exit code, and whether every process prints it; None for a mistake of kd's own."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "kd").startswith("kd"):
        extra = "study" if program in ("kd.study", "kd.report") else "train"
        return f"{program} needs {error.name}: pip install 'kd-torch[{extra}]'", USAGE, False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return NO_MEMORY, FAILED, True
    if text.startswith("DataLoader worker"):  # raised by a signal, wherever this process then is
        return f"{' '.join(text.split()).rstrip('.')}; data.workers=0 needs less memory", FAILED, True
    if isinstance(error, TrainingError):
        return text, FAILED, False
    if "MASTER_ADDR" in text or "rendezvous" in text:  # where some of torchrun's variables are set and others are not
        return f"{text}; torchrun sets all of its variables", USAGE, True
    if isinstance(error, RuntimeError) and any(word in text for word in LOST_PROCESS):
        return f"another process of this run has ended; the last saved state is kept, {GO_ON}", FAILED, True
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", USAGE, True
    if isinstance(error, ValueError) and type(error).__module__.startswith("kd."):  # those of kd.errors
        return text, USAGE, not isinstance(error, ConfigError)
    return None


def fail(message: str, code: int = USAGE, everyone: bool = False) -> NoReturn:
    """Print one line and exit. `everyone` is for an error that one process of several may have alone."""
    # A pod's RANK is not torchrun's.
    if everyone or "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0":
        print(f"error: {plain(message)}", file=sys.stderr)
    raise SystemExit(code)
