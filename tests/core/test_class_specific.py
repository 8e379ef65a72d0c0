"""Maps that are asked about a class: what they may depend on, and that they learn to answer."""
import copy

import matplotlib.pyplot as plt
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
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from workers import scenes, small_cnn

from antehoc_nb.core.interpretation_loss import draw_targets, int_loss, int_losses
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import frozen
from antehoc_nb.core.weight_net import _along, weight_nets
from antehoc_nb.data.captions import CaptionLoss
from antehoc_nb.evaluate.explainers import explain_with
from antehoc_nb.show.plots import show_sams, show_weights
from antehoc_nb.train.checkpoint import Checkpoint
from antehoc_nb.train.learner import Bf16, antehoc_learner
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')


class RedOrBlue(nn.Module):
    "Class 0 is red, class 1 is blue, each seen by a layer of its own."
    def __init__(self):
        super().__init__()
        self.red, self.blue = (nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), nn.ReLU()) for _ in range(2))
        for layer, rgb in ((self.red, (1., -1, -1)), (self.blue, (-1., -1, 1))): layer[0].weight.data = torch.tensor(rgb)[None, :, None, None]

    def forward(self, x): return 40 * torch.cat([self.red(x).mean((2, 3)), self.blue(x).mean((2, 3))], 1)


def patches(n, seed=0):
    "(n,3,32,32): a red and a blue patch on grey, one in each half; and where the red one is"
    g = torch.Generator().manual_seed(seed)
    x, left = torch.full((n, 3, 32, 32), .2), torch.rand(n, generator=g) < .5
    for i in range(n):
        for channel, west in ((0, left[i]), (2, not left[i])):
            r, c = torch.randint(0, 22, (1,), generator=g).item(), torch.randint(0, 6, (1,), generator=g).item() + (0 if west else 16)
            x[i, :, r:r + 10, c:c + 10] = 0
            x[i, channel, r:r + 10, c:c + 10] = 1
    return x, left


def test_it_learns_to_show_what_it_is_asked_about():
    "On images with a patch of either colour, a map of red lies on the red patch and a map of blue on the blue one; a map of the whole has to lie on both."
    x, left = patches(512)
    loader = lambda: DataLoader([(o, torch.tensor(i % 2)) for i, o in enumerate(x)], bs=16, num_workers=0)
    share = {}
    for net in ('conditional', 'directed', 'informed'):
        set_seed(0)
        learn = Learner(DataLoaders(loader(), loader()), RedOrBlue(), loss_func=CrossEntropyLossFlat(),
                        cbs=TwoPass(layers=['red.1', 'blue.1'], weight_net=net, train_cnn=False))
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
        t, west = patches(64, seed=1)
        for c in (0, 1):
            m = learn.model.explain(t, target=c if learn.model.class_specific else None).map
            here = (west if c == 0 else ~west)[:, None, None, None] == (torch.arange(32) < 16)
            share[net, c] = ((m * here).sum() / m.sum()).item()
    assert min(share[net, c] for net in ('conditional', 'directed') for c in (0, 1)) > .8, share
    assert max(share['informed', c] for c in (0, 1)) < .7, share


class RedAndBlue(RedOrBlue):
    "Says 'red' (4) of red and 'blue' (5) of blue, at every place of a caption."
    n_words = 6

    def forward(self, x, tokens):
        out = x.new_zeros(len(x), tokens.shape[1] - 1, 6)
        out[..., 4:] = super().forward(x)[:, None]
        return out

    def find_target(self, target, out, tokens=None):
        t = (tokens if target is None else target)[:, 1:]
        return t.masked_fill(t < 4, -1)


def test_it_learns_to_show_what_a_word_is_about():
    "Every caption says 'red blue'; asked about one of the words, the map lies on the patch of that colour."
    x, _ = patches(512)
    tokens = torch.tensor([2, 4, 5, 3])
    loader = lambda: DataLoader([(o, tokens, tokens) for o in x], bs=16, num_workers=0)
    set_seed(0)
    dls = DataLoaders(loader(), loader())
    dls.n_inp = 2
    learn = Learner(dls, RedAndBlue(), loss_func=CaptionLoss(), cbs=TwoPass(layers=['red.1', 'blue.1'], weight_net='conditional', train_cnn=False))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(5, 1e-2)
    t, west = patches(64, seed=1)
    share = {}
    for word in (4, 5):
        m = learn.model.explain(t, tokens.expand(64, -1), target=torch.tensor([[2, word, 3]]).expand(64, -1)).map
        here = (west if word == 4 else ~west)[:, None, None, None] == (torch.arange(32) < 16)
        share[word] = ((m * here).sum() / m.sum()).item()
    assert min(share.values()) > .8, share


class Everywhere(nn.Module):
    "Two layers that respond to red and to blue alike, each in a channel of its own."
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Conv2d(n, 2, 1, bias=False), nn.ReLU()) for n in (3, 2))
        self.a[0].weight.data = torch.tensor([[1., -1, -1], [-1, -1, 1]])[:, :, None, None]
        self.b[0].weight.data = torch.eye(2)[:, :, None, None]

    def forward(self, x): return 40 * self.b(self.a(x)).mean((2, 3))


def test_what_no_choice_of_layers_can_show():
    "Both patches are bright in both layers: weighing layers cannot tell them apart, maps that are turned towards a class can."
    x, _ = patches(512)
    loader = lambda: DataLoader([(o, torch.tensor(i % 2)) for i, o in enumerate(x)], bs=16, num_workers=0)
    t, west = patches(64, seed=1)
    share = {}
    for net in ('conditional', 'directed'):
        set_seed(0)
        learn = Learner(DataLoaders(loader(), loader()), Everywhere(), loss_func=CrossEntropyLossFlat(),
                        cbs=TwoPass(layers=['a.1', 'b.1'], weight_net=net, train_cnn=False))
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
        for c in (0, 1):
            m = learn.model.explain(t, target=c).map
            here = (west if c == 0 else ~west)[:, None, None, None] == (torch.arange(32) < 16)
            share[net, c] = ((m * here).sum() / m.sum()).item()
    assert min(share['directed', c] for c in (0, 1)) > .7 and max(share['conditional', c] for c in (0, 1)) < .55, share


class Reddest(Everywhere):
    "Answers with red's amount alone, one number, though both of its layers respond to blue alike."
    def forward(self, x): return super().forward(x)[:, :1]


def test_a_turned_map_leaves_out_what_does_not_count():
    "The blue patch is as bright in both layers as the red one, and of no account: no choice of layers can darken it, a turned map can."
    x, _ = patches(512)
    loader = lambda: DataLoader([(o, torch.zeros(1)) for o in x], bs=16, num_workers=0)
    t, west = patches(64, seed=1)
    share = {}
    for net in ('informed', 'turned'):
        set_seed(0)
        learn = Learner(DataLoaders(loader(), loader()), Reddest(), loss_func=nn.MSELoss(),
                        cbs=TwoPass(layers=['a.1', 'b.1'], weight_net=net, mask='soft+capped+threshold', train_cnn=False))
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
        m = learn.model.explain(t).map
        share[net] = ((m * (west[:, None, None, None] == (torch.arange(32) < 16))).sum() / m.sum()).item()
    assert share['turned'] > .75 and share['informed'] < .55, share


def test_a_map_that_may_bend_is_trained_with_all_its_uses():
    "Unless another mask is asked for, or the learner's model cannot bend."
    loader = lambda: DataLoader([(torch.rand(3, 32, 32), torch.tensor(i % 10)) for i in range(4)], bs=2, num_workers=0)
    def mask(**kw): return Learner(DataLoaders(loader(), loader()), small_cnn(), loss_func=CrossEntropyLossFlat(), cbs=TwoPass(eta=2, **kw)).two_pass.mask
    assert [mask(weight_net=o) for o in ('directed', 'turned', 'conditional', 'autoencoder')] == ['soft+capped+threshold', 'soft+capped+threshold', 'soft+top_area', 'soft+top_area']
    assert mask(weight_net='directed', mask='soft+capped') == 'soft+capped' and mask(mask='soft') == 'soft'
    two = TwoPass()  # goes from a learner of one network to one of another
    for net, want in (('directed', ('soft+capped+threshold', 'cross_entropy')), ('turned', ('soft+capped+threshold', 'mse')), ('autoencoder', ('soft+top_area', 'mse'))):
        m = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), eta=2, weight_net=net)
        Learner(DataLoaders(loader(), loader()), m, loss_func=CrossEntropyLossFlat(), cbs=two)
        assert (two.mask, two.int_loss) == want


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_reaching_along_a_direction(layout):
    a, row = torch.randn(3, 5, 7, 4).to(memory_format=layout), torch.randn(3, 5)
    for r in (row, row[:1]): torch.testing.assert_close(_along(a, r), (a * r[:, :, None, None]).sum(1, keepdim=True))


@pytest.mark.parametrize('net, what, target', [('directed', 'asked', [1, 9]), ('turned', 'turned', None)])
def test_the_second_maps_are_named(net, what, target):
    m = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), eta=3, weight_net=net)
    e = m.explain(torch.rand(2, 3, 40, 32), target=target)
    assert e.sams.shape == e.weights.shape == (2, 6, 40, 32) and e.layers == (*m.layers, *(f'{o}, {what}' for o in m.layers))
    assert len(e.sizes) == 6 and e.sizes[3:] == e.sizes[:3]
    torch.testing.assert_close(e.weights.sum(1), torch.ones(2, 40, 32))
    torch.testing.assert_close(e.sams[:, 3:], e.sams[:, :3], atol=1e-5, rtol=1e-4)  # before it is trained
    show_sams(e[0]), show_weights(e[0])
    titles = [ax.get_title() for ax in plt.gcf().axes]
    assert sum(f'{m.layers[-1]}, {what}' in o for o in titles) == 1, titles
    plt.close('all')


@given(st.integers(1, 3), st.integers(2, 6), st.integers(0, 2**30))
def test_evidence_is_the_projection_written_out(b, classes, seed):
    "The extra map of a layer: at every place, the normalised activation's scalar product with the direction of the class that is asked about."
    torch.manual_seed(seed)
    net, a = weight_nets['conditional'](2, channels=(5, 3), classes=classes), torch.randn(b, 5, 4, 3)
    target = torch.randint(0, classes, (b,))
    seen, norm = net.see(0, a, target), F.group_norm(a, 1, *net.views[0][0].parameters())
    assert seen.shape == (b, 9, 4, 3)
    for i in range(b):
        for r in range(4):
            for c in range(3):
                by_hand = sum(norm[i, k, r, c] * net.evidence[0].weight[target[i], k] for k in range(5))
                torch.testing.assert_close(seen[i, 8, r, c], by_hand, atol=1e-5, rtol=1e-4)


def test_only_what_is_asked_learns():
    "The directions of classes that were not asked about get no gradient, nor does the CNN."
    m = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), eta=3, weight_net='conditional')
    nn.init.normal_(m.weight_net.out.weight)
    x, asked = torch.rand(4, 3, 32, 32), torch.tensor([1, 7, 7, 1])
    m.recording = True
    m(x)
    i_map, *_ = m.interpret([(s.detach(), a.detach()) for s, a in m.take_sams()], (32, 32), asked)
    with frozen(m.cnn): int_loss(m.cnn(m.mask(x, i_map)), asked, 'cross_entropy').backward()
    for e in [*m.weight_net.evidence, m.weight_net.target_embedding]:
        moved = e.weight.grad.abs().sum(1) > 0
        assert moved.nonzero().flatten().tolist() == [1, 7]
    assert all(p.grad is None for p in m.cnn.parameters())


def test_one_forward_pass_whatever_is_asked():
    calls, cnn = [], small_cnn()
    cnn.register_forward_hook(lambda *a: calls.append(1))
    m = AntehocModel(cnn, torch.rand(2, 3, 32, 32), eta=3, weight_net='conditional')
    nn.init.normal_(m.weight_net.out.weight)
    calls.clear()
    x = torch.rand(3, 3, 32, 32)
    e = m.explain(x)
    assert len(calls) == 1 and torch.equal(e.target, e.pred.argmax(1))
    torch.testing.assert_close(explain_with('ante-hoc', m, x, e.target), e.map)
    torch.testing.assert_close(explain_with('ante-hoc', m, x), e.map)  # by default what is predicted
    other = explain_with('ante-hoc', m, x, (e.target + 1) % 10)
    assert (other - e.map).abs().max() > 1e-3
    assert len(e.cpu().target) == 3 and e[1].target.tolist() == e.target[1:2].tolist()


def test_names_of_classes():
    m = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), eta=3, weight_net='conditional', meta=dict(vocab=list('abcdefghij')))
    x = torch.rand(2, 3, 32, 32)
    assert m.explain(x, target='c').target.tolist() == [2, 2] and m.explain(x, target=['j', 'a']).target.tolist() == [9, 0]
    with pytest.raises(ValueError, match="unknown class 'k'"): m.explain(x, target='k')
    few = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), eta=3, weight_net='conditional', meta=dict(vocab=['a', 'b']))  # fewer names than classes
    assert few.explain(x, target=9).target.tolist() == [9, 9]
    with pytest.raises(ValueError, match='lie in 0..9 for this model, got 10'): few.explain(x, target=10)
    nameless = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), eta=3, weight_net='conditional')
    with pytest.raises(ValueError, match="target='c': this model has no class names; give numbers"): nameless.explain(x, target='c')


def test_a_learner_is_asked_by_name():
    "By the names of its own DataLoaders; the titles say what was asked."
    learn = antehoc_learner(scenes(32), small_cnn(), eta=3, weight_net='conditional')
    nn.init.normal_(learn.model.weight_net.out.weight)
    e = learn.explain(n=4, target='7')
    assert e.target.tolist() == [7] * 4 and torch.equal(e.map, learn.explain(n=4, target=[7] * 4).map)
    assert (e.map - learn.explain(n=4).map).abs().max() > 1e-3
    titles = [ax.get_title(side) for ax in learn.show_maps(n=4, target='7').flat for side in ('left', 'center')]
    assert sum(t.endswith('target 7') for t in titles) == 4, titles
    with pytest.raises(ValueError, match="unknown class 'seven'"): learn.explain(n=4, target='seven')


def test_another_model_on_the_same_callback():
    "The loss follows the weight network, unless it was given."
    learn = antehoc_learner(scenes(32), small_cnn(), eta=3)
    assert learn.two_pass.int_loss == 'mse'
    learn.model = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), eta=3, weight_net='conditional')
    learn.two_pass.model_kwargs = {}
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.two_pass.int_loss == 'cross_entropy'


@pytest.mark.parametrize('labels', [lambda y: y.float(), lambda y: F.one_hot(y, 10).float()], ids=['regression', 'multi-label'])
def test_labels_that_are_not_one_class_per_image(labels):
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    dl = DataLoader(list(zip(x, labels(y))), bs=4, num_workers=0)
    loss = nn.BCEWithLogitsLoss() if labels(y).ndim == 2 else lambda p, t: F.mse_loss(p[:, 0], t)
    learn = Learner(DataLoaders(dl, dl), small_cnn(), loss_func=loss, cbs=TwoPass(eta=3, weight_net='conditional'))
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='asked about one class per image: labels must be class numbers'): learn.fit(1)


both_nets = pytest.mark.parametrize('net', ['conditional', 'directed'])


@both_nets
@pytest.mark.parametrize('cbs', [[Bf16()], [GradientAccumulation(64)]], ids=['bf16', 'accumulation'])
def test_it_trains_alike(cbs, net):
    learn = antehoc_learner(scenes(64), small_cnn(), eta=3, weight_net=net, cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
    assert learn.model.weight_net.out.weight.abs().max() > 0 and all(p.isfinite().all() for p in learn.model.parameters())


@both_nets
def test_a_run_that_was_cut_asks_the_same_questions(tmp_path, net):
    "Interrupted and resumed, the weights end the same to the bit."
    def run(*cbs):
        set_seed(0)
        learn = antehoc_learner(scenes(64), small_cnn(), eta=3, weight_net=net, cbs=cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
        return learn.model.state_dict()

    class Cut(Callback):
        order = 90
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 1: raise KeyboardInterrupt
    whole = run()
    with pytest.raises(KeyboardInterrupt): run(Checkpoint(tmp_path/'c'), Cut())
    torch.randn(99)
    again = run(Checkpoint(tmp_path/'c'))
    assert all(torch.equal(v, again[k]) for k, v in whole.items())


@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 10**6), st.integers(0, 2**30))
def test_questions_about_words(b, T, start, seed):
    "All the words that can be asked about, or one of them; never what cannot."
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(-1, 5, (b, T), generator=g)
    asked = draw_targets(torch.zeros(b, T, 5), words, torch.arange(start, start + b))
    for row, w in zip(asked, words):
        on = row >= 0
        assert torch.equal(row[on], w[on]) and (on & (w < 0)).sum() == 0
        assert torch.equal(row, w) or on.sum() == 1
    assert torch.equal(draw_targets(torch.zeros(b, T, 5), words, None), words)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**30))
def test_cross_entropy_of_words_written_out(b, T, seed):
    torch.manual_seed(seed)
    y2, asked = torch.randn(b, T, 7), torch.randint(-3, 7, (b, T), dtype=torch.int32)
    lp = y2.log_softmax(2)
    each = [[-lp[i, t, w].item() for t, w in enumerate(asked[i].tolist()) if w >= 0] for i in range(b)]
    want = sum(sum(e) / len(e) for e in each if e) / b
    assert int_losses['cross_entropy'](y2, asked).item() == pytest.approx(want, abs=1e-4)


def test_an_image_without_a_response_spoils_nothing():
    "Where a layer is flat, maps are 0 and gradients finite, those of the other images included."
    m = AntehocModel(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                   nn.Linear(4, 3)), torch.rand(2, 3, 32, 32), eta=2, weight_net='directed')
    nn.init.normal_(m.weight_net.out.weight)
    for norm, _ in m.weight_net.views: nn.init.normal_(norm.bias)  # as if it were trained
    x = torch.rand(3, 3, 32, 32)
    x[1] = 0
    m.recording = True
    m(x)
    asked = torch.tensor([0, 1, 2])
    i_map, _, sams = m.interpret([(s.detach(), a.detach()) for s, a in m.take_sams()], (32, 32), asked)
    assert (sams[1] == 0).all() and i_map.isfinite().all()
    with frozen(m.cnn): int_loss(m.cnn(m.mask(x, i_map)), asked, 'cross_entropy').backward()
    grads = [p.grad for p in m.weight_net.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads) and max(g.abs().max() for g in grads) < 1e3
    assert all(e.weight.grad[0].abs().sum() > 0 for e in m.weight_net.evidence)


def test_the_second_maps_follow_the_models_settings():
    x = torch.rand(2, 3, 32, 32)
    for temperature in (1., 5.):
        e = AntehocModel(small_cnn(), x, eta=3, weight_net='directed', temperature=temperature).explain(x)
        torch.testing.assert_close(e.sams[:, 3:], e.sams[:, :3], atol=1e-5, rtol=1e-4)
    m = AntehocModel(small_cnn(), x, eta=3, weight_net='directed').half()
    assert m.explain(x.half() * 300).map.isfinite().all()


def test_a_network_of_ones_own_is_asked_too():
    "One that reads no activations, and a CNN with a submodule that is called `question`."
    class two_moods(nn.Module):
        class_specific = True
        def __init__(self, eta, classes):
            super().__init__()
            self.mood = nn.Embedding(classes, eta)

        def forward(self, sams, target): return self.mood(target)[:, :, None, None]

    weight_nets.register(two_moods)
    try:
        cnn = small_cnn()
        cnn.question = nn.Identity()
        m = AntehocModel(cnn, torch.rand(2, 3, 32, 32), eta=3, weight_net='two_moods')
        e = m.explain(torch.rand(2, 3, 32, 32), target=[3, 4])
        assert (e.weights[0] - e.weights[1]).abs().max() > .01
    finally: del weight_nets['two_moods']


@given(st.integers(1, 8), st.integers(2, 12), st.integers(0, 10**6))
def test_questions_are_classes(b, k, start):
    y1, label, i = torch.randn(b, k) * 5, torch.randint(0, k, (b,)), torch.arange(start, start + b)
    for labels in (label, label.int(), label.byte(), None, torch.full((b,), -100)):
        for at in (i, None):
            asked = draw_targets(y1, labels, at)
            assert asked.shape == (b,) and asked.dtype == torch.int64 and 0 <= asked.min() and asked.max() < k
            assert torch.equal(asked, draw_targets(y1, labels, at))  # nothing is drawn from a stream
    assert torch.equal(draw_targets(y1, label.int(), None), label)
    assert torch.equal(draw_targets(y1, None, None), y1.argmax(1))


@both_nets
def test_a_model_goes_through_files_and_copies(tmp_path, net):
    m = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), eta=3, weight_net=net)
    nn.init.normal_(m.weight_net.out.weight)
    x = torch.rand(2, 3, 32, 32)
    want = m.eval().explain(x, target=4).map
    assert m.config['classes'] == 10
    seen = [(torch.rand(2, 1, 8, 8), torch.rand(2, 8, 8, 8))] * 3
    with pytest.raises(ValueError, match='interpret: .* is asked about a class, give target'): m.interpret(seen, (32, 32))
    for o in (AntehocModel.from_pretrained(m.save_pretrained(tmp_path/'m'), cnn=small_cnn()), copy.deepcopy(m)):
        assert torch.equal(o.explain(x, target=4).map, want)


def test_what_cannot_be_asked():
    x = torch.rand(2, 3, 32, 32)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r'a CNN that gives logits \(B,K\), K > 1, is needed, got \(2, 4, 28, 28\)'):
        AntehocModel(dense, x, eta=2, weight_net='conditional')
    with pytest.raises(ValueError, match="weight_net='conditional' has to know the channels: give channels=, or a sample"):
        AntehocModel(small_cnn(), False, layers=['0'], weight_net='conditional')
    with pytest.raises(ValueError, match='has to know the classes'): AntehocModel(small_cnn(), False, layers=['0'], weight_net='conditional', channels=[8])
    with pytest.raises(ValueError, match="int_loss='mse_prob' .* cannot train weight_net='conditional'"):
        antehoc_learner(scenes(32), small_cnn(), eta=3, weight_net='conditional', int_loss='mse_prob')
