"""Noise of the right pixels, CD and CI by hand, and captum's own max-sensitivity."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from antehoc_nb.evaluate.faithfulness import faithfulness, faithfulness_table
from antehoc_nb.evaluate.robustness import max_sensitivity, noise_stability, salt_and_pepper, ssim

pytest.importorskip('skimage')
seeds = st.integers(0, 2**31 - 1)
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1)


def images(seed, b=4, n=12):
    "Normalised, from pixels strictly between black and white"
    p = 0.1 + 0.8 * torch.rand(b, 3, n, n, generator=torch.Generator().manual_seed(seed))
    return (p - MEAN) / STD


class Net(torch.nn.Sequential):
    def __init__(self):
        torch.manual_seed(1)
        super().__init__(
            torch.nn.Conv2d(3, 6, 3),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(24, 4),
        )


def redness(x):
    return (x * STD + MEAN)[:, :1].clamp(0, 1)


@given(seeds, st.floats(0, 1), st.booleans())
def test_salt_and_pepper_is_white_or_black_and_nothing_else(seed, amount, per_channel):
    x = images(seed % 1000)
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    noisy = salt_and_pepper(x, amount, seed, MEAN, STD.flatten().tolist(), per_channel)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == legacy).all()
    hit, pixels = noisy != x, noisy * STD + MEAN
    assert noisy.dtype == x.dtype and (((pixels - 1).abs() < 1e-5) | (pixels.abs() < 1e-5))[hit].all()
    if not per_channel:
        assert torch.equal(hit.any(1), hit.all(1))  # whole pixels
    if amount in (0, 1):
        assert hit.float().mean() == amount
    more = salt_and_pepper(x, amount + (1 - amount) / 2, seed, MEAN, STD, per_channel)
    assert torch.equal(more[hit], noisy[hit])  # more noise hits the same pixels and further ones


@pytest.mark.parametrize('per_channel', [False, True])
def test_the_share_of_the_noise(per_channel):
    x = images(0, 2, 100)
    for amount in (0.1, 0.5):
        noisy = salt_and_pepper(x, amount, 3, MEAN, STD, per_channel)
        hit, white = noisy != x, (noisy * STD + MEAN) > 0.5
        assert hit.float().mean().item() == pytest.approx(amount, abs=0.02)
        assert white[hit].float().mean().item() == pytest.approx(0.5, abs=0.04)
        assert hit.any(1).float().mean().item() == pytest.approx(
            1 - (1 - amount) ** 3 if per_channel else amount, abs=0.02
        )
        assert not torch.equal(hit[0], hit[1])  # a seed for every image


def test_the_noise_is_scikit_images():
    from skimage.util import random_noise

    x = images(0)
    want = [
        random_noise(
            (x * STD + MEAN)[i].double().numpy(), mode='s&p', amount=0.3, clip=True, rng=np.random.default_rng((7, i))
        )
        for i in range(4)
    ]
    got = salt_and_pepper(x, 0.3, 7, MEAN, STD, per_channel=True) * STD + MEAN
    assert np.allclose(got.numpy(), np.stack(want), atol=1e-5)


def test_an_image_keeps_its_noise_in_any_batch():
    x = images(0, 6)
    whole = salt_and_pepper(x, 0.4, 5)
    parts = torch.cat([salt_and_pepper(x[i : i + 2], 0.4, [(5, j) for j in range(i, i + 2)]) for i in range(0, 6, 2)])
    assert torch.equal(whole, parts) and not torch.equal(whole, salt_and_pepper(x, 0.4, 6))
    assert salt_and_pepper(x[:0], 0.4).shape == (0, 3, 12, 12)


@pytest.mark.parametrize('bs', [64, 3])
def test_cd_and_ci_are_their_definition(bs):
    net, x, y, kw = Net(), images(0, 10), torch.arange(10) % 4, dict(mean=MEAN, std=STD, areas=(0.2,), threshold=0.5)
    net.train()
    t = noise_stability(redness, net, x, y, (0.1, 0.5), seed=3, bs=bs, **kw)
    assert (
        net.training
        and list(t.index.names) == ['noise', 'kind']
        and t.index.get_level_values('noise').unique().tolist() == [0, 0.1, 0.5]
    )
    clean = faithfulness_table(faithfulness(net, x, redness(x), y, **kw))
    assert clean['drop'].notna().all() and (t.loc[0.0, ['CD', 'CI']] == 0).all(None) and (t.loc[0.0].ssim == 1).all()
    for a in (0.1, 0.5):
        noisy = salt_and_pepper(x, a, 3, MEAN, STD)
        want = faithfulness_table(faithfulness(net, noisy, redness(noisy), y, **kw))
        for k in want.index:
            r = t.loc[(a, k)]
            assert r['drop'] == pytest.approx(want['drop'][k], rel=1e-4) and r.inc == pytest.approx(
                want.inc[k], rel=1e-4, nan_ok=True
            )
            assert r.CD == pytest.approx(abs(want['drop'][k] - clean['drop'][k]), abs=1e-3)
            assert r.CI == pytest.approx(abs(want.inc[k] - clean.inc[k]), abs=1e-3, nan_ok=True)
            assert r.ssim == pytest.approx(ssim(redness(x), redness(noisy)).mean().item(), abs=1e-6)
    assert t.CD.max() > 0.01


@given(seeds, st.floats(0.01, 0.5), st.integers(1, 6))
def test_captum_agrees_on_max_sensitivity(seed, radius, n):
    "On the same steps; captum divides by 1 where the clean map is zero, we give nan"
    metrics = pytest.importorskip('captum.metrics')
    x, g = images(seed % 1000, 3), torch.Generator().manual_seed(seed)
    steps = torch.stack([(2 * torch.rand(x.shape, generator=g) - 1) * radius for _ in range(n)], 1).flatten(
        0, 1
    )  # n for each image in turn

    def explain(x):
        return x.abs().sum(1, keepdim=True).sqrt() + x[:, :1]

    def for_captum(x):
        return (explain(x[0]),) if isinstance(x, tuple) else explain(x)  # a tuple for a tuple, as its own methods

    want = metrics.sensitivity_max(for_captum, x, perturb_func=lambda x: x + steps, n_perturb_samples=n)
    got = max_sensitivity(explain, x, radius, n, seed)
    assert (
        torch.allclose(got, want, rtol=1e-4)
        and (got > 0).all()
        and torch.equal(got, max_sensitivity(explain, x, radius, n, seed, bs=2))
    )


def test_max_sensitivity_of_maps_that_do_not_move():
    x = images(0)
    state = torch.get_rng_state()
    assert max_sensitivity(lambda x: torch.ones_like(x[:, :1]), x).tolist() == [0] * 4
    assert max_sensitivity(lambda x: torch.zeros_like(x[:, :1]), x).isnan().all() and torch.equal(
        torch.get_rng_state(), state
    )


def test_without_scikit_image(monkeypatch):
    for k in [k for k in sys.modules if k.split('.')[0] == 'skimage']:
        monkeypatch.delitem(sys.modules, k)
    monkeypatch.setitem(sys.modules, 'skimage', None)
    for f in (lambda: salt_and_pepper(images(0), 0.1), lambda: ssim(torch.rand(1, 8, 8), torch.rand(1, 8, 8))):
        with pytest.raises(ImportError, match='pip install scikit-image'):
            f()


@pytest.mark.parametrize(
    'change,says',
    [
        (dict(x=images(0)[:0], target=0), 'x holds no image: the test set is empty'),
        (dict(amounts=(0.1, 1.5)), 'amount must lie in [0,1], got 1.5'),
        (dict(amounts=(math.nan,)), 'amount must lie in [0,1], got nan'),
        (dict(threshold=2), 'threshold must lie in (0,1], got 2'),
        (dict(target=[0, 1]), 'target must have one entry per image, (4,...), not (2,)'),
        (dict(explain=lambda x: x), 'map must have shape (B,1,H,W) or (B,H,W), not (4, 3, 12, 12)'),
        (dict(explain=lambda x: x[:1, :1]), 'explain must give maps (4,1,12,12), got (1, 1, 12, 12)'),
        (dict(explain=lambda x: x[:, :1] * math.nan), 'map holds NaN or infinity in 4 of 4 images'),
        (dict(explain=lambda x: redness(x) + 1), 'map must lie in [0,1]'),
        (dict(score=lambda model, x, target: model(x)[:, 0] * 100), 'must lie in [0,1]'),
    ],
)
def test_noise_stability_refuses(change, says):
    args = dict(explain=redness, model=Net(), x=images(0), target=0) | change
    with pytest.raises(ValueError) as e:
        noise_stability(**args)
    assert says in str(e.value)


@pytest.mark.parametrize(
    'change,says',
    [
        (dict(radius=0), 'radius must be above 0, got 0'),
        (dict(n=0), 'n must be at least 1, got 0'),
        (dict(x=images(0)[:0]), 'x holds no image'),
    ],
)
def test_max_sensitivity_refuses(change, says):
    with pytest.raises(ValueError) as e:
        max_sensitivity(**(dict(explain=redness, x=images(0)) | change))
    assert says in str(e.value)
