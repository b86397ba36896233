"""K networks trained as one, and still K networks.

Training one small network after another leaves a processor mostly idle. `Ensemble` holds K copies of a network in joint
tensors (a convolution with K groups, one batch norm over K·C channels, a batched linear layer), so that one forward and
backward pass serves all K. `Ensemble.members` are K ordinary networks whose parameters and buffers are views into the
joint tensors: initialise, edit or save a member, and the ensemble has changed with it.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VGG, AlexNet, MobileNetV2, MobileNetV3, ResNet, mobilenetv2, mobilenetv3, resnet
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

from evaluator.convolution import convolve

# What an ensemble of several networks can hold. The others are left out because a layer's weights are none of these, or
# because channels of different members would meet: where maps are concatenated, shuffled or normalised together.
HELD = {
    *(nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.Dropout),
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Sequential, Conv2dNormActivation, SqueezeExcitation),
    *(ResNet, resnet.BasicBlock, resnet.Bottleneck, VGG, AlexNet),
    *(MobileNetV2, mobilenetv2.InvertedResidual, MobileNetV3, mobilenetv3.InvertedResidual),
}
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def obstacle(network: nn.Module) -> str | None:
    """The type of a layer that keeps several such networks from being trained as one; None if there is none."""
    found = [module for module in network.modules() if type(module) not in HELD]
    layers = [module for module in found if next(module.children(), None) is None]  # a layer says more than what it is in
    return type((layers or found)[0]).__name__ if found else None


class Taps(torch.autograd.Function):
    """`weight[:, :, taps, taps]`; its gradient keeps the weight's memory format, which spares the optimizer a copy."""

    @staticmethod
    def forward(ctx, weight, taps):
        ctx.taps, ctx.like = taps, weight
        return weight[:, :, taps, taps]

    @staticmethod
    def backward(ctx, gradient):
        full = torch.zeros_like(ctx.like)
        full[:, :, ctx.taps, ctx.taps] = gradient
        return full, None


def overwrites_memory(layer: nn.Conv2d) -> bool:
    """Whether a CPU must not take this layer's gradient in channels_last format: without AVX-512, oneDNN writes past its
    memory in that of a 1x1 convolution with a stride, one group and fewer than 7 input channels (torch 2.13 and 2.14)."""
    narrow = layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.in_channels < 8
    return narrow and layer.groups == 1 and layer.padding == (0, 0) and not AVX512


class JointConv2d(nn.Conv2d):
    """K convolutions as one with K groups. Input [B, K·C, H, W]."""

    def forward(self, x):
        if self.padding_mode != "zeros" or self.dilation != (1, 1) or isinstance(self.padding, str):
            return super().forward(x)
        if overwrites_memory(self) and not x.is_cuda:  # the same without a stride
            return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], self.weight, self.bias)
        # On a map no larger than the kernel's reach, most taps of a padded 3x3 convolution only see zeros; leaving them
        # out is exact and saves up to 8/9 of the work (the last stage of a ResNet-18 on 8x8 images works on 1x1 maps).
        if self.kernel_size == (3, 3) and self.padding == (1, 1):
            taps = slice(1, 2) if x.shape[2:] == (1, 1) else slice(1, 3)
            if x.shape[2:] == (1, 1) or (x.shape[2:] == (2, 2) and self.stride == (2, 2)):
                return convolve(x, Taps.apply(self.weight, taps), self.bias, (1, 1), (0, 0), self.groups)
        return convolve(x, self.weight, self.bias, self.stride, self.padding, self.groups)


class JointLinear(nn.Module):
    """K linear layers as one. Input [B, K·in], output [B, K·out]."""

    def __init__(self, linear: nn.Linear, size: int):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(linear.weight.detach().repeat(size, 1))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().repeat(size))

    def forward(self, x):
        x = x.unflatten(1, (self.size, -1)).transpose(0, 1)  # [K, B, in]
        y = x @ self.weight.unflatten(0, (self.size, -1)).transpose(1, 2)
        y = y.transpose(0, 1).flatten(1)
        return y if self.bias is None else y + self.bias


class JointDropout(nn.Module):
    """Dropout of K networks as one, each from its own generator: beside others, a network drops what it drops alone."""

    def __init__(self, share: float, generators: Sequence[torch.Generator | None]):
        super().__init__()
        self.share, self.generators = share, generators

    def forward(self, x):
        if not self.training or self.share == 0:
            return x
        parts = x.unflatten(1, (len(self.generators), -1)).unbind(1)
        kept = [
            x.new_empty(part.shape).bernoulli_(1 - self.share, generator=generator)
            for part, generator in zip(parts, self.generators, strict=True)
        ]
        return x * torch.stack(kept, 1).flatten(1, 2) / (1 - self.share)


def _join(module: nn.Module, generators: Sequence[torch.Generator | None]) -> nn.Module:
    """A copy of `module` in which every layer with parameters holds as many copies of itself as there are generators."""
    size = len(generators)
    if isinstance(module, nn.Conv2d):
        joint = JointConv2d(
            size * module.in_channels,
            size * module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            size * module.groups,
            module.bias is not None,
            module.padding_mode,
        )
    elif isinstance(module, nn.BatchNorm2d):
        joint = nn.BatchNorm2d(
            size * module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        if module.track_running_stats:
            joint.num_batches_tracked = joint.num_batches_tracked.repeat(size)  # one count per member
    elif isinstance(module, nn.Linear):
        return JointLinear(module, size)
    elif isinstance(module, nn.Dropout):
        return JointDropout(module.p, generators)
    else:
        joint = copy.copy(module)
        joint._modules = {name: _join(child, generators) for name, child in module.named_children()}
        return joint
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        copies = tensor.detach().repeat(size, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor.expand(size)
        getattr(joint, name).data = copies.clone()
    return joint


class Ensemble(nn.Module):
    """`size` copies of `network`, trained as one. It holds several copies of what `HELD` lists, and one of any network.

    Called with the members' batches one after the other, [size·B, ...], it returns their logits, [size·B, classes]. The
    gradient is scaled by `size`, so that a loss averaged over the whole batch gives each member the gradient it would get
    alone from a loss averaged over its own part.

    Its modules, parameters and buffers have the names they have in `network`, in the same order; a parameter or buffer holds
    those of all members, one after the other.

    members: ordinary networks that share their tensors with the ensemble.
    generators: each member's own source of randomness (None: the global one), for methods, loaders and dropout to draw from.
    Raises TypeError when several copies of a layer cannot be held.
    """

    def __init__(self, network: nn.Module, size: int, generators: list[torch.Generator] | None = None):
        super().__init__()
        self.generators = generators or [None] * size
        layer = obstacle(network)
        if layer and size > 1:
            raise TypeError(f"an ensemble cannot hold a layer of type {layer}")
        joint = copy.deepcopy(network) if layer else _join(network, self.generators)
        self.network = joint.to(next(network.parameters()).device, memory_format=torch.channels_last)
        joint = dict([*self.named_parameters(), *self.named_buffers()])
        self.members = []
        for k in range(size):
            member = copy.deepcopy(network)
            for name, tensor in [*member.named_parameters(), *member.named_buffers()]:
                tensor.data = joint[name].data.view(size, *tensor.shape)[k]
            self.members.append(member)

    # torch.nn.Module looks everything up by name through these two.
    def named_modules(self, *args, **kwargs):
        return self.network.named_modules(*args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        return self.network.get_submodule(target)

    def train(self, mode: bool = True):
        for member in getattr(self, "members", []):
            member.train(mode)
        return super().train(mode)

    def torn(self) -> str | None:
        """The name of a member's tensor that is no longer a part of the joint one: it was replaced, not edited in place."""
        joint = dict([*self.named_parameters(), *self.named_buffers()])
        for member in self.members:
            for name, tensor in [*member.named_parameters(), *member.named_buffers()]:
                if tensor.untyped_storage().data_ptr() != joint[name].untyped_storage().data_ptr():
                    return name
        return None

    def forward(self, x):
        size = len(self.members)
        x = x.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)  # [B, K·C, H, W]
        logits = self.network(x.contiguous(memory_format=torch.channels_last))
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * size)
        return logits.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
