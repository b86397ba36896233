"""Your own images, from a CSV file or one folder per class; and what every set of image files needs on its way to a DataSet:
images of any kind read at one size, copies dropped, subjects joined that share an image, forget sets drawn."""

import argparse
import csv
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from layout import SEED, DataSet, forget_subjects, hold_out, split_names
from PIL import Image, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from evaluator.data import BOOLEAN, LARGEST_IMAGE, check, integer, number
from evaluator.files import Problem, one_line
from evaluator.progress import progress

# Pillow's readers that need no other program, and the ends of the names of files that they read.
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
# Pixels of an image that is read, 300 MB in memory; Pillow itself warns at 89 and refuses at 179 million.
LARGEST = 100_000_000
SHARE = number("a number above 0 and below 1", 1e-9, 1 - 1e-9)
SUBJECT, EXAMPLE = "subject", "example"


@dataclass(frozen=True)
class Plan:
    """How images are read and divided into sets. Raises Problem when a value means nothing."""

    size: int = 32  # pixels per side
    forget_sets: int = 4  # so many public and as many private ones; with fewer, little can be said of two methods
    forget_share: float = 0.02  # of the training images, as in the competition
    forget_classes: int | None = None  # only subjects whose images are all in the first so many classes; None: any
    by: str | None = None  # forget whole subjects, or single examples; None: subjects where they are known
    stratified: bool = False  # each forget set has the class shares of the training images that it may be drawn from
    validation: float = 0.1  # of all images; drawn by image, as is the test set
    test: float = 0.1
    seed: int = SEED

    def __post_init__(self):
        allowed = {
            "size": integer(1, LARGEST_IMAGE),
            "forget_sets": integer(1, 1000),
            "forget_share": SHARE,
            "forget_classes": ("an integer above 0", lambda value: value is None or (type(value) is int and value > 0)),
            "by": ("subject or example", lambda value: value in (None, SUBJECT, EXAMPLE)),
            "stratified": BOOLEAN,
            "validation": SHARE,
            "test": SHARE,
            "seed": integer(0, 2**32 - 1),
        }
        check(vars(self), allowed, "options")
        if self.validation + self.test > 0.9:
            raise Problem("options: validation and test leave less than a tenth of the images to train on")


def plan_options(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Add an option for each field of Plan. defaults: replace those of Plan."""
    add, plan = parser.add_argument, Plan(**defaults)
    first = plan.forget_classes or "any"
    add("--size", type=int, help="pixels per side; the middle square is kept (default: %(default)s)")
    add("--forget-sets", type=int, metavar="N", help="public forget sets, and as many private ones (default: %(default)s)")
    add("--forget-share", type=float, metavar="SHARE", help="of the training images in a forget set (default: %(default)s)")
    add("--forget-classes", type=int, metavar="K", help=f"forget only from the first K classes (default: {first})")
    add("--by", choices=[SUBJECT, EXAMPLE], help="forget whole subjects or single images (default: subjects if known)")
    add("--stratified", action="store_true", help="forget sets have the class shares of the training images")
    add("--validation", type=float, metavar="SHARE", help="of all images (default: %(default)s)")
    add("--test", type=float, metavar="SHARE", help="of all images (default: %(default)s)")
    add("--seed", type=int, help="of what is drawn (default: %(default)s)")
    parser.set_defaults(**vars(plan))


def folder_options(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--csv", type=Path, metavar="FILE", help="columns path (relative to the file), label, and maybe subject"
    )
    where.add_argument("--images", type=Path, metavar="DIR", help="a folder with one folder of images per class")
    plan_options(parser)


def folder(csv: Path | None = None, images: Path | None = None, **options: object) -> DataSet:
    """Your own images. csv: a file with the columns path, label and maybe subject; or images: one folder per class.

    Labels are numbered in their order, of numbers or else of the alphabet. options: fields of Plan. Raises Problem, with the
    row or file, for an image that cannot be used, and for a class with fewer than two images.
    """
    plan = Plan(**options)
    found = from_csv(csv) if csv else from_folders(images)
    labels = sorted(found.label.unique(), key=_by_number(found.label))
    found["age"] = found.label.map({label: number for number, label in enumerate(labels)})
    print(f"{len(labels):,} classes, numbered from 0 as in labels.json: {_first(labels)}")
    table, pictures = read(found, plan.size)
    table["age_group"] = table.age
    counts = table.age.value_counts().reindex(range(len(labels)), fill_value=0)
    if len(labels) < 2 or counts.min() < 2:
        few = f"class {labels[counts.argmin()]!r} has {counts.min()}" if len(labels) > 1 else f"{len(labels)} class"
        raise Problem(f"{csv or images}: {few}; two images or more of each of two classes or more are needed")
    made = divide(table, pictures, len(labels), plan, labels=labels)
    untrained = set(table.age) - set(table.age.iloc[made.train])
    if untrained:
        raise Problem(
            f"{csv or images}: every image of class {labels[min(untrained)]!r} was drawn for validation or test; "
            "try another --seed, or a smaller --validation and --test"
        )
    return made


def _by_number(labels: Iterable[str]) -> Callable[[str], object]:
    """A sort key: by number where all labels are integers, else alphabetically."""
    return int if all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels) else str


def from_csv(path: Path) -> pd.DataFrame:
    """[images] rows: file, source (its path in the CSV), where (for errors), label, and subject if the CSV has it."""
    table = read_csv(path, ["path", "label"], ["subject"])
    table["label"] = table.label.str.strip()
    empty = table.label == ""
    if empty.any():
        raise Problem(f"{table['where'][empty.argmax()]}: no label")
    table["file"] = [inside(path.parent, *row) for row in zip(table.path, table["where"], strict=True)]
    repeated = table.file.duplicated()
    if repeated.any():
        row = repeated.argmax()
        raise Problem(f"{table['where'][row]}: {table.path[row]!r} is listed twice")
    if "subject" in table:
        empty = table.subject.str.strip() == ""
        if empty.any():
            hint = "fill it in, or leave the column out" + ("" if empty.all() else " (other rows have one)")
            raise Problem(f"{table['where'][empty.argmax()]}: no subject; {hint}")
    return table.rename(columns={"path": "source"}).sort_values("source", ignore_index=True)


def from_folders(root: Path) -> pd.DataFrame:
    """[images] rows: file, source (path below root), where (for errors), label (the name of the folder in root)."""
    found = files(root)
    found["label"] = [source.split("/")[0] if "/" in source else "" for source in found.source]
    left_out("images are in no class's folder", found.source[found.label == ""])
    found = found[found.label != ""].reset_index(drop=True)
    if found.empty:
        raise Problem(f"{root}: no images in its folders; it must hold one folder per class")
    return found


def files(root: Path) -> pd.DataFrame:
    """All image files below a folder, sorted, hidden ones left out: file, source (path below root), where (root).

    Raises Problem when there is no such folder, or a name in it is not UTF-8.
    """
    if not root.is_dir():
        raise Problem(f"{root}: no such folder")
    below = {path.relative_to(root): path for path in root.rglob("*") if path.is_file()}
    below = {name.as_posix(): path for name, path in below.items() if not any(part.startswith(".") for part in name.parts)}
    left_out("files are not images", sorted(name for name, path in below.items() if path.suffix.lower() not in SUFFIXES))
    for name in below:
        if not name.isascii() and name != name.encode(errors="replace").decode():
            raise Problem(f"{root}: the name {name!r} is not UTF-8: rename it")
    rows = [(path, name, str(root)) for name, path in sorted(below.items()) if path.suffix.lower() in SUFFIXES]
    return pd.DataFrame(rows, columns=["file", "source", "where"])


def left_out(why: str, names: Sequence[str]) -> None:
    """Print how many files are left out and why, with the first of them; nothing if there are none."""
    if len(names):
        print(f"left out: {len(names):,} {why}: {_first(names)}")


def _first(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in list(names)[:3]) + (" …" if len(names) > 3 else "")


def read_csv(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Columns of a CSV file as text, other columns left out; and `where`: the file and its row, for errors.

    Raises Problem for a file that cannot be read or lacks a column that is needed.
    """
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
        rows = [(f"{path}: row {reader.line_num}", cells) for cells in reader if cells]
    except (OSError, UnicodeError, csv.Error) as error:
        raise Problem(f"{path}: not a readable CSV file in UTF-8 ({one_line(error)})") from error
    columns = [*needed, *(column for column in optional if column in header)]
    for column in columns:
        if header.count(column) != 1:
            raise Problem(f"{path}: {header.count(column) or 'no'} columns {column!r}; its columns are {', '.join(header)}")
    for where, cells in rows:
        if len(cells) != len(header):
            raise Problem(f"{where}: {len(cells)} fields, the first row has {len(header)}; put a name with commas in quotes")
    if not rows:
        raise Problem(f"{path}: it lists no image")
    table = pd.DataFrame([cells for _, cells in rows], columns=header)
    return table[columns].assign(where=[where for where, _ in rows])


def inside(root: Path, name: str, where: str) -> Path:
    """The file of this name below a folder. Raises Problem when it is missing, or outside, links followed."""
    try:
        path = (root / name).resolve()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, a zero byte, links in a circle
        raise Problem(f"{where}: {name!r} is no file's path ({one_line(error)})") from error
    if not path.is_relative_to(root.resolve()):
        raise Problem(f"{where}: {name!r} is outside {root}; copy it there")
    if not is_file:
        raise Problem(f"{where}: {name!r} is missing in {root}")
    return path


def read(found: pd.DataFrame, size: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Read the images, and drop copies: [images] rows with image_id, age, person_id, source; uint8 [images, size, size, 3].

    found: one row per image with file, where, source, age and perhaps subject. Images are copies when they are equal as they
    are read. Of copies with equal ages one is kept, of others none. Subjects that share an image count as one. Without
    subjects person_id is the number of the row. Prints what was dropped and joined.
    """
    pictures = np.empty((len(found), size, size, 3), np.uint8)
    with progress("reading", len(found), "image") as bar:
        for row, (path, where) in enumerate(zip(found.file, found["where"] + ": " + found.source.map(repr), strict=True)):
            pictures[row] = picture(path, where, size)
            bar.update()
    content = pd.Series([hashlib.sha256(picture.tobytes()).digest() for picture in pictures])
    conflicting = found.age.groupby(content).transform("nunique") > 1
    left_out(f"copies differ in label (distinct: {content[conflicting].nunique():,})", found.source[conflicting])
    copied = content.duplicated() & ~conflicting
    left_out("are copies of others with the same label", found.source[copied])
    if "subject" in found:
        person = joined(pd.factorize(found.subject)[0], pd.factorize(content)[0])
        subjects, people = found.subject.nunique(), len(np.unique(person))
        if people < subjects:
            print(f"joined: {subjects:,} subjects are {people:,}, as some share an image")
        before = person
    else:
        person, before = np.arange(len(found)), found.age  # one folder of images/ per label, not per image
    image_ids = [f"{first}-{row}" for row, first in enumerate(before)]
    table = found[["age", "source"]].assign(image_id=image_ids, person_id=person)
    kept = np.flatnonzero(~(conflicting | copied))
    if not len(kept):
        raise Problem("no image is left")
    return table.iloc[kept].reset_index(drop=True), pictures[kept]


def picture(path: Path, where: str, size: int) -> np.ndarray:
    """The middle square of an image's first frame, upright, on white, at a size: uint8 [size, size, 3].

    16 bits per channel are scaled to 8. Raises Problem, beginning with `where`, for what is not a readable image.
    """
    try:
        # Pillow warns of images that it reads all the same.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > LARGEST:
                raise ValueError(f"{image.width}x{image.height} pixels, at most {LARGEST:,} in all are read")
            image.draft("RGB", (4 * size, 4 * size))  # a large JPEG is decoded at a fraction of its size, which is quicker
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                image = _eight_bits(image)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.array(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR))
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise Problem(f"{where} is not a readable image ({one_line(error)})") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow's own conversion would clip at 255."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixel mode {image.mode}: neither 8 nor 16 bits per channel")
    return Image.fromarray((values // 256).astype(np.uint8))


def joined(subjects: np.ndarray, images: np.ndarray) -> np.ndarray:
    """subjects, images: numbers from 0, [rows]. The number of each row's group of subjects that share images, [rows]."""
    first, nodes = subjects.max() + 1, subjects.max() + images.max() + 2
    graph = coo_array((np.ones(len(subjects)), (subjects, first + images)), shape=(nodes, nodes))
    return pd.factorize(connected_components(graph, directed=False)[1][subjects])[0]


def divide(
    table: pd.DataFrame, pictures: np.ndarray, classes: int, plan: Plan, note: str = "", labels: Sequence[str] = ()
) -> DataSet:
    """Draw the sets. table: as `read` gives it, with age_group. Raises Problem where there are too few images for them."""
    train, validation, test = hold_out(len(table), plan.validation, plan.test, plan.seed)
    if not (len(validation) and len(test)):
        raise Problem(f"{len(table)} images are too few for validation and test sets of these shares")
    whole = table.person_id.duplicated().any()
    if plan.by == SUBJECT and not whole:
        raise Problem("options: --by subject needs subjects with several images each")
    if plan.by == EXAMPLE or not whole:
        note = note or "the forget sets are drawn by image, not by subject"
    forget = _forget(table.assign(person_id=range(len(table))) if plan.by == EXAMPLE else table, train, plan)
    sizes = [len(rows) for rows in forget.values()]
    if min(sizes) < 2:
        raise Problem(
            "a forget set would have less than two images, and batch norm cannot train on one: raise --forget-share"
        )
    if 2 * max(sizes) > len(train):
        raise Problem(f"a forget set would be {max(sizes)} of {len(train)} training images, over half: lower --forget-share")
    return DataSet(table, pictures, classes, train, validation, test, forget, note=note, labels=labels)


def _forget(table: pd.DataFrame, train: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    """split -> row numbers. Stratified: class by class, a subject being of the class that most of its images are of."""
    if not plan.stratified:
        return forget_subjects(table, train, plan.forget_sets, plan.forget_share, plan.forget_classes, plan.seed)
    rows = table.iloc[train]
    classes = rows.groupby("person_id").age_group.agg(lambda labels: labels.mode()[0])[rows.person_id].to_numpy()
    counts = pd.Series(classes).value_counts().sort_index().loc[: (plan.forget_classes or np.inf) - 1]
    share = plan.forget_share * len(train) / counts.sum()
    none = dict.fromkeys(split_names(plan.forget_sets), train[:0])
    parts = [
        forget_subjects(table, train[classes == label], plan.forget_sets, share, plan.forget_classes, plan.seed)
        for label, count in counts.items()
        if share * count >= 0.5  # of a smaller class a set holds nothing
    ]
    return {split: np.concatenate([part[split] for part in [none, *parts]]) for split in none}
