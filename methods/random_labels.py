"""Random labels: train on the retain set, and on the forget set with wrong labels.

From Golatkar et al. (CVPR 2020), https://arxiv.org/abs/1911.04933; epochs, momentum and weight decay are those of Fan et
al. (ICLR 2024), https://arxiv.org/abs/2310.12508, who use it as a baseline. Not scored in the competition. Our choices:
the learning rate (theirs: 0.013, with batches of 256); a label is drawn from the wrong ones, and anew each time an
example is seen; every batch has retain and forget examples in the proportion of the two sets.
"""

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
    """Published values, or (our choice); in brackets, what tuning may try (linear, or "log")."""

    epochs: Annotated[float, (0.2, 1.9)] = 10  # over retain and forget set together, parts allowed
    learning_rate: Annotated[float, (1e-3, 0.3, "log")] = 0.1  # at first (our choice; published: 0.013)
    decay: Annotated[float, (0.0, 1.0)] = 0.0  # the part of the learning rate that is lost by the end (published: none)
    forget_times: Annotated[int, (1, 4)] = 1  # how often the forget set is seen in an epoch (published: once)
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of SGD

    def __post_init__(self):
        for rule in (
            "0 < epochs < 1e9",
            "0 <= learning_rate < 1e9",
            "0 <= decay <= 1",
            "forget_times > 0 and forget_times % 1 == 0",
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
    classes = layers(members[0], nn.Linear)[-1].out_features
    steps = max(1, round(config.epochs * len(retain_loader)))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    forget_loader = as_long_as(retain_loader, forget_loader, config.forget_times)
    retain_batches, forget_batches = (chain.from_iterable(repeat(loader)) for loader in (retain_loader, forget_loader))
    net.train()
    for done, (retain, forget) in enumerate(islice(zip(retain_batches, forget_batches, strict=False), steps)):
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - config.decay * done / steps)
        wrong = wrong_labels(forget["age_group"].to(device), classes, generators)
        images = side_by_side(retain["image"].to(device), forget["image"].to(device), len(members))
        labels = side_by_side(retain["age_group"].to(device), wrong, len(members))
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()


def layers(net: nn.Module, kind: type) -> list:
    """A network's layers of a kind, in order. Raises ValueError if there is none."""
    found = [layer for layer in net.modules() if isinstance(layer, kind)]
    if not found:
        raise ValueError(f"this method needs a layer of type {kind.__name__}, and the network has none")
    return found


def wrong_labels(labels: Tensor, classes: int, generators: list) -> Tensor:
    """A label drawn uniformly from the others, for each; each network's part from its own generator."""
    parts = labels.chunk(len(generators))
    shifts = [
        torch.randint(1, classes, part.shape, generator=generator, device=part.device)
        for part, generator in zip(parts, generators, strict=True)
    ]
    return (labels + torch.cat(shifts)) % classes


def as_long_as(retain_loader, forget_loader, times: int):
    """The forget set in batches of such a size that it is seen `times` times while the retain set is seen once."""
    size = max(1, round(times * len(forget_loader.dataset) / len(retain_loader)))
    if hasattr(forget_loader, "with_batch_size"):
        return forget_loader.with_batch_size(size)
    return DataLoader(forget_loader.dataset, size, shuffle=True, num_workers=forget_loader.num_workers)


def side_by_side(first: Tensor, second: Tensor, size: int) -> Tensor:
    """Two batches as one. Each holds the batches of `size` networks one after the other, and so does the result."""
    return torch.cat([first.unflatten(0, (size, -1)), second.unflatten(0, (size, -1))], dim=1).flatten(0, 1)
