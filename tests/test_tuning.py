"""The search for hyperparameters, on one forget set and on several; its budget; hyperparameters tried by hand."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import scipy

import evaluate
from benchmarks import tuning_budget
from evaluator import tuning
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem, write_json
from evaluator.method import Diverged, Method
from evaluator.tries import Tries

FILES = [HERE / "unlearning.py", *sorted((HERE / "methods").glob("*.py"))]

METHOD = """
import time
from dataclasses import dataclass
from typing import Annotated
import torch

@dataclass(frozen=True)
class Config:
    noise: Annotated[float, (1e-4, 1.0, "log")] = 0.5
    busy: Annotated[float, {busy}] = {first}  # seconds
    power: Annotated[float, {power}] = 1.0

def unlearning(net, retain_loader, forget_loader, val_loader, config=Config()):
    until = time.process_time() + config.busy
    while time.process_time() < until:
        pass
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += config.noise * torch.randn(parameter.shape)
        net.fc.bias *= config.power
    net.eval()
"""


@pytest.fixture
def evaluation(data, results) -> Evaluation:
    return Evaluation.of(str(data), runs=4, results=results, jobs=1, device="cpu")


@pytest.fixture
def evaluations(evaluation) -> list[Evaluation]:
    """Two forget sets."""
    return [dataclasses.replace(evaluation, split=split) for split in ("public", "private")]


def diverge() -> None:
    raise Diverged("not finite")


def method(tmp_path: Path, busy: str = "[0.0]", first: float = 0.0, power: str = "[1.0]") -> Method:
    path = tmp_path / "tried.py"
    path.write_text(METHOD.format(busy=busy, first=first, power=power))
    return Method.read(path)


def trials(evaluation: Evaluation) -> list:
    journal = evaluation.results / "tuning" / "tried.journal"
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_method_says_what_may_be_tried(path):
    read = Method.read(path)
    space = read.search_space
    assert space or path.stem == "shrink_perturb"  # whose values follow from what is at hand
    for name, allowed in space.items():
        if isinstance(allowed, tuple):
            assert allowed[0] < allowed[1] and allowed[2:] in ((), ("log",)), name
    # Values from both ends make a Config, of the types that the fields have.
    for end in (0, 1):
        fixed = {
            name: (len(allowed) - 1 if end else 0) if isinstance(allowed, list) else allowed[end]
            for name, allowed in space.items()
        }
        values = tuning.suggest(optuna.trial.FixedTrial(fixed), read)
        assert Method.read(path, values=values).config == read.config | values  # of the fields' types, and allowed


def test_a_method_without_ranges_is_used_as_it_is(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "tuned_file", lambda name: tmp_path / "tuned.json")
    path = tuning.HERE / "methods" / "shrink_perturb.py"
    assert tuning.tuned_values(path, "digits") == {}
    with pytest.raises(Problem, match=r"finetune\.py: has not been tuned on digits"):
        tuning.tuned_values(path.with_name("finetune.py"), "digits")
    assert tuning.main([str(path), "--data", str(data), "--results", str(tmp_path)]) == 0
    assert "shrink_perturb.py: no field of its Config has a range to search: it is used as it is" in capsys.readouterr().out
    assert not (tmp_path / "tuned.json").exists()


def test_values_are_drawn_from_the_ranges():
    read = Method.read(HERE / "unlearning.py")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [tuning.suggest(study.ask(), read) for _ in range(100)]
    assert {values["tensors"] for values in drawn} == set(range(2, 17))
    assert {values["loss"] for values in drawn} == {"mse", "ce"}
    rates = [rate for values in drawn for rate in values["learning_rates"]]
    assert len(rates) == 100 and 5e-3 <= min(rates) < 1e-2 and 1e-1 < max(rates) <= 2e-1
    assert 0.3 < sum(rate < math.sqrt(5e-3 * 2e-1) for rate in rates) / 100 < 0.7  # logarithmic
    assert all(float(f"{rate:.3g}") == rate for rate in rates)


FOUR_KINDS_OF_RANGES = """from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Config:
    tensors: Annotated[int, (2, 16)] = 6
    epochs: Annotated[float, (0.2, 4.0)] = 10
    forget_epochs: Annotated[int, (1, 4)] = 1
    cycle_epochs: Annotated[tuple[float, ...], [(2,), (1, 1)]] = (1, 1)


def unlearning(net, retain_loader, forget_loader, val_loader, config=Config()): ...
"""


def test_ranges_of_epochs_fit_the_length_of_a_retraining(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(FOUR_KINDS_OF_RANGES)
    read = Method.read(file)
    assert tuning.fitted(read, tuning.EPOCHS) == read
    short = tuning.fitted(read, 3)
    assert short.search_space == {
        "tensors": (2, 16),
        "epochs": (0.05, 1.0),
        "forget_epochs": (1, 1),
        "cycle_epochs": [(0.5,), (0.25, 0.25)],
    }
    assert tuning.fitted(read, 30).search_space["epochs"] == (0.5, 10.0)
    # The default that is too long is moved to the range's end; the choice that is no longer there is drawn.
    assert tuning._setting(short, short.defaults) == {"tensors": 6, "epochs": 1.0, "forget_epochs": 1}


def test_the_search_begins_with_what_was_published(evaluation, tmp_path):
    """As it is, and with a rate that makes up for the smaller number of steps."""
    file = method(tmp_path).path
    file.write_text(file.read_text().replace("noise", "noise_rate").replace("= 0.5", "= 0.001"))
    tuning.tune([evaluation], Method.read(file), trials=2)
    steps = -(-len(evaluation.data.retain) // evaluation.recipe.batch_size)
    assert [trial.params["noise_rate"] for trial in trials(evaluation)] == [0.001, pytest.approx(0.001 * 550 / steps)]


def test_the_best_of_the_tried(evaluation, tmp_path):
    tried = method(tmp_path)
    found = tuning.tune([evaluation], tried, trials=5)
    made = trials(evaluation)
    assert len(made) == 5 and made[0].params["noise"] == 0.5  # its own setting comes first
    assert found["trials"] == "5 at N = 4, 4 of them at N = 16" and found["runs"] == 16
    longer = dataclasses.replace(evaluation, runs=16)
    finalists = sorted(made, key=lambda trial: -trial.value)[:4]
    scores = [longer.score(dataclasses.replace(tried, config=trial.user_attrs["config"]))["score"] for trial in finalists]
    assert found["score"] == max(scores)  # what evaluate.py --tuned will say at the same N
    assert found["config"] == finalists[scores.index(max(scores))].user_attrs["config"]


def test_the_mean_over_forget_sets(evaluations, tmp_path):
    tried = method(tmp_path)
    found = tuning.tune(evaluations, tried, trials=2)
    assert found["trials"] == "2 at N = 4 on 2 forget sets, 2 of them at N = 16" and found["forget_sets"] == 2
    made = trials(evaluations[0])
    first = dataclasses.replace(tried, config=made[0].user_attrs["config"])
    assert made[0].value == statistics.fmean(evaluation.score(first)["score"] for evaluation in evaluations)
    best = dataclasses.replace(tried, config=found["config"])
    longer = [dataclasses.replace(evaluation, runs=16) for evaluation in evaluations]
    assert found["scores"] == {evaluation.split: evaluation.score(best)["score"] for evaluation in longer}
    assert found["score"] == statistics.fmean(found["scores"].values())


def test_what_goes_wrong_on_one_forget_set(evaluations, tmp_path):
    """A network that diverges there rejects the setting; any other error ends the search, and names the split."""
    code = METHOD.format(busy="[0.0]", first=0.0, power="[1.0, 2.0, 3.0]")
    where = f"if config.power == 1.0 and len(forget_loader.dataset) == {len(evaluations[1].data.forget)}:"
    path = tmp_path / "tried.py"
    path.write_text(code.replace("net.eval()", f"net.eval()\n    {where}\n        net.fc.bias.data.fill_(float('nan'))"))
    assert len(evaluations[0].data.forget) != len(evaluations[1].data.forget)
    found = tuning.tune(evaluations, Method.read(path), trials=2)
    assert found["rejected"] >= 1 and found["config"]["power"] > 1.0 and set(found["scores"]) == {"public", "private"}
    path.write_text(code.replace("net.eval()", f"net.eval()\n    {where}\n        raise RuntimeError('too much')"))
    with pytest.raises(Problem, match=r"^split private: .*tried\.py: runs? .*too much"):
        tuning.scores(evaluations, Method.read(path))


def test_finalists_that_all_diverge(evaluation, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "scores", lambda each, tried: diverge() if each[0].runs == 16 else {"public": 0.1})
    with pytest.raises(Problem, match=r"tried\.py: each of the best 2 settings diverges at N = 16"):
        tuning.tune([evaluation], method(tmp_path), trials=2)


def test_it_goes_on_where_it_was_cut_off(evaluation, small_digits, tmp_path, monkeypatch):
    score, calls = tuning.scores, []

    def cut_off(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*arguments)

    tried = method(tmp_path)
    monkeypatch.setattr(tuning, "scores", cut_off)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune([evaluation], tried, trials=5)
    found = tuning.tune([evaluation], tried, trials=5)
    assert len(calls) == 6 + 4  # the two that were finished are not scored again
    other = Evaluation.of(str(small_digits), runs=4, results=tmp_path / "undisturbed", jobs=1, device="cpu")
    undisturbed = tuning.tune([other], tried, trials=5)
    assert {**found, "fraction_of_retraining": 0} == {**undisturbed, "fraction_of_retraining": 0}
    assert tuning.tune([evaluation], tried, trials=5) == found and len(calls) == 19  # a repeat only reads


def test_a_search_is_of_what_could_change_a_score(evaluation, evaluations, tmp_path, monkeypatch):
    """Its code, the values that are not searched, N, the forget sets, the original, the scoring code: each change begins
    another search."""
    tried = method(tmp_path)
    names = [tuning._study([evaluation], tried).study_name for _ in range(2)]
    names.append(tuning._study([evaluation], dataclasses.replace(tried, config=tried.config | {"power": 0.5})).study_name)
    names.append(tuning._study([evaluation], dataclasses.replace(tried, digest="another")).study_name)
    names.append(tuning._study([dataclasses.replace(evaluation, runs=5)], tried).study_name)
    names.append(tuning._study(evaluations, tried).study_name)
    with monkeypatch.context() as changed:
        changed.setattr(tuning, "VERSION", "another")
        names.append(tuning._study([evaluation], tried).study_name)
    with monkeypatch.context() as changed:
        changed.setattr(tuning, "network_digest", lambda original: "another")
        names.append(tuning._study([evaluation], tried).study_name)
    assert names[0] == names[1] and len(set(names)) == 7


def test_a_setting_over_the_cost_limit_is_rejected(evaluation, tmp_path):
    found = tuning.tune([evaluation], method(tmp_path, busy="[3.0, 0.0]", first=3.0), trials=2)
    assert found["config"]["busy"] == 0.0 and found["fraction_of_retraining"] < 0.2
    assert found["trials"].startswith("2 at") and found["rejected"] >= 1


def test_no_setting_within_the_limit(evaluation, tmp_path):
    with pytest.raises(Problem, match=r"tried\.py: every setting tried costs more than 20%"):
        tuning.tune([evaluation], method(tmp_path, busy="[2.0]", first=2.0), trials=1)


def test_a_setting_that_diverges_is_rejected(evaluation, tmp_path):
    found = tuning.tune([evaluation], method(tmp_path, power="[float('inf'), 1.0]"), trials=3)
    assert found["config"]["power"] == 1.0 and found["trials"].startswith("3 at")


def test_the_command_writes_what_tuned_reads(small_digits, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "tuned.json"
    monkeypatch.setattr(tuning, "tuned_file", lambda data: kept)
    write_json(kept, {"another": {"score": 1.0}})
    path = method(tmp_path).path
    common = ["--data", str(small_digits), "--runs", "4", "--jobs", "1", "--device", "cpu", "--results", str(tmp_path)]
    assert tuning.main([str(path), "--trials", "3", *common]) == 0
    assert "tried: score" in capsys.readouterr().out
    written = json.loads(kept.read_text())
    assert set(written) == {"another", "tried"} and written["tried"]["trials"].startswith("3 at")
    assert evaluate.main([str(path), "--tuned", *common, "--runs", "16"]) == 0
    summary = json.loads((tmp_path / "small_digits" / "public" / "tried" / "summary.json").read_text())
    assert summary["config"] == written["tried"]["config"] and summary["score"] == written["tried"]["score"]


# The budget


def test_ways_to_spend_the_runs():
    assert tuning_budget.ways(64, 6) == [
        *((64, 1), (32, 2), (21, 3), (16, 4), (11, 6)),
        *((128, 1), (64, 2), (43, 3), (32, 4), (21, 6)),
    ]
    assert tuning_budget.ways(64, 2) == [(64, 1), (32, 2), (128, 1), (64, 2)]
    assert tuning_budget.ways(4, 6) == [(4, 1), (8, 1), (4, 2), (3, 3)]  # N = 2 tells nothing


def budget_scores(noise: float, of_a_set: float, seed: int = 0) -> tuple[pd.DataFrame, pd.Series]:
    """Made-up scores of eight methods on four forget sets, four groups of runs each, at N = 8: truth + noise."""
    draw = np.random.default_rng(seed)
    truth = pd.Series(np.linspace(0.01, 0.08, 8), [f"m{n}" for n in range(8)])
    index = pd.MultiIndex.from_product([[8], ["a", "b", "c", "d"], range(4)], names=["N", "split", "group"])
    sets = np.repeat(draw.normal(0, of_a_set, (4, 8)), 4, axis=0)
    return pd.DataFrame(truth.to_numpy() + sets + draw.normal(0, noise, (16, 8)), index, truth.index), truth


def test_a_budget_without_noise_ranks_perfectly():
    table = tuning_budget.compare(*budget_scores(0, 0), [(8, 1), (8, 4)])
    assert np.allclose(table["rank correlation"], 1) and np.allclose(table.loss, 0)
    assert table.runs.tolist() == [8, 32] and table.possible.tolist() == [16, 256]


def test_more_forget_sets_rank_better_where_they_differ():
    one, four = tuning_budget.compare(*budget_scores(0.001, 0.05), [(8, 1), (8, 4)]).itertuples()
    assert four[4] > one[4] + 0.1 and four.loss < one.loss


def test_the_rank_correlation_is_spearmans():
    """And the loss that of the highest mean, with one group of each forget set: there is one draw."""
    scores, truth = budget_scores(0.03, 0.01)
    found = tuning_budget.judged(scores.to_numpy().reshape(16, 1, 8), truth.to_numpy(), 16)
    assert np.allclose(found[0], scipy.stats.spearmanr(scores.mean(), truth).statistic)
    assert np.allclose(found[1], truth.max() - truth[scores.mean().idxmax()])


def test_equal_scores_choose_nothing():
    scores, truth = budget_scores(0, 0)
    (row,) = tuning_budget.compare(scores * 0, truth, [(8, 2)]).itertuples()
    assert row[4] == 0 and row.loss == pytest.approx(truth.max() - truth.mean())


@pytest.fixture
def kept_budget(data, results, monkeypatch) -> list[str]:
    """Arguments for three methods, with 4 runs on each of two forget sets."""
    paths = [HERE / "methods" / f"{name}.py" for name in ("finetune", "negrad", "random_labels")]
    monkeypatch.setattr(tuning_budget, "tuned_values", lambda path, name: {})
    for split in ("public", "private"):
        evaluation = Evaluation.of(str(data), split, 4, results, jobs=1, device="cpu")
        for path in paths:
            evaluation.unlearned(Method.read(path))
    common = ["--data", str(data), "--results", str(results), "--jobs", "1", "--device", "cpu"]
    return [*map(str, paths), *common]


def test_the_budget_reads_what_is_kept(kept_budget, results, capsys):
    before = sorted(results.rglob("run_*.npz"))
    assert tuning_budget.main([*kept_budget, "--runs", "4", "--tune-on", "p*[ec]", "--report-on", "private"]) == 0
    printed = capsys.readouterr().out
    assert "small_digits: 3 methods, 2 forget sets to choose on with 4 runs each" in printed
    assert "1 others at N = 4" in printed and "left out: 8 x 1, which needs 8 kept runs" in printed
    assert tuning_budget.main([*kept_budget, "--runs", "12"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "finetune" in error and "4 of 12 runs are kept; make them with: python evaluate.py" in error
    assert "--runs 12 --split 'public*'" in error and sorted(results.rglob("run_*.npz")) == before


def test_a_budget_needs_methods(data, results, capsys):
    assert tuning_budget.main([str(HERE / "unlearning.py"), "--data", str(data), "--results", str(results)]) == 1
    assert "a ranking needs at least 3 methods" in capsys.readouterr().err


# By hand


@pytest.fixture
def tries(evaluation) -> Tries:
    return Tries(evaluation)


def test_a_try_can_be_made_again(tries, tmp_path):
    tried = method(tmp_path).path
    tries.add(tried, {"noise": 0.1})
    tries.add(tried, {"noise": 0.2, "power": 0.5})
    table = tries.table
    assert table["try"].tolist() == [1, 2] and table.changes.tolist() == ["noise = 0.1", "noise = 0.2, power = 0.5"]
    assert pd.to_datetime(table.date).dt.tz is not None
    tries.add(tried, json.loads(table.config[0]))
    again = tries.table
    assert again["kept in"].tolist() == [*table["kept in"], table["kept in"][0]] and again.score[2] == pytest.approx(
        again.score[0]
    )
    pd.testing.assert_frame_equal(again.head(2), table)  # earlier rows are not rewritten otherwise


def test_an_older_table_is_still_read(tries, tmp_path):
    tried = method(tmp_path).path
    tries.add(tried, {})
    tries.table.drop(columns=["date", "config"]).assign(note="mine").to_csv(tries.file, index=False)
    assert tries.table.date.isna().all() and tries.table.config.isna().all()
    tries.add(tried, {"noise": 0.1})
    table = tries.table
    assert table.note.tolist()[:1] == ["mine"] and table.date.notna().tolist() == [False, True]
    assert tries.overview()["try"].tolist() == [1, 2] and tries.last_two() == [1, 2]


def test_two_tries_example_by_example(tries, tmp_path):
    tried = method(tmp_path).path
    for noise in (0.02, 0.1):
        tries.add(tried, {"noise": noise})
    (change, compared), scores = tries.compare(1, 2), tries.table.score
    assert change.value == pytest.approx(scores[1] - scores[0])
    assert sorted(compared.examples.image_id) == sorted(tries.evaluation.data.forget.image_ids)
    before, after = compared.examples["earns, try 1"], compared.examples["earns, try 2"]
    assert (compared.better, compared.worse) == ((after > before).sum(), (after < before).sum())
    assert (after - before).abs().is_monotonic_decreasing and compared.better + compared.worse > 0
    for number, column in ((0, before), (1, after)):
        assert column.mean() == pytest.approx(tries.table.F[number])
    back, reversed_ = tries.compare(2, 1)
    assert back.value == -change.value and (reversed_.better, reversed_.worse) == (compared.worse, compared.better)
    with pytest.raises(Problem, match="try 2 cannot be compared with itself"):
        tries.compare(2, 2)
    assert tries.overview().best.eq("* best at this N").tolist() == (scores == scores.max()).tolist()


def test_an_interval_needs_runs(evaluation, tmp_path):
    tries = Tries(dataclasses.replace(evaluation, runs=8))
    tried = method(tmp_path).path
    for noise in (0.01, 0.05):
        tries.add(tried, {"noise": noise})
    change, _ = tries.compare(1, 2)
    assert change.low <= change.value <= change.high
    few = Tries(evaluation)
    for noise in (0.01, 0.05):
        few.add(tried, {"noise": noise})
    assert math.isnan(few.compare(3, 4)[0].low)
    with pytest.raises(Problem, match=r"tries\.csv: try 1 has N = 8, try 3 N = 4: such scores cannot be compared"):
        few.compare(1, 3)
    with pytest.raises(Problem, match=r"tries\.csv: no try 7; there are 1, 2, 3, 4"):
        few.compare(1, 7)


def test_tries_whose_runs_are_gone_or_of_other_data(tries, tmp_path):
    tried = method(tmp_path).path
    for noise in (0.01, 0.05):
        tries.add(tried, {"noise": noise})
    other = dataclasses.replace(tries.evaluation, split="private")
    (other.results / "tuning").mkdir(parents=True)
    for file in ("tries.csv", *(f"tuning/{kept}" for kept in tries.table["kept in"])):
        (other.results / file).symlink_to(tries.evaluation.results / file)
    with pytest.raises(Problem, match=r"tries\.csv: try 1 was made with other data; delete the file"):
        Tries(other).compare(1, 2)
    kept = tries.evaluation.results / "tuning" / tries.table["kept in"][1]
    (kept / "made_from.json").unlink()
    with pytest.raises(Problem, match="damaged or gone"):
        tries.compare(1, 2)
