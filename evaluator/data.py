"""The competition's layout on disk -> tensors in memory -> loaders of the competition's dict batches."""

import csv
import fnmatch
import hashlib
import io
import itertools
import json
import operator
import os
import re
import reprlib
import sys
import textwrap
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evaluator import pixels
from evaluator.files import Problem, one_line
from evaluator.pixels import LARGEST_IMAGE, image_path

COLUMNS = ["image_id", "age_group", "age", "person_id"]
TENSORS = ("images", "age_group", "age", "person_id")

# What a value may be: in words, and as a test. Files written by users are checked against tables of these.
Allowed = tuple[str, Callable[[object], bool]]


def integer(low: int, high: int) -> Allowed:
    return f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high


def number(words: str, low: float, high: float = sys.float_info.max) -> Allowed:
    return words, lambda value: type(value) in (int, float) and low <= value <= high


def one_of(*values: str) -> Allowed:
    return "one of " + ", ".join(values), lambda value: value in values


BOOLEAN: Allowed = ("true or false", lambda value: type(value) is bool)
NAME: Allowed = (
    "made of letters (a-z, A-Z), digits, '.', '_' and '-', beginning with a letter or digit, at most 100 characters",
    lambda value: isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value) is not None,
)
DATASET: dict[str, Allowed] = {
    "name": NAME,
    "image_size": integer(1, LARGEST_IMAGE),
    "classes": integer(2, 100_000),
    "recipe": ("an object", lambda value: type(value) is dict),
    "note": (
        "one line of 1 to 300 printable characters",
        lambda value: isinstance(value, str) and value.isprintable() and 1 <= len(value.strip()) <= len(value) <= 300,
    ),
}


def check(values: Mapping[str, object], allowed: Mapping[str, Allowed], where: object) -> None:
    """Raise a Problem that begins with `where` and names the first value that is not allowed, or not known at all."""
    for field, value in values.items():
        if field not in allowed:
            raise Problem(f"{where}: {reprlib.repr(field)} is unknown; allowed are {_listed(allowed)}")
        words, test = allowed[field]
        if not test(value):
            raise Problem(f"{where}: {field} is {reprlib.repr(value)}, it must be {words}")


def _listed(names: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(map(repr, names)), 200, placeholder=" …")


@dataclass
class Examples(Dataset):
    """One set. images: [n, 3, H, W] uint8; age_group (the label), age, person_id: [n] int64, on one device."""

    image_ids: list[str]
    images: Tensor
    age_group: Tensor
    age: Tensor
    person_id: Tensor

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> dict:
        """One sample as the competition's data set gives it: `image` is [3, H, W] float32 from 0 to 255."""
        return {
            "image": self.images[index].float(),
            "image_id": self.image_ids[index],
            "age_group": int(self.age_group[index]),
            "age": int(self.age[index]),
            "person_id": int(self.person_id[index]),
        }

    def batch(self, indices: Tensor) -> dict:
        """The same as collating the samples of `indices`, by one indexing operation. With indices on the CPU, naming the
        images does not wait for a GPU."""
        here = indices.to(self.images.device)
        return {
            "image": self.images[here].float(),
            "image_id": [self.image_ids[index] for index in indices.tolist()],
            "age_group": self.age_group[here],
            "age": self.age[here],
            "person_id": self.person_id[here],
        }

    def equals(self, other: "Examples") -> bool:
        """Also if a user's code has put something else in a tensor's place."""

        def same(mine: object, theirs: Tensor) -> bool:
            kind = getattr(mine, "dtype", None), getattr(mine, "device", None)
            return kind == (theirs.dtype, theirs.device) and torch.equal(mine, theirs)

        return self.image_ids == other.image_ids and all(same(getattr(self, name), getattr(other, name)) for name in TENSORS)

    def clone(self) -> "Examples":
        tensors = (getattr(self, name).clone() for name in TENSORS)
        return Examples(list(self.image_ids), *tensors)

    def to(self, device: torch.device | str) -> "Examples":
        tensors = (getattr(self, name).to(device) for name in TENSORS)
        return Examples(self.image_ids, *tensors)

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256("\n".join(self.image_ids).encode())
        for name in TENSORS:
            tensor = getattr(self, name)
            digest.update(str(tensor.shape).encode())
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()


class Loader(DataLoader):
    """A DataLoader over `Examples`, shuffled anew each epoch, whose batches are indexed directly from memory.

    generators: the source of the order; with K of them a batch is K members' batches one after another, each member
    with its own order (see evaluator.ensemble). None stands for torch's global generator.
    """

    def __init__(
        self, examples: Examples, batch_size: int = 64, generators: Sequence[torch.Generator | None] = (None,), shuffle=True
    ):
        super().__init__(examples, batch_size=batch_size, shuffle=shuffle)
        self.generators = generators
        self.shuffles = shuffle

    def __iter__(self) -> Iterator[dict]:
        for indices in self.orders().cpu().split(self.batch_size, dim=1):
            yield self.dataset.batch(indices.flatten())

    def orders(self) -> Tensor:
        """Each member's order of the next epoch: [K, examples], where its generator is."""
        count = len(self.dataset)
        return torch.stack(
            [
                torch.randperm(count, generator=generator, device=generator.device if generator else "cpu")
                if self.shuffles
                else torch.arange(count)
                for generator in self.generators
            ]
        )

    def with_batch_size(self, batch_size: int) -> "Loader":
        """The same examples and randomness in batches of another size."""
        return Loader(self.dataset, batch_size, self.generators, self.shuffles)


@dataclass
class Data:
    """A data folder under one split. test is None in the competition's own folder, which has no test labels.

    note: what every output must say of these images.
    """

    folder: Path
    name: str
    split: str
    classes: int
    recipe: dict
    class_counts: Tensor
    retain: Examples
    forget: Examples
    validation: Examples
    test: Examples | None
    note: str = ""

    @property
    def title(self) -> str:
        """The name, with the note."""
        return f"{self.name} ({self.note})" if self.note else self.name

    @property
    def held_out(self) -> Examples:
        """What TA is measured on: the test set, or the validation set where there is none."""
        return self.test or self.validation

    @cached_property
    def train(self) -> Examples:
        """retain and forget together, sorted by image path: the same under every split."""
        ids = self.retain.image_ids + self.forget.image_ids
        order = sorted(range(len(ids)), key=lambda row: image_path(ids[row]))
        tensors = (torch.cat([getattr(self.retain, name), getattr(self.forget, name)])[order] for name in TENSORS)
        return Examples([ids[row] for row in order], *tensors)

    @property
    def digest(self) -> str:
        """Of everything that a result can depend on, except the recipe."""
        parts = (self.retain, self.forget, self.validation, self.held_out)
        content = [*(part.digest for part in parts), self.classes, self.class_counts.tolist()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to(self, device: torch.device | str) -> "Data":
        """The same data on a device; tensors that are already there are shared, not copied."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if hasattr(value, "to")})


def load(folder: Path | str, split: str = "public", device: torch.device | str = "cpu") -> Data:
    """Read a data folder, or the unchanged input folder of the competition (which has no splits and no dataset.json).

    Raises Problem naming the file, and the row or field where there is one.
    """
    folder = _existing(Path(folder))
    described = folder / "dataset.json"
    if not os.path.lexists(described) and not os.path.exists(folder / "retain.csv"):
        raise Problem(f"{folder}: has neither dataset.json nor retain.csv; see data/README.md for the layout")
    dataset = _read_json(described) if os.path.lexists(described) else {}
    check(dataset, DATASET, described)
    name = dataset.get("name", folder.resolve().name)
    check({"name": name}, DATASET, f"{folder}: no name in dataset.json, so the folder's is used")
    check({"split": split}, {"split": NAME}, folder)
    class_counts = _read_class_counts(folder / "age_class_weights.json", dataset.get("classes"))

    split_folder = folder / split if os.path.isdir(folder / split) else folder
    if not os.path.exists(split_folder / "retain.csv"):
        splits = sorted(path.parent.name for path in folder.glob("*/retain.csv"))
        raise Problem(f"{folder}: no split '{split}'; there are: {_listed(splits) or 'none'}")
    files = {
        "retain": split_folder / "retain.csv",
        "forget": split_folder / "forget.csv",
        "validation": folder / "validation.csv",
        "test": folder / "test.csv",
    }
    find = pixels.finder(folder / "images")
    tables = {
        part: _read_table(path, folder / "images", find, len(class_counts))
        for part, path in files.items()
        if part != "test" or os.path.lexists(path)
    }
    for part, other in itertools.product(("forget", "retain"), tables):
        both = tables[part].real.keys() & tables[other].real.keys()
        if part != other and both:
            first = min(tables[part].real[image] for image in both)
            raise Problem(f"{files[part]}: {len(both)} images are also in {files[other].name}; the first is {first}")
    if len(tables["retain"].real) < 2:
        raise Problem(f"{files['retain']}: one image only; networks are trained on 2 or more")
    size = (dataset["image_size"],) * 2 if "image_size" in dataset else None
    read = pixels.read(folder / "images", {part: table.images for part, table in tables.items()}, size)
    _warn(files, tables, read)
    sets: dict[str, Examples | None] = {"test": None}
    for part, table in tables.items():
        sets[part] = Examples(table.images.ids, read[part].images, *map(torch.tensor, table.numbers.T)).to(device)
    return Data(
        folder=folder,
        name=name,
        split=split if split_folder != folder else "kaggle",
        classes=len(class_counts),
        recipe=dataset.get("recipe", {}),
        class_counts=class_counts.to(device),
        note=dataset.get("note", ""),
        **sets,
    )


def splits(folder: Path | str, pattern: str) -> list[str]:
    """The splits of a data folder whose names match a pattern, in the order public, public-2, …, public-10.

    A name without wildcards stands for itself. The competition's own folder has one forget set only, which every pattern
    matches. Raises Problem when none matches.
    """
    folder = _existing(Path(folder))
    if not set(pattern) & set("*?["):
        return [pattern]
    found = [path.parent.name for path in folder.glob("*/retain.csv")]
    if not found and os.path.exists(folder / "retain.csv"):
        return ["kaggle"]

    def natural(name: str) -> tuple[str, int]:
        stem, number = re.fullmatch(r"(.*?)-?([0-9]*)", name).groups()
        return stem, int(number or 0)

    matching = sorted(fnmatch.filter(found, pattern), key=natural)
    if not matching:
        raise Problem(f"{folder}: no split matches '{pattern}'; there are: {_listed(sorted(found, key=natural)) or 'none'}")
    return matching


def _existing(folder: Path) -> Path:
    if not os.path.isdir(folder):
        kit = Path(__file__).parent.parent / "data"
        known = folder.absolute().parent == kit
        hint = f"; if the kit makes it: python data/prepare.py {folder.name} (see data/README.md)" if known else ""
        raise Problem(f"{folder}: no such data folder{hint}")
    return folder


def _read_text(path: Path) -> str:
    if os.path.exists(path) and not os.path.isfile(path):
        raise Problem(f"{path}: not a file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Problem(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeError as error:
        raise Problem(f"{path}: not UTF-8 text ({one_line(error)})") from error


def _read_json(path: Path) -> dict:
    def object_of(pairs: list[tuple[str, object]]) -> dict:
        content = {}
        for key, value in pairs:
            if key in content:
                raise ValueError(f"duplicate key {reprlib.repr(key)}")
            content[key] = value
        return content

    text = _read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=object_of)
    except (ValueError, RecursionError) as error:
        raise Problem(f"{path}: not valid JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise Problem(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def _read_class_counts(path: Path, classes: int | None) -> Tensor:
    """[classes] float32; classes: None means as many as there are labels."""
    counts = _read_json(path)
    if classes is None:
        classes = len(counts)
        check({"classes": classes}, DATASET, path)
    labels = [str(label) for label in range(classes)]
    check(counts, dict.fromkeys(labels, number("a number from 0 to 1e9", 0, 1e9)), path)
    return torch.tensor([float(counts.get(label, 0)) for label in labels])


class _Table(NamedTuple):
    """The rows of a CSV file, in the order of the image paths.

    numbers: [n, 3] int64: age_group, age and person_id. real: an image's real path -> its id.
    """

    images: pixels.Listed
    numbers: np.ndarray
    real: dict[str, str]


def _read_table(path: Path, images: Path, find: Callable[[str], tuple[str, int]], classes: int) -> _Table:
    """find: what `pixels.finder(images)` returns."""
    whole = ("an integer of at most 18 digits", lambda value: type(value) is int)
    allowed = {"image_id": NAME, "age_group": integer(0, classes - 1), "age": whole, "person_id": whole}
    real, numbers, keys = {}, array("q"), array("Q")
    root = os.path.join(os.path.realpath(images), "")
    reader = csv.reader(io.StringIO(_read_text(path)), strict=True)
    try:
        header = next(reader, [])
        for column in COLUMNS if header else ():
            if header.count(column) != 1:
                found = "more than one" if column in header else "no"
                raise Problem(f"{path}: {found} column '{column}'; its columns are {_listed(header)}")
        fields = operator.itemgetter(*map(header.index, COLUMNS)) if header else None
        for cells in filter(None, reader):  # blank lines are skipped
            where = f"{path}: row {reader.line_num}"
            if len(cells) != len(header):
                raise Problem(f"{where}: {len(cells)} fields, the first row has {len(header)}")
            image_id, *texts = fields(cells)
            values = [_number(text) for text in texts]
            check(dict(zip(COLUMNS, [image_id, *values], strict=True)), allowed, where)
            image, key = find(image_id)
            if not image.startswith(root):
                raise Problem(f"{where}: {images / image_path(image_id)} is a link to a place outside {images}")
            if image in real:
                raise Problem(f"{where}: image_id {image_id!r} is listed twice, the first time as {real[image]!r}")
            real[image] = image_id
            numbers.extend(values)
            keys.append(key)
    except csv.Error as error:
        raise Problem(f"{path}: row {reader.line_num}: not a readable CSV file ({one_line(error)})") from error
    if not real:
        raise Problem(f"{path}: empty: it lists no image")
    # The competition uses the rows sorted by image path.
    ids = list(real.values())
    order = sorted(range(len(ids)), key=lambda row: image_path(ids[row]))
    images = pixels.Listed([ids[row] for row in order], np.array(keys)[order])
    return _Table(images, np.array(numbers).reshape(-1, 3)[order], real)


INTEGER = re.compile(r" *(-?[0-9]{1,18})(\.0*)? *")


def _number(text: str) -> int | str:
    """A CSV field as an integer, or the text if it is not one. Pandas writes 3.0 when a column has gaps."""
    match = INTEGER.fullmatch(text)
    return int(match[1]) if match else text


@cache
def say(line: str) -> None:
    """On stderr, once per command."""
    print(line, file=sys.stderr, flush=True)


def _warn(files: Mapping[str, Path], tables: Mapping[str, _Table], read: Mapping[str, pixels.Pixels]) -> None:
    """Warn of sets that are allowed but perhaps not meant: odd sizes, and equal images in two of them."""
    ids = {part: table.images.ids for part, table in tables.items()}
    kept, forgotten, warning = len(ids["retain"]), len(ids["forget"]), f"warning: {files['forget']}"
    if forgotten == 1:
        say(f"{warning}: one image: its score is mostly chance, and batch norm may fail on a batch of one image")
    if forgotten > kept:
        say(f"{warning}: {forgotten} images are to be forgotten and {kept} kept; are the two files swapped?")
    training = ["retain", "forget"]
    for part, others, where in (
        ("forget", ["retain"], "in retain.csv"),
        ("validation", training, "in the training images"),
        ("test", training, "in the training images"),
    ):
        if part not in tables:
            continue
        ours, theirs = read[part].fingerprints, np.concatenate([read[other].fingerprints for other in others])
        equal = np.flatnonzero(np.isin(ours, theirs))
        if len(equal):
            names = [image_id for other in others for image_id in ids[other]]
            twin = min((names[row] for row in np.flatnonzero(theirs == ours[equal[0]])), key=image_path)
            first = f"the first: {ids[part][equal[0]]} = {twin}"
            say(f"warning: {files[part]}: {len(equal)} of {len(ours)} images are also, pixel for pixel, {where} ({first})")
