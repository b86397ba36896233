"""A training step as a CUDA graph.

A small network keeps a GPU busy for less time than Python needs to start its kernels. A graph holds all kernels of a step,
those of the backward pass and the optimizer too, and starts them at once.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


class Captured:
    """A function of one tensor on a GPU that returns nothing, and does the same work on the GPU in every call.

    For each shape of the tensor, the first call runs as it is: what is made only once, such as an optimizer's state, must
    not become part of a graph. The second is captured, and from then on the graph is replayed. What the function reads
    besides its argument is read where it was when captured, so it must be changed in place.

    generators: those that the function may draw from, besides torch's global one.
    """

    def __init__(self, function: Callable[[Tensor], None], generators: Sequence[torch.Generator] = ()):
        self.function, self.generators = function, generators
        self.stream = torch.cuda.Stream()  # nothing can be captured on the default stream
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}

    def __call__(self, argument: Tensor) -> None:
        shape = argument.shape
        if shape not in self.graphs:
            self.graphs[shape] = None
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream), _quickest_kernels():
                self.function(argument)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.graphs[shape] is None:
            self.graphs[shape] = self._capture(argument)
        graph, read = self.graphs[shape]
        read.copy_(argument)
        graph.replay()

    def _capture(self, argument: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, read = torch.cuda.CUDAGraph(), argument.clone()
        for generator in self.generators:
            graph.register_generator_state(generator)
        others = [known[0].pool() for known in self.graphs.values() if known]
        # Graphs that never run at the same time can share their memory.
        with torch.cuda.graph(graph, pool=others[0] if others else None, stream=self.stream), _quickest_kernels():
            self.function(read)
        return graph, read


def on_streams(streams: Sequence[torch.cuda.Stream], works: Sequence[Callable[[], None]]) -> None:
    """Do several things side by side, each on a stream of its own. In a graph they become branches."""
    here = torch.cuda.current_stream()
    for stream, work in zip(streams, works, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            work()
    for stream in streams:
        here.wait_stream(stream)


@contextlib.contextmanager
def _quickest_kernels() -> Iterator[None]:
    """Within it, the GPU's kernels are chosen by timing them, and matrix products are as exact as convolutions."""
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high" if torch.backends.cudnn.allow_tf32 else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])
