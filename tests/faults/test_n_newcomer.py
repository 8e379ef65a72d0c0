"""What a newcomer gives by mistake is answered in one sentence."""
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from antehoc_nb import cli
from antehoc_nb.core.interpretation_loss import two_pass_step
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.data.images import image_dls

pytestmark = pytest.mark.usefixtures('one_thread')


def says(error, message): return pytest.raises(error, match=f'^{re.escape(message)}$')


def antehoc(*args):
    result = CliRunner().invoke(cli.app, list(map(str, args)))
    assert result.exit_code == 1, result.output
    return result.output.strip()


@pytest.mark.parametrize('meta, message', [
    (dict(size='64'), "meta: size='64' must be a number of pixels or [height, width], each above 0"),
    (dict(size=0), 'meta: size=0 must be a number of pixels or [height, width], each above 0'),
    (dict(size=[64]), 'meta: size=[64] must be a number of pixels or [height, width], each above 0'),
    (dict(size=[3, 64, 64]), 'meta: size=[3, 64, 64] must be a number of pixels or [height, width], each above 0'),
    (dict(size=True), 'meta: size=True must be a number of pixels or [height, width], each above 0'),
    (dict(size=64.), 'meta: size=64.0 must be a number of pixels or [height, width], each above 0'),
    (dict(sise=64), "meta: 'sise' is not known; use 'size'"),
    (dict(vocabs=['a']), "meta: 'vocabs' is not known; use 'vocab'"),
    (dict(classes=['a']), "meta: 'classes' is not known; use 'vocab'"),
    (dict(vocab='cat'), "meta: vocab='cat' is one text; give a list of names")])
def test_meta(cnn, meta, message):
    with says(ValueError, message): AntehocModel(cnn(), meta=meta)


def test_meta_of_ones_own_is_kept(cnn):
    model = AntehocModel(cnn(), meta=dict(author='I', size=(32, 48)))
    assert model.meta['author'] == 'I' and model.image_size == (32, 48)


@pytest.mark.parametrize('given, end', [
    ({}, 'a dict (dict) is no network; give an nn.Module, the name of an architecture or a fastai learner; build it, '
         'and put the weights in: cnn.load_state_dict(...)'),
    (Path('model'), f'a {type(Path()).__name__} ({type(Path()).__name__}) is no network; give an nn.Module, the name '
                    'of an architecture or a fastai learner; what save_pretrained wrote is read by '
                    'AntehocModel.from_pretrained')])
def test_weights_in_place_of_a_network(given, end):
    with says(TypeError, f'cnn: {end}'): AntehocModel(given)


@pytest.mark.parametrize('shape, hint', [((3, 32, 32), '; add a batch dimension with x[None]'), ((4,), ', then label'),
                                         ((4, 12), ', then label')])
def test_no_batch_of_images(cnn, shape, hint):
    model = AntehocModel(cnn())
    model.images_seen = 10  # not at the first step alone
    with says(ValueError, f'two_pass_step: x must be a batch of images (B,C,H,W), got {shape}{hint}'):
        two_pass_step(model, torch.rand(shape))


@pytest.fixture
def explanation(cnn):
    return AntehocModel(cnn(), mean=[.5] * 3, std=[.5] * 3, meta=dict(size=32)).explain(Image.new('RGB', (40, 30)))


@pytest.mark.parametrize('given, message', [
    (dict(cols=0), 'cols=0 must be a whole number from 1, or None'),
    (dict(cols=1.5), 'cols=1.5 must be a whole number from 1, or None'),
    (dict(size=-1), 'size=-1 must be a number of inches above 0'),
    (dict(size='big'), "size='big' must be a number of inches above 0"),
    (dict(size=float('nan')), 'size=nan must be a number of inches above 0')])
def test_show(explanation, given, message):
    with says(ValueError, message): explanation.show(**given)


@pytest.mark.parametrize('path, kind', [(None, 'NoneType'), (3, 'int'), (['a.png'], 'list')])
def test_save(explanation, path, kind):
    with says(TypeError, f"path: a {kind} is no path; give the name of a file, such as 'overlay.png'"):
        explanation.save(path)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        file = tmp_path/'photos'/'ab'[i % 2]/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (16, 16), (60 * i, 0, 0)).save(file)
    return Path('photos')


def test_images_outside_class_folders(photos):
    message = ("path='photos/a': no images found in class folders, but 2 outside them; move those of each class into a "
               'folder of its own, as <class>/<image>.jpg')
    with says(ValueError, message): image_dls(photos/'a', size=16)
    assert antehoc('train', 'photos/a') == f'antehoc: error: {message}'


def test_unreadable_images_in_words(photos):
    (photos/'a'/'empty.png').write_bytes(b'')
    (photos/'b'/'text.png').write_text('hello')
    with pytest.raises(ValueError, match='2 images cannot be read; repair or delete them') as caught:
        image_dls(photos, size=16)
    assert sorted(str(caught.value).splitlines()[1:]) == ['photos/a/empty.png (the file is empty)',
                                                          'photos/b/text.png (not an image, or damaged)']


@pytest.mark.parametrize('inside', ['explanations', 'a/explanations'])
def test_explanations_among_the_photographs(photos, inside):
    for kind in ('overlays', 'maps'):
        (photos/inside/kind).mkdir(parents=True)
        Image.new('RGB', (16, 16)).save(photos/inside/kind/'0.png')
    (photos/inside/'explanations.csv').write_text('image\n')
    with says(ValueError, f"path='photos': photos/{inside} was written by antehoc explain, and its pictures would be "
                          'trained on; move it out of the folder of the images'): image_dls(photos, size=16)


@pytest.mark.parametrize('address', ['https://x.org/cat.jpg', 's3://photos/train'])
def test_addresses(photos, address):
    message = f'antehoc: error: {address} is an address; download it first, and give the file or folder'
    assert antehoc('train', address) == message
    assert antehoc('explain', 'model', address) == message
    assert antehoc('explain', 'model', address, '--maps', 'npz') == message
    assert antehoc('explain', address, 'photos') == message
    assert antehoc('export', address) == message


def test_empty_target():
    model = SimpleNamespace(class_specific=True)
    assert cli._target_class(None, model) is None
    with says(ValueError, '--target is empty; give the name or number of a class, or leave it out'):
        cli._target_class('', model)


def test_a_report_that_tested_nothing(capsys):
    found = SimpleNamespace(groups=[], candidates=[], path='report.html', trust=None)
    cli._tell_report(found, 1, cli._Output())
    assert capsys.readouterr().out.splitlines() == [
        'no class was tested: give 20 images or more that are predicted as it, and as many of another class',
        '0 candidates for a shortcut; open report.html in a browser']
