"""CASIA-SURF, the competition's faces, for those who hold its licence -> a DataSet with the organisers' division.

Source of every fact: surf.py of https://github.com/google-deepmind/unlearning_evaluation. The original folder holds
Age_Gender.txt (lines "subject age gender") and WBackground/<part>/<subject>/real.rssdk/color/*.jpg. Ages fall into ten
groups of equal width; images, sorted by path, are shuffled with the seed 43 and divided 80/10/10 by image; the training
images of the first 15 subjects are forgotten. Copies stay, as they did in the competition.

Not published: the competition's second forget set (nor which of its two leaderboards this one belongs to), and which
files the competition's own image_ids were. Here `public` is the organisers' set; every other one is ours, of the next 15
subjects each that are in the first two age groups alone.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import pandas as pd
from layout import SEED, DataSet, split_names
from people import GROUPS, age_groups
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, resize

from evaluator.data import check, integer
from evaluator.files import Problem, one_line
from evaluator.progress import progress

SIZE = 32
FORGOTTEN = 15  # subjects in a forget set
NOTE = "CASIA-SURF: the forget set public is the organisers'; the others are drawn by the kit, as theirs is not published"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", type=Path, dest="path", required=True, metavar="FOLDER", help="holds Age_Gender.txt")
    parser.add_argument("--forget-sets", type=int, default=4, metavar="N", help="public, and as many private (default: 4)")


def casia_surf(path: Path, forget_sets: int = 4) -> DataSet:
    """The organisers' training, validation and test sets, their forget set as `public`, and others of the same kind.

    path: the folder that holds Age_Gender.txt and, itself or in a folder, WBackground. Raises Problem, with the file or
    line, when the tree is another one or has too few subjects for so many forget sets.
    """
    check({"forget_sets": forget_sets}, {"forget_sets": integer(1, 1000)}, "options")
    subjects = _subjects(path / "Age_Gender.txt")
    root = min([*path.glob("WBackground"), *path.glob("*/WBackground")], default=path / "WBackground")
    # Sorted as text, first by the subject's folder: a Path's own order is another one.
    files = sorted(root.glob("*/*/real.rssdk/color/*.jpg"), key=lambda file: (str(file.parents[2]), file.name))
    if not files:
        raise Problem(f"{root}: no images */*/real.rssdk/color/*.jpg; unpack CASIA_SURF_live.zip beside Age_Gender.txt")
    names = [file.parents[2].name for file in files]
    strangers = sorted(set(names) - set(subjects.index))
    if strangers:
        raise Problem(f"{path / 'Age_Gender.txt'}: no subject {strangers[0]!r}, who has images in {root}")
    table = subjects.loc[names].reset_index(drop=True)
    table["image_id"] = [f"{person}-{row}" for row, person in enumerate(table.person_id)]
    table["source"] = [file.relative_to(path).as_posix() for file in files]

    order = list(range(len(table)))
    random.Random(SEED).shuffle(order)
    train, validation, test = np.split(np.array(order), [int(0.8 * len(order)), int(0.9 * len(order))])
    forget = _forget(table, train, split_names(forget_sets))
    return DataSet(
        table, _pictures(files), GROUPS, train, validation, test, forget, note=NOTE, labels=subjects.attrs["ages"]
    )


def _subjects(path: Path) -> pd.DataFrame:
    """age, age_group and person_id (their place in the alphabet) of each subject."""
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise Problem(f"{path}: cannot be read ({one_line(error)})") from error
    ages = {}
    for number, line in enumerate(lines, 1):
        if len(line) != 3 or not line[1].isdecimal() or line[0] in ages:
            raise Problem(f"{path}: line {number}: {' '.join(line)!r}, it must be a new subject, an age and a gender")
        ages[line[0]] = int(line[1])
    if not ages:
        raise Problem(f"{path}: it lists no subject")
    table = pd.DataFrame({"age": pd.Series(ages)}).sort_index()
    table["age_group"], table.attrs["ages"] = age_groups(table.age)
    return table.assign(person_id=range(len(table)))


def _forget(table: pd.DataFrame, train: np.ndarray, splits: list[str]) -> dict[str, np.ndarray]:
    """The organisers take scikit-learn's first LeavePGroupsOut: the 15 lowest subject numbers in the training set."""
    rows = table.iloc[train]
    in_order = np.unique(rows.person_id)
    later = in_order[FORGOTTEN:]
    later = later[rows.groupby("person_id").age_group.first()[later] < 2]
    drawn = np.concatenate([in_order[:FORGOTTEN], later])
    if len(drawn) < FORGOTTEN * len(splits):
        raise Problem(f"only {len(drawn)} subjects to forget, {FORGOTTEN} are needed for each set: lower --forget-sets")
    people = {split: drawn[FORGOTTEN * number :][:FORGOTTEN] for number, split in enumerate(splits)}
    return {split: train[rows.person_id.isin(chosen)] for split, chosen in people.items()}


def _pictures(files: list[Path]) -> np.ndarray:
    """uint8 [images, 32, 32, 3]. Squashed, and not smoothed, as torchvision 0.13 did with tensors, which theirs used."""
    pictures = np.empty((len(files), SIZE, SIZE, 3), np.uint8)
    with progress("reading", len(files), "image") as bar:
        for row, path in enumerate(files):
            try:
                with Image.open(path, formats=["JPEG"]) as opened:
                    image = pil_to_tensor(opened.convert("RGB"))
            except Exception as error:  # Pillow raises many kinds for a damaged file
                raise Problem(f"{path}: not a readable image ({one_line(error)})") from error
            pictures[row] = resize(image, [SIZE, SIZE], antialias=False).permute(1, 2, 0).numpy()
            bar.update()
    return pictures
