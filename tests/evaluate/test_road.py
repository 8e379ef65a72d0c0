"""ROAD against its definition, one unknown at a time, and against pytorch-grad-cam."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from antehoc_nb.evaluate.road import linear_imputation, road_scores

seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(2, 9)
WEIGHTS = {(dr, dc): 1 / 6 if 0 in (dr, dc) else 1 / 12 for dr in (-1, 0, 1) for dc in (-1, 0, 1) if dr or dc}


def case(seed, h, w, share, b=2, c=3):
    "Images and masks that remove about `share` of the pixels, never all"
    g = torch.Generator().manual_seed(seed)
    x, gone = torch.randn(b, c, h, w, generator=g), torch.rand(b, h, w, generator=g) < share
    gone[:, 0, 0] = False
    return x, gone


def naive(img, gone):
    "A dense system, pixel by pixel"
    h, w = gone.shape
    A, b = np.zeros((h * w, h * w)), np.zeros((h * w, len(img)))
    for r in range(h):
        for c in range(w):
            i = r * w + c
            A[i, i] = 1
            if not gone[r, c]:
                b[i] = img[:, r, c]
                continue
            near = {(r + dr, c + dc): v for (dr, dc), v in WEIGHTS.items() if 0 <= r + dr < h and 0 <= c + dc < w}
            for (rr, cc), v in near.items():
                A[i, rr * w + cc] = -v / sum(near.values())
    return np.linalg.solve(A, b).T.reshape(img.shape)


@given(seeds, sizes, sizes, st.floats(0, 1), st.integers(1, 4))
def test_imputation_is_its_definition(seed, h, w, share, c):
    x, gone = case(seed, h, w, share, c=c)
    got = linear_imputation(x, gone, noise=0)
    for g, xi, m in zip(got, x, gone):
        assert np.allclose(g.numpy(), naive(xi.double().numpy(), m.numpy()), atol=1e-5)
    assert torch.equal(got, linear_imputation(x, gone[:, None], noise=0)) and got.dtype == x.dtype
    # never outside what the image holds, and affine in the image
    assert (got.amax((2, 3)) <= x.amax((2, 3)) + 1e-5).all() and (got.amin((2, 3)) >= x.amin((2, 3)) - 1e-5).all()
    assert torch.allclose(linear_imputation(2 * x - 1, gone, noise=0), 2 * got - 1, atol=1e-5)


@given(seeds, sizes, sizes, st.floats(0.05, 0.95))
def test_imputation_of_the_grad_cam_library(seed, h, w, share):
    lib = pytest.importorskip('pytorch_grad_cam.metrics.road')
    x, gone = case(seed, h, w, share, b=1)
    if not gone.sum() > 1:
        return  # its solver wants two unknowns
    want = lib.NoisyLinearImputer(noise=0)(x[0], (~gone[0]).float())
    assert torch.allclose(linear_imputation(x, gone, noise=0)[0], want, atol=1e-5)


def test_noise_is_seeded_sized_and_only_where_something_was_removed():
    x, gone = case(0, 40, 40, 0.5)
    state = torch.get_rng_state()
    clean, a, b = (
        linear_imputation(x, gone, 0),
        linear_imputation(x, gone, 0.05, seed=3),
        linear_imputation(x, gone, 0.05, seed=4),
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, linear_imputation(x, gone, 0.05, seed=3)) and not torch.equal(a, b)
    where = gone[:, None].expand_as(x)
    assert torch.equal(a[~where], x[~where]) and (a - clean)[where].std().item() == pytest.approx(0.05, rel=0.05)


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


def test_road_of_the_grad_cam_library(monkeypatch):
    """Without ties and noise: its curves are ours, share by share, and its combined number is half of ours.

    It cuts at a percentile of the map, we at a number of pixels: the same sets for shares that fit the pixels."""
    lib = pytest.importorskip('pytorch_grad_cam.metrics.road')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    monkeypatch.setattr(lib.NoisyLinearImputer.__init__, '__defaults__', (0.0, lib.neighbors_weights))  # no noise
    net, x = Net().eval(), torch.randn(5, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    m = (
        torch.stack([torch.randperm(100, generator=g).view(1, 10, 10) / 100 for _ in range(5)]) + 0.005
    )  # every value once
    y = torch.tensor([0, 1, 2, 3, 0])
    args = x, m[:, 0].numpy(), [ClassifierOutputSoftmaxTarget(c) for c in y.tolist()], net
    shares = (0.2, 0.4, 0.6, 0.8)
    r = road_scores(lambda x, t: net(x).softmax(1).gather(1, t[:, None])[:, 0], x, m, shares, target=y, noise=0)
    for k, s in enumerate(shares):
        p = round(100 * (1 - s))  # it names the share that stays
        for name, theirs in (('most', lib.ROADMostRelevantFirst(p)), ('least', lib.ROADLeastRelevantFirst(p))):
            assert theirs(*args, return_diff=False) == pytest.approx(r[f'{name}_curve'][:, k].numpy(), abs=1e-5), (
                name,
                s,
            )
    combined = lib.ROADCombined([80, 60, 40, 20])(*args)
    assert 2 * combined == pytest.approx(r['combined'].numpy(), abs=1e-5) and np.abs(combined).max() > 1e-3


@given(seeds, st.integers(3, 8), st.sampled_from([None, 1, 3]))
def test_the_order_of_removal(seed, n, levels):
    "Exactly the given number, the highest or the lowest, nested from share to share; both orders are scored"
    g = torch.Generator().manual_seed(seed)
    m = torch.rand(2, 1, n, n, generator=g)
    if levels:
        m = (m * levels).floor() / levels
    seen = []

    def score(x):
        seen.append(x)
        return x.mean((1, 2, 3))

    x = torch.rand(2, 3, n, n, generator=g) + 1e-3 * torch.arange(n * n).view(n, n)
    road_scores(score, x, m, (0.3, 0.6), noise=0.5)
    for order, high in ((seen[:2], True), (seen[2:], False)):
        before = None
        for s, xk in zip((0.3, 0.6), order):
            gone = (xk != x).any(1)
            assert gone.flatten(1).sum(1).tolist() == [round(s * n * n)] * 2
            for gi, mi in zip(gone, m[:, 0]):
                assert (mi[gi].min() >= mi[~gi].max()) if high else (mi[gi].max() <= mi[~gi].min())
            if before is not None:
                assert (before <= gone).all()
            before = gone


def test_targets_and_batches():
    net, x, m = Net().eval(), torch.randn(5, 3, 8, 8), torch.rand(5, 8, 8)
    y = torch.tensor([0, 1, 2, 3, 0])
    sizes = []

    def score(x, t):
        assert not torch.is_grad_enabled()
        sizes.append(len(x))
        return net(x).softmax(1).gather(1, t[:, None])[:, 0]

    whole, parts = road_scores(score, x, m, target=y), road_scores(score, x, m, target=y, bs=2)
    assert sizes == [5] * 8 + [2, 2, 1] * 8
    for k in whole:
        assert torch.allclose(whole[k], parts[k], atol=1e-6)
    assert whole['most_curve'].shape == (5, 4) and torch.allclose(
        whole['combined'], whole['least'] - whole['most'], atol=1e-6
    )


@pytest.mark.parametrize(
    'change,says',
    [
        (dict(x=torch.rand(0, 3, 8, 8), map=torch.rand(0, 1, 8, 8)), 'x holds no image: the test set is empty'),
        (dict(map=torch.rand(2, 1, 8, 8)), 'map and x do not fit: maps (2, 8, 8) for images (3, 3, 8, 8)'),
        (dict(shares=()), 'shares is empty'),
        (dict(shares=(0.5, 1.0)), 'shares must lie in (0,1), got 1.0'),
        (dict(shares=(0,)), 'shares must lie in (0,1), got 0'),
        (dict(shares=(0.001,)), 'share 0.001 of 8x8 pixels removes none or all of them'),
        (dict(shares=(0.999,)), 'share 0.999 of 8x8 pixels removes none or all of them'),
        (dict(noise=-1.0), 'noise must be 0 or more, got -1.0'),
        (dict(bs=0), 'bs must be at least 1, got 0'),
        (dict(target=[1, 2]), 'target must have one entry per image, (3,...), not (2,)'),
        (dict(score=lambda x: x.mean((2, 3))), 'score must give one number per image, (3,), got (3, 3)'),
        (dict(score=lambda x: x.mean((1, 2, 3)) * float('nan')), 'score gave NaN or infinity for 3 of 3 images'),
    ],
)
def test_road_refuses(change, says):
    args = dict(score=lambda x: x.mean((1, 2, 3)), x=torch.rand(3, 3, 8, 8), map=torch.rand(3, 1, 8, 8)) | change
    with pytest.raises(ValueError) as e:
        road_scores(**args)
    assert says in str(e.value)
