"""On a real GPU: training from CUDA graphs, and a whole evaluation. Skipped where there is none."""

import dataclasses
import json
import shutil

import pytest
import torch

import evaluate
from benchmarks.yardsticks import one_at_a_time
from evaluator import convolution
from evaluator.data import load
from evaluator.ensemble import Ensemble
from evaluator.evaluation import HERE, Evaluation
from evaluator.models import initialise
from evaluator.training import Recipe, generators, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: CUDA graphs need one")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convolutions in whole float32, by kernels that always add in the same order."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def trained(data, recipe: Recipe, size: int, engine: str, dtype=torch.float32) -> tuple[dict[str, torch.Tensor], int]:
    sources = generators(range(size), "cuda")
    net = recipe.network(10).to("cuda")
    net = Ensemble(net, size, sources)
    for member, source in zip(net.members, sources, strict=True):
        initialise(member, source, lambda: recipe.network(10))
    if dtype != torch.float32:
        net.to(dtype).register_forward_pre_hook(lambda _, images: (images[0].to(dtype),))
    torch.manual_seed(0)
    steps = sum(1 for _ in train(net, data.retain, recipe, data.class_counts.to(dtype), sources, engine))
    return net.state_dict(), steps


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("engine", "model", "size"),
    [
        *(("joint", *what) for what in [("resnet18", 1), ("resnet18", 4), ("mobilenet_v3_small", 2), ("squeezenet1_1", 1)]),
        *(("streams", *what) for what in [("resnet18", 4), ("squeezenet1_1", 1)]),
    ],
)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_captured_training_is_the_same_training(engine, model, size, optimizer, small_digits):
    """Three epochs with a last batch that is smaller; with dropout, from each network's own generator or torch's."""
    data = load(small_digits, device="cuda")
    schedule = {"adam": "cosine", "sgd": "one_cycle"}[optimizer]
    recipe = Recipe(model, 4, True, 3, 100, optimizer, 1e-4, schedule=schedule)
    if model != "resnet18":
        images = torch.nn.functional.interpolate(data.retain.images.float(), size=(32, 32)).byte()
        data = dataclasses.replace(data, retain=dataclasses.replace(data.retain, images=images))
    assert len(data.retain) % recipe.batch_size
    # Batch norm over maps of one pixel makes far more of the last bits of MobileNet's weights than these tolerances.
    dtype = torch.float64 if model == "mobilenet_v3_small" else torch.float32
    (plain, steps), (captured, same) = (trained(data, recipe, size, one, dtype) for one in ("steps", engine))
    assert steps == same > 6
    assert_same(captured, plain)


@pytest.mark.parametrize("products", [True, False])
def test_either_way_to_convolve_gives_the_same_training(products, small_digits, monkeypatch):
    asked = []
    monkeypatch.setattr(convolution, "_quicker_as_products", lambda *size: asked.append(size) or products)
    data, recipe = load(small_digits, device="cuda"), Recipe("resnet18", 8, True, 2, 100, learning_rate=1e-4)
    plain, _ = trained(data, recipe, 4, "steps")
    assert not asked
    found, _ = trained(data, recipe, 4, "joint")
    assert asked
    assert_same(found, plain)


def test_the_quickest_way_is_found_without_the_global_generator():
    before = torch.cuda.get_rng_state()
    size = (64, 16 * 64, 1, 1), (16 * 64, 64, 1, 1), (1, 1), (0, 0), 16, True, torch.device("cuda", 0)
    assert isinstance(convolution._quicker_as_products(*size), bool)
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_a_whole_evaluation(small_digits, tmp_path, capsys):
    data, finetune = tmp_path / "small_digits", HERE / "methods" / "finetune.py"
    shutil.copytree(small_digits, data)
    alone = one_at_a_time(finetune, tmp_path)
    methods = [str(path) for path in (finetune, alone, HERE / "unlearning.py")]
    where = ["--data", str(data), "--results", str(tmp_path / "results"), "--runs", "8", "--device", "cuda"]
    assert evaluate.main([*methods, *where]) == 0
    said = capsys.readouterr()
    assert "alone" in said.out
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "results").rglob("summary.json")]
    assert len(summaries) == 3 and all(summary["runs"] == 8 for summary in summaries)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("run_*.npz")}
    assert evaluate.main([*methods, *where]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("run_*.npz")}


def test_networks_that_are_made_one_at_a_time_get_more_processes(small_digits, tmp_path):
    def setting(jobs: int | None):
        return Evaluation.of(str(small_digits), results=tmp_path, jobs=jobs, device="cuda").setting

    assert setting(None).jobs == torch.cuda.device_count() <= setting(None).single_jobs
    assert (setting(3).jobs, setting(3).single_jobs) == (3, None)
