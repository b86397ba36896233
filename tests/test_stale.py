"""Nothing stale is ever scored: each change redoes exactly what depends on it, in one live process and across commands."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from evaluate_helpers import FINETUNE, METHOD, command, kept, refused, run, times

from evaluator import pool as pool_module
from evaluator import scoring
from evaluator.checkpoints import Checkpoints
from evaluator.evaluation import Evaluation
from evaluator.files import Problem, code_digest
from evaluator.method import Method
from evaluator.tries import Tries

HELPED = """
import torch
from helper import NOISE

def unlearning(net, retain_loader, forget_loader, val_loader):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += NOISE * torch.randn(parameter.shape)
    net.eval()
"""


def score(data: Path, results: Path, path: Path, **values) -> dict:
    """As in a kernel that lives on: everything in this process, the method read anew."""
    evaluation = Evaluation.of(str(data), runs=4, results=results, jobs=1, device="cpu")
    return evaluation.score(Method.read(path, values=values))


def edit(path: Path, old: str, new: str) -> None:
    """A change that neither the size nor the time of the file tells."""
    before = path.stat()
    text = path.read_text()
    assert old in text and len(old) == len(new)
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def made(results: Path, before: dict) -> dict[str, int]:
    """How many runs of what were made since `before`."""
    now = times(results)
    assert before.items() <= now.items()  # and none anew
    names = [path.parent.parent.name for path in now.keys() - before.keys()]
    return {name: names.count(name) for name in names}


# A method's code


def test_an_edit_in_a_live_process(data, results, tmp_path):
    path = tmp_path / "edited.py"
    path.write_text(METHOD)
    before = times(results)
    first = score(data, results, path)
    assert made(results, before) == {"edited": 4}
    edit(path, "0.02", "0.50")
    second = score(data, results, path)
    assert made(results, before) == {"edited": 8}
    assert second["made_of"]["unlearned"] != first["made_of"]["unlearned"]
    assert second["ra_unlearned"] != first["ra_unlearned"]
    edit(path, "0.50", "0.02")  # as it was: nothing is made, and nothing was kept under the wrong name
    third = score(data, results, path)
    assert made(results, before) == {"edited": 8}
    assert {**third, "checked": 0, "seconds_per_run": 0} == {**first, "checked": 0, "seconds_per_run": 0}


def test_an_edited_cell_of_a_notebook(data, results, tmp_path):
    path = tmp_path / "edited.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": METHOD}]}))
    first = score(data, results, path)
    edit(path, "torch.randn", "torch.zeros")
    assert score(data, results, path)["made_of"]["unlearned"] != first["made_of"]["unlearned"]


def test_a_helper_module_beside_the_method(data, results, tmp_path, capsys):
    """Found by breaking it: the old score was shown again for a ruinous value."""
    folder = tmp_path / "method"
    folder.mkdir()
    (folder / "helped.py").write_text(HELPED)
    (folder / "helper.py").write_text("from deeper import NOISE\n")
    (folder / "deeper.py").write_text("NOISE = 0.02\n")
    (folder / "unused.py").write_text("NOISE = 0.02\n")
    before = times(results)
    first = score(data, results, folder / "helped.py")
    edit(folder / "unused.py", "0.02", "0.90")
    (folder / "deeper.py").write_text("# only a comment\nNOISE = 0.02\n")
    assert score(data, results, folder / "helped.py") == first
    assert made(results, before) == {"helped": 4}
    edit(folder / "deeper.py", "0.02", "0.90")
    second = score(data, results, folder / "helped.py")
    assert made(results, before) == {"helped": 8}
    assert second["made_of"]["unlearned"] != first["made_of"]["unlearned"]
    assert second["ra_unlearned"] != first["ra_unlearned"]


def test_a_file_that_is_read_at_import(tmp_path):
    path = tmp_path / "reads.py"
    path.write_text("import json\n" + HELPED.replace("from helper import NOISE", "NOISE = json.load(open({file!r}))"))
    path.write_text(path.read_text().format(file=str(tmp_path / "noise.json")))
    (tmp_path / "noise.json").write_text("0.02")
    first = Method.read(path).digest
    (tmp_path / "noise.json").write_text("0.90")
    assert Method.read(path).digest != first
    (tmp_path / "noise.json").write_text("0.02")
    assert Method.read(path).digest == first


@pytest.mark.parametrize(
    "line", ["from helper import NOISE as noise", "noise = float(open(__file__.replace('late', 'noise')).read())"]
)
def test_a_file_that_is_first_read_inside_is_refused(data, results, tmp_path, capsys, line):
    """Its change could not be noticed."""
    path = tmp_path / "late.py"
    path.write_text(f"def unlearning(net, *loaders):\n    {line}\n    net.eval()\n")
    (tmp_path / "helper.py").write_text("NOISE = 0.02")
    (tmp_path / "noise.py").write_text("0.02")
    said = refused(capsys, run(data, results, path))
    assert "late.py: run 0: unlearning() reads" in said and "at the top of the file" in said


def test_a_method_that_changes_while_it_is_scored(data, results, tmp_path):
    path = tmp_path / "edited.py"
    path.write_text(METHOD)
    evaluation = Evaluation.of(str(data), runs=4, results=results, jobs=1, device="cpu")
    method = Method.read(path)
    edit(path, "0.02", "0.50")
    with pytest.raises(Problem, match=r"edited\.py: it or a file it reads changed while it was being scored"):
        evaluation.score(method)
    assert not list(results.rglob("edited/*/run_*.npz"))


def test_a_zip_that_changes_while_it_is_scored(tmp_path):
    """Its key is of what it held when it was read."""
    path = tmp_path / "submission.zip"
    for content in (b"one", b"two"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("unlearned_checkpoint_0.pth", content)
        if content == b"one":
            checkpoints = Checkpoints.read(path, 1)
    with pytest.raises(Problem, match=r"submission\.zip: changed while it was being scored; run again"):
        checkpoints.networks(torch.nn.Linear(1, 1), [0], None, None)


def test_presets_count_where_the_code_uses_them(tmp_path):
    """What only Config uses is in the key as `config`; a preset that unlearning() reads itself is code."""
    path = tmp_path / "presets.py"

    def digest(value: float, body: str) -> str:
        path.write_text(f"PRESETS = {{'a': {value}}}\ndef unlearning(net, *loaders):\n    {body}\n")
        return Method.read(path).digest

    assert digest(0.1, "net.eval()") == digest(0.2, "net.eval()")
    assert digest(0.1, "net.fc.weight.data *= PRESETS['a']") != digest(0.2, "net.fc.weight.data *= PRESETS['a']")


def test_a_compiled_file_of_a_helper_is_not_believed(data, results, tmp_path):
    """Python takes it for fresh when the source has the same size and time."""
    (tmp_path / "helped.py").write_text(HELPED)
    (tmp_path / "helper.py").write_text("NOISE = 0.02\n")
    subprocess.run([sys.executable, "-c", "import helper"], cwd=tmp_path, check=True)
    first = Method.read(tmp_path / "helped.py").digest
    edit(tmp_path / "helper.py", "0.02", "0.90")
    assert Method.read(tmp_path / "helped.py").digest != first


def test_the_tuning_notebooks_tries_see_an_edit(data, results, tmp_path):
    path = tmp_path / "edited.py"
    path.write_text(METHOD)
    for old, new in (("0.02", "0.02"), ("0.02", "0.50")):
        edit(path, old, new)
        tries = Tries(Evaluation.of(str(data), runs=4, results=results, jobs=1, device="cpu"))
        tries.add(path, {})
    assert tries.table["kept in"].nunique() == 2
    assert len(tries.figures()) == 4


def test_a_try_that_scores_otherwise_now_is_another_try(data, results, monkeypatch):
    """The table does not go on showing a score of earlier scoring code as that of the last try."""
    tries = Tries(Evaluation.of(str(data), runs=4, results=results, jobs=1, device="cpu"))
    for _ in range(2):
        tries.add(FINETUNE, {})
    assert len(tries.table) == 1
    monkeypatch.setattr(scoring, "VERSION", "another")
    monkeypatch.setattr(scoring, "forgetting_quality", lambda epsilon, runs: 0.5)
    tries.add(FINETUNE, {})
    assert tries.table.F.tolist()[1:] == [0.5]


# Data, recipe, original, scoring


@pytest.fixture
def folder(data, tmp_path) -> Path:
    """A copy of the data to change."""
    return Path(shutil.copytree(data, tmp_path / "data" / data.name))


def change_recipe(folder: Path, **changes) -> None:
    described = json.loads((folder / "dataset.json").read_text())
    described["recipe"] |= changes
    (folder / "dataset.json").write_text(json.dumps(described))


def test_another_recipe_is_not_taken_for_the_originals(folder, results, capsys):
    before = times(results)
    change_recipe(folder, epochs=2)
    line = refused(capsys, run(folder, results, FINETUNE))
    assert f"{folder / 'original_model.pth'}: trained differently (epochs was 1, is now 2): delete it" in line
    assert made(results, before) == {}
    (folder / "original_model.pth").unlink()
    assert run(folder, results, FINETUNE) == 0
    assert made(results, before) == {"retrained": 4, "finetune": 4}
    assert run(folder, results, FINETUNE) == 0
    assert made(results, before) == {"retrained": 4, "finetune": 4}


def test_how_many_networks_are_trained_at_once_is_nothing_to_the_original(folder, results):
    before, original = times(results), (folder / "original_model.pth").stat().st_mtime_ns
    change_recipe(folder, networks_at_once=2)
    assert run(folder, results, FINETUNE) == 0
    assert made(results, before) == {"retrained": 4, "finetune": 4}
    assert (folder / "original_model.pth").stat().st_mtime_ns == original


def test_other_training_images_are_not_taken_for_the_originals(folder, results, capsys):
    path = folder / "public" / "retain.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    line = refused(capsys, run(folder, results, FINETUNE))
    assert "trained differently (other training images): delete it" in line


def test_an_original_that_came_from_elsewhere_is_taken_and_said_to_be(folder, results, capsys):
    (folder / "original_model.json").unlink()
    change_recipe(folder, epochs=2)  # nobody knows of it
    assert run(folder, results, FINETUNE) == 0
    assert f"the original network is the one given in {folder}" in capsys.readouterr().out
    summary = json.loads((results / "small_digits" / "public" / "finetune" / "summary.json").read_text())
    assert summary["original"] == "given"


def test_another_original_redoes_only_the_unlearned_runs(folder, results):
    before = times(results)
    assert run(folder, results, FINETUNE) == 0
    state = torch.load(folder / "original_model.pth", weights_only=True)
    torch.save(state | {"fc.bias": state["fc.bias"] + 1}, folder / "original_model.pth")
    assert run(folder, results, FINETUNE) == 0
    assert made(results, before) == {"finetune": 8}


@pytest.mark.parametrize("column", ["age", "person_id"])
def test_what_a_method_gets_in_its_batches_is_in_the_key(folder, results, column):
    before = times(results)
    table = pd.read_csv(folder / "validation.csv")
    table[column] += 1
    table.to_csv(folder / "validation.csv", index=False)
    assert run(folder, results, FINETUNE) == 0
    assert made(results, before) == {"retrained": 4, "finetune": 4}


def test_changed_data_in_a_live_process(folder, results):
    first = score(folder, results, Path(FINETUNE))
    forget = folder / "public" / "forget.csv"
    forget.write_text("".join(forget.read_text().splitlines(keepends=True)[:-9]))
    (folder / "original_model.pth").unlink()
    second = score(folder, results, Path(FINETUNE))
    assert second["forget_examples"] == first["forget_examples"] - 9


def test_changed_scoring_code_scores_anew_and_makes_no_run(data, results, monkeypatch):
    before = times(results)
    assert run(data, results, FINETUNE) == 0
    summary = results / "small_digits" / "public" / "finetune" / "summary.json"
    first, ceilings = json.loads(summary.read_text()), sorted(results.rglob("ceiling_*.json"))
    with monkeypatch.context() as changed:
        changed.setattr(scoring, "VERSION", "another")
        changed.setattr(scoring, "forgetting_quality", lambda epsilon, runs: 0.5)
        assert run(data, results, FINETUNE) == 0
    second = json.loads(summary.read_text())
    assert (second["forgetting_quality"], second["made_of"]["scoring"]) == (0.5, "another")
    assert made(results, before) == {"finetune": 4}
    assert len(set(results.rglob("ceiling_*.json")) - set(ceilings)) == 1
    assert run(data, results, FINETUNE) == 0
    assert json.loads(summary.read_text())["score"] == first["score"]


def test_the_scoring_version_is_of_the_code():
    """A comment in metric.py is none of it; a constant is."""
    source = (Path(scoring.__file__).parent / "metric.py").read_text()
    assert code_digest(ast.parse(source + "\n# a comment\n")) == code_digest(ast.parse(source))
    assert code_digest(ast.parse(source.replace("BIN_WIDTH = 0.5", "BIN_WIDTH = 0.25"))) != code_digest(ast.parse(source))


def test_the_digest_of_code_is_that_of_every_python():
    """3.11, 3.12 and 3.13 dump a syntax tree differently; runs made with one are found with another."""
    code = ast.parse("class A:\n    def f(self, x=()):\n        return x\n")
    assert code_digest(code) == "61740c1f3bb542964bbf587c390d9f38b70412fb2e49bebf75c9ba45383a4ec4"


def test_a_format_of_pools_of_checkpoints_too(results, data, monkeypatch):
    """Another format is another folder, for every kind of pool."""
    before = times(results)
    assert run(data, results, FINETUNE) == 0
    monkeypatch.setattr(pool_module, "FORMAT", pool_module.FORMAT + 1)
    assert run(data, results, FINETUNE) == 0
    assert made(results, before) == {"finetune": 8, "retrained": 4}


# Files that are not what they were


@pytest.fixture(scope="module")
def scored_once(data, pools, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scored") / "results"
    shutil.copytree(pools, folder)
    assert run(data, folder, FINETUNE, runs=4) == 0
    return folder


@pytest.fixture
def scored(scored_once, tmp_path) -> Path:
    """A copy of results with a method's summary, to damage."""
    return Path(shutil.copytree(scored_once, tmp_path / "results"))


RUBBISH = [b"", b"rubbish", b"[1, 2]", b'{"made_of": 3}', b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94."]


@pytest.mark.parametrize("content", RUBBISH, ids=["empty", "rubbish", "list", "other", "pickle"])
@pytest.mark.parametrize(
    "name",
    [
        "finetune/summary.json",
        "finetune/*/made_from.json",
        "retrained/*/made_from.json",
        "retrained/*/ceiling_*.json",
        "finetune/*/cost_cpu.json",
        "finetune/examples.csv",
    ],
)
def test_a_damaged_file_is_made_anew(data, scored, name, content):
    before, runs = kept(scored), times(scored)
    folder = scored / "small_digits" / "public"
    (path,) = folder.glob(name)
    path.write_bytes(content)
    if path.name == "cost_cpu.json":
        (folder / "finetune" / "summary.json").unlink()  # else nobody asks for it
    assert run(data, scored, FINETUNE) == 0
    assert kept(scored) == before and times(scored) == runs
    assert path.read_bytes() != content


def test_an_altered_summary_is_made_anew(data, scored):
    before = kept(scored)
    (path,) = scored.rglob("summary.json")
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"score": 0.9}))
    assert run(data, scored, FINETUNE) == 0
    assert kept(scored) == before


@pytest.mark.parametrize("content", RUBBISH[1:], ids=["rubbish", "list", "other", "pickle"])
@pytest.mark.parametrize("kind", ["finetune", "retrained"])
def test_a_damaged_run_is_named(data, scored, capsys, kind, content):
    path = next(scored.rglob(f"public/{kind}/*/run_00002.npz"))
    path.write_bytes(content)
    next(scored.rglob("summary.json")).unlink()
    assert f"{path}: cut off or damaged; delete it" in refused(capsys, run(data, scored, FINETUNE))


def test_a_run_of_another_pool_is_named(data, scored, capsys):
    path = next(scored.rglob("public/finetune/*/run_00002.npz"))
    shutil.copy(next(scored.rglob("private/retrained/*/run_00002.npz")), path)
    next(scored.rglob("summary.json")).unlink()
    assert f"{path}: cut off or damaged" in refused(capsys, run(data, scored, FINETUNE))


def test_no_old_page_beside_a_new_score(data, scored):
    """A new score takes the page away until it is written anew, and so do figures of earlier versions."""
    folder = scored / "small_digits" / "public"
    assert run(data, scored, FINETUNE) == 0
    (folder / "finetune" / "epsilons.png").write_bytes(b"of an earlier version")
    page = (folder / "report.html").read_text()
    evaluation = Evaluation.of(str(data), runs=4, results=scored, jobs=1, device="cpu")
    evaluation.score(Method.read(FINETUNE, values={"learning_rate": 0.5}))
    assert not (folder / "report.html").exists() and not list(folder.rglob("*.png"))
    assert run(data, scored, FINETUNE) == 0
    assert (folder / "report.html").read_text() == page


def test_two_files_of_one_name(data, results, tmp_path, monkeypatch, capsys):
    """In one command they are refused; apart, the second takes the first's place and says so."""
    paths = []
    for folder, noise in (("one", "0.02"), ("two", "0.90")):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "same.py")
        paths[-1].write_text(METHOD.replace("0.02", noise))
    line = refused(capsys, run(data, results, *paths))
    assert f"{paths[0]} and {paths[1]}: have the same name" in line
    scores = []
    for path in (*paths, paths[0]):
        assert run(data, results, path) == 0
        summary = json.loads((results / "small_digits" / "public" / "same" / "summary.json").read_text())
        assert summary["path"] == str(path)
        scores.append(summary["score"])
    assert f"same: replaces the results of {paths[0]}" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "one")
    assert run(data, results, Path("same.py")) == 0  # the file of the last run, named otherwise
    assert "replaces" not in capsys.readouterr().err
    assert scores[0] == scores[2] != scores[1]


def test_two_evaluations_at_once(data, results, tmp_path):
    """The second waits for the first, and finds what it made. Without a terminal there are no control characters."""
    path = tmp_path / "noisy.py"
    path.write_text(METHOD)
    processes = [
        subprocess.Popen(command(data, results, path, runs=12), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum("waiting for another evaluation" in errors for _, errors in said) == 1
    assert said[0][0] == said[1][0]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", "".join(out + errors for out, errors in said))
    (pool,) = results.rglob("noisy/*/")
    assert len(list(pool.glob("run_*.npz"))) == 12


def test_alone_in_a_process_that_holds_the_results_already(data, results):
    evaluation = Evaluation.of(str(data), runs=4, results=results, jobs=1, device="cpu")
    with evaluation.alone(), evaluation.alone():
        assert evaluation.score(Method.read(FINETUNE))["runs"] == 4
    with Evaluation.of(str(data), runs=4, results=results, jobs=1, device="cpu").alone():
        pass
