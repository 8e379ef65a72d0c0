"""The evaluator: masks without information, runs that resume, and no masks outside of training."""

import pytest
import torch
from fastai.callback.core import Callback

from antehoc_nb.core.utils import plain_tensor
from antehoc_nb.evaluate.evaluator import RandomMasks, random_masks
from antehoc_nb.train.checkpoint import Checkpoint
from antehoc_nb.train.two_pass import normalisation


class Interrupt(Callback):
    def before_batch(self):
        if self.training and self.epoch == 2:
            raise KeyboardInterrupt


def test_a_resumed_evaluator_is_the_same_evaluator(tmp_path, evaluator, make_evaluator):
    with pytest.raises(KeyboardInterrupt):
        make_evaluator(Checkpoint(tmp_path / 'c'), Interrupt())
    torch.randn(100)
    resumed = make_evaluator(Checkpoint(tmp_path / 'c')).model.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in evaluator.model.state_dict().items())


def test_an_evaluator_gets_whole_images_when_it_predicts(evaluator):
    x = torch.cat([plain_tensor(batch[0]) for batch in evaluator.dls.valid])
    with evaluator.no_bar():
        preds, _ = evaluator.get_preds()
    with torch.no_grad():
        torch.testing.assert_close(preds, evaluator.model(x).softmax(1))


def test_masks_differ_between_steps_and_carry_no_order(make_evaluator):
    seen = []

    class Look(Callback):
        order = RandomMasks.order + 1

        def before_batch(self):
            mean, std = (torch.tensor(o).view(1, -1, 1, 1) for o in normalisation(self.learn.dls))
            if self.training:
                seen.append((plain_tensor(self.x) == -mean / std).float())

    make_evaluator(Look())
    assert len(seen) == 16 and len({o.mean().item() for o in seen}) > 10
    shares = [o.mean().item() for o in seen]
    assert sum(shares[8:]) > sum(shares[:8])  # from few to all


@pytest.mark.parametrize('size', [(1, 1), (5, 9), (64, 32)])
def test_masks_of_any_size(size):
    masks = random_masks(50, size, torch.Generator().manual_seed(0))
    assert masks.shape == (50, 1, *size) and masks.isfinite().all() and masks.min() >= 0 and masks.max() <= 1
