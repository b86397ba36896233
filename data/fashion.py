"""Fashion-MNIST: 70,000 grey photographs of clothes, 28 x 28, of ten kinds (MIT licence) -> a DataSet.

https://github.com/zalandoresearch/fashion-mnist (Xiao, Rasul and Vollgraf, 2017). It has as many images of each kind and no
subjects. Here the classes are as unequal as age groups are, and groups of images that are nearly the same stand for
subjects: forgetting one takes from a network all that is like its images, as forgetting a person does.
"""

import argparse
import gzip
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from digits import RECIPE as DIGITS
from download import download
from layout import SEED, DataSet, forget_subjects, hold_out
from scipy.cluster.hierarchy import fcluster, ward
from torchvision.datasets import FashionMNIST

from evaluator.files import Problem, one_line

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
OTHERWISE = "install Debian's package dataset-fashion-mnist, or give a folder with the four files by --from"
SIZE = 28

# Classes 0, 1, … are these kinds of clothing, in torchvision's numbering: T-shirts, dresses, trousers, bags, ankle boots,
# sneakers, sandals, pullovers, coats, shirts. Images are forgotten of the first two, which are at times hard to tell apart;
# the three most like T-shirts come last, or the network would not know its training images as the competition's does.
# SHARES: of the images; as unequal as age groups.
KINDS = (0, 3, 1, 8, 9, 7, 5, 2, 4, 6)
SHARES = (0.45, 0.25, 0.10, 0.06, 0.05, 0.03, 0.02, 0.02, 0.01, 0.01)

SUBJECT = 20  # images in a group, on average
FEWEST, MOST = 10, 30  # images in the groups that are taken first
LEAST = 100  # images of which the smallest class has one
FORGET_SETS = 6  # public ones, and as many private
FORGET_SHARE = 0.02  # of the training images, as in the competition

RECIPE = {"width": 16}  # a quarter of the channels, so that a CPU can train a few; all else is the competition's recipe
SMALL_RECIPE = DIGITS | {"epochs": 6}


def options(parser: argparse.ArgumentParser) -> None:
    how = "holds the four idx files, gzipped or not (default: Debian's package dataset-fashion-mnist, or a download)"
    parser.add_argument("--from", type=Path, dest="path", metavar="FOLDER", help=how)


def fashion(path: Path | None = None) -> DataSet:
    """As many images as the shares of the classes allow (15,557), 28 x 28."""
    pictures, kinds = read(path)
    return _data_set(pictures, _sums(pictures), kinds, len(pictures), RECIPE)


def fashion_small(path: Path | None = None, images: int = 3000) -> DataSet:
    """At most `images` images, 14 x 14: each pixel is the mean of four."""
    pictures, kinds = read(path)
    sums = _sums(pictures)
    return _data_set(np.round(sums / 4).astype(np.uint8), sums, kinds, images, SMALL_RECIPE)


def _sums(pictures: np.ndarray) -> np.ndarray:
    """[images, 14, 14] uint16, each of four pixels."""
    return pictures.reshape(-1, SIZE // 2, 2, SIZE // 2, 2).sum((2, 4), dtype=np.uint16)


def _data_set(pictures: np.ndarray, sums: np.ndarray, kinds: np.ndarray, images: int, recipe: dict) -> DataSet:
    """All pictures, what they are compared by and their kinds in torchvision's numbering -> `images` of them or fewer."""
    random = np.random.RandomState(SEED)
    counts = np.bincount(kinds, minlength=len(KINDS))[list(KINDS)]
    labels = [FashionMNIST.classes[kind] for kind in KINDS]
    enough = counts / SHARES  # images in all that each class has its share of
    images = min(images, int(enough.min()))
    if images < LEAST:
        few = int(enough.argmin())
        raise Problem(f"{labels[few]}: {counts[few]} images, too few for a share of {SHARES[few]:.0%} among {LEAST}")
    rows, classes, people, groups = [], [], [], 0
    for label, share in enumerate(SHARES):
        wanted = round(share * images)
        # Only so many, as the time to compare all with all grows with their square.
        found = np.flatnonzero(kinds == KINDS[label])[: 4 * wanted]
        subject = subjects(sums[found])
        sizes = np.bincount(subject)
        place = np.lexsort((random.rand(len(sizes)), (sizes < FEWEST) | (sizes > MOST))).argsort()
        taken = place[subject].argsort(kind="stable")[:wanted]
        rows.append(found[taken])
        classes.append(np.full(wanted, label))
        people.append(subject[taken] + groups)
        groups += len(sizes)
    rows, classes, people = map(np.concatenate, (rows, classes, people))
    table = pd.DataFrame({"age_group": classes, "age": classes, "person_id": people})
    table.insert(0, "image_id", [f"{person}-{row}" for person, row in zip(people, rows, strict=True)])
    train, validation, test = hold_out(len(table))
    forget = forget_subjects(table, train, FORGET_SETS, FORGET_SHARE)
    return DataSet(table, pictures[rows], len(KINDS), train, validation, test, forget, recipe, labels=labels)


def subjects(pictures: np.ndarray) -> np.ndarray:
    """Groups of images that are nearly the same, from whole numbers [images, H, W]: [images] int, from 0.

    By Ward's criterion: nothing in it is drawn, so that the same images always form the same groups.
    """
    if len(pictures) < 2 * SUBJECT:
        return np.zeros(len(pictures), int)
    tree = ward(pictures.reshape(len(pictures), -1).astype(float))
    return fcluster(tree, len(pictures) // SUBJECT, "maxclust") - 1


def read(path: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 [images, 28, 28], and their kinds, [images]: first the published training set, then the test set.

    path: the folder with the four files; None: Debian's where it is complete, else what torchvision downloads.
    Raises Problem naming the file that is missing, damaged or something else.
    """
    names = [Path(name).stem for name, _ in FashionMNIST.resources]
    files = _found(path or DEBIAN, names)
    if None in files:
        if path:
            missing = path / names[files.index(None)]
            raise Problem(f"{missing}: missing, also as .gz; {OTHERWISE}")
        url = FashionMNIST.mirrors[0]
        files = [download("fashion-mnist", url + name, md5, OTHERWISE) for name, md5 in FashionMNIST.resources]
    pictures = [read_idx(file, (SIZE, SIZE)) for file in files[::2]]
    kinds = [read_idx(file, ()) for file in files[1::2]]
    for file, labels, images in zip(files[1::2], kinds, pictures, strict=True):
        if len(labels) != len(images):
            raise Problem(f"{file}: {len(labels)} labels for {len(images)} images; {OTHERWISE}")
        if labels.max(initial=0) >= len(KINDS):
            raise Problem(f"{file}: a label is {labels.max()}, it must be 0 to {len(KINDS) - 1}; {OTHERWISE}")
    return np.concatenate(pictures), np.concatenate(kinds)


def _found(folder: Path, names: list[str]) -> list[Path | None]:
    both = ([folder / name, folder / f"{name}.gz"] for name in names)
    return [next((file for file in pair if file.is_file()), None) for pair in both]


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [n, *shape] from an idx file, gzipped or not. Raises Problem when it is damaged or holds anything else.

    It begins with two zeros, 8 for "unsigned byte" and the number of dimensions, followed by each one's size as four bytes,
    the highest first: http://yann.lecun.com/exdb/mnist
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise Problem(f"{path}: cannot be read ({one_line(error)}); {OTHERWISE}") from error
    start = 4 + 4 * (1 + len(shape))
    sizes = tuple(np.frombuffer(content[4:start].ljust(start - 4), ">u4").tolist())
    what = "images of 28 x 28" if shape else "labels"
    if content[:4] != bytes([0, 0, 8, len(sizes)]) or sizes[1:] != shape:
        raise Problem(f"{path}: not an idx file of {what}; {OTHERWISE}")
    expected = start + int(np.prod(sizes))
    if len(content) != expected:
        raise Problem(f"{path}: {len(content)} bytes, {expected} for its {sizes[0]} {what}; {OTHERWISE}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)
