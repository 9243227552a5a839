"""Replay: a finished run trained again comes out equal; what differs is named before any work."""

import json

import pytest

from kd.training.replay import report

RUN = ("recipe=smoke", "output=runs", "run=one", "control=false")


def test_a_replay_is_identical_and_every_difference_is_named(kd_train, tmp_path):
    assert kd_train(*RUN).code == 0
    done = kd_train("replay=runs/smoke/one", "output=again")
    assert done.code == 0
    assert "weights  identical\nscores   identical\n" in done.out
    assert "earlier replay" not in done.out
    assert (tmp_path / "again/teachers").is_dir()  # trained, not found

    past = tmp_path / "runs/smoke/one/result.json"
    sha256 = json.loads(past.read_text())["student"]["sha256"]
    past.write_text(past.read_text().replace(sha256, "0" * 64))
    done = kd_train("replay=runs/smoke/one", "output=again", "allow_differences=yes")
    assert (done.code, f"student's sha256: {'0' * 64}, now {sha256}" in done.out) == (1, True)
    assert "an earlier replay is found in again/smoke/one" in done.out
    result = json.loads(past.read_text())
    result["provenance"]["versions"]["torch"], result["provenance"]["data_hash"] = "1.0\x1b", "0"
    past.write_text(json.dumps(result))
    refused = kd_train("replay=runs/smoke/one", "output=third")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "torch: 1.0\\x1b, now " in refused.err
    assert "data_hash: 0, now " in refused.err
    assert not (tmp_path / "third").exists()
    assert "is the old run's" in kd_train("replay=runs/smoke/one", "output=runs").err
    assert "(No such file or directory); give the directory of a finished run" in kd_train("replay=runs").err
    saved = tmp_path / "runs/smoke/one/recipe.yaml"
    saved.write_text(saved.read_text().replace("seed: 0", "seed: 1", 1))
    assert "; seed: 0, now 1; " in kd_train("replay=runs/smoke/one").err


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({}, 0, "weights  identical\nscores   identical\n"),
        ({"sha256": "b"}, 1, "student's sha256: a, now b"),
        ({"last": {"test": {"top1": 0.75}}}, 1, "largest difference 0.25 (student.last.test.top1)"),
    ],
)
def test_differences_in_weights_and_scores_are_named(capsys, change, code, said):
    old = {"student": {"sha256": "a", "last": {"test": {"top1": 0.5}}}}
    assert report(old, {"student": old["student"] | change}) == code
    assert said in capsys.readouterr().out
