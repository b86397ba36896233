"""Fine-tune on the retain set: the organisers' baseline. Published score: 0.0464 ± 0.0031."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

ENSEMBLE = True


@dataclass(frozen=True)
class Config:
    epochs: int = 1  # the organisers' example
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
    net.train()
    for _ in range(config.epochs):
        for batch in retain_loader:
            loss = F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    net.eval()
