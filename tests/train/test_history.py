"""What a finished training is remembered by."""
import json
import math

import pytest
from fastai.learner import Learner
from fastai.metrics import accuracy, error_rate
from workers import run, same, small_cnn

from antehoc_nb.data.photo_digits import photo_digits_dls
from antehoc_nb.train.checkpoint import join_histories, restore_history, training_history
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread')


def learner(*cbs, metrics=accuracy):
    dls = photo_digits_dls(n_train=32, n_valid=16, size=32, bs=16)
    return Learner(dls, small_cnn(), metrics=metrics, cbs=[*cbs])


def fitted(*cbs, epochs=2, **kwargs): return run(learner(*cbs, **kwargs), lambda learn: learn.fit(epochs, 1e-2))


def rows(learn): return [[str(value) for value in row] for row in learn.recorder.values]


@pytest.mark.parametrize('two_pass', [False, True])
def test_a_history_survives_json_and_leaves_the_weights_alone(two_pass):
    cbs = [TwoPass(eta=2)] if two_pass else []
    learn, other = fitted(*cbs), learner(*[TwoPass(eta=2)] if two_pass else [])
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    history = json.loads(json.dumps(training_history(learn), allow_nan=False))
    restore_history(other, history)
    assert rows(other) == rows(learn) and same(before, other.model.state_dict())
    assert list(other.recorder.metric_names) == list(learn.recorder.metric_names)
    assert list(map(float, other.recorder.losses)) == list(map(float, learn.recorder.losses))
    assert other.recorder.lrs == learn.recorder.lrs and other.recorder.iters == learn.recorder.iters == [2, 4]
    assert training_history(other) == history
    if two_pass: assert other.two_pass.int_losses == learn.two_pass.int_losses
    else: assert history['int_losses'] == []


def test_joined_columns_are_found_by_name_and_missing_scores_are_missing():
    first, second = fitted(metrics=[accuracy, error_rate]), fitted(TwoPass(eta=2), epochs=1)
    joined = join_histories(training_history(first), training_history(second))
    assert joined['columns'] == [
        'train_loss', 'valid_loss', 'accuracy', 'train_int_loss', 'valid_int_loss', 'drop_at_20', 'untrained_drop',
        'error_rate']
    assert joined['values'][0][3:7] == [None] * 4 and joined['values'][2][7] is None
    assert joined['values'][0][7] == first.recorder.values[0][3] and joined['iters'] == [2, 4, 6]
    restore_history(second, joined)
    assert len(second.recorder.losses) == 6 and math.isnan(second.recorder.values[0][3])
    assert second.recorder.values[2][2] == joined['values'][2][2]
