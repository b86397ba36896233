"""Means over forget sets, and the sentences about them."""

import math

import pandas as pd
import pytest
import scipy.stats

from evaluator import forget_sets
from evaluator.files import Problem

SCORES = {"a": [0.05, 0.07, 0.09], "b": [0.01, 0.02, 0.03]}
CEILINGS = [0.18, 0.2, 0.22]


def summary(method: str, split: str, score: float, **fields) -> dict:
    accuracies = dict(ra_unlearned=0.9, ra_retrained=1.0, ta_unlearned=0.8, ta_retrained=0.8)
    costs = dict(seconds_per_run=1.0, fraction_of_retraining=0.1)
    place = dict(method=method, split=split, runs=8, forget_examples=100)
    return place | accuracies | costs | dict(score=score, forgetting_quality=score / 0.9) | fields


def table(**changes) -> pd.DataFrame:
    equal = dict.fromkeys(("ra_unlearned", "ra_retrained", "ta_unlearned", "ta_retrained"), 1.0)
    tables = []
    for number, ceiling in enumerate(CEILINGS):
        rows = [summary(method, f"private-{number}", scores[number]) for method, scores in SCORES.items()]
        top = {"method": "(ceiling, estimated)", "score": ceiling, "forgetting_quality": ceiling, **equal}
        tables.append(forget_sets.per_set(rows, top))
    return pd.concat(tables)


def test_means_and_standard_errors():
    means = forget_sets.over_sets(table()).set_index("method")
    assert list(means.index) == ["a", "b", "(ceiling, estimated)"]
    for method, scores in SCORES.items():
        row = means.loc[method]
        assert row.score == pytest.approx(sum(scores) / 3)
        assert row.standard_error == pytest.approx(scipy.stats.sem(scores))
        interval = scipy.stats.t.interval(0.95, 2, row.score, row.standard_error)
        assert (row.low, row.high) == pytest.approx(interval)
        assert row.of_ceiling == pytest.approx(row.score / 0.2)
        assert row.forgetting_quality == pytest.approx(row.score / 0.9)
    text = forget_sets.as_text(means.reset_index())
    assert text.score[0] == "0.0700 ± 0.0115" and text["of ceiling"][0] == "35%" and text["RA_U/RA_R"][0] == "0.9000"
    assert text["share of retraining cost"].tolist() == ["10%", "10%", ""]
    assert forget_sets.title("digits", table()) == (
        "digits: 3 forget sets (private-0, private-1, private-2) of 100 examples, 8 runs"
    )


def test_what_cannot_be_averaged():
    other = table()
    other.loc[(other.method == "b") & (other.split == "private-1"), "runs"] = 64
    with pytest.raises(Problem, match=r"different numbers of runs .* a on private-0 has 8, b on private-1 has 64"):
        forget_sets.over_sets(other)
    missing = table().query("not (method == 'b' and split == 'private-2')")
    with pytest.raises(Problem, match="b: has no score on private-2"):
        forget_sets.over_sets(missing)


def test_one_set_has_no_error_over_sets():
    means = forget_sets.over_sets(table().query("split == 'private-0'"))
    assert means.standard_error.map(math.isnan).all()
    assert forget_sets.as_text(means)["95% interval"].eq("").all()  # too few runs for one


def test_one_set_has_the_interval_of_its_runs():
    rows = [summary(method, "public", 0.06, score_interval=(0.05, 0.07 + number)) for number, method in enumerate("ab")]
    equal = dict.fromkeys(("ra_unlearned", "ra_retrained", "ta_unlearned", "ta_retrained"), 1.0)
    one = forget_sets.per_set(rows, {"method": "(ceiling, estimated)", "score": 0.2, "forgetting_quality": 0.2, **equal})
    text = forget_sets.as_text(forget_sets.over_sets(one))
    assert text["95% interval"].tolist() == ["0.0500 to 0.0700", "0.0500 to 1.0700", ""]
    assert text.score.tolist() == ["0.0600", "0.0600", "0.2000"]


def test_differences_over_sets_are_paired():
    sides = {
        method: [summary(method, f"private-{number}", score) for number, score in enumerate(scores)]
        for method, scores in SCORES.items()
    }
    found = forget_sets.compared(sides["a"], sides["b"])
    differences = [a - b for a, b in zip(*SCORES.values(), strict=True)]
    wanted = scipy.stats.t.interval(0.95, 2, sum(differences) / 3, scipy.stats.sem(differences))
    assert found.value == pytest.approx(0.05) and (found.low, found.high) == pytest.approx(wanted)
    (sentence,) = forget_sets.verdicts([sides["b"], sides["a"]])
    assert sentence.startswith("a beats b by 0.05")


def test_differences_on_one_set_come_from_the_half_samples():
    draws = {"a": [0.055, 0.065, 0.06, 0.06], "b": [0.005, 0.015, 0.01, 0.01]}  # the same halves: b is a less 0.05
    sides = {
        method: [summary(method, "public", score, half_samples={"score": draws[method]})]
        for method, score in (("a", 0.06), ("b", 0.01))
    }
    found = forget_sets.compared(sides["a"], sides["b"])
    assert found.value == pytest.approx(0.05)
    assert found.low == pytest.approx(0.05, abs=1e-6) and found.high == pytest.approx(0.05, abs=1e-6)
