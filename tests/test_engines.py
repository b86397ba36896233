"""How an engine is chosen. That all train the same networks: tests/test_devices.py, and test_gpu.py on a real GPU."""

import dataclasses

import pytest
import torch
from evaluate_helpers import refused, run
from pretend_gpu import PretendGPU

from evaluator import cluster, cuda_graph, engines, evaluation, runs
from evaluator.data import load
from evaluator.ensemble import Ensemble
from evaluator.files import Problem
from evaluator.pool import Pool
from evaluator.training import Recipe, generators, train


@pytest.fixture(scope="module")
def small(data):
    """Its images, and a recipe."""
    examples = load(data)
    return examples, Recipe.of(examples)


def measured(monkeypatch, **seconds: float | Exception) -> list[tuple]:
    """Lets each engine take so many seconds, or raise; returns what was asked for."""
    asked = []

    def seconds_per_step(data, recipe, size, engine, at_least):
        asked.append((engine, size, at_least))
        if isinstance(seconds[engine], Exception):
            raise seconds[engine]
        return seconds[engine]

    monkeypatch.setattr(engines, "seconds_per_step", seconds_per_step)
    return asked


@pytest.mark.parametrize("best", engines.ENGINES)
def test_the_quickest_is_chosen_and_said(best, small, monkeypatch, capsys):
    asked = measured(monkeypatch, **dict.fromkeys(engines.ENGINES, 0.02) | {best: 0.01})
    assert engines.quickest(*small, 16) == best
    assert asked == [(engine, 16, 1.0) for engine in engines.ENGINES]
    said = capsys.readouterr().err
    assert said.startswith("a step of 16 networks: joint ") and said.endswith(f": the engine is {best}\n")
    assert f"{best} 10.00 ms" in said and said.count("20.00 ms") == 2


def test_one_that_fails_is_said_and_left_out(small, monkeypatch, capsys):
    measured(monkeypatch, joint=RuntimeError("no\nkernel"), streams=Problem("not for it"), steps=0.5)
    assert engines.quickest(*small, 4) == "steps"
    assert (
        "steps 500.00 ms, joint fails (no kernel), streams fails (not for it): the engine is steps"
        in capsys.readouterr().err
    )


def test_memory_that_no_engine_has_is_one_line(small, tmp_path, monkeypatch):
    full = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    measured(monkeypatch, joint=full, streams=full, steps=full)
    data, recipe = small
    work = runs._Retraining(
        runs.Setting(tmp_path, 1, "cuda", engine="auto"), Pool(tmp_path / "pool", {}), data, recipe, "retrained"
    )
    with PretendGPU(), pytest.raises(Problem, match="retrained: runs 0 to 1: the GPU's memory ran out: fewer --jobs"):
        work([0, 1])


def test_a_process_measures_once_and_trains_with_what_it_found(small, tmp_path, monkeypatch):
    asked = measured(monkeypatch, joint=2.0, streams=1.0, steps=3.0)
    used, retrain = [], runs.retrain
    monkeypatch.setattr(runs, "retrain", lambda *args: used.append(args[-1]) or retrain(*args))
    data, recipe = small[0], dataclasses.replace(small[1], epochs=0, networks_at_once=2)
    for wanted in ("auto", "joint"):
        setting = runs.Setting(tmp_path, 1, "cuda", engine=wanted)
        work = runs._Retraining(setting, Pool(tmp_path / "pool", {}), data, recipe, "retrained")
        with PretendGPU():
            work([0, 1]), work([2, 3])
    assert used == ["streams"] * 2 + ["joint"] * 2
    assert [engine for engine, size, _ in asked if size == 2] == list(engines.ENGINES)


@pytest.mark.parametrize(
    ("device", "dask", "engine"), [("cpu", None, "steps"), ("cuda", None, "auto"), ("cuda", "tcp:", "joint")]
)
def test_only_a_gpu_of_this_machine_is_tried(device, dask, engine, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "working_device", lambda wanted: device)
    monkeypatch.setattr(evaluation, "gpus", lambda: ["0"])
    monkeypatch.setattr(cluster, "workers", lambda address, wanted: (device, 2))
    assert evaluation.Evaluation.of(str(data), results=tmp_path, dask=dask).setting.engine == engine


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_only_whole_batches_are_timed(engine, small, monkeypatch):
    """The last batch of an epoch has a graph of its own, and making it takes longer than a thousand steps."""
    seen, one_more = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *args: seen.append(1) or one_more(*args))
    sizes, compute = set(), torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional,
        "cross_entropy",
        lambda logits, *rest, **how: sizes.add(len(logits)) or compute(logits, *rest, **how),
    )
    data, recipe = small[0], dataclasses.replace(small[1], batch_size=100)
    assert len(data.retain) % 100
    with PretendGPU():
        assert engines.seconds_per_step(data.to("cuda"), recipe, 2, engine, 0.01) > 0
    assert len(seen) > engines.WARM_UP
    assert sizes == {100 if engine == "streams" else 200}


def test_fewer_images_than_a_batch(small):
    data, recipe = small[0], dataclasses.replace(small[1], batch_size=10_000)
    with PretendGPU():
        assert engines.seconds_per_step(data.to("cuda"), recipe, 1, "joint", 0.01) > 0


def test_members_with_dropout_share_no_generator(small):
    data, recipe = small[0], Recipe("mobilenet_v3_small")
    ensemble = Ensemble(recipe.network(10), 2)
    with PretendGPU(), pytest.raises(Problem, match=r"--engine streams: mobilenet_v3_small has dropout, .*: use joint"):
        next(train(ensemble, data.retain, recipe, data.class_counts, generators([0, 1], "cpu"), "streams"))


def test_streams_begin_after_what_came_before_and_end_before_what_follows(monkeypatch):
    order = []

    class Stream:
        def __init__(self, name: str):
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            order.append(f"{self.name} after {other.name}")

        def __enter__(self):
            order.append(f"on {self.name}")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("own"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    cuda_graph.on_streams([Stream("a"), Stream("b")], [lambda: order.append("first"), lambda: order.append("second")])
    assert order == ["a after own", "on a", "first", "b after own", "on b", "second", "own after a", "own after b"]


@pytest.mark.parametrize(
    ("engine", "what"),
    [("streams", "is for a GPU, and the runs are made on a CPU"), ("fast", "must be auto or one of joint, streams, steps")],
)
def test_an_engine_that_cannot_be_used_is_one_line(engine, what, data, tmp_path, capsys):
    assert f"--engine {engine}: {what}" in refused(capsys, run(data, tmp_path, "--engine", engine))
