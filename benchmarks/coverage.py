"""Whether the intervals of evaluator/intervals.py hold: simulated pools whose F is known, and kept runs of real methods.

    python -m benchmarks.coverage                       15 minutes on two idle cores
    python -m benchmarks.coverage --quick               seconds; too few pools to judge by
    python -m benchmarks.coverage --projection --split private     kept runs instead: real scores at N = 512 beside those
                                                        projected from fewer runs

Simulated are 100 forget examples, some harder than others, whose confidences share a factor within a run (correlation 0 or
0.3). A and B are independent pools of one law, C is a little further from the retrained one.
"""

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from evaluator import command
from evaluator.evaluation import Evaluation
from evaluator.files import Problem, read_json
from evaluator.intervals import difference, difference_over, groups, half_samples, interval, projected, quick_epsilons
from evaluator.metric import competition_score, epsilons, forgetting_quality
from evaluator.pool import Pool
from evaluator.scoring import with_confidences

EXAMPLES = 100
SPREAD = 1.5  # standard deviation of a confidence: about that of retrained networks on digits
FURTHER = 0.25  # standard deviations, of C
HARD = torch.linspace(-1, 1, EXAMPLES, dtype=torch.float64)  # how far each example is shifted
LAWS: dict[str, Callable[[Tensor], Tensor]] = {  # from the law of the retrained to that of the unlearned confidences
    "equal": lambda noise: noise,
    "shifted": lambda noise: noise + HARD,
    "narrower": lambda noise: noise * (0.8 + 0.2 * HARD),
    "heavy tails": lambda noise: noise + 0.5 * HARD,
}


FIRST = (64, 128)  # runs, from which scores are projected
NOT_PROJECTED = {"retrained", "retrained_again", "no_unlearning"}


class Case(NamedTuple):
    law: str
    correlation: float
    runs: int


def noise(case: Case, source: torch.Generator) -> Tensor:
    """Of one pool: [runs, examples], of standard deviation 1, or Student's t with 3 degrees of freedom."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(case.runs, *shape, generator=source, dtype=torch.float64)

    values = case.correlation**0.5 * normal(1) + (1 - case.correlation) ** 0.5 * normal(EXAMPLES)
    return values / normal(EXAMPLES, 3).square().mean(dim=2).sqrt() if case.law == "heavy tails" else values


def pool(confidences: Tensor) -> dict[str, Tensor]:
    return {"confidences": SPREAD * confidences, "ra": torch.ones(len(confidences)), "ta": torch.ones(len(confidences))}


def once(case: Case, seed: int) -> list[tuple[float, list[float]]]:
    """F and its half-samples of A, B and C against the same retrained pool."""
    source = torch.Generator().manual_seed(seed)
    law, retrained = LAWS[case.law], pool(noise(case, source))
    found = []
    for further in (0, 0, FURTHER):
        unlearned = pool(law(noise(case, source)) + further)
        quality = forgetting_quality(quick_epsilons(unlearned["confidences"], retrained["confidences"]), case.runs)
        found.append((quality, half_samples(unlearned, retrained)["forgetting_quality"]))
    return found


def coverage(case: Case, pools: int) -> dict:
    """How often the interval of F holds the mean of F over all pools, and what is said of A, B and C."""
    torch.set_num_threads(1)
    a, b, c = zip(*(once(case, seed) for seed in range(pools)), strict=True)
    values = np.array([value for value, _ in a + b])
    truth = values.mean()
    _, low, high = np.array([interval(*found) for found in a + b]).T
    same = np.array([difference(*one, *other) for one, other in zip(a, b, strict=True)])
    real = np.array([difference(*one, *other) for one, other in zip(a, c, strict=True)])
    return case._asdict() | {
        "F": truth,
        "sd": values.std(ddof=1),
        "half width / sd": ((high - low) / 2).mean() / values.std(ddof=1),
        "coverage": ((low <= truth) & (truth <= high)).mean(),
        "false claims": ((same[:, 1] > 0) | (same[:, 2] < 0)).mean(),
        "real difference": real[:, 0].mean(),
        "found": (real[:, 1] > 0).mean(),
    }


def over_sets(repeats: int) -> Iterator[dict]:
    """False claims of the paired t interval over forget sets: A and B have the same mean over all sets.

    A score is the method's mean x an effect of the set x one of method and set (lognormal) x an error of the runs (7%).
    """
    random = np.random.default_rng(0)
    for sets in (2, 3, 4, 6, 12):
        for spreads in ((0.2, 0.2), (0.5, 0.5), (0.2, 0.5), (0.2, 1.0)):
            shape = (repeats, sets)
            easy = random.lognormal(0, 0.3, shape)
            a, b = (
                0.05 * easy * random.lognormal(-(spread**2) / 2, spread, shape) * random.normal(1, 0.07, shape)
                for spread in spreads
            )
            same, real = ([difference_over(*pair) for pair in zip(first, b, strict=True)] for first in (a, 1.5 * a))
            yield {
                "forget sets": sets,
                "spread of A": spreads[0],
                "spread of B": spreads[1],
                "false claims": np.mean([low > 0 or high < 0 for _, low, high in same]),
                "found when A is 1.5 x B": np.mean([low > 0 for _, low, _ in real]),
            }


def equal_methods(repeats: int, sets: int = 6) -> Iterator[dict]:
    """How often a leaderboard of equal methods has more than one group."""
    random = np.random.default_rng(0)
    for methods in (2, 5, 10, 20):
        split = 0
        for _ in range(repeats):
            scores = random.lognormal(-3, 0.3, (methods, sets))
            split += max(groups(sorted(scores, key=np.mean, reverse=True), difference_over)) > 1
        yield {"equal methods": methods, "more than one group": split / repeats}


def grids(runs: int, pools: int) -> dict:
    """F of the coarse grid that half-samples use, divided by the metric's own."""
    case, ratios = Case("shifted", 0.3, runs), []
    for seed in range(pools):
        source = torch.Generator().manual_seed(seed)
        sides = pool(LAWS[case.law](noise(case, source)))["confidences"], pool(noise(case, source))["confidences"]
        ratios.append(np.divide(*(forgetting_quality(found(*sides), runs) for found in (quick_epsilons, epsilons))))
    return {"runs": runs, "coarse F / F": np.mean(ratios), "sd": np.std(ratios, ddof=1)}


def simulate(pools: int, sizes: tuple[int, ...], jobs: int | None) -> None:
    work = joblib.Parallel(jobs or joblib.cpu_count())
    for runs in sizes:
        cases = [Case(law, correlation, runs) for law in LAWS for correlation in (0.0, 0.3)]
        table = pd.DataFrame(work(joblib.delayed(coverage)(case, pools) for case in cases))
        show(f"One forget set: {pools} retrained pools per line, two unlearned pools of the law against each", table)
        means = table[["coverage", "false claims"]].mean()
        print(f"all lines: coverage {means.iloc[0]:.3f}, false claims {means.iloc[1]:.3f}", flush=True)
    show(f"Over forget sets: {20 * pools} repeats per line", pd.DataFrame(over_sets(20 * pools)))
    show(f"Leaderboards of equal methods over 6 forget sets: {5 * pools} repeats", pd.DataFrame(equal_methods(5 * pools)))
    show("The grid of half-samples", pd.DataFrame(grids(runs, max(2, pools // 20)) for runs in sizes))


def projections(evaluation: Evaluation) -> Iterator[dict]:
    """For every kept pool of N runs: its score, and the one projected from its first 64 and 128 runs."""
    last = f"run_{evaluation.runs - 1:05d}.npz"
    whole = {path.parent.parent.name: path.parent for path in sorted(evaluation.results.glob(f"*/*/{last}"))}
    for name in whole:  # of several pools of a method, the one its summary is about
        scored = read_json(evaluation.results / name / "summary.json").get("made_of", {}).get("unlearned", "")
        if (evaluation.results / name / scored / last).is_file():
            whole[name] = evaluation.results / name / scored

    def pool_of(name: str) -> dict[str, Tensor]:
        kept = Pool(whole[name].parent, read_json(whole[name] / "made_from.json")).load(range(evaluation.runs))
        return with_confidences(kept, evaluation.data)

    if evaluation.runs <= FIRST[0]:
        raise Problem(f"--runs {evaluation.runs}: must be more than {FIRST[0]}, from which scores are projected")
    if "retrained" not in whole or len(whole.keys() - NOT_PROJECTED) == 0:
        raise Problem(f"{evaluation.results}: no {evaluation.runs} runs of a method are kept; run evaluate.py first")
    theirs = pool_of("retrained")
    for name in sorted(whole.keys() - NOT_PROJECTED):
        sides = pool_of(name), theirs
        real = score(*sides)
        for runs in (runs for runs in FIRST if runs < evaluation.runs):
            first = [{of: values[:runs] for of, values in side.items()} for side in sides]
            value, low, high = projected(score(*first), *first, evaluation.runs)
            yield {"method": name, "score": real, "first": runs, "projected": value, "low": low, "high": high}


def score(unlearned: dict[str, Tensor], retrained: dict[str, Tensor]) -> float:
    """By the metric itself, of "confidences" [runs, examples], "ra" and "ta" [runs]."""
    quality = forgetting_quality(epsilons(unlearned["confidences"], retrained["confidences"]), len(unlearned["confidences"]))
    return competition_score(quality, *(side[of] for of in ("ra", "ta") for side in (unlearned, retrained)))


def compare(evaluation: Evaluation) -> None:
    table = pd.DataFrame(projections(evaluation))
    table["error"] = (table.projected - table.score).abs()
    table["held"] = (table.low <= table.score) & (table.score <= table.high)
    show(f"{evaluation.title}: scores, and those projected from the first 64 and 128 runs", table)
    for runs, part in table.groupby("first"):
        print(f"from {runs}: mean error {part.error.mean():.4f}, intervals that held {part.held.mean():.2f}")


def show(title: str, table: pd.DataFrame) -> None:
    formats = dict.fromkeys(("F", "sd", "real difference", "score", "projected", "low", "high", "error"), "{:.4f}".format)
    print(f"\n{title}\n{table.to_string(index=False, formatters=formats, float_format='{:.3f}'.format)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser(__doc__, "split")
    parser.add_argument("--pools", type=int, default=100, help="simulated per line (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="4 pools, N = 64 only: to see that it works")
    parser.add_argument("--projection", action="store_true", help="compare projected with real scores of kept runs instead")
    args = parser.parse_args(arguments)
    if args.projection:
        return command.run(lambda: compare(command.evaluation(args)))
    return command.run(lambda: simulate(*(4, (64,)) if args.quick else (args.pools, (64, 512)), args.jobs))


if __name__ == "__main__":
    sys.exit(main())
