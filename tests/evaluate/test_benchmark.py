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
