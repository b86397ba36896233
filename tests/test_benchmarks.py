"""The ladder, the leaderboard and the speed with few runs; what they write is what was scored, or measured."""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks import (
    bench,
    evaluation,
    experiments,
    gpu,
    ladder,
    leaderboard,
    originals,
    profile_training,
    scaling,
    yardsticks,
)
from evaluator import forget_sets, tuning
from evaluator.ensemble import Ensemble
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem, write_json
from evaluator.method import NO_UNLEARNING, Diverged, Method
from evaluator.metric import epsilons
from evaluator.models import network_digest


def test_every_row_of_the_ladder(data, results):
    evaluation = Evaluation.of(str(data), runs=4, results=results, jobs=1, device="cpu")
    method = Method.read(HERE / "unlearning.py", "digits")
    table = ladder.ladder(evaluation, method).set_index("row")
    assert len(table) == 25
    assert table.here.nunique() > 8 and table.F.between(0, 1).all()
    parts = table.F * table["RA_U/RA_R"] * table["TA_U/TA_R"]
    assert table.here.to_numpy() == pytest.approx(parts.to_numpy())
    # The first six add one thing each, up to the preset itself; rows that name one setting are one result.
    assert table.here["+ fc and shortcuts excluded"] == evaluation.score(method)["score"]
    assert table.here["+ MSE to the original's logits"] == table.here["loss: MSE"] == table.here["cycles: 1"]
    for column in ("here", "published"):
        assert table[f"{column} / fine-tune"]["fine-tune"] == 1


def test_rows_of_the_ladder_change_only_what_they_name():
    preset = Method.read(HERE / "unlearning.py", "digits").config
    rows = {name: preset | values for name, (_, values) in ladder.rows(preset).items()}

    def differs(first: str, second: str) -> set[str]:
        return {field for field in preset if rows[first][field] != rows[second][field]}

    assert differs("fine-tune", "+ random re-initialisation") == {"tensors"}
    assert differs("+ random re-initialisation", "  (by Fisher information instead)") == {"choose"}
    assert differs("+ random re-initialisation", "+ Gaussian noise") == {"noise"}
    assert differs("+ Gaussian noise", "+ MSE to the original's logits") == {"loss"}
    assert differs("+ MSE to the original's logits", "+ 3 cycles") == {"epochs"}
    assert differs("+ 3 cycles", "+ fc and shortcuts excluded") == {"exclude"}
    assert rows["+ fc and shortcuts excluded"] == preset
    assert all(sum(row["epochs"]) == pytest.approx(sum(preset["epochs"])) for row in rows.values())


class Page(NamedTuple):
    page: Path
    table: Path  # CSV
    arguments: list[str]


@pytest.fixture
def arguments(data, results, tmp_path, monkeypatch) -> list[str]:
    """Of a leaderboard of three methods at N = 4."""
    kept = tmp_path / "tuned.json"
    budgets = {"finetune": {"trials": "2 at N = 4"}, "negrad": {"trials": "2 at N = 4"}}
    write_json(kept, budgets)
    for module in (tuning, leaderboard):
        monkeypatch.setattr(module, "tuned_file", lambda data: kept)
    methods = [Method.read(HERE / "methods" / f"{name}.py") for name in budgets]
    monkeypatch.setattr(leaderboard, "contestants", lambda data, only: [NO_UNLEARNING, *methods])
    arguments = ["--data", str(data), "--runs", "4", "--jobs", "1", "--results", str(results)]
    return arguments


@pytest.fixture
def page(arguments, results, tmp_path) -> Page:
    assert leaderboard.main([*arguments, "--page", str(tmp_path / "RESULTS.md")]) == 0
    return Page(tmp_path / "RESULTS.md", results / "small_digits" / "leaderboard.csv", arguments)


def test_the_leaderboard(page, capsys):
    text, table = page.page.read_text(), pd.read_csv(page.table)
    assert table["rank"].dropna().tolist() == [1, 2, 3]
    assert table.score.is_monotonic_decreasing
    assert "| (ceiling, estimated) |" in text and "2 at N = 4" in text
    assert "2 forget sets (private, private-2) of" in text and "2 private forget sets, 4 runs" in text
    for name in ("finetune", "negrad", "no_unlearning"):
        paths = [page.table.parent / split / name / "summary.json" for split in ("private", "private-2")]
        scores = [json.loads(path.read_text())["score"] for path in paths]
        assert table.set_index("method").score[name] == pytest.approx(sum(scores) / 2)
        assert f"| {name} | {scores[0]:.4f} | {scores[1]:.4f} |" in text
    over = table[table.fraction_of_retraining > 0.2].method
    for name in over:  # marked, not dropped
        assert "over" in next(line for line in text.splitlines() if f"| {name} |" in line)
    assert (page.page.parent / "docs" / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    assert all(f"| {judge} |" in text for judge in ("score", "KLoM", "U-LiRA"))
    # A page that was not asked for is not replaced: `make leaderboard RUNS=64` once overwrote the kit's own.
    kits = [HERE / "RESULTS.md", HERE / "docs" / "leaderboard.png"]
    before = [path.read_bytes() for path in kits]
    assert leaderboard.main(page.arguments) == 0
    assert [path.read_bytes() for path in kits] == before
    pages = [re.sub(r"\]\(\S+\)", "](link)", path.read_text()) for path in (page.table.parent / "RESULTS.md", page.page)]
    assert pages[0] == pages[1]
    assert (page.table.parent / "leaderboard.png").exists()


def test_the_leaderboard_says_the_note(arguments, data, results, tmp_path, capsys):
    noted = shutil.copytree(data, tmp_path / "noted")
    described = json.loads((noted / "dataset.json").read_text())
    (noted / "dataset.json").write_text(json.dumps(described | {"note": "drawn by code, not photographs"}))
    arguments[arguments.index(str(data))] = str(noted)
    assert leaderboard.main(arguments) == 0
    folder, called = results / "small_digits", "small_digits (drawn by code, not photographs)"
    assert f"\n{called}: 2 forget sets (private, private-2)" in capsys.readouterr().out
    page = (folder / "RESULTS.md").read_text()
    assert f"# Results: {called}, 2 private forget sets, 4 runs" in page
    assert "retrained networks on each of\n2 forget sets (private, private-2) of" in page
    assert set(pd.read_csv(folder / "leaderboard.csv").note) == {"drawn by code, not photographs"}


def test_published_values_change_by_one_rule(data, results):
    evaluation = Evaluation.of(str(data), "private", 4, results, jobs=1, device="cpu")
    methods, factor = leaderboard.as_published(evaluation)
    batches = -(-len(evaluation.data.retain) // evaluation.recipe.batch_size)
    assert factor == pytest.approx(550 / batches)
    config = {method.name: method.config for method in methods}
    assert config["no_unlearning"] == {}
    assert config["unlearning"]["learning_rates"] == pytest.approx((1e-3 * factor,))
    assert config["algorithm_2"]["learning_rates"] == pytest.approx([rate * factor for rate in (5e-4, *[1e-3] * 4)])
    assert config["fanchuan"]["contrast_rate_at_last"] == pytest.approx(1e-6 * factor)
    for method in methods[1:-1]:  # nothing else, and not a preset's values
        same = {field for field, value in method.config.items() if value == method.defaults[field]}
        assert {field for field in method.config if not {"rate", "rates"} & set(field.split("_"))} <= same
    assert config["sun"]["last_factors"] == (1, 1, 1, 5)
    ours = next(method for method in methods if method.name == "shrink_perturb")
    assert ours.config == ours.defaults  # its own rule sets its values


def test_a_leaderboard_of_some_methods_as_published(data, results, tmp_path, capsys):
    arguments = ["--data", str(data), "--runs", "4", "--jobs", "1", "--results", str(results), "--split", "private"]
    chosen = ["negrad", "finetune", "no_unlearning", "--published"]
    assert leaderboard.main([*arguments, *chosen]) == 0
    page = (results / "small_digits" / "PUBLISHED.md").read_text()
    table = pd.read_csv(results / "small_digits" / "published.csv")
    assert set(table.method.dropna()) >= {"negrad", "finetune", "no_unlearning"} and "nan" not in page.split("##")[0]
    assert f"negrad finetune no_unlearning --data {data} --split private --published --runs 4" in page
    assert "the ranking against the published scores: " in capsys.readouterr().out
    beside = tmp_path / "docs" / "digits.md"
    assert leaderboard.main([*arguments, *chosen, "--page", str(beside)]) == 0
    assert "](digits.png)" in beside.read_text() and beside.with_suffix(".png").exists()
    assert leaderboard.main([*arguments, "fanshuan", "--published"]) == 1
    assert "fanshuan: no method has this name; there are: no_unlearning, unlearning, " in capsys.readouterr().err


def test_a_method_that_diverges_is_left_out_and_not_run_again(data, results, monkeypatch, capsys):
    score, asked = Evaluation.score, []

    def diverging(evaluation, method):
        if method.name != "negrad":
            return score(evaluation, method)
        asked.append(evaluation.split)
        raise Diverged("negrad.py: run 0: NaN")

    monkeypatch.setattr(Evaluation, "score", diverging)
    where = ["--data", str(data), "--runs", "4", "--jobs", "1", "--results", str(results), "--split", "private*"]
    assert leaderboard.main(["negrad", "finetune", "no_unlearning", "--published", *where]) == 0
    said = capsys.readouterr()
    assert asked == ["private"] and said.err.count("left out: negrad.py: run 0: NaN") == 1
    assert "negrad is left out: it diverges on private." in said.out
    assert not (pd.read_csv(results / "small_digits" / "published.csv").method == "negrad").any()
    assert leaderboard.main(["negrad", "--published", *where]) == 1
    assert capsys.readouterr().err.endswith("nothing to rank: every method diverges (negrad)\n")


def test_unequal_budgets_are_refused_before_any_work(arguments, tmp_path, monkeypatch, capsys):
    write_json(tmp_path / "tuned.json", {"finetune": {"trials": "2 at N = 4"}, "negrad": {"trials": "9 at N = 4"}})
    monkeypatch.setattr(Evaluation, "score", lambda *_: pytest.fail("it began to work"))
    assert leaderboard.main(arguments) == 1
    assert "the methods had different budgets" in capsys.readouterr().err


def test_unequal_budgets_are_refused(tmp_path, monkeypatch):
    write_json(tmp_path / "tuned.json", {"a": {"trials": "20 at N = 64"}, "b": {"trials": "40 at N = 64"}})
    monkeypatch.setattr(leaderboard, "tuned_file", lambda data: tmp_path / "tuned.json")
    with pytest.raises(Problem, match="different budgets: 20 at N = 64; 40 at N = 64; make tune"):
        leaderboard.budget("digits")


def test_every_method_is_in_the_leaderboard():
    names = [method.name for method in leaderboard.contestants("digits")]
    files = {path.stem for path in (HERE / "methods").glob("*.py")}
    assert len(names) == len(set(names))
    assert set(names) == files | {"no_unlearning", "unlearning", "unlearning_preset", "algorithm_1", "algorithm_2"}


def test_over_the_limit_is_marked():
    table = pd.DataFrame({"method": ["a", "b", "(ceiling)"], "fraction_of_retraining": [0.1, 0.21, float("nan")]})
    values = ("score", "standard_error", "low", "high", "of_ceiling", "forgetting_quality", "published")
    table = table.assign(**dict.fromkeys((*values, *forget_sets.ACCURACIES), 0.5))
    table = table.assign(rank=pd.array([1, 2, None], "Int64"), group=pd.array([1, 1, None], "Int64"))
    assert leaderboard.as_text(table)["share of retraining cost"].tolist() == ["10%", "21.0% **over**", ""]


def test_how_well_one_set_ranks_the_methods():
    scores = {"private": [1, 2, 3], "private-2": [1, 2, 3], "private-3": [3, 1, 2]}
    tables = [
        pd.DataFrame({"method": ["a", "b", "c", "(ceiling, estimated)"], "split": split, "score": [*values, 9]})
        for split, values in scores.items()
    ]
    # Each of the first two against (2, 1.5, 2.5), the third against (1, 2, 3).
    assert leaderboard.agreement(pd.concat(tables)) == "-0.50 to 0.50, 0.17 on average"
    assert leaderboard.agreement(tables[0]) == "there is one forget set only"


@pytest.fixture
def quick(data, tmp_path, monkeypatch) -> list[str]:
    """Arguments of a benchmark that takes seconds."""
    monkeypatch.setattr(bench, "TURNS", 1)
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    monkeypatch.setattr(bench, "EXAMPLES", 2)
    monkeypatch.setattr(evaluation, "timed", lambda *command: evaluation.Taken(200.0, 2**30, []))
    return ["--data", str(data), "--runs", "4", "--jobs", "1", "--results", str(tmp_path / "results")]


def test_the_speed_is_shown_and_kept(quick, tmp_path, monkeypatch, capsys):
    assert bench.main(quick) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}, numpy {np.__version__}" in said[0]
    assert said[1].split() == ["what", "figure", "peer", "its", "figure", "ratio", "of", "peak", "faster"]
    assert "a first evaluation of the digits, N = 4" in said[-2] and "200 s" in said[-2]
    line = json.loads((tmp_path / "results" / "bench.jsonl").read_text())
    rows = pd.DataFrame(line["rows"])
    assert (line["runs"], line["jobs"], len(rows)) == (4, 1, len(said) - 2)
    assert (rows.figure > 0).all() and rows.of_peak.dropna().between(0, 1).all()
    first = rows[rows.unit == "images/s"].iloc[0]
    ratio = next(text for text in said if "images/s" in text).split(" x ")[0].split()[-1]
    assert float(ratio) == pytest.approx(first.figure / first.peer_figure, rel=0.01)

    monkeypatch.setattr(evaluation, "timed", lambda *command: evaluation.Taken(160.0, 2**30, []))
    assert bench.main([*quick, "--only", "evaluation"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].endswith(" +25%")  # 200 s before
    assert bench.main([*quick, "--only", "evaluation", "--jobs", "2"]) == 0
    assert "%" not in capsys.readouterr().out  # was not measured in this way before
    assert len((tmp_path / "results" / "bench.jsonl").read_text().splitlines()) == 3


def test_a_damaged_record_of_the_speed_is_not_overwritten(quick, tmp_path, monkeypatch, capsys):
    assert bench.main([*quick, "--only", "peak"]) == 0
    path = tmp_path / "results" / "bench.jsonl"
    monkeypatch.setitem(bench.GROUPS, "peak", lambda _: pytest.fail("it began to measure"))
    for end in ('{"date": "2026-', "[]\n", '{"rows": [{"what": 1}]}\n', "\xff\n"):
        path.write_text(before := path.read_text().splitlines(keepends=True)[0] + end)
        capsys.readouterr()
        assert bench.main([*quick, "--only", "peak"]) == 1
        said = capsys.readouterr().err
        assert said == f"error: {path}: line 2 is damaged: repair or delete it, or give other --results\n"
        assert path.read_text() == before


def test_the_organisers_procedure_finds_the_same_epsilons():
    source = torch.Generator().manual_seed(0)
    sides = torch.randn(2, 16, 5, generator=source, dtype=torch.float64)
    sides[0, :, 3:] += torch.tensor([30.0, 1.0])  # one that no two networks share
    found = [yardsticks.compared_epsilon(*sides[:, :, example]) for example in range(5)]
    assert found == pytest.approx(epsilons(*sides).tolist(), abs=1e-5)
    assert found[3] == 50


def test_operations_are_counted():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1))
    first, second = (2 * 7 * 6 * 6 * 9 * pair for pair in (3 * 4, 4 * 5))  # of 7 images
    assert yardsticks.operations(lambda: net(torch.ones(7, 3, 6, 6))) == first + second
    for made, images in ((net, 7), (Ensemble(net, 3), 21)):  # K networks on K batches: K times as many
        work = yardsticks.operations(lambda made=made, images=images: made(torch.ones(images, 3, 6, 6)).sum().backward())
        assert work == images // 7 * (2 * first + 3 * second)


def test_the_profile_of_training_accounts_for_all_of_a_step(data, capsys):
    assert profile_training.main(["--data", str(data)]) == 0
    said = capsys.readouterr().out
    *shares, overhead = [float(share) / 100 for share in re.findall(r"^.*?([-\d.]+)%", said, re.M)]
    assert overhead > 0 and shares[-1] == 1 and sum(shares[:-1]) == pytest.approx(1, abs=0.01)
    assert all(share > 0 for share in shares)


def test_how_cost_grows(data, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "data_folder", lambda name: data)
    sizes = {"images": [32, 64], "width": [2, 4], "runs": [8, 16], "examples": [5, 50], "memory": [4, 8], "file": [1, 1000]}
    monkeypatch.setattr(scaling, "SIZES", sizes)
    assert scaling.main(["--only", "images", "width", "runs", "examples", "file"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["images", "width", "runs", "examples", "file"]
    assert np.isfinite([float(row[-1]) for row in rows]).all()
    assert 0.2 < float(rows[-1][-1]) < 1  # kB of a file of 1 and 1,000 examples
    assert scaling.main(["--smallest", "1"]) == 1
    assert "--smallest 1: an exponent needs at least 2 sizes" in capsys.readouterr().err


def test_what_the_knobs_do(data, results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "KEPT", (0.01, 0.95))
    monkeypatch.setattr(experiments, "OTHERS", ({"calibrate": False},))
    where = ["--data", str(data), "--runs", "4", "--jobs", "1", "--results", str(results)]
    assert experiments.main([*where, "--picture", str(tmp_path / "knobs.png")]) == 0
    assert (tmp_path / "knobs.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in said.splitlines() if "=" in line}
    assert list(rows) == ["kept=0.01", "kept=0.95", "calibrate=False"]
    spreads = [float(rows[name][-2]) for name in ("kept=0.01", "kept=0.95")]
    assert spreads[0] > spreads[1]  # who keeps more has runs that are more alike


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the benchmark would measure it")
def test_the_gpus_benchmark_needs_one(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="error: --device cuda: the GPU does not work with this torch"):
        gpu.main()


def test_originals_differ_in_their_seed_alone(data, pools, tmp_path, capsys):
    results = shutil.copytree(pools, tmp_path / "results")
    finetune = str(HERE / "methods" / "finetune.py")
    arguments = ["--data", str(data), "--runs", "4", "--jobs", "1", "--results", str(results), "--originals", "2"]
    assert originals.main([finetune, *arguments, "--split", "p*[ce]"]) == 0
    said = capsys.readouterr().out
    assert "2 originals, 4 runs" in said and "means over the forget sets" in said
    evaluation = Evaluation.of(str(data), "public", 4, results, jobs=1, device="cpu")
    usual, other = (originals.original(evaluation, seed) for seed in (0, 1))
    assert network_digest(usual) == network_digest(evaluation.original()) != network_digest(other)
    method = Method.read(finetune)
    row = originals.row(evaluation, [usual, usual, other], method)
    assert row["original 0"] == row["original 1"] == evaluation.score(method)["score"] != row["original 2"]
    assert row["sd"] == pytest.approx(np.std([row[f"original {number}"] for number in range(3)], ddof=1))
    same = originals.row(evaluation, [usual, usual], method)
    assert same["sd"] == 0 and same["of it common"] == pytest.approx(same["squared error of the medians"])
    assert originals.main([finetune, *arguments[:-1], "1"]) == 1
    assert "--originals 1: must be 2 to 1000" in capsys.readouterr().err
    assert originals.main([finetune, finetune, *arguments]) == 1
    assert "have the same name" in capsys.readouterr().err
