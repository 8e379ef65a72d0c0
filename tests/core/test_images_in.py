"""Images as people have them, and what is said about those that can't be right."""
import copy
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from workers import small_cnn

from antehoc_nb.core import utils
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import as_rgb, open_rgb, rgb_image, rgb_images

pytestmark = pytest.mark.usefixtures('one_thread')
MEAN, STD = (.485, .456, .406), (.229, .224, .225)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def model_of(c=3, size=(24, 32), **kwargs):
    torch.manual_seed(0)
    meta = dict(vocab=[f'class {i}' for i in range(10)]) | (dict(size=list(size)) if size else {})
    return AntehocModel(small_cnn(c=c), torch.rand(2, c, 32, 32), eta=3, meta=meta, **kwargs).eval()


@pytest.fixture
def model(): return model_of(mean=MEAN, std=STD)


def warnings_of(f):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        f()
    return [str(w.message) for w in caught if w.category is UserWarning]


# --- One way of opening

@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'LA', 'P', '1', 'CMYK', 'YCbCr', 'HSV', 'LAB', 'I;16', 'I', 'F'])
def test_every_mode_becomes_rgb(mode):
    grey = Image.fromarray(PIXELS[..., 0])
    if mode == 'I;16': image = Image.fromarray(PIXELS[..., 0].astype('uint16') * 257)
    elif mode == 'I': image = Image.fromarray(PIXELS[..., 0].astype('int32') * 257)
    elif mode == 'F': image = Image.fromarray(PIXELS[..., 0].astype('float32') / 255)
    elif mode in ('L', 'LA'): image = grey.convert(mode)
    elif mode == 'LAB': image = Image.new('LAB', (60, 40))
    else: image = Image.fromarray(PIXELS).convert(mode)
    assert image.mode == mode
    rgb = as_rgb(image)
    assert rgb.mode == 'RGB' and rgb.size == (60, 40)
    if mode in ('L', 'LA', 'I;16', 'I', 'F'): assert np.array_equal(np.asarray(rgb)[..., 0], PIXELS[..., 0])
    if mode in ('RGB', 'RGBA'): assert np.array_equal(np.asarray(rgb), PIXELS)


@pytest.mark.parametrize('transparent', ['RGBA', 'LA', 'palette', 'key'])
def test_what_is_transparent_is_white(tmp_path, transparent):
    if transparent == 'RGBA': image = Image.new('RGBA', (4, 4), (9, 9, 9, 0))
    elif transparent == 'LA': image = Image.new('LA', (4, 4), (9, 0))
    elif transparent == 'palette':
        image = Image.new('P', (4, 4), 0)
        image.putpalette([9, 9, 9])
        image.info['transparency'] = 0
    else:
        image = Image.new('RGB', (4, 4), (9, 9, 9))
        image.info['transparency'] = (9, 9, 9)
    image.save(tmp_path/'a.png')
    assert open_rgb(tmp_path/'a.png').getpixel((0, 0)) == as_rgb(image).getpixel((0, 0)) == (255, 255, 255)


def test_floats_outside_are_refused():
    message = r'an image of floats must lie in \[0,1\], it goes from 0 to 200; divide by 255'
    with pytest.raises(ValueError, match=message):
        as_rgb(Image.fromarray(np.array([[0., 200.]], 'float32')))


@pytest.mark.parametrize('image, error, message', [
    (np.zeros((2, 3, 4, 5, 6)), ValueError,
     'an image as an array is (H,W) or (H,W,C) with 1, 3 or 4 channels, got (3, 4, 5, 6)'),
    (np.zeros((8, 8, 2)), ValueError, 'with 1, 3 or 4 channels, got (8, 8, 2)'),
    (np.zeros((0, 8, 3), np.uint8), ValueError, 'got (0, 8, 3)'),
    (np.zeros(8), ValueError, 'got (8,)'),
    (np.full((4, 4), np.inf), ValueError, 'an array has NaN or infinite values'),
    (np.zeros((4, 4), complex), TypeError, 'an array of complex128 is no image'),
    (np.array([['a']]), TypeError, 'an array of <U1 is no image'),
    (torch.zeros(2, 8, 8, dtype=torch.uint8), ValueError,
     'an image as a tensor is (C,H,W) with 1, 3 or 4 channels, got (2, 8, 8)'),
    (torch.zeros(8, 8, dtype=torch.uint8), ValueError, 'got (8, 8)'),
    ([torch.zeros(3, 8, 8, dtype=torch.int32)], TypeError, 'a tensor of torch.int32 is no image'),
    ([PIXELS, 5], TypeError, 'a int is no image'), (None, TypeError, 'a NoneType is no image'),
    (iter(()), ValueError, 'there is no image: the list or batch is empty'),
    (np.zeros((0, 8, 8, 3), np.uint8), ValueError, 'there is no image'),
])
def test_what_is_no_image(image, error, message):
    with pytest.raises(error) as e: rgb_images(image)
    assert message in str(e.value)


@pytest.mark.parametrize('bad, error', [
    (None, TypeError), (PIXELS[..., :2], ValueError), (Image.new('RGB', (0, 8)), ValueError), ([PIXELS], TypeError),
    (torch.zeros(3, 8, 8), ValueError)])
def test_what_is_no_image_in_a_list_is_named_by_its_position(model, bad, error):
    with pytest.raises(error, match='^image 1 of 3: '): model.explain([PIXELS, bad, PIXELS])


def test_an_image_without_pixels():
    with pytest.raises(ValueError, match='the image has no pixels: its size is 0 x 8'):
        rgb_image(Image.new('RGB', (0, 8)))


def test_a_broken_file_is_named(tmp_path, model):
    (tmp_path/'empty.jpg').write_bytes(b'')
    Image.fromarray(PIXELS).save(tmp_path/'good.png')
    with pytest.raises(OSError, match='empty.jpg'): model.explain([tmp_path/'good.png', tmp_path/'empty.jpg'])
    with pytest.raises(FileNotFoundError, match='missing.jpg'): model.explain(str(tmp_path/'missing.jpg'))


# --- Into the model

@pytest.mark.parametrize('kind', ['path', 'str', 'bytes', 'file', 'pil', 'array', 'floats', 'float32', 'tensor',
                                  'batch', 'rgba', 'tuple', 'generator', 'arrays'])
def test_every_kind_is_the_same_image(tmp_path, model, kind):
    Image.fromarray(PIXELS).save(tmp_path/'a.png')
    tensor = torch.tensor(PIXELS).permute(2, 0, 1)
    rgba = np.concatenate([PIXELS, np.full((40, 60, 1), 255, np.uint8)], 2)
    images = dict(path=tmp_path/'a.png', str=str(tmp_path/'a.png'), bytes=(tmp_path/'a.png').read_bytes(),
                  file=open(tmp_path/'a.png', 'rb'), pil=Image.fromarray(PIXELS), array=PIXELS, floats=PIXELS / 255,
                  float32=(PIXELS / 255).astype('float32'), tensor=tensor, batch=tensor[None], rgba=rgba,
                  tuple=(PIXELS,), generator=(o for o in [PIXELS]), arrays=PIXELS[None])[kind]
    want = np.asarray(Image.fromarray(PIXELS).resize((32, 24), Image.Resampling.BILINEAR, reducing_gap=2.))
    x = (torch.tensor(want.copy()).permute(2, 0, 1)[None].contiguous() / 255. - model.mean) / model.std
    e = model.explain(images)
    assert torch.equal(e.image, x) and torch.equal(e.map, model.explain(x).map)
    assert np.array_equal(np.asarray(e.photos[0]), PIXELS) and len(e.photos) == 1


def test_images_of_many_sizes_and_kinds(model):
    narrow = torch.tensor(PIXELS[:, :7]).permute(2, 0, 1)
    e = model.explain([Image.fromarray(PIXELS), PIXELS[:9], PIXELS[..., 0], narrow])
    assert e.map.shape == (4, 1, 24, 32)
    assert [photo.size for photo in e.photos] == [(60, 40), (60, 9), (60, 40), (7, 40)]


def test_grey_networks_see_grey():
    m = model_of(c=1, mean=[.5], std=[.25])
    rgb, grey = m.explain(PIXELS), m.explain(np.asarray(Image.fromarray(PIXELS).convert('L')))
    assert rgb.image.shape == (1, 1, 24, 32)
    torch.testing.assert_close(rgb.image, grey.image, atol=.03, rtol=0)


def test_other_numbers_of_channels_have_no_files():
    with pytest.raises(ValueError, match='takes images of 4 channels, which no image file has'):
        model_of(c=4).explain(PIXELS)


def test_further_arguments_stay(model):
    class WithAge(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_cnn(2)

        def forward(self, x, age, *, scale=1.): return self.body(x) * scale + age
    m = AntehocModel(WithAge(), (torch.rand(2, 3, 32, 32), torch.rand(2, 1)), eta=2, meta=dict(size=32))
    e = m.explain([PIXELS, PIXELS], torch.ones(2, 1), scale=2.)
    assert e.pred.shape == (2, 2) and e.image.shape == (2, 3, 32, 32)


def test_size_and_dtype_come_from_the_model():
    m = model_of(size=None)
    said = warnings_of(lambda: [m.explain(PIXELS) for _ in range(3)])
    assert said == ['explain: the model does not know the size of its images, so they are resized to 224 x 224, nor '
                    'their normalisation, so the CNN gets pixels in [0,1]; if that is not what the CNN was trained on, '
                    'give AntehocModel(cnn, mean=[...], std=[...], meta=dict(size=[H, W]))']
    assert m.explain(PIXELS).map.shape == (1, 1, 224, 224)
    half = model_of(mean=MEAN, std=STD).to(torch.bfloat16)
    assert half.explain(PIXELS).image.dtype == torch.bfloat16


# --- What can't be right

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def holed(value):
    x = X.clone()
    x[1, 2, 3, 4] = value
    return x


@pytest.mark.parametrize('x, message', [
    (X * 255, 'these look like pixels from 0 to 255 (the highest is 255); give them as they are, x.to(torch.uint8), or '
              'divide by 255 and normalise'),
    ((X * 65535).double(), 'these look like pixels from 0 to 255'),
    (holed(torch.nan), 'image 1 of the batch has NaN or infinite pixels'),
    (holed(torch.inf), 'image 1 of the batch has NaN or infinite pixels'),
    (holed(-torch.inf), 'image 1 of the batch has NaN or infinite pixels'),
    (X[:0], 'the batch is empty, (0, 3, 32, 32); give at least one image'),
    (X[:, :, :0], 'the batch is empty, (2, 3, 0, 32)'),
    (X[:, :1], 'the images have 1 channel, the CNN takes 3; repeat the grey channel: x.repeat(1, 3, 1, 1)'),
    (torch.rand(1, 4, 32, 32), 'the images have 4 channels, the CNN takes 3; drop the alpha channel: x[:, :3]'),
    (torch.rand(1, 2, 32, 32), 'the images have 2 channels, the CNN takes 3; give images (B,3,H,W)'),
    (X.permute(0, 2, 3, 1), 'the images have 32 channels, the CNN takes 3; the channels seem to come last: '
                            'x.permute(0, 3, 1, 2)'),
    (X[0], '(3, 32, 32) of torch.float32; add a batch dimension with x[None]'),
    (X[0].permute(1, 2, 0), '(32, 32, 3) of torch.float32; use x.permute(2, 0, 1)[None]'),
    (X[0, 0], '(32, 32) of torch.float32'), (X[None], '(1, 2, 3, 32, 32) of torch.float32'),
    ((X * 255).long(), '(2, 3, 32, 32) of torch.int64; pixels from 0 to 255 are torch.uint8: x.to(torch.uint8)'),
    ((X * 255).int(), 'torch.int32; pixels from 0 to 255 are torch.uint8'), (X > .5, 'of torch.bool'),
    (X.to(torch.complex64), 'of torch.complex64')])
def test_batches_that_cannot_be_right(x, message):
    m = model_of()
    with pytest.raises(ValueError) as e: m.explain(x)
    assert str(e.value).startswith('explain: ') and message in str(e.value)


def test_more_of_the_kind(model):
    with pytest.raises(ValueError, match='the images have 3 channels, the CNN takes 1; make them grey'):
        model_of(c=1).explain(X)
    for x in (X * 255, (X * 255 - model.mean) / model.std):  # never divided, normalised or not
        with pytest.raises(ValueError, match='these look like pixels from 0 to 255'): model.explain(x)
    fails = AntehocModel(small_cnn(), torch.rand(2, 3, 32, 32), eta=2)
    fails.cnn[2].register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): fails.explain(X)  # an error that is not about channels stays what it is


@pytest.mark.parametrize('settings, x, message', [
    ({}, (X - .45) / .22, 'explain: the images go from -2.05 to 2.50, so they seem to be normalised, but the model has '
     'no mean and std, without which "black" is grey and pixels are clipped; give AntehocModel(cnn, mean=[...], '
     'std=[...])'),
    ({}, X * 2 - 1, 'explain: the images go from -1.00 to 1.00, so they seem to be normalised'),
    (dict(mean=MEAN, std=STD), X, 'explain: the images lie in [0,1], so they do not seem to be normalised, but the CNN '
     'expects (x - model.mean) / model.std'),
    (dict(mean=MEAN, std=STD), ((X - .45) / .22 - .45) / .22, 'explain: without the normalisation, pixels go from')])
def test_warned_about_once(settings, x, message):
    m = model_of(**settings)
    said = warnings_of(lambda: [m.explain(x) for _ in range(3)])
    assert len(said) == 1 and message in said[0]
    assert len(warnings_of(lambda: model_of(**settings).explain(x))) == 1  # another model says it, too


@pytest.mark.parametrize('kind', ['noise', 'black', 'white', 'overshoot', 'one colour'])
@pytest.mark.parametrize('normalised', [True, False])
def test_what_is_right_is_not_warned_about(kind, normalised):
    m = model_of(**dict(mean=MEAN, std=STD) if normalised else {})
    x = dict(noise=X, black=X * 0, white=X * 0 + 1, overshoot=X * 1.2 - .1)
    x['one colour'] = torch.tensor([.9, .1, .4]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert warnings_of(lambda: m.explain((x[kind] - m.mean) / m.std)) == []


def test_the_look_at_the_values_needs_no_autograd():
    m, x = model_of(), X.clone().requires_grad_()
    with torch.inference_mode(): m.explain(X)
    e = m.explain(x)
    assert not e.map.requires_grad and x.grad is None


def test_a_compiler_sees_no_branch_on_values(monkeypatch):
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    assert model_of().explain(holed(torch.nan)).map.shape == (2, 1, 32, 32)


# --- What is no network

def test_what_is_wrapped(model):
    for wrong, message in [
        (model, 'cnn: this is an AntehocModel already; use it as it is, or wrap its network: model.cnn'),
        (nn.DataParallel(model), "cnn: its module 'module' is an AntehocModel already; wrap the network inside it"),
        (nn.Sequential(nn.Sequential(model)), "cnn: its module '0.0' is an AntehocModel already"),
        (small_cnn, 'cnn: a function (small_cnn) is no network; give an nn.Module, the name of an architecture or a '
                    'fastai learner; call it first: AntehocModel(small_cnn(...))'),
        (nn.Sequential, 'cnn: a type (Sequential) is no network'),
        (model.cnn.state_dict(), 'cnn: a OrderedDict (OrderedDict) is no network'),
        (None, 'cnn: a NoneType (NoneType)'),
        ([model.cnn], 'cnn: a list (list) is no network'), (Path('model'), 'is no network')]:
        with pytest.raises(TypeError) as e: AntehocModel(wrong)
        assert message in str(e.value)


HOLE = 'sample: image 1 of the batch has NaN or infinite pixels; look at its file, and at what is done to it'
NO_BATCH = 'sample: a {} is no batch of images; give a tensor (B,C,H,W), normalised as the CNN expects'


@pytest.mark.parametrize('sample, error, message', [
    (X[:, :1], ValueError, 'sample: the images have 1 channel, the CNN takes 3; repeat the grey channel: '
                           'x.repeat(1, 3, 1, 1)'),
    (X[:, [0, 1, 2, 0]], ValueError, 'sample: the images have 4 channels, the CNN takes 3; drop the alpha channel: '
                                     'x[:, :3]'),
    (X.permute(0, 2, 3, 1), ValueError, 'sample: the images have 32 channels, the CNN takes 3; the channels seem to '
                                        'come last: x.permute(0, 3, 1, 2)'),
    (X[0], ValueError, 'sample: images (B,C,H,W) in floating point are needed, got (3, 32, 32) of torch.float32; add a '
                       'batch dimension with x[None]'),
    ((X * 255).to(torch.uint8), ValueError, 'sample: images (B,C,H,W) in floating point are needed, got (2, 3, 32, 32) '
                                            'of torch.uint8; divide pixels from 0 to 255 by 255, and normalise'),
    (X[:0], ValueError, 'sample: it is empty, (0, 3, 32, 32); give at least one image'),
    (holed(torch.nan), ValueError, HOLE),
    (holed(torch.inf), ValueError, HOLE),
    (PIXELS, TypeError, NO_BATCH.format('ndarray')), (Image.fromarray(PIXELS), TypeError, NO_BATCH.format('Image')),
    ('photo.jpg', TypeError, NO_BATCH.format('str')),
    (torch.utils.data.DataLoader(X), TypeError, NO_BATCH.format('DataLoader') + '; take a batch of it: '
                                                'next(iter(loader))')])
def test_samples_that_cannot_be_right(sample, error, message):
    with pytest.raises(error) as e: AntehocModel(small_cnn(), sample)
    assert str(e.value) == message


@pytest.mark.parametrize('settings, error, message', [
    (dict(layers=[0]), TypeError, "layers: a layer is given by its name, such as 'layer4.1', not by a int; "
                                  'layer_table(cnn, images) lists the names'),
    (dict(layers=[nn.ReLU()]), TypeError, "layers: a layer is given by its name, such as 'layer4.1', not by a ReLU; "
                                          'layer_table(cnn, images) lists the names'),
    (dict(meta=['cat']), TypeError, "meta: a list is given; give a dict, such as meta=dict(vocab=['cat', 'dog'])"),
    (dict(temperature='3'), ValueError, "temperature='3': give a number above 0"),
    (dict(cells=True), ValueError, "cells=True: a number from 1, or 'pixels'")])
def test_settings_of_the_wrong_kind(settings, error, message):
    with pytest.raises(error) as e: AntehocModel(small_cnn(), X, **settings)
    assert str(e.value) == message


def test_colours_of_every_kind(model):
    half = torch.full((2, 1, 32, 32), .5)
    grey = model.mask(X, half, .5)
    for fill in (np.full(3, .5), np.float32(.5), torch.full((1, 3, 1, 1), .5), (.5, .5, .5)):
        assert torch.equal(model.mask(X, half, fill), grey)
    for fill in (None, {}, ['red']):
        with pytest.raises(TypeError) as e: model.mask(X, half, fill)
        assert str(e.value) == (f"fill={fill!r}: give 'black', 'mean', 'blur' or a colour in [0,1], one number or one "
                                'for each channel')


def test_names_need_the_module_that_knows_them():
    code = ("from antehoc_nb.core.model import AntehocModel\n"
            "from torch.nn import Identity\n"
            "for given in ('resnet18', type('Learner', (), dict(dls=None, model=Identity()))()):\n"
            "    try: AntehocModel(given)\n"
            "    except ValueError as e: print(e)")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out == ['arch=\'resnet18\': import antehoc_nb.train.archs first, which builds CNNs by name, or pass one '
                   'as cnn=',
                   "AntehocModel(learn): to take the images' size and normalisation from a learner, import "
                   'antehoc_nb.train.two_pass first; or give AntehocModel(learn.model, mean=..., std=...)']


def test_one_layer_is_enough(tmp_path):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    single = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *head)
    m = AntehocModel(single, scale=False, meta=dict(size=[32, 32]))
    e = m.explain(X)
    assert m.eta == 1 and e.map.shape == (2, 1, 32, 32)
    if e.sams.shape[1] == 1: assert torch.equal(e.map, e.sams)


# --- Out again

def test_overlays_lie_on_the_photograph_as_one_sees_it(tmp_path, model):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path/'lying.jpg', exif=exif)
    e = model.explain(tmp_path/'lying.jpg')
    assert e.save(tmp_path/'new'/'overlay.png') == [tmp_path/'new'/'overlay.png']
    assert Image.open(tmp_path/'new'/'overlay.png').size == (40, 60)
    assert np.array_equal(np.asarray(e.overlays(alpha=0)[0]), np.asarray(open_rgb(tmp_path/'lying.jpg')))


def test_several_overlays_are_numbered(tmp_path, model):
    e = model.explain([PIXELS, PIXELS[:20]])
    assert [file.name for file in e.save(str(tmp_path/'a.b.jpg'))] == ['a.b-0.jpg', 'a.b-1.jpg']
    assert Image.open(tmp_path/'a.b-1.jpg').size == (60, 20)
    assert sorted(os.listdir(tmp_path)) == ['a.b-0.jpg', 'a.b-1.jpg']
    for name in ('overlay', 'overlay.txt', 'overlay.npz', '.png'):
        with pytest.raises(ValueError) as error: e.save(tmp_path/'there'/name)
        assert 'give a name that ends like an image file' in str(error.value) and not (tmp_path/'there').exists()
    with pytest.raises(ValueError, match=r'alpha=2 must lie in \[0,1\]'): e.overlays(alpha=2)


def test_an_explanation_of_a_batch_has_overlays_too():
    for c in (1, 3, 4):
        e = model_of(c=c).explain(torch.rand(2, c, 20, 30))
        assert e.photos is None and [o.size for o in e.overlays()] == [(30, 20)] * 2
    e = model_of().to(torch.bfloat16).explain(torch.rand(1, 3, 20, 30).bfloat16())
    assert e.overlays()[0].mode == 'RGB'


def test_photographs_go_with_their_explanations(model):
    e = model.explain([PIXELS, PIXELS[:20], PIXELS[:30]])
    assert [photo.size for photo in e[1:].photos] == [(60, 20), (60, 30)] and e[-1].photos[0].size == (60, 30)
    assert len(e.cpu().photos) == 3 and copy.deepcopy(e).photos[0].size == (60, 40)


def test_names_and_probabilities(model):
    e = model.explain([PIXELS, PIXELS[:20]])
    numbers = e.pred.argmax(1).tolist()
    assert e.labels == [f'class {i}' for i in numbers] and torch.equal(e.probabilities, e.pred.softmax(1))
    model.meta = dict(size=[24, 32])
    assert model.explain([PIXELS, PIXELS[:20]]).labels == [str(i) for i in numbers]
    two = dict(a=e.pred, b=e.pred)
    for pred, got in ((two, 'dict'), (e.pred[:, :1], r'\(2, 1\)'), (e.pred[..., None], r'\(2, 10, 1\)')):
        e.pred = pred
        with pytest.raises(TypeError, match=f'gives no scores of classes .B,K., but {got}'): print(e.probabilities)


def test_shown_with_titles(model):
    import matplotlib.pyplot as plt
    e = model.explain([PIXELS, PIXELS[:20], PIXELS])
    axs = e.show()
    percent = e.probabilities.max(1).values.tolist()
    assert axs.shape == (2, 2)
    assert [ax.get_title() for ax in axs.flat] == [*(f'{o} {p:.0%}' for o, p in zip(e.labels, percent)), '']
    e.pred = dict(a=e.pred)
    assert e.show(cols=3).shape == (1, 3)
    plt.close('all')


# --- Files

@pytest.mark.parametrize('umask', [0o022, 0o077, 0o002])
@pytest.mark.filterwarnings('ignore:save_pretrained')
def test_files_have_the_usual_modes(tmp_path, model, umask):
    before = os.umask(umask)
    try:
        for _ in range(2): model.save_pretrained(tmp_path/'m')
        utils.usual_mode(tmp_path/'m')
    finally: os.umask(before)
    assert {o.name: o.stat().st_mode & 0o777 for o in (tmp_path/'m').iterdir()} == {
        'config.json': 0o666 & ~umask, 'model.safetensors': 0o666 & ~umask}
    assert (tmp_path/'m').stat().st_mode & 0o777 == 0o777 & ~umask


def test_saving_says_what_loading_will_take(tmp_path, model):
    said = warnings_of(lambda: [model.save_pretrained(tmp_path) for _ in range(2)])
    assert len(said) == 1 and said[0].startswith(
        'save_pretrained: this CNN (Sequential) cannot be built by name, so the folder alone does not load: use '
        'AntehocModel.from_pretrained(folder, cnn=...) with a Sequential like this one')
    assert (tmp_path/'model.safetensors').exists()


def test_missing_packages_are_named_as_pip_knows_them():
    with pytest.raises(ImportError) as e: utils.import_skimage('no_such_module')
    assert str(e.value) == 'This needs scikit-image: pip install scikit-image'


def test_bytes_of_one_image():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, 'PNG')
    assert np.array_equal(np.asarray(rgb_image(bytearray(file.getvalue()))), PIXELS)


def error_of(f, *args, **kwargs):
    try: f(*args, **kwargs)
    except (OSError, TypeError, ValueError) as e: return f'{type(e).__name__}: {e}'


def test_printed_an_explanation_is_short(model):
    assert str(model.explain(torch.rand(1, 3, 32, 32))).splitlines()[1:] == [
        'map (1, 1, 32, 32), sams (1, 6, 16, 16), weights (1, 6, 16, 16), image (1, 3, 32, 32)',
        "show() draws the maps over the images, save('overlay.png') writes them"]
    named = AntehocModel(small_cnn(), eta=3, meta=dict(vocab=[f'class {i}' for i in range(10)]))
    one, many = (named.explain(torch.rand(n, 3, 32, 32)) for n in (1, 6))
    assert str(one).splitlines()[0] == f'Explanation of 1 image: {one.labels[0]} {one.probabilities.max():.0%}'
    first = str(many).splitlines()[0]
    assert first.startswith(f'Explanation of 6 images: {many.labels[0]} ') and first.endswith('; and 2 more')
    outputs = AntehocModel(nn.Sequential(small_cnn(), nn.Linear(10, 1)), eta=3, class_specific=False)
    assert str(outputs.explain(torch.rand(2, 3, 32, 32))).splitlines()[0] == 'Explanation of 2 images'


@pytest.mark.parametrize('classes', [['cat', 'dog'], ('a',), 'cat', 2.])
def test_names_are_no_number_of_classes(classes):
    assert error_of(AntehocModel, small_cnn(), classes=classes) == (
        f'TypeError: classes={classes!r}: give how many there are; their names go into meta=dict(vocab=[...])')


def test_cnns_that_take_no_noise():
    class OneSize(nn.Sequential):
        def forward(self, x):
            assert x.shape[2:] == (32, 32), 'Wrong image height!'
            return super().forward(x)
    class NoReason(OneSize):
        def forward(self, x):
            if x.shape[3] != 32: raise AssertionError
            return super().forward(x)
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 32 * 32, 2))
    for cnn, cause in ((OneSize(small_cnn()), 'Wrong image height!'), (flat, 'mat1 and mat2 shapes cannot be'),
                       (NoReason(small_cnn()), 'AssertionError')):
        message = error_of(AntehocModel, cnn)
        assert message.startswith(f'ValueError: sample: the CNN does not take 128 x 128 noise ({cause}')
        assert message.endswith('give images like the ones to come, AntehocModel(cnn, images), or repair the CNN')
        assert AntehocModel(cnn, torch.rand(2, 3, 32, 32)).explain(torch.rand(1, 3, 32, 32)).map.shape[0] == 1


def test_folders_that_hold_no_model(tmp_path, model):
    model.save_pretrained(tmp_path/'run'/'model')
    load = AntehocModel.from_pretrained
    no_config = 'is not a saved antehoc_nb model: it has no config.json'
    assert error_of(load, tmp_path) == f'FileNotFoundError: {tmp_path} {no_config} (save_pretrained writes both)'
    for written in (None, 'config.json'):  # as a folder above it, and as a run has it
        if written: (tmp_path/'run'/written).write_text('{}')
        missing = no_config if written is None else no_config.replace('config.json', 'model.safetensors')
        assert error_of(load, tmp_path/'run') == (
            f'FileNotFoundError: {tmp_path/"run"} {missing}; try {tmp_path/"run"/"model"}')
    assert error_of(load, tmp_path/'no') == f'FileNotFoundError: {tmp_path/"no"} {no_config}, there is no such folder'
    file = tmp_path/'run'/'model'/'config.json'
    assert error_of(load, file) == (
        f'FileNotFoundError: {file} {no_config}; give the folder that the file lies in, {file.parent}')
