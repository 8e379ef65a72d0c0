"""Make the pages of the site without Quarto and check them: links, anchors, names, figures, width of code, warnings.

`python tools/pages.py` lets nbdev turn the notebooks into pages in a scratch copy, which is the part of `nbdev_docs`
that needs Python alone. `--html _docs` checks the links of a site that Quarto has rendered. Exits with 1 at a fault.
"""
import argparse
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from configparser import ConfigParser
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 78  # columns of code on a page
KEYS = {'title', 'description', 'output-file', 'toc', 'order', 'image', 'categories'}
SEARCHED = ('pretrained', 'own images', 'ResNet50')  # what people look for, each to be found on some page
# `nbdev_proc_nbs` would look for Quarto first and, finding none, install it
# The library comes first, so that the workers, forked from there, have it.
MAKE = 'import antehoc_nb.all; from nbdev.quarto import refresh_quarto_yml; from nbdev.serve import proc_nbs; ' \
       'refresh_quarto_yml(); proc_nbs(n_workers={workers})'


def config(root=ROOT):
    found = ConfigParser(delimiters=['='])
    found.read(root/'settings.ini', encoding='utf-8')
    return found['DEFAULT']


def text(o): return o if isinstance(o, str) else ''.join(o)


def directives(source): return re.match(r'(?:#\|.*(?:\n|$))*', source)[0]


def directive(source, key):
    "The value of `#| key: value`, '' if there is none"
    found = re.search(rf'^#\| *{key}: *(.*)$', directives(source), flags=re.M)
    return found[1].strip().strip('"\'') if found else ''


def slug(heading):
    "The anchor that pandoc makes of a heading in markdown"
    plain = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', re.sub(r'\{[^}]*\}\s*$', '', heading))
    plain = re.sub(r'[^\w\s.-]', '', re.sub(r'<[^>]*>', '', plain).replace('`', '')).lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', plain.strip())) or 'section'


def links_in(markdown):
    "The links and pictures of some markdown, as (address, alt text or None for a link), and links that went wrong"
    found, raw = [], []
    def walk(tokens):
        for token in tokens:
            if token.type == 'link_open': found.append((token.attrGet('href'), None))
            if token.type == 'image': found.append((token.attrGet('src'), token.content))
            if token.type in ('html_block', 'html_inline'):
                found.extend((address, None) for address in re.findall(r'(?:href|src)="([^"]*)"', token.content))
            if token.type == 'text' and re.search(r'\]\(\S', token.content): raw.append(token.content.strip())
            if token.type == 'fence' and '](http' in token.content: raw.append(token.content.strip().split('\n')[0])
            walk(token.children or [])
    walk(MarkdownIt('commonmark').enable('table').parse(re.sub(r'\]\(([^)]*)\)\{[^}]*\}', r'](\1)', markdown)))
    return found, raw


class Page:
    "A page: its address, the anchors on it, its links, and what is wrong with its cells."
    def __init__(self, path, notebook):
        self.path = PurePosixPath(path)
        self.faults, self.links, self.words = [], [], []
        front = {}
        markdown = []
        for cell in notebook['cells']:
            source = text(cell['source'])
            if cell['cell_type'] == 'raw': front |= yaml.safe_load(source.strip().strip('-')) or {}
            elif cell['cell_type'] == 'markdown': markdown.append(source)
            else: markdown += self._code(source, cell.get('outputs', []))
        self.address = str(self.path.with_name(front.get('output-file', self.path.stem + '.html')))
        self.words = ' '.join([str(front.get('title')), *markdown])
        for key in sorted(front.keys() - KEYS):
            self._fault(f'the title cell holds prose, which would be lost: {key[:40]!r}')
        if not front.get('title'): self._fault('no title')
        for part in markdown: self._markdown(part)
        self.anchors = self._anchors(markdown)

    def _fault(self, what): self.faults.append(f'{self.path}: {what}')

    def _code(self, source, outputs):
        "Check a cell; the markdown that it shows"
        shown = [o for o in outputs if directive(source, 'output') != 'false']
        data = [o['data'] for o in shown if 'data' in o]
        code = source[len(directives(source)):].strip('\n')
        first = (code.split('\n') + [''])[0][:50]
        if any(kind.startswith('image/') for o in data for kind in o) and not directive(source, 'fig-alt'):
            self._fault(f'a figure without `#| fig-alt:`, drawn by {first!r}')
        is_seen = directive(source, 'echo') != 'false' and directive(source, 'code-fold') != 'true'
        for line in code.split('\n') if is_seen else []:
            if len(line) > WIDTH: self._fault(f'{len(line)} columns of code, more than {WIDTH}: {line.strip()[:60]!r}')
        for shown in [text(o['text/html']) for o in data if 'text/html' in o and 'text/markdown' not in o]:
            if re.search(r'<img(?![^>]*\balt="[^"])', shown): self._fault(f'a picture without alt text, by {first!r}')
        return [text(o['text/markdown']) for o in data if 'text/markdown' in o]

    def _markdown(self, markdown):
        links, raw = links_in(markdown)
        for part in raw: self._fault(f'a link that shows as text: {part[:70]!r}')
        for address, alt in links:
            if alt == '': self._fault(f'a picture without alt text: {address[:60]}')
            self.links.append(address)

    def _anchors(self, markdown):
        found, often = set(), Counter()
        for part in markdown:
            prose = re.sub(r'^```.*?^```', '', part, flags=re.S | re.M)
            found |= set(re.findall(r'\bid="([^"]+)"', prose)) | set(re.findall(r'\{#([^}\s]+)', prose))
            for heading in re.findall(r'^#{1,6} +(.*)$', prose, flags=re.M):
                if '{#' in heading: continue
                name = slug(heading)
                found.add(f'{name}-{often[name]}' if often[name] else name)
                often[name] += 1
        return found


def read_pages(folder):
    paths = sorted(o for o in folder.rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts)
    return [Page(o.relative_to(folder).as_posix(), json.loads(o.read_text(encoding='utf-8'))) for o in paths]


def fault_of_link(address, page, pages, root, settings):
    "What is wrong with a link, or None. `pages` is a dict, address -> anchors; a link out of the project is not tried"
    site = settings['doc_host'] + settings['doc_baseurl'] + '/'
    repository = settings['git_url'].removeprefix('https://')
    stored = re.match(rf'https://(?:colab\.research\.google\.com/)?{re.escape(repository)}/(?:blob|tree)/main/([^#?]*)',
                      address.replace('google.com/github/', 'google.com/github.com/'))
    if stored: return None if (root/unquote(stored[1])).exists() else 'no such file in the repository'
    address = re.sub(rf'^{re.escape(site)}', '/', address)
    if re.match(r'[a-z][a-z+.-]*:|//', address): return None
    target, _, anchor = address.partition('#')
    target = unquote(target.split('?')[0])
    start = PurePosixPath('.') if target.startswith('/') else PurePosixPath(page.address).parent
    place = os.path.normpath(start/target.lstrip('/')) if target else page.address
    if place == '.': place = 'index.html'
    if place.endswith('.ipynb'): place = pages.by_path.get(place, place)
    if place not in pages: return None if pages.has_file(place) else 'no such page'
    if anchor and unquote(anchor) not in pages[place]: return 'no such place on the page'
    return None


class Site(dict):
    "Address of a page -> its anchors."
    def __init__(self, pages, folder):
        super().__init__({o.address: o.anchors for o in pages})
        self.by_path = {str(o.path): o.address for o in pages}
        self.folder = folder

    def has_file(self, place): return (self.folder/place).is_file()


def faults_of(folder, root=ROOT):
    "Everything that is wrong with the pages in a folder of processed notebooks, one line each"
    pages, settings = read_pages(folder), config(root)
    faults = [fault for page in pages for fault in page.faults]
    often = Counter(page.address for page in pages)
    faults += [f'{address}: {n} notebooks make this page' for address, n in often.items() if n > 1]
    site = Site(pages, folder)
    for page in pages:
        for address in dict.fromkeys(page.links):
            fault = fault_of_link(address, page, site, root, settings)
            if fault: faults.append(f'{page.path}: {address}: {fault}')
    everything = ' '.join(page.words for page in pages).lower()
    return faults + [f'no page has the words {o!r}' for o in SEARCHED if o.lower() not in everything]


def make(root, scratch, workers=2):
    "Let nbdev process the notebooks of `root` in `scratch`; the folder of the pages, and what it said"
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_proc', 'nbdev.yml')
    library = config(root)['lib_name']
    for name in ('nbs', library): shutil.copytree(root/name, scratch/name, ignore=skip, symlinks=True)
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(root/name, scratch/name)
    ours_only = 'ignore::FutureWarning,ignore::DeprecationWarning'  # those are of other libraries
    environment = {**os.environ, 'PYTHONPATH': str(scratch), 'MPLBACKEND': 'Agg', 'PYTHONWARNINGS': ours_only}
    environment.pop('IN_TEST', None)
    done = subprocess.run([sys.executable, '-c', MAKE.format(workers=workers)], cwd=scratch, env=environment, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.stdout.strip()
    if done.returncode: raise RuntimeError(f'the notebooks could not be processed:\n{said}')
    return scratch/'_proc', said


class _Html(html.parser.HTMLParser):
    "The anchors and links of a page in HTML"
    def __init__(self):
        super().__init__()
        self.anchors, self.links, self.bare = set(), [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[o] for o in ('id', 'name') if attrs.get(o)}
        if tag in ('a', 'img') and (attrs.get('href') or attrs.get('src')):
            self.links.append(attrs.get('href') or attrs['src'])
        if tag == 'img' and 'alt' not in attrs: self.bare.append(attrs.get('src', '')[:60])


class HtmlPage:
    def __init__(self, path, content):
        self.path = self.address = path
        parser = _Html()
        parser.feed(content)
        self.anchors, self.links, self.bare = parser.anchors, parser.links, parser.bare


def faults_of_html(folder, root=ROOT):
    "Links that lead nowhere, and pictures without alt text, on the pages of a rendered site"
    paths = sorted(o for o in folder.rglob('*.html') if 'site_libs' not in o.parts)
    pages = [HtmlPage(o.relative_to(folder).as_posix(), o.read_text(encoding='utf-8')) for o in paths]
    site, settings, faults = Site(pages, folder), config(root), []
    for page in pages:
        faults += [f'{page.path}: a picture without alt text: {o}' for o in page.bare]
        for address in dict.fromkeys(page.links):
            fault = fault_of_link(address, page, site, root, settings)
            if fault: faults.append(f'{page.path}: {address[:100]}: {fault}')
    return faults if pages else [f'{folder}: no pages']


def check(root=ROOT, workers=2):
    "Make the pages and print what is wrong with them; True if nothing is."
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)/root.name
        scratch.mkdir()
        folder, said = make(root, scratch, workers)
        faults = faults_of(folder, root)
        count = len(list(folder.rglob('*.ipynb')))
    if said: faults.append(f'nbdev said:\n{said}')
    for fault in faults: print(f'  {fault}')
    print(f'{count} pages, {len(faults)} faults', flush=True)
    return not faults


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--html', type=Path, metavar='FOLDER', help='check the links of a rendered site instead')
    p.add_argument('--workers', type=int, default=2, help='how many notebooks are processed side by side')
    args = p.parse_args()
    if not args.html: raise SystemExit(0 if check(workers=args.workers) else 1)
    faults = faults_of_html(args.html)
    for fault in faults: print(f'  {fault}')
    print(f'{len(faults)} faults')
    raise SystemExit(1 if faults else 0)


if __name__ == '__main__': main()
