"""The house rules: one Quarto configuration, every page in the sidebar, small modules and notebooks, numbers that flow forward."""
import ast
import json
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import antehoc_nb

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(o for o in NBS.rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(NBS).parts))
MODULES = sorted(o for o in (ROOT/'antehoc_nb').rglob('*.py') if o.name[0] != '_')


def config():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']


def pages(contents):
    for o in contents:
        if isinstance(o, str): yield o
        else: yield from ([o['href']] if 'href' in o else []) + list(pages(o.get('contents', [])))


def test_one_quarto_configuration():
    assert (NBS/'_quarto.yml').is_symlink() and (NBS/'_quarto.yml').resolve() == ROOT/'_quarto.yml'
    assert [o for o in ROOT.rglob('_quarto.yml') if '_proc' not in o.parts and not o.is_symlink()] == [ROOT/'_quarto.yml']


def test_sidebar_lists_every_notebook_in_order():
    listed = list(pages(yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']['sidebar']['contents']))
    assert sorted(listed) == sorted(o.relative_to(NBS).as_posix() for o in NOTEBOOKS)
    numbered = [o for o in listed if re.match(r'\d\d_', o)]
    assert listed[0] == 'index.ipynb' and numbered == sorted(numbered)


def test_version_is_told_once():
    version = config()['version']
    assert antehoc_nb.__version__ == version
    assert re.search(rf'^## {re.escape(version)}\b', (ROOT/'CHANGELOG.md').read_text(), flags=re.M)


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda o: o.name)
def test_notebook_is_executed_small_and_without_errors(nb):
    assert nb.stat().st_size < 2e6
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    assert ''.join(cells[0]['source']).startswith(('# ', '---'))
    outputs = [o for c in cells for o in c.get('outputs', [])]
    assert not [o['ename'] for o in outputs if o['output_type'] == 'error']
    assert outputs, 'run the notebook before saving it'


@pytest.mark.parametrize('nb', [o for o in NOTEBOOKS if o.name != 'index.ipynb'], ids=lambda o: o.name)
def test_imports_stand_alone(nb):
    "To make the docs, nbdev runs the cells with imports and no others: below the first ones they must hold nothing else."
    def kinds(c): return [isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(''.join(c['source'])).body]
    cells = [c for c in json.loads(nb.read_text(encoding='utf-8'))['cells'][6:] if c['cell_type'] == 'code']
    mixed = [c['id'] for c in cells if '#| export' not in ''.join(c['source']) and 'nbdev_export(' not in ''.join(c['source']) and len(set(kinds(c))) > 1]
    assert not mixed


@pytest.mark.parametrize('module', MODULES, ids=lambda o: o.name)
def test_module_is_small_and_imports_earlier_pages_only(module):
    "Earlier means a lower number, or the same number and an earlier name: `00_data` before `00_files`."
    code = module.read_text(encoding='utf-8')
    assert len([o for o in code.splitlines() if o.strip() and not o.startswith('#')]) <= 275
    page = {m.stem: n[1] for m in MODULES if (n := re.search(r'File to edit: \S*?(\d\d_\w+)\.ipynb', m.read_text(encoding='utf-8')))}
    later = [o for o in re.findall(r'^\s*from \.(\w+) import', code, flags=re.M) if page.get(o, '') >= page.get(module.stem, '~')]
    assert not later


@pytest.mark.parametrize('record', sorted(Path(__file__).parents[1].glob('results/classification/*-cpu.json')), ids=lambda o: o.stem)
def test_readme_has_the_numbers_of_the_records(record):
    "The page that becomes the README was executed after the last measurement."
    from antehoc_nb.classification import ASKED, CRITERIA, read_classification, verdict
    b = read_classification(record.stem.removesuffix('-cpu'), 'cpu', record.parents[1])
    drop = b.pivot(('average_drop',), ('top 20%',), ('cnn',)).iloc[:, 0]
    told_nothing, asked = ((verdict(b, o).ahead == 3).sum() for o in ('ante-hoc', ASKED))
    title, count = b.record['config']['title'], f'{told_nothing} and {asked} of {len(CRITERIA)}'
    rows = [[c.strip() for c in o.split('|')] for o in (record.parents[2]/'README.md').read_text().splitlines() if o.startswith(f'| {title} | ')]
    assert [f'{drop["ante-hoc"]:.1f}', f'{drop[ASKED]:.1f}', count] in [[*r[3:5], r[-2]] for r in rows]
