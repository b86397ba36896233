"""The metric against the organisers' own results, against a slow and plain second implementation, and its properties."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evaluator import metric
from evaluator.metric import competition_score, epsilons, forgetting_quality, logit_scaled_confidence

CASES = np.load(Path(__file__).parent / "metric_cases.npz")
GROUPS = ("n512", "n64", "n100", "edge64")


# A second implementation, written from the definition alone: every threshold is compared with every confidence.


def plain_rates_to_epsilon(true_positive: np.ndarray, false_positive: np.ndarray) -> float | None:
    """The largest epsilon over thresholds with these rates; None where all are discarded."""
    best = None
    for tpr, fpr in {(float(t), float(f)) for t, f in zip(true_positive, false_positive, strict=True)}:
        fnr = 1 - tpr
        if fnr == 0 and fpr == 0:
            return math.inf
        if fnr == 0 or fpr == 0:
            continue
        candidates = [0.0]
        if 1 - 1e-5 - fpr > 0:
            candidates.append(math.log(1 - 1e-5 - fpr) - math.log(fnr))
        if 1 - 1e-5 - fnr > 0:
            candidates.append(math.log(1 - 1e-5 - fnr) - math.log(fpr))
        best = max(candidates) if best is None else max(best, *candidates)
    return best


def plain_single(unlearned: np.ndarray, retrained: np.ndarray) -> float | None:
    positive, negative = unlearned, retrained
    if np.median(retrained) > np.median(unlearned):
        positive, negative = retrained, unlearned
    low, high = min(positive.min(), negative.min()), max(positive.max(), negative.max())
    thresholds = np.linspace(low, high, math.ceil((high - low) * 100)).astype(np.float32).astype(np.float64)
    rates = [(np.mean(positive >= t), np.mean(negative >= t)) for t in thresholds]
    return plain_rates_to_epsilon([tpr for tpr, _ in rates], [fpr for _, fpr in rates])


def plain_interval(unlearned: np.ndarray, retrained: np.ndarray) -> float | None:
    positive, negative = unlearned, retrained
    if np.median(retrained) > np.median(unlearned):
        positive, negative = retrained, unlearned
    if np.ptp(positive) >= np.ptp(negative):  # the narrower side is positive; a tie swaps
        positive, negative = negative, positive
    width = positive.max() - positive.min()
    low, high = positive.min() + width - 2, positive.max() + 2
    pairs = []
    for right in np.linspace(low, high, math.ceil((high - low) * 100)):
        left = np.linspace(right - width - 2, right - width + 2, 400)[:, None]
        inside = [((left <= side) & (side <= right)).mean(axis=1) for side in (positive, negative)]
        pairs.append(np.unique(np.stack(inside), axis=1))
    return plain_rates_to_epsilon(*np.concatenate(pairs, axis=1))


def plain_epsilon(unlearned: np.ndarray, retrained: np.ndarray) -> float | None:
    """Of one example; None where no threshold survives."""
    ranges = sorted([np.ptp(unlearned), np.ptp(retrained)])
    if ranges[1] > 0 and ranges[0] / ranges[1] < 0.01:
        return 50.0
    found = [plain_single(unlearned, retrained), plain_interval(unlearned, retrained)]
    found = [epsilon for epsilon in found if epsilon is not None]
    return min(max(found), 50.0) if found else None


def assert_as_plain(unlearned: np.ndarray, retrained: np.ndarray) -> torch.Tensor | None:
    """[runs, examples] each. Returns the epsilons; None where both implementations find no threshold."""
    expected = [plain_epsilon(u, r) for u, r in zip(unlearned.T, retrained.T, strict=True)]
    if None in expected:
        with pytest.raises(ValueError, match=f"no threshold survives for example {expected.index(None)}:"):
            epsilons(torch.from_numpy(unlearned), torch.from_numpy(retrained))
        return None
    found = epsilons(torch.from_numpy(unlearned), torch.from_numpy(retrained))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-9)
    return found


def normal_pools(runs: int, examples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pools that differ by more and more from the first example to the last, in mean and spread."""
    random = np.random.default_rng(seed)
    shift, spread = np.linspace(0, 3, examples), np.linspace(1, 0.5, examples)
    centre = random.normal(0, 4, examples)
    return (
        random.normal(centre, 1.5, (runs, examples)),
        random.normal(centre + shift, 1.5 * spread, (runs, examples)),
    )


# The organisers' results.


@pytest.mark.parametrize("group", GROUPS)
def test_organisers_epsilons(group):
    unlearned, retrained = (torch.from_numpy(CASES[f"{group}_{side}"]) for side in ("unlearned", "retrained"))
    found = epsilons(unlearned, retrained)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), CASES[f"{group}_epsilons"], rtol=0, atol=1e-5)
    assert forgetting_quality(found, len(unlearned)) == CASES[f"{group}_forgetting_quality"]


def test_organisers_confidences():
    logits = torch.from_numpy(CASES["logits"])
    found = logit_scaled_confidence(logits, torch.from_numpy(CASES["targets"]))
    np.testing.assert_allclose(found.numpy(), CASES["confidences"], rtol=0, atol=1e-6)  # float32 logits


@pytest.mark.parametrize("group", GROUPS)
def test_the_plain_implementation_agrees_with_the_organisers_too(group):
    pools = zip(CASES[f"{group}_unlearned"].T, CASES[f"{group}_retrained"].T, strict=True)
    found = [plain_epsilon(unlearned, retrained) for unlearned, retrained in list(pools)[:4]]
    np.testing.assert_allclose(found, CASES[f"{group}_epsilons"][:4], rtol=0, atol=1e-5)


# Against the plain implementation.


@pytest.mark.parametrize("seed", range(4))
def test_64_runs_as_plain(seed):
    found = assert_as_plain(*normal_pools(64, 6, seed))
    assert found.min() > 0 and found.max() > 2


def test_512_runs_as_plain():
    assert_as_plain(*normal_pools(512, 2, 0))


@settings(max_examples=40)
@given(st.data())
def test_small_pools_as_plain(data):
    runs = data.draw(st.integers(2, 9))
    values = data.draw(
        st.sampled_from(
            [
                st.floats(-6, 6),
                st.integers(-12, 12).map(lambda quarter: quarter / 4),  # ties
                st.floats(-0.02, 0.02),  # narrower than the step between thresholds
                st.sampled_from([-103.6163, -40.0, 0.0, 103.6163]),  # saturated
            ]
        )
    )
    pools = arrays(np.float64, (runs, 1), elements=values, fill=st.nothing())
    assert_as_plain(data.draw(pools), data.draw(pools))


def test_ties_as_plain():
    random = np.random.default_rng(1)
    unlearned, retrained = random.integers(-3, 4, (2, 64, 6)).astype(np.float64)
    retrained[:, 3:] += 1
    assert_as_plain(unlearned, retrained)
    # Equal medians and equal ranges, where the side that counts as positive is a matter of definition.
    lopsided = np.array([-2.0, -1.5, 0.0, 0.0, 0.5, 2.0])[:, None] + np.array([0.0, 0.25, 1.0])
    assert_as_plain(lopsided, 2 * np.median(lopsided, axis=0) - lopsided)
    assert_as_plain(2 * np.median(lopsided, axis=0) - lopsided, lopsided)


def test_a_confidence_at_the_right_end_is_inside():
    """The first right end is exactly 0, and only an interval that ends there leaves 0.005 out."""
    narrow, wide = np.array([[0.0] * 7 + [2.0]]).T, np.array([[0.005] * 5 + [-1.0, -8.0, 9.0]]).T
    assert assert_as_plain(narrow, wide).item() == pytest.approx(math.log((7 / 8 - 1e-5) / (1 / 8)), abs=1e-9)
    assert_as_plain(wide, narrow)


def test_perfect_separation_is_the_largest_epsilon():
    unlearned, retrained = normal_pools(64, 4, 2)
    retrained += 30
    assert assert_as_plain(unlearned, retrained).tolist() == [50.0] * 4
    assert assert_as_plain(retrained, unlearned).tolist() == [50.0] * 4
    # Around the other pool on both sides: no single threshold separates them, an interval does.
    inner, outer = np.linspace(-1, 1, 64)[:, None], np.linspace(-1, 1, 64)[:, None]
    outer = outer + np.where(outer > 0, 3.0, -3.0)
    assert assert_as_plain(inner, outer).tolist() == [50.0]
    assert assert_as_plain(outer, inner).tolist() == [50.0]


def test_near_constant_side_is_told_apart_without_a_threshold():
    random = np.random.default_rng(3)
    wide = random.uniform(-5, 5, (64, 1))
    wide[:2, 0] = -5, 5
    wide[2:40, 0] = random.uniform(0, 0.09, 38)  # so that no threshold separates the two
    unit = random.uniform(0, 1, (64, 1))
    unit[:2, 0] = 0, 1
    for width, shortcut in ((0.0, True), (0.09, True), (0.11, False)):
        found = assert_as_plain(unit * width, wide)
        assert (found.item() == 50) == shortcut, width
        assert (assert_as_plain(wide, unit * width).item() == 50) == shortcut, width


def test_two_constants_go_through_the_thresholds():
    """0/0 is not below 0.01: constants that lie apart are separated by a threshold, equal ones by none."""
    assert assert_as_plain(np.zeros((8, 1)), np.ones((8, 1))).item() == 50
    assert assert_as_plain(np.ones((8, 1)), np.zeros((8, 1))).item() == 50
    for value in (0.0, 2.5, 103.6163):
        assert assert_as_plain(np.full((8, 1), value), np.full((8, 1), value)) is None


def test_no_surviving_threshold_names_the_example_and_says_why():
    unlearned, retrained = normal_pools(16, 12, 4)
    unlearned[:, 10] = retrained[:, 10] = 1.25
    with pytest.raises(ValueError) as error:
        epsilons(torch.from_numpy(unlearned), torch.from_numpy(retrained))
    assert "example 10" in str(error.value) and "1.25" in str(error.value)
    assert "every attack has a rate of 0" in str(error.value)


def test_saturated_logits():
    """Probabilities that underflow give the ends of the scale, and pools of them are scored like others."""
    logits = torch.tensor([[0.0, 300.0, -5.0], [300.0, 0.0, -5.0], [3e4, -3e4, 0.0], [1.0, 1.0, -1e30]])
    end = math.log1p(1e-45) - math.log(1e-45)
    found = logit_scaled_confidence(logits, torch.tensor([0, 0, 1, 0]))
    np.testing.assert_allclose(found.numpy(), [-end, end, -end, 0], rtol=0, atol=1e-9)
    random = np.random.default_rng(5)
    logits = torch.from_numpy(random.choice([-400.0, 0.0, 400.0], (2, 64, 3, 4))).float()
    unlearned, retrained = logit_scaled_confidence(logits, torch.tensor([0, 1, 2])).numpy()
    assert np.abs(unlearned).max() > 103
    assert_as_plain(unlearned, retrained)


def test_confidences_as_plain():
    random = np.random.default_rng(6)
    logits, targets = random.normal(0, 8, (5, 7, 10)), random.integers(0, 10, 7)
    found = logit_scaled_confidence(torch.from_numpy(logits), torch.from_numpy(targets))
    assert found.shape == (5, 7) and found.dtype == torch.float64
    for run in range(5):
        for example in range(7):
            p = np.exp(logits[run, example] - logits[run, example].max())
            p /= p.sum()
            right, wrong = p[targets[example]], np.delete(p, targets[example]).sum()
            assert found[run, example] == pytest.approx(math.log(right + 1e-45) - math.log(wrong + 1e-45), abs=1e-9)


# Properties.

pool_pairs = st.integers(2, 24).flatmap(
    lambda runs: st.tuples(*[arrays(np.float64, (runs, 2), elements=st.floats(-104, 104), fill=st.nothing())] * 2)
)


def found_or_none(unlearned: np.ndarray, retrained: np.ndarray) -> torch.Tensor | None:
    try:
        return epsilons(torch.from_numpy(unlearned), torch.from_numpy(retrained))
    except ValueError:
        return None


@settings(max_examples=25)
@given(pool_pairs, st.randoms(use_true_random=False))
def test_the_order_of_runs_does_not_matter(pools, random):
    found = found_or_none(*pools)
    for pool in pools:
        order = list(range(len(pool)))
        random.shuffle(order)
        pool[:] = pool[order]
    again = found_or_none(*pools)
    assert (found is None) == (again is None)
    if found is not None:
        assert torch.equal(found, again)


@settings(max_examples=25)
@given(pool_pairs)
def test_ranges_of_epsilon_and_quality(pools):
    found = found_or_none(*pools)
    assume(found is not None)
    assert ((found >= 0) & (found <= 50)).all()
    assert 0 <= forgetting_quality(found, len(pools[0])) <= 1


@settings(max_examples=25)
@given(pool_pairs)
def test_identical_pools_cannot_be_told_apart(pools):
    pool = pools[0]
    assume(np.ptp(pool, axis=0).min() > 0.1)
    assert found_or_none(pool, pool[::-1].copy()).tolist() == [0, 0]


@given(st.lists(st.floats(0, math.inf), min_size=1), st.integers(2, 5000))
def test_quality_is_within_0_and_1(values, runs):
    assert 0 <= forgetting_quality(torch.tensor(values, dtype=torch.float64), runs) <= 1


def test_the_callers_tensors_stay_as_they_are():
    logits, targets = torch.randn(6, 4, 10), torch.arange(4)
    unlearned, retrained = map(torch.from_numpy, normal_pools(16, 4, 7))
    before = [tensor.clone() for tensor in (logits, targets, unlearned, retrained)]
    logit_scaled_confidence(logits, targets)
    epsilons(unlearned, retrained)
    for tensor, copy in zip((logits, targets, unlearned, retrained), before, strict=True):
        assert torch.equal(tensor, copy)


def test_examples_do_not_depend_on_each_other(monkeypatch):
    """However many are worked on at once, each gives the same bits; progress counts every one of them."""
    unlearned, retrained = map(torch.from_numpy, normal_pools(24, 19, 8))
    retrained[:, 5] += 100  # a wide range, with many more thresholds than its neighbours
    done = []
    together = epsilons(unlearned, retrained, done.append)
    assert sum(done) == 19 and len(done) > 1
    one_by_one = torch.cat([epsilons(unlearned[:, [i]], retrained[:, [i]]) for i in range(19)])
    assert torch.equal(together, one_by_one)
    monkeypatch.setattr(metric, "EXAMPLES_AT_ONCE", 5)
    assert torch.equal(together, epsilons(unlearned, retrained))


def test_float32_confidences_and_no_examples():
    unlearned, retrained = (torch.from_numpy(pool).float() for pool in normal_pools(16, 3, 9))
    assert torch.equal(epsilons(unlearned, retrained), epsilons(unlearned.double(), retrained.double()))
    assert epsilons(torch.empty(4, 0), torch.empty(4, 0)).shape == (0,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the comparison of GPU and CPU needs one")
def test_a_gpu_gives_the_same():
    unlearned, retrained = map(torch.from_numpy, normal_pools(512, 12, 10))
    found = epsilons(unlearned.cuda(), retrained.cuda())
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), epsilons(unlearned, retrained), rtol=0, atol=1e-9)
    logits = torch.from_numpy(CASES["logits"]).cuda()
    confidences = logit_scaled_confidence(logits, torch.from_numpy(CASES["targets"]).cuda())
    np.testing.assert_allclose(confidences.cpu().numpy(), CASES["confidences"], rtol=0, atol=1e-5)


# Quality and score.


@pytest.mark.parametrize(
    "epsilon, runs, expected",
    [
        (0.0, 512, 1),
        (0.4999999, 512, 1),
        (0.5, 512, 2**-1),
        (0.9999999, 512, 2**-1),
        (1.0, 512, 2**-2),
        (6.2364, 512, 2**-12),  # the largest finite epsilon, in the 13th bin
        (6.9999999, 512, 2**-13),  # the 14th and last
        (7.0, 512, 0),
        (50.0, 512, 0),
        (math.inf, 512, 0),
        (4.9999999, 64, 2**-9),  # 10 bins at 64
        (5.0, 64, 0),
        (0.4, 3, 1),  # 2 bins at 3
        (1.0, 3, 0),
        (0.0, 2, 0),  # none at 2
    ],
)
def test_quality_of_one_epsilon(epsilon, runs, expected):
    assert forgetting_quality(torch.tensor([epsilon], dtype=torch.float64), runs) == expected


def test_the_largest_finite_epsilon_of_512_runs():
    table = metric.epsilon_table(512)
    assert table[table.isfinite()].max().item() == pytest.approx(6.2364, abs=5e-5)


def test_quality_is_a_mean():
    assert forgetting_quality(torch.tensor([0.0, 0.7, 50.0, 2.2], dtype=torch.float64), 512) == (1 + 0.5 + 0 + 2**-4) / 4


def test_score():
    assert competition_score(0.08, 0.99, 1.0, 0.9, 0.96) == pytest.approx(0.08 * 0.99 * 0.9 / 0.96, abs=1e-15)
    # Averaged before dividing, and a ratio above 1 is kept.
    ra = torch.tensor([1.0, 0.5]), torch.tensor([0.25, 0.75])
    ta = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    assert competition_score(0.5, ra[0], ra[1], ta[0], ta[1]) == 0.5 * 1.5 * 1.0


# What cannot be scored.


@pytest.mark.parametrize(
    "unlearned, retrained, words",
    [
        (torch.zeros(4, 3), torch.zeros(5, 3), r"\[4, 3\] and \[5, 3\]"),
        (torch.zeros(4, 3), torch.zeros(4, 2), r"\[4, 3\] and \[4, 2\]"),
        (torch.zeros(4), torch.zeros(4), r"\[runs, examples\]"),
        (torch.zeros(1, 3), torch.zeros(1, 3), "at least 2 runs, not 1"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "at least 2 runs, not 0"),
    ],
)
def test_shapes_that_do_not_fit(unlearned, retrained, words):
    with pytest.raises(ValueError, match=words):
        epsilons(unlearned, retrained)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_no_number_is_named(value, side):
    pools = [torch.from_numpy(pool) for pool in normal_pools(8, 5, 11)]
    pools[side][6, 3] = value
    with pytest.raises(ValueError, match=f"{('unlearned', 'retrained')[side]} confidence of example 3 in run 6 is {value}"):
        epsilons(*pools)
