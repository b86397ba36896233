"""What runs on a GPU, without one: no tensors of two devices meet, the values are the CPU's, and no step waits for the GPU.

See pretend_gpu.py for what a pretended GPU finds and what it cannot.
"""

import contextlib
import copy
import dataclasses
import io
import linecache
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_helpers import METHOD
from method_helpers import BATCH, FORGET, RETAIN, VALIDATION, before_each_step
from pretend_gpu import PretendGPU
from torch import nn
from torch.nn import functional as F

from evaluator import runs, why
from evaluator.attacks import ATTACKS
from evaluator.data import Data, Loader, load
from evaluator.engines import ENGINES
from evaluator.ensemble import Ensemble
from evaluator.evaluation import HERE
from evaluator.files import Problem
from evaluator.method import Diverged, Method
from evaluator.metric import best_attacks, epsilons, forgetting_quality, logit_scaled_confidence
from evaluator.pool import Pool, answers
from evaluator.processes import in_processes
from evaluator.training import Recipe, generators, retrain

linecache.getlines(__file__)  # torch.manual_seed() reads its callers' source once: a method that reads a file is refused
METHODS = [HERE / "unlearning.py", *sorted((HERE / "methods").glob("*.py"))]


# What a real GPU would refuse, or wait for.


@pytest.mark.parametrize(
    "mistake",
    {
        "a sum": lambda x: x + torch.ones(3),
        "a loss": lambda x: F.cross_entropy(x, torch.zeros(2, dtype=torch.long)),
        "a network": lambda x: nn.Linear(3, 2)(x),
        "a part of a list": lambda x: torch.cat([x, torch.zeros(2, 3)]),
        "in place": lambda x: torch.ones(2, 3).add_(x),
        "an index": lambda x: torch.ones(2)[torch.zeros(1, dtype=torch.long, device="cuda")],
        "a value put at an index": lambda x: x.index_put_((torch.tensor([0]),), torch.ones(1, 3)),
        "a number on the GPU": lambda x: torch.ones(3) * x.sum(),
        "numpy": lambda x: x.numpy(),
        "an array": np.asarray,
        "a generator of the CPU": lambda x: torch.randn(3, device="cuda", generator=torch.Generator()),
        "a generator of the GPU": lambda x: torch.randn(3, generator=torch.Generator("cuda")),
        "in place, another generator": lambda x: x.normal_(generator=torch.Generator()),
        "a copy": lambda x: copy.deepcopy(x) + torch.ones(3),
        "what a backward pass needs": lambda x: (x * nn.Parameter(torch.ones(3, device="cuda"))).backward(torch.ones(2, 3)),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_mistake_is_found(mistake):
    with PretendGPU(), pytest.raises((RuntimeError, TypeError), match=r"same device|generator|numpy"):
        mistake[1](torch.ones(2, 3, device="cuda"))


@pytest.mark.parametrize(
    "fine",
    {
        "a number": lambda x: x * 2,
        "a number of the CPU": lambda x: x * torch.tensor(2.0),
        "an index of the CPU": lambda x: x[torch.tensor([0])],
        "to": lambda x: x.cpu().to("cuda", torch.float64) + torch.ones(3, device="cuda"),
        "as another": lambda x: torch.ones(3).to(x) + x,
        "new": lambda x: x + x.new_ones(3) + torch.zeros_like(x),
        "a copy": lambda x: copy.deepcopy(x) + x,
        "a tensor of numbers": lambda x: x + torch.tensor([1, 2, 3], device=x.device),
        "a generator": lambda x: x + torch.randn(3, device=x.device, generator=torch.Generator(x.device)),
        "repeated": lambda x: x.repeat(2, 1) + x[0].expand(4, 3),
        "a network": lambda x: nn.Linear(3, 2).to(x.device)(x),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_what_a_gpu_allows(fine):
    with PretendGPU() as gpu:
        assert fine[1](torch.ones(2, 3, device="cuda")).device.type == "cuda"
        assert set(gpu.waits) <= {"to the CPU"}


def test_waits_are_counted():
    with PretendGPU() as gpu:
        x = torch.ones(2, 3, device="cuda")
        x.sum().item(), x.tolist(), x.cpu(), bool(x.any()), torch.zeros(2, 3).copy_(x), torch.ones(1).item()
    assert gpu.waits == {"item": 1, "tolist": 1, "to the CPU": 1, "__bool__": 1, "copy_ to the CPU": 1}
    assert torch.ones(1, device="cpu").device.type == "cpu"


# What the kit runs there.


def waits_of_training(data, recipe: Recipe, engine: str) -> dict[str, int]:
    with PretendGPU() as gpu:
        there = data.to("cuda")
        gpu.waits.clear()
        retrain(there, recipe, [0, 1], engine)
    return dict(gpu.waits)


@pytest.fixture(scope="module")
def small(data):
    """Its images, and a recipe of two epochs."""
    examples = load(data)
    return examples, dataclasses.replace(Recipe.of(examples), epochs=2)


def answers_of_both(data, recipe: Recipe, engine: str) -> tuple[dict, dict]:
    """What the retrained networks of a pretended GPU answer, and those of the CPU."""
    with PretendGPU():
        there = data.to("cuda")
        ensemble = retrain(there, recipe, [0, 1], engine)
        assert {tensor.device.type for tensor in ensemble.state_dict().values()} == {"cuda"}
        found = answers(ensemble, there)
    return found, answers(retrain(data, recipe, [0, 1]), data)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_retrained_networks_are_those_of_the_cpu(optimizer, small):
    data, recipe = small[0], dataclasses.replace(small[1], optimizer=optimizer, class_weighted=optimizer == "adam")
    found, expected = answers_of_both(data, recipe, "steps")
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("engine", ["joint", "streams"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_other_engines_train_the_same_networks(optimizer, engine, small):
    """But for rounding: a graph reads the learning rate as a tensor, and on streams sums are added in another order. Few and
    small steps, as training amplifies that."""
    changes = {"optimizer": optimizer, "class_weighted": optimizer == "adam", "learning_rate": 1e-4, "batch_size": 200}
    found, expected = answers_of_both(small[0], dataclasses.replace(small[1], **changes), engine)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_step_of_a_retraining_waits(engine, small):
    data, recipe = small
    # Where the learning rate is a tensor, the optimizer looks at it once, before the first step.
    assert waits_of_training(data, recipe, engine) == ({} if engine == "steps" else {"__bool__": 1})


@pytest.mark.parametrize("model", ["resnet18", "vgg11_bn", "squeezenet1_1"])
def test_every_kind_of_network(model):
    recipe = Recipe(model=model, width=4)
    with PretendGPU() as gpu:
        net = recipe.network(10).to("cuda")
        sources = generators([0, 1], "cuda")
        net = Ensemble(net, 2, sources) if model != "squeezenet1_1" else net  # which trains one at a time
        images = torch.zeros(8, 3, 32, 32, device="cuda")
        gpu.waits.clear()
        F.cross_entropy(net(images), torch.zeros(8, dtype=torch.long, device="cuda")).backward()
        assert not gpu.waits  # such a step cannot become a CUDA graph
        assert {parameter.grad.device.type for parameter in net.parameters()} == {"cuda"}


def test_too_little_memory_is_one_line(small, tmp_path, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(runs, "retrain", full)
    work = runs._Retraining(runs.Setting(tmp_path, 1), Pool(tmp_path / "pool", {}), *small, "retrained")
    with pytest.raises(Problem, match="retrained: runs 0 to 1: the GPU's memory ran out: fewer --jobs"):
        work([0, 1])


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_methods_stay_on_their_device_and_no_step_waits(path, original, monkeypatch):
    method, recipe = Method.read(path), Recipe(width=4, small_images=True, batch_size=BATCH)
    sets = {"retain": RETAIN, "forget": FORGET, "validation": VALIDATION, "test": VALIDATION}
    data = Data(HERE, "noise", "public", 10, {}, torch.ones(10), **sets)
    steps, epochs, begin = [], [], Loader.__iter__
    monkeypatch.setattr(Loader, "__iter__", lambda loader: epochs.append(loader) or begin(loader))
    with PretendGPU() as gpu, before_each_step(steps.append):
        data, there = data.to("cuda"), copy.deepcopy(original).to("cuda")
        gpu.waits.clear()
        with contextlib.suppress(Diverged):  # some do on so few images
            net, _ = method.networks(there, [0, 1] if method.ensemble else [0], data, recipe)
            assert {tensor.device.type for tensor in net.state_dict().values()} == {"cuda"}
        waits = gpu.waits - Counter(synchronize=2, __bool__=500)  # of the clock; of the checks at the end, one per tensor
    assert waits.pop("to the CPU", 0) <= len(epochs) + 2  # each epoch for its order
    assert waits.pop("__int__", 0) <= (len(FORGET) + len(RETAIN)) * 2  # toshi_k reads each label once
    assert waits.total() <= len(steps) / 2, waits


@pytest.mark.parametrize("kind", ["retrained", "finetune", "one at a time"])
def test_a_workers_task_gives_what_it_gives_on_the_cpu(kind, small, original, tmp_path):
    data, recipe = small[0], dataclasses.replace(small[1], networks_at_once=2)
    # In a folder of its own: whatever this process reads from a method's folder is taken for the method's.
    path = tmp_path / "method" / "some.py"
    path.parent.mkdir()
    alone = METHOD.replace("torch.randn(parameter.shape)", "torch.randn_like(parameter)")
    path.write_text(alone if kind == "one at a time" else (HERE / "methods" / "finetune.py").read_text())
    method = Method.read(path)

    def task(device: str) -> list:
        setting = runs.Setting(tmp_path, 1, device, keep_networks=True)
        there = setting, Pool(tmp_path / "pool", {}), data, recipe
        if kind == "retrained":
            return runs._Retraining(*there, kind)([0, 1])
        return runs._Unlearning(*there, copy.deepcopy(original), method)([0, 1] if method.ensemble else [1])

    expected = task("cpu")
    with PretendGPU():
        found = task("cuda")
        if kind != "retrained":
            setting = runs.Setting(tmp_path, 1, "cuda")
            alone = runs._Alone(setting, data, recipe, copy.deepcopy(original), method, 0.1)
            assert all(number > 0 for number in alone(1))
    for (run, values, network), (_, wanted, content) in zip(found, expected, strict=True):
        for name in values.keys() - {"seconds"}:
            np.testing.assert_array_equal(values[name], wanted[name], err_msg=f"run {run}: {name}")
        there, here = (torch.load(io.BytesIO(file), weights_only=True) for file in (network, content))
        assert all(torch.equal(tensor, here[name]) for name, tensor in there.items())


# What can be computed there from confidences.


@pytest.fixture(scope="module")
def sides() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return tuple(torch.randn(32, 5, dtype=torch.float64, generator=source) + shift for shift in (0.3, 0))


COMPUTED = {
    "confidences": lambda ours, theirs: logit_scaled_confidence(
        ours[..., None] * theirs.new_ones(3), theirs[0].long().abs() % 3
    ),
    "epsilons": epsilons,
    "attacks": lambda ours, theirs: best_attacks(ours, theirs).left,
    "why": lambda ours, theirs: why.shifts_and_spreads(ours, theirs).ratio,
    **ATTACKS,
}


@pytest.mark.parametrize("what", COMPUTED)
def test_the_metric_and_the_attacks_give_the_values_of_the_cpu(what, sides):
    expected = COMPUTED[what](*sides)
    with PretendGPU():
        found = COMPUTED[what](*(side.to("cuda") for side in sides))
        assert found.device.type in ("cuda", "cpu")
        assert torch.equal(found.cpu(), expected)


def test_forgetting_quality(sides):
    with PretendGPU():
        there = epsilons(*(side.to("cuda") for side in sides))
        assert forgetting_quality(there, 32) == forgetting_quality(epsilons(*sides), 32)


class _Sees:
    """Waits until another process has a task too."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, task: int) -> str | None:
        (self.folder / str(os.getpid())).touch()
        end = time.monotonic() + 20
        while len(list(self.folder.iterdir())) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_each_process_sees_one_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-6")
    assert runs.gpus() == ["5", "GPU-6"]
    seen = list(in_processes(_Sees(tmp_path), [0, 1, 2], 3, str, runs.gpus()))
    assert sorted(seen) == ["5", "5", "GPU-6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runs.gpus() == ["0", "1"]
