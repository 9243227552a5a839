"""Every study: a claim on top, contrasts inside its grid and, made tiny, a run."""

import re
import sys

import pytest
from test_grid import stub

from kd.cli.help import claim
from kd.config.compose import recipe_files
from kd.study import load
from kd.study.compose import compose
from kd.study.grid import Plan

STUDIES = recipe_files("studies")
HEADER = ("claim", "paper", "command", "time", "hardware", "expected")
SHORT = ["study.seeds=1", "teacher.epochs=1", "student.epochs=1", "scheduler.warmup_epochs=0", "data.train_size=300"]

# How to run each in seconds; the points that it then has. A new study must say so here.
TINY = {
    "mnist1d_grid": ([*SHORT, "loss.temperature=4", "teacher.label_smoothing=.4"], 7),
    "mixture_bayes": ([*SHORT[1:-1], "study.seeds=2", "taught=T 1", "teacher.label_smoothing=.4", "points=600"], 10),
    "omitted_class": ([*SHORT, "teacher.label_smoothing=0,.4"], 7),
    "label_noise": ([*SHORT, "teacher.label_smoothing=0,.4", "data.label_noise=.3"], 8),
    "digits_reversal": ([*SHORT, "set=digits", "teacher.label_smoothing=0,.4"], 8),
    # Unsmoothed is the same as KD for the three teachers without smoothing.
    "remedies": ([*SHORT, "taught=KD T 4,unsmoothed T 4"], 12),
    "imagenet_r50_r18": None,  # its data is not here
}


def test_every_study_has_a_tiny_form():
    assert set(TINY) == set(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_opens_with_its_claim_and_its_contrasts_are_inside_its_grid(name, monkeypatch):
    """Planned as a whole, without data."""
    top = STUDIES[name].read_text().split("defaults:")[0]
    assert top.startswith("# @package _global_\n")
    for word in HEADER:
        assert re.search(rf"^# {word}:\s+\S", top, re.MULTILINE), f"{name}: no {word}"
    assert f"python -m kd.study recipe=studies/{name}" in top
    monkeypatch.setattr(sys, "argv", ["kd.study"])
    study, _ = compose([f"recipe=studies/{name}", "study.seeds=1"])
    assert study.name == name
    assert claim(STUDIES[name]) == study.study.claim
    made = Plan(study, lambda data: stub(data.name, posterior=True))
    assert made.contrasts
    assert not made.left_out


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny])
def test_a_tiny_study_runs_to_its_table(name, kd_study):
    words, points = TINY[name]
    done = kd_study(*words, recipe=f"studies/{name}")
    assert done.code == 0, done.err
    table = load(f"checkpoints/studies/{name}")
    assert len(table) == points
    assert (table["state"] == "finished").all()
    if name == "mixture_bayes":
        check_efficiency(table)


def check_efficiency(table) -> None:
    """It needs both controls of the student's seed; a teacher's columns stand beside its student's."""
    teachers = table[table["role"] == "teacher"].set_index("point")
    for _, student in table[table["role"] == "student"].iterrows():
        mine = table[table["seed"] == student["seed"]].set_index("control")
        hard, bayes = (mine.loc[name, "test.nt_kl"] for name in ("hard", "bayes"))
        expected = (hard - student["test.nt_kl"]) / (hard - bayes)
        efficiency = student["test.transfer_efficiency"]
        assert efficiency == pytest.approx(expected) if hard > bayes else efficiency != efficiency
        assert teachers.loc[student["teacher_point"], "points"] == student["points"]
        assert teachers.loc[student["teacher_point"], "test.top1"] == student["teacher.test.top1"]


def test_the_published_grid_needs_its_data(kd_study):
    done = kd_study("data.root=nowhere", recipe="studies/imagenet_r50_r18")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "data.root=nowhere" in done.err
