"""Every check of the repository: ruff, files in step, pages, notebooks run, tests. Exits with 1 if any fails.

`--fix` brings exported modules, notebooks, README.md and llms.txt in step instead of complaining; `--only` picks
steps by name; `--slow` runs the slow cells of notebooks and the slow tests alone, which the steps leave out; `--all`
runs the steps with them.
"""
import argparse
import difflib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LIB = 'antehoc_nb'
FIX = 'python tools/check.py --fix'


def run(*cmd, cwd=ROOT, quiet=False, **env):
    "Run a command of this Python's environment; True if it went well."
    exe = next((str(o) for o in (BIN/cmd[0], BIN/f'{cmd[0]}.exe') if o.exists()), cmd[0])
    env = {**os.environ, 'PYTHONUNBUFFERED': '1', **env}
    env.pop('IN_TEST', None)  # nbdev exports nothing while this is set
    r = subprocess.run([exe, *map(str, cmd[1:])], cwd=cwd, env=env, stdin=subprocess.DEVNULL,
                       **(dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) if quiet else {}))
    if quiet and r.returncode: print(r.stdout, flush=True)
    return r.returncode == 0


def sync(root, quiet=False):
    """Clean the notebooks, export the modules; make README.md, the map of the site and the guides' pictures, in `root`.

    Cleaning gives a new cell the id that its export carries."""
    return (run('nbdev_clean', cwd=root, quiet=quiet) and run('nbdev_export', cwd=root, quiet=quiet)
            and all(run(sys.executable, root/'tools'/tool, '--root', root, cwd=root, quiet=quiet)
                    for tool in ('readme.py', 'llms.py', 'openings.py')))


def kept(root):
    "The files that must be in step, path -> bytes."
    globs = ['nbs/**/*.ipynb', f'{LIB}/**/*.py', 'nbs/llms.txt', 'nbs/guides/*.png', 'README.md', 'index_files/*']
    def generated(f): return any(o == '__pycache__' or o.startswith('.ipynb_') for o in f.parts)
    files = [f for g in globs for f in root.glob(g) if not generated(f)]
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in sorted(files)}


def diff(name, a, b, n=12):
    "The first lines that differ; nothing for a picture."
    try: a, b = a.decode().splitlines(), b.decode().splitlines()
    except UnicodeDecodeError: return ''
    lines = difflib.unified_diff(a, b, f'{name} (here)', f'{name} (made anew)', n=1, lineterm='')
    return '\n'.join(f'    {o[:160]}' for o, _ in zip(lines, range(n)))


def in_step():
    "Make everything anew from the notebooks in a scratch copy and compare: needs no git and changes nothing here."
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)/ROOT.name
        skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_proc', 'nbdev.yml')
        for d in ('nbs', LIB, 'tools'): shutil.copytree(ROOT/d, tmp/d, ignore=skip, symlinks=True)
        for f in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT/f, tmp/f)
        for f in (tmp/LIB).rglob('*.py'):
            if f.name != '__init__.py': f.unlink()  # so that a module whose notebook is gone shows up
        if not sync(tmp, quiet=True): return False
        here, anew = kept(ROOT), kept(tmp)
    bad = [o for o in sorted({*here, *anew}) if here.get(o) != anew.get(o)]
    for o in bad:
        if o not in here: print(f'  {o}: missing')
        elif o not in anew: print(f'  {o}: left over, no notebook makes it')
        else: print(f'  {o}: out of step\n{diff(o, here[o], anew[o])}')
    if bad: print(f'Bring them in step with: {FIX}   (and delete what is left over)', flush=True)
    else: print(f'{len(here)} files in step')
    return not bad


def lint():
    others = [o for o in ('tests', 'tools', 'benchmarks', 'setup.py') if (ROOT/o).exists()]
    return run('ruff', 'check', LIB, *others)


def pages(quiet=False):
    "The pages of the site, as far as Python alone can make and check them: see tools/pages.py"
    return run(sys.executable, 'tools/pages.py', quiet=quiet)


def notebooks(workers=2, *args, quiet=False):
    "The notebooks, with a share of the cores for each: see tools/notebooks.py"
    threads = str(max(1, (os.cpu_count() or 1)//2))
    command = sys.executable, 'tools/notebooks.py', '--workers', workers, *args
    return run(*command, quiet=quiet, OMP_NUM_THREADS=threads)


def tests(workers=2, *args):
    "pytest, with one thread per worker: see tests/conftest.py"
    return run(sys.executable, '-m', 'pytest', '-n', workers, '--dist', 'worksteal', *args)


def beside(step, other):
    "The results of a step, and of another beside it, which keeps the cores busy while the first begins and ends"
    with ThreadPoolExecutor() as pool:
        of_other = pool.submit(other)
        return step(), of_other.result()


def slow():
    "The slow cells beside the slow tests; of the cells, only what went wrong is printed"
    of_tests, of_cells = beside(partial(tests, 2, '-m', 'slow'), partial(notebooks, 1, '--slow', quiet=True))
    return of_tests and of_cells


def tests_and_pages(tests):
    "The pages beside the tests; of the pages, only what went wrong is printed"
    of_tests, of_pages = beside(tests, partial(pages, quiet=True))
    if not of_pages: print('FAILED: pages; what is wrong with them stands above', flush=True)
    return of_tests and of_pages


def with_slow():
    "The steps, with the slow cells of the notebooks and the slow tests among the others"
    return STEPS | {'notebooks': partial(notebooks, 2, '--all'), 'tests': partial(tests, 2, '-m', '')}


STEPS = {'ruff': lint, 'in-step': in_step, 'pages': pages, 'notebooks': notebooks, 'tests': tests}
SLOW = {'slow cells and tests': slow}


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--fix', action='store_true', help='bring modules, notebooks and README.md in step, then stop')
    p.add_argument('--only', nargs='+', choices=STEPS, default=list(STEPS), help='run these steps only')
    p.add_argument('--slow', action='store_true', help='run the slow cells and tests, and nothing else')
    p.add_argument('--all', action='store_true', help='run the steps with the slow cells and tests')
    args = p.parse_args()
    if args.fix: raise SystemExit(0 if sync(ROOT) else 1)
    every_step = with_slow() if args.all else STEPS
    steps = SLOW if args.slow else {name: every_step[name] for name in args.only}
    if {'pages', 'tests'} <= {*steps}:
        del steps['pages']
        steps['tests and pages'] = partial(tests_and_pages, steps.pop('tests'))
    failed, begun = [], time.time()
    for i, (name, step) in enumerate(steps.items(), 1):
        print(f'\n=== {name} ({i} of {len(steps)})', flush=True)
        start = time.time()
        if not step(): failed.append(name)
        print(f"--- {name}: {'FAILED' if name in failed else 'ok'} in {time.time() - start:.0f} s", flush=True)
    print(f'--- all: {time.time() - begun:.0f} s', flush=True)
    if failed: raise SystemExit(f"FAILED: {', '.join(failed)}")


if __name__ == '__main__': main()
