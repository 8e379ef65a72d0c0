"""Training with `TwoPass`: the CNN to the bit, across processes, and through a kill."""
import copy
import os
import signal
import socket
import time
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import fine_tune, fit_flat_cos, fit_one_cycle, lr_find  # noqa: F401
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import TensorDataset
from workers import OPTS, Fp16, bare_cnn, checkpointed, halves, run, same, scenes, small_cnn, small_resnet, together

from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import plain_tensor
from antehoc_nb.train.checkpoint import Checkpoint
from antehoc_nb.train.learner import Bf16, antehoc_learner
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')


# --- Invariant 1: the CNN is bit-identical to plain training

def cycle(learn): learn.fit_one_cycle(2, slice(1e-3, 1e-2))


def transfer(learn):
    learn.freeze()
    learn.fit_one_cycle(1, 1e-2)
    learn.unfreeze()
    learn.fit_one_cycle(2, slice(1e-4, 1e-2))


def tuned(learn): learn.fine_tune(1, 1e-2, freeze_epochs=1)


def searched(learn):
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit_one_cycle(2, 1e-2)


def several(learn):
    learn.fit(1, 1e-2)
    learn.validate()
    learn.get_preds()
    learn.fit_flat_cos(1, 1e-2)


# how the CNN is trained; the callbacks are made anew for each run
PLAIN = dict(
    plain={},
    resnet=dict(cnn=small_resnet),
    clip=dict(cbs=lambda: [GradientClip(.1)]),
    accumulate=dict(n=96, cbs=lambda: [GradientAccumulation(64)]),
    accumulate_and_clip=dict(n=96, cbs=lambda: [GradientAccumulation(48), GradientClip(.1)]),
    bf16=dict(cbs=lambda: [Bf16()]),
    fp16=dict(cbs=lambda: [Fp16()]),
    fp16_overflow=dict(cbs=lambda: [Fp16(init_scale=2.**17)], fit=lambda learn: learn.fit_one_cycle(4, 1e-2)),
    mixup=dict(cbs=lambda: [MixUp()]),
    freeze=dict(fit=transfer),
    fine_tune=dict(fit=tuned),
    lr_find=dict(fit=searched),
    several_fits=dict(fit=several),
    adamw=dict(opt_func=OPTS['adamw']),
    sgd=dict(opt_func=partial(SGD, mom=.9, wd=.01)),
    no_bn_decay=dict(opt_func=Adam, train_bn=False, wd=.1),
)

# name: (how the CNN is trained, arguments of `TwoPass`)
CASES = {name: (name, {}) for name in PLAIN} | dict(
    sweep=('plain', dict(mask='top_area')),
    both=('plain', dict(mask='soft+top_area', fill='mean')),
    scalars=('plain', dict(weight_net='scalars', fill='blur')),
    mean=('plain', dict(weight_net='mean', scale=False)),
    paper=('plain', dict(weight_net='paper')),
    paper_fp16=('fp16', dict(weight_net='paper')),
    agnostic=('plain', dict(class_specific=False, mask='dimmed')),
    agnostic_bf16=('bf16', dict(class_specific=False)),
    pixels=('plain', dict(cells='pixels')),
    map_history=('plain', dict(keep_maps=4, soft_attention='softmax')),
)
FAST = 'resnet', 'accumulate_and_clip', 'fp16', 'mixup', 'freeze', 'both', 'paper', 'agnostic'
MARKED = [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def trained(cnn=small_cnn, fit=cycle, cbs=list, n=64, two_pass=(), **kwargs):
    "What a run ends with, from the same seed each time."
    set_seed(7)
    net = cnn()
    learn = Learner(scenes(n), net, splitter=halves, metrics=accuracy, cbs=[*cbs(), *two_pass], **kwargs)
    start = copy.deepcopy(net.state_dict())
    run(learn, fit)
    end = net.state_dict()
    moved = sum(not torch.equal(value, start[key]) for key, value in end.items())
    assert moved > len(start) * .8, 'the comparison needs a CNN that learnt'
    losses = [float(loss) for loss in learn.recorder.losses]
    return SimpleNamespace(cnn=end, random=torch.randn(4), losses=losses, learn=learn)


@cache
def trained_plainly(name):
    "A run without `TwoPass`, made once for all cases that are compared with it."
    return trained(**PLAIN[name])


@pytest.mark.parametrize('case', MARKED)
def test_cnn_is_bit_identical(case):
    name, arguments = CASES[case]
    plain = trained_plainly(name)
    ours = trained(**PLAIN[name], two_pass=[TwoPass(eta=3, keep_best=False, **arguments)])
    assert same(plain.cnn, ours.cnn)
    assert plain.losses == ours.losses
    assert torch.equal(plain.random, ours.random), 'the random stream went another way'
    model, two_pass = ours.learn.model, ours.learn.two_pass
    weights = list(model.weight_net.parameters())
    if hasattr(model.weight_net, 'autoencoder'): weights = [model.weight_net.autoencoder.out.weight]
    if weights: assert any(p.abs().max() > 0 for p in weights)
    assert all(loss > 0 for loss in two_pass.int_losses)
    assert len(two_pass.int_losses) == len(plain.losses)
    assert not any(module._forward_hooks for module in model.modules()) and not model.recording
    assert all(p.requires_grad for p in model.parameters())


def test_pass_2_masks_as_the_mask_says():
    "Number 0 of `dimmed` is on black, which is reached where its map is 0; the others are blurred, and black nowhere."
    set_seed(7)
    inputs = []
    learn = Learner(scenes(n=16, bs=16), small_cnn(), cbs=TwoPass(eta=3, mask='dimmed', fill='blur'))
    def note(cnn, args):
        if torch.is_grad_enabled(): inputs.append(plain_tensor(args[0]).clone())
        return args  # pass 2 does not call a hook that only watches
    hook = learn.model.cnn.register_forward_pre_hook(note)
    run(learn, lambda learn: learn.fit(1, 1e-2))
    hook.remove()
    in_pass_2, = [x for x in inputs if len(x) == 8]  # every other image; random areas go without gradients
    pixels = in_pass_2 * learn.model.std + learn.model.mean
    darkest = pixels.abs().amax(1).flatten(1).amin(1)
    assert darkest[0] < 1e-6 and darkest[1:].min() > 1e-3, darkest


@pytest.mark.slow
def test_order_of_callbacks_does_not_matter():
    def cnn_after(*cbs):
        set_seed(7)
        net = small_cnn()
        run(Learner(scenes(n=64), net, cbs=cbs), lambda learn: learn.fit(1, 1e-2))
        return net.state_dict()
    clip, two_pass = partial(GradientClip, .05), partial(TwoPass, eta=3)
    plain = cnn_after(Bf16(), clip())
    assert same(plain, cnn_after(clip(), two_pass(), Bf16()))
    assert same(plain, cnn_after(two_pass(), Bf16(), clip()))


@pytest.mark.slow
def test_timm_and_antehoc_learner_keep_the_cnn():
    pytest.importorskip('timm')
    from fastai.vision.learner import vision_learner

    def cnn_after(make, arch, **kwargs):
        set_seed(2)
        learn = make(scenes(n=16, bs=8), arch, pretrained=False, metrics=accuracy, **kwargs)
        run(learn, lambda learn: learn.fine_tune(1, 1e-2))
        return getattr(learn.model, 'cnn', learn.model).state_dict()
    assert same(cnn_after(vision_learner, 'resnet10t'), cnn_after(antehoc_learner, 'timm/resnet10t', eta=3))


# --- Invariant 2: where gradients go

class TakeGradients(TwoPass):
    "Keeps the gradients of the first step, and stops."
    def before_step(self):
        model = self.learn.model
        assert all(p.grad is None for p in model.weight_net.parameters())  # the task loss left none
        self.of_cnn = [p.grad.clone() for p in model.cnn.parameters()]
        super().before_step()
        unchanged = [torch.equal(p.grad, g) for p, g in zip(model.cnn.parameters(), self.of_cnn, strict=True)]
        assert all(unchanged)  # the interpretation loss added none
        self.of_weight_net = [p.grad.clone() for p in model.weight_net.parameters()]
        self.batch = plain_tensor(self.x).clone(), plain_tensor(self.y).clone()
        raise KeyboardInterrupt


def assert_close_by_size(gradients, by_hand, tolerance):
    "The difference of all gradients together is small beside their size."
    gradients = torch.cat([gradient.flatten() for gradient in gradients])
    by_hand = torch.cat([gradient.flatten() for gradient in by_hand])
    assert by_hand.norm() > 0
    assert (gradients - by_hand).norm() < tolerance * by_hand.norm()


@pytest.mark.parametrize('bf16', [False, True])
def test_gradients_stay_apart(bf16):
    "By hand: the CNN's gradient is the task loss's alone, the weight network's the interpretation loss's alone."
    set_seed(1)
    take = TakeGradients(eta=3, mask='soft', weight_net='paper')
    learn = Learner(scenes(n=32), bare_cnn(), cbs=[take, *[Bf16()] * bf16])
    model = learn.model
    nn.init.normal_(model.weight_net.autoencoder.out.weight, std=.1)
    with pytest.raises(KeyboardInterrupt): run(learn, lambda learn: learn.fit(1, 1e-2))
    x, y = take.batch
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        model.recording = True
        y1 = model(x)
        maps, *_ = model.interpret(model.take_recorded(), x.shape[2:])
        y2 = model.cnn(model.mask(x, maps))
    task = nn.functional.cross_entropy(y1.float(), y.long())
    error = (y2.float() - y1.detach().float()).square().sum(1)
    ratio = error / (y1.float() - y1.float().mean(0)).detach().square().sum(1).mean()
    interpretation = (1 + ratio).log2().mean()
    of_cnn = torch.autograd.grad(task, list(model.cnn.parameters()), retain_graph=True)
    of_weight_net = torch.autograd.grad(interpretation, list(model.weight_net.parameters()))
    assert_close_by_size(take.of_cnn, of_cnn, .05 if bf16 else 1e-4)
    assert_close_by_size(take.of_weight_net, of_weight_net, .05 if bf16 else 1e-4)
    assert any(gradient.abs().max() > 0 for gradient in take.of_weight_net)


@pytest.mark.parametrize('fp16', [False, True])
def test_a_cnn_that_is_not_trained_costs_no_gradients(fp16):
    gradients = []

    class Look(TwoPass):
        def after_step(self):
            gradients.extend(p.grad for p in self.learn.model.cnn.parameters())
            super().after_step()
    net = small_cnn()
    before = copy.deepcopy(net.state_dict())
    learn = Learner(scenes(n=64), net, cbs=[Look(eta=3, train_cnn=False, keep_best=False), *[Fp16()] * fp16])
    run(learn, lambda learn: learn.fit(2, 1e-2))
    assert gradients and all(gradient is None for gradient in gradients)
    assert same(before, net.state_dict())
    assert learn.model.weight_net.autoencoder.out.weight.abs().max() > 0
    assert all(p.requires_grad for p in net.parameters())


# --- Invariants 7 and 8: other processes

@pytest.fixture(scope='module')
def start():
    "Start functions of `workers` as processes, forked from one with the imports; whatever is left is killed."
    can_fork = hasattr(os, 'fork')
    processes = torch.multiprocessing.get_context('forkserver' if can_fork else 'spawn')
    imports = ['fastai.vision.all', 'fastai.distributed', 'antehoc_nb.data.photo_digits', 'antehoc_nb.train.checkpoint',
               'antehoc_nb.train.learner']
    if can_fork: processes.set_forkserver_preload(imports)
    started = []

    def _start(function, *args, **kwargs):
        process = processes.Process(target=function, args=args, kwargs=kwargs)
        process.start()
        started.append(process)
        return process
    yield _start
    for process in started:
        if process.is_alive(): process.kill()


def ended(*processes, code=0, seconds=240):
    for process in processes:
        process.join(seconds)
        assert process.exitcode == code, f'a process ended with {process.exitcode}'


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize('n, bs, opt, mask, accumulate', [
    pytest.param(32, 32, 'sgd', 'soft', 0, id='one-batch'),
    pytest.param(64, 16, 'adam', 'top_area', 0, id='many-batches'),
    pytest.param(64, 16, 'adamw', 'soft+top_area', 32, id='accumulated'),
])
def test_two_processes_train_as_one(start, tmp_path, n, bs, opt, mask, accumulate):
    "Invariant 7, through fastai's `distrib_ctx` on gloo."
    pytest.importorskip('accelerate')
    port, args = free_port(), (tmp_path, n, bs, opt, mask)
    pair = [start(together, *args, accumulate // 2, rank=rank, world=2, port=port) for rank in (0, 1)]
    ended(*pair, start(together, *args, accumulate))
    one, first, second = (torch.load(tmp_path/name) for name in ('1-0.pt', '2-0.pt', '2-1.pt'))
    assert len(first['map_history']) == 4
    for a, b in zip(first['map_history'], second['map_history'], strict=True): assert torch.equal(a, b)
    assert same(first['model'], second['model'])  # both processes hold the same weights, weight network included
    torch.testing.assert_close(one['model'], first['model'], atol=2e-5, rtol=1e-3)
    assert first['drops'] == second['drops'] and len(first['drops']) == 3  # they keep the same weight network
    torch.testing.assert_close(torch.tensor(one['drops']), torch.tensor(first['drops']), atol=1e-2, rtol=1e-3)
    means = (torch.tensor(first['int_losses']) + torch.tensor(second['int_losses'])) / 2
    torch.testing.assert_close(torch.tensor(one['int_losses']), means, atol=1e-5, rtol=1e-3)
    assert one['model']['weight_net.autoencoder.out.weight'].abs().max() > 0


def wait_for(file, process, seconds=240):
    "Until the process has made the file, or has ended."
    for _ in range(10 * seconds):
        if file.exists() or not process.is_alive(): return
        time.sleep(.1)


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL here')
@pytest.mark.parametrize('opt', ['adam', pytest.param('adamw', marks=pytest.mark.slow)])
def test_killed_run_ends_as_if_left_alone(start, tmp_path, opt):
    "Invariant 8: killed in the middle of an epoch, and killed half way through writing a checkpoint."
    alone, epoch, write = folders = [tmp_path/name for name in ('alone', 'epoch', 'write')]
    for folder in folders: folder.mkdir()
    whole = start(checkpointed, alone, opt, checkpoint=False)
    in_epoch = start(checkpointed, epoch, opt, kill='epoch')
    in_write = start(checkpointed, write, opt, kill='write')
    wait_for(epoch/'now', in_epoch)
    os.kill(in_epoch.pid, signal.SIGKILL)
    ended(in_epoch, in_write, code=-signal.SIGKILL)
    assert not (epoch/'end.pt').exists() and not (write/'end.pt').exists()
    assert [*write.glob('.*.ckpt')]  # the torn file stands beside the good one
    for folder in (epoch, write):
        assert torch.load(folder/'run.ckpt', weights_only=True)['epoch'] == 1  # two epochs are safe
    ended(whole, start(checkpointed, epoch, opt), start(checkpointed, write, opt))
    want = torch.load(alone/'end.pt')
    for folder in (epoch, write):
        got = torch.load(folder/'end.pt')
        assert same(want['model'], got['model'])
        assert torch.equal(want['next'], got['next'])  # what comes after the run is the same too
        for key in ('map_history', 'moments'):
            assert len(want[key]) == len(got[key]) > 0
            assert all(torch.equal(a, b) for a, b in zip(want[key], got[key], strict=True)), key
        for key in ('int_losses', 'losses', 'values', 'best'): assert want[key] == got[key], key


def test_checkpoint_of_a_plain_learner(tmp_path):
    class Crash(Checkpoint):
        def before_batch(self):
            if self.epoch == 1 and self.iter == 1: raise KeyboardInterrupt

    def cnn_after(**kwargs):
        set_seed(7)
        learn = Learner(scenes(n=64), small_cnn(), metrics=accuracy, **kwargs)
        return run(learn, lambda learn: learn.fit_one_cycle(3, 1e-2)).model.state_dict()
    whole = cnn_after()
    with pytest.raises(KeyboardInterrupt): cnn_after(cbs=Crash(tmp_path/'c'))
    assert same(whole, cnn_after(cbs=Checkpoint(tmp_path/'c')))


# --- CNNs with other inputs and outputs, trained

class TwoInputs(nn.Module):
    "An image and a number in, a dictionary out."
    def __init__(self):
        super().__init__()
        self.body = small_cnn(16)
        self.head = nn.Linear(17, 3)

    def forward(self, x, age):
        features = torch.cat([self.body(x), age[:, None]], 1)
        return dict(logits=self.head(features), age=age.clone())


class TupleOut(nn.Module):
    "Logits and auxiliary logits in training, logits alone in evaluation; as GoogLeNet and Inception v3 do."
    def __init__(self):
        super().__init__()
        self.body = small_cnn(16)
        self.head = nn.Linear(16, 3)
        self.aux = nn.Linear(16, 3)

    def forward(self, x):
        features = self.body(x)
        return (self.head(features), self.aux(features)) if self.training else self.head(features)


def any_loss(out, y):
    cross_entropy = nn.functional.cross_entropy
    if isinstance(out, dict): return cross_entropy(out['logits'], y)
    if isinstance(out, tuple): return cross_entropy(out[0], y) + .4 * cross_entropy(out[1], y)
    return cross_entropy(out, y)


def table(*columns, bs=8, n_inp=1):
    "DataLoaders of tensors, the first `n_inp` of which are inputs."
    data = TensorDataset(*columns)
    data.n_inp = n_inp
    loaders = [TfmdDL(data, bs=bs, shuffle=shuffle, num_workers=0, device='cpu') for shuffle in (True, False)]
    return DataLoaders(*loaders, device='cpu')


@pytest.mark.parametrize('kind', [TwoInputs, TupleOut])
def test_inputs_and_outputs_of_any_kind(kind):
    x, age, y = torch.rand(24, 3, 32, 32), torch.rand(24), torch.randint(0, 3, (24,))

    def trained(*cbs):
        set_seed(4)
        net = kind()
        dls = table(x, age, y, n_inp=2) if kind is TwoInputs else table(x, y)
        learn = run(Learner(dls, net, loss_func=any_loss, cbs=cbs), lambda learn: learn.fit(2, 1e-2))
        return net.state_dict(), learn
    (plain, _), (ours, learn) = trained(), trained(TwoPass(eta=3, keep_best=False))
    assert same(plain, ours) and len(learn.two_pass.int_losses) == 6
    assert learn.model.weight_net.autoencoder.out.weight.abs().max() > 0
    assert all(value == value for value in learn.recorder.values[-1])  # no nan: validation too
    others = [age[:2]] if kind is TwoInputs else []
    assert learn.model.explain(x[:2], *others).map.shape == (2, 1, 32, 32)


class SmallAuxiliary(nn.Module):
    "Stands in for an auxiliary classifier, which needs the big image's size."
    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Linear(channels, 3)

    def forward(self, x): return self.linear(x.mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize('name, size', [('googlenet', 64), pytest.param('inception_v3', 96, marks=pytest.mark.slow)])
def test_auxiliary_classifiers(name, size):
    "torchvision's own tuple outputs in training mode."
    import torchvision
    net = getattr(torchvision.models, name)(weights=None, num_classes=3, aux_logits=True, init_weights=False)
    for key in ('aux1', 'aux2', 'AuxLogits'):
        old = getattr(net, key, None)
        if old is None: continue
        first = getattr(old, 'conv', None) or old.conv0
        setattr(net, key, SmallAuxiliary(first.conv.in_channels))

    def loss(out, y):
        outputs = out if isinstance(out, tuple) else [out]
        return sum(nn.functional.cross_entropy(output, y) for output in outputs)
    x, y = torch.rand(2, 3, size, size), torch.randint(0, 3, (2,))
    learn = Learner(table(x, y, bs=2), net, loss_func=loss, cbs=TwoPass(eta=4))
    run(learn, lambda learn: learn.fit(1, 1e-3))
    assert isinstance(learn.model, AntehocModel) and learn.two_pass.int_losses[0] > 0
