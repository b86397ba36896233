"""Scores unlearning methods as the NeurIPS 2023 Machine Unlearning Challenge did: N unlearned against N retrained networks.

    python evaluate.py                          unlearning.py beside the baselines, on the handwritten digits
    python evaluate.py methods/fanchuan.py      any method file, or an edited notebook
    python evaluate.py --checkpoints submission.zip --runs 8          networks that exist already
    python evaluate.py --runs 64                a first impression in two minutes (never compare scores across --runs)

Everything finished is kept under --results: the same command goes on where it was interrupted, and redoes only what
other data, another recipe, other code or other hyperparameters would change.
"""

import argparse
import ast
import sys
from pathlib import Path

from evaluator import report
from evaluator.checkpoints import Checkpoints
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem
from evaluator.runs import NO_UNLEARNING, Method
from evaluator.tuning import tuned_values

OURS = [HERE / "methods" / "finetune.py", HERE / "methods" / "negrad.py", HERE / "unlearning.py"]


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
    what.add_argument("--checkpoints", type=Path, metavar="ZIP", help="a submission.zip with one checkpoint a run")
    what.add_argument("--data", default="digits", help="a name under data/, or any folder in that layout (default: digits)")
    what.add_argument("--split", default="public", help="public (tune on this one) or private (report on this one)")
    what.add_argument("--runs", type=int, default=512, help="N, networks of each kind (default: 512, the competition's)")
    what.add_argument("--preset", help="a key of the method's PRESETS (default: the data set's name, else Config())")
    what.add_argument("--tuned", action="store_true", help="use the values that `make tune` found for the data set")
    what.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="Config fields of the METHODs")
    what.add_argument("--second-pool", action="store_true", help="measure the ceiling with N further retrained networks")
    how = parser.add_argument_group("how")
    how.add_argument("--jobs", type=int, help="processes (default: one a core, or one on the GPU)")
    how.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU where one works (default)")
    how.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop with an error when a run takes longer")
    how.add_argument("--results", type=Path, default=Path("results"), help="where runs, tables and figures are kept")
    how.add_argument("--keep-networks", action="store_true", help="also keep every network's weights (large)")
    return parser.parse_args(arguments)


def evaluate(args: argparse.Namespace) -> None:
    evaluation = Evaluation.of(
        args.data,
        args.split,
        args.runs,
        args.results,
        args.jobs,
        args.device,
        args.second_pool,
        time_limit=args.time_limit,
        keep_networks=args.keep_networks,
    )
    data = evaluation.data
    values = dict(field_value(text) for text in args.set)
    given = args.methods or args.checkpoints
    methods = [] if given else [NO_UNLEARNING]
    if args.checkpoints:
        methods.append(Checkpoints.read(args.checkpoints, args.runs))
    for path in args.methods if given else OURS:
        if args.preset and Path(path).suffix == ".ipynb":
            raise Problem(f"--preset {args.preset}: a notebook is scored with the values in it; --set changes one")
        found = tuned_values(path, data.name) if args.tuned else {}
        methods.append(Method.read(path, args.preset or data.name, found | values))

    summaries = [evaluation.score(method) for method in methods]
    table = report.score_table(summaries, evaluation.ceiling)
    page = report.write_page(evaluation.results, evaluation.title, table, [method.name for method in methods])
    print(f"\n{evaluation.title}\n{table.to_string(index=False)}")
    if data.test is None:
        print("TA is measured on the validation set: this folder has no test.csv")
    print(f"\nfigures, per-example values and {page.name}: {page.parent}")


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
