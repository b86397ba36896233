"""The kit's speed in one table, each figure beside that of its peer, measured in the same process.

    python -m benchmarks.bench                          everything at N = 512: a quarter of an hour (make bench)
    python -m benchmarks.bench --only pool metric       the rows of some groups

    peak            float32 matrix products on one thread, and in all processes together: what the machine can do
    pool            training the retrained networks, against the starting kit's loop and a plain one; an image counts each
                    time a network is trained on it
    unlearning      runs of unlearning.py in processes, one network at a time as for any method, and K at once, against one
                    after another in a loop
    metric          the time of an example's epsilon, against the organisers' procedure
    evaluation      a first evaluation of the digits, from nothing (python -m benchmarks.evaluation times its stages)

A figure and its peers take turns, and the median of three turns counts. Loops use one thread: with more, a small network is
hardly faster on an idle machine, and many times slower on a busy one. "of peak" is the share of the matrix products of all
processes together; work that is known to be multiplied by zeros, and is left out, does not count. Each call adds a line to
results/bench.jsonl; "faster" compares with the last line of the same machine, torch and options.
"""

import argparse
import copy
import dataclasses
import datetime
import functools
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch

from benchmarks import evaluation as whole
from benchmarks import yardsticks
from evaluator import command
from evaluator.ensemble import Ensemble
from evaluator.evaluation import HERE, Evaluation, stage
from evaluator.files import Problem, write_atomically
from evaluator.method import Method
from evaluator.metric import epsilons
from evaluator.processes import in_processes
from evaluator.runs import Setting, retrained_pool, unlearned_pool
from evaluator.scoring import processor, versions
from evaluator.training import generators, one_thread, original_network, train

TURNS = 3
SECONDS = 1.0  # of each measurement of the peak
EXAMPLES = 120  # of the metric


@dataclass(frozen=True)
class Row:
    """A figure, and what its peer needs. A unit per second is better when it is large, any other when it is small."""

    what: str
    figure: float
    unit: str
    peer: str = ""
    peer_figure: float | None = None
    of_peak: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.times_faster(self.peer_figure)

    def times_faster(self, other: float | None) -> float | None:
        if other is None:
            return None
        return self.figure / other if self.unit.endswith("/s") else other / self.figure


@dataclass(frozen=True)
class Bench:
    """What is measured on. folder: for what nobody needs afterwards."""

    evaluation: Evaluation
    folder: Path

    def setting(self) -> Setting:
        """The evaluation's, with results that are empty."""
        return dataclasses.replace(self.evaluation.setting, results=Path(tempfile.mkdtemp(dir=self.folder)))

    @property
    def jobs(self) -> int:
        return self.evaluation.setting.jobs

    @property
    def networks(self) -> int:
        """As many as keep all processes busy, but no more than were asked for."""
        return min(self.evaluation.runs, self.jobs * self.evaluation.recipe.networks_at_once)

    @functools.cached_property
    def peaks(self) -> tuple[float, float]:
        """Operations per second of matrix products: of one process, of all together."""
        one, together = [], []
        for _ in range(TURNS):
            for processes, found in ((1, one), (self.jobs, together)):
                tasks = [SECONDS] * processes
                found.append(sum(in_processes(yardsticks.matrix_rate, tasks, processes, lambda _: "matrix products")))
        return max(one), max(together)


def peak(bench: Bench) -> Iterator[Row]:
    one, together = (rate / 1e9 for rate in bench.peaks)
    yield Row("matrix products, one thread", one, "GFLOP/s")
    yield Row(f"matrix products, {bench.jobs} processes", together, "GFLOP/s", "one thread", one)


def pool(bench: Bench) -> Iterator[Row]:
    data, recipe = bench.evaluation.data, bench.evaluation.recipe
    with one_thread():
        kit, plain, taken = medians(
            lambda: yardsticks.starting_kits_loop(data, recipe),
            lambda: yardsticks.plain_loop(data, recipe),
            lambda: retrained_pool(bench.setting(), data, recipe, bench.networks),
        )
    size = recipe.networks_at_once
    sources = generators(range(size), "cpu")
    together = Ensemble(recipe.network(data.classes, data.retain.images.shape[2:]), size, sources)
    steps = train(together, data.retain, recipe, data.class_counts, sources)
    per_image = yardsticks.operations(lambda: next(steps)) / (size * min(recipe.batch_size, len(data.retain)))
    # A group of K networks is always made whole.
    made = -(-bench.networks // size) * size
    speed = made * recipe.epochs * len(data.retain) / taken
    images = yardsticks.EPOCHS * len(data.retain)
    for peer, seconds in (("the starting kit's loop", kit), ("a loop over batches in memory", plain)):
        what = f"training {size} networks at once, {bench.jobs} processes"
        yield Row(what, speed, "images/s", peer, images / seconds, speed * per_image / bench.peaks[1])


def unlearning(bench: Bench) -> Iterator[Row]:
    data, recipe, runs = bench.evaluation.data, bench.evaluation.recipe, bench.networks
    original = original_network(data, recipe)
    method = Method.read(HERE / "unlearning.py", data.name)
    one_by_one = Method.read(yardsticks.one_at_a_time(method.path, bench.folder), data.name)
    with one_thread():
        loop, processes, at_once = medians(
            lambda: yardsticks.unlearning_in_a_loop(data, recipe, original, runs),
            lambda: unlearned_pool(bench.setting(), data, recipe, original, one_by_one, runs),
            lambda: unlearned_pool(bench.setting(), data, recipe, original, method, runs),
        )
    size = recipe.networks_at_once
    sources = generators(range(size), "cpu")
    together = Ensemble(original, size, sources)
    work = yardsticks.operations(lambda: yardsticks.unlearn(data, recipe, copy.deepcopy(original)))
    joint_work = yardsticks.operations(lambda: yardsticks.unlearn(data, recipe, together, sources)) / size
    for how, taken, needed, made in (
        ("", processes, work, runs),
        (f", {size} at once", at_once, joint_work, -(-runs // size) * size),
    ):
        what = f"a run of unlearning.py{how}, {bench.jobs} processes"
        share = made * needed / taken / bench.peaks[1]
        yield Row(what, taken / made, "s", "one after another", loop / runs, share)


def metric(bench: Bench) -> Iterator[Row]:
    runs, threads = bench.evaluation.runs, torch.get_num_threads()
    source = torch.Generator().manual_seed(0)
    sides = torch.randn(2, runs, EXAMPLES, generator=source, dtype=torch.float64) * 2 + 4  # the time does not depend on them
    epsilons(*sides)  # a warm-up
    with one_thread():
        one, compared = medians(lambda: epsilons(*sides), lambda: yardsticks.compared_epsilon(*sides[:, :, 0]))
    (every,) = medians(lambda: epsilons(*sides))
    milliseconds = 1000 * one / EXAMPLES
    yield Row(
        f"the metric at N = {runs}, one thread", milliseconds, "ms/example", "the organisers' procedure", 1000 * compared
    )
    what = f"the metric at N = {runs}, {threads} threads"
    yield Row(what, 1000 * every / EXAMPLES, "ms/example", "one thread", milliseconds)


def evaluation(bench: Bench) -> Iterator[Row]:
    whole.prepare(bench.folder)
    taken = whole.evaluate(bench.folder, bench.evaluation.runs, bench.jobs)
    yield Row(f"a first evaluation of the digits, N = {bench.evaluation.runs}", taken.seconds, "s")
    if taken.memory:
        yield Row("  its memory at most, all processes", taken.memory / 2**30, "GB")


GROUPS = {group.__name__: group for group in (peak, pool, unlearning, metric, evaluation)}


def medians(*works: Callable[[], object]) -> list[float]:
    """The seconds that each work takes, the median of a few turns."""
    taken = []
    for _ in range(TURNS):
        for work in works:
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return np.median(np.reshape(taken, (TURNS, -1)), axis=0).tolist()


def kept(path: Path) -> list[dict]:
    """The lines of earlier calls. Raises Problem when one is damaged: what was measured is lost by no later call."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            found.append(content | {"rows": [Row(**row) for row in content["rows"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise Problem(f"{path}: line {number} is damaged: repair or delete it, or give other --results") from error
    return found


def before(earlier: list[dict], now: dict) -> dict[tuple[str, str], float]:
    """(what, peer) -> its last figure that was measured on such a machine in the same way."""
    fields = ("machine", "processor", "cores", "data", "runs", "jobs")
    alike = [
        line
        for line in earlier
        if all(line.get(field) == now[field] for field in fields)
        and line.get("versions", {}).get("torch") == now["versions"]["torch"]
    ]
    return {(row.what, row.peer): row.figure for line in alike for row in line["rows"]}


def table(rows: list[Row], last: dict[tuple[str, str], float]) -> str:
    def cells(row: Row) -> dict[str, str]:
        change = row.times_faster(last.get((row.what, row.peer)))
        return {
            "what": row.what,
            "figure": f"{_number(row.figure)} {row.unit}",
            "peer": row.peer,
            "its figure": "" if row.peer_figure is None else _number(row.peer_figure),
            "ratio": "" if row.ratio is None else f"{_number(row.ratio)} x",
            "of peak": "" if row.of_peak is None else f"{row.of_peak:.1%}",
            "faster": "" if change is None else f"{change - 1:+.0%}",
        }

    made = pd.DataFrame(map(cells, rows))
    for column in ("what", "peer"):  # to the left
        made[column] = made[column].str.ljust(made[column].str.len().max())
    return made.to_string(index=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def show(args: argparse.Namespace) -> None:
    path = args.results / "bench.jsonl"
    earlier = kept(path)  # a damaged file is found before anything is measured
    now = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": platform.node(),
        "processor": processor(),
        "cores": joblib.cpu_count(),
        "versions": versions() | {"numpy": np.__version__},
        "data": args.data,
        "runs": args.runs,
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        asked = Evaluation.of(args.data, runs=args.runs, results=Path(folder), jobs=args.jobs, device="cpu")
        bench, now["jobs"] = Bench(asked, Path(folder)), asked.setting.jobs
        for name in [name for name in GROUPS if name in args.only]:
            with stage(name):
                rows += GROUPS[name](bench)
    shown = ", ".join(f"{name} {now['versions'][name]}" for name in ("python", "torch", "numpy"))
    print(f"{now['machine']}: {now['processor']}, {now['cores']} cores, {now['jobs']} processes; {shown}")
    print(table(rows, before(earlier, now)))
    line = json.dumps(now | {"rows": [dataclasses.asdict(row) for row in rows]}) + "\n"
    text = path.read_bytes() if path.exists() else b""
    write_atomically(path, lambda file: file.write(text + line.encode()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows (default: all)")
    for name in ("data", "runs", "jobs", "results"):
        parser.add_argument(f"--{name}", **command.OPTIONS[name])
    args = parser.parse_args(arguments)
    return command.run(lambda: show(args), resumes=False)


if __name__ == "__main__":
    sys.exit(main())
