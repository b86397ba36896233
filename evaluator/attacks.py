"""Further membership-inference attacks on the same confidences, as papers report them, beside the score.

Each attack is a function (unlearned, retrained) -> [examples]: it gets the confidences [runs, examples] of N networks of
each kind, and returns for each forget example how well it tells them apart. None enters the score. An attack added to
ATTACKS is run by `evaluate.py --attacks`, which prints its mean and adds it to examples.csv.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

FALSE_POSITIVE_RATE = 0.01
SPLITS = 10  # of the cross-validation, as in the starting kit


def auc(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """Area under the ROC curve of "unlearned networks are more confident", or of its opposite where that is larger.

    The share of pairs (one network of each kind) in this order, with ties counted half: the Mann-Whitney statistic divided
    by N². 0.5 is guessing, 1 is perfect separation.
    """
    ours, theirs = (side.double().T.contiguous() for side in (unlearned, retrained))  # [examples, runs]
    theirs = theirs.sort().values
    below, up_to = (torch.searchsorted(theirs, ours, right=right).double().mean(1) for right in (False, True))
    area = (below + up_to) / 2 / theirs.shape[1]
    return torch.maximum(area, 1 - area)


def tpr_at_low_fpr(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """True positive rate at a false positive rate of at most 1%, of the best single threshold (Carlini et al., LiRA,
    https://arxiv.org/abs/2112.03570). "Positive" is unlearned or retrained, above or below the threshold, whichever is best.
    """
    sides = [side.double().T.contiguous() for side in (unlearned, retrained)]
    allowed = int(FALSE_POSITIVE_RATE * unlearned.shape[0])  # false positives
    rates = []
    for sign in (1, -1):
        for positive, negative in (sides, sides[::-1]):
            threshold = (sign * negative).sort(descending=True).values[:, allowed : allowed + 1]
            rates.append((sign * positive > threshold).double().mean(1))
    return torch.stack(rates).amax(0)


def logistic_regression(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """Accuracy of a logistic regression on the confidence, cross-validated over the networks: the attack of the
    competition's starting kit (https://github.com/unlearning-challenge/starting-kit), there on losses. 0.5 is guessing.

    Needs at least 2 networks of each kind to learn from and one to test on.
    """
    from sklearn.linear_model import LogisticRegression  # here, as it takes a second to import
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    sides = torch.cat([unlearned, retrained]).double().cpu().numpy()
    labels = np.repeat([0, 1], len(unlearned))
    folds = StratifiedShuffleSplit(SPLITS, test_size=max(2, len(labels) // 10), random_state=0)
    model = LogisticRegression(solver="newton-cholesky")  # the fastest exact solver for a single feature
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence warnings: only the accuracy matters
        accuracies = [cross_val_score(model, column[:, None], labels, cv=folds).mean() for column in sides.T]
    return torch.tensor(accuracies, dtype=torch.float64, device=unlearned.device)


ATTACKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AUC": auc,
    "TPR at 1% FPR": tpr_at_low_fpr,
    "logistic regression": logistic_regression,
}
