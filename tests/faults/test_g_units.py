"""Pixel values other than 0 to 1."""
import pytest
import torch
from PIL import Image

from antehoc_nb.core.model import AntehocModel

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('low, high', [(500, 3500), (-1000, 400), (0, 255), (0, 65535), (200, 320)])
def test_pictures_are_stretched_and_it_is_said(cnn, low, high):
    x = torch.rand(2, 3, 24, 24) * (high - low) + low
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    normalised = (x - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    model = AntehocModel(cnn(), normalised, mean=mean.tolist(), std=std.tolist())
    with pytest.warns(UserWarning, match='not from 0 to 1; in pictures, two standard deviations'):
        explanation = model.explain(normalised)
    pixels = explanation.pixels
    assert pixels.min() < .1 and pixels.max() > .9 and .4 < pixels.mean() < .6
    assert torch.corrcoef(torch.stack([pixels.flatten(), x.flatten()]))[0, 1] > .98
    picture = torch.tensor(list(explanation.overlays(0.)[0].getdata())).float()
    assert picture.std() > 30
    with pytest.raises(ValueError, match=r'is not of pixels in \[0,1\], which images have'):
        model.explain(Image.new('RGB', (24, 24)))


@pytest.mark.filterwarnings('error')
def test_ordinary_normalisations_stay(cnn):
    mean, std = [.485, .456, .406], [.229, .224, .225]
    x = torch.rand(2, 3, 24, 24)
    normalised = (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    explanation = AntehocModel(cnn(), normalised, mean=mean, std=std).explain(normalised)
    assert torch.allclose(explanation.pixels, x, atol=1e-6)


def test_statistics_of_0_to_255_say_the_remedy(cnn):
    model = AntehocModel(cnn(), torch.rand(2, 3, 24, 24), mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4])
    with pytest.raises(ValueError, match='mean and std divided by 255'): model.explain(Image.new('RGB', (24, 24)))
