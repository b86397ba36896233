"""What the tests of the methods share: a few images, loaders, a method run on one network or on K at once, and what is
asked of a network afterwards."""

import contextlib
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from evaluator.data import Examples, Loader
from evaluator.ensemble import Ensemble
from evaluator.training import generators

BATCH = 16


def examples(count: int, seed: int, side: int = 8) -> Examples:
    """Noisy images of 10 classes, whose patterns are the same for every seed."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=source)
    patterns = torch.randint(256, (10, 3, side, side), generator=torch.Generator().manual_seed(0))
    noise = torch.randint(-60, 61, (count, 3, side, side), generator=source)
    images = (patterns[labels] + noise).clamp(0, 255).to(torch.uint8)
    zeros = torch.zeros(count, dtype=torch.int64)
    return Examples([f"{seed}-{index}" for index in range(count)], images, labels, zeros, zeros)


RETAIN, FORGET, VALIDATION = examples(60, 1), examples(20, 2), examples(20, 3)


def loaders() -> list[DataLoader]:
    """PyTorch's own, as on Kaggle."""
    return [DataLoader(part, BATCH, shuffle=True) for part in (RETAIN, FORGET, VALIDATION)]


def load_method(path: Path) -> ModuleType:
    """A method's file as a module, whatever folder it is in."""
    specification = importlib.util.spec_from_file_location(f"method_{path.stem}", path)
    module = sys.modules[specification.name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def unlearned(method: ModuleType, original: nn.Module, seed: int = 0, **values) -> nn.Module:
    torch.manual_seed(seed)
    net = copy.deepcopy(original)
    assert method.unlearning(net, *loaders(), method.Config(**values)) is None
    return net


class DoubleExamples(Examples):
    def batch(self, indices: Tensor) -> dict:
        batch = super().batch(indices)
        return batch | {"image": batch["image"].double()}


def at_once(method: ModuleType, original: nn.Module, seeds: list[int], **values) -> list[nn.Module]:
    """An ensemble's members after unlearning, in double precision: a difference is then one of the method, not rounding
    that training amplified."""
    sources = generators(seeds, "cpu")
    ensemble = Ensemble(copy.deepcopy(original).double(), len(seeds), sources)
    parts = [Loader(DoubleExamples(**vars(part)), BATCH, sources) for part in (RETAIN, FORGET, VALIDATION)]
    method.unlearning(ensemble, *parts, method.Config(**values))
    return ensemble.members


def same_at_once(method: ModuleType, original: nn.Module, tolerance: float, **values) -> list[nn.Module]:
    """Three members of an ensemble; fails unless each is the network that its seed alone gives."""
    together = at_once(method, original, [0, 1, 2], **values)
    for seed, member in enumerate(together):
        (alone,) = at_once(method, original, [seed], **values)
        expected = alone.state_dict()
        for name, tensor in member.state_dict().items():
            torch.testing.assert_close(
                tensor, expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, at=name: f"{at}: {text}"
            )
    return together


@contextlib.contextmanager
def before_each_step(note: Callable[[torch.optim.Optimizer], object]) -> Iterator[None]:
    """Calls `note` with the optimizer before each step of any optimizer."""
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: note(optimizer))
    try:
        yield
    finally:
        handle.remove()


def rates(method: ModuleType, original: nn.Module, **values) -> list[float]:
    """The learning rate of each step."""
    seen = []
    with before_each_step(lambda optimizer: seen.append(optimizer.param_groups[0]["lr"])):
        unlearned(method, original, **values)
    return seen


def changed(net: nn.Module, before: nn.Module, buffers: bool = False) -> set[str]:
    """Names of the parameters, and of the buffers if they are asked for, that are not what they were."""
    old, new = before.state_dict(), net.state_dict()
    names = new if buffers else dict(net.named_parameters())
    return {name for name in names if not torch.equal(new[name], old[name])}


@torch.no_grad()
def logits(net: nn.Module, part: Examples) -> Tensor:
    return net(part.images.float())


def loss(net: nn.Module, part: Examples) -> Tensor:
    return F.cross_entropy(net(part.images.float()), part.age_group)


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of a loss, for each of the network's parameters."""
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
