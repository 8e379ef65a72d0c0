"What notebook 00_data does not show: properties over many settings."
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antehoc_nb.data import photo_digits as D


@settings(max_examples=25, deadline=None)
@given(size=st.integers(24, 130), seed=st.integers(0, 2**40), split=st.sampled_from(['train', 'test']), nd=st.integers(0, 6))
def test_scenes(size, seed, split, nd):
    a, b, bare = D.PhotoDigits(6, size, seed, split, nd), D.PhotoDigits(4, size, seed, split, nd), D.PhotoDigits(6, size, seed, split, 0)
    assert (a.images[:4] == b.images).all() and (a.boxes[:4] == b.boxes).all()
    assert a.images.shape == (6, size, size, 3) and a.images.dtype == np.uint8 and a.labels.dtype == np.int64
    assert (a.masks == bare.masks).all() and (a.images[a.masks] == bare.images[a.masks]).all()
    for m, (x0, y0, x1, y1) in zip(a.masks, a.boxes.astype(int)):
        assert m[y0:y1, x0:x1].sum() == m.sum() > 0
        assert m[y0].any() and m[y1 - 1].any() and m[:, x0].any() and m[:, x1 - 1].any()
        assert .2*size < y1 - y0 <= .46*size + 1


def test_splits_share_nothing():
    (tr, _), (te, _) = D.scene_material('train', 64), D.scene_material('test', 64)
    assert sum(map(len, tr)) == 1797 - D.TEST_DIGITS and sum(map(len, te)) == D.TEST_DIGITS
    assert all(len(d) > 40 for d in te)


def test_no_global_randomness():
    np.random.seed(0)
    torch.manual_seed(0)
    a, b = np.random.get_state()[1].copy(), torch.get_rng_state()
    D.PhotoDigits(3)
    assert (np.random.get_state()[1] == a).all() and torch.equal(torch.get_rng_state(), b)
