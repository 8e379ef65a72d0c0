"""What any model must hold to, whatever the images, the thread or the process."""
import copy
import gc
import json
import multiprocessing
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import nn
from workers import explain_elsewhere, small_cnn

from antehoc_nb.core.attention import soft_attentions
from antehoc_nb.core.model import AntehocModel, Explanation
from antehoc_nb.core.utils import as_normalisation, eval_mode
from antehoc_nb.core.weight_net import interpretation_map, weight_nets

FEW = settings(max_examples=15)
# noise is no image, and the CNNs of these tests have no names: both are said, and tested in test_images_in.py
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:explain'),
              pytest.mark.filterwarnings('ignore:save_pretrained')]


def small_model(eta=3, c=3, **kwargs):
    return AntehocModel(small_cnn(c=c), sample=torch.rand(2, c, 32, 32), eta=eta, **kwargs)


def noisy(model, std=.3):
    "A weight network with random weights, as if it were trained."
    for p in model.weight_net.parameters(): nn.init.normal_(p, std=std)
    return model


def images(b, c, h, w, kind='noise', seed=0):
    x = torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(seed))
    return dict(noise=x, black=torch.zeros_like(x), flat=torch.full_like(x, 3.), huge=x * 1e4, tiny=x * 1e-6)[kind]


# --- Invariant 3: shapes and ranges

@pytest.fixture(scope='module')
def models():
    made = {}

    def get(c, eta, attention='softmax', weight_net='paper', scale=True):
        key = c, eta, attention, weight_net, scale
        if key not in made:
            torch.manual_seed(0)
            settings = dict(soft_attention=attention, weight_net=weight_net, scale=scale)
            made[key] = noisy(small_model(eta, c, **settings))
        return made[key]
    return get


def check(e, x, eta):
    B, C, H, W = x.shape
    assert e.map.shape == (B, 1, H, W) and e.sams.shape == e.weights.shape and e.sams.shape[:2] == (B, eta)
    for maps in (e.map, e.sams, e.weights):
        assert maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1 + 1e-6 and not maps.requires_grad
    assert e.map.max() <= 1
    torch.testing.assert_close(e.weights.sum(1), torch.ones_like(e.weights[:, 0]), atol=1e-5, rtol=0)
    assert e.energy.shape == e.binarised.shape == e.pixels.shape == e.image.shape == x.shape
    assert e.binary_map.dtype == torch.bool and len(e) == B


@FEW
@given(b=st.integers(1, 3), c=st.sampled_from([1, 3, 4]), h=st.integers(9, 75), w=st.integers(9, 75),
       eta=st.integers(1, 3), kind=st.sampled_from(['noise', 'black', 'flat', 'huge', 'tiny']), scale=st.booleans())
def test_shapes_and_ranges(models, b, c, h, w, eta, kind, scale):
    x, m = images(b, c, h, w, kind), models(c, eta, scale=scale)
    e = m.explain(x)
    check(e, x, eta)
    assert torch.equal(e.pred, m.cnn.eval()(x))
    if scale: # min-max scaled: from 0 to 1 exactly, or a constant 0
        highest = e.map.amax((1, 2, 3))
        assert (e.map.amin((1, 2, 3)) == 0).all() and ((highest == 1) | (highest == 0)).all()


@pytest.mark.parametrize('attention', list(soft_attentions))
@pytest.mark.parametrize('weight_net', list(weight_nets))
def test_every_choice(models, attention, weight_net):
    m = models(3, 2, attention, weight_net)
    for x in (images(2, 3, 33, 50), images(1, 3, 16, 9, 'black')): check(m.explain(x), x, 2 * (1 + m.modulates))


@FEW
@given(b=st.integers(1, 3), eta=st.integers(1, 9), h=st.integers(1, 40), w=st.integers(1, 40),
       name=st.sampled_from(list(weight_nets)), spread=st.sampled_from([.01, 1., 30.]))
def test_equation_1(b, eta, h, w, name, spread):
    "Against the sum written out; weight networks take any size, down to a pixel."
    torch.manual_seed(1)
    kind = weight_nets[name]
    n = eta * (1 + getattr(kind, 'modulates', False))  # maps to blend
    sams, inputs = torch.rand(b, n, h, w), []
    if name == 'auto':
        weight_net = kind(eta, channels=[3] * eta, classes=4)
        inputs = [torch.randn(b, 8 * eta, h, w), torch.randn(b, 3), torch.arange(b) % 4]
    else: weight_net = kind(eta)
    for p in weight_net.parameters(): nn.init.normal_(p, std=spread)
    m, weights = interpretation_map(sams, weight_net(sams, *inputs), scale=False)
    torch.testing.assert_close(weights.sum(1), torch.ones(b, h, w), atol=1e-5, rtol=0)
    torch.testing.assert_close(m[:, 0], sum(weights[:, i] * sams[:, i] for i in range(n)))
    assert m.min() >= sams.min() - 1e-6 and m.max() <= sams.max() + 1e-6  # a weighted mean stays between its parts


@FEW
@given(b=st.integers(2, 5), seed=st.integers(0, 99), cut=st.floats(.05, 1.))
def test_images_do_not_see_each_other(models, b, seed, cut):
    m, x = models(3, 3), images(b, 3, 24, 31, seed=seed)
    e = m.explain(x, threshold=cut)
    for i in range(b):
        torch.testing.assert_close(m.explain(x[i:i+1]).map, e.map[i:i+1], atol=2e-4, rtol=0)
        assert torch.equal(e[i].map, e.map[i:i+1]) and torch.equal(e[i].pred, e.pred[i:i+1])
        assert e[i].threshold == cut
    assert torch.equal(e[1:].weights, e.weights[1:]) and len(e[1:]) == b - 1
    assert torch.equal(e.binary_map, e.map >= cut)


@FEW
@given(c=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_masked_images_are_black_in_pixel_space(c, seed):
    torch.manual_seed(seed)
    mean, std = torch.rand(c).tolist(), (torch.rand(c) + .1).tolist()
    m = small_model(2, c, mean=mean, std=std)
    pixels = torch.rand(2, c, 20, 12)
    x = (pixels - m.mean)/m.std
    e = m.explain(x)
    torch.testing.assert_close(e.energy*m.std + m.mean, pixels*e.map, atol=1e-5, rtol=0)
    torch.testing.assert_close(e.binarised*m.std + m.mean, pixels*e.binary_map, atol=1e-5, rtol=0)
    torch.testing.assert_close(m.mask(x, e.map), e.energy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(e.pixels, pixels, atol=1e-5, rtol=0)


# --- Invariant 4: nothing is left behind

def n_tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def resident():
    "Bytes of memory that this process holds."
    return int(Path('/proc/self/statm').read_text().split()[1])*4096


@pytest.mark.slow
def test_thousand_explanations_leave_memory_flat():
    m, x = small_model(), torch.rand(4, 3, 48, 48)
    for _ in range(25): m.explain(x)
    linux = sys.platform == 'linux'
    tensors = n_tensors()
    before = resident() if linux else 0
    for _ in range(200): m.explain(x)  # four images each
    # one map of 48 x 48 kept per explanation would be 7 MiB, one activation 58
    if linux: assert resident() - before < 6 * 2**20
    tracemalloc.start()
    try:
        for _ in range(50): m.explain(x)  # what replaces something older counts as new, once
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(300): m.explain(x)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        assert after - before < 300 * 70  # not even a small object each; Python caches some names
    finally: tracemalloc.stop()
    assert n_tensors() == tensors
    assert not any(o._forward_hooks or o._forward_pre_hooks or o._backward_hooks for o in m.modules())


def test_explanation_keeps_no_graph_and_no_activation():
    m = small_model()
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    e = m.explain(x)
    for tensor in (e.pred, e.map, e.sams, e.weights): assert tensor.grad_fn is None and not tensor.requires_grad
    assert all(p.grad is None for p in m.parameters()) and x.grad is None and m._last_recorded is None


@pytest.mark.parametrize('where', ['cnn', 'weight_net', 'attention'])
def test_error_leaves_nothing_behind(where, monkeypatch):
    m = small_model(weight_net='paper')  # which takes the soft attention of each layer as it runs
    m.train()
    m.cnn[0][1].eval()  # a frozen batch norm
    modes = [o.training for o in m.modules()]

    def fail(*a, **k): raise ZeroDivisionError
    if where == 'attention': monkeypatch.setitem(soft_attentions, m.soft_attention, fail)
    else: monkeypatch.setattr(m.cnn[2] if where == 'cnn' else m.weight_net, 'forward', fail)
    with pytest.raises(ZeroDivisionError): m.explain(torch.rand(1, 3, 32, 32))
    assert [o.training for o in m.modules()] == modes
    assert not any(o._forward_hooks for o in m.modules())
    monkeypatch.undo()
    m.explain(torch.rand(1, 3, 32, 32))


# --- Invariant 5: any mode, any thread

def test_same_result_in_every_mode():
    m, x = noisy(small_model()), torch.rand(2, 3, 40, 30)
    want = m.eval().explain(x)
    got = [m.train().explain(x)]
    with torch.inference_mode(): got.append(m.explain(x))
    with torch.no_grad(): got.append(m.explain(x))
    with torch.inference_mode(): y = x.clone()
    got.append(m.explain(y))
    got.append(m.requires_grad_(False).explain(x))
    got.append(copy.deepcopy(m).explain(x))
    for e in got:
        assert torch.equal(e.map, want.map) and torch.equal(e.pred, want.pred) and torch.equal(e.weights, want.weights)
    assert m.training


@pytest.mark.parametrize('training', [False, True])
def test_threads_share_a_model(training):
    "Several threads explain other images with one model: each gets its own result, and the model is left as it was."
    m = noisy(small_model()).train(training)
    m.cnn[0][1].eval()
    modes, state = [o.training for o in m.modules()], copy.deepcopy(m.state_dict())
    xs = [torch.rand(2, 3, 40 + 8 * i, 40) for i in range(6)]
    want = [m.explain(x) for x in xs]
    wrong, barrier = [], threading.Barrier(len(xs))

    def work(i):
        barrier.wait()
        for _ in range(25):
            try:
                e = m.explain(xs[i])
                if not (torch.equal(e.map, want[i].map) and torch.equal(e.pred, want[i].pred)): wrong.append(i)
            except Exception as error: wrong.append(repr(error))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    finally: sys.setswitchinterval(interval)
    assert not wrong, f'{len(wrong)} of {25 * len(xs)} explanations differ, such as {wrong[0]}'
    assert [o.training for o in m.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert not any(o._forward_hooks for o in m.modules())


def test_evaluating_blocks_overlap():
    "Blocks that end in another order than nested, as threads' do."
    m = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    m[1].eval()
    first, second = eval_mode(m), eval_mode(m)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(o.training for o in m.modules()), 'the second block is still open'
    second.__exit__(None, None, None)
    assert [o.training for o in m.modules()] == [True, True, False]


# --- Invariant 6: saved and loaded

@FEW
@given(eta=st.integers(1, 3), attention=st.sampled_from(list(soft_attentions)),
       weight_net=st.sampled_from(list(weight_nets)), scale=st.booleans(), temperature=st.floats(.3, 5.),
       grey=st.booleans(), normalised=st.booleans())
def test_saved_and_loaded_to_the_bit(tmp_path_factory, eta, attention, weight_net, scale, temperature, grey,
                                     normalised):
    c = 1 if grey else 3
    settings = dict(soft_attention=attention, weight_net=weight_net, scale=scale, temperature=temperature)
    if normalised: settings |= dict(mean=[.1] * c, std=[.3] * c)
    m = noisy(small_model(eta, c, meta=dict(vocab=[*'äbcdefghij'], size=[24, 32]), **settings))
    x = torch.rand(2, c, 24, 32)
    m.cnn.train()(x)  # statistics of its own
    folder = m.save_pretrained(tmp_path_factory.mktemp('m'))
    n = AntehocModel.from_pretrained(folder, cnn=small_cnn(c=c))
    a, b = m.explain(x, threshold=.5), n.explain(x, threshold=.5)
    for name in ('pred', 'map', 'sams', 'weights', 'energy', 'binarised', 'mean', 'std', 'black'):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert n.config == m.config and a.layers == b.layers and not n.training


def test_untrained_directions_are_not_stored(tmp_path):
    "Large tensors of zeros are left out of the file; what is loaded is equal to the bit, also from a file with them."
    m = AntehocModel(small_cnn(600), torch.randn(2, 3, 32, 32), meta=dict(size=[32, 32]))
    name = 'weight_net.read.class_directions.weight'
    with torch.no_grad(): m.cnn[6].weight.fill_(-0.)  # zeros with a sign are others
    file = m.save_pretrained(tmp_path/'m')/'model.safetensors'
    left_out = {name, 'weight_net.surrogate.scores.weight'}
    with safe_open(file, 'pt') as stored: assert {*m.state_dict()} - {*stored.keys()} == left_out

    def loaded(): return AntehocModel.from_pretrained(tmp_path/'m', cnn=small_cnn(600)).state_dict()

    def assert_loaded():
        found = loaded()
        for key, tensor in m.state_dict().items():
            assert torch.equal(found[key], tensor) and torch.equal(found[key].signbit(), tensor.signbit()), key
    assert_loaded()
    small = file.stat().st_size
    save_model(m, str(file))  # as files were written before
    assert file.stat().st_size - small > .9 * sum(m.state_dict()[name].nbytes for name in left_out)
    assert_loaded()
    with torch.no_grad(): m.weight_net.read.class_directions.weight[5] = 1
    m.save_pretrained(tmp_path/'m')
    assert_loaded()
    with torch.no_grad(): m.weight_net.read.class_directions.weight.zero_()
    m.save_pretrained(tmp_path/'m')
    with safe_open(file, 'pt') as stored: kept = {key: stored.get_tensor(key) for key in stored.keys()}
    for left_out in ([name, 'more'], []):  # a name that is not there, and a tensor that is missing
        save_file(kept, file, metadata=dict(zeros=json.dumps(left_out)))
        with pytest.raises(ValueError, match='does not fit the CNN'): loaded()


def test_saved_and_loaded_in_another_process(tmp_path):
    m, x = noisy(small_model(mean=[.5]*3, std=[.2]*3)), torch.randn(2, 3, 50, 37)
    m.cnn.train()(x)
    m.save_pretrained(tmp_path)
    torch.save(x, tmp_path/'x.pt')
    e = m.explain(x)
    methods = multiprocessing.get_all_start_methods()
    ctx = multiprocessing.get_context('forkserver' if 'forkserver' in methods else 'spawn')
    process = ctx.Process(target=explain_elsewhere, args=(tmp_path, 1))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    pred, i_map, weights = torch.load(tmp_path/'elsewhere.pt')
    assert torch.equal(pred, e.pred) and torch.equal(i_map, e.map) and torch.equal(weights, e.weights)


# --- Inputs and outputs of any kind

class Pair(nn.Module):
    "Two images in (the first is explained), nested outputs of both floats and integers."
    def __init__(self):
        super().__init__()
        self.a, self.b = small_cnn(4), nn.Conv2d(1, 2, 3)

    def forward(self, x, depth, *, gain=1.):
        return dict(pair=(self.a(x) * gain, self.b(depth)), rank=[torch.arange(len(x))], note='kept')


def test_inputs_and_outputs_of_any_kind():
    m = AntehocModel(Pair(), (torch.rand(2, 3, 32, 32), torch.rand(2, 1, 8, 8)), eta=3)
    x, depth = torch.rand(3, 3, 32, 40), torch.rand(3, 1, 8, 8)
    e = m.explain(x, depth, gain=2.)
    check(e, x, 6)
    m.eval()
    assert torch.equal(e.pred['pair'][0], m(x, depth, gain=2.)['pair'][0]) and e.pred['note'] == 'kept'
    one = e[1]
    assert isinstance(one, Explanation) and one.pred['pair'][1].shape == (1, 2, 6, 6)
    assert one.pred['rank'][0].tolist() == [1] and one.pred['note'] == 'kept'


class Siamese(nn.Module):
    "Two images, each through a branch of its own or both through one."
    def __init__(self, shared):
        super().__init__()
        self.a = small_cnn(4)
        self.b = self.a if shared else small_cnn(4)

    def forward(self, x, other): return self.b(other) - self.a(x)


@pytest.mark.parametrize('shared', [False, True])
def test_layers_come_from_the_image_that_is_explained(shared):
    cnn, x, other = Siamese(shared).eval(), torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    m = AntehocModel(cnn, (x, other), eta=3, evidence=False)  # the evidence follows the scores, so both images
    assert all(o.startswith('a.') and not o.endswith(':0') for o in m.layers)  # the other image runs first
    assert torch.equal(m.explain(x, other).map, m.explain(x, torch.rand(2, 3, 32, 32)).map)
    assert all(p.requires_grad and p.grad is None for p in cnn.parameters())


class Flat(nn.Module):
    "Takes 32 x 32 images and a number, nothing else."
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4 * 32 * 32 + 1, 2)

    def forward(self, x, age): return self.head(torch.cat([self.conv(x).flatten(1), age], 1))


def test_loading_does_not_run_the_cnn(tmp_path):
    x, age = torch.rand(2, 3, 32, 32), torch.rand(2, 1)
    m = noisy(AntehocModel(Flat(), (x, age), eta=2))
    m.save_pretrained(tmp_path)
    e, f = m.explain(x, age), AntehocModel.from_pretrained(tmp_path, cnn=Flat()).explain(x, age)
    assert torch.equal(e.map, f.map) and torch.equal(e.pred, f.pred)
    with pytest.raises(ValueError, match="does not fit the CNN, or was edited: unknown layer 'conv.1'"):
        AntehocModel.from_pretrained(tmp_path, cnn=small_cnn())


@pytest.mark.parametrize('edit, message', [
    (dict(meta=None), 'was not built by name'), (dict(meta=dict(cnn=dict(arch='resnet18'))), 'was edited: .*n_out'),
    (dict(meta=dict(cnn=5)), 'was edited'), (dict(colour=1), 'was edited: .*colour'),
    (dict(temperature='x'), 'was edited')])
def test_edited_configurations_are_refused(tmp_path, edit, message):
    small_model().save_pretrained(tmp_path)
    config = tmp_path/'config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | edit))
    cnn = None if 'meta' in edit else small_cnn()
    with pytest.raises(ValueError, match=message): AntehocModel.from_pretrained(tmp_path, cnn=cnn)


def test_memory_format_survives_saving(tmp_path):
    m = noisy(small_model()).to(memory_format=torch.channels_last)
    x = torch.rand(4, 3, 32, 32)
    m.save_pretrained(tmp_path)
    e, f = m.explain(x), AntehocModel.from_pretrained(tmp_path, cnn=small_cnn()).explain(x)
    assert m.config['channels_last'] and torch.equal(e.map, f.map) and torch.equal(e.pred, f.pred)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    m, x = noisy(small_model()), torch.rand(2, 3, 32, 32)
    want = m.explain(x).map
    e = m.to(dtype).explain(x.to(dtype))
    torch.testing.assert_close(e.map.float(), want, atol=.2 if dtype is torch.bfloat16 else 1e-4, rtol=0)


def test_a_cnn_that_writes_to_its_input():
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_cnn()

        def forward(self, x): return self.body(x.mul_(0.))
    x = torch.rand(2, 3, 32, 32)
    e = AntehocModel(Greedy(), torch.rand(2, 3, 32, 32), eta=2).explain(x)
    assert e.image.abs().max() > 0 and e.image is x


def test_one_image_of_many():
    e = small_model().explain(torch.rand(3, 3, 32, 32))
    e.pred = dict(logits=e.pred, scale=torch.tensor(2.))
    one = e[torch.tensor(1).numpy()[()]]
    assert one.map.shape == (1, 1, 32, 32) and one.pred['logits'].shape[0] == 1 and one.pred['scale'] == 2


@pytest.mark.parametrize('kwargs, message', [
    (dict(eta=2.5), 'eta=2.5: give a whole number'), (dict(eta=True), 'eta=True: give a whole number'),
    (dict(temperature=float('nan')), 'temperature=nan: give a number above 0'),
    (dict(layers='9.9'), "unknown layer '9.9'"),
    (dict(mean=[0] * 3, std=[1, 0, 1]), 'std above 0'), (dict(mean=[0.], std=[1] * 3), 'as many of each'),
    (dict(grids=[None]), 'grids: 1 given for 2 layers')])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), **dict(eta=2) | kwargs)


THREE, RGB = [.5, .4, .3], (1, 3, 1, 1)
ONE_EACH = 'give a number for each channel, such as {}=[0.5, 0.5, 0.5]'


@pytest.mark.parametrize('mean', [
    THREE, tuple(THREE), np.array(THREE), np.array(THREE).reshape(RGB), np.float32(THREE)[None], torch.tensor(THREE),
    torch.tensor(THREE).view(RGB), torch.tensor(THREE).view(3, 1, 1), torch.tensor(THREE, dtype=torch.float64),
    torch.tensor(THREE, requires_grad=True), [torch.tensor(value) for value in THREE]], ids=str)
@pytest.mark.parametrize('std', [.2, torch.tensor(.2), [.2] * 3], ids=str)
def test_normalisation_of_every_kind(mean, std):
    means, stds = as_normalisation(mean, std, 3)
    assert torch.equal(means, torch.tensor(THREE).view(RGB)) and torch.equal(stds, torch.full(RGB, .2))
    assert not means.requires_grad and means.dtype == torch.float32


def test_a_model_takes_normalisation_as_tensors():
    x, as_tensors = torch.rand(2, 3, 32, 32), [torch.tensor(values).view(RGB) for values in (THREE, [.2] * 3)]
    model = AntehocModel(small_cnn(), x, mean=as_tensors[0], std=as_tensors[1])
    assert torch.equal(model.mean, as_tensors[0]) and torch.equal(model.std, as_tensors[1])
    assert model.config['mean'] == pytest.approx(THREE) and model.explain(x).map.isfinite().all()


def test_one_number_is_for_all_channels():
    model = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), mean=.5, std=np.float64(.5))
    assert model.mean.shape == model.std.shape == (1, 1, 1, 1)
    given = torch.tensor(THREE)
    model = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), mean=given, std=.2)
    given.zero_()  # is the caller's own
    assert model.mean.flatten().tolist() == pytest.approx(THREE)


@pytest.mark.parametrize('mean, std, error, message', [
    (THREE, None, ValueError, 'mean and std go together: give both or neither'),
    ([.5] * 2, [.2] * 2, ValueError, 'mean=[0.5, 0.5], std=[0.2, 0.2]: the images have 3 channels; give 3 of each'),
    ([.5] * 4, [1.] * 4, ValueError, 'mean=[0.5, 0.5, 0.5, 0.5], std=[1.0, 1.0, 1.0, 1.0]: the images have 3 channels; '
                                     'give 3 of each'),
    (THREE, [.2], ValueError, 'mean=[0.5, 0.4, 0.3], std=[0.2]: give as many of each as the images have channels, '
                              'std above 0'),
    (.5, 0, ValueError, 'mean=[0.5], std=[0.0]: give as many of each as the images have channels, std above 0'),
    (THREE, torch.tensor([.2, .2, -.2]), ValueError, 'mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, -0.2]: give as many of '
                                                     'each as the images have channels, std above 0'),
    ([float('nan')] * 3, .2, ValueError, 'mean=[nan, nan, nan], std=[0.2]: give finite numbers'),
    (.5, np.inf, ValueError, 'mean=[0.5], std=[inf]: give finite numbers'),
    (torch.ones(2, 3), .2, ValueError, 'mean: its shape is (2, 3); ' + ONE_EACH.format('mean')),
    (.5, torch.ones(1, 3, 8, 8), ValueError, 'std: its shape is (1, 3, 8, 8); ' + ONE_EACH.format('std')),
    ([], [], ValueError, 'mean: its shape is (0,); ' + ONE_EACH.format('mean')),
    ('imagenet', 'imagenet', TypeError, "mean='imagenet': " + ONE_EACH.format('mean')),
    (THREE, dict(r=.2), TypeError, "std={'r': 0.2}: " + ONE_EACH.format('std')),
    ([None] * 3, .2, TypeError, 'mean=[None, None, None]: ' + ONE_EACH.format('mean')),
    ([[.5], THREE], .2, TypeError, 'mean=[[0.5], [0.5, 0.4, 0.3]]: ' + ONE_EACH.format('mean'))], ids=str)
def test_normalisation_that_is_none(mean, std, error, message):
    with pytest.raises(error) as caught: AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), mean=mean, std=std)
    assert str(caught.value) == message
