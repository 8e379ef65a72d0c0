"What the notebook 20_images does not show: archives, odd servers, CIFAR-10 files as Python 2 wrote them."
import io
import os
import pickle
import struct
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from fastai.vision.core import TensorImage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from antehoc_nb.core import utils
from antehoc_nb.data import images
from antehoc_nb.data.images import FlipShift, fetch, image_dls, unpack, unpacked


def short_string(text):
    "A pickled byte string, as Python 2 wrote it"
    return b'U' + bytes([len(text)]) + text


def python2_pickle(pixels, labels):
    "Protocol 2 with byte strings, the way of the original files"
    dtype = b'cnumpy\ndtype\n' + short_string(b'u1') + b'K\x00K\x01\x87R'
    dtype_state = b'(K\x03' + short_string(b'|') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
    values = b'T' + struct.pack('<i', len(pixels)) + pixels
    empty = b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85' + short_string(b'b') + b'\x87R'
    array = empty + b'(K\x01K\x02M\x00\x0c\x86' + dtype + dtype_state + b'\x89' + values + b'tb'
    numbers = b']' + b'(' + b''.join(b'K' + bytes([label]) for label in labels) + b'e'
    return b'\x80\x02}(' + short_string(b'data') + array + short_string(b'labels') + numbers + b'u.'


def test_cifar_as_python2_wrote_it(tmp_path):
    raw = np.arange(2*3072, dtype=np.uint8).tobytes()
    (tmp_path/'batch').write_bytes(python2_pickle(raw, labels=[3, 7]))
    pixels, labels = images._cifar_batch(tmp_path/'batch')
    assert labels == [3, 7] and pixels.shape == (2, 32, 32, 3)
    assert (pixels[1].transpose(2, 0, 1).ravel() == np.frombuffer(raw, np.uint8)[3072:]).all()


NO_BATCHES = [b'', b'junk', pickle.dumps(print), pickle.dumps({'data': 1}), pickle.dumps({'data': np.zeros((1, 5))}, 2)]


@pytest.mark.parametrize('payload', NO_BATCHES)
def test_cifar_refuses(tmp_path, payload):
    (tmp_path/'data_batch_1').write_bytes(payload)
    with pytest.raises(ValueError, match='data_batch_1'): image_dls(tmp_path)


def class_folders(root, per_class=3, names=('a', 'b')):
    for name in names:
        (root/name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class): Image.fromarray(np.full((20, 30, 3), 40*i, np.uint8)).save(root/name/f'{i}.jpg')
    return root


def pack(folder, archive):
    "The folder in an archive of the kind that its name says"
    if archive.suffix == '.zip':
        with zipfile.ZipFile(archive, 'w') as opened:
            for file in folder.rglob('*.jpg'): opened.write(file, file.relative_to(folder.parent))
    else:
        mode = 'w:gz' if archive.suffix == '.gz' else 'w'
        with tarfile.open(archive, mode) as opened: opened.add(folder, folder.name)
    return archive


@pytest.mark.parametrize('kind', ['tar', 'tar.gz', 'zip'])
def test_archives_of_class_folders(tmp_path, monkeypatch, kind):
    monkeypatch.setenv('ANTEHOC_CACHE', str(tmp_path/'cache'))
    for split in ('train', 'val', 'test'): class_folders(tmp_path/'src'/'wrap'/split)
    archive = pack(tmp_path/'src'/'wrap', tmp_path/f'set.{kind}')
    dls = image_dls(archive, size=24, bs=2)
    assert dls.one_batch()[0].shape == (2, 3, 24, 24) and len(dls.valid_ds) == 6
    assert all('val' in file.parts for file, _ in dls.valid_ds.items)
    tested = image_dls(archive, size=24, bs=2, valid='test')
    assert all('test' in file.parts for file, _ in tested.valid_ds.items)
    assert len(list((tmp_path/'cache').iterdir())) == 1


def test_validation_classes_must_be_known(tmp_path):
    class_folders(tmp_path/'train')
    class_folders(tmp_path/'test', names=('a', 'z'))
    with pytest.raises(ValueError, match="'z'"): image_dls(tmp_path)
    assert len(image_dls(tmp_path, valid=.3, bs=2).valid_ds) == 2


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 200), share=st.floats(.001, .999), seed=st.integers(0, 9))
def test_hold_out(n, share, seed):
    train, valid = images._hold_out({'all': list(range(n))}, share, seed)
    assert train and valid and sorted(train + valid) == list(range(n))
    assert (train, valid) == images._hold_out({'all': list(range(n))}, share, seed)


@pytest.mark.parametrize('name', ['../x', 'a/../../x', '/x', 'C:/x', '..\\x'])
def test_zip_paths(tmp_path, name):
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as archive: archive.writestr(name, 'x')
    with pytest.raises(ValueError, match='refused'): unpack(tmp_path/'z.zip', tmp_path/'in'/'out')
    assert not list((tmp_path/'in').iterdir())


def test_tar_links(tmp_path):
    link = tarfile.TarInfo('link')
    link.type, link.linkname = tarfile.SYMTYPE, '../../secret'
    with tarfile.open(tmp_path/'t.tar', 'w') as archive: archive.addfile(link)
    with pytest.raises(ValueError, match='refused'): unpack(tmp_path/'t.tar', tmp_path/'in'/'out')


def test_truncated_targz(tmp_path):
    whole, member = io.BytesIO(), tarfile.TarInfo('f')
    member.size = 10**5
    with tarfile.open(fileobj=whole, mode='w:gz') as archive:
        archive.addfile(member, io.BytesIO(np.random.default_rng(0).bytes(10**5)))
    (tmp_path/'t.tar.gz').write_bytes(whole.getvalue()[:5000])
    with pytest.raises(ValueError, match='damaged'): unpack(tmp_path/'t.tar.gz', tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_unpack_beside_a_faster_process(tmp_path, monkeypatch):
    with tarfile.open(tmp_path/'t.tar', 'w') as archive: archive.add(__file__, arcname='f')
    real = tarfile.open

    def late(*args):
        monkeypatch.setattr(tarfile, 'open', real)
        unpack(tmp_path/'t.tar', tmp_path/'out')  # the other process begins later and ends sooner
        return real(*args)

    monkeypatch.setattr(tarfile, 'open', late)
    assert unpack(tmp_path/'t.tar', tmp_path/'out') == tmp_path/'out'
    assert [file.name for file in (tmp_path/'out').iterdir()] == ['f']
    assert len(list(tmp_path.iterdir())) == 2  # nothing is left over


BODY = b'0123456789'


class OddServer(BaseHTTPRequestHandler):
    "Knows no /missing, answers 416 to a range beyond the end, and sends everything to any other range"
    def do_GET(self):
        if self.path == '/missing': return self.send_error(404)
        requested = self.headers.get('Range')
        beyond = requested and int(requested[6:-1]) >= len(BODY)
        self.send_response(416 if beyond else 200)
        if beyond: self.send_header('Content-Range', f'bytes */{len(BODY)}')
        self.send_header('Content-Length', '0' if beyond else str(len(BODY)))
        self.end_headers()
        if not beyond: self.wfile.write(BODY)

    def log_message(self, *args): pass


@pytest.fixture
def odd_url():
    server = HTTPServer(('127.0.0.1', 0), OddServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_fetch_status_codes(tmp_path, odd_url):
    with pytest.raises(Exception, match='404'): fetch(odd_url + '/missing', tmp_path/'m', progress=False)
    for part in (BODY, BODY + b'too long'):  # complete already; longer than the file
        (tmp_path/'f.part').write_bytes(part)
        assert fetch(odd_url + '/f', tmp_path/'f', progress=False).read_bytes() == BODY
        (tmp_path/'f').unlink()


def test_a_tar_that_ends_with_a_zip(tmp_path):
    "An .npz at the end of a tar makes the whole look like a zip"
    np.savez(tmp_path/'z.npz', a=np.arange(3))
    (tmp_path/'a.txt').write_text('a')
    with tarfile.open(tmp_path/'t.tar', 'w') as archive:
        for name in ('a.txt', 'z.npz'): archive.add(tmp_path/name, name)
    assert zipfile.is_zipfile(tmp_path/'t.tar')
    folder = unpacked(tmp_path/'t.tar')
    assert sorted(file.name for file in folder.iterdir()) == ['a.txt', 'z.npz']
    assert unpacked(tmp_path/'t.tar') == folder and unpacked(folder) == folder


def test_flip_shift_only_in_training():
    x = TensorImage(torch.rand(6, 3, 20, 26))
    shift = FlipShift(.1)
    assert shift(x, split_idx=1) is x
    y = shift(x, split_idx=0)
    assert y.shape == x.shape and not torch.equal(x, y)
    flipped = FlipShift(0.)(x, split_idx=0)
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(flipped, x))


@pytest.mark.parametrize('umask', [0o022, 0o077])
def test_unpacked_folders_have_the_usual_mode(tmp_path, umask):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as archive: archive.writestr('cats/a.txt', 'x')
    before = os.umask(umask)
    try: unpack(tmp_path/'a.zip', tmp_path/'a')
    finally: os.umask(before)
    assert (tmp_path/'a').stat().st_mode & 0o777 == 0o777 & ~umask


def test_opened_in_the_same_way_everywhere(tmp_path):
    Image.new('RGBA', (5, 4), (10, 20, 30, 0)).save(tmp_path/'a.png')
    assert images.open_rgb is utils.open_rgb
    opened = images.OpenImage()(tmp_path/'a.png')
    assert opened.getpixel((0, 0)) == utils.open_rgb(tmp_path/'a.png').getpixel((0, 0)) == (255, 255, 255)
