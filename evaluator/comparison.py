"""Two methods compared example by example, on the same forget set."""

from typing import NamedTuple

import pandas as pd
import torch

from evaluator.metric import earned


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
