"""What is said of a model's output is what its learner says."""
import csv

import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner
from fastai.losses import BaseLoss, BCEWithLogitsLossFlat, CrossEntropyLossFlat, LabelSmoothingCrossEntropy, MSELossFlat
from fastai.vision.data import ImageBlock, PointBlock
from torch import nn
from typer.testing import CliRunner

import antehoc_nb.show.learner  # noqa: F401  gives learners `explain`
from antehoc_nb.cli import _target_class, app
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.show.explain_files import explain_files
from antehoc_nb.train.archs import build_cnn
from antehoc_nb.train.two_pass import TwoPass, read_learner

LABELS = ['sky', 'tree'], ['tree'], [], ['dog', 'sky']
MANY = BCEWithLogitsLossFlat(thresh=.6)
# kind -> block of the labels, labels, loss, outputs, task, activation
CASES = dict(
    several=(MultiCategoryBlock, lambda o: LABELS[o % 4], MANY, 3, 'multi-label', 'sigmoid'),
    binary=(CategoryBlock, lambda o: ['cat', 'dog'][o % 2], BCEWithLogitsLossFlat(), 1, 'binary', 'sigmoid'),
    regression=(lambda: RegressionBlock(2), lambda o: [o / 4, 1.], MSELossFlat(), 2, 'regression', None),
    points=(PointBlock, lambda o: torch.tensor([[o, 2. * o]]), MSELossFlat(), 2, 'regression', None),
    number=(RegressionBlock, lambda o: o / 4, MSELossFlat(), 1, 'regression', None),
    integers=(CategoryBlock, lambda o: [3, 7, 10][o % 3], CrossEntropyLossFlat(), 3, 'single-label', 'softmax'),
    classes=(CategoryBlock, lambda o: 'abc'[o % 3], CrossEntropyLossFlat(), 3, 'single-label', 'softmax'),
)

pytestmark = pytest.mark.usefixtures('one_thread')
BIASES = [3., -3., -3.], [-3., -3., -3.], [-1., .3, 2.]


def image_of(o): return np.full((16, 16, 3), 20 * o, np.uint8) if isinstance(o, int) else np.asarray(o)


def learner(cnn, kind, cbs=(), loss=None):
    "A learner, not trained, on 8 images"
    block, label, usual_loss, n_out, _, _ = CASES[kind]
    data = DataBlock((ImageBlock, block), get_x=image_of, get_y=label, splitter=IndexSplitter([4, 5, 6, 7]))
    dls = data.dataloaders(list(range(8)), bs=4, num_workers=0, device='cpu')
    return Learner(dls, cnn(n_out), loss_func=loss or usual_loss, cbs=cbs)


def with_bias(model, bias):
    "A model that gives the same scores for all images"
    head = model.cnn[-1]
    head.weight.data.zero_()
    head.bias.data = torch.tensor(bias[:len(head.bias)])
    return model


def said(learn):
    "What fastai says of an image, as the table has it"
    decoded, *_ = learn.predict(image_of(1))
    if isinstance(decoded, str): return decoded
    if isinstance(decoded, (int, bool)): return str(decoded)
    decoded = list(np.ravel(decoded))
    return ', '.join(o if isinstance(o, str) else f'{float(o):.5g}' for o in decoded) or 'none'


@pytest.mark.parametrize('bias', BIASES, ids=str)
@pytest.mark.parametrize('kind', CASES)
def test_the_table_says_what_the_learner_says(cnn, photo, tmp_path, kind, bias):
    learn = learner(cnn, kind, TwoPass(eta=2))
    model = with_bias(learn.model, bias)
    task, activation = CASES[kind][4:]
    assert (model.meta['task'], model.meta['activation']) == (task, activation)
    files = [(photo(tmp_path/'a.png'), 'a.png')]
    assert explain_files(model, files, tmp_path/'out', say=None)[0] == 1
    with (tmp_path/'out'/'explanations.csv').open(encoding='utf-8') as file: row = next(csv.DictReader(file))
    if kind == 'binary': expected = 'dog' if bias[0] > 0 else 'cat'  # fastai's `predict` has no word for it
    else:
        with learn.no_bar(): expected = said(learn)
    assert row['prediction'] == expected
    scores = torch.tensor(bias)
    if task == 'single-label':
        assert float(row['probability']) == pytest.approx(scores.softmax(0).max().item(), abs=1e-3)
    if kind == 'binary':
        p = scores[0].sigmoid().item()
        assert float(row['probability']) == pytest.approx(max(p, 1 - p), abs=1e-3)
    if kind == 'several':
        on = [p for p in scores.sigmoid().tolist() if p > .6]
        assert row['probability'] == ', '.join(str(round(p, 4)) for p in on)
    if task == 'regression': assert row['probability'] == ''


class OneOfAll(CrossEntropyLossFlat):
    "Each class by itself, as for one against all the others"
    def activation(self, x): return x.sigmoid()


class LowThreshold(BCEWithLogitsLossFlat):
    def decodes(self, x): return x > .3


class InRange(BaseLoss):
    "The numbers of a regression, in [0,1]"
    def __init__(self): super().__init__(nn.MSELoss, axis=-1, floatify=True)
    def activation(self, x): return x.sigmoid()


class Cooler(CrossEntropyLossFlat):
    def activation(self, x): return (x / 2).softmax(-1)


class Rejecting(CrossEntropyLossFlat):
    def decodes(self, x): return torch.where(x.amax(-1) > .9, x.argmax(-1), 0)


@pytest.mark.parametrize('bias', BIASES, ids=str)
@pytest.mark.parametrize('kind, loss, activation, threshold', [
    ('classes', OneOfAll, 'sigmoid', None), ('several', LowThreshold, 'sigmoid', .3),
    ('regression', InRange, 'sigmoid', None), ('classes', LabelSmoothingCrossEntropy, 'softmax', None)])
def test_losses_that_say_how_scores_are_read(cnn, kind, loss, activation, threshold, bias):
    learn = learner(cnn, kind, TwoPass(eta=2), loss())
    model = with_bias(learn.model, bias)
    assert model.meta['activation'] == activation
    if threshold: assert model.meta['threshold'] == pytest.approx(threshold, abs=1e-3)
    with learn.no_bar():
        assert model.explain([image_of(1)]).labels == [said(learn)]
        _, _, shares = learn.predict(image_of(1))
    e = model.explain([image_of(1)])
    assert torch.allclose(e.numbers[0] if kind == 'regression' else e.probabilities[0], shares)


@pytest.mark.parametrize('loss', [Cooler, Rejecting])
def test_losses_with_functions_of_their_own(cnn, photo, tmp_path, loss):
    learn = learner(cnn, 'classes', loss=loss())
    model, files = AntehocModel(learn, eta=2), [(photo(tmp_path/'a.png'), 'a.png')]
    with pytest.raises(ValueError, match="loss has an `activation` or a `decodes` of its own.*meta=dict"):
        explain_files(model, files, tmp_path/'out', say=None)
    model.meta['activation'] = 'softmax'
    assert explain_files(model, files, tmp_path/'out', say=None)[0] == 1


@pytest.mark.parametrize('kind', CASES)
def test_exported_learners_keep_the_task(cnn, tmp_path, kind):
    learn = learner(cnn, kind)
    expected = read_learner(learn)['meta']
    learn.dls = learn.dls.new_empty()
    found = read_learner(learn)
    assert {k: found['meta'].get(k) for k in ('task', 'activation', 'vocab')} == {
        k: expected.get(k) for k in ('task', 'activation', 'vocab')}
    assert (found['class_specific'] is None) == (CASES[kind][4] in ('single-label', 'multi-label'))


def test_labels_that_are_numbers(cnn):
    learn = learner(cnn, 'integers', TwoPass(eta=2))
    model = learn.model
    assert model.config['meta']['vocab'] == ['3', '7', '10']
    x = torch.rand(2, 3, 16, 16)
    assert _target_class('7', model) == '7' and model.explain(x, target='7').target.tolist() == [1, 1]
    with pytest.raises(ValueError, match="unknown class '2'"): _target_class('2', model)
    assert set(model.explain(x).labels) <= {'3', '7', '10'}
    assert learn.explain(target='10').target.tolist() == [2] * 4


@pytest.mark.parametrize('loss, labels, task, activation', [
    (nn.BCEWithLogitsLoss(), torch.ones(4, 3), 'multi-label', 'sigmoid'),
    (nn.BCELoss(), torch.ones(4, 3), 'multi-label', None),
    (nn.functional.binary_cross_entropy_with_logits, torch.ones(4), 'binary', 'sigmoid'),
    (nn.functional.cross_entropy, torch.ones(4).long(), 'single-label', 'softmax'),
    (nn.SmoothL1Loss(), torch.rand(4, 3), 'regression', None),
    (nn.MSELoss(), torch.ones(4).long(), 'regression', None),
    (nn.CrossEntropyLoss(), torch.ones(4, 8, 8).long(), 'segmentation', 'softmax'),
])
def test_tasks_of_plain_losses(cnn, loss, labels, task, activation):
    from fastai.data.core import DataLoaders
    from torch.utils.data import DataLoader, TensorDataset
    loader = DataLoader(TensorDataset(torch.rand(4, 3, 8, 8), labels), 4)
    meta = read_learner(Learner(DataLoaders(loader, loader), cnn(), loss_func=loss))['meta']
    assert (meta['task'], meta['activation']) == (task, activation)


def test_what_cannot_be_tabulated_is_refused(cnn, photo, tmp_path):
    files, x = [(photo(tmp_path/'a.png'), 'a.png')], torch.rand(2, 3, 16, 16)

    def refused(model, match):
        with pytest.raises(ValueError, match=match): explain_files(model, files, tmp_path/'out', say=None)
        assert not (tmp_path/'out').exists()  # nothing is left behind
    refused(AntehocModel(cnn(1), x, eta=2), r"does not say what it means: save it with meta=dict\(task='binary'")
    refused(AntehocModel(cnn(), x, eta=2, meta=dict(task='captions')), 'captions')
    with pytest.raises(ValueError, match=r"task='segmentation' must be \(B,K,h,w\), got \(2, 3\)"):
        AntehocModel(cnn(), x, eta=2, meta=dict(task='segmentation'))
    with pytest.raises(ValueError, match="did you mean 'regression'"):
        AntehocModel(cnn(), x, eta=2, meta=dict(task='regresion'))
    refused(AntehocModel(cnn(3, 4), torch.rand(2, 4, 16, 16), eta=2), 'images of 4 channels, which no image file has')
    refused(AntehocModel(cnn(3, 2), torch.rand(2, 2, 16, 16), eta=2), 'images of 2 channels')


def test_a_plain_model_with_facts_of_ones_own(cnn, photo, tmp_path):
    model = AntehocModel(cnn(1), torch.rand(2, 3, 16, 16), eta=2, meta=dict(task='binary', vocab=['no', 'yes']))
    with_bias(model, [2.])
    assert model.explain(torch.rand(2, 3, 16, 16)).labels == ['yes', 'yes']
    assert explain_files(model, [(photo(tmp_path/'a.png'), 'a.png')], tmp_path/'out', say=None)[0] == 1


class Squeezed(nn.Module):
    "Gives one image's scores without the axis of the images"
    def __init__(self, cnn):
        super().__init__()
        self.cnn = cnn

    def forward(self, x): return self.cnn(x).squeeze()


@pytest.mark.parametrize('n_out, task', [(1, 'binary'), (1, 'regression'), (3, 'single-label'), (3, 'multi-label'),
                                         (3, None), (3, 'regression')])
def test_networks_that_squeeze(cnn, n_out, task):
    x = torch.rand(2, 3, 16, 16)
    model = AntehocModel(Squeezed(cnn(n_out)), x, eta=2, meta=dict(task=task))
    one, two = model.explain(x[:1]), model.explain(x)
    assert one.labels == two.labels[:1] and torch.allclose(one.map, two.map[:1], atol=1e-4)


@pytest.mark.parametrize('task', ['binary', 'regression', None])
def test_one_number_for_all_images(cnn, task):
    class Mean(Squeezed):
        def forward(self, x): return self.cnn(x).mean()
    x = torch.rand(2, 3, 16, 16)
    e = AntehocModel(Mean(cnn(1)), x, eta=2, meta=dict(task=task)).explain(x)
    with pytest.raises(TypeError, match=r'\(\)'): _ = e.decisions


def test_the_command(photo, tmp_path):
    torch.manual_seed(0)
    photo(tmp_path/'photos'/'a.png')
    meta = dict(size=[16, 16], vocab=['a', 'b'], task='multi-label', activation='sigmoid', threshold=.5)
    model = AntehocModel(build_cnn('small_cnn', 2), torch.rand(2, 3, 16, 16), eta=2, meta=meta, class_specific=False)
    last = [module for module in model.cnn.modules() if isinstance(module, nn.Linear)][-1]
    last.weight.data.zero_()
    last.bias.data = torch.tensor([-5., -5.])
    model.save_pretrained(tmp_path/'model')
    arguments = ['explain', tmp_path/'model', tmp_path/'photos', '--out', tmp_path/'out', '--device', 'cpu']
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert 'a.png,overlays/a.png,none,,' in (tmp_path/'out'/'explanations.csv').read_text()


