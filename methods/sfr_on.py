"""SFR-on: climb on the forget set where it matters more than the retain set, and descend on the retain set in between.

From Huang et al. (NeurIPS 2024), https://arxiv.org/abs/2409.19732: "saliency forgetting in the remain-preserving manifold
online". Three parts: ascent with examples weighted by how well they are still known; a mask of the weights whose Fisher
information on the forget set exceeds that on the retain set; and several fast steps of repair after each slow step of
ascent, which stand in for the Hessian of the retain loss. Not scored in the competition. The values are those of the
authors' code for CIFAR-10. Our choices: epochs need not be whole, and the Fisher information may be that of a part of the
retain set.
"""

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

    epochs: Annotated[float, (0.2, 1.2)] = 4.7  # over the retain set, parts allowed: 1500 steps of 128
    learning_rate: Annotated[float, (1e-3, 0.3, "log")] = 0.01  # at first; falls to 0 along half a cosine
    forget_every: Annotated[int, (1, 10)] = 5  # steps of repair after each step of ascent
    ascent: Annotated[float, (0.1, 50.0, "log")] = 25.0  # alpha: weight of the forget loss; falls along the same cosine
    adaptivity: float = 0.5  # lambda: examples are weighted by 1 / loss^lambda
    saliency: float = 1.0  # gamma: least ratio of Fisher information, forget to retain, of the weights that climb
    fisher_epochs: Annotated[float, (0.1, 0.4)] = 1.0  # over the retain set, for the Fisher information, parts allowed
    max_norm: float = 7.0  # of the ascent's gradient; longer ones are shortened
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of SGD

    def __post_init__(self):
        for rule in (
            "0 < epochs < 1e9",
            "0 <= learning_rate < 1e9",
            "forget_every > 0 and forget_every % 1 == 0",
            "0 <= ascent < 1e9",
            "0 <= adaptivity < 1e9",
            "0 <= saliency < 1e9",
            "0 < fisher_epochs < 1e9",
            "max_norm > 0",
            "0 <= momentum < 1",
            "0 <= weight_decay < 1e9",
        ):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    device = next(net.parameters()).device
    size = len(getattr(net, "members", [net]))  # K networks trained as one, or the one there is
    masks = salient(net, retain_loader, forget_loader, config)
    steps = max(1, round(config.epochs * len(retain_loader)))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    retain_batches, forget_batches = (chain.from_iterable(repeat(loader)) for loader in (retain_loader, forget_loader))
    net.train()
    for done, retain in enumerate(islice(retain_batches, steps)):
        left = (1 + math.cos(math.pi * done / steps)) / 2
        optimizer.param_groups[0]["lr"] = config.learning_rate * left
        if done % config.forget_every == 0:
            forget = next(forget_batches)
            logits, labels = net(forget["image"].to(device)), forget["age_group"].to(device)
            loss = -config.ascent * left * adaptive_loss(logits, labels, config.adaptivity, size)
            optimizer.zero_grad()
            loss.backward()
            for name, parameter in net.named_parameters():
                parameter.grad.mul_(masks[name])
            shorten(list(net.parameters()), config.max_norm, size)
            optimizer.step()
        loss = F.cross_entropy(net(retain["image"].to(device)), retain["age_group"].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()


def adaptive_loss(logits: Tensor, labels: Tensor, power: float, size: int = 1) -> Tensor:
    """Cross-entropy in which examples with a small loss count more; `size` networks' batches follow one another."""
    losses = F.cross_entropy(logits, labels, reduction="none").view(size, -1)
    weights = 1 / (losses.detach() ** power + 1e-15)
    return (losses * weights / weights.mean(dim=1, keepdim=True)).mean()


def salient(net: nn.Module, retain_loader, forget_loader, config: Config) -> dict[str, Tensor]:
    """True for the weights whose Fisher information on the forget set is at least gamma times that on the retain set."""
    forget = fisher_information(net, forget_loader, 1.0)
    retain = fisher_information(net, retain_loader, config.fisher_epochs)
    return {name: forget[name] + 1e-15 >= config.saliency * (retain[name] + 1e-15) for name in forget}


def fisher_information(net: nn.Module, loader, epochs: float) -> dict[str, Tensor]:
    """Its diagonal, for each parameter, from the squared gradients of single batches."""
    device = next(net.parameters()).device
    steps = max(1, round(epochs * len(loader)))
    totals = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    net.eval()
    for batch in islice(chain.from_iterable(repeat(loader)), steps):
        net.zero_grad()
        F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device)).backward()
        for name, parameter in net.named_parameters():
            totals[name].addcmul_(parameter.grad, parameter.grad, value=1 / steps)
    return totals


def shorten(parameters: list[Tensor], max_norm: float, size: int = 1) -> None:
    """Scale each network's gradient to a norm of `max_norm` where it is longer. size: networks trained as one."""
    gradients = [parameter.grad.unflatten(0, (size, -1)) for parameter in parameters]
    norms = sum(gradient.square().flatten(1).sum(1) for gradient in gradients).sqrt()
    scales = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scales.view(size, *[1] * (gradient.dim() - 1)))
