"""The attacks beside the score, against scikit-learn and scipy."""

import numpy as np
import pandas as pd
import pytest
import torch
from evaluate_helpers import FINETUNE, run
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score, roc_curve

from evaluator.attacks import ATTACKS, auc, logistic_regression, tpr_at_low_fpr
from evaluator.evaluation import Evaluation
from evaluator.method import Method
from evaluator.metric import FAMILIES, best_attacks, epsilons


def pools(runs: int, examples: int, shift: float = 0.5, seed: int = 0, digits: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences; rounded to a few digits many of them are equal."""
    source = torch.Generator().manual_seed(seed)
    unlearned, retrained = torch.randn(2, runs, examples, generator=source, dtype=torch.float64).round(decimals=digits)
    return unlearned + shift * torch.arange(-1, examples - 1), retrained


@pytest.mark.parametrize("digits", [9, 0])
@pytest.mark.parametrize("runs", [2, 37, 200])
def test_auc_is_scikit_learns_and_scipys(runs, digits):
    ours, theirs = pools(runs, 6, digits=digits)
    labels = np.repeat([1, 0], runs)
    for example, found in enumerate(auc(ours, theirs)):
        one, other = ours[:, example].numpy(), theirs[:, example].numpy()
        area = roc_auc_score(labels, np.concatenate([one, other]))
        assert found.item() == pytest.approx(max(area, 1 - area))
        area = mannwhitneyu(one, other).statistic / runs**2
        assert found.item() == pytest.approx(max(area, 1 - area))


@pytest.mark.parametrize("digits", [9, 0])
@pytest.mark.parametrize("runs", [2, 50, 200, 512])
def test_tpr_at_1_percent_is_scikit_learns(runs, digits):
    ours, theirs = pools(runs, 6, digits=digits)
    for example, found in enumerate(tpr_at_low_fpr(ours, theirs)):
        values = torch.cat([ours[:, example], theirs[:, example]]).numpy()
        rates = []
        for sign in (1, -1):
            for labels in (np.repeat([1, 0], runs), np.repeat([0, 1], runs)):
                false, true, _ = roc_curve(labels, sign * values, drop_intermediate=False)
                rates.append(true[false <= 0.01 + 1e-12].max())
        assert found.item() == pytest.approx(max(rates))


def test_logistic_regression_finds_what_there_is_to_find():
    ours, theirs = pools(1000, 3, shift=0.0)
    far = ours + torch.tensor([0.0, 1.0, 9.0])
    found = logistic_regression(far, theirs)
    assert found[0].item() == pytest.approx(0.5, abs=0.1)
    # The best that any threshold can do between two normal distributions one standard deviation apart is 0.69.
    assert found[1].item() == pytest.approx(0.69, abs=0.04) and found[2] == 1
    assert torch.equal(found, logistic_regression(far, theirs))


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack(name):
    """Shapes; the caller's tensors stay; examples do not depend on each other; equal sides are not told apart."""
    ours, theirs = pools(40, 4)
    before = ours.clone(), theirs.clone()
    found = ATTACKS[name](ours, theirs)
    assert found.shape == (4,) and found.dtype == torch.float64
    assert torch.equal(ours, before[0]) and torch.equal(theirs, before[1])
    assert ATTACKS[name](ours[:, 1:2], theirs[:, 1:2]).item() == found[1].item()
    assert ATTACKS[name](ours, ours).max() <= 0.55
    assert ATTACKS[name](theirs + 1000, theirs).min() == 1
    assert ATTACKS[name](ours[:2], theirs[:2]).isfinite().all()


def test_the_command_prints_them_and_keeps_them(data, results, capsys):
    folder = results / "small_digits" / "public" / "finetune"
    assert run(data, results, FINETUNE) == 0
    assert "AUC" not in capsys.readouterr().out and "AUC" not in (folder / "examples.csv").read_text()
    assert run(data, results, FINETUNE, "--attacks") == 0
    printed, table = capsys.readouterr().out, pd.read_csv(folder / "examples.csv")
    ours, theirs = (pool["forget_logits"] for pool in _pools(data, results))
    assert len(ours) == len(theirs) == 4
    for name in ATTACKS:
        assert name in printed and table[name].between(0, 1).all()
        assert f"{table[name].mean():.3f}" in printed
    assert run(data, results, FINETUNE) == 0  # not asked for, not shown
    assert "AUC" not in capsys.readouterr().out


def _pools(data, results):
    return Evaluation.of(str(data), runs=4, results=results, jobs=1, device="cpu").pools(Method.read(FINETUNE))


# Which of the metric's own attacks decided


@pytest.mark.parametrize("runs", [2, 16, 64])
def test_the_deciding_attack_has_the_epsilon_that_is_reported(runs):
    ours, theirs = pools(runs, 12, shift=0.3)
    theirs[:, 4:6] *= 0.2
    ours[:, 6] = 3.0  # constant: told apart by its range
    found = best_attacks(ours, theirs)
    assert torch.equal(found.epsilon, epsilons(ours, theirs))
    inside = [((found.left <= side) & (side <= found.right)).sum(0) for side in (ours, theirs)]
    assert torch.equal(found.unlearned_inside, inside[0]) and torch.equal(found.retrained_inside, inside[1])
    for example in range(12):
        if FAMILIES[found.family[example]] == "range":
            assert example == 6 and found.epsilon[example] == 50
            assert (found.left[example], found.right[example]) == (3, 3)
            continue
        rates = [count[example].item() / runs for count in inside]
        best = 0.0
        for positive, negative in (rates, rates[::-1]):  # of one of the two the inside is the positive answer
            miss, alarm = 1 - positive, negative
            if miss == alarm == 0:
                best = 50.0
            elif miss and alarm:
                for right, wrong in ((1 - 1e-5 - alarm, miss), (1 - 1e-5 - miss, alarm)):
                    best = max(best, np.log(right / wrong)) if right > 0 else best
        assert found.epsilon[example].item() == pytest.approx(min(best, 50), abs=1e-9)
        assert (FAMILIES[found.family[example]] == "threshold") == (found.right[example] == torch.inf)


def test_examples_csv_says_which_attack_decided(data, results):
    assert run(data, results, FINETUNE) == 0
    table = pd.read_csv(results / "small_digits" / "public" / "finetune" / "examples.csv")
    assert set(table.attack) <= set(FAMILIES)
    assert table[["unlearned_inside", "retrained_inside"]].isin(range(5)).all().all()
    assert (table.left <= table.right).all()
