"""What explaining costs, as ratios: a two-pass step to a plain one, `explain` to a forward pass, memory, import.

Both sides of a ratio are the same CNN on the same images, measured in turns so that a change of the machine's pace
hits both.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

BUDGETS = {'step': {'cpu': 1.80, 'cuda': 1.75}, 'explain': 1.15, 'memory': 1.15, 'import_s': 0.5}
MEASURES = ('step', 'explain', 'memory', 'import')
HEADER = ['case', 'ratio of', 'wall', 'quartiles', 'CPU time', 'ours / plain', 'budget']
IMPORT = '''
import time, pkgutil, importlib
import fastai.vision.all
wall, cpu = time.perf_counter(), time.process_time()
import antehoc_nb
for module in pkgutil.walk_packages(antehoc_nb.__path__, 'antehoc_nb.'):
    if not module.name.rsplit('.', 1)[-1].startswith('_'): importlib.import_module(module.name)
print(time.perf_counter() - wall, time.process_time() - cpu)
'''


def clock(device):
    "Wall and CPU seconds, once the device has caught up."
    import torch
    if device == 'cuda': torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def elapsed(start, end):
    "Wall and CPU seconds between two readings of `clock`."
    return [later - earlier for earlier, later in zip(start, end, strict=True)]


# --- Training steps

def step_timers(device):
    "Two callbacks that add the wall and CPU seconds of each batch to the learner's `step_times`, and skip validation."
    from fastai.callback.core import Callback, CancelValidException

    class Start(Callback):
        order = -200
        def before_batch(self): self.learn.started = clock(device)
        def before_validate(self): raise CancelValidException()

    class End(Callback):
        order = 200
        def after_batch(self): self.learn.step_times.append(elapsed(self.learn.started, clock(device)))
    return [Start(), End()]


def learner(arch, size, options, two_pass, n_batches=4):
    "A fastai learner of torchvision's `arch` whose epoch is `n_batches` of noise; its `step_times` grow as it trains."
    import torch
    import torchvision
    from fastai.callback.channelslast import ChannelsLast
    from fastai.data.core import DataLoaders, TfmdDL
    from fastai.learner import Learner
    from torch.utils.data import TensorDataset

    from antehoc_nb.train.learner import Bf16
    from antehoc_nb.train.two_pass import TwoPass
    torch.manual_seed(0)
    cnn = getattr(torchvision.models, arch)(num_classes=10).to(options.device)
    n = n_batches * options.bs
    data = TensorDataset(torch.randn(n, 3, size, size), torch.randint(0, 10, (n,)))
    loaders = [TfmdDL(data, bs=options.bs, num_workers=0, device=options.device) for _ in range(2)]
    cbs = step_timers(options.device)
    if options.bf16: cbs.append(Bf16())
    if options.channels_last: cbs.append(ChannelsLast())
    if two_pass: cbs.append(TwoPass(weight_net=options.weight_net))
    learn = Learner(DataLoaders(*loaders, device=options.device), cnn, loss_func=torch.nn.CrossEntropyLoss(), cbs=cbs)
    learn.step_times = []
    return learn


def train(learn, epochs=1):
    "Median wall and CPU seconds of a step; the first batch warms up."
    learn.step_times = []
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-4)
    return [statistics.median(times) for times in zip(*learn.step_times[1:], strict=True)]


def steps(arch, size, options):
    "Wall and CPU seconds of a step: one row (plain, two-pass) per repetition."
    plain, ours = (learner(arch, size, options, two_pass) for two_pass in (False, True))
    for learn in (plain, ours): train(learn)
    rows = []
    for repetition in range(options.reps):
        turns = (plain, ours) if repetition % 2 else (ours, plain)
        times = {learn: train(learn) for learn in turns}
        rows.append((times[plain], times[ours]))
    return rows


# --- Predictions

def forwards(arch, size, options):
    "Wall and CPU seconds of a prediction: one row (plain forward, `explain`) per repetition."
    import torch
    import torchvision

    from antehoc_nb.core.model import AntehocModel
    torch.manual_seed(0)
    cnn = getattr(torchvision.models, arch)(num_classes=10).to(options.device)
    model = AntehocModel(cnn, weight_net=options.weight_net).eval()
    x = torch.randn(options.bs, 3, size, size, device=options.device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    calls = 3 if options.device == 'cpu' else 20

    def timed(predict):
        start = clock(options.device)
        for _ in range(calls): predict(x)
        return [seconds / calls for seconds in elapsed(start, clock(options.device))]
    rows = []
    with torch.no_grad(), torch.autocast(options.device, torch.bfloat16) if options.bf16 else nullcontext():
        for repetition in range(2 * options.reps + 2):
            turns = (model.cnn, model.explain) if repetition % 2 else (model.explain, model.cnn)
            times = {predict: timed(predict) for predict in turns}
            if repetition > 1: rows.append((times[model.cnn], times[model.explain]))
    return rows


def ratios(rows):
    "Median and quartiles of the ratio of wall time and of CPU time, and the median seconds on both sides."
    found = {}
    for column, what in enumerate(('wall', 'cpu')):
        plain, ours = ([side[column] for side in sides] for sides in zip(*rows, strict=True))
        ratio = [mine / max(theirs, 1e-9) for theirs, mine in zip(plain, ours, strict=True)]
        quartiles = statistics.quantiles(ratio, n=4) if len(ratio) > 1 else ratio * 3
        found[what] = dict(ratio=statistics.median(ratio), quartiles=[quartiles[0], quartiles[2]],
                           seconds=[statistics.median(plain), statistics.median(ours)])
    return found


# --- Memory: a process of its own for each side

def live_bytes():
    "Bytes of all tensors that are alive, shared storage counted once."
    import gc

    import torch
    gc.collect()
    sizes = {}
    for o in gc.get_objects():
        if not issubclass(type(o), torch.Tensor): continue
        for tensor in (o, o.grad if o.is_leaf else None):
            if tensor is not None: sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def process_bytes(what):
    "Bytes of this process now (VmRSS) or at most (VmHWM); None without /proc. (getrusage's peak is also the parent's.)"
    try: status = Path('/proc/self/status').read_text()
    except OSError: return None
    return 1024 * int(re.search(rf'{what}:\s+(\d+)', status)[1])


def peak_of_trace(prof):
    "The largest sum of a profile's allocations and frees."
    with tempfile.TemporaryDirectory() as folder:
        prof.export_chrome_trace(f'{folder}/trace.json')
        events = json.loads(Path(f'{folder}/trace.json').read_text())['traceEvents']
    memory_events = [event for event in events if event.get('name') == '[memory]']
    now = top = 0
    for event in sorted(memory_events, key=lambda event: float(event['ts'])):
        now += event['args']['Bytes']
        top = max(top, now)
    return top


def peak(arch, size, options, two_pass):
    """Peak bytes of training, in this process: `tensors` that torch allocated, and `process`, the growth of the process
    (Linux CPU).

    On a GPU the caching allocator knows. On a CPU the profiler's allocations and frees are added up over two steps,
    above what was alive before them; the convolution library's own scratch memory shows only in `process`."""
    import torch
    learn = learner(arch, size, options, two_pass, n_batches=2)
    before = process_bytes('VmRSS')
    train(learn)
    grown = before and process_bytes('VmHWM') - before
    if options.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        train(learn)
        return dict(tensors=torch.cuda.max_memory_allocated(), process=None)
    start = live_bytes()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as prof: train(learn)
    return dict(tensors=start + peak_of_trace(prof), process=grown)


def memory(arch, size, options):
    "The peaks of both sides, each from a process of its own, and their ratios."
    flags = ['--device', options.device, '--bs', str(options.bs), '--threads', str(options.threads),
             '--weight-net', options.weight_net]
    if options.bf16: flags.append('--bf16')
    if options.channels_last: flags.append('--channels-last')

    def measured(side):
        command = [sys.executable, __file__, '--arch', arch, '--size', str(size), '--peak', side, *flags]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    plain, ours = measured('plain'), measured('two-pass')
    known = [what for what in plain if plain[what]]
    return {what: dict(ratio=ours[what] / plain[what], bytes=[plain[what], ours[what]]) for what in known}


def import_seconds(n=3):
    "Median wall and CPU seconds of importing every module of the package when fastai is already imported."
    command = [sys.executable, '-W', 'ignore', '-c', IMPORT]
    options = dict(check=True, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    outputs = [subprocess.run(command, **options).stdout for _ in range(n)]
    wall, cpu = zip(*[map(float, output.split()[-2:]) for output in outputs], strict=True)
    return dict(wall=statistics.median(wall), cpu=statistics.median(cpu))


# --- Report

def time_row(case, what, found, budget):
    "A row of the table. CPU time of several threads counts their waiting, so wall time leads."
    wall, cpu = found['wall'], found['cpu']
    plain, ours = (1000 * seconds for seconds in wall['seconds'])
    return [case, what, f"{wall['ratio']:.2f}", '{:.2f}..{:.2f}'.format(*wall['quartiles']), f"{cpu['ratio']:.2f}",
            f'{ours:.1f} / {plain:.1f} ms', f'{budget:.2f}']


def memory_row(case, what, found):
    plain, ours = (n / 2**20 for n in found['bytes'])
    return [case, f'peak training memory, {what}', f"{found['ratio']:.2f}", '', '', f'{ours:.0f} / {plain:.0f} MiB',
            f"{BUDGETS['memory']:.2f}"]


def import_row(found):
    seconds = f"{found['wall']:.2f} s ({found['cpu']:.2f} s CPU)"
    return ['package', 'import beyond fastai', '', '', '', seconds, f"{BUDGETS['import_s']:.2f} s"]


def text_table(rows):
    "Columns of equal width, under a rule."
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row):
        texts = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        return '  '.join(texts + numbers)
    header = line(rows[0])
    return '\n'.join([header, '-' * len(header), *map(line, rows[1:])])


def measure(arch, size, options):
    "What is measured of one CNN: its name, the results, and the rows of the table."
    name = f'{arch} {size}px bs{options.bs}'
    if options.weight_net != 'auto': name += f', {options.weight_net}'
    print(f'{name} ...', file=sys.stderr, flush=True)
    found, rows = {}, []
    if 'step' in options.only:
        found['step'] = ratios(steps(arch, size, options))
        rows.append(time_row(name, 'two-pass step / plain step', found['step'], BUDGETS['step'][options.device]))
    if 'explain' in options.only:
        found['explain'] = ratios(forwards(arch, size, options))
        rows.append(time_row(name, 'explain / plain forward', found['explain'], BUDGETS['explain']))
    if 'memory' in options.only:
        found['memory'] = memory(arch, size, options)
        rows.extend(memory_row(name, what, of_one) for what, of_one in found['memory'].items())
    return name, found, rows


def parse_options():
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=show_defaults)
    add = parser.add_argument
    add('--arch', nargs='+', default=['resnet18', 'resnet50'], help='torchvision architectures')
    add('--weight-net', default='auto', help='how the layers are blended: auto, paper, ...')
    add('--size', nargs='+', type=int, default=[128], help='image sides in pixels')
    add('--bs', type=int, default=32, help='images per batch')
    add('--device', default='cpu', choices=['cpu', 'cuda'])
    add('--threads', type=int, default=0, help="torch's CPU threads; 0: as torch chooses")
    add('--bf16', action='store_true', help='bfloat16 autocast on both sides')
    add('--channels-last', action='store_true', help='channels_last on both sides')
    add('--reps', type=int, default=7, help='repetitions of each side, in turns')
    add('--only', nargs='+', choices=MEASURES, default=list(MEASURES), help='what to measure')
    add('--out', type=Path, help='record to write (default: results/benchmarks/step-<hardware>.json)')
    add('--peak', choices=['plain', 'two-pass'], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reps < 1: parser.error('--reps must be at least 1')
    import torch
    if options.device == 'cuda' and not torch.cuda.is_available(): parser.error('--device cuda: torch sees no GPU here')
    if options.threads: torch.set_num_threads(options.threads)
    return options


def write(cases, seconds, options):
    "Write the record and return its path."
    import torch

    from antehoc_nb.evaluate.scoreboard import run_record, write_record
    config = {key: value for key, value in vars(options).items() if key not in ('out', 'peak')}
    config['threads'] = torch.get_num_threads()
    command = 'python benchmarks/bench_step.py ' + ' '.join(sys.argv[1:])
    record = run_record(config, 0, cases, experiment='step', command=command, seconds=seconds, budgets=BUDGETS)
    hardware = f"{record['hardware']['cpu']} {config['threads']} threads"
    if options.device == 'cuda': hardware = record['hardware']['gpu']
    name = 'step-' + re.sub('[^a-z0-9]+', '-', hardware.lower()).strip('-') + '.json'
    root = Path(__file__).resolve().parents[1]
    return write_record(record, options.out or root/'results'/'benchmarks'/name)


def main():
    import warnings
    warnings.filterwarnings('ignore')
    options = parse_options()
    if options.peak:
        found = peak(options.arch[0], options.size[0], options, options.peak == 'two-pass')
        return print(json.dumps(found))
    start = time.time()
    cases, table = {}, [HEADER]
    for arch in options.arch:
        for size in options.size:
            name, cases[name], rows = measure(arch, size, options)
            table.extend(rows)
    if 'import' in options.only:
        cases['import'] = import_seconds()
        table.append(import_row(cases['import']))
    print(text_table(table))
    path = write(cases, round(time.time() - start, 1), options)
    print(f'\nrecord: {os.path.relpath(path)}')


if __name__ == '__main__': main()
