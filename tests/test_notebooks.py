"""The notebooks: built, run from top to bottom, rehearsed with the full-size network, scored, sent to a stand-in Kaggle."""

# ruff: noqa: E402

import argparse
import ast
import base64
import io
import json
import linecache
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from torchvision.models import resnet18, resnet34

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "data")]
import build
import rehearse
import submit
from digits import RECIPE
from digits import digits as prepare_digits
from kaggle_stand_in import StandIn
from layout import write

import evaluate
from evaluator.checkpoints import Checkpoints
from evaluator.data import load
from evaluator.files import Problem, read_json
from evaluator.method import Method
from evaluator.notebook import method_statements

SUBMISSION, TUNING = ROOT / "notebooks" / "submission.ipynb", ROOT / "notebooks" / "tuning.ipynb"
NAMES = ("retain", "forget", "validation")
RUNS = 3  # of the full-size network, the fewest with a score: with 2 nothing is earned


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A few hundred digits, and networks trained for a moment."""
    folder = tmp_path_factory.mktemp("data") / "few_digits"
    few = prepare_digits(300, 42, {"public": 3}, RECIPE | {"epochs": 2, "networks_at_once": 4})  # it forgets some 30 images
    write(folder, few)
    return folder


@pytest.fixture(scope="module")
def mounted(digits, tmp_path_factory) -> Path:
    """A folder whose input/ is what Kaggle mounts, with the full-size original, and data/ the same for the evaluator."""
    folder = tmp_path_factory.mktemp("kaggle")
    rehearse.make_input(load(digits), folder, 40, rehearse.RECIPE | {"epochs": 1})
    return folder


@pytest.fixture
def kaggle(mounted, tmp_path, monkeypatch) -> Path:
    """A copy of the mounted folder to break, and the notebook's environment pointing to it."""
    shutil.copytree(mounted / "input", tmp_path / "input")
    places = {"INPUT": "input", "TMP": "tmp", "WORKING": "working"}
    for name, place in places.items():
        monkeypatch.setenv(f"REHEARSAL_{name}", str(tmp_path / place))
    monkeypatch.setenv("REHEARSAL_RUNS", "2")
    return tmp_path


def cells(*more: str) -> dict:
    """Run the cells up to the submission's functions in this process, then `more`; returns the notebook's variables.

    The workers they start are real processes.
    """
    book = nbformat.read(SUBMISSION, as_version=4)
    code = [cell.source for cell in book.cells if cell.cell_type == "code"]
    code = [source for source in code if source.startswith("#:") or "def make_submission" in source]
    code[-1] = code[-1][: code[-1].index('if Path("/kaggle")')]
    space = {"In": [], "__name__": "__main__"}
    for number, source in enumerate([*code, *more]):
        name = f"<cell {number}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        space["In"].append(source)
        exec(compile(source, name, "exec"), space)
    return space


QUICK = """#: mine
def unlearning(net, retain_loader, forget_loader, val_loader):
    if torch.initial_seed() == {fails_in}:
        raise ValueError("five is too much")
    with torch.no_grad():
        net.fc.bias.normal_()
"""


def stop(space: dict) -> str:
    with pytest.raises(SystemExit) as stopped:
        space["make_submission"]()
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def pictures(book) -> list[bytes]:
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


def run_notebook(path: Path, cwd: Path, **env: str):
    book = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(cwd)}})
    client.execute(env={**os.environ, **env})
    return book


# Built from their sources


@pytest.mark.parametrize("name", build.NOTEBOOKS)
def test_a_built_notebook_is_current_and_without_outputs(name):
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
    assert text == build.build(name), "stale: make notebook"
    assert all(not cell["outputs"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    nbformat.validate(nbformat.reads(text, as_version=4))


def test_the_method_is_unlearning_py_unchanged():
    sources = ["".join(cell["source"]) for cell in json.loads(SUBMISSION.read_text())["cells"]]
    assert f"#: method\n{(ROOT / 'unlearning.py').read_text().rstrip()}" in sources


def test_another_method_in_the_notebook(tmp_path):
    path = ROOT / "methods" / "shrink_perturb.py"
    notebook = tmp_path / "submission_shrink_perturb.ipynb"
    notebook.write_text(build.build("submission", path))
    nbformat.validate(nbformat.read(notebook, as_version=4))
    assert "Draw a part of the filters" in notebook.read_text() and "draw_method" not in notebook.read_text()
    read, file = Method.read(notebook, "digits"), Method.read(path)
    assert (read.config, read.ensemble) == (file.config, file.ensemble)
    for content, why in (("", "has no Config"), ("def (", "invalid syntax")):
        (tmp_path / "other.py").write_text(content)
        with pytest.raises(Problem, match=f"other.py: cannot be put into a notebook: .*{why}"):
            build.build("submission", tmp_path / "other.py")


@pytest.mark.parametrize(
    "path", [ROOT / "unlearning.py", *sorted((ROOT / "methods").glob("[a-z]*.py"))], ids=lambda path: path.stem
)
def test_no_notebook_lacks_a_name(path, tmp_path):
    """Cells must not live on what another method happens to import; `In` is Jupyter's."""
    notebook = tmp_path / "submission.ipynb"
    notebook.write_text(build.build("submission", path))
    options = ["-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json"]
    found = json.loads(subprocess.run([sys.executable, *options, notebook], capture_output=True, text=True).stdout)
    assert {problem["message"] for problem in found} == {"Undefined name `In`"}


def test_edits_are_noticed(tmp_path):
    path = tmp_path / "submission.ipynb"
    path.write_text(build.build("submission"))
    assert not build.edited(path)
    path.write_text(path.read_text().replace("tensors=6", "tensors=9"))
    assert build.edited(path)


# A notebook as a method


def test_a_notebook_is_scored_as_edited(tmp_path):
    def read(text: str, name: str) -> Method:
        (tmp_path / name).write_text(text)
        return Method.read(tmp_path / name, "digits")

    text = SUBMISSION.read_text()
    built = read(text, "built.ipynb")
    assert built.config == Method.read(ROOT / "unlearning.py").config
    assert built.ensemble
    edited = read(text.replace("tensors=6", "tensors=9"), "edited.ipynb")
    assert edited.config == built.config | {"tensors": 9}
    assert edited.digest != built.digest
    # What another editor does: outputs, own metadata, another text, a new figure.
    book = json.loads(text)
    for cell in book["cells"]:
        cell["metadata"] = {"_uuid": "1", "execution": {}}
        if cell["cell_type"] == "code":
            cell |= {"outputs": [{"output_type": "stream", "name": "stdout", "text": "hello"}], "execution_count": 3}
            cell["source"] = "".join(cell["source"]).replace("draw_method()", "%matplotlib inline\ndraw_method(runs=2)")
        else:
            cell["source"] = ["# Mine"]
    assert read(json.dumps(book), "elsewhere.ipynb").digest == built.digest


def notebook_of(path: Path, *sources: str) -> Path:
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": source} for source in sources]}))
    return path


def test_a_method_of_somebody_elses_notebook(tmp_path):
    path = notebook_of(
        tmp_path / "theirs.ipynb",
        "!pip list\nimport torch\nimport no_such_module_here",
        "settings = {'lr': 1}\nnet = no_such_name_either",
        "settings.update(lr=2)\nsettings['wd'] = 3",
        "def helper(net): return settings\ndef unlearning(net, retain, forget, validation):\n    helper(net)",
        "for _ in range(3):\n    torch.save(net, 'a')",
    )
    assert Method.read(path).config == {}
    space = {}
    for _, statement in method_statements(path):
        exec(ast.unparse(statement), space)
    assert space["settings"] == {"lr": 2, "wd": 3}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["x = 1"], "no cell defines unlearning"),
        (["x = 1", "y = 2\ndef unlearning(:"], "code cell 2, line 2"),
        (
            ["def unlearning(*_):\n    pass\nunlearning.x = 1 / 0"],
            "ZeroDivisionError: division by zero .code cell 1",
        ),
    ],
)
def test_a_notebook_that_is_no_method(tmp_path, sources, message):
    with pytest.raises(Problem, match=message):
        Method.read(notebook_of(tmp_path / "wrong.ipynb", *sources))
    (tmp_path / "wrong.ipynb").write_text("[")
    with pytest.raises(Problem, match="not a readable notebook"):
        Method.read(tmp_path / "wrong.ipynb")


def test_a_preset_of_a_notebook_is_refused(digits, capsys):
    assert evaluate.main([str(SUBMISSION), "--preset", "digits", "--data", str(digits), "--runs", "2"]) == 1
    assert "a notebook is scored with its own values" in capsys.readouterr().err


# From top to bottom


def test_the_submission_notebook_scores_where_the_kit_is(digits, tmp_path):
    env = {"REHEARSAL_DATA": str(digits), "REHEARSAL_LOCAL_RUNS": "4", "REHEARSAL_RESULTS": str(tmp_path)}
    book = run_notebook(SUBMISSION, ROOT / "notebooks", **env)
    printed = "".join(output.text for cell in book.cells for output in cell.get("outputs", []) if "text" in output)
    assert "nothing to submit here" in printed
    assert "4 runs" in printed and "score 0." in printed
    assert len(pictures(book)) == 6  # a batch of images, and five charts about the score
    assert all(len(picture) > 5000 for picture in pictures(book))


def test_the_tuning_notebook_shows_a_try_beside_the_one_before(digits, tmp_path):
    env = {"TUNING_DATA": str(digits), "TUNING_RUNS": "4", "TUNING_RESULTS": str(tmp_path)}
    first = run_notebook(TUNING, ROOT / "notebooks", **env)
    assert len(pictures(first)) == 3
    changed = tmp_path / "tuning.ipynb"
    changed.write_text(TUNING.read_text().replace('{\\"tensors\\": 8}', '{\\"tensors\\": 2, \\"noise\\": 0.0}'))
    again = run_notebook(changed, ROOT / "notebooks", **env)
    assert len(pictures(again)) == 4
    texts = [json.dumps(cell.get("outputs", [])) for cell in again.cells]
    assert any("best at this N" in text for text in texts)
    assert any("try 2 against try 1: " in text and "epsilon, try 2" in text for text in texts)
    assert not any("against try" in json.dumps(cell.get("outputs", [])) for cell in first.cells)
    table = (tmp_path / "few_digits" / "public" / "tries.csv").read_text().splitlines()
    assert len(table) == 3
    assert "tensors = 2, noise = 0.0" in table[2]


@pytest.fixture(scope="module")
def rehearsed(mounted, tmp_path_factory) -> Path:
    """A folder with what `make rehearse` makes, of few images: the notebook's zip, and results/."""
    folder = tmp_path_factory.mktemp("rehearsed")
    archive = rehearse.play(SUBMISSION, mounted / "input", folder, RUNS=RUNS) / "submission.zip"
    common = ["--data", str(mounted / "data"), "--runs", str(RUNS), "--results", str(folder / "results")]
    assert evaluate.main([str(SUBMISSION), "--keep-networks", *common]) == 0
    assert evaluate.main(["--checkpoints", str(archive), *common]) == 0
    return folder


def test_a_rehearsal(mounted, rehearsed):
    """What the notebook makes is what the evaluator makes, but for float16: full-size networks, answers, score."""
    archive = rehearsed / "working" / "submission.zip"
    rehearse.check_zip(archive, RUNS)
    assert not list((rehearsed / "tmp").iterdir())  # moved into the zip
    results = rehearsed / "results" / "rehearsal" / "kaggle"
    names = ("submission.zip", "submission")
    uploaded, direct = (read_json(results / name / "summary.json") for name in names)
    folders = [
        results / name / summary["made_of"]["unlearned"] for name, summary in zip(names, (uploaded, direct), strict=True)
    ]
    rehearse.compare(archive, folders[1], RUNS)
    for run in range(RUNS):
        ours, theirs = (np.load(folder / f"run_{run:05d}.npz") for folder in folders)
        assert np.abs(theirs["forget_logits"]).max() > 0.1
        assert np.allclose(ours["forget_logits"], theirs["forget_logits"], rtol=0, atol=0.02)
    assert uploaded["seconds_per_run"] is None
    for name in ("forgetting_quality", "ra_unlearned", "ta_unlearned"):
        assert uploaded[name] == pytest.approx(direct[name], abs=0.03)


def zip_of(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return path


FILES = [f"kaggle/tmp/unlearned_checkpoint_{run}.pth" for run in range(512)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (FILES[:511], "holds 511 files; --runs 512 needs exactly 512 checkpoints; unlearned_checkpoint_511.pth is missing"),
        ([*FILES, "unlearned_checkpoint_512.pth"], "holds 513 files; .*; unlearned_checkpoint_512.pth is not expected"),
        ([*FILES, "again/unlearned_checkpoint_3.pth"], "holds 513 files; --runs 512 needs exactly 512 checkpoints$"),
        ([*FILES[:511], "again/unlearned_checkpoint_3.pth"], "holds 512 files; .*; unlearned_checkpoint_511.pth is missing"),
        ([*FILES, "kaggle/tmp/notes.txt"], "kaggle/tmp/notes.txt is not an unlearned_checkpoint_<run>.pth"),
    ],
)
def test_a_zip_that_is_no_submission(mounted, tmp_path, capsys, names, message):
    path = zip_of(tmp_path / "submission.zip", names)
    assert evaluate.main(["--checkpoints", str(path), "--data", str(mounted / "data")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: {re.escape(str(path))}: {message}", line)


def test_no_zip(rehearsed, tmp_path):
    path = tmp_path / "submission.zip"
    with pytest.raises(Problem, match="not a readable zip file"):
        Checkpoints.read(path, 8)
    path.write_bytes((rehearsed / "working" / "submission.zip").read_bytes()[:1000])
    with pytest.raises(Problem, match="not a readable zip file"):
        Checkpoints.read(path, 8)


def other_shape(_: bytes) -> bytes:
    file = io.BytesIO()
    torch.save(resnet18(num_classes=7).half().state_dict(), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], "not a readable network"),
        (other_shape, r"tensor 'fc.weight' has shape \[7, 512\], expected \[10, 512\]"),
        (None, "cut off or damaged"),  # the entry no longer fits the checksum beside it
    ],
)
def test_a_checkpoint_in_the_zip_that_cannot_be_used(mounted, rehearsed, tmp_path, capsys, change, message):
    """One clear line, and what was asked of the checkpoints before it stays."""
    path = tmp_path / "broken.zip"
    with zipfile.ZipFile(rehearsed / "working" / "submission.zip") as whole, zipfile.ZipFile(path, "w") as archive:
        for name in whole.namelist():
            content = whole.read(name)
            archive.writestr(name, change(content) if change and "_2." in name else content)
        damaged = archive.infolist()[2].header_offset + 1_000_000
    if change is None:
        with path.open("r+b") as file:
            file.seek(damaged)
            file.write(b"damaged")
    results = rehearsed / "results"
    common = ["--data", str(mounted / "data"), "--results", str(results), "--jobs", "1", "--runs", str(RUNS)]
    assert evaluate.main(["--checkpoints", str(path), *common]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"^error: {re.escape(str(path))}/kaggle/tmp/unlearned_checkpoint_2.pth: {message}", error)
    pool = results / "rehearsal" / "kaggle" / "broken.zip"
    assert sorted(run.name for run in pool.glob("*/run_*.npz")) == ["run_00000.npz", "run_00001.npz"]
    shutil.rmtree(pool)


def test_a_notebook_that_stops_says_why_in_one_line(kaggle, tmp_path):
    (kaggle / "input" / "forget.csv").unlink()
    with pytest.raises(Problem, match=r"forget\.csv: cannot be read") as stopped:
        rehearse.play(SUBMISSION, kaggle / "input", tmp_path / "played", RUNS=2)
    assert "\n" not in str(stopped.value)


# The submission run, its restarts and its errors


def test_the_run_that_only_checks_the_notebook(kaggle):
    (kaggle / "input" / "empty.txt").touch()
    cells()["make_submission"]()
    assert zipfile.ZipFile(kaggle / "working" / "submission.zip").namelist() == []


def test_no_input(kaggle, monkeypatch):
    monkeypatch.setenv("REHEARSAL_INPUT", str(kaggle / "nowhere"))
    assert "nowhere" in stop(cells())
    monkeypatch.delenv("REHEARSAL_INPUT")
    message = stop(cells())
    assert "/kaggle/input/neurips-2023-machine-unlearning " in message
    assert "/kaggle/input/competitions/neurips-2023-machine-unlearning:" in message


def test_a_missing_column(kaggle):
    path = kaggle / "input" / "retain.csv"
    path.write_text(path.read_text().replace("age_group", "agegroup"))
    assert stop(cells()).startswith(f"{path}: no column 'age_group'; its columns are image_id, agegroup")


def test_an_original_of_another_shape(kaggle):
    path = kaggle / "input" / "original_model.pth"
    whole = path.read_bytes()
    space = cells()
    torch.save(resnet18(num_classes=7).state_dict(), path)
    assert stop(space) == f"{path}: tensor 'fc.weight' has shape [7, 512], expected [10, 512]"
    torch.save(resnet34(num_classes=10).state_dict(), path)
    assert stop(space) == f"{path}: tensor 'layer1.2.conv1.weight' is not one of resnet18(num_classes=10)"
    torch.save({"state_dict": resnet18(num_classes=10).state_dict()}, path)
    assert stop(space) == f"{path}: tensor 'conv1.weight' is missing"
    torch.save([1, 2], path)
    assert stop(space) == f"{path}: holds a list, not a state dict"
    path.write_bytes(whole[: len(whole) // 2])
    assert stop(space).startswith(f"{path}: cannot be read")
    path.unlink()
    assert stop(space).startswith(f"{path}: cannot be read")


def test_an_image_that_is_damaged(kaggle):
    path = next((kaggle / "input" / "images").rglob("*.png"))
    path.write_bytes(path.read_bytes()[:60])
    assert stop(cells(QUICK.format(fails_in=None))).startswith(f"{path}: not a readable image")


def test_an_unlearning_that_raises(kaggle, monkeypatch):
    monkeypatch.setenv("REHEARSAL_RUNS", "6")
    message = stop(cells(QUICK.format(fails_in=5)))
    assert message.startswith("run 5: unlearning() raised ValueError: five is too much (at: raise ValueError(")
    assert "kept" in message
    kept = sorted(path.name for path in (kaggle / "tmp").iterdir())
    assert {"unlearned_checkpoint_1.pth", "unlearned_checkpoint_3.pth"} <= set(kept)  # of the same process
    assert not any(name.endswith(".part") for name in kept)


def test_too_little_time(kaggle, monkeypatch):
    monkeypatch.setenv("REHEARSAL_HOURS", "1e-5")
    message = stop(cells(QUICK.format(fails_in=None)))
    assert message.startswith("stopped after") and "TIME_BUDGET_HOURS is 1e-05" in message


def test_a_gpu_that_torch_has_no_kernels_for(kaggle, monkeypatch):
    def refuse(*shape, device=None, **more):
        if device == "cuda:0":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")
        return ones(*shape, device=device, **more)

    ones = torch.ones
    space = cells(QUICK.format(fails_in=None))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch, "ones", refuse)
    message = stop(space)
    assert message.startswith("Tesla P100-PCIE-16GB does not work") and "choose the accelerator GPU T4 x2" in message


def test_a_code_that_the_workers_would_not_see(kaggle):
    assert "does not begin with '#:'" in stop(cells(QUICK.format(fails_in=None).replace("#: mine", "# mine")))


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_restarts(kaggle, capsys, monkeypatch):
    """Disk full, a checkpoint cut off, a zip interrupted, another hyperparameter: nothing finished is lost or mixed."""
    tmp, working = kaggle / "tmp", kaggle / "working"
    space = cells(QUICK.format(fails_in=None))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=30e6))
        assert stop(space) == f"{tmp}: 0.0 GB free, 0.0 GB needed for the checkpoints"
    unlimited = resource.RLIM_INFINITY
    try:
        limit_file_size(5_000_000)
        message = stop(space)
        assert "cannot be written" in message and "is the disk full?" in message
        assert not any(path.suffix == ".part" for path in tmp.iterdir())
        limit_file_size(30_000_000)  # a checkpoint, but not a zip of two
        message = stop(space)
        assert "submission.zip: cannot be written" in message
    finally:
        limit_file_size(unlimited)
    made = {path.name: path.read_bytes() for path in tmp.iterdir()}
    assert sorted(made) == ["unlearned_checkpoint_0.pth", "unlearned_checkpoint_1.pth"]

    (tmp / "unlearned_checkpoint_1.pth").write_bytes(made["unlearned_checkpoint_1.pth"][:1_000_000])
    capsys.readouterr()
    space["make_submission"]()
    printed = capsys.readouterr().out
    assert "unlearned_checkpoint_1.pth: cannot be read" in printed and "1 of 2 networks to make" in printed
    archive = working / "submission.zip"
    with zipfile.ZipFile(archive) as entries:
        assert entries.namelist() == [f"kaggle/tmp/{name}" for name in sorted(made)]
        assert all(entries.read(f"kaggle/tmp/{name}") == content for name, content in made.items())
    rehearse.check_zip(archive, 2)

    # Interrupted after the first entry, in the middle of the second.
    (working / "submission.part").write_bytes(archive.read_bytes()[:30_000_000])
    archive.unlink()
    (tmp / "unlearned_checkpoint_1.pth").write_bytes(made["unlearned_checkpoint_1.pth"])
    space["put_back"](working / "submission.part")
    assert {path.name: path.read_bytes() for path in tmp.iterdir()} == made
    assert not (working / "submission.part").exists()

    assert "were made with other values or code" in stop(cells(QUICK.format(fails_in=1)))
    (tmp / "unlearned_checkpoint_1.pth").unlink()
    with pytest.raises(SystemExit, match=r"1 checkpoints instead of 2: .*unlearned_checkpoint_1\.pth is missing"):
        space["move_into_zip"](archive)


# To Kaggle


def metadata(**changes) -> dict:
    return json.loads((ROOT / "notebooks" / "kernel-metadata.json").read_text()) | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_internet": True},
        {"machine_shape": "NvidiaTeslaP100"},
        {"competition_sources": []},
        {"title": "Another title"},
        {"title": "x" * 60},
        {"code_file": "other.ipynb"},
    ],
)
def test_metadata_is_checked(tmp_path, changes):
    path = tmp_path / "kernel-metadata.json"
    path.write_text(json.dumps(metadata()))
    submit.check_metadata(path)
    path.write_text(json.dumps(metadata(**changes)))
    with pytest.raises(Problem, match=next(iter(changes))):
        submit.check_metadata(path)


def test_a_notebook_is_checked_before_it_is_sent(tmp_path):
    submit.check_notebook(SUBMISSION)
    path = tmp_path / "submission.ipynb"
    path.write_text(SUBMISSION.read_text().replace('"import copy\\n"', '"import my_helpers\\n"', 1))
    with pytest.raises(Problem, match="imports my_helpers"):
        submit.check_notebook(path)
    path.write_text(SUBMISSION.read_text().replace('"outputs": []', '"outputs": [{}]', 1))
    with pytest.raises(Problem, match="has outputs"):
        submit.check_notebook(path)


@pytest.fixture
def stand_in():
    with StandIn() as server:
        server.answers = {
            "SaveKernel": [{"versionNumber": 7, "url": "https://www.kaggle.com/code/ada/x"}],
            "GetKernelSessionStatus": [{"status": "RUNNING"}, {"status": "COMPLETE"}],
            "CreateCodeSubmission": [{"message": "Successfully submitted"}],
        }
        yield server


def run_submit(home: Path, server=None, *arguments: str) -> subprocess.CompletedProcess:
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "KAGGLE_CONFIG_DIR": str(home)} | (server.env if server else {})
    command = [sys.executable, str(ROOT / "notebooks" / "submit.py"), "--staging", str(home / "staging"), "--every", "0.1"]
    return subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, cwd=home)


def test_kaggles_own_command_takes_what_is_sent(stand_in, tmp_path):
    done = run_submit(tmp_path, stand_in, "-m", "a try")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does not resolve" not in done.stdout
    pushed = dict(stand_in.sent)["SaveKernel"]
    assert pushed["slug"] == "ada/unlearning-challenge-forget-and-remember"
    assert pushed["newTitle"] == metadata()["title"]
    assert pushed["enableInternet"] is False and pushed["enableGpu"] is True and pushed["isPrivate"] is True
    assert pushed["machineShape"] == "NvidiaTeslaT4"
    assert pushed["competitionDataSources"] == ["neurips-2023-machine-unlearning"]
    code = [cell["source"] for cell in json.loads(pushed["text"])["cells"] if cell["cell_type"] == "code"]
    assert any("def unlearning(" in source for source in code)
    asked = [name for name, _ in stand_in.sent]
    assert asked.index("CreateCodeSubmission") > len(asked) - 1 - asked[::-1].index("GetKernelSessionStatus")
    submitted = dict(stand_in.sent)["CreateCodeSubmission"]
    assert submitted["kernelSlug"] == "unlearning-challenge-forget-and-remember"
    assert (submitted["kernelOwner"], submitted["kernelVersion"], submitted["fileName"]) == ("ada", 7, "submission.zip")
    assert submitted["submissionDescription"] == "a try"


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("SaveKernel", {"error": "Maximum weekly GPU quota reached"}, "Maximum weekly GPU quota reached"),
        ("SaveKernel", {"versionNumber": 7, "invalidCompetitionSources": ["x"]}, "not valid competition sources"),
        ("GetKernelSessionStatus", {"status": "ERROR", "failureMessage": "out of disk"}, "out of disk"),
    ],
)
def test_what_kaggle_refuses_is_not_submitted(stand_in, tmp_path, name, answer, message):
    stand_in.answers[name] = [answer]
    done = run_submit(tmp_path, stand_in)
    assert done.returncode == 1
    assert message in done.stderr
    assert "CreateCodeSubmission" not in dict(stand_in.sent)


def test_without_credentials(tmp_path):
    done = run_submit(tmp_path)
    assert done.returncode == 1
    assert "no Kaggle credentials" in done.stderr and "https://www.kaggle.com/settings/api" in done.stderr
    done = run_submit(tmp_path, None, "--dry-run")
    assert done.returncode == 0
    for command in (
        "kernels push -p",
        "kernels status",
        "competitions submit neurips-2023-machine-unlearning -f submission.zip",
    ):
        assert f"kaggle {command}" in done.stdout
