"""Data sets read through torchvision and through timm, from files made here."""

import inspect
import json
import struct
import sys
import types

import numpy as np
import pytest
import torch
from pictures import encoded, picture
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from kd.config.schema import DataConfig
from kd.data import load_data
from kd.data.library_sets import SETS, torchvision
from kd.errors import ConfigError, ImageError


def load(family, dataset, root, **settings):
    settings = {"name": "toy", "image_size": 28, "workers": 0, **settings}
    return load_data(DataConfig(family=family, dataset=dataset, root=root and str(root), **settings), 0)


def mnist_file(path, values):
    """MNIST's own format: a magic number with the dimensions, sizes, bytes."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path):
    found = load_digits()
    images = np.repeat(np.repeat(found.images, 3, 1), 3, 2)[:, :28, :28] * 15
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, rows in (("train", slice(0, 1000)), ("t10k", slice(1000, 1300))):
        mnist_file(raw / f"{part}-images-idx3-ubyte", images[rows])
        mnist_file(raw / f"{part}-labels-idx1-ubyte", found.target[rows])
    return tmp_path, images.astype(np.uint8), found.target


def test_a_set_that_torchvision_holds_as_an_array_becomes_tensors(mnist):
    root, images, targets = mnist
    data = load("torchvision", "FashionMNIST", root, shift=1)
    assert [len(s) for s in (data.train, data.val, data.test)] == [900, 100, 300]
    assert data.test.images[:, 0].numpy().tolist() == images[1000:1300].tolist()
    assert data.test.targets.tolist() == targets[1000:1300].tolist()
    seen = torch.cat([data.train.images, data.val.images])[:, 0].numpy()
    assert sorted(seen.reshape(1000, -1).tolist()) == sorted(images[:1000].reshape(1000, -1).tolist())
    assert data.class_names[0] == "T-shirt/top"
    assert data.input_shape == (1, 28, 28)


@pytest.mark.parametrize("layout", ["n h w c", "n c h w"])
def test_arrays_with_channels_last_and_first(monkeypatch, tmp_path, layout):
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (200, 3, 8, 8), dtype=np.uint8)

    class Held:
        def __init__(self, root, train, download):
            self.data = stored if layout == "n c h w" else stored.transpose(0, 2, 3, 1)
            self.targets = list(range(10)) * 20

    monkeypatch.setattr(datasets, "CIFAR10", Held)
    data = load("torchvision", "CIFAR10", tmp_path)
    assert np.array_equal(data.test.images.numpy(), stored)
    assert data.class_names == list("0123456789")


@pytest.fixture
def food(tmp_path):
    """Food-101's layout with three kinds of food."""
    meta, folder = tmp_path / "food-101" / "meta", tmp_path / "food-101" / "images"
    meta.mkdir(parents=True)
    lists = {"train": {}, "test": {}}
    for label in ("apple_pie", "ramen", "waffles"):
        (folder / label).mkdir(parents=True)
        for i in range(24):
            Image.new("RGB", (30, 40), (10 * i, len(label) * 20, 0)).save(folder / label / f"{i}.jpg")
        lists["train"][label] = [f"{label}/{i}" for i in range(20)]
        lists["test"][label] = [f"{label}/{i}" for i in range(20, 24)]
    for name, entries in lists.items():
        (meta / f"{name}.json").write_text(json.dumps(entries))
    return tmp_path


def test_a_set_of_files_is_streamed(food):
    data = load("torchvision", "Food101", food, verify=True)
    assert [len(s) for s in (data.train, data.val, data.test)] == [54, 6, 12]
    assert data.class_names == ["apple_pie", "ramen", "waffles"]
    batch = next(data.test.batches([torch.tensor([0, 5, 11])], None))
    assert batch.targets.tolist() == [0, 1, 2]
    green = batch.images[:, 1, 14, 14] * data.std[1] + data.mean[1]
    assert (green * 255).tolist() == pytest.approx([180, 100, 140], abs=3)


def gtsrb(root):
    folder = root / "gtsrb" / "GTSRB" / "Training"
    for label in ("00000", "00001"):
        (folder / label).mkdir(parents=True)
        picture(int(label)).save(folder / label / "00000_00000.ppm")


def pets(root):
    base = root / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    for i, name in enumerate(("Abyssinian_1", "beagle_7")):
        picture(i).save(base / "images" / f"{name}.jpg")
    (base / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\nbeagle_7 2 2 1\n")


def caltech101(root):
    for label in ("ant", "BACKGROUND_Google", "bee"):
        (root / "caltech101" / "101_ObjectCategories" / label).mkdir(parents=True)
        picture(3).save(root / "caltech101" / "101_ObjectCategories" / label / "image_0001.jpg")
    (root / "caltech101" / "Annotations").mkdir()


def caltech256(root):
    for number, label in enumerate(("001.ant", "002.bee"), 1):
        (root / "caltech256" / "256_ObjectCategories" / label).mkdir(parents=True)
        picture(number).save(root / "caltech256" / "256_ObjectCategories" / label / f"{number:03}_0001.jpg")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("GTSRB", gtsrb),
        ("OxfordIIITPet", pets),
        ("Caltech101", caltech101),
        ("Caltech256", caltech256),
    ],
)
def test_the_files_of_a_set_are_those_that_torchvision_reads(tmp_path, monkeypatch, name, make):
    make(tmp_path)
    given = {}
    monkeypatch.setattr("kd.data.library_sets.stream_data", lambda *args, **more: given.update(args[2]))
    monkeypatch.setitem(SETS, name, {"train": SETS[name]["train"]})
    torchvision(DataConfig(dataset=name, root=str(tmp_path)), 0)
    theirs = getattr(datasets, name)(str(tmp_path), **SETS[name]["train"])
    images, targets = given["train"]
    assert len(targets) == len(theirs) == 2
    for i in range(2):
        image, label = theirs[i]
        with image:
            assert np.array_equal(np.asarray(images.read(i)), np.asarray(image.convert("RGB")))
        assert targets[i] == label


@pytest.mark.parametrize(
    ("dataset", "root", "message"),
    [
        ("CIFAR", "here", r"data\.dataset=CIFAR: must be one of CIFAR10, .*; did you mean CIFAR10[0]?\?$"),
        (
            "CIFAR10",
            "here",
            r"data\.root=.*: torchvision cannot read CIFAR10 there .*; give .* or data\.download=true$",
        ),
    ],
)
def test_what_torchvision_cannot_find_is_one_line(tmp_path, dataset, root, message):
    with pytest.raises(ConfigError, match="^" + message):
        load("torchvision", dataset, root and tmp_path)


def test_every_set_of_the_table_exists_and_takes_these_arguments():
    for name, splits in SETS.items():
        parameters = inspect.signature(getattr(datasets, name).__init__).parameters
        for arguments in splits.values():
            assert {"root", "download", *arguments} <= set(parameters), name


# --- timm, through a stand-in for the `datasets` library, which knows the network


class Table:
    """As much of datasets.Dataset as timm uses."""

    def __init__(self, rows):
        self.rows = rows
        label = types.SimpleNamespace(names=["cat", "dog"])
        self.info = types.SimpleNamespace(features={"image": None, "label": label}, splits=None)

    def cast_column(self, name, kind):
        return self

    def remove_columns(self, name):
        return self

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    def __iter__(self):
        return iter(self.rows)


def rows(count, first):
    images = (Image.new("RGB", (32, 32), (first + i, 0, 200 * (i % 2))) for i in range(count))
    return [
        {"image": {"bytes": encoded(image, "PNG"), "path": f"{first + i}.png"}, "label": i % 2}
        for i, image in enumerate(images)
    ]


@pytest.fixture
def hub(monkeypatch):
    """Splits by name, to be filled by the test."""
    splits = {}

    def load_dataset(name, split, cache_dir):
        if name == "org/none":
            raise ConnectionError("could not reach\nthe hub")
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        return Table(splits[split])

    fake = types.ModuleType("datasets")
    fake.load_dataset, fake.Image = load_dataset, lambda decode: None
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    return splits


def test_a_hub_set_is_read_in_the_splits_it_has(hub):
    hub["train"], hub["validation"] = rows(40, 0), rows(6, 100)
    hub["test"] = [{**row, "label": -1} for row in rows(8, 200)]  # as many have it: no test split
    data = load("timm", "hfds/org/pets", None, verify=True)
    assert [len(s) for s in (data.train, data.val, data.test)] == [36, 4, 6]
    assert data.class_names == ["cat", "dog"]
    batch = next(data.test.batches([torch.tensor([4, 1])], None))
    assert batch.targets.tolist() == [0, 1]
    red, blue = (batch.images[:, c, 0, 0] * data.std[c] + data.mean[c] for c in (0, 2))
    assert (red * 255).round().tolist() == [104, 101]
    assert (blue * 255).round().tolist() == [0, 200]


def test_a_bad_image_of_a_hub_set_is_named_and_not_replaced(hub):
    hub["train"], hub["test"] = rows(40, 0), rows(6, 100)
    hub["test"][3]["image"]["bytes"] = b"text"
    test = load("timm", "hfds/org/pets", None).test
    with pytest.raises(ImageError, match=r"^cannot read 'test image 3 103.png': not a JPEG, PNG or WEBP image$"):
        list(test.batches([torch.arange(6)], None))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("tfds/mnist", "data.dataset=tfds/mnist: must be hfds/NAME; for files on this machine data.family=folder"),
        ("hfds/org/none", "data.dataset=hfds/org/none: timm cannot open its split train: could not reach the hub"),
        (
            "hfds/org/unsplit",
            "data.dataset=hfds/org/unsplit: needs a split 'train' whose 'label' has 2 or more named classes",
        ),
    ],
)
def test_what_timm_cannot_open_is_one_line(hub, dataset, message):
    with pytest.raises(ConfigError) as error:
        load("timm", dataset, None)
    assert str(error.value) == message
