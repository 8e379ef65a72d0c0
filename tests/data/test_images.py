"What notebook 00_files does not show: archives, odd servers, CIFAR-10 files as Python 2 wrote them."
import io
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

from antehoc_nb.data import images as F


def test_cifar_as_python2_wrote_it(tmp_path):
    "Protocol 2 with byte strings, the way of the original files"
    raw = np.arange(2*3072, dtype=np.uint8).tobytes()
    s = lambda b: b'U' + bytes([len(b)]) + b                          # SHORT_BINSTRING
    array = (b'cnumpy.core.multiarray\n_reconstruct\n' b'cnumpy\nndarray\n' b'K\x00\x85' + s(b'b') + b'\x87R'
             b'(K\x01K\x02M\x00\x0c\x86' b'cnumpy\ndtype\n' + s(b'u1') + b'K\x00K\x01\x87R'
             b'(K\x03' + s(b'|') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89' b'T' + struct.pack('<i', len(raw)) + raw + b'tb')
    (tmp_path/'b').write_bytes(b'\x80\x02}(' + s(b'data') + array + s(b'labels') + b']' + b'(K\x03K\x07e' + b'u.')
    ims, ys = F._cifar_batch(tmp_path/'b')
    assert ys == [3, 7] and ims.shape == (2, 32, 32, 3)
    assert (ims[1].transpose(2, 0, 1).ravel() == np.frombuffer(raw, np.uint8)[3072:]).all()


BAD = [b'', b'junk', pickle.dumps(print), pickle.dumps({'data': 1}), pickle.dumps({'data': np.zeros((1, 5))}, 2)]


@pytest.mark.parametrize('payload', BAD)
def test_cifar_refuses(tmp_path, payload):
    (tmp_path/'data_batch_1').write_bytes(payload)
    with pytest.raises(ValueError, match='data_batch_1'): F.image_dls(tmp_path)


def _pictures(root, per=3, names=('a', 'b')):
    for c in names:
        (root/c).mkdir(parents=True, exist_ok=True)
        for i in range(per): Image.fromarray(np.full((20, 30, 3), 40*i, np.uint8)).save(root/c/f'{i}.jpg')
    return root


@pytest.mark.parametrize('kind', ['tar', 'tar.gz', 'zip'])
def test_archives_of_class_folders(tmp_path, monkeypatch, kind):
    monkeypatch.setenv('ANTEHOC_CACHE', str(tmp_path/'cache'))
    src = tmp_path/'src'/'wrap'
    for s in ('train', 'val', 'test'): _pictures(src/s)
    arc = tmp_path/f'set.{kind}'
    if kind == 'zip':
        with zipfile.ZipFile(arc, 'w') as z:
            for f in src.rglob('*.jpg'): z.write(f, f.relative_to(src.parent))
    else:
        with tarfile.open(arc, 'w:gz' if 'gz' in kind else 'w') as t: t.add(src, 'wrap')
    dls = F.image_dls(arc, size=24, bs=2)
    assert dls.one_batch()[0].shape == (2, 3, 24, 24) and len(dls.valid_ds) == 6
    assert all('val' in f.parts for f, _ in dls.valid_ds.items)
    assert all('test' in f.parts for f, _ in F.image_dls(arc, size=24, bs=2, valid='test').valid_ds.items)
    assert len(list((tmp_path/'cache').iterdir())) == 1


def test_validation_classes_must_be_known(tmp_path):
    _pictures(tmp_path/'train')
    _pictures(tmp_path/'test', names=('a', 'z'))
    with pytest.raises(ValueError, match="'z'"): F.image_dls(tmp_path)
    assert len(F.image_dls(tmp_path, valid=.3, bs=2).valid_ds) == 2


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 200), share=st.floats(.001, .999), seed=st.integers(0, 9))
def test_hold_out(n, share, seed):
    tr, va = F._hold_out({'all': list(range(n))}, share, seed)
    assert tr and va and sorted(tr + va) == list(range(n))
    assert (tr, va) == F._hold_out({'all': list(range(n))}, share, seed)


@pytest.mark.parametrize('name', ['../x', 'a/../../x', '/x', 'C:/x', '..\\x'])
def test_zip_paths(tmp_path, name):
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z: z.writestr(name, 'x')
    with pytest.raises(ValueError, match='refused'): F.unpack(tmp_path/'z.zip', tmp_path/'in'/'out')
    assert not list((tmp_path/'in').iterdir())


def test_tar_links(tmp_path):
    with tarfile.open(tmp_path/'t.tar', 'w') as t:
        m = tarfile.TarInfo('link')
        m.type, m.linkname = tarfile.SYMTYPE, '../../secret'
        t.addfile(m)
    with pytest.raises(ValueError, match='refused'): F.unpack(tmp_path/'t.tar', tmp_path/'in'/'out')


def test_truncated_targz(tmp_path):
    b = io.BytesIO()
    with tarfile.open(fileobj=b, mode='w:gz') as t:
        m = tarfile.TarInfo('f')
        m.size = 10**5
        t.addfile(m, io.BytesIO(np.random.default_rng(0).bytes(10**5)))
    (tmp_path/'t.tar.gz').write_bytes(b.getvalue()[:5000])
    with pytest.raises(ValueError, match='damaged'): F.unpack(tmp_path/'t.tar.gz', tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_unpack_beside_a_faster_process(tmp_path, monkeypatch):
    with tarfile.open(tmp_path/'t.tar', 'w') as t: t.add(__file__, arcname='f')
    real = tarfile.open
    def late(*args):
        monkeypatch.setattr(tarfile, 'open', real)
        F.unpack(tmp_path/'t.tar', tmp_path/'out')  # the other process begins later and ends sooner
        return real(*args)
    monkeypatch.setattr(tarfile, 'open', late)
    assert F.unpack(tmp_path/'t.tar', tmp_path/'out') == tmp_path/'out'
    assert [f.name for f in (tmp_path/'out').iterdir()] == ['f'] and len(list(tmp_path.iterdir())) == 2  # nothing is left over


def test_fetch_status_codes(tmp_path):
    body = b'0123456789'
    class H(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == '/missing': return self.send_error(404)
            r = self.headers.get('Range')
            if r and int(r[6:-1]) >= len(body):
                self.send_response(416)
                self.send_header('Content-Range', f'bytes */{len(body)}')
                self.send_header('Content-Length', '0')
                return self.end_headers()
            self.send_response(200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *a): pass
    srv = HTTPServer(('127.0.0.1', 0), H)
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{srv.server_port}'
    try:
        with pytest.raises(Exception, match='404'): F.fetch(url + '/missing', tmp_path/'m', progress=False)
        for part in (body, body + b'too long'):                        # complete already; longer than the file
            (tmp_path/'f.part').write_bytes(part)
            assert F.fetch(url + '/f', tmp_path/'f', progress=False).read_bytes() == body
            (tmp_path/'f').unlink()
    finally:
        srv.shutdown()
        srv.server_close()


def test_a_tar_that_ends_with_a_zip(tmp_path):
    "An .npz at the end of a tar makes the whole look like a zip"
    np.savez(tmp_path/'z.npz', a=np.arange(3))
    (tmp_path/'a.txt').write_text('a')
    with tarfile.open(tmp_path/'t.tar', 'w') as t:
        for f in ('a.txt', 'z.npz'): t.add(tmp_path/f, f)
    assert zipfile.is_zipfile(tmp_path/'t.tar')
    out = F.unpacked(tmp_path/'t.tar')
    assert sorted(f.name for f in out.iterdir()) == ['a.txt', 'z.npz'] and F.unpacked(tmp_path/'t.tar') == out and F.unpacked(out) == out


def test_flip_shift_only_in_training():
    x = TensorImage(torch.rand(6, 3, 20, 26))
    t = F.FlipShift(.1)
    assert t(x, split_idx=1) is x
    y = t(x, split_idx=0)
    assert y.shape == x.shape and not torch.equal(x, y)
    z = F.FlipShift(0.)(x, split_idx=0)
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(z, x))
