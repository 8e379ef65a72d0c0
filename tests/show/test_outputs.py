"""Maps of outputs of every kind: trained, explained, saved and loaded, exported or refused by name."""
import csv
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.data.block import DataBlock, MultiCategoryBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from fastai.vision.core import PILMask
from fastai.vision.data import ImageBlock, MaskBlock
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import antehoc_nb.core.export  # noqa: F401  gives models `export`
import antehoc_nb.show.learner  # noqa: F401  gives learners `explain`
from antehoc_nb.core.interpretation_loss import default_loss, two_pass_step
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.data.shapes import SHAPES, points_at, shape_scenes
from antehoc_nb.show.explain_files import explain_files
from antehoc_nb.show.outputs import detection_scores, explain_targets, show_targets
from antehoc_nb.train.learner import antehoc_learner
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')
X = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def block(before, after, stride=1):
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU())


def body():
    torch.manual_seed(0)
    return nn.Sequential(block(3, 8, 2), block(8, 8))


@dataclass
class Named:
    logits: torch.Tensor
    hidden: torch.Tensor


class Net(nn.Module):
    "A network of one body and an output of some kind"
    def __init__(self, kind):
        super().__init__()
        self.kind, self.body = kind, body()
        self.pixels, self.vector, self.other = nn.Conv2d(8, 4, 1), nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x):
        features = self.body(x)
        pooled = features.mean((2, 3))
        if self.kind == 'pixels': return F.interpolate(self.pixels(features), x.shape[2:])
        if self.kind == 'out': return dict(out=F.interpolate(self.pixels(features), x.shape[2:]), aux=pooled)
        if self.kind == 'vector': return self.vector(pooled)
        if self.kind == 'list': return [self.vector(pooled)]
        if self.kind == 'named': return Named(self.vector(pooled), features)
        if self.kind == 'tuple': return self.vector(pooled), self.other(pooled)
        return dict(a=self.vector(pooled), b=self.other(pooled))


def second(out): return out['b']


# name -> kind of network, arguments of the model, task, number of targets, loss, a target
CASES = dict(
    several=('vector', dict(meta=dict(task='multi-label', vocab=[*'abcd'])), 'multi-label', 4, 'binary_cross_entropy',
             'b'),
    pixels=('pixels', dict(meta=dict(task='segmentation', vocab=[*'abcd'])), 'segmentation', 4, 'cross_entropy', 'c'),
    torchvision=('out', {}, 'segmentation', 4, 'cross_entropy', 2),
    embedding=('vector', dict(meta=dict(task='embedding')), 'embedding', 4, 'cosine', X[:1]),
    embedding_head=('dict', dict(meta=dict(task='embedding'), output='b'), 'embedding', 2, 'cosine', torch.ones(2)),
    one_in_a_list=('list', {}, 'single-label', 4, 'cross_entropy', 3),
    logits=('named', {}, 'single-label', 4, 'cross_entropy', 3),
    name=('dict', dict(output='b'), 'single-label', 2, 'cross_entropy', 1),
    place=('tuple', dict(output=1), 'single-label', 2, 'cross_entropy', 1),
    place_in_dict=('dict', dict(output=0), 'single-label', 4, 'cross_entropy', 1),
    function=('dict', dict(output=second), 'single-label', 2, 'cross_entropy', 1),
    whole=('dict', {}, '', None, 'mse', None),
    whole_tuple=('tuple', {}, '', None, 'mse', None),
    whole_pixels=('pixels', {}, '', None, 'mse', None),
    regression=('vector', dict(meta=dict(task='regression')), 'regression', None, 'mse', None),
)


def model_of(case):
    kind, arguments, *_ = CASES[case]
    return AntehocModel(Net(kind), X, eta=2, **arguments)


FAST = 'several', 'pixels', 'embedding_head', 'name', 'function', 'whole'
MARKED = [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize('case', MARKED)
def test_trained_explained_saved(case, tmp_path):
    kind, arguments, task, classes, loss, target = CASES[case]
    model = model_of(case)
    assert (model.task, model.classes, default_loss(model)) == (task, classes, loss)
    opt = torch.optim.AdamW(model.weight_net.parameters(), 1e-2)
    plain, losses = Net(kind), []
    plain.load_state_dict(model.cnn.state_dict())
    model.train()
    for _ in range(3):
        _, int_loss = two_pass_step(model, X)
        losses.append(int_loss.item())
        int_loss.backward()
        opt.step()
        opt.zero_grad()
    assert np.isfinite(losses).all()
    plain.train()
    with torch.no_grad():
        for _ in range(3): plain(X)
    assert all(map(torch.equal, model.cnn.state_dict().values(), plain.state_dict().values()))
    model.eval()
    with torch.no_grad(): validated = two_pass_step(model, X)[1]
    assert 0 <= validated < 20
    e = model.explain(X, target=target)
    assert e.map.shape == (3, 1, 32, 32)
    torch.testing.assert_close(e[1].map, model.explain(X[1:2], target=target).map, atol=1e-4, rtol=0)
    settings = dict(output=second) if callable(arguments.get('output')) else {}
    loaded = AntehocModel.from_pretrained(model.save_pretrained(tmp_path/'m'), cnn=Net(kind), **settings)
    assert torch.equal(loaded.explain(X, target=target).map, e.map)
    assert (loaded.task, loaded.classes) == (task, classes)
    assert e.overlays()[0].size == (32, 32) and e.save(tmp_path/'o.png')[2].exists()
    assert 'Explanation of 3' in repr(e)
    if classes: assert len(e.labels) == len(e.decisions) == 3


@pytest.mark.parametrize('case', [case for case in MARKED if CASES[getattr(case, 'values', [case])[0]][3]])
def test_maps_depend_on_the_target(case):
    classes = CASES[case][3]
    model = model_of(case)
    nn.init.normal_(model.weight_net.read.class_directions.weight)
    targets = [torch.eye(classes)[0], torch.eye(classes)[1]] if 'embedding' in case else [0, 1]
    first, second = (model.explain(X, target=target).map for target in targets)
    assert first.shape == second.shape and not torch.allclose(first, second, atol=1e-3)


def test_what_is_said_of_a_segmentation_and_of_an_embedding():
    e = model_of('pixels').explain(X)
    shares = e.pred.argmax(1).flatten(1)
    expected = [[*'abcd'][row.bincount(minlength=4).argmax()] for row in shares]
    assert [label.split(', ')[0] for label in e.labels] == expected
    assert all(p is None for of_image in e.decisions for _, p in of_image)
    e = model_of('embedding').explain(X, target=X[:1])
    assert e.labels[0] == 'similarity 1.00' and e[1:].labels == e.labels[1:]
    with pytest.raises(TypeError, match='the task of this model is embedding'): _ = e.probabilities


def test_a_function_has_to_be_given_again(tmp_path):
    folder = model_of('function').save_pretrained(tmp_path/'m')
    message = ('a function, second, chose the output that is explained, and functions are not saved; give it: '
               r'from_pretrained\(folder, output=...\)')
    with pytest.raises(ValueError, match=message):
        AntehocModel.from_pretrained(folder, cnn=Net('dict'))


@pytest.mark.parametrize('arguments, message', [
    (dict(class_specific=True), r"class_specific=True: the CNN gives several outputs, 'a' \(3, 4\), 'b' \(3, 2\); "
     "say which one is explained, such as output='a'"),
    (dict(output='c'), r"output='c': the CNN has no such output; it gives 'a' \(3, 4\), 'b' \(3, 2\)"),
    (dict(output=2), r"output=2: the CNN has no such output; it gives 'a' \(3, 4\), 'b' \(3, 2\)"),
    (dict(output=lambda out: [1]), r'output=<lambda>: this is a list, and what is explained must be a tensor \(B,...'),
])
def test_outputs_that_are_not_there(arguments, message):
    with pytest.raises(ValueError, match=message): AntehocModel(Net('dict'), X, eta=2, **arguments)


def test_a_target_without_a_head_names_the_heads():
    with pytest.raises(ValueError, match=r"say which of its outputs, 'a' \(3, 4\), 'b' \(3, 2\), is explained"):
        model_of('whole').explain(X, target=1)


@pytest.mark.parametrize('case, message', [
    ('pixels', r'export: the maps of this model \(task segmentation\) are about the region of a class, and the target '
     'of a graph is a class number; use model.explain, or train with class_specific=False'),
    ('embedding', r'export: the maps of this model \(task embedding\) are about a reference image'),
])
def test_exports_that_are_refused(case, message, tmp_path):
    with pytest.raises(ValueError, match=message): model_of(case).export(tmp_path/'m.pt2', size=32)


def test_a_multi_label_export_gives_the_same_maps():
    from antehoc_nb.core.export import MapModule
    model = model_of('several').eval()
    module = MapModule(model, 32, activation='auto', trace=False)
    assert module.activation == 'sigmoid'
    scores, i_map, _ = module(X, torch.tensor([1, 1, 1]))
    e = model.explain(X, target='b')
    torch.testing.assert_close(scores, e.probabilities)
    torch.testing.assert_close(i_map, e.map, atol=1e-4, rtol=1e-3)


def test_the_command_lists_classes_of_pixels_and_refuses_embeddings(tmp_path):
    Image.fromarray((X[0].permute(1, 2, 0) * 255).byte().numpy()).save(tmp_path/'a.png')
    files = [(tmp_path/'a.png', 'a.png')]
    model = model_of('pixels')
    model.meta['size'] = [32, 32]
    assert explain_files(model, files, tmp_path/'out', target='c', arrays=True, say=None)[0] == 1
    with (tmp_path/'out'/'explanations.csv').open(encoding='utf-8') as file: row = next(csv.DictReader(file))
    assert set(row['prediction'].split(', ')) <= {*'abcd'} and row['probability'] == ''
    message = 'the model gives embeddings, whose map is about the likeness to a reference image: explain it in Python'
    with pytest.raises(ValueError, match=message):
        explain_files(model_of('embedding'), files, tmp_path/'embeddings', say=None)


def test_maps_for_several_targets():
    model = model_of('several')
    found = explain_targets(model, X, ['a', 'd'])
    assert [*found] == ['a', 'd'] and torch.equal(found['d'].map, model.explain(X, target='d').map)
    assert show_targets(model, X, {'first': 0, 'second': 1}).shape == (3, 3)
    with pytest.raises(ValueError, match='targets: none are given'): explain_targets(model, X, [])


# --- fastai's own blocks

def scene_image(scenes): return lambda o: (scenes.images[o].permute(1, 2, 0) * 255).byte().numpy()


def test_multi_category_blocks_have_a_map_for_each_label(tmp_path):
    scenes = shape_scenes(12, 32)
    labels = [[name for name, on in zip(SHAPES, row) if on] for row in scenes.labels]
    data = DataBlock((ImageBlock, MultiCategoryBlock(vocab=[*SHAPES])), get_x=scene_image(scenes),
                     get_y=lambda o: labels[o], splitter=IndexSplitter([8, 9, 10, 11]))
    dls = data.dataloaders(list(range(12)), bs=4, num_workers=0, device='cpu')
    cnn = nn.Sequential(body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    learn = antehoc_learner(dls, cnn, eta=2, loss_func=BCEWithLogitsLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert (learn.model.task, learn.model.classes) == ('multi-label', 3)
    assert learn.two_pass.int_loss == 'binary_cross_entropy'
    e = learn.explain(target='cross')
    assert e.target.tolist() == [2] * 4 and all('target cross' in title for title in e._titles())
    assert torch.equal(e.map, learn.explain(target=2).map)
    with pytest.raises(ValueError, match="unknown class 'cros': did you mean 'cross'"): learn.explain(target='cros')
    assert learn.show_maps(target='cross').size
    assert np.isfinite(learn.recorder.values[-1]).all() and learn.two_pass.best.measure == 'average drop'


def mask_learner(n, size, make):
    scenes = shape_scenes(n, size)
    data = DataBlock((ImageBlock, MaskBlock(codes=['ground', *SHAPES])), get_x=scene_image(scenes),
                     get_y=lambda o: PILMask.create(scenes.classes[o].byte().numpy()),
                     splitter=IndexSplitter(range(n - 8, n)))
    return make(data.dataloaders(list(range(n)), bs=4, num_workers=0, device='cpu'))


def test_mask_blocks_have_a_map_for_each_class():
    def loss(out, classes): return F.cross_entropy(out, classes.long())
    learn = mask_learner(16, 32, lambda dls: Learner(dls, Net('pixels'), loss_func=loss, cbs=TwoPass(eta=2)))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert (learn.model.task, learn.model.classes) == ('segmentation', 4)
    e = learn.explain(target='disc')
    assert set(e.target.unique().tolist()) <= {-1, 1} and 'target disc' in e._titles()[0]
    assert learn.show_maps(target='disc').size and np.isfinite(learn.recorder.values[-1]).all()
    region = torch.zeros(32, 32)
    region[4:9, 4:9] = 1
    assert (learn.explain(target=region).target >= 0).sum() == 25 * 8


@pytest.mark.slow
def test_unet_learner(tmp_path):
    from fastai.vision.learner import unet_learner
    from torchvision.models import resnet18
    learn = mask_learner(12, 32, lambda dls: unet_learner(dls, resnet18, pretrained=False, cbs=TwoPass(eta=4)))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    e = learn.explain(target='square', n=2)
    assert learn.model.task == 'segmentation' and e.map.shape == (2, 1, 32, 32) and e.map.std() > 0


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lraspp_mobilenet_v3_large', 'deeplabv3_mobilenet_v3_large'])
def test_segmentation_networks_of_torchvision(name):
    from torchvision.models import segmentation
    cnn = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=4)
    scenes = shape_scenes(2, 48)
    dls = DataLoaders(*[DataLoader(TensorDataset(scenes.images, scenes.classes), 2)] * 2)
    learn = antehoc_learner(dls, cnn, eta=4, loss_func=lambda out, y: F.cross_entropy(out['out'], y))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert (learn.model.task, learn.model.classes) == ('segmentation', 4)
    assert learn.model.explain(scenes.images, target=1).map.shape == (2, 1, 48, 48)


@pytest.mark.slow
def test_detectors():
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large
    torch.manual_seed(0)
    detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, score_thresh=0.).eval()
    x = torch.rand(2, 3, 320, 320)
    model = AntehocModel(detector.requires_grad_(False), x, eta=4, output=detection_scores(3),
                         meta=dict(task='multi-label'))
    message = 'TwoPass: the CNN is a detector, which gives no detections in training mode; train it without TwoPass'
    dls = DataLoaders(*[DataLoader(TensorDataset(x, torch.zeros(2)), 2)] * 2)
    learn = Learner(dls, detector, loss_func=lambda out, y: 0, cbs=TwoPass(eta=4))
    with pytest.raises(ValueError, match=message), learn.no_bar(): learn.fit(1)
    message = 'two_pass_step: the CNN is a detector, which gives no detections in training mode'
    with pytest.raises(ValueError, match=message):
        two_pass_step(model.train(), x)
    model.train().cnn.eval()
    _, int_loss = two_pass_step(model, x)
    int_loss.backward()
    assert int_loss.isfinite() and any(weight.grad.abs().sum() > 0 for weight in model.weight_net.parameters())
    e = model.explain(x, target=1)
    best = [found['scores'][found['labels'] == 1].max() for found in e.pred]
    torch.testing.assert_close(e.probabilities[:, 1], torch.stack(best))


@pytest.mark.slow
@pytest.mark.parametrize('task', ['single-label', 'embedding'])
def test_networks_of_transformers(task):
    transformers = pytest.importorskip('transformers')
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic',
                                       num_labels=3)
    kind = transformers.ResNetForImageClassification if task == 'single-label' else transformers.ResNetModel
    arguments = {}
    if task == 'embedding': arguments = dict(output=lambda out: out.pooler_output.flatten(1), meta=dict(task=task))
    model = AntehocModel(kind(config), torch.rand(2, 3, 64, 64), **arguments)
    assert (model.task, model.classes) == (task, 3 if task == 'single-label' else 16)
    out, int_loss = two_pass_step(model.train(), torch.rand(4, 3, 64, 64))
    int_loss.backward()
    target = 1 if task == 'single-label' else torch.rand(1, 3, 64, 64)
    assert model.explain(torch.rand(2, 3, 64, 64), target=target).map.shape == (2, 1, 64, 64)


def test_points_at_and_scenes():
    scenes = shape_scenes(20, 32)
    there = scenes.labels[:, 1] > 0
    masks = scenes.masks[there][:, 1]
    assert points_at(masks[:, None].float(), masks).all() and not points_at(1. - masks[:, None].float(), masks).any()
