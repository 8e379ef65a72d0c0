"""CNNs by name, and the names of CNNs: what `TwoPass` wrapped is loaded from its folder alone."""
import json
import pickle
import warnings
from copy import deepcopy

import pytest
import timm
import torch
import torchvision
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.learner import vision_learner
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from workers import scenes, small_cnn

from antehoc_nb.core.model import AntehocModel
from antehoc_nb.train.archs import build_cnn, describe_cnn, landmark_cnn, resnet18_half
from antehoc_nb.train.archs import small_cnn as own_cnn
from antehoc_nb.train.learner import plain_learner
from antehoc_nb.train.two_pass import TwoPass

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


@pytest.mark.filterwarnings('ignore:explain')
@pytest.mark.parametrize('cnn', [
    own_cnn(10), resnet18_half(10), landmark_cnn(4), torchvision.models.resnet18(num_classes=3),
    torchvision.models.densenet121(num_classes=2), timm.create_model('resnet10t', num_classes=5)],
    ids=lambda cnn: type(cnn).__name__)
def test_networks_of_libraries_are_loaded_from_their_folder(tmp_path, cnn):
    assert loads_alone(AntehocModel(cnn, eta=2, mean=[.5] * 3, std=[.25] * 3), tmp_path)


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


@pytest.mark.parametrize('arch', ['mobilenet_v2', 'mnasnet0_5', 'shufflenet_v2_x0_5'])
def test_families_whose_pooling_is_a_function(dls, arch):
    learn = plain_learner(dls, arch, pretrained=False, cbs=TwoPass())
    assert learn.model.eta == 8 and len(list(learn.model.cnn[0].modules())) > 20  # not only the stem
    assert learn.model.explain(torch.rand(1, 3, 64, 64) * 2 - 1).pred.shape == (1, 10)


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


def test_transformers_are_named_as_such():
    for vit in (timm.create_model('vit_tiny_patch16_224'), torchvision.models.VisionTransformer(32, 16, 1, 1, 8, 8)):
        sample = torch.rand(1, 3, *(224, 224) if hasattr(vit, 'patch_embed') else (32, 32))
        message = 'VisionTransformer is a transformer, with no more than one convolution; antehoc_nb explains conv'
        with pytest.raises(ValueError, match=message): AntehocModel(vit, sample)


def test_a_name_in_place_of_a_network():
    model = AntehocModel('small_cnn', meta=dict(vocab=list('abc')))
    assert model.explain(torch.rand(1, 3, 32, 32)).pred.shape == (1, 3)
    assert AntehocModel('small_cnn', classes=7).cnn[-1].out_features == 7
    assert AntehocModel('resnet18').explain(torch.rand(1, 3, 64, 64)).pred.shape == (1, 1000)
    with pytest.raises(ValueError, match="unknown arch 'resnet81': did you mean 'resnet18'"): AntehocModel('resnet81')
    with pytest.raises(ValueError, match="arch='vit_b_16'"): AntehocModel('vit_b_16')
