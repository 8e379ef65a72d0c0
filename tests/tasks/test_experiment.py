"""Runs that are killed, finished, and continued; their files, and what they print."""
import json
import shutil
import stat

import pytest
import torch
import torchvision
from fastai.callback.core import Callback
from fastai.metrics import error_rate

from antehoc_nb.core.utils import weights_digest
from antehoc_nb.data.photo_digits import photo_digits_dls
from antehoc_nb.tasks import experiment
from antehoc_nb.tasks.experiment import epoch_scores, train_run

pytestmark = pytest.mark.usefixtures('one_thread', 'without_figures')
CONFIG = dict(arch='small_cnn', epochs=2, lr=1e-2, seed=0, eta=2, plain=False)


def dls(seed=0): return photo_digits_dls(n_train=48, n_valid=16, size=32, bs=16, seed=seed)


def train(out, lines=None, cbs=(), images=0, **changes):
    say = None if lines is None else lines.append
    return train_run(dls(images), CONFIG | changes, out, cbs=cbs, say=say)


def record(out): return json.loads((out/'record.json').read_text())


class Kill(Callback):
    "Interrupt the training in an epoch of a fit, counted from 0."
    order = 90

    def __init__(self, epoch): self.at = epoch

    def before_batch(self):
        if self.training and self.epoch == self.at and self.iter == 1: raise KeyboardInterrupt


def killed(out, epoch, **changes):
    with pytest.raises(KeyboardInterrupt): train(out, cbs=[Kill(epoch)], **changes)


@pytest.fixture(scope='module')
def finished(tmp_path_factory, without_figures):
    "A run of two epochs that was continued by two more, with a weight network and without"
    folder = tmp_path_factory.mktemp('finished')
    for plain in (False, True):
        out = folder/('plain' if plain else 'ours')
        train(out, plain=plain)
        train(out, plain=plain, epochs=4)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('plain', [False, True])
def test_a_run_killed_in_any_part_ends_with_the_same_weights(tmp_path, finished, plain):
    out, whole = tmp_path/'run', finished/('plain' if plain else 'ours')
    lines = []
    killed(out, 1, plain=plain)
    assert (out/'checkpoint.pt').exists() and not (out/'record.json').exists()
    train(out, lines, plain=plain)
    assert lines[0] == 'resuming at epoch 2' and lines[1].split()[:3] == ['epoch', 'train_loss', 'valid_loss']
    assert [line.split()[0] for line in lines[2:]] == ['2/2']
    for epoch in (0, 1): killed(out, epoch, plain=plain, epochs=4)
    assert (out/'checkpoint-part2.pt').exists() and len(record(out)['results']['epochs']) == 2
    lines.clear()
    learn = train(out, lines, plain=plain, epochs=4)
    assert lines[0] == '2 epochs are done, 2 to go, as a one-cycle of their own'
    assert lines[1] == 'resuming at epoch 4' and lines[3].split()[0] == '4/4'
    weights = 'cnn.safetensors' if plain else 'model/model.safetensors'
    assert (out/weights).read_bytes() == (whole/weights).read_bytes()
    ours, theirs = record(out)['results'], record(whole)['results']
    assert ours['cnn_sha256'] == theirs['cnn_sha256'] == record(finished/'ours')['results']['cnn_sha256']
    assert ours['epochs'] == theirs['epochs'] and len(ours['epochs']) == 4
    assert [(part['first_epoch'], part['last_epoch']) for part in ours['parts']] == [(1, 2), (3, 4)]
    assert len(learn.recorder.losses) == 12 and learn.recorder.iters == [3, 6, 9, 12]


@pytest.mark.parametrize('plain', [False, True])
def test_a_finished_run_keeps_no_checkpoint_and_is_not_trained_again(finished, plain):
    out = finished/('plain' if plain else 'ours')
    files = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
    assert not [path for path in files if 'checkpoint' in path.name]
    lines = []
    learn = train(out, lines, plain=plain, epochs=4)
    assert {path: path.read_bytes() for path in out.rglob('*') if path.is_file()} == files
    assert not lines and not learn.checkpoint.epochs and learn.checkpoint.seconds > 0
    cnn = learn.model if plain else learn.model.cnn
    assert weights_digest(cnn) == record(out)['results']['cnn_sha256'] and not learn.model.training
    assert epoch_scores(learn) == record(out)['results']['epochs']
    if not plain: assert len(learn.two_pass.int_losses) == 12


@pytest.mark.slow
@pytest.mark.parametrize('file', ['record.json', 'history.json'])
def test_killed_while_a_part_is_written(tmp_path, finished, monkeypatch, file):
    out, write = tmp_path/'run', experiment.write_record

    def interrupted(record, path):
        if path.name == file: raise KeyboardInterrupt
        write(record, path)
    train(out)
    monkeypatch.setattr(experiment, 'write_record', interrupted)
    with pytest.raises(KeyboardInterrupt): train(out, epochs=4)
    (out/'model'/'model.safetensors').write_bytes(b'cut short')  # what a kill while the model is written may leave
    monkeypatch.setattr(experiment, 'write_record', write)
    train(out, epochs=4)
    assert record(out)['results']['epochs'] == record(finished/'ours')['results']['epochs']
    assert (out/'model'/'model.safetensors').read_bytes() == (finished/'ours'/'model'/'model.safetensors').read_bytes()


@pytest.mark.slow
def test_what_a_folder_refuses(tmp_path, finished):
    other = 'holds a run with other settings '
    for changes, message in [(dict(epochs=3), other + r'\(epochs: 4 there, 3 now\)'),
                             (dict(epochs=5, lr=1e-3), other + r'\(lr: 0.01 there, 0.001 now\)'),
                             (dict(epochs=5, images=1), other + r'\(images: '),
                             (dict(epochs=5, plain=True), other + r'\(plain: False there, True now\)')]:
        with pytest.raises(ValueError, match=message): train(finished/'ours', **changes)
    assert len(record(finished/'ours')['results']['epochs']) == 4
    killed(tmp_path/'run', 1)
    with pytest.raises(ValueError, match='holds a run of 2 epochs that is not finished: finish it with epochs=2, then '
                                         'continue with epochs=5'):
        train(tmp_path/'run', epochs=5)
    train(tmp_path/'run')
    (tmp_path/'run'/'model'/'model.safetensors').write_bytes(b'nonsense')
    with pytest.raises(ValueError, match='model.safetensors is damaged, or of another model'): train(tmp_path/'run')


def test_files_can_be_read_by_those_who_can_read_others(finished):
    usual = stat.S_IMODE((finished/'ours'/'config.json').stat().st_mode)
    files = [path for path in finished.rglob('*') if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {usual}


def test_the_metric_is_found_by_its_name(tmp_path):
    class Additional(Callback):
        def after_create(self): self.learn.metrics = self.learn.metrics + [error_rate]

    train_run(dls(), CONFIG | dict(epochs=1), tmp_path, cbs=[Additional()], say=None)
    results = record(tmp_path)['results']
    assert results['accuracy'] == results['epochs'][0]['accuracy'] == 1 - results['epochs'][0]['error_rate']


@pytest.mark.slow
@pytest.mark.parametrize('plain', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_architecture_that_fastai_cannot_take(tmp_path, plain):
    message = "arch='vit_b_16': fastai cannot cut off its head .*, since it has no pooling layer"
    with pytest.raises(ValueError, match=message): train(tmp_path/'run', arch='vit_b_16', plain=plain)
    assert not (tmp_path/'run').exists()


def test_an_architecture_that_images_are_too_small_for(tmp_path):
    message = "arch='alexnet' cannot be trained on these images: .*Output size is too small; give images of another"
    with pytest.raises(ValueError, match=message): train(tmp_path/'run', arch='alexnet')
    assert not (tmp_path/'run').exists()


@pytest.mark.slow
@pytest.mark.parametrize('plain', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_architecture_that_needs_a_cut_of_our_own(tmp_path, plain):
    train(tmp_path, arch='mnasnet0_5', epochs=1, plain=plain)
    assert len(record(tmp_path)['results']['epochs']) == 1


def test_nothing_is_printed_without_say(tmp_path, capsys):
    train(tmp_path, epochs=1)
    assert capsys.readouterr() == ('', '')


@pytest.mark.slow
def test_a_line_now_and_then_within_long_epochs(tmp_path):
    lines = []
    table = experiment.EpochTable(lines.append, seconds=0)
    train(tmp_path, epochs=1, cbs=[table])
    assert not lines  # `say` is None
    learn = train_run(dls(), CONFIG | dict(seed=1, epochs=1), tmp_path/'other', say=None)
    with learn.no_bar(), learn.added_cbs(experiment.EpochTable(lines.append, seconds=0)): learn.fit(1, 1e-3)
    assert lines[1:4] == ['epoch 1/1: batch 1 of 3', 'epoch 1/1: batch 2 of 3', 'epoch 1/1: batch 3 of 3']
    assert torch.isfinite(torch.tensor(float(lines[4].split()[1])))


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    "A CNN with layer groups, its weights in a file, and a fine-tuned run of them that was left alone"
    folder = tmp_path_factory.mktemp('pretrained')
    torch.save(torchvision.models.squeezenet1_1(num_classes=3).state_dict(), folder/'weights.pt')
    changes = dict(arch='squeezenet1_1', pretrained=str(folder/'weights.pt'), fine_tune=True)
    for plain in (False, True): train(folder/('plain' if plain else 'ours'), plain=plain, **changes)
    return folder, changes


class KillFit(Kill):
    "Interrupt the training in an epoch of the fit of so many epochs."
    def __init__(self, epoch, n_epoch):
        super().__init__(epoch)
        self.fit_of = n_epoch

    def before_batch(self):
        if self.n_epoch == self.fit_of: super().before_batch()


@pytest.mark.slow
@pytest.mark.parametrize('plain', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_fine_tuned_run_killed_in_either_fit_ends_with_the_same_weights(tmp_path, pretrained, plain):
    "`fine_tune` trains the head for one epoch, then all layers"
    folder, changes = pretrained
    out, whole = tmp_path/'run', folder/('plain' if plain else 'ours')
    for epoch, n_epoch in ((0, 1), (0, 2), (1, 2)):
        with pytest.raises(KeyboardInterrupt): train(out, cbs=[KillFit(epoch, n_epoch)], plain=plain, **changes)
    learn = train(out, plain=plain, **changes)
    weights = 'cnn.safetensors' if plain else 'model/model.safetensors'
    assert (out/weights).read_bytes() == (whole/weights).read_bytes()
    assert record(out)['results']['epochs'] == record(whole)['results']['epochs'] == epoch_scores(learn)
    assert len(epoch_scores(learn)) == 2 and all(p.requires_grad for p in learn.model.parameters())
    train(out, plain=plain, **changes, epochs=3)  # one more of all layers
    assert len(record(out)['results']['epochs']) == 3


def test_a_fine_tuned_run_keeps_which_weights_it_began_with(tmp_path, pretrained):
    "By name and content, wherever the file lies"
    folder, changes = pretrained
    config = record(folder/'plain')['config']
    assert (config['pretrained'], len(config['weights']), config['fine_tune']) == ('weights.pt', 16, True)
    assert record(folder/'plain')['results']['cnn_sha256'] == record(folder/'ours')['results']['cnn_sha256']
    files = {path: path.read_bytes() for path in (folder/'plain').rglob('*') if path.is_file()}
    moved = shutil.copy(folder/'weights.pt', tmp_path/'weights.pt')
    train(folder/'plain', plain=True, **changes | dict(pretrained=moved))
    assert {path: path.read_bytes() for path in files} == files
    torch.save(torchvision.models.squeezenet1_1(num_classes=3).state_dict(), moved)
    with pytest.raises(ValueError, match=r'holds a run with other settings \(weights: '):
        train(folder/'plain', plain=True, **changes | dict(pretrained=moved))
    with pytest.raises(FileNotFoundError, match='nowhere.pt: no such weight file'):
        train(tmp_path/'run', plain=True, **changes | dict(pretrained='nowhere.pt'))
    assert not (tmp_path/'run').exists()
