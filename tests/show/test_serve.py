"""The web page: what it answers, what it refuses, what it is in a browser, and as a Space."""
import csv
import importlib.metadata
import io
import json
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
import yaml
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from antehoc_nb.cli import app
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.evaluate.explainers import explain_with
from antehoc_nb.show import serve as module
from antehoc_nb.show.plots import concept_regions
from antehoc_nb.show.serve import NOTHING, PhotoPage, free_port, open_upload, serve, write_space, write_table
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


def large_png(size):
    "A writer of a PNG file that says it is of that size; no pixel of it may be decoded"
    def write(file):
        Image.new('1', (1, 1)).save(file)
        header = b'IHDR' + struct.pack('>2I', *size) + bytes((1, 0, 0, 0, 0))
        whole = file.read_bytes()
        return write_bytes(file, whole[:12] + header + struct.pack('>I', zlib.crc32(header)) + whole[33:])
    return write


BAD = {
    'empty.png': (lambda file: write_bytes(file, b''), 'the file is empty'),
    'notes.png': (lambda file: write_bytes(file, b'text'), f'not an image that can be read; give a {KINDS}'),
    'drawing.svg': (lambda file: write_bytes(file, b'<svg/>'), f'not an image that can be read; give a {KINDS}'),
    'mega.png': (large_png((12_000, 9_000)), '12,000 x 9,000 pixels, more than the 50 million that the page takes; '
                 'make it smaller'),
    'bomb.png': (large_png((20_000, 20_000)), 'it has hundreds of millions of pixels, more than the 50 million that '
                 'the page takes; make it smaller'),
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
    answer = page.explain(photograph(tmp_path/'large.jpg', (3000, 1500)), threshold=.05)
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
    _, gallery, rows = page.explain_batch(good[:1], .5, target=1)
    wanted = page.explain(good[0], target=1, threshold=.5)
    assert np.array_equal(gallery[0][0], wanted.overlay) and rows[0][2] == len(wanted.table)
    assert page.explain_batch([bad] * 51) == ('51 files; give 50 at most', [], [])


def test_the_table_as_csv(tmp_path):
    "Names of files come from outside: none becomes a formula, and none that is no text stops the rest"
    names = ['=1+1.jpg', '+a.jpg', '-a.jpg', '@a.jpg', '\ta.jpg', 'a, "b".jpg', 'Bär.jpg', 'x\udcff.jpg']
    written = write_table([[name, 'cat', 1, -.5, ''] for name in names], tmp_path/'maps.csv')
    rows = [*csv.reader(written.read_text(encoding='utf-8-sig').splitlines())]
    assert rows[0] == module.HEADERS
    assert [row[0] for row in rows[1:]] == [f"'{name}" for name in names[:5]] + ['a, "b".jpg', 'Bär.jpg', 'x?.jpg']
    assert {tuple(row[1:]) for row in rows[1:]} == {('cat', '1', '-0.5', '')}


# --- opening the page

def test_a_missing_or_old_gradio(model, monkeypatch):
    def missing(name): raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, 'version', missing)
    monkeypatch.setitem(sys.modules, 'gradio', None)
    for ask in (lambda: serve(model), lambda: write_space('space', model), lambda: PhotoPage(model).make_page()):
        with pytest.raises(ImportError) as error: ask()
        assert str(error.value) == "the web page needs Gradio: pip install 'antehoc_nb[serve]'"
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '3.18.0')
    with pytest.raises(ImportError) as error: serve(model)
    assert str(error.value) == 'the web page is made for Gradio 6, here is 3.18.0: pip install "gradio>=6,<7"'


def test_addresses_that_cannot_be_had(model, monkeypatch):
    monkeypatch.setattr(module, '_gradio', lambda: None)
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError) as error: serve(model, port=port)
    assert str(error.value) == (f"host='127.0.0.1', port={port}: in use, or not an address of this machine; choose "
                                'another port, or leave it out')
    with pytest.raises(OSError) as error: serve(model, '203.0.113.7')
    assert str(error.value) == "host='203.0.113.7': this machine has no such address"
    with pytest.raises(OSError, match=r"host='no.such.invalid': no such address"): serve(model, 'no.such.invalid')
    with pytest.raises(OSError) as error: serve(model, port=70_000)
    assert str(error.value) == 'port=70000: choose one from 1024 to 65535'


def test_loopback_unless_another_host_is_given(model, monkeypatch):
    opened = {}

    class Blocks:
        share_url, local_url = None, 'http://127.0.0.1:7860/'

        def launch(self, **kwargs): opened.update(kwargs)

        def block_thread(self): opened['blocked'] = True

        def close(self, verbose): opened['closed'] = True
    monkeypatch.setattr(module, '_gradio', lambda: SimpleNamespace(themes=SimpleNamespace(Default=dict)))
    monkeypatch.setattr(PhotoPage, 'make_page', lambda self: Blocks())
    said = []
    serve(model, say=said.append)
    assert said == ['the page is at http://127.0.0.1:7860/; Ctrl-C ends it'] and opened['blocked']
    assert opened['server_name'] == '127.0.0.1' and opened['share'] is False and opened['ssr_mode'] is False
    assert opened['max_file_size'] == 20 * 2**20 and 'closed' not in opened
    with pytest.raises(OSError) as error: serve(model, share=True, say=said.append)
    assert str(error.value) == 'share=True: Gradio gave no public address; see to the network, or leave it out'
    assert opened['closed'] and len(said) == 1


# --- a Space

@pytest.fixture
def as_if_gradio_6(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '6.31.0' if name == 'gradio' else version(name))
    monkeypatch.setattr(module, '_gradio', lambda: None)


def test_the_files_of_a_space(model, tmp_path, as_if_gradio_6):
    space = write_space(tmp_path/'space', model, title='Ants: "bees"')
    assert sorted(path.name for path in space.iterdir()) == ['.gitattributes', 'README.md', 'antehoc_nb', 'app.py',
                                                             'model', 'requirements.txt']
    readme = (space/'README.md').read_text()
    front = yaml.safe_load(readme.split('---')[1])
    wanted = dict(title='Ants: "bees"', sdk='gradio', sdk_version='6.31.0', app_file='app.py', pinned=False,
                  python_version='{}.{}'.format(*sys.version_info))
    assert {key: front[key] for key in wanted} == wanted and len(front['short_description']) <= 60
    lines = (space/'requirements.txt').read_text().splitlines()
    pins = dict(line.split('==') for line in lines if '==' in line)
    assert pins['gradio'] == '6.31.0' and pins['torch'] == torch.__version__.split('+')[0]
    assert {'fastai', 'safetensors', 'torchvision', 'pillow', 'tqdm'} <= {*pins} and 'timm' not in pins
    assert not [path for path in space.rglob('*') if path.name == '__pycache__']
    again = AntehocModel.from_pretrained(space/'model')
    assert torch.equal(again.mean, model.mean) and again.meta['vocab'] == NAMES
    write_space(space, model, title='Again')  # its own files it may write again
    assert 'title: "Again"' in (space/'README.md').read_text()


def test_a_space_overwrites_nothing_and_loads_alone(model, tmp_path, as_if_gradio_6):
    (tmp_path/'README.md').write_text('mine')
    with pytest.raises(ValueError) as error: write_space(tmp_path, model)
    assert str(error.value) == f'{tmp_path} holds README.md already; choose another folder, or delete it'
    with pytest.raises(NotADirectoryError) as error: write_space(tmp_path/'README.md', model)
    assert str(error.value) == f'{tmp_path}/README.md is a file; give a folder'
    source = module.Path(module.antehoc_nb.__file__).parents[1]
    with pytest.raises(ValueError, match='where this library lies; choose another folder'): module._copy_library(source)
    unnamed = wrapped(nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.warns(UserWarning, match='cannot be built by name'), \
         pytest.raises(ValueError, match='the CNN was not built by name; it cannot be loaded from the Space alone'):
        write_space(tmp_path/'space', unnamed)
    assert not (tmp_path/'space').exists()


def antehoc(*args, code=0):
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == code, result.output
    return result.output


def test_the_commands(model, tmp_path, as_if_gradio_6, monkeypatch):
    folder = model.save_pretrained(tmp_path/'run'/'model')
    told = json.loads(antehoc('space', tmp_path/'space', tmp_path/'run', '--title', 'Ants', '--json'))
    assert told['out'] == str(tmp_path/'space') and 'app.py' in told['files'] and told['next'].startswith('hf upload ')
    assert "title='Ants'" in (tmp_path/'space'/'app.py').read_text()
    assert f'{tmp_path}/none: no such model folder' in antehoc('serve', tmp_path/'none', code=1)
    opened = []
    blocks = SimpleNamespace(share_url=None, local_url='http://127.0.0.1:7860/',
                             block_thread=lambda: opened.append('wait'))
    monkeypatch.setattr(module, 'serve', lambda *args, **kwargs: opened.append((args[1:], kwargs)) or blocks)
    assert 'the page is at http://127.0.0.1:7860/; Ctrl-C ends it' in antehoc('serve', folder, '--device', 'cpu')
    assert opened == [(('127.0.0.1', None, False, None), dict(block=False, say=None)), 'wait']


# --- in a browser, and as a program

def needs_gradio():
    try: version = importlib.metadata.version('gradio')
    except importlib.metadata.PackageNotFoundError: version = '0'
    if int(version.split('.')[0]) != 6: pytest.skip('no Gradio 6: pip install "gradio>=6,<7"')


@pytest.fixture(scope='module')
def address(model):
    needs_gradio()
    blocks = serve(model, port=free_port(), block=False, say=None)
    yield blocks.local_url
    blocks.close(verbose=False)


@pytest.fixture(params=[1400, 400])
def tab(browser, address, request):
    "A tab of that width. No errors on the console, no requests to other machines"
    tab = browser.new_page(viewport=dict(width=request.param, height=900))
    tab.errors, tab.outside = [], []
    tab.on('console', lambda message: message.type == 'error' and tab.errors.append(message.text))
    tab.on('pageerror', lambda error: tab.errors.append(str(error)))
    tab.on('request', lambda r: r.url.startswith(('http:', 'https:')) and '//127.0.0.1' not in r.url
           and tab.outside.append(r.url))
    tab.goto(address)
    tab.wait_for_selector('#photograph input[type=file]', state='attached', timeout=60_000)
    yield tab
    pictures = os.environ.get('SCREENSHOTS')  # how the names of screenshots begin
    if pictures: tab.screenshot(path=f'{pictures}-{request.param}.png', full_page=True)
    tab.close()
    assert not tab.errors and not tab.outside


def message(tab, text, timeout=60_000):
    tab.wait_for_function('text => document.querySelector("#message textarea").value.includes(text)', arg=text,
                          timeout=timeout)
    return tab.input_value('#message textarea')


def picture(tab, name):
    "The pixels of a picture of the page"
    tab.wait_for_selector(f'#{name} img', timeout=60_000)
    address = tab.get_attribute(f'#{name} img', 'src')
    return address, Image.open(io.BytesIO(tab.request.get(address).body())).convert('RGB')


def changed(tab, name, before):
    tab.wait_for_function('([name, before]) => { const found = document.querySelector(`#${name} img`);'
                          ' return found && found.src != before }', arg=[name, before], timeout=60_000)
    return picture(tab, name)


def close(picture, wanted): # WebP loses a little
    assert picture.size == wanted.size
    return np.abs(np.asarray(picture, dtype=float) - np.asarray(wanted, dtype=float)).mean() < 4


@pytest.mark.slow
def test_in_a_browser(tab, page, photo, tmp_path):
    tab.set_input_files('#photograph input[type=file]', photo)
    wanted = page.explain(photo)
    assert message(tab, 'Predicted') == wanted.message
    shown, overlay = picture(tab, 'map')
    assert close(overlay, wanted.overlay) and close(picture(tab, 'energy-map')[1], wanted.energy)
    before, regions = picture(tab, 'concept-regions')
    assert close(regions, wanted.regions) and picture(tab, 'compared-with')
    assert f'Compared with {page.comparable[0]}' in tab.inner_text('#compared-with')
    tab.fill('#threshold input[type=number]', '0.3')
    tab.press('#threshold input[type=number]', 'Tab')
    assert close(changed(tab, 'concept-regions', before)[1], page.explain(photo, threshold=.3).regions)
    assert picture(tab, 'map')[0] == shown  # nothing else was done again
    other = 'cat' if not wanted.message.startswith('Predicted: cat') else 'ant'
    tab.click('#target input')
    tab.get_by_role('option', name=other).click()
    assert message(tab, f'the class {other}.')
    overlay = page.explain(photo, target=NAMES.index(other)).overlay
    assert close(changed(tab, 'map', shown)[1], overlay) and not close(overlay, wanted.overlay)
    tab.get_by_label('Compare with').click()
    tab.get_by_role('option', name='nothing').click()
    tab.wait_for_function('name => !document.querySelector("#compared-with").innerText.includes(name)',
                          arg=page.comparable[0])
    tab.click('#photograph button[aria-label="Remove Image"]')
    tab.wait_for_selector('#map img', state='detached')
    tab.set_input_files('#photograph input[type=file]', write_bytes(tmp_path/'notes.png', b'text'))
    assert message(tab, 'notes.png') == f'notes.png: {BAD["notes.png"][1]}'
    tab.get_by_role('tab', name='Several photographs').click()
    tab.set_input_files('#photographs input[type=file]', [photo, tmp_path/'notes.png'])
    tab.locator('#photographs [aria-label="Remove this file"]').nth(1).wait_for()  # both files are there
    tab.get_by_role('button', name='Explain', exact=True).click()
    tab.wait_for_function('document.querySelector("#batch-message textarea").value.startsWith("1 photograph expl")')
    tab.wait_for_selector('#maps img')
    assert 'not an image that can be read' in tab.inner_text('#table')
    shown = tab.get_attribute('#maps img', 'src')
    with tab.expect_download() as download: tab.click('#csv')
    table = Path(download.value.path()).read_text(encoding='utf-8-sig').splitlines()
    assert table[0].startswith('image,prediction,regions') and len(table) == 3
    tab.click('#batch-target input')
    tab.get_by_role('option', name=other).click()
    tab.get_by_role('button', name='Explain', exact=True).click()
    tab.wait_for_function('before => { const found = document.querySelector("#maps img");'
                          ' return found && found.src != before }', arg=shown)


@pytest.mark.slow
def test_a_space_runs_from_its_folder_alone(model, page, photo, tmp_path):
    needs_gradio()
    client = pytest.importorskip('gradio_client')
    space = write_space(tmp_path/'space', model, title='Ants')
    port = free_port()
    left_out = 'PYTHONPATH', 'PYTHONDONTWRITEBYTECODE'
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    env |= dict(GRADIO_SERVER_PORT=str(port), GRADIO_SERVER_NAME='127.0.0.1', GRADIO_TEMP_DIR=str(tmp_path/'gradio'))
    command = sys.executable, str(space/'app.py')
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f'the page is at http://127.0.0.1:{port}/; Ctrl-C ends it\n'
        app = client.Client(f'http://127.0.0.1:{port}', verbose=False, download_files=str(tmp_path/'down'))
        answer = app.predict(client.handle_file(photo), 2, NOTHING, .5, api_name='/explain')
        wanted = page.explain(photo, 2, threshold=.5)
        assert answer[0] == wanted.message and close(Image.open(answer[2]).convert('RGB'), wanted.overlay)
        bad = app.predict(client.handle_file(write_bytes(tmp_path/'a.png', b'')), api_name='/explain')
        assert bad[0] == 'a.png: the file is empty'
        several = app.predict([client.handle_file(photo)], .5, api_name='/explain_batch')
        assert several[0] == '1 photograph explained'
        stolen = dict(path='/etc/hostname', meta=dict(_type='gradio.FileData'))  # not an upload
        call = f'http://127.0.0.1:{port}/gradio_api/call/explain'
        event = requests.post(call, json=dict(data=[stolen, -1, NOTHING, .5]), timeout=60).json()['event_id']
        assert requests.get(f'{call}/{event}', timeout=60).text.startswith('event: error')
        assert [*(space/'antehoc_nb').rglob('*.pyc')]  # it was this copy of the library that ran
    finally:
        process.terminate()
        process.wait(20)
