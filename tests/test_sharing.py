"""Pools in one file: made in parts, merged, scored elsewhere without training, and refused when anything is wrong."""

import hashlib
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_helpers import FINETUNE, kept, refused, run, times

from evaluator.evaluation import Evaluation
from evaluator.files import Problem
from evaluator.sharing import import_, spans


@pytest.fixture(scope="module")
def made(data, pools, tmp_path_factory) -> Path:
    """A file of the sixteen retrained networks of two splits."""
    file = tmp_path_factory.mktemp("shared") / "pools.zip"
    assert run(data, pools, "pool", "export", file, "--split", "private*", runs=16) == 0
    return file


def rewritten(made: Path, tmp_path: Path, change) -> Path:
    """The file after `change(entries: name -> content)`."""
    with zipfile.ZipFile(made) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    file = tmp_path / "changed.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file


def with_manifest(entries: dict[str, bytes], change) -> None:
    manifest = json.loads(entries["pool.json"])
    change(manifest)
    entries["pool.json"] = json.dumps(manifest).encode()


def with_run(entries: dict[str, bytes], name: str, content: bytes) -> None:
    """Put other content in an entry's place, under a checksum that fits."""
    entries[name] = content
    with_manifest(entries, lambda manifest: manifest["sha256"].update({name: hashlib.sha256(content).hexdigest()}))


def values_of(entries: dict[str, bytes], name: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(entries[name])) as file:
        return {key: file[key] for key in file.files}


def saved(values: dict[str, np.ndarray], save=np.savez) -> bytes:
    file = io.BytesIO()
    save(file, **values)
    return file.getvalue()


def test_an_imported_pool_is_scored_as_at_home_and_nothing_is_trained(data, pools, made, results, tmp_path):
    assert run(data, tmp_path / "there", "pool", "import", made) == 0
    before = times(tmp_path / "there")
    assert len(before) == 32
    for place in (tmp_path / "there", results):
        assert run(data, place, FINETUNE, "--split", "private") == 0
    here, there = (
        {name: value for name, value in kept(place).items() if name.startswith(f"{data.name}/private/")}
        for place in (results, tmp_path / "there")
    )
    assert here == there
    after = times(tmp_path / "there")
    assert {path: after[path] for path in before} == before


def test_parts_made_on_several_machines_merge(data, pools, tmp_path, capsys):
    whole = tmp_path / "whole"
    for part, first in enumerate((0, 4)):
        machine = tmp_path / f"machine {part}"
        assert run(data, machine, "pool", "make", "--first", first, "--count", 4) == 0
        assert run(data, machine, "pool", "export", tmp_path / f"{part}.zip") == 0
    for part in (1, 0, 1):
        assert run(data, whole, "pool", "import", tmp_path / f"{part}.zip") == 0
    out = capsys.readouterr().out
    assert "new runs: 4 to 7; none was there" in out
    assert "new runs: none; 4 were there already and stay" in out
    mine = {name: run for name, run in kept(whole).items() if "retrained" in name}
    home = {name: run for name, run in kept(pools).items() if name in mine}
    assert len(mine) == 8
    assert mine == home


def test_only_some_runs_can_be_exported(data, pools, tmp_path):
    file = tmp_path / "some.zip"
    assert run(data, pools, "pool", "export", file, "--first", 2, "--count", 3) == 0
    with zipfile.ZipFile(file) as archive:
        assert [name for name in archive.namelist() if "run" in name] == [f"public/run_0000{run}.npz" for run in (2, 3, 4)]


def test_weights_travel_on_demand(data, tmp_path, capsys):
    assert run(data, tmp_path / "a", "pool", "make", "--keep-networks") == 0
    assert run(data, tmp_path / "a", "pool", "export", tmp_path / "w.zip", "--keep-networks") == 0
    assert run(data, tmp_path / "b", "pool", "import", tmp_path / "w.zip") == 0
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / place).rglob("network_*")} for place in "ab")
    assert len(a) == 4
    assert a == b

    def other_weights(entries):
        with_run(entries, "public/network_00001.pth", b"no weights")

    line = refused(
        capsys, run(data, tmp_path / "c", "pool", "import", rewritten(tmp_path / "w.zip", tmp_path, other_weights))
    )
    assert "public/network_00001.pth: not a readable network" in line
    assert not list((tmp_path / "c").rglob("run_*"))


def test_weights_that_were_not_kept_cannot_be_exported(data, pools, tmp_path, capsys):
    line = refused(capsys, run(data, pools, "pool", "export", tmp_path / "x.zip", "--keep-networks"))
    assert "network_00000.pth: was not kept; make the runs anew with --keep-networks" in line
    assert not (tmp_path / "x.zip").exists()


def test_the_original_comes_with_the_pool(data, made, tmp_path):
    folder = tmp_path / data.name
    shutil.copytree(data, folder)
    (folder / "original_model.pth").unlink()
    (folder / "original_model.json").unlink()
    assert run(folder, tmp_path / "results", "pool", "import", made) == 0
    for name in ("original_model.pth", "original_model.json"):
        assert (folder / name).read_bytes() == (data / name).read_bytes()


def test_another_original_stays_and_that_is_said(data, made, tmp_path, capsys):
    folder = tmp_path / data.name
    shutil.copytree(data, folder)
    state = torch.load(folder / "original_model.pth", weights_only=True)
    state["fc.bias"] += 1
    torch.save(state, folder / "original_model.pth")
    before = (folder / "original_model.pth").read_bytes()
    assert run(folder, tmp_path / "results", "pool", "import", made) == 0
    assert "is another one and stays; delete it and import again for theirs" in capsys.readouterr().out
    assert (folder / "original_model.pth").read_bytes() == before


def test_a_pool_of_other_data_or_another_recipe_is_refused(data, made, tmp_path, capsys):
    def with_dataset(change) -> Path:
        folder = tmp_path / data.name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(data, folder)
        dataset = json.loads((folder / "dataset.json").read_text())
        change(dataset)
        (folder / "dataset.json").write_text(json.dumps(dataset))
        return folder

    folder = with_dataset(lambda dataset: dataset["recipe"].update(epochs=2))
    line = refused(capsys, run(folder, tmp_path / "results", "pool", "import", made))
    assert "another recipe" in line
    assert "(epochs was 1, here it is 2)" in line

    folder = with_dataset(lambda dataset: dataset.update(name="others"))
    line = refused(capsys, run(folder, tmp_path / "results", "pool", "import", made))
    assert line.endswith("holds pools of small_digits, not of others: give --data")

    folder = with_dataset(lambda dataset: None)
    table = folder / "private-2" / "forget.csv"
    rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join(rows[:-1]))
    line = refused(capsys, run(folder, tmp_path / "results", "pool", "import", made))
    assert "private-2: made for other images or labels" in line
    assert not list((tmp_path / "results").rglob("run_*"))  # nor of the split that fits


RUN = "private/run_00003.npz"


def change_value(key: str, value):
    def change(entries):
        values = values_of(entries, RUN)
        values[key] = value(values[key]) if callable(value) else value
        with_run(entries, RUN, saved(values))

    return change


def leave_out_a_value(entries):
    values = values_of(entries, RUN)
    del values["ta"]
    with_run(entries, RUN, saved(values))


def compress_a_bomb(entries):
    values = values_of(entries, RUN) | {"retain_confidences": np.zeros(10_000_000, np.float32)}
    with_run(entries, RUN, saved(values, np.savez_compressed))


def flip_a_byte(entries):
    entries[RUN] = entries[RUN][:500] + bytes([entries[RUN][500] ^ 1]) + entries[RUN][501:]


def manifest(change):
    return lambda entries: with_manifest(entries, change)


DAMAGES = {
    "no manifest": (lambda entries: entries.pop("pool.json"), "holds no pool.json"),
    "manifest no JSON": (lambda entries: entries.update({"pool.json": b"{"}), "not a file of pools"),
    "manifest a list": (lambda entries: entries.update({"pool.json": b"[]"}), "not a file of pools"),
    "manifest nested": (lambda entries: entries.update({"pool.json": b"[" * 100_000}), "not a file of pools"),
    "another format": (manifest(lambda found: found.update(format=2)), "has format 2, this kit reads 1"),
    "no pools": (manifest(lambda found: found.update(pools={})), "names no data or no pool"),
    "pools a list": (manifest(lambda found: found.update(pools=[1])), "not a file of pools"),
    "runs not numbers": (manifest(lambda found: found["pools"]["private"].update(runs=["0"])), "not those of runs"),
    "a negative run": (manifest(lambda found: found["pools"]["private"].update(runs=[-1])), "not those of runs"),
    "a run twice": (manifest(lambda found: found["pools"]["private"].update(runs=[1, 1])), "not those of runs"),
    "no checksums": (manifest(lambda found: found.update(sha256={})), "does not have the checksum"),
    "a split that is not here": (
        lambda entries: [
            with_manifest(entries, lambda found: found["pools"].update({"../x": found["pools"].pop("private")})),
            entries.update(
                {name.replace("private/", "../x/"): entries.pop(name) for name in list(entries) if "private/" in name}
            ),
        ],
        "../x",
    ),
    "a run is missing": (lambda entries: entries.pop(RUN), f"lacks {RUN}"),
    "a further file": (lambda entries: entries.update({"../../evil.py": b"x"}), "holds ../../evil.py"),
    "an absolute path": (lambda entries: entries.update({"/tmp/evil.py": b"x"}), "holds /tmp/evil.py"),
    "a flipped bit": (flip_a_byte, f"{RUN} does not have the checksum"),
    "rubbish": (lambda entries: with_run(entries, RUN, b"rubbish"), f"{RUN} is not a run of these data"),
    "a pickled object": (change_value("ra", np.array([{}], object)), f"{RUN} is not a run of these data"),
    "other classes": (change_value("forget_logits", lambda logits: logits[:, :9]), "forget_logits has not the shape"),
    "other examples": (change_value("forget_logits", lambda logits: logits[1:]), "forget_logits has not the shape"),
    "float64": (change_value("forget_logits", lambda logits: logits.astype(float)), "is not a run of these data"),
    "a further value": (change_value("more", np.array(1.0)), "more has not the shape"),
    "a value less": (leave_out_a_value, "ta has not the shape"),
    "not finite": (change_value("forget_logits", lambda logits: logits * np.float32(np.nan)), "a value is not finite"),
    "accuracy": (change_value("ta", np.array(1.5)), "an accuracy is not between 0 and 1"),
    "a bomb": (compress_a_bomb, "more than"),
    "original": (
        lambda entries: with_run(entries, "original_model.pth", b"x"),
        "original_model.pth: not a readable network",
    ),
    "no original": (lambda entries: entries.pop("original_model.pth"), "lacks original_model.pth"),
    "made otherwise": (
        manifest(lambda found: found["pools"]["private"]["made_from"].update(format=1)),
        "made by a version of the kit whose runs differ",
    ),
    "another kind": (
        manifest(lambda found: found["pools"]["private"]["made_from"].update(kind="unlearned")),
        "not a pool of retrained networks",
    ),
    "recipe a text": (manifest(lambda found: found["pools"]["private"]["made_from"].update(recipe="x")), "another recipe"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_hostile_file_is_refused_in_one_line_and_nothing_is_written(damage, data, made, tmp_path, capsys):
    change, message = DAMAGES[damage]
    file = rewritten(made, tmp_path, change)
    line = refused(capsys, run(data, tmp_path / "results", "pool", "import", file))
    assert message in line
    assert not list((tmp_path / "results").rglob("run_*"))
    assert not (tmp_path / "evil.py").exists()


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_off_anywhere_is_refused(share, data, made, tmp_path, capsys):
    content = made.read_bytes()
    file = tmp_path / "cut.zip"
    file.write_bytes(content[: int(share * len(content))])
    assert "not a readable pool file" in refused(capsys, run(data, tmp_path / "results", "pool", "import", file))


def test_bytes_changed_anywhere_are_noticed(data, made, tmp_path):
    content = made.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(content), 15).tolist():
        file, results = tmp_path / "bits.zip", tmp_path / f"{place}"
        file.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        try:
            import_(file, lambda split, results=results: Evaluation.of(str(data), split, 4, results, 1, "cpu"))
        except Problem:
            assert not list(results.rglob("run_*"))
        else:  # a date or an attribute of the zip, which nothing reads
            mine = {path.name: path.read_bytes() for path in results.rglob("private/**/run_*")}
            assert len(mine) == 16


def test_no_other_file_is_overwritten(data, pools, tmp_path, capsys):
    mine = tmp_path / "my_method.py"
    mine.write_text("import torch")
    assert "my_method.py: is there already" in refused(capsys, run(data, pools, "pool", "export", mine))
    assert mine.read_text() == "import torch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pool"], "write pool make, pool export FILE or pool import FILE"),
        (["pool", "make", "x"], "write pool make"),
        (["pool", "export"], "write pool make"),
        (["pool", "import", "/no/such.zip"], "/no/such.zip: not a readable pool file"),
        (["pool", "make", "--first", "-1"], "--first -1 --count 4: runs are numbered from 0 to 4999"),
        (["pool", "make", "--count", "0"], "--count 0"),
        (["pool", "make", "--first", "4999", "--count", "2"], "runs are numbered from 0 to 4999"),
        (["pool", "export", "x.zip", "--first", "400"], "none of these runs has been made yet"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, data, results, capsys):
    assert message in refused(capsys, run(data, results, *arguments))


def test_spans():
    assert spans([]) == "none"
    assert spans([3]) == "3"
    assert spans([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"
