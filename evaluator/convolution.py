"""Convolutions with a group for each network, in the way that is quickest on the GPU at hand.

cuDNN is quick for some sizes of grouped convolutions; others it works through group by group, or badly. Those are quicker
as one batch of matrix products, with each output's inputs copied side by side. Which is which depends on the GPU, so
both ways are timed, once for each size.
"""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluator.cuda_graph import Captured

Pair = tuple[int, int]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, groups: int) -> Tensor:
    """`F.conv2d`. On a GPU, matrix products are tried too where torch.backends.cudnn.benchmark says that time may be spent
    on finding the quickest way."""
    if x.is_cuda and torch.backends.cudnn.benchmark:
        size = (tuple(x.shape), tuple(weight.shape), stride, padding, groups)
        if _quicker_as_products(*size, x.requires_grad, x.device):
            y = Products.apply(x, weight, stride, padding, groups)
            return y if bias is None else y + bias[:, None, None]
    return F.conv2d(x, weight, bias, stride, padding, groups=groups)


class Products(torch.autograd.Function):
    """A convolution as one batch of matrix products, a product for each group. For tensors in channels_last format."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, groups: int) -> Tensor:
        inputs, height, width = _side_by_side(x, weight.shape[2:], stride, padding, groups)
        weights = weight.permute(0, 2, 3, 1).reshape(groups, len(weight) // groups, -1)
        y = x.new_empty(len(inputs), *weights.shape[:2])
        torch.bmm(inputs.transpose(0, 1), weights.transpose(1, 2), out=y.transpose(0, 1))
        ctx.save_for_backward(inputs, weights)
        ctx.sizes = x.shape, weight.shape, stride, padding
        return y.view(len(x), height, width, len(weight)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inputs, weights), (x, weight, stride, padding) = ctx.saved_tensors, ctx.sizes
        groups, channels, _ = weights.shape
        height, width = gradient.shape[2:]
        y = gradient.permute(0, 2, 3, 1).reshape(-1, groups, channels)
        of_weight = torch.bmm(y.permute(1, 2, 0), inputs.transpose(0, 1))
        of_weight = of_weight.view(weight[0], *weight[2:], weight[1]).permute(0, 3, 1, 2)
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None, None, None
        of_inputs = torch.empty_like(inputs)
        torch.bmm(y.transpose(0, 1), weights, out=of_inputs.transpose(0, 1))
        parts = of_inputs.view(x[0], height, width, groups, *weight[2:], weight[1])
        of_x = y.new_zeros(x[0], x[2] + 2 * padding[0], x[3] + 2 * padding[1], groups, weight[1])
        for i in range(weight[2]):
            for j in range(weight[3]):
                rows = slice(i, i + stride[0] * (height - 1) + 1, stride[0])
                of_x[:, rows, j : j + stride[1] * (width - 1) + 1 : stride[1]] += parts[:, :, :, :, i, j]
        of_x = of_x[:, padding[0] : padding[0] + x[2], padding[1] : padding[1] + x[3]]
        return of_x.flatten(3).permute(0, 3, 1, 2), of_weight, None, None, None


def _side_by_side(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, groups: int) -> tuple[Tensor, int, int]:
    """What each output sees: [images * height * width, groups, kernel's height * width * channels]; height; width."""
    x = x.permute(0, 2, 3, 1)
    if any(padding):
        x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    seen = x.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # [images, height, width, channels, *kernel]
    count, height, width = seen.shape[:3]
    seen = seen.unflatten(3, (groups, -1)).permute(0, 1, 2, 3, 5, 6, 4)
    return seen.reshape(count * height * width, groups, -1), height, width


@functools.cache
def _quicker_as_products(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: Pair,
    padding: Pair,
    groups: int,
    to_inputs: bool,
    device: torch.device,
) -> bool:
    """Forward and backward. to_inputs: whether the inputs need a gradient."""
    source = torch.Generator(device).manual_seed(0)  # the global one is for the networks
    images, weights = (
        torch.randn(size, device=device, generator=source).contiguous(memory_format=torch.channels_last)
        for size in (x, weight)
    )
    images.requires_grad_(to_inputs), weights.requires_grad_()
    convolution = functools.partial(F.conv2d, bias=None, stride=stride, padding=padding, groups=groups)
    products = lambda x, weight: Products.apply(x, weight, stride, padding, groups)  # noqa: E731
    # The convolution first: cuBLAS warns in a thread that has not used the GPU before.
    return _seconds(convolution, images, weights) > _seconds(products, images, weights)


def _seconds(way: Callable[[Tensor, Tensor], Tensor], images: Tensor, weights: Tensor, times: int = 20) -> float:
    def work(gradient: Tensor) -> None:
        needed = [tensor for tensor in (images, weights) if tensor.requires_grad]
        torch.autograd.grad(way(images, weights), needed, gradient)

    with torch.enable_grad():
        gradient = way(images, weights).detach()
        captured = Captured(work)  # as it is used: how long Python needs does not count
        for _ in range(3):
            captured(gradient)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            captured(gradient)
        torch.cuda.synchronize()
    return time.perf_counter() - start
