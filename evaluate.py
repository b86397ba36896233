"""Scores unlearning methods as the NeurIPS 2023 Machine Unlearning Challenge did: N unlearned against N retrained networks.

    python evaluate.py                          unlearning.py, shrink_perturb.py and two baselines, on the handwritten digits
    python evaluate.py methods/fanchuan.py      any method file, or an edited notebook
    python evaluate.py --checkpoints submission.zip --runs 8          networks that exist already
    python evaluate.py --runs 64                a first impression in two minutes (never compare scores across --runs)
    python evaluate.py --split 'private*'       on every private forget set: means and their errors
    python evaluate.py compare A.py B.py        also example by example: where does B differ from A?
    python evaluate.py report                   the page of what is kept, without running anything
    python evaluate.py pool export FILE         the retrained networks' answers in one file, for others to
    python evaluate.py pool import FILE         take: they train none. pool make trains some: --first 128 --count 64

Everything finished is kept under --results: the same command resumes where it was interrupted, and redoes only what a
change of data, recipe, code or hyperparameters affects.
"""

import argparse
import ast
import os
import re
import sys
from pathlib import Path

from evaluator import processes

if __name__ == "__main__":  # before torch is imported here: the server imports it at the same time
    processes.start_server()

import pandas as pd

from evaluator import command, comparison, forget_sets, report, sharing
from evaluator.checkpoints import Checkpoints
from evaluator.evaluation import HERE, MOST_RUNS, Evaluation
from evaluator.files import Problem, read_json, write_csv
from evaluator.method import NO_UNLEARNING, Method, check_distinct
from evaluator.tuning import tuned_values

METHODS = HERE / "methods"
OURS = [METHODS / "finetune.py", METHODS / "negrad.py", HERE / "unlearning.py", METHODS / "shrink_perturb.py"]


def options(documentation: str) -> argparse.ArgumentParser:
    """A parser of what an evaluation can be asked for."""
    parser = command.parser(documentation, "split", "second-pool", "attacks", "time-limit", "keep-networks")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="a .py file or an .ipynb notebook with unlearning()")
    what = parser.add_argument_group("what is scored")
    what.add_argument("--checkpoints", type=Path, metavar="ZIP", help="a submission.zip with one checkpoint per run")
    what.add_argument("--preset", help="a key of the methods' PRESETS (default: the data set's name, if there is one)")
    what.add_argument("--tuned", action="store_true", help="use the values that `make tune` found for the data set")
    what.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="Config fields of the METHODs")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__)
    part = parser.add_argument_group("pool make and pool export")
    part.add_argument("--first", type=int, default=0, metavar="RUN", help="the first run (default: 0)")
    part.add_argument("--count", type=int, help="how many runs (default: make --runs of them, export all that are kept)")
    args = parser.parse_args(arguments)
    what_to_do = {"compare": compare, "report": write_pages, "pool": pool}.get(
        args.methods[0] if args.methods else "", evaluate
    )
    if what_to_do is not evaluate:
        del args.methods[0]
    return command.run(lambda: what_to_do(args))


def evaluate(args) -> list[Evaluation]:
    """Score the methods on each forget set, and print what was found. Returns the evaluations."""
    evaluations = list(command.evaluations(args))
    splits = [evaluation.split for evaluation in evaluations]
    if args.checkpoints and len(splits) > 1:
        raise Problem(f"--split {args.split}: a submission is for one forget set; name one of {', '.join(splits)}")
    methods, found, ceilings = [], [], []  # the last two for each forget set
    for evaluation in evaluations:
        with evaluation.alone():
            methods = methods or methods_of(args, evaluation.data.name)
            found.append([scored(evaluation, method, args.attacks) for method in methods])
            ceilings.append(evaluation.ceiling())
            page = report.write_page(evaluation, ceilings[-1])
        if len(splits) > 1:
            print(f"{evaluation.title}: {page}", file=sys.stderr, flush=True)
    attacks = list(found[0][0].get("attacks", {}))
    if len(splits) == 1:
        scores = report.score_table(found[0], ceilings[0])
        print(f"\n{evaluation.title}\n{scores.drop(columns=attacks).to_string(index=False)}")
    else:
        table = pd.concat(map(forget_sets.per_set, found, ceilings))
        name = re.sub(r"[^A-Za-z0-9._-]+", "", args.split).strip("-") or "all"
        write_csv(evaluation.results.parent / f"{name}_scores.csv", forget_sets.noted(table, evaluation.data.note))
        scores = forget_sets.over_sets(table)
        print(f"\n{forget_sets.title(evaluation.data.title, table)}\n{forget_sets.as_text(scores).to_string(index=False)}")
    if attacks:
        print(f"\n{scores[['method', *attacks]].round(3).to_string(index=False)}")
    for line in report.provisos(evaluation.data, found[0]):
        print(line)
    if len(methods) > 1:
        print("", *forget_sets.verdicts(list(zip(*found, strict=True))), sep="\n")
    print(f"\nthe page with figures: {page}; per-example values: {page.parent}/*/examples.csv")
    return evaluations


def compare(args) -> None:
    """Score two methods, and say on which forget examples they differ."""
    if len(args.methods) != 2:
        raise Problem(f"compare needs two METHODs, not {len(args.methods)}: python evaluate.py compare A.py B.py")
    names = tuple(path.stem for path in map(Path, args.methods))
    for evaluation in evaluate(args):
        tables = [pd.read_csv(evaluation.results / name / "examples.csv") for name in names]
        found = comparison.compare(*tables, names, evaluation.runs)
        file = evaluation.results / f"compare_{'_'.join(names)}.csv"
        write_csv(file, found.examples)
        print(f"\n{evaluation.data.split}, {names[1]} against {names[0]}: {found}")
        print(found.examples.head(10).round(4).to_string(index=False))
        print(f"all examples: {file}")


def write_pages(args) -> None:
    """Write the page of what is kept for each forget set."""
    if args.methods:
        raise Problem(f"report shows every method that is kept; leave out {args.methods[0]}")
    for evaluation in command.evaluations(args):
        with evaluation.alone():
            print(report.write_page(evaluation))


def pool(args) -> None:
    """Make, export or import retrained networks."""
    what, *files = args.methods or [""]
    if what not in ("make", "export", "import") or len(files) != (what != "make"):
        raise Problem("pool: write pool make, pool export FILE or pool import FILE")
    if what == "import":
        found, original = sharing.import_(Path(files[0]), lambda split: command.evaluation(args, split=split))
        for one in found:
            kept = f"{len(one.there)} were there already and stay" if one.there else "none was there"
            print(f"{one.evaluation.data.title}, {one.evaluation.data.split}: new runs: {sharing.spans(one.new)}; {kept}")
        print(f"the original: {original}")
        return
    count = args.count if args.count is not None else args.runs if what == "make" else MOST_RUNS - args.first
    if args.first < 0 or count < 1 or args.first + count > MOST_RUNS:
        raise Problem(f"--first {args.first} --count {count}: runs are numbered from 0 to {MOST_RUNS - 1}")
    evaluations = list(command.evaluations(args))
    if what == "make":
        for evaluation in evaluations:
            kept = sharing.make(evaluation, args.first, count).kept()
            print(f"{evaluation.data.title}, {evaluation.data.split}: runs {sharing.spans(kept)} are kept")
        return
    written = sharing.export(Path(files[0]), evaluations, range(args.first, args.first + count), args.keep_networks)
    for split, runs in written.items():
        print(f"{evaluations[0].data.title}, {split}: runs {sharing.spans(runs)}")
    print(f"wrote {files[0]}, {Path(files[0]).stat().st_size / 1e6:.1f} MB")


def scored(evaluation: Evaluation, method: Method | Checkpoints, attacks: bool) -> dict:
    """The summary of a method on one forget set, without the attacks unless they were asked for."""
    before = read_json(evaluation.results / method.name / "summary.json").get("path", str(method.path))
    if os.path.abspath(before) != os.path.abspath(str(method.path)):
        print(f"{method.name}: replaces the results of {before}", file=sys.stderr)
    summary = evaluation.score(method)
    return {name: value for name, value in summary.items() if attacks or name != "attacks"}


def methods_of(args, data_name: str) -> list[Method | Checkpoints]:
    """The methods to score. Raises Problem when one cannot be read, or two have the same name."""
    given = args.methods or args.checkpoints
    methods = [] if given else [NO_UNLEARNING]
    if args.checkpoints:
        methods.append(Checkpoints.read(args.checkpoints, args.runs))
    values = dict(field_value(text) for text in args.set)
    for path in args.methods if given else OURS:
        found = tuned_values(path, data_name) if args.tuned else {}
        methods.append(Method.read(path, data_name, found | values, args.preset))
    check_distinct(methods)
    return methods


def field_value(text: str) -> tuple[str, object]:
    """ "lr=1e-3" -> ("lr", 0.001): a Python literal, else the text itself."""
    field, equals, value = text.partition("=")
    if not equals:
        raise Problem(f"--set {text}: write FIELD=VALUE")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return field, value


if __name__ == "__main__":
    sys.exit(main())
