"""What a CNN returns is read as what it is, and what can't be explained is named."""
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner
from fastai.vision.data import ImageBlock
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from antehoc_nb.core.interpretation_loss import as_logits, draw_targets, explained_output, two_pass_step
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.evaluate.benchmark import benchmark
from antehoc_nb.evaluate.faithfulness import class_probability
from antehoc_nb.show import report
from antehoc_nb.train.archs import read_weights, rebuild_cnn, small_cnn
from antehoc_nb.train.two_pass import TwoPass, read_learner

pytestmark = pytest.mark.usefixtures('one_thread')

X = torch.rand(2, 3, 32, 32)


class Logistic(nn.Module):
    "A sigmoid that PyTorch does not know as one"
    def forward(self, x): return 1 / (1 + (-x).exp())


def step_loss(model, label):
    model.train()
    return two_pass_step(model, X, label)[1].item()


# --- outputs that are probabilities
@pytest.mark.parametrize('end, meta, label', [
    (nn.Softmax(1), {}, torch.tensor([0, 1])),
    (nn.Sigmoid(), dict(task='multi-label'), torch.tensor([[0., 1, 1], [1, 0, 0]])),
])
def test_probabilities_are_read_once(cnn, end, meta, label):
    plain, ended = (AntehocModel(network, X, meta=meta) for network in (cnn(), nn.Sequential(*cnn(), end)))
    assert plain.meta == meta and ended.meta == meta | dict(activation=None)
    expected, e = plain.explain(X), ended.explain(X)
    torch.testing.assert_close(e.probabilities, e.pred)
    torch.testing.assert_close(e.probabilities, expected.probabilities)
    torch.testing.assert_close(e.map, expected.map, atol=1e-4, rtol=0)
    assert step_loss(ended, label) == pytest.approx(step_loss(plain, label), abs=1e-4)


def test_scores_of_a_softmax(cnn):
    network, classes = nn.Sequential(*cnn(), nn.Softmax(1)), torch.tensor([2, 1])
    torch.testing.assert_close(class_probability(network, X, classes), network(X)[[0, 1], classes])


def test_outputs_that_could_be_either(cnn):
    with pytest.warns(UserWarning, match='the CNN ends in sigmoid.*if several can be on, give meta=dict'):
        AntehocModel(nn.Sequential(*cnn(), nn.Sigmoid()), X)
    labels, network = dict(task='multi-label'), nn.Sequential(*cnn(), Logistic())
    with pytest.warns(UserWarning, match=r"could be probabilities.*meta=dict\(activation=None\) for probabilities, or "
                      "activation='sigmoid' for logits"): AntehocModel(network, X, meta=labels)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = AntehocModel(network, X, meta=labels | dict(activation=None))
        small = cnn()
        small[-1].bias.data.fill_(.5)  # logits in [0,1]
        small[-1].weight.data *= .01
        assert AntehocModel(small, X, meta=labels).meta == labels
    assert torch.equal(model.explain(X).probabilities, network(X))
    small[-1].bias.data.fill_(1 / 3)
    small[-1].weight.data.zero_()
    with pytest.warns(UserWarning, match="activation='softmax' for logits"): assert AntehocModel(small, X).meta == {}


class CrossEntropyL1(nn.Module):
    def forward(self, out, y): return F.cross_entropy(out, y) + out.abs().mean()


def learner(network, labels, loss, **kwargs):
    loader = DataLoader(TensorDataset(torch.rand(8, 3, 32, 32), labels), 4)
    return Learner(DataLoaders(loader, loader), network, loss_func=loss, **kwargs)


MANY = torch.tensor([[0., 1, 1], [1, 0, 0]]).repeat(4, 1)


@pytest.mark.parametrize('labels, loss, end, task, activation', [
    (torch.arange(8) % 3, CrossEntropyL1(), (), 'single-label', 'softmax'),
    (torch.arange(8) % 3, nn.CrossEntropyLoss(), (nn.Softmax(1),), 'single-label', None),
    (torch.arange(8) % 3, nn.PoissonNLLLoss(), (), 'regression', None),
    (MANY, nn.MultiLabelSoftMarginLoss(), (), 'multi-label', 'sigmoid'),
    (MANY, nn.MultiLabelSoftMarginLoss(), (nn.Sigmoid(),), 'multi-label', None),
])
def test_tasks_of_losses(cnn, labels, loss, end, task, activation):
    meta = read_learner(learner(nn.Sequential(*cnn(), *end), labels, loss))['meta']
    assert (meta['task'], meta['activation']) == (task, activation)


class TwoHeads(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.first, self.second = body, nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        features = self.body(x)
        return self.first(features), self.second(features)


def test_two_vocabularies(cnn):
    getters = lambda o: np.full((32, 32, 3), 20 * o, np.uint8), lambda o: 'ab'[o % 2], lambda o: 'xyz'[o % 3]
    data = DataBlock((ImageBlock, CategoryBlock, CategoryBlock), n_inp=1, getters=[*getters],
                     splitter=IndexSplitter([4, 5, 6, 7]))
    dls = data.dataloaders(list(range(8)), bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, TwoHeads(cnn(8)), loss_func=CrossEntropyL1(), cbs=TwoPass(eta=2, output=1))
    assert learn.model.meta['vocab'] == ['x', 'y', 'z'] and {*learn.model.explain(X).labels} <= {'x', 'y', 'z'}
    learn = Learner(dls, TwoHeads(cnn(8)), loss_func=CrossEntropyL1())
    assert AntehocModel(learn, output=0).meta['vocab'] == ['a', 'b']


def test_an_unknown_task(cnn):
    with pytest.raises(ValueError) as error: AntehocModel(cnn(), X, meta=dict(task='classification'))
    assert str(error.value) == ("meta: task='classification' is not known; use 'single-label' (a class for each "
                                "image), 'multi-label', 'binary', 'regression', 'captions', 'segmentation' or "
                                "'embedding'")


# --- maps that are not finite
def test_stale_units():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    network[0].weight.data *= 1e-15
    model = AntehocModel(network, X)
    network[0].weight.data *= 1e30
    with pytest.warns(UserWarning, match='the CNN has changed since, call model.calibrate') as caught: model.explain(X)
    assert "the activation of the layer '1' is not finite" in str(caught[0].message)
    model.calibrate(X)
    assert model.explain(X).map.isfinite().all()


def test_what_is_not_finite(cnn):
    model = AntehocModel(cnn(), X)
    model.cnn[5].weight.data[0] = torch.nan
    with pytest.warns(UserWarning, match="image 0 is not finite; the weights 'cnn.5.weight' have NaN"): model.explain(X)
    model = AntehocModel(cnn(), X)
    model.cnn[1][1].running_var.fill_(-1)
    with pytest.warns(UserWarning, match="the activation of the layer '1.2' is not finite"): model.explain(X)
    model = AntehocModel(cnn(), X, meta=dict(task='embedding'))
    with pytest.raises(ValueError) as error: model.explain(X, target=torch.full((3,), torch.nan))
    assert str(error.value) == 'target: the reference has NaN or infinite values; give a finite embedding, or an image'


# --- messages
def lenet():
    return nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 10))


def vit(): return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 16, num_classes=3).eval()


class Strict(nn.Module):
    "Refuses images by `ValueError`, for their size or for something else"
    def __init__(self):
        super().__init__()
        self.cnn = small_cnn(3)

    def forward(self, x):
        if x.shape[2:] == (64, 64): raise ValueError("size (64*64) doesn't match.")
        if (x == .5).all(): raise ValueError('something else')
        return self.cnn(x)


@pytest.mark.filterwarnings('ignore')
def test_a_size_that_the_cnn_refuses():
    hint = r'give images of 32 x 32, and for photographs AntehocModel\(..., meta=dict\(size=\[32, 32\]\)\)'
    large, photo = torch.rand(1, 1, 64, 64), Image.new('RGB', (50, 40))
    model = AntehocModel(lenet(), torch.rand(2, 1, 32, 32))
    for where, call in ('explain', model.explain), ('two_pass_step', lambda x: two_pass_step(model, x)):
        with pytest.raises(ValueError, match=fr'^{where}: the CNN does not take images of 64 x 64 \(mat1.*; {hint}$'):
            call(large)
    with pytest.raises(ValueError, match=f'224 x 224 .*{hint}'): model.explain(photo)
    with pytest.raises(ValueError, match='^sample: the CNN does not take images of 64 x 64'):
        AntehocModel(lenet(), large)
    model = AntehocModel(Strict(), torch.rand(2, 3, 32, 32))  # as a network of Hugging Face
    for where, call in ('explain', model.explain), ('two_pass_step', lambda x: two_pass_step(model, x)):
        want = fr"^{where}: the CNN does not take images of 64 x 64 \(size \(64\*64\) doesn't match\); {hint}$"
        with pytest.raises(ValueError, match=want): call(torch.rand(1, 3, 64, 64))
        with pytest.raises(ValueError, match='^something else$'): call(torch.full((1, 3, 40, 40), .5))
    model = AntehocModel(vit(), class_specific=False)
    with pytest.raises(ValueError, match=f'64 x 64 .Wrong image height.*{hint}'):
        model.explain(torch.rand(1, 3, 64, 64))
    assert model.explain(photo).map.shape == (1, 1, 32, 32)


class Endless(IterableDataset):
    def __iter__(self):
        while True: yield torch.rand(3, 32, 32), 1


def score(network, dl):
    return benchmark(network, dl, ['gaussian'], ['faithfulness'], resamples=10).record['results']['n']


def test_what_benchmark_takes(cnn):
    x, y = torch.rand(6, 3, 32, 32), torch.arange(6) % 3
    for dl in (x, y), [(x[:4], y[:4]), (x[4:], y[4:])], [x.double(), y]: assert score(cnn(), dl) == 6
    for dl, message in [
        (x, 'dl: a Tensor is no data loader; give one that yields'),
        (DataLoader(Endless(), 4), 'dl: an IterableDataset has no length.*give a list of batches'),
        ((x, y + 1), 'dl: class 3 is not one of the 3 classes of the model, which have the numbers 0 to 2'),
        ((x[:, :1], y), 'dl: the images have 1 channels, the model takes 3'),
        ((x.mul(255).byte(), y), r'dl: images must be floating-point tensors.*this loader gives \(6, 3, 32, 32\) of '),
        ([], 'dl holds no image'),
    ]:
        with pytest.raises((TypeError, ValueError), match=message): score(cnn(), dl)


def test_weights_with_other_names(cnn, tmp_path):
    model = AntehocModel(cnn(), X)
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    others = {f'model.{name}': value for name, value in weights.items()} | {'loss.weight': torch.ones(3)}
    for state in dict(state_dict=others, epoch=1), others, {f'module.{name}': o for name, o in weights.items()}:
        fresh = AntehocModel(cnn(), X)
        fresh.load_state_dict(state)
        assert torch.equal(fresh.cnn[5].weight, weights['cnn.5.weight'])
    plain = {f'model.{name}': value for name, value in cnn().state_dict().items()}
    with pytest.raises(RuntimeError, match='weights of a CNN alone'): model.load_state_dict(plain)
    torch.save(dict(state_dict=plain), tmp_path/'lightning.ckpt.pt')
    assert {*read_weights(tmp_path/'lightning.ckpt.pt')} == {*cnn().state_dict()}


def test_targets_of_several_lengths(cnn):
    with pytest.raises(ValueError, match='have different numbers of targets; give one for each image'):
        AntehocModel(cnn(), X).explain(X, target=[[0, 1], [2]])


class Convolve(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before, 3, 3))

    def forward(self, x): return F.conv2d(x, self.weight).relu()


def test_convolutions_by_functions():
    network = nn.Sequential(Convolve(3, 8), nn.MaxPool2d(2), Convolve(8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r'Sequential are functions \(F.conv2d\).*name the modules.*layers='):
        AntehocModel(network, X)


class Output:
    def __init__(self, **parts): vars(self).update(parts)


def test_outputs_in_objects():
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    assert explained_output(Output(a=a, b=b), 'b') is b
    for out, output, hint in [(dict(a=dict(b=b)), 'a', r"lambda out: out\['a'\]\['b'\]$"),
                              (dict(a=dict(b=b)), 'b', r"give a function: lambda out: out\['a'\]\['b'\]$"),
                              (Output(a=(b, b)), 'a', r'lambda out: out.a\[0\]$')]:
        with pytest.raises(ValueError, match=hint): explained_output(out, output)


@pytest.mark.slow
def test_an_architecture_that_takes_no_other_head():
    assert type(rebuild_cnn('vit_b_16', 3)) is torchvision.models.VisionTransformer


# --- binary segmentation
@pytest.mark.parametrize('as_masks', [False, True])
@pytest.mark.parametrize('end', [(), (nn.Sigmoid(),)])
def test_binary_segmentation(end, as_masks):
    "Labels are class numbers (B,h,w), or masks (B,1,h,w) as PyTorch's losses take them."
    torch.manual_seed(0)
    loss = nn.BCELoss() if end else nn.BCEWithLogitsLoss()
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
                            nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 1, 1), *end)
    masks = torch.zeros(8, 32, 32).long()
    masks[:, 8:24, 8:24] = 1
    labels = masks[:, None].float() if as_masks else masks
    of_numbers = lambda out, y: loss(out[:, 0], y.float())
    learn = learner(network, labels, loss if as_masks else of_numbers, cbs=TwoPass(eta=2))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    model = learn.model
    assert (model.task, model.classes, model.gives_probabilities) == ('segmentation', 2, bool(end))
    assert 0 < learn.two_pass.mean_int_loss('train') < 4
    e = model.explain(X, target=1)
    predicted = (e.pred[:, 0] > (.5 if end else 0)).long()
    assert e.map.isfinite().all() and e.map.shape == (2, 1, 32, 32)
    assert {int(name) for name in e.labels[0].split(', ')} <= {*predicted[0].unique().tolist()}
    assert model.explain(X, target=torch.ones(32, 32)).target.equal(predicted)


def test_grey_images_as_labels_are_no_masks():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))
    learn = learner(network, torch.rand(8, 1, 32, 32), nn.BCEWithLogitsLoss(), cbs=TwoPass(eta=1))
    assert (learn.model.task, learn.model.class_specific) == ('', False)


def test_labels_of_pixels():
    "A mask as binary cross-entropy takes it says what class numbers say; other floats are refused."
    y1, masks = torch.randn(2, 2, 4, 4), torch.rand(2, 4, 4) < .5
    wanted = draw_targets(y1, masks.long(), None, task='segmentation')
    for mask in (masks.float(), masks[:, None].float(), masks[:, None].long()):
        assert torch.equal(draw_targets(y1, mask, None, task='segmentation'), wanted)
    unknown = torch.where(torch.arange(16).view(4, 4) < 6, -1, masks.long())  # those pixels are left out
    for left_out in (-1., 255., torch.nan):
        mask = torch.where(unknown < 0, left_out, unknown + 1e-4)
        assert torch.equal(draw_targets(y1, mask, None, task='segmentation'),
                           draw_targets(y1, unknown, None, task='segmentation'))
    for label in (torch.zeros(2, 2, 4, 4), torch.zeros(2, 4, 3)):
        with pytest.raises(ValueError, match='labels must be the class of each pixel'):
            draw_targets(y1, label, None, task='segmentation')
    with pytest.raises(ValueError, match='got .* of torch.float32'):
        draw_targets(torch.randn(2, 3, 4, 4), masks.float(), None, task='segmentation')


def test_scores_that_are_no_probabilities_stay():
    scores = torch.rand(4, 3) / 4
    assert torch.equal(as_logits(scores, 'single-label', True), scores)
    shares = torch.randn(4, 3, 5, 5).softmax(1)
    torch.testing.assert_close(as_logits(shares, 'segmentation', True).softmax(1), shares)


def test_a_loss_that_decodes_without_an_activation(cnn):
    class Focal(nn.CrossEntropyLoss):
        def decodes(self, scores): return scores.argmax(-1)
    loader = DataLoader(TensorDataset(X, torch.tensor([0, 1])), 2)
    learn = Learner(DataLoaders(loader, loader), cnn(), loss_func=Focal(), cbs=TwoPass(eta=2))
    assert not learn.model.gives_probabilities


def test_one_hot_labels_in_a_loop_of_ones_own(cnn):
    losses = []
    for label in (torch.tensor([0, 1]), torch.eye(cnn()(X).shape[1])[:2]):
        torch.manual_seed(0)
        losses.append(step_loss(AntehocModel(cnn(), X, eta=2), label))
    assert losses[0] == losses[1]


@pytest.mark.parametrize('task, before, after, expected', [
    ('single-label', [[.97, .03], [.2, .8]], [[.01, .99], [.2, .8]], [.96 / .97, 0]),
    ('binary', [[.99], [.9]], [[.01], [.9]], [.98 / .99, 0]),
    ('regression', [[5., 5], [0, 0]], [[0., 0], [0, 0]], [1, 0]),
])
def test_the_change_in_reports(cnn, task, before, after, expected):
    model = AntehocModel(cnn(), X, eta=2, meta=dict(task=task, activation=None), class_specific=False)
    change = report._change(model, torch.tensor(before), torch.tensor(after), None)
    torch.testing.assert_close(change.double(), torch.tensor(expected).double(), atol=1e-4, rtol=0)
