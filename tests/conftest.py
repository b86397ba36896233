"""What several test files share: a small data folder, one thread, the same hypothesis examples on every run."""

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from method_helpers import FORGET, RETAIN
from torch import nn
from torch.nn import functional as F

from evaluator.models import resnet18

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("kit", deadline=None, derandomize=True)
settings.load_profile("kit")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prepare() -> ModuleType:
    """data/prepare.py, a script in a folder that is no package."""
    spec = importlib.util.spec_from_file_location("prepare_under_test", ROOT / "data" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small_digits(prepare, tmp_path_factory) -> Path:
    """The first 300 digits (of three writers) and a recipe of one epoch. Copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("data") / "small_digits"
    recipe = prepare.RECIPE | {"width": 4, "small_images": True, "epochs": 1, "networks_at_once": 4}
    prepare.prepare_digits(folder, writers={"public": 0, "private": 1}, recipe=recipe, keep=300)
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
