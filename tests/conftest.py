"""What several test files share: a small data folder, one thread, the same hypothesis examples on every run."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from digits import RECIPE, digits
from evaluate_helpers import Launcher
from hypothesis import settings
from layout import write
from method_helpers import FORGET, RETAIN
from torch import nn
from torch.nn import functional as F

from evaluator.data import load
from evaluator.evaluation import Evaluation
from evaluator.models import resnet18
from evaluator.training import Recipe, original_network

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("kit", deadline=None, derandomize=True)
settings.load_profile("kit")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory) -> Path:
    """The first 300 digits, as if 7 people had written them, and a recipe of one epoch: three forget sets of some 30 images.
    Copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("data") / "small_digits"
    recipe = RECIPE | {"width": 4, "small_images": True, "epochs": 1, "networks_at_once": 4}
    write(folder, digits(300, 42, {"public": 0, "private": 1, "private-2": 2}, recipe))
    return folder


@pytest.fixture(scope="session")
def original() -> nn.Module:
    """Trained until it knows its training images."""
    torch.manual_seed(0)
    net = resnet18(10, width=4, small_images=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    images, labels = torch.cat([RETAIN.images, FORGET.images]).float(), torch.cat([RETAIN.age_group, FORGET.age_group])
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture
def net(original) -> nn.Module:
    return copy.deepcopy(original)


@pytest.fixture(scope="session")
def data(small_digits) -> Path:
    """The small digits with their original, trained once for all tests."""
    examples = load(small_digits)
    original_network(examples, Recipe.of(examples))
    return small_digits


@pytest.fixture(scope="session")
def pools(data, tmp_path_factory) -> Path:
    """Results with 16 retrained networks of each split, and what is worked out once about them. Not to be changed."""
    folder = tmp_path_factory.mktemp("pools")
    for split in ("public", "private", "private-2"):
        Evaluation.of(str(data), split, 16, folder, jobs=1, device="cpu").retrained()
        Evaluation.of(str(data), split, 4, folder, jobs=1, device="cpu").ceiling()
    return folder


@pytest.fixture
def results(pools, tmp_path) -> Path:
    """A copy of them to work in."""
    shutil.copytree(pools, tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    made = Launcher(tmp_path_factory.mktemp("launcher"))
    yield made
    made.process.stdin.close()
    assert made.process.wait() == 0
