"""Methods compared on one or several forget sets: means with their errors, and which method beats which."""

import math

import pandas as pd

from evaluator import intervals
from evaluator.files import Problem
from evaluator.intervals import Interval, mean_over
from evaluator.report import cost_text

OF_A_SET = ("method", "split", "runs", "forget_examples", "score", "forgetting_quality")
ACCURACIES = ("ra_unlearned", "ra_retrained", "ta_unlearned", "ta_retrained")
COSTS = ("seconds_per_run", "fraction_of_retraining")  # the ceiling has none


def per_set(summaries: list[dict], ceiling: dict) -> pd.DataFrame:
    """One row per method and one for the ceiling, on one forget set; attacks that were run are further columns."""
    place = {name: summaries[0][name] for name in ("split", "runs", "forget_examples")}
    rows = [
        {name: row.get(name) for name in (*OF_A_SET, *ACCURACIES, *COSTS)}
        | dict(zip(("low", "high"), row.get("score_interval", (math.nan, math.nan)), strict=True))
        | row.get("attacks", {})
        for row in [*summaries, place | ceiling]
    ]
    return pd.DataFrame(rows).assign(of_ceiling=lambda table: table.score / (ceiling["score"] or float("nan")))


def over_sets(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method, in the given order: means over the forget sets, and the score's standard error and 95% interval.

    table: what `per_set` returns, of all sets. The share of the ceiling is that of the mean scores. Of one set alone
    there is no standard error, and the interval covers other runs.
    Raises Problem when the numbers of runs differ, or a method was not scored on every set.
    """
    runs = table.drop_duplicates("runs")
    if len(runs) > 1:
        which = ", ".join(f"{row.method} on {row.split} has {row.runs}" for row in runs.itertuples())
        raise Problem(f"scores of different numbers of runs cannot be compared or averaged: {which}")
    scores = table.pivot(index="method", columns="split", values="score")
    for method, row in scores.iterrows():
        if row.isna().any():
            raise Problem(
                f"{method}: has no score on {row.index[row.isna()][0]}, and a mean over fewer sets is no comparison"
            )
    grouped = table.drop(columns="split").groupby("method", sort=False)
    means = grouped.mean().drop(columns=["low", "high"])
    ceiling = means.score[means.index.str.startswith("(ceiling")].max()
    errors = pd.DataFrame(
        {
            name: (error, interval.low, interval.high)
            for name, (_, error, interval) in grouped.score.agg(list).map(mean_over).items()
        },
        index=["standard_error", "low", "high"],
    ).T.fillna(grouped[["low", "high"]].first())
    return means.assign(of_ceiling=means.score / ceiling).join(errors).reset_index()


def title(data: str, table: pd.DataFrame) -> str:
    """What the scores of `per_set` are on, in words."""
    sizes = table.groupby("split", sort=False).forget_examples.first()
    which = f"{data}: {len(sizes)} forget set{'s' if len(sizes) > 1 else ''} ({', '.join(sizes.index)})"
    count = f"{sizes.min()}" + (f" to {sizes.max()}" if sizes.max() > sizes.min() else "")
    return f"{which} of {count} examples, {table.runs.iloc[0]} runs"


def noted(table: pd.DataFrame, note: str) -> pd.DataFrame:
    """A table to be written to a file, with what must be said of the data."""
    return table.assign(note=note) if note else table


def as_text(means: pd.DataFrame) -> pd.DataFrame:
    """`over_sets` for people to read. Of one forget set, no error can be said."""
    error = means.standard_error.map(" ± {:.4f}".format).where(means.standard_error.notna(), "")
    interval = means.low.map("{:.4f}".format) + means.high.map(" to {:.4f}".format)
    return pd.DataFrame(
        {
            "method": means.method.str.ljust(means.method.str.len().max()),
            "score": means.score.map("{:.4f}".format) + error,
            "95% interval": interval.where(means.low.notna(), ""),
            "of ceiling": means.of_ceiling.map("{:.0%}".format),
            "F": means.forgetting_quality.map("{:.4f}".format),
            "RA_U/RA_R": (means.ra_unlearned / means.ra_retrained).map("{:.4f}".format),
            "TA_U/TA_R": (means.ta_unlearned / means.ta_retrained).map("{:.4f}".format),
            "share of retraining cost": means.fraction_of_retraining.map(cost_text, na_action="ignore").fillna(""),
        }
    )


def compared(first: list[dict], second: list[dict]) -> Interval:
    """The score of one method minus that of another, with its 95% interval. first, second: their summaries on the same
    forget sets, in the same order. On one set the interval covers other runs, on several also other forget sets."""
    ours, theirs = ([summary["score"] for summary in side] for side in (first, second))
    if len(ours) > 1:
        return intervals.difference_over(ours, theirs)
    unknown = {"score": [math.nan, math.nan]}  # too few runs for half-samples
    our_draws, their_draws = (side[0].get("half_samples", unknown)["score"] for side in (first, second))
    return intervals.difference(ours[0], our_draws, theirs[0], their_draws)


def groups(methods: list[list[dict]]) -> list[int]:
    """The group of each method, sorted by score: a new one begins with the first method that the first of its group beats.
    methods: each one's summaries on the same forget sets."""
    return intervals.groups(methods, compared)


def verdicts(methods: list[list[dict]]) -> list[str]:
    """Sentences that say whether the method with the highest mean score beats each of the others."""

    def mean(summaries: list[dict]) -> float:
        return sum(summary["score"] for summary in summaries) / len(summaries)

    best, *others = sorted(methods, key=mean, reverse=True)
    sets, runs = len(best), best[0]["runs"]
    return [intervals.verdict(best[0]["method"], other[0]["method"], compared(best, other), sets, runs) for other in others]
