"""CF-k, catastrophic forgetting: fine-tune the last blocks on the retain set, and leave the rest as it is.

From Goel et al. (2022), https://arxiv.org/abs/2201.06640. Not scored in the competition. The rate and the epochs are
those of the baseline in Kurmanji et al. (NeurIPS 2023), https://arxiv.org/abs/2302.09880. What is kept is kept to the
bit, batch norm statistics included. Our choices: the blocks are a ResNet's residual blocks, or whatever other networks
hold one after the other in an nn.Sequential, and the last linear layer (fc) is trained too; momentum; the learning rate
drops after parts of the steps (theirs: layer4 alone, no momentum, a constant rate).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Annotated

import torch
from torch import nn
from torch.nn import functional as F

ENSEMBLE = True  # K networks trained as one give what each gives alone


@dataclass(frozen=True)
class Config:
    """Published values, or (our choice); in brackets, what tuning may try (linear, or "log")."""

    blocks: Annotated[int, (1, 7)] = 2  # the last residual blocks, trained together with fc (our choice: a stage)
    epochs: Annotated[float, (0.2, 4.0)] = 10  # over the retain set, parts allowed
    learning_rate: Annotated[float, (1e-3, 0.5, "log")] = 0.01  # at first
    drops: tuple[float, ...] = (0.5, 0.8, 0.9)  # the rate falls to a tenth after these parts of the steps (our choice)
    momentum: float = 0.9  # of SGD (our choice)
    weight_decay: float = 5e-4  # of SGD (our choice, the starting kit's)

    def __post_init__(self):
        for rule in (
            "blocks >= 0 and blocks % 1 == 0",
            "0 < epochs < 1e9",
            "0 <= learning_rate < 1e9",
            "all(0 <= part <= 1 for part in drops)",
            "0 <= momentum < 1",
            "0 <= weight_decay < 1e9",
        ):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    member = getattr(net, "members", [net])[0]  # of K networks trained as one, or the one there is
    train(net, last_blocks(member, config.blocks), retain_loader, config)


def last_blocks(net: nn.Module, count: int) -> tuple[str, ...]:
    """How the names of all that is trained begin: the layers of the last `count` blocks, and all that follow.

    Raises ValueError if the network has no blocks, or no linear layer.
    """
    layers = [f"{name}." for name, layer in net.named_modules() if [*layer.parameters(recurse=False)]]
    last = [f"{name}." for name, layer in net.named_modules() if isinstance(layer, nn.Linear)][-1:]
    found = [block for block in blocks(net) if block not in last]
    if not (last and found):
        raise ValueError("this method needs a network with blocks in an nn.Sequential and a linear layer at the end")
    first = [*found, *last][max(0, len(found) - count)]
    return tuple(layers[[layer.startswith(first) for layer in layers].index(True) :])


def blocks(module: nn.Module, name: str = "") -> Iterator[str]:
    """How the names of the blocks begin: of what an nn.Sequential holds, if there are weights in it."""
    for entry, part in module.named_children():
        if type(part) is nn.Sequential or not isinstance(module, nn.Sequential):
            yield from blocks(part, f"{name}{entry}.")
        elif any(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in part.modules()):
            yield f"{name}{entry}."


def train(net: nn.Module, trained: tuple[str, ...], loader, config: Config) -> None:
    """Minimise cross-entropy by changing only what is trained: a frozen batch norm keeps its statistics too."""
    device = next(net.parameters()).device
    net.train()
    for name, layer in net.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train(f"{name}.".startswith(trained))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    steps = max(1, round(config.epochs * len(loader)))
    optimizer = torch.optim.SGD(
        [parameter for parameter in net.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    for done, batch in enumerate(islice(chain.from_iterable(repeat(loader)), steps)):
        drops = sum(done >= part * steps for part in config.drops)
        optimizer.param_groups[0]["lr"] = config.learning_rate * 0.1**drops
        loss = F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.requires_grad_(True)
    net.eval()
