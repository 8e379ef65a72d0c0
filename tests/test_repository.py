"""The house rules: one Quarto configuration, every page in the sidebar, unique pages, imports that only go forward."""
import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import antehoc_nb

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
PACKAGE = ROOT/'antehoc_nb'
NOTEBOOKS = sorted(o for o in NBS.rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(NBS).parts))
MODULES = sorted(o for o in PACKAGE.rglob('*.py') if o.name[0] != '_')


def config():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']


def pages(contents):
    for o in contents:
        if isinstance(o, str): yield o
        else: yield from ([o['href']] if 'href' in o else []) + list(pages(o.get('contents', [])))


def cells(notebook): return json.loads(notebook.read_text(encoding='utf-8'))['cells']


def source(cell): return ''.join(cell['source'])


def number(path):
    "The number in front of a notebook's name"
    found = re.match(r'(\d\d)_', path.name)
    return int(found[1]) if found else None


def module_numbers():
    "Module, such as 'core.layers' -> the number of its notebook"
    found = {}
    for notebook in NOTEBOOKS:
        exports = [re.search(r'^#\| *default_exp +(\S+)', source(c), flags=re.M) for c in cells(notebook)]
        for name in filter(None, exports): found[name[1]] = number(notebook)
    return found


NUMBERS = module_numbers()


def imported_modules(tree, package):
    """Every module of this library that a syntax tree imports, as 'core.layers': relative and absolute imports, also
    inside functions, and `import_module('antehoc_nb....')`. `package` is where a relative import starts, such as
    ('antehoc_nb', 'core')."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[:len(package) - node.level + 1] if node.level else ()
            base = '.'.join((*start, *([node.module] if node.module else [])))
            names = [base, *(f'{base}.{alias.name}' for alias in node.names)]
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith('import_module'):
            constants = [o.value for o in ast.walk(node.args[0]) if isinstance(o, ast.Constant)]
            names = [o for o in constants if isinstance(o, str)]
        else: continue
        for name in names:
            inside = name.removeprefix('antehoc_nb.')
            if inside in NUMBERS: yield inside


def test_one_quarto_configuration():
    assert (NBS/'_quarto.yml').is_symlink() and (NBS/'_quarto.yml').resolve() == ROOT/'_quarto.yml'
    files = [o for o in ROOT.rglob('_quarto.yml') if '_proc' not in o.parts and not o.is_symlink()]
    assert files == [ROOT/'_quarto.yml']


def test_sidebar_lists_every_notebook_in_order():
    "By folder; how the pages are made stands with what contributors read."
    listed = list(pages(yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']['sidebar']['contents']))
    assert sorted(listed) == sorted(o.relative_to(NBS).as_posix() for o in NOTEBOOKS)
    numbered = [(Path(o).parent, number(Path(o))) for o in listed if o != '89_pages.ipynb']
    numbered = [(folder, n) for folder, n in numbered if n is not None]
    for folder in {folder for folder, _ in numbered}:
        numbers = [n for parent, n in numbered if parent == folder]
        assert numbers == sorted(numbers)
    assert listed[0] == 'index.ipynb' and Path(listed[1]).parent.name == 'guides'


def test_numbers_and_pages_are_unique():
    "nbdev strips the numbers from the names of pages, so two notebooks of one folder could end as one page."
    numbers = [number(o) for o in NOTEBOOKS if number(o) is not None and 'guides' not in o.parts]
    assert len(numbers) == len(set(numbers))
    pages = [o.relative_to(NBS).with_suffix('.html').as_posix() for o in NOTEBOOKS]
    addresses = [re.sub(r'(^|/)\d+[a-z]?_', r'\1', page) for page in pages]
    assert len(addresses) == len(set(addresses))


def test_folders_are_mirrored_in_the_package():
    "One notebook, one module, one page: `nbs/core/01_layers.ipynb` is `antehoc_nb/core/layers.py`."
    for notebook in NOTEBOOKS:
        names = [m[1] for c in cells(notebook) if (m := re.search(r'^#\| *default_exp +(\S+)', source(c), flags=re.M))]
        where = notebook.relative_to(NBS).with_suffix('')
        want = '.'.join((*where.parts[:-1], re.sub(r'^\d\d_', '', where.name)))
        assert names == ([want] if number(notebook) is not None and 'guides' not in where.parts else []), notebook
    modules = [o.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.') for o in MODULES]
    assert sorted(NUMBERS) == sorted(modules)


@pytest.mark.parametrize('module', MODULES, ids=lambda o: o.relative_to(PACKAGE).as_posix())
def test_imports_go_forward(module):
    "A module imports from notebooks with lower numbers only, wherever in the file the import stands."
    parts = module.relative_to(ROOT).with_suffix('').parts
    own = NUMBERS['.'.join(parts[1:])]
    imported = imported_modules(ast.parse(module.read_text(encoding='utf-8')), parts[:-1])
    assert not [o for o in imported if NUMBERS[o] >= own]


@pytest.mark.parametrize('code, found', [
    ('from .layers import x', ['core.layers']),
    ('from . import layers', ['core.layers']),
    ('from ..train import archs', ['train.archs']),
    ('def f():\n    import antehoc_nb.cli', ['cli']),
    ('from antehoc_nb.data.images import *', ['data.images']),
    ("import_module(f'antehoc_nb.cli')", ['cli']), ('import torch\nfrom fastai.layers import y', []),
])
def test_the_search_for_imports_sees_every_kind(code, found):
    assert list(imported_modules(ast.parse(code), ('antehoc_nb', 'core'))) == found


@pytest.mark.parametrize('module', MODULES, ids=lambda o: o.relative_to(PACKAGE).as_posix())
def test_nothing_with_an_underscore_is_imported(module):
    tree = ast.parse(module.read_text(encoding='utf-8'))
    imports = [o for o in ast.walk(tree) if isinstance(o, ast.ImportFrom)]
    own = [o for o in imports if o.level or (o.module or '').startswith('antehoc_nb')]
    assert not [a.name for o in own for a in o.names if re.match('_[^_]', a.name)]


@pytest.mark.parametrize('module', MODULES, ids=lambda o: o.relative_to(PACKAGE).as_posix())
def test_lines_hold_120_columns(module):
    "But for `__all__`, which nbdev lays out."
    code = module.read_text(encoding='utf-8')
    laid_out = [o for o in ast.parse(code).body if isinstance(o, ast.Assign) and ast.unparse(o.targets[0]) == '__all__']
    skip = {line for o in laid_out for line in range(o.lineno, o.end_lineno + 1)}
    assert not [n for n, line in enumerate(code.split('\n'), 1) if len(line) > 120 and n not in skip]


def test_the_core_needs_neither_fastai_nor_torchvision():
    heavy = 'fastai', 'torchvision', 'pandas', 'matplotlib'
    code = f'import sys, antehoc_nb.core.model; print(sorted({{*{heavy}}} & {{*sys.modules}}))'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == '[]'


def test_version_is_told_once():
    version = config()['version']
    assert antehoc_nb.__version__ == version
    assert re.search(rf'^## {re.escape(version)}\b', (ROOT/'CHANGELOG.md').read_text(), flags=re.M)
    navbar = yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']['navbar']['right']
    assert f'v{version}' in [o.get('text') for o in navbar]


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda o: o.relative_to(NBS).as_posix())
def test_notebook_is_executed_small_and_without_errors(nb):
    assert nb.stat().st_size < 2e6
    assert source(cells(nb)[0]).startswith(('# ', '---'))
    outputs = [o for c in cells(nb) for o in c.get('outputs', [])]
    assert not [o['ename'] for o in outputs if o['output_type'] == 'error']
    assert outputs or nb.name == '91_all.ipynb', 'run the notebook before saving it'


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda o: o.relative_to(NBS).as_posix())
def test_the_title_stands_alone(nb):
    "nbdev makes the title of a page from the cell with the heading, and drops what else is in that cell."
    title = source(cells(nb)[0])
    assert title.startswith('---') or re.fullmatch(r'# .+(\n+> .+)?', title.strip())


@pytest.mark.parametrize('nb', [o for o in NOTEBOOKS if o.name != 'index.ipynb'],
                         ids=lambda o: o.relative_to(NBS).as_posix())
def test_imports_stand_alone(nb):
    "To make the docs, nbdev runs the cells with imports and no others: below the first ones they hold nothing else."
    def python(c): return re.sub(r'^[!%].*', '', source(c), flags=re.M)  # without commands of the shell and of Jupyter
    def kinds(c): return [isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(python(c)).body]
    later = [c for c in cells(nb)[6:] if c['cell_type'] == 'code']
    later = [c for c in later if '#| export' not in source(c) and 'nbdev_export(' not in source(c)]
    assert not [c['id'] for c in later if len(set(kinds(c))) > 1]


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda o: o.relative_to(NBS).as_posix())
def test_links_between_notebooks_lead_somewhere(nb):
    text = ''.join(source(c) for c in cells(nb) if c['cell_type'] == 'markdown')
    links = re.findall(r'\]\(([^)#:\s]+\.ipynb)', text)
    assert not [o for o in links if not (nb.parent/o).resolve().exists()]


@pytest.mark.parametrize('record', sorted(ROOT.glob('results/classification/*-cpu.json')), ids=lambda o: o.stem)
def test_readme_has_the_numbers_of_the_records(record):
    "The page that becomes the README was executed after the last measurement."
    from antehoc_nb.tasks.classification import CLASS_SPECIFIC, CRITERIA, read_classification, verdict
    b = read_classification(record.stem.removesuffix('-cpu'), 'cpu', record.parents[1])
    drop = b.pivot(('average_drop',), ('top 20%',), ('cnn',)).iloc[:, 0]
    ahead = [(verdict(b, o).ahead == 3).sum() for o in ('ante-hoc', CLASS_SPECIFIC)]
    title, count = b.record['config']['title'], f'{ahead[0]} and {ahead[1]} of {len(CRITERIA)}'
    readme = (ROOT/'README.md').read_text().splitlines()
    rows = [[c.strip() for c in o.split('|')] for o in readme if o.startswith(f'| {title} | ')]
    assert [f'{drop["ante-hoc"]:.1f}', f'{drop[CLASS_SPECIFIC]:.1f}', count] in [[*r[3:5], r[-2]] for r in rows]
