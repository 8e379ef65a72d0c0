"""The command on other data, other models and its own output."""
import csv
import json
import os

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from antehoc_nb.cli import app
from antehoc_nb.data.photo_digits import PhotoDigits


@pytest.fixture
def folders(tmp_path, monkeypatch):
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
    train = ('--arch', 'small_cnn', '--size', 32, '--epochs', 1, '--bs', 8, '--eta', 4)
    assert 'accuracy' in antehoc('train', 'a/photos', *train)
    assert 'holds a run with other settings (images: ' in antehoc('train', 'b/photos', *train, code=1)  # the same name, other images
    assert "unknown fill 'green'" in antehoc('train', 'b/photos', *train, '--out', 'run-b', '--fill', 'green', code=1)
    assert 'accuracy' in antehoc('train', 'b/photos', *train, '--out', 'run-b')  # the slip has left nothing behind
    assert '--lr' in antehoc('train', 'a/photos', '--lr', -1, code=2)
    assert 'valid=0.0' in antehoc('train', 'a/photos', '--valid', 0, '--out', 'c', code=1)
    assert '24 images explained' in antehoc('explain', 'antehoc-run', 'a/photos')
    assert 'holds a run with other settings (model: ' in antehoc('explain', 'run-b', 'a/photos', code=1)
    assert 'holds a run with other settings (threshold: ' in antehoc('explain', 'antehoc-run', 'a/photos', '--threshold', .3, code=1)
    first, second = sorted((folders/'a'/'photos'/'odd').iterdir())[:2]
    old = first.stat().st_mtime
    first.write_bytes(second.read_bytes())  # another image of the same name, no newer than the first
    os.utime(first, (old, old))
    assert '1 images explained, 23 were done already' in antehoc('explain', 'antehoc-run', 'a/photos')
    for again in (24, 0): assert f'{again} images explained' in antehoc('explain', 'antehoc-run', 'b', '--out', 'b/maps')  # not its own output
    with open('b/maps/explanations.csv', newline='') as f: assert all(r['image'].startswith('photos/') for r in csv.DictReader(f))


def test_records_name_no_folder_of_this_machine(folders, monkeypatch):
    args = ['train', str(folders/'a'/'photos'), '--arch', 'small_cnn', '--size', '32', '--epochs', '1', '--bs', '8', f'--out={folders}/secret/r']
    monkeypatch.setattr('sys.argv', ['antehoc', *args])
    antehoc(*args)
    text = (folders/'secret'/'r'/'record.json').read_text()
    assert str(folders) not in text and json.loads(text)['command'].endswith('--bs 8 --out=r')


def test_a_class_by_name(folders):
    train = ('train', 'a/photos', '--arch', 'small_cnn', '--size', 32, '--epochs', 1, '--bs', 8, '--eta', 4)
    antehoc(*train, '--out', 'usual')
    assert "a map of one class takes 'directed' or 'conditional'" in antehoc('explain', 'usual', 'a/photos', '--target', 'odd', '--out', 'm', code=1)
    antehoc(*train, '--out', 'asked', '--weight-net', 'conditional')
    records = [json.loads((folders/o/'record.json').read_text())['results']['cnn_sha256'] for o in ('usual', 'asked')]
    assert records[0] == records[1]
    assert "unknown class 'od': did you mean 'odd'?" in antehoc('explain', 'asked', 'a/photos', '--target', 'od', '--out', 'm', code=1)
    assert 'target must lie in 0..1 for this model, got 2' in antehoc('explain', 'asked', 'a/photos', '--target', 2, '--out', 'm', code=1)
    assert not (folders/'m').exists()
    assert '24 images explained' in antehoc('explain', 'asked', 'a/photos', '--target', 'odd', '--out', 'm')
    assert '0 images explained, 24 were done already' in antehoc('explain', 'asked', 'a/photos', '--target', 'odd', '--out', 'm')
    assert '0 images explained, 24 were done already' in antehoc('explain', 'asked', 'a/photos', '--target', 1, '--out', 'm')  # the same class by its number
    assert np.load(next((folders/'m').rglob('*.npz')))['target'] == 1
    assert 'target: odd there, even now' in antehoc('explain', 'asked', 'a/photos', '--target', 'even', '--out', 'm', code=1)
