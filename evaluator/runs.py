"""Makes N runs of anything into a pool: retrained networks, a method, checkpoints. Every run has its own seed and file."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import joblib
import numpy as np
import torch
from torch import nn

from evaluator import cluster
from evaluator.checkpoints import Checkpoints
from evaluator.data import Data
from evaluator.engines import quickest
from evaluator.files import Problem, one_line, write_bytes
from evaluator.method import NO_UNLEARNING, Diverged, Method, run_names
from evaluator.models import checkpoint, network_digest
from evaluator.pool import Pool, answers
from evaluator.processes import in_processes
from evaluator.progress import progress
from evaluator.training import Recipe, one_thread, retrain, seconds_of_retraining

# Unlearning runs use their numbers as seeds; those of the retrained networks start far beyond any run number.
FIRST_SEED = {"retrained": 1_000_000, "retrained_again": 2_000_000}

Made = tuple[int, dict[str, np.ndarray], bytes | None]  # a run, what it answered, its checkpoint if that is kept


@dataclass(frozen=True)
class Setting:
    """Where and how runs are made. None of it changes a result (on one type of processor)."""

    results: Path
    jobs: int
    device: str = "cpu"  # of the runs
    own_device: str = "cpu"  # of this process, which is another one if the runs are made on a cluster
    dask: str | None = None  # the address of a scheduler whose workers make the runs
    time_limit: float | None = None  # seconds per run
    keep_networks: bool = False
    single_jobs: int | None = None  # processes for runs that are made one network at a time, if not `jobs`
    engine: str = "steps"  # of retraining, one of ENGINES; "auto": the one that is the quickest on the GPU

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
    if setting.dask and isinstance(method, Checkpoints):  # their zip is too large to be sent
        setting = dataclasses.replace(setting, dask=None, device=setting.own_device, jobs=joblib.cpu_count())
    elif setting.dask:
        method = method.packed()
    works = []
    for data in sets:
        made_from = _made_from("unlearned", data, recipe) | {"original": network_digest(original), **method.made_from}
        pool = Pool(setting.results_of(data, method.name), made_from)
        works.append(_Unlearning(setting, pool, data, recipe, original, method))
        missing = pool.missing(range(runs))
        if method is NO_UNLEARNING and missing:  # every run is the original: evaluate it once
            with one_thread():
                here = data.to(setting.own_device)
                _keep(pool, _left(setting, pool, missing, original.to(setting.own_device), 0.0, here))
    _work_through(works, range(runs), recipe.networks_at_once if method.ensemble else 1, str(method.path), named)
    return [work.pool for work in works]


def cost(
    setting: Setting, data: Data, recipe: Recipe, original: nn.Module, method: Method, repeats: int = 3, at_most: float = 2.0
) -> tuple[float, float]:
    """(the cost of one run as a share of one retraining's, that retraining's seconds), each alone on one thread with
    nothing else running. Both are measured now, the retraining for `at_most` seconds, from which the rest is extrapolated:
    a machine's speed changes within minutes, the ratio does not."""
    if method is NO_UNLEARNING:
        return 0.0, 0.0
    alone = _Alone(setting, data, recipe, original, method.packed() if setting.dask else method, at_most)
    outcomes = _each(setting, alone, [repeats], lambda _: f"{method.path}: a run alone")
    with contextlib.closing(outcomes):
        return next(outcomes)


def _made_from(kind: str, data: Data, recipe: Recipe) -> dict:
    return {"kind": kind, "data": data.digest, "recipe": recipe.made_from}


def _each(setting: Setting, job: Callable, tasks: list, name: Callable[[object], str], networks: int = 1) -> Iterator:
    """Yield job(task) for every task, in the order they finish: here, on all GPUs, or on a cluster. networks: of a task."""
    if setting.dask:
        return cluster.on_workers(job, tasks, setting.dask, name)
    processes = setting.single_jobs or setting.jobs if networks == 1 else setting.jobs
    return in_processes(job, tasks, processes, name, gpus() if setting.device == "cuda" else ())


def gpus() -> list[str]:
    """This machine's GPUs, or those that CUDA_VISIBLE_DEVICES leaves, as it names them."""
    return list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))) or [
        str(number) for number in range(torch.cuda.device_count())
    ]


@dataclass(frozen=True)
class _Work:
    """Sent to each new process once, and called there with the runs to make together; returns what `_left` does."""

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

    @cached_property
    def engine(self) -> str:
        if self.setting.engine == "auto":
            return quickest(self.here, self.recipe, self.recipe.networks_at_once)
        return self.setting.engine

    def __call__(self, task: list[int]) -> list[Made]:
        try:
            with one_thread():
                engine, start = self.engine, time.perf_counter()
                ensemble = retrain(self.here, self.recipe, [FIRST_SEED[self.kind] + run for run in task], engine)
                if self.setting.device == "cuda":
                    torch.cuda.synchronize()
                return _left(self.setting, self.pool, task, ensemble, time.perf_counter() - start, self.here)
        except torch.cuda.OutOfMemoryError as error:
            fewer = "fewer --jobs, or a smaller networks_at_once in the recipe"
            raise Problem(f"{self.kind}: {run_names(task)}: the GPU's memory ran out: {fewer}") from error


@dataclass(frozen=True)
class _Unlearning(_Work):
    original: nn.Module
    method: Method | Checkpoints

    def __call__(self, task: list[int]) -> list[Made]:
        with one_thread():
            original = self.original.to(self.setting.device)
            net, seconds = self.method.networks(original, task, self.here, self.recipe, self.setting.time_limit)
            try:
                return _left(self.setting, self.pool, task, net, seconds, self.here)
            except Problem:
                raise
            except Exception as error:
                who = f"{self.method.path}: {run_names(task)}"
                raise Problem(f"{who}: evaluating its network failed; does it change torch? ({one_line(error)})") from error


@dataclass(frozen=True)
class _Alone:
    """Measures what `cost` returns; a run's seconds are the median of a few, one network at a time."""

    setting: Setting
    data: Data
    recipe: Recipe
    original: nn.Module
    method: Method
    at_most: float  # seconds of retraining

    def __call__(self, repeats: int) -> tuple[float, float]:
        data, original = self.data.to(self.setting.device), self.original.to(self.setting.device)
        alone = dataclasses.replace(self.recipe, networks_at_once=1)
        retraining, seconds = seconds_of_retraining(data, self.recipe, self.at_most), []
        with one_thread():
            for run in range(repeats):
                seconds.append(self.method.networks(original, [run], data, alone, self.setting.time_limit)[1])
                if seconds[0] > 10:
                    break
        return float(np.median(seconds)) / retraining, retraining


@dataclass(frozen=True)
class _Together:
    """Several works, of one forget set each; a task is (which of them, the runs)."""

    works: list[_Work]
    named: bool

    def __call__(self, task: tuple[int, list[int]]) -> tuple[int, list[Made]]:
        which, runs = task
        try:
            return which, self.works[which](runs)
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
    outcomes = _each(works[0].setting, job, tasks, lambda task: f"{what}: {run_names(task[1])}", size)
    with progress(Path(what).stem, size * len(tasks), "run") as bar, contextlib.closing(outcomes):
        for which, made in outcomes:
            _keep(works[which].pool, made)
            bar.update(len(made))


def _left(setting: Setting, pool: Pool, task: list[int], net: nn.Module, seconds: float, data: Data) -> list[Made]:
    """What is to be kept of the networks of some runs; a single network stands for all of them.

    Raises Diverged when an answer is not finite.
    """
    asked, made = answers(net, data), []
    for k, run in enumerate(task):
        values = {name: value[k % len(value)] for name, value in asked.items()}
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise Diverged(
                    f"{pool.folder.parent.name}: run {run}: {name} holds a value that is not finite; the run is not kept"
                )
        network = checkpoint(getattr(net, "members", [net] * len(task))[k]) if setting.keep_networks else None
        made.append((run, values | {"seconds": np.array(seconds / len(task))}, network))
    return made


def _keep(pool: Pool, made: list[Made]) -> None:
    """Write runs into their pool: this process alone writes results, wherever they were made."""
    for run, values, network in made:
        if network is not None:
            write_bytes(pool.network_path(run), network)
        pool.save(run, values)
