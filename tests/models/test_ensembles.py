"""Networks made of networks: a student that is scored through a method's classifier, several teachers as one, and the
students that become teachers.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from kd import evaluate
from kd.checkpoint.manifest import write_manifest
from kd.config.schema import DataConfig
from kd.data import load_data
from kd.errors import CheckpointError
from kd.models.ensemble import Ensemble
from kd.models.factory import build
from kd.training import loop

SMALL = ("recipe=smoke", "control=false", "run=one", "output=runs")
MAPS = (*SMALL, "teacher.model=cnn_small", "student.model=cnn_small", "data.image_size=4")


def digits(image_size):
    return load_data(DataConfig(image_size=image_size), 0)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def top1(logits, split):
    return (logits.argmax(-1) == split.targets).double().mean().item()


@torch.no_grad()
def logits_of(network, split):
    (batch,) = split.batches([torch.arange(len(split))], None)
    return network.eval()(batch.images)


# ---- a method's classifier


@torch.no_grad()
def simkd_by_hand(weights, images):
    """Student, projector and the teacher's classifier, from the names in the file."""
    network = build("cnn_small", num_classes=10, input_shape=(1, 4, 4), role="student")
    prefix = "student.model."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    x = network.eval().forward_features(images)
    for i in (0, 3, 6):
        kernel = weights[f"method.projector.{i}.weight"]
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        norm = [weights[f"method.projector.{i + 1}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *norm).relu()
    return F.linear(x.mean((2, 3)), weights["method.weight"], weights["method.bias"])


def test_simkd_is_scored_and_saved_with_the_teachers_classifier(kd_train, tmp_path):
    done = kd_train(*MAPS, "loss=simkd", "student.epochs=6", "teacher.epochs=4", "train.batch_size=64")
    assert done.code == 0, done.err
    folder = tmp_path / "runs/smoke/one"
    found, split = result(folder), digits(4).test
    weights = load_file(folder / "student/last.safetensors")
    teacher = load_file(found["teacher"]["weights"])
    assert torch.equal(weights["method.weight"], teacher["fc.weight"])
    assert torch.equal(weights["method.bias"], teacher["fc.bias"])
    (batch,) = split.batches([torch.arange(len(split))], None)
    by_hand = simkd_by_hand(weights, batch.images)
    assert found["student"]["last"]["test"]["top1"] == pytest.approx(top1(by_hand, split), abs=1e-9)
    assert found["student"]["last"]["test"]["nll"] == pytest.approx(F.cross_entropy(by_hand, split.targets).item())
    assert top1(by_hand, split) > 0.3  # the student's own classifier has learned nothing
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max((line for line in lines if "val_top1" in line), key=lambda line: (line["val_top1"], -line["val_nll"]))
    assert found["student"]["selected"]["val"]["top1"] == pytest.approx(best["val_top1"])
    agreement = [line["agreement"] for line in lines if "agreement" in line]
    assert agreement[-1] > 2 * agreement[0]  # logged of the same classifier
    assert evaluate.main([f"run={folder}"]) == 0
    weights["method.projector.6.weight"] *= -1
    save_file(weights, folder / "student/last.safetensors")
    with pytest.raises(CheckpointError, match=r"student/last\.safetensors: has .* resume=false"):
        evaluate.main([f"run={folder}"])
    done = json.loads((folder / "student/stage.json").read_text())
    write_manifest(folder / "student/stage.json", list(done["files"]), done)
    assert evaluate.main([f"run={folder}"]) == 1


def test_simkd_stops_and_goes_on_bit_identically(kd_train, monkeypatch, tmp_path):
    words = (*MAPS, "loss=simkd", "student.epochs=2", "train.ema_decay=0.5")
    assert kd_train(*words, "output=whole").code == 0
    update, seen = loop.Trainer._update, []

    def counted(self, batches):
        seen.append(self.stage.name)
        return update(self, batches)

    monkeypatch.setattr(loop.Trainer, "_update", counted)
    monkeypatch.setattr(loop, "stop_requested", lambda accelerator: seen.count("student") == 7)
    assert kd_train(*words, "output=cut").code == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "goes on after update 7 of 10" in kd_train(*words, "output=cut").out
    for name in ("last", "selected"):
        whole, cut = (tmp_path / d / f"smoke/one/student/{name}.safetensors" for d in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()
    assert (
        result(tmp_path / "whole/smoke/one")["student"]["last"] == result(tmp_path / "cut/smoke/one")["student"]["last"]
    )


def test_logging_leaves_the_running_statistics_alone(kd_train, tmp_path):
    """The classifier is asked for its logits at every logged update, in eval mode."""
    for every in (1, 5):
        assert kd_train(*MAPS, "loss=simkd", f"output=every{every}", f"train.log_every={every}").code == 0
    often, seldom = (tmp_path / f"every{every}/smoke/one/student/last.safetensors" for every in (1, 5))
    assert often.read_bytes() == seldom.read_bytes()


# ---- several teachers


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_an_ensemble_is_the_mean_of_the_probabilities(temperature):
    torch.manual_seed(0)
    members, x = [nn.Linear(5, 3) for _ in range(4)], torch.randn(6, 5)
    p = torch.stack([(member(x).double() / temperature).softmax(-1) for member in members]).mean(0)
    ensemble = Ensemble(members, temperature)
    torch.testing.assert_close((ensemble(x) / temperature).softmax(-1), p.float())
    assert torch.equal(Ensemble(members[:1])(x).argmax(-1), members[0](x).argmax(-1))
    assert ensemble.half()(x.half()).dtype == torch.float32


def test_several_teachers_are_trained_kept_and_averaged(kd_train, tmp_path):
    done = kd_train(*SMALL, "loss=dkd", "teacher.members=3", "teacher.averaging_temperature=2")
    assert done.code == 0, done.err
    folder, split = tmp_path / "runs/smoke/one", digits(8).test
    found = result(folder)
    weights, logits = load_file(found["teacher"]["weights"]), []
    for i in range(3):
        network = build("mlp_wide", num_classes=10, input_shape=(1, 8, 8))
        prefix = f"members.{i}."
        network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        logits.append(logits_of(network, split).double())
    p = torch.stack([(z / 2).softmax(-1) for z in logits]).mean(0)
    nll = F.cross_entropy(2 * p.log(), split.targets).item()
    assert found["teacher"]["last"]["test"]["nll"] == pytest.approx(nll, rel=1e-5)
    apart = [F.cross_entropy(z, split.targets).item() for z in logits]
    assert max(apart) - min(apart) > 1e-3  # three networks, not one three times
    assert len(found["teacher"]["selected_epoch"]) == 3
    assert evaluate.main([f"run={folder}"]) == 0
    # The first is the teacher of a run without others, and all are found again.
    alone = kd_train(*SMALL, "run=alone")
    assert "teacher  found in" in alone.out
    assert "teacher  found in" in kd_train(*SMALL, "loss=kd", "teacher.members=3", "run=more").out
    more = kd_train(*SMALL, "loss=kd", "teacher.members=4", "run=four").out
    assert more.count("teacher  found in") == 3


# ---- a student becomes the next teacher; settings by name


def test_born_again_generations(kd_train, tmp_path):
    words = ("recipe=smoke", "control=false", "output=runs", "loss=kd:born_again", "teacher.model=mlp_tiny")
    assert kd_train(*words, "run=first").code == 0
    student = tmp_path / "runs/smoke/first/student/last.safetensors"
    done = kd_train(*words, "run=second", f"teacher.checkpoint={student}")
    assert done.code == 0, done.err
    first, second = (result(tmp_path / f"runs/smoke/{run}") for run in ("first", "second"))
    assert second["teacher"]["last"]["test"]["nll"] == pytest.approx(first["student"]["last"]["test"]["nll"])
    assert second["student"]["last"]["test"] != first["student"]["last"]["test"]
    lines = (tmp_path / "runs/smoke/second/metrics.jsonl").read_text().splitlines()
    line = next(json.loads(line) for line in lines if '"kd"' in line)
    assert line["loss"] == pytest.approx(line["kd"] + line["ce"], rel=1e-6)


def test_function_matching_sees_mixed_images_and_no_labels(kd_train, tmp_path):
    done = kd_train(*SMALL, "loss=kd:funmatch", "data.mixup=1")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "runs/smoke/one/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == "student" and "loss" in line]
    assert len(lines) == 5
    for line in lines:
        assert "ce" not in line
        assert line["loss"] == pytest.approx(line["kd"], rel=1e-6)
        assert math.isfinite(line["kd"])
