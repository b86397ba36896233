"""Scores unlearning methods as the NeurIPS 2023 Machine Unlearning Challenge did: N unlearned against N retrained networks.

    python evaluate.py                          unlearning.py beside the baselines, on the handwritten digits
    python evaluate.py methods/fanchuan.py      any method file, or an edited notebook
    python evaluate.py --runs 64                a first impression in two minutes (never compare scores across --runs)

Everything finished is kept under --results: the same command goes on where it was interrupted, and redoes only what
other data, another recipe, other code or other hyperparameters would change.
"""

import argparse
import ast
import sys
import time
from pathlib import Path

import joblib
import torch

from evaluator import report
from evaluator.data import Data
from evaluator.files import Problem
from evaluator.pool import Pool
from evaluator.runs import NO_UNLEARNING, Method, Setting, retrained_pool, seconds_alone, unlearned_pool
from evaluator.training import Recipe, original_network, seconds_of_retraining

HERE = Path(__file__).resolve().parent
BASELINES = [HERE / "methods" / "finetune.py", HERE / "methods" / "negrad.py"]


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        evaluate(args)
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="a .py file or an .ipynb notebook with unlearning()")
    what = parser.add_argument_group("what is scored")
    what.add_argument("--data", default="digits", help="a name under data/, or any folder in that layout (default: digits)")
    what.add_argument("--split", default="public", help="public (tune on this one) or private (report on this one)")
    what.add_argument("--runs", type=int, default=512, help="N, networks of each kind (default: 512, the competition's)")
    what.add_argument("--preset", help="a key of the method's PRESETS (default: the data set's name, else Config())")
    what.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="Config fields of the METHODs")
    what.add_argument("--second-pool", action="store_true", help="measure the ceiling with N further retrained networks")
    how = parser.add_argument_group("how")
    how.add_argument("--jobs", type=int, help="processes (default: one a core, or one a GPU)")
    how.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU where one works (default)")
    how.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop with an error when a run takes longer")
    how.add_argument("--results", type=Path, default=Path("results"), help="where runs, tables and figures are kept")
    how.add_argument("--keep-networks", action="store_true", help="also keep every network's weights (large)")
    return parser.parse_args(arguments)


def evaluate(args: argparse.Namespace) -> None:
    if args.runs < 2:
        raise Problem(f"--runs {args.runs}: the metric compares distributions, it needs at least 2 runs")
    if args.jobs is not None and args.jobs < 1:
        raise Problem(f"--jobs {args.jobs}: at least 1 process is needed")
    device = working_device(args.device)
    folder = Path(args.data) if Path(args.data).is_dir() else HERE / "data" / args.data
    jobs = args.jobs or (torch.cuda.device_count() if device == "cuda" else joblib.cpu_count())
    setting = Setting(folder, args.split, args.results, jobs, device, args.time_limit, args.keep_networks)
    data = setting.load()
    recipe = Recipe.of(data)
    values = dict(field_value(text) for text in args.set)
    methods = [Method.read(path, args.preset or data.name, values) for path in args.methods]
    if not methods:
        own = [*BASELINES, HERE / "unlearning.py"]
        methods = [NO_UNLEARNING, *(Method.read(path, args.preset or data.name) for path in own)]

    with stage("original network"):
        original_network(data, recipe)
    with stage(f"{args.runs} retrained networks"):
        retrained = retrained_pool(setting, data, recipe, args.runs)
        retraining_seconds = kept_number(retrained, f"seconds_{device}.json", lambda: seconds_of_retraining(data, recipe))
    with stage("ceiling"):
        ceiling = find_ceiling(setting, data, recipe, args, retrained)
    summaries = []
    for method in methods:
        with stage(f"{args.runs} runs of {method.name}"):
            summaries.append(score_method(setting, data, recipe, method, args.runs, retrained, retraining_seconds))
    table = report.score_table(summaries, ceiling)
    title = f"{data.name}, {data.split} split, {args.runs} runs, {len(data.forget)} forget examples"
    page = report.write_page(setting.results_of(data, "."), title, table, [method.name for method in methods])
    print(f"\n{title}\n{table.to_string(index=False)}")
    if data.test is None:
        print("TA is measured on the validation set: this folder has no test.csv")
    print(f"\nfigures, per-example values and {page.name}: {page.parent}")


def score_method(
    setting: Setting, data: Data, recipe: Recipe, method: Method, runs: int, retrained: Pool, retraining_seconds: float
) -> dict:
    """Make the runs that are missing, and the summary, figures and tables where they are not of these very runs."""
    folder = setting.results_of(data, method.name)
    unlearned = unlearned_pool(setting, data, recipe, method, runs)
    made_of = {"runs": runs, "unlearned": unlearned.folder.name, "retrained": retrained.folder.name}
    summary = report.read_json(folder / "summary.json")
    if summary and summary["made_of"] == made_of:
        return summary
    seconds = kept_number(unlearned, f"seconds_{setting.device}.json", lambda: seconds_alone(setting, data, recipe, method))
    pools = unlearned.load(range(runs)), retrained.load(range(runs))
    scores, table = report.score(*pools, data)
    report.draw_figures(folder, method.name, *pools, data, table)
    report.write_csv(folder / "examples.csv", table)
    summary = {
        "method": method.name,
        "config": method.config,
        "data": data.name,
        "split": data.split,
        **scores,
        "seconds_per_run": seconds,
        "fraction_of_retraining": seconds / retraining_seconds,
        "versions": report.versions(),
        "device": setting.device,
        "made_of": made_of,
    }
    report.write_json(folder / "summary.json", summary)
    return summary


def find_ceiling(setting: Setting, data: Data, recipe: Recipe, args: argparse.Namespace, retrained: Pool) -> dict:
    """The row of a perfect unlearner: retrained against retrained. Estimated, or measured with a second pool."""
    if args.second_pool:
        again = retrained_pool(setting, data, recipe, args.runs, "retrained_again")
        scores, _ = report.score(again.load(range(args.runs)), retrained.load(range(args.runs)), data)
        return {"method": "(ceiling, measured)", **scores}
    quality = kept_number(
        retrained, f"ceiling_{args.runs}.json", lambda: report.estimated_ceiling(retrained.load(range(args.runs)), data)
    )
    equal = dict.fromkeys(("ra_unlearned", "ra_retrained", "ta_unlearned", "ta_retrained"), 1.0)
    return {"method": "(ceiling, estimated)", "forgetting_quality": quality, "score": quality, **equal}


def kept_number(pool: Pool, name: str, measure) -> float:
    """A number about a pool that is worked out once and kept beside its runs."""
    kept = report.read_json(pool.folder / name)
    if kept is None:
        kept = {"value": measure()}
        report.write_json(pool.folder / name, kept)
    return kept["value"]


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
        message = str(error).splitlines()[0]
        if wanted == "cuda":
            raise Problem(f"--device cuda: the GPU does not work with this torch ({message})") from error
        print(f"the GPU does not work with this torch ({message}); using the CPU", file=sys.stderr)
        return "cpu"


def field_value(text: str) -> tuple[str, object]:
    """ "lr=1e-3" -> ("lr", 0.001): a Python literal, else the text itself."""
    field, equals, value = text.partition("=")
    if not equals:
        raise Problem(f"--set {text}: write FIELD=VALUE")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field, value


if __name__ == "__main__":
    sys.exit(main())
