"""Hyperparameters tried by hand: a table of the tries, and figures of the last one beside the previous one."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from evaluator import report, scoring
from evaluator.evaluation import Evaluation
from evaluator.files import Problem, read_json, write_csv
from evaluator.method import Method
from evaluator.pool import Pool


@dataclass(frozen=True)
class Tries:
    """The tries on one data set and split, kept as results/<data>/<split>/tries.csv, one row per try."""

    evaluation: Evaluation

    @property
    def file(self) -> Path:
        return self.evaluation.results / "tries.csv"

    @property
    def table(self) -> pd.DataFrame:
        """Raises Problem when the file is damaged."""
        if not self.file.exists():
            return pd.DataFrame()
        try:
            table = pd.read_csv(self.file, dtype={"kept in": str})
        except (OSError, ValueError) as error:
            raise Problem(f"{self.file}: not a readable table; delete it to begin a new one") from error
        missing = {"try", "kept in", "N"} - set(table)
        if missing:
            raise Problem(f"{self.file}: no column '{min(missing)}'; delete it to begin a new one")
        return table

    def add(self, path: Path | str, changes: dict) -> dict:
        """Score a method with some fields of its Config changed; returns the summary. A setting that was tried before is
        not run again, and the same one twice in a row is one try. Raises Problem when a field or value cannot be used."""
        method = Method.read(path, self.evaluation.data.name, changes)
        with self.evaluation.alone():
            summary = self.evaluation.score(dataclasses.replace(method, name="tuning"))
            table = self.table
            row = {
                "try": len(table) + 1,
                "method": method.name,
                "changes": ", ".join(f"{name} = {value}" for name, value in changes.items()) or "none",
                "N": summary["runs"],
                "score": summary["score"],
                "F": summary["forgetting_quality"],
                "RA_U/RA_R": summary["ra_unlearned"] / summary["ra_retrained"],
                "TA_U/TA_R": summary["ta_unlearned"] / summary["ta_retrained"],
                "share of retraining cost": summary["fraction_of_retraining"],
                "kept in": summary["made_of"]["unlearned"],
            }
            last = table.iloc[-1] if len(table) else {"score": -1.0}
            other = any(last.get(name) != row[name] for name in ("kept in", "N"))
            if other or abs(last["score"] - row["score"]) > 1e-9:  # CSV may lose the last digit
                write_csv(self.file, pd.concat([table, pd.DataFrame([row])], ignore_index=True))
        return summary

    def figures(self) -> list[Figure]:
        """Confidences on the forget and on the retain set, and epsilon: of the last two tries at this N."""
        runs, data = self.evaluation.runs, self.evaluation.data
        shown = self.table.query(f"N == {runs}").tail(2).iloc[::-1]
        retrained = self.evaluation.retrained().load(range(runs))
        pools = {}
        for number, kept in zip(shown["try"], shown["kept in"], strict=True):
            folder = self.evaluation.results / "tuning"
            pool = Pool(folder, read_json(folder / kept / "made_from.json"))
            if pool.folder.name != kept:
                raise Problem(f"{folder / kept}: damaged; delete {self.file} to begin a new table")
            pools[f"try {number}"] = pool.load(range(runs))

        def confidences(pool: dict) -> dict:
            return {"forget": scoring.confidences(pool, data), "retain": pool["retain_confidences"]}

        sides = {name: confidences(pool) for name, pool in {"retrained": retrained, **pools}.items()}
        figures = [
            report.confidence_histograms({name: side[part] for name, side in sides.items()}, f"{part} set, {runs} networks")
            for part in ("forget", "retain")
        ]
        for name, pool in pools.items():
            scores, table = scoring.score(pool, retrained, data)
            figures.append(report.epsilon_histogram(table.epsilon.to_numpy(), runs))
            axes = figures[-1].axes[0]
            axes.set_title(f"{name}: score {scores['score']:.4f}, F {scores['forgetting_quality']:.4f}")
        top = max(figure.axes[0].get_ylim()[1] for figure in figures[2:])
        for figure in figures[2:]:  # the same scale, to compare by eye
            figure.axes[0].set_ylim(0, top)
        return figures
