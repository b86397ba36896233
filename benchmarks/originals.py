"""How much of a score is a matter of the one original: the scores with several, which differ in nothing but their seed.

    python -m benchmarks.originals methods/shrink_perturb.py --split 'public*' --runs 64
    python -m benchmarks.originals --tuned                      finetune and shrink_perturb on the public set

The retrained networks are the same for all originals, as they come from none. Originals and runs are kept: an interrupted
command resumes.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from evaluator import command
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem
from evaluator.method import Method, check_distinct
from evaluator.runs import unlearned_pool
from evaluator.scoring import confidences, score
from evaluator.training import original_network
from evaluator.tuning import tuned_values
from evaluator.why import shifts_and_spreads

METHODS = [HERE / "methods" / "finetune.py", HERE / "methods" / "shrink_perturb.py"]


def original(evaluation: Evaluation, seed: int) -> nn.Module:
    """A network to unlearn from, trained with another seed."""
    folder = evaluation.setting.results / "originals" / f"{evaluation.data.name}_{seed}"
    data = replace(evaluation.data, folder=folder).to(evaluation.setting.own_device)
    with evaluation.alone():
        return original_network(data, evaluation.recipe, seed).cpu()


def row(evaluation: Evaluation, originals: Sequence[nn.Module], method: Method) -> dict:
    """A method's scores on one forget set from several originals, their standard deviation, and what is wrong with the
    medians of the confidences, in standard deviations of the retrained ones, apart from a constant: the mean square over
    the examples, and what of it the originals have in common (the mean product of two)."""
    scores, errors = [], []
    retrained = evaluation.retrained().load(range(evaluation.runs))
    for one in originals:
        with evaluation.alone():
            pool = unlearned_pool(evaluation.setting, evaluation.data, evaluation.recipe, one, method, evaluation.runs)
        unlearned = pool.load(range(evaluation.runs))
        scores.append(score(unlearned, retrained, evaluation.data)[0]["score"])
        ours, theirs = (confidences(pool, evaluation.data) for pool in (unlearned, retrained))
        shift = shifts_and_spreads(ours, theirs).shift
        errors.append((shift - shift.mean()).numpy())
    common = np.mean([(one * other).mean() for one, other in combinations(errors, 2)])
    return {
        "method": method.name,
        "split": evaluation.data.split,
        **{f"original {number}": value for number, value in enumerate(scores)},
        "sd": np.std(scores, ddof=1),
        "squared error of the medians": np.mean(np.square(errors)),
        "of it common": common,
    }


def methods_of(args, data_name: str) -> list[Method]:
    paths = args.methods or METHODS
    methods = [Method.read(path, data_name, tuned_values(path, data_name) if args.tuned else None) for path in paths]
    check_distinct(methods)
    return methods


def over_sets(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the forget sets. sd is the root mean square of theirs; that of the means is what more forget sets would
    not make smaller."""
    grouped = table.drop(columns="split").groupby("method", sort=False)
    means = grouped.mean().assign(sd=grouped.sd.agg(lambda sds: math.sqrt((sds**2).mean())))
    means.insert(means.columns.get_loc("sd") + 1, "sd of the means", means.filter(regex="^original").std(axis=1))
    return means.reset_index()


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "split", runs=64)
    parser.add_argument("methods", nargs="*", type=Path, metavar="METHOD", help="method files (default: two)")
    parser.add_argument("--tuned", action="store_true", help="with the values that make tune found for the data")
    parser.add_argument("--originals", type=int, default=4, help="how many (default: %(default)s)")
    args = parser.parse_args(arguments)
    return command.run(lambda: show(args))


def show(args) -> None:
    if not 2 <= args.originals <= 1000:
        raise Problem(f"--originals {args.originals}: must be 2 to 1000")
    rows, methods = [], []
    for evaluation in command.evaluations(args):
        methods = methods or methods_of(args, evaluation.data.name)  # the same for every forget set
        originals = [original(evaluation, seed) for seed in range(args.originals)]
        rows += [row(evaluation, originals, method) for method in methods]
        title = evaluation.data.title
    table = pd.DataFrame(rows)
    print(f"{title}: scores from {args.originals} originals, {args.runs} runs")
    print(table.round(4).to_string(index=False))
    if table.split.nunique() > 1:
        print(f"\nmeans over the forget sets\n{over_sets(table).round(4).to_string(index=False)}")


if __name__ == "__main__":
    sys.exit(main())
