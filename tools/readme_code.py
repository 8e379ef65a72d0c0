"""Print what README.md tells people to run, so that CI runs what is printed.

`python tools/readme_code.py example` prints the five-line example, `... demo` and `... test` the two set-up commands.
Each is the code fence that follows `<!-- run: NAME -->`.
"""
import re
import sys
from pathlib import Path


def code(name, readme):
    "The first code fence after the marker for `name`."
    m = re.search(rf'<!-- run: {re.escape(name)} -->.*?^```\w*\n(.*?)^```', readme, flags=re.S | re.M)
    if not m: raise SystemExit(f'README.md has no code fence after <!-- run: {name} -->')
    return m[1]


if __name__ == '__main__':
    if len(sys.argv) != 2: raise SystemExit(__doc__)
    print(code(sys.argv[1], (Path(__file__).resolve().parents[1]/'README.md').read_text(encoding='utf-8')), end='')
