"""Intervals of scores: against scipy where it has them, on pools whose F is known, and on values that mean nothing."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import coverage
from evaluator import intervals
from evaluator.evaluation import Evaluation
from evaluator.files import write_json
from evaluator.intervals import (
    Interval,
    difference,
    difference_over,
    groups,
    half_samples,
    interval,
    mean_over,
    projected,
    quick_epsilons,
    verdict,
)
from evaluator.metric import epsilons, forgetting_quality
from evaluator.pool import Pool


def pool(runs: int, examples: int, seed: int, shift: float = 0.0, ra: float = 1.0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    confidences = torch.randn(runs, examples, generator=source, dtype=torch.float64) + shift
    return {"confidences": 1.5 * confidences, "ra": torch.full((runs,), ra), "ta": torch.ones(runs)}


def test_the_coarse_grid_gives_nearly_the_metrics_epsilons():
    shift = torch.linspace(-1, 1, 20, dtype=torch.float64)
    for runs in (8, 64, 200):
        ours, theirs = (pool(runs, 20, seed)["confidences"] for seed in (0, 1))
        exact, coarse = epsilons(ours + shift, theirs), quick_epsilons(ours + shift, theirs)
        assert (coarse - exact).abs().mean() < 0.15
        qualities = [forgetting_quality(found, runs) for found in (coarse, exact)]
        assert qualities[0] == pytest.approx(qualities[1], rel=0.15)


def test_the_coarse_grid_knows_sides_that_are_told_apart_and_constants():
    wide = torch.linspace(-3, 3, 20, dtype=torch.float64).unsqueeze(1)
    assert quick_epsilons(wide, wide + 20).item() == 50
    assert quick_epsilons(wide, torch.zeros_like(wide)).item() == 50
    constant = torch.full_like(wide, 103.6)
    assert quick_epsilons(constant, constant).item() == 0  # the metric finds no threshold and raises an error
    assert quick_epsilons(constant, -constant).item() == 50


def test_half_samples_are_the_metric_of_half_of_the_runs():
    """With every run doubled in two examples F is that of one example: runs are drawn, not examples."""
    ours, theirs = pool(32, 3, 0, 0.5, ra=0.9), pool(32, 3, 1)
    found = half_samples(ours, theirs)
    assert found == half_samples(ours, theirs)
    assert len(found["score"]) == intervals.HALVES and len(set(found["score"])) > 1
    assert found["score"] == pytest.approx([0.9 * value for value in found["forgetting_quality"]])
    doubled = [side | {"confidences": side["confidences"].repeat(1, 2)} for side in (ours, theirs)]
    assert half_samples(*doubled)["forgetting_quality"] == pytest.approx(found["forgetting_quality"])


def test_half_samples_follow_the_runs_of_each_side():
    """The runs' accuracies show which were drawn: the retrained ones are the same for every method, ours are others."""
    numbered = torch.arange(64) + 1.0
    theirs = pool(64, 1, 1)
    halves = []
    for method in (pool(64, 1, 0), pool(64, 1, 2)):
        for side in ("ours", "theirs"):
            named = [method | {"ra": numbered}, theirs] if side == "ours" else [method, theirs | {"ra": numbered}]
            found, plain = half_samples(*named), half_samples(method, theirs)
            halves.append(np.divide(found["score"], plain["score"]))
    assert halves[0] == pytest.approx(halves[2]) and halves[1] == pytest.approx(halves[3])
    assert halves[0] != pytest.approx(1 / halves[1])
    assert np.mean(halves[0]) == pytest.approx(32.5, abs=3)


def test_intervals_are_as_wide_as_full_samples_spread(monkeypatch):
    """Examples that are correlated within a run; benchmarks/coverage.py does the same at length."""
    monkeypatch.setattr(coverage, "EXAMPLES", 20)
    monkeypatch.setattr(coverage, "HARD", torch.linspace(-1, 1, 20, dtype=torch.float64))
    found = coverage.coverage(coverage.Case("shifted", 0.3, 32), 20)
    assert 0.6 < found["half width / sd"] / 1.96 < 1.6
    assert found["coverage"] > 0.75 and found["false claims"] < 0.25


def test_interval():
    draws = np.array([0.08, 0.1, 0.12, 0.1])
    low, high = interval(0.1, draws)[1:]
    assert high - 0.1 == pytest.approx(0.1 - low) == pytest.approx(1.2 * draws.std(ddof=1) * stats.t.ppf(0.975, 3))
    assert interval(0.1, draws + 0.05) == pytest.approx((0.1, low, high))  # F of halves is larger: only their spread counts
    assert interval(0.01, [0.0, 0.01, 0.05, 0.0]).low == 0
    assert interval(0.0, [0.0, 0.01, 0.05, 0.0]).high > 0  # not known to be 0
    assert interval(0.0, [0.0] * 4) == (0, 0, 0)
    assert interval(0.2, [0.2] * 4) == pytest.approx((0.2, 0.2, 0.2))


def test_difference_is_paired():
    draws = np.array([0.08, 0.1, 0.12, 0.1])
    assert difference(0.1, draws, 0.1, draws) == (0, 0, 0)
    value, low, high = difference(0.12, draws + 0.02, 0.1, draws)
    assert (value, low, high) == pytest.approx((0.02, 0.02, 0.02))  # what moves both alike is no doubt about the difference
    value, low, high = difference(0.12, 1.5 * draws, 0.1, draws)
    assert high - value == pytest.approx(value - low) == pytest.approx((interval(0.1, draws).high - 0.1) / 2)
    assert difference(0.1, draws, 0.12, 1.5 * draws) == pytest.approx((-0.02, -high, -low))
    assert difference(0.1, draws, 0.12, draws[::-1]).low < difference(0.1, draws, 0.12, draws).low


def test_few_runs_say_nothing():
    for runs in (2, 3, intervals.FEWEST_TO_HALVE - 1):
        draws = half_samples(pool(runs, 2, 0), pool(runs, 2, 1))["score"]
        assert np.isnan(draws).all() and np.isnan(interval(0.1, draws)[1:]).all()
        found = difference(0.1, draws, 0.05, draws)
        assert "cannot be compared" in verdict("a", "b", found, 1, runs)
    draws = half_samples(pool(8, 1, 0), pool(8, 1, 1))["score"]
    assert np.isfinite(interval(0.1, draws)).all()


def test_means_over_forget_sets_are_scipys():
    a, b = [0.05, 0.07, 0.04, 0.09], [0.04, 0.05, 0.05, 0.06]
    mean, error, found = mean_over(a)
    assert (mean, error) == pytest.approx((np.mean(a), stats.sem(a)))
    assert found == pytest.approx((mean, *stats.ttest_1samp(a, 0).confidence_interval(0.95)))
    paired = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert difference_over(a, b) == pytest.approx((np.mean(a) - np.mean(b), *paired))
    mean, error, found = mean_over([0.05])
    assert mean == found.value == 0.05 and np.isnan([error, found.low, found.high]).all()
    with pytest.raises(ValueError, match="broadcast"):
        difference_over(a, b[:3])
    with pytest.raises(ValueError, match="at least one forget set"):
        mean_over([])


def test_verdicts():
    assert (
        verdict("kookmin", "finetune", Interval(0.012, 0.004, 0.02), 6, 512)
        == "kookmin beats finetune by 0.0120 (95% interval 0.0040 to 0.0200, 6 forget sets)."
    )
    assert (
        verdict("finetune", "kookmin", Interval(-0.012, -0.02, -0.004), 1, 512)
        == "kookmin beats finetune by 0.0120 (95% interval 0.0040 to 0.0200, on this forget set)."
    )
    assert (
        verdict("a", "b", Interval(0.003, -0.004, 0.01), 6, 64)
        == "a and b cannot be told apart: difference 0.0030 (95% interval -0.0040 to 0.0100, 6 forget sets)."
    )
    said = verdict("a", "b", Interval(0.012, 0.004, 0.02), 3, 32)
    assert "32 runs" in said and "3 forget sets, at least 4" in said
    assert "cannot be told apart" in verdict("a", "b", Interval(0.0, 0.0, 0.0), 1, 512)
    assert "cannot be compared" in verdict("a", "b", mean_over([0.01])[2], 1, 512)


def test_groups():
    def apart(a: float, b: float) -> Interval:
        return Interval(a - b, a - b - 0.1, a - b + 0.1)

    assert groups([1.0, 0.95, 0.91, 0.89, 0.8, 0.5], apart) == [1, 1, 1, 2, 2, 3]
    assert groups([1.0], apart) == [1] and groups([], apart) == []
    unknown = Interval(0.5, math.nan, math.nan)
    assert groups([1.0, 0.5], lambda a, b: unknown) == [1, 1]


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_projection_of_64_runs_holds_the_score_at_512(shift):
    def score(runs: int) -> float:
        return coverage.score(pool(runs, 30, 2, shift), pool(runs, 30, 3))

    few = pool(64, 60, 0, shift), pool(64, 60, 1)
    found = projected(coverage.score(*few), *few)
    assert found.low < score(512) < found.high
    if shift:
        assert found.value < 0.8 * coverage.score(*few)


def test_projection_at_the_edges():
    few = pool(64, 5, 0, 0.5), pool(64, 5, 1)
    value, low, high = projected(0.1, *few, runs=64)
    assert value == pytest.approx(0.1) and 0 < low < 0.1 < high
    wider = projected(0.1, *few, runs=512)
    assert wider.value <= 0.1 and wider.high / wider.low > high / low
    apart = pool(64, 5, 0, 50), pool(64, 5, 1)
    assert projected(0.0, *apart) == (0, 0, 0)
    assert np.isnan(projected(0.1, pool(31, 5, 0), pool(31, 5, 1))).all()


def test_the_page_of_the_simulation_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(coverage, "EXAMPLES", 3)
    monkeypatch.setattr(coverage, "HARD", torch.linspace(-1, 1, 3, dtype=torch.float64))
    coverage.simulate(3, (8,), 1)
    printed = capsys.readouterr().out
    assert printed.count("heavy tails") == 2 and "more than one group" in printed and "coarse F / F" in printed
    assert "nan" not in printed.lower()


def test_kept_runs_are_projected(small_digits, tmp_path, capsys):
    """The command reads what is kept, of several pools of a method the one that its summary names."""
    evaluation = Evaluation.of(str(small_digits), runs=65, results=tmp_path)
    examples = len(evaluation.data.forget)
    source = np.random.default_rng(0)
    command = ["--projection", "--data", str(small_digits), "--results", str(tmp_path), "--runs"]
    assert coverage.main([*command, "65"]) == 1
    assert "no 65 runs of a method are kept" in capsys.readouterr().err
    assert coverage.main([*command, "64"]) == 1
    assert "--runs 64: must be more than 64" in capsys.readouterr().err
    for name, further in (("retrained", 0.0), ("mine", 0.5), ("mine", 30.0)):
        kept = Pool(evaluation.results / name, {"further": further})
        for run in range(65):
            logits = source.normal(further * (np.arange(10) == 0), 1, (examples, 10)).astype(np.float32)
            kept.save(run, {"forget_logits": logits, "ra": np.float64(1.0), "ta": np.float64(0.9)})
        if further == 0.5:
            write_json(evaluation.results / name / "summary.json", {"made_of": {"unlearned": kept.folder.name}})
    assert coverage.main([*command, "65"]) == 0
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("mine")]
    name, real, first, value, low, high, _, held = line
    assert (name, first, held) == ("mine", "64", "True")
    assert 0.01 < float(low) < float(value) < float(high) and float(value) == pytest.approx(float(real), rel=0.1)
