"""Each baseline does what defines it. What all methods have in common is in test_methods_contract.py."""

import copy
import math

import pytest
import torch
from method_helpers import (
    BATCH,
    FORGET,
    RETAIN,
    VALIDATION,
    at_once,
    before_each_step,
    changed,
    examples,
    gradients,
    loaders,
    logits,
    loss,
    rates,
    unlearned,
)
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from evaluator.data import Examples, Loader
from evaluator.ensemble import Ensemble
from evaluator.models import resnet18
from evaluator.training import generators
from methods import (
    bad_teacher,
    cf_k,
    eu_k,
    finetune,
    l1_sparse,
    negrad,
    negrad_plus,
    random_labels,
    salun,
    scrub,
    sfr_on,
    shrink_perturb,
)


def accuracy(net: nn.Module, part: Examples) -> float:
    return (logits(net, part).argmax(1) == part.age_group).float().mean().item()


def distance(net: nn.Module, other: nn.Module, part: Examples) -> float:
    """KL divergence of the outputs from another network's."""
    answers, target = (logits(each, part).log_softmax(-1) for each in (net, other))
    return F.kl_div(answers, target, reduction="batchmean", log_target=True).item()


# finetune and negrad


def test_finetune_lowers_the_loss_on_the_retain_set(net, original):
    torch.manual_seed(0)
    with torch.no_grad():
        net.fc.weight.mul_(0.1)
    before = loss(net, RETAIN)
    finetune.unlearning(net, *loaders(), finetune.Config(epochs=5, learning_rate=1e-2))
    assert loss(net, RETAIN) < before / 2


def test_negrad_raises_the_loss_on_the_forget_set(net, original):
    parts = [Loader(part, 20) for part in (RETAIN, FORGET, VALIDATION)]  # the whole forget set in each step
    negrad.unlearning(net, *parts, negrad.Config(epochs=15, learning_rate=1e-2))
    # With each batch's own statistics, as in training.
    assert loss(net.train(), FORGET) > loss(copy.deepcopy(original).train(), FORGET) + 0.5


# negrad_plus


def test_negrad_plus_raises_the_forget_loss_and_keeps_the_retain_loss(original):
    net = unlearned(negrad_plus, original, epochs=20, learning_rate=3e-3, retain_share=0.9)
    alone = unlearned(negrad, original, epochs=20, learning_rate=1e-2)
    assert loss(net, FORGET) > loss(original, FORGET) + 0.2
    assert loss(net, RETAIN) < loss(original, RETAIN) + 0.05
    assert loss(alone, RETAIN) > loss(net, RETAIN) + 1


def test_negrad_plus_steps_down_the_difference_of_the_losses(net, original):
    parts = [Loader(part, 60) for part in (RETAIN, FORGET, VALIDATION)]
    negrad_plus.unlearning(net, *parts, negrad_plus.Config(epochs=1, learning_rate=0.5))
    retain, forget = (loss(original, part) for part in (RETAIN, FORGET))
    before = dict(original.named_parameters())
    for name, gradient in gradients(original, 0.95 * retain - 0.05 * forget).items():
        torch.testing.assert_close(net.get_parameter(name), before[name] - 0.5 * gradient, rtol=1e-3, atol=1e-5)
    assert torch.equal(net.bn1.running_mean, original.bn1.running_mean)


def test_negrad_plus_rate_may_fall(original):
    assert rates(negrad_plus, original, epochs=1, learning_rate=0.1, decay=1.0) == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert rates(negrad_plus, original, epochs=1) == [0.01] * 4


# random_labels


def test_random_labels_are_wrong_and_uniform_among_the_wrong_ones():
    labels = torch.arange(10).repeat(1000)
    drawn = random_labels.wrong_labels(labels, 10, [torch.Generator().manual_seed(0)])
    counts = torch.zeros(10, 10).index_put((labels, drawn), torch.tensor(1.0), accumulate=True)
    assert counts.diagonal().sum() == 0
    others = counts[~torch.eye(10, dtype=torch.bool)]
    assert others.min() > 70 and others.max() < 160  # 111 expected of each, standard deviation 10


def test_random_labels_come_from_each_networks_generator():
    labels = torch.randint(10, (8,))
    both = random_labels.wrong_labels(labels, 10, generators([3, 4], "cpu"))
    for part, seed in ((slice(4), 3), (slice(4, 8), 4)):
        assert torch.equal(both[part], random_labels.wrong_labels(labels[part], 10, generators([seed], "cpu")))


def test_random_labels_spoil_the_forget_set_and_not_the_retain_set(original):
    net = unlearned(random_labels, original, epochs=20, learning_rate=1e-2)
    assert accuracy(original, FORGET) > 0.9
    assert accuracy(net, FORGET) < 0.5
    assert accuracy(net, RETAIN) > 0.8


@pytest.mark.parametrize("loader", [Loader, DataLoader])
def test_random_labels_mix_both_sets_in_proportion(loader, net):
    sizes = []
    net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    parts = [loader(part, 15, shuffle=True) for part in (RETAIN, FORGET, VALIDATION)]
    random_labels.unlearning(net, *parts, random_labels.Config(epochs=1, learning_rate=1e-3))
    assert sizes == [15 + 5] * 4


def test_side_by_side_keeps_networks_together():
    for method in (random_labels, bad_teacher):
        both = method.side_by_side(torch.tensor([1, 2, 11, 12]), torch.tensor([3, 13]), 2)
        assert both.tolist() == [1, 2, 3, 11, 12, 13]


# scrub


def test_scrub_leaves_on_the_forget_set_and_returns_on_the_retain_set(original, monkeypatch):
    signs, seen = [], []
    divergence = scrub.divergence

    def spy(logits, target, temperature):
        seen.append(len(logits))
        distance = divergence(logits, target, temperature)
        distance.register_hook(lambda gradient: signs.append(gradient.item()))
        return distance

    monkeypatch.setattr(scrub, "divergence", spy)
    unlearned(scrub, original)
    leave, back = [-1.0] * 2, [0.5] * 4  # batches of 20 forget and 60 retain examples
    assert signs == (leave + back) * 3 + back * 2
    assert seen == [16, 4, 16, 16, 16, 12] * 3 + [16, 16, 16, 12] * 2


def test_scrub_divergence_rises_while_leaving_and_falls_while_returning(original):
    values = dict(learning_rate=1e-2, forget_epochs=3, drops=(), weight_decay=0.0, rounds=1)
    torch.manual_seed(0)
    left, back = copy.deepcopy(original), copy.deepcopy(original)
    # Without a weight on the way back, the only thing that changes parameters is leaving.
    scrub.unlearning(left, *loaders(), scrub.Config(**values, epochs=0.1, label_weight=0.0, return_weight=0.0))
    assert distance(left, original, FORGET) > 0.3
    back = unlearned(scrub, original, **values, epochs=8)
    assert distance(back, original, RETAIN) < distance(left, original, RETAIN) / 2


def test_scrub_divergence_is_of_softened_outputs():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 10)
    p, q = (target / 2).softmax(-1), (logits / 2).softmax(-1)
    torch.testing.assert_close(scrub.divergence(logits, target, 2.0), 4 * (p * (p / q).log()).sum(-1).mean())


def test_scrub_learning_rate_falls_to_tenths(original):
    seen = rates(scrub, original, epochs=10, rounds=1, forget_rounds=0, learning_rate=1.0)
    assert seen == pytest.approx([1.0] * 20 + [0.1] * 12 + [0.01] * 4 + [0.001] * 4)


# bad_teacher


def test_bad_teacher_makes_forget_outputs_those_of_an_untrained_network(original, monkeypatch):
    teachers, untrained = [], bad_teacher.untrained
    monkeypatch.setattr(bad_teacher, "untrained", lambda *args: teachers.append(untrained(*args)) or teachers[-1])
    net = unlearned(bad_teacher, original, epochs=20, learning_rate=3e-3, batch_size=40, retain_part=1.0)
    (bad,) = teachers
    assert distance(net, bad, FORGET) < distance(original, bad, FORGET) / 3
    assert distance(net, original, RETAIN) < distance(net, original, FORGET) / 3


def test_bad_teacher_untrained_network_knows_nothing_and_is_sane(original):
    images = RETAIN.images[:32].float()
    first, again, other = (bad_teacher.untrained(original, images, generators([seed], "cpu")[0]) for seed in (0, 0, 1))
    weights = {name for name, parameter in original.named_parameters() if parameter.dim() > 1}
    assert weights <= changed(first, original)
    assert changed(first, again, buffers=True) == set() and weights <= changed(first, other)
    assert first.layer1[0].conv1.weight.std().item() == pytest.approx((2 / 36) ** 0.5, rel=0.2)
    assert accuracy(first, RETAIN) < 0.5
    torch.testing.assert_close(first.bn1.running_mean, first.conv1(images).mean((0, 2, 3)))
    assert first(images).abs().max() < 20
    assert not any(module.training for module in first.modules())


def test_bad_teacher_uses_a_part_of_the_retain_set(net):
    sizes = []
    # Teachers are copies, hooks included.
    net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])) if module is net else None)
    bad_teacher.unlearning(net, *loaders(), bad_teacher.Config(epochs=3, batch_size=19, learning_rate=0.0))
    # An epoch is of 20 forget and 18 retain examples: 10 and 9 in each batch.
    assert sizes == [19] * 6


# cf_k and eu_k


@pytest.mark.parametrize(
    ("blocks", "trained"),
    [(0, ("fc.",)), (1, ("layer4.1.", "fc.")), (3, ("layer3.1.", "layer4.", "fc."))],
)
@pytest.mark.parametrize("method", [cf_k, eu_k], ids=lambda method: method.__name__)
@pytest.mark.parametrize("as_ensemble", [False, True])
def test_all_but_the_last_blocks_are_kept_to_the_bit(method, blocks, trained, as_ensemble, original):
    values = dict(epochs=1.5, learning_rate=1e-2, blocks=blocks)
    if as_ensemble:
        original = copy.deepcopy(original).double()
        nets = at_once(method, original, [0, 1], **values)
    else:
        nets = [unlearned(method, original, **values)]
    for net in nets:
        expected = {name for name in original.state_dict() if name.startswith(trained)}
        assert changed(net, original, buffers=True) == expected


def test_cf_k_trains_from_where_it_was_and_eu_k_from_scratch(original):
    still = dict(learning_rate=0.0, weight_decay=0.0, epochs=1)
    assert changed(unlearned(cf_k, original, **still), original) == set()
    reset = {name for name, _ in original.named_parameters() if name.startswith(("layer4.", "fc."))}
    net = unlearned(eu_k, original, **still)
    assert changed(net, original) == reset
    assert net.layer4[1].conv2.weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)
    assert torch.equal(net.layer4[1].bn1.weight, torch.ones(32))
    assert net.fc.weight.abs().max() <= 32**-0.5
    assert loss(net, RETAIN) > 1 > loss(unlearned(eu_k, original, epochs=10, learning_rate=2e-2), RETAIN)


def test_eu_k_resets_statistics(net):
    eu_k.reset(net, ("layer4.1.",), None)
    assert net.layer4[1].bn2.num_batches_tracked == 0
    assert torch.equal(net.layer4[1].bn2.running_var, torch.ones(32))
    assert net.layer4[0].bn2.num_batches_tracked > 0


@pytest.mark.parametrize("method", [cf_k, eu_k], ids=lambda method: method.__name__)
def test_last_blocks_rate_falls_to_tenths(method, original):
    assert rates(method, original, epochs=5) == pytest.approx([0.01] * 10 + [1e-3] * 6 + [1e-4] * 2 + [1e-5] * 2)


# salun


def test_salun_mask_is_the_half_with_the_largest_forget_gradients():
    torch.manual_seed(0)
    net = resnet18(10, width=4, small_images=True).eval()
    part = examples(16, 4, side=32)  # so large that every weight meets something
    masks = salun.salient(net, Loader(part, 8), 0.5)
    sizes = {name: gradient.abs() for name, gradient in gradients(net, loss(net, part)).items()}
    chosen = torch.cat([sizes[name][mask == 1] for name, mask in masks.items()])
    left = torch.cat([sizes[name][mask == 0] for name, mask in masks.items()])
    assert len(chosen) == round(0.5 * sum(size.numel() for size in sizes.values()))
    assert len(chosen) + len(left) == sum(size.numel() for size in sizes.values())
    assert chosen.min() > left.max() * (1 - 1e-3)


def test_salun_mask_is_of_each_network_alone(original):
    ensemble = Ensemble(copy.deepcopy(original), 2, generators([0, 1], "cpu"))
    with torch.no_grad():  # the second has gradients a thousand times smaller, as it is very sure
        ensemble.members[1].fc.weight.mul_(5)
    masks = salun.salient(ensemble, Loader(FORGET, 20, ensemble.generators), 0.2, size=2)
    for k, member in enumerate(ensemble.members):
        net = copy.deepcopy(original)  # a member is in channels_last format: see overwrites_memory
        net.load_state_dict(member.state_dict())
        alone = salun.salient(net, Loader(FORGET, 20), 0.2)
        total = sum(mask.numel() for mask in alone.values())
        assert sum(mask.sum() for mask in alone.values()) == round(0.2 * total)
        differing = sum((masks[name].unflatten(0, (2, -1))[k] != mask).sum() for name, mask in alone.items())
        assert differing < 0.001 * total  # weights at the limit may fall to either side


def test_salun_leaves_out_weights_without_any_gradient(net):
    with torch.no_grad():
        net.fc.weight[:, :16] = 0
        net.layer4[1].bn2.weight[:16], net.layer4[1].bn2.bias[:16] = 0, 0
    masks = salun.salient(net, Loader(FORGET, 20), 1.0)
    assert sum((mask != 1).sum() for mask in masks.values()) == 0
    masks = salun.salient(net, Loader(FORGET, 20), 0.95)
    for name, gradient in gradients(net, loss(net, FORGET)).items():
        assert masks[name][gradient == 0].sum() == 0


@pytest.mark.parametrize("as_ensemble", [False, True])
def test_salun_keeps_all_other_weights_to_the_bit(as_ensemble, original, monkeypatch):
    kept, salient = [], salun.salient
    monkeypatch.setattr(salun, "salient", lambda *args: kept.append(salient(*args)) or kept[-1])
    # A weight decay that would be seen.
    values = dict(rounds=2, epochs=2, learning_rate=1e-2, weight_decay=0.1)
    if as_ensemble:
        original = copy.deepcopy(original).double()
        nets = at_once(salun, original, [0, 1], **values)
    else:
        nets = [unlearned(salun, original, **values)]
    for k, net in enumerate(nets):
        for name, before in original.named_parameters():
            after, mask = net.get_parameter(name), kept[0][name].unflatten(0, (len(nets), -1))[k].bool()
            assert torch.equal(before[~mask], after[~mask])
            assert (before[mask] != after[mask]).float().mean() > 0.99 if mask.any() else True
        assert not torch.equal(net.bn1.running_mean, original.bn1.running_mean)


def test_salun_spoils_the_forget_set_and_repairs_the_retain_set(net, original):
    parts = [Loader(part, 20) for part in (RETAIN, FORGET, VALIDATION)]
    repaired = copy.deepcopy(net)
    values = dict(rounds=1, forget_epochs=10, learning_rate=1e-2)
    torch.manual_seed(0)
    salun.unlearning(net, *parts, salun.Config(epochs=0.1, **values))
    salun.unlearning(repaired, *parts, salun.Config(epochs=8, **values))
    assert accuracy(copy.deepcopy(original).train(), FORGET) > 0.9
    assert accuracy(net.train(), FORGET) < 0.5
    assert loss(repaired, RETAIN) < loss(net.eval(), RETAIN) / 2


def test_salun_labels_are_any():
    drawn = salun.random_labels(torch.zeros(10000, dtype=torch.int64), 10, [None])
    counts = drawn.bincount(minlength=10)
    assert counts.min() > 850 and counts.max() < 1150


# l1_sparse


def test_l1_sparse_has_smaller_weights_than_fine_tuning(original):
    values = dict(epochs=5, learning_rate=2e-2)
    sparse, dense = (unlearned(l1_sparse, original, **values, penalty=penalty) for penalty in (3e-2, 0.0))
    tuned = unlearned(finetune, original, **values)
    small = [sum((each.abs() < 1e-3).sum() for each in net.parameters()) for net in (sparse, dense)]
    assert l1_sparse.absolute_values(sparse) < 0.8 * l1_sparse.absolute_values(tuned)
    assert small[0] > 3 * small[1]


def test_l1_sparse_penalty_fades(original):
    # The only gradient of a weight of a class that is infinitely unlikely is the penalty's, of constant size.
    net, moves, before = copy.deepcopy(original), [], []
    with torch.no_grad():
        net.fc.bias[0] = -1e4
    part = examples(64, 5)
    part.age_group.clamp_(min=1)
    parts = [Loader(part, BATCH)] * 3
    before.append(net.fc.weight[0].clone())

    def note(*_):
        moves.append((net.fc.weight[0] - before[-1]).abs().mean().item())
        before.append(net.fc.weight[0].clone())

    handle = register_optimizer_step_post_hook(note)
    config = l1_sparse.Config(epochs=1, learning_rate=1e-3, penalty=1.0, momentum=0.0, weight_decay=0.0)
    try:
        l1_sparse.unlearning(net, *parts, config)
    finally:
        handle.remove()
    assert moves == pytest.approx([1e-3 * left for left in (1, 0.75, 0.5, 0.25)], rel=1e-2)


# sfr_on


def test_sfr_on_mask_compares_fisher_information(original):
    config = sfr_on.Config(saliency=2.0)
    masks = sfr_on.salient(original, Loader(RETAIN, BATCH, shuffle=False), Loader(FORGET, BATCH, shuffle=False), config)
    information = []
    for part, steps in ((RETAIN, 4), (FORGET, 2)):
        total = 0
        for images, labels in zip(part.images.split(BATCH), part.age_group.split(BATCH), strict=True):
            step = gradients(original, F.cross_entropy(original(images.float()), labels))
            total = total + torch.cat([gradient.flatten() for gradient in step.values()]) ** 2 / steps
        information.append(total)
    retain, forget = information
    masks = torch.cat([masks[name].flatten() for name, _ in original.named_parameters()])
    decided = ((forget - 2 * retain).abs() > 1e-3 * forget) & (forget > 1e-12)
    assert decided.sum() > 1000
    assert torch.equal(masks[decided], (forget >= 2 * retain)[decided])
    assert 0.01 < masks[decided].float().mean() < 0.99


def test_sfr_on_counts_what_is_still_known_more():
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
    losses = F.cross_entropy(logits, labels, reduction="none")
    weights = 1 / losses.detach().sqrt()
    halves = [(weights[part] / weights[part].sum() * losses[part]).sum() for part in (slice(4), slice(4, 8))]
    both = sfr_on.adaptive_loss(logits, labels, 0.5, size=2)
    torch.testing.assert_close(both, sum(halves) / 2)
    # The weights themselves are not learnt.
    torch.testing.assert_close(torch.autograd.grad(both, logits), torch.autograd.grad(sum(halves) / 2, logits))
    torch.testing.assert_close(sfr_on.adaptive_loss(logits, labels, 0.0), F.cross_entropy(logits, labels))


def test_sfr_on_shortens_the_gradient_of_each_network():
    parameters = [torch.zeros(4, 3), torch.zeros(2)]
    parameters[0].grad = torch.tensor([[3.0, 0, 0], [0, 0, 0], [0.3, 0, 0], [0, 0, 0]])
    parameters[1].grad = torch.tensor([4.0, 0.4])
    sfr_on.shorten(parameters, 1.0, size=2)
    torch.testing.assert_close(parameters[0].grad[:, 0], torch.tensor([0.6, 0, 0.3, 0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.8, 0.4]), rtol=1e-4, atol=0)


def test_sfr_on_climbs_where_the_mask_lets_it_and_repairs_everywhere(original, monkeypatch):
    torch.manual_seed(0)
    masks = {name: torch.rand_like(parameter) < 0.5 for name, parameter in original.named_parameters()}
    monkeypatch.setattr(sfr_on, "salient", lambda *_: masks)
    seen = []

    def note(optimizer):
        steps = dict(zip(masks, [parameter.grad for parameter in optimizer.param_groups[0]["params"]], strict=True))
        outside = sum(steps[name][~mask].abs().sum() for name, mask in masks.items())
        length = sum(gradient.square().sum() for gradient in steps.values()).sqrt()
        seen.append((bool(outside == 0), bool(length <= 0.101)))

    with before_each_step(note):
        unlearned(sfr_on, original, epochs=1.5, forget_every=3, learning_rate=1e-4, max_norm=0.1)
    assert [outside for outside, _ in seen] == [True, False, False, False] * 2  # 6 steps of repair, 2 of ascent
    assert seen[0][1] and seen[4][1]


def test_sfr_on_forgets_and_repairs(original):
    values = dict(epochs=10, learning_rate=1e-2, forget_every=2)
    net, still = (unlearned(sfr_on, original, **values, ascent=ascent) for ascent in (25.0, 0.0))
    assert loss(net, FORGET) > 5 * loss(still, FORGET)
    assert loss(net, RETAIN) < loss(net, FORGET) / 4


def test_sfr_on_rate_falls_along_a_cosine(original):
    seen = rates(sfr_on, original, epochs=1, forget_every=4, learning_rate=1.0)
    assert seen == pytest.approx([1.0, 1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5])


# shrink_perturb


@pytest.mark.parametrize("decayed", [1.0, 0.05])
def test_shrink_perturb_gives_weights_the_size_of_fresh_ones(decayed):
    """However small weight decay had made them; filters stay whole or are new; batch norm moves towards its first values."""
    torch.manual_seed(0)
    fresh = resnet18(10, width=16)
    for kept in (0.0, 0.4, 1.0):
        net = copy.deepcopy(fresh)
        with torch.no_grad():
            net.bn1.weight.fill_(2.0)
            net.layer3[0].conv1.weight.mul_(decayed)
        shrink_perturb.shrink_and_perturb(net, kept, torch.Generator().manual_seed(1), ["layer1"])
        pairs = [[one.layer3[0].get_submodule(name).weight for one in (fresh, net)] for name in ("conv1", "conv2")]
        assert all(torch.isclose(new.std(), old.std(), rtol=0.05) for old, new in pairs)
        alike = torch.cat([torch.cosine_similarity(old.flatten(1), new.flatten(1)) for old, new in pairs])
        assert (alike > 0.999).double().mean().item() == pytest.approx(kept, abs=0.1)  # of 128 filters
        assert (alike[alike < 0.999].abs() < 0.3).all()
        assert torch.allclose(net.bn1.weight, torch.tensor(1 + kept))
        early = torch.cosine_similarity(fresh.layer1[0].conv1.weight.flatten(1), net.layer1[0].conv1.weight.flatten(1))
        expected = 1 - (1 - kept) * shrink_perturb.EARLY
        assert (early > 0.999).double().mean().item() == pytest.approx(expected, abs=0.2)  # of 16 filters


def test_shrink_perturb_takes_a_layer_of_zeros():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    nn.init.zeros_(net[0].weight)
    shrink_perturb.shrink_and_perturb(net, 0.6, torch.Generator().manual_seed(1), [])
    assert net[0].weight.isfinite().all() and net[0].weight.std() > 0


def counting(steps: int) -> nn.Module:
    """A network whose batch norm has counted so many training steps; None: one that has none."""
    net = resnet18(10, width=4)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_batches_tracked.fill_(steps)
    return net


@pytest.mark.parametrize("frozen", [True, False])
def test_shrink_perturb_learns_for_a_part_of_the_counted_steps(frozen):
    parts, config = loaders()[:2], shrink_perturb.Config(original_epochs=20)  # 80 images in all, 5 steps of 16 an epoch
    share = shrink_perturb.PARTS[True, frozen]
    for epochs in (12, 40):
        loader, steps = shrink_perturb.budget(counting(5 * epochs), *parts, frozen, config)
        assert loader.batch_size == 2 * BATCH  # 60 images in 2 steps an epoch
        assert steps == round(share * epochs * 2)
    _, steps = shrink_perturb.budget(nn.Linear(2, 2), *parts, frozen, config)  # counts nothing
    assert steps == round(share * 20 * 2)
    large = nn.Linear(1000, shrink_perturb.SMALL // 1000)
    loader, steps = shrink_perturb.budget(large, *parts, frozen, config)
    assert loader is parts[0] and steps == round(shrink_perturb.PARTS[False, frozen] * 20 * 4)


@pytest.mark.parametrize("freeze", [True, False])
def test_shrink_perturb_keeps_as_much_however_many_steps_follow(monkeypatch, freeze):
    """Some more where nothing is frozen; a value that is given is taken."""
    seen = []
    monkeypatch.setattr(shrink_perturb.Answers, "accuracy", lambda _: torch.tensor(1.0))
    monkeypatch.setattr(shrink_perturb, "shrink_and_perturb", lambda net, kept, *_: seen.append(kept))
    monkeypatch.setattr(shrink_perturb, "learn", lambda *_: None)
    for steps in (1, 85, 100_000):
        monkeypatch.setattr(shrink_perturb, "budget", lambda *_, steps=steps: (None, steps))
        for kept in (0, 0.25):
            config = shrink_perturb.Config(kept=kept, calibrate=False, freeze=freeze)
            shrink_perturb.unlearning(resnet18(10, width=4), *loaders(), config)
    assert seen == pytest.approx([0.3 if freeze else 0.6, 0.25] * 3)


def test_shrink_perturb_keeps_more_of_what_is_hard(original):
    """By how accurate the original is on the validation set, whatever it says of the retain set."""

    def said(right: int) -> shrink_perturb.Answers:
        labels = torch.arange(10)
        return shrink_perturb.Answers(
            9 * F.one_hot((labels + (labels >= right)) % 10, 10)[None].double(), F.one_hot(labels, 10)
        )

    for learnt, unseen, frozen, kept in (
        (10, 10, True, 0.3),
        (10, 5, True, 0.65),
        (5, 5, True, 0.65),
        (10, 5, False, 0.8),
        (9, 0, True, 1),
    ):
        training = shrink_perturb.as_trained(original, said(learnt), said(unseen), frozen, shrink_perturb.Config())
        assert training.kept == pytest.approx(kept)


def test_shrink_perturb_decays_weights_as_the_originals_were(original, monkeypatch):
    """Small weights show strong decay. A value that is given is taken."""
    small, seen = copy.deepcopy(original), []
    with torch.no_grad():
        for layer in small.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(0.3)
    monkeypatch.setattr(shrink_perturb, "budget", lambda *_: (None, 856))
    monkeypatch.setattr(shrink_perturb, "learn", lambda *arguments: seen.append(arguments[-2].decay))
    for values in ({}, {"weight_decay": 0.01}):
        for net in (original, small):
            config = shrink_perturb.Config(calibrate=False, **values)
            shrink_perturb.unlearning(copy.deepcopy(net), *loaders(), config)
    assert seen == pytest.approx([5e-4, 5e-3, 0.01, 0.01])
    assert shrink_perturb.relative_sizes(nn.Linear(2, 2)) == 1  # no convolution shows anything


def test_shrink_perturb_learns_as_the_original_did(original):
    """The first batch norm shows Adam, all of them the rate. After a slow training the smallest layer shows decay."""

    def after(first: float, others: float) -> nn.Module:
        net = copy.deepcopy(original)
        with torch.no_grad():
            for name, value in net.state_dict().items():
                if "bn" in name and name.endswith("bias"):
                    value.fill_(first if name == "bn1.bias" else others)
            net.layer4[1].conv2.weight.mul_(0.1)
        return net

    said = shrink_perturb.answers(original, RETAIN)
    kept = pytest.approx(1 - 0.7 * said.accuracy().item())

    def found(net: nn.Module, **values):
        return tuple(shrink_perturb.as_trained(net, said, said, True, shrink_perturb.Config(**values))[:4])

    assert found(after(1e-3, 1e-3)) == (True, 3e-4, 5e-3, kept)
    assert found(after(3e-2, 2e-2)) == (True, pytest.approx(2e-3), 5e-3, kept)
    assert found(after(5e-2, 4e-2)) == (True, pytest.approx(4e-3), 5e-4, kept)
    assert found(after(7e-2, 6e-2)) == (True, 5e-3, 5e-4, kept)
    assert found(after(5e-2, 2e-2)) == (False, pytest.approx(12 * 2e-2**2), 5e-4, kept)  # far more than the others
    assert found(after(1e-1, 6e-2)) == (False, pytest.approx(12 * 6e-2**2), 5e-4, kept)
    assert found(after(1e-1, 1e-1)) == (False, 0.1, 5e-4, kept)
    assert found(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))) == (False, 0.1, 5e-4, kept)  # shows nothing
    other = nn.Sequential(*[nn.BatchNorm2d(1) for _ in range(3)])
    for layer, moved in zip(other, (0.3, 0.01, 0.01), strict=True):
        nn.init.constant_(layer.bias, moved)
    assert found(other) == (False, 0.1, 5e-4, kept)  # SGD moves other networks by other amounts
    small = after(1e-1, 4e-2)
    with torch.no_grad():
        for layer in small.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(0.1)
    assert found(small) == (False, 0.1, 5e-3, kept)  # strong decay moves the biases back
    given = {"kept": 0.4, "learning_rate": 0.02, "weight_decay": 0.01}
    assert found(after(1e-3, 1e-3), **given) == (True, 0.02, 0.01, 0.4)
    assert found(after(1e-1, 1e-1), **given) == (False, 0.02, 0.01, 0.4)


def test_shrink_perturb_learns_by_adam(original):
    """Adam's first step moves each weight by the learning rate, whatever the gradient."""
    net, config = copy.deepcopy(original), shrink_perturb.Config(rise=0.9)
    training = shrink_perturb.Training(True, 1e-3, 0.0, 0.5, torch.ones(10))
    shrink_perturb.learn(net, [net], [None], loaders()[0], 1, [], training, config)
    moved = (net.fc.weight - original.fc.weight).abs()
    assert moved.max().item() == pytest.approx(1e-3 * 0.5 / 0.9, rel=1e-3)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("counts", [(600, 200, 50), (600, 400, 350)])
def test_shrink_perturb_sees_class_weights(weighted, counts):
    """A linear model of overlapping classes, trained to the end with weights 1 / count or without."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    points = torch.randn(len(labels), 2, generator=random) + 2 * torch.eye(3)[labels, :2]
    net, weights = nn.Linear(2, 3), 1 / labels.bincount().float()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(net(points), labels, weights if weighted else None)
        value.backward()
        return value

    optimizer.step(loss)
    images = [{"image": point, "age_group": label} for point, label in zip(points, labels, strict=True)]
    with torch.no_grad():
        found = shrink_perturb.class_weights(net, shrink_perturb.answers(net, images))
        one_class = shrink_perturb.answers(net, images[:600])
        assert shrink_perturb.class_weights(net, one_class) is None  # one class alone shows nothing
    assert torch.equal(found, weights) if weighted else found is None


def test_shrink_perturb_weights_the_mean_of_each_network_by_itself():
    logits, labels = torch.randn(8, 3), torch.tensor([0, 0, 1, 2, 2, 2, 2, 1])
    weights = torch.tensor([1.0, 2.0, 10.0])
    own = [F.cross_entropy(part, label, weights) for part, label in zip(logits.split(4), labels.split(4), strict=True)]
    assert shrink_perturb.mean_loss(logits, labels, weights, 2) == pytest.approx(torch.stack(own).mean().item())
    assert shrink_perturb.mean_loss(logits, labels, None, 2) == F.cross_entropy(logits, labels)


def test_shrink_perturb_freezes_the_first_stage_of_a_resnet(original, monkeypatch):
    """It learns in the first fifth of the steps alone, and is there again at the end, even if training fails."""
    assert shrink_perturb.first_stage(nn.Sequential(nn.Linear(2, 2)), RETAIN) == []
    frozen = shrink_perturb.first_stage(original, RETAIN)
    assert frozen == ["conv1", "bn1", "relu", "maxpool", "layer1"]
    monkeypatch.setattr(shrink_perturb, "MOST_BYTES", 100)
    assert shrink_perturb.first_stage(original, RETAIN) == []

    ends, seen = [], []

    def learnt(steps: int, stop: int | None = None) -> nn.Module:
        net, config = copy.deepcopy(original), shrink_perturb.Config()
        training = shrink_perturb.Training(False, 0.1, 5e-4, 0.5, None)

        def watch(*_):
            seen.append(1)
            if len(seen) == stop:
                raise RuntimeError

        seen.clear()
        net.layer2.register_forward_pre_hook(watch)
        torch.manual_seed(0)
        try:
            shrink_perturb.learn(net, [net], [None], loaders()[0], steps, frozen, training, config)
        except RuntimeError:
            ends.append(len(seen))
        assert list(dict(net.named_modules())) == list(dict(original.named_modules()))
        return net

    early = {f"{name}.{rest}" for name in frozen for rest, _ in getattr(original, name).named_parameters()}
    net = learnt(20)
    assert early < changed(net, original) and any(name.startswith("layer2") for name in changed(net, original))
    stopped = learnt(20, stop=5)
    assert ends == [5] and not early & changed(net, stopped) and "layer2.0.conv1.weight" in changed(net, stopped)
    kept = shrink_perturb.outputs([shrink_perturb.part(original.eval(), frozen)], loaders()[0], "cpu")
    batch = next(shrink_perturb.shuffled(kept, 16, [torch.Generator().manual_seed(1)]))
    known, drawn = (
        {(round(value.sum().item(), 3), label.item()) for value, label in zip(*part, strict=True)}
        for part in (kept[0], batch)
    )
    assert len(kept[0][1]) == 60 and len(batch[0]) == 16 and len(drawn) > 8 and drawn <= known


def seen_on_validation(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(the mean confidence in each class [classes], its standard deviation within a class)."""
    said = shrink_perturb.answers(net, VALIDATION)
    return said.class_means()[0], said.spread()[0]


def saying(margins: torch.Tensor, of_class: torch.Tensor) -> shrink_perturb.Answers:
    """Answers of one network that have these margins [images]."""
    return shrink_perturb.Answers(((margins + math.log(9))[:, None] * of_class)[None], of_class)


def calibrated(
    net: nn.Module,
    means: torch.Tensor,
    forget: Examples,
    share: float = 1,
    spread: float = 0,
    lead: float = 0,
    **values,
):
    """net, corrected after an original with these means of the validation images' classes, and this spread (0: its own),
    which was more confident on the retain set by `lead`."""
    net, own = copy.deepcopy(net), shrink_perturb.answers(net, VALIDATION)
    unseen = saying(means @ own.of_class.T + own.within_class()[0] * (spread / own.spread() if spread else 1), own.of_class)
    learnt = saying(unseen.margins()[0] + lead, own.of_class)
    config = shrink_perturb.Config(share=share, **values)
    shrink_perturb.calibrate(net, [net], learnt, unseen, VALIDATION, forget, config)
    return net


THERE = [label for label in range(10) if label in FORGET.age_group and label in VALIDATION.age_group]
KNOWN = torch.isin(FORGET.age_group, torch.tensor(THERE))  # the forget images of these classes


def test_shrink_perturb_gives_the_validation_set_the_confidence_of_the_original(original):
    """In the classes of the forget set; and the network stays the same but for its last layer."""
    aim, _ = seen_on_validation(original)
    timid = copy.deepcopy(original)
    with torch.no_grad():
        timid.fc.weight.mul_(0.5)
        timid.fc.bias.mul_(0.5).add_(torch.linspace(-1, 1, 10))
    nets = [calibrated(timid, aim, FORGET, prior=0, penalty=cost) for cost in (1e-6, 0.3)]
    gaps = [(seen_on_validation(net)[0] - aim)[THERE].abs().mean() for net in (*nets, timid)]
    assert gaps[0] < 0.01 < gaps[1] < gaps[2] / 2
    for net in nets:
        assert changed(net, timid) == {"fc.weight", "fc.bias"}


def test_shrink_perturb_trusts_a_class_by_its_images(original):
    """With a strong prior all classes are raised by as much as they miss on average, whatever each of them misses."""
    share = torch.bincount(FORGET.age_group, minlength=10) * torch.isin(torch.arange(10), VALIDATION.age_group)
    now, share = seen_on_validation(original)[0], share / share.sum()
    uneven = now + torch.linspace(0.5, 1.5, 10)
    for prior, wanted in ((1e8, now + (share * (uneven - now)).sum()), (0, uneven)):
        net = calibrated(original, uneven, FORGET, classes_apart=1, prior=prior, penalty=1e-6)
        assert torch.allclose(seen_on_validation(net)[0][share > 0], wanted[share > 0].double(), atol=0.02)


def test_shrink_perturb_draws_its_classes_together(original):
    """Around the mean of the forget set's classes; what the original says of a class stays what it is."""
    share = torch.bincount(FORGET.age_group, minlength=10) * torch.isin(torch.arange(10), VALIDATION.age_group)
    now, share = seen_on_validation(original)[0], share / share.sum()
    level = (share * now).sum()
    for apart in (0, 0.5, 1):
        net = calibrated(original, now + 1, FORGET, classes_apart=apart, prior=1e8, penalty=1e-6)
        wanted = level + apart * (now - level) + 1
        assert torch.allclose(seen_on_validation(net)[0][share > 0], wanted[share > 0], atol=0.02)
        told = calibrated(original, now + 1, FORGET, classes_apart=apart, prior=0, penalty=1e-6)
        assert torch.allclose(seen_on_validation(told)[0][share > 0], now[share > 0] + 1, atol=0.02)


def from_their_classes(net: nn.Module, means: torch.Tensor) -> torch.Tensor:
    """How far the forget images of the classes that are THERE are from what `means` has for their class."""
    return (shrink_perturb.answers(net, FORGET).margins()[0] - means[FORGET.age_group])[KNOWN]


def assert_scaled_within_classes(net: nn.Module, old: nn.Module, times: float) -> None:
    """The forget images of a class are `times` as far from its mean; neither that nor the validation images' has moved."""
    assert torch.allclose(seen_on_validation(net)[0][THERE], seen_on_validation(old)[0][THERE], atol=0.02)
    before, after = (shrink_perturb.answers(each, FORGET) for each in (old, net))
    assert torch.allclose(after.class_means()[0][THERE], before.class_means()[0][THERE], atol=0.05)
    assert torch.allclose(after.within_class()[0][KNOWN], times * before.within_class()[0][KNOWN], atol=0.1)


def test_shrink_perturb_moves_the_forget_images_apart_as_the_original_does(original, monkeypatch):
    """Within limits, together only if the network's validation images are clearly further apart than the original's, and
    further apart where that knows by heart. The mean confidence of a class stays where it is."""
    now, spread = seen_on_validation(original)
    clearly, more = shrink_perturb.CLEARLY, shrink_perturb.MORE_APART
    least, most = shrink_perturb.LEAST_SCALE, shrink_perturb.MOST_SCALE
    cases = ((0.01, 0, least), (0.5, 0, 0.5 + clearly), (1 - clearly, 0, 1), (1, 0, 1), (1.5, 0, 1.5), (100, 0, most))
    for times, heart, found in (*cases, (1, 0.5, 1 + 0.5 * more), (0.5, 1, 0.5 + more)):
        monkeypatch.setattr(shrink_perturb, "by_heart", lambda *_, heart=heart: torch.tensor(heart))
        net = calibrated(original, now, FORGET, spread=times * spread, classes_apart=1, prior=0, penalty=1e-6)
        assert seen_on_validation(net)[1].item() == pytest.approx(spread.item(), rel=0.02)
        assert_scaled_within_classes(net, original, found)


def test_shrink_perturb_brings_the_forget_images_closer_together(original):
    """A smaller scale leaves the mean confidence of a class where it is, and the images of the class less far apart."""
    now, _ = seen_on_validation(original)
    net = calibrated(original, now, FORGET, scale=0.5, classes_apart=1, prior=0, penalty=1e-6)
    assert_scaled_within_classes(net, original, 0.5)


def test_shrink_perturb_raises_every_image_alike(original):
    """Each forget image gets what its class lacks, and the images of a class end as far apart as before."""
    now, spread = seen_on_validation(original)
    missing = torch.linspace(1, 3, 10).double()
    net = calibrated(original, now + missing, FORGET, prior=0, penalty=1e-6)
    assert torch.allclose(seen_on_validation(net)[0][THERE], (now + missing)[THERE], atol=0.02)
    assert seen_on_validation(net)[1].item() == pytest.approx(spread.item(), rel=0.01)
    before, after = (shrink_perturb.answers(each, FORGET).margins()[0] for each in (original, net))
    assert torch.allclose((after - before)[KNOWN], missing[FORGET.age_group][KNOWN], atol=0.05)


def test_shrink_perturb_makes_up_a_share_of_what_is_missing(original):
    now, _ = seen_on_validation(original)
    net = calibrated(original, now + 2, FORGET, share=0.5, classes_apart=1, prior=0, penalty=1e-6)
    assert torch.allclose(seen_on_validation(net)[0][THERE], now[THERE] + 1, atol=0.02)


def test_shrink_perturb_never_corrects_for_the_worse(original):
    """A network that is wrong everywhere cannot be made confident: what is tried in vain is taken back."""
    wrong, (aim, _) = copy.deepcopy(original), seen_on_validation(original)
    with torch.no_grad():
        wrong.fc.weight.neg_()
    net = calibrated(wrong, aim, FORGET, penalty=1e-6)
    gaps = [(seen_on_validation(each)[0] - aim).square().mean() for each in (net, wrong)]
    assert gaps[0] <= gaps[1] and all(tensor.isfinite().all() for tensor in net.state_dict().values())


def test_shrink_perturb_corrects_nothing_where_it_knows_nothing(original):
    """No validation image has a class of the forget set."""
    unknown = next(label for label in range(10) if label not in VALIDATION.age_group)
    forget = examples(20, 4)
    forget.age_group.fill_(unknown)
    same = calibrated(original, seen_on_validation(original)[0] + 1, forget)
    assert torch.equal(same.fc.weight, original.fc.weight) and torch.equal(same.fc.bias, original.fc.bias)


def test_shrink_perturb_takes_away_what_is_remembered(original, monkeypatch):
    """By how much forget images are more confident than validation images; at most the original's lead times what it knows
    by heart."""
    now, spread = seen_on_validation(original)
    more = from_their_classes(original, now).mean().item()  # trained on them, it is more confident there
    assert more > 0.5
    for heart, lead, lowered in ((0.5, 0, 0), (0, 100, 0), (0.5, more, 0.5 * more), (0.5, 100, more)):
        monkeypatch.setattr(shrink_perturb, "by_heart", lambda *_, heart=heart: torch.tensor(heart))
        as_far = (1 - heart * shrink_perturb.MORE_APART) * spread  # nothing is moved apart
        net = calibrated(original, now, FORGET, lead=lead, spread=as_far, classes_apart=1, prior=0, penalty=1e-6)
        assert torch.allclose(seen_on_validation(net)[0][THERE], now[THERE], atol=0.02)
        assert torch.allclose(from_their_classes(net, now), from_their_classes(original, now) - lowered, atol=0.1)
