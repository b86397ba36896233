"""Recipes, the networks they train, and what is asked of a trained network."""

import copy
import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from evaluator import pool, training
from evaluator.data import Data, Loader, load, say
from evaluator.ensemble import Ensemble
from evaluator.files import Problem
from evaluator.metric import logit_scaled_confidence
from evaluator.models import resnet18
from evaluator.pool import answers
from evaluator.training import Recipe, generators, one_thread, original_network, retrain, seconds_of_retraining, train


@pytest.fixture(scope="module")
def data(small_digits) -> Data:
    return load(small_digits)


@pytest.fixture(scope="module")
def recipe(data) -> Recipe:
    return Recipe.of(data)


def states(nets) -> list[dict]:
    return [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in nets]


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# Recipes.


def test_the_recipe_of_a_folder(data, recipe):
    assert dataclasses.asdict(recipe).items() >= data.recipe.items()
    assert (recipe.width, recipe.epochs, recipe.networks_at_once) == (4, 1, 4)
    # The competition's own folder describes none: its recipe is the default.
    kaggle = Recipe.of(dataclasses.replace(data, recipe={}))
    assert kaggle == Recipe() and kaggle.optimizer == "adam" and kaggle.class_weighted
    assert sum(tensor.numel() for tensor in kaggle.network(10).parameters()) == 11_181_642


@pytest.mark.parametrize(
    "change, words",
    [
        ({"epoch": 3}, "'epoch' is unknown; allowed are 'model', 'width', 'small_images', 'epochs', "),
        ({"optimizer": "lion"}, "optimizer is 'lion', it must be one of adam, sgd"),
        ({"optimizer": ["adam"]}, "optimizer is ['adam'], it must be one of adam, sgd"),
        ({"schedule": None}, "schedule is None, it must be one of cosine, one_cycle"),
        ({"epochs": "3"}, "epochs is '3', it must be an integer from 1 to 100000"),
        ({"epochs": 0}, "epochs is 0, it must be an integer from 1 to 100000"),
        ({"epochs": 3.0}, "epochs is 3.0, it must be an integer from 1 to 100000"),
        ({"width": -1}, "width is -1, it must be an integer from 1 to 1024"),
        ({"width": True}, "width is True, it must be an integer from 1 to 1024"),
        ({"networks_at_once": 0}, "networks_at_once is 0, it must be an integer from 1 to 1024"),
        ({"networks_at_once": None}, "networks_at_once is None, it must be an integer from 1 to 1024"),
        ({"batch_size": 1}, "batch_size is 1, it must be an integer from 2 to 65536"),
        ({"batch_size": 10**12}, "batch_size is 1000000000000, it must be an integer from 2 to 65536"),
        ({"small_images": 1}, "small_images is 1, it must be true or false"),
        ({"class_weighted": "yes"}, "class_weighted is 'yes', it must be true or false"),
        *(
            ({"learning_rate": rate}, f"learning_rate is {rate!r}, it must be a finite number above 0")
            for rate in (0, -0.1, None, "0.1", True, math.nan, math.inf)
        ),
        ({"learning_rate": 10**400}, "learning_rate is 100"),
        *(
            ({"weight_decay": decay}, f"weight_decay is {decay!r}, it must be a finite number of at least 0")
            for decay in (-1e-9, None, [0], math.nan, math.inf, -math.inf)
        ),
    ],
)
def test_a_wrong_recipe_is_named(data, change, words):
    with pytest.raises(Problem) as problem:
        Recipe.of(dataclasses.replace(data, recipe=data.recipe | change))
    message = str(problem.value)
    assert message.startswith(f"{data.folder / 'dataset.json'}: recipe: {words}") and "\n" not in message


def test_the_ends_of_the_ranges(data):
    """And an integer stands for the float: the recipe, and with it the key of its networks, is the same."""
    for values in (
        {"width": 1, "epochs": 1, "networks_at_once": 1},
        {"width": 1024, "epochs": 100_000, "batch_size": 65_536},
    ):
        assert dataclasses.asdict(Recipe.of(dataclasses.replace(data, recipe=values))).items() >= values.items()
    recipe = Recipe.of(dataclasses.replace(data, recipe={"learning_rate": 1, "weight_decay": 0, "batch_size": 2}))
    assert repr(recipe) == repr(Recipe(learning_rate=1.0, weight_decay=0.0, batch_size=2))
    for field in dataclasses.fields(Recipe):  # each can be set, to its default too
        assert Recipe.of(dataclasses.replace(data, recipe={field.name: field.default})) == Recipe()


def test_a_last_batch_of_few_images_is_warned_of(data, capsys):
    """Batch norm's statistics of two images break a training."""
    say.cache_clear()
    count = len(data.retain)
    for last in range(6):
        batch_size = next(size for size in range(16, count) if count % size == last)
        Recipe.of(dataclasses.replace(data, recipe=data.recipe | {"batch_size": batch_size}))
        said = capsys.readouterr().err
        assert bool(said) == (last in (1, 2, 3, 4))
        if said:
            assert said.startswith(
                f"warning: {data.folder}, public split: the last batch of an epoch has {last} of {batch_size}"
            )


def test_a_last_batch_of_few_images_is_nothing_to_a_network_without_batch_norm(data, capsys):
    say.cache_clear()
    images = F.interpolate(data.retain.images.float(), size=(32, 32)).byte()
    data = dataclasses.replace(data, retain=dataclasses.replace(data.retain, images=images))
    batch_size = next(size for size in range(16, len(images)) if len(images) % size == 2)
    for model, warned in (("squeezenet1_1", False), ("mobilenet_v3_small", True)):
        Recipe.of(dataclasses.replace(data, recipe={"model": model, "batch_size": batch_size}))
        assert ("the last batch of an epoch" in capsys.readouterr().err) == warned


# Training.


def schedule_of(recipe: Recipe, data: Data) -> list[float]:
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        progress = list(train(recipe.network(10), data.retain, recipe, data.class_counts, generators([0], "cpu")))
    finally:
        hook.remove()
    assert progress == [(done + 1, len(rates)) for done in range(len(rates))]
    return rates


def test_schedules(data, recipe):
    steps = 3 * math.ceil(len(data.retain) / recipe.batch_size)
    rates = schedule_of(dataclasses.replace(recipe, epochs=3, schedule="cosine", learning_rate=0.5), data)
    expected = [0.25 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    assert rates == pytest.approx(expected, abs=1e-9)
    rates = schedule_of(dataclasses.replace(recipe, epochs=3, schedule="one_cycle", learning_rate=0.5), data)
    # Two straight lines: up from a 25th over a fifth of the steps, then down to almost 0.
    top = 0.2 * (steps + 1) - 1
    expected = np.interp(range(steps), [0, top, steps], [0.5 / 25, 0.5, 0.5 / 25 / 1e4])
    assert rates == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("class_weighted", [True, False])
def test_the_first_step_by_hand(data, recipe, optimizer, class_weighted):
    recipe = dataclasses.replace(
        recipe, optimizer=optimizer, class_weighted=class_weighted, schedule="cosine", learning_rate=0.01, weight_decay=0.1
    )
    torch.manual_seed(0)
    net = recipe.network(10)
    by_hand = copy.deepcopy(net).train()
    counts = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 0])  # a class that is not in the train set weighs as one
    steps = train(net, data.retain, recipe, counts, generators([7], "cpu"))
    next(steps)
    batch = next(iter(Loader(data.retain, recipe.batch_size, generators([7], "cpu"))))
    logits, labels = by_hand(batch["image"]), batch["age_group"]
    losses = -logits.log_softmax(1)[torch.arange(len(labels)), labels]
    weights = 1 / counts.clamp(min=1) if class_weighted else torch.ones(10)
    ((losses * weights[labels]).sum() / weights[labels].sum()).backward()
    for (name, new), old in zip(net.named_parameters(), by_hand.parameters(), strict=True):
        gradient = old.grad + 0.1 * old
        if optimizer == "sgd":
            expected = old - 0.01 * (gradient + 0.9 * gradient)  # momentum and Nesterov's look-ahead
        else:
            clear = gradient.abs() > 1e-4  # Adam's first step is the gradient's sign
            expected = torch.where(clear, old - 0.01 * gradient / (gradient.abs() + 1e-8), new)
            assert clear.float().mean() > 0.2
        torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_each_members_weighted_loss_is_its_own():
    """Members' batches hold other classes; each is what torch gives for it alone, and members count alike."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3 * 8, 10), torch.randint(10, (3 * 8,))
    weight = 1 / torch.arange(1, 11).float()
    alone = [F.cross_entropy(*part, weight) for part in zip(logits.chunk(3), labels.chunk(3), strict=True)]
    torch.testing.assert_close(training._mean_loss(logits, labels, weight, 3), torch.stack(alone).mean())
    torch.testing.assert_close(training._mean_loss(logits, labels, None, 3), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("members", [1, 2])
def test_a_last_batch_of_one_image_is_left_out(data, recipe, members):
    """Batch norm has nothing to average over where the maps are 1x1."""
    few = dataclasses.replace(recipe, batch_size=len(data.retain) - 1)
    net = Ensemble(few.network(10), members)
    done = list(train(net, data.retain, few, data.class_counts, generators(range(members), "cpu")))
    assert done == [(1, 2), (2, 2)]
    assert net.members[0].bn1.num_batches_tracked.item() == 1


def test_training_learns(data, recipe):
    net = retrain(data, dataclasses.replace(recipe, epochs=12), [0, 1])
    assert not any(module.training for module in net.modules())
    assert answers(net, data)["ra"].min() > 0.8


# Seeds.


def test_a_block_of_networks_depends_on_its_seeds_alone(data, recipe):
    torch.manual_seed(1)
    first = states(retrain(data, recipe, [5, 6, 7]).members)
    torch.manual_seed(2)
    torch.rand(3)
    again = states(retrain(data, recipe, [5, 6, 7]).members)
    assert all(same(one, other) for one, other in zip(first, again, strict=True))
    assert not same(first[0], first[1]) and not same(first[1], first[2])


def test_a_network_depends_on_its_own_seed(data, recipe):
    """Beside others it is the same network; which share an ensemble decides the rounding, so that is fixed by the recipe."""
    (before,) = states(retrain(data, dataclasses.replace(recipe, epochs=0), [6]).members)
    others = states(retrain(data, dataclasses.replace(recipe, epochs=0), [5, 6, 7]).members)
    assert same(others[1], before)  # the initialisation, to the last bit
    recipe = dataclasses.replace(recipe, learning_rate=0.001)  # small steps, in which rounding does not grow
    beside_two = states(retrain(data, recipe, [5, 6, 7]).members)[1]
    beside_three = states(retrain(data, recipe, [6, 9, 8, 1]).members)[0]
    for name, tensor in beside_two.items():
        torch.testing.assert_close(tensor, beside_three[name], rtol=1e-3, atol=1e-3)


def test_retrained_networks_never_see_the_forget_set(data, recipe):
    other = dataclasses.replace(data, forget=None, validation=None, test=None)
    first, second = (states(retrain(part, recipe, [3]).members) for part in (data, other))
    assert same(first[0], second[0])


def test_the_original_is_trained_once(small_digits, tmp_path):
    folder = shutil.copytree(small_digits, tmp_path / "few", ignore=shutil.ignore_patterns("original_model.pth"))
    data = load(folder)
    recipe = Recipe.of(data)
    (trained,) = states([original_network(data, recipe)])
    kept = (folder / "original_model.pth").read_bytes()
    assert same(trained, torch.load(folder / "original_model.pth", weights_only=True))
    net = original_network(data, recipe)
    assert same(trained, net.state_dict()) and not net.training
    assert (folder / "original_model.pth").read_bytes() == kept
    # It is the same for every split: trained on retain and forget together.
    (folder / "original_model.pth").unlink()
    assert same(trained, original_network(load(folder, "private"), recipe).state_dict())
    with pytest.raises(Problem, match=r"trained differently \(width was 4, is now 8\)"):
        original_network(data, dataclasses.replace(recipe, width=8))
    (folder / "original_model.json").unlink()  # from now on it is one that came from elsewhere
    with pytest.raises(Problem, match=r"'conv1\.weight' has shape"):
        original_network(data, dataclasses.replace(recipe, width=8))


# Answers.


def plain_answers(net: nn.Module, data: Data) -> dict:
    """One network, one image at a time."""
    net = net.eval()

    def logits(examples):
        with torch.no_grad():
            return torch.cat([net(examples[index]["image"][None]) for index in range(len(examples))])

    def accuracy(examples):
        labels = examples.age_group.tolist()
        right = [answer.argmax().item() == label for answer, label in zip(logits(examples), labels, strict=True)]
        return sum(right) / len(right)

    confidences = logit_scaled_confidence(logits(data.retain), data.retain.age_group)
    return {
        "forget_logits": logits(data.forget),
        "retain_confidences": confidences,
        "ra": accuracy(data.retain),
        "va": accuracy(data.validation),
        "ta": accuracy(data.held_out),
    }


def test_answers_of_an_ensemble_and_of_one_network(data, recipe):
    ensemble = retrain(data, recipe, [0, 1, 2])
    found = answers(ensemble, data)
    assert {name: value.shape for name, value in found.items()} == {
        "forget_logits": (3, len(data.forget), 10),
        "retain_confidences": (3, len(data.retain)),
        "ra": (3,),
        "va": (3,),
        "ta": (3,),
    }
    assert found["forget_logits"].dtype == found["retain_confidences"].dtype == np.float32
    assert found["ra"].dtype == np.float64
    for k, member in enumerate(ensemble.members):
        expected = plain_answers(member, data)
        alone = answers(member, data)
        for name, value in expected.items():
            tolerance = 1e-9 if name in ("ra", "va", "ta") else 1e-3
            np.testing.assert_allclose(found[name][k], np.asarray(value), rtol=0, atol=tolerance, err_msg=name)
            np.testing.assert_allclose(alone[name][0], np.asarray(value), rtol=0, atol=tolerance, err_msg=name)


def test_answers_in_parts(data, recipe, monkeypatch):
    ensemble = retrain(data, recipe, [0, 1, 2])
    whole = answers(ensemble, data)
    monkeypatch.setattr(pool, "IMAGES_AT_ONCE", 40)
    monkeypatch.setattr(pool, "RETAIN_CONFIDENCES", 11)
    parts = answers(ensemble, data)
    np.testing.assert_allclose(parts["forget_logits"], whole["forget_logits"], rtol=0, atol=1e-3)
    assert parts["retain_confidences"].shape == (3, 11)
    for end in (0, -1):  # spread over the whole set
        np.testing.assert_allclose(parts["retain_confidences"][:, end], whole["retain_confidences"][:, end], atol=1e-3)


def test_answers_of_a_folder_without_a_test_set(data, recipe):
    net = retrain(data, recipe, [0])
    found = answers(net, dataclasses.replace(data, test=None))
    assert found["ta"] == found["va"]


def test_answers_put_a_network_in_evaluation_mode(data):
    net = resnet18(10, 4, True).train()
    before = copy.deepcopy(net.state_dict())
    answers(net, data)
    assert not net.training and same(before, net.state_dict())


def test_the_cost_of_a_retraining_is_extrapolated(data, recipe, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(training, "worker_seconds", lambda device: float(next(clock)))
    steps = 4 * math.ceil(len(data.retain) / recipe.batch_size)
    recipe = dataclasses.replace(recipe, epochs=4)
    # The clock is asked at the start, after each step and at the end, and gains a second each time.
    assert seconds_of_retraining(data, recipe, at_most=3.5) == pytest.approx(5 * steps / 4)


@pytest.mark.parametrize("before", [False, True])
def test_subnormal_numbers_count_as_0_on_one_thread(before):
    def flushed() -> bool:
        return bool(torch.tensor(1e-40) * 1 == 0)

    torch.set_flush_denormal(before)
    try:
        with one_thread():
            with one_thread():
                assert flushed()
            assert flushed()
        assert flushed() == before
    finally:
        torch.set_flush_denormal(False)
