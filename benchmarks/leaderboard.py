"""All methods, tuned alike, on both splits: prints a table, writes leaderboard.csv and RESULTS.md under results/<data>.

    python -m benchmarks.leaderboard            N = 512 (make leaderboard); resumes where it was interrupted
    python -m benchmarks.leaderboard --runs 64  a first impression
    python -m benchmarks.leaderboard --page RESULTS.md          the kit's own page (make leaderboard PAGE=RESULTS.md)

Every method uses the values that `make tune` found on the public split; unlearning.py also appears with its presets.
Methods are ranked by the private split, whose forget set was not used to choose any value.
"""

import dataclasses
import math
import os
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from evaluator import command
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem, read_json, write_atomically, write_csv
from evaluator.method import NO_UNLEARNING, Method
from evaluator.report import RETRAINED, UNLEARNED
from evaluator.scoring import COST_LIMIT, processor, versions
from evaluator.tuning import tuned_file, tuned_values

SPLITS = ("public", "private")
QUICK = 64  # runs of a quick evaluation, which is compared with the full one
# Private scores, from the teams' write-ups; unlearning's own, finetune's and negrad's are public ones, from Ahn et al.
PUBLISHED = {
    "fanchuan": 0.0985,
    "unlearning": 0.0939,
    "algorithm_1": 0.0939,
    "algorithm_2": 0.0929,
    "kookmin": 0.0902,
    "seif": 0.0885,
    "sebastian": 0.0863,
    "toshi_k": 0.0785,
    "amnesiacs": 0.0783,
    "finetune": 0.0464,
    "negrad": 0.0001,
}


def contestants(data: str) -> list[Method]:
    """Every method, with its tuned values; raises Problem where one has not been tuned."""
    ours = HERE / "unlearning.py"
    tuned = [Method.read(path, values=tuned_values(path, data)) for path in [ours, *sorted((HERE / "methods").glob("*.py"))]]
    names = {"algorithm_1": "algorithm_1", "algorithm_2": "algorithm_2", data: "unlearning_preset"}
    given = [key for key in names if key in tuned[0].presets]
    presets = [dataclasses.replace(Method.read(ours, preset=key), name=names[key]) for key in given]
    return [NO_UNLEARNING, *tuned, *presets]


def scores(evaluation: Evaluation, methods: list[Method]) -> pd.DataFrame:
    """One row per method and one for the ceiling, indexed by name; `quick` is the score of the first 64 runs alone."""
    rows = {method.name: evaluation.score(method) for method in methods}
    rows["(ceiling, estimated)"] = evaluation.ceiling()
    table = pd.DataFrame.from_dict(rows, orient="index")
    first = range(min(QUICK, evaluation.runs))
    return table.assign(quick=pd.Series({method.name: evaluation.score_of(method, first)["score"] for method in methods}))


def leaderboard(splits: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Ranked by the private score; F, the ratios and the costs are those of the private split too."""
    public, private = splits["public"], splits["private"]
    table = pd.DataFrame(
        {
            "F": private.forgetting_quality,
            "RA_U/RA_R": private.ra_unlearned / private.ra_retrained,
            "TA_U/TA_R": private.ta_unlearned / private.ta_retrained,
            "private score": private.score,
            "public score": public.score,
            "of ceiling": private.score / private.score["(ceiling, estimated)"],
            "s/run": private.seconds_per_run,
            "share of retraining cost": private.fraction_of_retraining,
            "published": pd.Series(PUBLISHED),
        }
    ).loc[private.index]
    table = table.sort_values("private score", ascending=False, kind="stable")
    methods = [name for name in table.index if not name.startswith("(")]
    table.insert(0, "rank", pd.Series(range(1, len(methods) + 1), methods, dtype="Int64"))
    return table.rename_axis("method").reset_index()


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """For people to read: rounded, missing values left empty, costs over the limit marked."""

    def cost(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.0%}" + (" **over**" if value > COST_LIMIT else "")

    forms = {
        **dict.fromkeys(("F", "RA_U/RA_R", "TA_U/TA_R", "private score", "public score", "published"), "{:.4f}".format),
        "s/run": "{:.2f}".format,
        "of ceiling": "{:.0%}".format,
        "share of retraining cost": cost,
        "rank": "{:d}".format,
    }
    return table.assign(**{name: table[name].map(form, na_action="ignore").fillna("") for name, form in forms.items()})


def correlations(splits: dict[str, pd.DataFrame], runs: int) -> list[str]:
    """How well one ranking of the methods predicts another (Spearman)."""
    public, private = (table[~table.index.str.startswith("(")] for table in splits.values())
    pairs = {f"public and private, N = {runs}": (public.score, private.score)}
    if runs > QUICK:
        for split, table in (("public", public), ("private", private)):
            pairs[f"N = {QUICK} and N = {runs}, {split}"] = (table.quick, table.score)
    return [f"{what}: {spearmanr(*pair).statistic:.3f}" for what, pair in pairs.items()]


def scatter(evaluation: Evaluation, method: Method) -> list[str]:
    """How much the quick score of one method varies."""
    if evaluation.runs <= QUICK:
        return []
    quick, split = evaluation.group_scores(method, QUICK), evaluation.data.split
    deviation = pd.Series(quick).std()
    return [f"{len(quick)} scores of {method.name} at N = {QUICK}, {split}: standard deviation {deviation:.4f}"]


def draw(table: pd.DataFrame, path: Path, title: str) -> None:
    """A bar for the private score, a mark for the public one, a line for the ceiling."""
    ceiling = table[table.method.str.startswith("(")]["private score"].item()
    methods = table[table["rank"].notna()][::-1]
    figure = Figure(figsize=(7, 0.27 * len(methods) + 1), layout="constrained")
    axes = figure.subplots()
    colours = [UNLEARNED if name == "unlearning" else "#9db4c0" for name in methods.method]
    axes.barh(methods.method, methods["private score"], color=colours, label="private split")
    axes.plot(methods["public score"], methods.method, "k|", markersize=9, label="public split")
    axes.axvline(ceiling, color=RETRAINED, linestyle="--", linewidth=1, label="ceiling (private, estimated)")
    over = methods["share of retraining cost"] > COST_LIMIT
    for name, value in zip(methods.method[over], methods[["private score", "public score"]].max(axis=1)[over], strict=True):
        axes.annotate("over 20% of the cost", (value, name), (6, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set(title=title, xlabel="score")
    axes.margins(y=0.01)
    axes.legend(loc="center", bbox_to_anchor=(0.7, 0.35))
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def markdown(table: pd.DataFrame) -> str:
    lines = [table.columns, ["---", "---:"] + ["---:"] * (table.shape[1] - 2), *table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def budget(data: str) -> str:
    """Each method's search budget, in words. Raises Problem when it was not the same for all."""
    found = read_json(tuned_file(data))
    given = {kept["trials"] for kept in found.values()}
    if len(given) > 1:
        raise Problem(f"{tuned_file(data)}: the methods had different budgets: {'; '.join(sorted(given))}; make tune")
    return given.pop()


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--page", type=Path, help="the page to write (default: <results>/<data>/RESULTS.md)")
    args = parser.parse_args(arguments)
    return command.run(lambda: write(args))


def write(args) -> None:
    splits, sizes, minutes = {}, [], 0.0
    for split in SPLITS:
        evaluation = command.evaluation(args, split=split)
        data = evaluation.data.name
        searched = budget(data)  # before any work
        methods = contestants(data)
        splits[split] = scores(evaluation, methods)
        sizes.append(str(len(evaluation.data.forget)))
        pools = [evaluation.retrained(), *(evaluation.unlearned(method) for method in methods)]
        minutes += sum(pool.load(range(args.runs))["seconds"].sum().item() for pool in pools) / 60
    scattered = scatter(evaluation, methods[1])  # unlearning, private
    table = leaderboard(splits)
    folder = evaluation.setting.results / data
    write_csv(folder / "leaderboard.csv", table)
    title = f"{data}, {args.runs} runs"
    page = args.page or folder / "RESULTS.md"
    picture = page.parent / ("docs" if args.page else "") / "leaderboard.png"
    draw(table, picture, title)
    correlated = correlations(splits, args.runs) + scattered
    shown = as_text(table)
    text = RESULTS.format(
        data=data,
        runs=args.runs,
        sizes=" and ".join(sizes),
        table=markdown(shown),
        explained=Path(os.path.relpath(HERE / "docs" / "metric.md", page.parent)).as_posix(),
        picture=picture.relative_to(page.parent),
        correlations="\n".join(f"- {line}" for line in correlated),
        budget=searched,
        minutes=minutes,
        machine=", ".join([processor(), versions()["processor"], f"torch {versions()['torch']}"]),
    )
    write_atomically(page, lambda file: file.write(text.encode()))
    print(f"\n{title}\n{shown.to_string(index=False)}\n\nrank correlations")
    print("\n".join(f"  {line}" for line in correlated))
    print(f"\n{minutes:.0f} minutes of processor time in the kept runs; wrote {page} and {picture}")


RESULTS = """<!-- Generated by `make leaderboard`; edits are lost. -->
# Results: {data}, {runs} runs

All methods of the kit under the competition's metric: {runs} unlearned against {runs} retrained networks, forget sets of
{sizes} examples (public and private split). Every method was tuned on the public split with the same budget of scored
settings (`make tune`): {budget}. The first setting tried is the published one, moved into the
search ranges; settings that cost more than 20% of a retraining are rejected. Methods are ranked by their private score.

`algorithm_1` and `algorithm_2` are unlearning.py with its published values, which were chosen for a network that trains
longer; costs over the competition's limit are marked. `unlearning_preset` has the values that unlearning.py brings for this
data set: the better of two such searches by public score at N = 512. `make evaluate` uses them, and presets of finetune and
negrad that were chosen in the same way.

*Published* is the score in the competition, on other data and with another network: only the order can be compared. The
column mixes two leaderboards: the scores of unlearning, algorithm_1, algorithm_2, finetune and negrad are public ones, as
reported by Ahn et al., the authors of the method in unlearning.py; those of the winning teams are private ones.

{table}

![Scores of all methods]({picture})

What the scores mean: [docs/metric.md]({explained}). The ceiling is what a perfect unlearner would get, estimated from
the retrained networks.

## How far to trust a quick run

Spearman's rank correlation between two rankings of the methods, and the spread of a single score:

{correlations}

## How this page was made

    make tune           # finds the values in methods/tuned/{data}.json; only needed for new methods or data
    make leaderboard PAGE=RESULTS.md    # this page

The runs took {minutes:.0f} minutes of processor time in all ({machine}). Both commands resume where they were interrupted.
"""


if __name__ == "__main__":
    sys.exit(main())
