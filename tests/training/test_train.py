"""The main job, as a user runs it: three stages, one result, repeated, evaluated, on one and two processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, log_loss

import kd.models.networks
from kd import evaluate
from kd.checkpoint.manifest import write_manifest
from kd.models.weights import weights_metadata
from tests.torture import forked
from tests.training.test_run import files

# A batch that two processes share unevenly.
SMOKE = ("recipe=smoke", "output=runs", "run=one", "train.batch_size=255")


def command(folder, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "kd.train", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One smoke run in a process of its own; its output directory and what it printed."""
    folder = tmp_path_factory.mktemp("smoke")
    done = command(folder, *SMOKE)
    assert done.returncode == 0, done.stderr
    return folder, done


def result_of(folder):
    return json.loads((folder / "runs/smoke/one/result.json").read_text())


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """A copy of the finished run in the current directory; its directory."""
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/smoke/one"


# ---- averaged weights over few updates

EMA = ("recipe=smoke", "output=runs", "train.batch_size=100", "train.ema_decay=0.9999")


def test_an_average_over_few_updates_learns_and_the_run_says_what_its_decay_is(kd_train, tmp_path):
    """48 updates: without warm-up 99.5 % of the averaged weights are the initial ones."""
    done = kd_train(*EMA, "run=one", "teacher.epochs=4", "student.epochs=4")
    assert done.code == 0, done.err
    told = "student  train.ema_decay=0.9999 needs more than 48 updates; its warm-up ends at 0.924"
    assert told in done.out
    assert done.out.index(told) < done.out.index("teacher  epoch")
    result = result_of(tmp_path)
    assert min(result[name]["last"]["test"]["top1"] for name in ("teacher", "student", "control")) > 0.5
    assert "cannot be judged from 48 updates" in done.out
    without = kd_train(*EMA, "train.ema_warmup=false", "teacher.epochs=4", "dry_run=true").out
    assert "warning  teacher: train.ema_decay=0.9999 leaves 99.5% of the initial weights in the average" in without
    assert "after 48 updates; type train.ema_warmup=true, or a decay ≤ 0.953" in without
    assert "warning  student: train.ema_decay=0.9999 leaves 99.9%" in without


def test_an_average_over_many_updates_needs_no_line(kd_train):
    assert "ema_decay" not in kd_train(*EMA[:-1], "train.ema_decay=0.8", "control=false").out


# ---- the result


def test_the_result_has_every_figure_and_where_it_came_from(finished):
    folder, done = finished
    assert done.stdout.splitlines()[-1] == "runs/smoke/one/result.json"
    assert "distillation" in done.stdout.splitlines()[-2]
    assert "Traceback" not in done.stderr
    result = result_of(folder)
    for name in ("teacher", "student", "control"):
        for weights in ("last", "selected"):
            for split in ("val", "test"):
                figures = result[name][weights][split]
                assert {"top1", "top5", "nll", "ece", "brier"} <= set(figures)
                assert ("agreement" in figures) == ("predictive_kl" in figures) == (name == "student")
                assert ("reliability" in figures) == ((weights, split) == ("last", "test"))
                assert 0 <= figures["top1"] <= figures["top5"] <= 1
        bins = result[name]["last"]["test"]["reliability"]
        assert sum(bins["count"]) == result["difference"]["last"]["test"]["n"] == 360
    assert result["student"]["parameters"] == result["control"]["parameters"] < result["teacher"]["parameters"]
    made = result["provenance"]
    assert {"git_sha", "git_dirty", "versions", "hardware", "seconds", "seed", "data_hash", "recipe_hash"} <= set(made)
    assert made["seconds"] > 0
    lines = [json.loads(line) for line in (folder / "runs/smoke/one/metrics.jsonl").read_text().splitlines()]
    for stage in ("student", "control"):
        own = [line for line in lines if line["stage"] == stage]
        assert [line["update"] for line in own] == [1, 2, 3, 4, 5, 5]
        assert "val_top1" in own[-1]
    keys = {"ce", "kd", "student_entropy", "teacher_entropy", "agreement", "lr", "images_per_second"}
    assert keys <= set(lines[0])


def test_the_weights_load_in_timm_and_give_the_figures_of_the_result(finished):
    """Scored again by timm, scikit-learn and the raw data set: nothing of kd but the networks' names."""
    from kd.config.schema import DataConfig
    from kd.data import load_data

    assert kd.models.networks  # registers mlp_tiny with timm
    run, result = finished[0] / "runs/smoke/one", result_of(finished[0])
    data = load_data(DataConfig(image_size=8, shift=1), seed=123)
    batch = next(iter(data.test.batches([torch.arange(len(data.test))], epoch=None)))
    for name in ("student", "control"):
        for weights in ("last", "selected"):
            path = str(run / name / f"{weights}.safetensors")
            net = timm.create_model("mlp_tiny", num_classes=10, in_chans=1, img_size=8, checkpoint_path=path).eval()
            with torch.no_grad():
                logits = net(batch.images)
            figures = result[name][weights]["test"]
            assert figures["top1"] == pytest.approx(accuracy_score(batch.targets, logits.argmax(-1)))
            assert figures["nll"] == pytest.approx(log_loss(batch.targets, logits.double().softmax(-1)), rel=1e-5)
    difference = result["student"]["last"]["test"]["top1"] - result["control"]["last"]["test"]["top1"]
    assert result["difference"]["last"]["test"]["top1"] == pytest.approx(difference)
    metadata = weights_metadata(finished[0] / result["teacher"]["weights"])
    assert metadata["model"] == "mlp_wide"
    assert (metadata["num_classes"], metadata["label_smoothing"], metadata["smoothing"]) == ("10", "0.0", "uniform")


# ---- kd.evaluate


@pytest.fixture
def kd_evaluate(called):
    return partial(called, "kd.evaluate", evaluate.main)


def test_evaluate_recomputes_the_result_also_of_an_older_kd(copied, kd_evaluate):
    """Which had fewer metrics."""
    result = json.loads((copied / "result.json").read_text())
    for network in ("teacher", "student", "control"):
        for split in ("val", "test"):
            del result[network]["last"][split]["brier"]
    (copied / "result.json").write_text(json.dumps(result))
    code, out, _ = kd_evaluate("run=runs/smoke/one", "picture=table.svg")
    assert (code, out.splitlines()[-1].partition(":")[0]) == (0, "largest difference to result.json")
    picture = (copied.parents[2] / "table.svg").read_text()
    assert "student" in picture
    assert "url(http" not in picture.replace("&quot;", "").replace('"', "")


def test_evaluate_finds_weights_that_are_not_the_results(copied, kd_evaluate):
    shutil.copy(copied / "control/last.safetensors", copied / "student/last.safetensors")
    code, _, err = kd_evaluate("run=runs/smoke/one")
    assert (code, err.count("\n"), "student/last.safetensors: is damaged" in err) == (2, 1, True)
    for name in ("stage.json", "selected.safetensors"):
        shutil.copy(copied / "control" / name, copied / "student" / name)
    code, _, err = kd_evaluate("run=runs/smoke/one")
    assert (code, err.count("\n"), "stage.json: is of stage control" in err) == (2, 1, True)
    listed = json.loads((copied / "student/stage.json").read_text())
    write_manifest(copied / "student/stage.json", list(listed["files"]), listed | {"stage": "student"})
    assert kd_evaluate("run=runs/smoke/one")[0] == 1


# ---- kd.train


def test_damaged_weights_are_refused_before_anything_is_trained(copied, kd_train, monkeypatch, tmp_path):
    (teacher,) = (tmp_path / "runs/teachers").glob("mlp*")
    (copied / "result.json").unlink()
    shutil.rmtree(copied / "control")
    monkeypatch.setattr("kd.training.pipeline.train", lambda *_: pytest.fail("trained before it looked"))
    for stage in (copied / "student", teacher):
        whole = (path := stage / "selected.safetensors").read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        done = kd_train(*SMOKE)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert f"{stage.name}/selected.safetensors: is damaged" in done.err
        path.write_bytes(whole)


def test_the_fused_loss_takes_the_same_path_as_the_reference_for_fifty_updates(kd_train, tmp_path):
    """The main recipe's loop, with networks that take seconds."""
    small = ("teacher.model=mlp_wide", "student.model=mlp_tiny", "data.image_size=8", "train.batch_size=24")
    curves = []
    for backend in ("auto", "reference"):
        words = (f"loss.backend={backend}", f"output={backend}", "run=one", "teacher.epochs=1", "student.epochs=1")
        words += ("train.log_every=1", "loss.label_smoothing=0.1", "control=false")
        done = kd_train("recipe=resnet50_to_18", *small, *words)
        assert done.code == 0, done.err
        lines = (tmp_path / backend / "resnet50_to_18/one/metrics.jsonl").read_text().splitlines()
        curves.append([e for e in map(json.loads, lines) if e["stage"] == "student" and "kd" in e][:50])
    assert [len(curve) for curve in curves] == [50, 50]
    for fused, plain in zip(*curves, strict=True):
        for name in ("loss", "ce", "kd"):  # AdamW, which divides by them, magnifies the last digits
            assert fused[name] == pytest.approx(plain[name], rel=2e-3), (fused["update"], name)
    assert curves[0][-1]["ce"] < curves[0][0]["ce"]


def test_dry_run_and_list_layers_print_and_write_nothing(kd_train, tmp_path):
    done = kd_train("recipe=smoke", "dry_run=true")
    assert done.code == 0, done.err
    for word in ("teacher", "student", "control", "mlp_wide", "mlp_tiny", "s/update", "GiB", "would write"):
        assert word in done.out
    done = kd_train("recipe=smoke", "list_layers=true")
    assert "teacher.layers" in done.out
    assert "student.layers" in done.out
    assert not list(tmp_path.iterdir())


def test_a_teacher_no_better_than_chance_stops_the_run(kd_train, tmp_path):
    done = kd_train(*SMOKE, "optimizer.lr=1e-9")
    assert done.code == 2
    assert "is no better than chance" in done.err
    assert "teacher  validation top-1" in done.out
    assert not (tmp_path / "runs/smoke/one/student").exists()


def test_a_teacher_of_ones_own_is_used_as_it_is(finished, kd_train, tmp_path):
    result = result_of(finished[0])
    path = finished[0] / result["teacher"]["weights"]
    done = kd_train(*SMOKE, f"teacher.checkpoint={path}", "control=false")
    assert done.code == 0, done.err
    mine = result_of(tmp_path)
    assert mine["teacher"]["last"]["val"] == mine["teacher"]["selected"]["val"] == result["teacher"]["last"]["val"]
    assert mine["student"]["last"] == result["student"]["last"]
    assert "control" not in mine
    assert "nothing says whether distillation helped" in done.out


def test_a_teacher_whose_logits_overflow_is_named(finished, kd_train, tmp_path):
    """Finite weights whose products are not: nothing but the logits tells."""
    (teacher,) = (finished[0] / "runs/teachers").glob("mlp*")
    weights = load_file(teacher / "last.safetensors")
    save_file({name: value * 1e18 for name, value in weights.items()}, tmp_path / "own.safetensors")
    done = kd_train(*SMOKE, "teacher.checkpoint=own.safetensors")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "error: teacher.checkpoint=own.safetensors: logits of 144 of 144 validation images are not" in done.err


def test_several_seeds_make_several_runs_with_curves_in_tensorboard(kd_train, tmp_path):
    done = kd_train("-m", "recipe=smoke", "output=runs", "seed=0,1", "control=false", "tracker=tensorboard")
    assert done.code == 0, done.err
    runs = list((tmp_path / "runs/smoke").glob("seed*"))
    assert len(runs) == 2
    assert all(list(run.rglob("events.out.tfevents.*")) for run in runs)


# ---- stops, and several processes


def test_a_stop_says_how_to_go_on_where_the_same_command_starts_again(kd_train, monkeypatch):
    words = (*SMOKE, "control=false")
    with monkeypatch.context() as patch:
        patch.setattr("kd.training.loop.stop_requested", lambda accelerator: True)
        said = kd_train(*words, "resume=false").err
    assert said.startswith("teacher stopped after update 1 of 5; ")
    assert "resume=true" in said
    assert "teacher  goes on after update 1 of 5" in kd_train(*words, "resume=true").out


@pytest.mark.parametrize("words", [[], ["loss.class_weight=[1,2,3,4,5,6,7,8,9,99]"]])
def test_two_processes_end_with_the_parameters_of_one(words, finished, tmp_path):
    """Five updates, same global batch, uneven shares: equal to 2e-5, rounding that Adam amplifies."""
    alone = finished[0]
    if words:
        forked.whole(*SMOKE, *words, folder=(alone := tmp_path / "alone"))
    forked.whole(*SMOKE, *words, folder=tmp_path, processes=2)
    assert result_of(tmp_path)["provenance"]["hardware"]["processes"] == 2
    for name in ("student", "control"):
        a, b = (load_file(d / f"runs/smoke/one/{name}/last.safetensors") for d in (alone, tmp_path))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=2e-5)
    assert "".join(log.read_text() for log in tmp_path.glob("log.txt*")).count("student  epoch") == 1


@pytest.mark.torture
def test_a_process_that_is_alone_says_so(tmp_path):
    """Of two, one is killed: torchrun would then end the other, which may come to say why it cannot go on."""
    words = (*SMOKE, "student.epochs=300", "control=false", "train.save_every=0")
    started = forked.start(*words, folder=tmp_path, processes=2)
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs/smoke/one/metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    forked.kill(started[1], signal.SIGKILL)
    codes = forked.finish(started, 60)
    said = (tmp_path / "log.txt").read_text()
    assert codes == [1, -signal.SIGKILL], said
    assert said.splitlines()[-1].startswith("error: another process of this run has ended; ")
    assert "Traceback" not in said


@pytest.mark.torture
def test_pretrained_without_a_network_says_how_to_give_a_checkpoint(tmp_path):
    blocked = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    teacher = ("teacher.model=resnet50.tv_in1k", "teacher.pretrained=true", "teacher.finetune=true")
    done = command(tmp_path, "recipe=resnet50_to_18", *teacher, env=os.environ | blocked)
    last = done.stderr.splitlines()[-1]  # the hub says first that it tries again
    assert done.returncode == 2
    assert last.startswith("error: teacher.model=resnet50.tv_in1k")
    assert "teacher.checkpoint=" in last


# ---- images in folders


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """400 photographed digits as JPEGs in train/ and val/."""
    root = tmp_path_factory.mktemp("jpegs") / "images"
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:400], digits.target, strict=False)):
        path = root / ("train", "val")[i % 2] / str(label) / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((15 * image).astype("uint8")).resize((28, 28)).save(path)
    return root


STREAMED = ("recipe=timm_finetune", "run=one", "output=runs", "data.root=images", "data.image_size=32")
STREAMED += ("teacher.model=test_resnet", "teacher.pretrained=false", "teacher.epochs=4", "data.crop_scale=0.7")
STREAMED += ("student.model=test_resnet", "student.pretrained=false", "student.epochs=1", "control=false")
STREAMED += ("optimizer.lr=0.01", "scheduler.warmup_epochs=0", "train.batch_size=16")
ALONE = "data.workers=0"  # starting workers takes longer than what they do here


def test_a_folder_of_jpegs_trains_from_end_to_end_until_an_image_is_corrupt(jpegs, kd_train, tmp_path):
    shutil.copytree(jpegs, tmp_path / "images")
    more = ("data.color_jitter=0", "data.hflip=0", "data.mixup=0.1", "train.precision=bf16", "train.ema_decay=0.5")
    shutil.rmtree(tmp_path / "images/val/9")
    more += ("data.missing_classes=allow",)
    bad = tmp_path / "images/train/3/broken.jpg"
    bad.write_bytes(b"")
    done = kd_train(*STREAMED, *more, "data.workers=1", "control=true", "data.unreadable=skip")
    assert done.code == 0, done.err
    assert "warning  data.unreadable=skip leaves out 1 of " in done.out
    result = json.loads((tmp_path / done.out.splitlines()[-1]).read_text())
    assert result["provenance"]["unreadable_images"] == 1
    assert result["difference"]["last"]["test"]["n"] == sum(1 for _ in (tmp_path / "images/val").rglob("*.jpg"))
    assert result["teacher"]["last"]["val"]["top1"] > 0.15

    before = files(tmp_path / "runs")
    done = kd_train(*STREAMED, *more, "output=others", ALONE)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(f"error: cannot read '{bad.relative_to(tmp_path)}': ")
    assert "epoch" not in done.out
    assert files(tmp_path / "runs") == before


def test_processes_that_read_other_images_are_one_line(kd_train, monkeypatch):
    monkeypatch.setattr("kd.training.pipeline.gather_object", lambda hashes: [*hashes, "of another copy"])
    done = kd_train("recipe=smoke")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: data.root=None: not all processes read the same images there; give each")


def disturb(how: str) -> None:
    """In the student's third update, lose a data worker, or the images."""
    from kd.training import loop

    def disturbed(self, batches):
        if (self.stage.name, self.progress.update) == ("student", 2):
            if how == "a worker is killed":
                os.kill(psutil.Process().children()[0].pid, signal.SIGKILL)
                time.sleep(0.5)
            else:
                os.rename("images", "elsewhere")
        return update(self, batches)

    update = loop.Trainer._update
    loop.Trainer._update = disturbed


@pytest.mark.torture
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("a worker is killed", 1, r"error: DataLoader worker \(pid\(?s?\)? .*"),
        ("files vanish", 2, r"error: cannot read 'images/train/.*\.jpg': No such file or directory\n"),
    ],
)
def test_what_is_lost_in_the_middle_is_one_line_and_the_run_goes_on(how, code, said, jpegs, tmp_path):
    """The student is saved after every update."""
    for folder in ("whole", "cut"):
        shutil.copytree(jpegs, tmp_path / folder / "images")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    forked.whole(*STREAMED, ALONE, folder=whole)
    words = ("train.save_every=0", "data.workers=2" if how == "a worker is killed" else ALONE)
    codes = forked.finish(forked.start(*STREAMED, *words, folder=cut, hook=partial(disturb, how), log="cut.txt"))
    printed = (cut / "cut.txt").read_text()
    assert codes == [code], printed
    assert len(re.findall(said, printed)) == printed.count("rror") == 1, printed
    if how == "files vanish":
        (cut / "elsewhere").rename(cut / "images")
    forked.whole(*STREAMED, ALONE, folder=cut, log="again.txt")
    assert "student  goes on after update" in (cut / "again.txt").read_text()
    assert forked.differences(whole / "runs", cut / "runs") == []
