"""Packaging. Every fact (name, version, requirements) is read from settings.ini."""
import re
import shlex
from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

missing = [o for o in 'lib_name version min_python description author requirements'.split() if not cfg.get(o)]
if missing: raise SystemExit(f"settings.ini lacks: {', '.join(missing)}")

licenses = {'apache2': 'Apache-2.0', 'mit': 'MIT', 'bsd3': 'BSD-3-Clause'}
statuses = {'1': '1 - Planning', '2': '2 - Pre-Alpha', '3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}
lib_path = cfg['lib_path']


def absolute_links(readme):
    "README.md as a package index needs it: pictures and links that are relative here lead to the repository."
    files = f"{cfg['git_url']}/blob/{cfg['branch']}/"
    pictures = cfg['git_url'].replace('//github.com/', '//raw.githubusercontent.com/') + f"/{cfg['branch']}/"
    def _fix(m): return f'{m[1]}{m[2]}]({pictures if m[1] else files}{m[3]}'
    parts = re.split(r'(```.*?```|`[^`\n]*`)', readme, flags=re.S)
    parts[::2] = [re.sub(r'(!?)(\[[^\]]*)\]\((?!\w+:|#|/)([^)\s]+)', _fix, o) for o in parts[::2]]
    return ''.join(parts)


setuptools.setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=absolute_links((here/'README.md').read_text(encoding='utf-8')),
    long_description_content_type='text/markdown',
    keywords=cfg.get('keywords', '').split(),
    license=licenses.get(cfg['license'].lower(), cfg['license']),
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl'],
                  'Source': cfg['git_url'],
                  'Issues': f"{cfg['git_url']}/issues",
                  'Changelog': f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
                  'Paper': cfg['paper_url']},
    author=cfg['author'],
    author_email=cfg.get('author_email', ''),
    classifiers=[f"Development Status :: {statuses[cfg['status']]}",
                 *(f'Intended Audience :: {audience.strip()}' for audience in cfg['audience'].split(',')),
                 f"Natural Language :: {cfg['language'].title()}",
                 'Operating System :: OS Independent',
                 'Programming Language :: Python :: 3',
                 'Programming Language :: Python :: 3 :: Only',
                 *(f'Programming Language :: Python :: {version}' for version in cfg['python_versions'].split()),
                 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                 'Topic :: Scientific/Engineering :: Image Recognition',
                 'Typing :: Typed'],
    packages=setuptools.find_packages(include=[lib_path, f'{lib_path}.*']),
    package_data={lib_path: shlex.split(cfg.get('package_data', ''))},
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg['requirements']),
    extras_require={k.removesuffix('_requirements'): shlex.split(v) for k, v in cfg.items()
                    if k.endswith('_requirements')},
    entry_points={'console_scripts': shlex.split(cfg.get('console_scripts', '')),
                  'nbdev': [f'{lib_path}={lib_path}._modidx:d']},
    zip_safe=False,
)
