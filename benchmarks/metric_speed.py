"""How long the metric takes: milliseconds per forget example on one thread, and 5,000 examples on all cores.

    python -m benchmarks.metric_speed           two minutes

The confidences are drawn from a normal distribution; the time does not depend on them.
"""

import time

import torch

from evaluator.metric import epsilons
from evaluator.scoring import processor


def seconds(runs: int, examples: int, repeats: int) -> float:
    """The median of a few repeats, after a warm-up."""
    source = torch.Generator().manual_seed(0)
    unlearned, retrained = torch.randn(2, runs, examples, generator=source, dtype=torch.float64) * 2 + 4
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        epsilons(unlearned, retrained)
        taken.append(time.perf_counter() - start)
    return torch.tensor(taken[1:]).median().item()


def main() -> None:
    print(processor())
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    for runs in (64, 512):
        print(f"N = {runs}, one thread: {1000 * seconds(runs, 120, 5) / 120:.2f} ms per example", flush=True)
    torch.set_num_threads(cores)
    print(f"N = 512, 5,000 examples, {cores} threads: {seconds(512, 5000, 1):.1f} s")


if __name__ == "__main__":
    main()
