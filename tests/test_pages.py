"""The check of the pages finds what it is there for, on pages that are broken in one way each."""
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('tools_pages', ROOT/'tools'/'pages.py')
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)

FRONT = dict(cell_type='raw', source='---\ntitle: {name}\ndescription: What it is.\noutput-file: {name}.html\n---\n')
SITE = 'https://antehoc-nb.github.io/antehoc_nb'
REPOSITORY = 'https://github.com/antehoc-nb/antehoc_nb'


def page(*cells, name='one'):
    return dict(cells=[{**FRONT, 'source': FRONT['source'].format(name=name)}, *cells])


def prose(text): return dict(cell_type='markdown', source=text)


def code(text, **data):
    return dict(cell_type='code', source=text, outputs=[dict(output_type='display_data', data=data)] if data else [])


def faults(folder, monkeypatch, **notebooks):
    monkeypatch.setattr(pages, 'SEARCHED', ())
    for name, notebook in notebooks.items():
        path = folder/f'{name.replace("__", "/")}.ipynb'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(notebook))
    return pages.faults_of(folder, ROOT)


WHOLE = page(
    prose('## The `f` of it\n\n[here](#the-f-of-it), [there](two.ipynb#f), [too](sub/three.html), [out](https://a.b)'),
    prose(f'[`f`]({SITE}/two.html#f) [code]({REPOSITORY}/blob/main/settings.ini) ![a map](picture.png)'),
    prose('[Colab](https://colab.research.google.com/github/antehoc-nb/antehoc_nb/blob/main/nbs/index.ipynb)'),
    prose('`[no](link.ipynb)`\n\n```\n[nor](this.ipynb)\n```'),
    code('#| fig-alt: "A map."\nplot()', **{'image/png': ''}),
    code(f'#| code-fold: true\n{"x" * 100}'), code('#| echo: false\n' + 'x' * 100))
ENTRY = code('#| echo: false\n#| output: asis\nshow_doc(f)', **{'text/markdown': ['### f {#f}\n', 'text']})
OTHER = page(ENTRY, name='two')


def test_whole_pages_pass(tmp_path, monkeypatch):
    (tmp_path/'picture.png').write_bytes(b'')
    assert faults(tmp_path, monkeypatch, one=WHOLE, two=OTHER, sub__three=page(name='three')) == []


@pytest.mark.parametrize('cell, fault', [
    (prose('[a](nowhere.ipynb)'), 'one.ipynb: nowhere.ipynb: no such page'),
    (prose('[a](#nothing)'), 'one.ipynb: #nothing: no such place on the page'),
    (prose(f'[`g`]({SITE}/two.html#g)'), f'one.ipynb: {SITE}/two.html#g: no such place on the page'),
    (prose(f'[a]({REPOSITORY}/blob/main/gone.py)'), f'one.ipynb: {REPOSITORY}/blob/main/gone.py: no such file in the '
                                                    'repository'),
    (prose('<a href="gone.html">a</a>'), 'one.ipynb: gone.html: no such page'),
    (prose('[the [`f`](https://a.b/#f) page](two.ipynb)'), "one.ipynb: a link that shows as text: 'page](two.ipynb)'"),
    (prose('```python\ndef f(x): # [`g`](https://a.b)\n```'),
     "one.ipynb: a link that shows as text: 'def f(x): # [`g`](https://a.b)'"),
    (prose('![](https://a.b/c.png)'), 'one.ipynb: a picture without alt text: https://a.b/c.png'),
    (code('plot()', **{'image/png': ''}), "one.ipynb: a figure without `#| fig-alt:`, drawn by 'plot()'"),
    (code('show()', **{'text/html': '<img src="a.png">'}), "one.ipynb: a picture without alt text, by 'show()'"),
    (code(f'if x:\n    {"y" * 80}'), f"one.ipynb: 84 columns of code, more than 78: '{'y' * 60}'"),
    (dict(cell_type='raw', source='---\nand more: prose\n---'),
     "one.ipynb: the title cell holds prose, which would be lost: 'and more'"),
])
def test_a_broken_page_is_named(cell, fault, tmp_path, monkeypatch):
    assert faults(tmp_path, monkeypatch, one=page(cell), two=OTHER) == [fault]


def test_two_notebooks_with_one_address(tmp_path, monkeypatch):
    assert faults(tmp_path, monkeypatch, a=page(), b=page()) == ['one.html: 2 notebooks make this page']


def test_words_that_people_look_for(tmp_path):
    (tmp_path/'one.ipynb').write_text(json.dumps(page(prose('A Pretrained ResNet50 on your own images'))))
    assert pages.faults_of(tmp_path, ROOT) == []
    (tmp_path/'one.ipynb').write_text(json.dumps(page(prose('A pretrained ResNet50'))))
    assert pages.faults_of(tmp_path, ROOT) == ["no page has the words 'own images'"]


@pytest.mark.parametrize('heading, anchor', [
    ('Eq. 1: the map', 'eq.-1-the-map'), ("SENN's robustness term", 'senns-robustness-term'),
    ('3. The `explain_many` way', 'the-explain_many-way'), ('A [link](x.html) in it', 'a-link-in-it'),
])
def test_anchors_are_those_of_pandoc(heading, anchor): assert pages.slug(heading) == anchor


def test_the_links_of_a_rendered_site(tmp_path):
    (tmp_path/'sub').mkdir()
    body = '<h2 id="x">x</h2><a href="../index.html#top">a</a> <a href="#x">b</a> <img src="../p.png" alt="">'
    (tmp_path/'sub'/'a.html').write_text(body)
    (tmp_path/'index.html').write_text('<h1 id="top">t</h1><a href="sub/a.html#x">a</a>')
    (tmp_path/'p.png').write_bytes(b'')
    assert pages.faults_of_html(tmp_path, ROOT) == []
    (tmp_path/'index.html').write_text('<a href="sub/a.html#y">a</a><a href="sub/b.html">b</a><img src="p.png">')
    assert pages.faults_of_html(tmp_path, ROOT) == [
        'index.html: a picture without alt text: p.png', 'index.html: sub/a.html#y: no such place on the page',
        'index.html: sub/b.html: no such page', 'sub/a.html: ../index.html#top: no such place on the page']
    shutil.rmtree(tmp_path/'sub')
    (tmp_path/'index.html').unlink()
    assert pages.faults_of_html(tmp_path, ROOT) == [f'{tmp_path}: no pages']


@pytest.mark.slow
def test_a_notebook_becomes_a_page(tmp_path):
    "One broken notebook in a copy of the repository: nbdev makes its page, and the check names the fault."
    pytest.importorskip('nbdev')
    root, scratch = tmp_path/'copy', tmp_path/'scratch'
    for folder in (root/'nbs', scratch): folder.mkdir(parents=True)
    shutil.copytree(ROOT/'antehoc_nb', root/'antehoc_nb', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT/name, root/name)
    cells = [prose('# A page\n\n> What it is.'), prose('See [`masked`](gone.ipynb) and `masked`.'),
             dict(code('x = f(' + ', '.join('abcdefgh' * 4) + ')'), metadata={}, execution_count=None),
             dict(code('plot()', **{'image/png': ''}), metadata={}, execution_count=None)]
    for cell in cells: cell.setdefault('metadata', {})
    notebook = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    (root/'nbs'/'01_page.ipynb').write_text(json.dumps(notebook))
    folder, said = pages.make(root, scratch, workers=0)
    assert said == ''
    found = [fault for fault in pages.faults_of(folder, root) if 'no page has the words' not in fault]
    place = f'{SITE}/core/masking.html#masked'
    assert found == ["01_page.ipynb: a figure without `#| fig-alt:`, drawn by 'plot()'",
                     '01_page.ipynb: gone.ipynb: no such page', f'01_page.ipynb: {place}: no such page']
