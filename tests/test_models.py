"""torchvision's ResNet-18 at any width, and reading networks that may be anything."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from evaluator.files import Problem
from evaluator.models import checkpoint, initialise, load_network, resnet18

TORCHVISION = torchvision.models.resnet18(num_classes=10)


def shapes(net: nn.Module) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def test_it_is_torchvisions():
    net = resnet18(10)
    assert shapes(net) == shapes(TORCHVISION)
    assert str(net) == str(TORCHVISION)
    assert len(list(net.parameters())) == 62
    net.load_state_dict(TORCHVISION.state_dict())
    images = torch.rand(4, 3, 32, 32) * 255
    with torch.no_grad():
        assert torch.equal(net.eval()(images), TORCHVISION.eval()(images))


@pytest.mark.parametrize("width, small", [(4, True), (8, False), (64, True)])
def test_other_sizes_have_the_same_parts(width, small):
    net = resnet18(7, width, small)
    assert list(shapes(net)) == list(shapes(TORCHVISION))
    assert len(list(net.parameters())) == 62
    assert net.conv1.kernel_size == ((3, 3) if small else (7, 7)) and net.conv1.out_channels == width
    assert isinstance(net.maxpool, nn.Identity) == small
    assert net.layer4[1].conv2.out_channels == 8 * width and tuple(net.fc.weight.shape) == (7, 8 * width)
    size = 8 if small else 32
    assert net.eval()(torch.rand(2, 3, size, size)).shape == (2, 7)
    maps = []
    net.layer4.register_forward_hook(lambda module, inputs, output: maps.append(output.shape[2:]))
    net(torch.rand(2, 3, size, size))
    assert maps == [(1, 1)]


@pytest.mark.parametrize("make", [lambda: resnet18(10), lambda: resnet18(10, 16, True)])
def test_initialisation_has_torchvisions_distribution(make):
    net = make()
    with torch.no_grad():
        for tensor in [*net.parameters(), *(buffer for buffer in net.buffers() if buffer.dim())]:
            tensor.fill_(7)
    initialise(net, torch.Generator().manual_seed(0))
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            expected = (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
            tolerance = 5 * expected / (2 * layer.weight.numel()) ** 0.5
            assert abs(layer.weight.std().item() - expected) < tolerance, name
            assert abs(layer.weight.mean().item()) < 5 * expected / layer.weight.numel() ** 0.5, name
        elif isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()
            assert (layer.running_mean == 0).all() and (layer.running_var == 1).all()
    bound = net.fc.in_features**-0.5
    for values in (net.fc.weight, net.fc.bias):
        assert bound * 0.5 < values.abs().max() <= bound
    assert net.fc.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_initialisation_comes_from_its_generator_alone():
    def drawn(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        net = resnet18(10, 4, True)
        initialise(net, torch.Generator().manual_seed(seed))
        return torch.cat([parameter.flatten() for parameter in net.parameters()])

    assert torch.equal(drawn(1, 1), drawn(1, 2))
    assert not torch.equal(drawn(1, 1), drawn(2, 1))


# Reading and writing.


def small() -> nn.Module:
    return resnet18(10, 4, True)


def refused(path: Path, content=None) -> str:
    net = small()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(Problem) as problem:
        load_network(net, path, content)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    message = str(problem.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_saved_networks_come_back(tmp_path):
    net, other = small(), small()
    path = tmp_path / "net.pth"
    path.write_bytes(checkpoint(net.to(memory_format=torch.channels_last)))
    load_network(other, path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    state = torch.load(path, weights_only=True)
    assert list(state) == list(net.state_dict()) and all(tensor.is_contiguous() for tensor in state.values())


def test_float16_networks_load(tmp_path):
    """The competition takes checkpoints in half precision."""
    net, other = small(), small()
    torch.save({name: tensor.half() for name, tensor in net.state_dict().items()}, tmp_path / "half.pth")
    load_network(other, tmp_path / "half.pth")
    for (name, tensor), expected in zip(other.named_parameters(), net.parameters(), strict=True):
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected.half().float()), name
    assert other.bn1.num_batches_tracked.dtype == torch.int64
    content = io.BytesIO((tmp_path / "half.pth").read_bytes())
    load_network(other, Path("submission.zip/checkpoint_3.pth"), content)


def test_misfits_are_named(tmp_path):
    path = tmp_path / "net.pth"
    state = small().state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name != "layer2.0.downsample.1.bias"}, path)
    assert "tensor 'layer2.0.downsample.1.bias' is missing" in refused(path)
    torch.save(state | {"extra.weight": torch.zeros(1)}, path)
    assert "tensor 'extra.weight' does not belong" in refused(path)
    torch.save(state | {"fc.weight": torch.zeros(9, 32)}, path)
    assert "tensor 'fc.weight' has shape [9, 32], expected [10, 32]" in refused(path)
    torch.save(TORCHVISION.state_dict(), path)
    assert "'conv1.weight' has shape [64, 3, 7, 7], expected [4, 3, 3, 3]" in refused(path)
    torch.save([1, 2], path)
    assert "holds a list, not a state dict" in refused(path)
    torch.save(torch.zeros(3), path)
    assert "holds a Tensor" in refused(path)
    torch.save(state | {"fc.bias": 3}, path)
    assert "'fc.bias' is a int, not a tensor" in refused(path)


def test_a_file_that_is_not_there(tmp_path):
    refused(tmp_path / "nothing.pth")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off(tmp_path, share):
    path = tmp_path / "net.pth"
    content = checkpoint(small())
    path.write_bytes(content[: int(share * len(content))])
    refused(path)
    refused(path, io.BytesIO(path.read_bytes()))


@pytest.mark.parametrize("content", [b"\x00" * 5000, b"not a network\n" * 30, b"PK\x03\x04" + b"x" * 100])
def test_a_file_of_another_kind(tmp_path, content):
    (tmp_path / "net.pth").write_bytes(content)
    refused(tmp_path / "net.pth")


def test_code_in_a_file_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was_run",)

    torch.save({"conv1.weight": Code()}, tmp_path / "net.pth")
    refused(tmp_path / "net.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Code()))
    refused(tmp_path / "old.pth")
    torch.save(small(), tmp_path / "whole.pth")  # a pickled network, not a state dict
    refused(tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Code()))
    refused(tmp_path / "zip.pth")
    assert not (tmp_path / "was_run").exists()
