"""The attacks beside the score, against scikit-learn and scipy."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from evaluate_helpers import FINETUNE, run
from scipy.stats import binomtest, entropy, mannwhitneyu, norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from torch.utils._python_dispatch import TorchDispatchMode

from evaluator.attacks import (
    ATTACKS,
    _bound_table,
    _fit_logistic,
    auc,
    epsilon_lower_bound,
    gaussian_likelihood_ratio,
    global_threshold,
    interval_epsilon,
    klom,
    logistic_regression,
    tpr_at_low_fpr,
)
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


@pytest.mark.parametrize("runs", [2, 3, 40])
@pytest.mark.parametrize("digits", [9, 0])
def test_logistic_regression_is_scikit_learns(runs, digits):
    ours, theirs = pools(runs, 4, digits=digits)
    ours, theirs = torch.cat([ours, 40 * ours], dim=1), torch.cat([theirs, 9 - theirs], dim=1)
    ours[:, 1], theirs[:, 2] = 103.6, -103.6  # saturated
    labels = np.repeat([0, 1], runs)
    folds = StratifiedShuffleSplit(10, test_size=max(2, runs // 5), random_state=0)
    for example, found in enumerate(logistic_regression(ours, theirs)):
        values = torch.cat([ours[:, example], theirs[:, example]]).numpy()[:, None]
        model = LogisticRegression(solver="newton-cholesky")
        assert found.item() == pytest.approx(cross_val_score(model, values, labels, cv=folds).mean())


@pytest.mark.parametrize("scale", [0.1, 1, 30])
def test_its_coefficients_are_scikit_learns(scale):
    ours, theirs = pools(20, 6)
    values, labels = scale * torch.cat([ours, theirs]).T, torch.tensor([0.0, 1.0]).repeat_interleave(20)
    found = torch.stack(_fit_logistic(values.unsqueeze(1), labels.unsqueeze(0))).squeeze()
    for example in range(6):
        model = LogisticRegression(tol=1e-9).fit(values[example][:, None], labels)
        assert found[:, example].numpy() == pytest.approx([model.coef_.item(), model.intercept_.item()], rel=1e-4)


@pytest.mark.parametrize("runs", [2, 3, 41])
def test_u_lira_is_scipys_normal_laws(runs):
    ours, theirs = pools(runs, 6)
    half = runs // 2
    for example, found in enumerate(gaussian_likelihood_ratio(ours, theirs)):
        sides, accuracies = [side[:, example].numpy() for side in (ours, theirs)], []
        for known, asked in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
            laws = [norm(side[known].mean(), max(side[known].std(), 1e-6)) for side in sides]
            ratios = [laws[0].logpdf(side[asked]) - laws[1].logpdf(side[asked]) for side in sides]
            accuracies.append(((ratios[0] > 0).mean() + (ratios[1] < 0).mean()) / 2)
        assert found.item() == pytest.approx(np.mean(accuracies))


def test_accuracies_are_what_normal_laws_allow():
    """The best threshold between normal distributions one standard deviation apart is right 69% of the time."""
    ours, theirs = pools(1000, 3, shift=0.0)
    ours += torch.tensor([0.0, 1.0, 9.0])
    for attack in (logistic_regression, gaussian_likelihood_ratio):
        assert attack(ours, theirs).numpy() == pytest.approx([0.5, 0.69, 1], abs=0.04)
    ours, theirs = 3.3 + 0 * ours, theirs - 1  # a constant among normal values
    assert gaussian_likelihood_ratio(ours, theirs).min() > 0.99


@pytest.mark.parametrize("digits", [9, 1, 0])
@pytest.mark.parametrize("runs", [2, 3, 20])
def test_the_global_threshold_is_the_best_of_all(runs, digits):
    ours, theirs = (side.numpy() for side in pools(runs, 5, digits=digits))
    half, accuracies = runs // 2, []
    for known, asked in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        values = np.unique(np.concatenate([ours[known], theirs[known]]))
        best, right = 0.0, np.full(5, 0.5)
        for threshold in (values[:-1] + values[1:]) / 2:
            lead = (ours[known] > threshold).mean() - (theirs[known] > threshold).mean()
            if abs(lead) > best + 1e-12:  # the first of equals
                above = [(np.sign(side[asked] - threshold) + 1).mean(0) / 2 for side in (ours, theirs)]
                best, right = abs(lead), 0.5 + np.sign(lead) * (above[0] - above[1]) / 2
        accuracies.append(right)
    assert global_threshold(*map(torch.from_numpy, (ours, theirs))).numpy() == pytest.approx(np.mean(accuracies, axis=0))


@pytest.mark.parametrize("digits", [9, 0])
@pytest.mark.parametrize("runs", [2, 3, 100])
def test_klom_is_numpys_and_scipys(runs, digits):
    ours, theirs = pools(runs, 6, digits=digits)
    ours[0, 1], theirs[:, 2], ours[:, 3], theirs[:, 3], theirs[0, 5] = 1000, -103.6, 2.5, 2.5, -1000
    ours[:, 4], theirs[:, 4] = torch.arange(runs) % 21, 20 - torch.arange(runs) % 20  # all on an edge
    for example, found in enumerate(klom(ours, theirs)):
        sides = [side[:, example].clamp(-100, 100).numpy() for side in (ours, theirs)]
        low, high = min(side.min() for side in sides), max(side.max() for side in sides)
        edges = np.linspace(low, high if high > low else high + 1, 21)
        p, q = (np.histogram(side, edges)[0] / runs for side in sides)
        assert found.item() == pytest.approx(entropy(p, np.where(p > 0, np.maximum(q, 1e-5), q)), abs=1e-9)


def smallest_epsilon(unlearned: int, retrained: int, runs: int) -> float:
    """The competition's epsilon of an interval with so many of the two kinds inside, in either direction; -1: discarded."""
    best = -1.0
    for inside, wrong in ((unlearned, retrained), (retrained, unlearned)):
        miss, alarm = 1 - inside / runs, wrong / runs
        if miss == alarm == 0:
            return 50.0
        if miss and alarm:
            terms = ((1 - 1e-5 - alarm, miss), (1 - 1e-5 - miss, alarm))
            best = max(best, 0.0, *(math.log(above / below) for above, below in terms if above > 0))
    return best


@pytest.mark.parametrize("digits", [9, 0])
@pytest.mark.parametrize("runs", [2, 3, 12])
def test_the_interval_search_tries_every_interval(runs, digits):
    ours, theirs = pools(runs, 6, digits=digits)
    ours[:, 4], theirs[:, 5], ours[1:, 5] = 0.5, 0.0, 0.0
    for example, found in enumerate(interval_epsilon(ours, theirs)):
        one, other = ours[:, example], theirs[:, example]
        values = torch.cat([one, other]).unique()
        counts = [
            [((left <= side) & (side <= right)).sum().item() for side in (one, other)]
            for left, right in itertools.combinations_with_replacement(values, 2)
        ]
        assert found.item() == pytest.approx(max(0, *(smallest_epsilon(*pair, runs) for pair in counts)), abs=1e-9)


@pytest.mark.parametrize("runs", [8, 100])
def test_the_interval_search_is_never_weaker_than_the_score(runs):
    ours, theirs = pools(runs, 30, shift=0.2, digits=3)
    theirs[:, ::2] *= 0.5
    score = best_attacks(ours, theirs)
    assert (interval_epsilon(ours, theirs) >= score.epsilon)[score.family != FAMILIES.index("range")].all()


def test_intervals_separate_neighbouring_floats():
    for one in (1.0, np.nextafter(1.0, 2)):  # the middle of two neighbours is rounded down once, and up once
        ours = torch.tensor([[0.5], [one]], dtype=torch.float64)
        theirs = torch.tensor([[np.nextafter(one, 2)], [2.0]], dtype=torch.float64)
        assert interval_epsilon(ours, theirs) == 50


@pytest.mark.parametrize("runs", [1, 2, 7, 40])
def test_the_bounds_rates_are_scipys(runs):
    table = _bound_table(runs).view(runs + 1, runs + 1)
    upper = [binomtest(errors, runs).proportion_ci(0.95, "exact").high for errors in range(runs + 1)]
    for true, false in itertools.product(range(runs + 1), repeat=2):
        miss, alarm = upper[runs - true], upper[false]
        terms = ((1 - 1e-5 - alarm, miss), (1 - 1e-5 - miss, alarm))
        bound = max([0.0, *(math.log(above / below) for above, below in terms if above > 0)])
        assert table[true, false].item() == pytest.approx(bound, abs=1e-9)


@pytest.mark.parametrize("swap", [False, True])
def test_the_bound_counts_the_second_halfs_errors(swap):
    ours, theirs = torch.ones(80, 1), torch.zeros(80, 1)
    ours[40:43], theirs[45] = 0, 1  # errors that the first half does not know of
    ours, theirs = (theirs, ours) if swap else (ours, theirs)
    table = _bound_table(40).view(41, 41)
    assert epsilon_lower_bound(ours, theirs) == (table[39, 3] if swap else table[37, 1])
    ours[:40], theirs[:40] = theirs[:40].clone(), ours[:40].clone()
    assert epsilon_lower_bound(ours, theirs) == 0


def test_the_bound_is_exceeded_in_at_most_5_percent():
    """Of 4,000 examples whose epsilon is known: equal normals, and an answer that is right three times in four (ln 3)."""
    source = torch.Generator().manual_seed(0)
    for runs in (61, 200):
        ours, theirs = torch.randn(2, runs, 4000, generator=source)
        assert (epsilon_lower_bound(ours, theirs) > 0).double().mean() <= 0.05
        ours, theirs = (ours > 0.6745).float(), (theirs > -0.6745).float()
        bounds = epsilon_lower_bound(ours, theirs)
        assert (bounds > math.log(3)).double().mean() <= 0.05
        assert bounds.mean() > 0.2


# Of every attack


UPPER = 1 - 0.025 ** (1 / 20)  # Clopper-Pearson's bound of a rate when 20 networks made no error
SEPARATED = {"KLoM": math.log(1e5), "interval epsilon": 50, "epsilon bound": math.log((1 - 1e-5 - UPPER) / UPPER)}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack(name):
    """Shapes and types; the caller's tensors stay; equal sides are not told apart, others completely."""
    attack = ATTACKS[name]
    ours, theirs = pools(40, 4)
    before = ours.clone(), theirs.clone()
    found = attack(ours, theirs)
    assert found.shape == (4,) and found.dtype == torch.float64
    assert torch.equal(ours, before[0]) and torch.equal(theirs, before[1])
    strided = [torch.stack([side.T, side.T], dim=2)[..., 0].T for side in (ours, theirs)]
    assert not strided[0].is_contiguous() and torch.equal(attack(*strided), found)
    narrow = attack(ours.float(), theirs.float())
    assert narrow.dtype == torch.float64 and narrow.numpy() == pytest.approx(found.numpy(), abs=0.02)
    if name != "global threshold":  # there the examples share it
        assert attack(ours[:, 1:2], theirs[:, 1:2]).item() == found[1].item()
    assert attack(ours, ours).max() <= 0.55
    for far in (theirs + 1000, theirs - 1000):
        assert attack(far, theirs).numpy() == pytest.approx(SEPARATED.get(name, 1))


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"logistic regression"}))  # its folds go by the runs' numbers
def test_the_order_of_runs_within_a_half_does_not_matter(name):
    ours, theirs = pools(41, 5, digits=1)
    source = torch.Generator().manual_seed(1)
    orders = [torch.cat([torch.randperm(20, generator=source), 20 + torch.randperm(21, generator=source)]) for _ in range(2)]
    found = ATTACKS[name](ours[orders[0]], theirs[orders[1]])
    assert found.numpy() == pytest.approx(ATTACKS[name](ours, theirs).numpy(), abs=1e-12)


@pytest.mark.parametrize("runs", [2, 3, 30])
@pytest.mark.parametrize("name", ATTACKS)
def test_few_runs_and_constant_sides(name, runs):
    normal = pools(runs, 3)[0]
    sides = [
        normal,
        torch.full_like(normal, 0.1),
        torch.full_like(normal, 103.6),
        torch.full_like(normal, -103.6),
        normal.round(),
    ]
    for ours, theirs in itertools.product(sides, repeat=2):
        found = ATTACKS[name](ours, theirs)
        assert found.isfinite().all() and (found >= 0).all()
        if ours is theirs:
            assert found.max() <= 0.55 or runs < 30


@pytest.mark.parametrize("name", ATTACKS)
def test_what_cannot_be_attacked_is_named(name):
    ours, theirs = pools(4, 3)
    ours[2, 1] = torch.nan
    with pytest.raises(ValueError, match="the unlearned confidence of example 1 in run 2 is nan"):
        ATTACKS[name](ours, theirs)
    with pytest.raises(ValueError, match="the retrained confidence of example 0 in run 0 is inf"):
        ATTACKS[name](theirs, theirs / 0 * theirs.sign())
    for one, other in ((ours[:1], theirs[:1]), (ours[:, :0], theirs[:, :0]), (ours[:3], theirs), (ours[0], theirs[0])):
        with pytest.raises(ValueError, match="2 runs and 1 example or more; these are"):
            ATTACKS[name](one, other)


@pytest.mark.parametrize("name", ATTACKS)
def test_memory_is_bounded(name, monkeypatch):
    """No tensor is larger than the limit or what an attack is given; all intervals at once would be 730,000 numbers."""
    ours, theirs = pools(60, 50)
    found = ATTACKS[name](ours, theirs)
    monkeypatch.setattr("evaluator.attacks.NUMBERS_AT_ONCE", 5_000)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            made = operation(*args, **(kwargs or {}))
            sizes.extend(each.numel() for each in torch.utils._pytree.tree_leaves(made) if isinstance(each, torch.Tensor))
            return made

    with Sizes():
        again = ATTACKS[name](ours, theirs)
    assert torch.equal(again, found)
    assert max(sizes) <= 50 * (2 * 60 + 1)


def test_every_attack_says_in_a_line_what_it_means():
    for attack in ATTACKS.values():
        first, second, *rest = attack.__doc__.splitlines()
        assert first.endswith(".") and len(first) < 120 and not second and rest


def test_the_command_prints_them_and_keeps_them(data, results, capsys):
    folder = results / "small_digits" / "public" / "finetune"
    assert run(data, results, FINETUNE) == 0
    assert "AUC" not in capsys.readouterr().out and "AUC" not in (folder / "examples.csv").read_text()
    assert run(data, results, FINETUNE, "--attacks") == 0
    printed, table = capsys.readouterr().out, pd.read_csv(folder / "examples.csv")
    ours, theirs = (pool["forget_logits"] for pool in _pools(data, results))
    assert len(ours) == len(theirs) == 4
    for name in ATTACKS:
        assert name in printed and table[name].between(0, 50).all()
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
