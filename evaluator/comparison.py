"""Methods compared: two of them example by example, and all of them by several judges."""

from typing import NamedTuple

import pandas as pd
import torch

from evaluator.metric import earned

HIGHER_IS_BETTER = ("score", "F")  # of the judges; for an attack's mean, lower is better


class Comparison(NamedTuple):
    """What an example's epsilon earns, averaged over the examples, is F."""

    better: int  # forget examples on which the second earns more than the first
    worse: int
    examples: pd.DataFrame  # all of them, those that differ most first

    def __str__(self) -> str:
        return f"{self.better} of {len(self.examples)} examples earn more, {self.worse} less"


def compare(first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str], runs: int) -> Comparison:
    """first, second: the tables of the forget examples of two methods, as `evaluator.scoring.score` makes them, in the same
    order of examples. names: how their columns are to be called. runs: N of both."""
    epsilons = {name: side.epsilon for name, side in zip(names, (first, second), strict=True)}
    earnings = {name: earned(torch.tensor(epsilon.to_numpy()), runs).numpy() for name, epsilon in epsilons.items()}
    table = first[["image_id", "age_group"]].assign(
        **{f"epsilon, {name}": epsilon for name, epsilon in epsilons.items()},
        **{f"earns, {name}": value for name, value in earnings.items()},
    )
    before, after = earnings.values()
    most = pd.DataFrame({"earned": abs(after - before), "epsilon": (second.epsilon - first.epsilon).abs()})
    order = most.sort_values(["earned", "epsilon"], ascending=False, kind="stable").index
    return Comparison(int((after > before).sum()), int((after < before).sum()), table.loc[order])


def rank_correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of every two judges; 1 where they put the methods in the same order.

    table: one row per method, one column per judge (score, F, the attacks' means). The signs are turned so that more is
    better for all. Equal values share their ranks; a method that one of the two does not judge (NaN) is left out. NaN where
    that leaves fewer than 2 methods, or all of them equal. Raises ValueError when a value is not a number.
    """
    return _merits(table).corr(method="spearman", min_periods=2)


def winners(table: pd.DataFrame) -> str:
    """Who wins by which judge, in one line; methods that are equal win together. table: as for `rank_correlations`."""
    judges = {}
    for judge, merits in _merits(table).items():
        best = merits.index[merits == merits.max()]
        if len(best):
            judges.setdefault(" and ".join(map(str, best)), []).append(str(judge))
    if not judges:
        return "by no judge: no method has a value"
    if list(judges.values()) == [list(map(str, table.columns))]:
        return f"by every judge: {next(iter(judges))}"
    return "; ".join(f"by {', '.join(names)}: {winner}" for winner, names in judges.items())


def _merits(table: pd.DataFrame) -> pd.DataFrame:
    return table.astype(float) * [1.0 if judge in HIGHER_IS_BETTER else -1.0 for judge in table.columns]
