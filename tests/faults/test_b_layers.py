"""A layer is recorded only if its output was shown to hold the rows and columns of the images."""
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from antehoc_nb.core.layers import candidate_layers, choose_layers, layer_table
from antehoc_nb.core.model import AntehocModel

pytestmark = pytest.mark.usefixtures('one_thread')
X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def block(n_in, n_out, stride=1):
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, padding=1), nn.BatchNorm2d(n_out), nn.ReLU())


def head(channels): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


class ChannelsLast(nn.Module):
    "What a transformer's block does: (B,C,H,W) -> (B,H,W,C) and back, with an activation in between."
    def __init__(self):
        super().__init__()
        self.act = nn.GELU()

    def forward(self, x): return self.act(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x): return self.act(x.mT).mT


class Tokens(nn.Module):
    "Patches of 8 x 8 pixels, of which each is a row: (B,C,patches,64), and back."
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        b, c, h, w = x.shape
        patches = x.view(b, c, h // 8, 8, w // 8, 8).transpose(3, 4).reshape(b * h * w // 64, c, 8, 8)
        return self.act(patches).view(b, c, h // 8, w // 8, 8, 8).transpose(3, 4).reshape(b, c, h, w)


class Position(nn.Module):
    "Adds a map that is the same for every image."
    def __init__(self, channels):
        super().__init__()
        self.at = nn.Parameter(torch.rand(1, channels, 16, 16))
        self.project = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU())

    def forward(self, x): return x + self.project(self.at.expand(len(x), -1, -1, -1))


FOREIGN = dict(channels_last=(ChannelsLast(), 'foreign.act', 'does not show in the same place'),
               transposed=(Transposed(), 'foreign.act', 'does not show in the same place'),
               tokens=(Tokens(), 'foreign.act', 'its first axis has 12 entries for 3 images'),
               position=(Position(16), 'foreign.project.1', 'it is the same for every image'))


def with_foreign(kind):
    torch.manual_seed(0)
    cnn = nn.Sequential(block(3, 16, 2), block(16, 16, 2), FOREIGN[kind][0], block(16, 16, 2), head(16)).eval()
    cnn._modules = {'foreign' if name == '2' else name: module for name, module in cnn._modules.items()}
    return cnn


@pytest.mark.parametrize('kind', FOREIGN)
def test_a_foreign_layer_is_left_out_and_said(kind):
    cnn = with_foreign(kind)
    _, name, reason = FOREIGN[kind]
    usual = ('0.2', '1.2', 'foreign', '3.2') if kind == 'position' else ('0.2', '1.2', '3.2')  # its sum is an image's
    assert tuple(layer.name for layer in candidate_layers(cnn, X)) == usual
    table = layer_table(cnn, X, eta=len(usual)).set_index('layer')
    assert reason in table.chosen[name] and (table.chosen[list(usual)] == '✓').all()
    model = AntehocModel(cnn, X)
    assert model.layers == usual and model.explain(X).map.shape == (2, 1, 64, 64)
    if kind == 'channels_last':  # by its name, it is read as what it is
        assert choose_layers(cnn, X, layers=['0.2', name]) == ('0.2', f'{name}@last')
        return
    with pytest.raises(ValueError, match=f"layer {name!r} does not hold the images' rows and columns: .*{reason}"):
        choose_layers(cnn, X, layers=['0.2', name])


class Views(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.net = nn.Sequential(block(3, 8, 2), block(8, 8, 2), head(8))
        self.join = join

    def forward(self, x): return self.join(self.net, x)


STACKED = dict(two_views=lambda net, x: net(torch.cat([x, x.flip(3)])).view(2, len(x), 3).mean(0),
               siamese=lambda net, x: (lambda a, b: (a - b).abs())(*net(torch.cat([x, x.roll(1, 0)])).chunk(2)),
               crops=lambda net, x: net(torch.cat([x[..., :32, :32], x[..., 32:, 32:]])).unflatten(0, (2, -1)).amax(0))


@pytest.mark.parametrize('kind', STACKED)
@pytest.mark.parametrize('n', [1, 2, 3])
def test_several_views_of_an_image_are_refused(kind, n):
    cnn = Views(STACKED[kind]).eval()
    with pytest.raises(ValueError, match="cnn: no layer of Views holds the images' rows and columns: "
                                         "of 'net.0.2', its first axis has 6 entries for 3 images"):
        AntehocModel(cnn, X[[0, 1, 0][:n]])


@pytest.mark.parametrize('norm', [parametrizations.spectral_norm, parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize('blocks', [(0, 1, 2), (1,)])
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_a_convolution_with_children_is_a_convolution(norm, blocks):
    def cnn(): return nn.Sequential(block(3, 8, 2), block(8, 8, 2), block(8, 16, 2), head(16)).eval()
    normed = cnn()
    for i in blocks: norm(normed[i][0])
    assert candidate_layers(normed, X) == candidate_layers(cnn(), X)
    assert AntehocModel(normed, X).layers == ('0.2', '1.2', '2.2')


@pytest.mark.parametrize('x', [X[:1], torch.zeros(2, 3, 64, 64), torch.ones(1, 3, 64, 48), X[..., :9, :9], X.double()])
def test_any_sample_will_do(x):
    torch.manual_seed(0)
    cnn = nn.Sequential(block(3, 8, 2), block(8, 8, 2), head(8)).eval().to(x.dtype)
    assert choose_layers(cnn, x, None) == ('0.2', '1.2')


def test_a_cnn_that_takes_two_images_only_is_not_probed():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(block(3, 8, 2), block(8, 8, 2), head(8))

        def forward(self, x): return self.net(x.view(2, 3, 64, 64))

    assert choose_layers(Two().eval(), X, None) == ('net.0.2', 'net.1.2')


def test_no_random_stream_moves_and_the_cnn_stays():
    cnn = nn.Sequential(block(3, 8, 2), block(8, 8, 2), head(8)).train()
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in cnn.state_dict().items()}
    candidate_layers(cnn, X)
    assert torch.equal(before, torch.get_rng_state()) and cnn.training
    assert all(torch.equal(value, state[name]) for name, value in cnn.state_dict().items())
