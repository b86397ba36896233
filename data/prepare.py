"""Makes data/<name>/ in the competition's layout: `python data/prepare.py digits`; data/README.md describes the folder."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import casia_surf
import cifar10
import faces
import fashion
import own
import people
from digits import digits
from filelock import FileLock
from layout import DataSet, write

from evaluator import command, data

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Source:
    """make: gives the DataSet; called with the values of the options that `options` adds to a parser."""

    make: Callable[..., DataSet]
    help: str
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None


SOURCES = {
    "digits": Source(digits, "scikit-learn's 1,797 handwritten digits, 8 x 8; nothing is downloaded"),
    "fashion": Source(fashion.fashion, "Fashion-MNIST, unbalanced: 15,557 photographs of clothes, 28 x 28", fashion.options),
    "fashion-small": Source(fashion.fashion_small, "3,000 of them, 14 x 14, for two CPU cores", fashion.options),
    "faces": Source(faces.faces, "synthetic faces, drawn by code, 32 x 32: a stand-in for the competition's", faces.options),
    "cifar10": Source(cifar10.cifar10, "CIFAR-10: 60,000 photographs, 32 x 32, 10% forgotten", cifar10.options),
    "folder": Source(own.folder, "your own images: a CSV file, or one folder per class", own.folder_options),
    "utkface": Source(people.utkface, "UTKFace, that you have or from Kaggle: age groups", people.utkface_options),
    "agedb": Source(people.agedb, "AgeDB, that you have or from Kaggle: age groups, subjects", people.options),
    "mufac": Source(people.mufac, "MUFAC, that you have or from Kaggle: age classes, subjects", people.options),
    "lfw": Source(people.lfw, "LFW, that you have or from Kaggle: the people with most photographs", people.lfw_options),
    "casia-surf": Source(casia_surf.casia_surf, "the competition's faces, for holders of the licence", casia_surf.options),
}


def prepare(folder: Path, source: Source, **options: object) -> None:
    """Make a data folder, and read it back as the evaluator will."""
    data.check({"name": folder.name}, data.DATASET, folder)  # before thousands of images are read
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        write(folder, source.make(**options))
    for split in data.splits(folder, "*"):
        read = data.load(folder, split)
        sizes = ", ".join(f"{len(getattr(read, part)):,} {part}" for part in ("retain", "forget", "validation", "test"))
        print(f"{read.title}, {split}: {sizes}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, source in SOURCES.items():
        one = names.add_parser(name, help=source.help.replace("%", "%%"), description=source.help)
        one.add_argument("--folder", type=Path, default=HERE / name, help=f"where to (default: data/{name})")
        source.options(one)
    options = vars(parser.parse_args(arguments))
    name, folder = options.pop("name"), options.pop("folder")
    return command.run(lambda: prepare(folder, SOURCES[name], **options))


if __name__ == "__main__":
    sys.exit(main())
