"""``python -m kd.study``: from a recipe to a table; resumed, failed, killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml

from kd import metrics
from kd.config.schema import PACKAGE
from kd.errors import ConfigError
from kd.study import load, train_population, worker
from kd.study.folder import Folder
from kd.training import loop

STUDY = Path("checkpoints/studies/tiny")
POINTS = 2 * (2 + 6 + 2)  # seeds x (teachers + students, of which two of eight cells are another's + controls)


@pytest.fixture
def finished(kd_study):
    done = kd_study()
    assert done.code == 0, done.err
    return done


def count_training(monkeypatch) -> list[str]:
    """The names of the jobs that train from now on."""
    seen, train = [], train_population.train
    monkeypatch.setattr(train_population, "train", lambda folder, job: (seen.append(job.name), train(folder, job))[1])
    return seen


def test_a_study_ends_in_a_table_of_all_its_points_and_its_contrasts(finished):
    table, card = load(STUDY), json.loads((STUDY / "study.json").read_text())
    assert len(table) == len(card["points"]) == POINTS
    assert (table["state"] == "finished").all()
    assert table["role"].value_counts().to_dict() == {"teacher": 4, "control": 4, "student": 12}
    assert len(card["cells"]) == 16
    assert len({cell["point"] for cell in card["cells"]}) == 12
    assert len(table[table["role"] == "teacher"]["test.top1"].unique()) > 2

    def value(seed, metric="test.top1", **settings):
        rows = table[(table["seed"] == seed) & table["loss.student_temperature"].isna()]
        for key, wanted in settings.items():
            rows = rows[rows[{"eps": "teacher.label_smoothing", "t": "loss.temperature"}.get(key, key)] == wanted]
        (found,) = rows[rows["role"] == settings.get("role", "student")][metric]
        return found

    differences = [
        value(s, eps=0.4, t=4) - value(s, eps=0, t=4) - value(s, eps=0.4, t=1) + value(s, eps=0, t=1) for s in (0, 1)
    ]
    line = next(line for line in finished.out.splitlines() if "smoothing at T 4" in line).split()
    assert float(line[-3]) == pytest.approx(np.mean(differences), abs=6e-5)
    assert float(line[-2]) == pytest.approx(np.std(differences, ddof=1) / np.sqrt(2), abs=6e-5)
    against = [value(s, "val.nll", eps=0.4, t=1) - value(s, "val.nll", role="control", control="hard") for s in (0, 1)]
    line = next(line for line in finished.out.splitlines() if "labels alone" in line).split()
    assert float(line[-3]) == pytest.approx(np.mean(against), abs=6e-5)


def test_what_is_stored_is_what_the_saved_teacher_gives(finished):
    """From the weights on disk, through kd.models, with the metrics' own functions."""
    from safetensors.torch import load_file

    from kd.config.schema import DataConfig
    from kd.data import load_data
    from kd.models.factory import build

    table = load(STUDY)
    data = load_data(DataConfig(image_size=8, shift=1), 0)
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
        assert len(point["detail"]["projection"]["test"]["points"]) == sum(
            min(100, (batch.targets == c).sum().item()) for c in (0, 1, 2)
        )


def test_running_again_trains_nothing_and_changes_no_byte(finished, kd_study, monkeypatch):
    before = {path: path.read_bytes() for path in STUDY.rglob("*.json") if path.name != "study.json"}
    table = (STUDY / "table.csv").read_bytes()
    trained = count_training(monkeypatch)
    again = kd_study()
    assert again.code == 0
    assert trained == []
    assert "0 to do; 20 points are finished" in again.out
    assert "another grid" not in again.out
    assert {path: path.read_bytes() for path in before} == before
    assert (STUDY / "table.csv").read_bytes() == table


def test_lost_points_are_made_again_alike_and_no_other_is_touched(finished, kd_study, monkeypatch):
    """As after a kill in the middle of writing: some points of a job are there, others are not."""
    table = (STUDY / "table.csv").read_bytes()
    points = sorted((STUDY / "points").glob("*.json"))
    lost, kept = points[::3], {path: path.stat().st_mtime_ns for path in points if path not in points[::3]}
    for path in lost:
        path.unlink()
    trained = count_training(monkeypatch)
    assert kd_study().code == 0
    assert 0 < len(trained) <= 4
    assert (STUDY / "table.csv").read_bytes() == table
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_wider_grid_trains_only_what_is_new(finished, kd_study):
    before = set((STUDY / "points").glob("*.json"))
    done = kd_study("loss.temperature=1,2", "study.seeds=1", "study.contrasts=[]")
    assert done.code == 0, done.err
    assert "study.json was of another grid, of 20 points, and is now of this one, of 10; the other's" in done.out
    new = [json.loads(path.read_text()) for path in set((STUDY / "points").glob("*.json")) - before]
    assert len(new) == 4  # two teachers x T 2 x two student temperatures
    assert {point["settings"]["loss.temperature"] for point in new} == {2.0}
    assert len(load(STUDY)) == 2 + (2 + 4) + 2  # the table is that of the grid asked for


def test_a_point_that_fails_is_told_and_stops_no_other_and_is_tried_again(kd_study, monkeypatch):
    measure = train_population.measure

    def fails(role, own, truth, teacher=None):
        if role == "student" and fails.on:
            raise RuntimeError("disk on fire\nand more")
        return measure(role, own, truth, teacher)

    fails.on = True
    monkeypatch.setattr(train_population, "measure", fails)
    done = kd_study("study.seeds=1", "study.controls=[]", "study.contrasts=[]")
    assert done.code == 1
    assert done.out.count("RuntimeError: disk on fire") == 6
    table = load(STUDY)
    assert table["state"].value_counts().to_dict() == {"failed": 6, "finished": 2}
    fails.on = False
    assert kd_study("study.seeds=1", "study.controls=[]", "study.contrasts=[]").code == 0
    assert (load(STUDY)["state"] == "finished").all()


def test_a_launcher_that_breaks_leaves_a_table_that_says_what_is_missing(kd_study, monkeypatch):
    do = worker.do

    def students_are_killed(folder, job):
        if job.phase == "students":
            raise BrokenPipeError("a worker was killed")
        do(folder, job)

    monkeypatch.setattr(worker, "do", students_are_killed)
    done = kd_study("study.seeds=1", "study.contrasts=[]")
    assert done.code == 1
    assert "students: BrokenPipeError: a worker was killed" in done.out
    assert load(STUDY)["state"].value_counts().to_dict() == {"missing": 8, "finished": 2}
    monkeypatch.setattr(worker, "do", do)
    assert kd_study("study.seeds=1", "study.contrasts=[]").code == 0


def test_students_of_a_teacher_that_diverged_fail_with_its_name(kd_study):
    rates = ("optimizer.lr=1e6", "optimizer.weight_decay=1e6")
    done = kd_study("study.seeds=1", *rates, "study.controls=[hard]", "study.contrasts=[]")
    assert done.code == 1
    table = load(STUDY).set_index("point")
    teachers = table[table["role"] == "teacher"]
    assert teachers["error"].str.startswith("diverged: its logits are not finite in epoch 1").all()
    for _, student in table[table["role"] == "student"].iterrows():
        assert student["error"].startswith(f"its teacher {student['teacher_point']} failed: diverged")


def test_both_engines_make_the_same_points(kd_study):
    """Through kd.train's own loop, each alone, with the fused loss: the same names, and the same figures to 1e-4."""
    words = ["study.seeds=1", "loss.temperature=4", "study.contrasts=[]"]
    assert kd_study(*words, "output=one").code == 0
    done = kd_study(*words, "output=many", "study.engine=runs")
    assert done.code == 0, done.err
    one, many = (load(f"{output}/studies/tiny").set_index("point") for output in ("one", "many"))
    assert list(one.index) == list(many.index)
    assert len(one) == 8
    for metric in ("train.nll", "val.nll", "test.nll", "test.brier", "test.nt_kl", "test.predictive_kl"):
        np.testing.assert_allclose(many[metric].astype(float), one[metric].astype(float), atol=1e-4)
    assert (one["test.top1"] - many["test.top1"]).abs().max() < 0.01


def test_what_a_population_cannot_do_runs_alone_with_the_same_teacher(kd_study):
    done = kd_study("study.seeds=1", "loss=kd,rkd", "loss.temperature=1", "study.controls=[]", "study.contrasts=[]")
    assert done.code == 0, done.err
    assert "(population, runs)" in done.out
    table = load(STUDY)
    assert table["role"].value_counts().to_dict() == {"teacher": 2, "student": 4}
    points = [Folder(STUDY).read_point(identifier) for identifier in table["point"]]
    assert [p["provenance"]["engine"] for p in points if p["role"] == "teacher"] == ["population"] * 2
    alone = [p for p in points if p["provenance"]["engine"] == "runs"]
    assert len(alone) == 2
    assert all("rkd" in p["settings"]["loss.methods"] for p in alone)
    nll = {p["id"]: p["metrics"]["test"]["nll"] for p in points}
    assert len(set(nll.values())) == len(nll)


def test_a_setting_that_follows_another_follows_that_of_its_point(kd_study):
    words = ["loss.teacher_smoothing=${teacher.label_smoothing}", "study.seeds=1", "loss.student_temperature=1"]
    assert kd_study(*words).code == 0
    students = [p for p in map(Folder(STUDY).read_point, load(STUDY)["point"]) if p["role"] == "student"]
    assert len(students) == 4
    for point in students:
        taken_out, put_in = (point["settings"][k] for k in ("loss.teacher_smoothing", "teacher.label_smoothing"))
        assert taken_out == put_in
    assert len({point["settings"]["loss.teacher_smoothing"] for point in students}) == 2
    contrasts = json.loads((STUDY / "study.json").read_text())["contrasts"]
    assert len(contrasts) == 2  # what they do not mention is as on the axis of one value


def test_dry_run_counts_and_writes_nothing(kd_study, tmp_path):
    done = kd_study("dry_run=true", "study.seeds=7")
    assert done.code == 0
    assert "70 points (14 teachers, 42 students, 14 controls) of 56 cells" in done.out
    assert "about" in done.out
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study.seed=3"], "study.seed: no such setting; did you mean seed"),
        (["study.seeds=0"], "study.seeds=0: must be ≥ 1"),
        (["loss.temprature=1,2"], "loss.temprature: no such setting; did you mean loss.temperature?"),
        (["loss.temperature=-1,2"], "loss.temperature=-1.0: must be ≥ 0.001 and ≤ 1000"),
        (["teacher.label_smoothing=0,1"], "teacher.label_smoothing=1.0: must be ≥ 0 and < 1"),
        (["teacher.label_smoothing=0,much"], "teacher.label_smoothing=much: must be a number"),
        (["loss.kd_weight=0,1", "loss.ce_weight=1"], "loss.kd_weight=0: is the control `hard`"),
        (["method=kd,dist"], "method: no such setting"),
        (["study.controls=[bayes]"], "bayes needs a data set whose posterior is known, not digits"),
        (["data.verify=no,yes"], "data.verify=no: must be true or false"),
        (["loss.temperature=1_0,2"], "loss.temperature=1_0: must be a number"),
        (["loss.temperature=1,2", "loss.temperature=4"], "loss.temperature is given twice"),
        (["loss.methods.dkd.weight=-1,1"], "loss.methods.dkd.weight=-1: must be"),
        (["optimizer.name=lamb", "loss.methods.dkd.wait=1,2"], "loss.methods.dkd.wait: no such setting"),
        (["study.grid={}"], "study.grid={}: type an axis as SETTING=A,B"),
        (["+study.grid={loss.temperature:[2]}"], "type an axis as SETTING=A,B"),
        (["study.controls=[soft]"], "must be different ones of hard, smoothed, bayes"),
        (["+study.contrasts.0.a.seed=1"], "seed is no axis; type study.seeds=N"),
        (["optimizer.name=lamb", "study.engine=population"], "population: cannot train a student, optimizer.name=lamb"),
        (["train.batch_size=5000"], "train.batch_size=5000: must be ≤ 1293"),
        (["scheduler.warmup_epochs=1"], "scheduler.warmup_epochs=1: must be < student.epochs=1"),
        (["name=../up"], "name='../up': must be a plain directory name"),
        (["-m", "seed=1,2"], "-m: a study is many runs by itself"),
        (["student.model=mlp_tiny,mlp_huge", "study.contrasts=[]"], "student.model=mlp_huge"),
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_work_is_one_line(words, said, kd_study, tmp_path):
    done = kd_study(*words)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "checkpoints").exists()


def test_the_values_of_an_axis_are_read_as_in_a_recipe(monkeypatch, tiny_study, tmp_path):
    """OmegaConf's YAML reads 010 as eight, no as false and 1e-3 as text."""
    from kd.study.__main__ import compose
    from kd.study.axes import labelled

    monkeypatch.chdir(tmp_path)
    words = ["recipe=studies/tiny", "loss.temperature=010,1e-3", "student.model=no,'a, b'"]
    words += ['loss.teacher_smoothing=0,"${teacher.label_smoothing}"', "loss.methods.x.weight=010,0.5"]
    study, *_ = compose(words)
    axes = {axis: list(values) for axis, values in labelled(study.study.grid).items()}
    assert axes["loss.temperature"] == [10.0, 0.001]
    assert axes["student.model"] == ["no", "a, b"]
    assert axes["loss.teacher_smoothing"] == [0.0, "${teacher.label_smoothing}"]
    assert axes["loss.methods.x.weight"] == [10, 0.5]


def test_a_contrast_may_be_of_every_metric_that_is_measured_and_no_other(finished):
    found = {column for column in load(STUDY).columns if column.split(".")[0] in ("train", "val", "test")}
    known = {f"{split}.{name}" for name, metric in metrics.METRICS.items() for split in metric.splits}
    assert found <= known
    assert {name.split(".")[1] for name in known - found} == {
        "omitted_recall", "omitted_recall_corrected", "omitted_auroc", "transfer_efficiency"
    }  # fmt: skip


def test_a_narrower_grid_leaves_out_the_contrasts_that_it_has_no_points_for(kd_study):
    done = kd_study("teacher.label_smoothing=0,.1", "dry_run=true")
    assert done.code == 0, done.err
    assert 'left out smoothing at T 4: study.contrasts: {"teacher.label_smoothing": 0.4, ' in done.out
    assert "0 contrasts" in done.out


def test_an_unknown_study_names_those_that_there_are(kd_study):
    done = kd_study(recipe="studies/tinny")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "recipe=studies/tinny: no such recipe; did you mean recipe=studies/tiny?" in done.err


def test_the_benchmarks_command_line_is_the_points_own_recipe(finished, kd_train):
    """What it times through kd.train is the student that the study trained, teacher and all."""
    from benchmarks.study import overrides
    from kd.study.grid import flat

    point = next(p for p in map(Folder(STUDY).read_point, load(STUDY)["point"]) if p["role"] == "student")
    done = kd_train(*overrides(point), "--cfg", "job")
    assert done.code == 0, done.err
    shown = flat(yaml.safe_load(done.out))
    for key, value in point["settings"].items():
        assert shown[key] == value, key


def test_kd_train_says_what_a_study_is(kd_train):
    done = kd_train("recipe=studies/label_noise")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "is a study; type python -m kd.study recipe=studies/label_noise" in done.err


def test_two_commands_on_one_folder_do_not_meet(kd_study):
    with Folder(STUDY).lock("study", wait=False):
        done = kd_study()
    assert done.code == 2
    assert f"process {os.getpid()} on " in done.err


def test_load_says_what_is_no_study(tmp_path):
    with pytest.raises(ConfigError, match="holds no study"):
        load(tmp_path)


def test_reliability_by_hand():
    """Confidences .6, .62 (bin 9) and .9 (bin 13); right, wrong, right."""
    p = torch.tensor([[0.6, 0.4], [0.38, 0.62], [0.9, 0.1]], dtype=torch.float64)
    found = metrics.reliability_bins(p.log(), torch.tensor([0, 0, 0]))
    assert found["count"] == [0] * 9 + [2, 0, 0, 0, 1, 0]
    assert found["confidence"][9] == pytest.approx(0.61)
    assert (found["accuracy"][9], found["accuracy"][13], found["accuracy"][0]) == (0.5, 1.0, None)


def test_killed_at_any_time_a_study_resumes_to_the_same_table(kd_study, tmp_path):
    """SIGKILL to the whole process group, local processes by joblib; the undisturbed run is another folder's."""
    assert kd_study("output=undisturbed").code == 0
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "kd.study", "recipe=studies/tiny", "output=disturbed"]
    study = Path("disturbed/studies/tiny")

    def some_points_are_there() -> bool:
        return len(list((study / "points").glob("*.json"))) >= 5

    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    while process.poll() is None and not some_points_are_there():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = {path: path.read_bytes() for path in (study / "points").glob("*.json")}
    assert written
    assert kd_study("output=disturbed").code == 0
    assert {path: path.read_bytes() for path in written} == written  # none was made twice
    assert (study / "table.csv").read_bytes() == Path("undisturbed/studies/tiny/table.csv").read_bytes()


@pytest.mark.parametrize("engine", ["population", "runs"])
def test_asked_to_stop_a_study_ends_with_its_workers_and_resumes_to_the_same_table(engine, kd_study, monkeypatch):
    """SIGTERM to the command alone: its workers must not go on without it, and nothing is written down as failed.

    A run of kd.train saves before it leaves, although no save was due, and goes on from there.
    """
    words = ["study.seeds=1", "loss.temperature=4", "loss.student_temperature=1", "study.contrasts=[]"]
    # Students of 40 may end while the signal is on its way.
    words += ["teacher.label_smoothing=0", f"study.engine={engine}", "teacher.epochs=3", "student.epochs=200"]
    words += ["train.save_every=1000"]
    assert kd_study("output=undisturbed", *words).code == 0
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "kd.study", "recipe=studies/tiny", "output=disturbed", *words]
    study = Path("disturbed/studies/tiny")
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)

    def under_way() -> bool:
        students = list(study.glob("runs/*/metrics.jsonl"))  # a teacher's stands beside its weights
        return bool(list(study.glob("points/*.json")) if engine == "population" else students)

    while process.poll() is None and not under_way():
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    workers = [child for child in children if "popen_loky" in " ".join(child.cmdline())]
    assert workers
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said.splitlines()[-1]) == (0, "stopped; run the same command to go on"), said
    assert not [each for each in workers if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    points = [json.loads(path.read_text()) for path in (study / "points").glob("*.json")]
    assert {point["state"] for point in points} == {"finished"}
    assert len(points) < len(list(Path("undisturbed/studies/tiny/points").glob("*.json")))
    saved = {
        path.parents[1].resolve(): int(path.name.split("-")[1]) for path in study.glob("runs/*/*/checkpoints/update-*")
    }
    assert (engine == "runs") == bool(saved)
    begun: dict[Path, int] = {}  # the update that each stage made first
    update = loop.Trainer._update

    def noted(self, batches):
        begun.setdefault(self.stage.directory, self.progress.update)
        return update(self, batches)

    monkeypatch.setattr(loop.Trainer, "_update", noted)
    assert kd_study("output=disturbed", *words).code == 0
    assert {folder: first for folder, first in begun.items() if first} == saved  # all others from the beginning
    assert (study / "table.csv").read_bytes() == Path("undisturbed/studies/tiny/table.csv").read_bytes()


def test_workers_do_not_outlive_a_killed_command(kd_study):
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    words = ["study.seeds=2", "study.contrasts=[]", "study.engine=population", "teacher.epochs=1000000"]
    words += ["hydra.launcher.n_jobs=2"]  # one for each: a worker without work ends after joblib's 300 s
    command = [sys.executable, "-m", "kd.study", "recipe=studies/tiny", *words]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    workers: list[psutil.Process] = []
    try:
        while process.poll() is None and len(list(Path().rglob("jobs/.teachers-*.lock"))) < 2:
            time.sleep(0.05)
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if "popen_loky" in " ".join(child.cmdline())]
        assert workers
        process.kill()
        process.wait()
        assert not psutil.wait_procs(workers, timeout=30)[1]
    finally:
        for each in [process, *psutil.wait_procs(workers, timeout=0)[1]]:
            each.kill()
