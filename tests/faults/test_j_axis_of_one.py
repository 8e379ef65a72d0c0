"""Images and maps of one row or one column."""
import pytest
import torch

from antehoc_nb.core.attention import minmax, softmax, softmax_l2
from antehoc_nb.core.geometry import resize
from antehoc_nb.core.masking import masked
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.evaluate.explainers import centred_blob, explain_with, explainers, gaussian_of_area

pytestmark = pytest.mark.usefixtures('one_thread')

SIZES = (60, 1), (1, 60), (1, 1), (2, 60)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('fill', ['blur', 'mean', 'black'])
def test_masking(size, fill):
    x = torch.rand(1, 3, *size)
    filled = masked(x, torch.zeros(1, 1, *size), fill)
    assert filled.shape == x.shape and filled.isfinite().all()
    assert torch.equal(masked(x, torch.ones(1, 1, *size), fill), x)


@pytest.mark.parametrize('size', SIZES)
def test_the_centred_control_peaks_at_one(size):
    highest = .1353 if 2 in size else 1.  # of two pixels, none is in the middle
    assert centred_blob(1, size).max().item() == pytest.approx(highest, abs=.01)
    maps = torch.rand(2, 1, *size) * .5 + .1
    assert gaussian_of_area(maps).isfinite().all() and gaussian_of_area(maps).max() <= 1


@pytest.mark.parametrize('size', SIZES)
def test_soft_attention_and_resizing(size):
    f = torch.rand(2, 4, *size)
    for attention in (softmax, softmax_l2): assert attention(f).isfinite().all()
    assert minmax(f).isfinite().all() and resize(f, (60, 3)).isfinite().all()


@pytest.mark.parametrize('size', [(60, 1), (1, 60)])
def test_the_whole_model_and_every_control(cnn, size):
    x = torch.rand(2, 3, *size)
    model = AntehocModel(cnn(), x)
    explanation = model.explain(x)
    assert explanation.map.shape == (2, 1, *size) and explanation.map.isfinite().all()
    for name in ('gaussian', 'edges', 'random', 'ones', 'grad-cam'):
        if name in explainers: assert explain_with(name, model, x).isfinite().all()
