"""SCRUB: in turns, move away from the original's outputs on the forget set and return to them on the retain set.

From Kurmanji et al. (NeurIPS 2023), https://arxiv.org/abs/2302.09880. Not scored in the competition. Each round maximises
the divergence from the original on the forget set, in the first few rounds only, and then minimises it, and
cross-entropy, on the retain set. Our choices: the rounds share the epochs, which need not be whole; the learning rate
drops after parts of the steps, not of the epochs; the temperature is that of the implementation in
https://github.com/xcadet/deepunlearn (the authors': 4).
"""

import copy
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

ENSEMBLE = True  # K networks trained as one give what each gives alone


@dataclass(frozen=True)
class Config:
    """Published values, or (our choice); in brackets, what tuning may try (linear, or "log")."""

    rounds: Annotated[int, (1, 4)] = 5  # of moving away and returning
    forget_rounds: Annotated[int, (1, 3)] = 3  # the first of them; the others only return
    epochs: Annotated[float, (0.2, 1.2)] = 5  # over the retain set, in all rounds together, parts allowed
    forget_epochs: Annotated[float, (0.25, 2.0)] = 1  # over the forget set, in each round that has one
    learning_rate: Annotated[float, (1e-3, 0.3, "log")] = 5e-4  # at first
    drops: tuple[float, ...] = (0.5, 0.8, 0.9)  # the learning rate falls to a tenth after these parts of the retain steps
    label_weight: float = 1.0  # gamma: of cross-entropy on the retain set
    return_weight: float = 0.5  # alpha: of the divergence from the original on the retain set
    temperature: float = 2.0  # of the outputs that are compared (our choice; published: 4)
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of SGD

    def __post_init__(self):
        for rule in (
            "rounds > 0 and rounds % 1 == 0",
            "forget_rounds >= 0 and forget_rounds % 1 == 0",
            "0 < epochs < 1e9",
            "0 < forget_epochs < 1e9",
            "0 <= learning_rate < 1e9",
            "all(0 <= part <= 1 for part in drops)",
            "0 <= label_weight < 1e9",
            "0 <= return_weight < 1e9",
            "0 < temperature < 1e9",
            "0 <= momentum < 1",
            "0 <= weight_decay < 1e9",
        ):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    device = next(net.parameters()).device
    teacher = copy.deepcopy(getattr(net, "members", [net])[0]).eval().requires_grad_(False)  # all start as the original
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    retain_batches, forget_batches = (chain.from_iterable(repeat(loader)) for loader in (retain_loader, forget_loader))
    steps = max(config.rounds, round(config.epochs * len(retain_loader)))
    forget_steps = max(1, round(config.forget_epochs * len(forget_loader)))
    net.train()
    for turn in range(config.rounds):
        start, end = (steps * part // config.rounds for part in (turn, turn + 1))
        leave = ((batch, start, True) for batch in islice(forget_batches, forget_steps * (turn < config.forget_rounds)))
        back = ((batch, done, False) for done, batch in enumerate(islice(retain_batches, end - start), start))
        for batch, done, leaving in chain(leave, back):
            optimizer.param_groups[0]["lr"] = learning_rate(config, done, steps)
            images, labels = batch["image"].to(device), batch["age_group"].to(device)
            logits = net(images)
            distance = divergence(logits, teacher(images), config.temperature)
            to_labels = F.cross_entropy(logits, labels)
            loss = -distance if leaving else config.label_weight * to_labels + config.return_weight * distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()


def divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean KL divergence of the softened answers from the softened target, in the scale of the gradients at T = 1."""
    answers, target = ((each / temperature).log_softmax(-1) for each in (logits, target))
    return F.kl_div(answers, target, reduction="batchmean", log_target=True) * temperature**2


def learning_rate(config: Config, done: int, steps: int) -> float:
    return config.learning_rate * 0.1 ** sum(done >= part * steps for part in config.drops)
