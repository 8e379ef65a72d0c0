"""Records: where they say they come from, and what comes back from the file."""

import json
import math
import os
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antehoc_nb.evaluate.scoreboard import read_record, run_record, write_record


def git(cwd, *args):
    subprocess.run(
        ['git', '-c', 'user.name=t', '-c', 'user.email=t@example.com', *args], cwd=cwd, check=True, capture_output=True
    )


def test_the_commit_of_a_record(tmp_path, monkeypatch):
    "None outside a repository and before the first commit; dirty by any file outside results/, from any folder"
    for k in [k for k in os.environ if k.startswith('GIT_')]:
        monkeypatch.delenv(k)
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path))
    repo, below = tmp_path / 'repo', tmp_path / 'repo' / 'nbs'
    below.mkdir(parents=True)
    monkeypatch.chdir(below)

    def commit():
        return run_record({}, 0, {})['commit']

    assert commit() is None
    git(repo, 'init')
    assert commit() is None
    (repo / 'code.py').write_text('1')
    git(repo, 'add', '.')
    git(repo, 'commit', '-m', 'first')
    clean = commit()
    assert len(clean['hash']) == 40 and clean['dirty'] is False
    write_record(run_record({}, 0, {}), repo / 'results' / 'table' / 'a.json')
    assert commit() == clean
    (repo / 'code.py').write_text('2')
    assert commit() == clean | dict(dirty=True)
    git(repo, 'checkout', 'code.py')
    (below / 'results').mkdir()
    (below / 'results' / 'new.py').write_text('3')  # not the repository's results/
    assert commit()['dirty'] is True
    monkeypatch.setenv('PATH', str(tmp_path))  # no git at all
    assert commit() is None


def test_a_record_says_where_it_ran(tmp_path):
    rec = run_record(dict(eta=8), [0, 1], dict(a=math.nan), experiment='e', command='antehoc e', seconds=3)
    rec = read_record(write_record(rec, tmp_path / 'r.json'))
    assert set(rec) == set(
        'schema experiment command config seed results versions hardware commit date seconds'.split()
    )
    assert set(rec['versions']) == set('antehoc_nb python torch torchvision fastai fastcore timm numpy'.split())
    assert rec['versions']['torch'] == torch.__version__ and rec['hardware']['torch_threads'] == torch.get_num_threads()
    assert rec['hardware']['cores'] >= 1 and rec['hardware']['cpu'] and rec['results'] == {'a': None}


def test_no_path_of_this_machine_in_a_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rec = dict(
        schema=1,
        data=tmp_path / 'data' / 'cifar10',
        text=str(tmp_path.parent / 'elsewhere' / 'x.tar'),
        rel='a/b',
        nested=[{tmp_path / 'k': 1}],
    )
    text = write_record(rec, tmp_path / 'r.json').read_text()
    assert str(tmp_path) not in text and str(tmp_path.parent) not in text
    assert read_record('r.json') == dict(schema=1, data='data/cifar10', text='x.tar', rel='a/b', nested=[{'k': 1}])


text = st.text(max_size=5).filter(lambda s: not os.path.isabs(s))
finite = st.floats(allow_nan=False, allow_infinity=False)
leaves = st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), finite, text)


@settings(max_examples=12)
@given(st.recursive(leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(text, v, max_size=4), max_leaves=12))
def test_a_record_comes_back_as_it_was(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / 'record.json'
    assert read_record(write_record(dict(schema=1, t=tree), path))['t'] == tree


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    path = write_record(dict(schema=1, a=1), tmp_path / 'r.json')
    with pytest.raises(TypeError, match=r'record.results\[1\].model is a Linear, which a record cannot hold'):
        write_record(dict(results=[0, dict(model=torch.nn.Linear(2, 2))]), path)
    with pytest.raises(ValueError, match='record.a has keys that are the same as strings'):
        write_record(dict(a={1: 2, '1': 3}), path)

    def killed(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        write_record(dict(schema=1, a=2), path)
    assert read_record(path)['a'] == 1 and [p.name for p in tmp_path.iterdir()] == ['r.json']


def test_a_record_is_sorted_json_that_other_programs_read(tmp_path):
    from fastcore.foundation import L

    rec = dict(
        b=[np.float64('nan'), np.bool_(True), torch.tensor(0.5), -math.inf],
        a={np.int64(3): np.arange(2)},
        c=L(1, 2),
        d=torch.float32,
        e=run_record,
        f={'y', 'x'},
        g=torch.tensor([1.0, math.nan], dtype=torch.bfloat16),
    )
    text = write_record(rec, tmp_path / 'r.json').read_text()

    def refuse(c):
        raise AssertionError(c)

    want = dict(
        a={'3': [0, 1]},
        b=[None, True, 0.5, '-inf'],
        c=[1, 2],
        d='torch.float32',
        e='run_record',
        f=['x', 'y'],
        g=[1.0, None],
    )
    assert json.loads(text, parse_constant=refuse) == want
    assert list(json.loads(text)) == sorted(rec) and '\n ' in text and text.endswith('\n')


def test_reading_what_is_no_record(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        read_record(tmp_path / 'no.json', command='antehoc reproduce table1')
    assert 'no.json; to make it, run `antehoc reproduce table1`' in str(e.value)
    bad = tmp_path / 'bad.json'
    for text, says in (
        ('{', 'does not parse as JSON'),
        ('[1]', 'it has no `schema` entry'),
        ('{"a": 1}', 'it has no `schema` entry'),
        ('{"schema": 2}', 'was written with record schema 2, this version reads 1; run its experiment again'),
        ('{"schema": 2, "command": "antehoc reproduce x"}', 'run `antehoc reproduce x`'),
    ):
        bad.write_text(text)
        with pytest.raises(ValueError) as e:
            read_record(bad)
        assert says in str(e.value)
