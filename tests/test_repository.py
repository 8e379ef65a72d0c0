"""The house rules: one Quarto configuration, every page in the sidebar, unique pages, imports that only go forward; and
what strangers see first: README, metadata of the package, citation, map of the site."""
import ast
import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager

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


def test_cells_that_testing_leaves_out_are_python():
    "Such as those that install the package on Colab."
    left_out = [(nb, cell) for nb in NOTEBOOKS for cell in cells(nb) if cell['cell_type'] == 'code'
                and re.search(r'^#\| *(eval: false|notest|slow)', source(cell), flags=re.M)]
    assert left_out
    for nb, cell in left_out:
        ast.parse(TransformerManager().transform_cell(source(cell)), f'{nb.name}, cell {cell["id"]}')


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda o: o.relative_to(NBS).as_posix())
def test_links_between_notebooks_lead_somewhere(nb):
    text = ''.join(source(c) for c in cells(nb) if c['cell_type'] == 'markdown')
    links = re.findall(r'\]\(([^)#:\s]+\.ipynb)', text)
    assert not [o for o in links if not (nb.parent/o).resolve().exists()]


def markdown_of(notebook):
    "Position of a code cell -> what it shows as markdown"
    shown = {}
    for i, cell in enumerate(cells(notebook)):
        data = [output.get('data', {}) for output in cell.get('outputs', [])]
        found = [''.join(o['text/markdown']) for o in data if 'text/markdown' in o]
        if found: shown[i] = found
    return shown


def made_anew(notebook):
    """The same, made by running the cells now: all but slow ones. A cell's last expression is what it shows, as in
    Jupyter; pictures are not displayed."""
    import IPython.display
    namespace, shown = {'__name__': '__main__'}, {}
    where, real = os.getcwd(), IPython.display.display
    os.chdir(notebook.parent)
    IPython.display.display = lambda *args, **kwargs: None
    try:
        for i, cell in enumerate(cells(notebook)):
            if cell['cell_type'] != 'code' or re.search(r'^#\| *(slow|notest)', source(cell), flags=re.M): continue
            tree = ast.parse(source(cell))
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            where_from, value = f'{notebook.name}[{i}]', None
            exec(compile(tree, where_from, 'exec'), namespace)
            if last: value = eval(compile(ast.Expression(last.value), where_from, 'eval'), namespace)
            if hasattr(value, '_repr_markdown_'): shown[i] = [value._repr_markdown_()]
    finally:
        IPython.display.display = real
        os.chdir(where)
    return shown


@pytest.mark.parametrize('name, at_least', [('index', 2), ('results', 8)])
def test_tables_have_the_numbers_of_the_records(name, at_least):
    "The home page, which becomes the README, and the page of all results were executed after the last measurement."
    notebook = NBS/f'{name}.ipynb'
    shown = markdown_of(notebook)
    assert len(shown) >= at_least
    assert made_anew(notebook) == shown


@pytest.mark.parametrize('record', sorted(ROOT.glob('results/classification/*-cpu.json')), ids=lambda o: o.stem)
def test_results_page_has_the_numbers_of_the_records(record):
    "Computed apart from the page."
    from antehoc_nb.tasks.classification import CLASS_SPECIFIC, CRITERIA, read_classification, verdict
    b = read_classification(record.stem.removesuffix('-cpu'), 'cpu', record.parents[1])
    drop = b.pivot(('average_drop',), ('top 20%',), ('cnn',)).iloc[:, 0]
    ahead = [(verdict(b, o).ahead == 3).sum() for o in ('ante-hoc', CLASS_SPECIFIC)]
    title, count = b.record['config']['title'], f'{ahead[0]} and {ahead[1]} of {len(CRITERIA)}'
    page = '\n'.join(text for found in markdown_of(NBS/'results.ipynb').values() for text in found).splitlines()
    rows = [[c.strip() for c in o.split('|')] for o in page if o.startswith(f'| {title} | ')]
    assert [f'{drop["ante-hoc"]:.1f}', f'{drop[CLASS_SPECIFIC]:.1f}', count] in [[*r[3:5], r[-2]] for r in rows]


def test_readme_has_the_numbers_of_the_records():
    "Computed apart from the page: the one table of the README, and what it says of costs."
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    records = sorted(ROOT.glob('results/classification/*-transfer.json'))
    assert len(records) > 1
    for file in records:
        record = json.loads(file.read_text())
        results, cells = record['results'], {}
        for scores in (results, results['slow']):  # Score-CAM was scored on some of the images
            for cell in (dict(zip(scores['columns'], row)) for row in scores['rows']):
                if (cell['scorer'], cell['masks'], cell['metric']) == ('cnn', 'top 20%', 'average_drop'):
                    cells.setdefault(cell['explainer'], []).append(f"{cell['value']:.1f}")
        ours, on_same = cells['ante-hoc, class-specific']
        row = [record['config']['title'], f"{results['runs'][0]['accuracy']:.2f}", ours, *cells['grad-cam'],
               *cells['tame'], f"{cells['score-cam'][0]} (ours {on_same})", min(*cells['random'], *cells['gaussian'])]
        assert f"| {' | '.join(row)} | " in readme
    record = json.loads((ROOT/'results/benchmarks/explain-amd-epyc.json').read_text())
    ratios = [case['explain']['ratio'] for case in record['results']['cells'] if case['threads'] == 1]
    assert f'prediction and map {min(ratios):.2f} to {max(ratios):.2f}' in readme


def test_readme_is_short():
    "Words of prose, tables, code and links together; pictures small, and said in words."
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    assert len(readme.split()) <= 700
    pictures = re.findall(r'!\[([^\]]*)\]\(([^)]+)\)', readme)
    assert len(pictures) == 1
    for said, file in pictures: assert len(said) > 40 and (ROOT/file).stat().st_size < 4e5


def readme_code():
    "The Python fences of the README"
    return re.findall(r'^```python\n(.*?)^```', (ROOT/'README.md').read_text(encoding='utf-8'), flags=re.S | re.M)


def test_recipes_of_the_readme_are_short():
    "At most six lines beside imports and blank ones; everything that is called exists."
    for code in readme_code():
        lines = [o for o in code.splitlines() if o.strip() and not o.startswith('from ')]
        assert len(lines) <= 6 and max(map(len, lines)) <= 78
    assert [code for code in readme_code() if 'fine_tune' in code]


@pytest.mark.slow
def test_recipes_of_the_readme_run(tmp_path, monkeypatch, one_thread):
    """In the order of the README, on small photographs made here, with a CNN of random weights (the recipe downloads
    them) and small images. The last one, which needs no photographs, is what CI runs from the wheel alone."""
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    for name, red in (('blue', 0), ('red', 200)):
        (tmp_path/'photos'/name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 56, (40, 40, 3)) + np.array([red, 0, 200 - red])
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path/'photos'/name/f'{i}.png')
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path/'cat.jpg')
    monkeypatch.chdir(tmp_path)
    fine_tune, trained, one_file, example = readme_code()
    namespace = {}
    small = fine_tune.replace('Resize(224)', 'Resize(64), bs=8, num_workers=0')
    small = small.replace('resnet18,', 'resnet18, pretrained=False,')
    exec(small.replace('fine_tune(3)', 'fine_tune(1)'), namespace)
    namespace['cnn'] = namespace['learn'].model.cnn
    before = namespace['weights_digest'](namespace['cnn'])
    exec(trained.replace('cycle(3)', 'cycle(1)'), namespace)
    assert namespace['weights_digest'](namespace['cnn']) == before
    exec(one_file, {})
    assert Image.open('overlay.png').size == (40, 40)
    assert 'photo_digits_dls' in example


def metadata(tmp_path):
    "What the wheel says of itself, made as pip makes it"
    pytest.importorskip('setuptools')
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'):
        shutil.copy(ROOT/name, tmp_path)
    (tmp_path/'made').mkdir()
    code = 'from setuptools.build_meta import prepare_metadata_for_build_wheel as make; make("made")'
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, check=True)
    return email.message_from_string(next(tmp_path.glob('made/*.dist-info/METADATA')).read_text(encoding='utf-8'))


def test_metadata_shows_well_on_a_package_index(tmp_path):
    made, cfg = metadata(tmp_path), config()
    assert (made['Name'].replace('-', '_'), made['Version'], made['Summary']) == (
        cfg['lib_name'], cfg['version'], cfg['description'])
    assert made['Description-Content-Type'].startswith('text/markdown')
    text = made.get_payload()
    targets = re.findall(r'\]\(([^)\s]+)', text)
    assert len(targets) > 15
    assert not [o for o in targets if not o.startswith(('https://', '#'))], 'an index has no files to link to'
    assert re.search(r'!\[[^\]]+\]\(https://raw\.githubusercontent\.com/\S+\.png\)', text)
    for fence in readme_code(): assert fence in text
    links = dict(o.split(', ') for o in made.get_all('Project-URL'))
    assert {'Documentation', 'Source', 'Issues', 'Changelog', 'Paper'} <= {*links}
    classifiers = made.get_all('Classifier')
    assert 'Typing :: Typed' in classifiers and 'Intended Audience :: Science/Research' in classifiers
    assert f"Programming Language :: Python :: {cfg['min_python']}" in classifiers
    assert 'explainability' in made['Keywords'] and 'Apache-2.0' in (made['License-Expression'] or made['License'])


def test_the_package_says_that_it_has_types():
    assert (PACKAGE/'py.typed').exists() and 'py.typed' in config()['package_data'].split()


def test_citation_names_this_version_and_the_paper():
    cited, cfg = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8')), config()
    same = {'title': 'title', 'version': 'version', 'repository-code': 'git_url', 'url': 'doc_host'}
    assert all(cited[name].startswith(cfg[setting]) for name, setting in same.items())
    assert cited['version'] == cfg['version']
    assert cited['abstract'] == f"{cfg['description']}." and cited['license'] == 'Apache-2.0'
    paper, = cited['references']
    assert paper['type'] == 'conference-paper' and paper['url'] == cfg['paper_url'] and len(paper['authors']) == 3


def tool(name):
    "A script in tools/ as a module"
    spec = importlib.util.spec_from_file_location(name, ROOT/'tools'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_llms_txt_maps_the_site():
    "Every page but the home page, with the title and the sentence of its notebook; published by Quarto."
    llms = tool('llms')
    text = (NBS/'llms.txt').read_text(encoding='utf-8')
    assert text == llms.make(ROOT), 'make it anew: python tools/check.py --fix'
    assert text.count('\n- [') == len(NOTEBOOKS) - 1
    assert 'llms.txt' in yaml.safe_load((ROOT/'_quarto.yml').read_text())['project']['resources']


@pytest.mark.parametrize('page, address', [
    ('core/01_layers.ipynb', 'core/layers.html'), ('results.ipynb', 'results.html'), ('90_cli.ipynb', 'cli.html')])
def test_addresses_of_pages(page, address):
    assert tool('llms').address(page) == address


def test_contributing_is_one_screen():
    assert len((ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8').split()) <= 400


def table_of(notebook):
    "The first table in the prose of a notebook: its header, and its rows, as lists of cells"
    prose = (source(c) for c in cells(notebook) if c['cell_type'] == 'markdown')
    lines = next(found for text in prose if (found := [o for o in text.splitlines() if o.startswith('|')]))
    rows = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in lines]
    return rows[0], rows[2:]


def test_words_are_sorted_linked_and_complete():
    header, rows = table_of(NBS/'guides'/'07_words.ipynb')
    assert {len(row) for row in rows} == {len(header)} == {4}
    words = [re.fullmatch(r'\[([^\]]+)\]\(\S+\)', row[0])[1] for row in rows]
    assert words == sorted(words, key=str.lower) and all(row[3] for row in rows)
    needed = """aligned, baseline, class-agnostic, class-specific, control, DatasetSpec, evaluator, exclude, frozen,
        map history, masked input, notebook, prediction, resized, subsample, target, wrong-target control,
        interpretation map, soft attention map, weight map, weight network, energy map, interpretation loss, eta"""
    assert not {' '.join(word.split()) for word in needed.split(',')} - {*words}


def test_each_cell_beside_other_libraries_has_its_source():
    header, rows = table_of(NBS/'guides'/'09_beside_others.ipynb')
    assert header == ['', 'antehoc_nb', 'torchcam', 'pytorch-grad-cam', 'captum', 'TAME']
    assert len(rows) > 10 and {len(row) for row in rows} == {6}
    for feature, ours, *others in rows:
        assert re.search(r'\]\((\.\./|https://github\.com/antehoc-nb)', ours), feature
        assert not [cell for cell in others if cell != '–' and '](https://' not in cell], feature
