"""Further membership-inference attacks on the same confidences, as papers report them, beside the score.

Each attack is a function (unlearned, retrained) -> [examples]: it gets the confidences [runs, examples] of N networks of
each kind, and returns for each forget example how well it tells them apart, float64. The first line of its docstring says
to a user what its value means. None enters the score. An attack added to ATTACKS is run by `evaluate.py --attacks`, which
prints its mean and adds it to examples.csv.

Every attack raises ValueError when the sides' shapes differ or are not [runs, examples], when there are fewer than 2 runs or
no examples, and when a confidence is not finite.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evaluator.metric import DELTA, LARGEST_EPSILON, epsilon_table

FALSE_POSITIVE_RATE = 0.01
SPLITS = 10  # of the cross-validation, as in the starting kit
NEWTON_STEPS, SMALLEST_STEP = 50, 1e-6  # of the logistic regression; 4 to 20 are needed
SMALLEST_DEVIATION = 1e-6  # of a fitted normal: the rounding of float32 logits, so that equal confidences have a density
BINS, LARGEST_MARGIN, SMALLEST_SHARE = 20, 100.0, 1e-5  # of KLoM, as in data-unlearning-bench
CONFIDENCE_LEVEL = 0.95  # of the lower bound
NUMBERS_AT_ONCE = 2**20  # bounds memory


def auc(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """How often the more confident of two networks, one of each kind, is the unlearned one; or the other way round.

    Area under the ROC curve of "unlearned networks are more confident", or of its opposite where that is larger. The share
    of pairs in this order, with ties counted half: the Mann-Whitney statistic divided by N². 0.5 is guessing, 1 is perfect
    separation.
    """
    ours, theirs = _sides(unlearned, retrained)
    theirs = theirs.sort().values
    below, up_to = (torch.searchsorted(theirs, ours, right=right).double().mean(1) for right in (False, True))
    area = (below + up_to) / 2 / theirs.shape[1]
    return torch.maximum(area, 1 - area)


def tpr_at_low_fpr(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """How many networks of one kind are recognised when at most 1% of the other kind may be taken for them.

    True positive rate at a false positive rate of at most 1%, of the best single threshold (Carlini et al., LiRA,
    https://arxiv.org/abs/2112.03570). "Positive" is unlearned or retrained, above or below the threshold, whichever is best.
    Guessing gives about 0.02 at N = 512, perfect separation 1.
    """
    sides = _sides(unlearned, retrained)
    allowed = int(FALSE_POSITIVE_RATE * unlearned.shape[0])  # false positives
    rates = []
    for sign in (1, -1):
        for positive, negative in (sides, sides[::-1]):
            threshold = (sign * negative).sort(descending=True).values[:, allowed : allowed + 1]
            rates.append((sign * positive > threshold).double().mean(1))
    return torch.stack(rates).amax(0)


def logistic_regression(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """How often a logistic regression on the confidence says rightly which kind a further network is of.

    Accuracy, cross-validated over the networks: the attack of the competition's starting kit
    (https://github.com/unlearning-challenge/starting-kit), there on losses. scikit-learn's LogisticRegression and folds, all
    fitted at once by Newton's method. 0.5 is guessing, 1 is perfect separation.
    """
    from sklearn.model_selection import StratifiedShuffleSplit  # here, as it takes a second to import

    values = torch.cat(_sides(unlearned, retrained), dim=1)  # [examples, networks]
    labels = np.repeat([0, 1], len(unlearned))
    folds = StratifiedShuffleSplit(SPLITS, test_size=max(2, len(labels) // 10), random_state=0).split(labels, labels)
    # Which networks each fold learns from and is tested on: [folds, networks].
    train, test = (torch.from_numpy(np.stack(part)).to(values.device) for part in zip(*folds, strict=True))
    labels = torch.from_numpy(labels).to(values)
    accuracies = []
    for part in values.split(max(1, NUMBERS_AT_ONCE // train.numel())):
        slope, intercept = _fit_logistic(part[:, train], labels[train])
        answers = slope * part[:, test] + intercept > 0
        accuracies.append((answers == (labels[test] > 0)).double().mean((1, 2)))
    return torch.cat(accuracies)


def interval_epsilon(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """The largest epsilon that any interval of confidences gives: the score's attack without its grid of thresholds.

    Every interval that the 2N values can tell apart is tried, thresholds among them; inside it the answer is "unlearned" or
    "retrained", whichever is better. The epsilon of its counts is the competition's (`evaluator.metric`), with its
    infinite and discarded intervals, but without the shortcut for a narrow range. `forgetting_quality` makes an F of it.
    Within [0, 50]: guessing gives about 2.6 at N = 512, perfect separation 50; 0 where every interval is discarded.
    """
    ours, theirs = _sides(unlearned, retrained)
    edges = _edges(ours, theirs)
    table = epsilon_table(ours.shape[1]).to(edges.device)
    epsilon, _, _ = _best_interval(_below(ours, edges), _below(theirs, edges), table)
    return epsilon.clamp(0, LARGEST_EPSILON)


def epsilon_lower_bound(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """An epsilon that the example exceeds with 95% confidence: what is proven, 0 if nothing is.

    The first half of the runs chooses an interval or a threshold. On the second half its errors are counted, and their two
    rates bounded from above at 97.5% each (Clopper-Pearson). Jagielski et al. (https://arxiv.org/abs/2006.07709) and Nasr et
    al. (https://arxiv.org/abs/2101.04535). The confidence is that of one example, not of all at once.
    Guessing gives 0; perfect separation 4.2 at N = 512, and 0 below N = 12.
    """
    first, second = _halves(*_sides(unlearned, retrained))
    edges = _edges(*first)
    table = _bound_table(first[0].shape[1]).to(edges.device)
    _, *ends = _best_interval(*(_below(side, edges) for side in first), table)
    left, right = (edges.gather(1, end) for end in ends)
    chosen, judged = ([((left <= side) & (side < right)).sum(1) for side in half] for half in (first, second))
    unlearned_inside = chosen[0] >= chosen[1]  # the answer inside is "unlearned"
    true_positives, false_positives = (torch.where(unlearned_inside, *pair) for pair in (judged, judged[::-1]))
    runs = second[0].shape[1]
    return _bound_table(runs).to(edges.device)[true_positives * (runs + 1) + false_positives]


def gaussian_likelihood_ratio(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """How often normal distributions, one fitted to each kind, say rightly which kind a further network is of.

    Accuracy of the likelihood ratio: U-LiRA (Hayes et al., https://arxiv.org/abs/2403.01218). One half of the runs is fitted
    and the other asked about, then the other way round. 0.5 is guessing, 1 is perfect separation.
    """

    def log_density(side: Tensor, fitted: Tensor) -> Tensor:
        deviation = fitted.std(1, correction=0, keepdim=True).clamp(min=SMALLEST_DEVIATION)
        return -deviation.log() - ((side - fitted.mean(1, keepdim=True)) / deviation).square() / 2

    halves = _halves(*_sides(unlearned, retrained))
    accuracies = []
    for known, asked in (halves, halves[::-1]):
        accuracies.append(_accuracy(*(log_density(side, known[0]) - log_density(side, known[1]) for side in asked)))
    return torch.stack(accuracies).mean(0)


def global_threshold(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """How often one threshold for all examples says rightly which kind a network is of: what a crude attacker sees.

    Accuracy: Yeom et al., https://arxiv.org/abs/1709.01604; the population attack of Ye et al.,
    https://arxiv.org/abs/2111.09679. The threshold that is best for one half of the runs, over all examples, answers for the
    other half, and the other way round. 0.5 is guessing, 1 is perfect separation; a single example may be below 0.5.
    """
    halves = _halves(*_sides(unlearned, retrained))
    accuracies = []
    for known, asked in (halves, halves[::-1]):
        values, order = torch.cat([side.flatten() for side in known]).sort()
        ahead = torch.where(order < known[0].numel(), -1, 1).cumsum(0)[:-1]  # retrained less unlearned up to each value
        ahead = torch.where(values[:-1] < values[1:], ahead, 0)  # no threshold between equal values
        best = ahead.abs().argmax()
        threshold = (values[best] + values[best + 1]) / 2
        accuracies.append(_accuracy(*(ahead[best] * (side - threshold) for side in asked)))
    return torch.stack(accuracies).mean(0)


def klom(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """How far the unlearned networks' distribution is from the retrained ones', in nats: KLoM.

    KL(unlearned || retrained) of histograms with 20 bins over both sides' range, confidences clipped to ±100, and a share of
    at least 1e-5 of retrained networks in every bin with an unlearned one: Georgiev et al., https://arxiv.org/abs/2410.23232,
    as in https://github.com/RoyRin/data-unlearning-bench, unlearning_bench/eval.py. One deviation: the largest value, which
    is in no bin there, is in the last one here, as a side without any other value would have no histogram.
    Equal distributions give about 0.05 at N = 512, perfect separation up to ln(1e5) = 11.5.
    """
    ours, theirs = (side.clamp(-LARGEST_MARGIN, LARGEST_MARGIN) for side in _sides(unlearned, retrained))
    low, high = torch.cat([ours, theirs], dim=1).aminmax(dim=1, keepdim=True)
    between = low + (high - low) / BINS * torch.arange(1, BINS, device=low.device)  # the bins' inner edges

    def histogram(side: Tensor) -> Tensor:
        bins = torch.searchsorted(between, side, right=True)
        counts = side.new_zeros(len(side), BINS).scatter_add(1, bins, torch.ones_like(side))
        return counts / side.shape[1]

    p, q = histogram(ours), histogram(theirs)
    q = torch.where(p > 0, q.clamp(min=SMALLEST_SHARE), q)
    q = q / q.sum(1, keepdim=True)
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1).clamp(min=0)


ATTACKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AUC": auc,
    "TPR at 1% FPR": tpr_at_low_fpr,
    "logistic regression": logistic_regression,
    "U-LiRA": gaussian_likelihood_ratio,
    "global threshold": global_threshold,
    "KLoM": klom,
    "interval epsilon": interval_epsilon,
    "epsilon bound": epsilon_lower_bound,
}


def _sides(unlearned: Tensor, retrained: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides as float64, [examples, runs]. Raises ValueError when an attack cannot be asked about them."""
    if unlearned.shape != retrained.shape or unlearned.dim() != 2 or len(unlearned) < 2 or not unlearned.numel():
        raise ValueError(
            "an attack needs confidences [runs, examples], as many unlearned as retrained, of 2 runs and 1 example or more; "
            f"these are {list(unlearned.shape)} and {list(retrained.shape)}"
        )
    for name, side in (("unlearned", unlearned), ("retrained", retrained)):
        if not side.isfinite().all():
            run, example = (~side.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"the {name} confidence of example {example} in run {run} is {side[run, example].item()}")
    return unlearned.double().T.contiguous(), retrained.double().T.contiguous()


def _halves(*sides: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The first half of each side's runs and the second, which has one more if N is odd."""
    first, second = zip(*(side.tensor_split([side.shape[1] // 2], dim=1) for side in sides), strict=True)
    return first, second


def _accuracy(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """How often "unlearned if positive, else retrained" is right, and 0 half right: [examples, runs] each -> [examples]."""
    return 0.5 + (unlearned.sign().mean(1) - retrained.sign().mean(1)) / 4


def _edges(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """Where intervals can end: between any two neighbours among all values, and at ±infinity: [examples, 2 runs + 1]."""
    values = torch.cat([unlearned, retrained], dim=1).sort().values
    lower, upper = values[:, :-1], values[:, 1:]
    middle = lower + (upper - lower) / 2
    middle = torch.where(middle > lower, middle, upper)  # of two neighbouring floats it is rounded to one of them
    infinity = torch.full_like(values[:, :1], torch.inf)
    return torch.cat([-infinity, middle, infinity], dim=1)


def _fit_logistic(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept, [examples, folds, 1], of logistic regressions with a penalty of slope² / 2, as scikit-learn's.

    values: [examples, folds, networks]; labels: [folds, networks], 0 or 1.
    """
    centre = values.mean(2, keepdim=True)  # the penalty does not depend on it, and Newton's method needs fewer steps
    values = values - centre
    slope = intercept = torch.zeros_like(centre)
    for _ in range(NEWTON_STEPS):
        probability = (slope * values + intercept).sigmoid()
        error, weight = probability - labels, probability * (1 - probability)
        gradient = (error * values).sum(2, True) + slope, error.sum(2, True)
        weighted = weight * values
        a, b, c = (
            (weighted * values).sum(2, True) + 1,
            weighted.sum(2, True),
            weight.sum(2, True),
        )  # Hessian [[a, b], [b, c]]
        determinant = (a * c - b * b).clamp(min=torch.finfo(a.dtype).tiny)
        step = (c * gradient[0] - b * gradient[1]) / determinant, (a * gradient[1] - b * gradient[0]) / determinant
        slope, intercept = slope - step[0], intercept - step[1]
        if (step[0].abs() <= SMALLEST_STEP * (1 + slope.abs())).all():
            break
    return slope, intercept - slope * centre


def _below(side: Tensor, edges: Tensor) -> Tensor:
    """How many of each example's values are below each edge: [examples, edges]."""
    return torch.searchsorted(side.sort().values, edges)


def _best_interval(unlearned_below: Tensor, retrained_below: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The interval left <= confidence < right whose counts have the largest value in the table, whichever kind is positive.

    Counts below each edge: [examples, edges]. table: [(runs+1)²], by true and false positives as `metric.epsilon_table`.
    Returns the values, [examples], and the indices of the left and right edges, [examples, 1].
    """
    runs = math.isqrt(table.numel()) - 1
    table = table.view(runs + 1, runs + 1)
    table = torch.maximum(table, table.T).flatten()
    # An interval's place in the table is the difference of its edges' places, as counts below an edge are cumulative.
    place = unlearned_below * (runs + 1) + retrained_below
    step = max(1, NUMBERS_AT_ONCE // place.numel())

    def values(left: Tensor, right: Tensor) -> Tensor:
        return table.take((right.unsqueeze(1) - left.unsqueeze(2)).clamp_(min=0))  # right of left; else empty

    best = [values(place[:, k : k + step], place[:, k:]).amax(2) for k in range(0, place.shape[1], step)]
    best, left = torch.cat(best, dim=1).max(1, keepdim=True)
    right = values(place.gather(1, left), place).squeeze(1).argmax(1, keepdim=True)
    return best.squeeze(1), left, right


def _bound_table(runs: int) -> Tensor:
    """The lower bound of epsilon for every pair (true positives, false positives): [(runs+1)²]."""
    from scipy.special import betaincinv  # here, as it takes half a second to import

    errors = np.arange(runs + 1)
    upper = betaincinv(errors + 1, np.maximum(runs - errors, 1), 1 - (1 - CONFIDENCE_LEVEL) / 2)  # Clopper-Pearson
    upper[runs] = 1
    false_negative, false_positive = np.meshgrid(upper[::-1], upper, indexing="ij")
    with np.errstate(divide="ignore"):  # the logarithm of 0 is never the largest
        bound = np.maximum(
            np.log((1 - DELTA - false_positive).clip(0)) - np.log(false_negative),
            np.log((1 - DELTA - false_negative).clip(0)) - np.log(false_positive),
        )
    return torch.from_numpy(bound.clip(0).ravel())
