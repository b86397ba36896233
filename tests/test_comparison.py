"""Methods compared example by example, and by several judges."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from evaluator.comparison import compare, rank_correlations, winners


def test_what_each_example_earns():
    ids = pd.DataFrame({"image_id": ["1-1", "1-2", "1-3"], "age_group": [0, 1, 2]})
    found = compare(ids.assign(epsilon=[0.2, 1.2, 50.0]), ids.assign(epsilon=[0.7, 0.1, 40.0]), ("a", "b"), 512)
    assert (found.better, found.worse) == (1, 1) and str(found) == "1 of 3 examples earn more, 1 less"
    rows = found.examples.set_index("image_id")
    assert list(rows.index) == ["1-2", "1-1", "1-3"]  # what changed most first
    assert rows["earns, a"].to_dict() == {"1-2": 0.25, "1-1": 1.0, "1-3": 0.0}
    assert rows["earns, b"].to_dict() == {"1-2": 1.0, "1-1": 0.5, "1-3": 0.0}
    assert rows.loc["1-3", ["epsilon, a", "epsilon, b"]].tolist() == [50.0, 40.0]


TABLE = pd.DataFrame(
    {
        "score": [0.1, 0.05, 0.0, 0.02],
        "F": [0.1, 0.06, 0.0, 0.02],
        "AUC": [0.6, 0.7, 0.9, 0.8],
        "KLoM": [3.0, 0.2, 0.2, 5.0],
        "U-LiRA": [0.6, np.nan, 0.5, 0.7],
    },
    index=["a", "b", "c", "d"],
)


def test_rank_correlations_are_scipys():
    found = rank_correlations(TABLE)
    assert found.loc["score", "F"] == found.loc["score", "AUC"] == found.loc["F", "AUC"] == pytest.approx(1)
    for one, other in itertools.product(TABLE, repeat=2):
        both = TABLE[[one, other]].dropna().to_numpy()
        sign = (-1) ** ((one in ("score", "F")) != (other in ("score", "F")))
        assert found.loc[one, other] == pytest.approx(sign * spearmanr(both[:, 0], both[:, 1]).statistic)
    assert found.loc["score", "U-LiRA"] == pytest.approx(-0.5)
    nothing = rank_correlations(TABLE.assign(AUC=0.5, KLoM=[1.0, np.nan, np.nan, np.nan])).loc["score", ["AUC", "KLoM"]]
    assert nothing.isna().all()
    assert rank_correlations(TABLE[:1]).isna().all(axis=None)
    with pytest.raises(ValueError, match="good"):
        rank_correlations(TABLE.assign(AUC="good"))


def test_winners_are_named_by_judge():
    assert winners(TABLE) == "by score, F, AUC: a; by KLoM: b and c; by U-LiRA: c"
    assert winners(TABLE[["score", "F"]]) == "by every judge: a"
    assert winners(TABLE.assign(F=np.nan)[["score", "F"]]) == "by score: a"
    assert winners(TABLE[:0]) == "by no judge: no method has a value"
