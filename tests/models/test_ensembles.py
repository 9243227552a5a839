"""Networks made of networks: a student scored through a method's classifier, several teachers as one, and students
that become teachers.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from kd import evaluate
from kd.config.schema import DataConfig
from kd.data import load_data
from kd.models.ensemble import Ensemble
from kd.models.factory import build

SMALL = ("recipe=smoke", "control=false", "run=one", "output=runs", "teacher.model=mlp_tiny")
MAPS = (*SMALL[:-1], "teacher.model=cnn_tiny", "student.model=cnn_tiny", "data.image_size=4", "loss=simkd")


def digits_test(image_size):
    split = load_data(DataConfig(image_size=image_size), 0).test
    (batch,) = split.batches([torch.arange(len(split))], None)
    return batch.images, batch.targets


def result(directory):
    return json.loads((directory / "result.json").read_text())


def log_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def part(weights, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


# ---- a method's classifier


@torch.no_grad()
def simkd_by_hand(weights, images):
    """Student, projector and the teacher's classifier, from the names in the file."""
    network = build("cnn_tiny", num_classes=10, input_shape=(1, 4, 4), section="student.")
    network.load_state_dict(part(weights, "student.model."))
    x = network.eval().forward_features(images)
    for i in (0, 3, 6):
        kernel = weights[f"method.projector.{i}.weight"]
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        norm = [weights[f"method.projector.{i + 1}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *norm).relu()
    return F.linear(x.mean((2, 3)), weights["method.weight"], weights["method.bias"])


def test_simkd_is_scored_and_saved_with_the_teachers_classifier(kd_train, tmp_path):
    done = kd_train(*MAPS, "student.epochs=4", "teacher.epochs=4", "train.batch_size=32", "optimizer.lr=0.01")
    assert done.code == 0, done.err
    run = tmp_path / "runs/smoke/one"
    scores, weights = result(run), load_file(run / "student/last.safetensors")
    teacher = load_file(tmp_path / scores["teacher"]["weights"])
    assert torch.equal(weights["method.weight"], teacher["fc.weight"])
    assert torch.equal(weights["method.bias"], teacher["fc.bias"])
    images, targets = digits_test(4)
    by_hand = simkd_by_hand(weights, images)
    accuracy = (by_hand.argmax(-1) == targets).double().mean().item()
    assert accuracy > 0.3  # the student's own classifier has learned nothing
    assert scores["student"]["last"]["test"]["top1"] == pytest.approx(accuracy, abs=1e-9)
    assert scores["student"]["last"]["test"]["nll"] == pytest.approx(F.cross_entropy(by_hand, targets).item())
    log = log_of(run)
    best = max((line for line in log if "val_top1" in line), key=lambda line: (line["val_top1"], -line["val_nll"]))
    assert scores["student"]["selected"]["val"]["top1"] == pytest.approx(best["val_top1"])
    agreement = [line["agreement"] for line in log if "agreement" in line]
    assert agreement[-1] > 2 * agreement[0]  # logged of the same classifier
    assert evaluate.main([f"run={run}"]) == 0


def test_logging_leaves_the_running_statistics_alone(kd_train, tmp_path):
    """The classifier is asked for its logits at every logged update, in eval mode."""
    for every in (1, 5):
        assert kd_train(*MAPS, f"output=every{every}", f"train.log_every={every}").code == 0
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
    run = tmp_path / "runs/smoke/one"
    scores, (images, targets) = result(run), digits_test(8)
    weights, logits = load_file(tmp_path / scores["teacher"]["weights"]), []
    for i in range(3):
        network = build("mlp_tiny", num_classes=10, input_shape=(1, 8, 8))
        network.load_state_dict(part(weights, f"members.{i}."))
        logits.append(network.eval()(images).detach().double())
    p = torch.stack([(z / 2).softmax(-1) for z in logits]).mean(0)
    nll = F.cross_entropy(2 * p.log(), targets).item()
    assert scores["teacher"]["last"]["test"]["nll"] == pytest.approx(nll, rel=1e-5)
    apart = [F.cross_entropy(z, targets).item() for z in logits]
    assert max(apart) - min(apart) > 1e-3  # three networks, not one three times
    assert len(scores["teacher"]["selected_epoch"]) == 3
    assert evaluate.main([f"run={run}"]) == 0
    # The first is the teacher of a run without others, and all are found again.
    assert "teacher  found in" in kd_train(*SMALL, "run=alone").out
    assert kd_train(*SMALL, "teacher.members=4", "run=four").out.count("teacher  found in") == 3


# ---- a student becomes the next teacher; settings by name


def test_born_again_generations(kd_train, tmp_path):
    words = (*SMALL, "loss=kd:born_again")
    assert kd_train(*words, "run=first").code == 0
    student = tmp_path / "runs/smoke/first/student/last.safetensors"
    done = kd_train(*words, "run=second", f"teacher.checkpoint={student}")
    assert done.code == 0, done.err
    first, second = (result(tmp_path / f"runs/smoke/{run}") for run in ("first", "second"))
    assert second["teacher"]["last"]["test"]["nll"] == pytest.approx(first["student"]["last"]["test"]["nll"])
    assert second["student"]["last"]["test"] != first["student"]["last"]["test"]
    line = next(line for line in log_of(tmp_path / "runs/smoke/second") if "kd" in line)
    assert line["loss"] == pytest.approx(line["kd"] + line["ce"], rel=1e-6)
