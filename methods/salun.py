"""SalUn: random labels on the forget set, changing only the weights that matter to it.

From Fan et al. (ICLR 2024), https://arxiv.org/abs/2310.12508. The salient half of the weights, by the gradient of the
loss on the forget set, is trained: in each round on the forget set with random labels, then on the retain set. The other
half is kept to the bit. Not scored in the competition. Our choices: the learning rate (theirs: 0.013, with batches of
256), which may fall; the rounds share the epochs, which need not be whole.
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
    """Published values, or (our choice); in brackets, what tuning may try (linear, or "log")."""

    share: Annotated[float, (0.05, 0.95)] = 0.5  # the part of the weights that is trained
    rounds: Annotated[int, (1, 4)] = 10  # of forgetting and repairing
    epochs: Annotated[float, (0.2, 1.3)] = 10  # over the retain set, in all rounds together, parts allowed
    forget_epochs: Annotated[float, (0.25, 2.0)] = 1  # over the forget set, in each round
    learning_rate: Annotated[float, (1e-3, 0.3, "log")] = 0.1  # at first (our choice; published: 0.013)
    decay: Annotated[float, (0.0, 1.0)] = 0.0  # the part of the learning rate that is lost by the end (published: none)
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of SGD

    def __post_init__(self):
        for rule in (
            "0 <= share <= 1",
            "rounds > 0 and rounds % 1 == 0",
            "0 < epochs < 1e9",
            "0 < forget_epochs < 1e9",
            "0 <= learning_rate < 1e9",
            "0 <= decay <= 1",
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
    masks = salient(net, forget_loader, config.share, len(members))
    optimizer = torch.optim.SGD(net.parameters(), lr=config.learning_rate, momentum=config.momentum, fused=True)
    retain_batches, forget_batches = (chain.from_iterable(repeat(loader)) for loader in (retain_loader, forget_loader))
    steps = max(config.rounds, round(config.epochs * len(retain_loader)))
    forget_steps = max(1, round(config.forget_epochs * len(forget_loader)))
    net.train()
    for turn in range(config.rounds):
        start, end = (steps * part // config.rounds for part in (turn, turn + 1))
        forget = ((start, batch, True) for batch in islice(forget_batches, forget_steps))
        repair = ((done, batch, False) for done, batch in enumerate(islice(retain_batches, end - start), start))
        for done, batch, forgetting in chain(forget, repair):
            optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - config.decay * done / steps)
            labels = batch["age_group"].to(device)
            if forgetting:
                labels = random_labels(labels, classes, generators)
            optimizer.zero_grad()
            F.cross_entropy(net(batch["image"].to(device)), labels).backward()
            for name, parameter in net.named_parameters():
                # Weight decay belongs in here, or it would move the weights that are kept.
                parameter.grad.add_(parameter.detach(), alpha=config.weight_decay).mul_(masks[name])
            optimizer.step()
    net.eval()


def layers(net: nn.Module, kind: type) -> list:
    """A network's layers of a kind, in order. Raises ValueError if there is none."""
    found = [layer for layer in net.modules() if isinstance(layer, kind)]
    if not found:
        raise ValueError(f"this method needs a layer of type {kind.__name__}, and the network has none")
    return found


def salient(net: nn.Module, forget_loader, share: float, size: int = 1) -> dict[str, Tensor]:
    """1 for the `share` of each network's weights with the largest gradients on the forget set, 0 for the rest.

    A weight without any gradient is never among them. size: how many networks are trained as one.
    """
    device = next(net.parameters()).device
    net.eval()
    net.zero_grad()
    for batch in forget_loader:
        F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device)).backward()  # gradients add up
    totals = {name: parameter.grad.abs() for name, parameter in net.named_parameters()}
    of_each = torch.cat([total.reshape(size, -1) for total in totals.values()], dim=1)  # [networks, weights]
    kept = of_each.shape[1] - round(share * of_each.shape[1])
    limits = of_each.kthvalue(kept, dim=1).values if kept else of_each.new_full([size], -1.0)
    return {
        name: (total.unflatten(0, (size, -1)) > limits.view(size, *[1] * total.dim())).flatten(0, 1).to(total.dtype)
        for name, total in totals.items()
    }


def random_labels(labels: Tensor, classes: int, generators: list) -> Tensor:
    """Any label, drawn anew for each example; each network's part from its own generator."""
    parts = zip(labels.chunk(len(generators)), generators, strict=True)
    drawn = [torch.randint(classes, part.shape, generator=generator, device=part.device) for part, generator in parts]
    return torch.cat(drawn)
