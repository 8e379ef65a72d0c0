"""Faithfulness: every score against its definition and against other libraries, and what it refuses."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antehoc_nb.core.masking import masked
from antehoc_nb.evaluate.faithfulness import (
    class_probability,
    drop_inc_win,
    equal_area_mask,
    faithfulness,
    faithfulness_table,
    insertion_deletion,
    map_area,
)
from antehoc_nb.evaluate.localisation import energy_in_region, pointing_game

probabilities = st.lists(st.tuples(*[st.floats(0, 1, allow_subnormal=False)] * 2), min_size=1, max_size=30)
seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(2, 12)


def maps(seed, h, w, b=3, levels=None):
    "Random maps (b,1,h,w) in [0,1]; few `levels` make many ties"
    m = torch.rand(b, 1, h, w, generator=torch.Generator().manual_seed(seed))
    return m if levels is None else (m * levels).floor() / levels


def images(seed, h, w, b=3):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed + 1))


def score(x):
    "A smooth function of every pixel by its own weight, in (0,1)"
    weight = torch.linspace(-1, 1, x[0].numel()).view(x.shape[1:])
    return (x * weight).sum((1, 2, 3)).sigmoid()


# --- Drop, Inc, Win


def naive_drop_inc_win(p_x, p_e):
    lose = [(a - b) / a for a, b in zip(p_x, p_e) if b < a]
    gain = [(b - a, a, b) for a, b in zip(p_x, p_e) if b > a]
    n = len(p_x)
    return dict(
        drop=100 * sum(lose) / len(lose) if lose else math.nan,
        inc=100 * sum(g / b for g, _, b in gain) / len(gain) if gain else math.nan,
        win=100 * len(gain) / n,
        average_drop=100 * sum(lose) / n,
        average_gain=100 * sum(g / (1 - a) for g, a, _ in gain) / n,
        increase_in_confidence=100 * len(gain) / n,
        n=n,
        n_drop=len(lose),
        n_inc=len(gain),
        share_drop=len(lose) / n,
        share_inc=len(gain) / n,
    )


@given(probabilities)
def test_drop_inc_win_is_its_definition(pairs):
    p_x, p_e = (np.array(p) for p in zip(*pairs))
    got, want = drop_inc_win(p_x, p_e), naive_drop_inc_win(*zip(*pairs))
    assert got.keys() == want.keys()
    for k in want:
        assert got[k] == pytest.approx(want[k], nan_ok=True, rel=1e-9, abs=1e-9), k


@given(probabilities, st.randoms(use_true_random=False))
def test_drop_inc_win_ranges_and_symmetry(pairs, rnd):
    def run(pairs, swap=False):
        p_x, p_e = (torch.tensor(p, dtype=torch.float64) for p in zip(*pairs))
        return drop_inc_win(p_e, p_x) if swap else drop_inc_win(p_x, p_e)

    r, swapped = run(pairs), run(pairs, swap=True)
    for k in ('drop', 'inc', 'win', 'average_drop', 'average_gain'):
        assert math.isnan(r[k]) or 0 <= r[k] <= 100 + 1e-9, k
    assert r['n_drop'] + r['n_inc'] <= r['n'] == len(pairs)
    assert math.isnan(r['drop']) == (r['n_drop'] == 0) and math.isnan(r['inc']) == (r['n_inc'] == 0)
    if r['n_drop']:
        assert r['average_drop'] == pytest.approx(r['drop'] * r['share_drop']) and r['drop'] > 0
    assert r['drop'] == pytest.approx(swapped['inc'], nan_ok=True)  # what one direction loses, the other gains
    assert r['n_drop'] == swapped['n_inc']
    shuffled = list(pairs)
    rnd.shuffle(shuffled)
    for k, v in run(shuffled).items():
        assert v == pytest.approx(r[k], nan_ok=True), k


def test_drop_inc_win_at_the_ends():
    assert drop_inc_win([0.0, 1.0], [0.0, 1.0])['average_drop'] == 0  # 0/0 in no mean
    r = drop_inc_win([0.0, 1.0], [1.0, 0.0])
    assert (r['drop'], r['inc'], r['average_gain']) == (100, 100, 50)
    assert drop_inc_win([1 + 5e-7], [1.0])['n_drop'] == 0  # a rounding error above 1 is 1


@pytest.mark.parametrize(
    'p_x,p_e,says',
    [
        ([0.5, 1.5], [0.5, 0.5], 'p_x must lie in [0,1]; 1 of 2 values do not'),
        ([0.5, 0.5], [-0.1, math.nan], 'p_e must lie in [0,1]; 2 of 2 values do not'),
        ([], [], 'p_x must hold one probability per image, (N,) with N > 0, not (0,)'),
        ([[0.5]], [[0.5]], 'p_x must hold one probability per image, (N,) with N > 0, not (1, 1)'),
        ([0.5], [0.5, 0.5], 'p_x and p_e must be of the same images: 1 and 2 values'),
    ],
)
def test_drop_inc_win_refuses(p_x, p_e, says):
    with pytest.raises(ValueError) as e:
        drop_inc_win(p_x, p_e)
    assert says in str(e.value)


# --- faithfulness


@given(seeds, sizes, st.floats(0.01, 1), st.sampled_from(['black', 'mean', 'blur', 0.3]), st.integers(1, 4))
def test_faithfulness_is_its_definition(seed, n, threshold, fill, bs):
    "One image and one mask at a time, in pixel space"
    n += 4
    net, m, y = Net().eval(), maps(seed, n, n), torch.tensor([0, 3, 1])
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])

    def shape(v):
        return v.view(1, -1, 1, 1)

    x = (images(seed, n, n) - shape(mean)) / shape(std)
    r = faithfulness(
        net, x, m, y, threshold=threshold, areas=(0.1, 0.5), fill=fill, mean=mean, std=tuple(std.tolist()), bs=bs
    )
    assert list(r) == ['p_x'] + [
        k for kind in ('energy', 'binarised', 'top 10%', 'top 50%') for k in (kind, f'{kind} area')
    ]
    for i in range(3):
        xi, mi = x[i : i + 1], m[i : i + 1]
        masks = {
            'energy': mi,
            'binarised': (mi >= threshold).float(),
            'top 10%': equal_area_mask(mi, 0.1),
            'top 50%': equal_area_mask(mi, 0.5),
        }
        with torch.no_grad():
            assert r['p_x'][i].item() == pytest.approx(net(xi).softmax(1)[0, y[i]].item(), abs=1e-6)
            for k, mk in masks.items():
                p = net(masked(xi, mk, fill, shape(mean), shape(std))).softmax(1)[0, y[i]]
                assert r[k][i].item() == pytest.approx(p.item(), abs=1e-5), k
                assert r[f'{k} area'][i].item() == pytest.approx(mk.mean().item(), abs=1e-6), k


@settings(max_examples=8)
@given(seeds, st.floats(0.01, 1))
def test_a_map_of_ones_neither_drops_nor_wins(seed, threshold):
    "Also where the fill and the normalisation would round: kept pixels are the image's own, to the bit"
    x = images(seed, 8, 8, 5) * 3 - 1.3
    r = faithfulness(
        Net(),
        x,
        torch.ones(5, 1, 8, 8),
        1,
        threshold=threshold,
        areas=(1.0,),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        bs=2,
    )
    t = faithfulness_table(r)
    assert (t.win == 0).all() and (t.average_drop == 0).all() and t['drop'].isna().all() and (t.area == 1).all()
    m = maps(seed, 8, 8, 5)
    kept = faithfulness(Net(), x, m, 1, threshold=threshold, areas=(), mean=0.5, std=0.2)['binarised area']
    assert torch.allclose(kept, (m >= threshold).float().mean((1, 2, 3)))


def test_faithfulness_runs_the_model_once_per_kind_and_leaves_it_alone():
    net, calls = Net().train(), []
    net[1].eval()

    def s(model, x, target):
        calls.append((len(x), model.training, torch.is_grad_enabled()))
        return class_probability(model, x, target)

    r = faithfulness(
        net, images(0, 8, 8, 5).requires_grad_(), maps(0, 8, 8, 5), [0, 1, 2, 3, 0], score=s, areas=(0.2,), bs=4
    )
    assert calls == [(4, False, False)] * 4 + [(1, False, False)] * 4
    assert [m.training for m in net] == [True, False, True, True, True, True] and not any(
        v.requires_grad for v in r.values()
    )

    def fails(*a):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        faithfulness(net, images(0, 8, 8), maps(0, 8, 8), 0, score=fails)
    assert net.training and not net[1].training


def test_the_table_is_drop_inc_win_by_kind():
    r = dict(
        p_x=torch.tensor([0.8, 0.5, 0.4, 0.2, 0.9]),
        energy=torch.tensor([0.6, 0.125, 0.5, 0.5, 0.9]),
        binarised=torch.zeros(5),
    )
    r |= {'energy area': torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), 'binarised area': torch.zeros(5)}
    t = faithfulness_table(r)
    assert (
        t.columns.tolist()
        == 'drop inc win average_drop average_gain increase_in_confidence share_drop share_inc n area'.split()
    )
    assert t.index.tolist() == ['energy', 'binarised'] and t.index.name == 'kind'
    assert t.loc['energy'].tolist() == pytest.approx(
        [50, 40, 40, 20, 100 * (1 / 6 + 0.375) / 5, 40, 0.4, 0.4, 5, 0.3], rel=1e-5
    )
    assert t.loc['binarised', ['drop', 'win', 'average_drop', 'area']].tolist() == [100, 0, 100, 0] and math.isnan(
        t.loc['binarised', 'inc']
    )


def test_other_tasks_bring_their_own_targets():
    "Token sequences for captioning, none for a score that needs none"
    x, m, tokens = images(0, 8, 8, 5), maps(0, 8, 8, 5), torch.arange(20).view(5, 4)

    def s(model, x, target):
        assert target.shape == (len(x), 4)
        return x.mean((1, 2, 3)) * 0 + target[:, 0] / 20

    assert faithfulness(None, x, m, tokens, score=s, bs=2)['energy'].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    none = faithfulness(
        None, x, m, None, score=lambda model, x, target: x.mean((1, 2, 3)) if target is None else 1 / 0, bs=2
    )
    assert torch.allclose(none['energy'], (x * m).mean((1, 2, 3)))


@pytest.mark.parametrize(
    'change,says',
    [
        (dict(x=torch.rand(0, 3, 8, 8), map=torch.rand(0, 1, 8, 8)), 'x holds no image: the test set is empty'),
        (dict(x=torch.rand(3, 8, 8)), 'x must have shape (B,C,H,W), not (3, 8, 8)'),
        (
            dict(x=torch.ones(3, 3, 8, 8, dtype=torch.uint8)),
            'x must be floating point, normalised as the model expects, not torch.uint8',
        ),
        (dict(map=torch.rand(2, 1, 8, 8)), 'map and x do not fit: maps (2, 8, 8) for images (3, 3, 8, 8)'),
        (dict(map=torch.rand(3, 3, 8, 8)), 'map must have shape (B,1,H,W) or (B,H,W), not (3, 3, 8, 8)'),
        (dict(map=torch.rand(3, 8, 8) + 1), 'map must lie in [0,1], got 1'),
        (dict(map=torch.full((3, 8, 8), math.nan)), 'map holds NaN or infinity in 3 of 3 images'),
        (dict(threshold=0), 'threshold must lie in (0,1], got 0'),
        (dict(threshold=1.1), 'threshold must lie in (0,1], got 1.1'),
        (dict(threshold=math.nan), 'threshold must lie in (0,1], got nan'),
        (dict(areas=(0.2, 1.2)), 'share must lie in (0,1], got 1.2'),
        (dict(bs=0), 'bs must be at least 1, got 0'),
        (dict(target=[0, 1]), 'target must have one entry per image, (3,...), not (2,)'),
        (dict(target=4), "target must lie in 0..3 for this model's 4 classes, got 4"),
        (dict(fill='white'), 'fill'),
        (dict(score=lambda model, x, target: model(x)), 'score must give one number per image, (3,), got (3, 4)'),
        (
            dict(score=lambda model, x, target: x.mean((1, 2, 3)) * math.nan),
            'score gave NaN or infinity for 3 of 3 images (p_x)',
        ),
    ],
)
def test_faithfulness_refuses(change, says):
    args = dict(model=Net(), x=torch.rand(3, 3, 8, 8), map=torch.rand(3, 1, 8, 8), target=0) | change
    with pytest.raises(ValueError) as e:
        faithfulness(**args)
    assert says in str(e.value)


def test_a_score_without_0_and_1_has_no_drop():
    r = faithfulness(Net(), images(0, 8, 8), maps(0, 8, 8), None, score=lambda model, x, target: x.sum((1, 2, 3)))
    with pytest.raises(
        ValueError,
        match=r'p_x must lie in \[0,1\]; 3 of 3 values do not. Are these logits.*a regression. Score its closeness',
    ):
        faithfulness_table(r)


# --- the same numbers from other libraries


class Wide(torch.nn.Sequential):
    "A CNN whose probabilities differ from image to image, with a layer for CAMs"

    def __init__(self):
        torch.manual_seed(1)
        super().__init__(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 8, 3, 2, padding=1),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(32, 4),
        )
        for p in self.parameters():
            p.data.mul_(2.0)


def torchcam_case():
    "Twelve images and torchcam's maps, resized as its metrics do; they use gradients of the softmax, not the logits"
    methods = pytest.importorskip('torchcam.methods')
    net, x = Wide().eval(), torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12) % 4
    cam = methods.GradCAM(net, '2')
    maps = cam.fuse_cams(cam(y.tolist(), net(x).softmax(1)))
    maps = torch.nn.functional.interpolate(maps[:, None], x.shape[2:], mode='bilinear', align_corners=False)
    return net, x, y, cam, maps.detach().clamp(0, 1)


def test_torchcam_agrees_on_probabilities_and_only_there():
    """torchcam masks in the normalised space (0 stays 0, so no mean and std here) and adds 1e-7 to p_x.

    Unless it is given a softmax as `logits_fn`, it works on raw logits, which gives another number."""
    from torchcam.metrics import ClassificationMetric

    net, x, y, cam, m = torchcam_case()
    metric, raw = ClassificationMetric(cam, partial(torch.softmax, dim=-1)), ClassificationMetric(cam)
    for o in (metric, raw):
        o.update(x, y.tolist())
    t = faithfulness_table(faithfulness(net, x, m, y)).loc['energy']
    assert 100 * metric.summary()['avg_drop'] == pytest.approx(t.average_drop, rel=1e-4) and t.average_drop > 1
    assert 100 * metric.summary()['conf_increase'] == pytest.approx(t.increase_in_confidence) and 0 < t.win < 100
    assert 100 * raw.summary()['avg_drop'] != pytest.approx(t.average_drop, rel=0.05)


def test_torchcam_agrees_on_insertion_and_deletion():
    "Where the steps divide the pixels; it rounds the step up otherwise, and we the number of pixels"
    from torchcam.metrics import DeletionInsertionMetric

    net, x, y, cam, m = torchcam_case()
    metric = DeletionInsertionMetric(cam, partial(torch.softmax, dim=-1), steps=16)
    metric.update(x, y.tolist())
    r = insertion_deletion(partial(class_probability, net), x, m, 16, baseline=0.0, target=y)
    assert metric.summary()['insertion_auc'] == pytest.approx(r['insertion'].mean().item(), abs=1e-5)
    assert metric.summary()['deletion_auc'] == pytest.approx(r['deletion'].mean().item(), abs=1e-5)


def test_grad_cam_library_gives_differences_instead_of_shares():
    "Its drop is p_x - p_e where positive, not divided by p_x, per image; its increase is the same count"
    lib = pytest.importorskip('pytorch_grad_cam.metrics.cam_mult_image')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    net, x, y, _, m = torchcam_case()
    args = x, m[:, 0].numpy(), [ClassifierOutputSoftmaxTarget(c) for c in y.tolist()], net
    r = faithfulness(net, x, m, y)
    t = faithfulness_table(r).loc['energy']
    assert lib.CamMultImageConfidenceChange()(*args) == pytest.approx((r['energy'] - r['p_x']).numpy(), abs=1e-6)
    drop = lib.DropInConfidence()(*args)
    assert 100 * (drop / r['p_x'].numpy()).mean() == pytest.approx(t.average_drop, rel=1e-4)
    assert 100 * drop.mean() != pytest.approx(t.average_drop, rel=0.05)
    assert 100 * lib.IncreaseInConfidence()(*args).mean() == pytest.approx(t.increase_in_confidence)


# --- area


@given(seeds, sizes, sizes, st.floats(0.001, 1), st.sampled_from([None, 1, 3]))
def test_equal_area_is_exact_and_keeps_the_highest(seed, h, w, share, levels):
    m, k = maps(seed, h, w, levels=levels), round(share * h * w)
    if k == 0:
        with pytest.raises(ValueError, match='is less than one pixel'):
            equal_area_mask(m, share)
        return
    mask = equal_area_mask(m, share)
    assert mask.shape == m.shape and set(mask.unique().tolist()) <= {0.0, 1.0}
    for mi, ki in zip(m.flatten(1).tolist(), mask.flatten(1).bool().tolist()):
        best = sorted(range(h * w), key=lambda i: (-mi[i], i))[:k]  # ties in reading order
        assert sorted(best) == [i for i, keep in enumerate(ki) if keep]
    assert torch.equal(map_area(mask), torch.full((3,), k / (h * w)))


@given(seeds, sizes, st.sampled_from([None, 4]))
def test_only_the_order_of_the_pixels_counts(seed, n, levels):
    m, x = maps(seed, n, n, levels=levels or 64), images(seed, n, n)
    base = dict(steps=min(5, n * n), baseline=0.0)
    r = insertion_deletion(score, x, m, **base)
    for f in (lambda m: 4 * m - 2, lambda m: m.double().exp(), lambda m: (m + 1) ** 3):
        assert torch.equal(equal_area_mask(f(m), 0.3).bool(), equal_area_mask(m, 0.3).bool())
        s = insertion_deletion(score, x, f(m), **base)
        assert all(torch.equal(r[k], s[k]) for k in r)


@given(seeds, sizes, sizes)
def test_map_area_is_the_mean(seed, h, w):
    m = maps(seed, h, w)
    assert torch.allclose(map_area(m), torch.stack([i.mean() for i in m])) and torch.equal(
        map_area(m), map_area(m[:, 0])
    )
    assert torch.allclose(map_area(m > 0.5), (m > 0.5).float().mean((1, 2, 3)))
    assert torch.allclose(map_area(1 - m), 1 - map_area(m), atol=1e-6)


@pytest.mark.parametrize('share', [0, -0.1, 1.01, math.nan])
def test_share_outside_its_range(share):
    with pytest.raises(ValueError) as e:
        equal_area_mask(torch.rand(1, 1, 4, 4), share)
    assert f'share must lie in (0,1], got {share}' in str(e.value)


def with_nan(b=3):
    m = torch.rand(b, 1, 4, 4)
    m[1, 0, 2, 2] = math.nan
    return m


@pytest.mark.parametrize(
    'use',
    [
        map_area,
        partial(equal_area_mask, share=0.5),
        partial(pointing_game, region=[[0, 0, 2, 2]] * 3),
        partial(energy_in_region, region=[[0, 0, 2, 2]] * 3),
        lambda m: insertion_deletion(score, torch.rand(3, 3, 4, 4), m, 4, baseline=0.0),
    ],
)
def test_every_metric_refuses_a_bad_map(use):
    for bad, says in (
        (with_nan(), 'map holds NaN or infinity in 1 of 3 images'),
        (torch.rand(3, 2, 4, 4), '(B,1,H,W) or (B,H,W), not (3, 2, 4, 4)'),
        (torch.rand(4, 4), '(B,1,H,W) or (B,H,W), not (4, 4)'),
        (torch.rand(0, 1, 4, 4), 'map is empty: shape (0, 4, 4)'),
    ):
        with pytest.raises(ValueError) as e:
            use(bad)
        assert says in str(e.value)
    with pytest.raises(TypeError, match='map must be a tensor or numbers, not str'):
        use('map.png')


# --- insertion and deletion


def naive_curves(score, x, m, steps, baseline):
    out = []
    for xi, mi, bi in zip(x, m[:, 0], baseline.expand(x.shape)):
        w, flat = mi.shape[1], mi.flatten().tolist()
        order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
        both = []
        for start, end in ((bi, xi), (xi, bi)):
            curve = []
            for k in range(steps + 1):
                img = start.clone()
                for i in order[: round(k * len(flat) / steps)]:
                    img[:, i // w, i % w] = end[:, i // w, i % w]
                curve.append(score(img[None]).item())
            both.append(curve)
        out.append(both)
    return torch.tensor(out).unbind(1)


@given(
    seeds,
    st.integers(2, 6),
    st.integers(2, 6),
    st.integers(1, 9),
    st.sampled_from([None, 2]),
    st.sampled_from([None, 1, 4, 100]),
)
def test_insertion_deletion_is_its_definition(seed, h, w, steps, levels, bs):
    m, x, steps = maps(seed, h, w, levels=levels), images(seed, h, w), min(steps, h * w)
    baseline = torch.rand(1, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    r = insertion_deletion(score, x, m, steps, baseline=baseline, bs=bs)
    ins, dele = naive_curves(score, x, m, steps, baseline)
    shares = torch.tensor([round(k * h * w / steps) / (h * w) for k in range(steps + 1)])
    assert torch.allclose(r['shares'], shares) and torch.allclose(r['insertion_curve'], ins, atol=1e-5)
    assert torch.allclose(r['deletion_curve'], dele, atol=1e-5)
    for k, c in (('insertion', ins), ('deletion', dele)):
        auc = ((c[:, 1:] + c[:, :-1]) / 2 * (shares[1:] - shares[:-1])).sum(1)
        assert torch.allclose(r[k], auc, atol=1e-5) and ((0 <= r[k]) & (r[k] <= 1)).all()


@given(seeds, st.integers(2, 8))
def test_insertion_deletion_symmetries(seed, n):
    "Another order of the batch; the map turned round; image and baseline exchanged"
    m, x = maps(seed, n, n), images(seed, n, n)
    m = m.flatten(1).argsort(1).argsort(1).float().view_as(m)  # no ties
    black = torch.zeros_like(x)
    r = insertion_deletion(score, x, m, n, baseline=black)
    p = torch.tensor([2, 0, 1])
    s = insertion_deletion(score, x[p], m[p], n, baseline=black[p])
    assert all(torch.allclose(s[k], r[k][p], atol=1e-6) for k in ('insertion', 'deletion'))
    turned = insertion_deletion(score, x, -m, n, baseline=black)
    assert torch.allclose(turned['insertion_curve'], r['deletion_curve'].flip(1), atol=1e-6)
    exchanged = insertion_deletion(score, black, m, n, baseline=x)
    assert torch.allclose(exchanged['insertion_curve'], r['deletion_curve'], atol=1e-6)


class Net(torch.nn.Sequential):
    def __init__(self, k=4):
        super().__init__(
            torch.nn.Conv2d(3, 8, 3),
            torch.nn.BatchNorm2d(8),
            torch.nn.Dropout(0.5),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(8, k),
        )


def test_targets_stay_with_their_images():
    net, x, m, y = Net(), images(0, 8, 8, 5), maps(0, 8, 8, 5), torch.tensor([0, 3, 1, 1, 2])
    whole = insertion_deletion(lambda x: class_probability(net, x, y), x, m, 8, baseline=0.0)
    for bs in (None, 1, 3, 64):
        r = insertion_deletion(partial(class_probability, net), x, m, 8, baseline=0.0, target=y, bs=bs)
        assert torch.allclose(r['insertion_curve'], whole['insertion_curve'], atol=1e-6)
    one = insertion_deletion(partial(class_probability, net), x[1:2], m[1:2], 8, baseline=0.0, target=y[1:2], bs=64)
    assert torch.allclose(one['deletion'], whole['deletion'][1:2], atol=1e-6)
    assert torch.allclose(whole['insertion_curve'][:, -1], class_probability(net, x, y), atol=1e-6)
    for bs in (2, 10):
        with pytest.raises(ValueError, match=rf'target has shape \(5,\) for {bs} images'):
            insertion_deletion(lambda x: class_probability(net, x, y), x, m, 8, baseline=0.0, bs=bs)


def test_insertion_deletion_calls_and_memory():
    "2 x steps batches, none larger than `bs`, without a graph"
    calls, net = [], Net()

    def s(x):
        calls.append(len(x))
        return net(x).softmax(1)[:, 0]

    r = insertion_deletion(s, images(0, 8, 8).requires_grad_(), maps(0, 8, 8), 10, baseline=0.0)
    assert calls == [3] * 20 and not r['insertion'].requires_grad
    calls.clear()
    insertion_deletion(s, images(0, 8, 8), maps(0, 8, 8), 10, baseline=0.0, bs=16)
    assert sum(calls) == 60 and max(calls) == 16


@pytest.mark.parametrize(
    'change,says',
    [
        (dict(x=torch.rand(3, 8, 8)), 'x must have shape (B,C,H,W), not (3, 8, 8)'),
        (dict(map=torch.rand(2, 1, 8, 8)), 'map and x do not fit: maps (2, 8, 8) for images (3, 3, 8, 8)'),
        (dict(steps=65), 'steps must lie in 1..64 for 8x8 pixels, got 65'),
        (dict(bs=0), 'bs must be at least 1, got 0'),
        (dict(baseline=torch.zeros(3, 3, 4, 4)), 'baseline must broadcast to x: (3, 3, 4, 4) for images (3, 3, 8, 8)'),
        (dict(target=[1, 2]), 'target must have one entry per image, (3,...), not (2,)'),
        (dict(score=lambda x: x.mean((2, 3))), 'score must give one number per image, (3,), got (3, 3)'),
    ],
)
def test_insertion_deletion_refuses(change, says):
    args = dict(score=score, x=torch.rand(3, 3, 8, 8), map=torch.rand(3, 1, 8, 8), baseline=0.0) | change
    with pytest.raises(ValueError) as e:
        insertion_deletion(**args)
    assert says in str(e.value)


# --- the probability


def test_class_probability_leaves_the_model_alone():
    net, x = Net().train(), images(0, 8, 8)
    net[1].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    rng = torch.get_rng_state()
    p = class_probability(net, x, 1)
    assert torch.equal(p, class_probability(net, x, torch.ones(3, dtype=torch.uint8)))  # dropout is off
    assert [m.training for m in net] == [True, False, True, True, True, True] and not p.requires_grad
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and torch.equal(
        rng, torch.get_rng_state()
    )
    with pytest.raises(RuntimeError):
        class_probability(net, x[:, :1], 1)
    assert net.training and net[2].training and not net[1].training


def test_class_probability_takes_fastai_tensors():
    from fastai.torch_core import TensorCategory, TensorImage

    net, x, y = Net().eval(), images(0, 8, 8), torch.tensor([0, 1, 2])
    p = class_probability(net, TensorImage(x), TensorCategory(y))
    assert type(p) is torch.Tensor and torch.equal(p, net(x).softmax(1).gather(1, y[:, None])[:, 0])
    score = partial(class_probability, net)
    r = insertion_deletion(score, TensorImage(x), TensorImage(maps(0, 8, 8)), 4, baseline=0.0, target=TensorCategory(y))
    assert all(type(v) is torch.Tensor for v in r.values())


@pytest.mark.parametrize(
    'target,error,says',
    [
        (4, ValueError, "target must lie in 0..3 for this model's 4 classes, got 4"),
        ([0, -1, 5], ValueError, "target must lie in 0..3 for this model's 4 classes, got -1"),
        ([0, 1], ValueError, 'target has shape (2,) for 3 images; it must be (3,)'),
        ([0.5, 0.5, 0.5], TypeError, 'target must hold class numbers (integers), not torch.float32'),
    ],
)
def test_class_probability_refuses(target, error, says):
    with pytest.raises(error) as e:
        class_probability(Net(), images(0, 8, 8), target)
    assert says in str(e.value)


def test_a_regression_has_no_class_probability():
    with pytest.raises(ValueError, match='one output: its softmax is always 1; pass your own score'):
        class_probability(Net(1), images(0, 8, 8), 0)
    with pytest.raises(ValueError, match='logits .B,K., got tuple; pass your own score'):
        class_probability(lambda x: (x, x), images(0, 8, 8), 0)
