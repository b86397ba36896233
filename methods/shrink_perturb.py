"""Shrink the weights, add fresh ones, learn the retain set again, and set the confidence by the validation set.

Ours. The parts are known: shrink and perturb (Ash and Adams, NeurIPS 2020, https://arxiv.org/abs/1910.08475), a learning
rate that rises and falls (Smith and Topin, https://arxiv.org/abs/1708.07120) and vector scaling (Guo et al., ICML 2017,
https://arxiv.org/abs/1706.04599). docs/experiments.md says what else was tried.

What is left of the old weights makes learning faster than from scratch and is too little to remember single images. Still,
a network that learnt for a fifth of the time is less confident than a retrained one. How much is seen on the validation set,
which neither the original nor this network was trained on: the last layer is scaled, and its biases moved, until both are as
confident there on the classes of the forget set. Of the forget set only the labels are used.

No value has to be tuned to the data: how long to learn follows from the number of training steps, which batch norm counts.
"""

import math
from dataclasses import dataclass
from itertools import chain, islice, repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ENSEMBLE = True  # K networks trained as one give what each gives alone
NORM_LAYERS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)

# How much of the original's training fits into a fifth of its cost. A step of a small network takes hardly longer with
# twice the images (on a CPU 1.3 to 1.5 times at 45,000 weights), so it sees more of them in the same time.
PART = 0.18  # of the epochs, in batches of the loader's size
SMALL, SMALL_PART = 300_000, 0.25  # networks of fewer weights: in batches of twice that size


@dataclass(frozen=True)
class Config:
    """Chosen on public forget sets of two data sets, the same for both; there is nothing to tune."""

    kept: float = 0.4  # of the old weights; fresh ones make up for the variance that is lost
    learning_rate: float = 0.1  # at its highest
    rise: float = 0.2  # part of the steps in which it rises to that; then it falls to 0, both linearly
    epochs: float = 0  # over the retain set, parts allowed; 0: by the rule above
    original_epochs: float = 30  # of the original's training, where no batch norm has counted its steps
    momentum: float = 0.9  # of SGD, Nesterov's
    weight_decay: float = 5e-4  # of SGD
    calibrate: bool = True  # whether to set the confidence by the validation set
    scale_cost: float = 40  # of a changed scale, which changes the spread over the runs too; the biases do not
    bias_cost: float = 0.1  # of biases, which few validation images of a class would set at random

    def __post_init__(self):
        for rule in (
            "0 <= kept <= 1",
            "0 <= learning_rate < 1e9",
            "0 < rise < 1",
            "0 <= epochs < 1e9",
            "0 < original_epochs < 1e9",
            "0 < momentum < 1",
            "0 <= weight_decay < 1e9",
            "calibrate in (False, True)",
            "0 < scale_cost < 1e9",
            "0 < bias_cost < 1e9",
        ):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    members = getattr(net, "members", [net])  # K networks trained as one, or the one there is
    generators = getattr(net, "generators", [None])  # where each draws its randomness; None: torch's global generator
    loader, steps = budget(members[0], retain_loader, forget_loader, config)
    if config.calibrate:
        last_layer(members[0])  # refuses a network that cannot be corrected before anything is trained
        logits, labels = answers(members[0], val_loader, 1, len(members))  # every member still is the original
        of_class, mean = classes(labels, logits.shape[-1])
        aim = (mean @ confidences(logits, of_class)[..., None]).squeeze(-1)
    for member, generator in zip(members, generators):
        shrink_and_perturb(member, config.kept, generator)
    learn(net, loader, steps, config, len(members))
    net.eval()
    if config.calibrate:
        calibrate(net, members, aim, val_loader, forget_loader, config)


def budget(net: nn.Module, retain_loader, forget_loader, config: Config) -> tuple[object, int]:
    """(the loader to learn from, the number of steps)."""
    small = sum(parameter.numel() for parameter in net.parameters()) < SMALL
    loader = rebatched(retain_loader, 2 * retain_loader.batch_size) if small else retain_loader
    if config.epochs:
        return loader, max(1, round(config.epochs * len(loader)))
    counters = (buffer for name, buffer in net.named_buffers() if name.endswith("num_batches_tracked"))
    examples = len(retain_loader.dataset) + len(forget_loader.dataset)
    epochs = (
        next(counters, torch.tensor(0)).item() / math.ceil(examples / retain_loader.batch_size) or config.original_epochs
    )
    return loader, max(1, round((SMALL_PART if small else PART) * epochs * len(loader)))


def rebatched(loader, batch_size: int):
    """The same examples, shuffled, in batches of another size."""
    if hasattr(loader, "with_batch_size"):  # keeps each network's own order
        return loader.with_batch_size(batch_size)
    return torch.utils.data.DataLoader(loader.dataset, batch_size=batch_size, shuffle=True)


@torch.no_grad()
def shrink_and_perturb(net: nn.Module, kept: float, generator: torch.Generator | None) -> None:
    """Each weight becomes kept · old + √(1 − kept²) · fresh; of batch norm, kept · old + (1 − kept) · fresh."""
    for layer in net.modules():
        for name, old in layer.named_parameters(recurse=False):
            fresh = initialised_like(old, layer, name, generator)
            constant = isinstance(layer, NORM_LAYERS)
            old.mul_(kept).add_(fresh, alpha=1 - kept if constant else math.sqrt(1 - kept**2))


def initialised_like(tensor: Tensor, layer: nn.Module, name: str, generator: torch.Generator | None) -> Tensor:
    """A new value, drawn as torchvision initialises this parameter of a ResNet; what only transformers have, near 0."""
    fresh = tensor.new_empty(tensor.shape)  # plain layout: a channels_last one would be filled in another order
    if isinstance(layer, nn.Conv2d) and name == "weight":
        return nn.init.kaiming_normal_(fresh, mode="fan_out", nonlinearity="relu", generator=generator)
    if isinstance(layer, nn.Linear):
        return fresh.uniform_(-(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)
    if isinstance(layer, (nn.Conv2d, *NORM_LAYERS)):
        return fresh.fill_(1.0 if name == "weight" else 0.0)
    return fresh.normal_(std=0.02, generator=generator)


def learn(net: nn.Module, loader, steps: int, config: Config, size: int) -> None:
    """Minimise cross-entropy on the retain set; `size` networks learn as one."""
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=True,
        weight_decay=config.weight_decay,
        fused=True,
    )
    net.train()
    for done, batch in enumerate(islice(chain.from_iterable(repeat(loader)), steps)):
        position = (done + 0.5) / steps
        height = position / config.rise if position < config.rise else (1 - position) / (1 - config.rise)
        optimizer.param_groups[0]["lr"] = config.learning_rate * height
        if len(batch["age_group"]) == size:  # batch norm needs more than one image
            continue
        loss = F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def answers(net: nn.Module, loader, size: int, parts: int) -> tuple[Tensor, Tensor]:
    """The logits [size, images, classes] and labels [size, images] of a loader whose batches have `parts` networks' images.

    size: `parts` networks as one answer all of a batch, each its own part; one network answers the first part.
    """
    device = next(net.parameters()).device
    net.eval()
    logits, labels = [], []
    for batch in loader:
        count = len(batch["age_group"]) // parts * size
        logits.append(net(batch["image"][:count].to(device)).double().unflatten(0, (size, -1)))
        labels.append(batch["age_group"][:count].to(device).unflatten(0, (size, -1)))
    return torch.cat(logits, 1), torch.cat(labels, 1)


@torch.no_grad()
def calibrate(net, members, aim: Tensor, val_loader, forget_loader, config: Config) -> None:
    """Scale the last layer and move its biases until the validation images of each class are as confident as `aim`
    [1, classes]; what a class weighs is its share of the forget set. The costs are those of ridge regression."""
    logits, labels = answers(net, val_loader, len(members), len(members))
    of_class, mean = classes(labels, logits.shape[-1])
    forget = torch.cat([batch["age_group"].chunk(len(members))[0] for batch in forget_loader]).to(logits.device)
    weight = torch.bincount(forget, minlength=logits.shape[-1]) / len(forget) * of_class.any(1)  # [K, classes]
    values = logits.new_zeros(len(members), 1 + logits.shape[-1])  # of each network: ln scale, biases
    cost = torch.tensor([config.scale_cost, *[config.bias_cost] * logits.shape[-1]]).to(logits)

    def corrected(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The scaled logits, these with biases, what is missing in each class, and what it costs in all."""
        scaled = values[:, :1, None].exp() * logits
        moved = scaled + values[:, None, 1:]
        gap = aim - (mean @ confidences(moved, of_class)[..., None]).squeeze(-1)
        return scaled, moved, gap, (weight * gap**2).sum(1) + (cost * values**2).sum(1)

    damping = torch.full((len(members), 1, 1), 0.01).to(logits)
    for _ in range(10):  # Levenberg-Marquardt
        scaled, moved, gap, loss = corrected(values)
        slope = of_class - moved.masked_fill(of_class.bool(), -torch.inf).softmax(-1)  # of the confidences
        slopes = mean @ torch.cat([(slope * scaled).sum(-1, keepdim=True), slope], -1)  # [K, classes, values]
        weighted = (weight[..., None] * slopes).mT
        gain = (weighted @ gap[..., None]).squeeze(-1) - cost * values
        curvature = weighted @ slopes + cost.diag()
        tried = values + torch.linalg.solve(curvature + damping * torch.eye(len(cost)).to(logits), gain)
        better = corrected(tried)[-1] < loss
        values = torch.where(better[:, None], tried, values)
        damping = torch.where(better[:, None, None], damping / 10, damping * 10)
    for member, value in zip(members, values.float()):
        layer, scale = last_layer(member), value[0].exp()
        layer.weight.mul_(scale)
        layer.bias.mul_(scale).add_(value[1:])


def last_layer(net: nn.Module) -> nn.Linear:
    """Raises ValueError if the network has no linear layer with biases at its end."""
    last = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1:]
    if not last or last[0].bias is None:
        raise ValueError("this method needs a network with a linear layer with biases at the end, or calibrate=False")
    return last[0]


def classes(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(which class each image is of [K, images, classes], what takes means over them [K, classes, images])."""
    of_class = F.one_hot(labels, count).double()
    return of_class, (of_class / of_class.sum(1, keepdim=True).clamp(min=1)).mT


def confidences(logits: Tensor, of_class: Tensor) -> Tensor:
    """ln p / (1 - p) of the true classes, [K, images]."""
    return (logits * of_class).sum(-1) - logits.masked_fill(of_class.bool(), -torch.inf).logsumexp(-1)
