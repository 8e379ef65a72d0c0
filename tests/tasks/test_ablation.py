"""An experiment of several seeds that is stopped half-way."""
import json

import pytest

from antehoc_nb.tasks import ablation as W

SCORES = {'l2, T=3': 1., 'control: ones': 4.}


def test_goes_on_with_the_next_seed(tmp_path, monkeypatch):
    ran = []
    def one_seed(dataset, cfg, trials, seed, data):
        if len(ran) == stop_after: raise KeyboardInterrupt
        ran.append(seed)
        return [dict(trial=k, drop=v + seed) for k, v in SCORES.items()], seed / 10
    monkeypatch.setattr(W, '_one_seed', one_seed)
    stop_after, out = 2, tmp_path/'new'/'r.json'
    with pytest.raises(KeyboardInterrupt): W.run_trials('photo-digits', 'cpu', out=out)
    assert ran == [0, 1] and [f.name for f in out.parent.iterdir()] == ['r.json.part']
    stop_after = None
    rec = W.run_trials('photo-digits', 'cpu', out=out)
    assert ran == [0, 1, 2] and [f.name for f in out.parent.iterdir()] == ['r.json']
    assert rec['results'] == dict(rows={'l2, T=3': dict(drop=2.), 'control: ones': dict(drop=5.)}, spread={k: dict(drop=1.) for k in SCORES},
                                  accuracy=[0, .1, .2])
    assert W.trials_table(rec).data['drop'].tolist() == ['2.0 ± 1.0', '5.0 ± 1.0']
    assert json.loads(out.read_text())['config']['seeds'] == [0, 1, 2]


def test_another_configuration_does_not_go_on(tmp_path, monkeypatch):
    ran = []
    def one_seed(dataset, cfg, trials, seed, data):
        ran.append(seed)
        if dataset == 'photo-digits' and seed == 1: raise KeyboardInterrupt
        return [dict(trial='l2, T=3', drop=1.)], 0.
    monkeypatch.setattr(W, '_one_seed', one_seed)
    with pytest.raises(KeyboardInterrupt): W.run_trials('photo-digits', 'cpu', out=tmp_path/'r.json')
    W.run_trials('cifar10', 'cpu', out=tmp_path/'r.json')
    assert ran == [0, 1, 0, 1, 2]
