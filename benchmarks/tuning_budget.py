"""How to spend the runs of a search's setting: many on one forget set, or a few on each of several?

    python -m benchmarks.tuning_budget          64 and 128 runs; reads the runs kept in results/, makes none

The methods, with their tuned values, stand for the settings of a search. Each way to spend the runs ranks them by their
mean score on some public forget sets, chosen at random, with groups of runs chosen at random. The truth is their mean over
the private forget sets, at the largest N kept. Printed for each way: Spearman's rank correlation with the truth, and the
loss, by how much the best method is truly better than the chosen one; both as mean ± standard deviation over the draws.

Methods differ more than the settings of one method do: in a search, every way ranks worse than here.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
from scipy.stats import rankdata

from evaluator import command
from evaluator.data import Data, splits
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem
from evaluator.method import Method
from evaluator.pool import Pool
from evaluator.progress import progress
from evaluator.scoring import score
from evaluator.training import one_thread
from evaluator.tuning import RUNS, tuned_values

FORGET_SETS = (1, 2, 3, 4, 6)
DRAWS = 10_000


def ways(runs: int, forget_sets: int) -> list[tuple[int, int]]:
    """(N, number of forget sets) that take about `runs` runs, or twice as many, where N is at least 3: at 2, F is 0."""
    numbers = [number for number in FORGET_SETS if number <= forget_sets]
    found = [(round(total / number), number) for total in (runs, 2 * runs) for number in numbers]
    return [(size, number) for size, number in found if size > 2]


class Kept(NamedTuple):
    """What is kept of some methods on one forget set."""

    data: Data
    retrained: Pool
    unlearned: dict[str, Pool]
    runs: int  # that every pool has


def kept(evaluation: Evaluation, methods: Sequence[Method], needed: int, made_by: str) -> Kept:
    """Raises Problem when a method or the retrained networks have fewer runs than needed. made_by: what would make them."""
    if not (evaluation.folder / "original_model.pth").exists():
        raise Problem(f"{evaluation.folder}: no original_model.pth, so no run is kept; make them with: {made_by}")
    asked = dataclasses.replace(evaluation, runs=0)  # makes none
    retrained, unlearned = asked.retrained(), {method.name: asked.unlearned(method) for method in methods}
    runs = {pool: next(run for run in itertools.count() if pool.missing([run])) for pool in (retrained, *unlearned.values())}
    fewest = min(runs, key=runs.get)
    if runs[fewest] < needed:
        raise Problem(f"{fewest.folder}: {runs[fewest]} of {needed} runs are kept; make them with: {made_by}")
    return Kept(evaluation.data, retrained, unlearned, runs[fewest])


def group_scores(places: Sequence[Kept], sizes: Sequence[int], jobs: int) -> pd.DataFrame:
    """The score of each disjoint group of N runs, against as many retrained networks with the same numbers, for each N in
    `sizes`: indexed by N, split and group, a column for each method. Groups are of the runs that all pools have."""
    runs = min(place.runs for place in places)
    tasks = [
        joblib.delayed(_score)(place.data, place.retrained, name, pool, range(start, start + size))
        for place in places
        for name, pool in place.unlearned.items()
        for size in sizes
        for start in range(0, runs - size + 1, size)
    ]
    with progress("scores", len(tasks), "group") as bar:
        rows = []
        for row in joblib.Parallel(jobs, return_as="generator")(tasks):
            rows.append(row)
            bar.update()
    table = pd.DataFrame(rows, columns=["N", "split", "group", "method", "score"])
    return table.set_index(["N", "split", "group", "method"]).score.unstack("method").sort_index()


def _score(data: Data, retrained: Pool, name: str, unlearned: Pool, runs: range) -> tuple[int, str, int, str, float]:
    with one_thread():
        found = score(unlearned.load(runs), retrained.load(runs), data)[0]["score"]
    return len(runs), data.split, runs.start // len(runs), name, found


def judged(scores: np.ndarray, truth: np.ndarray, forget_sets: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's rank correlation with the truth (0 if all scores are equal) and the loss, best truth - truth of the chosen,
    where equally good methods share the choice. Each is [DRAWS], for forget sets and groups of runs drawn at random.

    scores: those at one N, [forget sets, groups, methods]; truth: [methods].
    """
    draw, (sets, groups, _) = np.random.default_rng(seed), scores.shape
    chosen = draw.permuted(np.tile(np.arange(sets), (DRAWS, 1)), axis=1)[:, :forget_sets]
    means = scores[chosen, draw.integers(groups, size=chosen.shape)].mean(axis=1)  # [draws, methods]
    ranks, true_ranks = (rankdata(side, axis=-1) - (len(truth) + 1) / 2 for side in (means, truth))
    norms = np.linalg.norm(ranks, axis=1) * np.linalg.norm(true_ranks)
    best = means == means.max(axis=1, keepdims=True)
    return ranks @ true_ranks / np.where(norms > 0, norms, 1), truth.max() - best @ truth / best.sum(axis=1)


def compare(scores: pd.DataFrame, truth: pd.Series, asked: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """A row for each (N, number of forget sets). `possible` counts the different draws: with few, ± says little.

    scores: indexed by N, split and group, with a column for each method; truth: indexed by method.
    """
    rows = []
    for size, number in asked:
        of_size = scores.loc[size]
        sets = len(of_size.index.unique("split"))
        values = of_size.to_numpy().reshape(sets, -1, scores.shape[1])
        correlation, loss = judged(values, truth[scores.columns].to_numpy(), number)
        rows.append(
            {
                "runs": size * number,
                "N": size,
                "forget sets": number,
                "rank correlation": correlation.mean(),
                "± correlation": correlation.std(),
                "loss": loss.mean(),
                "± loss": loss.std(),
                "possible": math.comb(sets, number) * values.shape[1] ** number,
            }
        )
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser(__doc__, runs=RUNS * 4)
    parser.add_argument("methods", nargs="*", type=Path, metavar="METHOD", help="method files (default: all)")
    parser.add_argument("--tune-on", default="public*", help="forget sets to choose on (default: %(default)s)")
    parser.add_argument("--report-on", default="private*", help="forget sets that say the truth (default: %(default)s)")
    args = parser.parse_args(arguments)
    return command.run(lambda: show(args))


def show(args) -> None:
    paths = args.methods or [HERE / "unlearning.py", *sorted((HERE / "methods").glob("*.py"))]
    if len(paths) < 3:
        raise Problem("a ranking needs at least 3 methods")
    one = command.evaluation(args)
    name = dataclasses.replace(one, split=splits(one.folder, args.tune_on)[0]).data.name
    methods = [Method.read(path, values=tuned_values(path, name)) for path in paths]

    def all_kept(pattern: str) -> list[Kept]:
        made_by = (
            f"python evaluate.py {' '.join(map(str, args.methods)) or 'unlearning.py methods/*.py'} --tuned "
            f"--data {args.data} --results {args.results} --runs {args.runs} --split '{pattern}'"
        )
        each = [dataclasses.replace(one, split=split) for split in splits(one.folder, pattern)]
        return [kept(evaluation, methods, args.runs, made_by) for evaluation in each]

    choosing, telling = all_kept(args.tune_on), all_kept(args.report_on)
    runs, true_runs = (min(place.runs for place in places) for places in (choosing, telling))
    asked = ways(args.runs, len(choosing))
    possible = [(size, number) for size, number in asked if size <= runs]
    jobs = one.setting.jobs
    truth = group_scores(telling, [true_runs], jobs).mean()
    table = compare(group_scores(choosing, sorted({size for size, _ in possible}), jobs), truth, possible)
    print(f"{name}: {len(methods)} methods, {len(choosing)} forget sets to choose on with {runs} runs each;")
    print(f"truth: mean over {len(telling)} others at N = {true_runs}, {truth.min():.4f} to {truth.max():.4f}\n")
    print(table.round(4).to_string(index=False))
    for size, number in sorted(set(asked) - set(possible)):
        print(f"left out: {size} x {number}, which needs {size} kept runs")


if __name__ == "__main__":
    sys.exit(main())
