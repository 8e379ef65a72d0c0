"""A subset of what `benchmarks/zoo.py` tries, and its record."""
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]
QUICK = 'timm/test_vit', 'timm/test_resnet', 'torchvision/squeezenet1_1', 'torchvision/mnasnet0_5'
MORE = 'timm/test_convnext', 'timm/test_mambaout', 'timm/test_byobnet', 'timm/levit_128s', 'transformers/Swin'


@pytest.fixture(scope='module')
def zoo():
    spec = importlib.util.spec_from_file_location('zoo', ROOT/'benchmarks'/'zoo.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('network', [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_from_end_to_end(zoo, network):
    pytest.importorskip(network.partition('/')[0])
    if network.startswith('timm/') and not __import__('timm').is_model(network.removeprefix('timm/')):
        pytest.skip('not in this version of timm')
    found = zoo.check(network)
    assert found['ok'] and found['unseen'] < .5 and not found['warnings'] and len(found['layers']) > 1


@pytest.mark.parametrize('reason', ['the map is the same everywhere', 'no map'])
def test_what_fails_is_said(zoo, monkeypatch, reason):
    def check(network): raise AssertionError(reason)
    monkeypatch.setattr(zoo, 'check', check)
    found = zoo.try_one('timm/test_vit', seconds=60, gigabytes=64)
    assert not found['ok'] and found['reason'] == f'AssertionError: {reason}'


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_ended(zoo, monkeypatch):
    monkeypatch.setattr(zoo, 'check', lambda network: __import__('time').sleep(60))
    assert zoo.try_one('timm/test_vit', seconds=.5, gigabytes=64)['reason'] == 'more than 0.5 s'


def test_a_process_that_computes_too_long_is_ended(zoo, monkeypatch):
    def compute(network):
        while True: pass
    monkeypatch.setattr(zoo, 'check', compute)
    found = zoo.try_one('timm/test_vit', seconds=1, gigabytes=64)
    assert found['reason'] == 'more than 1 s' and found['cpu_seconds'] < 3


def test_a_process_that_ends_is_told_from_one_that_takes_too_long(zoo, monkeypatch):
    monkeypatch.setattr(zoo, 'check', lambda network: __import__('os')._exit(9))
    found = zoo.try_one('timm/test_vit', seconds=60, gigabytes=3)
    assert found['reason'] == 'the process ended, probably for more than 3 GB' and zoo.outcome(found) == 'too large'


@pytest.mark.parametrize('reason, outcome', [
    (None, 'works'), ('ValueError: cnn: no 2-d convolution was run', 'refused'), ('IndexError: list index', 'fails'),
    ("RuntimeError: DefaultCPUAllocator: can't allocate memory", 'too large'), ('more than 300 s', 'too large')])
def test_outcomes(zoo, reason, outcome):
    assert zoo.outcome(dict(ok=reason is None) | (dict(reason=reason) if reason else {})) == outcome


def test_what_is_still_to_try(zoo):
    known = dict(works=dict(ok=True, commit='a'), older=dict(ok=True), fails=dict(ok=False, commit='a'))
    names = ['fails', 'older', 'works', 'new']
    assert zoo.still_to_try(names, known, again=False) == ['new', 'older']
    assert zoo.still_to_try(names, known, again=True) == ['new', 'fails', 'older']


def test_a_record_names_a_clean_commit(zoo, monkeypatch):
    scoreboard = importlib.import_module('antehoc_nb.evaluate.scoreboard')
    for commit in (None, dict(hash='a', dirty=True)):
        monkeypatch.setattr(scoreboard, 'run_record', lambda *args, commit=commit: dict(commit=commit))
        with pytest.raises(SystemExit, match='with all changes committed'): zoo.clean_commit()
    monkeypatch.setattr(scoreboard, 'run_record', lambda *args: dict(commit=dict(hash='a', dirty=False)))
    assert zoo.clean_commit() == 'a'


def test_same_weights(zoo):
    cnn, other = zoo.build('timm/test_vit'), zoo.build('timm/test_vit')
    assert zoo.same_weights(cnn, other)
    other.head.bias.data[0] += 1e-6
    assert not zoo.same_weights(cnn, other)


def test_the_record(zoo):
    record = json.loads(zoo.RECORD.read_text())
    tried = record['networks']
    assert len({entry['network'] for entry in tried}) == len(tried) > 50
    assert all(entry['ok'] or entry['reason'] for entry in tried)
    assert sum(entry['ok'] for entry in tried) > .9 * len(tried)
