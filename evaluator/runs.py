"""Makes N runs of anything into a pool: retrained networks, a method, checkpoints. Every run has its own seed and file."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from evaluator.checkpoints import Checkpoints
from evaluator.data import Data
from evaluator.files import Problem, one_line
from evaluator.method import NO_UNLEARNING, Diverged, Method, run_names
from evaluator.models import network_digest, save_network
from evaluator.pool import Pool, answers
from evaluator.processes import in_process, in_processes
from evaluator.progress import progress
from evaluator.training import Recipe, one_thread, retrain, seconds_of_retraining

# Unlearning runs use their numbers as seeds; those of the retrained networks start far beyond any run number.
FIRST_SEED = {"retrained": 1_000_000, "retrained_again": 2_000_000}


@dataclass(frozen=True)
class Setting:
    """Where and how runs are made. None of it changes a result (on one type of processor)."""

    results: Path
    jobs: int
    device: str = "cpu"
    time_limit: float | None = None  # seconds per run
    keep_networks: bool = False

    def results_of(self, data: Data, name: str) -> Path:
        return self.results / data.name / data.split / name


def retrained_pool(setting: Setting, data: Data, recipe: Recipe, runs: int, kind: str = "retrained", first: int = 0) -> Pool:
    """A pool of networks that never saw the forget set; kind "retrained_again" is a second, independent one.

    runs, first: how many are made where they are missing, from which number on.
    """
    pool = Pool(setting.results_of(data, kind), _made_from(kind, data, recipe))
    work = _Retraining(setting, pool, data, recipe, kind)
    _work_through([work], range(first, first + runs), recipe.networks_at_once, kind.replace("_", " "))
    return pool


def unlearned_pool(
    setting: Setting, data: Data, recipe: Recipe, original: nn.Module, method: Method | Checkpoints, runs: int
) -> Pool:
    """A pool of runs of a method. If the method allows ensembles, which runs share one is fixed by their numbers."""
    return unlearned_pools(setting, [data], recipe, original, method, runs)[0]


def unlearned_pools(
    setting: Setting,
    sets: Sequence[Data],
    recipe: Recipe,
    original: nn.Module,
    method: Method | Checkpoints,
    runs: int,
    named: bool = False,
) -> list[Pool]:
    """The pools of a method on several forget sets of one data folder, made side by side. named: errors name the split."""
    works = []
    for data in sets:
        made_from = _made_from("unlearned", data, recipe) | {"original": network_digest(original), **method.made_from}
        pool = Pool(setting.results_of(data, method.name), made_from)
        works.append(_Unlearning(setting, pool, data, recipe, original, method))
        if method is NO_UNLEARNING and pool.missing(range(runs)):  # every run is the original: evaluate it once
            with one_thread():
                _keep(setting, pool, pool.missing(range(runs)), original.to(setting.device), 0.0, works[-1].here)
    _work_through(works, range(runs), recipe.networks_at_once if method.ensemble else 1, str(method.path), named)
    return [work.pool for work in works]


def cost(
    setting: Setting, data: Data, recipe: Recipe, original: nn.Module, method: Method, repeats: int = 3, at_most: float = 2.0
) -> float:
    """The cost of one run as a share of one retraining's, each alone on one thread with nothing else running. Both are
    measured now, the retraining for `at_most` seconds: a machine's speed changes within minutes, the ratio does not."""
    if method is NO_UNLEARNING:
        return 0.0
    alone = _Alone(setting, data, recipe, original, method)
    seconds = in_process(alone, repeats, f"{method.path}: a run alone")
    return seconds / seconds_of_retraining(data.to(setting.device), recipe, at_most)


def _made_from(kind: str, data: Data, recipe: Recipe) -> dict:
    return {"kind": kind, "data": data.digest, "recipe": recipe.made_from}


@dataclass(frozen=True)
class _Work:
    """Sent to each new process once, and called there with the runs to make together."""

    setting: Setting
    pool: Pool
    data: Data
    recipe: Recipe

    @cached_property
    def here(self) -> Data:
        return self.data.to(self.setting.device)


@dataclass(frozen=True)
class _Retraining(_Work):
    kind: str

    def __call__(self, task: list[int]) -> int:
        with one_thread():
            start = time.perf_counter()
            ensemble = retrain(self.here, self.recipe, [FIRST_SEED[self.kind] + run for run in task])
            return _keep(self.setting, self.pool, task, ensemble, time.perf_counter() - start, self.here)


@dataclass(frozen=True)
class _Unlearning(_Work):
    original: nn.Module
    method: Method | Checkpoints

    def __call__(self, task: list[int]) -> int:
        with one_thread():
            original = self.original.to(self.setting.device)
            net, seconds = self.method.networks(original, task, self.here, self.recipe, self.setting.time_limit)
            try:
                return _keep(self.setting, self.pool, task, net, seconds, self.here)
            except Problem:
                raise
            except Exception as error:
                who = f"{self.method.path}: {run_names(task)}"
                raise Problem(f"{who}: evaluating its network failed; does it change torch? ({one_line(error)})") from error


@dataclass(frozen=True)
class _Alone:
    """Measures the median seconds of a few runs of a method, one network at a time."""

    setting: Setting
    data: Data
    recipe: Recipe
    original: nn.Module
    method: Method

    def __call__(self, repeats: int) -> float:
        data, original = self.data.to(self.setting.device), self.original.to(self.setting.device)
        alone = dataclasses.replace(self.recipe, networks_at_once=1)
        seconds = []
        with one_thread():
            for run in range(repeats):
                seconds.append(self.method.networks(original, [run], data, alone, self.setting.time_limit)[1])
                if seconds[0] > 10:
                    break
        return float(np.median(seconds))


@dataclass(frozen=True)
class _Together:
    """Several works, of one forget set each; a task is (which of them, the runs)."""

    works: list[_Work]
    named: bool

    def __call__(self, task: tuple[int, list[int]]) -> int:
        which, runs = task
        try:
            return self.works[which](runs)
        except Problem as problem:
            if not self.named:
                raise
            raise type(problem)(f"split {self.works[which].data.split}: {problem}") from problem


def _work_through(works: list[_Work], runs: range, size: int, what: str, named: bool = False) -> None:
    """Make the runs that are missing, in groups of `size` that are made together. A group is always made whole: which runs
    share an ensemble depends on their numbers alone, so that 100 runs are the first 100 of 512.

    Raises the first Problem of any group; what is finished is on disk.
    """
    tasks = []
    for which, work in enumerate(works):
        groups = {run // size for run in work.pool.missing(runs, work.setting.keep_networks)}
        tasks += [(which, list(range(group * size, (group + 1) * size))) for group in sorted(groups)]
    if not tasks:
        return
    job = _Together(works, named)
    outcomes = in_processes(job, tasks, works[0].setting.jobs, lambda task: f"{what}: {run_names(task[1])}")
    with progress(Path(what).stem, size * len(tasks), "run") as bar, contextlib.closing(outcomes):
        for made in outcomes:
            bar.update(made)


def _keep(setting: Setting, pool: Pool, task: list[int], net: nn.Module, seconds: float, data: Data) -> int:
    """Save the answers of the networks of some runs; a single network stands for all of them. Returns the number of runs."""
    asked = answers(net, data)
    for k, run in enumerate(task):
        values = {name: value[k % len(value)] for name, value in asked.items()}
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise Diverged(
                    f"{pool.folder.parent.name}: run {run}: {name} holds a value that is not finite; the run is not kept"
                )
        if setting.keep_networks:
            save_network(getattr(net, "members", [net] * len(task))[k], pool.network_path(run))
        pool.save(run, values | {"seconds": np.array(seconds / len(task))})
    return len(task)
