"""All methods, tuned alike or as published, on every private forget set: a table, leaderboard.csv and RESULTS.md.

    python -m benchmarks.leaderboard            N = 512 (make leaderboard); resumes where it was interrupted
    python -m benchmarks.leaderboard --runs 64  a first impression
    python -m benchmarks.leaderboard --page RESULTS.md          the kit's own page (make leaderboard PAGE=RESULTS.md)
    python -m benchmarks.leaderboard --data faces --published   published values: published.csv and PUBLISHED.md

Every method uses the values that `make tune` found on public forget sets; unlearning.py also appears with its presets.
Methods are ranked by their mean score over the private forget sets, none of which was used to choose any value.

--published takes the values that each method was published with, untouched except for one rule for all: learning rates are
multiplied by the competition's steps per epoch over those of the data set, so that rates times steps stay the same. It ends
with the rank correlation with the published scores.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import pandas as pd
from matplotlib.figure import Figure

from evaluator import command, forget_sets
from evaluator.attacks import ATTACKS
from evaluator.comparison import rank_correlations, winners
from evaluator.evaluation import HERE, Evaluation
from evaluator.files import Problem, read_json, write_atomically, write_bytes, write_csv
from evaluator.method import NO_UNLEARNING, Diverged, Method
from evaluator.report import RETRAINED, UNLEARNED
from evaluator.scoring import COST_LIMIT, processor, versions
from evaluator.tuning import rate_factor, tuned_file, tuned_values, with_rates

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
KITS_OWN = ("unlearning", "shrink_perturb")  # red in the picture


def contestants(data: str, only: Sequence[str] = ()) -> list[Method]:
    """Every method, or only those named, with its tuned values; raises Problem if one is not tuned or unknown."""
    ours = HERE / "unlearning.py"
    methods = {path.stem: path for path in [ours, *sorted((HERE / "methods").glob("*.py"))]}
    presets = {"algorithm_1": "algorithm_1", "algorithm_2": "algorithm_2", "unlearning_preset": data}
    presets = {name: key for name, key in presets.items() if key in Method.read(ours).presets}
    names = [NO_UNLEARNING.name, *methods, *presets]
    check_names(only, names)
    only = only or names
    found = [NO_UNLEARNING] if NO_UNLEARNING.name in only else []
    found += [Method.read(path, values=tuned_values(path, data)) for name, path in methods.items() if name in only]
    given = {name: key for name, key in presets.items() if name in only}
    return found + [dataclasses.replace(Method.read(ours, preset=key), name=name) for name, key in given.items()]


def check_names(wanted: Sequence[str], there: Sequence[str]) -> None:
    """Raises Problem naming one that is not there."""
    if unknown := set(wanted) - set(there):
        raise Problem(f"{min(unknown)}: no method has this name; there are: {', '.join(there)}")


def as_published(evaluation: Evaluation) -> tuple[list[Method], float]:
    """Every method with its published values and learning rates to match the steps per epoch, and what those are multiplied
    by. unlearning is the published algorithm 1. What has no ranges to search sets its values itself and is left as it is."""
    factor = rate_factor(evaluation)

    def scaled(method: Method, values: dict, name: str) -> Method:
        return dataclasses.replace(method, config=with_rates(values, factor), name=name)

    ours = HERE / "unlearning.py"
    second = Method.read(ours, preset="algorithm_2")
    methods = map(Method.read, [ours, *sorted((HERE / "methods").glob("*.py"))])
    each = [scaled(method, method.defaults, method.name) if method.search_space else method for method in methods]
    return [NO_UNLEARNING, *each, scaled(second, second.config, "algorithm_2")], factor


def correlation(means: pd.DataFrame) -> str:
    """Spearman's rank correlation of the scores with those of the competition, for the methods that have one."""
    both = means[means.method.isin(PUBLISHED) & ~means.method.isin(["algorithm_1", "algorithm_2"])]
    return f"{both.score.corr(both.published, method='spearman'):.2f} ({len(both)} methods)"


def ranked(table: pd.DataFrame, summaries: dict[str, list[dict]]) -> pd.DataFrame:
    """One row per method and one for the ceiling, the highest mean score first. Within a group, no method can be told from
    the first; see `forget_sets.groups`."""
    means = forget_sets.over_sets(table).sort_values("score", ascending=False, kind="stable")
    ceiling = means.method.str.startswith("(")
    methods = means.method[~ceiling].tolist()
    means.loc[~ceiling, "rank"] = range(1, len(methods) + 1)
    means.loc[~ceiling, "group"] = forget_sets.groups([summaries[name] for name in methods])
    return means.assign(published=means.method.map(PUBLISHED)).astype({"rank": "Int64", "group": "Int64"})


def per_split(table: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """Each method's score on each forget set, as text."""
    scores = table.pivot(index="method", columns="split", values="score")[table.split.unique()].loc[order]
    return scores.map("{:.4f}".format).rename_axis(columns=None).reset_index()


def as_text(means: pd.DataFrame) -> pd.DataFrame:
    """For people to read: rounded, missing values left empty, costs over the limit marked."""
    table = forget_sets.as_text(means)
    table["share of retraining cost"] = table["share of retraining cost"].str.replace("(over 20%)", "**over**", regex=False)
    table.insert(0, "group", means.group.map("{:d}".format, na_action="ignore").fillna(""))
    table.insert(0, "rank", means["rank"].map("{:d}".format, na_action="ignore").fillna(""))
    return table.assign(published=means.published.map("{:.4f}".format, na_action="ignore").fillna(""))


def agreement(table: pd.DataFrame) -> str:
    """How well the ranking on one forget set predicts the ranking by the mean of the others (Spearman)."""
    scores = table[~table.method.str.startswith("(")].pivot(index="method", columns="split", values="score")
    if scores.shape[1] < 2:
        return "there is one forget set only"
    others = {split: scores.drop(columns=split).mean(axis=1) for split in scores}
    pairs = {split: pd.concat([scores[split], other], axis=1) for split, other in others.items()}
    found = pd.Series({split: pair.corr(method="spearman").iloc[0, 1] for split, pair in pairs.items()})
    return f"{found.min():.2f} to {found.max():.2f}, {found.mean():.2f} on average"


def draw(table: pd.DataFrame, means: pd.DataFrame, path: Path, title: str) -> None:
    """A bar for each method's mean score with its 95% interval, a dot for each forget set, a line for the ceiling."""
    ceiling = means.score[means.method.str.startswith("(")].item()
    methods = means[means["rank"].notna()][::-1]
    figure = Figure(figsize=(7, 0.27 * len(methods) + 1), layout="constrained")
    axes = figure.subplots()
    colours = [UNLEARNED if name in KITS_OWN else "#9db4c0" for name in methods.method]
    axes.barh(methods.method, methods.score, color=colours)
    errors = [methods.score - methods.low, methods.high - methods.score]
    axes.errorbar(methods.score, methods.method, xerr=errors, fmt="none", color="black", linewidth=1, label="95% interval")
    points = table[table.method.isin(methods.method)]
    axes.plot(points.score, points.method, ".", color="#444444", markersize=4, alpha=0.6, label="one forget set")
    axes.axvline(ceiling, color=RETRAINED, linestyle="--", linewidth=1, label="ceiling (estimated)")
    over = methods[methods.fraction_of_retraining > COST_LIMIT]
    for row in over.itertuples():
        at = points.score[points.method == row.method].max()
        at = row.high if row.high > at else at  # without an interval NaN is not above
        axes.annotate("over 20% of the cost", (at, row.method), (6, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set(title=title, xlabel="score, mean over the forget sets", xlim=(0, None))
    axes.margins(y=0.01)
    axes.legend(loc="center", bbox_to_anchor=(0.7, 0.35))
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def markdown(table: pd.DataFrame, left: int = 1) -> str:
    """left: the number of the column with names, which is aligned to the left."""
    rule = ["---:"] * table.shape[1]
    rule[left] = "---"
    lines = [table.columns, rule, *table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(str(cell).strip() for cell in line)} |" for line in lines)


def budget(data: str, only: Sequence[str] = ()) -> str:
    """The search budget of every method, or of those named, in words. Raises Problem when it was not the same for all."""
    found = read_json(tuned_file(data))
    given = {kept["trials"] for name, kept in found.items() if not only or name in only} or {"none was tuned"}
    if len(given) > 1:
        raise Problem(f"{tuned_file(data)}: the methods had different budgets: {'; '.join(sorted(given))}; make tune")
    return given.pop()


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "split", split="private*")
    parser.add_argument("methods", nargs="*", metavar="NAME", help="only these methods, such as fanchuan (default: all)")
    parser.add_argument("--published", action="store_true", help="published values, rates adapted to the number of steps")
    parser.add_argument("--page", type=Path, help="the page to write (default: <results>/<data>/RESULTS.md or PUBLISHED.md)")
    args = parser.parse_args(arguments)
    return command.run(lambda: write(args))


def write(args) -> None:
    tables, summaries, diverged, minutes = [], {}, {}, 0.0
    for evaluation in command.evaluations(args, attacks=True):
        data = evaluation.data.name
        if args.published:
            methods, factor = as_published(evaluation)
            check_names(args.methods, [method.name for method in methods])
            methods = [method for method in methods if not args.methods or method.name in args.methods]
            values = AS_PUBLISHED.format(factor=factor)
        else:
            values = TUNED.format(budget=budget(data, args.methods), data=data)  # before any work
            methods = contestants(data, args.methods)
        methods = [method for method in methods if method.name not in diverged]
        for method in methods:
            try:
                summaries.setdefault(method.name, []).append(evaluation.score(method))
            except Diverged as problem:
                print(f"left out: {problem}", file=sys.stderr, flush=True)
                diverged[method.name] = evaluation.split
        scored = [summaries[method.name][-1] for method in methods if method.name not in diverged]
        if not scored:
            raise Problem(f"there is nothing to rank: every method diverges ({', '.join(diverged)})")
        tables.append(forget_sets.per_set(scored, evaluation.ceiling()))
        pools = [evaluation.retrained(), *(evaluation.unlearned(one) for one in methods if one.name not in diverged)]
        minutes += sum(pool.load(range(args.runs))["seconds"].sum().item() for pool in pools) / 60
    table = pd.concat(tables)
    table = table[~table.method.isin(diverged)]
    means = ranked(table, summaries)
    by_judge = (
        means[means["rank"].notna()]
        .set_index("method")
        .rename(columns={"forgetting_quality": "F"})[["score", "F", *ATTACKS]]
    )
    judges = rank_correlations(by_judge)
    folder, kind = evaluation.setting.results / data, "published" if args.published else "leaderboard"
    write_csv(folder / f"{kind}.csv", forget_sets.noted(means, evaluation.data.note))
    called = evaluation.data.title
    sets = forget_sets.title(called, table)
    page = args.page or folder / ("PUBLISHED.md" if args.published else "RESULTS.md")
    picture = page.parent / ("docs" if args.page else "") / f"{kind}.png"
    if args.page and page.parent.name == "docs":  # where there are others
        picture = page.with_suffix(".png")
    count = table.split.nunique()
    title = f"{called}, {count} private forget {'set' if count == 1 else 'sets'}, {args.runs} runs"
    draw(table, means, picture, fill(title, 65))
    shown = as_text(means)
    left_out = "".join(f"\n\n{name} is left out: it diverges on {split}." for name, split in diverged.items())
    text = RESULTS.format(
        data=data,
        which="Some" if args.methods else "All",
        title=title,
        sets=sets.removeprefix(f"{called}: ").removesuffix(f", {args.runs} runs"),
        runs=args.runs,
        errors=OVER_SETS if count > 1 else ONE_SET,
        over="forget sets" if count > 1 else "runs",
        table=markdown(shown, 2) + left_out,
        per_split=markdown(per_split(table, means.method.tolist()), 0),
        kit=Path(os.path.relpath(HERE, page.parent)).as_posix(),
        picture=picture.relative_to(page.parent),
        agreement=agreement(table),
        correlation=correlation(means),
        judges=markdown(judges.map("{:.2f}".format).reset_index(names=""), 0),
        winners="\n".join(f"- {line}" for line in winners(by_judge).split("; ")),
        values=values,
        command=shlex.join(
            ["python", "-m", "benchmarks.leaderboard", *args.methods, "--data", args.data, "--split", args.split]
            + ["--published"] * args.published
            + (["--model", args.model] if args.model else [])
            + ["--runs", str(args.runs)]
        ),
        minutes=minutes,
        machine=", ".join([processor(), versions()["processor"], f"torch {versions()['torch']}"]),
    )
    write_bytes(page, text.encode())
    print(f"\n{sets}\n{shown.to_string(index=False)}{left_out}\n\nrank correlations between judges")
    compared = [each for name, each in summaries.items() if name not in diverged]
    print(judges.round(2).to_string(), "", *forget_sets.verdicts(compared), sep="\n")
    print(f"the best method {winners(by_judge)}")
    print(f"\na ranking on one forget set against the mean of the others: {agreement(table)}")
    print(f"the ranking against the published scores: {correlation(means)}")
    print(f"\n{minutes:.0f} minutes of processor time in the kept runs; wrote {page} and {picture}")


TUNED = """Every method was tuned on public forget sets with the same budget of scored settings (`make tune`):
{budget}. The first setting tried is the published one, moved into the
search ranges; settings that cost more than 20% of a retraining are rejected. A method without ranges to search, such as
shrink_perturb, is used as it is. `algorithm_1` and `algorithm_2` are unlearning.py with its published values, which were
chosen for a network that trains longer; costs over the limit are marked. `unlearning_preset` has the values that
unlearning.py brings for this data set. The values found are in methods/tuned/{data}.json."""

AS_PUBLISHED = """Every method has the values that it was published with. Only learning rates are changed, by one rule for
all: they are multiplied by {factor:.1f}, because an epoch has so many times fewer steps here than in the competition (550).
Nothing was tuned. A method without ranges to search, such as shrink_perturb, sets its values itself and is used as it is.
`unlearning` is the published algorithm 1. Costs over 20% of a retraining are marked."""

OVER_SETS = """The score is the mean over them ± its standard error; the 95% interval says how far another choice of forget
sets could move it."""
ONE_SET = "The 95% interval says how far other runs could move the score; another forget set can move it further."

RESULTS = """<!-- Generated by benchmarks/leaderboard.py; edits are lost. -->
# Results: {title}

{which} methods of the kit under the competition's metric: {runs} unlearned against {runs} retrained networks on each of
{sets}. {errors}
**Never compare these scores with those of another number of runs.**

A *group* begins with the first method that the first one of the group above beats, by a paired comparison over the {over}:
within a group no method can be told from its first one. Of many equal methods some fall into another group by chance
([docs/trust.md]({kit}/docs/trust.md) says how often). What the scores mean: [docs/metric.md]({kit}/docs/metric.md).

{table}

![Scores of all methods]({picture})

{values} The ceiling is what a perfect unlearner would get, estimated from the retrained networks.

*Published* is the score in the competition, on other data and with another network: only the order can be compared.
Spearman's rank correlation of the scores here with the published ones is {correlation}. The column mixes two leaderboards:
the scores of unlearning, algorithm_1, algorithm_2, finetune and negrad are public ones, as reported by Ahn et al., the
authors of the method in unlearning.py; those of the winning teams are private ones.

## Each forget set

{per_split}

Spearman's rank correlation of the ranking on one forget set with the ranking by the mean of the others: {agreement}.

## Other judges

Spearman's rank correlation between the rankings of the methods by different judges (means over the forget sets; 1: the same
order). The attacks are explained in [`evaluator/attacks.py`]({kit}/evaluator/attacks.py); none of them enters the score.

{judges}

The best method

{winners}

## How this page was made

    {command}

The runs took {minutes:.0f} minutes of processor time in all, where they were made. They were scored here:
{machine}. An interrupted command resumes where it stopped.
"""


if __name__ == "__main__":
    sys.exit(main())
