"""Parts of the weight networks against what they are by definition, and networks of one's own."""
import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from workers import small_cnn

from antehoc_nb.core.attention import soft_attentions
from antehoc_nb.core.interpretation_loss import int_loss
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import frozen
from antehoc_nb.core.weight_net import Reader, modulate, weight_nets
from antehoc_nb.show.plots import show_sams, show_weights

pytestmark = pytest.mark.usefixtures('one_thread')


def images(n=2, height=32, width=32): return torch.rand(n, 3, height, width)


def pass_1(model, x):
    "The detached maps and activations of one forward pass."
    model.recording = True
    model(x)
    return model.take_recorded()


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_modulated_maps_written_out(layout):
    "The modulated map written out, class-specific or not."
    other, activation = torch.randn(3, 2, 4, 4), torch.randn(3, 5, 7, 4).to(memory_format=layout)
    for classes, target in ((6, torch.tensor([5, 0, 2])), (None, None)):
        reader = Reader([2, 5], 2, classes)
        rows = nn.init.normal_(reader.shared_direction)
        if classes: rows = rows + nn.init.normal_(reader.class_directions.weight)[target]
        by_hand = 2 * (activation * rows[:, 2:, None, None]).sum(1)
        change = reader([other, activation], target)[1][:, -2]
        torch.testing.assert_close(change, by_hand, atol=1e-5, rtol=1e-4)
        strength = activation.square().mean(1).sqrt()
        z = (strength - strength.mean((1, 2), keepdim=True)) / strength.std((1, 2), correction=0, keepdim=True)
        response = z + change
        deviation = response.std((1, 2), correction=0, keepdim=True)
        expected = (response - response.mean((1, 2), keepdim=True)) / deviation
        found = modulate(z[:, None], change[:, None])[:, 0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(0, 2**30))
def test_views_are_projections_written_out(n, classes, seed):
    "The projections of a layer: at each pixel, the activation times the weights."
    torch.manual_seed(seed)
    activations, target = [torch.randn(n, 5, 4, 3), torch.randn(n, 2, 2, 2)], torch.randint(0, classes, (n,))
    reader = Reader([5, 2], 2, classes)
    nn.init.normal_(reader.class_directions.weight)
    views, of_second_layer = reader(activations, target)
    assert views.shape == (n, 4, 4, 3) and of_second_layer.shape == (n, 4, 2, 2)
    for i in range(n):
        for row in range(4):
            for column in range(3):
                by_hand = sum(activations[0][i, k, row, column] * reader.views[1, k] for k in range(5))
                torch.testing.assert_close(views[i, 1, row, column], by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('class_specific, target', [(True, [1, 9]), (False, None)])
def test_modulated_maps_are_named(class_specific, target):
    model = AntehocModel(small_cnn(), images(), eta=3, class_specific=class_specific, evidence=False)
    e = model.explain(images(2, 40, 32), target=target)
    assert e.sams.shape == e.weights.shape == (2, 6, 20, 16)
    assert e.layers == (*model.layers, *(f'{layer}, modulated' for layer in model.layers))
    assert len(e.sizes) == 6 and e.sizes[3:] == e.sizes[:3]
    torch.testing.assert_close(e.weights.sum(1), torch.ones(2, 20, 16))
    torch.testing.assert_close(e.sams[:, 3:], e.sams[:, :3], atol=1e-5, rtol=1e-4)  # before training
    show_sams(e[0]), show_weights(e[0])
    titles = [ax.get_title() for ax in plt.gcf().axes]
    assert sum(f'{model.layers[-1]}\nmodulated' in title for title in titles) == 1, titles


def test_modulated_maps_follow_the_settings_of_the_model():
    x = images()
    for temperature in (1., 5.):
        e = AntehocModel(small_cnn(), x, eta=3, temperature=temperature, evidence=False).explain(x)
        torch.testing.assert_close(e.sams[:, 3:], e.sams[:, :3], atol=1e-5, rtol=1e-4)
    half = AntehocModel(small_cnn(), x, eta=3).half()
    with pytest.warns(UserWarning, match='so they seem to be normalised'):
        assert half.explain((x.half() - .5) * 300).map.isfinite().all()


def test_only_the_target_classes_learn():
    "The directions of other classes get no gradient, nor does the CNN."
    model = AntehocModel(small_cnn(), images(), eta=3)
    nn.init.normal_(model.weight_net.autoencoder.out.weight)
    x, target = images(4), torch.tensor([1, 7, 7, 1])
    i_map, *_ = model.interpret(pass_1(model, x), (32, 32), target)
    with frozen(model.cnn): int_loss(model.cnn(model.mask(x, i_map)), target, 'cross_entropy').backward()
    for embedding in (model.weight_net.read.class_directions, model.weight_net.class_embedding):
        learned = embedding.weight.grad.abs().sum(1) > 0
        assert learned.nonzero().flatten().tolist() == [1, 7]
    assert all(p.grad is None for p in model.cnn.parameters())


def test_an_image_without_a_response_spoils_nothing():
    "Where a layer is constant, maps are 0 and gradients finite, those of the other images included."
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = AntehocModel(cnn, images(), eta=2)
    nn.init.normal_(model.weight_net.autoencoder.out.weight)
    x, target = images(3), torch.tensor([0, 1, 2])
    x[1] = 0
    i_map, _, sams = model.interpret(pass_1(model, x), (32, 32), target)
    assert (sams[1] == 0).all() and i_map.isfinite().all()
    with frozen(model.cnn): int_loss(model.cnn(model.mask(x, i_map)), target, 'cross_entropy').backward()
    gradients = [p.grad for p in model.weight_net.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and max(g.abs().max() for g in gradients) < 1e3
    gradients = model.weight_net.read.class_directions.weight.grad[0].split([4, 4])
    assert all(of_layer.abs().sum() > 0 for of_layer in gradients)


def test_a_class_specific_network_of_ones_own():
    "One that reads no activations, with a CNN that happens to have a submodule called `find_target`."
    class two_moods(nn.Module):
        takes_classes = True

        def __init__(self, eta, classes):
            super().__init__()
            self.mood = nn.Embedding(classes, eta)

        def forward(self, sams, target): return self.mood(target)[:, :, None, None]

    weight_nets.register(two_moods)
    try:
        cnn = small_cnn()
        cnn.find_target = nn.Identity()
        model = AntehocModel(cnn, images(), eta=3, weight_net='two_moods')
        assert model.class_specific and model.cells is None
        e = model.explain(images(), target=[3, 4])
        assert (e.weights[0] - e.weights[1]).abs().max() > .01
    finally: del weight_nets['two_moods']


def test_a_soft_attention_without_strength_gets_the_activations_as_they_are():
    "Its map may depend on their scale."
    def gate(f, temperature): return f.mean(1, keepdim=True).clamp(0, 1)
    soft_attentions.register(gate)
    try:
        for net in ('auto', 'mean'):
            for cells in (None, 'pixels'):
                model = AntehocModel(small_cnn(), images(), eta=2, soft_attention='gate', weight_net=net, cells=cells)
                f = torch.rand(2, 8, 8, 8) / 10
                recorded = model.layer_maps([f, f], (32, 32))
                assert torch.equal(recorded[1].response, gate(f, 1.)), (net, cells)
    finally: del soft_attentions['gate']
