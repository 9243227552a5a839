"""output=: refused in one line that names it where it cannot be written to, and only read where nothing is written."""

import os
import shutil
import tempfile

from kd import evaluate
from tests.training.test_train import files

RUN = ("recipe=smoke", "control=false", "run=one")


def test_an_output_folder_that_cannot_be_is_refused_before_anything_is_made(kd_train, tmp_path):
    os.symlink("loop", "loop")
    os.symlink("nothing", "dangling")
    for name, make in (("file", lambda p: p.write_text("")), ("link", lambda p: p.symlink_to("nothing"))):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "teachers")
    before = files(tmp_path).keys(), sorted(tmp_path.iterdir())
    long = "x" * 300
    for output, said in {
        "loop": "loop: Too many levels of symbolic links",
        "loop/inner": "loop/inner: Too many levels of symbolic links",
        long: f"{long}: File name too long",
        "/proc/kd": "/proc/kd: No such file or directory",
        "dangling": "dangling: is no folder",
        "dangling/inner": "dangling: is no folder",
        "file": "file/teachers: is no folder",
        "link": "link/teachers: is no folder",
        "file/teachers/inner": "file/teachers/inner: Not a directory",
    }.items():
        done = kd_train(*RUN, f"output={output}")
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert done.err == f"error: output={output}: must be a folder that exists or can be made ({said})\n"
        assert (files(tmp_path).keys(), sorted(tmp_path.iterdir())) == before


def test_a_finished_run_is_read_where_nothing_can_be_written(kd_train, tmp_path, monkeypatch):
    assert kd_train(*RUN, "output=runs").code == 0
    before = files(tmp_path)

    def read_only(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "student" in kd_train(*RUN, "output=runs").out.splitlines()[-4]
    assert evaluate.main(["run=runs/smoke/one"]) == 0
    assert files(tmp_path) == before
    shutil.rmtree(tmp_path / "runs/smoke/one")
    done = kd_train(*RUN, "output=runs")
    assert done.err == "error: output=runs: must be a folder that exists or can be made (runs: Permission denied)\n"
    assert done.code == 2
