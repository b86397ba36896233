"""Draw a part of the filters afresh, learn the retain set again, and set the confidence by the validation set.

Ours; it grew out of shrink and perturb (Ash and Adams, NeurIPS 2020, https://arxiv.org/abs/1910.08475). The other parts are
known, too: a learning rate that rises and falls (Smith and Topin, https://arxiv.org/abs/1708.07120) and early layers that
stop learning early (Brock et al., https://arxiv.org/abs/1706.04983). docs/experiments.md says what else was tried.

The old filters make learning faster than from scratch, and are too few to remember single images. Still, a network that
learnt for a fifth of the time is less confident than a retrained one. How much is seen on the validation set, which neither
the original nor this network was trained on: there it is to become as confident as the original, and no less sure of its
mistakes. The last layer is corrected until each forget and validation image has nearly what its class lacks. The forget set
is used for this correction alone.

The validation set also shows how much the confidences within a class should differ. Where they differ more for the original
than for this network, the forget images are moved apart, where they differ clearly less, together.

The more validation images the original gets wrong, the more of it is kept: what is hard takes long to learn again. An
original that is more accurate on the retain set than on the validation set knows images by heart. Then the forget images are
moved further apart, as runs that begin with more in common are too alike, and are made less confident, by what is still
remembered of them.

No value has to be tuned to the data: how long to learn follows from the original's training steps, which batch norm counts,
and the weight decay from the size of the original's weights. How far batch norm's biases moved shows whether Adam or SGD
trained it, and at what rate: this network learns alike, at a few times that rate.
"""

import math
from dataclasses import dataclass
from itertools import chain, repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ENSEMBLE = True  # K networks trained as one give what each gives alone
NORM_LAYERS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)

# How much of the original's training fits into a fifth of its cost, in epochs. A step of a small network takes hardly longer
# with twice the images (on a CPU 1.3 to 1.5 times at 45,000 weights): it learns in batches of twice the loader's size. Once
# the first stage of a ResNet is frozen, a step costs 0.5 to 0.6 of what it did.
SMALL = 300_000  # weights
PARTS = {(True, True): 0.38, (True, False): 0.25, (False, True): 0.27, (False, False): 0.18}  # (small, frozen)
# What is hard takes long to learn again: on CIFAR-10, where the original has 43% of the validation images right, RA is 0.78
# with half kept. DRAWN times that accuracy is drawn afresh. Where nothing can be frozen there is less time to learn.
DRAWN = {True: 0.7, False: 0.4}  # by frozen
FREEZE_AT = 0.2  # of the steps
EARLY = 0.2  # in the first stage, which then has little time to learn, this part of as many filters is drawn afresh
# The weight decay is like the original's, which its convolutions show: trained with 5e-3, the competition's, they have 0.4
# times the size of fresh ones (faces, the median), with 5e-4 1.1 to 1.4 times (clothes, digits).
SMALL_WEIGHTS = 0.6
DECAY, STRONG_DECAY = 5e-4, 5e-3
# Networks that Adam trained are others than those of SGD. The biases of batch norm, which start at 0, show which it was.
# With Adam those of the first layer end 0.003 to 0.052 from there, 0.7 to 1.7 times as far as those of all layers (the
# median); with SGD, whose gradients are largest there, 0.09 to 0.8, 2.6 to 6 times as far (1.2 and 2.1 times on two that
# moved 0.13 and 0.33, too far for Adam).
ADAM, ALIKE = 0.08, 2.2
# How far those of all layers moved shows the rate. Adam: 0.003 to 0.006 at 1e-4, 0.017 to 0.019 at 3e-4, 0.022 to 0.03 at
# 1e-3, 0.037 to 0.042 at 2e-3. SGD: 0.018 at 0.001, 0.036 at 0.003, 0.03 to 0.063 at 0.01, 0.05 at 0.03, 0.09 to 0.15 at
# 0.1; strong weight decay draws them back to 0.03. ADAM_RATE times the movement, or SGD_RATE times its square, is a few
# times the rate, which makes up for the shorter time. What SGD moves depends on the network: 0.009 in a MobileNet at 0.1. So
# only ResNets are asked.
ADAM_RATE, LEAST_ADAM, MOST_ADAM = 0.1, 3e-4, 5e-3
SGD_RATE, MOST_SGD = 12, 0.1
SLOW = 0.033  # below it Adam was slow, as the competition's: class weights are taken if the original had some
WEIGHTED = 3  # times the gradient with class weights: see class_weights
# Within a class the original's confidences in validation images are 0.6 times as far apart as this network's on the faces,
# where the forget images have to be moved together, and 0.85 to 1.23 times on seven other data, where they have not.
CLEARLY = 0.2  # so much less is still taken for chance
LEAST_SCALE, MOST_SCALE = 0.5, 2.5  # of the forget images' distances
MORE_APART = 0.8  # times what is known by heart: there the runs are too alike (CIFAR-10: 0.75 of the spread)
MOST_RETAIN = 1000  # that the original is asked about
MOST_IMAGES = 4000  # of the forget and of the validation set, to which the last layer is fitted
STEPS = 8  # of that fit
MOST_BYTES = 2**30  # of the first stage's outputs for all images; where they take more it is not frozen


@dataclass(frozen=True)
class Config:
    """Chosen on public forget sets of eight data sets, the same for all; there is nothing to tune."""

    kept: float = 0  # of the old filters; the others are drawn afresh. 0: by the rules above
    learning_rate: float = 0  # at its highest; 0: by the rules above
    rise: float = 0.2  # part of the steps in which it rises to that; then it falls to 0, both linearly
    freeze: bool = True  # whether the first stage of a ResNet only learns for a fifth of the steps
    epochs: float = 0  # over the retain set, parts allowed; 0: by the rule above
    original_epochs: float = 30  # of the original's training, where no batch norm has counted its steps
    momentum: float = 0.9  # of SGD, Nesterov's
    weight_decay: float = 0  # of SGD; 0: by the rule above
    calibrate: bool = True  # whether to set the confidence by the validation set
    scale: float = 1.0  # times how far apart the forget images of a class are to be
    share: float = 0.85  # of the confidence that is missing, to be made up
    classes_apart: float = 0.7  # times how far apart the mean confidences of the classes are, before that
    prior: float = 100  # a class with n validation images has n / (n + prior) of a say of its own, else that of all
    penalty: float = 3  # of moving an average image's logits, against missing what one image is to have; both squared

    def __post_init__(self):
        for rule in (
            "0 <= kept <= 1",
            "0 <= learning_rate < 1e9",
            "0 < rise < 1",
            "freeze in (False, True)",
            "0 <= epochs < 1e9",
            "0 < original_epochs < 1e9",
            "0 < momentum < 1",
            "0 <= weight_decay < 1e9",
            "calibrate in (False, True)",
            "0 < scale < 1e9",
            "0 <= share < 1e9",
            "0 <= classes_apart < 1e9",
            "0 <= prior < 1e9",
            "0 < penalty < 1e9",
        ):
            if not eval(rule, dict(vars(self))):
                raise ValueError(f"Config needs {rule}: {self}")


PRESETS = {}


def unlearning(net, retain_loader, forget_loader, val_loader, config: Config = Config()) -> None:
    members = getattr(net, "members", [net])  # K networks trained as one, or the one there is
    generators = getattr(net, "generators", [None])  # where each draws its randomness; None: torch's global generator
    if next(net.parameters()).device.type == "cpu" and not overwrites_memory(net):
        net.to(memory_format=torch.channels_last)  # takes a tenth less time
    frozen = first_stage(members[0], retain_loader.dataset) if config.freeze else []
    loader, steps = budget(members[0], retain_loader, forget_loader, bool(frozen), config)
    if config.calibrate:
        last_layer(net)  # a network that cannot be corrected is refused here, before any training
    # Every member still is the original.
    learnt, unseen = answers(members[0], retain_loader.dataset, most=MOST_RETAIN), answers(members[0], val_loader.dataset)
    training = as_trained(members[0], learnt, unseen, bool(frozen), config)
    for member, generator in zip(members, generators):
        shrink_and_perturb(member, training.kept, generator, frozen)
    learn(net, members, generators, loader, steps, frozen, training, config)
    net.eval()
    if config.calibrate:
        calibrate(net, members, learnt, unseen, val_loader.dataset, forget_loader.dataset, config)


def overwrites_memory(net: nn.Module) -> bool:
    """Whether a CPU must not train such a network in channels_last format: without AVX-512, oneDNN writes past its memory in
    the gradient of a 1x1 convolution with a stride, one group and fewer than 7 input channels (torch 2.13 and 2.14)."""
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    strided = [layer for layer in convolutions if layer.kernel_size == (1, 1) and layer.stride != (1, 1)]
    narrow = any(layer.in_channels < 8 and layer.groups == 1 for layer in strided)
    return narrow and torch.backends.cpu.get_cpu_capability() != "AVX512"


def first_stage(net: nn.Module, images) -> list[str]:
    """The names of a ResNet's parts up to its first stage; none where their outputs for all images are too large to keep."""
    names = [name for name, _ in net.named_children()]
    if "layer1" not in names:
        return []
    names = names[: names.index("layer1") + 1]
    with torch.no_grad():
        output = part(net.eval(), names)(images[0]["image"][None].to(next(net.parameters())))
    return names if output.numel() * output.element_size() * len(images) <= MOST_BYTES else []


def part(net: nn.Module, names: list[str]) -> nn.Sequential:
    return nn.Sequential(*[net.get_submodule(name) for name in names])


def budget(net: nn.Module, retain_loader, forget_loader, frozen: bool, config: Config) -> tuple[object, int]:
    """(the loader to learn from, the number of steps)."""
    small = sum(parameter.numel() for parameter in net.parameters()) < SMALL
    loader = rebatched(retain_loader, 2 * retain_loader.batch_size) if small else retain_loader
    if config.epochs:
        return loader, max(1, round(config.epochs * len(loader)))
    examples = len(retain_loader.dataset) + len(forget_loader.dataset)
    epochs = counted_steps(net) / math.ceil(examples / retain_loader.batch_size) or config.original_epochs
    return loader, max(1, round(PARTS[small, frozen] * epochs * len(loader)))


def rebatched(loader, batch_size: int):
    """The same examples, shuffled, in batches of another size."""
    if hasattr(loader, "with_batch_size"):  # keeps each network's own order
        return loader.with_batch_size(batch_size)
    return torch.utils.data.DataLoader(loader.dataset, batch_size=batch_size, shuffle=True)


def counted_steps(net: nn.Module) -> int:
    """Of the original's training, by batch norm; 0 where there is none."""
    counters = (buffer for name, buffer in net.named_buffers() if name.endswith("num_batches_tracked"))
    return next((counter.item() for counter in counters), 0)


class Answers(NamedTuple):
    """What K networks say of some images."""

    logits: Tensor  # [K, images, classes], double
    of_class: Tensor  # 1 for the class that an image is of, else 0 [images, classes]

    def margins(self) -> Tensor:
        return margins(self.logits, self.of_class)

    def accuracy(self) -> Tensor:
        return (self.logits.argmax(-1) == self.of_class.argmax(-1)).double().mean()

    def class_means(self) -> Tensor:
        """Of the margins [K, classes]; 0 where there is no image."""
        return self.margins() @ (self.of_class / self.of_class.sum(0).clamp(min=1))

    def within_class(self) -> Tensor:
        """The margins less the means of their classes [K, images]."""
        return self.margins() - self.class_means() @ self.of_class.T

    def spread(self) -> Tensor:
        """The standard deviation of the margins within the classes [K]."""
        return self.within_class().square().mean(1).sqrt()


def by_heart(learnt: Answers, unseen: Answers) -> Tensor:
    """How much of the retain set the original knows by heart: how much more accurate it is there than on unseen images."""
    return (learnt.accuracy() - unseen.accuracy()).clamp(min=0)


@torch.no_grad()
def answers(net: nn.Module, images, count: int = 1, most: int = MOST_IMAGES) -> Answers:
    """What `count` networks, trained as one, say of a data set, or of `most` images spread over it, in its order."""
    like = next(net.parameters())
    net.eval()
    logits, labels = [], []
    for batch in batches(images, most):
        given = net(torch.cat([batch["image"].to(like)] * count))
        logits.append(given.double().unflatten(0, (count, -1)))
        labels.append(batch["age_group"].to(like.device))
    logits = torch.cat(logits, 1)
    return Answers(logits, F.one_hot(torch.cat(labels), logits.shape[-1]).double())


def batches(images, most: int):
    """Of a data set, or of `most` images spread over it, in its order."""
    read = getattr(images, "batch", lambda rows: torch.utils.data.default_collate([images[row] for row in rows.tolist()]))
    return map(read, torch.arange(0, len(images), math.ceil(len(images) / most)).split(64))


class Training(NamedTuple):
    """How to learn, as far as possible as the original did."""

    adam: bool  # instead of SGD
    rate: float  # the learning rate at its highest
    decay: float  # of weights
    kept: float  # of the old filters
    class_weights: Tensor | None  # in the loss [classes]


@torch.no_grad()
def as_trained(net: nn.Module, learnt: Answers, unseen: Answers, frozen: bool, config: Config) -> Training:
    """What the original shows of its training, and how to learn then.

    learnt, unseen: what it says of some retain images, and of the validation images.
    """
    biases = [layer.bias for layer in net.modules() if isinstance(layer, NORM_LAYERS) and layer.bias is not None]
    moved = torch.stack([bias.square().mean().sqrt() for bias in biases]) if biases else torch.zeros(1)
    sizes = relative_sizes(net).to(moved)
    shown = [moved[0], moved.median(), sizes.min(), sizes.median(), unseen.accuracy()]
    shown = torch.stack([value.to(sizes.device).double() for value in shown])
    first, typical, least_size, typical_size, accuracy = shown.tolist()  # one wait for a GPU
    adam = 0 < first < min(ADAM, ALIKE * typical)
    slow = adam and typical < SLOW
    # Slow training makes only those layers small that hardly learn.
    strong = (least_size if slow else typical_size) < SMALL_WEIGHTS
    if adam:
        rate = min(MOST_ADAM, max(LEAST_ADAM, ADAM_RATE * typical))
    elif strong or not typical or not hasattr(net, "layer1"):  # it shows no rate
        rate = MOST_SGD
    else:
        rate = min(MOST_SGD, SGD_RATE * typical**2)
    return Training(
        adam,
        config.learning_rate or rate,
        config.weight_decay or (STRONG_DECAY if strong else DECAY),
        config.kept or 1 - DRAWN[frozen] * accuracy,
        class_weights(net, learnt) if slow else None,  # they are too much for higher rates
    )


def relative_sizes(net: nn.Module) -> Tensor:
    """The norms of the convolutions' weights over those of fresh ones; 1 where there is none."""
    source = torch.Generator(next(net.parameters()).device).manual_seed(0)
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    sizes = [layer.weight.norm() / initialised_like(layer.weight, layer, "weight", source).norm() for layer in layers]
    return torch.stack(sizes) if sizes else torch.ones(1)


def class_weights(net: nn.Module, learnt: Answers) -> Tensor | None:
    """1 / count of each class if the original was trained with such weights, else None.

    Training ends when the last layer's biases have no gradient: of the gradients with weights and without, the one that was
    trained with is many times the smaller. A thousand images show it.
    """
    gradients = learnt.logits[0].softmax(-1) - learnt.of_class
    weights = 1 / learnt.of_class.sum(0).clamp(min=1)
    own = learnt.of_class @ weights
    plain, weighted = gradients.mean(0).norm(), (own / own.sum() @ gradients).norm()
    return weights.to(next(net.parameters())) if plain > WEIGHTED * weighted else None


@torch.no_grad()
def shrink_and_perturb(net: nn.Module, kept: float, generator: torch.Generator | None, early: list[str]) -> None:
    """Each filter stays, with the probability `kept`, or is drawn afresh; of all else, kept · old + (1 − kept) · fresh.
    In the parts named `early`, 1 − kept is EARLY times as much.

    A filter is what makes one output of a layer; all else are biases and batch norm. The weights of a layer are first
    brought to the size that fresh ones have: weight decay can have made them many times smaller, and the fresh filters
    would drown the others. In front of batch norm the size has no effect.
    """
    for place, layer in net.named_modules():
        stay = 1 - (1 - kept) * (EARLY if place.split(".")[0] in early else 1)
        for name, old in layer.named_parameters(recurse=False):
            fresh = initialised_like(old, layer, name, generator)
            if name == "weight" and old.dim() > 1:
                old.mul_(fresh.norm() / old.norm().clamp(min=1e-12))
                stays = torch.rand(len(old), generator=generator, device=old.device) < stay
                old.copy_(torch.where(stays.view(-1, *[1] * (old.dim() - 1)), old, fresh))
            else:
                old.mul_(stay).add_(fresh, alpha=1 - stay)


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


def learn(net, members, generators, loader, steps: int, frozen: list[str], training: Training, config: Config) -> None:
    """Minimise cross-entropy on the retain set; the `frozen` parts for a fifth of the steps, the others for all."""
    joint = net.get_submodule("")
    early = [*part(joint, frozen).parameters()]
    late = [parameter for parameter in net.parameters() if all(parameter is not other for other in early)]
    groups = [
        {"params": parameters, "top": top, "end": end}
        for parameters, top, end in ((early, FREEZE_AT / 2, FREEZE_AT), (late, config.rise, 1.0))
        if parameters
    ]
    common = dict(lr=training.rate, weight_decay=training.decay, fused=True)
    if training.adam:
        optimizer = torch.optim.Adam(groups, **common)
    else:
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=True, **common)

    def fit(batches, numbers: range) -> None:
        net.train()
        for number, (images, labels) in zip(numbers, batches):
            if len(labels) == len(members):  # batch norm needs more than one image
                continue
            position = (number + 0.5) / steps
            for group in optimizer.param_groups:
                up, down = position / group["top"], (group["end"] - position) / (group["end"] - group["top"])
                group["lr"] = training.rate * max(0.0, min(up, down))
            loss = mean_loss(net(images), labels, training.class_weights, len(members))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    device = next(net.parameters()).device
    first = int(FREEZE_AT * steps) if frozen else steps
    batches = chain.from_iterable(repeat(loader))
    fit(((batch["image"].to(device), batch["age_group"].to(device)) for batch in batches), range(first))
    if not frozen:
        return
    net.eval()
    kept = outputs([part(member, frozen) for member in members], loader, device)
    layers = {name: joint.get_submodule(name) for name in frozen}
    try:
        for name in frozen:
            setattr(joint, name, nn.Identity())
        fit(shuffled(kept, loader.batch_size, generators), range(first, steps))
    finally:
        for name, layer in layers.items():
            setattr(joint, name, layer)


def mean_loss(logits: Tensor, labels: Tensor, weights: Tensor | None, members: int) -> Tensor:
    """Cross-entropy; with weights each network's mean is its own."""
    if weights is None:
        return F.cross_entropy(logits, labels)
    losses = F.cross_entropy(logits, labels, weights, reduction="none").view(members, -1).sum(1)
    return (losses / weights[labels].view(members, -1).sum(1)).mean()


@torch.no_grad()
def outputs(parts: list[nn.Module], loader, device) -> list[tuple[Tensor, Tensor]]:
    """For each network, what its first part makes of all images, and their labels."""
    kept = [([], []) for _ in parts]
    for batch in loader:
        images, labels = (batch[name].to(device).chunk(len(parts)) for name in ("image", "age_group"))
        for k, first in enumerate(parts):
            kept[k][0].append(first(images[k]))
            kept[k][1].append(labels[k])
    return [(torch.cat(values), torch.cat(labels)) for values, labels in kept]


def shuffled(kept: list[tuple[Tensor, Tensor]], batch_size: int, generators):
    """Endless batches of what `outputs` kept, one network's after another's, each in an order of its own."""
    while True:
        orders = [
            torch.randperm(len(labels), generator=generator, device=labels.device)
            for (_, labels), generator in zip(kept, generators)
        ]
        for chosen in zip(*(order.split(batch_size) for order in orders)):
            yield tuple(torch.cat([own[k][rows] for own, rows in zip(kept, chosen)]) for k in (0, 1))


@torch.no_grad()
def calibrate(net, members, learnt: Answers, unseen: Answers, val_images, forget_images, config: Config) -> None:
    """Correct the last layer until forget and validation images are as confident as networks that never saw them.

    learnt, unseen: what the original says of some retain images, and of the validation images.

    What is missing there in the mean of a class is added to each of its images, a `share` of it: the forget images, of which
    the old filters know something, are more confident than validation images. How confident one network is in a class is
    partly chance. After a short training it is more so: this network's classes are drawn together first. It is so for the
    original, the more the fewer its images: hence `prior`.

    Two things more are wanted of the forget images alone. They are moved apart within their classes where the original's
    validation images are further apart than this network's, as after a training that ends by knowing its images by heart,
    and together where those are clearly less far apart. What this network still remembers of them is taken away: by how much
    they are more confident than validation images of the same classes. It cannot be more than the original's lead in
    confidence on the retain set, times how much of that is known by heart: what exceeds it are forget images that are only
    easier.

    Adding to each image keeps the spread over the runs, which scaling the layer up would widen.
    """
    count, inputs = len(members), []
    last = net.get_submodule(last_layer(net)[0])
    with last.register_forward_pre_hook(lambda _, given: inputs.append(given[0])):
        forget, known = (answers(net, images, count) for images in (forget_images, val_images))
    inputs = torch.cat(inputs).double().unflatten(1, (count, -1)).transpose(0, 1)
    own, images = known.class_means(), known.of_class.sum(0)
    seen = (images > 0).double()
    weight = forget.of_class.mean(0) * seen
    if not weight.any():  # no validation image tells how confident to be
        return
    weight = weight / weight.sum()
    drawn = (1 - config.classes_apart) * ((own @ weight)[:, None] - own) * seen
    missing = unseen.class_means() - own - drawn
    common = (missing @ weight)[:, None]
    raised = drawn + config.share * (common + images / (images + config.prior).clamp(min=1e-9) * (missing - common))

    learnt_by_heart = by_heart(learnt, unseen)
    apart = (unseen.spread() + 1e-9) / (known.spread() + 1e-9) + MORE_APART * learnt_by_heart
    apart = config.scale * apart.clamp(1, MOST_SCALE) * (apart + CLEARLY).clamp(LEAST_SCALE, 1)
    lead = (learnt.margins().mean() - unseen.margins().mean()).clamp(min=0)
    memory = ((forget.class_means() - own) @ weight).clamp(min=0).minimum(learnt_by_heart * lead)
    moved = (apart[:, None] - 1) * forget.within_class() - memory[:, None]

    both = Answers(torch.cat([forget.logits, known.logits], 1), torch.cat([forget.of_class, known.of_class]))
    wanted = both.margins() + raised @ both.of_class.T + F.pad(moved, (0, len(known.of_class)))
    change = fitted_change(F.pad(inputs, (0, 1), value=1.0), both, wanted, config.penalty)
    for member, own_change in zip(members, change.float()):
        _, layer = last_layer(member)
        layer.weight.add_(own_change[:-1].T)
        layer.bias.add_(own_change[-1])


def fitted_change(inputs: Tensor, given: Answers, wanted: Tensor, penalty: float) -> Tensor:
    """What to add to each network's last layer [K, inputs, classes] for its images to have the margins `wanted`.

    inputs: of the layer, the last of them 1 [K, images, inputs]; given: what the networks say of these images so far.
    No layer can give every image what it misses: the sum of the squared errors, and `penalty` times how far the logits of
    an average image move, squared, is made small (Gauss-Newton; a step that does not help is taken back).
    """
    logits, of_class = given
    square = inputs.mT @ inputs / inputs.shape[1]
    ridge = 1e-3 * square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(square.shape[1]).to(square)
    directions = torch.linalg.solve(square + ridge, inputs.mT)  # [K, inputs, images]
    alike = inputs @ directions

    def cost(change: Tensor) -> Tensor:
        moved = inputs @ change
        error = wanted - margins(logits + moved, of_class)
        return error.square().sum(1) + penalty * moved.square().sum(2).mean(1)

    change = inputs.new_zeros(len(inputs), inputs.shape[2], logits.shape[2])
    pace, least = inputs.new_ones(len(inputs), 1, 1), cost(change)
    for _ in range(STEPS):
        moved = inputs @ change
        slope = of_class - (logits + moved).masked_fill(of_class.bool(), -torch.inf).softmax(-1)  # of the margins
        left = wanted - margins(logits + moved, of_class) + (slope * moved).sum(-1)
        system = slope @ slope.mT * alike + penalty * torch.eye(left.shape[1]).to(left)
        found = directions @ (torch.linalg.solve(system, left[..., None]) * slope)
        tried = change + pace * (found - change)
        reached = cost(tried)
        better = (reached < least)[:, None, None]
        change, pace = torch.where(better, tried, change), torch.where(better, pace, pace / 4)
        least = torch.where(reached < least, reached, least)
    return change


def last_layer(net: nn.Module) -> tuple[str, nn.Linear]:
    """(its name, the layer). Raises ValueError if the network has no linear layer with biases at its end."""
    net = getattr(net, "members", [net])[0]
    last = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Linear)][-1:]
    if not last or last[0][1].bias is None:
        raise ValueError("this method needs a network with a linear layer with biases at the end, or calibrate=False")
    return last[0]


def margins(logits: Tensor, of_class: Tensor) -> Tensor:
    """ln p / (1 - p) of the true classes [K, images]; of_class: [images, classes]."""
    return (logits * of_class).sum(-1) - logits.masked_fill(of_class.bool(), -torch.inf).logsumexp(-1)
