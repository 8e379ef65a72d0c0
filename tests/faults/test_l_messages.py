"""What can't work says so in words that name the remedy."""
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from antehoc_nb.core.layers import layer_table
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.evaluate.benchmark import benchmark
from antehoc_nb.evaluate.benchmark import test_images as images_of
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')

X = torch.rand(2, 3, 32, 32)


@pytest.mark.parametrize('wrap, match', [
    (nn.DataParallel, 'a DataParallel runs copies of a network.*cnn.module'),
    (torch.jit.script, 'was scripted or traced'),
    (lambda cnn: torch.jit.trace(cnn, X), 'was scripted or traced'),
])
def test_networks_without_layers(cnn, wrap, match):
    for sample in (X, None):
        with pytest.raises(TypeError, match=match): AntehocModel(wrap(cnn()), sample)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['method', 'function', 'a block'])
def test_compiled_networks(cnn, how):
    network, expected = cnn(), AntehocModel(cnn(), X).explain(X)
    if how == 'method': network.compile(backend='eager')
    elif how == 'function': network = torch.compile(network, backend='eager')
    else: network[1].compile(backend='eager')
    model = AntehocModel(network, X)
    network(X)  # now there is compiled code, without hooks
    explanation = model.explain(X)
    assert torch.allclose(explanation.map, expected.map) and torch.allclose(explanation.pred, expected.pred)


def test_compiled_after_the_model_was_made(cnn):
    model = AntehocModel(cnn(), X)
    expected = model.explain(X).map
    model.cnn.compile(backend='eager')
    model(X)
    assert torch.allclose(model.explain(X).map, expected)


def test_few_layers_without_eta(cnn):
    assert (layer_table(cnn(), X).chosen == '✓').all()
    with pytest.raises(ValueError, match='eta=9 is larger than the 3 layers found'): layer_table(cnn(), X, eta=9)


class Patches(nn.Module):
    "A transformer whose tokens come in an order of its own, unless that is the rows and columns of the image."
    def __init__(self, order=None):
        super().__init__()
        self.embed, self.block = nn.Conv2d(3, 8, 8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head, self.order = nn.Linear(8, 3), slice(None) if order is None else order

    def forward(self, x): return self.head(self.block(self.embed(x).flatten(2).mT[:, self.order]).mean(1))


def test_a_transformer():
    assert AntehocModel(Patches().eval(), X).layers == ('block@tokens',)
    order = torch.arange(16).flip(0)  # from the lower right corner backwards
    with pytest.raises(ValueError) as error: AntehocModel(Patches(order).eval(), X)
    assert str(error.value) == ('cnn: Patches is a transformer, with no more than one convolution, and no block of it '
                                "holds the images' rows and columns: of 'block', a change of the image does not show "
                                'in the same place')


def test_a_network_of_one_size():
    lenet = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
                          nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 10))
    with pytest.raises(ValueError, match='does not take 128 x 128 noise.*give images like the ones to come'):
        AntehocModel(lenet)
    assert AntehocModel(lenet, torch.rand(2, 1, 32, 32)).eta == 2


def loader(*tensors, **kwargs): return DataLoader(TensorDataset(*tensors), 4, **kwargs)


def test_benchmark_of_plain_loaders(cnn):
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8) % 3
    images, classes, where = images_of(loader(x, y, shuffle=True))
    assert torch.equal(images, x) and torch.equal(classes, y) and where == list(range(8))
    dl, names = loader(x, y, shuffle=True), ['ante-hoc', 'gaussian']
    found = benchmark(AntehocModel(cnn(), x[:2]), dl, names, ['faithfulness'], resamples=10)
    assert found.record['results']['n'] == 8


@pytest.mark.parametrize('tensors, match', [
    ((), r'a batch must be \(images, classes\), this loader gives 1 parts'),
    ((torch.rand(8, 1), torch.arange(8)), 'this loader gives 3 parts'),
    ((torch.ones(8, 3),), r'takes one class for each image, the labels of this loader are of the shape \(N,3\)'),
    ((torch.rand(8),), 'one class for each image.*float32'),
])
def test_benchmark_of_other_labels(cnn, tensors, match):
    x = torch.rand(8, 3, 32, 32)
    with pytest.raises(ValueError, match=match): benchmark(AntehocModel(cnn(), X), loader(x, *tensors))


def test_plain_weights(cnn, tmp_path):
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8) % 3
    dls = DataLoaders(loader(x, y), loader(x, y))
    plain = Learner(dls, cnn(), loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    plain.save('plain', with_opt=False)
    learn = Learner(dls, cnn(), loss_func=nn.CrossEntropyLoss(), path=tmp_path, cbs=TwoPass(eta=2))
    hint = r'weights of a CNN alone.*model\.cnn\.load_state_dict'
    with pytest.raises(RuntimeError, match=hint): learn.load('plain', with_opt=False)
    with pytest.raises(RuntimeError, match=hint): learn.model.load_state_dict(cnn().state_dict())
    learn.model.cnn.load_state_dict(cnn().state_dict())
    learn.model.load_state_dict(AntehocModel(cnn(), x[:2], eta=2).state_dict())
    with pytest.raises(RuntimeError, match='Missing key'): learn.model.load_state_dict({})


def lazy(cnn): return nn.Sequential(*cnn()[:3], nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.parametrize('sample', [X, None])
def test_networks_that_have_no_size_yet(cnn, sample):
    with pytest.raises(ValueError) as error: AntehocModel(lazy(cnn), sample)
    assert str(error.value) == ("cnn: its module '4' (LazyLinear) gets its size from the first images; run the network "
                                'once before: cnn(images)')
    network = lazy(cnn)
    network(X)
    assert AntehocModel(network, X).explain(X).map.shape == (2, 1, 32, 32)


@pytest.mark.parametrize('part', [slice(None), slice(1, 2), slice(5, 6)])
def test_networks_without_values(cnn, part):
    network = cnn()
    network[part].to('meta')
    name, kind = ('5', 'Linear') if part.start == 5 else (f'{part.start or 0}.0', 'Conv2d')
    with pytest.raises(ValueError) as error: AntehocModel(network, X)
    assert str(error.value) == (f"cnn: the weights of its module '{name}' ({kind}) are on the device 'meta', where "
                                'they have no values; load them first, as by cnn.load_state_dict(weights, assign=True)')
    network.load_state_dict(cnn().state_dict(), assign=True)
    assert torch.equal(AntehocModel(network.eval(), X).explain(X).pred, cnn()(X))


def test_complex_weights(cnn):
    with pytest.raises(TypeError) as error: AntehocModel(cnn().to(torch.complex64), X)
    assert str(error.value) == ("cnn: the weights of its module '0.0' are complex numbers, and maps are made of real "
                                'activations; give a network of real numbers')


def test_weights_and_exported_programs(cnn):
    with pytest.raises(TypeError, match='OrderedDict.*build it, and put the weights in: cnn.load_state_dict'):
        AntehocModel(cnn().state_dict(), X)
    program = torch.export.export(cnn(), (X,))
    with pytest.raises(TypeError, match='ExportedProgram.* is no network; give an nn.Module'): AntehocModel(program, X)
    with pytest.raises(TypeError, match='this graph was exported, and has no modules.*give the nn.Module that it was'):
        AntehocModel(program.module(), X)
    assert AntehocModel(torch.fx.symbolic_trace(cnn()), X).eta == 3


def test_a_part_that_was_scripted(cnn):
    network = cnn()
    expected = network(X)
    network[2] = torch.jit.script(network[2])
    explanation = AntehocModel(network, X).explain(X)
    assert explanation.layers[:2] == ('0.2', '1.2') and torch.allclose(explanation.pred, expected)


def put_forward(network):
    forward = network.forward
    network.forward = lambda x: forward(x) * 2


def put_wrapped(network):
    forward = network.forward

    def outer(f): return lambda x: f(x) * 2
    network.forward = outer(lambda x: forward(x))


def put_function(network): network[0].forward = lambda x: nn.Sequential.forward(network[0], x) * 2


@pytest.mark.parametrize('put', [put_forward, put_wrapped, put_function])
def test_functions_that_stand_for_methods(cnn, put):
    "A copy of the network would call the original."
    network = cnn()
    put(network)
    model = AntehocModel(network, X)
    own = ['0'] if put is put_function else []  # twice the activation, one more layer
    assert [*model.layers] == ['0.2', *own, '1.2', '2.2'] and torch.equal(model.explain(X).pred, network(X))


@pytest.mark.slow
@pytest.mark.parametrize('how', ['forward', 'decorator', 'part', 'lambda'])
def test_functions_that_were_compiled(cnn, how):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = cnn()
            if how == 'part': self.first = torch.compile(self.cnn[:3], backend='eager')
            elif how == 'lambda': self.first = torch.compile(lambda x: self.cnn[:3](x), backend='eager')
            else: self.first = self.cnn[:3]

        def forward(self, x): return self.cnn[3:](self.first(x))
    if how == 'decorator': Network.forward = torch.compile(Network.forward, backend='eager')
    network = Network().eval()
    if how == 'forward': network.forward = torch.compile(network.forward, backend='eager')
    network(X)
    model = AntehocModel(network, X)
    network(X)
    assert model.eta == 3 and torch.allclose(model.explain(X).map, AntehocModel(cnn(), X).explain(X).map, atol=1e-5)
