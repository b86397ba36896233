"""Bad Teacher: learn the forget set's outputs from an untrained network, the retain set's from the original.

From Chundawat et al. (AAAI 2023), https://arxiv.org/abs/2205.08096. Not scored in the competition. Our choices: every
batch has retain and forget examples in the same proportion (published: as shuffling both together gives); each epoch
uses another part of the retain set; each run has an untrained network of its own, which takes its batch norm statistics
from a first batch, as the competition's images are not normalised.
"""

import copy
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

ENSEMBLE = True  # K networks trained as one give what each gives alone


@dataclass(frozen=True)
class Config:
    """Published values; in brackets, what tuning may try (linear, or "log")."""

    epochs: Annotated[float, (0.3, 4.0)] = 1  # over the forget set and the part of the retain set, parts allowed
    retain_part: Annotated[float, (0.1, 1.0)] = 0.3  # the part of the retain set that an epoch uses, drawn at random
    learning_rate: Annotated[float, (1e-4, 3e-2, "log")] = 1e-4  # of Adam
    temperature: Annotated[float, (0.5, 4.0, "log")] = 1.0  # of the outputs compared
    batch_size: Annotated[int, (32, 256)] = 256  # retain and forget examples together

    def __post_init__(self):
        for rule in (
            "0 < epochs < 1e9",
            "0 < retain_part <= 1",
            "0 <= learning_rate < 1e9",
            "0 < temperature < 1e9",
            "batch_size > 1 and batch_size % 1 == 0",
        ):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    device = next(net.parameters()).device
    members = getattr(net, "members", [net])  # K networks trained as one, or the one there is
    generators = getattr(net, "generators", [None])  # where each draws its randomness; None: torch's global generator
    good = copy.deepcopy(members[0]).eval().requires_grad_(False)  # every member starts as the original
    first = next(iter(retain_loader))["image"].to(device)
    bad = [
        untrained(good, images, generator) for images, generator in zip(first.chunk(len(members)), generators, strict=True)
    ]

    count = len(forget_loader.dataset) + config.retain_part * len(retain_loader.dataset)  # of examples in an epoch
    forget_size = min(config.batch_size - 1, max(1, round(config.batch_size * len(forget_loader.dataset) / count)))
    retain_batches = batches(retain_loader, config.batch_size - forget_size)
    forget_batches = batches(forget_loader, forget_size)
    steps = max(1, round(config.epochs * count / config.batch_size))
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True)
    net.train()
    for retain, forget in islice(zip(retain_batches, forget_batches, strict=False), steps):
        retain, forget = retain["image"].to(device), forget["image"].to(device)
        bad_answers = torch.cat([teacher(images) for teacher, images in zip(bad, forget.chunk(len(bad)), strict=True)])
        target = side_by_side(good(retain), bad_answers, len(members))
        loss = divergence(net(side_by_side(retain, forget, len(members))), target, config.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()


@torch.no_grad()
def untrained(net: nn.Module, images: Tensor, generator: torch.Generator | None) -> nn.Module:
    """A freshly initialised copy of `net`, whose batch norm statistics are those of `images`."""
    fresh = copy.deepcopy(net).train()
    for layer in fresh.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.Linear):
            for parameter in layer.parameters():
                parameter.uniform_(-(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)
        elif isinstance(layer, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            layer.reset_parameters()
        else:  # of transformers: attention, tokens, positions and scales begin near 0
            for parameter in layer.parameters(recurse=False):
                parameter.normal_(std=0.02, generator=generator)
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0  # what is seen last replaces what was there
    fresh(images)
    return fresh.eval()


def divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean KL divergence of the softened answers from the softened target."""
    answers, target = ((each / temperature).log_softmax(-1) for each in (logits, target))
    return F.kl_div(answers, target, reduction="batchmean", log_target=True)


def batches(loader, size: int):
    """Batches of another size, without end."""
    if hasattr(loader, "with_batch_size"):
        return chain.from_iterable(repeat(loader.with_batch_size(size)))
    return chain.from_iterable(repeat(DataLoader(loader.dataset, size, shuffle=True, num_workers=loader.num_workers)))


def side_by_side(first: Tensor, second: Tensor, size: int) -> Tensor:
    """Two batches as one. Each holds the batches of `size` networks one after the other, and so does the result."""
    return torch.cat([first.unflatten(0, (size, -1)), second.unflatten(0, (size, -1))], dim=1).flatten(0, 1)
