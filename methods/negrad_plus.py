"""NegGrad+: descend on the retain set and, more gently, ascend on the forget set.

From Kurmanji et al. (NeurIPS 2023), https://arxiv.org/abs/2302.09880, who use it as a baseline of SCRUB. Not scored in
the competition. Our choices: momentum (theirs: none), no penalty on the distance from the original's weights (theirs has
one), epochs need not be whole, and the learning rate may fall.
"""

from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Annotated

import torch
from torch.nn import functional as F

ENSEMBLE = True  # K networks trained as one give what each gives alone


@dataclass(frozen=True)
class Config:
    """Published values, or (our choice); in brackets, what tuning may try (linear, or "log")."""

    epochs: Annotated[float, (0.2, 1.2)] = 10  # over the retain set, parts allowed; each step has a forget batch too
    learning_rate: Annotated[float, (1e-3, 0.3, "log")] = 0.01  # at first
    decay: Annotated[float, (0.0, 1.0)] = 0.0  # the part of the learning rate that is lost by the end (published: none)
    retain_share: Annotated[float, (0.5, 0.99)] = 0.95  # weight of the retain loss; the forget loss has the rest, negated
    batch_norm: Annotated[str, ["eval", "train"]] = "eval"  # "eval": with the original's statistics, which stay as they are
    momentum: float = 0.9  # of SGD (our choice)
    weight_decay: float = 0.0  # of SGD

    def __post_init__(self):
        for rule in (
            "0 < epochs < 1e9",
            "0 <= learning_rate < 1e9",
            "0 <= decay <= 1",
            "0 <= retain_share <= 1",
            "batch_norm in ('eval', 'train')",
            "0 <= momentum < 1",
            "0 <= weight_decay < 1e9",
        ):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    device = next(net.parameters()).device
    steps = max(1, round(config.epochs * len(retain_loader)))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    retain_batches, forget_batches = (chain.from_iterable(repeat(loader)) for loader in (retain_loader, forget_loader))
    net.train(config.batch_norm == "train")
    for done, (retain, forget) in enumerate(islice(zip(retain_batches, forget_batches, strict=False), steps)):
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - config.decay * done / steps)
        retain_loss, forget_loss = (
            F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device)) for batch in (retain, forget)
        )
        loss = config.retain_share * retain_loss - (1 - config.retain_share) * forget_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
