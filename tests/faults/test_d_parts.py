"""A part of an explanation has that part of the CNN's output, whatever its structure."""
import pytest
import torch

from antehoc_nb.core.model import Explanation

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
