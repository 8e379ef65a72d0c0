"""`learn.explain` and images that are not the learner's own."""
import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import Resize
from fastai.vision.core import PILImageBW
from fastai.vision.data import ImageBlock
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from workers import small_cnn

import antehoc_nb.show.learner  # noqa: F401  gives Learner `explain`
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8)


@pytest.fixture(scope='module', params=['colour', 'grey'])
def learn(request, tmp_path_factory):
    "A learner of class folders that crops its images to squares"
    folder = tmp_path_factory.mktemp('images')
    for i in range(8):
        (folder/'ab'[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(np.roll(PIXELS, i, 1)).save(folder/'ab'[i % 2]/f'{i}.png')
    block = ImageBlock if request.param == 'colour' else ImageBlock(PILImageBW)
    data = DataBlock((block, CategoryBlock), get_items=lambda _: sorted(folder.rglob('*.png')), item_tfms=Resize(32),
                     get_y=lambda file: file.parent.name)
    cnn = small_cnn(2, c=3 if request.param == 'colour' else 1)
    return Learner(data.dataloaders(folder, bs=4), cnn, loss_func=CrossEntropyLossFlat(), cbs=TwoPass(eta=2))


@pytest.mark.parametrize('kind', ['path', 'str', 'paths', 'pil', 'pils', 'array', 'floats', 'tensor', 'batch'])
def test_images_from_elsewhere(tmp_path, learn, kind):
    Image.fromarray(PIXELS).save(tmp_path/'a.png')
    tensor = torch.tensor(PIXELS).permute(2, 0, 1)
    file = tmp_path/'a.png'
    images = dict(path=file, str=str(file), paths=[file], pil=Image.open(file), pils=[Image.open(file)],
                  array=PIXELS, floats=PIXELS / 255, tensor=tensor, batch=tensor[None])
    e = learn.explain(images[kind])
    assert torch.equal(e.map, learn.model.explain(PIXELS).map) and e.map.shape == (1, 1, 32, 32)
    assert e.photos[0].size == (60, 30)  # all of it, though the learner's transforms crop
    assert e.labels[0] in 'ab'
    assert learn.show_maps(items=images[kind]) is not None


def test_a_normalised_batch(learn):
    x = learn.dls.valid.one_batch()[0][:2]
    assert torch.equal(learn.explain(x).map, learn.model.explain(x).map)


def test_its_own_images_as_ever(learn):
    e = learn.explain(n=1)
    assert e.photos is None and torch.equal(e.map, learn.explain([0]).map) and torch.equal(e.map, learn.explain(0).map)
    assert torch.equal(e.map, learn.explain(np.array([0])).map) and torch.equal(e.map, learn.explain(np.int64(0)).map)


@pytest.mark.filterwarnings('error:an array')
def test_whole_numbers_are_pixels(learn):
    assert torch.equal(learn.explain(PIXELS.astype(int)).map, learn.explain(PIXELS).map)


def test_errors_name_what_came(tmp_path, learn):
    with pytest.raises(FileNotFoundError, match='nowhere.png'): learn.explain([tmp_path/'nowhere.png'])
    with pytest.raises(ValueError, match='these look like pixels from 0 to 255'):
        learn.explain(torch.rand(1, learn.model.image_channels, 32, 32) * 255)
    with pytest.raises(ValueError, match='empty list'): learn.explain([])


def test_loaders_of_plain_pytorch():
    images = torch.rand(6, 3, 32, 32)
    loader = DataLoader(TensorDataset(images, torch.arange(6) % 2), batch_size=4)
    learn = Learner(DataLoaders(loader, loader), small_cnn(2), loss_func=CrossEntropyLossFlat(), cbs=TwoPass(eta=2))
    assert torch.equal(learn.explain(n=3).map, learn.model.explain(images[:3]).map)
    assert torch.equal(learn.explain(items=[5, 2]).map, learn.model.explain(images[[5, 2]]).map)
    assert torch.equal(learn.explain(loader, n=2).map, learn.model.explain(images[:2]).map)
    assert learn.show_maps(n=4).shape == learn.show_maps(n=4, target=1).shape == (2, 4)
