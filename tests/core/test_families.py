"""CNNs of torchvision and timm: their layers, and explanations from end to end. Three families by default."""
import pytest
import torch
import torchvision
from torch import nn

from antehoc_nb.core.layers import candidate_layers, choose_layers, parse_layer
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import in_channels, noise_images, output_tensors, with_versions

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:explain')]  # noise is no image
QUICK = 'resnet18', 'mobilenet_v3_small', 'convnext_atto'

EXPLAINED = [  # library, name, height of the images
    ('torchvision', 'resnet18', 48), ('torchvision', 'squeezenet1_1', 48), ('torchvision', 'mobilenet_v3_small', 48),
    ('torchvision', 'mnasnet0_5', 48), ('torchvision', 'shufflenet_v2_x0_5', 48), ('torchvision', 'regnet_y_400mf', 48),
    ('torchvision', 'alexnet', 80), ('torchvision', 'vgg11_bn', 48), ('torchvision', 'densenet121', 48),
    ('torchvision', 'googlenet', 48), ('torchvision', 'efficientnet_b0', 48),
    ('timm', 'resnet10t', 48), ('timm', 'convnext_atto', 48), ('timm', 'mobilenetv3_small_050', 48),
    ('timm', 'efficientnet_lite0', 48), ('timm', 'repvgg_a0', 48), ('timm', 'nf_resnet26', 48),
    ('timm', 'ghostnet_050', 48), ('timm', 'regnetx_002', 48), ('timm', 'edgenext_xx_small', 64),
    ('timm', 'vovnet39a', 48), ('timm', 'mobileone_s0', 48)]

WITH_LAYERS = [
    *(('torchvision', name) for name in (
        'alexnet', 'vgg11_bn', 'resnet50', 'densenet121', 'googlenet', 'squeezenet1_1', 'mobilenet_v2',
        'mobilenet_v3_small', 'efficientnet_b0', 'regnet_y_400mf', 'shufflenet_v2_x0_5', 'mnasnet0_5',
        'resnext50_32x4d', 'inception_v3', 'convnext_tiny')),
    *(('timm', name) for name in (
        'resnet26d', 'efficientnet_lite0', 'convnext_atto', 'nfnet_l0', 'ghostnet_050', 'hrnet_w18_small',
        'rexnet_100', 'dla34', 'res2net50_26w_4s'))]


def families(settings):
    "All but the quick ones are marked slow."
    return [pytest.param(*each, id=each[1], marks=[] if each[1] in QUICK else pytest.mark.slow) for each in settings]


def build(library, name, classes=5):
    torch.manual_seed(0)
    if library == 'timm':
        timm = pytest.importorskip('timm')
        if not timm.is_model(name): pytest.skip(f'this timm has no {name}')
        return timm.create_model(name, pretrained=False, num_classes=classes)
    kwargs = dict(init_weights=False) if name in ('googlenet', 'inception_v3') else {}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **kwargs)


def noise(n, height, width, seed=1):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('library, name, size', families(EXPLAINED))
def test_explanations(library, name, size):
    cnn, x = build(library, name), noise(2, size, size + 16)
    found = candidate_layers(cnn, x)
    eta = min(4, len(found))
    model = AntehocModel(cnn, x, eta=eta)
    e = model.explain(x)
    assert e.map.shape == (2, 1, size, size + 16) and e.sams.shape[:2] == (2, 2 * eta) and min(e.sams.shape[2:]) == 16
    assert e.map.isfinite().all() and e.map.amin() == 0 and e.map.amax() == 1
    model.eval()
    with torch.no_grad(): expected = model(x)
    for mine, own in zip(output_tensors(e.pred), output_tensors(expected)): assert torch.equal(mine, own)
    check_layers(cnn, x, found, model.layers)
    if name in ('repvgg_a0', 'mobileone_s0'):  # sums of branches, not one of them
        assert not any(layer.endswith('+relu') for layer in model.layers)
    assert len({sam.numpy().tobytes() for sam in e.sams[0, :eta]}) == eta  # each a different picture
    assert not any(module._forward_hooks for module in cnn.modules())


def check_layers(cnn, x, found, chosen):
    "Several pixels each, in order of computation, from the first stage to the last."
    stages = {layer.name: layer.stage for layer in found}
    stages_of_chosen = [stages[name] for name in chosen]
    assert stages_of_chosen == sorted(stages_of_chosen), chosen
    assert stages_of_chosen[0] == 0 and stages_of_chosen[-1] == max(stages.values()), chosen
    assert all(layer.shape[1] * layer.shape[2] > 1 for layer in found)
    assert choose_layers(cnn, x, layers=chosen) == chosen
    assert all(parse_layer(name)[0] in dict(cnn.named_modules()) for name in chosen)


@pytest.mark.parametrize('library, name', families(WITH_LAYERS))
def test_eight_layers(library, name):
    size = 128 if name == 'inception_v3' else 96
    cnn, x = build(library, name, classes=1000), noise(1, size, size, seed=0)
    found = candidate_layers(cnn, x)
    assert len(found) >= (5 if name == 'alexnet' else 8)
    assert len(choose_layers(cnn, x, eta=min(8, len(found)))) == min(8, len(found))


@pytest.mark.parametrize('library, name', families([('torchvision', 'resnet18'), ('torchvision', 'mobilenet_v3_small'),
                                                    ('torchvision', 'densenet121')]))
def test_choice_does_not_depend_on_the_sample(library, name):
    "Another size, batch, seed or mode gives the same layers, as a model needs that is rebuilt from its configuration."
    cnn = build(library, name)
    samples = (True, 1, 96), (False, 3, 64), (False, 1, 128)  # training mode, images, size
    chosen = {choose_layers(cnn.train(mode), noise(n, size, size, seed=size), eta=5) for mode, n, size in samples}
    assert len(chosen) == 1


@pytest.mark.parametrize('cnn, message', [
    (torchvision.models.VisionTransformer(32, 32, 1, 1, 8, 8), 'cnn: VisionTransformer is a transformer, with no more'),
    (nn.Sequential(nn.Conv2d(3, 4, 32), nn.ReLU()), 'cnn: no activation of Sequential can be recorded'),
    (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), 'cnn: no 2-d convolution was run in Sequential')])
def test_networks_without_convolutions_are_refused(cnn, message):
    with pytest.raises(ValueError, match=message): AntehocModel(cnn, torch.rand(2, 3, 32, 32))


class Versioned(nn.Sequential):
    "As torchvision's MNASNet: weights of an unknown version are refused."
    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get('version') not in (1, 2): raise ValueError('which version?')
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def versioned():
    inner = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Versioned(nn.Conv2d(6, 8, 3), nn.ReLU()))
    return nn.Sequential(inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def test_weights_without_versions_load(tmp_path):
    "A file of safetensors does not hold the versions of modules."
    model = AntehocModel(versioned(), eta=2).eval()
    x = noise(2, 48, 48)
    loaded = AntehocModel.from_pretrained(model.save_pretrained(tmp_path), cnn=versioned())
    assert torch.equal(loaded.explain(x).map, model.explain(x).map)
    model.load_state_dict(dict(loaded.state_dict()))
    with pytest.raises(ValueError, match='which version?'): versioned().load_state_dict(dict(model.cnn.state_dict()))


def test_the_versions_of_weights_are_kept():
    network = versioned()
    weights = network.state_dict()
    weights._metadata['0.3']['version'] = 1
    assert with_versions(weights, network)._metadata['0.3'] == dict(version=1)
    found = with_versions(dict(weights), network)
    assert found._metadata['0.3'] == dict(version=2) and [*found] == [*weights]


class SpaceToDepth(nn.Module):
    "As TResNet begins: blocks of pixels become channels."
    def forward(self, x): return torch.cat([x[:, :, i::4, j::4] for i in range(4) for j in range(4)], 1)


@pytest.mark.parametrize('first, convolution, channels', [
    (nn.PixelUnshuffle(2), 12, 3), (nn.PixelUnshuffle(2), 4 * 4, 4), (SpaceToDepth(), 48, 3), (SpaceToDepth(), 16, 1),
    (nn.Identity(), 10, 10), (nn.Identity(), 1, 1), (nn.Linear(7, 7), 9, 9)])  # the last takes nothing that is tried
def test_channels_of_images(tmp_path, first, convolution, channels):
    def build():
        return nn.Sequential(first, nn.Conv2d(convolution, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    cnn = build().train()
    assert in_channels(cnn) == channels and noise_images(cnn).shape == (2, channels, 128, 128) and cnn.training
    if isinstance(first, nn.Linear): return
    model = AntehocModel(cnn, eta=2)
    x = torch.rand(2, channels, 48, 32, generator=torch.Generator().manual_seed(0))
    loaded = AntehocModel.from_pretrained(model.save_pretrained(tmp_path), cnn=build())
    e = loaded.explain(x)
    assert torch.equal(e.map, model.eval().explain(x).map) and e.map.shape == (2, 1, 48, 32) and e.map.std() > 0


def test_finding_the_channels_changes_nothing():
    cnn = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    before, stream = [value.clone() for value in cnn.state_dict().values()], torch.get_rng_state()
    assert in_channels(cnn) == 3
    assert all(map(torch.equal, cnn.state_dict().values(), before)) and torch.equal(torch.get_rng_state(), stream)
