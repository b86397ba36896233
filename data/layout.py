"""Writes a data folder in the competition's layout, and draws its sets: shared by everything that makes a data folder."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from evaluator.data import COLUMNS
from evaluator.files import Problem, write_csv, write_json
from evaluator.pixels import image_path
from evaluator.progress import progress

SEED = 43  # of the shuffle before the 80/10/10 split, as in the competition


@dataclass
class DataSet:
    """What a data folder is made from.

    table: one row per image with image_id, age_group (the label), age and person_id, and where images come from files
    `source`, which file. pictures: uint8, [images, H, W] (grey) or [images, H, W, 3]. train, validation, test: row numbers.
    forget: split -> the row numbers in train that it forgets. recipe: fields of evaluator.training.Recipe. note: what every
    output must say of these images, such as "synthetic". labels: what the classes are called.
    """

    table: pd.DataFrame
    pictures: np.ndarray
    classes: int
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    forget: dict[str, np.ndarray]
    recipe: dict = field(default_factory=dict)
    note: str = ""
    labels: Sequence[str] = ()


def write(folder: Path, made: DataSet) -> None:
    """Write a data folder; the same bytes for the same DataSet. An interrupted one is completed."""
    (folder / "dataset.json").unlink(missing_ok=True)
    for path in folder.glob("*/*.csv"):  # what an earlier run drew and this one does not
        if path.parent.name not in made.forget and path.name in ("retain.csv", "forget.csv"):
            path.unlink()
    with progress("images", len(made.table), "image") as bar:
        for image_id, picture in zip(made.table.image_id, made.pictures, strict=True):
            _write_image(folder / "images" / image_path(image_id), picture)
            bar.update()
    getattr(os, "sync", lambda: None)()  # once for all images: a sync after each takes minutes
    table = made.table[COLUMNS]
    _write_csv(folder / "validation.csv", table.iloc[made.validation])
    _write_csv(folder / "test.csv", table.iloc[made.test])
    for split, rows in made.forget.items():
        _write_csv(folder / split / "retain.csv", table.iloc[np.setdiff1d(made.train, rows)])
        _write_csv(folder / split / "forget.csv", table.iloc[rows])
    if "source" in made.table:
        _write_csv(folder / "sources.csv", made.table[["image_id", "source"]])
    if made.labels:
        write_json(folder / "labels.json", {str(number): label for number, label in enumerate(made.labels)})
    counts = table.age_group.iloc[made.train].value_counts().sort_index()
    write_json(folder / "age_class_weights.json", {str(label): int(count) for label, count in counts.items()})
    described = {"name": folder.name, "image_size": made.pictures.shape[1], "classes": made.classes, "recipe": made.recipe}
    # Last, so that a folder with it is complete.
    write_json(folder / "dataset.json", described | ({"note": made.note} if made.note else {}))


def hold_out(
    images: int, validation: float = 0.1, test: float = 0.1, seed: int = SEED
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of train, validation and test, drawn by image as in the competition: 80, 10 and 10%."""
    order = np.random.RandomState(seed).permutation(images)
    first = int(images * validation)
    second = first + int(images * test)
    return order[second:], order[:first], order[first:second]


def split_names(sets: int) -> list[str]:
    """public, private, public-2, private-2, … for so many forget sets of each kind."""
    return [f"{kind}-{number}".removesuffix("-1") for number in range(1, sets + 1) for kind in ("public", "private")]


def forget_subjects(
    table: pd.DataFrame, train: np.ndarray, sets: int, share: float, classes: int | None = 2, seed: int = SEED
) -> dict[str, np.ndarray]:
    """`sets` public and as many private forget sets of whole subjects, no subject in two of them: split -> row numbers.

    Subjects are drawn at random from those whose images are all in the first `classes` classes (None: any), until a set
    holds `share` of the training images. Raises Problem where there are too few.
    """
    rows = table.iloc[train]
    people = rows.groupby("person_id").age_group.agg(["size", "max"])
    if classes is not None:
        people = people[people["max"] < classes]
    people = people["size"].sample(frac=1, random_state=seed)
    drawn, wanted = {}, share * len(train)
    for split in split_names(sets):
        reached = people.cumsum().searchsorted(wanted) + 1
        if reached > len(people):
            raise Problem(
                f"only {len(drawn)} of {2 * sets} forget sets of {wanted:.0f} images can be drawn without sharing subjects; "
                "ask for fewer, for smaller ones, or from more classes"
            )
        drawn[split] = train[rows.person_id.isin(people.index[:reached])]
        people = people.iloc[reached:]
    return drawn


def _write_image(path: Path, picture: np.ndarray) -> None:
    """A file that holds the same already keeps its date, and one that was cut off is made anew."""
    content = io.BytesIO()
    Image.fromarray(picture).convert("RGB").save(content, format="PNG")
    if not (path.is_file() and path.read_bytes() == content.getvalue()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    write_csv(path, table.sort_values("image_id"))
