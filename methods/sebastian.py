"""Redraw the smallest 99% of the network's weights, then fine-tune towards the labels and the original's certainty.

By Sebastian Oleszko, 4th in the NeurIPS 2023 Unlearning Challenge:
https://www.kaggle.com/competitions/neurips-2023-machine-unlearning/discussion/459148. Published scores: 0.0863 private,
0.0932 public. The weights of all layers are ranked together, biases among them, but biases that are pruned stay 0, as in
the published code. Our choice: the classes are counted in a pass over the retain set (the published code reads the
counts from the competition's file).
"""

import copy
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

    share: Annotated[float, (0.1, 0.99)] = 0.99  # the part of all weights of convolutions and linear layers that is redrawn
    epochs: Annotated[float, (0.2, 1.5)] = 3.2  # over the retain set, parts allowed
    learning_rate: Annotated[float, (1e-3, 5e-1, "log")] = 5e-4  # constant
    class_power: float = -0.1  # a class of n retain examples has weight n to this power
    entropy_weight: Annotated[float, (0.1, 3.0, "log")] = 1.0  # of the difference from the original's entropy
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of SGD

    def __post_init__(self):
        for rule in (
            "0 <= share <= 1",
            "0 < epochs < 1e9",
            "0 <= learning_rate < 1e9",
            "-1e9 < class_power < 1e9",
            "0 <= entropy_weight < 1e9",
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
    teacher = copy.deepcopy(members[0]).eval().requires_grad_(False)
    labels = torch.cat([batch["age_group"] for batch in retain_loader]).to(device)
    last = layers(teacher, nn.Linear)[-1]
    counts = labels.bincount(minlength=last.out_features).to(last.weight) / len(members)
    class_weights = counts.clamp(min=1) ** config.class_power
    for member, generator in zip(members, generators, strict=True):
        damage(member, config.share, generator)

    steps = max(1, round(config.epochs * len(retain_loader)))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    net.train()
    for batch in islice(chain.from_iterable(repeat(retain_loader)), steps):
        images, labels = batch["image"].to(device), batch["age_group"].to(device)
        logits = net(images)
        loss = label_loss(logits, labels, class_weights, len(members))
        loss = loss + config.entropy_weight * F.mse_loss(entropy(logits), entropy(teacher(images)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    round_to_half(net)
    net.eval()


def layers(net: nn.Module, kind: type) -> list:
    """A network's layers of a kind, in order. Raises ValueError if there is none."""
    found = [layer for layer in net.modules() if isinstance(layer, kind)]
    if not found:
        raise ValueError(f"this method needs a layer of type {kind.__name__}, and the network has none")
    return found


@torch.no_grad()
def damage(net: nn.Module, share: float, generator: torch.Generator | None) -> None:
    """Redraw the `share` of all weights with the smallest absolute values, uniformly within ±1/√fan_in, in place."""
    damaged = [layer for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    tensors = [tensor for layer in damaged for tensor in (layer.weight, layer.bias) if tensor is not None]
    sizes = torch.cat([tensor.abs().flatten() for tensor in tensors])
    if count := round(share * len(sizes)):
        largest_redrawn = sizes.kthvalue(count).values
        for tensor in tensors:
            fresh = tensor.new_zeros(tensor.shape)
            if tensor.dim() > 1:
                bound = tensor[0].numel() ** -0.5
                fresh.uniform_(-bound, bound, generator=generator)
            tensor.copy_(torch.where(tensor.abs() <= largest_redrawn, fresh, tensor))


def label_loss(logits: Tensor, labels: Tensor, class_weights: Tensor, size: int = 1) -> Tensor:
    """Cross-entropy with class weights, averaged over the `size` networks whose batches follow one another."""
    losses = F.cross_entropy(logits, labels, class_weights, reduction="none").view(size, -1)
    return (losses.sum(1) / class_weights[labels].view(size, -1).sum(1)).mean()


def entropy(logits: Tensor) -> Tensor:
    predicted = logits.log_softmax(-1)
    return -(predicted.exp() * predicted).sum(-1)


@torch.no_grad()
def round_to_half(net: nn.Module) -> None:
    """Round every value to one that half precision can hold; what is too large for it, a variance of batch norm, stays."""
    for tensor in chain(net.parameters(), net.buffers()):
        if tensor.is_floating_point():
            rounded = tensor.half().to(tensor.dtype)
            tensor.copy_(torch.where(rounded.isfinite(), rounded, tensor))
