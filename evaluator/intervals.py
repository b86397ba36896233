"""How far a score can be trusted: its interval, that of a difference, and the sentence that may be said of two methods.

At one forget set the runs are what varies: the metric is asked again about random halves of them (`half_samples`). Over
several forget sets the sets vary too, and their scores say by how much (`mean_over`, `difference_over`). Every interval is
a 95% one; benchmarks/coverage.py shows how often they hold, and docs/trust.md says what that means.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from scipy.special import stdtrit  # Student's t: its quantile by degrees of freedom; scipy.stats takes a second to import
from torch import Tensor

from evaluator.metric import (
    BUFFER,
    LARGEST_EPSILON,
    SMALLEST_RANGE_RATIO,
    competition_score,
    epsilon_table,
    forgetting_quality,
    single_threshold,
)

LEVEL = 0.95
HALVES = 16
WIDER = 1.2
FEWEST_TO_HALVE = 8  # runs: F of fewer than 4 has next to no bins
FEWEST_TO_PROJECT = 32
FEWEST_RUNS, FEWEST_SETS = 64, 4  # below them intervals are said to be unreliable
STEP = 0.08  # between the ends of a half-sample's intervals; the metric's own is 0.01
# Of a projection's logarithm, per doubling of the runs; set so that nearly all in docs/trust.md hold.
SLOPE_ERROR = 0.4  # how much the error of F grows, as the slope has an error too
BEND = 0.12  # how much the true curve bends away from a line
Row = TypeVar("Row")


class Interval(NamedTuple):
    """A value and its 95% interval; low and high are NaN where there is too little to say."""

    value: float
    low: float
    high: float


def half_samples(unlearned: dict[str, Tensor], retrained: dict[str, Tensor]) -> dict[str, list[float]]:
    """Forgetting quality and score of random halves of the runs, an independent half of each side.

    unlearned, retrained: "confidences" [runs, examples], "ra" and "ta" [runs]. Returns "forgetting_quality" and "score",
    HALVES values each; the n-th value of two methods comes from runs with the same numbers, so that they are paired. They
    are NaN with fewer than FEWEST_TO_HALVE runs. Halves are drawn without replacement, as a run that is drawn twice looks
    like a difference to the metric; a run is drawn for all examples at once, which makes their correlation count.
    """
    return _samples(unlearned, retrained, len(unlearned["confidences"]) // 2)


def interval(value: float, draws: Sequence[float]) -> Interval:
    """Of F or a score at one forget set, from its half-samples. It never reaches below 0."""
    low, high = _around(value, draws)
    return Interval(value, float(np.maximum(low, 0)), high)


def difference(a: float, draws_a: Sequence[float], b: float, draws_b: Sequence[float]) -> Interval:
    """Of a - b, two methods' F or scores at one forget set and the same N. A beats B when low > 0."""
    return Interval(a - b, *_around(a - b, np.subtract(draws_a, draws_b)))


def projected(score: float, unlearned: dict[str, Tensor], retrained: dict[str, Tensor], runs: int = 512) -> Interval:
    """The score that this forget set would give with more runs, roughly: of N unlearned and N retrained runs, as for
    `half_samples`; score: what the metric says of them.

    F falls with N nearly as a power of it: the line through log F of random quarters and of all runs is continued. NaN with
    fewer than FEWEST_TO_PROJECT runs. The interval is wide on purpose: see docs/trust.md for how it was set.
    """
    kept = len(unlearned["confidences"])
    if kept < FEWEST_TO_PROJECT:
        return Interval(math.nan, math.nan, math.nan)
    whole = forgetting_quality(quick_epsilons(unlearned["confidences"], retrained["confidences"]), kept)
    quarter = float(np.mean(_samples(unlearned, retrained, kept // 4)["forgetting_quality"]))
    if not (score > 0 and whole > 0 and quarter > 0):
        return Interval(0.0, 0.0, interval(score, half_samples(unlearned, retrained)["score"]).high)
    doublings = math.log2(runs / kept)
    slope = min(0.0, math.log(whole / quarter) / 2)  # per doubling; F does not grow with N
    value = score * math.exp(slope * doublings)
    halves = half_samples(unlearned, retrained)["forgetting_quality"]
    error = float(np.std(halves, ddof=1) / np.mean(halves)) * (1 + SLOPE_ERROR * doublings)
    reach = math.exp(math.hypot(error, BEND * doublings) * stdtrit(HALVES - 1, (1 + LEVEL) / 2))
    return Interval(value, value / reach, value * reach)


def mean_over(values: Sequence[float]) -> tuple[float, float, Interval]:
    """The mean over S forget sets, its standard error and interval (Student's t, S - 1 degrees of freedom).

    With one forget set the standard error and the ends are NaN. Raises ValueError when there is none.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("no score to average: at least one forget set is needed")
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, Interval(mean, math.nan, math.nan)
    error = float(values.std(ddof=1) / math.sqrt(len(values)))
    reach = error * float(stdtrit(len(values) - 1, (1 + LEVEL) / 2))
    return mean, error, Interval(mean, mean - reach, mean + reach)


def difference_over(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Of the mean of a - b, the scores of two methods on the same S forget sets, in the same order."""
    return mean_over(np.subtract(a, b))[2]


def verdict(name_a: str, name_b: str, difference: Interval, forget_sets: int, runs: int) -> str:
    """What may be said of two methods, in a sentence. difference: of a - b."""
    value, low, high = difference
    where = "on this forget set" if forget_sets == 1 else f"{forget_sets} forget sets"
    if math.isnan(low):
        return f"{name_a} and {name_b} cannot be compared: difference {value:.4f}, but too few runs or forget sets for more."
    if high < 0:
        name_a, name_b, value, low, high = name_b, name_a, -value, -high, -low
    known = f"(95% interval {low:.4f} to {high:.4f}, {where})"
    if low > 0:
        said = f"{name_a} beats {name_b} by {value:.4f} {known}."
    else:
        said = f"{name_a} and {name_b} cannot be told apart: difference {value:.4f} {known}."
    few = [f"{runs} runs, at least {FEWEST_RUNS}"] * (runs < FEWEST_RUNS)
    few += [f"{forget_sets} forget sets, at least {FEWEST_SETS}"] * (1 < forget_sets < FEWEST_SETS)
    return said + "".join(f" Do not rely on it: {reason} are needed." for reason in few)


def groups(rows: Sequence[Row], difference: Callable[[Row, Row], Interval]) -> list[int]:
    """The group of each row of a leaderboard that is sorted by score, from 1: a new one begins with the first row that the
    first of its group beats. difference: the interval of the first row minus the second."""
    found, first = [], 0
    for number, row in enumerate(rows):
        if number and difference(rows[first], row).low > 0:
            first = number
        found.append(found[-1] + (first == number) if found else 1)
    return found


def _samples(unlearned: dict[str, Tensor], retrained: dict[str, Tensor], size: int) -> dict[str, list[float]]:
    """F and score of random parts with `size` runs of each side; see `half_samples`."""
    runs, examples = unlearned["confidences"].shape
    if runs < FEWEST_TO_HALVE:
        return {"forgetting_quality": [math.nan] * HALVES, "score": [math.nan] * HALVES}
    order = torch.rand(2, HALVES, runs, generator=torch.Generator().manual_seed(0)).argsort(dim=2)
    ours, theirs = order[:, :, :size]  # [parts, size]
    # A part's examples become columns, and all of them go through the metric at once.
    columns = (side["confidences"][part.T].flatten(1) for side, part in ((unlearned, ours), (retrained, theirs)))
    found = quick_epsilons(*columns).view(HALVES, examples)
    quality = [forgetting_quality(epsilons, size) for epsilons in found]
    score = [
        competition_score(value, unlearned["ra"][our], retrained["ra"][their], unlearned["ta"][our], retrained["ta"][their])
        for value, our, their in zip(quality, ours, theirs, strict=True)
    ]
    return {"forgetting_quality": quality, "score": score}


def _around(value: float, draws: Sequence[float]) -> tuple[float, float]:
    # Halves of a sample spread around their mean as full samples do around theirs, for anything like a mean over the runs
    # (Shao and Wu, 1989: the delete-half jackknife). Here halves spread somewhat less, as a few runs can decide which
    # attack is best; WIDER was chosen on the laws of benchmarks/coverage.py.
    reach = WIDER * float(np.std(draws, ddof=1) * stdtrit(len(draws) - 1, (1 + LEVEL) / 2))
    return value - reach, value + reach


def quick_epsilons(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """The metric's epsilons with intervals whose ends lie STEP apart, at a twentieth of the cost: [examples].

    Where no threshold survives epsilon is 0: nothing tells the sides apart.
    """
    table = epsilon_table(len(unlearned)).to(unlearned.device)
    sides = (side.double().T.contiguous().sort().values.split(32) for side in (unlearned, retrained))  # bounds memory
    return torch.cat([_coarse(ours, theirs, table) for ours, theirs in zip(*sides, strict=True)])


def _coarse(unlearned: Tensor, retrained: Tensor, table: Tensor) -> Tensor:
    """Of sorted sides [examples, runs]. As all ends lie on one grid, so do all left ends that belong to a right end."""
    runs = unlearned.shape[1]
    threshold = single_threshold(unlearned, retrained, table)[0]
    ranges = torch.stack([side[:, -1] - side[:, 0] for side in (unlearned, retrained)])
    unlearned_positive = (ranges[0] < ranges[1]).unsqueeze(1)
    positive = torch.where(unlearned_positive, unlearned, retrained)
    negative = torch.where(unlearned_positive, retrained, unlearned)
    steps = round(2 * BUFFER / STEP)
    grid = STEP * torch.arange(2 * steps + 1, device=unlearned.device)
    right = positive[:, -1:] - BUFFER + grid[: steps + 1]
    left = positive[:, :1] - 2 * BUFFER + grid

    def inside(side: Tensor) -> Tensor:
        up_to_right = torch.searchsorted(side, right, right=True, out_int32=True)
        below_left = torch.searchsorted(side, left, out_int32=True)
        return (up_to_right.unsqueeze(2) - below_left.unfold(1, steps + 1, 1)).clamp_(min=0)

    interval = table[inside(positive) * (runs + 1) + inside(negative)].amax(dim=(1, 2))
    epsilon = torch.maximum(threshold, interval).clamp(0, LARGEST_EPSILON)
    return torch.where(ranges.amin(0) / ranges.amax(0) < SMALLEST_RANGE_RATIO, LARGEST_EPSILON, epsilon)
