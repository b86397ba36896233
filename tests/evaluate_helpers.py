"""What the tests of evaluate.py share: a method, the command, and what it keeps."""

import json
import sys
from pathlib import Path

import numpy as np

import evaluate

ROOT = Path(__file__).resolve().parent.parent
FINETUNE = str(ROOT / "methods" / "finetune.py")  # K networks as one

# One network per run, of any user's code: a little noise, so that runs differ, and half an epoch of repair.
METHOD = """
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class Config:
    noise: float = 0.02

def unlearning(net, retain_loader, forget_loader, val_loader, config=Config()):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += config.noise * torch.randn(parameter.shape)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    net.train()
    for batch in retain_loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(batch["image"]), batch["age_group"]).backward()
        optimizer.step()
    net.eval()
"""


def run(data: Path, results: Path, *arguments, runs: int = 4, jobs: int = 1) -> int:
    common = ["--data", data, "--results", results, "--runs", runs, "--jobs", jobs, "--device", "cpu"]
    return evaluate.main([str(argument) for argument in [*arguments, *common]])


def command(data: Path, results: Path, *arguments, runs: int = 4, jobs: int = 1) -> list[str]:
    common = ["--data", data, "--results", results, "--runs", runs, "--jobs", jobs, "--device", "cpu"]
    return [sys.executable, str(ROOT / "evaluate.py"), *(str(argument) for argument in [*arguments, *common])]


def kept(results: Path) -> dict[str, dict]:
    """Everything in the results that must not depend on anything but the inputs: all but times."""
    found = {}
    for path in sorted(results.rglob("run_*.npz")):
        with np.load(path) as file:
            values = {name: file[name].tobytes() for name in file.files if name != "seconds"}
        found[str(path.relative_to(results))] = values
    for path in sorted(results.rglob("summary.json")):
        times = ("seconds_per_run", "fraction_of_retraining", "checked")
        summary = {name: value for name, value in json.loads(path.read_text()).items() if name not in times}
        found[str(path.relative_to(results))] = summary
    for path in sorted(results.rglob("examples.csv")):
        found[str(path.relative_to(results))] = {"text": path.read_text()}
    return found


def times(results: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in results.rglob("run_*.npz")}


def refused(capsys, code: int) -> str:
    assert code == 1
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert line.startswith("error: ")
    return line


def bad(tmp_path: Path, body: str) -> Path:
    """A method file; the body's lines are unlearning's."""
    path = tmp_path / "bad.py"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    path.write_text(
        f"import time\nimport torch\n\ndef unlearning(net, retain_loader, forget_loader, val_loader):\n{lines}\n"
    )
    return path
