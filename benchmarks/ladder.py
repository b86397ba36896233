"""The published ablation of unlearning.py, row by row: what each step of the method gains here, and gained there.

    python -m benchmarks.ladder                 every row at N = 512 on the public split (make ladder)
    python -m benchmarks.ladder --runs 64       a first impression

Scores on two data sets cannot be compared, so each column is also divided by its own fine-tuning score. The published
rows are those of Ahn et al. (competition data, 512 runs), where scores of the same code varied by about ±0.005. Here every
row is unlearning.py's preset for the data set, which was tuned as a whole, with only the change that the row names.
"""

import dataclasses
import sys

import pandas as pd

from evaluator import command
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import write_csv
from evaluator.method import Method


def rows(preset: dict) -> dict[str, tuple[float, dict]]:
    """What a row changes -> (its published score, Config values). preset: the full method, at the end of the first block."""
    tensors, noise, cycles = preset["tensors"], preset["noise"], preset["epochs"]
    together = sum(cycles)
    one_cycle = {"epochs": (together,), "exclude": ()}
    finetune = one_cycle | {"tensors": 0, "noise": 0.0, "loss": "ce"}
    random = finetune | {"tensors": tensors}
    noisy = random | {"noise": noise}
    distilled = noisy | {"loss": "mse"}
    return {
        "fine-tune": (0.0496, finetune),
        "+ random re-initialisation": (0.0617, random),
        "  (by Fisher information instead)": (0.0486, random | {"choose": "fisher"}),
        "+ Gaussian noise": (0.0653, noisy),
        "+ MSE to the original's logits": (0.0680, distilled),
        f"+ {len(cycles)} cycles": (0.0856, distilled | {"epochs": cycles}),
        "+ fc and shortcuts excluded": (0.0969, {}),
        "loss: cross-entropy": (0.0653, noisy),
        "loss: L1": (0.0326, noisy | {"loss": "l1"}),
        "loss: MSE": (0.0680, distilled),
        "noise: half": (0.0633, noisy | {"noise": noise / 2}),
        "noise: as tuned": (0.0653, noisy),
        "noise: half as much again": (0.0591, noisy | {"noise": 1.5 * noise}),
        "augment: vertical flip": (0.0251, noisy | {"augment": "flip"}),
        "augment: crop": (0.00001, noisy | {"augment": "crop"}),
        "augment: cutout": (0.00001, noisy | {"augment": "cutout"}),
        "cycles: 1": (0.0680, distilled),
        "cycles: 1, twice the tensors": (0.0656, distilled | {"tensors": 2 * tensors}),
        "cycles: 2": (0.0844, distilled | {"epochs": (together / 2,) * 2}),
        "cycles: 3": (0.0856, distilled | {"epochs": cycles}),
        "excluded: none": (0.0856, {"exclude": ()}),
        "excluded: fc": (0.0926, {"exclude": ("fc",)}),
        "excluded: fc, shortcuts": (0.0969, {}),
        "re-initialised: whole tensors": (0.0856, {"exclude": ()}),
        "re-initialised: single elements": (0.0575, {"exclude": (), "unit": "element"}),
    }


def ladder(evaluation: Evaluation, method: Method) -> pd.DataFrame:
    """One row per step of the ablation: the published score and ours, each also divided by its own fine-tuning score."""
    made = []
    for row, (published, values) in rows(method.config).items():
        changed = dataclasses.replace(method, name="ladder", config=method.config | values)
        summary = evaluation.score_of(changed, range(evaluation.runs))
        made.append(
            {
                "row": row,
                "published": published,
                "here": summary["score"],
                "F": summary["forgetting_quality"],
                "RA_U/RA_R": summary["ra_unlearned"] / summary["ra_retrained"],
                "TA_U/TA_R": summary["ta_unlearned"] / summary["ta_retrained"],
            }
        )
    table = pd.DataFrame(made)
    for column in ("published", "here"):
        table[f"{column} / fine-tune"] = table[column] / table[column][0]
    return table


def main(arguments: list[str] | None = None) -> int:
    args = command.parser(__doc__, "split").parse_args(arguments)
    return command.run(lambda: show(args))


def show(args) -> None:
    evaluation = command.evaluation(args)
    table = ladder(evaluation, Method.read(HERE / "unlearning.py", evaluation.data.name))
    write_csv(evaluation.results / "ladder.csv", table)
    print(f"\n{evaluation.title}")
    formats = {"published": "{:.5g}".format, **dict.fromkeys(table.columns[2:], "{:.4f}".format)}
    formats |= dict.fromkeys([name for name in table if name.endswith("fine-tune")], "{:.2f}".format)
    print(table.assign(row=table.row.str.ljust(34)).to_string(index=False, formatters=formats))


if __name__ == "__main__":
    sys.exit(main())
