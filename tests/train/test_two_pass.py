"""Training with `TwoPass`: the CNN to the bit, across processes, and through a kill."""
import copy
import os
import signal
import socket
import time
from functools import partial

import pytest
import torch
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import fine_tune, fit_flat_cos, fit_one_cycle, lr_find  # noqa: F401
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam
from fastai.torch_core import set_seed
from torch import nn
from workers import OPTS, bare_cnn, checkpointed, halves, run, scenes, small_cnn, small_resnet, together

from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import plain_tensor
from antehoc_nb.train.checkpoint import Checkpoint
from antehoc_nb.train.learner import Bf16, antehoc_learner
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# --- Invariant 1: the CNN is bit-identical to plain training

def cycle(learn): learn.fit_one_cycle(3, slice(1e-3, 1e-2))
def transfer(learn): (learn.freeze(), learn.fit_one_cycle(1, 1e-2), learn.unfreeze(), learn.fit_one_cycle(2, slice(1e-4, 1e-2)))
def tuned(learn): learn.fine_tune(1, 1e-2, freeze_epochs=1)
def searched(learn): (learn.lr_find(num_it=6, show_plot=False), learn.fit_one_cycle(2, 1e-2))
def thrice(learn): (learn.fit(1, 1e-2), learn.validate(), learn.get_preds(), learn.fit_flat_cos(1, 1e-2))


CASES = dict(
    plain={},
    clip=dict(cbs=[GradientClip(.1)]),
    accumulate=dict(cbs=[GradientAccumulation(64)]),
    accumulate_and_clip=dict(cbs=[GradientAccumulation(48), GradientClip(.1)]),
    bf16=dict(cbs=[Bf16()]),
    mixup=dict(cbs=[MixUp()]),
    freeze=dict(fit=transfer),
    fine_tune=dict(fit=tuned),
    lr_find=dict(fit=searched),
    several_fits=dict(fit=thrice),
    adamw=dict(opt_func=OPTS['adamw']),
    sgd=dict(opt_func=partial(SGD, mom=.9, wd=.01)),
    no_bn_decay=dict(opt_func=Adam, train_bn=False, wd=.1),
    sweep=dict(two=dict(mask='top_area')),
    both=dict(two=dict(mask='soft+top_area', fill='mean')),
    single=dict(two=dict(weight_net='single', fill='blur')),
    uniform=dict(two=dict(weight_net='uniform', scale=False)),
    informed=dict(two=dict(weight_net='informed')),
    conditional=dict(two=dict(weight_net='conditional')),
    directed=dict(two=dict(weight_net='directed')),
    turned=dict(two=dict(weight_net='turned', mask='dimmed')),
    informed_bf16=dict(two=dict(weight_net='informed'), cbs=[Bf16()]),
    map_history=dict(two=dict(keep_maps=4, soft_attention='softmax_max')),
)


@pytest.mark.parametrize('case', CASES)
def test_cnn_is_bit_identical(case):
    kw = copy.deepcopy(CASES[case])
    cbs, fit, two = kw.pop('cbs', []), kw.pop('fit', cycle), kw.pop('two', {})

    def trained(*more):
        set_seed(7)
        net = small_resnet()
        learn = Learner(scenes(), net, splitter=halves, metrics=accuracy, cbs=[*copy.deepcopy(cbs), *more], **kw)
        start = copy.deepcopy(net.state_dict())
        run(learn, fit)
        moved = sum(not torch.equal(v, start[k]) for k, v in net.state_dict().items())
        assert moved > len(start)*.8, 'the comparison needs a CNN that learnt'
        return net.state_dict(), torch.randn(4), [float(o) for o in learn.recorder.losses], learn

    plain, rng, losses, _ = trained()
    ours, rng2, losses2, learn = trained(TwoPass(eta=4, **two))
    assert same(plain, ours)
    assert losses == losses2
    assert torch.equal(rng, rng2), 'the random stream went another way'
    w = learn.model.weight_net
    if list(w.parameters()): assert any(p.abs().max() > 0 for p in ([w.out.weight] if hasattr(w, 'out') else w.parameters()))
    assert all(o > 0 for o in learn.two_pass.int_losses)
    assert len(learn.two_pass.int_losses) == len(losses)
    assert not any(m._forward_hooks for m in learn.model.modules()) and not learn.model.recording
    assert all(p.requires_grad for p in learn.model.parameters())


def test_pass_2_shows_what_the_mask_asks_for():
    "Number 0 of `focus` is on black, which is reached where its map is 0; the others are blurred, and black nowhere."
    set_seed(7)
    seen, learn = [], Learner(scenes(n=16, bs=16), small_cnn(), cbs=TwoPass(eta=3, mask='dimmed', fill='blur'))
    handle = learn.model.cnn.register_forward_pre_hook(lambda m, args: seen.append(plain_tensor(args[0]).clone()))
    run(learn, lambda o: o.fit(1, 1e-2))
    handle.remove()
    model = learn.model
    darkest = (seen[1] * model.std + model.mean).abs().amax(1).flatten(1).amin(1)
    assert seen[1].shape == seen[0].shape and darkest[0] < 1e-6 and darkest[1:].min() > 1e-3, darkest


def test_order_of_callbacks_does_not_matter():
    def trained(*cbs):
        set_seed(7)
        net = small_cnn()
        run(Learner(scenes(), net, cbs=cbs), lambda o: o.fit(2, 1e-2))
        return net.state_dict()
    clip, two = partial(GradientClip, .05), partial(TwoPass, eta=3)
    a, b, c = trained(clip(), two(), Bf16()), trained(two(), Bf16(), clip()), trained(Bf16(), clip())
    assert same(a, b) and same(a, c)


def test_timm_and_antehoc_learner_keep_the_cnn():
    pytest.importorskip('timm')
    from fastai.vision.learner import vision_learner

    def trained(make):
        set_seed(2)
        learn = make(scenes(n=32, bs=16))
        run(learn, lambda o: o.fine_tune(1, 1e-2))
        return getattr(learn.model, 'cnn', learn.model).state_dict()
    a = trained(lambda dls: vision_learner(dls, 'resnet10t', pretrained=False, metrics=accuracy))
    b = trained(lambda dls: antehoc_learner(dls, 'timm/resnet10t', eta=3, pretrained=False, metrics=accuracy))
    assert same(a, b)


# --- Invariant 2: where gradients go

@pytest.mark.parametrize('bf16', [False, True])
def test_gradients_stay_apart(bf16):
    "Recompute both losses by hand: the CNN's gradient is the task loss's alone, the weight network's the interpretation loss's alone."
    got = {}

    class Take(TwoPass):
        def before_step(self):
            m = self.learn.model
            assert all(p.grad is None for p in m.weight_net.parameters())  # the task loss left none
            got['cnn'] = [p.grad.clone() for p in m.cnn.parameters()]
            super().before_step()
            assert all(torch.equal(p.grad, g) for p, g in zip(m.cnn.parameters(), got['cnn']))  # the interpretation loss added none
            got['w'] = [p.grad.clone() for p in m.weight_net.parameters()]
            got['x'], got['y'] = self.x.clone(), self.y.clone()
            raise KeyboardInterrupt
    set_seed(1)
    learn = Learner(scenes(), bare_cnn(), cbs=[Take(eta=3), *([Bf16()] if bf16 else [])])
    m = learn.model
    nn.init.normal_(m.weight_net.out.weight, std=.1)
    with pytest.raises(KeyboardInterrupt): run(learn, lambda o: o.fit(1, 1e-2))
    x, y = got['x'].as_subclass(torch.Tensor), got['y'].as_subclass(torch.Tensor)
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        m.recording = True
        y1 = m(x)
        i_map, *_ = m.interpret(m.take_sams(), x.shape[2:])
        y2 = m.cnn(m.mask(x, i_map))
    task = nn.functional.cross_entropy(y1.float(), y.long())
    close = partial(torch.testing.assert_close, rtol=.05, atol=1e-3) if bf16 else partial(torch.testing.assert_close, rtol=1e-4, atol=5e-6)
    for g, h in zip(got['cnn'], torch.autograd.grad(task, list(m.cnn.parameters()), retain_graph=True)): close(g, h)
    interpretation = ((y2.float() - y1.detach().float())**2).mean()
    for g, h in zip(got['w'], torch.autograd.grad(interpretation, list(m.weight_net.parameters()))): close(g, h)
    assert any(g.abs().max() > 0 for g in got['w'])


def test_frozen_cnn_costs_no_cnn_gradients():
    net = small_cnn()
    before = copy.deepcopy(net.state_dict())
    seen = []

    class Look(TwoPass):
        def after_step(self): seen.extend(p.grad for p in self.learn.model.cnn.parameters()); super().after_step()
    learn = Learner(scenes(), net, cbs=Look(eta=3, train_cnn=False))
    run(learn, lambda o: o.fit(2, 1e-2))
    assert seen and all(g is None for g in seen) and same(before, net.state_dict())
    assert learn.model.weight_net.out.weight.abs().max() > 0 and all(p.requires_grad for p in net.parameters())


# --- Invariants 7 and 8: other processes

@pytest.fixture(scope='module')
def start():
    "Start functions of `workers` as processes, forked from one that has imported what they need; whatever is left is killed."
    mp = torch.multiprocessing.get_context('forkserver' if hasattr(os, 'fork') else 'spawn')
    if hasattr(os, 'fork'): mp.set_forkserver_preload(['fastai.vision.all', 'fastai.distributed', 'antehoc_nb.train.two_pass'])
    started = []

    def _start(f, *args, **kwargs):
        p = mp.Process(target=f, args=args, kwargs=kwargs)
        p.start()
        started.append(p)
        return p
    yield _start
    for p in started:
        if p.is_alive(): p.kill()


def ended(*ps, code=0, seconds=240):
    for p in ps:
        p.join(seconds)
        assert p.exitcode == code, f'a process ended with {p.exitcode}'


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.mark.parametrize('n,bs,opt,mask,accumulate', [(32, 32, 'sgd', 'soft', 0), (64, 16, 'adam', 'top_area', 0), (64, 16, 'adamw', 'soft+top_area', 32)],
                         ids=['one-batch', 'many-batches', 'accumulated'])
def test_two_processes_train_as_one(start, tmp_path, n, bs, opt, mask, accumulate):
    "Invariant 7, through fastai's `distrib_ctx` on gloo."
    pytest.importorskip('accelerate')
    port, args = free_port(), (tmp_path, n, bs, opt, mask)
    ended(*[start(together, *args, accumulate//2, rank=r, world=2, port=port) for r in (0, 1)], start(together, *args, accumulate))
    one, a, b = (torch.load(tmp_path/f) for f in ('1-0.pt', '2-0.pt', '2-1.pt'))
    assert len(a['map_history']) == 4 and all(torch.equal(p, q) for p, q in zip(a['map_history'], b['map_history']))
    assert same(a['model'], b['model'])  # both processes hold the same weights, weight network included
    for k, v in one['model'].items(): torch.testing.assert_close(v, a['model'][k], atol=2e-5, rtol=1e-3, msg=lambda m, k=k: f'{k}: {m}')
    means = [(p + q)/2 for p, q in zip(a['int_losses'], b['int_losses'])]
    torch.testing.assert_close(torch.tensor(one['int_losses']), torch.tensor(means), atol=1e-5, rtol=1e-3)
    assert any(v.abs().max() > 0 for k, v in one['model'].items() if k == 'weight_net.out.weight')


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL here')
@pytest.mark.parametrize('opt', ['adam', 'adamw'])
def test_killed_run_ends_as_if_left_alone(start, tmp_path, opt):
    "Invariant 8: killed in the middle of an epoch, and killed half way through writing a checkpoint."
    folders = alone, epoch, write = [tmp_path/o for o in ('alone', 'epoch', 'write')]
    for f in folders: f.mkdir()
    p = start(checkpointed, alone, opt, checkpoint=False)
    q, r = start(checkpointed, epoch, opt, kill='epoch'), start(checkpointed, write, opt, kill='write')
    for _ in range(2400):
        if (epoch/'now').exists() or not q.is_alive(): break
        time.sleep(.1)
    os.kill(q.pid, signal.SIGKILL)
    ended(q, r, code=-signal.SIGKILL)
    assert not (epoch/'end.pt').exists() and not (write/'end.pt').exists()
    assert (write/'run.ckpt.part').exists()  # the torn file stands beside the good one
    for f in (epoch, write): assert torch.load(f/'run.ckpt', weights_only=True)['epoch'] == 1  # two epochs are safe
    ended(p, start(checkpointed, epoch, opt), start(checkpointed, write, opt))
    want = torch.load(alone/'end.pt')
    for f in (epoch, write):
        got = torch.load(f/'end.pt')
        assert same(want['model'], got['model'])
        assert torch.equal(want['next'], got['next'])  # what comes after the run is the same too
        for k in ('map_history', 'moments'): assert len(want[k]) == len(got[k]) > 0 and all(torch.equal(a, b) for a, b in zip(want[k], got[k])), k
        for k in ('int_losses', 'losses', 'values'): assert want[k] == got[k], k


def test_checkpoint_of_a_plain_learner(tmp_path):
    def trained(**kw):
        set_seed(7)
        learn = Learner(scenes(), small_cnn(), metrics=accuracy, **kw)
        return run(learn, lambda o: o.fit_one_cycle(3, 1e-2)).model.state_dict()

    class Plug(Checkpoint):
        def before_batch(self):
            if self.epoch == 1 and self.iter == 1: raise KeyboardInterrupt
    whole = trained()
    with pytest.raises(KeyboardInterrupt): trained(cbs=Plug(tmp_path/'c'))
    assert same(whole, trained(cbs=Checkpoint(tmp_path/'c')))


# --- CNNs with other inputs and outputs, trained

class TwoInputs(nn.Module):
    "An image and a number in, a dictionary out."
    def __init__(self):
        super().__init__()
        self.body, self.head = small_cnn(16), nn.Linear(17, 3)

    def forward(self, x, age): return dict(logits=self.head(torch.cat([self.body(x), age[:, None]], 1)), age=age.clone())


class TupleOut(nn.Module):
    "Logits and auxiliary logits in training, logits alone in evaluation; as GoogLeNet and Inception v3 do."
    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = small_cnn(16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        f = self.body(x)
        return (self.head(f), self.aux(f)) if self.training else self.head(f)


def any_loss(out, y):
    if isinstance(out, dict): out = out['logits']
    if isinstance(out, tuple): return nn.functional.cross_entropy(out[0], y) + .4*nn.functional.cross_entropy(out[1], y)
    return nn.functional.cross_entropy(out, y)


def table(*columns, bs=8, n_inp=1):
    from fastai.data.core import DataLoaders, TfmdDL
    from torch.utils.data import TensorDataset
    dls = DataLoaders(*[TfmdDL(TensorDataset(*columns), bs=bs, shuffle=s, num_workers=0, device='cpu') for s in (True, False)], device='cpu')
    for dl in dls.loaders: dl.dataset.n_inp = n_inp
    return dls


@pytest.mark.parametrize('kind', [TwoInputs, TupleOut])
def test_inputs_and_outputs_of_any_kind(kind):
    x, age, y = torch.rand(24, 3, 32, 32), torch.rand(24), torch.randint(0, 3, (24,))

    def trained(*cbs):
        set_seed(4)
        net = kind()
        dls = table(x, age, y, n_inp=2) if kind is TwoInputs else table(x, y)
        return net.state_dict(), run(Learner(dls, net, loss_func=any_loss, cbs=cbs), lambda o: o.fit(2, 1e-2))
    (a, _), (b, learn) = trained(), trained(TwoPass(eta=3))
    assert same(a, b) and len(learn.two_pass.int_losses) == 6
    assert learn.model.weight_net.out.weight.abs().max() > 0
    assert all(v == v for v in learn.recorder.values[-1])  # validation too
    e = learn.model.explain(x[:2], *([age[:2]] if kind is TwoInputs else []))
    assert e.map.shape == (2, 1, 32, 32)


@pytest.mark.parametrize('name,size', [('googlenet', 64), ('inception_v3', 96)])
def test_auxiliary_classifiers(name, size):
    "torchvision's own tuple outputs in training mode."
    import torchvision
    net = getattr(torchvision.models, name)(weights=None, num_classes=3, aux_logits=True, init_weights=False)

    class Aux(nn.Module): # the auxiliary classifier needs the big image's size; here a small one stands in
        def __init__(self, c): super().__init__(); self.lin = nn.Linear(c, 3)
        def forward(self, x): return self.lin(x.mean((2, 3)))
    for k in ('aux1', 'aux2', 'AuxLogits'):
        old = getattr(net, k, None)
        if old is not None: setattr(net, k, Aux((getattr(old, 'conv', None) or old.conv0).conv.in_channels))
    x, y = torch.rand(2, 3, size, size), torch.randint(0, 3, (2,))

    def loss(out, y): return sum(nn.functional.cross_entropy(o, y) for o in (out if isinstance(out, tuple) else [out]))
    learn = Learner(table(x, y, bs=2), net, loss_func=loss, cbs=TwoPass(eta=4))
    run(learn, lambda o: o.fit(1, 1e-3))
    assert isinstance(learn.model, AntehocModel) and learn.two_pass.int_losses[0] > 0
