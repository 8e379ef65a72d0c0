"""What a newcomer gives by mistake is answered in one sentence."""
import csv
import inspect
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from antehoc_nb import cli
from antehoc_nb.core.interpretation_loss import two_pass_step
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.data.images import image_dls
from antehoc_nb.train.archs import build_cnn
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')


def says(error, message): return pytest.raises(error, match=f'^{re.escape(message)}$')


def antehoc(*args, code=1):
    result = CliRunner().invoke(cli.app, list(map(str, args)))
    assert result.exit_code == code, result.output
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
    (dict(vocab='cat'), "meta: vocab='cat' is one text; give a list of names"),
    (dict(vocab=3), "meta: vocab=3 is no list; give the names in the order of the classes, such as "
                    "vocab=['cat', 'dog']"),
    (dict(vocab=['a', 'b']), 'meta: vocab has 2 names, but the CNN has 3 classes; give a name for each, in the order '
                             'of its scores'),
    (dict(vocab=['a'], task='multi-label'), 'meta: vocab has 1 name, but the CNN has 3 classes; give a name for each, '
                                            'in the order of its scores')])
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
    typed = message.replace("path='photos/a'", 'photos/a')
    assert antehoc('train', 'photos/a') == f'antehoc: error: {typed}'


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


@pytest.mark.parametrize('given, message', [
    (dict(train_cnn='no'), "train_cnn='no': give True or False"),
    (dict(keep_best=None), 'keep_best=None: give True or False'),
    (dict(keep_maps=-1), 'keep_maps=-1: give a number of images, 0 or more'),
    (dict(mask=''), "unknown mask ''. Known: soft, top_area, capped, threshold, soft+top_area, soft+capped, "
                    'soft+capped+threshold, dimmed'),
    (dict(eta=0), 'eta=0: give a whole number of layers, 1 or more'),
    (dict(eta=2.5), 'eta=2.5: give a whole number of layers, 1 or more'),
    (dict(layers=[]), "layers=[]: give names of layers, such as ['layer3', 'layer4']"),
    (dict(temperature=-1), 'temperature=-1: give a number above 0'),
    (dict(weight_net=['auto']), 'unknown weight network "[\'auto\']": did you mean \'auto\'?'),
    (dict(class_specific='no'), "class_specific='no': give True, False or None"),
    (dict(scale='no'), "scale='no': give True or False"),
    (dict(grids=3), 'grids=3: give the grid of each layer, as of layer_grids, or None'),
    (dict(channels=[0]), 'channels=[0]: give the channels of each layer, such as [64, 128], or None'),
    (dict(classes=0), 'classes=0: give 1 or more'),
    (dict(cells=-1), "cells=-1: a number from 1, or 'pixels'"),
    (dict(border='no'), "border='no': give True, False or None"),
    (dict(output=[1]), 'output=[1]: give the name or the position of an output, or a function of all'),
    (dict(evidence=-1), 'evidence=-1: give True, False or None')])
def test_arguments_of_two_pass(given, message):
    with says(ValueError, message): TwoPass(**given)


def test_an_unknown_loss_of_two_pass():
    with pytest.raises(ValueError, match="unknown interpretation loss ''. Known: mse, cross_entropy"): TwoPass(loss='')


def test_every_argument_of_two_pass_is_checked():
    class Odd: pass
    names = [*inspect.signature(TwoPass).parameters, *inspect.signature(AntehocModel).parameters]
    for name in {*names} - {'model_kwargs', 'cnn', 'sample', 'mean', 'std'}:
        with pytest.raises((TypeError, ValueError), match='Odd|object'): TwoPass(**{name: Odd()})


IN_255 = dict(mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4])
IN_1 = 'mean=[0.4851, 0.4561, 0.4059], std=[0.229, 0.2239, 0.2251]'


@pytest.mark.parametrize('is_normalised', [False, True])
def test_a_normalisation_of_another_range(cnn, is_normalised):
    model, x = AntehocModel(cnn(), **IN_255), torch.rand(2, 3, 32, 32)
    if is_normalised: x = (x - model.mean) / model.std
    how = 'for the images too' if is_normalised else 'and normalise with these'
    message = f'mean and std are of pixels from 0 to 255, but these go from 0 to 1; divide them by 255: {IN_1}, {how}'
    with says(ValueError, f'explain: {message}'): model.explain(x)
    with says(ValueError, f'two_pass_step: {message}'): two_pass_step(model, x)
    right = (255 * torch.rand(2, 3, 32, 32) - model.mean) / model.std
    two_pass_step(model, right)


def test_nan_in_images(cnn):
    model, x = AntehocModel(cnn()), torch.rand(3, 3, 32, 32)
    model.images_seen = 10  # not at the first step alone
    x[1, 0, 5, 5] = torch.nan
    with says(ValueError, 'two_pass_step: image 1 of the batch has NaN or infinite pixels; look at its file, and at '
                          'what is done to it'): two_pass_step(model, x)


def test_nan_in_the_loss(cnn):
    "As on a GPU, where not every batch is looked at"
    model, x = AntehocModel(cnn()), torch.rand(3, 3, 32, 32)
    torch.nn.init.constant_(model.cnn[-1].bias, torch.nan)
    with says(FloatingPointError, 'two_pass_step: the interpretation loss is nan, though the images are finite; leave '
                                  'out this step. Lower the learning rate, clip gradients, or leave half precision; if '
                                  'the CNN or the weight network has NaN in its weights, go back to a checkpoint'):
        two_pass_step(model, x)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize('name, kind, hint', [
    ('net.pth', 'file', 'build the network, put the weights of the file in by cnn.load_state_dict(...), and give '
                        'AntehocModel(cnn)'),
    ('export.pkl', 'file', "load the learner: AntehocModel(load_learner('export.pkl'))"),
    ('model.onnx', 'file', "explain by antehoc_nb.core.export.load_exported('model.onnx')"),
    ('run/model', 'folder', "what save_pretrained wrote is read by AntehocModel.from_pretrained('run/model')")])
def test_a_path_in_place_of_a_name(name, kind, hint):
    with says(ValueError, f'cnn={name!r} is a {kind}, and not the name of an architecture; {hint}'): AntehocModel(name)


def test_where_a_model_cannot_be_saved(cnn, tmp_path, monkeypatch):
    model, file = AntehocModel(cnn(), meta=dict(cnn=dict(arch='mine'))), tmp_path/'model'
    file.write_text('mine')
    for folder in (file, file/'sub'):
        with says(NotADirectoryError, f'folder: {file} is a file, not a folder; choose another folder'):
            model.save_pretrained(folder)
    with says(TypeError, "folder='' is no path; give the name of a folder, such as 'model'"): model.save_pretrained('')
    monkeypatch.setattr(os, 'access', lambda path, mode: not mode & os.W_OK)
    with says(PermissionError, f'folder: no permission to write to {tmp_path}; choose another folder'):
        model.save_pretrained(tmp_path/'new')
    assert [path.name for path in tmp_path.iterdir()] == ['model'] and file.read_text() == 'mine'


@pytest.fixture
def saved(photos):
    "A saved model, beside photographs"
    network = build_cnn('small_cnn', 2)
    model = AntehocModel(network, torch.rand(2, 3, 16, 16), eta=2, meta=dict(size=16, vocab=['a', 'b']))
    return model.save_pretrained('model')


def images_in(table):
    with open(table, newline='') as file: return sorted({row['image'] for row in csv.DictReader(file)})


@pytest.mark.parametrize('maps, table', [((), 'out/explanations.csv'),
                                         (('--maps', 'npz', '--workers', 0), 'out/images.csv')])
def test_several_images(saved, maps, table):
    given = 'photos/a/0.png', 'photos/b', '.' + '/photos/b/1.png'
    antehoc('explain', saved, *given, '--out', 'out', *maps, code=0)
    assert images_in(table) == ['a/0.png', 'b/1.png', 'b/3.png']
    assert antehoc('explain', saved, *given, 'photos/5.png', *maps) == (
        'antehoc: error: photos/5.png: no such image or folder')
    Path('photos/b/empty.png').write_bytes(b'')
    said = antehoc('explain', saved, *given, '--out', 'more', *maps, code=0 if maps else 1)
    if maps: assert said.endswith('1 could not be read, see the column error; the table is more/images.csv\n'
                                  'next: antehoc report more')
    else: assert 'could not read b/empty.png (the file is empty)' in said


@pytest.mark.parametrize('options, message', [
    (('--arch', 'vit_b_16'), '--arch vit_b_16: fastai cannot cut off its head and put another in its place, since it '
     "has no pooling layer; use a CNN such as 'resnet18', 'convnext_tiny' or 'efficientnet_b0'"),
    (('--arch', 'alexnet', '--size', 32), '--arch alexnet does not take images of 32 x 32 pixels (Given input size: '
     '(256x1x1). Calculated output size: (256x0x0). Output size is too small); give another --size, or another --arch, '
     'such as resnet18, efficientnet_b0 or convnext_tiny'),
    (('--arch', 'small_cnn', '--eta', 9), '--eta 9 is larger than the 6 layers found (0.2, 1.2, 2.2, 3.2, 4.2, 5.2); '
     'use --eta 6 or less, or name the layers yourself with --layers ...'),
    (('--temperature', -1), '--temperature -1.0: give a number above 0'),
    (('--weight-net', 'paper', '--class-specific'), '--class-specific: --weight-net paper has one map for all classes; '
     'use --weight-net auto')])
def test_what_cannot_work_is_said_before_images_are_read(photos, options, message):
    (photos/'a'/'broken.png').write_bytes(b'')  # would be said first, if images were read
    assert antehoc('train', photos, *options) == f'antehoc: error: {message}'


def test_options_of_the_command_line_in_messages():
    for message, typed in {
            "valid='tset': no such split": '--valid tset: no such split',
            'finish it with epochs=3, then': 'finish it with --epochs 3, then',
            "give a file, as pretrained='w.pt'": 'give a file, as --weights w.pt',
            'class_specific=False explains other outputs': '--class-agnostic explains other outputs',
            "layers=['a', 'b']: twice": '--layers a,b: twice',
            "meta=dict(task='binary')": "meta=dict(task='binary')"}.items():
        assert cli._as_typed(message) == typed


def test_flags_have_no_value_in_the_help(monkeypatch):
    monkeypatch.setenv('COLUMNS', '120')
    for command in ((), *([name] for name in typer.main.get_command(cli.app).commands)):
        said = antehoc(*command, '--help', code=0)
        assert '--help' in said and 'bool' not in said.lower()
