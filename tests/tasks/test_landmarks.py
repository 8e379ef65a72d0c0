"""Landmarks: data in both layouts, points that follow their image, Grad-CAM of a regression, the run of Figure 4."""
import hashlib
import threading
import zipfile
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import load_learner
from fastai.metrics import AvgMetric
from fastai.torch_core import set_seed
from fastai.vision.core import TensorImage, TensorPoint
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from scipy.spatial import Delaunay
from typer.testing import CliRunner

from antehoc_nb.cli import app
from antehoc_nb.core.attention import minmax
from antehoc_nb.core.geometry import resize
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import plain_tensor, weights_digest
from antehoc_nb.data import landmarks as D
from antehoc_nb.data import landmarks as F
from antehoc_nb.evaluate.explainers import explain_with, regression_cam
from antehoc_nb.tasks import landmarks as L
from antehoc_nb.tasks.experiment import train_run
from antehoc_nb.train.archs import build_cnn
from antehoc_nb.train.learner import antehoc_learner, plain_learner
from antehoc_nb.train.two_pass import TwoPass

pytestmark = pytest.mark.usefixtures('one_thread', 'without_figures')


@pytest.fixture(scope='module')
def lm(): return F.drawn_faces(24, 8, 32)


def face_folder(d, n=8, size=40):
    lm, rows = F.drawn_faces(n - 3, 3, size), []
    for i, (im, p) in enumerate(zip(lm.images, lm.points)):
        Image.fromarray(im).save(d/f'{i}.png')
        xy = {f'{a}{k}': v for k, q in enumerate(p) for a, v in zip('xy', q)}
        rows.append(dict(file=f'{i}.png', split='test' if lm.test[i] else 'train', identity=i) | xy)
    pd.DataFrame(rows).to_csv(d/'landmarks.csv', index=False)
    return lm


def test_drawings_know_left_from_right(lm):
    "The mirrored face is the face that the mirror permutation gives: left of the nose stays left"
    for seed in range(5):
        p = D._face_points(np.random.default_rng(seed))
        np.testing.assert_allclose(p[list(F.FACE68.mirror)] * [-1, 1], p, atol=1e-12)
    assert not np.array_equal(lm.images[0], F.drawn_faces(1, 1, 32, seed=1).images[0])


@given(st.integers(0, 99))
def test_points_follow_their_image(seed):
    "A bright dot on black is found where its point says, whatever the augmentation did"
    torch.manual_seed(seed)
    at = torch.randint(24, 40, (2,))
    x, y = torch.zeros(4, 1, 64, 64), torch.rand(4, 4, 2)
    x[:, :, at[1] - 1:at[1] + 2, at[0] - 1:at[0] + 2] = 1.
    y[:, 2] = (at + .5) / 32 - 1
    t = F.TurnFaces(F.DIGIT4.mirror)
    a, b = (o.as_subclass(torch.Tensor) for o in t((TensorImage(x), TensorPoint(y)), split_idx=0))
    c, w = torch.arange(64) + .5, a[:, 0]
    found = torch.stack([(w.sum(1) * c).sum(1), (w.sum(2) * c).sum(1)], 1) / w.sum((1, 2))[:, None] / 32 - 1
    mirrored = torch.linalg.det(t.mat.as_subclass(torch.Tensor)[:, :, :2]) < 0
    torch.testing.assert_close(torch.where(mirrored[:, None], b[:, 3], b[:, 2]), found, atol=.008, rtol=0)


def test_validation_images_are_left_alone(lm):
    dls = F.landmark_dls(lm, 'nose', 32, 8)
    a, b = (next(iter(dls.valid)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    torch.testing.assert_close((b[1].as_subclass(torch.Tensor) + 1) * 16, torch.from_numpy(lm.points[lm.test]))


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['landmark_cnn', pytest.param('resnet18', marks=pytest.mark.slow), 'timm/resnet10t'])
def test_any_backbone_is_left_as_it_is(lm, arch):
    "Invariant 1 for a regression: the CNN is the one that plain training gives, to the bit"
    digests = []
    for make in (antehoc_learner, plain_learner):
        set_seed(0)
        dls, metric = F.landmark_dls(lm, 'mouth', 32, 8, seed=0), F.nme_metric(F.FACE68, 'mouth')
        learn = make(dls, arch, pretrained=False, metrics=metric)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
        digests.append(weights_digest(getattr(learn.model, 'cnn', learn.model)))
        assert np.isfinite(learn.recorder.values[-1][2])
    assert digests[0] == digests[1]


def test_the_metric_is_the_mean_over_images(lm):
    dls = F.landmark_dls(lm, 'eyes', 32, 5)
    learn = plain_learner(dls, 'landmark_cnn', metrics=F.nme_metric(F.FACE68, 'eyes'))
    with learn.no_bar(): got = learn.validate()[1]
    learn.model.eval()
    with torch.no_grad(): out = torch.cat([learn.model(x.as_subclass(torch.Tensor)) for x, _ in dls.valid])
    found = (out.view(-1, 12, 2).numpy() + 1) * 16
    errors = []
    for points, true in zip(found, lm.points[lm.test]):
        distances = [np.hypot(*(a - b)) for a, b in zip(points, true[36:48])]
        errors.append(np.mean(distances) / np.hypot(*(true[36] - true[45])))
    assert got == pytest.approx(np.mean(errors), rel=1e-4)
    preds, _, decoded = learn.get_preds(with_decoded=True)
    assert decoded.shape == (8, 12, 2) and preds.shape == (8, 24)


def test_regression_cam_against_one_output_at_a_time(lm):
    "The naive reference: a backward pass of the whole CNN per image and output"
    model = AntehocModel(build_cnn('landmark_cnn', 6).eval(), torch.rand(1, 3, 32, 32))
    x = torch.rand(3, 3, 32, 32)
    for layer in (model.layers[-1], model.layers[4]):
        model.zero_grad()
        got, kept = regression_cam(model, x, layer=layer), {}
        assert all(p.grad is None for p in model.parameters()) and not got.requires_grad

        def hook(m, i, o, kept=kept):
            o.retain_grad()
            kept['a'] = o
        h = model.cnn.get_submodule(layer).register_forward_hook(hook)
        for n in range(3):
            total = 0
            for k in range(6):
                model.cnn(x[n:n + 1])[0, k].backward()
                a, g = kept['a'][0].detach(), kept['a'].grad[0]
                total = total + (a * g.mean((1, 2))[:, None, None]).sum(0).abs()
            want = minmax(resize(minmax(total[None, None]), (32, 32), dict(zip(model.layers, model.grids))[layer]))
            torch.testing.assert_close(got[n:n + 1], want, atol=2e-4, rtol=1e-3)
        h.remove()
    with torch.inference_mode(): same = regression_cam(model, x)
    torch.testing.assert_close(same, explain_with('regression-cam', model, x, torch.zeros(3, dtype=torch.long)))
    with pytest.raises(ValueError, match=r'needs a CNN that returns \(B,K\), got \(3, 2, 30, 30\)'):
        regression_cam(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU()), x, layer='1')


@given(st.integers(0, 999))
def test_regions_against_a_triangulation(seed):
    "A pixel well inside the convex hull is in the region, one far outside is not"
    rng = np.random.default_rng(seed)
    p = rng.uniform(8, 56, (1, 6, 2))
    s = F.Scheme(dict(a=range(6)), tuple(range(6)), (0, 1))
    got = L.group_regions(p, s, 64, widen=0)['a'][0].numpy()
    y, x = np.mgrid[:64, :64] + .5
    inside = Delaunay(p[0]).find_simplex(np.c_[x.ravel(), y.ravel()]).reshape(64, 64) >= 0
    border = sum(np.abs(np.roll(inside, 1, axis) ^ inside).sum() for axis in (0, 1))
    assert (got != inside).sum() <= 2.5 * border
    wide = L.group_regions(p, s, 64, widen=.3)['a'][0].numpy()
    assert (wide | ~got).all() and wide.sum() > got.sum()


def test_groups_are_regions_of_their_own(lm):
    r = L.group_regions(lm.points, F.FACE68, 32)
    assert set(r) == set(F.FACE68.groups) and all(m.flatten(1).any(1).all() for m in r.values())
    assert not (r['eyes'] & r['mouth']).any()
    inner = r['jaw'][:, 12:16, 14:18].float().mean()  # a line, not the whole face
    assert inner < .2


def test_scores_by_hand(lm):
    model = AntehocModel(build_cnn('landmark_cnn', 18).eval(), torch.rand(1, 3, 32, 32))
    x, points = torch.rand(4, 3, 32, 32), lm.points[:4]
    r = L.group_regions(points, F.FACE68, 32)
    s = L.score_maps(model, x, r['nose'].float()[:, None], points, F.FACE68, 'nose', bs=3)
    assert s['own'] == s['energy']['nose'] == s['pointing'] == 1 and s['energy']['jaw'] < .1
    assert s['density']['nose'] == pytest.approx((1 / r['nose'].float().mean((1, 2))).mean().item(), rel=1e-5)
    model_all = AntehocModel(build_cnn('landmark_cnn', 136).eval(), torch.rand(1, 3, 32, 32))
    ones = L.score_maps(model_all, x, torch.ones(4, 1, 32, 32), points, F.FACE68, 'all')
    assert all(v == pytest.approx(1, rel=1e-5) for v in ones['density'].values()) and ones['area'] == 1
    true = torch.from_numpy(points) / 16 - 1
    with torch.no_grad(): want = F.nme(model(x), true, F.FACE68.groups['nose'], (36, 45)).mean().item()
    nose = L.score_maps(model, x, torch.ones(4, 1, 32, 32), points, F.FACE68, 'nose')
    where = {g: torch.zeros(4, 32, 32, dtype=torch.bool) for g in r} | dict(nose=~r['nose'])
    assert L.score_maps(model, x, r['nose'].float()[:, None], points, F.FACE68, 'nose', regions=where)['own'] == 0
    assert nose['nme'] == pytest.approx(want, rel=1e-4) == nose['nme_blur'] and nose['nme_top20'] != nose['nme']


def test_aflw2000_is_downloaded_checked_and_read(tmp_path, monkeypatch):
    "The real download code, on a server of this machine"
    drawn = F.drawn_faces(3, 1, 40)
    with zipfile.ZipFile(tmp_path/'AFLW2000-3D.zip', 'w') as z:
        for i, (im, p) in enumerate(zip(drawn.images, drawn.points)):
            Image.fromarray(im).save(tmp_path/'i.jpg', quality=95)
            savemat(tmp_path/'i.mat', dict(pt3d_68=np.c_[p, np.ones(68)].T, pt2d=np.zeros((2, 21))))
            for e in ('jpg', 'mat'): z.write(tmp_path/f'i.{e}', f'AFLW2000/image{i:05d}.{e}')
        z.writestr('AFLW2000/Code/readme.txt', 'x')
    body = (tmp_path/'AFLW2000-3D.zip').read_bytes()
    srv = HTTPServer(('127.0.0.1', 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    monkeypatch.setenv('ANTEHOC_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(F, 'AFLW2000_URL', f'http://127.0.0.1:{srv.server_port}/AFLW2000-3D.zip')
    try:
        with pytest.raises(ValueError, match='corrupt and was removed'): F.aflw2000()
        monkeypatch.setattr(F, 'AFLW2000_SHA256', hashlib.sha256(body).hexdigest())
        lm = F.aflw2000(outside='keep')
    finally:
        srv.shutdown()
        srv.server_close()
    assert len(lm) == 4 and lm.test.sum() == 1
    np.testing.assert_allclose(lm.points, drawn.points, rtol=1e-5)
    assert np.array_equal(F.aflw2000(outside='keep').test, lm.test)  # from the cache now, the same split


def test_bad_faces_are_named(tmp_path):
    lm = face_folder(tmp_path)
    csv, good = tmp_path/'landmarks.csv', pd.read_csv(tmp_path/'landmarks.csv')
    assert len(F.face_table(tmp_path, 'keep')) == 8

    def says(text, t, outside='keep', error=ValueError):
        t.to_csv(csv, index=False)
        with pytest.raises(error, match=text): F.face_table(tmp_path, outside)
    says('1 of 8 images have no points .NaN., the first is 5.png', good.assign(x0=[*good.x0[:5], None, *good.x0[6:]]))
    says('1 people are in training and in testing', good.assign(identity=0))
    one_place = good.copy()
    one_place.loc[4, ['x36', 'y36', 'x45', 'y45']] = 9
    other_splits = good.assign(split=['Test', 'valid', *good.split[2:]])
    says("split must be 'train' or 'test', not .'Test', 'valid'.", other_splits)
    says('1 of 8 images have points 36 and 45 in one place, the first is 4.png', one_place)
    says('1 images are listed twice', good.assign(file=['1.png', *good.file[1:]]))
    says("lacks the columns .'split'", good.drop(columns='split'))
    says('test: 0 of 8 images', good.assign(split='train'))
    moved = good.assign(x0=[1, 1, 41, *[1] * 5])
    says('images have points outside, the first is .*; outside=.drop. leaves them out', moved, 'error')
    moved.to_csv(csv, index=False)
    inside = ((lm.points >= 0) & (lm.points <= 40)).all((1, 2))
    assert len(F.face_table(tmp_path, 'drop')) == inside[[0, 1, 3, 4, 5, 6, 7]].sum()
    (tmp_path/'3.png').write_bytes(b'no image')
    says('3.png: cannot be read', good)
    with pytest.raises(FileNotFoundError, match='no such folder or archive'): F.face_table(tmp_path/'nowhere')
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='neither landmarks.csv nor landmarks.npz'):
        F.face_table(tmp_path/'empty')
    with pytest.raises(ValueError, match='no image.*jpg found'): F.aflw2000(tmp_path/'empty')
    with pytest.raises(ValueError, match=r'points: \(8, 68, 2\) needed, got \(8, 4, 2\)'):
        F.Landmarks(lm.images, lm.points[:, :4], lm.test, F.FACE68)
    with pytest.raises(ValueError, match="outside='ignore': choose"):
        F.Landmarks(lm.images, lm.points, lm.test, F.FACE68, 'ignore')
    with pytest.raises(ValueError, match="unknown group 'moth': did you mean 'mouth'"): F.landmark_dls(lm, 'moth')


def test_broken_mat_files_are_named(tmp_path):
    Image.new('RGB', (20, 20)).save(tmp_path/'image00001.jpg')
    for content, text in ((dict(pt2d=1), "image00001.mat: has no 'pt3d_68', only .'pt2d'."),
                          (dict(pt3d_68=np.zeros((3, 21))), r"shape \(3, 21\), not \(3,68\)")):
        savemat(tmp_path/'image00001.mat', content)
        with pytest.raises(ValueError, match=text): F.aflw2000(tmp_path)
    (tmp_path/'image00001.mat').write_bytes(b'MATLAB, perhaps')
    with pytest.raises(ValueError, match='image00001.mat: not a .mat file, or damaged'): F.aflw2000(tmp_path)


def antehoc(*args, code=0):
    r = CliRunner().invoke(app, list(map(str, args)))
    assert r.exit_code == code, r.output
    return r.output


@pytest.mark.slow
def test_figure4_from_one_command(tmp_path, monkeypatch):
    "The record and the figure; pictures of real faces stay out of the results"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'data').mkdir()
    face_folder(tmp_path/'data', 40)
    args = 'reproduce', 'figure4', '--dataset', 'faces68', '--profile', 'smoke', '--data', tmp_path/'data'
    assert 'wrote runs/figure4/faces68-smoke.png' in antehoc(*args)
    assert (tmp_path/'runs'/'figure4'/'faces68-smoke.png').exists() and not list((tmp_path/'results').rglob('*.png'))
    rec = L.read_landmarks('faces68', 'smoke')
    assert rec['command'] == 'antehoc reproduce figure4 --dataset faces68 --profile smoke'
    for o in rec['results']['detectors'].values():
        assert o['cnn_sha256'] == o['plain_sha256'] and o['nme'] == o['nme_plain'] and len(o['layers']) == 8
        assert o['maps']['gaussian of the same area']['area'] == pytest.approx(o['maps']['ante-hoc']['area'], abs=.01)
    t = L.detector_table(rec)
    assert t.loc[('nose', 'ante-hoc'), 'margin'] == 0 and (t.xs('ones', level=1).ratio == 1).all()
    c = L.confusion(rec)
    assert list(c.index) == ['nose', 'eyes', 'mouth', 'all'] and list(c) == ['nose', 'eyes', 'mouth', 'brows', 'jaw']
    assert not L.confusion(rec, 'grad-cam, best layer').equals(L.confusion(rec, 'ones'))
    with pytest.raises(ValueError, match="unknown explainer 'gradcam'"): L.confusion(rec, 'gradcam')
    with pytest.raises(ValueError, match="unknown what 'mass'"): L.confusion(rec, what='mass')
    blur, black = (L.one_part(rec, fill) for fill in ('blur', 'black'))
    assert list(blur.index) == list(c.index) and list(blur) == list(c)
    assert (blur > 0).all(None) and not blur.equals(black)
    with pytest.raises(ValueError, match="unknown fill 'white'"): L.one_part(rec, 'white')
    where = tmp_path/'runs'/'landmarks'/'faces68-smoke'/'nose'/'ante-hoc'/'model'
    lm = L.load_landmarks(L.landmark_experiment.config('faces68', 'smoke'), tmp_path/'data').resized(32)
    model = AntehocModel.from_pretrained(where)
    dls, points = F.landmark_dls(lm, 'nose', 32, 8), lm.points[lm.test]
    x, eyes = L._pictures(dls, dls.valid_ds, range(len(points))), L.group_regions(points, lm.scheme, 32)['eyes']
    true = torch.from_numpy(points).float() / 16 - 1

    def error(o): return F.nme(plain_tensor(o), true, lm.scheme.points('nose'), lm.scheme.ends)
    with torch.no_grad():
        part = error(model(model.mask(x, eyes[:, None].float())))[eyes.any((1, 2))].mean()
        whole = error(model(x)).mean()
    assert black.loc['nose', 'eyes'] == pytest.approx((part / whole).item(), rel=1e-4)
    assert ('mouth', 'ante-hoc, default settings') in t.index and rec['results']['n_dropped'] == 0
    assert "unknown dataset 'cifar10'" in antehoc('reproduce', 'figure4', '--dataset', 'cifar10', code=1)
    with pytest.raises(FileNotFoundError, match='run `antehoc reproduce figure4 --dataset drawn-faces --profile smoke'):
        L.figure4('drawn-faces', 'smoke')
    with pytest.raises(FileNotFoundError, match='antehoc reproduce figure4 --dataset faces68 --profile cpu'):
        L.read_landmarks('faces68', results=tmp_path)


def test_a_detector_is_a_fastai_learner(lm, tmp_path):
    "It is exported and loaded, shows its results, and names the images with the largest loss"
    two_pass = TwoPass(mask='dimmed', fill='blur')
    learn = plain_learner(F.landmark_dls(lm, 'eyes', 32, 8), 'landmark_cnn', cbs=two_pass, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    learn.show_results()
    learn.dls.show_batch()
    preds, targets, losses = learn.get_preds(with_loss=True)
    want = (preds - targets.as_subclass(torch.Tensor)[:, 36:48].flatten(1)).pow(2).mean(1)
    torch.testing.assert_close(losses.as_subclass(torch.Tensor), want)
    learn.export('l.pkl')
    with learn.no_bar(): before, after = (o.predict(lm.images[-1])[0] for o in (learn, load_learner(tmp_path/'l.pkl')))
    assert before.shape == (12, 2) and torch.equal(before, after)


def test_files_in_every_state(tmp_path):
    "Rotated by EXIF, named by strings, subsampled, in an .npz"
    im, points = Image.new('RGB', (40, 20)), np.full((3, 4, 2), 5.) + np.arange(4)[:, None]
    exif = im.getexif()
    exif[274] = 6
    im.save(tmp_path/'turned.jpg', exif=exif)
    im.save(tmp_path/'plain.jpg')
    files = [str(tmp_path/f) for f in ('turned.jpg', 'plain.jpg', 'plain.jpg')]
    lm = F.Landmarks(files, points, [True, False, False], F.DIGIT4)
    assert lm.sizes.tolist() == [[20, 40], [40, 20], [40, 20]] and F.OpenImage()(lm.images[0]).size == (20, 40)
    dls = F.landmark_dls(lm, 'top', 32, aug=False)
    found = (dls.valid.one_batch()[1].as_subclass(torch.Tensor) + 1) * 16
    torch.testing.assert_close(found, torch.from_numpy(lm.at(32)[:1]))
    assert len(lm.subsample(5)) == 3 and len(lm.subsample(1)) == 2 and lm.test.tolist() == [True, False]
    with pytest.raises(ValueError, match='landmarks.npz: lacks .*split'):
        np.savez(tmp_path/'landmarks.npz', name=['plain.jpg'], xy=np.zeros((1, 68, 2)))
        F.face_table(tmp_path)
    (tmp_path/'landmarks.npz').write_bytes(b'PK, perhaps')
    with pytest.raises(ValueError, match='landmarks.npz: not an .npz file of plain arrays, or damaged'):
        F.face_table(tmp_path)


def test_images_are_read_once_as_they_would_be_every_time(tmp_path):
    "The same pixels and points reach the CNN; a file that is cut short is named, and nothing is changed by half."
    face_folder(tmp_path)
    a, b = F.face_table(tmp_path), F.face_table(tmp_path).resized(32)
    assert all(o.shape == (32, 32, 3) and o.dtype == np.uint8 for o in b.images)
    assert (b.sizes == 32).all() and np.array_equal(b.points, a.at(32))
    for x, y in zip(*(F.landmark_dls(o, 'eyes', 32, 2, aug=False).valid for o in (a, b))):
        assert torch.equal(x[0], y[0])
        torch.testing.assert_close(x[1], y[1], atol=1e-6, rtol=1e-6)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)).save(tmp_path/'cut.jpg')
    (tmp_path/'cut.jpg').write_bytes((tmp_path/'cut.jpg').read_bytes()[:900])
    cut = F.Landmarks([b.images[0], tmp_path/'cut.jpg'], b.points[:2], [False, True], F.FACE68)
    before = cut.points.copy()
    with pytest.raises(ValueError, match='cut.jpg: cannot be read .*; repair or delete it'): cut.resized(16)
    assert np.array_equal(cut.points, before) and cut.images[1] == tmp_path/'cut.jpg'


def test_scores_leave_the_model_alone(lm):
    model = AntehocModel(build_cnn('landmark_cnn', 18), torch.rand(1, 3, 32, 32)).train()
    before = weights_digest(model.cnn)
    L.score_maps(model, torch.rand(4, 3, 32, 32), torch.rand(4, 1, 32, 32), lm.points[:4], F.FACE68, 'nose')
    assert weights_digest(model.cnn) == before and model.cnn.training
    with pytest.raises(ValueError, match="unknown group 'noose'"):
        L.score_maps(model, torch.rand(4, 3, 32, 32), torch.rand(4, 1, 32, 32), lm.points[:4], F.FACE68, 'noose')
    with pytest.raises(ValueError, match='none of the 4 images shows nose'):
        L.score_maps(model, torch.rand(4, 3, 32, 32), torch.rand(4, 1, 32, 32), lm.points[:4] + 90, F.FACE68, 'nose')


def test_a_run_keeps_to_deterministic_algorithms(lm, tmp_path, monkeypatch):
    "While it trains, and no longer; whether cuDNN is used at all, and with TF32, stays as it was."
    flags = ('enabled', 'allow_tf32', 'deterministic', 'benchmark')
    seen, was = [], torch.backends.cudnn.deterministic
    def algorithms(pred, target):
        seen.append(tuple(getattr(torch.backends.cudnn, o) for o in flags))
        return pred.mean()
    for o in flags[:2]: monkeypatch.setattr(torch.backends.cudnn, o, False)
    config = dict(arch='landmark_cnn', epochs=1, lr=1e-3, seed=0, plain=True)
    train_run(F.landmark_dls(lm, 'eyes', 32, 8), config, tmp_path, metric=AvgMetric(algorithms))
    assert set(seen) == {(False, False, True, False)} and torch.backends.cudnn.deterministic == was
