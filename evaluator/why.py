"""Why a method scores what it does: the medians and spreads of its confidences beside the retrained networks'.

Unlearned networks can be too confident on a forget example or not confident enough, too alike or too different, and each
needs another cure. A perfect unlearner's medians and spreads differ from the retrained networks' too, by chance: what is
said here is what goes beyond that. docs/why.md explains it to a user.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from evaluator.metric import THRESHOLDS_PER_UNIT, epsilons, forgetting_quality

RESOLUTION = 1 / THRESHOLDS_PER_UNIT  # of the metric; confidences that vary less count as constant
BEYOND_NOISE = 2.5  # standard errors: of a perfect unlearner's examples, about 1% are further off to either side
MENTIONED, FEW = 0.1, 3  # the least share and number of examples put into words: so many are not off by chance
BALANCED = 0.5  # if the smaller of two opposite shares is at least this part of the larger, neither is said to be the rule
DAMAGE = ("more damage", "less damage", "another kind of damage, not more or less of it")
VARIETY = (
    "damage that differs more between runs",
    "damage that differs less between runs",
    "another kind of randomness, not more or less of it",
)


class ShiftsAndSpreads(NamedTuple):
    """Of the unlearned confidences against the retrained ones; every field is [examples]."""

    shift: Tensor  # of the median, in standard deviations of the retrained confidences
    ratio: Tensor  # of the standard deviations, unlearned / retrained
    shift_noise: Tensor  # standard error of the shift
    ratio_noise: Tensor  # standard error of ln(ratio)


def shifts_and_spreads(unlearned: Tensor, retrained: Tensor) -> ShiftsAndSpreads:
    """How far the unlearned confidences are from the retrained ones, and how far they may be by chance.

    unlearned, retrained: finite confidences, [runs, examples] each, at least 2 runs.

    The spread is the standard deviation and not a robust one, because the attacks of the metric are decided in the tails;
    of the spreads tried it has the smallest sampling error, too. A spread below the metric's resolution of 0.01 counts as
    0.01, so that shift and ratio of constants are finite.
    The standard error of a median is sqrt(pi/2) sd / sqrt(N) for a normal law; that of the logarithm of a standard deviation
    is sqrt((kurtosis - 1) / 4N) for any law. The kurtosis of few runs is unreliable: at least a normal law's 3 is taken.
    """
    runs = len(unlearned)
    ours, theirs = _spread(unlearned), _spread(retrained)
    kurtoses = _kurtosis(unlearned) + _kurtosis(retrained)
    return ShiftsAndSpreads(
        shift=(_median(unlearned) - _median(retrained)) / theirs,
        ratio=ours / theirs,
        shift_noise=_shift_noise(ours / theirs, runs),
        ratio_noise=((kurtoses - 2) / (4 * (runs - 1))).sqrt(),
    )


def matched(unlearned: Tensor, retrained: Tensor, medians: bool, spreads: bool) -> Tensor:
    """The confidences of a method whose medians, spreads or both are right and that is otherwise this one: [runs, examples].

    Each example's confidences are moved and scaled until they differ from the retrained ones by as much as a perfect
    unlearner's do by chance; without that rest even a perfect unlearner would seem to gain. The rests of all examples are
    the quantiles of a normal law, in the order of the differences: where these are nothing but chance, they hardly change.
    An example that is constant on either side is left as it is: no scale makes a constant vary.
    """
    found = shifts_and_spreads(unlearned, retrained)
    ratio, shift = found.ratio, found.shift
    if spreads:
        ratio = (_by_chance(ratio.log() / found.ratio_noise) * found.ratio_noise).exp()
    if medians:
        shift = _by_chance(shift / found.shift_noise) * _shift_noise(ratio, len(unlearned))
    centre = _median(retrained) + shift * _spread(retrained)
    moved = centre + (unlearned - _median(unlearned)) * (ratio / found.ratio)
    varies = torch.minimum(_spread(unlearned), _spread(retrained)) > RESOLUTION
    return torch.where(varies, moved, unlearned.double())


def what_if(unlearned: Tensor, retrained: Tensor) -> dict[str, float]:
    """Forgetting quality F if every example's median, spread, or both were right. See `matched`.

    Times the accuracy ratios these are scores. Raises ValueError as `evaluator.metric.epsilons` does.
    """
    right = {"medians": (True, False), "spreads": (False, True), "both": (True, True)}
    moved = {name: matched(unlearned, retrained, *which) for name, which in right.items()}
    return {name: forgetting_quality(epsilons(side, retrained), len(side)) for name, side in moved.items()}


def in_words(found: ShiftsAndSpreads, runs: int) -> str:
    """In one line: what is wrong beyond noise, on what share of the examples, and what would cure it."""
    shift, spread = found.shift / found.shift_noise, found.ratio.log() / found.ratio_noise
    names = ("too confident", "not confident enough", "too alike", "too different")
    shares = [(size > BEYOND_NOISE).double().mean().item() for size in (shift, -shift, -spread, spread)]
    least = max(MENTIONED, min(1.0, FEW / len(shift)))
    said = [f"{name} on {share:.0%}" for name, share in zip(names, shares, strict=True) if share >= least]
    if not said:
        return f"nothing to cure: medians and spreads agree within the noise of {runs} runs"
    said[0] += " of the examples"
    cures = _cure(DAMAGE, *shares[:2], least) + _cure(VARIETY, *shares[2:], least)
    return f"{', '.join(said)}: {', and '.join(cures)}"


def _cure(cures: tuple[str, str, str], first: float, second: float, least: float) -> list[str]:
    """Of the larger of two opposite shares; the third cure if what helps the one share would hurt as large a one."""
    smaller, larger = sorted((first, second))
    if larger < least:
        return []
    if smaller >= max(least, BALANCED * larger):
        return [cures[2]]
    return [cures[0] if first > second else cures[1]]


def _median(side: Tensor) -> Tensor:
    ordered = side.double().sort(dim=0).values  # torch.quantile refuses large pools
    return (ordered[(len(side) - 1) // 2] + ordered[len(side) // 2]) / 2


def _spread(side: Tensor) -> Tensor:
    return side.double().std(dim=0).clamp(min=RESOLUTION)


def _kurtosis(side: Tensor) -> Tensor:
    deviations = (side.double() - side.double().mean(dim=0)) / _spread(side)
    return (deviations**4).mean(dim=0).clamp(min=3)


def _shift_noise(ratio: Tensor, runs: int) -> Tensor:
    return (math.pi / 2 * (1 + ratio**2) / runs).sqrt()


def _by_chance(sizes: Tensor) -> Tensor:
    """The quantiles of the standard normal law in the order of `sizes`, [examples]; equal sizes get the same one."""
    from scipy.stats import rankdata  # here, as it takes a second to import

    ranks = torch.from_numpy(rankdata(sizes.cpu())).to(sizes.device)
    return torch.special.ndtri((ranks - 0.5) / len(sizes))
