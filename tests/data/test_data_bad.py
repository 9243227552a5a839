"""What is wrong with images, folders and labels is said in one line before anything is written, whatever it is."""

import contextlib
import io
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import get_worker_info

from kd.config.schema import DataConfig
from kd.data import embedded, load_data
from kd.data.image_files import MAX_PIXELS, Files, decode
from kd.data.torchvision_sets import SETS
from kd.errors import ImageError
from kd.models.factory import weights_metadata

CLASSES = ("one", "two")
NETS = [f"{role}.{setting}" for role in ("teacher", "student") for setting in ("model=test_resnet", "pretrained=false")]
NETS += [
    "teacher.finetune=false",
    "teacher.epochs=1",
    "student.epochs=1",
    "scheduler.warmup_epochs=0",
    "train.batch_size=8",
]


def picture(seed, size=(40, 32)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make(root, classes=CLASSES, count=20):
    for c, label in enumerate(classes):
        (root / label).mkdir(parents=True)
        for i in range(count):
            picture(c * count + i).save(root / label / f"{i:02}.jpg")
    return root


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "images")


def contents(folder):
    """Everything below a folder, as it lies on the disk."""
    return {
        str(path): (os.lstat(path).st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def refused(kd_train, tmp_path, *words):
    """The one line of a run that starts with nothing written and ends with exit code 2."""
    before = contents(tmp_path)
    done = kd_train(*words)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert contents(tmp_path) == before
    return done.err.removeprefix("error: ").removesuffix("\n")


def trains(root, **settings):
    words = {"data.workers": 0, "data.image_size": 24, "data.val_fraction": 0.4} | settings
    return ["recipe=timm_finetune", f"data.root={root}", *NETS, *(f"{key}={value}" for key, value in words.items())]


# --- files


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


PNG = saved(picture(0), "PNG")
NO_IMAGE = "not a JPEG, PNG or WEBP image"
FILES = {
    "truncated": (saved(picture(0), "JPEG")[:900], "image file is truncated"),
    "truncated png": (PNG[: len(PNG) // 2], "image file is truncated"),
    "truncated webp": (saved(picture(0), "WEBP")[:200], ""),
    "empty": (b"", NO_IMAGE),
    "no image": (b"<html>404</html>", NO_IMAGE),
    "gif": (saved(picture(0), "GIF"), NO_IMAGE),
    "tiff": (saved(picture(0), "TIFF"), NO_IMAGE),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NO_IMAGE),  # Pillow would start Ghostscript
    "flipped bit": (PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:], ""),
    "bomb": (saved(Image.new("1", (8192, 8193)), "PNG"), f"8192 x 8193 is more than {MAX_PIXELS} pixels"),
    "long line": (saved(Image.new("1", (16383, 1)), "PNG"), "16383 x 1: one side is more than 100 times the other"),
    "text bomb": (PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 2**27)) + PNG[33:], "too large"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_named_before_training(kd_train, root, tmp_path, kind):
    content, why = FILES[kind]
    bad = root / "two" / "07.jpg"
    bad.write_bytes(content)
    said = refused(kd_train, tmp_path, *trains(root))
    assert said.startswith(f"cannot read '{bad}': ")
    assert why in said


def test_the_largest_allowed_image_is_read_and_one_more_row_is_not(monkeypatch):
    monkeypatch.setattr("kd.data.image_files.MAX_PIXELS", 40 * 32)
    assert decode(io.BytesIO(PNG)).size == (40, 32)
    with pytest.raises(ValueError, match="40 x 33 is more than 1280 pixels"):
        decode(io.BytesIO(saved(picture(0, (40, 33)), "PNG")))
    assert Image.MAX_IMAGE_PIXELS > MAX_PIXELS


def test_the_size_is_checked_before_anything_is_decoded(monkeypatch):
    def decoded(image):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(ValueError, match="is more than"):
        decode(io.BytesIO(FILES["bomb"][0]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_exif_rotates_is_turned_upright(orientation, kind):
    """The stored image is the upright one with EXIF's own words for each orientation applied backwards."""
    upright = np.asarray(picture(1).resize((8, 8)).resize((48, 32), Image.Resampling.NEAREST))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    found = decode(io.BytesIO(saved(Image.fromarray(stored), kind, exif=exif, **lossless)))
    assert np.abs(np.asarray(found).astype(int) - upright).mean() < 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as kd.data.image_files has it outside of tests
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03", b"Exif\0\0" + b"\xff" * 40]
)
def test_exif_that_cannot_be_read_turns_nothing(exif):
    plain = decode(io.BytesIO(saved(picture(1), "JPEG")))
    assert np.array_equal(decode(io.BytesIO(saved(picture(1), "JPEG", exif=exif))), plain)


# --- folders


ENTRIES = {
    "fifo": (os.mkfifo, "is no regular file; remove it"),
    "folder": (os.mkdir, "is a folder, must be an image; rename or remove it"),
    "link out": (lambda path: path.symlink_to("/etc/passwd"), "is a link out of the folder, to '/etc/passwd'; put the"),
    "link up": (lambda path: path.symlink_to("../../x.jpg"), "is a link out of the folder, to '"),
    "link to nothing": (lambda path: path.symlink_to("nothing.jpg"), "is a link to nothing; remove it"),
    "link to itself": (lambda path: path.symlink_to(path.name), "is a link to nothing; remove it"),
    "link to a folder": (lambda path: path.symlink_to("../one"), "is a link to a folder, must be an image; rename"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a link out of the folder, to '/dev/zero'"),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_what_is_no_image_file_is_named(kd_train, root, tmp_path, kind):
    picture(0).save(tmp_path / "x.jpg")
    bad = root / "two" / "07.jpg"
    bad.unlink()
    ENTRIES[kind][0](bad)
    assert refused(kd_train, tmp_path, *trains(root)).startswith(f"data.root: '{bad}' {ENTRIES[kind][1]}")


def test_links_inside_the_folder_and_linked_class_folders_are_followed(root, tmp_path):
    def load(folder):
        data = load_data(DataConfig(name="toy", family="folder", root=str(folder), image_size=24, workers=0), 0)
        return sum(len(split) for split in (data.train, data.val, data.test))

    subset = tmp_path / "subset"
    subset.mkdir()
    for label in CLASSES:
        (subset / label).symlink_to(root / label)
    (root / "two" / "twin.jpg").symlink_to("07.jpg")
    assert load(root) == load(subset) == 41


def test_a_link_to_a_folder_below_a_class_is_not_left_out_in_silence(kd_train, root, tmp_path):
    (root / "two" / "more").symlink_to(root / "one")
    said = refused(kd_train, tmp_path, *trains(root))
    assert said.startswith(f"data.root: '{root / 'two' / 'more'}' is a link to a folder")


def test_folders_as_deep_as_a_path_can_be(root):
    descriptor = os.open(root / "two", os.O_RDONLY)
    for _ in range(1500):  # more levels than Python's recursion or a process's open files have
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    try:
        with open(os.open("x.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor), "wb") as file:
            file.write(FILES["no image"][0])
        with pytest.raises(ImageError, match=r"d/x\.jpg'"):
            load_data(DataConfig(name="toy", family="folder", root=str(root), image_size=24, verify=True), 0)
    finally:
        os.close(descriptor)
        subprocess.run(["rm", "-rf", str(root)], check=True)  # which shutil's recursion cannot


@pytest.mark.parametrize(("one", "other"), [("Train", "Val"), ("train", "validation"), ("test", "training")])
def test_folders_that_look_like_splits_are_no_classes_and_not_left_out(kd_train, tmp_path, one, other):
    for name in (one, other):
        make(tmp_path / "images" / name)
    said = refused(kd_train, tmp_path, *trains(tmp_path / "images"))
    assert re.search(r": (Train|validation|training)/: folders of splits are called train, val and test", said)


def test_classes_may_be_called_like_a_split(tmp_path):
    make(tmp_path, ("invalid", "valid"))
    config = DataConfig(name="toy", family="folder", root=str(tmp_path), image_size=24, workers=0)
    assert load_data(config, 0).class_names == ["invalid", "valid"]


@pytest.mark.parametrize(("name", "why"), [("a.jfif", NO_IMAGE), ("a.JPE", NO_IMAGE), ("a.jxl", "is not JPEG, PNG")])
def test_no_name_of_an_image_is_left_out_in_silence(kd_train, root, tmp_path, name, why):
    (root / "two" / name).write_bytes(b"x")
    said = refused(kd_train, tmp_path, *trains(root))
    assert str(root / "two" / name) in said
    assert why in said


def test_too_few_validation_images_to_tell_a_teacher_from_chance_are_said_to_be_so(kd_train, root, tmp_path):
    said = refused(kd_train, tmp_path, *trains(root, **{"data.val_fraction": 0.07}))
    few = r"\d validation images, on which no teacher could be told from chance \(\d\d\.\d\d%\): "
    assert re.fullmatch(f"data.val_fraction=0.07: gives {few}raise it, or add images", said)
    own = tmp_path / "own"
    for split in ("train", "val", "test"):
        shutil.copytree(root, own / split)
    for name in ("one", "two"):
        for path in sorted((own / "val" / name).iterdir())[1:]:
            path.unlink()
    said = refused(kd_train, tmp_path, *trains(own))  # there is no val_fraction that changes anything
    assert re.fullmatch(f"data.root={own}: comes with {few}add images to its validation split", said)


@pytest.fixture
def anybody():
    """A folder that everybody may look into, and nobody's rights, as tests may run as root."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)

        @contextlib.contextmanager
        def without_rights():
            root = os.geteuid() == 0
            if root:
                os.seteuid(65534)
            try:
                yield
            finally:
                if root:
                    os.seteuid(0)

        yield Path(folder), without_rights


@pytest.mark.parametrize("bad", ["two/07.jpg", "two"])
def test_what_may_not_be_read_is_named(anybody, bad):
    folder, without_rights = anybody
    make(folder / "images")
    path = folder / "images" / bad
    config = DataConfig(name="toy", family="folder", root=str(folder / "images"), image_size=24, verify=True)
    load_data(config, 0)  # imports what it needs
    path.chmod(0)
    try:
        with without_rights(), pytest.raises((ImageError, PermissionError)) as error:
            load_data(config, 0)
    finally:
        path.chmod(0o755)
    assert f"'{path}'" in str(error.value)
    assert "Permission denied" in str(error.value)


def test_an_empty_class_and_splits_of_different_classes(kd_train, tmp_path):
    make(tmp_path / "a" / "train")
    make(tmp_path / "a" / "val", ("one", "three"), 2)
    assert "only in train/: ['two'], only in val/: ['three']" in refused(kd_train, tmp_path, *trains(tmp_path / "a"))
    make(tmp_path / "b")
    (tmp_path / "b" / "zero").mkdir()
    said = refused(kd_train, tmp_path, *trains(tmp_path / "b"))
    assert said == f"data.root: class folder '{tmp_path / 'b' / 'zero'}' holds no JPEG, PNG or WEBP image"


def test_a_teacher_of_other_classes_is_refused(kd_train, root, tmp_path):
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "five.safetensors")
    words = trains(root, **{"teacher.checkpoint": tmp_path / "five.safetensors"})
    said = refused(kd_train, tmp_path, *words)
    assert str(tmp_path / "five.safetensors") in said
    assert "5" in said
    assert "2" in said


HOSTILE = ["<script>alert(1)<", "=cmd|' -C calc'!A0", "a\nb", "a..b", "\x1b[31mred", "[bold]x[", "caf\udcff", "x" * 200]


def test_hostile_class_names_train_and_write_nothing_of_their_own(kd_train, tmp_path):
    make(tmp_path / "images", HOSTILE, 0)
    for c, name in enumerate(HOSTILE):
        for i in range(20):  # told apart by their colour: the teacher must be better than chance
            Image.new("RGB", (32, 32), (255 * (c & 1), 255 * (c >> 1 & 1), 255 * (c >> 2))).save(
                tmp_path / "images" / name / f"{i}.png"
            )
    settings = {"output": "out", "control": "false", "teacher.epochs": 4, "optimizer.lr": 0.01, "data.color_jitter": 0}
    done = kd_train(*trains(tmp_path / "images", **settings))
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out"}
    weights = next((tmp_path / "out").rglob("student/last.safetensors"))
    names = weights_metadata(weights)["class_names"]
    assert names == sorted(HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_an_error_about_a_hostile_class_is_one_line(kd_train, tmp_path, name):
    make(tmp_path / "images", [*CLASSES, name], 1)
    next((tmp_path / "images" / name).iterdir()).unlink()
    said = refused(kd_train, tmp_path, *trains(tmp_path / "images"))
    assert said.startswith("data.root: class folder ")
    assert "\x1b" not in said


# --- while it trains


def in_worker(monkeypatch, what):
    """Do something in a data worker, in place of reading an image, the third time that one is read for training."""
    read, count = Files.read, []

    def patched(self, i):
        if get_worker_info() is not None:
            count.append(i)
            if len(count) == 3:
                what(self.name(i))
        return read(self, i)

    monkeypatch.setattr(Files, "read", patched)


def test_a_killed_data_worker_is_one_line(kd_train, root, tmp_path, monkeypatch):
    in_worker(monkeypatch, lambda name: os.kill(os.getpid(), signal.SIGKILL))
    done = kd_train(*trains(root, **{"data.workers": 1, "output": "out"}))
    assert done.code == 1
    assert re.match(  # as the signal comes first or the silence is noticed first
        r"error: DataLoader worker \(pid.*\) (is killed by signal: Killed|exited unexpectedly)[:;] ",
        done.err,
    )
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(("change", "why"), [("vanish", "No such file or directory"), ("fifo", "is no regular file")])
def test_a_file_that_changes_while_it_trains_is_one_line(kd_train, root, monkeypatch, change, why):
    def now(name):
        os.remove(name)
        if change == "fifo":
            os.mkfifo(name)

    in_worker(monkeypatch, now)
    done = kd_train(*trains(root, **{"data.workers": 1, "output": "out"}))
    assert done.code == 2
    assert done.err.startswith(f"error: cannot read '{root}/")
    assert done.err.endswith(f": {why}\n")
    assert done.err.count("\n") == 1


# --- arrays


IDX = {
    "truncated images": ("train-images-idx3-ubyte", lambda raw: raw[:-1]),
    "no header": ("train-images-idx3-ubyte", lambda raw: b""),
    "another type": ("train-images-idx3-ubyte", lambda raw: raw[:2] + b"\x07" + raw[3:]),
    "truncated labels": ("train-labels-idx1-ubyte", lambda raw: raw[:-1]),
    "fewer labels": ("train-labels-idx1-ubyte", lambda raw: raw[:4] + struct.pack(">I", 99) + raw[8:-1]),
    "label 200": ("t10k-labels-idx1-ubyte", lambda raw: raw[:-1] + b"\xc8"),
}


@pytest.mark.parametrize("kind", IDX)
def test_a_damaged_idx_file_is_one_line(kd_train, tmp_path, kind):
    folder = tmp_path / "sets" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pixels = random.integers(0, 256, (100, 28, 28), dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 100, 28, 28) + pixels.tobytes())
        labels = (np.arange(100) % 10).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 100) + labels.tobytes())
    name, damage = IDX[kind]
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    words = ["data.family=torchvision", "data.dataset=FashionMNIST", f"data.root={tmp_path / 'sets'}"]
    said = refused(kd_train, tmp_path, "recipe=smoke", "data.name=toy", *words)
    cut = f"data.root={tmp_path / 'sets'}: FashionMNIST is not there or not complete; "
    expected = {
        "truncated images": cut,
        "truncated labels": cut,
        "fewer labels": "toy train: has 100 images and 99 labels",
        "label 200": "toy test: label 200 of image 99: must be 0 to 9",
    }
    damaged = f"data.root={tmp_path / 'sets'}: FashionMNIST cannot be read, a file of it is damaged: "
    assert said.startswith(expected.get(kind, damaged))


GOOD = np.arange(200) % 10
PIXELS = np.zeros((200, 8, 8), dtype=np.float32)
ARRAYS = {
    "float labels": (GOOD + 0.5, PIXELS, "data.dataset=USPS: its labels are of type float64, must be whole numbers"),
    "text labels": (GOOD.astype(str), PIXELS, "data.dataset=USPS: its labels are of type <U21, must be whole numbers"),
    "negative label": (GOOD - 1, PIXELS, "toy train: label -1 of image 0: must be 0 to 8"),
    "nan": (GOOD, np.where(np.arange(200)[:, None, None] == 7, np.nan, PIXELS), "toy train: image 7 has a value that"),
    "inf": (GOOD, np.where(np.arange(200)[:, None, None] == 7, np.inf, PIXELS), "toy train: image 7 has a value that"),
    "no ink": (GOOD, PIXELS + np.float32(0.1), "toy: all values of a channel are the same in all training images"),
    "other type": (GOOD, PIXELS.astype(np.int16), "toy train: its images are torch.int16, must be torch.uint8 or"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_cannot_be_trained_on_are_one_line(kd_train, tmp_path, monkeypatch, kind):
    labels, pixels, message = ARRAYS[kind]

    class Held:
        def __init__(self, root, train, download):
            self.targets, self.data = labels, pixels if pixels.dtype == np.int16 else pixels.astype(np.float32)

    Held.__name__ = "USPS"
    monkeypatch.setattr("torchvision.datasets.USPS", Held)
    words = ["data.family=torchvision", "data.dataset=USPS", f"data.root={tmp_path}"]
    assert refused(kd_train, tmp_path, "recipe=smoke", "data.name=toy", *words).startswith(message)


@pytest.mark.parametrize("damage", ["pixel", "label", "torn"])
def test_embedded_images_that_are_not_the_published_ones_are_named(kd_train, tmp_path, monkeypatch, damage):
    from sklearn import datasets

    found = datasets.load_digits()
    if damage == "pixel":
        found.images[7, 3, 3] += 1
    if damage == "label":
        found.target[7] = 0

    def load():
        if damage == "torn":
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        return found

    monkeypatch.setattr(datasets, "load_digits", load)
    embedded._digits.cache_clear()
    try:
        said = refused(kd_train, tmp_path, "recipe=smoke")
    finally:
        embedded._digits.cache_clear()
    if damage == "torn":
        assert said.startswith("digits: cannot be read from scikit-learn: Compressed file ended before")
    else:
        assert said.startswith("digits: the sha256 of its images in scikit-learn is ")
        assert embedded.DIGITS_SHA256 in said


def test_torchvision_names_a_path_for_every_set_of_files():
    """By what each class keeps: a set that keeps its paths elsewhere would fail when it is first read."""
    import inspect

    from torchvision import datasets

    held = {"CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS", "SVHN", "STL10", "SEMEION"}
    for name in SETS.keys() - held:
        source = "".join(inspect.getsource(kind) for kind in inspect.getmro(getattr(datasets, name))[:3])
        kept = [each for each in ("_image_files", "_images", "_samples", "samples") if f"self.{each} = " in source]
        assert kept or (name.startswith("Caltech") and "self.index" in source and "self.y" in source), name


def test_caltechs_paths_are_where_torchvision_reads(tmp_path):
    from torchvision import datasets

    from kd.data.torchvision_sets import _paths

    for folder, file in (
        ("caltech101/101_ObjectCategories/ant", "image_0001.jpg"),
        ("caltech256/256_ObjectCategories/001.ant", "001_0001.jpg"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        picture(0).save(tmp_path / folder / file)
    for folder in ("Annotations", "101_ObjectCategories/BACKGROUND_Google"):
        (tmp_path / "caltech101" / folder).mkdir()
    for kind in (datasets.Caltech101, datasets.Caltech256):
        found = kind(str(tmp_path))
        (path,) = _paths(tmp_path, found)
        assert np.array_equal(np.asarray(found[0][0]), np.asarray(Image.open(tmp_path / path.decode())))


def test_a_list_of_files_cannot_lead_out_of_the_folder(kd_train, tmp_path):
    meta = tmp_path / "sets" / "food-101" / "meta"
    meta.mkdir(parents=True)
    (tmp_path / "sets" / "food-101" / "images").mkdir()
    for part in ("train", "test"):
        (meta / f"{part}.json").write_text('{"a": ["a/1"], "b": ["../../../secret/1"]}')
    words = ["data.dataset=Food101", f"data.root={tmp_path / 'sets'}"]
    said = refused(kd_train, tmp_path, "recipe=smoke", "data.family=torchvision", *words)
    assert said.startswith("data.dataset=Food101: '../secret/1.jpg' is outside of data.root")
