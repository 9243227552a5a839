"""metrics.jsonl: lines that are JSON whatever happens, and none of an update that was not saved."""

import errno
import io
import json
import math
import os

import pytest
from accelerate import Accelerator
from rich.console import Console

from kd.errors import CheckpointError
from kd.training.logger import Logger


@pytest.fixture
def logger(tmp_path):
    return Logger(tmp_path / "run" / "metrics.jsonl", Accelerator(cpu=True), Console(file=io.StringIO(), width=20))


def entries(logger):
    return [json.loads(line) for line in logger.path.read_text().splitlines()]


def test_a_value_that_is_not_finite_is_null(logger):
    logger.write({"stage": "student", "update": 1, "loss": math.nan, "lr": 0.1})
    assert entries(logger) == [{"stage": "student", "update": 1, "loss": None, "lr": 0.1}]


def test_lines_after_the_checkpoint_are_dropped_and_other_stages_kept(logger):
    """A validation that was not saved is dropped, and the update before it is not."""
    logger.write({"stage": "control", "update": 30, "epoch": 2})
    for line in ({"update": 5}, {"update": 5, "val_top1": 0.5}, {"update": 10}, {"update": 10, "val_top1": 0.6}):
        logger.write({"stage": "student", "epoch": line["update"] // 10, **line})
    logger.write({"stage": "student", "update": 11, "epoch": 1})
    logger.rewind("student", 10, 1)
    kept = [("val_top1" in e, e["stage"], e["update"]) for e in entries(logger)]
    assert kept == [(False, "control", 30), (False, "student", 5), (True, "student", 5), (False, "student", 10)]


def test_a_truncated_line_is_dropped_and_later_ones_are_whole(logger):
    """What a kill or a power failure leaves at the end of a file."""
    logger.write({"stage": "student", "update": 1})
    with logger.path.open("ab") as file:
        file.write(b'[1]\n{"update": 2}\n\n\xff\xfe\xc3\n\0\0\n{"stage": "student", "update": 2')
    logger.rewind("student", 1, 0)
    logger.write({"stage": "student", "update": 2})
    assert [e["update"] for e in entries(logger)] == [1, 2]


def test_a_full_disk_is_one_error_with_the_path(logger, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    logger.write({"stage": "student", "update": 1})
    monkeypatch.setattr(os, "fsync", full)
    for act in (logger.flush, lambda: logger.rewind("control", 0, 0)):
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
            act()
    logger.path.unlink()
    logger.path.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="No space left on device"):
        logger.write({"stage": "student", "update": 1})


def test_only_the_main_process_writes(logger, monkeypatch):
    monkeypatch.setattr(type(logger.accelerator), "is_main_process", False)
    logger.write({"stage": "student", "update": 1})
    logger.say("hello")
    assert not logger.path.exists()
    assert logger.console.file.getvalue() == ""


def test_a_terminal_gets_a_progress_bar_and_a_file_gets_none(logger):
    with logger.progress("student", 20, 5):
        logger.advance(6)
    assert logger.console.file.getvalue() == ""
    logger.console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with logger.progress("student", 20, 5):
        logger.advance(7)
        logger._bar.refresh()
    assert "7/20" in logger.console.file.getvalue()


def test_a_long_path_is_never_wrapped_nor_its_brackets_read_as_markup(logger):
    logger.say("/a/path/[red]/" + "x" * 50)
    assert logger.console.file.getvalue() == "/a/path/[red]/" + "x" * 50 + "\n"
