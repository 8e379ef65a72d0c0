"""The scores of localisation against their definitions, one pixel and one threshold at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from antehoc_nb.evaluate.localisation import Mosaics, boxes_to_masks, energy_in_region, iou, pointing_game

seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(2, 12)


def maps(seed, h, w, b=3, levels=None):
    "Random maps (b,1,h,w) in [0,1]; few `levels` make many ties"
    m = torch.rand(b, 1, h, w, generator=torch.Generator().manual_seed(seed))
    return m if levels is None else (m * levels).floor() / levels


def random_boxes(seed, h, w, b=3):
    rng = np.random.default_rng(seed)
    x0, y0 = rng.integers(0, w, b), rng.integers(0, h, b)
    return np.stack([x0, y0, rng.integers(x0 + 1, w + 1), rng.integers(y0 + 1, h + 1)], 1).astype(np.float32)


@given(seeds, sizes, sizes)
def test_boxes_are_slices(seed, h, w):
    boxes = random_boxes(seed, h, w)
    for b, m in zip(boxes.astype(int), boxes_to_masks(boxes, (h, w))):
        want = torch.zeros(h, w, dtype=torch.bool)
        want[b[1] : b[3], b[0] : b[2]] = True
        assert torch.equal(m, want)


@given(seeds, sizes, sizes, st.sampled_from([None, 1, 3]), st.floats(0, 6))
def test_pointing_game_is_its_definition(seed, h, w, levels, tolerance):
    m, boxes = maps(seed, h, w, levels=levels), random_boxes(seed, h, w)
    region = boxes_to_masks(boxes, (h, w))
    got = pointing_game(m, boxes, tolerance)
    assert torch.equal(got, pointing_game(m, region, tolerance))
    assert torch.equal(got, pointing_game(m[:, 0], region[:, None].numpy(), tolerance))
    for mi, ri, g in zip(m[:, 0], region, got):
        inside, top = ri.nonzero().tolist(), (mi == mi.max()).nonzero().tolist()
        hits = [min(math.dist(t, i) for i in inside) <= tolerance for t in top]
        assert g.item() == pytest.approx(sum(hits) / len(hits))
    assert (got >= pointing_game(m, boxes)).all()


@given(seeds, sizes, sizes, st.floats(1e-30, 1e30))
def test_energy_in_region_is_its_definition(seed, h, w, factor):
    m, boxes = maps(seed, h, w), random_boxes(seed, h, w)
    region = boxes_to_masks(boxes, (h, w))
    got = energy_in_region(m, boxes)
    want = torch.stack([mi[ri].sum() / mi.sum() for mi, ri in zip(m[:, 0], region)])
    assert torch.allclose(got, want, atol=1e-5) and torch.allclose(energy_in_region(m * factor, region), got, atol=1e-5)
    if not region.flatten(1).all(1).any():
        assert torch.allclose(energy_in_region(m, ~region), 1 - got, atol=1e-5)


@given(seeds, sizes, sizes, st.sampled_from([None, 1, 3, 8]), st.floats(0.01, 1))
def test_iou_is_its_definition(seed, h, w, levels, threshold):
    "At the fixed threshold, and at the best of all thresholds tried one by one"
    m, boxes = maps(seed, h, w, levels=levels), random_boxes(seed, h, w)
    region = boxes_to_masks(boxes, (h, w))

    def at(mi, ri, t):
        on = {(r, c) for r in range(h) for c in range(w) if mi[r, c] >= t}
        obj = {(r, c) for r in range(h) for c in range(w) if ri[r, c]}
        return len(on & obj) / len(on | obj)

    fixed, best = iou(m, boxes, threshold), iou(m, boxes)
    t32 = float(torch.tensor(threshold, dtype=torch.float32))
    for mi, ri, f, b in zip(m[:, 0], region, fixed, best):
        assert f.item() == pytest.approx(at(mi, ri, t32), abs=1e-6)
        assert b.item() == pytest.approx(max(at(mi, ri, t) for t in mi.unique().tolist()), abs=1e-6)
        assert f <= b + 1e-6 or not (mi >= t32).any()
    assert torch.equal(best, iou(5 * m.double() - 3, region)) and torch.equal(best, iou(m[:, 0], region[:, None]))


def test_iou_by_hand():
    m = torch.tensor([[[0.9, 0.8, 0.1], [0.8, 0.2, 0.0]]])
    region = torch.tensor([[[1, 1, 0], [0, 1, 0]]]).bool()
    assert iou(m, region, 0.85).item() == pytest.approx(1 / 3) and iou(m, region, 0.8).item() == pytest.approx(
        2 / 4
    )  # the two of .8 come together
    assert iou(m, region, 0.95).item() == 0 and iou(m, region).item() == pytest.approx(
        3 / 4
    )  # at .2: all three, and one too many
    assert iou(torch.zeros(1, 2, 3), region).item() == pytest.approx(0.5)
    for t in (0, -1, 1.01, math.nan):
        with pytest.raises(ValueError, match=r'threshold must lie in \(0,1\], got'):
            iou(m, region, t)
    with pytest.raises(ValueError, match=r'map must lie in \[0,1\] for a fixed threshold, got -1'):
        iou(m - 1, region, 0.5)


def test_a_map_of_nothing_and_a_map_of_ones():
    region, m = boxes_to_masks([[0, 0, 2, 2], [1, 1, 4, 3]], 4), torch.zeros(2, 1, 4, 4)
    assert energy_in_region(m, region).isnan().all()
    for flat in (m, m + 1):
        assert torch.equal(pointing_game(flat, region), region.float().mean((1, 2)))
    m[0] = 1
    assert energy_in_region(m, region).isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    'region,error,says',
    [
        (
            torch.ones(3, 4, 5, dtype=torch.bool),
            ValueError,
            'region must be masks (3, 4, 4) or boxes (3,4), not (3, 4, 5)',
        ),
        (
            torch.ones(2, 4),
            ValueError,
            'boxes must have x1 > x0 and y1 > y0; 2 do not, the first is box 0: [1.0, 1.0, 1.0, 1.0]',
        ),
        ([[0, 0, 1, 1]] * 2, ValueError, 'region must be masks (3, 4, 4) or boxes (3,4), not (2, 4, 4)'),
        (
            [[0, 0, 1, 1]] * 2 + [[9, 9, 12, 12]],
            ValueError,
            'region holds no pixel in 1 of 3 images, the first is image 2',
        ),
        (torch.ones(3, 4, 4), TypeError, 'region masks must be bool, not torch.float32; write `mask > 0`'),
    ],
)
@pytest.mark.parametrize('metric', [pointing_game, energy_in_region, iou])
def test_localisation_refuses(metric, region, error, says):
    with pytest.raises(error) as e:
        metric(torch.rand(3, 1, 4, 4), region)
    assert says in str(e.value)


def test_more_refusals():
    with pytest.raises(ValueError, match='map must not be negative to have an energy, its minimum is -1'):
        energy_in_region(-torch.ones(1, 4, 4), [[0, 0, 1, 1]])
    with pytest.raises(ValueError, match='tolerance must be 0 or more pixels, got -1'):
        pointing_game(torch.rand(1, 4, 4), [[0, 0, 1, 1]], -1)
    with pytest.raises(ValueError, match=r'boxes must have shape \(B,4\)'):
        boxes_to_masks([0, 0, 1, 1], 4)


# --- mosaics


@given(st.integers(2, 4), st.integers(4, 21), st.integers(4, 21), st.integers(0, 99))
def test_cells_share_a_map_among_them(side, h, w, seed):
    m = torch.rand(3, 1, h, w, generator=torch.Generator().manual_seed(seed))
    mosaics = Mosaics(side=side)
    shares = torch.stack([mosaics.share_in_cell(m, cell) for cell in range(mosaics.cells)], 1)
    torch.testing.assert_close(shares.sum(1), torch.ones(3))
    # at a multiple of the size all borders are those of pixels
    large = m.repeat_interleave(side, 2).repeat_interleave(side, 3)
    for cell in range(mosaics.cells):
        r, c = divmod(cell, side)
        part = large[..., r * h : (r + 1) * h, c * w : (c + 1) * w].sum((1, 2, 3)) / large.sum((1, 2, 3))
        torch.testing.assert_close(shares[:, cell], part)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(0, 99))
def test_groups_are_of_different_classes_and_as_many_as_there_can_be(classes, seed):
    y = torch.tensor(classes)
    p = torch.rand(len(y), generator=torch.Generator().manual_seed(seed))
    mosaics = Mosaics(confidence=0.3)
    counts = [int(((y == c) & (p >= 0.3)).sum()) for c in range(7)]
    # m mosaics take at most m images of a class
    possible = max(m for m in range(61) if sum(min(n, m) for n in counts) >= 4 * m)
    if not possible:
        with pytest.raises(ValueError, match='a mosaic (needs 4 classes|holds images of 4 different classes)'):
            mosaics.group(y, p)
        return
    groups = mosaics.group(y, p)
    assert groups.shape == (possible, 4) and len(groups.unique()) == groups.numel()
    assert (p[groups] >= 0.3).all() and all(len(set(y[g].tolist())) == 4 for g in groups)
    assert torch.equal(groups, mosaics.group(y, p))


def test_the_confidence_that_is_named_would_do():
    y, p = torch.arange(8) % 4, torch.tensor([0.5, 0.61, 0.7, 0.9, 0.2, 0.2, 0.2, 0.2])
    with pytest.raises(ValueError, match='the highest confidence that gives one is 0.5$'):
        Mosaics().group(y, p)
    assert Mosaics(confidence=0.5).group(y, p).sort().values.tolist() == [[0, 1, 2, 3]]


def test_mosaics_keep_rows_and_columns():
    x = torch.arange(2 * 4 * 3 * 5 * 6.0).view(8, 3, 5, 6)
    joined = Mosaics().build(x)
    assert joined.shape == (2, 3, 10, 12)
    for i in range(2):
        for cell in range(4):
            r, c = divmod(cell, 2)
            assert torch.equal(joined[i, :, 5 * r : 5 * r + 5, 6 * c : 6 * c + 6], x[4 * i + cell])
    small = Mosaics(resized=True).build(torch.ones(4, 1, 1, 1) * torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8))
    assert small.shape == (1, 1, 8, 8)
    assert [small[0, 0, r, c].item() for r in (1, 6) for c in (1, 6)] == pytest.approx([0, 1, 2, 3])
