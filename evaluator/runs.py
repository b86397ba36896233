"""Calls a method N times, and retrains N times, spread over processes; every run has its own number, seed and file."""

import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import joblib
import numpy as np
import torch
from torch import nn

from evaluator.data import Data, Loader, load
from evaluator.ensemble import Ensemble
from evaluator.files import Problem, one_line
from evaluator.models import save_network, state_misfit
from evaluator.notebook import NotebookLoader, method_tree
from evaluator.pool import Pool
from evaluator.progress import progress
from evaluator.training import Recipe, answers, generators, one_thread, original_network, retrain, worker_seconds

# Seeds of the retrained networks start where those of unlearning runs, which are the runs' numbers, never get.
FIRST_SEED = {"retrained": 1_000_000, "retrained_again": 2_000_000}


class Diverged(Problem):
    """A network whose weights or outputs are not finite."""


@dataclass(frozen=True)
class Method:
    """A file with `unlearning`, and the values of its Config (none if it has no Config)."""

    path: Path | None  # None: no unlearning, the original as it is
    name: str
    config: dict

    @classmethod
    def read(cls, path: Path | str, preset: str | None = None, values: dict | None = None) -> "Method":
        """Read a method file. preset: a key of its PRESETS, if it has that one; values: Config fields set on top.

        Raises Problem when the file cannot be read or run, has no `unlearning`, or its Config lacks a field.
        """
        path = Path(path)
        module = method_module(path)
        if not hasattr(module, "Config"):
            if values:
                raise Problem(f"{path}: has no Config to set {', '.join(values)} in")
            return cls(path, path.stem, {})
        try:
            # A notebook's hyperparameters are those in it.
            config = getattr(module, "config", None) or getattr(module, "PRESETS", {}).get(preset) or module.Config()
            # JSON and the command line give a list where the field is a tuple.
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in (values or {}).items()}
            config = dataclasses.replace(config, **values)
        except TypeError as error:
            raise Problem(f"{path}: Config: {str(error).split('() ')[-1]}") from error
        return cls(path, path.stem, dataclasses.asdict(config))

    @property
    def module(self) -> ModuleType | None:
        return None if self.path is None else method_module(self.path)

    @property
    def ensemble(self) -> bool:
        """Whether K networks may be handed over as one."""
        return getattr(self.module, "ENSEMBLE", False)

    @property
    def digest(self) -> str:
        """Of the code without comments, formatting and PRESETS: only what can change a result makes new runs."""
        if self.path is None:
            return ""
        tree = method_tree(self.path) if self.path.suffix == ".ipynb" else ast.parse(self.path.read_text())
        tree.body = [part for part in tree.body if not ast.unparse(part).startswith("PRESETS =")]
        return hashlib.sha256(ast.dump(tree).encode()).hexdigest()

    def __call__(self, net: nn.Module, retain: Loader, forget: Loader, validation: Loader) -> object:
        if self.module is None:
            return None
        if not hasattr(self.module, "Config"):
            return self.module.unlearning(net, retain, forget, validation)
        return self.module.unlearning(net, retain, forget, validation, self.module.Config(**self.config))


NO_UNLEARNING = Method(None, "no_unlearning", {})


@functools.cache
def method_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise Problem(f"{path}: no such method file")
    name = f"method_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    loader = NotebookLoader(name, str(path)) if path.suffix == ".ipynb" else None
    specification = importlib.util.spec_from_file_location(name, path, loader=loader)
    if specification is None:
        raise Problem(f"{path}: neither a .py file nor an .ipynb notebook")
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Problem:
        raise
    except Exception as error:
        raise Problem(f"{path}: cannot be imported: {_described(error, path)}") from error
    if not callable(getattr(module, "unlearning", None)):
        raise Problem(f"{path}: no function unlearning(net, retain_loader, forget_loader, val_loader)")
    return module


@dataclass(frozen=True)
class Setting:
    """Where and how runs are made. Nothing in it changes a result (on one kind of processor)."""

    folder: Path  # of the data
    split: str
    results: Path
    jobs: int
    device: str = "cpu"
    time_limit: float | None = None  # seconds a run
    keep_networks: bool = False

    def load(self) -> Data:
        return _load(self.folder, self.split, self.device)

    def results_of(self, data: Data, name: str) -> Path:
        return self.results / data.name / data.split / name


_load = functools.cache(load)  # a worker reads the data once


def retrained_pool(setting: Setting, data: Data, recipe: Recipe, runs: int, kind: str = "retrained") -> Pool:
    """A pool of networks that never saw the forget set; kind "retrained_again" is a second, independent one."""
    made_from = {"kind": kind, "data": data.digest, "recipe": dataclasses.asdict(recipe), "format": 1}
    pool = Pool(setting.results_of(data, kind), made_from)
    tasks = _blocks(setting, pool, runs, recipe.networks_at_once)
    work_through(
        setting, pool, runs, kind.replace("_", " "), tasks, functools.partial(_retrain, setting, pool, recipe, kind)
    )
    return pool


def unlearned_pool(setting: Setting, data: Data, recipe: Recipe, method: Method, runs: int) -> Pool:
    """A pool of runs of a method. Runs share an ensemble, fixed by their numbers, where the method says it can."""
    made_from = {
        "kind": "unlearned",
        "data": data.digest,
        "recipe": dataclasses.asdict(recipe),
        "original": hashlib.sha256((data.folder / "original_model.pth").read_bytes()).hexdigest(),
        "method": method.digest,
        "config": method.config,
        "format": 1,
    }
    pool = Pool(setting.results_of(data, method.name), made_from)
    if method.path is None:  # every run is the original: ask it once
        if pool.missing(range(runs)):
            with one_thread():
                asked = answers(original_network(data, recipe), data)
            for run in pool.missing(range(runs)):
                pool.save(run, {name: value[0] for name, value in asked.items()} | {"seconds": np.array(0.0)})
        return pool
    tasks = _blocks(setting, pool, runs, recipe.networks_at_once if method.ensemble else 1)
    work_through(setting, pool, runs, method.name, tasks, functools.partial(_unlearn, setting, pool, recipe, method))
    return pool


def seconds_alone(setting: Setting, data: Data, recipe: Recipe, method: Method, repeats: int = 3) -> float:
    """Median seconds of one run, one network alone on one thread, with nothing else at work."""
    original = original_network(data, recipe)
    seconds = []
    with one_thread():
        for run in range(repeats):
            net = copy.deepcopy(original)
            seconds.append(_unlearn_networks(method, net, [run], data, recipe, setting.time_limit))
            if seconds[0] > 10:
                break
    return float(np.median(seconds))


def _blocks(setting: Setting, pool: Pool, runs: int, size: int) -> list[list[int]]:
    """The runs to make, in groups that are made together. A group is always whole: whom a run shares an ensemble with
    depends on its number alone, so that 100 runs are the first 100 of 512."""
    wanted = {run // size for run in pool.missing(range(runs), setting.keep_networks)}
    return [list(range(block * size, (block + 1) * size)) for block in sorted(wanted)]


def work_through(setting: Setting, pool: Pool, runs: int, what: str, tasks: list[list[int]], work: Callable) -> None:
    """Do the tasks in `jobs` processes; raises the first Problem that one returns. What is finished is on disk."""
    if not tasks:
        return
    todo = sum(len(task) for task in tasks)
    with progress(what, todo, "run") as bar:
        try:
            parallel = joblib.Parallel(n_jobs=min(setting.jobs, len(tasks)), return_as="generator_unordered")
            for outcome in parallel(joblib.delayed(work)(task) for task in tasks):
                if isinstance(outcome, Problem):
                    raise outcome
                bar.update(outcome)
        except joblib.externals.loky.process_executor.TerminatedWorkerError as error:
            raise Problem(
                f"{what}: a worker process was killed, perhaps for want of memory (try fewer --jobs); "
                f"{runs - len(pool.missing(range(runs)))} of {runs} runs are kept, run again to go on"
            ) from error


def _retrain(setting: Setting, pool: Pool, recipe: Recipe, kind: str, task: list[int]) -> int | Problem:
    try:
        with one_thread():
            data = setting.load()
            start = time.perf_counter()
            ensemble = retrain(data, recipe, [FIRST_SEED[kind] + run for run in task])
            _keep(setting, pool, task, ensemble, time.perf_counter() - start, data)
        return len(task)
    except Problem as problem:
        return problem


def _unlearn(setting: Setting, pool: Pool, recipe: Recipe, method: Method, task: list[int]) -> int | Problem:
    try:
        with one_thread():
            data = setting.load()
            original = original_network(data, recipe)
            if method.ensemble and recipe.networks_at_once > 1:
                net = Ensemble(original, len(task), generators(task, setting.device))
            else:
                net = copy.deepcopy(original)
            seconds = _unlearn_networks(method, net, task, data, recipe, setting.time_limit)
            _keep(setting, pool, task, net, seconds, data)
        return len(task)
    except Problem as problem:
        return problem


def _keep(setting: Setting, pool: Pool, task: list[int], net: nn.Module, seconds: float, data: Data) -> None:
    asked = answers(net, data)
    for k, run in enumerate(task):
        values = {name: value[k] for name, value in asked.items()}
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise Diverged(
                    f"{pool.folder.parent.name}: run {run}: {name} holds a value that is not finite; the run is not kept"
                )
        if setting.keep_networks:
            save_network(getattr(net, "members", [net])[k], pool.network_path(run))
        pool.save(run, values | {"seconds": np.array(seconds / len(task))})


def _unlearn_networks(
    method: Method, net: nn.Module, task: list[int], data: Data, recipe: Recipe, time_limit: float | None
) -> float:
    """Run a method on one network or an ensemble; returns its seconds. Raises Problem when it breaks its contract."""
    runs = f"run {task[0]}" if len(task) == 1 else f"runs {task[0]} to {task[-1]}"
    members = getattr(net, "members", [net])
    expected = copy.deepcopy(members[0])
    sources = getattr(net, "generators", [None])
    examples = {name: getattr(data, name) for name in ("retain", "forget", "validation")}
    untouched = {name: part.clone() for name, part in examples.items()}
    loaders = [Loader(part, recipe.batch_size, sources) for part in examples.values()]
    random.seed(task[0])
    np.random.seed(task[0])
    torch.manual_seed(task[0])
    device = data.retain.images.device
    start = worker_seconds(device)
    try:
        with _alarm(time_limit and time_limit * len(task)):
            returned = method(net, *loaders)
    except _TimeLimit:
        raise Problem(f"{method.path}: {runs}: took longer than the time limit of {time_limit:g} s a run") from None
    except Exception as error:
        raise Problem(f"{method.path}: {runs}: unlearning() raised {_described(error, method.path)}") from error
    finally:
        changed = [name for name, part in examples.items() if not part.equals(untouched[name])]
        for name in changed:  # the next runs need what was there
            vars(examples[name]).update(vars(untouched[name]))
    seconds = worker_seconds(device) - start
    if changed:
        raise Problem(f"{method.path}: {runs}: unlearning() changed the tensors of the {changed[0]} loader")
    if returned is not None:
        raise Problem(
            f"{method.path}: {runs}: unlearning() returned a {type(returned).__name__}; it must edit `net` in place "
            "and return None"
        )
    for run, member in zip(task, members, strict=True):
        misfit = state_misfit(expected, member.state_dict())
        if misfit:
            raise Problem(f"{method.path}: run {run}: the network does not fit the original's: {misfit}")
        for name, tensor in member.state_dict().items():
            if not tensor.isfinite().all():
                raise Diverged(f"{method.path}: run {run}: unlearning() left NaN or infinite values in '{name}'")
        if any(module.training for module in member.modules()):
            raise Problem(f"{method.path}: run {run}: unlearning() left the network in train mode; end with net.eval()")
    return seconds


def _described(error: Exception, path: Path) -> str:
    """One line: the error, and the line of the user's file it came from."""
    lines = []
    trace = error.__traceback__
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(str(path)):  # a notebook's adds the cell
            lines.append(f"{file.removeprefix(str(path))} line {trace.tb_lineno}".strip())
        trace = trace.tb_next
    return f"{type(error).__name__}: {one_line(error)}" + (f" ({lines[-1]})" if lines else "")


class _TimeLimit(BaseException):
    """Not an Exception, so that a method's own handlers do not swallow it."""


@contextlib.contextmanager
def _alarm(seconds: float | None):
    """Interrupt what runs within after `seconds`, where the system has alarms (not on Windows)."""
    if not seconds or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        start = time.perf_counter()
        yield
        if seconds and time.perf_counter() - start > seconds:
            raise _TimeLimit
        return

    def stop(*_):
        raise _TimeLimit

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
