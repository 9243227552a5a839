"""Replay: a finished run trained again comes out equal; what differs is named before any work."""

import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from kd.config.schema import Recipe
from kd.training import replay
from kd.training.logger import Logger
from kd.training.replay import report

RUN = ("recipe=smoke", "output=runs", "run=one")


def _files(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_replay_is_identical_and_every_difference_is_named(kd_train, tmp_path):
    assert kd_train(*RUN).code == 0
    before = _files(tmp_path / "runs")
    done = kd_train("replay=runs/smoke/one", "output=again")
    assert done.code == 0
    assert "weights  identical\nscores   identical\n" in done.out
    assert (tmp_path / "again" / "teachers").is_dir()  # trained, not found
    assert _files(tmp_path / "runs") == before

    path = tmp_path / "runs" / "smoke" / "one" / "result.json"
    result = json.loads(path.read_text())
    result["provenance"]["versions"]["torch"] = "1.0\x1b"
    result["provenance"]["data_hash"] = "0"
    path.write_text(json.dumps(result))
    before = _files(tmp_path)
    refused = kd_train(f"replay={path}", "output=third")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "torch: 1.0\\x1b, now " in refused.err
    assert "data_hash: 0, now " in refused.err
    assert "is the old run's" in kd_train("replay=runs/smoke/one", "output=runs").err
    for empty in ("replay=", "output=", "data.root="):  # as of shell variables that are not set
        words = (empty, *(["replay=runs/smoke/one"] if empty != "replay=" else []))
        assert kd_train(*words).err == f"error: {empty}: must not be empty\n"
    assert "takes the run's own recipe" in kd_train("replay=runs/smoke/one", "seed=1").err
    saved = path.with_name("recipe.yaml")
    saved.write_text(saved.read_text().replace("seed: 0", "seed: 1", 1))
    assert "is not the recipe of result.json" in kd_train("replay=runs/smoke/one").err
    assert _files(tmp_path).keys() == before.keys()


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({}, 0, "weights  identical\nscores   identical\n"),
        ({"sha256": "b"}, 1, "student's sha256: a, now b"),
        ({"last": {"test": {"top1": 0.75}}}, 1, "largest difference 0.25 (student.last.test.top1)"),
    ],
)
def test_what_came_out_otherwise_is_said(capsys, change, code, said):
    old = {"student": {"sha256": "a", "last": {"test": {"top1": 0.5}}}}
    assert report(old, {"student": old["student"] | change}) == code
    assert said in capsys.readouterr().out


def test_one_process_of_several_says_what_came_out(monkeypatch, capsys, tmp_path):
    network = {"student": {"sha256": "a", "last": {"test": {"top1": 0.5}}}}
    monkeypatch.setattr(replay, "read", lambda path: replay.Past(tmp_path / "one/two", Recipe(name="t"), network))
    monkeypatch.setattr(replay, "differences", lambda past, run: ())
    monkeypatch.setattr(replay, "outcome", lambda run: network)
    for main, said in ((True, "weights  identical\nscores   identical\n"), (False, "")):
        accelerator = SimpleNamespace(is_main_process=main)
        run = SimpleNamespace(directory=tmp_path, logger=Logger(tmp_path, accelerator, Console()))
        assert replay.main(["replay=x"], lambda recipe, check, run=run: check(run) or 0) == 0
        assert capsys.readouterr().out == said


def test_an_earlier_replay_is_said_to_be_one_and_its_weights_are_looked_at(kd_train, tmp_path):
    run = (*RUN, "control=false")
    assert kd_train(*run).code == 0
    assert "earlier replay" not in kd_train("replay=runs/smoke/one", "output=again").out
    done = kd_train("replay=runs/smoke/one", "output=again")
    assert done.code == 0
    assert "an earlier replay is found in again/smoke/one, its weights are compared" in done.out
    assert "weights  identical\n" in done.out

    stage = tmp_path / "again/smoke/one/student/stage.json"
    result = stage.parents[1] / "result.json"
    whole = result.read_text()
    sha = json.loads(whole)["student"]["sha256"]
    result.write_text(whole.replace(sha, "0" * 64))  # what it says of the weights is not what is compared
    past = tmp_path / "runs/smoke/one/result.json"
    past.write_text(past.read_text().replace(sha, "0" * 64))
    done = kd_train("replay=runs/smoke/one", "output=again")
    assert (done.code, f"student's sha256: {'0' * 64}, now {sha}" in done.out) == (1, True)
    for name in ("last", "selected"):
        (weights := stage.with_name(f"{name}.safetensors")).rename(tmp_path / name)
        done = kd_train("replay=runs/smoke/one", "output=again")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert f"{name}.safetensors: no such file; move again/smoke/one away and it is trained again" in done.err
        assert "weights  " not in done.out
        (tmp_path / name).rename(weights)
