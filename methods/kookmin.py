"""Re-initialise the convolution weights that matter least to telling retain from forget, then fine-tune mostly those.

By the Kookmin University team, 2nd in the NeurIPS 2023 Unlearning Challenge:
https://www.kaggle.com/competitions/neurips-2023-machine-unlearning/discussion/459200. Published private score: 0.0902.
How much a weight matters is the size of its gradient of the loss on random retain examples less the loss on the forget
set; which examples are drawn is what makes runs differ. Our choices: the network is in evaluation mode for these
gradients, so that batch norm's statistics stay the original's, and as many retain batches are drawn as there are forget
batches (published: as many examples).
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

    share: Annotated[float, (0.05, 0.9)] = 0.3  # the part of each convolution's weights that is re-initialised
    kept_gradient: Annotated[float, (0.01, 1.0, "log")] = 0.1  # what the other weights' gradients are multiplied by
    epochs: Annotated[float, (0.2, 1.6)] = 5  # over the retain set, parts allowed
    learning_rate: Annotated[float, (1e-3, 5e-1, "log")] = 1e-3  # the highest
    shape: tuple[float, ...] = (1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)  # times the highest, in equal parts of the training
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of SGD

    def __post_init__(self):
        for rule in (
            "0 <= share <= 1",
            "0 <= kept_gradient < 1e9",
            "0 < epochs < 1e9",
            "0 <= learning_rate < 1e9",
            "len(shape) > 0 and all(0 <= factor < 1e9 for factor in shape)",
            "0 <= momentum < 1",
            "0 <= weight_decay < 1e9",
        ):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    device = next(net.parameters()).device
    members = getattr(net, "members", [net])  # K networks trained as one, or the one there is
    generators = getattr(net, "generators", [None])  # where each draws its randomness; None: torch's global generator
    accumulate_gradients(net, retain_loader, forget_loader)
    # A parameter of K networks as one holds theirs one after the other.
    gradients = {name: parameter.grad.unflatten(0, (len(members), -1)) for name, parameter in net.named_parameters()}
    each = [
        damage(member, {name: gradient[k] for name, gradient in gradients.items()}, config, generator)
        for k, (member, generator) in enumerate(zip(members, generators, strict=True))
    ]
    scales = {name: torch.cat([scales[name] for scales in each]) for name in each[0]}

    steps = max(1, round(config.epochs * len(retain_loader)))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    net.train()
    for done, batch in enumerate(islice(chain.from_iterable(repeat(retain_loader)), steps)):
        optimizer.param_groups[0]["lr"] = config.learning_rate * config.shape[done * len(config.shape) // steps]
        loss = F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device))
        optimizer.zero_grad()
        loss.backward()
        for name, scale in scales.items():
            net.get_parameter(name).grad.mul_(scale)
        optimizer.step()
    net.eval()


def accumulate_gradients(net: nn.Module, retain_loader, forget_loader) -> None:
    """Leave in `.grad` the gradient of the loss on random retain batches less that on as many forget batches."""
    device = next(net.parameters()).device
    net.eval()
    net.zero_grad()
    for sign, batches in ((1, islice(retain_loader, len(forget_loader))), (-1, forget_loader)):
        for batch in batches:
            (sign * F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device))).backward()


@torch.no_grad()
def damage(
    net: nn.Module, gradients: dict[str, Tensor], config: Config, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Re-initialise the share of each convolution's weights with the smallest gradients, in place.

    Returns what each convolution's gradients are to be multiplied by from now on.
    """
    scales = {}
    for name, parameter in net.named_parameters():
        if parameter.dim() < 4:  # not a convolution
            continue
        # A stable order: in a layer with 1x1 maps most weights only meet the padding, and all their gradients are 0.
        smallest = gradients[name].abs().flatten().argsort(stable=True)[: round(config.share * parameter.numel())]
        redrawn = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
        redrawn = redrawn.index_fill(0, smallest, True).view(parameter.shape)
        fresh = parameter.new_empty(parameter.shape)
        nn.init.kaiming_normal_(fresh, mode="fan_out", nonlinearity="relu", generator=generator)
        parameter.copy_(torch.where(redrawn, fresh, parameter))
        scales[name] = torch.ones_like(parameter).masked_fill_(~redrawn, config.kept_gradient)
    if not scales:
        raise ValueError("this method needs a layer of type Conv2d, and the network has none")
    return scales
