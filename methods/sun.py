"""Reset the last layer; train random parts of the network, after a little noise; at the end train all of it.

By Sun, 7th in the NeurIPS 2023 Unlearning Challenge:
https://www.kaggle.com/competitions/neurips-2023-machine-unlearning/discussion/459095. Its score was not published. This
follows the port in https://github.com/xcadet/deepunlearn (munl/unlearning/kgltop7.py). There, the first round trains
random parts already (in the write-up: the whole network); norm layers are recognised by "bn" in their names, so that
those of a ResNet's projection shortcuts are among the random parts; and a tensor that was drawn before gets no noise. Our
addition: there may be fewer epochs than rounds.
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

    rounds: Annotated[int, (1, 5)] = 5  # with random tensors, the first without noise; published: an epoch each
    tensors: Annotated[int, (2, 28)] = 9  # drawn in each round; trained together with all norm layers
    noisy: int = 6  # how many of them get noise first, at most
    noise: Annotated[float, (0.005, 0.5, "log")] = 0.04  # its standard deviation
    learning_rate: Annotated[float, (1e-3, 3e-1, "log")] = 2e-4  # in the rounds with random tensors
    last_factors: tuple[float, ...] = (1, 1, 1, 5)  # of the learning rate, in the last rounds, which train everything
    epochs: Annotated[float, (0.2, 1.6)] = 9  # over the retain set, in all rounds together, parts allowed
    momentum: float = 0.9  # of SGD; starts anew in each round
    weight_decay: float = 5e-4  # of SGD

    def __post_init__(self):
        for rule in (
            "rounds >= 0 and rounds % 1 == 0",
            "tensors >= 0 and tensors % 1 == 0",
            "noisy >= 0 and noisy % 1 == 0",
            "0 <= noise < 1e9",
            "0 <= learning_rate < 1e9",
            "rounds + len(last_factors) > 0 and all(0 <= factor < 1e9 for factor in last_factors)",
            "0 < epochs < 1e9",
            "0 <= momentum < 1",
            "0 <= weight_decay < 1e9",
        ):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    members = getattr(net, "members", [net])  # K networks trained as one, or the one there is
    generators = getattr(net, "generators", [None])  # where each draws its randomness; None: torch's global generator
    for member, generator in zip(members, generators, strict=True):
        reset(member, generator)
    rates = [1] * config.rounds + list(config.last_factors)
    steps = max(1, round(config.epochs / len(rates) * len(retain_loader)))
    batches = chain.from_iterable(repeat(retain_loader))
    trained_before = [set() for _ in members]
    net.train()
    for index, rate in enumerate(rates):
        masks = None
        if index < config.rounds:
            chosen = [
                choose(member, config, generator, before, with_noise=index > 0)
                for member, generator, before in zip(members, generators, trained_before, strict=True)
            ]
            masks = {}
            for name, parameter in net.named_parameters():  # of K networks as one: theirs one after the other
                trained = torch.tensor([name in each for each in chosen], device=parameter.device)
                masks[name] = trained.repeat_interleave(len(parameter) // len(members))
        train(net, islice(batches, steps), config.learning_rate * rate, masks, config)
    net.eval()


@torch.no_grad()
def reset(net: nn.Module, generator: torch.Generator | None) -> None:
    """Redraw the last layer as PyTorch initialises it, in place."""
    last = layers(net, nn.Linear)[-1]
    bound = last.in_features**-0.5
    for parameter in last.parameters():
        parameter.uniform_(-bound, bound, generator=generator)


def layers(net: nn.Module, kind: type) -> list:
    """A network's layers of a kind, in order. Raises ValueError if there is none."""
    found = [layer for layer in net.modules() if isinstance(layer, kind)]
    if not found:
        raise ValueError(f"this method needs a layer of type {kind.__name__}, and the network has none")
    return found


@torch.no_grad()
def choose(
    net: nn.Module, config: Config, generator: torch.Generator | None, before: set[str], with_noise: bool
) -> set[str]:
    """The names of one network's parameter tensors that are trained in a round; some of them get noise, in place.

    before: those drawn in earlier rounds; this round's are added.
    """
    parameters = dict(net.named_parameters())
    norms = norm_parameters(net)
    pool = [name for name in parameters if name not in norms]
    where = generator.device if generator else "cpu"
    drawn = [pool[i] for i in torch.randperm(len(pool), generator=generator, device=where)[: config.tensors].tolist()]
    if with_noise:
        for name in drawn[: config.noisy]:
            if name not in before:
                parameter = parameters[name]
                noise = parameter.new_empty(parameter.shape).normal_(generator=generator)
                parameter.add_(noise, alpha=config.noise)
    before.update(drawn)
    return norms.union(drawn)


def norm_parameters(net: nn.Module) -> set[str]:
    """The names of the norm layers' parameters, without those of projection shortcuts."""
    return {
        f"{layer_name}.{name}"
        for layer_name, layer in net.named_modules()
        if isinstance(layer, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)) and "downsample" not in layer_name
        for name, _ in layer.named_parameters()
    }


def train(net: nn.Module, batches, rate: float, masks: dict[str, Tensor] | None, config: Config) -> None:
    """Fine-tune; masks: for each parameter 1 for the first-axis entries to train, 0 for those to leave as they are."""
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=config.momentum, fused=True)
    for batch in batches:
        loss = F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device))
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                # Weight decay goes here, and not into the optimizer, so that the mask covers it too.
                parameter.grad.add_(parameter, alpha=config.weight_decay)
                if masks:
                    parameter.grad.mul_(masks[name].view(-1, *[1] * (parameter.dim() - 1)))
        optimizer.step()
