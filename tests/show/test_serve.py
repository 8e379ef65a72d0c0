"""The web page: what it answers, what it refuses, what it is in a browser, and as a Space."""
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from antehoc_nb.cli import app
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.evaluate.explainers import explain_with
from antehoc_nb.show import serve as module
from antehoc_nb.show.plots import concept_regions
from antehoc_nb.show.serve import NOTHING, PhotoPage, free_port, open_upload, serve, write_space
from antehoc_nb.train.archs import build_cnn

pytestmark = pytest.mark.usefixtures('one_thread')
KINDS = 'JPEG, PNG, WebP, GIF, BMP or TIFF'
NAMES = ['ant', 'bee', 'cat']


def make_model(n_out=3, class_specific=None, weight_net='auto', **meta):
    torch.manual_seed(0)
    meta = dict(size=[48, 48], vocab=NAMES) | meta
    model = AntehocModel(build_cnn('small_cnn', n_out=n_out), torch.rand(2, 3, 48, 48), eta=3, weight_net=weight_net,
                         class_specific=class_specific, mean=[.5] * 3, std=[.25] * 3, meta=meta).eval()
    for parameter in model.weight_net.parameters(): nn.init.normal_(parameter, std=.2)
    return model


def photograph(file, size=(120, 90), seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(file)
    return file


@pytest.fixture(scope='module')
def model(): return make_model()


@pytest.fixture(scope='module')
def page(model): return PhotoPage(model)


@pytest.fixture
def photo(tmp_path): return photograph(tmp_path/'photo.png')


# --- what comes in

def write_bytes(file, data):
    file.write_bytes(data)
    return file


def cut_png(file):
    Image.effect_noise((200, 200), 50).save(file)
    return write_bytes(file, file.read_bytes()[:9000])


def blank(size): return lambda file: Image.new('1', size).save(file) or file


BAD = {
    'empty.png': (lambda file: write_bytes(file, b''), 'the file is empty'),
    'notes.png': (lambda file: write_bytes(file, b'text'), f'not an image that can be read; give a {KINDS}'),
    'drawing.svg': (lambda file: write_bytes(file, b'<svg/>'), f'not an image that can be read; give a {KINDS}'),
    'mega.png': (blank((12_000, 9_000)), '12,000 x 9,000 pixels, more than the 50 million that the page takes; make it '
                 'smaller'),
    'bomb.png': (blank((20_000, 20_000)), 'it has hundreds of millions of pixels, more than the 50 million that the '
                 'page takes; make it smaller'),
    'large.bmp': (lambda file: write_bytes(file, b'BM' + bytes(22 * 2**20)), '22.0 MB, more than the 20 MB that the '
                  'page takes'),
    'icon.ico': (lambda file: Image.new('RGB', (32, 32)).save(file) or file,
                 f'not an image that can be read; give a {KINDS}'),
    'gone.png': (lambda file: file, 'the file is not there any more; give it again'),
}


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('name', BAD)
def test_what_is_no_photograph_gets_a_sentence(page, tmp_path, name):
    write, problem = BAD[name]
    file = write(tmp_path/name)
    with pytest.raises(ValueError) as error: open_upload(file)
    assert str(error.value) == f'{name}: {problem}'
    answer = page.explain(file)
    assert answer.message == f'{name}: {problem}'
    assert answer.explanation is answer.overlay is answer.energy is answer.regions is answer.table is None


def test_a_damaged_image(page, tmp_path):
    assert page.explain(cut_png(tmp_path/'cut.png')).message.startswith('cut.png: the image is damaged or cut short (')


@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp', 'gif', 'bmp', 'tiff'])
def test_every_kind_is_read(page, tmp_path, ending):
    assert page.explain(photograph(tmp_path/f'a.{ending}')).message.startswith('Predicted: ')


def test_photographs_of_phones_and_transparent_ones(model, page, tmp_path):
    sideways = Image.open(photograph(tmp_path/'a.jpg', (60, 40)))
    exif = Image.Exif()
    exif[274] = 6
    sideways.save(tmp_path/'sideways.jpg', exif=exif)
    sideways.save(tmp_path/'two.jpg', format='MPO', save_all=True, append_images=[sideways.copy()])
    Image.new('RGBA', (30, 20), (0, 0, 0, 0)).save(tmp_path/'clear.png')
    assert page.explain(tmp_path/'sideways.jpg').size == (40, 60)
    assert page.explain(tmp_path/'two.jpg').size == (60, 40)
    assert np.asarray(open_upload(tmp_path/'clear.png')).min() == 255
    for name in ('sideways.jpg', 'two.jpg', 'clear.png'):
        assert torch.equal(page.explain(tmp_path/name).explanation.map, model.explain(tmp_path/name).map)


# --- what comes out

def test_the_answer_is_that_of_the_model(model, page, photo):
    answer, e = page.explain(photo, threshold=.6), model.explain(photo)
    assert torch.equal(answer.explanation.map, e.map) and torch.equal(answer.explanation.pred, e.pred)
    assert answer.message == (f'Predicted: {e.labels[0]} ({e.probabilities.max():.1%}). '
                              f'The map is about the class {e.labels[0]}.')
    assert answer.prediction == pytest.approx(dict(zip(NAMES, e.probabilities[0].tolist())))
    assert {picture.size for picture in (answer.overlay, answer.energy, answer.regions)} == {(480, 360)}
    assert answer.size == (120, 90) and answer.compared is None
    regions = concept_regions(e, .6)
    assert [row[0] for row in answer.table] == [region.label for region in regions] and regions
    for row, region in zip(answer.table, regions):
        assert row[1:3] == [round(100 * region.energy, 1), round(100 * region.area, 1)]
        np.testing.assert_allclose(row[3:], np.multiply(region.box, [120 / 48, 90 / 48] * 2), atol=.51)


def test_pictures_are_no_larger_than_needed(page, tmp_path):
    answer = page.explain(photograph(tmp_path/'large.jpg', (3000, 1500)))
    assert answer.overlay.size == (1024, 512) and answer.size == (3000, 1500)
    assert max(row[5] for row in answer.table) > 1024  # boxes are in pixels of the photograph itself


def test_energy_and_regions(page, photo):
    answer = page.explain(photo, threshold=.5)
    shown = np.asarray(answer.explanation.photos[0], dtype=float)
    energy = np.asarray(answer.energy, dtype=float)
    assert (energy <= shown).all()
    i_map = answer.explanation.map[0, 0]
    row, column = divmod(int(i_map.argmin()), 48)
    block = np.s_[int(row * 7.5):int(row * 7.5) + 7, column * 10:column * 10 + 10]
    assert energy[block].mean() < .2 * shown[block].mean()  # the lowest place of the map is dark
    bare = np.asarray(module.region_picture(answer.explanation, .5, regions=[]), dtype=float)
    kept = (i_map >= .5).numpy()
    large = np.asarray(Image.fromarray(kept).resize((480, 360), Image.Resampling.NEAREST))
    np.testing.assert_allclose(bare[large], shown[large])
    np.testing.assert_allclose(bare[~large], shown[~large] / 4, atol=1)


def test_the_slider_needs_no_forward_pass(model, page, photo, monkeypatch):
    answer = page.explain(photo)
    wanted = page.explain(photo, threshold=.3)
    monkeypatch.setattr(page, 'model', None)
    regions, table = page.cut(answer, .3)
    assert table == wanted.table != answer.table and regions == wanted.regions != answer.regions
    assert page.cut(None, .3) == page.cut(module.Answer(), .3) == (None, None)


def test_the_class_of_the_map(model, page, photo):
    assert page.targets == {'the predicted class': -1, 'ant': 0, 'bee': 1, 'cat': 2}
    maps = []
    for number, name in enumerate(NAMES):
        answer = page.explain(photo, target=number)
        assert torch.equal(answer.explanation.map, model.explain(photo, target=name).map)
        assert answer.message.endswith(f'The map is about the class {name}.')
        maps.append(answer.explanation.map)
    assert not torch.equal(maps[0], maps[1])


def test_maps_of_other_explainers(model, page, photo):
    e = model.explain(photo, target='bee')
    for name in page.comparable[:-1]:
        i_map = explain_with(name, model, e.image, e.target)
        shown = module.replace(page.explain(photo).explanation, map=i_map).overlays()[0]
        assert page.explain(photo, 1, name).compared == shown
    assert page.comparable[-1] == NOTHING


def test_grad_cam_needs_torchcam(model, monkeypatch):
    monkeypatch.setattr(module.importlib.util, 'find_spec', lambda name: None)
    assert PhotoPage(model).comparable == ['plain average of layers', NOTHING]
    monkeypatch.setattr(module.importlib.util, 'find_spec', lambda name: SimpleNamespace())
    assert PhotoPage(model).comparable[0] == 'grad-cam'


def test_an_explainer_that_fails_leaves_the_rest(page, photo, monkeypatch):
    def broken(*args): raise RuntimeError('no gradient\nat all')
    monkeypatch.setattr(module, 'explain_with', broken)
    answer = page.explain(photo, compare='plain average of layers')
    assert answer.message.endswith(' No map of plain average of layers: RuntimeError: no gradient.')
    assert answer.compared is None and answer.overlay is not None


def test_an_error_that_was_not_foreseen_is_a_sentence_and_logged(page, photo, monkeypatch, caplog):
    def broken(*args, **kwargs): raise RuntimeError('out of memory\nmore')
    monkeypatch.setattr(page.model, 'explain', broken)
    assert page.explain(photo).message == 'RuntimeError: out of memory'
    assert 'the page has met an error' in caplog.text


# --- tasks

def test_several_labels(photo):
    model = make_model(task='multi-label')
    answer, e = PhotoPage(model).explain(photo), model.explain(photo)
    assert answer.prediction == pytest.approx(dict(zip(NAMES, e.pred.sigmoid()[0].tolist())))
    on = [f'{name} ({p:.1%})' for name, p in e.decisions[0]]
    assert answer.message.startswith(f'Predicted: {", ".join(on) or "no label is on"}. The map is about the class ')
    none = PhotoPage(make_model(task='multi-label', threshold=1.)).explain(photo)
    assert none.message.startswith('Predicted: no label is on. ')


def test_a_regression(photo):
    model = make_model(n_out=2, class_specific=False, task='regression', vocab=['x', 'y'])
    page = PhotoPage(model)
    answer, e = page.explain(photo, compare='regression-cam'), model.explain(photo)
    assert answer.prediction == [['x', e.pred[0, 0].item()], ['y', e.pred[0, 1].item()]]
    assert answer.message == f'Predicted: {e.pred[0, 0]:.5g}, {e.pred[0, 1]:.5g}. The map is about all of the output.'
    assert page.comparable == ['regression-cam', 'plain average of layers', NOTHING] and answer.compared is not None
    assert page.targets == {'the predicted class': -1}  # the page then shows no choice


def test_a_yes_or_no(photo):
    model = make_model(n_out=1, class_specific=False, task='binary', vocab=['no', 'yes'])
    answer, p = PhotoPage(model).explain(photo), model.explain(photo).probabilities.item()
    assert answer.prediction == pytest.approx(dict(no=1 - p, yes=p))


def test_a_class_agnostic_map(photo):
    model = make_model(weight_net='paper')
    page = PhotoPage(model)
    answer = page.explain(photo, compare=page.comparable[0])
    assert answer.message.endswith('The map is about all of the output.') and len(page.targets) == 1
    predicted = model.explain(photo).pred.argmax(1)
    i_map = explain_with(page.comparable[0], model, model.explain(photo).image, predicted)
    assert answer.compared == module.replace(answer.explanation, map=i_map).overlays()[0]


def test_classes_of_one_name_stay_apart(photo):
    page = PhotoPage(make_model(vocab=['crane', 'crane', 'cat']))
    assert list(page.targets) == ['the predicted class', 'crane (0)', 'crane (1)', 'cat']
    assert list(page.explain(photo).prediction) == ['crane (0)', 'crane (1)', 'cat']


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, x, number): return self.convolution(x).mean((2, 3)) * number


def wrapped(cnn, sample=None, channels=3, **meta):
    sample = torch.rand(2, channels, 48, 48) if sample is None else sample
    return AntehocModel(cnn, sample, eta=1, weight_net='mean', meta=dict(size=[48, 48]) | meta)


def test_models_that_have_no_page():
    segmentation = nn.Sequential(nn.Conv2d(3, 2, 3))
    with pytest.raises(ValueError) as error: PhotoPage(wrapped(segmentation, task='segmentation'))
    assert str(error.value) == ('the page shows classes, labels and numbers; the task of this model (Sequential) is '
                                'segmentation: explain it in Python, with model.explain')
    with pytest.raises(ValueError, match=r'which Sequential does not give: the CNN gives no scores of classes \(B,K\)'):
        PhotoPage(wrapped(segmentation))
    with pytest.raises(ValueError, match='gives a CNN one photograph and nothing else, which TwoInputs does not take'):
        PhotoPage(wrapped(TwoInputs(), (torch.rand(2, 3, 48, 48), torch.ones(2, 1))))
    four = nn.Sequential(nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match='the CNN takes images of 4 channels, which no image file has'):
        PhotoPage(wrapped(four, channels=4))


# --- several photographs

def test_several_photographs(model, page, tmp_path):
    good = [photograph(tmp_path/f'{i}.png', seed=i) for i in range(2)]
    bad = write_bytes(tmp_path/'bad.png', b'')
    done = []
    message, gallery, rows = page.explain_batch([good[0], bad, good[1]], .5, lambda share, desc: done.append(share))
    assert message == '2 photographs explained, 1 could not be read: see the table'
    labels = [model.explain(file).labels[0] for file in good]
    assert [text.split(' (')[0] for _, text in gallery] == [f'{i}.png: {label}' for i, label in enumerate(labels)]
    assert rows[1] == ['bad.png', '', '', '', 'the file is empty'] and [row[4] for row in rows[::2]] == ['', '']
    assert rows[0][2:4] == [len(concept_regions(model.explain(good[0]), .5)), rows[0][3]] and rows[0][3] > 0
    assert done == [0, 1 / 3, 2 / 3]
    assert page.explain_batch(None) == page.explain_batch([]) == ('', [], [])
    assert page.explain_batch([bad] * 51) == ('51 files; give 50 at most', [], [])
