"""What training many networks at once gains: images per second, against loops over single networks.

    python -m benchmarks.training_speed         the digits' networks; about four minutes

An image counts each time a network is trained on it (forward, backward and step). Retraining: the loop of the
competition's starting kit (a DataLoader that collates samples, `.item()` after each batch), the same loop over batches cut
from tensors in memory, and this kit's pool. Unlearning: one run after another in a loop, this kit's runs in processes (any
method), and K networks at once in processes (ENSEMBLE = True).
"""

import argparse
import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import unlearning
from evaluator.data import Loader
from evaluator.evaluation import HERE, Evaluation
from evaluator.method import Method
from evaluator.pool import answers
from evaluator.runs import retrained_pool, unlearned_pool
from evaluator.scoring import processor
from evaluator.training import Recipe, generators, image_size, original_network, train

EPOCHS = 2  # of the loops; the pool's networks get the full training


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def starting_kits_loop(data, recipe: Recipe) -> None:
    net = recipe.network(data.classes, image_size(data)).train()
    optimizer = torch.optim.SGD(net.parameters(), recipe.learning_rate, 0.9, weight_decay=recipe.weight_decay)
    for _ in range(EPOCHS):
        total = 0.0
        for batch in DataLoader(data.retain, recipe.batch_size, shuffle=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(batch["image"]), batch["age_group"])
            loss.backward()
            optimizer.step()
            total += loss.item()


def plain_loop(data, recipe: Recipe) -> None:
    net = recipe.network(data.classes, image_size(data))
    for _ in train(net, data.retain, dataclasses.replace(recipe, epochs=EPOCHS), data.class_counts, generators([0], "cpu")):
        pass


def unlearning_in_a_loop(evaluation: Evaluation, original: torch.nn.Module, runs: int) -> None:
    data, batch_size = evaluation.data, evaluation.recipe.batch_size
    for run in range(runs):
        torch.manual_seed(run)
        net = copy.deepcopy(original)
        loaders = [Loader(part, batch_size) for part in (data.retain, data.forget, data.validation)]
        unlearning.unlearning(net, *loaders, unlearning.PRESETS[data.name])
        answers(net, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=128, help="networks in the pool (default: 128)")
    parser.add_argument("--runs", type=int, default=64, help="runs of unlearning.py (default: 64)")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation.of("digits", results=Path(folder), jobs=args.jobs, device="cpu")
        data, recipe, setting = evaluation.data, evaluation.recipe, evaluation.setting
        size = recipe.networks_at_once
        warm_up = dataclasses.replace(setting, results=Path(folder) / "warm_up")
        # Starting the workers takes a while, and a pool of 512 pays for it once.
        retrained_pool(warm_up, data, recipe, size * setting.jobs)

        print(f"{processor()}: {setting.jobs} processes, {torch.get_num_threads()} threads in a loop")
        print("images per second of retraining")
        images = EPOCHS * len(data.retain)
        base = images / seconds(lambda: starting_kits_loop(data, recipe))
        print(f"  the starting kit's loop        {base:8,.0f}", flush=True)
        plain = images / seconds(lambda: plain_loop(data, recipe))
        print(f"  a loop over batches in memory  {plain:8,.0f}  {plain / base:.1f} x", flush=True)
        taken = seconds(lambda: retrained_pool(setting, data, recipe, args.networks))
        pool = args.networks * recipe.epochs * len(data.retain) / taken
        print(
            f"  the pool, K = {size:<4}             {pool:8,.0f}  {pool / base:.1f} x, {pool / plain:.1f} x the loop above"
        )

        print(f"{args.runs} runs of unlearning.py, seconds")
        method = Method.read(HERE / "unlearning.py", data.name)
        alone = Path(folder) / "alone.py"  # like any file that does not say it can take K networks at once
        alone.write_text(method.path.read_text().replace("ENSEMBLE = True", "ENSEMBLE = False"))
        original = original_network(data, recipe)
        loop = seconds(lambda: unlearning_in_a_loop(evaluation, original, args.runs))
        print(f"  one after another              {loop:8.1f}", flush=True)
        for what, tried in (("processes", Method.read(alone, data.name)), ("processes, K at once", method)):
            taken = seconds(lambda tried=tried: unlearned_pool(setting, data, recipe, original, tried, args.runs))
            print(f"  {what:<29}  {taken:8.1f}  {loop / taken:.1f} x", flush=True)


if __name__ == "__main__":
    main()
