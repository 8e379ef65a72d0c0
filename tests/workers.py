"""CNNs, data and training for the tests, and what other processes do: train, train together, get killed, load a model.

Each of those processes imports this file, so it is kept light."""
import os
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import fastai.distributed
import fastai.vision.all  # noqa: F401  gives Learner what a user of fastai has
import torch
import torch.nn as nn
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders, TfmdDL
from fastai.layers import ResBlock
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.torch_core import set_seed
from fastai.vision.augment import aug_transforms
from fastai.vision.models.xresnet import XResNet
from fastcore.foundation import L
from torch.utils.data import TensorDataset

from antehoc_nb.core.model import AntehocModel
from antehoc_nb.data.photo_digits import photo_digits_dls
from antehoc_nb.train.checkpoint import Checkpoint
from antehoc_nb.train.learner import Bf16
from antehoc_nb.train.two_pass import TwoPass

# a large eps, since Adam divides by the size of the gradient and turns the rounding of a tiny one into a step
OPTS = dict(adam=partial(Adam, eps=1e-3), adamw=partial(OptimWrapper, opt=torch.optim.AdamW, eps=1e-3), sgd=SGD)


class Fp16(MixedPrecision):
    "float16 with loss scaling on a CPU: fastai's mixed precision without the GPU."
    def __init__(self, init_scale=1024.):
        super().__init__()
        self.init_scale = init_scale

    def before_fit(self):
        self.autocast = torch.autocast('cpu', torch.float16)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=self.init_scale)
        self.scales = L()


def small_resnet():
    "Batch norm everywhere, dropout before the last layer."
    return XResNet(ResBlock, 1, [1, 1, 1, 1], p=.3, n_out=10, stem_szs=(8, 8, 64), widen=.125)


def small_cnn(n_out=10, c=3):
    "Three convolutions with batch norm, dropout before the last layer; for images of `c` channels."
    def block(before, after):
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    body = [block(c, 8), block(8, 16), block(16, 16)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.3), nn.Linear(16, n_out))


def bare_cnn():
    "Neither batch norm nor dropout: the output for a batch is that for its images, one by one."
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def scenes(n=96, bs=32):
    "Photo-digits, shuffled and augmented."
    dls = photo_digits_dls(n_train=n, n_valid=16, size=32, bs=bs)
    dls.train.after_batch.add(L(*aug_transforms(size=32)))
    return dls


def halves(cnn):
    "Two parameter groups: the first and the second half of a sequential CNN's children."
    children = list(cnn.children())
    middle = len(children) // 2
    return [[p for child in half for p in child.parameters()] for half in (children[:middle], children[middle:])]


def run(learn, train):
    "Call `train(learn)` without output, and return the learner."
    with learn.no_bar(), learn.no_logging(): train(learn)
    return learn


def same(a, b):
    "Whether two state dicts are equal to the bit."
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


# --- Killed

class Stop(Callback):
    "In the middle of an epoch, touch the file `flag` and wait to be killed."
    order = 90

    def __init__(self, epoch, flag):
        self.at = epoch
        self.flag = flag

    def before_batch(self):
        if self.training and self.epoch == self.at and self.iter == 1:
            self.flag.touch()
            time.sleep(600)


def die_writing(nth):
    "A `Path.write_bytes` that writes half of the `nth` checkpoint and kills its own process."
    count, write_bytes = [0], Path.write_bytes

    def write(path, data):
        count[0] += path.suffix == '.ckpt'
        if count[0] < nth: return write_bytes(path, data)
        write_bytes(path, data[:len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write


def checkpointed(folder, opt='adam', kill=None, checkpoint=True):
    "Train 4 epochs with a checkpoint; `kill` is 'epoch', 'write' or None. The outcome goes to `folder/end.pt`."
    torch.set_num_threads(1)
    folder = Path(folder)
    resumed = (folder/'run.ckpt').exists()
    set_seed(99 if resumed else 7)  # a resumed run does not know how the first one began
    cbs = [TwoPass(eta=3, mask='soft+top_area', keep_maps=2)]
    if opt == 'adamw': cbs.append(Bf16())
    if checkpoint: cbs.append(Checkpoint(folder/'run.ckpt'))
    if kill == 'epoch': cbs.append(Stop(2, folder/'now'))
    if kill == 'write': Path.write_bytes = die_writing(3)
    learn = Learner(scenes(n=64), small_cnn(), opt_func=OPTS[opt], splitter=halves, metrics=accuracy, cbs=cbs)
    run(learn, lambda learn: learn.fit_one_cycle(4, slice(1e-3, 1e-2)))
    end = dict(model=learn.model.state_dict(), moments=list(tensors(learn.opt.state_dict()).values()),
               map_history=learn.two_pass.map_history, int_losses=learn.two_pass.int_losses,
               best=asdict(learn.two_pass.best),
               losses=[float(loss) for loss in learn.recorder.losses],
               values=[[float(value) for value in row] for row in learn.recorder.values], next=torch.randn(3))
    torch.save(end, folder/'end.pt')


def tensors(state, at=''):
    "All tensors in nested dicts and lists, by path."
    if isinstance(state, torch.Tensor): return {at: state}
    if isinstance(state, dict): items = state.items()
    elif isinstance(state, (list, tuple, L)): items = enumerate(state)
    else: items = ()
    return {path: tensor for key, value in items for path, tensor in tensors(value, f'{at}/{key}').items()}


# --- Together

def tensor_dls(n, bs, joint=0):
    """Unaugmented images, shuffled. `joint`: one process, whose batches join those of so many processes.

    fastai's DistributedDL gives process r the r-th part of the shuffled indices, from which it draws its batches."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(n, 3, 16, 16, generator=generator)
    y = torch.randint(0, 10, (n,), generator=generator)

    def loader(shuffle): return TfmdDL(TensorDataset(x, y), bs=bs, shuffle=shuffle, num_workers=0, device='cpu')
    train, valid = loader(True), loader(False)
    if joint:
        own_indices = train.get_idxs

        def joined_indices():
            indices = torch.tensor(list(own_indices())).view(joint, -1, bs // joint)
            return indices.transpose(0, 1).flatten().tolist()
        train.get_idxs = joined_indices
    return DataLoaders(train, valid, device='cpu')


def broadcast_indices(self, indices, rank):
    "For `DistributedDL`: fastai moves the shuffled indices through the GPU; without one, gloo takes them as they are."
    indices = torch.tensor(indices)
    torch.distributed.broadcast(indices, rank)
    return indices.tolist()


def become_process(rank, world, port):
    "Set up this process as number `rank` of `world`."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true',
                      GLOO_SOCKET_IFNAME='lo' if sys.platform == 'linux' else '')
    fastai.distributed.DistributedDL._broadcast = broadcast_indices


def together(folder, n, bs, opt, mask, accumulate=0, rank=0, world=1, port=0):
    "Train as process `rank` of `world`, through fastai's own distributed training if there are several."
    torch.set_num_threads(1)
    set_seed(5)
    if world > 1: become_process(rank, world, port)
    cbs = [TwoPass(eta=3, mask=mask, keep_maps=2, keep_best=False)]
    if accumulate: cbs.append(fastai.callback.training.GradientAccumulation(accumulate))
    dls = tensor_dls(n, bs // world, joint=0 if world > 1 else 2)
    learn = Learner(dls, bare_cnn(), loss_func=nn.CrossEntropyLoss(), opt_func=OPTS[opt], cbs=cbs)
    if world > 1:
        torch.manual_seed(rank)  # processes need not agree on the random stream
        if rank: nn.init.normal_(next(learn.model.weight_net.parameters()))  # nor on the weight network they start from
        with learn.distrib_ctx(sync_bn=False): run(learn, lambda learn: learn.fit(3, .02))
        torch.distributed.destroy_process_group()
    else: run(learn, lambda learn: learn.fit(3, .02))
    end = dict(model=learn.model.state_dict(), int_losses=learn.two_pass.int_losses,
               map_history=learn.two_pass.map_history, drops=learn.two_pass.state_dict()['drops'])
    torch.save(end, Path(folder)/f'{world}-{rank}.pt')


# --- Elsewhere

def explain_elsewhere(folder, threads):
    "Load a saved model and explain the images beside it."
    torch.set_num_threads(threads)
    folder = Path(folder)
    model = AntehocModel.from_pretrained(folder, cnn=small_cnn())
    explanation = model.explain(torch.load(folder/'x.pt'))
    torch.save((explanation.pred, explanation.map, explanation.weights), folder/'elsewhere.pt')
