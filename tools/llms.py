"""Make nbs/llms.txt, a map of the site for language models: every page of the sidebar, its title and its sentence.

The form is that of llmstxt.org. Quarto publishes the file beside the home page. Titles and sentences are those of the
notebooks, so the map can't go out of step with the site: `python tools/check.py` makes it anew and compares.
"""
import argparse
import json
import re
from configparser import ConfigParser
from pathlib import Path

import yaml

FILE = 'nbs/llms.txt'


def sections(contents, top=None):
    "(section, page) of a sidebar's entries in their order; pages of sections inside a section are the outer one's"
    for entry in contents:
        if isinstance(entry, str): yield top, entry
        elif 'contents' in entry: yield from sections(entry['contents'], top or entry.get('section'))
        elif 'href' in entry: yield top, entry['href']


def title_and_sentence(notebook):
    "What a notebook is called, and the line that says what it is for"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    text = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')
    title, sentence = (re.search(pattern, text, flags=re.M) for pattern in (r'^# +(.+)$', r'^> *(.+)$'))
    if not title or not sentence: raise SystemExit(f'{notebook}: no "# title", or no "> sentence", at the top')
    return title[1].strip(), sentence[1].strip()


def address(page):
    "Where nbdev puts a notebook: `core/01_layers.ipynb` is core/layers.html"
    return re.sub(r'(^|/)\d+[a-z]?_', r'\1', page).removesuffix('.ipynb') + '.html'


def make(root):
    "The text of the map."
    root = Path(root)
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    site = config['DEFAULT']['doc_host'] + config['DEFAULT']['doc_baseurl']
    sidebar = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    listed = [(section, page) for section, page in sections(sidebar) if page.endswith('.ipynb')]
    home, *rest = listed
    title, sentence = title_and_sentence(root/'nbs'/home[1])
    lines, current = [f'# {title}', '', f'> {sentence}'], None
    for section, page in rest:
        if section != current: lines += ['', f'## {section or "Pages"}', '']
        current = section
        title, sentence = title_and_sentence(root/'nbs'/page)
        lines.append(f'- [{title}]({site}/{address(page)}): {sentence}')
    return '\n'.join(lines) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    top = Path(__file__).resolve().parents[1]
    parser.add_argument('--root', type=Path, default=top, help='top level of the repository')
    root = parser.parse_args().root
    text = make(root)
    (root/FILE).write_text(text, encoding='utf-8', newline='\n')
    print(f'{FILE}: {text.count("- [")} pages')


if __name__ == '__main__': main()
