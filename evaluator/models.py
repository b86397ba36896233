"""The competition's network, torchvision's ResNet-18, at any width; reads and writes `original_model.pth`."""

import hashlib
import warnings
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from evaluator.files import Problem, one_line, write_atomically


def resnet18(classes: int, width: int = 64, small_images: bool = False) -> ResNet:
    """torchvision's `resnet18(num_classes=classes)`, or the same topology with other sizes.

    width: channels of the first stage (the competition's 64); the following stages have 2, 4 and 8 times as many.
    small_images: a 3x3 stem with stride 1 and no max-pooling, for images too small for the 7x7 stem.
    All 62 parameter tensors, the projection shortcuts and `fc` are there at any size, under torchvision's names.
    """
    net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=classes)
    if width != 64 or small_images:
        stem = dict(kernel_size=3, stride=1, padding=1) if small_images else dict(kernel_size=7, stride=2, padding=3)
        net.conv1, net.bn1 = nn.Conv2d(3, width, bias=False, **stem), nn.BatchNorm2d(width)
        if small_images:
            net.maxpool = nn.Identity()
        net.inplanes = width
        for stage, stride in enumerate((1, 2, 2, 2)):
            setattr(net, f"layer{stage + 1}", net._make_layer(BasicBlock, width * 2**stage, 2, stride=stride))
        net.fc = nn.Linear(8 * width, classes)
    initialise(net)
    return net


def initialise(net: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw a fresh initialisation in place, from the distributions torchvision's ResNet uses."""
    with torch.no_grad():
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


def save_network(net: nn.Module, path: Path) -> None:
    write_atomically(path, lambda file: torch.save(plain_state(net), file))


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
