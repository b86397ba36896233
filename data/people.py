"""Published sets of faces, from a folder or archive that you have, or by the kaggle command -> a DataSet.

The labels are ten age groups of equal width between the smallest and the largest age, as the competition's are; MUFAC has
eight published ones, and LFW has no ages. Nothing of these sets comes with the kit: see each one's own terms.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from download import DOWNLOADS
from layout import DataSet
from own import Plan, divide, files, inside, left_out, plan_options, read, read_csv

from evaluator.files import Problem, one_line

GROUPS = 10

# What the path of an image says, by its end. UTKFace: age_gender_race_date&time; AgeDB: number_name_age_gender.
UTKFACE = r"(?:.*/)?(?P<age>\d{1,3})_[01]_[0-4]_\d+\.jpg(?:\.chip\.jpg)?"
AGEDB = r"(?:.*/)?\d+_(?P<subject>[^/]+)_(?P<age>\d{1,3})_[mf]\.jpg"
LFW = r"(?:.*/)?(?P<subject>[^/]+)/(?P=subject)_\d+\.jpg"

# MUFAC's age classes, of unequal width: https://github.com/ndb796/MachineUnlearning (Choi and Na, 2023)
MUFAC = {"a": "0-6", "b": "7-12", "c": "13-19", "d": "20-30", "e": "31-45", "f": "46-55", "g": "56-66", "h": "67-80"}


def options(parser: argparse.ArgumentParser, **defaults: object) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--from", type=Path, dest="path", metavar="PATH", help="the folder, zip or tar archive that you have")
    where.add_argument("--kaggle", metavar="OWNER/NAME", help="download this data set of Kaggle's with the kaggle command")
    plan_options(parser, **defaults)


def utkface(path: Path | None = None, kaggle: str | None = None, **how: object) -> DataSet:
    """UTKFace (some 23,700 faces, ages 1 to 116). No subjects are known: the forget sets are drawn by image."""
    plan = Plan(**how)
    with opened(path, kaggle) as folder:
        table, pictures = read(_by_path(folder, UTKFACE), plan.size)
    table["age_group"], labels = age_groups(table.age)
    note = "UTKFace has no subject ids: forget sets are drawn by image, so that a person may be in retain and forget"
    return divide(table, pictures, GROUPS, plan, note, labels)


def agedb(path: Path | None = None, kaggle: str | None = None, **how: object) -> DataSet:
    """AgeDB (16,488 faces of 568 subjects): both from the names of the files, or ages from agedb.csv if it is there."""
    plan = Plan(**how)
    with opened(path, kaggle) as folder:
        tables = sorted(folder.rglob("agedb.csv"))
        found = _agedb_csv(folder, tables[0]) if tables else _by_path(folder, AGEDB)
        table, pictures = read(found, plan.size)
    table["age_group"], labels = age_groups(table.age)
    return divide(table, pictures, GROUPS, plan, labels=labels)


def mufac(path: Path | None = None, kaggle: str | None = None, **how: object) -> DataSet:
    """MUFAC (13,068 faces of Korean families): its eight age classes; `age` is the youngest of the class.

    Its own division is not used: 27 images are in training and test sets both.
    """
    plan = Plan(**how)
    with opened(path, kaggle) as folder:
        found = pd.concat([_mufac_csv(folder, part) for part in ("train", "val", "test")])
        found = found.sort_values("source", ignore_index=True)
        table, pictures = read(found, plan.size)
    table["age_group"] = table.age
    table["age"] = table.age.map([int(years.split("-")[0]) for years in MUFAC.values()].__getitem__)
    return divide(table, pictures, len(MUFAC), plan, labels=list(MUFAC.values()))


def lfw(path: Path | None = None, kaggle: str | None = None, photographs: int = 20, **how: object) -> DataSet:
    """LFW (13,233 faces): the label is the person, of whom there are at least `photographs`; no ages are known.

    Forgetting a person would be forgetting a class, so the forget sets are drawn by image. `age` is the label.
    """
    plan = Plan(**how)
    with opened(path, kaggle) as folder:
        found = _by_path(folder, LFW)
        found = found[found.groupby("subject").subject.transform("size") >= photographs].reset_index(drop=True)
        if found.subject.nunique() < 2:
            raise Problem(f"fewer than two people have {photographs} photographs: lower --photographs")
        found["age"], people = pd.factorize(found.subject)
        table, pictures = read(found.drop(columns="subject"), plan.size)
    table["age_group"] = table.age
    note = "LFW has no ages: the label is the person; forget sets are drawn by image, so people are in retain and forget"
    return divide(table, pictures, len(people), plan, note, list(people))


def utkface_options(parser: argparse.ArgumentParser) -> None:
    options(parser, forget_classes=2)


def lfw_options(parser: argparse.ArgumentParser) -> None:
    options(parser, forget_share=0.05)
    parser.add_argument(
        "--photographs", type=int, default=20, metavar="K", help="of a person, at least (default: %(default)s)"
    )


def age_groups(ages: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Each age's number among ten groups of equal width, as in the organisers' surf.py; and the ages in each, as text."""
    edges = np.linspace(ages.min(), ages.max() + 1, GROUPS + 1)
    first = np.ceil(edges).astype(int)
    labels = [f"{low}-{high - 1}" if low < high else "no age" for low, high in pairwise(first)]
    return np.digitize(ages, edges) - 1, labels


def _by_path(folder: Path, pattern: str) -> pd.DataFrame:
    """Images whose paths say what they are: file, source, where, and the pattern's groups."""
    found = files(folder)
    said = found.source.str.extract(f"^{pattern}$", flags=re.IGNORECASE)
    named = found.source.str.fullmatch(pattern, flags=re.IGNORECASE)
    left_out("have malformed names", found.source[~named])
    if not named.any():
        raise Problem(f"{folder}: no image is named as this set's are")
    found = pd.concat([found, said], axis=1)[named].reset_index(drop=True)
    return found.astype({"age": int}) if "age" in said else found


def _agedb_csv(folder: Path, path: Path) -> pd.DataFrame:
    """Columns path and age, as https://github.com/YyzHarry/imbalanced-regression has it beside the folder of the images."""
    table = read_csv(path, ["path", "age"])
    roots = [root for root in path.parents if root.is_relative_to(folder)]
    root = next((root for root in roots if (root / table.path[0]).is_file()), folder)
    table["file"] = [inside(root, *row) for row in zip(table.path, table["where"], strict=True)]
    unknown = ~table.age.str.fullmatch(r"\d{1,3}(\.0)?")
    if unknown.any():
        raise Problem(f"{table['where'][unknown.argmax()]}: age is {table.age[unknown.argmax()]!r}, it must be whole years")
    table["age"] = table.age.astype(float).astype(int)
    subject = table.path.str.extract(f"^{AGEDB}$", flags=re.IGNORECASE).subject
    if subject.notna().all():
        table["subject"] = subject
    return table.rename(columns={"path": "source"}).sort_values("source", ignore_index=True)


def _mufac_csv(folder: Path, part: str) -> pd.DataFrame:
    """Columns family_id, person_id, age_class, image_path: https://github.com/ndb796/korean_face_age_dataset"""
    path = min(folder.rglob(f"custom_{part}_dataset.csv"), default=folder / f"custom_{part}_dataset.csv")
    table = read_csv(path, ["family_id", "person_id", "age_class", "image_path"])
    unknown = ~table.age_class.isin(MUFAC)
    if unknown.any():
        row = unknown.argmax()
        raise Problem(f"{table['where'][row]}: age_class is {table.age_class[row]!r}, it must be one of {', '.join(MUFAC)}")
    table["age"] = table.age_class.map(list(MUFAC).index)
    table["subject"] = table.family_id + "-" + table.person_id
    table["source"] = f"{part}_images/" + table.image_path
    table["file"] = [inside(path.parent, *row) for row in zip(table.source, table["where"], strict=True)]
    return table


@contextmanager
def opened(path: Path | None, kaggle: str | None) -> Iterator[Path]:
    """The folder that the images are in: the one given, or an archive unpacked for as long as this lasts."""
    path = path or download(kaggle)
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, Path(folder))
        yield Path(folder)


def unpack(archive: Path, folder: Path) -> None:
    """The plain files of a zip or tar archive: no links, nothing outside the folder. Raises Problem when it is damaged."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as content:
                content.extractall(folder)  # drops ".." and leading "/", and writes links as files
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as content:
                content.extractall(folder, (member for member in content if member.isfile()), filter="data")
        else:
            raise ValueError("neither a folder nor a whole zip or tar archive")
    except Exception as error:  # zlib, lzma, bz2, zipfile and tarfile each raise their own
        hint = "get it anew, or unpack it yourself and give the folder"
        raise Problem(f"{archive}: cannot be unpacked ({one_line(error)}); {hint}") from error


def download(name: str) -> Path:
    """The archive of a data set of Kaggle's, downloaded unless it is there.

    Raises Problem when the kaggle command is missing, or with what it says when it fails.
    """
    if not re.fullmatch(r"\w[\w-]*/\w[\w-]*", name, re.ASCII):
        raise Problem(f"--kaggle is {name!r}, it must be OWNER/NAME as in the data set's address on kaggle.com")
    folder = DOWNLOADS / name.replace("/", "-")
    archive = folder / f"{name.split('/')[1]}.zip"
    if zipfile.is_zipfile(archive):
        return archive
    print(f"downloading {name} from Kaggle to {archive}")
    # Not imported: `import kaggle` alone logs in, and some versions end the process when that fails.
    asked = [sys.executable, "-m", "kaggle", "datasets", "download", name, "-p", str(folder), "-q"]
    done = subprocess.run(asked, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    said = f"{done.stdout}\n{done.stderr}".strip()
    if done.returncode or not archive.is_file():
        if "No module named kaggle" in said:
            said = "the kaggle command is missing: pip install -r requirements.txt"
        elif "Authentication required" in said:
            said = "Kaggle wants to know who you are: run kaggle auth login"
        else:
            said = said.splitlines()[-1][:300] if said else "the kaggle command failed"
        raise Problem(f"{name}: not downloaded ({said}); or download it by hand and give it with --from")
    return archive
