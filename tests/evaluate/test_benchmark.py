"""The benchmark against plain loops, interrupted and resumed, and what it refuses."""

import gc
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from antehoc_nb.core.masking import masked
from antehoc_nb.evaluate import benchmark as module
from antehoc_nb.evaluate.benchmark import Task, benchmark, benchmark_metrics, test_images
from antehoc_nb.evaluate.faithfulness import class_probability, drop_inc_win, equal_area_mask, insertion_deletion
from antehoc_nb.evaluate.localisation import Mosaics
from antehoc_nb.evaluate.scoreboard import KEY, Benchmark, pool, summarise

test_images.__test__ = False  # a function of the library


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    ).eval()


def loader(n=24, bs=8, classes=3):
    "Images in [0,1] sorted by class"
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(n, 3, 16, 16, generator=g), torch.arange(n) * classes // n
    dl = DataLoader(list(zip(x, y)), bs=bs)
    dl.vocab = list('abc')
    return dl


def left(model, x, target):
    return torch.linspace(1, 0, x.shape[3]).expand(len(x), 1, *x.shape[2:])


def ours(model, x, target):
    return ((x - x.amin((1, 2, 3), keepdim=True)) / 2).mean(1, keepdim=True)


def loud(model, x, target):
    return left(model, x, target) + 1


def row(df, *key):
    return df.set_index(KEY).loc[key]


def test_the_numbers_are_those_of_plain_loops():
    cnn, evaluator, dl = net(), net(1), loader()
    metrics = 'faithfulness', 'insertion_deletion'
    settings = dict(bs=5, steps=4, areas=(0.1, 0.5), threshold=0.4, resamples=20)
    b = benchmark(cnn, dl, dict(left=left, ours=ours), metrics, evaluator=evaluator, **settings)
    x, y, positions = test_images(dl)
    assert positions == list(range(24))
    for name, f in dict(left=left, ours=ours).items():
        m = f(None, x, y)
        for scorer, model in dict(cnn=cnn, evaluator=evaluator).items():
            p = class_probability(model, x, y)
            masks = {'energy': m, 'binarised': (m >= 0.4).float()}
            masks |= {'top 10%': equal_area_mask(m, 0.1), 'top 50%': equal_area_mask(m, 0.5)}
            for kind, mask in masks.items():
                for k, v in drop_inc_win(p, class_probability(model, masked(x, mask), y)).items():
                    if k in ('drop', 'inc', 'win', 'average_drop', 'average_gain', 'share_drop', 'share_inc'):
                        where = f'{name} {scorer} {kind} {k}'
                        got = row(b.df, name, scorer, kind, k).value
                        np.testing.assert_allclose(got, v, rtol=1e-4, atol=1e-4, err_msg=where)
                np.testing.assert_allclose(row(b.df, name, '', kind, 'area').value, mask.mean().item(), rtol=1e-5)
            score, black = partial(class_probability, model), torch.zeros(1, 3, 1, 1)
            auc = insertion_deletion(score, x, m, 4, baseline=black, target=y)
            for k in ('insertion', 'deletion'):
                np.testing.assert_allclose(row(b.df, name, scorer, '', k).value, auc[k].mean().item(), rtol=1e-4)


@settings(max_examples=15)
@given(n=st.integers(2, 30), seed=st.integers(0, 99))
def test_intervals_are_those_of_drawing_image_by_image(n, seed):
    rng = np.random.default_rng(seed)
    p, e = rng.uniform(0.01, 1, (2, n))
    values = {'a': {('cnn', '', 'p_x'): p, ('cnn', 'energy', 'p_e'): e}}
    t = summarise(values, resamples=40, seed=seed).set_index(KEY)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=40)
    drawn = [drop_inc_win(np.repeat(p, c), np.repeat(e, c)) for c in counts]  # every image as often as it was drawn
    for k in ('drop', 'inc', 'win', 'average_drop', 'average_gain'):
        v = np.array([d[k] for d in drawn])
        got = t.loc['a', 'cnn', 'energy', k]
        if np.isnan(v).all():
            assert np.isnan(got.low) and np.isnan(got.high)
        else:
            np.testing.assert_allclose([got.low, got.high], np.nanpercentile(v, [2.5, 97.5]), rtol=1e-6, atol=1e-9)


@settings(max_examples=10)
@given(order=st.permutations(['a', 'b', 'c', 'ones']), seed=st.integers(0, 99))
def test_marks_do_not_depend_on_the_order(order, seed):
    rng = np.random.default_rng(seed)
    values = {k: {('', '', 'pointing'): rng.integers(0, 2, 20).astype(float)} for k in 'abc'} | {
        'ones': {('', '', 'pointing'): np.ones(20)}
    }
    one, two = (
        summarise({k: values[k] for k in o}, resamples=50).set_index('explainer') for o in (list(values), order)
    )
    assert not one.best['ones'] and one.best.any()  # controls are left out; methods that are level are all best
    pd.testing.assert_series_equal(one.best.sort_index(), two.best.sort_index())
    pd.testing.assert_series_equal(one.significant.sort_index(), two.significant.sort_index())
    pd.testing.assert_series_equal(one.value.sort_index(), two.value.sort_index())


def test_images_are_masked_once_for_all_scorers(monkeypatch):
    calls = []
    monkeypatch.setattr(module, 'masked', lambda *a, **k: calls.append(1) or masked(*a, **k))
    x = torch.rand(3, 3, 16, 16)
    scorers = {k: partial(class_probability, net(i)) for i, k in enumerate(('cnn', 'evaluator', 'third'))}
    task = Task(x, torch.zeros(3, dtype=int), scorers, areas=(0.1, 0.5))
    benchmark_metrics['faithfulness'](task, torch.rand(3, 1, 16, 16))
    assert len(calls) == 4  # energy, binarised, two areas


def test_interrupted_and_resumed(tmp_path):
    calls, calls_before_death = [], []

    def steady(model, x, target):
        calls.append(len(x))
        return left(model, x, target)

    def dies(model, x, target):
        if len(calls_before_death) == 2:
            raise KeyboardInterrupt
        calls_before_death.append(len(x))
        return ours(model, x, target)

    kw = dict(steps=2, bs=8, resamples=50, out=tmp_path / 'b.json')
    with pytest.raises(KeyboardInterrupt):
        benchmark(net(), loader(), dict(steady=steady, dies=dies), **kw)
    assert [o.stem for o in (tmp_path / 'b').glob('[!.]*.npz')] == ['steady'] and not (tmp_path / 'b.json').exists()
    b = benchmark(net(), loader(), dict(steady=steady, dies=ours), **kw)
    assert calls == [1, 8, 8, 8]  # a first call that is not counted, and one round
    whole = benchmark(net(), loader(), dict(steady=left, dies=ours), steps=2, bs=8, resamples=50)
    numbers = [d[d.metric != 'ms_per_map'].reset_index(drop=True) for d in (b.df, whole.df)]
    pd.testing.assert_frame_equal(*numbers)
    read = Benchmark.read(tmp_path / 'b.json').df
    pd.testing.assert_frame_equal(read[read.metric != 'ms_per_map'], numbers[0], check_dtype=False, rtol=1e-5)
    other = 'holds a run with other settings '
    with pytest.raises(ValueError, match=other + '.*steps: 2 there, 3 now'):
        benchmark(net(), loader(), dict(steady=left), **kw | dict(steps=3))
    with pytest.raises(ValueError, match=other + '.*model:'):
        benchmark(net(5), loader(), dict(steady=left), **kw)


@pytest.mark.slow
def test_memory_is_flat():
    "No more tensors alive in the tenth batch than in the second"
    calls, alive = [], []

    def counting(model, x, target):
        calls.append(len(x))
        if len(calls) in (3, 11):  # the first call is not counted
            gc.collect()
            alive.append(sum(isinstance(o, torch.Tensor) and o.ndim == 4 for o in gc.get_objects()))
        return left(model, x, target)

    benchmark(net(), loader(80), dict(counting=counting), steps=2, bs=8, resamples=10)
    assert len(calls) == 11 and alive[1] <= alive[0]


def test_pool_is_the_mean_over_seeds():
    bs = [benchmark(net(s), loader(), dict(left=left, ours=ours), steps=2, resamples=20) for s in (0, 1)]
    t = pool(bs, resamples=20)
    for key in (('ours', 'cnn', '', 'insertion'), ('left', 'cnn', 'energy', 'average_drop')):
        v = [row(b.df, *key).value for b in bs]
        np.testing.assert_allclose(row(t, *key).value, np.mean(v), rtol=1e-6)
        np.testing.assert_allclose(row(t, *key).spread, np.std(v, ddof=1), rtol=1e-6)


def test_bad_input():
    cnn, dl = net(), loader()
    with pytest.raises(ValueError, match='the test set is empty'):
        test_images(DataLoaders(DataLoader([], bs=2)).train)
    short = loader(classes=2)
    with pytest.raises(ValueError, match='1 of 3 classes have no test image: c; add some, or pass absent_ok=True'):
        benchmark(cnn, short, dict(left=left))
    assert len(benchmark(cnn, short, dict(left=left), steps=2, absent_ok=True, resamples=20).df)
    with pytest.raises(ValueError, match='n=0: at least one test image is needed'):
        test_images(dl, 0)
    with pytest.raises(ValueError, match='at least one explainer and one metric'):
        benchmark(cnn, dl, dict(left=left), ())
    with pytest.raises(
        ValueError, match=r"explainer 'loud' returned values outside \[0,1\] in the maps of 1 of 1 images"
    ):
        benchmark(cnn, dl, dict(loud=loud), steps=2)
    with pytest.raises(ValueError, match='pass your own score for other tasks'):
        benchmark(nn.Conv2d(3, 3, 3), dl, dict(left=left), steps=2)


def test_a_regression_brings_its_own_score():
    def closeness(model, x, target):
        return torch.exp(-(model(x).flatten(1).mean(1) - target).abs())

    b = benchmark(nn.Conv2d(3, 3, 3), loader(), dict(left=left), score=closeness, steps=2, resamples=20)
    assert row(b.df, 'left', 'cnn', 'energy', 'average_drop').value >= 0


def test_augmentation_stays_with_training_images():
    "A subset of a validation set is one: transforms for training leave it alone"
    from fastai.data.core import TfmdDL
    from fasttransform import Transform

    class Noise(Transform):
        split_idx = 0

        def encodes(self, x: torch.Tensor):
            return x + torch.rand_like(x) if x.ndim == 4 else x

    data = loader().dataset

    class Valid(list):
        split_idx = 1

    dl = TfmdDL(Valid(data), bs=8, after_batch=[Noise()])
    x, _, _ = test_images(dl, 12, absent_ok=True)
    again, _, where = test_images(dl, 12, absent_ok=True)
    assert torch.equal(x, again) and torch.equal(x, torch.stack([data[i][0] for i in where]))


def test_the_models_own_normalisation_counts():
    from antehoc_nb.core.model import AntehocModel

    dl = loader()
    m = AntehocModel(net(), sample=torch.rand(1, 3, 16, 16), eta=1, mean=[0.2] * 3, std=[0.5] * 3)
    x, y, _ = test_images(dl)
    b = benchmark(m, dl, dict(left=left), steps=2, resamples=20)
    p, e = (class_probability(m.cnn, a, y) for a in (x, m.mask(x, left(None, x, y))))
    expected = drop_inc_win(p, e)['average_drop']
    np.testing.assert_allclose(row(b.df, 'left', 'cnn', 'energy', 'average_drop').value, expected, rtol=1e-4)


def test_registered_explainers_on_a_trained_model(trained, digits):
    "By name, with the model's own map first; a control keeps everything"
    metrics = 'faithfulness', 'localisation'
    b = benchmark(
        trained,
        digits.valid,
        ('ante-hoc', 'grad-cam', 'plain average of layers', 'ones'),
        metrics,
        regions=digits.valid_ds.boxes,
        n=10,
        resamples=20,
        absent_ok=True,
    )
    assert list(b.pivot(('pointing',)).index) == ['ante-hoc', 'grad-cam', 'plain average of layers', 'ones']
    assert row(b.df, 'ones', 'cnn', 'energy', 'average_drop').value == 0


# --- other classes


def by_class(model, x, target):
    "A map that depends on the class: a ramp that starts at another column for each"
    return torch.stack([left(None, x[:1], None)[0].roll(5 * int(c), 2) for c in target])


@pytest.mark.parametrize('target', ['true', 'predicted'])
@pytest.mark.parametrize('metric, prefix', [('class_swap', 'swap'), ('class_swap_runner_up', 'runner_up')])
def test_class_swap_is_that_of_plain_loops(metric, prefix, target):
    cnn, evaluator, dl = net(), net(1), loader()
    explained = dict(by_class=by_class, left='gaussian')
    b = benchmark(cnn, dl, explained, (metric,), evaluator=evaluator, bs=5, resamples=20, target=target)
    assert b.record['results']['class_agnostic'] == ['left']
    x, y, _ = test_images(dl)
    probabilities = cnn(x).softmax(1)
    if target == 'predicted':
        y = probabilities.argmax(1)
    for i, own in enumerate(y.tolist()):
        ranking = [c for c in probabilities[i].argsort(descending=True).tolist() if c != own]
        other = (own + 1) % 3 if prefix == 'swap' else ranking[0]
        m = {'own': by_class(None, x[i : i + 1], [own]), 'other': by_class(None, x[i : i + 1], [other])}
        for kind in ('energy', 'top 20%'):
            images = {k: masked(x[i : i + 1], v if kind == 'energy' else equal_area_mask(v, 0.2)) for k, v in m.items()}
            images['none'] = x[i : i + 1]
            for scorer, model in dict(cnn=cnn, evaluator=evaluator).items():
                found = {}
                for scored, number in dict(own=own, other=other).items():
                    for kept, image in images.items():
                        found[scored, kept] = class_probability(model, image, number).item()
                        key = scorer, '' if kept == 'none' else kind, f'{prefix}_{scored}_{kept}'
                        np.testing.assert_allclose(b.values['by_class'][key][i], found[scored, kept], rtol=1e-5)
                differences = dict(specificity=found['own', 'own'] - found['own', 'other'])
                differences['steering'] = found['other', 'other'] - found['other', 'none']
                for name, value in differences.items():
                    got = b.values['by_class'][scorer, kind, f'{prefix}_{name}'][i]
                    np.testing.assert_allclose(got, value, atol=1e-6)
    assert row(b.df, 'left', '', '', f'{prefix}_map_difference').value == 0
    assert row(b.df, 'left', 'evaluator', 'energy', f'{prefix}_specificity').value == 0
    assert row(b.df, 'by_class', '', '', f'{prefix}_map_difference').value > 0.1


class Sees(nn.Module):
    "Logits are how much red, green, blue and grey is in the image; `flat` takes images of one size only"

    def __init__(self, flat=False):
        super().__init__()
        self.flat = nn.Linear(3 * 16 * 16, 4, bias=False) if flat else None
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        colours = torch.cat([torch.eye(3), torch.full((1, 3), 0.5)])
        self.conv.weight.data = 40 * (colours - colours.mean(0))[:, :, None, None]

    def forward(self, x):
        if self.flat is not None:
            self.flat(x.flatten(1))
        return self.conv(x).mean((2, 3))


def coloured(n=40):
    "Images that are all red, green, blue or grey, every fifth of them too dim to be classified with confidence"
    colours = torch.cat([torch.eye(3), torch.full((1, 3), 0.5)])
    y = torch.arange(n) % 4
    x = colours[y][:, :, None, None].expand(-1, -1, 16, 16) * torch.where(torch.arange(n) % 5 == 4, 0.01, 1.0)[
        :, None, None, None
    ]
    dl = DataLoader(list(zip(x, y)), bs=8)
    dl.vocab = list('rgbk')
    return dl


def oracle(model, x, target):
    "1 where the CNN sees the target's colour"
    with torch.no_grad():
        seen = model.conv(x).argmax(1)
    return (seen == target[:, None, None])[:, None].float()


def first_cell(model, x, target):
    m = torch.zeros(len(x), 1, *x.shape[2:])
    m[..., : x.shape[2] // 2, : x.shape[3] // 2] = 1
    return m


@pytest.mark.parametrize('resized', [False, True])
def test_the_grid_pointing_game(resized, tmp_path):
    "One score for each confidently classified image: all for an oracle, chance for a map that is always the same"
    seen = []

    def blank(model, x, target):
        seen.append(tuple(x.shape[2:]))
        return torch.zeros(len(x), 1, *x.shape[2:])

    kw = dict(metrics=('grid_pointing',), bs=8, resamples=20, out=tmp_path / 'b.json')
    explained = dict(oracle=oracle, first=first_cell, blank=blank, edges='edges')
    b = benchmark(Sees(), coloured(), explained, mosaics=Mosaics(resized=resized), **kw)
    score = b.values['oracle']['', '', 'grid_pointing']
    assert np.isnan(score[4::5]).all() and np.isfinite(score).sum() == 32  # eight mosaics
    assert row(b.df, 'oracle', '', '', 'grid_pointing').value > (0.9 if resized else 1 - 1e-6)
    assert row(b.df, 'first', '', '', 'grid_pointing').value == pytest.approx(0.25)
    assert row(b.df, 'edges', '', '', 'grid_pointing').value == pytest.approx(0.25)
    assert np.isnan(row(b.df, 'blank', '', '', 'grid_pointing').value)  # nothing to share
    assert row(b.df, 'oracle', '', '', 'grid_pointing_chance').value == 0.25
    assert row(b.df, 'oracle', '', '', 'grid_pointing').n == 32
    assert set(seen[1:]) - {(16, 16)} == (set() if resized else {(32, 32)})
    settings = dict(side=2, confidence=0.99, resized=resized)
    assert b.record['config']['mosaics'] == settings and b.record['results']['class_agnostic'] == ['edges']
    with pytest.raises(ValueError, match='holds a run with other settings .*mosaics: '):
        benchmark(Sees(), coloured(), explained, mosaics=Mosaics(confidence=0.9, resized=resized), **kw)


def test_a_cnn_of_one_size_needs_mosaics_of_that_size():
    cnn, dl = Sees(flat=True), coloured()
    with pytest.raises(ValueError, match=r'does not take images of 32x32 pixels .*; give Mosaics\(resized=True\)'):
        benchmark(cnn, dl, dict(oracle=oracle), ('grid_pointing',))
    b = benchmark(cnn, dl, dict(oracle=oracle), ('grid_pointing',), mosaics=Mosaics(resized=True), resamples=20)
    assert row(b.df, 'oracle', '', '', 'grid_pointing').value > 0.9
    with pytest.raises(ValueError, match='side=3: a mosaic holds images of 9 different classes, these images have 4'):
        benchmark(cnn, dl, dict(oracle=oracle), ('grid_pointing',), mosaics=Mosaics(side=3))


def test_the_predicted_class_is_what_explainers_are_asked_about():
    cnn, dl, asked = net(), loader(), []

    def asks(model, x, target):
        asked.append(target)
        return left(model, x, target)

    x, y, _ = test_images(dl)
    predicted = cnn(x).argmax(1)
    assert (predicted != y).any()
    for target, expected in dict(true=y, predicted=predicted).items():
        asked.clear()
        b = benchmark(cnn, dl, dict(asks=asks), ('faithfulness',), target=target, bs=5, resamples=20)
        assert torch.equal(torch.cat(asked[1:]), expected)
        np.testing.assert_allclose(
            b.values['asks']['cnn', '', 'p_x'], class_probability(cnn, x, expected).numpy(), rtol=1e-5
        )
        assert b.record['config']['target'] == target


@pytest.mark.parametrize('form', ['auto', 'paper'])
def test_the_record_says_whose_maps_are_class_agnostic(form):
    from antehoc_nb.core.model import AntehocModel

    model = AntehocModel(net(), sample=torch.rand(1, 3, 16, 16), eta=1, weight_net=form)
    explained = 'ante-hoc', 'grad-cam', 'ones'
    b = benchmark(model, loader(), explained, ('class_swap_runner_up',), n=9, resamples=20)
    agnostic = ['ones'] if form == 'auto' else ['ante-hoc', 'ones']
    assert b.record['results']['class_agnostic'] == agnostic
    for e in agnostic:
        assert row(b.df, e, 'cnn', 'energy', 'runner_up_specificity').value == 0
        assert row(b.df, e, '', '', 'runner_up_map_difference').value == 0
    assert row(b.df, 'grad-cam', '', '', 'runner_up_map_difference').value > 0
    assert row(b.df, 'ones', 'cnn', 'energy', 'runner_up_steering').value == 0  # nothing is hidden
