"""What the tests of evaluate.py share: a method, the command, and what it keeps."""

import json
import select
import subprocess
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


def command(data: Path, results: Path, *arguments, runs: int = 4, jobs: int | None = 1) -> list[str]:
    common = ["--data", data, "--results", results, "--runs", runs, "--device", "cpu"]
    common += ["--jobs", jobs] if jobs else []
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


class Launcher:
    """Runs evaluate.py's main in processes forked from one that has imported everything: seconds sooner than a new one.

    Each is in a process group of its own, with its workers.
    """

    SOURCE = """
import json, multiprocessing.forkserver, os, resource, sys
import evaluate

fork = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method: fork  # workers too start without importing
multiprocessing.forkserver.ensure_running = lambda: None
for line in sys.stdin:
    arguments, errors, largest_file, environment = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file,) * 2)
        os._exit(evaluate.main(arguments))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

    def __init__(self, folder: Path):
        self.file = folder / "errors"
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SOURCE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )  # without a buffer, so that select sees all that is left to read

    def start(
        self, *arguments, largest_file: int | None = None, environment: dict[str, str] | None = None, **options
    ) -> int:
        """What `command` would run; returns the process' number. largest_file: bytes that no file may grow beyond."""
        asked = [command(*arguments, **options)[2:], str(self.file), largest_file, environment or {}]
        self.process.stdin.write(f"{json.dumps(asked)}\n".encode())
        self.child = int(self.process.stdout.readline())
        return self.child

    def running(self) -> bool:
        return not select.select([self.process.stdout], [], [], 0)[0]

    def wait(self, seconds: float = 300) -> int:
        """The exit code, once it has ended."""
        assert select.select([self.process.stdout], [], [], seconds)[0], f"still running after {seconds} seconds"
        return int(self.process.stdout.readline())

    def errors(self) -> str:
        return self.file.read_text()
