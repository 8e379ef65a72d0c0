"""Model randomisation touches what it should and nothing else; rank correlation and SSIM are the libraries' own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from antehoc_nb.core.model import AntehocModel
from antehoc_nb.evaluate.robustness import ssim
from antehoc_nb.evaluate.sanity import (
    model_randomisation,
    plot_randomisation,
    random_layers,
    randomised,
    rank_correlation,
)

pytest.importorskip('skimage')
seeds = st.integers(0, 2**31 - 1)


def maps(seed, h, w, b=3, levels=None):
    m = torch.rand(b, 1, h, w, generator=torch.Generator().manual_seed(seed))
    return m if levels is None else (m * levels).floor() / levels


def toy_cnn():
    def block(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())

    return nn.Sequential(
        block(3, 6), nn.MaxPool2d(2), block(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def model():
    torch.manual_seed(0)
    m = AntehocModel(toy_cnn(), sample=torch.rand(2, 3, 16, 16), eta=2)
    for b in m.modules():
        if isinstance(b, torch.nn.BatchNorm2d):
            b.running_mean.normal_()
            b.running_var.uniform_(0.5, 2)
    m.measure_border(torch.rand(1, 3, 16, 16))
    for p in m.weight_net.parameters():
        p.data.add_(0.3 * torch.randn_like(p))  # as if trained
    return m


def antehoc(m, x):
    return m.explain(x).map


def of_class_0(m, x):
    return m.explain(x, target=0).map


# --- similarity


@given(seeds, st.integers(2, 12), st.integers(2, 12), st.sampled_from([None, 2, 5]))
def test_rank_correlation_is_scipys(seed, h, w, levels):
    from scipy.stats import spearmanr

    a, b = maps(seed, h, w, levels=levels), maps(seed + 1, h, w, levels=levels)
    got = rank_correlation(a, b)
    for g, i, j in zip(got, a, b):
        flat = i.min() == i.max() or j.min() == j.max()
        want = math.nan if flat else spearmanr(i.flatten(), j.flatten()).statistic
        assert g.item() == pytest.approx(want, abs=1e-5, nan_ok=True)
    assert torch.allclose(got, rank_correlation(b[:, 0], a[:, 0]), equal_nan=True)
    assert torch.allclose(got, rank_correlation((3 * a).exp(), b), equal_nan=True, atol=1e-6)  # only the order counts


@given(seeds)
def test_ssim_is_scikit_images(seed):
    from skimage.metrics import structural_similarity

    a, b = maps(seed, 9, 12), maps(seed + 1, 9, 12)
    want = [
        structural_similarity(i.double().numpy(), j.double().numpy(), data_range=1) for i, j in zip(a[:, 0], b[:, 0])
    ]
    assert ssim(a, b).tolist() == pytest.approx(want, abs=1e-6)
    assert torch.allclose(ssim(a, a), torch.ones(3)) and torch.allclose(ssim(a, b), ssim(b, a))


# --- randomising


def test_the_cascade_goes_from_the_last_layer_and_stays_in_its_part():
    m = model()
    assert random_layers(m, 'cnn') == ['cnn.5', 'cnn.2.1', 'cnn.2.0', 'cnn.0.1', 'cnn.0.0']
    whole = random_layers(m)
    assert whole == random_layers(m, 'weight_net') + random_layers(m, 'cnn') and random_layers(m.cnn)[0] == '5'
    assert random_layers(torch.nn.Linear(2, 2)) == ['']


def test_a_randomised_layer_changes_alone_and_repeatably():
    m = model()
    before, state = {k: v.clone() for k, v in m.state_dict().items()}, torch.get_rng_state()
    for n in random_layers(m):
        r = randomised(m, [n], seed=3).state_dict()
        changed = {k for k in before if not torch.equal(before[k], r[k])}
        assert changed and all(k.startswith(n + '.') for k in changed), n
        again, other = randomised(m, [n], seed=3).state_dict(), randomised(m, [n], seed=4).state_dict()
        assert all(torch.equal(r[k], again[k]) for k in r)
        if 'cnn' in n and '.1' not in n:  # a batch norm draws nothing
            assert not all(torch.equal(r[k], other[k]) for k in r)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    bn = randomised(m, ['cnn.0.1']).cnn[0][1]
    assert (bn.running_mean == 0).all() and (bn.running_var == 1).all()


def test_new_weights_are_drawn_as_the_layer_draws_them():
    lin = torch.nn.Linear(3, 5)
    torch.manual_seed(9)
    lin.reset_parameters()
    other = torch.nn.Linear(3, 5)
    assert torch.equal(randomised(other, [''], seed=9).weight, lin.weight)


# --- the test of maps


@pytest.mark.slow
@pytest.mark.parametrize('part', ['cnn', 'weight_net', ''])
def test_the_cascade_is_cumulative(part):
    m, x = model(), torch.randn(5, 3, 16, 16)
    modes = [o.training for o in m.modules()]
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in m.state_dict().items()}
    t = model_randomisation(antehoc, m, x, part, seed=2, bs=2)
    assert torch.equal(torch.get_rng_state(), state) and [o.training for o in m.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    names = random_layers(m, part)
    assert t.layer.tolist() == ['(trained)', *names] and t.index.tolist() == list(range(len(names) + 1))
    step, first = m, antehoc(m, x)
    for k, n in enumerate(names):  # by hand
        step = randomised(step, [n], 2 + k, x)
        now = antehoc(step, x)
        assert t.rank_correlation[k + 1] == pytest.approx(rank_correlation(first, now).nanmean().item(), abs=1e-4)
        assert t.ssim[k + 1] == pytest.approx(ssim(first, now).mean().item(), abs=1e-4)
    assert t.ssim[0] == pytest.approx(1) and t.ssim.iloc[-1] < 0.99
    assert abs(model_randomisation(antehoc, m, x, part, seed=2, bs=5).ssim - t.ssim).max() < 1e-4


def test_maps_that_ignore_the_network_are_found_out():
    m, x = model(), torch.rand(4, 3, 16, 16)

    def brightness(m, x):
        return x.mean(1, keepdim=True)

    t = model_randomisation(brightness, m, x, 'cnn')
    assert (t.rank_correlation > 1 - 1e-6).all() and (t.ssim > 1 - 1e-6).all() and (t.flat == 0).all()
    flat = model_randomisation(lambda m, x: x[:, :1] * 0, m, x, layers=['cnn.5'])
    assert (
        flat.rank_correlation.isna().all() and (flat.flat == 1).all() and flat.layer.tolist() == ['(trained)', 'cnn.5']
    )
    head = model_randomisation(of_class_0, m, x, layers=['cnn.5'])  # behind the last layer that is recorded
    assert head.ssim[1] < .999  # the evidence for a class goes through it
    without = AntehocModel(m.cnn, x[:1], layers=m.layers, evidence=False).eval()
    assert model_randomisation(of_class_0, without, x, layers=['cnn.5']).ssim[1] == pytest.approx(1)
    assert model_randomisation(antehoc, m, x, layers=['cnn.5']).ssim[1] < 0.999  # it predicts other classes
    axs = plot_randomisation(dict(brightness=t, head=head))
    assert (
        len(axs) == 2
        and axs[0].lines[0].get_ydata().tolist() == t.rank_correlation.tolist()
        and axs[1].lines[1].get_xdata().tolist() == [0, 1]
    )


def test_border_responses_are_those_of_the_random_cnn():
    m, x = model(), torch.rand(4, 3, 16, 16)
    before = [m.get_buffer(f'border_{i}').clone() for i in range(2)]
    kept, measured = randomised(m, ['cnn.2.0'], 0), randomised(m, ['cnn.2.0'], 0, x)
    assert all(torch.equal(kept.get_buffer(f'border_{i}'), before[i]) for i in range(2))
    wanted = randomised(m, ['cnn.2.0'], 0)
    wanted.measure_border(x[:1])
    assert torch.equal(measured.get_buffer('border_1'), wanted.get_buffer('border_1'))
    assert not torch.allclose(measured.get_buffer('border_1'), before[1])
    t = model_randomisation(of_class_0, m, x, layers=['cnn.2.0'])
    assert t.ssim[1] == pytest.approx(ssim(of_class_0(m, x), of_class_0(wanted, x)).mean().item(), abs=1e-4)
    assert t.ssim[1] != pytest.approx(ssim(of_class_0(m, x), of_class_0(kept, x)).mean().item(), abs=1e-3)


def test_a_trained_model_depends_on_its_cnn(trained, scenes):
    "Randomising the CNN changes the trained maps more than randomising the weight network"
    x = scenes[0]
    cnn, weight_net = (model_randomisation(antehoc, trained, x, part) for part in ('cnn', 'weight_net'))
    assert cnn.ssim.iloc[-1] < weight_net.ssim.iloc[-1] < 1


@pytest.mark.parametrize(
    'run,says',
    [
        (lambda m, x: model_randomisation(antehoc, m, x[:0]), 'x holds no image: the test set is empty'),
        (lambda m, x: model_randomisation(antehoc, m, x, 'cn'), "part 'cn'"),
        (lambda m, x: model_randomisation(antehoc, m, x, layers=['cnn.7']), "layer 'cnn.7'"),
        (
            lambda m, x: model_randomisation(antehoc, m, x, layers=['cnn.1']),
            "layer 'cnn.1' is a MaxPool2d, which has no `reset_parameters`",
        ),
        (
            lambda m, x: model_randomisation(lambda m, x: x[:1, :1], m, x),
            'explain must give one map per image: 1 for 2 images',
        ),
        (
            lambda m, x: model_randomisation(lambda m, x: x, m, x),
            'map must have shape (B,1,H,W) or (B,H,W), not (2, 3, 16, 16)',
        ),
        (lambda m, x: model_randomisation(lambda m, x: x[:, :1] + 2, m, x), 'map must lie in [0,1] for ssim'),
        (
            lambda m, x: random_layers(torch.nn.ReLU()),
            "part='' of ReLU has no layer with parameters and `reset_parameters`",
        ),
        (lambda m, x: ssim(x[:, :1, :6], x[:, :1, :6]), 'ssim compares windows of 7x7 pixels; these maps have 6x16'),
        (
            lambda m, x: rank_correlation(x[:, :1], x[:1, :1]),
            'the two maps must have the same shape, not (2, 16, 16) and (1, 16, 16)',
        ),
    ],
)
def test_sanity_refuses(run, says):
    with pytest.raises(ValueError) as e:
        run(model(), torch.rand(2, 3, 16, 16))
    assert says in str(e.value)
