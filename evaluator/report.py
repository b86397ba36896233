"""Draws and writes what scoring found: figures, the table, one HTML page."""

import base64
import html
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from evaluator.checkpoints import Checkpoints
from evaluator.evaluation import Evaluation
from evaluator.files import write_atomically
from evaluator.method import Method
from evaluator.metric import BIN_WIDTH, forgetting_quality
from evaluator.scoring import COST_LIMIT, confidences

FIGURES = ("forget_confidences.png", "retain_confidences.png", "epsilons.png")
UNLEARNED, RETRAINED = "#d1495b", "#30638e"
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})


def draw_figures(evaluation: Evaluation, method: Method | Checkpoints) -> None:
    """Draw the figures that are missing: histograms of the true-class confidence on the forget and on the retain set, and of
    epsilon. (A new score removes the old figures.)"""
    folder = evaluation.results / method.name
    if all((folder / name).is_file() for name in FIGURES):
        return
    pools = evaluation.pools(method)
    sides = {
        "forget": [confidences(pool, evaluation.data) for pool in pools],
        "retain": [pool["retain_confidences"] for pool in pools],
    }
    for examples, (ours, theirs) in sides.items():
        figure = confidence_histograms({"retrained": theirs, method.name: ours}, f"{examples} set, {len(ours)} networks")
        _save(figure, folder / f"{examples}_confidences.png")
    epsilon = pd.read_csv(folder / "examples.csv").epsilon.to_numpy()
    _save(epsilon_histogram(epsilon, evaluation.runs), folder / "epsilons.png")


def confidence_histograms(confidences: dict[str, Tensor], title: str) -> Figure:
    """Normalised histograms of logit-scaled confidences over all networks and examples, one outline each."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    values = {name: side.flatten().double().numpy() for name, side in confidences.items()}
    together = np.concatenate(list(values.values()))
    # The tails reach to ±100; the plot shows the middle 99.8%, and the rest is counted in the outermost bins.
    edges = np.linspace(*np.quantile(together, [0.001, 0.999]), 81)
    for (name, side), colour in zip(values.items(), (RETRAINED, UNLEARNED, "#edae49", "#5b8e7d"), strict=False):
        axes.hist(np.clip(side, edges[0], edges[-1]), edges, density=True, histtype="stepfilled", color=colour, alpha=0.25)
        axes.hist(
            np.clip(side, edges[0], edges[-1]), edges, density=True, histtype="step", color=colour, linewidth=1.4, label=name
        )
    axes.set(title=title, xlabel="confidence in the true class, ln(p / (1 − p))", ylabel="density")
    axes.legend(loc="upper left")
    return figure


def epsilon_histogram(epsilon: np.ndarray, runs: int) -> Figure:
    """How many forget examples fall into each bin of epsilon, and the H that the bin earns."""
    bins = round(np.ceil(np.log(runs - 1)) / BIN_WIDTH)
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    number = np.minimum(np.floor(epsilon / BIN_WIDTH), bins).astype(int)
    counts = np.bincount(number, minlength=bins + 1)
    colours = [RETRAINED] * bins + ["#999999"]
    bars = axes.bar((np.arange(bins + 1) + 0.5) * BIN_WIDTH, counts, width=0.9 * BIN_WIDTH, color=colours)
    labels = ["1", *(f"1/{2**n}" for n in range(1, bins)), "0"]
    axes.bar_label(bars, labels, fontsize=6, padding=2, color="#555555", rotation=0 if bins <= 10 else 45)
    ticks = np.arange(0, bins * BIN_WIDTH, 1)
    axes.set_xticks([*ticks, (bins + 0.5) * BIN_WIDTH], [*(f"{tick:g}" for tick in ticks), "beyond,\nup to 50"])
    quality = forgetting_quality(torch.tensor(epsilon), runs)
    axes.set(
        title=f"{len(epsilon)} forget examples, F = {quality:.4f}",
        xlabel="epsilon of the best attack (above each bar: what its bin earns)",
        ylabel="examples",
    )
    axes.margins(y=0.15)
    return figure


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def score_table(summaries: list[dict], ceiling: dict) -> pd.DataFrame:
    """One row per method and one for the ceiling, as text; attacks that every summary has become further columns."""
    rows = [*summaries, ceiling]
    attacks = summaries[0].get("attacks", {}) if all("attacks" in summary for summary in summaries) else {}

    def row(summary: dict) -> dict:
        cost = summary.get("fraction_of_retraining")
        of_ceiling = summary["score"] / ceiling["score"] if ceiling["score"] else float("nan")
        return {
            "method": summary["method"],
            "F": f"{summary['forgetting_quality']:.4f}",
            "RA_U/RA_R": f"{summary['ra_unlearned'] / summary['ra_retrained']:.4f}",
            "TA_U/TA_R": f"{summary['ta_unlearned'] / summary['ta_retrained']:.4f}",
            "score": f"{summary['score']:.4f}",
            "of ceiling": f"{of_ceiling:.0%}",
            "s/run": "" if cost is None else f"{summary['seconds_per_run']:.2f}",
            "share of retraining cost": "" if cost is None else f"{cost:.0%}" + (" (over 20%)" if cost > COST_LIMIT else ""),
            **{name: f"{summary['attacks'][name]:.3f}" if "attacks" in summary else "" for name in attacks},
        }

    table = pd.DataFrame([row(summary) for summary in rows])
    return table.assign(method=table.method.str.ljust(table.method.str.len().max()))


def write_page(folder: Path, title: str, table: pd.DataFrame, methods: list[str]) -> Path:
    """One self-contained HTML page: the table and every method's figures."""
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse}td,th{padding:.3em .9em;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}img{width:32%;min-width:20em}main{overflow-x:auto}"
    )
    parts = ["<main>", f"<h1>{html.escape(title)}</h1>", table.to_html(index=False, border=0)]
    for method in methods:
        parts.append(f"<h2>{html.escape(method)}</h2>")
        for name in FIGURES:
            encoded = base64.b64encode((folder / method / name).read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(method)}: {name[:-4]}" src="data:image/png;base64,{encoded}">')
    viewport = '<meta name="viewport" content="width=device-width">'
    head = f'<!doctype html><meta charset="utf-8">{viewport}<title>{html.escape(title)}</title><style>{style}</style>'
    page = "\n".join([head, *parts])
    write_atomically(folder / "report.html", lambda file: file.write(page.encode()))
    return folder / "report.html"
