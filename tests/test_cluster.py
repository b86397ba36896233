"""The same commands on a Dask cluster: scheduler and workers are processes of their own."""

import contextlib
import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import evaluate_helpers
import pytest
import torch
from evaluate_helpers import FINETUNE, METHOD, ROOT, bad, kept, refused

import evaluate
from evaluator import cluster
from evaluator.files import Problem

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")
GATED = "import pathlib, time\n" + METHOD.replace(
    "    with torch",
    "    while torch.initial_seed() > 0 and not pathlib.Path(GATE).exists():\n        time.sleep(0.05)\n    with torch",
    1,
)


class Cluster:
    """A scheduler and workers, started as their users would: by the dask command."""

    def __init__(self, folder: Path):
        self.folder, self.processes = folder, {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.scheduler()

    def start(self, what: str, *arguments: str, cwd: Path = ROOT, name: str | None = None) -> None:
        command = [sys.executable, "-m", "dask", what, *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with (self.folder / f"{name or what}.log").open("w") as log:
            started = subprocess.Popen(
                command, cwd=cwd, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.processes[name or what] = started

    def scheduler(self) -> None:
        self.start("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")

    def worker(self, name: str, cwd: Path = ROOT, *arguments: str) -> None:
        self.start("worker", self.address, "--nthreads", "1", "--no-dashboard", *arguments, cwd=cwd, name=name)

    def kill(self, name: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes.pop(name).wait()

    def client(self):
        return distributed.Client(self.address, set_as_default=False)

    def wait_for(self, workers: int) -> None:
        """Until the scheduler knows exactly so many."""
        with self.client() as client:
            wait_until(lambda: len(client.nthreads()) == workers)


def forget_clients() -> None:
    """Dask may wait for itself for ever if a client is collected while another one connects."""
    cluster._clients.clear()
    gc.collect()


@contextlib.contextmanager
def started(folder: Path, workers: int):
    made = Cluster(folder)
    try:
        for number in range(workers):
            made.worker(f"worker {number}")
        if workers:
            made.wait_for(workers)
        yield made
    finally:
        forget_clients()
        for name in list(made.processes):
            made.kill(name)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    with started(tmp_path_factory.mktemp("cluster"), 2) as made:
        yield made


@pytest.fixture
def method(tmp_path) -> Path:
    """One network per run, with a module beside it that no worker has."""
    (tmp_path / "beside.py").write_text("NOISE = 0.02\n")
    path = tmp_path / "noisy.py"
    path.write_text(METHOD.replace("import torch\n", "import beside\nimport torch\n", 1).replace("= 0.02", "= beside.NOISE"))
    return path


class Gated:
    """A method whose runs wait, all but the first, until the gate is opened."""

    def __init__(self, folder: Path):
        self.method, self.gate = folder / "gated.py", folder / "gate"
        self.method.write_text(f"GATE = {str(self.gate)!r}\n{GATED}")

    def open(self) -> None:
        self.gate.touch()


@pytest.fixture
def gated(tmp_path):
    made = Gated(tmp_path)
    yield made
    made.open()


def run(address: str, data: Path, results: Path, *arguments, runs: int = 8) -> int:
    common = ["--data", data, "--results", results, "--runs", runs, "--device", "cpu", "--dask", address]
    return evaluate.main([str(argument) for argument in [*arguments, *common]])


def done(results: Path) -> dict[Path, int]:
    return {path: when for path, when in evaluate_helpers.times(results).items() if "gated" in path.parts}


def wait_until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_same_as_on_one_machine(two_workers, data, method, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    assert evaluate_helpers.run(data, here, method, FINETUNE, runs=8) == 0
    assert run(two_workers.address, data, there, method, FINETUNE) == 0
    assert kept(there) == kept(here)
    assert len(list(there.rglob("run_*.npz"))) == 3 * 8
    with two_workers.client() as client:  # a worker's own process only starts others, and stays small
        assert not any(client.run(lambda: "torch" in __import__("sys").modules).values())


def test_weights_come_back_too(two_workers, data, tmp_path):
    assert run(two_workers.address, data, tmp_path, FINETUNE, "--keep-networks", runs=4) == 0
    assert len(list(tmp_path.rglob("network_*.pth"))) == 2 * 4


def test_a_worker_that_joins_late_gets_work_and_does_that_of_one_killed(tmp_path, data, results, gated, launcher):
    here = tmp_path / "here"
    shutil.copytree(results, here)
    with started(tmp_path, 1) as made:
        launcher.start(data, results, gated.method, "--dask", made.address, runs=8, jobs=None)
        wait_until(lambda: done(results))
        made.worker("late")
        made.wait_for(2)
        with made.client() as client:
            wait_until(lambda: all(client.processing().values()))  # both have tasks
        made.kill("worker 0")
        gated.open()
        assert launcher.wait() == 0, launcher.errors()
    assert evaluate_helpers.run(data, here, gated.method, runs=8) == 0
    assert kept(results) == kept(here)


def test_a_lost_scheduler(tmp_path, data, results, gated, launcher):
    soon = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "3s"}
    with started(tmp_path, 1) as made:
        launcher.start(data, results, gated.method, "--dask", made.address, runs=8, jobs=None, environment=soon)
        wait_until(lambda: done(results))
        made.kill("scheduler")
        assert launcher.wait() == 1
    errors = launcher.errors()
    line = errors.rstrip("\n").splitlines()[-1]
    assert re.match(r"error: tcp://\S+: the scheduler or the data sent to it were lost .*the same command goes on$", line)
    assert "Traceback" not in errors
    before = done(results)
    assert len(before) == 1
    gated.open()
    with started(tmp_path, 1) as made:
        assert run(made.address, data, results, gated.method) == 0
    now = done(results)
    assert len(now) == 8 and before.items() <= now.items()


def test_a_new_scheduler_in_place_of_a_lost_one(tmp_path):
    """In one process, as in a notebook."""
    with started(tmp_path, 1) as made, dask.config.set({"distributed.comm.timeouts.connect": "3s"}):
        lost = cluster._client(made.address)
        assert cluster._client(made.address) is lost
        for name in list(made.processes):
            made.kill(name)
        wait_until(lambda: lost.status != "running")
        made.scheduler()
        made.worker("new")
        with dask.config.set({"distributed.comm.timeouts.connect": "60s"}):
            assert list(cluster.on_workers(int, ["1", "2"], made.address, str)) in ([1, 2], [2, 1])


@pytest.mark.parametrize(
    ("job", "task", "error"), [(partial(torch.ones, -1), 1, RuntimeError), (os.stat, "/not/there", FileNotFoundError)]
)
def test_an_error_in_a_job_is_not_taken_for_a_lost_scheduler(two_workers, job, task, error):
    with pytest.raises(error):
        list(cluster.on_workers(job, [task], two_workers.address, str))


def test_no_scheduler(data, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with dask.config.set({"distributed.comm.timeouts.connect": "0.5s"}):
        for odd in (address, "nonsense", "http://127.0.0.1:1", "tcp://127.0.0.1:notaport", "tcp://"):
            line = refused(capsys, run(odd, data, tmp_path, FINETUNE))
            assert line.startswith(f"error: --dask {odd}: no scheduler answers there")
            forget_clients()


def test_no_worker(data, tmp_path, capsys):
    with started(tmp_path, 0) as made, dask.config.set({"distributed.comm.timeouts.connect": "5s"}):
        line = refused(capsys, run(made.address, data, tmp_path / "results", FINETUNE))
    assert f"--dask {made.address}: the scheduler has no worker" in line


def test_workers_that_differ(tmp_path, data, results, gated, launcher, capsys):
    other, nothing = tmp_path / "other", tmp_path / "nothing"
    shutil.copytree(ROOT / "evaluator", other / "evaluator")
    with (other / "evaluator" / "metric.py").open("a") as file:
        file.write("# edited\n")
    nothing.mkdir()
    differs = r"error: worker tcp://\S+: the kit is \w+, here \w+: give it the same, or stop it"
    with started(tmp_path, 1) as made:
        launcher.start(data, results, gated.method, "--dask", made.address, runs=8, jobs=None)
        wait_until(lambda: done(results))
        made.worker("other", other)
        assert launcher.wait() == 1 and re.match(differs, launcher.errors().splitlines()[-1])
        assert re.match(differs, refused(capsys, run(made.address, data, results, FINETUNE)))
        made.kill("other")
        made.wait_for(1)
        made.worker("without", nothing)
        made.wait_for(2)
        line = refused(capsys, run(made.address, data, results, FINETUNE))
        assert re.search(r"worker tcp://\S+: No module named 'evaluator'[:;] start it in the kit's folder", line)


def test_what_goes_wrong_in_a_method_names_the_worker(two_workers, data, results, tmp_path, capsys):
    line = refused(capsys, run(two_workers.address, data, results, bad(tmp_path, "raise ValueError('no')"), runs=4))
    assert re.search(r"bad.py: run \d: unlearning\(\) raised ValueError: no \(line 5\) \(on worker tcp://", line)
    line = refused(capsys, run(two_workers.address, data, results, bad(tmp_path, "import os\nos._exit(3)"), runs=4))
    assert re.search(r"bad.py: run \d: the process ended on its own, with exit code 3", line)
    diverges = bad(tmp_path, "next(net.parameters()).data.fill_(float('nan'))\nnet.eval()")
    assert "left NaN" in refused(capsys, run(two_workers.address, data, results, diverges, runs=4))


def test_a_method_whose_imports_a_worker_lacks(two_workers, data, results, tmp_path, capsys, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "only_here.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(elsewhere))
    monkeypatch.syspath_prepend(str(elsewhere))
    file = tmp_path / "imports.py"
    file.write_text("import only_here\n" + METHOD)
    line = refused(capsys, run(two_workers.address, data, results, file, runs=4))
    assert "No module named 'only_here'" in line and "on worker tcp://" in line


def test_jobs_are_the_workers_own_matter(two_workers, data, tmp_path, capsys):
    assert "--jobs 2: the workers of --dask say themselves" in refused(
        capsys, run(two_workers.address, data, tmp_path, FINETUNE, "--jobs", "2")
    )


def test_an_interruption_leaves_no_task(two_workers, data, results, gated, launcher):
    child = launcher.start(data, results, gated.method, "--dask", two_workers.address, runs=8, jobs=None)
    wait_until(lambda: done(results))
    os.kill(child, signal.SIGINT)
    assert launcher.wait() == 130 and "the same command resumes from there" in launcher.errors()
    gated.open()
    with two_workers.client() as client:
        wait_until(lambda: not any(client.processing().values()), 20)


def test_without_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(Problem, match="--dask needs Dask: pip install distributed"):
        cluster._client("tcp://127.0.0.1:1")
