"""The page in examples/browser, in headless Chromium: a photograph, its prediction and its map."""
import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import antehoc_nb.core.export  # noqa: F401  adds `model.export`
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.train.archs import small_cnn

PAGE = Path(__file__).resolve().parents[1]/'examples'/'browser'
CDN = 'https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/'
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def runtime():
    "The folder `dist` of onnxruntime-web: $ONNXRUNTIME_WEB, or node_modules of this folder"
    package = Path(os.environ.get('ONNXRUNTIME_WEB') or 'node_modules/onnxruntime-web')
    if not (package/'dist'/'ort.wasm.min.js').exists():
        pytest.skip('no onnxruntime-web: npm install onnxruntime-web@1.30.0, or set ONNXRUNTIME_WEB to its folder')
    return package/'dist'


@pytest.fixture
def site(tmp_path):
    "The page in a folder of its own, and its address"
    folder = tmp_path/'site'
    shutil.copytree(PAGE, folder, ignore=shutil.ignore_patterns('*.onnx'))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}/index.html'
    server.shutdown()


@pytest.fixture
def page(browser, runtime, site):
    "A tab that gets onnxruntime-web from this machine, and whose errors are collected"
    page = browser.new_page()
    page.errors = []
    page.on('pageerror', lambda error: page.errors.append(str(error)))
    page.route(f'{CDN}**', lambda route: route.fulfill(path=runtime/route.request.url.removeprefix(CDN).split('?')[0],
                                                       headers={'Access-Control-Allow-Origin': '*'}))
    yield page
    page.close()
    assert not page.errors


def make_model(class_specific=True):
    torch.manual_seed(0)
    model = AntehocModel(small_cnn(3), torch.randn(2, 3, 48, 48), eta=3, class_specific=class_specific, mean=[.5] * 3,
                         std=[.25] * 3, meta=dict(vocab=['ant', 'bee', 'cat'], size=[48, 48])).eval()
    for parameter in model.weight_net.parameters(): nn.init.normal_(parameter, std=.2)
    return model


def photograph(file, size=(48, 48)):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(file)
    return file


def status(page, text, timeout=60_000):
    page.wait_for_function('text => document.getElementById("status").textContent.includes(text)', arg=text,
                           timeout=timeout)
    return page.text_content('#status')


def shown_map(page, map_size=(48, 48)):
    return np.array(page.evaluate('Array.from(found.map)'), dtype=np.float32).reshape(map_size)


def test_a_photograph(page, site, tmp_path):
    folder, address = site
    model = make_model()
    model.export(folder/'model.onnx')
    page.goto(address)
    assert '48 x 48' in status(page, 'The network is ready')
    assert page.locator('#target option').all_text_contents() == ['the predicted class', 'ant', 'bee', 'cat']
    file = photograph(tmp_path/'photo.png')
    page.set_input_files('#photo', file)
    expected = model.explain(file)
    said = status(page, ' ms)')
    assert said.startswith(f'{expected.labels[0]}, {100 * expected.probabilities.max():.1f} %')
    np.testing.assert_allclose(shown_map(page), expected.map[0, 0], atol=1e-3)
    for number, name in enumerate(('ant', 'bee', 'cat')):
        page.evaluate('found = null')
        page.select_option('#target', str(number))
        page.wait_for_function('found !== null', timeout=60_000)
        np.testing.assert_allclose(shown_map(page), model.explain(file, target=name).map[0, 0], atol=1e-3)
    drawn = page.evaluate('''() => {
        const canvas = document.getElementById("overlay");
        return [canvas.width, canvas.height,
                ...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]}''')
    assert drawn[:2] == [48, 48]
    drawn = np.array(drawn[2:], dtype=float).reshape(48, 48, 4)[..., :3]
    overlay = np.asarray(model.explain(file, target='cat').overlays(.5)[0], dtype=float)
    assert np.abs(drawn - overlay).mean() < 6  # the page has nine colours of the colour map, and goes between them
    page.screenshot(path=os.environ.get('SCREENSHOT', tmp_path/'page.png'))


def test_the_middle_of_a_photograph(page, site, tmp_path):
    "The map is of the part that the CNN gets, and lies there"
    folder, address = site
    model = make_model()
    model.meta |= dict(resize='crop')
    model.export(folder/'model.onnx')
    page.goto(address)
    status(page, 'The network is ready')
    file = photograph(tmp_path/'photo.png', (80, 48))
    page.set_input_files('#photo', file)
    status(page, ' ms)')
    np.testing.assert_allclose(shown_map(page), model.explain(file).map[0, 0], atol=1e-3)
    drawn = page.evaluate('''() => {
        const canvas = document.getElementById("overlay");
        return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data)}''')
    drawn = np.array(drawn, dtype=float).reshape(48, 80, 4)[..., :3]
    original = np.asarray(Image.open(file), dtype=float)
    for outside in (np.s_[:, :16], np.s_[:, 64:]): np.testing.assert_allclose(drawn[outside], original[outside], atol=2)
    overlay = np.asarray(model.explain(file).overlays(.5)[0], dtype=float)
    assert np.abs(drawn - overlay)[:, 16:64].mean() < 6


def test_a_class_agnostic_model_and_a_large_photograph(page, site, tmp_path):
    folder, address = site
    make_model(class_specific=False).export(folder/'model.onnx')
    page.goto(address)
    status(page, 'The network is ready')
    assert page.is_disabled('#target')
    page.set_input_files('#photo', photograph(tmp_path/'photo.jpg', (640, 360)))
    status(page, ' ms)')
    assert page.evaluate('[overlay.width, overlay.height]') == [640, 360]


def test_what_is_no_model(page, site, tmp_path):
    folder, address = site
    page.goto(address)
    status(page, 'There is no model.onnx beside this page')
    (tmp_path/'x.onnx').write_bytes(b'not an ONNX file at all')
    page.set_input_files('#model', tmp_path/'x.onnx')
    assert page.get_attribute('#status', 'class') == 'error' or 'That did not work' in status(page, 'That did not work')
    make_model().export(tmp_path/'model.onnx')
    page.set_input_files('#model', tmp_path/'model.onnx')
    status(page, 'The network is ready')
    page.set_input_files('#photo', tmp_path/'x.onnx')
    status(page, 'That did not work')
