"""Errors of the commands: one line of one process, for pipes, memory and torchrun's variables."""

import os
import subprocess
import sys

import pytest

from kd.cli.console import terminal
from kd.cli.errors import NO_MEMORY, one_line_errors
from kd.config.schema import PACKAGE
from kd.errors import CheckpointError, ConfigError

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch):
    def change(**values):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return change


def test_an_error_that_all_processes_have_is_printed_by_the_first(variables, capsys):
    variables(**TORCHRUN)
    for error, said in ((ConfigError("said"), ""), (CheckpointError("mine"), "error: mine\n")):
        with pytest.raises(SystemExit) as stop, one_line_errors("kd.train"):
            raise error
        assert (stop.value.code, capsys.readouterr().err) == (2, said)
    variables(RANK="1", WORLD_SIZE="2")  # a pod, of which torchrun knows nothing
    with pytest.raises(SystemExit), one_line_errors("kd.report"):
        raise ConfigError("said\nin\x1btwo lines")
    assert capsys.readouterr().err == "error: said\\nin\\x1btwo lines\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 1, NO_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 1, NO_MEMORY),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "data.workers=0 needs less"),
        (ValueError("rendezvous: environment variable RANK expected, but not set"), 2, "torchrun sets all of its"),
        (FileNotFoundError(2, "No such file or directory", "x.pth"), 2, "x.pth: No such file or directory"),
        (ModuleNotFoundError("No module", name="hydra"), 2, "kd.train needs hydra: pip install 'kd-torch[train]'"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, code, said):
    with pytest.raises(SystemExit) as stop, one_line_errors("kd.train"):
        raise error
    assert stop.value.code == code
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors("kd.train"):
        _ = 1 // 0


def test_a_reader_that_has_enough(tmp_path):
    program = (
        "from kd.cli.errors import one_line_errors\nwith one_line_errors('kd.report'):\n    print('line\\n' * 10**5)"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "PROGRAM": program}
    line = f'{sys.executable} -c "$PROGRAM" | head -1'
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("line\n", "")


def test_a_name_between_colons_is_printed_as_it_is(capsys):
    """rich knows :ten: as an emoji, and a name such as my.py:ten: begins one."""
    terminal().print("student.model=my.py:ten: fails")
    assert capsys.readouterr().out == "student.model=my.py:ten: fails\n"
