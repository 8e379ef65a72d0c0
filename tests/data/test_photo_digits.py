"What the notebook 21_photo_digits does not show: properties over many settings."

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antehoc_nb.data.photo_digits import TEST_DIGITS, PhotoDigits, scene_material

SETTINGS = dict(
    size=st.integers(24, 130),
    seed=st.integers(0, 2**40),
    split=st.sampled_from(['train', 'test']),
    n_distractors=st.integers(0, 6),
)


@settings(max_examples=25, deadline=None)
@given(**SETTINGS)
def test_scenes(size, seed, split, n_distractors):
    scenes = PhotoDigits(6, size, seed, split, n_distractors)
    fewer = PhotoDigits(4, size, seed, split, n_distractors)
    bare = PhotoDigits(6, size, seed, split, n_distractors=0)
    assert (scenes.images[:4] == fewer.images).all() and (scenes.boxes[:4] == fewer.boxes).all()
    assert scenes.images.shape == (6, size, size, 3)
    assert scenes.images.dtype == np.uint8 and scenes.labels.dtype == np.int64
    assert (scenes.masks == bare.masks).all()
    assert (scenes.images[scenes.masks] == bare.images[bare.masks]).all()
    for mask, (x0, y0, x1, y1) in zip(scenes.masks, scenes.boxes.astype(int)):
        assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
        assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
        assert .2*size < y1 - y0 <= .46*size + 1


def test_splits_share_nothing():
    train, _ = scene_material('train', 64)
    test, _ = scene_material('test', 64)
    assert sum(map(len, train)) == 1797 - TEST_DIGITS and sum(map(len, test)) == TEST_DIGITS
    assert all(len(digits) > 40 for digits in test)


def test_no_global_randomness():
    np.random.seed(0)
    torch.manual_seed(0)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    PhotoDigits(3)
    assert (np.random.get_state()[1] == numpy_state).all() and torch.equal(torch.get_rng_state(), torch_state)
