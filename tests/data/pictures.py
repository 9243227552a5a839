"""Images and folders of images made on the spot, and what several tests of data sets ask of them."""

import io
import random

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from kd.config.schema import DataConfig
from kd.data import load_data

CLASSES = ("one", "three", "two words")


def picture(seed):
    """A colour image, 40 x 32, made of a real digit so that a JPEG of it is close to it."""
    pixels = Image.fromarray((load_digits().images[seed] * 15.9).astype(np.uint8))
    grey = pixels.resize((40, 32), Image.Resampling.BICUBIC)
    turned = [grey.transpose(Image.Transpose.ROTATE_180), grey.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    return Image.merge("RGB", (grey, *turned))


def encoded(image, kind, **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_folder(folder, count, classes=CLASSES):
    """`count` images in each class folder, JPEG and PNG and WEBP by turns."""
    for c, label in enumerate(classes):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            picture(c * count + i).save(folder / label / f"{i:03}.{('jpg', 'JPEG', 'png', 'webp')[i % 4]}")
    return folder


def load_folder(root, seed=0, **settings):
    settings = {"name": "toy", "family": "folder", "image_size": 24, "workers": 0, **settings}
    return load_data(DataConfig(root=str(root), **settings), seed)


def names(split):
    return [split.images.name(i) for i in range(len(split))]


def splits(data):
    return data.train, data.val, data.test


def everything(split, epoch, size=64):
    """Images and labels of a whole split in its own order."""
    batches = list(split.batches(list(torch.arange(len(split)).split(size)), epoch))
    return torch.cat([b.images for b in batches]), torch.cat([b.targets for b in batches])


def rng_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
