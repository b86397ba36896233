"""CIFAR-10 (60,000 colour photographs, 32 x 32, ten kinds) -> a DataSet, 10% of whose training images are forgotten.

https://www.cs.toronto.edu/~kriz/cifar.html; cite Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009:
no licence is stated. As in the competition's starting kit, the published training images are retain and forget, and the
published test images are halved into validation and test. There are no subjects: each image stands for its own.
"""

import argparse
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
from download import download
from layout import DataSet, forget_subjects, hold_out
from people import opened
from torchvision.datasets import CIFAR10

from evaluator.files import Problem, one_line

OTHERWISE = f"get {CIFAR10.filename} from {CIFAR10.url} yourself and give it by --from"
NOTE = "CIFAR-10 has no subjects: forget sets are drawn by image, and person_id is the number of the image"
FORGET_SETS = 4  # public ones, and as many private, of different images
FORGET_SHARE = 0.1
LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# What numpy pickles an array with; the module has another name since numpy 2.
ARRAY = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}


def options(parser: argparse.ArgumentParser) -> None:
    how = "the archive, or a folder that holds it or what is in it (default: a download of 170 MB)"
    parser.add_argument("--from", type=Path, dest="path", metavar="PATH", help=how)
    stem = "of the network: the competition's 7x7 (default), or the usual one for small images"
    parser.add_argument("--stem", choices=["7x7", "3x3"], default="7x7", help=stem)


def cifar10(path: Path | None = None, stem: str = "7x7") -> DataSet:
    """The competition's recipe, with either stem. Raises Problem naming the file that is missing or damaged."""
    path = path or download("cifar-10", CIFAR10.url, CIFAR10.tgz_md5, OTHERWISE)
    archive = path / CIFAR10.filename
    with opened(archive if archive.is_file() else path, None) as folder:
        inside = folder / CIFAR10.base_folder
        batches = [
            read_batch((inside if inside.is_dir() else folder) / name) for name, _ in CIFAR10.train_list + CIFAR10.test_list
        ]
    pictures, label = (np.concatenate(part) for part in zip(*batches, strict=True))
    row = np.arange(len(label))
    table = pd.DataFrame(
        {"image_id": [f"{number // 1000}-{number}" for number in row], "age_group": label, "age": label, "person_id": row}
    )
    tested = len(batches[-1][1])
    train = row[:-tested]
    _, validation, test = hold_out(tested, 0.5, 0.5)
    forget = forget_subjects(table, train, FORGET_SETS, FORGET_SHARE, classes=None)
    recipe = {"small_images": True} if stem == "3x3" else {}
    return DataSet(table, pictures, 10, train, validation + len(train), test + len(train), forget, recipe, NOTE, LABELS)


class _Unpickler(pickle.Unpickler):
    """Only what a batch is made of: a pickle may name any function, and it would be called."""

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "numpy" and name in ARRAY:
            return ARRAY[name]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2 to read
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}")


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, uint8 [images, 32, 32, 3], and labels, int64 [images], of one file of the Python version.

    It is a pickled dict: b"data", uint8 [images, 3072], rows of the red plane, then green, then blue; b"labels", a list.
    Raises Problem when the file is missing, damaged, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            batch = _Unpickler(file, encoding="bytes").load()
        data, labels = batch[b"data"], np.array(batch[b"labels"])
        if data.dtype != np.uint8 or data.shape != (len(labels), 3072) or labels.dtype.kind != "i":
            raise ValueError(f"data of {data.dtype} {list(data.shape)}, labels of {labels.dtype} {list(labels.shape)}")
        if labels.min() < 0 or labels.max() > 9:
            raise ValueError(f"a label is {labels.min()} or {labels.max()}, it must be 0 to 9")
    except Exception as error:  # unpickling a damaged file raises any of many types
        raise Problem(f"{path}: not a readable batch of CIFAR-10 ({one_line(error)}); {OTHERWISE}") from error
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
