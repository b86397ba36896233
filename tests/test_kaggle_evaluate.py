"""Scoring on Kaggle's GPUs: the real command, a stand-in for its server, and the pushed notebook run as Kaggle would."""

# ruff: noqa: E402

import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "notebooks")]
import kaggle_evaluate
import rehearse
from evaluate_helpers import FINETUNE, kept, refused
from kaggle_stand_in import StandIn

import evaluate

RUNS = 16


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """With sessions on this machine; `hours` of each, one after the other."""

    def play(text: str, source: Path, folder: Path) -> None:
        (folder).mkdir()
        (folder / "evaluation.ipynb").write_text(text)
        hours = server.hours.pop(0) if server.hours else 1
        rehearse.play(folder / "evaluation.ipynb", source, folder / "played", DEVICE="cpu", HOURS=hours)
        shutil.move(folder / "played" / "working", folder / "working")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    with StandIn(tmp_path / "kaggle", play) as server:
        server.hours = []
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield server


def run(data: Path, folder: Path, *arguments: str, runs: int = RUNS) -> int:
    common = [
        "--data",
        data,
        "--results",
        folder / "results",
        "--runs",
        runs,
        "--staging",
        folder / "staging",
        "--device",
        "cpu",
    ]
    return kaggle_evaluate.main([str(argument) for argument in [*arguments, *common, "--every", "0.2"]])


def test_end_to_end(small_digits, stand_in, tmp_path, capfd):
    (tmp_path / "kaggle").mkdir()
    data = shutil.copytree(small_digits, tmp_path / "data")
    (data / "original_model.pth").unlink(missing_ok=True)
    (data / "original_model.json").unlink(missing_ok=True)
    code = run(data, tmp_path, FINETUNE)
    said = capfd.readouterr()
    print(said.out, said.err)
    assert code == 0
