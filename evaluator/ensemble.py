"""K networks trained as one, and still K networks.

Training one small network after another leaves a processor mostly idle. `Ensemble` holds K copies of a network in joint
tensors (a convolution with K groups, one batch norm over K·C channels, a batched linear layer), so that one forward and
backward pass serves all K. `Ensemble.members` are K ordinary networks whose parameters and buffers are views into the
joint tensors: initialise, edit or save a member, and the ensemble has changed with it.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F


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


class JointConv2d(nn.Conv2d):
    """K convolutions as one with K groups. Input [B, K·C, H, W]."""

    def forward(self, x):
        # On a map no larger than the kernel's reach, most taps of a padded 3x3 convolution only see zeros; leaving them
        # out is exact and saves up to 8/9 of the work (the last stage of a ResNet-18 on 8x8 images works on 1x1 maps).
        if self.kernel_size == (3, 3) and self.padding == (1, 1) and self.dilation == (1, 1):
            if x.shape[2:] == (1, 1):
                return F.conv2d(x, Taps.apply(self.weight, slice(1, 2)), self.bias, groups=self.groups)
            if x.shape[2:] == (2, 2) and self.stride == (2, 2):
                return F.conv2d(x, Taps.apply(self.weight, slice(1, 3)), self.bias, groups=self.groups)
        return super().forward(x)


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


def _join(module: nn.Module, size: int) -> nn.Module:
    """A copy of `module` in which every layer with parameters holds `size` copies of itself."""
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
    elif next(module.parameters(recurse=False), None) is not None:
        raise TypeError(f"an ensemble cannot hold a layer of type {type(module).__name__}")
    else:
        joint = copy.copy(module)
        joint._modules = {name: _join(child, size) for name, child in module.named_children()}
        return joint
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        copies = tensor.detach().repeat(size, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor.expand(size)
        getattr(joint, name).data = copies.clone()
    return joint


class Ensemble(nn.Module):
    """`size` copies of `network` (convolutions, BatchNorm2d and linear layers), trained as one.

    Called with the members' batches one after the other, [size·B, ...], it returns their logits, [size·B, classes]. The
    gradient is scaled by `size`, so that a loss averaged over the whole batch gives each member the gradient it would get
    alone from a loss averaged over its own part.

    Its modules, parameters and buffers have the names they have in `network`, in the same order; a parameter or buffer holds
    those of all members, one after the other.

    members: ordinary networks that share their tensors with the ensemble.
    generators: each member's own source of randomness (None: the global one), for methods and loaders to draw from.
    Raises TypeError for a layer with parameters of another type.
    """

    def __init__(self, network: nn.Module, size: int, generators: list[torch.Generator] | None = None):
        super().__init__()
        self.network = _join(network, size).to(next(network.parameters()).device, memory_format=torch.channels_last)
        self.generators = generators or [None] * size
        joint = dict([*self.named_parameters(), *self.named_buffers()])
        self.members = []
        for k in range(size):
            member = copy.deepcopy(network)
            for name, tensor in [*member.named_parameters(), *member.named_buffers()]:
                part = joint[name].data
                tensor.data = part.view(size, -1, *part.shape[1:])[k] if tensor.dim() else part[k]
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
