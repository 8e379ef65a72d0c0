"""TAME: its network and loss against plain references, what it leaves alone, and runs that are killed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from torch import nn
from workers import small_cnn

from antehoc_nb.core.utils import weights_digest
from antehoc_nb.data.photo_digits import photo_digits_dls
from antehoc_nb.evaluate.tame import (
    TAME,
    FeatureFusion,
    TAMELoss,
    build_tame,
    tame_explainer,
    tame_layers,
    train_tame,
)
from antehoc_nb.train.checkpoint import Checkpoint
from antehoc_nb.train.learner import Bf16


def test_the_network_is_what_the_paper_draws():
    "Branch by branch, with the batch's own statistics in training mode"
    torch.manual_seed(0)
    net = FeatureFusion([3, 5], 4).train()
    small, large = torch.randn(2, 5, 3, 4), torch.randn(2, 3, 6, 8)
    parts = []
    for branch, a in zip(net.branches, (large, small)):
        z = torch.einsum('oi,bihw->bohw', branch.conv.weight[:, :, 0, 0], a)
        mean, var = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), unbiased=False, keepdim=True)
        parts.append(F.interpolate((a + (z - mean) / (var + 1e-5).sqrt()).relu(), (6, 8), mode='bilinear'))
    fused = torch.einsum('ki,bihw->bkhw', net.fuse.weight[:, :, 0, 0], torch.cat(parts, 1))
    torch.testing.assert_close(net([large, small]), (fused + net.fuse.bias[:, None, None]).sigmoid())


def test_each_term_of_the_loss():
    m = torch.zeros(1, 1, 3, 3)
    m[..., 1, 1] = 0.5
    out = torch.tensor([[0.0, 0.0]]), m, torch.tensor([1])
    terms = TAMELoss().terms(out)
    torch.testing.assert_close(terms['cross_entropy'], torch.tensor(2.0).log())
    torch.testing.assert_close(terms['variation'], torch.tensor(4 * 0.25))  # four neighbours
    torch.testing.assert_close(terms['area'], (torch.tensor(0.5) ** 0.3 + 8 * 1e-6**0.3) / 9)
    total = 1.5 * terms['cross_entropy'] + 2 * terms['area'] + 0.01 * terms['variation']
    torch.testing.assert_close(TAMELoss()(out), total)
    torch.testing.assert_close(TAMELoss(cross_entropy=0, area=0, variation=3)(out), torch.tensor(3.0))


def test_layers_are_the_ends_of_the_last_stages():
    import torchvision

    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    assert tame_layers(resnet, x) == ('layer2.1', 'layer3.1', 'layer4.1')
    tame = build_tame(resnet, x)
    assert tame.config['channels'] == [128, 256, 512] and tame.maps(x)[1].shape == (2, 3, 8, 8)
    assert tame.explain(x).shape == (2, 1, 64, 64)
    assert build_tame(resnet, x, layers=['layer4']).layers == ('layer4',)


class Crash(Callback):
    "Interrupt the training in the middle of the second epoch"

    order = 90

    def before_batch(self):
        if self.training and self.epoch == 1 and self.iter == 1:
            raise KeyboardInterrupt


def run(cnn, *callbacks, **kwargs):
    set_seed(3)
    dls = photo_digits_dls(n_train=48, n_valid=16, size=32, bs=16)
    set_seed(3)
    learn = train_tame(cnn, dls, 3, cbs=callbacks, **kwargs)
    return learn.model


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize('training', [True, False])
def test_the_cnn_is_untouched(training):
    "Weights, statistics, modes and gradients; its labels are not needed either"
    torch.manual_seed(0)
    cnn = small_cnn().train(training)
    cnn[0][1].eval()  # a frozen batch norm
    before, modes = weights_digest(cnn), [m.training for m in cnn.modules()]
    tame = run(cnn)
    assert weights_digest(cnn) == before and [m.training for m in cnn.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in cnn.parameters())
    assert not any(m._forward_hooks for m in cnn.modules())
    untrained = build_tame(cnn, torch.randn(2, 3, 32, 32))
    assert not same(tame.fusion, untrained.fusion)


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    torch.manual_seed(0)
    cnn = small_cnn().eval()
    whole = run(cnn)
    with pytest.raises(KeyboardInterrupt):
        run(cnn, Checkpoint(tmp_path / 'run.ckpt'), Crash())
    torch.randn(100)  # a new process has other random states
    assert same(whole, run(cnn, Checkpoint(tmp_path / 'run.ckpt')))


def test_maps_that_single_out_nothing_are_warned_about():
    with pytest.warns(UserWarning, match="the trained maps are the same everywhere .* train again with a lower lr"):
        run(small_cnn().eval(), lr=1.0, loss=TAMELoss(cross_entropy=0, area=100))


def test_half_precision_trains_the_attention_network_alone():
    torch.manual_seed(0)
    cnn = small_cnn().eval()
    before = weights_digest(cnn)
    half, full = run(cnn, Bf16()), run(cnn)
    assert weights_digest(cnn) == before and not same(half.fusion, full.fusion)
    for value, other in zip(half.fusion.state_dict().values(), full.fusion.state_dict().values()):
        assert (value.float() - other.float()).abs().max() < 0.1


def test_an_antehoc_model_brings_its_normalisation(trained, scenes, tmp_path):
    x, y = scenes
    tame = build_tame(trained, x[:2])
    assert tame.cnn is trained.cnn and torch.equal(tame.mean, trained.mean.cpu())
    again, maps, target = tame.eval()(x[:4])
    mask = F.interpolate(maps, x.shape[2:], mode='bilinear')
    torch.testing.assert_close(again, trained.cnn(trained.mask(x[:4], mask)))
    f = tame_explainer(tame)
    assert torch.equal(f(trained, x[:3], y[:3]), f(copy.deepcopy(trained.cnn), x[:3], y[:3]))
    (tmp_path / 'plain').touch()
    file = tame.save(tmp_path / 'a' / 'tame.safetensors')
    assert file.stat().st_mode == (tmp_path / 'plain').stat().st_mode
    loaded = TAME.load(file, trained)
    assert torch.equal(loaded.explain(x, y), tame.explain(x, y))
    with pytest.raises(ValueError, match='this TAME was trained on another CNN than the one that is explained'):
        f(small_cnn(), x, y)


def test_what_it_cannot_explain():
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r'gives logits \(B,K\) with K > 1, got \(2, 4, 30, 30\)'):
        build_tame(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), x)
    with pytest.raises(ValueError, match="unknown layer 'layer9'"):
        build_tame(small_cnn(), x, layers=['layer9'])
