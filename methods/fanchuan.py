"""Make the forget set's outputs uniform, then alternate: contrast them with the retain set's, repair on the retain set.

By fanchuan, 1st in the NeurIPS 2023 Unlearning Challenge:
https://www.kaggle.com/competitions/neurips-2023-machine-unlearning/discussion/458721. Published private score: 0.0985;
a later rerun, outside the ranking, with a symmetric divergence in the first pass (reverse=0.85) had 0.1068. Our
addition: there may be fewer epochs than rounds, and each round then repairs on a part of the retain set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

ENSEMBLE = True  # K networks trained as one give what each gives alone


@dataclass(frozen=True)
class Config:
    """Published values; in brackets, what tuning may try (linear, or "log")."""

    # First: one pass over the forget set, towards uniform outputs.
    uniform_rate: Annotated[float, (1e-4, 1e-1, "log")] = 5e-3  # learning rate
    reverse: float = 0.0  # weight of the reverse divergence, which is added; 0.85 in the later rerun

    # Then, in each round: one pass over the forget set against the retain set, and a part of the epochs on the retain set.
    rounds: Annotated[int, (1, 8)] = 8  # of contrast and repair
    contrast_rate: Annotated[float, (1e-5, 1e-1, "log")] = 3e-4  # at first; falls along half a cosine, step by step
    contrast_rate_at_last: float = 1e-6  # what it falls to
    temperature: float = 1.15  # of the similarities between outputs
    epochs: Annotated[float, (0.2, 1.5)] = 8  # over the retain set, in all rounds together, parts allowed
    repair_rate: Annotated[float, (1e-3, 5e-1, "log")] = 4e-3  # learning rate, constant
    repair_decay: float = 1e-2  # weight decay of the repair; the other two have none
    retain_batch: Annotated[int, [4, 1]] = 4  # times the loader's batch size: 256 where that is 64
    momentum: float = 0.9  # of SGD

    def __post_init__(self):
        for rule in (
            "0 <= uniform_rate < 1e9",
            "0 <= reverse < 1e9",
            "rounds >= 0 and rounds % 1 == 0",
            "0 <= contrast_rate < 1e9",
            "0 <= contrast_rate_at_last < 1e9",
            "0 < temperature < 1e9",
            "0 < epochs < 1e9",
            "0 <= repair_rate < 1e9",
            "0 <= repair_decay < 1e9",
            "retain_batch > 0 and retain_batch % 1 == 0",
            "0 <= momentum < 1",
        ):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    device = next(net.parameters()).device
    size = len(getattr(net, "members", [net]))  # K networks trained as one, or the one there is
    retain_loader = rebatched(retain_loader, config.retain_batch * retain_loader.batch_size)
    # Three optimizers, as each keeps a momentum of its own from round to round.
    uniform, contrast, repair = (
        torch.optim.SGD(net.parameters(), lr=rate, momentum=config.momentum, weight_decay=decay, fused=True)
        for rate, decay in (
            (config.uniform_rate, 0.0),
            (config.contrast_rate, 0.0),
            (config.repair_rate, config.repair_decay),
        )
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        contrast, T_max=config.rounds * len(forget_loader), eta_min=config.contrast_rate_at_last
    )
    net.train()
    for batch in forget_loader:
        step(uniform, uniform_loss(net(batch["image"].to(device)), config.reverse))
    for batches in parts(retain_loader, config.epochs, config.rounds):
        for forget, retain in zip(forget_loader, retain_loader, strict=False):
            forget_logits, retain_logits = net(forget["image"].to(device)), net(retain["image"].to(device)).detach()
            step(contrast, contrastive_loss(forget_logits, retain_logits, config.temperature, size))
            schedule.step()
        for batch in batches:
            step(repair, F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device)))
    net.eval()


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def uniform_loss(logits: Tensor, reverse: float = 0.0) -> Tensor:
    """Divergence of the softmax from the uniform distribution; with `reverse`, plus that much of its mirror image."""
    predicted = logits.log_softmax(-1)
    uniform = torch.full_like(predicted, 1 / predicted.shape[-1])
    loss = F.kl_div(predicted, uniform, reduction="batchmean")
    return loss + reverse * F.kl_div(uniform.log(), predicted.exp(), reduction="batchmean") if reverse else loss


def contrastive_loss(forget_logits: Tensor, retain_logits: Tensor, temperature: float, size: int = 1) -> Tensor:
    """Low when a forget output is as similar to every retain output of the batch; each of `size` networks has its own."""
    forget, retain = (logits.unflatten(0, (size, -1)) for logits in (forget_logits, retain_logits))
    return -(forget @ retain.transpose(1, 2) / temperature).log_softmax(-1).mean()


def parts(loader, epochs: float, count: int) -> Iterator[Iterator[dict]]:
    """`count` equal parts of `epochs` passes over a loader."""
    endless = chain.from_iterable(repeat(loader))
    for _ in range(count):
        yield islice(endless, max(1, round(epochs / count * len(loader))))


def rebatched(loader, batch_size: int):
    """The same examples, shuffled, in batches of another size."""
    if hasattr(loader, "with_batch_size"):  # keeps each network's own order
        return loader.with_batch_size(batch_size)
    return torch.utils.data.DataLoader(loader.dataset, batch_size=batch_size, shuffle=True)
