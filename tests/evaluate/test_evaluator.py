"""The judge: masks without a message, runs that resume, and no masks outside of training."""
import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from workers import small_cnn

from antehoc_nb.core.utils import plain_tensor
from antehoc_nb.data.photo_digits import photo_digits_dls
from antehoc_nb.evaluate.evaluator import RandomMasks, random_masks, train_evaluator
from antehoc_nb.train.checkpoint import Checkpoint
from antehoc_nb.train.two_pass import normalisation

pytestmark = pytest.mark.usefixtures('one_thread')


class Plug(Callback):
    def before_batch(self):
        if self.training and self.epoch == 2: raise KeyboardInterrupt


def judged(*cbs):
    set_seed(2)
    return train_evaluator(photo_digits_dls(n_train=64, n_valid=16, size=32, bs=16), small_cnn(), 4, 1e-2, cbs=cbs)


def test_a_resumed_judge_is_the_same_judge(tmp_path):
    whole = judged().model.state_dict()
    with pytest.raises(KeyboardInterrupt): judged(Checkpoint(tmp_path/'c'), Plug())
    torch.randn(100)
    resumed = judged(Checkpoint(tmp_path/'c')).model.state_dict()
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())


def test_a_judge_sees_images_whole_when_it_judges():
    evaluator = judged()
    x = torch.cat([plain_tensor(b[0]) for b in evaluator.dls.valid])
    with evaluator.no_bar(): preds, _ = evaluator.get_preds()
    with torch.no_grad(): torch.testing.assert_close(preds, evaluator.model(x).softmax(1))


def test_masks_differ_between_steps_and_carry_no_order():
    seen = []

    class Look(Callback):
        order = RandomMasks.order + 1
        def before_batch(self):
            mean, std = (torch.tensor(o).view(1, -1, 1, 1) for o in normalisation(self.learn.dls))
            if self.training: seen.append((plain_tensor(self.x) == -mean / std).float())
    judged(Look())
    assert len(seen) == 16 and len({o.mean().item() for o in seen}) > 10
    shares = [o.mean().item() for o in seen]
    assert sum(shares[8:]) > sum(shares[:8])  # from few to all


@pytest.mark.parametrize('size', [(1, 1), (5, 9), (64, 32)])
def test_masks_of_any_size(size):
    m = random_masks(50, size, torch.Generator().manual_seed(0))
    assert m.shape == (50, 1, *size) and m.isfinite().all() and m.min() >= 0 and m.max() <= 1
