"""How to spend the runs of a search's setting: many on one forget set, or a few on each of several?

    python -m benchmarks.tuning_budget          64 and 128 runs; reads the runs kept in results/, makes none

The methods, with their tuned values, stand for the settings of a search. Each way to spend the runs ranks them by their
mean score on some public forget sets, chosen at random, with groups of runs chosen at random. The truth is their mean over
the private forget sets, at the largest N kept. Printed for each way: Spearman's rank correlation with the truth, and the
loss, by how much the best method is truly better than the chosen one; both as mean ± standard deviation over the draws.

Methods differ more than the settings of one method do: in a search, every way ranks worse than here.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from evaluator import command
from evaluator.data import splits
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem
from evaluator.method import Method
from evaluator.processes import in_processes
from evaluator.tuning import RUNS, tuned_values

FORGET_SETS = (1, 2, 3, 4, 6)
DRAWS = 500


def ways(runs: int, forget_sets: int) -> list[tuple[int, int]]:
    """(N, number of forget sets) that take about `runs` runs, or twice as many, where N is at least 3: at 2, F is 0."""
    numbers = [number for number in FORGET_SETS if number <= forget_sets]
    found = [(round(total / number), number) for total in (runs, 2 * runs) for number in numbers]
    return [(size, number) for size, number in found if size > 2]


def kept_runs(evaluation: Evaluation, methods: Sequence[Method], needed: int) -> int:
    """How many runs of every method and of the retrained networks are kept. Raises Problem when fewer than needed are."""
    command_for_them = (
        f"python evaluate.py {' '.join(str(method.path) for method in methods)} --tuned --data {evaluation.folder} "
        f"--split {evaluation.split} --runs {needed} --results {evaluation.setting.results}"
    )
    if not (evaluation.folder / "original_model.pth").exists():
        raise Problem(f"{evaluation.folder}: no original_model.pth, so no run is kept; make them with: {command_for_them}")
    asked = dataclasses.replace(evaluation, runs=0)  # makes none
    pools = {"retrained": asked.retrained()} | {method.name: asked.unlearned(method) for method in methods}
    kept = {name: next(run for run in itertools.count() if pool.missing([run])) for name, pool in pools.items()}
    fewest = min(kept, key=kept.get)
    if kept[fewest] < needed:
        raise Problem(
            f"{pools[fewest].folder}: {kept[fewest]} of {needed} runs are kept; make them with: {command_for_them}"
        )
    return kept[fewest]


def group_scores(methods: Sequence[Method], sizes: Sequence[int], evaluation: Evaluation) -> pd.DataFrame:
    """The score of each disjoint group of N runs, for each N in `sizes` and each method: a row each."""
    rows = [
        {"method": method.name, "split": evaluation.split, "N": size, "group": group, "score": score}
        for method in methods
        for size in sizes
        for group, score in enumerate(evaluation.group_scores(method, size))
    ]
    return pd.DataFrame(rows, columns=["method", "split", "N", "group", "score"])


def all_scores(evaluations: list[Evaluation], methods: Sequence[Method], sizes: Sequence[int]) -> pd.Series:
    """`group_scores` of several forget sets, worked on side by side, indexed by method, split, N and group."""
    job = functools.partial(group_scores, methods, sizes)
    tables = in_processes(job, evaluations, evaluations[0].setting.jobs, lambda evaluation: f"split {evaluation.split}")
    return pd.concat(tables).set_index(["N", "split", "group", "method"]).score.unstack("method").sort_index()


def trial(scores: pd.DataFrame, truth: pd.Series, forget_sets: int, draw: np.random.Generator) -> tuple[float, float]:
    """One draw's rank correlation with the truth, and its loss: best truth - truth of the chosen (the mean of equal ones).

    scores: those at one N, [split and group, methods]; truth: [methods].
    """
    chosen = draw.choice(scores.index.unique("split"), forget_sets, replace=False)
    means = np.mean([draw.choice(scores.loc[split].to_numpy()) for split in chosen], axis=0)
    correlation = spearmanr(means, truth).statistic if np.ptp(means) else 0.0
    return correlation, truth.max() - truth[means == means.max()].mean()


def compare(scores: pd.DataFrame, truth: pd.Series, asked: Sequence[tuple[int, int]], seed: int = 0) -> pd.DataFrame:
    """A row for each (N, number of forget sets). `possible` counts the different draws: with few, ± says little.

    scores: indexed by N, split and group, with a column for each method; truth: [methods].
    """
    rows = []
    for size, forget_sets in asked:
        of_size, draw = scores.loc[size], np.random.default_rng(seed)
        found = np.array([trial(of_size, truth[scores.columns], forget_sets, draw) for _ in range(DRAWS)])
        (correlation, loss), (correlation_sd, loss_sd) = found.mean(0), found.std(0)
        groups = of_size.groupby("split").size().min()
        rows.append(
            {
                "runs": size * forget_sets,
                "N": size,
                "forget sets": forget_sets,
                "rank correlation": correlation,
                "± correlation": correlation_sd,
                "loss": loss,
                "± loss": loss_sd,
                "possible": math.comb(len(of_size.index.unique("split")), forget_sets) * groups**forget_sets,
            }
        )
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser(__doc__, runs=RUNS * 4)
    default = [HERE / "unlearning.py", *sorted((HERE / "methods").glob("*.py"))]
    parser.add_argument("methods", nargs="*", default=default, metavar="METHOD", help="method files (default: every one)")
    parser.add_argument("--tune-on", default="public*", help="forget sets to choose on (default: %(default)s)")
    parser.add_argument("--report-on", default="private*", help="forget sets that say the truth (default: %(default)s)")
    args = parser.parse_args(arguments)
    return command.run(lambda: show(args))


def show(args) -> None:
    one = command.evaluation(args)
    public, private = (
        [dataclasses.replace(one, split=split) for split in splits(one.folder, pattern)]
        for pattern in (args.tune_on, args.report_on)
    )
    name = public[0].data.name
    methods = [Method.read(path, values=tuned_values(path, name)) for path in args.methods]
    if len(methods) < 3:
        raise Problem("a ranking needs at least 3 methods")
    kept, true_runs = (min(kept_runs(evaluation, methods, args.runs) for evaluation in each) for each in (public, private))
    asked = ways(args.runs, len(public))
    possible = [(size, number) for size, number in asked if size <= kept]
    sizes = sorted({size for size, _ in possible})
    scores = all_scores([dataclasses.replace(evaluation, runs=kept) for evaluation in public], methods, sizes)
    longest = [dataclasses.replace(evaluation, runs=true_runs) for evaluation in private]
    truth = all_scores(longest, methods, [true_runs]).mean()
    table = compare(scores, truth, possible)
    print(f"{name}: {len(methods)} methods, {len(public)} forget sets to choose on with {kept} runs each;")
    print(f"truth: mean over {len(private)} others at N = {true_runs}, {truth.min():.4f} to {truth.max():.4f}\n")
    print(table.round(4).to_string(index=False))
    for size, number in sorted(set(asked) - set(possible)):
        print(f"left out: {size} x {number}, which needs {size} kept runs")


if __name__ == "__main__":
    sys.exit(main())
