"""Files that cannot be written, and images of unusual kinds."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import antehoc_nb.core.model
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import open_rgb
from antehoc_nb.show.explain_files import explain_files

pytestmark = pytest.mark.usefixtures('one_thread')
FULL = OSError(28, 'No space left on device')


@pytest.fixture
def model(cnn): return AntehocModel(cnn(), torch.rand(2, 3, 16, 16), eta=2, meta=dict(size=[16, 16], vocab=[*'abc']))


@pytest.fixture
def full_disk(monkeypatch):
    "From now on, pictures and weights are written by half"
    def picture(self, path, *args, **kwargs):
        path.write_bytes(b'half')
        raise FULL

    def weights(model, path):
        with open(path, 'wb') as file: file.write(b'half')
        raise FULL
    def start():
        monkeypatch.setattr(Image.Image, 'save', picture)
        monkeypatch.setattr(antehoc_nb.core.model, 'save_model', weights)
    return start


def content(folder): return {file.name: file.read_bytes() for file in folder.rglob('*') if file.is_file()}


def test_a_saved_model_stays_whole(model, tmp_path, full_disk):
    folder = model.save_pretrained(tmp_path/'m')
    before = content(folder)
    torch.nn.init.ones_(model.weight_net.autoencoder.out.weight)
    model.meta['vocab'] = [*'xyz']
    full_disk()
    with pytest.raises(OSError, match='No space left'): model.save_pretrained(folder)
    assert content(folder) == before and [*before] and not content(tmp_path).keys() - before.keys()
    with pytest.raises(OSError, match='No space left'): model.save_pretrained(tmp_path/'new')
    assert content(tmp_path/'new') == {}


def test_an_overlay_stays_whole(model, tmp_path, full_disk):
    e = model.explain(torch.rand(2, 3, 16, 16))
    e.save(tmp_path/'o.png')
    before = content(tmp_path)
    full_disk()
    with pytest.raises(OSError, match='No space left'): e.save(tmp_path/'o.png')
    with pytest.raises(OSError, match='No space left'): e.save(tmp_path/'other.jpg')
    assert content(tmp_path) == before


@pytest.mark.parametrize('what', ['pictures', 'arrays'])
def test_a_folder_of_explanations_holds_nothing_half_written(model, photo, tmp_path, monkeypatch, full_disk, what):
    files = [(photo(tmp_path/'photos'/f'{i}.png', seed=i), f'{i}.png') for i in range(3)]
    out = tmp_path/'out'
    explain_files(model, files[:1], out, say=None, arrays=True)
    before = content(out)
    with monkeypatch.context() as patch:
        if what == 'pictures': full_disk()
        else:
            def savez(path, **arrays):
                path.write_bytes(b'half')
                raise FULL
            patch.setattr(np, 'savez_compressed', savez)
        with pytest.raises(OSError, match='No space left'): explain_files(model, files, out, say=None, arrays=True)
    after = content(out)
    assert {name: after[name] for name in before} == before and b'half' not in after.values()
    monkeypatch.undo()
    assert explain_files(model, files, out, say=None, arrays=True)[:2] == (2, 1)  # made room, started again


def test_a_file_in_place_of_a_folder(model, tmp_path):
    (tmp_path/'o').write_text('mine')
    with pytest.raises(OSError): model.explain(torch.rand(1, 3, 16, 16)).save(tmp_path/'o'/'overlay.png')
    with pytest.raises(OSError): model.save_pretrained(tmp_path/'o')
    assert (tmp_path/'o').read_text() == 'mine'


@pytest.mark.parametrize('suffix', ['tif', 'gif', 'webp'])
def test_of_several_pages_the_first_is_taken(model, tmp_path, suffix):
    pages = [Image.new('RGB', (20, 16), colour) for colour in ('red', 'lime', 'blue')]
    file = tmp_path/f'pages.{suffix}'
    pages[0].save(file, save_all=True, append_images=pages[1:])
    assert sum(1 for _ in ImageSequence.Iterator(Image.open(file))) == 3
    red = np.asarray(open_rgb(file)).reshape(-1, 3).mean(0)
    assert red[0] > 200 and red[1:].max() < 40
    assert model.explain(file).photos[0].size == (20, 16)


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
@pytest.mark.parametrize('mode', ['I;16', 'RGB', 'L'])
def test_rotated_tiffs_stand_upright(tmp_path, mode, orientation):
    dtype, largest = (np.uint16, 65535) if mode == 'I;16' else (np.uint8, 255)
    pixels = np.zeros((8, 12) if mode != 'RGB' else (8, 12, 3), dtype)
    pixels[0, 0] = largest                                  # a bright corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path/'a.tif', exif=exif)
    upright = np.asarray(open_rgb(tmp_path/'a.tif'))
    turns = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    expected = np.rot90(pixels, turns)
    assert upright.shape[:2] == expected.shape[:2]
    bright = np.argwhere(expected.reshape(*expected.shape[:2], -1)[..., 0])[0]
    assert (upright[tuple(bright)] == 255).all() and (upright > 0).any(2).sum() == 1


def test_16_bits_in_colour(model, tmp_path):
    tifffile = pytest.importorskip('tifffile')
    pixels = np.full((16, 20, 3), 30000, np.uint16)
    tifffile.imwrite(tmp_path/'a.tif', pixels, photometric='rgb')
    try: found = open_rgb(tmp_path/'a.tif')
    except OSError: found = None                            # refused, as by name in a folder
    files = [(tmp_path/'a.tif', 'a.tif')]
    n, _, failed = explain_files(model, files, tmp_path/'out', say=None)
    if found is None: assert n == 0 and failed[0][0] == 'a.tif'
    else: assert n == 1 and abs(np.asarray(found).mean() - 30000 / 257) < 2
