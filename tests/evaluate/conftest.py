"""What the tests of this folder share: one small trained model, and an evaluator trained for a few steps."""

from contextlib import contextmanager

import pytest
import torch
from fastai.torch_core import set_seed
from workers import small_cnn

from antehoc_nb.core.utils import plain_tensor
from antehoc_nb.data.photo_digits import photo_digits_dls
from antehoc_nb.evaluate.evaluator import train_evaluator
from antehoc_nb.train.learner import antehoc_learner


@pytest.fixture(autouse=True)
def single_thread(one_thread):
    "All CNNs and images of this folder are too small to share among cores."


@contextmanager
def single_threaded():
    "The same for a fixture of the session, which is made before those of a test"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)


@pytest.fixture(scope='session')
def digits():
    "Photo-digits: 64 training and 16 validation scenes of 32 pixels"
    return photo_digits_dls(n_train=64, n_valid=16, size=32, bs=16)


@pytest.fixture(scope='session')
def trained(digits):
    "A CNN and its weight network, trained for two epochs; do not change it"
    set_seed(0)
    learn = antehoc_learner(digits, small_cnn(), eta=3)
    with single_threaded(), learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 6e-3)
    return learn.model.eval()


@pytest.fixture(scope='session')
def scenes(digits):
    "The validation scenes, (16,3,32,32), and their classes"
    batches = list(digits.valid)
    return tuple(torch.cat([plain_tensor(batch[k]) for batch in batches]) for k in (0, 1))


def short_evaluator(*callbacks):
    "An evaluator after four epochs, always the same"
    set_seed(2)
    dls = photo_digits_dls(n_train=64, n_valid=16, size=32, bs=16)
    with single_threaded():
        return train_evaluator(dls, small_cnn(), 4, 1e-2, cbs=callbacks)


@pytest.fixture(scope='session')
def make_evaluator():
    "`short_evaluator`, for tests that add callbacks to it"
    return short_evaluator


@pytest.fixture(scope='session')
def evaluator():
    "The learner of `short_evaluator`; do not change it"
    return short_evaluator()
