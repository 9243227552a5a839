"""What a run says: lines that are JSON whatever happens, and a bar where a person is looking."""

import errno
import io
import json
import math
import os
from functools import partial

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console

from kd.errors import CheckpointError
from kd.training.dry_run import duration
from kd.training.logger import Logger


@pytest.fixture
def journal(tmp_path):
    yield Logger(tmp_path / "run" / "metrics.jsonl", Accelerator(cpu=True), Console(file=io.StringIO(), width=200))
    AcceleratorState._reset_state(reset_partial_state=True)


def entries(journal):
    return [json.loads(line) for line in journal.path.read_text().splitlines()]


def test_a_value_that_is_not_finite_is_null(journal):
    journal.write({"stage": "student", "update": 1, "loss": math.nan, "lr": 0.1})
    assert entries(journal) == [{"stage": "student", "update": 1, "loss": None, "lr": 0.1}]


def test_rewinding_forgets_one_stage_after_an_update_and_torn_lines(journal):
    for stage, update in (("student", 1), ("student", 2), ("control", 3), ("student", 3)):
        journal.write({"stage": stage, "update": update})
    with journal.path.open("a") as file:
        file.write('{"stage": "stu')
    journal.rewind("student", 1, 0)
    assert [(e["stage"], e["update"]) for e in entries(journal)] == [("student", 1), ("control", 3)]


OTHERS = [
    "[" * 100_000 + "\n",
    "3\n",
    "null\n",
    "[1]\n",
    '"x"\n',
    '{"update": 2}\n',
    '{"stage": "student", "update": null}\n',
    "\n\n",
]
TORN = ["[" * 100_000, '{"stage": "student", "update": 2', "\0" * 4096]


@pytest.mark.parametrize("tail", [*OTHERS, *TORN])
def test_lines_that_are_none_of_ours_are_forgotten_and_later_ones_are_whole(journal, tail):
    """What a kill or a lost power supply leaves at the end of a file."""
    journal.write({"stage": "student", "update": 1})
    with journal.path.open("a") as file:
        file.write(tail)
    journal.rewind("student", 1, 0)
    journal.write({"stage": "student", "update": 2})
    assert [e["update"] for e in entries(journal)] == [1, 2]


def test_bytes_that_are_no_text_are_forgotten(journal):
    journal.write({"stage": "student", "update": 1})
    with journal.path.open("ab") as file:
        file.write(b"\xff\xfe\xc3\n")
    journal.rewind("student", 1, 0)
    assert [e["update"] for e in entries(journal)] == [1]


def test_a_validation_that_was_not_saved_is_forgotten_and_its_last_update_is_not(journal):
    for line in ({"update": 5}, {"update": 5, "val_top1": 0.5}, {"update": 10}, {"update": 10, "val_top1": 0.6}):
        journal.write({"stage": "student", "epoch": line["update"] // 10, **line})
    journal.rewind("student", 10, 1)
    assert [("val_top1" in e, e["update"]) for e in entries(journal)] == [(False, 5), (True, 5), (False, 10)]


def test_a_full_disk_is_one_error_with_the_path(journal, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal.write({"stage": "student", "update": 1})
    monkeypatch.setattr(os, "fsync", full)
    for act in (journal.flush, partial(journal.rewind, "control", 0, 0)):
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: No space left on device;"):
            act()
    journal.path.unlink()
    journal.path.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="No space left on device; 34 bytes needed"):
        journal.write({"stage": "student", "update": 1})


def test_only_the_main_process_writes(journal, monkeypatch):
    monkeypatch.setattr(type(journal.accelerator), "is_main_process", False)
    journal.write({"stage": "student", "update": 1})
    journal.say("hello")
    assert not journal.path.exists()
    assert journal.console.file.getvalue() == ""


def test_a_terminal_gets_a_bar_with_its_numbers_and_a_file_gets_none(journal):
    with journal.progress("student", 20, 5):
        journal.advance(6)
    assert journal.console.file.getvalue() == ""
    terminal = Console(file=io.StringIO(), width=100, force_terminal=True)
    journal.console = terminal
    with journal.progress("student", 20, 5):
        journal.advance(7)
        journal._bar.refresh()
    said = terminal.file.getvalue()
    assert "student" in said
    assert "7/20" in said


def test_a_long_path_is_never_wrapped_nor_its_brackets_read_as_markup(journal):
    journal.console = Console(file=io.StringIO(), width=20)
    journal.say("/a/path/[red]/" + "x" * 50)
    assert journal.console.file.getvalue() == "/a/path/[red]/" + "x" * 50 + "\n"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59, "59 s"), (90, "1.5 min"), (5400, "1.5 h"), (129600, "1.5 days")]
)
def test_durations_are_in_the_units_a_person_would_use(seconds, words):
    assert duration(seconds) == words
