"""From pools to what is reported: the score and its parts, a table of the forget examples, the ceiling."""

import ast
import hashlib
import math
import platform
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from evaluator import intervals, why
from evaluator.attacks import ATTACKS
from evaluator.data import Data
from evaluator.files import Problem, code_digest
from evaluator.metric import (
    FAMILIES,
    Attacks,
    best_attacks,
    competition_score,
    forgetting_quality,
    logit_scaled_confidence,
)
from evaluator.progress import progress

COST_LIMIT = 0.2  # of a retraining's cost: what the competition allows one run
CEILING_DRAWS = 4
COMPETITION_RUNS = 512
# A hash of the code that turns runs into a score: when it changes, scores are computed anew, but no run is.
VERSION = hashlib.sha256(
    "".join(
        code_digest(ast.parse((Path(__file__).parent / f"{name}.py").read_bytes()))
        for name in ("metric", "attacks", "intervals", "why", "scoring")
    ).encode()
).hexdigest()[:12]


def score(
    unlearned: dict[str, Tensor], retrained: dict[str, Tensor], data: Data, attacks: bool = False
) -> tuple[dict, pd.DataFrame]:
    """The score and its parts, and a table of the forget examples, from pools as `Pool.load` returns them.

    attacks: also run those of evaluator.attacks; the first gets their means over the examples, the second all values.
    Raises Problem naming the image when no threshold of an example survives.
    """
    targets = data.forget.age_group.cpu()
    ours, theirs = confidences(unlearned, data), confidences(retrained, data)
    runs, examples = ours.shape
    with progress("epsilon", examples, "example") as bar:
        found = _best_attacks(ours, theirs, data, bar.update)
    quality = forgetting_quality(found.epsilon, runs)
    accuracies = {
        f"{name}_{kind}": pool[name].mean().item()
        for name in ("ra", "ta")
        for kind, pool in (("unlearned", unlearned), ("retrained", retrained))
    }
    for name in ("ra", "ta"):
        if not accuracies[f"{name}_retrained"]:
            raise Problem(f"{data.folder}: the retrained networks have an accuracy of 0 ({name.upper()}): no ratio to score")
    summary = {"runs": runs, "forget_examples": examples, "forgetting_quality": quality, **accuracies}
    summary["score"] = competition_score(quality, **accuracies)
    table = pd.DataFrame(
        {
            "image_id": data.forget.image_ids,
            "age_group": targets.numpy(),
            "epsilon": found.epsilon.numpy(),
            "attack": [FAMILIES[family] for family in found.family.tolist()],
            "left": found.left.numpy(),
            "right": found.right.numpy(),
            "unlearned_inside": found.unlearned_inside.numpy(),
            "retrained_inside": found.retrained_inside.numpy(),
            **{
                f"{kind}_{name}": value.numpy()
                for kind, side in (("unlearned", ours), ("retrained", theirs))
                for name, value in (("median", side.quantile(0.5, dim=0)), ("std", side.std(dim=0)))
            },
        }
    )
    if attacks:
        table = table.assign(**{name: attack(ours, theirs).numpy() for name, attack in ATTACKS.items()})
        summary["attacks"] = {name: table[name].mean() for name in ATTACKS}
    return summary, table


def explanation(
    unlearned: dict[str, Tensor], retrained: dict[str, Tensor], data: Data, scores: dict
) -> tuple[dict, dict[str, np.ndarray]]:
    """What belongs beside a score: how far to trust it, and why it is what it is.

    scores: what `score` found for these pools. Returns further entries for the summary, and columns for the table of the
    forget examples: the shift of the median and the ratio of the spreads.
    """
    sides = [with_confidences(pool, data) for pool in (unlearned, retrained)]
    ours, theirs = (side["confidences"] for side in sides)
    found: dict = {}
    if scores["runs"] >= intervals.FEWEST_TO_HALVE:
        found["half_samples"] = intervals.half_samples(*sides)
        for name, draws in found["half_samples"].items():
            found[f"{name}_interval"] = intervals.interval(scores[name], draws)[1:]
    if scores["runs"] < COMPETITION_RUNS:
        projected = intervals.projected(scores["score"], *sides, COMPETITION_RUNS)
        if math.isfinite(projected.low):
            found["projected_512"] = dict(zip(("score", "low", "high"), projected, strict=True))
    accuracies = {name: scores[name] for name in ("ra_unlearned", "ra_retrained", "ta_unlearned", "ta_retrained")}
    found["what_if"] = {
        name: competition_score(quality, **accuracies) for name, quality in why.what_if(ours, theirs).items()
    }
    compared = why.shifts_and_spreads(ours, theirs)
    found["diagnosis"] = why.in_words(compared, scores["runs"])
    return found, {"shift": compared.shift.numpy(), "spread_ratio": compared.ratio.numpy()}


def confidences(pool: dict[str, Tensor], data: Data) -> Tensor:
    """Logit-scaled confidences on the forget set: [runs, examples]. Raises Problem when the pool is of other data."""
    logits, targets = pool["forget_logits"], data.forget.age_group.cpu()
    if logits.dim() != 3 or logits.shape[1:] != (len(targets), data.classes):
        raise Problem(f"{data.folder}: kept runs hold logits of shape {list(logits.shape)}, not those of this forget set")
    return logit_scaled_confidence(logits, targets)


def with_confidences(pool: dict[str, Tensor], data: Data) -> dict[str, Tensor]:
    """A pool as `evaluator.intervals` asks for it: with its "confidences"."""
    return pool | {"confidences": confidences(pool, data)}


def estimated_ceiling(retrained: dict[str, Tensor], data: Data, seed: int = 0) -> float:
    """Estimated F of a perfect unlearner with as many runs: the unchanged metric on two pools from a smooth distribution.

    The distribution is a kernel density estimate of each example's retrained confidences (Gaussian, Silverman's bandwidth).
    Plain resampling would repeat values, which the metric takes for a difference. The mean over a few draws.
    """
    kept = confidences(retrained, data)
    runs, examples = kept.shape
    quartiles = kept.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64), dim=0)
    spread = torch.minimum(kept.std(dim=0), (quartiles[1] - quartiles[0]) / 1.34)
    bandwidth = 0.9 * spread * runs**-0.2
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        kernels = torch.randint(runs, (runs, examples), generator=generator)
        return kept.gather(0, kernels) + bandwidth * torch.randn(runs, examples, generator=generator, dtype=torch.float64)

    with progress("ceiling", CEILING_DRAWS * examples, "example") as bar:
        draws = (_best_attacks(draw(), draw(), data, bar.update).epsilon for _ in range(CEILING_DRAWS))
        return float(np.mean([forgetting_quality(epsilon, runs) for epsilon in draws]))


def versions() -> dict[str, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    return {"python": platform.python_version(), "torch": torch.__version__, "processor": capability}


def processor() -> str:
    """The model of this machine's processor, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _best_attacks(unlearned: Tensor, retrained: Tensor, data: Data, on_progress) -> Attacks:
    try:
        return best_attacks(unlearned, retrained, on_progress)
    except ValueError as error:
        raise Problem(f"{data.folder} forget set ({data.split}, rows sorted by image path): {error}") from error
