"""Streamed images: folders, files that are not what they say, and augmentation that belongs to the sample."""

import io
import os
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from kd.config.schema import DataConfig
from kd.data import load_data
from kd.data.image_files import MAX_PIXELS, decode
from kd.errors import ConfigError, ImageError

CLASSES = ("one", "three", "two words")
LAYOUT = "; images lie in train/CLASS/*.jpg and val/CLASS/*.jpg, or in CLASS/*.jpg"


def picture(seed):
    """A colour image, 40 x 32, made of a real digit so that a JPEG of it is close to it."""
    grey = Image.fromarray((load_digits().images[seed] * 15.9).astype(np.uint8)).resize(
        (40, 32), Image.Resampling.BICUBIC
    )
    return Image.merge(
        "RGB", (grey, grey.transpose(Image.Transpose.ROTATE_180), grey.transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    )


def make(folder, count, first=0):
    """`count` images in each class folder, JPEG and PNG and WEBP by turns."""
    for c, label in enumerate(CLASSES):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            suffix = ("jpg", "JPEG", "png", "webp")[i % 4]
            picture(first + c * count + i).save(folder / label / f"{i:03}.{suffix}")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An unsplit folder, not to be changed."""
    return make(tmp_path_factory.mktemp("images"), 20)


@pytest.fixture
def own(images, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(images, tmp_path / "own")


def load(root, seed=0, **settings):
    settings = {"name": "toy", "family": "folder", "image_size": 24, "workers": 0, **settings}
    return load_data(DataConfig(root=str(root), **settings), seed)


def everything(split, epoch, size=5):
    batches = list(split.batches(torch.arange(len(split)).split(size), epoch))
    return torch.cat([b.images for b in batches]), torch.cat([b.targets for b in batches])


def rng_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def names(split):
    return [split.source.name(i) for i in split.indices]


AUGMENTED = {"hflip": 0.5, "crop_scale": 0.3, "auto_augment": "rand-m9-n2-mstd0.5", "random_erase": 0.5}


# --- layouts


def test_an_unsplit_folder_is_divided_by_class_without_loss(images):
    data = load(images)
    splits = (data.train, data.val, data.test)
    assert [len(s) for s in splits] == [43, 5, 12]
    assert sorted(name for s in splits for name in names(s)) == sorted(str(p) for p in images.rglob("*.*"))
    assert data.class_names == sorted(CLASSES)
    assert data.input_shape == (3, 24, 24)
    for split in splits:
        assert [data.class_names[t] for t in split.targets] == [name.split(os.sep)[-2] for name in names(split)]
    assert np.bincount(data.test.targets).tolist() == [4, 4, 4]
    again = load(images, seed=5)
    assert [names(s) for s in (again.train, again.val, again.test)] == [names(s) for s in splits]
    assert names(load(images, split_seed=1).test) != names(data.test)


def test_train_and_val_as_in_imagenet_make_val_the_test_split(tmp_path):
    make(tmp_path / "train", 20)
    make(tmp_path / "val", 3, first=60)
    data = load(tmp_path)
    assert [len(s) for s in (data.train, data.val, data.test)] == [54, 6, 9]
    assert all("/val/" in name for name in names(data.test))
    assert all("/train/" in name for name in names(data.train) + names(data.val))
    assert not set(names(data.train)) & set(names(data.val))


def test_three_given_splits_are_used_as_they_are(tmp_path):
    for count, name in ((4, "train"), (2, "val"), (3, "test")):
        make(tmp_path / name, count)
    data = load(tmp_path)
    assert [len(s) for s in (data.train, data.val, data.test)] == [12, 6, 9]
    assert all("/val/" in name for name in names(data.val))
    assert all("/test/" in name for name in names(data.test))


def test_a_train_folder_alone_is_divided(tmp_path):
    make(tmp_path / "train", 20)
    data = load(tmp_path)
    assert [len(s) for s in (data.train, data.val, data.test)] == [43, 5, 12]


def test_images_may_lie_deeper_and_other_files_beside_them(own):
    before = load(own)
    (own / "one" / "deep").mkdir()
    (own / "one" / "000.jpg").rename(own / "one" / "deep" / "000.jpg")
    (own / "one" / "._001.JPEG").write_text("macOS")
    (own / "one" / "Thumbs.db").write_text("Windows")
    (own / ".cache").mkdir()
    after = load(own)
    assert after.class_names == before.class_names
    assert sum(len(s) for s in (after.train, after.val, after.test)) == 60


def test_the_hash_follows_content_and_not_place(images, own):
    assert load(own).hash == load(images).hash
    with open(own / "one" / "000.jpg", "ab") as file:
        file.write(b"\0")
    assert load(own).hash != load(images).hash


def broken_folder(tmp_path, kind):
    root = tmp_path / "root"
    if kind == "missing":
        return root
    make(root / "train", 3)
    if kind == "no train":
        (root / "train").rename(root / "val")
    if kind == "other classes":
        make(root / "val", 2)
        (root / "val" / "one").rename(root / "val" / "zwei")
    if kind == "empty class":
        (root / "train" / "four").mkdir()
    if kind == "one class":
        shutil.rmtree(root / "train" / "one")
        shutil.rmtree(root / "train" / "three")
    if kind == "nothing":
        shutil.rmtree(root / "train")
    if kind == "gif":
        picture(0).save(root / "train" / "one" / "a.gif")
    return root


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "data.root={root}: no such folder; give the folder that holds toy"),
        ("no train", "data.root={root}: has val/ but no train/"),
        (
            "other classes",
            "data.root={root}: train/ and val/ have different classes, only in train/: ['one'], only in val/: ['zwei']",
        ),
        ("empty class", "data.root: class folder '{root}/train/four' holds no JPEG, PNG or WEBP image"),
        ("one class", "data.root: {root}/train holds 1 class folders, needs at least 2" + LAYOUT),
        ("nothing", "data.root: {root} holds 0 class folders, needs at least 2" + LAYOUT),
        ("gif", "data.root: '{root}/train/one/a.gif' is not JPEG, PNG or WEBP; convert or remove it"),
        (
            "too few",
            "data.test_fraction=0.2: cannot hold out images of every class of toy, the smallest, 'one', has 3; "
            "raise it or add images",
        ),
    ],
)
def test_a_folder_that_cannot_work_is_one_line(tmp_path, kind, message):
    root = broken_folder(tmp_path, kind)
    with pytest.raises(ConfigError) as error:
        load(root)
    assert str(error.value) == message.format(root=root)


def test_no_root_at_all():
    with pytest.raises(
        ConfigError, match=r"^data.root is not set: give the folder that holds toy, data.root=/path/to/it$"
    ):
        load_data(DataConfig(name="toy", family="folder"), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 2}, "data.shift=2: only for small sets, toy is streamed; must be 0"),
        ({"noise": 0.1}, "data.noise=0.1: only for small sets, toy is streamed; must be 0"),
        ({"auto_augment": "best"}, "data.auto_augment=best: timm has no such policy"),
        ({"auto_augment": "rand-zz9"}, "data.auto_augment=rand-zz9: timm has no such policy"),
    ],
)
def test_a_setting_that_would_do_nothing_is_an_error(images, settings, message):
    with pytest.raises(ConfigError) as error:
        load(images, **settings)
    assert str(error.value).startswith(message)


# --- views


def test_the_evaluation_view_is_resized_cropped_and_normalised(images):
    data = load(images, crop_pct=0.75, **AUGMENTED)
    seen, targets = everything(data.test, None)
    assert torch.equal(targets, data.test.targets)
    for name, image in zip(names(data.test), seen, strict=True):
        small = Image.open(name).convert("RGB").resize((40, 32), Image.Resampling.BILINEAR)  # 24 / 0.75 = 32 high
        crop = np.asarray(small, dtype=np.float64)[4:28, 8:32] / 255
        expected = (crop - data.mean) / data.std
        torch.testing.assert_close(image.permute(1, 2, 0).double().numpy(), expected, rtol=0, atol=1e-5)


def test_workers_batches_order_and_resume_do_not_change_a_sample(images):
    split = load(images, seed=3, **AUGMENTED).train
    alone = everything(split, 2, size=1)[0]
    assert torch.equal(alone, everything(split, 2, size=7)[0])
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    worked = load(images, seed=3, workers=2, **AUGMENTED).train
    seen = []
    for batch in worked.batches(list(order.split(6))[2:], 2):  # from the third batch of the epoch on
        assert torch.equal(batch.images, alone[batch.index])
        assert torch.equal(batch.targets, split.targets[batch.index])
        seen += batch.index.tolist()
    assert seen == order[12:].tolist()


def test_augmentation_differs_between_epochs_samples_and_seeds(images, tmp_path):
    first, other = (load(images, seed=seed, **AUGMENTED).train for seed in (0, 1))
    for images_again in (everything(first, 1)[0], everything(other, 0)[0]):
        same = (everything(first, 0)[0] == images_again).flatten(1).all(1)
        assert same.double().mean() < 0.2
    for label in CLASSES:  # the same image many times: only the index differs
        (tmp_path / label).mkdir()
        for i in range(20):
            picture(0).save(tmp_path / label / f"{i}.png")
    clones = load(tmp_path, **AUGMENTED).train
    assert len(everything(clones, 0)[0].unique(dim=0)) > 0.9 * len(clones)
    assert len(everything(clones, None)[0].unique(dim=0)) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_global_generators_alone(images, workers):
    split = load(images, workers=workers, **AUGMENTED).train
    before = rng_state()
    for epoch in (0, None):
        everything(split, epoch)
    assert rng_state() == before


def test_global_seeds_do_not_change_the_augmentation(images):
    split = load(images, **AUGMENTED).train
    first = everything(split, 0)[0]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert torch.equal(everything(split, 0)[0], first)


def test_an_empty_plan_and_a_moved_split(images):
    split = load(images, workers=2).val
    assert list(split.batches([], None)) == []
    assert split.to("meta").device.type == "meta"
    assert next(split.to("meta").batches([torch.tensor([1])], None)).images.is_meta
    assert split.device.type == "cpu"


# --- files


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = saved(picture(3), "JPEG")
BAD = {
    "truncated": (JPEG[: len(JPEG) // 2], "runcated"),
    "empty": (b"", "not a JPEG, PNG or WEBP image"),
    "text": (b"this is not a picture\n" * 50, "not a JPEG, PNG or WEBP image"),
    "gif": (saved(picture(3), "GIF"), "not a JPEG, PNG or WEBP image"),
    "png cut in its header": (saved(picture(3), "PNG")[:20], ""),
    "bomb": (saved(Image.new("1", (10_000, 10_000)), "PNG"), "100000000 pixels"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line_with_its_path(own, kind, workers):
    content, why = BAD[kind]
    bad = own / "three" / "007.webp"
    bad.write_bytes(content)
    split = next(s for d in [load(own, workers=workers)] for s in (d.train, d.val, d.test) if str(bad) in names(s))
    for epoch in (0, None):
        with pytest.raises(ImageError) as error:
            list(split.batches(torch.arange(len(split)).split(4), epoch))
        assert str(error.value).startswith(f"cannot read '{bad}': ")
        assert why in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_that_vanished_and_one_with_a_hostile_name(own):
    evil = own / "one" / "a\nb<script>.jpg"
    evil.write_bytes(b"")
    data = load(own)
    gone = names(data.val)[0]
    os.remove(gone)
    with pytest.raises(ImageError) as error:
        everything(data.val, None)
    assert str(error.value) == f"cannot read '{gone}': No such file or directory"
    split = next(s for s in (data.train, data.val, data.test) if str(evil) in names(s))
    with pytest.raises(ImageError) as error:
        list(split.batches([torch.tensor([names(split).index(str(evil))])], None))
    assert "\n" not in str(error.value)
    assert "a\\nb<script>.jpg" in str(error.value)


def test_verify_reads_everything_first_and_names_the_first_bad_file(own, capfd):
    load(own, verify=True)
    for name in ("one/000.jpg", "three/004.jpg", "two words/008.jpg"):
        (own / name).write_bytes(b"")
    with pytest.raises(ImageError) as error:
        load(own, verify=True)
    first, others = str(error.value).split(" (")
    assert first in {
        f"cannot read '{own / n}': not a JPEG, PNG or WEBP image"
        for n in ("one/000.jpg", "three/004.jpg", "two words/008.jpg")
    }
    assert others == "and 2 other files cannot be read)"
    assert capfd.readouterr() == ("", "")  # no progress bar where there is no terminal
    (own / "one/000.jpg").write_bytes(JPEG)
    (own / "three/004.jpg").write_bytes(JPEG)
    with pytest.raises(ImageError, match=r"^cannot read '.*two words/008.jpg': not a JPEG, PNG or WEBP image$"):
        load(own, verify=True)


def test_an_image_that_would_fill_the_memory_is_refused_where_warnings_are_not_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=rf"^10000 x 10000 is more than {MAX_PIXELS} pixels$"):
            decode(io.BytesIO(BAD["bomb"][0]))


def as_rgb(content):
    return np.asarray(decode(io.BytesIO(content))).astype(int)


def test_modes_become_the_rgb_they_show():
    colour = np.asarray(picture(3)).astype(int)
    grey = np.asarray(picture(3).convert("L"))
    assert (as_rgb(saved(picture(3), "PNG")) == colour).all()
    assert (as_rgb(saved(Image.fromarray(grey), "PNG")) == grey[..., None]).all()
    cmyk = as_rgb(saved(picture(3).convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(cmyk - colour).mean() < 3
    palette = picture(3).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    assert (as_rgb(saved(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    transparent = as_rgb(saved(palette, "PNG", transparency=bytes(range(256))))
    assert (transparent == np.asarray(palette.convert("RGB"))).all()
    alpha = picture(3).convert("RGBA")
    alpha.putalpha(Image.fromarray(grey))
    assert (as_rgb(saved(alpha, "PNG")) == colour).all()  # dropped, not blended


def test_16_bit_greys_are_scaled_and_not_clipped():
    deep = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)
    assert (as_rgb(saved(Image.fromarray(deep), "PNG")) == (deep / 65535 * 255).astype(int)[..., None]).all()


def test_an_animation_gives_its_first_frame():
    frames = saved(picture(3), "WEBP", save_all=True, append_images=[picture(4)], lossless=True)
    assert (as_rgb(frames) == np.asarray(picture(3))).all()
