"""How much two scores of one method at the same N differ: groups of runs, each against retrained networks of its own.

    python -m benchmarks.score_noise            two groups of 512 runs of finetune and unlearning.py, both splits

Groups differ in their seeds alone, so any difference between them is noise; a gain of that size may be noise too.
"""

import statistics
import sys
from pathlib import Path

from evaluator import command
from evaluator.evaluation import HERE
from evaluator.method import Method


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser(__doc__)
    default = [HERE / "methods" / "finetune.py", HERE / "unlearning.py"]
    parser.add_argument("methods", nargs="*", type=Path, default=default, metavar="METHOD")
    parser.add_argument("--groups", type=int, default=2, help="how many groups of --runs runs (default: %(default)s)")
    args = parser.parse_args(arguments)
    return command.run(lambda: show(args))


def show(args) -> None:
    for split in ("public", "private"):
        evaluation = command.evaluation(args, split=split, runs=args.groups * args.runs)
        for path in args.methods:
            scores = evaluation.group_scores(Method.read(path, evaluation.data.name), args.runs)
            each = ", ".join(f"{score:.4f}" for score in scores)
            print(f"{split}, N = {args.runs}, {path.stem}: {each} (mean {statistics.mean(scores):.4f})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
