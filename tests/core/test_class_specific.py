"""Class-specific and modulated maps: that they learn what they are for, and what they may depend on."""
import copy

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.schedule import fit_one_cycle  # noqa: F401
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn
from workers import scenes, small_cnn

import antehoc_nb.show.learner  # noqa: F401  gives Learner its explain and show_maps
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.data.captions import CaptionLoss
from antehoc_nb.evaluate.explainers import explain_with
from antehoc_nb.train.checkpoint import Checkpoint
from antehoc_nb.train.learner import Bf16, antehoc_learner
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')


def quiet_fit(learn, epochs, lr, one_cycle=True):
    with learn.no_bar(), learn.no_logging(): (learn.fit_one_cycle if one_cycle else learn.fit)(epochs, lr)
    return learn


def class_model(cnn=None, **kwargs):
    return AntehocModel(cnn or small_cnn(), torch.rand(2, 3, 32, 32), eta=3, **kwargs)


# --- Maps learn where their target is

RED, BLUE = 0, 1


def one_by_one(n_in, rgb):
    "A 1 x 1 convolution with given weights, and a ReLU."
    layer = nn.Sequential(nn.Conv2d(n_in, len(rgb), 1, bias=False), nn.ReLU())
    layer[0].weight.data = torch.tensor(rgb)[:, :, None, None]
    return layer


class RedOrBlue(nn.Module):
    "Class 0 is red, class 1 is blue, each with a layer of its own."
    def __init__(self):
        super().__init__()
        self.red = one_by_one(3, [[1., -1, -1]])
        self.blue = one_by_one(3, [[-1., -1, 1]])

    def forward(self, x): return 40 * torch.cat([self.red(x).mean((2, 3)), self.blue(x).mean((2, 3))], 1)


class RedAndBlue(RedOrBlue):
    "A captioner that predicts 'red' (4) for red and 'blue' (5) for blue, at every place of a caption."
    n_words = 6

    def forward(self, x, tokens):
        out = x.new_zeros(len(x), tokens.shape[1] - 1, 6)
        out[..., 4:] = super().forward(x)[:, None]
        return out

    def find_target(self, target, out, tokens=None):
        words = (tokens if target is None else target)[:, 1:]
        return words.masked_fill(words < 4, -1)


class Everywhere(nn.Module):
    "Two layers that respond to red and to blue alike, each in a channel of its own."
    def __init__(self):
        super().__init__()
        self.a = one_by_one(3, [[1., -1, -1], [-1., -1, 1]])
        self.b = one_by_one(2, [[1., 0], [0., 1]])

    def forward(self, x): return 40 * self.b(self.a(x)).mean((2, 3))


class Reddest(Everywhere):
    "Predicts the amount of red, one number, though both of its layers respond to blue alike."
    def forward(self, x): return super().forward(x)[:, :1]


def patches(n, seed=0):
    "Images (n,3,32,32) of a red and a blue patch on grey, one in each half; and whether the red one is on the left."
    generator = torch.Generator().manual_seed(seed)
    x, red_left = torch.full((n, 3, 32, 32), .2), torch.rand(n, generator=generator) < .5
    for i in range(n):
        for channel, left in ((0, red_left[i]), (2, not red_left[i])):
            row = torch.randint(0, 22, (1,), generator=generator).item()
            column = torch.randint(0, 6, (1,), generator=generator).item() + (0 if left else 16)
            x[i, :, row:row + 10, column:column + 10] = 0
            x[i, channel, row:row + 10, column:column + 10] = 1
    return x, red_left


def trained_on_patches(cnn, label, loss, epochs=3, n_inputs=1, **two_pass):
    "A model whose weight network has been trained on patches; `label` gives what follows each image in its item."
    x, _ = patches(256)
    items = [(image, *label(i)) for i, image in enumerate(x)]
    set_seed(0)
    dls = DataLoaders(DataLoader(items, bs=16, num_workers=0), DataLoader(items[:16], bs=16, num_workers=0))
    dls.n_inp = n_inputs
    learn = Learner(dls, cnn, loss_func=loss, cbs=TwoPass(train_cnn=False, **two_pass))
    return quiet_fit(learn, epochs, 2e-2).model


def share_of_map(model, colour, *inputs, **kwargs):
    "The share of the maps that lies in the half with the patch of a colour."
    x, red_left = patches(64, seed=1)
    i_map = model.explain(x, *inputs, **kwargs).map
    left = red_left if colour == RED else ~red_left
    half = left[:, None, None, None] == (torch.arange(32) < 16)
    return ((i_map * half).sum() / i_map.sum()).item()


def red_or_blue(i): return torch.tensor(i % 2),


def test_a_class_specific_map_lies_on_its_class():
    "A map for red lies on the red patch and a map for blue on the blue one; a class-agnostic map has to lie on both."
    share = {}
    for class_specific in (True, False):
        model = trained_on_patches(RedOrBlue(), red_or_blue, CrossEntropyLossFlat(), layers=['red.1', 'blue.1'],
                                   class_specific=class_specific, epochs=8)
        for colour in (RED, BLUE):
            target = dict(target=colour) if class_specific else {}
            share[class_specific, colour] = share_of_map(model, colour, **target)
    assert min(share[True, colour] for colour in (RED, BLUE)) > .8, share
    assert max(share[False, colour] for colour in (RED, BLUE)) < .7, share


@pytest.mark.slow
def test_the_map_of_a_word_lies_on_what_it_names():
    "Every caption is 'red blue'; with one of the words as target, the map lies on the patch of that colour."
    tokens = torch.tensor([2, 4, 5, 3])
    model = trained_on_patches(RedAndBlue(), lambda i: (tokens, tokens), CaptionLoss(), epochs=5, n_inputs=2,
                               layers=['red.1', 'blue.1'], class_specific=True, mask='soft+capped', keep_best=False)
    share = {}
    for colour, word in ((RED, 4), (BLUE, 5)):
        target = torch.tensor([[2, word, 3]]).expand(64, -1)
        share[colour] = share_of_map(model, colour, tokens.expand(64, -1), target=target)
    assert min(share.values()) > .8, share


@pytest.mark.slow
def test_what_no_choice_of_layers_can_show():
    "Both patches are bright in both layers: weights cannot separate them, maps modulated for a class can."
    share = {}
    for net, epochs in dict(auto=3, paper=1, scalars=1, mean=1).items():
        model = trained_on_patches(Everywhere(), red_or_blue, CrossEntropyLossFlat(), layers=['a.1', 'b.1'],
                                   weight_net=net, epochs=epochs)
        for colour in (RED, BLUE):
            target = dict(target=colour) if net == 'auto' else {}
            share[net, colour] = share_of_map(model, colour, **target)
    assert min(share['auto', colour] for colour in (RED, BLUE)) > .7, share
    assert max(share[net, colour] for net in ('paper', 'scalars', 'mean') for colour in (RED, BLUE)) < .65, share


@pytest.mark.slow
def test_a_modulated_map_leaves_out_what_does_not_count():
    "The blue patch is as bright in both layers as the red one, but does not count. Only a modulated map can darken it."
    share = {}
    for net in ('auto', 'paper'):
        model = trained_on_patches(Reddest(), lambda i: (torch.zeros(1),), nn.MSELoss(), layers=['a.1', 'b.1'],
                                   weight_net=net)
        share[net] = share_of_map(model, RED)
    assert share['auto'] > .75 and share['paper'] < .6, share


# --- Training

def test_masks_and_losses_that_go_with_a_weight_network():
    "Unless another mask is given."
    def loader():
        items = [(torch.rand(3, 32, 32), torch.tensor(i % 10)) for i in range(4)]
        return DataLoader(items, bs=2, num_workers=0)

    def learner(model, callback):
        return Learner(DataLoaders(loader(), loader()), model, loss_func=CrossEntropyLossFlat(), cbs=callback)
    def mask(**kwargs): return learner(small_cnn(), TwoPass(eta=2, **kwargs)).two_pass.mask

    assert [mask(weight_net=net) for net in ('auto', 'paper', 'scalars')] == ['soft+capped+threshold', 'soft', 'soft']
    assert mask(class_specific=False) == 'soft+capped+threshold' and mask(mask='soft+capped') == 'soft+capped'
    callback = TwoPass()  # goes from a learner of one network to one of another
    for settings, expected in ((dict(), ('soft+capped+threshold', 'cross_entropy')),
                               (dict(class_specific=False), ('soft+capped+threshold', 'mse')),
                               (dict(weight_net='paper'), ('soft', 'mse'))):
        learner(AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), eta=2, **settings), callback)
        assert (callback.mask, callback.int_loss) == expected


def test_another_model_on_the_same_callback():
    "The loss follows the weight network, unless it was given."
    learn = antehoc_learner(scenes(32), small_cnn(), eta=3, weight_net='paper')
    assert learn.two_pass.int_loss == 'mse'
    learn.model = class_model()
    learn.two_pass.model_kwargs = {}
    quiet_fit(learn, 1, 1e-3, one_cycle=False)
    assert learn.two_pass.int_loss == 'cross_entropy'


@pytest.mark.parametrize('labels', [lambda y: y.float(), lambda y: F.one_hot(y, 10).float()],
                         ids=['regression', 'several numbers'])
def test_labels_that_are_not_one_class_per_image(labels):
    x, y = torch.rand(8, 3, 32, 32), labels(torch.arange(8))
    dl = DataLoader(list(zip(x, y)), bs=4, num_workers=0)
    loss = nn.MSELoss() if y.ndim == 2 else lambda p, t: F.mse_loss(p[:, 0], t)
    learn = Learner(DataLoaders(dl, dl), small_cnn(), loss_func=loss, cbs=TwoPass(eta=3, class_specific=True))
    with pytest.raises(ValueError, match='trained with one class per image: labels must be class numbers'):
        quiet_fit(learn, 1, None, one_cycle=False)
    learn = Learner(DataLoaders(dl, dl), small_cnn(), loss_func=loss, cbs=TwoPass(eta=3))  # by default
    assert not learn.model.class_specific
    quiet_fit(learn, 1, None, one_cycle=False)


@pytest.mark.slow
@pytest.mark.parametrize('cbs, class_specific', [
    pytest.param([Bf16()], True, id='bf16-True'),
    pytest.param([GradientAccumulation(64)], False, id='accumulation-False'),
    pytest.param([Bf16()], False, id='bf16-False', marks=pytest.mark.slow),
    pytest.param([GradientAccumulation(64)], True, id='accumulation-True', marks=pytest.mark.slow)])
def test_training_in_half_precision_and_in_parts(cbs, class_specific):
    learn = antehoc_learner(scenes(64), small_cnn(), eta=3, class_specific=class_specific, cbs=cbs)
    quiet_fit(learn, 2, 1e-3, one_cycle=False)
    assert learn.model.weight_net.autoencoder.out.weight.abs().max() > 0
    assert all(p.isfinite().all() for p in learn.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('class_specific', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resumed_run_gets_the_same_targets(tmp_path, class_specific):
    "Interrupted and resumed, the weights end the same to the bit."
    def run(*cbs):
        set_seed(0)
        learn = antehoc_learner(scenes(64), small_cnn(), eta=3, class_specific=class_specific, cbs=cbs)
        return quiet_fit(learn, 3, 1e-2).model.state_dict()

    class Cut(Callback):
        order = 90
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 1: raise KeyboardInterrupt
    whole = run()
    with pytest.raises(KeyboardInterrupt): run(Checkpoint(tmp_path/'c'), Cut())
    torch.randn(99)
    again = run(Checkpoint(tmp_path/'c'))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


# --- Explaining

def test_one_forward_pass_whatever_the_target():
    calls, cnn = [], small_cnn()
    cnn.register_forward_hook(lambda *args: calls.append(1))
    model = class_model(cnn)
    nn.init.normal_(model.weight_net.autoencoder.out.weight)
    calls.clear()
    x = torch.rand(3, 3, 32, 32)
    e = model.explain(x)
    assert len(calls) == 1 and torch.equal(e.target, e.pred.argmax(1))
    torch.testing.assert_close(explain_with('ante-hoc', model, x, e.target), e.map)
    torch.testing.assert_close(explain_with('ante-hoc', model, x), e.map)  # by default what is predicted
    other = explain_with('ante-hoc', model, x, (e.target + 1) % 10)
    assert (other - e.map).abs().max() > 1e-3
    assert len(e.cpu().target) == 3 and e[1].target.tolist() == e.target[1:2].tolist()


def test_names_of_classes():
    x = torch.rand(2, 3, 32, 32)
    model = class_model(meta=dict(vocab=list('abcdefghij')))
    assert model.explain(x, target='c').target.tolist() == [2, 2]
    assert model.explain(x, target=['j', 'a']).target.tolist() == [9, 0]
    with pytest.raises(ValueError, match="unknown class 'k'"): model.explain(x, target='k')
    few = class_model()
    few.meta['vocab'] = ['a', 'b']  # as of a learner whose CNN has more outputs than classes
    assert few.explain(x, target=9).target.tolist() == [9, 9]
    with pytest.raises(ValueError, match='lie in 0..9 for this model, got 10'): few.explain(x, target=10)
    with pytest.raises(ValueError, match="target='c': this model has no class names; give numbers"):
        class_model().explain(x, target='c')


def test_a_learner_takes_targets_by_name():
    "By the names of its own DataLoaders. The titles tell the target."
    learn = antehoc_learner(scenes(32), small_cnn(), eta=3)
    nn.init.normal_(learn.model.weight_net.autoencoder.out.weight)
    e = learn.explain(n=4, target='7')
    assert e.target.tolist() == [7] * 4 and torch.equal(e.map, learn.explain(n=4, target=[7] * 4).map)
    assert (e.map - learn.explain(n=4).map).abs().max() > 1e-3
    titles = [ax.get_title(side) for ax in learn.show_maps(n=4, target='7').flat for side in ('left', 'center')]
    assert sum(title.endswith(' 7') for title in titles) == 4, titles
    with pytest.raises(ValueError, match="unknown class 'seven'"): learn.explain(n=4, target='seven')


@pytest.mark.filterwarnings('ignore:save_pretrained')
def test_a_model_goes_through_files_and_copies(tmp_path):
    model = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), eta=3)
    nn.init.normal_(model.weight_net.autoencoder.out.weight)
    x = torch.rand(2, 3, 32, 32)
    i_map = model.eval().explain(x, target=4).map
    assert model.config['classes'] == 10
    with pytest.raises(ValueError, match='interpret: the map is class-specific, give target'):
        model.interpret([], (32, 32))
    loaded = AntehocModel.from_pretrained(model.save_pretrained(tmp_path/'m'), cnn=small_cnn())
    for other in (loaded, copy.deepcopy(model)): assert torch.equal(other.explain(x, target=4).map, i_map)


def test_models_that_cannot_be_class_specific():
    x = torch.rand(2, 3, 32, 32)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r'CNN that gives logits \(B,K\), K > 1; this one gives \(2, 4, 28, 28\)'):
        AntehocModel(dense, x, eta=2, class_specific=True)
    assert not AntehocModel(dense, x, eta=2).class_specific
    without_sample = dict(sample=False, layers=['0'])
    message = "weight_net='auto' has to know the channels: give channels=, or a sample"
    with pytest.raises(ValueError, match=message):
        AntehocModel(small_cnn(), **without_sample)
    assert not AntehocModel(small_cnn(), **without_sample, channels=[8]).class_specific
    with pytest.raises(ValueError, match="int_loss='mse' .* cannot train a class-specific map .weight_net='auto'"):
        antehoc_learner(scenes(32), small_cnn(), eta=3, int_loss='mse')
