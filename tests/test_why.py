"""Why a score: the what-if figures by hand, a perfect unlearner has no gap, and what is put into words."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis, norm, rankdata

from evaluator.metric import epsilons, forgetting_quality
from evaluator.why import in_words, matched, shifts_and_spreads, what_if


def pools(runs: int, examples: int, shift=0.0, ratio=1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal confidences; every example has another median and spread. shift, ratio: numbers or [examples]."""
    source = torch.Generator().manual_seed(seed)
    unlearned, retrained = torch.randn(2, runs, examples, generator=source, dtype=torch.float64)
    level, spread = torch.linspace(-2, 8, examples), torch.linspace(1, 3, examples)
    return level + spread * (shift + ratio * unlearned), level + spread * retrained


def words(unlearned, retrained) -> str:
    return in_words(shifts_and_spreads(unlearned, retrained), len(unlearned))


def test_figures_by_hand():
    runs, examples = 40, 12
    sides = pools(runs, examples, shift=0.4, ratio=0.7)
    ours, theirs = (side.numpy() for side in sides)
    shift = (np.median(ours, 0) - np.median(theirs, 0)) / theirs.std(0, ddof=1)
    ratio = ours.std(0, ddof=1) / theirs.std(0, ddof=1)
    shift_noise = np.sqrt(np.pi / 2 * (1 + ratio**2) / runs)
    tails = [
        np.maximum(kurtosis(side, fisher=False) * (1 - 1 / runs) ** 2, 3) - 1  # of the ddof that scipy leaves out
        for side in (ours, theirs)
    ]
    ratio_noise = np.sqrt(sum(tails) / (4 * (runs - 1)))
    for value, expected in zip(shifts_and_spreads(*sides), (shift, ratio, shift_noise, ratio_noise), strict=True):
        assert value.numpy() == pytest.approx(expected)

    def by_chance(values):
        return norm.ppf((rankdata(values) - 0.5) / examples)

    right_ratio = np.exp(by_chance(np.log(ratio) / ratio_noise) * ratio_noise)
    deviations = (ours - np.median(ours, 0)) / ratio
    for name, medians, final in (
        ("medians", True, ratio),
        ("spreads", False, right_ratio),
        ("both", True, right_ratio),
    ):
        rest = by_chance(shift / shift_noise) * np.sqrt(np.pi / 2 * (1 + final**2) / runs)
        centre = np.median(theirs, 0) + rest * theirs.std(0, ddof=1) if medians else np.median(ours, 0)
        by_hand = torch.from_numpy(centre + deviations * final)
        assert matched(*sides, medians, name != "medians").numpy() == pytest.approx(by_hand.numpy())
        assert what_if(*sides)[name] == forgetting_quality(epsilons(by_hand, sides[1]), runs)


def test_a_perfect_unlearner_gains_nothing():
    sides = pools(64, 60)
    as_it_is = forgetting_quality(epsilons(*sides), 64)
    assert list(what_if(*sides).values()) == pytest.approx([as_it_is] * 3, abs=0.02)
    # Medians and spreads that are exactly the retrained ones would promise it much more.
    ours, theirs = sides
    exact = (ours - ours.quantile(0.5, dim=0)) * theirs.std(0) / ours.std(0) + theirs.quantile(0.5, dim=0)
    assert forgetting_quality(epsilons(exact, theirs), 64) > as_it_is + 0.03


def test_what_if_is_what_a_method_earns_that_is_right_there():
    shift = halves(0.8, -0.8)
    sides = pools(128, 60, shift, 0.6)
    found = what_if(*sides)
    for name, law in {"medians": (0, 0.6), "spreads": (shift, 1), "both": (0, 1)}.items():
        assert found[name] == pytest.approx(forgetting_quality(epsilons(*pools(128, 60, *law)), 128), abs=0.03)
    assert forgetting_quality(epsilons(*sides), 128) < found["medians"] < found["both"]


def halves(one: float, other: float) -> torch.Tensor:
    return torch.tensor([one, other]).repeat(30)


@pytest.mark.parametrize(
    ("shift", "ratio", "wrong", "cure"),
    [
        (0, 1, "nothing to cure", "medians and spreads agree within the noise of 512 runs"),
        (1, 1, "too confident on 100% of the examples", "more damage"),
        (-1, 1, "not confident enough on 100% of the examples", "less damage"),
        (0, 0.6, "too alike on 100% of the examples", "damage that differs more between runs"),
        (0, 1.6, "too different on 100% of the examples", "damage that differs less between runs"),
        (
            halves(1, 0),
            0.6,
            "too confident on 50% of the examples, too alike on 100%",
            "more damage, and damage that differs more between runs",
        ),
        (
            halves(1, -1),
            1,
            "too confident on 50% of the examples, not confident enough on 50%",
            "another kind of damage, not more or less of it",
        ),
        (
            0,
            halves(0.6, 1.6),
            "too alike on 50% of the examples, too different on 50%",
            "another kind of randomness, not more or less of it",
        ),
        (
            torch.tensor([1.0, 1, 1, 1, -1]).repeat(12),
            1,
            "too confident on 80% of the examples, not confident enough on 20%",
            "more damage",
        ),
    ],
)
def test_words(shift, ratio, wrong, cure):
    assert words(*pools(512, 60, shift, ratio)) == f"{wrong}: {cure}"


@pytest.mark.parametrize("examples", [5, 100])
@pytest.mark.parametrize(("runs", "heavy"), [(4, False), (32, False), (32, True), (512, False), (512, True)])
def test_nothing_is_said_of_a_perfect_unlearner(runs, heavy, examples):
    """heavy: of Student's t with 3 degrees of freedom, where the spreads of equal laws differ a lot by chance."""
    said = 0
    for seed in range(20):
        sides = pools(runs, examples, seed=seed)
        if heavy:
            source = torch.Generator().manual_seed(seed)
            sides = [side / torch.randn(3, runs, examples, generator=source).square().mean(0).sqrt() for side in sides]
        said += not words(*sides).startswith("nothing to cure")
    assert said <= 1


def test_few_examples_may_be_off_by_chance():
    shift = torch.zeros(8)
    shift[:2] = 3
    assert words(*pools(64, 8, shift)).startswith("nothing to cure")
    shift[:3] = 3
    assert words(*pools(64, 8, shift)).startswith("too confident on 38%")


@pytest.mark.parametrize("runs", [2, 3, 64])
def test_constants_ties_and_extremes(runs):
    varied = torch.linspace(-1, 1, runs, dtype=torch.float64)
    constant, saturated = torch.full_like(varied, 4.0), torch.full_like(varied, 103.6)
    rounded = (varied * 2).round() / 2
    unlearned = torch.stack([constant, varied, saturated, constant, rounded, 1e-9 * varied, varied], dim=1)
    retrained = torch.stack([varied, constant, -saturated, constant, rounded, varied, 100 * varied], dim=1)
    before = unlearned.clone(), retrained.clone()
    found = shifts_and_spreads(unlearned, retrained)
    assert all(value.isfinite().all() for value in found)
    assert found.shift[2].item() == pytest.approx(207.2 / 0.01)
    assert found.shift[3] == 0 and found.ratio[3] == 1
    for medians, spreads in ((True, False), (False, True), (True, True)):
        changed = matched(unlearned, retrained, medians, spreads)
        assert changed.isfinite().all()
        assert changed[:, [0, 1, 2, 3, 5]].equal(unlearned[:, [0, 1, 2, 3, 5]])  # constant on one side
    assert in_words(found, runs)
    assert unlearned.equal(before[0]) and retrained.equal(before[1])


def test_one_example_few_runs_and_single_precision():
    for runs in (2, 3, 64):
        ours, theirs = pools(runs, 1, shift=0.5)
        figures = what_if(ours, theirs)
        assert all(math.isfinite(figure) for figure in figures.values())
        assert matched(ours, theirs, True, True).median() == pytest.approx(theirs.median().item(), abs=2)
        single = shifts_and_spreads(ours.float(), theirs.float())
        assert single.shift.dtype == torch.float64
        assert single.shift.item() == pytest.approx(shifts_and_spreads(ours, theirs).shift.item(), rel=1e-5)


def test_of_the_same_networks_nothing_changes():
    """All differences are 0, a tie of all examples."""
    _, retrained = pools(16, 5)
    assert matched(retrained, retrained, True, True).numpy() == pytest.approx(retrained.numpy())
    assert words(retrained, retrained).startswith("nothing to cure")


def test_what_the_metric_refuses_is_refused():
    constant = torch.ones(8, 2)
    with pytest.raises(ValueError, match="no threshold survives for example 0"):
        what_if(constant, constant)
