"""A pool holds whole runs or none, keyed by everything that made them."""

import errno
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluator.files import Problem, read_json, write_atomically, write_json
from evaluator.pool import FORMAT, Pool

MADE_FROM = {"data": "abc", "recipe": {"epochs": 3, "width": 4}, "seed": 0, "config": {"noise": 0.1}}


def values(run: int) -> dict[str, np.ndarray]:
    return {
        "forget_logits": np.full((5, 10), run, dtype=np.float32),
        "ta": np.array(run / 10),
        "seconds": np.array(1.5),
    }


def test_the_key_depends_on_every_value(tmp_path):
    others = [
        MADE_FROM | {"data": "abd"},
        MADE_FROM | {"recipe": {"epochs": 3, "width": 5}},
        MADE_FROM | {"seed": 1},
        MADE_FROM | {"config": {"noise": 0.1000001}},
        MADE_FROM | {"config": {"noise": 0.1, "loss": "ce"}},
        {name: value for name, value in MADE_FROM.items() if name != "seed"},
    ]
    folders = {Pool(tmp_path, made_from).folder for made_from in [MADE_FROM, *others]}
    assert len(folders) == len(others) + 1
    # ... and not on the order in which they are named.
    assert Pool(tmp_path, dict(reversed(MADE_FROM.items()))).folder == Pool(tmp_path, MADE_FROM).folder
    kept = json.loads((Pool(tmp_path, MADE_FROM).folder / "made_from.json").read_text())
    assert kept == MADE_FROM | {"format": FORMAT}


def test_runs_come_back(tmp_path):
    pool = Pool(tmp_path, MADE_FROM)
    assert pool.missing(range(4)) == [0, 1, 2, 3]
    for run in (2, 0):
        pool.save(run, values(run))
    assert pool.missing(range(4)) == [1, 3]
    assert Pool(tmp_path, MADE_FROM).missing([3, 2, 0]) == [3]
    assert Pool(tmp_path, MADE_FROM | {"seed": 1}).missing([0, 2]) == [0, 2]
    kept = pool.load([2, 0])
    assert kept["forget_logits"].shape == (2, 5, 10) and kept["forget_logits"].dtype == torch.float32
    assert kept["forget_logits"][:, 0, 0].tolist() == [2, 0]
    assert kept["ta"].tolist() == [0.2, 0] and kept["ta"].dtype == torch.float64


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_run_that_was_cut_off_is_named(tmp_path, share):
    pool = Pool(tmp_path, MADE_FROM)
    for run in range(3):
        pool.save(run, values(run))
    content = pool.path(1).read_bytes()
    pool.path(1).write_bytes(content[: int(share * len(content))])
    with pytest.raises(Problem) as problem:
        pool.load(range(3))
    assert str(pool.path(1)) in str(problem.value) and "\n" not in str(problem.value)
    assert pool.load([0, 2])["ta"].tolist() == [0, 0.2]  # the others are not lost
    pool.path(1).unlink()
    assert pool.missing(range(3)) == [1]


def test_a_damaged_run_is_named(tmp_path):
    pool = Pool(tmp_path, MADE_FROM)
    for content in (b"x" * 200, b"PK\x03\x04" + b"x" * 200):
        pool.path(0).write_bytes(content)
        with pytest.raises(Problem, match=r"run_00000\.npz"):
            pool.load([0])
    pool.save(0, values(0))
    content = bytearray(pool.path(0).read_bytes())
    content[len(content) // 3] ^= 255
    pool.path(0).write_bytes(content)
    with pytest.raises(Problem, match=r"run_00000\.npz"):
        pool.load([0])
    # Pickled objects are not read.
    with zipfile.ZipFile(pool.path(0), "w") as file, file.open("ta.npy", "w") as member:
        np.lib.format.write_array(member, np.array([{"an": "object"}], dtype=object))
    with pytest.raises(Problem, match=r"run_00000\.npz"):
        pool.load([0])


def test_a_number_is_worked_out_once(tmp_path):
    pool, calls = Pool(tmp_path, MADE_FROM), []

    def measure() -> float:
        calls.append(1)
        return 1.25

    assert [pool.number("cost", measure) for _ in range(3)] == [1.25] * 3
    assert len(calls) == 1
    (pool.folder / "cost.json").write_text('{"val')  # cut off: worked out again
    assert pool.number("cost", measure) == 1.25 and len(calls) == 2
    with pytest.raises(ZeroDivisionError):
        pool.number("other", lambda: 1 / 0)
    assert not (pool.folder / "other.json").exists()


# Whole files or none.


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def full_disk(file) -> None:
    file.write(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wrapped(file) -> None:
    """torch.save and zipfile raise an error of their own on top of it."""
    try:
        full_disk(file)
    except OSError as error:
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos") from error


@pytest.mark.parametrize("write", [full_disk, wrapped])
def test_a_full_disk_leaves_nothing_and_is_named(tmp_path, write):
    path = tmp_path / "run.npz"
    with pytest.raises(Problem) as problem:
        write_atomically(path, write)
    assert str(problem.value).startswith(f"{path}: cannot be written (No space left on device)")
    assert files(tmp_path) == []


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "run.npz"
    write_atomically(path, lambda file: file.write(b"whole"))
    with pytest.raises(Problem):
        write_atomically(path, full_disk)
    assert path.read_bytes() == b"whole" and files(tmp_path) == ["run.npz"]


def test_a_full_disk_in_a_pool(tmp_path, monkeypatch):
    pool = Pool(tmp_path, MADE_FROM)
    pool.save(0, values(0))
    monkeypatch.setattr(np, "savez", lambda file, **values: full_disk(file))
    with pytest.raises(Problem, match=r"run_00001.npz: cannot be written"):
        pool.save(1, values(1))
    assert pool.missing([0, 1]) == [1]
    assert files(pool.folder) == ["made_from.json", "run_00000.npz"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_really_full_disk(tmp_path, monkeypatch):
    """The device that is always full, in place of the fragment."""
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *mode: real(Path("/dev/full") if path.suffix == ".part" else path, *mode))
    with pytest.raises(Problem, match="No space left on device"):
        write_atomically(tmp_path / "net.pth", lambda file: torch.save(torch.zeros(100_000), file))
    assert files(tmp_path) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ValueError])
def test_any_end_leaves_nothing(tmp_path, stop):
    def write(file):
        file.write(b"half of it")
        raise stop

    with pytest.raises(stop):
        write_atomically(tmp_path / "run.npz", write)
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    path = tmp_path / "file" / "run.npz"
    with pytest.raises(Problem, match="cannot be written") as problem:
        write_atomically(path, lambda file: file.write(b"whole"))
    assert str(path) in str(problem.value)
    with pytest.raises(Problem, match="cannot be written"):
        Pool(tmp_path / "file", MADE_FROM)


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"value": 1})

    def write(file):
        file.write(b'{"value": 2')
        assert read_json(path) == {"value": 1}
        file.write(b"}")

    write_atomically(path, write)
    assert read_json(path) == {"value": 2}


@pytest.mark.parametrize("content", ["", '{"value"', "[1, 2]", "3", "[" * 100_000])
def test_read_json_gives_nothing_where_there_is_something_else(tmp_path, content):
    assert read_json(tmp_path / "nothing.json") == {}
    (tmp_path / "other.json").write_text(content)
    assert read_json(tmp_path / "other.json") == {}


def test_made_from_is_written_again_where_it_was_damaged(tmp_path):
    pool = Pool(tmp_path, MADE_FROM)
    whole = pool.made_from.read_bytes()
    for content in (b"", b"rubbish", b"[]"):
        pool.made_from.write_bytes(content)
        assert Pool(tmp_path, MADE_FROM).made_from.read_bytes() == whole


def test_a_run_with_other_values_than_the_others_is_named(tmp_path):
    pool = Pool(tmp_path, MADE_FROM)
    pool.save(0, values(0))
    for other in ({"forget_logits": np.zeros((4, 10), np.float32)}, {"ta": np.zeros(3)}, {"more": np.array(1)}):
        pool.save(1, values(1) | other)
        with pytest.raises(Problem, match=r"run_00001\.npz: cut off or damaged"):
            pool.load([0, 1])


def test_only_what_json_can_say_is_a_key(tmp_path):
    """Text made of an object, such as its address in memory, would be another key each time, or the same for two."""
    with pytest.raises(TypeError):
        Pool(tmp_path, MADE_FROM | {"config": {"noise": object()}})
