"""Images and networks of every number type, and every mode that PyTorch can be in: it works, or it is said why not."""
import warnings

import pytest
import torch
from torch import nn

from antehoc_nb.core.interpretation_loss import two_pass_step
from antehoc_nb.core.model import AntehocModel

pytestmark = pytest.mark.usefixtures('one_thread')
X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0])
HALVES = [torch.float16, torch.bfloat16, torch.float64]


def block(before, after, stride=1):
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU())


def cnn():
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(block(3, 8), block(8, 8, 2), *head).eval()


def model_of(net=None, evidence=None): return AntehocModel(cnn() if net is None else net, X, eta=2, evidence=evidence)


def dynamic():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.ao.quantization.quantize_dynamic(cnn(), {nn.Linear}, dtype=torch.qint8)


class QuantisedConvolution(nn.Module):
    "Stands for a network that PyTorch has quantised statically, which takes its own engine"
    def __init__(self):
        super().__init__()
        self.first = torch.ao.nn.quantized.Conv2d(3, 8, 3)


def compiled_before(): return model_of(torch.compile(cnn(), backend='eager'))


def compiled_after():
    model = model_of()
    model.cnn.compile(backend='eager')
    return model


# what the model is like, what the images are like, how near its maps are to those of float32
WORKS = {f'images of {dtype}': (model_of, lambda dtype=dtype: X.to(dtype), .02) for dtype in HALVES}
WORKS |= {f'network of {dtype}': (lambda dtype=dtype: model_of(cnn().to(dtype)), lambda: X, .1) for dtype in HALVES}
WORKS |= {f'model of {dtype}': (lambda dtype=dtype: model_of().to(dtype), lambda: X, .1) for dtype in HALVES}
WORKS |= {
    'dynamic int8': (lambda: model_of(dynamic(), False), lambda: X, .05),
    'compiled before': (compiled_before, lambda: X, 1e-5),
    'compiled after': (compiled_after, lambda: X, 1e-5),
    'model compiled': (lambda: torch.compile(model_of(), backend='eager'), lambda: X, 1e-5),
}


@pytest.mark.parametrize('inference', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('case', WORKS)
def test_it_is_explained(case, inference):
    make, images, tolerance = WORKS[case]
    expected = model_of(evidence=False if 'int8' in case else None).explain(X, target=1)
    with torch.inference_mode(inference): e = make().explain(images(), target=1)
    assert e.map.dtype == torch.float32
    torch.testing.assert_close(e.map, expected.map, atol=tolerance, rtol=0)


@pytest.mark.parametrize('dtype', HALVES)
def test_networks_of_other_types_are_trained(dtype):
    model = model_of(cnn().to(dtype)).train()
    out, int_loss = two_pass_step(model, X.to(dtype), Y)
    (nn.functional.cross_entropy(out.float(), Y) + int_loss).backward()
    assert int_loss.isfinite() and all(weight.grad.isfinite().all() for weight in model.cnn.parameters())
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.weight_net.parameters())


def in_inference_mode():
    with torch.inference_mode(): two_pass_step(model_of().train(), X, Y)


REFUSED = {
    'images of float64': (lambda: two_pass_step(model_of().train(), X.double(), Y), ValueError,
                          'two_pass_step: the images are torch.float64, the weights of the CNN torch.float32; '
                          'use x.to(torch.float32)'),
    'images of float16': (lambda: two_pass_step(model_of().train(), X.half(), Y), ValueError,
                          'two_pass_step: the images are torch.float16, the weights of the CNN torch.float32; '
                          'use x.to(torch.float32)'),
    'quantised': (lambda: two_pass_step(model_of(dynamic()).train(), X, Y), ValueError,
                  'two_pass_step: no gradient goes through the CNN to the map, since its output is detached from its '
                  'input, as that of a quantised network is; train the weight network before that'),
    'quantised convolutions': (
        lambda: AntehocModel(QuantisedConvolution(), X), TypeError,
        "cnn: its module 'first' is a quantised Conv2d, whose integer activations cannot be read; give the network as "
        'it was before (or one with quantised linear layers alone, as quantize_dynamic makes it)'),
    'inference mode': (
        in_inference_mode, ValueError, 'two_pass_step: nothing can be trained in inference mode; leave it out, or '
        'validate in it, after model.eval()'),
    'pixels to 255': (
        lambda: two_pass_step(model_of().train(), X * 255, Y), ValueError,
        f'two_pass_step: these look like pixels from 0 to 255 (the highest is {X.max() * 255:.0f}); divide them by 255 '
        'and normalise; or, if the CNN is meant to get them so, make the model with mean=[0, 0, 0], '
        'std=[1/255, 1/255, 1/255]'),
    'grey': (
        lambda: two_pass_step(model_of().train(), X[:, :1], Y), ValueError, 'two_pass_step: the images have 1 channel, '
        'the CNN takes 3; repeat the grey channel: x.repeat(1, 3, 1, 1)'),
    'alpha': (
        lambda: two_pass_step(model_of().train(), torch.rand(4, 4, 32, 32), Y), ValueError, 'two_pass_step: the '
        'images have 4 channels, the CNN takes 3; drop the alpha channel: x[:, :3]'),
    'labels': (
        lambda: two_pass_step(model_of().train(), X, Y + 1), ValueError, 'label: class 3 is not one of the 3 classes '
        'of the CNN, which have the numbers 0 to 2; give the CNN as many outputs as there are classes'),
}


@pytest.mark.filterwarnings('ignore:AntehocModel. no gradients of the scores')  # of the quantised one
@pytest.mark.parametrize('case', REFUSED)
def test_it_is_refused_by_name(case):
    run, error, message = REFUSED[case]
    with pytest.raises(error) as caught: run()
    assert str(caught.value) == message


def test_pixels_to_255_are_taken_where_that_is_said():
    scale = dict(mean=[0, 0, 0], std=[1/255, 1/255, 1/255])
    model = AntehocModel(cnn(), X * 255, eta=2, **scale)
    assert two_pass_step(model.train(), X * 255, Y)[1].isfinite()
    torch.testing.assert_close(model.explain(X * 255).pixels, X)


def test_validating_in_inference_mode():
    with torch.inference_mode(): assert two_pass_step(model_of().eval(), X, Y)[1].isfinite()


def test_labels_to_ignore_are_no_classes():
    assert two_pass_step(model_of().train(), X, torch.tensor([0, -100, 1, 2]))[1].isfinite()
