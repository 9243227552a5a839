"""Files that are whole and another's: another stage's, or another run's, are refused before any work."""

import json
import shutil

import pytest

from kd.checkpoint.manifest import seal
from kd.training import pipeline as stages
from kd.verify import main
from tests.checkpoint.test_checkpoint_runs import stopped
from tests.training.test_train import files

RUN = ("recipe=smoke", "output=runs")


@pytest.fixture
def refused(kd_train, monkeypatch, tmp_path):
    """Run a command that must stop with one line before any stage works; returns the line."""

    def call(*words: str) -> str:
        before = files(tmp_path)
        with monkeypatch.context() as patch:
            for name in ("find_teacher", "train"):
                patch.setattr(stages, name, lambda *_: pytest.fail("worked before it looked"))
            done = kd_train(*words)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert files(tmp_path) == before
        return done.err

    return call


def test_weights_of_another_stage_or_run_are_refused_and_found_by_verify(
    kd_train, refused, monkeypatch, tmp_path, capsys
):
    for seed in (0, 5):
        assert kd_train(*RUN, f"run=s{seed}", f"seed={seed}").code == 0
    (tmp_path / "runs").rename(tmp_path / "moved")  # a whole output folder may move
    run, other = tmp_path / "moved/smoke/s0", tmp_path / "moved/smoke/s5"
    (run / "result.json").unlink()
    words = ("recipe=smoke", "output=moved", "run=s0")
    assert kd_train(*words).code == 0
    assert main(["verify", str(run), *map(str, (tmp_path / "moved/teachers").iterdir())]) == 0
    (run / "result.json").unlink()
    student = run / "student"
    student.rename(own := run / "own")

    shutil.copytree(run / "control", student)
    assert "student/stage.json: is of stage control, run " in (said := refused(*words))
    assert ", must be of stage student, run " in said
    capsys.readouterr()
    assert main(["verify", str(run)]) == 1
    assert "stage.json: is of stage control" in capsys.readouterr().out
    assert main(["verify", str(student / "last.safetensors")]) == 1
    assert "stage.json: is of stage control" in capsys.readouterr().out
    monkeypatch.chdir(student)
    assert main(["verify", "../student/../student/."]) == main(["verify", "last.safetensors"]) == 1
    monkeypatch.chdir(tmp_path)

    shutil.rmtree(student)
    shutil.copytree(other / "student", student)
    mine, theirs = (json.loads((f / "stage.json").read_text())["run"] for f in (own, student))
    assert f"is of stage student, run {theirs}, must be of stage student, run {mine}; restore" in refused(*words)
    assert main(["verify", str(student)]) == 1

    shutil.rmtree(student)
    own.rename(student)
    first, second = sorted((tmp_path / "moved/teachers").iterdir(), key=lambda f: (f / "stage.json").stat().st_mtime)
    shutil.rmtree(first)
    shutil.copytree(second, first)
    done = kd_train(*words)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"is of stage teacher, run {second.name}, must be of stage teacher, run {first.name}" in done.err
    assert main(["verify", str(first)]) == 1


def test_an_unfinished_stage_of_another_run_is_not_gone_on_with(kd_train, refused, monkeypatch, tmp_path):
    words = ("student.epochs=2", "train.ema_decay=0.5")
    stopped(kd_train, monkeypatch, "runs", 3)
    student = tmp_path / "runs/smoke/one/student"
    shutil.rmtree(student)
    with monkeypatch.context() as patch:
        patch.setattr(
            "tests.checkpoint.test_checkpoint_runs.RUN", ("recipe=smoke", "control=false", "run=nine", "seed=9", *words)
        )
        stopped(kd_train, patch, "runs", 3)
    shutil.copytree(tmp_path / "runs/smoke/nine/student", student)
    state = next(student.glob("checkpoints/update-00000003/state.safetensors"))
    monkeypatch.chdir(state.parent)
    assert main(["verify", str(state)]) == main(["verify", "../.."]) == main(["verify", "."]) == 1
    monkeypatch.chdir(tmp_path)
    said = refused(*RUN, "control=false", "run=one", *words)
    assert "update-00000003/manifest.json: is of stage student, run " in said
    with monkeypatch.context() as patch:  # the loop looks for itself
        patch.setattr(stages, "belongs", lambda *_: None)
        said = kd_train(*RUN, "control=false", "run=one", *words).err
        assert "update-00000003/manifest.json: is of" in said
        assert said.endswith("; resume=false sets the run aside and trains again\n")


def of_nobody(path):
    """A manifest as kd wrote them before they said whose they are."""
    values = json.loads(path.read_text())
    about = {key: value for key, value in values.items() if key not in ("stage", "run", "files", "schema")}
    path.write_text(seal(path.parent, list(values["files"]), about))


def test_files_of_a_kd_that_did_not_say_whose_they_are_are_not_called_anothers(kd_train, refused, tmp_path):
    words = (*RUN, "control=false", "run=one")
    assert kd_train(*words).code == 0
    (tmp_path / "runs/smoke/one/result.json").unlink()
    of_nobody(done := tmp_path / "runs/smoke/one/student/stage.json")
    said = "was written by an earlier kd, which did not say of which stage and run it is; "
    assert f"{done.relative_to(tmp_path)}: {said}resume=false sets the run aside" in refused(*words)
    assert main(["verify", str(done.parent)]) == 1
    assert kd_train(*words, "resume=false").code == 0
    (teacher,) = (tmp_path / "runs/teachers").iterdir()
    of_nobody(teacher / "stage.json")
    done = kd_train(*words, "resume=false")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"stage.json: {said}move runs/teachers/{teacher.name} away" in done.err
    teacher.rename(tmp_path / "away")
    assert kd_train(*words, "resume=false").code == 0
