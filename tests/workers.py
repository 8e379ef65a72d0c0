"""What other processes do for the tests: train, train together, get killed, load a model. Imported by each of them, so kept light."""
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import fastai.distributed
import fastai.vision.all  # noqa: F401  gives Learner what a user of fastai has
import torch
import torch.nn as nn
from fastai.callback.core import Callback
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


def small_resnet(): # BatchNorm everywhere, dropout before the last layer
    return XResNet(ResBlock, 1, [1, 1, 1, 1], p=.3, n_out=10, stem_szs=(8, 8, 64), widen=.125)


def small_cnn(n_out=10, c=3):
    def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return nn.Sequential(block(c, 8), block(8, 16), block(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.3), nn.Linear(16, n_out))


def bare_cnn(): # neither BatchNorm nor dropout: a batch is the sum of its images
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def scenes(n=96, bs=32): # shuffled and augmented
    dls = photo_digits_dls(n_train=n, n_valid=16, size=32, bs=bs)
    dls.train.after_batch.add(L(*aug_transforms(size=32)))
    return dls


def halves(m): # two parameter groups, the stem and the rest of a sequential CNN
    cs = list(m.children())
    return [[p for c in part for p in c.parameters()] for part in (cs[:len(cs)//2], cs[len(cs)//2:])]


def run(learn, f):
    with learn.no_bar(), learn.no_logging(): f(learn)
    return learn


# --- Killed

class Stop(Callback):
    "In the middle of epoch `at`, say so and wait to be killed."
    order = 90
    def __init__(self, at, flag): self.at, self.flag = at, flag
    def before_batch(self):
        if self.training and self.epoch == self.at and self.iter == 1:
            self.flag.touch()
            time.sleep(600)


def die_writing(self_save, nth):
    "A `torch.save` that writes half of the `nth` file and takes the process down with it."
    count = [0]

    def save(o, f, **kw):
        count[0] += 1
        self_save(o, f, **kw)
        if count[0] < nth: return
        data = Path(f).read_bytes()
        with open(f, 'wb') as h:
            h.write(data[:len(data)//2])
            h.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return save


def checkpointed(folder, opt='adam', kill=None, checkpoint=True):
    "Train 4 epochs with a checkpoint; `kill` is 'epoch', 'write' or None. What the run ended with goes to `folder/end.pt`."
    torch.set_num_threads(1)
    folder = Path(folder)
    if not (folder/'run.ckpt').exists(): set_seed(7)  # a resumed run has no right to another start
    else: set_seed(99)
    cbs = [TwoPass(eta=3, mask='soft+top_area', keep_maps=2)]
    if opt == 'adamw': cbs.append(Bf16())
    if checkpoint: cbs.append(Checkpoint(folder/'run.ckpt'))
    if kill == 'epoch': cbs.append(Stop(2, folder/'now'))
    if kill == 'write': torch.save = die_writing(torch.save, 3)
    learn = Learner(scenes(), small_cnn(), opt_func=OPTS[opt], splitter=halves, metrics=accuracy, cbs=cbs)
    run(learn, lambda o: o.fit_one_cycle(4, slice(1e-3, 1e-2)))
    moments = [v for k, v in tensors(learn.opt.state_dict()).items()]
    torch.save(dict(model=learn.model.state_dict(), map_history=learn.two_pass.map_history, moments=moments, int_losses=learn.two_pass.int_losses,
                    losses=[float(o) for o in learn.recorder.losses], values=[[float(v) for v in o] for o in learn.recorder.values],
                    next=torch.randn(3)), folder/'end.pt')


def tensors(o, at=''):
    "All tensors in nested dicts and lists, by path."
    if isinstance(o, torch.Tensor): return {at: o}
    items = o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, (list, tuple, L)) else ()
    return {k: t for i, v in items for k, t in tensors(v, f'{at}/{i}').items()}


# --- Together

def tensor_dls(n, bs, joint=0):
    """Unaugmented images, shuffled. `joint`: one process, whose batches join those of so many processes.

    fastai's DistributedDL gives process r the r-th part of the shuffled indices, from which it draws its batches."""
    g = torch.Generator().manual_seed(3)
    x, y = torch.rand(n, 3, 16, 16, generator=g), torch.randint(0, 10, (n,), generator=g)
    train, valid = (TfmdDL(TensorDataset(x, y), bs=bs, shuffle=s, num_workers=0, device='cpu') for s in (True, False))
    if joint:
        get = train.get_idxs
        train.get_idxs = lambda: torch.tensor(list(get())).view(joint, -1, bs//joint).transpose(0, 1).flatten().tolist()
    return DataLoaders(train, valid, device='cpu')


def together(folder, n, bs, opt, mask, accumulate=0, rank=0, world=1, port=0):
    "Train as process `rank` of `world`, through fastai's own distributed training if there are several."
    torch.set_num_threads(1)
    folder = Path(folder)
    set_seed(5)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1',
                          MASTER_PORT=str(port), ACCELERATE_USE_CPU='true', GLOO_SOCKET_IFNAME='lo' if sys.platform == 'linux' else '')
        # fastai moves the shuffled indices through the GPU; without one, gloo takes them as they are
        def broadcast(self, t, rank):
            t = torch.tensor(t)
            torch.distributed.broadcast(t, rank)
            return t.tolist()
        fastai.distributed.DistributedDL._broadcast = broadcast
    cbs = [TwoPass(eta=3, mask=mask, keep_maps=2)]
    if accumulate: cbs.append(fastai.callback.training.GradientAccumulation(accumulate))
    learn = Learner(tensor_dls(n, bs//world, joint=0 if world > 1 else 2), bare_cnn(), loss_func=nn.CrossEntropyLoss(), opt_func=OPTS[opt], cbs=cbs)
    if world > 1:
        torch.manual_seed(rank)  # processes need not agree on the random stream
        if rank: nn.init.normal_(learn.model.weight_net.mid.weight)  # nor on the weight network they start from
        with learn.distrib_ctx(sync_bn=False): run(learn, lambda o: o.fit(3, .02))
        torch.distributed.destroy_process_group()
    else: run(learn, lambda o: o.fit(3, .02))
    torch.save(dict(model=learn.model.state_dict(), int_losses=learn.two_pass.int_losses, map_history=learn.two_pass.map_history), folder/f'{world}-{rank}.pt')


# --- Elsewhere

def explain_elsewhere(folder, threads):
    "Load a saved model and explain the images beside it."
    torch.set_num_threads(threads)
    folder = Path(folder)
    e = AntehocModel.from_pretrained(folder, cnn=small_cnn()).explain(torch.load(folder/'x.pt'))
    torch.save((e.pred, e.map, e.weights), folder/'elsewhere.pt')
