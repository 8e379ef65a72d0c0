"""What people do with a fastai learner, done with `TwoPass` and without: the CNN ends with the same bits."""
import copy
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter
from fastai.distributed import ParallelTrainer
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.torch_core import params, set_seed
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import ImageBlock
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

import antehoc_nb.show.learner  # noqa: F401  gives learners `explain`
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.train.learner import Bf16
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')
N = 24


def image_of(o): return np.random.default_rng(o).integers(0, 256, (20, 20, 3), dtype=np.uint8)


def label_of(o): return 'ab'[o % 2]


def data():
    return DataBlock((ImageBlock, CategoryBlock), get_x=image_of, get_y=label_of,
                     splitter=IndexSplitter(range(16, N)), item_tfms=Resize(16))


def loaders(size=16, **kwargs):
    block = data()
    block = DataBlock((ImageBlock, CategoryBlock), get_x=image_of, get_y=label_of, splitter=block.splitter,
                      item_tfms=Resize(size), **kwargs)
    return block.dataloaders(list(range(N)), bs=8, num_workers=0, device='cpu')


def weighted():
    weights = [1. + o % 3 for o in range(N)]
    return data().weighted_dataloaders(list(range(N)), weights, bs=8, num_workers=0, device='cpu')


def cnn():
    first = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()
    second = nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(nn.Sequential(*first, *second), nn.Sequential(*head))


def halves(net): return [params(net[0]), params(net[1])]


def cnn_of(model):
    model = getattr(model, 'module', model)
    return model.cnn if isinstance(model, AntehocModel) else model


class Averaged(Callback):
    "A moving average of the weights, as PyTorch has it"
    def __init__(self, ema): self.average = get_ema_multi_avg_fn(.9) if ema else None

    def before_fit(self): self.average_model = AveragedModel(self.learn.model, multi_avg_fn=self.average)

    def after_step(self): self.average_model.update_parameters(self.learn.model)


def averaged(learn, ema):
    learn.add_cb(Averaged(ema))
    learn.fit(1, 1e-2)
    model = learn.averaged.average_model
    update_bn([batch[0] for batch in learn.dls.train], model)
    learn.model = model.module
    return learn.get_preds()[0]


class ParallelOnCPU(ParallelTrainer):
    def __init__(self): super().__init__(None)


# --- name -> what is done; it may return tensors that have to be the same too

def fit(learn, **kwargs): learn.fit(1, 1e-2, **kwargs)


def with_callback(callback): return lambda learn: learn.fit(2, 1e-2, cbs=callback())


def lr_find(learn):
    learn.lr_find(num_it=8, show_plot=False)
    learn.fit(1, 1e-2)


def discriminative(learn):
    learn.freeze()
    learn.fit(1, 1e-2)
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-4, 1e-2))


def progressive(learn):
    learn.fit(1, 1e-2)
    learn.dls = loaders(24)
    learn.fit(1, 1e-2)


def predictions(learn):
    learn.fit(1, 1e-2)
    return learn.get_preds()[0]


def tta(learn):
    learn.fit(1, 1e-2)
    set_seed(3)
    return learn.tta(n=2)[0]


def interpretation(learn):
    learn.fit(1, 1e-2)
    found = ClassificationInterpretation.from_learner(learn)
    return torch.from_numpy(found.confusion_matrix()), found.top_losses(4)[0]


def exported(learn, folder):
    learn.fit(1, 1e-2)
    learn.path = folder
    folder.mkdir()
    learn.export('learner.pkl')
    loaded = load_learner(folder/'learner.pkl')
    with loaded.no_bar(): return loaded.predict(image_of(3))[2]


def saved(learn, folder):
    learn.path = folder
    learn.fit(1, 1e-2)
    learn.save('model')
    learn.fit(1, 1e-2)
    learn.load('model')


def saves_the_best(learn, folder):
    learn.path = folder
    learn.fit(2, 1e-2, cbs=SaveModelCallback(fname='best'))


ROWS = {
    'fine_tune': lambda learn: learn.fine_tune(1, 1e-2),
    'lr_find': lr_find,
    'freeze, unfreeze, discriminative learning rates': discriminative,
    'fit_flat_cos': lambda learn: learn.fit_flat_cos(1, 1e-2),
    'MixUp': with_callback(MixUp),
    'CutMix': with_callback(CutMix),
    'label smoothing': fit,
    'batch transforms (aug_transforms)': fit,
    'weighted_dataloaders': fit,
    'progressive resizing': progressive,
    'GradientAccumulation': with_callback(partial(GradientAccumulation, 16)),
    'GradientClip': with_callback(partial(GradientClip, .1)),
    'mixed precision (bfloat16)': with_callback(Bf16),
    'DataParallel': with_callback(ParallelOnCPU),
    'EarlyStoppingCallback': with_callback(partial(EarlyStoppingCallback, patience=1)),
    'ReduceLROnPlateau': with_callback(partial(ReduceLROnPlateau, patience=1)),
    'SaveModelCallback': saves_the_best,
    'save and load': saved,
    'EMA (AveragedModel)': partial(averaged, ema=True),
    'SWA (AveragedModel)': partial(averaged, ema=False),
    'get_preds': predictions,
    'tta': tta,
    'ClassificationInterpretation': interpretation,
    'export and load_learner': exported,
}
MADE = {
    'label smoothing': dict(loss_func=LabelSmoothingCrossEntropyFlat()),
    'batch transforms (aug_transforms)': dict(dls=partial(loaders, batch_tfms=aug_transforms())),
    'weighted_dataloaders': dict(dls=weighted),
}


def trained(row, folder, cbs=()):
    "The learner, and what was returned, from the same seed each time"
    set_seed(5, reproducible=True)
    made = MADE.get(row, {}) | {}
    dls = made.pop('dls', loaders)()
    learn = Learner(dls, cnn(), splitter=halves, metrics=accuracy, cbs=cbs, **made)
    before = copy.deepcopy(cnn_of(learn.model).state_dict())
    arguments = (folder,) if row in ('export and load_learner', 'save and load', 'SaveModelCallback') else ()
    with learn.no_bar(), learn.no_logging(): found = ROWS[row](learn, *arguments)
    after = cnn_of(learn.model).state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in after), 'the comparison needs a CNN that learnt'
    found = () if found is None else found if isinstance(found, tuple) else (found,)
    return learn, after, found


FAST = ('fine_tune', 'CutMix', 'weighted_dataloaders', 'progressive resizing', 'DataParallel', 'EMA (AveragedModel)',
        'export and load_learner')
MARKED = [row if row in FAST else pytest.param(row, marks=pytest.mark.slow) for row in ROWS]


@pytest.mark.parametrize('row', MARKED)
def test_the_cnn_is_that_of_plain_training(row, tmp_path):
    _, plain, expected = trained(row, tmp_path/'plain')
    learn, ours, found = trained(row, tmp_path/'ours', TwoPass(eta=2))
    assert [*ours] == [*plain] and all(torch.equal(ours[name], plain[name]) for name in ours)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    model = getattr(learn.model, 'module', learn.model)
    assert model.explain(torch.rand(2, 3, 16, 16)).map.isfinite().all()


def test_the_page_has_the_table():
    page = Path(__file__).parents[2]/'nbs'/'train'/'12_learner.ipynb'
    cells = [''.join(cell['source']) for cell in json.loads(page.read_text(encoding='utf-8'))['cells']]
    table = next(cell for cell in cells if '| what is done' in cell)
    assert re.findall(r'^\| `?([^`|]+?)`? \|', table, flags=re.M)[1:] == [*ROWS]


# --- Images that can't be right

def loader(images): return DataLoader(TensorDataset(images, torch.zeros(len(images)).long()), 2)


X = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
GREY = ('TwoPass: the DataLoaders give images of 1 channel, the CNN takes 3; read them in colour: '
        'ImageBlock(PILImage)')
REFUSED = {
    'grey': (X[:, :1], X[:, :1], GREY),
    'alpha': (X[:, [0, 1, 2, 0]], X[:, [0, 1, 2, 0]], 'TwoPass: the DataLoaders give images of 4 channels, the CNN '
              'takes 3; leave out the alpha channel: x[:, :3]'),
    'grey in training alone': (X[:, :1], X, GREY),
    'to 255': (X * 255, X * 255, 'TwoPass: these look like pixels from 0 to 255 (the highest is'),
    'to 255 in training alone': (X * 255, X, 'TwoPass: these look like pixels from 0 to 255 (the highest is'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_images_that_cannot_be_right(case):
    train, valid, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        dls = DataLoaders(loader(train), loader(valid))
        learn = Learner(dls, cnn(), loss_func=nn.CrossEntropyLoss(), cbs=TwoPass(eta=2))
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert message in str(caught.value)


def test_a_cnn_that_takes_pixels_to_255():
    scale = dict(mean=[0, 0, 0], std=[1/255] * 3)
    dls = DataLoaders(loader(X * 255), loader(X * 255))
    learn = Learner(dls, cnn(), loss_func=nn.CrossEntropyLoss(), cbs=TwoPass(eta=2, **scale))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    torch.testing.assert_close(learn.model.explain(X * 255).pixels, X)
