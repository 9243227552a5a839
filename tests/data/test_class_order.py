"""data.class_order: timm's own numbering, a file's, and one line for a file that does not fit."""

import pytest
import torch
from pictures import load_folder, make_folder, names, splits

from kd.config.schema import DataConfig
from kd.data import load_data
from kd.errors import ConfigError

MIXED = ("Bird", "cat", "Dog", "ant", "Zebra", "class10", "class9")
NUMBERS = tuple(str(i) for i in range(12))


@pytest.mark.parametrize("classes", [MIXED, NUMBERS])
def test_natural_is_the_order_of_timms_reader(tmp_path, classes):
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    make_folder(tmp_path, 15, classes)
    own, timms = load_folder(tmp_path), load_folder(tmp_path, class_order="natural")
    index = ReaderImageFolder(str(tmp_path)).class_to_idx
    assert own.class_names == sorted(classes) != timms.class_names == sorted(index, key=index.get)
    for before, after in zip(splits(own), splits(timms), strict=True):  # the same images under the same names
        assert names(before) == names(after)
        assert [own.class_names[t] for t in before.targets] == [timms.class_names[t] for t in after.targets]
        batch = next(after.batches([torch.tensor([0, 1])], None))
        assert torch.equal(batch.targets, after.targets[:2])
    assert own.hash != timms.hash


def test_an_order_that_is_the_data_sets_own_changes_nothing(tmp_path):
    make_folder(tmp_path, 9)
    assert load_folder(tmp_path).hash == load_folder(tmp_path, class_order="natural").hash


def test_a_file_gives_the_order_beside_the_images_or_elsewhere(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "root", 9)
    listed = ["two words", "one", "three"]
    (root / "map.txt").write_text("\n".join(listed) + "\n\n")
    by_root, by_path = load_folder(root, class_order="map.txt"), load_folder(root, class_order=str(root / "map.txt"))
    assert by_root.class_names == by_path.class_names == listed
    assert by_root.hash == by_path.hash


def test_the_true_probabilities_follow_their_classes(tmp_path):
    config = DataConfig(name="mixture", family="mixture", train_size=100)
    before = load_data(config, 0)
    (tmp_path / "map.txt").write_text("\n".join(reversed(before.class_names)))
    config.class_order = str(tmp_path / "map.txt")
    after = load_data(config, 0)
    assert torch.equal(after.test.posterior, before.test.posterior.flip(1))
    assert torch.equal(after.test.targets, 11 - before.test.targets)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("one\nthree\ndog", "it has 'dog', which the data lacks; the data has 'two words', which it lacks"),
        ("one\nthree", "must name the classes of the data; the data has 'two words', which it lacks"),
        ("one\nthree\ntwo words\none", "must name each class of the data once"),
        ("\udcff", "cannot be read as UTF-8 text"),
        (None, "must be sorted, natural, or a file of class names, one on a line"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, text, said):
    root, path = make_folder(tmp_path / "root", 9), tmp_path / "map.txt"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as error:
        load_folder(root, class_order=str(path))
    assert str(error.value).startswith(f"data.class_order={path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
