"""Why a method scores what it does: the medians and spreads of its confidences beside the retrained networks'.

A score is lost in three ways that need different cures: the unlearned networks are too confident on a forget example, not
confident enough, or too alike. A perfect unlearner's medians and spreads differ from the retrained networks' too, by chance:
whatever is said here is only what goes beyond that.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.stats import rankdata
from torch import Tensor

from evaluator.metric import THRESHOLDS_PER_UNIT, epsilons, forgetting_quality

RESOLUTION = 1 / THRESHOLDS_PER_UNIT  # of the metric: it takes an example whose confidences vary less for a constant
BEYOND_NOISE = 2.5  # standard errors; about 1% of the examples of a perfect unlearner are further off
MENTIONED = 0.1  # the least share of the examples that is put into words: more than a perfect unlearner has by chance


class Differences(NamedTuple):
    """Between unlearned and retrained confidences; every field is [examples]."""

    shift: Tensor  # of the median, in standard deviations of the retrained confidences
    ratio: Tensor  # of the standard deviations, unlearned / retrained
    shift_noise: Tensor  # standard error of the shift
    ratio_noise: Tensor  # standard error of ln(ratio)


def differences(unlearned: Tensor, retrained: Tensor) -> Differences:
    """How far the unlearned confidences are from the retrained ones, and how far they may be by chance.

    unlearned, retrained: finite confidences [runs, examples], at least 2 runs.

    The spread is the standard deviation and not a robust one, because the metric's attacks are decided in the tails; it is
    also the one with the smallest sampling error. A spread below the metric's resolution counts as that resolution, so that
    constants have a shift and a ratio too.
    Standard errors: sqrt(pi/2) sd / sqrt(N) of a median (normal law), sqrt((kurtosis - 1) / (4N)) of the logarithm of a
    standard deviation (any law), each side's added in squares. The kurtosis is at least a normal law's, 3.
    """
    runs = len(unlearned)
    ours, theirs = _spread(unlearned), _spread(retrained)
    tails = _kurtosis(unlearned) + _kurtosis(retrained) - 2
    return Differences(
        (_median(unlearned) - _median(retrained)) / theirs,
        ours / theirs,
        _shift_noise(ours / theirs, runs),
        (tails / (4 * (runs - 1))).sqrt(),
    )


def matched(unlearned: Tensor, retrained: Tensor, medians: bool, spreads: bool) -> Tensor:
    """The unlearned confidences of a method with the right medians, spreads or both: [runs, examples].

    Each example's confidences are moved and scaled until they differ from the retrained ones by as much as a perfect
    unlearner's would by chance. Without that rest even a perfect unlearner would seem to gain. The rests are the quantiles
    of a normal law; which example gets which is decided by the rank of its difference, so that where all differences are
    chance they stay as they are.
    An example that does not vary on one side is left as it is: no scale makes a constant vary.
    """
    found = differences(unlearned, retrained)
    ratio = (_by_chance(found.ratio.log() / found.ratio_noise) * found.ratio_noise).exp() if spreads else found.ratio
    noise = _shift_noise(ratio, len(unlearned))
    shift = _by_chance(found.shift / found.shift_noise) * noise if medians else found.shift
    centre = _median(retrained) + shift * _spread(retrained)
    moved = centre + (unlearned - _median(unlearned)) * (ratio / found.ratio)
    varies = torch.minimum(_spread(unlearned), _spread(retrained)) > RESOLUTION
    return torch.where(varies, moved, unlearned.double())


def quality(unlearned: Tensor, retrained: Tensor) -> float:
    """Forgetting quality F, as the score has it."""
    return forgetting_quality(epsilons(unlearned, retrained), len(unlearned))


def decomposition(
    unlearned: Tensor, retrained: Tensor, quality: Callable[[Tensor, Tensor], float] = quality
) -> dict[str, float]:
    """F as it is, and what it would be if every example's median, spread, or both were right. See `matched`.

    F times the accuracy ratios is the score. Raises ValueError as `evaluator.metric.epsilons`.
    """
    return {
        "as it is": quality(unlearned, retrained),
        "medians right": quality(matched(unlearned, retrained, True, False), retrained),
        "spreads right": quality(matched(unlearned, retrained, False, True), retrained),
        "both right": quality(matched(unlearned, retrained, True, True), retrained),
    }


def in_words(found: Differences, runs: int) -> str:
    """What is wrong beyond noise, on what share of the examples, and what would cure it: one line."""
    shift, spread = found.shift / found.shift_noise, found.ratio.log() / found.ratio_noise
    shares = {
        "too confident": shift > BEYOND_NOISE,
        "not confident enough": shift < -BEYOND_NOISE,
        "too alike": spread < -BEYOND_NOISE,
        "too different": spread > BEYOND_NOISE,
    }
    shares = {name: share.double().mean().item() for name, share in shares.items()}
    said = {name: share for name, share in shares.items() if share >= MENTIONED}
    if not said:
        return f"nothing to cure: medians and spreads agree within the noise of {runs} runs"
    first, *others = (f"{name} on {share:.0%}" for name, share in said.items())
    cures = [
        {
            (True, False): "more damage",
            (False, True): "less damage",
            (True, True): "neither more nor less damage but damage elsewhere",
        }.get(("too confident" in said, "not confident enough" in said)),
        {
            (True, False): "damage that differs more between runs",
            (False, True): "damage that differs less between runs",
            (True, True): "randomness elsewhere, not more or less of it",
        }.get(("too alike" in said, "too different" in said)),
    ]
    return f"{', '.join([f'{first} of the examples', *others])}: {', and '.join(cure for cure in cures if cure)}"


def _median(side: Tensor) -> Tensor:
    ordered = side.double().sort(dim=0).values  # torch.quantile refuses large pools
    return (ordered[(len(side) - 1) // 2] + ordered[len(side) // 2]) / 2


def _spread(side: Tensor) -> Tensor:
    return side.double().std(dim=0).clamp(min=RESOLUTION)


def _kurtosis(side: Tensor) -> Tensor:
    centred = side.double() - side.double().mean(dim=0)
    return ((centred**4).mean(dim=0) / _spread(side) ** 4).clamp(min=3)


def _shift_noise(ratio: Tensor, runs: int) -> Tensor:
    return (math.pi / 2 * (1 + ratio**2) / runs).sqrt()


def _by_chance(scores: Tensor) -> Tensor:
    """Standard normal quantiles in the order of `scores`, [examples]; equal scores get the same one."""
    ranks = torch.from_numpy(rankdata(scores.cpu())).to(scores.device)
    return torch.special.ndtri((ranks - 0.5) / len(scores))
