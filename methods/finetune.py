"""Fine-tune on the retain set: the organisers' baseline.

From their starting notebook, https://www.kaggle.com/code/eleni30fillou/run-unlearn-finetune. Public score, as measured by
Ahn et al. (https://www.kaggle.com/competitions/neurips-2023-machine-unlearning/discussion/458715): 0.0464 ± 0.0031. Our
choice: the learning rate falls with each step (the organisers': with each epoch, so that their one epoch has a constant
rate).
"""

from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Annotated

import torch
from torch.nn import functional as F

ENSEMBLE = True  # K networks trained as one give what each gives alone


@dataclass(frozen=True)
class Config:
    """Published values; in brackets, what tuning may try (linear, or "log")."""

    epochs: Annotated[float, (0.2, 2.5)] = 1  # over the retain set, parts allowed
    learning_rate: Annotated[float, (1e-3, 1.0, "log")] = 1e-3  # at first; falls to 0 along half a cosine
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of SGD

    def __post_init__(self):
        for rule in ("0 < epochs < 1e9", "0 <= learning_rate < 1e9", "0 <= momentum < 1", "0 <= weight_decay < 1e9"):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {
    "digits": Config(epochs=1.16, learning_rate=0.145),  # the better of two searches
    "faces": Config(learning_rate=4.4e-3),  # an epoch has 4.4 times fewer steps than the competition's
    "fashion-small": Config(epochs=0.58, learning_rate=0.145),  # the digits' with half the epochs, as a retraining has
}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    device = next(net.parameters()).device
    steps = max(1, round(config.epochs * len(retain_loader)))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    net.train()
    for batch in islice(chain.from_iterable(repeat(retain_loader)), steps):
        loss = F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
