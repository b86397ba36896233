"""Which way of training several networks is the quickest on a GPU: that depends on both, so it is measured."""

import dataclasses
import gc
import time

import torch

from evaluator.data import TENSORS, Data, Examples, say
from evaluator.ensemble import Ensemble
from evaluator.files import Problem, one_line
from evaluator.training import Recipe, generators, image_size, train

ENGINES = ("joint", "streams", "steps")  # see `training.train`; the first was the quickest wherever it was measured
WARM_UP = 10  # steps in which kernels are chosen and the graph is captured


def quickest(data: Data, recipe: Recipe, size: int, seconds: float = 1.0) -> str:
    """The engine that trains `size` networks together in the least time on the GPU that holds `data`. Each is tried for
    `seconds`, and what was measured is printed.

    Raises what the first engine raised when all fail, as they do where a step needs more memory than there is.
    """
    taken, failed = {}, {}
    for engine in ENGINES:
        try:
            taken[engine] = seconds_per_step(data, recipe, size, engine, seconds)
        except (RuntimeError, Problem) as error:
            failed[engine] = error.with_traceback(None)  # which would keep its tensors
        gc.collect()  # an optimizer and its schedule refer to each other, and the tensors of the next need the memory
    if not taken:
        raise failed[ENGINES[0]]
    best = min(taken, key=taken.get)
    measured = [f"{engine} {1000 * taken[engine]:.2f} ms" for engine in taken]
    measured += [f"{engine} fails ({one_line(error)})" for engine, error in failed.items()]
    say(f"a step of {size} networks: {', '.join(measured)}: the engine is {best}")
    return best


def seconds_per_step(data: Data, recipe: Recipe, size: int, engine: str, seconds: float) -> float:
    """Of training `size` networks together in whole batches, without what is done only once."""
    device, retain = data.retain.images.device, data.retain
    whole = len(retain) // recipe.batch_size * recipe.batch_size or len(retain)
    batches = Examples(retain.image_ids[:whole], *(getattr(retain, name)[:whole] for name in TENSORS))
    sources = generators(range(size), device)
    net = recipe.network(data.classes, image_size(data)).to(device)
    endless = dataclasses.replace(recipe, epochs=1_000_000)
    steps = train(Ensemble(net, size, sources), batches, endless, data.class_counts, sources, engine)
    for _ in range(WARM_UP):
        next(steps)
    torch.cuda.synchronize(device)
    start, done = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < seconds:
        for _ in range(WARM_UP):
            next(steps)
        torch.cuda.synchronize(device)
        done += WARM_UP
    return taken / done
