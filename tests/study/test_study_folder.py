"""What stands in a study's folder and is not its own: nothing of it is written over, or written through."""

import os
from pathlib import Path

import pytest

STUDY = Path("checkpoints/studies/tiny")


def test_hydras_own_file_is_not_written_through_a_link(kd_study, tmp_path):
    mine, link = tmp_path / "mine", STUDY / "jobs" / "hydra" / "multirun.yaml"
    mine.write_text("mine")
    link.parent.mkdir(parents=True)
    link.symlink_to(mine)
    words = ["study.seeds=1", "loss.temperature=4", "loss.student_temperature=1", "teacher.label_smoothing=0"]
    assert kd_study(*words, "study.contrasts=[]", "study.controls=[]").code == 0
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("where", [".", "points", "jobs", "runs"])
def test_a_file_where_a_folder_belongs_is_said_before_any_work(where, kd_study):
    path = Path(os.path.normpath(STUDY / where))
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    done = kd_study()
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: name=tiny: {path} is a file; choose another name or output=FOLDER\n"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.write_text('{"schema": 2, "points": [], "more": 1}'), "schema 2, this kd reads 1; move it away"),
        (lambda p: p.write_text('{"mine": 1}'), "schema None, this kd reads 1; move it away"),
        (lambda p: p.write_text("[1]"), "must be an object, is a list; move it away"),
        (lambda p: p.write_text('{"schema": 1, "na'), "; move it away"),
        (os.mkfifo, "is a pipe, must be a file; move it away"),
        (Path.mkdir, "is a folder, must be a file; move it away"),
    ],
)
@pytest.mark.parametrize("dry", ["true", "false"])
def test_a_study_json_that_is_somebody_elses_is_not_written_over(make, said, dry, kd_study):
    STUDY.mkdir(parents=True)
    make(STUDY / "study.json")
    before = inodes(STUDY.parent)
    done = kd_study(f"dry_run={dry}")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "study.json: " in done.err
    assert said in done.err
    assert inodes(STUDY.parent) == before


def inodes(folder: Path) -> dict[Path, tuple[int, int]]:
    """Everything inside, with what changes when it is written."""
    return {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in folder.rglob("*")}
