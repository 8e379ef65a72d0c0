"""The evidence for a class, beside its definition and beside class activation maps computed otherwise."""
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from antehoc_nb.core.attention import minmax, noise_like_photographs
from antehoc_nb.core.geometry import resize
from antehoc_nb.core.interpretation_loss import int_loss, interpretation_loss, masked_input, two_pass_step
from antehoc_nb.core.layers import channel_gradients
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.weight_net import EVIDENCE_EXPONENT, contrast, evidence_gate
from antehoc_nb.train.archs import small_cnn

pytestmark = pytest.mark.usefixtures('one_thread')
X = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def with_linear_head(classes=4, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)).eval()


def test_under_a_linear_head_it_is_the_class_activation_map():
    "Zhou et al. 2016: the activations along the weights of the class; here less the mean of all classes' weights"
    cnn = with_linear_head()
    model = AntehocModel(cnn, X)
    rows = cnn[6].weight - cnn[6].weight.mean(0)
    torch.testing.assert_close(model.evidence, (rows / rows.norm(dim=1).mean()).detach())
    model.recording = True
    out = model(X)
    recorded, target = model.take_recorded(), torch.tensor([0, 3, 1])
    assert torch.equal(recorded.scores, out)
    activation = cnn[:4](X)
    shares = contrast(target, 4, out)
    at_cells = torch.einsum('bk,kc,bchw->bhw', shares, model.evidence, activation)[:, None]
    deviation = activation.flatten(1).std(1, correction=0)[:, None, None, None]
    torch.testing.assert_close(model._evidence_of(recorded, target), at_cells / deviation, atol=1e-5, rtol=1e-4)


def test_an_untrained_map_lies_on_its_class():
    "Two colours, two classes: the map of either lies on its half of the image."
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *head)
    with torch.no_grad():
        cnn[0].weight.zero_()
        cnn[0].bias.zero_()
        for k in range(8): cnn[0].weight[k, k % 2, 1, 1] = 1 + k / 8
        cnn[4].weight.zero_()
        for k in range(8): cnn[4].weight[k % 2, k] = 1
    x = torch.zeros(1, 3, 32, 32)
    x[:, 0, :, :16], x[:, 1, :, 16:] = 1, 1
    model = AntehocModel(cnn.eval(), x)
    left, right = (model.explain(x, target=k).map[0, 0] for k in range(2))
    assert left[:, :14].mean() > 5 * left[:, 18:].mean() and right[:, 18:].mean() > 5 * right[:, :14].mean()
    plain = AntehocModel(cnn, x, evidence=False)
    assert torch.equal(plain.explain(x, target=0).map, plain.explain(x, target=1).map)  # nothing has been learned


def test_measuring_disturbs_nothing_and_is_the_same_each_time():
    cnn = small_cnn(5).train()
    before, state = {name: value.clone() for name, value in cnn.state_dict().items()}, torch.get_rng_state()
    one, other = AntehocModel(cnn, X), AntehocModel(cnn, torch.rand(3, 3, 32, 32))
    assert torch.equal(one.evidence, other.evidence) and cnn.training
    assert all(torch.equal(value, before[name]) for name, value in cnn.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in cnn.parameters())
    torch.set_rng_state(state)
    assert not any(module._forward_hooks for module in cnn.modules())


def test_it_follows_the_cnn():
    model = AntehocModel(with_linear_head(), X).train()
    before = model.evidence.clone()
    with torch.no_grad(): model.cnn[6].weight.copy_(torch.randn(4, 8))
    two_pass_step(model, X, torch.tensor([0, 1, 2]))
    rows = model.cnn[6].weight - model.cnn[6].weight.mean(0)
    torch.testing.assert_close(model.evidence, (rows / rows.norm(dim=1).mean()).detach())
    assert not torch.allclose(before, model.evidence)
    for weight in model.cnn.parameters(): weight.requires_grad_(False)
    with torch.no_grad(): model.cnn[6].weight.copy_(torch.randn(4, 8))
    two_pass_step(model, X, torch.tensor([0, 1, 2]), number=2000)  # of a CNN that does not learn it is left alone
    torch.testing.assert_close(model.evidence, (rows / rows.norm(dim=1).mean()).detach())


def test_it_has_no_gradient_of_its_own_and_no_weights():
    model = AntehocModel(with_linear_head(), X).train()
    assert 'evidence' not in dict(model.named_parameters())
    out, loss = two_pass_step(model, X, torch.tensor([0, 1, 2]))
    loss.backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in model.cnn.parameters())
    assert not model.evidence.requires_grad


def test_saved_and_loaded(tmp_path):
    model = AntehocModel(with_linear_head(), X).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        model.save_pretrained(tmp_path)
    loaded = AntehocModel.from_pretrained(tmp_path, cnn=with_linear_head(seed=1))
    assert torch.equal(loaded.explain(X, target=1).map, model.explain(X, target=1).map)
    config = (tmp_path/'config.json').read_text()
    assert '"evidence": 1' in config
    (tmp_path/'config.json').write_text(config.replace('"evidence": 1,', ''))  # as versions before it saved
    with pytest.raises(ValueError, match='does not fit'): AntehocModel.from_pretrained(tmp_path, cnn=with_linear_head())
    (tmp_path/'config.json').write_text(config.replace('"evidence": 1,', '"evidence": 7,'))
    with pytest.raises(ValueError, match='evidence=7: there are 2 layers'):
        AntehocModel.from_pretrained(tmp_path, cnn=with_linear_head())


@pytest.mark.parametrize('settings', [dict(class_specific=False), dict(weight_net='paper'), dict(weight_net='mean')])
def test_maps_of_no_class_have_none(settings):
    model = AntehocModel(with_linear_head(), X, **settings)
    assert model.evidence is None and model.config['evidence'] is False
    with pytest.raises(ValueError, match='evidence=True: only class-specific maps of networks that modulate them'):
        AntehocModel(with_linear_head(), X, evidence=True, **settings)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.cnn = with_linear_head()

    def forward(self, x): return self.cnn(x).detach()


def test_without_gradients_it_warns_and_does_without():
    with pytest.warns(UserWarning, match='no gradients of the scores with respect to a layer can be measured'):
        model = AntehocModel(Detached(), X)
    assert model.evidence is None and model.explain(X).map.isfinite().all()


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.cnn = with_linear_head()

    def forward(self, x): return self.cnn[4:](checkpoint(self.cnn[:4], x, use_reentrant=False))


def test_checkpoints_compute_it_again():
    expected = AntehocModel(with_linear_head(), X)
    model = AntehocModel(Checkpointed(), X)
    torch.testing.assert_close(model.evidence, expected.evidence)


def test_rectified_layers_count_where_they_respond():
    "Of a layer whose rectifier is a function, places that it sets to 0 have no gradient and are left out of the mean."
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = with_linear_head()

        def forward(self, x): return self.cnn[4:](self.cnn[2](self.cnn[:2](x)).relu())

    network = Functional().requires_grad_(False)
    found = channel_gradients(network, 'cnn.2+relu', (X,), lambda out: out)
    expected = channel_gradients(with_linear_head().requires_grad_(False), '3', (X,), lambda out: out)
    alive = Functional().cnn[:4](X).amax((0, 2, 3)) > 0
    assert alive.sum() > 2
    torch.testing.assert_close(found[:, alive], expected[:, alive])


def test_as_many_classes_as_there_may_be():
    "Batched gradients, in chunks, and one by one"
    for classes in (2, 130, 300):
        cnn = with_linear_head(classes).requires_grad_(False)
        found = channel_gradients(cnn, '3', (X,), lambda out: out)
        torch.testing.assert_close(found, cnn[6].weight / 64)


def test_contrast_takes_off_what_else_is_seen():
    scores = noise_like_photographs(1, 1, (6, 5))[0, 0] * 9
    target = torch.arange(6) % 5
    shares = contrast(target, 5, scores)
    for row in range(6):
        others = [k for k in range(5) if k != target[row]]
        p = scores[row, others].softmax(0)
        assert shares[row, target[row]] == 1
        torch.testing.assert_close(shares[row, others], -.5 * p)
    assert contrast(torch.tensor([0]), 2, torch.tensor([[500., -500.]])).tolist() == [[1, -.5]]  # no 0 / 0
    directions = torch.randn(2, 5)
    assert contrast(directions, 5) is directions


def test_the_map_is_a_power_of_the_blend():
    "Eq. 1 with its power: the soft attention maps times the gate, blended, and wider than that without another order"
    model = AntehocModel(with_linear_head(), X).eval()
    model.recording = True
    model(X)
    found, weights, sams = model.interpret(model.take_recorded(), (16, 16), torch.tensor([0, 3, 1]))
    blend = (weights * sams).sum(1, keepdim=True)
    wanted = minmax(blend.clamp_min(1e-6) ** EVIDENCE_EXPONENT)
    torch.testing.assert_close(found, wanted)
    narrow = minmax(blend)
    assert (found >= narrow - 1e-3).all() and found.mean() > narrow.mean()
    assert torch.equal(found.flatten(1).argmax(1), narrow.flatten(1).argmax(1))


def test_training_masks_with_the_blend_itself():
    "Under the wider map the loss would be low whatever the weights are."
    model, target = AntehocModel(with_linear_head(), X).eval(), torch.tensor([0, 3, 1])
    model.weight_net.surrogate = None  # every image is masked by its map
    model.recording = True
    y1 = model(X)
    recorded = model.take_recorded()
    found = interpretation_loss(model, X, recorded, y1, torch.arange(3), loss='cross_entropy', target=target)
    _, weights, sams = model.interpret(recorded, (32, 32), target)
    mask = minmax(resize((weights * sams).sum(1, keepdim=True), (32, 32)))
    y2 = model.cnn(masked_input(X, mask, torch.arange(3), 'soft', 'black', model.mean, model.std))
    torch.testing.assert_close(found, int_loss(y2, target, 'cross_entropy'))


@pytest.mark.parametrize('offset', [-50., -3., 0., 3., 50.])
def test_the_gate_is_never_flat(offset):
    "Also where there is evidence against the class everywhere"
    evidence = torch.linspace(-1, 1, 16).view(1, 1, 4, 4) + offset
    gate = evidence_gate(evidence)
    assert 0 <= gate.min() and gate.max() <= 1
    assert gate.argmax() == 15 or offset == 50.  # far above, all places count alike
    if offset < 0: assert gate.amax() == pytest.approx(1 - torch.tensor(-.25).exp().item())


def test_calibration_makes_its_noise_once(monkeypatch):
    "And measures what making the model and measuring each by itself do."
    made, own = [], noise_like_photographs
    monkeypatch.setattr('antehoc_nb.core.model.noise_like_photographs', lambda *args: made.append(args) or own(*args))
    for x in (X[:1], torch.rand(3, 3, 17, 19)):
        model = AntehocModel(with_linear_head(), x)
        before = {name: value.clone() for name, value in model.named_buffers() if not name.startswith('cnn.')}
        made.clear()
        model.calibrate(x)
        assert len(made) == 1 and {'evidence', 'border_0', 'units'} < {*before}
        after = {name: value.clone() for name, value in model.named_buffers() if name in before}
        model.measure_border(x)
        model.measure_evidence(x)
        for name, value in model.named_buffers():
            if name in before and not name.startswith('border') and name != 'units':
                assert torch.equal(value, before[name]), name
            if name in after: assert torch.equal(value, after[name]), name
        made.clear()
        AntehocModel(with_linear_head(), x, border=False, evidence=False).calibrate(x)
        assert not made


@pytest.mark.parametrize('spoil', ['nan', 'zero'])
def test_evidence_of_an_earlier_cnn_is_not_kept(spoil):
    "A CNN that diverged, or whose scores have become constant, has no gradients."
    model = AntehocModel(with_linear_head(), X)
    good = model.cnn[6].weight.detach().clone()
    with torch.no_grad(): model.cnn[6].weight.fill_(float('nan') if spoil == 'nan' else 0.)
    with pytest.warns(UserWarning) as caught: model.calibrate(X)
    assert [str(warning.message) for warning in caught] == [
        "AntehocModel: the scores of the CNN have no finite gradient with respect to '3' any more, so maps of classes "
        'do without the evidence for the class; look at the CNN: its training may have diverged']
    assert not model.evidence.any() and model.evidence.shape == (4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model.calibrate(X)  # it was said
    if spoil == 'zero': assert torch.equal(model.explain(X, target=0).map, model.explain(X, target=1).map)
    with torch.no_grad(): model.cnn[6].weight.copy_(good)
    model.calibrate(X)  # it comes back with the gradients
    assert torch.equal(model.evidence, AntehocModel(with_linear_head(), X).evidence)
