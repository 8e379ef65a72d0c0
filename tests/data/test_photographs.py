"Folders of photographs: what the notebook 24_photographs does not show."
import re

import pytest
from PIL import Image

from antehoc_nb.data.photographs import photograph_folder, sample_photographs


def contents(folder): return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob('*.jpg')}


def test_the_same_seed_gives_the_same_folder(tmp_path):
    first, again, other = (contents(photograph_folder(tmp_path/name, n=2, side=64, seed=seed))
                           for name, seed in (('first', 0), ('again', 0), ('other', 1)))
    assert first == again
    assert first.keys() == other.keys() and not any(first[name] == other[name] for name in first)


def test_photographs_have_the_side_and_shape_they_should(tmp_path):
    folder = photograph_folder(tmp_path/'new', n=3, side=100)
    wanted = {photo.subject: photo.image.width / photo.image.height for photo in sample_photographs()}
    assert {file.name for file in folder.iterdir()} == wanted.keys()
    for file in folder.rglob('*.jpg'):
        image = Image.open(file)
        assert image.mode == 'RGB' and max(image.size) == 100
        assert image.width / image.height == pytest.approx(wanted[file.parent.name], abs=.03)


def test_photographs_are_never_enlarged(tmp_path):
    sizes = {photo.subject: max(photo.image.size) for photo in sample_photographs()}
    folder = photograph_folder(tmp_path/'large', n=4, side=5000)
    assert all(max(Image.open(file).size) <= sizes[file.parent.name] for file in folder.rglob('*.jpg'))


def test_an_empty_folder_is_filled_and_a_full_one_left_alone(tmp_path):
    assert photograph_folder(tmp_path, n=1, side=16) == tmp_path
    before = contents(tmp_path)
    message = f'folder={str(tmp_path)!r} holds something already; give a new or an empty folder'
    with pytest.raises(FileExistsError, match=f'^{re.escape(message)}$'): photograph_folder(tmp_path, n=1)
    assert contents(tmp_path) == before
    file = tmp_path/'cat'/'00.jpg'
    message = f'folder={str(file)!r} holds something already; give a new or an empty folder'
    with pytest.raises(FileExistsError, match=f'^{re.escape(message)}$'): photograph_folder(file, n=1)


@pytest.mark.parametrize('arguments, message', [
    (dict(n=0), 'n=0: give how many photographs each class gets, 1 or more'),
    (dict(n=-3), 'n=-3: give how many photographs each class gets, 1 or more'),
    (dict(side=15), 'side=15: give the longer side of the photographs in pixels, 16 or more')])
def test_what_gives_no_photographs_is_refused_before_a_folder_is_made(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'): photograph_folder(tmp_path/'new', **arguments)
    assert not (tmp_path/'new').exists()
