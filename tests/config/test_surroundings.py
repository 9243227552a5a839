"""Commands in odd places: streams closed, full, of ASCII or read no further, a folder that is gone, no memory."""

import os
import subprocess
import sys

import pytest

from kd.cli import errors as cli
from kd.config.schema import PACKAGE
from kd.errors import ConfigError

HELP = f"{sys.executable} -m kd.train --help"


def shell(line, folder, **environment):
    """What a line of a shell came to: exit code of its first command and all of stderr."""
    words = ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # it hides the last flush
    more = {"PYTHONPATH": str(PACKAGE.parent), **environment}
    done = subprocess.run(words, cwd=folder, env=own | more, capture_output=True, text=True)
    return done.returncode, done.stderr, done.stdout


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"{HELP} >&-", 0, ""),
        (f"{HELP} 2>&-", 0, ""),
        (f"{HELP} >/dev/full", 1, "error: standard output: No space left on device; the same command goes on from "
         "what was saved\n"),
        (f"{HELP.replace('train', 'report')} >/dev/full", 1, "error: standard output: No space left on device; the "
         "same command goes on from what was saved\n"),
        (f"(sleep 1; {HELP.replace('train', 'report')}) | true", 1, ""),
        (f"{HELP.replace('--help', 'recipe=nope')} 2>/dev/full", 2, ""),
        (f"mkdir gone; cd gone; rmdir ../gone; {HELP}", 2,
         "error: the current folder is no more; must be one that exists\n"),
    ],
)  # fmt: skip
def test_streams_and_folders(tmp_path, line, code, said):
    assert shell(line, tmp_path)[:2] == (code, said)


def test_a_reader_that_goes_away_early_is_no_error(tmp_path):
    """More than a pipe holds: the write itself fails, not only the last one."""
    program = "from kd.cli import errors as cli\nwith cli.one_line_errors('kd.report'):\n    print('line\\n' * 100_000)"
    assert shell(f'{sys.executable} -c "$PROGRAM" | head -1', tmp_path, PROGRAM=program) == (1, "", "line\n")
    said = "error: standard output: nobody reads it any more; the same command goes on from what was saved\n"
    program = program.replace("report", "train")  # which is not finished
    assert shell(f'{sys.executable} -c "$PROGRAM" | head -1', tmp_path, PROGRAM=program) == (1, said, "line\n")
    program = program.replace(
        "print('line", "from kd.cli.console import terminal; terminal().print('line"
    )  # rich's, of runs
    assert shell(f'{sys.executable} -c "$PROGRAM" | head -1', tmp_path, PROGRAM=program) == (1, said, "line\n")


def test_a_stop_that_nobody_hears_of_is_one(tmp_path):
    program = "import os; from kd.runtime import signals; signals.listen(); os.kill(os.getpid(), 15)"
    assert shell(f'{sys.executable} -c "$PROGRAM" 2>/dev/full', tmp_path, PROGRAM=program)[0] == 0


def test_an_ascii_terminal_gets_escapes(tmp_path):
    program = "from kd.cli import errors as cli\nwith cli.one_line_errors('kd.train'):\n    print('\\u2212 0.83')"
    line = f'{sys.executable} -c "$PROGRAM"'
    assert shell(line, tmp_path, PROGRAM=program, PYTHONIOENCODING="ascii") == (0, "", "\\u2212 0.83\n")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["abc", "", "-1"])
def test_a_launchers_variable_that_is_no_number(monkeypatch, capsys, name, value):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop, cli.one_line_errors("kd.train"):
        pass
    said = f"error: {name}={value}: must be a whole number; torchrun sets it, one process needs none\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, said)


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"WORLD_SIZE": "0"}, "RANK=0: must be < WORLD_SIZE=0, which must be > 0"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "RANK=5: must be < WORLD_SIZE=2, which must be > 0"),
        ({"WORLD_SIZE": None, "LOCAL_RANK": None, "RANK": "3"}, "RANK=3: must be < WORLD_SIZE=1, which must be > 0"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": None}, "MASTER_ADDR: is not set, but LOCAL_RANK, MASTER_PORT, RANK, WORLD"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc: must be a whole number"),
        ({"LOCAL_RANK": None, "WORLD_SIZE": "2"}, "LOCAL_RANK: is not set, but MASTER_ADDR, MASTER_PORT, RANK, WORLD_"),
        ({"RANK": "١"}, "RANK=١: must be a whole number"),
    ],
)
def test_a_launchers_variables_that_do_not_go_together(monkeypatch, capsys, changed, said):
    """Whoever would be silent, as all but the first are, says it: which of them is the first is what is wrong."""
    for name, value in (TORCHRUN | changed).items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as stop, cli.one_line_errors("kd.train"):
        pass
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("program", "variables"),
    [
        ("kd.train", TORCHRUN),
        ("kd.train", TORCHRUN | {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}),
        ("kd.train", {"WORLD_SIZE": "1"}),
        ("kd.train", {"MASTER_PORT": "tcp://10.0.0.1:1234"}),  # what a pod beside a service named master gets
        ("kd.report", {"WORLD_SIZE": "2"}),  # a job's script, whose other line is torchrun's
    ],
)
def test_what_launchers_set_is_fine(monkeypatch, program, variables):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with cli.one_line_errors(program):
        pass


def test_a_command_beside_torchrun_is_not_silent(monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit), cli.one_line_errors("kd.report"):
        raise ConfigError("said")
    assert capsys.readouterr().err == "error: said\n"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")],
)
def test_no_memory_is_one_line(capsys, error):
    with pytest.raises(SystemExit) as stop, cli.one_line_errors("kd.train"):
        raise error
    assert (stop.value.code, capsys.readouterr().err) == (1, f"error: {cli.NO_MEMORY}\n")
