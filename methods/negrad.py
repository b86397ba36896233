"""NegGrad: gradient ascent on the forget set. Published score: 0.0001 ± 0.0001."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

ENSEMBLE = True


@dataclass(frozen=True)
class Config:
    epochs: int = 1  # over the forget set
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    net.train()
    for _ in range(config.epochs):
        for batch in forget_loader:
            loss = -F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()
