"""A part of an explanation has that part of the CNN's output, whatever its structure."""
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from antehoc_nb.core.model import AntehocModel, Explanation
from antehoc_nb.core.utils import map_tensors, output_tensors

pytestmark = pytest.mark.usefixtures('one_thread')


def explained(pred, n=2):
    maps = torch.rand(n, 1, 4, 4)
    return Explanation(pred, maps, maps, maps, maps, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))


def detection(n): return dict(boxes=torch.rand(n, 4), scores=torch.rand(n))


@pytest.mark.parametrize('counts', [(7, 100), (0, 5), (2, 2), (1, 2)])
def test_detections(counts):
    pred = [detection(n) for n in counts]
    part = explained(pred)[1].pred
    assert len(part) == 1 and torch.equal(part[0]['boxes'], pred[1]['boxes']) and len(part[0]['scores']) == counts[1]
    assert [len(of_image['boxes']) for of_image in explained(pred)[:].pred] == list(counts)
    assert torch.equal(explained(pred)[-2].pred[0]['scores'], pred[0]['scores'])


def test_tensors_of_several_lengths_for_each_image():
    pred = [torch.rand(5, 4), torch.rand(9, 4)]
    assert [len(of_image) for of_image in explained(pred)[1].pred] == [9]


def test_texts_for_each_image(): assert explained(['a cat', 'a dog'])[1].pred == ['a dog']


@pytest.mark.parametrize('kind', [tuple, list])
def test_heads(kind):
    pred = kind([torch.rand(2, 3), torch.rand(2, 5)])
    part = explained(pred)[1].pred
    assert type(part) is kind and [tuple(head.shape) for head in part] == [(1, 3), (1, 5)]


def test_what_is_not_of_an_image_stays_whole():
    pred = dict(logits=torch.rand(2, 3), anchors=torch.rand(50, 4), scale=torch.tensor(2.), losses=[])
    part = explained(pred)[1].pred
    assert part['logits'].shape == (1, 3) and part['anchors'].shape == (50, 4) and part['scale'] == 2


def test_detections_beside_losses():
    pred = dict(loss=torch.tensor(1.)), [detection(4), detection(6)]
    losses, detections = explained(pred)[1].pred
    assert losses['loss'] == 1 and [len(of_image['boxes']) for of_image in detections] == [6]


@dataclass(frozen=True)
class Scores:
    logits: torch.Tensor
    doubled: torch.Tensor = field(init=False)

    def __post_init__(self): object.__setattr__(self, 'doubled', self.logits * 2)


class Results(dict):
    "A dictionary that is made of something else than its content."
    def __init__(self, name):
        super().__init__()
        self.name = name

    def copy(self):
        new = Results(self.name)
        new.update(self)
        return new


def in_results(logits):
    results = Results('a')
    results['logits'] = logits
    return results


KINDS = dict(dataclass=Scores, namespace=lambda y: SimpleNamespace(logits=y), default=lambda y: defaultdict(list, a=y),
             ordered=lambda y: OrderedDict(logits=y), own=in_results,
             nested=lambda y: [dict(a=(y, None, 'x')), {1, 2}, 3],
             classes=lambda y: (y, Scores))


@pytest.mark.parametrize('kind', KINDS)
def test_outputs_of_every_kind(cnn, kind):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = cnn()

        def forward(self, x): return KINDS[kind](self.cnn(x))
    network, x = Network(), torch.rand(2, 3, 32, 32)
    explanation = AntehocModel(network, x, eta=2).explain(x)
    expected = network(x)
    assert type(explanation.pred) is type(expected)
    for part, n in ((explanation, 2), (explanation[1], 1), (explanation.cpu(), 2)):
        found, whole = output_tensors(part.pred), output_tensors(expected)
        assert len(found) == len(whole) and all(torch.equal(a, b[-n:]) for a, b in zip(found, whole))
    assert type(map_tensors(torch.Tensor.double, expected)) is type(expected)
    assert output_tensors(expected)[0].dtype == torch.float32
