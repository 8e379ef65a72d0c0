"""Further members of the kinds of faults: networks that are rare, but work, or are refused in words."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator

from antehoc_nb.core.interpretation_loss import two_pass_step
from antehoc_nb.core.layers import channel_gradients
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import frozen, weights_digest

pytestmark = pytest.mark.usefixtures('one_thread')
X, Y = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])


class Around(nn.Module):
    "A CNN inside another forward"
    def __init__(self, cnn, forward):
        super().__init__()
        self.cnn, self.function = cnn, forward

    def forward(self, x): return self.function(self.cnn, x)


def test_scores_with_places(cnn):
    expected = AntehocModel(cnn(), X).explain(X)
    found = AntehocModel(Around(cnn(), lambda cnn, x: cnn(x)[..., None, None]), X).explain(X)
    assert found.pred.shape == (2, 3, 1, 1) and found.labels == expected.labels
    assert torch.allclose(found.map, expected.map, atol=1e-5)


def test_scores_without_a_row_for_each_image(cnn):
    network = Around(cnn(), lambda cnn, x: cnn(x).T)
    assert not AntehocModel(network, X).class_specific
    with pytest.raises(ValueError, match=r'is \(3, 2\) for 2 images, and not one row of scores for each'):
        AntehocModel(network, X, class_specific=True)


def test_two_views_in_two_calls(cnn):
    "The calls of the mirrored view hold other rows and columns, those of the first view do not."
    network = Around(cnn(), lambda cnn, x: (cnn(x) + cnn(x.flip(3))) / 2)
    assert AntehocModel(network, X).layers == ('cnn.0.2:0', 'cnn.1.2:0', 'cnn.2.2:0')


@pytest.mark.parametrize('mode', [torch.no_grad(), torch.inference_mode()])
def test_networks_without_gradients(cnn, mode):
    network = Around(cnn(), mode(lambda cnn, x: cnn(x)))
    with pytest.warns(UserWarning, match='no gradients of the scores'): model = AntehocModel(network, X)
    assert model.explain(X).map.std() > 0
    with pytest.raises(ValueError, match='no gradient goes through the CNN to the map'):
        two_pass_step(model.train(), X, Y, number=0)


def test_a_scripted_body(cnn):
    network = nn.Sequential(torch.jit.script(cnn()[:3]), *cnn()[3:])
    with pytest.raises(ValueError, match="its module '0' was scripted or traced; put the nn.Module there"):
        AntehocModel(network, X)


def test_keyword_only_images(cnn):
    class Network(nn.Module):
        def forward(self, *, pixel_values): return pixel_values
    message = 'Network does not take the sample as its positional arguments .*a module whose'
    with pytest.raises(TypeError, match=message):
        AntehocModel(Network(), X)


def test_a_head_that_is_made_at_the_first_call(cnn):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = cnn()

        def forward(self, x):
            x = self.cnn[:5](x)
            if not hasattr(self, 'head'): self.head = nn.Linear(x.shape[1], 3)
            return self.head(x)
    network = Network()
    AntehocModel(network, X)
    assert not hasattr(network, 'head')


def test_digests_of_any_numbers_leave_tensors_as_they_are(cnn):
    network = cnn().bfloat16()
    network.register_buffer('n', torch.zeros(()))
    assert len({weights_digest(network), weights_digest(cnn())}) == 2
    network.n.resize_(3)  # what NumPy has seen can't be resized


@pytest.mark.parametrize('kind', ['forward_hook', 'forward_pre_hook', 'full_backward_hook'])
def test_hooks_of_all_modules(cnn, kind):
    calls = []
    handle = getattr(nn.modules.module, f'register_module_{kind}')(lambda module, *args: calls.append(type(module)))
    try:
        model = AntehocModel(cnn(), X).train()
        assert not calls
        out, loss = two_pass_step(model, X, Y, number=0)
        (F.cross_entropy(out, Y) + loss).backward()
    finally: handle.remove()
    assert calls.count(nn.Conv2d) == 3


class WritesInPlaces(nn.Module):
    "Writes to a list, a dictionary, a child's buffer, the data of a child's weights, and a tensor"
    def __init__(self):
        super().__init__()
        self.norm, self.log, self.found, self.memory = nn.BatchNorm2d(3), [], {}, torch.zeros(3)

    def forward(self, x):
        self.norm.running_mean += 1
        self.norm.weight.data = self.norm.weight.data * 2
        self.log.append(1)
        self.found['mean'] = x.mean()
        self.memory.add_(1)
        return self.norm(x)


def test_what_modules_write_elsewhere_is_put_back(cnn):
    part = WritesInPlaces().eval()
    network = nn.Sequential(part, *cnn())
    before = weights_digest(network)
    model = AntehocModel(network, X)
    with frozen(network): network(X)
    assert weights_digest(model.cnn) == before
    assert (part.log, part.found, part.memory.tolist()) == ([], {}, [0, 0, 0])


class Doubles:
    __slots__ = ()
    def __call__(self, module, args, out): return out * 2


def test_a_hook_that_takes_no_mark(cnn):
    "It is always called, since nothing can be noted about it."
    network = cnn()
    model = AntehocModel(network, X)
    network[1].register_forward_hook(Doubles())
    with torch.no_grad(): expected = network(X)
    assert torch.equal(model.explain(X).pred, expected)
    with frozen(network), torch.no_grad(): assert torch.equal(network(X), expected)


@pytest.mark.parametrize('factor', [1, 2])
def test_gradients_of_many_classes(cnn, factor):
    "As many passes as the last linear layer has features, unless something changes its output."
    network = Around(cnn(20), lambda cnn, x: factor * cnn(x)).requires_grad_(False)
    activation = network.cnn[:3](X).requires_grad_()
    scores = factor * network.cnn[3:](activation).sum(0)
    expected = torch.stack([torch.autograd.grad(score, activation, retain_graph=True)[0].mean((0, 2, 3))
                            for score in scores])
    assert torch.allclose(channel_gradients(network, 'cnn.2.2', (X,), lambda out: out), expected)


def test_layers_of_a_detector(cnn):
    backbone = cnn()[:3]
    backbone.out_channels = 8
    anchors = AnchorGenerator(((8,),), ((1.,),))
    network = FasterRCNN(backbone, num_classes=2, min_size=32, max_size=32, rpn_anchor_generator=anchors).eval()
    with pytest.warns(UserWarning, match='come after the last layer .* at several scales and have no common map'):
        model = AntehocModel(network, X)
    assert model.layers == ('backbone.0.2', 'backbone.1.2', 'backbone.2.2')
