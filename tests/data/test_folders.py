"""Folders of images: layouts, views by worker processes, and what stops a run before anything is written."""

import os
import random
import shutil
import tempfile

import numpy as np
import pytest
import torch
from pictures import CLASSES, encoded, everything, load_folder, make_folder, names, picture, rng_state, splits
from PIL import Image

from kd.errors import ConfigError, ImageError

AUGMENTED = {"hflip": 0.5, "crop_scale": 0.3, "auto_augment": "rand-m9-n2-mstd0.5", "random_erase": 0.5}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An unsplit folder, not to be changed."""
    return make_folder(tmp_path_factory.mktemp("images"), 20)


@pytest.fixture
def own(images, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(images, tmp_path / "own")


# --- layouts


def test_an_unsplit_folder_is_divided_by_class_without_loss(images):
    data = load_folder(images)
    assert [len(s) for s in splits(data)] == [43, 5, 12]
    assert sorted(name for s in splits(data) for name in names(s)) == sorted(str(p) for p in images.rglob("*.*"))
    assert (data.class_names, data.input_shape) == (sorted(CLASSES), (3, 24, 24))
    for split in splits(data):
        assert [data.class_names[t] for t in split.targets] == [name.split(os.sep)[-2] for name in names(split)]
    assert np.bincount(data.test.targets).tolist() == [4, 4, 4]
    again = load_folder(images, seed=5)
    assert [names(s) for s in splits(again)] == [names(s) for s in splits(data)]
    assert names(load_folder(images, split_seed=1).test) != names(data.test)


@pytest.mark.parametrize(
    ("given", "sizes", "test"),
    [
        ({"train": 20}, [43, 5, 12], "train"),
        ({"train": 20, "val": 3}, [54, 6, 9], "val"),  # as in ImageNet
        ({"train": 4, "val": 2, "test": 3}, [12, 6, 9], "test"),
    ],
)
def test_given_splits_are_used(tmp_path, given, sizes, test):
    for name, count in given.items():
        make_folder(tmp_path / name, count)
    data = load_folder(tmp_path)
    assert [len(s) for s in splits(data)] == sizes
    assert all(f"/{test}/" in name for name in names(data.test))
    assert all("/train/" in name for name in names(data.train))
    assert not set(names(data.train)) & {*names(data.val), *names(data.test)}


@pytest.mark.parametrize("layout", [["flat.jpg"], ["unknown/a.jpg", "unknown/b.jpg"], []])
def test_a_split_without_labels_is_left_out_and_said(tmp_path, layout):
    make_folder(tmp_path / "train", 20)
    before = load_folder(tmp_path)
    (tmp_path / "test").mkdir()
    for name in layout:
        (tmp_path / "test" / name).parent.mkdir(exist_ok=True)
        picture(0).save(tmp_path / "test" / name)
    data = load_folder(tmp_path)
    assert (data.hash, before.notes) == (before.hash, ())
    assert data.notes == (f"warning  {tmp_path / 'test'} has no class directories and is left out",)


def test_classes_may_be_absent_outside_of_train(tmp_path):
    make_folder(tmp_path / "train", 4)
    make_folder(tmp_path / "val", 3, CLASSES[1:])
    make_folder(tmp_path / "test", 2, CLASSES[:2])
    with pytest.raises(ConfigError, match=r"differ in the classes \['one'\]; data.missing_classes=allow scores val wi"):
        load_folder(tmp_path)
    data = load_folder(tmp_path, missing_classes="allow")
    assert data.class_names == sorted(CLASSES)
    assert [np.bincount(s.targets, minlength=3).tolist() for s in splits(data)] == [[4, 4, 4], [0, 3, 3], [2, 2, 0]]
    for path in (tmp_path / "test").rglob("*.*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"test' holds no JPEG, PNG or WEBP image of any class$"):
        load_folder(tmp_path, missing_classes="allow")
    make_folder(tmp_path / "test", 2, ("zwei",))
    with pytest.raises(ConfigError, match=r"train and test differ in the classes \['zwei'\]$"):
        load_folder(tmp_path, missing_classes="allow")


def test_a_class_of_few_images_may_be_in_train_only(images, own):
    for path in sorted((own / "three").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ConfigError, match=r"'three', has 1; raise it, add images, or type data.missing_classes=allow"):
        load_folder(own)
    data = load_folder(own, missing_classes="allow")
    assert (data.train.targets == 1).sum() == 1
    assert sorted(name for s in splits(data) for name in names(s)) == sorted(str(p) for p in own.rglob("*.*"))
    assert load_folder(images, missing_classes="allow").hash == load_folder(images).hash


def test_images_may_lie_deeper_and_other_files_beside_them(own):
    before = load_folder(own)
    (own / "one" / "deep").mkdir()
    (own / "one" / "000.jpg").rename(own / "one" / "deep" / "000.jpg")
    (own / "one" / "._001.JPEG").write_text("macOS")
    (own / "one" / "Thumbs.db").write_text("Windows")
    (own / ".cache").mkdir()
    after = load_folder(own)
    assert after.class_names == before.class_names
    assert sum(len(s) for s in splits(after)) == 60


def test_the_hash_follows_content_and_not_place(images, own):
    assert load_folder(own).hash == load_folder(images).hash
    with open(own / "one" / "000.jpg", "ab") as file:
        file.write(b"\0")
    assert load_folder(own).hash != load_folder(images).hash


def test_links_to_directories_and_images_are_followed(own, tmp_path):
    subset = tmp_path / "subset"
    (subset / "one").mkdir(parents=True)
    (subset / "one" / "a.jpg").symlink_to(own / "one" / "000.jpg")
    (subset / "one" / "more").symlink_to(own / "one")
    (subset / "three").symlink_to(own / "three")
    assert sum(len(s) for s in splits(load_folder(subset))) == 41
    (subset / "one" / "again").symlink_to(subset / "one")  # its images would come again, dozens of times
    with pytest.raises(ConfigError, match="again' is a link to a directory above it"):
        load_folder(subset)


def test_links_out_of_the_folder_are_the_images_that_they_lead_to(images, tmp_path):
    """As in a snapshot of the hub, whose blobs have no suffix, and a checkout of DVC."""
    for i, path in enumerate(sorted(images.rglob("*.*"))):
        blob, link = tmp_path / "blobs" / str(i), tmp_path / "snapshot" / path.relative_to(images)
        blob.parent.mkdir(exist_ok=True), link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob), link.symlink_to(blob)
    assert load_folder(tmp_path / "snapshot", verify=True).hash == load_folder(images).hash
    (tmp_path / "blobs" / "0").unlink()
    missing = f"000.jpg': a link to '{tmp_path}/blobs/0', which does not exist"
    with pytest.raises(ImageError, match=missing):
        load_folder(tmp_path / "snapshot", verify=True)


@pytest.mark.parametrize("place", ["four", "one/more"])
def test_a_link_that_leads_nowhere_is_not_passed_over(own, place):
    (own / place).symlink_to("/gone/away")
    with pytest.raises(ConfigError, match=f"{place}' is a link to '/gone/away', which does not exist; bring"):
        load_folder(own)


def break_folder(root, kind):
    train = root / "train"
    make_folder(train, 3)
    match kind:
        case "no train":
            train.rename(root / "val")
        case "other classes":
            make_folder(root / "val", 2, ("one", "three", "zwei"))
        case "empty class":
            (train / "four").mkdir()
        case "one class":
            shutil.rmtree(train / "one")
            shutil.rmtree(train / "three")
        case "misnamed":
            make_folder(root / "validation", 3)
        case "gif":
            picture(0).save(train / "one" / "a.gif")
        case "missing":
            shutil.rmtree(root)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no train", "data.root={root}: has val but no train"),
        ("other classes", "data.root={root}: train and val differ in the classes ['two words', 'zwei']"),
        ("empty class", "data.root: class directory '{root}/train/four' holds no JPEG, PNG or WEBP image"),
        ("one class", "data.root: {root}/train holds 1 class directories, needs at least 2"),
        ("misnamed", "data.root={root}: has validation; directories of splits must be named train, val and test"),
        ("gif", "data.root: '{root}/train/one/a.gif' is not JPEG, PNG or WEBP; convert or remove it"),
        ("missing", "data.root={root}: no such directory"),
    ],
)
def test_a_folder_that_cannot_work_is_one_line(tmp_path, kind, message):
    root = tmp_path / "root"
    break_folder(root, kind)
    with pytest.raises(ConfigError) as error:
        load_folder(root)
    assert str(error.value).startswith(message.format(root=root))
    assert "\n" not in str(error.value)


def test_a_setting_that_would_do_nothing_is_an_error(images):
    with pytest.raises(ConfigError, match=r"^data\.shift=2: only for small sets, toy is streamed; leave it out"):
        load_folder(images, shift=2)
    with pytest.raises(ConfigError, match=r"^data\.auto_augment=best: timm has no such policy"):
        load_folder(images, auto_augment="best")


# --- views


def test_the_evaluation_view_is_resized_cropped_and_normalised(images):
    data = load_folder(images, crop_pct=0.75, **AUGMENTED)
    seen, targets = everything(data.test, None)
    assert torch.equal(targets, data.test.targets)
    for name, image in zip(names(data.test), seen, strict=True):
        small = Image.open(name).convert("RGB").resize((40, 32), Image.Resampling.BILINEAR)  # 24 / 0.75 = 32 high
        crop = np.asarray(small, dtype=np.float64)[4:28, 8:32] / 255
        expected = (crop - data.mean) / data.std
        torch.testing.assert_close(image.permute(1, 2, 0).double().numpy(), expected, rtol=0, atol=1e-5)


def test_workers_batches_order_and_resume_do_not_change_a_sample(images):
    split = load_folder(images, seed=3, **AUGMENTED).train
    assert split.augments
    alone = everything(split, 2, size=1)[0]
    assert torch.equal(alone, everything(split, 2, size=7)[0])
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    worked = load_folder(images, seed=3, workers=2, **AUGMENTED).train
    seen = []
    for batch in worked.batches(list(order.split(6))[2:], 2):  # from the third batch of the epoch on
        assert torch.equal(batch.images, alone[batch.index])
        assert torch.equal(batch.targets, split.targets[batch.index])
        seen += batch.index.tolist()
    assert seen == order[12:].tolist()


def test_workers_are_no_more_than_cores(images, monkeypatch):
    monkeypatch.setattr("kd.data.streams.cpu_count", lambda: 1)
    for workers, started in ((0, 0), (1, 1), (64, 1)):
        split = load_folder(images, workers=workers).train
        assert split.load(list(torch.arange(8).split(1)), None).num_workers == started


def test_augmentation_differs_between_epochs_samples_and_seeds(images, tmp_path):
    first, other = (load_folder(images, seed=seed, **AUGMENTED).train for seed in (0, 1))
    for images_again in (everything(first, 1)[0], everything(other, 0)[0]):
        same = (everything(first, 0)[0] == images_again).flatten(1).all(1)
        assert same.double().mean() < 0.2
    for label in CLASSES:  # the same image many times: only the index differs
        (tmp_path / label).mkdir()
        for i in range(20):
            picture(0).save(tmp_path / label / f"{i}.png")
    clones = load_folder(tmp_path, **AUGMENTED).train
    assert len(everything(clones, 0)[0].unique(dim=0)) > 0.9 * len(clones)
    assert len(everything(clones, None)[0].unique(dim=0)) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_neither_uses_nor_moves_the_global_generators(images, workers):
    split = load_folder(images, workers=workers, **AUGMENTED).train
    first = everything(split, 0)[0]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = rng_state()
    assert torch.equal(everything(split, 0)[0], first)
    everything(split, None)
    assert rng_state() == before


def test_an_empty_plan_and_a_moved_split(images):
    split = load_folder(images, workers=2).val
    assert list(split.batches([], None)) == []
    assert next(split.to("meta").batches([torch.tensor([1])], None)).images.is_meta
    assert split.device.type == "cpu"


# --- files that cannot be read


def test_every_unreadable_file_is_found_before_training(own, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    load_folder(own, verify=True)
    bad = [own / name for name in ("one/000.jpg", "three/004.jpg", "two words/008.jpg")]
    for path in bad:
        path.write_bytes(b"")
    with pytest.raises(ImageError) as error:
        load_folder(own, verify=True)
    first, others = str(error.value).split(" (")
    assert first in {f"cannot read '{path}': not a JPEG, PNG or WEBP image" for path in bad}
    (listed,) = tmp_path.glob("kd-unreadable-*.txt")
    assert others == f"and 2 other files cannot be read; {listed} lists all)"
    lines = listed.read_text().splitlines()
    assert first in lines
    assert set(lines) == {f"cannot read '{path}': not a JPEG, PNG or WEBP image" for path in bad}
    assert capfd.readouterr() == ("", "")  # no progress bar where there is no terminal


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_left_out_and_counted_where_asked_for(own, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    whole = load_folder(own, unreadable="skip")
    assert (whole.hash, whole.unreadable, whole.notes) == (load_folder(own).hash, 0, ())
    bad = {str(own / name) for name in ("one/000.jpg", "one/004.jpg", "two words/008.jpg")}
    for path in bad:
        os.truncate(path, 300)
    rest = load_folder(own, unreadable="skip", workers=workers)
    for before, after in zip(splits(whole), splits(rest), strict=True):
        pairs = list(zip(names(before), before.targets.tolist(), strict=True))
        assert list(zip(names(after), after.targets.tolist(), strict=True)) == [p for p in pairs if p[0] not in bad]
    (listed,) = tmp_path.glob("kd-unreadable-*.txt")
    assert len(listed.read_text().splitlines()) == rest.unreadable == 3
    assert rest.notes == (f"warning  data.unreadable=skip leaves out 3 of 60 images, listed in {listed}",)
    assert rest.hash != whole.hash
    for path in (own / "three").iterdir():
        os.truncate(path, 300)
    with pytest.raises(ConfigError, match=r"^data.unreadable=skip: no image of 'three' in train can be read; cannot"):
        load_folder(own, unreadable="skip")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_file_is_one_line_with_its_path(own, workers):
    bad = own / "three" / "007.webp"
    bad.write_bytes(encoded(picture(3), "JPEG")[:500])
    split = next(s for s in splits(load_folder(own, workers=workers)) if str(bad) in names(s))
    for epoch in (0, None):
        with pytest.raises(ImageError) as error:
            everything(split, epoch, size=4)
        assert str(error.value).startswith(f"cannot read '{bad}': ")
        assert "runcated" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_class_folder_that_may_not_be_read_is_not_passed_over(own, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("three"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="three"):
        load_folder(own)
