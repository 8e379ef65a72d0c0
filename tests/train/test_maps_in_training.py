"""What training says about the maps, which weight network it keeps, and the loaders and batches it takes."""
import copy
import io
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import fine_tune, lr_find  # noqa: F401
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Subset, TensorDataset
from workers import Fp16, bare_cnn, run, same, scenes, small_cnn

from antehoc_nb.core.interpretation_loss import change_at_area
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.train.checkpoint import Checkpoint
from antehoc_nb.train.learner import Bf16
from antehoc_nb.train.two_pass import KeptWeights, TwoPass, rng_state, set_rng_state, validation_batches

pytestmark = pytest.mark.usefixtures('one_thread')


def column(learn, name): return [row[learn.recorder.metric_names.index(name) - 1] for row in learn.recorder.values]


def weights(model): return copy.deepcopy(model.weight_net.state_dict())


def fit(learn, epochs=1, lr=1e-2, **kwargs): return run(learn, lambda learn: learn.fit(epochs, lr, **kwargs))


def output_of(train):
    "What is printed and warned while `train()` runs."
    text = io.StringIO()
    with warnings.catch_warnings(record=True) as seen, redirect_stdout(text):
        warnings.simplefilter('always')
        train()
    deprecated = DeprecationWarning, FutureWarning  # of other libraries
    return text.getvalue(), [str(warning.message) for warning in seen if not issubclass(warning.category, deprecated)]


# --- What is measured

@pytest.mark.slow
@pytest.mark.parametrize('weight_net', ['paper', 'auto'])
def test_the_columns_are_the_drops_of_both_maps(weight_net):
    "Against `change_at_area` of the validation images, with the untrained weight network put in by hand."
    set_seed(3)
    learn = Learner(scenes(n=64), small_cnn(), metrics=accuracy, cbs=TwoPass(weight_net=weight_net, keep_best=False))
    untrained = copy.deepcopy(learn.model.weight_net)
    fit(learn, 2)
    columns = ['train_int_loss', 'valid_int_loss', 'drop_at_20', 'untrained_drop']
    assert list(learn.recorder.metric_names[-5:-1]) == columns
    (x, _), = validation_batches(learn.dls)
    model = copy.deepcopy(learn.model)
    trained = change_at_area(model, x, model.explain(x).map)
    model.weight_net = untrained
    before = change_at_area(model, x, model.explain(x).map)
    assert column(learn, 'drop_at_20')[-1] == pytest.approx(trained, abs=1e-3)
    assert column(learn, 'untrained_drop')[-1] == pytest.approx(before, abs=1e-3)
    assert trained != before
    best = learn.two_pass.best
    assert (best.kept, best.images, best.helped) == ('last', 16, round(trained, 1) < round(before, 1))
    assert (best.drop, best.untrained_drop) == pytest.approx((trained, before), abs=1e-3)
    with learn.no_bar(), learn.no_logging(): assert np.isnan(learn.validate()[-2:]).all()  # not measured now


def test_at_most_64_images_from_all_over_the_validation_set():
    x, y = torch.rand(200, 3, 16, 16), torch.arange(200)
    images, labels = [torch.cat(parts) for parts in zip(*validation_batches(loaders(x, y, bs=24)))]
    assert len(labels) == 64 and labels[0] == 0 and labels[-1] == 199
    gaps = labels.diff()
    assert gaps.min() >= 3 and gaps.max() <= 4
    assert torch.equal(images, x[labels])


class Sum(nn.Module):
    "Something other than logits, from a CNN with batch norm."
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.net = small_cnn(4)

    def forward(self, x):
        out = self.net(x)
        if self.kind == 'tuple': return out[:, :2], out[:, 2:]
        if self.kind == 'sequence': return out.view(-1, 2, 2)
        return out


def squared_error(out, y): return (torch.cat(out, 1) - y).square().mean()


CHANGE = 'average change of the output'
OUTPUTS = dict(
    regression=(lambda n: torch.randn(n, 4), nn.functional.mse_loss, CHANGE),
    tuple=(lambda n: torch.randn(n, 4), squared_error, CHANGE),
    sequence=(lambda n: torch.randn(n, 2, 2), nn.functional.mse_loss, CHANGE),
    classes=(lambda n: torch.randint(0, 4, (n,)), nn.functional.cross_entropy, 'average drop'),
    shares=(lambda n: torch.rand(n, 4).softmax(1), nn.functional.cross_entropy, 'average drop'),
    labels=(lambda n: torch.randint(0, 2, (n, 4)).float(), nn.BCEWithLogitsLoss(), 'average drop'),
)


@pytest.mark.parametrize('kind', OUTPUTS)
def test_outputs_of_every_kind_are_measured(kind):
    labels, loss, measure = OUTPUTS[kind]
    torch.manual_seed(0)
    dls = loaders(torch.rand(24, 3, 16, 16), labels(24))
    learn = fit(Learner(dls, Sum(kind), loss_func=loss, cbs=TwoPass(weight_net='paper')))
    assert learn.two_pass.best.measure == measure and learn.two_pass.best.images == 24
    assert 0 <= column(learn, 'drop_at_20')[0] <= 100 and 0 < column(learn, 'untrained_drop')[0] <= 100


def test_images_of_several_sizes_are_measured_one_by_one():
    class Sizes(torch.utils.data.Dataset):
        def __len__(self): return 6
        def __getitem__(self, i): return torch.rand(3, 16 + 8 * (i % 2), 16), i % 3
    dls = DataLoaders(*[TfmdDL(Sizes(), bs=1, num_workers=0)] * 2)
    learn = fit(Learner(dls, small_cnn(3).eval(), loss_func=nn.functional.cross_entropy, cbs=TwoPass()))
    assert learn.two_pass.best.images == 6 and np.isfinite(column(learn, 'drop_at_20')).all()


def test_not_while_finding_a_learning_rate_and_not_without_validation(tmp_path):
    learn = Learner(scenes(n=64), small_cnn(), path=tmp_path, cbs=TwoPass())
    run(learn, lambda learn: learn.lr_find(num_it=6, show_plot=False))
    assert learn.two_pass.best is None and learn.two_pass._untrained is None and not learn.two_pass._drops
    x, y = torch.rand(16, 3, 16, 16), torch.randint(0, 10, (16,))
    train = TfmdDL(TensorDataset(x, y), bs=8, num_workers=0)
    empty = TfmdDL(TensorDataset(x[:0], y[:0]), bs=8, num_workers=0)
    learn = Learner(DataLoaders(train, empty), small_cnn(), loss_func=nn.functional.cross_entropy, cbs=TwoPass())
    before = weights(learn.model)
    text, _ = output_of(lambda: fit(learn, 2))
    assert 'TwoPass' not in text and learn.two_pass.best is None
    assert not same(before, weights(learn.model))  # the last one


# --- Which weight network is kept

class Scripted(TwoPass):
    "Drops as told: in each epoch, and at the end (last, best epoch, untrained)."
    def __init__(self, epochs, end, **kwargs):
        super().__init__(**kwargs)
        self.script = [*epochs, end]
        self.seen = []

    def _measure(self, *weight_nets):
        self._activation = 'softmax'
        self.seen.append(weights(self.antehoc))
        drops = self.script[len(self.seen) - 1]
        assert len(drops) == len(weight_nets)
        return torch.stack([torch.as_tensor(drop, dtype=torch.double).expand(4) for drop in drops])


# drops of each epoch (trained, untrained); at the end (last, best epoch, untrained); what is kept
KEPT = dict(
    last=([(30, 50), (20, 50)], (20, 20, 50), 'last'),
    earlier=([(20, 50), (40, 50)], (40, 25, 50), 'epoch 0'),
    earlier_by_chance=([(20, 50), (40, 50)], (40, torch.tensor([0, 0, 60, 60]), 50), 'last'),
    earlier_since_the_last_is_in_vain=([(40, 50), (55, 50)], (55, torch.tensor([0, 0, 60, 120]), 50), 'epoch 0'),
    earlier_but_not_for_this_cnn=([(20, 50), (40, 50)], (40, 45, 50), 'last'),
    untrained=([(60, 50), (55, 50)], (55, 55, 50), 'untrained'),
    equal=([(50, 50), (50, 50)], (50, 50, 50), 'untrained'),
    all_is_kept=([(.3, .2), (.4, .2)], (.4, .3, .2), 'last'),
    nan=([(float('nan'), 50), (20, 50)], (20, 20, 50), 'last'),
)


@pytest.mark.parametrize('kind', KEPT)
@pytest.mark.parametrize('keep_best', [True, False])
def test_the_best_weight_network_is_kept(kind, keep_best):
    epochs, end, kept = KEPT[kind]
    two_pass = Scripted(epochs, end if keep_best else (end[0], end[2]), weight_net='paper', keep_best=keep_best)
    learn = Learner(scenes(n=64), small_cnn(), cbs=two_pass)
    start = weights(learn.model)
    text, _ = output_of(lambda: run_loudly(learn, 2))
    first, last = two_pass.seen[:2]
    assert not same(start, first) and not same(first, last)
    want = {'last': last, 'epoch 0': first, 'untrained': start}[kept if keep_best else 'last']
    assert same(weights(learn.model), want)
    assert two_pass.best.kept == (kept if keep_best else 'last') and two_pass.best.untrained_drop == end[-1]
    helped = end[0] < 50 or (keep_best and kept == 'epoch 0')
    assert two_pass.best.helped == helped and ('TwoPass' not in text) == helped


def run_loudly(learn, epochs):
    with learn.no_bar(): learn.fit(epochs, 1e-2)


def test_the_line_that_says_so():
    for train_cnn, advice in ((True, 'more epochs, or a CNN that is trained already (pretrained=True, or '
                                     'TwoPass(train_cnn=False) after its training; in a shell --pretrained).'),
                              (False, 'more epochs.')):
        two_pass = Scripted([(34.06, 33)], (34.06, 34.06, 33), train_cnn=train_cnn)
        learn = Learner(scenes(n=16), small_cnn(), cbs=two_pass)
        text, _ = output_of(partial(run_loudly, learn, 1))
        assert text.splitlines()[-1] == (
            'TwoPass: the trained map is no better than the untrained one (average drop at 20 % of the pixels 34.1, '
            'untrained 33.0 on 16 validation images); the untrained one is kept. Try ' + advice)
    quiet = Learner(scenes(n=16), small_cnn(), cbs=Scripted([(34, 33)], (34, 34, 33)))
    assert output_of(lambda: fit(quiet))[0] == ''  # no_logging
    assert not quiet.two_pass.best.helped
    assert str(KeptWeights('epoch 1', 10, 20, 64)) == (
        'the trained map is better than the untrained one (average drop at 20 % of the pixels 10.0, '
        'untrained 20.0 on 64 validation images); that of epoch 1 is kept')


BOTH = 'the trained map and the untrained one both keep nearly all of the output'
BETTER, NO_BETTER = (f'the trained map is {word} than the untrained one' for word in ('better', 'no better'))


@pytest.mark.parametrize('drop, untrained, kept, verdict', [
    (.14, .11, 'last', BOTH), (.99, .2, 'last', BOTH), (.3, 7, 'last', BETTER),
    (15.34, 15.26, 'untrained', NO_BETTER),  # worse, and the same in print
    (15.26, 15.34, 'untrained', NO_BETTER),  # better, and the same in print
    (15.2, 15.34, 'last', BETTER),
    (1.2, .4, 'untrained', NO_BETTER)])
def test_what_is_said_is_what_is_printed(drop, untrained, kept, verdict):
    "'Better' stands beside a lower number, and where it does not, the trained map is not used."
    two_pass = Scripted([(drop, untrained)], (drop, drop, untrained))
    learn = Learner(scenes(n=16), small_cnn(), cbs=two_pass)
    text, _ = output_of(partial(run_loudly, learn, 1))
    names = dict(last='the last weight network', untrained='the untrained one')
    line = (f'{verdict} (average drop at 20 % of the pixels {drop:.1f}, untrained {untrained:.1f} '
            f'on 16 validation images); {names[kept]} is kept')
    assert str(two_pass.best) == line and (f'TwoPass: {line}. Try more epochs' in text) == (kept == 'untrained')


@pytest.mark.slow
def test_untrained_is_what_there_was_before_the_first_fit(tmp_path):
    two_pass = Scripted([(30, 50), (20, 20, 50), (60, 50)], (60, 60, 50))  # the two fits of fine_tune
    learn = Learner(scenes(n=32), small_cnn(), path=tmp_path, cbs=two_pass)
    start = weights(learn.model)
    run(learn, lambda learn: learn.fine_tune(1, 1e-2))
    assert same(weights(learn.model), start) and two_pass.best.kept == 'untrained'
    learn.export('learner.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'learner.pkl')
    assert loaded.two_pass.best == two_pass.best and same(loaded.two_pass._untrained.state_dict(), start)
    assert not loaded.two_pass._batches
    loaded.dls = learn.dls
    loaded.two_pass.script = [(30, 50), (60, 60, 50)]
    loaded.two_pass.seen = []
    fit(loaded)
    assert same(weights(loaded.model), start)
    loaded.model = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32))  # another model has another untrained one
    nn.init.normal_(loaded.model.weight_net.autoencoder.out.weight)
    loaded.two_pass.script = [(30, 50), (60, 60, 50)]
    loaded.two_pass.seen = []
    fresh = weights(loaded.model)
    fit(loaded)
    assert same(weights(loaded.model), fresh) and not same(fresh, start)


@pytest.mark.slow
def test_a_fit_that_ends_early():
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 1: raise CancelFitException()
    learn = fit(Learner(scenes(n=64), small_cnn(), cbs=[TwoPass(), Stop()]), 3)
    assert len(learn.two_pass._drops) == 1 and learn.two_pass.best is not None
    stopper = EarlyStoppingCallback('drop_at_20', comp=np.less, patience=1)
    learn = Learner(scenes(n=32), small_cnn(), cbs=[Scripted([(20, 50), (30, 50)], (30, 20, 50)), stopper])
    fit(learn, 5)
    assert learn.two_pass.best.kept == 'epoch 0'


BF16, FP16 = dict(cbs=lambda: [Bf16()]), dict(cbs=lambda: [Fp16()])


@pytest.mark.slow
@pytest.mark.parametrize('arguments, train', [
    ({}, 'fit'), (FP16, 'fine_tune'), pytest.param({}, 'fine_tune', marks=pytest.mark.slow),
    pytest.param(FP16, 'fit', marks=pytest.mark.slow), pytest.param(BF16, 'fit', marks=pytest.mark.slow),
    pytest.param(BF16, 'fine_tune', marks=pytest.mark.slow)])
def test_the_cnn_is_never_touched(arguments, train):
    def trained(*two_pass, cbs=list):
        set_seed(7)
        net = small_cnn()
        learn = Learner(scenes(64), net, cbs=[*cbs(), *two_pass])
        run(learn, lambda learn: getattr(learn, train)(2, 1e-2))
        return learn, net.state_dict(), torch.randn(3)
    (_, plain, drawn), (learn, ours, ours_drawn) = trained(**arguments), trained(TwoPass(), **arguments)
    assert same(plain, ours) and torch.equal(drawn, ours_drawn) and learn.two_pass.best is not None


@pytest.mark.slow
def test_state_goes_through_a_checkpoint(tmp_path):
    "Cut short in the last epoch, the best epoch being the first; and once more when all is done."
    class Crash(Callback):
        order = 90
        def before_batch(self):
            if self.training and self.epoch == 2: raise KeyboardInterrupt

    def learner(script, end, *cbs):
        set_seed(4)
        return Learner(scenes(n=32), small_cnn(), cbs=[Scripted(script, end), *cbs])
    script, end = [(20, 50), (40, 50), (45, 50)], (45, 10, 50)
    whole = fit(learner(script, end), 3)
    with pytest.raises(KeyboardInterrupt): fit(learner(script, end, Checkpoint(tmp_path/'c'), Crash()), 3)
    torch.manual_seed(99)
    resumed = fit(learner(script[2:], end, Checkpoint(tmp_path/'c')), 3)
    again = fit(learner([], end, Checkpoint(tmp_path/'c')), 3)
    for learn in (whole, resumed, again):
        assert learn.two_pass.best.kept == 'epoch 0'
        assert same(whole.model.state_dict(), learn.model.state_dict())
    assert column(resumed, 'drop_at_20') == column(whole, 'drop_at_20') == [20, 40, 45]


@pytest.mark.slow
def test_two_fits_go_through_a_checkpoint(tmp_path):
    "Of a fit that was finished before, nothing is measured and nothing is said."
    class Crash(Callback):
        order = 90
        def before_batch(self):
            if self.training and self.n_epoch == 2 and self.epoch == 1: raise KeyboardInterrupt

    def two_fits(*cbs, seed=4):
        set_seed(seed)
        learn = Learner(scenes(n=32), small_cnn(), cbs=[TwoPass(weight_net='auto'), *cbs])
        fit(learn, 1)
        fit(learn, 2)
        return learn
    whole = two_fits()
    with pytest.raises(KeyboardInterrupt): two_fits(Checkpoint(tmp_path/'c'), Crash())
    resumed = two_fits(Checkpoint(tmp_path/'c'), seed=5)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert asdict(whole.two_pass.best) == asdict(resumed.two_pass.best)
    assert same(whole.two_pass._untrained.state_dict(), resumed.two_pass._untrained.state_dict())


# --- Nothing that should not be there

def test_no_warning_and_no_line_of_our_own(tmp_path):
    def train():
        learn = Learner(scenes(n=32), small_cnn(), metrics=accuracy, path=tmp_path, cbs=[Scripted([], ()), Bf16()])
        learn.two_pass.script = [(20, 50), (20, 20, 50)] * 4
        with learn.no_bar():
            learn.fit(1)
            learn.fit_one_cycle(1)
            learn.validate()
            learn.get_preds()
            learn.remove_cb(TwoPass)
            learn.fit(1, cbs=[TwoPass(keep_maps=2), Checkpoint(tmp_path/'c')])
        late = Learner(scenes(n=32), small_cnn())
        late.add_cb(TwoPass(train_cnn=False))
        with late.no_bar(), late.no_logging():
            late.lr_find(num_it=6, show_plot=False)
            late.fine_tune(1)
    text, warned = output_of(train)
    assert warned == []
    said = '[', 'TwoPass: the trained map is no better', 'TwoPass: the CNN predicts'
    rows = [line for line in text.splitlines() if not line.startswith(said)]
    assert rows == []


# --- Plain PyTorch loaders, and what can't be used

def loaders(*columns, bs=8, kind=DataLoader, **kwargs):
    "DataLoaders over plain loaders of the same images."
    data = TensorDataset(*columns)
    return DataLoaders(kind(data, bs, shuffle=True, **kwargs), kind(data, bs))


def images(n=20, classes=10): return torch.rand(n, 3, 32, 32), torch.randint(0, classes, (n,))


@pytest.mark.parametrize('kind', ['plain', 'generator', 'sampler', 'batches'])
def test_plain_loaders_train_and_leave_the_cnn_alone(kind):
    x, y = images()

    def trained(*cbs):
        set_seed(2)
        data = TensorDataset(x, y)
        generator = torch.Generator().manual_seed(3)
        train = dict(
            plain=lambda: DataLoader(data, 8, shuffle=True),
            generator=lambda: DataLoader(data, 8, shuffle=True, generator=generator),
            sampler=lambda: DataLoader(data, 8, sampler=RandomSampler(data, generator=generator)),
            batches=lambda: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 8, False)),
        )[kind]()
        valid = DataLoader(data, batch_sampler=train.batch_sampler) if kind == 'batches' else DataLoader(data, 8)
        net = small_cnn()
        dls = DataLoaders(train, valid)
        learn = Learner(dls, net, loss_func=nn.functional.cross_entropy, metrics=accuracy, cbs=cbs)
        fit(learn, 2)
        return net.state_dict(), learn
    (plain, alone), (ours, learn) = trained(), trained(TwoPass())
    assert same(plain, ours)
    assert [row[:3] for row in alone.recorder.values] == [row[:3] for row in learn.recorder.values]
    assert learn.two_pass.best.images == 20 and np.isfinite(column(learn, 'drop_at_20')).all()
    assert learn.model.mean.flatten().tolist() == [0] and learn.model.meta == dict(
        size=[32, 32], task='single-label', activation='softmax')
    learn.model.explain(x[:2])


def test_streams_and_lists_of_batches_are_read_from_the_start():
    class Stream(IterableDataset):
        def __init__(self, pairs): self.pairs = pairs
        def __iter__(self): return iter(self.pairs)
        def __len__(self): return len(self.pairs)
    x, y = images()
    stream = DataLoader(Stream(list(zip(x, y))), 8)
    batch_list = list(DataLoader(TensorDataset(x, y), 8))
    made = DataLoader(batch_list, None)  # a data set of batches
    for loader in (stream, batch_list, made):
        dls = DataLoaders(loader, loader)
        taken = validation_batches(dls, 12)
        assert torch.equal(torch.cat([batch[0] for batch in taken]), x[:12])
    for loader in (stream, made):
        learn = Learner(DataLoaders(loader, loader), small_cnn(), loss_func=nn.functional.cross_entropy, cbs=TwoPass())
        fit(learn)
        assert learn.two_pass.best.images == 20


def test_a_generator_is_one_of_the_random_states(tmp_path):
    x, y = images()
    dls = loaders(x, y, generator=torch.Generator().manual_seed(1))
    state = rng_state(dls)
    torch.save(state, tmp_path/'state')
    first = torch.cat([labels for _, labels in dls.train])
    assert not torch.equal(torch.cat([labels for _, labels in dls.train]), first)
    set_rng_state(dls, torch.load(tmp_path/'state', weights_only=True))
    assert torch.equal(torch.cat([labels for _, labels in dls.train]), first)


def test_mean_and_std_by_hand_where_the_loaders_do_not_tell():
    x, y = images()
    mean, std = [.5, .4, .3], [.2, .2, .2]
    learn = Learner(loaders(x, y), small_cnn(), loss_func=nn.functional.cross_entropy, cbs=TwoPass(mean=mean, std=std))
    torch.testing.assert_close(learn.model.mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(learn.model.std.flatten(), torch.tensor(std))


def test_a_loaded_learner_says_what_it_lacks(tmp_path):
    learn = fit(Learner(scenes(n=32), small_cnn(), metrics=accuracy, path=tmp_path))
    learn.export('plain.pkl')
    learn.add_cb(TwoPass())
    fit(learn)
    learn.export('ours.pkl')
    for name in ('plain.pkl', 'ours.pkl'):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            loaded = load_learner(tmp_path/name)
        if name == 'ours.pkl': loaded.remove_cb(TwoPass)
        loaded.add_cb(TwoPass(train_cnn=False))
        message = ('the training set has no images; a learner that comes from load_learner has no data: '
                   'set learn.dls = dls before fit')
        with pytest.raises(ValueError, match=message): fit(loaded)
        loaded.dls = learn.dls
        before = copy.deepcopy(getattr(loaded.model, 'cnn', loaded.model).state_dict())
        fit(loaded)
        assert same(before, loaded.model.cnn.state_dict()) and loaded.two_pass.best is not None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'ours.pkl')
    with pytest.raises(ValueError, match='set learn.dls = dls before fit'): fit(loaded)


X, Y = torch.rand(12, 3, 16, 16), torch.randint(0, 10, (12,))


def twice(data, bs=8, **kwargs): return lambda: DataLoaders(*[DataLoader(data, bs, **kwargs)] * 2)


def empty_training_set(): return DataLoaders(*[DataLoader(TensorDataset(X[:n], Y[:n]), 8) for n in (0, 12)])


def dropped(): return DataLoaders(*[TfmdDL(TensorDataset(X, Y), bs=16, drop_last=True, num_workers=0)] * 2)


FIRST = r'the images first, a floating-point tensor \(B,C,H,W\); the DataLoader gives '
UNUSABLE = dict(
    empty=(twice(TensorDataset(X[:0], Y[:0])), 'the training set has no images'),
    empty_training_set=(empty_training_set, 'the training set has no images'),
    dropped=(dropped, 'the training DataLoader gives no batch: it has 12 images, and drop_last leaves out a batch that '
                      'is not full; lower the batch size, as by bs=8 where the loader is made'),
    dropped_plain=(twice(TensorDataset(X, Y), 16, drop_last=True), 'lower the batch size'),
    no_labels=(twice(TensorDataset(X)), r'have no labels, .*: a batch must be \(images, labels\)'),
    bare=(twice(X), r'a batch must be a tuple \(images, labels\), the DataLoader gives a Tensor'),
    dict=(twice([dict(image=x, label=y) for x, y in zip(X, Y)]),
          r'a batch must be a tuple \(images, labels\), the DataLoader gives a dict'),
    labels_first=(twice(TensorDataset(Y, X)), FIRST + r'\(8,\) of torch.int64 first'),
    bytes=(twice(TensorDataset((X * 255).byte(), Y)), FIRST + r'\(8, 3, 16, 16\) of torch.uint8 first'),
    flat=(twice(TensorDataset(X.flatten(1), Y)), FIRST + r'\(8, 768\) of torch.float32 first'),
    names=(twice([(str(i), x) for i, x in enumerate(X)]), FIRST + 'a (tuple|list) first'),
)


@pytest.mark.parametrize('kind', UNUSABLE)
@pytest.mark.parametrize('late', [False, True])
def test_what_cannot_be_trained_on_is_refused_by_name(kind, late):
    make, message = UNUSABLE[kind]
    net = bare_cnn()
    before = copy.deepcopy(net.state_dict())
    loss = nn.functional.cross_entropy
    with pytest.raises(ValueError, match=message):
        if late: fit(Learner(make(), net, loss_func=loss), cbs=TwoPass())
        else: fit(Learner(make(), net, loss_func=loss, cbs=TwoPass()))
    assert same(before, net.state_dict())


def test_a_subset_and_a_collate_function_are_respected():
    x, y = images()

    def halved(pairs):
        xs, ys = zip(*pairs)
        return torch.stack(xs)[:, :, ::2, ::2], torch.tensor(ys)
    data = Subset(TensorDataset(x, y), range(3, 15))
    dls = DataLoaders(*[DataLoader(data, 5, collate_fn=halved)] * 2)
    taken = validation_batches(dls)
    assert torch.equal(torch.cat([batch[0] for batch in taken]), x[3:15, :, ::2, ::2])
    assert [len(batch[0]) for batch in taken] == [5, 5, 2]


@pytest.mark.parametrize('vocab', [['cat', 'dog'], None])
def test_a_cnn_that_predicts_one_class_is_named(vocab):
    class Always(nn.Module):
        "The second class, whatever the image."
        def __init__(self):
            super().__init__()
            self.net = small_cnn(2)

        def forward(self, x): return self.net(x) * 0 + torch.tensor([0., 3])

    torch.manual_seed(0)
    dls = loaders(torch.rand(16, 3, 16, 16), torch.arange(16) % 2)
    if vocab: dls.vocab = vocab
    learn = Learner(dls, Always(), loss_func=nn.functional.cross_entropy, cbs=TwoPass())
    text, _ = output_of(partial(run_loudly, learn, 1))
    assert text.splitlines()[-1] == (
        f'TwoPass: the CNN predicts {"dog" if vocab else "class 1"} for all 16 validation images, so its maps say '
        'nothing about classes. Train the CNN longer, with smaller batches, or from pretrained weights.')
    learn.dls = loaders(torch.rand(16, 3, 16, 16), torch.ones(16, dtype=torch.long))  # the only label there is
    assert 'predicts' not in output_of(partial(run_loudly, learn, 1))[0]
