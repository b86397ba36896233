"""The competition's layout on disk -> tensors in memory -> loaders of the competition's dict batches."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evaluator.files import Problem, one_line

COLUMNS = ["image_id", "age_group", "age", "person_id"]


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
        """One sample as the competition's data set gives it: `image` is [3, H, W] float32 within 0..255."""
        return {
            "image": self.images[index].float(),
            "image_id": self.image_ids[index],
            "age_group": int(self.age_group[index]),
            "age": int(self.age[index]),
            "person_id": int(self.person_id[index]),
        }

    def batch(self, indices: Tensor) -> dict:
        """What collating the samples of `indices` gives, from one indexing operation."""
        return {
            "image": self.images[indices].float(),
            "image_id": [self.image_ids[index] for index in indices.tolist()],
            "age_group": self.age_group[indices],
            "age": self.age[indices],
            "person_id": self.person_id[indices],
        }

    def equals(self, other: "Examples") -> bool:
        """Whatever a user's code may have put in a tensor's place."""

        def same(mine: object, theirs: Tensor) -> bool:
            kind = getattr(mine, "dtype", None), getattr(mine, "device", None)
            return kind == (theirs.dtype, theirs.device) and torch.equal(mine, theirs)

        names = ("images", "age_group", "age", "person_id")
        return self.image_ids == other.image_ids and all(same(getattr(self, name), getattr(other, name)) for name in names)

    def clone(self) -> "Examples":
        tensors = (getattr(self, name).clone() for name in ("images", "age_group", "age", "person_id"))
        return Examples(list(self.image_ids), *tensors)

    def to(self, device: torch.device | str) -> "Examples":
        tensors = (getattr(self, name).to(device) for name in ("images", "age_group", "age", "person_id"))
        return Examples(self.image_ids, *tensors)

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256("\n".join(self.image_ids).encode())
        for tensor in (self.images, self.age_group):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


class Loader(DataLoader):
    """A DataLoader over `Examples`, shuffled anew each epoch, whose batches are indexed straight out of memory.

    generators: the source of the order; with K of them a batch is K members' batches one after the other, each member
    with an order of its own (see evaluator.ensemble). None stands for torch's global generator.
    """

    def __init__(
        self, examples: Examples, batch_size: int = 64, generators: Sequence[torch.Generator | None] = (None,), shuffle=True
    ):
        super().__init__(examples, batch_size=batch_size, shuffle=shuffle)
        self.generators = generators
        self.shuffles = shuffle

    def __iter__(self) -> Iterator[dict]:
        count, device = len(self.dataset), self.dataset.images.device
        orders = torch.stack(
            [
                torch.randperm(count, generator=generator, device=generator.device if generator else "cpu")
                if self.shuffles
                else torch.arange(count)
                for generator in self.generators
            ]
        ).to(device)
        for indices in orders.split(self.batch_size, dim=1):
            yield self.dataset.batch(indices.flatten())

    def with_batch_size(self, batch_size: int) -> "Loader":
        """The same examples and randomness in batches of another size."""
        return Loader(self.dataset, batch_size, self.generators, self.shuffles)


@dataclass
class Data:
    """A data folder under one split. test is None in the competition's own folder, which has no test labels."""

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

    @property
    def held_out(self) -> Examples:
        """What TA is measured on: the test set, or the validation set where there is none."""
        return self.test or self.validation

    @cached_property
    def train(self) -> Examples:
        """retain and forget together, sorted by image id: the same under every split."""
        ids = self.retain.image_ids + self.forget.image_ids
        order = sorted(range(len(ids)), key=lambda row: _image_path(ids[row]))
        tensors = (
            torch.cat([getattr(self.retain, name), getattr(self.forget, name)])[order]
            for name in ("images", "age_group", "age", "person_id")
        )
        return Examples([ids[row] for row in order], *tensors)

    @property
    def digest(self) -> str:
        parts = (self.retain, self.forget, self.validation, self.held_out)
        return hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()


def load(folder: Path | str, split: str = "public", device: torch.device | str = "cpu") -> Data:
    """Read a data folder, or the unchanged input folder of the competition (which has no splits and no dataset.json).

    Raises Problem naming the file, and the row where there is one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        hint = f"; make it with: python data/prepare.py {folder.name}" if folder.name == "digits" else ""
        raise Problem(f"{folder}: no such data folder{hint}")
    described = folder / "dataset.json"
    dataset = _read_json(described) if described.exists() else {}
    if not dataset and not (folder / "retain.csv").exists():
        raise Problem(f"{folder}: neither dataset.json nor retain.csv is there; see data/README.md for the layout")
    counts = _read_json(folder / "age_class_weights.json")
    classes = dataset.get("classes", len(counts))
    split_folder = folder / split if (folder / split).is_dir() else folder
    if not (split_folder / "retain.csv").exists():
        splits = sorted(path.parent.name for path in folder.glob("*/retain.csv"))
        raise Problem(f"{folder}: no split '{split}'; there are: {', '.join(splits) or 'none'}")
    files = {
        "retain": split_folder / "retain.csv",
        "forget": split_folder / "forget.csv",
        "validation": folder / "validation.csv",
        "test": folder / "test.csv",
    }
    sets = {name: _read_examples(path, folder, classes) for name, path in files.items() if name != "test" or path.exists()}
    both = set(sets["retain"].image_ids) & set(sets["forget"].image_ids)
    if both:
        raise Problem(f"{files['forget']}: {len(both)} images are in {files['retain'].name} too, the first is {min(both)}")
    class_counts = torch.tensor([float(counts.get(str(label), 0)) for label in range(classes)])
    return Data(
        folder=folder,
        name=dataset.get("name", folder.name),
        split=split if split_folder != folder else "kaggle",
        classes=classes,
        recipe=dataset.get("recipe", {}),
        class_counts=class_counts.to(device),
        **{name: sets[name].to(device) if name in sets else None for name in files},
    )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise Problem(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise Problem(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise Problem(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def _image_path(image_id: str) -> str:
    return image_id.replace("-", "/", 1) + ".png"


def _read_examples(path: Path, folder: Path, classes: int) -> Examples:
    try:
        table = pd.read_csv(path, dtype={"image_id": str})
    except OSError as error:
        raise Problem(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # pandas' parser and encoding errors are among these
        raise Problem(f"{path}: not a readable CSV file ({str(error).strip()})") from error
    for column in COLUMNS:
        if column not in table:
            raise Problem(f"{path}: no column '{column}'; its columns are {', '.join(table.columns)}")
    if table.empty:
        raise Problem(f"{path}: empty, it lists no image")
    for column in COLUMNS[1:]:
        numbers = pd.to_numeric(table[column], errors="coerce")
        wrong = numbers.isna() | (numbers % 1 != 0)
        if column == "age_group":
            wrong |= (numbers < 0) | (numbers >= classes)
        if wrong.any():
            row = wrong.idxmax()
            allowed = f"an integer from 0 to {classes - 1}" if column == "age_group" else "an integer"
            raise Problem(f"{path}: row {row + 2}: {column} is '{table[column][row]}', it must be {allowed}")
        table[column] = numbers.astype("int64")
    repeated = table.image_id.isna() | table.image_id.duplicated()
    if repeated.any():
        row = repeated.idxmax()
        raise Problem(f"{path}: row {row + 2}: image_id {table.image_id[row]!r} is missing or listed twice")
    # The competition uses the rows sorted by image path.
    table = table.assign(path=table.image_id.map(_image_path)).sort_values("path")
    images = [_read_image(folder / "images" / image) for image in table.path]
    for image, name in zip(images, table.path, strict=True):
        if image.shape != images[0].shape:
            size, first = "x".join(map(str, image.shape[1:])), "x".join(map(str, images[0].shape[1:]))
            raise Problem(f"{folder / 'images' / name}: {size} pixels, the images before it have {first}")
    numbers = (torch.from_numpy(table[column].to_numpy().copy()) for column in COLUMNS[1:])
    return Examples(table.image_id.tolist(), torch.stack(images), *numbers)


def _read_image(path: Path) -> Tensor:
    if not path.is_file():
        raise Problem(f"{path}: missing image")
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for a damaged file
        raise Problem(f"{path}: not a readable image ({one_line(error)})") from error
