"""Networks other than ResNet-18: made, trained at once or one at a time, unlearned by every method, and scored."""

import copy
import dataclasses
import json
import multiprocessing
import multiprocessing.forkserver
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from digits import digits
from evaluate_helpers import METHOD, kept, refused, run
from layout import write
from method_helpers import BATCH, FORGET, RETAIN, changed, logits, same_at_once, unlearned
from test_methods_contract import KEEP_SOME, METHODS, SHORT
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.vision_transformer import VisionTransformer

from evaluator import models, training
from evaluator.data import Data, load, say
from evaluator.ensemble import Ensemble, obstacle
from evaluator.files import Problem
from evaluator.models import initialise, network, trial
from evaluator.pool import answers
from evaluator.training import Recipe, generators, original_network, retrain

ROOT = Path(__file__).resolve().parent.parent
FINETUNE, UNLEARNING = str(ROOT / "methods" / "finetune.py"), str(ROOT / "unlearning.py")


# Small networks of torchvision's own classes.


def vgg(batch_norm: bool, features=(4, "M", 8, "M"), hidden: int = 16) -> VGG:
    """With few channels and hidden units: most of a VGG's 129 million weights lie between features and classifier."""
    with torch.device("meta"):
        net = VGG(nn.Identity(), num_classes=10)
    net.features = make_layers(features, batch_norm)
    for layer in net.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    with torch.no_grad():
        net.features[0].weight.div_(100)  # images are 0..255, which no batch norm puts right
    channels = [entry for entry in features if entry != "M"][-1]
    net.classifier = nn.Sequential(
        nn.Linear(channels * 49, hidden), nn.ReLU(True), nn.Dropout(), nn.Linear(hidden, hidden), nn.Linear(hidden, 10)
    )
    return net


def mobilenet() -> MobileNetV3:
    """With squeeze-and-excitation, whose convolutions are called fc1 and fc2, and dropout."""
    rows = [(8, 3, 16, 8, True, "RE", 2, 1), (8, 3, 16, 8, False, "HS", 1, 1)]
    return MobileNetV3([InvertedResidualConfig(*row, width_mult=1.0) for row in rows], 16, num_classes=10)


def convnext() -> ConvNeXt:
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], stochastic_depth_prob=0.2, num_classes=10)


def transformer() -> VisionTransformer:
    net = VisionTransformer(8, 4, 2, 2, hidden_dim=8, mlp_dim=16, dropout=0.1, num_classes=10)
    nn.init.normal_(net.heads.head.weight, std=0.1)  # torchvision begins with zeros, at which nothing below has a gradient
    return net


NETWORKS = {
    "vgg": lambda: vgg(batch_norm=True),
    "vgg without batch norm": lambda: vgg(batch_norm=False),
    "mobilenet": mobilenet,
    "convnext": convnext,
    "transformer": transformer,
}


@pytest.fixture(params=NETWORKS)
def original(request) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[request.param]().eval()


# How they are made.


@pytest.mark.parametrize(
    "name, size", [("resnet34", 32), ("mobilenet_v3_small", 32), ("squeezenet1_1", 32), ("vit_b_16", 48), ("googlenet", 32)]
)
def test_they_are_torchvisions(name, size):
    with torch.device("meta"):
        net = network(name, 7, size=(size, size))
        how = (
            {"image_size": size}
            if name == "vit_b_16"
            else {"aux_logits": False, "init_weights": True}
            if name == "googlenet"
            else {}
        )
        expected = torchvision.models.get_model(name, num_classes=7, **how)
    assert str(net) == str(expected)
    shapes = {key: tensor.shape for key, tensor in expected.state_dict().items()}
    assert {key: tensor.shape for key, tensor in net.state_dict().items()} == shapes


@pytest.mark.parametrize("name, blocks, expansion", [("resnet34", [3, 4, 6, 3], 1), ("resnet50", [3, 4, 6, 3], 4)])
def test_other_resnets_have_a_width_too(name, blocks, expansion):
    net = network(name, 7, 4, True)
    assert [len(getattr(net, f"layer{stage}")) for stage in (1, 2, 3, 4)] == blocks
    assert list(net.state_dict()) == list(getattr(torchvision.models, name)(num_classes=7).state_dict())
    assert net.fc.in_features == 32 * expansion and isinstance(net.maxpool, nn.Identity)
    assert net.eval()(torch.rand(2, 3, 8, 8)).shape == (2, 7)


def test_an_initialisation_depends_on_its_generator_alone():
    def drawn(seed: int, global_seed: int) -> dict:
        torch.manual_seed(global_seed)
        net = network("mobilenet_v3_small", 10)
        before = torch.get_rng_state()
        initialise(net, torch.Generator().manual_seed(seed), lambda: network("mobilenet_v3_small", 10))
        assert torch.equal(torch.get_rng_state(), before)
        return net.state_dict()

    first, again, other = drawn(1, 1), drawn(1, 2), drawn(2, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    weights = "classifier.3.weight"
    assert not torch.equal(first[weights], other[weights])
    assert first[weights].std().item() == pytest.approx(0.01, rel=0.05)  # torchvision's, not PyTorch's default of 0.018


@pytest.mark.parametrize(
    "name, size, words",
    [
        ("resnet19", 32, "'resnet19' is not a classifier of torchvision; do you mean resnet18 or resnet152"),
        ("VGG11", 32, "'VGG11' is not a classifier"),
        ("../evil\nname", 32, r"'../evil\nname' is not a classifier of torchvision; see torchvision.models.list_models()"),
        ("", 32, "'' is not a classifier"),
        ("fasterrcnn_resnet50_fpn", 32, "'fasterrcnn_resnet50_fpn' is not a classifier"),
        ("vgg11", 8, "vgg11 cannot take images of 8x8 pixels (Given input size: (512x1x1)."),
        ("vit_b_16", 40, "vit_b_16 cannot take images of 40x40 pixels (Input shape indivisible by patch size!)"),
        ("inception_v3", 32, "inception_v3 cannot take images of 32x32 pixels (Calculated padded input size"),
    ],
)
def test_a_network_that_cannot_be_is_named(name, size, words):
    with pytest.raises(Problem) as problem:
        trial(name, 10, size=(size, size))
    assert words in str(problem.value) and "\n" not in str(problem.value)


def test_every_size_of_a_resnet_that_cannot_be_is_named():
    with pytest.raises(Problem, match=r"^resnext50_32x4d of width 4 cannot take images of 32x32 pixels \("):
        trial("resnext50_32x4d", 10, 4)


# Recipes.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 digits of 32x32 pixels, 12 of them to forget."""
    folder = tmp_path_factory.mktemp("networks") / "big digits"
    recipe = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "networks_at_once": 2}
    made = digits(40, 150, {"public": 0}, recipe)
    write(folder, dataclasses.replace(made, pictures=made.pictures.repeat(4, 1).repeat(4, 2)))
    described = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(described | {"name": "big"}))
    return folder


@pytest.fixture(scope="module")
def data(folder) -> Data:
    return load(folder)


def recipe_of(data: Data, model: str | None = None, **recipe) -> Recipe:
    return Recipe.of(dataclasses.replace(data, recipe=recipe), model)


def test_the_network_is_one_of_the_recipes_fields(data):
    recipe = recipe_of(data, model=None, **{"epochs": 3})
    assert recipe == Recipe(epochs=3) and recipe.model == "resnet18"
    assert "model" not in recipe.made_from  # the keys of what was made before there was a choice
    assert recipe.made_from | {"model": "resnet18"} == dataclasses.asdict(recipe)
    other = Recipe.of(dataclasses.replace(data, recipe={"model": "mobilenet_v3_small"}))
    assert other.made_from == dataclasses.asdict(Recipe(model="mobilenet_v3_small"))
    assert type(other.network(10)).__name__ == "MobileNetV3"


@pytest.mark.parametrize(
    "recipe, model, words",
    [
        ({"model": 18}, None, "dataset.json: recipe: model is 18, it must be the name of a classifier of torchvision"),
        ({"model": ["vgg11"]}, "vgg11", "dataset.json: recipe: model is ['vgg11'], it must be the name"),
        ({"model": "vgg"}, None, "dataset.json: recipe: 'vgg' is not a classifier of torchvision; do you mean vgg"),
        ({"model": "vgg11", "width": 64}, None, "recipe: width is for ResNets, it has no meaning for vgg11: leave it out"),
        ({"model": "vgg11", "small_images": False}, None, "recipe: small_images is for ResNets"),
        ({"width": 4}, "vgg99", "--model: 'vgg99' is not a classifier of torchvision; do you mean vgg1"),
        ({}, "vit_l_14", "--model: 'vit_l_14' is not a classifier of torchvision; do you mean vit_l_16 or "),
        ({}, "vit_h_14", "--model: vit_h_14 cannot take images of 32x32 pixels"),
    ],
)
def test_a_wrong_network_is_named(data, recipe, model, words):
    with pytest.raises(Problem) as problem:
        Recipe.of(dataclasses.replace(data, recipe=recipe), model)
    assert words in str(problem.value) and "\n" not in str(problem.value)


def test_another_network_than_the_folders_own(data):
    own = {"width": 4, "small_images": True, "networks_at_once": 5, "epochs": 7}
    assert recipe_of(data, "resnet34", **own) == Recipe(model="resnet34", **own)
    assert recipe_of(data, "resnet18", **own) == Recipe(**own)
    # A ResNet's sizes are not another network's.
    assert recipe_of(data, "mobilenet_v3_small", **own) == Recipe(model="mobilenet_v3_small", epochs=7)
    other = Recipe.of(dataclasses.replace(data, recipe={"model": "vgg11", "epochs": 7}), "resnet18")
    assert other == Recipe(epochs=7)


def test_large_networks_are_fewer_at_once_unless_the_recipe_says_how_many(data, capsys):
    say.cache_clear()
    assert recipe_of(data).networks_at_once == recipe_of(data, width=128).networks_at_once == 16
    assert recipe_of(data, "resnet34").networks_at_once == 8
    assert capsys.readouterr().err == ""
    assert recipe_of(data, "vgg11_bn").networks_at_once == recipe_of(data, "vgg11_bn").networks_at_once == 1
    said = capsys.readouterr().err
    assert said == "vgg11_bn: the networks are trained one at a time: each has 129 million weights\n"
    assert Recipe.of(dataclasses.replace(data, recipe={"model": "vgg11", "networks_at_once": 3})).networks_at_once == 3


@pytest.mark.parametrize(
    "name, layer",
    [
        ("vit_b_16", "LayerNorm"),
        ("convnext_tiny", "LayerNorm2d"),
        ("efficientnet_b0", "StochasticDepth"),  # drops the same images' blocks in every member
        ("densenet121", "DenseNet"),  # from here on, channels of different members would be mixed
        ("squeezenet1_1", "SqueezeNet"),
        ("shufflenet_v2_x0_5", "ShuffleNetV2"),
        ("googlenet", "GoogLeNet"),
    ],
)
def test_what_an_ensemble_cannot_hold_is_trained_one_at_a_time_and_said(data, capsys, name, layer):
    say.cache_clear()
    recipe = Recipe.of(dataclasses.replace(data, recipe={"model": name, "networks_at_once": 9}))
    assert recipe == Recipe(model=name, networks_at_once=1)
    why = f"an ensemble cannot hold a layer of type {layer}"
    assert capsys.readouterr().err == f"{name}: the networks are trained one at a time: {why}\n"


# Ensembles.


def joint(make, dtype=torch.float64, seeds=(0, 1)) -> Ensemble:
    """Members with weights of their own."""
    torch.manual_seed(0)
    ensemble = Ensemble(make().to(dtype), len(seeds), generators(seeds, "cpu"))
    for member in ensemble.members:
        member.load_state_dict(make().state_dict())
    return ensemble


@pytest.mark.parametrize(
    "make, size",
    [
        pytest.param(lambda: network("resnet34", 10, 4, True), 8, id="resnet34"),
        pytest.param(lambda: network("resnet50", 10, 4, True), 8, id="resnet50"),
        pytest.param(lambda: network("resnext50_32x4d", 10, 16, True), 8, id="resnext50"),
        pytest.param(lambda: network("mobilenet_v3_small", 10), 16, id="mobilenet_v3_small"),
        pytest.param(lambda: network("mobilenet_v2", 10), 16, id="mobilenet_v2"),
        pytest.param(lambda: vgg(True), 12, id="vgg_bn"),
        pytest.param(lambda: vgg(False), 12, id="vgg"),
    ],
)
def test_trained_as_one_they_are_what_each_is_alone(make, size):
    ensemble = joint(make)
    for module in [*ensemble.modules(), *(module for member in ensemble.members for module in member.modules())]:
        for name in ("share", "p"):
            if hasattr(module, name):  # dropout
                setattr(module, name, 0.0)
    alone = [copy.deepcopy(member) for member in ensemble.members]
    nets = [ensemble, *alone]
    images, labels = torch.rand(2 * 8, 3, size, size, dtype=torch.float64), torch.randint(10, (2 * 8,))
    for net, part, answer in zip(nets, [images, *images.chunk(2)], [labels, *labels.chunk(2)], strict=True):
        net.train()
        F.cross_entropy(net(part), answer).backward()
        torch.optim.SGD(net.parameters(), 0.01).step()
    for member, net in zip(ensemble.members, alone, strict=True):
        for name, expected in net.state_dict().items():
            torch.testing.assert_close(member.state_dict()[name], expected, rtol=1e-7, atol=1e-7)
    assert ensemble.torn() is None


def test_dropout_beside_others_drops_what_it_drops_alone():
    together, alone = joint(lambda: vgg(True), seeds=(3, 4)).train(), joint(lambda: vgg(True), seeds=(4,)).train()
    alone.members[0].load_state_dict(together.members[1].state_dict())
    images = torch.rand(2 * 5, 3, 12, 12, dtype=torch.float64)
    first, second = together(images), alone(images[5:])
    torch.testing.assert_close(first[5:], second)
    assert not torch.allclose(together(images), first)  # drawn anew each time
    dropout = together.network.classifier[2]
    dropped = dropout(torch.ones(4000, 32, dtype=torch.float64))
    assert dropped.unique().tolist() == [0, 2] and dropped.mean().item() == pytest.approx(1, abs=0.02)
    together.eval()
    assert torch.equal(together(images), together(images))


def test_an_ensemble_of_one_holds_any_network(original):
    ensemble = Ensemble(original, 1, generators([0], "cpu")).eval()
    images = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(ensemble(images), original(images), rtol=1e-4, atol=1e-5)
    (member,) = ensemble.members
    with torch.no_grad():
        for parameter in member.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(ensemble(images), member(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(member(images), original(images), rtol=1e-3)
    assert ensemble.torn() is None and list(member.state_dict()) == list(original.state_dict())


@pytest.mark.parametrize("make", [convnext, transformer])
def test_several_of_them_are_refused(make):
    with pytest.raises(TypeError, match="cannot hold a layer of type LayerNorm"):
        Ensemble(make(), 2)


def test_every_family_is_judged():
    """An ensemble holds exactly those of torchvision whose layers treat each channel alone."""
    small = "alexnet mobilenet_v2 mobilenet_v3_small resnet34 resnet50 resnext50_32x4d vgg11 vgg11_bn wide_resnet50_2"
    others = "mnasnet0_5 regnet_x_400mf swin_t"  # and those of the test above
    found = {name for name in (small + " " + others).split() if not obstacle(trial(name, 10, size=(64, 64)))}
    assert found == set(small.split())


# Training.


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_a_trained_network_depends_on_its_seeds_alone(data, name):
    """One of them draws dropout from torch's global generator, the other each member's from its own."""
    recipe = dataclasses.replace(Recipe.of(data, name), epochs=1)

    def trained(global_seed: int, seeds: list[int]) -> list[dict]:
        torch.manual_seed(global_seed)
        return [copy.deepcopy(net.state_dict()) for net in retrain(data, recipe, seeds).members]

    seeds = [5] if recipe.networks_at_once == 1 else [5, 6]
    first, again = trained(1, seeds), trained(2, seeds)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    (other,) = trained(1, [7])
    assert not any(torch.equal(tensor, other[key]) for key, tensor in first[0].items() if key.endswith("weight"))


def test_the_originals_of_different_networks_stay_apart(data, folder, tmp_path):
    data = dataclasses.replace(data, folder=tmp_path, recipe={"model": "squeezenet1_1", "epochs": 1})
    own, other = Recipe.of(data), dataclasses.replace(Recipe.of(data, "mobilenet_v3_small"), epochs=1)
    first = original_network(data, own)
    second = original_network(data, other)
    names = ["original_model", "original_model_mobilenet_v3_small"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{a}.{b}" for a in names for b in ("json", "pth"))
    assert changed(original_network(data, own), first, buffers=True) == set()
    assert changed(original_network(data, other), second, buffers=True) == set()
    (tmp_path / "original_model.pth").unlink()  # drawn again, dropout included
    torch.manual_seed(9)
    assert changed(original_network(data, own), first, buffers=True) == set()
    data.recipe.pop("model")
    with pytest.raises(
        Problem, match=r"/original_model.pth: trained differently .model was 'squeezenet1_1', is now 'resnet"
    ):
        original_network(data, Recipe.of(data))


def test_an_original_that_diverged_is_not_kept(data, tmp_path):
    recipe = {"width": 4, "optimizer": "sgd", "learning_rate": 1e30, "epochs": 3}
    data = dataclasses.replace(data, folder=tmp_path, recipe=recipe)
    with pytest.raises(Problem, match=r"original_model.pth: its training diverged: give the recipe another .* than 1e\+30$"):
        original_network(data, Recipe.of(data))
    assert not list(tmp_path.iterdir())


# Every method on every network.


@pytest.mark.parametrize("name", METHODS)
def test_every_method_unlearns_every_network(name, original):
    values = SHORT.get(name, {})
    if name == "unlearning" and not any("Norm" in type(layer).__name__ for layer in original.modules()):
        values = values | {"learning_rates": (1e-6,)}  # the first layer's new weights make the logits thousands
    net = unlearned(METHODS[name], original, **values)
    assert not any(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert list(net.state_dict()) == list(original.state_dict())
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    parameters = dict(net.named_parameters())
    moved = changed(net, original)
    assert {list(parameters)[-1], list(parameters)[-2]} <= moved  # the last linear layer
    assert name in KEEP_SOME or len(moved) >= 0.8 * len(parameters)
    assert not torch.allclose(logits(net, FORGET), logits(original, FORGET))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if getattr(method, "ENSEMBLE", False)])
@pytest.mark.parametrize("make", [lambda: vgg(True), mobilenet], ids=["vgg", "mobilenet"])
def test_every_method_unlearns_several_at_once(name, make, monkeypatch):
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for parameter in net.parameters():  # at a bias of 0, rounding would decide the sign that l1_sparse gives it
            parameter.add_(torch.randn(parameter.shape), alpha=0.01)
    if name == "sebastian":  # a value in the middle between two halves may fall to either
        monkeypatch.setattr(METHODS[name], "round_to_half", lambda net: None)
    same_at_once(METHODS[name], net, tolerance=1e-7, **SHORT.get(name, {}))


class Dense(nn.Sequential):
    """Without a convolution."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, 8), nn.ReLU(), nn.Linear(8, 10))


class Convolutional(nn.Sequential):
    """Without a linear layer, as SqueezeNet."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    "make, layer, refusing",
    [
        (Dense, "Conv2d", {"amnesiacs", "kookmin", "seif", "toshi_k"}),
        (
            Convolutional,
            "[Ll]inear",
            {"amnesiacs", "cf_k", "eu_k", "random_labels", "salun", "sebastian", "shrink_perturb", "sun"},
        ),
    ],
)
def test_a_method_says_what_a_network_lacks(make, layer, refusing):
    for name, method in METHODS.items():
        torch.manual_seed(0)
        net, values = make().eval(), SHORT.get(name, {}) | ({"relabel": 0.0} if name == "toshi_k" else {})
        if name in refusing:
            with pytest.raises(ValueError, match=f"^this method needs a .*{layer}.*") as error:
                unlearned(method, net, **values)
            assert "\n" not in str(error.value)
        else:
            assert changed(unlearned(method, net, **values), net), name


# Which layers a method means.


@pytest.mark.parametrize(
    "make, blocks, first",
    [
        (lambda: vgg(True), 1, "classifier.3."),
        (lambda: vgg(True), 3, "features.4."),  # with its batch norm
        (mobilenet, 2, "features.3."),
        (mobilenet, 3, "features.2."),
        (convnext, 2, "features.3.0."),
        (convnext, 4, "features.1.0."),  # with the norm layer before the convolution that follows it
        (transformer, 1, "encoder.layers.encoder_layer_1."),
        (transformer, 9, "encoder.layers.encoder_layer_0."),  # not the tokens and their positions
        (transformer, 0, "heads.head."),
        (lambda: network("resnet50", 10, 4), 2, "layer4.1."),
    ],
)
def test_the_last_blocks(make, blocks, first):
    net = make()
    names = [name for name, _ in net.named_parameters()]
    start = next(index for index, name in enumerate(names) if name.startswith(first))
    for method in ("cf_k", "eu_k"):
        trained = METHODS[method].last_blocks(net, blocks)
        assert [name for name in names if name.startswith(trained)] == names[start:]


def test_eu_k_starts_anew_whatever_the_layer(original):
    net = unlearned(METHODS["eu_k"], original, blocks=2, learning_rate=0.0, epochs=0.5)
    trained = METHODS["eu_k"].last_blocks(original, 2)
    expected = {name for name, _ in original.named_parameters() if name.startswith(trained)}
    norms = {f"{name}." for name, layer in original.named_modules() if isinstance(layer, (nn.BatchNorm2d, nn.LayerNorm))}
    zeros = {name for name in expected if name.endswith("bias") and (net.get_parameter(name) == 0).all()}
    moved = changed(net, original)
    assert moved <= expected
    assert all(name.startswith(tuple(norms)) or name in zeros for name in expected - moved)  # they were at their start
    for name in expected:
        assert net.get_parameter(name).abs().max() <= 1.5, name


def test_sun_keeps_norm_layers_out_of_the_draw(original):
    norms = METHODS["sun"].norm_parameters(original)
    types = {type(original.get_submodule(name.rpartition(".")[0])).__name__ for name in norms}
    assert types <= {"BatchNorm2d", "LayerNorm", "LayerNorm2d"}
    assert (len(norms) == 0) == (not any("Norm" in type(layer).__name__ for layer in original.modules()))


def test_unlearning_keeps_the_last_linear_layer(original):
    method = METHODS["unlearning"]
    names = [f"{layer}.{name}".lstrip(".") for layer, _, name in method.pool(original, method.Config())]
    every = [name for name, _ in original.named_parameters()]
    assert names == every[:-2]  # with a mobilenet's fc1 and fc2, which are convolutions
    without = method.pool(original, method.Config(norm_layers=False))
    assert not any("Norm" in type(layer).__name__ for _, layer, _ in without)
    everything = method.pool(original, method.Config(exclude=()))
    assert len(everything) == len(every)


def test_unlearning_draws_what_transformers_have_near_0():
    method, net = METHODS["unlearning"], transformer()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7)
    torch.manual_seed(0)
    method.forget(net, method.Config(tensors=2000, exclude=()), None, None)
    for name in ("class_token", "encoder.pos_embedding", "encoder.layers.0.self_attention.in_proj_weight"):
        values = net.state_dict()[name.replace("layers.0", "layers.encoder_layer_0")]
        assert 0 < values.std() < 0.03 and values.abs().max() < 0.1, name
    assert (net.encoder.ln.weight == 1).all() and (net.encoder.ln.bias == 0).all()
    assert (net.conv_proj.bias == 0).all()


def test_unlearning_by_fisher_information(original):
    values = dict(choose="fisher", epochs=(0.5,), learning_rates=(0.0,))
    assert 0 < len(changed(unlearned(METHODS["unlearning"], original, **values), original)) <= 6


def test_bad_teachers_are_untrained(original):
    images = RETAIN.images[:BATCH].float()
    first, again, other = (
        METHODS["bad_teacher"].untrained(original, images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert changed(first, again) == set()
    names = [name for name, _ in original.named_parameters()]
    assert {names[0], names[-2]} <= changed(first, other)


# From one end to the other.


@pytest.fixture
def thin(monkeypatch) -> Iterator[None]:
    """VGG with few channels and hidden units; worker processes inherit it, as they are forked from here."""

    def get_model(name: str, num_classes: int, **how) -> nn.Module:
        if not name.startswith("vgg11"):
            return torchvision.models.get_model(name, num_classes=num_classes, **how)
        return vgg(name == "vgg11_bn", (8, "M", 16, "M", 32, 32, "M", 32, 32, "M", 32, 32, "M"))

    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(models, "get_model", get_model)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(multiprocessing.forkserver, "ensure_running", lambda: None)
    training._facts.cache_clear()
    yield
    training._facts.cache_clear()  # those of thin networks: other tests ask for the real ones


@pytest.mark.parametrize("name, rate", [("vgg11_bn", 1e-3), ("vgg11", 1e-6)])
def test_a_vgg_from_one_end_to_the_other(thin, folder, tmp_path, name, rate):
    """On data whose own network it is."""
    own, results = tmp_path / "own", tmp_path / "results"
    own.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".pth" and path.name != "dataset.json":
            (own / path.name).symlink_to(path)
    described = json.loads((folder / "dataset.json").read_text())
    recipe = described["recipe"] | {"model": name, "epochs": 4}
    (own / "dataset.json").write_text(json.dumps(described | {"recipe": recipe}))
    assert run(own, results, FINETUNE) == 0
    assert run(own, results, UNLEARNING, "--set", f"learning_rates=({rate},)", "epochs=(1,)") == 0
    assert (own / "original_model.pth").is_file()
    found = {path.parent.name: json.loads(path.read_text()) for path in results.glob("big/public/*/summary.json")}
    assert set(found) == {"finetune", "unlearning"} and (results / "big" / "public" / "report.html").is_file()
    for method, summary in found.items():
        assert summary["model"] == name and summary["runs"] == 4 and 0 <= summary["score"] <= 1
        assert summary["original"] == "trained by the recipe"
        (pool,) = (results / "big" / "public" / method).glob("*/made_from.json")
        made_of = json.loads(pool.read_text())["recipe"]
        assert made_of["model"] == name and made_of["networks_at_once"] == 2


def test_a_network_that_is_trained_one_at_a_time_from_one_end_to_the_other(folder, tmp_path, capsys):
    """On data whose own network is another; both are kept, and neither takes the other's place."""
    method = tmp_path / "plain.py"
    method.write_text(METHOD)
    results = tmp_path / "results"
    say.cache_clear()
    assert run(folder, results, FINETUNE, method, "--model", "squeezenet1_1") == 0
    why = "squeezenet1_1: the networks are trained one at a time: an ensemble cannot hold a layer of type SqueezeNet"
    said = capsys.readouterr()
    assert said.err.count(why) == 1
    assert "big_squeezenet1_1, public split, 4 runs" in said.out
    assert [path.name for path in results.iterdir()] == ["big_squeezenet1_1"]
    assert (folder / "original_model_squeezenet1_1.pth").is_file() and not (folder / "original_model.pth").exists()
    assert [json.loads(path.read_text())["model"] for path in results.rglob("summary.json")] == ["squeezenet1_1"] * 2
    before = kept(results)
    assert run(folder, results, FINETUNE, method, "--model", "squeezenet1_1") == 0
    assert kept(results) == before
    assert run(folder, results, str(ROOT / "methods" / "sun.py"), "--model", "squeezenet1_1") == 1
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    needs = "ValueError: this method needs a layer of type Linear, and the network has none (line "
    assert line.startswith("error: ") and f"methods/sun.py: run 0: unlearning() raised {needs}" in line


def test_a_wrong_model_leaves_nothing_behind(folder, tmp_path, capsys):
    for model in ("resnet19", "../../elsewhere", "", "maxvit_t"):
        line = refused(capsys, run(folder, tmp_path / "results", FINETUNE, "--model", model))
        assert line.startswith(f"error: --model: {'maxvit_t cannot take' if model == 'maxvit_t' else repr(model)}")
    assert not (tmp_path / "results").exists()


def test_answers_of_a_network_without_batch_norm(data):
    net = network("squeezenet1_1", 10).eval()
    with torch.no_grad():
        expected = net(data.forget.images.float())
    torch.testing.assert_close(torch.from_numpy(answers(net, data)["forget_logits"][0]), expected, rtol=1e-4, atol=1e-4)
