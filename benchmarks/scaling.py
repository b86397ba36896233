"""How cost grows with N, images, forget examples and network size, and whether memory grows with N.

    python -m benchmarks.scaling                        everything, on the digits
    python -m benchmarks.scaling --only images memory   some rows

images, width     CPU seconds of one epoch of an ensemble on one thread
runs, examples    CPU seconds of the metric on one thread, for 100 forget examples, and for N = 256
memory            GB that an evaluation of finetune uses at most, all processes together, by N (300 digits, one epoch)
file              milliseconds to write a run, and its kB, by forget examples

The exponent says how a row grows: 1 means that twice the size takes twice as much, 0 that it takes no more.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.evaluation import timed
from evaluator import command
from evaluator.data import TENSORS, Examples, load
from evaluator.evaluation import HERE, data_folder
from evaluator.files import Problem
from evaluator.metric import epsilons
from evaluator.pool import RETAIN_CONFIDENCES, Pool
from evaluator.scoring import processor
from evaluator.training import Recipe, one_thread, retrain

sys.path.insert(0, str(HERE / "data"))
from digits import RECIPE, digits
from layout import write

SIZES = {
    "images": [600, 1200, 2400, 4800],
    "width": [4, 8, 16, 32],
    "runs": [64, 256, 512, 2048],
    "examples": [50, 100, 200, 400],
    "memory": [64, 512, 2048],
    "file": [100, 1000, 10_000],
}


def cpu_seconds(work: Callable[[], object]) -> float:
    """The median of three times, after a warm-up."""
    taken = []
    for _ in range(4):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return float(np.median(taken[1:]))


def grown(examples: Examples, count: int) -> Examples:
    """So many images, from the first, over and over."""
    rows = torch.arange(count) % len(examples)
    return Examples([f"0-{row}" for row in range(count)], *(getattr(examples, name)[rows] for name in TENSORS))


def epoch(count: int, width: int = RECIPE["width"]) -> float:
    data = load(data_folder("digits"))
    data = dataclasses.replace(data, retain=grown(data.retain, count))
    recipe = dataclasses.replace(Recipe.of(data), width=width, epochs=1)
    return cpu_seconds(lambda: retrain(data, recipe, range(recipe.networks_at_once)))


def metric(runs: int, examples: int) -> float:
    source = torch.Generator().manual_seed(0)
    sides = torch.randn(2, runs, examples, generator=source, dtype=torch.float64) * 2 + 4
    return cpu_seconds(lambda: epsilons(*sides))


def memory(runs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "small_digits"
        write(data, digits(300, 42, {"public": 0}, RECIPE | {"epochs": 1}))
        common = ["--data", str(data), "--results", f"{folder}/results", "--runs", str(runs)]
        return timed("evaluate.py", "methods/finetune.py", *common).memory / 2**30


def saved(examples: int) -> tuple[float, float]:
    """Milliseconds to write a run, and its kB."""
    values = {
        "forget_logits": np.zeros((examples, 10), np.float32),
        "retain_confidences": np.zeros(RETAIN_CONFIDENCES, np.float32),
    }
    with tempfile.TemporaryDirectory() as folder:
        pool, start = Pool(Path(folder), {}), time.perf_counter()
        for run in range(50):
            pool.save(run, values)
        return (time.perf_counter() - start) / 50 * 1000, pool.path(0).stat().st_size / 1000


MEASURES = {
    "images": (epoch, "s"),
    "width": (lambda width: epoch(600, width), "s"),
    "runs": (lambda runs: metric(runs, 100), "s"),
    "examples": (lambda examples: metric(256, examples), "s"),
    "memory": (memory, "GB"),
    "file": (saved, "ms, kB"),
}


def row(what: str, sizes: Sequence[int]) -> dict[str, str]:
    measure, unit = MEASURES[what]
    with one_thread():
        found = np.array([measure(size) for size in sizes], ndmin=2).reshape(len(sizes), -1)
    exponents = np.polyfit(np.log(sizes), np.log(found), 1)[0]
    took = "; ".join(", ".join(f"{value:#.3g}" for value in column) for column in found.T)
    by = {"what": what, "sizes": ", ".join(f"{size:,}" for size in sizes), "took": f"{took} {unit}"}
    return by | {"exponent": ", ".join(f"{exponent:.2f}" for exponent in exponents)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES), help="rows (default: all)")
    parser.add_argument("--smallest", type=int, metavar="COUNT", help="only so many of the sizes of each row")
    args = parser.parse_args(arguments)

    def show() -> None:
        if args.smallest is not None and args.smallest < 2:
            raise Problem(f"--smallest {args.smallest}: an exponent needs at least 2 sizes")
        print(f"{processor()}, torch {torch.__version__}", flush=True)
        rows = [row(what, SIZES[what][: args.smallest]) for what in args.only]
        print(pd.DataFrame(rows).to_string(index=False))

    return command.run(show, resumes=False)


if __name__ == "__main__":
    sys.exit(main())
