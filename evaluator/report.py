"""From pools to a score, and what a person sees of it: summary.json, CSV, figures, the table, one HTML page."""

import base64
import html
import platform
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from evaluator.data import Data
from evaluator.files import Problem, write_atomically
from evaluator.metric import BIN_WIDTH, competition_score, epsilons, forgetting_quality, logit_scaled_confidence
from evaluator.progress import progress

COST_LIMIT = 0.2  # of a retraining, what the competition allows one run
CEILING_DRAWS = 4
FIGURES = ("forget_confidences.png", "retain_confidences.png", "epsilons.png")
UNLEARNED, RETRAINED = "#d1495b", "#30638e"
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})


def score(unlearned: dict[str, Tensor], retrained: dict[str, Tensor], data: Data) -> tuple[dict, pd.DataFrame]:
    """The score and its parts, and a table of the forget examples; of pools as `Pool.load` gives them.

    Raises Problem naming the image when no threshold of an example survives.
    """
    targets = data.forget.age_group.cpu()
    ours, theirs = (logit_scaled_confidence(pool["forget_logits"], targets) for pool in (unlearned, retrained))
    runs, examples = ours.shape
    with progress("epsilon", examples, "example") as bar:
        try:
            epsilon = epsilons(ours, theirs, bar.update)
        except ValueError as error:
            raise Problem(f"{data.folder} forget set ({data.split}, rows sorted by image path): {error}") from error
    quality = forgetting_quality(epsilon, runs)
    accuracies = {
        f"{name}_{kind}": pool[name].mean().item()
        for name in ("ra", "ta")
        for kind, pool in (("unlearned", unlearned), ("retrained", retrained))
    }
    summary = {"runs": runs, "forget_examples": examples, "forgetting_quality": quality, **accuracies}
    summary["score"] = competition_score(quality, **accuracies)
    table = pd.DataFrame(
        {
            "image_id": data.forget.image_ids,
            "age_group": targets.numpy(),
            "epsilon": epsilon.numpy(),
            **{
                f"{kind}_{name}": value.numpy()
                for kind, side in (("unlearned", ours), ("retrained", theirs))
                for name, value in (("median", side.quantile(0.5, dim=0)), ("std", side.std(dim=0)))
            },
        }
    )
    return summary, table


def estimated_ceiling(retrained: dict[str, Tensor], data: Data, seed: int = 0) -> float:
    """F of a perfect unlearner with as many runs, estimated: two pools drawn from a smooth law, and the unchanged metric.

    The law is a kernel density estimate of each example's retrained confidences (Gaussian, Silverman's bandwidth). Plain
    resampling would repeat values, which the metric takes for a difference. Mean over a few draws.
    """
    confidences = logit_scaled_confidence(retrained["forget_logits"], data.forget.age_group.cpu())
    runs, examples = confidences.shape
    quartiles = confidences.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64), dim=0)
    spread = torch.minimum(confidences.std(dim=0), (quartiles[1] - quartiles[0]) / 1.34)
    bandwidth = 0.9 * spread * runs**-0.2
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        kernels = torch.randint(runs, (runs, examples), generator=generator)
        return confidences.gather(0, kernels) + bandwidth * torch.randn(
            runs, examples, generator=generator, dtype=torch.float64
        )

    with progress("ceiling", CEILING_DRAWS * examples, "example") as bar:
        return float(np.mean([forgetting_quality(epsilons(draw(), draw(), bar.update), runs) for _ in range(CEILING_DRAWS)]))


def versions() -> dict[str, str]:
    processor = torch.backends.cpu.get_cpu_capability()
    return {"python": platform.python_version(), "torch": torch.__version__, "processor": processor}


def write_csv(path: Path, table: pd.DataFrame) -> None:
    write_atomically(path, lambda file: file.write(table.to_csv(index=False).encode()))


def draw_figures(
    folder: Path, name: str, unlearned: dict[str, Tensor], retrained: dict[str, Tensor], data: Data, table: pd.DataFrame
) -> None:
    """The histograms of true-class confidences on the forget and on the retain set, and that of epsilon."""
    targets = data.forget.age_group.cpu()
    sides = {
        "forget": [logit_scaled_confidence(pool["forget_logits"], targets) for pool in (unlearned, retrained)],
        "retain": [pool["retain_confidences"] for pool in (unlearned, retrained)],
    }
    for examples, (ours, theirs) in sides.items():
        figure = confidence_histograms({"retrained": theirs, name: ours}, f"{examples} set, {len(ours)} networks")
        _save(figure, folder / f"{examples}_confidences.png")
    _save(epsilon_histogram(table.epsilon.to_numpy(), unlearned["ra"].numel()), folder / "epsilons.png")


def confidence_histograms(confidences: dict[str, Tensor], title: str) -> Figure:
    """Normalised histograms of logit-scaled confidences over all networks and examples, one outline each."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    values = {name: side.flatten().double().numpy() for name, side in confidences.items()}
    together = np.concatenate(list(values.values()))
    # The tails reach to ±100; the middle 99.8% shows what there is to see, and what lies outside is counted at the edges.
    edges = np.linspace(*np.quantile(together, [0.001, 0.999]), 81)
    for (name, side), colour in zip(values.items(), (RETRAINED, UNLEARNED, "#edae49", "#5b8e7d"), strict=False):
        axes.hist(np.clip(side, edges[0], edges[-1]), edges, density=True, histtype="stepfilled", color=colour, alpha=0.25)
        axes.hist(
            np.clip(side, edges[0], edges[-1]), edges, density=True, histtype="step", color=colour, linewidth=1.4, label=name
        )
    axes.set(title=title, xlabel="confidence of the true class, ln(p / (1 − p))", ylabel="density")
    axes.legend(loc="upper left")
    return figure


def epsilon_histogram(epsilon: np.ndarray, runs: int) -> Figure:
    """How many forget examples fall into each bin of epsilon, and what H the bin earns."""
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
    """One row a method and one for the ceiling, as text."""

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
            "cost of a retraining": "" if cost is None else f"{cost:.0%}" + (" (over 20%)" if cost > COST_LIMIT else ""),
        }

    table = pd.DataFrame([row(summary) for summary in [*summaries, ceiling]])
    return table.assign(method=table.method.str.ljust(table.method.str.len().max()))


def write_page(folder: Path, title: str, table: pd.DataFrame, methods: list[str]) -> Path:
    """One HTML page, complete in itself: the table, and every method's figures."""
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse}td,th{padding:.3em .9em;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}img{width:32%}"
    )
    parts = [f"<h1>{html.escape(title)}</h1>", table.to_html(index=False, border=0)]
    for method in methods:
        parts.append(f"<h2>{html.escape(method)}</h2>")
        for name in FIGURES:
            encoded = base64.b64encode((folder / method / name).read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(method)}: {name[:-4]}" src="data:image/png;base64,{encoded}">')
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    page = "\n".join([head, *parts])
    write_atomically(folder / "report.html", lambda file: file.write(page.encode()))
    return folder / "report.html"
