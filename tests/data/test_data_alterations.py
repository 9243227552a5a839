"""Fewer training images, an omitted class and wrong labels, on sets held in memory and on streamed ones."""

import math
import types

import numpy as np
import pytest
import torch
from PIL import Image

from kd.config.schema import DataConfig
from kd.data import load_data
from kd.errors import ConfigError

NAMES = ("train", "val", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 100 images that can be told apart, each by its red level within the class."""
    root = tmp_path_factory.mktemp("toy")
    for label in range(3):
        path = root / f"class{label}"
        path.mkdir()
        for i in range(100):
            Image.new("RGB", (8, 8), (2 * i, 80 * label, 0)).save(path / f"{i:03}.png")
    return str(root)


@pytest.fixture(params=["mnist1d", "folder", "timm"])
def load(request, folder, monkeypatch):
    """A loader of one family each: tensors, files, and timm's reader of the hub with files in its place."""
    settings = {"name": "toy", "family": request.param, "image_size": 8, "workers": 0}
    if request.param == "folder":
        settings |= {"root": folder}
    if request.param == "timm":
        settings |= {"dataset": "hfds/toy", "root": folder}
        reader = Reader()
        monkeypatch.setattr("kd.data.timm_sets._open", lambda config, split: reader if split == "train" else None)
    return lambda **changes: load_data(DataConfig(**settings | changes), 0)


class Reader:
    reader = types.SimpleNamespace(class_to_idx={"a": 0, "b": 1, "c": 2})
    targets = np.repeat([0, 1, 2], 100)

    def read(self, i):
        return Image.new("RGB", (8, 8), (i % 100, 80 * (i // 100), 0))

    def name(self, i):
        return f"train image {i}"

    identity = name


def content(split):
    """Evaluation images and labels of a whole split."""
    (batch,) = split.batches([torch.arange(len(split))], None)
    return batch.images, batch.targets


def stored(split):
    """All images of a training split as a set, before normalisation, whose statistics are the training images' own."""
    images = split.images if hasattr(split, "images") else content(split)[0]
    return {tuple(image.flatten().tolist()) for image in images}


# --- wrong labels


def test_wrong_labels_are_in_training_only_and_reach_its_batches(load):
    clean, noisy = load(), load(label_noise=0.4)
    for name in NAMES:
        (images, labels), (same, changed) = content(getattr(clean, name)), content(getattr(noisy, name))
        assert torch.equal(images, same)
        assert torch.equal(changed, getattr(noisy, name).targets)
        assert torch.equal(labels, changed) == (name != "train")
    share = (clean.train.targets != noisy.train.targets).double().mean().item()
    assert share == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / len(clean.train)))
    assert clean.hash != noisy.hash
    (batch,) = noisy.train.batches([torch.arange(len(noisy.train))], 3)  # the augmented view
    assert torch.equal(batch.targets, noisy.train.targets)


def test_the_same_split_seed_gives_the_same_wrong_labels_and_more_noise_keeps_them(load):
    clean, some, again, more = (load(label_noise=p).train.targets for p in (0.0, 0.2, 0.2, 0.5))
    assert torch.equal(some, again)
    assert torch.equal(some[some != clean], more[some != clean])
    # another split seed divides other images, so the labels alone cannot be compared: their rates can
    other, other_clean = load(label_noise=0.2, split_seed=1).train.targets, load(split_seed=1).train.targets
    assert not torch.equal(other != other_clean, some != clean)


def test_wrong_labels_are_uniform_over_the_other_classes():
    """Chi-square of the 12 x 11 cells of true and wrong class, 20,000 points: within five deviations of its mean."""
    settings = {"name": "mixture", "family": "mixture"}
    clean, noisy = (load_data(DataConfig(**settings, label_noise=p), 0).train.targets for p in (0.0, 0.6))
    cells = torch.zeros(12, 12).index_put_((clean, noisy), torch.ones(()), accumulate=True)
    off = ~torch.eye(12, dtype=torch.bool)
    expected = cells.sum(1, keepdim=True).expand(12, 12)[off] * 0.6 / 11
    chi_square = ((cells[off] - expected).square() / expected).sum().item()
    assert chi_square == pytest.approx(132, abs=5 * math.sqrt(2 * 132))
    kept = cells.diagonal().sum().item() / 20_000
    assert kept == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / 20_000))


# --- an omitted class


def test_the_student_never_sees_the_class_and_teacher_and_test_keep_it(load):
    plain, data = load(), load(omit_class=1)
    assert data.hash == plain.hash  # the same images; which of them the student sees is the recipe's
    for name in NAMES:
        theirs = getattr(data, name)
        assert torch.equal(theirs.targets, getattr(plain, name).targets)
        ours, labels = content(getattr(data.transfer, name))
        keep = theirs.targets != 1 if name != "test" else torch.ones(len(theirs), dtype=torch.bool)
        assert (1 in labels.tolist()) == (name == "test")
        assert torch.equal(labels, theirs.targets[keep])
        assert torch.equal(ours, content(theirs)[0][keep])
    assert data.transfer.num_classes == plain.num_classes  # the head keeps its size


def test_without_an_omitted_class_the_student_sees_what_the_teacher_sees(load):
    data = load()
    assert data.transfer is data


def test_only_the_students_stages_leave_the_class_out_and_one_teacher_serves_all(kd_train, monkeypatch):
    from kd.models.factory import Teacher
    from kd.training import pipeline

    seen = {}

    class Recorder:
        def __init__(self, stage, *rest):
            seen[stage.name] = {name: set(getattr(stage.data, name).targets.tolist()) for name in NAMES}

        def fit(self):
            pass

    monkeypatch.setattr(pipeline, "Trainer", Recorder)

    def find_teacher(run):
        pipeline.train(run, pipeline.teacher_stage(run))
        return Teacher(pipeline.teacher_network(run))

    monkeypatch.setattr(pipeline, "find_teacher", find_teacher)
    monkeypatch.setattr(pipeline, "check_teacher", lambda run, teacher: None)
    monkeypatch.setattr("kd.training.results.write_result", lambda run: seen.update(folder=run.teacher_directory) or {})
    monkeypatch.setattr("kd.training.results.print_result", lambda result, console: None)
    folders = []
    for omitted in ("null", "7"):
        assert kd_train("recipe=smoke", f"data.omit_class={omitted}").code == 0
        folders.append(seen["folder"])
    every = set(range(10))
    assert seen["teacher"] == {"train": every, "val": every, "test": every}
    assert seen["student"] == seen["control"] == {"train": every - {7}, "val": every - {7}, "test": every}
    assert folders[0] == folders[1]


# --- fewer training images


def test_a_smaller_training_set_is_stratified_and_part_of_a_larger_one(load):
    whole, large, small = load(), load(train_size=150), load(train_size=60)
    classes = whole.num_classes
    for data, size in ((large, 150), (small, 60)):
        share = whole.train.targets.bincount() / len(whole.train) * size
        assert len(data.train) == size
        assert (data.train.targets.bincount(minlength=classes) - share).abs().max() <= 1
        assert torch.equal(data.val.targets, whole.val.targets)
        assert torch.equal(data.test.targets, whole.test.targets)
    rows = [stored(data.train) for data in (small, large, whole)]
    assert len(rows[0]) == 60
    assert rows[0] < rows[1] < rows[2]


def test_all_of_the_training_images_is_all_of_them(load):
    whole = load()
    assert load(train_size=len(whole.train)).hash == whole.hash


# --- what cannot work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"omit_class": 3}, r"data\.omit_class=3: must be ≤ 2, toy has 3 classes counted from 0$"),
        ({"omit_class": -1}, r"data\.omit_class=-1: must be ≥ 0"),
        ({"train_size": 0}, r"data\.train_size=0: must be ≥ 1"),
        ({"train_size": 999}, r"data\.train_size=999: must be ≤ 216, the training images of toy; null takes all$"),
        ({"train_size": 2}, r"data\.train_size=2: leaves no training image of class 'class\d' of toy; raise it$"),
        ({"label_noise": 1.0}, r"data\.label_noise=1\.0: must be ≥ 0 and < 1"),
        ({"label_noise": math.nan}, r"data\.label_noise=nan: must be finite and ≥ 0"),
        ({"label_noise": 0.1, "omit_class": 0}, r"data\.omit_class=0 with data\.label_noise=0\.1: one of them only"),
    ],
)
def test_what_cannot_work_names_the_setting(folder, settings, message):
    with pytest.raises(ConfigError, match="^" + message):
        load_data(DataConfig(name="toy", family="folder", root=folder, **settings), 0)


@pytest.mark.parametrize("setting", ["train_size", "omit_class", "label_noise"])
def test_they_are_part_of_what_a_run_is(setting):
    from kd.config.schema import Recipe, content_hash, identity

    changed = Recipe(data=DataConfig(**{setting: 0.5 if setting == "label_noise" else 5}))
    assert content_hash(identity(changed)) != content_hash(identity(Recipe()))
