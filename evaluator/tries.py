"""Hyperparameters tried by hand: a table of the tries, two of them compared, and figures of the last two."""

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from evaluator import report, scoring
from evaluator.comparison import Comparison, compare
from evaluator.evaluation import Evaluation
from evaluator.files import Problem, read_json, write_csv
from evaluator.intervals import Interval, difference, half_samples
from evaluator.method import Method
from evaluator.pool import Pool

TEXTS = ("date", "method", "changes", "kept in", "config")
COLUMNS = (
    *("try", "date", "method", "changes", "N", "score", "F", "RA_U/RA_R", "TA_U/TA_R", "share of retraining cost"),
    *("kept in", "config"),
)


@dataclass(frozen=True)
class Tries:
    """The tries on one data set and split, kept as results/<data>/<split>/tries.csv, one row per try.

    date: when it was scored, in UTC. config: all values, as JSON: `add(path, json.loads(config))` makes the try again.
    """

    evaluation: Evaluation

    @property
    def file(self) -> Path:
        return self.evaluation.results / "tries.csv"

    @property
    def table(self) -> pd.DataFrame:
        """Cells that an older table does not have are empty. Raises Problem when the file is damaged."""
        if not self.file.exists():
            return pd.DataFrame(columns=COLUMNS)
        try:
            table = pd.read_csv(self.file, dtype=dict.fromkeys(TEXTS, str))
        except (OSError, ValueError) as error:
            raise Problem(f"{self.file}: not a readable table; delete it to begin a new one") from error
        missing = {"try", "kept in", "N"} - set(table)
        if missing:
            raise Problem(f"{self.file}: no column '{min(missing)}'; delete it to begin a new one")
        return table.reindex(columns=[*COLUMNS, *table.columns.difference(COLUMNS, sort=False)])

    def add(self, path: Path | str, changes: dict) -> dict:
        """Score a method with some fields of its Config changed; returns the summary. A setting that was tried before is
        not run again, and the same one twice in a row is one try. Raises Problem when a field or value cannot be used."""
        method = Method.read(path, self.evaluation.data.name, changes)
        with self.evaluation.alone():
            summary = self.evaluation.score(dataclasses.replace(method, name="tuning"))
            table = self.table
            row = {
                "try": max(table["try"], default=0) + 1,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "method": method.name,
                "changes": ", ".join(f"{name} = {value}" for name, value in changes.items()) or "none",
                "N": summary["runs"],
                "score": summary["score"],
                "F": summary["forgetting_quality"],
                "RA_U/RA_R": summary["ra_unlearned"] / summary["ra_retrained"],
                "TA_U/TA_R": summary["ta_unlearned"] / summary["ta_retrained"],
                "share of retraining cost": summary["fraction_of_retraining"],
                "kept in": summary["made_of"]["unlearned"],
                "config": json.dumps(method.config),
            }
            rows = table.to_dict("records")
            same = rows and all(rows[-1][name] == row[name] for name in ("kept in", "N"))
            if not same or abs(rows[-1]["score"] - row["score"]) > 1e-9:  # CSV may lose the last digit
                write_csv(self.file, pd.DataFrame([*rows, row], columns=list(table)))
        return summary

    def overview(self) -> pd.DataFrame:
        """The table for people: by date, with a mark beside the best score at each N, rounded."""
        table = self.table.sort_values("date", kind="stable", na_position="first")
        best = table.score == table.groupby("N").score.transform("max")
        table.insert(table.columns.get_loc("score") + 1, "best", best.map({True: "* best at this N", False: ""}))
        return table.drop(columns=["kept in", "config"]).round(4)

    def last_two(self) -> list[int]:
        """The numbers of the last tries at this N, at most two."""
        return self.table.query(f"N == {self.evaluation.runs}")["try"].tail(2).tolist()

    def compare(self, first: int, second: int) -> tuple[Interval, Comparison]:
        """Two tries by their numbers: the score of the second minus that of the first, and the two example by example.

        Raises Problem when they are one try or there is no such try, they have different numbers of runs, or their runs are
        no longer kept or were made of other data.
        """
        table = self.table.set_index("try")
        for number in (first, second):
            if number not in table.index:
                raise Problem(f"{self.file}: no try {number}; there are {', '.join(map(str, table.index)) or 'none'}")
        if first == second:
            raise Problem(f"{self.file}: try {first} cannot be compared with itself")
        runs, other = table.N[[first, second]].tolist()
        if runs != other:
            raise Problem(
                f"{self.file}: try {first} has N = {runs}, try {second} N = {other}: such scores cannot be compared; "
                "make one of them again with the other's runs"
            )
        data = self.evaluation.data
        retrained = dataclasses.replace(self.evaluation, runs=runs).retrained().load(range(runs))
        pools = [self._runs(number, table["kept in"][number], runs) for number in (first, second)]
        (before, old), (after, new) = (scoring.score(pool, retrained, data) for pool in pools)
        kept, *tried = (scoring.with_confidences(pool, data) for pool in (retrained, *pools))
        earlier, later = (half_samples(side, kept)["score"] for side in tried)
        change = difference(after["score"], later, before["score"], earlier)
        return change, compare(old, new, (f"try {first}", f"try {second}"), runs)

    def figures(self) -> list[Figure]:
        """Confidences on the forget and on the retain set, and epsilon: of the last two tries at this N."""
        runs, data = self.evaluation.runs, self.evaluation.data
        kept_in = self.table.set_index("try")["kept in"]
        retrained = self.evaluation.retrained().load(range(runs))
        pools = {f"try {number}": self._runs(number, kept_in[number], runs) for number in reversed(self.last_two())}

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

    def _runs(self, number: int, kept: str, runs: int) -> dict[str, torch.Tensor]:
        """The kept runs of a try."""
        folder = self.evaluation.results / "tuning"
        made_from = read_json(folder / kept / "made_from.json")
        pool = Pool(folder, made_from) if made_from else None
        if pool is None or pool.folder.name != kept:
            raise Problem(f"{folder / kept}: damaged or gone; delete {self.file} to begin a new table")
        now = {"data": self.evaluation.data.digest, "recipe": self.evaluation.recipe.made_from}
        for name, value in now.items():
            if made_from.get(name) != value:
                raise Problem(f"{self.file}: try {number} was made with other {name}; delete the file to begin a new table")
        return pool.load(range(runs))
