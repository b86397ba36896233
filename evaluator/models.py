"""torchvision's classifiers, the competition's ResNet-18 at any width among them; reads and writes `original_model.pth`."""

import contextlib
import difflib
import functools
import hashlib
import io
import reprlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
import torchvision
from torch import nn
from torchvision.models import ResNet, get_model, list_models

from evaluator.files import Problem, one_line

CLASSIFIERS = list_models(module=torchvision.models)


def is_resnet(model: str) -> bool:
    """Whether a classifier can have another width, and a stem for small images."""
    return model.startswith(("resnet", "resnext", "wide_resnet"))


def network(
    model: str, classes: int, width: int = 64, small_images: bool = False, size: Sequence[int] = (32, 32)
) -> nn.Module:
    """torchvision's `get_model(model, num_classes=classes)`; a ResNet may have the same topology with other sizes.

    width: channels of the first stage (the competition's 64); the following stages have 2, 4 and 8 times as many.
    small_images: a 3x3 stem with stride 1 and no max-pooling, for images too small for the 7x7 stem.
    All parameter tensors of a ResNet (62 in ResNet-18), the projection shortcuts and `fc` are there at any width, under
    torchvision's names.
    size: height and width of the images, for which a vision transformer is made; other networks take any that are large
    enough.
    """
    if not is_resnet(model):
        how = {}
        if model.startswith("vit_"):
            how = {"image_size": size[0]}
        elif model in ("googlenet", "inception_v3"):  # without further outputs in training
            how = {"aux_logits": False, "init_weights": True}
        return get_model(model, num_classes=classes, **how)
    net = get_model(model, num_classes=classes)
    if width != 64 or small_images:
        stem = dict(kernel_size=3, stride=1, padding=1) if small_images else dict(kernel_size=7, stride=2, padding=3)
        net.conv1, net.bn1 = nn.Conv2d(3, width, bias=False, **stem), nn.BatchNorm2d(width)
        if small_images:
            net.maxpool = nn.Identity()
        net.inplanes = width
        for stage, stride in enumerate((1, 2, 2, 2)):
            name = f"layer{stage + 1}"
            block, count = type(getattr(net, name)[0]), len(getattr(net, name))
            setattr(net, name, net._make_layer(block, width * 2**stage, count, stride=stride))
        net.fc = nn.Linear(net.inplanes, classes)
    initialise(net)
    return net


resnet18 = functools.partial(network, "resnet18")


def trial(
    model: str, classes: int, width: int = 64, small_images: bool = False, size: Sequence[int] = (32, 32)
) -> nn.Module:
    """Such a network without values, after two images have passed through it; nothing is computed but shapes.

    Raises Problem when there is no such classifier, or images of that size do not pass through it.
    """
    if model not in CLASSIFIERS:
        close = difflib.get_close_matches(model, CLASSIFIERS, n=5)
        others = f"; do you mean {' or '.join(close)}?" if close else "; see torchvision.models.list_models()"
        raise Problem(f"{reprlib.repr(model)} is not a classifier of torchvision{others}")
    shapes_only = "cpu" if model.startswith("regnet") else "meta"  # a RegNet computes with values while it is made
    try:
        with torch.random.fork_rng([]), torch.device(shapes_only), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers without channels, which are an error below
            net = network(model, classes, width, small_images, size)
            net.train()(torch.empty(2, 3, *size))
    except Exception as error:  # each network has its own way to fail
        what = model if width == 64 else f"{model} of width {width}"
        raise Problem(f"{what} cannot take images of {size[1]}x{size[0]} pixels ({one_line(error)})") from error
    return net


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it, torch's global generators begin at a seed: initialisations and dropout draw from them."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def initialise(
    net: nn.Module, generator: torch.Generator | None = None, build: Callable[[], nn.Module] | None = None
) -> None:
    """Draw a fresh initialisation in place, from the distributions torchvision uses.

    A ResNet's are known here. Any other network takes the values of a new one that `build` makes, under a seed that comes
    from the generator.
    """
    with torch.no_grad():
        if not isinstance(net, ResNet):
            where = generator.device if generator else torch.device("cpu")
            with seeded(torch.randint(2**62, (), generator=generator, device=where).item(), where):
                net.load_state_dict(build().state_dict())
            return
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):  # nn.Linear's own default, drawn from our generator
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)


def plain_state(net: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of its own: on the CPU, not parts of an ensemble's tensors."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in net.state_dict().items()}


def checkpoint(net: nn.Module) -> bytes:
    """What a file of its weights holds."""
    content = io.BytesIO()
    torch.save(plain_state(net), content)
    return content.getvalue()


def network_digest(net: nn.Module) -> str:
    """Of all its tensors' values."""
    digest = hashlib.sha256()
    for name, tensor in plain_state(net).items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def load_network(net: nn.Module, path: Path, content: BinaryIO | None = None) -> None:
    """Read a state dict (float16 or float32) into `net`. Raises Problem naming the file and the tensor that does not fit.

    content: the open file; `path` is then only its name in messages.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of files that are none is said below
            state = torch.load(content or path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own: a cut-off or foreign file raises any of many types
        raise Problem(f"{path}: not a readable network ({one_line(error)})") from error
    if not isinstance(state, dict):
        raise Problem(f"{path}: holds a {type(state).__name__}, not a state dict")
    misfit = state_misfit(net, state)
    if misfit:
        raise Problem(f"{path}: {misfit}")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise Problem(f"{path}: tensor '{name}' holds a value that is not finite")
    net.load_state_dict(state)


def state_misfit(net: nn.Module, state: dict) -> str | None:
    """The first difference in names and shapes between a state dict and a network's own, in words; None if there is none."""
    expected = net.state_dict()
    for name in [*expected, *state]:
        if name not in state:
            return f"tensor '{name}' is missing"
        if name not in expected:
            return f"tensor '{name}' does not belong to this network"
        if not isinstance(state[name], torch.Tensor):
            return f"'{name}' is a {type(state[name]).__name__}, not a tensor"
        if state[name].shape != expected[name].shape:
            return f"tensor '{name}' has shape {list(state[name].shape)}, expected {list(expected[name].shape)}"
    return None
