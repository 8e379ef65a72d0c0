"""Output among the images, and names and locales of every kind."""
import csv
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from antehoc_nb.cli import _image_files, app
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.show.explain_files import explain_files
from antehoc_nb.train.archs import build_cnn

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A saved model that loads by name"
    torch.manual_seed(0)
    meta = dict(size=[16, 16], vocab=['Kätzchen', 'dog'])
    folder = tmp_path_factory.mktemp('model')
    AntehocModel(build_cnn('small_cnn', 2), torch.rand(2, 3, 16, 16), eta=2, meta=meta).save_pretrained(folder)
    return folder


def explain(model, images, out):
    result = CliRunner().invoke(app, ['explain', str(model), str(images), '--out', str(out), '--device', 'cpu'])
    return result.exit_code, result.output


def rows(out):
    with (out/'explanations.csv').open(newline='', encoding='utf-8') as file: return list(csv.DictReader(file))


@pytest.mark.parametrize('out', ['.', 'photos', 'photos/sub', 'photos/new', '..'])
def test_output_among_the_images(model, photo, tmp_path, monkeypatch, out):
    photos = tmp_path/'here'/'photos'
    for i, name in enumerate(('a.png', 'sub/b.png', 'maps/c.png', 'sub/overlays/d.png')): photo(photos/name, seed=i)
    monkeypatch.chdir(tmp_path/'here')
    images = 'photos' if out != '.' else photos
    if out == '.': monkeypatch.chdir(photos)
    for _ in range(2):
        code, output = explain(model, images, out)
        assert code == 0, output
        names = {row['image'] for row in rows(photos.parent/out if out != '.' else photos)}
        assert names == {'a.png', 'sub/b.png', 'maps/c.png', 'sub/overlays/d.png'}
    assert '4 were done already' in output


def test_the_output_of_an_earlier_run_is_not_explained(model, photo, tmp_path):
    photo(tmp_path/'photos'/'a.png')
    for out in ('one', 'two'): assert explain(model, tmp_path/'photos', tmp_path/'photos'/out)[0] == 0
    assert {row['image'] for row in rows(tmp_path/'photos'/'two')} == {'a.png'}


NAMES = ['Größe.png', '猫.png', 'no space é.png']


@pytest.mark.slow
def test_a_locale_without_the_letters(model, photo, tmp_path):
    for i, name in enumerate(NAMES): photo(tmp_path/'photos'/name, seed=i)
    lines = ['import torch; torch.set_num_threads(1)', 'from antehoc_nb.cli import app', 'app()']
    environment = os.environ | dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    environment.pop('PYTHONIOENCODING', None)
    arguments = ['explain', str(model), str(tmp_path/'photos'), '--out', str(tmp_path/'out'), '--device', 'cpu']
    result = subprocess.run([sys.executable, '-c', '\n'.join(lines), *arguments], env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr
    found = rows(tmp_path/'out')
    assert {row['image'] for row in found} == set(NAMES)
    assert all((tmp_path/'out'/row['overlay']).exists() for row in found)


def test_names_that_are_no_text(model, photo, tmp_path):
    folder = os.fsencode(photo(tmp_path/'photos'/'a.png').parent)
    try: os.rename(folder + b'/a.png', folder + b'/Gr\xf6\xdfe.png')
    except OSError: pytest.skip('the file system takes UTF-8 only')
    photo(tmp_path/'photos'/'z.png', seed=1)
    loaded, out = AntehocModel.from_pretrained(model), tmp_path/'out'
    files, _ = _image_files([tmp_path/'photos'], out)
    assert explain_files(loaded, files, out, say=None)[0] == 2
    assert explain_files(loaded, files, out, say=None)[:2] == (0, 2)
    with Image.open(out/'contact_sheet.png') as sheet: assert sheet.size[0] > 100


def test_no_image_is_overwritten(model, photo, tmp_path):
    for i, name in enumerate(('c.png', 'maps/c.png')): photo(tmp_path/name, seed=i)
    before = (tmp_path/'maps'/'c.png').read_bytes()
    code, output = explain(model, tmp_path, tmp_path)
    assert code == 1 and 'would be overwritten' in output
    assert (tmp_path/'maps'/'c.png').read_bytes() == before
