"""A model as one graph: what it gives in every compiler, exporter and runtime, and what it refuses."""
import copy
import json
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

import antehoc_nb
from antehoc_nb.core import geometry
from antehoc_nb.core.export import MapModule, load_exported
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.train.archs import small_cnn

pytestmark = pytest.mark.usefixtures('one_thread')
SIZE = 64
CNNS = dict(small_cnn=lambda: small_cnn(4), resnet18=lambda: torchvision.models.resnet18(num_classes=4),
            convnext=lambda: timm.create_model('convnext_atto', num_classes=4, depths=(1, 1, 2, 1),
                                               dims=(16, 24, 32, 48)))


def with_weights(model):
    "As if the weight network had been trained: an untrained one gives the same map for every class"
    torch.manual_seed(1)
    for parameter in model.weight_net.parameters(): nn.init.normal_(parameter, std=.2)
    return model.eval()


def make_model(name='small_cnn', class_specific=True, eta=2, **kwargs):
    torch.manual_seed(0)
    settings = dict(mean=[.5, .4, .3], std=[.25, .2, .3], meta=dict(vocab=['ant', 'bee', 'cat', 'dog'], size=SIZE))
    return with_weights(AntehocModel(CNNS[name](), torch.randn(2, 3, SIZE, SIZE), eta=eta,
                                     class_specific=class_specific, **settings | kwargs))


FAST = ('small_cnn', True),
SLOW = ('small_cnn', False), ('resnet18', False), ('resnet18', True), ('convnext', False), ('convnext', True)


@cache
def make_pair(name, class_specific):
    "A model, and its graph, which takes seconds to record; do not change them"
    model = make_model(name, class_specific)
    return model, MapModule(model)


@pytest.fixture(scope='module', params=[*FAST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)],
                ids=lambda kind: f'{kind[0]}-{"specific" if kind[1] else "agnostic"}')
def pair(request): return make_pair(*request.param)


def batch(n=4):
    torch.manual_seed(2)
    return (torch.rand(n, 3, SIZE, SIZE) - .4) / .25


def arguments(model, n=4):
    return (batch(n), torch.tensor([3, 0, -1, 2])[:n]) if model.class_specific else (batch(n),)


def explained(model, x, target=None):
    "What `explain` gives, with -1 for what is predicted"
    if target is not None:
        with torch.no_grad(): target = torch.where(target < 0, model(x).argmax(1), target)
    explanation = model.explain(x, target=target)
    return explanation.pred, explanation.map, explanation.weights


def assert_same(found, expected, atol=2e-5):
    for one, other in zip(found, expected, strict=True): torch.testing.assert_close(one, other, atol=atol, rtol=1e-4)


def test_the_graph_gives_what_explain_gives(pair):
    model, graph = pair
    for n in (4, 1):
        assert_same(graph(*arguments(model, n)), explained(model, *arguments(model, n)))
    if not model.class_specific: return
    maps = [graph(batch(), torch.full((4,), number))[1] for number in range(4)]
    for number in range(4): assert_same([maps[number]], [model.explain(batch(), target=number).map])
    assert (maps[0] - maps[1]).abs().max() > .01  # no target is baked in
    assert_same(graph(batch()), explained(model, batch()))  # no target is what is predicted


@pytest.mark.parametrize('strict', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(pair, strict):
    model, graph = pair
    inputs = arguments(model)
    any_batch = torch.export.Dim('batch', max=1000)
    program = torch.export.export(graph, inputs, dynamic_shapes=({0: any_batch},) * len(inputs), strict=strict)
    for n in (3, 1): assert_same(program.module()(*arguments(model, n)), explained(model, *arguments(model, n)))


@pytest.mark.slow
def test_compile_has_one_graph(pair):
    "`test_inductor` has what comes after the graph."
    model, graph = pair
    torch._dynamo.reset()
    compiled = torch.compile(graph, backend='eager', fullgraph=True)
    for n in (4, 3): assert_same(compiled(*arguments(model, n)), explained(model, *arguments(model, n)))


def test_under_autocast(pair):
    model, graph = pair
    plain = graph(*arguments(model))
    with torch.autocast('cpu', torch.bfloat16): found = graph(*arguments(model))
    assert_same(found, plain, atol=0)


@pytest.mark.slow
def test_inductor():
    model, graph = make_pair('small_cnn', True)
    torch._dynamo.reset()
    compiled = torch.compile(graph, fullgraph=True)
    try: found = compiled(*arguments(model))
    except Exception as e:
        if 'compiler' in str(e).lower(): pytest.skip(f'no C++ compiler: {e}')
        raise
    assert_same(found, explained(model, *arguments(model)), atol=1e-4)


def test_inference_mode_threads_and_data_parallel(pair):
    model, graph = pair
    inputs = arguments(model)
    expected = explained(model, *inputs)
    with torch.inference_mode():
        assert_same(graph(*inputs), expected)
        assert_same(explained(model, *inputs), expected)
    replicas = graph, copy.deepcopy(graph)
    assert_same(nn.DataParallel(graph)(*inputs), expected)
    halves = zip(*(tensor.chunk(2) for tensor in inputs))  # as on two GPUs: a replica and a thread for each half
    with ThreadPoolExecutor(2) as pool: found = [*pool.map(lambda replica, half: replica(*half), replicas, halves)]
    assert_same([*map(torch.cat, zip(*found))], expected)
    check_threads(graph, inputs, expected)
    check_threads(model.explain, inputs[:1], None if len(inputs) > 1 else expected)


def check_threads(function, inputs, expected):
    "That four threads at once get what one gets"
    def tensors(found): return found if isinstance(found, tuple) else (found.pred, found.map, found.weights)

    if expected is None: expected = tensors(function(*inputs))
    found = [None] * 4

    def work(i): found[i] = [tensors(function(*inputs)) for _ in range(3)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    for results in found:
        for one in results: assert_same(one, expected)


@pytest.mark.slow
def test_the_graph_is_a_copy_in_evaluation_mode():
    model = make_model()
    expected = explained(model, *arguments(model))
    model.train()
    model.cnn[0][0].weight.requires_grad_(False)
    grads = [parameter.requires_grad for parameter in model.parameters()]
    graph = MapModule(model).train()
    assert model.training and [parameter.requires_grad for parameter in model.parameters()] == grads
    with torch.no_grad():
        for parameter in model.parameters(): parameter.zero_()
    assert_same(graph(*arguments(model)), expected)
    assert not graph.training and not any(found.requires_grad for found in graph(*arguments(model)))


def test_pixels_and_floats():
    model, graph = make_pair('small_cnn', True)
    pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    assert_same(graph(pixels), graph((pixels / 255 - model.mean) / model.std))
    assert_same(graph(pixels), explained(model, (pixels / 255 - model.mean) / model.std))
    explanation = model.explain(pixels)
    for name, found in dict(auto=explanation.probabilities, sigmoid=explanation.pred.sigmoid()).items():
        assert_same(MapModule(model, activation=name, trace=False)(pixels)[:1], [found])


@pytest.mark.slow
@pytest.mark.parametrize('size', [(37, 80), 48])
def test_other_sizes_than_the_samples(size):
    "Border responses are brought to the size, also an odd and oblong one."
    model = make_model()
    height, width = size if isinstance(size, tuple) else (size, size)
    x = (torch.rand(2, 3, height, width) - .4) / .25
    assert_same(MapModule(model, size)(x), explained(model, x))


OTHER_SIZES = (64, 64), (65, 79), (143, 96)


def pixels_of(size, n=2):
    return torch.randint(0, 256, (n, 3, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.slow
def test_images_of_any_size():
    "For sizes that were not recorded; the next test has a class-specific network."
    model = make_model('resnet18', class_specific=False)
    graph = MapModule(model, 'any')
    for size in OTHER_SIZES:
        pixels = pixels_of(size)
        assert_same(graph(pixels), explained(model, (pixels / 255 - model.mean) / model.std))
    with pytest.raises(ValueError, match=r'takes \(B,3,H,W\) with H from 64 to 2048 and W from 64 to 2048 pixels, got'):
        graph(torch.zeros(1, 3, 63, 64))


@pytest.mark.slow
def test_a_file_for_images_of_any_size(tmp_path):
    model = make_model()
    loaded = load_exported(model.export(tmp_path/'any.onnx', 'any'))
    assert loaded.sides[0][0] == loaded.sides[1][0] == 64 and loaded.size == (SIZE, SIZE)
    for size in OTHER_SIZES:
        pixels = pixels_of(size)
        found = loaded(pixels, target=2, size=size)
        expected = model.explain((pixels / 255 - model.mean) / model.std, target=2)
        np.testing.assert_allclose(found.prediction, expected.probabilities, atol=1e-5)
        np.testing.assert_allclose(found.map, expected.map, atol=1e-3)
    with pytest.raises(ValueError, match=r'size=\(8, 64\): this file takes images of \(H,W\) with H 64 to 2048'):
        loaded(pixels_of((64, 64)), size=(8, 64))


class Same(nn.Module):
    "Pads by the remainder of a division of the image's size, as networks do that come from TensorFlow"
    def forward(self, f): return nn.functional.pad(f, (0, 0, 0, 1)) if f.shape[2] % 3 else f


@pytest.mark.slow
def test_a_network_for_one_size_alone():
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), Same(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model = AntehocModel(cnn, torch.randn(2, 3, 32, 32), class_specific=False, meta=dict(size=[32, 32]))
    with pytest.raises(ValueError, match='cannot be exported for images of any size, but perhaps for one, such as'):
        MapModule(model, 'any')
    assert_same(MapModule(model)(batch(2)[..., :32, :32]), explained(model, batch(2)[..., :32, :32]))


@pytest.mark.slow
@pytest.mark.parametrize('settings', [
    dict(weight_net='paper'), dict(weight_net='mean', class_specific=False),
    dict(weight_net='scalars', class_specific=False), dict(cells='pixels'),
    dict(border=False, soft_attention='softmax', scale=False)])
def test_every_kind_of_weight_network(settings):
    model = make_model(**dict(class_specific=None) | settings)
    assert_same(MapModule(model)(batch(3)), explained(model, batch(3)))


class Wide(nn.Module):
    "Returns two tensors in a dict, and writes to its input."
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU())

    def forward(self, x):
        x.mul_(.5)
        f = self.features(x)
        return dict(points=f.mean((2, 3)), mask=f[:, :1], n=3)


@pytest.mark.slow
def test_other_outputs_and_grey_images(tmp_path):
    model = with_weights(AntehocModel(Wide(), meta=dict(size=32)))
    x = torch.randn(2, 1, 32, 32)
    kept = x.clone()
    points, mask, i_map, weights = MapModule(model)(x)
    explanation = model.explain(x)
    assert torch.equal(x, kept)
    assert_same((points, mask, i_map), (explanation.pred['points'], explanation.pred['mask'], explanation.map))
    loaded = load_exported(model.export(tmp_path/'wide.onnx'))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8)
    found, expected = loaded(list(pixels)), model.explain(list(pixels))
    np.testing.assert_allclose(found.prediction[0], expected.pred['points'], atol=1e-5)
    np.testing.assert_allclose(found.map, expected.map, atol=1e-4)
    assert loaded.facts['activation'] == 'none' and loaded.facts['classes'] is None


# What an export leaves behind

AFTER_EXPORT = '''
import torch
from antehoc_nb.core.model import AntehocModel
from antehoc_nb.train.archs import small_cnn
class Explain(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x, target):
        explanation = self.model.explain(x, target=target)
        return explanation.pred, explanation.map, explanation.weights
torch.manual_seed(0)
model = AntehocModel(small_cnn(4), torch.randn(2, 3, 48, 48), eta=2).eval()
x, target = torch.randn(3, 3, 48, 48), torch.tensor([3, 0, 1])
if {export_first}:  # before anything was explained, so that an export fills every cache
    batch = torch.export.Dim('batch', max=100)
    program = torch.export.export(Explain(model), (x, target), dynamic_shapes=({{0: batch}},) * 2)
explanation = model.explain(x, target=target)
tensors = explanation.pred, explanation.map, explanation.sams, explanation.weights
assert all(type(tensor) is torch.Tensor for tensor in tensors), [type(tensor) for tensor in tensors]
if {export_first}:
    for n in (3, 1):
        for numbers in ([3, 0, 1], [0, 2, 2]):
            wanted = Explain(model)(x[:n], torch.tensor(numbers[:n]))
            for found, want in zip(program.module()(x[:n], torch.tensor(numbers[:n])), wanted):
                torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)
print(*(tensor.double().sum().item().hex() for tensor in tensors))
'''


@pytest.mark.slow
def test_explain_is_exported_and_leaves_nothing_behind():
    "In a fresh process, so that no cache was filled before."
    printed = [subprocess.run([sys.executable, '-c', AFTER_EXPORT.format(export_first=first)], capture_output=True,
                              text=True, check=True).stdout for first in (True, False)]
    assert printed[0] == printed[1] and printed[0].strip()


def test_tables_of_an_export_are_not_kept_on_another_device(monkeypatch):
    "`meta` stands for a GPU, whose tables are kept as tensors."
    from torch._subclasses.fake_tensor import FakeTensorMode
    monkeypatch.setattr(geometry, '_on_device', {})
    numbers = dict(cells=3, results=5, start=0., step=2., pitch=1.)

    def table(): return geometry._cell_weights(*numbers.values(), device=torch.device('meta'))
    with FakeTensorMode(): table()
    assert not geometry._on_device
    assert type(table()) is torch.Tensor and table() is table()


@pytest.mark.slow
def test_explain_says_why_it_is_not_compiled_whole():
    model = make_model()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match='compile antehoc_nb.core.export.MapModule'):
        torch.compile(lambda x: model.explain(x).map, backend='eager', fullgraph=True)(batch(2))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of dynamo, about its graph breaks
        found = torch.compile(lambda x: model.explain(x).map, backend='eager')(batch(2))
    assert_same([found], [model.explain(batch(2)).map])


# Files

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A class-specific and a class-agnostic model, and their files"
    folder = tmp_path_factory.mktemp('files')
    models = dict(specific=make_model(), agnostic=make_model('small_cnn', class_specific=False))
    for name, model in models.items():
        for kind in ('onnx', 'pt2'): model.export(folder/f'{name}.{kind}')
    assert sorted(file.name for file in folder.iterdir()) == ['agnostic.onnx', 'agnostic.pt2', 'specific.onnx',
                                                              'specific.pt2']
    return folder, models


def photographs(n=3):
    return np.random.default_rng(3).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['onnx', 'pt2'])
def test_files_give_what_explain_gives(files, kind):
    folder, models = files
    for name, model in models.items():
        loaded = load_exported(folder/f'{name}.{kind}')
        targets = [None, 2, 'bee', [0, 3, 1]] if model.class_specific else [None]
        for target in targets:
            found = loaded(list(photographs()), target=target)
            expected = model.explain(list(photographs()), target=target)
            np.testing.assert_allclose(found.prediction, expected.probabilities, atol=1e-5)
            np.testing.assert_allclose(found.map, expected.map, atol=1e-3)
        assert loaded(photographs(1)).map.shape == (1, 1, SIZE, SIZE)
        assert loaded.labels == ('ant', 'bee', 'cat', 'dog') and loaded.size == (SIZE, SIZE)
        assert loaded.facts['version'] == antehoc_nb.__version__ and loaded.facts['activation'] == 'softmax'
        np.testing.assert_allclose(loaded.facts['mean'], [.5, .4, .3])


WITHOUT_TORCH = '''
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
inputs = np.load(sys.argv[2])
prediction, i_map = session.run(None, {name.name: inputs[name.name] for name in session.get_inputs()})
about = session.get_modelmeta().custom_metadata_map
np.savez(sys.argv[3], prediction=prediction, map=i_map, labels=json.loads(about['labels']))
assert not {'torch', 'antehoc_nb'} & {*sys.modules}
'''


@pytest.mark.slow
@pytest.mark.parametrize('name', ['specific', 'agnostic'])
def test_onnxruntime_without_torch(files, tmp_path, name):
    folder, models = files
    target = np.array([2, -1, 0])
    np.savez(tmp_path/'in.npz', images=photographs().transpose(0, 3, 1, 2), target=target)
    subprocess.run([sys.executable, '-c', WITHOUT_TORCH, folder/f'{name}.onnx', tmp_path/'in.npz', tmp_path/'out.npz'],
                   check=True)
    found = np.load(tmp_path/'out.npz')
    model = models[name]
    expected = model.explain(list(photographs()))
    if name == 'specific':
        target[1] = expected.pred[1].argmax()
        expected = model.explain(list(photographs()), target=target)
    np.testing.assert_allclose(found['prediction'], expected.probabilities, atol=1e-5)
    np.testing.assert_allclose(found['map'], expected.map, atol=1e-3)
    assert list(found['labels']) == ['ant', 'bee', 'cat', 'dog']


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['onnx', 'pt2'])
def test_a_target_that_is_no_class(files, kind):
    "A graph can't raise an error: its map is NaN, never that of another class."
    import onnxruntime
    folder, models = files
    pixels, targets = photographs().transpose(0, 3, 1, 2), np.array([4, 1, -2])
    if kind == 'onnx':
        session = onnxruntime.InferenceSession(str(folder/'specific.onnx'))
        _, i_map = session.run(None, dict(images=pixels, target=targets))
    else:
        module = torch.export.load(folder/'specific.pt2').module()
        i_map = module(torch.from_numpy(pixels), torch.from_numpy(targets))[1].numpy()
    assert np.isnan(i_map).all((1, 2, 3)).tolist() == [True, False, True]
    np.testing.assert_allclose(i_map[1], models['specific'].explain(list(photographs()), target=1).map[1], atol=1e-3)
    loaded = load_exported(folder/f'specific.{kind}')
    with pytest.raises(ValueError, match='target must lie in 0..3 for this model, got 4'): loaded(photographs(), 4)
    with pytest.raises(ValueError, match="unknown class 'be': did you mean 'bee'"): loaded(photographs(), target='be')
    agnostic = load_exported(folder/f'agnostic.{kind}')
    with pytest.raises(ValueError, match='the map of this file is about the whole output'): agnostic(photographs(), 1)


@pytest.mark.slow
def test_a_file_says_nothing_about_this_machine(files):
    folder, _ = files
    content = (folder/'specific.onnx').read_bytes()
    for secret in (str(Path(antehoc_nb.__file__).parent), 'site-packages', 'stack_trace', str(folder)):
        assert secret.encode() not in content, secret


@pytest.mark.slow
def test_int8(files, tmp_path):
    folder, models = files
    model, plain = models['specific'], folder/'specific.onnx'
    small = model.export(tmp_path/'b.onnx', int8=list(photographs(8)))
    assert small.stat().st_size < .6 * plain.stat().st_size
    moved = load_exported(small).facts['int8']
    assert moved['images'] == 8 and 0 < moved['map'] < .1 and 0 < moved['prediction'] < .2
    found, expected = load_exported(small)(photographs(), target=2), model.explain(list(photographs()), target=2)
    assert 0 < np.abs(found.map - expected.map.numpy()).mean() < .1
    assert sorted(file.name for file in tmp_path.iterdir()) == ['b.onnx']


# What can't be right

class Gate(nn.Module):
    def forward(self, f): return f * 2 if f.mean() > .5 else f


class ByNumpy(nn.Module):
    def forward(self, f): return torch.from_numpy(f.detach().numpy() * 2)


class BatchByBatch(nn.Module):
    def forward(self, f): return torch.cat([one[None] * (1 + i) for i, one in enumerate(f)])


@pytest.mark.parametrize('kind', [Gate, ByNumpy, BatchByBatch])
def test_a_network_that_cannot_be_exported(tmp_path, kind):
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), kind(), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(8, 4))
    model = AntehocModel(cnn)
    for attempt in (lambda: MapModule(model, 32), lambda: model.export(tmp_path/'x.onnx', 32)):
        with pytest.raises(ValueError, match='export: the network cannot be exported') as e: attempt()
        if kind is not BatchByBatch: assert f'in its module 4 ({kind.__name__}): ' in str(e.value)
        assert '\n' not in str(e.value)
    assert not [*tmp_path.iterdir()]
    assert type(model.explain(torch.rand(2, 3, 32, 32)).map) is torch.Tensor


@pytest.mark.slow
def test_sizes(tmp_path):
    model = make_model(meta=dict(vocab=['ant', 'bee', 'cat', 'dog']))
    with pytest.raises(ValueError, match='give size=, such as size=224'): MapModule(model)
    for size in (0, (32,), (32, -1), 2.5, '32', True):
        with pytest.raises(ValueError, match=r'export: size=.* must be a number of pixels or \(height, width\)'):
            MapModule(model, size)
    fixed = AntehocModel(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
                                       nn.Linear(8 * 28 * 28, 4)), torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r'the network does not take images of size=\(40, 40\): mat1 and mat2'):
        fixed.export(tmp_path/'x.onnx', 40)
    graph = MapModule(model, 32)
    with pytest.raises(ValueError, match=r'this graph takes \(B,3, 32, 32\), got \(1, 3, 40, 40\)'):
        graph(torch.randn(1, 3, 40, 40))
    with pytest.raises(TypeError, match='pixels are torch.uint8'): graph(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match='class numbers'): graph(torch.randn(2, 3, 32, 32), torch.tensor(1))


def test_names_and_activations(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match='must end in .onnx or .pt2'): model.export(tmp_path/'model.tflite')
    with pytest.raises(ValueError, match="activation='relu': choose 'auto'"):
        model.export(tmp_path/'x.pt2', activation='relu')
    (tmp_path/'is_folder.onnx').mkdir()
    with pytest.raises(IsADirectoryError, match='give the name of a file'): model.export(tmp_path/'is_folder.onnx')
    with pytest.raises(ValueError, match='only an .onnx file'): model.export(tmp_path/'x.pt2', int8=list(photographs()))
    with pytest.raises(TypeError, match='a Sequential has no maps'): MapModule(small_cnn(4))
    points = AntehocModel(Wide(), meta=dict(size=32))
    with pytest.raises(ValueError, match="use activation='none'"): points.export(tmp_path/'x.pt2', activation='softmax')
    assert [file.name for file in tmp_path.iterdir()] == ['is_folder.onnx']


def test_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match='pip install onnx onnxscript onnxruntime'):
        make_model().export(tmp_path/'x.onnx')


@pytest.mark.slow
def test_a_file_that_would_give_something_else_is_not_written(tmp_path, monkeypatch):
    from antehoc_nb.core import export
    read = export._FILE_KINDS['.pt2']

    def read_wrong(path):
        run, facts = read(path)
        return lambda *arrays: [run(*arrays)[0], run(*arrays)[1] * .9], facts
    monkeypatch.setitem(export._FILE_KINDS, '.pt2', read_wrong)
    (tmp_path/'x.pt2').write_text('the file of before')
    with pytest.raises(ValueError, match=r'was not written: it would give other results .*map: 0.1'):
        make_model().export(tmp_path/'x.pt2')
    assert [file.read_text() for file in tmp_path.iterdir()] == ['the file of before']


@pytest.mark.slow
def test_files_that_are_none_of_ours(files, tmp_path):
    import onnx
    folder, _ = files
    with pytest.raises(FileNotFoundError, match='no such file'): load_exported(tmp_path/'none.onnx')
    for kind in ('onnx', 'pt2'):
        cut = tmp_path/f'cut.{kind}'
        cut.write_bytes((folder/f'specific.{kind}').read_bytes()[:5000])
        with pytest.raises(ValueError, match='or is cut short'): load_exported(cut)
    model = onnx.load(folder/'specific.onnx')
    facts = {entry.key: entry.value for entry in model.metadata_props}
    for changed, message in ((dict(format='other'), 'was not written by model.export'),
                             (dict(format_version='2', version='"9.1"'), 'is of format 2, written by antehoc_nb 9.1'),
                             (dict(labels='['), 'its metadata was changed')):
        onnx.helper.set_model_props(model, facts | changed)
        onnx.save(model, tmp_path/'changed.onnx')
        with pytest.raises(ValueError, match=message): load_exported(tmp_path/'changed.onnx')
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),))
    torch.export.save(program, tmp_path/'foreign.pt2')
    with pytest.raises(ValueError, match='was not written by model.export'): load_exported(tmp_path/'foreign.pt2')
    assert json.loads(facts['size']) == [SIZE, SIZE]


# The Hub

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A folder that stands for the Hub; `huggingface_hub` has its names, and no network"
    import shutil

    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    class LocalHub:
        def __init__(self, token=None): self.token = token

        def create_repo(self, name, private=None, exist_ok=False):
            (tmp_path/'hub'/name).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path/'hub'/repo_id, dirs_exist_ok=True)
            return f'https://huggingface.co/{repo_id}/commit/1'

    def download(name, revision=None, allow_patterns=None):
        assert allow_patterns == ['config.json', 'model.safetensors']  # no code, whatever else lies there
        if not (tmp_path/'hub'/name).exists():
            error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
            Exception.__init__(error, '404 Client Error. (Request ID: 1)\n\nRepository Not Found for url')
            raise error
        return str(tmp_path/'hub'/name)
    monkeypatch.setattr(huggingface_hub, 'HfApi', LocalHub)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    monkeypatch.chdir(tmp_path)
    return tmp_path/'hub'


def test_to_the_hub_and_back(hub, tmp_path):
    from antehoc_nb.train.archs import build_cnn
    model = with_weights(AntehocModel(build_cnn('small_cnn', 4), torch.randn(2, 3, SIZE, SIZE), eta=3,
                                      meta=dict(vocab=['ant', 'bee', 'cat', 'dog'], size=SIZE)))
    record = dict(results=dict(accuracy=.91237, epochs=3), command='antehoc train photos')
    (tmp_path/'record.json').write_text(json.dumps(record))
    assert model.push_to_hub('me/insects', record=tmp_path/'record.json').endswith('me/insects/commit/1')
    assert sorted(file.name for file in (hub/'me'/'insects').iterdir()) == ['README.md', 'config.json',
                                                                          'model.safetensors']
    card = (hub/'me'/'insects'/'README.md').read_text()
    assert card.startswith('---\n')
    assert 'library_name: antehoc_nb' in card and 'pipeline_tag: image-classification' in card
    for line in ("AntehocModel.from_pretrained('me/insects')", '| classes | ant, bee, cat, dog |',
                 '| CNN | small_cnn |', '| accuracy | 0.9124 |', '| made by | `antehoc train photos` |',
                 '| map | auto, class-specific |'):
        assert line in card, line
    found = AntehocModel.from_pretrained('me/insects').explain(batch(2))
    expected = model.explain(batch(2))
    assert torch.equal(found.map, expected.map) and torch.equal(found.pred, expected.pred)
    model.push_to_hub('me/insects')  # again, over the first one


def test_what_is_not_on_the_hub(hub, monkeypatch):
    message = 'me/nothing: no such folder here, and from the Hugging Face Hub it could not be loaded: 404 Client Error'
    with pytest.raises(FileNotFoundError, match=message): AntehocModel.from_pretrained('me/nothing')
    for local in ('./me/nothing', 'nothing', '/me/nothing', Path('me/nothing'), '../nothing', 'a/b/c'):
        with pytest.raises(FileNotFoundError, match='is not a saved antehoc_nb model'):
            AntehocModel.from_pretrained(local)
    for name in ('insects', 'me/', 'a/b/c', 3):
        with pytest.raises(ValueError, match="must be 'user/name'"): make_model().push_to_hub(name)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ImportError, match='pip install huggingface_hub'): AntehocModel.from_pretrained('me/nothing')
    with pytest.raises(ImportError, match='pip install huggingface_hub'): make_model().push_to_hub('me/insects')
