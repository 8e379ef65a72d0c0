"""An image from a file is shown to the CNN as in validation; places are told in pixels of the file."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.transforms as tv
from fastai.learner import Learner
from fastai.vision.all import (
    CropPad,
    DataLoaders,
    ImageDataLoaders,
    RandomCrop,
    RandomResizedCrop,
    RandomResizedCropGPU,
    Resize,
    aug_transforms,
    resnet18,
    vision_learner,
)
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from antehoc_nb.core.export import load_exported
from antehoc_nb.core.model import AntehocModel, Framing
from antehoc_nb.core.utils import plain_tensor
from antehoc_nb.data.photographs import sample_photographs
from antehoc_nb.show.explain_files import explain_files
from antehoc_nb.show.explain_many import explain_many, read_explained
from antehoc_nb.show.plots import concept_regions
from antehoc_nb.show.report import energy_off_object
from antehoc_nb.train.archs import build_cnn
from antehoc_nb.train.two_pass import TwoPass, resizing

pytestmark = pytest.mark.usefixtures('one_thread')
MIDDLE = dict(resize='crop', crop_pct=1.)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Photographs of two classes, lying and upright"
    root = tmp_path_factory.mktemp('photographs')
    for i, photo in enumerate(sample_photographs()):
        for turn in (0, 90):
            file = root/'ab'[i % 2]/f'{i}_{turn}.png'
            file.parent.mkdir(exist_ok=True)
            photo.image.rotate(turn, expand=True).resize((300, 180) if turn == 0 else (180, 300)).save(file)
    return root


def learner_of(folder, item_tfms, batch_tfms=None):
    dls = ImageDataLoaders.from_folder(folder, valid_pct=.5, seed=1, bs=4, item_tfms=item_tfms, batch_tfms=batch_tfms)
    torch.manual_seed(0)
    return vision_learner(dls, resnet18, pretrained=False, cbs=TwoPass(keep_best=False))


def seen_in_validation(dls, files): return torch.cat([plain_tensor(batch[0]) for batch in dls.test_dl(files)])


@pytest.mark.parametrize('item_tfms, batch_tfms, facts', [
    (Resize(64), None, MIDDLE),
    (Resize(64, method='squish'), None, {}),
    (Resize((48, 96)), None, MIDDLE),
    (RandomResizedCrop(64, min_scale=.5), None, dict(resize='squish', crop_pct=.8)),
    (Resize(128), aug_transforms(size=64), MIDDLE),
    (Resize(128), [RandomResizedCropGPU(64, valid_scale=.8)], dict(resize='crop', crop_pct=.8)),
    ([Resize(160), RandomCrop(128)], None, dict(resize='crop', crop_pct=.8)),
    ([Resize(160, method='squish'), RandomCrop(128)], None, dict(resize='squish', crop_pct=.8))])
def test_files_are_framed_as_in_validation(folder, item_tfms, batch_tfms, facts):
    learn = learner_of(folder, item_tfms, batch_tfms)
    assert resizing(learn.dls) == facts
    files, model = list(learn.dls.valid_ds.items), learn.model.eval()
    x, wanted = model.image_batch(files)[0], seen_in_validation(learn.dls, files)
    whole = AntehocModel(model.cnn, x[:1], layers=model.layers, class_specific=False, weight_net='mean',
                         mean=model.mean.flatten().tolist(), std=model.std.flatten().tolist(),
                         meta=dict(size=model.meta['size'])).image_batch(files)[0]
    assert (x - wanted).abs().mean() < .02  # fastai resizes in steps
    if facts: assert (whole - wanted).abs().mean() > .1


def test_a_saved_model_predicts_what_the_learner_predicts(folder, tmp_path):
    learn = learner_of(folder, Resize(64))
    files = list(learn.dls.valid_ds.items)
    wanted = learn.get_preds(dl=learn.dls.test_dl(files), reorder=False)[0]
    learn.model.save_pretrained(tmp_path)
    model = AntehocModel.from_pretrained(tmp_path)
    e = model.explain(files)
    torch.testing.assert_close(e.probabilities, wanted, atol=.01, rtol=0)
    assert {photo.size for photo in e.photos} == {(300, 180), (180, 300)}
    for photo, overlay in zip(e.photos, e.overlays(1.)):
        left, top, right, bottom = model.framing.box(*photo.size)
        shown = np.asarray(overlay).astype(int)
        assert overlay.size == photo.size and shown[top:bottom, left:right].any()
        shown[top:bottom, left:right] = shown[0, 0]
        assert (shown == shown[0, 0]).all() and shown[0, 0].max() < 10
    assert model.meta['resize'] == 'crop' and model.framing == Framing((64, 64), 'crop')


def test_progressive_resizing(folder):
    "What is noted is of the last DataLoaders, unless the user has said it"
    learn = learner_of(folder, Resize(48, method='squish'))
    learn.dls = learner_of(folder, RandomResizedCrop(64)).dls
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
    assert learn.model.framing == Framing((64, 64), 'squish', .8)
    said = vision_learner(learn.dls, resnet18, pretrained=False, cbs=TwoPass(keep_best=False, meta=dict(size=[32, 40])))
    said.dls = learner_of(folder, Resize(48)).dls
    with said.no_bar(), said.no_logging(): said.fit(1, 1e-4)
    assert said.model.image_size == (32, 40)


def test_unknown_ways_are_not_silent(folder):
    learn = learner_of(folder, Resize(64, method='pad'))
    assert resizing(learn.dls) == dict(resize='own')
    with pytest.warns(UserWarning, match='explain: in training the images were padded, or cropped'):
        learn.model.explain(list(learn.dls.valid_ds.items)[:1])
    assert resizing(learner_of(folder, [CropPad(64)]).dls) == dict(resize='own')


@pytest.mark.parametrize('steps, facts', [
    ([tv.Resize(80), tv.CenterCrop(64)], dict(resize='crop', crop_pct=.8)),
    ([tv.Resize((80, 80)), tv.CenterCrop(64)], dict(resize='squish', crop_pct=.8)),
    ([tv.Resize((64, 64))], {}),
    ([tv.CenterCrop(64)], dict(resize='own')),
    ([tv.Resize(64), tv.CenterCrop(80)], dict(resize='own'))])
def test_torchvision(folder, steps, facts):
    images = ImageFolder(folder, tv.Compose([*steps, tv.ToTensor(), tv.Normalize([.5] * 3, [.25] * 3)]))
    dls = DataLoaders(*[DataLoader(images, batch_size=4, shuffle=shuffle) for shuffle in (True, False)])
    assert resizing(dls) == facts
    if 'own' in facts.values(): return
    learn = Learner(dls, build_cnn('small_cnn', 2), torch.nn.CrossEntropyLoss(), cbs=TwoPass(keep_best=False))
    files = [file for file, _ in images.samples]
    wanted = torch.stack([image for image, _ in images])
    assert (learn.model.image_batch(files)[0] - wanted).abs().mean() < .1  # in units of .25; resized in steps


def test_tensors_of_the_right_size_are_not_cropped():
    meta = dict(size=32, resize='crop', crop_pct=.5)
    model = AntehocModel(build_cnn('small_cnn', 2), torch.rand(2, 3, 32, 32), meta=meta)
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model.image_batch(x)[0], x / 255)
    file = Image.fromarray(x[0].permute(1, 2, 0).numpy())
    half = x[:1, :, 8:24, 8:24].float() / 255
    torch.testing.assert_close(model.image_batch(file)[0].mean((2, 3)), half.mean((2, 3)), atol=.03, rtol=0)
    assert model.explain(x).framing == Framing((32, 32)) and model.explain(file).framing.crop_pct == .5


@pytest.fixture
def of_middle(folder):
    learn = learner_of(folder, Resize(64))
    return learn.model.eval(), sorted(learn.dls.valid_ds.items)


def boxes_in_whole_images(model, files, threshold=.8):
    "Name of each file -> the boxes of its regions in pixels of the file, from `explain` alone"
    found = {}
    for file in files:
        e = model.explain(file)
        left, top, right, bottom = model.framing.box(*Image.open(file).size)
        scale = np.array([(right - left) / 64, (bottom - top) / 64] * 2)
        regions = concept_regions(e.map, threshold)
        found[file.name] = [np.array(region.box) * scale + [left, top] * 2 for region in regions]
    return found


def test_explain_files(of_middle, tmp_path):
    model, files = of_middle
    explain_files(model, [(file, file.name) for file in files], tmp_path, say=None)
    table = pd.read_csv(tmp_path/'explanations.csv')
    for name, boxes in boxes_in_whole_images(model, files).items():
        rows = table[table.image == name]
        np.testing.assert_allclose(rows[['x0', 'y0', 'x1', 'y1']], boxes, atol=.051)
        with Image.open(tmp_path/rows.overlay.iloc[0]) as overlay: assert sorted(overlay.size) == [180, 300]
        with Image.open(tmp_path/'maps'/Path(rows.overlay.iloc[0]).name) as grey: placed = np.asarray(grey).astype(int)
        left, top, right, bottom = model.framing.box(*placed.shape[::-1])
        assert placed[top:bottom, left:right].any() and placed.sum() == placed[top:bottom, left:right].sum()
    settings = json.loads((tmp_path/'explanations.json').read_text())
    assert settings['resize'] == 'crop'


def test_explain_many(of_middle, folder, tmp_path):
    model, files = of_middle
    explain_many(model, folder, tmp_path/'out', workers=0, say=None)
    explained = read_explained(tmp_path/'out')
    assert explained.framing == model.framing
    row = next(i for i, name in enumerate(explained.images['image']) if name.endswith(files[0].name))
    e = model.explain(files[0])
    small = torch.nn.functional.adaptive_avg_pool2d(e.map, explained.meta['map_size'])[0, 0]
    np.testing.assert_allclose(explained.maps([row])[0], small, atol=.01)
    left, top, right, bottom = model.framing.box(*Image.open(files[0]).size)
    for x0, y0, x1, y1, *_ in json.loads(explained.images.regions[row]):
        assert left <= x0 < x1 <= right and top <= y0 < y1 <= bottom


def test_report_measures_objects_in_the_part_that_is_seen(tmp_path):
    maps = np.zeros((1, 28, 28))
    maps[0, :, :14] = 1 / (28 * 14)  # the left half of what is seen
    table = pd.DataFrame(dict(image=['a/0.png'], width=[300], height=[100]))
    sample = SimpleNamespace(maps=maps, rows=np.array([0]), classes=np.array(['a']))
    box = pd.DataFrame(dict(image=['a/0.png'], x0=[100], y0=[0], x1=[150], y1=[100]))
    masks = tmp_path/'masks'/'a'
    masks.mkdir(parents=True)
    mask = np.zeros((100, 300), 'uint8')
    mask[:, 100:150] = 255
    Image.fromarray(mask).save(masks/'0.png')
    framing = Framing((28, 28), 'crop')
    for given in (dict(boxes=box), dict(masks=tmp_path/'masks')):
        assert energy_off_object(sample, table, framing=framing, **given).energy_off.item() < .01
        assert energy_off_object(sample, table, **given).energy_off.item() > .5


@pytest.mark.parametrize('kind', ['pt2'])
def test_exported_files_frame_alike(of_middle, tmp_path, kind):
    model, files = of_middle
    exported = load_exported(model.export(tmp_path/f'model.{kind}'))
    assert exported.framing == model.framing
    found, e = exported(files[:2]), model.explain(files[:2])
    np.testing.assert_allclose(found.map, e.map, atol=1e-3)
    np.testing.assert_allclose(found.prediction, e.probabilities, atol=1e-4)


@pytest.mark.parametrize('meta, message', [
    (dict(resize='pad'), "meta: resize='pad' is not known; use 'squish' (all of the image), 'crop' (its middle) or "
                         "'own'"),
    (dict(crop_pct=1.5), 'meta: crop_pct=1.5 must be the share of each side that is kept, in (0,1]'),
    (dict(crop_pct=0), 'meta: crop_pct=0 must be the share of each side that is kept, in (0,1]'),
    (dict(crop_pc=.9), "meta: 'crop_pc' is not known; use 'crop_pct'")])
def test_bad_facts(meta, message):
    with pytest.raises(ValueError) as caught: AntehocModel(build_cnn('small_cnn', 2), meta=meta)
    assert str(caught.value) == message
