"""The report of a data set: its statistics, its page, what can go wrong, and the page in a browser."""
import errno
import importlib.util
import json
import re
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from antehoc_nb.cli import app
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import weights_digest
from antehoc_nb.data.photo_digits import PhotoDigits
from antehoc_nb.show import report as module
from antehoc_nb.show.explain_many import read_explained
from antehoc_nb.show.report import (
    LEAST_RATIO,
    MapSample,
    class_table,
    confident_and_wrong,
    energy_off_object,
    find_groups,
    groups_table,
    hellinger,
    make_report,
    map_groups,
    odd_images,
    read_boxes,
    sample_maps,
    trust_in_maps,
    write_explained,
)

pytest.importorskip('vl_convert', reason='no vl-convert-python: pip install antehoc_nb[report]')
pytestmark = pytest.mark.usefixtures('one_thread')
CLASSES = ['ant', 'bee', 'cat', 'dog']


def blobs(x, y, width=.09, side=28):
    "Maps (n,side,side) with a blob at each place"
    place = (np.arange(side) + .5) / side
    across = np.exp(-(place - np.asarray(x)[:, None])**2 / 2 / width**2)
    down = np.exp(-(place - np.asarray(y)[:, None])**2 / 2 / width**2)
    return (down[:, :, None] * across[:, None]).astype('float32')


def as_sample(maps, names, right=None):
    maps = maps / maps.sum((1, 2), keepdims=True)
    found, counts = np.unique(names, return_counts=True)
    right = np.full(len(names), np.nan) if right is None else right
    n_of_class = dict(zip(found, counts, strict=True))
    return MapSample(np.arange(len(names)), np.array(names, object), right, maps, n_of_class, 0)


def homogeneous(seed, n=100, classes=5, mark=0.):
    "Maps at random places, the same in all classes but for a share `mark` of the fourth, whose maps are in a corner"
    rng = np.random.default_rng(seed)
    names = np.repeat([f'c{i}' for i in range(classes)], n)
    marked = (names == 'c3') & (rng.random(n * classes) < mark)
    x, y = np.where(marked, .9, rng.uniform(.2, .75, (2, n * classes))) + rng.normal(0, .02, (2, n * classes))
    return as_sample(blobs(x, y), names), marked


@pytest.fixture
def images(tmp_path):
    "A folder of 40 small images in four classes, the maps of which are blobs; of dogs half lie in a corner"
    rng = np.random.default_rng(0)
    label = np.repeat(CLASSES, 10)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype='uint8')).save(tmp_path/f'{i:02}.png')
    x, y = rng.uniform(.2, .8, (2, 40))
    return tmp_path, [f'{i:02}.png' for i in range(40)], blobs(x, y), label.tolist()


@pytest.fixture
def folder(images):
    root, names, maps, label = images
    prediction = ['bee' if i == 0 else name for i, name in enumerate(label)]
    return write_explained(root/'explained', root, names, maps, prediction, np.linspace(.5, 1, 40), label)


def change(folder, **entries):
    "Change entries of explain.json"
    meta = json.loads((folder/'explain.json').read_text())
    (folder/'explain.json').write_text(json.dumps(meta | entries))
    return folder


# ---- statistics

@pytest.mark.parametrize('seed', range(3))
def test_a_planted_group_ranks_first(seed):
    sample, marked = homogeneous(seed, mark=.6)
    groups = map_groups(sample, seed)
    first = groups[0]
    assert (first.class_name, first.place, first.candidate) == ('c3', 'bottom right', True)
    assert marked[first.members].mean() > .95 and len(first.members) > .95 * marked.sum()
    assert sum(group.candidate for group in groups) == 1
    assert first.score >= LEAST_RATIO > groups[1].score
    assert first.distance > .5 and first.share_elsewhere < .05


def test_no_candidates_in_homogeneous_classes():
    "Ten seeds, about 60 groups: the bound holds for all groups of a report together"
    highest = [max(group.score for group in map_groups(homogeneous(seed)[0], seed)) for seed in range(10)]
    assert max(highest) < 1.5


def test_a_whole_class_may_be_a_candidate():
    "A mark on every image of a class: all its groups are rare elsewhere"
    sample, _ = homogeneous(0, mark=1.)
    groups = map_groups(sample)
    own = [group for group in groups if group.class_name == 'c3']
    assert groups[0].candidate and groups[0].place == 'bottom right'
    assert sum(group.share for group in own) == pytest.approx(1)
    assert {group.class_name for group in groups if group.candidate} == {'c3'}


def test_a_mark_that_all_classes_share_is_no_candidate():
    rng = np.random.default_rng(0)
    names, marked = np.repeat(CLASSES, 80), np.arange(320) % 2 == 0
    x, y = np.where(marked, .9, rng.uniform(.2, .75, (2, 320))) + rng.normal(0, .02, (2, 320))
    assert not any(group.candidate for group in map_groups(as_sample(blobs(x, y), names)))


def test_groups_and_scores_do_not_depend_on_the_order_of_the_images():
    sample, marked = homogeneous(1, mark=.6)
    order = np.random.default_rng(2).permutation(len(sample))
    turned = as_sample(sample.maps[order], sample.classes[order])
    first, again = map_groups(sample)[0], map_groups(turned)[0]
    assert {*order[again.members]} == {*first.members}


def test_the_same_seed_gives_the_same_report():
    sample, _ = homogeneous(1, mark=.3)
    pd.testing.assert_frame_equal(groups_table(map_groups(sample, 5)), groups_table(map_groups(sample, 5)))


def test_bounds_agree_with_scipy():
    from scipy.stats import binomtest
    for count, n in ((0, 10), (3, 10), (10, 10), (57, 400)):
        interval = binomtest(count, n).proportion_ci(1 - 2 * .01, 'exact')
        assert module._bound(count, n, .01, False) == pytest.approx(interval.low, abs=1e-9)
        assert module._bound(count, n, .01, True) == pytest.approx(interval.high, abs=1e-9)


def test_the_score_holds_for_the_true_ratio():
    "The lower bound is above the true ratio in fewer than 5 of 100 draws"
    rng, error = np.random.default_rng(0), .05 / 2
    counts = rng.binomial(100, .3, 400), rng.binomial(500, .1, 400)
    scores = [module._bound(a, 100, error, False) / module._bound(b, 500, error, True)
              for a, b in zip(*counts, strict=True)]
    assert np.mean(np.array(scores) > 3) < .05


def test_hellinger_agrees_with_the_distance_of_roots():
    maps = np.random.default_rng(0).random((2, 7, 7))
    maps /= maps.sum((1, 2), keepdims=True)
    roots = np.sqrt(maps)
    assert hellinger(*maps) == pytest.approx(np.linalg.norm(roots[0] - roots[1]) / np.sqrt(2))
    apart = np.zeros((2, 2, 2))
    apart[0, 0, 0] = apart[1, 1, 1] = 1
    assert hellinger(*apart) == 1 and hellinger(apart[0], apart[0]) == 0


def test_groups_of_clear_clusters():
    rng = np.random.default_rng(0)
    place = np.repeat([0, 1, 2], [50, 30, 15])
    x, y = np.array([.2, .8, .5])[place], np.array([.2, .2, .8])[place]
    numbers = find_groups(blobs(x + rng.normal(0, .01, 95), y + rng.normal(0, .01, 95)))
    assert numbers.tolist() == place.tolist()  # the largest is 0


@pytest.mark.parametrize('n', [1, 2, 9])
def test_few_maps_are_one_group(n):
    assert find_groups(np.full((n, 4, 4), 1 / 16, 'float32')).tolist() == [0] * n


def test_at_least_two_groups():
    with pytest.raises(ValueError, match='most=1: allow at least two groups'): find_groups(np.ones((20, 4, 4)), most=1)


def test_equal_maps_do_not_break_grouping():
    assert len(find_groups(np.full((30, 4, 4), 1 / 16, 'float32'))) == 30


def test_eigenvalues_of_large_classes_agree_with_the_dense_ones():
    sample, _ = homogeneous(0, n=450, classes=1)
    graph = module._neighbour_graph(module._features(sample.maps))
    from scipy.sparse.csgraph import laplacian
    dense = np.linalg.eigvalsh(laplacian(graph, normed=True).toarray())[:9]
    assert module._first_eigenvalues(graph, 9) == pytest.approx(dense, abs=1e-3)


def test_border_and_corners():
    maps = np.zeros((2, 8, 8), 'float32')
    maps[0, 0, 0] = maps[1, 3:5, 3:5] = 1
    of_class = class_table(as_sample(maps, ['a', 'b']))
    assert of_class.border.tolist() == [1, 0] and of_class.corners.tolist() == [1, 0]
    assert of_class.peak.tolist() == ['top left', 'centre']
    even = class_table(as_sample(np.ones((3, 28, 28), 'float32'), ['a'] * 3))
    assert even.border['a'] == pytest.approx(1 - .75**2, abs=1e-6) and even.corners['a'] == pytest.approx(.25, abs=1e-6)
    assert even.spread['a'] == pytest.approx(0, abs=1e-3)


def test_the_oddest_image():
    x = np.full(40, .3)
    x[17] = .8
    sample = as_sample(blobs(x, x), ['a'] * 40)
    assert odd_images(sample).argmax() == 17
    assert np.isnan(odd_images(as_sample(blobs([.1, .9], [.1, .9]), ['a', 'a']))).all()


def test_odd_images_are_relative_to_their_class():
    "One map of a narrow class is odder than all of a wide one, which has its share of the list at most"
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(.1, .9, 60), rng.normal(.5, .01, 60)])
    x[90] = .6
    sample = as_sample(blobs(x, rng.permutation(x)[:1].repeat(120)), ['wide'] * 60 + ['narrow'] * 60)
    unlike = odd_images(sample)
    assert unlike.argmax() == 90 and np.median(unlike[:60]) == pytest.approx(1)
    rows = module._odd_rows(sample, unlike, 24)
    assert rows[0] == 90 and (rows < 60).sum() == (rows >= 60).sum() == 12


def test_confident_and_wrong():
    columns = dict(prediction=list('aabb'), label=['a', 'b', 'a', ''], probability=[.9, .6, .8, .7], error='')
    table = pd.DataFrame(columns)
    assert confident_and_wrong(table).tolist() == [2, 1]


# ---- the folder

def test_what_is_written_is_read(images, folder):
    _, names, maps, label = images
    explained = read_explained(folder)
    assert explained.images['image'].tolist() == names
    assert np.abs(explained.maps() - maps).max() <= .5 / 255 + 1e-6
    cells = explained.images[[f'energy_{r}{c}' for r in range(4) for c in range(4)]].to_numpy().reshape(-1, 4, 4)
    exact = maps.reshape(40, 4, 7, 4, 7).sum((2, 4))
    assert cells == pytest.approx(exact / exact.sum((1, 2), keepdims=True), abs=2e-3)
    assert explained.images[['width', 'height']].iloc[0].tolist() == [30, 20]
    regions = json.loads(explained.images['regions'][0])
    assert 0 <= regions[0][0] < regions[0][2] <= 30 and 0 <= regions[0][1] < regions[0][3] <= 20


def test_writing_refuses_what_does_not_fit(images, tmp_path):
    root, names, maps, label = images
    probability = np.ones(40)
    with pytest.raises(ValueError, match=re.escape('maps: 39 for 40 images')):
        write_explained(tmp_path/'x', root, names, maps[:39], label, probability)
    with pytest.raises(ValueError, match=re.escape('prediction: 1 for 40 images')):
        write_explained(tmp_path/'x', root, names, maps, label[:1], probability)
    with pytest.raises(ValueError, match=re.escape('maps must lie in [0,1], got 0..2')):
        write_explained(tmp_path/'x', root, names, np.where(maps > .9, 2, 0), label, probability)
    with pytest.raises(ValueError, match=re.escape('maps must be (n,h,w) with n > 0, got (40, 1, 28, 28)')):
        write_explained(tmp_path/'x', root, names, maps[:, None], label, probability)
    with pytest.raises(ValueError, match='maps must lie in'):
        write_explained(tmp_path/'x', root, names, np.full_like(maps, np.nan), label, probability)
    assert not (tmp_path/'x').exists()


def test_a_sample_of_each_class(folder):
    explained = read_explained(folder)
    sample = sample_maps(explained, per_class=5)
    assert len(sample) == 20 and sorted(sample.rows) == sample.rows.tolist()
    assert sample.n_of_class == dict(ant=9, bee=11, cat=10, dog=10)
    assert sample_maps(explained, 5, 1).rows.tolist() != sample.rows.tolist()
    with pytest.raises(ValueError, match='per_class=0: take at least one image of each class'):
        sample_maps(explained, 0)


@pytest.mark.slow
def test_maps_of_other_shapes(images, tmp_path):
    "Maps that are not square, or smaller than those that are compared"
    root, names, _, label = images
    for size in ((6, 40), (40, 6), (3, 3)):
        maps = np.random.default_rng(0).random((40, *size), dtype='float32')
        folder = write_explained(tmp_path/f'x{size}', root, names, maps, label, np.ones(40))
        sample = sample_maps(read_explained(folder))
        assert sample.maps.shape == (40, min(28, *size), min(28, *size))
        make_report(folder, tmp_path/'r.html', trust_images=0)


# ---- objects

def test_energy_off_the_object(folder):
    explained = read_explained(folder)
    sample = sample_maps(explained)
    whole = pd.DataFrame(dict(image=explained.images['image'], x0=0, y0=0, x1=30, y1=20))
    assert energy_off_object(sample, explained.images, whole).energy_off.max() < 1e-6
    left = energy_off_object(sample, explained.images, whole.assign(x1=15))
    expected = sample.maps[:, :, 14:].sum((1, 2))
    assert left.energy_off['cat'] == pytest.approx(expected[sample.classes == 'cat'].mean(), abs=1e-5)
    assert left.area_off.tolist() == pytest.approx([.5] * 4)
    both = pd.concat([whole.assign(x1=15), whole.assign(x0=15)])  # two objects in an image
    assert energy_off_object(sample, explained.images, both).energy_off.max() < 1e-6


def test_masks_are_as_boxes(folder, tmp_path):
    explained = read_explained(folder)
    sample = sample_maps(explained)
    masks = tmp_path/'masks'
    masks.mkdir()
    for name in explained.images['image']:
        mask = np.zeros((20, 30), 'uint8')
        mask[:, :15] = 255
        Image.fromarray(mask).save(masks/name)
    left = pd.DataFrame(dict(image=explained.images['image'], x0=0, y0=0, x1=15, y1=20))
    by_mask = energy_off_object(sample, explained.images, masks=masks)
    by_box = energy_off_object(sample, explained.images, boxes=left)
    pd.testing.assert_frame_equal(by_mask, by_box, atol=1e-3)
    Image.new('L', (10, 10)).save(masks/'07.png')
    message = '07.png has 10 x 10 pixels, its image 30 x 20; make the mask as large as the image'
    with pytest.raises(ValueError, match=re.escape(message)):
        energy_off_object(sample, explained.images, masks=masks)


@pytest.mark.parametrize('text, message', [
    ('image,x0,y0,x1\na.png,0,0,1\n', "lacks the column 'y1'; give image, x0, y0, x1, y1"),
    ('image,x0,y0,x1,y1\n03.png,5,0,5,9\na.png,0,0,5,9\n', 'boxes: all 1 boxes of images of this run have no area'),
    ('path,xmin,ymin,xmax,ymax\n03.png,0,0,wide,9\n', 'the box of 03.png is 0, 0, wide, 9; give numbers, in pixels'),
    ('image,x0,y0,x1,y1\na.png,0,0,wide,9\n',
     "none is of an image of this run; names are as in its table, such as '00.png'"),
    ('', 'is no table: No columns to parse from file')])
def test_boxes_that_are_none(folder, tmp_path, text, message):
    (tmp_path/'boxes.csv').write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_report(folder, tmp_path/'r.html', boxes=tmp_path/'boxes.csv')
    assert not (tmp_path/'r.html').exists()


def test_flat_boxes_are_left_out_and_other_images_do_not_matter(folder, tmp_path):
    lines = [f'{i:02}.png,0,0,15,20' for i in range(20)] + ['20.png,5,0,5,9', '21.png,,,,', 'other.png,0,0,wide,9']
    (tmp_path/'boxes.csv').write_text('\n'.join(['path,xmin,ymin,xmax,ymax', *lines]))
    report = make_report(folder, tmp_path/'r.html', boxes=tmp_path/'boxes.csv', trust_images=0)
    assert report.objects.images.sum() == 20 and report.objects.area_off.tolist() == pytest.approx([.5] * 2)
    assert '2 boxes without area were left out.' in words(report.path)


def test_boxes_and_masks_that_are_not_there(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="boxes='nowhere.csv': no such file"): read_boxes('nowhere.csv')
    with pytest.raises(NotADirectoryError, match='masks=.*nowhere.*: no such folder'):
        make_report(folder, tmp_path/'r.html', masks=tmp_path/'nowhere')


# ---- trust

class Corner(nn.Module):
    "Class 1 where the lower right corner is bright, else class 0; other pixels make it unsure"
    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        bright = x[:, :, 24:, 24:].mean((1, 2, 3)) + 0 * self.features(x).mean((1, 2, 3))
        return torch.stack([torch.zeros_like(bright), 8 * bright - 2], 1)


@pytest.fixture
def corner(tmp_path):
    "Images with a bright corner, maps of the corner or of the opposite one, and a model that looks at the corner"
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 60, (32, 32, 3), dtype='uint8')
        pixels[24:, 24:] = 250
        Image.fromarray(pixels).save(tmp_path/f'{i:02}.png')
    model = AntehocModel(Corner(), torch.rand(2, 3, 32, 32), layers=['features.0', 'features.2'], cells='pixels',
                         border=False, mean=[0.] * 3, std=[1.] * 3, meta=dict(vocab=['no', 'yes'], size=[32, 32]))
    names = [f'{i:02}.png' for i in range(24)]
    def write(x):
        maps = blobs([x] * 24, [x] * 24)
        return write_explained(tmp_path/f'at{x}', tmp_path, names, maps, ['yes'] * 24, np.ones(24))
    return write, model.eval(), names


def test_true_maps_are_better_than_controls_and_wrong_ones_are_not(corner, tmp_path):
    write, model, names = corner
    pictures = [Image.open(tmp_path/name) for name in names]
    true, wrong = (trust_in_maps(read_explained(write(x)), model, range(24), pictures) for x in (.88, .12))
    assert true.better_than['random patches'] and true.better_than['random pixels']
    assert true.table['drop']['maps'] < 10 < 50 < wrong.table['drop']['maps']
    assert not any(wrong.better_than.values())
    assert (true.table.low <= true.table['drop']).all() and (true.table['drop'] <= true.table.high).all()


def test_the_drop_of_one_logit_is_that_of_its_probability():
    model = SimpleNamespace(task='binary', explained=lambda y: y, gives_probabilities=False)
    change = module._change(model, torch.tensor([[2.], [-2.]]), torch.tensor([[0.], [0.]]), None)
    likely = torch.tensor(2.).sigmoid().item()
    assert change.tolist() == pytest.approx([1 - .5 / likely] * 2)


def test_banners(corner, tmp_path):
    write, model, _ = corner
    make_report(write(.12), tmp_path/'r.html', model)
    page = (tmp_path/'r.html').read_text()
    assert 'Do not rely on this report: its maps are not surely better than random patches.' in page
    assert 'banner bad' in page and 'role="alert"' in page
    report = make_report(write(.88), tmp_path/'r.html', model)
    assert 'Do not rely' not in (tmp_path/'r.html').read_text() and report.trust.n == 24
    table = pd.DataFrame(dict(drop=[10., 11.], low=[9., 9.], high=[12., 12.]), index=['maps', 'plain average'])
    better = {'plain average': False, 'random patches': True, 'random pixels': True}
    kind, text = module._trust_banner(module.Trust(table, 9, better), '')
    assert kind == 'warning' and text.startswith('The maps are not surely better than a plain average of the layers.')
    kind, text = module._trust_banner(module.Trust(table, 9, dict.fromkeys(better, True)), '')
    assert kind == 'good' and 'maps 10.0\u00a0%, plain average 11.0\u00a0%' in text


def test_the_drop_is_that_of_the_target(corner, tmp_path, monkeypatch):
    "Of maps that were made for another class than the predicted one"
    write, model, names = corner
    folder, asked = change(write(.12), target='no'), []
    explain = AntehocModel.explain
    monkeypatch.setattr(AntehocModel, 'explain', lambda *args, **kwargs: asked.append(kwargs) or explain(
        *args, **kwargs))
    report = make_report(folder, tmp_path/'r.html', model)
    assert asked == [dict(target='no')] * 2
    assert report.trust.table['drop']['maps'] < 1  # the corner is black, so that 'no' becomes probable; of 'yes' > 50
    page = words(report.path)
    assert 'maps of the class no, whatever is predicted' in page
    assert 'the probability of the class no, which the maps are about, falls' in page


def test_the_model_that_the_run_names_goes_to_the_device(corner, tmp_path, monkeypatch):
    write, model, _ = corner
    (tmp_path/'model').mkdir()
    monkeypatch.setattr(module, 'load_model', lambda path: model)
    moved = []
    monkeypatch.setattr(AntehocModel, 'to', lambda self, device: moved.append(device) or self)
    folder = change(write(.88), model=str(tmp_path/'model'))
    result = CliRunner().invoke(app, ['report', str(folder), '--out', str(tmp_path/'r.html'), '--device', 'cpu'])
    assert result.exit_code == 0 and [str(device) for device in moved] == ['cpu']


def test_trust_is_not_measured_on_few_images(corner, tmp_path):
    write, model, _ = corner
    folder = write(.88)
    assert make_report(folder, tmp_path/'r.html', model, trust_images=19).trust is None
    assert 'was not measured: too few images (19), at least 20 are needed.' in words(tmp_path/'r.html')
    assert make_report(folder, tmp_path/'r.html', model, trust_images=20).trust.n == 20


def test_models_that_did_not_make_the_maps(corner, tmp_path):
    write, model, _ = corner
    folder = change(write(.88), model_digest='0' * 64)
    with pytest.raises(ValueError, match='model: this is not the model that made the maps'):
        make_report(folder, tmp_path/'r.html', model)
    assert make_report(change(folder, model_digest=weights_digest(model)), tmp_path/'r.html', model).trust.n == 24
    with pytest.raises(FileNotFoundError, match='is not a saved antehoc_nb model'):
        make_report(folder, tmp_path/'r.html', tmp_path/'nowhere')
    report = make_report(change(folder, model=str(tmp_path/'gone')), tmp_path/'r.html')
    assert report.trust is None and 'the model is no longer at' in (tmp_path/'r.html').read_text()
    (tmp_path/'none').mkdir()
    make_report(change(folder, model=str(tmp_path/'none')), tmp_path/'r.html')
    assert 'could not be loaded; give the model as model=' in (tmp_path/'r.html').read_text()


# ---- the page

def words(path): return ' '.join(re.sub(r'<script.*?</script>', '', path.read_text(), flags=re.S).split())


def test_a_report(folder, tmp_path):
    report = make_report(folder, tmp_path/'new'/'report.html', trust_images=0)
    page = words(report.path)
    assert report.wrong == ['00.png'] and len(report.odd) == 24
    assert 'No group was tested: every class has too few images.' in page
    assert '1 of 40 images with a label are predicted as another class.' in page
    assert 'was not measured: it was not asked for' in page
    assert repr(report) == f'Report({str(report.path)!r}, 0 candidates)'
    assert all(len(group.images) == len(group.members) for group in report.groups)
    assert sorted(sum((group.images for group in report.groups), [])) == [f'{i:02}.png' for i in range(40)]
    assert not [*report.path.parent.glob('.*')]
    data = json.loads(re.search(r'id="data">(.*?)</script>', report.path.read_text(), flags=re.S)[1])
    boxes = np.array([box for picture in data['pictures'] for box in picture['regions']])
    assert len(boxes) and boxes.min() >= 0 and boxes.max() <= 1 and (boxes[:, :2] < boxes[:, 2:]).all()
    again = make_report(folder, tmp_path/'again.html', trust_images=0)
    assert again.path.read_bytes() == report.path.read_bytes()


def test_the_page_asks_for_nothing(folder, tmp_path):
    page = make_report(folder, tmp_path/'r.html', trust_images=0).path.read_text()
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', re.sub(r'<script.*?</script>', '', page, flags=re.S))


@pytest.mark.parametrize('n', [1, 2, 3])
def test_very_few_images(images, tmp_path, n):
    root, names, maps, label = images
    folder = write_explained(tmp_path/'x', root, names[:n], maps[:n], label[:n], np.ones(n), label[:n])
    page = words(make_report(folder, tmp_path/'r.html').path)
    assert 'There is one predicted class only' in page and 'no candidate is named' in page


def test_one_class_of_many(images, tmp_path):
    root, names, _, _ = images
    rng = np.random.default_rng(0)
    x = np.where(np.arange(40) < 15, .9, .3) + rng.normal(0, .02, 40)
    folder = write_explained(tmp_path/'x', root, names, blobs(x, x), ['ant'] * 40, np.ones(40))
    report = make_report(folder, tmp_path/'r.html')
    assert {*report.groups[0].members} == {*range(15)}
    assert len(report.groups) > 1 and not report.candidates and np.isnan(report.groups[0].score)
    assert report.groups[0].distance > .9
    assert 'The labels are not known' in words(report.path)


def test_without_maps(folder, tmp_path):
    "The energies of the grid take their place"
    change(folder, maps='none', map_size=None)
    shutil.rmtree(folder/'maps')
    report = make_report(folder, tmp_path/'r.html')
    assert 'no maps were stored: energies of a 4 x 4 grid take their place' in words(report.path)
    assert report.groups[0].map.shape == (4, 4)


@pytest.mark.parametrize('entries', [dict(classes=None), dict(task='regression', classes=None), dict(model='')])
def test_models_without_classes(folder, tmp_path, entries):
    report = make_report(change(folder, **entries), tmp_path/'r.html')
    assert report.classes.index.tolist() == (['all images'] if 'task' in entries else CLASSES)
    page = words(report.path)
    if 'task' in entries:
        assert 'The predictions (regression) are no classes' in page and '40 images, accuracy' not in page
        assert 'one predicted class' not in page and 'are predicted as' not in page
        assert '<b>Change of the output</b>' in page and 'the predicted class falls' not in page
    else: assert 'the probability of the predicted class falls' in page and '4 predicted classes' in page


def test_several_labels(images, tmp_path):
    "A label is right if it is among those that are predicted; the class is the first of these"
    root, names, maps, _ = images
    predicted = ['ant;bee', 'bee', 'bee;ant', 'cat', 'none'] * 8
    label = ['bee', 'ant', 'ant;bee', '', 'cat'] * 8
    folder = write_explained(tmp_path/'x', root, names, maps, predicted, np.ones(40), label)
    report = make_report(change(folder, task='multi-label'), tmp_path/'r.html')
    assert report.wrong == sorted(name for name, other in zip(names, predicted, strict=True)
                                  if other in ('none', 'bee'))
    assert report.classes.images.to_dict() == dict(ant=8, bee=16, cat=8, none=8)
    assert report.classes.accuracy['ant'] == 1 and report.classes.accuracy['bee'] == .5
    assert '16 of 32 images with a label are predicted as another class.' in words(report.path)


def test_images_that_cannot_be_read(images, folder, tmp_path):
    root, names, _, _ = images
    (root/names[3]).write_bytes(b'no image')
    for name in names[4:]: (root/name).unlink()
    page = words(make_report(folder, tmp_path/'r.html').path)
    assert 'of the images below could not be read; their maps are shown alone' in page
    with pytest.raises(NotADirectoryError, match='root=.*: no such folder'):
        make_report(folder, tmp_path/'r.html', root=tmp_path/'nowhere')


@pytest.mark.parametrize('kind', ['tar', 'datasets'])
def test_photographs_of_a_tar_or_a_data_set(images, folder, tmp_path, kind):
    root, names, _, _ = images
    if kind == 'tar':
        pytest.importorskip('webdataset')
        with tarfile.open(tmp_path/'x.tar', 'w') as tar:
            for name in names: tar.add(root/name, name)
        change(folder, root=str(tmp_path/'gone.tar'), source='tar')
        source, root = None, tmp_path/'x.tar'
    else:
        datasets = pytest.importorskip('datasets')
        source = datasets.Dataset.from_dict(dict(image=[str(root/name) for name in names]))
        source = source.cast_column('image', datasets.Image())
        change(folder, root='', source='datasets')
        root = None
        page = words(make_report(folder, tmp_path/'without.html').path)
        assert 'the images are of a data set that was in memory' in page
        with pytest.raises(ValueError, match="images came from 'datasets', the source is 'folder'"):
            read_explained(folder).open_image(0, tmp_path)
        with pytest.raises(ValueError, match='40 images were explained, the source has 39; give the one that was'):
            read_explained(folder).open_image(0, source.select(range(39)))
        source.save_to_disk(tmp_path/'moved')
        moved = make_report(folder, tmp_path/'moved.html', root=tmp_path/'moved').path
        assert 'could not be read' not in words(moved) and moved.read_text().count('data:image/jpeg') > 20
    report = make_report(folder, tmp_path/'r.html', root=root, source=source)
    page = report.path.read_text()
    pictures = json.loads(re.search(r'id="data">(.*?)</script>', page, flags=re.S)[1])['pictures']
    assert len(pictures) > 20 and all(picture['photo'] for picture in pictures)
    assert f'40 images of {tmp_path/"gone.tar" if kind == "tar" else "a data set in memory"}' in page


def test_rows_with_errors(folder, tmp_path):
    table = pd.read_csv(folder/'images.csv', dtype=object, keep_default_na=False)
    table.loc[39, 'error'] = 'not an image, or damaged'
    table.loc[39, ['prediction', 'probability', 'shard', 'position']] = ''
    np.savez(folder/'maps'/'00000.npz', maps=np.load(folder/'maps'/'00000.npz')['maps'][:39])
    table.to_csv(folder/'images.csv', index=False)
    assert '1 could not be read' in words(make_report(folder, tmp_path/'r.html').path)
    table['error'] = 'gone'
    table.to_csv(folder/'images.csv', index=False)
    with pytest.raises(ValueError, match='none of its 40 images could be explained'):
        make_report(folder, tmp_path/'r.html')


def test_empty_maps(images, tmp_path):
    root, names, maps, label = images
    maps[3] = 0
    folder = write_explained(tmp_path/'x', root, names, maps, label, np.ones(40))
    assert '1 with an empty map' in words(make_report(folder, tmp_path/'r.html').path)
    empty = write_explained(tmp_path/'y', root, names, 0 * maps, label, np.ones(40))
    with pytest.raises(ValueError, match='every map is empty; explain the images again'):
        make_report(empty, tmp_path/'r.html')


def test_folders_that_are_none(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere is no folder of explain_many'):
        make_report(tmp_path/'nowhere', tmp_path/'r.html')
    with pytest.raises(ValueError, match='has format 2, this version of antehoc_nb reads format 1'):
        make_report(change(folder, format=2), tmp_path/'r.html')
    change(folder, format=1)
    (folder/'maps'/'00000.npz').unlink()
    with pytest.raises(FileNotFoundError, match='00000.npz is missing'): make_report(folder, tmp_path/'r.html')
    assert not (tmp_path/'r.html').exists()


def test_places_that_cannot_be_written(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=re.escape("out='report': the name must end in .html, as in report.html")):
        make_report(folder, 'report')
    with pytest.raises(IsADirectoryError, match='is a folder; give the name of a file, such as report.html'):
        make_report(folder, tmp_path)
    (tmp_path/'file').write_text('')
    with pytest.raises(NotADirectoryError, match='file is a file, not a folder'):
        make_report(folder, tmp_path/'file'/'r.html')
    monkeypatch.setattr(module.os, 'access', lambda *args: False)
    with pytest.raises(PermissionError, match='no permission to write there'): make_report(folder, tmp_path/'r.html')


def test_a_full_disk_keeps_the_old_report(folder, tmp_path, monkeypatch):
    (tmp_path/'r.html').write_text('old')
    write = Path.write_text
    def half(self, text, **kwargs):
        write(self, text[:100], **kwargs)
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Path, 'write_text', half)
    with pytest.raises(OSError, match='No space left'): make_report(folder, tmp_path/'r.html')
    assert (tmp_path/'r.html').read_text() == 'old' and not [*tmp_path.glob('.*')]


def test_without_the_extra(folder, tmp_path, monkeypatch):
    module._bundled_vega.cache_clear()
    monkeypatch.setitem(__import__('sys').modules, 'vl_convert', None)
    with pytest.raises(ImportError, match=re.escape(
            "the plots of a report need vl-convert-python: pip install 'antehoc_nb[report]'")):
        make_report(folder, tmp_path/'r.html')
    monkeypatch.undo()
    module._bundled_vega.cache_clear()


def test_names_with_markup_are_text(images, tmp_path):
    root, names, maps, _ = images
    label = ['<img src=x onerror=alert(1)>' if i % 2 else "</script><script>alert('2')</script>" for i in range(40)]
    folder = write_explained(tmp_path/'x', root, names, maps, label, np.ones(40), label)
    page = make_report(folder, tmp_path/'r.html', trust_images=0).path.read_text()
    assert '<img src=x' not in page and "<script>alert('2')" not in page


def test_the_number_of_pictures_is_limited(folder, tmp_path):
    def pictures(most):
        page = make_report(folder, tmp_path/'r.html', most_pictures=most, trust_images=0).path.read_text()
        return len(json.loads(re.search(r'id="data">(.*?)</script>', page, flags=re.S)[1])['pictures'])
    assert pictures(5) == 5 and pictures(0) == 0 and pictures(100) <= 40
    assert 'The file holds 100 pictures' not in words(tmp_path/'r.html')


def test_pictures_are_shared_over_the_groups(tmp_path):
    "Of many classes the last have pictures too; the page says that there are fewer"
    names = [f'{i:03}.png' for i in range(160)]
    x = np.random.default_rng(0).uniform(.2, .8, (2, 160))
    folder = write_explained(tmp_path/'x', tmp_path, names, blobs(*x, side=8), [f'c{i % 20}' for i in range(160)],
                             np.ones(160))
    page = make_report(folder, tmp_path/'r.html', most_pictures=60, trust_images=0).path.read_text()
    counts = [part.count('class="thumb"') for part in re.findall('<ul class="thumbs">(.*?)</ul>', page, flags=re.S)]
    assert counts == [8, 8, 7] + [2] * 10 + [1] * 10 + [7]
    assert 'The file holds 60 pictures at most, so lists of images are shorter than usual; allow more' in page
    assert module._fair_counts(10, [8, 8, 1, 4]) == [3, 3, 1, 3] and module._fair_counts(2, [3, 3, 3]) == [1, 1, 0]


def test_the_command(corner, tmp_path, monkeypatch):
    write, _, _ = corner
    monkeypatch.chdir(tmp_path)
    folder = str(write(.88))
    def antehoc(*args, code=0):
        result = CliRunner().invoke(app, ['report', *map(str, args)], prog_name='antehoc')
        assert result.exit_code == code, result.output
        return result.output
    assert 'open report.html in a browser' in antehoc(folder)
    facts = json.loads(antehoc(folder, '--json', '--out', 'two.html').splitlines()[-1])
    assert facts['report'] == 'two.html' and facts['candidates'] == [] and Path('two.html').exists()
    assert 'antehoc: error: nowhere is no folder of explain_many' in antehoc('nowhere', code=1)
    assert "the name must end in .html" in antehoc(folder, '--out', 'report', code=1)
    assert 'antehoc: error: nowhere: no such model folder' in antehoc(folder, '--model', 'nowhere', code=1)
    assert '--boxes b.csv: no such file' in antehoc(folder, '--boxes', 'b.csv', code=1)


# ---- slow: a network that learnt a planted tag, and the page in a browser

@pytest.mark.slow
def test_a_planted_tag_is_found(tmp_path):
    "A small CNN learns a tag on 60 % of one class; the report ranks that group first"
    path = Path(__file__).resolve().parents[2]/'benchmarks'/'planted_tag.py'
    spec = importlib.util.spec_from_file_location('planted_tag', path)
    planted_tag = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted_tag)
    valid = PhotoDigits(200, planted_tag.SIZE, 0, 'test')
    images, labels, tagged = planted_tag.planted(1000, 0, planted_tag.SHARE)
    few = PhotoDigits(50, planted_tag.SIZE, 0, 'test')
    model = planted_tag.train(images, labels, few, None, 3, 0)
    called = planted_tag.accuracies(model, valid)
    assert called['digit with tag'] > .9 and called['other digits with tag'] > called['other digits'] + .5
    found = planted_tag.explain(model, images, with_gradcam=False)
    folder = planted_tag.write_folder(tmp_path, images, labels, found['probabilities'], found['ours'])
    scored = planted_tag.score(folder, tagged)
    assert scored['rank'] == 1 and scored['candidates'] >= 1 and scored['tagged_in_group'] > .8


@pytest.fixture(params=[400, 1400])
def tab(browser, request):
    "A tab that notes errors and requests"
    page = browser.new_page(viewport=dict(width=request.param, height=900))
    page.told, page.asked = [], []
    page.on('pageerror', lambda error: page.told.append(str(error)))
    own = 'willReadFrequently'  # of the test's reading
    page.on('console', lambda message: page.told.append(message.text) if own not in message.text else None)
    page.on('request', lambda ask: page.asked.append(ask.url) if not ask.url.startswith(('data:', 'file:')) else None)
    yield page
    page.close()
    assert not page.told and not page.asked


@pytest.mark.slow
def test_the_page_in_a_browser(tab, images, tmp_path):
    root, names, maps, label = images
    label = [*label[:-1], '<img src=x onerror=console.log(1)>']
    folder = write_explained(tmp_path/'x', root, names, maps, label, np.linspace(.5, 1, 40), label)
    boxes = pd.DataFrame(dict(image=names, x0=0, y0=0, x1=15, y1=20))
    make_report(folder, tmp_path/'r.html', boxes=boxes)
    tab.goto((tmp_path/'r.html').as_uri())
    tab.wait_for_selector('.vega svg')
    assert tab.evaluate('document.documentElement.scrollWidth <= innerWidth')
    assert not tab.evaluate('[...document.images].filter(image => !image.alt).length')
    right = 'e => { const r = document.createRange(); r.selectNodeContents(e); return r.getBoundingClientRect().right }'
    ends = [tab.locator(f'#table-objects {cell}').first.evaluate(right)
            for cell in ('th:nth-child(2) button', 'td:nth-child(2)')]
    assert ends[0] == pytest.approx(ends[1], abs=1)
    tab.fill('input[data-table=table-groups]', 'DOG')
    assert tab.locator('#table-groups tbody tr:visible').count() == 1
    assert tab.text_content('#count-groups') == '1 row'
    tab.fill('input[data-table=table-groups]', '')
    tab.click('#table-classes th:nth-child(2) button')
    counts = tab.locator('#table-classes tbody td:nth-child(2)').all_text_contents()
    assert counts == sorted(counts, key=int, reverse=True)
    assert tab.get_attribute('#table-classes th:nth-child(2)', 'aria-sort') == 'descending'
    tab.focus('#table-classes th:nth-child(2) button')
    tab.keyboard.press('Enter')
    assert tab.locator('#table-classes tbody td:nth-child(2)').all_text_contents() == sorted(counts, key=int)


@pytest.mark.slow
def test_thumbnails_open_by_mouse_and_keyboard(tab, folder, tmp_path):
    make_report(folder, tmp_path/'r.html')
    tab.goto((tmp_path/'r.html').as_uri())
    thumb = tab.locator('#odd .thumb').first
    thumb.focus()
    tab.keyboard.press('Enter')
    assert tab.is_visible('#viewer')
    title = tab.text_content('#viewer-title')
    tab.wait_for_function('document.querySelector("[data-view=energy]").width === 60')
    def mean(view):
        return tab.evaluate(f'''() => {{
            const canvas = document.querySelector("[data-view={view}]");
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return data.reduce((sum, value) => sum + value, 0) / data.length}}''')
    assert mean('energy') < mean('photo') and mean('map') != mean('photo')
    white = '''() => {
        const canvas = document.querySelector("[data-view=map]");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return data.filter((value, i) => i % 4 === 0 && value + data[i + 1] + data[i + 2] === 765).length}'''
    assert tab.evaluate(white) > 10  # the outline of a region
    shares = '[...document.querySelectorAll(".thumb .share")].every(e => e.scrollWidth <= e.clientWidth + 1)'
    assert tab.evaluate(shares)
    tab.keyboard.press('ArrowRight')
    assert tab.text_content('#viewer-title') != title and tab.text_content('#place') == '2 of 24'
    tab.keyboard.press('Escape')
    assert not tab.is_visible('#viewer')
    assert tab.evaluate('document.activeElement.classList.contains("thumb")')
