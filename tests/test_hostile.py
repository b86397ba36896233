"""Broken on purpose: code that misbehaves, values out of range, files in the way. Each ends in one clear line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import markupsafe
import pytest
import torch
from evaluate_helpers import FINETUNE, METHOD, bad, command, kept, refused, run, times

import evaluate
from evaluator import scoring, tuning
from evaluator.data import load
from evaluator.evaluation import Evaluation
from evaluator.files import Problem
from evaluator.method import Method
from evaluator.tries import Tries

IN_RUN_2 = "if torch.initial_seed() == 2:\n    {}\nnet.eval()"


def method(tmp_path: Path, source: str, name: str = "bad") -> Path:
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    return path


# What code does to the process it runs in


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("import sys; sys.exit(0)", "unlearning() called sys.exit(0)"),
        ("raise SystemExit", "unlearning() called sys.exit()"),
        ("import os; os._exit(3)", "ended on its own, with exit code 3"),
        ("import os; os._exit(0)", "ended on its own, with exit code 0"),
        ("import os; os.abort()", "ended by signal 6"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9, perhaps because memory ran out: try fewer --jobs"),
        ("import ctypes; ctypes.string_at(0)", "ended by signal 11"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("def f(): f()\n    f()", "raised RecursionError"),
        ("raise MemoryError('no memory')", "raised MemoryError: no memory"),
        ("class E(BaseException): pass\n    raise E('x')", "raised E: x"),
        ("torch.set_default_dtype(torch.float64)", "changed torch's default dtype from torch.float32 to torch.float64"),
        ("torch.set_grad_enabled(False)", "changed whether torch computes gradients from True to False"),
        ("torch.set_num_threads(3)", "changed torch's number of threads from 1 to 3"),
        ("torch.set_default_device('meta')", "changed torch's default device from cpu to meta"),
        ("torch.use_deterministic_algorithms(True)", "changed torch's deterministic algorithms from False to True"),
        ("torch.set_float32_matmul_precision('medium')", "changed torch's precision of float32 products"),
        ("torch.autograd.set_detect_anomaly(True)", "changed torch's anomaly detection"),
        ("import os; os.chdir('/')", "changed the working folder"),
        ("net.state_dict = None", "what unlearning() left is no longer a usable network"),
        ("net._modules['fc'] = 3; return", "is no longer a usable network"),
        ("del net.fc", "fc.weight' is missing"),
        ("net._modules.clear()", "is missing"),
        ("net.fc.weight.data = torch.zeros(3)", "tensor 'fc.weight' has shape [3]"),
        ("return 0", "returned a int"),
    ],
)
def test_code_that_misbehaves_in_one_run(data, results, tmp_path, capsys, line, named):
    path = bad(tmp_path, IN_RUN_2.format(line))
    said = refused(capsys, run(data, results, path, runs=4))
    assert str(path) in said and "run 2" in said and named in said, said
    kept_runs = sorted(file.stem for file in results.glob("*/public/bad/*/run_*.npz"))
    assert kept_runs == ["run_00000", "run_00001"]
    assert not list(results.rglob("bad/summary.json"))


@pytest.mark.parametrize(
    ("line", "named"),
    [("import sys; sys.exit(0)", "called sys.exit(0)"), ("import os; os._exit(3)", "ended on its own, with exit code 3")],
)
def test_code_that_ends_one_of_two_processes(data, results, tmp_path, capsys, line, named):
    path = bad(tmp_path, IN_RUN_2.format(line))
    said = refused(capsys, run(data, results, path, runs=12, jobs=2))
    assert str(path) in said and "run 2" in said and named in said, said
    kept_runs = {file.stem for file in results.glob("*/public/bad/*/run_*.npz")}
    assert kept_runs & {"run_00000", "run_00001"} and "run_00002" not in kept_runs


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("import sys; sys.exit(0)", "importing it called sys.exit(0)"),
        ("import os; os._exit(4)", "importing it: the process ended on its own, with exit code 4"),
        ("raise KeyboardInterrupt", "importing it raised KeyboardInterrupt"),
        ("import torch; torch.set_default_dtype(torch.float64)", "importing it changed torch's default dtype"),
        ("import torch; torch.set_grad_enabled(False)", "importing it changed whether torch computes gradients"),
        ("x = 1 / 0", "importing it raised ZeroDivisionError: division by zero (line 1)"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def unlearning(:", "SyntaxError"),
        ("\0", "importing it raised"),
        ("# -*- coding: nonsense -*-", "importing it raised SyntaxError"),
    ],
)
def test_code_that_misbehaves_when_it_is_imported(data, results, tmp_path, capsys, line, named):
    path = method(tmp_path, f"{line}\ndef unlearning(net, *loaders):\n    net.eval()\n")
    said = refused(capsys, run(data, results, path))
    assert str(path) in said and named in said, said
    assert not list(results.rglob("bad"))


def test_what_one_method_does_to_its_process_is_nothing_to_the_next(data, results, tmp_path, capsys):
    """In one command, in this process: functions replaced, modules changed, threads left running."""
    spoils = method(
        tmp_path,
        "import threading, time, torch\n"
        "from evaluator import metric, pool, training\n"
        "torch.nn.functional.cross_entropy = lambda *a, **k: 1 / 0\n"
        "torch.randn = lambda *a, **k: 1 / 0\n"
        "metric.forgetting_quality = lambda *a: 1.0\n"
        "training.worker_seconds = lambda device: 0.0\n"
        "def unlearning(net, *loaders):\n"
        "    torch.optim.SGD.step = None\n"
        "    threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "    net.eval()\n",
        "spoils",
    )
    noisy = method(tmp_path, METHOD, "noisy")
    assert run(data, results, spoils, noisy, FINETUNE, runs=4) == 0
    alone = tmp_path / "alone"
    shutil.copytree(results, alone)
    for name in ("noisy", "finetune"):
        shutil.rmtree(alone / data.name / "public" / name)
    assert run(data, alone, noisy, FINETUNE, runs=4) == 0
    found = kept(alone)
    assert {name: value for name, value in kept(results).items()} == found
    summary = json.loads((results / data.name / "public" / "spoils" / "summary.json").read_text())
    assert summary["forgetting_quality"] < 1  # its own score is worked out here, too


def test_only_the_state_dict_is_scored(data, results, tmp_path):
    """As in the competition, which loads a checkpoint into a fresh network."""
    lines = "net.forward = lambda x: 1 / 0\nnet.fc.register_forward_hook(lambda *_: 1 / 0)\nnet.eval()"
    assert run(data, results, bad(tmp_path, lines)) == 0
    plain = method(tmp_path, "def unlearning(net, *loaders):\n    net.eval()\n", "plain")
    assert run(data, results, plain) == 0
    scores = [json.loads(next(results.rglob(f"{name}/summary.json")).read_text())["score"] for name in ("bad", "plain")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("net.members[1].fc.weight.data = torch.zeros(10, 32)", "'fc.weight' of a member is no longer part of the ensemble"),
        ("net.members.pop()", "left 3 members"),
        ("net.members[2].fc = torch.nn.Linear(32, 7)", "run 2: the network does not match the original"),
        ("net.members[3].fc.bias.data.fill_(float('nan'))", "run 3: unlearning() left NaN"),
        ("net.members[0].layer1.train()", "run 0: unlearning() left the network in train mode"),
    ],
)
def test_an_ensemble_that_was_taken_apart(data, results, tmp_path, capsys, line, named):
    path = method(tmp_path, f"import torch\nENSEMBLE = True\ndef unlearning(net, *loaders):\n    net.eval()\n    {line}\n")
    assert named in refused(capsys, run(data, results, path))


def test_a_method_that_swallows_everything_meets_the_time_limit(data, results, tmp_path, capsys):
    lines = "for _ in range(3):\n    try:\n        time.sleep(60)\n    except:\n        pass"
    said = refused(capsys, run(data, results, bad(tmp_path, lines), "--time-limit", "0.5"))
    assert "took longer than the time limit of 0.5 s" in said


# Configs


CONFIG = """
from dataclasses import dataclass
from typing import Annotated
@dataclass(frozen=True)
class Config:
    rate: float = 0.1
    count: int = 2
    word: str = "a"
    flag: bool = False
    several: tuple[float, ...] = (1, 2)
    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"Config needs rate >= 0: {self}")
PRESETS = {"mine": Config(rate=0.5)}
def unlearning(net, retain, forget, validation, config=Config()):
    net.eval()
"""


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rat": 1}, "Config has no field 'rat'; its fields are rate, count, word, flag, several"),
        ({"rate": "fast"}, "rate is 'fast', it must be of type float"),
        ({"rate": None}, "rate is None, it must be of type float"),
        ({"rate": True}, "rate is True, it must be of type float"),
        ({"rate": -1}, "Config needs rate >= 0"),
        ({"count": 2.5}, "count is 2.5, it must be of type int"),
        ({"word": 3}, "word is 3, it must be of type str"),
        ({"flag": 1}, "flag is 1, it must be of type bool"),
        ({"several": 3}, "several is 3, it must be of type tuple[float, ...]"),
        ({"several": ("a",)}, "several is ('a',), it must be of type tuple[float, ...]"),
    ],
)
def test_a_value_that_a_config_cannot_have(tmp_path, values, named):
    path = method(tmp_path, CONFIG)
    with pytest.raises(Problem) as problem:
        Method.read(path, values=values)
    assert str(path) in str(problem.value) and named in str(problem.value) and "\n" not in str(problem.value)


def test_values_that_fit(tmp_path):
    path = method(tmp_path, CONFIG)
    assert Method.read(path, values={"rate": 1, "several": [3, 4.5]}).config["several"] == (3, 4.5)
    assert Method.read(path, "mine").config["rate"] == Method.read(path, preset="mine").config["rate"] == 0.5
    assert Method.read(path, "another data set").config["rate"] == 0.1


def test_a_preset_that_is_not_there(data, results, tmp_path, capsys):
    path = method(tmp_path, CONFIG)
    said = refused(capsys, run(data, results, path, "--preset", "nonsense"))
    assert f"{path}: no preset 'nonsense'; there are: mine" in said
    said = refused(capsys, run(data, results, method(tmp_path, METHOD), "--preset", "nonsense"))
    assert "no preset 'nonsense'; there are: none" in said


def test_a_global_config_of_a_file_is_nothing(tmp_path):
    """Only a notebook's `config` holds its hyperparameters."""
    path = method(tmp_path, CONFIG + "\nconfig = Config(rate=0.9)\n")
    assert Method.read(path, preset="mine").config["rate"] == 0.5


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("@dataclass(frozen=True)\n", "", "Config() takes no arguments"),
        ("def unlearning", "Config = dict\ndef unlearning", "Config must be a dataclass"),
        ('word: str = "a"', "word: object = print", "word is a builtin_function_or_method; use numbers, text or tuples"),
        ("rate: float = 0.1", "rate: float = -0.1", "Config needs rate >= 0"),
        ("rate: float = 0.1", "rate: float", "raised TypeError"),
        ('PRESETS = {"mine": Config(rate=0.5)}', "PRESETS = 3", "Config raised"),
        ("rate: float = 0.1", "rate: no_such_type = 0.1", "NameError"),
    ],
)
def test_a_config_that_is_none(tmp_path, old, new, named):
    assert old in CONFIG
    path = method(tmp_path, CONFIG.replace(old, new))
    with pytest.raises(Problem) as problem:
        Method.read(path, "mine")
    assert str(path) in str(problem.value) and named in str(problem.value), problem.value


@pytest.mark.parametrize("name", ["retrained", "retrained_again", "no_unlearning", "tuning"])
def test_a_method_by_the_name_of_a_folder_of_the_results(tmp_path, name):
    with pytest.raises(Problem, match="that name is taken by a folder of results"):
        Method.read(method(tmp_path, METHOD, name))


def test_a_method_of_any_name(data, results, tmp_path):
    names = ["<script>", "a b's é", "-x.v2"]
    assert run(data, results, *(method(tmp_path, METHOD, name) for name in names)) == 0
    page = (results / data.name / "public" / "report.html").read_text()
    assert "<script>" not in page and all(str(markupsafe.escape(name)) in page for name in names)


# Options


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--runs", "1000000000"], "--runs 1000000000: must be 2 to 5000 runs"),
        (["--runs", "-5"], "--runs -5"),
        (["--jobs", "100000"], "--jobs 100000: must be 1 to 256 processes"),
        (["--time-limit", "0"], "--time-limit 0: must be more than 0 seconds"),
        (["--time-limit", "-1"], "--time-limit -1"),
        (["--time-limit", "nan"], "--time-limit nan"),
        (["--split", "../public"], "../public"),
        (["--split", ""], "split"),
        (["--preset", "nonsense"], "no preset 'nonsense'"),
        (["--set", "learning_rate=fast"], "learning_rate is 'fast'"),
        (["--set", "learning_rate=nan"], "nan"),
        (["--set", "epochs=-1"], "Config needs 0 < epochs"),
        (["--set", f"epochs={'[' * 5000}"], "epochs is"),
    ],
)
def test_options_that_cannot_be_used(data, results, capsys, arguments, named):
    before = times(results)
    asked = command(data, results, FINETUNE)[2:]
    assert named in refused(capsys, evaluate.main([*asked, *arguments]))
    assert times(results) == before


@pytest.mark.parametrize("option", ["--runs", "--jobs", "--time-limit"])
def test_options_that_are_no_numbers(data, results, capsys, option):
    with pytest.raises(SystemExit) as ended:
        run(data, results, FINETUNE, option, "many")
    assert ended.value.code == 2 and "invalid" in capsys.readouterr().err


# The world outside


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_in_the_middle(data, results, tmp_path, launcher, number):
    """One line, an exit code that tells, no process left, and the same command goes on."""
    slow = method(tmp_path, METHOD.replace("    net.eval()", "    import time; time.sleep(0.4)\n    net.eval()"), "slow")
    child = launcher.start(data, results, slow, runs=6, jobs=2)
    while len(list(results.rglob("slow/*/run_*.npz"))) < 2:
        assert launcher.running()
        time.sleep(0.02)
    os.kill(child, number)
    assert launcher.wait() == 128 + number
    how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    errors = launcher.errors()
    assert f"{how}; what was finished is kept, and the same command resumes from there" in errors.splitlines()
    assert "Traceback" not in errors and "Warning" not in errors
    before = times(results)
    assert 2 <= len(list(results.rglob("slow/*/run_*.npz"))) < 6 and not list(results.rglob("*.part"))
    assert run(data, results, slow, runs=4) == 0
    assert before.items() <= times(results).items()


def test_workers_end_when_the_evaluator_is_killed(data, results, tmp_path, launcher):
    ids = tmp_path / "ids"
    lines = f"import os\nopen({str(ids)!r}, 'a').write(f'{{os.getpid()}}\\n')\ntime.sleep(100)"
    child = launcher.start(data, results, bad(tmp_path, lines), jobs=2)
    while not ids.exists() or len(ids.read_text().splitlines()) < 2:
        assert launcher.running()
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    workers = [Path("/proc") / line for line in ids.read_text().splitlines()]
    deadline = time.monotonic() + 20
    while any(worker.exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.exists() for worker in workers)


@pytest.mark.parametrize("place", ["/proc/results", "/dev/null/results"])
def test_results_where_nothing_can_be_written(data, capsys, place):
    said = refused(capsys, run(data, Path(place), FINETUNE))
    assert place in said and "cannot be written" in said


def test_a_read_only_folder_of_results(data, results, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder = results / data.name / "public"
    folder.chmod(0o555)
    try:
        said = refused(capsys, run(data, results, FINETUNE))
        assert str(folder) in said and "cannot be written" in said
    finally:
        folder.chmod(0o755)


def test_a_folder_in_the_place_of_a_file(data, results, capsys):
    assert run(data, results, FINETUNE) == 0
    path = results / data.name / "public" / "finetune" / "summary.json"
    path.unlink()
    path.mkdir()
    said = refused(capsys, run(data, results, FINETUNE))
    assert str(path) in said


def test_a_tiny_retain_set(data, tmp_path):
    """Of five images."""
    folder = Path(shutil.copytree(data, tmp_path / data.name))
    path = folder / "public" / "retain.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    (folder / "original_model.pth").unlink()
    assert run(folder, tmp_path / "results", FINETUNE) == 0


@pytest.mark.parametrize("name", ["score", "ceiling"])
def test_networks_that_leave_no_threshold(data, name):
    """What such a set led to: a traceback, where the ceiling was estimated."""
    examples = load(data)
    same = torch.zeros(4, len(examples.forget), 10)
    pool = {"forget_logits": same, "ra": torch.ones(4), "ta": torch.ones(4)}
    with pytest.raises(Problem, match=r"forget set \(public, .*no threshold survives for example 0"):
        scoring.score(pool, pool, examples) if name == "score" else scoring.estimated_ceiling(pool, examples)


def test_a_damaged_search(data, results, tmp_path, monkeypatch):
    evaluation = Evaluation.of(str(data), runs=4, results=results, jobs=1, device="cpu")
    journal = evaluation.results / "tuning" / "bad.journal"
    journal.parent.mkdir()
    journal.write_text("rubbish\n")
    with pytest.raises(Problem, match=r"bad\.journal: damaged"):
        tuning.tune([evaluation], Method.read(method(tmp_path, CONFIG)), trials=1)
    for content in ("", "[]", '{"bad": 3}', '{"bad": {"config": 3}}'):
        (tmp_path / "tuned.json").write_text(content)
        monkeypatch.setattr(tuning, "tuned_file", lambda name: tmp_path / "tuned.json")
        with pytest.raises(Problem, match="has not been tuned on digits"):
            tuning.tuned_values("bad.py", "digits")


def test_a_damaged_table_of_tries(data, results, tmp_path):
    tries = Tries(Evaluation.of(str(data), runs=4, results=results, jobs=1, device="cpu"))
    for content in (b"", b"\xff\xfe", b"a,b\n1,2\n", b'"a'):
        tries.file.write_bytes(content)
        with pytest.raises(Problem, match=r"tries\.csv: .*delete it"):
            _ = tries.table


def test_another_main_program_is_not_run_again(data, results, tmp_path):
    """A user's script without the guard that multiprocessing usually needs."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(evaluate.__file__).parent)!r})\n"
        "from evaluator.evaluation import Evaluation\n"
        "from evaluator.method import Method\n"
        "print('begins')\n"
        f"evaluation = Evaluation.of({str(data)!r}, runs=4, results={str(results)!r}, jobs=2, device='cpu')\n"
        f"print(evaluation.score(Method.read({FINETUNE!r}))['runs'])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["begins", "4"]
