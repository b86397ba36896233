"""Recipes: how the original and the retrained networks are trained."""

import dataclasses
import hashlib
import io
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluator.data import BOOLEAN, Allowed, Data, Examples, Loader, check, integer, number, one_of
from evaluator.ensemble import Ensemble
from evaluator.files import Problem, read_json, write_atomically, write_json
from evaluator.models import initialise, load_network, plain_state, resnet18
from evaluator.progress import progress

ORIGINAL_SEED = 0


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the competition's (CASIA-SURF, 98.98% train, 96.43% test accuracy)."""

    width: int = 64  # channels of the first stage
    small_images: bool = False  # 3x3 stem without max-pooling
    epochs: int = 30
    batch_size: int = 64  # also of the loaders that are passed to a method
    optimizer: str = "adam"  # or "sgd", with Nesterov momentum 0.9
    learning_rate: float = 1e-4
    weight_decay: float = 5e-3
    schedule: str = "cosine"  # or "one_cycle": a fifth of the steps up, the rest down, both linear
    class_weighted: bool = True  # weight a class by 1 / its count
    networks_at_once: int = 16  # K, the runs that share an ensemble; changes the last bits of a result

    @classmethod
    def of(cls, data: Data) -> "Recipe":
        """The recipe of a data folder. Raises Problem when dataset.json names an unknown field or value."""
        allowed: dict[str, Allowed] = {
            "width": integer(1, 1024),
            "small_images": BOOLEAN,
            "epochs": integer(1, 100_000),
            "batch_size": integer(2, 65_536),
            "optimizer": one_of("adam", "sgd"),
            "learning_rate": number("a finite number above 0", sys.float_info.min),
            "weight_decay": number("a finite number of at least 0", 0),
            "schedule": one_of("cosine", "one_cycle"),
            "class_weighted": BOOLEAN,
            "networks_at_once": integer(1, 1024),
        }
        check(data.recipe, allowed, f"{data.folder / 'dataset.json'}: recipe")
        # An integer may stand for a float, and means the same recipe: 1 and 1.0 share their networks.
        return cls(**{field: type(getattr(cls, field))(value) for field, value in data.recipe.items()})

    def network(self, classes: int) -> nn.Module:
        return resnet18(classes, self.width, self.small_images)


def generators(seeds: Sequence[int], device: torch.device | str) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def train(
    net: nn.Module, examples: Examples, recipe: Recipe, class_counts: Tensor, sources: list[torch.Generator]
) -> Iterator[tuple[int, int]]:
    """Train a network, or an ensemble with one of `sources` per member, in place, from its present weights.

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
            pct_start=0.4 if steps == 4 else 0.2,  # torch divides by zero if the rise is one step
            anneal_strategy="linear",
            cycle_momentum=False,
        )
    weight = 1 / class_counts.clamp(min=1) if recipe.class_weighted else None
    done = 0
    net.train()
    for _ in range(recipe.epochs):
        for batch in loader:
            done += 1
            # A last batch of one image is skipped: batch norm needs more than one value.
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
    """The network to unlearn from: `original_model.pth` of the data folder, trained into it when it is not there.

    A network trained here has a note beside it, original_model.json. Raises Problem when the note says that it was trained
    with another recipe or on other images; a file from elsewhere, such as Kaggle's, is used as it is.
    """
    path = data.folder / "original_model.pth"
    if not path.exists():
        train_original(data, recipe)
    elif not original_is_given(data):
        kept, now = read_json(_note(path)), _original_made_from(data, recipe)
        changed = [name for name, value in now.items() if kept.get(name) != value]
        if changed:
            name = changed[0]
            what = f"{name} was {kept.get(name)!r}, is now {now[name]!r}" if name in vars(recipe) else f"other {name}"
            raise Problem(f"{path}: trained differently ({what}): delete it to have it trained again, or undo the change")
    net = recipe.network(data.classes).to(data.retain.images.device)
    load_network(net, path)
    return net.eval()


def train_original(data: Data, recipe: Recipe) -> None:
    """Train the network to unlearn from on the retain and forget sets together, and write it into the data folder."""
    path = data.folder / "original_model.pth"
    device = data.retain.images.device
    net, (source,) = recipe.network(data.classes).to(device), generators([ORIGINAL_SEED], device)
    initialise(net, source)
    with one_thread(), progress("original", recipe.epochs, "epoch") as bar:
        for done, steps in train(net, data.train, recipe, data.class_counts, [source]):
            if done * recipe.epochs % steps == 0:
                bar.update()
    content = io.BytesIO()
    torch.save(plain_state(net), content)
    # The note is written first, with a hash of this content: a file without its own note is never taken for ours.
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    write_json(_note(path), {"sha256": digest} | _original_made_from(data, recipe))
    write_atomically(path, lambda file: file.write(content.getvalue()))


def original_is_given(data: Data) -> bool:
    """Whether original_model.pth came from elsewhere, so that nobody knows how it was trained."""
    path = data.folder / "original_model.pth"
    return read_json(_note(path)).get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest()


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _original_made_from(data: Data, recipe: Recipe) -> dict:
    settings = {name: value for name, value in dataclasses.asdict(recipe).items() if name != "networks_at_once"}
    images = hashlib.sha256(data.train.images.cpu().numpy().tobytes() + data.train.age_group.cpu().numpy().tobytes())
    counts = data.class_counts.tolist() if recipe.class_weighted else []
    return {"training images": images.hexdigest(), "class counts": counts} | settings


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
    """A clock for work on one thread: CPU time on a CPU, so that other programs do not count."""
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


class one_thread:
    """Within it, torch uses one CPU thread, as every worker does: results do not depend on the number of cores."""

    def __enter__(self):
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_):
        torch.set_num_threads(self.threads)
