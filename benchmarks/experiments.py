"""What the knobs of methods/shrink_perturb.py do: score, median shift and spread ratio, drawn for docs/experiments.md.

python -m benchmarks.experiments --runs 16          on the digits' public forget set
python -m benchmarks.experiments --runs 16 --picture docs/experiments.png        also the picture
"""

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from evaluator import command
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import write_atomically
from evaluator.method import Method
from evaluator.report import RETRAINED, UNLEARNED

KEPT = (0.01, 0.2, 0.4, 0.6, 0.8, 0.95)
OTHERS = (
    {},
    {"calibrate": False},
    {"scale": 0.8},
    {"share": 1.0},
    {"classes_apart": 1.0},
    {"freeze": False},
    {"learning_rate": 0.05},
    {"learning_rate": 0.2},
)


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "split")
    parser.add_argument("--picture", type=Path, help="also draw it into this file")
    args = parser.parse_args(arguments)
    return command.run(lambda: show(args))


def show(args) -> None:
    evaluation = command.evaluation(args)
    rows = [measured(evaluation, {"kept": kept}) for kept in KEPT]
    others = [measured(evaluation, values) for values in OTHERS]
    print(f"{evaluation.title}\n{pd.DataFrame(rows + others).round(4).to_string(index=False)}")
    if args.picture:
        draw(pd.DataFrame(rows), evaluation, args.picture)
        print(f"wrote {args.picture}")


def measured(evaluation: Evaluation, values: dict) -> dict:
    """The score with some values of the Config, and the medians over the forget examples of what is wrong."""
    summary = evaluation.score(Method.read(HERE / "methods" / "shrink_perturb.py", values=values))
    examples = pd.read_csv(evaluation.results / "shrink_perturb" / "examples.csv")
    return {
        "values": ", ".join(f"{name}={value}" for name, value in values.items()) or "as it is",
        "kept": values.get("kept"),
        "score": summary["score"],
        "F": summary["forgetting_quality"],
        "RA": summary["ra_unlearned"] / summary["ra_retrained"],
        "TA": summary["ta_unlearned"] / summary["ta_retrained"],
        "shift": examples["shift"].median(),
        "shift, 10% to 90%": " to ".join(f"{examples['shift'].quantile(part):+.2f}" for part in (0.1, 0.9)),
        "spread ratio": examples["spread_ratio"].median(),
        "cost": summary["fraction_of_retraining"],
    }


def draw(table: pd.DataFrame, evaluation: Evaluation, path: Path) -> None:
    """Score, shift and spread ratio over what is kept of the old filters."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    figure.suptitle(f"shrink_perturb on {evaluation.title}", fontsize=10)
    aims = {"score": evaluation.ceiling()["score"], "shift": 0.0, "spread ratio": 1.0}
    for axes, (name, aim) in zip(figure.subplots(1, 3), aims.items(), strict=True):
        axes.plot(table.kept, table[name], "o-", color=UNLEARNED)
        axes.axhline(aim, color=RETRAINED, linestyle="--", linewidth=1)
        axes.set(title={"score": "score (dashed: ceiling)"}.get(name, f"median {name}"), xlabel="kept of the old filters")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


if __name__ == "__main__":
    sys.exit(main())
