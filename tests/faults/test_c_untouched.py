"""A network that writes when it runs, or is watched, is as in plain training, to the bit."""
import random
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.hook import ActivationStats
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from antehoc_nb.core.interpretation_loss import two_pass_step
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import eval_mode, frozen, hooks_observed, own_sizes, weights_digest
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')
X, Y = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class ScaledAtFirst(nn.Module):
    "Sets its scale from the first images it gets."
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self.register_buffer('initialised', torch.tensor(False))

    def forward(self, x):
        if not self.initialised:
            self.scale.data.copy_(1 / x.std())
            self.initialised.fill_(True)
        return x * self.scale


class Counting(nn.Module):
    "Counts its training batches in an attribute that is no buffer."
    n = 0

    def forward(self, x):
        self.n += self.training
        return x


class NoCopy(ScaledAtFirst):
    def __deepcopy__(self, memo): raise TypeError('this module holds what cannot be copied')


def trained(network, cbs, epochs=2):
    dls = DataLoaders(DataLoader(TensorDataset(X, Y), 4), DataLoader(TensorDataset(X, Y), 4))
    learn = Learner(dls, network, loss_func=nn.CrossEntropyLoss(), cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2)
    return learn


@pytest.mark.parametrize('kind', [ScaledAtFirst, Counting, nn.Identity])
def test_training_of_modules_that_write(cnn, kind):
    start = nn.Sequential(kind(), *cnn())
    plain, explained = deepcopy(start), deepcopy(start)
    trained(plain, [])
    trained(explained, [TwoPass(eta=2)])
    assert weights_digest(plain) == weights_digest(explained)
    if kind is Counting: assert plain[0].n == explained[0].n == 4


@pytest.mark.parametrize('kind', [ScaledAtFirst, NoCopy])
@pytest.mark.parametrize('sample', [None, X[:2]])
def test_making_a_model_changes_nothing(cnn, kind, sample):
    network = nn.Sequential(kind(), *cnn())
    before = weights_digest(network)
    AntehocModel(network, sample)
    assert weights_digest(network) == before and not network[0].initialised
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize('modules', [None, 'all'])
def test_activation_stats_of_fastai(cnn, modules):
    def stats(cbs):
        network = cnn()
        watched = [network[1][2], network[2][2]] if modules is None else list(network.modules())[1:]
        callback = ActivationStats(modules=watched, with_hist=True)
        trained(network, [callback, *cbs])
        return callback.stats
    plain, explained = stats([]), stats([TwoPass(eta=2)])
    assert len(plain) == len(explained) == 4
    for of_plain, of_explained in zip(plain, explained):
        for a, b in zip(of_plain, of_explained):
            assert (a is None) == (b is None)
            if a is None: continue
            assert a['mean'] == b['mean'] and a['std'] == b['std'] and torch.equal(a['hist'], b['hist'])


def test_hooks_of_ones_own_in_a_plain_loop(cnn):
    network, means, calls = cnn(), [], []
    def note(module, args, output): means.append(output.mean().item())
    network[0].register_forward_hook(note)
    network[1].register_forward_hook(lambda module, args, output: calls.append(1))
    network[2].register_forward_hook(lambda module, args, output: output * 2)
    model = AntehocModel(network, X).train()
    assert not means and not calls
    out, loss = two_pass_step(model, X, Y, number=0)
    (nn.functional.cross_entropy(out, Y) + loss).backward()
    assert len(means) == len(calls) == 1
    with frozen(network): again = network(X)
    assert len(means) == 1 and len(network[0]._forward_hooks) == 1
    with eval_mode(network): expected = network(X)
    assert torch.equal(again, expected) and len(means) == 2  # the hook that doubles was called both times


def test_a_hook_that_cannot_be_copied(cnn):
    class Holder:
        def __deepcopy__(self, memo): raise AssertionError('copied')
        def hook(self, module, args, output): self.seen = output
    network, holder = cnn(), Holder()
    network[0].register_forward_hook(holder.hook)
    assert AntehocModel(network, X).eta == 3 and not hasattr(holder, 'seen')


@pytest.mark.parametrize('name, size', [('levit_128s', 224), ('tiny_vit_5m_224', 224), ('efficientformer_l1', 224)])
@pytest.mark.slow
def test_tables_kept_in_evaluation_mode_are_not_stale(name, size):
    "Attention biases are cached in evaluation mode; a step of training empties the cache."
    timm = pytest.importorskip('timm')
    network = timm.create_model(name, num_classes=3).train()
    images = torch.rand(1, 3, size, size)
    with frozen(network): before = network(images)
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if 'attention_biases' in parameter_name: parameter.normal_()
    with frozen(network): after = network(images)
    with torch.no_grad(): expected = network.eval()(images)
    first = (lambda out: out[0] if isinstance(out, tuple) else out)
    assert torch.equal(first(after), first(expected)) and not torch.equal(first(after), first(before))


class OneSize(nn.Module):
    "Takes images of one size, as a ViT, and says so."
    def __init__(self, cnn, size, said):
        super().__init__()
        self.cnn, self.size = cnn, size
        for name, value in said.items(): setattr(self, name, value)

    def forward(self, x):
        assert x.shape[2:] == self.size, 'wrong size'
        return self.cnn(x)


class Config:
    image_size = 40


@pytest.mark.parametrize('said', [dict(img_size=(40, 40)), dict(image_size=40), dict(config=Config()),
                                  dict(pretrained_cfg=dict(input_size=(3, 40, 40))),
                                  dict(default_cfg=dict(input_size=(3, 40, 40)))])
def test_the_own_size_of_a_network(cnn, said):
    network = OneSize(cnn(), (40, 40), said)
    assert own_sizes(network) == [(40, 40)]
    assert AntehocModel(network).explain(torch.rand(1, 3, 40, 40)).map.shape == (1, 1, 40, 40)
    with pytest.raises(ValueError) as error: AntehocModel(network, X)
    assert str(error.value) == ('sample: the CNN, which was made for 40 x 40, does not take images of 32 x 32 (wrong '
                                'size); give images of another size, or build the CNN for this one (timm: '
                                'create_model(name, img_size=32))')


def test_a_size_that_is_said_but_wrong(cnn):
    network = OneSize(cnn(), (128, 128), dict(img_size=(64, 64)))
    assert AntehocModel(network).eta == 3


# --- Hooks that the network itself reads

class Skipping(nn.Module):
    "Adds to its output what a hook has stored, in one of the ways that a hook can reach it"
    def __init__(self, way):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)
        self.stored = stored = {}

        def in_closure(module, args, output): stored.update(out=output)

        def with_argument(kept, module, args, output): kept.update(out=output)
        hooks = dict(closure=in_closure, partial=partial(with_argument, stored), method=self.keep,
                     other=Keeper(stored).keep)
        if way == 'other': self.keepers = [hooks['other'].__self__]
        self.first.register_forward_hook(hooks[way])

    def keep(self, module, args, output): self.stored.update(out=output)

    def forward(self, x):
        out = self.second(self.first(x).relu()).relu() + self.stored['out']
        return self.head(out.mean((2, 3)))


class Keeper:
    def __init__(self, stored): self.stored = stored
    def keep(self, module, args, output): self.stored.update(out=output)


@pytest.mark.parametrize('way', ['closure', 'partial', 'method', 'other'])
def test_hooks_that_the_network_reads_are_called(way):
    "Without them, pass 2 would read what pass 1 has left."
    torch.manual_seed(0)
    cnn, x = Skipping(way), torch.rand(2, 3, 16, 16)
    model = AntehocModel(cnn, x, eta=2)  # before it ever ran
    expected = cnn(x).detach()
    cnn(torch.rand(1, 3, 16, 16))
    with frozen(cnn): assert torch.equal(cnn(x), expected)
    assert torch.equal(model.explain(x).pred, expected)


# --- What is written in evaluation mode too

class CountsCalls(nn.Module):
    "Counts its calls in any mode, in a buffer and in an attribute, and remembers the last image."
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.zeros(()))
        self.calls, self.last = 0, None

    def forward(self, x):
        self.n += 1
        self.calls += 1
        if self.last is not None and self.last.shape == x.shape: x = x + .1 * self.last
        self.last = x.detach()
        return x + .01 * self.n + .01 * self.calls


class ReplacesBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(()))

    def forward(self, x):
        self.mean = .9 * self.mean + .1 * x.detach().mean()
        return x - self.mean


class ShortWeights(nn.Conv2d):
    "Limits the length of its weights at every call, as EEGNet does."
    def __init__(self): super().__init__(3, 3, 1)

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, .3)
        return super().forward(x) * (self.weight.sum() + 1)


class AlwaysTraining(nn.BatchNorm2d):
    def __init__(self): super().__init__(3)
    def train(self, mode=True): return super().train(True)


class Draws(nn.Module):
    "Draws from other streams than torch's, also in evaluation mode."
    def __init__(self):
        super().__init__()
        self.streams = None
        self.own, self.of_numpy = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def forward(self, x):
        noise = random.random() + np.random.rand() + self.of_numpy.random()
        return x + .01 * noise + .01 * torch.randn(x.shape, generator=self.own)


def numbers(network): return [v for k, v in vars(network[0]).items() if isinstance(v, (int, float))]


@pytest.mark.parametrize('kind', [CountsCalls, ReplacesBuffer, ShortWeights, AlwaysTraining, Draws])
def test_training_of_modules_that_write_in_evaluation_mode(cnn, kind):
    outcomes = []
    for cbs in ([], [TwoPass(eta=2)]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        network = nn.Sequential(kind(), *cnn())
        trained(network, cbs, 1)
        state = [numbers(network), random.random(), np.random.rand(), torch.rand(1).item()]
        outcomes.append((weights_digest(network), state))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize('kind', [CountsCalls, ReplacesBuffer, ShortWeights, AlwaysTraining])
@pytest.mark.parametrize('copied', [True, False])
def test_a_block_of_threads_puts_back_once(cnn, kind, copied):
    class NotCopied(kind):
        def __deepcopy__(self, memo): raise TypeError('no copy')
    network = nn.Sequential((kind if copied else NotCopied)(), *cnn())
    before, of_before = weights_digest(network), numbers(network)
    model = AntehocModel(network, X[:2], eta=2)
    assert weights_digest(network) == before and numbers(network) == of_before
    with frozen(network):
        with frozen(network): network(X)
        network(X)
    with pytest.raises(ZeroDivisionError), frozen(model): model(X) / (1 // 0)
    assert weights_digest(network) == before and numbers(network) == of_before


@pytest.mark.parametrize('norm', [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm,
                                  nn.utils.parametrizations.orthogonal,
                                  lambda layer: prune.l1_unstructured(layer, 'weight', .5)])
def test_weights_that_are_computed_when_read(cnn, norm):
    "In training mode, to read the weight of a spectral norm moves its vectors."
    found = []
    for cbs in ([], [TwoPass(eta=2)]):
        torch.manual_seed(0)
        network = cnn().train()
        norm(network[0][0])
        before = weights_digest(network)
        if cbs:
            model = AntehocModel(network, X[:2], eta=2)
            assert weights_digest(network) == before and network.training
            assert torch.equal(model.explain(X).pred, network.eval()(X)) and weights_digest(network) == before
            network.train()
        trained(network, cbs, 1)
        found.append(weights_digest(network))
    assert found[0] == found[1]


class InPlace(nn.Module):
    "Normalises the batch that it is given."
    got = []  # of the class, so that it is not put back

    def forward(self, x):
        self.got.append(x.detach().clone())
        return x.mul_(2).sub_(1)


@pytest.mark.parametrize('loaded', [False, True])
def test_networks_that_write_to_their_images(cnn, tmp_path, loaded):
    network, x = nn.Sequential(InPlace(), *cnn()), X.clone()
    model = AntehocModel(network, x, eta=2)
    if loaded:
        with pytest.warns(UserWarning, match='by name'): model.save_pretrained(tmp_path)
        model = AntehocModel.from_pretrained(tmp_path, cnn=network)
    assert torch.equal(model.explain(x).map, model.explain(x).map) and torch.equal(x, X)
    network[0].got.clear()
    two_pass_step(model.train(), x, Y, number=0, fill='mean')
    assert torch.equal(x, X * 2 - 1) and torch.equal(network[0].got[0], X)  # as by a plain forward pass
    assert network[0].got[-1].min() >= 0  # pass 2 masks the images as they were


def hook_counts(cbs, cnn):
    network, notes = cnn(), {}
    def note(kind): return lambda *args: notes.setdefault(kind, []).append(len(args))
    network[1].register_forward_hook(note('forward'))
    network[1].register_forward_hook(note('with keywords'), with_kwargs=True)
    network[1].register_forward_pre_hook(note('before'))
    network[1].register_full_backward_hook(note('backward'))
    network[1].register_full_backward_pre_hook(note('before backward'))
    network[0][0].weight.register_hook(lambda gradient: notes.setdefault('weight', []).append(0))
    trained(network, cbs, 1)
    return notes


def test_hooks_of_every_kind(cnn):
    plain, explained = hook_counts([], cnn), hook_counts([TwoPass(eta=2)], cnn)
    assert plain == explained and len(plain) == 6


SEEN_AS = 'seen',


def in_place(module, args, output): output[:, 1] = 0
def in_place_of_tuple(module, args, output): args[0][..., 0] *= 0
def alias(module, args, output):
    out = output
    out += 1
def on_module(module, args, output): module.seen = output
def by_name(module, args, output): setattr(module, *SEEN_AS, output)


SEEN = {}
def into_dict(module, args, output): SEEN['mean'] = output.mean().item()
def summed(module, args, output): SEEN['n'] = SEEN.get('n', 0) + len(output)


@pytest.mark.parametrize('hook, watches', [(in_place, False), (in_place_of_tuple, False), (alias, False),
                                           (on_module, False), (by_name, False), (into_dict, True), (summed, True)])
def test_hooks_that_write_are_called(cnn, hook, watches):
    "Seen in pass 1, here under `hooks_observed`."
    def fresh(*args): return hook(*args)
    network = cnn()
    network[1].register_forward_hook(fresh)
    AntehocModel(network, X, eta=2)
    with hooks_observed(network), torch.no_grad(): expected = network(X)
    assert hasattr(fresh, 'always_called') != watches
    seen = getattr(network[1], 'seen', None)
    SEEN.clear()
    with frozen(network), torch.no_grad(): assert torch.equal(network(X), expected)
    assert not SEEN and getattr(network[1], 'seen', None) is seen
