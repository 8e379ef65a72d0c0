"The additive surrogate of a class-specific weight network: what it learns from, and what it changes."
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from antehoc_nb.core.interpretation_loss import (
    int_loss,
    interpretation_loss,
    surrogate_loss,
    two_pass_step,
)
from antehoc_nb.core.masking import Alternate, as_mask, masked, masked_input, random_areas
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.weight_net import contribution_gate, evidence_gate
from antehoc_nb.train.archs import small_cnn

X = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model_of(seed=0, learned=True, **settings):
    torch.manual_seed(seed)
    model = AntehocModel(small_cnn(4), X[:2], **settings).eval()
    if learned and model.has_surrogate:
        with torch.no_grad(): model.weight_net.surrogate.scores.weight.normal_(std=.3)
    return model


def pass_1(model, x=X):
    model.recording = True
    y1 = model(x)
    return y1, model.take_recorded()


# --- The loss

def test_the_divergence_in_units_of_log_k():
    p, q = torch.tensor([.7, .2, .1]), torch.tensor([.5, .25, .25])
    want = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist())) / math.log(3)
    found = surrogate_loss(q.log()[None] + 3, p.log()[None] - 2)
    assert found.item() == pytest.approx(want, abs=1e-6)
    scores = torch.tensor([[2., -1.]])
    want = sum(a * math.log(a / .5) + (1 - a) * math.log((1 - a) / .5) for a in scores[0].sigmoid().tolist())
    assert surrogate_loss(0 * scores, scores, 'multi-label').item() == pytest.approx(want / 2 / math.log(2), abs=1e-6)
    for task in ('single-label', 'multi-label'):
        assert surrogate_loss(scores, scores, task).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('fill', ['black', 'mean', 'blur'])
def test_pass_2_against_one_image_at_a_time(fill):
    model, target, number = model_of(), torch.tensor([0, 3, 1, 2, 2]), torch.arange(7, 12)
    y1, recorded = pass_1(model)
    found = interpretation_loss(model, X, recorded, y1, number, 'soft', fill, 'cross_entropy', target)
    parts = []
    for i, n in enumerate(number.tolist()):
        x, of_image = X[i:i + 1], torch.tensor([n])
        y, recorded = pass_1(model, x)
        maps, *_ = model.interpret(recorded, (32, 32), target[i:i + 1], exponent=1.)
        places, surrogate = model.places(recorded), model.weight_net.surrogate
        parts.append(.5 * surrogate_loss(surrogate.predict(places, torch.ones(1, 1, 8, 8)), y))
        area = random_areas(of_image, (8, 8))
        y2 = model.cnn(masked(x, area.repeat_interleave(4, 2).repeat_interleave(4, 3), fill, model.mean, model.std))
        parts.append(surrogate_loss(surrogate.predict(places, area), y2))
        if n % 2 == 0:
            x2 = masked_input(x, maps, of_image // 2, 'soft', fill, model.mean, model.std)
            parts.append(int_loss(model.cnn(x2), target[i:i + 1], 'cross_entropy'))
    assert found.item() == pytest.approx(sum(part.sum().item() for part in parts) / 10, abs=1e-4)


class Shifted(nn.Module):
    "A CNN with a second input"
    def __init__(self):
        super().__init__()
        self.cnn = small_cnn(4)

    def forward(self, x, shift): return self.cnn(x) + shift


def test_other_inputs_go_with_their_images():
    torch.manual_seed(0)
    shift, target, number = 3 * torch.randn(5, 4), torch.tensor([0, 3, 1, 2, 2]), torch.arange(7, 12)
    model = AntehocModel(Shifted(), (X[:2], shift[:2]), class_specific=True).eval()
    assert model.has_surrogate

    def loss(chosen):
        model.recording = True
        y1 = model(X[chosen], shift[chosen])
        return interpretation_loss(model, X[chosen], model.take_recorded(), y1, number[chosen], loss='cross_entropy',
                                   target=target[chosen], others=(shift[chosen],)).item()

    alone = [loss(slice(i, i + 1)) for i in range(5)]
    assert loss(slice(None)) == pytest.approx(sum(alone) / 5, abs=1e-4)


def test_masks_take_turns():
    "A mask that alternates by number does so, though every other image has only a random area."
    model, target = model_of(), torch.tensor([0, 3, 1, 2, 2])
    y1, recorded = pass_1(model)

    def loss(mask): return interpretation_loss(model, X, recorded, y1, torch.arange(5), mask, 'black', 'cross_entropy',
                                               target).item()

    assert len({loss(mask) for mask in ('soft', 'threshold', Alternate(as_mask('soft'), as_mask('threshold')))}) == 3


def test_nested_inputs_stay_whole():
    "A table of as many rows as there are images, which does not belong to them."
    class WithTable(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = small_cnn(4)

        def forward(self, x, tables):
            assert len(tables['a'][0]) == 5
            return self.cnn(x) + tables['a'][0].sum(0)

    tables = {'a': [torch.randn(5, 4)]}
    model = AntehocModel(WithTable(), (X[:2], tables), class_specific=True).train()
    _, loss = two_pass_step(model, X, torch.tensor([0, 3, 1, 2, 2]), others=(tables,))
    assert loss.isfinite()


def test_images_with_a_random_area_go_through_the_cnn_without_a_gradient():
    model, seen = model_of(), []
    y1, recorded = pass_1(model)
    model.cnn.register_forward_pre_hook(lambda cnn, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    interpretation_loss(model, X, recorded, y1, torch.arange(1, 6), loss='cross_entropy', target=torch.arange(5) % 4)
    assert sorted(seen) == [(2, True), (5, False)]  # every other one under its map as well


def test_the_maps_own_loss_does_not_train_the_surrogate():
    model, number = model_of(), torch.arange(5)
    y1, recorded = pass_1(model)

    def gradients(target):
        loss = interpretation_loss(model, X, recorded, y1, number, 'soft', loss='cross_entropy', target=target)
        return torch.autograd.grad(loss, [*model.weight_net.surrogate.parameters()], retain_graph=True)

    for one, other in zip(gradients(torch.tensor([0, 3, 1, 2, 2])), gradients(torch.tensor([1, 3, 2, 2, 0]))):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('fill', ['black', 'blur'])
@pytest.mark.parametrize('number', [4, 5])
def test_a_batch_of_one(number, fill):
    "With its map or without: the step goes through, and with a random area alone it teaches the surrogate alone."
    model = model_of()
    y1, recorded = pass_1(model, X[:1])
    loss = interpretation_loss(model, X[:1], recorded, y1, torch.tensor([number]), 'soft', fill, 'cross_entropy',
                               target=torch.tensor([1]))
    gradient, = torch.autograd.grad(loss, [model.weight_net.autoencoder.out.weight], retain_graph=True)
    assert loss.isfinite() and (gradient.abs().sum() > 0) == (number == 4)
    learned, = torch.autograd.grad(loss, [model.weight_net.surrogate.scores.weight])
    assert learned.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize('task', ['single-label', 'multi-label'])
def test_it_learns_what_the_cnn_does_with_areas(task):
    torch.manual_seed(0)
    model = AntehocModel(small_cnn(4), X[:2], meta=dict(task=task)).eval()
    learned = [*model.weight_net.surrogate.parameters(), model.weight_net.read.views]
    optimiser = torch.optim.Adam(learned, 1e-2)
    x = torch.randn(32, 3, 32, 32)
    with torch.no_grad(): model.cnn[-1].weight.mul_(4)  # so that the scores differ

    def error(number):
        y1, recorded = pass_1(model, x)
        with torch.no_grad():
            model.interpret(recorded, (32, 32), torch.zeros(32, dtype=torch.long))
            areas = random_areas(number, (8, 8))
            scores = model.cnn(masked(x, F.interpolate(areas, size=(32, 32)), 'black', model.mean, model.std))
            predicted = model.weight_net.surrogate.predict(model.places(recorded), areas)
            return surrogate_loss(predicted, scores, task).mean()

    before = error(torch.arange(1000, 1032))
    for step in range(60):
        y1, recorded = pass_1(model, x)
        target = y1.argmax(1)
        loss = 'cross_entropy' if task == 'single-label' else 'binary_cross_entropy'
        loss = interpretation_loss(model, x, recorded, y1.detach(), torch.arange(32) + 32 * step, 'soft', loss=loss,
                                   target=target)
        optimiser.zero_grad()
        loss.backward(inputs=learned)
        optimiser.step()
    assert error(torch.arange(1000, 1032)) < .7 * before


def test_without_a_gradient_through_the_cnn_training_is_refused():
    "Though the surrogate could learn from it."
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = small_cnn(4)

        def forward(self, x): return self.cnn(x) if x.grad_fn is None else self.cnn(x.detach())

    model = AntehocModel(Detached(), X[:2], evidence=False)
    with pytest.raises(ValueError, match='no gradient goes through the CNN to the map'):
        two_pass_step(model.train(), X, torch.arange(5) % 4)


# --- The map

@pytest.mark.parametrize('settings', [{}, dict(evidence=False), dict(cells='pixels'), dict(scale=False)])
def test_an_untrained_surrogate_changes_no_map(settings):
    model = model_of(learned=False, **settings)
    target = torch.tensor([0, 3, 1, 2, 2])
    found = model.explain(X, target=target).map
    model.weight_net.surrogate = None
    torch.testing.assert_close(model.explain(X, target=target).map, found)


def test_contributions_move_the_map():
    "Where a place contributes more to the target, its map is higher."
    model = model_of(learned=False, evidence=False)
    y1, recorded = pass_1(model)
    target = torch.tensor([0, 3, 1, 2, 2])
    before = model.explain(X, target=target).sams
    with torch.no_grad(): model.weight_net.surrogate.scores.weight.normal_(std=.3)
    explanation = model.explain(X, target=target)
    model.interpret(recorded, (32, 32), target)
    wanted = F.one_hot(target, 4) - .5 * F.one_hot(target, 4).logical_not() * y1.masked_fill(
        F.one_hot(target, 4).bool(), -torch.inf).softmax(1)
    of_places = model.weight_net.surrogate.contributions(model.places(recorded), wanted)
    ratio = explanation.sams / before.clamp_min(1e-4)
    high, low = (of_places.flatten(1).topk(8, largest=largest).indices for largest in (True, False))
    ratio = F.avg_pool2d(ratio.mean(1, keepdim=True), 2).flatten(1)
    assert (ratio.gather(1, high).mean(1) > ratio.gather(1, low).mean(1)).all()
    assert ratio.gather(1, high).mean() > 2 * ratio.gather(1, low).mean()


@settings(max_examples=50, deadline=None)
@given(st.floats(-20, 20), st.floats(.01, 10), st.floats(.01, 10))
def test_the_gate_lies_between_0_and_1(offset, spread, strength):
    torch.manual_seed(0)
    evidence, of_places = offset + spread * torch.randn(3, 1, 8, 8), strength * torch.randn(3, 1, 8, 8)
    for gate in (contribution_gate(of_places), contribution_gate(of_places, evidence)):
        assert gate.isfinite().all() and 0 <= gate.min() and gate.max() <= 1
        assert (gate.amax((2, 3)) > 0).all()
    torch.testing.assert_close(contribution_gate(0 * of_places, evidence), evidence_gate(evidence))


def test_the_gate_written_out():
    torch.manual_seed(0)
    evidence, of_places = 2 * torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    for e, c, gate in zip(evidence, of_places, contribution_gate(of_places, evidence)):
        deviation = e.std(correction=0).item()
        raised = [1 / (1 + math.exp(-1.5 * of_place)) for of_place in c.flatten().tolist()]
        lowest, highest = min(raised), max(raised)
        added = [of_e + 4 * deviation * of_c for of_e, of_c in zip(e.flatten().tolist(), c.flatten().tolist())]
        for s, both, found in zip(raised, added, gate.flatten().tolist()):
            want = ((s - lowest + .01) / (highest - lowest + .01))**2 * (1 - math.exp(-max(both, 0) / 4))
            assert found == pytest.approx(want, abs=1e-5)  # the evidence is above 1 somewhere, and so not raised


@settings(max_examples=50, deadline=None)
@given(st.floats(.1, 3), st.integers(0, 1000))
def test_the_gate_of_small_contributions_tells_places_apart(strength, seed):
    of_places = strength * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for gate, c in zip(contribution_gate(of_places).flatten(1), of_places.flatten(1)):
        assert gate.max() == 1 and gate.min() < .05
        assert (gate[c.argsort()].diff() >= 0).all()


@pytest.mark.parametrize('settings', [dict(class_specific=False), dict(weight_net='paper'), dict(weight_net='mean')])
def test_who_has_none(settings): assert not model_of(**settings).has_surrogate


# --- Files

def test_files_of_older_versions_have_none(tmp_path):
    model = model_of(learned=False)
    file = model.save_pretrained(tmp_path/'model')/'model.safetensors'
    tensors = load_file(file)
    assert any('surrogate' in name for name in tensors)
    save_file({name: tensor for name, tensor in tensors.items() if 'surrogate' not in name}, file)
    loaded = AntehocModel.from_pretrained(tmp_path/'model', cnn=copy.deepcopy(model.cnn))
    assert torch.equal(loaded.explain(X).map, model.explain(X).map)
    assert loaded.weight_net.surrogate.features.weight.abs().sum() > 0  # so that it can be trained
    name = next(name for name in tensors if 'autoencoder' in name)
    save_file({key: tensor for key, tensor in tensors.items() if 'surrogate' not in key and key != name}, file)
    with pytest.raises(ValueError, match='weights'):
        AntehocModel.from_pretrained(tmp_path/'model', cnn=copy.deepcopy(model.cnn))


def test_a_learned_one_goes_through_a_file(tmp_path):
    model = model_of()
    folder = model.save_pretrained(tmp_path/'model')
    loaded = AntehocModel.from_pretrained(folder, cnn=copy.deepcopy(model.cnn))
    assert torch.equal(loaded.explain(X).map, model.explain(X).map)
    model.weight_net.surrogate = None
    assert not torch.equal(loaded.explain(X).map, model.explain(X).map)


# --- Random areas

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 12), st.integers(1, 12))
def test_areas_of_any_size(number, height, width):
    area = random_areas(torch.tensor([number]), (height, width))
    assert area.shape == (1, 1, height, width) and {*area.flatten().tolist()} <= {0., 1.}
    assert 1 <= area.sum() <= max(1, round(.65 * height * width))
