"""Reset the first and the last layer, imitate the original on the validation set, then fine-tune with its help.

By Algorithmic Amnesiacs, 6th in the NeurIPS 2023 Unlearning Challenge:
https://www.kaggle.com/competitions/neurips-2023-machine-unlearning/discussion/458740. Published private score: 0.0783,
where the imitation used only the first two classes, those of the forget set; with all classes, as here, it was 0.0722.
"""

import copy
import math
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

    temperature: float = 5.0  # softens the outputs of both networks where they are compared
    imitation_epochs: Annotated[float, (0.2, 4.0)] = 3  # over the validation set, parts allowed
    imitation_rate: Annotated[float, (1e-3, 5e-1, "log")] = 9e-4  # learning rate, constant
    epochs: Annotated[float, (0.2, 1.4)] = 3  # then over the retain set, parts allowed
    learning_rate: Annotated[float, (1e-3, 5e-1, "log")] = 1e-3  # at first; falls along half a cosine
    cosine_steps: int = 3  # the cosine falls in this many equal steps: with each of 3 epochs
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of SGD

    def __post_init__(self):
        for rule in (
            "0 < temperature < 1e9",
            "0 < imitation_epochs < 1e9",
            "0 <= imitation_rate < 1e9",
            "0 < epochs < 1e9",
            "0 <= learning_rate < 1e9",
            "cosine_steps > 0 and cosine_steps % 1 == 0",
            "0 <= momentum < 1",
            "0 <= weight_decay < 1e9",
        ):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    members = getattr(net, "members", [net])  # K networks trained as one, or the one there is
    generators = getattr(net, "generators", [None])  # where each draws its randomness; None: torch's global generator
    teacher = copy.deepcopy(members[0]).eval().requires_grad_(False)
    for member, generator in zip(members, generators, strict=True):
        reset(member, generator)
    net.train()
    imitate(net, teacher, val_loader, config)
    fine_tune(net, teacher, retain_loader, config)
    net.eval()


@torch.no_grad()
def reset(net: nn.Module, generator: torch.Generator | None) -> None:
    """Redraw the first convolution and the last layer as PyTorch initialises them, within ±1/√fan_in, in place."""
    for layer in (layers(net, nn.Conv2d)[0], layers(net, nn.Linear)[-1]):
        bound = layer.weight[0].numel() ** -0.5
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)


def layers(net: nn.Module, kind: type) -> list:
    """A network's layers of a kind, in order. Raises ValueError if there is none."""
    found = [layer for layer in net.modules() if isinstance(layer, kind)]
    if not found:
        raise ValueError(f"this method needs a layer of type {kind.__name__}, and the network has none")
    return found


def imitate(net: nn.Module, teacher: nn.Module, loader, config: Config) -> None:
    """Bring the network's outputs to the original's; the labels are not used."""
    device = next(net.parameters()).device
    optimizer = new_optimizer(net, config.imitation_rate, config)
    steps = max(1, round(config.imitation_epochs * len(loader)))
    for batch in islice(chain.from_iterable(repeat(loader)), steps):
        images = batch["image"].to(device)
        loss = divergence(net(images), teacher(images), config.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fine_tune(net: nn.Module, teacher: nn.Module, loader, config: Config) -> None:
    """Cross-entropy to the labels and to the original's softened outputs, plus the divergence from these."""
    device = next(net.parameters()).device
    optimizer = new_optimizer(net, config.learning_rate, config)
    steps = max(1, round(config.epochs * len(loader)))
    for done, batch in enumerate(islice(chain.from_iterable(repeat(loader)), steps)):
        fallen = done * config.cosine_steps // steps / config.cosine_steps
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 + math.cos(math.pi * fallen)) / 2
        images, labels = batch["image"].to(device), batch["age_group"].to(device)
        logits, target = net(images), teacher(images)
        loss = F.cross_entropy(logits, labels)
        loss = loss + F.cross_entropy(logits / config.temperature, (target / config.temperature).softmax(-1))
        loss = loss + divergence(logits, target, config.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the softened outputs from the target's, averaged over the examples."""
    logits, target = ((tensor / temperature).log_softmax(-1) for tensor in (logits, target))
    return F.kl_div(logits, target, reduction="batchmean", log_target=True)


def new_optimizer(net: nn.Module, rate: float, config: Config) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
