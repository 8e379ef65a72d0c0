"""Border responses: what padding does to a map, measured and taken off."""
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from workers import small_cnn

from antehoc_nb.core.attention import fit_border, noise_like_photographs, softmax_l2, take_off_border
from antehoc_nb.core.model import AntehocModel

pytestmark = pytest.mark.usefixtures('one_thread')


def border_lover(padding_mode='zeros'):
    "A CNN whose layers respond to edges, and so to the edge that zero padding makes."
    def edges(n_in):
        convolution = nn.Conv2d(n_in, 4, 3, padding=1, padding_mode=padding_mode, bias=False)
        kernels = torch.zeros(4, n_in, 3, 3)
        kernels[0, :, 0], kernels[0, :, 2] = 1., -1.
        kernels[1, :, 2], kernels[1, :, 0] = 1., -1.
        kernels[2, :, :, 0], kernels[2, :, :, 2] = 1., -1.
        kernels[3, :, :, 2], kernels[3, :, :, 0] = 1., -1.
        convolution.weight.data = kernels / n_in
        return convolution
    return nn.Sequential(edges(3), nn.ReLU(), edges(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 3)).eval()


def brighter_at_the_border(maps):
    "By how much the mean map is brighter within two pixels of the border than inside."
    mean_map, ring = maps.mean((0, 1)), torch.ones(maps.shape[2:], dtype=torch.bool)
    ring[2:-2, 2:-2] = False
    return (mean_map[ring].mean() - mean_map[~ring].mean()).item()


def test_maps_are_not_brighter_along_the_border():
    x = noise_like_photographs(48, 3, (32, 32))[16:]  # not those that the border response is measured with
    kept, taken_off = (AntehocModel(border_lover(), x[:2], eta=2, border=border, evidence=False)
                       for border in (False, True))
    assert brighter_at_the_border(kept.explain(x).map) > .3
    assert abs(brighter_at_the_border(taken_off.explain(x).map)) < .05


def test_nothing_is_taken_off_where_the_border_makes_no_difference():
    x = torch.rand(8, 3, 32, 32)
    kept, taken_off = (AntehocModel(border_lover('circular'), x[:2], eta=2, border=border, evidence=False)
                       for border in (False, True))
    difference = (kept.explain(x).map - taken_off.explain(x).map).abs().mean()
    zeros = [AntehocModel(border_lover(), x[:2], eta=2, border=border, evidence=False).explain(x).map
             for border in (False, True)]
    assert difference < .5 * (zeros[0] - zeros[1]).abs().mean()


def test_measuring_disturbs_nothing_and_follows_the_cnn():
    cnn, sample = small_cnn().train(), torch.rand(2, 3, 32, 32)
    cnn[0][1].eval()  # a frozen batch norm
    model = AntehocModel(cnn, sample, eta=3)
    before, modes, stream = copy.deepcopy(cnn.state_dict()), [m.training for m in cnn.modules()], torch.get_rng_state()
    first, first_unit = model.border_0.clone(), model.units[0].clone()
    model.measure_border(sample)
    assert torch.equal(model.border_0, first)  # the noise is the same each time
    assert torch.equal(torch.get_rng_state(), stream) and [m.training for m in cnn.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in cnn.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad(): cnn[0][0].weight.mul_(3)
    model.measure_border(sample)
    in_place = model.border_0 / model.units[0]  # both are kept in units of their mean
    torch.testing.assert_close(in_place, 3 * first / first_unit, atol=1e-4, rtol=.05)


def test_a_saved_model_keeps_its_border(tmp_path):
    model = AntehocModel(small_cnn(), torch.rand(2, 3, 48, 32), eta=3).eval()
    with pytest.warns(UserWarning, match='cnn='): folder = model.save_pretrained(tmp_path)
    loaded = AntehocModel.from_pretrained(folder, cnn=small_cnn())
    assert [tuple(b.shape) for b in (loaded.border_0, loaded.border_2)] == [(1, 1, 24, 16), (1, 1, 12, 8)]
    for x in (torch.rand(2, 3, 48, 32), torch.rand(1, 3, 40, 72)):  # the size it was made for, and another
        assert torch.equal(loaded.explain(x).map, model.explain(x).map)


def test_a_layer_that_is_not_finite_has_no_border_response():
    cnn = small_cnn()
    with torch.no_grad(): cnn[2][0].weight.fill_(torch.nan)
    model = AntehocModel(cnn, torch.rand(2, 3, 32, 32), layers=['0', '2'])
    assert model.border_0.abs().sum() > 0 and (model.border_1 == 0).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_cells_keep_their_distance_from_the_nearer_border(cells, wanted, width):
    border = torch.arange(cells).float()[None, None, :, None].expand(1, 1, cells, width)
    fitted = fit_border(border, (wanted, width))
    assert fitted.shape == (1, 1, wanted, width)
    for row, value in enumerate(fitted[0, 0, :, 0].tolist()):
        from_end = wanted - 1 - row
        half = (cells - 1) // 2
        expected = min(row, half) if row < wanted / 2 else cells - 1 - min(from_end, half)
        assert value == (expected if cells != wanted else row)


def test_a_constant_response_stays_constant():
    border, strength = torch.rand(1, 1, 8, 8), torch.rand(2, 1, 8, 8)
    strength[1] = .7
    difference = take_off_border(strength, border)
    assert torch.equal(difference[0], strength[0] - border[0]) and torch.equal(difference[1], strength[1])
    assert (softmax_l2(torch.ones(1, 3, 8, 8), 3., border) == 0).all()


def test_noise_has_no_preferred_place_and_the_spectrum_of_photographs():
    noise = noise_like_photographs(256, 1, (64, 64))
    assert noise.mean(0).std() < .03
    power = torch.fft.rfft2(noise - noise.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))
    for low, high in ((2, 4), (4, 8), (8, 16)):  # twice the frequency, a quarter of the power
        assert power[0, high].item() == pytest.approx(power[0, low].item() / 4, rel=.4)


@pytest.mark.parametrize('attention', ['softmax', 'softmax_l2'])
def test_an_untrained_default_without_evidence_is_the_plain_average(attention):
    "Its modulated maps are made from the strength that the soft attention takes, without its border response."
    cnn, x = small_cnn().eval(), torch.rand(3, 3, 40, 32)
    settings = dict(sample=x, eta=3, soft_attention=attention, cells=5, temperature=1.5)
    default, average = AntehocModel(cnn, evidence=False, **settings), AntehocModel(cnn, weight_net='mean', **settings)
    torch.testing.assert_close(default.explain(x).map, average.explain(x).map, atol=1e-4, rtol=0)
