"""The competition's metric: confidences -> epsilon -> forgetting quality F -> score.

Definitions follow the organisers' scorer (google-deepmind/unlearning_evaluation, metric.py, 2024) and their paper
"Evaluation for the NeurIPS Machine Unlearning Competition". Everything is a float64 tensor and stays on its device.

The released scorer compares every confidence with every one of 160,000 thresholds. Here the confidences of an example are
sorted once and a threshold's true and false positives are counted by binary search; and as the counts alone decide
epsilon, its (N+1) x (N+1) possible values are computed once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DELTA = 1e-5  # of (epsilon, delta)-unlearning
LARGEST_EPSILON = 50.0
SMALLEST_RANGE_RATIO = 0.01  # of the sides' ranges: below it they are told apart without any threshold
THRESHOLDS_PER_UNIT = 100
BUFFER = 2.0  # how far the ends of the intervals reach beyond the narrower side
LEFT_ENDS = int(2 * BUFFER * THRESHOLDS_PER_UNIT)
BIN_WIDTH = 0.5  # of epsilon, in H
TINY = 1e-45  # keeps the logarithm of a probability of 0 finite
EXAMPLES_AT_ONCE = 8  # bounds memory: about 160,000 intervals per example
FAMILIES = ("range", "threshold", "interval")  # of attacks; "range": the ranges differ so much that no threshold is needed


class Attacks(NamedTuple):
    """The attack that decides each example's epsilon; every field is [examples].

    It tells the networks with left <= confidence <= right from the others.
    """

    epsilon: Tensor  # within [0, 50]
    family: Tensor  # index into FAMILIES
    left: Tensor
    right: Tensor  # infinite for a threshold
    unlearned_inside: Tensor  # how many of the N unlearned networks are inside
    retrained_inside: Tensor


def logit_scaled_confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """ln(p / (1 - p)) of the true class, as the organisers compute it.

    logits: [..., examples, classes], left as they are; targets: [examples], integers.
    Returns [..., examples], float64, within about ±103.6.
    """
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    probabilities = shifted.exp().double()
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    true_class = targets.expand(logits.shape[:-1]).unsqueeze(-1)
    right = probabilities.gather(-1, true_class).squeeze(-1)
    wrong = probabilities.scatter(-1, true_class, 0.0).sum(dim=-1)
    return (right + TINY).log() - (wrong + TINY).log()


def epsilons(unlearned: Tensor, retrained: Tensor, on_progress: Callable[[int], object] = lambda examples: None) -> Tensor:
    """How well the best attack tells unlearned from retrained networks: [examples], within [0, 50]. See `best_attacks`."""
    return best_attacks(unlearned, retrained, on_progress).epsilon


def best_attacks(
    unlearned: Tensor, retrained: Tensor, on_progress: Callable[[int], object] = lambda examples: None
) -> Attacks:
    """The attack that tells unlearned from retrained networks best, for each forget example.

    unlearned, retrained: confidences [runs, examples], of the same shape, at least 2 runs.
    on_progress: called from time to time with the number of examples done since the last call.
    Raises ValueError when the shapes do not fit, a confidence is not finite, or no threshold of an example survives.
    """
    if unlearned.shape != retrained.shape or unlearned.dim() != 2:
        raise ValueError(
            "unlearned and retrained confidences must both be [runs, examples]; "
            f"they are {list(unlearned.shape)} and {list(retrained.shape)}"
        )
    runs = len(unlearned)
    if runs < 2:
        raise ValueError(f"the metric needs at least 2 runs, not {runs}")
    for name, side in (("unlearned", unlearned), ("retrained", retrained)):
        if not side.isfinite().all():
            run, example = (~side.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"the {name} confidence of example {example} in run {run} is {side[run, example].item()}")
    table = epsilon_table(runs).to(unlearned.device)
    unlearned = unlearned.double().T.contiguous().sort().values  # [examples, runs]
    retrained = retrained.double().T.contiguous().sort().values
    found = [unlearned.new_empty(3, 0)]  # epsilon, left, right
    families = [torch.empty(0, dtype=torch.long, device=unlearned.device)]
    parts = (side.split(EXAMPLES_AT_ONCE) if len(side) else () for side in (unlearned, retrained))
    for ours, theirs in zip(*parts, strict=True):
        threshold, interval = single_threshold(ours, theirs, table), _interval(ours, theirs, table)
        found.append(torch.where(interval[0] > threshold[0], interval, threshold))
        families.append((interval[0] > threshold[0]) + FAMILIES.index("threshold"))
        on_progress(len(ours))
    (epsilon, left, right), family = torch.cat(found, dim=1), torch.cat(families)
    ends = torch.stack([unlearned[:, [0, -1]], retrained[:, [0, -1]]])  # [sides, examples, 2]
    ranges = ends[..., 1] - ends[..., 0]
    told_apart = ranges.amin(0) / ranges.amax(0) < SMALLEST_RANGE_RATIO  # 0/0 is NaN, and does not count
    narrower = torch.where((ranges[0] < ranges[1]).unsqueeze(1), ends[0], ends[1])
    epsilon = torch.where(told_apart, LARGEST_EPSILON, epsilon)
    family = torch.where(told_apart, FAMILIES.index("range"), family)
    left, right = (torch.where(told_apart, end, other) for end, other in zip(narrower.T, (left, right), strict=True))
    if (epsilon < 0).any():
        example = int((epsilon < 0).nonzero()[0])
        raise ValueError(
            f"no threshold survives for example {example}: all its unlearned confidences are "
            f"{unlearned[example, 0]:.6g} to {unlearned[example, -1]:.6g}, the retrained ones "
            f"{retrained[example, 0]:.6g} to {retrained[example, -1]:.6g}, and every attack has a rate of 0"
        )
    inside = (((left.unsqueeze(1) <= side) & (side <= right.unsqueeze(1))).sum(1) for side in (unlearned, retrained))
    return Attacks(epsilon.clamp(max=LARGEST_EPSILON), family, left, right, *inside)


def earned(epsilons: Tensor, runs: int) -> Tensor:
    """H(epsilon) = 2 / 2^n for epsilon in the n-th bin of width 0.5: [examples].

    epsilons: [examples]; runs: N, which fixes the number of bins (14 at 512); past the last bin H is 0.
    """
    bins = math.ceil(math.log(runs - 1)) / BIN_WIDTH
    bin_number = (epsilons / BIN_WIDTH).floor()  # n - 1
    return torch.where(bin_number < bins, torch.exp2(-bin_number), 0.0)


def forgetting_quality(epsilons: Tensor, runs: int) -> float:
    """F, the mean over the forget examples of what their epsilons earn."""
    return earned(epsilons, runs).mean().item()


def competition_score(forgetting_quality: float, ra_unlearned, ra_retrained, ta_unlearned, ta_retrained) -> float:
    """F x (mean RA unlearned / mean RA retrained) x (mean TA unlearned / mean TA retrained).

    The accuracies are numbers or tensors [runs]; a ratio above 1 is not capped.
    """
    ra_unlearned, ra_retrained, ta_unlearned, ta_retrained = (
        torch.as_tensor(accuracy, dtype=torch.float64).mean().item()
        for accuracy in (ra_unlearned, ra_retrained, ta_unlearned, ta_retrained)
    )
    return forgetting_quality * (ra_unlearned / ra_retrained) * (ta_unlearned / ta_retrained)


def epsilon_table(runs: int) -> Tensor:
    """Epsilon of every pair (true positives, false positives): [(runs+1)²]; infinite where the sides are told apart
    without an error, -1 where the threshold is discarded (exactly one error rate is 0)."""
    counts = np.arange(runs + 1) / runs
    false_negative, false_positive = np.meshgrid(1 - counts, counts, indexing="ij")
    with np.errstate(divide="ignore", invalid="ignore"):  # the logarithm of 1 - delta - 1 is a NaN, and ignored
        epsilon = np.fmax(
            np.log(1 - DELTA - false_positive) - np.log(false_negative),
            np.log(1 - DELTA - false_negative) - np.log(false_positive),
        )
    epsilon = np.fmax(epsilon, 0)
    none, both = (false_negative == 0) | (false_positive == 0), (false_negative == 0) & (false_positive == 0)
    epsilon = np.where(none, np.where(both, np.inf, -1.0), epsilon)
    return torch.from_numpy(epsilon.ravel())


def _best(table: Tensor, true_positives: Tensor, false_positives: Tensor) -> tuple[Tensor, Tensor]:
    """The largest epsilon of each example, and its threshold's index, [examples, 1]; counts: [examples, thresholds]."""
    runs = math.isqrt(table.numel()) - 1
    return table[true_positives * (runs + 1) + false_positives].max(dim=1, keepdim=True)


def _evenly(start: Tensor, stop: Tensor, count: Tensor) -> Tensor:
    """`count` points from start to stop, as numpy.linspace: [..., largest count]; shorter rows repeat their end."""
    index = torch.arange(int(count.max()), device=start.device)
    start, stop, count = start.unsqueeze(-1), stop.unsqueeze(-1), count.unsqueeze(-1)
    points = start + index * ((stop - start) / (count - 1).clamp(min=1))
    return torch.where((index >= count - 1) & (count > 1), stop, points)


def single_threshold(unlearned: Tensor, retrained: Tensor, table: Tensor) -> Tensor:
    """The best "positive iff confidence >= threshold"; sides sorted, [examples, runs].

    Returns epsilon, left and right ends, [3, examples]; epsilon is -1 where no threshold survives.
    """
    runs = unlearned.shape[1]
    middle = [(runs - 1) // 2, runs // 2]
    retrained_higher = (retrained[:, middle].mean(1) > unlearned[:, middle].mean(1)).unsqueeze(1)
    positive = torch.where(retrained_higher, retrained, unlearned)
    negative = torch.where(retrained_higher, unlearned, retrained)
    low = torch.minimum(positive[:, 0], negative[:, 0])
    high = torch.maximum(positive[:, -1], negative[:, -1])
    count = ((high - low) * THRESHOLDS_PER_UNIT).ceil().long()
    if not count.any():
        return torch.stack([torch.full_like(low, -1.0), low, high])
    thresholds = _evenly(low, high, count).float().double()  # torch.linspace, which the organisers call, makes float32
    true_positives = runs - torch.searchsorted(positive, thresholds)
    false_positives = runs - torch.searchsorted(negative, thresholds)
    epsilon, best = _best(table, true_positives, false_positives)
    left = thresholds.gather(1, best)
    found = torch.cat([epsilon, left, torch.full_like(left, math.inf)], dim=1).T
    return torch.where(count > 0, found, torch.stack([torch.full_like(low, -1.0), low, high]))


def _interval(unlearned: Tensor, retrained: Tensor, table: Tensor) -> Tensor:
    """The best "positive iff left <= confidence <= right"; sides sorted, [examples, runs].

    "Positive" is the narrower side; on a tie the side that is negative for a single threshold. Returns as above.
    """
    runs = unlearned.shape[1]
    middle = [(runs - 1) // 2, runs // 2]
    retrained_higher = retrained[:, middle].mean(1) > unlearned[:, middle].mean(1)
    unlearned_range, retrained_range = (side[:, -1] - side[:, 0] for side in (unlearned, retrained))
    unlearned_positive = torch.where(
        unlearned_range == retrained_range, retrained_higher, unlearned_range < retrained_range
    ).unsqueeze(1)
    positive = torch.where(unlearned_positive, unlearned, retrained)
    negative = torch.where(unlearned_positive, retrained, unlearned)
    width = positive[:, -1] - positive[:, 0]
    low, high = positive[:, 0] + width - BUFFER, positive[:, -1] + BUFFER
    right = _evenly(low, high, ((high - low) * THRESHOLDS_PER_UNIT).ceil().long())  # [examples, about 400]
    left_start = right - width.unsqueeze(1) - BUFFER
    left_stop = right - width.unsqueeze(1) + BUFFER
    left = _evenly(left_start, left_stop, torch.full_like(right, LEFT_ENDS, dtype=torch.long))  # [examples, 400, 400]

    def inside(side: Tensor) -> Tensor:
        up_to_right = torch.searchsorted(side, right, right=True, out_int32=True)
        below_left = torch.searchsorted(side, left.flatten(1), out_int32=True).view_as(left)
        return (up_to_right.unsqueeze(2) - below_left).clamp_(min=0)

    epsilon = table[inside(positive) * (runs + 1) + inside(negative)]  # [examples, right ends, left ends]
    # Find the index of the largest in two steps: a single search over all 160,000 takes twice as long.
    _, at_right = epsilon.amax(dim=2).max(dim=1, keepdim=True)
    row = at_right.unsqueeze(2).expand(-1, 1, LEFT_ENDS)
    epsilon, at_left = epsilon.gather(1, row).squeeze(1).max(dim=1, keepdim=True)
    left = left.gather(1, row).squeeze(1).gather(1, at_left)
    return torch.cat([epsilon, left, right.gather(1, at_right)], dim=1).T
