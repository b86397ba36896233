"""What a GPU makes of the kit: the retrained networks and the runs of a method, each beside what it takes without the kit.

    python -m benchmarks.gpu                    some minutes

The competition's network and recipe (ResNet-18, 32x32, batches of 64, Adam) on random images, and the digits' recipe.
Retraining is timed with each engine over some steps after the first, and said for 512 networks at the whole number of steps.
Single runs are those of a file that does not take K networks at once, from a new process to its answers.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import yardsticks
from benchmarks.bench import Row
from evaluator.data import Data, Examples
from evaluator.engines import ENGINES, seconds_per_step
from evaluator.evaluation import HERE, SINGLE_JOBS, working_device
from evaluator.files import Problem
from evaluator.method import Method
from evaluator.runs import Setting, unlearned_pool
from evaluator.training import Recipe

sys.path.insert(0, str(HERE / "data"))
from digits import RECIPE

NETWORKS = 512
IMAGES = 6_400  # made here; steps are timed, so there need not be all
SIZES = {
    "competition": (Recipe(), 32, 45_000),
    "digits": (Recipe(**RECIPE), 8, 1_257),
}  # recipe, side of the images, retain images


def noise(count: int, side: int, seed: int) -> Examples:
    source = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, side, side), generator=source, dtype=torch.uint8)
    labels = torch.randint(10, (count,), generator=source)
    return Examples([str(number) for number in range(count)], images, labels, labels, labels)


def noise_data(side: int) -> Data:
    sets = [noise(count, side, seed) for seed, count in enumerate((IMAGES, 128, 128, 128))]
    return Data(HERE, "noise", "public", 10, {}, torch.ones(10), *sets)


def retraining(name: str) -> Iterator[Row]:
    recipe, side, images = SIZES[name]
    data = noise_data(side).to("cuda")
    steps = recipe.epochs * -(-images // recipe.batch_size)
    few = dataclasses.replace(data, retain=noise(640, side, 9))
    yardsticks.starting_kits_loop(few, recipe, "cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    yardsticks.starting_kits_loop(few, recipe, "cuda")
    torch.cuda.synchronize()
    loop = (time.perf_counter() - start) / (yardsticks.EPOCHS * -(-len(few.retain) // recipe.batch_size))

    def row(what: str, taken: float) -> Row:
        hours = NETWORKS * steps * taken / 3600
        return Row(f"{name}: {what}", hours, "h", "the starting kit's loop", NETWORKS * steps * loop / 3600)

    for size in (1, recipe.networks_at_once, 64 if name == "competition" else 256):
        for engine in ENGINES:
            yield row(f"{size} at once, {engine}", seconds_per_step(data, recipe, size, engine, 3.0) / size)


def single_runs(folder: Path, runs: int = 16) -> Iterator[Row]:
    recipe, side, _ = SIZES["competition"]
    data, original = noise_data(side), recipe.network(10).eval()
    path = yardsticks.one_at_a_time(HERE / "methods" / "finetune.py", folder)
    method = Method.read(path, values={"epochs": 2.0})
    taken = {}
    for jobs in (1, SINGLE_JOBS):
        setting = Setting(Path(tempfile.mkdtemp(dir=folder)), jobs, "cuda")
        start = time.perf_counter()
        unlearned_pool(setting, data, recipe, original, method, runs)
        taken[jobs] = (time.perf_counter() - start) / runs
        yield Row(f"a run of 200 steps, one network at a time, {jobs} processes", taken[jobs], "s", "1 process", taken[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*SIZES, "runs"], default=[*SIZES, "runs"])
    args = parser.parse_args()
    try:
        working_device("cuda")
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for name in args.only:
                for row in single_runs(Path(folder)) if name == "runs" else retraining(name):
                    figure, peer = f"{row.figure:.3g} {row.unit}", f"{row.peer} {row.peer_figure:.3g} {row.unit}"
                    print(f"{row.what:62s} {figure:>10s}   {peer}: {row.ratio:.1f} x", flush=True)
    except Problem as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
