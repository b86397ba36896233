"""A GPU that is none: tensors that say they are on "cuda", and are computed on the CPU with their real values.

Within `PretendGPU()` a tensor moved to or made on "cuda" is marked, and so is everything computed from it, in backward
passes too. Where a real GPU would fail because tensors or generators of two devices meet, or a tensor is asked for as a
numpy array, this one raises the same kind of error. Where a real GPU would have to be waited for (`.item()`, `.cpu()`,
`.tolist()`, a condition), it counts in `waits`. So code that only ever ran on a CPU can be checked for such mistakes.
What it cannot find: kernels that are missing or give other values, memory, speed. It goes without CUDA graphs and streams.
"""

import contextlib
from collections import Counter
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from evaluator import training
from evaluator.ensemble import AVX512

GPU, CPU = torch.device("cuda"), torch.device("cpu")
# Operations that may read from another device than the one they write to.
BETWEEN_DEVICES = {torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.set_}
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
WAITS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select")
}


class PretendGPU(TorchFunctionMode):
    """waits: how often each kind of call had to wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.marked: dict[int, StorageWeakRef] = {}
        self.waits: Counter[str] = Counter()
        self.making = CPU  # where an operation without tensors puts what it makes

    def __enter__(self):
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(mock.patch.object(torch, "Generator", _Generator))
        for name, replacement in {
            "is_available": lambda: False,
            "Stream": _Stream,
            "current_stream": _Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda device=None: self.waits.update(["synchronize"]),
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: None,
        }.items():
            self.patches.enter_context(mock.patch.object(torch.cuda, name, replacement))
        # A graph needs a real GPU: what would be captured and replayed is called each time.
        self.patches.enter_context(mock.patch.object(training, "Captured", lambda function, generators: function))
        self.patches.enter_context(_Operations(self))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def device(self, tensor: torch.Tensor) -> torch.device:
        mark = self.marked.get(tensor.untyped_storage()._cdata)
        return GPU if mark is not None and not mark.expired() else CPU

    def put(self, tensor: torch.Tensor, device: torch.device) -> None:
        storage = tensor.untyped_storage()
        if device == GPU:
            self.marked[storage._cdata] = StorageWeakRef(storage)
        else:
            self.marked.pop(storage._cdata, None)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if function == torch.Tensor.device.__get__:
            return self.device(first)
        if function == torch.Tensor.is_cuda.__get__:
            return self.device(first) == GPU
        there = first is not None and self.device(first) == GPU
        if there and function in WAITS:
            self.waits[function.__name__] += 1
        if function is torch.Tensor.copy_ and not there and self.device(args[1]) == GPU:
            self.waits["copy_ to the CPU"] += 1
        if there and function in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if function in (torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.to):
            return self._moved(function, first, args[1:], kwargs)
        asked = _device(kwargs.pop("device", None))
        generator = kwargs.get("generator")
        before = self.making
        # What a deep copy remembers are all tensors that it has copied.
        seen = [first] if function is torch.Tensor.__deepcopy__ else tree_flatten((args, kwargs))[0]
        on_gpu = any(self.device(one) == GPU for one in seen if isinstance(one, torch.Tensor))
        self.making = asked or (GPU if on_gpu else before)  # operations make tensors for their own use, too
        try:
            if generator is not None and not any(isinstance(one, torch.Tensor) for one in args):
                _must_match(generator, self.making)
            elif generator is not None and first is not None:
                _must_match(generator, self.device(first))
            result = function(*args, **kwargs)
            # Where no operation is seen: torch.tensor and deep copies.
            if function is torch.Tensor.__deepcopy__:
                self.put(result, self.making)
            elif asked and isinstance(result, torch.Tensor):
                self.put(result, asked)
            return result
        finally:
            self.making = before

    def _moved(self, function, tensor, args, kwargs):
        """Tensor.to, .cpu and .cuda."""
        target = {torch.Tensor.cpu: CPU, torch.Tensor.cuda: GPU}.get(function)
        rest = []
        for value in args if target is None else ():
            if value is None or isinstance(value, bool):  # no dtype; non_blocking
                continue
            if isinstance(value, torch.Tensor):
                target, value = self.device(value), value.dtype
            elif isinstance(value, str | torch.device):
                target = _device(value)
                continue
            rest.append(value)
        target = _device(kwargs.pop("device", None)) or target
        here = self.device(tensor)
        result = torch.Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        if target in (None, here):
            return result
        if here == GPU:
            self.waits["to the CPU"] += 1
        result = result.clone() if result.untyped_storage()._cdata == tensor.untyped_storage()._cdata else result
        self.put(result, target)
        return result


class _Operations(TorchDispatchMode):
    """Checks every operation, those of backward passes included, and marks what it returns."""

    def __init__(self, gpu: PretendGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operation = function.overloadpacket
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        marks = [self.gpu.device(tensor) for tensor in tensors]
        if operation in INDEXING and marks[0] == GPU:  # may be indexed by tensors on the CPU
            others = [tensor for tensor, mark in zip(tensors[1:], marks[1:], strict=True) if mark == CPU]
            mixed = any(tensor.is_floating_point() and tensor.dim() for tensor in others)
        else:
            numbers = [mark for tensor, mark in zip(tensors, marks, strict=True) if tensor.dim() or mark == GPU]
            mixed = len(set(numbers)) > 1 and operation not in BETWEEN_DEVICES
        if mixed:
            found = ", ".join(f"{list(one.shape)} on {mark}" for one, mark in zip(tensors, marks, strict=True))
            raise RuntimeError(f"Expected all tensors to be on the same device, but {function} got {found}")
        where = marks[0] if operation in BETWEEN_DEVICES and marks else GPU if GPU in marks else CPU
        if operation is torch.ops.aten.convolution_backward and narrow(args[2], groups=args[9]):
            args = [plain(value) if isinstance(value, torch.Tensor) else value for value in args]
        result = function(*args, **kwargs)
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor) and not any(value is tensor for tensor in tensors):
                self.gpu.put(value, where if tensors else self.gpu.making)
        return result


def narrow(weight: torch.Tensor, groups: int) -> bool:
    """Whether a CPU may overwrite memory in the gradient (`overwrites_memory`); a GPU would not."""
    return groups == 1 and weight.shape[1] < 8 and weight.shape[2:] == (1, 1) and not AVX512


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is not in channels_last format. (`contiguous` leaves the weights of 1x1 convolutions as they are.)"""
    return tensor.new_empty(tensor.shape).copy_(tensor)


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        pass


def _device(value) -> torch.device | None:
    return None if value is None else torch.device(torch.device(value).type)


def _must_match(generator: torch.Generator, device: torch.device) -> None:
    if torch.device(generator.device.type) != device:
        raise RuntimeError(f"Expected a '{device}' device type for generator but found '{generator.device}'")


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.where = _device(device)
        return made

    @property
    def device(self):
        return self.where
