"""What a score means: forgetting quality of simulated unlearners. Prints the table of docs/metric.md and draws its picture,
docs/metric.png.

    python -m benchmarks.metric_pictures

For every forget example the retrained networks' confidences are drawn from a normal distribution, and the unlearned
networks' from one that is shifted or has another standard deviation. Half a minute on one core.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluator.evaluation import HERE
from evaluator.metric import best_attacks, earned, epsilons
from evaluator.progress import progress

MEAN, SD = 4.0, 2.0  # of the retrained networks' confidences; the size of SD hardly matters
SHIFTS = (0.0, 0.25, 0.5, 1.0, 2.0)  # of the unlearned networks' mean, in SD
LAWS = {"same distribution": (0.0, 1.0)}
LAWS |= {f"mean shifted by {shift:g} sd": (shift, 1.0) for shift in SHIFTS[1:]}
LAWS |= {f"sd × {ratio:g}": (0.0, ratio) for ratio in (0.8, 0.6)}
RUNS = (64, 512)
UNLEARNED, RETRAINED = "#d95f02", "#1b7f8c"

matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})


def pools(runs: int, examples: int, shift: float, ratio: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences of unlearned and retrained networks, [runs, examples] each."""
    source = torch.Generator().manual_seed(seed)
    unlearned, retrained = torch.randn(2, runs, examples, generator=source, dtype=torch.float64)
    return MEAN + SD * (shift + ratio * unlearned), MEAN + SD * retrained


def simulate(runs: int, shift: float, ratio: float, examples: int, seed: int, advance) -> tuple[float, float]:
    """F and its standard error over the examples."""
    found = epsilons(*pools(runs, examples, shift, ratio, seed), advance)
    earnings = earned(found, runs).numpy()
    return float(earnings.mean()), float(earnings.std() / examples**0.5)


def draw_example(axes: Axes, shift: float, runs: int, seed: int) -> None:
    """Histograms of one forget example's confidences, and the attack that tells the two pools apart best."""
    sides = pools(runs, 1, shift, 1.0, seed)
    unlearned, retrained = (side[:, 0].numpy() for side in sides)
    attack = best_attacks(*sides)
    left, right, epsilon = attack.left.item(), attack.right.item(), attack.epsilon.item()
    edges = np.linspace(MEAN - 4.5 * SD, MEAN + 5.5 * SD, 56)
    for side, colour in ((retrained, RETRAINED), (unlearned, UNLEARNED)):
        axes.hist(side, edges, histtype="stepfilled", color=colour, alpha=0.2)
        axes.hist(side, edges, histtype="step", color=colour, linewidth=1.3)
    # An attack gives one answer inside its interval and the other outside; grey is the region that gives the method away.
    hits = np.array([attack.unlearned_inside.item(), attack.retrained_inside.item()])
    outside = abs(np.log((runs - hits[0]) / (runs - hits[1]))) > abs(np.log(hits[0] / hits[1]))
    telling = runs - hits if outside else hits
    ends = np.clip([left, right], edges[0], edges[-1])
    for start, stop in ((edges[0], ends[0]), (ends[1], edges[-1])) if outside else (ends,):
        axes.axvspan(start, stop, color="#666666", alpha=0.18, linewidth=0)
    for end in (left, right):
        if edges[0] < end < edges[-1]:
            axes.axvline(end, color="#555555", linewidth=1, linestyle="--")
    earns = earned(attack.epsilon, runs).item()
    law = "Same distribution" if shift == 0 else f"Shifted by {shift:g} sd"
    share = f"1/{round(1 / earns)}" if earns else "0"
    ratio = f"{telling.max() / telling.min():.3g}"
    axes.set_title(f"{law}: ε = {epsilon:.2f}, earns {share}", fontsize=10.5, loc="left", weight="bold", pad=19)
    axes.text(
        0,
        1.03,
        f"grey: {telling[0]} unlearned, {telling[1]} retrained networks; ln {ratio} = {epsilon:.2f}",
        transform=axes.transAxes,
        va="bottom",
        color="#444444",
    )
    axes.set(xlabel="confidence in the true class", ylabel="networks", xlim=(edges[0], edges[-1]), ylim=(0, 56))
    axes.set_xticks(range(-5, 16, 5))


def draw_quality(axes: Axes, simulated: dict[tuple[int, str], tuple[float, float]]) -> None:
    names = list(LAWS)[: len(SHIFTS)]
    for runs, colour in zip(RUNS, ("#7a7a7a", "#111111"), strict=True):
        quality = [simulated[runs, name][0] for name in names]
        axes.plot(SHIFTS, quality, color=colour, marker="o", markersize=4, linewidth=1.4)
        axes.annotate(f"N = {runs}", (2, quality[-1]), (6, 0), textcoords="offset points", va="center", color=colour)
    axes.set_yscale("log")
    axes.set_yticks([0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002], ["0.2", "0.1", "0.05", "0.02", "0.01", "0.005", "0.002"])
    axes.minorticks_off()
    axes.set_ylim(top=0.3)
    axes.set_title("F, the mean of what many examples earn", fontsize=10.5, loc="left", weight="bold", pad=19)
    axes.text(0, 1.03, "a perfect unlearner is at shift 0", transform=axes.transAxes, va="bottom", color="#444444")
    axes.set(xlabel="shift between unlearned and retrained, in sd", ylabel="forgetting quality F", xlim=(-0.1, 2.45))
    axes.set_xticks(SHIFTS)
    axes.set_xticklabels([f"{shift:g}" for shift in SHIFTS])


def draw(simulated: dict, seed: int, path: Path) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    grid = figure.subplots(2, 2)
    for axes, shift in zip(grid.flat, (0.0, 0.5, 2.0), strict=False):
        draw_example(axes, shift, 512, seed)
    for words, colour, height in (("unlearned", UNLEARNED, 0.97), ("retrained", RETRAINED, 0.88)):
        grid[0, 0].text(0.19, height, words, transform=grid[0, 0].transAxes, color=colour, va="top", weight="bold")
    draw_quality(grid[1, 1], simulated)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def arguments(documentation: str, picture: str) -> argparse.Namespace:
    """Of a command that simulates forget examples and draws a picture of docs/; it works on one thread."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=300, help="forget examples per distribution (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=HERE / "docs" / picture, help="where to draw it")
    torch.set_num_threads(1)
    return parser.parse_args()


def main() -> None:
    args = arguments(__doc__, "metric.png")
    simulated = {}
    with progress("simulated examples", len(RUNS) * len(LAWS) * args.examples, "example") as bar:
        for runs in RUNS:
            for name, law in LAWS.items():
                simulated[runs, name] = simulate(runs, *law, args.examples, args.seed, bar.update)
    print(f"F over {args.examples} examples, seed {args.seed}; ± one standard error")
    print("| unlearned against retrained | " + " | ".join(f"N = {runs}" for runs in RUNS) + " |")
    print("|---|" + "---|" * len(RUNS))
    for name in LAWS:
        values = [f"{simulated[runs, name][0]:.4f} ± {simulated[runs, name][1]:.4f}" for runs in RUNS]
        print(f"| {name} | " + " | ".join(values) + " |")
    draw(simulated, args.seed, args.picture)
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    main()
