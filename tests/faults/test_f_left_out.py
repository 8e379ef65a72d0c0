"""Images that are left out, or read as something else, without a word."""
import os

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from antehoc_nb.cli import app
from antehoc_nb.core.utils import rgb_image
from antehoc_nb.data.images import image_dls

pytestmark = pytest.mark.usefixtures('one_thread')


def folders(photo, root, *names, n=3):
    for name in names:
        for i in range(n): photo(root/name/f'{i}.png', seed=i)
    return root


def loaded(root, **kwargs): return image_dls(root, 16, 2, device='cpu', **kwargs)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('names', [
    ('train', 'bus', 'car'), ('training', 'bus'), ('Train', 'car'), ('train', 'test'), ('train', 'test', 'bus'),
    ('valid', 'bus'),
])
def test_a_class_named_like_a_split(photo, tmp_path, names):
    dls = loaded(folders(photo, tmp_path, *names))
    assert list(dls.vocab) == sorted({name.split('/')[0] for name in names})
    assert len(dls.train_ds) + len(dls.valid_ds) == 3 * len(names)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('names, n', [
    (('train/cat', 'train/dog', 'test/cat', 'test/dog'), (6, 6)), (('train/cat', 'train/dog'), (5, 1)),
    (('train/cat', 'train/dog', 'val/cat', 'validation/dog'), (6, 6)),  # both are validation images
])
def test_splits_are_still_found(photo, tmp_path, names, n):
    dls = loaded(folders(photo, tmp_path, *names))
    assert list(dls.vocab) == ['cat', 'dog'] and (len(dls.train_ds), len(dls.valid_ds)) == n


@pytest.mark.parametrize('suffix', ['.jp2', '.HEIC', '.avif', '.svg'])
def test_a_class_of_images_that_are_not_read(photo, tmp_path, suffix):
    folders(photo, tmp_path, 'cat', 'fox')
    (tmp_path/'dog').mkdir()
    (tmp_path/'dog'/f'1{suffix}').write_bytes(b'x')
    with pytest.raises(ValueError, match=f"'dog' has no image that is read, but 1 image .*{suffix.lower()}.*convert"):
        loaded(tmp_path)


def test_empty_class_folders_are_named(photo, tmp_path):
    folders(photo, tmp_path, 'cat', 'fox')
    (tmp_path/'dog'/'more').mkdir(parents=True)
    with pytest.warns(UserWarning, match='nothing is in the folder dog$'): loaded(tmp_path)
    for image in (tmp_path/'fox').iterdir(): image.unlink()
    with pytest.raises(ValueError, match=r"only one class, 'cat' \(nothing is in the folders dog, fox\); give each"):
        loaded(tmp_path)


def test_images_beside_others_are_named(photo, tmp_path):
    folders(photo, tmp_path, 'cat', 'dog')
    (tmp_path/'dog'/'1.jp2').write_bytes(b'x')
    with pytest.warns(UserWarning, match='left out: 1 image of a kind that is not read .*jp2'): loaded(tmp_path)
    (tmp_path/'dog'/'1.jp2').unlink()
    photo(tmp_path/'stray.png')
    with pytest.warns(UserWarning, match='left out: 1 image outside the class folders.*stray.png'): loaded(tmp_path)


@pytest.mark.filterwarnings('error')
def test_links_are_followed_and_hidden_folders_are_not(photo, tmp_path):
    root = folders(photo, tmp_path/'data', 'cat', 'dog')
    folders(photo, tmp_path, 'elsewhere')
    (root/'cat'/'more').symlink_to(tmp_path/'elsewhere')
    (root/'cat'/'loop').symlink_to(root/'cat')
    (root/'fox').symlink_to(tmp_path/'elsewhere')
    for hidden in ('cat/.ipynb_checkpoints', '.git/cat', 'cat/__MACOSX'): folders(photo, root, hidden)
    dls = loaded(root)
    assert list(dls.vocab) == ['cat', 'dog', 'fox'] and len(dls.train_ds) + len(dls.valid_ds) == 12
    from antehoc_nb.cli import _image_files
    found, unread = _image_files([root], tmp_path/'out')
    names = [name for _, name in found]
    assert len(names) in (9, 12) and not unread and not any('.ipynb' in name or 'MACOSX' in name for name in names)


def test_links_to_nowhere(photo, tmp_path):
    root = folders(photo, tmp_path, 'cat', 'dog')
    (root/'cat'/'gone').symlink_to(tmp_path/'nowhere')
    with pytest.warns(UserWarning, match='left out: 1 link to files that are not there'): loaded(root)
    (root/'dog'/'gone.png').symlink_to(tmp_path/'nowhere.png')
    with pytest.raises(ValueError, match='1 images cannot be read'): loaded(root)


@pytest.mark.parametrize('name', ['x.bmp', 'x.tif', 'x.gif', 'x.png', 'x.jpg', 'x.webp', 'x.ppm'])
def test_truncated_files_are_refused_by_name(photo, tmp_path, name):
    folders(photo, tmp_path, 'cat', 'dog')
    path = photo(tmp_path/'cat'/name, size=(64, 64))
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(ValueError, match=name.replace('.', r'\.')): loaded(tmp_path)


def test_floats_outside_the_range_are_refused_by_name(photo, tmp_path):
    folders(photo, tmp_path, 'cat', 'dog')
    Image.fromarray(np.full((8, 8), 300, np.float32)).save(tmp_path/'cat'/'x.tif')
    with pytest.raises(ValueError, match=r'x\.tif'): loaded(tmp_path)


@pytest.mark.parametrize('dtype, largest', [(np.float32, 1), (np.uint16, 65535), (np.int32, 65535)])
@pytest.mark.parametrize('orientation', [1, 6])
def test_loaded_images_are_those_of_the_file(tmp_path, dtype, largest, orientation):
    values = (np.linspace(0, 1, 48).reshape(6, 8) * largest).astype(dtype)
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path/'x.tif'
    Image.fromarray(values).save(path, exif=exif, compression='tiff_lzw')
    of_file = np.asarray(rgb_image(path))
    with Image.open(path) as opened: by_hand = np.asarray(rgb_image(opened))
    with Image.open(path) as opened:
        opened.load()
        after_loading = np.asarray(rgb_image(opened))
    assert of_file.min() == 0 and of_file.max() == 255 and 100 < of_file.mean() < 150
    assert (of_file == by_hand).all() and (of_file == after_loading).all()
    assert of_file.shape == ((8, 6, 3) if orientation == 6 else (6, 8, 3))


def test_the_command_names_what_it_leaves_out(photo, tmp_path):
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos'/'1.heic').write_bytes(b'x')
    result = CliRunner().invoke(app, ['explain', str(tmp_path), str(tmp_path/'photos'), '--out', str(tmp_path/'out')])
    assert result.exit_code == 1 and 'no image files found' in result.output and '.heic' in result.output
    assert os.listdir(tmp_path) == ['photos']
