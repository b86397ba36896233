"""Swap the two spatial axes of the convolution kernels, then fine-tune.

By toshi_k & marvelworld, 5th in the NeurIPS 2023 Unlearning Challenge. Published score: 0.0785, with each run doing
either this or a fine-tuning on pseudo-labels of the forget set. The thresholds of the latter were not published, so only
this half is here; alone it had 0.0720 (public half of the score). Swapping in a part of the layers is our addition.
"""

import math
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Annotated

import torch
from torch import nn
from torch.nn import functional as F

ENSEMBLE = True  # K networks trained as one give what each gives alone


@dataclass(frozen=True)
class Config:
    """Published values; in brackets, what tuning may try (linear, or "log")."""

    share: Annotated[float, (0.1, 1.0)] = 1.0  # of the convolutions that are transposed, drawn in each run
    epochs: Annotated[float, (0.2, 1.6)] = 3  # over the retain set, parts allowed
    learning_rate: Annotated[float, (1e-3, 5e-1, "log")] = 1e-3  # at first; falls along half a cosine
    cosine_steps: int = 3  # the cosine falls in this many equal steps: with each of 3 epochs
    momentum: float = 0.9
    weight_decay: float = 5e-4


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    device = next(net.parameters()).device
    members = getattr(net, "members", [net])  # K networks trained as one, or the one there is
    generators = getattr(net, "generators", [None])  # where each draws its randomness; None: torch's global generator
    for member, generator in zip(members, generators, strict=True):
        transpose(member, config.share, generator)
    steps = max(1, round(config.epochs * len(retain_loader)))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    net.train()
    for done, batch in enumerate(islice(chain.from_iterable(repeat(retain_loader)), steps)):
        fallen = done * config.cosine_steps // steps / config.cosine_steps
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 + math.cos(math.pi * fallen)) / 2
        loss = F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()


@torch.no_grad()
def transpose(net: nn.Module, share: float, generator: torch.Generator | None) -> None:
    """Swap the spatial axes of the kernels of a random `share` of the convolutions, in place."""
    # A kernel of a single weight stays as it is: it is not among those drawn.
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d) and layer.weight[0, 0].numel() > 1]
    order = torch.randperm(len(layers), generator=generator, device=generator.device if generator else "cpu")
    for index in order[: max(1, round(share * len(layers)))].tolist():
        weight = layers[index].weight
        weight.copy_(weight.transpose(2, 3).clone())
