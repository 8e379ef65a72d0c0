"""What a newcomer gets wrong without an error is said, and what is said names what he gave."""
import io
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from PIL import Image
from torch.nn import CrossEntropyLoss, MSELoss
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset
from torchvision import transforms as tv
from torchvision.models import ResNet18_Weights
from typer.testing import CliRunner

import antehoc_nb.show.learner  # also gives Learner explain
from antehoc_nb import cli
from antehoc_nb.core.interpretation_loss import two_pass_step
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.data import photo_digits
from antehoc_nb.train.archs import build_cnn
from antehoc_nb.train.two_pass import KeptWeights, TwoPass, normalisation, resizing

pytestmark = pytest.mark.usefixtures('one_thread')
IMAGES, LABELS = torch.rand(16, 3, 16, 16).cumsum(3) / 16, torch.arange(16) % 3
NORMALISED = (IMAGES - .5) / .2
NORMALISED[0, 0, 0, 0] = -2.5


def says(error, message): return pytest.raises(error, match=f'^{re.escape(message)}$')


def warns(message): return pytest.warns(UserWarning, match=f'^{re.escape(message)}$')


def learner(cnn, images=IMAGES, labels=LABELS, valid=None, **kwargs):
    "A learner with `TwoPass` of plain loaders"
    train, valid = TensorDataset(images, labels), TensorDataset(images if valid is None else valid, labels)
    kwargs = dict(loss_func=F.cross_entropy, cbs=TwoPass(eta=2)) | kwargs
    return Learner(DataLoaders(DataLoader(train, 4), DataLoader(valid, 4)), cnn(), **kwargs)


def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn


SEEM = (f'the images go from {NORMALISED.min():.2f} to {NORMALISED.max():.2f}, so they seem to be normalised, but the '
        'model has no mean and std, without which "black" is grey and pixels are clipped; give ')


def test_normalised_images_without_mean_and_std(cnn):
    own = 'AntehocModel(cnn, mean=[...], std=[...]), or TwoPass(mean=[...], std=[...])'
    with warns(f'sample: {SEEM}{own}'): AntehocModel(cnn(), NORMALISED)
    with warns(f'two_pass_step: {SEEM}{own}'): two_pass_step(AntehocModel(cnn()), NORMALISED)


@pytest.mark.filterwarnings('ignore:save_pretrained')
def test_learners_of_normalised_images(cnn, photo, tmp_path):
    learn = learner(cnn, NORMALISED, cbs=[])
    learn.add_cb(TwoPass(eta=2))
    give = r"seem to be normalised.* or TwoPass\(mean=\[...\], std=\[...\]\)$"
    with pytest.warns(UserWarning, match=give): fit(learn)
    learn.model.save_pretrained(tmp_path/'model')
    model = AntehocModel.from_pretrained(tmp_path/'model', cnn=cnn())
    message = (r'explain: the CNN was made for images that go from -2\.50 to \d\.\d\d, but the model has no mean and '
               r'std, so that those from files reach it as pixels from 0 to 1: predictions and maps can be wrong; '
               r'give AntehocModel\(cnn, mean=\[...\], std=\[...\]\), or TwoPass\(mean=\[...\], std=\[...\]\)$')
    with pytest.warns(UserWarning, match=message): model.explain(photo(tmp_path/'a.png'))


@pytest.mark.filterwarnings('error:.*(seem to be normalised|was made for)')
def test_images_that_are_right_are_not_warned_of(cnn, photo, tmp_path):
    AntehocModel(cnn(), torch.randn(2, 3, 16, 16))  # noise, to find the layers
    AntehocModel(cnn(), NORMALISED, mean=[.5] * 3, std=[.2] * 3)
    given = learner(cnn, NORMALISED, cbs=TwoPass(eta=2, mean=[.5] * 3, std=[.2] * 3))
    for learn in (learner(cnn), given): fit(learn).model.explain(photo(tmp_path/'a.png'))


def test_a_sample_from_0_to_255(cnn):
    message = ('sample: these look like pixels from 0 to 255 (the highest is 255); divide them by 255 and normalise; '
               'or, if the CNN is meant to get them so, make the model with mean=[0, 0, 0], std=[1/255, 1/255, 1/255]')
    x = 255 * IMAGES / IMAGES.max()
    with says(ValueError, message): AntehocModel(cnn(), x)
    AntehocModel(cnn(), x, mean=[0] * 3, std=[1 / 255] * 3)


class Pictures(Dataset):
    def __init__(self, transform): self.transform = transform

    def __len__(self): return 4

    def __getitem__(self, i): return self.transform(Image.new('RGB', (40, 30))), i % 2


STATS, MIDDLE = ([.1, .2, .3], [.4, .5, .6]), dict(resize='crop', crop_pct=.875)
INNER = tv.Compose([tv.ToTensor(), tv.Normalize(*STATS)])


@pytest.mark.parametrize('transform, stats, framing', [
    (tv.Compose([tv.Resize(16), tv.CenterCrop(14), tv.Compose([INNER])]), STATS, MIDDLE),
    (torch.nn.Sequential(tv.Resize(16), tv.CenterCrop(14), tv.Normalize(*STATS)), STATS, MIDDLE),
    (ResNet18_Weights.DEFAULT.transforms(), ([.485, .456, .406], [.229, .224, .225]), MIDDLE),
    (tv.Compose([ResNet18_Weights.DEFAULT.transforms(resize_size=232)]), ([.485, .456, .406], [.229, .224, .225]),
     dict(resize='crop', crop_pct=.965517))])
def test_transforms_inside_others(transform, stats, framing):
    for dataset in (Pictures(transform), ConcatDataset([Pictures(transform)] * 2)):
        dls = DataLoaders(DataLoader(dataset, 2), DataLoader(dataset, 2))
        for found, values in zip(normalisation(dls), stats): assert found == pytest.approx(values)
        assert resizing(dls) == framing


def holed(i):
    x = IMAGES.clone()
    x[i, 0, 5, 5] = torch.nan
    return x


def test_nan_in_validation_images_alone(cnn, capsys):
    learn = learner(cnn, valid=holed(6))
    with learn.no_bar(): learn.fit(2, 1e-3)
    assert capsys.readouterr().out.splitlines()[-1] == (
        'TwoPass: image 6 of the validation set has NaN or infinite pixels; look at its file, and at what is done to '
        'it. The maps could not be measured, and the last weight network is kept.')
    assert learn.two_pass.best is None


@pytest.mark.parametrize('images, labels, message', [
    (holed(9), LABELS, ', batch 2 of epoch 0: image 1 of the batch has NaN or infinite pixels; look at its file, and '
                       'at what is done to it'),
    (torch.cat([IMAGES[:8], IMAGES[8:] * 255]), LABELS,
     ', batch 2 of epoch 0: these look like pixels from 0 to 255 (the highest is {}); divide them by 255 and '
     'normalise; or, if the CNN is meant to get them so, make the model with mean=[0, 0, 0], std=[1/255, 1/255, '
     '1/255]'),
    (IMAGES, (LABELS / 1.).masked_fill(torch.arange(16) == 9, torch.nan),
     ', batch 2 of epoch 0: the label of image 1 of the batch is NaN or infinite')])
def test_what_cannot_be_right_in_a_later_batch(cnn, images, labels, message):
    loss = F.cross_entropy if labels is LABELS else lambda out, y: F.mse_loss(out[:, 0], y)
    highest = f'{images[8:12].max():.0f}'
    with pytest.raises(ValueError) as caught: fit(learner(cnn, images, labels, IMAGES, loss_func=loss))
    assert str(caught.value).splitlines()[-1] == f'\tTwoPass{message.format(highest)}'


@pytest.fixture
def damaged(photo, tmp_path, monkeypatch):
    "A folder with a whole file, one that is cut short and an empty one"
    monkeypatch.chdir(tmp_path)
    photo(tmp_path/'i.jpg')
    Path('cut.jpg').write_bytes(Path('i.jpg').read_bytes()[:-80])
    Path('empty.jpg').write_bytes(b'')
    Path('text.jpg').write_text('hello')


@pytest.mark.parametrize('images, message', [
    (lambda: ['i.jpg', 'cut.jpg'], r'could not read cut\.jpg \(image file is truncated \(\d+ bytes not processed\)\)'),
    (lambda: [Image.open('i.jpg'), Image.open('cut.jpg')], r'could not read .*cut\.jpg \(image file is truncated .*\)'),
    (lambda: ['i.jpg', Path('empty.jpg')], r'could not read empty\.jpg \(the file is empty\)'),
    (lambda: 'text.jpg', r'could not read text\.jpg \(not an image, or damaged\)'),
    (lambda: b'', r'could not read the image \(the file is empty\)'),
    (lambda: [b'no', Path('i.jpg').read_bytes()], r'could not read image 0 of 2 \(not an image, or damaged\)'),
    (lambda: open('empty.jpg', 'rb'), r'could not read empty\.jpg \(the file is empty\)'),
    (lambda: io.BytesIO(b'hello'), r'could not read the image \(not an image, or damaged\)'),
    (lambda: ['i.jpg', 'none.jpg'], r".*No such file or directory: '.*none\.jpg'")])
def test_damaged_files_are_named(cnn, damaged, images, message):
    model = AntehocModel(cnn(), meta=dict(size=16))
    with pytest.raises(OSError, match=f'^{message}$'): model.explain(images())


def test_one_hot_labels(cnn):
    learn = fit(learner(cnn, labels=F.one_hot(LABELS, 3).float(), loss_func=CrossEntropyLoss()))
    assert learn.model.class_specific and learn.model.task == 'single-label' and learn.two_pass.int_losses
    assert learn.model.explain(IMAGES[:2], target=1).target.tolist() == [1, 1]
    of_numbers = learner(cnn, labels=F.one_hot(LABELS, 3).float(), loss_func=MSELoss())  # a regression
    assert not of_numbers.model.class_specific


def test_loaders_and_data_sets_to_explain(cnn):
    learn = learner(cnn)
    assert len(learn.explain(learn.dls, n=3)) == 3
    batch = ('explain: this is a list of batches, or a batch of images and labels; give one batch of images alone: '
             'batch[0]')
    for explain in (learn.explain, learn.model.explain):
        with says(ValueError, batch): explain(next(iter(learn.dls.valid)))
    message = ('items: a TensorDataset is a data set; give its DataLoader, such as learn.dls.valid, or the numbers of '
               'validation images, such as [0, 1, 2]')
    with says(TypeError, message): learn.explain(learn.dls.valid.dataset)


def test_the_line_of_fine_tune_is_printed_once_and_advises_no_pretrained_weights(cnn, capsys):
    def split(net): return [list(net[:2].parameters()), list(net[2:].parameters())]
    learn = learner(cnn, splitter=split)
    with learn.no_bar(): learn.fine_tune(1, 0.)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('TwoPass')]
    assert len(said) == 1 and said[0].endswith('Train the CNN longer, or with smaller batches.')
    learn.two_pass.best = KeptWeights('untrained', 20., 20., 16)
    assert learn.two_pass._no_help_line().endswith(
        'Try more epochs, or a CNN that is trained already (TwoPass(train_cnn=False) after its training; in a shell '
        '--plain, then --weights with --frozen).')


@pytest.mark.parametrize('threshold', ['a', None, 0, torch.rand(2)])
def test_thresholds(cnn, threshold):
    with says(ValueError, f'threshold={threshold!r} must lie in (0,1]'):
        AntehocModel(cnn()).explain(IMAGES[:1], threshold=threshold)


def antehoc(*args, code=1):
    result = CliRunner().invoke(cli.app, list(map(str, args)))
    assert result.exit_code == code, result.output
    return result.output.strip()


BEFORE = 'antehoc train --plain trains one, and writes it to cnn.safetensors in its folder'


@pytest.mark.parametrize('options, message', [
    (('--arch', 'vit'), '--arch vit: fastai cannot cut off the head of a vision transformer and put another in its '
                        "place; use a CNN such as 'resnet18', 'convnext_tiny' or 'efficientnet_b0'"),
    (('--frozen',), f'--frozen: give the trained CNN as --weights; {BEFORE}'),
    (('--frozen', '--plain', '--weights', 'w.pt'),
     '--frozen and --plain: nothing would be trained; give one of the two'),
    (('--frozen', '--arch', 'small_cnn', '--weights', 'w.pt'), f'--frozen: w.pt has no head for 10 classes; {BEFORE}')])
def test_options_of_the_command_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(photo_digits, 'photo_digits_dls', lambda *a, **k: small_digits)
    small_digits = PhotoDigitsDls()
    torch.save(build_cnn('small_cnn', 2).state_dict(), 'w.pt')
    assert antehoc('train', 'photo-digits', *options) == f'antehoc: error: {message}'


class PhotoDigitsDls:
    bs, vocab, train_ds = 8, range(10), range(8)


def test_warnings_of_a_command_are_plain_lines(capsys):
    place = 'cli.py', 271
    with cli._in_one_line(cli._Output()):
        said = warnings.formatwarning(UserWarning("path='p': nothing is in the folder empty"), UserWarning, *place)
        assert said == 'antehoc: warning: p: nothing is in the folder empty\n'
        assert 'cli.py:271: FutureWarning: old' in warnings.formatwarning('old', FutureWarning, *place)
    assert 'cli.py:271: UserWarning: mine' in warnings.formatwarning('mine', UserWarning, *place)


@pytest.mark.filterwarnings('error')
def test_no_warning_of_a_network_by_name(): build_cnn('swin_t', 2)


@pytest.mark.parametrize('valid, log, scale', [(90., None, 'log'), (10., None, 'linear'), (90., False, 'linear')])
def test_a_task_loss_of_a_wide_range_has_a_logarithmic_axis(valid, log, scale):
    recorder = SimpleNamespace(losses=[2., 1.], metric_names=['epoch', 'valid_loss'], iters=[2], values=[[valid]])
    learn = SimpleNamespace(recorder=recorder, two_pass=SimpleNamespace(int_losses=[1., .9]))
    axs = antehoc_nb.show.learner.plot_losses(learn, log=log)
    assert [ax.get_yscale() for ax in axs] == [scale, 'linear']
