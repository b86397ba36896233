"""What speed is measured against: what the machine can do, and what the work takes without this kit."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import unlearning
from evaluator.data import Data, Loader
from evaluator.metric import BUFFER, DELTA, LARGEST_EPSILON, LEFT_ENDS, THRESHOLDS_PER_UNIT
from evaluator.pool import answers
from evaluator.training import Recipe, generators, image_size, one_thread, train

EPOCHS = 2  # of the loops over single networks
MATRIX = 1024  # rows and columns


def matrix_rate(seconds: float) -> float:
    """Floating-point operations per second of float32 matrix products on one thread, measured for so long."""
    left, right = torch.randn(2, MATRIX, MATRIX)
    product = left @ right
    with one_thread():
        start, done = time.perf_counter(), 0
        while (taken := time.perf_counter() - start) < seconds or not done:
            torch.mm(left, right, out=product)
            done += 1
    return 2 * MATRIX**3 * done / taken


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and matrix products in some work, a multiply-add counted as two."""

    # Forward: 2 x outputs x weights that each one sees. Backward: as much for the weights' gradient, and again for the
    # inputs' where it is needed, so that training takes 3 x forward. Torch's own count is too large for K groups.
    def backward(gradient, images, weight, *others, out_shape):
        return 2 * math.prod(gradient) * math.prod(weight[1:]) * sum(others[-1][:2])

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: backward}) as counter:
        work()
    return counter.get_total_flops()


def starting_kits_loop(data: Data, recipe: Recipe, device: str = "cpu") -> None:
    """Train one network as the competition's starting kit does: a DataLoader that collates samples, `.item()` after each
    batch. device: of the network; the data is in the CPU's memory."""
    net = recipe.network(data.classes, image_size(data)).to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), recipe.learning_rate, 0.9, weight_decay=recipe.weight_decay)
    for _ in range(EPOCHS):
        total = 0.0
        for batch in DataLoader(data.retain, recipe.batch_size, shuffle=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(batch["image"].to(device)), batch["age_group"].to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()


def plain_loop(data: Data, recipe: Recipe) -> None:
    """Train one network on batches that are cut from tensors in memory."""
    net = recipe.network(data.classes, image_size(data))
    for _ in train(net, data.retain, dataclasses.replace(recipe, epochs=EPOCHS), data.class_counts, generators([0], "cpu")):
        pass


def unlearn(data: Data, recipe: Recipe, net: nn.Module, sources: Sequence[torch.Generator | None] = (None,)) -> None:
    """Call unlearning.py on a network, or on an ensemble with its members' generators, and ask what it has become."""
    loaders = [Loader(part, recipe.batch_size, sources) for part in (data.retain, data.forget, data.validation)]
    unlearning.unlearning(net, *loaders, unlearning.PRESETS.get(data.name) or unlearning.Config())
    answers(net, data)


def unlearning_in_a_loop(data: Data, recipe: Recipe, original: nn.Module, runs: int) -> None:
    for run in range(runs):
        torch.manual_seed(run)
        unlearn(data, recipe, copy.deepcopy(original))


def one_at_a_time(method: Path, folder: Path) -> Path:
    """The method in a folder, like any file that does not say that it can take K networks at once."""
    alone = folder / "alone.py"
    alone.write_text(method.read_text().replace("ENSEMBLE = True", "ENSEMBLE = False"))
    return alone


def compared_epsilon(unlearned: Tensor, retrained: Tensor) -> float:
    """The epsilon of one example by the organisers' procedure: every threshold and interval is compared with every
    confidence, once for each of the four rates. What their scorer copies before it compares is not copied here.

    unlearned, retrained: confidences, [runs], float64.
    """
    positive, negative = unlearned, retrained
    if retrained.quantile(0.5) > unlearned.quantile(0.5):
        positive, negative = retrained, unlearned
    low, high = torch.cat([unlearned, retrained]).aminmax()
    left = torch.linspace(low, high, math.ceil((high - low) * THRESHOLDS_PER_UNIT)).double()
    found = [_rates(positive, negative, left, torch.full_like(left, math.inf))]
    ours, theirs = (side.max() - side.min() for side in (positive, negative))
    if ours >= theirs:
        positive, negative, ours = negative, positive, theirs
    low, high, width = (value.item() for value in (positive.min() + ours - BUFFER, positive.max() + BUFFER, ours))
    right = np.linspace(low, high, math.ceil((high - low) * THRESHOLDS_PER_UNIT))
    left = np.linspace(right - width - BUFFER, right - width + BUFFER, LEFT_ENDS, axis=1)
    found.append(_rates(positive, negative, *(torch.from_numpy(ends).flatten() for ends in (left, right.repeat(LEFT_ENDS)))))
    true_positive, false_negative, false_positive, true_negative = torch.cat(found, dim=1)
    epsilon = torch.fmax(
        (1 - DELTA - false_positive).log() - false_negative.log(),
        (1 - DELTA - false_negative).log() - false_positive.log(),
    ).clamp(0, LARGEST_EPSILON)
    apart = (true_positive == 1) & (true_negative == 1)
    counts = apart | ((false_positive > 0) & (false_negative > 0))
    return epsilon.where(~apart, LARGEST_EPSILON)[counts].max().item()


def _rates(positive: Tensor, negative: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """True positives, false negatives, false positives, true negatives of "positive iff left <= confidence <= right"."""

    def inside(side: Tensor) -> Tensor:
        confidence = side.unsqueeze(1)  # [runs, thresholds] below
        return (left <= confidence) & (confidence <= right)

    sides = [rate for side in (positive, negative) for rate in (inside(side), ~inside(side))]
    return torch.stack([rate.float().mean(0) for rate in sides]).double()
