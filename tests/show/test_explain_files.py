"""The files that `explain_files` leaves: names, pictures, what is not readable, and what is done again."""
import csv
import stat

import numpy as np
import pytest
import torch
from PIL import Image

from antehoc_nb.core.model import AntehocModel
from antehoc_nb.show import explain_files as module
from antehoc_nb.show.explain_files import explain_files
from antehoc_nb.train.archs import small_cnn

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    meta = dict(size=[32, 32], vocab=['cat', 'dog'])
    return AntehocModel(small_cnn(2), torch.rand(2, 3, 32, 32), eta=2, meta=meta).eval()


def save(path, size=(48, 40), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def named(folder): return [(path, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob('*.*'))]


def files(out): return sorted(path.relative_to(out).as_posix() for path in out.rglob('*') if path.is_file())


def rows(out):
    with (out/'explanations.csv').open(newline='') as file: return list(csv.DictReader(file))


def test_two_images_of_one_name_and_subfolders(model, tmp_path):
    for seed, name in enumerate(('a.jpg', 'a.png', 'sub/a.jpg', 'sub/deeper/b.x.webp')):
        save(tmp_path/'in'/name, (48, 40 + seed), seed)
    out, images = tmp_path/'out', named(tmp_path/'in')
    assert explain_files(model, images, out)[:2] == (4, 0)
    stems = ['a', 'a_png', 'sub/a', 'sub/deeper/b.x']
    pictures = [f'{folder}/{stem}.png' for folder in ('maps', 'overlays') for stem in stems]
    assert files(out) == sorted(['contact_sheet.png', 'explanations.csv', 'explanations.json', *pictures])
    for row in rows(out):
        with Image.open(tmp_path/'in'/row['image']) as image, Image.open(out/row['overlay']) as overlay:
            assert image.size == overlay.size
    save(tmp_path/'in'/'a.bmp', seed=9)  # comes first in the order, and takes no file of the others
    before = {path: path.read_bytes() for path in (out/'overlays').rglob('*.png')}
    assert explain_files(model, named(tmp_path/'in'), out)[:2] == (1, 4)
    assert {path: path.read_bytes() for path in before} == before and (out/'overlays'/'a_bmp.png').exists()


@pytest.mark.parametrize('content, reason', [
    (b'', 'the file is empty'), (b'not an image', 'not an image, or damaged'),
    (b'\xff\xd8\xff\xe0' + bytes(20), 'not an image, or damaged')])
def test_what_cannot_be_read_is_named(model, tmp_path, content, reason):
    save(tmp_path/'in'/'good.png')
    (tmp_path/'in'/'bad.jpg').write_bytes(content)
    assert explain_files(model, named(tmp_path/'in'), tmp_path/'out') == (1, 0, [('bad.jpg', reason)])
    whole = save(tmp_path/'in'/'cut.png', (200, 200)).read_bytes()
    (tmp_path/'in'/'cut.png').write_bytes(whole[:len(whole)//2])
    n, before, failed = explain_files(model, named(tmp_path/'in'), tmp_path/'out')
    assert (n, before) == (0, 1) and [name for name, _ in failed] == ['bad.jpg', 'cut.png']
    assert not any('BytesIO' in why for _, why in failed)


def test_nothing_that_can_be_read(model, tmp_path):
    (tmp_path/'bad.jpg').write_bytes(b'')
    assert explain_files(model, [(tmp_path/'bad.jpg', 'bad.jpg')], tmp_path/'out')[0] == 0
    assert files(tmp_path/'out') == ['explanations.csv', 'explanations.json']


def test_arrays_are_an_option(model, tmp_path):
    path, out = save(tmp_path/'in'/'a.png'), tmp_path/'out'
    images = named(tmp_path/'in')
    assert explain_files(model, images, out)[0] == 1 and not (out/'arrays').exists()
    assert explain_files(model, images, out, arrays=True)[:2] == (1, 0)
    with np.load(out/'arrays'/'a.npz') as arrays: old = arrays['map']
    save(path, seed=5)
    assert explain_files(model, images, out, arrays=True)[:2] == (1, 0)
    with np.load(out/'arrays'/'a.npz') as arrays: assert (arrays['map'] != old).any()
    save(path, seed=6)
    assert explain_files(model, images, out)[:2] == (1, 0) and not (out/'arrays'/'a.npz').exists()  # it was of another


def test_a_second_run_writes_nothing_twice(model, tmp_path):
    for seed in range(3): save(tmp_path/'in'/f'{seed}.png', seed=seed)
    out, images = tmp_path/'out', named(tmp_path/'in')
    explain_files(model, images, out)
    written = {path: path.stat().st_mtime_ns for path in out.rglob('*.png')}
    assert explain_files(model, images, out)[:2] == (0, 3)
    assert {path: path.stat().st_mtime_ns for path in out.rglob('*.png')} == written
    (out/'contact_sheet.png').unlink()
    (out/'maps'/'1.png').unlink()
    assert explain_files(model, images, out)[:2] == (1, 2) and (out/'contact_sheet.png').exists()
    assert {row['image'] for row in rows(out)} == {'0.png', '1.png', '2.png'}


def test_the_sheet_shows_some_of_many(model, tmp_path):
    images = [(save(tmp_path/'in'/'a.png'), f'{number}.png') for number in range(40)]
    explain_files(model, images, tmp_path/'out')
    shown, n = module._sheet_rows(rows(tmp_path/'out'), dict((name, path) for path, name in images))
    assert (len(shown), n) == (24, 40) and shown[0]['image'] == '0.png' and shown[-1]['image'] == '39.png'
    with Image.open(tmp_path/'out'/'contact_sheet.png') as sheet: assert sheet.width < 1500 and sheet.height < 1500


def test_files_have_the_usual_mode(model, tmp_path):
    save(tmp_path/'in'/'a.png')
    explain_files(model, named(tmp_path/'in'), tmp_path/'out', arrays=True)
    (tmp_path/'usual').write_text('')
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path/'out').rglob('*') if path.is_file()}
    assert modes == {stat.S_IMODE((tmp_path/'usual').stat().st_mode)}


def test_lines_instead_of_a_bar_where_there_is_no_terminal(model, tmp_path, capsys, monkeypatch):
    images = [(save(tmp_path/'in'/'a.png'), f'{number}.png') for number in range(4)]
    explain_files(model, images, tmp_path/'silent', say=None)
    assert capsys.readouterr() == ('', '')
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr(module.time, 'time', lambda: next(clock))
    explain_files(model, images, tmp_path/'out', bs=2)
    assert capsys.readouterr() == ('', '2 of 4 images\n4 of 4 images\n')


def test_without_a_size_images_are_resized_as_explain_does(tmp_path):
    "A model that does not know its size has one answer for an image, by whatever way it comes."
    model = AntehocModel(small_cnn(2), torch.rand(2, 3, 32, 32), eta=2, meta=dict(cnn=dict(arch='small_cnn', n_out=2)))
    save(tmp_path/'photos'/'a.png')
    with pytest.warns(UserWarning, match='does not know the size of its images, so they are resized to 224 x 224'):
        explain_files(model.eval(), named(tmp_path/'photos'), tmp_path/'out', say=None, arrays=True)
    expected = model.explain(tmp_path/'photos'/'a.png')
    with np.load(tmp_path/'out'/'arrays'/'a.npz') as arrays:
        assert arrays['map'].shape == (224, 224)
        np.testing.assert_allclose(arrays['map'], expected.map[0, 0], atol=1e-5)
