"""Explainers: CAMs against another library and plain references, what they must not leave behind, bad explainers."""

import gc
import inspect
import re
import subprocess
import sys
import threading
import weakref
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from antehoc_nb.core.attention import minmax
from antehoc_nb.core.geometry import resize
from antehoc_nb.core.layers import candidate_layers
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.evaluate.explainers import (
    ante_hoc,
    centred_blob,
    edge_map,
    explain_with,
    explainers,
    gaussian_map,
    grad_cam,
    grad_cam_pp,
    is_class_specific,
    layer_cam,
    needs_target,
    random_map,
    score_cam,
)
from antehoc_nb.train.archs import small_cnn

CAMS = dict(grad_cam=grad_cam, grad_cam_pp=grad_cam_pp, layer_cam=layer_cam, score_cam=score_cam)
each_cam = pytest.mark.parametrize('cam', CAMS.values(), ids=CAMS)


def tiny(inplace=False, scale=1.0):
    "Three convolutions, 8 x 8 at the last for images of 16 x 16; `scale` multiplies the logits"
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace),
        nn.Flatten(),
        nn.Linear(512, 5),
    )
    with torch.no_grad():
        cnn[-1].weight.mul_(scale)
        cnn[3].running_mean.normal_(0, 0.1)
    return cnn.eval()


def batch(n=4, side=16, k=5):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(3)), torch.arange(n) % k


def corr(a, b):
    return [np.corrcoef(i.flatten(), j.flatten())[0, 1] for i, j in zip(a.numpy(), b.numpy())]


def other(name, cnn, layer, x, y):
    "The same map by pytorch-grad-cam"
    gc_ = pytest.importorskip('pytorch_grad_cam')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with getattr(gc_, name)(cnn, [layer]) as cam:
        return torch.tensor(cam(x, [ClassifierOutputTarget(int(t)) for t in y]))[:, None]


def state(cnn):
    "All that a CAM must leave as it was"
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    return [(n, m.training, *(len(getattr(m, h)) for h in hooks)) for n, m in cnn.named_modules()] + [
        (n, p.requires_grad, p.grad is None, p._version) for n, p in cnn.named_parameters()
    ]


# --- against pytorch-grad-cam


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('layer', ['1', '4', '6'])
def test_grad_cam_is_the_other_librarys(layer, inplace):
    x, y = batch()
    cnn = tiny(inplace)
    ours = grad_cam(cnn, x, y, layer=layer, aligned=False)
    torch.testing.assert_close(ours, other('GradCAM', cnn, cnn[int(layer)], x, y), atol=1e-4, rtol=0)
    assert ours.flatten(1).std(1).median() > 0.1


@pytest.mark.parametrize('layer', ['1', '4', '6'])
def test_grad_cam_pp_is_the_other_librarys_where_its_epsilon_is_small(layer):
    """pytorch-grad-cam adds 1e-6 to a denominator of about 2 g^2, which outweighs gradients below 1e-3.

    With those of an untrained ResNet-18 at 64 pixels the maps differ by 0.03 at most, and correlate at 0.9998."""
    x, y = batch()
    cnn = tiny(scale=1e3)
    torch.testing.assert_close(
        grad_cam_pp(cnn, x, y, layer=layer, aligned=False),
        other('GradCAMPlusPlus', cnn, cnn[int(layer)], x, y),
        atol=1e-3,
        rtol=0,
    )


@pytest.mark.parametrize('layer', ['1', '4', '6'])
def test_layer_cam_is_the_other_librarys(layer):
    "pytorch-grad-cam's, and torchcam's own, which is not enlarged"
    x, y = batch()
    cnn = tiny()
    ours = layer_cam(cnn, x, y, layer=layer, aligned=False)
    torch.testing.assert_close(ours, other('LayerCAM', cnn, cnn[int(layer)], x, y), atol=1e-4, rtol=0)
    methods = pytest.importorskip('torchcam.methods')
    with methods.LayerCAM(cnn, layer) as extract:
        theirs = extract(y.tolist(), cnn(x))[0]
    torch.testing.assert_close(ours, minmax(resize(theirs[:, None], x.shape[2:])), atol=1e-4, rtol=0)
    assert (ours - grad_cam(cnn, x, y, layer=layer, aligned=False)).abs().amax() > 0.1


def by_definition(cnn, k, x, y):
    "Grad-CAM++ with alpha written as in the paper, in double precision"
    cnn, x = cnn.double(), x.double()
    a = cnn[: k + 1](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(cnn[k + 1 :](a).gather(1, y[:, None]).sum(), a)
    alpha = torch.where(g != 0, g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3), 0)
    m = ((alpha * g.relu()).sum((2, 3), keepdim=True) * a).sum(1, keepdim=True).relu()
    return minmax(resize(minmax(m.detach()), x.shape[2:]))


@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
def test_grad_cam_pp_is_the_papers_at_any_scale_of_the_gradient(scale):
    x, y = batch()
    torch.testing.assert_close(
        grad_cam_pp(tiny(scale=scale), x, y, aligned=False),
        by_definition(tiny(scale=scale), 6, x, y),
        atol=1e-4,
        rtol=0,
    )


def test_cams_lie_where_the_layer_looks():
    "A spot in the image lies in its place on the map, after three strided convolutions; spread evenly, 3.5 pixels off"
    convs = [o for _ in range(3) for o in (nn.Conv2d(1, 1, 3, 2, 1, bias=False), nn.ReLU())]
    cnn = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    for p in cnn.parameters():
        nn.init.ones_(p)
    x = torch.zeros(1, 1, 64, 64)
    x[..., 24, 40] = 1  # cell (3, 5) of the last layer is centred there

    def where(m):
        return divmod(m.flatten().argmax().item(), 64)

    assert where(grad_cam(cnn, x, 0, layer='5')) == (24, 40)
    r, c = where(grad_cam(cnn, x, 0, layer='5', aligned=False))
    assert abs(r - 27.5) <= 0.5 and abs(c - 43.5) <= 0.5


def test_torchcams_own_grad_cam_pp_lacks_the_division():
    """The reason for our own weights. When this fails, torchcam has mended it: use its extractor as it is.

    Its maps correlate with the paper's at 0.76 to 0.999 on an untrained ResNet-18, 0.4 to 0.6 on `tiny(scale=1e3)`."""
    methods = pytest.importorskip('torchcam.methods')
    cnn, (x, y) = tiny(), batch()
    with methods.GradCAMpp(cnn, '6') as extract:
        w = extract._get_weights(y.tolist(), cnn(x))[0]
        g = extract.hook_g[0]
    torch.testing.assert_close(w, g.relu().pow(3).sum((2, 3)))


def test_score_cam_is_the_other_librarys_at_full_resolution():
    """There nothing is enlarged: pytorch-grad-cam enlarges masks with align_corners=True and scales them afterwards.

    torchcam does neither. On a ResNet-18's last layer that makes 0.04 at most. Where logits are so large that one
    channel takes the whole softmax, it can be another channel."""
    x, y = batch()
    cnn = tiny(scale=30.0)
    torch.testing.assert_close(score_cam(cnn, x, y, layer='1'), other('ScoreCAM', cnn, cnn[1], x, y), atol=1e-4, rtol=0)


def test_score_cam_correlates_where_masks_are_enlarged_differently():
    x, y = batch()
    cnn = tiny()
    assert min(corr(score_cam(cnn, x, y), other('ScoreCAM', cnn, cnn[6], x, y))) > 0.9999


def test_score_cam_is_its_definition():
    x, y = batch(2)
    cnn = tiny(scale=30.0)
    with torch.no_grad():
        a, maps = cnn[:7](x), []
        for i in range(2):
            gain = [
                cnn(x[i : i + 1] * resize(minmax(a[i : i + 1, k : k + 1]), (16, 16)))[0, y[i]]
                - cnn(x[i : i + 1])[0, y[i]]
                for k in range(8)
            ]
            m = (torch.stack(gain).softmax(0)[:, None, None] * a[i]).sum(0).relu()
            maps.append(minmax(resize(minmax(m[None, None]), (16, 16))))
    torch.testing.assert_close(score_cam(cnn, x, y), torch.cat(maps), atol=1e-4, rtol=0)
    torch.testing.assert_close(score_cam(cnn, x, y, bs=5), torch.cat(maps), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_resnet18_at_64_pixels():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=7).eval()
    x, y = batch(3, 64, 7)
    assert candidate_layers(net, x)[-1].name.startswith('layer4.1')
    torch.testing.assert_close(
        grad_cam(net, x, y, aligned=False), other('GradCAM', net, net.layer4, x, y), atol=1e-3, rtol=0
    )
    assert min(corr(grad_cam_pp(net, x, y, aligned=False), other('GradCAMPlusPlus', net, net.layer4, x, y))) > 0.99
    x, y = batch(1, 40, 7)
    torch.testing.assert_close(
        explain_with('score-cam', net, x, y), score_cam(net, x, y, layer='layer4'), atol=1e-4, rtol=0
    )


@each_cam
def test_a_timm_model(cam):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    net = timm.create_model('mobilenetv3_small_050', num_classes=4).eval()
    x, y = batch(2, 64, 4)
    m = cam(net, x, y)
    assert m.shape == (2, 1, 64, 64) and m.min() == 0 and m.max() == 1
    if cam is not grad_cam:
        return
    layer = net.get_submodule(candidate_layers(net, x)[-1].name.split('+')[0])
    torch.testing.assert_close(cam(net, x, y, aligned=False), other('GradCAM', net, layer, x, y), atol=1e-3, rtol=0)


# --- one map per image and class


@each_cam
def test_batch_is_one_by_one(cam):
    x, y = batch(5)
    cnn = tiny()
    m = cam(cnn, x, y)
    torch.testing.assert_close(
        m, torch.cat([cam(cnn, x[i : i + 1], y[i : i + 1]) for i in range(5)]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(m, explain_with(cam, cnn, x, y, bs=2), atol=1e-5, rtol=0)
    for i, c in enumerate(y):  # an image's class is its own
        torch.testing.assert_close(m[i], cam(cnn, x, torch.full((5,), int(c)))[i], atol=1e-5, rtol=0)


@each_cam
def test_an_antehoc_model_is_tapped_at_its_last_layer_and_calls_can_be_told_apart(cam):
    class Shared(nn.Module):  # one ReLU module for three places
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Linear(6, 5)

        def forward(self, x):
            return self.out(self.relu(self.b(self.relu(self.a(x)))).mean((2, 3)))

    torch.manual_seed(0)
    cnn, (x, y) = Shared().eval(), batch()
    model = AntehocModel(cnn, sample=x, eta=2)
    assert model.layers == ('relu:0', 'relu:1')
    torch.testing.assert_close(cam(model, x, y), cam(cnn, x, y, layer='relu:1'))
    assert (cam(model, x, y) - cam(cnn, x, y, layer='relu:0')).abs().max() > 0.1
    with pytest.raises(ValueError, match="layer 'relu' is called 2 times in one pass; say which call"):
        cam(cnn, x, y, layer='relu')


def test_the_named_call_is_the_one_weighed():
    torch.manual_seed(0)
    relu = nn.ReLU()
    shared = nn.Sequential(nn.Conv2d(3, 6, 3), relu, nn.Conv2d(6, 6, 3), relu, nn.Flatten(), nn.Linear(864, 5)).eval()
    apart = nn.Sequential(*(nn.ReLU() if m is relu else m for m in shared))
    x, y = batch()
    torch.testing.assert_close(grad_cam(shared, x, y, layer='1:0'), grad_cam(apart, x, y, layer='1'))
    torch.testing.assert_close(grad_cam(shared, x, y, layer='1:1'), grad_cam(apart, x, y, layer='3'))


@pytest.mark.parametrize('shape', [(1, 1, 16, 24), (2, 3, 20, 12)])
@each_cam
def test_grey_and_oblong_images(cam, shape):
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nn.Conv2d(shape[1], 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    m = cam(cnn, torch.randn(shape), torch.zeros(shape[0], dtype=torch.long))
    assert m.shape == (shape[0], 1, *shape[2:]) and m.dtype == torch.float32


# --- nothing stays behind


@each_cam
@pytest.mark.parametrize(
    'around', [nullcontext, torch.no_grad, torch.inference_mode], ids=['plain', 'no_grad', 'inference_mode']
)
@pytest.mark.parametrize('frozen', [False, True], ids=['trainable', 'frozen'])
@pytest.mark.parametrize('inplace', [False, True], ids=['', 'inplace'])
def test_modes_of_caller_and_cnn(cam, around, frozen, inplace):
    x, y = batch()
    want = cam(tiny(), x, y)
    cnn = tiny(inplace).train().requires_grad_(not frozen)
    cnn[3].eval()
    before, stats = state(cnn), cnn[3].running_mean.clone()
    with around():
        m = cam(cnn, x * 1, y)  # in inference mode an image that autograd does not take
        torch.testing.assert_close(m * 1, want, atol=1e-5, rtol=0)
        torch.testing.assert_close(explain_with(cam, cnn, x * 1, y) * 1, want, atol=1e-5, rtol=0)
    assert not m.requires_grad and not m.is_inference()
    assert state(cnn) == before and torch.equal(cnn[3].running_mean, stats)


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError('on purpose')


@each_cam
@pytest.mark.parametrize('layer', ['2', '3', '5'])
def test_an_inplace_relu_that_follows_does_not_rewrite_the_activation(cam, layer):
    x, y = batch()
    want = cam(tiny(), x, y, layer=layer)
    torch.testing.assert_close(cam(tiny(inplace=True), x, y, layer=layer), want)
    after = cam(tiny(), x, y, layer={'2': '4', '3': '4', '5': '6'}[layer])
    if cam is layer_cam and layer != '2':  # where the ReLU is 0, so is the gradient in front of it
        torch.testing.assert_close(want, after)
    else:
        assert (want - after).abs().max() > 0.01


@each_cam
@pytest.mark.parametrize('around', [nullcontext, torch.no_grad])
def test_an_exception_leaves_nothing_either(cam, around):
    cnn, (x, y) = tiny().train(), batch()
    for broken in (
        nn.Sequential(*cnn[:7], Fails(), *cnn[7:]),
        nn.Sequential(Fails(), *cnn),
        nn.Sequential(*cnn, Fails()),
    ):
        before = state(broken)
        with around(), pytest.raises(RuntimeError, match='on purpose'):
            cam(broken, x, y)
        assert state(broken) == before


@each_cam
def test_an_exception_in_the_middle_of_the_extraction(cam):
    "The second pass of Score-CAM, the backward pass of the others"

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError('backward on purpose')

    class Head(nn.Module):
        n = 0

        def forward(self, x):
            self.n += 1
            if cam is score_cam and self.n > 2:
                raise RuntimeError('forward on purpose')
            return Once.apply(x)

    body, (x, y) = tiny(), batch()
    cnn = nn.Sequential(*body[:7], Head(), *body[7:])
    before = state(cnn)
    with pytest.raises(RuntimeError):
        cam(cnn, x, y, layer='6')
    assert state(cnn) == before


@each_cam
def test_tensors_are_freed(cam):
    "No map, activation, image or graph outlives the call, also without the garbage collector's help."
    cnn, seen = tiny(), []
    h = cnn[6].register_forward_hook(lambda m, a, o: seen.append(weakref.ref(o)))
    gc.collect()
    gc.disable()
    try:
        x, y = batch()
        image = weakref.ref(x)
        m = cam(cnn, x, y)
        del x
        alive = [r for r in seen if r() is not None]
    finally:
        gc.enable()
        h.remove()
    assert seen and not alive and image() is None and m.grad_fn is None


@pytest.mark.slow
@each_cam
def test_memory_is_flat(cam):
    cnn, (x, y) = tiny(), batch()

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    cam(cnn, x, y)
    n = tensors()
    for _ in range(20):
        cam(cnn, x, y)
    assert tensors() == n


def test_a_users_own_hooks_stay_and_still_run():
    cnn, (x, y), seen = tiny(), batch(), []
    h = cnn[6].register_forward_hook(lambda m, a, o: seen.append(1))
    want = grad_cam(tiny(), x, y)
    torch.testing.assert_close(grad_cam(cnn, x, y), want)
    assert seen and len(cnn[6]._forward_hooks) == 1
    h.remove()


def test_threads_do_not_see_each_other():
    cnn, (x, y) = tiny(), batch()
    model = AntehocModel(cnn, sample=x, eta=2)
    want, got = grad_cam(model, x, y), {}

    def work(i):
        got[i] = [grad_cam(model, x[i : i + 1], y[i : i + 1]) for _ in range(20)]

    ts = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in ts:
        t.start()
    for t in ts:
        t.join()
    for i in range(4):
        for m in got[i]:
            torch.testing.assert_close(m[0], want[i], atol=1e-5, rtol=0)
    assert not any(m._forward_hooks for m in cnn.modules())


def test_gradients_of_a_training_step_survive():
    cnn, (x, y) = tiny().train(), batch()
    cnn(x).sum().backward()
    grads = [p.grad.clone() for p in cnn.parameters()]
    for cam in CAMS.values():
        cam(cnn, x, y)
    for g, p in zip(grads, cnn.parameters()):
        assert torch.equal(g, p.grad)


# --- values


@each_cam
def test_blank_maps_are_zero_and_tiny_ones_are_scaled(cam):
    x, y = batch()
    silent = tiny()
    nn.init.constant_(silent[5].bias, -1e4)
    assert torch.equal(cam(silent, x, y, layer='6'), torch.zeros(4, 1, 16, 16))
    flat = tiny()
    nn.init.zeros_(flat[5].weight)
    nn.init.ones_(flat[5].bias)  # the same everywhere: singles out nothing
    if cam is layer_cam:  # which has a weight for each place
        nn.init.ones_(flat[8].weight)
    assert torch.equal(cam(flat, x, y, layer='6'), torch.zeros(4, 1, 16, 16))
    top = cam(tiny(scale=1e-12), x, y).flatten(1).amax(1)
    assert torch.equal(top, cam(tiny(), x, y).flatten(1).amax(1)) and top.sum() >= 3


@each_cam
def test_a_cnn_that_gives_nan_is_named(cam):
    cnn, (x, y) = tiny(), batch()
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=re.escape(f"explainer {cam.__name__!r} returned NaN or infinity in the maps of 1 of 4 images")
    ):
        explain_with(cam, cnn, x, y)


@given(st.integers(0, 10**6), st.integers(8, 20), st.integers(8, 20), st.integers(1, 3))
def test_controls_do_not_depend_on_the_batch(seed, h, w, c):
    x = torch.randn(3, c, h, w, generator=torch.Generator().manual_seed(seed))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for name in ('ones', 'random', 'gaussian', 'edges'):
        m = explain_with(name, None, x)
        assert m.shape == (3, 1, h, w) and m.min() >= 0 and m.max() <= 1 and m.dtype == torch.float32
        assert torch.equal(m, explain_with(name, None, x, bs=1)) and torch.equal(
            m.flip(0), explain_with(name, None, x.flip(0))
        )
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    m = random_map(None, x)
    assert m.flatten(1).amin(1).max() == 0 and m.flatten(1).amax(1).min() == 1


def test_noise_peaks_anywhere():
    "As often in the middle quarter of the image as its area says, and its peaks are broad"
    x = torch.arange(400.0)[:, None, None, None].expand(400, 1, 24, 24).contiguous()
    m = random_map(None, x)
    r, c = np.unravel_index(m.flatten(1).argmax(1).numpy(), (24, 24))
    assert 0.17 < np.mean((6 <= r) & (r < 18) & (6 <= c) & (c < 18)) < 0.33  # a quarter, 0.25 +- 3.7 standard errors
    assert np.mean([np.corrcoef(a.flatten(), np.roll(a, 1, 1).flatten())[0, 1] for a in m[:20, 0].numpy()]) > 0.9


def test_gaussian_and_edges_are_what_they_say():
    x = torch.zeros(1, 3, 33, 33)
    x[..., 16:] = 1
    e = edge_map(None, x)[0, 0]
    assert e[:, 15:17].min() > 0.99 and e[:, :10].max() < 1e-3 and e[:, 22:].max() < 1e-3
    assert torch.equal(gaussian_map(None, x), centred_blob(1, (33, 33)))
    g = gaussian_map(None, x)[0, 0]
    assert g.argmax() == 16 * 33 + 16 and g[16, 24] == pytest.approx(
        np.exp(-0.5), abs=1e-3
    )  # a quarter of the side from the middle


# --- errors


def test_the_registry_names_what_is_near():
    for wrong, near in (
        ('gradcam', "'grad-cam'"),
        ('score_cam', "'score-cam'"),
        ('antehoc', "'ante-hoc'"),
        ('gausian', "'gaussian'"),
    ):
        with pytest.raises(ValueError, match=f'unknown explainer {wrong!r}: did you mean .*{near}'):
            explain_with(wrong, tiny(), batch()[0])
    assert tuple(explainers)[: len(OWN)] == OWN


def where_marked(x, v):
    return torch.where(x[:, :1].amax((2, 3), keepdim=True) > 5, v, 0.5).expand(-1, 1, 16, 16)


@pytest.mark.parametrize(
    'result, message',
    [
        (
            lambda x: torch.rand(len(x), 16, 16),
            "returned (2, 16, 16) for 2 images; it must return a tensor (2, 1, 16, 16)",
        ),
        (
            lambda x: torch.rand(len(x), 3, 16, 16),
            "returned (2, 3, 16, 16) for 2 images; it must return a tensor (2, 1, 16, 16)",
        ),
        (
            lambda x: torch.rand(1, 1, 16, 16),
            "returned (1, 1, 16, 16) for 2 images; it must return a tensor (2, 1, 16, 16)",
        ),
        (lambda x: None, "returned a NoneType for 2 images; it must return a tensor (2, 1, 16, 16)"),
        (lambda x: np.zeros((2, 1, 16, 16)), "returned a ndarray for 2 images; it must return a tensor (2, 1, 16, 16)"),
        (lambda x: x[:, :1] * 0 + 1.5, "returned values outside [0,1] in the maps of 5 of 5 images"),
        (lambda x: where_marked(x, -0.1), "returned values outside [0,1] in the maps of 2 of 5 images"),
        (lambda x: where_marked(x, torch.nan), "returned NaN or infinity in the maps of 2 of 5 images"),
        (lambda x: where_marked(x, torch.inf), "returned NaN or infinity in the maps of 2 of 5 images"),
    ],
)
def test_bad_explainers(result, message):
    x, y = batch(5)
    x[1, 0, 0, 0] = x[4, 0, 0, 0] = 9.0

    def mine(model, x, target):
        return result(x)

    with pytest.raises(ValueError, match='^' + re.escape(f"explainer 'mine' {message}") + '$'):
        explain_with(mine, tiny(), x, y, bs=2)
    with pytest.raises(ValueError, match="explainer 'mine'"):
        explain_with(partial(mine), tiny(), x, y, bs=2)


def test_rounding_errors_are_forgiven():
    x, y = batch()
    m = explain_with(
        lambda model, x, t: torch.full((4, 1, 16, 16), 1 + 2e-7, requires_grad=True).half().float(), tiny(), x, y
    )
    assert m.max() == 1 and not m.requires_grad


@each_cam
def test_several_inputs_are_refused_and_how_to_wrap_them(cam):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = tiny()

        def forward(self, x, extra):
            return self.cnn(x) + extra

    x, y = batch()
    model = AntehocModel(Two(), sample=(x, torch.zeros(4, 5)), eta=2)
    message = (
        'explainers give a CNN the images and nothing else, which Two does not accept '
        r"\(missing a required argument: 'extra'\); wrap it in a module"
    )
    for m in (model, model.cnn):
        with pytest.raises(TypeError, match=message):
            cam(m, x, y)
        with pytest.raises(TypeError, match=message):
            explain_with(cam, m, x)
    with pytest.raises(TypeError, match=message):
        ante_hoc(model, x)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x):
            return self.two(x, torch.ones(5))

    torch.testing.assert_close(cam(Wrapped(), x, y), cam(tiny(), x, y))


def test_targets_and_images_that_do_not_fit():
    cnn, (x, y) = tiny(), batch()
    for bad, error, message in (
        (y[:2], ValueError, 'target has shape (2,) for 4 images'),
        (y + 4, ValueError, 'target must lie in 0..4 for this model, got 7'),
        (y - 1, ValueError, 'class numbers from 0, got -1'),
        (y.float(), TypeError, 'class numbers (integers), not torch.float32'),
    ):
        with pytest.raises(error, match=re.escape(message)):
            explain_with('grad-cam', cnn, x, bad)
    with pytest.raises(ValueError, match='give one class number per image'):
        grad_cam(cnn, x, None)
    torch.testing.assert_close(explain_with('grad-cam', cnn, x, 2), grad_cam(cnn, x, torch.full((4,), 2)))
    torch.testing.assert_close(explain_with('grad-cam', cnn, x), grad_cam(cnn, x, cnn(x).argmax(1)))
    for bad in (x[0], x[:0], x.long(), x.numpy()):
        with pytest.raises(ValueError, match='images must be a floating-point tensor'):
            explain_with('ones', cnn, bad)
    with pytest.raises(ValueError, match='at least one image per batch'):
        explain_with('ones', cnn, x, bs=0)
    with pytest.raises(ValueError, match="unknown layer '44'"):
        grad_cam(cnn, x, y, layer='44')
    with pytest.raises(ValueError, match=r"layer '8' \(Linear\) does not return"):
        grad_cam(cnn, x, y, layer='8')
    with pytest.raises(TypeError, match="'ante-hoc' needs an AntehocModel, not a Sequential"):
        explain_with('ante-hoc', cnn, x)


def test_outputs_that_are_no_logits():
    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = tiny()

        def forward(self, x):
            return {'points': self.cnn(x)}

    x, y = batch()
    model = AntehocModel(Dict(), sample=x, eta=2)
    with pytest.raises(ValueError, match=r'a CNN that gives logits \(B,K\) is needed, got dict'):
        explain_with('grad-cam', model, x)
    with pytest.raises(ValueError, match=r'a CNN that gives logits \(B,K\) is needed, got dict'):
        explain_with('score-cam', model, x, y)
    torch.testing.assert_close(explain_with('ante-hoc', model, x), model.explain(x).map)  # needs no class
    assert explain_with('edges', model, x).shape == (4, 1, 16, 16)


def test_registered_functions_have_autograd_wherever_they_are_called():
    def saliency(model, x, target):
        assert not model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        x.requires_grad_()
        (g,) = torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)
        return minmax(g.abs().amax(1, keepdim=True))

    cnn, (x, y) = tiny().train(), batch()
    want = explain_with(saliency, cnn, x, y)
    with torch.inference_mode():
        got = explain_with(saliency, cnn, x * 1, y, bs=3)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert cnn.training and not x.requires_grad


def test_fastai_tensors_and_half_precision_models():
    from fastai.torch_core import TensorCategory, TensorImage

    x, y = batch()
    model = AntehocModel(small_cnn(5), sample=x, eta=3).eval()
    for name in ('ante-hoc', 'grad-cam', 'grad-cam++', 'layer-cam', 'score-cam', 'random', 'edges', 'ones', 'gaussian'):
        m = explain_with(name, model, TensorImage(x), TensorCategory(y))
        assert type(m) is torch.Tensor and m.dtype == torch.float32
        torch.testing.assert_close(m, explain_with(name, model, x, y))
    torch.testing.assert_close(grad_cam(tiny().double(), x.double(), y), grad_cam(tiny(), x, y), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_comparing_libraries_are_optional():
    code = '''
import sys
import torch
from antehoc_nb.evaluate.explainers import explain_with, explainers
print(sorted({'torchcam', 'captum', 'pytorch_grad_cam', 'skimage'} & set(sys.modules)))
sys.modules['torchcam'] = None
cnn = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
x = torch.rand(2, 3, 8, 8)
assert explain_with('edges', cnn, x).shape == (2, 1, 8, 8)
for name in ('grad-cam', 'grad-cam++', 'layer-cam', 'score-cam'):
    try: explain_with(name, cnn, x)
    except ImportError as e: print(e)
'''
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert not r.returncode, r.stderr
    message = "class activation maps are made by torchcam: pip install torchcam"
    assert r.stdout.splitlines() == ['[]'] + [message] * 4


OWN = 'ante-hoc', 'grad-cam', 'grad-cam++', 'layer-cam', 'score-cam', 'ones', 'random', 'gaussian', 'edges'


@pytest.mark.parametrize('name', [*OWN, 'plain average of layers', 'regression-cam'])
def test_the_protocol_of_every_entry(name):
    p = list(inspect.signature(explainers[name]).parameters)
    assert p[:3] == ['model', 'x', 'target']
    cams = 'grad-cam', 'grad-cam++', 'layer-cam', 'score-cam'
    assert needs_target(name) == needs_target(explainers[name]) == (name in cams)


@pytest.mark.parametrize('form', ['auto', 'paper'])
def test_the_ante_hoc_map_is_class_specific_where_the_weight_network_is(form):
    model = AntehocModel(tiny(), sample=batch()[0], eta=2, weight_net=form)
    for ours in ('ante-hoc', ante_hoc):
        assert is_class_specific(ours, model) == model.class_specific == (form == 'auto')
    assert is_class_specific('layer-cam', model) and is_class_specific(partial(ante_hoc), model)
    assert not is_class_specific('edges', model) and not is_class_specific('ante-hoc', tiny())


@pytest.mark.parametrize(
    'settings', [dict(evidence=False), dict(weight_net='paper'), dict(class_specific=False, cells='pixels')], ids=str
)
def test_the_plain_average_is_what_an_untrained_weight_network_makes(settings):
    "Whatever the resolution of the map; images are not square, since maps are enlarged along both sides"
    torch.manual_seed(0)
    x = torch.rand(3, 3, 64, 88)
    model = AntehocModel(small_cnn(5), sample=x, **settings).eval()
    average = explain_with('plain average of layers', model, x)
    torch.testing.assert_close(average, model.explain(x).map)
    for p in model.weight_net.parameters(): p.data.add_(0.3 * torch.randn_like(p))  # as if trained
    assert (average - model.explain(x).map).abs().max() > 0.01
    torch.testing.assert_close(explain_with('plain average of layers', model, x), average)


def test_what_the_registry_says_of_targets():
    "A function that is not registered gets the predicted class, by itself or in a partial; `ante_hoc` in a partial too"
    cnn, x, seen = tiny(), batch()[0], []

    def mine(model, x, target):
        seen.append(target)
        return torch.ones(len(x), 1, 16, 16)

    for f in (mine, partial(mine)):
        assert needs_target(f)
        explain_with(f, cnn, x)
        assert torch.equal(seen.pop(), cnn(x).argmax(1))
    assert needs_target(partial(ante_hoc))
    explainers.register(mine, name='mine', needs_target=False)
    try:
        for f in (mine, 'mine'):
            explain_with(f, cnn, x)
            assert seen.pop() is None
    finally:
        del explainers['mine']


def test_maps_of_a_trained_model(trained, scenes):
    "All explainers that need no extra argument, with and without the true classes"
    x, y = scenes
    for name in (*OWN, 'plain average of layers', 'regression-cam'):
        maps = explain_with(name, trained, x, y, bs=5)
        assert maps.shape == (16, 1, 32, 32)
        torch.testing.assert_close(explain_with(name, trained, x, trained(x).argmax(1)), explain_with(name, trained, x))
    own = trained.explain(x, target=y if trained.class_specific else None).map
    assert torch.equal(explain_with('ante-hoc', trained, x, y), own)
