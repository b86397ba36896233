"""Recipes: how the original and the retrained networks are trained."""

import dataclasses
import functools
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluator.cuda_graph import Captured, on_streams
from evaluator.data import BOOLEAN, Allowed, Data, Examples, Loader, check, integer, number, one_of, say
from evaluator.ensemble import Ensemble, obstacle
from evaluator.files import Problem, read_json, write_bytes, write_json
from evaluator.models import checkpoint, initialise, is_resnet, load_network, network, seeded, trial
from evaluator.progress import progress

ORIGINAL_SEED = 0
MOST_WEIGHTS = 180_000_000  # in an ensemble, if the recipe does not say how many networks share one: those of 16 ResNet-18
FEW_IMAGES = 5  # a last batch of fewer is warned of: batch norm of two images spoils the training, of four a part of it


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the competition's (CASIA-SURF, 98.98% train, 96.43% test accuracy)."""

    model: str = "resnet18"  # or any other classifier of torchvision
    width: int = 64  # of a ResNet: channels of the first stage
    small_images: bool = False  # of a ResNet: 3x3 stem without max-pooling
    epochs: int = 30
    batch_size: int = 64  # also of the loaders that are passed to a method
    optimizer: str = "adam"  # or "sgd", with Nesterov momentum 0.9
    learning_rate: float = 1e-4
    weight_decay: float = 5e-3
    schedule: str = "cosine"  # or "one_cycle": a fifth of the steps up, the rest down, both linear
    class_weighted: bool = True  # weight a class by 1 / its count
    networks_at_once: int = 16  # K, the runs that share an ensemble; changes the last bits of a result

    @classmethod
    def of(cls, data: Data, model: str | None = None) -> "Recipe":
        """The recipe of a data folder. model: the network to use instead of the folder's own; if it is not a ResNet, what
        the recipe says of a ResNet's sizes and of how many are trained at once does not apply.

        Raises Problem when dataset.json names an unknown field or value, or the network does not fit the images.
        """
        allowed: dict[str, Allowed] = {
            "model": ("the name of a classifier of torchvision", lambda value: isinstance(value, str)),
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
        where = f"{data.folder / 'dataset.json'}: recipe"
        check(data.recipe, allowed, where)
        # An integer may stand for a float, and means the same recipe: 1 and 1.0 share their networks.
        values = {field: type(getattr(cls, field))(value) for field, value in data.recipe.items()}
        if model not in (None, own_model(data)):
            where, values = "--model", values | {"model": model}
            if not is_resnet(model):
                values = {field: value for field, value in values.items() if field not in (*OF_RESNETS, "networks_at_once")}
        recipe = cls(**values)
        for field in OF_RESNETS:
            if field in values and not is_resnet(recipe.model):
                raise Problem(f"{where}: {field} is for ResNets, it has no meaning for {recipe.model}: leave it out")
        try:
            layer, weights, batch_norm = _facts(
                recipe.model, data.classes, recipe.width, recipe.small_images, image_size(data)
            )
        except Problem as problem:
            raise Problem(f"{where}: {problem}") from problem
        most, why = recipe.networks_at_once, None
        if layer:
            most, why = 1, f"an ensemble cannot hold a layer of type {layer}"
        elif recipe.model != cls.model and "networks_at_once" not in values:
            most, why = max(1, min(most, MOST_WEIGHTS // weights)), f"each has {weights / 1e6:.0f} million weights"
        if most == 1 < recipe.networks_at_once:
            say(f"{recipe.model}: the networks are trained one at a time: {why}")
        last = len(data.retain) % recipe.batch_size
        if batch_norm and 0 < last < FEW_IMAGES:
            say(
                f"warning: {data.folder}, {data.split} split: the last batch of an epoch has {last} of {recipe.batch_size} "
                "images, too few for batch norm: networks come out worse; give the recipe another batch_size"
            )
        return dataclasses.replace(recipe, networks_at_once=most)

    @property
    def made_from(self) -> dict:
        """What is trained, for the keys of pools; those of ResNet-18 are as they were before there was a choice."""
        return {field: value for field, value in vars(self).items() if (field, value) != ("model", Recipe.model)}

    def network(self, classes: int, size: Sequence[int] = (32, 32)) -> nn.Module:
        """size: height and width of the images."""
        return network(self.model, classes, self.width, self.small_images, size)


OF_RESNETS = ("width", "small_images")  # fields of a recipe


@functools.cache
def _facts(model: str, *sizes) -> tuple[str | None, int, bool]:
    """(the layer that keeps an ensemble from holding several, the number of weights, whether it has batch norm).

    Raises Problem as `trial` does.
    """
    net = trial(model, *sizes)
    batch_norm = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in net.modules())
    return obstacle(net), sum(parameter.numel() for parameter in net.parameters()), batch_norm


def own_model(data: Data) -> str:
    """The network that a data folder's recipe names."""
    return data.recipe.get("model", Recipe.model)


def image_size(data: Data) -> tuple[int, int]:
    """Height and width."""
    return tuple(data.retain.images.shape[2:])


def generators(seeds: Sequence[int], device: torch.device | str) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def train(
    net: nn.Module,
    examples: Examples,
    recipe: Recipe,
    class_counts: Tensor,
    sources: list[torch.Generator],
    engine: str = "steps",
) -> Iterator[tuple[int, int]]:
    """Train a network, or an ensemble with one of `sources` per member, in place, from its present weights.

    engine: "steps" calls one kernel after another. Two more, for tensors on a GPU, run a whole step from a CUDA graph:
    "joint" an ensemble as one, "streams" each of its members on a stream of its own.
    Raises Problem where members on streams would not draw their dropout from generators of their own.
    A generator: yields (steps done, steps in all) after each step, so that the caller can show or end the training.
    """
    loader = Loader(examples, recipe.batch_size, sources)
    steps = recipe.epochs * len(loader)
    capture, nets = engine != "steps", net.members if engine == "streams" else [net]
    if len(nets) > 1 and any(isinstance(layer, nn.Dropout) for layer in nets[0].modules()):
        raise Problem(f"--engine streams: {recipe.model} has dropout, which needs a generator for each member: use joint")
    parameters = [parameter for one in nets for parameter in one.parameters()]
    # A graph reads the rate from the GPU's memory.
    rate = torch.tensor(recipe.learning_rate, device=examples.images.device) if capture else recipe.learning_rate
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, rate, weight_decay=recipe.weight_decay, fused=True, capturable=capture)
    else:
        optimizer = torch.optim.SGD(parameters, rate, 0.9, weight_decay=recipe.weight_decay, nesterov=True, fused=True)
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

    streams = [torch.cuda.Stream() for _ in nets] if engine == "streams" else []

    def backward(one: nn.Module, rows: Tensor) -> None:
        images = examples.images[rows].float()
        if streams:  # as the members' weights; an ensemble does this itself
            images = images.contiguous(memory_format=torch.channels_last)
        _mean_loss(one(images), examples.age_group[rows], weight, len(sources) // len(nets)).backward()

    def step(rows: Tensor) -> None:
        optimizer.zero_grad()
        works = [functools.partial(backward, one, own) for one, own in zip(nets, rows.chunk(len(nets)), strict=True)]
        on_streams(streams, works) if streams else works[0]()
        optimizer.step()

    step = Captured(step, sources) if capture else step
    done = 0
    net.train()
    for _ in range(recipe.epochs):
        for rows in loader.orders().split(recipe.batch_size, dim=1):
            done += 1
            # A last batch of one image is skipped: batch norm needs more than one value.
            if rows.shape[1] > 1:
                step(rows.flatten())
            schedule.step()
            yield done, steps
    net.eval()


def _mean_loss(logits: Tensor, labels: Tensor, weight: Tensor | None, members: int) -> Tensor:
    """Cross-entropy, averaged over each member's batch and over members; with weights each member's mean is its own."""
    losses = F.cross_entropy(logits, labels, weight, reduction="none")
    if weight is None:
        return losses.mean()
    return (losses.view(members, -1).sum(1) / weight[labels].view(members, -1).sum(1)).mean()


def original_network(data: Data, recipe: Recipe, seed: int = ORIGINAL_SEED) -> nn.Module:
    """The network to unlearn from: the data folder's file at `original_path`, trained into it when it is not there.
    seed: of that training; another one needs a folder of its own, as the note does not say it.

    A network trained here has a note beside it, as .json. Raises Problem when the note says that it was trained
    with another recipe or on other images; a file from elsewhere, such as Kaggle's, is used as it is.
    """
    path = original_path(data, recipe)
    if not path.exists():
        train_original(data, recipe, seed)
    elif not original_is_given(data, recipe):
        # Before there was a choice, every network was a ResNet-18, and its note did not say so.
        kept, now = {"model": Recipe.model} | read_json(original_note(path)), _original_made_from(data, recipe)
        changed = [name for name, value in now.items() if kept.get(name) != value]
        if changed:
            name = changed[0]
            what = f"{name} was {kept.get(name)!r}, is now {now[name]!r}" if name in vars(recipe) else f"other {name}"
            raise Problem(f"{path}: trained differently ({what}): delete it to have it trained again, or undo the change")
    net = recipe.network(data.classes, image_size(data)).to(data.retain.images.device)
    load_network(net, path)
    return net.eval()


def original_path(data: Data, recipe: Recipe) -> Path:
    """original_model.pth, or original_model_<model>.pth where it is not the network that the folder's own recipe names."""
    return data.folder / ("original_model.pth" if recipe.model == own_model(data) else f"original_model_{recipe.model}.pth")


def train_original(data: Data, recipe: Recipe, seed: int) -> None:
    """Train the network to unlearn from on the retain and forget sets together, and write it into the data folder.

    Raises Problem when its weights do not stay finite.
    """
    path = original_path(data, recipe)
    device = data.retain.images.device
    build = functools.partial(recipe.network, data.classes, image_size(data))
    net, (source,) = build().to(device), generators([seed], device)
    initialise(net, source, build)
    with seeded(seed, device), one_thread(), progress("original", recipe.epochs, "epoch") as bar:
        for done, steps in train(net, data.train, recipe, data.class_counts, [source]):
            if done * recipe.epochs % steps == 0:
                bar.update()
    if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        raise Problem(f"{path}: its training diverged: give the recipe another learning_rate than {recipe.learning_rate:g}")
    content = checkpoint(net)
    # The note is written first, with a hash of this content: a file without its own note is never taken for ours.
    digest = hashlib.sha256(content).hexdigest()
    write_json(original_note(path), {"sha256": digest} | _original_made_from(data, recipe))
    write_bytes(path, content)


def original_is_given(data: Data, recipe: Recipe) -> bool:
    """Whether the original network came from elsewhere, so that nobody knows how it was trained."""
    path = original_path(data, recipe)
    return read_json(original_note(path)).get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest()


def original_note(path: Path) -> Path:
    """The file that says how the network at `path` was trained; only one that was trained here has it."""
    return path.with_suffix(".json")


def _original_made_from(data: Data, recipe: Recipe) -> dict:
    settings = {name: value for name, value in dataclasses.asdict(recipe).items() if name != "networks_at_once"}
    images = hashlib.sha256(data.train.images.cpu().contiguous().numpy())
    images.update(data.train.age_group.cpu().numpy())
    counts = data.class_counts.tolist() if recipe.class_weighted else []
    return {"training images": images.hexdigest(), "class counts": counts} | settings


def retrain(data: Data, recipe: Recipe, seeds: Sequence[int], engine: str = "steps") -> Ensemble:
    """Networks trained on the retain set alone, each with its own initialisation and data order. engine: see `train`."""
    device = data.retain.images.device
    sources = generators(seeds, device)
    build = functools.partial(recipe.network, data.classes, image_size(data))
    ensemble = Ensemble(build().to(device), len(seeds), sources)
    for member, source in zip(ensemble.members, sources, strict=True):
        initialise(member, source, build)
    # An ensemble of one may hold layers that draw from torch's global generator.
    with seeded(seeds[0], device):
        for _ in train(ensemble, data.retain, recipe, data.class_counts, sources, engine):
            pass
    return ensemble


def worker_seconds(device: torch.device) -> float:
    """A clock for work on one thread: CPU time on a CPU, so that other programs do not count."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of_retraining(data: Data, recipe: Recipe, at_most: float) -> float:
    """Seconds that one retraining takes alone on one thread; what is left after `at_most` seconds is extrapolated."""
    device = data.retain.images.device
    net, sources = recipe.network(data.classes, image_size(data)).to(device), generators([0], device)
    with one_thread(), progress("one retraining", recipe.epochs, "epoch") as bar:
        start = worker_seconds(device)
        for done, steps in train(net, data.retain, recipe, data.class_counts, sources):
            if done * recipe.epochs % steps == 0:
                bar.update()
            if worker_seconds(device) - start > at_most:
                break
        return (worker_seconds(device) - start) * steps / done


class one_thread:
    """Within it, torch uses one CPU thread, as every worker does: results do not depend on the number of cores.

    Numbers below 1.2e-38 count as 0: arithmetic with such subnormal numbers is many times slower, and weight decay turns
    weights that only meet padding into them.
    """

    def __enter__(self):
        self.threads = torch.get_num_threads()
        self.flushed = bool(torch.tensor(1e-40) * 1 == 0)  # torch does not say
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)

    def __exit__(self, *_):
        torch.set_flush_denormal(self.flushed)
        torch.set_num_threads(self.threads)
