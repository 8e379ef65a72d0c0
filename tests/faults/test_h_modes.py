"""Inference mode, networks of other types, re-entrant checkpoints."""
from copy import deepcopy

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from antehoc_nb.core.interpretation_loss import two_pass_step
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')

X = torch.rand(2, 3, 32, 32)


@pytest.mark.parametrize('what', ['cnn and images', 'images', 'model', 'noise'])
def test_inference_mode(cnn, what):
    expected = AntehocModel(cnn(), None if what == 'noise' else X).explain(X).map
    outside = cnn()
    with torch.inference_mode():
        x = X.clone()
        if what == 'cnn and images': model = AntehocModel(cnn(), x)
        elif what == 'images': model = AntehocModel(outside, x)
        elif what == 'model': model = AntehocModel(outside, X)
        else: model = AntehocModel(outside)
        inside = model.explain(x).map
    assert torch.equal(inside, expected) and torch.equal(model.explain(X).map, expected)
    assert not any(weight.is_inference() for weight in model.weight_net.parameters())
    if what != 'cnn and images': (two_pass_step(model.train(), X, torch.tensor([0, 1]))[1]).backward()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('sample', [None, 'float', 'same'])
def test_networks_of_other_types(cnn, dtype, sample):
    sample = dict(float=X, same=X.to(dtype)).get(sample)
    model = AntehocModel(cnn().to(dtype), sample)
    explanation = model.explain(X.to(dtype))
    reference = AntehocModel(cnn(), X if sample is not None else None).explain(X)
    assert (explanation.map - reference.map).abs().mean() < .05 and explanation.pred.dtype == dtype
    for images in (explanation.energy, explanation.binarised): assert images.dtype == dtype and images.shape == X.shape
    assert explanation[1].energy.shape == (1, 3, 32, 32) and len(explanation.overlays()) == 2
    assert model.to(dtype).explain(X.to(dtype)).map.isfinite().all()


class Checkpointed(nn.Module):
    "A CNN that computes its blocks again when gradients are taken"
    def __init__(self, cnn, use_reentrant):
        super().__init__()
        self.first, self.blocks, self.head = cnn[0], cnn[1:3], cnn[3:]
        self.use_reentrant = use_reentrant

    def forward(self, x): return self.head(checkpoint(self.blocks, self.first(x), use_reentrant=self.use_reentrant))


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_checkpoints_in_a_plain_loop(cnn, use_reentrant):
    label, found = torch.tensor([0, 1]), []
    for network in (cnn(), Checkpointed(cnn(), use_reentrant)):
        torch.manual_seed(0)
        names = ['0.2', '1.2'] if isinstance(network, nn.Sequential) else ['first.2', 'blocks.1.2']
        model = AntehocModel(network, X, layers=names, evidence=None if not use_reentrant else False).train()
        x = X.clone().requires_grad_()
        for _ in range(2): out, loss = two_pass_step(model, x, label, number=0)
        (nn.functional.cross_entropy(out, label) + loss).backward()
        found.append([weight.grad for weight in model.weight_net.parameters()])
        found[-1] += [loss.detach(), x.grad]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


@pytest.mark.filterwarnings('ignore:AntehocModel. no gradients of the scores')  # which such checkpoints hide
def test_reentrant_checkpoints_in_training(cnn):
    "The CNN comes out as by plain training, and the weight network learns."
    data = TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 3)
    dls = DataLoaders(DataLoader(data, 4), DataLoader(data, 4))
    start, trained = Checkpointed(cnn(), True), []
    for cbs in ([], [TwoPass(eta=2)]):
        network = deepcopy(start)
        learn = Learner(dls, network, loss_func=nn.functional.cross_entropy, cbs=cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
        trained.append(network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(trained[0].values(), trained[1].values()))
    assert any(weight.abs().sum() > 0 for weight in [learn.model.weight_net.autoencoder.out.weight])
