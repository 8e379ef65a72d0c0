"""The run behind Tables 1, 2 and 5 on a made-up data set in Tiny-ImageNet's layout, and its records."""
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import plain_tensor, weights_digest
from antehoc_nb.evaluate.benchmark import MAIN_EXPLAINERS
from antehoc_nb.evaluate.scoreboard import BETTER, Benchmark, as_results, read_record
from antehoc_nb.tasks import classification as C
from antehoc_nb.tasks import noise as N
from antehoc_nb.tasks.classification import (
    CLASS_SPECIFIC,
    CRITERIA,
    DATASETS,
    PROFILES,
    WRONG_TARGET,
    classification,
    criteria_won,
    criterion_name,
    dataset_boxes,
    dataset_dls,
    figure1,
    figure3,
    figure5,
    image_folders,
    measures_table,
    method_sheet,
    paper_table,
    read_classification,
    run_classification,
    summary_table,
    trained_model,
    verdict,
    words_of_classes,
)
from antehoc_nb.tasks.concept_tables import CONCEPT_PROFILES, METHODS
from antehoc_nb.tasks.experiment import DatasetSpec, Paths, fingerprint
from antehoc_nb.tasks.noise import (
    STABILITY_PROFILES,
    read_stability,
    run_stability,
    stability,
    stability_table,
    table5,
)
from antehoc_nb.train.two_pass import normalisation

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
    cells = paper_table('table1', dict(tinyimagenet20=b), paper)['Tiny-ImageNet-20 (paper: Animals-10)']
    assert cells['drop']['grad-cam'] == f"{t['grad-cam', 'cnn', 'energy', 'drop']:.1f} (12.3)"
    assert cells['drop']['ones'] == '–'
    printed = classification.tables['table1'](rec, d)  # `d` has the paper's numbers
    assert 'Tiny-ImageNet-20 (paper: Animals-10)' in printed and f"{cells['drop']['grad-cam']}" in printed
    assert '(paper' not in classification.tables['table1'](rec, d/'results')
    assert len(figure1('tinyimagenet20', 'smoke', d/'work', squares, n=2).axes) == 10
    assert len(method_sheet('tinyimagenet20', 'smoke', d/'work', squares, n=2).axes) == 12


def test_figure3_has_the_regions_of_images_that_the_cnn_is_right_about(run, squares):
    figure = figure3('tinyimagenet20', 'smoke', run[1]/'work', squares, each=2)
    rows = figure.axes[0].get_gridspec().nrows
    assert 1 <= rows <= 2 and len(figure.axes) == 6 * rows
    model = trained_model('tinyimagenet20', 'smoke', work=run[1]/'work')
    dls = C.run_dls(classification.config('tinyimagenet20', 'smoke'), 0, squares)
    x, y, _ = C.test_images(dls.valid, 8)
    heat = model.explain(x)
    drawn = C._right_images(heat.probabilities, y, 6, 2)
    assert all(heat.probabilities[i].argmax() == y[i] == k for k, found in drawn.items() for i in found)
    image, agnostic, specific = figure.axes[:3]
    first = next(i for k in drawn for i in drawn[k])
    inside = heat.map[first, 0].numpy() >= .8
    pixels = heat.pixels[first].permute(1, 2, 0).numpy()
    shown = agnostic.images[0].get_array()
    kept = np.isclose(shown, pixels).all(-1)
    assert kept[~inside].mean() < .1 and (kept[inside].mean() > .9 or not inside.any())  # dimmed outside of the regions
    assert [ax.get_title() for ax in (image, agnostic, specific)] == ['image', 'class-agnostic', 'class-specific']


def test_figure5_trains_one_weight_a_layer_once(run, squares, tmp_path):
    shutil.copytree(run[1]/'work', tmp_path/'work')
    figures = [figure5('tinyimagenet20', 'smoke', tmp_path/'work', squares, n=2) for _ in range(2)]
    assert [len(figure.axes) for figure in figures] == [10, 10]
    folder = tmp_path/'work'/'classification'/'tinyimagenet20-smoke'/'seed0'/'single-weights'
    single = AntehocModel.from_pretrained(folder/'model')
    assert single.weight_net_name == 'scalars' and sum(p.numel() for p in single.weight_net.parameters()) <= 6
    own = trained_model('tinyimagenet20', 'smoke', work=run[1]/'work')
    assert weights_digest(single.cnn) == weights_digest(own.cnn)
    record = json.loads((folder/'record.json').read_text())
    assert record['config']['train_cnn'] is False


def test_classes_are_named_in_words(squares, tmp_path):
    def words():
        return words_of_classes(dataset_dls('tinyimagenet20', 32, 8, data=tmp_path/'squares'))
    shutil.copytree(squares, tmp_path/'squares')
    assert words() == ['n0', 'n1']
    for split in ('train', 'val'):
        for old, new in (('n0', 'n02437312'), ('n1', 'n02123045')): (tmp_path/'squares'/split/old).rename(
            tmp_path/'squares'/split/new)
    assert words() == ['tabby', 'Arabian camel']  # in the order of the identifiers, by timm
    (tmp_path/'squares'/'classes.csv').write_text('wnid,name\nn02437312,"dromedary, camel"\n')
    assert words() == ['tabby', 'dromedary']
    (tmp_path/'squares'/'classes.csv').unlink()
    (tmp_path/'squares'/'words.txt').write_text('n02437312\tship of the desert, camel\nn02123045\tcat\n')
    assert words() == ['cat', 'ship of the desert']


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


@pytest.mark.slow
def test_more_seeds_keep_what_is_done(run, squares, monkeypatch):
    rec, d = run
    one_seed, seeds = C._one_seed, []
    def again(config, seed, out, data):
        seeds.append((seed, out.name))
        scores, slow, facts, dls = one_seed(config, 0, out.parent/'seed0', data)
        return scores, slow, facts | dict(seed=seed), dls
    monkeypatch.setattr(C, '_one_seed', again)
    files = {path: path.stat().st_mtime_ns for path in (d/'work'/'classification').rglob('*.safetensors')}
    three = run_classification('tinyimagenet20', 'smoke', d/'three', d/'work', squares, seeds=3)
    assert seeds == [(0, 'seed0'), (1, 'seed1'), (2, 'seed2')]
    assert three['seed'] == [0, 1, 2] == list(three['config']['seeds'])
    assert three['command'] == 'antehoc reproduce table1 --dataset tinyimagenet20 --profile smoke --seeds 3'
    assert three['results']['runs'][0] == rec['results']['runs'][0]
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with pytest.raises(ValueError, match='seeds=0: give 1 or more'): classification.config('cifar10', 'cpu', seeds=0)
    with pytest.raises(ValueError, match='seeds=2: stability has one seed only; leave it out'):
        stability.config('cifar10', 'cpu', seeds=2)


def test_slow_explainers_are_scored_on_fewer_images(run):
    "And compared on these, whatever the others' scores are"
    b = read_classification('tinyimagenet20', 'smoke', run[1]/'results')
    fast, slow = (b.df[keep] for keep in (b.df.explainer != 'score-cam', b.df.explainer.isin(['score-cam', *C.OURS])))
    better = slow.assign(value=slow.value.where(slow.explainer == 'score-cam', 1e9), significant=True)
    record = dict(b.record, results=dict(b.record['results'], slow=dict(n=8, **as_results(better))))
    split = Benchmark(fast, record, {}, {})
    v, whole = verdict(split), verdict(b)
    shown = ['ante-hoc', 'score-cam']
    pd.testing.assert_frame_equal(v[shown].astype(float), whole[shown].astype(float))
    without = verdict(split, baselines=('grad-cam', 'grad-cam++'))
    for name, row in v.iterrows():
        high = BETTER[next(o[2] for o in CRITERIA if criterion_name(*o) == name)] == 'high'
        assert row.ahead == without.ahead[name] + (high and pd.notna(row['score-cam']))
    assert (v.significant == whole.significant).all()
    table = paper_table('table1', dict(tinyimagenet20=split), 'none.json')
    assert sorted(table.index) == sorted(paper_table('table1', dict(tinyimagenet20=b), 'none.json').index)


RECORDS = Path(__file__).parents[2]/'results'


@pytest.mark.parametrize('path', sorted((RECORDS/'classification').glob('*.json')), ids=lambda path: path.stem)
def test_criteria_won_counts_as_by_hand(path):
    b = read_classification(*path.stem.rsplit('-', 1), RECORDS)
    values = [bench.df.set_index(['explainer', 'scorer', 'masks', 'metric']).value.to_dict()
              for bench in (b, C.slow_scores(b)) if bench]
    won = criteria_won(b)
    for ours, row in won.iterrows():
        ahead = {name: [_is_ahead(values, ours, name, criterion) for criterion in CRITERIA]
                 for name in row.index.drop(['all', 'evaluator', 'significant'])}
        every = np.all(list(ahead.values()), 0)
        assert row['all'] == every.sum()
        assert row['evaluator'] == sum(every[i] for i, criterion in enumerate(CRITERIA) if criterion[0] == 'evaluator')
        assert {name: sum(of_one) for name, of_one in ahead.items()} == row[list(ahead)].to_dict()
        assert row['significant'] <= row['all']


@pytest.mark.parametrize('path', sorted((RECORDS/'classification').glob('*.json')), ids=lambda path: path.stem)
def test_tables_of_a_record(path):
    dataset, profile = path.stem.rsplit('-', 1)
    b = read_classification(dataset, profile, RECORDS)
    measures, won = measures_table(b), criteria_won(b)
    for bench in filter(None, (b, C.slow_scores(b))):
        values = bench.df.set_index(['explainer', 'scorer', 'masks', 'metric']).value
        for explainer in {*bench.df.explainer} - ({*C.OURS} if bench is not b else set()):
            for column in measures:
                wanted = values.get((explainer, *C.MEASURES[column]), np.nan)
                np.testing.assert_equal(measures[column][explainer], wanted)
    row, drop = summary_table({dataset: b}).iloc[0], measures['drop at 20 %']
    cams = drop[[name for name in C.BASELINES[:-1] if name in drop]]
    best, slow = f'{cams.min():.1f} ({cams.idxmin()})', C.slow_scores(b)
    if cams.idxmin() not in {*b.df.explainer}:  # scored on fewer images
        best += f", default {measures_table(slow)['drop at 20 %'][CLASS_SPECIFIC]:.1f} on its images"
    assert row['best CAM'] == best and row['default'] == f'{drop[CLASS_SPECIFIC]:.1f}'
    assert row['criteria won'] == f"{won['all'][CLASS_SPECIFIC]} and {won['all']['ante-hoc']} of 20"


def _is_ahead(values, ours, baseline, criterion):
    found = next(of_bench for of_bench in values if (baseline, *criterion) in of_bench)
    mine, theirs = (found[(name, *criterion)] for name in (ours, baseline))
    return mine > theirs if BETTER[criterion[2]] == 'high' else mine < theirs


@pytest.mark.slow
def test_a_run_with_slow_explainers(run, squares, tmp_path, monkeypatch):
    "Score-CAM on half of the images, in the record, the verdict and the table"
    config = classification.config('tinyimagenet20', 'smoke')
    config |= dict(n_slow=8, explainers=[*C.OURS, 'grad-cam', 'tame', 'score-cam'],
                   metrics=['faithfulness', 'class_swap'])
    parts = 'cnn', 'class-specific'
    model, specific = (trained_model('tinyimagenet20', 'smoke', work=run[1]/'work', part=part) for part in parts)

    def one_seed(config, seed, out, data):
        dls = C.run_dls(config, seed, data)
        first, again = (C.trained_tame(model, dls, config, seed, out/'tame') for _ in range(2))
        assert weights_digest(first.fusion) == weights_digest(again.fusion)  # read, not trained again
        scores, slow = C._score(config, model, specific, None, dls, out, again)
        return scores, slow, dict(seed=seed, shared_inc=C._shared_incs(scores, slow)), dls
    monkeypatch.setattr(C, '_one_seed', one_seed)
    found = C._run(config, Paths(tmp_path, tmp_path, squares)).results
    assert (found['n'], found['slow']['n']) == (16, 8)
    b = Benchmark.of(dict(config=config, results=found))
    of_few = C.slow_scores(b)
    assert set(b.df.explainer) == {*C.OURS, 'grad-cam', 'tame'} and set(of_few.df.explainer) == {*C.OURS, 'score-cam'}
    assert [set(o.df[o.df.metric == 'average_drop'].n) for o in (b, of_few)] == [{16}, {8}]
    assert [any('swap' in metric for metric in set(o.df.metric)) for o in (b, of_few)] == [True, False]
    assert {o['baseline'] for o in found['runs'][0]['shared_inc']} == {'grad-cam', 'score-cam'}
    values = of_few.df.set_index(['explainer', 'scorer', 'masks', 'metric']).value
    shown = verdict(b)['score-cam']['average drop top 20%']
    assert shown == values['score-cam', 'cnn', 'top 20%', 'average_drop']
    assert 'score-cam' in paper_table('table1', dict(tinyimagenet20=b), 'none.json').index


def test_images_of_a_run_are_at_most_so_many(squares):
    "Test images of all classes, with their boxes"
    config = classification.config('tinyimagenet20', 'smoke')
    whole, part = (C.run_dls(config | more, 0, squares) for more in ({}, dict(n_valid=4)))
    labels = torch.cat([plain_tensor(y) for _, y in part.valid])
    assert sorted(labels.tolist()) == [0, 0, 1, 1] and len(whole.valid_ds) == 16
    boxes, x = dataset_boxes('tinyimagenet20', part, 32), torch.cat([plain_tensor(b[0]) for b in part.valid])
    for (x0, y0, x1, y1), image in zip(boxes.round().int().tolist(), x):
        assert image[:, y0:y1, x0:x1].mean() > image.mean() + 1
    assert fingerprint(part) != fingerprint(whole)


@pytest.mark.slow
def test_weight_networks_on_a_cnn_that_was_fine_tuned(squares, tmp_path):
    "The profile `transfer` on a small CNN: three trainings, one CNN; started again, nothing is trained"
    config = classification.config('tinyimagenet20', 'transfer') | classification.config('tinyimagenet20', 'smoke')
    config |= dict(weight_net='paper', class_agnostic_images=64, pretrained=False)

    def train():
        dls = C.run_dls(config, 0, squares)
        learn, seconds = C.train_class_agnostic(dls, config, 0, tmp_path)
        return learn, C.train_class_specific(learn.model, dls, config, 0, tmp_path/'class-specific'), seconds
    agnostic, specific, seconds = train()
    tuned = json.loads((tmp_path/'fine-tuned'/'record.json').read_text())
    assert tuned['config']['fine_tune'] and tuned['config']['plain'] and 'weight_net' not in tuned['config']
    digests = {weights_digest(learn.model.cnn) for learn in (agnostic, specific)}
    assert digests == {tuned['results']['cnn_sha256']}
    names = [(o.model.weight_net_name, o.model.class_specific, o.two_pass.int_loss) for o in (agnostic, specific)]
    assert names == [('paper', False, 'mse'), ('auto', True, 'cross_entropy')]
    assert agnostic.two_pass.mask == 'soft' and seconds['class_agnostic_epochs'] == 1
    for part, learn in (('cnn', agnostic), ('class-specific', specific)):  # as figures and stability find them
        loaded = AntehocModel.from_pretrained(tmp_path/part/'model')
        assert weights_digest(loaded) == weights_digest(learn.model)
        assert loaded.meta['cnn'] == dict(arch='small_cnn', n_out=2)
    files = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    assert train()[2] == seconds
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == files


def test_the_profile_transfer():
    for dataset in ('cifar10', 'tinyimagenet20', 'food101-10', 'tinyimagenet200'):
        config = classification.config(dataset, 'transfer')
        assert (config['arch'], config['pretrained'], config['fine_tune']) == ('timm/tf_efficientnet_lite0', True, True)
        assert (config['weight_net'], config['class_specific']) == ('paper', False)
        assert config['class_specific_net'] == dict(weight_net='auto', class_specific=True)
        assert config['size'] in (112, 128) and config['n_test'] >= 200 and config['n_slow'] >= 100
        assert config['seeds'] == ((0, 1, 2) if dataset == 'tinyimagenet20' else (0,))
        assert classification.config(dataset, 'transfer', seeds=3)['seeds'] == (0, 1, 2)
        settings = C.cnn_config(config, 0)
        assert settings['pretrained'] and settings['fine_tune'] and settings['epochs'] == config['epochs']
        scored = {'ante-hoc', CLASS_SPECIFIC, WRONG_TARGET, 'grad-cam', 'score-cam', 'layer-cam', 'tame'}
        assert scored <= set(config['explainers']) and {'class_swap', 'grid_pointing'} <= set(config['metrics'])
    of_concepts = CONCEPT_PROFILES['transfer']
    assert of_concepts['pretrained'] and of_concepts['fine_tune'] and of_concepts['weight_net'] == 'paper'


def test_images_are_normalised_as_the_weights_of_a_profile_need_them(squares):
    config = classification.config('tinyimagenet20', 'transfer')
    assert list(normalisation(C.run_dls(config, 0, squares))) == [[.5] * 3, [.5] * 3]
    seen = []
    def train(dls, arch, epochs, lr, **kwargs):
        seen.append((arch, lr, kwargs['pretrained']))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(C, 'train_evaluator', train)
        C._train_evaluator(None, config, 0, Path())
        C._train_evaluator(None, classification.config('tinyimagenet20', 'cpu'), 0, Path())
    rate = config['evaluator_lr']
    assert seen == [('timm/tf_efficientnet_lite0', slice(rate / 20, rate), True), ('resnet18_half', 3e-3, False)]


def test_the_papers_numbers():
    "Each is of a data set that ours stand for, and of a method that has a row"
    paper = json.loads((Path(__file__).parents[2]/'results'/'paper.json').read_text())
    originals = {spec.stands_for for spec in DATASETS.values()}
    for table in ('table1', 'table2'):
        assert set(paper[table]) == originals - {'none of them'}
        for rows in paper[table].values():
            assert set(rows) == set(MAIN_EXPLAINERS)
            assert all(set(row) == {'drop', 'inc', 'win'} for row in rows.values())
    assert all(set(row) == {'ours', 'SENN', 'CBAH'} <= set(METHODS.values()) for row in paper['table3'].values())
    assert paper['table1']['Animals-10']['ante-hoc'] == dict(drop=19.24, inc=16.81, win=34)
    assert paper['table3']['CIFAR-10']['ours'] == 90.86


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


def test_stability_of_a_profile_with_its_own_explainers(run, squares, monkeypatch):
    "The class-specific network of the run is measured, on images as the CNN was trained on"
    smoke = STABILITY_PROFILES['smoke'] | dict(n=4, explainers=('ante-hoc', CLASS_SPECIFIC))
    assert {'ante-hoc', CLASS_SPECIFIC, 'grad-cam', 'layer-cam'} <= {*STABILITY_PROFILES['transfer']['explainers']}
    monkeypatch.setitem(STABILITY_PROFILES, 'smoke', smoke)
    monkeypatch.setattr(N, 'AMOUNTS', (.1, .3))
    asked, run_dls = [], N.run_dls
    monkeypatch.setattr(N, 'run_dls', lambda config, *args: asked.append(config) or run_dls(config, *args))
    work = run[1]/'own'
    shutil.copytree(run[1]/'work'/'classification', work/'classification')
    rec = run_stability('tinyimagenet20', 'smoke', work/'results', work, squares)
    assert list(rec['results']) == ['ante-hoc', CLASS_SPECIFIC]
    assert asked[0] == classification.config('tinyimagenet20', 'smoke')  # with `pretrained`, for its statistics
    values = [rec['results'][name]['noise']['0']['energy']['average_drop'] for name in rec['results']]
    assert values[0] != values[1]
    (work/'paper.json').write_text('{"table5": {"0.1": {"ante-hoc": {"cd": 4.12, "ci": 3.28}}}}')
    table = table5(dict(tinyimagenet20=rec), paper=work/'paper.json')
    assert table['CD', '10%']['ante-hoc'].endswith('(4.12)') and table['CI', '10%']['ante-hoc'].endswith('(3.28)')
    assert '(' not in table['CD', '30%']['ante-hoc'] and '(' not in table['CD', '10%'][CLASS_SPECIFIC]
    assert '(4.12)' in stability.tables['table5'](rec, work)


def test_table5_is_a_mean_over_data_sets():
    def record(cd, *explainers):
        noise = {f'{amount:g}': dict(energy=dict(CD=cd, CI=1., ssim=.5)) for amount in (0, .1, .2, .3, .4, .5)}
        return dict(results={name: dict(noise=noise, max_sensitivity=1.) for name in explainers})
    table = table5(dict(a=record(1., 'ante-hoc', 'grad-cam'), b=record(2., 'ante-hoc')), paper='none.json')
    assert list(table.index) == ['ante-hoc'] and set(table['CD'].loc['ante-hoc']) == {'1.5'}


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
