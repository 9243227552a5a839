"""Commands in odd places: streams closed, full, of ASCII or read no further, a folder that is gone, no memory."""

import os
import subprocess
import sys

import pytest

from kd import cli
from kd.recipe import PACKAGE

HELP = f"{sys.executable} -m kd.train --help"


def shell(line, folder, **environment):
    """What a line of a shell came to: exit code of its first command and all of stderr."""
    words = ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"]
    more = {"PYTHONPATH": str(PACKAGE.parent), **environment}
    done = subprocess.run(words, cwd=folder, env=os.environ | more, capture_output=True, text=True)
    return done.returncode, done.stderr, done.stdout


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"{HELP} >&-", 0, ""),
        (f"{HELP} 2>&-", 0, ""),
        (f"{HELP} >/dev/full", 1, "error: standard output: No space left on device; the same command goes on from "
         "what was saved\n"),
        (f"mkdir gone; cd gone; rmdir ../gone; {HELP}", 2,
         "error: the current folder is no more; must be one that exists\n"),
    ],
)  # fmt: skip
def test_streams_and_folders(tmp_path, line, code, said):
    assert shell(line, tmp_path)[:2] == (code, said)


def test_a_reader_that_goes_away_early_is_no_error(tmp_path):
    """More than a pipe holds: the write itself fails, not only the last one."""
    program = "from kd import cli\nwith cli.one_line_errors('kd.train'):\n    print('line\\n' * 100_000)"
    assert shell(f'{sys.executable} -c "$PROGRAM" | head -1', tmp_path, PROGRAM=program) == (1, "", "line\n")


def test_an_ascii_terminal_gets_escapes(tmp_path):
    program = "from kd import cli\nwith cli.one_line_errors('kd.train'):\n    print('\\u2212 0.83')"
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


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")],
)
def test_no_memory_is_one_line(capsys, error):
    with pytest.raises(SystemExit) as stop, cli.one_line_errors("kd.train"):
        raise error
    assert (stop.value.code, capsys.readouterr().err) == (1, f"error: {cli.NO_MEMORY}\n")
