"""Names, pixels, folders and disks that files are lost on, or misread."""
import csv
import os
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import antehoc_nb.show.explain_files as module
from antehoc_nb.cli import _in_words
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import rgb_image, usual_mode, whole_or_not_at_all
from antehoc_nb.data.images import image_dls, unread_images
from antehoc_nb.show.explain_files import explain_files
from antehoc_nb.show.explain_many import explain_many, read_explained
from antehoc_nb.show.report import write_explained
from antehoc_nb.train.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')
META = dict(size=[16, 16], vocab=['Kätz\nchen', 'd\tog', 'fox'])


@pytest.fixture
def model(cnn): return AntehocModel(cnn(), torch.rand(2, 3, 16, 16), eta=2, meta=META).eval()


def files_in(folder): return {file.relative_to(folder).as_posix() for file in folder.rglob('*') if file.is_file()}


def table_of(out):
    with (out/'explanations.csv').open(newline='', encoding='utf-8', errors='surrogateescape') as file:
        return {row['image']: row['overlay'] for row in csv.DictReader(file)}


LONG = ['a' * 250 + suffix for suffix in ('.png', '.jpg', '.jpeg')] + ['a' * 230 + '.png', '猫' * 83 + '.png']
ODD = ['new\nline.png', 'tab\t.png', 'cr\r.png', '\x7f\x01.png', 'a\u2028b.png', os.fsdecode(b'Gr\xf6\xdfe\n.png')]


def named(photo, folder, names):
    "Photographs of these names, those that the file system takes"
    for i, name in enumerate(names):
        try: photo(folder/'0.png', seed=i).rename(folder/name)
        except OSError: (folder/'0.png').unlink()
    return [(folder/name, name) for name in os.listdir(folder)]


def test_names_of_every_length_and_kind(model, photo, tmp_path):
    files = named(photo, tmp_path/'in', LONG + ODD)
    out = tmp_path/'out'
    assert explain_files(model, files, out, say=None, arrays=True) == (len(files), 0, [])
    table = table_of(out)
    assert {*table} == {name for _, name in files} and len({*table.values()}) == len(files)
    assert all((out/overlay).is_file() for overlay in table.values()) and (out/'contact_sheet.png').is_file()
    assert explain_files(model, files, out, say=None, arrays=True) == (0, len(files), [])
    explain_many(model, tmp_path/'in', tmp_path/'many', workers=0, say=None)
    assert {*read_explained(tmp_path/'many').images['image']} == {*table}


def test_one_image_that_cannot_be_written_stops_no_other(model, photo, tmp_path, monkeypatch):
    files = [(photo(tmp_path/'in'/f'{i}.png', seed=i), f'{i}.png') for i in range(4)]
    write = module._write_pictures

    def broken(map, image, out, stem):
        if image.name == '1.png': raise OSError(36, 'File name too long')
        write(map, image, out, stem)
    monkeypatch.setattr(module, '_write_pictures', broken)
    n, _, failed = explain_files(model, files, tmp_path/'out', bs=2, say=None)
    assert (n, failed) == (3, [('1.png', 'its files could not be written: [Errno 36] File name too long')])
    assert {*table_of(tmp_path/'out')} == {'0.png', '2.png', '3.png'}
    files[0][0].unlink()  # its explanation is finished
    assert explain_files(model, files, tmp_path/'out', say=None)[2][0][0] == '0.png'


def test_a_line_of_the_table_is_whole_or_not_there(model, photo, tmp_path, monkeypatch):
    files = [(photo(tmp_path/'in'/f'{i}.png', seed=i), f'{i}.png') for i in range(2)]
    explain_files(model, files[:1], tmp_path/'out', say=None)
    table = tmp_path/'out'/'explanations.csv'
    before = table.read_bytes()

    class Full:
        def __init__(self, file): self.file = file

        def writerows(self, rows):
            self.file.write('half of a li')
            self.file.flush()
            raise OSError(28, 'No space left on device')
    broken = SimpleNamespace(writer=Full, DictWriter=csv.DictWriter, DictReader=csv.DictReader)
    monkeypatch.setattr(module, 'csv', broken)
    with pytest.raises(OSError) as caught: explain_files(model, files, tmp_path/'out', say=None)
    assert str(caught.value) == f"[Errno 28] No space left on device: '{table}'" and table.read_bytes() == before


def ramp(largest, dtype): return (np.linspace(0, 1, 48).reshape(6, 8) * largest).astype(dtype)


@pytest.mark.parametrize('kind, dtype', [('array', 'int64'), ('image', 'int32'), ('x.png', 'uint16'),
                                         ('x.tif', 'int32'), ('x.tif', 'uint16'), ('x.pgm', 'uint16')])
@pytest.mark.parametrize('white', [255, 4095, 65535])
def test_whole_numbers_of_every_range(tmp_path, recwarn, kind, dtype, white):
    values = ramp(white, dtype)
    if kind == 'array': given = values
    else: given = Image.fromarray(values)
    if kind.startswith('x'):
        given.save(tmp_path/kind)
        given = tmp_path/kind
    assert (np.asarray(rgb_image(given))[..., 0] == values.astype('int64') * 255 // white).all()
    said = [str(warning.message) for warning in recwarn]
    is_guess = white < 65535 and not (kind == 'array' and white == 255)  # bytes in a wider type
    assert len(said) == is_guess and all(f'has no value above {white}, which is taken for white' in text
                                               for text in said)


def test_a_declared_range_is_no_guess(tmp_path, recwarn):
    Image.fromarray(ramp(700, 'uint16')).save(tmp_path/'x.tif', tiffinfo={281: 1023})
    assert np.asarray(rgb_image(tmp_path/'x.tif')).max() == 700 * 255 // 1023 and not recwarn.list


@pytest.mark.parametrize('values, message', [
    (ramp(10**6, 'int32'), 'it goes from 0 to 1000000; scale it to 0..255'), (ramp(-9, 'int32'), 'from -9 to 0; scale'),
])
def test_numbers_of_no_range_are_refused(photo, tmp_path, values, message):
    with pytest.raises(ValueError, match=f'an array of whole numbers must lie in 0..65535, .*{message}'):
        rgb_image(values)
    for name in ('cat/1.png', 'dog/1.png', 'dog/2.png'): photo(tmp_path/name)
    Image.fromarray(values).save(tmp_path/'cat'/'x.tif')
    with pytest.raises(ValueError, match=rf'x\.tif \(an image of whole numbers .*{message}'): image_dls(tmp_path, 16, 2)


def folders(photo, root, *names, n=2):
    for name in names:
        for i in range(n): photo(root/name/f'{i}.png', seed=i)
    return root


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('train, other', [
    ('train', 'dev'), ('Train', 'eval'), ('training_set', 'test_set'), ('trainset', 'testset'),
    ('train-images', 'val-images'), ('train', 'Development'), ('train_data', 'validation_dataset'),
])
def test_names_of_splits(photo, tmp_path, train, other):
    folders(photo, tmp_path, *(f'{split}/{name}' for split in (train, other) for name in ('cat', 'dog')))
    dls = image_dls(tmp_path, 16, 2, device='cpu')
    assert list(dls.vocab) == ['cat', 'dog'] and (len(dls.train_ds), len(dls.valid_ds)) == (4, 4)


@pytest.mark.parametrize('first, other', [('train', 'holdout'), ('val', 'test'), ('train', 'bus')])
def test_splits_taken_for_classes_are_named(photo, tmp_path, first, other):
    folders(photo, tmp_path, *(f'{split}/{name}' for split in (first, other) for name in ('cat', 'dog')))
    classes = ', '.join(sorted([first, other]))
    said = (rf'taken for classes \({classes}\), though \w+ has folders itself \(cat, dog\); '
            "if those are the classes, call the folders 'train' and 'valid'")
    with pytest.warns(UserWarning, match=said):
        image_dls(tmp_path, 16, 2, device='cpu')


def test_images_without_a_suffix_are_counted_and_named(photo, tmp_path):
    folders(photo, tmp_path, 'cat', 'dog')
    for name in ('IMG_1', 'IMG_2', 'IMG_3.jpg~'): photo(tmp_path/'p.png').rename(tmp_path/'cat'/name)
    for name in ('README', 'labels.xyz'): (tmp_path/'cat'/name).write_text('no image')
    said = '3 images of kinds that are not read (.jpg~, no suffix), the first is ' + str(tmp_path/'cat'/'IMG_1')
    assert unread_images(sorted((tmp_path/'cat').iterdir())) == said
    with pytest.warns(UserWarning) as caught: image_dls(tmp_path, 16, 2, device='cpu')
    assert f'{tmp_path}: left out: {said}' in {str(warning.message) for warning in caught}


def test_the_file_that_was_not_written_is_named(tmp_path):
    path = tmp_path/('a' * 250 + '.txt')
    with whole_or_not_at_all(path) as unfinished:
        assert len(unfinished.name) < 80 and unfinished.suffix == '.txt'
        unfinished.write_text('new')
    usual_mode(path)
    for error in (OSError(27, 'File too large'), RuntimeError('I/O error: File too large (os error 27)')):
        with pytest.raises(OSError) as caught, whole_or_not_at_all(path) as unfinished:
            unfinished.write_text('half')
            raise error
        assert str(caught.value) == f"[Errno 27] File too large: '{path}'"
        assert _in_words(caught.value) == f'{path} was not written, file too large; what was written before is whole'
    with pytest.raises(FileNotFoundError, match='other'), whole_or_not_at_all(path): (tmp_path/'other').read_text()
    assert files_in(tmp_path) == {path.name} and path.read_text() == 'new'


@pytest.fixture
def small_files():
    "From a call on, no file gets more than 5,000 bytes"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize('name', ['checkpoint.pt', 'model.safetensors', 'x.png', 'maps/00000.npz'])
def test_a_disk_that_takes_no_more(model, tmp_path, small_files, name):
    e, noise = model.explain(torch.rand(1, 3, 64, 64)), np.random.default_rng(0).random((1, 96, 96))
    write = {
        'checkpoint.pt': lambda: Checkpoint(tmp_path/name)._write(model.state_dict()),
        'model.safetensors': lambda: model.save_pretrained(tmp_path),
        'x.png': lambda: e.save(tmp_path/name),
        'maps/00000.npz': lambda: write_explained(tmp_path, tmp_path, ['1.png'], noise, ['cat'], [1.]),
    }
    small_files()
    with pytest.raises(OSError) as caught: write[name]()
    assert str(caught.value) == f"[Errno 27] File too large: '{tmp_path/name}'" and files_in(tmp_path) == set()


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='named pipes')
def test_a_pipe_named_as_an_image(tmp_path, model):
    os.mkfifo(tmp_path/'pipe.png')
    Image.new('RGB', (32, 32), 'red').save(tmp_path/'red.png')
    files = [(tmp_path/name, name) for name in ('pipe.png', 'red.png')]
    assert explain_files(model, files, tmp_path/'out', say=None) == (1, 0, [('pipe.png', 'not a regular file')])
