"""Write the picture that a guide opens with: the last figure of `nbs/guides/NAME.ipynb`, as `nbs/guides/NAME.png`.

A guide shows the file at its top, so that a reader sees first what it ends with."""
import argparse
import base64
import json
from pathlib import Path


def last_figure(nb):
    "The last PNG among the outputs of a notebook; None without one"
    outputs = [output for cell in nb['cells'] for output in cell.get('outputs', [])]
    figures = [output['data']['image/png'] for output in outputs if 'image/png' in output.get('data', {})]
    return base64.b64decode(''.join(figures[-1])) if figures else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--root', type=Path, default=Path(__file__).resolve().parents[1], help='top of the repository')
    for path in sorted((parser.parse_args().root/'nbs'/'guides').glob('*.ipynb')):
        text = path.read_text(encoding='utf-8')
        if f']({path.stem}.png)' not in text: continue
        picture = last_figure(json.loads(text))
        if picture is None: raise SystemExit(f'{path}: it opens with {path.stem}.png, but has no figure; run it')
        path.with_suffix('.png').write_bytes(picture)


if __name__ == '__main__': main()
