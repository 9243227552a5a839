"""``python -m kd.study`` in this process: from a recipe to a table, again, and what goes wrong."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from kd import metrics
from kd.config.schema import DataConfig
from kd.data import load_data
from kd.errors import ConfigError
from kd.models.factory import build
from kd.study import load, train_population, worker
from kd.study.folder import Folder

STUDY = Path("checkpoints/studies/tiny")
POINTS = 2 * (2 + 6 + 2)  # seeds x (teachers + students, of which two of eight cells are another's + controls)
ONE_SEED = ["study.seeds=1", "study.contrasts=[]"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the first test that needs a finished study leaves it for the others, with what it printed."""
    return tmp_path_factory.mktemp("study") / "checkpoints", []


@pytest.fixture
def finished(kd_study, kept):
    directory, printed = kept
    if not printed:
        done = kd_study()
        assert done.code == 0, done.err
        shutil.copytree("checkpoints", directory)
        printed.append(done)
    else:
        shutil.copytree(directory, "checkpoints")
    return printed[0]


def count_training(monkeypatch) -> list[str]:
    """The names of the jobs that train from now on."""
    seen, do = [], worker.do
    monkeypatch.setattr(worker, "do", lambda folder, job: (seen.append(job.name), do(folder, job)))
    return seen


def test_a_study_ends_in_a_table_of_all_its_points_and_its_contrasts(finished):
    table, card = load(STUDY), json.loads((STUDY / "study.json").read_text())
    assert len(table) == len(card["points"]) == POINTS
    assert (table["state"] == "finished").all()
    assert table["role"].value_counts().to_dict() == {"teacher": 4, "control": 4, "student": 12}
    assert len(card["cells"]) == 16
    assert len({cell["point"] for cell in card["cells"]}) == 12
    measured = {column for column in table if column.split(".")[0] in ("train", "val", "test")}
    assert measured <= {f"{split}.{name}" for name, metric in metrics.METRICS.items() for split in metric.splits}

    def value(seed, metric="test.top1", **settings):
        rows = table[(table["seed"] == seed) & table["loss.student_temperature"].isna()]
        for key, wanted in settings.items():
            rows = rows[rows[{"eps": "teacher.label_smoothing", "t": "loss.temperature"}.get(key, key)] == wanted]
        (found,) = rows[rows["role"] == settings.get("role", "student")][metric]
        return found

    differences = [
        value(s, eps=0.4, t=4) - value(s, eps=0, t=4) - value(s, eps=0.4, t=1) + value(s, eps=0, t=1) for s in (0, 1)
    ]
    said = dict(re.findall(r"^(\S.*?)  .* ([-+]\S+ ± \S+) \(standard error, 2 seeds\)$", finished.out, re.MULTILINE))
    mean, error = said["smoothing at T 4"].split(" ± ")
    assert float(mean) == pytest.approx(np.mean(differences), abs=6e-5)
    assert float(error) == pytest.approx(np.std(differences, ddof=1) / np.sqrt(2), abs=6e-5)
    against = [value(s, "val.nll", eps=0.4, t=1) - value(s, "val.nll", role="control", control="hard") for s in (0, 1)]
    assert float(said["against the labels alone"].split()[0]) == pytest.approx(np.mean(against), abs=6e-5)


def test_what_is_stored_is_what_the_saved_teacher_gives(finished):
    """From the weights on disk, through kd.models, with the metrics' own functions."""
    table, data = load(STUDY), load_data(DataConfig(image_size=8, shift=1), 0)
    for identifier in table[table["role"] == "teacher"]["point"]:
        point = Folder(STUDY).read_point(identifier)
        net = build("mlp_tiny", num_classes=10, input_shape=(1, 8, 8)).eval()
        net.load_state_dict(load_file(Folder(STUDY).weights(identifier)))
        (batch,) = data.test.batches([torch.arange(len(data.test))], None)
        with torch.no_grad():
            logits, features = net(batch.images), net.forward_features(batch.images)
        stored = point["metrics"]["test"]
        assert stored["nll"] == pytest.approx(metrics.nll(logits, batch.targets).item(), abs=1e-6)
        separation = metrics.class_separation(features, batch.targets).item()
        assert stored["class_separation"] == pytest.approx(separation, abs=1e-5)
        assert point["settings"]["teacher.label_smoothing"] in (0.0, 0.4)
        assert point["provenance"]["data_hash"] == data.hash
        shown = sum(min(100, (batch.targets == c).sum().item()) for c in (0, 1, 2))
        assert len(point["detail"]["projection"]["test"]["points"]) == shown


def test_finished_points_are_trained_never_again_and_lost_ones_are_made_alike(finished, kd_study, monkeypatch):
    """As after a kill in the middle of writing: some points of a job are there, others are not."""
    table = (STUDY / "table.csv").read_bytes()
    trained = count_training(monkeypatch)
    again = kd_study()
    assert (again.code, trained) == (0, [])
    assert "0 to do; 20 points are finished" in again.out
    assert "another grid" not in again.out
    points = sorted((STUDY / "points").glob("*.json"))
    kept = {path: path.stat().st_mtime_ns for path in points if path not in points[::3]}
    for path in points[::3]:
        path.unlink()
    assert kd_study().code == 0
    assert 0 < len(trained) <= 4
    assert (STUDY / "table.csv").read_bytes() == table
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_wider_grid_trains_only_what_is_new(finished, kd_study):
    before = set((STUDY / "points").glob("*.json"))
    done = kd_study("loss.temperature=1,2", *ONE_SEED)
    assert done.code == 0, done.err
    assert "study.json was of another grid, of 20 points" in done.out
    new = [json.loads(path.read_text()) for path in set((STUDY / "points").glob("*.json")) - before]
    assert len(new) == 4  # two teachers x T 2 x two student temperatures
    assert {point["settings"]["loss.temperature"] for point in new} == {2.0}
    assert len(load(STUDY)) == 2 + (2 + 4) + 2  # the table is that of the grid asked for


def test_a_study_of_another_kd_is_one_line(finished, kd_study):
    card = json.loads((STUDY / "study.json").read_text())
    (STUDY / "study.json").write_text(json.dumps(card | {"schema": 2}))
    with pytest.raises(ConfigError, match=r"study\.json: has schema 2, this kd reads 1; .*output=DIR"):
        load(STUDY)
    done = kd_study()
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    with pytest.raises(ConfigError, match=r"holds no study\.json"):
        load("checkpoints")


def test_two_commands_on_one_study_do_not_meet(finished, kd_study):
    with Folder(STUDY).lock():
        done = kd_study()
    assert done.code == 2
    assert f"process {os.getpid()} on " in done.err


def test_the_benchmarks_command_line_is_the_points_own_recipe(finished, kd_train):
    """What it times through kd.train is the student that the study trained, teacher and all."""
    from benchmarks.study import overrides
    from kd.config.types import flat

    point = next(p for p in map(Folder(STUDY).read_point, load(STUDY)["point"]) if p["role"] == "student")
    done = kd_train(*overrides(point), "--cfg", "job")
    assert done.code == 0, done.err
    shown = flat(yaml.safe_load(done.out))
    for key, value in point["settings"].items():
        assert shown[key] == value, key


# ---- what goes wrong


def test_a_point_that_fails_is_told_stops_no_other_and_is_tried_again(kd_study, monkeypatch):
    measure = train_population.measure

    def fails(role, *given):
        if role == "student":
            raise RuntimeError("disk on fire\nand more")
        return measure(role, *given)

    words = [*ONE_SEED, "study.controls=[]"]
    with monkeypatch.context() as patched:
        patched.setattr(train_population, "measure", fails)
        done = kd_study(*words)
    assert done.code == 1
    assert done.out.count("RuntimeError: disk on fire") == 6
    assert load(STUDY)["state"].value_counts().to_dict() == {"failed": 6, "finished": 2}
    assert kd_study(*words).code == 0
    assert (load(STUDY)["state"] == "finished").all()


@pytest.mark.parametrize("engine", ["population", pytest.param("runs", marks=pytest.mark.torture)])
def test_students_without_their_teacher_are_missing(engine, kd_study, monkeypatch):
    """A launcher that breaks, as when a worker is killed for its memory, in the phase of the teachers."""
    do = worker.do

    def teachers_are_killed(folder, job):
        if job.phase == "teachers":
            raise BrokenPipeError("a worker was killed")
        do(folder, job)

    monkeypatch.setattr(worker, "do", teachers_are_killed)
    done = kd_study(*ONE_SEED, "loss.temperature=1", "teacher.label_smoothing=.4", f"study.engine={engine}")
    assert done.code == 1
    assert "teachers: BrokenPipeError: a worker was killed" in done.out
    table = load(STUDY)
    assert table["state"].value_counts().to_dict() == {"finished": 2, "missing": 2}


def test_students_of_a_teacher_that_diverged_are_missing(kd_study):
    done = kd_study(*ONE_SEED, "optimizer.lr=1e6", "optimizer.weight_decay=1e6", "study.controls=[]")
    assert done.code == 1
    table = load(STUDY)
    teachers = table[table["role"] == "teacher"]
    assert teachers["error"].str.startswith("diverged: ").all()
    assert set(table["state"][table["role"] != "teacher"]) == {"missing"}


# ---- engines


def test_both_engines_make_the_same_points(kd_study):
    """Through kd.train's own loop, each alone, with the fused loss: the same names, and the same figures to 1e-4."""
    words = [*ONE_SEED, "loss.temperature=4", "loss.student_temperature=1"]
    assert kd_study(*words, "output=one").code == 0
    done = kd_study(*words, "output=many", "study.engine=runs")
    assert done.code == 0, done.err
    one, many = (load(f"{output}/studies/tiny").set_index("point") for output in ("one", "many"))
    assert list(one.index) == list(many.index)
    assert len(one) == 6
    for metric in ("train.nll", "val.nll", "test.nll", "test.brier", "test.nt_kl", "test.predictive_kl"):
        np.testing.assert_allclose(many[metric].astype(float), one[metric].astype(float), atol=1e-4)
    assert (one["test.top1"] - many["test.top1"]).abs().max() < 0.01


@pytest.mark.parametrize(
    ("axis", "column", "alone"),
    [("loss=kd,rkd", "loss.methods", "rkd"), ("loss.class_weight=null,balanced", "loss.class_weight", "balanced")],
)
def test_what_a_population_cannot_train_runs_alone_with_the_same_teacher(axis, column, alone, kd_study):
    words = ["loss.temperature=1", "teacher.label_smoothing=0", "loss.ce_weight=.5", "study.controls=[]"]
    done = kd_study(*ONE_SEED, axis, *words)
    assert done.code == 0, done.err
    assert "(population, runs)" in done.out
    table = load(STUDY)
    teacher, *students = [Folder(STUDY).read_point(identifier) for identifier in table["point"]]
    engines = {
        alone in str(cell): p["provenance"]["engine"] for cell, p in zip(table[column][1:], students, strict=True)
    }
    assert (teacher["provenance"]["engine"], engines) == ("population", {False: "population", True: "runs"})
    assert len({p["metrics"]["test"]["nll"] for p in students}) == 2


# ---- the command line


def test_dry_run_counts_and_writes_nothing(kd_study, tmp_path):
    done = kd_study("dry_run=true", "study.seeds=7", "teacher.label_smoothing=0,.1")
    assert done.code == 0
    assert "70 points (14 teachers, 42 students, 14 controls) of 56 cells, 0 contrasts" in done.out
    assert 'left out smoothing at T 4: study.contrasts: {"teacher.label_smoothing": 0.4, ' in done.out
    assert "about" in done.out
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.temprature=1,2"], "loss.temprature: no such setting; did you mean loss.temperature?"),
        (["loss.kd_weight=0,1", "loss.ce_weight=1"], "loss.kd_weight=0: is the control `hard`"),
        (["study.controls=[bayes]"], "bayes needs a data set whose posterior is known, not digits"),
        (["study.grid={}"], "study.grid={}: type an axis as SETTING=A,B"),
        (
            ["optimizer.name=lamb", "study.engine=population"],
            "cannot train a student, optimizer.name=lamb",
        ),
        (["train.batch_size=5000"], "train.batch_size=5000: must be ≤ 1293"),
        (["loss.class_weight=[1,2]", "loss.ce_weight=1"], "loss.class_weight=[1.0, 2.0]: must be 10 numbers"),
        (["teacher.members=2"], "teacher.members=2: must be 1 in a study"),
        (["student.model=mlp_tiny,mlp_huge", "study.contrasts=[]"], "student.model=mlp_huge"),
    ],
)
def test_a_command_line_that_cannot_work_is_one_line(words, said, kd_study, tmp_path):
    done = kd_study(*words)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err
    assert not (tmp_path / "checkpoints").exists()
