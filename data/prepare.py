"""Makes data/<name>/ in the competition's layout. `python data/prepare.py digits`; data/README.md describes the folder.

digits: scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels), part of the package: nothing is downloaded.
Thirteen people wrote them, and the file lists one writer after the other. Where one ends is not published, so a thirteenth
of the rows stands for a writer (`person_id`): the forget set is one writer's part of the training images, and as in the
competition nobody is in both retain and forget.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluator.files import Problem, write_atomically, write_json

WRITERS = 13
SEED = 43  # of the shuffle before the 80/10/10 split, as in the competition
# Which writer each split forgets. Networks that never saw those of public and private get 94% of their digits right; over
# the thirteen it is 90 to 99%. The other ten take turns, and writer 11 is in every retain set.
FORGET_WRITER = {"public": 3, "private": 12} | {
    f"{kind}-{number}": writer
    for number, pair in enumerate(((0, 1), (2, 4), (5, 6), (7, 8), (9, 10)), 2)
    for kind, writer in zip(("public", "private"), pair, strict=True)
}
RECIPE = {
    "width": 4,
    "small_images": True,
    "epochs": 12,
    "batch_size": 32,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "schedule": "one_cycle",
    "class_weighted": False,
    "networks_at_once": 16,
}


def prepare_digits(folder: Path, writers: dict[str, int] = FORGET_WRITER, recipe: dict = RECIPE, keep: int = 1797) -> None:
    """Write the digits data set to `folder`; the same bytes every time. keep: only the first rows (for tests)."""
    digits = load_digits()
    rows = len(digits.target[:keep])
    person = np.arange(len(digits.target)) * WRITERS // len(digits.target)
    table = pd.DataFrame(
        {
            "image_id": [f"{person[row]}-{row}" for row in range(rows)],
            "age_group": digits.target[:rows],
            "age": digits.target[:rows],
            "person_id": person[:rows],
        }
    )
    for image_id, image in zip(table.image_id, digits.images, strict=False):
        picture = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).convert("RGB")
        write_atomically(
            folder / "images" / f"{image_id.replace('-', '/')}.png", functools.partial(picture.save, format="PNG")
        )

    order = np.random.RandomState(SEED).permutation(rows)
    tenth = rows // 10
    validation, test, train = order[:tenth], order[tenth : 2 * tenth], order[2 * tenth :]
    _write_csv(folder / "validation.csv", table.iloc[validation])
    _write_csv(folder / "test.csv", table.iloc[test])
    train = table.iloc[train]
    for split, writer in writers.items():
        _write_csv(folder / split / "retain.csv", train[train.person_id != writer])
        _write_csv(folder / split / "forget.csv", train[train.person_id == writer])
    counts = {str(group): int(count) for group, count in train.age_group.value_counts().sort_index().items()}
    write_json(folder / "age_class_weights.json", counts)
    # Last, so that a folder with it is complete.
    write_json(folder / "dataset.json", {"name": folder.name, "image_size": 8, "classes": 10, "recipe": recipe})


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    write_atomically(path, lambda file: file.write(table.sort_values("image_id").to_csv(index=False).encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["digits"], help="the data set to make")
    parser.add_argument("--folder", type=Path, help="where to (default: data/<name>)")
    args = parser.parse_args()
    try:
        prepare_digits(args.folder or Path(__file__).resolve().parent / args.name)
    except Problem as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
