"""unlearning.py does what is published of it, and every row of its ablation is reached through Config alone."""

import copy
import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torchvision
from method_helpers import BATCH, before_each_step, changed, examples, gradients
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import unlearning as submission
from evaluator.data import Loader
from evaluator.ensemble import Ensemble
from evaluator.models import resnet18
from evaluator.training import generators
from unlearning import PRESETS, Config, fisher_information, forget, learning_rate, perturb, pool, unlearning

RETAIN, FORGET = examples(4 * BATCH, 1), examples(7, 2)


class Untouchable:
    """A loader that may not be asked for anything."""

    def __getattr__(self, name):
        raise AssertionError(f"touched: {name}")

    __iter__ = __len__ = __getitem__ = lambda self, *_: pytest.fail("touched")


@pytest.fixture
def net() -> nn.Module:
    """No parameter has a value that re-initialising could give it again."""
    torch.manual_seed(0)
    net = resnet18(10, width=4, small_images=True)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 0.9)
                module.bias.uniform_(0.1, 0.2)
                module.momentum = 1.0
        net.train()(RETAIN.images.float())  # the statistics of the images it is asked about
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
    return net.eval()


def run(net: nn.Module, config: Config, seed: int = 0, forget_loader=None) -> dict[str, torch.Tensor]:
    """Unlearn a copy; returns its state."""
    torch.manual_seed(seed)
    net = copy.deepcopy(net)
    forget_loader = Untouchable() if forget_loader is None else forget_loader
    result = unlearning(net, Loader(RETAIN, BATCH), forget_loader, Untouchable(), config)
    assert result is None
    assert not any(module.training for module in net.modules())
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    return net.state_dict()


def names(tensors) -> list[str]:
    return [f"{layer}.{name}" for layer, _, name in tensors]


# The ladder and the finer tables.

FINETUNE = Config(tensors=0, exclude=(), noise=0, loss="ce", epochs=(1,))
REINIT = dataclasses.replace(FINETUNE, tensors=6)
NOISE = dataclasses.replace(REINIT, noise=0.01)
MSE = dataclasses.replace(NOISE, loss="mse")
CYCLES = dataclasses.replace(MSE, epochs=(1, 2, 2))
EXCLUDED = dataclasses.replace(CYCLES, exclude=("fc", "downsample"))
ROWS = {
    "fine-tune": FINETUNE,
    "+ random re-initialisation": REINIT,
    "by Fisher information": dataclasses.replace(REINIT, choose="fisher"),
    "+ noise": NOISE,
    "MSE": MSE,
    "3 cycles": CYCLES,
    "without fc and shortcuts": EXCLUDED,
    "L1": dataclasses.replace(NOISE, loss="l1"),
    "more noise": dataclasses.replace(NOISE, noise=0.015),
    "flip": dataclasses.replace(NOISE, augment="flip"),
    "crop": dataclasses.replace(NOISE, augment="crop"),
    "cutout": dataclasses.replace(NOISE, augment="cutout"),
    "20%": dataclasses.replace(MSE, tensors=12),
    "2 cycles": dataclasses.replace(MSE, epochs=(2, 2)),
    "without fc": dataclasses.replace(CYCLES, exclude=("fc",)),
    "single elements": dataclasses.replace(CYCLES, unit="element"),
    "no batch norm": dataclasses.replace(CYCLES, norm_layers=False),
    **PRESETS,
}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_ladder_runs(net, row):
    config = ROWS[row]
    after = run(net, config, forget_loader=Loader(FORGET, BATCH) if config.choose == "fisher" else None)
    assert any(not torch.equal(after[name], tensor) for name, tensor in net.named_parameters())
    again = run(net, config, forget_loader=Loader(FORGET, BATCH) if config.choose == "fisher" else None)
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_the_ladder_ends_in_the_published_method():
    assert EXCLUDED == Config() == PRESETS["algorithm_1"]
    assert Config().learning_rates == (1e-3,) and Config().tensors == 6 and Config().noise == 0.01
    assert PRESETS["algorithm_2"].epochs == (2, 1, 1, 1)


def test_fisher_information_chooses_whole_tensors():
    with pytest.raises(ValueError, match="unit == 'tensor' or choose == 'random'"):
        Config(choose="fisher", unit="element")


# Forget.


@pytest.mark.parametrize(
    "config, count",
    [
        (Config(), 62 - 2 - 9),  # fc: 2, downsample: 3 times a convolution and a batch norm
        (Config(exclude=("fc",)), 60),
        (Config(exclude=()), 62),
        (Config(norm_layers=False), 17),
        (Config(norm_layers=False, exclude=()), 22),
    ],
)
@pytest.mark.parametrize("make", [lambda: torchvision.models.resnet18(num_classes=10), lambda: resnet18(10, 4, True)])
def test_pool(make, config, count):
    net = make()
    found = names(pool(net, config))
    assert len(found) == len(set(found)) == count
    parameters = dict(net.named_parameters())
    for name in parameters:
        excluded = any(word in name for word in config.exclude)
        norm = parameters[name].dim() == 1 and name != "fc.bias"
        assert (name in found) == (not excluded and (config.norm_layers or not norm)), name


def test_forget_draws_tensors_with_replacement_and_leaves_the_others(net):
    candidates, counts, times = set(names(pool(net, Config()))), Counter(), Counter()
    torch.manual_seed(1)
    forgotten = copy.deepcopy(net)
    for _ in range(300):
        forgotten.load_state_dict(net.state_dict())
        forget(forgotten, Config(), None, None)
        names_changed = changed(forgotten, net, buffers=True)
        assert 1 <= len(names_changed) <= 6
        counts[len(names_changed)] += 1
        times.update(names_changed)
    assert set(times) == candidates  # never fc or a shortcut, and everything else now and then
    mean = sum(count * often for count, often in counts.items()) / 300
    assert mean == pytest.approx(51 * (1 - (50 / 51) ** 6), abs=0.15)  # 5.71; without replacement it would be 6
    assert max(times.values()) < 3 * 300 * 6 / 51


def test_forget_without_batch_norm_and_without_anything(net):
    for seed in range(20):
        torch.manual_seed(seed)
        forgotten = copy.deepcopy(net)
        forget(forgotten, Config(norm_layers=False), None, None)
        assert changed(forgotten, net) and all("conv" in name for name in changed(forgotten, net))
    forgotten = copy.deepcopy(net)
    forget(forgotten, Config(tensors=0), None, None)
    assert changed(forgotten, net) == set()


def test_fresh_values_have_torchvisions_distribution():
    torch.manual_seed(2)
    net = torchvision.models.resnet18(num_classes=10)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7)
    forget(net, Config(tensors=2000, exclude=()), None, None)  # every tensor is among so many draws
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            expected = (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(layer.weight.mean().item()) < 0.05 * expected
        elif isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and (layer.bias == 0).all(), name
    bound = 512**-0.5
    assert bound * 0.98 < net.fc.weight.abs().max() <= bound and 0 < net.fc.bias.abs().max() <= bound


@pytest.mark.parametrize(
    "config", [Config(unit="element"), Config(unit="element", tensors=17, exclude=(), norm_layers=False)]
)
def test_single_elements_are_about_as_many_as_the_tensors_would_hold(net, config):
    torch.manual_seed(3)
    forgotten = copy.deepcopy(net)
    forget(forgotten, config, None, None)
    candidates = names(pool(net, config))
    share = config.tensors / len(candidates)
    old, new = dict(net.named_parameters()), dict(forgotten.named_parameters())
    different = {name: (old[name] != new[name]).sum().item() for name in old}
    assert all(different[name] == 0 for name in old if name not in candidates)
    total = sum(old[name].numel() for name in candidates)
    assert sum(different.values()) / total == pytest.approx(share, rel=0.1)
    for name in candidates:
        count = old[name].numel()
        if count > 500:
            assert different[name] / count == pytest.approx(share, abs=5 * (share * (1 - share) / count) ** 0.5), name


def brute_force_fisher(net: nn.Module) -> dict[str, float]:
    total = Counter()
    for index in range(len(FORGET)):
        sample = FORGET[index]
        log_p = F.log_softmax(net(sample["image"][None])[0], dim=0)[sample["age_group"]]
        for name, gradient in gradients(net, log_p).items():
            total[name] += (gradient**2).mean().item()
    return total


def test_fisher_takes_the_tensors_that_matter_most_to_the_forget_set_in_every_run(net):
    expected = brute_force_fisher(net)
    scores = fisher_information(copy.deepcopy(net), Loader(FORGET, BATCH))
    for name in expected:
        assert scores[name] == pytest.approx(expected[name], rel=1e-3), name
    config = Config(choose="fisher", tensors=4)
    candidates = names(pool(net, config))
    most = sorted(candidates, key=lambda name: -expected[name])[:4]
    for seed in range(3):
        torch.manual_seed(seed)
        forgotten = copy.deepcopy(net)
        forget(forgotten, config, None, scores)
        assert changed(forgotten, net) == set(most)


@pytest.mark.parametrize("cycles", [1, 3])
def test_unlearning_breaks_what_forget_chooses_in_each_cycle(net, cycles):
    """At learning rate 0 nothing else changes. The drawn tensors differ from run to run, Fisher's do not."""
    config = Config(epochs=(0.25,) * cycles, learning_rates=(0.0,))
    old = dict(net.named_parameters())
    sets = []
    for seed in range(4):
        after = run(net, config, seed)
        sets.append(frozenset(name for name in old if not torch.equal(after[name], old[name])))
        assert 1 <= len(sets[-1]) <= 6 * cycles
    assert len(set(sets)) == 4
    assert max(map(len, sets)) > 6 * (cycles - 1)
    fisher = dataclasses.replace(config, choose="fisher")
    for seed in range(2):
        after = run(net, fisher, seed, Loader(FORGET, BATCH))
        sets.append(frozenset(name for name in old if not torch.equal(after[name], old[name])))
    assert sets[-1] == sets[-2] and len(sets[-1]) == 6


# Remember.


@pytest.mark.parametrize("loss", ["mse", "l1", "ce"])
def test_one_step_by_hand(net, loss):
    """One batch of the whole retain set, one step of SGD with weight decay."""
    config = Config(tensors=0, noise=0, loss=loss, epochs=(1,), learning_rates=(0.01,), weight_decay=0.1)
    student = copy.deepcopy(net)
    loader = Loader(RETAIN, len(RETAIN), shuffle=False)
    unlearning(student, loader, Untouchable(), Untouchable(), config)

    by_hand = copy.deepcopy(net).train()
    images, labels = RETAIN.images.float(), RETAIN.age_group
    with torch.no_grad():
        answers = net(images)
    logits = by_hand(images)
    values = {
        "mse": lambda: ((logits - answers) ** 2).mean(),
        "l1": lambda: (logits - answers).abs().mean(),
        "ce": lambda: -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean(),
    }
    values[loss]().backward()
    for (name, new), old in zip(student.named_parameters(), by_hand.parameters(), strict=True):
        expected = old - 0.01 * (old.grad + 0.1 * old)
        torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert not torch.equal(new, old), name


def test_knowledge_preserving_loss_needs_no_labels(net):
    class Unlabelled(Loader):
        def __iter__(self):
            return ({"image": batch["image"]} for batch in super().__iter__())

    loader = Unlabelled(RETAIN, BATCH)
    unlearning(copy.deepcopy(net), loader, Untouchable(), Untouchable(), Config(epochs=(0.5,)))
    with pytest.raises(KeyError, match="age_group"):
        unlearning(copy.deepcopy(net), loader, Untouchable(), Untouchable(), Config(epochs=(0.5,), loss="ce"))


def test_knowledge_preserving_loss_brings_the_outputs_back(net):
    config = Config(epochs=(10,), learning_rates=(0.01,), cosine_epochs=0)
    images = RETAIN.images.float()

    def distance(epochs: tuple) -> float:
        student = copy.deepcopy(net)
        student.load_state_dict(run(net, dataclasses.replace(config, epochs=epochs)))
        with torch.no_grad():
            return F.mse_loss(student(images), net(images)).item()

    assert distance((10,)) < 0.5 * distance((0.25,))


def steps_of(net: nn.Module, config: Config, batches: int = 4) -> list[dict]:
    """What the optimizer was set to in each step, and which optimizer it was."""
    steps = []
    loader = Loader(RETAIN, len(RETAIN) // batches)

    def note(optimizer):
        steps.append(optimizer.param_groups[0] | {"optimizer": optimizer, "params": None})

    with before_each_step(note):
        unlearning(copy.deepcopy(net), loader, Untouchable(), Untouchable(), config)
    return steps


@pytest.mark.parametrize(
    "config, expected",  # rates of each epoch, which has 4 steps
    [
        (Config(), [1e-3, 1e-3, 5e-4, 1e-3, 5e-4]),
        (Config(restart=False), [1e-3, 5e-4, 0, 5e-4, 1e-3]),
        (PRESETS["algorithm_2"], [5e-4, 1e-3, 1e-3, 1e-3, 1e-3]),
        (Config(cosine_epochs=0, learning_rates=(4e-3, 1e-3)), [4e-3] + [1e-3] * 4),
        (Config(epochs=(2,), cosine_epochs=4, learning_rates=(1.0,)), [1.0, (1 + math.sqrt(0.5)) / 2]),
    ],
)
def test_learning_rates_of_each_epoch(net, config, expected):
    found = [step["lr"] for step in steps_of(net, config)]
    assert found == pytest.approx([rate for rate in expected for _ in range(4)], abs=1e-12)


def test_learning_rates_of_each_step(net):
    half = [(1 + math.cos(math.pi * step / 8)) / 2 * 1e-3 for step in range(8)]
    assert half[:5] == pytest.approx([1e-3, 0.9619398e-3, 0.8535534e-3, 0.6913417e-3, 0.5e-3], abs=1e-9)
    found = [step["lr"] for step in steps_of(net, Config(every_step=True))]
    assert found == pytest.approx(half[:4] + half + half, abs=1e-12)
    found = [step["lr"] for step in steps_of(net, Config(epochs=(1, 1), every_step=True, restart=False))]
    assert found == pytest.approx(half, abs=1e-12)
    # Cycles of parts of an epoch go along one cosine without a jump.
    found = [step["lr"] for step in steps_of(net, Config(epochs=(0.5, 0.75, 0.75), every_step=True, restart=False))]
    assert found == pytest.approx(half, abs=1e-12)
    assert learning_rate(PRESETS["digits"], 1.0, 0.4) == pytest.approx(PRESETS["digits"].learning_rates[0] / 2)


def test_epochs_may_be_parts_of_one_and_every_cycle_has_its_own_optimizer(net):
    steps = steps_of(net, Config(epochs=(0.5, 1.25)))
    per_optimizer = Counter(id(step["optimizer"]) for step in steps)
    assert sorted(per_optimizer.values()) == [2, 5]
    assert {(step["momentum"], step["weight_decay"]) for step in steps} == {(0.9, 5e-4)}
    assert len(steps_of(net, Config(epochs=(1, 2, 2)))) == 20
    assert len(steps_of(net, Config(epochs=(0.6, 0.7, 0.7)), batches=16)) == 10 + 11 + 11


def test_whole_epochs_show_every_example_as_often(net):
    seen = Counter()

    class Counting(Loader):
        def __iter__(self):
            for batch in super().__iter__():
                seen.update(batch["image_id"])
                yield batch

    unlearning(copy.deepcopy(net), Counting(RETAIN, BATCH), Untouchable(), Untouchable(), Config(epochs=(1, 2)))
    assert set(seen.values()) == {3} and len(seen) == len(RETAIN)


# Inputs.


@pytest.mark.parametrize("noise, data_range, expected", [(0.01, 255, 2.55), (0.0318, 255, 8.109), (0.1, 1, 0.1)])
def test_noise_has_the_stated_size(noise, data_range, expected):
    torch.manual_seed(4)
    images = torch.full((64, 3, 16, 16), 100.0)
    noisy = perturb(images, Config(noise=noise, data_range=data_range), [None])
    assert (noisy - images).std().item() == pytest.approx(expected, rel=0.02)
    assert (noisy - images).mean().item() == pytest.approx(0, abs=0.02 * expected)
    assert (images == 100).all()
    assert torch.equal(perturb(images, Config(noise=0), [None]), images)


def test_each_members_noise_is_its_own():
    images = torch.zeros(6, 3, 8, 8)
    together = perturb(images, Config(), generators([1, 2, 3], "cpu"))
    for seed, part in zip((1, 2, 3), together.chunk(3), strict=True):
        assert torch.equal(part, perturb(images[:2], Config(), generators([seed], "cpu")))
    assert not torch.equal(together[:2], together[2:4])


def augmented(kind: str, count: int = 200, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    images = torch.rand(count, 3, size, size) + 1  # nothing is 0
    before = images.clone()
    result = perturb(images, Config(noise=0, augment=kind), [None])
    assert result.shape == images.shape and torch.equal(images, before)
    return images, result


def test_flip_is_vertical_and_of_half_the_images():
    images, flipped = augmented("flip")
    same = (flipped == images).flatten(1).all(1)
    turned = (flipped == images.flip(2)).flatten(1).all(1)
    assert (same ^ turned).all() and 70 < turned.sum() < 130


def test_crop_shifts_and_fills_with_black():
    images, cropped = augmented("crop")
    offsets = Counter()
    for image, result in zip(images, cropped, strict=True):
        padded = F.pad(image, (2, 2, 2, 2))
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(padded[:, y : y + 16, x : x + 16], result)]
        assert len(found) == 1
        offsets.update(found)
    assert len(offsets) == 25


def test_cutout_blackens_a_square_of_half_the_size():
    images, cut = augmented("cutout")
    corners = set()
    for image, result in zip(images, cut, strict=True):
        black = (result == 0).all(0)
        rows, columns = black.any(1).nonzero().flatten(), black.any(0).nonzero().flatten()
        assert black.sum() == 64 and len(rows) == len(columns) == 8
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == 7
        assert torch.equal(result[:, ~black], image[:, ~black])
        corners.add((rows[0].item(), columns[0].item()))
    assert {y for y, _ in corners} == {x for _, x in corners} == set(range(9))


# What it may touch.


def test_fisher_reads_the_forget_sets_samples_alone(net):
    asked = []

    class Samples:
        def __len__(self):
            return len(FORGET)

        def __getitem__(self, index: int) -> dict:
            asked.append(index)
            return FORGET[index]

    class Once(Untouchable):
        dataset = Samples()

    run(net, Config(choose="fisher", epochs=(0.25,)), forget_loader=Once())
    assert sorted(asked) == list(range(len(FORGET)))


# K at once.


@pytest.mark.parametrize(
    "config",
    [
        Config(epochs=(1, 0.5)),
        Config(epochs=(1, 0.5), exclude=(), tensors=20),
        Config(epochs=(0.5, 0.5), loss="ce", unit="element"),
        Config(epochs=(0.5, 0.5), choose="fisher"),
        Config(epochs=(1,), augment="flip", loss="l1"),
        Config(epochs=(1,), augment="crop"),
        Config(epochs=(1,), augment="cutout", norm_layers=False),
    ],
    ids=["as published", "with fc", "elements", "fisher", "flip", "crop", "cutout"],
)
def test_three_at_once_equal_one_at_a_time(net, config):
    """In float64, where rounding cannot grow, and in the ensemble's memory format, in whose order torch fills a tensor."""
    seeds = [11, 12, 13]
    sources = generators(seeds, "cpu")
    net.double().register_forward_pre_hook(lambda _, images: images[0].double())
    ensemble = Ensemble(net, 3, sources)
    assert submission.ENSEMBLE
    unlearning(ensemble, Loader(RETAIN, BATCH, sources), Loader(FORGET, BATCH), Untouchable(), config)
    assert not any(module.training for module in ensemble.modules())
    net.to(memory_format=torch.channels_last)
    for seed, member in zip(seeds, ensemble.members, strict=True):
        expected = run(net, config, seed, Loader(FORGET, BATCH))
        for name, tensor in member.state_dict().items():
            torch.testing.assert_close(
                tensor, expected[name], rtol=1e-7, atol=1e-7, msg=lambda text, where=(seed, name): f"{where}: {text}"
            )
    assert not torch.equal(ensemble.members[0].conv1.weight, ensemble.members[1].conv1.weight)


# As Kaggle calls it.


class Faces(torch.utils.data.Dataset):
    """Dicts of 32x32 images, as the competition's own data set gives them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        source = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, 32, 32), generator=source).float()
        return {"image": image, "image_id": f"0-{index}", "age_group": index % 10, "age": index, "person_id": index}


@pytest.mark.parametrize("config", [None, Config(choose="fisher", loss="ce", epochs=(1,))])
def test_the_full_network_with_plain_data_loaders(config):
    net = torchvision.models.resnet18(num_classes=10)
    before = copy.deepcopy(net)
    loaders = [DataLoader(Faces(), batch_size=8, shuffle=True) for _ in range(3)]
    more = [] if config is None else [config]
    assert unlearning(net, *loaders, *more) is None
    assert not net.training
    assert len(changed(net, before)) > 50
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    assert net.state_dict().keys() == before.state_dict().keys()
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_file_reads_in_one_sitting():
    assert len(Path(submission.__file__).read_text().splitlines()) < 300
