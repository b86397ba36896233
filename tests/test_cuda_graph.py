"""When a captured function is called, when it is captured and when its graph is replayed, with stand-ins for CUDA's parts.

tests/test_gpu.py has the real ones, where there is a GPU.
"""

import contextlib

import pytest
import torch

from evaluator.cuda_graph import Captured


class Graph:
    """Replays by calling what was captured in it, with the tensor that it was captured with."""

    capturing = None

    def __init__(self):
        self.work, self.generators = [], []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def pool(self):
        return self

    def replay(self):
        for function in self.work:
            function()


@pytest.fixture
def captures(monkeypatch) -> list[tuple]:
    """(graph, pool) of each capture."""
    made = []

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(captured, pool, stream):
        made.append((captured, pool))
        Graph.capturing = captured
        yield
        Graph.capturing = None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    return made


def test_each_shape_runs_once_is_captured_once_and_then_replayed(captures):
    python, sums, source = [], [], torch.Generator()

    def function(rows: torch.Tensor) -> None:
        python.append((len(rows), torch.backends.cudnn.benchmark))
        work = lambda: sums.append(rows.sum().item())  # noqa: E731
        Graph.capturing.work.append(work) if Graph.capturing else work()

    captured = Captured(function, [source])
    for start in range(4):
        captured(torch.arange(start, start + 3))
        captured(torch.arange(start, start + 2))
        assert not torch.backends.cudnn.benchmark
    assert python == [(3, True), (2, True)] * 2
    assert sums == [total for start in range(4) for total in (3 * start + 3, 2 * start + 1)]
    (first, no_pool), (second, pool) = captures
    assert first.generators == second.generators == [source]
    assert no_pool is None and pool is first


def test_the_argument_of_a_capture_is_not_written_to(captures):
    captured, first, second = Captured(lambda rows: None), torch.zeros(2), torch.ones(2)
    for rows in (first, first, second):
        captured(rows)
    assert first.tolist() == [0, 0]


def test_an_error_leaves_the_settings_as_they_were(captures):
    def function(rows):
        raise ValueError

    captured, precision = Captured(function), torch.get_float32_matmul_precision()
    for _ in range(2):
        with pytest.raises(ValueError):
            captured(torch.zeros(2))
        assert not torch.backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == precision
