"""The run behind Tables 1, 2 and 5 on a made-up data set in Tiny-ImageNet's layout, and its records."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from antehoc_nb.core.utils import weights_digest
from antehoc_nb.evaluate.scoreboard import Benchmark, read_record
from antehoc_nb.tasks.classification import (
    CLASS_SPECIFIC,
    CRITERIA,
    DATASETS,
    PROFILES,
    WRONG_TARGET,
    classification,
    dataset_boxes,
    dataset_dls,
    figure1,
    figure3,
    image_folders,
    paper_table,
    read_classification,
    run_classification,
    trained_model,
    verdict,
)
from antehoc_nb.tasks.experiment import DatasetSpec
from antehoc_nb.tasks.noise import read_stability, run_stability, stability, stability_table

pytestmark = pytest.mark.usefixtures('one_thread', 'without_figures')


@pytest.fixture(scope='module')
def squares(tmp_path_factory):
    "Two classes in Tiny-ImageNet's layout, with boxes: a bright square on the left or on the right."
    root, rng = tmp_path_factory.mktemp('squares'), np.random.default_rng(0)
    rows = ['path,xmin,ymin,xmax,ymax']
    for split, n in (('train', 40), ('val', 8)):
        for k in (0, 1):
            (root/split/f'n{k}').mkdir(parents=True)
            for i in range(n):
                im = rng.integers(0, 90, (64, 64, 3), dtype=np.uint8)
                x0, y0 = 8 + 32 * k, int(rng.integers(4, 40))
                im[y0:y0 + 16, x0:x0 + 16] = 220
                Image.fromarray(im).save(root/split/f'n{k}'/f'{i}.png')
                rows.append(f'{split}/n{k}/{i}.png,{x0},{y0},{x0 + 15},{y0 + 15}')
    (root/'boxes.csv').write_text('\n'.join(rows))
    return root


@pytest.fixture(scope='module')
def run(squares, tmp_path_factory, without_figures):
    "The smoke run of the classification; every test below reads it."
    d, threads = tmp_path_factory.mktemp('run'), torch.get_num_threads()
    torch.set_num_threads(1)  # the CNN is too small to share among cores
    rec = run_classification('tinyimagenet20', 'smoke', d/'results', d/'work', squares)
    torch.set_num_threads(threads)
    return rec, d


def test_boxes_follow_the_images(squares):
    dls = dataset_dls('tinyimagenet20', 32, 8, data=squares)
    boxes = dataset_boxes('tinyimagenet20', dls, 32)
    x = torch.cat([b[0] for b in dls.valid])
    assert len(boxes) == len(x) == 16
    for (x0, y0, x1, y1), im in zip(boxes.round().int().tolist(), x):  # the square is in the box, at half size
        assert im[:, y0:y1, x0:x1].mean() > im.mean() + 1 and (x1 - x0, y1 - y0) == (8, 8)


def test_record_tables_and_figures(run, squares):
    rec, d = run
    assert rec['config']['title'] == 'Tiny-ImageNet-20' and rec['config']['stands_for'] == 'Animals-10'
    assert rec['command'] == 'antehoc reproduce table1 --dataset tinyimagenet20 --profile smoke'
    assert len(rec['results']['runs'][0]['shared_inc']) == 12
    b = read_classification('tinyimagenet20', 'smoke', d/'results')
    assert b.df.shape == Benchmark.of(rec).df.shape
    assert {'ante-hoc', 'grad-cam', 'grad-cam, not aligned', 'score-cam', 'ones'} <= set(b.df.explainer)
    assert {'cnn', 'evaluator'} <= set(b.df.scorer)
    assert {'pointing', 'energy_in_region'} <= set(b.df.metric)  # the data set has boxes
    v = verdict(b)
    assert len(v) == len(CRITERIA) and set(v.ahead) <= {0, 1, 2, 3} and v.ahead.between(0, 3).all()
    t = b.df.set_index(['explainer', 'scorer', 'masks', 'metric']).value
    assert v['grad-cam']['win energy'] == t['grad-cam', 'cnn', 'energy', 'win']
    win = {e: t[e, 'cnn', 'energy', 'win'] for e in ('ante-hoc', 'grad-cam', 'grad-cam++', 'score-cam')}
    assert v.ahead['win energy'] == sum(win['ante-hoc'] > win[e] for e in list(win)[1:])
    paper = d/'paper.json'
    paper.write_text(json.dumps(dict(table1={'Animals-10': {'grad-cam': dict(drop=12.3)}})))
    cells = paper_table('table1', dict(tinyimagenet20=b), paper)['Tiny-ImageNet-20']
    assert cells['drop']['grad-cam'] == f"{t['grad-cam', 'cnn', 'energy', 'drop']:.1f} (12.3)"
    assert cells['drop']['ones'] == '–'
    assert len(figure1('tinyimagenet20', 'smoke', d/'work', squares, n=2).axes) == 8
    assert len(figure3('tinyimagenet20', 'smoke', d/'work', squares, n=2).axes) == 12


def test_the_class_specific_network_has_the_same_cnn(run, squares):
    "Its maps compete with those of the same CNN; with the wrong target it is a control and competes with nobody."
    rec, d = run
    b = read_classification('tinyimagenet20', 'smoke', d/'results')
    own, specific = (trained_model('tinyimagenet20', 'smoke', work=d/'work', part=k) for k in ('cnn', 'class-specific'))
    assert weights_digest(own.cnn) == weights_digest(specific.cnn) and specific.class_specific and specific.classes == 2
    assert {CLASS_SPECIFIC, WRONG_TARGET} <= set(b.df.explainer)
    assert not b.df[b.df.explainer == WRONG_TARGET].significant.any()
    assert set(verdict(b, CLASS_SPECIFIC).ahead) <= {0, 1, 2, 3}
    out = d/'work'/'classification'/'tinyimagenet20-smoke'/'seed0'
    config = out/'benchmark'/'class-specific.json'
    text = config.read_text()
    config.write_text('{"class_specific": "another"}')
    with pytest.raises(ValueError, match='holds a run with other settings .class_specific: another there'):
        run_classification('tinyimagenet20', 'smoke', d/'r', d/'work', squares)
    config.write_text(text)


def test_a_finished_run_is_read_and_not_trained_again(run, squares):
    rec, d = run
    def written(): return {f: f.stat().st_mtime_ns for f in (d/'work').rglob('*') if f.suffix in ('.pt', '.npz')}
    before = written()
    again = run_classification('tinyimagenet20', 'smoke', d/'results', d/'work', squares)
    assert written() == before
    assert again['results'] == rec['results']


def test_stability(run, squares):
    d = run[1]
    def measured():
        explainers = 'ante-hoc', 'grad-cam'
        return run_stability('tinyimagenet20', 'smoke', d/'results', d/'work', squares, explainers=explainers)
    rec = measured()
    assert sorted(rec['results']) == ['ante-hoc', 'grad-cam']
    clean = rec['results']['ante-hoc']['noise']['0']['energy']
    assert (clean['CD'], clean['ssim']) == (0, 1)
    t = stability_table(rec)
    assert list(t.index) == ['ante-hoc', 'grad-cam'] and (t['CD'].dropna() >= 0).all(None)
    assert t['SSIM', 'mean'].between(-1, 1).all()
    e = rec['results']['grad-cam']['noise']
    assert t['CD', '30%']['grad-cam'] == pytest.approx(abs(e['0.3']['energy']['drop'] - e['0']['energy']['drop']))
    stored = read_record(d/'results'/'stability'/'tinyimagenet20-smoke.json')['results']
    assert read_stability('tinyimagenet20', 'smoke', d/'results')['results'] == stored == rec['results']
    assert measured()['results'] == rec['results']  # read, not measured again


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown dataset 'cifar': did you mean 'cifar10'"):
        classification.config('cifar', 'cpu')
    with pytest.raises(ValueError, match="unknown profile 'gpu'"): classification.config('cifar10', 'gpu')
    monkeypatch.delenv('ANTEHOC_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match='ANTEHOC_DATA is not set'):
        run_classification('cifar10', 'smoke', tmp_path, tmp_path)
    command = 'antehoc reproduce {} --dataset cifar10 --profile cpu'
    with pytest.raises(FileNotFoundError, match=command.format('table1')): trained_model('cifar10', work=tmp_path)
    with pytest.raises(FileNotFoundError, match=command.format('table1')):
        read_classification('cifar10', results=tmp_path)
    with pytest.raises(FileNotFoundError, match=command.format('table5')): read_stability('cifar10', results=tmp_path)


def test_every_profile_fits_every_data_set():
    for profile in PROFILES:
        for dataset in DATASETS:
            config = classification.config(dataset, profile)
            assert {'arch', 'size', 'eta', 'epochs', 'evaluator_epochs', 'lr', 'seeds', 'weight_net'} <= set(config)


def test_a_new_data_set_is_one_entry(squares, monkeypatch):
    "For every experiment that shares the data sets; one takes of its settings only those that it has itself."
    by_profile = dict(cpu=dict(epochs=7, evaluator_epochs=7))
    spec = DatasetSpec('Squares', image_folders, test_split='val', by_profile=by_profile)
    monkeypatch.setitem(DATASETS, 'squares', spec)
    dls = dataset_dls('squares', 32, 8, n_train=20, data=squares)
    assert list(dls.vocab) == ['n0', 'n1'] and (len(dls.train_ds), len(dls.valid_ds)) == (20, 16)
    assert classification.config('squares', 'cpu')['epochs'] == 7
    assert classification.config('squares', 'smoke')['epochs'] == 1
    assert set(stability.config('squares', 'cpu')) == {'dataset', 'profile', 'amounts', 'n', 'draws'}
