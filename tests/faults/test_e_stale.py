"""Facts of the DataLoaders are those of the last fit, not of the first."""
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from antehoc_nb.core.model import AntehocModel
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')


class Images(TensorDataset):
    "Images with labels, and perhaps a torchvision-like transform that tells their normalisation"
    def __init__(self, size, mean=None, several=False):
        labels = (torch.rand(8, 3) > .5).float() if several else torch.arange(8) % 3
        super().__init__(torch.rand(8, 3, *size), labels)
        if mean is not None: self.transform = Normalize(torch.full((3,), mean), torch.full((3,), .25))


def loaders(size, vocab=None, **kwargs):
    dls = DataLoaders(DataLoader(Images(size, **kwargs), 4), DataLoader(Images(size, **kwargs), 4))
    if vocab: dls.vocab = vocab
    return dls


def learner(cnn, dls, **kwargs):
    return Learner(dls, cnn, loss_func=CrossEntropyLossFlat(), cbs=TwoPass(eta=2, **kwargs))


def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn.model.config


def test_size(cnn):
    learn = learner(cnn(), loaders((16, 16)))
    assert fit(learn)['meta']['size'] == [16, 16]
    for size in ([32, 32], [16, 24]):
        learn.dls = loaders(size)
        assert fit(learn)['meta']['size'] == size


def test_names_of_classes(cnn):
    learn = learner(cnn(), loaders((16, 16), ['a', 'b', 'c']))
    assert fit(learn)['meta']['vocab'] == ['a', 'b', 'c']
    learn.dls = loaders((16, 16), ['x', 'y', 'z'])
    assert fit(learn)['meta']['vocab'] == ['x', 'y', 'z']


def test_task_and_loss(cnn):
    learn = learner(cnn(), loaders((16, 16), ['a', 'b', 'c']), class_specific=False)
    assert fit(learn)['meta']['task'] == 'single-label'
    learn.dls, learn.loss_func = loaders((16, 16), ['a', 'b', 'c'], several=True), BCEWithLogitsLossFlat(thresh=.3)
    meta = fit(learn)['meta']
    assert (meta['task'], meta['activation'], meta['threshold']) == ('multi-label', 'sigmoid', .3)


def test_normalisation(cnn):
    learn = learner(cnn(), loaders((16, 16), mean=.5))
    assert fit(learn)['mean'] == [.5] * 3
    learn.dls = loaders((16, 16), mean=.25)
    assert fit(learn)['mean'] == [.25] * 3


def test_a_loaded_model(cnn, tmp_path):
    with pytest.warns(UserWarning, match='cannot be built by name'):
        AntehocModel(cnn(), torch.rand(2, 3, 16, 16), eta=2, meta=dict(size=[16, 16])).save_pretrained(tmp_path)
    learn = Learner(loaders((24, 24)), AntehocModel.from_pretrained(tmp_path, cnn=cnn()),
                    loss_func=nn.CrossEntropyLoss(), cbs=TwoPass())
    assert fit(learn)['meta']['size'] == [24, 24]


def test_what_was_given_stays(cnn):
    learn = learner(cnn(), loaders((16, 16), ['a', 'b', 'c']), meta=dict(size=[9, 9]))
    meta = fit(learn)['meta']
    assert meta['size'] == [9, 9] and meta['vocab'] == ['a', 'b', 'c']
