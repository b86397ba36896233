"""Draws docs/faces.png, synthetic people of four age groups: `python -m benchmarks.faces_picture`."""

import sys

import numpy as np
from matplotlib.figure import Figure

from evaluator.evaluation import HERE
from evaluator.files import write_atomically

sys.path.insert(0, str(HERE / "data"))
from faces import faces

GROUPS, PEOPLE, FRAMES = (0, 1, 4, 9), 2, 6


def main() -> None:
    made = faces(sets=0)
    figure = Figure(figsize=(9, 0.78 * len(GROUPS)), layout="compressed")
    for axes, group in zip(figure.subplots(len(GROUPS)), GROUPS, strict=True):
        people = made.table.person_id[made.table.age_group == group].unique()[:PEOPLE]
        rows = np.concatenate([np.flatnonzero(made.table.person_id == person)[:FRAMES] for person in people])
        axes.imshow(np.concatenate(made.pictures[rows], 1))
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(f"group {group}", rotation=0, ha="right", va="center")
    write_atomically(HERE / "docs" / "faces.png", lambda file: figure.savefig(file, format="png", dpi=110))


if __name__ == "__main__":
    main()
