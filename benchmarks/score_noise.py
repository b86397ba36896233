"""How far two scores of one method at the same N lie apart: groups of runs, each against retrained networks of its own.

    python -m benchmarks.score_noise            two groups of 512 runs of finetune and unlearning.py, both splits

Groups differ in nothing but their seeds, so that what lies between them is noise, and a gain within it may be none.
"""

import argparse
import statistics
import sys
from pathlib import Path

from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem
from evaluator.runs import Method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [HERE / "methods" / "finetune.py", HERE / "unlearning.py"]
    parser.add_argument("methods", nargs="*", type=Path, default=default, metavar="METHOD")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--runs", type=int, default=512, help="of a group")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--jobs", type=int, help="processes (default: one a core, or one on the GPU)")
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args()
    try:
        for split in ("public", "private"):
            evaluation = Evaluation.of(args.data, split, args.groups * args.runs, args.results, args.jobs)
            for path in args.methods:
                scores = evaluation.group_scores(Method.read(path, evaluation.data.name), args.runs)
                each = ", ".join(f"{score:.4f}" for score in scores)
                mean = statistics.mean(scores)
                print(f"{split}, N = {args.runs}, {path.stem}: {each} (mean {mean:.4f})", flush=True)
    except Problem as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
