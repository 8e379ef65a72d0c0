"""What explaining costs, as ratios in one run: a two-pass step to a plain one, `explain` to a plain forward pass, memory, import.

Both sides of a ratio are the same CNN on the same images, measured in turns so that a change of the machine's pace hits both.
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

BUDGETS = {'step': {'cpu': 1.80, 'cuda': 1.75}, 'explain': 1.15, 'memory': 1.15, 'import_s': 0.5}  # DESIGN, section 6
IMPORT = '''
import time, pkgutil, importlib
import fastai.vision.all
t, c = time.perf_counter(), time.process_time()
import antehoc_nb
for o in pkgutil.iter_modules(antehoc_nb.__path__):
    if not o.name.startswith('_'): importlib.import_module('antehoc_nb.' + o.name)
print(time.perf_counter() - t, time.process_time() - c)
'''


def clock(device):
    "Wall and CPU seconds, once the device has caught up."
    import torch
    if device == 'cuda': torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def learner(arch, size, bs, a, two_pass, n=4):
    "A fastai learner of torchvision's `arch` whose epoch is `n` batches of noise; its `step_times` grow as it trains."
    import torch
    import torchvision
    from fastai.callback.channelslast import ChannelsLast
    from fastai.callback.core import Callback, CancelValidException
    from fastai.data.core import DataLoaders, TfmdDL
    from fastai.learner import Learner
    from torch.utils.data import TensorDataset

    from antehoc_nb.train.learner import Bf16
    from antehoc_nb.train.two_pass import TwoPass
    torch.manual_seed(0)
    cnn = getattr(torchvision.models, arch)(num_classes=10).to(a.device)
    data = TensorDataset(torch.randn(n*bs, 3, size, size), torch.randint(0, 10, (n*bs,)))
    dls = DataLoaders(*[TfmdDL(data, bs=bs, num_workers=0, device=a.device) for _ in range(2)], device=a.device)

    class Start(Callback):
        order = -200
        def before_batch(self): self.learn.started = clock(a.device)
        def before_validate(self): raise CancelValidException()

    class End(Callback):
        order = 200
        def after_batch(self): self.learn.step_times.append([e - s for s, e in zip(self.learn.started, clock(a.device))])
    cbs = [Start(), End()] + [Bf16()]*a.bf16 + [ChannelsLast()]*a.channels_last + [TwoPass(weight_net=a.weight_net)]*two_pass
    learn = Learner(dls, cnn, loss_func=torch.nn.CrossEntropyLoss(), cbs=cbs)
    learn.step_times = []
    return learn


def train(learn, epochs=1):
    learn.step_times = []
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-4)
    return [statistics.median(o) for o in zip(*learn.step_times[1:])]  # the first batch warms up


def steps(arch, size, a):
    "Pairs of wall and CPU seconds of a step: one row (plain, two-pass) per repetition."
    pair = [learner(arch, size, a.bs, a, two) for two in (False, True)]
    for o in pair: train(o)
    rows = []
    for i in range(a.reps):
        times = {j: train(pair[j]) for j in ((0, 1) if i % 2 else (1, 0))}
        rows.append((times[0], times[1]))
    return rows


def forwards(arch, size, a):
    "Pairs of wall and CPU seconds of a prediction: one row (plain forward, `explain`) per repetition."
    import torch
    import torchvision

    from antehoc_nb.core.model import AntehocModel
    torch.manual_seed(0)
    model = AntehocModel(getattr(torchvision.models, arch)(num_classes=10).to(a.device), weight_net=a.weight_net).eval()
    x = torch.randn(a.bs, 3, size, size, device=a.device)
    if a.channels_last: model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    rows = []
    with torch.no_grad(), torch.autocast(a.device, torch.bfloat16) if a.bf16 else nullcontext():
        def timed(f, n=3 if a.device == 'cpu' else 20):
            s = clock(a.device)
            for _ in range(n): f(x)
            return [(e - b)/n for b, e in zip(s, clock(a.device))]
        for i in range(2*a.reps + 2):
            times = {f: timed(f) for f in ((model.cnn, model.explain) if i % 2 else (model.explain, model.cnn))}
            if i > 1: rows.append((times[model.cnn], times[model.explain]))
    return rows


def ratios(rows):
    "Median and quartiles of the ratio of wall time and of CPU time, and the median seconds on both sides."
    out = {}
    for k, what in enumerate(('wall', 'cpu')):
        r = [b[k]/max(p[k], 1e-9) for p, b in rows]
        q = statistics.quantiles(r, n=4) if len(r) > 1 else r*3
        out[what] = dict(ratio=statistics.median(r), quartiles=[q[0], q[2]], seconds=[statistics.median(o[i][k] for o in rows) for i in (0, 1)])
    return out


# --- Memory: a process of its own for each side

def live_bytes():
    "Bytes of all tensors that are alive, shared storage counted once."
    import gc

    import torch
    gc.collect()
    held = {}
    for o in gc.get_objects():
        if issubclass(type(o), torch.Tensor):
            for t in (o, o.grad if o.is_leaf else None):
                if t is not None: held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(held.values())


def resident(what):
    "Bytes that this process holds now (VmRSS) or held at most (VmHWM); None where there is no /proc. (getrusage's peak is the parent's, too.)"
    try: return 1024*int(re.search(rf'{what}:\s+(\d+)', Path('/proc/self/status').read_text())[1])
    except OSError: return None


def peak(arch, size, a, two_pass):
    """Peak bytes of training, in this process: `tensors` that torch allocated, and `process`, its peak above what it held before (Linux CPU).

    On a GPU the caching allocator knows. On a CPU the profiler's allocations and frees are added up over two steps, above what was alive
    before them; scratch memory that the convolution library takes for itself shows only in `process`."""
    import torch
    learn = learner(arch, size, a.bs, a, two_pass, n=2)
    before = resident('VmRSS')
    train(learn)
    grown = before and resident('VmHWM') - before
    if a.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        train(learn)
        return dict(tensors=torch.cuda.max_memory_allocated(), process=None)
    start = live_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof: train(learn)
    with tempfile.TemporaryDirectory() as d:
        prof.export_chrome_trace(f'{d}/trace.json')
        events = json.loads(Path(f'{d}/trace.json').read_text())['traceEvents']
    now = top = 0
    for o in sorted((o for o in events if o.get('name') == '[memory]'), key=lambda o: float(o['ts'])):
        now += o['args']['Bytes']
        top = max(top, now)
    return dict(tensors=start + top, process=grown)


def memory(arch, size, a):
    "The peaks of both sides, each from a process of its own, and their ratios."
    flags = ['--device', a.device, '--bs', str(a.bs), '--threads', str(a.threads), '--weight-net', a.weight_net]
    flags += ['--bf16']*a.bf16 + ['--channels-last']*a.channels_last
    got = []
    for side in ('plain', 'two-pass'):
        cmd = [sys.executable, __file__, '--arch', arch, '--size', str(size), '--peak', side, *flags]
        got.append(json.loads(subprocess.run(cmd, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
    return {k: dict(ratio=got[1][k]/got[0][k], bytes=[o[k] for o in got]) for k in got[0] if got[0][k]}


def import_seconds(n=3):
    "Median wall and CPU seconds of importing every module of the package when fastai is already imported."
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    runs = [subprocess.run([sys.executable, '-W', 'ignore', '-c', IMPORT], check=True, capture_output=True, text=True, env=env) for _ in range(n)]
    return dict(zip(('wall', 'cpu'), [statistics.median(o) for o in zip(*[map(float, r.stdout.split()[-2:]) for r in runs])]))


# --- Report

def line(case, what, r, budget): # CPU time of several threads counts their waiting, so wall time leads
    wall, cpu = r['wall'], r['cpu']
    return [case, what, f"{wall['ratio']:.2f}", '{:.2f}..{:.2f}'.format(*wall['quartiles']), f"{cpu['ratio']:.2f}",
            '{:.1f} / {:.1f} ms'.format(*(1000*o for o in reversed(wall['seconds']))), f'{budget:.2f}']


def text_table(rows):
    wide = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    fmt = lambda r: '  '.join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(r, wide)))
    return '\n'.join([fmt(rows[0]), '-'*len(fmt(rows[0])), *map(fmt, rows[1:])])


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--arch', nargs='+', default=['resnet18', 'resnet50'], help='torchvision architectures')
    p.add_argument('--weight-net', default='autoencoder', help='how the layers are blended: autoencoder, informed, ...')
    p.add_argument('--size', nargs='+', type=int, default=[128], help='image sides in pixels')
    p.add_argument('--bs', type=int, default=32, help='images per batch')
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    p.add_argument('--threads', type=int, default=0, help="torch's CPU threads; 0: as torch chooses")
    p.add_argument('--bf16', action='store_true', help='bfloat16 autocast on both sides')
    p.add_argument('--channels-last', action='store_true', help='channels_last on both sides')
    p.add_argument('--reps', type=int, default=7, help='repetitions of each side, in turns')
    p.add_argument('--only', nargs='+', choices=['step', 'explain', 'memory', 'import'], default=['step', 'explain', 'memory', 'import'])
    p.add_argument('--out', type=Path, help='record to write (default: results/benchmarks/step-<hardware>.json)')
    p.add_argument('--peak', choices=['plain', 'two-pass'], help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.reps < 1: p.error('--reps must be at least 1')
    import warnings
    warnings.filterwarnings('ignore')
    import torch
    if a.device == 'cuda' and not torch.cuda.is_available(): p.error('--device cuda: torch sees no GPU here')
    if a.threads: torch.set_num_threads(a.threads)
    if a.peak: return print(json.dumps(peak(a.arch[0], a.size[0], a, a.peak == 'two-pass')))

    from antehoc_nb.evaluate.scoreboard import run_record, write_record
    start, cases, rows = time.time(), {}, [['case', 'ratio of', 'wall', 'quartiles', 'CPU time', 'ours / plain', 'capped']]
    for arch in a.arch:
        for size in a.size:
            name, r = f'{arch} {size}px bs{a.bs}' + f', {a.weight_net}' * (a.weight_net != 'autoencoder'), {}
            print(f'{name} ...', file=sys.stderr, flush=True)
            if 'step' in a.only:
                r['step'] = ratios(steps(arch, size, a))
                rows.append(line(name, 'two-pass step / plain step', r['step'], BUDGETS['step'][a.device]))
            if 'explain' in a.only:
                r['explain'] = ratios(forwards(arch, size, a))
                rows.append(line(name, 'explain / plain forward', r['explain'], BUDGETS['explain']))
            if 'memory' in a.only:
                r['memory'] = memory(arch, size, a)
                for k, v in r['memory'].items():
                    mib = '{:.0f} / {:.0f} MiB'.format(*(o/2**20 for o in reversed(v['bytes'])))
                    rows.append([name, f'peak training memory, {k}', f"{v['ratio']:.2f}", '', '', mib, f"{BUDGETS['memory']:.2f}"])
            cases[name] = r
    if 'import' in a.only:
        cases['import'] = s = import_seconds()
        rows.append(['package', 'import beyond fastai', '', '', '', f"{s['wall']:.2f} s ({s['cpu']:.2f} s CPU)", f"{BUDGETS['import_s']:.2f} s"])
    print(text_table(rows))
    config = {k: v for k, v in vars(a).items() if k not in ('out', 'peak')} | dict(threads=torch.get_num_threads())
    rec = run_record(config, 0, cases, experiment='step', command='python benchmarks/bench_step.py ' + ' '.join(sys.argv[1:]),
                     seconds=round(time.time() - start, 1), budgets=BUDGETS)
    hardware = rec['hardware']['gpu'] if a.device == 'cuda' else f"{rec['hardware']['cpu']} {config['threads']} threads"
    root = Path(__file__).resolve().parents[1]
    out = a.out or root/'results'/'benchmarks'/f"step-{re.sub('[^a-z0-9]+', '-', hardware.lower()).strip('-')}.json"
    print(f'\nrecord: {os.path.relpath(write_record(rec, out))}')


if __name__ == '__main__': main()
