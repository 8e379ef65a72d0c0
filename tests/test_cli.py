"""The command on other data, other models and its own output."""
import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from antehoc_nb.cli import REPRODUCIBLE, app, find_experiment
from antehoc_nb.data.photo_digits import PhotoDigits

pytestmark = pytest.mark.usefixtures('one_thread')
TRAIN = '--arch', 'small_cnn', '--size', 32, '--epochs', 1, '--bs', 8, '--eta', 4


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "Two folders of 24 images in two classes"
    monkeypatch.chdir(tmp_path)
    for seed, root in enumerate(('a', 'b')):
        scenes = PhotoDigits(24, size=32, seed=seed)
        for i, (im, y) in enumerate(zip(scenes.images, scenes.labels)):
            f = tmp_path/root/'photos'/('odd' if y % 2 else 'even')/f'{i}.png'
            f.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(im).save(f)
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
    assert 'valid=0.0' in antehoc('train', 'a/photos', '--valid', 0, '--out', 'c', code=1)
    assert '24 images explained' in antehoc('explain', 'antehoc-run', 'a/photos')
    assert other + '(model: ' in antehoc('explain', 'run-b', 'a/photos', code=1)
    assert other + '(threshold: ' in antehoc('explain', 'antehoc-run', 'a/photos', '--threshold', .3, code=1)


def test_changed_images_are_explained_again(folders):
    antehoc('train', 'a/photos', *TRAIN)
    assert '24 images explained' in antehoc('explain', 'antehoc-run', 'a/photos')
    first, second = sorted((folders/'a'/'photos'/'odd').iterdir())[:2]
    old = first.stat().st_mtime
    first.write_bytes(second.read_bytes())  # another image of the same name, no newer than the first
    os.utime(first, (old, old))
    assert '1 images explained, 23 were done already' in antehoc('explain', 'antehoc-run', 'a/photos')
    for n in (24, 0):  # the second start does not explain the first one's output
        assert f'{n} images explained' in antehoc('explain', 'antehoc-run', 'b', '--out', 'b/maps')
    with open('b/maps/explanations.csv', newline='') as f:
        assert all(r['image'].startswith('photos/') for r in csv.DictReader(f))


def test_records_name_no_folder_of_this_machine(folders, monkeypatch):
    options = [str(o) for o in TRAIN[:-2]]
    args = ['train', str(folders/'a'/'photos'), *options, f'--out={folders}/secret/r']
    monkeypatch.setattr('sys.argv', ['antehoc', *args])
    antehoc(*args)
    text = (folders/'secret'/'r'/'record.json').read_text()
    assert str(folders) not in text and json.loads(text)['command'].endswith('--bs 8 --out=r')


def test_a_class_by_name(folders):
    def explain(run, target, code=0):
        return antehoc('explain', run, 'a/photos', '--target', target, '--out', 'm', code=code)

    antehoc('train', 'a/photos', *TRAIN, '--out', 'usual')
    assert "a map of one class takes 'directed' or 'conditional'" in explain('usual', 'odd', code=1)
    antehoc('train', 'a/photos', *TRAIN, '--out', 'specific', '--weight-net', 'conditional')
    records = [json.loads((folders/run/'record.json').read_text())['results'] for run in ('usual', 'specific')]
    assert records[0]['cnn_sha256'] == records[1]['cnn_sha256']
    assert "unknown class 'od': did you mean 'odd'?" in explain('specific', 'od', code=1)
    assert 'target must lie in 0..1 for this model, got 2' in explain('specific', 2, code=1)
    assert not (folders/'m').exists()
    assert '24 images explained' in explain('specific', 'odd')
    for same in ('odd', 1):  # the class by its name, and by its number
        assert '0 images explained, 24 were done already' in explain('specific', same)
    assert np.load(next((folders/'m').rglob('*.npz')))['target'] == 1
    assert 'target: odd there, even now' in explain('specific', 'even', code=1)


def test_everything_that_can_be_reproduced_is_found():
    for name in REPRODUCIBLE:
        experiment = find_experiment(name)
        assert name in experiment.tables or name in experiment.figures
        for dataset in experiment.datasets:
            for profile in ('smoke', 'cpu', 'paper'): assert experiment.config(dataset, profile)['dataset'] == dataset


def test_the_help_imports_neither_torch_nor_fastai():
    code = "import sys, antehoc_nb.cli; sys.exit(any(o in sys.modules for o in ('torch', 'fastai', 'matplotlib')))"
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
