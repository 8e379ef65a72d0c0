"""The run behind Tables 1, 2 and 5 on a made-up data set in a pack's layout, and what its records say."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from antehoc_nb.core.utils import weights_digest
from antehoc_nb.evaluate.scoreboard import read_record
from antehoc_nb.tasks.classification import (
    CLASS_SPECIFIC,
    CRITERIA,
    DATASETS,
    PROFILES,
    WRONG_TARGET,
    dataset_boxes,
    dataset_dls,
    figure1,
    figure3,
    paper_table,
    profile_config,
    read_classification,
    run_classification,
    trained_model,
    verdict,
)
from antehoc_nb.tasks.noise import read_stability, run_stability, stability_table


@pytest.fixture(scope='module')
def pack(tmp_path_factory):
    "Two classes in Tiny-ImageNet's layout, with boxes: a bright square on the left or on the right"
    root, rng, rows = tmp_path_factory.mktemp('pack'), np.random.default_rng(0), ['path,xmin,ymin,xmax,ymax']
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
def run(pack, tmp_path_factory):
    d = tmp_path_factory.mktemp('run')
    rec = run_classification('tinyimagenet20', 'smoke', d/'results', d/'work', pack, command='antehoc reproduce table1')
    return rec, d


def test_boxes_follow_the_images(pack):
    dls = dataset_dls('tinyimagenet20', 32, 8, data=pack)
    boxes, x = dataset_boxes('tinyimagenet20', dls, 32), torch.cat([b[0] for b in dls.valid])
    assert len(boxes) == len(x) == 16
    for (x0, y0, x1, y1), im in zip(boxes.round().int().tolist(), x): # the square is in its box, half the size of the file's
        assert im[:, y0:y1, x0:x1].mean() > im.mean() + 1 and (x1 - x0, y1 - y0) == (8, 8)


def test_record_tables_and_figures(run, pack):
    rec, d = run
    assert rec['config']['title'] == 'Tiny-ImageNet-20' and rec['config']['stands_for'] == 'Animals-10'
    b = read_classification('tinyimagenet20', 'smoke', d/'results')
    assert {'ante-hoc', 'grad-cam', 'grad-cam, not aligned', 'score-cam', 'ones'} <= set(b.df.explainer) and {'cnn', 'evaluator'} <= set(b.df.scorer)
    assert {'pointing', 'energy_in_region'} <= set(b.df.metric)  # the pack has boxes
    v = verdict(b)
    assert len(v) == len(CRITERIA) and set(v.ahead) <= {0, 1, 2, 3}
    t = b.df.set_index(['explainer', 'scorer', 'masks', 'metric']).value
    assert v['grad-cam']['win energy'] == t['grad-cam', 'cnn', 'energy', 'win']
    assert v.ahead['win energy'] == sum(t['ante-hoc', 'cnn', 'energy', 'win'] > t[e, 'cnn', 'energy', 'win'] for e in ('grad-cam', 'grad-cam++', 'score-cam'))
    paper = d/'paper.json'
    paper.write_text(json.dumps(dict(table1={'Animals-10': {'grad-cam': dict(drop=12.3)}})))
    cells = paper_table('table1', dict(tinyimagenet20=b), paper)['Tiny-ImageNet-20']
    assert cells['drop']['grad-cam'] == f"{t['grad-cam', 'cnn', 'energy', 'drop']:.1f} (12.3)" and cells['drop']['ones'] == '–'
    assert len(figure1('tinyimagenet20', 'smoke', d/'work', pack, n=2).axes) == 8
    assert len(figure3('tinyimagenet20', 'smoke', d/'work', pack, n=2).axes) == 12


def test_the_network_that_is_asked_has_the_same_cnn(run, pack):
    "Its maps compete with those of the same CNN; asked of the wrong class, it is a control and competes with nobody."
    rec, d = run
    b = read_classification('tinyimagenet20', 'smoke', d/'results')
    own, asked = (trained_model('tinyimagenet20', 'smoke', work=d/'work', part=k) for k in ('cnn', 'class-specific'))
    assert weights_digest(own.cnn) == weights_digest(asked.cnn) and asked.class_specific and asked.classes == 2
    assert {CLASS_SPECIFIC, WRONG_TARGET} <= set(b.df.explainer) and not b.df[b.df.explainer == WRONG_TARGET].significant.any()
    assert set(verdict(b, CLASS_SPECIFIC).ahead) <= {0, 1, 2, 3}
    out = d/'work'/'classification'/'tinyimagenet20-smoke'/'seed0'
    claimed = (out/'benchmark'/'class-specific.json').read_text()
    (out/'benchmark'/'class-specific.json').write_text('{"class_specific": "another"}')
    with pytest.raises(ValueError, match='holds a run with other settings .class_specific: another there'):
        run_classification('tinyimagenet20', 'smoke', d/'r', d/'work', pack)
    (out/'benchmark'/'class-specific.json').write_text(claimed)


def test_a_finished_run_is_read_and_not_trained_again(run, pack):
    rec, d = run
    seen = {f: f.stat().st_mtime_ns for f in (d/'work').rglob('*') if f.suffix in ('.pt', '.npz')}
    again = run_classification('tinyimagenet20', 'smoke', d/'results', d/'work', pack)
    assert {f: f.stat().st_mtime_ns for f in (d/'work').rglob('*') if f.suffix in ('.pt', '.npz')} == seen
    assert again['results'] == rec['results']


def test_stability(run, pack):
    d = run[1]
    rec = run_stability('tinyimagenet20', 'smoke', d/'results', d/'work', pack, explainers=('ante-hoc', 'grad-cam'))
    t = stability_table(rec)
    assert list(t.index) == ['ante-hoc', 'grad-cam'] and (t['CD'].dropna() >= 0).all().all() and t['SSIM', 'mean'].between(-1, 1).all()
    e = rec['results']['grad-cam']['noise']
    assert t['CD', '30%']['grad-cam'] == pytest.approx(abs(e['0.3']['energy']['drop'] - e['0']['energy']['drop']))
    assert read_stability('tinyimagenet20', 'smoke', d/'results')['results'] == read_record(d/'results'/'stability'/'tinyimagenet20-smoke.json')['results']


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown dataset 'cifar': did you mean 'cifar10'"): profile_config('cifar', 'cpu')
    with pytest.raises(ValueError, match="unknown profile 'gpu'"): profile_config('cifar10', 'gpu')
    monkeypatch.delenv('ANTEHOC_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match='ANTEHOC_DATA is not set'): run_classification('cifar10', 'smoke', tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match='antehoc reproduce table1 --dataset cifar10 --profile cpu'): trained_model('cifar10', work=tmp_path)
    with pytest.raises(FileNotFoundError, match='antehoc reproduce table1 --dataset cifar10 --profile cpu'): read_classification('cifar10', results=tmp_path)
    with pytest.raises(FileNotFoundError, match='antehoc reproduce table5 --dataset cifar10 --profile cpu'): read_stability('cifar10', results=tmp_path)


def test_every_profile_fits_every_data_set():
    for profile in PROFILES:
        for dataset in DATASETS: assert {'arch', 'size', 'eta', 'epochs', 'evaluator_epochs', 'lr', 'seeds', 'weight_net'} <= set(profile_config(dataset, profile))
