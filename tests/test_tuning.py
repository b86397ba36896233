"""The search for hyperparameters: what it may try, what it rejects, that it goes on where it was cut off."""

import dataclasses
import json
import math
from pathlib import Path

import optuna
import pytest

import evaluate
from evaluator import tuning
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem, write_json
from evaluator.method import Method

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
    assert space
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


def test_the_best_of_the_tried(evaluation, tmp_path):
    tried = method(tmp_path)
    found = tuning.tune(evaluation, tried, trials=5)
    made = trials(evaluation)
    assert len(made) == 5 and made[0].params["noise"] == 0.5  # its own setting comes first
    assert found["trials"] == "5 at N = 4, 4 of them at N = 16" and found["runs"] == 16
    longer = dataclasses.replace(evaluation, runs=16)
    finalists = sorted(made, key=lambda trial: -trial.value)[:4]
    scores = [longer.score(dataclasses.replace(tried, config=trial.user_attrs["config"]))["score"] for trial in finalists]
    assert found["score"] == max(scores)  # what evaluate.py --tuned will say at the same N
    assert found["config"] == finalists[scores.index(max(scores))].user_attrs["config"]


def test_it_goes_on_where_it_was_cut_off(evaluation, small_digits, tmp_path, monkeypatch):
    score, calls = tuning._score, []

    def cut_off(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*arguments)

    tried = method(tmp_path)
    monkeypatch.setattr(tuning, "_score", cut_off)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(evaluation, tried, trials=5)
    found = tuning.tune(evaluation, tried, trials=5)
    assert len(calls) == 6 + 4  # the two that were finished are not scored again
    other = Evaluation.of(str(small_digits), runs=4, results=tmp_path / "undisturbed", jobs=1, device="cpu")
    undisturbed = tuning.tune(other, tried, trials=5)
    assert {**found, "fraction_of_retraining": 0} == {**undisturbed, "fraction_of_retraining": 0}
    assert tuning.tune(evaluation, tried, trials=5) == found and len(calls) == 19  # a repeat only reads


def test_a_search_is_of_what_could_change_a_score(evaluation, tmp_path, monkeypatch):
    """Its code, the values that are not searched, N, the original, the scoring code: each change begins another search."""
    tried = method(tmp_path)
    names = [tuning._study(evaluation, tried).study_name for _ in range(2)]
    names.append(tuning._study(evaluation, dataclasses.replace(tried, config=tried.config | {"power": 0.5})).study_name)
    names.append(tuning._study(evaluation, dataclasses.replace(tried, digest="another")).study_name)
    names.append(tuning._study(dataclasses.replace(evaluation, runs=5), tried).study_name)
    with monkeypatch.context() as changed:
        changed.setattr(tuning, "VERSION", "another")
        names.append(tuning._study(evaluation, tried).study_name)
    with monkeypatch.context() as changed:
        changed.setattr(tuning, "network_digest", lambda original: "another")
        names.append(tuning._study(evaluation, tried).study_name)
    assert names[0] == names[1] and len(set(names)) == 6


def test_a_setting_over_the_cost_limit_is_rejected(evaluation, tmp_path):
    found = tuning.tune(evaluation, method(tmp_path, busy="[3.0, 0.0]", first=3.0), trials=2)
    assert found["config"]["busy"] == 0.0 and found["fraction_of_retraining"] < 0.2
    assert found["trials"].startswith("2 at") and found["rejected"] >= 1


def test_no_setting_within_the_limit(evaluation, tmp_path):
    with pytest.raises(Problem, match=r"tried\.py: every setting tried costs more than 20%"):
        tuning.tune(evaluation, method(tmp_path, busy="[2.0]", first=2.0), trials=1)


def test_a_setting_that_diverges_is_rejected(evaluation, tmp_path):
    found = tuning.tune(evaluation, method(tmp_path, power="[float('inf'), 1.0]"), trials=3)
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
