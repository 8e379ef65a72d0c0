"""Run notebooks as `nbdev_test` does, side by side, those first that take longest: else one worker ends alone.

`python tools/notebooks.py` runs all of them but the slow ones (`SLOW`) and the cells marked slow. Paths choose some;
`--slow` runs the slow notebooks and those with slow cells, these cells too; `--all` runs all notebooks so. `--save`
runs all cells of the notebooks that are named, as Jupyter does, and saves their outputs: figures of 150 dots per inch
(`tools/matplotlibrc`), the largest in 256 colours if they take too much space. Exits with 1 if a notebook fails.
"""
import argparse
import base64
import io
import os
from pathlib import Path

import nbdev.test
from execnb.shell import CaptureShell
from fastcore.parallel import parallel
from nbdev.config import get_config

NBS = Path(__file__).resolve().parents[1]/'nbs'
SLOW = ('45_explainers', '05_other_outputs', '56_captioner', '03_is_the_map_true', '53_concept_models', '55_landmarks',
        '36_outputs', '04_find_a_shortcut', '08_add_your_own', '48_benchmark')  # half of the time; the longest first
LONGEST = *SLOW, '11_two_pass', '02_trained_network', '01_your_photos'
MOST_BYTES = 1_400_000  # of the figures of one notebook


def all_notebooks():
    "The notebooks of the repository, the longest first, the others by path"
    def is_hidden(path): return any(part[0] in '._' for part in path.relative_to(NBS).parts)
    def place(path): return LONGEST.index(path.stem) if path.stem in LONGEST else len(LONGEST)
    return sorted((path for path in sorted(NBS.rglob('*.ipynb')) if not is_hidden(path)), key=place)


class PlainShell(CaptureShell):
    "Draws figures at their own resolution, not at twice: nobody looks at them"
    def __init__(self, path=None):
        super().__init__(path, mpl_format='png')
        self._run("set_matplotlib_formats('png', bbox_inches=None)")  # uncropped


nbdev.test.CaptureShell = PlainShell  # which `test_nb` makes


def has_slow_cells(path): return '"#| slow' in path.read_text(encoding='utf-8')


def run(paths, workers, slow=False):
    "Run notebooks; True if all went well."
    import fastai.vision.all  # noqa: F401  nearly every notebook needs it: the workers, forked from here, have it
    config = get_config()
    flags = dict(skip_flags=config.tst_flags.split(), force_flags=['slow'] if slow else [])
    results = parallel(nbdev.test.test_nb, paths, n_workers=workers, pause=.01, basepath=config.config_path,
                       do_print=True, **flags)
    by_time = sorted(zip(paths, results), key=lambda pair: -pair[1][1])
    for path, (_, seconds) in by_time: print(f'{seconds:4.0f} s  {path.relative_to(NBS)}')
    failed = [path.name for path, (passed, _) in by_time if not passed]
    if failed: print('failed:', *failed)
    return not failed


def in_few_colours(png):
    "The bytes of a PNG with 256 colours and dithering, which take less than half of the space; or as they are"
    from PIL import Image
    image = Image.open(io.BytesIO(png))
    if image.mode == 'P': return png
    image, file = image.convert('RGB'), io.BytesIO()
    image.quantize(palette=image.quantize(256), dither=Image.Dither.FLOYDSTEINBERG).save(file, 'PNG', optimize=True)
    return min(png, file.getvalue(), key=len)


def make_small(figures):
    "Take 256 colours for the largest figures, until those of a notebook take less than `MOST_BYTES`."
    for data in sorted(figures, key=lambda data: -len(data['image/png'])):
        if sum(len(data['image/png']) for data in figures) < MOST_BYTES: break
        data['image/png'] = base64.b64encode(in_few_colours(base64.b64decode(data['image/png']))).decode()


def save(path):
    "Run a notebook with all its cells, and save its outputs but for what went to standard error."
    import nbformat
    from nbclient import NotebookClient
    os.environ['MATPLOTLIBRC'] = str(Path(__file__).with_name('matplotlibrc'))
    os.environ.pop('MPLBACKEND', None)  # figures go into the notebook
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=1800, kernel_name='python3', resources=dict(metadata=dict(path=path.parent))).execute()
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        cell.outputs = [output for output in cell.outputs if output.get('name') != 'stderr']
    make_small([output.data for cell in nb.cells if cell.cell_type == 'code' for output in cell.outputs
                if 'image/png' in output.get('data', {})])
    nbformat.write(nb, path)
    print(f'{path.stat().st_size / 1e6:4.1f} MB  {path.relative_to(NBS)}', flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('paths', nargs='*', type=Path, help='run these notebooks only')
    p.add_argument('--workers', type=int, default=2, help='how many run side by side')
    p.add_argument('--slow', action='store_true', help='run the slow notebooks and slow cells')
    p.add_argument('--all', action='store_true', help='run all notebooks, and their slow cells')
    p.add_argument('--save', action='store_true', help='run the notebooks that are named one by one, and save them')
    args = p.parse_args()
    paths = [path.resolve() for path in args.paths] or all_notebooks()
    if args.save:
        if not args.paths: p.error('--save: name the notebooks')
        for path in paths: save(path)
        return
    if args.slow: paths = [path for path in paths if path.stem in SLOW or has_slow_cells(path)]
    elif not args.paths and not args.all: paths = [path for path in paths if path.stem not in SLOW]
    raise SystemExit(0 if run(paths, min(args.workers, len(paths)), args.slow or args.all) else 1)


if __name__ == '__main__': main()
