"""Why a score: simulated unlearners whose medians or spreads are wrong, and what evaluator/why.py makes of them. Prints the
tables of docs/why.md and draws its picture, docs/why.png.

    python -m benchmarks.why_pictures

Confidences as in benchmarks/metric_pictures.py. About two minutes on one core.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.metric_pictures import MEAN, RETRAINED, SD, UNLEARNED, arguments, pools
from evaluator.metric import earned, epsilons
from evaluator.progress import progress
from evaluator.why import in_words, matched, shifts_and_spreads

RUNS = (64, 512)
# Shift of the median in sd, ratio of the sds; and the laws with the right medians, spreads, and both: what the what-if
# figures should be. All laws use the same random numbers.
LAWS = {
    "right": ((0.0,), 1.0, ("right", "right", "right")),
    "shift 0.5": ((0.5,), 1.0, ("right", "shift 0.5", "right")),
    "shift −0.5": ((-0.5,), 1.0, ("right", "shift −0.5", "right")),
    "shift ±0.5": ((0.5, -0.5), 1.0, ("right", "shift ±0.5", "right")),
    "ratio 0.8": ((0.0,), 0.8, ("ratio 0.8", "right", "right")),
    "shift 0.5, ratio 0.8": ((0.5,), 0.8, ("ratio 0.8", "shift 0.5", "right")),
}
WHAT_IF = {"medians right": (True, False), "spreads right": (False, True), "both right": (True, True)}
PANELS = {"Right": (0.0, 1.0), "Too confident": (1.0, 1.0), "Not confident enough": (-1.0, 1.0), "Too alike": (0.0, 0.6)}


def earnings(unlearned: Tensor, retrained: Tensor, advance) -> Tensor:
    """What each example earns; their mean is F. [examples]"""
    return earned(epsilons(unlearned, retrained, advance), len(unlearned))


def exactly_matched(unlearned: Tensor, retrained: Tensor, medians: bool, spreads: bool) -> Tensor:
    """`matched` without the difference that a perfect unlearner has by chance."""
    (ours, spread), (theirs, right_spread) = (
        (side.quantile(0.5, dim=0), side.std(dim=0)) for side in (unlearned, retrained)
    )
    return (theirs if medians else ours) + (unlearned - ours) * (right_spread / spread if spreads else 1)


def simulate(runs: int, examples: int, seed: int, advance) -> None:
    """Prints one table of F, and one of what a perfect unlearner seems to gain."""
    as_it_is, what_if, words = {}, {}, {}
    for law, (shifts, ratio, _) in LAWS.items():
        shift = torch.tensor(shifts, dtype=torch.float64).repeat(examples)[:examples]
        sides = pools(runs, examples, shift, ratio, seed)
        as_it_is[law] = earnings(*sides, advance)
        what_if[law] = [earnings(matched(*sides, *right), sides[1], advance) for right in WHAT_IF.values()]
        words[law] = in_words(shifts_and_spreads(*sides), runs)
    print(f"\nN = {runs}: F over {examples} examples; in brackets what it is for a method that really is right there")
    print("| unlearned against retrained | as it is | " + " | ".join(WHAT_IF) + " | in words |")
    print("|---|" + "---|" * (len(WHAT_IF) + 2))
    for law, (_, _, truths) in LAWS.items():
        cells = [
            f"{found.mean():.3f} ({as_it_is[true].mean():.3f})" for found, true in zip(what_if[law], truths, strict=True)
        ]
        print(f"| {law} | {as_it_is[law].mean():.3f} | {' | '.join(cells)} | {words[law]} |")

    sides = pools(runs, examples, 0.0, 1.0, seed)
    exact = [earnings(exactly_matched(*sides, *right), sides[1], advance) for right in WHAT_IF.values()]
    print(f"\nN = {runs}: what a perfect unlearner seems to gain; ± one standard error")
    print("| | " + " | ".join(WHAT_IF) + " |")
    print("|---|" + "---|" * len(WHAT_IF))
    for name, found in (("matched exactly", exact), ("matched up to chance", what_if["right"])):
        gains = [values - as_it_is["right"] for values in found]
        print(f"| {name} | " + " | ".join(f"{gain.mean():+.4f} ± {gain.std() / examples**0.5:.4f}" for gain in gains) + " |")


def draw_panel(axes: Axes, title: str, law: tuple[float, float], examples: int, seed: int, advance) -> None:
    """Histograms of the first example's confidences, F of all, and the words."""
    runs = max(RUNS)
    sides = pools(runs, examples, *law, seed)
    quality = earnings(*sides, advance).mean()
    found = shifts_and_spreads(*sides)
    edges = np.linspace(MEAN - 4.5 * SD, MEAN + 4.5 * SD, 51)
    for side, colour, top in zip(sides, (UNLEARNED, RETRAINED), (84, 77), strict=True):
        values = side[:, 0].numpy()
        axes.hist(values, edges, histtype="stepfilled", color=colour, alpha=0.2)
        axes.hist(values, edges, histtype="step", color=colour, linewidth=1.3)
        centre, spread = np.median(values), values.std(ddof=1)
        axes.plot([centre - spread, centre + spread], [top, top], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(centre, top, "o", color=colour, markersize=5)
    axes.set_title(f"{title}: F = {quality:.3f}", fontsize=10.5, loc="left", weight="bold", pad=19)
    words = in_words(found, runs).replace(" of the examples", "")
    axes.text(0, 1.03, words, transform=axes.transAxes, va="bottom", color="#444444", fontsize=8)
    numbers = f"shift {found.shift[0]:.2f}\nratio {found.ratio[0]:.2f}".replace("-", "−")
    axes.text(0.99, 0.72, numbers, transform=axes.transAxes, va="top", ha="right", color="#444444")
    axes.set(
        xlabel="confidence in the true class",
        ylabel="networks",
        xlim=(edges[0], edges[-1]),
        ylim=(0, 90),
        yticks=range(0, 71, 20),
    )


def draw(examples: int, seed: int, path: Path, advance) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    grid = figure.subplots(2, 2)
    for axes, (title, law) in zip(grid.flat, PANELS.items(), strict=True):
        draw_panel(axes, title, law, examples, seed, advance)
    for words, colour, height in (("unlearned", UNLEARNED, 0.96), ("retrained", RETRAINED, 0.87)):
        grid[0, 0].text(0.02, height, words, transform=grid[0, 0].transAxes, color=colour, va="top", weight="bold")
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main() -> None:
    args = arguments(__doc__, "why.png")
    evaluations = len(RUNS) * (len(LAWS) * (1 + len(WHAT_IF)) + len(WHAT_IF)) + len(PANELS)
    with progress("simulated examples", evaluations * args.examples, "example") as bar:
        for runs in RUNS:
            simulate(runs, args.examples, args.seed, bar.update)
        draw(args.examples, args.seed, args.picture, bar.update)
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    main()
