"""evaluate.py from end to end on a small data set: what it keeps, goes on from, and refuses."""

import html
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from evaluate_helpers import FINETUNE, METHOD, bad, command, kept, refused, run, times

import evaluate
from evaluator.data import load
from evaluator.metric import competition_score, epsilons, forgetting_quality, logit_scaled_confidence
from evaluator.models import load_network
from evaluator.training import Recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def method(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("methods") / "noisy.py"
    path.write_text(METHOD)
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(data, method, tmp_path_factory) -> Path:
    """Results of 12 runs of two methods, in one process without interruption."""
    results = tmp_path_factory.mktemp("undisturbed")
    assert run(data, results, method, FINETUNE, runs=12) == 0
    return results


# What is printed and kept


def test_the_table_and_the_files(data, method, tmp_path, capsys):
    assert run(data, tmp_path, method, runs=4) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "small_digits" / "public" / "noisy"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["runs"] == 4 and summary["config"] == {"noise": 0.02} and summary["split"] == "public"
    assert summary["seconds_per_run"] > 0 and summary["fraction_of_retraining"] > 0
    assert "small_digits, public split, 4 runs" in printed and f"{summary['forget_examples']} forget examples" in printed
    (row,) = (line for line in printed.splitlines() if line.startswith("noisy "))
    assert f"{summary['score']:.4f}" in row and f"{summary['forgetting_quality']:.4f}" in row
    assert re.search(r"^\(ceiling, estimated\) +0\.\d{4}", printed, re.MULTILINE)
    page = (folder.parent / "report.html").read_text()
    assert "noisy" in page and page.count("<svg") == 6  # the leaderboard and five about the method
    assert len(pd.read_csv(folder / "examples.csv")) == summary["forget_examples"]


def test_the_summary_follows_from_the_kept_runs(undisturbed, data):
    """Worked out again here from the runs' files, with the metric's public functions alone."""
    folder = undisturbed / "small_digits" / "public"
    summary = json.loads((folder / "noisy" / "summary.json").read_text())
    pools = {}
    for kind in ("noisy", "retrained"):
        files = [np.load(path) for path in sorted(folder.glob(f"{kind}/*/run_*.npz"))]
        assert len(files) == 12
        pools[kind] = {name: torch.from_numpy(np.stack([file[name] for file in files])) for name in files[0].files}
    targets = load(data).forget.age_group
    ours, theirs = (logit_scaled_confidence(pools[kind]["forget_logits"], targets) for kind in ("noisy", "retrained"))
    quality = forgetting_quality(epsilons(ours, theirs), 12)
    assert summary["forgetting_quality"] == quality
    accuracies = [pools[kind][name].mean().item() for name in ("ra", "ta") for kind in ("noisy", "retrained")]
    assert summary["score"] == pytest.approx(competition_score(quality, *accuracies), rel=1e-12)


def test_kept_answers_are_those_of_the_networks(data, method, tmp_path):
    assert run(data, tmp_path, method, "--keep-networks", runs=4) == 0
    examples = load(data)
    for kind in ("noisy", "retrained"):
        (folder,) = (tmp_path / "small_digits" / "public" / kind).glob("*/")
        for number in range(4):
            net = Recipe.of(examples).network(10)
            load_network(net, folder / f"network_{number:05d}.pth")
            with torch.no_grad():
                logits = net.eval()(examples.forget.images.float())
            kept_logits = torch.from_numpy(np.load(folder / f"run_{number:05d}.npz")["forget_logits"])
            torch.testing.assert_close(logits, kept_logits, rtol=1e-4, atol=1e-4)


def test_networks_asked_for_later(data, method, tmp_path):
    assert run(data, tmp_path, method, runs=4) == 0
    assert not list(tmp_path.rglob("network_*.pth"))
    before = kept(tmp_path)
    assert run(data, tmp_path, method, "--keep-networks", runs=4) == 0
    assert len(list(tmp_path.rglob("noisy/*/network_*.pth"))) == 4
    assert kept(tmp_path) == before


def test_no_method_is_unlearning_py_beside_the_baselines(data, tmp_path, capsys):
    assert run(data, tmp_path, runs=4) == 0
    printed = capsys.readouterr().out
    rows = [line.split()[0] for line in printed.splitlines() if re.search(r" +0\.\d{4} +\d+% ", line)]
    assert rows == ["no_unlearning", "finetune", "negrad", "unlearning", "shrink_perturb", "(ceiling,"]
    assert printed.count("too few runs or forget sets") == 4  # the best one against each of the others


def test_a_second_pool_measures_the_ceiling(data, method, tmp_path, capsys):
    assert run(data, tmp_path, method, "--second-pool") == 0
    assert "(ceiling, measured)" in capsys.readouterr().out
    pools = [sorted(tmp_path.rglob(f"{kind}/*/run_*.npz")) for kind in ("retrained", "retrained_again")]
    first, again = ([np.load(path)["forget_logits"].tobytes() for path in pool] for pool in pools)
    assert len(first) == len(again) == 4 and not set(first) & set(again)


# Several forget sets, comparisons, and the page alone


def test_every_private_forget_set(data, results, method, capsys):
    assert run(data, results, method, FINETUNE, "--split", "private*") == 0
    printed = capsys.readouterr().out
    assert "2 forget sets (private, private-2) of" in printed and "4 runs" in printed
    folder = results / "small_digits"
    summaries = {
        (split, name): json.loads((folder / split / name / "summary.json").read_text())
        for split in ("private", "private-2")
        for name in ("noisy", "finetune")
    }
    table = pd.read_csv(folder / "private_scores.csv").set_index(["split", "method"])
    for key, summary in summaries.items():
        assert summary["score"] == pytest.approx(table.score[key])
    for name in ("noisy", "finetune"):
        first, second = (summaries[split, name]["score"] for split in ("private", "private-2"))
        (row,) = (line for line in printed.splitlines() if line.startswith(f"{name} ") and "±" in line)
        assert f"{(first + second) / 2:.4f} ± {abs(first - second) / 2:.4f}" in row
    assert (folder / "private" / "report.html").exists() and (folder / "private-2" / "report.html").exists()
    assert "2 forget sets, at least 4 are needed" in printed
    before = times(results)
    assert run(data, results, method, FINETUNE, "--split", "private*") == 0
    assert times(results) == before and capsys.readouterr().out == printed


def test_devices_and_workers_are_asked_once(data, monkeypatch):
    asked = []
    monkeypatch.setattr("evaluator.evaluation.working_device", lambda wanted: asked.append(wanted) or "cpu")
    args = evaluate.options("").parse_args(["--data", str(data), "--split", "*"])
    found = list(evaluate.command.evaluations(args))
    assert [one.split for one in found] == ["private", "private-2", "public"] and asked == ["auto"]
    assert [one.data.split for one in found] == ["private", "private-2", "public"]


def test_every_output_says_the_note(data, results, method, tmp_path, capsys):
    """And a note that is added, changed or taken away makes no run and no score anew."""
    assert run(data, results, method) == 0
    folder = results / "small_digits"
    made, before = times(results), json.loads((folder / "public" / "noisy" / "summary.json").read_text())
    assert before["note"] == ""
    noted = shutil.copytree(data, tmp_path / "noted")
    described = json.loads((noted / "dataset.json").read_text())
    capsys.readouterr()
    for note in ("drawn by code & not photographs", "drawn by hand", ""):
        (noted / "dataset.json").write_text(json.dumps(described | ({"note": note} if note else {})))
        assert run(noted, results, method) == 0
        assert times(results) == made
        said = f"small_digits ({note}), public split" if note else "small_digits, public split"
        assert said in capsys.readouterr().out
        summary = json.loads((folder / "public" / "noisy" / "summary.json").read_text())
        assert summary == before | {"note": note, "checked": summary["checked"]}
        page = html.unescape((folder / "public" / "report.html").read_text())
        assert f"<title>{said}" in page and ("<p><strong>" in page) == bool(note)
        assert f"<strong>{note[:1].upper()}{note[1:]}</strong>" in page or not note
    (noted / "dataset.json").write_text(json.dumps(described | {"note": "drawn by code"}))
    assert run(noted, results, method, "--split", "private*") == 0
    assert "\nsmall_digits (drawn by code): 2 forget sets" in capsys.readouterr().out
    assert set(pd.read_csv(folder / "private_scores.csv").note) == {"drawn by code"}


def test_a_stop_between_forget_sets_loses_nothing(data, results, tmp_path, capsys):
    """What fails on the second set is made there alone the next time."""
    path = tmp_path / "noisy.py"
    path.write_text(METHOD + "    if int(forget_loader.dataset.person_id[0]) == 2: raise ValueError('this set')\n")
    line = refused(capsys, run(data, results, path, "--split", "private*"))
    assert "this set" in line and (results / "small_digits" / "private" / "noisy" / "summary.json").exists()
    assert not (results / "small_digits" / "private_scores.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--split", "secret*"], "no split matches 'secret*'; there are: 'private', 'private-2', 'public'"),
        (["compare", FINETUNE], "compare needs two METHODs, not 1"),
        (["compare", FINETUNE, FINETUNE, FINETUNE], "compare needs two METHODs, not 3"),
        (["compare", FINETUNE, FINETUNE], "have the same name"),
        (["report", FINETUNE], "leave out"),
        (["--checkpoints", "submission.zip", "--split", "private*"], "a submission is for one forget set"),
    ],
)
def test_what_several_sets_and_comparisons_cannot_be_asked(data, results, capsys, arguments, named):
    before = sorted(results.rglob("*.*"))
    assert named in refused(capsys, run(data, results, *arguments))
    assert sorted(results.rglob("*.*")) == before


def test_compare(data, results, method, capsys):
    assert run(data, results, "compare", method, FINETUNE, runs=16) == 0
    printed = capsys.readouterr().out
    folder = results / "small_digits" / "public"
    table = pd.read_csv(folder / "compare_noisy_finetune.csv")
    tables = {name: pd.read_csv(folder / name / "examples.csv").set_index("image_id") for name in ("noisy", "finetune")}
    for name, other in tables.items():
        assert table.set_index("image_id")[f"epsilon, {name}"].to_dict() == pytest.approx(other.epsilon.to_dict())
        summary = json.loads((folder / name / "summary.json").read_text())
        assert table[f"earns, {name}"].mean() == pytest.approx(summary["forgetting_quality"])
    better = (table["earns, finetune"] > table["earns, noisy"]).sum()
    assert f"finetune against noisy: {better} of {len(table)} examples earn more" in printed
    assert "on this forget set" in printed and "95% interval" in printed


def test_error_bars_and_reasons_are_kept(undisturbed, data):
    """12 runs are enough for half-samples, and too few to project."""
    folder = undisturbed / "small_digits" / "public" / "finetune"
    summary = json.loads((folder / "summary.json").read_text())
    low, high = summary["score_interval"]
    assert 0 <= low <= summary["score"] <= high and len(summary["half_samples"]["score"]) == 16
    assert set(summary["what_if"]) == {"medians", "spreads", "both"} and summary["diagnosis"]
    assert "projected_512" not in summary
    table = pd.read_csv(folder / "examples.csv")
    difference = (table.unlearned_median - table.retrained_median) / table.retrained_std
    assert table["shift"].to_numpy() == pytest.approx(difference.to_numpy(), rel=1e-6)
    ratio = table.unlearned_std.clip(lower=0.01) / table.retrained_std  # 0.01 is the metric's resolution
    assert table.spread_ratio.to_numpy() == pytest.approx(ratio.to_numpy(), rel=1e-6)


def test_the_page_alone(data, results, method, capsys):
    folder = results / "small_digits" / "public"
    assert run(data, results, method, runs=4) == 0
    page = folder / "report.html"
    before = page.read_text()
    page.unlink()
    runs = times(results)
    assert run(data, results, "report", runs=4) == 0
    assert page.read_text() == before and times(results) == runs
    assert str(page) in capsys.readouterr().out


# The same result whatever happens on the way


@pytest.mark.parametrize("jobs", [2, 3])
def test_the_same_bits_with_more_workers(undisturbed, data, method, tmp_path, jobs):
    assert run(data, tmp_path, method, FINETUNE, runs=12, jobs=jobs) == 0
    assert kept(tmp_path) == kept(undisturbed)


def test_the_same_bits_after_fewer_runs(undisturbed, data, method, tmp_path):
    """6 runs are the first 6 of 12, and are kept: also where they share an ensemble with others."""
    assert run(data, tmp_path, method, FINETUNE, runs=6) == 0
    before = times(tmp_path)
    assert run(data, tmp_path, method, FINETUNE, runs=12) == 0
    assert kept(tmp_path) == kept(undisturbed)
    assert before.items() <= times(tmp_path).items()


def test_a_run_deleted_is_made_again_alone(undisturbed, data, method, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(undisturbed, results)
    before = times(results)
    (gone,) = results.rglob("noisy/*/run_00007.npz")
    gone.unlink()
    assert run(data, results, method, FINETUNE, runs=12) == 0
    assert kept(results) == kept(undisturbed)
    assert {path for path, at in times(results).items() if before[path] != at} == {gone}


def test_a_repeat_only_reads(undisturbed, data, method, capsys):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert run(data, undisturbed, method, FINETUNE, runs=12) == 0
    after = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} <= {"report.html"}


def test_another_hyperparameter_redoes_only_the_unlearned_runs(undisturbed, data, method, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(undisturbed, results)
    before = times(results)
    assert run(data, results, method, "--set", "noise=0.03", runs=12) == 0
    after = times(results)
    assert before.items() <= after.items()
    new = {path for path in after if path not in before}
    assert len(new) == 12 and {path.parent.parent.name for path in new} == {"noisy"}
    summary = json.loads((results / "small_digits" / "public" / "noisy" / "summary.json").read_text())
    assert summary["config"] == {"noise": 0.03}


def test_the_splits_do_not_mix(undisturbed, data, method, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(undisturbed, results)
    assert run(data, results, method, "--split", "private", runs=4) == 0
    summaries = [
        json.loads((results / "small_digits" / split / "noisy" / "summary.json").read_text())
        for split in ("public", "private")
    ]
    assert [summary["split"] for summary in summaries] == ["public", "private"]
    assert summaries[0] == json.loads((undisturbed / "small_digits" / "public" / "noisy" / "summary.json").read_text())


def test_kill_at_any_moment(data, tmp_path, launcher):
    """kill -9, 20 times, at moments drawn at random: the finished result is that of an undisturbed evaluation."""
    slow = tmp_path / "slow.py"  # long enough for a kill to hit every stage of it
    slow.write_text(METHOD.replace("    net.eval()", "    import time; time.sleep(0.05)\n    net.eval()"))
    draw = random.Random(20)
    folder = tmp_path / "data" / data.name
    shutil.copytree(data, folder)
    (folder / "original_model.pth").unlink()  # its training is among what is hit
    results = tmp_path / "results"
    kills = hit = 0
    while kills < 20:
        child = launcher.start(folder, results, slow, FINETUNE, runs=64, jobs=draw.choice([1, 2]))
        before, wanted = len(times(results)), draw.randint(0, 12)
        start = time.monotonic()
        while launcher.running() and len(times(results)) < before + wanted and time.monotonic() - start < 60:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3) if wanted else draw.uniform(0, 1.5))
        assert launcher.running(), "finished before it was killed 20 times"
        os.killpg(child, signal.SIGKILL)
        launcher.wait()
        kills += 1
        hit += len(times(results)) > before
    assert hit >= 10  # most of them while runs were being made
    assert run(folder, results, slow, FINETUNE, runs=64, jobs=2) == 0
    assert run(folder, tmp_path / "undisturbed", slow, FINETUNE, runs=64, jobs=2) == 0
    assert kept(results) == kept(tmp_path / "undisturbed")


def test_ctrl_c(data, method, tmp_path):
    process = subprocess.Popen(
        command(data, tmp_path, method, runs=400, jobs=2), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not times(tmp_path):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    # joblib's own processes may add a warning of theirs as they end.
    assert "interrupted; what was finished is kept, and the same command resumes from there" in stderr.splitlines()
    assert "Traceback" not in stderr


# What is refused: one line that names it, exit code 1, nothing finished lost


IN_RUN_6 = "if torch.initial_seed() == 6:\n    {}\nnet.eval()"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (IN_RUN_6.format("raise KeyError('fc2')"), ["run 6:", "KeyError", "fc2", "line 6"]),
        (IN_RUN_6.format("raise ValueError('two\\nlines')"), ["run 6:", "ValueError: two lines"]),
        (IN_RUN_6.format("assert False"), ["run 6:", "AssertionError"]),
        (IN_RUN_6.format("return torch.nn.Linear(2, 2)"), ["run 6:", "returned a Linear", "return None"]),
        (IN_RUN_6.format("net.fc = torch.nn.Linear(32, 7)"), ["run 6:", "fc.weight", "[7, 32]", "[10, 32]"]),
        (IN_RUN_6.format("net.fc = torch.nn.Identity()"), ["run 6:", "fc.weight", "missing"]),
        (IN_RUN_6.format("net.extra = torch.nn.Linear(2, 2)"), ["run 6:", "extra.weight", "does not belong"]),
        (IN_RUN_6.format("net.fc.bias.data[3] = float('nan')"), ["run 6:", "NaN", "fc.bias"]),
        (IN_RUN_6.format("net.conv1.weight.data *= 1e38"), ["run 6:", "not finite"]),
        (IN_RUN_6.format("net.train(); return"), ["run 6:", "train mode", "net.eval()"]),
        (IN_RUN_6.format("retain_loader.dataset.images.zero_()"), ["run 6:", "changed", "retain"]),
        (IN_RUN_6.format("forget_loader.dataset.age_group += 1"), ["run 6:", "changed", "forget"]),
        (IN_RUN_6.format("val_loader.dataset.images = val_loader.dataset.images[:5]"), ["run 6:", "changed", "validation"]),
    ],
)  # fmt: skip
def test_a_method_that_breaks_the_contract_in_one_run(data, results, tmp_path, capsys, body, named):
    path = bad(tmp_path, body)
    line = refused(capsys, run(data, results, path, runs=8))
    assert all(text in line for text in ["bad", *named]), line
    # What was finished is kept, the runs before it among it, and none of the failed one.
    folder = results / "small_digits" / "public"
    assert len(list(folder.glob("retrained/*/run_*.npz"))) == 16
    assert [path.stem for path in sorted(folder.glob("bad/*/run_*.npz"))] == [f"run_{number:05d}" for number in range(6)]
    assert not (folder / "bad" / "summary.json").exists()


def test_changed_loaders_do_no_harm_to_the_next_method(data, method, tmp_path, undisturbed, capsys):
    """In the same process the data are as they were."""
    path = bad(tmp_path, "retain_loader.dataset.images.zero_()\nforget_loader.dataset.age_group = None")
    results = tmp_path / "results"
    refused(capsys, run(data, results, path))
    assert run(data, results, method, FINETUNE, runs=12) == 0
    assert {name: value for name, value in kept(results).items() if "bad/" not in name} == kept(undisturbed)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_over_the_time_limit(data, results, tmp_path, capsys, jobs):
    path = bad(tmp_path, IN_RUN_6.format("time.sleep(60)"))
    start = time.monotonic()
    line = refused(capsys, run(data, results, path, "--time-limit", "1.5", runs=8, jobs=jobs))
    assert time.monotonic() - start < 40
    assert "run 6:" in line and "time limit of 1.5 s" in line and str(path) in line


def test_a_method_cannot_swallow_the_time_limit(data, results, tmp_path, capsys):
    path = bad(tmp_path, "try:\n    time.sleep(60)\nexcept Exception:\n    pass")
    assert "run 0:" in refused(capsys, run(data, results, path, "--time-limit", "0.5"))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("def unlearn(net): pass", "no function unlearning("),
        ("unlearning = 3", "no function unlearning("),
        ("def unlearning(:", "SyntaxError"),
        ("import no_such_package", "no_such_package"),
    ],
)
def test_a_file_that_is_no_method(data, results, tmp_path, capsys, source, named):
    path = tmp_path / "bad.py"
    path.write_text(source)
    line = refused(capsys, run(data, results, path))
    assert str(path) in line and named in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere.py"], "nowhere.py: no such method file"),
        (["README.md"], "README.md: neither a .py file nor an .ipynb notebook"),
        (["--runs", "1"], "--runs 1"),
        (["--runs", "0"], "--runs 0"),
        (["--jobs", "0"], "--jobs 0"),
        (["--device", "tpu"], "--device tpu"),
        (["--data", "no_such_data"], "no_such_data"),
        (["--split", "secret"], "secret"),
        (["--set", "noise"], "--set noise: write FIELD=VALUE"),
        ([FINETUNE, "--set", "noise=1"], "noise"),
        ([FINETUNE, "--tuned"], "make tune"),
        (["--checkpoints", "nowhere.zip"], "nowhere.zip"),
    ],
)
def test_arguments_that_cannot_be_used(data, tmp_path, capsys, monkeypatch, arguments, named):
    monkeypatch.chdir(ROOT)
    common = ["--data", str(data), "--results", str(tmp_path), "--runs", "4", "--jobs", "1", "--device", "cpu"]
    assert named in refused(capsys, evaluate.main([*common, *arguments]))


def test_data_that_cannot_be_used(data, method, tmp_path, capsys):
    """The kinds of damage are in test_data.py; here that they end as any other error."""
    folder = tmp_path / "damaged"
    shutil.copytree(data, folder)
    image = min((folder / "images").rglob("*.png"))
    image.write_bytes(image.read_bytes()[:50])
    line = refused(capsys, run(folder, tmp_path / "results", method))
    assert str(image) in line and "not a readable image" in line
    image.unlink()
    line = refused(capsys, run(folder, tmp_path / "results", method))
    assert str(image) in line and "missing image" in line


def test_an_original_of_another_shape(data, method, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    state = torch.load(folder / "original_model.pth", weights_only=True)
    torch.save(state | {"fc.weight": torch.zeros(7, 32)}, folder / "original_model.pth")
    line = refused(capsys, run(folder, tmp_path / "results", method))
    assert str(folder / "original_model.pth") in line and "fc.weight" in line and "[7, 32]" in line


def test_a_kept_run_that_was_cut_off(undisturbed, data, method, tmp_path, capsys):
    results = tmp_path / "results"
    shutil.copytree(undisturbed, results)
    (cut,) = results.rglob("noisy/*/run_00003.npz")
    cut.write_bytes(cut.read_bytes()[:700])
    (results / "small_digits" / "public" / "noisy" / "summary.json").unlink()
    line = refused(capsys, run(data, results, method, runs=12))
    assert str(cut) in line and "delete it and run again" in line
    cut.unlink()
    assert run(data, results, method, FINETUNE, runs=12) == 0
    assert kept(results) == kept(undisturbed)


def test_results_that_cannot_be_written(data, method, tmp_path, capsys):
    file = tmp_path / "results"
    file.write_text("a file is in the way")
    line = refused(capsys, run(data, file, method))
    assert str(file) in line and "cannot be written" in line


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_disk_that_fills_up_in_the_middle_of_a_write(undisturbed, data, method, tmp_path, launcher, jobs):
    """The system refuses to let any file grow beyond 2 kB, less than one run takes."""
    results = tmp_path / "results"
    launcher.start(data, results, method, FINETUNE, runs=12, jobs=jobs, largest_file=2048)
    assert launcher.wait() == 1
    line = launcher.errors().rstrip("\n").splitlines()[-1]
    assert re.match(r"error: .*run_\d+\.npz: cannot be written \(File too large\); nothing finished is lost", line), line
    assert not list(results.rglob("run_*.npz")) and not list(results.rglob("*.part"))
    assert run(data, results, method, FINETUNE, runs=12) == 0
    assert kept(results) == kept(undisturbed)
