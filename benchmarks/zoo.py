"""Which networks of torchvision, timm and Hugging Face can be explained: a small member of every family.

Each is built with random weights, wrapped, explained, trained for one step beside a plain copy, saved and loaded. A
process of its own does that, with a limit of time and memory. Results are kept as they come, each with the commit that
it was tried at, so that a run that was stopped goes on: python benchmarks/zoo.py; and what failed is tried again, after
what is new, by: python benchmarks/zoo.py --again
"""
import argparse
import importlib
import json
import math
import multiprocessing
import resource
import signal
import tempfile
import time
import warnings
from pathlib import Path

RECORD = Path(__file__).resolve().parents[1]/'results'/'benchmarks'/'zoo.json'
CLASSES = 10
MORE_OF_TIMM = (  # other families of modules that hold several, and other kinds of grids
    'vit_tiny_r_s16_p8_224', 'deit_tiny_distilled_patch16_224', 'vit_little_patch16_reg4_gap_256', 'levit_128',
    'coatnet_nano_rw_224', 'maxvit_rmlp_pico_rw_256', 'halonet26t', 'botnet26t_256', 'lambda_resnet26t',
    'mobileone_s0', 'repvgg_a0', 'gernet_s', 'regnetz_b16', 'convnextv2_atto', 'mixnet_s', 'mnasnet_050', 'fbnetc_100',
    'spnasnet_100', 'tinynet_e', 'lcnet_050', 'mobilenetv2_050', 'mobilenetv4_conv_small', 'mobilenetv4_hybrid_medium',
    'efficientvit_b0', 'mobilevitv2_050', 'resnetrs50', 'seresnext26t_32x4d', 'ecaresnet26t', 'skresnet18',
    'resnetblur50', 'nf_resnet26', 'mixer_s16_224', 'gmlp_ti16_224', 'resmlp_12_224', 'eva02_tiny_patch14_224',
    'xcit_nano_12_p16_224')
TORCHVISION = (
    'alexnet', 'convnext_tiny', 'densenet121', 'efficientnet_b0', 'efficientnet_v2_s', 'googlenet', 'inception_v3',
    'maxvit_t', 'mnasnet0_5', 'mobilenet_v2', 'mobilenet_v3_small', 'regnet_x_400mf', 'regnet_y_400mf', 'resnet18',
    'resnext50_32x4d', 'shufflenet_v2_x0_5', 'squeezenet1_1', 'swin_t', 'swin_v2_t', 'vgg11', 'vgg11_bn', 'vit_b_32',
    'wide_resnet50_2', 'deeplabv3_mobilenet_v3_large', 'fcn_resnet50', 'lraspp_mobilenet_v3_large')
SIZES = dict(inception_v3=(299, 299), maxvit_t=(224, 224))  # that the networks do not say
HUGGING_FACE = ('ViT', 'DeiT', 'Swin', 'Swinv2', 'ConvNext', 'ConvNextV2', 'ResNet', 'MobileNetV2', 'EfficientNet',
                'Dinov2', 'Dinov2WithRegisters', 'PoolFormer', 'Pvt', 'Segformer', 'Beit', 'MobileViT')


def smallest_of_family(module):
    "timm's model of a module with the fewest parameters, counted without memory for them."
    import timm
    import torch
    sizes = {}
    for name in timm.list_models(module=module):
        try:
            with torch.device('meta'): sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
        except Exception: continue  # some compute with the values of tensors, which have none here
    return min(sizes, key=sizes.get) if sizes else next(iter(timm.list_models(module=module)), None)


def every_network():
    "library/name of what is tried."
    import timm
    families = {module: smallest_of_family(module) for module in timm.list_modules()}
    return ([f'torchvision/{name}' for name in TORCHVISION]
            + [f'timm/{name}' for name in dict.fromkeys([*families.values(), *MORE_OF_TIMM]) if name]
            + [f'transformers/{name}' for name in HUGGING_FACE])


def small_hugging_face(name):
    "A small classifier with random weights, from a configuration of Hugging Face."
    import transformers
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    small = {
        'ViT': sizes, 'DeiT': sizes, 'Dinov2': sizes, 'Dinov2WithRegisters': sizes, 'Beit': sizes,
        'Swin': dict(embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4),
        'Swinv2': dict(embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4),
        'ConvNext': dict(hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 2, 1]),
        'ConvNextV2': dict(hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 2, 1]),
        'ResNet': dict(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type='basic'),
        'MobileNetV2': dict(depth_multiplier=.35),
        'EfficientNet': dict(width_coefficient=.5, depth_coefficient=.5, hidden_dim=640),
        'PoolFormer': dict(hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1]),
        'Pvt': dict(hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4]),
        'Segformer': dict(hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4]),
        'MobileViT': dict(hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64]),
    }[name]
    image_size = {} if name in ('ResNet', 'Segformer', 'Pvt') else dict(image_size=64)
    if name in ('ViT', 'DeiT', 'Dinov2', 'Dinov2WithRegisters', 'Beit'): image_size |= dict(patch_size=8)
    config = getattr(transformers, f'{name}Config')(**small, **image_size, num_labels=CLASSES)
    return getattr(transformers, f'{name}ForImageClassification')(config)


def build(network):
    "A network with random weights, always the same ones."
    import torch
    torch.manual_seed(0)
    library, name = network.split('/')
    if library == 'transformers': return small_hugging_face(name)
    if library == 'timm':
        import timm
        return timm.create_model(name, num_classes=CLASSES)
    import torchvision
    kwargs = dict(init_weights=False) if name in ('googlenet', 'inception_v3') else {}
    segmentation = torchvision.models.list_models(module=torchvision.models.segmentation)
    if name in segmentation: kwargs = dict(weights_backbone=None)
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **kwargs)


def images_for(cnn, name):
    "Two images of noise of the size that the network says it takes, or of 128 x 128."
    import torch

    from antehoc_nb.core.utils import in_channels, own_sizes
    height, width = next(iter(own_sizes(cnn)), SIZES.get(name, (128, 128)))
    return torch.rand(2, in_channels(cnn), height, width, generator=torch.Generator().manual_seed(1))


def task_loss(out):
    "A loss of any output."
    from antehoc_nb.core.utils import output_tensors
    return sum(tensor.float().square().mean() for tensor in output_tensors(out))


def train_a_step(cnn, model, x):
    "One step of SGD, of the plain network (`model` None) or of both networks."
    import torch

    from antehoc_nb.core.interpretation_loss import two_pass_step
    network = cnn if model is None else model
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    torch.manual_seed(1)
    if model is None: loss = task_loss(cnn(x))
    else:
        target = torch.zeros(len(x), dtype=torch.long) if model.class_specific else None
        out, interpretation_loss = two_pass_step(model, x, target)
        loss = task_loss(out) + interpretation_loss
    loss.backward()
    optimizer.step()


def same_weights(cnn, other):
    "Whether weights and buffers of two networks are the same to the bit, NaN too."
    import torch
    one, two = cnn.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name].nan_to_num(), two[name].nan_to_num()) for name in one)


def check(network):
    "Everything that is tried with one network; what the record says of it. An error is the reason why it fails."
    import torch

    from antehoc_nb.core.layers import layer_layout
    from antehoc_nb.core.model import AntehocModel
    from antehoc_nb.core.utils import output_tensors
    torch.set_num_threads(1)
    cnn, plain = build(network), build(network)
    name = network.partition('/')[2]
    assert same_weights(cnn, plain), 'the same seed builds another network'
    x = images_for(cnn, name)
    found = dict(network=network, kind=type(cnn).__name__, parameters=sum(p.numel() for p in cnn.parameters()),
                 size=list(x.shape[2:]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = AntehocModel(cnn, x if name in SIZES else None)
    found['warnings'] = [str(warning.message) for warning in caught if 'AntehocModel' in str(warning.message)]
    assert same_weights(cnn, plain), 'the network changed when the model was made'
    found |= dict(layers=list(model.layers), unseen=round(model.unseen, 3), grids=sum(map(bool, model.grids)),
                  layouts=sorted({layer_layout(layer).suffix or 'image' for layer in model.layers}))
    explanation = model.explain(x)
    assert explanation.map.shape == (2, 1, *x.shape[2:]) and explanation.map.isfinite().all(), 'no map'
    assert explanation.map.flatten(1).std(1).min() > 0, 'the map is the same everywhere'
    with torch.no_grad(): expected = plain.eval()(x)
    same = all(map(torch.equal, output_tensors(explanation.pred), output_tensors(expected)))
    assert same, 'the prediction is not that of the plain network'
    train_a_step(plain, None, x)
    train_a_step(cnn, model, x)
    assert same_weights(cnn, plain), 'the network trains otherwise than the plain one'
    trained = model.eval().explain(x).map.isfinite().all()
    assert trained, 'no map after a step of training'
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model.save_pretrained(folder)
        loaded = AntehocModel.from_pretrained(folder, cnn=build(network))
        assert torch.equal(loaded.explain(x).map, model.explain(x).map), 'the loaded model gives another map'
    return found | dict(ok=True)


def _report(connection, network, seconds, gigabytes):
    "In a process of its own: `check`, or why it fails."
    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), resource.RLIM_INFINITY))
    warnings.simplefilter('ignore')
    try: found = check(network)
    except Exception as e:
        found = dict(network=network, ok=False, reason=f'{type(e).__name__}: {e}'.strip()[:400])
    connection.send(found)


def try_one(network, seconds, gigabytes, patience=4):
    """`check` in a process of its own, a copy of this one; what the record says. `seconds` are those of one core; a
    process that does not compute, or gets too little of a core, is ended after `patience` times as many."""
    context = multiprocessing.get_context('fork')
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(there, network, seconds, gigabytes))
    start, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process.start()
    there.close()
    found = dict(network=network, ok=False, reason=f'more than {seconds:g} s')
    try:
        if here.poll(patience * seconds): found = here.recv()
        else: process.kill()
        process.join()
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGXCPU:
            found['reason'] = f'the process ended, probably for more than {gigabytes:.0f} GB'
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found | dict(seconds=round(time.time() - start, 1), cpu_seconds=round(spent, 1))


def outcome(entry):
    "works, refused (by an error of this library that says why), too large (for the limits of time and memory) or fails"
    if entry['ok']: return 'works'
    reason = entry['reason']
    if reason.startswith('ValueError: '): return 'refused'
    return 'too large' if 'memory' in reason or ' GB' in reason or reason.startswith('more than') else 'fails'


def task(network):
    "What a network is for: classification or segmentation."
    import torchvision
    name = network.removeprefix('torchvision/')
    segments = name in torchvision.models.list_models(module=torchvision.models.segmentation)
    return 'segmentation' if segments else 'classification'


def clean_commit():
    "The commit of this code. `SystemExit` if it has changes that are not committed."
    from antehoc_nb.evaluate.scoreboard import run_record
    commit = run_record({}, 0, {})['commit']
    if commit is None or commit['dirty']:
        raise SystemExit('the record names a commit: run this in a git checkout, with all changes committed')
    return commit['hash']


def still_to_try(names, known, again):
    "What is new; `again`: then what failed; then what was tried at a commit that the record does not name."
    new = [name for name in names if name not in known]
    failed = [name for name in names if name in known and not known[name]['ok']]
    older = [name for name in names if name in known and known[name]['ok'] and 'commit' not in known[name]]
    return [*new, *(failed if again else []), *older]


def write(record, known):
    "The record as far as it is, whole or not at all."
    from antehoc_nb.evaluate.scoreboard import write_record
    order = [*record['order'], *(name for name in known if name not in record['order'])]
    entries = [known[name] for name in order if name in known]
    record['networks'] = [entry | dict(outcome=outcome(entry), task=task(entry['network'])) for entry in entries]
    if all('versions' in entry for entry in entries): record.pop('versions', None)
    write_record(record, RECORD)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('networks', nargs='*', help='library/name; none: all that are still to be tried')
    parser.add_argument('--again', action='store_true', help='try again what failed')
    parser.add_argument('--seconds', type=float, default=300, help='limit for each network, of one core')
    parser.add_argument('--gigabytes', type=float, default=16, help='limit of address space for each network')
    parser.add_argument('--patience', type=float, default=50, help='times those seconds, on a busy machine')
    options = parser.parse_args()
    commit = clean_commit()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else dict(networks=[])
    known = {entry['network']: entry for entry in record['networks']}
    if 'order' not in record: record['order'] = every_network()
    import_all()
    for network in options.networks or still_to_try(record['order'], known, options.again):
        found = try_one(network, options.seconds, options.gigabytes, options.patience)
        known[network] = found | dict(commit=commit, versions=versions())
        print(network, 'ok' if found['ok'] else found['reason'], flush=True)
        write(record, known)
    tried = record['networks']
    print(f'{sum(entry["ok"] for entry in tried)} of {len(tried)} work')


def import_all():
    "Import what every network needs, so that the copies of this process need not."
    for module in ('timm', 'torchvision', 'antehoc_nb.core.model', 'antehoc_nb.core.interpretation_loss'):
        importlib.import_module(module)


def versions():
    "Of the libraries that the networks come from."
    from importlib.metadata import PackageNotFoundError, version
    found = {}
    for package in ('antehoc_nb', 'torch', 'torchvision', 'timm', 'transformers'):
        try: found[package] = version(package)
        except PackageNotFoundError: continue
    return found


if __name__ == '__main__': main()
