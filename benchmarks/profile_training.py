"""Where the time of training K networks at once goes, on one thread, and how near the convolutions come to the machine.

    python -m benchmarks.profile_training               the digits' network: half a minute

Per group of operators: milliseconds of a step as torch's profiler counts them, their share of the step, and for the
convolutions the operations per second, beside those of matrix products measured before. The rest is Python's time between.
The last line says how much of a step does not depend on the number of images: that of a step of two per network.
"""

import argparse
import dataclasses
import os
import re
import sys
import time

import numpy as np
import pandas as pd
from torch.profiler import ProfilerActivity, profile

from benchmarks.yardsticks import matrix_rate, operations
from evaluator import command
from evaluator.ensemble import Ensemble
from evaluator.evaluation import Evaluation
from evaluator.scoring import processor
from evaluator.training import generators, image_size, one_thread, train

STEPS, WARM_UP = 100, 5
GROUPS = {  # the first whose pattern is in an operator's name; only operators that no other one calls are counted
    "convolutions, forward": "conv2d|^Taps$",
    "convolutions, backward": "ConvolutionBackward|TapsBackward",
    "batch norm": "batch_norm|BatchNorm",
    "activations, additions, pooling": "aten::(relu|add|.*pool|mean)|(Relu|Add|Mean.*|Pool.*)Backward",
    "optimizer and gradients": "Optimizer|AccumulateGrad",
    "batch assembly": "aten::(index|to|contiguous|flatten|unflatten|transpose|stack|split|randperm)",
    "last layer, loss and views": "",
}


def measure(evaluation: Evaluation) -> pd.DataFrame:
    data, recipe = evaluation.data, evaluation.recipe
    size, build = recipe.networks_at_once, lambda: recipe.network(data.classes, image_size(data))
    sources = generators(range(size), "cpu")
    net = Ensemble(build(), size, sources)
    peak = max(matrix_rate(1.0) for _ in range(3))
    steps = train(net, data.retain, recipe, data.class_counts, sources)
    images = data.retain.images[: recipe.batch_size].float().repeat(size, 1, 1, 1)
    forward = operations(lambda: net(images))
    backward = operations(lambda: next(steps)) - forward
    for _ in range(WARM_UP):
        next(steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start, done = time.perf_counter(), 0
        for _, _ in steps:
            done += 1
            if done == STEPS:
                break
        step = (time.perf_counter() - start) / done
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in profiled.events():
        if event.cpu_parent is None:
            group = next(name for name, pattern in GROUPS.items() if re.search(pattern, event.name))
            seconds[group] += event.cpu_time_total / 1e6 / done
    seconds["rest"] = step - sum(seconds.values())
    work = {"convolutions, forward": forward, "convolutions, backward": backward, "a step": forward + backward}
    seconds["a step"] = step
    speed = f"{len(images)} images a step, {len(images) / step:,.0f} images/s while profiled"
    print(f"{processor()}: {data.title}, K = {size}, {speed}")
    print(f"matrix products: {peak / 1e9:.1f} GFLOP/s on one thread")
    two = dataclasses.replace(recipe, batch_size=2)
    taken = []
    for _, _ in train(net, data.retain, two, data.class_counts, sources):
        taken.append(time.perf_counter())
        if len(taken) == STEPS:
            break
    seconds["a step of 2 images"] = np.median(np.diff(taken))
    table = pd.DataFrame({"ms": pd.Series(seconds) * 1000, "share": pd.Series(seconds) / step})
    rate = pd.Series(work) / pd.Series(seconds)
    return table.assign(**{"GFLOP/s": rate / 1e9, "of peak": rate / peak}).loc[list(seconds)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", **command.OPTIONS["data"])
    args = parser.parse_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler reports on stderr that there is no GPU

    def show() -> None:
        with one_thread():
            table = measure(Evaluation.of(args.data, device="cpu"))
        formats = {"ms": "{:.2f}".format, "GFLOP/s": "{:.1f}".format} | dict.fromkeys(("share", "of peak"), "{:.1%}".format)
        print(table.to_string(formatters=formats, na_rep=""))

    return command.run(show, resumes=False)


if __name__ == "__main__":
    sys.exit(main())
