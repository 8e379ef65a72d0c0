"""CNNs as torchvision and timm build them, explained from end to end."""
import pytest
import torch
import torchvision

from antehoc_nb.core.layers import candidate_layers, choose_layers, parse_layer
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import output_tensors

TORCHVISION = dict(resnet18=48, squeezenet1_1=48, mobilenet_v3_small=48, mnasnet0_5=48, shufflenet_v2_x0_5=48, regnet_y_400mf=48, alexnet=80,
                   vgg11_bn=48, densenet121=48, googlenet=48, efficientnet_b0=48)
TIMM = dict(resnet10t=48, convnext_atto=48, mobilenetv3_small_050=48, efficientnet_lite0=48, repvgg_a0=48, nf_resnet26=48, ghostnet_050=48,
            regnetx_002=48, edgenext_xx_small=64, vovnet39a=48, mobileone_s0=48)


pytestmark = pytest.mark.usefixtures('one_thread')


def build(family, name):
    torch.manual_seed(0)
    if family == 'timm':
        timm = pytest.importorskip('timm')
        if not timm.is_model(name): pytest.skip(f'this timm has no {name}')
        return timm.create_model(name, pretrained=False, num_classes=5)
    kw = dict(init_weights=False) if name == 'googlenet' else {}
    return getattr(torchvision.models, name)(weights=None, num_classes=5, **kw)


@pytest.mark.parametrize('family,name,size', [*[('torchvision', *o) for o in TORCHVISION.items()], *[('timm', *o) for o in TIMM.items()]])
def test_families(family, name, size):
    cnn, x = build(family, name), torch.randn(2, 3, size, size + 16, generator=torch.Generator().manual_seed(1))
    found = candidate_layers(cnn, x)
    eta = min(4, len(found))
    m = AntehocModel(cnn, x, eta=eta)
    e = m.explain(x)
    assert e.map.shape == (2, 1, size, size + 16) and e.sams.shape == (2, eta, size, size + 16)
    assert e.map.isfinite().all() and e.map.amin() == 0 and e.map.amax() == 1
    m.eval()
    with torch.no_grad(): want = m(x)
    for a, b in zip(output_tensors(e.pred), output_tensors(want)): assert torch.equal(a, b)
    # the taps: rectified, several pixels, in order of computation, from the first stage to the last, each a different picture
    stages = {o.name: o.stage for o in found}
    chosen = [stages[o] for o in m.layers]
    assert chosen == sorted(chosen) and chosen[0] == 0 and chosen[-1] == max(stages.values()), m.layers
    assert all(o.shape[1]*o.shape[2] > 1 for o in found)
    if name in ('repvgg_a0', 'mobileone_s0'): assert not any(o.endswith('+relu') for o in m.layers)  # sums of branches, not one of them
    assert len({t.numpy().tobytes() for t in e.sams[0]}) == eta
    assert choose_layers(cnn, x, layers=m.layers) == m.layers
    assert all(parse_layer(o)[0] in dict(cnn.named_modules()) for o in m.layers)
    assert not any(o._forward_hooks for o in cnn.modules())


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'densenet121'])
def test_choice_does_not_depend_on_the_sample(name):
    "Another size, batch, seed or mode names the same layers, so that a model rebuilt from its configuration taps the same places."
    cnn = build('torchvision', name)
    names = {choose_layers(cnn.train(t), torch.randn(b, 3, s, s, generator=torch.Generator().manual_seed(s)), eta=5)
             for t, b, s in ((True, 1, 96), (False, 3, 64), (False, 1, 128))}
    assert len(names) == 1


@pytest.mark.parametrize('name', ['vit_b_16', 'mlp'])
def test_networks_without_maps_are_refused(name):
    cnn = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*32*32, 2)) if name == 'mlp' else \
        torchvision.models.VisionTransformer(32, 32, 1, 1, 8, 8)
    with pytest.raises(ValueError, match='cnn: no 2-d convolution|no layer|larger than the'): AntehocModel(cnn, torch.rand(2, 3, 32, 32))
