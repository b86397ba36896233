"""An ensemble of K networks is K networks: trained as one it gives what K separate trainings give."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evaluator.convolution import Products
from evaluator.ensemble import Ensemble
from evaluator.models import initialise, resnet18

K, BATCH = 3, 12
# Images of 8x8 reach the last stage as 1x1 maps, and its first convolution as 2x2: both shortened convolutions are used.
SMALL = (dict(width=4, small_images=True), 8)
STEM_7X7 = (dict(width=8), 48)  # 2x2 maps in the last stage
STEM_7X7_32 = (dict(width=8), 32)  # the competition's images: 1x1 maps in the last stage
SHAPES = pytest.mark.parametrize("arguments, size", [SMALL, STEM_7X7, STEM_7X7_32], ids=["small", "7x7", "7x7 on 32x32"])


def make(arguments: dict, dtype=torch.float32) -> Ensemble:
    """Members with different weights and different running statistics."""
    torch.manual_seed(0)
    ensemble = Ensemble(resnet18(10, **arguments).to(dtype), K)
    for member in ensemble.members:
        initialise(member)
        for module in member.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.1)
    return ensemble


def images_of(size: int, count: int = K * BATCH, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, dtype=dtype) * 255


def optimizer_of(name: str, net: nn.Module) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(net.parameters(), 1e-3, weight_decay=5e-3)
    return torch.optim.SGD(net.parameters(), 0.003, momentum=0.9, weight_decay=5e-4)


def step(net: nn.Module, optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()


# Rounding can decide which side of a ReLU a value of nearly 0 is on, and under Adam the direction of a step: in float64 only
# true differences are left.
@pytest.mark.parametrize(
    "shape, optimizer, dtype",
    [
        pytest.param(SMALL, "sgd", torch.float32, id="small, sgd, float32"),
        pytest.param(SMALL, "sgd", torch.float64, id="small, sgd"),
        pytest.param(SMALL, "adam", torch.float64, id="small, adam"),
        pytest.param(STEM_7X7, "sgd", torch.float64, id="7x7, sgd"),
        pytest.param(STEM_7X7, "adam", torch.float64, id="7x7, adam"),
        pytest.param(STEM_7X7_32, "sgd", torch.float64, id="7x7 on 32x32, sgd"),
        pytest.param(STEM_7X7_32, "adam", torch.float64, id="7x7 on 32x32, adam"),
    ],
)
def test_training_equals_separate_trainings(shape, optimizer, dtype):
    arguments, size = shape
    ensemble = make(arguments, dtype)
    alone = [resnet18(10, **arguments).to(dtype) for _ in range(K)]  # not in channels_last format: see overwrites_memory
    for net, member in zip(alone, ensemble.members, strict=True):
        net.load_state_dict(member.state_dict())
    start = copy.deepcopy(alone[0].state_dict())
    together = optimizer_of(optimizer, ensemble)
    separate = [optimizer_of(optimizer, net) for net in alone]
    ensemble.train()
    for _ in range(5):
        images, labels = images_of(size, dtype=dtype), torch.randint(10, (K * BATCH,))
        step(ensemble, together, images, labels)
        for net, own, part, answer in zip(alone, separate, images.chunk(K), labels.chunk(K), strict=True):
            net.train()
            step(net, own, part, answer)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8
    for k, net in enumerate(alone):
        state = ensemble.members[k].state_dict()
        for name, expected in net.state_dict().items():
            torch.testing.assert_close(
                state[name], expected, rtol=tolerance, atol=tolerance, msg=lambda text, where=(k, name): f"{where}: {text}"
            )
            if name.endswith("num_batches_tracked"):
                assert state[name].item() == 5
    for name, tensor in alone[0].named_parameters():
        assert not torch.equal(tensor, start[name]), f"{name} was not trained"


@SHAPES
def test_each_member_gives_its_part_of_the_logits(arguments, size):
    ensemble = make(arguments).eval()
    images = images_of(size)
    with torch.no_grad():
        together = ensemble(images)
        apart = torch.cat([member(part) for member, part in zip(ensemble.members, images.chunk(K), strict=True)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_gradients_are_each_members_own():
    """A loss averaged over the whole batch gives every member what it gets alone from its part."""
    ensemble = make(SMALL[0], torch.float64)
    alone = copy.deepcopy(ensemble.members[1]).train()
    images, labels = images_of(8, dtype=torch.float64), torch.randint(10, (K * BATCH,))
    ensemble.train()
    F.cross_entropy(ensemble(images), labels).backward()
    F.cross_entropy(alone(images.chunk(K)[1]), labels.chunk(K)[1]).backward()
    joint = dict(ensemble.named_parameters())
    for name, parameter in alone.named_parameters():
        own = joint[name].grad.unflatten(0, (K, -1))[1]
        torch.testing.assert_close(own, parameter.grad, rtol=1e-8, atol=1e-10)


def assert_views(ensemble: Ensemble) -> None:
    joint = dict([*ensemble.named_parameters(), *ensemble.named_buffers()])
    for k, member in enumerate(ensemble.members):
        for name, tensor in [*member.named_parameters(), *member.named_buffers()]:
            whole = joint[name]
            part = whole.unflatten(0, (K, -1))[k] if tensor.dim() else whole[k]
            assert torch.equal(tensor, part), name
            assert tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(), name
            with torch.no_grad():
                before = tensor.clone()
                tensor.add_(1)
                assert torch.equal(part, before + 1), name
                tensor.copy_(before)


def test_members_are_views():
    ensemble = make(SMALL[0])
    assert_views(ensemble)
    optimizer = optimizer_of("sgd", ensemble)
    ensemble.train()
    for _ in range(2):
        step(ensemble, optimizer, images_of(8), torch.randint(10, (K * BATCH,)))
    assert_views(ensemble)
    others = [copy.deepcopy(ensemble.members[k].state_dict()) for k in (0, 2)]
    other = resnet18(10, **SMALL[0])
    ensemble.members[1].load_state_dict(other.state_dict())
    assert_views(ensemble)
    for name, tensor in other.state_dict().items():
        assert torch.equal(ensemble.members[1].state_dict()[name], tensor)
    for k, before in zip((0, 2), others, strict=True):
        for name, tensor in ensemble.members[k].state_dict().items():
            assert torch.equal(tensor, before[name]), "loading one member changed another"
    # What the ensemble computes has changed with it.
    images = images_of(8, BATCH)
    ensemble.eval(), other.eval()
    with torch.no_grad():
        torch.testing.assert_close(ensemble(images.repeat(K, 1, 1, 1)).chunk(K)[1], other(images), rtol=1e-4, atol=1e-4)


def test_names_are_those_of_an_ordinary_network():
    ensemble = make(SMALL[0])
    for member in ensemble.members:
        for kind in ("named_modules", "named_parameters", "named_buffers"):
            assert [name for name, _ in getattr(ensemble, kind)()] == [name for name, _ in getattr(member, kind)()]
    name, _ = next(ensemble.named_parameters(prefix="net"))
    assert name == "net.conv1.weight"
    assert len(list(ensemble.parameters())) == 62


def test_what_a_name_finds_holds_every_members_own():
    ensemble = make(SMALL[0])
    for name, joint in ensemble.named_parameters():
        assert joint is ensemble.get_parameter(name)
        for own, member in zip(joint.unflatten(0, (K, -1)), ensemble.members, strict=True):
            assert torch.equal(own, member.get_parameter(name)), name
    for name, joint in ensemble.named_buffers():
        for k, member in enumerate(ensemble.members):
            assert torch.equal(joint.view(K, -1)[k], member.get_buffer(name).view(-1)), name
    for name, layer in ensemble.named_modules():
        assert layer is ensemble.get_submodule(name)


def test_an_optimizer_sees_every_member_once():
    ensemble = make(SMALL[0])
    one = sum(parameter.numel() for parameter in resnet18(10, **SMALL[0]).parameters())
    assert sum(parameter.numel() for parameter in ensemble.parameters()) == K * one


def test_it_starts_as_copies_and_leaves_the_network_alone():
    net = resnet18(10, **SMALL[0])
    before = copy.deepcopy(net.state_dict())
    ensemble = Ensemble(net, K)
    for member in ensemble.members:
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, before[name])
        with torch.no_grad():
            for parameter in member.parameters():
                parameter.zero_()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_initialisation_has_torchvisions_distribution_in_each_member():
    """Drawn on the joint convolution, its K times as many outputs would make fan_out K times too large."""
    ensemble = Ensemble(resnet18(10, width=16), 4)
    for member in ensemble.members:
        initialise(member)
    for layers in zip(*(member.named_modules() for member in ensemble.members), strict=True):
        name, layer = layers[0]
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            expected = (2 / fan_out) ** 0.5
            for _, own in layers:
                tolerance = 5 * expected / (2 * own.weight.numel()) ** 0.5  # 5 standard errors of a standard deviation
                assert abs(own.weight.std().item() - expected) < tolerance, name
                assert abs(own.weight.mean().item()) < 5 * expected / own.weight.numel() ** 0.5, name
        elif isinstance(layer, nn.BatchNorm2d):
            for _, own in layers:
                assert (own.weight == 1).all() and (own.bias == 0).all()
                assert (own.running_mean == 0).all() and (own.running_var == 1).all()
        elif isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            for _, own in layers:
                assert own.weight.abs().max() <= bound and own.bias.abs().max() <= bound
                assert own.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            values = [own.weight.flatten() for _, own in layers]
            for i in range(4):
                for j in range(i):
                    assert abs(torch.corrcoef(torch.stack([values[i], values[j]]))[0, 1]) < 0.3, f"{name}: members alike"


@SHAPES
def test_a_members_state_is_an_ordinary_checkpoint(arguments, size):
    ensemble = make(arguments)
    optimizer = optimizer_of("sgd", ensemble)
    ensemble.train()
    step(ensemble, optimizer, images_of(size), torch.randint(10, (K * BATCH,)))
    ensemble.eval()
    images = images_of(size, BATCH)
    together = ensemble(images.repeat(K, 1, 1, 1)).chunk(K)
    for k, member in enumerate(ensemble.members):
        plain = resnet18(10, **arguments)
        plain.load_state_dict(member.state_dict())
        plain.eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(images), together[k], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(plain(images), member(images), rtol=1e-5, atol=1e-5)


def test_train_and_eval_reach_the_members():
    ensemble = make(SMALL[0])
    ensemble.eval()
    assert not any(module.training for member in [ensemble, *ensemble.members] for module in member.modules())
    ensemble.train()
    assert all(module.training for member in [ensemble, *ensemble.members] for module in member.modules())


def test_an_ensemble_of_one():
    ensemble = Ensemble(resnet18(10, **SMALL[0]), 1).eval()
    images = images_of(8, BATCH)
    torch.testing.assert_close(ensemble(images), ensemble.members[0](images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), nn.ConvTranspose2d(3, 3, 3), nn.PReLU(), nn.GroupNorm(1, 3)])
def test_a_layer_it_does_not_know_is_refused(layer):
    with pytest.raises(TypeError, match=type(layer).__name__):
        Ensemble(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), layer), 2)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "side"),
    [
        ((3, 3), (1, 1), (1, 1), 4),
        ((3, 3), (2, 2), (1, 1), 4),
        ((7, 7), (2, 2), (3, 3), 9),
        ((1, 1), (2, 2), (0, 0), 5),
        ((1, 1), (1, 1), (0, 0), 1),
        ((2, 2), (1, 1), (0, 0), 2),
        ((3, 1), (1, 2), (0, 1), 6),
    ],
)
def test_a_convolution_as_matrix_products(kernel, stride, padding, side):
    x, weight = torch.randn(3, 4 * 2, side, side + 1, dtype=torch.double), torch.randn(4 * 5, 2, *kernel, dtype=torch.double)
    x, weight = (tensor.to(memory_format=torch.channels_last).requires_grad_() for tensor in (x, weight))
    expected = F.conv2d(x, weight, None, stride, padding, groups=4)
    found = Products.apply(x, weight, stride, padding, 4)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, (x, weight), gradient), torch.autograd.grad(expected, (x, weight), gradient), strict=True
    ):
        torch.testing.assert_close(one, other)


NARROW = """
import torch
from evaluator.ensemble import Ensemble
from evaluator.models import network
from methods import shrink_perturb

torch.set_num_threads(1)
for net in (Ensemble(network("resnet18", 10, width=4, small_images=True), 1), network("resnet18", 10, 4, True)):
    examples = [{"image": image, "age_group": label % 10} for label, image in enumerate(torch.randn(64, 3, 8, 8))]
    loader = torch.utils.data.DataLoader(examples, batch_size=16)
    shrink_perturb.unlearning(net, loader, loader, loader, shrink_perturb.Config(epochs=30))
    kept = [torch.empty(size) for size in range(400)]  # malloc finds out what was overwritten
print("done")
"""


def test_a_narrow_network_is_trained_without_avx512():
    """In channels_last format oneDNN would overwrite memory of others, which ends the process sooner or later."""
    avx2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    root, command = Path(__file__).parent.parent, [sys.executable, "-c", NARROW]
    done = subprocess.run(command, env=os.environ | avx2, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
