"""What fastai users do before, between and after fits, and what goes wrong half-way."""
import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from workers import OPTS, bare_cnn, halves, run, same, scenes, small_cnn

from antehoc_nb.core.model import AntehocModel
from antehoc_nb.data.photo_digits import photo_digits_dls
from antehoc_nb.train.checkpoint import Checkpoint
from antehoc_nb.train.learner import antehoc_learner
from antehoc_nb.train.two_pass import TwoPass, antehoc_splitter

pytestmark = pytest.mark.usefixtures('one_thread')


def state(model): return copy.deepcopy(model.state_dict())


def digits(n_train=64, n_valid=16, bs=32): return photo_digits_dls(n_train=n_train, n_valid=n_valid, size=32, bs=bs)


def fit(learn, epochs=1, **kwargs): return run(learn, lambda learn: learn.fit(epochs, 1e-2, **kwargs))


def test_validating_leaves_the_history_alone(tmp_path):
    learn = Learner(digits(), small_cnn(), metrics=accuracy, path=tmp_path, cbs=TwoPass(eta=3, keep_maps=2))
    fit(learn, 2)
    losses = list(learn.two_pass.int_losses)
    assert len(learn.two_pass.map_history) == 3 and len(losses) == 4
    image = learn.dls.valid_ds[0][0]
    with learn.no_bar(), learn.no_logging():
        want = learn.predict(image)[2]
        learn.validate()
        learn.get_preds()
    assert learn.two_pass.int_losses == losses and len(learn.two_pass.map_history) == 3
    learn.export('l.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'l.pkl')
    with loaded.no_bar(): assert torch.equal(loaded.predict(image)[2], want)


class Subclass(TwoPass):
    "Counts the events that reach it."
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.events = []

    def after_pred(self):
        self.events.append('after_pred')
        super().after_pred()

    def before_step(self):
        self.events.append('before_step')
        super().before_step()


def test_subclasses_keep_name_events_and_pickle_small():
    learn = fit(Learner(digits(), small_cnn(), cbs=Subclass(eta=3, keep_maps=2)))
    two_pass = learn.two_pass
    assert type(two_pass) is Subclass and two_pass.events == ['after_pred', 'before_step'] * 2 + ['after_pred']
    assert len(two_pass.int_losses) == 2 and len(two_pass.map_history) == 2
    learn.remove_cb(two_pass)
    loaded = pickle.loads(pickle.dumps(two_pass))
    assert loaded.int_losses == two_pass.int_losses and loaded.events == two_pass.events
    assert loaded.map_history == [] and loaded.map_images is None and loaded._pending_gradients is None


@pytest.mark.parametrize('opt', ['adam', 'adamw'])
@pytest.mark.parametrize('late', ['add_cb', 'fit'])
def test_joins_a_trained_learner_and_trains_the_weight_network_alone(opt, late):
    set_seed(0)
    learn = Learner(digits(), small_cnn(), splitter=halves, opt_func=OPTS[opt])
    run(learn, lambda learn: learn.fit(1, slice(1e-3, 1e-2)))
    net, two_pass = learn.model, TwoPass(eta=3, train_cnn=False, keep_best=False)
    before = state(net)
    if late == 'add_cb': learn.add_cb(two_pass)
    cbs = two_pass if late == 'fit' else None
    run(learn, lambda learn: learn.fit_one_cycle(1, slice(1e-3, 1e-2), cbs=cbs))
    assert same(before, net.state_dict()) and learn.model.weight_net.autoencoder.out.weight.abs().max() > 0
    assert isinstance(learn.opt, OptimWrapper) == (opt == 'adamw') and len(learn.opt.hypers) == 2
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.slow
def test_one_two_pass_after_another():
    set_seed(0)
    learn = Learner(digits(), small_cnn())

    def valid_int_loss(): return learn.recorder.values[-1][learn.recorder.metric_names.index('valid_int_loss') - 1]
    fit(learn, cbs=TwoPass(eta=3))
    first = valid_int_loss()
    fit(learn, cbs=TwoPass())
    assert first > 0 and valid_int_loss() not in (first, None) and len(learn.metrics) == 4
    cnn, weight_net = state(learn.model.cnn), state(learn.model.weight_net)
    fit(learn, cbs=TwoPass(train_cnn=False, keep_best=False))
    assert same(cnn, learn.model.cnn.state_dict()) and not same(weight_net, learn.model.weight_net.state_dict())
    fit(learn)
    assert np.isnan(valid_int_loss()) and not same(cnn, learn.model.cnn.state_dict())
    with pytest.raises(ValueError, match='two TwoPass callbacks on one learner'): fit(learn, cbs=[TwoPass(), TwoPass()])


def test_the_splitter_of_a_cnn_without_trainable_parameters():
    net = small_cnn()
    model = AntehocModel(net, torch.rand(2, 3, 32, 32), eta=3)
    for p in net.parameters(): p.requires_grad_(False)
    assert antehoc_splitter(model, train_cnn=False) == [list(model.weight_net.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize('train_cnn', [True, False])
def test_interrupted_and_started_again(train_cnn):
    class Interrupt(TwoPass):
        def after_pred(self):
            super().after_pred()
            if self.training and self.iter == 1: raise KeyboardInterrupt
    set_seed(0)
    learn = Learner(digits(), small_cnn())
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Interrupt(eta=3, train_cnn=train_cnn))
    assert all(p.requires_grad for p in learn.model.parameters())
    learn.model(torch.rand(2, 3, 32, 32))
    assert learn.model.take_recorded() is None
    fit(learn, cbs=TwoPass(train_cnn=train_cnn))
    assert all(p.requires_grad for p in learn.model.parameters())


class Recomputing(nn.Module):
    "Half of it is computed again in the backward pass, to save memory."
    def __init__(self):
        super().__init__()
        net = small_cnn()
        self.stem = net[:2]
        self.rest = net[2:]

    def forward(self, x): return self.rest(checkpoint(self.stem, x, use_reentrant=False))


class AlwaysDropping(nn.Module):
    "Draws random numbers in evaluation mode too."
    def __init__(self):
        super().__init__()
        self.body = small_cnn(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x): return self.head(nn.functional.dropout(self.body(x), .5))


@pytest.mark.slow
@pytest.mark.parametrize('kind', [Recomputing, AlwaysDropping])
def test_unusual_cnns_are_left_alone_too(kind):
    def trained(*cbs):
        set_seed(3)
        net = kind()
        start = state(net)
        learn = fit(Learner(scenes(n=64), net, metrics=accuracy, cbs=cbs), 2)
        return start, learn, state(net)
    (_, _, plain), (start, learn, ours) = trained(), trained(TwoPass(eta=2, keep_maps=2, keep_best=False))
    assert same(plain, ours) and not same(start, ours) and learn.model.weight_net.autoencoder.out.weight.abs().max() > 0


def test_a_model_made_by_hand_learns_the_normalisation():
    net = bare_cnn()
    learn = antehoc_learner(digits(), AntehocModel(net, torch.rand(2, 3, 32, 32), eta=2))
    model = learn.model
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([.485, .456, .406]))
    assert model.meta['size'] == [32, 32] and model.meta['vocab'] == list('0123456789')
    black = model.mask(torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)) * model.std + model.mean
    torch.testing.assert_close(black, torch.zeros(1, 3, 32, 32), atol=1e-6, rtol=0)
    fit(learn)
    other = AntehocModel(net, torch.rand(2, 3, 32, 32), eta=2, mean=[.5]*3, std=[.5]*3)
    with pytest.raises(ValueError, match='the DataLoaders normalise with mean .* give both the same'):
        antehoc_learner(digits(), other)
    with pytest.raises(ValueError, match='eta: the learner already has an AntehocModel'):
        antehoc_learner(digits(), other, eta=3)


def test_bad_fill_is_refused_before_training():
    with pytest.raises(ValueError, match="unknown fill 'green'"): TwoPass(fill='green')
    with pytest.raises(ValueError, match='a colour must lie in'): TwoPass(fill=[0, 2, 0])
    with pytest.raises(ValueError, match='give one number, or one for each of the 3 channels'):
        antehoc_learner(digits(), small_cnn(), eta=3, fill=[.1, .2])


def test_a_spoilt_model_is_not_called_good():
    class BadGradient(TwoPass):
        def after_backward(self):
            super().after_backward()
            if self.iter == 0: next(self.learn.model.cnn.parameters()).grad.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='batch 1.*an earlier step has spoilt the weights'):
        fit(Learner(digits(), small_cnn(), cbs=BadGradient(eta=3)))


def test_the_mean_loss_counts_images():
    class Fixed(TwoPass):
        def _second_pass(self, mask): return torch.tensor(float(len(self.x)))
    learn = Learner(digits(n_valid=40), small_cnn(), cbs=Fixed(eta=3, train_cnn=False))
    for p in learn.model.weight_net.parameters(): p.requires_grad_(False)
    run(learn, lambda learn: learn.validate())
    assert learn.two_pass.mean_int_loss('valid') == (32*32 + 8*8) / 40


def test_starting_at_a_later_epoch(tmp_path):
    learn = Learner(digits(), small_cnn(), cbs=[TwoPass(keep_maps=2), Checkpoint(tmp_path/'c')])
    fit(learn, 3, start_epoch=1)
    assert len(learn.two_pass.map_history) == 3 and len(learn.two_pass.int_losses) == 4
    assert torch.load(tmp_path/'c', weights_only=True)['fit'] == 0


@pytest.mark.slow
def test_joining_late_is_the_same_weight_network():
    def trained(late):
        set_seed(0)
        learn = Learner(digits(), small_cnn(), cbs=[] if late else TwoPass())
        learn.create_opt()
        if late: learn.add_cb(TwoPass())
        model = fit(learn, 2).model
        flags = [(name, learn.opt.state[weight].get('do_wd'), learn.opt.state[weight].get('force_train'))
                 for name, weight in model.weight_net.named_parameters()]
        return flags, model.state_dict()
    (flags, at_once), (late_flags, later) = trained(False), trained(True)
    assert flags == late_flags and {decays for _, decays, _ in flags} == {None, False}
    assert {name for name, _, kept in flags if kept} == {f'image_embedding.0.{name}' for name in ('weight', 'bias')}
    assert same(at_once, later)


def test_a_model_that_knows_its_normalisation_still_learns_its_size():
    mean, std = [.485, .456, .406], [.229, .224, .225]
    model = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), mean=mean, std=std)
    learn = Learner(digits(), model, cbs=TwoPass())
    assert learn.model.meta['size'] == [32, 32] and learn.model.eta == 3


def error_of(f):
    try: f()
    except (TypeError, ValueError) as e: return f'{type(e).__name__}: {str(e).split(chr(10) + chr(9))[-1]}'


def test_what_is_taken_for_a_learner_by_mistake(tmp_path):
    dls = digits()
    for wrong, kind in ((str(tmp_path), 'str'), (tmp_path, type(tmp_path).__name__), ('resnet18', 'str'),
                        (small_cnn(), 'Sequential')):
        assert error_of(lambda wrong=wrong: antehoc_learner(wrong, 'small_cnn')) == (
            f'TypeError: dls: a {kind} is no DataLoaders; make them first, as by '
            'ImageDataLoaders.from_folder(path, valid_pct=0.2, item_tfms=Resize(128))')
    no_network = ('is a {} and no network; give Learner(dls, cnn, cbs=TwoPass()) an nn.Module, or use '
                  'vision_learner(dls, arch, cbs=TwoPass())')
    for wrong, name in (small_cnn, 'small_cnn'), ('resnet18', "'resnet18'"):
        assert error_of(lambda wrong=wrong: Learner(dls, wrong, opt_func=None, cbs=TwoPass())) == (
            f'TypeError: the model of the learner, {name}, {no_network.format(type(wrong).__name__)}')
    for cbs in (TwoPass(), [TwoPass(eta=2)]):
        assert error_of(lambda cbs=cbs: antehoc_learner(dls, 'small_cnn', cbs=cbs)) == (
            'ValueError: two TwoPass callbacks on one learner (antehoc_learner brings one): leave one out, or '
            'learn.remove_cb(TwoPass)')


def test_a_learner_over_image_files_is_exported_and_loaded(tmp_path):
    "The transforms of fastai's factory methods are pickled too, which some versions of plum-dispatch do not allow."
    for i in range(12):
        file = tmp_path/'images'/'ab'[i % 2]/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    dls = ImageDataLoaders.from_folder(tmp_path/'images', valid_pct=.3, bs=4, num_workers=0)
    learn = fit(Learner(dls, small_cnn(2), path=tmp_path, cbs=TwoPass(eta=2)))
    learn.export('l.pkl')
    assert learn.dls is dls
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'l.pkl')
    x = dls.valid.one_batch()[0]
    assert torch.equal(loaded.model.explain(x).map, learn.model.explain(x).map)
