"""Each winner's method does what was published. What all methods have in common is in test_methods_contract.py."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from method_helpers import (
    BATCH,
    FORGET,
    RETAIN,
    VALIDATION,
    before_each_step,
    changed,
    gradients,
    loaders,
    logits,
    rates,
    unlearned,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from evaluator.data import Loader
from evaluator.models import resnet18
from methods import amnesiacs, fanchuan, kookmin, sebastian, seif, sun, toshi_k


def convolutions(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in net.named_parameters() if parameter.dim() == 4}


def source() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def cosine(highest: float, epochs: int) -> list[float]:
    return [highest * (1 + math.cos(math.pi * epoch / epochs)) / 2 for epoch in range(epochs)]


@pytest.mark.parametrize(
    ("method", "expected"),
    [  # an epoch over the retain set has 4 steps here, one over the forget or the validation set 2
        (kookmin, [rate for part in (1, 2, 3, 2, 1) for rate in [part / 3 * 1e-3] * 4]),
        (seif, [rate for epoch in cosine(7e-4, 4) for rate in [epoch] * 4]),
        (sebastian, [5e-4] * 13),
        (toshi_k, [rate for epoch in cosine(1e-3, 3) for rate in [epoch] * 4]),
        (amnesiacs, [9e-4] * 6 + [rate for epoch in cosine(1e-3, 3) for rate in [epoch] * 4]),
        (sun, [2e-4] * 32 + [1e-3] * 4),
        # retain batches are 64 here, so that there is one of them, and one forget batch is contrasted with it
        (fanchuan, [5e-3] * 2 + [rate for n in range(8) for rate in (1e-6 + cosine(3e-4 - 1e-6, 16)[n], 4e-3)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_learning_rates_are_the_published_ones(method, expected, original):
    assert rates(method, original) == pytest.approx(expected)


# fanchuan


def test_fanchuan_first_pass_makes_forget_outputs_more_uniform(net, original):
    torch.manual_seed(0)
    retain, _, validation = loaders()
    config = fanchuan.Config(rounds=0, uniform_rate=2e-2)
    fanchuan.unlearning(net, retain, DataLoader(FORGET, 5, shuffle=True), validation, config)
    before, after = (fanchuan.uniform_loss(logits(each, FORGET)) for each in (original, net))
    assert after < before / 3


def test_fanchuan_uniform_loss_is_the_divergence_from_uniform():
    torch.manual_seed(0)
    predicted = torch.randn(6, 10).softmax(-1)
    uniform = torch.full((6, 10), 0.1)
    one_way = (uniform * (uniform / predicted).log()).sum(-1).mean()
    other_way = (predicted * (predicted / uniform).log()).sum(-1).mean()
    torch.testing.assert_close(fanchuan.uniform_loss(predicted.log()), one_way)
    torch.testing.assert_close(fanchuan.uniform_loss(predicted.log(), reverse=0.85), one_way + 0.85 * other_way)


def test_fanchuan_contrastive_loss_is_of_each_network_alone():
    torch.manual_seed(0)
    forget, retain = torch.randn(2, 3, 10), torch.randn(2, 5, 10)
    total = 0.0
    for k in range(2):
        for f in forget[k]:
            similarities = torch.stack([f @ r / 1.15 for r in retain[k]])
            total += (similarities.logsumexp(0) - similarities).mean() / 6
    found = fanchuan.contrastive_loss(forget.flatten(0, 1), retain.flatten(0, 1), 1.15, size=2)
    torch.testing.assert_close(found, total)


def test_fanchuan_contrast_evens_out_the_similarities(original):
    only_contrast = dict(rounds=3, uniform_rate=0.0, repair_rate=0.0, repair_decay=0.0, retain_batch=1)
    # Compared to a run that does everything but learn: batch norm's statistics move in both.
    still = unlearned(fanchuan, original, contrast_rate=0.0, contrast_rate_at_last=0.0, **only_contrast)
    pushed = unlearned(fanchuan, original, contrast_rate=3e-3, **only_contrast)
    before, after = (fanchuan.contrastive_loss(logits(net, FORGET), logits(net, RETAIN), 1.15) for net in (still, pushed))
    assert changed(still, original) == set()
    assert after < 0.9 * before


def test_fanchuan_contrast_takes_the_retain_outputs_as_they_are(net, original):
    original = copy.deepcopy(original).train()
    forget_logits, retain_logits = original(FORGET.images.float()), original(RETAIN.images.float()).detach()
    steps = gradients(original, fanchuan.contrastive_loss(forget_logits, retain_logits, 1.15))
    parts = [DataLoader(part, 20, shuffle=True) for part in (RETAIN, FORGET, VALIDATION)]
    only_one_step = dict(rounds=1, uniform_rate=0.0, repair_rate=0.0, repair_decay=0.0, retain_batch=3)
    fanchuan.unlearning(net, *parts, fanchuan.Config(contrast_rate=1.0, **only_one_step))
    for name, before in original.named_parameters():
        torch.testing.assert_close(net.get_parameter(name), before - steps[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loader", [Loader, DataLoader])
def test_fanchuan_alternates_small_forget_and_large_retain_batches(loader, net):
    sizes = []
    net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    parts = [loader(part, 5, shuffle=True) for part in (RETAIN, FORGET, VALIDATION)]
    fanchuan.unlearning(net, *parts, fanchuan.Config(rounds=2, epochs=2))
    contrast = [5, 20] * 3  # as many pairs as there are retain batches, of which there are fewer
    assert sizes == [5] * 4 + 2 * (contrast + [20] * 3)


# kookmin


def test_kookmin_redraws_the_weights_with_the_smallest_gradients(net, original):
    torch.manual_seed(0)
    drawn = {name: torch.randn_like(parameter) for name, parameter in net.named_parameters()}
    scales = kookmin.damage(net, drawn, kookmin.Config(), source())
    assert changed(net, original, buffers=True) == set(scales) == set(convolutions(net))
    for name, weight in convolutions(net).items():
        redrawn = weight != original.get_parameter(name)
        assert redrawn.sum() == round(0.3 * weight.numel())
        assert drawn[name].abs()[redrawn].max() < drawn[name].abs()[~redrawn].min()
        assert torch.equal(scales[name], torch.where(redrawn, 1.0, 0.1))
    deviation = (2 / (32 * 9)) ** 0.5  # Kaiming, fan out
    weight = net.layer4[1].conv2.weight
    assert weight[weight != original.layer4[1].conv2.weight].std().item() == pytest.approx(deviation, rel=0.05)


def test_kookmin_gradient_is_of_random_retain_batches_less_the_forget_set(net, original):
    parts = [Loader(part, BATCH, shuffle=False) for part in (RETAIN, FORGET)]
    kookmin.accumulate_gradients(net, *parts)
    total = 0.0
    for part, sign, count in ((RETAIN, 1, 32), (FORGET, -1, 20)):
        for images, labels in zip(part.images[:count].split(BATCH), part.age_group[:count].split(BATCH), strict=True):
            total = total + sign * F.cross_entropy(original(images.float()), labels)
    for name, gradient in gradients(original, total).items():
        torch.testing.assert_close(net.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
    assert torch.equal(net.bn1.running_mean, original.bn1.running_mean)


def test_kookmin_scales_gradients_in_every_step(original):
    # Where kept weights learn nothing at all, all that moves is what was redrawn.
    net = unlearned(kookmin, original, kept_gradient=0.0, weight_decay=0.0, epochs=1)
    for name, weight in convolutions(net).items():
        moved = weight != convolutions(original)[name]
        assert moved.sum() == round(0.3 * weight.numel())
    assert not torch.equal(net.fc.weight, original.fc.weight)


# seif


def test_seif_noise_is_on_the_first_convolution_only():
    net = resnet18(10)
    before = copy.deepcopy(net)
    seif.damage(net, seif.Config().noise, source())
    assert changed(net, before) == {"conv1.weight"}
    noise = net.conv1.weight - before.conv1.weight
    assert noise.std().item() == pytest.approx(0.6, rel=0.03)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.03)


def test_seif_adds_a_little_noise_before_the_last_of_four_epochs(original, monkeypatch):
    steps, drawn = [], []
    damage = seif.damage
    monkeypatch.setattr(
        seif,
        "damage",
        lambda net, deviation, generator: drawn.append((len(steps), deviation)) or damage(net, deviation, generator),
    )
    with before_each_step(steps.append):
        unlearned(seif, original)
    assert drawn == [(0, 0.6), (12, 0.005)]


def test_seif_weights_the_mean_loss_of_a_batch_by_its_classes():
    torch.manual_seed(0)
    answers, labels = torch.randn(8, 10), torch.tensor([0, 0, 3, 4, 0, 7, 8, 9])
    first = F.cross_entropy(answers[:4], labels[:4]) * (1 + 1 + 0.05 + 0.05) / 4
    second = F.cross_entropy(answers[4:], labels[4:]) * (1 + 0.05 + 0.05 + 0.05) / 4
    torch.testing.assert_close(seif.weighted_loss(answers[:4], labels[:4], seif.Config()), first)
    torch.testing.assert_close(seif.weighted_loss(answers, labels, seif.Config(), size=2), (first + second) / 2)
    losses = F.cross_entropy(answers, labels, reduction="none")
    expected = (losses * torch.tensor([1, 1, 0.05, 0.05, 1, 0.05, 0.05, 0.05])).mean()
    torch.testing.assert_close(seif.weighted_loss(answers, labels, seif.Config(per_example=True), size=2), expected)


# sebastian


def test_sebastian_keeps_the_largest_weights_and_redraws_the_rest(net, original):
    sebastian.damage(net, sebastian.Config().share, source())
    weights = [name for name, parameter in net.named_parameters() if parameter.dim() > 1]
    before, after = dict(original.named_parameters()), dict(net.named_parameters())
    assert changed(net, original) <= {*weights, "fc.bias"}
    kept, lost = [], []
    for name in weights:
        redrawn = after[name] != before[name]
        kept.append(before[name][~redrawn].abs())
        lost.append(before[name][redrawn].abs())
        bound = before[name][0].numel() ** -0.5
        values = after[name][redrawn].abs()
        assert values.max() <= bound
        assert values.max() > 0.8 * bound
    kept, lost = torch.cat(kept), torch.cat(lost)
    total = len(kept) + len(lost) + len(net.fc.bias)
    biases_lost = (net.fc.bias != original.fc.bias).sum()
    assert len(lost) + biases_lost == round(0.99 * total)
    assert kept.min() > lost.max()
    assert net.fc.bias[net.fc.bias != original.fc.bias].abs().sum() == 0


def test_sebastian_label_loss_is_the_weighted_mean_of_each_network():
    torch.manual_seed(0)
    answers, labels, weights = torch.randn(8, 10), torch.randint(10, (8,)), torch.rand(10) + 0.1
    each = [F.cross_entropy(answers[part], labels[part], weights) for part in (slice(4), slice(4, 8))]
    torch.testing.assert_close(sebastian.label_loss(answers, labels, weights, size=2), sum(each) / 2)


def test_sebastian_entropy():
    answers = torch.randn(5, 10)
    torch.testing.assert_close(sebastian.entropy(answers), torch.distributions.Categorical(logits=answers).entropy())


def test_sebastian_brings_the_entropy_to_the_originals(original):
    target = sebastian.entropy(logits(original, RETAIN))
    far = [
        F.mse_loss(sebastian.entropy(logits(net, RETAIN)), target)
        for net in (
            unlearned(sebastian, original, epochs=5, learning_rate=2e-2, entropy_weight=weight) for weight in (0.0, 3.0)
        )
    ]
    assert far[1] < far[0]


def test_sebastian_leaves_values_of_half_precision(original):
    net = unlearned(sebastian, original, epochs=0.2)
    for tensor in net.state_dict().values():
        assert torch.equal(tensor, tensor.half().to(tensor.dtype))


# toshi_k


def test_toshi_k_transposes_every_kernel(net, original):
    toshi_k.transpose(net, 1.0, source())
    kernels, before = convolutions(net), convolutions(original)
    assert changed(net, original) == {name for name, weight in kernels.items() if weight.shape[2] == 3}
    for name, weight in kernels.items():
        assert torch.equal(weight, before[name].transpose(2, 3))


def test_toshi_k_transposes_before_training(original):
    net = unlearned(toshi_k, original, learning_rate=0.0, relabel=0.0)
    for name, weight in convolutions(net).items():
        assert torch.equal(weight, convolutions(original)[name].transpose(2, 3))


def test_toshi_k_draws_the_layers_where_it_takes_only_some(original):
    drawn = []
    for seed in (0, 1):
        net = copy.deepcopy(original)
        toshi_k.transpose(net, 0.5, torch.Generator().manual_seed(seed))
        drawn.append(changed(net, original))
    assert [len(names) for names in drawn] == [8, 8]  # of 17 whose kernels have more than one weight
    assert drawn[0] != drawn[1]


def test_toshi_k_pseudo_labels_are_the_originals_second_choices(net, original):
    images, labels = toshi_k.pseudo_labels(net, FORGET, likely=0.0)
    assert torch.equal(images, FORGET.images.float())
    probabilities = logits(original, FORGET).softmax(-1)
    for row, (label, true) in enumerate(zip(labels.tolist(), FORGET.age_group.tolist(), strict=True)):
        assert label != true
        others = [probabilities[row, k].item() for k in range(10) if k != true]
        assert probabilities[row, label].item() == max(others)
    likely = probabilities.gather(1, labels[:, None])[:, 0].sort().values[12].item()
    assert len(toshi_k.pseudo_labels(net, FORGET, likely)[1]) == 8  # those from the 13th of 20


def test_toshi_k_puts_pseudo_labelled_images_into_retain_batches():
    images, labels = RETAIN.images[:BATCH].float(), RETAIN.age_group[:BATCH].clone()
    before = images.clone(), labels.clone()
    wrong = (FORGET.age_group + 1) % 10
    toshi_k.insert(images, labels, (FORGET.images.float(), wrong), 5, source())
    assert torch.equal(images[5:], before[0][5:]) and torch.equal(labels[5:], before[1][5:])
    for image, label in zip(images[:5], labels[:5], strict=True):
        (row,) = (FORGET.images.float() == image).flatten(1).all(1).nonzero()[0].tolist()
        assert label == wrong[row]


def test_toshi_k_a_run_takes_one_of_the_two(original):
    """With a learning rate of 0 the kernels show which; the other one trains on other labels."""
    swapped = [
        torch.equal(
            unlearned(toshi_k, original, seed, epochs=0.2, learning_rate=0.0).conv1.weight,
            original.conv1.weight.transpose(2, 3),
        )
        for seed in range(12)
    ]
    assert 2 <= sum(swapped) <= 10
    # A network of these sizes breaks at a rate of 1e-2, whatever its labels.
    trained = {"epochs": 10.0, "learning_rate": 2e-3}
    nets = [unlearned(toshi_k, original, relabel=1.0, likely=likely, **trained) for likely in (0.0, 1.0)]
    right = [(logits(net, FORGET).argmax(-1) == FORGET.age_group).double().mean().item() for net in nets]
    assert right[0] < right[1]


# amnesiacs


def test_amnesiacs_reset_the_first_and_the_last_layer_only(net, original):
    amnesiacs.reset(net, source())
    assert changed(net, original) == {"conv1.weight", "fc.weight", "fc.bias"}
    for parameter, fan_in in ((net.conv1.weight, 27), (net.fc.weight, 32), (net.fc.bias, 32)):
        assert 0.6 * fan_in**-0.5 < parameter.abs().max() <= fan_in**-0.5
        assert (parameter > 0).any() and (parameter < 0).any()


def test_amnesiacs_imitate_without_labels(net, original):
    amnesiacs.reset(net, source())
    images = VALIDATION.images.float()
    net.train()
    far = amnesiacs.divergence(net(images), original(images), 5.0)
    amnesiacs.imitate(net, original, [{"image": images}], amnesiacs.Config(imitation_epochs=30, imitation_rate=3e-2))
    assert amnesiacs.divergence(net(images), original(images), 5.0) < far / 3


def test_amnesiacs_divergence_is_of_softened_outputs():
    torch.manual_seed(0)
    answers, target = torch.randn(4, 10), torch.randn(4, 10)
    p, q = (target / 5).softmax(-1), (answers / 5).softmax(-1)
    torch.testing.assert_close(amnesiacs.divergence(answers, target, 5.0), (p * (p / q).log()).sum(-1).mean())


def test_amnesiacs_fine_tune_on_three_losses(net, original):
    batch = RETAIN.batch(torch.arange(BATCH))
    expected = copy.deepcopy(net)
    answers, target = net(batch["image"]), original(batch["image"]).detach()
    p, q = (target / 5).softmax(-1), (answers / 5).softmax(-1)
    total = F.cross_entropy(answers, batch["age_group"]) - (p * q.log()).sum(-1).mean() + (p * (p / q).log()).sum(-1).mean()
    steps = gradients(net, total)
    amnesiacs.fine_tune(net, original, [batch], amnesiacs.Config(epochs=1, learning_rate=1.0, weight_decay=0.0))
    for name, before in expected.named_parameters():
        torch.testing.assert_close(net.get_parameter(name), before - steps[name], rtol=1e-4, atol=1e-5)


# sun


def test_sun_draws_tensors_and_gives_some_of_them_noise(net, original):
    before: set[str] = set()
    first = sun.choose(net, sun.Config(), source(), before, with_noise=False)
    drawn = {name for name in first if "bn" not in name}
    assert len(drawn) == 9
    assert drawn == before
    assert first - drawn == {name for name, _ in net.named_parameters() if "bn" in name}
    assert changed(net, original) == set()

    again = sun.choose(net, sun.Config(), source(), set(), with_noise=True)
    noisy = changed(net, original)
    assert again == first and len(noisy) == 6 and noisy < drawn
    noise = torch.cat([(net.get_parameter(name) - original.get_parameter(name)).flatten() for name in noisy])
    assert noise.std().item() == pytest.approx(0.04, rel=0.1)


def test_sun_gives_no_noise_to_what_was_trained_before(net, original):
    everything = {name for name, _ in net.named_parameters()}
    sun.choose(net, sun.Config(), source(), everything, with_noise=True)
    assert changed(net, original) == set()


def test_sun_resets_the_last_layer(net, original):
    sun.reset(net, source())
    assert changed(net, original) == {"fc.weight", "fc.bias"}
    assert net.fc.weight.abs().max() <= 32**-0.5


def test_sun_trains_only_what_was_drawn(original, monkeypatch):
    chosen, choose = [], sun.choose
    monkeypatch.setattr(sun, "choose", lambda *args, **rest: chosen.append(choose(*args, **rest)) or chosen[-1])
    net = unlearned(sun, original, rounds=1, last_factors=(), epochs=1, learning_rate=1e-2)
    assert len(chosen) == 1
    assert changed(net, original) == chosen[0] | {"fc.weight", "fc.bias"}


def test_sun_draws_anew_in_each_of_five_rounds(original, monkeypatch):
    chosen, noise, choose = [], [], sun.choose

    def spy(*args, with_noise):
        noise.append(with_noise)
        chosen.append(frozenset(choose(*args, with_noise=with_noise)))
        return chosen[-1]

    monkeypatch.setattr(sun, "choose", spy)
    unlearned(sun, original)
    assert noise == [False, True, True, True, True]
    assert len(set(chosen)) == 5


def test_sun_steps_as_plain_sgd_where_everything_is_trained(net, original):
    batch = RETAIN.batch(torch.arange(BATCH))
    sun.train(net, [batch] * 3, 1e-2, None, replace(sun.Config(), weight_decay=0.1))
    expected = copy.deepcopy(original)
    optimizer = torch.optim.SGD(expected.parameters(), 1e-2, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(expected(batch["image"]), batch["age_group"]).backward()
        optimizer.step()
    for one, other in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
