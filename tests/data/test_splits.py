"""Splits, subsets, wrong labels and an omitted class, on data sets held in memory and on streamed ones."""

import io
import math
import types

import numpy as np
import pytest
import torch
from pictures import encoded, everything, splits
from PIL import Image
from sklearn.datasets import load_digits

from kd.config.schema import DataConfig
from kd.data import FAMILIES, load_data
from kd.data.base import family
from kd.data.image_files import Source
from kd.data.subsets import draw
from kd.data.tensors import tensor_data
from kd.errors import ConfigError
from kd.training.loop import Trainer

NAMES = ("train", "val", "test")


def digits(seed=0, **settings):
    return load_data(DataConfig(image_size=8, **settings), seed)


# --- which samples


def test_digits_are_divided_by_class_without_loss_and_keep_their_labels():
    published = load_digits()
    label_of = {tuple(i.flatten().astype(int)): t for i, t in zip(published.images, published.target, strict=True)}
    assert len(label_of) == 1797  # no image is there twice
    data = digits()
    assert [len(s) for s in splits(data)] == [1293, 144, 360]  # 20 % of 1,797, then 10 % of the 1,437 left, rounded up
    for split in splits(data):
        for image, target in zip(split.images, split.targets, strict=True):
            assert label_of.pop(tuple((image * 16).long().flatten().tolist())) == target
    assert not label_of
    share = np.bincount(data.train.targets) / len(data.train)
    for split in (data.val, data.test):
        assert np.abs(np.bincount(split.targets) - share * len(split)).max() <= 1
    assert (data.input_shape, data.class_names, data.num_classes) == ((1, 8, 8), list("0123456789"), 10)


def test_the_hashes_by_which_old_runs_resume_have_not_changed(tmp_path):
    assert digits().hash.startswith("40dda2f4f747ac26")
    assert load_data(DataConfig(family="mnist5k"), 0).hash.startswith("8890233e2a274309")
    for label in ("cat", "Dog"):
        (tmp_path / label).mkdir()
        for i in range(20):
            (tmp_path / label / f"{i}.jpg").write_bytes(bytes(10 + i))
    assert load_data(DataConfig(family="folder", root=str(tmp_path)), 0).hash.startswith("96dc4bf0fd18e8fb")


@pytest.mark.parametrize(
    ("counts", "setting"),
    [
        ((20, 1), "data.test_fraction=0.2"),  # one image cannot be in two splits
        ((50, 2), "data.test_fraction=0.2"),  # two of 52 at 20 %: the rare class is not in the test split
        ((8, 3), "data.val_fraction=0.1"),  # enough to test on, nothing left to select on
    ],
)
def test_a_class_with_too_few_images_is_an_error(counts, setting):
    images, labels = torch.zeros(sum(counts), 1), np.repeat([0, 1], counts)
    with pytest.raises(ConfigError, match=f"^{setting}: cannot hold out images of every class of digits"):
        draw(DataConfig(), {"train": (images, labels)}, ["cat", "dog"])


def test_a_new_data_set_is_one_function(monkeypatch):
    monkeypatch.setitem(FAMILIES, "stripes", None)  # so that it is gone after the test

    @family
    def stripes(config, seed):
        images, targets = torch.zeros(40, 1, 4, 4), np.arange(40) % 2
        images[targets == 1, :, ::2] = 1
        return tensor_data(config, seed, {"train": (images, targets)}, ["plain", "striped"])

    assert len(load_data(DataConfig(family="stripes"), 0).test) == 8
    with pytest.raises(ConfigError, match=r"data\.family=stripe: must be one of .*mnist5k.*stripes"):
        load_data(DataConfig(family="stripe"), 0)


# --- what a recipe changes about them, for each way in which samples are kept


class RedLevels(Source):
    """300 images in three classes that can be told apart, each by its red level within the class."""

    reader = types.SimpleNamespace(class_to_idx={"class0": 0, "class1": 1, "class2": 2})

    def open(self, i):
        i = self.images[i].item()
        return io.BytesIO(encoded(Image.new("RGB", (8, 8), (2 * (i % 100), 80 * (i // 100), 0)), "PNG"))

    def name(self, i):
        return f"train image {self.images[i]}"


@pytest.fixture(params=["mnist1d", "timm"])
def load(request, monkeypatch):
    """A loader of a tensor family, and of a streamed one with images made here in place of the hub's."""
    settings = {"name": "toy", "family": request.param, "image_size": 8, "workers": 0, "dataset": "hfds/toy"}
    train = RedLevels(np.arange(300)), np.repeat([0, 1, 2], 100)
    monkeypatch.setattr("kd.data.library_sets._split", lambda config, split: train if split == "train" else None)
    return lambda **changes: load_data(DataConfig(**settings | changes), 0)


def stored(split):
    """All images of a training split as a set, before normalisation, whose statistics are the training images' own."""
    images = split.images if isinstance(split.images, torch.Tensor) else everything(split, None)[0]
    return {tuple(image.flatten().tolist()) for image in images}


def test_wrong_labels_are_in_training_only_and_reach_its_batches(load):
    clean, noisy = load(), load(label_noise=0.4)
    for name in NAMES:
        (images, labels), (same, changed) = (
            everything(getattr(clean, name), None),
            everything(getattr(noisy, name), None),
        )
        assert torch.equal(images, same)
        assert torch.equal(changed, getattr(noisy, name).targets)
        assert torch.equal(labels, changed) == (name != "train")
    share = (clean.train.targets != noisy.train.targets).double().mean().item()
    assert share == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / len(clean.train)))
    assert clean.hash != noisy.hash
    assert torch.equal(everything(noisy.train, 3)[1], noisy.train.targets)  # the augmented view


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


def test_the_student_never_sees_the_omitted_class_and_teacher_and_test_keep_it(load):
    plain, data = load(), load(omit_class=1)
    assert plain.transfer is plain
    assert data.hash == plain.hash  # the same images; which of them the student sees is the recipe's
    for name in NAMES:
        theirs = getattr(data, name)
        assert torch.equal(theirs.targets, getattr(plain, name).targets)
        ours, labels = everything(getattr(data.transfer, name), None)
        keep = theirs.targets != 1 if name != "test" else torch.ones(len(theirs), dtype=torch.bool)
        assert (1 in labels.tolist()) == (name == "test")
        assert torch.equal(labels, theirs.targets[keep])
        assert torch.equal(ours, everything(theirs, None)[0][keep])
    assert data.transfer.num_classes == plain.num_classes  # the head keeps its size


def test_only_student_and_control_train_without_the_omitted_class(kd_train, monkeypatch):
    classes, fit = {}, Trainer.fit

    def fit_and_tell(self):
        data = self.stage.data
        classes[self.stage.name] = [set(split.targets.tolist()) for split in splits(data)]
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", fit_and_tell)
    assert kd_train("recipe=smoke", "data.omit_class=7").code == 0
    every = set(range(10))
    assert classes["teacher"] == [every, every, every]
    assert classes["student"] == classes["control"] == [every - {7}, every - {7}, every]


def test_a_smaller_training_set_is_stratified_and_part_of_a_larger_one(load):
    whole, large, small = load(), load(train_size=150), load(train_size=60)
    for data, size in ((large, 150), (small, 60)):
        share = whole.train.targets.bincount() / len(whole.train) * size
        assert len(data.train) == size
        assert (data.train.targets.bincount(minlength=whole.num_classes) - share).abs().max() <= 1
        assert torch.equal(data.val.targets, whole.val.targets)
        assert torch.equal(data.test.targets, whole.test.targets)
    rows = [stored(data.train) for data in (small, large, whole)]
    assert len(rows[0]) == 60
    assert rows[0] < rows[1] < rows[2]
    assert load(train_size=len(whole.train)).hash == whole.hash


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"omit_class": 10}, r"data\.omit_class=10: must be ≤ 9, the last class of digits$"),
        (
            {"train_size": 9999},
            r"data\.train_size=9999: must be ≤ 1293, the training images of digits",
        ),
        ({"train_size": 5}, r"data\.train_size=5: must be .* and enough for one of every class$"),
        ({"label_noise": 0.1, "omit_class": 0}, r"data\.omit_class=0 with data\.label_noise=0\.1: "),
    ],
)
def test_what_cannot_work_names_the_setting(settings, message):
    with pytest.raises(ConfigError, match="^" + message):
        digits(**settings)
