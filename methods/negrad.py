"""NegGrad: gradient ascent on the forget set.

A baseline of Golatkar et al. (CVPR 2020), https://arxiv.org/abs/1911.04933. Public score, as measured by Ahn et al.
(https://www.kaggle.com/competitions/neurips-2023-machine-unlearning/discussion/458715) with values that were not
published: 0.0001 ± 0.0001.
"""

from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Annotated

import torch
from torch.nn import functional as F

ENSEMBLE = True  # K networks trained as one give what each gives alone


@dataclass(frozen=True)
class Config:
    """Our choice, the values of fine-tuning; in brackets, what tuning may try (linear, or "log")."""

    epochs: Annotated[float, (0.25, 5.0)] = 1  # over the forget set, parts allowed
    learning_rate: Annotated[float, (1e-4, 1e-1, "log")] = 1e-3  # constant
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of SGD

    def __post_init__(self):
        for rule in ("0 < epochs < 1e9", "0 <= learning_rate < 1e9", "0 <= momentum < 1", "0 <= weight_decay < 1e9"):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {
    "digits": Config(epochs=3.91, learning_rate=0.0141),  # the better of two searches
    "faces": Config(learning_rate=4.4e-3),  # an epoch has 4.4 times fewer steps than the competition's
    "fashion-small": Config(epochs=3.91, learning_rate=0.0141),  # the digits'
}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    net.train()
    for batch in islice(chain.from_iterable(repeat(forget_loader)), max(1, round(config.epochs * len(forget_loader)))):
        loss = -F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
