"""What a map costs beside the prediction: against Grad-CAM, as images, layers, classes and batches grow, and in the
format of torchcam's benchmark.

    OMP_NUM_THREADS=1 python benchmarks/bench_explain.py

The model is the default one: class-specific, with the evidence. Four parts, of which some can be named:

- `cells`: `explain` / plain forward pass, and Grad-CAM / plain forward pass, for two CNNs, two sizes, batches of 1 and
  8, one thread and two.
- `growth`: the same ratio for a ResNet-18 with images of 64 to 512 pixels, 2 to 16 layers, 10 to 1,000 classes, batches
  of 1 to 64.
- `torchcam`: milliseconds of prediction and map beyond a plain forward pass (224 px, ResNet-18), beside torchcam and
  pytorch-grad-cam. (torchcam's benchmark leaves the forward pass out of the time.)
- `memory`: peak of `explain` / peak of a plain prediction.

Sides of a ratio take turns; a ratio is the median of the turns' ratios, with quartiles. `fastest` is the ratio of the
fastest turns, which other processes disturb least. Nothing here is a test. About eight minutes on a free machine.
"""
import argparse
import os
import re
import statistics
import sys
import time
import warnings
from pathlib import Path

from bench_step import clock, elapsed, live_bytes, peak_of_trace, text_table

PARTS = 'cells', 'growth', 'torchcam', 'memory'
BUDGETS = {'resnet18': 1.10, 'resnet50': 1.05, 'memory': 1.05}


def quartiles(values): return [round(q, 4) for q in statistics.quantiles(values, n=4)]


def take_turns(sides, reps, warm_up=2):
    "Wall seconds of each side, name -> one number per repetition; sides run one after the other, in changing order."
    times = {name: [] for name in sides}
    for repetition in range(reps + warm_up):
        order = list(sides.items())
        if repetition % 2: order.reverse()
        for name, run in order:
            start = clock('cpu')
            run()
            if repetition >= warm_up: times[name].append(elapsed(start, clock('cpu'))[0])
    return times


def ratios_to(times, plain='plain'):
    "For each other side: the quartiles of its ratio to the plain one, and the median milliseconds of both."
    found = {}
    for name, seconds in times.items():
        if name == plain: continue
        q1, median, q3 = quartiles([mine / theirs for mine, theirs in zip(seconds, times[plain], strict=True)])
        milliseconds = [round(1000 * statistics.median(side), 3) for side in (seconds, times[plain])]
        found[name] = dict(ratio=median, quartiles=[q1, q3], milliseconds=milliseconds,
                           fastest=round(min(seconds) / min(times[plain]), 4))
    return found


def make_model(arch, size, batch, layers=8, classes=1000):
    "A CNN in evaluation mode, its default model, and a batch."
    import torch
    import torchvision

    from antehoc_nb.core.model import AntehocModel
    torch.manual_seed(0)
    cnn = getattr(torchvision.models, arch)(num_classes=classes).eval()
    x = torch.rand(batch, 3, size, size)
    model = AntehocModel(cnn, x[:1], eta=layers).eval()
    assert model.evidence is not None
    return model, x


def sides_of(model, x, with_grad_cam):
    import torch

    from antehoc_nb.evaluate.explainers import grad_cam
    target = torch.zeros(len(x), dtype=torch.long)

    def plain():
        with torch.no_grad(): model.cnn(x)
    sides = dict(plain=plain, explain=lambda: model.explain(x))
    if with_grad_cam: sides['grad-cam'] = lambda: grad_cam(model, x, target)
    return sides


def measure(arch, size, batch, reps, with_grad_cam=True, **settings):
    return ratios_to(take_turns(sides_of(*make_model(arch, size, batch, **settings), with_grad_cam), reps))


def cells(options):
    import torch
    found = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for arch in ('resnet18', 'resnet50'):
            for size in (128, 224):
                for batch in (1, 8):
                    case = dict(arch=arch, size=size, batch=batch, threads=threads)
                    found.append(case | measure(arch, size, batch, options.reps if batch == 8 else 3 * options.reps))
                    print(found[-1], file=sys.stderr, flush=True)
    return found


def growth(options):
    import torch
    torch.set_num_threads(options.threads[0])
    usual = dict(size=128, batch=8, layers=8, classes=1000)
    cases = [dict(size=size) for size in (64, 128, 256, 512)] + [dict(layers=n) for n in (2, 4, 8, 16)]
    cases += [dict(classes=n) for n in (10, 100, 1000)] + [dict(batch=n) for n in (1, 8, 64)]
    found = []
    for changed in cases:
        reps = options.reps if changed.get('size', 0) < 512 and changed.get('batch', 0) < 64 else 3
        found.append(changed | measure('resnet18', **usual | changed, reps=reps, with_grad_cam=False))
        print(found[-1], file=sys.stderr, flush=True)
    return found


def torchcam_format(options):
    "Milliseconds beyond a plain forward pass, 224 px, ResNet-18, batch of 1; Score-CAM with fewer iterations."
    import torch
    from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchcam import methods
    torch.set_num_threads(options.threads[0])
    model, x = make_model('resnet18', 224, 1)
    layer = model.cnn.layer4

    def of_torchcam(method, **settings):
        with getattr(methods, method)(model.cnn, 'layer4', **settings) as extractor:
            def run():
                extractor(0, model.cnn(x.clone().requires_grad_()))
            yield run

    def of_pytorch_grad_cam(method):
        with method(model=model.cnn, target_layers=[layer]) as cam:
            yield lambda: cam(input_tensor=x, targets=[ClassifierOutputTarget(0)])
    plain = sides_of(model, x, False)['plain']
    runs = {'antehoc_nb': iter([lambda: model.explain(x)]), 'torchcam CAM': of_torchcam('CAM', fc_layer='fc')}
    runs |= {f'torchcam {name}': of_torchcam(name) for name in ('GradCAM', 'GradCAMpp', 'LayerCAM', 'ScoreCAM')}
    runs |= {f'pytorch-grad-cam {method.__name__}': of_pytorch_grad_cam(method)
             for method in (GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM)}
    found = {}
    for name, made in runs.items():
        run = next(made)
        reps = (3, 0) if 'ScoreCAM' in name else (options.iterations, 2)
        times = take_turns(dict(plain=plain, method=run), *reps)
        beyond = [mine - theirs for mine, theirs in zip(times['method'], times['plain'], strict=True)]
        q1, median, q3 = (1000 * q for q in statistics.quantiles(beyond, n=4))
        found[name] = dict(milliseconds=round(median, 3), quartiles=[round(q1, 3), round(q3, 3)])
        print(name, found[name], file=sys.stderr, flush=True)
        for _ in made: pass
    return found


def peak_bytes(run):
    "The largest sum of tensors that are alive while `run` runs."
    import torch
    activities = [torch.profiler.ProfilerActivity.CPU]
    run()
    start = live_bytes()
    with torch.profiler.profile(activities=activities, profile_memory=True) as prof: run()
    return start + peak_of_trace(prof)


def memory(options):
    found = []
    for arch in ('resnet18', 'resnet50'):
        for batch in (1, 8):
            sides = sides_of(*make_model(arch, 224, batch), False)
            plain, ours = (peak_bytes(sides[name]) for name in ('plain', 'explain'))
            found.append(dict(arch=arch, size=224, batch=batch, ratio=round(ours / plain, 4), bytes=[ours, plain]))
    return found


RUN = dict(cells=cells, growth=growth, torchcam=torchcam_format, memory=memory)


def tables(results):
    "The results as text."
    def row(case, names=('explain', 'grad-cam')):
        told = ', '.join(f'{key} {value}' for key, value in case.items() if key not in names)
        ratios = ['{ratio:.2f} ({quartiles[0]:.2f}..{quartiles[1]:.2f}), {fastest:.2f}'.format(**case[name])
                  if name in case else '' for name in names]
        budget = BUDGETS.get(case.get('arch', 'resnet18'))
        return [told, 'to a plain forward pass', *ratios, f'{budget:.2f}']
    for part in ('cells', 'growth'):
        if part in results:
            header = [part, 'ratio', 'explain', 'grad-cam', 'budget']
            print(text_table([header, *map(row, results[part])]) + '\n')
    if 'torchcam' in results:
        rows = [[name, 'ms beyond a forward pass', f"{of_one['milliseconds']:.2f}"]
                for name, of_one in results['torchcam'].items()]
        print(text_table([['torchcam', '', 'median'], *rows]) + '\n')
    if 'memory' in results:
        rows = [[f"{case['arch']}, batch {case['batch']}", 'peak of explain / plain', f"{case['ratio']:.3f}"]
                for case in results['memory']]
        print(text_table([['memory', '', 'ratio'], *rows]) + '\n')


def parse_options():
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=show_defaults)
    parser.add_argument('parts', nargs='*', default=list(PARTS), help=', '.join(PARTS))
    parser.add_argument('--threads', nargs='+', type=int, default=[1, 2], help='growth and torchcam take the first')
    parser.add_argument('--reps', type=int, default=15, help='repetitions of each side')
    parser.add_argument('--iterations', type=int, default=100, help='in the format of torchcam')
    parser.add_argument('--out', type=Path, help='record (default: results/benchmarks/explain-<hardware>.json)')
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown: parser.error(f'unknown part {unknown[0]!r}: choose among {", ".join(PARTS)}')
    return options


def main():
    warnings.filterwarnings('ignore')
    from antehoc_nb.evaluate.scoreboard import run_record, write_record
    options = parse_options()
    start = time.time()
    results = {part: RUN[part](options) for part in options.parts}
    tables(results)
    config = {key: value for key, value in vars(options).items() if key != 'out'}
    command = 'python benchmarks/bench_explain.py ' + ' '.join(sys.argv[1:])
    record = run_record(config, 0, results, experiment='explain_cost', command=command.strip(),
                        seconds=round(time.time() - start), budgets=BUDGETS)
    name = 'explain-' + re.sub('[^a-z0-9]+', '-', record['hardware']['cpu'].lower()).strip('-') + '.json'
    path = write_record(record, options.out or Path(__file__).resolve().parents[1]/'results'/'benchmarks'/name)
    print(f'record: {os.path.relpath(path)}')


if __name__ == '__main__': main()
