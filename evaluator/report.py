"""Draws and writes what scoring found: the table, figures, and one HTML page about everything that is kept."""

import ast
import base64
import hashlib
import io
import math
import re
import shlex
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from evaluator import scoring
from evaluator.data import Data
from evaluator.evaluation import HERE, Evaluation, checksum
from evaluator.files import Problem, read_json, write_bytes
from evaluator.method import NO_UNLEARNING, RESERVED
from evaluator.metric import BIN_WIDTH, earned, forgetting_quality
from evaluator.models import network_digest
from evaluator.pool import FORMAT, Pool
from evaluator.runs import FIRST_SEED, retrained_pool
from evaluator.scoring import COMPETITION_RUNS, COST_LIMIT, confidences
from evaluator.training import original_path

UNLEARNED, RETRAINED, GREY = "#d1495b", "#30638e", "#999999"
LOW, MIDDLE, HIGH = "#3a8ed0", "#9d72c4", "#e2566c"  # of epsilon: seen well on white and on black
INK = "#010203"  # stands for the page's colour of text
# In the page the colours follow the reader's light or dark setting: they are CSS variables of report.html.jinja.
PAGE_COLOURS = {INK: "currentColor", UNLEARNED: "var(--unlearned)", RETRAINED: "var(--retrained)", GREY: "var(--grey)"}
PAGE_STYLE = {
    "figure.figsize": (3.6, 2.6),  # inches: shown at about this size, so that text stays legible on a phone
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same figure is the same text
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
GALLERY = 8  # examples of each end
THUMBNAIL = 64  # pixels; larger images are made smaller, so that the page stays small
LARGEST_SHIFT, LARGEST_RATIO = 6.0, 8.0  # of the scatter plot; what lies beyond is drawn at its edge
matplotlib.rcParams.update(
    {
        "font.size": 9,
        "figure.figsize": (5, 3.2),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "text.parse_math": False,  # a method's name may hold a $
    }
)


class Chart(NamedTuple):
    """A figure, what it is called, what to see in it, and what it says to somebody who cannot see it."""

    heading: str
    caption: str
    alt: str
    figure: Figure


# Tables


def score_table(summaries: list[dict], ceiling: dict) -> pd.DataFrame:
    """One row per method and one for the ceiling, as text. Intervals, projections to 512 runs, and attacks that every
    summary has become further columns.

    Raises Problem when two methods have different numbers of runs: their scores cannot be compared.
    """
    for summary in summaries:
        if summary["runs"] != summaries[0]["runs"]:
            first, other = (f"{row['method']} has {row['runs']} runs" for row in (summaries[0], summary))
            raise Problem(f"{first}, {other}: these scores cannot be compared; score both with the same --runs")
    rows = [*summaries, ceiling]
    attacks = summaries[0].get("attacks", {}) if all("attacks" in summary for summary in summaries) and summaries else {}

    def row(summary: dict) -> dict:
        cost = summary.get("fraction_of_retraining")
        of_ceiling = summary["score"] / ceiling["score"] if ceiling["score"] else float("nan")
        projected = summary.get("projected_512")
        return {
            "method": summary["method"],
            "score": f"{summary['score']:.4f}",
            "95% interval": _range_text(summary.get("score_interval")),
            "at 512 runs": f"{projected['score']:.3f} ({_range_text([projected['low'], projected['high']], 3)})"
            if projected
            else "",
            "of ceiling": f"{of_ceiling:.0%}",
            "F": f"{summary['forgetting_quality']:.4f}",
            "RA_U/RA_R": f"{summary['ra_unlearned'] / summary['ra_retrained']:.4f}",
            "TA_U/TA_R": f"{summary['ta_unlearned'] / summary['ta_retrained']:.4f}",
            "s/run": "" if cost is None else f"{summary['seconds_per_run']:.2f}",
            "share of retraining cost": "" if cost is None else cost_text(cost),
            **{name: f"{summary['attacks'][name]:.3f}" if "attacks" in summary else "" for name in attacks},
        }

    table = pd.DataFrame([row(summary) for summary in rows])
    unused = [name for name in ("95% interval", "at 512 runs") if not table[name].any()]
    return table.drop(columns=unused).assign(method=table.method.str.ljust(table.method.str.len().max()))


def cost_text(share: float) -> str:
    """A run's share of the cost of a retraining, marked where the competition does not allow it."""
    return f"{share:.1%} (over {COST_LIMIT:.0%})" if share > COST_LIMIT else f"{share:.0%}"


def kept(evaluation: Evaluation) -> tuple[list[dict], dict[str, str]]:
    """What is kept for this data, split and N: the methods' summaries, best first; and for every other method's folder the
    reason why it has none that may be shown, and what to do. Nothing is run."""
    summaries, left_out = [], {}
    retrained = retrained_pool(evaluation.setting, evaluation.data, evaluation.recipe, runs=0)
    given = original_path(evaluation.data, evaluation.recipe).exists()
    original = network_digest(evaluation.original()) if given else None
    for folder in sorted(evaluation.results.iterdir()):
        a_method = folder.name == NO_UNLEARNING.name or folder.name not in RESERVED
        if a_method and ((folder / "summary.json").exists() or any(folder.glob("*/"))):
            try:
                summaries.append(_kept_summary(evaluation, folder, retrained, original))
            except Problem as problem:
                left_out[folder.name] = str(problem)
    return sorted(summaries, key=lambda summary: -summary["score"]), left_out


def _kept_summary(evaluation: Evaluation, folder: Path, retrained: Pool, original: str | None) -> dict:
    """Raises Problem when it is not one of exactly this evaluation."""
    runs, again = evaluation.runs, "score it again with evaluate.py"
    if not (folder / "summary.json").exists():
        made = max(len(list(pool.glob("run_*.npz"))) for pool in folder.glob("*/"))
        raise Problem(f"{min(made, runs)} of {runs} runs are made, there is no score yet: {again}; it goes on from there")
    summary = read_json(folder / "summary.json")
    if not summary:
        raise Problem(f"summary.json is damaged: {again}")
    if summary.get("checked") != checksum(summary, folder / "examples.csv"):
        raise Problem(f"summary.json or examples.csv is damaged or was edited: {again}")
    made_of = summary["made_of"]
    if summary["method"] != folder.name:
        raise Problem(f"the folder was renamed or copied, its summary is that of {summary['method']}: {again}")
    if made_of["runs"] != runs:
        raise Problem(f"its score is of {made_of['runs']} runs, this page is of {runs}: {again} --runs {runs}")
    if made_of["scoring"] != scoring.VERSION:
        raise Problem(f"scored by another version of the kit (its runs are kept): {again}")
    if made_of["retrained"] != retrained.folder.name:
        raise Problem(f"scored against retrained networks of other data or another recipe: {again}")
    pool = _pool(folder / made_of["unlearned"])
    for kind, missing in (("its", pool.missing(range(runs))), ("the retrained networks'", retrained.missing(range(runs)))):
        if missing:
            raise Problem(f"{len(missing)} of {kind} {runs} runs are missing, run {missing[0]} is the first: {again}")
    if read_json(pool.made_from)["original"] != original:
        raise Problem(f"its runs began with another original_model.pth: {again}")
    return summary


def _pool(folder: Path) -> Pool:
    """The pool in a folder of runs. Raises Problem when it is not one that this version of the kit can read."""
    if not folder.is_dir():
        raise Problem(f"its runs, folder {folder.name}, are missing: score it again with evaluate.py")
    made_from = read_json(folder / "made_from.json")
    text = (folder / "made_from.json").read_bytes() if made_from else b""
    if made_from.get("format") != FORMAT or hashlib.sha256(text).hexdigest()[:12] != folder.name:
        raise Problem(
            f"{folder.name}/made_from.json is missing, damaged or of another version: score it again with evaluate.py"
        )
    return Pool(folder.parent, made_from)


def _ceiling(evaluation: Evaluation) -> dict:
    """The row of a perfect unlearner, measured only if that was asked for and needs no training."""
    if evaluation.second_pool:
        again = retrained_pool(evaluation.setting, evaluation.data, evaluation.recipe, 0, "retrained_again")
        evaluation = replace(evaluation, second_pool=not again.missing(range(evaluation.runs)))
    return evaluation.ceiling()


# Figures


def charts(
    summary: dict, table: pd.DataFrame, unlearned: dict[str, Tensor], retrained: dict[str, Tensor], data: Data, ceiling: dict
) -> list[Chart]:
    """The figures about one method. table: its examples.csv; unlearned, retrained: pools as `Pool.load` returns them.

    Raises Problem when a pool is of other data.
    """
    runs, drawn = summary["runs"], []
    sides = {
        "forget": [confidences(pool, data) for pool in (retrained, unlearned)],
        "retain": [pool["retain_confidences"] for pool in (retrained, unlearned)],
    }
    for examples, (theirs, ours) in sides.items():
        medians = [side.double().quantile(0.5, dim=0).median().item() for side in (theirs, ours)]
        drawn.append(
            Chart(
                f"Confidences on the {examples} set",
                f"Of all {runs} networks of each kind on {ours.shape[1]} examples. Where the two shapes part, networks can "
                "be told apart; where they agree, single examples still may differ.",
                f"Histograms of confidences; the median of the examples' medians is {medians[0]:.2f} for the retrained "
                f"networks and {medians[1]:.2f} for the unlearned ones.",
                confidence_histograms({"retrained": theirs, "unlearned": ours}),
            )
        )
    epsilon = table.epsilon.to_numpy()
    drawn.append(
        Chart(
            "Epsilon of the forget examples",
            "How well the best attack tells the two kinds apart, per example. The scale above says what an example earns: "
            "half as much with every bin, nothing in the grey one.",
            f"Histogram of {len(epsilon)} epsilons, from {epsilon.min():.2f} to {epsilon.max():.2f}; "
            f"the median is {np.median(epsilon):.2f}.",
            epsilon_histogram(epsilon, runs),
        )
    )
    if {"shift", "spread_ratio"} <= set(table):
        drawn.append(
            Chart(
                "Shift and spread",
                "One point per forget example. Right of 0: more confident than retrained networks; below 1: the runs are "
                "more alike than retrained networks are. A perfect unlearner's points crowd around 0 and 1. Points beyond "
                f"±{LARGEST_SHIFT:g}, or a ratio of {LARGEST_RATIO:g}, are drawn at the edge.",
                f"Scatter plot; the median shift is {table['shift'].median():.2f} and the median spread ratio "
                f"{table.spread_ratio.median():.2f}.",
                shift_scatter(table, runs),
            )
        )
    if "what_if" in summary:
        scores = {
            "as it is": summary["score"],
            "medians right": summary["what_if"]["medians"],
            "spreads right": summary["what_if"]["spreads"],
            "both right": summary["what_if"]["both"],
            "ceiling": ceiling["score"],
        }
        drawn.append(
            Chart(
                "What is missing to the ceiling",
                "The score that these networks would get if every forget example's median, spread or both were those of the "
                "retrained networks.",
                "; ".join(f"{name}: {score:.4f}" for name, score in scores.items()) + ".",
                what_if_bars(scores),
            )
        )
    return drawn


def confidence_histograms(confidences: dict[str, Tensor], title: str = "") -> Figure:
    """Normalised histograms of logit-scaled confidences over all networks and examples, one outline each."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    values = {name: side.flatten().double().numpy() for name, side in confidences.items()}
    together = np.concatenate(list(values.values()))
    # The tails reach to ±100; the plot shows the middle 99.8%, and the rest is counted in the outermost bins.
    low, high = np.quantile(together, [0.001, 0.999])
    edges = np.linspace(low, high, 81) if low < high else np.linspace(low - 1, low + 1, 81)
    for (name, side), colour in zip(values.items(), (RETRAINED, UNLEARNED, "#edae49", "#5b8e7d"), strict=False):
        density, _ = np.histogram(np.clip(side, edges[0], edges[-1]), edges, density=True)
        axes.stairs(density, edges, color=colour, fill=True, alpha=0.25)
        axes.stairs(density, edges, color=colour, linewidth=1.4, label=name)
    axes.set(title=title, xlabel="confidence in the true class, ln(p / (1 − p))", ylabel="density")
    axes.legend(loc="upper left")
    return figure


def epsilon_histogram(epsilon: np.ndarray, runs: int) -> Figure:
    """How many forget examples fall into each bin of epsilon; a second scale, above, shows what a bin earns."""
    bins = round(np.ceil(np.log(runs - 1)) / BIN_WIDTH)
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    number = np.minimum(np.floor(epsilon / BIN_WIDTH), bins).astype(int)
    counts = np.bincount(number, minlength=bins + 1)
    middles = (np.arange(bins + 1) + 0.5) * BIN_WIDTH
    axes.bar(middles, counts, width=0.9 * BIN_WIDTH, color=[MIDDLE] * bins + [GREY])
    step = 2 if bins <= 10 else 4  # of bins: labels that fit
    ticks = np.arange(0, bins, step)
    axes.set_xticks([*ticks * BIN_WIDTH, middles[-1]], [*(f"{tick * BIN_WIDTH:g}" for tick in ticks), "beyond"])
    above = axes.secondary_xaxis("top")
    above.set_xticks([*middles[:-1:step], middles[-1]], [*(_earned(n) for n in ticks), "0"])
    above.set_xlabel("an example earns")
    above.spines["top"].set_visible(False)
    quality = forgetting_quality(torch.tensor(epsilon), runs)
    axes.set(
        title=f"{len(epsilon)} forget examples, F = {quality:.4f}",
        xlabel="epsilon of the best attack",
        ylabel="examples",
    )
    return figure


def _earned(bin_number: int) -> str:
    return f"1/{2**bin_number}" if bin_number else "1"


def shift_scatter(table: pd.DataFrame, runs: int) -> Figure:
    """The forget examples' shift against their spread ratio, coloured by epsilon. table: examples.csv with both columns."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    shift = table["shift"].clip(-LARGEST_SHIFT, LARGEST_SHIFT)
    ratio = table.spread_ratio.clip(1 / LARGEST_RATIO, LARGEST_RATIO)
    last = max(1, math.ceil(math.log(runs - 1)))  # where examples begin to earn nothing
    colours = LinearSegmentedColormap.from_list("epsilon", [LOW, MIDDLE, HIGH]).with_extremes(over=GREY)
    points = axes.scatter(
        shift,
        ratio,
        c=table.epsilon,
        cmap=colours,
        norm=BoundaryNorm(np.linspace(0, last, last + 1), colours.N, extend="max") if last > 1 else None,
        s=12,
        linewidths=0,
        rasterized=len(table) > 2000,
    )
    figure.colorbar(points, label="epsilon")
    axes.axhline(1, color=INK, linewidth=0.6)
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.set_yscale("log", base=2)
    reach = max(1.0, 1.05 * shift.abs().max())
    high = max(2.0, 1.05 * max(ratio.max(), 1 / ratio.min()))
    axes.set(
        xlim=(-reach, reach),
        ylim=(1 / high, high),
        xlabel="shift of the median (retrained spreads)",
        ylabel="spread, unlearned / retrained",
    )
    ticks = [2.0**power for power in range(-3, 4) if 1 / high <= 2.0**power <= high]
    axes.set_yticks(ticks, [f"{tick:g}" if tick >= 1 else f"1/{1 / tick:g}" for tick in ticks], minor=False)
    return figure


def what_if_bars(scores: dict[str, float]) -> Figure:
    """Scores as horizontal bars; the last one is the ceiling's."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(scores), list(scores.values()), color=[UNLEARNED] * (len(scores) - 1) + [RETRAINED], height=0.6)
    axes.bar_label(bars, [f"{score:.3f}" for score in scores.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="score")
    return figure


def leaderboard(summaries: list[dict], ceiling: dict) -> Figure:
    """Scores with their 95% intervals, in the given order, and the ceiling as a line."""
    figure = Figure(figsize=(3.8, 0.9 + 0.24 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    scores = [summary["score"] for summary in summaries]
    rows = np.arange(len(summaries))
    with_interval = [summary for summary in summaries if _range_text(summary.get("score_interval"))]
    for summary in with_interval:
        axes.plot(summary["score_interval"], [summaries.index(summary)] * 2, color=UNLEARNED, linewidth=1.4)
    axes.plot(scores, rows, "o", color=UNLEARNED, markersize=5, clip_on=False)
    axes.axvline(ceiling["score"], color=RETRAINED, linewidth=1.2, linestyle="--")
    axes.annotate(
        f"ceiling {ceiling['score']:.3f}",
        (ceiling["score"], 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        color=RETRAINED,
    )
    axes.set_yticks(rows, [_shortened(summary["method"]) for summary in summaries])
    largest = max([ceiling["score"], *scores, *(summary["score_interval"][1] for summary in with_interval)])
    axes.set(xlabel="score", xlim=(0, 1.04 * largest or 1), ylim=(len(summaries) - 0.4, -0.6))
    axes.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def _shortened(name: str) -> str:
    name = printable(name)
    return name if len(name) <= 22 else f"{name[:12]}…{name[-9:]}"


# The page


def write_page(evaluation: Evaluation, ceiling: dict | None = None) -> Path:
    """One self-contained HTML page, report.html, about everything that is kept for this data, split and N. What cannot be
    shown is listed with the reason. No method is run, and no network is trained.

    ceiling: what `evaluation.ceiling()` returned, if it is known already.
    """
    summaries, left_out = kept(evaluation)
    methods = []
    with matplotlib.rc_context(PAGE_STYLE):
        if summaries:  # then the retrained networks are all there
            ceiling = ceiling or _ceiling(evaluation)
            retrained = evaluation.retrained().load(range(evaluation.runs))
        for summary in summaries:
            try:
                methods.append(_method_section(evaluation, summary, retrained, ceiling, f"m{len(methods) + 1}"))
            except Problem as problem:
                left_out[summary["method"]] = str(problem)
        summaries = [method["summary"] for method in methods]
        board = summaries and _svg(
            leaderboard(summaries, ceiling),
            "board",
            "; ".join(f"{summary['method']}: {summary['score']:.4f}" for summary in summaries)
            + f"; ceiling: {ceiling['score']:.4f}.",
        )
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    page = pages.get_template("report.html.jinja").render(
        evaluation=evaluation,
        board=board,
        intervals=any(_range_text(summary.get("score_interval")) for summary in summaries),
        table=score_table(summaries, ceiling) if summaries else None,
        cautions=cautions(evaluation.data, evaluation.runs, summaries),
        left_out=left_out,
        methods=methods,
        recipe=asdict(evaluation.recipe),
        seeds=FIRST_SEED,
        scoring=scoring.VERSION,
    )
    path = evaluation.results / "report.html"
    write_bytes(path, page.encode())
    return path


def cautions(data: Data, runs: int, summaries: list[dict]) -> list[str]:
    """What a reader should know before believing the scores."""
    found = []
    if runs < COMPETITION_RUNS:
        found.append(
            f"These scores are of {runs} runs. The same method scores less with more runs, so never compare them with "
            f"scores of {COMPETITION_RUNS} runs, as the competition's."
        )
    found += [f"{line[0].upper()}{line[1:]}." for line in provisos(data, summaries)]
    for summary in summaries:
        cost = summary["fraction_of_retraining"]
        if cost is not None and cost > COST_LIMIT:
            found.append(
                f"{summary['method']}: a run costs {cost:.1%} of a retraining; the competition allows {COST_LIMIT:.0%}."
            )
    if len({str((summary["device"], summary["versions"])) for summary in summaries}) > 1:
        found.append("The methods were scored on different devices or versions; see the settings at the end.")
    return found


def provisos(data: Data, summaries: list[dict]) -> list[str]:
    """What is other than usual about the data folder."""
    found = []
    if any(summary["original"] == "given" for summary in summaries):
        found.append(f"the original network is the one given in {data.folder}; the kit did not train it")
    if data.test is None:
        found.append("TA is measured on the validation set: this folder has no test.csv")
    return found


def _method_section(evaluation: Evaluation, summary: dict, retrained: dict[str, Tensor], ceiling: dict, key: str) -> dict:
    """What the template shows of a method. key: the prefix of its ids. Raises Problem when a kept run is damaged."""
    folder = evaluation.results / summary["method"]
    table = pd.read_csv(folder / "examples.csv")
    unlearned = _pool(folder / summary["made_of"]["unlearned"]).load(range(evaluation.runs))
    drawn = charts(summary, table, unlearned, retrained, evaluation.data, ceiling)
    images = dict(zip(evaluation.data.forget.image_ids, evaluation.data.forget.images, strict=True))
    ordered = table.sort_values("epsilon", kind="stable")
    size = min(GALLERY, math.ceil(len(ordered) / 2))
    ends = {"Best forgotten": ordered.head(size), "Worst forgotten": ordered.tail(min(size, len(ordered) - size)).iloc[::-1]}
    return {
        "key": key,
        "summary": summary,
        "numbers": _numbers(summary, ceiling),
        "charts": [
            (chart, _svg(chart.figure, f"{key}-{number}", f"{summary['method']}, {chart.heading.lower()}. {chart.alt}"))
            for number, chart in enumerate(drawn)
        ],
        "gallery": {
            heading: [_example(row, images[row.image_id], evaluation.runs) for row in rows.itertuples()]
            for heading, rows in ends.items()
            if len(rows)
        },
        "command": command_line(evaluation, summary),
    }


def _numbers(summary: dict, ceiling: dict) -> dict[str, str]:
    def with_interval(value: float, interval: list | None) -> str:
        text = _range_text(interval)
        return f"{value:.4f}" + (f" (95%: {text})" if text else "")

    cost, projected = summary["fraction_of_retraining"], summary.get("projected_512")
    found = {
        "score": with_interval(summary["score"], summary.get("score_interval")),
        "forgetting quality F": with_interval(summary["forgetting_quality"], summary.get("forgetting_quality_interval")),
        f"projected to {COMPETITION_RUNS} runs": projected
        and with_interval(projected["score"], [projected["low"], projected["high"]]),
        "share of the ceiling": ceiling["score"] and f"{summary['score'] / ceiling['score']:.0%} of {ceiling['score']:.4f}",
        "RA, unlearned / retrained": f"{summary['ra_unlearned']:.4f} / {summary['ra_retrained']:.4f}",
        "TA, unlearned / retrained": f"{summary['ta_unlearned']:.4f} / {summary['ta_retrained']:.4f}",
        "a run costs": "unknown" if cost is None else f"{summary['seconds_per_run']:.2f} s, {cost:.0%} of a retraining",
        **{name: f"{mean:.3f}" for name, mean in summary.get("attacks", {}).items()},
    }
    return {name: text for name, text in found.items() if text}


def _range_text(interval: list | None, digits: int = 4) -> str:
    """ "0.0421 to 0.0505"; empty without an interval, or when one could not be found."""
    if not interval or not all(isinstance(end, int | float) and math.isfinite(end) for end in interval):
        return ""
    return " to ".join(f"{end:.{digits}f}" for end in interval)


def _example(row: NamedTuple, image: Tensor, runs: int) -> dict:
    """A forget example in the gallery. row: of examples.csv; image: [3, H, W]."""
    sides = {"unlearned": row.unlearned_inside, "retrained": row.retrained_inside}
    says, other = sorted(sides, key=sides.get, reverse=True)
    rule = {
        "range": f"all {says} confidences lie from {row.left:.2f} to {row.right:.2f}, less than 1% of the other range",
        "threshold": f"“{says}” if the confidence is at least {row.left:.2f}",
        "interval": f"“{says}” if the confidence is {row.left:.2f} to {row.right:.2f}",
    }[row.attack]
    bin_number = math.floor(row.epsilon / BIN_WIDTH)
    earns = earned(torch.tensor(row.epsilon, dtype=torch.float64), runs).item()
    lines = [
        f"label {row.age_group} · epsilon {row.epsilon:.2f} · earns {_earned(bin_number) if earns else 'nothing'}",
        f"Best attack: {rule}.",
        f"False positives {sides[other]}, false negatives {runs - sides[says]} of {runs}.",
    ]
    if hasattr(row, "shift") and hasattr(row, "spread_ratio"):
        lines.append(f"Shift {row.shift:+.2f}, spread × {row.spread_ratio:.2f}.")
    return {"image": _data_uri(image), "alt": f"forget example {row.image_id}, label {row.age_group}", "lines": lines}


def _data_uri(image: Tensor) -> str:
    picture, file = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    kind = "png" if max(picture.size) <= THUMBNAIL / 2 else "jpeg"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def command_line(evaluation: Evaluation, summary: dict) -> str:
    """The command that scores a method as its summary says: with every value of its Config, whatever is default today."""
    data = evaluation.folder
    where = data.name if data == HERE / "data" / data.name else str(data)
    words = ["python", "evaluate.py"]
    if summary["path"].endswith(".zip"):
        words += ["--checkpoints", summary["path"]]
    elif summary["method"] != NO_UNLEARNING.name:
        words.append(summary["path"])
    words += ["--data", where, "--split", evaluation.data.split]
    words += ["--model", evaluation.model] if evaluation.model else []
    words += ["--runs", str(summary["runs"]), "--device", summary["device"]]
    if evaluation.setting.results != Path("results").absolute():
        words += ["--results", str(evaluation.setting.results)]
    words += ["--attacks"] if "attacks" in summary else []
    if summary["config"]:
        words += ["--set", *(f"{name}={_literal(value)}" for name, value in summary["config"].items())]
    return shlex.join(words)


def _literal(value: object) -> str:
    """As `--set` reads it: text without quotes, unless it would be taken for something else."""
    try:
        ast.literal_eval(str(value))
        text = repr(value)
        return text if '"' in text else text.replace("'", '"')  # single quotes would be hard to read in a shell's
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return str(value)


def printable(text: str) -> str:
    """Without characters that cannot be shown, or written to a file: a method may be named by any file name."""
    return "".join(sign if sign.isprintable() else " " if sign.isspace() else "�" for sign in text)


def _svg(figure: Figure, key: str, alt: str) -> Markup:
    """The figure as inline SVG: text stays text, colours are the page's, and ids begin with `key`, to be unique there."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a reader's browser may have what matplotlib measures without
        figure.savefig(file, format="svg", transparent=True)
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    root = ElementTree.fromstring(file.getvalue())
    href = "{http://www.w3.org/1999/xlink}href"
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # its style would hold for the whole page
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", " ".join(value for part in root.iter() for value in part.attrib.values())))
    for part in root.iter():
        if href in part.attrib:
            part.set("href", part.attrib.pop(href))
        for name, value in list(part.attrib.items()):
            if name == "id" and value not in used:
                del part.attrib["id"]
            elif name == "id":
                part.set("id", f"{key}-{value}")
            elif name == "style":
                part.set("style", re.sub(r"#[0-9a-f]{6}\b", lambda colour: PAGE_COLOURS.get(colour[0], colour[0]), value))
            elif value.startswith("#"):
                part.set(name, f"#{key}-{value[1:]}")
            elif value.startswith("url(#"):
                part.set(name, f"url(#{key}-{value[5:]}")
            elif name == "d":  # a hundredth of a point is enough
                part.set("d", re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value))
    for name in ("width", "height"):
        del root.attrib[name]
    root.set("role", "img")
    root.set("aria-label", printable(alt))
    return Markup(ElementTree.tostring(root, encoding="unicode"))
