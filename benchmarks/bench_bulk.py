"""What explaining a folder costs beside predicting it: `explain_many` against a plain prediction loop over the same
files, with the same decoding, workers and batches.

    python benchmarks/bench_bulk.py --images FOLDER --threads 1 2 --size 128 224

Sides take turns, in changing order: the plain loop, `explain_many` without maps, with them, and `explain_files`, which
writes pictures. A ratio is throughput to that of the plain loop, 1 for as fast: the median of the turns' ratios, with
quartiles. `cpu` is the same ratio in CPU time of the process and its workers, for a machine that others use too.
Start-up (workers, checks, checksums: 0.15 s) is included, so that more images come nearer 1. Nothing here is a test.
"""
import argparse
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

from bench_step import text_table

BUDGET = .9  # of the throughput of the plain loop


def photographs(folder, n):
    "Scenes of 500 x 375 pixels as JPEG files in ten folders."
    from PIL import Image

    from antehoc_nb.data.photo_digits import PhotoDigits
    scenes = PhotoDigits(n, size=128, seed=0)
    for number, (scene, digit) in enumerate(zip(scenes.images, scenes.labels, strict=True)):
        path = folder/str(digit)/f'{number:04}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def copies(images, folder, n):
    "The first `n` images of a folder, linked."
    from antehoc_nb.data.images import IMAGES, files_below
    files = [path for path in files_below(images) if path.suffix.lower() in IMAGES][:n]
    if len(files) < n: raise SystemExit(f'--images {images}: {len(files)} images, and --n {n}')
    for path in files:
        link = folder/path.relative_to(images)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.absolute())
    return folder


def make_model(arch, size):
    import torch
    import torchvision

    from antehoc_nb.core.model import AntehocModel
    from antehoc_nb.train.archs import small_cnn
    torch.manual_seed(0)
    cnn = small_cnn(1000) if arch == 'small_cnn' else getattr(torchvision.models, arch)().eval()
    meta = dict(size=[size, size], vocab=[str(number) for number in range(1000)])
    mean, std = [.485, .456, .406], [.229, .224, .225]
    return AntehocModel(cnn, torch.rand(1, 3, size, size), mean=mean, std=std, meta=meta).eval()


def plain_loop(model, folder, bs, workers):
    "Class and probability of every image."
    import torch

    from antehoc_nb.show.explain_many import _find_source, _loader, _usual_batch
    source, framing = _find_source(folder), model.framing
    device, found = model.mean.device, []
    bs = bs or _usual_batch(device, framing.size)
    loader = _loader(source, [0], len(source), bs, framing, model.image_channels, workers, device)
    with torch.no_grad():
        for batch in loader:
            x = (batch.pixels.to(device).float() / 255 - model.mean) / model.std
            probabilities, classes = model.cnn(x).softmax(1).max(1)
            found += zip(classes.tolist(), probabilities.tolist(), strict=True)
    return found


def sides_of(model, folder, bs, workers, pictures):
    from antehoc_nb.data.images import files_below
    from antehoc_nb.show.explain_files import explain_files
    from antehoc_nb.show.explain_many import explain_many

    def bulk(maps):
        out = Path(tempfile.mkdtemp(prefix='bench-bulk-'))
        explain_many(model, folder, out/'out', maps=maps, bs=bs, workers=workers, say=None)
        shutil.rmtree(out)

    def files():
        out = Path(tempfile.mkdtemp(prefix='bench-bulk-'))
        explain_files(model, [(path, path.name) for path in files_below(folder)], out/'out', bs=bs or 32, say=None)
        shutil.rmtree(out)
    sides = {'plain': lambda: plain_loop(model, folder, bs, workers), 'none': lambda: bulk('none'),
             'npz': lambda: bulk('npz')}
    return sides | ({'explain_files': files} if pictures else {})


def seconds(run):
    "Wall seconds, and CPU seconds of this process and of its workers."
    before, start = os.times(), time.perf_counter()
    run()
    wall, after = time.perf_counter() - start, os.times()
    return wall, sum(after[:4]) - sum(before[:4])


def measure(case, folder, options):
    import torch
    torch.set_num_threads(case['threads'])
    model = make_model(case['arch'], case['size']).to(options.device)
    sides = sides_of(model, folder, options.bs, case['workers'], options.pictures)
    times = {name: [] for name in sides}
    sides['plain']()
    for turn in range(options.reps):
        order = list(sides.items())
        if turn % 2: order.reverse()
        for name, run in order: times[name].append(seconds(run))
    found = dict(images_per_second={name: round(options.n / statistics.median(wall for wall, _ in of_one), 2)
                                    for name, of_one in times.items()})
    for name in [*sides][1:]:
        for clock, what in enumerate(('wall', 'cpu')):
            ratios = [plain[clock] / mine[clock] for plain, mine in zip(times['plain'], times[name], strict=True)]
            q1, median, q3 = statistics.quantiles(ratios, n=4)
            found.setdefault(name, {})[what] = dict(ratio=round(median, 4), quartiles=[round(q1, 4), round(q3, 4)])
    return case | found


def table(results):
    rows = []
    for case in results:
        told = ', '.join(f'{key} {case[key]}' for key in ('arch', 'size', 'threads', 'workers'))
        for name in [o for o in ('none', 'npz', 'explain_files') if o in case]:
            spread = case[name]['wall']['quartiles']
            rows.append([told, name, f"{case[name]['wall']['ratio']:.2f} ({spread[0]:.2f}..{spread[1]:.2f})",
                         f"{case[name]['cpu']['ratio']:.2f}", f"{case['images_per_second'][name]:.1f}",
                         f"{case['images_per_second']['plain']:.1f}"])
    header = ['case', 'maps', f'of the plain loop (at least {BUDGET})', 'CPU time', 'images/s', 'plain']
    return text_table([header, *rows])


def parse_options():
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], formatter_class=show_defaults)
    parser.add_argument('--images', type=Path, help='folder of photographs (default: scenes of photo-digits)')
    parser.add_argument('--n', type=int, default=192, help='images')
    parser.add_argument('--arch', default='resnet18')
    parser.add_argument('--size', nargs='+', type=int, default=[128, 224])
    parser.add_argument('--threads', nargs='+', type=int, default=[1, 2])
    parser.add_argument('--workers', type=int, default=1, help='decoding processes')
    parser.add_argument('--bs', type=int, help='images at a time, in all sides (default: that of explain_many)')
    parser.add_argument('--reps', type=int, default=5, help='turns of each side')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--pictures', action='store_true', help='measure explain_files too, which is slow')
    parser.add_argument('--add', action='store_true', help='keep the cases of the record that are not measured now')
    parser.add_argument('--out', type=Path, help='record (default: results/benchmarks/bulk-<hardware>.json)')
    return parser.parse_args()


def record_path(options, record):
    hardware = re.sub('[^a-z0-9]+', '-', (record['hardware']['gpu'] if options.device != 'cpu' else
                                          record['hardware']['cpu']).lower()).strip('-')
    return options.out or Path(__file__).resolve().parents[1]/'results'/'benchmarks'/f'bulk-{hardware}.json'


def kept_cases(path, results):
    "The cases of a record that were not measured again."
    from antehoc_nb.evaluate.scoreboard import read_record
    if not path.exists(): return []

    def key(case): return tuple(case[name] for name in ('arch', 'size', 'threads', 'workers'))
    measured = {key(case) for case in results}
    return [case for case in read_record(path, '')['results']['cases'] if key(case) not in measured]


def main():
    warnings.filterwarnings('ignore')
    from antehoc_nb.evaluate.scoreboard import run_record, write_record
    options, start = parse_options(), time.time()
    with tempfile.TemporaryDirectory(prefix='bench-bulk-') as folder:
        folder = Path(folder)
        if options.images: copies(options.images, folder, options.n)
        else: photographs(folder, options.n)
        results = []
        for threads in options.threads:
            for size in options.size:
                case = dict(arch=options.arch, size=size, threads=threads, workers=options.workers)
                results.append(measure(case, folder, options))
                print(results[-1], file=sys.stderr, flush=True)
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    config = {key: value for key, value in config.items() if key not in ('out', 'images', 'add')}
    config['images'] = 'photographs' if options.images else 'photo-digits'
    command = 'python benchmarks/bench_bulk.py ' + ' '.join(sys.argv[1:])
    if options.images: command = command.replace(str(options.images), 'FOLDER')
    record = run_record(config, 0, dict(cases=results), experiment='bulk_cost', command=command.strip(),
                        seconds=round(time.time() - start), budget=BUDGET)
    path = record_path(options, record)
    if options.add: record['results']['cases'] = [*kept_cases(path, results), *results]
    print(table(record['results']['cases']))
    print(f'record: {os.path.relpath(write_record(record, path))}')


if __name__ == '__main__': main()
