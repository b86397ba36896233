"""Puts the parts together: from a data set and a method to its summary and tables, each made once and kept."""

import hashlib
import json
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import filelock
import joblib
import torch
from torch import Tensor, nn

from evaluator import cluster, scoring
from evaluator.checkpoints import Checkpoints
from evaluator.data import Data, load
from evaluator.engines import ENGINES
from evaluator.files import Problem, one_line, read_json, write_csv, write_json
from evaluator.method import Method
from evaluator.pool import Pool
from evaluator.runs import Setting, cost, gpus, retrained_pool, unlearned_pool
from evaluator.training import Recipe, original_is_given, original_network, own_model

HERE = Path(__file__).resolve().parent.parent
SINGLE_JOBS = 8  # per GPU: in so many processes, networks that are made one at a time take less than half as long
MOST_RUNS, MOST_JOBS = 5000, 256  # the metric's table of N² epsilons takes 200 MB at 5,000


@dataclass(frozen=True)
class Evaluation:
    """One data set under one split, with N networks of each kind. Whatever is already kept is read instead of made.

    The data are read once, when they are first needed. runs: N. second_pool: measure the ceiling with N further retrained
    networks instead of estimating it. attacks: also run those of evaluator.attacks. model: a network of torchvision to use
    in place of the folder's own; the data are then called <name>_<model>, and results and presets with them.
    """

    folder: Path  # of the data
    split: str
    setting: Setting
    runs: int
    second_pool: bool = False
    attacks: bool = False
    model: str | None = None

    @classmethod
    def of(
        cls,
        data: str = "digits",
        split: str = "public",
        runs: int = 512,
        results: Path = Path("results"),
        jobs: int | None = None,
        device: str = "auto",
        second_pool: bool = False,
        attacks: bool = False,
        time_limit: float | None = None,
        keep_networks: bool = False,
        model: str | None = None,
        dask: str | None = None,
        engine: str = "auto",
    ) -> "Evaluation":
        """data: a name under data/, or any folder in that layout. jobs: processes; None: one per core. With GPUs,
        None means one per GPU, and up to SINGLE_JOBS where networks are made one at a time. dask: the address of a
        scheduler whose workers make the runs. engine: how a GPU retrains networks, one of ENGINES; "auto": the quickest.

        Raises Problem when a value cannot be used.
        """
        if not 2 <= runs <= MOST_RUNS:
            raise Problem(f"--runs {runs}: must be 2 to {MOST_RUNS} runs")
        if jobs is not None and not 1 <= jobs <= MOST_JOBS:
            raise Problem(f"--jobs {jobs}: must be 1 to {MOST_JOBS} processes")
        if time_limit is not None and not time_limit > 0:
            raise Problem(f"--time-limit {time_limit:g}: must be more than 0 seconds")
        if engine not in ("auto", *ENGINES):
            raise Problem(f"--engine {engine}: must be auto or one of {', '.join(ENGINES)}")
        single_jobs = None
        if dask:
            if jobs is not None:
                raise Problem(f"--jobs {jobs}: the workers of --dask say themselves how many runs they make at once")
            own_device, (device, jobs) = working_device("auto"), cluster.workers(dask, device)
        else:
            own_device = device = working_device(device)
            if device == "cuda" and jobs is None:  # K networks at once keep a GPU busy, a single one does not
                jobs = len(gpus())
                single_jobs = max(jobs, min(joblib.cpu_count(), SINGLE_JOBS * jobs))
            jobs = jobs or joblib.cpu_count()
        if device == "cpu":
            if engine != "auto":
                raise Problem(f"--engine {engine}: is for a GPU, and the runs are made on a CPU; leave it out")
            engine = "steps"
        elif dask and engine == "auto":  # a process makes one task there, and would measure for that alone
            engine = ENGINES[0]
        setting = Setting(
            Path(results).absolute(), jobs, device, own_device, dask, time_limit, keep_networks, single_jobs, engine
        )
        return cls(data_folder(data), split, setting, runs, second_pool, attacks, model)

    @cached_property
    def data(self) -> Data:
        data = load(self.folder, self.split)
        if self.model in (None, own_model(data)):
            return data
        Recipe.of(data, self.model)  # what is not a network's name must not become a folder's
        return replace(data, name=f"{data.name}_{self.model}")

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe.of(self.data, self.model)

    @property
    def title(self) -> str:
        return f"{self.data.title}, {self.data.split} split, {self.runs} runs, {len(self.data.forget)} forget examples"

    @property
    def results(self) -> Path:
        return self.setting.results_of(self.data, ".")

    @contextmanager
    def alone(self):
        """Nobody else works on these results meanwhile: another evaluation waits, and then finds what this one has made."""
        try:
            self.results.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.results / ".lock", is_singleton=True)
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                print(f"waiting for another evaluation that is using {self.results}", file=sys.stderr, flush=True)
                lock.acquire()
        except OSError as error:
            raise Problem(f"{self.results}: cannot be written ({error.strerror or error})") from error
        try:
            yield
        finally:
            lock.release()

    def original(self) -> nn.Module:
        """The network to unlearn from; trained if the data folder has none."""
        with self.alone(), stage("original network"):
            return original_network(self.data.to(self.setting.own_device), self.recipe).cpu()

    def retrained(self, kind: str = "retrained") -> Pool:
        """The retrained networks; those that are missing are made. kind: "retrained_again" is a second, independent pool."""
        with self.alone(), stage(f"{self.runs} retrained networks"):
            return retrained_pool(self.setting, self.data, self.recipe, self.runs, kind)

    def unlearned(self, method: Method | Checkpoints) -> Pool:
        """Its runs; those that are missing are made."""
        original = self.original()  # first what would make every method fail,
        self.retrained()  # then what takes longest
        with self.alone(), stage(f"{self.runs} runs of {method.name}"):
            return unlearned_pool(self.setting, self.data, self.recipe, original, method, self.runs)

    def cost(self, method: Method, **how) -> tuple[float, float]:
        """The cost of one run as a share of a retraining's, and that retraining's seconds. See `runs.cost`."""
        return cost(self.setting, self.data, self.recipe, self.original(), method, **how)

    def ceiling(self) -> dict:
        """The row of a perfect unlearner: retrained against retrained. Estimated, or measured with a second pool."""
        pool, runs = self.retrained(), range(self.runs)
        with self.alone(), stage("ceiling"):
            if self.second_pool:
                again = self.retrained("retrained_again").load(runs)
                scores, _ = scoring.score(again, pool.load(runs), self.data, self.attacks)
                return {"method": "(ceiling, measured)", **scores}
            name = f"ceiling_{self.runs}_{scoring.VERSION}"
            quality = pool.number(name, lambda: scoring.estimated_ceiling(pool.load(runs), self.data))
        equal = dict.fromkeys(("ra_unlearned", "ra_retrained", "ta_unlearned", "ta_retrained"), 1.0)
        return {"method": "(ceiling, estimated)", "forgetting_quality": quality, "score": quality, **equal}

    def pools(self, method: Method | Checkpoints) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the unlearned and the retrained networks answered."""
        return self.unlearned(method).load(range(self.runs)), self.retrained().load(range(self.runs))

    def score(self, method: Method | Checkpoints) -> dict:
        """The summary of a method. Makes the runs that are missing, and rewrites summary.json and examples.csv unless they
        come from exactly these runs and the present scoring code; an earlier page and figures are removed."""
        with self.alone():
            unlearned = self.unlearned(method)
            retrained = self.retrained()
            made_of = self.made_of(unlearned, retrained)
            folder = self.setting.results_of(self.data, method.name)
            summary = self.kept(method, made_of)
            if summary:
                if summary.get("note", "") == self.data.note:
                    return summary
                write_summary(folder, summary | {"note": self.data.note})
                return read_json(folder / "summary.json")
            share = seconds = None
            if method.timed:
                measured, device = cache(partial(self.cost, method)), self.setting.device
                share = unlearned.number(f"cost_{device}", lambda: measured()[0])
                # A retraining's seconds are those beside the first method, for all: seconds in a table are to compare.
                seconds = share and share * retrained.number(f"seconds_{device}", lambda: measured()[1])
            pools = unlearned.load(range(self.runs)), retrained.load(range(self.runs))
            scores, table = scoring.score(*pools, self.data, self.attacks)
            beside, columns = scoring.explanation(*pools, self.data, scores)
            summary = {
                "method": method.name,
                "path": str(method.path),
                "config": method.config,
                "data": self.data.name,
                "note": self.data.note,
                "split": self.data.split,
                "model": self.recipe.model,
                **scores,
                **beside,
                "seconds_per_run": seconds,
                "fraction_of_retraining": share,
                "original": "given" if original_is_given(self.data, self.recipe) else "trained by the recipe",
                "versions": scoring.versions(),
                "device": self.setting.device,
                "made_of": made_of,
            }
            # In this order, no page or table is ever beside a summary it does not belong to.
            for old in [self.results / "report.html", folder / "summary.json", *folder.glob("*.png")]:
                old.unlink(missing_ok=True)
            write_csv(folder / "examples.csv", table.assign(**columns))
            write_summary(folder, summary)
            return read_json(folder / "summary.json")

    def made_of(self, unlearned: Pool, retrained: Pool) -> dict:
        """What a summary of these pools depends on."""
        return {
            "runs": self.runs,
            "unlearned": unlearned.folder.name,
            "retrained": retrained.folder.name,
            "scoring": scoring.VERSION,
        }

    def kept(self, method: Method | Checkpoints, made_of: dict) -> dict:
        """The summary that is there, if it is whole and made of exactly this; else empty."""
        folder = self.setting.results_of(self.data, method.name)
        summary = read_json(folder / "summary.json")
        whole = summary.get("checked") == checksum(summary, folder / "examples.csv")
        return summary if whole and summary["made_of"] == made_of and ("attacks" in summary or not self.attacks) else {}

    def score_of(self, method: Method, runs: range) -> dict:
        """The score and its parts for some runs, against the retrained networks with the same numbers; it is not kept."""
        return scoring.score(self.unlearned(method).load(runs), self.retrained().load(runs), self.data)[0]

    def group_scores(self, method: Method, size: int) -> list[float]:
        """The scores of disjoint groups of `size` runs, each against as many retrained networks of its own."""
        starts = range(0, self.runs - size + 1, size)
        return [self.score_of(method, range(start, start + size))["score"] for start in starts]


def write_summary(folder: Path, summary: dict) -> None:
    """With a checksum; examples.csv, the table that belongs to it, is there already."""
    write_json(folder / "summary.json", summary | {"checked": checksum(summary, folder / "examples.csv")})


def checksum(summary: dict, examples: Path) -> str:
    """A checksum of a summary and the table that belongs to it."""
    content = json.dumps({name: value for name, value in summary.items() if name != "checked"}, sort_keys=True)
    table = examples.read_bytes() if examples.is_file() else b""
    return hashlib.sha256(content.encode() + table).hexdigest()[:12]


@contextmanager
def stage(name: str):
    """Prints how long a stage took, if it was long enough to notice."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    if seconds > 1:
        print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)


def data_folder(data: str) -> Path:
    """A name under data/, or any folder."""
    return Path(data) if Path(data).is_dir() else HERE / "data" / data


def working_device(wanted: str) -> str:
    """ "cpu" or "cuda". A GPU is tried with a real operation: torch lists some that it has no kernels for."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise Problem(f"--device {wanted}: must be auto, cpu or cuda")
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    try:
        torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3, device="cuda"), torch.ones(1, 1, 3, 3, device="cuda")).item()
        return "cuda"
    except (RuntimeError, AssertionError) as error:
        message = one_line(error)
        if wanted == "cuda":
            raise Problem(f"--device cuda: the GPU does not work with this torch ({message})") from error
        print(f"the GPU does not work with this torch ({message}); using the CPU", file=sys.stderr)
        return "cpu"
