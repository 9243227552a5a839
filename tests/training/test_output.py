"""output=: refused in one line that names it where it cannot be written to, and only read where nothing is written."""

import os
import shutil

from kd import evaluate
from tests.training.test_train import files

RUN = ("recipe=smoke", "control=false", "run=one")


def test_an_output_that_cannot_be_a_directory_is_refused_before_anything_is_made(kd_train, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nothing")
    for output, nearest in {"file": "file", "file/inner": "file", "dangling": "dangling"}.items():
        done = kd_train(*RUN, f"output={output}")
        said = f"error: output={output}: must be a directory that exists or can be made ({nearest} is not one)\n"
        assert (done.code, done.err) == (2, said)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling"}


def test_a_finished_run_is_read_where_nothing_can_be_written(kd_train, tmp_path, monkeypatch):
    assert kd_train(*RUN, "output=runs").code == 0
    before = files(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "student" in kd_train(*RUN, "output=runs").out.splitlines()[-4]
    assert evaluate.main(["run=runs/smoke/one"]) == 0
    assert files(tmp_path) == before
    shutil.rmtree(tmp_path / "runs/smoke/one")
    done = kd_train(*RUN, "output=runs")
    assert done.err == "error: output=runs: must be a directory that exists or can be made (runs: Permission denied)\n"
    assert done.code == 2
