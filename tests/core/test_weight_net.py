"""Parts of the weight networks against what they are by definition, and networks of one's own."""
import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from workers import small_cnn

from antehoc_nb.core.interpretation_loss import int_loss
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import frozen
from antehoc_nb.core.weight_net import project_channels, weight_nets
from antehoc_nb.show.plots import show_sams, show_weights

pytestmark = pytest.mark.usefixtures('one_thread')


def images(n=2, height=32, width=32): return torch.rand(n, 3, height, width)


def pass_1(model, x):
    "The detached maps and activations of one forward pass."
    model.recording = True
    model(x)
    return [(sam.detach(), activation.detach()) for sam, activation in model.take_sams()]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_projection_on_a_direction(layout):
    activation, directions = torch.randn(3, 5, 7, 4).to(memory_format=layout), torch.randn(3, 5)
    for direction in (directions, directions[:1]):
        expected = (activation * direction[:, :, None, None]).sum(1, keepdim=True)
        torch.testing.assert_close(project_channels(activation, direction), expected)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(0, 2**30))
def test_evidence_is_the_projection_written_out(n, classes, seed):
    "The extra map of a layer: at each pixel, the normalised activation times the direction of the target class."
    torch.manual_seed(seed)
    net, activation = weight_nets['conditional'](2, channels=(5, 3), classes=classes), torch.randn(n, 5, 4, 3)
    target = torch.randint(0, classes, (n,))
    maps = net.layer_maps(0, activation, target)
    normalised = F.group_norm(activation, 1, *net.views[0][0].parameters())
    assert maps.shape == (n, 9, 4, 3)
    for i in range(n):
        direction = net.class_directions[0].weight[target[i]]
        for row in range(4):
            for column in range(3):
                by_hand = sum(normalised[i, k, row, column] * direction[k] for k in range(5))
                torch.testing.assert_close(maps[i, 8, row, column], by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('net, target', [('directed', [1, 9]), ('turned', None)])
def test_modulated_maps_are_named(net, target):
    model = AntehocModel(small_cnn(), images(), eta=3, weight_net=net)
    e = model.explain(images(2, 40, 32), target=target)
    assert e.sams.shape == e.weights.shape == (2, 6, 40, 32)
    assert e.layers == (*model.layers, *(f'{layer}, modulated' for layer in model.layers))
    assert len(e.sizes) == 6 and e.sizes[3:] == e.sizes[:3]
    torch.testing.assert_close(e.weights.sum(1), torch.ones(2, 40, 32))
    torch.testing.assert_close(e.sams[:, 3:], e.sams[:, :3], atol=1e-5, rtol=1e-4)  # before training
    show_sams(e[0]), show_weights(e[0])
    titles = [ax.get_title() for ax in plt.gcf().axes]
    assert sum(f'{model.layers[-1]}, modulated' in title for title in titles) == 1, titles


def test_modulated_maps_follow_the_settings_of_the_model():
    x = images()
    for temperature in (1., 5.):
        e = AntehocModel(small_cnn(), x, eta=3, weight_net='directed', temperature=temperature).explain(x)
        torch.testing.assert_close(e.sams[:, 3:], e.sams[:, :3], atol=1e-5, rtol=1e-4)
    half = AntehocModel(small_cnn(), x, eta=3, weight_net='directed').half()
    with pytest.warns(UserWarning, match='so they seem to be normalised'):
        assert half.explain((x.half() - .5) * 300).map.isfinite().all()


def test_only_the_target_classes_learn():
    "The directions of other classes get no gradient, nor does the CNN."
    model = AntehocModel(small_cnn(), images(), eta=3, weight_net='conditional')
    nn.init.normal_(model.weight_net.out.weight)
    x, target = images(4), torch.tensor([1, 7, 7, 1])
    i_map, *_ = model.interpret(pass_1(model, x), (32, 32), target)
    with frozen(model.cnn): int_loss(model.cnn(model.mask(x, i_map)), target, 'cross_entropy').backward()
    for embedding in [*model.weight_net.class_directions, model.weight_net.target_embedding]:
        learned = embedding.weight.grad.abs().sum(1) > 0
        assert learned.nonzero().flatten().tolist() == [1, 7]
    assert all(p.grad is None for p in model.cnn.parameters())


def test_an_image_without_a_response_spoils_nothing():
    "Where a layer is constant, maps are 0 and gradients finite, those of the other images included."
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = AntehocModel(cnn, images(), eta=2, weight_net='directed')
    nn.init.normal_(model.weight_net.out.weight)
    for norm, _ in model.weight_net.views: nn.init.normal_(norm.bias)  # as if it were trained
    x, target = images(3), torch.tensor([0, 1, 2])
    x[1] = 0
    i_map, _, sams = model.interpret(pass_1(model, x), (32, 32), target)
    assert (sams[1] == 0).all() and i_map.isfinite().all()
    with frozen(model.cnn): int_loss(model.cnn(model.mask(x, i_map)), target, 'cross_entropy').backward()
    gradients = [p.grad for p in model.weight_net.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and max(g.abs().max() for g in gradients) < 1e3
    assert all(directions.weight.grad[0].abs().sum() > 0 for directions in model.weight_net.class_directions)


def test_a_class_specific_network_of_ones_own():
    "One that reads no activations, with a CNN that happens to have a submodule called `find_target`."
    class two_moods(nn.Module):
        class_specific = True

        def __init__(self, eta, classes):
            super().__init__()
            self.mood = nn.Embedding(classes, eta)

        def forward(self, sams, target): return self.mood(target)[:, :, None, None]

    weight_nets.register(two_moods)
    try:
        cnn = small_cnn()
        cnn.find_target = nn.Identity()
        model = AntehocModel(cnn, images(), eta=3, weight_net='two_moods')
        e = model.explain(images(), target=[3, 4])
        assert (e.weights[0] - e.weights[1]).abs().max() > .01
    finally: del weight_nets['two_moods']
