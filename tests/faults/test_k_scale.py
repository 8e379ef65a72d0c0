"""Activations and outputs of any scale give the same maps and losses."""
import pytest
import torch
from torch import nn

from antehoc_nb.core.attention import minmax, soft_attentions, standardise, take_off_border
from antehoc_nb.core.interpretation_loss import mse, two_pass_step
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.weight_net import interpretation_map

pytestmark = pytest.mark.usefixtures('one_thread')

SCALES = 1e-22, 1e-12, 1e-6, 1e-3, 1e3, 1e12


@pytest.mark.parametrize('name', list(soft_attentions))
@pytest.mark.parametrize('scale', SCALES)
def test_soft_attention(name, scale):
    f = torch.rand(2, 8, 6, 6)
    assert torch.allclose(soft_attentions[name](f * scale), soft_attentions[name](f), atol=1e-4)


@pytest.mark.parametrize('scale', SCALES)
def test_soft_attention_without_its_border(scale):
    f, border = torch.rand(2, 1, 6, 6), torch.rand(1, 1, 6, 6)
    assert torch.allclose(standardise(take_off_border(f * scale, border * scale)),
                          standardise(take_off_border(f, border)), atol=1e-3)


@pytest.mark.parametrize('scale', SCALES)
def test_stretching_and_blending(scale):
    maps = torch.rand(2, 4, 6, 6)
    assert torch.allclose(minmax(maps * scale), minmax(maps), atol=1e-5)
    logits = torch.zeros(2, 4, 1, 1)
    assert torch.allclose(interpretation_map(maps * scale, logits)[0], interpretation_map(maps, logits)[0], atol=1e-4)


@pytest.mark.parametrize('constant', [0., 1e-22, 1e-6, 1., 1e6])
def test_constant_maps_become_0_with_finite_gradients(constant):
    for f in (minmax, standardise):
        maps = torch.full((2, 1, 6, 6), constant, requires_grad=True)
        out = f(maps)
        assert out.abs().max() < 1e-3
        out.sum().backward()
        assert maps.grad.isfinite().all()


@pytest.mark.parametrize('cells, border', [(None, None), (None, False), ('pixels', None)])
@pytest.mark.parametrize('scale', SCALES)
def test_what_a_trained_weight_network_reads(cnn, scale, cells, border):
    x = torch.rand(2, 3, 32, 32)
    network = cnn()
    model = AntehocModel(network, x, eta=2, class_specific=False, cells=cells, border=border)
    torch.nn.init.normal_(model.weight_net.read.shared_direction)
    torch.nn.init.normal_(model.weight_net.autoencoder.out.weight)
    ordinary = model.explain(x)
    network[0][1].register_forward_hook(lambda module, args, out: out * scale)
    network[1][0].weight.data /= scale  # so that all later layers respond as before
    model.measure_border(x)
    scaled = model.explain(x)
    assert torch.allclose(ordinary.sams, scaled.sams, atol=.01) and torch.allclose(ordinary.map, scaled.map, atol=.01)


@pytest.mark.parametrize('scale', [1e-10, 1e-6, 1e6])
def test_loss_of_outputs(scale):
    y1, y2 = torch.randn(6, 3), torch.randn(6, 3)
    assert mse(y2 * scale, y1 * scale).item() == pytest.approx(mse(y2, y1).item(), rel=1e-4)
    assert mse(y1 * scale, y1 * scale).item() == 0
    assert mse(torch.ones(4, 2) * scale, torch.zeros(4, 2)).isfinite()


@pytest.mark.parametrize('scale', [1e-12, 1e-6])
def test_the_whole_model(cnn, scale):
    x = torch.rand(2, 3, 32, 32)
    ordinary, small = cnn(), cnn()
    small[0][1].register_forward_hook(lambda module, args, out: out * scale)
    for network in (small,): network[1][0].weight.data /= scale  # so that all later layers respond as before
    a, b = (AntehocModel(network, x, eta=2, class_specific=False).explain(x).sams for network in (ordinary, small))
    assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize('scale', [1e-12, 1e-6, 1e6, 1e12])
def test_activations_that_have_another_scale_in_training(scale):
    "A new network with small weights fades in evaluation mode; in training mode, batch norm undoes that."
    torch.manual_seed(0)

    def block(*channels): return nn.Conv2d(*channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels[1]), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    cnn = nn.Sequential(*block(3, 8), *block(8, 8), *block(8, 8), *head)
    with torch.no_grad():
        for weight in (cnn[0].weight, cnn[3].weight): weight.mul_(scale)
    x = torch.rand(4, 3, 32, 32)
    model = AntehocModel(cnn, x, layers=['2', '5', '8']).train()
    assert model.units.max() <= 1.1e17 and model.units.min() >= .9e-17
    _, loss = two_pass_step(model, x, torch.arange(4))
    loss.backward()
    gradients = [weight.grad for weight in model.weight_net.parameters() if weight.grad is not None]
    assert loss.isfinite() and gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert model.eval().explain(x).map.isfinite().all()
