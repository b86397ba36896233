"""Puts the parts together: from a data set and a method to its summary, figures and tables, each made once and kept."""

import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import joblib
import torch

from evaluator import report
from evaluator.checkpoints import Checkpoints
from evaluator.files import Problem, one_line, read_json, write_json
from evaluator.pool import Pool
from evaluator.runs import Method, Setting, retrained_pool, seconds_alone, unlearned_pool
from evaluator.training import Recipe, original_network, seconds_of_retraining

HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Evaluation:
    """One data set under one split, with N networks of each kind. What it is asked for is read where it is kept already.

    runs: N. second_pool: measure the ceiling with N further retrained networks instead of estimating it.
    """

    setting: Setting
    runs: int
    second_pool: bool = False

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
        **setting,
    ) -> "Evaluation":
        """data: a name under data/, or any folder in that layout. jobs: processes; None: one a core, or one on the GPU.

        Raises Problem when a value cannot be used.
        """
        if runs < 2:
            raise Problem(f"--runs {runs}: the metric compares distributions, it needs at least 2 runs")
        if jobs is not None and jobs < 1:
            raise Problem(f"--jobs {jobs}: at least 1 process is needed")
        device = working_device(device)
        folder = Path(data) if Path(data).is_dir() else HERE / "data" / data
        jobs = jobs or (1 if device == "cuda" else joblib.cpu_count())
        return cls(Setting(folder, split, Path(results), jobs, device, **setting), runs, second_pool)

    @cached_property
    def data(self):
        return self.setting.load()

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe.of(self.data)

    @property
    def title(self) -> str:
        return f"{self.data.name}, {self.data.split} split, {self.runs} runs, {len(self.data.forget)} forget examples"

    @property
    def results(self) -> Path:
        return self.setting.results_of(self.data, ".")

    @cached_property
    def retrained(self) -> Pool:
        with stage("original network"):
            original_network(self.data, self.recipe)
        with stage(f"{self.runs} retrained networks"):
            return retrained_pool(self.setting, self.data, self.recipe, self.runs)

    def unlearned(self, method: Method | Checkpoints) -> Pool:
        """Its runs; those that are missing are made."""
        _ = self.retrained  # the original is trained before, and what makes all methods fail is found first
        with stage(f"{self.runs} runs of {method.name}"):
            if isinstance(method, Checkpoints):
                return method.pool(self.setting, self.data, self.recipe, self.runs)
            return unlearned_pool(self.setting, self.data, self.recipe, method, self.runs)

    @cached_property
    def retraining_seconds(self) -> float:
        """Of one retraining, alone on one thread."""
        name = f"seconds_{self.setting.device}"
        return self.retrained.number(name, lambda: seconds_of_retraining(self.data, self.recipe))

    def cost(self, method: Method, repeats: int = 3, at_most: float = 2.0) -> float:
        """Of one run, as a part of a retraining's, each alone on one thread. Both are measured now, of the retraining
        `at_most` seconds: a machine's speed changes from minute to minute, the ratio does not."""
        seconds = seconds_alone(self.setting, self.data, self.recipe, method, repeats)
        return seconds / seconds_of_retraining(self.data, self.recipe, at_most)

    @cached_property
    def ceiling(self) -> dict:
        """The row of a perfect unlearner: retrained against retrained. Estimated, or measured with a second pool."""
        retrained = self.retrained.load(range(self.runs))
        with stage("ceiling"):
            if self.second_pool:
                again = retrained_pool(self.setting, self.data, self.recipe, self.runs, "retrained_again")
                scores, _ = report.score(again.load(range(self.runs)), retrained, self.data)
                return {"method": "(ceiling, measured)", **scores}
            quality = self.retrained.number(f"ceiling_{self.runs}", lambda: report.estimated_ceiling(retrained, self.data))
        equal = dict.fromkeys(("ra_unlearned", "ra_retrained", "ta_unlearned", "ta_retrained"), 1.0)
        return {"method": "(ceiling, estimated)", "forgetting_quality": quality, "score": quality, **equal}

    def score(self, method: Method | Checkpoints) -> dict:
        """Make the runs that are missing, and the summary, figures and tables where they are not of these very runs."""
        retrained, unlearned = self.retrained, self.unlearned(method)
        folder = self.setting.results_of(self.data, method.name)
        made_of = {"runs": self.runs, "unlearned": unlearned.folder.name, "retrained": retrained.folder.name}
        summary = read_json(folder / "summary.json")
        if summary and summary["made_of"] == made_of:
            return summary
        cost = None  # of networks that exist already nobody knows what they took
        if isinstance(method, Method):
            cost = unlearned.number(f"cost_{self.setting.device}", lambda: self.cost(method))
        pools = unlearned.load(range(self.runs)), retrained.load(range(self.runs))
        scores, table = report.score(*pools, self.data)
        report.draw_figures(folder, method.name, *pools, self.data, table)
        report.write_csv(folder / "examples.csv", table)
        summary = {
            "method": method.name,
            "config": method.config,
            "data": self.data.name,
            "split": self.data.split,
            **scores,
            "seconds_per_run": cost and cost * self.retraining_seconds,
            "fraction_of_retraining": cost,
            "versions": report.versions(),
            "device": self.setting.device,
            "made_of": made_of,
        }
        write_json(folder / "summary.json", summary)
        return summary

    def score_of(self, method: Method, runs: range) -> dict:
        """The score and its parts of some of the runs, against the retrained networks of the same numbers; nothing drawn."""
        return report.score(self.unlearned(method).load(runs), self.retrained.load(runs), self.data)[0]

    def group_scores(self, method: Method, size: int) -> list[float]:
        """The scores of disjoint groups of `size` runs, each against as many retrained networks of its own."""
        starts = range(0, self.runs - size + 1, size)
        return [self.score_of(method, range(start, start + size))["score"] for start in starts]


class stage:
    """Prints what took how long, when it took long enough to notice."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, error, *_):
        seconds = time.perf_counter() - self.start
        if error is None and seconds > 1:
            print(f"{self.name}: {seconds:.1f} s", file=sys.stderr, flush=True)


def working_device(wanted: str) -> str:
    """ "cpu" or "cuda". A GPU is tried with a real operation: torch finds some that it has no kernels for."""
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
