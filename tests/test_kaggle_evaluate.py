"""Scoring on Kaggle's GPUs: the real command, a stand-in for its server, and the pushed notebook run as Kaggle would."""

# ruff: noqa: E402

import json
import re
import runpy
import shutil
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "notebooks")]
import kaggle_evaluate
import rehearse
from evaluate_helpers import FINETUNE, METHOD, kept, refused
from evaluate_helpers import run as run_here
from kaggle_stand_in import StandIn

from evaluator import training
from evaluator.evaluation import Evaluation
from evaluator.files import Problem
from evaluator.method import Method

RUNS = 16
KERNEL = "ada/unlearning-evaluation"
UPLOADED = ("--kit", "ada/my-kit", "--data-set", "ada/my-data")  # nothing is uploaded, which takes long


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Its sessions end as soon as they begin, with `state`; a test may put another `play` there."""

    def play(text: str, source: Path, working: Path) -> None:
        working.mkdir(parents=True)
        (working / "state.json").write_text(json.dumps(server.state))
        zipfile.ZipFile(working / "results.zip", "w").close()

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    with StandIn(tmp_path / "kaggle", play) as server:
        arguments = ["methods/finetune.py", "--split", "public", "--runs", str(RUNS)]
        server.state = {"state": "stopped", "error": "", "exit_code": 143, "arguments": arguments, "data": "small_digits"}
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield server


def run(data: Path, folder: Path, *arguments: object, runs: int = RUNS) -> int:
    how = ["--data", data, "--runs", runs, "--results", folder / "results", "--staging", folder / "staging", "--every", 0.2]
    return kaggle_evaluate.main([str(argument) for argument in [*arguments, *how]])


def without_original(data: Path, folder: Path) -> Path:
    return Path(shutil.copytree(data, folder, ignore=shutil.ignore_patterns("original_model*")))


# A method with a file beside it. The first session comes as far as run 4, then waits until its time is up.
STUCK = METHOD.replace("import torch\n", "import os, time, torch\nfrom beside import NOISE\n").replace("0.02", "NOISE")
STUCK = STUCK.replace("config=Config()):\n", "config=Config()):\n    while torch.initial_seed() > 3 and {}: time.sleep(1)\n")


def test_two_sessions_make_what_would_be_made_at_home(small_digits, stand_in, tmp_path, monkeypatch, capsys):
    """Interrupted after the first push; the session that goes on is waited for, stopped by its time, and gone on with."""
    start, first = time.monotonic(), tmp_path / "first"
    method = tmp_path / "mine" / "stuck.py"
    method.parent.mkdir()
    (method.parent / "beside.py").write_text("NOISE = 0.03\n")
    method.write_text(STUCK.format(f"os.path.exists({str(first)!r})"))
    data = without_original(small_digits, tmp_path / "there" / "digits")

    def play(text: str, source: Path, working: Path) -> None:
        notebook = working.parent / "evaluation.ipynb"
        notebook.parent.mkdir(parents=True)
        notebook.write_text(text)
        if stand_in.versions == 1:  # long enough to come as far as run 4: the uploads took as long as this machine is slow
            first.touch()
            seconds = 30 + 1.8 * (time.monotonic() - start)
        else:
            seconds = 3600
        try:
            rehearse.play(notebook, source, notebook.parent, DEVICE="cpu", HOURS=seconds / 3600)
        finally:
            first.unlink(missing_ok=True)

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    stand_in.play = play
    with monkeypatch.context() as patched:
        patched.setattr(kaggle_evaluate, "wait_for", interrupt)
        assert run(data, tmp_path, method) == 130
    assert "the same command resumes" in capsys.readouterr().err
    stand_in.answers["GetKernelSessionStatus"] = [{"status": "RUNNING"}] * 2 + [{"status": "COMPLETE"}]

    def refuse(*_, **__):
        raise AssertionError("nothing is trained here")

    for name in ("in_processes", "seconds_of_retraining"):
        monkeypatch.setattr(f"evaluator.runs.{name}", refuse)
    monkeypatch.setattr(training, "train_original", refuse)
    assert run(data, tmp_path, method) == 0
    said = capsys.readouterr()
    monkeypatch.undo()

    assert f"{KERNEL}: running" in said.out and "32 of 32 runs and 1 of 1 scores are here" in said.out
    assert "stuck" in said.out and "the page with figures" in said.out and "replaces" not in said.err
    states = [json.loads((tmp_path / "kaggle" / f"session-{k}/working/state.json").read_text()) for k in (1, 2)]
    assert [(state["state"], state["exit_code"]) for state in states] == [("stopped", 143), ("complete", 0)]
    between = int(re.search(r"(\d+) of 32 runs and 0 of 1 scores", said.out)[1])
    assert 0 < between <= 20, "the first session made nothing, or everything"

    home, data_home = tmp_path / "home", without_original(small_digits, tmp_path / "home" / "digits")
    assert run_here(data_home, home / "results", method, runs=RUNS, jobs=2) == 0
    ours, theirs = kept(tmp_path / "results"), kept(home / "results")
    assert len(ours) >= 34 and ours == theirs
    assert (data / "original_model.pth").read_bytes() == (data_home / "original_model.pth").read_bytes()

    first_push, second_push = stand_in.asked("SaveKernel")
    assert first_push["slug"] == KERNEL and first_push["datasetDataSources"] == [
        "ada/unlearning-kit",
        "ada/unlearning-data-digits",
    ]
    assert "kernelDataSources" not in first_push and second_push["kernelDataSources"] == [KERNEL]
    for pushed in (first_push, second_push):
        assert pushed["isPrivate"] and pushed["enableGpu"] and pushed["enableInternet"] is False
        assert pushed["machineShape"] == "NvidiaTeslaT4" and "competitionDataSources" not in pushed
    assert [(made["slug"], made["isPrivate"]) for made in stand_in.asked("CreateDataset")] == [
        ("unlearning-kit", True),
        ("unlearning-data-digits", True),
    ]
    assert not stand_in.asked("CreateDatasetVersion") and said.out.count(": unchanged") == 2

    sent = len(stand_in.sent)
    assert run(data, tmp_path, method) == 0
    assert len(stand_in.sent) == sent  # everything is here


# What is sent, and what is not


def test_only_what_has_changed_is_uploaded(stand_in, tmp_path, capsys):
    folder, file = tmp_path / "staging" / "kit", tmp_path / "a.py"
    for content in ("1", "1", "2"):
        file.write_text(content)
        kaggle_evaluate.stage(folder, "ada/unlearning-kit", "Unlearning kit", {"kit/a.py": file})
        kaggle_evaluate.upload(folder, "ada/unlearning-kit", 0.1)
    assert [name for name, _ in stand_in.sent if name.startswith("CreateDataset")] == [
        "CreateDataset",
        "CreateDatasetVersion",
    ]
    assert capsys.readouterr().out.count("unchanged") == 1
    files = stand_in.data_sets["unlearning-kit"]
    assert set(files) == {"kit.zip", "digest.txt"}
    del files["digest.txt"]
    with pytest.raises(Problem, match=r"its digest.txt cannot be read; did this kit make it\?"):
        kaggle_evaluate.upload(folder, "ada/unlearning-kit", 0.1)


def test_what_is_kept_here_goes_along(data, results, tmp_path):
    """The retrained networks that were made at home are not made again."""
    evaluations = [Evaluation.of(str(data), "public", 32, results, device="cpu")]
    names = set(kaggle_evaluate.kit_files(evaluations, [Method.read(FINETUNE)]))
    (pool,) = (results / "small_digits" / "public" / "retrained").iterdir()
    assert f"kit/kept/results/{pool.relative_to(results)}/run_00015.npz" in names
    assert kaggle_evaluate.kept(evaluations, []) == (16, 0) and kaggle_evaluate.wanted(evaluations, []) == (32, 0)


def test_a_dry_run_sends_nothing(data, stand_in, tmp_path, capsys):
    assert run(data, tmp_path, FINETUNE, "--dry-run") == 0
    printed = capsys.readouterr().out
    for words in (
        "datasets status ada/unlearning-kit",
        f"datasets create -p {tmp_path}/staging/kit -q",
        f"datasets version -p {tmp_path}/staging/data -m ",
        f"kernels push -p {tmp_path}/staging/notebook",
        f"kernels status {KERNEL}",
        f"kernels output {KERNEL} -p {tmp_path}/staging/output",
    ):
        assert f"kaggle {words}" in printed
    assert not stand_in.sent
    with zipfile.ZipFile(tmp_path / "staging" / "kit" / "kit.zip") as kit:
        names = set(kit.namelist())
        assert {"kit/evaluate.py", "kit/evaluator/report.html.jinja", "kit/methods/finetune.py"} <= names
        assert "kit/kept/data/original_model.pth" in names and not any("__pycache__" in name for name in names)
    with zipfile.ZipFile(tmp_path / "staging" / "data" / "data.zip") as packed:
        assert (
            "small_digits/dataset.json" in packed.namelist() and "small_digits/original_model.pth" not in packed.namelist()
        )


def test_without_credentials(data, stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("KAGGLE_KEY")
    assert "no Kaggle credentials: at https://www.kaggle.com/settings/api" in refused(capsys, run(data, tmp_path, FINETUNE))
    assert run(data, tmp_path, FINETUNE, "--dry-run") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([FINETUNE, "--split", "secret*"], "no split matches 'secret*'"),
        ([FINETUNE, "--split", "secret"], "no split 'secret'"),
        (["nowhere.py"], "nowhere.py: no such method file"),
        ([FINETUNE, "--set", "colour=red"], "Config has no field 'colour'"),
        ([FINETUNE, "--hours", "13"], "--hours 13"),
        ([FINETUNE, "--kit", "unlearning-kit"], "write OWNER/SLUG"),
        ([FINETUNE, "--keep-networks"], "--keep-networks: not on Kaggle"),
        ([FINETUNE, "--engine", "streams"], "--engine streams: Kaggle's GPUs find their own"),
    ],
)
def test_what_evaluate_would_refuse_is_not_sent(data, stand_in, tmp_path, capsys, arguments, message):
    assert message in refused(capsys, run(data, tmp_path, *arguments))
    assert not stand_in.sent


def test_a_method_that_a_given_kit_does_not_have(data, stand_in, tmp_path, capsys):
    method = tmp_path / "mine.py"
    method.write_text(METHOD)
    line = refused(capsys, run(data, tmp_path, method, "--kit", "ada/my-kit"))
    assert f"{method}: is not in the kit, and --kit names one that is not uploaded" in line


# What Kaggle refuses, and sessions that do not end well


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("SaveKernel", {"error": "Maximum weekly GPU quota of 30.00 hours has been reached"}, "Maximum weekly GPU quota"),
        ("SaveKernel", {"versionNumber": 1, "invalidDatasetSources": ["ada/unlearning-kit"]}, "not valid dataset sources"),
        ("CreateDataset", {"status": "error", "error": "You have used up your private space"}, "used up your private space"),
        ("GetDatasetStatus", {"status": "FAILED"}, "ada/unlearning-kit: Kaggle could not process it"),
        ("GetKernelSessionStatus", {"code": 500, "message": "Internal error"}, "Internal error"),
    ],
)
def test_what_kaggle_refuses(data, stand_in, tmp_path, capsys, method, answer, message):
    stand_in.answers[method] = [answer]
    uploaded = () if "Dataset" in method else UPLOADED
    assert message in refused(capsys, run(data, tmp_path, FINETUNE, *uploaded))
    assert not list((tmp_path / "results").rglob("run_*"))


def test_a_session_without_progress(data, stand_in, tmp_path, capsys):
    line = refused(capsys, run(data, tmp_path, FINETUNE, *UPLOADED))
    assert f"{KERNEL}: the session made no run that is new here before its time was up" in line
    assert len(stand_in.asked("SaveKernel")) == 1


def test_a_session_that_failed(data, stand_in, tmp_path, capsys):
    stand_in.state |= {"state": "failed", "error": "methods/finetune.py: run 3: unlearning() raised …", "exit_code": 1}
    line = refused(capsys, run(data, tmp_path, FINETUNE, *UPLOADED))
    assert line == f"error: {KERNEL} failed: methods/finetune.py: run 3: unlearning() raised …"
    # The same command tries again: what the method reads may be another file now.
    stand_in.answers["SaveKernel"] = [{"error": "quota"}]
    assert "quota" in refused(capsys, run(data, tmp_path, FINETUNE, *UPLOADED))


def test_a_run_that_kaggle_ended(data, stand_in, tmp_path, capsys):
    """Its output is not attached again, as it may be incomplete; what came home before goes along with the kit."""
    stand_in.answers["GetKernelSessionStatus"] = [
        {"status": "RUNNING"},
        {"status": "ERROR", "failureMessage": "out of disk"},
    ]
    assert "out of disk" in refused(capsys, run(data, tmp_path, FINETUNE, *UPLOADED))
    assert not stand_in.asked("SaveKernel")
    stand_in.answers["GetKernelSessionStatus"] = [{"status": "ERROR"}, {"status": "COMPLETE"}]
    assert "no run that is new here" in refused(capsys, run(data, tmp_path, FINETUNE, *UPLOADED))
    assert "kernelDataSources" not in stand_in.asked("SaveKernel")[0]


def test_an_output_that_is_not_ours(data, stand_in, tmp_path, capsys):
    del stand_in.state["state"]
    line = refused(capsys, run(data, tmp_path, FINETUNE, *UPLOADED))
    assert f"holds no results of {KERNEL}; to begin anew: kaggle kernels delete {KERNEL}" in line


# What comes back is checked


@pytest.fixture
def asked(data, tmp_path):
    """An evaluation without results, and a method."""
    return [Evaluation.of(str(data), "public", RUNS, tmp_path / "results", device="cpu")], [Method.read(FINETUNE)]


def zip_of(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../evil.py", "/etc/evil", "results/../../evil", "results\\..\\evil"])
def test_a_zip_that_would_leave_its_folder(asked, tmp_path, name):
    run = next(iter(kaggle_evaluate.pools_of(asked[0][0], asked[1]))).path(0)
    good = f"results/{run.relative_to(tmp_path / 'results')}"
    path = zip_of(tmp_path / "results.zip", {good: b"run", name: b"evil"})
    with pytest.raises(Problem, match="would leave its folder; nothing was taken"):
        kaggle_evaluate.take(path, *asked, "digits")
    assert not run.exists()
    kaggle_evaluate.take(zip_of(path, {good: b"run"}), *asked, "digits")
    assert run.read_bytes() == b"run"
    kaggle_evaluate.take(zip_of(path, {good: b"another"}), *asked, "digits")
    assert run.read_bytes() == b"run"


def test_the_original_of_other_data_is_not_taken(asked, small_digits, tmp_path):
    data = without_original(small_digits, tmp_path / "digits")
    asked = [Evaluation.of(str(data), "public", RUNS, tmp_path / "results", device="cpu")], asked[1]
    path = zip_of(tmp_path / "results.zip", {"data/faces/original_model.pth": b"faces"})
    kaggle_evaluate.take(path, *asked, "digits")
    assert not (data / "original_model.pth").exists()


def test_a_zip_that_is_cut_off_or_damaged(asked, tmp_path):
    path = zip_of(tmp_path / "results.zip", {"results/a": bytes(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[:700])
    with pytest.raises(Problem, match="not a whole zip file"):
        kaggle_evaluate.take(path, *asked, "digits")
    path.write_bytes(whole[:500] + b"x" + whole[501:])
    with pytest.raises(Problem, match="results/a is damaged"):
        kaggle_evaluate.take(path, *asked, "digits")
    path.unlink()
    with pytest.raises(Problem, match="not a whole zip file"):
        kaggle_evaluate.take(path, *asked, "digits")


# The notebook, where something is missing


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "the kit (a folder with evaluate.py) is not there; "),
        (["a/evaluate.py"], "the data folder (a folder with age_class_weights.json) is not there; "),
        (["a/evaluate.py", "b/evaluate.py"], "is in 2 places: "),
        (["a/broken.zip"], "File is not a zip file"),
    ],
)
def test_a_session_says_what_is_missing(tmp_path, monkeypatch, files, message):
    for name in ("input", "tmp", "working"):
        monkeypatch.setenv(f"REHEARSAL_{name.upper()}", str(tmp_path / name))
    (tmp_path / "input" / "mounted").mkdir(parents=True)
    for name in files:
        (tmp_path / "input" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "input" / name).write_text("no zip")
    runpy.run_path(str(ROOT / "notebooks" / "evaluation.py"))
    state = json.loads((tmp_path / "working" / "state.json").read_text())
    assert state["state"] == "failed" and message in state["error"]
    if "not there" in message:
        assert f"{tmp_path}/input/mounted" in state["error"]
    assert zipfile.ZipFile(tmp_path / "working" / "results.zip").namelist() == []
