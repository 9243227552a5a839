"""The estimate of a teacher's label smoothing: at the optimum, on a network of known smoothing, as a command."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from kd import probe
from kd.config.schema import LossConfig
from kd.training.teacher_smoothing import smoothing_warning

# --- what a run says


@pytest.mark.parametrize(
    ("mass", "loss", "said"),
    [
        (0.1, {}, "loss.temperature=4 > 1 with a teacher trained with label smoothing (0.1, uniform)"),
        (0.1, {"temperature": 1.0}, ""),
        (0.1, {"kd_weight": 0.0}, ""),
        (0.0, {}, ""),
        (0.1, {"teacher_smoothing": 0.3}, "loss.teacher_smoothing=0.3: the teacher was trained with 0.1 (uniform)"),
        (0.1, {"teacher_smoothing": 0.1}, ""),
    ],
)
def test_a_warning_about_the_loss(mass, loss, said):
    warning = smoothing_warning(mass, LossConfig(**loss), exact=True)
    assert warning.startswith(said)
    assert bool(warning) == bool(said)
    if loss.get("teacher_smoothing"):
        assert smoothing_warning(mass, LossConfig(**loss), exact=False) == ""  # an estimate may be the wrong one


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A teacher of known smoothing, under the other convention so that it has to be converted, by kd.train itself."""
    from kd.config.schema import DataConfig, OptimizerConfig, Recipe, TeacherConfig, TrainConfig
    from kd.training import pipeline as stages

    recipe = Recipe(
        name="t",
        output=str(tmp_path_factory.mktemp("teacher")),
        data=DataConfig(name="mixture", family="mixture", train_size=600),
        teacher=TeacherConfig(model="mlp_mini", epochs=60, label_smoothing=0.2 * 11 / 12, smoothing="others"),
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.0),
        train=TrainConfig(batch_size=100),
    )
    recipe.student.model = "mlp_nano"
    run = stages.prepare(recipe)
    stages.train(run, stages.teacher_stage(run))
    AcceleratorState._reset_state(reset_partial_state=True)
    return run.teacher_directory / "last.safetensors"


def taken(kd_train, weights, *words):
    """What a run says before it trains a student from this file."""
    student = ("student.model=mlp_nano", "student.epochs=1", "control=false", "train.batch_size=100")
    teacher = ("teacher.model=mlp_mini", f"teacher.checkpoint={weights}")
    done = kd_train("recipe=smoke", "data=mixture", *student, *teacher, *words)
    assert done.code == 0, done.err
    return done


def test_a_recorded_smoothing_is_printed_and_warned_of_at_high_temperature(kd_train, weights):
    done = taken(kd_train, weights)
    assert "teacher  its weights record label_smoothing=0.183333 (others)\n" in done.out
    assert done.out.count("warning  ") == 1
    assert "warning  loss.temperature=4 > 1 with a teacher trained with label smoothing (0.2, uniform)" in done.out
    result = json.loads(Path(done.out.splitlines()[-1]).read_text())
    assert result["teacher"]["label_smoothing"] == pytest.approx(0.2 * 11 / 12)
    assert result["teacher"]["smoothing"] == "others"
    assert "warning" not in taken(kd_train, weights, "loss.teacher_smoothing=0.2").out


def test_without_a_record_the_smoothing_is_estimated(kd_train, weights, tmp_path):
    save_file(load_file(weights), tmp_path / "bare.safetensors")
    done = taken(kd_train, tmp_path / "bare.safetensors")
    line = next(line for line in done.out.splitlines() if "estimate" in line)
    assert line.startswith("teacher  its weights record no smoothing; estimate: label_smoothing 0.")
    assert line.endswith("nothing speaks against it")
    assert "warning  loss.temperature=4 > 1" in done.out
    result = json.loads(Path(done.out.splitlines()[-1]).read_text())
    assert "label_smoothing" not in result["teacher"]  # an estimate is no record


# --- the command


@pytest.fixture
def kd_probe(called):
    return partial(called, "kd.probe", probe.main)


def test_the_command_finds_the_smoothing_that_the_teacher_was_trained_with(kd_probe, weights):
    code, out, err = kd_probe("data=mixture", f"checkpoint={weights}", "split=val")
    assert (code, err) == (0, "")
    first, recorded, estimate = out.splitlines()
    assert first == f"model     mlp_mini, {weights}"
    assert recorded.startswith("recorded  0.18333")
    mass, low, high, others = [float(word.strip(",);")) for word in estimate.split() if word[0] == "0"]
    assert low < 0.2 < high
    assert mass == pytest.approx(0.2, abs=0.1)
    assert others == pytest.approx(mass * 11 / 12, abs=1e-3)


def test_a_doubted_estimate_is_said_to_be_and_exits_with_1(kd_probe, weights):
    code, out, _ = kd_probe("data=mixture", f"checkpoint={weights}", "data.train_size=60")
    assert code == 1
    assert re.search(r"; not to be trusted: only (60|5\d) samples are classified correctly$", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=mixture"], "model: not given and not recorded with the weights; type model=NAME"),
        (["data=digits", "checkpoint=FILE"], "FILE: does not fit the network"),
        (["data=digits", "model=mlp_tiny"], "model=mlp_tiny: timm has no weights for it; type checkpoint=PATH"),
        (["data=mixture", "split=all", "model=x"], "split=all: must be one of train, val, test"),
    ],
)
def test_a_command_line_that_cannot_work_is_one_line_and_exit_2(kd_probe, weights, words, message):
    code, out, err = kd_probe(*(word.replace("FILE", str(weights)) for word in words))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {message.replace('FILE', str(weights))}")


def test_the_benchmark_reads_training_and_held_out_samples(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks import probe as benchmark

    lines = list(benchmark.rows(benchmark.Task("mixture", "mlp_mini", ("teacher.epochs=8",), (0.1,)), 1, tmp_path))
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| mixture teacher.epochs=8", "0.1", split] for split in ("training", "held out")
    ]
