"""Recipes: how the original and the retrained networks are trained, and what is asked of a trained network."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluator.data import Data, Examples, Loader
from evaluator.ensemble import Ensemble
from evaluator.files import Problem
from evaluator.metric import logit_scaled_confidence
from evaluator.models import initialise, load_network, resnet18, save_network
from evaluator.progress import progress

ORIGINAL_SEED = 0
RETAIN_CONFIDENCES = 1000  # how many retain examples' confidences are kept of a run, at most
IMAGES_AT_ONCE = 2048  # when networks are only asked, not trained


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the competition's (CASIA-SURF, 98.98% train, 96.43% test accuracy)."""

    width: int = 64  # channels of the first stage
    small_images: bool = False  # 3x3 stem without max-pooling
    epochs: int = 30
    batch_size: int = 64  # also of the loaders that a method gets
    optimizer: str = "adam"  # or "sgd", with momentum 0.9 and Nesterov's look-ahead
    learning_rate: float = 1e-4
    weight_decay: float = 5e-3
    schedule: str = "cosine"  # or "one_cycle": a fifth of the steps up, the rest down, both linear
    class_weighted: bool = True  # weight a class by 1 / its count
    networks_at_once: int = 16  # K, the runs that share an ensemble; part of the result, to the last bit

    @classmethod
    def of(cls, data: Data) -> "Recipe":
        """The recipe of a data folder. Raises Problem when dataset.json names an unknown field or value."""
        try:
            recipe = cls(**data.recipe)
        except TypeError as error:
            raise Problem(f"{data.folder / 'dataset.json'}: recipe: {str(error).split('() ')[-1]}") from error
        for field, allowed in (("optimizer", ("adam", "sgd")), ("schedule", ("cosine", "one_cycle"))):
            value = getattr(recipe, field)
            if value not in allowed:
                raise Problem(f"{data.folder / 'dataset.json'}: recipe: {field} is {value!r}, it must be one of {allowed}")
        return recipe

    def network(self, classes: int) -> nn.Module:
        return resnet18(classes, self.width, self.small_images)


def generators(seeds: Sequence[int], device: torch.device | str) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def train(
    net: nn.Module, examples: Examples, recipe: Recipe, class_counts: Tensor, sources: list[torch.Generator]
) -> Iterator[tuple[int, int]]:
    """Train a network, or an ensemble with one of `sources` a member, in place from its present weights.

    A generator: yields (steps done, steps in all) after each step, so that the caller can show or end the training.
    """
    loader = Loader(examples, recipe.batch_size, sources)
    steps = recipe.epochs * len(loader)
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(net.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(
            net.parameters(), recipe.learning_rate, 0.9, weight_decay=recipe.weight_decay, nesterov=True, fused=True
        )
    if recipe.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    else:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            recipe.learning_rate,
            steps + 1,
            pct_start=0.4 if steps == 4 else 0.2,  # torch divides by zero where the rise is one step
            anneal_strategy="linear",
            cycle_momentum=False,
        )
    weight = 1 / class_counts.clamp(min=1) if recipe.class_weighted else None
    done = 0
    net.train()
    for _ in range(recipe.epochs):
        for batch in loader:
            done += 1
            # A last batch of one image is left out: batch norm has nothing to average over.
            if len(batch["image"]) > len(sources):
                optimizer.zero_grad()
                _mean_loss(net(batch["image"]), batch["age_group"], weight, len(sources)).backward()
                optimizer.step()
            schedule.step()
            yield done, steps
    net.eval()


def _mean_loss(logits: Tensor, labels: Tensor, weight: Tensor | None, members: int) -> Tensor:
    """Cross-entropy, averaged over each member's batch and over members; with weights each member's mean is its own."""
    losses = F.cross_entropy(logits, labels, weight, reduction="none")
    if weight is None:
        return losses.mean()
    return (losses.view(members, -1).sum(1) / weight[labels].view(members, -1).sum(1)).mean()


def original_network(data: Data, recipe: Recipe) -> nn.Module:
    """The network to unlearn from: `original_model.pth` of the data folder, trained into it when it is not there."""
    path = data.folder / "original_model.pth"
    net = recipe.network(data.classes).to(data.retain.images.device)
    if path.exists():
        load_network(net, path)
    else:
        (source,) = generators([ORIGINAL_SEED], data.retain.images.device)
        initialise(net, source)
        with one_thread(), progress("original", recipe.epochs, "epoch") as bar:
            for done, steps in train(net, data.train, recipe, data.class_counts, [source]):
                if done * recipe.epochs % steps == 0:
                    bar.update()
        save_network(net, path)
    return net.eval()


def retrain(data: Data, recipe: Recipe, seeds: Sequence[int]) -> Ensemble:
    """Networks trained on the retain set alone, each with its own initialisation and data order."""
    device = data.retain.images.device
    sources = generators(seeds, device)
    ensemble = Ensemble(recipe.network(data.classes).to(device), len(seeds), sources)
    for member, source in zip(ensemble.members, sources, strict=True):
        initialise(member, source)
    for _ in train(ensemble, data.retain, recipe, data.class_counts, sources):
        pass
    return ensemble


def worker_seconds(device: torch.device) -> float:
    """A clock for work on one thread: the processor's time on a CPU, so that what else runs there does not count."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of_retraining(data: Data, recipe: Recipe, at_most: float = 10.0) -> float:
    """Seconds that one retraining takes alone on one thread; what is left after `at_most` seconds is extrapolated."""
    device = data.retain.images.device
    net, sources = recipe.network(data.classes).to(device), generators([0], device)
    with one_thread(), progress("one retraining", recipe.epochs, "epoch") as bar:
        start = worker_seconds(device)
        for done, steps in train(net, data.retain, recipe, data.class_counts, sources):
            if done * recipe.epochs % steps == 0:
                bar.update()
            if worker_seconds(device) - start > at_most:
                break
        return (worker_seconds(device) - start) * steps / done


@torch.inference_mode()
def answers(net: nn.Module, data: Data) -> dict[str, np.ndarray]:
    """What a pool keeps of each network, K members first: forget_logits [K, forget, classes] and retain_confidences
    [K, at most 1000] in float32; ra, va, ta (accuracy on retain, validation and test) [K] in float64."""
    net.eval()
    retain = _logits(net, data.retain)
    kept = torch.linspace(0, len(data.retain) - 1, min(RETAIN_CONFIDENCES, len(data.retain))).round().long()
    kept = kept.to(retain.device)
    confidences = logit_scaled_confidence(retain[:, kept], data.retain.age_group[kept])
    values = {"forget_logits": _logits(net, data.forget), "retain_confidences": confidences.float()}
    held_out = _logits(net, data.held_out)
    for name, logits, examples in (
        ("ra", retain, data.retain),
        ("va", _logits(net, data.validation), data.validation),
        ("ta", held_out, data.held_out),
    ):
        values[name] = (logits.argmax(-1) == examples.age_group).double().mean(1)
    return {name: value.cpu().numpy() for name, value in values.items()}


def _logits(net: nn.Module, examples: Examples) -> Tensor:
    """[K, examples, classes]; the members of an ensemble are all asked about the same images."""
    size = len(net.members) if isinstance(net, Ensemble) else 1
    parts = examples.images.split(max(1, IMAGES_AT_ONCE // size))
    return torch.cat([net(part.float().repeat(size, 1, 1, 1)).unflatten(0, (size, -1)) for part in parts], dim=1)


class one_thread:
    """Within it torch uses one thread on the CPU, as in every worker: results do not depend on the number of cores."""

    def __enter__(self):
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_):
        torch.set_num_threads(self.threads)
