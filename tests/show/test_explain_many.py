"""Explaining many images: what the table says, killed and resumed runs, sources, several processes, and bad input."""
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from antehoc_nb.cli import app
from antehoc_nb.core.model import AntehocModel, Explanation, Framing
from antehoc_nb.show import explain_many as module
from antehoc_nb.show.explain_many import TABLE_COLUMNS, explain_many, read_explained
from antehoc_nb.show.plots import concept_regions
from antehoc_nb.train.archs import small_cnn

pytestmark = pytest.mark.usefixtures('one_thread')
USUAL = dict(shard=8, bs=4, workers=0, say=None)


def make_model(vocab=('cat', 'dog'), n_out=2, **meta):
    torch.manual_seed(0)
    about = dict(cnn=dict(arch='small_cnn', n_out=n_out), size=[32, 48], vocab=list(vocab)) | meta
    return AntehocModel(small_cnn(n_out), torch.rand(2, 3, 32, 48), eta=2, meta=about).eval()


@pytest.fixture(scope='module')
def model(): return make_model()


def picture(seed=0, size=(48, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def as_bytes(image, form='PNG'):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def fill(folder, n=20, classes=('cat', 'dog')):
    for i in range(n):
        path = folder/classes[i % len(classes)]/f'{i:03}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (40 + i, 30)).save(path)
    return folder


def content(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob('*') if path.is_file()}


# --- The table

def test_the_table_says_what_explain_says(model, tmp_path):
    images = fill(tmp_path/'in', 11)
    done = explain_many(model, images, tmp_path/'out', **USUAL)
    assert done == (11, 0, 0, tmp_path/'out'/'images.csv')
    explained = read_explained(tmp_path/'out')
    table, maps = explained.images, explained.maps()
    assert list(table.columns) == TABLE_COLUMNS
    assert table.image.tolist() == sorted(path.relative_to(images).as_posix() for path in images.rglob('*.png'))
    assert maps.shape == (11, 8, 12) and maps.dtype == np.float32
    for row, stored in zip(table.itertuples(), maps):
        e = model.explain(images/row.image)
        assert (row.prediction, row.label) == (e.labels[0], row.image.split('/')[0])
        assert row.probability == pytest.approx(e.probabilities.max().item(), abs=2e-6)
        of_label = e.probabilities[0, ('cat', 'dog').index(row.label)].item()
        assert row.label_probability == pytest.approx(of_label, abs=2e-6)
        small = torch.nn.functional.avg_pool2d(e.map, 4)[0, 0].numpy()
        np.testing.assert_allclose(stored, small, atol=.5 / 255 + 1e-5)
        assert (row.width, row.height) == Image.open(images/row.image).size
        assert explained.open_image(row.Index).size == (row.width, row.height)


def test_numbers_are_those_of_the_stored_map(model, tmp_path):
    explain_many(model, fill(tmp_path/'in', 9), tmp_path/'out', threshold=.3, **USUAL)
    explained = read_explained(tmp_path/'out')
    for row, stored in zip(explained.images.itertuples(), explained.maps()):
        assert row.area == pytest.approx((stored >= .3).mean(), abs=1e-6)
        cells = stored.reshape(4, 2, 4, 3).sum((1, 3)) / stored.sum()
        told = [getattr(row, f'energy_{r}{c}') for r in range(4) for c in range(4)]
        np.testing.assert_allclose(told, cells.ravel(), atol=1e-6)
        y, x = np.indices(stored.shape) + .5
        assert row.centre_x == pytest.approx((x * stored).sum() / stored.sum() / 12, abs=1e-5)
        assert row.centre_y == pytest.approx((y * stored).sum() / stored.sum() / 8, abs=1e-5)
        regions = json.loads(row.regions)
        wanted = [[*np.multiply(o.box, [row.width / 12, row.height / 8] * 2), o.area, o.energy]
                  for o in concept_regions(stored, .3)]
        assert len(regions) == len(wanted) > 0
        np.testing.assert_allclose(sorted(regions), sorted(wanted), atol=.051)


@pytest.mark.parametrize('shape', [(3, 7), (8, 12), (1, 1), (56, 56)])
def test_shares_and_regions_of_maps_of_any_shape(shape):
    maps = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    maps[2] = 0
    rows = module._map_columns(maps, [(100, 50)] * 5, .8, Framing((50, 100)))
    for stored, row in zip(maps, rows):
        cells = [row[name] for name in TABLE_COLUMNS if name.startswith('energy')]
        if not stored.any():
            assert cells == [None] * 16 and (row['centre_x'], row['regions'], row['area']) == (None, '[]', 0)
            continue
        assert sum(cells) == pytest.approx(1, abs=1e-5) and 0 < row['centre_x'] < 1
        assert len(json.loads(row['regions'])) == len(concept_regions(stored / 255, .8))


@pytest.mark.parametrize('task, n_out', [('multi-label', 2), ('binary', 1), ('regression', 2)])
def test_every_task_that_has_words(tmp_path, task, n_out):
    model = make_model(n_out=n_out, task=task, threshold=.4)
    explain_many(model, fill(tmp_path/'in', 5), tmp_path/'out', **USUAL)
    for row in read_explained(tmp_path/'out').images.itertuples():
        e = model.explain(tmp_path/'in'/row.image)
        said = sorted(e.decisions[0], key=lambda pair: -(pair[1] or 0))  # the map is about the first
        assert row.prediction == (';'.join(name for name, _ in said) or 'none')
        if task == 'regression': assert np.isnan(row.probability) and np.isnan(row.label_probability)
        else:
            p = e.probabilities[0].tolist()
            of_label = dict(zip(('cat', 'dog'), [1 - p[0], p[0]] if task == 'binary' else p))[row.label]
            assert row.label_probability == pytest.approx(of_label, abs=2e-6)
        if task == 'multi-label' and row.prediction != 'none':
            assert row.probability == pytest.approx(min(value for _, value in e.decisions[0]), abs=2e-6)


def test_the_label_is_the_nearest_folder_that_is_a_class():
    assert module._class_of_folder('dog/cat/x/1.jpg', {'cat': 0, 'dog': 1}) == 'cat'
    assert module._class_of_folder('train/dog.jpg', {'cat': 0, 'dog': 1}) == ''
    assert module._class_of_folder('dog', {'dog': 1}) == ''


@pytest.mark.slow
def test_class_names_that_look_like_nothing(tmp_path):
    pytest.importorskip('pyarrow')
    images = fill(tmp_path/'in', 6, ('NA', 'None'))
    explain_many(make_model(('NA', 'None')), images, tmp_path/'out', **USUAL)
    explain_many(make_model(('NA', 'None')), images, tmp_path/'other', table='parquet', **USUAL)
    tables = [read_explained(tmp_path/name).images for name in ('out', 'other')]
    assert tables[0].label.tolist() == ['NA'] * 3 + ['None'] * 3 and not tables[0].prediction.eq('').any()
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.slow
def test_names_of_every_kind(model, tmp_path):
    pytest.importorskip('pyarrow')
    names = ['a b.png', 'ü.png', 'with "quotes", commas.png', 'two\nlines.png', os.fsdecode(b'\xff.png'), 'UPPER.PNG']
    (tmp_path/'in').mkdir()
    for i, name in enumerate(names): picture(i).save(tmp_path/'in'/name)
    explain_many(model, tmp_path/'in', tmp_path/'out', **USUAL)
    explained = read_explained(tmp_path/'out')
    assert explained.images.image.tolist() == sorted(names)
    for row in range(len(names)): explained.open_image(row)
    explain_many(model, tmp_path/'in', tmp_path/'other', table='parquet', maps='parquet', **USUAL)
    assert '\\xff.png' in read_explained(tmp_path/'other').images.image.tolist()


# --- Bad files

def test_bad_files_are_rows(model, tmp_path):
    images = fill(tmp_path/'in', 6)
    (images/'cat'/'empty.jpg').write_bytes(b'')
    (images/'dog'/'text.jpg').write_bytes(b'no image')
    whole = as_bytes(picture(0, (300, 300)))
    (images/'dog'/'cut.png').write_bytes(whole[:len(whole)//2])
    (images/'dog'/'gone.png').symlink_to(tmp_path/'nowhere.png')
    os.mkfifo(images/'dog'/'pipe.png')
    (images/'dog'/'link.png').symlink_to(images/'cat'/'000.png')
    done = explain_many(model, images, tmp_path/'out', **USUAL)
    assert (done.images, done.failed) == (12, 5)
    explained = read_explained(tmp_path/'out')
    bad = explained.images[explained.images.error != '']
    assert bad.image.tolist() == ['cat/empty.jpg', 'dog/cut.png', 'dog/gone.png', 'dog/pipe.png', 'dog/text.jpg']
    reasons = bad.error.tolist()
    assert reasons[0] == 'the file is empty' and 'truncated' in reasons[1]
    assert reasons[2:] == ['No such file or directory', 'not a regular file', 'not an image, or damaged']
    assert bad.label.tolist() == ['cat', *4 * ['dog']] and bad.position.isna().all()
    good = np.flatnonzero(explained.images.error == '')
    assert explained.maps(good).shape[0] == 7
    message = ('row 3 (cat/empty.jpg) has no map: the file is empty; leave out the rows with an error, '
               'images.error != ""')
    with pytest.raises(ValueError) as caught: explained.maps()
    assert str(caught.value) == message


def test_nothing_but_bad_files(model, tmp_path):
    pytest.importorskip('pyarrow')
    (tmp_path/'in').mkdir()
    for i in range(10): (tmp_path/'in'/f'{i}.jpg').write_bytes(b'')
    for maps in ('npz', 'png', 'parquet'):
        assert explain_many(model, tmp_path/'in', tmp_path/maps, maps=maps, **USUAL).failed == 10
        assert read_explained(tmp_path/maps).maps([]).shape == (0, 8, 12)


# --- Forms

@pytest.mark.parametrize('maps, table', [('png', 'csv'), ('parquet', 'parquet'), ('none', 'parquet')])
def test_forms_hold_the_same(model, tmp_path, maps, table):
    if 'parquet' in (maps, table): pytest.importorskip('pyarrow')
    images = fill(tmp_path/'in', 11)
    (images/'cat'/'bad.png').write_bytes(b'')
    explain_many(model, images, tmp_path/'usual', **USUAL)
    explain_many(model, images, tmp_path/'other', maps=maps, table=table, **USUAL)
    usual, other = read_explained(tmp_path/'usual'), read_explained(tmp_path/'other')
    place = ['shard', 'position']
    pd.testing.assert_frame_equal(usual.images.drop(columns=place), other.images.drop(columns=place))
    assert sorted(path.name for path in (tmp_path/'other').iterdir()) == sorted(
        ['explain.json', f'images.{table}', *(['maps'] if maps != 'none' else [])])
    good = np.flatnonzero(usual.images.error == '')[::-1]
    if maps == 'none':
        with pytest.raises(ValueError) as caught: other.maps()
        assert str(caught.value) == (f"{tmp_path}/other: the images were explained with maps='none'; explain them "
                                     "again with maps='npz', into another folder")
    else: np.testing.assert_array_equal(usual.maps(good), other.maps(good))


def test_a_large_picture_of_maps_is_read(model, tmp_path, monkeypatch):
    "Larger than what Pillow opens without being asked"
    explain_many(model, fill(tmp_path/'in', 8), tmp_path/'out', maps='png', **USUAL)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    assert read_explained(tmp_path/'out').maps().shape == (8, 8, 12)


# --- Killed, interrupted, resumed

def hang_after_three_shards(model, images, out, written):
    "In a process of its own: write three shards, begin a file of the fourth, and hang"
    write = module._write_shard
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its jobs in the background ignore it

    def slowly(folder, shard, *args, **kwargs):
        write(folder, shard, *args, **kwargs)
        if shard < 2: return
        (out/'maps'/'.00003.npz').write_bytes(b'torn')
        written.set()
        time.sleep(600)
    module._write_shard = slowly
    explain_many(model, images, out, **USUAL)


@pytest.fixture
def interrupted(model, tmp_path):
    "A run that hangs after its third shard, its folder, and a run over the same images that was left alone"
    images = fill(tmp_path/'in', 45)
    (images/'cat'/'bad.png').write_bytes(b'')
    explain_many(model, images, tmp_path/'alone', **USUAL)
    fork = multiprocessing.get_context('fork')
    written = fork.Event()
    process = fork.Process(target=hang_after_three_shards, args=(model, images, tmp_path/'out', written))
    process.start()
    assert written.wait(60)
    yield process, images, tmp_path
    process.kill()
    process.join()


def test_killed_and_started_again(model, interrupted):
    process, images, folder = interrupted
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list((folder/'out'/'parts').iterdir())) == 3 and not (folder/'out'/'images.csv').exists()
    with pytest.raises(FileNotFoundError) as caught: read_explained(folder/'out')
    assert str(caught.value) == (f'{folder}/out: the run is not finished, there is no images.csv; start the same '
                                 'command again, it goes on')
    done = explain_many(model, images, folder/'out', **USUAL)
    assert done[:3] == (46, 24, 1)
    (folder/'out'/'maps'/'.00003.npz').unlink(missing_ok=True)
    assert content(folder/'out') == content(folder/'alone')


@pytest.mark.slow
def test_interrupted_by_the_keyboard(model, interrupted):
    process, images, folder = interrupted
    for _ in range(2):  # the first waits for the shard that is being written
        os.kill(process.pid, signal.SIGINT)
        time.sleep(.3)
    process.join(20)
    assert process.exitcode == 1
    assert not list((folder/'out'/'parts').glob('.*'))
    assert explain_many(model, images, folder/'out', **USUAL).before >= 24
    (folder/'out'/'maps'/'.00003.npz').unlink(missing_ok=True)
    assert content(folder/'out') == content(folder/'alone')


@pytest.mark.parametrize('broken', ['_write_npz', '_write_csv', '_join_csv'])
def test_a_full_disk_is_an_error_and_loses_nothing(model, tmp_path, monkeypatch, broken):
    images = fill(tmp_path/'in', 20)
    explain_many(model, images, tmp_path/'alone', **USUAL)
    real, calls = getattr(module, broken), []

    def full(*args):
        calls.append(args)
        real(*args)
        if len(calls) == 2 or broken == '_join_csv': raise OSError(28, 'No space left on device')
    monkeypatch.setattr(module, broken, full)
    monkeypatch.setitem(module.MAP_FORMS, 'npz', (module._write_npz, module.MAP_FORMS['npz'][1]))
    with pytest.raises(OSError, match='No space left'): explain_many(model, images, tmp_path/'out', **USUAL)
    assert not [path for path in content(tmp_path/'out') if path.split('/')[-1].startswith('.')]
    monkeypatch.undo()
    done = explain_many(model, images, tmp_path/'out', **USUAL)
    assert done.before == (20 if broken == '_join_csv' else 8)
    assert content(tmp_path/'out') == content(tmp_path/'alone')


def test_a_disk_that_is_too_small_is_named_before(model, tmp_path, monkeypatch):
    images = fill(tmp_path/'in', 20)
    usage = type('Usage', (), dict(free=2000))
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(OSError) as caught: explain_many(model, images, tmp_path/'out', **USUAL)
    assert str(caught.value) == (f"{tmp_path/'out'}: 20 images need at least 0 MB, 0 MB are free there; make room, "
                                 "take maps='none' (a table without maps), or choose another disk")
    assert not (tmp_path/'out'/'explain.json').exists()


def test_a_model_by_the_folder_of_its_run(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path/'run'/'model')
    picture().save(tmp_path/'a.png')
    monkeypatch.chdir(tmp_path)
    explain_many('run', 'a.png', 'out', **USUAL)
    assert read_explained(tmp_path/'out').meta['model'] == str(tmp_path/'run')


def test_a_finished_run_is_left_as_it_is(model, tmp_path):
    images = fill(tmp_path/'in', 12)
    explain_many(model, images, tmp_path/'out', **USUAL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path/'out').rglob('*')}
    assert explain_many(model, images, tmp_path/'out', **USUAL)[:3] == (12, 12, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path/'out').rglob('*')} == before
    (tmp_path/'out'/'parts').mkdir()  # killed between the table and its end
    meta = json.loads((tmp_path/'out'/'explain.json').read_text())
    (tmp_path/'out'/'explain.json').write_text(json.dumps({k: v for k, v in meta.items() if k != 'failed'}))
    assert explain_many(model, images, tmp_path/'out', **USUAL)[:3] == (12, 12, 0)
    assert not (tmp_path/'out'/'parts').exists()
    assert json.loads((tmp_path/'out'/'explain.json').read_text()) == meta


def test_workers_and_batches_change_nothing_that_is_told(model, tmp_path):
    images = fill(tmp_path/'in', 20)
    explain_many(model, images, tmp_path/'a', shard=8, bs=4, workers=0, say=None)
    explain_many(model, images, tmp_path/'b', shard=8, bs=4, workers=2, say=None)
    assert content(tmp_path/'a') == content(tmp_path/'b')


def test_an_error_of_the_network_reaches_the_caller(tmp_path):
    model = make_model()
    images = fill(tmp_path/'in', 20)
    calls = []
    forward = model.cnn.forward

    def fails(*args):
        calls.append(1)
        if len(calls) > 4: raise FloatingPointError('broken')
        return forward(*args)
    model.cnn.forward = fails
    with pytest.raises(FloatingPointError, match='broken'): explain_many(model, images, tmp_path/'out', **USUAL)


def test_memory_is_flat(model, tmp_path):
    "The peak of the second half of many batches is that of the first, and far below what all the images take."
    images = fill(tmp_path/'in', 8)
    for i in range(72): (images/'cat'/f'link{i}.png').symlink_to(images/'cat'/'000.png')
    peaks = []

    class Watch:
        def __init__(self, total, say): pass

        def add(self, n):
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()

        def close(self): pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, '_Progress', Watch)
        tracemalloc.start()
        try: explain_many(model, images, tmp_path/'out', shard=16, bs=4, workers=0, say=None)
        finally: tracemalloc.stop()
    first, second = peaks[5:len(peaks)//2], peaks[len(peaks)//2:]
    assert len(peaks) == 20 and max(second) < max(first) + 200_000


def test_a_name_takes_few_bytes():
    names = module._Names(f'class_{i % 100}/image_{i:08}.jpg' for i in range(20_000))
    assert len(names.bytes) + names.ends.nbytes < 40 * 20_000
    assert names[12_345] == 'class_45/image_00012345.jpg' and len(names) == 20_000


# --- Sources

def test_what_is_found_in_a_folder(model, tmp_path):
    images = fill(tmp_path/'in', 4)
    for name in ('notes.txt', '.hidden.png', '.git/x.png', 'cat/deep/er/y.JPG'):
        (images/name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(images/name, 'PNG')
    (images/'loop').symlink_to(images)
    for out in (images/'out', images/'dog'/'out'):  # the second run does not see the first one's maps
        explain_many(model, images, out, maps='png', **USUAL)
        assert read_explained(out).images.image.tolist() == [
            'cat/000.png', 'cat/002.png', 'cat/deep/er/y.JPG', 'dog/001.png', 'dog/003.png']
    assert explain_many(model, images, images/'out', maps='png', **USUAL).before == 5
    assert explain_many(model, images/'cat'/'000.png', tmp_path/'one', **USUAL).images == 1


def test_images_of_other_kinds_are_said_to_be_left_out(model, tmp_path):
    images, said = fill(tmp_path/'in', 2), []
    (images/'cat'/'phone.heic').write_bytes(b'')
    (images/'cat'/'notes.txt').write_bytes(b'')
    explain_many(model, images, tmp_path/'out', **USUAL | dict(say=said.append))
    assert said == [f'left out: 1 image of a kind that is not read (.heic), the first is {images}/cat/phone.heic']
    with pytest.raises(ValueError, match='no image files found in this folder; there is 1 image of a kind that is not'):
        (images/'cat'/'000.png').unlink()
        explain_many(model, images/'cat', tmp_path/'none', **USUAL)


def samples(n=10):
    return [(f'{i:04}', as_bytes(picture(i)), str(i % 2) if i % 3 else ('cat', 'dog')[i % 2]) for i in range(n)]


def write_tar(path, items, form='w', **others):
    with tarfile.open(path, form) as tar:
        for key, image, label in items:
            for name, data in [(f'{key}.png', image), *([(f'{key}.cls', label.encode())] if label else []),
                               (f'{key}.json', b'{}'), *((f'{key}.{o}', b'') for o in others)]:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_a_tar_as_webdataset_reads_it(model, tmp_path):
    webdataset = pytest.importorskip('webdataset')
    write_tar(tmp_path/'a.tar', [*samples(), ('a/last', b'no image', '')])
    assert explain_many(model, tmp_path/'a.tar', tmp_path/'out', **USUAL)[:3] == (11, 0, 1)
    explained = read_explained(tmp_path/'out')
    theirs = list(webdataset.WebDataset(str(tmp_path/'a.tar'), shardshuffle=False))
    assert explained.images.image.tolist() == [f'{sample["__key__"]}.png' for sample in theirs]
    for row, sample in enumerate(theirs[:10]):
        assert explained.images.label[row] == ('cat', 'dog')[row % 2]
        e = model.explain(sample['png'])
        assert explained.images.probability[row] == pytest.approx(e.probabilities.max().item(), abs=2e-6)
        assert (np.asarray(explained.open_image(row)) == np.asarray(Image.open(io.BytesIO(sample['png'])))).all()
    assert explained.meta['source'] == 'tar' and explained.meta['root'] == str(tmp_path/'a.tar')


@pytest.mark.slow
def test_several_tars(model, tmp_path):
    pytest.importorskip('webdataset')
    for number in range(2): write_tar(tmp_path/f'x-{number}.tar', samples(5))
    explain_many(model, tmp_path/'x-{0..1}.tar', tmp_path/'out', **USUAL)
    explained = read_explained(tmp_path/'out')
    assert explained.images.image.tolist()[4:6] == ['x-0.tar/0004.png', 'x-1.tar/0000.png']
    np.testing.assert_allclose(explained.maps(range(5)), explained.maps(range(5, 10)), atol=1/255)
    explained.open_image(7)
    with pytest.raises(FileNotFoundError) as caught: explain_many(model, tmp_path/'x-{0..2}.tar', tmp_path/'o', **USUAL)
    assert str(caught.value) == f'{tmp_path}/x-2.tar: no such tar file'


def test_a_data_set_in_memory_and_saved(model, tmp_path):
    datasets = pytest.importorskip('datasets')
    kinds = datasets.ClassLabel(names=['dog', 'cat', 'bird'])
    features = datasets.Features(dict(name=datasets.Value('string'), photo=datasets.Image(), y=kinds))
    rows = [dict(bytes=as_bytes(picture(i)), path=None) for i in range(8)] + [dict(bytes=b'no', path=None), None]
    columns = dict(name=list('abcdefghij'), photo=rows, y=[0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    dataset = datasets.Dataset.from_dict(columns, features)
    explain_many(model, dataset, tmp_path/'memory', **USUAL)
    dataset.save_to_disk(tmp_path/'saved')
    explain_many(model, tmp_path/'saved', tmp_path/'out', **USUAL)
    memory, saved = (read_explained(tmp_path/name) for name in ('memory', 'out'))
    pd.testing.assert_frame_equal(memory.images, saved.images)
    assert saved.images.image.tolist() == [f'{i:08}' for i in range(10)]
    assert saved.images.label.tolist() == ['dog', 'cat', '', 'dog', 'cat', '', 'dog', 'cat', '', '']
    assert saved.images.error.tolist()[-2:] == ['not an image, or damaged', 'the row has no image']
    assert (np.asarray(saved.open_image(3)) == np.asarray(picture(3))).all()
    assert (np.asarray(memory.open_image(3, source=dataset)) == np.asarray(picture(3))).all()
    with pytest.raises(ValueError) as caught: memory.open_image(0)
    assert str(caught.value) == (f'{tmp_path}/memory: the images are of a data set that was in memory; give it: '
                                 'open_image(row, source=dataset)')
    splits = datasets.DatasetDict(train=dataset)
    splits.save_to_disk(tmp_path/'splits')
    with pytest.raises(ValueError) as caught: explain_many(model, tmp_path/'splits', tmp_path/'o', **USUAL)
    assert str(caught.value) == (f'{tmp_path}/splits holds several data sets; choose one of its splits: '
                                 f'{tmp_path}/splits/train')
    for wrong, message in [(splits, 'source: a DatasetDict has no images by number; choose one of its splits, train'),
                           (3, 'source: a int has no images by number')]:
        with pytest.raises(TypeError) as caught: explain_many(model, wrong, tmp_path/'o', **USUAL)
        assert str(caught.value) == message
    without = dataset.remove_columns('photo')
    with pytest.raises(ValueError) as caught: explain_many(model, without, tmp_path/'o', **USUAL)
    assert str(caught.value) == ('source: the data set has no column of images (it has name, y); '
                                 'name it: dataset.cast_column(name, datasets.Image())')


@pytest.mark.parametrize('package, source', [('webdataset', 'a.tar'), ('datasets', 'saved'), ('pyarrow', 'in')])
def test_a_missing_package_is_named(model, tmp_path, monkeypatch, package, source):
    fill(tmp_path/'in', 2)
    write_tar(tmp_path/'a.tar', samples(2))
    (tmp_path/'saved').mkdir()
    for name in ('dataset_info.json', 'state.json'): (tmp_path/'saved'/name).write_text('{}')
    for name in [o for o in sys.modules if o.split('.')[0] == package]: monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    table = 'parquet' if package == 'pyarrow' else 'csv'
    with pytest.raises(ImportError, match=r"pip install 'antehoc_nb\[bulk\]'"):
        explain_many(model, tmp_path/source, tmp_path/'out', table=table, **USUAL)


# --- Several processes

TOGETHER = "module.explain_many(sys.argv[1], sys.argv[2], sys.argv[3], shard=8, bs=4, workers=1, say=None)"


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(model, tmp_path):
    pytest.importorskip('accelerate')
    images = fill(tmp_path/'in', 45)
    (images/'cat'/'bad.png').write_bytes(b'')
    model.save_pretrained(tmp_path/'model')
    script = tmp_path/'run.py'
    script.write_text('import sys\nimport antehoc_nb.train.archs\nfrom antehoc_nb.show import explain_many as module\n'
                      'if __name__ == "__main__": ' + TOGETHER)
    explain_many(tmp_path/'model', images, tmp_path/'one', **USUAL)
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2',
              '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
    run = subprocess.run([*launch, script, tmp_path/'model', images, tmp_path/'two'], capture_output=True, text=True,
                         env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'})
    assert run.returncode == 0, run.stderr
    assert content(tmp_path/'two') == content(tmp_path/'one')
    assert len([name for name in content(tmp_path/'two') if name.startswith('maps')]) == 6


def test_shards_are_divided_and_each_is_made_once(model, tmp_path, monkeypatch):
    "Both processes one after the other: the first leaves the second one's shards alone."
    images = fill(tmp_path/'in', 45)
    explain_many(model, images, tmp_path/'one', **USUAL)

    class Fake(module._OneProcess):
        num_processes = 2

        def __init__(self, index):
            self.process_index = index
            self.is_main_process = index == 0
    written, real = [], module._write_shard

    def write(out, shard, *args, **kwargs):
        written.append(shard)
        real(out, shard, *args, **kwargs)
    monkeypatch.setattr(module, '_write_shard', write)
    monkeypatch.setattr(module, '_processes', lambda model: Fake(0))
    with pytest.raises(FileNotFoundError):  # the real one would wait for the other
        explain_many(model, images, tmp_path/'two', **USUAL)
    monkeypatch.setattr(module, '_processes', lambda model: Fake(1))
    with pytest.raises(KeyError): explain_many(model, images, tmp_path/'two', **USUAL)
    assert written == [0, 2, 4, 1, 3, 5]
    monkeypatch.undo()
    assert explain_many(model, images, tmp_path/'two', **USUAL).before == 45
    assert content(tmp_path/'one') == content(tmp_path/'two')


# --- Errors before any work

@pytest.mark.parametrize('settings, message', [
    (dict(maps='zip'), "unknown maps 'zip': did you mean 'npz'? Known: none, npz, parquet, png"),
    (dict(table='xls'), "unknown table 'xls'"),
    (dict(threshold=0), 'threshold=0 must lie in (0,1]'),
    (dict(threshold=1.5), 'threshold=1.5 must lie in (0,1]'),
    (dict(bs=0), 'bs=0 must be at least 1'),
    (dict(workers=-1), 'workers=-1 must be at least 0'),
    (dict(shard=0), 'shard=0 must be at least 1'),
    (dict(target='cow'), "unknown class 'cow'")])
def test_settings_that_cannot_be(model, tmp_path, settings, message):
    fill(tmp_path/'in', 2)
    with pytest.raises(ValueError) as caught: explain_many(model, tmp_path/'in', tmp_path/'out', **USUAL | settings)
    assert message.split(': did')[0] in str(caught.value)
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('source, error, message', [
    ('nowhere', FileNotFoundError, '{0}/nowhere: no such image or folder'),
    ('empty', ValueError, '{0}/empty: no image files found in this folder'),
    ('no.tar', FileNotFoundError, '{0}/no.tar: no such tar file'),
    ('https://x.org/a.tar', ValueError,
     'https://x.org/a.tar is an address; download it first, images are read from files')])
def test_sources_that_are_none(model, tmp_path, source, error, message):
    if source == 'no.tar': pytest.importorskip('webdataset')
    (tmp_path/'empty').mkdir()
    path = source if ':' in source else tmp_path/source
    with pytest.raises(error) as caught: explain_many(model, path, tmp_path/'out', **USUAL)
    assert str(caught.value) == message.format(tmp_path) and not (tmp_path/'out').exists()


def test_tars_that_are_none(model, tmp_path):
    pytest.importorskip('webdataset')
    write_tar(tmp_path/'packed.tar', samples(3), 'w:gz')
    write_tar(tmp_path/'whole.tar', samples(3))
    (tmp_path/'cut.tar').write_bytes((tmp_path/'whole.tar').read_bytes()[:3000])
    write_tar(tmp_path/'none.tar', [])
    (tmp_path/'text.tar').write_text('no tar ' * 200)
    for name in ('packed', 'cut', 'text'):
        with pytest.raises(ValueError, match=rf'{name}.tar: no uncompressed tar, or damaged .*, so unpack a .tar.gz'):
            explain_many(model, tmp_path/f'{name}.tar', tmp_path/'out', **USUAL)
    with pytest.raises(ValueError) as caught: explain_many(model, tmp_path/'none.tar', tmp_path/'out', **USUAL)
    assert str(caught.value) == f'{tmp_path}/none.tar: no images found in this tar'


def test_a_folder_that_holds_another_run(model, tmp_path):
    images, out = fill(tmp_path/'in', 12), tmp_path/'out'
    explain_many(model, images, out, **USUAL)
    with pytest.raises(ValueError) as caught: explain_many(model, images, out, **USUAL | dict(threshold=.5))
    assert str(caught.value) == (f'{out} holds a run with other settings (threshold: 0.8 there, 0.5 now); '
                                 'choose another folder, or delete this one')
    with pytest.raises(ValueError, match='classes: .*; choose another folder'):
        explain_many(make_model(('cat', 'cow')), images, out, **USUAL)
    (images/'cat'/'000.png').unlink()
    with pytest.raises(ValueError) as caught: explain_many(model, images, out, **USUAL)
    assert str(caught.value) == (f'{out} holds a run over 12 images of {images}, where there are other images now '
                                 '(11); choose another folder, or delete this one')
    (tmp_path/'pictures').mkdir()
    (tmp_path/'pictures'/'explanations.json').write_text('{}')
    with pytest.raises(ValueError) as caught: explain_many(model, images, tmp_path/'pictures', **USUAL)
    assert str(caught.value) == (f'{tmp_path}/pictures holds the overlays of `antehoc explain` without --maps; '
                                 'choose another folder')


def test_a_folder_that_cannot_be_written(model, tmp_path, monkeypatch):
    images = fill(tmp_path/'in', 2)
    (tmp_path/'file').write_text('')
    for out in (tmp_path/'file', tmp_path/'file'/'below'):
        with pytest.raises(NotADirectoryError) as caught: explain_many(model, images, out, **USUAL)
        assert str(caught.value) == f'out: {tmp_path}/file is a file, not a folder; choose another folder'
    monkeypatch.setattr(module.os, 'access', lambda path, mode: False)
    with pytest.raises(PermissionError) as caught: explain_many(model, images, tmp_path/'out'/'deep', **USUAL)
    assert str(caught.value) == f'out: no permission to write to {tmp_path}; choose another folder'
    assert not (tmp_path/'out').exists()


def test_models_without_words(tmp_path):
    images = fill(tmp_path/'in', 2)
    layers = nn.Conv2d(5, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    five = AntehocModel(nn.Sequential(*layers), torch.rand(1, 5, 32, 32), eta=1, meta=dict(size=[32, 32])).eval()
    with pytest.raises(ValueError, match='the CNN takes images of 5 channels, which no image file has'):
        explain_many(five, images, tmp_path/'out', **USUAL)
    with pytest.raises(ValueError, match='the model gives one number for each image, and does not say what it means'):
        explain_many(make_model(n_out=1), images, tmp_path/'out', **USUAL)


# --- The reader's errors

def test_folders_that_are_none(model, tmp_path):
    with pytest.raises(FileNotFoundError) as caught: read_explained(tmp_path)
    assert str(caught.value) == (f'{tmp_path} is no folder of explain_many (it has no explain.json); make one with '
                                 '`antehoc explain MODEL IMAGES --maps npz --out FOLDER`')
    out = tmp_path/'out'
    explain_many(model, fill(tmp_path/'in', 12), out, **USUAL)
    with pytest.raises(ValueError, match="columns: unknown column 'size'; known: image, prediction"):
        read_explained(out, ['size'])
    assert [*read_explained(out, ['area']).images] == ['image', 'area', 'shard', 'position', 'error']
    explained = read_explained(out)
    (out/'maps'/'00001.npz').unlink()
    assert explained.maps(slice(0, 8)).shape == (8, 8, 12)
    with pytest.raises(FileNotFoundError) as caught: explained.maps(9)
    assert str(caught.value) == (f'{out}/maps/00001.npz is missing, which has maps of {out}; copy it from where the '
                                 'run was made, or explain the images again')
    meta = json.loads((out/'explain.json').read_text())
    other = json.dumps(meta | dict(format=2))
    for text, message in [(other, 'has format 2, this version of antehoc_nb reads format 1'), ('[]', 'has format None'),
                          ('{', 'is damaged')]:
        (out/'explain.json').write_text(text)
        with pytest.raises(ValueError, match=message): read_explained(out)


@pytest.mark.parametrize('file, change, message', [
    ('explain.json', lambda meta: meta.pop('map_size'), "explain.json lacks the entry 'map_size'"),
    ('explain.json', lambda meta: meta.update(maps='zarr'), "explain.json: maps is 'zarr', which cannot be"),
    ('images.csv', lambda table: table.drop(columns='regions'), "(it lacks the column 'regions')"),
    ('images.csv', lambda table: table[:5], 'images.csv has 5 rows for 12 images, so it was cut or changed'),
    ('images.csv', lambda table: table.assign(area='wide'), "could not convert string to float: 'wide'"),
    ('maps/00000.npz', lambda maps: maps[:, :4, :6], 'has uint8 maps of 4 x 6, explain.json says uint8 of 8 x 12'),
    ('maps/00000.npz', lambda maps: maps[:7], '00000.npz has 7 maps, the table 8 images'),
    ('maps/00000.npz', lambda maps: maps / 255, '00000.npz has float64 maps of 8 x 12'),
    ('maps/00000.npz', None, '00000.npz cannot be read (')])
def test_damaged_and_foreign_files(model, tmp_path, file, change, message):
    out = tmp_path/'out'
    explain_many(model, fill(tmp_path/'in', 12), out, **USUAL)
    path = out/file
    if file.endswith('.json'):
        meta = json.loads(path.read_text())
        change(meta)
        path.write_text(json.dumps(meta))
    elif file.endswith('.csv'): change(pd.read_csv(path)).to_csv(path, index=False)
    elif change: np.savez_compressed(path, maps=change(np.load(path)['maps']))
    else: path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError) as caught: read_explained(out).maps()
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert str(caught.value).endswith('; copy it from where the run was made, or explain the images again')


def test_an_explanation_without_its_images_is_small(model):
    e = model.explain(torch.rand(4, 3, 32, 48))
    small = module._without_images(e)
    assert isinstance(small, Explanation) and len(small) == 4 and small.decisions == e.decisions
    assert sum(tensor.numel() for tensor in (small.map, small.sams, small.weights, small.image)) == 0


def test_progress_has_the_rate_and_the_time_that_is_left(monkeypatch, capsys):
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr(module.time, 'time', lambda: next(clock))
    lines = []
    progress = module._Progress(4000, lines.append)
    progress.add(1000)
    progress.close()
    assert len(lines) == 1 and lines[0].startswith('1,000 of 4,000 images, ') and lines[0].endswith(' left')
    assert capsys.readouterr() == ('', '')


def test_batches_left_alone_are_small_where_images_are_large(model, tmp_path):
    usual, cpu, gpu = module._usual_batch, torch.device('cpu'), torch.device('cuda')
    assert [usual(cpu, (side, side)) for side in (32, 128, 224, 600, 2000)] == [32, 24, 8, 1, 1]
    assert usual(gpu, (600, 600)) == 32
    images = fill(tmp_path/'in', 12)
    explain_many(model, images, tmp_path/'out', shard=8, workers=0, say=None)
    explain_many(model, images, tmp_path/'same', shard=8, workers=0, bs=32, say=None)
    assert (tmp_path/'out/images.csv').read_bytes() == (tmp_path/'same/images.csv').read_bytes()


def test_the_benchmark_runs(tmp_path, monkeypatch):
    "All its sides, on eight images"
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2]/'benchmarks')
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    import bench_bulk
    options = SimpleNamespace(device='cpu', bs=4, pictures=False, reps=2, n=8)
    case = dict(arch='small_cnn', size=32, threads=1, workers=0)
    found = bench_bulk.measure(case, fill(tmp_path/'in', 8), options)
    for side in 'none', 'npz':  # the clock of the CPU may stand still for so little
        assert found[side]['wall']['ratio'] > 0 and found[side]['cpu']['ratio'] >= 0
    told = bench_bulk.plain_loop(bench_bulk.make_model('small_cnn', 32), tmp_path/'in', 4, 0)
    assert len(told) == 8 and all(0 < probability < 1 for _, probability in told)


def test_workers_left_alone_have_few_cores_beside_a_cpu(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(32), raising=False)
    assert [module._usual_workers(torch.device(name)) for name in ('cpu', 'cuda')] == [8, 16]
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert [module._usual_workers(torch.device(name)) for name in ('cpu', 'cuda')] == [2, 7]
    assert Path(module.__file__).name == 'explain_many.py'


# --- The command

@pytest.fixture
def command(model, tmp_path, monkeypatch):
    "A function that runs `antehoc explain` beside a saved model and images"
    monkeypatch.chdir(tmp_path)
    fill(Path('in'), 12)
    Path('in/cat/bad.png').write_bytes(b'')
    model.save_pretrained('model')

    def run(*args, code=0):
        result = CliRunner().invoke(app, ['explain', 'model', *map(str, args), '--device', 'cpu'])
        assert result.exit_code == code, result.output
        return result
    return run


def test_the_command_writes_what_the_function_writes(model, command, tmp_path):
    options = '--out', 'out', '--maps', 'png', '--threshold', .5
    said = command('in', *options, '--table', 'csv', '--workers', 0)
    assert said.stdout.startswith('13 images explained in ')
    assert said.stdout.endswith('; 1 could not be read, see the column error; the table is out/images.csv\n'
                                'next: antehoc report out\n')
    explain_many(model, 'in', 'same', maps='png', workers=0, threshold=.5, name=str(Path('model').resolve()),
                 say=None)
    assert content(Path('out')) == content(Path('same'))
    facts = json.loads(command('in', *options, '--json').stdout)
    assert (facts['explained'], facts['done_before'], facts['failed'], facts['table']) == (0, 13, 1, 'out/images.csv')
    said = command('in/cat/000.png', '--out', 'one', '--maps', 'none').stdout
    assert said.startswith('1 image explained in ') and 'next: ' not in said


def test_pictures_and_tables_have_folders_of_their_own(command, monkeypatch):
    from antehoc_nb import cli
    monkeypatch.setattr(cli, '_MANY', 10)
    said = command('in', '--out', 'pictures', code=1)
    assert '13 images get three files each; --maps npz makes a table and a few files, faster' in said.stdout
    command('in', '--out', 'many', '--maps', 'none', '--workers', 0)
    Path('a.tar').write_bytes(b'')
    for args, message in [
            (('in', '--out', 'many'), '--out many holds a run with --maps; choose another folder'),
            (('in', '--out', 'pictures', '--maps', 'npz'),
             'pictures holds the overlays of `antehoc explain` without --maps; choose another folder'),
            (('a.tar',), 'a.tar: from a tar or a data set only the table and small maps are made; add --maps npz'),
            (('in', '--table', 'csv'), '--table goes with --maps only; add --maps npz'),
            (('in', '--workers', 1), '--workers goes with --maps only; add --maps npz'),
            (('in', '--maps', 'npz', '--arrays'),
             '--arrays and --maps exclude each other: --arrays writes a file for every image'),
            (('nowhere', '--maps', 'npz'), 'nowhere: no such image or folder')]:
        assert f'antehoc: error: {message}\n' in command(*args, code=1).output


def test_of_several_processes_the_first_one_speaks(command, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    assert command('in', '--out', 'out', '--maps', 'none', '--workers', 0).output == ''
