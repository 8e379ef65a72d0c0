"""SENN and CBAH: sums that are predictions, the robustness term, training that resumes, Table 3 on photo-digits."""
import gc
import json
import weakref
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import load_learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from antehoc_nb.core.utils import weights_digest
from antehoc_nb.data.photo_digits import photo_digits_dls
from antehoc_nb.evaluate.explainers import explain_with
from antehoc_nb.evaluate.scoreboard import read_record
from antehoc_nb.tasks import classification, concept_tables
from antehoc_nb.tasks.concept_models import (
    Cbah,
    CbahLoss,
    ConceptDecoder,
    Senn,
    SennLoss,
    cbah_learner,
    cell_shares,
    robustness_term,
    senn_learner,
    show_concept_images,
    show_contributions,
)
from antehoc_nb.tasks.concept_tables import (
    METHODS,
    accuracies,
    concept_experiment,
    concept_table,
    map_table,
    read_concept_models,
    run_concept_models,
    table3,
)
from antehoc_nb.train.archs import build_cnn, small_cnn
from antehoc_nb.train.checkpoint import Checkpoint
from antehoc_nb.train.learner import Bf16

pytestmark = pytest.mark.usefixtures('one_thread', 'without_figures')


def toy_dls(n=64, size=16, bs=16, classes=3, seed=0):
    "A square, left, middle or right, on noise; pixels in [0,1], not normalised"
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    x = rng.random((n, 3, size, size), dtype=np.float32) * .3
    for im, c in zip(x, y): im[:, 4:10, c * (size // classes):c * (size // classes) + 5] += .7
    parts = slice(3 * n // 4), slice(3 * n // 4, None)
    sets = [TensorDataset(torch.tensor(x[part]), torch.tensor(y[part])) for part in parts]
    loaders = [TfmdDL(o, bs=bs, shuffle=k == 0, num_workers=0, device='cpu') for k, o in enumerate(sets)]
    return DataLoaders(*loaders, device='cpu')


def tiny(n_out=3):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, n_out))


def torchvision_cnn(name):
    "A function like `tiny`, of one of torchvision's architectures"
    return lambda n_out: getattr(torchvision.models, name)(num_classes=n_out)


def quiet(learn, epochs=1, lr=3e-3):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return learn


KW = dict(loss_func=nn.CrossEntropyLoss(), metrics=accuracy)


@pytest.mark.parametrize('cnn', [
    pytest.param(tiny, id='tiny'), pytest.param(small_cnn, id='small'),
    pytest.param(torchvision_cnn('resnet18'), id='resnet'),
    pytest.param(torchvision_cnn('vgg11_bn'), id='vgg', marks=pytest.mark.slow),
    pytest.param(torchvision_cnn('mobilenet_v3_small'), id='mobilenet', marks=pytest.mark.slow),
])
def test_prediction_is_the_sum_of_contributions(cnn):
    torch.manual_seed(0)
    net, x = cnn(5).eval(), torch.rand(3, 3, 32, 48)
    before = net(x)
    for model in (Senn(net, x, concepts=4).eval(), Cbah(net, x, concepts=4).eval()):
        e = model.explain(x)
        assert e.contributions.shape == (3, 4, 5)
        torch.testing.assert_close(e.contributions.sum(1) + e.bias, model(x))
        assert torch.equal(net(x), before)  # the CNN that was passed in is untouched
        keys = list(model.state_dict())
        assert len(keys) == len(set(keys)) and not any(k.startswith('last_layer') for k in keys)
    assert torch.equal(Cbah(net, x).eval().explain(x).task, before)


@given(k=st.integers(1, 5), c=st.integers(2, 4), b=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_robustness_term_is_the_definition(k, c, b, seed):
    "Against the published definition, Jacobians and all, by autograd"
    torch.manual_seed(seed)
    x = torch.rand(b, 3, 16, 16, dtype=torch.float64)
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, c))
    m = Senn(cnn, x.float(), concepts=k, dropout=0.).double().train()
    found = m.find_concepts(x)
    def jacobian(f):
        rows = [torch.autograd.grad(f[:, i].sum(), found.x, retain_graph=True)[0] for i in range(f.shape[1])]
        return torch.stack(rows, 1)
    want = jacobian(found.pred) - torch.einsum('bkc,bkxyz->bcxyz', found.relevance, jacobian(found.concepts))
    torch.testing.assert_close(robustness_term(found), want.norm(), atol=2e-6, rtol=1e-6)


def test_robustness_trains_both_parts():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 16, 16)
    m = Senn(tiny(), x, concepts=3, dropout=0.).train()
    for directions in (None, 2):
        m.zero_grad()
        robustness_term(m.find_concepts(x), directions).backward()
        assert m.cnn[0].weight.grad.abs().max() > 0 and m.conceptizer[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize('cnn', [tiny, small_cnn], ids=['tiny', 'small'])
def test_random_directions_are_unbiased_with_batch_norm(cnn):
    "Batch norm couples the images, so the signs must be the same for all of them"
    torch.manual_seed(0)
    x = torch.rand(12, 3, 32, 32)
    found = Senn(cnn(5), x, concepts=3, dropout=0.).train().find_concepts(x)
    squares = torch.stack([robustness_term(found, 1).detach()**2 for _ in range(150)])
    want = robustness_term(found).item()**2
    assert abs(squares.mean() / want - 1) < 4 * squares.std() / squares.mean() / 150**.5


def test_random_directions_cost_less_than_classes(monkeypatch):
    calls, real = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, 'grad', lambda *a, **k: calls.append(1) or real(*a, **k))
    m = Senn(tiny(20), torch.rand(2, 3, 16, 16), concepts=3).train()
    for directions, n in ((None, 20), (1, 1), (3, 3)):
        calls.clear()
        robustness_term(m.find_concepts(torch.rand(2, 3, 16, 16)), directions)
        assert len(calls) == n


def test_relevances_lie_where_they_should():
    x = torch.rand(2, 3, 16, 16)
    assert Senn(tiny(), x, positive=True).explain(x).relevance.min() >= 0
    assert Senn(tiny(), x).explain(x).relevance.abs().max() <= 1
    assert Cbah(tiny(), x).explain(x).concepts.min() >= 0


def test_shares_add_up_to_the_logit():
    torch.manual_seed(1)
    x, y = torch.rand(4, 3, 24, 32), torch.tensor([0, 2, 1, 2])
    m = Senn(tiny(), x, concepts=6)
    e, cells = m.explain(x), cell_shares(m, x, y)
    assert cells.shape == (4, 3, 5)
    bias = m.read.bias * e.relevance[torch.arange(4), :, y].sum(1)
    torch.testing.assert_close(cells.sum((1, 2)) + bias, e.pred[torch.arange(4), y])


def test_map_shows_where_the_conceptizer_looks():
    "One concept that responds to bright pixels only, relevant for class 1: the map's peak follows the bright spot"
    m = Senn(tiny(2), torch.rand(1, 3, 64, 64), concepts=1).eval()
    with torch.no_grad():
        for conv in (m.conceptizer[0], m.conceptizer[3]):
            conv.weight.fill_(1.)
            conv.bias.zero_()
        m.read.weight.fill_(1.)
        m.cnn[5].weight.zero_()
        m.cnn[5].bias.copy_(torch.tensor([-1., 1.]))
    for row, col in ((20, 20), (32, 44), (44, 28)):
        x = torch.zeros(1, 3, 64, 64)
        x[..., row - 2:row + 2, col - 2:col + 2] = 1
        got = explain_with('senn', m, x, torch.tensor([1]))[0, 0]
        at = (got > .99 * got.max()).nonzero().float().mean(0)
        assert (at - torch.tensor([row - .5, col - .5])).abs().max() <= 2
        assert explain_with('senn', m, x, torch.tensor([0])).max() == 0  # its share in class 0 is negative


@pytest.mark.parametrize('make', [senn_learner, cbah_learner])
def test_terms_join_the_task_loss(make):
    "One step of the learner against the same step written out"
    torch.manual_seed(0)
    dls = toy_dls(n=32, bs=24)
    kw = dict(robustness=.1, sparsity=.01, dropout=0.) if make is senn_learner else dict(alpha=.5, beta=.25)
    learn = make(dls, tiny(), concepts=4, opt_func=SGD, wd=0., **kw, **KW)
    twin, (x, y) = deepcopy(learn.model), dls.train.one_batch()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
    x, y = dls.train.dataset[:]
    twin.train()
    c = twin.find_concepts(x)
    task = nn.functional.cross_entropy(c.task, y)
    rec = nn.functional.mse_loss(twin.decoder(c.concepts), 2 * x - 1)
    if make is senn_learner:
        loss = task + rec + .01 * c.concepts.abs().sum() + .1 * robustness_term(c)
    else:
        loss = task + .5 * rec + .25 * (c.pred.log_softmax(1) - c.task.detach().log_softmax(1)).square().mean()
    loss.backward()
    for (k, p), q in zip(twin.named_parameters(), learn.model.parameters()):
        torch.testing.assert_close(q.data, p.data - .1 * p.grad, atol=1e-6, rtol=1e-4, msg=k)
    assert abs(float(learn.recorder.losses[0]) - task.item()) < 1e-5  # the recorded loss is the task's


def test_accumulated_gradients_share_the_terms():
    "Two halves of a batch give the weights of the whole one, but for batch norm, which is left out here"
    dls = toy_dls(n=32, bs=24)
    x, y = dls.train.dataset[:]
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    ends = []
    for bs, cbs in ((24, []), (12, [GradientAccumulation(24)])):
        set_seed(0)
        halves = DataLoaders(*[TfmdDL(TensorDataset(x, y), bs=bs, num_workers=0, device='cpu')] * 2, device='cpu')
        weights = dict(alpha=.5, beta=.25)
        learn = cbah_learner(halves, net, concepts=4, opt_func=SGD, wd=0., cbs=cbs, **weights, **KW)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
        ends.append(learn.model)
    for (name, p), q in zip(ends[0].named_parameters(), ends[1].parameters()):
        torch.testing.assert_close(p, q, msg=name)


def test_model_is_made_on_the_loaders_device():
    "The meta device stands in for a GPU: whatever is still on the CPU cannot be mixed with it"
    dls = toy_dls()
    for dl in dls.loaders: dl.device = torch.device('meta')
    dls.device = torch.device('meta')
    seen = []
    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny()
        def forward(self, x):
            seen.append((x.device.type, self.net[0].weight.device.type))
            return self.net(x)
    cbah_learner(dls, Watch(), concepts=4, **KW)
    assert seen == [('meta', 'meta')]


def test_copies_of_the_model_are_refused():
    learn = cbah_learner(toy_dls(), tiny(), concepts=4, **KW)
    class Copies(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
        def forward(self, x): return deepcopy(self.module)(x)
    learn.model = Copies(learn.model)
    with pytest.raises(TypeError, match='Copies runs copies of the model'): quiet(learn)


def test_target_undoes_the_normalisation():
    dls = photo_digits_dls(n_train=32, n_valid=16, size=24, bs=16)
    learn = cbah_learner(dls, small_cnn(10), concepts=4, metrics=accuracy)
    px = torch.tensor(dls.valid_ds.images).permute(0, 3, 1, 2) / 255
    x = torch.cat([b[0] for b in dls.valid]).as_subclass(torch.Tensor)
    torch.testing.assert_close(learn.model.reconstruction_target(x), 2 * px - 1, atol=1e-5, rtol=0)
    quiet(learn)


def test_fidelity_moves_the_encoder_but_not_the_classifiers_layer():
    dls = toy_dls()
    learn = cbah_learner(dls, tiny(), concepts=4, alpha=0., beta=1., **KW)
    learn.model.train()
    c = learn.model.find_concepts(dls.train.one_batch()[0])
    for kind in ('mse', 'kl'):
        learn.model.zero_grad()
        CbahLoss(fidelity=kind).term('fidelity', learn.model, c).backward(retain_graph=True)
        assert learn.model.classifier.weight.grad is None
        assert learn.model.head.weight.grad.abs().max() > 0 and learn.model.cnn[0].weight.grad.abs().max() > 0


def test_rotation_head_learns():
    set_seed(0)
    learn = quiet(cbah_learner(toy_dls(n=256), tiny(), concepts=6, gamma=1., **KW), 6, 2e-2)
    turned = [v[learn.recorder.metric_names.index('rotation') - 1] for v in learn.recorder.values]
    assert turned[-1] < turned[0] and turned[-1] < np.log(4)


@pytest.mark.parametrize('make', [senn_learner, cbah_learner])
def test_killed_and_resumed(make, tmp_path):
    def learner(cb):
        set_seed(3)  # before the loaders are made: they shuffle from a stream of their own
        kw = dict(directions=1) if make is senn_learner else dict(gamma=.1)
        return make(toy_dls(), tiny(), concepts=4, cbs=cb, **kw, **KW)
    class Stop(Exception): pass
    class Kill(Callback):
        order = 10**7
        def after_epoch(self):
            if self.epoch == 1: raise Stop('killed')
    alone = quiet(learner([Checkpoint(tmp_path/'a.pt')]), 3)
    with pytest.raises(Stop): quiet(learner([Checkpoint(tmp_path/'b.pt'), Kill()]), 3)
    again = quiet(learner([Checkpoint(tmp_path/'b.pt')]), 3)
    for (name, p), q in zip(alone.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(p, q), name
    columns = [[list(map(float, row)) for row in learn.recorder.values] for learn in (alone, again)]
    assert columns[0] == columns[1]


@pytest.mark.parametrize('make', [senn_learner, cbah_learner])
def test_export_half_precision_and_channels_last(make, tmp_path):
    dls = photo_digits_dls(n_train=48, n_valid=16, size=24, bs=16)
    learn = quiet(make(dls, tiny(10), concepts=4, cbs=[Bf16(), ChannelsLast()], path=tmp_path, metrics=accuracy))
    assert all(p.isfinite().all() for p in learn.model.parameters())
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, MixedPrecision)])
    x = torch.rand(2, 3, 24, 24)
    want = learn.model.eval()(x)
    learn.export(tmp_path/'m.pkl')
    torch.testing.assert_close(load_learner(tmp_path/'m.pkl').model.eval()(x), want)  # the memory format may differ
    p, y = learn.get_preds(dl=dls.valid)
    assert p.shape == (16, 10) and len(y) == 16


def test_nothing_is_kept_between_batches():
    learn = quiet(senn_learner(toy_dls(), tiny(), concepts=4, directions=1, **KW))
    assert learn.concept_loss.found is None and learn.model.take_concepts() is None
    x = torch.rand(2, 3, 16, 16)
    learn.model.train().recording = True
    learn.model(x)
    ref = weakref.ref(learn.model.take_concepts().relevance)
    gc.collect()
    assert ref() is None


def test_pretrained_body_is_frozen_at_first(monkeypatch):
    "As vision_learner does it; the weights are not downloaded here"
    monkeypatch.setattr(torchvision.models.ResNet, 'load_state_dict', lambda self, *a, **k: None)
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, 'get_state_dict', lambda self, *a, **k: {})
    dls = toy_dls(size=32)
    dls.c = 3
    for make in (senn_learner, cbah_learner):
        learn = make(dls, 'resnet18', pretrained=True, normalize=False, **KW)
        assert not learn.model.cnn[0][0].weight.requires_grad and learn.model.decoder.spread.weight.requires_grad
        new = learn.model.head if make is cbah_learner else learn.model.conceptizer[0]
        last_group = learn.opt.all_params(slice(-1, None)).itemgot(0)
        assert new.weight.requires_grad and any(p is new.weight for p in last_group)
        learn.unfreeze()
        assert learn.model.cnn[0][0].weight.requires_grad


@pytest.mark.parametrize('make', [senn_learner, cbah_learner])
def test_they_start_from_packaged_weights(make):
    "The body of the CNN is that of the package, bit for bit"
    arch = 'timm/tf_efficientnet_lite0'
    dls = toy_dls(size=32)
    dls.c = 3
    learn = make(dls, arch, pretrained=True, normalize=False, **KW)
    wanted = build_cnn(arch, 3, pretrained=True)[0].state_dict()
    found = learn.model.cnn[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not next(learn.model.cnn[0].parameters()).requires_grad and learn.model.decoder.spread.weight.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_methods_are_fine_tuned_where_the_profile_says_so(method, tmp_path):
    "One epoch with the body frozen, then the others; started again, nothing is trained"
    config = concept_experiment.config('photo-digits', 'smoke') | dict(fine_tune=True, pretrained=False, epochs=1)
    dls = photo_digits_dls(64, 20, 32, 32)
    learn = concept_tables._train(method, dls, config, 0, tmp_path)
    assert learn.checkpoint.epochs == 2 and len(learn.recorder.values) >= 1
    weights = weights_digest(learn.model)
    again = concept_tables._train(method, dls, config, 0, tmp_path)
    assert weights_digest(again.model) == weights


@pytest.mark.parametrize('call, message', [
    (lambda: Senn(tiny(), torch.rand(1, 3, 16, 16), concepts=0), 'concepts=0: at least one concept is needed'),
    (lambda: Cbah(tiny(), torch.rand(1, 3, 16, 16), concepts=-3), 'concepts=-3: at least one'),
    (lambda: ConceptDecoder(3, (63, 64)), 'not 63 x 64; use 64 x 64'),
    (lambda: Senn(tiny(), torch.rand(1, 3, 30, 30)), 'multiples of 4 from 16 pixels, not 30 x 30; use 32 x 32'),
    (lambda: Cbah(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), torch.rand(1, 3, 16, 16)),
     'must end in a linear layer'),
    (lambda: Cbah(nn.Sequential(*tiny(), nn.ReLU()), torch.rand(1, 3, 16, 16)), 'must end in a linear layer'),
    (lambda: CbahLoss(alpha=-1.), 'alpha=-1.0 must be 0 or more'),
    (lambda: CbahLoss(beta=float('nan')), 'beta=nan must be 0 or more'),
    (lambda: CbahLoss(gamma=float('inf')), 'gamma=inf must be 0 or more, and finite'),
    (lambda: CbahLoss(fidelity='l1'), "fidelity='l1' must be 'mse' or 'kl'"),
    (lambda: SennLoss(robustness=-1.), 'robustness=-1.0 must be'),
    (lambda: SennLoss(directions=0), 'directions=0: at least one'),
    (lambda: Senn(tiny(), torch.rand(1, 3, 16, 16), dropout=1.5), r'dropout=1.5 must lie in \[0,1\)'),
    (lambda: Cbah(tiny(), torch.rand(1, 3, 16, 16), mean=[.5] * 3), 'mean and std go together'),
    (lambda: Cbah(tiny(), torch.rand(1, 3, 16, 20), rotation=True),
     'gamma: images of 16 x 20 pixels change their shape'),
    (lambda: Senn(tiny(), torch.rand(1, 3, 16, 16)).reconstruction_target(torch.full((1, 3, 16, 16), 1.2)),
     'pixels lie between 1.20 and 1.20'),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_images_out_of_range_stop_the_training_before_a_step():
    dls = toy_dls()
    dls.train.dataset.tensors[0].mul_(3)
    learn = cbah_learner(dls, tiny(), **KW)
    before = deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match='the decoder, which ends in tanh, can only draw'): quiet(learn)
    for k, p in learn.model.named_parameters(): assert torch.equal(p, before[k])


def test_explainers_want_their_own_model():
    x = torch.rand(2, 3, 16, 16)
    m, y = Cbah(tiny(), x), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="'senn' needs a Senn, not a Cbah"): explain_with('senn', m, x, y)
    with pytest.raises(TypeError, match="'cbah' needs a Cbah, not a Sequential"): explain_with('cbah', tiny(), x, y)


def test_figures():
    set_seed(0)
    for make in (senn_learner, cbah_learner):
        learn = make(toy_dls(), tiny(), concepts=4, **KW)
        fig = show_concept_images(learn.model, learn.dls.valid, [3, 1], n=5)
        assert len(fig.axes) == 10 and fig.axes[0].get_ylabel().startswith('concept 3')
        x = learn.dls.valid.one_batch()[0][:3]
        learn.model.eval()
        fig = show_contributions(learn.model, x, 'abc', top=3)
        c = learn.model.explain(x)
        k = int(c.pred[0].argmax())
        assert fig.axes[0].get_title() == f'{"abc"[k]}: {c.pred[0, k]:.2f}'
        bars = [p.get_width() for p in fig.axes[6].patches]
        assert len(bars) == 4 and abs(sum(bars) - c.pred[0, k].item()) < 1e-5  # they add up to the logit in the title
        largest = sorted(c.contributions[0, :, k].tolist(), key=abs)[1:]
        np.testing.assert_allclose(sorted(bars[1:], key=abs), largest, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_table3(tmp_path, monkeypatch):
    def fewer(n_train, n_valid, *args, **kwargs):
        assert n_valid == 500
        return photo_digits_dls(n_train, 60, *args, **kwargs)
    monkeypatch.setattr(classification, 'photo_digits_dls', fewer)
    monkeypatch.setattr(concept_tables, 'epoch_seconds', partial(concept_tables.epoch_seconds, rounds=1))
    command = 'antehoc reproduce table3'
    rec = run_concept_models('photo-digits', 'smoke', tmp_path/'results', tmp_path/'work', command=command)
    stored = read_concept_models('photo-digits', 'smoke', tmp_path/'results')
    t = accuracies(stored)
    assert list(t.index) == ['plain CNN', 'ours', 'SENN', 'CBAH', 'CBAH, its classifier']
    runs = {o['method']: o for o in stored['results']['runs']}
    assert runs['plain']['cnn_sha256'] == runs['ante-hoc']['cnn_sha256'] is not None
    assert t.accuracy['ours'] == t.accuracy['plain CNN'] and t.time['plain CNN'] == 1
    assert t.parameters['SENN'] > t.parameters['plain CNN'] < t.parameters['CBAH']
    assert set(map_table(stored).index.get_level_values(0)) == {'ours', 'SENN', 'CBAH'}
    paper = tmp_path/'paper.json'
    paper.write_text(json.dumps({'table3': {'none of them': {'SENN': 12.5}}}))
    shown = table3({'photo-digits': rec}, paper)
    assert shown.loc['SENN', 'photo-digits'].endswith('(12.5, none of them)')
    assert '±' in shown.loc['ours', 'photo-digits'] and '(' not in shown.loc['ours', 'photo-digits']
    with pytest.raises(FileNotFoundError, match='antehoc reproduce table3 --dataset cifar10 --profile cpu'):
        read_concept_models('cifar10', results=tmp_path)
    with pytest.raises(ValueError, match='unknown dataset'): run_concept_models('cifar', 'smoke', tmp_path, tmp_path)
    assert 0 <= runs['cbah']['concepts']['agreement'] <= 1 and 'agreement' not in runs['senn']['concepts']
    assert list(concept_table({'photo-digits': stored}).index) == [('photo-digits', 'SENN'), ('photo-digits', 'CBAH')]
    assert concept_experiment.config('cifar10', 'paper')['arch'] == 'resnet18' and set(METHODS) == set(runs)
    assert read_record(tmp_path/'results'/'concepts'/'photo-digits-smoke.json')['command'] == 'antehoc reproduce table3'
    again = run_concept_models('photo-digits', 'smoke', tmp_path/'results', tmp_path/'work')  # nothing is left to do
    assert [o['accuracy'] for o in again['results']['runs']] == [o['accuracy'] for o in rec['results']['runs']]
    assert (t.parameters >= t.parameters['plain CNN']).all()
    assert all(o['concepts']['size'] > 0 for o in rec['results']['runs'] if 'concepts' in o)
