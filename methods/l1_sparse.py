"""L1-sparse: fine-tune on the retain set under a penalty on the weights' absolute values, which fades out.

From Jia et al. (NeurIPS 2023), https://arxiv.org/abs/2304.04934: sparse networks forget more easily. Not scored in the
competition. Our choices: the penalty fades with each step (published: with each epoch), and the learning rate may fall.
"""

from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ENSEMBLE = True  # K networks trained as one give what each gives alone


@dataclass(frozen=True)
class Config:
    """Published values; in brackets, what tuning may try (linear, or "log")."""

    epochs: Annotated[float, (0.2, 1.6)] = 10  # over the retain set, parts allowed
    learning_rate: Annotated[float, (1e-3, 0.5, "log")] = 0.01  # at first
    decay: Annotated[float, (0.0, 1.0)] = 0.0  # the part of the learning rate that is lost by the end (published: none)
    penalty: Annotated[float, (1e-5, 1e-2, "log")] = 5e-4  # on the sum of absolute values, at first
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of SGD

    def __post_init__(self):
        for rule in (
            "0 < epochs < 1e9",
            "0 <= learning_rate < 1e9",
            "0 <= decay <= 1",
            "0 <= penalty < 1e9",
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
    net.train()
    for done, batch in enumerate(islice(chain.from_iterable(repeat(retain_loader)), steps)):
        left = 1 - done / steps
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - config.decay * (1 - left))
        loss = F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device))
        loss = loss + config.penalty * left * absolute_values(net)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()


def absolute_values(net: nn.Module) -> Tensor:
    """The sum over all parameters; of K networks trained as one, the K networks' sums together."""
    return sum(parameter.abs().sum() for parameter in net.parameters())
