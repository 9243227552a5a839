"""Run directories: another run's is refused, nothing is lost, and a finished run is only read."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kd import evaluate
from kd.config.schema import Recipe
from kd.models.factory import build
from kd.training.run import run_name, teacher_directory

RUN = ("recipe=smoke", "control=false", "run=one", "output=runs")


def files(folder):
    """All files by name, but for locks, which stay."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("[!.]*") if p.is_file()}


@pytest.fixture
def one_run(kd_train, tmp_path):
    assert kd_train(*RUN).code == 0
    return tmp_path / "runs/smoke/one"


def test_names_of_directories_are_those_of_earlier_versions():
    """Golden values: a run or teacher of an earlier kd is found again."""
    recipe = Recipe(name="t", output="o", seed=3)
    assert run_name(recipe) == "seed3-4b39431b52b2"
    assert str(teacher_directory(recipe, "abc")) == "o/teachers/resnet50.tv_in1k-5816e1a39c3b"


def test_another_recipe_is_refused_and_an_earlier_run_is_kept_aside(one_run, kd_train, tmp_path):
    before = files(tmp_path)
    done = kd_train(*RUN, "loss.temperature=2")
    assert (done.code, done.err.count("\n"), files(tmp_path)) == (2, 1, before)
    assert "run=one holds another recipe (loss.temperature: 4.0, now 2.0; 1 differences)" in done.err
    earlier = files(one_run)
    done = kd_train(*RUN, "loss.temperature=2", "resume=false")
    assert done.code == 0, done.err
    assert files(one_run.with_name("one.old-1")) == earlier


def test_another_teacher_under_the_same_path_is_another_run(one_run, kd_train, tmp_path):
    (teacher,) = (tmp_path / "runs/teachers").glob("mlp*")
    weights = load_file(teacher / "last.safetensors")
    words = ("recipe=smoke", "control=false", "run=two", "output=runs", "teacher.checkpoint=own.safetensors")
    for scale, code in ((1.0, 0), (1.01, 2)):
        save_file({name: scale * value for name, value in weights.items()}, tmp_path / "own.safetensors")
        done = kd_train(*words)
        assert done.code == code
    assert "run=two holds another recipe (teacher_checkpoint_hash: " in done.err


def directory_of(path, model):
    """A directory of timm's local-dir: with random weights."""
    network = build(model, num_classes=10, input_shape=(1, 8, 8))
    path.mkdir()
    config = {"architecture": model, "num_classes": 10, "pretrained_cfg": {"input_size": [1, 8, 8], "num_classes": 10}}
    (path / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), path / "model.safetensors")


TUNED = ("teacher.finetune=true", "teacher.epochs=4")
STARTS = {
    "student.checkpoint": ("student.model=cnn_tiny", "student.checkpoint=own/model.safetensors"),
    "student in a directory": ("student.model=local-dir:own", "student.pretrained=true"),
    "teacher in a directory": ("teacher.model=local-dir:own", "teacher.pretrained=true", *TUNED),
    "file of timm's pretrained_cfg": (
        "student.model=cnn_tiny",
        "student.pretrained=true",
        "student.model_kwargs={pretrained_cfg: {file: own/model.safetensors, num_classes: 10, input_size: [1, 8, 8]}}",
    ),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_overwritten_starting_weights_are_another_run(start, kd_train, tmp_path):
    directory_of(tmp_path / "own", "cnn_tiny")
    words = ("recipe=smoke", "control=false", "run=one", "output=runs", *start)
    done = kd_train(*words)
    assert done.code == 0, done.err
    earlier = files(tmp_path / "runs")
    assert kd_train(*words).code == 0
    weights = load_file(tmp_path / "own/model.safetensors")
    save_file({name: 1.01 * value for name, value in weights.items()}, tmp_path / "own/model.safetensors")
    done = kd_train(*words)
    assert (done.code, done.err.count("\n"), files(tmp_path / "runs")) == (2, 1, earlier)
    assert "run=one holds another recipe (weight_files." in done.err
    assert "model.safetensors: " in done.err
    assert kd_train(*words, "run=two").code == 0
    teachers = len(list((tmp_path / "runs/teachers").glob("[!.]*")))
    assert teachers == (2 if TUNED[0] in start else 1)


def test_a_checkpoint_of_the_student_is_as_one_of_the_teacher(kd_train, tmp_path):
    """Found behind its prefix, chosen by its entry, its head replaced; a misfit is one line that names the setting."""
    directory_of(tmp_path / "own", "cnn_tiny")
    weights = load_file(tmp_path / "own/model.safetensors")
    weights["fc.weight"] = weights["fc.weight"][:7]
    weights["fc.bias"] = weights["fc.bias"][:7]
    torch.save({"net": {f"module.{name}": tensor for name, tensor in weights.items()}, "ema": weights}, "w.pth")
    words = ("recipe=smoke", "control=false", "output=runs", "student.model=cnn_tiny", "student.checkpoint=w.pth")
    done = kd_train(*words, "dry_run=true")
    assert done.err.startswith(
        "error: student.checkpoint=w.pth: holds several networks that fit (net.module, ema); type"
    )
    assert kd_train(*words, "dry_run=true", "student.checkpoint_key=net").code == 0
    done = kd_train(*words, "student.checkpoint_key=ema", "student.model=cnn_small")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "error: student.checkpoint=w.pth: does not fit the network: " in done.err
    done = kd_train(*words[:-1], "student.checkpoint_key=ema")
    assert "student.checkpoint_key=ema: chooses in a file, and student.checkpoint is null" in done.err
    assert "student.checkpoint=none.pth: no such file" in kd_train(*words, "student.checkpoint=none.pth").err


def test_weights_that_are_not_read_do_not_count(kd_train, tmp_path):
    directory_of(tmp_path / "own", "cnn_tiny")
    words = ("recipe=smoke", "control=false", "run=one", "output=runs", "student.model=local-dir:own")
    assert kd_train(*words).code == 0
    (tmp_path / "own/model.safetensors").write_bytes(b"")
    assert kd_train(*words).code == 0
    config = tmp_path / "own/config.json"
    config.write_text(config.read_text().replace("cnn_tiny", "cnn_small"))
    assert "holds another recipe (weight_files.student.config.json: " in kd_train(*words).err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("output=file", "file/smoke: Not a directory"),
        ("name=a/b", "must be a plain directory name"),
        ("name=teachers", "choose another name"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_anything_is_made(kd_train, tmp_path, word, said):
    (tmp_path / "file").write_text("")
    done = kd_train(*RUN, word)
    assert (done.code, done.err.count("\n"), said in done.err) == (2, 1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_finished_run_is_only_read(one_run, kd_train, tmp_path):
    before = files(tmp_path)
    done = kd_train(*RUN)
    assert done.out.splitlines()[-1] == "runs/smoke/one/result.json"
    assert "epoch" not in done.out
    assert evaluate.main(["run=runs/smoke/one"]) == 0
    assert files(tmp_path) == before


def test_one_teacher_serves_all_recipes_and_finished_stages_are_skipped(one_run, kd_train, tmp_path):
    shutil.rmtree(one_run / "student")
    first = json.loads((one_run / "result.json").read_text())
    (one_run / "result.json").unlink()
    done = kd_train(*RUN)
    assert "teacher  found in" in done.out
    assert "student  epoch" in done.out
    again = json.loads((one_run / "result.json").read_text())
    assert again["student"]["last"] == first["student"]["last"]
    assert "teacher  found in" in kd_train("recipe=smoke", "output=runs", "control=false", "loss.temperature=2").out
    assert len(list((tmp_path / "runs/teachers").glob("mlp*"))) == 1


def test_too_few_validation_images_stop_a_run_before_anything_is_trained(kd_train, tmp_path):
    (tmp_path / "few").mkdir()
    for place in ("train", "val"):
        for name, shade in (("dark", 40), ("light", 200)):
            directory = tmp_path / "few" / place / name
            directory.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (16, 16), (shade + i,) * 3).save(directory / f"{i}.png")
    words = [
        "recipe=timm_finetune",
        "data.root=few",
        "data.image_size=16",
        "train.batch_size=2",
        "data.val_fraction=0.2",
    ]
    done = kd_train(*words, "teacher.model=mlp_wide", "student.model=cnn_tiny", "teacher.pretrained=false")
    assert done.code == 2
    assert "data.val_fraction=0.2: 2 validation images are too few to tell a teacher from chance" in done.err
